"""What holds for every input of the pure functions, whatever its shape, dtype, layout, width and masks."""

import math
from dataclasses import replace

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.rounding import adjust_widths
from cpq_lightning.functional.categorical import quantize
from cpq_lightning.functional.dropbits import (
    hard_concrete,
    keyed_uniform,
    logit_of,
    masks_from_gates,
    open_gates,
    open_probability,
)
from cpq_lightning.functional.grid import level_bounds, nearest_level
from cpq_lightning.functional.ranges import histogram, max_scale, mse_scale
from cpq_lightning.functional.resolution import quantize_resolution
from tests.functional.reference import reference
from tests.grids import KINDS, narrower, zero_point
from tests.strategies import DENSE_LAYOUTS, Case, cases, contiguous, examples, layout, shapes

NAMES = ("value", "x", "scale", "sigma", "masks")
# Of the largest entry: another layout adds and vectorizes in another order; halves round the result.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Gates of 0 and 1 leave one grid to each element; what lies between them weighs grids against each other.
DECIDED = ("open", "shut", "binary")


def differentiate(function, tensors, upstream, **settings):
    """The value and the gradients of leaves that lie in memory where the tensors lie."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **settings)
    out.backward(upstream)
    return [out.detach(), *(None if t is None else t.grad for t in leaves)]


def settled(case, tensors):
    """Where gates between 0 and 1 decide for a level by more than rounding: 1, else 0."""
    x, scale, sigma, masks = tensors
    if masks is None or case.gates in DECIDED:
        return torch.ones_like(x)
    levels = [
        quantize(x, scale, sigma, torch.cat([masks[:1], (masks[1:] * factor).clamp(max=1)]), **case.grid)
        for factor in (1 - 1e-3, 1, 1 + 1e-3)
    ]
    return ((levels[0] == levels[1]) & (levels[1] == levels[2])).to(x.dtype)


def assert_alike(got, want, names=NAMES, least=0.0):
    for name, g, w in zip(names, got, want, strict=True):
        if w is None or not w.numel():
            continue
        atol = max(least, ROUNDING[w.dtype] * w.double().abs().max().item())
        torch.testing.assert_close(g, w, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def open_widths(case, masks):
    """The width of the widest open ring of each element, of masks of 0 and 1."""
    if masks is None:
        return torch.full(case.shape, case.bits)
    return (case.min_bits - 1 + (masks > 0).sum(0)).expand(case.shape)


def rounded(x, scale, widths, case):
    """Rounding to the grid of each element's width, halves in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = scale if scale.dtype == torch.float64 else scale.float()
    bounds = torch.tensor([level_bounds(k, narrower(case.kind, case.bits, k)) for k in range(1, case.bits + 1)]).to(
        wide.dtype
    )[widths - 1]
    half = 0.5 if case.kind == "balanced" else 0.0
    levels = (wide / scale - half).round() + half
    return (levels.clamp(bounds[..., 0], bounds[..., 1]) * scale).to(x.dtype)


def tells_levels_apart(case):
    """Whether the dtype of x rounds no level halfway to the next: the eight digits of bfloat16 do, from 128 on."""
    return case.dtype != torch.bfloat16 or case.bits < 7 or (case.kind == "signed" and case.bits < 9)


# The quantizer -------------------------------------------------------------------------------------------------------


@examples(120)
@given(cases())
def test_the_layout_in_memory_changes_neither_values_nor_gradients(case):
    tensors = case.tensors()
    keep = settled(case, tensors)
    upstream = case.upstream()
    got = differentiate(quantize, tensors, upstream * keep, **case.grid)
    want = differentiate(quantize, contiguous(tensors), (upstream * keep).contiguous(), **case.grid)
    assert torch.equal(got[0] * keep, want[0] * keep)
    assert_alike(got[1:], want[1:], NAMES[1:])


@examples(200)
@given(cases(noise=(1 / 3, 1.0, 0.1, 0.02, 1e-3)))
def test_values_and_gradients_are_finite_and_have_the_shape_and_dtype_of_what_they_belong_to(case):
    # Of noise this narrow the gradient in x is as large as 128 / 0.001, more than float16 has.
    assume(case.noise >= 0.02 or case.dtype != torch.float16)
    tensors = case.tensors()
    upstream = case.upstream() / max(1, math.prod(case.shape))
    got = differentiate(quantize, tensors, upstream, **case.grid)
    for name, g, t in zip(NAMES, got, (tensors[0], *tensors), strict=True):
        if t is not None:
            assert (g.shape, g.dtype) == (t.shape, t.dtype), name
            assert g.isfinite().all(), name


@examples(200)
@given(cases(gates=DECIDED))
@example(Case(shape=(50,), bits=4, min_bits=2, mask_shape=(), values="halves", seed=1))
def test_with_gates_of_zero_and_one_it_rounds_to_the_grid_of_the_open_grids(case):
    x, scale, sigma, masks = case.tensors()
    want = rounded(x, scale, open_widths(case, masks), case)
    assert torch.equal(quantize(x, scale, sigma, masks, **case.grid), want)


@examples(100)
@given(cases(gates=("between",), masks=True))
def test_with_gates_between_every_value_is_a_level_of_an_open_grid(case):
    assume(tells_levels_apart(case))
    x, scale, sigma, masks = case.tensors()
    out = quantize(x, scale, sigma, masks, **case.grid)
    # Rounding to that grid finds a value that is on it.
    assert torch.equal(rounded(out, scale, open_widths(case, masks), case), out)


@examples(150)
@given(cases(gates=DECIDED))
def test_quantizing_what_is_quantized_changes_nothing(case):
    assume(tells_levels_apart(case))
    x, scale, sigma, masks = case.tensors()
    once = quantize(x, scale, sigma, masks, **case.grid)
    assert torch.equal(quantize(once, scale, sigma, masks, **case.grid), once)


@examples(100)
@given(cases(layouts=DENSE_LAYOUTS, empty=False))
@example(Case(shape=(2, 3, 4, 5), bits=2, mask_shape=(2, 3, 4, 5), gates="binary", layout="channels_last"))
def test_dense_layouts_are_kept(case):
    x, *others = case.tensors()
    # Gates that are drawn lie in the standard layout, whatever that of x is.
    for scale, sigma, masks in (others, contiguous(others)):
        assert layout(quantize(x, scale, sigma, masks, **case.grid)) == layout(x)
        if masks is not None:
            assert layout(quantize_resolution(x, scale, sigma, masks, **by_width(case))) == layout(x)


@examples(100)
@given(cases(layouts=("contiguous",)), st.integers(0, 2**16))
def test_elements_do_not_see_each_other(case, seed):
    """Any order of the elements gives each its own value and gradients; what broadcasts, those of its copies' sum."""
    tensors = case.tensors()
    x, scale, sigma, masks = tensors
    n, order = x.numel(), torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))
    upstream = case.upstream() * settled(case, tensors)
    single = [t.expand(case.shape).reshape(-1)[order] for t in (x, scale, sigma)]
    single.append(None if masks is None else spread(masks, case.shape).reshape(len(masks), n)[:, order])
    got = differentiate(quantize, tensors, upstream, **case.grid)
    each = differentiate(quantize, single, upstream.reshape(-1)[order], **case.grid)
    back = order.argsort()
    keep = settled(case, tensors)
    assert torch.equal(got[0] * keep, each[0][back].reshape(case.shape) * keep)
    assert_alike(got[1:2], [each[1][back].reshape(case.shape)], NAMES[1:2])
    for name, g, e in zip(NAMES[2:4], got[2:4], each[2:4], strict=True):
        assert_sums(name, g, e[back].reshape(case.shape))
    if masks is not None:
        for g, e in zip(got[4], each[4][:, back].reshape(len(masks), *case.shape), strict=True):
            assert_sums("masks", g, e)


def spread(masks, shape):
    """Masks that broadcast to a shape, expanded to it."""
    aligned = masks.reshape(len(masks), *[1] * (len(shape) - masks.dim() + 1), *masks.shape[1:])
    return aligned.expand(len(masks), *shape)


def assert_sums(name, reduced, single):
    """Single gradients are rounded to their dtype before they are added here, and after it in the reduced one."""
    if single.numel():
        want = single.double().sum_to_size(reduced.shape)
        atol = ROUNDING[reduced.dtype] * single.double().abs().sum_to_size(reduced.shape).max().item()
        torch.testing.assert_close(reduced.double(), want, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


@examples(100)
@given(cases(dtypes=(torch.float32, torch.float64)), st.integers(-30, 30))
def test_powers_of_two_scale_the_value_and_leave_the_gradients_of_x_scale_and_sigma(case, power):
    x, scale, sigma, masks = case.tensors()
    factor = 2.0**power
    upstream = case.upstream()
    plain = differentiate(quantize, (x, scale, sigma, masks), upstream, **case.grid)
    scaled = differentiate(quantize, (x * factor, scale * factor, sigma * factor, masks), upstream, **case.grid)
    assert torch.equal(scaled[0], plain[0] * factor)
    assert_alike(scaled[1:4], plain[1:4], NAMES[1:4])
    if masks is not None:
        assert_alike([scaled[4]], [plain[4] * factor], NAMES[4:])


@examples(60)
@given(cases(masks=False))
def test_negation_commutes_as_far_as_the_grid_is_symmetric(case):
    x, scale, sigma, _ = case.tensors()
    high = level_bounds(case.bits)[1]
    x = torch.minimum(torch.maximum(x, -high * scale), high * scale).to(x.dtype)
    grid = {**case.grid, "zero_point": None}
    assert torch.equal(quantize(-x, scale, sigma, **grid), -quantize(x, scale, sigma, **grid))


@examples(100)
@given(cases(dtypes=(torch.float64,), layouts=("contiguous",), empty=False))
def test_a_larger_x_is_never_quantized_to_less(case):
    """The most probable level of a family with monotone likelihood ratios does not fall, whatever the masks."""
    x, scale, sigma, masks = case.tensors()
    masks = None if masks is None else masks.reshape(len(masks), -1)[:, :1]
    x, scale, sigma = x.flatten().sort().values, scale.flatten()[:1], sigma.min()
    sigma = torch.minimum(sigma, scale)
    out = quantize(x, scale, sigma, masks, **case.grid)
    assert (out.diff() >= 0).all()


@examples(120)
@given(cases(dtypes=(torch.float64,), values=("spread",), gates=("between", "binary")))
def test_values_and_gradients_agree_with_the_full_grid_written_out(case):
    x, scale, sigma, masks = replace(case, exponent=0).tensors()
    # The reference's own exponentials, not the quantizer's, need wide noise on wide grids.
    least = 1.5 * 2**case.bits / 600
    sigma = torch.maximum(sigma, least * smallest(scale)).clamp(max=smallest(scale))
    tensors = (x, scale, sigma, masks)
    upstream = case.upstream() * settled(case, tensors)
    got = differentiate(quantize, tensors, upstream, **case.grid)
    want = differentiate(reference, tensors, upstream, **case.grid)
    keep = settled(case, tensors)
    assert_alike([got[0] * keep, *got[1:4]], [want[0] * keep, *want[1:4]], NAMES[:4], least=1e-10)
    # A single ring's mask cancels: the reference finds that up to rounding, and the quantizer exactly.
    if masks is not None and len(masks) > 1:
        assert_alike(got[4:], want[4:], NAMES[4:], least=1e-10)


def smallest(scale):
    return scale.min() if scale.numel() else scale.new_ones(())


# Nesting by resolution -----------------------------------------------------------------------------------------------


def by_width(case):
    """The keyword arguments of quantize_resolution."""
    widths = range(case.min_bits, case.bits + 1)
    grid = {key: value for key, value in case.grid.items() if key != "zero_point"}
    return {**grid, "zero_points": [zero_point(case.kind, k) for k in widths]}


def at_width(case, x, scale, sigma, width, width_scales=None):
    """The single quantizer of one width."""
    factor = 2.0 ** (case.bits - width) if width_scales is None else width_scales[width - case.min_bits]
    grid = {"bits": width, "zero_point": zero_point(case.kind, width), "estimator": case.estimator}
    return quantize(x, scale * factor, sigma * factor, **grid)


@examples(80)
@given(cases(gates=DECIDED, masks=True), st.booleans())
@example(Case(shape=(2, 3), bits=2, scale_shape=(3,), mask_shape=(1, 3), gates="binary", seed=1), False)
@example(Case(shape=(0,), mask_shape=(0,)), False)
def test_by_resolution_gates_of_zero_and_one_give_each_element_the_quantizer_of_its_width(case, fitted):
    x, scale, sigma, masks = case.tensors()
    width_scales = None
    if fitted:
        # Steps that were fitted to each width, at ratios that no power of two has.
        width_scales = torch.linspace(2.7, 1.0, len(masks)).to(scale.dtype).reshape(-1, *[1] * max(x.dim(), 1))
        width_scales = width_scales if x.dim() else width_scales[:, 0]
    widths = open_widths(case, masks)
    upstream = case.upstream()

    def chosen(x, scale, sigma):
        out = torch.zeros_like(x)
        for k in range(case.min_bits, case.bits + 1):
            out = torch.where(widths == k, at_width(case, x, scale, sigma, k, width_scales), out)
        return out

    def nested(x, scale, sigma):
        return quantize_resolution(x, scale, sigma, masks, width_scales=width_scales, **by_width(case))

    got = differentiate(nested, (x, scale, sigma), upstream)
    want = differentiate(chosen, (x, scale, sigma), upstream)
    assert (got[0].shape, got[0].dtype) == (x.shape, x.dtype)
    assert torch.equal(got[0], want[0])
    assert_alike(got[1:], want[1:], NAMES[1:4])


@examples(60)
@given(cases(gates=("between",), masks=True))
@example(Case(shape=(0,), bits=2, mask_shape=(0,), gates="between"))
def test_by_resolution_gates_between_weigh_the_residuals_that_bits_add(case):
    x, scale, sigma, masks = case.tensors()
    upstream = case.upstream()

    def ladder(x, scale, sigma, masks):
        values = [at_width(case, x, scale, sigma, k) for k in range(case.min_bits, case.bits + 1)]
        out = values[0]
        for mask, lower, upper in zip(masks[1:], values[:-1], values[1:], strict=True):
            out = out + mask.to(x.dtype) * (upper - lower)
        return out

    got = differentiate(quantize_resolution, (x, scale, sigma, masks), upstream, **by_width(case))
    want = differentiate(ladder, (x, scale, sigma, masks), upstream)
    for name, g, t in zip(NAMES, got, (x, x, scale, sigma, masks), strict=True):
        assert (g.shape, g.dtype) == (t.shape, t.dtype), name
        assert g.isfinite().all(), name
    if case.dtype == case.parameter_dtype and case.dtype != torch.bfloat16:
        assert_alike(got[:4], want[:4], NAMES[:4])


@examples(60)
@given(cases(masks=True))
@example(Case(shape=(0,), bits=2, mask_shape=(0,), gates="between"))
def test_by_resolution_the_layout_in_memory_changes_neither_values_nor_gradients(case):
    tensors = case.tensors()
    got = differentiate(quantize_resolution, tensors, case.upstream(), **by_width(case))
    plain = contiguous(tensors)
    want = differentiate(quantize_resolution, plain, case.upstream().contiguous(), **by_width(case))
    assert torch.equal(got[0], want[0])
    assert_alike(got[1:], want[1:], NAMES[1:])


# Gates ---------------------------------------------------------------------------------------------------------------

seeds = st.integers(-(2**63), 2**63 - 1)


@examples(100)
@given(shapes(), seeds, seeds, st.integers(0, 2**32 - 1))
def test_noise_lies_between_zero_and_one_and_depends_on_its_counters_only(shape, seed, scale, key):
    u = keyed_uniform(shape, seed, torch.tensor([scale]), key)
    assert (u.shape, u.dtype) == (shape, torch.float32)
    assert ((u > 0) & (u < 1)).all()
    torch.rand(3)
    assert torch.equal(keyed_uniform(shape, seed, torch.tensor(scale), key), u)
    # A longer row of elements begins with a shorter one.
    assert torch.equal(keyed_uniform((u.numel() + 1,), seed, torch.tensor([scale]), key)[:-1], u.flatten())


@examples(100)
@given(shapes(least=1), st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)), seeds)
def test_masks_start_with_one_and_never_increase(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    gates = (torch.rand(shape, generator=generator) * 1.6 - 0.3).clamp(0, 1).to(dtype)
    masks = masks_from_gates(gates)
    assert (masks.shape, masks.dtype) == ((shape[0] + 1, *shape[1:]), dtype)
    assert (masks[0] == 1).all()
    assert (masks[1:] <= masks[:-1]).all()
    assert ((masks >= 0) & (masks <= 1)).all()
    shut = (gates == 0).cumsum(0) > 0
    assert not masks[1:][shut].any()


logits = st.floats(-30, 30)
temperatures = st.floats(0.05, 2)


@examples(100)
@given(logits, logits, st.floats(0, 1), temperatures, st.integers(0, 2**16))
def test_gates_lie_between_zero_and_one_and_open_with_their_logit(low, high, noise, beta, seed):
    low, high = sorted((low, high))
    u = keyed_uniform((50,), seed, torch.tensor(0), 0).double()
    below, above = (hard_concrete(torch.tensor(v, dtype=torch.float64), u, noise=noise, beta=beta) for v in (low, high))
    assert ((below >= 0) & (above <= 1) & (below <= above)).all()


@examples(100)
@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=6), st.floats(0.05, 1), temperatures)
def test_the_logit_of_a_probability_opens_with_it_and_evaluation_keeps_leading_gates(p, noise, beta):
    p, gate = torch.tensor(p, dtype=torch.float64), {"noise": noise, "beta": beta}
    torch.testing.assert_close(open_probability(logit_of(p, **gate), **gate), p, rtol=1e-9, atol=0)
    kept = open_gates(p)
    assert (kept.diff() <= 0).all()
    assert kept.sum() == next((i for i, v in enumerate(p.tolist()) if v < 0.5), len(p))


# Starting scales ------------------------------------------------------------------------------------------------------


LARGEST = torch.finfo(torch.float32).max


@st.composite
def rows(draw, least=0.0, highest=LARGEST):
    """Rows of finite float32 numbers, some of them dead channels."""
    magnitudes = st.floats(least, highest, width=32)
    number = st.one_of(magnitudes, magnitudes.map(lambda v: -v), st.just(0.0))
    n = draw(st.integers(1, 6))
    row = st.one_of(st.lists(number, min_size=n, max_size=n), st.just([0.0] * n))
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))


grids = st.tuples(st.integers(1, 8), st.sampled_from(KINDS)).map(
    lambda drawn: {"bits": drawn[0], "zero_point": zero_point(drawn[1], drawn[0])}
)


@examples(80)
@given(rows(), grids, st.booleans())
@example(torch.tensor([[3e38]]), {"bits": 1, "zero_point": 0}, False)
def test_fitted_scales_are_positive_and_finite_whatever_finite_values_they_are_fitted_to(values, grid, counted):
    counts = torch.arange(values.numel()).reshape(values.shape).double() if counted else None
    scale = mse_scale(values, **grid, counts=counts)
    assert (scale.shape, scale.dtype) == (values.shape[:1], torch.float32)
    assert ((scale > 0) & scale.isfinite()).all()
    full = max_scale(values.amin(1), values.amax(1), **grid)
    assert ((full > 0) & full.isfinite()).all()


def squared_error(values, scale, bits, zero_point):
    values, scale = values.double(), scale.double()[:, None]
    return (values - nearest_level(values / scale, *level_bounds(bits, zero_point)) * scale).square().sum(1)


# Below 1e-30 a scale is as good as zero, by design.
@examples(80)
@given(rows(least=2.0**-80), grids)
@example(torch.tensor([[0.83, 0.13, 0.79, 0.35, 0.96]]) * 1e-25, {"bits": 4, "zero_point": None})
@example(torch.tensor([[0.83, 0.13, 0.79, 0.35, 0.96]]) * 1e25, {"bits": 4, "zero_point": None})
def test_no_fitted_scale_is_worse_than_the_one_that_clips_nothing(values, grid):
    fitted = squared_error(values, mse_scale(values, **grid), **grid)
    full = squared_error(values, max_scale(values.amin(1), values.amax(1), **grid), **grid)
    assert (fitted <= full * (1 + 1e-5) + 1e-12 * values.double().square().sum(1)).all()


@examples(50)
@given(rows(least=2.0**-8, highest=2.0**8), grids, st.integers(-75, 110))
@example(torch.tensor([[2.0, 5.0]]), {"bits": 1, "zero_point": 0}, -75)
@example(torch.tensor([[2.0, 5.0]]), {"bits": 1, "zero_point": 0}, 63)
def test_a_fitted_scale_grows_with_its_values(values, grid, power):
    fitted = mse_scale(values, **grid)
    # Where no value can be represented the scale is 1, whatever the scale.
    has_scale = max_scale(values.amin(1) * 2.0**-9, values.amax(1) * 2.0**-9, **grid) < 1
    assert torch.equal(mse_scale(values * 2.0**power, **grid)[has_scale], (fitted * 2.0**power)[has_scale])


@examples(100)
@given(rows(), st.floats(-1e3, 1e3, width=32), st.floats(2.0**-60, 1e3, width=32), st.integers(1, 16))
@example(torch.tensor([[1e20]]), 0.0, 1.0, 2)
def test_a_histogram_counts_every_value_once_and_what_lies_beyond_at_its_end(values, low, span, bins):
    low = torch.tensor(low)
    high = low + span
    counts = histogram(values, low, high, bins)
    assert counts.shape == (bins,)
    assert counts.sum() == values.numel()
    assert counts[0] >= (values <= low).sum()
    if high > low:
        assert counts[-1] >= (values > high).sum()


# Widths on a budget --------------------------------------------------------------------------------------------------


@st.composite
def budgets(draw):
    """Widths within their bounds, a cost that is linear or bilinear in them, a target, and prices."""
    n = draw(st.integers(0, 7))
    width = st.integers(1, 8)
    bounds = [sorted(draw(st.tuples(width, width, width))) for _ in range(n)]
    narrowest, widths, widest = (torch.tensor([b[i] for b in bounds], dtype=torch.float64) for i in range(3))
    terms = []
    for row in range(n):
        # n stands for a factor of 1; no width multiplies itself.
        other = draw(st.sampled_from([i for i in range(n + 1) if i != row]))
        terms.append((draw(st.sampled_from((0.0, 0.1, 1.0, 3.0, 1e4))), row, other))
    coefficients = torch.tensor([t[0] for t in terms], dtype=torch.float64)
    left, right = (torch.tensor([t[i] for t in terms], dtype=torch.int64) for i in (1, 2))
    cost = WidthCost(coefficients, left, right, draw(st.sampled_from((0.0, 5.0))))
    target = draw(st.floats(0, 1.2)) * cost(torch.full((n,), 8.0, dtype=torch.float64))
    tolerance = draw(st.sampled_from((0.0, 0.01, 1.0)))
    seed = draw(st.integers(0, 1000))

    def price(widths, by):
        return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return widths, narrowest, widest, cost, target, tolerance, price


@examples(100)
@given(budgets())
def test_adjusted_widths_keep_their_bounds_cost_no_more_than_the_target_and_are_what_the_changes_make(budget):
    widths, narrowest, widest, cost, target, tolerance, price = budget
    before = widths.clone()
    after, changes = adjust_widths(widths, narrowest, widest, cost, target, tolerance, price)
    assert torch.equal(widths, before)
    assert ((after >= narrowest) & (after <= widest)).all()
    replayed = before.clone()
    for change in changes:
        assert replayed[change.row] == change.before
        assert abs(change.after - change.before) == 1
        replayed[change.row] = change.after
    assert torch.equal(replayed, after)
    has_cost = cost.gradient(before) > 0
    assert torch.equal(after[~has_cost], before[~has_cost])
    if cost(torch.where(has_cost, narrowest, before)) > target * (1 + 1e-9):
        assert torch.equal(after[has_cost], narrowest[has_cost])
        return
    room = target - cost(after)
    assert room >= -1e-9 * target
    # No single bit is left that would still fit.
    for row in range(len(after)):
        if has_cost[row] and after[row] < widest[row]:
            assert cost.gradient(after)[row] > room - 1e-9 * target


@examples(60)
@given(budgets())
def test_the_gradient_of_a_cost_is_what_one_bit_more_costs(budget):
    widths, _, _, cost, *_ = budget
    gradient = cost.gradient(widths)
    assert gradient.shape == widths.shape
    for row in range(len(widths)):
        more = widths.clone()
        more[row] += 1
        assert math.isclose(cost(more) - cost(widths), gradient[row].item(), rel_tol=1e-9, abs_tol=1e-9 * cost(more))
