"""The categorical written out over the whole grid and differentiated by autograd: slow, float64, easy to read."""

from decimal import Decimal, localcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpq_lightning.functional.grid import signed_zero_point


def reference(x, scale, sigma, masks=None, *, bits, min_bits=None, zero_point=None, estimator="argmax"):
    """What ``quantize`` must give, for ``x`` within about 1.5 times the grid (far outside, exponentials overflow)."""
    min_bits = bits if min_bits is None else min_bits
    zero_point = signed_zero_point(bits) if zero_point is None else zero_point
    levels = grid(bits, zero_point)
    grid_index = grid_index_of(levels, bits, min_bits, zero_point)
    if masks is None:
        masks = torch.ones(bits - min_bits + 1, dtype=x.dtype)
    per_element = masks.reshape(*_aligned(masks, x)).expand(-1, *x.shape)
    m = per_element[grid_index].movedim(0, -1)

    u, s = (x / scale).unsqueeze(-1), (sigma / scale).unsqueeze(-1)
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
    # The chosen point itself, and the surrogate's derivative times a scale that is constant.
    return scale * n + scale.detach() * (surrogate - surrogate.detach())


def grid(bits, zero_point):
    """All levels, in scales."""
    return torch.arange(2**bits, dtype=torch.float64) - zero_point


def grid_index_of(levels, bits, min_bits, zero_point):
    """Index of the ring that each level lies in: how many bits over ``min_bits`` it takes to write it."""
    grid_index = torch.zeros(len(levels), dtype=torch.long)
    for i, level in enumerate(levels):
        while not _fits(level, bits, min_bits + int(grid_index[i]), zero_point):
            grid_index[i] += 1
    return grid_index


def _fits(level, bits, width, zero_point):
    """The grids of all widths lie around the same zero: each has half of the wider one's levels below it."""
    below = (2**width - 1) / 2 if zero_point % 1 else zero_point // 2 ** (bits - width)
    return -below <= level < 2**width - below


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


def exact(x, scale, sigma, masks, *, bits, min_bits, zero_point):
    """Value of one element and, by estimator, its gradients in x, scale, sigma and each mask, all given as floats.

    Central differences with digits to spare: right however far out x is and however little mass a ring holds.
    """
    values = [Decimal(v) for v in (x, scale, sigma, *masks)]
    levels = [Decimal(float(level)) for level in grid(bits, zero_point)]
    grid_indices = grid_index_of(levels, bits, min_bits, zero_point).tolist()
    # The largest exponent, in decimal digits: masses are that small, and derivatives of closed grids that large.
    digits = int(max(abs(x / scale - float(level)) + 1 for level in levels) * scale / sigma / 2.3)
    with localcontext() as context:
        context.prec = 100 + 3 * digits
        context.Emin, context.Emax = -(10**9), 10**9
        h = Decimal(10) ** (-30 - digits)
        pi = _probabilities(levels, grid_indices, values)
        chosen = max(range(len(levels)), key=lambda i: pi[i])
        gradients = {"argmax": [], "expectation": []}
        for i in range(len(values)):
            up, down = (
                _probabilities(levels, grid_indices, [v + sign * h * (j == i) for j, v in enumerate(values)])
                for sign in (1, -1)
            )
            slopes = [n * (p - q) / (2 * h) for n, p, q in zip(levels, up, down, strict=True)]
            direct = levels[chosen] if i == 1 else Decimal(0)
            gradients["argmax"].append(float(direct + values[1] * slopes[chosen]))
            gradients["expectation"].append(float(direct + values[1] * sum(slopes)))
        return float(levels[chosen] * values[1]), gradients


def _probabilities(levels, grid_indices, values):
    x, scale, sigma, *masks = values
    above = [1 / (1 + ((x - (levels[0] + i - Decimal("0.5")) * scale) / sigma).exp()) for i in range(len(levels) + 1)]
    mass = [masks[grid_index] * (above[i + 1] - above[i]) for i, grid_index in enumerate(grid_indices)]
    total = sum(mass)
    return [m / total for m in mass]
