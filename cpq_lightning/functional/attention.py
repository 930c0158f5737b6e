"""Attention in two products, each of whose operands passes a function of its own first."""

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
    r"""``F.scaled_dot_product_attention`` with functions around what is multiplied.

    .. math:: f_w(\mathrm{softmax}(f_q(s\,q)\, f_k(k)^\top + m))\, f_v(v), \quad (f_q, f_k, f_w, f_v) = \text{operands}

    Args:
        query: Shape (..., heads, L, E).
        key: Shape (..., heads, S, E).
        value: Shape (..., heads, S, Ev).
        attn_mask: Boolean (``True`` takes part) or added to the scores; broadcasts to (..., L, S).
        dropout_p: Probability with which attention weights are dropped, behind the softmax.
        is_causal: Whether a query sees only keys up to its own place.
        scale: :math:`s`, by default ``1/sqrt(E)``.
        enable_gqa: Whether keys and values have fewer heads, each for several of the queries'.
        operands: The four functions, such as quantizers: of ``s·q``, ``k``, the attention weights and ``v``.

    Returns:
        Shape (..., heads, L, Ev).

    Raises:
        ValueError: ``is_causal`` together with a mask.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal=True and attn_mask exclude each other: put the causal mask into attn_mask.")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    of_query, of_key, of_weights, of_value = operands
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = of_query(query * scale) @ of_key(key).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if hidden else scores + attn_mask.to(scores.dtype)
    weights = scores.softmax(-1)
    if attn_mask is not None:
        # A query that sees no key attends to nothing.
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    weights = torch.dropout(weights, dropout_p, train=dropout_p > 0)
    return of_weights(weights) @ of_value(value)
