"""The packed product on a CPU: every build of the kernels, and plain torch, against the weight in float64.

1. Any width, shape, dtype and layout of x gives torch's float32 product, as exactly; decoding gives the weight to the bit.
2. The kernels read no byte beyond the stream, the tables and x; an index beyond its table counts as zero; subnormal values are read.
3. The number of threads changes no bit, nor do several weights in one call; the threads are torch's.
4. Without a compiler plain torch takes over, and one warning says so; a weight with another layout is not given to the kernels.
"""

import ctypes
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packedkernels import VARIANTS, Fenced, built, check
from torch.nn.functional import linear

from edkm.compressed import cpu
from edkm.compressed import linear as packed_products
from edkm.compressed.entries import Entry
from edkm.compressed.linear import PackedWeight, packed_linear
from edkm.compressed.packing import pack_indices
from edkm.core import native

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[*VARIANTS, "torch"])
def kernels(request, monkeypatch):
    """`cpu` with one build of the kernels, or none."""
    library = None if request.param == "torch" else built(request.param)
    monkeypatch.setattr(cpu, "_library", lambda: library)
    return library


def packed_weight(rows, cols, bits, luts, dtype=torch.float16, k=None, seed=0):
    """A packed weight, and the weight it stands for `[rows, cols]`."""
    generator = torch.Generator().manual_seed(seed)
    k = k or 1 << bits
    indices = torch.randint(0, k, (rows, cols), dtype=torch.uint8, generator=generator)
    lut = torch.randn(luts, k, 1, generator=generator).to(dtype)
    weight = lut.view(luts, k).gather(1, indices.view(luts, -1).long()).view(rows, cols)
    return weight_of(pack_indices(indices, bits), lut, bits, rows, cols), weight


def weight_of(stream, lut, bits, rows, cols):
    return PackedWeight(stream, lut, Entry(bits, (rows, cols), lut.shape[2], lut.shape[0], 0.0, rows))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rows,cols,luts", [(8, 64, 8), (37, 576, 37), (64, 128, 4), (12, 1000, 1), (130, 344, 130), (5, 7, 5), (9, 33, 3)])
def test_equals_the_unpacked_weight(kernels, bits, rows, cols, luts):
    packed, weight = packed_weight(rows, cols, bits, luts)
    assert torch.equal(packed.dense(torch.float32), weight.float())
    for batch in (1, 2, 3, 5, 16, 33):
        check(torch.randn(batch, cols, generator=torch.Generator().manual_seed(batch)), packed, weight)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_shape_and_dtype(variant, data):
    library = built(variant)
    bits = data.draw(st.integers(1, 8))
    luts, group, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 300))
    k = data.draw(st.integers((1 << bits - 1) + 1, 1 << bits))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99))
    packed, weight = packed_weight(luts * group, cols, bits, luts, dtype, k, seed)
    x = torch.randn(data.draw(st.integers(0, 40)), cols).to(data.draw(st.sampled_from(DTYPES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_library", lambda: library)
        check(x, packed, weight)
        assert torch.equal(packed.dense(dtype), weight)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="no mprotect")
@pytest.mark.parametrize("bits", range(1, 9))
def test_reads_nothing_beyond_the_end(kernels, bits):
    fenced = Fenced()
    for rows, cols, luts in ((1, 8, 1), (3, 64, 3), (5, 576, 5), (6, 512, 1), (9, 33, 3), (4, 2048, 2)):
        packed, weight = packed_weight(rows, cols, bits, luts, k=(1 << bits) - (bits > 1))
        packed = weight_of(fenced(packed.stream), fenced(packed.lut), bits, rows, cols)
        check(fenced(torch.randn(3, cols)), packed, weight)
        assert torch.equal(packed.dense(torch.float32), weight.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_an_index_beyond_the_table_is_zero(kernels, bits):
    if kernels is None:
        return  # torch's own lookup raises
    k = (1 << bits) - 1
    indices = torch.full((8, 64), k, dtype=torch.uint8)
    indices[:, ::2] = 0
    lut = torch.ones(8, k, 1, dtype=torch.float16)
    packed = weight_of(pack_indices(indices, bits), lut, bits, 8, 64)
    assert torch.equal(packed.dense(torch.float32), (indices == 0).float())
    assert torch.equal(packed_linear(torch.ones(2, 64), packed), torch.full((2, 8), 32.0))


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_some_rows(kernels, bits, monkeypatch):
    monkeypatch.setattr(packed_products, "_TILE_WEIGHTS", {"cpu": 24 * 33})
    packed, weight = packed_weight(70, 33, bits, 10)
    for start, stop in ((0, 70), (0, 1), (8, 41), (64, 70)):
        for dtype in (torch.float16, torch.float32):
            assert torch.equal(packed.decode_rows(start, stop, dtype), weight[start:stop].to(dtype))
    assert len(list(packed.tiles(0, 70, torch.float32))) == 3
    check(torch.randn(40, 33), packed, weight)


def test_layouts_of_x(kernels):
    packed, weight = packed_weight(16, 96, 3, 16)
    for x in (torch.randn(96, 6).T, torch.randn(2, 3, 2, 96)[:, ::2], torch.randn(96), torch.randn(1, 192)[:, 1:97]):
        check(x, packed, weight)
    for empty in (torch.randn(0, 96), torch.randn(2, 0, 96)):
        assert packed_linear(empty, packed).shape == (*empty.shape[:-1], 16)


def test_special_values(kernels):
    packed, _ = packed_weight(8, 64, 4, 8)
    packed.lut[:, 0] = 2.0**-24  # the least half
    weight = packed.dense(torch.float32)
    assert (weight[weight.abs() < 1e-6] == 2.0**-24).all() and (weight.abs() < 1e-6).any()
    for dtype in DTYPES:
        x = torch.zeros(3, 64, dtype=dtype)
        x[0, 5], x[1, 7], x[2, 9] = float("inf"), float("nan"), torch.finfo(dtype).tiny
        torch.testing.assert_close(packed_linear(x, packed), linear(x.float(), weight).to(dtype), equal_nan=True)


@pytest.mark.parametrize("bits,luts", [(3, 640), (8, 1)])
def test_threads_do_not_change_the_result(bits, luts):
    packed, _ = packed_weight(640, 1024, bits, luts)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = [packed_linear(torch.ones(b, 1024).cos(), packed) for b in (1, 16, 40)]
            results.append([*found, packed.dense(torch.float32)])
    finally:
        torch.set_num_threads(before)
    fused = [[found[0], found[1], found[3]] for found in results]  # torch's own product is not the same to the bit
    assert all(torch.equal(a, b) for found in fused[1:] for a, b in zip(fused[0], found, strict=True))
    for found in results[1:]:
        torch.testing.assert_close(found[2], results[0][2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits,cols", [(3, 1024), (4, 200), (3, 33), (8, 512)])
def test_several_weights_in_one_call(kernels, bits, cols, threads):
    if kernels is None:
        return  # it has no such call
    matrices = []
    for rows in (200, 1, 64, 640, 65):
        packed, _ = packed_weight(rows, cols, bits, rows, seed=rows)
        matrices.append(packed.in_memory)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (torch.randn(1, cols), torch.randn(2, 3, cols).half(), torch.randn(0, cols)):
            together = cpu.products(x, matrices)
            for out, matrix in zip(together, matrices, strict=True):
                assert torch.equal(out, cpu.multiply(x, *matrix)) and out.shape == (*x.shape[:-1], matrix[3])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_threads_are_those_of_torch():
    if cpu._library() is None:
        pytest.skip("no C compiler")
    torch.ones(1 << 20).sum()  # torch's threads have started

    def threads():
        return len(list(Path("/proc/self/task").iterdir()))

    packed, _ = packed_weight(640, 1024, 3, 640)
    before = threads()
    for _ in range(10):
        packed_linear(torch.ones(1, 1024), packed)
    assert threads() == before


def test_no_compiler_is_said_once(monkeypatch):
    monkeypatch.setattr(native, "library", lambda *_: None)
    cpu._library.cache_clear()
    try:
        packed, weight = packed_weight(8, 64, 3, 8)
        with pytest.warns(UserWarning, match="packed layers run in plain torch, many times slower: there is no C compiler"):
            assert not packed.compiled
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(torch.randn(2, 64), packed, weight)
    finally:
        cpu._library.cache_clear()


@pytest.mark.parametrize("flush", [False, True])
def test_every_half_is_read(kernels, flush):
    """Also where subnormal numbers are switched off, as -ffast-math libraries do to the process they are loaded into."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    lut = halves[halves.isfinite()]
    lut = torch.cat([lut, lut.new_zeros(-len(lut) % 256)]).view(-1, 256, 1)
    packed = weight_of(torch.arange(256, dtype=torch.uint8).repeat(len(lut)), lut, 8, len(lut), 256)
    expected = lut.float().view(-1, 256)
    torch.set_flush_denormal(flush)
    try:
        found = packed.dense(torch.float32)
    finally:
        torch.set_flush_denormal(False)
    if kernels is not None:  # torch's own conversion loses them
        assert torch.equal(found, expected)


def test_only_weights_of_its_layout_are_read():
    packed, _ = packed_weight(8, 64, 3, 8)
    stream, lut = packed.stream, packed.lut
    assert cpu.reads(stream, lut, 3, 8, 64) == (native.library(cpu._SOURCE, *cpu._FLAGS) is not None)
    for shape, dtype in (((8, 8, 2), lut.dtype), ((3, 8, 1), lut.dtype), ((8, 9, 1), lut.dtype), ((8, 8, 1), torch.float64)):
        assert not cpu.reads(stream, torch.zeros(shape, dtype=dtype), 3, 8, 64)
    for other in (stream.to("meta"), stream[:-1], stream.int()):
        assert not cpu.reads(other, lut, 3, 8, 64)
    assert not cpu.reads(stream, lut, 9, 8, 64)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 63), r"x: this packed layer has 64 inputs, got \[2, 63\]"),
        (torch.ones(2, 64, dtype=torch.uint8), r"floating point, got torch\.uint8"),
    ],
)
def test_another_width_or_kind_of_x_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        packed_linear(x, packed_weight(8, 64, 3, 8)[0])
