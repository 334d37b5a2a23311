"""Clustering with tables of a shape, `c = B theta`:

1. every backend is equal to the reference to 1e-10 in float64, forward and backward, for rows, groups of rows and blocks of columns, and
   rounded in fewer bits, nearly hard assignments included; threads do not change a bit;
2. the reference's gradient is that of finite differences;
3. a step is the least squares in theta, and a group whose weights lie on one value, or have no importance, keeps its theta;
4. centroids beside the span are projected on it; a basis that is not that of a format is refused;
5. blocks of columns are rows of the reshaped weight, whatever the importance;
6. theta of each iteration is all that is kept beside the weight.
"""

import pytest
import torch

import edkm
from edkm.core import op, reference
from edkm.core.formats import FORMATS
from edkm.core.reference import Problem

BACKENDS = ("blocks", "native", "auto")
NAMES = ("q4_0", "iq4_nl", "tq2_0", "q2_k", "int4_g32", "nf4", "q8_0", "int8_row")
# rows, columns, groups, importance: a row each, groups of rows, one table, blocks of columns; more than a tile of the kernels holds
SHAPES = (
    ((4, 48, 4), "none"),
    ((6, 40, 3), "columns"),
    ((6, 40, 3), "full"),
    ((5, 64, 1), "columns"),
    ((3, 64, 12), "columns"),
    ((3, 64, 12), "rows"),
    ((5, 288, 45), "full"),
    ((2, 1100, 2), "columns"),
)


def make(name, shape, *, importance="columns", dtype=torch.float64, seed=0):
    rows, cols, groups = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    basis = FORMATS[name].basis(torch.float64)
    weight = normal(rows, cols)
    scale = weight.abs().max() / basis[:, -1].abs().max()
    theta = (0.8 + 0.4 * torch.rand(groups, basis.shape[1], generator=generator, dtype=torch.float64)) * scale
    if basis.shape[1] == 2:
        theta[:, 0] = -theta[:, 1] * basis[:, -1].mean()
    temperature = 0.1 + 0.2 * torch.rand(groups, generator=generator, dtype=torch.float64)
    weighing = {"none": None, "columns": normal(1, cols).square(), "rows": normal(rows, 1).square(), "full": normal(rows, cols).square()}
    parts = weight, (basis @ theta.unsqueeze(-1)), temperature, weighing[importance], normal(rows, cols), basis
    state = reference.compute_dtype(dtype)
    return parts[0].to(dtype), *(x if x is None else x.to(state) for x in parts[1:4]), parts[4].to(dtype), basis.to(state)


def run(problem, backend, iters=3, round_to=None):
    weight, centroids, temperature, importance, upstream, basis = problem
    weight = weight.detach().clone().requires_grad_()
    options = {"temperature": temperature, "importance": importance, "max_iters": iters, "round_to": round_to}
    result = edkm.cluster(weight, centroids, basis=basis, backend=backend, **options)
    (grad,) = torch.autograd.grad(result.weight, weight, upstream)
    return result.weight.detach(), result.centroids, result.theta, grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "importance"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_backends_equal_the_reference(name, shape, importance, backend):
    problem = make(name, shape, importance=importance)
    for iters in (1, 3):
        for found, expected in zip(run(problem, backend, iters), run(problem, "reference", iters), strict=True):
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("softness", [1.0, 0.01, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "backend"),
    # `blocks` loses three bits more to the distance of 255 entries from a weight.
    [(name, backend) for name in ("q4_0", "q4_1", "iq4_nl", "q8_0") for backend in BACKENDS if (name, backend) != ("q8_0", "blocks")],
)
def test_backends_are_the_reference_rounded_in_fewer_bits(name, backend, dtype, softness):
    """Nearly hard assignments included, whose gradients are differences of nearly equal numbers."""
    weight, centroids, temperature, importance, upstream, basis = make(name, (3, 64, 6), dtype=dtype)
    temperature *= softness
    wide = [x if x is None else x.double() for x in (weight, centroids, temperature, importance, upstream, basis)]
    narrow = weight, centroids, temperature, importance, upstream, basis
    for found, plain, truth in zip(run(narrow, backend), run(narrow, "reference"), run(wide, "reference"), strict=True):
        error, plain_error = ((x.double() - truth).norm() for x in (found, plain))
        assert error < 2 * plain_error + 10 * torch.finfo(found.dtype).eps * truth.norm()


@pytest.mark.parametrize("name", ["q4_0", "q2_k", "iq4_nl"])
def test_the_reference_passes_gradcheck(name):
    weight, centroids, temperature, importance, _, basis = make(name, (2, 12, 4))
    options = {"temperature": temperature, "importance": importance, "basis": basis, "round_to": None, "backend": "reference"}
    assert torch.autograd.gradcheck(lambda w: edkm.cluster(w, centroids, **options).weight, weight.requires_grad_())


@pytest.mark.parametrize("name", ["q4_0", "q2_k"])
def test_a_step_is_least_squares_in_theta(name):
    weight, centroids, temperature, importance, _, basis = make(name, (2, 40, 2))
    found = edkm.cluster(weight, centroids, basis=basis, temperature=temperature, importance=importance, max_iters=1, round_to=None).theta
    assignment = reference.soft_assignment(weight.unsqueeze(-1), centroids, temperature)  # [g, n, k]
    for g, theta in enumerate(found):
        root = (importance.T * assignment[g]).flatten().sqrt()
        inputs, wanted = basis.repeat(weight.shape[1], 1) * root[:, None], weight[g].repeat_interleave(len(basis)) * root
        assert torch.allclose(theta, torch.linalg.lstsq(inputs, wanted.unsqueeze(1)).solution.squeeze(1), rtol=1e-9)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["q4_0", "q2_k"])
def test_a_group_on_one_value_keeps_its_theta(name, backend):
    weight, centroids, temperature, *_, upstream, basis = make(name, (2, 40, 2), importance="none")
    weight[1] = 0.0 if name == "q4_0" else centroids[1, 2, 0]
    out, after, _, grad = run((weight, centroids, temperature * 1e-4, None, upstream, basis), backend)
    assert torch.allclose(after[1], centroids[1])
    assert not torch.allclose(after[0], centroids[0])
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["q4_0", "q2_k"])
def test_a_group_without_importance_keeps_its_theta(name, backend):
    weight, centroids, temperature, *_, upstream, basis = make(name, (2, 40, 2), importance="none")
    importance = torch.ones_like(weight)
    importance[1] = 0
    out, after, _, grad = run((weight, centroids, temperature, importance, upstream, basis), backend)
    assert torch.allclose(after[1], centroids[1]) and not torch.allclose(after[0], centroids[0])
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("backend", ["blocks", "native"])
@pytest.mark.parametrize("name", ["q4_0", "int4_g32", "nf4"])
def test_threads_do_not_change_a_bit(name, backend):
    problem, before, results = make(name, (256, 480, 3840), dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(problem, backend, 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in results[1:] for a, b in zip(results[0], others, strict=True))


def test_centroids_beside_the_span_are_projected_on_it():
    weight, centroids, temperature, importance, _, basis = make("q2_k", (2, 40, 2))
    away = torch.tensor([1.0, -3.0, 3.0, -1.0], dtype=torch.float64).view(1, 4, 1)  # orthogonal to ones and to 0, 1, 2, 3
    options = {"basis": basis, "temperature": temperature, "importance": importance}
    found, same = (edkm.cluster(weight, c, **options).weight for c in (centroids + away, centroids))
    assert torch.allclose(found, same)
    for wrong in (basis[:3], basis.flip(0), torch.cat([basis, basis], 1), basis * 2):
        with pytest.raises(ValueError, match=r"basis: expected \[4, 1\], the ascending values of a format"):
            edkm.cluster(weight, centroids, **{**options, "basis": wrong})


@pytest.mark.parametrize("importance", ["none", "columns", "rows", "full"])
def test_blocks_of_columns_are_rows_of_the_reshaped_weight(importance):
    weight, centroids, temperature, s, upstream, basis = make("q4_0", (3, 64, 12), importance=importance)
    rows = None if s is None else s.expand(3, 64).reshape(12, 16)
    in_blocks = weight.reshape(12, 16), centroids, temperature, rows, upstream.reshape(12, 16), basis
    for found, expected in zip(run((weight, centroids, temperature, s, upstream, basis), "auto"), run(in_blocks, "auto"), strict=True):
        assert torch.allclose(found.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


def test_blocks_of_free_tables_are_rows_of_the_reshaped_weight():
    weight, centroids, temperature, *_ = make("q2_k", (3, 64, 12))
    found, expected = (edkm.cluster(w, centroids, temperature=temperature).weight for w in (weight, weight.reshape(12, 16)))
    assert torch.equal(found, expected.view(3, 64))


def test_a_trajectory_holds_theta_alone():
    weight, centroids, temperature, importance, _, basis = make("q4_0", (3, 64, 12), dtype=torch.float32)
    theta = torch.linalg.pinv(basis) @ centroids
    problem = Problem(temperature, importance.view(4, 16), None, basis)
    solution = op.solve(weight.view(12, 16), theta, problem, 3, "blocks")
    assert solution.trajectory.shape == (4, 12, 1, 1)
