"""Merge a ReLU before a quantizer into the range of the quantizer's codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cpq_lightning.export.onnx.graph import Editor, constant_of, known, layer_of, nodes, only_user, tidy


def merge_clips(model: ir.Model) -> None:
    """Remove each Relu or Clip (such as that of ReLU6) that only one quantizer reads, and clip the quantizer's codes.

    Quantization is monotonic, so ``Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b))`` holds exactly. The quantizer then reads
    the convolution before it directly, as integer kernels require.
    """
    edit = Editor(model.graph)
    for quantize in nodes(model.graph, "QuantizeLinear"):
        source = quantize.inputs[0]
        clip = None if source is None else source.producer()
        if layer_of(quantize, "input") is None or clip is None or source is None or only_user(source) is not quantize:
            continue
        bounds = _bounds(clip)
        if bounds is None:
            continue
        _narrow(edit, quantize, *bounds)
        quantize.replace_input_with(0, clip.inputs[0])
    tidy(model)


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    low, high = (constant_of(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2))
    if any(len(node.inputs) > i and node.inputs[i] is not None and v is None for i, v in ((1, low), (2, high))):
        return None
    return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))


def _narrow(edit: Editor, quantize: ir.Node, low: float, high: float) -> None:
    codes = quantize.outputs[0]
    scale, zero = known(quantize.inputs[1]).astype(np.float32), int(known(quantize.inputs[2]))
    clip = only_user(codes)
    clip = clip if clip is not None and clip.op_type == "Clip" else None
    bottom, top = (0, 255) if clip is None else (int(known(clip.inputs[1])), int(known(clip.inputs[2])))
    clipped = [
        int(np.clip(np.round(np.float32(bound) / scale) + zero, bottom, top)) if np.isfinite(bound) else fallback
        for bound, fallback in ((low, bottom), (high, top))
    ]
    if clipped == [bottom, top]:
        return
    layer = layer_of(quantize, "input")
    values = [
        edit.constant(f"{layer}.input_{name}", np.array(v, np.uint8))
        for name, v in zip(("bottom", "top"), clipped, strict=True)
    ]
    if clip is not None:
        clip.replace_input_with(1, values[0])
        clip.replace_input_with(2, values[1])
        return
    (reader, *_) = (use.node for use in codes.uses())
    narrowed = edit.node(reader, "Clip", [codes, *values], like=quantize)
    narrowed.type, narrowed.shape = codes.type, codes.shape
    for use in list(codes.uses()):
        if use.node is not narrowed.producer():
            use.node.replace_input_with(use.idx, narrowed)
