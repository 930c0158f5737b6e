"""Lists of torch operations that multiply matrices, and of those that only move values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

WITH_WEIGHT: set[Any] = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
# This list and the next are dicts, because torch 2.8 does not compile a lookup in a set of functions.
WITHOUT_WEIGHT: dict[Any, None] = dict.fromkeys((
    torch.matmul, torch.mm, torch.mv, torch.bmm, torch.inner, torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm,
    torch.einsum, torch.tensordot, torch.linalg.matmul, torch.linalg.multi_dot, Tensor.__matmul__, Tensor.__rmatmul__,
    Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.bmm, Tensor.inner, Tensor.addmm, Tensor.addmv, Tensor.addbmm,
    Tensor.baddbmm, F.scaled_dot_product_attention,
))  # fmt: skip
# Operations that add their first operand to the product of the others.
_ADDED_FIRST: dict[Any, None] = dict.fromkeys((
    torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm, Tensor.addmm, Tensor.addmv, Tensor.addbmm, Tensor.baddbmm,
))  # fmt: skip
# Operations that multiply by weights internally.
FUSED: set[Any] = {
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, F.multi_head_attention_forward,  # type: ignore[attr-defined]
    torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell,
    torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd,  # type: ignore[attr-defined]
}  # fmt: skip
# Operations that look up rows of a weight, with the index of the argument that is the weight.
LOOKUPS: dict[Any, int] = {
    F.embedding: 1, F.embedding_bag: 1, Tensor.__getitem__: 0, Tensor.index_select: 0, torch.index_select: 0,
}  # fmt: skip
# Parts of the names of operations that multiply matrices, for operations that are in no list here, such as
# ``torch._grouped_mm`` and ``torchvision::deform_conv2d``.
_MULTIPLYING = ("mm", "matmul", "linear", "conv", "einsum", "attention", "lstm", "gru", "rnn", "mv", "dot", "gemm")
# Operations on a quantized tensor whose result is quantized: they move values, or add zeros, which all grids contain.
_VALUE_PRESERVING = {
    "reshape", "view", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze", "unsqueeze", "expand",
    "contiguous", "to", "float", "half", "bfloat16", "type", "pad", "clone", "detach", "__getitem__", "chunk", "split",
    "unbind", "repeat", "unfold", "t", "select", "narrow", "view_as", "reshape_as", "expand_as", "type_as", "swapaxes",
    "swapdims", "repeat_interleave", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "block_diag", "roll",
    "flip", "index_select", "take_along_dim", "gather", "tril", "triu", "masked_fill",
}  # fmt: skip
_TRANSPOSES: set[Any] = {
    Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__,  # type: ignore[attr-defined]
}  # fmt: skip


def keeps_values(func: Any) -> bool:
    """Whether an operation only moves the values of its first argument."""
    return getattr(func, "__name__", "") in _VALUE_PRESERVING or func in _TRANSPOSES


def may_multiply(func: Any) -> bool:
    """Whether an operation that is in no list here may multiply by a weight: its name says so, or it is a third-party
    operator.
    """
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(func)
        namespace, _, operation = name.partition(".")
        return namespace not in ("aten", "prims", "cpq_lightning", "torchvision") or _is_product(operation)
    return _is_product(getattr(func, "__name__", ""))


def _is_product(name: str) -> bool:
    words = name.lower().strip("_").split("_")
    return any(part in word for word in words for part in _MULTIPLYING) and not name.endswith("_")


def flat_operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec, list[int]]:
    """A call's arguments as a flat list, the structure to restore them, and the indices of the multiplied tensors."""
    leaves, spec = tree_flatten((args, kwargs))
    indices = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if func in _ADDED_FIRST:
        added = args[0] if args else kwargs["input"]
        indices.remove(next(index for index in indices if leaves[index] is added))
    return leaves, spec, indices


def multiply_accumulates(func: Any, args: tuple[Any, ...], operands: list[Tensor], out: Tensor) -> int:
    """Multiply-accumulates of a product of two tensors; 0 for an einsum that does not name all dimensions."""
    if func is not torch.einsum:
        return out.numel() * operands[0].shape[-1]
    terms = str(args[0]).replace(" ", "").partition("->")[0].split(",")
    sizes = {
        letter: size
        for term, t in zip(terms, operands, strict=False)
        for letter, size in zip(term, t.shape, strict=False)
    }
    named = all(len(term) == t.dim() for term, t in zip(terms, operands, strict=False))
    return math.prod(sizes.values()) if named else 0


def product_operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call multiplies: two, or three for attention."""
    if func in WITH_WEIGHT or func is F.scaled_dot_product_attention:
        names = ("input", "weight") if func in WITH_WEIGHT else ("query", "key", "value")
        return [args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names)]
    leaves, _, indices = flat_operands(func, args, kwargs)
    return [leaves[index] for index in indices]
