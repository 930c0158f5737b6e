"""What the defaults shall reach, put against the rows."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.findings.methods import (
    AT_FIXED,
    AT_LEARNED,
    DAMPENED,
    DEFAULTS,
    EXPECTATION,
    FROZEN,
    FULL,
    GENTLY,
    LEARNED,
    LEARNED_DEFAULTS,
    LSQ,
    LSQ_PLUS,
    METHODS,
    RANDOM,
)
from benchmarks.findings.plan import AT_AVERAGES, AVERAGES, FULL_BITS, HARD, PRETRAINED, TWO, WIDTHS
from benchmarks.findings.results import DEFAULT, cell
from benchmarks.findings.rows import Rows
from benchmarks.findings.runs import SCALES, SEEDS
from benchmarks.findings.statistics import Estimate, no_worse, paired

# Points; within an interval wider than this anything would hold.
_WIDEST = 0.6


def check(rows: Rows, scale: str) -> Iterator[str]:
    """A sentence for each goal: what it is, whether it holds, and by what figures."""
    if scale in (*HARD, PRETRAINED):
        yield from _against_peers(rows, scale)
        yield from _ceiling(rows, scale)
        yield from _learned_over_uniform(rows, scale)
        yield from _against_oscillation(rows, scale)
        return
    yield from _accuracies(rows, scale)
    yield from _errors(rows, scale)
    yield from _learned(rows, scale)


def _verdict(holds: bool, difference: Estimate, seeds: int = len(SEEDS)) -> str:
    if difference.count < seeds:
        return f"open, with {difference.count} of {seeds} seeds"
    assert difference.half is not None
    if difference.half > _WIDEST and not (difference.above or difference.below):
        return "open, the interval is too wide"
    return "**holds**" if holds else "**does not hold**"


def _difference(
    rows: Rows, scale: str, ours: tuple[str, float, int], theirs: tuple[str, float, int]
) -> Estimate | None:
    """The paired difference of two cells, each a method with its bits; ``None`` where a row is missing."""
    cells = [cell(rows, scale, *each) for each in (ours, theirs)]
    return None if cells[0] is None or cells[1] is None else paired(cells[0].by_seed, cells[1].by_seed)


def _against_peers(rows: Rows, scale: str) -> Iterator[str]:
    seeds = len(SCALES[scale].seeds)
    for w, a in sorted(WIDTHS, reverse=True):
        difference = _difference(rows, scale, (DEFAULTS, w, a), (LSQ, w, a))
        if difference is not None and w < 4:
            verdict = _verdict(difference.above, difference, seeds)
            yield f"W{w}A{a}, the defaults ahead of LSQ by more than the interval: {verdict}, {difference.shown('+')}."
        difference = _difference(rows, scale, (DEFAULTS, w, a), (LSQ_PLUS, w, a))
        if difference is not None:
            verdict = _verdict(not difference.below, difference, seeds)
            yield f"W{w}A{a}, the defaults not behind LSQ+: {verdict}, {difference.shown('+')}."


def _ceiling(rows: Rows, scale: str) -> Iterator[str]:
    """Full precision that is trained on for the same epochs is what quantization can hope for."""
    difference = _difference(rows, scale, (DEFAULTS, 4, 4), (FULL, FULL_BITS, FULL_BITS))
    if difference is not None:
        verdict = _verdict(difference.mean >= -0.5, difference, len(SCALES[scale].seeds))
        yield f"W4A4 within 0.5 points of full precision: {verdict}, {difference.shown('+')}."


def _learned_over_uniform(rows: Rows, scale: str) -> Iterator[str]:
    w, a = TWO
    difference = _difference(rows, scale, (LEARNED_DEFAULTS, w, a), (DEFAULTS, w, a))
    if difference is not None:
        verdict = _verdict(difference.above, difference)
        yield (
            f"Learned widths of {w:g} bits on average, A{a}, ahead of {w:g} bits everywhere by more than the interval: "
            f"{verdict}, {difference.shown('+')}."
        )


def _against_oscillation(rows: Rows, scale: str) -> Iterator[str]:
    for method in (FROZEN, DAMPENED, GENTLY):
        difference = _difference(rows, scale, (method, 3, 3), (EXPECTATION, 3, 3))
        if difference is not None:
            verdict = _verdict(difference.above, difference, 3)
            name = method.removeprefix(f"{EXPECTATION}: ")
            shown = difference.shown("+")
            yield f"W3A3, {name}: ahead of training without it by more than the interval: {verdict}, {shown}."


def _accuracies(rows: Rows, scale: str) -> Iterator[str]:
    apart = (FULL, DEFAULT, LEARNED_DEFAULTS, *AT_AVERAGES, *AT_FIXED, *AT_LEARNED)
    others = [m for m in METHODS if m not in apart]
    for w, a in WIDTHS:
        ours = cell(rows, scale, DEFAULT, w, a)
        theirs = [c for c in (cell(rows, scale, m, w, a) for m in others) if c and c.complete]
        if ours is None or not theirs:
            continue
        best = max(theirs, key=lambda c: c.accuracy.mean)
        difference = paired(ours.by_seed, best.by_seed)
        if difference is not None:
            yield (
                f"W{w}A{a}, the default ({DEFAULT}) not below the best other method ({best.method}) by more than the "
                f"paired interval: {_verdict(not difference.below, difference)}, {difference.shown('+')}."
            )


def _errors(rows: Rows, scale: str) -> Iterator[str]:
    for w, a in WIDTHS:
        ours, lsq = cell(rows, scale, DEFAULT, w, a), cell(rows, scale, LSQ, w, a)
        if ours is None or lsq is None or ours.error is None or not lsq.error:
            continue
        difference = paired(ours.by_seed, lsq.by_seed)
        if difference is not None:
            ratio = ours.error / lsq.error
            reached = ratio <= 0.5 and not difference.below
            yield (
                f"W{w}A{a}, the default's weight error at most half of LSQ's at no loss of accuracy: "
                f"{_verdict(reached, difference)}, {ratio:.3f} of it at {difference.shown('+')}."
            )


def _learned(rows: Rows, scale: str) -> Iterator[str]:
    for w, a in AVERAGES:
        ours, lsq, drawn = (cell(rows, scale, method, w, a) for method in (LEARNED, LSQ, RANDOM))
        difference = paired(ours.by_seed, lsq.by_seed) if ours and lsq else None
        if ours is not None and lsq is not None and difference is not None:
            wins, seeds = no_worse(ours.by_seed, lsq.by_seed)
            yield (
                f"Learned levels at an average of {w:g} bits, A{a}, at least as good as LSQ with {w:g} bits everywhere "
                f"on {len(SEEDS)} of {len(SEEDS)} seeds: {_verdict(wins == len(SEEDS), difference)}, on {wins} of "
                f"{seeds}, {difference.shown('+')}."
            )
        difference = paired(ours.by_seed, drawn.by_seed) if ours and drawn else None
        if difference is not None:
            yield (
                f"Learned levels at an average of {w:g} bits, A{a}, better than random ones by more than the interval: "
                f"{_verdict(difference.above, difference)}, {difference.shown('+')}."
            )
