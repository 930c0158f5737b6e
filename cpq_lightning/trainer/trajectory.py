"""The trajectory of the widths over a run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cpq_lightning.files import write_atomically
from cpq_lightning.report.plots import METRIC_COLUMN, TRAJECTORY_FILE, draw_trajectory
from cpq_lightning.trainer.run_report import what_is_saved

_MAX_ROWS = 250


class Trajectory:
    """A table with a row per recorded step: the model's cost, validation metrics, each quantizer's expected bits."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def due(self, step: int, length: float) -> bool:
        """Whether a row is due: at most 250 rows in a run of known length, else every 50 steps."""
        interval = max(1, math.ceil(length / _MAX_ROWS)) if math.isfinite(length) else 50
        return not self.rows or step - self.rows[-1]["step"] >= interval

    def note(self, step: int, values: Mapping[str, float], widths: Mapping[str, tuple[float, float]]) -> None:
        """Add a row."""
        self._row(step).update(values)
        self._row(step).update({f"bits:{name}": expected for name, (expected, _) in widths.items()})

    def note_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add validation metrics to the row of a step."""
        if metrics:
            self._row(step).update({f"{METRIC_COLUMN}{name}": value for name, value in metrics.items()})

    @property
    def metrics(self) -> set[str]:
        """Names of the validation metrics."""
        columns = {column for row in self.rows for column in row if column.startswith(METRIC_COLUMN)}
        return {column.removeprefix(METRIC_COLUMN) for column in columns}

    def _row(self, step: int) -> dict[str, float]:
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        return self.rows[-1]

    def write(self, path: Path) -> None:
        """Write all rows as CSV."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        columns.sort(key=lambda column: column.startswith("bits:"))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: v if k == "step" else f"{v:.6g}" for k, v in row.items()})
        write_atomically(path, text.getvalue())

    def save(self, folder: Path, saved: str, monitor: str | None) -> None:
        """Write and plot all rows in a run's folder, with the metric ``monitor``; a failure only warns."""
        try:
            self.write(folder / TRAJECTORY_FILE)
            draw_trajectory(folder, monitor)
        except ImportError as error:
            rank_zero_info(f"The trajectory of the widths was not drawn: {error}")
        except Exception as error:
            rank_zero_warn(
                f"The trajectory of the widths was not written, or not drawn ({type(error).__name__}: {error}). "
                f"{what_is_saved(saved)}"
            )

    def state_dict(self) -> list[dict[str, Any]]:
        """The rows, for a checkpoint."""
        return [dict(row) for row in self.rows]

    def load_state_dict(self, rows: list[dict[str, Any]]) -> None:
        """Restore :meth:`state_dict`."""
        self.rows = [dict(row) for row in rows]
