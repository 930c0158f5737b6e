"""BitBudget beside other people's optimizers and callbacks."""

import copy
import re
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from timm.optim import Lookahead
from torch import nn
from torch.nn.functional import cross_entropy

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.bitwidth.model_cost import learning_quantizers, mean_width
from cpq_lightning.callbacks import BitBudget
from cpq_lightning.trainer.trajectory import Trajectory
from tests.marks import thorough
from tests.models import Classifier, data

LEARN = {"weight_bits": 8, "min_bits": 2, "learn_bits": True, "first_last_bits": None}


def callbacks(target=4.0, config=None, quantize_from=0, **settings):
    config = CPQConfig(**(LEARN | (config or {})))
    cpq = CPQCallback(config, table=False, levels_file=None, quantize_from=quantize_from)
    return [cpq, BitBudget(target, **settings)]


def logits(model):
    return [q.gates.logit for _, q in quantizers(model) if q.gates.logit is not None]


class Each(pl.Callback):
    """Calls a function at the end of each training batch."""

    def __init__(self, call):
        self.call = call

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.call(trainer, pl_module)


def test_activations_are_learned_behind_a_full_precision_start(fit):
    module = Classifier()
    config = {"act_bits": 8, "learn_act_bits": True}
    fit(module, callbacks(4.0, config, quantize_from=0.3, act_target=5.0), max_epochs=12, limit_val_batches=0)
    assert abs(mean_width(module, "weight") - 4.0) <= 0.1
    # Activations of 192, 512 and 128 elements a sample.
    assert abs(mean_width(module, "activation") - 5.0) <= 0.15
    assert [q.numel for _, q in quantizers(module) if q.kind == "activation"] == [192, 512, 128]


def test_a_target_for_activations_that_are_not_learned_is_refused(fit):
    with pytest.raises(MisconfigurationException, match=r"act_target=5.*no activation to learn"):
        fit(Classifier(), callbacks(4.0, act_target=5.0))


def test_a_learning_layer_in_evaluation_mode_still_gives_its_gates_a_gradient(fit):
    class Halted(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[3].eval()

        def on_before_optimizer_step(self, optimizer):
            assert all(logit.grad is not None for logit in logits(self))

    fit(Halted(), callbacks(), max_epochs=1)


def test_lookahead_learns_widths_too(fit):
    moved = []
    module = Classifier(make_optimizer=lambda parameters: Lookahead(torch.optim.SGD(parameters, lr=0.05)))
    note = Each(lambda trainer, pl_module: moved.append([float(logit.detach().sum()) for logit in logits(pl_module)]))
    fit(module, [*callbacks(4.0), note], max_epochs=10, limit_val_batches=0)
    assert abs(mean_width(module, "weight") - 4.0) <= 0.1
    assert len({tuple(values) for values in moved[:16]}) == 16


def test_an_optimizer_without_step_hooks_is_named(fit):
    class Bare(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure() if closure is not None else None
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.sub_(group["lr"] * p.grad)
            return loss

    Bare.step.hooked = True  # torch then leaves the method as it is
    module = Classifier(make_optimizer=partial(Bare, lr=0.01))
    with pytest.warns(UserWarning, match="no gate has been updated"):
        fit(module, callbacks(4.0), max_epochs=12, limit_val_batches=0)


@pytest.mark.parametrize("target", [3.5, *thorough(4.4)])
def test_a_teacher_without_gradients_neither_takes_bits_from_the_network_nor_leaves_it_any(fit, target):
    class Taught(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), *self.layers(6), nn.Linear(32, 4))
            self.teacher = copy.deepcopy(self.net)

        def layers(self, count):
            return [layer for _ in range(count) for layer in (nn.Linear(32, 32), nn.ReLU())]

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                wanted = self.teacher(batch[0]).softmax(-1)
            return super().training_step(batch, batch_idx) + cross_entropy(self.net(batch[0]), wanted)

    module = Taught()
    fit(module, callbacks(target), max_epochs=10, limit_val_batches=0)
    assert mean_width(module.net, "weight") == pytest.approx(target, abs=0.1)
    assert mean_width(module.teacher, "weight") == pytest.approx(target, abs=0.1)


class Tied(Classifier):
    """A middle layer that shares its weight with the last one."""

    def __init__(self):
        super().__init__()
        layers = [nn.Flatten(), nn.Linear(192, 8)]
        for _ in range(4):
            layers += [nn.ReLU(), nn.Linear(8, 8)]
        self.net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 8))
        self.net[-1].weight = self.net[5].weight


def test_layers_tied_to_an_end_stay_exempt_in_every_forward_and_resume(fit, tmp_path):
    settings = {"first_last_bits": 8}
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    module = Tied()
    fit(module, [*callbacks(3.0, settings), saver], max_epochs=8, enable_checkpointing=True)
    first_or_last = [name for name, layer in quantized_layers(module) if layer.weight_quantizer.first_or_last]
    assert first_or_last == ["net.1", "net.5", "net.11"]
    widths = {name: q.decided_widths().tolist() for name, q in quantizers(module)}
    again = Tied()
    fit(again, callbacks(3.0, settings), max_epochs=9, ckpt_path=next(tmp_path.glob("epoch=7*.ckpt")))
    assert {name: q.decided_widths().tolist() for name, q in quantizers(again)} == widths


def test_widths_are_learned_where_calibration_before_training_fails(fit):
    class Late(Classifier):
        """Registers its layers in another order than it calls them, and cannot train before training has begun."""

        def __init__(self):
            super().__init__()
            layers = [nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(192, 8)]
            self.net = nn.ModuleList(layers)
            self.ready = False

        def on_train_batch_start(self, batch, batch_idx):
            self.ready = True

        def training_step(self, batch, batch_idx):
            if not self.ready:
                raise RuntimeError("not ready")
            x = batch[0].flatten(1)
            for layer in reversed(self.net):
                x = layer(x).relu()
            return cross_entropy(x, batch[1])

        validation_step = None

    module = Late()
    with pytest.warns(UserWarning, match="could not be calibrated"):
        fit(module, callbacks(4.0, {"first_last_bits": 8}), max_epochs=8)
    assert not learning_quantizers(module)
    first_or_last = [name for name, q in quantizers(module) if q.first_or_last and q.kind == "weight"]
    assert first_or_last == ["net.0.weight_quantizer", "net.2.weight_quantizer"]
    assert module.net[1].weight_quantizer.decided_widths().tolist() == [4]


@pytest.mark.parametrize(("target", "freeze"), [(5.0, 0.8), *thorough((3.0, 0.9))])
def test_a_run_resumed_with_another_budget_decides_anew(fit, tmp_path, target, freeze):
    """The checkpoint lies between decision and freeze."""
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(Classifier(), [*callbacks(3.0, freeze=0.8), saver], max_epochs=20, enable_checkpointing=True)
    path = next(tmp_path.glob("epoch=14*.ckpt"))
    search = torch.load(path, weights_only=True)["callbacks"]["BitBudget"]["search"]
    assert search["settled"] is not None
    module = Classifier()
    both = callbacks(target, freeze=freeze)
    fit(module, both, max_epochs=20, ckpt_path=path)
    assert abs(mean_width(module, "weight") - target) <= 0.15


def test_another_budget_for_widths_that_are_fixed_is_named(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(Classifier(), [*callbacks(4.0), saver], max_epochs=8, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"BitBudget comes too late.*fixed for 4 average bits"):
        fit(Classifier(), callbacks(5.0), max_epochs=8, ckpt_path=next(tmp_path.glob("epoch=6*.ckpt")))


class Backbone(Classifier):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:-1], self.net[-1]
        del self.net

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("first", [True, False])
def test_a_backbone_that_is_unfrozen_in_mid_run_keeps_its_gates_out_of_the_optimizer(fit, tmp_path, first):
    """CPQCallback before the finetuning callback, and behind it; uninterrupted, and resumed before and after it.

    Resumed after it, Lightning's callback leaves the backbone frozen: there only the arrival is the same.
    """
    states = []
    for resumed in (None, 1, 5):
        torch.manual_seed(0)
        module = Backbone()
        tune = BackboneFinetuning(unfreeze_backbone_at_epoch=3, lambda_func=lambda epoch: 1.0)
        own = callbacks(4.0, {"first_last_bits": None})
        saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        seen = set()

        def note(trainer, pl_module, seen=seen):
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            seen.add(any(id(logit) in held for logit in logits(pl_module)))

        order = [*own, tune] if first else [tune, *own]
        path = next(tmp_path.glob(f"epoch={resumed}*.ckpt")) if resumed else None
        fit(
            module,
            [*order, Each(note), *([] if resumed else [saver])],
            loaders=(data(shuffle=False), data(shuffle=False)),
            max_epochs=10,
            enable_checkpointing=not resumed,
            ckpt_path=path,
        )
        assert seen == {False}
        assert abs(mean_width(module, "weight") - 4.0) <= 0.1
        states.append(module.state_dict())
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


def test_gates_of_an_optimizer_that_is_toggled_off_see_no_loss_of_the_other(fit):
    """Step, then zero_grad: what the generator's loss leaves in the discriminator is never cleared before its turn."""
    leaked = []

    class Adversarial(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 16))
            self.judge = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            made, judged = self.optimizers()
            self.toggle_optimizer(made)
            self.manual_backward(self.judge(self.generator(batch[0].flatten(1))).mean())
            leaked.extend(logit.grad.abs().sum().item() for logit in logits(self.judge) if logit.grad is not None)
            made.step()
            made.zero_grad()
            self.untoggle_optimizer(made)
            self.toggle_optimizer(judged)
            self.manual_backward(self.judge(self.generator(batch[0].flatten(1)).detach()).square().mean())
            judged.step()
            judged.zero_grad()
            self.untoggle_optimizer(judged)

        def configure_optimizers(self):
            return [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (self.generator, self.judge)]

    module = Adversarial()
    fit(module, callbacks(4.0), max_epochs=10)
    assert leaked
    assert max(leaked) == 0
    assert abs(mean_width(module, "weight") - 4.0) <= 0.1


def test_a_best_checkpoint_from_before_the_freeze_is_named(fit, tmp_path):
    class Falling(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", -float(self.global_step))

    saver = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    with pytest.warns(UserWarning, match=r"'val_acc'.*was saved before BitBudget had fixed the widths"):
        fit(Falling(), [*callbacks(4.0), saver], max_epochs=10, enable_checkpointing=True)
    own = CPQCallback(quantize_from=0.5, table=False, levels_file=None)
    saver = ModelCheckpoint(tmp_path / "again", monitor="val_acc", mode="max")
    with pytest.warns(UserWarning, match="was saved before quantization had begun"):
        fit(Falling(), [own, saver], max_epochs=4, enable_checkpointing=True)


def test_costs_can_be_monitored(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="cpq/weight_bits", mode="min", filename="best")
    fit(Classifier(), [*callbacks(4.0), saver], max_epochs=10, enable_checkpointing=True)
    assert saver.best_model_score is not None
    assert float(saver.best_model_score) < 8


def test_state_stays_float32_in_a_bfloat16_run(fit):
    module = Classifier()
    fit(module, callbacks(4.0), max_epochs=6, precision="bf16-true")
    for name, value in module.state_dict().items():
        if "quantizer" in name and value.is_floating_point():
            assert value.dtype == torch.float32, name


class Foreign(pl.Callback):
    start_step, unit = 10**9, "bops"


@pytest.mark.parametrize("settings", [{"freeze": 1.0}, {"fast_dev_run": 3}])
def test_no_warning_where_nothing_is_amiss(fit, settings):
    """Nor are attributes of other people's callbacks taken for ours."""
    freeze = {"freeze": settings.pop("freeze")} if "freeze" in settings else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Classifier(), [Foreign(), *callbacks(4.0, **freeze)], max_epochs=16, **settings)
    found = [str(w.message) for w in caught if re.search("freeze|rough", str(w.message))]
    assert not found


def test_measurements_of_an_activation_go_with_its_width(fit):
    module = Classifier()
    fit(module, callbacks(4.0, {"learn_act_bits": True, "act_bits": 8}, act_target=4.0), max_epochs=10)
    quantizer = module.net[3].input_quantizer
    quantizer.measured = (200, 0.1)
    quantizer.fix_widths([2])
    assert quantizer.measured is None


def test_a_best_checkpoint_that_was_written_again_behind_the_freeze_is_not_named(fit, tmp_path):
    class Rising(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", float(self.global_step))

    saver = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", filename="best", enable_version_counter=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Rising(), [*callbacks(4.0), saver], max_epochs=10, enable_checkpointing=True)
    assert not [w for w in caught if "was saved before" in str(w.message)]


def test_a_group_by_its_name_is_taken_too(fit):
    class Adds(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                spare = nn.Parameter(torch.zeros(3))
                trainer.optimizers[0].add_param_group(param_group={"params": [spare, *logits(pl_module)]})
                assert [len(g["params"]) for g in trainer.optimizers[0].param_groups][-1] == 1

    fit(Classifier(), [*callbacks(4.0), Adds()], max_epochs=8)


@pytest.mark.thorough
def test_the_trajectory_stays_short_however_often_is_logged(fit):
    both = callbacks(4.0)
    loaders = (data(2, count=32), None)
    fit(Classifier(), both, max_epochs=25, log_every_n_steps=1, loaders=loaders)
    assert 150 < len(both[1].state_dict()["trajectory"]) <= 250


def test_the_trajectory_stays_short_however_long_a_run_is():
    for length, rows in ((100, 100), (251, 126), (10_000, 250), (float("inf"), 200)):
        trajectory = Trajectory()
        for step in range(10_000 if length == float("inf") else length):
            if trajectory.due(step, length):
                trajectory.note(step, {}, {})
        assert len(trajectory.state_dict()) == rows
