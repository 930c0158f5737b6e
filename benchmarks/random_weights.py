"""Training from random weights: quantized from the first step, against full precision for as many steps.

``python -m benchmarks.random_weights [--seeds 5] [--only NAME ...]`` prints a table of validation losses, the mean and
the standard deviation over seeds, and writes ``benchmarks/results/random_weights.json``. The networks have no batch
norm, so that nothing holds their ranges in place. Settings are ``CPQCallback``'s defaults.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cpq_lightning import CPQCallback, CPQConfig

RESULTS = Path(__file__).parent / "results" / "random_weights.json"
CONFIGS: dict[str, CPQConfig | None] = {
    "full precision": None,
    "W8A8": CPQConfig(weight_bits=8, act_bits=8),
    "W4A4": CPQConfig(weight_bits=4, act_bits=4),
}
# At most so many times full precision's mean.
TARGETS = {"W8A8": 1.1, "W4A4": 1.3}


class Task(pl.LightningModule):
    """A network, what it is trained for, and with which rate."""

    def __init__(self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], rate: float) -> None:
        super().__init__()
        self.network, self.loss, self.rate = network, loss, rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.rate)


def _digits(shape: tuple[int, ...]) -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's handwritten digits in [0, 1]: four of five train."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).reshape(-1, *shape) / 16
    labels = torch.tensor(digits.target)
    held_out = torch.arange(len(images)) % 5 == 0
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


def _series() -> tuple[TensorDataset, TensorDataset]:
    """A noisy sine: the next 12 values from 36."""
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    windows = (torch.sin(torch.arange(4000) / 4) + 0.1 * noise).unfold(0, 48, 1)
    train, held_out = windows[:3000], windows[3100:]
    return TensorDataset(train[:, :36], train[:, 36:]), TensorDataset(held_out[:, :36], held_out[:, 36:])


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _forecaster() -> nn.Module:
    layers = [m for i in range(5) for m in (nn.Linear(32 if i else 36, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 12))


# A network, its data, its loss, its rate, and for how many epochs.
TASKS: dict[str, tuple[Any, ...]] = {
    "three convolutions and a linear layer, digits": (
        _convolutions,
        lambda: _digits((1, 8, 8)),
        F.cross_entropy,
        2e-3,
        12,
    ),
    "three linear layers, digits": (_perceptron, lambda: _digits((64,)), F.cross_entropy, 2e-3, 12),
    "six linear layers, a noisy series": (_forecaster, _series, F.l1_loss, 1e-3, 3),
}


def run(task: str, config: CPQConfig | None, seed: int) -> float:
    """The validation loss at the end of one run."""
    make, data, loss, rate, epochs = TASKS[task]
    torch.manual_seed(seed)
    module, (train, held_out) = Task(make(), loss, rate), data()
    order = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[] if config is None else [CPQCallback(config, table=False, levels_file=None)],
        )  # fmt: skip
        trainer.fit(
            module,
            DataLoader(train, 64, shuffle=True, generator=order),
            DataLoader(held_out, len(held_out)),
        )
    return float(trainer.callback_metrics["val_loss"])


def measure(tasks: list[str], seeds: int) -> dict[str, dict[str, list[float]]]:
    """Losses by task and configuration, one a seed; the configurations of a seed are trained in turn."""
    losses: dict[str, dict[str, list[float]]] = {task: {name: [] for name in CONFIGS} for task in tasks}
    for task in tasks:
        for seed in range(seeds):
            for name, config in CONFIGS.items():
                losses[task][name].append(run(task, config, seed))
    return losses


def table(losses: dict[str, dict[str, list[float]]]) -> str:
    """As the README has it: each loss, and its ratio to full precision's mean."""
    lines = [f"| validation loss | {' | '.join(CONFIGS)} |", f"| --- | {' | '.join('---:' for _ in CONFIGS)} |"]
    for task, by_config in losses.items():
        full = statistics.mean(by_config["full precision"])
        cells = []
        for name in CONFIGS:
            mean, spread = statistics.mean(by_config[name]), statistics.stdev(by_config[name])
            ratio = "" if name == "full precision" else f", {mean / full:.2f} times"
            cells.append(f"{mean:.4f} ± {spread:.4f}{ratio}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    losses = measure(asked.only, asked.seeds)
    print(table(losses))
    if asked.only == list(TASKS):
        RESULTS.write_text(json.dumps({"torch": torch.__version__, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
