"""findings.md and its plots, all from the rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.findings import goals, plots
from benchmarks.findings.methods import (
    ARGMAX,
    AT_FIXED,
    AT_LEARNED,
    BREVITAS,
    COOLED,
    DROPPED,
    EXPECTATION,
    FULL,
    LEARNED,
    LSQ,
    METHODS,
    PULLED,
    RQ,
)
from benchmarks.findings.plan import (
    AT_AVERAGES,
    AVERAGES,
    FULL_BITS,
    WIDTHS,
    rate_of,
    searches,
)
from benchmarks.findings.results import DEFAULT, Cell, cell, scales
from benchmarks.findings.rows import Rows
from benchmarks.findings.runs import RATES, SCALES, SEEDS, Run
from benchmarks.findings.statistics import Estimate, estimate, paired

PEERS = (LSQ, BREVITAS, RQ)
OURS = (ARGMAX, EXPECTATION, COOLED, DROPPED, PULLED)

_INTRODUCTION = """# Do the paper's findings hold?

Made by `python -m benchmarks.findings --report` from the {count} rows of `findings.jsonl`; nothing in it is typed.

Fashion-MNIST, a ResNet of 77,000 weights (`benchmarks/findings/network.py`). All runs of a scale start from one
full-precision network, and have its epochs, AdamW with a cosine to zero, batches of 128, and a learning rate that was
searched for their method among {rates} on images that nothing else is measured on. First and last layer have 8 bits.
Accuracies are of the 10,000 test images, in percent, the mean over {seeds} seeds with its 95 % interval. A seed is the
order of the images and the augmentation; differences are paired by it. Intervals know nothing of other starts, networks
or data. Weight error is `|w - q(w)|^2 / |w|^2` over the inner layers, `w` the weights that were trained.
"""


def write_report(rows: Rows) -> Path:
    """Write the report and its plots beside the rows.

    Returns:
        The report's path.
    """
    folder = rows.path.parent
    count = sum(1 for _ in rows.all())
    parts = [_INTRODUCTION.format(count=count, rates=_enumerated(RATES), seeds=len(SEEDS))]
    for scale in scales(rows):
        parts.append(_scale(rows, scale, folder))
    parts.append(_origin(rows))
    path = folder / "findings.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def summary(rows: Rows) -> str:
    """The tables of the README, of the largest scale that there are rows of."""
    scale = scales(rows)[-1]
    widths = [(4, 4), (3, 3), (2, 2)]
    lines = [["", *(f"W{w}A{a}" for w, a in widths), "weight error at W3A3, of LSQ's"]]
    full = cell(rows, scale, FULL, FULL_BITS, FULL_BITS)
    if full is not None:
        lines.append([FULL, _percent(full.accuracy), "", "", ""])
    base = cell(rows, scale, LSQ, 3, 3)
    for method in (*PEERS, *OURS):
        cells = [cell(rows, scale, method, w, a) for w, a in widths]
        if not any(cells):
            continue
        error = cells[1].error if cells[1] else None
        ratio = f"{error / base.error:.2f}" if error is not None and base and base.error else ""
        name = f"**{method}**" if method == DEFAULT else method
        lines.append([name, *(_percent(c.accuracy) + _partial(c) if c else "" for c in cells), ratio])
    text = table(lines)
    averages = [(w, a) for w, a in AVERAGES if cell(rows, scale, LEARNED, w, a)]
    if averages:
        lines = [["", *(f"{w:g} bits on average, A{a}" for w, a in averages)]]
        for method in (*AT_AVERAGES, LSQ, DEFAULT):
            cells = [cell(rows, scale, method, w, a) for w, a in averages]
            name = method if method in AT_AVERAGES else f"{method}, one level"
            if any(cells):
                lines.append([name, *(_percent(c.accuracy) + _partial(c) if c else "" for c in cells)])
        text += "\n" + table(lines)
    return text


def _scale(rows: Rows, scale: str, folder: Path) -> str:
    known = SCALES[scale]
    text = [f"## {known.images:,} images, {known.epochs} epochs\n", "### Goals\n", _goals(rows, scale)]
    text += ["### 1. Widths\n", _widths(rows, scale)]
    text += ["### 2. Clusters\n", _clusters(rows, scale, folder)]
    text += ["### 3. Learned levels\n", _averages(rows, scale, folder)]
    text += ["### 4. Allocation\n", _allocation(rows, scale, folder)]
    text += ["### 5. Ablations\n", _ablations(rows, scale)]
    text += ["### Learning rates\n", _rates(rows, scale)]
    return "\n".join(part for part in text if part)


def _goals(rows: Rows, scale: str) -> str:
    return "".join(f"- {sentence}\n" for sentence in goals.check(rows, scale))


def _widths(rows: Rows, scale: str) -> str:
    text = ""
    for w, a in ((FULL_BITS, FULL_BITS), *WIDTHS):
        cells = [cell(rows, scale, method, w, a) for method in METHODS if method not in (*AT_FIXED, *AT_LEARNED)]
        cells = [c for c in cells if c and c.method not in AT_AVERAGES]
        if not cells:
            continue
        base = next((c for c in cells if c.method == LSQ), None)
        best = max(cells, key=lambda c: c.accuracy.mean)
        lines = [[f"W{w}A{a}", "accuracy", "over LSQ", "over the best", "weight error", "of LSQ's"]]
        for c in sorted(cells, key=lambda c: -c.accuracy.mean):
            error = ratio = ""
            if c.error is not None:
                error = f"{c.error:.4f}"
                ratio = f"{c.error / base.error:.2f}" if base and base.error else ""
            lines.append([_mark(c), _percent(c.accuracy), _over(c, base), _over(c, best), error, ratio])
        text += table(lines) + "\n"
    return text


def _clusters(rows: Rows, scale: str, folder: Path) -> str:
    drawn = plots.draw_clusters(rows, scale, folder / f"findings_clusters_{scale}.png")
    if not drawn:
        return "No rows yet.\n"
    return (
        f"![Weights of the largest layer in steps of their grid]({drawn.name})\n\n"
        "Rounding at the end of any run would make the error zero and change no output: what the picture and the error "
        "tell is where training leaves the weights by itself.\n"
    )


def _averages(rows: Rows, scale: str, folder: Path) -> str:
    text = ""
    for w, a in AVERAGES:
        uniform = [LSQ, EXPECTATION, DEFAULT] if float(w).is_integer() else []
        cells = [cell(rows, scale, method, w, a) for method in dict.fromkeys((*AT_AVERAGES, *uniform))]
        found = [c for c in cells if c]
        base = next((c for c in found if c.method == LEARNED), None)
        if base is None:
            continue
        lines = [[f"{w:g} bits on average, A{a}", "bits", "accuracy", "learned levels over it", "better on"]]
        for c in sorted(found, key=lambda c: -c.accuracy.mean):
            over = wins = ""
            if c is not base:
                over = _difference(paired(base.by_seed, c.by_seed))
                wins = _wins(base, c)
            kind = f"{c.method}, one level" if c.method in uniform else c.method
            lines.append([kind + _partial(c), f"{c.bits:.2f}", _percent(c.accuracy), over, wins])
        text += table(lines) + "\n"
    if drawn := plots.draw_averages(rows, scale, folder / f"findings_levels_{scale}.png"):
        text += f"![Accuracy of ways to spend the same bits]({drawn.name})\n"
    return text or "No rows yet.\n"


def _allocation(rows: Rows, scale: str, folder: Path) -> str:
    methods = [LEARNED, *AT_LEARNED[:1]]
    w, a = AVERAGES[0]
    cells = [c for c in (cell(rows, scale, method, w, a) for method in methods) if c]
    if not cells:
        return "No rows yet.\n"
    names = list(cells[0].rows[0]["levels"])
    lines = [["layer", *(c.method for c in cells)]]
    for name in names:
        bits = [[row["levels"][name] for row in c.rows] for c in cells]
        lines.append([f"`{name}`", *(f"{statistics.mean(b):.1f} ± {_deviation(b):.2f}" for b in bits)])
    spread = [statistics.mean([_deviation([r["levels"][n] for r in c.rows]) ** 2 for n in names]) for c in cells]
    lines.append(["variance over seeds, mean of layers", *(f"{s:.2f}" for s in spread)])
    text = f"Bits of each layer at an average of {w:g}: mean over seeds ± standard deviation.\n\n" + table(lines)
    if drawn := plots.draw_allocation(cells, folder / f"findings_allocation_{scale}.png"):
        text += f"\n![Bits of each layer by seed]({drawn.name})\n"
    return text


def _ablations(rows: Rows, scale: str) -> str:
    text = ""
    for base_name, names, (w, a) in ((EXPECTATION, AT_FIXED, WIDTHS[0]), (LEARNED, AT_LEARNED, AVERAGES[0])):
        base = cell(rows, scale, base_name, w, a)
        cells = [c for c in (cell(rows, scale, name, w, a) for name in names) if c]
        if base is None or not cells:
            continue
        lines = [[f"{base_name}, W{w:g}A{a}", "bits", "accuracy", "over it", "weight error"]]
        for c in (base, *cells):
            over = "" if c is base else _difference(paired(c.by_seed, base.by_seed))
            name = "as it is" if c is base else c.method.partition(": ")[2]
            error = "" if c.error is None else f"{c.error:.4f}"
            lines.append([name + _partial(c), f"{c.bits:.2f}", _percent(c.accuracy), over, error])
        text += table(lines) + "\n"
    return text or "No rows yet.\n"


def _rates(rows: Rows, scale: str) -> str:
    lines = [["family", *(f"{rate:g}" for rate in RATES), "chosen"]]
    for family in dict.fromkeys(m.family for m in METHODS.values()):
        runs = [run for run in searches(scale, family) if run in rows]
        if not runs:
            continue
        means = [estimate([100 * rows[run]["val_accuracy"] for run in runs if run.rate == rate]) for rate in RATES]
        chosen = rate_of(Run(scale, family, 0, 0, 0), rows)
        lines.append([family, *(f"{m.mean:.2f}" if m else "" for m in means), f"{chosen:g}" if chosen else "not done"])
    return "Held-out accuracy, the mean over the widths of the search, one seed.\n\n" + table(lines)


def _origin(rows: Rows) -> str:
    found = list(rows.all())
    if not found:
        return "No rows yet.\n"
    kept = {name: _enumerated(_distinct(r[name] for r in found)) for name in ("commit", "device")}
    versions = _enumerated(_distinct(f"{k} {v}" for r in found for k, v in r["versions"].items()))
    hours = sum(r["seconds"] for r in found) / 3600
    return (
        f"## Where the rows come from\n\nCommits {kept['commit']}; {kept['device']}; {versions}; {hours:.1f} hours of "
        "training in all. Each row has its own.\n"
    )


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _enumerated(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in values)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mark(c: Cell) -> str:
    name = f"**{c.method}**" if c.method == DEFAULT else c.method
    return name + _partial(c)


def _partial(c: Cell) -> str:
    return "" if c.accuracy.count == len(SEEDS) else f" ({c.accuracy.count} of {len(SEEDS)} seeds)"


def _percent(e: Estimate) -> str:
    return f"{e.mean:.2f}" + ("" if e.half is None else f" ± {e.half:.2f}")


def _over(c: Cell, base: Cell | None) -> str:
    if base is None or c is base:
        return ""
    return _difference(paired(c.by_seed, base.by_seed))


def _difference(e: Estimate | None) -> str:
    if e is None:
        return ""
    return f"{e.mean:+.2f}" + ("" if e.half is None else f" ± {e.half:.2f}")


def _wins(ours: Cell, theirs: Cell) -> str:
    common = ours.by_seed.keys() & theirs.by_seed.keys()
    wins = sum(ours.by_seed[seed] > theirs.by_seed[seed] for seed in common)
    return f"{wins} of {len(common)}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head, the first column text and the others figures."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *body))
