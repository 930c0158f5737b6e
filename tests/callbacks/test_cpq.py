import copy
import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from cpq_lightning import CPQCallback, CPQConfig, attach, levels
from cpq_lightning.attach.layers import is_attached, quantizers
from cpq_lightning.callbacks import DropBitsSchedule, TemperatureSchedule
from cpq_lightning.report import read_run
from cpq_lightning.trainer.checks import monitored_metric
from tests.models import Classifier, convnet, data, quantized_weight, run_of

CONFIG = CPQConfig(weight_bits=4, act_bits=4, min_bits=3)


def callbacks(**settings):
    return [CPQCallback(CONFIG, table=False, **settings), TemperatureSchedule(), DropBitsSchedule()]


def test_a_plain_module_trains_quantized_and_exports_its_levels(fit, tmp_path):
    module = Classifier()
    before = {id(p) for p in module.parameters()}
    fit(module, callbacks())
    assert is_attached(module)
    assert before <= {id(p) for p in module.parameters()}
    content = json.loads((run_of(tmp_path) / "levels.json").read_text())
    assert (content["format"], content["version"]) == ("cpq-levels", 1)
    assert [layer["name"] for layer in content["layers"]] == ["net.0", "net.3", "net.6"]
    assert content["totals"]["weight_bits_avg"] == 4
    assert all(layer["activation"]["used_levels"] > 1 for layer in content["layers"])


def test_exported_levels_are_those_of_the_evaluated_weights(fit):
    module = Classifier()
    fit(module, callbacks())
    module.eval()
    for record in levels(module):
        if record.kind == "weight":
            layer = module.get_submodule(record.name)
            scale = layer.weight_quantizer.along_channels(torch.tensor(record.scale), layer.weight)
            codes = quantized_weight(layer) / scale
            torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
            assert record.low <= codes.round().min()
            assert codes.round().max() <= record.high
            assert record.used_levels == len(codes.round().unique())


def test_evaluation_is_deterministic_with_gates(fit):
    module = Classifier()
    fit(module, callbacks())
    module.eval()
    x = torch.randn(4, 3, 8, 8)
    assert module.net(x).equal(module.net(x))


def test_quantize_from_trains_in_full_precision_before_it(fit):
    plain, quantized = Classifier(), Classifier()
    quantized.load_state_dict(plain.state_dict())
    torch.manual_seed(5)
    fit(plain, max_epochs=1)
    torch.manual_seed(5)
    fit(quantized, [CPQCallback(CPQConfig(), quantize_from=4, table=False)], max_epochs=1)
    assert not any(q.active for _, q in quantizers(quantized))
    for (name, a), b in zip(plain.net.named_parameters(), _plain_parameters(quantized), strict=True):
        assert a.equal(b), name


def test_a_module_with_an_example_input_is_summarized_before_quantization_begins(fit):
    """Lightning's summary runs the example without gradients, and asks each output for its way back."""

    class Module(Classifier):
        def forward(self, x):
            return self.net(x)

    module = Module()
    module.example_input_array = torch.randn(2, 3, 8, 8)
    fit(module, callbacks(quantize_from=0.5), enable_model_summary=True)


def _plain_parameters(module):
    own = {id(p) for _, q in quantizers(module) for p in q.parameters()}
    return [p for p in module.parameters() if id(p) not in own]


def test_quantize_from_a_fraction_switches_in_the_run(fit):
    module = Classifier()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(all(q.active for _, q in quantizers(pl_module)))

    fit(module, [CPQCallback(quantize_from=0.5, table=False), Watch()], max_epochs=2)
    assert seen == [False] * 4 + [True] * 4
    assert all(q.fitted for _, q in quantizers(module))


def test_the_first_batch_of_the_sanity_check_is_audited_eagerly(fit):
    """Dynamo would trace the audit with it, and give up: layers that are quantized were reported as left out."""
    compiled = []

    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend=lambda graph, _: compiled.append(graph) or graph.forward)

    class Watch(pl.Callback):
        def __init__(self):
            self.after_the_first = self.after_the_second = None

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if trainer.sanity_checking and not batch_idx:
                self.after_the_first = len(compiled)

        def on_sanity_check_end(self, trainer, pl_module):
            self.after_the_second = len(compiled)

    watch = Watch()
    torch._dynamo.reset()
    fit(Compiled(), [CPQCallback(table=False), watch], max_epochs=1, num_sanity_val_steps=2)
    assert watch.after_the_first == 0
    assert watch.after_the_second > 0


def test_ranges_are_calibrated_before_the_sanity_check(fit):
    class Watch(pl.Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            self.ready = all(q.fitted for _, q in quantizers(pl_module))

    module, watch = Classifier(), Watch()
    module.net[1].momentum = 0.5
    statistics = copy.deepcopy(module.net[1].state_dict())
    torch.manual_seed(3)
    fit(module, [CPQCallback(table=False), watch], max_epochs=0)
    assert watch.ready
    for key, value in statistics.items():
        assert module.net[1].state_dict()[key].equal(value), f"calibration moved {key}"


def test_calibration_leaves_metrics_and_log_alone(fit):
    from torchmetrics.classification import MulticlassAccuracy

    class Metered(Classifier):
        def __init__(self):
            super().__init__()
            self.metric = MulticlassAccuracy(4)

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.metric.update(logits, batch[1])
            self.log("metric", self.metric)
            return nn.functional.cross_entropy(logits, batch[1])

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.count = pl_module.metric._update_count

    watch, module = Watch(), Metered()
    fit(module, [CPQCallback(table=False), watch], max_epochs=1)
    assert watch.count == 0
    assert "log" not in module.__dict__


def test_a_training_step_that_fails_outside_the_loop_falls_back(fit):
    class Needy(Classifier):
        def __init__(self):
            super().__init__()
            self.ready, self.notes = False, []

        def on_train_start(self):
            assert self.notes == [], "a step that failed in calibration left a note"
            self.ready = True

        def training_step(self, batch, batch_idx):
            self.notes.append(batch_idx)
            assert self.ready, "on_train_start has not run"
            return super().training_step(batch, batch_idx)

    module = Needy()
    with pytest.warns(UserWarning, match=r"(?s)AssertionError: on_train_start has not run.*first training batch"):
        fit(module, [CPQCallback(table=False)], max_epochs=1)
    assert all(q.active and q.fitted for _, q in quantizers(module))


def test_manual_optimization_with_two_optimizers(fit):
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.01), torch.optim.Adam(self.net[3:].parameters(), 1e-3)]

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

    module = Manual()
    start = copy.deepcopy(module.state_dict())
    trainer = fit(module, callbacks(quantize_from=0.5), max_epochs=2)
    own = [{id(p) for p in companion.parameters} for companion in trainer.callbacks[0]._companions]
    assert id(module.net[0].weight_quantizer.log_scale) in own[0] - own[1]
    assert id(module.net[3].weight_quantizer.log_scale) in own[1] - own[0]
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert not held & {id(p) for _, q in quantizers(module) for p in q.parameters()}
    assert all(q.active and q.log_scale.any() for _, q in quantizers(module))
    assert not start["net.0.weight"].equal(module.net[0].weight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(fit, precision):
    module = Classifier()
    trainer = fit(module, callbacks(), precision=precision, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert trainer.state.finished
    for name, quantizer in quantizers(module):
        assert quantizer.log_scale.dtype == (torch.float64 if precision == "64-true" else torch.float32)
        assert torch.isfinite(quantizer.scale()).all(), name
        assert quantizer.log_scale.any(), name


def test_layers_made_in_configure_model_are_quantized(fit):
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = convnet()

    module = Late()
    fit(module, [CPQCallback(table=False)], max_epochs=1)
    assert is_attached(module)


def test_resumed_run_ends_where_the_uninterrupted_one_does(fit, tmp_path):
    def run(folder, **settings):
        torch.manual_seed(11)
        module = Classifier(make_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=16))
        checkpoint = ModelCheckpoint(tmp_path / folder, save_last=True, save_top_k=-1, every_n_epochs=1)
        loaders = (data(shuffle=False), data(shuffle=False))
        fit(
            module, [*callbacks(quantize_from=0.25), checkpoint], loaders=loaders, enable_checkpointing=True, **settings
        )
        return module

    whole = run("whole", max_epochs=4)
    for stop in (1, 2, 3):
        step = 4 * stop
        resumed = run("resumed", max_epochs=4, ckpt_path=tmp_path / "whole" / f"epoch={stop - 1}-step={step}.ckpt")
        for name, value in whole.state_dict().items():
            assert value.equal(resumed.state_dict()[name]), f"{name} after a stop at step {step}"


def test_resumed_companion_goes_on_exactly(fit, tmp_path):
    def run(folder, **settings):
        torch.manual_seed(11)
        module = Classifier(lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2))
        checkpoint = ModelCheckpoint(tmp_path / folder, save_top_k=-1, every_n_epochs=1)
        loaders = (data(shuffle=False), data(shuffle=False))
        fit(module, [CPQCallback(table=False), checkpoint], loaders=loaders, enable_checkpointing=True, **settings)
        return module

    whole = run("whole", max_epochs=2)
    resumed = run("resumed", max_epochs=2, ckpt_path=tmp_path / "whole" / "epoch=0-step=4.ckpt")
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name


def test_checkpoint_restores_through_the_callback_and_through_attach(fit, tmp_path):
    module = Classifier()
    trainer = fit(module, callbacks(), enable_checkpointing=True)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    x = torch.randn(4, 3, 8, 8)
    expected = module.eval().net(x)

    state = torch.load(path, weights_only=True)["state_dict"]
    restored = attach(Classifier(), CONFIG)
    restored.load_state_dict(state)
    assert restored.eval().net(x).equal(expected)

    tested = Classifier()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(callbacks=[CPQCallback(CONFIG)], **quiet).test(
        tested, data(shuffle=False), ckpt_path=path, verbose=False
    )
    assert tested.eval().net(x).equal(expected)


@pytest.mark.parametrize("decay", [0.9, 0.9995])
@pytest.mark.parametrize("quantize_from", [0, 0.5])
def test_averaged_weights_keep_the_quantizers_state(fit, tmp_path, quantize_from, decay):
    module = Classifier()
    callbacks = [CPQCallback(CONFIG, quantize_from=quantize_from, table=False), EMAWeightAveraging(decay=decay)]
    trainer = fit(module, callbacks, max_epochs=4, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    restored = attach(Classifier(), CONFIG)
    restored.load_state_dict(torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(4, 3, 8, 8)
    for model in (module, restored):
        for name, quantizer in quantizers(model):
            assert quantizer.active, name
            assert quantizer.fitted, name
            assert quantizer.bits in (4, 8), name
            assert quantizer.numel > 0, name
    assert restored.eval().net(x).equal(module.eval().net(x))
    (saved,) = tmp_path.rglob("checkpoints/*.ckpt")
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert all(value.item() in (4, 8) for key, value in state.items() if key.endswith(".bits_"))
    assert all(value.item() == 1 for key, value in state.items() if key.endswith(".active_"))


def test_calibration_leaves_no_trace_in_the_module(fit):
    class Noting(Classifier):
        def __init__(self):
            super().__init__()
            self.losses, self.count = [], 0
            self.teacher = nn.Parameter(torch.zeros(1), requires_grad=False)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.detach())
            self.count += 1
            with torch.no_grad():
                self.teacher += 1
            return loss

    module = Noting()
    fit(module, [CPQCallback(table=False)], max_epochs=1)
    assert (len(module.losses), module.count, module.teacher.item()) == (4, 4, 4)


def test_layers_made_in_setup_are_refused(fit):
    class Late(Classifier):
        def setup(self, stage):
            self.net.add_module("late", nn.Linear(4, 4))

    with pytest.raises(MisconfigurationException, match=r"'net\.late'.*make them in __init__"):
        fit(Late(), [CPQCallback()])


def test_a_start_behind_the_end_is_said(fit):
    with pytest.warns(UserWarning, match="the run ends in full precision"):
        fit(Classifier(), [CPQCallback(quantize_from=1000, table=False)], max_epochs=1)


def test_a_callback_serves_a_second_fit_afresh(fit):
    callback = CPQCallback(quantize_from=0.5, table=False)
    fit(Classifier(), [callback], max_epochs=2)
    assert set(callback._metrics) == {"before quantization", "quantized"}
    callback.quantize_from = 0
    fit(Classifier(), [callback], max_epochs=1)
    assert set(callback._metrics) == {"quantized"}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda: [EMAWeightAveraging(), CPQCallback()], "put CPQCallback first"),
        (lambda: [StochasticWeightAveraging(swa_lrs=0.01), CPQCallback()], "put CPQCallback first"),
        (lambda: [CPQCallback(), CPQCallback()], "more than one CPQCallback"),
    ],
)
def test_callbacks_in_each_others_way_are_refused(fit, order, message):
    module = Classifier()
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, order())
    assert not is_attached(module)


def test_fsdp1_is_refused(fit, monkeypatch):
    module = Classifier()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[CPQCallback()])
    # FSDP1 itself starts on GPUs only.
    monkeypatch.setattr(trainer.strategy, "__class__", type("Sub", (FSDPStrategy,), {}), raising=False)
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy"):
        trainer.callbacks[0].setup(trainer, module, "fit")
    assert not is_attached(module)


def test_a_module_without_layers_is_refused(fit):
    class Empty(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.BatchNorm2d(3)

    with pytest.raises(MisconfigurationException, match="no layer to quantize"):
        fit(Empty(), [CPQCallback()])


def test_empty_training_data_are_left_to_lightning(fit):
    with pytest.warns(UserWarning, match="because the training data have no batch"):
        fit(Classifier(), [CPQCallback()], loaders=(data(count=0, shuffle=False), data(shuffle=False)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize_from": -1}, "quantize_from must not be negative"),
        ({"quantize_from": 1.5}, "fraction of the run"),
        ({"lr_factor": 0}, "lr_factor must be over 0"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CPQCallback(**settings)


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(fit, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(UserWarning, match="could not be written"):
        trainer = fit(
            Classifier(), [CPQCallback(table=False, levels_file="../file/levels.json")], default_root_dir=blocked
        )
    assert trainer.state.finished


def test_table_at_fit_end_names_layers_and_both_accuracies(fit, capsys):
    fit(Classifier(), [CPQCallback(quantize_from=0.5)], max_epochs=4)
    printed = capsys.readouterr().out
    for expected in ("0 *", "6 *", "relative to net", "before quantization", "quantized", "val_acc"):
        assert expected in printed


def test_fast_dev_run_writes_nothing(fit, tmp_path):
    fit(Classifier(), [CPQCallback(table=False)], fast_dev_run=True)
    assert not list(tmp_path.iterdir())


class Naming(Classifier):
    """Logs metrics of these names in validation: 0, 1 and so on."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def validation_step(self, batch, batch_idx):
        for value, name in enumerate(self.names):
            self.log(name, float(value))


def run_entry(fit, folder, names, **settings):
    callback = CPQCallback(CONFIG, table=False, **settings)
    fit(Naming(*names), [callback], max_epochs=1, logger=CSVLogger(folder))
    return read_run(callback.run_folder), json.loads((callback.run_folder / "levels.json").read_text())["run"]


@pytest.mark.parametrize("name", ["val_acc", "accuracy", "valid/f1"])
def test_reports_are_the_same_whatever_metrics_are_called(fit, tmp_path, name):
    run, entry = run_entry(fit, tmp_path, [name, "other"], monitor=name)
    assert entry["metrics"] == {"quantized": {name: 0.0, "other": 1.0}}
    assert (entry["monitor"], run.metric, run.value) == (name, name, 0.0)


def test_a_monitor_that_no_validation_logs_is_named_with_those_that_are(fit, tmp_path):
    with pytest.warns(UserWarning, match=r"monitor='f1' names no metric .*which logged \['a', 'b'\]"):
        with pytest.raises(ValueError, match="singles out none"):
            run_entry(fit, tmp_path, ["a", "b"], monitor="f1")


@pytest.mark.parametrize(
    ("own", "checkpoint", "stopping", "logged", "chosen"),
    [
        ("b", "a", "a", ["a", "b"], "b"),
        ("c", "a", "a", ["a"], None),
        (None, "a", "b", ["a", "b"], "a"),
        (None, None, "b", ["a", "b"], "b"),
        (None, "train_loss", "b", ["a", "b"], "b"),
        (None, "a_epoch", None, ["a", "b"], "a"),
        (None, None, None, ["a", "b"], None),
        (None, "train_loss", None, ["a"], "a"),
        (None, None, None, [], None),
    ],
)
def test_the_metric_is_the_callback_s_else_a_monitored_one_else_the_only_one(own, checkpoint, stopping, logged, chosen):
    trainer = SimpleNamespace(
        callbacks=[CPQCallback(monitor=own)],
        checkpoint_callbacks=[ModelCheckpoint(monitor=checkpoint)],
        early_stopping_callbacks=[SimpleNamespace(monitor=stopping)],
    )
    assert monitored_metric(trainer, logged) == chosen
