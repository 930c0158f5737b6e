"""Plots of the levels, the weights and the training of a run. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpq_lightning.files import write_atomically
from cpq_lightning.report.levels import GRID_MARKS, grid_mark, mean_over_channels

TRAJECTORY_FILE = "trajectory.csv"
# Begins the columns of metrics in that file, whose names may be anything.
METRIC_COLUMN = "metric:"
_WEIGHTS, _ACTIVATIONS, _PALE, _DARK = "#2f6db3", "#d98032", "#c9c9c9", "#333333"
# Number of layers in the figure of weight histograms.
_MAX_HISTOGRAMS = 6
_MODEL_COLORS = (_WEIGHTS, _ACTIVATIONS, "#3a8f5c", "#8a4fa3", _DARK)


def _figure(**settings: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib, which draws the plots, is not installed: pip install matplotlib, then cpq report RUN_DIR."
        ) from error
    # Without pyplot there is no global state, no window and no choice of a backend.
    return Figure(layout="constrained", **settings)


def _save(figure: Any, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(path, content.getvalue())
    return path


def draw_levels(manifest: Mapping[str, Any], path: Path) -> Path:
    """Plot, for each layer in execution order, the bits of the weight, the bits of the input, and the packed weight's
    size.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = manifest["layers"]
    rows = list(range(len(layers)))
    figure = _figure(figsize=(10, min(60, 1.6 + 0.24 * len(layers))))
    has_activations = any(layer["activation"] for layer in layers)
    axes = figure.subplots(
        1, 3 if has_activations else 2, sharey=True, width_ratios=[3, 3, 2][0 if has_activations else 1 :]
    )
    panels = [("weight", "bits of weights", _WEIGHTS), ("activation", "bits of inputs", _ACTIVATIONS)]
    for axis, (kind, title, color) in zip(axes, panels[: len(axes) - 1], strict=False):
        for row, layer in zip(rows, layers, strict=True):
            values = layer[kind]
            if values is None or not values["quantizing"]:
                axis.text(0.1, row, "full precision", va="center", fontsize=7, color="grey")
                continue
            bits = mean_over_channels(values["bits"])
            axis.barh(row, bits, color=_PALE if values["first_or_last"] else color, height=0.78)
            text = f"{bits:g}" if bits == int(bits) else f"{bits:.1f}"
            axis.text(bits + 0.1, row, text + grid_mark(values), va="center", fontsize=8)
        key = "weight_bits_avg" if kind == "weight" else "act_bits_avg"
        average = manifest["totals"][key]
        if average is not None:
            axis.axvline(average, color=_DARK, lw=1, ls="--")
            title += f", {average:.2f} on average"
        axis.set(xlim=(0, 9), xticks=range(0, 9, 2))
        axis.set_title(title, fontsize=10, loc="left")
    sizes = [layer["weight"]["bytes"] / 1000 for layer in layers]
    total = sum(sizes)
    axes[-1].barh(rows, sizes, color=_DARK, height=0.78)
    for row, size in zip(rows, sizes, strict=True):
        axes[-1].text(
            size + max(sizes) * 0.02,
            row,
            f"{size / total:.0%}" if size / total > 0.005 else "",
            va="center",
            fontsize=8,
        )
    axes[-1].set_title(f"kB of weights, {total:.3g} in total", fontsize=10, loc="left")
    axes[-1].set_xlim(0, max(sizes) * 1.25)
    axes[0].set_yticks(rows, [layer["name"] for layer in layers], fontsize=8)
    axes[0].set_ylim(len(layers) - 0.4, -0.6)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    if any(layer["weight"]["first_or_last"] for layer in layers):
        pale = "; pale: first and last, not part of the average"
    else:
        pale = ""
    figure.supxlabel(f"layers in execution order; {GRID_MARKS}{pale}", fontsize=8)
    return _save(figure, path)


def draw_weight_histograms(histograms: Mapping[str, Any], manifest: Mapping[str, Any], path: Path) -> Path:
    """Plot histograms of the full-precision weights of up to 6 layers over their levels, before and after training.

    The plot shows the layers with most weights, the layer with the narrowest width and the one with the widest. Layers
    above 4 bits are left out where others exist, because their levels are too close to be seen.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = _choose_layers(manifest, histograms["layers"])
    columns = 2 if len(shown) > 1 else 1
    lines = -(-len(shown) // columns)
    figure = _figure(figsize=(5.2 * columns, 0.8 + 2.1 * lines))
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (name, weight) in zip(axes.flat, shown, strict=False):
        pair = histograms["layers"][name]
        after = pair["after"]
        low, high = weight["low"], weight["high"]
        highest = 0.0
        levels = [low + step for step in range(int(high - low) + 1)]
        for level in levels:
            axis.axvline(level, color=_PALE, lw=0.8, zorder=0)
        for key, color in (("before", _ACTIVATIONS), ("after", _WEIGHTS)):
            histogram = pair[key]
            if histogram is None:
                continue
            counts = _merge_bins(histogram["counts"], int(high - low) + 3, weight["numel"])
            bins = len(counts)
            width = (histogram["high"] - histogram["low"]) / bins
            # Both histograms are drawn in units of the learned scale.
            unit = histogram["scale"] / after["scale"]
            x = [(histogram["low"] + (i + 0.5) * width) * unit for i in range(bins)]
            total = sum(counts) * width * unit
            y = [count / total for count in counts]
            # The outermost bins also count all values beyond the grid, and would set the height of the plot.
            highest = max(highest, *y[1:-1])
            if key == "after":
                axis.fill_between(x, y, color=color, alpha=0.75, lw=0, step="mid", label="after")
            else:
                axis.plot(x, y, color=color, lw=1.1, label="before")
        axis.set(xlim=(low - 0.8, high + 0.8), ylim=(0, 1.08 * highest or 1), yticks=[])
        if high - low <= 16:
            axis.set_xticks(levels)
        width = f"{mean_over_channels(weight['bits']):g} bits" if weight["quantizing"] else "full precision"
        axis.set_title(f"{name}   {width}, {weight['numel']:,} weights", fontsize=9, loc="left")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False, loc="upper right")
    figure.supxlabel("weight divided by its scale; grey lines: levels", fontsize=8)
    return _save(figure, path)


def _merge_bins(counts: list[int], levels: int, numel: int) -> list[int]:
    """Merge bins of a histogram to about 24 per level, or fewer (at least one) so that a bin has 8 weights on average:
    the clusters stay visible and the noise is small.
    """
    bins = min(24, max(1, numel // (8 * levels))) * levels
    merged = max(1, len(counts) // bins)
    return [sum(counts[i : i + merged]) for i in range(0, len(counts) - merged + 1, merged)]


def _choose_layers(manifest: Mapping[str, Any], known: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    weights = [(layer["name"], layer["weight"]) for layer in manifest["layers"] if layer["name"] in known]
    legible = [w for w in weights if not isinstance(w[1]["bits"], list) and w[1]["bits"] <= 4] or weights
    by_size = sorted(legible, key=lambda w: -w[1]["numel"])
    by_bits = sorted(by_size, key=lambda w: mean_over_channels(w[1]["bits"]))
    wanted = [*by_size[:3], by_bits[0], by_bits[-1], *by_size]
    names = list(dict.fromkeys(name for name, _ in wanted))[:_MAX_HISTOGRAMS]
    return [w for w in weights if w[0] in names]


def draw_runs(runs: Sequence[Any], path: Path) -> Path:
    """Plot the metric over the size: one point per run with its average bits. Runs in full precision are hollow points.

    Args:
        runs: Values of :class:`~cpq_lightning.report.runs.Run`, all with the same metric.
        path: The PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(figsize=(7, 4.2))
    axis = figure.subplots()
    unit, name = (1e6, "MB") if max(run.fp32_bytes for run in runs) >= 1e6 else (1e3, "kB")
    several = len({run.data for run in runs}) > 1
    groups = list(dict.fromkeys((run.model, run.data) for run in runs))
    for index, group in enumerate(groups):
        members = [run for run in runs if (run.model, run.data) == group]
        model = ", ".join(filter(None, group if several else group[:1]))
        color = _MODEL_COLORS[index % len(_MODEL_COLORS)]
        measured = sorted((run for run in members if run.value is not None), key=lambda run: run.size_bytes)
        plain = [r for r in measured if r.state != "quantized"]
        quantized = [r for r in measured if r.state == "quantized"]
        sizes, values = [run.size_bytes / unit for run in quantized], [run.value for run in quantized]
        if quantized:
            axis.plot(sizes, values, color=color, marker="o", ms=6, lw=0, label=f"{model}, quantized".lstrip(", "))
        for place, (run, size, value) in enumerate(zip(quantized, sizes, values, strict=True)):
            # Labels alternate above and below the points, so that neighbours do not overlap.
            offset = (0, 8) if place % 2 == 0 else (0, -16)
            axis.annotate(_shown_bits(run), (size, value), offset, textcoords="offset points", ha="center", fontsize=8)
        if plain:
            axis.plot(
                [run.size_bytes / unit for run in plain],
                [run.value for run in plain],
                color=color, marker="o", ms=6, mfc="white", lw=0, label=f"{model}, full precision".lstrip(", "),
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel(f"size in {name} (log scale)", fontsize=9)
    axis.set_ylabel(runs[0].metric, fontsize=9)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.tick_params(which="both", labelsize=8)
    axis.margins(0.12, 0.18)
    axis.grid(color=_PALE, lw=0.5, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="best")
    return _save(figure, path)


def _shown_bits(run: Any) -> str:
    parts = (("W", run.weight_bits), ("A", run.act_bits))
    return " ".join(f"{letter}{bits:.3g}" for letter, bits in parts if bits is not None)


def draw_trajectory(folder: Path, monitor: str | None) -> Path | None:
    """Plot the bits, and the metric ``monitor``, over the training steps from ``trajectory.csv``.

    Returns:
        The file; ``None`` where the run wrote no ``trajectory.csv``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    source = Path(folder) / TRAJECTORY_FILE
    if not source.is_file():
        return None
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def series(column: str) -> tuple[list[float], list[float]]:
        points = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
        return [x for x, _ in points], [y for _, y in points]

    columns = list(rows[0]) if rows else []
    metric = f"{METRIC_COLUMN}{monitor}" if f"{METRIC_COLUMN}{monitor}" in columns else None
    kinds = [
        ("weight", "expected_weight_bits", "weight_bits", _WEIGHTS),
        ("activation", "expected_act_bits", "act_bits", _ACTIVATIONS),
    ]
    panels = [k for k in kinds if k[1] in columns] or kinds[:1]
    figure = _figure(figsize=(8.5, 2.9 * len(panels) + (1.7 if metric else 0.3)))
    ratios = [3] * len(panels) + ([1.5] if metric else [])
    axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axis, (kind, expected, decided, color) in zip(axes, panels, strict=False):
        suffix = "weight_quantizer" if kind == "weight" else "input_quantizer"
        bit_columns = [c for c in columns if c.startswith("bits:") and c.endswith(suffix)]
        changing = [c for c in bit_columns if len(set(series(c)[1])) > 1]
        for column in changing:
            axis.plot(*series(column), color=_PALE, lw=0.9)
        axis.plot([], [], color=_PALE, lw=0.9, label="each layer, expected")
        axis.plot(*series(expected), color=color, lw=2.4, label="average, expected")
        axis.plot(*series(decided), color=_DARK, lw=1.2, ls="--", label="average, in evaluation")
        axis.set_ylabel(f"bits of {kind}s", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower left")
    if metric:
        axes[-1].plot(*series(metric), color=_DARK, marker="o", ms=3, lw=1)
        axes[-1].set_ylabel(monitor, fontsize=9)
    axes[-1].set_xlabel("step", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, Path(folder) / "trajectory.png")
