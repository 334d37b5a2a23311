"""Multiply by a packed weight on a GPU: Triton kernels that read the stream of indices and the tables, and never write a dense weight.

32 columns of a row are `bits` words of 32 bits, whatever the bits. Few rows of x: a thread has some such groups of a few rows of W, shifts
the indices out and looks the entries up in the first cache; x comes permuted, so that neighbouring threads read neighbouring values. Up to
64 rows of x: a tile of W is decoded into registers and goes through the tensor cores. More: decoding the layer once and a plain product
costs less (linear.py does that).

Under `TRITON_INTERPRET=1` the kernels run on a CPU, which is how the tests check them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64
# Up to here each row of x goes over the weight by itself: it comes from the second cache.
_SINGLE_ROWS = 4
_GROUP = 32


def takes(x: Tensor, lut: Tensor, cols: int) -> bool:
    """Say whether `multiply` takes this: few rows of x, whole groups of columns, single values, tensor cores that know the dtype."""
    many = x.numel() > _SINGLE_ROWS * cols
    if many and x.dtype == torch.bfloat16 and x.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return lut.shape[2] == 1 and cols % _GROUP == 0 and 0 < x.numel() <= MOST_ROWS * cols and x.dtype != torch.float64


def multiply(x: Tensor, stream: Tensor, lut: Tensor, bits: int, rows: int, cols: int, theta: Tensor | None = None) -> Tensor:
    """Multiply: `x @ W.T`.

    Args:
        x: `[..., cols]` float32, float16 or bfloat16, at most 64 rows.
        stream: uint8 `[rows * cols * bits / 8]`, docs/format.md.
        lut: `[luts, k, 1]`; `luts` divides `rows`.
        bits: of an index, 1 to 8.
        rows, cols: of W; `cols` is a multiple of 32.
        theta: float32 `[rows, blocks, p]`, scales and offsets of a format whose blocks are multiples of 32; `lut` then has its values.

    Returns:
        `[..., rows]` in the dtype of `x`; up to 4 rows of `x` are multiplied and summed in float32, more as a product of matrices in the
        dtype of `x`, summed in float32.

    Cost:
        One pass over the stream for up to 64 rows of `x` (one for each of up to 4). Besides the result a copy of `x` for up to 4 rows.
    """
    flat = x.reshape(-1, cols)
    batch, words = flat.shape[0], stream.view(torch.int32)
    luts, k = lut.shape[:2]
    of_blocks: Any = (lut, 1, 1, 0) if theta is None else (theta.contiguous(), theta.shape[1], cols // theta.shape[1], theta.shape[2])
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)  # no view: it leaves an autograd.Function
    with torch.cuda.device_of(x):  # Triton launches on the current one
        if batch <= _SINGLE_ROWS:
            flat = flat.view(batch, cols // _GROUP, _GROUP).transpose(1, 2).contiguous()  # [batch, 32, groups]
            height = 4
            grid = (triton.cdiv(rows, height), batch)
            _rows[grid](flat, words, lut, out, rows, cols // _GROUP, rows // luts, *of_blocks, k, bits, height, 128, num_warps=4)
        else:
            flat = flat.contiguous()
            height, block = 32, max(16, triton.next_power_of_2(batch))
            grid = (triton.cdiv(rows, height),)
            _tile[grid](flat, words, lut, out, batch, rows, cols, rows // luts, *of_blocks, k, bits, block, height, 64)
    return out


@triton.jit
def _entry(lut, table, index, k: tl.constexpr, bits: tl.constexpr, mask):
    """Look up entries [n, m] in the tables of n rows."""
    index = index & ((1 << bits) - 1)
    if k < (1 << bits):  # an index beyond its table reads no other memory
        index = tl.minimum(index, k - 1)
    return tl.load(lut + (table * k)[:, None] + index.to(tl.int32), mask=mask, other=0.0)


@triton.jit
def _rows(
    x, words, lut, out, rows, groups, rows_per_lut, theta, blocks, wide,
    p: tl.constexpr, k: tl.constexpr, bits: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Multiply a few rows of W by one row of x, [32, groups]."""
    n = tl.program_id(0) * height + tl.arange(0, height)
    row = tl.program_id(1)
    table = n // rows_per_lut
    total = tl.zeros([height, width], tl.float32)
    for start in range(0, groups, width):
        g = start + tl.arange(0, width)
        mask = (n < rows)[:, None] & (g < groups)[None, :]
        at = words + (n.to(tl.int64) * groups * bits)[:, None] + (g * bits)[None, :]
        part = tl.zeros([height, width], tl.float32)
        sums = tl.zeros([width], tl.float32)
        for w in tl.static_range(bits):
            word = tl.load(at + w, mask=mask, other=0).to(tl.uint32, bitcast=True)
            for j in tl.static_range(32):
                if (j * bits) // 32 == w:
                    index = word >> (j * bits - 32 * w)
                    if j * bits - 32 * w + bits > 32:
                        after = tl.load(at + w + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
                        index = index | (after << (32 * w + 32 - j * bits))
                    value = tl.load(x + (row * 32 + j) * groups + g, mask=g < groups, other=0.0).to(tl.float32)
                    part += _entry(lut, table, index, k, bits, mask).to(tl.float32) * value[None, :]
                    sums += value
        if p > 0:
            of = theta + (n.to(tl.int64) * blocks)[:, None] * p + (g * 32 // wide)[None, :] * p
            part = part * tl.load(of + (p - 1), mask=mask, other=0.0)
            if p == 2:
                part += tl.load(of, mask=mask, other=0.0) * sums[None, :]
        total += part
    tl.store(out + row * rows + n, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=n < rows)


@triton.jit
def _tile(
    x, words, lut, out, batch, rows, cols, rows_per_lut, theta, blocks, wide, p: tl.constexpr,
    k: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Multiply `height` rows of W by all rows of x."""
    n = tl.program_id(0) * height + tl.arange(0, height)
    b = tl.arange(0, block)
    table = n // rows_per_lut
    at = words + (n.to(tl.int64) * (cols // 32) * bits)[:, None]
    total = tl.zeros([block, height], tl.float32)
    for start in range(0, cols, width):
        c = start + tl.arange(0, width)
        mask = (n < rows)[:, None] & (c < cols)[None, :]
        shift = ((c * bits) % 32).to(tl.uint32)[None, :]
        word = tl.load(at + (c * bits // 32)[None, :], mask=mask, other=0).to(tl.uint32, bitcast=True)
        index = word >> shift
        if 32 % bits != 0:
            crosses = shift + bits > 32
            after = tl.load(at + (c * bits // 32 + 1)[None, :], mask=mask & crosses, other=0).to(tl.uint32, bitcast=True)
            index = tl.where(crosses, index | (after << ((32 - shift) % 32)), index)
        weight = _entry(lut, table, index, k, bits, mask)  # [height, width]
        if p > 0:
            of = theta + (n.to(tl.int64) * blocks)[:, None] * p + (c // wide)[None, :] * p
            weight = weight * tl.load(of + (p - 1), mask=mask, other=0.0)
            if p == 2:
                weight += tl.load(of, mask=mask, other=0.0)
        weight = weight.to(x.dtype.element_ty)
        part = tl.load(x + b[:, None] * cols + c[None, :], mask=(b < batch)[:, None] & (c < cols)[None, :], other=0.0)
        total = tl.dot(part, tl.trans(weight), total, input_precision="ieee")
    mask = (b < batch)[:, None] & (n < rows)[None, :]
    tl.store(out + b[:, None] * rows + n[None, :], total.to(out.dtype.element_ty), mask=mask)
