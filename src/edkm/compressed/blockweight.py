"""Keep a packed weight in a format: the stream of indices and the parts of theta as the file has them, decoded by rows.

Whole numbers among the parts stay packed too: they are unpacked with the rows that need them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edkm.compressed.entries import Entry
from edkm.compressed.linear import PackedWeight, input_gradient, is_recorded, multiply
from edkm.compressed.packing import unpack_at, unpack_rows
from edkm.core.formats import FORMATS


class BlockWeight(PackedWeight):
    """One packed tensor in a format, in memory; as `PackedWeight`, with `parts` in the place of tables."""

    def __init__(self, stream: Tensor, parts: Mapping[str, Tensor], entry: Entry) -> None:
        self.stream, self.parts, self.entry = stream, dict(parts), entry
        self.form, self.layout = FORMATS[entry.format], entry.layout
        self.rows, self.cols = entry.grid
        self.matrix = entry.bits, self.rows, self.cols

    @property
    def compiled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def to(self, device: torch.device | str) -> BlockWeight:
        return BlockWeight(self.stream.to(device), {name: part.to(device) for name, part in self.parts.items()}, self.entry)

    def decode_rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        in_blocks, parts = not is_recorded(self.stream), {}
        indices = unpack_rows(self.stream, self.entry.bits, self.entry.grid, start, stop, in_blocks=in_blocks)
        for name, about in self.layout.items():
            part = self.parts[name]
            if about.bits:
                part = unpack_rows(part, about.bits, (about.shape[0], about.shape[1]), start, stop, in_blocks=in_blocks)
            parts[name] = part if about.bits or len(about.shape) == 1 else part[start:stop]
        return self._values(indices, parts, dtype)

    def rows_at(self, at: Tensor) -> Tensor:
        parts = {}
        for name, about in self.layout.items():
            part = self.parts[name]
            if about.bits:
                parts[name] = unpack_at(part, about.bits, about.shape[1], at)
            elif part.dtype.itemsize == 1:  # not all devices gather float8
                parts[name] = part.view(torch.uint8)[at].view(part.dtype)
            else:
                parts[name] = part if len(about.shape) == 1 else part[at]
        return self._values(unpack_at(self.stream, self.entry.bits, self.cols, at), parts, torch.float32)

    def _values(self, indices: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return self.form.lookup(indices, self.form.storage.read(parts)).to(dtype)

    def as_operator(self, x: Tensor) -> Tensor:
        return _operator(x, self.stream, list(self.parts.values()), self.entry.format, self.rows, self.cols)


def weight_of(stream: Tensor, parts: Mapping[str, Tensor], entry: Entry) -> PackedWeight:
    """Make a packed weight of the tensors that the file has for it."""
    return PackedWeight(stream, parts["lut"], entry) if entry.form is None else BlockWeight(stream, parts, entry)


def _weight(stream: Tensor, parts: Sequence[Tensor], form: str, rows: int, cols: int) -> BlockWeight:
    entry = Entry(FORMATS[form].bits, (rows, cols), 1, 1, 0.0, rows, form)
    return BlockWeight(stream, dict(zip(entry.layout, parts, strict=True)), entry)


@torch.library.custom_op("edkm::linear_blocks", mutates_args=())
def _operator(x: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, rows: int, cols: int) -> Tensor:
    """Multiply, as one operator of torch.compile."""
    return multiply(x, _weight(stream, parts, form, rows, cols))


@torch.library.custom_op("edkm::linear_blocks_input_gradient", mutates_args=())
def _gradient_operator(grad: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, rows: int, cols: int) -> Tensor:
    return input_gradient(grad, _weight(stream, parts, form, rows, cols))


@_operator.register_fake
def _(x: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, rows: int, cols: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@_gradient_operator.register_fake
def _(grad: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, rows: int, cols: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], cols)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, stream, parts, *ctx.matrix = inputs
    ctx.save_for_backward(stream, *parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stream, *parts = ctx.saved_tensors
    return _gradient_operator(grad, stream, parts, *ctx.matrix), None, [None] * len(parts), None, None, None


_operator.register_autograd(_backward, setup_context=_keep)
