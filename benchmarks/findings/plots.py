"""The report's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.findings.methods import (
    ARGMAX,
    BREVITAS,
    COOLED,
    EXPECTATION,
    LEARNED,
    LSQ,
    PULLED,
    PULLED_LSQ,
    RQ,
)
from benchmarks.findings.plan import WIDTHS
from benchmarks.findings.results import Cell, by_average, cell
from benchmarks.findings.rows import Rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_CLUSTERED = (LSQ, BREVITAS, RQ, EXPECTATION, COOLED, PULLED_LSQ, PULLED, ARGMAX)
_BLUE, _GREY = "#2b6cb0", "#8a94a3"
_DPI = 110
# Panels side by side in a picture.
_COLUMNS = 3


def draw_weight_histograms(rows: Rows, scale: str, path: Path) -> Path | None:
    """Histograms of the largest layer's weights in steps at three bits, one a method; ``None`` without rows."""
    w, a = WIDTHS[0]
    cells = [c for c in (cell(rows, scale, method, w, a) for method in dict.fromkeys(_CLUSTERED)) if c]
    if not cells:
        return None
    figure, axes = plt.subplots(len(cells), 1, figsize=(7, 1.15 * len(cells) + 0.5), sharex=True, squeeze=False)
    for axis, c in zip(axes[:, 0], cells, strict=True):
        counts = np.sum([row["clusters"] for row in c.rows], axis=0, dtype=float)
        edges = np.linspace(-3, 3, len(counts) + 1)
        axis.stairs(counts / counts.sum(), edges, fill=True, color=_BLUE)
        error = "" if c.error is None else f", error {c.error:.4f}"
        axis.set_title(f"{c.method}{error}", fontsize=9, loc="left", pad=2)
        axis.set_yticks([])
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        # A quarter of the tallest bin that a cluster can make would hide all others.
        axis.set_ylim(0, min(1.05 * counts.max() / counts.sum(), 0.2))
    axes[-1, 0].set_xlabel(f"weight / step, W{w}A{a}, all seeds; the outermost bins hold all beyond")
    return _save(figure, path)


def draw_averages(rows: Rows, scale: str, path: Path) -> Path | None:
    """Accuracy of the ways to spend the same bits, a dot a seed; ``None`` without rows."""
    averages, ways = by_average(rows, scale)
    if not averages:
        return None
    columns = min(len(averages), _COLUMNS)
    lines = -(-len(averages) // columns)
    size = (3.4 * columns + 1.6, (0.24 * len(ways) + 0.9) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(averages) :]:
        axis.set_visible(False)
    for number, (w, a) in enumerate(averages):
        axis = axes.flat[number]
        for at, (way, cells) in enumerate(ways.items()):
            if c := cells[number]:
                values = list(c.by_seed.values())
                color = _BLUE if way == LEARNED else _GREY
                axis.plot(values, [at] * len(values), "o", color=color, alpha=0.45, markersize=5)
                half = c.accuracy.half or 0
                axis.errorbar(c.accuracy.mean, at, xerr=half, fmt="|", color=color, markersize=12, capsize=3)
        axis.set_title(f"{w:g} bits on average, A{a}", fontsize=9)
        axis.set_xlabel("test accuracy, %", fontsize=8)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    # All share it.
    axes[0, 0].set_yticks(range(len(ways)), list(ways))
    axes[0, 0].set_ylim(len(ways) - 0.5, -0.5)
    return _save(figure, path)


def draw_allocation(cells: Sequence[Cell], path: Path) -> Path | None:
    """Bits of each layer by seed, a panel a method."""
    names = list(cells[0].rows[0]["levels"])
    figure, axes = plt.subplots(1, len(cells), figsize=(3.2 * len(cells) + 1.8, 0.3 * len(names) + 1.4), squeeze=False)
    image: Any = None
    for axis, c in zip(axes[0], cells, strict=True):
        bits = np.array([[row["levels"][name] for row in c.rows] for name in names])
        image = axis.imshow(bits, vmin=1, vmax=8, cmap="YlGnBu", aspect="auto")
        for (row, column), value in np.ndenumerate(bits):
            axis.text(column, row, f"{value:g}", ha="center", va="center", color="white" if value > 5 else "black")
        axis.set_xticks(range(len(c.rows)), [str(r["seed"]) for r in c.rows])
        axis.set_xlabel("seed")
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [""] * len(names), fontsize=8)
        axis.set_title(c.method.replace(": ", ":\n").replace(", ", ",\n"), fontsize=9)
    figure.colorbar(image, ax=list(axes[0]), label="bits")
    return _save(figure, path, tight=False)


def _save(figure: Any, path: Path, tight: bool = True) -> Path:
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path
