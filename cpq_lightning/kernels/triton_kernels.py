"""The quantizer's forward and backward in Triton: one read and one write of each element in each direction.

The mathematics and names are those of functional/categorical.py, truncated.py and mixture.py, which give the sources.
Only ``cuda.py`` imports this module, at the first use, since Triton may not be installed.
"""

import triton
import triton.language as tl


# Not compiled again for other numbers of programs and tiles: that would not make the code faster.
@triton.jit(do_not_specialize=["programs", "tiles"])
def forward(
    x, scales, out, low, high, length, programs, tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program of :func:`cpq_lightning.kernels.cuda.forward`."""
    row, start, count = _part(length, programs, tiles, TILE)
    a = tl.load(scales + row).to(tl.float32)
    lane = tl.arange(0, TILE)
    # Levels are whole numbers plus half: 1/2 for a balanced grid, else 0.
    half = low - tl.floor(low)
    for begin in range(0, count, TILE):
        inside = begin + lane < count
        values = tl.load(x + start + begin + lane, inside, 0.0).to(tl.float32)
        n = _level(_in_scale_units(values, a, low, high) - half, low - half, high - half) + half
        tl.store(out + start + begin + lane, n * a, inside)


@triton.jit(do_not_specialize=["programs", "tiles"])
def backward(
    x, grad, scales, sigmas, dx, sums, low, high, length, programs, tiles,
    TILE: tl.constexpr, EXPECTATION: tl.constexpr,
):  # fmt: skip
    """One program of :func:`cpq_lightning.kernels.cuda.backward`.

    It writes one partial sum to each of the two rows of ``sums``.
    """
    row, start, count = _part(length, programs, tiles, TILE)
    a = tl.load(scales + row).to(tl.float32)
    inv_s = tl.div_rn(a, tl.load(sigmas + row).to(tl.float32))
    lane = tl.arange(0, TILE)
    d_scale = tl.zeros((TILE,), tl.float32)
    d_sigma = tl.zeros((TILE,), tl.float32)
    half = low - tl.floor(low)
    for begin in range(0, count, TILE):
        inside = begin + lane < count
        g = tl.load(grad + start + begin + lane, inside, 0.0).to(tl.float32)
        u = _in_scale_units(tl.load(x + start + begin + lane, inside, 0.0).to(tl.float32), a, low, high)
        n = _level(u - half, low - half, high - half) + half
        k0, k1 = _derive(u, n, inv_s, low, high, EXPECTATION)
        tl.store(dx + start + begin + lane, g * (-k0 * inv_s), inside)
        d_scale += g * (n + (n * k0 + k1) * inv_s)
        d_sigma += g * ((u - n) * k0 - k1)
    program = tl.program_id(0)
    tl.store(sums + program, tl.sum(d_scale, 0))
    tl.store(sums + tl.num_programs(0) + program, tl.sum(d_sigma, 0) * (inv_s * inv_s))


@triton.jit
def _part(length, programs, tiles, TILE: tl.constexpr):
    """The row of this program, its first element, and its number of elements."""
    program = tl.program_id(0)
    row = program // programs
    # The number of elements of a tensor may exceed 32 bits, that of a program does not.
    first = (program % programs).to(tl.int64) * (tiles * TILE)
    count = tl.minimum(length - first, tiles * TILE).to(tl.int32)
    return row, row.to(tl.int64) * length + first, count


@triton.jit
def _in_scale_units(x, a, low, high):
    # Beyond 64 scales from the grid only ratios of masses matter, and they have reached their limit.
    x = tl.clamp(x, (low - 64) * a, (high + 64) * a, propagate_nan=tl.PropagateNan.ALL)
    # The correctly rounded quotient if nothing over- or underflows (scales from 1e-30 to 1e30), with a single division
    # for all elements: a product with the rounded reciprocal, corrected once.
    inv_a = tl.div_rn(1.0, a)
    u = x * inv_a
    return tl.fma(tl.fma(-u, a, x), inv_a, u)


@triton.jit
def _level(u, low, high):
    # Round to nearest, ties to even; exact below 2^22.
    return tl.clamp((u + 12582912.0) - 12582912.0, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
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
        factor = n * (low_side * high_side) * (inv_low * inv_high) * (full / cell)
        k0 = factor * side * ((cell_at_high - cell_at_low) - (at_high - at_low))
        k1 = factor * (0.5 * (cell_at_high + cell_at_low) - (at_high * (above + 0.5) + at_low * (below + 0.5)))
    # If u is so far from the grid that the sum of z-derivatives is below rounding, it is 0.
    return tl.where(y > 1.1920929e-07, k0, 0.0), k1


@triton.jit
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


@triton.jit
def _reciprocal(x):
    # One instruction, accurate to the last bit for numbers that are neither tiny nor huge; a division takes seven.
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
