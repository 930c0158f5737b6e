"""The quantizer's forward and backward on a CUDA device: one read and one write of each element in each direction.

The mathematics and names are those of functional/categorical.py, truncated.py and mixture.py, which give the sources.
The kernels are in Triton, which is installed with PyTorch for CUDA. Nothing is imported or compiled before the first
use, and :func:`unavailable` gives the reason if that fails. The host reads no values of tensors, and the division of
work depends on shapes only. So sums are reproducible, and launches can be captured in a CUDA graph once a first launch
has compiled each variant.
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
_compile_lock = Lock()

# Supported dtypes of tensors; all computation is in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Elements that a program computes at a time: four per thread. More would not fit into the registers in backward.
_TILE = 512
_WARP = 32 * 4
# Maximum number of programs: many per multiprocessor of a large device, but few partial sums.
_PROGRAMS = 16384


def forward(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Quantize each value to its nearest level: ``step * clamp(round(x / step), low, high)``.

    Args:
        x: At least one value, any shape and strides, one of :data:`DTYPES`.
        step: The scale, > 0, in the unit of ``x``; one value, or one for each of the ``len(x)`` rows.
        low: Lowest level, in units of the scale.
        high: Highest level, in units of the scale.

    Returns:
        A tensor like ``x``, equal to functional's result; NaN stays NaN, and no zero is negative.
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
    """Gradients with respect to ``x``, ``step`` and ``sigma``, from the one with respect to :func:`forward`'s result.

    Args:
        x: Values, as for :func:`forward`.
        grad: Gradient of the loss in the result of forward, shape and dtype of ``x``, any strides.
        step: The scale, as for :func:`forward`.
        sigma: Scale parameter of the noise, ``0 < sigma <= step``, in the unit of ``x``, shape of ``step``.
        low: Lowest level, in units of the scale.
        high: Highest level, in units of the scale.
        expectation: Whether the estimator is ``"expectation"``; ``False`` means ``"argmax"``.

    Returns:
        The three gradients, with the shapes and dtypes of ``x``, ``step`` and ``sigma``.
    """
    x, a, noise = _dense(x, step), step.contiguous(), sigma.contiguous()
    # The kernel iterates over memory, so both need the same strides.
    grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    dx = torch.empty_like(x)
    launch, options = _division(x, a)
    sums = torch.empty((2, a.numel(), launch[0] // a.numel()), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernels().backward[launch](
            x, grad, a, noise, dx, sums, float(low), float(high), EXPECTATION=expectation, **options
        )
    # Two separate sums, as results of a custom operator must not share memory.
    d_step, d_sigma = (part.sum(-1) for part in sums)
    return dx, d_step.to(step.dtype).view(step.shape), d_sigma.to(sigma.dtype).view(sigma.shape)


def unavailable() -> str | None:
    """Reason why the kernels cannot be used, or ``None`` if a trial launch gave correct results."""
    if torch.version.hip is not None:
        return "this PyTorch is for ROCm, and the kernels are for CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not _tried.cache_info().currsize and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and the kernels have not been compiled before"
    return _tried()


@cache
def _tried() -> str | None:
    try:
        _kernels()
        x, a = torch.tensor([-9.0, 0.3, 0.75], device="cuda"), torch.tensor([0.5], device="cuda")
        out = forward(x, a, -4, 3).tolist()
        grads = [grad.isfinite().all().item() for grad in backward(x, x, a, a, -4, 3, True)]
        reason = (
            None
            if out == [-2.0, 0.5, 1.0] and all(grads)
            else f"Triton's compiler gave {out} instead of [-2.0, 0.5, 1.0]"
        )
    # Any error (no Triton, no host compiler, an unsupported GPU) means that functional computes.
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    log.info("CPQ kernels on CUDA: %s", reason or "compiled by Triton")
    return reason


def _dense(x: Tensor, step: Tensor) -> Tensor:
    """x, or a copy of it, without gaps or overlaps in memory; with one scale per row, rows in order."""
    if x.is_contiguous():
        return x
    if step.numel() > 1:
        in_rows = x.stride(0) == x.numel() // len(x)
        return x if in_rows and torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()
    return dense_in_memory(x)


def _division(x: Tensor, step: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The launch grid (number of programs) and kernel options. Each program computes a number of tiles of one row."""
    rows = step.numel()
    length = x.numel() // rows
    tile = max(_WARP, min(_TILE, 1 << (length - 1).bit_length()))
    tiles = -(-length // tile)
    tiles_each = min(tiles, -(-tiles * rows // _PROGRAMS))
    programs = -(-tiles // tiles_each)
    options = {"length": length, "programs": programs, "tiles": tiles_each, "TILE": tile, "num_warps": tile // _WARP}
    return (rows * programs,), options


class _Kernels(NamedTuple):
    forward: Any
    backward: Any


@cache
def _kernels() -> _Kernels:
    with _compile_lock:
        import triton
        import triton.language

        # Triton looks up the names in a kernel among the module's globals.
        globals()["tl"] = triton.language
        for helper in (_part, _in_scale_units, _level, _derive, _edges, _reciprocal):
            # A previous attempt that failed may have wrapped some helpers already.
            is_wrapped = isinstance(helper, triton.JITFunction)
            globals()[helper.__name__] = helper if is_wrapped else triton.jit(helper)
        # Do not compile again for other numbers of programs and tiles: that would not make the code faster.
        jit = triton.jit(do_not_specialize=["programs", "tiles"])
        return _Kernels(jit(_forward), jit(_backward))


def _forward(
    x, steps, out, low, high, length, programs, tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program of :func:`forward`."""
    row, start, count = _part(length, programs, tiles, TILE)
    a = tl.load(steps + row).to(tl.float32)
    lane = tl.arange(0, TILE)
    for begin in range(0, count, TILE):
        inside = begin + lane < count
        values = tl.load(x + start + begin + lane, inside, 0.0).to(tl.float32)
        n = _level(_in_scale_units(values, a, low, high), low, high)
        tl.store(out + start + begin + lane, n * a, inside)


def _backward(
    x, grad, steps, sigmas, dx, sums, low, high, length, programs, tiles,
    TILE: tl.constexpr, EXPECTATION: tl.constexpr,
):  # fmt: skip
    """One program of :func:`backward`. It writes one partial sum to each of the two rows of ``sums``."""
    row, start, count = _part(length, programs, tiles, TILE)
    a = tl.load(steps + row).to(tl.float32)
    inv_s = tl.div_rn(a, tl.load(sigmas + row).to(tl.float32))
    lane = tl.arange(0, TILE)
    d_step = tl.zeros((TILE,), tl.float32)
    d_sigma = tl.zeros((TILE,), tl.float32)
    for begin in range(0, count, TILE):
        inside = begin + lane < count
        g = tl.load(grad + start + begin + lane, inside, 0.0).to(tl.float32)
        u = _in_scale_units(tl.load(x + start + begin + lane, inside, 0.0).to(tl.float32), a, low, high)
        n = _level(u, low, high)
        k0, k1 = _derive(u, n, inv_s, low, high, EXPECTATION)
        tl.store(dx + start + begin + lane, g * (-k0 * inv_s), inside)
        d_step += g * (n + (n * k0 + k1) * inv_s)
        d_sigma += g * ((u - n) * k0 - k1)
    program = tl.program_id(0)
    tl.store(sums + program, tl.sum(d_step, 0))
    tl.store(sums + tl.num_programs(0) + program, tl.sum(d_sigma, 0) * (inv_s * inv_s))


def _part(length, programs, tiles, TILE: tl.constexpr):
    """The row of this program, its first element, and its number of elements."""
    program = tl.program_id(0)
    row = program // programs
    # The number of elements of a tensor may exceed 32 bits, that of a program does not.
    first = (program % programs).to(tl.int64) * (tiles * TILE)
    count = tl.minimum(length - first, tiles * TILE).to(tl.int32)
    return row, row.to(tl.int64) * length + first, count


def _in_scale_units(x, a, low, high):
    # Beyond 64 scales from the grid only ratios of masses matter, and they have reached their limit.
    x = tl.clamp(x, (low - 64) * a, (high + 64) * a, propagate_nan=tl.PropagateNan.ALL)
    # The correctly rounded quotient if nothing over- or underflows (scales from 1e-30 to 1e30), with a single division
    # for all elements: a product with the rounded reciprocal, corrected once.
    inv_a = tl.div_rn(1.0, a)
    u = x * inv_a
    return tl.fma(tl.fma(-u, a, x), inv_a, u)


def _level(u, low, high):
    # Round to nearest, ties to even; exact below 2^22.
    return tl.clamp((u + 12582912.0) - 12582912.0, low, high, propagate_nan=tl.PropagateNan.ALL)


def _derive(u, n, inv_s, low, high, EXPECTATION: tl.constexpr):
    """The moments k0 and k1 of functional, for values u (in units of the scale) and their levels n."""
    # The grid is reflected so that its upper edge is the nearer one: at least half of the levels lie below n, and u is
    # above n + 1/2 only beyond that edge. Levels and boundaries are relative to n; the lowest level is -below.
    inner = high - low
    off = n - (low + high) * 0.5
    side = tl.where(off > 0, 1.0, -1.0)
    above = inner * 0.5 - tl.abs(off)
    below = inner - above
    v = side * (u - n)
    v0 = tl.minimum(v, 0.5, propagate_nan=tl.PropagateNan.ALL)
    # Odds at the boundaries of the cell (left, right) and of the grid (e, g); on the lower side divided by y, which is
    # 1 if u is inside the grid. q is the ratio of the odds at neighbouring boundaries.
    rate = inv_s * 1.4426950408889634
    shift = v0 * rate
    y = tl.exp2((v0 - v) * rate)
    left = tl.exp2(-0.5 * rate - shift)
    right = tl.exp2(shift - 0.5 * rate)
    q = tl.exp2(-rate)
    if EXPECTATION:
        # Boundaries left of n have odds left * q^j and right of n right * q^j, j from 0. Sums of q^j p give the mean,
        # sums of q^j p^2 and t q^j p^2 the slopes. exp(-14.5) is the weight of the first boundary that is left out.
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
        # Boundaries this far away exist on the lower side only.
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
    # If u is so far from the grid that the sum of z-derivatives is below rounding, it is 0.
    return tl.where(y > 1.1920929e-07, k0, 0.0), k1


def _edges(y, shift, rate, inner, above):
    """Three factors of the inverse mass; the mass beyond each edge of the grid and S' there, both over the mass."""
    e = tl.exp2(-0.5 * rate - shift - (inner - above) * rate)
    g = tl.exp2(shift - 0.5 * rate - above * rate)
    # The mass between boundaries i scales apart, whose odds have the product q^i, is (1 - q^i) / ((1 + y e) (y + g)).
    full = 1 / (1 - tl.exp2(-rate - inner * rate))
    low_side = 1 + y * e
    high_side = y + g
    edge_low = e * high_side * full
    edge_high = g * low_side * full
    at_low = edge_low * _reciprocal(low_side)
    at_high = edge_high * _reciprocal(high_side)
    return low_side, high_side, full, edge_low, edge_high, at_low, at_high


# Not annotated: with Python 3.10, Triton mistakes a typing.Any in a signature for a function to compile.
def _reciprocal(x):
    # One instruction, accurate to the last bit for numbers that are neither tiny nor huge; a division takes seven.
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
