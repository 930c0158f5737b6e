"""Each layer's bits for loggers that take a table or text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
