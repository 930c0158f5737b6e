"""Properties of the quantizer and of its gradients, against the whole categorical written out."""

import itertools
import math
import random

import pytest
import torch

from cpq_lightning.functional.categorical import quantize, quantize_unchecked
from cpq_lightning.functional.dropbits import masks_from_gates
from cpq_lightning.functional.grid import level_bounds
from tests.functional.reference import Recorder, exact, reference
from tests.grids import KINDS, narrower, zero_point

ESTIMATORS = ("argmax", "expectation")
WIDTHS = [(bits, low) for bits in range(1, 9) for low in range(1, bits + 1)]
SHAPE = (3, 4, 2)
SCALE_SHAPES = {"scalar": (), "tensor": (1,), "channel": (4, 1), "element": SHAPE}
MASK_SHAPES = {"scalar": (), "tensor": (1, 1, 1), "channel": (4, 1), "element": SHAPE}


def inputs(bits, min_bits, kind="signed", scale_shape=(4, 1), mask_shape=(4, 1), shape=SHAPE):
    """Float64 values up to 1.5 times the grid, noise up to the scale, gates of 0, 0.3 to 1, and 1."""
    # A closed ring's mask has derivatives up to exp(distance/sigma): wide grids get wide noise, so that they fit.
    least = max(0.1, 1.5 * 2**bits / 600)
    scale = torch.rand(scale_shape, dtype=torch.float64) * 2 + 0.01
    sigma = scale * (least + (1 - least) * torch.rand(scale_shape, dtype=torch.float64))
    low, high = level_bounds(bits, zero_point(kind, bits))
    x = scale * (1.5 * (low + torch.rand(shape, dtype=torch.float64) * (high - low)) - 0.7)
    gates = (torch.rand(bits - min_bits, *mask_shape, dtype=torch.float64) * 1.2).clamp(max=1)
    gates = torch.where(gates < 0.3, 0.0, gates)
    masks = torch.cat([torch.ones(1, *mask_shape, dtype=torch.float64), gates]).cumprod(0)
    return [t.requires_grad_() for t in (x, scale, sigma, masks)]


def run(function, tensors, upstream=None, **settings):
    """The value and the gradients of leaves with the same values as the tensors."""
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    out = function(*leaves, **settings)
    out.backward(torch.ones_like(out) if upstream is None else upstream)
    return [out.detach(), *(None if t is None else t.grad for t in leaves)]


def assert_close(got, want, rtol=1e-8, atol=1e-9):
    for name, g, w in zip(("value", "x", "scale", "sigma", "masks"), got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_agrees_with_the_full_grid(kind, estimator):
    for bits, min_bits in WIDTHS:
        tensors = inputs(bits, min_bits, kind)
        upstream = torch.randn(SHAPE, dtype=torch.float64)
        settings = {"bits": bits, "min_bits": min_bits, "zero_point": zero_point(kind, bits), "estimator": estimator}
        assert_close(run(quantize, tensors, upstream, **settings), run(reference, tensors, upstream, **settings))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mask_shape", [None, *MASK_SHAPES], ids=lambda name: f"masks-{name}")
@pytest.mark.parametrize("scale_shape", SCALE_SHAPES, ids=lambda name: f"scale-{name}")
@pytest.mark.parametrize(("bits", "min_bits"), [(2, 1), (4, 2)])
def test_every_way_to_broadcast_agrees_with_the_full_grid(bits, min_bits, scale_shape, mask_shape, estimator):
    tensors = inputs(bits, min_bits, "signed", SCALE_SHAPES[scale_shape], MASK_SHAPES.get(mask_shape, ()))
    tensors[3] = None if mask_shape is None else tensors[3]
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    settings = {"bits": bits, "min_bits": min_bits, "estimator": estimator}
    got = run(quantize, tensors, upstream, **settings)
    assert_close(got, run(reference, tensors, upstream, **settings))
    assert [t if t is None else t.shape for t in got[1:]] == [t if t is None else t.shape for t in tensors]


def assert_exact(x, scale, sigma, masks, **grid):
    value, gradients = exact(x, scale, sigma, masks, **grid)
    # 1/sigma^2 is the scale of the gradient in sigma: narrow noise leaves it fewer digits than 1e-12.
    atol = max(1e-12, 1e-14 * (scale / sigma) ** 2)
    for estimator, want in gradients.items():
        tensors = [torch.tensor(v, dtype=torch.float64) for v in (x, scale, sigma, masks)]
        got = run(quantize, tensors, **grid, estimator=estimator)
        got = [t.item() for t in got[:4]] + got[4].tolist()
        for name, g, w in zip(("value", "x", "scale", "sigma", *range(len(masks))), got, [value, *want], strict=True):
            text = f"{estimator}, {name}: got {g}, want {w} for {x=} {scale=} {sigma=} {masks=} {grid}"
            assert g == w or abs(g - w) <= max(atol, 1e-9 * abs(w)), text


@pytest.mark.parametrize("seed", range(40))
def test_random_elements_agree_with_arbitrary_precision_far_outside_the_grid_too(seed):
    draw = random.Random(seed)
    bits = draw.choice([1, 2, 3])
    min_bits = draw.randint(1, bits)
    z = zero_point(draw.choice(KINDS), bits)
    low, high = level_bounds(bits, z)
    scale, noise = 10 ** draw.uniform(-3, 1), 10 ** draw.uniform(-1.5, 0)
    near = draw.uniform(1.5 * low - 2, 1.5 * high + 2)
    u = near if draw.random() < 0.7 else draw.uniform(-150, 150) * noise
    masks = [1.0]
    for _ in range(bits - min_bits):
        masks.append(masks[-1] * draw.choice([1.0, 0.0, draw.random(), 10 ** draw.uniform(-8, 0)]))
    # A single ring's mask cancels, which differences around 1 show as well.
    assert_exact(u * scale, scale, noise * scale, masks, bits=bits, min_bits=min_bits, zero_point=z)


@pytest.mark.parametrize("mask", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("u", [13.3, -14.4, 30.2])
def test_a_nearly_closed_grid_that_holds_all_the_mass_keeps_its_digits(u, mask):
    assert_exact(u, 1.0, 0.2, [1.0, mask**0.5, mask], bits=5, min_bits=3, zero_point=16)


@pytest.mark.parametrize(("bits", "kind"), [*itertools.product(range(1, 9), KINDS)])
def test_without_masks_the_value_is_the_rounded_and_clamped_one(bits, kind):
    scale = torch.tensor(0.37, dtype=torch.float64)
    x = torch.randn(1000, dtype=torch.float64) * 2**bits * 0.3
    z, half = zero_point(kind, bits), 0.5 if kind == "balanced" else 0.0
    want = ((x / scale - half).round() + half).clamp(*level_bounds(bits, z)) * scale
    assert torch.equal(quantize(x, scale, scale / 3, bits=bits, zero_point=z), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_grid_is_never_chosen_and_an_open_one_can_be(kind):
    x = torch.linspace(-40, 40, 801)
    scale = torch.tensor(1.0)
    for open_grids in range(1, 5):
        masks = torch.tensor([1.0] * open_grids + [0.0] * (4 - open_grids))
        out = quantize(x, scale, scale / 3, masks, bits=5, min_bits=2, zero_point=zero_point(kind, 5))
        low, high = level_bounds(1 + open_grids, narrower(kind, 5, 1 + open_grids))
        assert (out.min().item(), out.max().item()) == (low, high)


def test_a_half_open_grid_gives_way_where_the_kept_grid_is_probable_enough():
    """At the boundary of levels 1 and 2 both are equally probable, so any mask under 1 decides it."""
    x, scale = torch.tensor([1.49, 1.51, 2.0, 3.0]), torch.tensor(1.0)
    masks = torch.tensor([1.0, 0.5])
    assert quantize(x, scale, scale / 3, bits=3, min_bits=2).tolist() == [1, 2, 2, 3]
    assert quantize(x, scale, scale / 3, masks, bits=3, min_bits=2).tolist() == [1, 1, 2, 3]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bits", "min_bits"), [(1, 1), (2, 1), (4, 2), (8, 1), (8, 5)])
def test_masks_of_one_change_nothing_bit_for_bit(bits, min_bits, dtype, estimator):
    scale = torch.tensor(0.11, dtype=dtype)
    ladder = torch.logspace(-3, 4, 200, dtype=dtype)
    x = torch.cat([-ladder, torch.zeros(1, dtype=dtype), ladder, torch.randn(300, dtype=dtype)])
    masks = torch.ones(bits - min_bits + 1, dtype=dtype)
    settings = {"bits": bits, "min_bits": min_bits, "estimator": estimator}
    without = run(quantize, (x, scale, scale / 3, None), **settings)
    with_masks = run(quantize, (x, scale, scale / 3, masks), **settings)
    for name, a, b in zip(("value", "x", "scale", "sigma"), without, with_masks, strict=False):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [1e8, 1e18, 1e30, math.inf])
def test_a_mask_of_one_clamps_huge_values_to_the_widest_grid(scales, dtype):
    x = torch.tensor([-scales, scales], dtype=dtype)
    scale = torch.tensor(1.0, dtype=dtype)
    out = quantize(x, scale, scale / 3, torch.ones(3, dtype=dtype), bits=4, min_bits=2)
    assert out.tolist() == [-8, 7]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_single_grid_has_neither_effect_nor_gradient_of_its_mask(estimator):
    x, scale, sigma, _ = inputs(4, 4, "signed")
    masks = torch.ones(1, dtype=torch.float64)
    got = run(quantize, (x, scale, sigma, masks), bits=4, estimator=estimator)
    without = run(quantize, (x, scale, sigma, None), bits=4, estimator=estimator)
    assert all(torch.equal(a, b) for a, b in zip(got[:4], without[:4], strict=True))
    assert torch.equal(got[4], torch.zeros(1, dtype=torch.float64))


# dtype, scales, and noise in scales: float16 reaches from 6e-8 to 65504, so its gradients hold only milder settings.
FINITE = [
    *itertools.product([torch.float32, torch.bfloat16], [1e-6, 1.0, 1e3], [1e-3, 1 / 3, 1.0]),
    *itertools.product([torch.float16], [1e-6, 1e-2, 1.0], [0.1, 1 / 3, 1.0]),
]


@pytest.mark.parametrize("masks", [None, (1.0, 1.0, 1.0), (1.0, 0.6, 0.2), (1.0, 0.3, 0.0), (1.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_and_gradients_are_finite_up_to_ten_thousand_scales(estimator, masks):
    for dtype, scale, noise in FINITE:
        assert_finite(dtype, scale, noise, estimator, masks)


def assert_finite(dtype, scale, noise, estimator, masks):
    scales = torch.logspace(-4, 4, 100)
    x = (torch.cat([-scales, torch.zeros(1), scales, torch.arange(-10, 10), torch.arange(-10, 10) + 0.5]) * scale).to(
        dtype
    )
    a = torch.tensor(scale).to(dtype)
    sigma = torch.minimum(torch.tensor(scale * noise).to(dtype), a)
    # A closed ring's derivative reaches exp(40), which float16 has no number for: its masks stay in float32.
    precision = torch.float32 if dtype == torch.float16 else dtype
    m = None if masks is None else torch.tensor(masks, dtype=precision)
    got = run(quantize, (x, a, sigma, m), torch.full_like(x, 1 / len(x)), bits=4, min_bits=2, estimator=estimator)
    for name, t in zip(("value", "x", "scale", "sigma", "masks"), got, strict=True):
        assert t is None or t.isfinite().all(), (name, dtype, scale, noise)
    assert got[0].dtype == dtype
    assert [t.dtype for t in got[1:4]] == [dtype] * 3


# How far the level may move (a value near a boundary), and the error of a gradient relative to its largest one: in
# float32 x/scale carries 6e-8 of up to 190 scales, divided by noise from 0.15 scales on; halves round the result.
PRECISION = {torch.float32: (0.002, 2e-4), torch.bfloat16: (0.002, 8e-3), torch.float16: (0.002, 1e-3)}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("bits", "min_bits"), [(1, 1), (2, 1), (4, 4), (4, 2), (8, 8), (8, 6)])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_narrow_dtypes_agree_with_float64(dtype, bits, min_bits, estimator):
    n = 2000
    low, high = level_bounds(bits)
    scale = (torch.rand(n) + 0.5).to(dtype)
    sigma = torch.minimum(scale * (0.15 + 0.85 * torch.rand(n)).to(dtype), scale)
    x = (scale * 1.5 * (low + torch.rand(n) * (high - low))).to(dtype)
    # Open enough that no derivative runs to the exponential of the distance.
    masks = torch.rand(bits - min_bits + 1, n).mul(0.5).add(0.5).to(dtype)
    masks[0] = 1
    masks = masks.cumprod(0)
    settings = {"bits": bits, "min_bits": min_bits, "estimator": estimator}
    got = run(quantize, (x, scale, sigma, masks), **settings)
    want = run(quantize, [t.double() for t in (x, scale, sigma, masks)], **settings)
    max_mismatched, tolerance = PRECISION[dtype]
    same = (got[0].double() - want[0]).abs() < 0.5 * scale.double()
    assert same.double().mean() >= 1 - max_mismatched
    for name, g, w in zip(("value", "x", "scale", "sigma", "masks"), got, want, strict=True):
        error = (g.double() - w)[..., same].abs().max()
        assert error <= tolerance * w[..., same].abs().max(), name


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
        lambda t: t[:1].clone().expand_as(t),
    ],
    ids=["channels_last", "transposed", "strided", "expanded"],
)
def test_the_layout_in_memory_does_not_matter(layout, estimator):
    x = layout(torch.randn(2, 3, 4, 5, dtype=torch.float64))
    assert not x.is_contiguous()
    scale = torch.rand(3, 1, 1, dtype=torch.float64) + 0.1
    masks = torch.tensor([1.0, 0.4], dtype=torch.float64)
    upstream = torch.randn(x.shape, dtype=torch.float64)
    settings = {"bits": 3, "min_bits": 2, "estimator": estimator}

    odd = x.detach().requires_grad_()
    out = quantize(odd, scale, scale / 3, masks, **settings)
    out.backward(upstream)
    plain = run(quantize, (x.contiguous(), scale, scale / 3, masks), upstream, **settings)
    torch.testing.assert_close(out.detach(), plain[0], rtol=0, atol=0)
    torch.testing.assert_close(odd.grad, plain[1], rtol=1e-12, atol=1e-14)


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    out = quantize(x, torch.tensor(0.2), torch.tensor(0.1), torch.tensor([1.0, 0.5]), bits=3, min_bits=2)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_and_shape_of_x_whatever_the_scale_has(dtype):
    for shape in ((), (1,), (2, 3)):
        x = torch.randn(shape).to(dtype)
        out = quantize(x, torch.tensor(0.25), torch.tensor(0.08), bits=4)
        assert (out.dtype, out.shape) == (dtype, x.shape)
        assert torch.equal(out, (x / 0.25).round().clamp(-8, 7) * 0.25)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
def test_empty_tensors_pass_and_give_no_gradient(shape, estimator):
    x, scale, masks = torch.zeros(shape), torch.tensor(0.5), torch.tensor([1.0, 0.5])
    got = run(quantize, (x, scale, scale / 3, masks), bits=3, min_bits=2, estimator=estimator)
    assert got[0].shape == got[1].shape == shape
    assert got[2].item() == got[3].item() == 0
    assert got[4].tolist() == [0, 0]


def record(bits, min_bits, estimator, numel=600):
    x = (torch.randn(numel) * 2).requires_grad_()
    scale, sigma = torch.tensor(0.1, requires_grad=True), torch.tensor(0.03, requires_grad=True)
    masks = None if bits == min_bits else torch.linspace(1, 0.5, bits - min_bits + 1).requires_grad_()
    upstream = torch.ones(numel)
    with Recorder() as recorder:
        quantize(x, scale, sigma, masks, bits=bits, min_bits=min_bits, estimator=estimator).backward(upstream)
    assert x.grad is not None
    return recorder


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("bits", "min_bits"), [(1, 1), (4, 4), (8, 8), (4, 3), (8, 6), (8, 1)])
def test_no_tensor_is_larger_than_x_times_the_number_of_grids(bits, min_bits, estimator):
    assert record(bits, min_bits, estimator).largest <= 600 * (bits - min_bits + 1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("grids", [1, 2])
def test_the_work_does_not_depend_on_the_width(grids, estimator):
    counts = {record(bits, bits - grids + 1, estimator).calls for bits in (2, 4, 8)}
    assert len(counts) == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_work_grows_linearly_with_the_grids(estimator):
    counts = [record(8, 9 - grids, estimator).calls for grids in range(2, 9)]
    growth = [b - a for a, b in itertools.pairwise(counts)]
    assert 0 < max(growth) == min(growth)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("masks", [None, (1.0, 1.0, 1.0), (1.0, 0.5, 0.0)], ids=str)
def test_nan_stays_nan_and_infinity_is_clipped_without_harm_to_the_rest(masks, estimator):
    values = [0.3, math.nan, -0.7, math.inf, -math.inf, 5.0]
    full_rows = [0, 2, 5]
    x, scale = torch.tensor(values), torch.full((6,), 0.25)
    m = None if masks is None else torch.tensor(masks)[:, None].expand(3, 6)
    settings = {"bits": 4, "min_bits": 2, "estimator": estimator}
    got = run(quantize, (x, scale, scale / 3, m), **settings)
    rest = run(
        quantize,
        (x[full_rows], scale[full_rows], scale[full_rows] / 3, None if m is None else m[:, full_rows]),
        **settings,
    )
    for name, g, r in zip(("value", "x", "scale", "sigma", "masks"), got, rest, strict=True):
        if g is not None:
            torch.testing.assert_close(g[..., full_rows], r, rtol=1e-5, atol=1e-7, msg=name)
            assert r.isfinite().all(), name
    assert got[0][1].isnan()
    low, high = level_bounds(3 if masks and masks[2] == 0 else 4)
    assert got[0][3:5].tolist() == [high * 0.25, low * 0.25]
    assert got[1][3:5].tolist() == [0, 0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_outside_the_grid_x_gets_no_gradient_and_the_scale_gets_its_outermost_level(estimator):
    """There all probability lies on the edge as far as float64 can tell, if the noise is narrow."""
    for x, level in ((1e3, 7.0), (-1e3, -8.0)):
        got = run(
            quantize,
            [torch.tensor(v, dtype=torch.float64) for v in (x, 1.0, 0.02)] + [None],
            bits=4,
            estimator=estimator,
        )
        assert got[0].item() == level
        assert abs(got[1].item()) < 1e-12
        assert abs(got[2].item() - level) < 1e-9


def test_argmax_gives_level_zero_no_gradient_and_expectation_does():
    x, scale = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    argmax = run(quantize, (x, scale, scale / 3, None), bits=3, estimator="argmax")
    expectation = run(quantize, (x, scale, scale / 3, None), bits=3, estimator="expectation")
    assert not argmax[1].any()
    assert (expectation[1] > 0.5).all()


def test_the_unchecked_form_is_the_same_function():
    tensors = inputs(4, 2)
    settings = {"bits": 4, "min_bits": 2, "zero_point": 8, "estimator": "argmax"}
    for a, b in zip(run(quantize, tensors, **settings), run(quantize_unchecked, tensors, **settings), strict=True):
        assert torch.equal(a, b)


def test_the_defaults_are_one_signed_grid_and_expectation():
    x, scale, sigma, _ = inputs(3, 3)
    default = run(quantize, (x, scale, sigma, None), bits=3)
    spelled = run(quantize, (x, scale, sigma, None), bits=3, min_bits=3, zero_point=4, estimator="expectation")
    assert all(torch.equal(a, b) for a, b in zip(default[:4], spelled[:4], strict=True))


def test_gradients_of_gates_flow_through_the_masks():
    gates = torch.tensor([0.9, 0.5], dtype=torch.float64, requires_grad=True)
    x, scale, sigma, _ = inputs(4, 2, "signed", (), ())
    quantize(x, scale, sigma, masks_from_gates(gates), bits=4, min_bits=2, estimator="expectation").sum().backward()
    twin = gates.detach().clone().requires_grad_()
    masks = torch.stack([torch.ones_like(twin[0]), twin[0], twin[0] * twin[1]])
    reference(x, scale, sigma, masks, bits=4, min_bits=2, estimator="expectation").sum().backward()
    torch.testing.assert_close(gates.grad, twin.grad, rtol=1e-8, atol=1e-9)


# What is wrong, the error, and the words that the message must hold: the argument's name and the way out.
ERRORS = {
    "x of integers": ({"x": torch.arange(6).reshape(2, 3)}, TypeError, ["x", "x.float()"]),
    "bits a float": ({"bits": 4.0}, TypeError, ["bits", "whole number", "1 to 8"]),
    "bits a bool": ({"bits": True}, TypeError, ["bits", "whole number"]),
    "bits zero": ({"bits": 0}, ValueError, ["bits", "1 to 8", "0"]),
    "bits nine": ({"bits": 9}, ValueError, ["bits", "1 to 8", "9"]),
    "min_bits zero": ({"min_bits": 0}, ValueError, ["min_bits", "1 to 8"]),
    "min_bits a float": ({"min_bits": 2.0}, TypeError, ["min_bits", "whole number"]),
    "min_bits over bits": ({"bits": 3, "min_bits": 4}, ValueError, ["min_bits", "at most bits=3", "4"]),
    "an unknown estimator": ({"estimator": "mean"}, ValueError, ["estimator", "'argmax'", "'expectation'", "'mean'"]),
    "a scale that does not broadcast": ({"scale": torch.ones(2)}, ValueError, ["scale", "broadcast", "(2, 3)", "(2,)"]),
    "a scale larger than x": ({"scale": torch.ones(5, 2, 3)}, ValueError, ["scale", "broadcast", "(5, 2, 3)"]),
    "a sigma that does not broadcast": ({"sigma": torch.ones(2) / 9}, ValueError, ["sigma", "broadcast", "(2,)"]),
    "a scale of zero": ({"scale": torch.tensor([1.0, 0.0, 1.0])}, ValueError, ["scale", "positive"]),
    "a negative scale": ({"scale": torch.tensor(-0.5)}, ValueError, ["scale", "positive", "-0.5"]),
    "a scale of nan": ({"scale": torch.tensor(math.nan)}, ValueError, ["scale", "positive"]),
    "a sigma of zero": ({"sigma": torch.tensor(0.0)}, ValueError, ["sigma", "positive"]),
    "a sigma of nan": ({"sigma": torch.tensor(math.nan)}, ValueError, ["sigma", "torch.minimum(sigma, scale)"]),
    "a sigma over the scale": ({"sigma": torch.tensor(1.01)}, ValueError, ["sigma", "torch.minimum(sigma, scale)"]),
    "masks for too many grids": ({"masks": torch.ones(4)}, ValueError, ["masks", "(3, ", "2 to 4 bits", "(4,)"]),
    "masks without a ring": ({"masks": torch.tensor(1.0)}, ValueError, ["masks", "(3, ", "()"]),
    "masks of a foreign shape": ({"masks": torch.ones(3, 2)}, ValueError, ["masks", "broadcasts to (2, 3)", "(3, 2)"]),
    "masks that start below 1": ({"masks": torch.full((3,), 0.5)}, ValueError, ["masks", "masks_from_gates"]),
    "masks that increase": ({"masks": torch.tensor([1.0, 0.2, 0.3])}, ValueError, ["masks", "masks_from_gates"]),
    "a negative mask": ({"masks": torch.tensor([1.0, 0.2, -0.1])}, ValueError, ["masks", "masks_from_gates"]),
    "a mask of nan": ({"masks": torch.tensor([1.0, 0.2, math.nan])}, ValueError, ["masks", "masks_from_gates"]),
}


@pytest.mark.parametrize("case", ERRORS, ids=lambda name: name.replace(" ", "-"))
def test_a_wrong_argument_is_named_together_with_the_way_out(case):
    change, error, words = ERRORS[case]
    arguments = {
        "x": torch.zeros(2, 3), "scale": torch.tensor(1.0), "sigma": torch.tensor(0.3), "masks": None,
        "bits": 4, "min_bits": 2,
    }  # fmt: skip
    quantize(**arguments)
    with pytest.raises(error) as raised:
        quantize(**{**arguments, **change})
    assert type(raised.value) is error
    assert str(raised.value).split(" ")[0] == words[0]
    for word in words:
        assert word in str(raised.value)
