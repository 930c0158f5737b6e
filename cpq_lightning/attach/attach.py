"""attach, detach, and what walks over an attached model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from cpq_lightning.attach.find_products import find_products
from cpq_lightning.attach.first_forward import audit_first_forward, forget_first_forward
from cpq_lightning.attach.layers import QuantizedLayer, switch, switch_back
from cpq_lightning.attach.products import (
    leave_products,
    modules_with_products,
    operand_path,
    quantize_products,
    quantized_operands,
)
from cpq_lightning.attach.select import (
    Site,
    attached_config,
    chosen_operands,
    first_and_last,
    layer_settings,
    select,
)
from cpq_lightning.attach.timm_layers import call_projections, restore_projections
from cpq_lightning.attach.widths import check_names, read_weight_widths, with_levels_read
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn import Quantizer

M = TypeVar("M", bound=nn.Module)


def attach(model: M, config: CPQConfig | None = None, *, example_inputs: Any = None) -> M:
    """Quantize a model in place: weights at once, activations as soon as their ranges are known.

    Each convolution and linear layer keeps its Parameters (the same objects, under the same names in
    ``state_dict``) and gains a ``weight_quantizer`` and, unless ``act_bits`` is ``None``, an ``input_quantizer``.
    Activation ranges come from :func:`calibrate`, or from the first batch of a forward in training mode. Where
    anything is wrong the model is left as it was.

    Args:
        model: Any module; layers made later are not seen.
        config: What to quantize, and how.
        example_inputs: What to call the model with once, where ``config.attention`` asks for products without a weight:
            a tensor, a tuple of arguments or a dict of keyword arguments. timm backbones, and a LightningModule with an
            ``example_input_array``, need none.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is quantized already, has no layer to quantize or weights that are not finite, or a
            pattern of the config matches no layer; with ``attention=True``, the model cannot be called.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), CPQConfig(weight_bits=2))
        >>> [name for name, _ in quantizers(model)]
        ['0.weight_quantizer', '0.input_quantizer', '2.weight_quantizer', '2.input_quantizer']
    """
    config = with_levels_read(config or CPQConfig())
    if is_attached(model):
        raise ValueError(
            f"The model {type(model).__name__} is quantized already: call detach(model) first to quantize it anew."
        )
    products = find_products(model, example_inputs) if config.attention else {}
    plans = {name: found.plan for name, found in products.items()}
    sites = select(model, config, plans)
    chosen = chosen_operands(model, plans, config)
    paths = [operand_path(name, operand) for name, own in chosen.items() for operand in own]
    check_names(config, [*(site.name for site in sites), *paths])
    shared: dict[int, Quantizer] = {}
    pairs = [_build(site, index, shared) for index, site in enumerate(sites)]
    operands = _build_operands(model, chosen, 2 * len(sites))
    try:
        # Before layers, which may multiply something by themselves as well.
        for name, found in products.items():
            # One that is left out keeps its products to itself, so that they do not count as its caller's.
            plan = found.plan if name in operands else [False] * len(found.plan)
            quantize_products(model.get_submodule(name), plan, found.counts, operands.get(name, {}), "input_quantizer")
        for site, (weight_quantizer, input_quantizer) in zip(sites, pairs, strict=True):
            switch(site.layer, weight_quantizer, input_quantizer)
        call_projections(model)
    except Exception:
        for _, layer in list(quantized_layers(model)):
            switch_back(layer, written=False)
        _take_back(model)
        raise
    model.__dict__["_cpq_config"] = config
    audit_first_forward(model)
    if any(quantizer.has_gates for _, quantizer in quantizers(model)):
        model.register_forward_pre_hook(_advance_noise)
    return model


def _advance_noise(model: nn.Module, args: object) -> None:
    """Each training forward of the whole model draws gates of its own, also where no callback counts batches."""
    if model.training:
        for _, quantizer in quantizers(model):
            if quantizer.has_gates:
                quantizer.noise_step.add_(1)


def _build(site: Site, index: int, shared: dict[int, Quantizer]) -> tuple[Quantizer, Quantizer | None]:
    weight = site.layer._parameters["weight"]
    assert weight is not None
    # A Parameter that several layers share is one tensor when it ships: it has one quantizer.
    if id(weight) not in shared:
        shared[id(weight)] = Quantizer(
            "weight",
            site.config,
            key=2 * index,
            numel=weight.numel(),
            channels=weight.shape[site.channel_dim],
            channel_dim=site.channel_dim,
            exempt=site.exempt,
            inner=site.inner,
            device=weight.device,
        )
        widths = read_weight_widths(site.config, site.name)
        if widths is not None:
            channels = len(shared[id(weight)].widths)
            if len(widths) not in (1, channels):
                raise ValueError(
                    f"levels_from: layer {site.name!r} has {len(widths)} widths, one a channel, and {channels} "
                    "channels: read the levels of a run of the same network."
                )
            shared[id(weight)].fix_widths(widths)
        if not weight.is_meta:
            shared[id(weight)].fit_weight(weight)
    weights = shared[id(weight)]
    inputs = None
    if site.config.act_bits is not None:
        inputs = Quantizer(
            "activation",
            site.config,
            key=2 * index + 1,
            exempt=site.exempt,
            inner=site.inner,
            device=weight.device,
        )
    for quantizer in (weights, inputs):
        if quantizer is not None:
            quantizer.train(site.layer.training)
    return weights, inputs


def _build_operands(
    model: nn.Module, chosen: Mapping[str, Mapping[str, CPQConfig]], key: int
) -> dict[str, dict[str, Quantizer]]:
    keys = itertools.count(key)
    built: dict[str, dict[str, Quantizer]] = {}
    for name, operands in chosen.items():
        module = model.get_submodule(name)
        tensor = next(itertools.chain(module.parameters(), module.buffers(), model.parameters()))
        built[name] = {
            operand: Quantizer("activation", settings, key=next(keys), device=tensor.device).train(module.training)
            for operand, settings in operands.items()
        }
    return built


def _take_back(model: nn.Module) -> None:
    """What attach has changed beside layers."""
    for _, module in list(modules_with_products(model)):
        leave_products(module)
    restore_projections(model)


def detach(model: M) -> M:
    """Give plain layers back, in place, with the quantized weights written into their Parameters.

    Activations are no longer quantized. Weights evaluate as they did, to the bit.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is not quantized.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"The model {type(model).__name__} is not quantized: there is nothing to detach.")
    plain = [module for module in model.modules() if not isinstance(module, QuantizedLayer)]
    read_elsewhere = {id(p) for module in plain for p in module._parameters.values() if p is not None}
    for layer in layers.values():
        switch_back(layer, shared=id(layer.full_precision_weight()) in read_elsewhere)
    _forget(model)
    return model


def _forget(model: nn.Module) -> None:
    """Everything of an attached model that is not in its layers."""
    _take_back(model)
    forget_first_forward(model)
    model.__dict__.pop("_cpq_config", None)
    for handle, hook in list(model._forward_pre_hooks.items()):
        if hook is _advance_noise:
            del model._forward_pre_hooks[handle]


def full_precision_copy(model: M) -> M:
    """A copy of a model, or of a part of one, without quantizers: plain layers with the weights that are trained.

    A model that is not quantized is copied as it is; of a compiled one, what was compiled.
    """
    copied: M = copy.deepcopy(getattr(model, "_orig_mod", model))
    for _, layer in list(quantized_layers(copied)):
        switch_back(layer, written=False)
    _forget(copied)
    return copied


def is_attached(model: nn.Module) -> bool:
    """Whether any layer of the model is quantized."""
    return any(isinstance(module, QuantizedLayer) for module in model.modules())


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers of a model with their names, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """The quantizers of a model with their names, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def set_active(model: nn.Module, active: bool) -> None:
    """Quantize, or pass weights and activations on in full precision."""
    for _, quantizer in quantizers(model):
        quantizer.configure(active=active)


def refit(model: nn.Module) -> None:
    """Fit all weight steps to the weights as they are now, and let the next training batch set activation ranges."""
    for _, layer in quantized_layers(model):
        layer.weight_quantizer.fit_weight(layer.full_precision_weight())
        if layer.input_quantizer is not None:
            layer.input_quantizer.refit_next()
    for _, quantizer in quantized_operands(model):
        quantizer.refit_next()


def set_noise_step(model: nn.Module, step: int) -> None:
    """Set the counter that DropBits' noise is drawn at; quantizers draw the same gates at the same counter."""
    for _, quantizer in quantizers(model):
        quantizer.noise_step.fill_(step)


def _decided(layers: Iterable[QuantizedLayer]) -> bool:
    """Whether learned widths have been fixed: an earlier forward has settled then which layers are the ends."""
    weights = (layer.weight_quantizer for layer in layers)
    return any(q.gates.learned and not q.learns_bits and not q.exempt for q in weights)


def correct_ends(model: nn.Module, order: list[str]) -> list[str]:
    """Move ``first_last_bits`` to the layers that truly run first and last, where timm did not name them.

    Args:
        model: The model that was attached; where only a part of it was, nothing changes.
        order: Names of its quantized layers in the order in which a forward called them.

    Returns:
        Names of the layers whose width changed. Their weights' steps are fitted anew, their activations' by the next
        calibration.
    """
    layers = dict(quantized_layers(model))
    called = [name for name in order if name in layers]
    config = attached_config(model)
    if config is None or config.first_last_bits is None or not called or _decided(layers.values()):
        return []
    ends = first_and_last(model, list(layers), called)
    changed = []
    for name, layer in layers.items():
        settings, exempt = layer_settings(name, layer, config, name in ends)
        if exempt == layer.weight_quantizer.exempt:
            continue
        changed.append(name)
        layer.weight_quantizer.configure(bits=settings.weight_bits, min_bits=settings.narrowest_bits, exempt=exempt)
        layer.weight_quantizer.fit_weight(layer.full_precision_weight())
        if layer.input_quantizer is not None and settings.act_bits is not None:
            bits, narrowest = settings.act_bits, settings.narrowest_act_bits or settings.act_bits
            layer.input_quantizer.configure(bits=bits, min_bits=narrowest, exempt=exempt, calibrated=False)
    return changed
