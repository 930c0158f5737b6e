"""Configuration of quantization: one frozen, validated dataclass of plain values that YAML can represent."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import yaml
from typing_extensions import TypeAliasType

from cpq_lightning.functional.categorical import ESTIMATORS, Estimator
from cpq_lightning.functional.grid import check_bits

Nesting = Literal["auto", "range", "resolution"]
GateSharing = Literal["tensor", "channel", "element"]
GateEstimator = Literal["curvature", "concrete"]
WeightGrid = Literal["auto", "signed", "balanced"]
ActGrid = Literal["auto", "signed", "unsigned", "offset", "int8"]
Deploy = Literal["tensorrt", "qonnx"]
# A named alias, because Lightning's CSVLogger passes hyperparameters to OmegaConf, which fails on a union of containers
# and ignores types that it does not know.
Levels = TypeAliasType("Levels", str | dict[str, Any] | None)


def plain(value: Any) -> Any:
    """Convert nested mappings and sequences of any kind, such as OmegaConf's, to dicts, lists and tuples.

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


@dataclass(kw_only=True)
class CPQConfig:
    """Settings of Cluster-Promoting Quantization.

    Mappings and sequences may be of any kind, such as OmegaConf's; they are converted to dicts, lists and tuples.
    Functions that take a config also take a mapping of its settings: see :meth:`of`.

    Args:
        weight_bits: Width of weights, 1-8 bits. If ``min_bits`` is lower, this is the widest width.
        act_bits: Width of activations, 1-8 bits; ``None`` leaves activations in full precision.
        min_bits: Narrowest width of weights that DropBits may drop to; ``None`` means ``weight_bits``, so that no bit
            is dropped.
        learn_bits: Whether training learns each weight's width between ``min_bits`` and ``weight_bits``, under the
            budget of a :class:`~cpq_lightning.callbacks.BitBudget`.
        learn_act_bits: The same for activations, between ``min_act_bits`` and ``act_bits`` (ours; the paper learns
            widths of weights only).
        min_act_bits: Narrowest width of learned activations; ``None`` means ``min_bits``, at most ``act_bits``.
        attention: Whether products of two activations are quantized too, both operands with ``act_bits``: attention's
            ``q·kᵀ`` and ``attention·v``, and all other products that a forward computes outside of layers.
            ``scaled_dot_product_attention`` is then computed as two products; with ``False`` it is not changed. One
            forward determines which modules multiply: see :func:`~cpq_lightning.attach`.
        embeddings: Whether the tables of ``nn.Embedding`` and ``nn.EmbeddingBag`` are quantized too, with
            ``weight_bits`` and one scale each row. Each forward quantizes the complete table. An embedding that shares
            the weight of a quantized layer is always looked up quantized, at that layer's width.
        levels_from: Path of a ``levels.json`` whose widths all layers use, first and last layers too, or these widths
            as a mapping ``{layer: {"weight": bits, "activation": bits}}``, where a list of bits has one width for each
            channel. No width is then learned and no bit dropped; scales are initialized again.
        nesting: How widths nest. ``"range"`` (the paper's): a dropped bit halves the range at the same scale, suited to
            spans of one or two bits. ``"resolution"`` (ours): each width has a separate scale on about the same range,
            for wider spans. ``"auto"`` means ``"resolution"`` if widths are learned or from ``levels_from``, else
            ``"range"``.
        first_last_bits: Width of the weights and activations of the first and last layer; ``None`` quantizes them like
            all other layers.
        weight_estimator: Gradient estimator of weight quantizers: ``"argmax"`` (the paper's) or ``"expectation"``
            (ours).
        act_estimator: Gradient estimator of activation quantizers. The slope of ``"argmax"`` changes sign within each
            cell of a grid, so that the layers before an activation learn little with it.
        per_channel: One scale per output channel of a weight; ``False`` means one per tensor.
        group_size: Weights of linear layers have one scale for each group of so many consecutive inputs of an output,
            such as 32, 64 or 128: at 2 to 4 bits they lose less, for 32 further bits a group in the file. The last
            group may be smaller; a layer with at most so many inputs has one group an output. Convolutions keep one
            scale per output channel, as runtimes compute them, and embeddings one per row, unless they share the weight
            of a linear layer. ``None`` means no groups. Needs ``per_channel=True``, and one width for each weight: not
            ``gate_sharing="channel"``.
        temperature: Rounding temperature T in (0, 1] at the start of training; the noise is ``T * sigma``.
        keep_prob: Probability in (0, 1] with which DropBits keeps each bit in training. It has an effect only if
            ``min_bits`` is below ``weight_bits``; evaluation always uses all bits. Learned gates start at this
            probability, at most at 0.95.
        gate_sharing: Whether each ``"tensor"``, ``"channel"`` or ``"element"`` has one gate per bit. With learned bits,
            ``"channel"`` learns one width per channel.
        gate_estimator: Gradient estimator of learned gates, one for the model. ``"curvature"`` (ours) uses the saliency
            of a bit: the curvature of the loss along the residual that the bit adds, estimated by the square of the
            residual's product with the gradient (:func:`~cpq_lightning.functional.bit_saliency`). ``"concrete"`` (the
            paper's) is the gradient through the sampled gates: how much the loss would rise immediately without the
            bit, before any training without it. A loss of zero gives no saliency (for example a network that starts
            equal to its teacher and has no other loss). A module with manual optimization that accumulates gradients
            itself samples gates in each batch; a bit that is open in only some of these batches then gets only part of
            its saliency.
        ignore: Layers to keep in full precision: patterns of full dotted names (``fnmatch``, case-sensitive) or module
            types (``"Linear"``). A pattern for a module such as ``nn.LSTM`` holds for all its layers. A layer that is
            registered under several names matches by each of them. Layers that share a weight must all be ignored or
            none; otherwise it is an error.
        overrides: Settings for some layers, ``{pattern: {setting: value}}``, patterns as for ``ignore``. If several
            match a layer, the last one wins for each setting. Layers that share a weight share its quantizer: a
            weight's setting for one of them applies to all, and contradictions are an error.
        weight_range: Scale initialization of weights: ``"mse"`` (least squared error) or ``"max"`` (minmax: no weight
            is clipped).
        act_range: Scale initialization of activations from calibration batches, with the same choices.
        weight_grid: The levels of weights, in units of the scale (:mod:`cpq_lightning.functional.grid`). ``"signed"``:
            ``-2^(k-1) … 2^(k-1) - 1``. ``"balanced"``: ``± 1/2, ± 3/2, …`` without 0, of the same number, up to 7 bits
            (wider weights are signed). ``"auto"``: balanced at 1 bit, else signed. A weight whose zeros mean something,
            such as a pruned one, always keeps a level 0. Widths that nest by range share one kind of grid; those that
            nest by resolution, such as learned ones, each have their own.
        act_grid: The levels of activations. ``"signed"``: as for weights. ``"unsigned"``: ``0 … 2^k - 1``.
            ``"offset"``: ``-z … 2^k - 1 - z`` with the zero point z that has the least squared error, found with the
            scale; signed and unsigned grids are its ends. ``"auto"``: an offset where its error is lower than that of
            both ends by at least a hundredth. Each learned width has a zero point of its own. ``"int8"``: signed, or
            unsigned of at most 7 bits, whichever has less error: signed bytes with a zero point of 0 hold these.
        deploy: A target whose needs are set before training, and checked when a model is attached. ``"tensorrt"``:
            ``act_grid="auto"`` means ``"int8"``. ``"qonnx"``: one width for each tensor. ``None`` sets nothing; packed
            files, ONNX Runtime and programs hold all grids.
        seed: Seed of the gates' noise.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range, or ``overrides`` has an unknown setting.

    Example:
        >>> CPQConfig(weight_bits=4, overrides={"*.downsample.*": {"weight_bits": 8}}).for_layer({}).weight_bits
        4
    """

    weight_bits: int = 4
    act_bits: int | None = 4
    min_bits: int | None = None
    learn_bits: bool = False
    learn_act_bits: bool = False
    min_act_bits: int | None = None
    attention: bool = False
    embeddings: bool = False
    levels_from: Levels = None
    nesting: Nesting = "auto"
    first_last_bits: int | None = 8
    weight_estimator: Estimator = "expectation"
    act_estimator: Estimator = "expectation"
    per_channel: bool = True
    group_size: int | None = None
    temperature: float = 1.0
    keep_prob: float = 1.0
    gate_sharing: GateSharing = "tensor"
    gate_estimator: GateEstimator = "curvature"
    ignore: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    weight_range: Literal["mse", "max"] = "mse"
    act_range: Literal["mse", "max"] = "mse"
    weight_grid: WeightGrid = "auto"
    act_grid: ActGrid = "auto"
    deploy: Deploy | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        for name in ("act_bits", "first_last_bits", "min_bits", "min_act_bits"):
            if getattr(self, name) is not None:
                check_bits(name, getattr(self, name))
        for narrowest, widest in (("min_bits", "weight_bits"), ("min_act_bits", "act_bits")):
            low, high = getattr(self, narrowest), getattr(self, widest)
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"{narrowest} must be at most {widest}={high}, got {low}: lower {narrowest} or raise {widest}."
                )
        self._check_learning()
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {tuple(options)}, got {getattr(self, name)!r}.")
        for name in ("temperature", "keep_prob"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number over 0 and up to 1, got {value!r}.")
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be over 0 and up to 1, got {value}.")
        for name in ("per_channel", "learn_bits", "learn_act_bits", "attention", "embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_groups()
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}.")
        self._freeze_patterns()

    def _check_learning(self) -> None:
        if self.learn_act_bits is True and self.act_bits is None:
            raise ValueError("learn_act_bits=True needs act_bits, the maximum width of activations.")
        if self.attention is True and self.act_bits is None:
            raise ValueError("attention=True quantizes activations: set act_bits, their width.")
        if not isinstance(self.levels_from, str | os.PathLike | Mapping | None):
            raise TypeError(
                f"levels_from must be the path of a levels.json or a mapping of widths, got {self.levels_from!r}."
            )
        if isinstance(self.levels_from, os.PathLike):
            self.__dict__["levels_from"] = os.fspath(self.levels_from)
        if isinstance(self.levels_from, Mapping):
            self.__dict__["levels_from"] = plain(self.levels_from)
        if self.levels_from is not None and (self.learn_bits or self.learn_act_bits):
            raise ValueError(
                "levels_from fixes all widths, so nothing is left to learn: remove learn_bits and learn_act_bits, or "
                "levels_from."
            )

    def _check_groups(self) -> None:
        size = self.group_size
        if size is None:
            return
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"group_size must be a whole number of inputs from 2, such as 32, or None, got {size!r}.")
        if size < 2:
            raise ValueError(f"group_size must be at least 2 inputs, such as 32, or None for no groups, got {size}.")
        if not self.per_channel:
            raise ValueError(
                f"group_size={size} divides the channels of a weight into groups with one scale each, and "
                "per_channel=False has one scale for the whole weight: set per_channel=True, or group_size=None."
            )
        if self.gate_sharing == "channel":
            raise ValueError(
                f"group_size={size} needs one width for each weight, and gate_sharing='channel', or a list of widths "
                "in levels_from, has one for each channel: use one width for each layer (gate_sharing='tensor'), or "
                "group_size=None."
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
                        f"overrides. Settings of a layer are {LAYER_SETTINGS}."
                    )
                near = difflib.get_close_matches(str(key), LAYER_SETTINGS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"overrides[{pattern!r}] has the unknown setting {key!r}; settings of a layer are {LAYER_SETTINGS}."
                    f"{hint}"
                )
            try:
                dataclasses.replace(self, overrides={}, **_with_implied(self, settings))
            except (TypeError, ValueError) as error:
                raise type(error)(f"overrides[{pattern!r}]: {error}") from None
        # A copy, so that later changes of the caller's mapping do not change the frozen config.
        self.__dict__["overrides"] = plain(self.overrides)

    def __setattr__(self, name: str, value: Any) -> None:
        # Not dataclass(frozen=True): Lightning's loggers and transfers between devices assign to each field the value
        # that it has, and reject frozen dataclasses.
        if name not in self.__dataclass_fields__ or (name in self.__dict__ and self.__dict__[name] != value):
            raise dataclasses.FrozenInstanceError(
                f"a CPQConfig is immutable, so {name} cannot be set to {value!r}: create another config with "
                f"dataclasses.replace(config, {name}={value!r})."
            )
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"a CPQConfig is immutable: {name} cannot be deleted.")

    @staticmethod
    def of(value: CPQConfig | Mapping[str, Any], argument: str = "config") -> CPQConfig:
        """Return a config unchanged, or create one from a mapping of its settings.

        Args:
            value: A config or a mapping.
            argument: Name of the caller's argument, for error messages.

        Raises:
            TypeError: ``value`` is neither, or a setting has the wrong type.
            ValueError: a setting is unknown or out of its range.

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
        # Hydra's keys remain in a config that Hydra does not instantiate.
        value = {key: setting for key, setting in value.items() if key not in _HYDRA_KEYS}
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{argument} has the unknown setting {key!r}; a CPQConfig has {tuple(known)}.{hint}")
        try:
            return CPQConfig(**value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{argument}: {error}") from None

    def for_layer(self, overrides: Mapping[str, Any]) -> CPQConfig:
        """The settings of one layer: this config with the given overrides."""
        return dataclasses.replace(self, overrides={}, **{**_with_implied(self, overrides), **_OF_THE_MODEL})

    def for_first_or_last(self) -> CPQConfig:
        """The settings of a first or last layer: a fixed width of ``first_last_bits``, without DropBits."""
        if self.first_last_bits is None:
            return self
        act_bits = None if self.act_bits is None else self.first_last_bits
        return dataclasses.replace(
            self,
            weight_bits=self.first_last_bits,
            min_bits=None,
            learn_bits=False,
            act_bits=act_bits,
            min_act_bits=None,
            learn_act_bits=False,
            overrides={},
            **_OF_THE_MODEL,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and checkpoints: ``CPQConfig(**config.to_dict()) == config``."""
        values = dataclasses.asdict(self)
        return {**values, "ignore": list(self.ignore)}

    @property
    def narrowest_bits(self) -> int:
        """``min_bits``, or ``weight_bits`` if ``min_bits`` is ``None``."""
        return self.weight_bits if self.min_bits is None else self.min_bits

    @property
    def chosen_act_grid(self) -> ActGrid:
        """``act_grid``, with ``"auto"`` replaced by what ``deploy`` needs."""
        return "int8" if self.act_grid == "auto" and self.deploy == "tensorrt" else self.act_grid

    @property
    def nests_by(self) -> Literal["range", "resolution"]:
        """``nesting``, with ``"auto"`` replaced by the choice it stands for."""
        if self.nesting == "auto":
            mixed_widths = self.learn_bits or self.learn_act_bits or self.levels_from is not None
            return "resolution" if mixed_widths else "range"
        return self.nesting

    @property
    def narrowest_act_bits(self) -> int | None:
        """Narrowest width of activations: ``act_bits`` unless their widths are learned."""
        if self.act_bits is None or not self.learn_act_bits:
            return self.act_bits
        return min(self.act_bits, self.narrowest_bits) if self.min_act_bits is None else self.min_act_bits


def _with_implied(config: CPQConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An override with the settings it implies: a width below the narrowest width lowers that to it; no ``act_bits``
    switches off what needs activations.
    """
    completed = dict(settings)
    for width, narrowest in (("weight_bits", "min_bits"), ("act_bits", "min_act_bits")):
        bits, minimum = settings.get(width), getattr(config, narrowest)
        if isinstance(bits, int) and narrowest not in settings and minimum is not None and minimum > bits:
            completed[narrowest] = bits
    if "act_bits" in settings and settings["act_bits"] is None:
        completed.setdefault("learn_act_bits", False)
        completed["attention"] = False
    return completed


# Settings that say which parts of a model are quantized, and mean nothing for one layer.
_OF_THE_MODEL = {"attention": False, "embeddings": False}


# Makes checkpoints with a config in their hyperparameters loadable with weights_only=True, and hparams.yaml, which
# Lightning writes, consist of plain values.
torch.serialization.add_safe_globals([CPQConfig])
for _dumper in (yaml.Dumper, yaml.SafeDumper):
    yaml.add_representer(CPQConfig, lambda dumper, config: dumper.represent_dict(config.to_dict()), _dumper)
_HYDRA_KEYS = ("_target_", "_recursive_", "_convert_", "_partial_")

LAYER_SETTINGS = (
    "weight_bits", "act_bits", "min_bits", "learn_bits", "learn_act_bits", "min_act_bits", "nesting",
    "weight_estimator", "act_estimator", "per_channel", "group_size", "temperature", "keep_prob", "gate_sharing",
    "weight_range", "act_range", "weight_grid", "act_grid",
)  # fmt: skip
# Settings of a weight: they must be equal in all layers that share it.
WEIGHT_SETTINGS = tuple(s for s in LAYER_SETTINGS if "act_" not in s)
_CHOICES: dict[str, Collection[str | None]] = {
    "nesting": get_args(Nesting),
    "weight_estimator": ESTIMATORS,
    "act_estimator": ESTIMATORS,
    "gate_sharing": get_args(GateSharing),
    "gate_estimator": get_args(GateEstimator),
    "weight_range": ("mse", "max"),
    "act_range": ("mse", "max"),
    "weight_grid": get_args(WeightGrid),
    "act_grid": get_args(ActGrid),
    "deploy": (None, *get_args(Deploy)),
}
