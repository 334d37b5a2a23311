"""Which saved tensors are the same values: storages, their contents, and copies between them.

*Identity.* A storage is known by its address, with a weak reference held so that the address cannot come back as another storage. A
*content* is a storage between two writes, a number here. Autograd's version counter tells most writes; it misses those through `.data`,
so the block also watches every operation (`Watch`) and forgets the contents of what an operation writes.

*Copies.* Views share a storage and need nothing. `contiguous`, `clone`, a `reshape` that copies and `copy_` make equal values in another
storage; each is recorded as an edge: this layout of one content equals that layout of the other, element by element. A saved tensor is
looked for along at most `hops` edges. If every edge on the way covers what is needed and something at its end is kept, the tensor
becomes a recipe: the copies are made again when it is unpacked. Edges hold in both directions, so it does not matter which of the two
tensors was saved first.

Cost: a `TorchDispatchMode` takes every operation of the block through Python; `saved_tensors` has the figures.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from edkm.offload.layout import Layout, Region, covers, layout_of, overlaps, region
from edkm.offload.piece import Piece, Recipe

_aten = torch.ops.aten
_CLONES = {_aten.clone.default, _aten._to_copy.default}
_COPY = _aten.copy_.default
_PLAIN_DISPATCH = torch._C._disabled_torch_dispatch_impl
_PRUNE_AFTER = 256
_NUMBERS = count()


class Edge(NamedTuple):
    """`own` of a content equals `far` of the content `other`."""

    own: Layout
    other: int
    far: Layout
    own_region: Region
    far_region: Region


class Ledger:
    """Contents seen in a block, the pieces kept of them (weakly: handles own the pieces) and the copies between them."""

    def __init__(self, hops: int):
        self._hops = hops
        self._until_prune = _PRUNE_AFTER
        self._contents: dict[int, tuple[StorageWeakRef, dict[int, int]]] = {}  # address -> content by version
        self._pieces: dict[int, list[weakref.ref[Piece]]] = {}
        self._edges: dict[int, list[Edge]] = {}

    def content(self, tensor: Tensor, version: int | None = None) -> int:
        """The number of what the tensor's storage holds now."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._contents:
            self._contents[storage._cdata] = StorageWeakRef(storage), {}
        versions = self._contents[storage._cdata][1]
        version = tensor._version if version is None else version
        if version not in versions:
            versions[version] = next(_NUMBERS)
            self._until_prune -= 1
            if not self._until_prune:
                self._prune()
        return versions[version]

    def keep(self, content: int, piece: Piece) -> None:
        self._pieces.setdefault(content, []).append(weakref.ref(piece))

    def written(self, tensor: Tensor) -> None:
        """The storage is about to change: what it holds then is a new content."""
        if not torch._C._has_storage(tensor):
            # A sparse tensor writes into memory that others may be views of.
            self.forget()
            return
        entry = self._contents.pop(tensor.untyped_storage()._cdata, None)
        for content in entry[1].values() if entry else ():
            for piece in self._kept(content):
                piece.settle()

    def copied(self, source: Tensor, result: Tensor, version: int | None = None) -> None:
        """`result` was made with the values of `source`."""
        if not (_equal_kind(source, result) and result.numel()) or source.untyped_storage()._cdata == result.untyped_storage()._cdata:
            return
        with torch.no_grad():
            there, here = layout_of(source.expand(result.shape)), layout_of(result)
        if overlaps(here):
            # Written more than once where windows overlap.
            return
        theirs, ours = self.content(source), self.content(result, version)
        there_region, here_region = region(there), region(here)
        self._edges.setdefault(theirs, []).append(Edge(there, ours, here, there_region, here_region))
        self._edges.setdefault(ours, []).append(Edge(here, theirs, there, here_region, there_region))

    def find(self, content: int, layout: Layout) -> Piece | None:
        """A piece that covers `layout`: kept of this content, or a recipe over one at most `hops` copies away."""
        pieces = self._kept(content)
        if not pieces and content not in self._edges:
            return None
        wanted = region(layout)
        for piece in pieces:
            if piece.covers(wanted):
                return piece
        seen, frontier = {content}, [(content, wanted, ())]
        for _ in range(self._hops):
            following = []
            for here, needed, path in frontier:
                for edge in self._edges.get(here, ()):
                    if edge.other in seen or not covers(edge.own_region, needed):
                        continue
                    way = (*path, edge)
                    for piece in self._kept(edge.other):
                        # A recipe over a recipe would make `hops` no bound on the copies to make again.
                        if not piece.is_recipe and piece.covers(edge.far_region):
                            return self._recipe(content, piece, way)
                    seen.add(edge.other)
                    following.append((edge.other, edge.far_region, way))
            frontier = following
        return None

    def forget(self) -> None:
        """Any storage may change from here on."""
        for content in self._pieces:
            for piece in self._kept(content):
                piece.settle()
        self._contents.clear()

    def clear(self) -> None:
        """The block has ended: nobody watches any more what is written."""
        self.forget()
        self._pieces.clear()
        self._edges.clear()

    def _recipe(self, content: int, piece: Piece, way: tuple[Edge, ...]) -> Piece:
        for edge in reversed(way):
            piece = Piece(edge.own, Recipe(piece, edge.far), piece.device, piece.number, piece.shared)
        self.keep(content, piece)
        return piece

    def _kept(self, content: int) -> list[Piece]:
        return [piece for ref in self._pieces.get(content, ()) if (piece := ref()) is not None]

    def _prune(self) -> None:
        """Forget contents that are gone and do not lie between two that matter."""
        self._pieces = {n: alive for n, refs in self._pieces.items() if (alive := [ref for ref in refs if ref() is not None])}
        matter = {number for ref, versions in self._contents.values() if not ref.expired() for number in versions.values()}
        matter |= self._pieces.keys()
        neighbours = {n: {edge.other for edge in edges} for n, edges in self._edges.items()}
        ends = [n for n, others in neighbours.items() if n not in matter and len(others) < 2]
        while ends:
            end = ends.pop()
            for other in neighbours.pop(end, ()):
                neighbours[other].discard(end)
                if other not in matter and len(neighbours[other]) < 2:
                    ends.append(other)
        self._edges = {n: [e for e in self._edges[n] if e.other in others] for n, others in neighbours.items() if others}
        self._contents = {
            address: (ref, versions)
            for address, (ref, versions) in self._contents.items()
            if not ref.expired() or any(n in self._pieces or n in self._edges for n in versions.values())
        }
        self._until_prune = max(_PRUNE_AFTER, len(self._contents) + len(self._edges))


# Operations on plain tensors within are no business of this or any other dispatch mode, and do not pay for them.
unseen = torch._C._DisableTorchDispatch


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is strided memory and nothing else: no subclass with a life of its own, not sparse, not quantized."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type != "meta"
    )


def _equal_kind(source: Tensor, result: Tensor) -> bool:
    if not (is_plain(source) and is_plain(result)) or source.is_inference() or result.is_inference():
        return False
    lazy = source.is_conj() or source.is_neg() or result.is_conj() or result.is_neg()
    return source.dtype == result.dtype and source.device == result.device and not lazy


class Watch(TorchDispatchMode):
    """Tells the ledger of every write and every copy."""

    # Operations that are given functions, which may write anything.
    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger):
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if any(map(_is_wrapper, types)):
            # Its own implementation goes first: its memory is that of the tensors within, and they come by here again.
            return NotImplemented
        if func not in _WRITTEN:
            _WRITTEN[func] = _written_arguments(func)
        written = _WRITTEN[func]
        if written is None:
            self._ledger.forget()
        elif not written and func not in _CLONES:
            return func(*args, **kwargs)
        for position, name in written or ():
            self._forget(args[position] if position < len(args) else kwargs.get(name))
        result = func(*args, **kwargs)
        if func in _CLONES:
            self._ledger.copied(args[0], result)
        elif func is _COPY and not args[0].is_inference():
            # The counter moves when the operation has returned.
            self._ledger.copied(args[1], args[0], args[0]._version + 1)
        return result

    def _forget(self, argument: Any) -> None:
        if isinstance(argument, Tensor):
            self._ledger.written(argument)
        elif isinstance(argument, (list, tuple)):
            for each in argument:
                self._forget(each)


def _is_wrapper(kind: Any) -> bool:
    """Whether tensors of this class have operations of their own. Fake tensors leave that to a mode."""
    return kind.__torch_dispatch__ is not _PLAIN_DISPATCH and not issubclass(kind, FakeTensor)


_WRITTEN: dict[Any, tuple[tuple[int, str], ...] | None] = {}


def _written_arguments(func: Any) -> tuple[tuple[int, str], ...] | None:
    """`(position, name)` of the arguments that an operation writes; None if nobody knows."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or _is_written_unsaid(func, argument.name)
    )


def _is_written_unsaid(func: Any, name: str) -> bool:
    """Whether an operation may write an argument without its schema saying so, and without a new version.

    Batch norm in training writes its statistics. Collectives write some of their arguments, and name them in no common way.
    """
    return name in ("running_mean", "running_var") or func.namespace == "c10d"
