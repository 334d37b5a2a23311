"""Guarantees of measuring memory in tests:

1. `peak_bytes` counts memory that is freed again, and that kernels allocate inside.
2. `saved_bytes` counts each storage that autograd keeps once.
"""

import torch
from measuring import peak_bytes, saved_bytes


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
