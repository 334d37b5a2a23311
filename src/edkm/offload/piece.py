"""A part of a storage that is kept, and the tensors cut from it.

A piece knows which layout of the storage it holds and a *source* that can produce its values: a copy, a slice of one on every rank, a
table with an index list, or a recipe over another piece. All saved tensors that lie within it are cut from one restored buffer, for as
long as that buffer is in use by anyone: it is remembered by a weak reference to its storage.

Whoever writes into an unpacked tensor writes into that buffer. All tensors cut from it therefore share one version counter, as views
do, and a buffer whose counter has moved is forgotten: the next tensor is restored from the copy again. The *probe* below is a tensor
without memory whose only purpose is to share that counter.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from edkm.offload.layout import Layout, Region, covers, place, region
from edkm.offload.transfer import Copy, made_now, take_over


class Source(Protocol):
    """Where the values of a piece come from."""

    def fetch(self) -> Tensor:
        """The values, the caller's own, of the size of the piece's layout."""
        ...


class Recipe(NamedTuple):
    """The values are those of another piece, seen as `layout`: what `clone` or `contiguous` made, made again."""

    piece: Piece
    layout: Layout

    def fetch(self) -> Tensor:
        return self.piece.cut(self.layout).clone(memory_format=torch.contiguous_format)


class Piece:
    """`layout` of a storage, kept.

    Args:
        layout: what is kept.
        source: produces the values.
        device: where they are wanted back.
        number: of the copy that it is made from. The same on all ranks of a sharded block.
        shared: whether tensors in use at the same time may be cut from one buffer. Not where restoring is a collective: whether a
            buffer is still in use could differ between ranks.
    """

    __slots__ = ("__weakref__", "_buffer", "device", "layout", "number", "region", "shared", "source")

    def __init__(self, layout: Layout, source: Source, device: torch.device, number: int, shared: bool):
        self.layout, self.source, self.device, self.number, self.shared = layout, source, device, number, shared
        self.region = region(layout)
        self._buffer: Buffer | None = None

    @property
    def is_recipe(self) -> bool:
        return isinstance(self.source, Recipe)

    def covers(self, region: Region) -> bool:
        return covers(self.region, region)

    def settle(self) -> None:
        """From here on the current stream may overwrite what is kept."""
        if isinstance(self.source, Copy):
            self.source.settle()

    def cut(self, layout: Layout) -> Tensor:
        """The tensor of that layout, with its strides. Its offset counts from the beginning of the piece."""
        offset = (layout.offset * layout.dtype.itemsize - self.region.start) // layout.dtype.itemsize
        # Read and assigned once: backward may run in several threads.
        buffer = self._buffer
        storage = None if buffer is None else buffer.in_use()
        if buffer is None or storage is None:
            flat = place(self.source.fetch(), self.layout)
            storage = flat.untyped_storage()
            if not self.shared:
                return _view(storage, offset, layout, self.device)
            self._buffer = buffer = Buffer.of(flat)
        tensor = _view(storage, offset, layout, self.device)
        take_over(tensor, buffer.ready)
        counted = buffer.probe.detach()
        counted.data = tensor
        return counted


class Buffer(NamedTuple):
    """What a piece was restored to, for as long as somebody holds it."""

    storage: StorageWeakRef
    probe: Tensor
    version: int
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, flat: Tensor) -> Buffer:
        probe = torch.empty(0, dtype=flat.dtype, device=flat.device)
        return cls(StorageWeakRef(flat.untyped_storage()), probe, probe._version, made_now(flat.device))

    def in_use(self) -> torch.UntypedStorage | None:
        """The storage if someone holds it and nobody wrote into it."""
        return torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata) if self.probe._version == self.version else None


def _view(storage: torch.UntypedStorage, offset: int, layout: Layout, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=layout.dtype, device=device).set_(storage, offset, layout.size, layout.stride)
