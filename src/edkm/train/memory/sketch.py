"""The memory of clustering: what stands in for each `Clustering` when a training step is simulated."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edkm.config import ClusterConfig
from edkm.core import blocks, histogram
from edkm.core.assign import as_matrix
from edkm.core.op import Solution, choose_backend
from edkm.core.reference import compute_dtype
from edkm.train.clustering import ClusterGrad
from edkm.train.memory.timeline import Timeline
from edkm.train.prepare import Entry, plan
from edkm.train.targets import Target

# Weights of a tensor that are looked at to guess the number of its distinct values.
_SAMPLE_WEIGHTS = 1 << 20


class Choice(NamedTuple):
    """Of a clustered tensor: what computes it, and how many distinct 16-bit values it has."""

    entry: Entry
    backend: str
    values: int


def choices(model: nn.Module, config: ClusterConfig, backend: str, device_type: str) -> dict[str, Choice]:
    """By name. Weights without data are taken for normally distributed ones."""
    parameters, found = dict(model.named_parameters()), {}
    for entry in plan(model, config).clustered:
        flat = parameters[entry.name].detach().flatten()
        group = flat.numel() // entry.tables
        if flat.is_meta:
            flat = _normal(min(flat.numel(), _SAMPLE_WEIGHTS))
        chosen = backend
        if backend == "auto":
            groups = max(1, flat.numel() // group)
            chosen, _ = choose_backend(flat.view(1, -1), groups, 2**entry.bits, entry.dim, torch.bfloat16, torch.device(device_type))
        sample = flat[:: -(-flat.numel() // _SAMPLE_WEIGHTS)]
        keys = sample.to(torch.bfloat16).view(torch.int16).int() + histogram.KEYS // 2
        found[entry.name] = Choice(entry, chosen, int((keys.bincount() > 0).sum()))
    return found


@cache
def _normal(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def scratch_bytes(
    rows: int, cols: int, centroids: tuple[int, int, int], values: int, backend: str, device_type: str, itemsize: int = 4
) -> int:
    """What a backend uses beside its result while it works on a weight `[rows, cols]`, in `adjoint`, which uses the most.

    Args:
        centroids: `(g, k, d)`.
        values: distinct values of the weight, for `histogram`.
        backend: `histogram`, `blocks` or `native`.
        itemsize: bytes of a weight.
    """
    if backend == "native":
        return 12 * rows * cols if itemsize == 2 else 0  # weight, gradient and result in float32
    groups, k, d = centroids
    weights, entries = rows * cols // groups, blocks.map_entries(torch.device(device_type))
    if backend == "blocks":
        points = _largest_block(groups, rows // groups // d, cols * k, entries) // k
        # Three maps; a point's weights, gradient, output and results, its importance and sums; importance averaged over vectors.
        return 4 * points * (3 * k + 6 * d + 4) + (4 * rows * cols // d if d > 1 else 0)
    together = min(groups, histogram.groups_of_piece(weights, torch.device(device_type)))
    values = min(values, together * weights) if device_type == "cpu" else histogram.KEYS
    folds = -(-values // histogram.FOLD)
    points = _largest_block(together, folds, histogram.FOLD * k, entries) // k
    table = together * folds * histogram.FOLD
    cells = histogram.KEYS if together == 1 else table
    # Tables of values, importance, gradient and two results, and some of the chunk before; then the maps, or two results by cell and,
    # of each weight of a block, its key and two results, which live on while those of the next block are made.
    tables = (5 if together == groups else 7) * table
    several = together * weights > histogram.BLOCK_WEIGHTS
    at_blocks = 8 * cells + (20 * histogram.BLOCK_WEIGHTS if several else 12 * together * weights)
    return 4 * tables + max(4 * points * (3 * k + 10), at_blocks)


def _largest_block(groups: int, rows: int, per_row: int, budget: int) -> int:
    """Entries of the largest block of `fused.chunks`."""
    whole = rows * per_row
    return min(groups, budget // whole) * whole if whole <= budget else max(1, budget // per_row) * per_row


class Sketch(nn.Module):
    """Takes the memory of a `Clustering`, as the layers use it, and computes nothing. Make it within a `FakeTensorMode`.

    Args:
        target: the whole weight.
        gathers: FSDP makes the whole weight for each pass and frees it.
    """

    def __init__(
        self, target: Target, choice: Choice, config: ClusterConfig, timeline: Timeline, device_type: str, *, gathers: bool
    ) -> None:
        super().__init__()
        entry = choice.entry
        self.config = config.for_tensor(entry.name) or config
        self.choice, self.timeline, self.device_type, self.gathers = choice, timeline, device_type, gathers
        self.tables, self.shape = entry.tables, (entry.tables, 2**entry.bits, entry.dim)
        self._live: Tensor | None = None
        weight, self.row_axes = target.weight, target.row_axes
        dtype, cols, weights = compute_dtype(weight.dtype), as_matrix(weight, self.row_axes).shape[1], weight.numel() // entry.tables
        importance, temperature = torch.empty(1, cols, dtype=dtype), torch.empty(self.tables, dtype=dtype)
        trajectory = torch.empty(config.max_iters + 1, *self.shape, dtype=dtype)
        # `histogram` keeps keys of 8 bytes for every chunk, and a single group's importance.
        chunks = -(-self.tables // histogram.groups_of_piece(weights, torch.device(device_type)))
        per_chunk = min(choice.values, weights) * (12 if self.tables == 1 else 8)
        table = torch.empty(chunks * per_chunk if choice.backend == "histogram" else 0, dtype=torch.uint8)
        self.centroids = torch.empty(self.shape, dtype=dtype)
        self.solution = Solution(trajectory, importance, temperature, torch.bfloat16, choice.backend, table)
        for tensor in (self.centroids, importance, temperature, trajectory, table):
            timeline.count(tensor, "clustering")

    @property
    def is_soft(self) -> bool:
        return True

    def live(self, weight: Tensor) -> tuple[Tensor, Solution]:
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight.detach(), self.solution
        if self._live is None or self.gathers:
            self._use_scratch(weight)
            self._live = ClusterGrad.apply(weight, self, self.solution)
        return self._live, self.solution

    def decode(self, weight: Tensor, solution: Solution) -> Tensor:
        result = torch.empty(weight.shape, dtype=weight.dtype)
        self.timeline.count(result, "clustering")
        self._use_scratch(weight)
        return result

    def backward(self, grad: Tensor, weight: Tensor, solution: Solution) -> Tensor:
        if self.config.softness == 0:
            return grad.to(weight.dtype)
        self.timeline.count(grad, "clustering")
        return self.decode(weight, solution)

    def _use_scratch(self, weight: Tensor) -> None:
        rows, cols = as_matrix(weight, self.row_axes).shape
        size = scratch_bytes(rows, cols, self.shape, self.choice.values, self.choice.backend, self.device_type, weight.itemsize)
        self.timeline.add("clustering", size)
        self.timeline.add("clustering", -size)
