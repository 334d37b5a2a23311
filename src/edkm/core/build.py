"""C built on first use with the machine's compiler, in a second or two, and kept in the user's cache.

Where there is no compiler, or `EDKM_COMPILED=0`, there is no library and the callers take another way.
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
from pathlib import Path

from edkm.core.cache import cache_folder

_FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
# The first that the compiler takes. 512-bit vectors are a third faster here than the 256 that gcc prefers.
_TUNING = (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], [])
FAILURES = (OSError, subprocess.SubprocessError)


@functools.cache
def library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """A C file as a library, built now or before; None without a compiler.

    Args:
        source: the file; it stands alone.
        flags: of the compiler, besides optimization for this machine.

    Raises:
        OSError, subprocess.SubprocessError: `FAILURES`: the compiler refused the file, or the cache cannot be written.

    Cost:
        A second or two the first time on a machine, for every set of flags.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("EDKM_COMPILED") == "0" or compiler is None or not hasattr(os, "fork"):  # Windows: compilers and flags are others
        return None
    all_flags = [*_FLAGS, *flags]
    key = hashlib.sha256(source.read_bytes() + repr((compiler, all_flags, _TUNING, _cpu())).encode()).hexdigest()[:16]
    folder = cache_folder()
    # The name says how long it is: loading one that was cut off would end the process.
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
    """What went wrong in `library`, in the compiler's words if it had any."""
    return (getattr(error, "stderr", None) or str(error)).strip()


def _build(command: list[str], source: Path, out: Path) -> None:
    *better, last = _TUNING
    for tuning in better:
        if not subprocess.run([*command, *tuning, str(source), "-lm", "-o", str(out)], capture_output=True, check=False).returncode:
            return
    subprocess.run([*command, *last, str(source), "-lm", "-o", str(out)], capture_output=True, text=True, check=True)


def _cpu() -> str:
    """What the built code depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # macOS
        named = ["sysctl", "-n", "machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
        known = subprocess.run(named, capture_output=True, text=True, check=False).stdout if shutil.which("sysctl") else ""
        return platform.machine() + platform.processor() + known
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
