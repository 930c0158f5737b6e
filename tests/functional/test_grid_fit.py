"""Grids that are fitted to histograms, against a search through all zero points and many scales."""

import pytest
import torch
import torch.nn.functional as F

from cpq_lightning.functional.grid import check_zero_point, level_bounds, signed_zero_point
from cpq_lightning.functional.grid_fit import fit_histogram, fit_range, grid_error, promising_zero_points
from cpq_lightning.functional.ranges import bin_centers, histogram

SHAPES = {
    "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish, "leaky": lambda x: F.leaky_relu(x, 0.1), "relu": F.relu,
    "identity": lambda x: x, "negative": lambda x: -F.relu(x), "shifted": lambda x: x + 1.5,
}  # fmt: skip


def histogram_of(name, bins=4096):
    values = SHAPES[name](1.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    low, high = values.aminmax()
    return bin_centers(low, high, bins)[None], histogram(values, low, high, bins)[None].double()


def error(centers, counts, fit, bits):
    return grid_error(centers, counts, fit.scale, bits, fit.zero_point)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", SHAPES)
def test_no_grid_has_an_error_lower_by_more_than_two_percent(name, bits):
    centers, counts = histogram_of(name)
    fit = fit_histogram(centers, counts, bits, "offset")
    scales = float(centers.abs().max()) * torch.logspace(-9, 1, 120, base=2)
    every = [grid_error(centers, counts, s.reshape(1), bits, z) for s in scales for z in range(2**bits)]
    assert error(centers, counts, fit, bits) <= 1.02 * min(every)


@pytest.mark.parametrize(
    ("name", "bits", "expected"), [("relu", 4, 0), ("identity", 4, 8), ("silu", 4, 1), ("silu", 2, 0)]
)
def test_the_kind_follows_the_values(name, bits, expected):
    centers, counts = histogram_of(name)
    fit = fit_histogram(centers, counts, bits, "auto")
    # Seven or eight levels below zero make no difference of a hundredth to symmetric values.
    assert fit.zero_point == expected


def test_an_end_is_kept_where_an_offset_gains_less_than_a_hundredth():
    centers = torch.linspace(-1, 1, 4096)[None]
    counts = torch.ones_like(centers).double()
    exact, auto = (fit_histogram(centers, counts, 8, grid) for grid in ("offset", "auto"))
    assert auto.zero_point == 128
    assert error(centers, counts, exact, 8) > 0.99 * error(centers, counts, auto, 8)


@pytest.mark.parametrize(("grid", "zero_points"), [("signed", {8}), ("unsigned", {0}), ("int8", {0, 8})])
@pytest.mark.parametrize("name", SHAPES)
def test_a_grid_that_is_asked_for_is_taken(name, grid, zero_points):
    centers, counts = histogram_of(name)
    fit = fit_histogram(centers, counts, 4, grid)
    assert fit.zero_point in zero_points
    assert fit_range(centers.min(), centers.max(), 4, grid).zero_point in zero_points
    assert fit_histogram(centers, counts, 8, "int8").zero_point == 128


def test_a_grid_with_negative_levels_keeps_some():
    centers, counts = histogram_of("relu")
    for grid in ("auto", "offset"):
        assert fit_histogram(centers, counts, 4, grid, 1).zero_point >= 1
        assert fit_range(centers.min(), centers.max(), 4, grid, 1).zero_point >= 1


@pytest.mark.parametrize("grid", ["auto", "offset", "signed"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_range_clips_nothing_with_the_smallest_scale(name, grid):
    centers, _ = histogram_of(name)
    low, high = centers.min(), centers.max()
    fit = fit_range(low, high, 4, grid)
    bottom, top = level_bounds(4, fit.zero_point)
    assert bottom * fit.scale <= low.clamp(max=0) * (1 - 1e-6)
    assert top * fit.scale >= high.clamp(min=0) * (1 - 1e-6)
    if grid == "offset":
        others = [fit_range(low, high, 4, other).scale for other in ("auto", "signed")]
        assert all(fit.scale <= other * 1.0001 for other in others)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_the_search_does_not_depend_on_the_unit(scale):
    centers, counts = histogram_of("silu", 512)
    best = promising_zero_points(centers * scale, counts, bits=4, candidates=range(9), keep=2)
    assert best == promising_zero_points(centers, counts, bits=4, candidates=range(9), keep=2)


@pytest.mark.parametrize("zero_point", [-1, 16, 0.5, 7.4, 8.5])
def test_zero_points_that_a_grid_does_not_have_are_refused(zero_point):
    with pytest.raises(ValueError, match=r"zero_point must be a whole number from 0 to 15 at 4 bits, or 7\.5"):
        check_zero_point(4, zero_point)
    assert check_zero_point(4, None) == signed_zero_point(4)
