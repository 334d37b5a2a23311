"""Hard assignment:

1. `assign` is brute force, ties go to the lower index, and weights beyond a table take its ends;
2. `lookup` is indexing, and a looked-up weight is assigned to itself;
3. tables are stored in float16, and one that does not fit is refused by value.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm.core import assign as module
from edkm.core.assign import Frozen, assign, lookup, round_lut


def nearest(weight, lut):
    """Indices by comparing every vector with every centroid in float64, the lower index on a tie."""
    groups, k, d = lut.shape
    rows, cols = weight.shape
    vectors = weight.double().view(groups, -1, d, cols)
    out = torch.empty(rows // d, cols, dtype=torch.uint8)
    for g in range(groups):
        for v in range(vectors.shape[1]):
            for c in range(cols):
                distances = [float((vectors[g, v, :, c] - lut[g, j].double()).square().sum()) for j in range(k)]
                out[g * vectors.shape[1] + v, c] = distances.index(min(distances))
    return out


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    d=st.integers(1, 3),
    vectors=st.integers(1, 3),
    cols=st.integers(1, 5),
    bits=st.integers(1, 3),
    step=st.sampled_from([0.25, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    block=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_assign_is_brute_force_ties_included(groups, d, vectors, cols, bits, step, dtype, block, seed):
    # On a grid distances are exact, so that ties are ties.
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(groups * d * vectors, cols, generator=generator) / step).round().mul(step).to(dtype)
    lut = round_lut((torch.randn(groups, 2**bits, d, generator=generator) / step).round() * step)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "_BLOCK_WEIGHTS", block)
        indices, expected = assign(weight, lut), nearest(weight, lut)
    # A table that repeats a centroid has several indices for one value.
    assert torch.equal(lookup(indices, lut), lookup(expected, lut))
    repeats = any(len(table.unique(dim=0)) < len(table) for table in lut)
    assert repeats or torch.equal(indices, expected)


def test_a_tie_takes_the_lower_index():
    weight = torch.tensor([[0.5, -0.5, 1.5]])
    assert assign(weight, torch.tensor([[[-1.0], [0.0], [1.0], [2.0]]])).tolist() == [[1, 0, 2]]
    pairs = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [5.0, 5.0]]])
    assert assign(torch.tensor([[0.5, 1.0], [0.5, 0.0]]), pairs).tolist() == [[0, 0]]


def test_256_centroids_use_the_whole_byte():
    lut = torch.arange(256, dtype=torch.float16).view(1, 256, 1)
    weight = torch.arange(256, dtype=torch.float32).view(4, 64)
    assert torch.equal(assign(weight, lut).flatten(), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(lookup(assign(weight, lut), lut), weight)


def test_weights_beyond_the_table_take_its_ends():
    lut = torch.tensor([[[-1.0], [1.0]]])
    assert assign(torch.tensor([[-1e30, 1e30, -0.0, 3.4e38]]), lut).tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("groups, d", [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_lookup_is_indexing(groups, d, dtype):
    generator = torch.Generator().manual_seed(0)
    lut = round_lut(torch.randn(groups, 8, d, generator=generator))
    indices = torch.randint(0, 8, (groups * 4, 5), dtype=torch.uint8, generator=generator)
    weight = lookup(indices, lut, dtype)
    assert weight.shape == (groups * 4 * d, 5) and weight.dtype == dtype
    for row in range(groups * 4):
        for col in range(5):
            vector = lut[row // 4, int(indices[row, col])]
            assert torch.equal(weight[row * d : row * d + d, col], vector.to(dtype))


@pytest.mark.parametrize("d", [1, 2])
def test_a_looked_up_weight_is_assigned_to_itself(d):
    generator = torch.Generator().manual_seed(1)
    lut = round_lut(torch.randn(2, 16, d, generator=generator))
    weight = torch.randn(8, 30, generator=generator)
    hard = lookup(assign(weight, lut), lut)
    assert torch.equal(lookup(assign(hard, lut), lut), hard)
    assert not torch.equal(hard, weight)


def test_round_lut():
    centroids = torch.tensor([[[0.3], [-0.1], [2.0], [0.1]]], requires_grad=True)
    lut = round_lut(centroids)
    assert lut.dtype == torch.float16 and not lut.requires_grad
    assert torch.equal(lut[0, :, 0], torch.tensor([-0.1, 0.1, 0.3, 2.0]).half())
    pairs = torch.tensor([[[3.0, 1.0], [-1.0, 2.0]]])
    assert torch.equal(round_lut(pairs), pairs.half())


@pytest.mark.parametrize("value, shown", [(7e4, "70000"), (-1e6, "1e\\+06"), (torch.inf, "inf")])
def test_a_centroid_that_does_not_fit_float16(value, shown):
    with pytest.raises(ValueError, match=rf"^centroids: .*65504.*got a centroid of magnitude {shown}.*skip"):
        round_lut(torch.tensor([[[0.0], [value]]]))
    assert round_lut(torch.tensor([[[0.0], [65504.0]]])).max() == 65504


@pytest.mark.parametrize("k, bits", [(2, 1), (4, 2), (8, 3), (16, 4), (256, 8)])
def test_bits_of_a_frozen_tensor(k, bits):
    frozen = Frozen(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(1, k, 1), (2, 2), 0.0)
    assert frozen.bits == bits
