"""Multiply by a packed weight: the stream of indices and the tables of the file are all that is kept.

Where a kernel can do that, the product never holds the dense weight; elsewhere the weight is decoded tile by tile. Weights are
constants here; gradients reach the inputs, as adapters (LoRA) need them.

Code that records operations is given an operator, or the ordinary operations that decode the weight: operators.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import Proxy

from edkm.compressed import cpu
from edkm.compressed.entries import Entry
from edkm.compressed.packing import unpack_at, unpack_rows
from edkm.core.assign import lookup

# Weights decoded at once where no kernel multiplies: on a CPU 4 MiB of float32, which stay in the cache until they are multiplied.
_TILE_WEIGHTS = {"cpu": 1 << 20}
_TILE_WEIGHTS_OF_A_DEVICE = 1 << 22
# Weights of an embedding decoded at once; some 40 bytes live for each.
_EMBEDDED_WEIGHTS = 1 << 18
# Private to torch: without them packed layers run, but cannot be recorded.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)  # pyright: ignore[reportAttributeAccessIssue]


class PackedWeight:
    """One packed tensor in memory.

    Attributes:
        stream: uint8, the indices as docs/format.md has them.
        lut: `[luts, k, dim]` float16.
        parts: the tensors beside the stream, by name.
        entry: its shape, bits and tables.
        rows, cols: of the weight as a matrix.
        matrix: its bits, rows and columns.
        theta: scales and offsets for the kernels of `cpu`; None for tables.
        compiled: whether the kernels of `cpu` read it.
    """

    def __init__(self, stream: Tensor, lut: Tensor, entry: Entry) -> None:
        self.stream, self.lut, self.entry = stream, lut, entry
        self.parts = {"lut": lut}
        self.rows, self.cols = entry.grid[0] * entry.dim, entry.grid[1]
        self.matrix = entry.bits, self.rows, self.cols
        self.theta: cpu.Theta | None = None

    @cached_property
    def compiled(self) -> bool:
        return self.stream.is_cpu and cpu.reads(*self.in_memory)

    @property
    def in_memory(self) -> cpu.Matrix:
        """The weight as the kernels of `cpu` read it."""
        return self.stream, self.lut, *self.matrix, self.theta

    def to(self, device: torch.device | str) -> PackedWeight:
        return PackedWeight(self.stream.to(device), self.lut.to(device), self.entry)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Decode the whole weight, in its own shape; float32 and float16 hold it exactly."""
        return self.decode_rows(0, self.rows, dtype).view(self.entry.shape)

    def decode_rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Decode rows `start` to before `stop` of the weight as a matrix.

        Args:
            start, stop: multiples of `row_step`, or `stop` the number of rows.
            dtype: of the result.
            out: `[stop - start, cols]`, contiguous, memory for the result; used where a kernel writes float32.

        Cost:
            One pass over the rows. Besides the result 4 MiB live on a CPU with a compiler, else 13 bytes a weight.
        """
        recorded = is_recorded(self.stream)
        if recorded or not self.compiled:
            return self._looked_up(start, stop, dtype, in_blocks=not recorded)
        if dtype == torch.float32:
            out = torch.empty(stop - start, self.cols) if out is None else out
            cpu.unpack(self.in_memory, start, stop, out)
            return out
        found = torch.empty(stop - start, self.cols, dtype=dtype)
        for first, last, memory in self.tiles(start, stop, torch.float32):
            found[first - start : last - start] = self.decode_rows(first, last, torch.float32, memory)
        return found

    @property
    def for_gpu(self) -> bool:
        """Whether the kernels of `gpu` know its kind."""
        return True

    def read_theta(self) -> Tensor | None:
        """Return theta `[rows, blocks, p]` of a format, float32."""
        return None

    def rows_at(self, at: Tensor) -> Tensor:
        """Decode the rows `at` `[n]` of a weight with `dim` 1: `[n, cols]` in the dtype of the tables."""
        index = unpack_at(self.stream, self.entry.bits, self.cols, at)
        table = at.unsqueeze(1) // (self.rows // self.entry.luts)
        return self.lut[table, index.long(), 0]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the operators that stand for it in a recorded program (operators.py)."""
        return self.stream, list(self.parts.values()), self.entry.format, *self.matrix

    def _looked_up(self, start: int, stop: int, dtype: torch.dtype, *, in_blocks: bool) -> Tensor:
        first, last = start // self.entry.dim, stop // self.entry.dim  # rows of indices
        indices = unpack_rows(self.stream, self.entry.bits, self.entry.grid, first, last, in_blocks=in_blocks)
        if start == 0 and stop == self.rows:
            return lookup(indices, self.lut, dtype)
        # A table for every row of indices: rows need not be whole groups.
        group = self.entry.grid[0] // self.lut.shape[0]
        return lookup(indices, self.lut[torch.arange(first, last, device=self.lut.device) // group], dtype)

    def tiles(self, start: int, stop: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor | None]]:
        """Cut rows into tiles: first row, row after the last, and memory that each tile may overwrite (`decode_rows`)."""
        most = _TILE_WEIGHTS.get(self.stream.device.type, _TILE_WEIGHTS_OF_A_DEVICE)
        height = max(1, most // (self.cols * self.row_step)) * self.row_step
        reused = self.compiled and dtype == torch.float32
        memory = torch.empty(min(height, stop - start), self.cols) if reused else None
        for first in range(start, stop, height):
            last = min(first + height, stop)
            yield first, last, None if memory is None else memory[: last - first]

    @property
    def row_step(self) -> int:
        """Rows after which the stream is at the start of a byte again, whatever the bits."""
        return 8 * self.entry.dim


def is_recorded(*tensors: Tensor) -> bool:
    """Say whether operations on a tensor are recorded or transformed: torch.compile, export, trace, a mode, vmap, a subclass.

    Raises:
        ValueError: a tensor stands for any other (torch.fx.symbolic_trace).
    """
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter:
            if kind is Proxy:
                raise ValueError(
                    "torch.fx.symbolic_trace knows no shapes, as packed layers must. Use torch.export, or call dequantize() first."
                )
            return True
    return torch.compiler.is_compiling() or torch._C._is_tracing() or _modes() > 0 or _transform() is not None


def is_taken_whole() -> bool:
    """Say whether what is recorded is to hold our operators: torch.compile and torch.export, but not for torch.onnx."""
    compiler = torch.compiler
    return compiler.is_compiling() and (compiler.is_dynamo_compiling() or not torch.onnx.is_in_onnx_export())


def packed_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply: `x @ W.T`, differentiable in `x`.

    Args:
        x: `[..., cols]`, floating point; under autocast in its dtype.
        weight: a matrix.

    Returns:
        `[..., rows]` in the dtype of `x`.

    Raises:
        ValueError: `x` holds whole numbers, or has another number of columns.

    Cost:
        Nothing is kept for backward but the packed weight itself; backward decodes it again, tile by tile.
    """
    recorded = is_recorded(x, weight.stream)
    if not x.is_floating_point():
        raise ValueError(f"x: a packed linear layer takes floating point, got {x.dtype}. Convert it first.")
    if x.shape[-1] != weight.cols:
        raise ValueError(f"x: this packed layer has {weight.cols} inputs, got {list(x.shape)}. Give it [..., {weight.cols}].")
    device = "cpu" if x.is_cpu else x.device.type  # the latter takes long for a product of one row
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # as autocast does
        x = x.to(torch.get_autocast_dtype(device))
    if recorded:
        if is_taken_whole():
            return torch.ops.edkm.linear(x, *weight.arguments)
        return F.linear(x, weight.dense(x.dtype))
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedProduct.apply(x, weight)  # pyright: ignore[reportReturnType]
    return multiply(x, weight)


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply as `packed_linear` does, without a gradient.

    Cost:
        With a kernel, for few rows of `x`, one pass over the packed weight. Else a tile of it lives besides `x` and the result, in float32
        on a CPU.
    """
    half = x.is_cpu and x.dtype in (torch.float16, torch.bfloat16)
    if has_kernel(x, weight):
        return cpu.multiply(x, *weight.in_memory)
    if x.is_cuda and weight.for_gpu and (gpu := _gpu()) is not None and gpu.takes(x, weight.lut, weight.cols):
        return gpu.multiply(x, weight.stream, weight.lut, *weight.matrix, weight.read_theta())
    flat = x.reshape(-1, weight.cols).to(torch.float32 if half else x.dtype)
    # In its own shape from the start: the output of an autograd.Function must not be a view.
    out = torch.empty(*x.shape[:-1], weight.rows, dtype=flat.dtype, device=x.device)
    for start, stop, memory in weight.tiles(0, weight.rows, flat.dtype):
        torch.mm(flat, weight.decode_rows(start, stop, flat.dtype, memory).T, out=out.view(-1, weight.rows)[:, start:stop])
    return out.to(x.dtype)


def has_kernel(x: Tensor, weight: PackedWeight) -> bool:
    """Say whether the kernels of `cpu` multiply: they read the weight, and x has few rows."""
    if not (weight.compiled and x.is_cpu and x.dtype in cpu.TYPES):
        return False
    batch = x.numel() // weight.cols
    return batch <= 4 or batch <= cpu.most_rows(weight.cols, weight.entry.bits)


def embed(tokens: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Decode the rows of tokens: `[..., cols]` of a weight with `dim` 1.

    Raises:
        IndexError: a token without a row, on a CPU: a GPU would have to be waited for.
    """
    at = tokens.reshape(-1).long()  # rows * cols * bits may be beyond 32 bits
    if is_recorded(at, weight.stream):  # neither may their values be looked at, nor their number
        return weight.rows_at(at).to(dtype).reshape(*tokens.shape, weight.cols)
    if at.is_cpu and len(at) and not 0 <= int(at.min()) <= int(at.max()) < weight.rows:
        raise IndexError(f"token {int(at.min())} or {int(at.max())} is not in the {weight.rows} rows of the embedding")
    out = torch.empty(len(at), weight.cols, dtype=dtype, device=at.device)
    step = max(1, _EMBEDDED_WEIGHTS // weight.cols)
    for start in range(0, len(at), step):
        out[start : start + step] = weight.rows_at(at[start : start + step])
    return out.view(*tokens.shape, weight.cols)


@cache
def _gpu() -> Any:
    """Import the Triton kernels; None without Triton."""
    if find_spec("triton") is None:
        return None
    from edkm.compressed import gpu

    return gpu


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return input_gradient(grad, ctx.weight), None


def input_gradient(grad: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply by the weight itself: the gradient of x."""
    # The sum over tiles of 16 bits is in float32.
    total = torch.zeros(*grad.shape[:-1], weight.cols, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
    for start, stop, memory in weight.tiles(0, weight.rows, grad.dtype):
        total += grad[..., start:stop] @ weight.decode_rows(start, stop, grad.dtype, memory)
    return total.to(grad.dtype)
