"""Keep a packed weight in a format: the stream of indices and the parts of theta as the file has them, decoded by rows.

Whole numbers among the parts stay packed too: they are unpacked with the rows that need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property

import torch
from torch import Tensor

from edkm.compressed import cpu
from edkm.compressed.entries import Entry
from edkm.compressed.linear import PackedWeight
from edkm.compressed.packing import unpack_at, unpack_rows
from edkm.core.formats import FORMATS
from edkm.core.storage import Floats, ZeroPoint


class FormatWeight(PackedWeight):
    """One packed tensor in a format, in memory; as `PackedWeight`, with `parts` in the place of tables."""

    def __init__(self, stream: Tensor, parts: Mapping[str, Tensor], entry: Entry) -> None:
        self.stream, self.parts, self.entry = stream, dict(parts), entry
        self.form, self.layout = FORMATS[entry.format], entry.layout
        self.rows, self.cols = entry.grid
        self.matrix = entry.bits, self.rows, self.cols
        self.theta = self._theta()

    def _theta(self) -> cpu.Theta | None:
        """Describe theta to the kernels; None if they do not read it, or not these values."""
        first, last, k = self.form.values[0], self.form.values[-1], len(self.form.values)
        few = self.entry.bits <= 4 and self.cols * self.entry.bits % 32 == 0
        storage, wide = self.form.storage, self.form.width(self.cols)
        if isinstance(storage, Floats | ZeroPoint) and (few or (self.entry.bits == 8 and last - first == k - 1)):
            zero_bits = storage.bits if isinstance(storage, ZeroPoint) else 0
            return cpu.Theta(self.parts["scale"], self.parts.get("zero" if zero_bits else "offset"), wide, zero_bits)
        return None

    @property
    def lut(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, for the kernels."""
        return _values(self.entry.format, self.stream.device)

    @cached_property
    def compiled(self) -> bool:
        return self.theta is not None and super().compiled

    def to(self, device: torch.device | str) -> FormatWeight:
        return FormatWeight(self.stream.to(device), {name: part.to(device) for name, part in self.parts.items()}, self.entry)

    def _looked_up(self, start: int, stop: int, dtype: torch.dtype, *, in_blocks: bool) -> Tensor:
        indices = unpack_rows(self.stream, self.entry.bits, self.entry.grid, start, stop, in_blocks=in_blocks)
        return self._entries(indices, self._parts(start, stop, in_blocks=in_blocks), dtype)

    def _parts(self, start: int, stop: int, *, in_blocks: bool) -> dict[str, Tensor]:
        """Unpack the parts of some rows."""
        parts = {}
        for name, about in self.layout.items():
            part = self.parts[name]
            if about.bits:
                part = unpack_rows(part, about.bits, (about.shape[0], about.shape[1]), start, stop, in_blocks=in_blocks)
            parts[name] = part if about.bits or len(about.shape) == 1 else part[start:stop]
        return parts

    @property
    def for_gpu(self) -> bool:
        return self.form.width(self.cols) % 32 == 0

    def read_theta(self) -> Tensor:
        if self.form.block:
            return self.form.storage.read(self._parts(0, self.rows, in_blocks=True))
        return self._theta_of_rows

    @cached_property
    def _theta_of_rows(self) -> Tensor:
        """Keep that of whole rows, which is small."""
        return self.form.storage.read(self._parts(0, self.rows, in_blocks=True))

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
        return self._entries(unpack_at(self.stream, self.entry.bits, self.cols, at), parts, torch.float32)

    def _entries(self, indices: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return self.form.lookup(indices, self.form.storage.read(parts)).to(dtype)


@cache
def _values(form: str, device: torch.device) -> Tensor:
    return torch.tensor(FORMATS[form].values, dtype=torch.float32, device=device).view(1, -1, 1)


def weight_of(stream: Tensor, parts: Mapping[str, Tensor], entry: Entry) -> PackedWeight:
    """Make a packed weight of the tensors that the file has for it."""
    return PackedWeight(stream, parts["lut"], entry) if entry.form is None else FormatWeight(stream, parts, entry)
