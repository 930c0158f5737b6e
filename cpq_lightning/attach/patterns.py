"""The layers that patterns of a config match, and the settings of layers that share a weight."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from cpq_lightning.attach.class_switch import Switched
from cpq_lightning.attach.decomposed import ParameterLayer, owner_of
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.config import WEIGHT_SETTINGS, CPQConfig

# All names of each module; a module that is registered several times has several names.
Names = Mapping[nn.Module, tuple[str, ...]]


def names_of(model: nn.Module) -> Names:
    """The dotted names of each module of a model, in the order of registration."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def matches(name: str, layer: nn.Module, pattern: str) -> bool:
    """Whether a pattern of ``ignore`` or ``overrides`` matches a layer, by its dotted name or by one of its types.

    A layer of a decomposed module, such as ``nn.LSTM``, is matched by patterns for that module too, and a layer that is
    a Parameter by patterns for the Parameter.
    """
    if fnmatchcase(name, pattern):
        return True
    if isinstance(layer, ParameterLayer) and fnmatchcase(_parameter_name(name, layer), pattern):
        return True
    owner = owner_of(layer)
    if owner is not None and matches(name.rpartition(".")[0], owner, pattern):
        return True
    base: type[nn.Module] = type(layer)
    while issubclass(base, Switched):
        base = base.base_class
    # A layer of a decomposed module is no nn.Linear to a user.
    kind = ParameterLayer if issubclass(base, ParameterLayer) else nn.Module
    return any(pattern in _type_names(cls) for cls in base.__mro__ if issubclass(cls, kind))


def _parameter_name(name: str, layer: ParameterLayer) -> str:
    return f"{name.rpartition('.')[0]}.{layer.part.weight}".lstrip(".")


def _type_names(cls: type[nn.Module]) -> set[str]:
    return {cls.__name__, f"{cls.__module__}.{cls.__qualname__}", f"torch.nn.{cls.__name__}"} - {"Module"}


def _matches_any_name(pattern: str, layer: nn.Module, names: Names) -> bool:
    return any(matches(name, layer, pattern) for name in names[layer])


def is_ignored(layer: nn.Module, names: Names, config: CPQConfig) -> bool:
    """Whether a config leaves a layer in full precision."""
    return any(_matches_any_name(pattern, layer, names) for pattern in config.ignore)


def layer_overrides(layer: nn.Module, names: Names, config: CPQConfig) -> dict[str, Any]:
    """The ``overrides`` of one layer; if several patterns match, the last one wins for each setting."""
    merged: dict[str, Any] = {}
    for pattern, settings in config.overrides.items():
        if _matches_any_name(pattern, layer, names):
            merged |= settings
    return merged


def overrides_of(
    layers: Mapping[str, nn.Module], names: Names, config: CPQConfig, weight_of: Callable[[nn.Module], object]
) -> dict[str, dict[str, Any]]:
    """The ``overrides`` of each layer, by name; overrides of a weight apply to all layers that share it.

    Args:
        layers: The layers, by name.
        names: All names of the model's modules.
        config: The config with the overrides.
        weight_of: A function that returns the same object for layers that share a weight.

    Raises:
        ValueError: layers that share a weight get different settings for it.
    """
    overrides = {name: layer_overrides(layer, names, config) for name, layer in layers.items()}
    for shared in shared_by(layers, weight_of):
        agreed: dict[str, Any] = {}
        set_by: dict[str, str] = {}
        for name in shared:
            for key, value in overrides[name].items():
                if key not in WEIGHT_SETTINGS:
                    continue
                first = set_by.setdefault(key, name)
                if agreed.setdefault(key, value) != value:
                    raise ValueError(
                        f"overrides: the layers {first!r} and {name!r} share one weight, which has one quantizer, and "
                        f"{first!r} is given {key}={agreed[key]!r}, {name!r} {key}={value!r}. Give both the same (a "
                        "setting of one of them applies to both), or give each layer a separate weight."
                    )
        for name in shared:
            overrides[name] |= agreed
    return overrides


def shared_by(layers: Mapping[str, nn.Module], weight_of: Callable[[nn.Module], object]) -> list[list[str]]:
    """The names of layers that share a weight, for each weight that is shared."""
    users: dict[int, list[str]] = {}
    for name, layer in layers.items():
        users.setdefault(id(weight_of(layer)), []).append(name)
    return [shared for shared in users.values() if len(shared) > 1]


def check_patterns(
    layers: Mapping[str, nn.Module], names: Names, config: CPQConfig, tied: Mapping[str, nn.Module]
) -> None:
    """Refuse patterns that match no layer; patterns of ``ignore`` may match modules ``tied`` to a layer's weight.

    Raises:
        ValueError: with a hint of existing names.
    """
    for argument, patterns in (("ignore", config.ignore), ("overrides", tuple(config.overrides))):
        candidates = {**layers, **tied} if argument == "ignore" else layers
        for pattern in patterns:
            if not any(_matches_any_name(pattern, layer, names) for layer in candidates.values()):
                known = [name for layer in layers.values() for name in names[layer]]
                types = {type(layer).__name__ for layer in layers.values()}
                hint = _hint(len(layers), known, types, pattern)
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no layer. {hint}")


def _hint(count: int, names: list[str], types: set[str], pattern: str) -> str:
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"It names a module with layers inside: write {pattern + '.*'!r}."
    near = difflib.get_close_matches(pattern, [*names, *types], n=3, cutoff=0.5) or names[:3]
    return f"There are {count} layers, for example {near}."
