"""What a deployment target needs, checked when a model is attached: before training, not after it."""

from __future__ import annotations

from collections.abc import Iterable

from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer


def check_deploy(config: CPQConfig, quantizers: Iterable[tuple[str, Quantizer]]) -> None:
    """Check that the quantizers of a model suit the target ``config.deploy``.

    TensorRT computes with signed bytes whose zero point is 0: inputs need signed grids, or unsigned ones of at most 7
    bits. QONNX has one width for each tensor. Integer products of both have one scale for each output channel.

    Args:
        config: The config of the model.
        quantizers: Its quantizers with their names.

    Raises:
        ValueError: a layer does not suit the target; the message names the setting to change.
    """
    if config.deploy is None:
        return
    found = list(quantizers)
    grouped = [name for name, q in found if q.settings.group_size]
    if grouped:
        raise ValueError(
            f"deploy={config.deploy!r} computes integer products, which take one scale for each output channel, and "
            f"these weights have one for each group of inputs: {', '.join(grouped)}. Set group_size=None (in overrides "
            "too)."
        )
    if config.deploy == "tensorrt":
        wrong = [name for name, q in found if q.kind == "activation" and not _fits_int8(q)]
        if wrong:
            raise ValueError(
                f"deploy='tensorrt' needs inputs on signed grids, or unsigned ones of at most 7 bits, and these "
                f"quantizers may get others: {', '.join(wrong)}. Leave act_grid at 'auto', or set it to 'signed' or "
                "'int8' (in overrides too)."
            )
    if config.deploy == "qonnx":
        wrong = [name for name, q in found if q.settings.width_count > 1 or q.settings.gate_rows > 1]
        if wrong:
            raise ValueError(
                f"deploy='qonnx' needs one width for each tensor, and these quantizers have one for each channel: "
                f"{', '.join(wrong)}. Set gate_sharing='tensor', and use levels_from without lists of widths."
            )


def _fits_int8(quantizer: Quantizer) -> bool:
    grid = quantizer.settings.grid
    return grid in ("signed", "int8") or (grid == "unsigned" and quantizer.bits <= 7)
