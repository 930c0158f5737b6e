"""What the defaults shall reach, put against the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
from benchmarks.findings.plan import AT_AVERAGES, AVERAGES, FULL_BITS, HARD, ONE, PRETRAINED, TWO, WIDTHS
from benchmarks.findings.results import DEFAULT, cell
from benchmarks.findings.rows import Rows
from benchmarks.findings.runs import SEEDS
from benchmarks.findings.statistics import Estimate, no_worse, paired

# Points; within an interval wider than this anything would hold.
_WIDEST = 0.6


@dataclass(frozen=True)
class Goal:
    """What a difference between two methods shall be.

    Attributes:
        title: The goal in words.
        ours: A method with its bits of weights and of activations.
        theirs: What it is compared with.
        least: The difference must be at least this, in points; ``None`` asks for more than the interval above 0.
        not_behind: Asks for less instead: the whole interval must not lie below 0.
        scales: Where it is asked.
    """

    title: str
    ours: tuple[str, float, int]
    theirs: tuple[str, float, int]
    scales: tuple[str, ...]
    least: float | None = None
    not_behind: bool = False

    def difference(self, rows: Rows, scale: str) -> Estimate | None:
        """Paired by seed; ``None`` where a row is missing, or where the goal is not asked."""
        if scale not in self.scales:
            return None
        cells = [cell(rows, scale, *each) for each in (self.ours, self.theirs)]
        return None if cells[0] is None or cells[1] is None else paired(cells[0].by_seed, cells[1].by_seed)

    def verdict(self, difference: Estimate) -> str:
        """Whether it holds, for people."""
        holds = difference.above if self.least is None else difference.mean >= self.least
        return _verdict(not difference.below if self.not_behind else holds, difference, ENOUGH)

    def sentence(self, rows: Rows, scale: str) -> str | None:
        """The goal, whether it holds, and by what figures."""
        difference = self.difference(rows, scale)
        if difference is None:
            return None
        seeds = f"{difference.count} seed{'s' * (difference.count != 1)}"
        return f"{self.title}: {self.verdict(difference)}, {difference.shown('+')} ({seeds})."


def _of_networks() -> Iterator[Goal]:
    for w in (4, 3, 2):
        of = f"W{w}A{w}, the defaults"
        ours = (DEFAULTS, w, w)
        if w < 4:
            yield Goal(f"{of} ahead of LSQ by more than the interval", ours, (LSQ, w, w), (*HARD, PRETRAINED))
        yield Goal(f"{of} not behind LSQ+", ours, (LSQ_PLUS, w, w), NETWORKS, not_behind=True)
    full = (FULL, FULL_BITS, FULL_BITS)
    yield Goal("W4A4, the defaults within 0.5 points of full precision", (DEFAULTS, 4, 4), full, NETWORKS, -0.5)
    w, a = TWO
    title = f"Learned widths of {w:g} bits on average, A{a}, ahead of {w:g} bits everywhere by more than the interval"
    yield Goal(title, (LEARNED_DEFAULTS, w, a), (DEFAULTS, w, a), tuple(s for s in NETWORKS if s != "20k"))
    for method in (FROZEN, DAMPENED, GENTLY):
        title = (
            f"W3A3, {method.removeprefix(f'{EXPECTATION}: ')}, ahead of training without it by more than the interval"
        )
        yield Goal(title, (method, 3, 3), (EXPECTATION, 3, 3), ("20k-separable", "10k-silu", "10k-mobile"))
    yield Goal("W1A8, the defaults within 1.5 points of W2A8", (DEFAULTS, *ONE), (DEFAULTS, *TWO), ("20k",), -1.5)


# The scales of all networks that the defaults are measured on.
NETWORKS = ("20k", "20k-separable", *HARD, PRETRAINED)
# A verdict on the defaults takes so many seeds: the largest networks have no more.
ENOUGH = 3
GOALS = tuple(_of_networks())


def check(rows: Rows, scale: str) -> Iterator[str]:
    """A sentence for each goal: what it is, whether it holds, and by what figures."""
    if scale not in (*HARD, PRETRAINED):
        yield from _accuracies(rows, scale)
        yield from _errors(rows, scale)
        yield from _learned(rows, scale)
    for goal in GOALS:
        if sentence := goal.sentence(rows, scale):
            yield sentence


def _verdict(holds: bool, difference: Estimate, seeds: int = len(SEEDS)) -> str:
    if difference.count < seeds:
        return f"open, with {difference.count} of {seeds} seeds"
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
