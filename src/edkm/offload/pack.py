"""What happens to a tensor that autograd saves.

    lives on anyway (a parameter or a view of one)      -> Reference: nothing is copied; it must not change until backward
    more than strided memory (sparse, a subclass)       -> Whole: copied as it is
    lies in what is kept, or is a copy of it            -> cut from that piece                  (marshal)
    a function of a 16-bit weight, as declared          -> a piece made of a table and an index (uniquify)
    anything else                                       -> a new piece

In a sharded block pieces are cut over the ranks. Every decision is then taken from what is the same on all ranks, or taken together.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from edkm.offload import shard, uniquify
from edkm.offload.handles import Empty, Handle, Part, Reference, Whole, n_bytes
from edkm.offload.layout import Layout, compact, distinct, layout_of, view
from edkm.offload.marshal import Ledger, is_plain, unseen
from edkm.offload.piece import Piece, Source
from edkm.offload.stats import Stats
from edkm.offload.transfer import Copy

# Content, layout and 16-bit type of a weight.
RanksKey = tuple[int, Layout, torch.dtype]


class Options(NamedTuple):
    """The arguments of `saved_tensors`."""

    device: torch.device
    marshal: bool
    uniquify: bool
    shard: dist.ProcessGroup | None
    hops: int
    resident: torch.nn.Module | None


class Packer:
    """The decisions of one block, and what it remembers for them."""

    def __init__(self, options: Options, stats: Stats):
        self._options, self._stats = options, stats
        self.ledger = Ledger(options.hops)
        self._ranks: dict[RanksKey, weakref.ref[Source]] = {}
        self._last: weakref.ref[Copy] | None = None
        self._pieces = 0
        module = options.resident
        owned = () if module is None else (*module.parameters(), *module.buffers())
        # The weak references keep addresses from being used again.
        self._resident = {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in owned if is_plain(t)}

    def pack(self, tensor: Tensor) -> Handle:
        stats, requested = self._stats, n_bytes(tensor)
        stats.tensors += 1
        stats.requested_bytes += requested
        if self._lives_on(tensor):
            stats.avoid("reference", requested)
            return Reference(tensor if tensor.is_leaf else tensor.detach(), tensor._version)
        if not is_plain(tensor):
            return Whole(tensor.detach(), self._options.device, stats)
        with unseen():
            return self._part(tensor.detach())

    def _part(self, tensor: Tensor) -> Handle:
        layout, conj, neg = layout_of(tensor), tensor.is_conj(), tensor.is_neg()
        if not tensor.numel():
            return Empty(layout, tensor.device)
        # The bytes as they are, without a conjugation or a minus that is still to be applied.
        tensor = torch.ops.aten._neg_view(tensor) if neg else tensor
        tensor = tensor.conj() if conj else tensor
        return Part(self._piece(tensor, layout), layout, conj, neg)

    def close(self) -> None:
        """Nothing is packed any more. What handles need they own."""
        self.ledger.clear()
        self._ranks.clear()

    def _lives_on(self, tensor: Tensor) -> bool:
        owner = tensor if tensor._base is None else tensor._base
        # The graph holds a leaf that requires grad in any case; of other tensors only parameters are known to stay.
        if (owner.is_leaf and owner.requires_grad) or isinstance(owner, torch.nn.Parameter):
            return True
        return bool(self._resident) and is_plain(tensor) and tensor.untyped_storage()._cdata in self._resident

    def _piece(self, tensor: Tensor, layout: Layout) -> Piece:
        if not self._options.marshal:
            return self._new_piece(tensor, layout)
        content, group = self.ledger.content(tensor), self._options.shard
        if group is None:
            piece = self.ledger.find(content, layout)
        elif self._is_sharded(layout.n_bytes):
            piece = self.ledger.find(content, layout)
            # Whether it is alive may depend on when this rank let go of a graph.
            piece = piece if shard.agree(group, -1 if piece is None else piece.number, tensor.device) else None
        else:
            piece = None
        if piece is not None:
            self._stats.avoid("marshal", layout.n_bytes)
            return piece
        piece = self._new_piece(tensor, layout)
        self.ledger.keep(content, piece)
        return piece

    def _new_piece(self, tensor: Tensor, layout: Layout) -> Piece:
        """Keep what nobody keeps yet."""
        marshal, group = self._options.marshal, self._options.shard
        wanted = compact(layout) if marshal else layout
        self._stats.avoid("marshal", layout.n_bytes - wanted.n_bytes)
        values = view(tensor, wanted)
        if group is not None and self._is_sharded(layout.n_bytes):
            name = f"saved tensor {list(layout.size)} {layout.dtype}, number {self._stats.tensors - 1} of the block"
            shard.require_replicated(group, values, name)
        self._pieces += 1
        source = None
        # Where a collective is needed to agree, a tensor that is too small for one is kept without.
        if self._options.uniquify and uniquify.is_declared() and (group is None or self._is_sharded(layout.n_bytes)):
            table = self._table(view(tensor, distinct(layout) if marshal else layout))
            wanted, source = table or (wanted, None)
        return Piece(wanted, source or self._store(values), tensor.device, self._pieces, shared=group is None)

    def _is_sharded(self, n_bytes: int) -> bool:
        return self._options.shard is not None and n_bytes >= shard.WHOLE_BYTES

    def _store(self, values: Tensor) -> Source:
        """Copy values to where they are kept."""
        group = self._options.shard
        if group is not None and self._is_sharded(values.numel() * values.itemsize):
            return shard.Slice(values, self._options.device, self._stats, group)
        # Without the ledger nobody would say that the source is about to be overwritten.
        copy = Copy(values, self._options.device, self._stats, self._last and self._last(), overlap=self._options.marshal)
        self._last = weakref.ref(copy)
        return copy

    def _table(self, tensor: Tensor) -> tuple[Layout, Source] | None:
        """A map as a table, if it was declared to be a function and a table is worth it."""
        ways = uniquify.readings(tensor)
        if not ways:
            return None
        declared = ways[0][0]
        content = self.ledger.content(declared.weight)
        key, ranks = (content, layout_of(declared.weight), declared.dtype), declared.ranks(content)
        rank_list = self._kept_ranks(key, ranks)
        n, u, map_bytes = len(ranks.rank), len(ranks.first), tensor.numel() * tensor.itemsize
        new_bytes = map_bytes // n * u + (2 * n if rank_list is None else 0)
        if new_bytes >= map_bytes:
            return None
        by_weight = next((view for _, view in ways if uniquify.is_function(view.reshape(n, -1), ranks)), None)
        if by_weight is None:
            raise uniquify.refusal(tensor, declared)
        if rank_list is None:
            rank_list = self._store(ranks.rank.to(torch.int16))
            self._ranks[key] = weakref.ref(rank_list)
        self._stats.avoid("uniquify", map_bytes - new_bytes)
        rows = self._store(by_weight.reshape(n, -1)[ranks.first])  # [u, r]
        return layout_of(by_weight), uniquify.Table(rows, rank_list, tuple(by_weight.shape))

    def _kept_ranks(self, key: RanksKey, ranks: uniquify.Ranks) -> Source | None:
        """The rank list of a weight as it is now, if a map before this one has left it."""
        ref, group = self._ranks.get(key), self._options.shard
        kept = ref() if ref is not None else None
        if group is None or shard.agree(group, -1 if kept is None else 0, ranks.rank.device):
            return kept
        shard.require_replicated(group, ranks.rank, f"function_of: weight {list(key[1].size)}")
        return None
