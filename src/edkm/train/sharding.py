"""Cluster one model on several ranks, which hold all of it (DDP) or pieces (FSDP2, `fully_shard`).

Each rank reads only its own rows of a weight and the sums are added (`core.sharded`), so that all ranks hold the same centroids to
the bit and none needs a whole weight only to cluster it. With DDP, where every rank has the whole weight, the rows are shared out
all the same: it saves time. The packed model is written by one rank, which has the indices of one tensor at a time sent to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from edkm.core import sharded
from edkm.core.assign import Clustered, LazyFrozen, as_matrix, stored_parts, stored_tables
from edkm.core.sharded import Rows
from edkm.train.clustering import Clustering, SharedRows
from edkm.train.prepare import clusterings, unclustered
from edkm.train.targets import decoder_layers


def shard_model(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Apply FSDP2 to a model in place: each decoder layer is gathered when it runs, the rest stays gathered within a pass."""
    mesh = None if group is None else DeviceMesh.from_group(group, next(model.parameters()).device.type)
    for module in (*decoder_layers(model), model):
        fully_shard(module, mesh=mesh)


def distribute(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Share the clustering of a prepared model over the ranks of a process group, in place.

    Call it on all ranks after the model was wrapped (`fully_shard`, `DistributedDataParallel`) or placed, before training. Rank 0's
    centroids count for all.

    Args:
        model: prepared by `edkm.prepare`.
        group: of torch.distributed; None for all ranks. With `fully_shard` its own group.

    Raises:
        ValueError: no process group, a model that is not prepared, a weight that is sharded in a way other than by rows.

    Cost:
        Each rank reads its own rows; per weight and iteration one all-reduce of `g k (d + 1)` numbers, and with `histogram` one of 65,536.
    """
    if not dist.is_initialized():
        raise ValueError("distribute: there is no process group. Start with torchrun, or call torch.distributed.init_process_group.")
    found = clusterings(model)
    if not found:
        raise ValueError("model: nothing in it is clustered. Call edkm.prepare first.")
    for name, weight, clustering in found:
        mesh = _mesh_group(name, weight) if isinstance(weight, DTensor) else group
        with torch.no_grad():
            for buffer in clustering.buffers():
                dist.broadcast(buffer, _first(mesh), group=mesh)
        backend = [clustering.choice[0]]  # rank 0's, so that all ranks round alike
        dist.broadcast_object_list(backend, _first(mesh), group=mesh)
        rows = partial(_rows, weight, clustering, mesh)
        clustering.share(SharedRows(weight, rows, partial(_add_up, group=mesh), isinstance(weight, DTensor)), backend[0])


def _check_same_centroids(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Refuse, on all ranks, a model with a tensor whose clustering is not the same on all of them to the bit."""
    found = clusterings(model)
    sums = torch.stack([torch.stack([_checksum(b) for b in c.buffers()]).sum() for *_, c in found])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    different = (low != high).nonzero().flatten().tolist()
    if different:
        raise ValueError(
            f"{found[different[0]][0]}: the ranks hold different centroids ({len(different)} of {len(found)} tensors). Call "
            "edkm.distribute after wrapping the model and before training, and resume from a checkpoint before this."
        )


def _checksum(x: Tensor) -> Tensor:
    """Sum the bytes, weighted by their places; int64."""
    words = x.detach().reshape(-1).view(torch.uint8).long()
    return (words * (torch.arange(len(words), device=x.device) * 0x9E3779B97F4A7C1 + 1)).sum()


def save_from_first_rank(
    model: nn.Module, write: Callable[[Mapping[str, Clustered | LazyFrozen], dict[str, Tensor]], None], group: ProcessGroup | None = None
) -> None:
    """Write a prepared model from rank 0, which never holds more than one clustered tensor; call it on all ranks.

    Args:
        write: called on rank 0 with the clustered tensors, whose indices come when they are asked for, and all others.

    Raises:
        ValueError: the ranks' centroids differ.

    Cost:
        Two passes over the weights; on rank 0 one byte for each weight of the largest tensor.
    """
    _check_same_centroids(model, group)
    found = clusterings(model)
    # Errors and whole small tensors first, in the same order on all ranks; a tensor that `write` does not ask for is not sent.
    later = {name: _announce(number, weight, clustering, found, group) for number, (name, weight, clustering) in enumerate(found)}
    dense = {name: t.full_tensor().cpu() if isinstance(t, DTensor) else t for name, t in unclustered(model).items()}
    if dist.get_rank(group) == 0:
        try:
            write(later, dense)
        finally:
            _request(-1, found[0][1], group)
    else:
        while (number := _request(0, found[0][1], group)) >= 0:
            _send_indices(found[number][1], found[number][2], group)


def _announce(number: int, weight: Tensor, clustering: Clustering, found: list, group: ProcessGroup | None) -> LazyFrozen:
    rows = _rows(weight, clustering, group).total
    _, error = _freeze(weight, clustering, group)

    def ask() -> Tensor:
        _request(number, found[0][1], group)
        indices = _send_indices(weight, clustering, group)
        assert indices is not None
        return indices

    parts = stored_parts(clustering.centroids, clustering.form, rows)
    return LazyFrozen(parts, tuple(weight.shape), rows, error, ask, clustering.config.format)


def _request(number: int, like: Tensor, group: ProcessGroup | None) -> int:
    """Send rank 0's number to all ranks."""
    message = torch.tensor([number], dtype=torch.int64, device=like.device)
    dist.broadcast(message, _first(group), group=group)
    return int(message)


def _freeze(weight: Tensor, clustering: Clustering, group: ProcessGroup | None) -> tuple[Tensor, float]:
    rows, form = _rows(weight, clustering, group), clustering.form
    return sharded.freeze(rows, stored_tables(clustering.centroids, form, rows.total), partial(_add_up, group=group), form)


def _send_indices(weight: Tensor, clustering: Clustering, group: ProcessGroup | None) -> Tensor | None:
    """Gather the indices of the whole weight on rank 0; None elsewhere."""
    mine, _ = _freeze(weight, clustering, group)
    counts = mine.new_zeros(dist.get_world_size(group), dtype=torch.int64)
    counts[dist.get_rank(group)] = len(mine)
    sizes = _add_up(counts, group).tolist()
    padded = mine.new_zeros(max(sizes), mine.shape[1])
    padded[: len(mine)] = mine
    boxes = [torch.empty_like(padded) for _ in sizes] if dist.get_rank(group) == 0 else None
    dist.gather(padded, boxes, _first(group), group=group)
    return None if boxes is None else torch.cat([box[:size] for box, size in zip(boxes, sizes, strict=True)]).cpu()


def _rows(weight: Tensor, clustering: Clustering, group: ProcessGroup | None) -> Rows:
    """Return this rank's rows; `fully_shard` cuts the first axis as `torch.chunk` does, and so do we."""
    total, rank, world = weight.shape[0], dist.get_rank(group), dist.get_world_size(group)
    size = -(-total // world)
    start = min(rank * size, total)
    local = weight.to_local().detach() if isinstance(weight, DTensor) else weight.detach()[start : start + size]
    each = weight.shape[1 : clustering.row_axes].numel()  # rows of the matrix in one of the first axis
    return Rows(as_matrix(local, clustering.row_axes), start * each, total * each)


def _add_up(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks, in place. Each number is added up on one rank and sent to the others: all have the same bits."""
    dist.all_reduce(x, group=group)
    return x


def _first(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_global_rank(group, 0)


def _mesh_group(name: str, weight: DTensor) -> ProcessGroup:
    placements = weight.placements
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name}: clustering needs a weight sharded by rows over one group of ranks, got {placements}. Use fully_shard with a "
            "one-dimensional mesh, or skip the tensor."
        )
    return weight.device_mesh.get_group()
