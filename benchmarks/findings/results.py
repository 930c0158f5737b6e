"""Rows by what they are compared as: a method at a width, over its seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.findings.methods import PULLED
from benchmarks.findings.rows import Row, Rows
from benchmarks.findings.runs import SCALES
from benchmarks.findings.statistics import Estimate, estimate

# The method that does what CPQCallback does by itself, and what the recipes do.
DEFAULT = PULLED


@dataclass(frozen=True)
class Cell:
    """A method at a width.

    Attributes:
        method: Its name.
        rows: One for each seed that is done, in their order.
    """

    method: str
    rows: list[Row]

    @property
    def by_seed(self) -> dict[int, float]:
        """Test accuracy in percent, by seed."""
        return {row["seed"]: 100 * row["accuracy"] for row in self.rows}

    @property
    def accuracy(self) -> Estimate:
        """In percent."""
        found = estimate(list(self.by_seed.values()))
        assert found is not None
        return found

    @property
    def error(self) -> float | None:
        """Weight error, the mean over seeds; ``None`` in full precision."""
        errors = [row["weight_error"] for row in self.rows if row["weight_error"] is not None]
        return statistics.mean(errors) if errors else None

    @property
    def bits(self) -> float:
        """Average bits of the weights."""
        return statistics.mean(row["mean_bits"] for row in self.rows)


def cell(rows: Rows, scale: str, method: str, weight_bits: float, act_bits: int) -> Cell | None:
    """A method at a width, without the search's runs; ``None`` if no seed is done."""
    found = rows.of(scale=scale, method=method, act_bits=act_bits, rate=None)
    found = [row for row in found if float(row["weight_bits"]) == float(weight_bits)]
    return Cell(method, sorted(found, key=lambda row: row["seed"])) if found else None


def scales(rows: Rows) -> list[str]:
    """Scales that there are rows of, the smallest first."""
    return [scale for scale in SCALES if rows.of(scale=scale)]
