"""Rows by what they are compared as: a method at a width, over its seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.findings.methods import DEFAULTS, EXPECTATION, LEARNED, LEARNED_DEFAULTS, LSQ, PULLED, trained_as
from benchmarks.findings.plan import AT_AVERAGES, AVERAGES, done
from benchmarks.findings.rows import Row, Rows
from benchmarks.findings.runs import SCALES, SEEDS, Run
from benchmarks.findings.statistics import Estimate, estimate

# What is held against the first goals, which are about clusters: with the pull that the recipes to begin with have.
DEFAULT = PULLED


@dataclass(frozen=True)
class Cell:
    """A method at a width.

    Attributes:
        method: Its name.
        rows: One for each seed that is done, in their order; at least one.
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
        interval = estimate(list(self.by_seed.values()))
        assert interval is not None
        return interval

    @property
    def held_out_by_seed(self) -> dict[int, float]:
        """The same on held-out images, of runs that hold some out."""
        return {row["seed"]: 100 * row["val_accuracy"] for row in self.rows if row["val_accuracy"] is not None}

    @property
    def complete(self) -> bool:
        """Whether all seeds are done."""
        return len(self.rows) == self.seeds

    @property
    def seeds(self) -> int:
        """How many seeds its scale has."""
        return len(SCALES[self.rows[0]["scale"]].seeds)

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
    runs = [Run(scale, trained_as(method, weight_bits), weight_bits, act_bits, seed) for seed in SEEDS]
    finished = [rows[run] for run in runs if done(run, rows)]
    return Cell(method, finished) if finished else None


def by_average(rows: Rows, scale: str) -> tuple[list[tuple[float, int]], dict[str, list[Cell | None]]]:
    """Averages at which levels were learned, and for each way to spend these bits its cells there."""
    learned = (*AT_AVERAGES, LEARNED_DEFAULTS)
    averages = [(w, a) for w, a in AVERAGES if any(cell(rows, scale, m, w, a) for m in (LEARNED, LEARNED_DEFAULTS))]
    ways = {}
    for method in (*learned, LSQ, EXPECTATION, DEFAULTS):
        cells = [cell(rows, scale, method, w, a) for w, a in averages]
        if any(cells):
            ways[method if method in learned else f"{method}, one level"] = cells
    return averages, ways


def scales(rows: Rows) -> list[str]:
    """Scales that there are rows of."""
    return [scale for scale in SCALES if rows.of(scale=scale)]
