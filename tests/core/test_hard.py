"""Clustering by hard assignment, at temperature 0:

1. it is the limit of the reference for small temperatures, for tables, vectors and tables with a shape, in centroids and output;
2. the gradient passes straight through;
3. the kernels and the loops without a compiler agree, and so do blocks of any size;
4. tables need not be ascending;
5. ranks that share rows find what one finds alone;
6. layers of softness 0 train with it.
"""

import pytest
import torch
from problems import make

import edkm
from edkm.core import hard, native, op, reference, sharded
from edkm.core.formats import FORMATS
from edkm.core.reference import Problem

FORMS = ("q4_0", "q4_1", "nf4", "q8_0", "int8_row")
TABLES = [
    # groups, d, rows of vectors, columns, k, importance
    (1, 1, 6, 40, 8, "none"),
    (6, 1, 1, 60, 16, "columns"),
    (3, 1, 2, 33, 5, "full"),
    (2, 2, 3, 30, 4, "columns"),
    (1, 3, 2, 40, 4, "full"),
]


def in_format(name, *, rows=6, block=32, dtype=torch.float64):
    """Weights, theta and a problem whose importance is repeated over the rows."""
    torch.manual_seed(0)
    basis = FORMATS[name].basis(torch.float64)
    weight, importance = torch.randn(rows, block, dtype=torch.float64), torch.rand(2, block, dtype=torch.float64)
    theta = (0.8 + 0.4 * torch.rand(rows, basis.shape[1], 1, dtype=torch.float64)) * weight.abs().max() / basis[:, -1].abs().max()
    if basis.shape[1] == 2:
        theta[:, 0] = -theta[:, 1] * basis[:, -1].mean()
    state = reference.compute_dtype(dtype)
    problem = Problem(torch.full((rows,), 1e-9, dtype=state), importance.to(state), None, basis.to(state))
    return weight.to(dtype), theta.to(state), problem


@pytest.fixture(params=[True, False], ids=["compiled", "not compiled"])
def compiler(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(native, "available", lambda: False)


def is_the_limit(weight, start, problem, iters=3):
    found = op.solve(weight, start, problem, iters, "hard")
    out, trajectory = reference.cluster(weight, start, problem, iters)
    torch.testing.assert_close(found.trajectory, trajectory, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.decode(weight), out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("groups", "d", "vectors", "cols", "k", "importance"), TABLES)
def test_tables_are_the_limit_of_the_reference(compiler, groups, d, vectors, cols, k, importance):
    weight, centroids, _, importance, _ = make(groups, d, vectors, cols, k, importance=importance)
    is_the_limit(weight, centroids, Problem(centroids.new_full((groups,), 1e-9), importance, None))


@pytest.mark.parametrize("name", FORMS)
def test_formats_are_the_limit_of_the_reference(compiler, name):
    is_the_limit(*in_format(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["table", *FORMS])
def test_fewer_bits_are_rounded(compiler, name, dtype):
    if name == "table":
        weight, start, _, importance, _ = make(4, 1, 1, 40, 8, dtype=dtype, importance="columns")
        problem = Problem(torch.ones(4), importance, None)
    else:
        weight, start, problem = in_format(name, dtype=dtype)
    wide = problem._replace(**{k: x.double() for k, x in problem._asdict().items() if x is not None})
    found, truth = op.solve(weight, start, problem, 2, "hard"), op.solve(weight.double(), start.double(), wide, 2, "hard")
    torch.testing.assert_close(found.trajectory.double(), truth.trajectory, rtol=1e-5, atol=1e-6)
    decoded = found.decode(weight)
    assert decoded.dtype == dtype
    error = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(decoded.double(), truth.decode(weight.double()), rtol=error, atol=error)


@pytest.mark.parametrize("name", ["table", "q4_0"])
def test_the_gradient_passes_straight_through(name):
    weight, theta, problem = in_format("q4_0")
    free = theta.new_tensor([-1.0, -0.3, 0.2, 1.0]).view(1, 4, 1).repeat(6, 1, 1)
    start, basis = (free, None) if name == "table" else (problem.basis @ theta, problem.basis)
    leaf, upstream = weight.clone().requires_grad_(), torch.randn_like(weight)
    result = edkm.cluster(leaf, start, temperature=0, max_iters=2, basis=basis, round_to=None)
    (grad,) = torch.autograd.grad(result.weight, leaf, upstream)
    assert torch.equal(grad, upstream)
    small = edkm.cluster(weight, start, temperature=1e-9, max_iters=2, basis=basis, round_to=None)
    torch.testing.assert_close(result.weight.detach(), small.weight)
    torch.testing.assert_close(result.centroids, small.centroids)


@pytest.mark.parametrize("d", [1, 2])
def test_blocks_of_any_size(monkeypatch, d):
    weight, centroids, _, importance, _ = make(2, d, 9, 20, 4, importance="full")
    problem, results = Problem(centroids.new_ones(2), importance, None), []
    for entries in (1 << 18, 50, 1):
        monkeypatch.setattr(hard, "_BLOCK_ENTRIES", entries)
        solution = op.solve(weight, centroids, problem, 2, "hard")
        results.append((solution.trajectory, solution.decode(weight)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_tables_need_not_be_ascending(compiler):
    weight, centroids, _, importance, _ = make(3, 1, 2, 40, 8, importance="columns")
    problem, order = Problem(centroids.new_ones(3), importance, None), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    sorted_, mixed = (op.solve(weight, c, problem, 2, "hard") for c in (centroids, centroids[:, order]))
    assert torch.equal(sorted_.trajectory[:, :, order], mixed.trajectory)
    assert torch.equal(sorted_.decode(weight), mixed.decode(weight))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shaped", [False, True])
def test_a_rank_alone_finds_what_all_find(groups, shaped):
    """As one rank of one: the pieces of a table are added up as those of the whole."""
    weight, theta, problem = in_format("q4_0")
    basis = problem.basis if shaped else None
    start = theta[:groups] if shaped else torch.linspace(-2, 2, 5, dtype=torch.float64).view(1, 5, 1).repeat(groups, 1, 1)
    problem = Problem(problem.temperature[:groups], problem.importance, None, basis)
    found = sharded.solve(sharded.Rows(weight, 0, len(weight)), start, problem, 2, "hard", lambda x: x)
    torch.testing.assert_close(found.trajectory, op.solve(weight, start, problem, 2, "hard").trajectory, rtol=1e-12, atol=1e-12)


def test_layers_of_softness_0_train_with_it():
    model = torch.nn.Sequential(torch.nn.Linear(32, 6), torch.nn.Linear(6, 6))
    edkm.prepare(model, edkm.ClusterConfig(bits=2, softness=0.0, rows_per_lut=1))
    assert {m.choice for m in model.modules() if hasattr(m, "choice")} == {("hard", "softness 0")}
    weight = model[0].weight
    x = torch.randn(5, 32)
    model[:1](x).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(6, 32), rtol=1e-5)
