"""The quantizer's forward and backward of one ring on a CUDA device: one read and one write of each element each way.

The mathematics is that of functional/categorical.py, truncated.py and mixture.py, which say where it comes from; names
are theirs. The kernels are in Triton, whose compiler PyTorch for CUDA brings along: nothing is imported or compiled
before it is needed, and :func:`unavailable` says why it cannot be. The host reads no value of a tensor, and how the
work is divided depends on shapes alone: sums are the same in every run, and launches can be captured in a CUDA graph
once each kind of them has been compiled by a first one.
"""

from __future__ import annotations

import logging
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cpq_lightning.kernels.layout import dense_in_memory

if TYPE_CHECKING:
    import triton.language as tl

log = logging.getLogger("cpq_lightning")
_making = Lock()

# What tensors may hold; everything is computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Elements that a program works on at a time: four to a thread. More would not fit into its registers in backward.
_TILE = 512
_WARP = 32 * 4
# Programs that a long tensor is divided among: many for each multiprocessor of a large device, few sums to add up.
_PROGRAMS = 16384


def forward(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The level nearest to each value, ``step * clamp(round(x / step), low, high)``.

    Args:
        x: Values, any shape and strides, at least one of them; their dtype one of :data:`DTYPES`.
        step: Distance between levels, > 0, in the unit of ``x``; one value, or one for each of the ``len(x)`` rows.
        low: Lowest level, in steps.
        high: Highest level, in steps.

    Returns:
        A tensor like ``x``, equal to functional's; NaN stays NaN, and no zero is negative.
    """
    x, a = _dense(x, step), step.contiguous()
    out = torch.empty_like(x)
    launch, options = _division(x, a)
    with torch.cuda.device_of(x):
        _kernels().forward[launch](x, a, out, float(low), float(high), **options)
    return out


def backward(
    x: Tensor, grad: Tensor, step: Tensor, sigma: Tensor, low: int, high: int, expectation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to ``x``, ``step`` and ``sigma``, given the one with respect to :func:`forward`'s values.

    Args:
        x: Values, as for :func:`forward`.
        grad: Gradient of the loss with respect to what forward returned, shape and dtype of ``x``, any strides.
        step: Distance between levels, as for :func:`forward`.
        sigma: Scale of the noise, ``0 < sigma <= step``, in the unit of ``x``, shape of ``step``.
        low: Lowest level, in steps.
        high: Highest level, in steps.
        expectation: Whether the estimator is ``"expectation"``; else it is ``"argmax"``.

    Returns:
        The three gradients, each with the shape and dtype of what it belongs to.
    """
    x, a, noise = _dense(x, step), step.contiguous(), sigma.contiguous()
    # Both are walked through in memory: they must lie in it alike.
    grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    dx = torch.empty_like(x)
    launch, options = _division(x, a)
    sums = torch.empty((2, a.numel(), launch[0] // a.numel()), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernels().backward[launch](
            x, grad, a, noise, dx, sums, float(low), float(high), EXPECTATION=expectation, **options
        )
    # Not one sum of both: what an operator of torch's returns may not share memory.
    d_step, d_sigma = (part.sum(-1) for part in sums)
    return dx, d_step.to(step.dtype).view(step.shape), d_sigma.to(sigma.dtype).view(sigma.shape)


def unavailable() -> str | None:
    """Why there are no kernels here, in words; ``None`` where a first launch has given what it should."""
    if torch.version.hip is not None:
        return "this PyTorch is for ROCm, and the kernels are for CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not _tried.cache_info().currsize and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and nothing has been compiled before"
    return _tried()


@cache
def _tried() -> str | None:
    try:
        _kernels()
        x, a = torch.tensor([-9.0, 0.3, 0.75], device="cuda"), torch.tensor([0.5], device="cuda")
        out = forward(x, a, -4, 3).tolist()
        grads = [grad.isfinite().all().item() for grad in backward(x, x, a, a, -4, 3, True)]
        reason = None if out == [-2.0, 0.5, 1.0] and all(grads) else f"Triton's compiler gave {out} for -2, 0.5 and 1"
    # Whatever is missing (Triton, a compiler for the host, a processor that it knows), functional can do.
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    log.info("CPQ kernels on CUDA: %s", reason or "compiled by Triton")
    return reason


def _dense(x: Tensor, step: Tensor) -> Tensor:
    """x, or a copy of it, without gaps or overlaps in memory; where rows have steps, one row after another."""
    if x.is_contiguous():
        return x
    if step.numel() > 1:
        in_rows = x.stride(0) == x.numel() // len(x)
        return x if in_rows and torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()
    return dense_in_memory(x)


def _division(x: Tensor, step: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """How many programs there are, and what tells each its part: a number of tiles of a row."""
    rows = step.numel()
    length = x.numel() // rows
    tile = max(_WARP, min(_TILE, 1 << (length - 1).bit_length()))
    tiles = -(-length // tile)
    each = min(tiles, -(-tiles * rows // _PROGRAMS))
    programs = -(-tiles // each)
    options = {"length": length, "programs": programs, "tiles": each, "TILE": tile, "num_warps": tile // _WARP}
    return (rows * programs,), options


class _Kernels(NamedTuple):
    forward: Any
    backward: Any


@cache
def _kernels() -> _Kernels:
    with _making:
        import triton
        import triton.language

        # Triton looks up what a kernel names among the module's globals.
        globals()["tl"] = triton.language
        for helper in (_part, _in_steps, _level, _derive, _edges, _reciprocal):
            # Not again what an attempt before this one has left.
            made = isinstance(helper, triton.JITFunction)
            globals()[helper.__name__] = helper if made else triton.jit(helper)
        # Compiled anew only for what makes code faster, not for each number of programs.
        jit = triton.jit(do_not_specialize=["programs", "tiles"])
        return _Kernels(jit(_forward), jit(_backward))


def _forward(
    x, steps, out, low, high, length, programs, tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program of :func:`forward`."""
    row, at, count = _part(length, programs, tiles, TILE)
    a = tl.load(steps + row).to(tl.float32)
    lane = tl.arange(0, TILE)
    for begin in range(0, count, TILE):
        inside = begin + lane < count
        values = tl.load(x + at + begin + lane, inside, 0.0).to(tl.float32)
        n = _level(_in_steps(values, a, low, high), low, high)
        tl.store(out + at + begin + lane, n * a, inside)


def _backward(
    x, grad, steps, sigmas, dx, sums, low, high, length, programs, tiles,
    TILE: tl.constexpr, EXPECTATION: tl.constexpr,
):  # fmt: skip
    """One program of :func:`backward`; its sums lie behind one another in two rows."""
    row, at, count = _part(length, programs, tiles, TILE)
    a = tl.load(steps + row).to(tl.float32)
    inv_s = tl.div_rn(a, tl.load(sigmas + row).to(tl.float32))
    lane = tl.arange(0, TILE)
    d_step = tl.zeros((TILE,), tl.float32)
    d_sigma = tl.zeros((TILE,), tl.float32)
    for begin in range(0, count, TILE):
        inside = begin + lane < count
        g = tl.load(grad + at + begin + lane, inside, 0.0).to(tl.float32)
        u = _in_steps(tl.load(x + at + begin + lane, inside, 0.0).to(tl.float32), a, low, high)
        n = _level(u, low, high)
        k0, k1 = _derive(u, n, inv_s, low, high, EXPECTATION)
        tl.store(dx + at + begin + lane, g * (-k0 * inv_s), inside)
        d_step += g * (n + (n * k0 + k1) * inv_s)
        d_sigma += g * ((u - n) * k0 - k1)
    program = tl.program_id(0)
    tl.store(sums + program, tl.sum(d_step, 0))
    tl.store(sums + tl.num_programs(0) + program, tl.sum(d_sigma, 0) * (inv_s * inv_s))


def _part(length, programs, tiles, TILE: tl.constexpr):
    """This program's row, its first element and how many elements it has."""
    program = tl.program_id(0)
    row = program // programs
    # A tensor may have more elements than 32 bits count, a program has not.
    first = (program % programs).to(tl.int64) * (tiles * TILE)
    count = tl.minimum(length - first, tiles * TILE).to(tl.int32)
    return row, row.to(tl.int64) * length + first, count


def _in_steps(x, a, low, high):
    # Beyond 64 steps from the grid only ratios of masses matter, and they have reached their limit.
    x = tl.clamp(x, (low - 64) * a, (high + 64) * a, propagate_nan=tl.PropagateNan.ALL)
    # The rounded quotient, as the compiler divides where nothing over- or underflows (steps of 1e-30 to 1e30), but with
    # one division for all: a product with the rounded reciprocal, corrected once.
    inv_a = tl.div_rn(1.0, a)
    u = x * inv_a
    return tl.fma(tl.fma(-u, a, x), inv_a, u)


def _level(u, low, high):
    # To the nearest, ties to even; exact below 2^22.
    return tl.clamp((u + 12582912.0) - 12582912.0, low, high, propagate_nan=tl.PropagateNan.ALL)


def _derive(u, n, inv_s, low, high, EXPECTATION: tl.constexpr):
    """The moments k0 and k1 of functional, of values u in steps with their levels n."""
    # The grid is reflected so that its upper edge is the nearer one: at least half of the levels lie below n, and u is
    # above n + 1/2 only beyond that edge. Levels and boundaries are counted from n, the lowest of them -below.
    inner = high - low
    off = n - (low + high) * 0.5
    side = tl.where(off > 0, 1.0, -1.0)
    above = inner * 0.5 - tl.abs(off)
    below = inner - above
    v = side * (u - n)
    v0 = tl.minimum(v, 0.5, propagate_nan=tl.PropagateNan.ALL)
    # Odds at the boundaries of the cell (left, right) and of the grid (e, g); on the lower side over y, which is 1
    # wherever u is inside the grid. q is what a step away costs.
    rate = inv_s * 1.4426950408889634
    shift = v0 * rate
    y = tl.exp2((v0 - v) * rate)
    left = tl.exp2(-0.5 * rate - shift)
    right = tl.exp2(shift - 0.5 * rate)
    q = tl.exp2(-rate)
    if EXPECTATION:
        # Boundaries left of n have odds left * q^j, right of n right * q^j, j from 0: sums of q^j p for the mean, of
        # q^j p^2 and t q^j p^2 for the slopes. exp(-14.5) is the weight of the first boundary that is left out.
        reach = tl.ceil(tl.minimum(14.5 / inv_s, 15.0))
        both = tl.minimum(reach, (inner + 1) * 0.5).to(tl.int32)
        odds = y * left
        l0 = _reciprocal(1 + odds)
        l1 = l0 * l0
        l2 = 0.5 * l1  # type: ignore[operator]
        r0 = tl.where(above > 0, _reciprocal(1 + right), 0.0)
        r1 = r0 * r0
        r2 = 0.5 * r1
        w = q
        t = 1.5
        for _ in range(1, both):
            p = _reciprocal(1 + w * odds)
            l0 += w * p
            l1 += w * (p * p)
            l2 += (w * t) * (p * p)
            p = tl.where(t < above, _reciprocal(1 + w * right), 0.0)
            r0 += w * p
            r1 += w * (p * p)
            r2 += (w * t) * (p * p)
            w *= q
            t += 1.0
        # Boundaries so far away are there on the lower side only.
        for _ in range(both, tl.minimum(reach, inner).to(tl.int32)):
            p = tl.where(t < below, _reciprocal(1 + w * odds), 0.0)
            l0 += w * p
            l1 += w * (p * p)
            l2 += (w * t) * (p * p)
            w *= q
            t += 1.0
        low_side, high_side, full, edge_low, edge_high, at_low, at_high = _edges(y, shift, rate, inner, above)
        inv_mass = low_side * high_side * full
        mean = edge_low * below - edge_high * above + (right * r0 - left * l0) * inv_mass
        at_high *= above - mean
        at_low *= -below - mean
        k0 = at_high - at_low - (right * r1 + left * l1) * inv_mass
        k1 = side * (at_high * (above + 0.5) + at_low * (below + 0.5) - (right * r2 - left * l2) * inv_mass)
    else:
        low_side, high_side, full, _, _, at_low, at_high = _edges(y, shift, rate, inner, above)
        cell_low = 1 + y * left
        cell_high = y + right
        inv_low = _reciprocal(cell_low)
        inv_high = _reciprocal(cell_high)
        cell = 1 / (1 - q)
        cell_at_low = left * cell_high * inv_low * cell
        cell_at_high = right * cell_low * inv_high * cell
        scale = n * (low_side * high_side) * (inv_low * inv_high) * (full / cell)
        k0 = scale * side * ((cell_at_high - cell_at_low) - (at_high - at_low))
        k1 = scale * (0.5 * (cell_at_high + cell_at_low) - (at_high * (above + 0.5) + at_low * (below + 0.5)))
    # So far away that sums of z-derivatives vanish below rounding.
    return tl.where(y > 1.1920929e-07, k0, 0.0), k1


def _edges(y, shift, rate, inner, above):
    """The inverse mass in its factors; then the mass beyond each edge of the grid and S' there, over the mass."""
    e = tl.exp2(-0.5 * rate - shift - (inner - above) * rate)
    g = tl.exp2(shift - 0.5 * rate - above * rate)
    # Between boundaries i steps apart, whose odds have the product q^i, lies (1 - q^i) / ((1 + y e) (y + g)).
    full = 1 / (1 - tl.exp2(-rate - inner * rate))
    low_side = 1 + y * e
    high_side = y + g
    edge_low = e * high_side * full
    edge_high = g * low_side * full
    at_low = edge_low * _reciprocal(low_side)
    at_high = edge_high * _reciprocal(high_side)
    return low_side, high_side, full, edge_low, edge_high, at_low, at_high


# Without a type: under Python 3.10 Triton takes a typing.Any in a signature for a function that it should compile.
def _reciprocal(x):
    # One instruction, to the last bit, of numbers that are neither tiny nor huge; a division takes seven.
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
