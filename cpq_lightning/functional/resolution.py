"""Nesting by resolution: each further bit halves the step and keeps the range.

This project's; the paper nests by range, as :func:`cpq_lightning.functional.quantize` does.
"""

from __future__ import annotations

from torch import Tensor

from cpq_lightning.functional.categorical import Estimator, quantize_unchecked


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
) -> Tensor:
    """``q_min(x) + sum_k m_k (q_k(x) - q_(k-1)(x))`` with ``q_k`` the k-bit CPQ quantizer of step ``step 2^(bits-k)``.

    With masks that are all 0 or 1 the result lies on the grid of the widest open bit, whatever else is closed, and
    a mask's gradient is the residual that its bit adds.

    Args:
        x: Full-precision values.
        step: Step of the widest grid; broadcasts to ``x``. The noise of ``q_k`` is wider in proportion to its step.
        sigma: Noise of the widest grid, ``0 < sigma <= step``.
        masks: As for :func:`~cpq_lightning.functional.quantize`; ``None`` means all 1.
        bits: Widest width.
        min_bits: Narrowest width.
        signed: Whether the grid holds negative levels.
        estimator: ``"argmax"`` or ``"expectation"``.

    Returns:
        A tensor like ``x``.
    """

    def at(k: int) -> Tensor:
        scale = 2.0 ** (bits - k)
        return quantize_unchecked(
            x, step * scale, sigma * scale, None, bits=k, min_bits=k, signed=signed, estimator=estimator
        )

    if masks is None:
        return at(bits)
    # The same sum ordered by quantizer, sum_k (m_k - m_(k+1)) q_k: with masks of 0 and 1 a single q_k is left, exactly.
    shares = [*(masks[:-1] - masks[1:]), masks[-1]]
    terms = [share.to(x.dtype) * at(k) for k, share in zip(range(min_bits, bits + 1), shares, strict=True)]
    return sum(terms[1:], start=terms[0])
