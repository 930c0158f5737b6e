"""What goes wrong in other people's runs must not go wrong in the quantizers."""

import errno
import os
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.lightning_matrix.common import Plain, check, data, fit, trainer_in
from cpq_lightning import CPQCallback, CPQConfig, levels
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.bitwidth.model_cost import learning_quantizers
from cpq_lightning.callbacks import BitBudget
from tests.marks import thorough
from tests.models import IMAGES, LABELS, Classifier, run_of


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!.*(could not be|never called)).*")
        yield


def state(module):
    return {name: value.clone() for name, q in quantizers(module) for name, value in q.state_dict(prefix=name).items()}


class Spoiled(Callback):
    """Puts a value into some batches, on their way into the step, and holds what the quantizers were before."""

    def __init__(self, value, batches, everywhere=False):
        self.value, self.batches, self.everywhere, self.moved = value, batches, everywhere, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now = trainer.fit_loop.total_batch_idx
        if self.now in self.batches:
            self.before = state(pl_module)
            images = batch[0]
            (images if self.everywhere else images[:1, :1, :2]).fill_(self.value)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.now in self.batches:
            after = state(pl_module)
            # The counter of the gates' noise counts forwards, whatever comes of them.
            moved = [n for n, v in self.before.items() if not torch.equal(v, after[n]) and not n.endswith("noise_step")]
            self.moved += moved


def copied():
    """A loader whose batches may be written on."""
    return DataLoader([(image.clone(), label) for image, label in data().dataset], 16)


def test_a_bad_batch_that_amp_skips_moves_no_quantizer(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    spoiled = Spoiled(float("nan"), {5, 20})
    trainer, module = (
        trainer_in(tmp_path, spoiled, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]),
        Plain(),
    )
    # Ours come first and have set schedules by then; batch norm is the user's, and keeps what it has seen.
    module.net[1] = nn.Identity()
    trainer.fit(module, copied(), data())
    assert spoiled.moved == []
    check(trainer, module)


def test_infinity_in_a_batch_is_the_highest_level(tmp_path):
    """What an input quantizer clips it has clipped: gradients stay finite, without AMP too."""
    module = Plain()
    fit(tmp_path, module, Spoiled(float("inf"), {5, 20}), loader=copied())
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_first_batch_of_nothing_but_nan_sets_no_range(tmp_path):
    spoiled = Spoiled(float("nan"), {0}, everywhere=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = Plain()
    module.net[1] = nn.Identity()
    trainer = trainer_in(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    trainer.callbacks = [spoiled, CPQCallback(quantize_from=0.0, table=False, calibration_batches=1)]
    trainer.fit(module, copied(), data())
    assert all(v.isfinite().all() for v in module.state_dict().values())
    assert all(q.fitted for _, q in quantizers(module))


def test_a_gradient_that_is_not_finite_moves_no_gate_without_amp_either(tmp_path):
    class Poison(Callback):
        def __init__(self):
            self.gates = None

        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 7:
                logits = [q.gates.logit for _, q in quantizers(pl_module) if q.learns_bits]
                self.gates = [logit.detach().clone() for logit in logits]
                logits[0].grad.fill_(torch.nan)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 8:
                logits = [q.gates.logit for _, q in quantizers(pl_module) if q.learns_bits]
                assert all(torch.equal(a, b) for a, b in zip(self.gates, logits, strict=True))

    poison = Poison()
    fit(tmp_path, Plain(), poison)
    assert poison.gates is not None


def test_batches_of_one(tmp_path):
    module = Plain()
    module.net[1] = nn.Identity()
    few = DataLoader(torch.utils.data.Subset(data().dataset, range(8)), 1)
    fit(tmp_path, module, loader=few, max_epochs=5)


@pytest.mark.parametrize(
    ("what", "per_channel"),
    [
        ("all-zero layer", False),
        ("dead channel", True),
        ("constant input", False),
        *thorough(("all-zero layer", True), ("dead channel", False), ("constant input", True)),
    ],
)
def test_tensors_without_a_scale(fit, what, per_channel):
    module = Classifier()
    with torch.no_grad():
        weight = module.net[3].weight
        (weight if what == "all-zero layer" else weight[2:3]).zero_()
        if what == "all-zero layer":
            module.net[3].bias.zero_()
    loader = data()
    if what == "constant input":
        loader = DataLoader(TensorDataset(torch.zeros_like(IMAGES), LABELS), 16)
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, per_channel=per_channel, first_last_bits=None)
    fit(module, [CPQCallback(config, table=False), BitBudget(4.0)], max_epochs=10, loaders=(loader, data()))
    assert all(v.isfinite().all() for v in module.state_dict().values())
    assert all(q.scale().min() > 0 for _, q in quantizers(module))
    assert not learning_quantizers(module)
    assert all(r.relative_error is None or 0 <= r.relative_error <= 1 for r in levels(module))


def test_a_backbone_that_is_frozen_from_the_start_learns_its_widths_all_the_same(tmp_path):
    class Frozen(Plain):
        def __init__(self):
            super().__init__(lambda parameters: torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3))
            self.net[:-1].requires_grad_(False)

    module = Frozen()
    before = module.net[5].weight.clone()
    fit(tmp_path, module)
    assert torch.equal(module.net[5].weight, before)
    assert len({r.bits for r in levels(module) if r.kind == "weight" and not r.first_or_last}) >= 1


class Shared(Plain):
    """Two layers with one weight, one of which is called twice a forward."""

    def __init__(self):
        super().__init__()
        self.net[3] = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.twin.weight = self.net[3].weight

    def forward(self, images):
        x = self.net[:5](images)
        return self.net[5:](self.twin(self.twin(x).relu()).relu())


def test_a_shared_weight_and_a_layer_that_is_called_twice(tmp_path):
    module = Shared()
    trainer = trainer_in(tmp_path)
    trainer.fit(module, data(), data())
    assert module.twin.weight_quantizer is module.net[3].weight_quantizer
    assert module.twin.weight is module.net[3].weight
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert not learning_quantizers(module)
    # It is counted once in the size, and in the average.
    weights = {id(q): q.numel for _, q in quantizers(module) if q.kind == "weight" and not q.first_or_last}
    assert sum(weights.values()) == 576 + 864 + 3072


def test_a_layer_that_is_never_called_is_named_and_costs_nothing_else(tmp_path):
    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

    module = Spare()
    trainer = trainer_in(tmp_path)
    with pytest.warns(UserWarning, match=r"never called.*spare.weight_quantizer"):
        trainer.fit(module, data(), data())
    assert not learning_quantizers(module)
    assert (run_of(tmp_path) / "levels.json").exists()


def full_disk(monkeypatch, suffixes):
    """Writing to files of some kinds fails as on a disk that is full, after the first bytes."""
    replace = os.replace

    def failing(source, target):
        if str(target).endswith(suffixes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)


@pytest.mark.parametrize("suffixes", [(".json", ".csv"), (".csv",), (".png",)])
def test_a_full_disk_at_export_loses_no_training_and_the_message_names_the_checkpoint(tmp_path, monkeypatch, suffixes):
    full_disk(monkeypatch, suffixes)
    saver = ModelCheckpoint(tmp_path / "saved", filename="last")
    trainer, module = trainer_in(tmp_path, saver, enable_checkpointing=True), Plain()
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        trainer.fit(module, data(), data())
    check(trainer, module)
    messages = [str(w.message) for w in caught if "No space left" in str(w.message)]
    assert messages
    assert all(str(tmp_path / "saved" / "last.ckpt") in message for message in messages)
    assert (tmp_path / "saved" / "last.ckpt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written_loses_no_training_and_the_message_names_the_checkpoint(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    saver = ModelCheckpoint(tmp_path / "saved", filename="last")
    trainer, module = trainer_in(tmp_path, saver, enable_checkpointing=True), Plain()
    next(c for c in trainer.callbacks if isinstance(c, CPQCallback)).levels_file = "../../file/levels.json"
    with pytest.warns(UserWarning, match=r"levels\.json could not be written.*last\.ckpt"):
        trainer.fit(module, data(), data())
    check(trainer, module)


def test_layers_that_only_some_steps_call(tmp_path):
    class Sometimes(Plain):
        def training_step(self, batch, batch_idx):
            x = self.net[:7](batch[0])
            if batch_idx % 2:
                x = x + self.net[5](self.net[:5](batch[0]))
            return cross_entropy(self.net[7:](x), batch[1])

    fit(tmp_path, Sometimes())


class Failing(Plain):
    """Its training step fails in the middle of a run, once."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.fails = True
        self.held = None

    def training_step(self, batch, batch_idx):
        if self.fails and self.global_step == 6:
            raise RuntimeError("in the middle")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        self.held = self.held or super().configure_optimizers()
        return self.held


@pytest.mark.parametrize("kind", ["AdamW", *thorough("LBFGS")])
def test_a_run_that_failed_leaves_no_hook_behind_and_the_next_one_is_whole(tmp_path, kind):
    make = getattr(torch.optim, kind)
    module = Failing(lambda parameters: make(parameters, lr=1e-2))
    trainer = trainer_in(tmp_path)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(module, data(), data())
    assert not module.held._optimizer_step_post_hooks
    module.fails = False
    trainer = trainer_in(tmp_path)
    trainer.fit(module, data(), data())
    assert not module.held._optimizer_step_post_hooks
    assert not learning_quantizers(module)


def test_a_loss_that_turns_into_nan_ends_in_lightning_s_way_and_writes_what_there_is(tmp_path):
    class Lost(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step >= 5 else loss

    trainer = trainer_in(tmp_path)
    trainer.fit(Lost(), data(), data())
    assert trainer.state.finished
    assert (run_of(tmp_path) / "levels.json").exists()


def test_levels_that_cannot_be_collected_lose_no_training(tmp_path, monkeypatch):
    def broken(model, **settings):
        raise RuntimeError("no levels today")

    monkeypatch.setattr("cpq_lightning.trainer.run_report.manifest", broken)
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer = trainer_in(tmp_path, saver, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"Levels could not be collected.*no levels today.*last\.ckpt"):
        trainer.fit(Plain(), data(), data())
    assert trainer.state.finished


@pytest.mark.parametrize("quantize_from", [0, 0.3])
def test_a_frozen_backbone_in_evaluation_mode_gets_its_ranges(tmp_path, quantize_from):
    class Halted(Plain):
        def on_train_start(self):
            self.net[:7].eval().requires_grad_(False)

    trainer, module = trainer_in(tmp_path, quantize_from=quantize_from), Halted()
    trainer.fit(module, data(), data())
    assert all(q.fitted for _, q in quantizers(module))


def test_layers_that_are_built_anew_behind_the_quantization_are_refused(fit):
    class Again(Plain):
        def configure_model(self):
            self.net = Plain().net

    module = Again()
    fit(module, [CPQCallback(table=False)], max_epochs=1)
    with pytest.raises(Exception, match="configure_model has built the layers again"):
        fit(module, [CPQCallback(table=False)], max_epochs=1)


def test_a_checkpoint_saved_behind_the_fit_has_the_companion_too(fit, tmp_path):
    module = Classifier(lambda parameters: torch.optim.LBFGS(parameters, lr=0.05))
    cpq = CPQCallback(table=False)
    trainer = fit(module, [cpq], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["cpq_lightning"]["companions"][0]
    # Of a range that was fitted anew there is none until the next step.
    assert 6 <= len(saved["state"]) == len(cpq._companions[0].optimizer.state) <= 12
    assert sum(len(group["params"]) for group in saved["param_groups"]) == 12


def test_validation_before_a_full_precision_start_is_in_full_precision(fit, tmp_path):
    module = Plain()
    plain = trainer_in(tmp_path)
    plain.callbacks = []
    wanted = plain.validate(module, data(), verbose=False)[0]["val_loss"]
    trainer = trainer_in(tmp_path, quantize_from=0.5)
    assert trainer.validate(module, data(), verbose=False)[0]["val_loss"] == wanted
    module.train()
    trainer.fit(module, data(), data())
    check(trainer, module)
