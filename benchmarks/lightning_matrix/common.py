"""What all cells of the matrix share: a network, data, callbacks, and what must hold after each run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.bitwidth.model_cost import learning_quantizers, mean_width
from cpq_lightning.callbacks import BitBudget, ClusterPull, DropBitsSchedule, TemperatureSchedule
from cpq_lightning.nn.quantizer import Quantizer

TARGET = 4.0
# Where the noise of a quantizer begins.
_NOISE = Quantizer("weight", CPQConfig()).noise_logit.item()
_IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
_LABELS = (_IMAGES.flatten(1) @ torch.randn(192, 4, generator=torch.Generator().manual_seed(2))).argmax(1)


@dataclass(frozen=True)
class Cell:
    """One feature of the Trainer, and the run that shows it.

    Attributes:
        feature: What of Lightning it is.
        value: Its setting.
        run: Runs it in a folder, asserts, and says what was seen.
        thorough: Whether other cells show most of it in less time.
        gpu: Why it needs a GPU, where it does.
    """

    feature: str
    value: str
    run: Callable[[Path], str]
    thorough: bool = False
    gpu: str = ""

    @property
    def name(self) -> str:
        return f"{self.feature}: {self.value}"


CELLS: list[Cell] = []


def cell(feature: str, value: str, thorough: bool = False, gpu: str = "") -> Callable[[Any], Any]:
    """Put a run into the matrix."""

    def register(run: Callable[[Path], str]) -> Callable[[Path], str]:
        CELLS.append(Cell(feature, value, run, thorough, gpu))
        return run

    return register


def network() -> nn.Sequential:
    """Convolutions and linear layers with a batch norm among them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


class Plain(LightningModule):
    """A module as anybody writes one: it knows nothing of quantization."""

    def __init__(self, make_optimizer: Any = None, make_scheduler: Any = None, interval: str = "step") -> None:
        super().__init__()
        self.net = network()
        self.make_optimizer = make_optimizer or partial(torch.optim.AdamW, lr=1e-3)
        self.make_scheduler, self.interval = make_scheduler, interval

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval, "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def data(batch_size: int = 16, shuffle: bool = False) -> DataLoader[Any]:
    """64 random images with labels that can be learned."""
    return DataLoader(TensorDataset(_IMAGES, _LABELS), batch_size, shuffle=shuffle)


def callbacks(quantize_from: int | float = 0, narrowest: int = 2, target: float = TARGET) -> list[Callback]:
    """CPQ with learned widths, a layer whose bits are dropped by schedule, both schedules, and the pull to the grid."""
    config = CPQConfig(
        weight_bits=8,
        min_bits=narrowest,
        learn_bits=True,
        overrides={"*net.3": {"learn_bits": False, "weight_bits": 4, "min_bits": 3}},
    )
    return [
        CPQCallback(config, quantize_from=quantize_from, table=False, lr_factor=0.5),
        BitBudget(target),
        TemperatureSchedule(last=0.5),
        DropBitsSchedule(first=0.7),
        ClusterPull(start=0.85),
    ]


def trainer_in(
    folder: Path,
    *more: Callback,
    quantize_from: int | float = 0,
    narrowest: int = 2,
    target: float = TARGET,
    **settings: Any,
) -> Trainer:
    """A quiet Trainer on the CPU with :func:`callbacks`, and more behind them."""
    defaults: dict[str, Any] = {
        "max_epochs": 6,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 10,
    }
    return Trainer(callbacks=[*callbacks(quantize_from, narrowest, target), *more], **(defaults | settings))


def fit(folder: Path, module: LightningModule, *more: Callback, loader: Any = None, **settings: Any) -> Trainer:
    """Train a module, and check what must hold after any run.

    Args:
        folder: Where the run writes.
        module: What is trained.
        more: Callbacks behind ours.
        loader: Training data, if other than :func:`data`.
        settings: The Trainer's; ``ckpt_path`` resumes.
    """
    torch.manual_seed(0)
    path = settings.pop("ckpt_path", None)
    trainer = trainer_in(folder, *more, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader or data(), data(), ckpt_path=path)
    check(trainer, module, settings.get("target", TARGET))
    return trainer


def check(trainer: Trainer, module: nn.Module, target: float = TARGET) -> None:
    """What must hold after any run to its end: widths at the target, schedules at theirs, all steps trained."""
    assert trainer.state.finished
    by_name = dict(quantizers(module))
    assert len(by_name) == 10
    for name, quantizer in by_name.items():
        assert quantizer.active, name
        assert quantizer.fitted, name
        # A range that was fitted anew behind the last step begins at 0, and keeps the noise that was learned, which
        # moves by little: more than the last digit of a float32 is training.
        learned = [p.detach() - start for p, start in zip(quantizer.range_parameters(), (0.0, _NOISE), strict=True)]
        assert any(float(p.abs().max()) > 1e-7 for p in learned), f"{name} has not been trained"
        assert abs(float(quantizer.temperature) - 0.5) < 0.05, name
        assert all(value.isfinite().all() for value in quantizer.state_dict().values()), name
    dropped = by_name[next(name for name in by_name if name.endswith("net.3.weight_quantizer"))]
    assert dropped.bits == 4
    assert float(dropped.keep_prob) > 0.95
    assert not learning_quantizers(module)
    assert abs((mean_width(module, "weight") or 0) - target) <= 0.2


def rates(trainer: Trainer) -> tuple[float, float]:
    """Learning rates of the network and of the quantizers, asked between a step's backward and its update."""
    callback = next(c for c in trainer.callbacks if isinstance(c, CPQCallback))  # type: ignore[attr-defined]
    (companion,) = callback._companions
    return tuple(float(o.param_groups[0]["lr"]) for o in (trainer.optimizers[0], companion.optimizer))  # type: ignore[return-value]
