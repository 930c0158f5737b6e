"""Nesting by resolution: each further bit halves the scale and keeps the range.

This is ours. The paper nests by range, as :func:`cpq_lightning.functional.quantize` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpq_lightning.functional.categorical import Estimator, quantize_unchecked
from cpq_lightning.functional.dropbits import shares_from_masks
from cpq_lightning.functional.modes import is_transformed


def quantize_resolution(
    x: Tensor,
    scale: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    *,
    bits: int,
    min_bits: int,
    zero_points: Sequence[float],
    estimator: Estimator,
    width_scales: Tensor | None = None,
    one_width: Callable[..., Tensor] = quantize_unchecked,
) -> Tensor:
    """``q_min(x) + sum_k m_k (q_k(x) - q_(k-1)(x))`` with ``q_k`` the k-bit CPQ quantizer of scale ``scale · r_k``.

    If all masks are 0 or 1, the result lies on the grid of the widest open width, and the gradient in a mask is the
    residual that its bit adds. On a CPU, a ``q_k`` with weight 0 in the result is not computed, so gates of 0 and 1
    cost as much as a single quantizer. Its term in the masks' gradient is then missing, which does not change the
    gradient of hard-concrete gates: it is zero at 0 and 1.

    Args:
        x: Full-precision values.
        scale: Scale of the widest grid; broadcasts to ``x``. The noise of ``q_k`` grows in proportion to its scale.
        sigma: Scale parameter of the noise of the widest grid, ``0 < sigma <= scale``.
        masks: As for :func:`~cpq_lightning.functional.quantize`; ``None`` means all 1.
        bits: Widest width.
        min_bits: Narrowest width.
        zero_points: Zero point of each width from ``min_bits`` to ``bits``.
        estimator: ``"argmax"`` or ``"expectation"``.
        width_scales: ``r_k`` of each width from ``min_bits`` to ``bits``, shape ``(widths, *shape)`` with ``shape``
            broadcasting to ``x``; ``None`` means ``2^(bits-k)``, which keeps the range exactly.
        one_width: Function that computes ``q_k``, with the signature of
            :func:`~cpq_lightning.functional.categorical.quantize_unchecked`.

    Returns:
        A tensor like ``x``.
    """

    def quantize_at(k: int, rows: tuple[int, Tensor] | None = None) -> Tensor:
        width_scale = 2.0 ** (bits - k) if width_scales is None else width_scales[k - min_bits]
        values, scale_k, sigma_k = x, scale * width_scale, sigma * width_scale
        if rows is not None:
            values, scale_k, sigma_k = (_rows(tensor, *rows) for tensor in (values, scale_k, sigma_k))
        z = zero_points[k - min_bits]
        return one_width(values, scale_k, sigma_k, None, bits=k, min_bits=k, zero_point=z, estimator=estimator)

    if masks is None:
        return quantize_at(bits)
    # The same sum ordered by quantizer: sum_k (m_k - m_(k+1)) q_k. With masks of 0 and 1 exactly one q_k remains.
    shares = shares_from_masks(masks)
    widths = range(min_bits, bits + 1)
    used = [True] * len(shares)
    # Which widths have a weight is read on the CPU only. A GPU would have to synchronize, and compiled code and
    # torch.func transforms cannot read values: they compute all widths, and so does an empty x.
    if x.numel() and x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        present = shares.detach().reshape(len(shares), -1) != 0
        channels = [d for d in range(x.dim()) if shares.dim() == x.dim() + 1 and shares.shape[d + 1] > 1]
        if len(channels) == 1:
            # A negative dimension, as shapes that broadcast to x are aligned on the right.
            return _sum_of_rows(x, shares, present, widths, channels[0] - x.dim(), quantize_at)
        used = present.any(1).tolist()
    # A product has the memory format of its first factor.
    terms = [quantize_at(k) * share.to(x.dtype) for k, share, use in zip(widths, shares, used, strict=True) if use]
    return sum(terms[1:], start=terms[0])


def _sum_of_rows(
    x: Tensor, shares: Tensor, present: Tensor, widths: range, dim: int, quantize_at: Callable[..., Tensor]
) -> Tensor:
    """Sum over the widths, each computed only for the channels in which it has a weight."""
    out = torch.zeros_like(x)
    for k, share, channels in zip(widths, shares, present.cpu(), strict=True):
        rows = channels.nonzero()[:, 0].to(x.device)
        if len(rows):
            term = _rows(share, dim, rows).to(x.dtype) * quantize_at(k, (dim, rows))
            out = out.index_add_(dim, rows, term)
    return out


def _rows(value: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Select rows of a tensor that broadcasts to x."""
    if value.dim() < -dim or value.shape[dim] == 1:
        return value
    return value.index_select(dim, rows)
