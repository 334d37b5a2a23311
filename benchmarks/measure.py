"""Measure seconds, bytes kept for backward and peak memory of a forward and backward."""

from __future__ import annotations

import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def seconds(run: Callable[[], None], device: str, repeats: int) -> tuple[float, float]:
    """Measure `(median, difference of the quartiles)` of the seconds of runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    times = sorted(times[1:])
    return statistics.median(times), times[(3 * len(times)) // 4] - times[len(times) // 4]


def kept_bytes(forward: Callable[[], Tensor], free: set[int]) -> int:
    """Count the bytes of the distinct storages that `forward` saves for backward, but for storages in `free` (the weight itself)."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The output is held until the end: a storage that is freed could lend its address to another.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    kept = sum(storages.values())
    del out
    return kept


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """Measure peak memory of one run above the memory in use before.

    On a CPU, growth of the resident set: memory that the allocator already holds from earlier runs does not show, so small figures
    mean little.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    peak, done = _resident(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak - before


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return 0
    return pages * 4096


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, str | int]:
    """Describe the machine and the versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write(path: Path | None, result: dict) -> None:
    """Write a result as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")
