"""Cluster on a GPU in Triton: the equations of `blocks` for single values and at most 64 centroids, without A in memory.

A program takes a table through all iterations: one launch for `solve`, one for `decode`, one for `adjoint`. It reads its rows in every
iteration: a table of a few rows stays in the caches. Few tables of many rows would leave most of the GPU idle: a program then takes some of
the rows in one iteration, and torch adds the programs' sums up, in a fixed order. Nothing is read back in either way, and the same GPU
gives the same bits.

Tables with a shape have kernels of their own, in gpuformats.py, for small groups. Under `TRITON_INTERPRET=1` the kernels run on a CPU,
which is how the tests check them.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edkm.core import blocks
from edkm.core.blocks import Points, update_adjoint
from edkm.core.reference import Problem, importance_rows, spread_importance, update_centroids

MOST_CENTROIDS = 64
# So many warps fill a GPU. All sizes here are the same on every GPU: sums are added in the same order.
_ENOUGH_WARPS = 2048
# Weights of a warp where a program takes a part of a table.
_WEIGHTS_PER_WARP = 1 << 12


# The three functions that every backend has; op.py documents them.


def solve(weight: Tensor, centroids: Tensor, problem: Problem, iters: int, *, hard: bool = False) -> tuple[Tensor, None]:
    trajectory = centroids.repeat(iters + 1, 1, 1, 1)
    if problem.basis is not None:
        call = _Shaped(weight, centroids, problem, hard=hard)
        call("solve", *call.points, trajectory, call.temperature, call.values, iters)
        return trajectory, None
    call = _Call(weight, centroids, problem)
    if call.whole_tables:
        call.on_tables("solve", *call.points, trajectory, call.temperature, iters)
    else:
        for t in range(iters):
            trajectory[t + 1] = update_centroids(call.sums(trajectory[t]), trajectory[t])
    return trajectory, None


def sums(weight: Tensor, centroids: Tensor, problem: Problem) -> Tensor:
    """Mass and weighted sum of every centroid in one iteration, `[g, k, 2]`: for `update_centroids`."""
    if problem.basis is not None:
        return blocks.sums(Points.of(weight, problem, *centroids.shape), centroids)
    return _Call(weight, centroids, problem).sums(centroids)


def decode(
    weight: Tensor, trajectory: Tensor, problem: Problem, kept: None = None, dtype: torch.dtype | None = None, *, hard: bool = False
) -> Tensor:
    problem = problem._replace(importance=None)
    out = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    if problem.basis is not None:
        call = _Shaped(weight, trajectory[-1], problem, hard=hard)
        call("decode", call.points[0], trajectory[-2], trajectory[-1], call.temperature, call.values, out)
        return out
    call = _Call(weight, trajectory[-1], problem)
    call.on_parts("decode", call.points[0], trajectory[-2], trajectory[-1], call.temperature, out)
    return out


def adjoint(grad: Tensor, weight: Tensor, trajectory: Tensor, problem: Problem, kept: None = None) -> Tensor:
    grad, iters = grad.contiguous(), len(trajectory) - 1
    # Sums over iterations are made in the compute dtype.
    dtype = weight.dtype if iters == 1 else trajectory.dtype
    dw = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    if problem.basis is not None:
        call = _Shaped(weight, trajectory[-1], problem)
        call("adjoint", *call.points, grad, dw, trajectory, call.temperature, call.values, iters)
        return dw.to(weight.dtype)
    call = _Call(weight, trajectory[-1], problem)
    if call.whole_tables:
        call.on_tables("adjoint", *call.points, grad, dw, trajectory, call.temperature, iters, once=iters == 1)
    else:
        gc = None
        for t in range(iters, 0, -1):
            gc = call.reverse(grad, dw, trajectory[t - 1], trajectory[t], gc)
    return dw.to(weight.dtype)


def takes(device: torch.device, k: int, d: int, *, shaped: bool = False) -> bool:
    """Whether this backend can cluster a weight on this device, or on such a device if there is none here; with a basis, any entries."""
    if (k > MOST_CENTROIDS and not shaped) or d > 1 or not installed():
        return False
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)  # older ones lack bfloat16
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    return find_spec("triton") is not None


class _Call:
    """A weight `[rows, cols]` as the kernels see it: contiguous."""

    def __init__(self, weight: Tensor, centroids: Tensor, problem: Problem) -> None:
        temperature, importance, self.round_to, _ = problem
        self.temperature = temperature.contiguous()
        self.groups, self.k = centroids.shape[:2]
        rows, cols = weight.shape
        self.shape = rows // self.groups, cols
        stride = 0
        if importance is not None:
            rows_of_it = importance_rows(importance, weight.shape)
            stride = 0 if len(rows_of_it) == 1 else cols
            importance = (rows_of_it if len(rows_of_it) in (1, rows) else spread_importance(rows_of_it, weight.shape)).contiguous()
        self.points = weight.contiguous(), importance, stride
        # The fewer tables, the more warps take each.
        self.warps = 1 if self.k > 16 else 8 if self.groups < 512 else 4 if self.groups < 2048 else 2
        self.warps_of_part = min(self.warps, 4)
        self.per_part = max(1, min(self.shape[0], self.warps_of_part * _WEIGHTS_PER_WARP // cols))
        self.parts = -(-self.shape[0] // self.per_part)
        self.whole_tables = self.parts == 1 or self.groups * self.warps >= _ENOUGH_WARPS

    def sums(self, centroids: Tensor, grad: Tensor | None = None, *, adjoint: bool = False) -> Tensor:
        """Compute `_sums` of the kernels, `[g, k, 2]`."""
        out = self.temperature.new_empty(self.groups, self.parts, self.k, 2)
        arguments = *self.points, self.points[0] if grad is None else grad, centroids, self.temperature, out
        self.on_parts("sums", *arguments, adjoint=adjoint, last=grad is not None)
        return out.sum(1)

    def reverse(self, grad: Tensor, dw: Tensor, centroids: Tensor, after: Tensor, gc: Tensor | None) -> Tensor:
        """Reverse an iteration, the last if there is no `gc` yet: add to `dw`, return dL/dc `[g, k, 1]`."""
        mass, moment = self.sums(centroids, grad if gc is None else None, adjoint=True).unbind(-1)
        h, stay = update_adjoint(moment.unsqueeze(-1) if gc is None else gc, mass)
        share = self.temperature.new_empty(self.groups, self.parts, self.k, 1)
        self.on_parts("gradients", *self.points, grad, dw, centroids, after, h.contiguous(), self.temperature, share, last=gc is None)
        return stay + share.sum(1)

    def on_parts(self, name: str, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel that takes parts of tables."""
        sizes = self.parts, self.per_part, *self.shape
        self._launch(name, self.groups * self.parts, self.warps_of_part, *arguments, *sizes, **constants)

    def on_tables(self, name: str, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel that takes whole tables."""
        sizes = self.groups, *self.shape
        self._launch(name, self.groups, self.warps, *arguments, *sizes, **constants, floor=torch.finfo(self.temperature.dtype).eps ** 2)

    def _launch(self, name: str, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
        from edkm.core import gpukernels  # Triton is not everywhere

        constants |= gpukernels.constants(self.round_to, self.k, warps)
        _launch(gpukernels, name, programs, self.temperature, *arguments, **constants)


class _Shaped:
    """A weight in groups with tables of a shape, as the kernels see it: contiguous."""

    def __init__(self, weight: Tensor, theta: Tensor, problem: Problem, *, hard: bool = False) -> None:
        assert problem.basis is not None
        self.temperature, self.values = problem.temperature.contiguous(), problem.basis[:, -1].contiguous()
        importance = None if problem.importance is None else importance_rows(problem.importance, weight.shape).contiguous()
        self.points = weight.contiguous(), importance, 1 if importance is None else importance.numel()  # repeated after so many
        self.sizes = len(theta), weight.numel() // len(theta)
        self.options = {"round_to": problem.round_to, "p": theta.shape[1], "hard": hard}

    def __call__(self, name: str, *arguments: Any) -> None:
        from edkm.core import gpuformats  # Triton is not everywhere

        options = gpuformats.constants(self.options["round_to"], self.values, self.sizes[1], self.options["p"], hard=self.options["hard"])
        _launch(gpuformats, name, -(-self.sizes[0] // options["several"]), self.values, *arguments, *self.sizes, **options)


def _launch(kernels: ModuleType, name: str, programs: int, beside: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start programs of a kernel on the device of a tensor."""
    with torch.cuda.device_of(beside):  # Triton launches on the current one
        getattr(kernels, name)[(programs,)](*arguments, **constants)
