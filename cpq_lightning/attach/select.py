"""Which layers are quantized, and with which settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from cpq_lightning.attach.decomposed import owner_of
from cpq_lightning.attach.levels_file import at_read_widths, read_weight_widths
from cpq_lightning.attach.origin import quantizable_layers
from cpq_lightning.attach.parametrized import weight_now
from cpq_lightning.attach.patterns import check_patterns, is_ignored, layer_overrides, names_of, overrides_of, shared_by
from cpq_lightning.attach.products import operand_names, operand_path
from cpq_lightning.attach.timm_layers import looks_up, shared_weight, weight_parameters
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.sharding import full_tensor


@dataclass(frozen=True)
class Site:
    """One layer to quantize: its dotted name, its settings, whether it is the first or last layer, and the settings
    that it has if it is not.
    """

    name: str
    layer: nn.Module
    config: CPQConfig
    first_or_last: bool
    inner: CPQConfig

    @property
    def channel_dim(self) -> int:
        """Dimension of the weight that holds the output channels; the experts of a conditional convolution."""
        return 1 if isinstance(self.layer, _ConvTransposeNd) else 0

    @property
    def group_inputs(self) -> int:
        """Inputs that ``group_size`` divides into groups: those of a linear layer; 0 for a convolution."""
        weight = weight_now(self.layer)
        return weight.shape[1] if isinstance(self.layer, nn.Linear) and weight.dim() == 2 else 0


def select(
    model: nn.Module,
    config: CPQConfig,
    products: Mapping[str, Sequence[bool]] | None = None,
    tied: Mapping[str, nn.Module] | None = None,
    checked: bool = True,
) -> list[Site]:
    """List the layers of a model that a config quantizes, in registration order; the model is not changed.

    Layers that are quantized already are included. Patterns may also match modules whose ``products`` are quantized;
    patterns of ``ignore`` may also match modules that are ``tied`` to a layer's weight.

    Args:
        model: Any module.
        config: The config.
        products: Plans of the products to quantize, by module name.
        tied: Modules that share a layer's weight, and layers that were left out already, by name.
        checked: Whether each pattern must match something.

    Raises:
        ValueError: there is no layer to quantize, a pattern matches no layer, layers that share a weight get different
            settings for it, a layer is not initialized yet, or weights are not finite.
    """
    layers = quantizable_layers(model, config.embeddings)
    if not layers:
        raise ValueError(
            f"The model {type(model).__name__} has no layer to quantize: expected convolutions or linear layers with a "
            "weight. Layers made in configure_model must exist before they can be quantized."
        )
    products = products or {}
    names = names_of(model)
    if checked:
        multiplying = {name: model.get_submodule(name) for name in products}
        left = {layer: (name,) for name, layer in (tied or {}).items()}
        check_patterns({**layers, **multiplying}, {**left, **names}, config, tied or {})
    chosen = {name: layer for name, layer in layers.items() if not is_ignored(layer, names, config)}
    if not chosen:
        raise ValueError(f"ignore={list(config.ignore)} leaves no layer to quantize: it matches all {len(layers)}.")
    for name, layer in chosen.items():
        _check_weight(name, layer)
    _check_shared(layers, chosen, config)
    overrides = overrides_of(chosen, names, config, shared_weight)
    first_last = first_and_last(model, list(chosen)) if config.first_last_bits is not None else set()
    sites = []
    for name, layer in chosen.items():
        settings, first_or_last = layer_settings(name, overrides[name], config, name in first_last)
        inner, _ = layer_settings(name, overrides[name], config, at_end=False)
        if looks_up(layer):
            settings, inner = _weight_only(settings), _weight_only(inner)
        sites.append(Site(name, layer, settings, first_or_last, inner))
    return sites


def _weight_only(settings: CPQConfig) -> CPQConfig:
    return dataclasses.replace(settings, act_bits=None, learn_act_bits=False)


def chosen_operands(
    model: nn.Module, products: Mapping[str, Sequence[bool]], config: CPQConfig
) -> dict[str, dict[str, CPQConfig]]:
    """The settings of each operand of the planned products that a config quantizes, by module and operand."""
    names = names_of(model)
    chosen: dict[str, dict[str, CPQConfig]] = {}
    for name, plan in products.items():
        module = model.get_submodule(name)
        settings, _ = layer_settings(name, layer_overrides(module, names, config), config, at_end=False)
        if settings.act_bits is None or is_ignored(module, names, config):
            continue
        chosen[name] = {}
        for operand in operand_names(plan):
            path = operand_path(name, operand)
            chosen[name][operand] = at_read_widths(settings, config, path)
            if chosen[name][operand].act_bits is None:
                raise ValueError(
                    f"levels_from has no width for the operand {path!r}: leave its module out with ignore."
                )
    return chosen


def layer_settings(name: str, overrides: Mapping[str, Any], config: CPQConfig, at_end: bool) -> tuple[CPQConfig, bool]:
    """Settings of one layer, and whether it gets ``first_last_bits``: as first or last layer without its own width."""
    first_or_last = at_end and config.first_last_bits is not None and "weight_bits" not in overrides
    if first_or_last:
        # A min_bits in overrides does not make a first or last layer drop bits.
        overrides = {key: value for key, value in overrides.items() if key != "min_bits"}
    settings = (config.for_first_or_last() if at_end else config).for_layer(overrides)
    return at_read_widths(settings, config, name), first_or_last


def check_same_settings(model: nn.Module, layers: Mapping[str, nn.Module], known: CPQConfig, config: CPQConfig) -> None:
    """Refuse a config that changes the settings of layers that are quantized already.

    Raises:
        ValueError: names the settings, or a layer.
    """
    current, requested = known.to_dict(), config.to_dict()
    different = {name for name in current if current[name] != requested[name]} - {"ignore", "overrides"}
    names = names_of(model)

    def settings(of: CPQConfig) -> dict[str, CPQConfig]:
        overrides = overrides_of(layers, names, of, shared_weight)
        configs = {name: layer_settings(name, overrides[name], of, at_end=False)[0] for name in layers}
        return {name: dataclasses.replace(layer_config, ignore=()) for name, layer_config in configs.items()}

    before, after = settings(known), settings(config)
    changed = [n for n, layer in layers.items() if is_ignored(layer, names, config) or before[n] != after[n]]
    if different or changed:
        what = [f"{name} {requested[name]!r} instead of {current[name]!r}" for name in sorted(different)]
        raise ValueError(
            f"{', '.join(what) or 'ignore or overrides'} would change what is quantized already, such as "
            f"{next(iter(changed), next(iter(layers)))!r}: give new layers their settings in overrides, or call "
            "detach(model) first to quantize the full model again."
        )


def _check_shared(layers: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module], config: CPQConfig) -> None:
    """Refuse a shared weight that is quantized in some of its layers only, or at different widths."""
    for shared in shared_by(layers, shared_weight):
        left_out = [name for name in shared if name not in chosen]
        quantized = [name for name in shared if name in chosen]
        if left_out and quantized:
            raise ValueError(
                f"ignore: the layers {left_out[0]!r} and {quantized[0]!r} share one weight, and {left_out[0]!r} alone "
                "is left out: the weight would be quantized in one and in full precision in the other. Leave out both "
                "or neither, or give each layer a separate weight."
            )
        widths = {name: read_weight_widths(config, name) for name in quantized}
        for name in quantized[1:]:
            if widths[name] != widths[quantized[0]]:
                raise ValueError(
                    f"levels_from: the layers {quantized[0]!r} and {name!r} share one weight, and have the widths "
                    f"{widths[quantized[0]]} and {widths[name]} in it: give them the same."
                )


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = weight_now(layer)
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"The embedding {name!r} has max_norm={layer.max_norm:g}: a forward rewrites rows of its weight, "
            "also while it is quantized: leave it out with ignore, or disable max_norm."
        )
    if isinstance(weight, UninitializedParameter):
        raise ValueError(f"Layer {name!r} is lazy and not initialized yet: run one forward of the model first.")
    finite = weight.new_ones(1) if weight.is_meta else full_tensor(weight.detach()).isfinite()
    if not weight.is_meta and not finite.all():
        bad = int((~finite).sum())
        raise ValueError(
            f"The weight of layer {name!r} has {bad} NaN or infinite of {weight.numel()} values: no scale can be "
            "fitted to it. Load finite weights, or leave the layer out with ignore."
        )


def first_and_last(model: nn.Module, names: list[str], called: list[str] | None = None) -> set[str]:
    """Names of the first and last layer: by timm's ``default_cfg``, else by execution order, else by registration.

    The set also has the last layer that trains, and layers that share a weight with one of these.
    """
    # An embedding multiplies nothing.
    names, called = ([n for n in given or () if not looks_up(model.get_submodule(n))] for given in (names, called))
    if not names:
        return set()
    timm_first, timm_last = timm_first_and_last(model, names)
    execution_order = called or names
    weights = {name: shared_weight(model.get_submodule(name)) for name in names}
    # If a teacher runs after the network that trains, the network's last layer is still a last layer.
    trained = [
        name for name in execution_order if any(p.requires_grad for p in weight_parameters(model.get_submodule(name)))
    ]
    first_last = (timm_first or {execution_order[0]}) | (timm_last or {execution_order[-1], *trained[-1:]})
    for name in list(first_last):
        owner = owner_of(model.get_submodule(name))
        if owner is not None:
            first_last |= {
                f"{name.rpartition('.')[0]}.{other}".lstrip(".") for other in owner.beside(name.rpartition(".")[2])
            }
    # Layers that share a weight share its width.
    shared = {id(weights[name]) for name in first_last if name in weights}
    return {name for name in names if id(weights[name]) in shared}


def timm_first_and_last(model: nn.Module, names: list[str]) -> tuple[set[str], set[str]]:
    """First and last layers among ``names`` by timm's ``default_cfg``; empty sets if it is missing.

    A timm model may be a part of ``model``. Its classifier then counts as the last layer only if none of ``names``
    comes after it in the order of registration.
    """
    backbones = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "default_cfg", None), Mapping)]
    if not backbones:
        return set(), set()
    prefix, backbone = backbones[0]
    prefix = f"{prefix}." if prefix else ""
    cfg: Mapping[str, Any] = backbone.default_cfg  # type: ignore[assignment]

    def named(key: str) -> set[str]:
        value = cfg.get(key) or ()
        wanted = [value] if isinstance(value, str) else list(value)
        # Some entries name a container ("head.fc" of a head module, a patch embedding): any layer in it counts.
        return {n for n in names for w in wanted if n == prefix + w or n.startswith(f"{prefix}{w}.")}

    last = named("classifier")
    if prefix and not names[-1].startswith(prefix):
        last = set()
    return named("first_conv"), last
