"""The packed product on a CPU of weights in a format: every build of the kernels against the weight in float64.

1. Each format that the kernels read gives torch's float32 product, as exactly, for any shape, dtype and number of rows of x, and its
   weight to the bit; the others are decoded.
2. Nothing is read beyond the stream, the parts and x.
3. Neither the number of threads nor other weights in the same call change a bit.
4. A weight far from zero is as exact: its offset does not take the digits of the product.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import blocks, packed
from packedkernels import VARIANTS, Fenced, built, check

from edkm.compressed import cpu
from edkm.compressed.checkpoint import dequantize
from edkm.compressed.formatweight import FormatWeight
from edkm.core.formats import FORMATS
from edkm.core.storage import Floats, ZeroPoint

READ = [name for name, form in FORMATS.items() if isinstance(form.storage, Floats | ZeroPoint)]
# One of each width of an index, of each block and of each theta.
SOME = ["q4_0", "q4_1", "nf4", "q8_0", "tq2_0", "int8_row", "int2_g32", "int3_g32", "int3_g64_sym", "int8_g128", "mlx3_g128", "mlx4_g64"]


@pytest.fixture(params=VARIANTS)
def kernels(request, monkeypatch):
    """`cpu` with one build of the kernels."""
    library = built(request.param)
    monkeypatch.setattr(cpu, "_library", lambda: library)
    return library


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_or_decoded(kernels, name):
    weight = packed(blocks((9, 512), name))
    assert weight.compiled is (name in READ)
    assert torch.equal(weight.dense(torch.float32), dequantize(blocks((9, 512), name)))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_shape_and_dtype(variant, data):
    library = built(variant)
    name = data.draw(st.sampled_from(READ))
    divisor = FORMATS[name].divisor
    cols = divisor * data.draw(st.integers(1, 200 if divisor == 1 else 640 // divisor))
    frozen = blocks((data.draw(st.integers(1, 70)), cols), name, data.draw(st.integers(0, 99)))
    x = torch.randn(data.draw(st.integers(0, 10)), cols).to(data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_library", lambda: library)
        weight = packed(frozen)
        assert weight.compiled and torch.equal(weight.dense(torch.float32), dequantize(frozen))
        check(x, weight, dequantize(frozen))


@pytest.mark.skipif(not hasattr(__import__("ctypes").CDLL(None), "mprotect"), reason="no mprotect")
@pytest.mark.parametrize("name", SOME)
def test_reads_nothing_beyond_the_end(kernels, name):
    fenced, divisor = Fenced(), FORMATS[name].divisor
    for rows, cols in ((1, divisor), (3, 3 * divisor), (6, 5 * divisor), (17, 33 * (divisor == 1) or divisor)):
        frozen = blocks((rows, cols), name)
        weight = packed(frozen)
        assert isinstance(weight, FormatWeight)
        there = FormatWeight(fenced(weight.stream), {key: fenced(part) for key, part in weight.parts.items()}, weight.entry)
        check(fenced(torch.randn(3, cols)), there, dequantize(frozen))
        assert torch.equal(there.dense(torch.float32), dequantize(frozen))


@pytest.mark.parametrize("name", SOME)
def test_threads_and_company_change_no_bit(name):
    if cpu._library() is None:
        pytest.skip("no C compiler")
    weights = [packed(blocks((rows, 1024), name, rows)) for rows in (640, 3, 200)]
    x, before, found = torch.randn(2, 1024), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([cpu.multiply(x, *weight.in_memory) for weight in weights])
            found.append(cpu.products(x, [weight.in_memory for weight in weights]))
            found.append([torch.cat([weight.dense(torch.float32) for weight in weights])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for i in (1, 3, 4) for a, b in zip(found[0], found[i], strict=True))
    assert torch.equal(found[2][0], found[5][0])


@pytest.mark.parametrize("name", ["int8_row", "q4_1", "mlx8_g64"])
def test_a_weight_far_from_zero_is_as_exact(kernels, name):
    frozen = blocks((16, 1024), name)
    scale = frozen.parts["scale"]
    if "zero" in frozen.parts:
        frozen.parts["zero"].zero_()  # all weights positive
    else:
        frozen.parts["offset"].copy_(20 * scale)
    check(torch.randn(3, 1024) + 1, packed(frozen), dequantize(frozen))
