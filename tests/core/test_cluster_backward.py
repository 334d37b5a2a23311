"""`edkm.cluster` in PyTorch's autograd and compiler:

1. backward keeps the weight and the centroids of each iteration, the reference all assignments;
2. memory peaks at 16 bytes a weight with `histogram`, at a block with `blocks`;
3. torch.compile gives the same bits without a graph break, and the operations are registered properly;
4. only the weight gets a gradient.
"""

import pytest
import torch
from measuring import peak_bytes, saved_bytes, saved_storages
from problems import FAST, make

import edkm
from edkm.core import blocks, op

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
    _, trajectory = op._cluster(weight, importance, centroids, temperature, None, 3, *how)
    calls = {
        op._cluster: (weight.clone().requires_grad_(), importance, centroids, temperature, None, 3, *how),
        op._cluster_adjoint: (upstream, weight, importance, trajectory, temperature, None, *how),
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
