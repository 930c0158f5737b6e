"""DropBits: random gates that drop the levels that a bit adds to a grid, during training.

Gates are hard-concrete samples (Louizos et al., *Learning Sparse Neural Networks through L0 Regularization*, ICLR 2018,
arXiv 1712.01312, eq. 10-11). Dropping bits instead of neurons is from CPQ (arXiv 2109.02100). The counter-based noise
is ours: a resumed run draws the same gates, and quantizers do not advance the generator that user code draws from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3
# A gate without noise is closed if its logit is at most beta times this.
_THRESHOLD = math.log(-GAMMA / ZETA)


def hard_concrete(
    logit: Tensor, uniform: Tensor, *, noise: Tensor | float = 1.0, beta: Tensor | float = BETA
) -> Tensor:
    """Sample gates ``z = clip(S((nu (log u - log(1-u)) + logit)/beta) (zeta - gamma) + gamma, 0, 1)``.

    Args:
        logit: Log-odds of the gates, any shape; ``inf`` always gives 1.
        uniform: Noise ``u`` strictly between 0 and 1; broadcasts with ``logit``.
        noise: ``nu``, factor of the noise: 1 samples (the source's), near 0 is almost deterministic (ours). Broadcasts.
        beta: Temperature of the gates, over 0. Broadcasts.

    Example:
        >>> hard_concrete(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor(0.5))
        tensor([0.0000, 0.5000, 1.0000])
    """
    s = torch.sigmoid((noise * torch.logit(uniform) + logit) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(logit: Tensor, *, noise: Tensor | float = 1.0, beta: Tensor | float = BETA) -> Tensor:
    """``P(z > 0) = S((logit - beta log(-gamma/zeta)) / nu)``; arguments as for :func:`hard_concrete`."""
    return torch.sigmoid((logit - beta * _THRESHOLD) / noise)


def logit_of(probability: Tensor, *, noise: Tensor | float = 1.0, beta: Tensor | float = BETA) -> Tensor:
    """The logit at which a gate is open with the given probability: the inverse of :func:`open_probability`.

    Example:
        >>> open_probability(logit_of(torch.tensor([0.3, 0.9])))
        tensor([0.3000, 0.9000])
    """
    return noise * torch.logit(probability) + beta * _THRESHOLD


def expected_bits(probability: Tensor, min_bits: Tensor | int) -> Tensor:
    """``b_min + sum_k prod_(j<=k) P(z_j > 0)``: a gate counts only if all gates of narrower widths are open.

    Args:
        probability: Probability that each gate above ``min_bits`` is open, shape ``(gates, *shape)``, narrowest first.
        min_bits: Narrowest width; broadcasts to ``shape``.

    Returns:
        Expected bits, shape ``shape``.

    Example:
        >>> expected_bits(torch.tensor([1.0, 0.5, 0.5]), min_bits=2)
        tensor(3.7500)
    """
    return min_bits + probability.cumprod(0).sum(0)


def expected_slope(probability: Tensor, noise: Tensor | float, worth: Tensor | None = None) -> Tensor:
    """Gradient of ``sum_k worth_k prod_(j<=k) P(z_j > 0)`` in the gates' logits.

    ``(1 - p_k)/nu · sum_(j>=k) worth_j prod_(i<=j) p_i``: a gate that closes also closes all gates of wider widths.

    Args:
        probability: ``p``, the probability that each gate is open, shape ``(gates, *shape)``, narrowest first.
        noise: ``nu``, as for :func:`open_probability`.
        worth: Weight of each bit, such as its saliency; ``None`` means 1, the gradient of :func:`expected_bits`.

    Returns:
        A tensor of the shape of ``probability``.

    Example:
        >>> expected_slope(torch.tensor([0.5, 0.5]), 1.0)
        tensor([0.3750, 0.1250])
    """
    counted = probability.cumprod(0)
    if worth is not None:
        counted = counted * worth
    # Not cumsum, which has no deterministic implementation on GPUs.
    sums = torch.stack([counted[k:].sum(0) for k in range(len(counted))])
    return sums * (1 - probability) / noise


def open_gates(probability: Tensor) -> Tensor:
    """Gates of evaluation: 1 up to the last gate before the first one with ``P(z > 0) < 1/2``, then 0.

    Example:
        >>> open_gates(torch.tensor([0.9, 0.2, 0.9]))
        tensor([1., 0., 0.])
    """
    return (probability >= 0.5).to(probability.dtype).cumprod(0)


def masks_from_gates(gates: Tensor) -> Tensor:
    """Masks of nested grids, ``m_k = z_(b_min+1) · … · z_k``; that of the narrowest grid is 1.

    Args:
        gates: One gate for each width above the narrowest, shape ``(widths - 1, *shape)``, narrowest first.

    Returns:
        Masks of shape ``(widths, *shape)``. They do not increase, so the levels that are kept are contiguous.

    Example:
        >>> masks_from_gates(torch.tensor([1.0, 0.5, 0.5]))
        tensor([1.0000, 1.0000, 0.5000, 0.2500])
    """
    return torch.cat([gates.new_ones((1, *gates.shape[1:])), gates.cumprod(0)])


def shares_from_masks(masks: Tensor) -> Tensor:
    """Weight of each nested grid: ``m_k - m_(k+1)``, and ``m_b`` for the widest. The weights add up to 1.

    Args:
        masks: As returned by :func:`masks_from_gates`.

    Returns:
        Weights, of the same shape as ``masks``.

    Example:
        >>> shares_from_masks(torch.tensor([1.0, 1.0, 0.25]))
        tensor([0.0000, 0.7500, 0.2500])
    """
    return torch.cat([masks[:-1] - masks[1:], masks[-1:]])


_MASK32 = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """A bijective 32-bit hash finalizer (xor-shift-multiply), in int64 so that no product overflows."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & _MASK32
    h = ((h ^ (h >> 15)) * 0x735A2D97) & _MASK32
    return h ^ (h >> 15)


def keyed_uniform(shape: tuple[int, ...], seed: int, step: Tensor, key: int) -> Tensor:
    """Uniform noise in (0, 1), a pure function of ``(seed, step, key)`` and the element's index.

    A counter-based generator of tensor operations: it has no state to save, causes no host-device synchronization, and
    gives the same numbers on every device, under compilation, and after a resume.

    Args:
        shape: Shape of the result.
        seed: Seed of the run.
        step: Counter of the draw, an int64 tensor of one element.
        key: Number of the quantizer that draws.

    Example:
        >>> keyed_uniform((3,), 0, torch.tensor(7), 1).equal(keyed_uniform((3,), 0, torch.tensor(7), 1))
        True
    """
    index = torch.arange(math.prod(shape), device=step.device)
    counter = step.reshape(-1)[:1]
    constants = [torch.full_like(counter, word & _MASK32) for word in (seed, seed >> 32, key)]
    h = torch.zeros_like(index)
    for word in (*constants, counter & _MASK32, (counter >> 32) & _MASK32, index):
        h = _mix((h * 0x9E3779B1 + word + 1) & _MASK32)
    # 23 bits plus one half: exact in float32, so never 0 or 1.
    return ((h >> 9).to(torch.float32) + 0.5).mul(2.0**-23).reshape(shape)
