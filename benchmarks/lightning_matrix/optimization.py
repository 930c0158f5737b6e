"""Cells on precision, gradients, optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from benchmarks.lightning_matrix.common import Plain, callbacks, cell, check, data, fit, rates
from cpq_lightning.attach.layers import quantizers


@cell("precision", "32-true")
def precision_32(folder: Path) -> str:
    fit(folder, Plain())
    return "widths at the target, schedules at their ends"


@cell("precision", "bf16-mixed")
def precision_bf16(folder: Path) -> str:
    fit(folder, Plain(), precision="bf16-mixed")
    return "the same"


@cell("precision", "bf16-true")
def precision_bf16_true(folder: Path) -> str:
    module = Plain()
    fit(folder, module, precision="bf16-true")
    state = [v for _, q in quantizers(module) for v in q.state_dict().values() if v.is_floating_point()]
    assert {v.dtype for v in state} == {torch.float32}
    return "quantizers keep float32"


@cell("precision", "16-mixed", gpu="on a CPU Lightning takes bf16-mixed instead; the next row has a scaler there")
def precision_16(folder: Path) -> str:
    fit(folder, Plain(), precision="16-mixed")
    return "run as bf16-mixed"


class Overflow(Callback):
    """Makes gradients infinite in a few steps, as too large a scale does, and watches the quantizers there."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.seen = steps, 0
        self.before: list[tuple[torch.Tensor, ...]] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx in self.steps:
            self.before = self.values(pl_module)
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx not in self.steps:
            return
        stayed = 0
        for before, after in zip(self.before, self.values(pl_module), strict=True):
            start, log_scale, *others = before
            # Ranges are checked behind a skipped step too, and one that is fitted again starts anew.
            same = after[0] == start
            stayed += int(same.sum())
            assert torch.equal(after[1][same], log_scale[same])
            assert all(torch.equal(a, b) for a, b in zip(others, after[2:], strict=True))
        assert stayed > len(self.before)
        self.seen += 1

    @staticmethod
    def values(module: LightningModule) -> list[tuple[torch.Tensor, ...]]:
        """Initial scale, and what is learned, of each quantizer."""
        return [tuple(v.detach().clone() for v in (q.start_scale, *q.parameters())) for _, q in quantizers(module)]


@cell("precision", "16-mixed with torch's GradScaler on the CPU")
def precision_16_scaled(folder: Path) -> str:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))  # type: ignore[attr-defined]
    overflow = Overflow({3, 9})
    fit(folder, Plain(), overflow, plugins=[plugin], max_epochs=10)
    assert overflow.seen == 2
    return "no state of a quantizer moves in two steps that are skipped"


@cell("gradients", "accumulate_grad_batches=2")
def accumulation(folder: Path) -> str:
    trainer = fit(folder, Plain(), accumulate_grad_batches=2, max_epochs=16)
    assert trainer.global_step == 32
    return "32 steps of 64 batches"


class Norms(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))


@cell("gradients", "gradient_clip_val=0.1, by norm")
def clip_norm(folder: Path) -> str:
    norms = Norms()
    fit(folder, Plain(), norms, gradient_clip_val=0.1)
    assert norms.norms
    assert max(norms.norms) < 0.1001
    return f"norms of all gradients in the optimizer up to {max(norms.norms):.4f}"


@cell("gradients", "gradient_clip_val=0.01, by value")
def clip_value(folder: Path) -> str:
    class Largest(Norms):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms += [float(g.abs().max()) for g in gradients]

    largest = Largest()
    fit(folder, Plain(), largest, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert max(largest.norms) <= 0.01 + 1e-8
    return "no gradient in the optimizer over 0.01"


class Manual(Plain):
    """Manual optimization; with two optimizers, one for each half of the network."""

    def __init__(self, halves: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.halves = halves

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        made = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in made:
            optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        for optimizer in made:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = [self.net] if self.halves == 1 else [self.net[:5], self.net[5:]]
        kinds: list[Any] = [partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.SGD, lr=0.05, momentum=0.9)]
        return [make(part.parameters()) for make, part in zip(kinds, parts, strict=False)]


@cell("optimization", "manual")
def manual(folder: Path) -> str:
    fit(folder, Manual(1))
    return "with clip_gradients"


@cell("optimization", "manual, two optimizers")
def several(folder: Path) -> str:
    module = Manual(2)
    trainer = fit(folder, module)
    optimized = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    beside = [{id(p) for p in companion.parameters} for companion in trainer.callbacks[0]._companions]  # type: ignore[attr-defined]
    of_quantizers = [id(p) for _, q in quantizers(module) for p in q.range_parameters()]
    assert not optimized & set(of_quantizers)
    assert all(sum(p in ids for ids in beside) == 1 for p in of_quantizers)
    return "each quantizer beside exactly one of them, its layer's"


class Adversarial(Plain):
    """Two optimizers that are toggled, step before zero_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1, 0.5), strict=True):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            self.manual_backward(sign * cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.net[:5], self.net[5:])]


@cell("optimization", "manual, two optimizers that are toggled")
def toggled(folder: Path) -> str:
    fit(folder, Adversarial())
    return "gates and steps of the other half see no gradient"


@cell("optimization", "LBFGS")
def lbfgs(folder: Path) -> str:
    make = partial(torch.optim.LBFGS, lr=0.05, max_iter=2)
    fit(folder, Plain(make))
    return "quantizers train with Adam beside it"


# Schedulers -----------------------------------------------------------------------------------------------------------

_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.95**i),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 50),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 50),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, step_size_up=4, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=50),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, patience=2, threshold=10.0, threshold_mode="abs", factor=0.5
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.95)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=5e-4, anneal_epochs=3),
}


# All are of one base class but the one that looks at a metric; and one holds others.
_USUAL = ("CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau", "SequentialLR")


class Ratios(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append(rates(trainer))


def _scheduled(folder: Path, name: str, interval: str) -> str:
    ratios = Ratios()
    fit(folder, Plain(make_scheduler=_SCHEDULERS[name], interval=interval), ratios, max_epochs=6)
    model = [round(rate, 9) for rate, _ in ratios.seen]
    assert len(set(model)) > 1, "the scheduler has not moved the rate"
    assert {round(ours / rate, 6) for rate, ours in ratios.seen if rate} == {0.5}
    return f"{len(set(model))} rates, the quantizers' always lr_factor times it"


for _name in _SCHEDULERS:
    for _interval in ("step", "epoch"):
        others = _name not in (_USUAL if _interval == "step" else ("ReduceLROnPlateau",))
        cell(f"scheduler, each {_interval}", _name, thorough=others)(
            partial(_scheduled, name=_name, interval=_interval)
        )


# Command line ---------------------------------------------------------------------------------------------------------


class Cli(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class CliWithout(Plain):
    """Takes its optimizer from the command line."""

    configure_optimizers = LightningModule.configure_optimizers


def _command_line(folder: Path, module: type[Plain], *arguments: str) -> str:
    torch.manual_seed(0)
    settings = {
        "max_epochs": 6, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder),
        "log_every_n_steps": 1, "callbacks": callbacks(),
    }  # fmt: skip
    cli = LightningCLI(
        module, args=list(arguments), run=False, trainer_defaults=settings, save_config_callback=None,
        seed_everything_default=0,
    )  # fmt: skip
    cli.trainer.fit(cli.model, data(), data())
    check(cli.trainer, cli.model)
    return "the quantizers train beside what the command line has built"


@cell("LightningCLI", "without optimizer:")
def cli_without(folder: Path) -> str:
    _command_line(folder, Cli)
    return "the module's own optimizer"


@cell("LightningCLI", "with optimizer: and lr_scheduler:")
def cli_with(folder: Path) -> str:
    return _command_line(
        folder, CliWithout, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.05",
        "--lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--lr_scheduler.max_lr=0.05",
        "--lr_scheduler.total_steps=100",
    )  # fmt: skip
