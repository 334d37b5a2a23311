"""Pack indices into a stream of bits and read them back: index i of `bits` bits occupies bits [i * bits, (i + 1) * bits).

Bit b of the stream is bit b % 8 of byte b // 8, counted from the least significant; indices are taken in row-major order, and the
bits after the last index, up to the end of its byte, are zero. docs/format.md has a worked example.

After lcm(8, bits) bits an index starts on a byte again, so both directions work on a matrix with one such period per row. The byte
and the shift of column i are known beforehand: every step is one shift of one byte column.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edkm.compressed.jsonfile import FormatError

# Indices handled at once: bounds the memory besides input and output, and keeps it in cache. A multiple of 8, so that every block
# starts on a byte.
_BLOCK = 1 << 20


def packed_bytes(count: int, bits: int) -> int:
    """Compute the bytes of `count` indices of `bits` bits: `ceil(count * bits / 8)`."""
    return (count * bits + 7) // 8


def stored_bytes(weights: int, bits: int, luts: int, dim: int = 1, k: int | None = None) -> int:
    """Compute the bytes of a clustered tensor in a packed file: its indices and its float16 tables of `k` (`2**bits`) centroids."""
    return packed_bytes(weights // dim, bits) + 2 * luts * (k or 1 << bits) * dim


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Pack uint8 indices of any shape, in row-major order, into a stream of bits: uint8 `[ceil(n * bits / 8)]` on their device.

    Raises:
        ValueError: `bits` is not 1 to 8, the dtype is not uint8, or an index needs more than `bits` bits.

    Cost:
        Two passes over the indices. Besides input and output at most 3 MiB live, and a copy of indices that are not contiguous.
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
        rows = torch.nn.functional.pad(block, (0, -block.numel() % period)).view(-1, period)  # [m, period]
        out = rows.new_zeros(rows.shape[0], width)  # [m, width]
        for column in range(period):
            byte, shift = divmod(column * bits, 8)
            # A shift of uint8 drops the bits that leave the byte at the top; the next byte takes exactly those.
            out[:, byte] |= rows[:, column] << shift
            if shift + bits > 8:
                out[:, byte + 1] |= rows[:, column] >> (8 - shift)
        first = start * bits // 8
        packed[first : first + size] = out.view(-1)[:size]
    return packed


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """Read `count` indices, uint8 `[count]`, back from the stream that `pack_indices` wrote.

    Raises:
        ValueError: `bits` is not 1 to 8, or dtype or length do not match.

    Cost:
        One pass over the stream. Besides input and output at most 3 MiB live.
    """
    _check_bits(bits)
    expected = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (expected,):
        raise ValueError(
            f"{count} indices of {bits} bits are uint8 [{expected}], got {packed.dtype} "
            f"{list(packed.shape)}. Give the width and count that the stream was packed with."
        )
    return _unpack(packed, bits, count, _BLOCK)


def unpack_rows(packed: Tensor, bits: int, shape: tuple[int, int], start: int, stop: int, in_blocks: bool = True) -> Tensor:
    """Read some rows of a grid of indices, uint8 `[stop - start, cols]`, from the stream of all.

    It looks at no value of the stream: it can be traced.

    Args:
        packed, bits: the stream of all rows, and the width of an index in it.
        shape: of the grid, rows and columns.
        start, stop: the rows; `start` is a multiple of 8, where the stream is at the start of a byte.
        in_blocks: at most 3 MiB live besides input and output; without, there are fewer operations and twice the output lives.
    """
    rows, cols = shape
    # 8 rows end on a whole byte: no bits of the next rows stand in the place of padding.
    count = (min((stop + 7) // 8 * 8, rows) - start) * cols
    first = start * cols * bits // 8
    stream = packed[first : first + packed_bytes(count, bits)]
    indices = _unpack(stream, bits, count, _BLOCK if in_blocks else max(count, 1))
    return indices.view(-1, cols)[: stop - start]


def unpack_at(packed: Tensor, bits: int, cols: int, rows: Tensor) -> Tensor:
    """Read the indices of rows `[n]` int64 of a grid of `cols` columns: int32 `[n, cols]`.

    It can be traced; some 40 bytes live for each.
    """
    bit = (rows.unsqueeze(1) * cols + torch.arange(cols, device=rows.device)) * bits
    # An index lies in two bytes at most; the last one does not read beyond the stream.
    byte = bit // 8
    low, high = (packed[b].int() for b in (byte, (byte + 1).clamp(max=len(packed) - 1)))
    return torch.bitwise_right_shift(low + 256 * high, (bit % 8).int()) & ((1 << bits) - 1)


def check_padding(name: str, packed: Tensor, bits: int, count: int) -> None:
    """Refuse a stream with a bit after the last index that is not zero: it was packed with another width or count, or is damaged."""
    used = count * bits % 8
    if used and int(packed[-1]) >> used:
        raise FormatError(
            f"{name}: the {8 - used} padding bits after index {count - 1} must be zero, got byte {int(packed[-1])}. Fetch the file again."
        )


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
    """Read all indices of a part of the stream, the padding's included."""
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


def _period(bits: int) -> tuple[int, int]:
    """Count the indices, and the bytes, after which an index starts on a byte again."""
    shared = math.gcd(8, bits)
    return 8 // shared, bits // shared


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}.")
