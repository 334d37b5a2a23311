"""Measure the memory of a piece of code: bytes kept for backward, and the most held at one time."""

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
