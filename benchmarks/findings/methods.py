"""The methods: how each makes a quantized network of the shared start, and what runs beside its training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor, nn

from benchmarks.findings.allocation import Levels
from benchmarks.findings.peers import Bits, LearnedStep, Make, replace_layers
from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach import quantizable_layers
from cpq_lightning.callbacks import BitBudget, DropBitsSchedule, TemperatureSchedule

FULL, LSQ, BREVITAS, RQ = "full precision", "LSQ", "Brevitas", "RQ, Gumbel-softmax"
ARGMAX, EXPECTATION = "CPQ argmax", "CPQ expectation"
COOLED, DROPPED = "CPQ expectation, T 1 to 0.2", "CPQ expectation, DropBits"
COOLED_DROPPED = "CPQ expectation, T 1 to 0.2, DropBits"
LEARNED, RELEARNED = "learned levels", "learned levels from the start"
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
    """

    network: nn.Module
    config: CPQConfig | None = None
    callbacks: list[Callback] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        make: Makes what trains.
        family: The method whose searched learning rate it takes.
        levels: Where the widths come from that it is given, if it is.
        package: What it needs beyond the project's own packages.
    """

    make: Callable[[Task], Made]
    family: str
    levels: str = ""
    package: str = ""

    @property
    def missing(self) -> str:
        """What to install before it can run here; empty if it can."""
        if not self.package or importlib.util.find_spec(self.package) is not None:
            return ""
        return f"pip install -e '.[bench-findings,bench-{self.package}]', in an environment of its own"


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
    inner, bits = inner_layers(task.network), {}
    for name in quantizable_layers(task.network):
        weight = (task.levels or {}).get(name, int(task.weight_bits))
        bits[name] = Bits(weight, task.act_bits) if name in inner else Bits(END_BITS, END_BITS)
    return bits


def _full_precision(task: Task) -> Made:
    return Made(task.network)


def _peer(load: Callable[[], Make], task: Task) -> Made:
    return Made(replace_layers(task.network, layer_bits(task), task.images, load()))


def _relaxed() -> Make:
    from benchmarks.findings.relaxed import Relaxed

    return Relaxed


def _brevitas(task: Task) -> Made:
    from benchmarks.findings.brevitas_layers import replace

    return Made(replace(task.network, layer_bits(task), task.images))


def _cpq(task: Task, settings: Mapping[str, Any] | None = None, callbacks: Callable[[], list[Callback]] = list) -> Made:
    """CPQ at fixed widths, of all layers alike or given."""
    overrides = {name: {"weight_bits": bits} for name, bits in (task.levels or {}).items()}
    widest = max((task.levels or {"": int(task.weight_bits)}).values())
    config = CPQConfig(weight_bits=widest, act_bits=task.act_bits, overrides=overrides)
    changed = {**config.to_dict(), **(settings or {})}
    return Made(task.network, CPQConfig(**changed), [_quiet(), *callbacks()])


def _quiet() -> CPQCallback:
    return CPQCallback(levels_file=None, table=False, samples=0)


def _cooling() -> list[Callback]:
    return [TemperatureSchedule(last=0.2)]


def _dropping(task: Task, cooled: bool = False, **settings: Any) -> Made:
    """The top bit is dropped at times: more rarely the fewer there are, as a drop costs the more."""
    bits = int(task.weight_bits)
    first = 1 - 0.1 * (1 - 2.0 ** (1 - bits))
    callbacks = [DropBitsSchedule(first=first), *(_cooling() if cooled else [])]
    return _cpq(task, {"min_bits": bits - 1, **settings}, lambda: callbacks)


def _learned(
    task: Task,
    settings: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    callbacks: Callable[[], list[Callback]] = list,
) -> Made:
    """Weights of 8 to 2 bits, under a budget."""
    own = {"weight_bits": 8, "min_bits": 2, "learn_bits": True, "act_bits": task.act_bits, **(settings or {})}
    return Made(task.network, CPQConfig(**own), [_quiet(), BitBudget(task.weight_bits, **(budget or {})), *callbacks()])


METHODS: dict[str, Method] = {
    FULL: Method(_full_precision, FULL),
    LSQ: Method(partial(_peer, lambda: LearnedStep), LSQ),
    BREVITAS: Method(_brevitas, BREVITAS, package="brevitas"),
    RQ: Method(partial(_peer, _relaxed), RQ),
    ARGMAX: Method(partial(_cpq, settings={"weight_estimator": "argmax"}), ARGMAX),
    EXPECTATION: Method(_cpq, EXPECTATION),
    COOLED: Method(partial(_cpq, callbacks=_cooling), EXPECTATION),
    DROPPED: Method(_dropping, EXPECTATION),
    COOLED_DROPPED: Method(partial(_dropping, cooled=True), EXPECTATION),
    LEARNED: Method(_learned, EXPECTATION),
    RELEARNED: Method(_cpq, EXPECTATION, levels="learned"),
    RANDOM: Method(_cpq, EXPECTATION, levels="random"),
    BY_ERROR: Method(_cpq, EXPECTATION, levels="error"),
    BY_HESSIAN: Method(_cpq, EXPECTATION, levels="hessian"),
}
