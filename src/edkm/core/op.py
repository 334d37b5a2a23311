"""`edkm.cluster`: one function, four implementations, registered with torch.library.

`reference` is plain PyTorch, differentiated by autograd. A backend that keeps nothing is a module with three functions, listed in
`BACKENDS`:

    solve(weight, importance, centroids, temperature, iters, round_to) -> (trajectory [iters + 1, g, k, d], table)
    decode(weight, trajectory, temperature, round_to, table=None) -> out, like weight
    adjoint(grad, weight, importance, trajectory, temperature, round_to, table=None) -> dL/dweight, like weight

`solve` runs the iterations and has no gradient; `decode` applies the last one. The gradient of the whole function, centroid path
included, hangs on `decode`: it needs the live weight and the trajectory and nothing else, so that is all autograd keeps. `table` is a
small aid that a backend may hand from one to the next (None does as well); layers use it within an optimizer step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edkm.core import blocks, histogram, native, reference
from edkm.core.reference import NOT_FINITE, compute_dtype

BACKENDS = {"histogram": histogram, "blocks": blocks, "native": native}

# Measured on a CPU, forward and backward, in ns (benchmarks op): a point and centroid of the maps, a weight's way through a table.
_NS_PER_MAP_ENTRY = 14.0
_NS_PER_NATIVE_ENTRY = 6.0
_NS_PER_WEIGHT = 30.0


class Clustered(NamedTuple):
    """Result of `cluster`.

    Attributes:
        weight: `[rows, cols]`, dtype of the input, differentiable: the softly clustered weight.
        centroids: `[g, k, d]`, detached: the centroids after the last iteration, the start of the next step.
        iters: int64 scalar, iterations that were run (fewer than `max_iters` only with `tol`).
    """

    weight: Tensor
    centroids: Tensor
    iters: Tensor


def cluster(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: Tensor | float,
    importance: Tensor | None = None,
    max_iters: int = 3,
    tol: float = 0.0,
    round_to: torch.dtype | None = torch.bfloat16,
    backend: str = "auto",
) -> Clustered:
    """Differentiable k-means: replace every weight by its soft centroid and improve the centroids on the way.

    DKM (arXiv:2108.12659) with importance weights; `core/reference.py` states the equations. Gradients reach `weight` through the
    assignment and through every centroid update.

    Args:
        weight: `[rows, cols]`, float32, bfloat16, float16 or float64.
        centroids: `[g, k, d]` float32 (float64 with a float64 weight), where to start; gets no gradient. Consecutive rows are split
            evenly over the `g` tables. `d > 1` clusters vectors of `d` consecutive values along the rows.
        temperature: scalar or `[g]`, > 0, in squared weight units.
        importance: None, or non-negative and broadcastable to `weight`; a vector takes the mean over its values.
        max_iters: iterations, at least 1.
        tol: stop after the iteration in which no centroid moved by more than this (weight units).
        round_to: 16-bit dtype that a wider weight is rounded to first, straight-through, whatever the backend; None keeps full
            width, which rules `histogram` out.
        backend: `reference`, `histogram`, `blocks`, `native`, or `auto` (see `choose_backend`).

    Returns:
        `Clustered(weight, centroids, iters)`.

    Raises:
        ValueError: shapes that do not divide, more centroids than weights, non-finite weights, a temperature that is not
            positive, negative importance, an unknown or impossible backend.

    Cost:
        Kept for backward: the weight itself (no copy), `max_iters + 1` times the centroids. Passes over the weight: `histogram` 3 to 4
        forward and 2 to 3 backward; `blocks` and `native` `max_iters + 1` forward, `max_iters` to `2 max_iters` backward.
        `reference` keeps `O(max_iters n k)`.
    """
    check_shapes(weight, centroids, importance, max_iters)
    tau = torch.as_tensor(temperature, dtype=centroids.dtype, device=weight.device).detach().expand(centroids.shape[0])
    importance = None if importance is None else importance.detach()
    trajectory, iters = solve(weight.detach(), importance, centroids.detach(), tau, max_iters, tol, round_to, backend)
    if backend == "reference":
        steps = max_iters if tol == 0 else int(iters)
        out, _ = reference.cluster(weight, importance, centroids.detach(), tau, steps, _rounding(weight, round_to))
    else:
        out = decode(weight, importance, trajectory, iters, tau, round_to, backend)
    return Clustered(out, trajectory[-1], iters)


def choose_backend(
    weight: Tensor, groups: int, k: int, d: int, round_to: torch.dtype | None, device: torch.device | None = None
) -> tuple[str, str]:
    """What `auto` takes for a weight `[rows, cols]`, and why; `device` is where it will be, if not where it is.

    Compares the map entries that `histogram` and `blocks`, or `native` where there is a compiler, would compute for a group, plus what a
    table costs per weight. Shape, dtype and device decide, not the values: the choice is the same in every step and in a run that is
    resumed, and costs nothing.

    Returns:
        `(backend, reason)`.
    """
    if d > 1:
        return "blocks", f"vectors of {d} values"
    n, device = weight.numel() // groups, device or weight.device
    costs, reason = {"blocks": n * k * _NS_PER_MAP_ENTRY}, "weights wider than 16 bits"
    if native.takes(device, k, d):
        costs, reason = {"native": n * k * _NS_PER_NATIVE_ENTRY}, f"{k} centroids, on a CPU with a compiler"
    key = weight.dtype if weight.dtype.itemsize == 2 else round_to
    if key is not None and key.itemsize == 2:
        distinct = min(n, histogram.usual_values(device))
        costs["histogram"] = distinct * k * _NS_PER_MAP_ENTRY + n * _NS_PER_WEIGHT
        reason = f"some {distinct:,} distinct values for {n:,} weights of a group, {k} centroids"
    return min(costs, key=lambda name: costs[name]), reason


def check_shapes(weight: Tensor, centroids: Tensor, importance: Tensor | None, max_iters: int = 1) -> None:
    """Refuse what cannot be clustered, by shape and dtype alone."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: clustering takes a floating-point matrix [rows, cols], got {weight.dtype} {list(weight.shape)}. "
            "Flatten a convolution's weight to [out, in * kernel]."
        )
    if centroids.ndim != 3 or centroids.dtype != compute_dtype(weight.dtype):
        raise ValueError(
            f"centroids: expected {compute_dtype(weight.dtype)} [g, k, d] for a {weight.dtype} weight, got "
            f"{centroids.dtype} {list(centroids.shape)}. edkm.initial_centroids makes them."
        )
    groups, k, d = centroids.shape
    rows, cols = weight.shape
    if groups == 0 or d == 0 or rows == 0 or rows % (groups * d):
        raise ValueError(
            f"weight: {rows} rows do not divide into {groups} tables of vectors of {d} rows ({list(weight.shape)}). "
            "Choose rows_per_lut and dim that divide the rows, or skip the tensor."
        )
    n = rows * cols // (groups * d)
    if k > n:
        raise ValueError(
            f"weight: {k} centroids need at least {k} weights, got {n} in each of {groups} groups ({list(weight.shape)}). "
            "Use fewer bits or more rows per table, or skip the tensor."
        )
    if max_iters < 1:
        raise ValueError(f"max_iters: at least one iteration is needed, got {max_iters}.")
    if importance is not None:
        try:
            importance.expand(weight.shape)
        except RuntimeError:
            raise ValueError(
                f"importance: {list(importance.shape)} does not broadcast to the weight {list(weight.shape)}. [1, cols] weighs the columns."
            ) from None


def check_importance(importance: Tensor | None) -> None:
    if importance is not None and not bool(((importance >= 0) & importance.isfinite()).all()):
        raise ValueError("importance: must be finite and not negative. Mean squared inputs and squared gradients are.")


def _check_problem(importance: Tensor | None, temperature: Tensor, trajectory: Tensor) -> None:
    """Say which input made the centroids non-finite or the problem ill-posed."""
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature: must be positive, got {temperature.min().item():.6g}. It is in squared weight units.")
    check_importance(importance)
    if not bool(trajectory.isfinite().all()):
        raise ValueError(NOT_FINITE)


def _rounding(weight: Tensor, round_to: torch.dtype | None) -> torch.dtype | None:
    return round_to if weight.dtype.itemsize > 2 else None


class Solution(NamedTuple):
    """A solved weight: all that `decode` and `adjoint` need beside it."""

    trajectory: Tensor  # [iters + 1, g, k, d]
    importance: Tensor | None
    temperature: Tensor
    round_to: torch.dtype | None
    backend: str
    table: Any = None  # the backend's own

    def decode(self, weight: Tensor) -> Tensor:
        """The soft weight."""
        weight = weight.contiguous()
        module = _backend(self.backend, weight, self)
        return module.decode(weight, self.trajectory, self.temperature, _rounding(weight, self.round_to), self.table)

    def adjoint(self, grad: Tensor, weight: Tensor) -> Tensor:
        """`dL/dweight` from `dL/dout`."""
        weight = weight.contiguous()
        module = _backend(self.backend, weight, self)
        problem = (self.importance, self.trajectory, self.temperature, _rounding(weight, self.round_to))
        return module.adjoint(grad, weight, *problem, self.table)


def find(
    weight: Tensor,
    importance: Tensor | None,
    centroids: Tensor,
    temperature: Tensor,
    max_iters: int,
    tol: float,
    round_to: torch.dtype | None,
    backend: str,
) -> Solution:
    """Run the iterations; arguments as for `cluster`, temperature `[g]`. No gradient.

    Without `tol` nothing is read from the weight's device. Centroids of weights that are not finite are NaN.
    """
    weight, (groups, k, d) = weight.contiguous(), centroids.shape
    if backend == "auto":
        backend = choose_backend(weight, groups, k, d, round_to)[0]
    problem = (weight, importance, centroids, temperature, max_iters, _rounding(weight, round_to))
    if backend == "reference":
        trajectory, table = reference.cluster(*problem)[1], None
    else:
        blank = Solution(centroids.unsqueeze(0), importance, temperature, round_to, backend)
        trajectory, table = _backend(backend, weight, blank).solve(*problem)
    if tol > 0:
        moved = (trajectory[1:] - trajectory[:-1]).abs().amax((1, 2, 3))  # [max_iters]
        still = (moved <= tol).nonzero()
        trajectory = trajectory[: int(still[0]) + 2 if len(still) else max_iters + 1]
    return Solution(trajectory, importance, temperature, round_to, backend, table)


def check_backend(name: str, weight: Tensor, k: int, d: int, round_to: torch.dtype | None) -> None:
    """Refuse a backend that is not there or cannot cluster this weight."""
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend: {name!r} is not one of reference, {', '.join(BACKENDS)}, auto.")
    wide = weight.dtype.itemsize > 2 and (round_to is None or round_to.itemsize > 2)
    if name == "histogram" and (d > 1 or wide):
        raise ValueError(
            f"backend: histogram needs single values of 16 bits, got d={d}, {weight.dtype}, round_to={round_to}. "
            "Use blocks, or round_to=torch.bfloat16."
        )
    if name == "native" and not native.takes(weight.device, k, d):
        raise ValueError(
            f"backend: native needs a CPU, a C compiler, single values and at most {native.MOST_CENTROIDS} centroids, got "
            f"{weight.device.type}, {'a compiler' if native.available() else 'no compiler'}, d={d}, {k} centroids. Use auto."
        )


def _backend(name: str, weight: Tensor, solution: Solution):
    _, groups, k, d = solution.trajectory.shape
    check_backend(name, weight, k, d, solution.round_to)
    return BACKENDS[choose_backend(weight, groups, k, d, solution.round_to)[0] if name == "auto" else name]


@torch.library.custom_op("edkm::solve", mutates_args=())
def solve(
    weight: Tensor,
    importance: Tensor | None,
    centroids: Tensor,
    temperature: Tensor,
    max_iters: int,
    tol: float,
    round_to: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`(trajectory [max_iters + 1, g, k, d], iters)`; entries after `iters` repeat the last. No gradient."""
    path = find(weight, importance, centroids, temperature, max_iters, tol, round_to, backend).trajectory
    _check_problem(importance, temperature, path)
    trajectory = path[-1].repeat(max_iters + 1, 1, 1, 1)
    trajectory[: len(path)] = path
    return trajectory, torch.tensor(len(path) - 1)


@solve.register_fake
def _(weight, importance, centroids, temperature, max_iters, tol, round_to, backend):
    return centroids.new_empty(max_iters + 1, *centroids.shape), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("edkm::decode", mutates_args=())
def decode(
    weight: Tensor,
    importance: Tensor | None,
    trajectory: Tensor,
    iters: Tensor,
    temperature: Tensor,
    round_to: torch.dtype | None,
    backend: str,
) -> Tensor:
    """The soft weight for a trajectory of `solve`; its gradient is that of `solve` and `decode` together."""
    return Solution(trajectory[: int(iters) + 1], importance, temperature, round_to, backend).decode(weight)


@decode.register_fake
def _(weight, importance, trajectory, iters, temperature, round_to, backend):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("edkm::adjoint", mutates_args=())
def adjoint(
    grad: Tensor,
    weight: Tensor,
    importance: Tensor | None,
    trajectory: Tensor,
    iters: Tensor,
    temperature: Tensor,
    round_to: torch.dtype | None,
    backend: str,
) -> Tensor:
    """`dL/dweight` from `dL/dout`."""
    return Solution(trajectory[: int(iters) + 1], importance, temperature, round_to, backend).adjoint(grad, weight)


@adjoint.register_fake
def _(grad, weight, importance, trajectory, iters, temperature, round_to, backend):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    weight, importance, trajectory, iters, temperature, ctx.round_to, ctx.backend = inputs
    ctx.save_for_backward(weight, importance, trajectory, iters, temperature)


def _backward(ctx, grad: Tensor):
    return adjoint(grad, *ctx.saved_tensors, ctx.round_to, ctx.backend), None, None, None, None, None, None


decode.register_autograd(_backward, setup_context=_save)
