"""Hold the clustering of one weight: its centroids, found once per optimizer step, and the gradient through them.

The weight stays the trained parameter, and its clustered form multiplies the input. The centroids depend on the weight alone, so they are
found once per optimizer step, whatever the number of micro-batches or recomputations.

Layers do not differentiate the clustering. `Clustering.attach(weight)` returns an alias that stands for the clustered weight in the graph,
and layers hand it the gradient of the clustered weight. Autograd sums it over all uses (tied layers), and one node, `ClusterGrad`, turns
the sum into the gradient of the weight.
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

from edkm.config import ClusterConfig
from edkm.core import sharded
from edkm.core.assign import Frozen, as_matrix, count_tables, freeze, quantize, stored_tables
from edkm.core.formats import Format, FrozenBlocks
from edkm.core.kmeans import initial_centroids, temperature_for
from edkm.core.op import Solution, check_importance, pick_backend, solve, table_shape
from edkm.core.reference import NOT_FINITE, Problem, compute_dtype, importance_in_blocks, in_blocks
from edkm.core.sharded import Reduce, Rows
from edkm.core.theta import initial_theta
from edkm.train.steps import steps


class SharedRows(NamedTuple):
    """A weight whose rows several ranks cluster together.

    Attributes:
        weight: the parameter that the optimizer steps on; under FSDP a DTensor.
        rows: this rank's rows of it as they are now.
        reduce: for `core.sharded`.
        gathers: FSDP makes the whole weight for each pass and frees it.
    """

    weight: Tensor
    rows: Callable[[], Rows]
    reduce: Reduce
    gathers: bool


class Clustering(nn.Module):
    """State of one clustered weight. All of it is in buffers, so that a resumed run is the same run.

    Buffers: `centroids [g, k, d]` float32 after the last step (in a format theta `[g, p, 1]`), `temperature [g]` at the start of training,
    `importance` or None, `step` the number of steps taken; a frozen weight takes them with the others. Between a forward and the
    optimizer's step the centroids have moved and the weight has not: save after the step, as trainers do.
    """

    centroids: Tensor
    temperature: Tensor
    importance: Tensor | None
    step: Tensor
    basis: Tensor | None

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
        steps.watch()
        matrix, form = as_matrix(weight.detach(), row_axes), config.form
        shape = table_shape_of(weight.shape, row_axes, config)
        if importance is not None:
            importance = importance.to(matrix.device, compute_dtype(matrix.dtype))
            check_importance(importance)
        if centroids is None and form is not None:
            centroids = initial_theta(matrix, form, importance).reshape(shape)
        elif centroids is None:
            per_lut = len(matrix) // shape[0]
            centroids = initial_centroids(matrix, config.bits, dim=config.dim, rows_per_lut=per_lut, importance=importance)
        else:
            if centroids.shape != shape:
                raise ValueError(f"centroids: expected {list(shape)} by the config, got {list(centroids.shape)}.")
            centroids = centroids.to(matrix.device, compute_dtype(matrix.dtype))
        temperature = temperature_for(matrix, centroids, importance, config.softness, form)
        if not bool(temperature.isfinite().all()):
            raise ValueError(f"weight: {NOT_FINITE}")
        self.register_buffer("centroids", centroids)
        self.register_buffer("temperature", temperature)
        self.register_buffer("importance", importance)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=matrix.device))
        basis = None if form is None else form.basis(centroids.dtype, matrix.device)
        self.register_buffer("basis", basis, persistent=False)
        self.config, self.row_axes = config, row_axes
        self._asked, self._matrix_shape = backend, matrix.shape
        self._choice: tuple[str, str] | None = None
        self._chosen_on = matrix.device
        self.name = "weight"  # `prepare` puts the parameter's here
        self.prepared_by = config  # `prepare` puts the whole model's here: it goes into the packed file
        self.soft_in_eval = False
        self._state: tuple[Any, ...] | None = None  # of the weight that `_solution` was found for
        self._solution: Solution | None = None
        self._alias: Tensor | None = None
        self._counted = False
        self._shared: SharedRows | None = None

    def extra_repr(self) -> str:
        groups, k, d = table_shape(self.centroids, self.basis)
        table = f"bits={(k - 1).bit_length()}, tables={groups}, dim={d}" if self.form is None else f"{self.form.name}, blocks={groups}"
        return f"{table}, softness={self.config.softness}"

    @property
    def form(self) -> Format | None:
        """The format; None for free tables."""
        return self.config.form

    @property
    def choice(self) -> tuple[str, str]:
        """The backend and the reason for it: chosen at `prepare`, and once more when the clustering has moved to another device."""
        device = self.centroids.device
        choice = self._choice
        if choice is None or device != self._chosen_on:
            if self.config.softness == 0:
                choice = "hard", "softness 0"
            else:
                weight = in_blocks(torch.empty(self._matrix_shape, device="meta"), self.tables)
                shape, shaped = table_shape(self.centroids, self.basis), self.basis is not None
                choice = pick_backend(self._asked, weight, shape, torch.bfloat16, device, shaped=shaped)
            self._choice = choice
            self._chosen_on = device
        return choice

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
        self._state = self._solution = self._alias = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles find their own centroids."""
        own = ("_state", "_solution", "_alias", "_shared", "_choice")  # a pickle may be read on another machine
        return {**self.__dict__, **dict.fromkeys(own)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        steps.watch()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def share(self, rows: SharedRows | None, backend: str | None = None) -> None:
        """Find the centroids together with other ranks from now on, each reading its own rows, all with one backend (None: alone)."""
        self._shared = rows
        self._choice = (backend, "the same on all ranks") if backend else None
        self.forget()

    def current_temperature(self) -> Tensor:
        """Return the temperature `[g]`, annealed to this step."""
        if not self.config.anneal_steps:
            return self.temperature
        # The step is not read from the device.
        share = (self.step.to(self.temperature.dtype) / self.config.anneal_steps).clamp_(max=1)
        return self.temperature * self.config.anneal**share

    def solve(self, weight: Tensor) -> Solution:
        """Find the centroids for the weight as it is now, once until the weight changes.

        Training moves the state: the first use with gradients after each change of the weight, or of others if it is frozen, stores the
        new centroids and counts a step. Any other use leaves the state alone.
        """
        state = self._state_of(weight)
        if self._state != state or self._solution is None:
            self._state, self._solution, self._alias, self._counted = state, self._solve(weight), None, False
        if self.training and torch.is_grad_enabled() and not self._counted:
            with torch.no_grad():
                self.centroids.copy_(self._solution.trajectory[-1])
                self.step += 1
            self._counted = True
            steps.moved[weight if self._shared is None else self._shared.weight] = weakref.ref(self)
        return self._solution

    def _state_of(self, weight: Tensor) -> tuple[Any, ...]:
        """Return a value that changes when the weight does."""
        if self._shared is not None:
            return self._shared.weight._version, *steps.on(self._shared.weight)
        return weight.untyped_storage()._cdata, weight._version, *steps.on(weight)

    def _solve(self, weight: Tensor) -> Solution:
        dtype = compute_dtype(weight.dtype)
        importance = importance_in_blocks(self.importance, self._matrix_shape, self.tables)
        basis = None if self.basis is None else self.basis.to(dtype)
        problem = Problem(self.current_temperature().to(dtype), importance, torch.bfloat16, basis)
        start, iters = self.centroids.to(dtype), self.config.max_iters
        if self._shared is not None:
            rows = self._shared.rows().in_blocks(self.tables)
            return sharded.solve(rows, start, problem, iters, self.choice[0], self._shared.reduce)
        return solve(self.blocks(weight), start, problem, iters, self.choice[0])

    def attach(self, weight: Tensor) -> tuple[Tensor, Solution]:
        """Return an alias of the weight whose gradient, for autograd, is that of the clustered weight; and the solution to decode it by."""
        solution = self.solve(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight.detach(), solution
        if self._shared is not None and self._shared.gathers:
            # FSDP expects a gradient from every pass through the layer, when that pass's backward ends.
            return ClusterGrad.apply(weight, self, solution), solution  # pyright: ignore[reportReturnType]
        if self._alias is None:
            self._alias = ClusterGrad.apply(weight, self, solution)  # pyright: ignore[reportAttributeAccessIssue]
        assert self._alias is not None
        return self._alias, solution

    def decode(self, weight: Tensor, solution: Solution, dtype: torch.dtype | None = None) -> Tensor:
        """Make the soft weight, of the shape of `weight` and in its dtype if no other is given; no gradient."""
        return reshaped(solution.decode(self.blocks(weight), dtype), weight.shape)

    def adjoint(self, grad: Tensor, weight: Tensor, solution: Solution) -> Tensor:
        """Turn the gradient of the soft weight into `dL/dweight`."""
        blocks = self.blocks(weight)
        return solution.adjoint(grad.reshape(blocks.shape), blocks).view(weight.shape)

    def freeze(self, weight: Tensor) -> Frozen | FrozenBlocks:
        """Return indices and tables of the weight as it is now, which `eval()` uses and the packed file holds."""
        try:
            return freeze(self.matrix(weight), self.centroids, weight.shape, self.form)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def hard(self, weight: Tensor) -> Tensor:
        """Put every value of the weight on its nearest centroid; no gradient."""
        matrix = self.matrix(weight)
        return quantize(matrix, stored_tables(self.centroids, self.form, len(matrix)), weight.dtype, self.form).values.view(weight.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """View the weight as `[rows, cols]`, detached."""
        return as_matrix(weight.detach(), self.row_axes)

    def blocks(self, weight: Tensor) -> Tensor:
        """View the weight as the matrix that is clustered: a block of columns is a row."""
        return in_blocks(self.matrix(weight), self.tables)

    @property
    def tables(self) -> int:
        return self.centroids.shape[0]

    @property
    def is_soft(self) -> bool:
        return self.training or self.soft_in_eval


def table_shape_of(shape: Sequence[int], row_axes: int, config: ClusterConfig) -> tuple[int, int, int]:
    """Return the shape of the centroids of a weight, `(g, k, d)`, or in a format of its theta, `(g, p, 1)`."""
    form = config.form
    if form is None:
        return count_tables(shape, row_axes, config.rows_per_lut), 2**config.bits, config.dim
    rows, cols = math.prod(shape[:row_axes]), math.prod(shape[row_axes:])
    return rows * (cols // form.width(cols)), form.p, 1


def reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
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
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, clustering, solution = ctx.problem
        return clustering.adjoint(g, weight, solution), None, None


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
