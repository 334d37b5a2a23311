"""Problems of `edkm.cluster`, small and random, and the backends that can solve them."""

import torch

import edkm
from edkm.core import native, reference

KINDS = ("normal", "repeated", "equal", "zeros", "subnormal", "far")
IMPORTANCE = ("none", "columns", "full", "zeros")
FAST = ("blocks", "histogram", "native")
ALL = ("reference", *FAST)


def make(groups=1, d=1, vectors=6, cols=10, k=4, *, kind="normal", importance="none", dtype=torch.float64, seed=0):
    """`(weight, centroids, temperature, importance, upstream gradient)`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = groups * d * vectors
    weight, centroids = normal(rows, cols), normal(groups, k, d)
    temperature = 0.1 + torch.rand(groups, generator=generator, dtype=torch.float64)
    if kind == "repeated":
        weight = (weight * 2).round() / 2
    elif kind == "equal":
        weight = torch.full_like(weight, 0.3)
    elif kind == "zeros":
        weight = weight.sign() * 0.0 * (weight.abs() < 0.7) + weight * (weight.abs() > 1.4)
    elif kind == "subnormal":
        weight = torch.where(weight.abs() < 0.5, weight * 1e-39, weight * 6e-8)
    elif kind == "far":
        centroids[:, -1] = 1000.0
    s = {
        "none": None,
        "columns": normal(1, cols).square(),
        "full": normal(rows, cols).square(),
        "zeros": normal(rows, cols).square() * (normal(rows, cols) > 0),
    }[importance]
    state = reference.compute_dtype(dtype)
    s = None if s is None else s.to(state)
    return weight.to(dtype), centroids.to(state), temperature.to(state), s, normal(rows, cols).to(dtype)


def run(problem, backend, round_to, max_iters=3):
    """`(out, centroids, weight gradient)`."""
    weight, centroids, temperature, importance, upstream = problem
    weight = weight.detach().clone().requires_grad_()
    result = edkm.cluster(
        weight,
        centroids,
        temperature=temperature,
        importance=importance,
        max_iters=max_iters,
        round_to=round_to,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(result.weight, weight, upstream)
    return result.weight.detach(), result.centroids, grad


def backends(groups, d, round_to):
    """Those that can cluster such a weight."""
    histogram = ["histogram"] if groups == d == 1 and round_to is not None else []
    return ["blocks", *histogram, *(["native"] if d == 1 and native.available() else [])]


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


W, C = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 4).view(1, 4, 1)
