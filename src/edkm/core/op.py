"""Cluster a weight: `solve`, the one entry, and `edkm.cluster`, the same as a differentiable function.

`solve(weight, centroids, problem, iters, backend)` runs the iterations and returns a `Solution`, which decodes the weight and turns
`dL/dout` into `dL/dweight`. Layers use it directly, ranks of a process group through `sharded.solve`. The gradient of the whole function,
centroid path included, needs the live weight and the centroids of each iteration: nothing else is kept.

    backend    computes                                         takes
    native     `blocks` in C                                    a CPU with a compiler, single values; up to 64 centroids without a basis
    triton     `blocks` in Triton                               a GPU, up to 64 centroids, single values
    histogram  on distinct 16-bit values                        any device, one table for the weight: embeddings, `rows_per_lut=0`
    blocks     in torch                                         everything: no compiler or Triton, more centroids, vectors
    reference  in plain torch, differentiated by autograd       everything; it is the specification
    hard       the limit for temperature 0, straight through    everything

`auto` takes the one that costs least by `choose_backend`, never `reference`, and `hard` at temperature 0. All but `reference` are modules
with three functions. Backends differ by the rounding of sums in the last digits.

    solve(weight, centroids, problem, iters) -> (trajectory [iters + 1, g, k, d], kept)      with a basis theta, [..., g, p, 1]
    decode(weight, trajectory, problem, kept, dtype) -> out, like weight in that dtype
    adjoint(grad, weight, trajectory, problem, kept=None) -> dL/dweight, like weight

`kept` is a backend's own, small, and may be None; layers hold it within an optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edkm.core import blocks, cuda, hard, histogram, native, reference
from edkm.core.reference import NOT_FINITE, Problem, compute_dtype, importance_in_blocks, in_blocks, normal_inverse, table_shape

BACKENDS = {"histogram": histogram, "blocks": blocks, "native": native, "triton": cuda}
_MODULES = {**BACKENDS, "hard": hard}

# Measured on a CPU, forward and backward, in ns (benchmarks op): an entry of A in `blocks` and in `native`, a weight of a histogram.
# `triton` counts as `blocks` beside a histogram: neither was measured on a GPU.
_NS_PER_ENTRY = 16.0
_NS_PER_NATIVE_ENTRY = 2.3
_NS_PER_WEIGHT = 8.0


def solve(weight: Tensor, centroids: Tensor, problem: Problem, iters: int, backend: str) -> Solution:
    """Run the iterations, without gradient. Reads nothing from the weight's device; centroids of weights that are not finite are NaN.

    Args:
        weight: `[rows, cols]`, detached.
        centroids: `[g, k, d]` in the compute dtype of the weight, where to start; theta `[g, p, 1]` if the problem has a basis.
        backend: one of `BACKENDS`, which can cluster this weight (`pick_backend`); or `hard`, for temperature 0.
    """
    problem = problem.for_weight(weight)
    trajectory, kept = _MODULES[backend].solve(weight.contiguous(), centroids, problem, iters)
    return Solution(trajectory, problem, backend, kept)


class Solution(NamedTuple):
    """The centroids found for a weight, and the problem that they solve.

    Attributes:
        trajectory: `[iters + 1, g, k, d]`, the centroids before the first and after every iteration; of theta with a basis.
    """

    trajectory: Tensor
    problem: Problem
    backend: str
    kept: Any = None

    def decode(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The soft weight, in the dtype of the weight if no other is given."""
        return _MODULES[self.backend].decode(weight.contiguous(), self.trajectory, self.problem, self.kept, dtype or weight.dtype)

    def adjoint(self, grad: Tensor, weight: Tensor) -> Tensor:
        """`dL/dweight` from `dL/dout`."""
        return _MODULES[self.backend].adjoint(grad, weight.contiguous(), self.trajectory, self.problem, self.kept)


class Clustered(NamedTuple):
    """Result of `cluster`.

    Attributes:
        weight: `[rows, cols]`, dtype of the input, differentiable: the softly clustered weight.
        centroids: `[g, k, d]`, detached: the centroids after the last iteration, the start of the next step.
        theta: `[g, p]`, detached, with a basis: `centroids = basis theta`.
    """

    weight: Tensor
    centroids: Tensor
    theta: Tensor | None = None


def cluster(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: Tensor | float,
    importance: Tensor | None = None,
    max_iters: int = 3,
    round_to: torch.dtype | None = torch.bfloat16,
    basis: Tensor | None = None,
    backend: str = "auto",
) -> Clustered:
    """Differentiable k-means: replace every weight by its soft centroid and improve the centroids on the way.

    DKM (arXiv:2108.12659) with importance weights; `core/reference.py` states the equations. Gradients reach `weight` through the
    assignment and through every centroid update.

    Args:
        weight: `[rows, cols]`, float32, bfloat16, float16 or float64.
        centroids: `[g, k, d]` float32 (float64 with a float64 weight), where to start; gets no gradient. Consecutive rows are split
            evenly over the `g` tables; of more tables than rows each has a block of consecutive columns of a row. `d > 1` clusters
            vectors of `d` consecutive values along the rows.
        temperature: scalar or `[g]`, > 0, in squared weight units. The number 0 puts every weight on its nearest centroid, and the
            gradient passes straight through; `backend` must be `auto`.
        importance: None, or non-negative and broadcastable to `weight`; a vector takes the mean over its values.
        max_iters: iterations, at least 1.
        round_to: 16-bit dtype that a wider weight is rounded to first, straight-through, whatever the backend; None keeps full
            width, which rules `histogram` out.
        basis: None for free tables; or float `[k, p]`, for tables with a shape, `centroids = basis theta` (formats.py). Its columns are
            the values of a format, ascending, and before them ones if there is an offset. `centroids` that are not in its span are
            projected on it, each entry with equal weight.
        backend: `reference`, `histogram`, `blocks`, `native`, `triton`, or `auto` (see `choose_backend`).

    Returns:
        `Clustered(weight, centroids, theta)`.

    Raises:
        ValueError: shapes that do not divide, more centroids than weights, non-finite weights, a temperature that is not
            positive, negative importance, an unknown or impossible backend.

    Cost:
        Kept for backward: the weight itself (no copy), `max_iters + 1` times the centroids, or theta. Passes over the weight: `histogram` 2
        forward and 3 backward; the others `max_iters + 1` forward, `max_iters` to `2 max_iters` backward.
        `reference` keeps `O(max_iters n k)`.
    """
    check_shapes(weight, centroids, importance, max_iters, free=basis is None)
    start = centroids.detach()
    tau = torch.as_tensor(temperature, dtype=start.dtype, device=weight.device).detach().expand(len(start))
    importance = importance_in_blocks(None if importance is None else importance.detach(), weight.shape, len(start))
    if basis is not None:
        basis = basis.detach().to(start)
        check_basis(basis, start)
        start = normal_inverse(torch.ones_like(start[..., 0]), basis)[0] @ (basis.mT @ start)
    matrix = in_blocks(weight, len(start))
    if backend == "auto" and isinstance(temperature, (int, float)) and temperature == 0:
        backend = "hard"
    if backend == "reference":
        out, trajectory = reference.cluster(matrix, start, Problem(tau, importance, round_to, basis), max_iters)
        _check_problem(importance, tau, trajectory.detach())
    else:
        out, trajectory = _cluster(matrix, importance, start, tau, basis, max_iters, round_to, backend)
    found = trajectory[-1].detach()
    return Clustered(out.view(weight.shape), reference.entries(found, basis), None if basis is None else found.squeeze(-1))


@torch.library.custom_op("edkm::cluster", mutates_args=())
def _cluster(
    weight: Tensor,
    importance: Tensor | None,
    centroids: Tensor,
    temperature: Tensor,
    basis: Tensor | None,
    iters: int,
    round_to: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute `(soft weight, trajectory)`; a custom op, so that torch.compile calls it as it is."""
    if backend != "hard":
        backend, _ = pick_backend(backend, weight, table_shape(centroids, basis), round_to, shaped=basis is not None)
    solution = solve(weight, centroids, Problem(temperature, importance, round_to, basis), iters, backend)
    _check_problem(importance, None if backend == "hard" else temperature, solution.trajectory)
    return solution.decode(weight), solution.trajectory


@_cluster.register_fake
def _(weight, importance, centroids, temperature, basis, iters, round_to, backend):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), centroids.new_empty(iters + 1, *centroids.shape)


@torch.library.custom_op("edkm::cluster_adjoint", mutates_args=())
def _cluster_adjoint(
    grad: Tensor,
    weight: Tensor,
    importance: Tensor | None,
    trajectory: Tensor,
    temperature: Tensor,
    basis: Tensor | None,
    round_to: torch.dtype | None,
    backend: str,
) -> Tensor:
    """Compute `dL/dweight` from `dL/dout`."""
    backend, _ = pick_backend(backend, weight, table_shape(trajectory[0], basis), round_to, shaped=basis is not None)
    problem = Problem(temperature, importance, round_to, basis).for_weight(weight)
    return Solution(trajectory, problem, backend).adjoint(grad, weight)


@_cluster_adjoint.register_fake
def _(grad, weight, importance, trajectory, temperature, basis, round_to, backend):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    weight, importance, _, temperature, basis, _, ctx.round_to, ctx.backend = inputs
    ctx.save_for_backward(weight, importance, output[1], temperature, basis)


def _backward(ctx, grad: Tensor, _):
    if ctx.backend != "hard":  # an operator may not return what it was given
        grad = _cluster_adjoint(grad, *ctx.saved_tensors, ctx.round_to, ctx.backend)
    return grad, *[None] * 7


_cluster.register_autograd(_backward, setup_context=_save)


def choose_backend(
    weight: Tensor, groups: int, k: int, d: int, round_to: torch.dtype | None, device: torch.device | None = None, *, shaped: bool = False
) -> tuple[str, str]:
    """Choose the fastest backend for a weight `[rows, cols]`, as `auto` does.

    `device` is where it will be, if not where it is; `shaped`: its tables have a basis. Compares the entries of A that each would compute,
    plus the cost per weight of a histogram. Shape, dtype and device decide, not the
    values: the choice is the same in every step and in a resumed run, and costs nothing.

    Returns:
        `(backend, reason)`.
    """
    device, n = device or weight.device, weight.numel()
    if native.takes(device, k, d, shaped=shaped):
        costs = {n * k * _NS_PER_NATIVE_ENTRY: ("native", f"{k} centroids, on a CPU with a compiler")}
    elif device.type == "cuda" and cuda.takes(device, k, d, shaped=shaped):
        costs = {n * k * _NS_PER_ENTRY: ("triton", f"{k} centroids, on a GPU with Triton")}
    else:
        one = "weights wider than 16 bits" if _no_histogram(weight, groups, d, round_to) else f"{k} centroids for {n:,} weights"
        why = f"vectors of {d} values" if d > 1 else f"{groups} tables" if groups > 1 else one
        costs = {n * k * _NS_PER_ENTRY: ("blocks", why)}
    if not _no_histogram(weight, groups, d, round_to):
        distinct = min(n, histogram.usual_values(device))
        cost = distinct * k * _NS_PER_ENTRY + n * _NS_PER_WEIGHT
        costs[cost] = "histogram", f"one table of {k} centroids, about {distinct:,} distinct values in {n:,} weights"
    return costs[min(costs)]


def pick_backend(
    name: str,
    weight: Tensor,
    shape: Sequence[int],
    round_to: torch.dtype | None,
    device: torch.device | None = None,
    *,
    shaped: bool = False,
) -> tuple[str, str]:
    """Resolve the name of a backend as `(backend, reason)`: `choose_backend` for `auto`; refuse an unknown or impossible one.

    Args:
        shape: of the centroids, `(g, k, d)`.
        shaped: the tables have a basis.
    """
    groups, k, d = shape
    if name == "auto":
        return choose_backend(weight, groups, k, d, round_to, device, shaped=shaped)
    device = device or weight.device
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}, auto; edkm.cluster takes reference, too.")
    if name == "histogram" and (why := _no_histogram(weight, groups, d, round_to)):
        raise ValueError(f"backend: histogram needs one table of single 16-bit values, got {why}. Use auto.")
    if name == "native" and not native.takes(device, k, d, shaped=shaped):
        raise ValueError(
            f"backend: native needs a CPU, a C compiler, single values and at most {native.MOST_CENTROIDS} centroids, got "
            f"{device.type}, {'a compiler' if native.available() else 'no compiler'}, d={d}, {k} centroids. Use auto."
        )
    if name == "triton" and not cuda.takes(device, k, d, shaped=shaped):
        raise ValueError(
            f"backend: triton needs a GPU of compute capability 8.0, Triton, single values and at most {cuda.MOST_CENTROIDS} centroids, "
            f"got {device.type}, {'Triton' if cuda.installed() else 'no Triton'}, d={d}, {k} centroids. Use auto."
        )
    return name, "as asked"


def _no_histogram(weight: Tensor, groups: int, d: int, round_to: torch.dtype | None) -> str | None:
    """Tell why a weight has no histogram; None if it has."""
    if groups > 1 or d > 1:
        return f"{groups} tables, d={d}"
    wide = weight.dtype.itemsize > 2 and (round_to is None or round_to.itemsize > 2)
    return f"{weight.dtype}, round_to={round_to}" if wide else None


def check_shapes(weight: Tensor, centroids: Tensor, importance: Tensor | None, max_iters: int = 1, *, free: bool = True) -> None:
    """Refuse what cannot be clustered, by shape and dtype alone; free tables need as many weights as they have entries."""
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
    blocks = d == 1 and rows and groups > rows and groups % rows == 0 and cols % (groups // rows) == 0
    if not blocks and (groups == 0 or d == 0 or rows == 0 or rows % (groups * d)):
        raise ValueError(
            f"weight: {rows} rows do not divide into {groups} tables of vectors of {d} rows ({list(weight.shape)}). "
            "Choose rows_per_lut and dim that divide the rows, or skip the tensor."
        )
    n = rows * cols // (groups * d)
    if free and k > n:
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


def check_basis(basis: Tensor, centroids: Tensor) -> None:
    """Refuse a basis that is not that of a format with the table's size."""
    groups, k, d = centroids.shape
    fits = basis.ndim == 2 and basis.shape[0] == k and basis.shape[1] in (1, 2) and d == 1 and k > 1
    if not fits or not bool((basis[1:, -1] > basis[:-1, -1]).all()) or not bool((basis[:, :-1] == 1).all()):
        raise ValueError(
            f"basis: expected [{k}, 1], the ascending values of a format, or [{k}, 2], ones and these values, for centroids "
            f"[{groups}, {k}, 1], got {list(basis.shape)} for {list(centroids.shape)}. Format.basis of edkm.core.formats makes them."
        )


def check_importance(importance: Tensor | None) -> None:
    """Refuse importance that is negative or not finite."""
    if importance is not None and not bool(((importance >= 0) & importance.isfinite()).all()):
        raise ValueError("importance: must be finite and not negative. Mean squared inputs and squared gradients are.")


def _check_problem(importance: Tensor | None, temperature: Tensor | None, trajectory: Tensor) -> None:
    """Refuse a problem that is ill-posed, or whose centroids are not finite. Reads from the device."""
    if temperature is not None and not bool((temperature > 0).all()):
        raise ValueError(f"temperature: must be positive, got {temperature.min().item():.6g}. It is in squared weight units.")
    check_importance(importance)
    if not bool(trajectory.isfinite().all()):
        raise ValueError(f"weight: {NOT_FINITE}")
