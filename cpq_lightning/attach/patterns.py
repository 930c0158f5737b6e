"""Which layers the patterns of a config mean, and what they give to layers that share a weight."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from cpq_lightning.attach.class_switch import Switched
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.config import WEIGHT_SETTINGS, CPQConfig

# All names of each module: one that is registered several times has several.
Names = Mapping[nn.Module, tuple[str, ...]]


def names_of(model: nn.Module) -> Names:
    """The dotted names of each module of a model, in the order of registration."""
    found: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):
        found[module] = (*found.get(module, ()), name)
    return found


def matches(name: str, layer: nn.Module, pattern: str) -> bool:
    """Whether a pattern of ``ignore`` or ``overrides`` means a layer: by its dotted name, or by one of its types."""
    if fnmatchcase(name, pattern):
        return True
    base = layer.base_class if isinstance(layer, Switched) else type(layer)
    return any(pattern in _type_names(cls) for cls in base.__mro__ if issubclass(cls, nn.Module))


def _type_names(cls: type[nn.Module]) -> set[str]:
    return {cls.__name__, f"{cls.__module__}.{cls.__qualname__}", f"torch.nn.{cls.__name__}"} - {"Module"}


def _means(pattern: str, layer: nn.Module, names: Names) -> bool:
    return any(matches(name, layer, pattern) for name in names[layer])


def is_ignored(layer: nn.Module, names: Names, config: CPQConfig) -> bool:
    """Whether a config leaves a layer in full precision."""
    return any(_means(pattern, layer, names) for pattern in config.ignore)


def own_overrides(layer: nn.Module, names: Names, config: CPQConfig) -> dict[str, Any]:
    """What ``overrides`` says of one layer; of several patterns that match, the last wins, setting by setting."""
    merged: dict[str, Any] = {}
    for pattern, settings in config.overrides.items():
        if _means(pattern, layer, names):
            merged |= settings
    return merged


def overrides_of(
    layers: Mapping[str, nn.Module], names: Names, config: CPQConfig, weight_of: Callable[[nn.Module], object]
) -> dict[str, dict[str, Any]]:
    """What ``overrides`` says of each layer, by name. What it says of a weight holds in all layers that share it.

    Args:
        layers: The layers, by name.
        names: All names of the model's modules.
        config: What has the overrides.
        weight_of: The same object for layers that share a weight.

    Raises:
        ValueError: it gives layers that share a weight different settings of it.
    """
    found = {name: own_overrides(layer, names, config) for name, layer in layers.items()}
    for shared in shared_by(layers, weight_of):
        agreed: dict[str, Any] = {}
        said_by: dict[str, str] = {}
        for name in shared:
            for key, value in found[name].items():
                if key not in WEIGHT_SETTINGS:
                    continue
                first = said_by.setdefault(key, name)
                if agreed.setdefault(key, value) != value:
                    raise ValueError(
                        f"overrides: the layers {first!r} and {name!r} share one weight, which has one quantizer, and "
                        f"{first!r} is given {key}={agreed[key]!r}, {name!r} {key}={value!r}. Give both the same (what "
                        "one of them alone is given holds for both), or give each layer a weight of its own."
                    )
        for name in shared:
            found[name] |= agreed
    return found


def shared_by(layers: Mapping[str, nn.Module], weight_of: Callable[[nn.Module], object]) -> list[list[str]]:
    """The names of layers that share a weight, for each weight that is shared."""
    users: dict[int, list[str]] = {}
    for name, layer in layers.items():
        users.setdefault(id(weight_of(layer)), []).append(name)
    return [shared for shared in users.values() if len(shared) > 1]


def check_patterns(
    layers: Mapping[str, nn.Module], names: Names, config: CPQConfig, tied: Mapping[str, nn.Module]
) -> None:
    """Refuse patterns that mean no layer; those of ``ignore`` may mean modules that are ``tied`` to a layer's weight.

    Raises:
        ValueError: with what there is.
    """
    for argument, patterns in (("ignore", config.ignore), ("overrides", tuple(config.overrides))):
        meant = {**layers, **tied} if argument == "ignore" else layers
        for pattern in patterns:
            if not any(_means(pattern, layer, names) for layer in meant.values()):
                known = [name for layer in layers.values() for name in names[layer]]
                types = {type(layer).__name__ for layer in layers.values()}
                hint = _hint(len(layers), known, types, pattern)
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no layer. {hint}")


def _hint(count: int, names: list[str], types: set[str], pattern: str) -> str:
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"It names a module with layers inside: write {pattern + '.*'!r}."
    near = difflib.get_close_matches(pattern, [*names, *types], n=3, cutoff=0.5) or names[:3]
    return f"There are {count} layers, for example {near}."
