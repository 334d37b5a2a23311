"""Decide where each tensor goes that autograd saves, and watch what is written meanwhile."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from edkm.offload import shard, uniquify
from edkm.offload.marshal import Cutting, KeptView, Ledger, StridedView, is_plain, unseen
from edkm.offload.transfer import OffloadedCopy, Source, Stats, settle

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CLONES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
_COPY = torch.ops.aten.copy_.default
_PLAIN_DISPATCH = torch._C._disabled_torch_dispatch_impl

# Held by the graph in place of a saved tensor, and called to bring it back. It owns the copies that it needs: they are freed when backward
# has used the last of them.
_Handle = Callable[[], Tensor]


@contextmanager
def saved_tensors(
    device: torch.device | str = "cpu",
    *,
    marshal: bool = True,
    uniquify: bool = True,
    shard: ProcessGroup | None = None,
    hops: int = 4,
    resident: torch.nn.Module | None = None,
) -> Iterator[Stats]:
    """Keep what autograd saves in the block on `device`, and every value once; in the place of `torch.autograd.graph.save_on_cpu`.

    Backward may run in the block or after it. Blocks nest, and the inner one applies. Gradients are the same to the last bit.

    Leaves that require grad, parameters, frozen ones too, and views of them are referenced, not copied; with FSDP2 they come back when
    it has gathered them again. In-place changes between two uses are honoured, also those through `.data` and by collectives. Writes
    without a torch operation are not seen (a bare Triton kernel, NumPy, another thread through `.data`): announce one into a tensor that
    was saved or copied before with `torch.autograd.graph.increment_version`. Functions that `torch.compile` has compiled run eagerly in
    a block with `marshal` or `uniquify`, and torch refuses what must not (`fullgraph=True`, `flex_attention`): use `marshal=False,
    uniquify=False` for these. DTensor and other subclasses, sparse and quantized tensors, overlapping windows (`unfold`) and lazy
    conjugates are each copied whole, as `save_on_cpu` does.

    Args:
        device: where copies are kept. From CUDA to the CPU they go through pinned memory, on a side stream.
        marshal: one copy for all views of a storage and for copies of it, and only the distinct elements of what `expand` repeats.
        uniquify: keep what `function_of` declares as a table and an index.
        shard: a group on whose ranks everything saved in the block is identical. Each rank keeps its part of every copy of 512 bytes or
            more, and all ranks must run backward alike. Needs one small all-gather for each new copy and one all-gather for each tensor
            restored; copies are kept until the block ends at the least.
        hops: how many copying operations may lie between two tensors that share a copy; 0 for views alone.
        resident: a module whose buffers stay as they are until backward. They are referenced too.

    Yields:
        `Stats`, counted as things happen.

    Raises:
        ValueError: `hops` is negative; from within, a tensor of a sharded block differs between ranks, or one is not the function that it
            was declared to be.
        RuntimeError: from backward, a referenced tensor was changed in place after it was saved.

    Cost: `stats.kept_bytes`, never more than `save_on_cpu` holds, and nothing for parameters. Pinned memory, where there is CUDA, is
    rounded up by torch, to powers of two by default. One pass over each new copy, and one over each tensor restored. On one shared core of
    a 2.5 GHz Xeon: 10 us per operation in the block, 0.1 ms per operation that writes or copies, and 0.3 ms per saved tensor, forth and
    back; `hooks` that only clone take 0.03 ms. Torch imports its compiler, which takes seconds, at the first operation of the first block
    with `marshal` or `uniquify`.
    """
    if hops < 0:
        raise ValueError(f"saved_tensors: hops={hops}: must not be negative. Use 0 to follow views alone.")
    stats = Stats()
    keeper = _Keeper(stats, Ledger(hops), torch.device(device), shard, resident, marshal=marshal, uniquify=uniquify)
    with ExitStack() as block:
        block.callback(keeper.close)
        block.enter_context(torch.autograd.graph.saved_tensors_hooks(_timed(keeper.save, stats), _timed(_restore, stats)))
        if marshal or uniquify:
            block.enter_context(WriteWatch(keeper.ledger))
        yield stats


def _restore(handle: _Handle) -> Tensor:
    # In a double backward gradients are on, and restoring a tensor is no part of the graph.
    with torch.no_grad():
        return handle()


def _timed(hook: Callable[[Any], Any], stats: Stats) -> Callable[[Any], Any]:
    def timed(argument: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(argument)
        finally:
            stats.seconds += time.perf_counter() - start

    return timed


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """Return a tensor that lives on anyway. Hooks switch autograd's own check for changes off, so it is made here."""
    if tensor._version != version:
        raise RuntimeError(
            f"saved tensor {list(tensor.shape)} {tensor.dtype}, referenced and not copied: was changed in place between forward and "
            f"backward: it is at version {tensor._version}, saved was version {version}. Change parameters (and buffers of resident=) "
            "after backward, or pass a clone to the operation."
        )
    return tensor


class _Keeper:
    """Choose for each saved tensor of a block, in this order.

    1. A parameter, or a view of one: a reference, which must not change until backward.
    2. A tensor that is more than strided memory: a copy of the whole. Subclasses are not taken apart: the memory of an asynchronous
       collective may not be filled yet.
    3. A part of what is kept, or a copy of it: cut from that (marshal).
    4. A function of a 16-bit weight, as declared: a table and an index (uniquify).
    5. Anything else: a new copy.

    In a sharded block copies are split over the ranks, and every choice must be the same on all of them. When Python frees an object is
    not, so such a block holds its copies until it ends.
    """

    def __init__(
        self,
        stats: Stats,
        ledger: Ledger,
        device: torch.device,
        group: ProcessGroup | None,
        resident: torch.nn.Module | None,
        *,
        marshal: bool,
        uniquify: bool,
    ):
        self.stats, self.ledger, self.device, self.group = stats, ledger, device, group
        self.marshal, self.uniquify = marshal, uniquify
        self._last: weakref.ref[OffloadedCopy] | None = None
        self._held: list[KeptView] = []
        buffers = () if resident is None else resident.buffers()
        # The weak references keep addresses from being used again.
        self._resident = {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in buffers if is_plain(t)}

    def save(self, tensor: Tensor) -> _Handle:
        """Return the substitute of a saved tensor."""
        n_bytes = tensor.numel() * tensor.itemsize
        self.stats.tensors += 1
        self.stats.requested_bytes += n_bytes
        if self._lives_on(tensor):
            self.stats.avoid("reference", n_bytes)
            return partial(_unchanged, tensor if tensor.is_leaf else tensor.detach(), tensor._version)
        if not is_plain(tensor):
            return OffloadedCopy(tensor.detach(), self.device, self.stats, streamed=False).fetch
        with unseen():
            return self._keep(tensor.detach(), StridedView.of(tensor)).restore

    def _lives_on(self, tensor: Tensor) -> bool:
        owner = tensor if tensor._base is None else tensor._base
        # The graph holds a leaf that requires grad in any case; of other tensors only parameters are known to stay.
        if (owner.is_leaf and owner.requires_grad) or isinstance(owner, torch.nn.Parameter):
            return True
        return bool(self._resident) and is_plain(tensor) and tensor.untyped_storage()._cdata in self._resident

    def close(self) -> None:
        """End the block: from here on nobody watches what is written."""
        self.ledger.forget()
        self._held.clear()

    def _keep(self, tensor: Tensor, view: StridedView) -> Cutting:
        if not self.marshal:
            return Cutting(self._new(tensor, view, view), (), view)
        content = self.ledger.content(tensor)
        found = self.ledger.find(content, view)
        if found is not None:
            self.stats.avoid("marshal", view.n_bytes)
            return found
        stored = view.compact()
        self.stats.avoid("marshal", view.n_bytes - stored.n_bytes)
        kept = self._new(tensor, view.distinct(), stored)
        self.ledger.keep(content, kept)
        return Cutting(kept, (), view)

    def _new(self, tensor: Tensor, view: StridedView, stored: StridedView) -> KeptView:
        """Keep a table for `view` of a tensor, or a copy of its view `stored`."""
        values = _seen_as(tensor, stored)
        group = self._group_of(tensor)
        if group is not None:
            name = f"saved tensor {list(tensor.shape)} {tensor.dtype}, number {self.stats.tensors - 1} of the block"
            shard.require_replicated(group, values, name)
        # Tensors too small to be compared over the ranks get no table.
        table = self._table(_seen_as(tensor, view)) if self.uniquify and group is self.group else None
        kept = KeptView(*(table or (stored, self._store(values))))
        if self.group is not None:
            self._held.append(kept)
        return kept

    def _group_of(self, values: Tensor) -> ProcessGroup | None:
        """Return the group that a tensor is split over; a small one is whole on every rank."""
        return self.group if values.numel() * values.itemsize >= shard.WHOLE_BYTES else None

    def _store(self, values: Tensor) -> Source:
        group = self._group_of(values)
        if group is not None:
            return shard.RankSlice(values, self.device, self.stats, group)
        copy = OffloadedCopy(values, self.device, self.stats, None if self._last is None else self._last())
        self._last = weakref.ref(copy)
        if not self.marshal:  # without the ledger nobody would tell when the tensor is about to be overwritten
            settle()
        return copy

    def _table(self, tensor: Tensor) -> tuple[StridedView, Source] | None:
        """Keep a map as a table, if it was declared to be a function and the table is smaller."""
        declared, ways = uniquify.readings(tensor)
        if declared is None:
            return None
        content = self.ledger.content(declared.weight)
        ranks = declared.ranks(content)
        ref = content.index_lists.get(declared.key)  # left by a map before this one
        index = None if ref is None else ref()
        n, map_bytes = len(ranks.rank), tensor.numel() * tensor.itemsize
        new_bytes = map_bytes // n * len(ranks.first) + (2 * n if index is None else 0)
        if new_bytes >= map_bytes:
            return None
        by_weight = uniquify.require_function(tensor, declared, ways, ranks)
        if index is None:
            group = self._group_of(ranks.rank)
            if group is not None:
                shard.require_replicated(group, ranks.rank, f"function_of: weight {list(declared.weight.shape)}")
            index = self._store(ranks.rank.to(torch.int16))
            content.index_lists[declared.key] = weakref.ref(index)
        self.stats.avoid("uniquify", map_bytes - new_bytes)
        rows = self._store(by_weight.reshape(n, -1)[ranks.first])  # [u, r]
        return StridedView.of(by_weight), uniquify.RowTable(rows, index, tuple(by_weight.shape))


def _seen_as(tensor: Tensor, view: StridedView) -> Tensor:
    return tensor.as_strided(view.size, view.stride, view.offset)


class WriteWatch(TorchDispatchMode):
    """Report every write and every copy of a block to the ledger."""

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
        written = _written_arguments(func)
        if written is None:
            self._ledger.forget()
        for position, name in written or ():
            self._forget(args[position] if position < len(args) else kwargs.get(name))
        result = func(*args, **kwargs)
        if func in _CLONES:
            self._ledger.copied(args[0], result)
        elif func is _COPY:
            # The counter moves when the operation has returned.
            self._ledger.copied(args[1], args[0], None if args[0].is_inference() else args[0]._version + 1)
        return result

    def _forget(self, argument: Any) -> None:
        if isinstance(argument, Tensor):
            self._ledger.written(argument)
        elif isinstance(argument, (list, tuple)):
            for each in argument:
                self._forget(each)


def _is_wrapper(kind: Any) -> bool:
    """Tell whether tensors of this class have operations of their own. Fake tensors leave that to a mode."""
    return kind.__torch_dispatch__ is not _PLAIN_DISPATCH and not issubclass(kind, FakeTensor)


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...] | None:
    """List `(position, name)` of the arguments that an operation writes; None if it has no schema.

    Batch norm in training writes its statistics, and collectives write some of their arguments, without schema or version showing it.
    """
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in ("running_mean", "running_var")
        or func.namespace == "c10d"
    )
