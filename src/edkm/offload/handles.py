"""What autograd holds in the place of a saved tensor.

A handle can make its tensor again, any number of times. It owns what it needs for that and nothing else does, so that a copy goes when
backward has used the last tensor cut from it. None holds a tensor with a history: that would be a cycle which only the garbage
collector can break.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from edkm.offload.layout import Layout
from edkm.offload.marshal import is_plain, unseen
from edkm.offload.piece import Piece
from edkm.offload.stats import Stats


class Handle(Protocol):
    def restore(self) -> Tensor:
        """The saved tensor, on its device, with its strides."""
        ...


class Reference(NamedTuple):
    """A tensor that lives on anyway. Hooks switch autograd's own check for changes off, so it is made here."""

    tensor: Tensor
    version: int

    def restore(self) -> Tensor:
        tensor = self.tensor
        what = f"saved tensor {list(tensor.shape)} {tensor.dtype}, referenced and not copied"
        if tensor._version != self.version:
            raise RuntimeError(
                f"{what}: was changed in place between forward and backward: it is at version {tensor._version}, saved was version "
                f"{self.version}. Change parameters (and buffers of resident=) after backward, or pass a clone to the operation."
            )
        if is_plain(tensor) and tensor.numel() and not tensor.untyped_storage().nbytes():
            raise RuntimeError(
                f"{what}: its memory was freed after forward and has not come back. With FSDP2, backward must run through the module's own "
                "hooks, which gather parameters again."
            )
        return tensor


class Part(NamedTuple):
    """A tensor cut from a piece."""

    piece: Piece
    layout: Layout
    conj: bool
    neg: bool

    def restore(self) -> Tensor:
        with unseen():
            tensor = self.piece.cut(self.layout)
            tensor = tensor.conj() if self.conj else tensor
            return torch.ops.aten._neg_view(tensor) if self.neg else tensor


class Empty(NamedTuple):
    """No elements, hence nothing to keep: a reference would keep the storage it is a view of."""

    layout: Layout
    device: torch.device

    def restore(self) -> Tensor:
        return torch.empty_strided(self.layout.size, self.layout.stride, dtype=self.layout.dtype, device=self.device)


class Whole:
    """A tensor that is more than strided memory (sparse, nested, a subclass): copied by itself, as `save_on_cpu` does.

    Subclasses are not taken apart: the memory of an asynchronous collective is not filled yet, the sizes of jagged tensors are tied to
    their very own offsets.
    """

    __slots__ = ("_copy", "_n_bytes", "_origin", "_stats")

    def __init__(self, tensor: Tensor, device: torch.device, stats: Stats):
        self._origin, self._stats = tensor.device, stats
        self._copy = _copied(tensor, device)
        self._n_bytes = n_bytes(tensor)
        stats.hold(self._n_bytes)

    def restore(self) -> Tensor:
        return _copied(self._copy, self._origin)

    def __del__(self):
        # Not set when making the copy failed.
        if hasattr(self, "_n_bytes"):
            self._stats.release(self._n_bytes)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    # For some layouts `to(copy=True)` is not there.
    return tensor.clone() if tensor.device == device else tensor.to(device)


def n_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this rank; of one that is made of others, their bytes."""
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(n_bytes(each) for each in inner if isinstance(each, Tensor))
    names = _PARTS.get(tensor.layout)
    if names is None:
        return tensor.numel() * tensor.itemsize
    return sum(n_bytes(getattr(tensor, name)()) for name in names)


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
