"""The most memory that this process has taken so far."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_mib() -> float:
    """Largest resident set of this process. Not `ru_maxrss`, which a process inherits from the one that started it."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def peak_gpu_mib() -> float | None:
    """Most memory that this process's tensors took on a GPU; None if it used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated() / 2**20
