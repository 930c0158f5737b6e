"""Writing an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from cpq_lightning.export.formats import Container
from cpq_lightning.export.onnx.clips import merge_clips
from cpq_lightning.export.onnx.integer import keep_biases, use_integer_kernels
from cpq_lightning.export.onnx.layout import keep_channels_last
from cpq_lightning.export.onnx.norms import fold_norms
from cpq_lightning.export.onnx.store import finish, lowest_level, share_codes, use_four_bits, use_unsigned_bytes
from cpq_lightning.export.onnx.tables import read_codes_of_layers
from cpq_lightning.export.onnx.trace import trace, trace_plain
from cpq_lightning.export.samples import Samples
from cpq_lightning.report.levels import compact_manifest

# What one protobuf message may hold; weights in files of their own would not be one file.
_MOST_BYTES = 2**31 - 1


def write_onnx(
    model: nn.Module,
    path: str | Path,
    samples: Samples,
    *,
    container: Container = "int8",
    architecture: Mapping[str, Any] | None = None,
    round_biases: bool = True,
) -> Path:
    """Write an attached model as ONNX, opset 21, any number of samples.

    Activations are QuantizeLinear and DequantizeLinear with unsigned bytes, weights DequantizeLinear of their codes:
    signed, or where products of those would be cut off on some processors unsigned, see
    :func:`~cpq_lightning.export.onnx.store.use_unsigned_bytes`.
    Batch norms are folded into them, see :func:`~cpq_lightning.export.onnx.norms.fold_norms`.

    Args:
        model: An attached model, trained.
        path: The file; ``.onnx`` is usual.
        samples: Inputs to trace with.
        container: ``"int8"`` in the form that ONNX Runtime computes with integer kernels; ``"int4"`` with weights of
            at most 4 bits in INT4 tensors, and convolutions as they are: the smaller file.
        architecture: Noted in the file.
        round_biases: Of ``"int8"``: see :func:`~cpq_lightning.export.onnx.integer.use_integer_kernels`.

    Returns:
        The path.

    Raises:
        ValueError: the model cannot be exported, or the file would be over 2 GB.
        torch.onnx.OnnxExporterError: PyTorch cannot express its forward in ONNX.
    """
    path = Path(path)
    graph = build(model, samples, container, round_biases)
    content = {
        "container": container,
        "architecture": None if architecture is None else dict(architecture),
        "constants": samples.places(model)[1],
        "levels": compact_manifest(model),
    }
    finish(graph, content)
    proto = ir.serde.serialize_model(graph)
    if proto.ByteSize() > _MOST_BYTES:
        raise ValueError(f"The ONNX file would have {proto.ByteSize()} bytes, over the 2 GB of one: export it packed.")
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return path


def build(model: nn.Module, samples: Samples, container: Container, round_biases: bool = True) -> ir.Model:
    """The graph of an attached model, in the form of its container."""
    graph = trace(model, samples)
    fold_norms(graph, lambda codes: lowest_level(codes, container))
    merge_clips(graph)
    if container == "int8":
        use_integer_kernels(graph, round_biases)
        keep_channels_last(graph)
    else:
        use_four_bits(graph)
    keep_biases(graph)
    share_codes(graph)
    use_unsigned_bytes(graph)
    read_codes_of_layers(graph)
    return graph


def full_precision(network: nn.Module, samples: Samples) -> bytes:
    """The ONNX file of a network that is not quantized, to compare with."""
    return ir.serde.serialize_model(trace_plain(network, samples)).SerializeToString()
