"""Whole widths on a budget."""

import pytest
import torch

from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.rounding import adjust_widths


def linear(shares):
    n = len(shares)
    return WidthCost(torch.tensor(shares, dtype=torch.float64), torch.arange(n), torch.full((n,), n), 0.0)


def widths(*values):
    return torch.tensor(values).double()


def free(now, by):
    return torch.ones_like(now)


def adjust(now, cost, target, tolerance=0.01, price=free, low=2.0, high=8.0):
    return adjust_widths(now, torch.full_like(now, low), torch.full_like(now, high), cost, target, tolerance, price)


def test_what_meets_the_target_stays():
    now, changes = adjust(widths(3, 3), linear([0.5, 0.5]), 3.0)
    assert now.tolist() == [3, 3]
    assert changes == []


@pytest.mark.parametrize(("target", "row"), [(2.75, 1), (3.25, 1)])
def test_the_cheaper_change_is_taken_in_both_directions(target, row):
    now, changes = adjust(widths(3, 3, 3, 3), linear([0.25] * 4), target, price=lambda w, by: widths(9, 1, 9, 9))
    assert [c.row for c in changes] == [row]
    assert linear([0.25] * 4)(now) == target


def test_a_price_counts_for_what_it_saves():
    """Ten times the price for a hundred times the saving is cheap."""
    _now, changes = adjust(widths(4, 4), linear([0.99, 0.01]), 3.01, price=lambda w, by: widths(10, 1))
    assert [(c.row, c.before, c.after) for c in changes] == [(0, 4, 3)]


def test_of_what_the_network_gains_the_most_for_its_cost_is_taken():
    now, changes = adjust(widths(3, 3, 3), linear([0.2, 0.4, 0.4]), 3.4, price=lambda w, by: widths(-2, -1, -5))
    assert [c.row for c in changes] == [2]
    assert now.tolist() == [3, 3, 4]


def test_several_bits_come_nearer_where_no_single_bit_does():
    cost = linear([0.6, 0.4])
    now, _ = adjust(widths(3, 3), cost, 2.8, tolerance=0.001)
    assert cost(now) == pytest.approx(2.8)
    assert now.tolist() == [2, 4]


@pytest.mark.parametrize("start", [2, 3, 4])
def test_where_sizes_permit_nothing_nearer_it_stops_below(start):
    now, _ = adjust(widths(start), linear([1.0]), 2.9)
    assert now.tolist() == [2]


def test_what_is_left_goes_to_the_bits_that_are_worth_most():
    """The large row fits no more; of the small ones the third is worth most, then the second."""
    cost = linear([0.7, 0.1, 0.1, 0.1])
    now, changes = adjust(widths(3, 3, 3, 3), cost, 3.25, price=lambda w, by: -by * widths(9, 1, 2, 3), high=4.0)
    assert now.tolist() == [3, 3, 4, 4]
    assert [c.row for c in changes] == [3, 2]


@pytest.mark.parametrize("seed", range(20))
def test_a_file_that_rounds_is_held_to_its_target_to_the_byte(seed):
    """What whole widths cost is no sum of terms: each weight is rounded up to whole bytes, and a header grows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 40, (6,), generator=generator).double()
    index = torch.arange(6)

    def exact(now):
        content = float((sizes * now / 8).ceil().sum())
        return content + len(str(int(content)))

    cost = WidthCost(sizes / 8, index, torch.full((6,), 6), 0.0, exact, 3.0)
    target = float(torch.randint(60, 140, (1,), generator=generator))
    now, _ = adjust(torch.randint(2, 9, (6,), generator=generator).double(), cost, target, price=free)
    assert exact(now) <= target
    ups = [row for row in range(6) if now[row] < 8]
    assert all(exact(now + (index == row)) > target for row in ups)


def test_the_others_make_up_for_a_bit_of_a_large_row():
    cost = linear([0.8, 0.1, 0.1])
    now, changes = adjust(widths(3, 8, 8), cost, 4.2)
    assert cost(now) == pytest.approx(4.2)
    assert now[0] == 4
    assert now[1:].sum() == 10
    assert len(changes) == 7


def test_limits_hold():
    now, _ = adjust(widths(2, 2), linear([0.5, 0.5]), 9.0)
    assert now.tolist() == [8, 8]
    now, _ = adjust(widths(8, 8), linear([0.5, 0.5]), 1.0)
    assert now.tolist() == [2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_networks_of_ten_layers_come_within_the_tolerance_and_not_above(seed):
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(10, generator=generator).square() + 0.01
    cost = linear((shares / shares.sum()).tolist())
    now = torch.randint(2, 9, (10,), generator=generator).double()
    target = 2.3 + 4 * float(torch.rand(1, generator=generator))
    now, _ = adjust(now, cost, target, 0.05, price=lambda w, by: torch.rand(10, generator=generator).double())
    assert -1e-9 <= target - cost(now) <= 0.05


def test_bit_operations_count_the_product():
    cost = WidthCost(torch.tensor([2.0]).double(), torch.tensor([0]), torch.tensor([1]), 7.0)
    assert cost(widths(3, 4)) == 31
    assert cost.gradient(widths(3, 4)).tolist() == [8, 6]


SIZES = torch.tensor([30, 20, 20, 10, 10, 10]).double()
# A network at widths of its own, and a teacher of the same layers.
FOLLOWS = torch.arange(12) >= 6


def teacher_free(now, by):
    """A change costs the teacher nothing: on its own account it would give or take all."""
    return torch.where(FOLLOWS, 1e-6, 1.0).double()


@pytest.mark.parametrize("unit", ["average", "sum"])
@pytest.mark.parametrize("target", [2.5, 3.5, 4.0, 4.4, 4.6, 7.5])
@pytest.mark.parametrize("own", [(2, 8, 2, 6, 3, 4), (2, 2, 2, 2, 2, 3), (8, 8, 7, 8, 8, 8)])
def test_rows_that_follow_neither_take_bits_from_the_others_nor_leave_them_any(own, target, unit):
    shares = SIZES.repeat(2) / 200
    cost, wanted, tolerance = linear(shares.tolist()), target, 0.04
    if unit == "sum":
        index = torch.arange(12)
        cost = WidthCost(SIZES.repeat(2), index, torch.full((12,), 12), 1000.0)
        wanted, tolerance = 1000 + 200 * target, 0.04 * 200
    start = widths(*own, *[round(target)] * 6)
    low, high = torch.full_like(start, 2.0), torch.full_like(start, 8.0)
    now, changes = adjust_widths(start, low, high, cost, wanted, tolerance, teacher_free, follows=FOLLOWS)
    assert -1e-9 <= wanted - cost(now) <= tolerance
    means = [float((now * SIZES.repeat(2))[rows].sum() / 100) for rows in (~FOLLOWS, FOLLOWS)]
    # A bit of the smallest layer is a tenth of one network's mean.
    assert means == pytest.approx([target, target], abs=0.1)
    assert (now[FOLLOWS].max() - now[FOLLOWS].min()) <= 1
    assert changes or torch.equal(now, start)


def test_rows_that_follow_nothing_are_as_all_others():
    cost, start = linear([0.25] * 4), widths(4, 4, 4, 4)
    low, high = torch.full_like(start, 2.0), torch.full_like(start, 8.0)
    ends = [
        adjust_widths(start, low, high, cost, 3.0, 0.01, free, follows=follows)
        for follows in (None, torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
    ]
    assert all(torch.equal(now, ends[0][0]) and changes == ends[0][1] for now, changes in ends)
