"""Nesting by resolution: each further bit halves the step and keeps the range.

This project's; the paper nests by range, as :func:`cpq_lightning.functional.quantize` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpq_lightning.functional.categorical import Estimator, quantize_unchecked
from cpq_lightning.functional.dropbits import shares_from_masks
from cpq_lightning.functional.modes import is_transformed


def quantize_resolution(
    x: Tensor,
    step: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    *,
    bits: int,
    min_bits: int,
    signed: bool,
    estimator: Estimator,
    scales: Tensor | None = None,
    one_width: Callable[..., Tensor] = quantize_unchecked,
) -> Tensor:
    """``q_min(x) + sum_k m_k (q_k(x) - q_(k-1)(x))`` with ``q_k`` the k-bit CPQ quantizer of step ``step · scale_k``.

    With masks that are all 0 or 1 the result lies on the grid of the widest open bit, whatever else is closed, and
    a mask's gradient is the residual that its bit adds. On a CPU a ``q_k`` that has no share in the result is not
    computed, so that with gates at 0 and 1 it costs as much as one quantizer. Its term in the masks' gradient is left
    out with it: nothing to hard-concrete gates, which have no gradient at 0 and 1.

    Args:
        x: Full-precision values.
        step: Step of the widest grid; broadcasts to ``x``. The noise of ``q_k`` is wider in proportion to its step.
        sigma: Noise of the widest grid, ``0 < sigma <= step``.
        masks: As for :func:`~cpq_lightning.functional.quantize`; ``None`` means all 1.
        bits: Widest width.
        min_bits: Narrowest width.
        signed: Whether the grid holds negative levels.
        estimator: ``"argmax"`` or ``"expectation"``.
        scales: ``scale_k`` of each width from ``min_bits`` to ``bits``, shape ``(rings, *shape)`` with ``shape``
            broadcasting to ``x``; ``None`` means ``2^(bits-k)``, which keeps the range exactly.
        one_width: Computes ``q_k``, with the signature of
            :func:`~cpq_lightning.functional.categorical.quantize_unchecked`.

    Returns:
        A tensor like ``x``.
    """

    def at(k: int, rows: tuple[int, Tensor] | None = None) -> Tensor:
        scale = 2.0 ** (bits - k) if scales is None else scales[k - min_bits]
        own, a, sigma_k = x, step * scale, sigma * scale
        if rows is not None:
            own, a, sigma_k = (_rows(value, *rows) for value in (own, a, sigma_k))
        return one_width(own, a, sigma_k, None, bits=k, min_bits=k, signed=signed, estimator=estimator)

    if masks is None:
        return at(bits)
    # The same sum ordered by quantizer, sum_k (m_k - m_(k+1)) q_k: with masks of 0 and 1 a single q_k is left, exactly.
    shares = shares_from_masks(masks)
    widths = range(min_bits, bits + 1)
    found = [True] * len(shares)
    # What is drawn is read where that costs nothing; compiled code, transforms of torch.func, and a GPU, which would
    # have to wait, compute all widths. And of nothing, nothing is drawn.
    if x.numel() and x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        present = shares.detach().reshape(len(shares), -1) != 0
        channels = [d for d in range(x.dim()) if shares.dim() == x.dim() + 1 and shares.shape[d + 1] > 1]
        if len(channels) == 1:
            # Counted from the right, as what broadcasts to x is aligned.
            return _sum_of_rows(x, shares, present, widths, channels[0] - x.dim(), at)
        found = present.any(1).tolist()
    # A product has the layout of its first factor.
    terms = [at(k) * share.to(x.dtype) for k, share, some in zip(widths, shares, found, strict=True) if some]
    return sum(terms[1:], start=terms[0])


def _sum_of_rows(
    x: Tensor, shares: Tensor, present: Tensor, widths: range, dim: int, at: Callable[..., Tensor]
) -> Tensor:
    """Each width is computed for those channels only that have a share of it."""
    out = torch.zeros_like(x)
    for k, share, some in zip(widths, shares, present.cpu(), strict=True):
        rows = some.nonzero()[:, 0].to(x.device)
        if len(rows):
            term = _rows(share, dim, rows).to(x.dtype) * at(k, (dim, rows))
            out = out.index_add_(dim, rows, term)
    return out


def _rows(value: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Rows of something that broadcasts to x."""
    if value.dim() < -dim or value.shape[dim] == 1:
        return value
    return value.index_select(dim, rows)
