"""Cluster on a CPU in C: the equations of `blocks` for single values, many times faster. Free tables have at most 64 centroids.

`kernels.c` is built with the machine's compiler on first use, in a second or two, and kept in the user's cache. Without a compiler
`available` is false, and training takes `blocks`: the same numbers up to the rounding of sums. The loops of kmeans.py and gptq.py are here
too, with the same bits as their forms in Python. No result depends on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm.core import blocks
from edkm.core.blocks import Points
from edkm.core.reference import Problem, compute_dtype, importance_rows, table_shape, update_centroids

_SOURCE = Path(__file__).with_name("kernels.c")
MOST_CENTROIDS = 64
_FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
# The first that the compiler takes. 512-bit vectors are a third faster here than the 256 that gcc prefers.
_TUNING = (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], [])
# Rows of a weight that `columns` goes through together.
_LANES = 64
FAILURES = (OSError, subprocess.SubprocessError)
# Below this many weights a second thread costs more than it saves.
_WEIGHTS_PER_THREAD = 1 << 15


# The three functions that every backend has; op.py documents them. `hard`, of tables with a shape: at temperature 0.


def solve(weight: Tensor, centroids: Tensor, problem: Problem, iters: int, *, hard: bool = False) -> tuple[Tensor, None]:
    trajectory = centroids.repeat(iters + 1, 1, 1, 1)
    call = _Call(weight, centroids, problem)
    if problem.basis is not None:
        call("edkm_solve", trajectory, iters, 0 if hard else problem.temperature)
        return trajectory, None
    for t in range(iters):
        trajectory[t + 1] = update_centroids(call.sums(trajectory[t]), trajectory[t])
    return trajectory, None


def sums(weight: Tensor, centroids: Tensor, problem: Problem) -> Tensor:
    """Mass and weighted sum of every centroid in one iteration, `[g, k, 2]`: for `update_centroids`."""
    if problem.basis is not None and len(problem.basis) > MOST_CENTROIDS:
        return blocks.sums(Points.of(weight, problem, *centroids.shape), centroids)
    return _Call(weight, centroids, problem).sums(centroids)


def decode(weight: Tensor, trajectory: Tensor, problem: Problem, kept: None, dtype: torch.dtype, *, hard: bool = False) -> Tensor:
    call = _Call(weight, trajectory[-1], problem._replace(importance=None))
    out = torch.empty_like(call.weight, dtype=_stored(dtype))
    name = "edkm_decode" if problem.basis is None else "edkm_decode_shaped"
    call(name, trajectory[-2], trajectory[-1], 0 if hard else problem.temperature, out, out.dtype == torch.bfloat16)
    return out.to(dtype)


def adjoint(grad: Tensor, weight: Tensor, trajectory: Tensor, problem: Problem, kept: None = None) -> Tensor:
    call = _Call(weight, trajectory[-1], problem)
    dw = torch.empty_like(call.weight, dtype=trajectory.dtype)
    grad = grad.to(_stored(grad.dtype))
    name = "edkm_adjoint" if problem.basis is None else "edkm_adjoint_shaped"
    call(name, grad, grad.dtype == torch.bfloat16, trajectory, len(trajectory) - 1, problem.temperature, dw)
    return dw.to(weight.dtype)


def takes(device: torch.device, k: int, d: int, *, shaped: bool = False) -> bool:
    """Whether this backend can cluster a weight on this device of this machine; of tables with a shape, those of any size."""
    return device.type == "cpu" and (shaped or k <= MOST_CENTROIDS) and d == 1 and available()


@functools.cache
def available() -> bool:
    """Whether the kernels could be built; warn once if there is a compiler and it failed."""
    try:
        return _library(torch.float32) is not None
    except FAILURES as error:
        warnings.warn(f"edkm: kernels.c could not be built, training will be slower: {why(error)}", stacklevel=2)
        return False


class _Points(ctypes.Structure):
    """`Points` of kernels.c."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("importance", ctypes.c_void_p),
        ("period", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("to_bf16", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("p", ctypes.c_int64),
    ]


class _Call:
    """A weight `[rows, cols]` as the kernels see it: bfloat16 or in the compute dtype, contiguous."""

    def __init__(self, weight: Tensor, centroids: Tensor, problem: Problem) -> None:
        self.temperature, importance, round_to, basis = problem
        self.groups, self.k, _ = table_shape(centroids, basis)
        rows, cols = weight.shape
        dtype = self.dtype = compute_dtype(weight.dtype)
        to_bf16 = weight.dtype == dtype and round_to == torch.bfloat16
        if round_to is not None and not to_bf16:
            weight = weight.to(round_to)
        self.weight = weight.contiguous() if weight.dtype == torch.bfloat16 else weight.to(dtype).contiguous()
        self.importance = None if importance is None else importance_rows(importance, weight.shape).to(dtype).contiguous()
        self.values = None if basis is None else basis[:, -1].to(dtype).contiguous()
        at, values = (None if x is None else x.data_ptr() for x in (self.importance, self.values))
        period = 0 if self.importance is None else self.importance.numel()
        is_bf16, p = self.weight.dtype == torch.bfloat16, 0 if basis is None else basis.shape[1]
        shape = self.groups, rows // self.groups, cols, self.k
        self.points = _Points(self.weight.data_ptr(), at, period, *shape, is_bf16, to_bf16, values, p)

    def sums(self, centroids: Tensor) -> Tensor:
        mass, total = centroids.new_empty(2, self.groups, self.k)
        self("edkm_sums", centroids, self.temperature, mass, total)
        return torch.stack([mass, total], -1)

    def __call__(self, name: str, *arguments: Tensor | int) -> None:
        """Run a kernel over all groups, in as many threads as torch would use."""
        kept = [x.contiguous() if isinstance(x, Tensor) else x for x in arguments]
        assert all(x.dtype in (self.dtype, torch.bfloat16) for x in kept if isinstance(x, Tensor))
        kernel = _kernel(name, self.dtype)
        passed = [ctypes.byref(self.points), *_passed(kept)]
        _in_threads(lambda first, stop: kernel(*passed, *_passed([first, stop])), self.groups, self.weight.numel())


# For assign.py, formats.py, kmeans.py and gptq.py.


def nearest(values: Tensor, midpoints: Tensor) -> Tensor:
    """Count the midpoints below values `[g, n]` among those of their table, ascending `[g, m]`, m < 256: integers `[g, n]`.

    Both are float32 or float64, on any device: in C where it can be, at the cost of some 0.5 ns a value and 16 midpoints.
    """
    values, midpoints = values.contiguous(), midpoints.contiguous()
    assert values.dtype == midpoints.dtype
    if values.device.type != "cpu" or not available():
        return torch.searchsorted(midpoints, values, out_int32=True)
    indices = torch.empty_like(values, dtype=torch.uint8)
    kernel, groups = _kernel("edkm_nearest", values.dtype), len(values)
    passed = _passed([values.numel() // groups, midpoints.shape[1], values, midpoints, indices])
    _in_threads(lambda first, stop: kernel(*passed, *_passed([first, stop])), groups, values.numel())
    return indices


def segments(values: Tensor, mass: Tensor, k: int) -> Tensor:
    """Do what `kmeans.segments` does, in float32 or float64 on a CPU."""
    groups, count = values.shape
    values, mass, means = values.contiguous(), mass.contiguous(), values.new_empty(groups, k)
    assert values.dtype == mass.dtype
    kernel = _kernel("edkm_segments", values.dtype)

    def work(first: int, stop: int) -> None:
        # Space for the kernel's doubles and ints.
        scratch = torch.empty(4, count + 1, dtype=torch.int64), torch.empty(k, count + 1, dtype=torch.int32)
        kernel(*_passed([count, k, values, mass, means, *scratch, first, stop]))

    _in_threads(work, groups, groups * count * k)
    return means


def columns(target: Tensor, before: Tensor, coupling: Tensor, centroids: Tensor, midpoints: Tensor, groups: int) -> Tensor:
    """Do what `gptq_tables.Tables.round_columns` does, in float32 or float64 on a CPU."""
    return _columns("edkm_columns", [len(centroids), groups], [target, before, coupling, centroids, midpoints])


def columns_of_format(
    target: Tensor,
    before: Tensor,
    coupling: Tensor,
    values: Tensor,
    midpoints: Tensor,
    block_of: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    even: bool,
) -> Tensor:
    """Do what `gptq_tables.BlockTables.round_columns` does, in float32 or float64 on a CPU."""
    tensors = [target, before, coupling, values, midpoints, block_of, scale, 0 if offset is None else offset]
    return _columns("edkm_columns_of_format", [len(values), even], tensors)


def _columns(name: str, numbers: Sequence[int], tensors: Sequence[Tensor | int]) -> Tensor:
    """Call a loop over the columns of `tensors[0]`, in threads along its rows."""
    target = tensors[0]
    assert isinstance(target, Tensor)
    assert all(x.is_contiguous() and x.dtype in (target.dtype, torch.int32) for x in tensors if isinstance(x, Tensor))
    indices = torch.empty_like(target, dtype=torch.int32)
    kernel, passed = _kernel(name, target.dtype), _passed([*target.shape, *numbers, *tensors, indices])

    def work(first: int, stop: int) -> None:
        moved = target.new_zeros(len(target), _LANES)
        kernel(*passed, *_passed([moved, first, stop]))

    _in_threads(work, target.shape[1], target.numel())
    return indices


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the kernels read or write values of a dtype."""
    return dtype if dtype == torch.bfloat16 else compute_dtype(dtype)


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Load the kernels for float32 or float64; None without a compiler."""
    # Without fused multiply-adds `segments` and `columns` round as torch does.
    return library(
        _SOURCE, "-ffp-contract=off", f"-DMOST={MOST_CENTROIDS}", f"-DLANES={_LANES}", *(["-DDOUBLE"] if dtype == torch.float64 else [])
    )


def _kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return getattr(_library(dtype), name)


def _passed(arguments: Sequence[Tensor | int]) -> list[Any]:
    return [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int64(x) for x in arguments]


def _in_threads(work: Callable[[int, int], None], count: int, size: int) -> None:
    """Call `work(first, stop)` on parts of `count` in as many threads as torch would use; ctypes releases the interpreter's lock."""
    threads = max(1, min(torch.get_num_threads(), count, size // _WEIGHTS_PER_THREAD))
    bounds = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, count)
    else:
        list(_pool(os.getpid(), threads).map(work, bounds[:-1], bounds[1:]))


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads by process: they do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="edkm")


# Building; compressed/cpu.py does it here, too.


@functools.cache
def library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """Build a C file, or find it built before, and load it; None without a compiler.

    Args:
        source: the file; it stands alone.
        flags: of the compiler, besides optimization for this machine.

    Raises:
        OSError, subprocess.SubprocessError: `FAILURES`: the compiler refused the file, or the cache cannot be written.

    Cost:
        A second or two the first time on a machine, for every set of flags.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not hasattr(os, "fork"):  # Windows: compilers and flags are others
        return None
    all_flags = [*_FLAGS, *flags]
    key = hashlib.sha256(source.read_bytes() + repr((compiler, all_flags, _TUNING, _cpu())).encode()).hexdigest()[:16]
    folder = cache_folder()
    # The size is in the name: loading a file that was cut off would end the process.
    for built in folder.glob(f"{source.stem}-{key}-*.so"):
        if built.stem.endswith(f"-{built.stat().st_size}"):
            return ctypes.CDLL(str(built))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        part = Path(work) / "part.so"
        _build([*compiler.split(), *all_flags], source, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        built = part.replace(folder / f"{source.stem}-{key}-{part.stat().st_size}.so")
    return ctypes.CDLL(str(built))


def why(error: BaseException) -> str:
    """Get the message of an error of `library`: the compiler's, if it gave one."""
    return (getattr(error, "stderr", None) or str(error)).strip()


def _build(command: list[str], source: Path, out: Path) -> None:
    *better, last = _TUNING
    for tuning in better:
        if not subprocess.run([*command, *tuning, str(source), "-lm", "-o", str(out)], capture_output=True, check=False).returncode:
            return
    subprocess.run([*command, *last, str(source), "-lm", "-o", str(out)], capture_output=True, text=True, check=True)


def _cpu() -> str:
    """Describe the processor, which the code is built for: different machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # macOS
        named = ["sysctl", "-n", "machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
        known = subprocess.run(named, capture_output=True, text=True, check=False).stdout if shutil.which("sysctl") else ""
        return platform.machine() + platform.processor() + known
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def cache_folder() -> Path:
    """Name the folder of the cache, `edkm` in `$XDG_CACHE_HOME` or `~/.cache`. Raises OSError if there is neither."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(folder) if folder else Path.home() / ".cache") / "edkm"
    except RuntimeError as error:  # a user without an entry, in a container say
        raise OSError("there is no home directory to keep a cache in. Set XDG_CACHE_HOME.") from error
