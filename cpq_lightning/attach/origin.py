"""What quantized layers remember of the model that they were quantized in; so, which layers have come behind attach.

Fusing, re-parameterizing and replacing leave plain layers where quantized ones were, and may build the model anew
around those that are left. So it is each layer that remembers how it was called, and by which config.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from cpq_lightning.attach.class_switch import Switched
from cpq_lightning.attach.layers import ORIGIN, QuantizedLayer, quantized_layers
from cpq_lightning.attach.patterns import matches
from cpq_lightning.attach.timm_layers import holds_weight
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class Origin(NamedTuple):
    """What a quantized layer remembers of the model that it was quantized in.

    Attributes:
        name: Its name there.
        config: What was quantized there, and how; ``None`` where the quantizers came with a ``state_dict``.
        plain: Names of the layers that were in full precision there, where the config is not known.
    """

    name: str
    config: CPQConfig | None
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FullPrecision:
    """A layer with a weight that is not quantized, and that nobody has asked to leave out.

    Attributes:
        name: Dotted name.
        type: Of its class.
        numel: Elements of its weights.
        late: Whether it came behind attach, which would have quantized it; else nothing quantizes such a layer.
    """

    name: str
    type: str
    numel: int
    late: bool

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({self.type})"


def set_attached_config(model: nn.Module, config: CPQConfig | Mapping[str, Any]) -> None:
    """Note what a model was attached with."""
    config = CPQConfig.of(config)
    for name, layer in quantized_layers(model):
        set_origin(layer, Origin(name, config))


def set_origin(layer: nn.Module, origin: Origin) -> None:
    """Let a quantized layer remember."""
    layer.__dict__[ORIGIN] = origin


def attached_config(model: nn.Module) -> CPQConfig | None:
    """The config that the model itself was attached with; ``None`` where only a part of it was, it is a part itself,
    nothing is quantized, or the quantizers came with a ``state_dict``.
    """
    origins = [(name, layer.__dict__.get(ORIGIN)) for name, layer in quantized_layers(model)]
    found = [origin.config for name, origin in origins if origin is not None and _own(origin.name) == _own(name)]
    return found[0] if found and all(config == found[0] for config in found) else None


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions (transposed and conditional ones too) and linear layers with a weight of their own, by name; metrics
    left out.
    """
    return {name: module for name, module in _without_metrics(model) if holds_weight(module)}


def late_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of an attached model that are not quantized, though its config selects them, by name."""
    scopes = _Scopes(model)
    plain = {name: m for name, m in quantizable_layers(model).items() if not isinstance(m, QuantizedLayer)}
    return {name: module for name, module in plain.items() if not scopes.leaves_out(name, module)}


def full_precision_layers(model: nn.Module) -> list[FullPrecision]:
    """Layers with a weight that is not quantized, and that nobody has asked to leave out, in registration order.

    Of a model of which a part was attached they are those of that part.
    """
    scopes, late = _Scopes(model), late_layers(model)
    found = []
    for name, module in _without_metrics(model):
        weights = _other_weights(module)
        if name in late or (weights and not scopes.leaves_out(name, module)):
            numel = sum(p.numel() for n, p in module.named_parameters(recurse=False) if "bias" not in n)
            base = module.base_class if isinstance(module, Switched) else type(module)
            found.append(FullPrecision(name, base.__name__, numel, name in late))
    return found


def late_message(model: nn.Module, late: Mapping[str, object]) -> str:
    """What is wrong with :func:`late_layers`, and what to do."""
    return (
        f"{len(late)} layers of {type(unwrapped(model)).__name__} are in full precision, though its config would "
        f"quantize them: {', '.join(late)}. They came behind attach, as re-parameterizing, fusing or replacing layers "
        "brings them, or were detached. Do that before attach; or call attach(model, config) again, which quantizes "
        "the new ones alone, and calibrate or train; or leave them out: attach(model, config) with their names in "
        "ignore."
    )


def _without_metrics(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    metrics: list[str] = []
    # Who has one has imported it, and all others need not wait for that.
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", ())
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, metric):
            metrics.append(f"{name}.")
        elif not any(name.startswith(prefix) for prefix in metrics):
            yield name, module


def _other_weights(module: nn.Module) -> list[nn.Parameter]:
    """Matrices of weights in a module that is no layer to quantize: of recurrent ones, of torch's own attention."""
    looked_up = isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower()
    if looked_up or holds_weight(module) or any(isinstance(child, Quantizer) for child in module.children()):
        return []
    own = module.named_parameters(recurse=False)
    return [p for name, p in own if "weight" in name and p.dim() > 1 and p.is_floating_point()]


class _Scopes:
    """Where in a model which config holds, and by which names its layers were called there."""

    def __init__(self, model: nn.Module) -> None:
        self._origins: dict[tuple[str, str], Origin] = {}
        votes: Counter[tuple[str, str]] = Counter()
        for name, layer in quantized_layers(model):
            origin = layer.__dict__.get(ORIGIN)
            if origin is not None:
                place = _prefixes(_own(name), _own(origin.name))
                votes[place] += 1
                self._origins.setdefault(place, origin)
        self._places = [place for place, _ in votes.most_common()]

    def leaves_out(self, name: str, module: nn.Module) -> bool:
        """Whether a layer was to be left in full precision, or nothing is known of it."""
        name = _own(name)
        place = next((place for place in self._places if name.startswith(place[0])), None)
        if place is None:
            return True
        origin, there = self._origins[place], place[1] + name[len(place[0]) :]
        if origin.config is None:
            return there in origin.plain
        return any(matches(there, module, pattern) for pattern in origin.config.ignore)


def _own(name: str) -> str:
    """A name without what is put around modules later, to compile or to checkpoint them."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(here: str, there: str) -> tuple[str, str]:
    """What is in front of two names of one layer, behind which they are the same."""
    ours, theirs = here.split("."), there.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return tuple(f"{'.'.join(parts)}." if parts else "" for parts in (ours, theirs))  # type: ignore[return-value]
