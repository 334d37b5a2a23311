"""Guarantees of edkm.offload.function_of:

1. A map declared to be a function of a 16-bit weight is kept as a table and an index, where that is smaller; gradients are equal.
2. All maps of one weight share the index, as long as the weight does not change.
3. A map that is not such a function is refused, bit for bit; tensors of other shapes are not concerned.
"""

from contextlib import nullcontext

import pytest
import torch
from saving import assert_accounted, restore, save

from edkm.core import reference
from edkm.offload import function_of, saved_tensors


def weights(*shape, dtype=torch.bfloat16, distinct=50):
    torch.manual_seed(0)
    return (torch.randint(distinct, shape) / 16 - 1).to(dtype)


def distinct_of(w):
    return len(w.bfloat16().view(torch.int16).unique())


def clustering(dtype, block, declared, rows=128):
    """Gradient of dense DKM with one table, and the block's stats."""
    torch.manual_seed(0)
    w = torch.randn(rows, 64).to(dtype).requires_grad_()
    centroids = torch.linspace(-2, 2, 8).view(1, 8, 1)
    with block as stats, declared(w):
        out, _ = reference.cluster(w, centroids, reference.Problem(torch.tensor([0.1])), 3)
    kept = stats.kept_bytes
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert stats.kept_bytes == 0
    assert_accounted(stats)
    return w.grad, kept, w.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("marshal", [True, False])
def test_clustering_with_one_table_is_kept_small_and_equal(dtype, marshal):
    plain, dense, _ = clustering(dtype, saved_tensors(marshal=marshal), lambda w: function_of(w.new_ones(1)), rows=512)
    ours, kept, w = clustering(dtype, saved_tensors(marshal=marshal), function_of, rows=512)
    assert torch.equal(ours, plain)
    u = len((w if dtype.itemsize == 2 else w.bfloat16()).view(torch.int16).unique())
    # 344 bytes per weight become 344 per distinct value and an index of 2 per weight.
    assert kept < 344 * u + 2 * w.numel() + 2000 < dense * 0.4


def test_without_uniquify_the_declaration_does_nothing():
    _, dense, _ = clustering(torch.bfloat16, saved_tensors(uniquify=False), function_of)
    _, same, _ = clustering(torch.bfloat16, saved_tensors(), lambda w: function_of(w.new_ones(1)))
    assert dense == same
    w = weights(64, 64).requires_grad_()
    with function_of(w):
        assert torch.equal(torch.autograd.grad(w.float().exp().sum(), w)[0], w.float().exp().bfloat16())


@pytest.mark.parametrize(
    "shape",
    [
        lambda f: f.view(-1),
        lambda f: f,
        lambda f: f.view(1, -1, 1).expand(1, -1, 4).contiguous(),
        lambda f: f.view(1, -1, 1).expand(1, -1, 4).contiguous().transpose(1, 2),
        lambda f: f.view(1, -1, 1).expand(1, -1, 4).transpose(1, 2).contiguous(),
        lambda f: f.unsqueeze(-1).expand(*f.shape, 3).contiguous(),
        lambda f: f.view(-1, 1).repeat(1, 6)[:, ::2],
        lambda f: f.double().view(-1),
        lambda f: f > 0,
        lambda f: f.view(1, -1, 1).expand(1, -1, 4),
    ],
)
@pytest.mark.parametrize("marshal", [True, False])
def test_maps_of_every_shape_become_tables(shape, marshal):
    w = weights(100, 20)
    m = shape(w.float().exp())
    with saved_tensors(marshal=marshal) as stats, function_of(w):
        # The first map pays for the index.
        y = save(w.double().view(-1, 1).expand(-1, 3).contiguous(), m)
    rows = (3 * 8 + (m if not marshal else m[..., :1] if m.stride(-1) == 0 else m).nbytes // 2000) * distinct_of(w)
    assert stats.copied_bytes == 2 * 2000 + rows
    restored = restore(y)[1]
    assert torch.equal(restored, m) and restored.stride() == m.stride() and restored.dtype == m.dtype
    assert stats.kept_bytes == 0


def test_a_weight_may_have_all_65536_values():
    w = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).repeat(3)
    m = torch.arange(w.numel(), dtype=torch.int32).remainder(65536).view(-1, 1).expand(-1, 8).contiguous()
    with saved_tensors() as stats, function_of(w):
        y = save(m)
    assert stats.copied_bytes == m.nbytes // 3 + 2 * w.numel()
    assert torch.equal(restore(y)[0], m)


def test_nan_and_signed_zero_are_values():
    w = torch.tensor([0.0, -0.0, float("nan"), 1.0]).repeat(500).bfloat16()
    m = torch.stack([1 / w.float()] * 4, 1)
    assert not torch.equal(m, m)
    with saved_tensors() as stats, function_of(w):
        y = save(m)
    assert stats.copied_bytes == 4 * 16 + 2 * 2000
    assert torch.equal(restore(y)[0].view(torch.int32), m.view(torch.int32))


def test_views_of_a_map_share_its_table():
    w = weights(1000)
    m = w.float().view(1, -1, 1).expand(1, -1, 8).contiguous()
    with saved_tensors() as stats, function_of(w):
        y = save(m, m.transpose(1, 2), m.clone(), m[:, 10:20])
    assert stats.copied_bytes == 2 * 1000 + distinct_of(w) * 32
    restored = restore(y)
    assert torch.equal(restored[2], m) and torch.equal(restored[3], m[:, 10:20])


@pytest.mark.parametrize("change", ["add_", "data"])
@pytest.mark.parametrize("declared_once", [True, False])
def test_maps_share_an_index_until_the_weight_changes(change, declared_once):
    w = weights(1000)
    with saved_tensors() as stats, function_of(w) if declared_once else nullcontext():
        maps, outputs, sizes = [], [], []
        for i in range(4):
            if i == 2:
                (w if change == "add_" else w.data).mul_(-1.5)
            with nullcontext() if declared_once else function_of(w):
                maps.append(torch.stack([w.float() * i] * 9, 1))
                outputs.append(save(maps[-1]))
            sizes.append(stats.copied_bytes - sum(sizes))
    table = 36 * distinct_of(w)
    assert sizes == [table + 2000, table, table + 2000, table]
    for m, y in zip(maps, outputs, strict=True):
        assert torch.equal(restore(y)[0], m)
    del outputs, y
    assert stats.kept_bytes == 0


@pytest.mark.parametrize(
    ("w", "shapes"),
    [
        (weights(1000), [(999, 8), (8, 500), (1001,)]),
        # Of 1,000 distinct values table and index are larger than the map, which is then not a matter of the declaration either.
        (torch.arange(900, 1900).to(torch.int16).view(torch.bfloat16), [(1000,)]),
    ],
)
def test_other_shapes_are_not_concerned_and_no_table_is_larger_than_its_map(w, shapes):
    noise = [torch.rand(shape) for shape in shapes]
    with saved_tensors() as stats, function_of(w):
        y = save(*noise)
    assert stats.copied_bytes == sum(t.nbytes for t in noise) and stats.avoided_bytes["uniquify"] == 0
    del y


@pytest.mark.parametrize("marshal", [True, False])
def test_a_map_that_is_not_a_function_is_refused(marshal):
    w = weights(50, 40)
    noise = torch.stack([w.float().view(1, -1)] * 8, 2)
    noise[0, 1234, 5] += 1e-6  # one row of two thousand
    message = (
        r"function_of: saved tensor \[1, 2000, 8\] torch.float32: has a row per element of the weight \[50, 40\], so equal weights "
        r"\(as torch.bfloat16\) must have equal rows, and they do not. Compute it outside of function_of, or use "
        r"saved_tensors\(uniquify=False\)"
    )
    with saved_tensors(marshal=marshal) as stats:
        with pytest.raises(ValueError, match=message), function_of(w):
            save(noise)
        y = save(noise)
    assert stats.kept_bytes == noise.nbytes
    del y


def test_a_wider_weight_counts_by_its_rounding():
    w = torch.rand(1000) + 1  # 129 bfloat16 values, all distinct in float32
    with saved_tensors() as stats:
        with function_of(w, round_to=torch.bfloat16):
            y = save(torch.stack([w.bfloat16().float()] * 4, 1))
        with pytest.raises(ValueError, match=r"as torch\.float16"), function_of(w, round_to=torch.float16):
            save(torch.stack([w] * 40, 1))
    assert stats.avoided_bytes["uniquify"] > 10_000
    del y


def test_several_weights_may_be_declared_at_once():
    a, b = weights(1000), weights(600)
    maps = torch.stack([a.float()] * 8, 1), torch.stack([b.float()] * 8, 1)
    with saved_tensors() as stats, function_of(a), function_of(b):
        y = save(*maps)
    assert stats.copied_bytes == 2 * 1600 + 32 * (distinct_of(a) + distinct_of(b))
    assert all(map(torch.equal, restore(y), maps))


def test_arguments_of_wrong_types_are_refused():
    plain = r"needs a plain strided tensor of floating-point numbers, got Tensor of torch\."
    for weight, round_to, message in (
        (torch.arange(3), torch.bfloat16, rf"weight \[3\]: {plain}strided and torch.int64"),
        (torch.eye(4).to_sparse(), torch.bfloat16, rf"weight \[4, 4\]: {plain}sparse_coo and torch.float32"),
        (torch.rand(3), torch.float32, r"round_to=torch\.float32: needs a 16-bit type"),
    ):
        with pytest.raises(TypeError, match=message), function_of(weight, round_to=round_to):
            pass
