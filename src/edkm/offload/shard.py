"""Keep once what every rank of a process group holds alike: each rank keeps its part of the bytes.

Before a tensor is split, its checksum is compared over the group. Data-parallel training has replicated tensors (weights, and functions
of weights alone) and tensors that differ (activations), and splitting the latter would give silent garbage in backward.

Restoring is a collective, so all ranks must restore the same tensors in the same order: that of the graph. Collectives run where the
backend can: on the GPU with NCCL, on the CPU with Gloo.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from edkm.offload.transfer import OffloadedCopy, Stats

# Below it a collective costs more than the bytes do.
WHOLE_BYTES = 512
_BLOCK_WORDS = 1 << 20
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _gather(group: dist.ProcessGroup, mine: Tensor) -> Tensor:
    """Gather `[world, *mine.shape]`, on the device of `mine` unless the backend cannot."""
    backend = dist.get_backend_config(group)
    on = mine.device if mine.is_cuda and "nccl" in str(backend) else torch.device("cpu")
    mine = mine.to(on)
    parts = mine.new_empty(dist.get_world_size(group) * mine.numel())
    # The name since torch 2.13, which deprecates the other.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(parts, mine.reshape(-1), group=group)
    return parts.view(-1, *mine.shape)


def require_replicated(group: dist.ProcessGroup, values: Tensor, name: str) -> None:
    """Raise on every rank unless all hold the same bytes.

    Raises:
        ValueError: they do not.
    """
    own = torch.stack([hash_bytes(values), torch.tensor(values.numel() * values.itemsize, device=values.device)])
    everyone = _gather(group, own)
    if not bool((everyone == everyone[0]).all()):
        raise ValueError(
            f"{name}: not the same on all {len(everyone)} ranks of the group, and a sharded block keeps only a part of it on each. Put "
            "only what is replicated into saved_tensors(shard=group); blocks nest, so what differs goes into an inner one without shard."
        )


def hash_bytes(values: Tensor) -> Tensor:
    """Hash all bytes and their positions to 64 bits, on the device of `values`."""
    flat = _bytes_of(values)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    odd = torch.arange(min(len(words), _BLOCK_WORDS), device=flat.device).mul_(2).add_(1).mul_(_GOLDEN)
    for block in words.split(_BLOCK_WORDS):
        total = total * _GOLDEN + (block * odd[: len(block)]).sum()
    return total


def _bytes_of(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


class RankSlice:
    """This rank's part of `values`, which all ranks must hold alike and give at the same time.

    Cost: `ceil(bytes / world)` on every rank; an all-gather to restore.
    """

    __slots__ = ("__weakref__", "_copy", "_dtype", "_group", "_origin", "_size", "n_bytes")

    def __init__(self, values: Tensor, device: torch.device, stats: Stats, group: dist.ProcessGroup):
        self._group, self._origin, self._dtype, self._size = group, values.device, values.dtype, values.shape
        self.n_bytes = values.numel() * values.itemsize
        part = -(-self.n_bytes // dist.get_world_size(group))
        mine = _bytes_of(values)[part * dist.get_rank(group) :][:part]
        # The last ranks pad: parts of a gather are of one size.
        mine = torch.nn.functional.pad(mine, (0, part - len(mine)))
        self._copy = OffloadedCopy(mine, device, stats)
        stats.avoid("shard", self.n_bytes - part)

    def fetch(self) -> Tensor:
        flat = _gather(self._group, self._copy.fetch()).view(-1)[: self.n_bytes]
        return flat.to(self._origin).view(self._dtype).view(self._size)
