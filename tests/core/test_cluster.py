"""`edkm.cluster`:

1. every backend computes the reference to 1e-10 in float64, output, centroids and gradient, for any shape, in any blocks;
2. the reference is differentiated right (gradcheck), and a centroid without mass hands its gradient on;
3. in 16 bits the error is at most twice that of plain PyTorch, in float32 a few units in the last place;
4. backward keeps the weight and the centroids of each iteration, and memory peaks at blocks;
5. torch.compile gives the same bits;
6. permuted and scaled weights give permuted and scaled results, and groups are independent;
7. `auto` goes by shape, dtype and device, and errors name the argument, the rule and the remedy;
8. kernels are built once, and where they cannot be it is reported and nothing fails;
9. one thread and several give the same bits, with every backend.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import peak_bytes, saved_bytes, saved_storages

import edkm
from edkm.core import blocks, histogram, native, op, reference
from edkm.core.kmeans import temperature_for

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


def backends(groups, d, round_to):
    """Those that can cluster such a weight."""
    histogram = ["histogram"] if groups == d == 1 and round_to is not None else []
    return ["blocks", *histogram, *(["native"] if d == 1 and native.available() else [])]


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


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


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


# The Cost section.


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_backward_keeps_the_weight_and_the_centroids_of_each_iteration(backend, dtype, groups):
    groups = 1 if backend == "histogram" else groups
    weight, centroids, temperature, importance, _ = make(groups, 1, 16, 64, 8, importance="full", dtype=dtype)
    weight.requires_grad_()
    for s in (None, importance):
        apart_from = [weight] if s is None else [weight, s]
        for max_iters in (1, 4):
            options = {"temperature": temperature, "importance": s, "max_iters": max_iters, "backend": backend}
            kept, _ = saved_bytes(lambda options=options: edkm.cluster(weight, centroids, **options), *apart_from)
            trajectory = (max_iters + 1) * centroids.numel() * 4
            assert trajectory <= kept <= trajectory + 1024


def test_reference_keeps_the_assignments_of_all_iterations():
    weight, centroids, temperature, _, _ = make(1, 1, 16, 64, 8, dtype=torch.float32)
    storages, _ = saved_storages(lambda: edkm.cluster(weight.requires_grad_(), centroids, temperature=temperature, backend="reference"))
    assert sum(storages.values()) > 3 * weight.numel() * 8 * 4


def step(weight, centroids, temperature, upstream, backend):
    def forward_and_backward():
        result = edkm.cluster(weight, centroids, temperature=temperature, backend=backend)
        return torch.autograd.grad(result.weight, weight, upstream)

    return forward_and_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histogram_peaks_at_16_bytes_a_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 2048, generator=generator).mul_(0.02).to(dtype).requires_grad_()
    centroids = torch.linspace(-0.04, 0.04, 8).view(1, 8, 1)
    peak = peak_bytes(step(weight, centroids, 1e-4, torch.ones_like(weight), "histogram"))
    assert peak <= 16 * weight.numel()


def test_blocks_peak_at_a_block():
    peaks = []
    for rows in (512, 2048):
        weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        centroids = torch.linspace(-2, 2, 8).view(1, 8, 1)
        assert len(blocks.cut(1, rows, 256 * 8, blocks.block_entries(weight.device))[0]) > 1
        peak = peak_bytes(step(weight, centroids, 0.1, torch.ones_like(weight), "blocks"))
        # The output and the gradient.
        peaks.append(peak - 2 * weight.numel() * 4)
    assert abs(peaks[1] - peaks[0]) <= 64 << 10
    assert peaks[0] <= 5 * 4 * blocks.block_entries(torch.device("cpu"))


# PyTorch's own machinery.


@pytest.mark.parametrize("backend", ["blocks", "histogram", "native", "auto"])
def test_compiles_without_a_graph_break(backend):
    problem = make(1 if backend == "histogram" else 2, 1, vectors=8, cols=20, importance="full", dtype=torch.float32)
    weight, centroids, temperature, importance, upstream = problem

    def loss(w):
        soft = edkm.cluster(w, centroids, temperature=temperature, importance=importance, backend=backend)
        return (soft.weight * upstream).sum(), soft.centroids

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        w = weight.clone().requires_grad_()
        value, after = function(w)
        value.backward()
        results.append((value.detach(), after, w.grad))
    for eager, other in zip(*results):
        assert torch.equal(eager, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", FAST)
def test_ops_are_registered_properly(backend):
    groups = 1 if backend == "histogram" else 2
    weight, centroids, temperature, importance, upstream = make(groups, 1, importance="full", dtype=torch.float32)
    how = torch.bfloat16, backend
    _, trajectory = op._cluster(weight, importance, centroids, temperature, 3, *how)
    calls = {
        op._cluster: (weight.clone().requires_grad_(), importance, centroids, temperature, 3, *how),
        op._cluster_adjoint: (upstream, weight, importance, trajectory, temperature, *how),
    }
    for function, arguments in calls.items():
        assert set(torch.library.opcheck(function, arguments).values()) == {"SUCCESS"}


def test_only_the_weight_gets_a_gradient():
    weight, centroids, temperature, importance, _ = make(importance="full")
    leaves = [t.requires_grad_() for t in (weight, centroids, importance)]
    result = edkm.cluster(weight, centroids, temperature=temperature, importance=importance, backend="blocks")
    assert not result.centroids.requires_grad
    result.weight.sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None


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


# The choice of a backend.


@pytest.mark.parametrize("compiler", [False, True])
def test_auto_goes_by_shape_dtype_and_device(compiler, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: compiler)
    loops = "native" if compiler else "blocks"
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(256, 512, generator=generator).mul_(0.02).bfloat16(), torch.randn(32, 64, generator=generator)
    name, why = edkm.choose_backend(many, 1, 16, 1, None)
    assert name == "histogram" and "about 4,096 distinct values in 131,072 weights" in why
    # On other devices every bin counts: which are empty would have to be read from there.
    assert edkm.choose_backend(many, 1, 16, 1, None, torch.device("mps"))[0] == "histogram"
    assert edkm.choose_backend(many, 2, 16, 1, None, torch.device("cuda"))[0] == "blocks"
    assert edkm.choose_backend(few, 32, 16, 1, torch.bfloat16)[0] == loops
    why = "16 centroids, on a CPU with a compiler" if compiler else "weights wider than 16 bits"
    assert edkm.choose_backend(few, 1, 16, 1, None) == (loops, why)
    assert edkm.choose_backend(many, 1, 8, 2, None) == ("blocks", "vectors of 2 values")


@pytest.mark.parametrize("groups, cols, chosen", [(1, 8192, "histogram"), (8, 8, "blocks")])
def test_auto_gives_the_bits_of_the_backend_that_it_chose(groups, cols, chosen, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    problem = make(groups, 1, vectors=2, cols=cols, kind="repeated", dtype=torch.float32)
    assert edkm.choose_backend(problem[0], groups, 4, 1, torch.bfloat16)[0] == chosen
    assert all(torch.equal(a, b) for a, b in zip(run(problem, "auto", torch.bfloat16), run(problem, chosen, torch.bfloat16)))


# Errors: the tensor or argument, the rule, the remedy.


W, C = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 4).view(1, 4, 1)


@pytest.mark.parametrize(
    "change, named, rule, remedy",
    [
        ({"weight": W.view(2, 4, 8)}, "weight: ", "matrix [rows, cols]", "Flatten"),
        ({"weight": W.to(torch.int8)}, "weight: ", "floating-point", "Flatten"),
        ({"centroids": C.view(4, 1)}, "centroids: ", "[g, k, d]", "edkm.initial_centroids"),
        ({"centroids": C.bfloat16()}, "centroids: ", "torch.float32", "edkm.initial_centroids"),
        ({"weight": W.double()}, "centroids: ", "torch.float64", "edkm.initial_centroids"),
        ({"centroids": C.repeat(3, 1, 1)}, "weight: ", "8 rows do not divide into 3 tables", "rows_per_lut"),
        ({"centroids": C.repeat(1, 1, 3)}, "weight: ", "vectors of 3 rows", "dim that divide"),
        ({"centroids": C.repeat(0, 1, 1)}, "weight: ", "0 tables", "skip the tensor"),
        ({"centroids": C.repeat(8, 4, 1)}, "weight: ", "16 centroids need at least 16 weights, got 8", "fewer bits"),
        ({"weight": torch.zeros(0, 8)}, "weight: ", "0 rows", "skip the tensor"),
        ({"max_iters": 0}, "max_iters: ", "at least one", "got 0"),
        ({"importance": torch.ones(3, 8)}, "importance: ", "does not broadcast", "[1, cols]"),
        ({"importance": -torch.ones(1, 8)}, "importance: ", "not negative", "squared"),
        ({"importance": torch.full((1, 8), torch.nan)}, "importance: ", "finite", "squared"),
        ({"temperature": 0.0}, "temperature: ", "must be positive, got 0", "squared weight units"),
        ({"temperature": -1.0}, "temperature: ", "must be positive, got -1", "squared weight units"),
        ({"temperature": torch.nan}, "temperature: ", "must be positive", "squared weight units"),
        ({"weight": W.clone().fill_diagonal_(torch.nan)}, "weight: ", "NaN or infinite", "learning rate"),
        ({"weight": W.clone().fill_diagonal_(torch.inf)}, "weight: ", "NaN or infinite", "learning rate"),
        ({"weight": W * 1e6, "round_to": torch.float16}, "weight: ", "range of 16 bits", "learning rate"),
        ({"backend": "dense"}, "backend: ", "'dense' is not one of", "reference, histogram, blocks, native, auto"),
    ],
)
def test_errors(change, named, rule, remedy):
    arguments = {"weight": W, "centroids": C, "temperature": 0.1} | change
    names = [change["backend"]] if "backend" in change else ["reference", "blocks", "histogram", "auto"]
    for backend in names:
        with pytest.raises(ValueError) as error:
            edkm.cluster(**arguments | {"backend": backend})
        message = str(error.value)
        assert message.startswith(named), (backend, message)
        assert rule in message and remedy in message, (backend, message)


@pytest.mark.parametrize(
    "change",
    [{"round_to": None}, {"round_to": torch.float32}, {"centroids": C.repeat(1, 1, 2)}, {"centroids": C.repeat(2, 1, 1)}],
)
def test_histogram_is_refused_where_it_cannot_be(change):
    arguments = {"weight": W, "centroids": C, "temperature": 0.1} | change
    with pytest.raises(ValueError, match=r"^backend: histogram needs one table of single 16-bit values.*Use auto"):
        edkm.cluster(**arguments, backend="histogram")
    assert edkm.cluster(**arguments, backend="auto").weight.isfinite().all()


@pytest.mark.parametrize("value, refused", [(2.0**62, False), (2.0**63, True)])
def test_a_histogram_with_empty_bins_takes_values_up_to_2_62_and_refuses_larger_ones(value, refused, monkeypatch):
    monkeypatch.setattr(histogram, "drops_empty_bins", lambda device: False)  # as on a GPU
    weight = W.clone()
    weight[0, 0] = value
    if refused:
        with pytest.raises(ValueError, match=r"^weight: NaN or infinite values, or values beyond"):
            edkm.cluster(weight, C, temperature=0.1, backend="histogram")
    else:
        assert edkm.cluster(weight, C, temperature=0.1, backend="histogram").centroids.max() == value


# The native kernels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups, k, cols", [(1, 16, 700), (24, 8, 300), (8, 4, 3)])
@pytest.mark.parametrize("backend", ["native"])
def test_native_in_float32(backend, groups, k, cols, dtype):
    """Several tiles and threads, rows shorter than a vector; against `blocks` in float64."""
    torch.manual_seed(groups)
    weight, grad = torch.randn(2, 24, cols).to(dtype)
    centroids, importance = torch.randn(groups, k, 1).sort(1).values, torch.rand(24, cols)
    problem = reference.Problem(torch.rand(groups) * 0.05 + 0.01, importance)
    wide = reference.Problem(problem.temperature.double(), problem.importance.double(), None)
    solution = op.solve(weight, centroids, problem, 2, "native")
    truth = op.solve((weight.bfloat16() if dtype == torch.float32 else weight).double(), centroids.double(), wide, 2, "blocks")
    torch.testing.assert_close(solution.trajectory.double(), truth.trajectory, rtol=1e-5, atol=1e-6)
    decoded, gradient = solution.decode(weight), solution.adjoint(grad, weight)
    assert decoded.dtype == gradient.dtype == dtype
    error = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    rounded = (weight.bfloat16() if dtype == torch.float32 else weight).double()
    torch.testing.assert_close(decoded.double(), truth.decode(rounded), rtol=error, atol=error)
    assert distance(gradient, truth.adjoint(grad.double(), rounded)) < 10 * error


@pytest.mark.parametrize("groups", [1, 64])
def test_threads_do_not_change_a_bit(groups):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            start = edkm.initial_centroids(weight, 3, rows_per_lut=512 // groups)
            problem = reference.Problem(temperature_for(weight, start, None, 0.5))
            results.append([start, problem.temperature])
            for backend in backends(groups, 1, torch.bfloat16):
                solution = op.solve(weight, start, problem, 1, backend)
                results[-1] += [solution.trajectory, solution.decode(weight), solution.adjoint(weight, weight)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in results[1:] for a, b in zip(results[0], others, strict=True))


def forget_kernels():
    for cached in (native.available, native.library):
        cached.cache_clear()


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Kernels that are not built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_kernels()
    yield tmp_path
    forget_kernels()


def test_without_a_compiler(afresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert not native.available()
    with pytest.raises(ValueError, match=r"native needs a CPU, a C compiler, .* no compiler"):
        edkm.cluster(W, C, temperature=0.1, backend="native")
    assert edkm.cluster(W, C, temperature=0.1, backend="auto").weight.shape == W.shape


def test_a_compiler_that_fails_is_reported_once(afresh, monkeypatch):
    script = afresh / "cc"
    script.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.warns(UserWarning, match="kernels.c could not be built, training will be slower: no such header"):
        assert not native.available()
    assert not native.available()


@pytest.mark.parametrize("backend", ["native"])
def test_kernels_are_built_once_and_again_if_they_were_cut_off(backend, afresh, monkeypatch):
    assert native.available()
    (path,) = afresh.glob("edkm/*")
    with monkeypatch.context() as patch:
        patch.setattr(native, "_build", None)  # would fail
        native.library.cache_clear()
        assert native._library(torch.float32) is not None and path.is_file()
    whole = path.read_bytes()
    for size in (0, 1000):
        # Another file: this process has the first one mapped.
        path.unlink()
        path.write_bytes(whole[:size])
        native.library.cache_clear()
        assert native._library(torch.float32) is not None and path.stat().st_size == len(whole)


def test_without_a_home_directory(afresh, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.warns(UserWarning, match="could not be built, training will be slower: there is no home directory.*Set XDG_CACHE_HOME"):
        assert not native.available()
