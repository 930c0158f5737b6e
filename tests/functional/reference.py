"""The categorical written out over the whole grid and differentiated by autograd: slow, float64, easy to read."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def reference(x, step, sigma, masks=None, *, bits, min_bits=None, signed=True, estimator="argmax"):
    """What ``quantize`` must give, for ``x`` within about 1.5 times the grid (far outside, exponentials overflow)."""
    min_bits = bits if min_bits is None else min_bits
    levels = grid(bits, signed)
    ring = ring_of(levels, min_bits, signed)
    if masks is None:
        masks = torch.ones(bits - min_bits + 1, dtype=x.dtype)
    per_element = masks.reshape(*_aligned(masks, x)).expand(-1, *x.shape)
    m = per_element[ring].movedim(0, -1)

    u, s = (x / step).unsqueeze(-1), (sigma / step).unsqueeze(-1)
    upper, lower = (levels + 0.5 - u) / s, (levels - 0.5 - u) / s
    # log(S(B) - S(A)) = log S(B) + log S(-A) + log(1 - exp(A - B)), here minus its largest kept value, which cancels.
    log_p = torch.nn.functional.logsigmoid(upper) + torch.nn.functional.logsigmoid(-lower)
    log_p = log_p + torch.log1p(-torch.exp(lower - upper))
    largest = torch.where(m > 0, log_p, -torch.inf).amax(-1, keepdim=True).detach()
    p = torch.exp(log_p - largest)
    pi = m * p / (m * p).sum(-1, keepdim=True)

    chosen = pi.detach().argmax(-1, keepdim=True)
    n = levels[chosen].squeeze(-1)
    surrogate = n * pi.gather(-1, chosen).squeeze(-1) if estimator == "argmax" else (levels * pi).sum(-1)
    # The chosen point itself, and the surrogate's derivative times a step that is held.
    return step * n + step.detach() * (surrogate - surrogate.detach())


def grid(bits, signed):
    """All levels, in steps."""
    levels = torch.arange(2**bits, dtype=torch.float64)
    return levels - 2 ** (bits - 1) if signed else levels


def ring_of(levels, min_bits, signed):
    """Index of the ring that each level lies in: how many bits over ``min_bits`` it takes to write it."""
    ring = torch.zeros(len(levels), dtype=torch.long)
    for i, level in enumerate(levels.tolist()):
        while not _fits(level, min_bits + int(ring[i]), signed):
            ring[i] += 1
    return ring


def _fits(level, bits, signed):
    return -(2 ** (bits - 1)) <= level < 2 ** (bits - 1) if signed else 0 <= level < 2**bits


def _aligned(masks, x):
    """Shape of masks with ones for the leading dimensions that broadcasting to x would add."""
    return (len(masks), *[1] * (x.dim() - masks.dim() + 1), *masks.shape[1:])


class Recorder(TorchDispatchMode):
    """Counts the ATen calls made within it and notes the size of the largest tensor that any of them returned."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel(), t.untyped_storage().nbytes() // t.element_size())
        return out
