"""Which bytes of a storage a tensor shows: the geometry behind "these two share a copy".

A `Layout` is what `as_strided` takes. Its `Region` is the set of bytes it touches in a canonical form: dimensions sorted by stride,
neighbours merged, repeats dropped. Transposes, views, expansions and views of another dtype of the same bytes have the same region.
A region of one dimension is an interval, and whatever lies within it can be served from its copy; of other regions only their equals
can.

What is copied for a tensor is its interval where that is no larger than the tensor, otherwise the tensor's own elements, packed: a
column of a matrix must not drag the matrix along.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A strided view of a storage; strides and offset in elements of `dtype`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize


class Region(NamedTuple):
    """Bytes `start + sum_d i_d * stride_d`; `dims` are (stride, size) in bytes, the outermost first, the last of stride 1."""

    start: int
    dims: tuple[tuple[int, int], ...]
    item: int  # bytes of an element

    @property
    def end(self) -> int:
        return self.start + 1 + sum(stride * (size - 1) for stride, size in self.dims)


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def view(tensor: Tensor, layout: Layout) -> Tensor:
    """`layout` of the storage of `tensor`, of the same dtype."""
    return tensor.as_strided(layout.size, layout.stride, layout.offset)


def region(layout: Layout) -> Region:
    item = layout.dtype.itemsize
    spread = sorted(((step * item, n) for n, step in zip(layout.size, layout.stride, strict=True) if n > 1 and step > 0), reverse=True)
    dims: list[tuple[int, int]] = []
    for stride, size in [*spread, (1, item)]:
        if dims and dims[-1][0] == stride * size:
            dims[-1] = (stride, dims[-1][1] * size)
        else:
            dims.append((stride, size))
    return Region(layout.offset * item, tuple(dims), item)


def covers(outer: Region, inner: Region) -> bool:
    """Whether a tensor of `inner` can be cut from a copy of `outer`."""
    if len(outer.dims) == 1:
        aligned = (inner.start - outer.start) % inner.item == 0
        return aligned and outer.start <= inner.start and inner.end <= outer.end
    return inner.start == outer.start and inner.dims == outer.dims


def distinct(layout: Layout) -> Layout:
    """The same without what `expand` repeats."""
    return layout._replace(size=tuple(1 if step == 0 else n for n, step in zip(layout.size, layout.stride, strict=True)))


def compact(layout: Layout) -> Layout:
    """What to copy for a tensor: its interval of the storage if that is no larger, else its distinct elements."""
    once = distinct(layout)
    span = _span(once)
    return Layout((span,), (1,), once.offset, once.dtype) if span <= prod(once.size) else once


def place(values: Tensor, layout: Layout) -> Tensor:
    """A flat tensor that shows `values` where `layout` looks, from the layout's first element on. Gaps are not written.

    Takes `values` over without a copy where they are laid out already, so they must be the caller's own.
    """
    values = values[tuple(slice(0, 1) if step == 0 else slice(None) for step in layout.stride)]
    once = distinct(layout)
    span = _span(once)
    if span == values.numel() and values.is_contiguous() and _is_row_major(once):
        return values.reshape(-1)
    flat = values.new_empty(span)
    if overlaps(once):
        where = torch.arange(span, device=values.device).as_strided(once.size, once.stride)
        return flat.index_copy_(0, where.reshape(-1), values.reshape(-1))
    flat.as_strided(once.size, once.stride).copy_(values)
    return flat


def _span(layout: Layout) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum(step * (n - 1) for n, step in zip(layout.size, layout.stride, strict=True))


def _is_row_major(layout: Layout) -> bool:
    expected = 1
    for n, step in zip(reversed(layout.size), reversed(layout.stride), strict=True):
        if n > 1 and step != expected:
            return False
        expected *= n
    return True


def overlaps(layout: Layout) -> bool:
    """Whether two indices may be one element, as in `unfold`. Says so rather once too often."""
    reach = 0
    for step, n in sorted((step, n) for n, step in zip(layout.size, layout.stride, strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False
