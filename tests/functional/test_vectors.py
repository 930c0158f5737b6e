"""Reference values made by brute force with as many digits as it takes, far outside the grid too."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from cpq_lightning.functional.categorical import quantize

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "quantizer.json").read_text())["cases"]
ESTIMATORS = ("argmax", "expectation")


def by_grids():
    groups = defaultdict(list)
    for case in CASES:
        groups[tuple(map(tuple, case["rings"]))].append(case)
    return groups


GROUPS = by_grids()


def grid_of(grids):
    """The widths and the sign that the grids of a case imply."""
    low, high = grids[-1]
    bits = int(math.log2(high - low + 1))
    return {"bits": bits, "min_bits": bits - len(grids) + 1, "zero_point": -low}


def leaf(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def assert_agrees(what, got, want):
    """Within max(1e-12, 1e-9 |want|), infinities by equality."""
    got, want = got.detach(), torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape, what
    tolerance = (1e-9 * want.abs()).clamp(min=1e-12)
    bad = ~((got == want) | ((got - want).abs() <= tolerance)) | (want.isinf() & (got != want))
    assert not bad.any(), f"{what}: got {got[bad].tolist()}, want {want[bad].tolist()}"


def test_the_file_holds_both_signs_every_width_closed_grids_and_distant_values():
    grids = [grid_of(case["rings"]) for case in CASES]
    assert len(CASES) == 240
    assert {g["zero_point"] > 0 for g in grids} == {True, False}
    assert {g["bits"] for g in grids} >= {1, 2, 3, 4, 5, 8}
    assert any(0.0 in case["masks"] for case in CASES)
    assert any(abs(case["x"] / case["step"]) > 1000 for case in CASES)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_value_agrees_in_value_level_and_every_gradient(estimator):
    for index, case in enumerate(CASES):
        x, scale, sigma, masks = (leaf(case[name]) for name in ("x", "step", "sigma", "masks"))
        out = quantize(x, scale, sigma, masks, **grid_of(case["rings"]), estimator=estimator)
        out.backward()
        assert_agrees(f"value of case {index}", out, case["value"])
        assert_agrees(f"level of case {index}", out / scale, float(case["level"]))
        for name, got in (("x", x), ("step", scale), ("sigma", sigma), ("masks", masks)):
            assert_agrees(f"{name} of case {index}", got.grad, case[estimator][name])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_with_a_scale_per_element_agrees(estimator):
    for grids, cases in GROUPS.items():
        x, scale, sigma = (leaf([case[name] for case in cases]) for name in ("x", "step", "sigma"))
        masks = leaf(list(zip(*[case["masks"] for case in cases], strict=True)))
        out = quantize(x, scale, sigma, masks, **grid_of(grids), estimator=estimator)
        out.sum().backward()
        assert_agrees(f"{grids}: value", out, [case["value"] for case in cases])
        for name, got in (("x", x), ("step", scale), ("sigma", sigma)):
            assert_agrees(f"{grids}: {name}", got.grad, [case[estimator][name] for case in cases])
        assert_agrees(
            f"{grids}: masks", masks.grad, list(zip(*[case[estimator]["masks"] for case in cases], strict=True))
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_that_share_a_scale_add_up_their_gradients(estimator):
    """x has rows and columns, scale and sigma one value a column, masks one a column with a dimension to stretch."""
    for grids, cases in GROUPS.items():
        upstream = torch.tensor([[0.25], [1.0], [2.5]], dtype=torch.float64)
        x = leaf([[case["x"] for case in cases]] * len(upstream))
        scale, sigma = (leaf([case[name] for case in cases]) for name in ("step", "sigma"))
        masks = leaf([[row] for row in zip(*[case["masks"] for case in cases], strict=True)])
        out = quantize(x, scale, sigma, masks, **grid_of(grids), estimator=estimator)
        out.backward(upstream.expand_as(out))
        total = upstream.sum()
        want = {
            name: torch.tensor([case[estimator][name] for case in cases], dtype=torch.float64)
            for name in ("x", "step", "sigma")
        }
        assert_agrees(f"{grids}: x", x.grad, upstream * want["x"])
        assert_agrees(f"{grids}: scale", scale.grad, total * want["step"])
        assert_agrees(f"{grids}: sigma", sigma.grad, total * want["sigma"])
        derivatives = torch.tensor([case[estimator]["masks"] for case in cases], dtype=torch.float64)
        assert_agrees(f"{grids}: masks", masks.grad, (total * derivatives.T)[:, None])
