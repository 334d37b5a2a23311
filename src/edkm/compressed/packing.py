"""Indices as a stream of bits: index i of `bits` bits occupies bits [i * bits, (i + 1) * bits) of the stream.

Bit b of the stream is bit b % 8 of byte b // 8, counted from the least significant; indices are taken in
row-major order, and the bits after the last index, up to the end of its byte, are zero. docs/format.md has a
worked example.

After lcm(8, bits) bits an index starts on a byte again, so both directions work on a matrix with one such
period per row. Which byte and which shift column i of it needs is known beforehand: every step is one shift
of one byte column.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Indices handled at once: bounds what lives besides input and output, and keeps it in cache. A multiple of 8,
# so that every block starts on a byte.
_BLOCK = 1 << 20


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` indices of `bits` bits take: `ceil(count * bits / 8)`."""
    return (count * bits + 7) // 8


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Packs indices, in row-major order, into a stream of bits.

    Args:
        indices: uint8, any shape, every value below `2**bits`.
        bits: width of one index, 1 to 8.

    Returns:
        uint8 `[ceil(n * bits / 8)]` on the device of `indices`, n being the number of indices.

    Raises:
        ValueError: `bits` is not 1 to 8, the dtype is not uint8, or an index needs more than `bits` bits.

    Cost:
        Two passes over the indices. Besides input and output at most 3 MiB live, unless `indices` is not
        contiguous: then a contiguous copy as well.
    """
    _check_bits(bits)
    if indices.dtype != torch.uint8:
        raise ValueError(f"indices must be uint8, got {indices.dtype}. Convert them with .to(torch.uint8).")
    flat = indices.contiguous().view(-1)
    if flat.numel() and (largest := int(flat.max())) >= 1 << bits:
        raise ValueError(f"index {largest} does not fit into {bits} bits. Use {largest.bit_length()} or more.")
    packed = flat.new_empty(packed_bytes(flat.numel(), bits))
    period, width = _period(bits)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        size = packed_bytes(block.numel(), bits)
        if block.numel() % period:
            padded = block.new_zeros(math.ceil(block.numel() / period) * period)
            padded[: block.numel()] = block
            block = padded
        rows = block.view(-1, period)  # [m, period]
        out = rows.new_zeros(rows.shape[0], width)  # [m, width]
        for column in range(period):
            byte, shift = divmod(column * bits, 8)
            # A shift of uint8 drops what leaves the byte at the top; the next byte takes exactly that.
            out[:, byte] |= rows[:, column] << shift
            if shift + bits > 8:
                out[:, byte + 1] |= rows[:, column] >> (8 - shift)
        first = start * bits // 8
        packed[first : first + size] = out.view(-1)[:size]
    return packed


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """Reads `count` indices back from the stream that `pack_indices` wrote.

    Args:
        packed: uint8 `[ceil(count * bits / 8)]`.
        bits: width of one index, 1 to 8.
        count: how many indices the stream holds.

    Returns:
        uint8 `[count]` on the device of `packed`.

    Raises:
        ValueError: `bits` is not 1 to 8, `count` is negative, dtype or length do not match, or a padding bit
            after the last index is not zero (the stream was written with another width or count, or damaged).

    Cost:
        One pass over the stream. Besides input and output at most 3 MiB live.
    """
    _check_bits(bits)
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}.")
    expected = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (expected,):
        raise ValueError(
            f"{count} indices of {bits} bits are uint8 [{expected}], got {packed.dtype} "
            f"{list(packed.shape)}. Give the width and count that the stream was packed with."
        )
    check_padding(packed, bits, count)
    return _unpack(packed, bits, count, _BLOCK)


def _unpack(packed: Tensor, bits: int, count: int, at_once: int) -> Tensor:
    if count <= at_once:
        return _unpack_block(packed, bits)[:count]
    indices = packed.new_empty(count)
    for start in range(0, count, at_once):
        size = min(at_once, count - start)
        first = start * bits // 8
        indices[start : start + size] = _unpack_block(packed[first : first + packed_bytes(size, bits)], bits)[:size]
    return indices


def _unpack_block(block: Tensor, bits: int) -> Tensor:
    """All indices of a part of the stream, and those that padding would be."""
    period, width = _period(bits)
    if block.numel() % width:
        block = torch.nn.functional.pad(block, (0, -block.numel() % width))
    rows = block.reshape(-1, width)  # [m, width]
    columns = []
    for column in range(period):
        byte, shift = divmod(column * bits, 8)
        # In 32 bits and not by `>>`: so ONNX has the operations, too.
        value = rows[:, byte].int()
        if shift + bits > 8:
            value = value + 256 * rows[:, byte + 1].int()
        columns.append((torch.bitwise_right_shift(value, shift) & ((1 << bits) - 1)).to(torch.uint8))
    return torch.stack(columns, 1).view(-1)  # [m * period]


def unpack_rows(packed: Tensor, bits: int, shape: tuple[int, int], start: int, stop: int, in_blocks: bool = True) -> Tensor:
    """Some rows of the grid of indices that a whole stream holds. Reads no value of the stream: it can be traced.

    Args:
        packed: the stream of all rows.
        bits: width of one index, 1 to 8.
        shape: of the grid, rows and columns.
        start, stop: the rows; `start` is a multiple of 8, where the stream is at the start of a byte.
        in_blocks: bounds the memory; without, there are fewer operations.

    Returns:
        uint8 `[stop - start, cols]` on the device of `packed`.

    Cost:
        One pass over these rows of the stream. Besides input and output at most 3 MiB live, or without blocks twice the output.
    """
    rows, cols = shape
    # 8 rows end on a whole byte: no bits of the next rows stand where padding would.
    count = (min((stop + 7) // 8 * 8, rows) - start) * cols
    first = start * cols * bits // 8
    stream = packed[first : first + packed_bytes(count, bits)]
    indices = _unpack(stream, bits, count, _BLOCK if in_blocks else max(count, 1))
    return indices.view(-1, cols)[: stop - start]


def check_padding(packed: Tensor, bits: int, count: int) -> None:
    """Raises ValueError if a bit after the last index of a stream is not zero."""
    used = count * bits % 8
    if used and int(packed[-1]) >> used:
        raise ValueError(
            f"the {8 - used} padding bits after index {count - 1} must be zero, got byte {int(packed[-1])}. "
            "Give the width and count that the stream was packed with, or fetch the file again."
        )


def _period(bits: int) -> tuple[int, int]:
    """Indices, and bytes, after which an index starts on a byte again."""
    shared = math.gcd(8, bits)
    return 8 // shared, bits // shared


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}.")
