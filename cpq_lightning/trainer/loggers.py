"""Each layer's bits for loggers that take a table, text or a picture."""

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
    """Log expected and decided bits of each quantizer: a table (Weights & Biases), or text (TensorBoard).

    Args:
        trainer: Whose loggers take it; those that take neither are passed over.
        widths: Expected and decided width by name.
        step: Where the run is.
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
    """Log the pictures among some files, under ``cpq/`` and their name, where a logger takes pictures.

    Weights & Biases and others with ``log_image`` take the files, TensorBoard their pixels. What a logger cannot take
    costs a warning, and no training.
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
                rank_zero_warn(f"{type(logger).__name__} did not take {path} ({type(error).__name__}: {error}).")
