"""What quantized layers record about the model that was attached, and layers that were added after attach.

Fusing, re-parameterizing and replacing layers put plain layers where quantized ones were, and may build a new model
around the remaining layers. Therefore each layer records its name in the attached model, and the model's config.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from cpq_lightning.attach.class_switch import Switched
from cpq_lightning.attach.decompose import decomposable
from cpq_lightning.attach.decomposed import Decomposed, whole_parameter
from cpq_lightning.attach.layers import ORIGIN, QuantizedLayer, quantized_layers
from cpq_lightning.attach.patterns import matches
from cpq_lightning.attach.timm_layers import holds_weight, looks_up
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class Origin(NamedTuple):
    """What a quantized layer records about the model in which it was quantized.

    Attributes:
        name: The layer's name in that model.
        config: The config of that model; ``None`` if the quantizers came from a ``state_dict``.
        plain: If the config is not known: names of that model's full-precision layers.
    """

    name: str
    config: CPQConfig | None
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FullPrecision:
    """A layer whose weight is not quantized, although the config does not leave it out.

    Attributes:
        name: Dotted name.
        type: Name of its class.
        numel: Number of elements of its weights.
        late: Whether it was added after attach, which would have quantized it; else this type cannot be quantized.
    """

    name: str
    type: str
    numel: int
    late: bool

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({self.type})"


def set_attached_config(model: nn.Module, config: CPQConfig | Mapping[str, Any]) -> None:
    """Record the config that a model was attached with."""
    config = CPQConfig.of(config)
    for name, layer in quantized_layers(model):
        set_origin(layer, Origin(name, config))


def set_origin(layer: nn.Module, origin: Origin) -> None:
    """Record the origin of a quantized layer."""
    layer.__dict__[ORIGIN] = origin


def attached_config(model: nn.Module) -> CPQConfig | None:
    """The config that this model was attached with; ``None`` if only a part of it, or a larger model, was attached, if
    nothing is quantized, or if the quantizers came from a ``state_dict``.
    """
    origins = [(name, layer.__dict__.get(ORIGIN)) for name, layer in quantized_layers(model)]
    configs = [
        origin.config
        for name, origin in origins
        if origin is not None and _without_wrappers(origin.name) == _without_wrappers(name)
    ]
    return configs[0] if configs and all(config == configs[0] for config in configs) else None


def quantizable_layers(model: nn.Module, embeddings: bool = False) -> dict[str, nn.Module]:
    """Convolutions (also transposed and conditional ones) and linear layers that have a weight, by name; layers inside
    of torchmetrics metrics are left out.

    Args:
        model: The model.
        embeddings: Whether embeddings count too, except those that share the weight of another layer.
    """
    modules = dict(without_metrics(model))
    layers = {name: module for name, module in modules.items() if holds_weight(module)}
    if not embeddings:
        return layers
    weights = {id(whole_parameter(layer)) for layer in layers.values()}
    return {n: m for n, m in modules.items() if n in layers or (looks_up(m) and id(m.weight) not in weights)}


def late_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of an attached model that are not quantized although its config selects them, by name; also modules such
    as recurrent ones, that the config would have decomposed.
    """
    scopes = _Scopes(model)
    layers = quantizable_layers(model, embeddings=True)
    plain = {name: m for name, m in layers.items() if not isinstance(m, QuantizedLayer)}
    late = {name: module for name, module in plain.items() if not scopes.leaves_out(name, module)}
    for name, module, _, parts in decomposable(unwrapped(model)):
        if not all(scopes.leaves_out(f"{name}.{part}".lstrip("."), module) for part in parts):
            late[name] = module
    return late


def full_precision_layers(model: nn.Module) -> list[FullPrecision]:
    """Layers whose weight is not quantized although the config does not leave them out, in registration order.

    If only a part of the model was attached, these are layers of that part.
    """
    scopes, late = _Scopes(model), late_layers(model)
    layers = []
    for name, module in without_metrics(model):
        weights = _other_weights(module)
        if name in late or (weights and not scopes.leaves_out(name, module)):
            numel = sum(p.numel() for n, p in module.named_parameters(recurse=False) if "bias" not in n)
            base = module.base_class if isinstance(module, Switched) else type(module)
            layers.append(FullPrecision(name, base.__name__, numel, name in late))
    return layers


def late_message(model: nn.Module, late: Mapping[str, object]) -> str:
    """A message that describes :func:`late_layers`, and what to do."""
    return (
        f"{len(late)} layers of {type(unwrapped(model)).__name__} are in full precision, though its config would "
        f"quantize them: {', '.join(late)}. They were added after attach, as by re-parameterizing, fusing or replacing "
        "layers, or were detached. Do that before attach; or call attach(model, config) again, which quantizes only "
        "the new layers, and calibrate or train; or leave them out: attach(model, config) with their names in "
        "ignore."
    )


def without_metrics(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with their names, except those inside of torchmetrics metrics."""
    metrics: list[str] = []
    # A model with a metric has imported torchmetrics; the import is slow, so other models avoid it.
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", ())
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, metric):
            metrics.append(f"{name}.")
        elif not any(name.startswith(prefix) for prefix in metrics):
            yield name, module


def _other_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weight matrices of a module that is not quantized, as of a class of one's own or of attention with its own
    forward.
    """
    if isinstance(module, Decomposed):
        return []
    looked_up = isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower()
    if looked_up or holds_weight(module) or any(isinstance(child, Quantizer) for child in module.children()):
        return []
    parameters = module.named_parameters(recurse=False)
    return [p for name, p in parameters if "weight" in name and p.dim() > 1 and p.is_floating_point()]


class _Scopes:
    """The parts of a model that were attached, each with its config, and the names of its layers in the part."""

    def __init__(self, model: nn.Module) -> None:
        self._origins: dict[tuple[str, str], Origin] = {}
        votes: Counter[tuple[str, str]] = Counter()
        for name, layer in quantized_layers(model):
            origin = layer.__dict__.get(ORIGIN)
            if origin is not None:
                scope = _prefixes(_without_wrappers(name), _without_wrappers(origin.name))
                votes[scope] += 1
                self._origins.setdefault(scope, origin)
        self._prefix_pairs = [scope for scope, _ in votes.most_common()]

    def leaves_out(self, name: str, module: nn.Module) -> bool:
        """Whether a layer was meant to stay in full precision, or belongs to no attached part."""
        name = _without_wrappers(name)
        scope = next((scope for scope in self._prefix_pairs if name.startswith(scope[0])), None)
        if scope is None:
            return True
        origin, original = self._origins[scope], scope[1] + name[len(scope[0]) :]
        if origin.config is None:
            return original in origin.plain
        if looks_up(module) and not origin.config.embeddings:
            return True
        return any(matches(original, module, pattern) for pattern in origin.config.ignore)


def _without_wrappers(name: str) -> str:
    """A name without the wrappers that are added later to compile or checkpoint modules."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(current: str, original: str) -> tuple[str, str]:
    """What remains of two names of one layer after removing their longest common ending."""
    left, right = current.split("."), original.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return tuple(f"{'.'.join(parts)}." if parts else "" for parts in (left, right))  # type: ignore[return-value]
