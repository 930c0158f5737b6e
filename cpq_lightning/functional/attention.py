"""Scaled dot-product attention as two matrix products, with a function (a quantizer) applied to each operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operand = Callable[[Tensor], Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    operands: Sequence[Operand],
) -> Tensor:
    r"""``F.scaled_dot_product_attention`` with a function applied to each of the four operands.

    .. math:: f_w(\mathrm{softmax}(f_q(s\,q)\, f_k(k)^\top + m))\, f_v(v), \quad (f_q, f_k, f_w, f_v) = \text{operands}

    Args:
        query: Shape (..., heads, L, E).
        key: Shape (..., heads, S, E).
        value: Shape (..., heads, S, Ev).
        attn_mask: Boolean (``True``: the key takes part), or values added to the scores; broadcasts to (..., L, S).
        dropout_p: Probability with which attention weights are dropped, after the softmax.
        is_causal: Whether a query attends only to keys up to its position.
        scale: :math:`s`, by default ``1/sqrt(E)``.
        enable_gqa: Whether keys and values have fewer heads than queries (grouped-query attention).
        operands: The four functions, such as quantizers, for ``s·q``, ``k``, the attention weights and ``v``.

    Returns:
        Shape (..., heads, L, Ev).

    Raises:
        ValueError: both ``is_causal`` and a mask are given.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal=True and attn_mask exclude each other: put the causal mask into attn_mask.")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    quantize_query, quantize_key, quantize_weights, quantize_value = operands
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = quantize_query(query * scale) @ quantize_key(key).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_boolean else scores + attn_mask.to(scores.dtype)
    weights = scores.softmax(-1)
    if attn_mask is not None:
        # Softmax over no key at all is NaN: such a query gets weights of 0.
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    weights = torch.dropout(weights, dropout_p, train=dropout_p > 0)
    return quantize_weights(weights) @ quantize_value(value)
