"""Triton kernels of the clustering, in Triton's interpreter on a CPU or on a GPU where there is one (conftest.py):

1. in float64 output, centroids and gradient are those of the reference, in float32 and 16 bits they are rounded; so for tables with a
   shape;
2. tables taken by several programs give the same, and so do the sums that ranks share;
3. nothing is read from the device between a weight and its gradient, and layers train with them;
4. weights that are not finite give centroids that are not;
5. `auto` takes the kernels on a GPU that they run on, and they are refused elsewhere;
6. they compile for GPUs of compute capability 8.0, 9.0 and 10.0, and keep up to 16 centroids in registers.
"""

import os
import subprocess
import sys

import pytest
import torch
from problems import C, W, distance, make, run

import edkm
from benchmarks.reads import CountReads

pytest.importorskip("triton", reason="Triton is not made for this platform")
from edkm.core import blocks, cuda, op, reference
from edkm.core.formats import FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(problem):
    return tuple(None if x is None else x.to(DEVICE) for x in problem)


@pytest.mark.parametrize("round_to", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("groups", "k", "vectors", "cols", "importance", "iters", "kind"),
    [
        (3, 4, 1, 37, "none", 1, "normal"),
        (2, 8, 2, 21, "columns", 3, "normal"),
        (1, 16, 3, 11, "full", 3, "normal"),
        (2, 8, 1, 300, "zeros", 1, "repeated"),
        (2, 5, 2, 9, "columns", 2, "far"),
        (1, 20, 2, 30, "none", 3, "normal"),
        (1, 1, 1, 3, "none", 1, "equal"),
    ],
)
def test_it_is_the_reference(groups, k, vectors, cols, importance, iters, kind, round_to):
    problem = moved(make(groups, 1, vectors, cols, k, kind=kind, importance=importance))
    for ours, truth in zip(run(problem, "triton", round_to, iters), run(problem, "reference", round_to, iters), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "k", "cols"), [(1, 16, 70), (4, 8, 33)])
@pytest.mark.parametrize("iters", [1, 3])
def test_float32_and_16_bits(groups, k, cols, dtype, iters):
    """As the kernels of a CPU: against `blocks` in float64."""
    torch.manual_seed(groups)
    weight, grad = torch.randn(2, 4, cols).to(DEVICE, dtype)
    centroids, importance = torch.randn(groups, k, 1).sort(1).values.to(DEVICE), torch.rand(1, cols).to(DEVICE)
    problem = reference.Problem((torch.rand(groups) * 0.05 + 0.02).to(DEVICE), importance)
    wide = reference.Problem(problem.temperature.double(), importance.double(), None)
    solution = op.solve(weight, centroids, problem, iters, "triton")
    rounded = (weight.bfloat16() if dtype == torch.float32 else weight).double()
    truth = op.solve(rounded, centroids.double(), wide, iters, "blocks")
    torch.testing.assert_close(solution.trajectory.double(), truth.trajectory, rtol=1e-5, atol=1e-6)
    decoded, gradient = solution.decode(weight), solution.adjoint(grad, weight)
    assert decoded.dtype == gradient.dtype == dtype
    error = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(decoded.double(), truth.decode(rounded), rtol=error, atol=error)
    assert distance(gradient, truth.adjoint(grad.double(), rounded)) < 10 * error


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "nf4"])
@pytest.mark.parametrize(("rows", "cols", "groups", "repeated"), [(3, 12, 3, 1), (4, 16, 4, 2), (4, 5, 2, 4), (1, 40, 1, 1)])
def test_tables_with_a_shape_are_the_reference(monkeypatch, name, rows, cols, groups, repeated):
    """A group in several tiles, several groups in one, groups of rows; importance that is repeated."""
    monkeypatch.setattr("edkm.core.gpuformats._TILE", 32)
    weight, theta, problem, grad = in_format(name, rows, cols, groups, repeated)
    for iters in (1, 2):
        leaf = weight.clone().requires_grad_()
        out, trajectory = reference.cluster(leaf, theta, problem, iters)
        out.backward(grad)
        solution = op.solve(weight, theta, problem, iters, "triton")
        found = solution.trajectory, solution.decode(weight), solution.adjoint(grad, weight)
        for ours, truth in zip(found, (trajectory.detach(), out.detach(), leaf.grad), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["q4_0", "q4_1"])
def test_tables_with_a_shape_in_fewer_bits(name, dtype):
    weight, theta, problem, grad = in_format(name, 4, 32, 4, 1)
    narrow = problem._replace(temperature=problem.temperature.float(), importance=problem.importance.float(), basis=problem.basis.float())
    weight, grad = weight.to(dtype), grad.to(dtype)
    solution = op.solve(weight, theta.float(), narrow, 2, "triton")
    truth = op.solve(weight.double(), theta.float().double(), problem, 2, "blocks")
    torch.testing.assert_close(solution.trajectory.double(), truth.trajectory, rtol=1e-5, atol=1e-5)
    error = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(solution.decode(weight).double(), truth.decode(weight.double()), rtol=error, atol=error)
    assert distance(solution.adjoint(grad, weight), truth.adjoint(grad.double(), weight.double())) < 20 * error


def test_tables_with_a_shape_at_temperature_0():
    for name in ("q4_1", "nf4"):
        weight, theta, problem, _ = in_format(name, 4, 32, 4, 1)
        trajectory, _ = cuda.solve(weight, theta, problem, 2, hard=True)
        truth = op.solve(weight, theta, problem, 2, "hard")
        torch.testing.assert_close(trajectory, truth.trajectory, rtol=1e-10, atol=1e-10)
        out = cuda.decode(weight, trajectory, problem, hard=True)
        torch.testing.assert_close(out, truth.decode(weight), rtol=1e-10, atol=1e-10)


def in_format(name, rows, cols, groups, repeated):
    """Weight, theta, problem and gradient in float64; the importance of `repeated` rows."""
    torch.manual_seed(0)
    basis = FORMATS[name].basis(torch.float64)
    weight, grad = torch.randn(2, rows, cols, dtype=torch.float64)
    theta = torch.full((groups, basis.shape[1], 1), float(2.5 / basis[:, -1].abs().max()), dtype=torch.float64)
    if basis.shape[1] == 2:
        theta[:, 0] = -theta[:, 1] * basis[:, -1].mean()
    temperature, importance = 0.02 + 0.1 * torch.rand(groups, dtype=torch.float64), torch.rand(repeated, cols, dtype=torch.float64)
    problem = reference.Problem(*(x.to(DEVICE) for x in (temperature, importance)), None, basis.to(DEVICE))
    return weight.to(DEVICE), theta.to(DEVICE), problem, grad.to(DEVICE)


@pytest.fixture
def small_parts(monkeypatch):
    """Programs that take two rows of 20."""
    monkeypatch.setattr(cuda, "_WEIGHTS_PER_WARP", 10)


@pytest.mark.parametrize(("importance", "iters"), [("full", 1), ("columns", 3)])
def test_tables_of_many_rows_are_taken_by_several_programs(small_parts, importance, iters):
    problem = moved(make(2, 1, 5, 20, 8, importance=importance))
    call = cuda._Call(problem[0], problem[1], reference.Problem(problem[2], problem[3], None))
    assert call.parts == 3 and not call.whole_tables
    for ours, truth in zip(run(problem, "triton", None, iters), run(problem, "reference", None, iters), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_sums_of_the_rows_of_a_rank(small_parts):
    weight, centroids, temperature, importance, _ = moved(make(2, 1, 5, 20, 8, importance="full"))
    problem = reference.Problem(temperature, importance, torch.bfloat16)
    truth = blocks.sums(blocks.Points.of(weight, problem, 2, 8, 1), centroids)
    torch.testing.assert_close(cuda.sums(weight, centroids, problem), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [False, True])
def test_nothing_is_read_between_a_weight_and_its_gradient(parts, request):
    if parts:
        request.getfixturevalue("small_parts")
    weight, centroids, temperature, importance, grad = moved(make(2, 1, 5, 20, 4, importance="columns", dtype=torch.float32))
    with CountReads() as reads:
        solution = op.solve(weight, centroids, reference.Problem(temperature, importance), 2, "triton")
        solution.decode(weight), solution.adjoint(grad, weight)
    assert not reads.found


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_gpu_is_never_waited_for(small_parts):
    weight, centroids, temperature, importance, grad = moved(make(2, 1, 5, 20, 4, importance="columns", dtype=torch.float32))
    for mode in ("default", "error"):  # the first compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            solution = op.solve(weight, centroids, reference.Problem(temperature, importance), 2, "triton")
            solution.decode(weight), solution.adjoint(grad, weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_layers_train_with_them():
    """A layer with several tables, and an embedding with one, of which only some rows are decoded; beside `blocks`."""
    results = []
    for backend in ("triton", "blocks"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(12, 8), torch.nn.Linear(8, 6)).to(DEVICE)
        importance = {"0.weight": torch.rand(12, 8, device=DEVICE), "1.weight": torch.rand(1, 8, device=DEVICE)}
        edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=3, embedding_bits=2), importance=importance, backend=backend)
        optimizer, ids = torch.optim.SGD(model.parameters(), lr=1e-2), torch.tensor([[1, 3, 3, 7]], device=DEVICE)
        for step in range(2):
            with CountReads() as reads:
                model(ids).square().sum().backward()
            assert step == 0 or not reads.found
            optimizer.step()
        results.append([*model.parameters(), *model.buffers()])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice|invalid value|overflow:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_weights_that_are_not_finite(value):
    weight, centroids, temperature, _, _ = moved(make(2, 1, 2, 9, 4, dtype=torch.float32))
    weight[1, 3] = value
    trajectory = op.solve(weight, centroids, reference.Problem(temperature), 1, "triton").trajectory
    assert trajectory[-1, 0].isnan().all() and trajectory[-1, 1].isfinite().all()


# The choice of the kernels.


def test_auto_takes_them_on_a_gpu_that_they_run_on(monkeypatch):
    weight, gpu = torch.empty(64, 512, device="meta"), torch.device("cuda")

    def chosen(groups=4, k=8, d=1):
        return edkm.choose_backend(weight, groups, k, d, torch.bfloat16, gpu)[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((8, 0), "triton"), ((10, 0), "triton"), ((7, 5), "blocks")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert chosen() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a run that is planned for another machine
    assert edkm.choose_backend(weight, 4, 8, 1, None, gpu) == ("triton", "8 centroids, on a GPU with Triton")
    assert chosen(k=128) == chosen(groups=2, d=2) == "blocks"
    # Nobody wants the interpreter.
    assert edkm.choose_backend(weight, 4, 8, 1, None, torch.device("cpu"))[0] in ("native", "blocks")
    monkeypatch.setattr(cuda, "installed", lambda: False)
    assert chosen() == "blocks"


def test_where_they_do_not_run_they_are_refused(monkeypatch):
    for name, value in (("TRITON_INTERPRET", "0"), ("TRITON_INTERPRET", "1")):
        monkeypatch.setenv(name, value)
        if value == "1":
            monkeypatch.setattr(cuda, "installed", lambda: False)
        with pytest.raises(ValueError, match=r"backend: triton needs a GPU .* got cpu, (no )?Triton, d=1, 4 centroids. Use auto"):
            edkm.cluster(W, C, temperature=0.1, backend="triton")


COMPILE = """
import re, subprocess, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from edkm.core import cuda
from edkm.core.formats import FORMATS
from edkm.core.reference import Problem

class Device:
    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

def compiled(kernels, name, programs, beside, *arguments, **constants):
    built = getattr(kernels, name).warmup(*arguments, grid=(programs,), **constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(what + r":(\\d+)", used)[1]) for what in ("REG", "STACK", "LOCAL"))
    print(kernels.__name__, name, Device.capability, constants["k"], registers, built.metadata.shared, stack + local)

def step(capability, groups, rows, k, iters, importance, dtype=torch.bfloat16):
    Device.capability = capability
    weight = torch.zeros(rows, 64, dtype=dtype)
    problem = Problem(torch.ones(groups), importance, torch.bfloat16).for_weight(weight)
    trajectory, _ = cuda.solve(weight, torch.zeros(groups, k, 1), problem, iters)
    cuda.decode(weight, trajectory, problem)
    cuda.adjoint(weight, weight, trajectory, problem)

def step_in_format(capability, name, block, importance, dtype=torch.bfloat16, iters=1):
    Device.capability = capability
    basis = FORMATS[name].basis()
    weight, theta = torch.zeros(512, block, dtype=dtype), torch.zeros(512, basis.shape[1], 1)
    problem = Problem(torch.ones(512), importance, torch.bfloat16, basis).for_weight(weight)
    trajectory, _ = cuda.solve(weight, theta, problem, iters)
    cuda.decode(weight, trajectory, problem)
    cuda.adjoint(weight, weight, trajectory, problem)

triton.runtime.driver.set_active(Device())
cuda._launch = compiled
for capability in (80, 90, 100):
    step(capability, 512, 8192, 8, 1, torch.ones(1, 64))
step(90, 512, 512, 16, 3, None, torch.float32)  # a table per row, without importance
step(90, 2, 2048, 64, 2, torch.ones(2048, 1))  # parts of tables
for capability in (80, 100):
    step_in_format(capability, "q4_0", 32, torch.ones(8, 32))
step_in_format(90, "q4_1", 32, None, torch.float32, 3)
step_in_format(90, "nf4", 64, torch.ones(1, 64))
step_in_format(90, "int8_row", 1536, torch.ones(1, 1536))
"""


def test_the_kernels_compile_for_gpus_and_spill_nothing():
    """Launched as for a GPU, but only compiled: a driver stands for one that is not there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 19 + 15, done.stderr
    assert {name for _, name, *_ in lines} == {"solve", "sums", "decode", "adjoint", "gradients"}
    for *kernel, registers, shared, spilled in lines:
        assert int(registers) <= 255 and int(shared) <= 4096 and spilled == "0", (kernel, registers, shared, spilled)
