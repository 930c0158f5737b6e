"""Points of a run and values on the way between two of them."""

import itertools
import math

import pytest

from cpq_lightning.functional.schedule import SHAPES, anneal, resolve_point

POINTS = [
    (0, 1000, 0), (30, 1000, 30), (5000, 1000, 5000), (30, math.inf, 30), (0, 0, 0),
    (0.0, 1000, 0), (0.25, 1000, 250), (1.0, 1000, 1000), (0.5, 3, 2), (0.1, 7, 1), (0.333, 10, 3),
    (0.0, math.inf, 0), (1, 1000, 1),
]  # fmt: skip


@pytest.mark.parametrize(("point", "total", "want"), POINTS)
def test_points_are_steps_or_fractions(point, total, want):
    got = resolve_point("start", point, total)
    assert got == want
    assert type(got) is int


POINT_ERRORS = [
    ("0.5", 1000, TypeError, "step count .int. or a fraction"),
    (None, 1000, TypeError, "step count .int. or a fraction"),
    (True, 1000, TypeError, "step count .int. or a fraction"),
    (-1, 1000, ValueError, "not be negative, got -1"),
    (-0.1, 1000, ValueError, "fraction of the run from 0.0 to 1.0"),
    (1.5, 1000, ValueError, "write 1 for a step count"),
    (300.0, 1000, ValueError, "write 300 for a step count"),
    (0.5, math.inf, ValueError, "max_steps"),
    (1.0, math.inf, ValueError, "step count"),
    (math.nan, 1000, ValueError, "fraction of the run"),
    (math.inf, 1000, ValueError, "fraction of the run"),
]


@pytest.mark.parametrize(("point", "total", "error", "message"), POINT_ERRORS)
def test_a_wrong_point_is_refused_by_the_name_of_its_argument(point, total, error, message):
    with pytest.raises(error, match=f"^warmup_end.*{message}"):
        resolve_point("warmup_end", point, total)


HALFWAY_UP = (1 - math.cos(math.pi / 4)) / 2
VALUES = [
    ("linear", 0, 1.0), ("linear", 10, 1.0), ("linear", 15, 0.8125), ("linear", 20, 0.625), ("linear", 30, 0.25),
    ("linear", 99, 0.25),
    ("cosine", 10, 1.0), ("cosine", 15, 1 - 0.75 * HALFWAY_UP), ("cosine", 20, 0.625), ("cosine", 30, 0.25),
    ("exponential", 10, 1.0), ("exponential", 15, 2**-0.5), ("exponential", 20, 0.5), ("exponential", 30, 0.25),
    ("exponential", 31, 0.25),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "step", "want"), VALUES)
def test_values_between_ten_and_thirty_from_one_to_a_quarter(shape, step, want):
    assert anneal(step, start=10, end=30, first=1.0, last=0.25, shape=shape) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("first", "last"), [(1.0, 0.1), (0.1, 1.0), (0.3, 0.3)])
def test_every_shape_is_monotone_and_meets_both_ends_exactly(shape, first, last):
    values = [anneal(step, start=5, end=42, first=first, last=last, shape=shape) for step in range(60)]
    assert values[:6] == [first] * 6
    assert values[42:] == [last] * 18
    sign = 1 if last >= first else -1
    assert all(sign * (b - a) >= 0 for a, b in itertools.pairwise(values))
    if first != last:
        assert len(set(values)) == 38


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_without_a_length_jumps(shape):
    assert [anneal(step, start=10, end=10, first=1.0, last=0.5, shape=shape) for step in (9, 10, 11)] == [1.0, 0.5, 0.5]
    assert anneal(0, start=0, end=0, first=1.0, last=0.5, shape=shape) == 0.5


def test_linear_is_the_default():
    settings = {"start": 10, "end": 30, "first": 1.0, "last": 0.25}
    assert anneal(13, **settings) == anneal(13, **settings, shape="linear")


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^shape must be one of .'linear', .*, got 'quadratic'"):
        anneal(0, start=0, end=1, first=1.0, last=0.0, shape="quadratic")


@pytest.mark.parametrize(("first", "last"), [(1.0, 0.0), (0.0, 1.0), (-1.0, -0.5)])
def test_exponential_through_zero_is_refused_and_linear_is_not(first, last):
    settings = {"start": 0, "end": 10, "first": first, "last": last}
    with pytest.raises(ValueError, match=r"exponential.*over 0"):
        anneal(5, **settings, shape="exponential")
    assert anneal(5, **settings) == pytest.approx((first + last) / 2)
