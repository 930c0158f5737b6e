"""The kinds of grids that tests run through."""

from cpq_lightning.functional.grid import balanced_zero_point, narrower_zero_point, signed_zero_point

KINDS = ("signed", "unsigned", "offset", "balanced")


def zero_point(kind, bits):
    """A zero point of that kind: the offset is about a quarter of the levels, and an odd number."""
    return {
        "signed": signed_zero_point(bits),
        "unsigned": 0,
        "offset": min(2**bits - 1, 2**bits // 4 | 1),
        "balanced": balanced_zero_point(bits),
    }[kind]


def narrower(kind, bits, width):
    """The zero point of the grid of ``width`` that nests by range in one of ``bits``."""
    return narrower_zero_point(zero_point(kind, bits), bits, width)
