"""Writing an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from cpq_lightning.errors import ExportError
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

# Size limit of a protobuf message. A larger model would need its weights in separate files.
_MAX_BYTES = 2**31 - 1


def write_onnx(
    model: nn.Module,
    path: str | Path,
    samples: Samples,
    *,
    container: Container = "int8",
    architecture: Mapping[str, Any] | None = None,
    round_biases: bool = True,
) -> Path:
    """Write an attached model as ONNX, opset 21, for any number of samples.

    Activations become QuantizeLinear and DequantizeLinear with unsigned bytes. Weights become DequantizeLinear of their
    codes, which are signed bytes, or unsigned bytes where sums of products would saturate on some processors, see
    :func:`~cpq_lightning.export.onnx.store.use_unsigned_bytes`. Batch norms are folded into the convolutions before
    them, see :func:`~cpq_lightning.export.onnx.norms.fold_norms`.

    Args:
        model: An attached model, trained.
        path: The file to write; the usual suffix is ``.onnx``.
        samples: Inputs for the trace.
        container: ``"int8"`` for the form that ONNX Runtime computes with integer kernels; ``"int4"`` for the smaller
            file, with weights of at most 4 bits in INT4 tensors and unchanged convolutions.
        architecture: Architecture entry for the file's metadata.
        round_biases: ``"int8"`` only: see :func:`~cpq_lightning.export.onnx.integer.use_integer_kernels`.

    Returns:
        The path.

    Raises:
        ValueError: the model cannot be exported, or the file would be over 2 GB.
        torch.onnx.OnnxExporterError: PyTorch cannot express the forward in ONNX.
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
    if proto.ByteSize() > _MAX_BYTES:
        raise ExportError(
            f"The ONNX file would have {proto.ByteSize()} bytes, above the limit of 2 GB: use format='packed'."
        )
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return path


def build(model: nn.Module, samples: Samples, container: Container, round_biases: bool = True) -> ir.Model:
    """Build the graph of an attached model in the form for the container."""
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
    """The content of an ONNX file of a network without quantization, for comparison."""
    return ir.serde.serialize_model(trace_plain(network, samples)).SerializeToString()
