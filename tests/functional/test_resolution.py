"""Nesting by resolution: the range stays, each further bit halves the scale."""

import itertools

import pytest
import torch

from cpq_lightning.functional.categorical import quantize
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.resolution import quantize_resolution
from tests.grids import zero_point

ESTIMATORS = ("argmax", "expectation")
GRIDS = [
    (4, 2, "signed"), (4, 2, "unsigned"), (4, 2, "offset"), (4, 2, "balanced"), (8, 2, "signed"), (3, 1, "balanced"),
    (3, 1, "signed"), (2, 1, "unsigned"), (5, 5, "offset"),
]  # fmt: skip


def values(bits, kind, n=400, dtype=torch.float64):
    low, high = level_bounds(bits, zero_point(kind, bits))
    return (low + torch.rand(n, dtype=dtype) * (high - low)) * 1.2 * 0.05


def zero_points(kind, min_bits, bits):
    return [zero_point(kind, k) for k in range(min_bits, bits + 1)]


def at(x, scale, sigma, width, bits, kind, estimator):
    """The quantizer of one width: the scale of the widest, doubled for every bit that is missing."""
    factor = 2.0 ** (bits - width)
    return quantize(
        x, scale * factor, sigma * factor, bits=width, zero_point=zero_point(kind, width), estimator=estimator
    )


def leaves(x, masks=None):
    scale, sigma = torch.tensor(0.05, dtype=x.dtype), torch.tensor(0.02, dtype=x.dtype)
    return [None if t is None else t.detach().clone().requires_grad_() for t in (x, scale, sigma, masks)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("bits", "min_bits", "kind"), GRIDS)
def test_with_masks_of_zero_and_one_it_is_exactly_the_quantizer_of_the_widest_open_bit(bits, min_bits, kind, estimator):
    x = values(bits, kind)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    for width in range(min_bits, bits + 1):
        masks = torch.tensor([1.0] * (width - min_bits + 1) + [0.0] * (bits - width), dtype=x.dtype)
        got, want = leaves(x, masks), leaves(x)[:3]
        out = quantize_resolution(
            *got, bits=bits, min_bits=min_bits, zero_points=zero_points(kind, min_bits, bits), estimator=estimator
        )
        plain = at(*want, width, bits, kind, estimator)
        out.backward(upstream)
        plain.backward(upstream)
        assert torch.equal(out, plain)
        for g, w in zip(got[:3], want, strict=True):
            torch.testing.assert_close(g.grad, w.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "min_bits", "kind"), GRIDS)
def test_with_masks_of_zero_and_one_per_element_every_value_lies_on_its_own_grid(bits, min_bits, kind, dtype):
    x = values(bits, kind, dtype=torch.float64).to(dtype)
    # A power of two: multiples of it are exact in every dtype.
    scale = torch.tensor(2.0**-5)
    width = torch.randint(min_bits, bits + 1, x.shape)
    masks = torch.stack([(width >= k) for k in range(min_bits, bits + 1)]).to(dtype)
    out = quantize_resolution(
        x,
        scale,
        scale / 3,
        masks,
        bits=bits,
        min_bits=min_bits,
        zero_points=zero_points(kind, min_bits, bits),
        estimator="expectation",
    )
    assert out.dtype == dtype
    assert set(width.tolist()) == set(range(min_bits, bits + 1))
    for k in range(min_bits, bits + 1):
        levels = out[width == k].double() / (scale.double() * 2 ** (bits - k))
        low, high = level_bounds(k, zero_point(kind, k))
        assert torch.equal(levels - low, (levels - low).round())
        assert (levels.min() >= low) & (levels.max() <= high)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("bits", "min_bits", "kind"), GRIDS)
def test_without_masks_it_is_the_widest_quantizer(bits, min_bits, kind, estimator):
    x = values(bits, kind)
    got, want = leaves(x)[:3], leaves(x)[:3]
    out = quantize_resolution(
        *got, None, bits=bits, min_bits=min_bits, zero_points=zero_points(kind, min_bits, bits), estimator=estimator
    )
    plain = quantize(*want, bits=bits, zero_point=zero_point(kind, bits), estimator=estimator)
    out.sum().backward()
    plain.sum().backward()
    assert torch.equal(out, plain)
    assert all(torch.equal(g.grad, w.grad) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mask_shape", [(), (1,), (400,)], ids=["scalar", "tensor", "element"])
@pytest.mark.parametrize(("bits", "min_bits", "kind"), GRIDS)
def test_a_mask_s_gradient_is_the_residual_that_its_bit_adds(bits, min_bits, kind, mask_shape, estimator):
    x = values(bits, kind)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    gates = torch.rand(bits - min_bits, *mask_shape, dtype=x.dtype)
    masks = torch.cat([torch.ones(1, *mask_shape, dtype=x.dtype), gates]).cumprod(0).requires_grad_()
    scale, sigma = leaves(x)[1:3]
    out = quantize_resolution(
        x,
        scale,
        sigma,
        masks,
        bits=bits,
        min_bits=min_bits,
        zero_points=zero_points(kind, min_bits, bits),
        estimator=estimator,
    )
    out.backward(upstream)
    with torch.no_grad():
        ladder = [at(x, scale, sigma, k, bits, kind, estimator) for k in range(min_bits, bits + 1)]
        residuals = [ladder[0], *(b - a for a, b in itertools.pairwise(ladder))]
        # x_hat = q_min + sum_k m_k (q_k - q_(k-1)), as the method writes it.
        total = ladder[0] + sum(m * r for m, r in zip(masks[1:], residuals[1:], strict=True))
    torch.testing.assert_close(out.detach(), total, rtol=1e-12, atol=1e-12)
    for k in range(1, bits - min_bits + 1):
        want = (upstream * residuals[k]).sum_to_size(mask_shape)
        torch.testing.assert_close(masks.grad[k], want, rtol=1e-10, atol=1e-12)
        assert masks.grad[k].abs().max() > 0


def test_the_range_stays_while_the_scale_doubles():
    """A closed bit costs precision and hardly any range, where nesting by range would halve it."""
    x, scale = torch.linspace(-1, 1, 2001), torch.tensor(1 / 8)
    for closed in range(3):
        masks = torch.tensor([1.0] * (3 - closed) + [0.0] * closed)
        out = quantize_resolution(
            x, scale, scale / 3, masks, bits=4, min_bits=2, zero_points=(2, 4, 8), estimator="argmax"
        )
        spacing = out.unique().diff()
        assert torch.equal(spacing, torch.full_like(spacing, 2**closed / 8))
        assert out.min() == -1
        assert out.max() == 1 - 2**closed / 8
