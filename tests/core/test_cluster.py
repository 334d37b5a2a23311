"""Results of `edkm.cluster`:

1. every backend computes the reference to 1e-10 in float64, output, centroids and gradient, for any shape, in any blocks;
2. the reference is differentiated right (gradcheck), and a centroid without mass hands its gradient on;
3. in 16 bits the error is at most twice that of plain PyTorch, in float32 a few units in the last place;
4. permuted and scaled weights give permuted and scaled results, groups are independent, and strides do not matter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ALL, FAST, IMPORTANCE, KINDS, backends, distance, make, run

import edkm
from edkm.core import blocks, histogram, op, reference


def assert_same(problem, backend, round_to, max_iters=3):
    """Largest difference from the reference against the largest entry (of the gradient: or of the upstream one)."""
    got, expected = (run(problem, b, round_to, max_iters) for b in (backend, "reference"))
    scales = [
        expected[0].abs().max(),
        expected[1].abs().max(),
        expected[2].abs().max().maximum(problem[4].abs().max()),
    ]
    for name, a, b, scale in zip(("out", "centroids", "gradient"), got, expected, scales):
        assert a.isfinite().all(), name
        error = ((a - b).abs().max() / scale).item() if scale > 0 else float((a - b).abs().max())
        assert error <= 1e-10, f"{name} of {backend}: {error:.3g}"


def tiny_blocks(monkeypatch, entries=40, block=24):
    monkeypatch.setattr(blocks, "block_entries", lambda device: entries)
    monkeypatch.setattr(histogram, "BLOCK_WEIGHTS", block)


# Identity with the reference.


@pytest.mark.parametrize("round_to", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("kind, importance", [*(("normal", s) for s in IMPORTANCE), *((kind, "full") for kind in KINDS[1:])])
@pytest.mark.parametrize("groups, d", [(1, 1), (3, 1), (1, 2), (3, 2), (2, 3)])
def test_equals_reference(groups, d, kind, importance, round_to):
    problem = make(groups, d, kind=kind, importance=importance, seed=groups + 10 * d)
    for backend in backends(groups, d, round_to):
        assert_same(problem, backend, round_to)


@pytest.mark.parametrize("max_iters", [1, 2, 3, 4])
@pytest.mark.parametrize("groups, d", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_equals_reference_in_many_blocks(groups, d, importance, max_iters, monkeypatch):
    tiny_blocks(monkeypatch)
    problem = make(groups, d, vectors=7, cols=9, importance=importance, seed=3)
    assert len(blocks.cut(groups, 7, 9 * 4, 40)[0]) > 1
    for backend in backends(groups, d, torch.bfloat16):
        assert_same(problem, backend, torch.bfloat16, max_iters)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 5),
    d=st.integers(1, 3),
    vectors=st.integers(1, 6),
    cols=st.integers(1, 17),
    bits=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    importance=st.sampled_from(IMPORTANCE),
    round_to=st.sampled_from([torch.bfloat16, torch.float16, None]),
    max_iters=st.integers(1, 4),
    budgets=st.tuples(st.integers(1, 400), st.integers(1, 200)),
    seed=st.integers(0, 1000),
)
def test_equals_reference_on_any_shape(groups, d, vectors, cols, bits, kind, importance, round_to, max_iters, budgets, seed):
    k = min(2**bits, vectors * cols)
    problem = make(groups, d, vectors, cols, k, kind=kind, importance=importance, seed=seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_blocks(monkeypatch, *budgets)
        for backend in backends(groups, d, round_to):
            assert_same(problem, backend, round_to, max_iters)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("groups, d", [(1, 1), (3, 1), (2, 2)])
def test_a_solution_reused_equals_reference(groups, d, importance, monkeypatch):
    # As layers do: solve once, then decode and take gradients with what the solution keeps.
    tiny_blocks(monkeypatch)
    weight, centroids, temperature, s, upstream = problem = make(groups, d, kind="repeated", importance=importance)
    out, after, grad = run(problem, "reference", torch.bfloat16)
    for backend in backends(groups, d, torch.bfloat16):
        solution = op.solve(weight, centroids, reference.Problem(temperature, s), 3, backend)
        assert torch.allclose(solution.trajectory[-1], after, rtol=1e-10)
        for _ in range(2):
            assert torch.allclose(solution.decode(weight), out, rtol=1e-10)
            assert (solution.adjoint(upstream, weight) - grad).abs().max() <= 1e-10 * grad.abs().max()


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_reference_where_centroids_are_hard(groups, temperature):
    weight, centroids, _, _, upstream = make(groups, 1, vectors=8, cols=20, k=8)
    problem = weight, centroids, torch.full((groups,), temperature, dtype=torch.float64), None, upstream
    for backend in backends(groups, 1, torch.bfloat16):
        assert_same(problem, backend, torch.bfloat16)


@pytest.mark.parametrize("backend", ALL)
def test_centroid_without_mass_stays_and_passes_its_gradient_on(backend):
    weight, centroids, temperature, _, upstream = make(kind="far")
    _, after, grad = run((weight, centroids, temperature, None, upstream), backend, torch.bfloat16)
    assert after[0, -1] == 1000.0
    assert not torch.equal(after[0, :-1], centroids[0, :-1])
    # The same problem without it.
    fewer = run((weight, centroids[:, :-1], temperature, None, upstream), backend, torch.bfloat16)
    assert torch.allclose(after[0, :-1], fewer[1][0], rtol=1e-12)
    assert torch.allclose(grad, fewer[2], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", ALL)
def test_centroid_that_dies_hands_its_gradient_to_the_iteration_before(backend):
    # Hard assignment. The middle centroid becomes the mean of 1 and 3; then the outer ones take those from it, and
    # only 2.125, without importance, still uses it: its output is that mean.
    weight = torch.tensor([[0.5, 1.0, 2.125, 3.0, 3.5]], dtype=torch.float64)
    importance = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    centroids = torch.tensor([[[-0.4], [2.25], [4.4]]], dtype=torch.float64)
    temperature = torch.full((1,), 1e-3, dtype=torch.float64)
    upstream = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    problem = weight, centroids, temperature, importance, upstream
    out, after, grad = run(problem, backend, torch.bfloat16, max_iters=2)
    assert out[0, 2] == after[0, 1, 0] == 2
    expected = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    assert torch.allclose(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "blocks"])
@pytest.mark.parametrize("groups, d, importance", [(1, 1, "none"), (2, 1, "full"), (2, 2, "columns")])
def test_gradcheck(backend, groups, d, importance):
    weight, centroids, temperature, s, _ = make(groups, d, 3, 4, 3, importance=importance, seed=5)

    def soft(w):
        options = {"temperature": temperature, "importance": s, "round_to": None, "backend": backend}
        return edkm.cluster(w, centroids, **options).weight

    assert torch.autograd.gradcheck(soft, weight.requires_grad_())


# Rounding.


def plain_in(dtype, problem, iters=3):
    """The reference's equations with every number in `dtype`: `(out, gradient)`."""
    weight, centroids, temperature, _, upstream = problem
    groups = len(centroids)
    w = weight.to(dtype).requires_grad_()
    vectors = w.view(groups, -1, 1)
    ones = torch.ones_like(vectors[..., 0]).detach()
    out, _ = reference.iterate(vectors, ones, centroids.to(dtype), temperature.to(dtype), iters)
    (grad,) = torch.autograd.grad(out.view(w.shape), w, upstream.to(dtype))
    return out.view(w.shape).detach(), grad


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
def test_error_in_16_bits_is_at_most_twice_that_of_plain_pytorch(backend, dtype, groups):
    groups = 1 if backend == "histogram" else groups
    problem = make(groups, 1, vectors=16, cols=64, k=8, dtype=dtype, seed=1)
    truth = run(tuple(None if t is None else t.double() for t in problem), "reference", None)
    mine, plain = run(problem, backend, None), plain_in(dtype, problem)
    assert mine[0].dtype == mine[2].dtype == dtype
    assert distance(mine[0], truth[0]) <= 2 * distance(plain[0], truth[0])
    assert distance(mine[2], truth[2]) <= 2 * distance(plain[1], truth[2])
    # The result is the truth, rounded: nothing was computed in 16 bits.
    eps = torch.finfo(dtype).eps
    assert distance(mine[0], truth[0]) <= eps / 2 and distance(mine[2], truth[2]) <= eps / 2


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("groups, importance", [(1, "none"), (4, "full")])
def test_error_in_float32(backend, groups, importance):
    groups = 1 if backend == "histogram" else groups
    problem = make(groups, 1, vectors=16, cols=64, k=8, importance=importance, dtype=torch.float32, seed=2)
    wide = tuple(None if t is None else t.double() for t in (problem[0].bfloat16(), *problem[1:]))
    truth = run(wide, "reference", None)
    out, centroids, grad = run(problem, backend, torch.bfloat16)
    eps = torch.finfo(torch.float32).eps
    assert distance(out, truth[0]) <= 8 * eps
    assert distance(centroids, truth[1]) <= 8 * eps
    assert distance(grad, truth[2]) <= 32 * eps


# Symmetries.


@pytest.mark.parametrize("backend", ALL)
def test_permuting_weights_of_a_group_permutes_the_result(backend):
    weight, centroids, temperature, _, upstream = make(1 if backend == "histogram" else 2, 1, vectors=4, cols=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    state = centroids, temperature, None
    plain = run((weight, *state, upstream), backend, torch.bfloat16)
    permuted = run((weight[:, order], *state, upstream[:, order]), backend, torch.bfloat16)
    for i in (0, 2):
        assert torch.allclose(permuted[i], plain[i][:, order], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_twice_the_weights_are_twice_the_result_exactly(backend, dtype):
    weight, centroids, temperature, _, upstream = make(1 if backend == "histogram" else 2, 1, vectors=4, cols=12, dtype=dtype)
    plain = run((weight, centroids, temperature, None, upstream), backend, torch.bfloat16)
    twice = run((weight * 2, centroids * 2, temperature * 4, None, upstream), backend, torch.bfloat16)
    assert torch.equal(twice[0], plain[0] * 2)
    assert torch.equal(twice[1], plain[1] * 2)
    assert torch.equal(twice[2], plain[2])


def test_groups_are_independent():
    weight, centroids, temperature, _, upstream = make(3, 1)
    for backend in ("reference", *backends(3, 1, torch.bfloat16)):
        together = run((weight, centroids, temperature, None, upstream), backend, torch.bfloat16)
        for g in range(3):
            rows = slice(6 * g, 6 * g + 6)
            part = (weight[rows], centroids[g : g + 1], temperature[g : g + 1], None, upstream[rows])
            alone = run(part, backend, torch.bfloat16)
            assert torch.allclose(alone[0], together[0][rows], rtol=1e-12)
            assert torch.allclose(alone[2], together[2][rows], rtol=1e-10, atol=1e-13)


def test_strided_weights_and_gradients():
    weight, centroids, temperature, _, upstream = make(1, 1, vectors=5, cols=7)
    for backend in backends(1, 1, torch.bfloat16):
        plain = run((weight, centroids, temperature, None, upstream), backend, torch.bfloat16)
        w = weight.mT.contiguous().mT.requires_grad_()
        soft = edkm.cluster(w, centroids, temperature=temperature, backend=backend).weight
        (grad,) = torch.autograd.grad(soft, w, upstream.mT.contiguous().mT)
        assert torch.equal(soft, plain[0]) and torch.equal(grad, plain[2])
