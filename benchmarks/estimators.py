"""Compare the two estimators on the digits: python -m benchmarks.estimators [--seeds 3] [--bits 2]

Each run trains the digits recipe's network in full precision for five epochs and then quantized for four. Printed are
mean and spread of the validation accuracy, and the relative squared error of the weights that are not exempt: how
closely they gather around the grid.
"""

import argparse
import logging
import statistics
import warnings

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule, levels
from cpq_lightning.callbacks import TemperatureSchedule
from cpq_lightning.data import DigitsDataModule

VARIANTS = [("argmax", 1.0), ("argmax", 0.5), ("expectation", 1.0), ("expectation", 0.5), ("expectation", 0.2)]
EPOCHS, START = 9, 5 / 9


def run(estimator: str, temperature: float, bits: int, seed: int) -> tuple[float, float]:
    pl.seed_everything(seed, verbose=False)
    module = QuantizedModule(
        "test_resnet",
        num_classes=10,
        backbone_args={"in_chans": 1},
        label_smoothing=0.05,
        quantization=CPQConfig(weight_bits=bits, act_bits=4, weight_estimator=estimator),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.01),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, EPOCHS),
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            CPQCallback(quantize_from=START, table=False, levels_file=None),
            TemperatureSchedule(start=START, last=temperature),
        ],
    )
    trainer.fit(module, DigitsDataModule(image_size=24))
    errors = [(r.numel, r.relative_error) for r in levels(module) if r.kind == "weight" and not r.exempt]
    error = sum(n * e for n, e in errors) / sum(n for n, _ in errors)
    return trainer.callback_metrics["val_acc"].item(), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = Table(title=f"Digits, W{arguments.bits}A4, {arguments.seeds} seeds")
    for name in ("weight estimator", "last T", "val_acc", "spread", "weight error"):
        table.add_column(name)
    results = {variant: [] for variant in VARIANTS}
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            results[variant].append(run(*variant, arguments.bits, seed))
    for (estimator, temperature), values in results.items():
        accuracies, errors = zip(*values, strict=True)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
        mean = statistics.mean(accuracies)
        table.add_row(estimator, str(temperature), f"{mean:.4f}", f"{spread:.4f}", f"{statistics.mean(errors):.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
