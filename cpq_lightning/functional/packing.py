"""Bit packing: integer codes of any width from 1 to 8 bits, without padding between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_lightning.functional.grid import signed_zero_point

# Codes packed at a time, which limits temporary memory; a multiple of 8, so that each chunk ends at a byte boundary.
_CHUNK = 1 << 18


def packed_bytes(numel: int, bits: float) -> int:
    """Size in bytes of ``numel`` packed codes of ``bits`` bits each.

    Example:
        >>> packed_bytes(9, 3)
        4
    """
    return math.ceil(numel * bits / 8)


def pack_codes(codes: Tensor, bits: int | Sequence[int]) -> Tensor:
    """Pack levels of a signed grid as ``level + 2^(bits-1)``, ``bits`` each, least significant bit first.

    Args:
        codes: Levels, integers, any shape; packed in row-major order.
        bits: Width of the codes, or one width for each row (index of the first dimension).

    Returns:
        Bytes (uint8), ``ceil(sum of all widths / 8)`` of them. Unused bits of the last byte are 0.

    Raises:
        ValueError: a level is outside its grid, or the number of widths is not that of the rows.

    Example:
        >>> packed = pack_codes(torch.tensor([-4, 3, 0, 1, -1, -2, 2, -3]), 3)
        >>> len(packed), unpack_codes(packed, 3, (8,)).tolist()
        (3, [-4, 3, 0, 1, -1, -2, 2, -3])
    """
    chunks = []
    for row, width in _rows(codes, bits):
        low, high = -signed_zero_point(width), signed_zero_point(width) - 1
        if row.numel() and (row.min() < low or row.max() > high):
            raise ValueError(f"codes must be from {low} to {high} at {width} bits, got {row.min()} to {row.max()}.")
        chunks.append((row.reshape(-1), width, low))
    if len(chunks) == 1:
        flat, width, low = chunks[0]
        return torch.cat([_to_bytes(_to_bits(part - low, width)) for part in flat.int().split(_CHUNK)])
    if not chunks:
        return torch.zeros(0, dtype=torch.uint8)
    return _to_bytes(torch.cat([_to_bits(flat.int() - low, width) for flat, width, low in chunks]))


def unpack_codes(packed: Tensor, bits: int | Sequence[int], shape: Sequence[int]) -> Tensor:
    """Levels (int8, of the given shape) from the bytes of :func:`pack_codes`.

    Raises:
        ValueError: too few or too many bytes for the shape, or unused bits that are not 0.
    """
    out = torch.empty(tuple(shape), dtype=torch.int8)
    rows = list(_rows(out, bits))
    total = sum(row.numel() * width for row, width in rows)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != packed_bytes(total, 1):
        raise ValueError(
            f"packed must be {packed_bytes(total, 1)} bytes (uint8) for shape {tuple(shape)} at {bits} bits, got shape "
            f"{tuple(packed.shape)} of {packed.dtype}."
        )
    if total % 8 and int(packed[-1]) >> (total % 8):
        raise ValueError("packed has nonzero bits behind its last code: it was not written by pack_codes.")
    if len(rows) == 1:
        width = rows[0][1]
        low, size = -signed_zero_point(width), _CHUNK * width // 8
        parts = [_to_codes(_from_bytes(part), width, low) for part in packed.split(size)]
        return torch.cat(parts)[: out.numel()].reshape(out.shape) if parts else out
    stream, start = _from_bytes(packed), 0
    for row, width in rows:
        end = start + row.numel() * width
        row.copy_(_to_codes(stream[start:end], width, -signed_zero_point(width)).reshape(row.shape))
        start = end
    return out


def _rows(codes: Tensor, bits: int | Sequence[int]) -> list[tuple[Tensor, int]]:
    if isinstance(bits, int):
        return [(codes, bits)]
    if len(bits) != len(codes):
        raise ValueError(f"bits must be one width, or {len(codes)}, one a row, got {len(bits)}.")
    return list(zip(codes, bits, strict=True))


def _to_bits(values: Tensor, width: int) -> Tensor:
    return ((values[:, None] >> torch.arange(width)) & 1).to(torch.uint8).reshape(-1)


def _to_bytes(stream: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def _from_bytes(packed: Tensor) -> Tensor:
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)


def _to_codes(stream: Tensor, width: int, low: int) -> Tensor:
    codes = stream[: len(stream) // width * width].reshape(-1, width).short()
    return ((codes << torch.arange(width, dtype=torch.int16)).sum(1) + low).to(torch.int8)
