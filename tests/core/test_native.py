"""Compiled kernels:

1. in float32 and 16 bits they give the results of `blocks` in float64, rounded, also of a hard assignment;
2. every backend decodes in the dtype that is asked for, as if it were converted afterwards;
3. one thread and several give the same bits, with every backend;
4. kernels are built once, and again if their file was cut off;
5. where they cannot be built, without a compiler or a home directory, it is reported and nothing fails.
"""

import pytest
import torch
from problems import C, W, backends, distance

import edkm
from edkm.core import native, op, reference
from edkm.core.kmeans import temperature_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups, k, cols", [(1, 16, 700), (24, 8, 300), (8, 4, 3), (3, 5, 20), (6, 2, 600)])
@pytest.mark.parametrize("backend", ["native"])
def test_native_in_float32(backend, groups, k, cols, dtype):
    """Several tiles and threads, more and fewer tiles than are kept, rows shorter than a vector; against `blocks` in float64."""
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


@pytest.mark.parametrize("backend", ["native"])
def test_hard_assignment_in_float32(backend):
    """The gradient of the assignment is 0, however large a factor 2 / temperature rounding errors get."""
    torch.manual_seed(0)
    centroids = torch.randn(24, 8, 1).sort(1).values
    weight = centroids[:, torch.arange(300) % 8, 0] + 0.01 * torch.rand(24, 300)
    problem, grad = reference.Problem(torch.full((24,), 1e-8), None, None), torch.randn_like(weight)
    solution = op.solve(weight, centroids, problem, 2, backend)
    truth = op.solve(weight.double(), centroids.double(), problem._replace(temperature=problem.temperature.double()), 2, "blocks")
    torch.testing.assert_close(solution.trajectory.double(), truth.trajectory, rtol=1e-6, atol=1e-7)
    assert distance(solution.adjoint(grad, weight), truth.adjoint(grad.double(), weight.double())) < 1e-6


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decodes_in_the_dtype_that_is_asked_for(weight_dtype):
    weight, start = torch.randn(16, 40).to(weight_dtype), torch.randn(1, 8, 1)
    for backend in backends(1, 1, torch.bfloat16):
        solution = op.solve(weight, start, reference.Problem(torch.tensor([0.1])), 1, backend)
        assert solution.decode(weight).dtype == weight_dtype
        wide = solution.decode(weight, torch.float32)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(solution.decode(weight, dtype), wide.to(dtype)), (backend, dtype)


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
