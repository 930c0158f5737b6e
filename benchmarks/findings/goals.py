"""What the defaults shall reach, put against the rows."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.findings.methods import AT_FIXED, AT_LEARNED, FULL, LEARNED, LEARNED_DEFAULTS, LSQ, METHODS, RANDOM
from benchmarks.findings.plan import AT_AVERAGES, AVERAGES, WIDTHS
from benchmarks.findings.results import DEFAULT, cell
from benchmarks.findings.rows import Rows
from benchmarks.findings.runs import SEEDS
from benchmarks.findings.statistics import Estimate, no_worse, paired

# Points; within an interval wider than this anything would hold.
_WIDEST = 0.6


def check(rows: Rows, scale: str) -> Iterator[str]:
    """A sentence for each goal: what it is, whether it holds, and by what figures."""
    yield from _accuracies(rows, scale)
    yield from _errors(rows, scale)
    yield from _learned(rows, scale)


def _verdict(holds: bool, difference: Estimate) -> str:
    if difference.count < len(SEEDS):
        return f"open, with {difference.count} of {len(SEEDS)} seeds"
    assert difference.half is not None
    if difference.half > _WIDEST and not (difference.above or difference.below):
        return "open, the interval is too wide"
    return "**holds**" if holds else "**does not hold**"


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
