"""First and last layers by execution order, and a check that other layers remain between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

from cpq_lightning.attach.audit import listed
from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers, quantizers
from cpq_lightning.attach.origin import attached_config
from cpq_lightning.attach.patterns import names_of, overrides_of
from cpq_lightning.attach.select import first_and_last, layer_settings
from cpq_lightning.attach.wrapping import unwrapped


def _decided(layers: Iterable[QuantizedLayer]) -> bool:
    """Whether learned widths are fixed; an earlier forward has then settled which layers are first and last."""
    weights = (layer.weight_quantizer for layer in layers)
    return any(q.gates.learned and not q.learns_bits and not q.first_or_last for q in weights)


def _weight_quantizer(layer: nn.Module) -> object:
    # Layers whose weights were tied after attach have separate quantizers.
    return cast(QuantizedLayer, layer).weight_quantizer


def settle_first_and_last(model: nn.Module, execution_order: list[str]) -> None:
    """Move ``first_last_bits`` to the layers that run first and last in a forward, unless timm names them.

    The weight scales of layers whose width changes are fitted again; their activation scales are fitted by the next
    calibration.

    Args:
        model: The model that was attached; if only a part of it was attached, nothing changes. No backward of an
            earlier forward may be pending, because activation checkpointing would recompute that forward at other
            widths.
        execution_order: Names of the quantized layers in the order in which a forward called them.
    """
    model = unwrapped(model)
    layers = dict(quantized_layers(model))
    called = [name for name in execution_order if name in layers]
    config = attached_config(model)
    if config is None or config.first_last_bits is None or not called or _decided(layers.values()):
        return
    first_last = first_and_last(model, list(layers), called)
    overrides = overrides_of(cast("dict[str, nn.Module]", layers), names_of(model), config, _weight_quantizer)
    for name, layer in layers.items():
        settings, first_or_last = layer_settings(name, overrides[name], config, name in first_last)
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if first_or_last == weights.first_or_last:
            continue
        widths = {"bits": settings.weight_bits, "min_bits": settings.narrowest_bits}
        weights.configure(**widths, first_or_last=first_or_last)
        weights.fit_weight(layer.read_weight(), settled=weights.settled)
        if inputs is not None and settings.act_bits is not None:
            bits, narrowest = settings.act_bits, settings.narrowest_act_bits or settings.act_bits
            inputs.configure(bits=bits, min_bits=narrowest, first_or_last=first_or_last)
            inputs.refit_next()


def nothing_between(model: nn.Module) -> str | None:
    """A warning if all quantized layers are first or last layers, so that no layer has the config's widths."""
    config = attached_config(model)
    first_or_last = [name for name, layer in quantized_layers(model) if layer.weight_quantizer.first_or_last]
    if config is None or config.first_last_bits is None or len(first_or_last) < len(list(quantized_layers(model))):
        return None
    if config.levels_from is not None:
        # The file sets all widths.
        return None
    config_bits = {"weight_bits": config.weight_bits}
    if config.act_bits is not None and all(q.first_or_last for _, q in quantizers(model) if q.kind == "activation"):
        config_bits["act_bits"] = config.act_bits
    unused = [f"{name}={bits}" for name, bits in config_bits.items() if bits != config.first_last_bits]
    if not unused:
        return None
    named = listed([name or "the model itself" for name in first_or_last])
    return (
        f"All {len(first_or_last)} quantized layers ({named}) are first or last ones, which have "
        f"first_last_bits={config.first_last_bits}: no layer has {' or '.join(unused)}. Set first_last_bits=None, or "
        "set weight_bits for these layers in overrides."
    )
