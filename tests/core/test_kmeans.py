"""`edkm.initial_centroids` and the temperature:

1. tables of scalars are the optimum of weighted k-means, and those of vectors better than random picks;
2. tables are the same to the bit with and without a C compiler;
3. they ascend, whatever the dtype, ties, and weights without importance, and depend on no seed;
4. memory is that of blocks and histograms;
5. the temperature is the weighted mean square error, and positive;
6. errors name the argument, the rule and the remedy.
"""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import peak_bytes

import edkm
from edkm.core import kmeans, native
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


def assert_optimal(weight, bits, groups=1, importance=None):
    """Compare with the optimum in every table, up to rounding."""
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
        assert found[g] <= best * (1 + 1e-9) + slack, (found[g].item() / best, g)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def draw(kind, generator, *shape):
    """Weights of a distribution; `heavy` is Student's t with 4 degrees of freedom."""

    one, other = torch.randn(2, *shape, generator=generator)
    if kind == "heavy":
        return one / torch.randn(4, *shape, generator=generator).square().mean(0).sqrt()
    return {
        "normal": one,
        "uniform": torch.rand(shape, generator=generator),
        "bimodal": one * 0.1 + other.sign(),
        "repeated": (one * 2).round() / 2,
    }[kind]


@pytest.fixture(params=["C", "numpy"])
def search(request, monkeypatch):
    """With a compiler and without one."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("no C compiler")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "bimodal"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_are_the_optimum(bits, kind, weighted, search):
    generator = torch.Generator().manual_seed(bits)
    weight = draw(kind, generator, 4, 140).double()
    columns = torch.randn(1, 140, generator=generator).double().relu() if weighted else None  # half of them count for nothing
    for groups in (1, 4):
        assert_optimal(weight, bits, groups, columns)


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    m=st.integers(1, 200),
    k=st.integers(1, 40),
    kind=st.sampled_from(["normal", "heavy", "bimodal", "repeated"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    zeros=st.booleans(),
    block=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_tables_are_the_same_to_the_bit_without_a_compiler(groups, m, k, kind, dtype, zeros, block, seed):
    generator = torch.Generator().manual_seed(seed)
    values, mass = draw(kind, generator, groups, m).to(dtype).sort(1).values, torch.rand(groups, m, generator=generator).to(dtype)
    if zeros:
        mass[:, 1:] *= mass[:, 1:] > 0.5
    with mock.patch.object(kmeans, "_BLOCK_VALUES", block):
        assert torch.equal(kmeans.segments(values, mass, k), native.segments(values, mass, k))


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize("rows_per_lut", [1, 512])
def test_start_tables_are_the_same_to_the_bit_without_a_compiler(rows_per_lut, monkeypatch):
    weight, importance = normal(512, 256), torch.rand(1, 256)
    with_compiler = edkm.initial_centroids(weight, 3, rows_per_lut=rows_per_lut, importance=importance)
    monkeypatch.setattr(native, "available", lambda: False)
    assert torch.equal(edkm.initial_centroids(weight, 3, rows_per_lut=rows_per_lut, importance=importance), with_compiler)


@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "repeated"])
@pytest.mark.parametrize("bits, rows_per_lut", [(2, 1), (4, 4)])
def test_tables_from_bins_are_nearly_the_optimum(kind, bits, rows_per_lut, search):
    generator = torch.Generator().manual_seed(bits)
    weight, columns = draw(kind, generator, 8, 800), torch.rand(1, 800, generator=generator)
    weight[0] = 0.25  # one value
    columns[:, :9] = 0
    found = [edkm.initial_centroids(weight, bits, rows_per_lut=rows_per_lut, importance=columns, exact=exact) for exact in (True, False)]
    assert (found[1].diff(dim=1) >= 0).all()
    least, rough = (float(inertia(weight, lut, columns.expand(weight.shape)).sum()) for lut in found)
    assert rough == pytest.approx(least, rel=0.05) and not torch.equal(*found)


@pytest.mark.parametrize("m, k", [(1, 1), (1, 4), (3, 4), (5, 1), (300, 256)])
def test_means_of_segments_ascend_within_the_values(m, k):
    values = torch.rand(3, m).sort(1).values
    means = kmeans.segments(values, torch.rand(3, m), k)
    assert means.shape == (3, k) and means.dtype == values.dtype and (means.diff(dim=1) >= 0).all()
    assert (means[:, 0] >= values[:, 0]).all() and (means[:, -1] <= values[:, -1]).all()
    if k == m == 1:
        assert torch.equal(means, values)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-8, 8, width=16), min_size=16, max_size=120),
    bits=st.integers(1, 4),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_tables_are_the_optimum_for_any_values(values, bits, weighted, seed):
    weight = torch.tensor([values], dtype=torch.float64)
    importance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).double() + 0.01 if weighted else None
    assert_optimal(weight, bits, importance=importance)


def test_8_bits_are_a_fixed_point_and_better_than_even_steps():
    weight = normal(64, 256).bfloat16().double()
    centroids = edkm.initial_centroids(weight, 8)
    even = torch.linspace(weight.min().item(), weight.max().item(), 256, dtype=torch.float64).view(1, -1, 1)
    assert inertia(weight, centroids) < 0.5 * inertia(weight, even)
    indices = assign(weight, centroids).long().flatten()
    counts = torch.bincount(indices, minlength=256)
    means = torch.bincount(indices, weight.flatten(), minlength=256) / counts
    moved = (means - centroids.flatten())[counts > 0].square() * counts[counts > 0]
    assert moved.sum() < 1e-3 * inertia(weight, centroids)


def test_tables_are_independent():
    weight = normal(12, 40).bfloat16().float()
    importance = torch.rand(12, 40, generator=torch.Generator().manual_seed(1))
    together = edkm.initial_centroids(weight, 2, rows_per_lut=2, importance=importance)
    for g in range(6):
        rows = slice(2 * g, 2 * g + 2)
        assert torch.equal(edkm.initial_centroids(weight[rows], 2, importance=importance[rows])[0], together[g])


def test_large_tables_are_found_by_their_histogram():
    weight = normal(2 * 257, 256)
    importance = torch.rand(1, 256, generator=torch.Generator().manual_seed(1))
    found = edkm.initial_centroids(weight, 2, rows_per_lut=257, importance=importance)
    for g in range(2):
        rows = weight[257 * g : 257 * (g + 1)].bfloat16().float()
        values, order = rows.flatten().sort()
        mass = importance.expand(rows.shape).flatten()[order]
        exact = kmeans.segments(values.double().unsqueeze(0), mass.double().unsqueeze(0), 4)
        assert torch.allclose(found[g, :, 0].double(), exact[0], rtol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shape_dtype_and_order(dim, dtype):
    weight = normal(8, 20).to(dtype)
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
@pytest.mark.parametrize("cols", [30, 17_000])
def test_group_without_importance_is_clustered_by_density(dim, cols):
    weight = normal(8, cols)
    importance = torch.ones(8, cols)
    importance[:4] = 0
    with_zeros = edkm.initial_centroids(weight, 2, dim=dim, rows_per_lut=4, importance=importance)
    without = edkm.initial_centroids(weight, 2, dim=dim, rows_per_lut=4)
    assert torch.allclose(with_zeros, without, rtol=1e-6)


@pytest.mark.parametrize("dim", [1, 2])
def test_deterministic_whatever_the_global_seed(dim):
    weight = normal(16, 40)
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
    weight = normal(32, 64)
    path = []
    for steps in (0, 1, 2, 5, 20):
        monkeypatch.setattr(kmeans, "_VECTOR_STEPS", steps)
        path.append(inertia(weight, edkm.initial_centroids(weight, 4, dim=2)).item())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(path))
    assert path[-1] < 0.9 * path[0]


def test_memory_is_that_of_blocks_and_tables():
    # 256 centroids for 524,288 weights: a map would be 512 MiB in float32.
    weight = normal(512, 1024).bfloat16()
    assert peak_bytes(lambda: edkm.initial_centroids(weight, 8)) < 64 << 20


def test_memory_for_vectors_is_that_of_blocks(monkeypatch):
    monkeypatch.setattr(kmeans, "_VECTOR_BLOCK", 1 << 18)
    monkeypatch.setattr(kmeans, "_VECTOR_STEPS", 2)
    weight = normal(64, 1024)
    # A map of all 32,768 vectors and 256 centroids would be 32 MiB.
    assert peak_bytes(lambda: edkm.initial_centroids(weight, 8, dim=2)) < 8 << 20


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.ones(8, 8), {"bits": 0}, "bits: an index has 1 to 8 bits, got 0"),
        (torch.ones(8, 8), {"bits": 9}, "bits: an index has 1 to 8 bits, got 9"),
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
        edkm.initial_centroids(weight, **{"bits": 3, **options})


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
    weight = normal(8, 50)
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
    weight = normal(4, 20)
    centroids = edkm.initial_centroids(weight, 2)
    plain = temperature_for(weight, centroids, None, 0.5)
    assert torch.allclose(temperature_for(weight, centroids, torch.zeros(1, 20), 0.5), plain)
