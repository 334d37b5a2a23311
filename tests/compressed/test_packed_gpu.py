"""The Triton kernels, through Triton's interpreter on a CPU or on a GPU where there is one (conftest.py).

1. Every width, and every format of blocks of 32 and more, gives the product with the decoded weight; an index beyond its table reads no
   other memory.
2. Only shapes, dtypes and devices that the kernels know are given to them.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not made for this platform")
from packed import blocks, freeze, packed

from edkm.compressed import gpu
from edkm.compressed.checkpoint import dequantize
from edkm.compressed.packing import pack_indices
from edkm.core.assign import lookup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows, cols, bits, luts, k=None):
    """Stream, tables and the weight that they stand for."""
    frozen = freeze((rows, cols), bits, luts, k=k)
    return (
        pack_indices(frozen.indices, bits).to(DEVICE),
        frozen.lut.to(DEVICE),
        lookup(frozen.indices, frozen.lut, torch.float64).to(DEVICE),
    )


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize(
    ("rows", "cols", "bits", "luts", "k"),
    [(9, 96, 3, 9, None), (10, 64, 4, 5, None), (9, 96, 2, 3, None), (6, 160, 1, 1, None), (7, 64, 8, 1, None), (8, 32, 5, 4, 19)],
)
def test_it_is_the_product_with_the_decoded_weight(batch, rows, cols, bits, luts, k):
    stream, lut, weight = problem(rows, cols, bits, luts, k)
    x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(batch)).to(DEVICE)
    assert gpu.takes(x, lut, cols)
    out = gpu.multiply(x, stream, lut, bits, rows, cols)
    truth = x.double() @ weight.T
    plain = (x @ weight.float().T - truth).abs().max()
    assert (out - truth).abs().max() <= 4 * plain + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "nf4", "q4_k", "int3_g64", "int8_row", "mlx2_g128", "mxfp4"])
def test_formats(batch, name):
    """Theta of blocks of 32 and more, and of rows; an index of a format with fewer values than its bits hold."""
    frozen = blocks((9, 256), name)
    weight = packed(frozen).to(DEVICE)
    x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(batch)).to(DEVICE)
    assert weight.for_gpu and gpu.takes(x, weight.lut, 256)
    out = gpu.multiply(x, weight.stream, weight.lut, *weight.matrix, weight.read_theta())
    truth = x.double() @ dequantize(frozen).to(DEVICE).double().T
    plain = (x @ dequantize(frozen).to(DEVICE).T - truth).abs().max()
    assert (out - truth).abs().max() <= 4 * plain + 2e-6 * truth.abs().max()
    assert not packed(blocks((9, 256), "q3_k")).for_gpu


# The interpreter multiplies the bits of bfloat16 matrices as if they were numbers.
@pytest.mark.parametrize(
    ("dtype", "batch"), [(torch.float16, 2), (torch.float16, 17), (torch.bfloat16, 2)] + [(torch.bfloat16, 17)] * (DEVICE == "cuda")
)
def test_narrow_inputs(dtype, batch):
    stream, lut, weight = problem(12, 64, 3, 12)
    x = torch.randn(1, batch, 64, generator=torch.Generator().manual_seed(batch)).to(DEVICE, dtype)
    out = gpu.multiply(x, stream, lut, 3, 12, 64)
    assert out.dtype == dtype and out.shape == (1, batch, 12)
    truth = x.double() @ weight.T
    plain = (torch.nn.functional.linear(x, weight.to(dtype)) - truth).abs().max()
    assert (out - truth).abs().max() <= 2 * plain


def test_what_it_does_not_take():
    x, lut = torch.randn(65, 64), torch.zeros(8, 8, 1)
    assert gpu.takes(x[:64], lut, 64)
    assert not any(gpu.takes(other, lut, 64) for other in (x, x[:0], x[:1].double()))
    assert not gpu.takes(x[:1, :40], lut, 40) and not gpu.takes(x[:1], lut.view(4, 8, 2), 64)  # half a group; vectors


def test_bfloat16_matrices_need_a_gpu_that_has_them(monkeypatch):
    class OnAGpu:
        is_cuda, dtype = True, torch.bfloat16

        def __init__(self, rows):
            self.rows = rows

        def numel(self):
            return self.rows * 64

    for supported in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        takes = [gpu.takes(OnAGpu(rows), torch.zeros(8, 8, 1), 64) for rows in (4, 5)]
        assert takes == [True, supported]


def test_an_index_beyond_its_table_reads_its_last_entry():
    lut = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]], [[9.0]] * 5]).half().to(DEVICE)
    stream = pack_indices(torch.full((2, 32), 7, dtype=torch.uint8), 3).to(DEVICE)
    for batch in (1, 6):
        out = gpu.multiply(torch.ones(batch, 32, device=DEVICE), stream, lut, 3, 2, 32)
        assert torch.equal(out.cpu(), torch.tensor([[5.0 * 32, 9.0 * 32]]).expand(batch, 2))


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edkm.compressed import gpu
from edkm.compressed.checkpoint import dequantize

def ptx(kernel, dtype, bits, k, **constants):
    names = kernel.arg_names
    constants |= {"k": k, "bits": bits}
    theta = "*fp32" if constants.setdefault("p", 0) else "*fp16"
    kinds = {"x": f"*{dtype}", "words": "*i32", "lut": theta, "theta": theta, "out": f"*{dtype}"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for bits, k in (3, 8), (5, 19):
    assert "fma" in ptx(gpu._rows, "bf16", bits, k, height=4, width=128)
assert "mma" in ptx(gpu._tile, "bf16", 3, 8, block=16, height=32, width=64)
assert "fma" in ptx(gpu._rows, "bf16", 8, 256, p=2, height=4, width=128)
assert "mma" in ptx(gpu._tile, "bf16", 4, 16, p=1, block=16, height=32, width=64)
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "compiled\n", done.stderr
