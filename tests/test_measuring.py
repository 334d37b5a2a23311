"""Guarantees of measuring memory in tests:

1. `peak_bytes` counts memory that is freed again, and that kernels allocate inside.
2. `saved_bytes` counts each storage that autograd keeps once.
"""

import torch
from torch.profiler import ProfilerActivity, profile


def saved_storages(run):
    """Return `{address: bytes}` of every storage that autograd keeps while `run()` makes its graph, and the result."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return kept, result


def saved_bytes(run, *apart_from):
    """Return the bytes kept for backward, without the storages of `apart_from`, and the result of `run`."""
    kept, result = saved_storages(run)
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    return sum(size for address, size in kept.items() if address not in known), result


def peak_bytes(run):
    """Return the most bytes that `run()` holds at one time beyond those held before, by the allocator's own events."""
    run()  # what is cached for good does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def test_peak_bytes_counts_memory_freed_again_and_allocated_inside_kernels():
    x = torch.zeros(1 << 20, dtype=torch.bfloat16)

    def run():
        y = x.float() + 1  # 4 MiB for the copy, 4 MiB for the sum
        del y
        return x.clone()

    assert 8 << 20 <= peak_bytes(run) <= (8 << 20) + 4096


def test_saved_bytes_counts_each_storage_once():
    w, x = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    kept, _ = saved_bytes(lambda: w.mT @ x + w @ x)
    assert kept == 2 * 8 * 8 * 4
    kept, _ = saved_bytes(lambda: w.mT @ x + w @ x, w)
    assert kept == 8 * 8 * 4
