"""Cells on callbacks and on what else a Trainer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.lightning_matrix.common import Plain, callbacks, cell, check, data, fit, network, trainer_in
from cpq_lightning import levels
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.bitwidth.model_cost import learning_quantizers


@cell("averaging", "EMAWeightAveraging")
def ema(folder: Path) -> str:
    fit(folder, Plain(), EMAWeightAveraging(decay=0.9))
    return "widths, signs and starting steps are the model's, weights and learned steps averages"


@cell("averaging", "StochasticWeightAveraging")
def swa(folder: Path) -> str:
    averaging = StochasticWeightAveraging(swa_lrs=[1e-3], swa_epoch_start=0.6, annealing_epochs=2)
    fit(folder, Plain(), averaging, max_epochs=10)
    return "begins before the freeze; the extra epoch for batch norm runs"


class WithBackbone(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = network()[:-1], network()[-1]
        del self.net

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@cell("finetuning", "BackboneFinetuning")
def finetuning(folder: Path) -> str:
    module = WithBackbone()
    torch.manual_seed(0)
    tune = BackboneFinetuning(unfreeze_backbone_at_epoch=3, lambda_func=lambda epoch: 1.0)
    trainer = trainer_in(folder, tune, max_epochs=10)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "config"):
            # The layer whose bits are dropped has another name here.
            callback.config.overrides["*backbone.3"] = callback.config.overrides.pop("*net.3")
    trainer.fit(module, data(), data())
    assert not learning_quantizers(module)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & {id(p) for _, q in quantizers(module) for p in q.parameters()}
    assert all(float(q.log_scale.detach().abs().max()) > 0 for _, q in quantizers(module))
    return "widths are learned from the unfreezing on; no quantizer lands in the optimizer"


@cell("callbacks", "EarlyStopping on a metric of the costs")
def early_stopping(folder: Path) -> str:
    stopper = EarlyStopping(
        "cpq/weight_bits", mode="min", stopping_threshold=4.2, patience=100, check_on_train_epoch_end=True
    )
    torch.manual_seed(0)
    trainer, module = trainer_in(folder, stopper, max_epochs=40), Plain()
    trainer.fit(module, data(), data())
    assert stopper.stopped_epoch > 0
    assert trainer.current_epoch < 40
    assert not learning_quantizers(module)
    return f"stopped in epoch {stopper.stopped_epoch} of 40, widths fixed then"


@cell("callbacks", "ModelCheckpoint, top 2, last and save_weights_only")
def checkpoints(folder: Path) -> str:
    savers = [
        ModelCheckpoint(folder / "top", monitor="val_loss", save_top_k=2, save_last=True),
        ModelCheckpoint(folder / "weights", save_weights_only=True, filename="weights"),
    ]
    module = Plain()
    fit(folder, module, *savers, enable_checkpointing=True)
    again = Plain()
    trainer = trainer_in(folder)
    trainer.validate(again, data(), ckpt_path=folder / "weights" / "weights.ckpt", verbose=False)
    images = next(iter(data()))[0]
    assert torch.equal(again.eval()(images), module.eval()(images))
    assert [(r.name, r.bits) for r in levels(again)] == [(r.name, r.bits) for r in levels(module)]
    return "a network from weights alone evaluates to the bit like the trained one"


@cell("callbacks", "LearningRateMonitor and ModelSummary")
def monitors(folder: Path) -> str:
    logger = CSVLogger(folder)
    monitor = LearningRateMonitor("step")
    fit(folder, Plain(), monitor, ModelSummary(max_depth=-1), logger=logger, enable_model_summary=True)
    assert set(monitor.lrs) == {"lr-AdamW"}
    return "the rate is logged as lr-AdamW"


class Configured(Plain):
    """Makes its layers in configure_model, which must not run twice."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        assert not hasattr(self, "net")
        self.net = network()


@cell("module", "configure_model that may run once only")
def configure_model(folder: Path) -> str:
    module = Configured()
    fit(folder, module)
    assert "configure_model" not in vars(module)
    return "it runs once"


# Compiled code computes every width that may be drawn.
_FEW_WIDTHS: dict[str, Any] = {"narrowest": 7, "target": 7.0, "max_epochs": 5}


class Graphs:
    """A compiler that counts graphs instead of making faster code."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@cell("module", "torch.compile of the network inside", thorough=True)
def compiled_inside(folder: Path) -> str:
    torch._dynamo.reset()
    module, graphs = Plain(), Graphs()
    module.net.compile(backend=graphs)
    fit(folder, module, **_FEW_WIDTHS)
    return f"{graphs.count} graphs, traced by Dynamo and run in eager mode"


@cell("module", "torch.compile of the LightningModule", thorough=True)
def compiled(folder: Path) -> str:
    torch._dynamo.reset()
    module, graphs = Plain(), Graphs()
    torch.manual_seed(0)
    trainer = trainer_in(folder, **_FEW_WIDTHS)
    trainer.fit(torch.compile(module, backend=graphs), data(), data())  # type: ignore[arg-type]
    check(trainer, module, _FEW_WIDTHS["target"])
    assert graphs.count > 0
    return f"{graphs.count} graphs, traced by Dynamo and run in eager mode"


class Tunable(Plain):
    def __init__(self, lr: float = 1e-3, batch_size: int = 8) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return data(self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@cell("Tuner", "lr_find, then fit", thorough=True)
def lr_find(folder: Path) -> str:
    torch.manual_seed(0)
    trainer, module = trainer_in(folder), Tunable()
    finder = Tuner(trainer).lr_find(module, num_training=30)
    assert finder is not None
    assert module.lr != 1e-3
    trainer.fit(module, val_dataloaders=data())
    check(trainer, module)
    return f"{len(finder.results['lr'])} rates tried on the quantized network; the run after it starts afresh"


@cell("Tuner", "scale_batch_size, then fit", thorough=True)
def scale_batch_size(folder: Path) -> str:
    torch.manual_seed(0)
    trainer, module = trainer_in(folder), Tunable()
    Tuner(trainer).scale_batch_size(module, val_dataloaders=data(), init_val=8, max_trials=2, steps_per_trial=2)
    assert module.batch_size > 8
    trainer.fit(module, val_dataloaders=data())
    check(trainer, module)
    return f"{module.batch_size} found, and trained with"


def _finders(folder: Path, first: bool) -> str:
    torch.manual_seed(0)
    module = Tunable()
    ours = callbacks()
    tuners: list[Callback] = [
        BatchSizeFinder(steps_per_trial=2, max_trials=1, init_val=8),
        LearningRateFinder(num_training_steps=16),
    ]
    trainer = Trainer(
        callbacks=[*ours, *tuners] if first else [*tuners, *ours], max_epochs=6, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, val_dataloaders=data())
    check(trainer, module)
    return "both run on the quantized network, and the run after them starts afresh"


@cell("Tuner", "LearningRateFinder and BatchSizeFinder after CPQCallback in the list")
def finders_after(folder: Path) -> str:
    return _finders(folder, True)


@cell("Tuner", "LearningRateFinder and BatchSizeFinder before CPQCallback in the list", thorough=True)
def finders_before(folder: Path) -> str:
    return _finders(folder, False)


@cell("Trainer", "fast_dev_run")
def fast_dev_run(folder: Path) -> str:
    trainer, module = trainer_in(folder, fast_dev_run=2), Plain()
    trainer.fit(module, data(), data())
    assert trainer.state.finished
    assert not list(folder.iterdir())
    return "nothing is written"


@cell("Trainer", "overfit_batches=2")
def overfit(folder: Path) -> str:
    fit(folder, Plain(), overfit_batches=2, max_epochs=20)
    return "two batches again and again"


@cell("Trainer", "limit_train_batches, val_check_interval, max_steps")
def limits(folder: Path) -> str:
    trainer = fit(folder, Plain(), limit_train_batches=3, val_check_interval=2, max_steps=40, max_epochs=-1)
    assert trainer.global_step == 40
    return "40 steps"


@cell("Trainer", "validate, test and predict straight from a checkpoint")
def evaluate(folder: Path) -> str:
    module = Plain()
    saver = ModelCheckpoint(folder, filename="last")
    trainer = fit(folder, module, saver, enable_checkpointing=True)
    path = folder / "last.ckpt"
    wanted = trainer.validate(module, data(), verbose=False)[0]["val_loss"]
    fresh = Plain()
    logits = trainer_in(folder).predict(fresh, data(), ckpt_path=path)
    assert logits is not None
    assert trainer_in(folder).validate(Plain(), data(), ckpt_path=path, verbose=False)[0]["val_loss"] == wanted
    assert trainer_in(folder).test(Plain(), data(), ckpt_path=path, verbose=False)[0]["test_loss"] == wanted
    with torch.no_grad():
        assert torch.equal(torch.cat(logits), torch.cat([module.eval()(images) for images, _ in data()]))  # type: ignore[arg-type]
    return "by fresh modules with the same callbacks, to the bit"


@cell("Trainer", "a second fit of the same module")
def second_fit(folder: Path) -> str:
    module = Plain()
    fit(folder, module)
    before = [(r.name, r.bits) for r in levels(module)]
    fit(folder, module)
    assert [(r.name, r.bits) for r in levels(module)] == before
    return "goes on at the widths that are fixed"
