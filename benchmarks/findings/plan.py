"""Which runs the campaign has, the most telling first, and what each waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from benchmarks.findings.methods import (
    ARGMAX,
    AT_FIXED,
    AT_LEARNED,
    AT_THREE_BITS,
    BALANCED,
    BALANCED_ARGMAX,
    BEFORE,
    BREVITAS,
    BY_ERROR,
    BY_HESSIAN,
    CHANNELS,
    COOLED,
    DAMPENED,
    DEFAULTS,
    DRAWN,
    DROPPED,
    EARLIER,
    EXPECTATION,
    FROZEN,
    FULL,
    GENTLY,
    LEARNED,
    LEARNED_DEFAULTS,
    LSQ,
    LSQ_OFFSET,
    LSQ_PLUS,
    METHODS,
    NO_OFFSET,
    PULLED,
    PULLED_LSQ,
    RANDOM,
    REDRAWN,
    RELEARNED,
    RQ,
    SIGNED,
    STAGED,
    UNDRAWN,
    trained_as,
)
from benchmarks.findings.rows import Rows
from benchmarks.findings.runs import RATES, SCALES, SEARCH_SEED, SEEDS, Run

FULL_BITS = 32
# The scale at which rates are searched, for all others too.
SEARCH_SCALE = "20k"
# Networks that are hard to quantize: each has a search of its own.
HARD = ("10k-silu", "10k-mobile", "10k-convnext")
PRETRAINED = "5k-efficientnet"
# Where the best rate of all families is at the edge of what is searched, it is searched beyond.
_BEYOND: dict[str, dict[str, tuple[float, ...]]] = {
    SEARCH_SCALE: {ARGMAX: (0.00025, 0.0005), BREVITAS: (0.016, 0.032), LSQ_PLUS: (0.016,), RQ: (0.016, 0.032)},
    "10k-mobile": {LSQ: (0.032,), EXPECTATION: (0.032,)},
}
# Weights and activations.
WIDTHS = ((3, 3), (2, 2), (4, 4))
# Average bits of the weights, with the bits of the activations. Where these have three bits too, it makes no difference
# which weights have how many (findings.md): what they are worth shows where activations have enough.
AT_A3, HALF, TWO, THREE, FOUR = (3.0, 3), (2.5, 8), (2.0, 8), (3.0, 8), (4.0, 8)
# Weights of one bit, where the grid decides.
ONE = (1.0, 8)
AVERAGES = (FOUR, THREE, HALF, TWO, AT_A3)
AT_WIDTHS = (LSQ, EXPECTATION, PULLED)
AT_WIDTHS_TOO = (ARGMAX, DROPPED, COOLED)
_ALLOCATED = (LEARNED, RELEARNED, RANDOM, BY_ERROR, BY_HESSIAN)
# Ingredients that are of networks which are hard to quantize.
_ON_HARD = (SIGNED, NO_OFFSET, BALANCED, FROZEN, DAMPENED, GENTLY, STAGED, BALANCED_ARGMAX)
AT_AVERAGES = (*_ALLOCATED, DRAWN, REDRAWN)


def search_scale(scale: str) -> str:
    """Where the rates of a scale come from."""
    return scale if scale == "tiny" or scale in (*HARD, PRETRAINED) else SEARCH_SCALE


def rates(family: str, scale: str = SEARCH_SCALE) -> tuple[float, ...]:
    """The learning rates that a family's is chosen from at a scale, in rising order."""
    return tuple(sorted({*(SCALES[scale].rates or RATES), *_BEYOND.get(scale, {}).get(family, ())}))


def searches(scale: str, family: str) -> list[Run]:
    """The runs that find a family's learning rate; none if it does not train, or has no choice."""
    if not family or len(rates(family, search_scale(scale))) == 1:
        return []
    widths = ((FULL_BITS, FULL_BITS),) if family == FULL else SCALES[search_scale(scale)].searched
    tried = product(widths, rates(family, search_scale(scale)))
    return [Run(search_scale(scale), family, w, a, SEARCH_SEED, rate) for (w, a), rate in tried]


def deciding(run: Run) -> list[Run]:
    """The searches that choose a run's rate: of all widths, or of its own, see :class:`Scale`."""
    tried = searches(run.scale, METHODS[run.method].family)
    if not SCALES[search_scale(run.scale)].rate_each_width:
        return tried
    width = (run.weight_bits, run.act_bits)
    # A width that is not searched has the best rate on average.
    return [search for search in tried if (search.weight_bits, search.act_bits) == width] or tried


def rate_of(run: Run, rows: Rows) -> float | None:
    """The rate with the best held-out accuracy on average over widths; ``None`` while the search is not done."""
    if run.rate is not None:
        return run.rate
    family = METHODS[run.method].family
    if any(search not in rows for search in searches(run.scale, family)):
        return None
    sums = {
        rate: sum(rows[s]["val_accuracy"] for s in deciding(run) if s.rate == rate)
        for rate in rates(family, search_scale(run.scale))
    }
    return max(sums, key=lambda rate: sums[rate])


def learned_run(run: Run) -> Run | None:
    """The run whose widths a run takes, if it does."""
    source = METHODS[run.method].levels
    return Run(run.scale, source, run.weight_bits, run.act_bits, run.seed) if source in METHODS else None


def _block(
    scale: str, methods: Sequence[str], widths: Sequence[tuple[float, int]], seeds: Sequence[int] = SEEDS
) -> Iterator[Run]:
    """Seeds outermost: what is there after a while is a part of every row."""
    for seed, (w, a), method in product(seeds, widths, methods):
        yield Run(scale, trained_as(method, w), w, a, seed)


def plan(scale: str) -> list[Run]:
    """All runs at a scale, the most telling first; searches stand before the first run that needs them."""
    wanted = [*_block(scale, (FULL,), ((FULL_BITS, FULL_BITS),), SCALES[scale].seeds)]
    for part in _PARTS[scale]:
        wanted += part(scale)
    return _with_searches(scale, wanted)


def _telling(scale: str) -> Iterator[Run]:
    """What the findings are about, seed by seed: after some of them all is told, in wider intervals."""
    for seed in SEEDS:
        yield from _block(scale, AT_WIDTHS, WIDTHS[:2], (seed,))
        # Where allocations differ, and where the paper's hypothesis has been.
        yield from _block(scale, (LEARNED, RELEARNED, RANDOM, BY_HESSIAN, LSQ, EXPECTATION), (TWO,), (seed,))
        yield from _block(scale, (LEARNED, RANDOM), (AT_A3,), (seed,))


def _others(scale: str) -> Iterator[Run]:
    """The rest, at the scale of which all is trained."""
    first = WIDTHS[:1]
    yield from _block(scale, (BY_ERROR,), (TWO,))
    yield from _block(scale, (RELEARNED, BY_ERROR, BY_HESSIAN), (AT_A3,))
    yield from _block(scale, AT_WIDTHS_TOO, first)
    yield from _block(scale, (PULLED_LSQ,), first)
    yield from _block(scale, _ALLOCATED, (HALF,))
    yield from _block(scale, (LSQ, EXPECTATION), (THREE,))
    yield from _block(scale, (DRAWN, REDRAWN), (AT_A3, HALF, TWO))
    yield from _block(scale, AT_WIDTHS, WIDTHS[2:])
    yield from _block(scale, (BREVITAS,), first)
    yield from _block(scale, [m for m in AT_FIXED if m not in _ON_HARD], first)
    yield from _block(scale, (RQ,), first)
    yield from _block(scale, [m for m in AT_LEARNED if m not in AT_THREE_BITS], (TWO,))
    yield from _block(scale, (*AT_WIDTHS_TOO, BREVITAS, RQ), WIDTHS[1:])
    yield from _block(scale, AT_THREE_BITS, (AT_A3,))
    yield from _block(scale, _ALLOCATED, (THREE, FOUR))
    yield from _block(scale, (LSQ, EXPECTATION), (FOUR,))
    yield from _block(scale, (DEFAULTS, LSQ), (ONE, TWO))
    yield from _block(scale, tuple(BEFORE), WIDTHS, SEEDS[:3])
    yield from _block(scale, (DEFAULTS,), WIDTHS)
    yield from _block(scale, (LEARNED_DEFAULTS,), (THREE, TWO))
    yield from _block(scale, (LSQ_PLUS,), WIDTHS)


def _separable(scale: str) -> Iterator[Run]:
    """Levels where three bits everywhere are too few for some layers."""
    yield from _block(scale, (*_ALLOCATED, LSQ, EXPECTATION), (THREE,))
    yield from _block(scale, (DRAWN, UNDRAWN, EARLIER), (THREE,))
    yield from _block(scale, (LSQ, LSQ_PLUS, DEFAULTS), WIDTHS)
    yield from _block(scale, (LEARNED_DEFAULTS,), (THREE, TWO))
    yield from _block(scale, (DEFAULTS,), (TWO,))
    yield from _block(scale, (EXPECTATION, FROZEN, DAMPENED), WIDTHS[:1], SEEDS[:3])


def _hard(scale: str) -> Iterator[Run]:
    """The peers and the default at all widths, then each ingredient alone; in the end more seeds."""
    first, more = SEEDS[:3], SEEDS[3:]
    # Calibrated alone: no training, seconds each.
    yield from _block(scale, tuple(BEFORE), WIDTHS, first)
    yield from _block(scale, (LSQ, LSQ_PLUS, EXPECTATION, CHANNELS), WIDTHS[:2], first)
    yield from _block(scale, (LEARNED_DEFAULTS, DEFAULTS), (TWO,), first)
    yield from _block(scale, (LSQ, LSQ_PLUS, DEFAULTS), WIDTHS[2:], first)
    if scale != HARD[2]:
        yield from _block(scale, (FROZEN, GENTLY), WIDTHS[:1], first)
        yield from _block(scale, (BALANCED, STAGED, DAMPENED, FROZEN), WIDTHS[:2], first)
        yield from _block(scale, (SIGNED, BREVITAS, LSQ_OFFSET), WIDTHS[:2], first)
        yield from _block(scale, (ARGMAX, BALANCED_ARGMAX), WIDTHS[:2], first)
    yield from _block(scale, (NO_OFFSET,), WIDTHS[:2], first)
    yield from _block(scale, (EXPECTATION,), WIDTHS[2:], first)
    yield from _block(scale, (LSQ, LSQ_PLUS, DEFAULTS), WIDTHS, more)
    yield from _block(scale, (LEARNED_DEFAULTS, DEFAULTS), (TWO,), more)
    yield from _block(scale, (LEARNED_DEFAULTS,), (THREE,))


def _pretrained(scale: str) -> Iterator[Run]:
    """A real backbone: the peers and the default."""
    yield from _block(scale, (LSQ, LSQ_PLUS, DEFAULTS), (WIDTHS[0], WIDTHS[2]), SCALES[scale].seeds)


# At the other scales is done what is told by few runs.
_PARTS: dict[str, tuple[Callable[[str], Iterator[Run]], ...]] = {
    "20k": (_telling, _others),
    "60k": (_telling,),
    "20k-separable": (_separable,),
    "tiny": (_telling, _others),
    **dict.fromkeys(HARD, (_hard,)),
    PRETRAINED: (_pretrained,),
}


def _with_searches(scale: str, wanted: Iterable[Run]) -> list[Run]:
    ordered: dict[Run, None] = {}
    for run in wanted:
        ordered |= dict.fromkeys(searches(scale, METHODS[run.method].family))
        ordered[run] = None
    return list(ordered)


def done(run: Run, rows: Rows) -> bool:
    """Whether a run has a row, and at the rate that the search says now."""
    return run in rows and rows[run]["lr"] in (rate_of(run, rows), run.rate)


def ready(run: Run, rows: Rows) -> bool:
    """Whether all is done that a run waits for."""
    source = learned_run(run)
    return rate_of(run, rows) is not None and (source is None or done(source, rows))
