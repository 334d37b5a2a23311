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
from edkm.core.reference import Problem, compute_dtype
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
        keys = sample.to(torch.bfloat16).view(torch.int16).int() + histogram.BINS // 2
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
    values = min(values, weights) if device_type == "cpu" else histogram.BINS
    folds = -(-values // histogram.FOLD)
    points, bins = _largest_block(1, folds, histogram.FOLD * k, entries) // k, folds * histogram.FOLD
    # Histograms of gradient and of two results; then the maps, before the result is there, or two results by bin and, of each weight of a
    # block, its bin and two results, which live on while those of the next block are made.
    at_blocks = 8 * histogram.BINS + (15 * histogram.BLOCK_WEIGHTS if weights > histogram.BLOCK_WEIGHTS else 12 * weights)
    return 12 * bins + max(4 * points * (3 * k + 10) + 4 * histogram.BINS - itemsize * weights, at_blocks)


def _largest_block(groups: int, rows: int, per_row: int, budget: int) -> int:
    """Entries of the largest block of `blocks.chunks`."""
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
        self._alias: Tensor | None = None
        weight, self.row_axes = target.weight, target.row_axes
        dtype, cols, weights = compute_dtype(weight.dtype), as_matrix(weight, self.row_axes).shape[1], weight.numel() // entry.tables
        importance, temperature = torch.empty(1, cols, dtype=dtype), torch.empty(self.tables, dtype=dtype)
        trajectory = torch.empty(config.max_iters + 1, *self.shape, dtype=dtype)
        # `histogram` keeps a number of 8 bytes, a value and a mass for every bin.
        kept = torch.empty(16 * min(choice.values, weights) if choice.backend == "histogram" else 0, dtype=torch.uint8)
        self.centroids = torch.empty(self.shape, dtype=dtype)
        self.solution = Solution(trajectory, Problem(temperature, importance), choice.backend, kept)
        for tensor in (self.centroids, importance, temperature, trajectory, kept):
            timeline.count(tensor, "clustering")

    @property
    def is_soft(self) -> bool:
        return True

    def attach(self, weight: Tensor) -> tuple[Tensor, Solution]:
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight.detach(), self.solution
        if self._alias is None or self.gathers:
            self._use_scratch(weight)
            self._alias = ClusterGrad.apply(weight, self, self.solution)
        return self._alias, self.solution

    def decode(self, weight: Tensor, solution: Solution) -> Tensor:
        result = torch.empty(weight.shape, dtype=weight.dtype)
        self.timeline.count(result, "clustering")
        self._use_scratch(weight)
        return result

    def adjoint(self, grad: Tensor, weight: Tensor, solution: Solution) -> Tensor:
        if self.config.softness == 0:
            return grad.to(weight.dtype)
        self.timeline.count(grad, "clustering")
        return self.decode(weight, solution)

    def _use_scratch(self, weight: Tensor) -> None:
        rows, cols = as_matrix(weight, self.row_axes).shape
        size = scratch_bytes(rows, cols, self.shape, self.choice.values, self.choice.backend, self.device_type, weight.itemsize)
        self.timeline.add("clustering", size)
        self.timeline.add("clustering", -size)
