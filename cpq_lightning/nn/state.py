"""What defines a quantizer, as one small tensor: versioned, rebuilt from itself, and safe under averages.

Copies of a model follow it in many ways: ``copy_``, ``load_state_dict``, and exponential averages such as timm's
``ModelEmaV2``, which mix every tensor of a ``state_dict``, whole numbers too. A width of 8 bits mixed with one of 3 is
neither. So each part of the state is stored times a weight, with that weight in front of it, and read as the quotient:
a mixture of two states is then their mean by these weights.

- Settings have a weight that grows by 2^24 with each change: the mean of an old and a new state is the new one.
- Ranges and facts have the weight 0 before they are known and 1 after: the mean of an unknown one and a known one is
  the known one, and that of two known ones is their mean.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]

VERSION = 1
Kind = Literal["weight", "activation"]

_KINDS = ("weight", "activation")
_ESTIMATORS = ("argmax", "expectation")
_NESTINGS = ("range", "resolution")
_RANGE_RULES = ("mse", "max")
_SHARINGS = ("tensor", "channel", "element")
_GATE_ESTIMATORS = ("curvature", "concrete")
# Whole numbers up to 2^20 times a power of two are exact in float32; larger ones take several places.
_PLACE = 20
# Weights of the settings: 2^-96, 2^-72, … 2^96. What is changed more often than that keeps the last weight: a mixture
# is the mean of the two then.
_FIRST, _GROWTH, _REVISIONS = -96, 24, 8


class Settings(NamedTuple):
    """What a forward has to know of a quantizer on the host; the order is that in the tensor.

    Attributes:
        version: Of this layout.
        kind: Of what it quantizes.
        bits: Widest width.
        min_bits: Narrowest width.
        signed: Whether the grid holds negative levels.
        zero_point: Lowest level, negated, of grids that are neither signed nor unsigned; 0 in version 1.
        half_step: Whether levels lie at half steps; 0 in version 1.
        group_size: Inputs that share a scale; 0, which means all of them, in version 1.
        active: Whether it quantizes, or passes on what it gets.
        settled: Whether the range is of the tensor that is trained, rather than of what was there at attachment.
        fixed: Whether ``widths`` count.
        first_or_last: Whether this is the first or last layer, at ``first_last_bits``.
        estimator: Of gradients.
        nesting: Of narrower widths.
        range_rule: By which ranges are fitted.
        channels: Scales: one, or one a channel.
        channel_dim: Dimension of the channels.
        gate_count: Gates that may ever be used.
        gate_rows: Rows of learned gates.
        gates_learned: Whether they are learned.
        gate_sharing: What shares one gate.
        gate_estimator: Gradient of learned gates.
        width_count: Fixed widths: one, or one a channel.
        key: Which quantizer of the model this is.
        seed: Of the gates' noise.
        numel: Elements of the weight, or of the activation in one sample.
        has_facts: Whether the three below are known.
        execution_index: Place of the layer in a forward, from 1.
        macs: Multiply-accumulates of the weight in one sample.
        steps: Of the model's first quantizer, steps of training that its forwards have seen.
        pending: Whether a range has been found that the next step of training begins with.
        pending_signed: Whether its grid holds negative levels.
        fitted: Whether the range is known.
    """

    version: int = VERSION
    kind: str = "weight"
    bits: int = 4
    min_bits: int = 4
    signed: bool = True
    zero_point: int = 0
    half_step: bool = False
    group_size: int = 0
    active: bool = True
    settled: bool = False
    fixed: bool = False
    first_or_last: bool = False
    estimator: str = "expectation"
    nesting: str = "range"
    range_rule: str = "mse"
    channels: int = 1
    channel_dim: int = 0
    gate_count: int = 0
    gate_rows: int = 1
    gates_learned: bool = False
    gate_sharing: str = "tensor"
    gate_estimator: str = "curvature"
    width_count: int = 1
    key: int = 0
    seed: int = 0
    numel: int = 0
    has_facts: bool = False
    execution_index: int = 0
    macs: int = 0
    steps: int = 0
    pending: bool = False
    pending_signed: bool = False
    fitted: bool = False


_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": _KINDS,
    "estimator": _ESTIMATORS,
    "nesting": _NESTINGS,
    "range_rule": _RANGE_RULES,
    "gate_sharing": _SHARINGS,
    "gate_estimator": _GATE_ESTIMATORS,
}
_FACTS = ("execution_index", "macs", "steps")
# How many places a number takes; one where none is given.
_PLACES = {
    "channels": 2,
    "group_size": 2,
    "width_count": 2,
    "gate_rows": 2,
    "key": 2,
    "seed": 4,
    "numel": 3,
    "macs": 3,
    "steps": 2,
}
_PENDING = ("pending_signed",)
# What is no setting: each has a weight of its own.
KNOWN = (*_FACTS, "has_facts", *_PENDING, "pending", "fitted")
# What decides which tensors a quantizer has, and of which shape, with the setting that it comes from.
LAYOUT = {
    "nesting": "nesting",
    "channels": "per_channel",
    "gate_count": "min_bits",
    "gates_learned": "learn_bits or learn_act_bits",
    "gate_rows": "gate_sharing",
    "width_count": "gate_sharing",
}


def layout_differences(theirs: Settings, ours: Settings) -> dict[str, tuple[Any, Any]]:
    """The settings by which two quantizers have other tensors: both values, or counts where these are all that tells
    them apart.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key, name in LAYOUT.items():
        counts = getattr(theirs, key), getattr(ours, key)
        if counts[0] == counts[1]:
            continue
        if key == "gate_count" and theirs.min_bits != ours.min_bits:
            found[name] = theirs.min_bits, ours.min_bits
        elif key == "channels" and 1 in counts:
            found[name] = theirs.channels > 1, ours.channels > 1
        elif key in ("gate_rows", "width_count") and theirs.gate_sharing != ours.gate_sharing:
            found[name] = theirs.gate_sharing, ours.gate_sharing
        elif isinstance(counts[0], str | bool):
            found[name] = counts
        else:
            found[f"{name} (its {key.replace('_', ' ')})"] = counts
    return found


_SETTINGS = tuple(name for name in Settings._fields if name not in KNOWN)
_BOOLEANS = frozenset(name for name, default in Settings._field_defaults.items() if isinstance(default, bool))


def _length(names: tuple[str, ...]) -> int:
    return sum(_PLACES.get(name, 1) for name in names)


# Where things lie: settings, facts, what is pending, and the weight of the ranges; behind them fixed widths, scales,
# the scale of each width over that of the widest where widths have their own, and scales that are pending.
_AT_FACTS = 1 + _length(_SETTINGS)
_AT_PENDING = _AT_FACTS + 1 + _length(_FACTS)
_AT_RANGES = _AT_PENDING + 1 + _length(_PENDING)
HEADER = _AT_RANGES + 1


class Places(NamedTuple):
    """Parts of a state behind its header, as slices."""

    widths: slice
    scales: slice
    width_scales: slice
    pending: slice


def places(settings: Settings) -> Places:
    """Where the arrays of a state lie."""
    several = 8 if settings.nesting == "resolution" else 0
    # Only activations, which have one scale, have a range pending.
    counts = (settings.width_count, settings.channels, several * settings.channels, 1 + several)
    found, at = [], HEADER
    for count in counts:
        found.append(slice(at, at + count))
        at += count
    return Places(*found)


def size(settings: Settings) -> int:
    """Elements of the tensor."""
    return places(settings).pending.stop


def _weight(revision: int) -> float:
    return 2.0 ** (_FIRST + _GROWTH * min(revision, _REVISIONS))


def encode(settings: Settings, revision: int) -> Tensor:
    """The header of a state, shape (HEADER,), float32, on the CPU.

    Args:
        settings: What it says.
        revision: How often settings have changed.
    """
    row: list[float] = []
    for weight, names in (
        (_weight(revision), _SETTINGS),
        (float(settings.has_facts), _FACTS),
        (float(settings.pending), _PENDING),
        (float(settings.fitted), ()),
    ):
        row.append(weight)
        for name in names:
            row += [weight * place for place in _split(_number(name, getattr(settings, name)), _PLACES.get(name, 1))]
    return torch.tensor(row, dtype=torch.float32)


def decode(header: list[float]) -> tuple[Settings, int]:
    """Settings and revision from the header of a state.

    Raises:
        ValueError: it is no state, or one of a later version.
    """
    weight, known, pending, fitted = header[0], header[_AT_FACTS], header[_AT_PENDING], header[_AT_RANGES]
    if not (weight > 0 and all(map(math.isfinite, header))):
        raise ValueError(
            f"A quantizer's state is damaged (its weight is {weight}): it is float32, and does not survive a cast to "
            "a smaller type. Load the state_dict as it was saved."
        )
    values: dict[str, Any] = {"has_facts": known > 0, "pending": pending > 0, "fitted": fitted > 0}
    groups = ((_SETTINGS, 1, weight), (_FACTS, _AT_FACTS + 1, known), (_PENDING, _AT_PENDING + 1, pending))
    for names, start, by in groups:
        at = start
        for name in names:
            places = _PLACES.get(name, 1)
            number = _join([round(v / by) for v in header[at : at + places]]) if by > 0 else 0
            values[name] = _value(name, number)
            at += places
    if values["version"] != VERSION:
        raise ValueError(
            f"A quantizer's state is of version {values['version']}, and this release of cpq-lightning reads version "
            f"{VERSION}: use the release that wrote it."
        )
    return Settings(**values), max(0, round((math.log2(weight) - _FIRST) / _GROWTH))


def read(state: Tensor) -> tuple[Settings, int]:
    """Settings and revision from a state on any device, which is read once.

    Raises:
        ValueError: it is no state, or one of a later version.
    """
    if state.dim() != 1 or len(state) < HEADER:
        raise ValueError(f"A quantizer's state has at least {HEADER} elements in one row, got {tuple(state.shape)}.")
    if state.dtype.itemsize < 4:
        raise ValueError(
            f"A quantizer's state is damaged (it was cast to {state.dtype}): it is float32. Load the state_dict as it "
            "was saved."
        )
    settings, revision = decode(state[:HEADER].tolist())
    if len(state) != size(settings):
        raise ValueError(f"A quantizer's state says of itself {size(settings)} elements, and has {len(state)}.")
    return settings, revision


def is_stacked(state: Tensor) -> bool:
    """Whether it is the states of several models at once, within ``torch.func.vmap``."""
    return type(state) is Tensor and not torch.compiler.is_compiling() and _functorch.is_batchedtensor(state)


def read_members(state: Tensor) -> Settings:
    """The settings that models have in common whose states are stacked.

    Raises:
        ValueError: they differ in one that decides what is computed.
    """
    dimension = _functorch.maybe_get_bdim(state)
    rows = _functorch.get_unwrapped(state).movedim(dimension, 0)
    first, *others = [read(row)[0] for row in rows]
    for name in first._fields:
        if name in (*_FACTS, "has_facts", "key", "numel", "settled"):
            continue
        different = {getattr(settings, name) for settings in (first, *others)}
        if len(different) > 1:
            raise ValueError(
                f"Models within torch.func.vmap are computed as one, and their {first.kind} quantizers at one place "
                f"have {name} {' and '.join(map(repr, sorted(different)))}: call the models one by one, or give them "
                "the same settings."
            )
    return first


def weight_of_ranges(state: Tensor) -> Tensor:
    """What scales are multiplied by: 0 before they are known, shape (1,)."""
    return state[_AT_RANGES:HEADER]


def weight_of_pending(state: Tensor) -> Tensor:
    """What pending scales are multiplied by: 0 where there are none, shape (1,)."""
    return state[_AT_PENDING : _AT_PENDING + 1]


def _number(name: str, value: Any) -> int:
    return _CHOICES[name].index(value) if name in _CHOICES else int(value)


def _value(name: str, number: int) -> Any:
    if name in _CHOICES:
        return _CHOICES[name][min(max(number, 0), len(_CHOICES[name]) - 1)]
    return bool(number) if name in _BOOLEANS else number


def _split(number: int, places: int) -> list[int]:
    """A whole number from 0 (negative ones as two's complement) as digits of 20 bits, the lowest first."""
    number &= (1 << _PLACE * places) - 1
    return [(number >> _PLACE * place) & ((1 << _PLACE) - 1) for place in range(places)]


def _join(digits: list[int]) -> int:
    return sum(digit << _PLACE * place for place, digit in enumerate(digits))
