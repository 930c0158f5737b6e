"""The state of a quantizer as one small tensor: versioned, self-describing, and safe under averaging.

The state of a model is copied by ``copy_``, by ``load_state_dict``, and by exponential moving averages such as timm's
``ModelEmaV2``, which average every tensor of a ``state_dict``, integers too. An average of the widths 8 and 3 is
neither of them. Therefore each part of the state is stored multiplied by a weight, preceded by that weight, and read as
the quotient: an average of two states is then their mean with these weights.

- The weight of the settings grows by a factor of 2^24 with each change: the average of an old and a new state is the
  new one.
- Ranges (scales and zero points) and facts have weight 0 while unknown and 1 when known: the average of an unknown and
  a known value is the known one, and that of two known values is their mean, for zero points the nearest whole number.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]

from cpq_lightning.functional.categorical import ESTIMATORS
from cpq_lightning.functional.grid import level_bounds

VERSION = 2
Kind = Literal["weight", "activation"]

_KINDS = ("weight", "activation")
_NESTINGS = ("range", "resolution")
_RANGE_RULES = ("mse", "max")
_SHARINGS = ("tensor", "channel", "element")
_GATE_ESTIMATORS = ("curvature", "concrete")
# Grids that a quantizer may choose from; "balanced" is one of weights, "unsigned", "offset" and "int8" are of
# activations.
_GRIDS = ("auto", "signed", "unsigned", "offset", "balanced", "int8")
# Integers up to 2^20 times a power of two are exact in float32; larger ones are split into several digits.
_DIGIT_BITS = 20
# Weights of the settings: 2^-96, 2^-72, … 2^96. Further changes keep the last weight, and two such states have their
# plain mean as average.
_FIRST, _GROWTH, _REVISIONS = -96, 24, 8
# Twice the zero points of the signed and the unsigned grids of 1 to 8 bits.
SIGNED = tuple(2**bits for bits in range(1, 9))
UNSIGNED = (0,) * 8


class Settings(NamedTuple):
    """The settings of a quantizer, as a forward needs them on the host, in the order of the tensor.

    Attributes:
        version: Version of this layout.
        kind: ``"weight"`` or ``"activation"``.
        bits: Widest width.
        min_bits: Narrowest width.
        grid: The grids to choose from when a range is fitted, as in ``CPQConfig(weight_grid=..., act_grid=...)``.
        doubled_zero_points: Twice the zero point of the grid of each width from 1 to 8 bits: integers, as those of
            balanced grids are half-integers (:mod:`cpq_lightning.functional.grid`).
        group_size: Number of inputs that share a scale; 0 means all (:mod:`cpq_lightning.functional.groups`).
        active: Whether the quantizer is active; an inactive one returns its input.
        settled: Whether the range was fitted to the tensor that is trained, and not only when layers were attached.
        fixed: Whether ``widths`` are in use.
        first_or_last: Whether this is the first or last layer, at ``first_last_bits``.
        estimator: Gradient estimator.
        nesting: How the grids of narrower widths nest, ``"range"`` or ``"resolution"``.
        range_rule: Rule of the scale initialization, ``"mse"`` or ``"max"``.
        channels: Number of scales: 1, one for each channel, or one for each group.
        channel_dim: Dimension of the channels.
        gate_count: Maximum number of gates in use.
        gate_rows: Number of rows of learned gates.
        gates_learned: Whether the gates are learned.
        gate_sharing: Elements that share one gate: a tensor, a channel, or a single element.
        gate_estimator: Gradient estimator of learned gates.
        width_count: Number of fixed widths: 1, or one for each channel.
        key: Index of the quantizer in the model, which keys the gates' noise.
        seed: Seed of the gates' noise.
        numel: Elements of the weight, or of the activation in one sample.
        has_facts: Whether the next three fields are known.
        execution_index: Index of the layer in execution order, from 1.
        macs: Multiply-accumulates of the weight in one sample.
        steps: Number of training steps in which the model's first quantizer was called.
        pending: Whether a new range is pending, which takes effect at the next training step.
        pending_zero_points: Twice the zero point of each width of the pending grid.
        fitted: Whether the range is known.
    """

    version: int = VERSION
    kind: str = "weight"
    bits: int = 4
    min_bits: int = 4
    grid: str = "auto"
    doubled_zero_points: tuple[int, ...] = SIGNED
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
    pending_zero_points: tuple[int, ...] = UNSIGNED
    fitted: bool = False

    def zero_point(self, bits: int) -> float:
        """Zero point of the grid of a width."""
        return self.doubled_zero_points[bits - 1] / 2

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest level of the widest grid."""
        return level_bounds(self.bits, self.zero_point(self.bits))


_CHOICES: dict[str, Collection[str]] = {
    "kind": _KINDS,
    "estimator": ESTIMATORS,
    "nesting": _NESTINGS,
    "range_rule": _RANGE_RULES,
    "grid": _GRIDS,
    "gate_sharing": _SHARINGS,
    "gate_estimator": _GATE_ESTIMATORS,
}
_FACTS = ("execution_index", "macs", "steps")
# Number of digits of a setting, 1 if not listed.
_DIGITS = {
    "channels": 2,
    "group_size": 2,
    "width_count": 2,
    "gate_rows": 2,
    "key": 2,
    "seed": 4,
    "numel": 3,
    "macs": 3,
    "steps": 2,
    "doubled_zero_points": 8,
    "pending_zero_points": 8,
}
_TUPLES = ("doubled_zero_points", "pending_zero_points")
_PENDING = ("pending_zero_points",)
_RANGES = ("doubled_zero_points",)
# Fields that are no settings: their parts of the state have separate weights.
KNOWN = (*_FACTS, "has_facts", *_PENDING, "pending", *_RANGES, "fitted")
# The fields that determine the tensors of a quantizer and their shapes, with the option of CPQConfig that sets each.
LAYOUT = {
    "nesting": "nesting",
    "group_size": "group_size",
    "channels": "per_channel",
    "gate_count": "min_bits",
    "gates_learned": "learn_bits or learn_act_bits",
    "gate_rows": "gate_sharing",
    "width_count": "gate_sharing",
}


def layout_differences(theirs: Settings, ours: Settings) -> dict[str, tuple[Any, Any]]:
    """The options that make the tensors of two quantizers differ: both values, or both counts if only these differ."""
    differences: dict[str, tuple[Any, Any]] = {}
    for key, name in LAYOUT.items():
        counts = getattr(theirs, key), getattr(ours, key)
        if counts[0] == counts[1]:
            continue
        if key == "group_size":
            differences[name] = counts[0] or None, counts[1] or None
        elif key == "channels" and theirs.group_size != ours.group_size:
            continue
        elif key == "gate_count" and theirs.min_bits != ours.min_bits:
            differences[name] = theirs.min_bits, ours.min_bits
        elif key == "channels" and 1 in counts:
            differences[name] = theirs.channels > 1, ours.channels > 1
        elif key in ("gate_rows", "width_count") and theirs.gate_sharing != ours.gate_sharing:
            differences[name] = theirs.gate_sharing, ours.gate_sharing
        elif isinstance(counts[0], str | bool):
            differences[name] = counts
        else:
            differences[f"{name} (its {key.replace('_', ' ')})"] = counts
    return differences


_SETTINGS = tuple(name for name in Settings._fields if name not in KNOWN)
_BOOLEANS = frozenset(name for name, default in Settings._field_defaults.items() if isinstance(default, bool))


def _length(names: tuple[str, ...]) -> int:
    return sum(_DIGITS.get(name, 1) for name in names)


class _Header(NamedTuple):
    """The header of one version: the names of its settings, of its pending range, and of its range."""

    settings: tuple[str, ...]
    pending: tuple[str, ...]
    ranges: tuple[str, ...]

    # Offsets: settings, facts, pending range, range. After the header follow the fixed widths, the scales, the scale of
    # each width relative to the widest with nesting="resolution", and the pending scales.
    @property
    def facts_offset(self) -> int:
        return 1 + _length(self.settings)

    @property
    def pending_offset(self) -> int:
        return self.facts_offset + 1 + _length(_FACTS)

    @property
    def ranges_offset(self) -> int:
        return self.pending_offset + 1 + _length(self.pending)

    @property
    def length(self) -> int:
        return self.ranges_offset + 1 + _length(self.ranges)


# Version 1 knew signed and unsigned grids only, the same for all widths of a quantizer. Its two other names were 0.
_OLD_NAMES = {"grid": ("signed", "zero_point", "half_integer")}
_VERSION_1 = _Header(
    tuple(name for setting in _SETTINGS for name in _OLD_NAMES.get(setting, (setting,))),
    ("pending_signed",),
    (),
)
_HEADERS = {1: _VERSION_1, VERSION: _Header(_SETTINGS, _PENDING, _RANGES)}
_PENDING_OFFSET, _RANGES_OFFSET = _HEADERS[VERSION].pending_offset, _HEADERS[VERSION].ranges_offset
HEADER = _HEADERS[VERSION].length


class Places(NamedTuple):
    """The slices of a state after its header."""

    widths: slice
    scales: slice
    width_scales: slice
    pending: slice


def places(settings: Settings) -> Places:
    """The slices of the arrays in a state."""
    several = 8 if settings.nesting == "resolution" else 0
    # Only an activation, which has a single scale, can have a pending range.
    counts = (settings.width_count, settings.channels, several * settings.channels, 1 + several)
    slices, offset = [], HEADER
    for count in counts:
        slices.append(slice(offset, offset + count))
        offset += count
    return Places(*slices)


def size(settings: Settings) -> int:
    """Number of elements of the state tensor."""
    return places(settings).pending.stop


def _weight(revision: int) -> float:
    return 2.0 ** (_FIRST + _GROWTH * min(revision, _REVISIONS))


def encode(settings: Settings, revision: int) -> Tensor:
    """The header of a state, shape (HEADER,), float32, on the CPU.

    Args:
        settings: The settings to encode.
        revision: Number of changes of the settings so far.
    """
    row: list[float] = []
    for weight, names in (
        (_weight(revision), _SETTINGS),
        (float(settings.has_facts), _FACTS),
        (float(settings.pending), _PENDING),
        (float(settings.fitted), _RANGES),
    ):
        row.append(weight)
        for name in names:
            row += [weight * digit for digit in _digits(name, getattr(settings, name))]
    return torch.tensor(row, dtype=torch.float32)


def decode(header: list[float]) -> tuple[Settings, int]:
    """Settings and revision from the header of a state of any version, or of a longer part of the state.

    Raises:
        ValueError: The state is damaged, or of another version.
    """
    weight = header[0]
    version = round(header[1] / weight) if weight > 0 and math.isfinite(header[1]) else 0
    form = _HEADERS.get(version, _HEADERS[VERSION])
    header = header[: form.length]
    if weight > 0 and len(header) < form.length:
        raise ValueError(
            f"A quantizer's state of version {version} has at least {form.length} elements, got {len(header)}."
        )
    if not (weight > 0 and all(map(math.isfinite, header))):
        raise ValueError(
            f"A quantizer's state is damaged (its weight is {weight}): it must stay float32, since a cast to a smaller "
            "type destroys it. Load the state_dict as it was saved."
        )
    if version not in _HEADERS:
        raise ValueError(
            f"A quantizer's state has version {version}, and this release of cpq-lightning reads versions up to "
            f"{VERSION}: use the release that wrote the state."
        )
    known, pending, fitted = header[form.facts_offset], header[form.pending_offset], header[form.ranges_offset]
    values: dict[str, Any] = {"has_facts": known > 0, "pending": pending > 0, "fitted": fitted > 0}
    groups = (
        (form.settings, 1, weight),
        (_FACTS, form.facts_offset + 1, known),
        (form.pending, form.pending_offset + 1, pending),
        (form.ranges, form.ranges_offset + 1, fitted),
    )
    for names, start, divisor in groups:
        offset = start
        for name in names:
            count = _DIGITS.get(name, 1)
            numbers = [v / divisor for v in header[offset : offset + count]] if divisor > 0 else [0.0] * count
            values[name] = _value(name, numbers)
            offset += count
    if version == 1:
        _from_version_1(values)
    if not values["fitted"]:
        values["doubled_zero_points"] = SIGNED if values["kind"] == "weight" else UNSIGNED
    elif values["kind"] == "activation":
        # The mean of two states may lie between whole zero points, and inputs have no others.
        values["doubled_zero_points"] = tuple(2 * round(number / 2) for number in values["doubled_zero_points"])
    return Settings(**values), max(0, round((math.log2(weight) - _FIRST) / _GROWTH))


def _from_version_1(values: dict[str, Any]) -> None:
    values["version"] = VERSION
    values["grid"] = "signed" if values["kind"] == "weight" else "auto"
    values["doubled_zero_points"] = SIGNED if values.pop("signed") else UNSIGNED
    values["pending_zero_points"] = SIGNED if values.pop("pending_signed") else UNSIGNED
    del values["zero_point"], values["half_integer"]


def read(state: Tensor) -> tuple[Settings, int]:
    """Settings and revision from a state of any version on any device, with a single copy to the host.

    Raises:
        ValueError: The state is damaged, or of another version.
    """
    shortest = min(form.length for form in _HEADERS.values())
    if state.dim() != 1 or len(state) < shortest:
        raise ValueError(
            f"A quantizer's state is one-dimensional with at least {shortest} elements, got shape {tuple(state.shape)}."
        )
    if state.dtype.itemsize < 4:
        raise ValueError(
            f"A quantizer's state is damaged (it was cast to {state.dtype}): it must stay float32. Load the state_dict "
            "as it was saved."
        )
    header = state[:HEADER].tolist()
    settings, revision = decode(header)
    expected = size(settings) - HEADER + _header_length(header)
    if len(state) != expected:
        raise ValueError(f"A quantizer's state has {len(state)} elements, but its header requires {expected}.")
    return settings, revision


def _header_length(header: list[float]) -> int:
    return _HEADERS[round(header[1] / header[0])].length


def upgraded(state: Tensor) -> Tensor:
    """A state in the layout of this release: ``state`` itself, or one of an older version converted.

    Raises:
        ValueError: The state is damaged, or of another version.
    """
    settings, revision = read(state)
    length = _header_length(state[:2].tolist())
    if length == HEADER and round(float(state[1] / state[0])) == VERSION:
        return state
    return torch.cat([encode(settings, revision).to(state), state[length:]])


def is_stacked(state: Tensor) -> bool:
    """Whether ``state`` stacks the states of several models, within ``torch.func.vmap``."""
    return type(state) is Tensor and not torch.compiler.is_compiling() and _functorch.is_batchedtensor(state)


def read_members(state: Tensor) -> Settings:
    """The common settings of models whose states are stacked.

    Raises:
        ValueError: The models differ in a setting that affects the computation.
    """
    dimension = _functorch.maybe_get_bdim(state)
    rows = _functorch.get_unwrapped(state).movedim(dimension, 0)
    first, *others = [read(row)[0] for row in rows]
    for name in first._fields:
        if name in (*_FACTS, "has_facts", "key", "numel", "settled"):
            continue
        different = {getattr(settings, name) for settings in (first, *others)}
        if len(different) == 1:
            continue
        values, remedy = [repr(value) for value in sorted(different)], "give them the same settings"
        if name in _TUPLES:
            # By an offset grid, calibration fits a zero point to each model's inputs.
            name = f"zero point (from 1 bit to {first.bits})"
            values = [" ".join(f"{z / 2:g}" for z in value[: first.bits]) for value in sorted(different)]
            side = "weight" if first.kind == "weight" else "act"
            remedy = f"attach them with CPQConfig({side}_grid='signed'), which is the same for all"
        raise ValueError(
            f"Models within torch.func.vmap are computed together and need the same settings, but corresponding "
            f"{first.kind} quantizers have {name} {' and '.join(values)}: call the models one by one, or {remedy}."
        )
    return first


def weight_of_ranges(state: Tensor) -> Tensor:
    """The weight of the scales, 0 before they are known, shape (1,)."""
    return state[_RANGES_OFFSET : _RANGES_OFFSET + 1]


def weight_of_pending(state: Tensor) -> Tensor:
    """The weight of the pending scales, 0 if there are none, shape (1,)."""
    return state[_PENDING_OFFSET : _PENDING_OFFSET + 1]


def _digits(name: str, value: Any) -> list[int]:
    """The numbers that stand for a setting in the state."""
    if name in _TUPLES:
        return list(value)
    number = [*_CHOICES[name]].index(value) if name in _CHOICES else int(value)
    return _split(number, _DIGITS.get(name, 1))


def _value(name: str, numbers: list[float]) -> Any:
    """The inverse of :func:`_digits`, for numbers that may be means."""
    digits = [round(number) for number in numbers]
    if name in _TUPLES:
        return tuple(digits)
    number = _join(digits)
    if name in _CHOICES:
        return [*_CHOICES[name]][min(max(number, 0), len(_CHOICES[name]) - 1)]
    return bool(number) if name in _BOOLEANS or name in ("signed", "pending_signed") else number


def _split(number: int, count: int) -> list[int]:
    """The lowest ``count`` digits, of 20 bits each, of an integer in two's complement, the lowest first."""
    number &= (1 << _DIGIT_BITS * count) - 1
    return [(number >> _DIGIT_BITS * place) & ((1 << _DIGIT_BITS) - 1) for place in range(count)]


def _join(digits: list[int]) -> int:
    return sum(digit << _DIGIT_BITS * place for place, digit in enumerate(digits))
