"""``attach`` and ``detach``, and functions that act on all quantizers of an attached model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from cpq_lightning.attach.audit import forget_search, remember_search
from cpq_lightning.attach.coverage import forget_products
from cpq_lightning.attach.decompose import decompose, decompose_products, decomposed_modules, drop_layers, recompose
from cpq_lightning.attach.deploy import check_deploy
from cpq_lightning.attach.find_products import Found, Products, changed_modules, find_products, has_matrices
from cpq_lightning.attach.first_forward import audit_first_forwards, forget_first_forwards
from cpq_lightning.attach.layer_callers import call_layers, leave_calls
from cpq_lightning.attach.layers import (
    QuantizedLayer,
    bypassed,
    is_attached,
    quantized_layers,
    quantizers,
    switch,
    switch_back,
)
from cpq_lightning.attach.levels_file import check_names, read_weight_widths, with_levels_read
from cpq_lightning.attach.origin import Origin, attached_config, late_layers, set_attached_config, set_origin
from cpq_lightning.attach.parametrized import copied, weight_now
from cpq_lightning.attach.patterns import is_ignored, names_of
from cpq_lightning.attach.products import (
    leave_products,
    modules_with_products,
    operand_path,
    quantize_products,
    quantized_operands,
    remember_plan,
)
from cpq_lightning.attach.select import Site, check_same_settings, chosen_operands, select
from cpq_lightning.attach.tied import leave_tied, tie, tied_readers, tied_to, tied_to_layers, to_be_tied
from cpq_lightning.attach.timm_layers import call_projections, holds_weight, restore_projections, shared_weight
from cpq_lightning.attach.weight_readers import avoid_fused_paths, leave_weights, read_weights, restore_fused_paths
from cpq_lightning.attach.wrapping import check_unspread, unwrapped
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer

M = TypeVar("M", bound=nn.Module)


def attach(model: M, config: CPQConfig | Mapping[str, Any] | None = None, *, example_inputs: Any = None) -> M:
    """Quantize a model in place: weights immediately, activations as soon as their ranges are known.

    Each convolution and linear layer keeps its Parameters (the same objects, under the same names in
    ``state_dict``) and gains a ``weight_quantizer`` and, unless ``act_bits`` is ``None``, an ``input_quantizer``. A
    module that shares the Parameter of such a layer's weight, such as an embedding that is tied to the head, reads it
    quantized too, by the layer's ``weight_quantizer``, unless ``ignore`` names the module. Activation ranges come from
    :func:`calibrate`, or from the first batch of a forward in training mode. If attaching fails, the model is left
    unchanged.

    Modules that multiply by Parameters of their own (``nn.MultiheadAttention``, recurrent modules and cells,
    ``nn.Bilinear``) compute the same through layers while any of these is quantized: see
    :mod:`cpq_lightning.attach.decomposed`. Their Parameters stay where they are. So do modules that multiply by a
    matrix among their Parameters, as in ``x @ self.weight``, if a forward can show it: see
    :mod:`cpq_lightning.attach.parameter_products`.

    If the model is attached already, only layers that were added since are quantized, for example by
    re-parameterizing, fusing or replacing layers. Layers that are quantized already do not change. Calibrate the model
    again afterwards. Products of activations (``attention=True``) are not searched for again.

    Args:
        model: Any module; layers that are created later are not seen. If the model is wrapped by ``torch.compile``,
            DistributedDataParallel (of one process) or Fabric, the wrapped module is quantized, and names are those of
            the wrapped module.
        config: What to quantize, and how: a config, or a mapping of its settings. ``None`` means the default config, or
            for an attached model the config that it was attached with. An attached model accepts a config with other
            ``ignore`` and ``overrides``, provided that they change nothing that is quantized already.
        example_inputs: Inputs for one forward, which shows products with a Parameter that is no layer's weight, and,
            for ``config.attention``, products of two activations: a tensor, a tuple of arguments or a dict of arguments
            by name; or the tuple or dict that the forward takes as its only argument. timm backbones, and a
            LightningModule with an ``example_input_array``, need none.

    Returns:
        The model itself.

    Raises:
        TypeError: ``config`` is neither a config nor a mapping, or a setting in it has the wrong type.
        ValueError: the model has no layer to quantize, or all its layers are quantized already, or it has weights that
            are not finite, or it is inside a DistributedDataParallel of several processes; a setting is unknown or out
            of its range, a pattern of the config matches no layer, layers that share a weight get different settings
            for it, or quantized layers have other settings than the config gives them; a layer does not suit the
            target that ``config.deploy`` names; an embedding with ``max_norm`` is tied to a quantized layer; the model
            cannot be called with ``example_inputs``, or, with ``attention=True``, at all.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), CPQConfig(weight_bits=2))
        >>> [name for name, _ in quantizers(model)]
        ['0.weight_quantizer', '0.input_quantizer', '2.weight_quantizer', '2.input_quantizer']
    """
    config = None if config is None else with_levels_read(config)
    check_unspread(model)
    given, model = model, cast(M, unwrapped(model))
    if is_attached(model):
        _attach_late(model, config)
        return given
    config = with_levels_read(CPQConfig() if config is None else config)
    decompose(model)
    try:
        untied = _attach(model, config, example_inputs)
    except Exception:
        _leave_full_precision(model)
        raise
    set_attached_config(model, config)
    watch(model)
    for warning in untied:
        warnings.warn(warning, stacklevel=2)
    return given


def _attach(model: nn.Module, config: CPQConfig, example_inputs: Any) -> list[str]:
    """Attach quantizers; return warnings. If it fails, some may be attached."""
    products, left_out = _find_products(model, config, example_inputs)
    plans = {name: multiplied.plan for name, multiplied in products.items()}
    sites = select(model, config, plans, {**left_out, **{tied.name: tied.module for tied in tied_to_layers(model)}})
    chosen = chosen_operands(model, plans, config)
    paths = [operand_path(name, operand) for name, settings in chosen.items() for operand in settings]
    check_names(config, [*(site.name for site in sites), *paths])
    readers, untied = to_be_tied(model, {site.name: site.layer for site in sites}, config)
    shared: dict[int, Quantizer] = {}
    pairs = [_build(site, index, shared) for index, site in enumerate(sites)]
    operands = _build_operands(model, chosen, 2 * len(sites))
    _check_deploy(config, sites, pairs, operands)
    # Before the layers are switched, because a layer may also multiply activations in its forward.
    for name, multiplied in products.items():
        # A module that is left out still claims its products, so that they do not count as its caller's.
        plan = multiplied.plan if name in operands else [False] * len(multiplied.plan)
        module = model.get_submodule(name)
        remember_plan(quantize_products(module, plan, multiplied.counts, operands.get(name, {}), "input_quantizer"))
    for site, (weight_quantizer, input_quantizer) in zip(sites, pairs, strict=True):
        switch(site.layer, weight_quantizer, input_quantizer)
    for reader in readers:
        tie(reader, shared[id(reader.tensor)])
    arrange(model)
    return untied


def _find_products(
    model: nn.Module, config: CPQConfig, example_inputs: Any
) -> tuple[dict[str, Products], dict[str, nn.Module]]:
    """The products of activations that ``attention`` quantizes, and what ``ignore`` leaves out besides layers: matrices
    that the forward multiplies by, which otherwise get layers, and embeddings with such a matrix.
    """
    if not config.attention and not has_matrices(model):
        return {}, {}
    try:
        found = find_products(model, example_inputs)
    except ValueError as error:
        if config.attention or example_inputs is not None:
            raise
        # The audit of the first forward names what stays in full precision, and says why.
        remember_search(model, str(error))
        return {}, {}
    if not found.matrices:
        return found.products if config.attention else {}, {}
    before = find_products(model, example_inputs, record=found.matrices)
    decompose_products(model, found.matrices)
    layers = {
        f"{name}.{layer}".lstrip("."): model.get_submodule(name).get_submodule(layer)
        for name, parts in found.matrices.items()
        for layer in parts
    }
    names = names_of(model)
    left_out = {name: layer for name, layer in layers.items() if is_ignored(layer, names, config)}
    # An embedding whose weight a layer multiplies by may be left out with that layer.
    tied = {tied.name: tied.module for tied in tied_to_layers(model)} if left_out else {}
    drop_layers(model, left_out)
    products = _drop_changed(model, before, example_inputs)
    return products if config.attention else {}, {**left_out, **tied}


def _drop_changed(model: nn.Module, before: Found, example_inputs: Any) -> dict[str, Products]:
    """Undo the layers for matrices in modules that compute something else with them, such as one that calls all its
    children; return the products of activations.
    """
    while True:
        products: dict[str, Products] = {}
        try:
            after = find_products(model, example_inputs, record=before.calls)
            products, changed, reason = after.products, changed_modules(before, after), "returns something else"
        except ValueError as error:
            changed, reason = list(before.calls), f"fails ({error})"
        owners = dict(decomposed_modules(model))
        dropped = [f"{n}.{layer}".lstrip(".") for n in changed if n in owners for layer in owners[n].owned_layers]
        if not dropped:
            return products
        warnings.warn(
            f"The products with {', '.join(dropped)} stay in full precision: with layers for these Parameters, the "
            f"forward {reason}. Does it call all its children, or write to a copy of a Parameter?",
            stacklevel=4,
        )
        drop_layers(model, dropped)


def _attach_late(model: nn.Module, config: CPQConfig | None) -> None:
    """Quantize the layers of an attached model that are not quantized yet."""
    known = attached_config(model)
    config = known if config is None else config
    decompose(model)
    try:
        _attach_new(model, known, config)
    except Exception:
        recompose(model, unused=True)
        raise


def _attach_new(model: nn.Module, known: CPQConfig | None, config: CPQConfig | None) -> None:
    if config is None:
        raise ValueError(
            f"Layers of {type(model).__name__} are quantized already, and by which config is not known: the model was "
            "attached in parts, is part of an attached model, or got its quantizers from a state_dict. Give the "
            "config, attach(model, config), to quantize the other layers."
        )
    quantized = dict(quantized_layers(model))
    sites = [s for s in select(model, config, checked=config != known) if s.name not in quantized]
    if not sites and (known is None or not late_layers(model)):
        raise ValueError(
            f"The model {type(model).__name__} is quantized already: call detach(model) first to quantize it again."
        )
    if known is not None:
        check_same_settings(model, quantized, known, config)
    if isinstance(config.levels_from, dict):
        check_names(config, {*config.levels_from, *(site.name for site in sites)})
    shared = {id(shared_weight(layer)): layer.weight_quantizer for layer in quantized.values()}
    first = 1 + max(q.settings.key for _, q in quantizers(model)) // 2
    pairs = [_build(site, index, shared) for index, site in enumerate(sites, start=first)]
    _check_deploy(config, sites, pairs, {})
    active = any(q.active for _, q in quantizers(model))
    for quantizer in (q for pair in pairs for q in pair if q is not None):
        quantizer.configure(active=active)
    try:
        for site, (weight_quantizer, input_quantizer) in zip(sites, pairs, strict=True):
            switch(site.layer, weight_quantizer, input_quantizer)
        arrange(model)
    except Exception:
        for site in sites:
            if isinstance(site.layer, QuantizedLayer):
                switch_back(site.layer, written=False)
        undo_attach(model)
        arrange(model)
        raise
    if known is not None:
        set_attached_config(model, config)
    for site in sites:
        set_origin(site.layer, Origin(site.name, config))
    watch(model)


def arrange(model: nn.Module) -> None:
    """Make the modules around quantized layers call these layers, or read their weights quantized."""
    recompose(model, unused=True)
    call_projections(model)
    read_weights(model, QuantizedLayer)
    call_layers(model, QuantizedLayer)
    avoid_fused_paths(model, QuantizedLayer)


def watch(model: nn.Module) -> None:
    """Register the forward hooks of an attached model: audits, range tracking, and DropBits noise."""
    audit_first_forwards(model)
    gates = any(quantizer.has_gates for _, quantizer in quantizers(model))
    if gates and _advance_noise not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_advance_noise)


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch` for a model and all its submodules."""
    forget_first_forwards(model)
    forget_search(model)
    forget_products(model)
    for module in model.modules():
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook is _advance_noise:
                del module._forward_pre_hooks[handle]


def _advance_noise(model: nn.Module, args: object) -> None:
    """Give each training forward of the full model new DropBits gates, also if no callback counts batches."""
    # Within a backward, activation checkpointing computes the forward again, which needs the same gates.
    if model.training and torch._C._current_graph_task_id() == -1:
        for _, quantizer in quantizers(model):
            if quantizer.has_gates:
                quantizer.gates.advance()


def _build(site: Site, index: int, shared: dict[int, Quantizer]) -> tuple[Quantizer, Quantizer | None]:
    weight = weight_now(site.layer)
    # A Parameter that several layers share is exported as one tensor, so it has one quantizer.
    owner = id(shared_weight(site.layer))
    if owner not in shared:
        shared[owner] = Quantizer(
            "weight",
            site.config,
            key=2 * index,
            numel=weight.numel(),
            channels=weight.shape[site.channel_dim],
            channel_dim=site.channel_dim,
            inputs=site.group_inputs,
            first_or_last=site.first_or_last,
            inner=site.inner,
            device=weight.device,
        )
        widths = read_weight_widths(site.config, site.name)
        if widths is not None:
            channels = len(shared[owner].widths)
            if len(widths) not in (1, channels):
                raise ValueError(
                    f"levels_from: layer {site.name!r} has {len(widths)} widths, one a channel, and {channels} "
                    "channels: read the levels of a run of the same network."
                )
            shared[owner].fix_widths(widths)
        if not weight.is_meta:
            # Weights that are initialized or loaded later are fitted again: see calibrate.
            shared[owner].fit_weight(weight, settled=False)
    weights = shared[owner]
    inputs = None
    if site.config.act_bits is not None:
        inputs = Quantizer(
            "activation",
            site.config,
            key=2 * index + 1,
            first_or_last=site.first_or_last,
            inner=site.inner,
            device=weight.device,
        )
    for quantizer in (weights, inputs):
        if quantizer is not None:
            quantizer.train(site.layer.training)
    return weights, inputs


def _check_deploy(
    config: CPQConfig,
    sites: Sequence[Site],
    pairs: Sequence[tuple[Quantizer, Quantizer | None]],
    operands: Mapping[str, Mapping[str, Quantizer]],
) -> None:
    of_layers = [(site.name, q) for site, pair in zip(sites, pairs, strict=True) for q in pair if q is not None]
    check_deploy(config, [*of_layers, *((operand_path(m, o), q) for m, qs in operands.items() for o, q in qs.items())])


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


def undo_attach(model: nn.Module) -> None:
    """Undo :func:`arrange`."""
    leave_calls(model)
    leave_weights(model)
    restore_fused_paths(model)
    restore_projections(model)


def detach(model: M) -> M:
    """Turn quantized layers back into plain ones, in place, and write the quantized weights into their Parameters.

    Activations are no longer quantized. Weights evaluate bit-identically to before. Weights that the forward reads in
    full precision, bypassing their layer, are not changed.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is not quantized.
    """
    given, model = model, cast(M, unwrapped(model))
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"The model {type(model).__name__} is not quantized: there is nothing to detach.")
    not_read, _ = bypassed(model)
    _separate_from_full_precision(model)
    leave_tied(model)
    for layer in layers.values():
        switch_back(layer, written=layer not in not_read)
    _remove_surroundings(model)
    return given


def _separate_from_full_precision(model: nn.Module) -> None:
    """Separate a Parameter that is read both quantized and in full precision into two Parameters.

    Modules that read it quantized keep sharing one Parameter.
    """
    layers = [(name, layer._parameters.get("weight"), layer) for name, layer in quantized_layers(model)]
    known = {id(parameter): name for name, parameter, _ in layers if parameter is not None}
    plain = [m for m in model.modules() if holds_weight(m) and not isinstance(m, QuantizedLayer)]
    read = {id(tied.tensor) for tied in tied_to(model, known) if not tied.reads_quantized}
    read |= {id(module._parameters.get("weight")) for module in plain}
    copies: dict[int, nn.Parameter] = {}
    users = [(parameter, layer._parameters, "weight") for _, parameter, layer in layers]
    users += [(r._parameters[r.tied_name], r._parameters, r.tied_name) for _, r in tied_readers(model)]
    for parameter, parameters, key in users:
        if parameter is not None and id(parameter) in read:
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            parameters[key] = copies.setdefault(id(parameter), copy)


def _remove_surroundings(model: nn.Module) -> None:
    """Remove everything that attaching added outside of the layers."""
    undo_attach(model)
    for _, module in list(modules_with_products(model)):
        leave_products(module)
    recompose(model)
    unwatch(model)


def full_precision_copy(model: M) -> M:
    """Copy a model, or a part of one, without quantizers: plain layers with the trained full-precision weights.

    A model that is not quantized is copied unchanged; of a wrapped model, the wrapped module is copied.
    """
    copy = copied(cast(M, unwrapped(model)))
    _leave_full_precision(copy)
    return copy


def _leave_full_precision(model: nn.Module) -> None:
    """Remove all quantizers; the Parameters keep their full-precision weights."""
    leave_tied(model, written=False)
    for _, layer in list(quantized_layers(model)):
        switch_back(layer, written=False)
    _remove_surroundings(model)


def set_active(model: nn.Module, active: bool) -> None:
    """Switch all quantizers of a model on, or off: weights and activations then pass in full precision."""
    for _, quantizer in quantizers(model):
        quantizer.configure(active=active)


def refit(model: nn.Module) -> None:
    """Fit all weight scales to the current weights, and let the next training batch set activation ranges."""
    for _, layer in quantized_layers(model):
        layer.weight_quantizer.fit_weight(layer.read_weight())
        if layer.input_quantizer is not None:
            layer.input_quantizer.refit_next()
    for _, quantizer in quantized_operands(model):
        quantizer.refit_next()


def set_noise_step(model: nn.Module, step: int) -> None:
    """Set the counter that seeds DropBits noise: at the same counter, quantizers draw the same gates."""
    for _, quantizer in quantizers(model):
        if "noise_step" in quantizer.gates._buffers:
            quantizer.gates.steps_ahead = 0
            quantizer.noise_step.fill_(step)
