"""Starting scales against a dense scan of all scales, against optima from the literature, and histograms."""

import itertools
import math

import pytest
import torch

from cpq_lightning.functional.grid import level_bounds, nearest_level
from cpq_lightning.functional.ranges import bin_centers, histogram, mse_scale
from tests.grids import KINDS, zero_point

N = 2000


def samples(name):
    g = torch.Generator().manual_seed(5)
    normal = torch.randn(N, generator=g)
    return {
        "normal": normal,
        "half normal": normal.abs(),
        "negative": -normal.abs(),
        "uniform": torch.rand(N, generator=g) * 2 - 1,
        "shifted": normal * 0.2 + 1,
        "heavy tails": normal * torch.exp(torch.randn(N, generator=g)),
        "one outlier": torch.cat([normal[:-1], torch.tensor([300.0])]),
        "mostly zero": normal.clamp(min=1.5) - 1.5,
        "two clusters": torch.where(normal > 0, 1.0, -1.0) + 0.01 * normal,
        "tiny": normal * 1e-12,
        "huge": normal * 1e12,
    }[name]


def error(values, scale, bits, zero_point, counts=None):
    """Squared error of each of the given scales, in float64."""
    values, scale = values.double(), torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1)
    squares = (values - nearest_level(values / scale, *level_bounds(bits, zero_point)) * scale).square()
    return (squares if counts is None else squares * counts).sum(1)


def dense_best(values, bits, zero_point):
    """Least error over 600 scales from far too small to far too large, and 500 more around the best of them."""
    span = values.abs().max().double() * 2
    scales = span * torch.logspace(-13, 0, 600, base=2, dtype=torch.float64)
    best = scales[error(values, scales, bits, zero_point).argmin()]
    fine = best * torch.linspace(0.98, 1.02, 500, dtype=torch.float64)
    return error(values, fine, bits, zero_point).min().item()


SIGNED = ["normal", "uniform", "shifted", "heavy tails", "one outlier", "two clusters", "tiny", "huge"]
UNSIGNED = ["half normal", "mostly zero", "normal", "one outlier", "heavy tails"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((n, "signed") for n in [*SIGNED, "negative"]),
        *((n, "unsigned") for n in UNSIGNED),
        *((n, kind) for n in ("normal", "shifted", "heavy tails") for kind in ("offset", "balanced")),
    ],
)
def test_no_scale_has_an_error_lower_by_more_than_a_percent(name, kind, bits):
    z = zero_point(kind, bits)
    values = samples(name)
    scale = mse_scale(values[None], bits=bits, zero_point=z)
    assert scale.shape == (1,)
    assert scale.dtype == torch.float32
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert error(values, scale, bits, z).item() <= 1.01 * dense_best(values, bits, z)


# Max, Quantizing for minimum distortion, 1960, table II: best spacing of 2^k equally spaced levels for a unit normal.
# His levels lie symmetrically around 0; with one of them at 0, the grid of two's complement, the optimum is close.
@pytest.mark.parametrize(("bits", "spacing"), [(2, 0.9957), (3, 0.5860), (4, 0.3352), (5, 0.1881)])
def test_a_unit_normal_gets_nearly_the_spacing_of_the_literature(bits, spacing):
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(2))
    assert mse_scale(values, bits=bits).item() == pytest.approx(spacing, rel=0.06)


@pytest.mark.parametrize(
    ("bits", "kind"),
    [
        (1, "signed"),
        (2, "signed"),
        (3, "signed"),
        (4, "signed"),
        (2, "unsigned"),
        (4, "unsigned"),
        (1, "balanced"),
        (2, "balanced"),
    ],
)
def test_a_unit_normal_gets_the_scale_that_integration_gives(bits, kind):
    point = zero_point(kind, bits)
    """Of the normal, or of its absolute values, by quadrature and weights: no sampling error on either side."""
    z = torch.linspace(0 if kind == "unsigned" else -6, 6, 6_001, dtype=torch.float64)
    weight = torch.exp(-z * z / 2)
    scales = torch.linspace(0.1, 1.6, 1501, dtype=torch.float64)
    errors = torch.cat([error(z, chunk, bits, point, weight) for chunk in scales.split(200)])
    fitted = mse_scale(z.float()[None], bits=bits, zero_point=point, counts=weight[None])
    assert fitted.item() == pytest.approx(scales[errors.argmin()].item(), rel=0.02)
    assert error(z, fitted, bits, point, weight).item() <= 1.002 * errors.min().item()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_get_a_scale_of_one(bits, kind):
    assert mse_scale(torch.zeros(2, 5), bits=bits, zero_point=zero_point(kind, bits)).tolist() == [1, 1]


def test_values_of_which_none_can_be_represented_get_a_scale_of_one():
    assert mse_scale(torch.rand(1, 9), bits=1).tolist() == [1]
    assert mse_scale(-torch.rand(1, 9), bits=4, zero_point=0).tolist() == [1]


@pytest.mark.parametrize(("bits", "kind"), [*itertools.product((1, 2, 8), KINDS), (3, "unsigned")])
@pytest.mark.parametrize("scale", [0.07, 1.0, 640.0])
def test_values_on_a_grid_that_they_fill_get_its_scale(bits, kind, scale):
    z = zero_point(kind, bits)
    low, high = level_bounds(bits, z)
    values = torch.arange(low, high + 1)[None] * scale
    fitted = mse_scale(values, bits=bits, zero_point=z)
    assert fitted.item() == pytest.approx(scale, rel=1e-6)


ROWS = torch.stack([samples("normal"), samples("half normal") * 50, torch.zeros(N), samples("tiny")])


def test_rows_are_fitted_on_their_own():
    short = ROWS[:, :200]
    assert mse_scale(short, bits=4).tolist() == [mse_scale(row[None], bits=4).item() for row in short]
    others = torch.stack([ROWS[0], *torch.randn(3, N)])
    assert mse_scale(ROWS, bits=4)[0] == mse_scale(others, bits=4)[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_several_long_rows_are_searched_at_fewer_scales(bits):
    rows = torch.stack([samples(name) for name in ("normal", "half normal", "heavy tails", "tiny")])
    together = mse_scale(rows, bits=bits)
    for row, scale in zip(rows, together, strict=True):
        least = error(row, mse_scale(row[None], bits=bits), bits, None)
        assert error(row, scale, bits, None) <= 1.1 * least
    # What lies on a grid stays exact, and an outlier does not hide it.
    exact = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, N)) * 0.25
    assert mse_scale(exact, bits=bits).tolist() == [0.25] * 3


def test_the_scale_grows_with_the_values():
    values = samples("heavy tails")[None]
    one = mse_scale(values, bits=4)
    for factor in (2.0**-40, 0.25, 2.0**30):
        assert torch.equal(mse_scale(values * factor, bits=4), one * factor)


def test_counts_stand_for_repeated_values():
    g = torch.Generator().manual_seed(3)
    values, counts = torch.randn(50, generator=g), torch.randint(0, 6, (50,), generator=g)
    # The search starts from the range of the values, so both ends must be in both sets.
    counts[values.argmin()] = counts[values.argmin()].clamp(min=1)
    counts[values.argmax()] = counts[values.argmax()].clamp(min=1)
    weighted = mse_scale(values[None], bits=3, counts=counts[None].double())
    repeated = mse_scale(values.repeat_interleave(counts)[None], bits=3)
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_fitted_in_float32(dtype):
    values = samples("normal")[None].to(dtype)
    scale = mse_scale(values, bits=4)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, mse_scale(values.float(), bits=4))


def test_histograms_add_up_exactly():
    low, high = torch.tensor(-2.0), torch.tensor(3.0)
    parts = [torch.randn(n) for n in (1000, 1, 0, 777)]
    counts = [histogram(part, low, high, 64) for part in parts]
    assert all(c.dtype == torch.int64 and c.shape == (64,) for c in counts)
    assert torch.equal(sum(counts), histogram(torch.cat(parts), low, high, 64))
    assert sum(counts).sum() == 1778


def test_a_histogram_counts_what_lies_in_each_cell():
    values = torch.rand(500, 2) * 5 - 2
    counts = histogram(values, torch.tensor(-2.0), torch.tensor(3.0), 10)
    for i, count in enumerate(counts.tolist()):
        left = -2 + i * 0.5
        assert count == ((values >= left) & (values < left + 0.5)).sum()


def test_both_ends_and_what_lies_beyond_them_are_counted():
    low, high = torch.tensor(0.0), torch.tensor(1.0)
    assert histogram(torch.tensor([0.0, 1.0, -5.0, 7.0]), low, high, 4).tolist() == [2, 0, 0, 2]
    assert histogram(torch.full((3,), 0.5), torch.tensor(0.5), torch.tensor(0.5), 4).sum() == 3


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-3.0, 0.5), (0.0, 4.0)])
def test_bin_centers_are_in_the_middle_of_their_cells_but_for_a_first_one_at_zero(low, high):
    bins, width = 16, (high - low) / 16
    centers = bin_centers(torch.tensor(low), torch.tensor(high), bins)
    want = [low + (i + 0.5) * width for i in range(bins)]
    want[0] = 0.0 if low == 0 else want[0]
    torch.testing.assert_close(centers, torch.tensor(want))
    # Each center falls back into its own cell.
    assert histogram(centers, torch.tensor(low), torch.tensor(high), bins).tolist() == [1] * bins


def test_a_scale_fitted_to_a_histogram_is_nearly_as_good_as_one_fitted_to_the_values():
    values = samples("half normal").clamp(min=0.5) - 0.5
    low, high = values.aminmax()
    centers = bin_centers(low, high, 2**14)
    scale = mse_scale(centers[None], bits=4, zero_point=0, counts=histogram(values, low, high, 2**14)[None].double())
    assert error(values, scale, 4, False).item() <= 1.01 * dense_best(values, 4, False)
    assert math.isfinite(scale.item())
