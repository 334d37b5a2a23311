"""Modules that run on packed weights: the stream of indices and the tables of the file are all they keep.

`pack_module` turns a module into its packed form in place. A linear layer multiplies without ever holding its dense weight where a kernel
can do that; an embedding decodes the rows that it is asked for; whatever else has a clustered parameter (convolutions, experts) decodes its
dense weight each time it is called. Parameters and buffers are named as in the packed file (docs/format.md): a state dict is the file's
content. Weights are constants here; gradients reach the inputs, which is what adapters (LoRA) need.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edkm.compressed import cpu
from edkm.compressed.layout import LUT_SUFFIX, Entry
from edkm.compressed.packing import unpack_rows
from edkm.core.assign import LUT_DTYPE, lookup

# Weights decoded at once where no kernel reads the packed form: bounds what lives besides input and output.
_TILE_WEIGHTS = 1 << 22


class PackedWeight:
    """One packed tensor in memory.

    Attributes:
        stream: uint8, the indices as docs/format.md has them.
        lut: `[luts, k, dim]` float16.
        entry: its shape and how it is cut.
        rows, cols: of the weight as a matrix.
        matrix: its bits, rows and columns.
        compiled: whether the kernels of `cpu` read it.
    """

    def __init__(self, stream: Tensor, lut: Tensor, entry: Entry) -> None:
        self.stream, self.lut, self.entry = stream, lut, entry
        self.rows, self.cols = entry.grid[0] * entry.dim, entry.grid[1]
        self.matrix = entry.bits, self.rows, self.cols
        # Once and not at every product: a small layer is multiplied in less time than this takes.
        self.compiled = stream.is_cpu and cpu.reads(stream, lut, *self.matrix)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in its own shape; float32 and float16 hold it exactly."""
        return self.decode(0, self.rows, dtype).view(self.entry.shape)

    def decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start` to before `stop` of the weight as a matrix.

        Args:
            start, stop: multiples of `row_step`, or `stop` the number of rows.
            dtype: of the result.

        Cost:
            One pass over the rows. Besides the result 4 MiB live on a CPU with a compiler, else 13 bytes a weight.
        """
        if self.compiled:
            return cpu.unpack(self.stream, self.lut, *self.matrix, dtype, start, stop)
        first, last = start // self.entry.dim, stop // self.entry.dim  # rows of indices
        indices = unpack_rows(self.stream, self.entry.bits, self.entry.grid, first, last)
        if start == 0 and stop == self.rows:
            return lookup(indices, self.lut, dtype)
        # A table for every row of indices: rows need not be whole groups.
        group = self.entry.grid[0] // self.lut.shape[0]
        return lookup(indices, self.lut[torch.arange(first, last, device=self.lut.device) // group], dtype)

    @property
    def row_step(self) -> int:
        """Rows after which the stream is at the start of a byte again, whatever the bits."""
        return 8 * self.entry.dim


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """`x @ W.T`, differentiable in `x`.

    Args:
        x: `[..., cols]`, floating point.
        weight: a matrix.

    Returns:
        `[..., rows]` in the dtype of `x`.

    Cost:
        Nothing is kept for backward but the packed weight itself; backward decodes it again, tile by tile.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, weight)  # pyright: ignore[reportReturnType]
    return _multiply(x, weight)


def _multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    if weight.compiled and x.is_cpu and x.dtype in cpu.TYPES and x.shape[-1] == weight.cols:
        return cpu.multiply(x, weight.stream, weight.lut, *weight.matrix)
    if x.is_cuda and (gpu := _gpu()) is not None and gpu.takes(x, weight.stream, weight.lut, *weight.matrix):
        return gpu.linear(x, weight.stream, weight.lut, *weight.matrix)
    tiles = _tiles(weight)
    if len(tiles) == 1:
        return F.linear(x, weight.decode(0, weight.rows, x.dtype))
    return torch.cat([F.linear(x, weight.decode(*tile, x.dtype)) for tile in tiles], -1)


@cache
def _gpu() -> Any:
    """The Triton kernels, or None without Triton."""
    if find_spec("triton") is None:
        return None
    from edkm.compressed import gpu

    return gpu


def _tiles(weight: PackedWeight) -> list[tuple[int, int]]:
    step = weight.row_step
    height = max(1, _TILE_WEIGHTS // (weight.cols * step)) * step
    return [(start, min(start + height, weight.rows)) for start in range(0, weight.rows, height)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return _multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        dx = None
        for start, stop in _tiles(ctx.weight):
            part = grad[..., start:stop] @ ctx.weight.decode(start, stop, grad.dtype)
            dx = part if dx is None else dx + part
        assert dx is not None
        return dx, None


class Packed(nn.Module):
    """What packed modules have in common. `pack_module` makes them of ordinary ones.

    Attributes:
        packed_entries: parameter name -> how it is cut.
        dense_dtype: of the weights that it stands for; follows `.to(dtype)`, while the tables stay as they are stored.
        tables_of: the module whose tables it uses, if a parameter is tied; itself else.
        ordinary: the class it had.
    """

    packed_entries: dict[str, Entry]
    dense_dtype: torch.dtype
    ordinary: type[nn.Module]
    held: dict[str, tuple[Tensor, Tensor, torch.device, PackedWeight]]  # what `packed` gave, and of which tensors

    def packed(self, name: str = "weight") -> PackedWeight:
        """The parameter `name` as it is kept."""
        stream = self._parameters[name]
        lut = self.__dict__["tables_of"]._buffers[name + LUT_SUFFIX]
        assert stream is not None and lut is not None
        held = self.held.get(name)
        if held is None or held[0] is not stream or held[1] is not lut or held[2] != stream.device:
            weight = PackedWeight(stream, lut.to(stream.device), self.packed_entries[name])
            held = self.held[name] = stream, lut, stream.device, weight
        return held[3]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        kept = {name: b for name, b in self._buffers.items() if b is not None and name.removesuffix(LUT_SUFFIX) in self.packed_entries}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != before.dtype:  # a table in bfloat16 would be another table
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        cut = [
            f"{name}: {e.bits} bits, {e.luts} tables" + (f", dim {e.dim}" if e.dim > 1 else "") for name, e in self.packed_entries.items()
        ]
        return "; ".join(text for text in (super().extra_repr(), *cut) if text)


class PackedLinear(Packed, nn.Linear):
    """A linear layer on a packed weight. It is an `nn.Linear` to those who look for one, except that `weight` is the stream."""

    def forward(self, input: Tensor) -> Tensor:
        out = linear(input, self.packed())
        return out if self.bias is None else out + self.bias


class PackedEmbedding(Packed, nn.Embedding):
    """An embedding on a packed weight with `dim` 1: decodes the rows of its tokens."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.packed()
        bits, (rows, cols) = weight.entry.bits, weight.entry.grid
        tokens = input.reshape(-1, 1)
        bit = (tokens * cols + torch.arange(cols, device=tokens.device)) * bits  # [n, cols]
        # An index lies in two bytes at most; the byte after the last is none of its business.
        byte = bit // 8
        low, high = (weight.stream[b].int() for b in (byte, (byte + 1).clamp_(max=len(weight.stream) - 1)))
        index = (low | high << 8) >> bit % 8 & ((1 << bits) - 1)
        table = tokens // (rows // weight.entry.luts)
        return weight.lut[table, index, 0].to(self.dense_dtype).view(*input.shape, cols)


class _Dense(Packed):
    """Any other module: reads dense weights, decoded when it is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Experts read their weights once for each expert.
        self.__dict__["decoded"] = {name: self.packed(name).dense(self.dense_dtype) for name in self.packed_entries}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["decoded"]

    def _read(self, name: str) -> Tensor:
        stream = self._parameters[name]
        assert stream is not None
        if stream.is_meta:  # while it is loaded
            return stream
        decoded = self.__dict__.get("decoded")
        return self.packed(name).dense(self.dense_dtype) if decoded is None else decoded[name]


def pack_module(module: nn.Module, name: str, entry: Entry, k: int, dtype: torch.dtype, device: torch.device | str = "meta") -> None:
    """Make a module one whose parameter `name` is packed, in place. The bytes come later, from a state dict.

    Args:
        module: owns the parameter, of the shape in `entry`.
        name: of the parameter in it.
        entry: how it is cut.
        k: centroids in a table.
        dtype: of the weights that it stands for.
        device: of the empty tensors that wait for the bytes.
    """
    if not isinstance(module, Packed):
        module.packed_entries, module.dense_dtype, module.ordinary, module.held = {}, dtype, type(module), {}  # pyright: ignore
        module.__dict__["tables_of"] = module
    module.__class__ = _packed_class(type(module), name, entry.dim)  # pyright: ignore
    assert isinstance(module, Packed)
    module.packed_entries[name] = entry
    # Not through setattr: the class may have a property of this name.
    stream = torch.empty(entry.packed_bytes, dtype=torch.uint8, device=device)
    module._parameters[name] = nn.Parameter(stream, requires_grad=False)
    module.register_buffer(name + LUT_SUFFIX, torch.empty(entry.luts, k, entry.dim, dtype=LUT_DTYPE, device=device))


@cache
def _packed_class(kind: type[nn.Module], name: str, dim: int) -> type[nn.Module]:
    if kind is nn.Linear:
        return PackedLinear
    if issubclass(kind, nn.Embedding) and dim == 1:
        # Gemma's, say, scales what its base class returns.
        return PackedEmbedding if kind is nn.Embedding else _subclass(kind.__name__, (kind, PackedEmbedding))
    bases = (kind,) if issubclass(kind, _Dense) else (_Dense, kind)
    return _subclass(kind.__name__, bases, **{name: property(lambda self: self._read(name))})


def _subclass(name: str, bases: tuple[type[nn.Module], ...], **members: Any) -> type[nn.Module]:
    return type(name, bases, members)


def tie_module(module: Packed, name: str, owner: Packed) -> None:
    """Use the tables of `owner` for the parameter `name`, in place; whoever ties parameters ties the streams."""
    module._buffers.pop(name + LUT_SUFFIX)
    module.__dict__["tables_of"] = owner


def unpack_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make all packed modules ordinary ones again, in place; tied parameters stay tied.

    Args:
        model: with packed modules, loaded.
        dtype: of the dense weights; by default that of each module.

    Cost:
        The memory of the dense model.
    """
    packed = [
        (module, name, module.packed(name)) for module in model.modules() if isinstance(module, Packed) for name in module.packed_entries
    ]
    dense: dict[Tensor, nn.Parameter] = {}
    for module, name, weight in packed:
        if weight.stream not in dense:
            dense[weight.stream] = nn.Parameter(weight.dense(dtype or module.dense_dtype))
        module._parameters[name] = dense[weight.stream]
        module._buffers.pop(name + LUT_SUFFIX, None)
    for module in {module for module, _, _ in packed}:
        module.__class__ = module.ordinary  # pyright: ignore
        for attribute in ("packed_entries", "dense_dtype", "ordinary", "held", "tables_of"):
            del module.__dict__[attribute]
