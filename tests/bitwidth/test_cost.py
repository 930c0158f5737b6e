"""Averages of bits, and bytes."""

import pytest

from cpq_lightning.bitwidth.cost import average_bits
from cpq_lightning.functional.packing import packed_bytes


def test_the_average_is_that_over_all_single_elements():
    layers = [(432, 8), (9216, 3), (36864, 2), (640, 8), (1, 5)]
    every = [bits for numel, bits in layers for _ in range(numel)]
    assert average_bits(layers) == pytest.approx(sum(every) / len(every), rel=1e-15)


def test_the_average_takes_expected_bits_and_any_iterable():
    assert average_bits((n, b) for n, b in [(1, 2.5), (3, 4.5)]) == 4.0


@pytest.mark.parametrize("nothing", [[], [(0, 8)]])
def test_there_is_no_average_of_nothing(nothing):
    assert average_bits(nothing) is None


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1001])
def test_bytes_are_those_that_hold_all_bits_in_a_row(numel, bits):
    assert packed_bytes(numel, bits) == len(bytes((numel * bits + 7) // 8))
    assert (packed_bytes(numel, bits) - 1) * 8 < numel * bits <= packed_bytes(numel, bits) * 8


def test_fractional_bits_round_up_to_the_next_byte():
    assert [packed_bytes(16, bits) for bits in (2.0, 2.01, 2.5, 2.51)] == [4, 5, 5, 6]
