"""Keep one copy of tensors that are views or copies of one another.

*Which bytes.* `StridedView` is what `as_strided` takes; its `Region` is the set of bytes it touches, in a form that is the same for
transposes, expansions and views of another dtype. An interval of bytes serves all that lies within it, another region only its equals.

*Which values.* `Content` is a storage between two writes. Autograd's version counter tells most writes; it misses those through `.data`,
so the block watches every operation (`WriteWatch` in hooks.py) and forgets the contents of storages that are written.

*Copies.* `contiguous`, `clone`, a `reshape` that copies and `copy_` make equal values in another storage. The new content remembers the
view that it was copied from. A saved tensor is looked for along at most `hops` such copies, from the copy to its origin and back from
origins to kept copies of them; if it is found, the copies are made again when it is restored.

Cost: a `TorchDispatchMode` takes every operation of the block through Python; `saved_tensors` has the figures.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from edkm.offload.transfer import OffloadedCopy, Source

_PRUNE_AFTER = 256

# Within it operations pass by all dispatch modes: neither this one nor the user's pays for them.
unseen = torch._C._DisableTorchDispatch


class StridedView(NamedTuple):
    """A strided view of a storage; strides and offset in elements of `dtype`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> StridedView:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @property
    def n_bytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        return 1 + sum(step * (n - 1) for n, step in zip(self.size, self.stride, strict=True))

    def distinct(self) -> StridedView:
        """Drop the repetitions of `expand`."""
        return self._replace(size=tuple(1 if step == 0 else n for n, step in zip(self.size, self.stride, strict=True)))

    def compact(self) -> StridedView:
        """Return the view to copy: the interval of the storage if that is no larger than the tensor, else its distinct elements."""
        once = self.distinct()
        return StridedView((once.span,), (1,), once.offset, once.dtype) if once.span <= prod(once.size) else once

    def overlaps(self) -> bool:
        """Tell whether two indices may be one element, as in `unfold`; true in doubt, and not for the repetitions of `expand`."""
        reach = 0
        for step, n in sorted((step, n) for n, step in zip(self.size, self.stride, strict=True) if n > 1 and step):
            if step <= reach:
                return True
            reach += step * (n - 1)
        return False


class Region(NamedTuple):
    """Bytes `start + sum_d i_d * stride_d`; `dims` are (stride, size) in bytes, the outermost first, the last of stride 1."""

    start: int
    dims: tuple[tuple[int, int], ...]
    item: int  # bytes of an element

    @property
    def end(self) -> int:
        return self.start + 1 + sum(stride * (size - 1) for stride, size in self.dims)

    def covers(self, inner: Region) -> bool:
        """Tell whether a tensor of region `inner` can be cut from a copy of this one."""
        if len(self.dims) == 1:
            return self.start <= inner.start and inner.end <= self.end and (inner.start - self.start) % inner.item == 0
        return inner.start == self.start and inner.dims == self.dims


@lru_cache(maxsize=4096)
def region(view: StridedView) -> Region:
    """Find the bytes of a view: dimensions sorted by stride, neighbours merged, repetitions dropped."""
    item = view.dtype.itemsize
    steps = sorted(((step * item, n) for n, step in zip(view.size, view.stride, strict=True) if n > 1 and step > 0), reverse=True)
    dims: list[tuple[int, int]] = []
    for stride, size in [*steps, (1, item)]:
        if dims and dims[-1][0] == stride * size:
            dims[-1] = (stride, dims[-1][1] * size)
        else:
            dims.append((stride, size))
    return Region(view.offset * item, tuple(dims), item)


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor can share a copy: strided memory, each element once but for `expand`, nothing left to compute on it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and not StridedView.of(tensor).overlaps()
    )


def _flat(values: Tensor, view: StridedView) -> Tensor:
    """Lay `values`, which must be the caller's own, out as `view` does from its first element on. Gaps are not written."""
    values = values[tuple(slice(0, 1) if step == 0 else slice(None) for step in view.stride)]
    once = view.distinct()
    if once.span == values.numel() and all(n == 1 or s == t for n, s, t in zip(once.size, once.stride, values.stride(), strict=True)):
        return values.as_strided((once.span,), (1,))
    flat = values.new_empty(once.span)
    flat.as_strided(once.size, once.stride).copy_(values)
    return flat


def _cut(flat: Tensor, start: int, view: StridedView) -> Tensor:
    """Return the tensor of `view`, with its strides, from elements that begin at the byte `start` of its storage."""
    offset = flat.storage_offset() * flat.itemsize + view.offset * view.dtype.itemsize - start
    tensor = torch.empty(0, dtype=view.dtype, device=flat.device)
    return tensor.set_(flat.untyped_storage(), offset // view.dtype.itemsize, view.size, view.stride)


class KeptView:
    """A view of a storage whose values are kept by `source`."""

    __slots__ = ("__weakref__", "region", "source", "view")

    def __init__(self, view: StridedView, source: Source):
        self.view, self.source, self.region = view, source, region(view)

    def restore(self, view: StridedView) -> Tensor:
        """Bring back the tensor of `view`, which must lie within."""
        if not (isinstance(self.source, OffloadedCopy) and self.view.stride == (1,)):
            return _cut(_flat(self.source.fetch(), self.view), self.region.start, view)
        wanted, item = region(view), self.view.dtype.itemsize
        first = (wanted.start - self.region.start) // item
        last = -((self.region.start - wanted.end) // item)
        return _cut(self.source.fetch(slice(first, last)), self.region.start + first * item, view)


class CopyStep(NamedTuple):
    """One copying operation to make again: `target` of a storage equals `source` of another, element by element."""

    target: StridedView
    source: StridedView


class Cutting(NamedTuple):
    """A saved tensor as a part of a kept view, or of copies of it made by `steps`, the last first."""

    kept: KeptView
    steps: tuple[CopyStep, ...]
    view: StridedView

    def restore(self) -> Tensor:
        """Return the saved tensor, on its device, with its strides."""
        with unseen():
            return self._restore(self.steps, self.view)

    def _restore(self, steps: tuple[CopyStep, ...], view: StridedView) -> Tensor:
        if not steps:
            return self.kept.restore(view)
        target, source = steps[0]
        values = self._restore(steps[1:], source).clone(memory_format=torch.contiguous_format)
        return _cut(_flat(values, target), region(target).start, view)


class Content:
    """Values of a storage between two writes: the view that they were copied from, and kept views that hold them."""

    __slots__ = ("index_lists", "kept", "origin")

    def __init__(self):
        self.origin: tuple[Content, CopyStep] | None = None
        self.kept: list[tuple[weakref.ref[KeptView], tuple[CopyStep, ...]]] = []
        self.index_lists: dict[tuple[StridedView, torch.dtype], weakref.ref[Source]] = {}  # for uniquify

    def settle(self) -> None:
        """Let the current stream wait until the storage may be overwritten."""
        for ref, steps in self.kept:
            kept = ref()
            if kept is not None and not steps and isinstance(kept.source, OffloadedCopy):
                kept.source.settle()


class Ledger:
    """Contents of the storages seen in a block. Kept views are held weakly: what autograd holds owns them."""

    def __init__(self, hops: int):
        self._hops = hops
        self._until_prune = _PRUNE_AFTER
        self._contents: dict[int, tuple[StorageWeakRef, dict[int, Content]]] = {}  # by address, then by version

    def content(self, tensor: Tensor, version: int | None = None) -> Content:
        """Find the content of the tensor's storage as it is now."""
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being used again.
        versions = self._contents.setdefault(storage._cdata, (StorageWeakRef(storage), {}))[1]
        version = tensor._version if version is None else version
        if version not in versions:
            versions[version] = Content()
            self._until_prune -= 1
            if not self._until_prune:
                self._contents = {address: entry for address, entry in self._contents.items() if not entry[0].expired()}
                self._until_prune = max(_PRUNE_AFTER, len(self._contents))
        return versions[version]

    def written(self, tensor: Tensor) -> None:
        """Forget the content of a storage that is about to change."""
        if not torch._C._has_storage(tensor):
            # A sparse tensor writes into memory that others may be views of.
            self.forget()
            return
        _, versions = self._contents.pop(tensor.untyped_storage()._cdata, (None, {}))
        for content in versions.values():
            content.settle()

    def forget(self) -> None:
        """Forget all contents: any storage may change from here on."""
        for _, versions in self._contents.values():
            for content in versions.values():
                content.settle()
        self._contents.clear()

    def copied(self, source: Tensor, result: Tensor, version: int | None = None) -> None:
        """Remember that `result` was made with the values of `source`."""
        if not (is_plain(source) and is_plain(result)) or (source.dtype, source.device) != (result.dtype, result.device):
            return
        if 0 in result.stride() or source.untyped_storage()._cdata == result.untyped_storage()._cdata:
            return
        with torch.no_grad():
            step = CopyStep(StridedView.of(result), StridedView.of(source.expand(result.shape)))
        self.content(result, version).origin = self.content(source), step

    def keep(self, content: Content, kept: KeptView) -> None:
        """Remember a kept view for its content, and for those that its content is a copy of."""
        steps, covered = (), kept.region
        while True:
            content.kept = [*(entry for entry in content.kept if entry[0]() is not None), (weakref.ref(kept), steps)]
            if content.origin is None or len(steps) == self._hops or not covered.covers(region(content.origin[1].target)):
                return
            content, step = content.origin
            steps, covered = (CopyStep(step.source, step.target), *steps), region(step.source)

    def find(self, content: Content, view: StridedView) -> Cutting | None:
        """Find a kept view that holds `view` of a content, at most `hops` copies away."""
        here, needed, steps = content, region(view), ()
        while True:
            for ref, further in here.kept:
                kept = ref()
                if kept is None or len(steps) + len(further) > self._hops:
                    continue
                if (region(further[0].target) if further else kept.region).covers(needed):
                    return Cutting(kept, (*steps, *further), view)
            if here.origin is None or len(steps) == self._hops or not region(here.origin[1].target).covers(needed):
                return None
            here, step = here.origin
            steps, needed = (*steps, step), region(step.source)
