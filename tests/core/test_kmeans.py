"""Where clustering starts: against the exact optimum, for tables of scalars; against random picks, for vectors."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_measuring import peak_bytes

import edkm
from edkm.core import histogram, native
from edkm.core.assign import assign, lookup
from edkm.core.kmeans import temperature_for


def optimum(values, mass, k):
    """Least `sum mass (value - centroid)^2` over all k centroids: O(u^2 k) dynamic programming in float64."""
    order = np.argsort(values, kind="stable")
    x, m = values[order] - np.average(values, weights=mass), mass[order]
    w, wx, wxx = (np.concatenate([[0.0], np.cumsum(t)]) for t in (m, m * x, m * x * x))
    total = w[None] - w[:, None]  # [from, to]
    cost = wxx[None] - wxx[:, None] - (wx[None] - wx[:, None]) ** 2 / np.where(total > 0, total, 1)
    cost = np.where(np.tri(len(w), k=-1, dtype=bool), np.inf, np.maximum(cost, 0))
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(0)
    return best[-1]


def inertia(weight, centroids, mass=None):
    """`[g]` importance-weighted sum of squared distances to the nearest centroid, by brute force in float64."""
    groups, _, d = centroids.shape
    vectors = weight.double().view(groups, -1, d, weight.shape[1]).transpose(2, 3).flatten(1, 2)  # [g, n, d]
    nearest = torch.cdist(vectors, centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(2)
    square = nearest.square()
    return (square if mass is None else square * mass.double().reshape(groups, -1)).sum(1)


def assert_near_optimal(weight, bits, groups=1, importance=None, within=1e-3):
    """So near to the optimum in every table, up to the rounding of centroids to their dtype."""
    weight = weight.bfloat16().to(weight.dtype)
    centroids = edkm.initial_centroids(weight, bits, rows_per_lut=weight.shape[0] // groups, importance=importance)
    mass = torch.ones_like(weight) if importance is None else importance.expand(weight.shape)
    found = inertia(weight, centroids, mass)
    for g in range(groups):
        values, s = (t.double().reshape(groups, -1)[g] for t in (weight, mass))
        distinct, inverse = values.unique(return_inverse=True)
        summed = torch.zeros_like(distinct).index_add_(0, inverse, s)
        if summed.sum() == 0:
            summed += torch.bincount(inverse)
        best = optimum(distinct.numpy(), summed.numpy(), 2**bits)
        slack = 1e-10 * (summed * distinct.square()).sum().item()
        assert found[g] <= best * (1 + within) + slack, (found[g].item() / best, g)


def heavy(generator, rows, cols):
    """Student's t, 4 degrees of freedom."""
    squares = torch.randn(4, rows, cols, generator=generator).square().mean(0)
    return torch.randn(rows, cols, generator=generator) / squares.sqrt()


def bimodal(generator, rows, cols):
    return torch.randn(rows, cols, generator=generator) * 0.1 + torch.randn(rows, cols, generator=generator).sign()


def normal(generator, rows, cols):
    return torch.randn(rows, cols, generator=generator)


def uniform(generator, rows, cols):
    return torch.rand(rows, cols, generator=generator)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [normal, uniform, heavy, bimodal])
@pytest.mark.parametrize("weighted", [False, True])
def test_within_a_thousandth_of_the_optimum(bits, shape, weighted, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    generator = torch.Generator().manual_seed(bits)
    weight = shape(generator, 4, 140)
    columns = torch.randn(1, 140, generator=generator).square() if weighted else None
    assert_near_optimal(weight, bits, importance=columns)
    assert_near_optimal(weight, bits, groups=4, importance=columns)


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [normal, uniform, heavy, bimodal])
@pytest.mark.parametrize("weighted", [False, True])
def test_with_a_compiler_it_is_the_optimum(bits, shape, weighted):
    generator = torch.Generator().manual_seed(bits)
    weight = shape(generator, 4, 140).double()
    columns = torch.randn(1, 140, generator=generator).double().relu() if weighted else None  # half of them count for nothing
    for groups in (1, 4):
        assert_near_optimal(weight, bits, groups, columns, within=1e-9)


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize("m, k", [(1, 1), (1, 4), (3, 4), (5, 1), (300, 256)])
def test_means_of_segments_ascend_within_the_values(m, k):
    values = torch.rand(3, m).sort(1).values
    means = native.segments(values, torch.rand(3, m), k)
    assert means.shape == (3, k) and means.dtype == values.dtype and (means.diff(dim=1) >= 0).all()
    assert (means[:, 0] >= values[:, 0]).all() and (means[:, -1] <= values[:, -1]).all()
    if k == m == 1:
        assert torch.equal(means, values)


@pytest.mark.parametrize("available", [True, False])
def test_quick_is_near(available, monkeypatch):
    if not available:
        monkeypatch.setattr(native, "available", lambda: False)
    weight = heavy(torch.Generator().manual_seed(0), 6, 500).double()
    best, quick = (inertia(weight, edkm.initial_centroids(weight, 3, rows_per_lut=1, quick=quick)) for quick in (False, True))
    assert (quick < best * (1 + (1e-9 if native.available() else 0.1))).all()


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-8, 8, width=16), min_size=16, max_size=120),
    bits=st.integers(1, 4),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
    search=st.sampled_from(["native", "torch"]),
)
def test_a_lloyd_step_gains_nothing_on_anything(values, bits, weighted, seed, search):
    # On a few arbitrary values the optimum is not always found, but always a local one.
    weight = torch.tensor([values], dtype=torch.float64).bfloat16().double()
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(weight.shape, generator=generator).double() + 0.01 if weighted else torch.ones_like(weight)
    with mock.patch.object(native, "available", native.available if search == "native" else lambda: False):
        centroids = edkm.initial_centroids(weight, bits, importance=importance)
    indices = assign(weight, centroids).long().flatten()
    mass = torch.bincount(indices, importance.flatten(), minlength=2**bits)
    total = torch.bincount(indices, (importance * weight).flatten(), minlength=2**bits)
    better = torch.where(mass > 0, total / mass, centroids.flatten()).sort().values.view_as(centroids)
    before, after = (inertia(weight, c, importance) for c in (centroids, better))
    assert before <= after * 1.001 + 1e-10 * weight.square().sum()


def test_8_bits_are_a_fixed_point_and_better_than_even_steps():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    centroids = edkm.initial_centroids(weight, 8)
    even = torch.linspace(weight.min().item(), weight.max().item(), 256, dtype=torch.float64).view(1, -1, 1)
    assert inertia(weight, centroids) < 0.5 * inertia(weight, even)
    indices = assign(weight, centroids).long().flatten()
    counts = torch.bincount(indices, minlength=256)
    means = torch.bincount(indices, weight.flatten(), minlength=256) / counts
    moved = (means - centroids.flatten())[counts > 0].square() * counts[counts > 0]
    assert moved.sum() < 1e-3 * inertia(weight, centroids)


def test_chunks_of_groups_are_the_same_tables(monkeypatch):
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(12, 40, generator=torch.Generator().manual_seed(1))
    together = edkm.initial_centroids(weight, 2, rows_per_lut=2, importance=importance)
    monkeypatch.setattr(histogram, "CHUNK_WEIGHTS", 160)
    monkeypatch.setattr(histogram, "BLOCK_WEIGHTS", 40)
    apart = edkm.initial_centroids(weight, 2, rows_per_lut=2, importance=importance)
    assert torch.allclose(together, apart, rtol=1e-6)
    for g in range(6):
        rows = slice(2 * g, 2 * g + 2)
        alone = edkm.initial_centroids(weight[rows], 2, importance=importance[rows])
        assert torch.allclose(alone[0], apart[g], rtol=1e-6)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shape_dtype_and_order(dim, dtype):
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    centroids = edkm.initial_centroids(weight, 2, dim=dim, rows_per_lut=4)
    assert centroids.shape == (2, 4, dim)
    assert centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dim == 1:
        assert (centroids.diff(dim=1) >= 0).all()


def test_fewer_distinct_values_than_centroids():
    weight = torch.tensor([[1.0, -2.0, 1.0, 0.5] * 4])
    centroids = edkm.initial_centroids(weight, 3)
    assert set(centroids.flatten().tolist()) >= {-2.0, 0.5, 1.0}
    assert inertia(weight, centroids) == 0
    assert inertia(torch.cat([weight, weight]), edkm.initial_centroids(torch.cat([weight, weight]), 3, dim=2)) == 0


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("value", [0.0, 0.3, -5.0])
def test_all_equal(dim, value):
    weight = torch.full((4, 8), value).bfloat16().float()
    centroids = edkm.initial_centroids(weight, 2, dim=dim)
    assert torch.allclose(centroids, weight[0, 0].expand_as(centroids), rtol=1e-6)
    for softness in (0.5, 1e-6):
        assert (temperature_for(weight, centroids, None, softness) > 0).all()


@pytest.mark.parametrize("dim", [1, 2])
def test_group_without_importance_is_clustered_by_density(dim):
    weight = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(8, 30)
    importance[:4] = 0
    with_zeros = edkm.initial_centroids(weight, 2, dim=dim, rows_per_lut=4, importance=importance)
    without = edkm.initial_centroids(weight, 2, dim=dim, rows_per_lut=4)
    assert torch.allclose(with_zeros, without, rtol=1e-6)


def test_values_without_importance_do_not_count():
    weight = torch.cat([torch.randn(1, 40, generator=torch.Generator().manual_seed(0)), torch.full((1, 40), 50.0)])
    importance = torch.tensor([[1.0], [0.0]])
    centroids = edkm.initial_centroids(weight, 2, importance=importance)
    alone = edkm.initial_centroids(weight[:1], 2)
    used = inertia(weight, centroids, importance.expand(2, 40))
    assert used <= inertia(weight[:1], alone) * (1 + 1e-6)


@pytest.mark.parametrize("dim", [1, 2])
def test_deterministic_whatever_the_global_seed(dim):
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(edkm.initial_centroids(weight, 3, dim=dim))
    assert torch.equal(*results)


@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_vectors_beat_random_picks_and_rest(dim, weighted):
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(8 * dim, 100, generator=generator)
    importance = torch.rand(8 * dim, 100, generator=generator) if weighted else None
    mass = None if importance is None else importance.view(-1, dim, 100).mean(1)
    centroids = edkm.initial_centroids(weight, 4, dim=dim, importance=importance)
    mine = inertia(weight, centroids, mass)
    vectors = weight.view(-1, dim, 100).transpose(1, 2).flatten(0, 1)
    picks = [vectors[torch.randperm(len(vectors), generator=generator)[:16]] for _ in range(20)]
    assert mine < 0.9 * min(inertia(weight, pick.unsqueeze(0), mass) for pick in picks)


def test_lloyd_never_makes_it_worse(monkeypatch):
    from edkm.core import kmeans as module

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    path = []
    for steps in (0, 1, 2, 5, 20):
        monkeypatch.setattr(module, "_VECTOR_STEPS", steps)
        path.append(inertia(weight, edkm.initial_centroids(weight, 4, dim=2)).item())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(path))
    assert path[-1] < 0.9 * path[0]


def test_memory_is_that_of_blocks_and_tables():
    # 256 centroids for 524,288 weights: a map would be 512 MiB in float32.
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert peak_bytes(lambda: edkm.initial_centroids(weight, 8)) < 64 << 20


def test_memory_for_vectors_is_that_of_blocks(monkeypatch):
    from edkm.core import kmeans as module

    monkeypatch.setattr(module, "_VECTOR_BLOCK", 1 << 18)
    monkeypatch.setattr(module, "_VECTOR_STEPS", 2)
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    # A map of all 32,768 vectors and 256 centroids would be 32 MiB.
    assert peak_bytes(lambda: edkm.initial_centroids(weight, 8, dim=2)) < 8 << 20


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"^bits: an index has 1 to 8 bits, got {bits}"):
        edkm.initial_centroids(torch.randn(8, 8), bits)


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.ones(10, 8), {"rows_per_lut": 4}, r"weight: 10 rows do not divide into tables of 4 rows \(\[10, 8\]\)"),
        (torch.ones(8, 8), {"rows_per_lut": 0}, "weight: 8 rows do not divide into tables of 0 rows"),
        (torch.ones(8, 8), {"dim": 3}, "weight: 8 rows do not divide into 1 tables of vectors of 3 rows"),
        (torch.ones(4, 1), {}, "weight: 8 centroids need at least 8 weights, got 4.*fewer bits"),
        (torch.ones(8, 8, 2), {}, r"weight: clustering takes a floating-point matrix.*\[8, 8, 2\]"),
        (torch.ones(8, 8).int(), {}, "weight: clustering takes a floating-point matrix"),
        (torch.full((8, 8), torch.nan), {}, "weight: NaN or infinite"),
        (torch.full((8, 8), torch.inf), {"dim": 2}, "weight: NaN or infinite"),
        (torch.ones(8, 8), {"importance": torch.ones(3)}, r"importance: \[3\] does not broadcast.*\[1, cols\]"),
    ],
)
def test_errors(weight, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        edkm.initial_centroids(weight, 3, **options)


# Temperature.


@pytest.mark.parametrize("dim, weighted", [(1, False), (1, True), (2, False), (2, True)])
def test_temperature_is_the_weighted_mean_square_error(dim, weighted):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 50, generator=generator, dtype=torch.float64)
    importance = torch.rand(8, 50, generator=generator, dtype=torch.float64) if weighted else None
    centroids = edkm.initial_centroids(weight, 2, dim=dim, rows_per_lut=4, importance=importance)
    mass = torch.ones(8 // dim, 50) if importance is None else importance.view(-1, dim, 50).mean(1)
    expected = 2 * 0.3 * inertia(weight, centroids, mass) / mass.double().view(2, -1).sum(1)
    assert torch.allclose(temperature_for(weight, centroids, importance, 0.3), expected, rtol=1e-12)


def test_temperature_goes_with_the_square_of_the_weights():
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    centroids = edkm.initial_centroids(weight, 3, rows_per_lut=2)
    tau = temperature_for(weight, centroids, None, 0.5)
    assert (tau > 0).all() and tau.shape == (4,)
    assert torch.equal(temperature_for(weight * 4, centroids * 4, None, 0.5), tau * 16)
    assert torch.allclose(temperature_for(weight, centroids, None, 0.25), tau / 2)


def test_temperature_of_weights_on_centroids_is_small_and_positive():
    weight = torch.tensor([[1.0, -1.0, 0.0, 2.0]])
    centroids = edkm.initial_centroids(weight, 2)
    assert torch.equal(lookup(assign(weight, centroids), centroids), weight)
    tau = temperature_for(weight, centroids, None, 0.5)
    assert 0 < tau < 1e-5
    soft = edkm.cluster(weight, centroids, temperature=tau).weight
    assert torch.allclose(soft, weight, atol=1e-6)


def test_temperature_without_importance_anywhere():
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    centroids = edkm.initial_centroids(weight, 2)
    plain = temperature_for(weight, centroids, None, 0.5)
    assert torch.allclose(temperature_for(weight, centroids, torch.zeros(1, 20), 0.5), plain)
