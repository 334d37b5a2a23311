"""Hold the clustering of one weight: its centroids, found once per optimizer step, and the gradient through them.

The weight stays the trained parameter, and its clustered form multiplies the input. The centroids depend on the weight alone, so they are
found once per optimizer step, whatever the number of micro-batches or recomputations.

Layers do not differentiate the clustering. They use `Clustering.live(weight)`, which stands for the clustered weight in the graph,
and hand back the gradient of the clustered weight; autograd sums it over all uses (tied layers), and one node, `ClusterGrad`, turns the
sum into the gradient of the weight.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from edkm.config import ClusterConfig
from edkm.core import sharded
from edkm.core.assign import Frozen, as_matrix, as_stored, assign, count_tables, lookup, round_lut
from edkm.core.kmeans import initial_centroids, temperature_for
from edkm.core.op import Solution, check_backend, check_importance, find
from edkm.core.reference import NOT_FINITE, compute_dtype
from edkm.core.sharded import Reduce, Rows

# Softness 0 is the hard assignment: this fraction of the quantisation error leaves every weight on one centroid.
_HARD = 1e-6


def optimizer_steps(weight: Tensor) -> int:
    """Optimizer steps on a weight since this was first asked; of a frozen one all steps, so that it is annealed with the others.

    Some optimizers write through `.data` or raw pointers, where `_version` does not see them.
    """
    if not weight.requires_grad:
        return _steps
    if not hasattr(weight, _STEPS):
        setattr(weight, _STEPS, 0)
    return getattr(weight, _STEPS)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _steps, _steps_on_shards
    _steps += 1
    moved = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, _STEPS):
                setattr(parameter, _STEPS, getattr(parameter, _STEPS) + 1)
            moved.append(_moved.pop(parameter, lambda: None)())
        _steps_on_shards += any(hasattr(parameter, "full_tensor") for parameter in group["params"])
    _check_finite([clustering for clustering in moved if clustering is not None])


def _check_finite(clusterings: list[Clustering]) -> None:
    """Name a weight that was not finite in this step: one number is read from a device, whatever the number of layers."""
    by_device: dict[torch.device, list[Clustering]] = {}
    for clustering in clusterings:
        by_device.setdefault(clustering.centroids.device, []).append(clustering)
    for found in by_device.values():
        sums = torch.stack([clustering.centroids.sum(dtype=torch.float32) for clustering in found])
        if not bool(sums.isfinite().all()):
            wrong = next(clustering.name for clustering, finite in zip(found, sums.isfinite().tolist(), strict=True) if not finite)
            raise ValueError(f"{wrong}: {NOT_FINITE.removeprefix('weight: ')}")


_steps = 0
# FSDP gathers shards (DTensors) into other tensors for the forward pass, which no optimizer ever sees.
_steps_on_shards = 0
_STEPS = "_edkm_optimizer_steps"
# Weights whose centroids have moved since the optimizer's last step on them, and their clusterings.
_moved = WeakTensorKeyDictionary()
register_optimizer_step_post_hook(_count_step)


class Shard(NamedTuple):
    """A weight whose clustering several ranks share.

    Attributes:
        weight: the parameter that the optimizer steps on; under FSDP a DTensor.
        rows: this rank's rows of it as they are now.
        reduce: for `core.sharded`.
        backend: `histogram` or `blocks`, the same on all ranks.
        gathers: FSDP makes the whole weight for each pass and frees it.
    """

    weight: Tensor
    rows: Callable[[], Rows]
    reduce: Reduce
    backend: str
    gathers: bool


class Clustering(nn.Module):
    """State of one clustered weight. All of it is in buffers, so that a resumed run is the same run.

    Buffers: `centroids [g, k, d]` float32 after the last step, `temperature [g]` at the start of training, `importance` or None,
    `step` the number of steps taken; a frozen weight takes them with the others. Between a forward and the optimizer's step the centroids
    have moved and the weight has not: save after the step, as trainers do.
    """

    centroids: Tensor
    temperature: Tensor
    importance: Tensor | None
    step: Tensor

    def __init__(
        self,
        weight: Tensor,
        config: ClusterConfig,
        importance: Tensor | None = None,
        backend: str = "auto",
        centroids: Tensor | None = None,
        row_axes: int = 1,
    ) -> None:
        super().__init__()
        matrix = as_matrix(weight.detach(), row_axes)
        tables = count_tables(weight.shape, row_axes, config.rows_per_lut)
        check_backend(backend, matrix, 2**config.bits, config.dim, torch.bfloat16)
        if importance is not None:
            importance = importance.to(matrix.device, compute_dtype(matrix.dtype))
            check_importance(importance)
        if centroids is None:
            per_lut = len(matrix) // tables
            centroids = initial_centroids(matrix, config.bits, dim=config.dim, rows_per_lut=per_lut, importance=importance)
        else:
            shape = (tables, 2**config.bits, config.dim)
            if centroids.shape != shape:
                raise ValueError(f"centroids: expected {list(shape)} by the config, got {list(centroids.shape)}.")
            centroids = centroids.to(matrix.device, compute_dtype(matrix.dtype))
        temperature = temperature_for(matrix, centroids, importance, config.softness or _HARD)
        if not bool(temperature.isfinite().all()):
            raise ValueError(NOT_FINITE)
        self.register_buffer("centroids", centroids)
        self.register_buffer("temperature", temperature)
        self.register_buffer("importance", importance)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=matrix.device))
        self.config, self.backend, self.row_axes = config, backend, row_axes
        self.name = "weight"  # `prepare` puts the parameter's here
        self.prepared_by = config  # `prepare` puts the whole model's here: it goes into the packed file
        self.soft_in_eval = False
        self._key: tuple[Any, ...] | None = None
        self._solution: Solution | None = None
        self._live: Tensor | None = None
        self._counted = False
        self._shard: Shard | None = None

    def extra_repr(self) -> str:
        groups, k, d = self.centroids.shape
        return f"bits={(k - 1).bit_length()}, tables={groups}, dim={d}, softness={self.config.softness}"

    def _apply(self, fn, recurse=True):
        """Follow the model to a device, not to a narrower dtype: 16 bits would change the centroids."""
        kept = {name: b for name, b in self.named_buffers(recurse=False) if b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            setattr(self, name, before.to(getattr(self, name).device))
        self.forget()
        return self

    def forget(self) -> None:
        """Drop what was computed from the weight: it has changed."""
        self._key = self._solution = self._live = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles find their own centroids."""
        return {**self.__dict__, "_key": None, "_solution": None, "_live": None, "_shard": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.forget()

    def share(self, shard: Shard | None) -> None:
        """Find the centroids together with other ranks from now on, each reading its own rows (None: alone)."""
        self._shard = shard
        self.forget()

    def current_temperature(self) -> Tensor:
        """`[g]`, annealed to this step."""
        if not self.config.anneal_steps:
            return self.temperature
        # The step is not read from the device.
        share = (self.step.to(self.temperature.dtype) / self.config.anneal_steps).clamp_(max=1)
        return self.temperature * self.config.anneal**share

    def solve(self, weight: Tensor) -> Solution:
        """The centroids for the weight as it is now; found once until the weight changes.

        Training moves the state: the first use with gradients after each change of the weight, or of others if it is frozen, stores the
        new centroids and counts a step. Any other use leaves the state alone.
        """
        key = self._state_of(weight)
        if self._key != key or self._solution is None:
            self._key, self._solution, self._live, self._counted = key, self._find(weight), None, False
        if self.training and torch.is_grad_enabled() and not self._counted:
            with torch.no_grad():
                self.centroids.copy_(self._solution.trajectory[-1])
                self.step += 1
            self._counted = True
            _moved[weight if self._shard is None else self._shard.weight] = weakref.ref(self)
        return self._solution

    def _state_of(self, weight: Tensor) -> tuple[Any, ...]:
        """Changes when the weight does."""
        if self._shard is None:
            return weight.untyped_storage()._cdata, weight._version, optimizer_steps(weight), _steps_on_shards
        return self._shard.weight._version, optimizer_steps(self._shard.weight)

    def _find(self, weight: Tensor) -> Solution:
        dtype = compute_dtype(weight.dtype)
        start, tau = self.centroids.to(dtype), self.current_temperature().to(dtype)
        if self._shard is not None:
            rows, reduce = self._shard.rows(), self._shard.reduce
            iters, backend = self.config.max_iters, self._shard.backend
            return sharded.find(rows, self.importance, start, tau, iters, torch.bfloat16, backend, reduce)
        matrix = self.matrix(weight)
        return find(matrix, self.importance, start, tau, self.config.max_iters, 0.0, torch.bfloat16, self.backend)

    def live(self, weight: Tensor) -> tuple[Tensor, Solution]:
        """An alias of the weight whose gradient, for autograd, is that of the clustered weight; and the solution to decode it by."""
        solution = self.solve(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight.detach(), solution
        if self._shard is not None and self._shard.gathers:
            # FSDP expects a gradient from every pass through the layer, when that pass's backward ends.
            return ClusterGrad.apply(weight, self, solution), solution
        if self._live is None:
            self._live = ClusterGrad.apply(weight, self, solution)
        return self._live, solution

    def decode(self, weight: Tensor, solution: Solution) -> Tensor:
        """The soft weight, like `weight`; no gradient."""
        return _shaped(solution.decode(self.matrix(weight)), weight.shape)

    def backward(self, grad: Tensor, weight: Tensor, solution: Solution) -> Tensor:
        """`dL/dweight` from the gradient of the soft weight."""
        if self.config.softness == 0:
            return grad.to(weight.dtype)
        matrix = self.matrix(weight)
        return solution.adjoint(grad.reshape(matrix.shape), matrix).view(weight.shape)

    def freeze(self, weight: Tensor) -> Frozen:
        """Indices and tables of the weight as it is now; what `eval()` uses and what is packed."""
        matrix = self.matrix(weight)
        try:
            lut = round_lut(self.centroids)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        indices = assign(matrix, lut)
        wide = matrix.to(compute_dtype(matrix.dtype))
        error = (wide - lookup(indices, lut, wide.dtype)).square().sum() / wide.square().sum().clamp_min(torch.finfo(wide.dtype).tiny)
        if not math.isfinite(error):
            raise ValueError(f"{self.name}: {NOT_FINITE.removeprefix('weight: ')}")
        return Frozen(indices.cpu(), lut.cpu(), tuple(weight.shape), float(error))

    def hard(self, weight: Tensor) -> Tensor:
        """The weight with every value on its nearest centroid, like `weight`; no gradient."""
        matrix = self.matrix(weight)
        lut = as_stored(self.centroids)
        return lookup(assign(matrix, lut), lut, weight.dtype).view(weight.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight `[rows, cols]`, detached."""
        return as_matrix(weight.detach(), self.row_axes)

    @property
    def tables(self) -> int:
        return self.centroids.shape[0]

    @property
    def is_soft(self) -> bool:
        return self.training or self.soft_in_eval


def _shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape a tensor that nobody else holds. Not as a view: what an autograd function returns as one cannot be written to."""
    return torch.ops.aten._unsafe_view(x, list(shape))


class ClusterGrad(torch.autograd.Function):
    """Identity on the weight; backward is the chain rule of the clustering. May run once per micro-batch, so it saves nothing."""

    @staticmethod
    def forward(ctx, weight, clustering, solution):
        ctx.problem = weight, clustering, solution
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, clustering, solution = ctx.problem
        return clustering.backward(g, weight, solution), None, None


@contextmanager
def soft_weights(model: nn.Module):
    """Within the block, `eval()` uses the soft weights, without moving any state."""
    found = [m for m in model.modules() if isinstance(m, Clustering)]
    before = [m.soft_in_eval for m in found]
    try:
        for m in found:
            m.soft_in_eval = True
        yield model
    finally:
        for m, value in zip(found, before, strict=True):
            m.soft_in_eval = value
