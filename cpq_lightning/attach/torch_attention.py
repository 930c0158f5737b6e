"""``nn.MultiheadAttention`` through layers: an in-projection each of queries, keys and values, and ``out_proj``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpq_lightning.attach.decomposed import Decomposed, Part


class AttentionByLayers(Decomposed):
    """Mixin that computes ``nn.MultiheadAttention`` through ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    The result is torch's up to rounding: torch multiplies queries, keys and values in one product where they are the
    same tensor. The products of two activations are single calls of torch's functions, so that ``attention=True`` finds
    them.
    """

    stock: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    other_layers: ClassVar[tuple[str, ...]] = ("out_proj",)

    @classmethod
    def parts_of(cls, module: nn.Module) -> dict[str, Part]:
        assert isinstance(module, nn.MultiheadAttention)
        size = module.embed_dim
        bias = None if module.in_proj_bias is None else "in_proj_bias"
        parts = {}
        for index, letter in enumerate("qkv"):
            rows = (index * size, (index + 1) * size)
            if module._qkv_same_embed_dim:
                parts[f"{letter}_proj"] = Part("in_proj_weight", bias, rows, rows)
            else:
                parts[f"{letter}_proj"] = Part(f"{letter}_proj_weight", bias, None, rows)
        return parts

    @classmethod
    def beside(cls, layer: str) -> tuple[str, ...]:
        return () if layer in cls.other_layers else ("q_proj", "k_proj", "v_proj")

    @classmethod
    def forward_for(cls, stock: type[nn.Module]) -> Callable[..., Any]:
        def forward(self: AttentionByLayers, *args: Any, **kwargs: Any) -> Any:
            self.claim_layers()
            return attend(cast(nn.MultiheadAttention, self), *args, **kwargs)

        return forward


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward of ``nn.MultiheadAttention``, with the same arguments, through its layers.

    Raises:
        ValueError: an input is a nested tensor, a shape or a mask does not fit, or ``is_causal`` comes without a mask.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(
            "A quantized nn.MultiheadAttention takes no nested tensors: give padded tensors and a key_padding_mask."
        )
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True is a hint about attn_mask, which is missing: give the causal mask too.")
    is_batched = query.dim() == 3
    _check(module, query, key, value, key_padding_mask, attn_mask)
    # (batch, positions, features), from either layout.
    q, k, v = (
        x.unsqueeze(0) if not is_batched else x if module.batch_first else x.transpose(0, 1)
        for x in (module.q_proj(query), module.k_proj(key), module.v_proj(value))  # type: ignore[operator]
    )
    batch, heads, head_dim, given = q.shape[0], module.num_heads, module.head_dim, k.shape[1]
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(batch, 1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(batch, 1, -1)], 1)
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _mask(key_padding_mask, attn_mask, batch, k.shape[1] - given, q.dtype)
    q, k, v = (x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in (q, k, v))
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = torch.matmul(q * (1 / math.sqrt(head_dim)), k.transpose(-2, -1))
        weights = (scores if mask is None else scores + mask).softmax(-1)
        if dropout > 0:
            weights = F.dropout(weights, dropout)
        out = torch.matmul(weights, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = out.transpose(1, 2).flatten(2)
    out = out[0] if not is_batched else out if module.batch_first else out.transpose(0, 1)
    out = module.out_proj(out)
    if weights is None:
        return out, None
    weights = weights.mean(1) if average_attn_weights else weights
    return out, weights if is_batched else weights[0]


def _check(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """Refuse what ``nn.MultiheadAttention`` refuses, instead of broadcasting it."""
    name, is_batched = "nn.MultiheadAttention", query.dim() == 3
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        raise ValueError(
            f"{name}: query, key and value must all have three dimensions, or two without a batch, got the shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    batch_dim, length_dim = (0, 1) if module.batch_first else (1, 0)
    lengths = [x.shape[length_dim if is_batched else 0] for x in (query, key, value)]
    batches = [x.shape[batch_dim] if is_batched else 1 for x in (query, key, value)]
    if batches[0] != batches[1] or batches[1] != batches[2] or lengths[1] != lengths[2]:
        raise ValueError(
            f"{name}: key and value must have the same positions, and all inputs the same batch, got the shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)} (batch_first={module.batch_first})."
        )
    padding = (batches[0], lengths[1]) if is_batched else (lengths[1],)
    allowed = {
        "key_padding_mask": (key_padding_mask, [padding]),
        "attn_mask": (attn_mask, [(lengths[0], lengths[1]), (batches[0] * module.num_heads, lengths[0], lengths[1])]),
    }
    for argument, (mask, shapes) in allowed.items():
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"{name}: {argument} must be boolean or floating-point, got {mask.dtype}.")
        if all(mask.shape != shape for shape in shapes):
            raise ValueError(
                f"{name}: {argument} must have the shape {' or '.join(map(str, shapes))} here, got {tuple(mask.shape)}."
            )


def _mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, batch: int, added_keys: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one that is added to scores, broadcastable to (batch, heads, queries, keys).

    Keys that the module adds, a bias or zeros, are never masked.
    """
    parts = []
    if attn_mask is not None:
        # (batch * heads, queries, keys), or (queries, keys).
        shaped = attn_mask.unflatten(0, (batch, -1)) if attn_mask.dim() == 3 else attn_mask
        parts.append(shaped)
    if key_padding_mask is not None:
        parts.append(key_padding_mask.reshape(batch, 1, 1, -1))
    added = [F.pad(_added(part, dtype), (0, added_keys)) for part in parts]
    return added[0] if len(added) == 1 else added[0] + added[1] if added else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as values that are added: a boolean one excludes where it is ``True``."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask.to(dtype)
