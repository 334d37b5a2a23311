"""Keep one copy of tensors that are views or copies of one another.

*Which bytes.* `StridedView` is what `as_strided` takes; `region` is the set of bytes it touches, in a form that is the same for
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

from edkm.offload.transfer import OffloadedCopy, Source, settle

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
        """Number of elements from the first to the last, both included."""
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


@lru_cache(maxsize=4096)
def region(view: StridedView) -> StridedView:
    """Find the bytes of a view: dimensions sorted by stride, neighbours merged, repetitions dropped. An interval has one dimension."""
    item = view.dtype.itemsize
    steps = sorted(((step * item, n) for n, step in zip(view.size, view.stride, strict=True) if n > 1 and step > 0), reverse=True)
    dims: list[tuple[int, int]] = []
    for stride, size in [*steps, (1, item)]:
        if dims and dims[-1][0] == stride * size:
            dims[-1] = (stride, dims[-1][1] * size)
        else:
            dims.append((stride, size))
    strides, sizes = zip(*dims, strict=True)
    return StridedView(sizes, strides, view.offset * item, torch.uint8)


def covers(outer: StridedView, inner: StridedView) -> bool:
    """Tell whether `inner` can be cut from a copy of `outer`, both views of one storage."""
    have, want = region(outer), region(inner)
    if len(have.size) > 1:
        return have == want
    first = want.offset - have.offset
    return 0 <= first <= have.span - want.span and first % inner.dtype.itemsize == 0


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

    __slots__ = ("__weakref__", "source", "view")

    def __init__(self, view: StridedView, source: Source):
        self.view, self.source = view, source

    def restore(self, view: StridedView) -> Tensor:
        """Bring back the tensor of `view`, which must lie within."""
        start, item = region(self.view).offset, self.view.dtype.itemsize
        if not (isinstance(self.source, OffloadedCopy) and self.view.stride == (1,)):
            return _cut(_flat(self.source.fetch(), self.view), start, view)
        first = (region(view).offset - start) // item
        last = -((start - region(view).offset - region(view).span) // item)
        return _cut(self.source.fetch(slice(first, last)), start + first * item, view)


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
        return _cut(_flat(values, target), region(target).offset, view)


class Content:
    """Values of a storage between two writes: the view that they were copied from, and kept views that hold them."""

    __slots__ = ("index_lists", "kept", "origin")

    def __init__(self):
        self.origin: tuple[Content, CopyStep] | None = None
        self.kept: list[tuple[weakref.ref[KeptView], tuple[CopyStep, ...]]] = []
        self.index_lists: dict[tuple[StridedView, torch.dtype], weakref.ref[Source]] = {}  # for uniquify


class Ledger:
    """Contents of the storages seen in a block. Kept views are held weakly: what autograd holds owns them."""

    def __init__(self, hops: int):
        self._hops = hops
        self._until_prune = _PRUNE_AFTER
        self._contents: dict[int, tuple[StorageWeakRef, int, Content]] = {}  # by address: storage, version, values

    def content(self, tensor: Tensor, version: int | None = None) -> Content:
        """Find the content of the tensor's storage as it is now."""
        storage, version = tensor.untyped_storage(), tensor._version if version is None else version
        # The weak reference keeps the address from being used again.
        _, known, content = self._contents.get(storage._cdata, (None, None, None))
        if content is None or known != version:
            content = Content()
            self._contents[storage._cdata] = StorageWeakRef(storage), version, content
            self._until_prune -= 1
            if not self._until_prune:
                self._contents = {address: entry for address, entry in self._contents.items() if not entry[0].expired()}
                self._until_prune = max(_PRUNE_AFTER, len(self._contents))
        return content

    def written(self, tensor: Tensor) -> None:
        """Forget the content of a storage that is about to change."""
        # A sparse tensor writes into memory that others may be views of.
        if not torch._C._has_storage(tensor):
            self.forget()
        elif self._contents.pop(tensor.untyped_storage()._cdata, None) is not None:
            settle()

    def forget(self) -> None:
        """Forget all contents: any storage may change from here on."""
        self._contents.clear()
        settle()

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
        steps, covered = (), kept.view
        while True:
            content.kept = [*(entry for entry in content.kept if entry[0]() is not None), (weakref.ref(kept), steps)]
            if content.origin is None or len(steps) == self._hops or not covers(covered, content.origin[1].target):
                return
            content, step = content.origin
            steps, covered = (CopyStep(step.source, step.target), *steps), step.source

    def find(self, content: Content, view: StridedView) -> Cutting | None:
        """Find a kept view that holds `view` of a content, at most `hops` copies away."""
        needed, steps = view, ()
        while True:
            for ref, further in content.kept:
                kept = ref()
                if kept is None or len(steps) + len(further) > self._hops:
                    continue
                if covers(further[0].target if further else kept.view, needed):
                    return Cutting(kept, (*steps, *further), view)
            if content.origin is None or len(steps) == self._hops or not covers(content.origin[1].target, needed):
                return None
            content, step = content.origin
            steps, needed = (*steps, step), step.source
