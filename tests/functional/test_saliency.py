"""What bits are worth to the loss, to second order."""

import itertools

import pytest
import torch

from cpq_lightning.functional.dropbits import expected_bits, expected_slope, open_probability
from cpq_lightning.functional.grid import level_bounds, nearest_level
from cpq_lightning.functional.saliency import bit_saliency
from tests.grids import KINDS, zero_point

WIDTHS = (2, 3, 5)


def rounded(x, scale, bits, kind="signed"):
    return nearest_level(x / scale, *level_bounds(bits, zero_point(kind, bits))) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 6])
def test_it_is_the_square_of_the_gradient_along_the_residual_by_blocks(kind, channels):
    points = [zero_point(kind, bits) for bits in WIDTHS]
    g = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(4, 6, 3, generator=g) for _ in range(2))
    scales = torch.rand(len(WIDTHS), channels, generator=g) + 0.1
    actual = bit_saliency(x, gradient, scales, WIDTHS, zero_points=points, channel_dim=1, blocks=1)
    by_block = bit_saliency(x, gradient, scales, WIDTHS, zero_points=points, channel_dim=1, blocks=1, by_block=True)
    rounded_to = [rounded(x, a.reshape(-1, 1), bits, kind) for a, bits in zip(scales, WIDTHS, strict=True)]
    for k, (narrow, wide) in enumerate(itertools.pairwise(rounded_to)):
        expected = (gradient * (wide - narrow)).sum((0, 2)).square()
        torch.testing.assert_close(by_block[k], expected)
        torch.testing.assert_close(actual[k], expected.sum()[None])


def test_it_tells_what_the_loss_rises_by_without_the_bit_where_the_model_explains_all_but_noise():
    """A linear model at its best fit: the mean over batches, times half the batch, is the rise of the loss."""
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([[0.5], [0.25]])
    weight = rounded(torch.randn(1, 8, generator=g), 0.25, 5)
    x = torch.randn(200_000, 8, generator=g) * torch.tensor([3.0, 1, 1, 1, 1, 1, 1, 0.1])
    y = x @ weight[0] + torch.randn(len(x), generator=g)

    def loss(w):
        return 0.5 * (x @ w[0] - y).square().mean()

    batch, actual = 100, []
    for start in range(0, len(x), batch):
        rows = slice(start, start + batch)
        gradient = ((x[rows] @ weight[0] - y[rows])[:, None] * x[rows]).mean(0, keepdim=True)
        actual.append(bit_saliency(weight, gradient, scales, (4, 5), zero_points=(8, 16)))
    estimate = batch / 2 * torch.stack(actual).mean()
    assert estimate == pytest.approx(float(loss(rounded(weight, 0.5, 4)) - loss(weight)), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_is_computed_in_single_precision_of_values_without_dimensions_too(dtype):
    x, gradient = torch.tensor(0.7, dtype=dtype), torch.tensor(3.0, dtype=dtype)
    actual = bit_saliency(x, gradient, torch.tensor([[0.5], [0.35]]), (3, 4), zero_points=(4, 8))
    assert actual.dtype == torch.float32
    assert actual.shape == (1, 1)
    assert float(actual) == pytest.approx(0.6**2, rel=0.02)


def test_the_slope_of_the_expected_worth_is_its_derivative():
    g = torch.Generator().manual_seed(0)
    logit = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    worth = torch.rand(5, 3, generator=g, dtype=torch.float64)
    p = open_probability(logit, noise=0.7, beta=0.5)
    (expected,) = torch.autograd.grad((p.cumprod(0) * worth).sum(), logit, retain_graph=True)
    torch.testing.assert_close(expected_slope(p.detach(), 0.7, worth), expected)
    (expected,) = torch.autograd.grad(expected_bits(p, 2).sum(), logit)
    torch.testing.assert_close(expected_slope(p.detach(), 0.7), expected)
