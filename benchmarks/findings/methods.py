"""The methods: how each makes a quantized network of the shared start, and what runs beside its training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from benchmarks.findings.allocation import Levels, narrowest
from benchmarks.findings.relaxed import Relaxed
from benchmarks.quantized_layer import (
    Bits,
    LearnedOffset,
    LearnedStep,
    Make,
    QuantizedLayer,
    brevitas_layer,
    replace_layers,
    show,
)
from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.origin import quantizable_layers
from cpq_lightning.bitwidth import search as _search
from cpq_lightning.callbacks import (
    BitBudget,
    ClusterPull,
    DistillationCallback,
    DropBitsSchedule,
    OscillationFreezing,
    ProgressiveWidths,
    TemperatureSchedule,
)
from cpq_lightning.functional import grid_fit
from cpq_lightning.nn import gates
from cpq_lightning.nn.scale_init import BALANCED_BITS
from cpq_lightning.nn.sharding import whole

FULL, LSQ, BREVITAS, RQ = "full precision", "LSQ", "Brevitas", "RQ, Gumbel-softmax"
LSQ_PLUS, LSQ_OFFSET = "LSQ+", "LSQ+, zero point as it started"
ARGMAX, EXPECTATION = "CPQ argmax", "CPQ expectation"
COOLED, DROPPED = "CPQ expectation, T 1 to 0.2", "CPQ expectation, DropBits"
PULLED, PULLED_LSQ = "CPQ expectation, ClusterPull", "LSQ, ClusterPull"
LEARNED, RELEARNED = "learned levels", "learned levels from the start"
DRAWN = "learned by drawn gates"
REDRAWN = f"{DRAWN}, from the start"
# The product as a user gets it who sets only the bits.
DEFAULTS, LEARNED_DEFAULTS = "CPQ, defaults", "learned levels, defaults"
CHANNELS, BALANCED = f"{EXPECTATION}: a step each channel", f"{EXPECTATION}: balanced weights"
SIGNED, NO_OFFSET = f"{EXPECTATION}: inputs signed", f"{EXPECTATION}: inputs signed or unsigned"
FROZEN, DAMPENED = f"{EXPECTATION}: oscillating weights frozen", f"{EXPECTATION}: dampened from early on"
GENTLY = f"{EXPECTATION}: dampened a tenth as much"
CALIBRATED = "CPQ, calibrated alone"
STAGED, BALANCED_ARGMAX = f"{EXPECTATION}: widths narrowed in stages", f"{ARGMAX}: balanced weights"
RANDOM, BY_ERROR, BY_HESSIAN = "random levels", "levels by error", "levels by Hessian trace"
# Of the first and last layer, whatever the method.
END_BITS = 8


@dataclass(frozen=True)
class Task:
    """What a method is to make.

    Attributes:
        network: The shared start, in full precision.
        weight_bits: Average bits of the weights.
        act_bits: Bits of the activations.
        images: A training batch.
        levels: Bits of each layer's weight, for methods that are given them.
    """

    network: nn.Module
    weight_bits: float
    act_bits: int
    images: Tensor
    levels: Levels | None = None


@dataclass
class Made:
    """What trains.

    Attributes:
        network: The network, quantized, or to be quantized by the config.
        config: CPQ's; ``None`` for its peers.
        callbacks: Beside the training.
        patched: What differs from the product while it trains, for questions that its settings do not ask.
        trained: Whether it trains; else it is calibrated alone.
    """

    network: nn.Module
    config: CPQConfig | None = None
    callbacks: list[Callback] = field(default_factory=list)
    patched: AbstractContextManager[Any] = field(default_factory=nullcontext)
    trained: bool = True


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        make: Makes what trains.
        family: The method whose searched learning rate it takes; empty for one that does not train.
        levels: Where the widths come from that it is given, if it is: what allocates them, or a method whose runs learn
            them.
        package: What it needs beyond the project's own packages.
        base: The method that it differs from in one thing.
    """

    make: Callable[[Task], Made]
    family: str
    levels: str = ""
    package: str = ""
    base: str = ""

    @property
    def missing(self) -> str:
        """What to install before it can run here; empty if it can."""
        if not self.package or importlib.util.find_spec(self.package) is not None:
            return ""
        return f"pip install -e '.[bench-findings,bench-{self.package}]', in an environment of its own"


def trained_as(method: str, weight_bits: float) -> str:
    """The method whose runs are a method's too: of two bits or more the defaults are a step each channel, no more."""
    return CHANNELS if method == DEFAULTS and weight_bits > BALANCED_BITS else method


def ends(network: nn.Module) -> tuple[str, str]:
    """Names of the first and the last layer."""
    names = list(quantizable_layers(network))
    return names[0], names[-1]


def inner_layers(network: nn.Module) -> dict[str, int]:
    """Weights of all layers but the first and the last, by name: those that averages are of."""
    sizes = {name: layer.get_parameter("weight").numel() for name, layer in quantizable_layers(network).items()}
    return {name: size for name, size in sizes.items() if name not in ends(network)}


def layer_bits(task: Task) -> dict[str, Bits]:
    """Widths of every layer, for peers."""
    inner, bits, negative = inner_layers(task.network), {}, with_negative_inputs(task.network, task.images)
    for name in quantizable_layers(task.network):
        weight = (task.levels or {}).get(name, int(task.weight_bits))
        signed = name in negative
        bits[name] = Bits(weight, task.act_bits, signed) if name in inner else Bits(END_BITS, END_BITS, signed)
    return bits


@torch.no_grad()
def with_negative_inputs(network: nn.Module, images: Tensor) -> set[str]:
    """Names of the layers whose inputs have negative values."""
    lowest: dict[str, float] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, args: lowest.update({name: float(args[0].min())})

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in quantizable_layers(network).items()]
    show(network, images)
    for hook in hooks:
        hook.remove()
    return {name for name, value in lowest.items() if value < 0}


def _full_precision(task: Task) -> Made:
    return Made(task.network)


def _peer(quantizer: Make, task: Task, pulled: bool = False, of_weight: Make | None = None) -> Made:
    made = replace_layers(
        task.network, layer_bits(task), lambda layer, bits: QuantizedLayer(layer, bits, quantizer, of_weight)
    )
    return Made(show(made, task.images), callbacks=[_PeerPull()] if pulled else [])


class _PeerPull(ClusterPull):
    """The same pull for layers that are not CPQ's."""

    def pulled(self, pl_module: LightningModule) -> Mapping[int, Any]:
        layers = [m for m in pl_module.modules() if isinstance(m, QuantizedLayer)]
        return {id(layer.layer.weight): [(whole, layer.weight_quantizer)] for layer in layers}


def _brevitas(task: Task) -> Made:
    made = replace_layers(task.network, layer_bits(task), brevitas_layer)
    return Made(show(show(made, task.images), task.images))


# What single ingredients are added to: a scale each tensor, and signed weights.
_PLAIN: dict[str, Any] = {"per_channel": False, "weight_grid": "signed"}


def _without_offsets() -> AbstractContextManager[Any]:
    """Inputs on the signed or the unsigned grid, whichever has less error: no offset is ever worth it."""
    return patch.object(grid_fit, "_WORTH", 1 - 1e-12)


def _cpq(
    task: Task,
    settings: Mapping[str, Any] | None = None,
    callbacks: Callable[[], list[Callback]] = list,
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext,
    plain: Mapping[str, Any] = _PLAIN,
) -> Made:
    """CPQ at fixed widths, of all layers alike or given."""
    # Names are those within a QuantizedModule.
    overrides = {f"model.{name}": {"weight_bits": bits} for name, bits in (task.levels or {}).items()}
    widest = max((task.levels or {"": int(task.weight_bits)}).values())
    config = CPQConfig(weight_bits=widest, act_bits=task.act_bits, overrides=overrides, **plain)
    changed = {**config.to_dict(), **(settings or {})}
    return Made(task.network, CPQConfig(**changed), [_quiet(), *callbacks()], patched())


def _quiet() -> CPQCallback:
    return CPQCallback(levels_file=None, table=False, samples=0)


def _calibrated(task: Task, **settings: Any) -> Made:
    """The defaults, but for ``settings``, before any training."""
    made = _cpq(task, settings, plain={})
    made.trained = False
    return made


def _dampening(strength: float) -> list[Callback]:
    return [ClusterPull(start=0.0, strength=strength, shape="cosine", scale_by_lr=True)]


def _cooling() -> list[Callback]:
    return [TemperatureSchedule(last=0.2)]


def _dropping(task: Task, **settings: Any) -> Made:
    """The top bit is dropped at times: more rarely the fewer there are, as a drop costs the more."""
    bits = int(task.weight_bits)
    first = 1 - 0.1 * (1 - 2.0 ** (1 - bits))
    return _cpq(task, {"min_bits": bits - 1, **settings}, lambda: [DropBitsSchedule(first=first)])


def _learned(
    task: Task,
    settings: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    callbacks: Callable[[], list[Callback]] = list,
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext,
    activations: bool = False,
    plain: Mapping[str, Any] = _PLAIN,
) -> Made:
    """Weights of 8 to 2 bits (to 1 where the average is 2); activations at theirs, or of that average too."""
    low = narrowest(task.weight_bits)
    options = {"weight_bits": 8, "min_bits": low, "learn_bits": True, "act_bits": task.act_bits}
    options |= {**plain, **(settings or {})}
    budgets = {"act_target": float(task.act_bits)} if activations else {}
    beside = [_quiet(), BitBudget(task.weight_bits, **budgets, **(budget or {})), *callbacks()]
    return Made(task.network, CPQConfig(**options), beside, patched())


def _median_gates() -> AbstractContextManager[Any]:
    """Gates that are not drawn: each at the median of what DropBits would draw."""

    def undrawn(shape: tuple[int, ...], seed: int, step: Tensor, key: int) -> Tensor:
        return torch.full(shape, 0.5, device=step.device)

    return patch.object(gates, "keyed_uniform", undrawn)


def _paced(factor: float) -> AbstractContextManager[Any]:
    """Logits of the gates at another learning rate."""
    return patch.object(_search, "_TOTAL_DISTANCE", _search._TOTAL_DISTANCE * factor)


_LSQ = partial(LearnedStep, least_error=True)
METHODS: dict[str, Method] = {
    FULL: Method(_full_precision, FULL),
    LSQ: Method(partial(_peer, _LSQ), LSQ),
    PULLED_LSQ: Method(partial(_peer, _LSQ, pulled=True), LSQ),
    LSQ_PLUS: Method(partial(_peer, LearnedOffset, of_weight=_LSQ), LSQ_PLUS),
    LSQ_OFFSET: Method(partial(_peer, partial(LearnedOffset, trained=False), of_weight=_LSQ), LSQ_PLUS),
    BREVITAS: Method(_brevitas, BREVITAS, package="brevitas"),
    RQ: Method(partial(_peer, Relaxed), RQ),
    ARGMAX: Method(partial(_cpq, settings={"weight_estimator": "argmax"}), ARGMAX),
    EXPECTATION: Method(_cpq, EXPECTATION),
    COOLED: Method(partial(_cpq, callbacks=_cooling), EXPECTATION),
    DROPPED: Method(_dropping, EXPECTATION),
    PULLED: Method(partial(_cpq, callbacks=lambda: [ClusterPull()]), EXPECTATION),
    LEARNED: Method(_learned, EXPECTATION),
    RELEARNED: Method(_cpq, EXPECTATION, levels=LEARNED),
    # The paper's gates, which take longer to learn.
    DRAWN: Method(partial(_learned, settings={"gate_estimator": "concrete"}, budget={"freeze": 0.8}), EXPECTATION),
    REDRAWN: Method(_cpq, EXPECTATION, levels=DRAWN),
    DEFAULTS: Method(partial(_cpq, plain={}), EXPECTATION),
    LEARNED_DEFAULTS: Method(partial(_learned, plain={}), EXPECTATION),
    RANDOM: Method(_cpq, EXPECTATION, levels="random"),
    BY_ERROR: Method(_cpq, EXPECTATION, levels="error"),
    BY_HESSIAN: Method(_cpq, EXPECTATION, levels="hessian"),
}

# One thing changed each, against a base of its own.
_PULLS = {
    f"ClusterPull from {start:g}, strength {strength:g}": partial(
        _cpq, callbacks=lambda start=start, strength=strength: [ClusterPull(start=start, strength=strength)]
    )
    for start, strength in ((0.5, 0.005), (0.85, 0.05))
}
_FIXED: dict[str, Callable[[Task], Made]] = {
    **_PULLS,
    "T 1 to 0.5": partial(_cpq, callbacks=lambda: [TemperatureSchedule()]),
    "first and last layer like all": partial(_cpq, settings={"first_last_bits": None}),
    "distilled from itself": partial(_cpq, callbacks=lambda: [DistillationCallback("self")]),
    "a step each channel": partial(_cpq, settings={"per_channel": True}),
    "inputs signed": partial(_cpq, settings={"act_grid": "signed"}),
    "inputs signed or unsigned": partial(_cpq, patched=_without_offsets),
    "balanced weights": partial(_cpq, settings={"weight_grid": "balanced"}),
    "oscillating weights frozen": partial(_cpq, callbacks=lambda: [OscillationFreezing()]),
    "dampened from early on": partial(_cpq, callbacks=partial(_dampening, 50)),
    "dampened a tenth as much": partial(_cpq, callbacks=partial(_dampening, 5)),
    "widths narrowed in stages": partial(_cpq, callbacks=lambda: [ProgressiveWidths()]),
}
_LEARNING: dict[str, Callable[[Task], Made]] = {
    "without DropBits: gates at their median": partial(_learned, patched=_median_gates),
    "freeze at 0.3": partial(_learned, budget={"freeze": 0.3}),
    "4 to 2 bits": partial(_learned, settings={"weight_bits": 4}),
    "activations too": partial(
        _learned, settings={"learn_act_bits": True, "act_bits": 8, "min_act_bits": 2}, activations=True
    ),
    "freeze at 0.8": partial(_learned, budget={"freeze": 0.8}),
    "gates at a third of the rate": partial(_learned, patched=lambda: _paced(1 / 3)),
    "gates at three times the rate": partial(_learned, patched=lambda: _paced(3)),
    "a width each channel": partial(_learned, settings={"gate_sharing": "channel"}),
    "distilled from itself": partial(_learned, callbacks=lambda: [DistillationCallback("self")]),
}


def _changed(base: str, changes: Mapping[str, Callable[[Task], Made]], family: str = EXPECTATION) -> dict[str, Method]:
    return {f"{base}: {name}": Method(make, family, base=base) for name, make in changes.items()}


AT_FIXED = {
    **_changed(EXPECTATION, _FIXED),
    **_changed(
        DROPPED, {f"gates by {sharing}": partial(_dropping, gate_sharing=sharing) for sharing in ("channel", "element")}
    ),
    **_changed(
        ARGMAX,
        {
            "on activations too": partial(_cpq, settings={"weight_estimator": "argmax", "act_estimator": "argmax"}),
            "balanced weights": partial(_cpq, settings={"weight_estimator": "argmax", "weight_grid": "balanced"}),
        },
        ARGMAX,
    ),
}
NARROW = f"{LEARNED}: 4 to 2 bits"
AT_LEARNED = {
    **_changed(LEARNED, _LEARNING),
    **_changed(NARROW, {"nested by range": partial(_learned, settings={"weight_bits": 4, "nesting": "range"})}),
}
# Before training, each against the defaults.
BEFORE = {
    CALIBRATED: Method(_calibrated, ""),
    **_changed(
        CALIBRATED,
        {
            "balanced weights": partial(_calibrated, weight_grid="balanced"),
            "a step each tensor": partial(_calibrated, per_channel=False),
            "inputs signed": partial(_calibrated, act_grid="signed"),
        },
        family="",
    ),
}
# Those that ask for widths, or activations, that an average of 2 bits at A8 does not leave.
AT_THREE_BITS = (NARROW, f"{NARROW}: nested by range", f"{LEARNED}: activations too")
UNDRAWN, EARLIER = f"{LEARNED}: without DropBits: gates at their median", f"{LEARNED}: freeze at 0.3"
METHODS |= {**AT_FIXED, **AT_LEARNED, **BEFORE}
