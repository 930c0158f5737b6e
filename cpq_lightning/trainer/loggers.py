"""Logs each layer's bits as a table or text, and images, to loggers that support them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_COLUMNS = ["quantizer", "bits", "expected bits"]


def log_widths(trainer: Trainer, widths: Mapping[str, tuple[float, float]], step: int) -> None:
    """Log the expected and the decided bits of each quantizer, as a table (Weights & Biases) or text (TensorBoard).

    Args:
        trainer: Trainer with the loggers; loggers that support neither are skipped.
        widths: Expected and decided width by name of the quantizer.
        step: Current step of the run.
    """
    rows = [[name, decided, round(expected, 2)] for name, (expected, decided) in widths.items()]
    for logger in trainer.loggers:
        experiment = getattr(logger, "experiment", None)
        if hasattr(logger, "log_table"):
            logger.log_table(key="cpq/bits", columns=_COLUMNS, data=rows, step=step)  # type: ignore[attr-defined]
        elif hasattr(experiment, "add_text"):
            lines = ["| " + " | ".join(map(str, row)) + " |" for row in (_COLUMNS, ["---"] * 3, *rows)]
            experiment.add_text("cpq/bits", "\n".join(lines), step)  # type: ignore[union-attr]


def log_pictures(trainer: Trainer, files: Iterable[Path], step: int) -> None:
    """Send those of the files that are PNG images to every logger that supports images, as ``cpq/<name of the file>``.

    Weights & Biases and other loggers with ``log_image`` get the files, TensorBoard gets their pixels. An image that a
    logger does not accept only warns.
    """
    for path in files:
        if path.suffix != ".png":
            continue
        key = f"cpq/{path.stem}_picture"
        for logger in trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            try:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=key, images=[str(path)], step=step)  # type: ignore[attr-defined]
                elif hasattr(experiment, "add_image"):
                    pixels = numpy.asarray(Image.open(path).convert("RGB"))
                    experiment.add_image(key, pixels, step, dataformats="HWC")  # type: ignore[union-attr]
            except Exception as error:
                rank_zero_warn(f"{type(logger).__name__} did not accept {path} ({type(error).__name__}: {error}).")
