"""Codes packed at any width come back as they were, in as few bytes as there are bits for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.packing import pack_codes, unpack_codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, (1 << 18) - 1, (1 << 18) + 5])
def test_codes_of_any_width_come_back(bits, count):
    low, high = level_bounds(bits)
    codes = torch.randint(low, high + 1, (count,), dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, (count,)), codes)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 20), st.integers(0, 2**31))
def test_rows_have_widths_of_their_own(widths, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(*(b + i for i, b in enumerate(level_bounds(k))), (columns,), generator=generator) for k in widths
    ]
    codes = torch.stack(rows).to(torch.int8)
    packed = pack_codes(codes, widths)
    assert len(packed) == -(-sum(widths) * columns // 8)
    assert torch.equal(unpack_codes(packed, widths, codes.shape), codes)


def test_the_layout_of_bits_is_fixed():
    # level + 4, three bits each, the least significant first: 0 | 7 << 3 | 4 << 6 | 5 << 9, in two bytes.
    assert pack_codes(torch.tensor([-4, 3, 0, 1]), 3).tolist() == [0b00111000, 0b1011]


def test_codes_outside_the_grid_are_refused():
    with pytest.raises(ValueError, match="codes must be from -4 to 3 at 3 bits, got -5 to 0"):
        pack_codes(torch.tensor([-5, 0]), 3)


def test_a_wrong_length_or_stray_bits_are_refused():
    packed = pack_codes(torch.zeros(3, dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="packed must be 3 bytes"):
        unpack_codes(packed, 3, (8,))
    packed[-1] |= 0b1000_0000
    with pytest.raises(ValueError, match="bits behind its last code"):
        unpack_codes(packed, 3, (3,))


def test_as_many_widths_as_rows():
    with pytest.raises(ValueError, match="or 2, one a row, got 3"):
        pack_codes(torch.zeros(2, 4), [1, 2, 3])
