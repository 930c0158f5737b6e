"""DropBits: random gates that drop the outer rings of a grid during training.

Gates are hard-concrete samples (Louizos et al., *Learning Sparse Neural Networks through L0 Regularization*, ICLR
2018, arXiv 1712.01312, eq. 10-11); dropping bits instead of neurons is CPQ's (arXiv 2109.02100). Noise keyed by
counters instead of a generator's state is this project's: a resumed run draws the same gates, and nobody's
dropout changes because a quantizer was added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3
# A gate with noise-free argument below beta times this is closed.
_THRESHOLD = math.log(-GAMMA / ZETA)


def hard_concrete(logit: Tensor, uniform: Tensor, noise: Tensor | float = 1.0, beta: Tensor | float = BETA) -> Tensor:
    """Sample gates ``z = clip(S((nu (log u - log(1-u)) + logit)/beta) (zeta - gamma) + gamma, 0, 1)``.

    Args:
        logit: Log-odds of the gates, any shape; ``inf`` gives 1 for certain.
        uniform: Noise ``u`` strictly between 0 and 1; broadcasts with ``logit``.
        noise: ``nu``, how much of the noise is left: 1 samples (the source's), near 0 decides (ours). Broadcasts.
        beta: Temperature of the gates, over 0. Broadcasts.

    Example:
        >>> hard_concrete(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor(0.5))
        tensor([0.0000, 0.5000, 1.0000])
    """
    s = torch.sigmoid((noise * torch.logit(uniform) + logit) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(logit: Tensor, noise: Tensor | float = 1.0, beta: Tensor | float = BETA) -> Tensor:
    """``P(z > 0) = S((logit - beta log(-gamma/zeta)) / nu)``; arguments as for :func:`hard_concrete`."""
    return torch.sigmoid((logit - beta * _THRESHOLD) / noise)


def logit_of(probability: Tensor, noise: Tensor | float = 1.0, beta: Tensor | float = BETA) -> Tensor:
    """The logit at which a gate is open with the given probability: the inverse of :func:`open_probability`.

    Example:
        >>> open_probability(logit_of(torch.tensor([0.3, 0.9])))
        tensor([0.3000, 0.9000])
    """
    return noise * torch.logit(probability) + beta * _THRESHOLD


def expected_bits(probability: Tensor, min_bits: Tensor | int) -> Tensor:
    """``b_min + sum_k prod_(j<=k) P(z_j > 0)``: nested gates count as far as all before them are open.

    Args:
        probability: Of each gate above ``min_bits`` to be open, shape ``(gates, *shape)``, innermost first.
        min_bits: Narrowest width; broadcasts to ``shape``.

    Returns:
        Bits, shape ``shape``.

    Example:
        >>> expected_bits(torch.tensor([1.0, 0.5, 0.5]), min_bits=2)
        tensor(3.7500)
    """
    return min_bits + probability.cumprod(0).sum(0)


def expected_slope(probability: Tensor, noise: Tensor | float, worth: Tensor | None = None) -> Tensor:
    """Gradient of ``sum_k worth_k prod_(j<=k) P(z_j > 0)`` in the gates' logits.

    ``(1 - p_k)/nu · sum_(j>=k) worth_j prod_(i<=j) p_i``: with a gate, all behind it shut.

    Args:
        probability: ``p``, of each gate to be open, shape ``(gates, *shape)``, innermost first.
        noise: ``nu``, as for :func:`open_probability`.
        worth: Of each bit; ``None`` is 1 for all, which makes it the gradient of :func:`expected_bits`.

    Returns:
        A tensor of the shape of ``probability``.

    Example:
        >>> expected_slope(torch.tensor([0.5, 0.5]), 1.0)
        tensor([0.3750, 0.1250])
    """
    counted = probability.cumprod(0)
    if worth is not None:
        counted = counted * worth
    # Not a cumulative sum, which has no deterministic way on GPUs.
    behind = torch.stack([counted[k:].sum(0) for k in range(len(counted))])
    return behind * (1 - probability) / noise


def open_gates(probability: Tensor) -> Tensor:
    """What evaluation makes of the gates: 1 for the leading ones with ``P(z > 0) >= 1/2``, 0 for all others.

    Example:
        >>> open_gates(torch.tensor([0.9, 0.2, 0.9]))
        tensor([1., 0., 0.])
    """
    return (probability >= 0.5).to(probability.dtype).cumprod(0)


def masks_from_gates(gates: Tensor) -> Tensor:
    """Nested masks of a grid's rings, ``m_k = z_(b_min+1) · … · z_k``, the innermost one 1.

    Args:
        gates: One gate a ring above the innermost, shape ``(rings - 1, *shape)``, innermost first.

    Returns:
        Masks of shape ``(rings, *shape)``, not increasing, so that a kept grid has no hole.

    Example:
        >>> masks_from_gates(torch.tensor([1.0, 0.5, 0.5]))
        tensor([1.0000, 1.0000, 0.5000, 0.2500])
    """
    return torch.cat([gates.new_ones((1, *gates.shape[1:])), gates.cumprod(0)])


def shares_from_masks(masks: Tensor) -> Tensor:
    """How much each nested grid counts, ``m_k - m_(k+1)``, the widest one ``m_b``: they add up to 1.

    Args:
        masks: As :func:`masks_from_gates` gives them.

    Returns:
        Shares of the masks' shape.

    Example:
        >>> shares_from_masks(torch.tensor([1.0, 1.0, 0.25]))
        tensor([0.0000, 0.7500, 0.2500])
    """
    return torch.cat([masks[:-1] - masks[1:], masks[-1:]])


_MASK32 = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """A bijective 32-bit finalizer (xor-shift-multiply), in int64 so that no product overflows a sign."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & _MASK32
    h = ((h ^ (h >> 15)) * 0x735A2D97) & _MASK32
    return h ^ (h >> 15)


def keyed_uniform(shape: tuple[int, ...], seed: int, step: Tensor, key: int) -> Tensor:
    """Uniform noise in (0, 1), a pure function of ``(seed, step, key)`` and the element's index.

    A counter-based generator: tensor operations only, so it has no state to save, reads nothing back from the
    device, and gives the same numbers on every device, under compilation, and after a resume.

    Args:
        shape: Shape of the result.
        seed: Seed of the run.
        step: Counter of the draw, an int64 tensor of one element.
        key: Which quantizer draws.

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
    # 23 bits and a half: exact in float32, so never 0 or 1.
    return ((h >> 9).to(torch.float32) + 0.5).mul(2.0**-23).reshape(shape)
