"""Indices as a stream of bits.

1. The stream has the layout of docs/format.md for every width and count, and reads back as it was written.
2. Blocks join exactly; strides do not matter.
3. Wrong widths, types, lengths and non-zero padding are refused.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm.compressed import packing
from edkm.compressed.packing import check_padding, pack_indices, packed_bytes, unpack_indices


def plain_bits(indices: list[int], bits: int) -> list[int]:
    """The layout as docs/format.md words it, one bit at a time."""
    out = [0] * ((len(indices) * bits + 7) // 8)
    for i, index in enumerate(indices):
        for position in range(bits):
            b = i * bits + position
            out[b // 8] |= (index >> position & 1) << b % 8
    return out


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@given(streams())
@settings(deadline=None)
def test_a_stream_has_the_layout_of_the_format_and_reads_back(stream: tuple[list[int], int]):
    indices, bits = stream
    packed = pack_indices(torch.tensor(indices, dtype=torch.uint8), bits)
    assert packed.tolist() == plain_bits(indices, bits)
    assert packed.numel() == packed_bytes(len(indices), bits)
    assert unpack_indices(packed, bits, len(indices)).tolist() == indices


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [63, 64, 65, 128, 200])
def test_blocks_join_exactly(monkeypatch: pytest.MonkeyPatch, bits: int, count: int):
    monkeypatch.setattr(packing, "_BLOCK", 64)
    indices = torch.arange(count).mul(37).remainder(2**bits).to(torch.uint8)
    packed = pack_indices(indices, bits)
    assert packed.tolist() == plain_bits(indices.tolist(), bits)
    assert torch.equal(unpack_indices(packed, bits, count), indices)


def test_the_example_of_the_format_page():
    packed = pack_indices(torch.arange(8, dtype=torch.uint8), 3)
    assert bytes(packed.tolist()).hex(" ") == "88 c6 fa"


def test_indices_are_taken_row_by_row_whatever_the_strides():
    grid = torch.arange(12, dtype=torch.uint8).view(3, 4)
    assert torch.equal(unpack_indices(pack_indices(grid.t(), 4), 4, 12).view(4, 3), grid.t())


def test_packing_refuses_wrong_widths_and_types():
    with pytest.raises(ValueError, match=r"index 8 does not fit into 3 bits\. Use 4"):
        pack_indices(torch.tensor([1, 8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"must be uint8, got torch.int64"):
        pack_indices(torch.tensor([1]), 3)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            pack_indices(torch.zeros(1, dtype=torch.uint8), bits)
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            unpack_indices(torch.zeros(1, dtype=torch.uint8), bits, 1)


def test_unpacking_refuses_wrong_widths_types_and_padding():
    packed = pack_indices(torch.tensor([7, 7, 7], dtype=torch.uint8), 3)  # 9 bits
    for count in (2, 6):
        with pytest.raises(ValueError, match=rf"{count} indices of 3 bits are uint8 \[\d\], got torch.uint8"):
            unpack_indices(packed, 3, count)
    with pytest.raises(ValueError, match=r"got torch.int32"):
        unpack_indices(packed.int(), 3, 3)
    check_padding("a", packed, 3, 3)
    for bit in range(1, 8):
        damaged = packed.clone()
        damaged[-1] |= 1 << bit
        with pytest.raises(ValueError, match="a: the 7 padding bits after index 2 must be zero"):
            check_padding("a", damaged, 3, 3)
