"""findings.md and its plots, all from the rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.findings import goals, plots
from benchmarks.findings.methods import (
    ARGMAX,
    AT_FIXED,
    AT_LEARNED,
    BEFORE,
    BREVITAS,
    BY_ERROR,
    CHANNELS,
    COOLED,
    DEFAULTS,
    DRAWN,
    DROPPED,
    EXPECTATION,
    FULL,
    LEARNED,
    LEARNED_DEFAULTS,
    LSQ,
    LSQ_PLUS,
    METHODS,
    PULLED,
    PULLED_LSQ,
    RANDOM,
    RQ,
    UNDRAWN,
)
from benchmarks.findings.network import NETWORKS
from benchmarks.findings.plan import (
    AT_AVERAGES,
    AVERAGES,
    FULL_BITS,
    HARD,
    PRETRAINED,
    THREE,
    TWO,
    WIDTHS,
    deciding,
    rate_of,
    rates,
    search_scale,
)
from benchmarks.findings.results import DEFAULT, Cell, by_average, cell, scales
from benchmarks.findings.rows import Rows
from benchmarks.findings.runs import BATCH_SIZE, RATES, SCALES, SEEDS, Run
from benchmarks.findings.statistics import Estimate, estimate, no_worse, paired, variance_ratio

_NOTHING = "No rows yet.\n"
_KINDS = {
    "resnet": "a ResNet",
    "separable": "depthwise-separable convolutions",
    "silu": "a ResNet with SiLU",
    "mobile": "a network like MobileNetV3",
    "convnext": "a network like ConvNeXt",
    "efficientnet": "EfficientNet-Lite0 with ImageNet weights",
}
PEERS = (LSQ, LSQ_PLUS, BREVITAS, RQ)
OURS = (DEFAULTS, ARGMAX, EXPECTATION, COOLED, DROPPED, PULLED)

_INTRODUCTION = """# Do the paper's findings hold?

Made by `python -m benchmarks.findings --report` from the {count} rows of `findings.jsonl`: no result in it is
typed.

**Setting.** Fashion-MNIST, a ResNet of {weights:,} weights in ten layers; for learned levels also ten layers of
depthwise-separable convolutions with {separable:,} weights, to which few bits are a greater loss
(`benchmarks/findings/network.py`). All runs of a scale start from one full-precision network, and have its epochs,
AdamW with a cosine to zero and batches of {batch}. First and last layer have 8 bits. Learning rates are searched among
{rates}, and beyond where the best of them is at the edge, for each of {families} families of methods, by one seed's
accuracy on held-out training images; variants and ablations have their family's rate, and so have the
larger scale and the network of depthwise-separable convolutions. Other networks have searches of their own, and the one
like MobileNetV3, whose best rates at two and at four bits lie far apart, one at each width; the pretrained one, whose
runs are long, has one rate for all. Settings of our own were chosen by held-out accuracy too.

**Figures.** Accuracies are of the test images, in percent, "held-out" ones of 10,000 training images that no run
of 20,000 trains on (one of 60,000 leaves none): means over {seeds} seeds with their 95 % interval (Student's t). A seed
is the order of the images, the augmentation and what a method draws; runs of one seed see the same batches, and
differences are paired by it. Intervals know nothing of other starts, networks or data. Weight error is
`|w - q(w)|^2 / |w|^2` over the inner layers, `w` the weights that were trained.

**Peers.** LSQ is torch's learnable fake-quantize with the step's logarithm as what trains (the raw step moves by
up to a third of itself in an update of Adam) and a start at the least squared error. Brevitas has learned scales
with the same start, and no narrow range: its defaults, made for 8 bits, fall far behind at 2. RQ samples from the
nearest point and one to each side, at a Gumbel-softmax temperature of 1. `CPQ argmax` has the paper's estimator, as
we read it, on weights, and `expectation` on activations. `{defaults}` is the product with its bits set and no more:
from two bits on these are the runs of `{channels}`, under both names.

**Learned levels.** Gates learn by curvature, which is ours, and widths are fixed at half of the run. `learned by drawn
gates` has the paper's gradient, through the gates that are drawn, and fixes widths at 0.8 (at 0.5 it did no better).
`from the start` is another run at the widths that the first has ended with.
"""


def write_report(rows: Rows) -> Path:
    """Write the report and its plots beside the rows.

    Returns:
        The report's path.
    """
    folder = rows.path.parent
    introduction = _INTRODUCTION.format(
        count=len(rows),
        weights=_weights("resnet"),
        separable=_weights("separable"),
        batch=BATCH_SIZE,
        rates=_enumerated(RATES),
        families=len({method.family for method in METHODS.values() if method.family}),
        seeds=len(SEEDS),
        defaults=DEFAULTS,
        channels=CHANNELS,
    )
    parts = [introduction, _all_networks(rows), *(_scale(rows, scale, folder) for scale in scales(rows)), _origin(rows)]
    path = folder / "findings.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _weights(network: str) -> int:
    return sum(p.numel() for p in NETWORKS[network]().parameters() if p.dim() > 1)


def summary(rows: Rows) -> str:
    """The tables of the README: of all networks, of what the paper is about, and the levels of other networks."""
    networks = "\n".join(filter(None, (by_network(rows), learned_by_network(rows))))
    others = [s for s in scales(rows) if s not in (*HARD, PRETRAINED)]
    complete = [s for s in others if all(_is_complete(rows, s, m) for m in (LSQ, DEFAULT))]
    if not complete and not networks:
        return _NOTHING
    text = [networks]
    for scale in complete:
        text += [_head(rows, scale), _by_width(rows, scale), _levels(rows, scale)]
    told = {SCALES[s].network for s in complete}
    for other in others:
        if SCALES[other].network not in told and (levels := _levels(rows, other)):
            text += [_head(rows, other), levels]
    return "\n".join(part for part in text if part)


def _network(scale: str) -> str:
    return f"{_KINDS[SCALES[scale].network]}, {SCALES[scale].images:,} images"


def by_network(rows: Rows) -> str:
    """The defaults beside their peers on every network, a line each width."""
    methods = (LSQ, LSQ_PLUS, DEFAULTS)
    lines = [["network", "width", "full precision", *methods, "over LSQ", "over LSQ+"]]
    for scale in goals.NETWORKS:
        full = cell(rows, scale, FULL, FULL_BITS, FULL_BITS)
        for w, a in sorted(WIDTHS, reverse=True):
            lsq, plus, ours = (cell(rows, scale, method, w, a) for method in methods)
            if ours is not None and (lsq or plus):
                cells = [_counted(c) for c in (full, lsq, plus, ours)]
                lines.append([_network(scale), f"W{w}A{a}", *cells, _over(ours, lsq), _over(ours, plus)])
    return table(lines) if len(lines) > 1 else ""


def learned_by_network(rows: Rows) -> str:
    """Learned widths beside the same width everywhere, with the defaults."""
    w, a = TWO
    lines = [["network", f"{w:g} bits everywhere, A{a}", f"learned, {w:g} bits on average", "difference"]]
    for scale in goals.NETWORKS:
        even, learned = (cell(rows, scale, method, w, a) for method in (DEFAULTS, LEARNED_DEFAULTS))
        if even is not None and learned is not None:
            lines.append([_network(scale), _counted(even), _counted(learned), _over(learned, even)])
    return table(lines) if len(lines) > 1 else ""


def _all_networks(rows: Rows) -> str:
    """The defaults on every network, and the goals that are asked of all."""
    tables = [by_network(rows), learned_by_network(rows), _goals(rows)]
    text = "\n".join(part for part in tables if part)
    return f"## Networks\n\n{text}" if text else ""


def _goals(rows: Rows) -> str:
    asked = [scale for scale in goals.NETWORKS if any(goal.difference(rows, scale) for goal in goals.GOALS)]
    lines = [["goal", *(_KINDS[SCALES[scale].network] for scale in asked)]]
    for goal in goals.GOALS:
        differences = [goal.difference(rows, scale) for scale in asked]
        if any(differences):
            lines.append(
                [goal.title, *("" if d is None else f"{goal.verdict(d)}, {d.shown('+')}" for d in differences)]
            )
    return table(lines) if asked else ""


def _is_complete(rows: Rows, scale: str, method: str) -> bool:
    found = cell(rows, scale, method, 3, 3)
    return found is not None and found.complete


def _by_width(rows: Rows, scale: str) -> str:
    """Accuracies where all layers have the same bits, a column each width."""
    widths = [(w, a) for w, a in sorted(WIDTHS, reverse=True) if cell(rows, scale, LSQ, w, a)]
    lines = [["", *(f"W{w}A{a}" for w, a in widths), "weight error at W3A3, of LSQ's"]]
    base = cell(rows, scale, LSQ, 3, 3)
    for method in (*PEERS, *OURS):
        cells = [cell(rows, scale, method, w, a) for w, a in widths]
        if any(cells):
            ratio = _ratio(cell(rows, scale, method, 3, 3), base)
            lines.append([_mark(method), *(_shown(c) for c in cells), ratio])
    return table(lines)


def _head(rows: Rows, scale: str) -> str:
    known, full_cell = SCALES[scale], cell(rows, scale, FULL, FULL_BITS, FULL_BITS)
    full = "" if full_cell is None else f"; full precision {_shown(full_cell)}"
    return f"{known.images:,} images, {_KINDS[known.network]}{full}.\n"


def _levels(rows: Rows, scale: str) -> str:
    """Ways to spend the same bits, a column each average."""
    averages, ways = by_average(rows, scale)
    lines = [["", *(f"{w:g} bits on average, A{a}" for w, a in averages)]]
    lines += [[way, *(_shown(c) for c in cells)] for way, cells in ways.items()]
    return table(lines) if averages else ""


def _scale(rows: Rows, scale: str, folder: Path) -> str:
    known = SCALES[scale]
    sections = {
        "Goals": "".join(f"- {sentence}\n" for sentence in goals.check(rows, scale)),
        "1. Widths": _widths(rows, scale),
        "2. Clusters": _clusters(rows, scale, folder),
        "3. Learned levels": _averages(rows, scale, folder),
        "4. Allocation": _allocation(rows, scale, folder),
        "5. Ablations": _ablations(rows, scale),
        "Learning rates": _rates(rows, scale) if scale == search_scale(scale) else "",
    }
    text = [f"### {title}\n\n{section}" for title, section in sections.items() if section]
    head = f"## {known.images:,} images, {known.epochs} epochs, {_KINDS[known.network]}\n"
    return "\n".join([head, *(text or [_NOTHING])])


def _widths(rows: Rows, scale: str) -> str:
    text = ""
    for w, a in ((FULL_BITS, FULL_BITS), *WIDTHS):
        cells = [cell(rows, scale, method, w, a) for method in (FULL, *PEERS, *OURS, PULLED_LSQ)]
        ranked = sorted((c for c in cells if c), key=lambda c: -c.accuracy.mean)
        if not ranked:
            continue
        base = next((c for c in ranked if c.method == LSQ), None)
        best = next((c for c in ranked if c.complete), None)
        lines = [[f"W{w}A{a}", "accuracy", "over LSQ", "over the best", "held-out", "weight error", "of LSQ's"]]
        for c in ranked:
            own = [_over(c, base), _over(c, best), _held_out(c), _error(c), _ratio(c, base)]
            lines.append([_mark(c.method), _shown(c), *own])
        text += table(lines) + "\n"
    return text


def _clusters(rows: Rows, scale: str, folder: Path) -> str:
    drawn = plots.draw_weight_histograms(rows, scale, folder / f"findings_clusters_{scale}.png")
    if not drawn:
        return ""
    return (
        f"![Weights of the largest layer in steps of their grid]({drawn.name})\n\n"
        "Rounding at the end of any run would make the error zero and change no output: picture and error tell where "
        "training leaves the weights by itself. A pull works on any method, LSQ too; it is no property of an "
        "estimator.\n"
    )


def _averages(rows: Rows, scale: str, folder: Path) -> str:
    text = ""
    for w, a in AVERAGES:
        base = cell(rows, scale, LEARNED, w, a) or cell(rows, scale, LEARNED_DEFAULTS, w, a)
        if base is None:
            continue
        by_method = {m: c for m in (*AT_AVERAGES, LEARNED_DEFAULTS) if (c := cell(rows, scale, m, w, a))}
        # Where there is no level of the average, the ones to its sides.
        for bits, m in product(sorted({math.floor(w), math.ceil(w)}), (LSQ, EXPECTATION, PULLED, DEFAULTS)):
            if c := cell(rows, scale, m, bits, a):
                by_method[f"{m}, {bits} bits everywhere"] = c
        if c := cell(rows, scale, FULL, FULL_BITS, FULL_BITS):
            by_method[FULL] = c
        lines = [
            [f"{w:g} bits on average, A{a}", "bits", "accuracy", "held-out", "learned over it", "as good or better on"]
        ]
        for name, c in sorted(by_method.items(), key=lambda item: -item[1].accuracy.mean):
            over = (
                ["", ""] if c.method == base.method else [_difference(paired(base.by_seed, c.by_seed)), _wins(base, c)]
            )
            lines.append([name, f"{c.bits:.2f}", _shown(c), _held_out(c), *over])
        text += table(lines) + "\n" + _stakes(by_method)
    if drawn := plots.draw_averages(rows, scale, folder / f"findings_levels_{scale}.png"):
        text += f"![Accuracy of ways to spend the same bits]({drawn.name})\n"
    return text


def _stakes(by_method: Mapping[str, Cell]) -> str:
    """How much allocations can make a difference at all: by how much random ones differ."""
    drawn, fixed = (by_method.get(method) for method in (RANDOM, BY_ERROR))
    if not (drawn and drawn.complete and fixed and fixed.complete):
        return ""
    over = [statistics.stdev(c.by_seed.values()) for c in (drawn, fixed)]
    return (
        f"Accuracy has a standard deviation of {over[0]:.2f} over seeds where each has other random levels, and of "
        f"{over[1]:.2f} where all have those by error: what allocations add to the luck of a seed.\n\n"
    )


def _allocation(rows: Rows, scale: str, folder: Path) -> str:
    w, a = TWO if SCALES[scale].network == "resnet" else THREE
    candidates = (cell(rows, scale, method, w, a) for method in (LEARNED, UNDRAWN, DRAWN))
    cells = [c for c in candidates if c and len(c.rows) > 1]
    if not cells:
        return ""
    names = list(cells[0].rows[0]["levels"])
    bits = [[[row["levels"][name] for row in c.rows] for name in names] for c in cells]
    lines = [["layer", *(f"{c.method}{_partial(c)}" for c in cells)]]
    for i, name in enumerate(names):
        columns = [f"{statistics.mean(b[i]):.1f} ± {statistics.stdev(b[i]):.2f}" for b in bits]
        lines.append([f"`{name}`", *columns])
    spread = [statistics.mean([statistics.variance(layer) for layer in b]) for b in bits]
    lines.append(["variance over seeds, mean of layers", *(f"{s:.2f}" for s in spread)])
    text = f"Bits of each layer at an average of {w:g}: mean over seeds ± standard deviation.\n\n" + table(lines)
    both = [c.method for c in cells[:2]] == [LEARNED, UNDRAWN]
    if both and all(c.complete for c in cells[:2]) and spread[0] == 0 < spread[1]:
        text += f"\nWith DropBits all seeds learn the same widths; without, the variance is {spread[1]:.2f}.\n"
    elif both and all(spread[:2]):
        low, high = variance_ratio(*spread[:2], *(len(names) * (len(c.rows) - 1) for c in cells[:2]))
        text += (
            f"\nWith DropBits the variance is {spread[0] / spread[1]:.2f} times that without ({low:.2f} to {high:.2f} "
            "by an F distribution that takes layers for independent).\n"
        )
    drawn = plots.draw_allocation(cells, folder / f"findings_allocation_{scale}.png")
    return text + f"\n![Bits of each layer by seed]({drawn.name})\n"


def _ablations(rows: Rows, scale: str) -> str:
    text = ""
    fixed = WIDTHS[:2] if scale in HARD else WIDTHS[:1]
    parts = [(AT_FIXED, fixed), (BEFORE, WIDTHS), (AT_LEARNED, AVERAGES)]
    for names, (w, a) in ((names, width) for names, widths in parts for width in widths):
        for base_name in dict.fromkeys(METHODS[name].base for name in names):
            base = cell(rows, scale, base_name, w, a)
            variants = [name for name in names if METHODS[name].base == base_name]
            cells = [c for c in (cell(rows, scale, name, w, a) for name in variants) if c]
            if base is None or not cells:
                continue
            lines = [[f"{base_name}, W{w:g}A{a}", "bits", "accuracy", "over it", "held-out", "over it", "weight error"]]
            lines.append(["as it is", f"{base.bits:.2f}", _shown(base), "", _held_out(base), "", _error(base)])
            for c in cells:
                over = [_shown(c), _over(c, base), _held_out(c)]
                over.append(_difference(paired(c.held_out_by_seed, base.held_out_by_seed)))
                lines.append([c.method.removeprefix(f"{base_name}: "), f"{c.bits:.2f}", *over, _error(c)])
            text += table(lines) + "\n"
    return text


def _rates(rows: Rows, scale: str) -> str:
    families = list(dict.fromkeys(m.family for m in METHODS.values() if m.family))
    tried = sorted({rate for family in families for rate in rates(family, scale)})
    if len(tried) == 1:
        return f"All families have the rate {tried[0]:g}, which was not searched.\n"
    lines = [["family", *(f"{rate:g}" for rate in tried), "chosen"]]
    searched = SCALES[search_scale(scale)]
    for family in families:
        # A line for each search that chooses a rate: one for all widths, or one for each.
        by_width = {tuple(deciding(run)): run for run in (Run(scale, family, w, a, 0) for w, a in searched.searched)}
        for tries, chooses in by_width.items():
            runs = [run for run in tries if run in rows]
            if not runs:
                continue
            means = [estimate([100 * rows[run]["val_accuracy"] for run in runs if run.rate == rate]) for rate in tried]
            name = family if len(by_width) == 1 else f"{family}, W{chooses.weight_bits}A{chooses.act_bits}"
            chosen = rate_of(chooses, rows)
            lines.append(
                [name, *(f"{m.mean:.2f}" if m else "" for m in means), f"{chosen:g}" if chosen else "not done"]
            )
    widths = _enumerated(f"W{w}A{a}" for w, a in searched.searched)
    over = "of each width by itself" if searched.rate_each_width else f"the mean over {widths}"
    return f"Held-out accuracy at {searched.images:,} images, {over}, one seed.\n\n" + table(lines)


def _origin(rows: Rows) -> str:
    finished = list(rows.all())
    if not finished:
        return _NOTHING
    kept = {name: _enumerated(_distinct(r[name] for r in finished)) for name in ("commit", "device")}
    versions = _enumerated(_distinct(f"{k} {v}" for r in finished for k, v in r["versions"].items()))
    hours = sum(r["seconds"] for r in finished) / 3600
    return (
        f"## Where the rows come from\n\nCommits {kept['commit']}; {kept['device']}; {versions}; {hours:.1f} hours of "
        "training in all. Each row has its own.\n"
    )


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _enumerated(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in values)


def _mark(method: str) -> str:
    return f"**{method}**" if method in (DEFAULT, DEFAULTS) else method


def _partial(c: Cell) -> str:
    return "" if c.complete else f" ({c.accuracy.count} of {c.seeds} seeds)"


def _counted(c: Cell | None) -> str:
    """Accuracy, with the number of seeds."""
    return "" if c is None else f"{c.accuracy.shown()} ({c.accuracy.count})"


def _shown(c: Cell | None) -> str:
    return "" if c is None else c.accuracy.shown() + _partial(c)


def _held_out(c: Cell) -> str:
    interval = estimate(list(c.held_out_by_seed.values()))
    return "" if interval is None else interval.shown()


def _error(c: Cell) -> str:
    return "" if c.error is None else f"{c.error:.4f}"


def _ratio(c: Cell | None, base: Cell | None) -> str:
    if c is None or c.error is None or base is None or not base.error:
        return ""
    return f"{c.error / base.error:.2f}"


def _over(c: Cell, base: Cell | None) -> str:
    if base is None or c is base:
        return ""
    return _difference(paired(c.by_seed, base.by_seed))


def _difference(e: Estimate | None) -> str:
    return "" if e is None else e.shown("+")


def _wins(ours: Cell, theirs: Cell) -> str:
    wins, seeds = no_worse(ours.by_seed, theirs.by_seed)
    return f"{wins} of {seeds}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head, the first column text and the others figures."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *body))
