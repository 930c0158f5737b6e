"""What to quantize, and how: one frozen, validated dataclass of plain values that YAML can hold."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import yaml
from typing_extensions import TypeAliasType

from cpq_lightning.functional.categorical import Estimator
from cpq_lightning.functional.grid import check_bits

Nesting = Literal["auto", "range", "resolution"]
GateSharing = Literal["tensor", "channel", "element"]
GateEstimator = Literal["curvature", "concrete"]
# An alias with a name: OmegaConf, which Lightning's CSVLogger hands hyperparameters to, fails on a union of containers,
# and passes by on a type that it does not know.
Levels = TypeAliasType("Levels", str | dict[str, Any] | None)


def plain(value: Any) -> Any:
    """The same as dicts, lists and tuples, of whatever mappings and sequences it is made: such as OmegaConf's.

    Example:
        >>> from collections import UserDict, UserList
        >>> plain(UserDict(bits=UserList([4, 3]), shape=(2, 2)))
        {'bits': [4, 3], 'shape': (2, 2)}
    """
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(inner) for inner in value]
    return value


@dataclass
class CPQConfig:
    """Settings of Cluster-Promoting Quantization.

    Mappings and sequences may be of any kind, such as OmegaConf's; what is kept of them are dicts, lists and tuples.
    Wherever a config is asked for, a mapping of its settings will do: see :meth:`of`.

    Args:
        weight_bits: Width of weights, 1-8 bits. With ``min_bits`` below it, the widest one.
        act_bits: Width of activations, 1-8 bits; ``None`` leaves activations alone.
        min_bits: Narrowest width of weights that DropBits may drop to; ``None`` means ``weight_bits``: nothing is
            dropped.
        learn_bits: Whether training decides each weight's width between ``min_bits`` and ``weight_bits``, under the
            budget of a :class:`~cpq_lightning.callbacks.BitBudget`.
        learn_act_bits: The same for activations, between ``min_act_bits`` and ``act_bits`` (the paper stopped at
            weights).
        min_act_bits: Narrowest width of learned activations; ``None`` means ``min_bits``, at most ``act_bits``.
        attention: Whether products of two activations (attention's ``q·kᵀ`` and ``attention·v``, and whatever else a
            forward multiplies without a layer) are quantized too, both sides with ``act_bits``.
            ``scaled_dot_product_attention`` is then computed in its two products; without it, it stays as it is. Which
            modules multiply is seen in one forward: see :func:`~cpq_lightning.attach`.
        levels_from: Path of a ``levels.json`` whose widths all layers take, first and last ones too (or those widths
            themselves, ``{layer: {"weight": bits, "activation": bits}}``, a list of bits being one a channel). Nothing
            is learned or dropped then; steps are fitted anew.
        nesting: How widths nest. ``"range"`` (the paper's): a dropped bit halves the range at the same step, good
            over a bit or two. ``"resolution"`` (ours): each width has its own step on about the same range, for wider
            spans. ``"auto"`` is ``"resolution"`` where widths are learned, else ``"range"``.
        first_last_bits: Width of the weights and activations of the first and last layer; ``None`` makes no
            exception.
        weight_estimator: Gradient of the weights' quantizer: ``"argmax"`` (the paper's) or ``"expectation"`` (ours).
        act_estimator: The same for activations; the slope of ``"argmax"`` changes sign within each of their cells, and
            layers below learn little by it.
        per_channel: One step per output channel of a weight instead of one per tensor.
        temperature: Rounding temperature T in (0, 1] that training starts with; the noise is ``T * sigma``.
        keep_prob: Probability in (0, 1] with which DropBits keeps each bit in training. It acts where ``min_bits``
            is below ``weight_bits``; evaluation always uses all bits. Learned gates start with it, at most at 0.95.
        gate_sharing: Whether a ``"tensor"``, a ``"channel"`` or an ``"element"`` shares one gate. With learned bits a
            ``"channel"`` has a width of its own.
        gate_estimator: Gradient of learned gates, one for all of a model. ``"curvature"`` (ours): what a bit is worth
            is how much the loss bends along the residual that it adds, as the square of the gradient's product with it
            tells (:func:`~cpq_lightning.functional.bit_saliency`). ``"concrete"`` (the paper's): the gradient through
            the gates that are drawn, which is what the loss would rise by at once, without the bit and without training
            behind it. A loss that is zero (a network that starts as its own teacher, and nothing else to learn from)
            tells nothing of curvature. A module that accumulates gradients by itself, under manual optimization, draws
            gates in each batch, and tells a bit that only some of them have a part of its worth.
        ignore: Layers to leave in full precision: patterns of full dotted names (as ``fnmatch`` has them, with case)
            or module types (``"Linear"``). A layer that is registered under several names is meant by each of them. Of
            layers that share a weight all or none are left out; anything else is refused.
        overrides: Settings for some layers, ``{pattern: {setting: value}}``, patterns as for ``ignore``. Of several
            that match a layer, the last wins, setting by setting. A weight that layers share has one quantizer: what
            one of these layers is given of it holds for all, and what contradicts that is refused.
        weight_range: Starting step of weights: ``"mse"`` (least squared error) or ``"max"`` (no weight is clipped).
        act_range: Starting step of activations, likewise, from calibration batches.
        seed: Seed of the gates' noise.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of its range, or an unknown setting in ``overrides``.

    Example:
        >>> CPQConfig(weight_bits=4, overrides={"*.downsample.*": {"weight_bits": 8}}).for_layer([]).weight_bits
        4
    """

    weight_bits: int = 4
    act_bits: int | None = 4
    min_bits: int | None = None
    learn_bits: bool = False
    learn_act_bits: bool = False
    min_act_bits: int | None = None
    attention: bool = False
    levels_from: Levels = None
    nesting: Nesting = "auto"
    first_last_bits: int | None = 8
    weight_estimator: Estimator = "expectation"
    act_estimator: Estimator = "expectation"
    per_channel: bool = False
    temperature: float = 1.0
    keep_prob: float = 1.0
    gate_sharing: GateSharing = "tensor"
    gate_estimator: GateEstimator = "curvature"
    ignore: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    weight_range: Literal["mse", "max"] = "mse"
    act_range: Literal["mse", "max"] = "mse"
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        if self.act_bits is not None:
            check_bits("act_bits", self.act_bits)
        if self.first_last_bits is not None:
            check_bits("first_last_bits", self.first_last_bits)
        if self.min_bits is not None:
            check_bits("min_bits", self.min_bits)
            if self.min_bits > self.weight_bits:
                raise ValueError(
                    f"min_bits must be at most weight_bits={self.weight_bits}, got {self.min_bits}: lower min_bits or "
                    "raise weight_bits."
                )
        self._check_learning()
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}.")
        for name in ("temperature", "keep_prob"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number over 0 and up to 1, got {value!r}.")
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be over 0 and up to 1, got {value}.")
        for name in ("per_channel", "learn_bits", "learn_act_bits", "attention"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}.")
        self._freeze_patterns()

    def _check_learning(self) -> None:
        if self.min_act_bits is not None:
            check_bits("min_act_bits", self.min_act_bits)
            if self.act_bits is not None and self.min_act_bits > self.act_bits:
                raise ValueError(
                    f"min_act_bits must be at most act_bits={self.act_bits}, got {self.min_act_bits}: lower "
                    "min_act_bits or raise act_bits."
                )
        if self.learn_act_bits is True and self.act_bits is None:
            raise ValueError("learn_act_bits=True needs act_bits, the widest width that activations may have.")
        if self.attention is True and self.act_bits is None:
            raise ValueError("attention=True quantizes activations: it needs act_bits, their width.")
        if not isinstance(self.levels_from, str | os.PathLike | Mapping | None):
            raise TypeError(f"levels_from must be the path of a levels.json, got {self.levels_from!r}.")
        if isinstance(self.levels_from, os.PathLike):
            self.__dict__["levels_from"] = os.fspath(self.levels_from)
        if isinstance(self.levels_from, Mapping):
            self.__dict__["levels_from"] = plain(self.levels_from)
        if self.levels_from is not None and (self.learn_bits or self.learn_act_bits):
            raise ValueError(
                "levels_from fixes all widths, so nothing is left to learn: leave out learn_bits and learn_act_bits, "
                "or levels_from."
            )

    def _freeze_patterns(self) -> None:
        patterns: Any = self.ignore
        listed = isinstance(patterns, Sequence) and not isinstance(patterns, str | bytes)
        if not listed or not all(isinstance(p, str) for p in patterns):
            raise TypeError(f"ignore must be a list of patterns, such as ['head', '*.fc'], got {self.ignore!r}.")
        self.__dict__["ignore"] = tuple(patterns)
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must map patterns to settings, got {self.overrides!r}.")
        for pattern, settings in self.overrides.items():
            if not isinstance(settings, Mapping):
                raise TypeError(f"overrides[{pattern!r}] must map settings to values, got {settings!r}.")
            for key in settings:
                if key in LAYER_SETTINGS:
                    continue
                if key in (f.name for f in dataclasses.fields(self)):
                    raise ValueError(
                        f"overrides[{pattern!r}] has {key!r}, which is one for the whole model: set it outside of "
                        f"overrides; a layer can have {LAYER_SETTINGS}."
                    )
                near = difflib.get_close_matches(str(key), LAYER_SETTINGS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"overrides[{pattern!r}] has the unknown setting {key!r}; a layer can have {LAYER_SETTINGS}.{hint}"
                )
            try:
                dataclasses.replace(self, overrides={}, **_widened(self, settings))
            except (TypeError, ValueError) as error:
                raise type(error)(f"overrides[{pattern!r}]: {error}") from None
        # A copy: what is frozen here does not change under it.
        self.__dict__["overrides"] = plain(self.overrides)

    def __setattr__(self, name: str, value: Any) -> None:
        # Not dataclass(frozen=True): Lightning's loggers and its moves between devices write each field of a dataclass
        # back as it is, and refuse one that cannot be written.
        if name not in self.__dataclass_fields__ or (name in self.__dict__ and self.__dict__[name] != value):
            raise dataclasses.FrozenInstanceError(
                f"a CPQConfig does not change once it is made, so {name} cannot become {value!r}: make another with "
                f"dataclasses.replace(config, {name}={value!r})."
            )
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"a CPQConfig does not change once it is made: {name} stays.")

    @staticmethod
    def of(value: CPQConfig | Mapping[str, Any], argument: str = "config") -> CPQConfig:
        """A config, or the one that a mapping has the settings of.

        Args:
            value: Either.
            argument: What it was given as, for messages.

        Raises:
            TypeError: it is neither, or a setting has the wrong type.
            ValueError: an unknown setting, or one out of its range.

        Example:
            >>> CPQConfig.of({"weight_bits": 3}) == CPQConfig(weight_bits=3)
            True
        """
        if isinstance(value, CPQConfig):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{argument} must be a CPQConfig, or a mapping of its settings such as {{'weight_bits': 4}}, got "
                f"{value!r}."
            )
        known = [f.name for f in dataclasses.fields(CPQConfig)]
        # Hydra leaves its own keys in a config that it is told not to instantiate.
        value = {key: setting for key, setting in value.items() if key not in _OF_HYDRA}
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{argument} has the unknown setting {key!r}; a CPQConfig has {tuple(known)}.{hint}")
        try:
            return CPQConfig(**value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{argument}: {error}") from None

    def for_layer(self, overrides: Sequence[Mapping[str, Any]]) -> CPQConfig:
        """The settings of one layer: these, with the given overrides laid over them in turn."""
        merged: dict[str, Any] = {}
        for settings in overrides:
            merged.update(settings)
        return dataclasses.replace(self, overrides={}, **{**_widened(self, merged), "attention": False})

    def for_first_or_last(self) -> CPQConfig:
        """The settings of a first or last layer: ``first_last_bits`` wide, nothing dropped."""
        if self.first_last_bits is None:
            return self
        act_bits = None if self.act_bits is None else self.first_last_bits
        return dataclasses.replace(
            self,
            weight_bits=self.first_last_bits,
            min_bits=None,
            learn_bits=False,
            act_bits=act_bits,
            attention=False,
            min_act_bits=None,
            learn_act_bits=False,
            overrides={},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and checkpoints take them: ``CPQConfig(**config.to_dict()) == config``."""
        values = dataclasses.asdict(self)
        return {**values, "ignore": list(self.ignore)}

    @property
    def narrowest_bits(self) -> int:
        """``min_bits``, or ``weight_bits`` where none is given."""
        return self.weight_bits if self.min_bits is None else self.min_bits

    @property
    def nests_by(self) -> Literal["range", "resolution"]:
        """``nesting``, with ``"auto"`` resolved."""
        if self.nesting == "auto":
            several = self.learn_bits or self.learn_act_bits or self.levels_from is not None
            return "resolution" if several else "range"
        return self.nesting

    @property
    def narrowest_act_bits(self) -> int | None:
        """Narrowest width of activations: ``act_bits`` unless they are learned."""
        if self.act_bits is None or not self.learn_act_bits:
            return self.act_bits
        return min(self.act_bits, self.narrowest_bits) if self.min_act_bits is None else self.min_act_bits


def _widened(config: CPQConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An override of a width alone that goes below the general narrowest one takes that one down with it."""
    widened = dict(settings)
    for width, narrowest in (("weight_bits", "min_bits"), ("act_bits", "min_act_bits")):
        bits, floor = settings.get(width), getattr(config, narrowest)
        if isinstance(bits, int) and narrowest not in settings and floor is not None and floor > bits:
            widened[narrowest] = bits
    if "act_bits" in settings and settings["act_bits"] is None:
        widened.setdefault("learn_act_bits", False)
        widened["attention"] = False
    return widened


# A checkpoint whose hyperparameters have a config loads with weights_only=True: it is made of plain values. So is what
# Lightning writes to hparams.yaml.
torch.serialization.add_safe_globals([CPQConfig])
for _dumper in (yaml.Dumper, yaml.SafeDumper):
    yaml.add_representer(CPQConfig, lambda dumper, config: dumper.represent_dict(config.to_dict()), _dumper)
_OF_HYDRA = ("_target_", "_recursive_", "_convert_", "_partial_")

LAYER_SETTINGS = (
    "weight_bits", "act_bits", "min_bits", "learn_bits", "learn_act_bits", "min_act_bits", "nesting",
    "weight_estimator", "act_estimator", "per_channel", "temperature", "keep_prob", "gate_sharing", "weight_range",
    "act_range",
)  # fmt: skip
# Those of a weight: the same in all layers that share it.
WEIGHT_SETTINGS = tuple(s for s in LAYER_SETTINGS if "act_" not in s)
_CHOICES: dict[str, tuple[str, ...]] = {
    "nesting": get_args(Nesting),
    "weight_estimator": get_args(Estimator),
    "act_estimator": get_args(Estimator),
    "gate_sharing": get_args(GateSharing),
    "gate_estimator": get_args(GateEstimator),
    "weight_range": ("mse", "max"),
    "act_range": ("mse", "max"),
}
