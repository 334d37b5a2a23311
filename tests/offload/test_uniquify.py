"""edkm.offload.function_of: maps of a 16-bit weight as tables, checked bit for bit."""

import pytest
import torch

from edkm.core import reference
from edkm.offload import function_of, saved_tensors


class Save(torch.autograd.Function):
    """Saves the tensors it is given; backward leaves in `got` what comes back."""

    got = None

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return tensors[0].detach().reshape(-1)[:1].sum()

    @staticmethod
    def backward(ctx, _):
        Save.got = [t.detach() for t in ctx.saved_tensors]
        return (None,) * len(Save.got)


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
        out, _ = reference.cluster(w, None, centroids, torch.tensor([0.1]), 3, None if dtype.itemsize == 2 else torch.bfloat16)
    kept = stats.kept_bytes
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert stats.kept_bytes == 0
    assert stats.requested_bytes == stats.copied_bytes + sum(stats.avoided_bytes.values())
    return w.grad, kept, w.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("marshal", [True, False])
def test_clustering_with_one_table(dtype, marshal):
    plain, dense, _ = clustering(dtype, saved_tensors(marshal=marshal), lambda w: function_of(w.new_ones(1)), rows=512)
    ours, kept, w = clustering(dtype, saved_tensors(marshal=marshal), function_of, rows=512)
    assert torch.equal(ours, plain)
    u = len((w if dtype.itemsize == 2 else w.bfloat16()).view(torch.int16).unique())
    # 344 bytes per weight become 344 per distinct value and an index of 2 per weight.
    assert kept < 344 * u + 2 * w.numel() + 2000 < dense * 0.4


def test_without_uniquify_it_does_nothing():
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
def test_shapes_of_maps(shape, marshal):
    w = weights(100, 20)
    m = shape(w.float().exp())
    with saved_tensors(marshal=marshal) as stats, function_of(w):
        # The first map pays for the index.
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), w.double().view(-1, 1).expand(-1, 3).contiguous(), m)
    rows = (3 * 8 + (m if not marshal else m[..., :1] if m.stride(-1) == 0 else m).nbytes // 2000) * distinct_of(w)
    assert stats.copied_bytes == 4 + 2 * 2000 + rows
    y.backward()
    assert torch.equal(Save.got[2], m) and Save.got[2].stride() == m.stride() and Save.got[2].dtype == m.dtype
    assert stats.kept_bytes == 0


def test_all_65536_values():
    w = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).repeat(3)
    m = torch.arange(w.numel(), dtype=torch.int32).remainder(65536).view(-1, 1).expand(-1, 8).contiguous()
    with saved_tensors() as stats, function_of(w):
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), m)
    assert stats.copied_bytes == 4 + m.nbytes // 3 + 2 * w.numel()
    y.backward()
    assert torch.equal(Save.got[1], m)


def test_nan_and_signed_zero_are_values():
    w = torch.tensor([0.0, -0.0, float("nan"), 1.0]).repeat(500).bfloat16()
    m = torch.stack([1 / w.float()] * 4, 1)
    assert not torch.equal(m, m)
    with saved_tensors() as stats, function_of(w):
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), m)
    assert stats.copied_bytes == 4 + 4 * 16 + 2 * 2000
    y.backward()
    assert torch.equal(Save.got[1].view(torch.int32), m.view(torch.int32))


def test_views_of_a_map_share_its_table():
    w = weights(1000)
    m = w.float().view(1, -1, 1).expand(1, -1, 8).contiguous()
    with saved_tensors() as stats, function_of(w):
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), m, m.transpose(1, 2), m.clone(), m[:, 10:20])
    assert stats.copied_bytes == 4 + 2 * 1000 + distinct_of(w) * 32
    y.backward()
    assert torch.equal(Save.got[3], m) and torch.equal(Save.got[4], m[:, 10:20])


def test_a_change_within_the_declaration():
    w, outputs, maps, start = weights(1000), [], [], torch.zeros(1, requires_grad=True)
    with saved_tensors(), function_of(w):
        for _ in range(2):
            maps.append(torch.stack([w.float()] * 9, 1))
            outputs.append(Save.apply(start.clone(), maps[-1]))
            w.data.copy_(weights(1000, distinct=30).flip(0))
    for m, y in zip(maps, outputs, strict=True):
        y.backward()
        assert torch.equal(Save.got[1], m)


@pytest.mark.parametrize("change", ["add_", "data"])
def test_one_index_per_state_of_the_weight(change):
    w, start = weights(1000), torch.zeros(1, requires_grad=True)
    with saved_tensors() as stats:
        maps, outputs, sizes = [], [], []
        for i in range(4):
            if i == 2:
                (w if change == "add_" else w.data).mul_(-1.5)
            with function_of(w):
                maps.append(torch.stack([w.float() * i] * 9, 1))
                outputs.append(Save.apply(start.clone(), maps[-1]))
            sizes.append(stats.copied_bytes - sum(sizes))
    table = 36 * distinct_of(w)
    assert sizes == [4 + table + 2000, table, table + 2000, table]
    for m, y in zip(maps, outputs, strict=True):
        y.backward()
        assert torch.equal(Save.got[1], m)
    del outputs, y
    assert stats.kept_bytes == 0


def test_not_worth_it():
    # 900 distinct values of 1,000: table and index are larger than the map, which is then not a matter of the declaration either.
    w = torch.arange(900, 1900).to(torch.int16).view(torch.bfloat16)
    with saved_tensors() as stats, function_of(w):
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), torch.rand(1000))
    assert stats.copied_bytes == 4004 and stats.avoided_bytes["uniquify"] == 0
    del y


def test_other_shapes_are_not_concerned():
    w = weights(1000)
    noise = torch.rand(999, 8), torch.rand(8, 500), torch.rand(1001)
    with saved_tensors() as stats, function_of(w):
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), *noise)
    assert stats.copied_bytes == 4 + sum(t.nbytes for t in noise)
    del y


@pytest.mark.parametrize("marshal", [True, False])
def test_what_is_not_a_function_is_refused(marshal):
    w = weights(50, 40)
    noise = torch.rand(1, 2000, 8)
    message = (
        r"function_of: saved tensor \[1, 2000, 8\] torch.float32: has a row per element of the weight \[50, 40\], so equal weights "
        r"\(as torch.bfloat16\) must have equal rows, and they do not. Compute it outside of function_of, or use "
        r"saved_tensors\(uniquify=False\)"
    )
    with saved_tensors(marshal=marshal) as stats:
        with pytest.raises(ValueError, match=message), function_of(w):
            Save.apply(torch.zeros(1, requires_grad=True).clone(), noise)
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), noise)
    assert stats.kept_bytes == 4 + noise.nbytes
    del y


def test_one_row_in_two_thousand_is_seen():
    w = weights(2000)
    m = torch.stack([w.float()] * 8, 1)
    m[1234, 5] += 1e-6
    with saved_tensors(), pytest.raises(ValueError, match="must have equal rows"), function_of(w):
        Save.apply(torch.zeros(1, requires_grad=True).clone(), m)


def test_a_wider_weight_counts_by_its_rounding():
    w = torch.rand(1000) + 1  # 129 bfloat16 values, all distinct in float32
    start = torch.zeros(1, requires_grad=True)
    with saved_tensors() as stats:
        with function_of(w, round_to=torch.bfloat16):
            y = Save.apply(start.clone(), torch.stack([w.bfloat16().float()] * 4, 1))
        with pytest.raises(ValueError, match=r"as torch\.float16"), function_of(w, round_to=torch.float16):
            Save.apply(start.clone(), torch.stack([w] * 40, 1))
    assert stats.avoided_bytes["uniquify"] > 10_000
    del y


def test_several_weights_at_once():
    a, b = weights(1000), weights(600)
    maps = torch.stack([a.float()] * 8, 1), torch.stack([b.float()] * 8, 1)
    with saved_tensors() as stats, function_of(a), function_of(b):
        y = Save.apply(torch.zeros(1, requires_grad=True).clone(), *maps)
    assert stats.copied_bytes == 4 + 2 * 1600 + 32 * (distinct_of(a) + distinct_of(b))
    y.backward()
    assert all(torch.equal(x, m) for x, m in zip(Save.got[1:], maps, strict=True))


def test_arguments():
    with pytest.raises(TypeError, match=r"weight \[3\]: needs a floating-point weight, got torch.int64"), function_of(torch.arange(3)):
        pass
    with (
        pytest.raises(TypeError, match=r"round_to=torch\.float32: needs a 16-bit type"),
        function_of(torch.rand(3), round_to=torch.float32),
    ):
        pass
    message = r"weight \[4, 4\]: needs a plain strided tensor, got Tensor of torch.sparse_coo"
    with pytest.raises(TypeError, match=message), function_of(torch.eye(4).to_sparse()):
        pass
