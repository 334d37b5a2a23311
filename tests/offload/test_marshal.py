"""Which saved tensors share a copy, for one process:

1. Views of a storage and copies of it, at most `hops` copying operations away, share one copy.
2. Tensors with other values never share one: writes are noticed, also those that version counters miss.
3. Copies that overlap, and operations without a schema, make no relation; the ledger does not grow.
"""

import gc

import pytest
import torch
from saving import activation, copied_mib, restore, save
from torch import nn

from edkm.offload import saved_tensors
from edkm.offload.hooks import WriteWatch
from edkm.offload.marshal import Ledger


def transposed_copies(n):
    def make(x):
        y = x
        for _ in range(n):
            y = y.t().contiguous()
        return x, y

    return make


# --- who shares a copy ---


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.t(),
        lambda x: x.view(-1, 1),
        lambda x: x[3:90],
        lambda x: x.unsqueeze(1).expand(1024, 2, 1024),
        lambda x: x.view(torch.int32),
        lambda x: x[:, ::2],
        lambda x: x.detach(),
        lambda x: x.clone(),
        lambda x: x.t().contiguous(),
        lambda x: x.t().reshape(-1),
        lambda x: x.to(torch.float32, copy=True),
        lambda x: torch.empty_like(x).copy_(x),
        lambda x: x[:512].clone(),
        lambda x: x.view(-1, 4).t().contiguous()[1:3],
        lambda x: x.unsqueeze(1).expand(1024, 2, 1024).contiguous(),
        lambda x: x[:, 7:300].contiguous(),
    ],
)
def test_views_share_the_copy_and_copies_are_made_again(other):
    assert copied_mib(lambda x: (x, other(x))) == 4
    assert copied_mib(lambda x: (x, other(x)), marshal=False) > 4


@pytest.mark.parametrize(
    "copy", [lambda x: x.clone(), lambda x: x.t().contiguous(), lambda x: torch.empty_like(x).copy_(x), lambda x: x.t().reshape(-1)]
)
def test_the_origin_is_made_from_a_copy_that_was_saved_first(copy):
    assert copied_mib(lambda x: (copy(x), x)) == 4
    assert copied_mib(lambda x: (copy(x), x.clone())) == 4  # two copies of one origin that is not saved


def test_a_larger_tensor_serves_a_smaller_one_and_not_the_reverse():
    assert copied_mib(lambda x: (x.expand(4, 1024, 1024).contiguous(), x)) == 16
    assert copied_mib(lambda x: (x[:512].clone(), x)) == 6


def test_four_copies_are_followed_and_a_fifth_is_not():
    with pytest.raises(ValueError, match="hops=-1: must not be negative"), saved_tensors(hops=-1):
        pass
    assert [copied_mib(transposed_copies(n)) for n in (1, 3, 4, 5)] == [4, 4, 4, 8]
    assert copied_mib(transposed_copies(5), hops=5) == 4
    assert [copied_mib(transposed_copies(n), hops=1) for n in (1, 2)] == [4, 8]
    assert copied_mib(transposed_copies(1), hops=0) == 8 and copied_mib(lambda x: (x.t(), x), hops=0) == 4

    def further(x):
        y = transposed_copies(4)(x)[1]
        return x, y, transposed_copies(3)(y)[1]

    assert copied_mib(further) == 8


def test_views_between_copies_do_not_count_and_copies_between_may_be_freed():
    def make(x):
        y = x
        for _ in range(4):
            y = y.view(512, -1).t().t().view(1024, 1024).t().contiguous()
        return x, y

    assert copied_mib(make) == 4


# --- who does not ---


def test_other_values_share_nothing():
    assert copied_mib(lambda x: (x, x * 1.0)) == 8
    assert copied_mib(lambda x: (x, x.to(torch.bfloat16))) == 6
    assert copied_mib(lambda x: (x, x.detach().roll(1))) == 8


class Named(torch.Tensor):
    """A subclass without operations of its own."""


def write_by_numpy(tensor):
    tensor.detach().numpy()[:] = 3.0
    torch.autograd.graph.increment_version(tensor)


WRITES = {
    "in place": lambda x: x.detach().add_(1.0),
    "data": lambda x: x.data.add_(1.0),
    "foreach": lambda x: torch._foreach_add_([x.data], 1.0),
    "out": lambda x: torch.add(x.data, 1.0, out=x.data),
    "copy": lambda x: x.data.copy_(torch.ones_like(x.data)),
    "index": lambda x: x.data.__setitem__(3, 7.0),
    "subclass": lambda x: x.as_subclass(Named).data.add_(1.0),
    "numpy": write_by_numpy,
}


@pytest.mark.parametrize("way", WRITES)
def test_a_tensor_that_was_written_is_copied_again(way):
    x = activation(16, 16)
    with saved_tensors() as stats:
        y = x.clone()
        saved, outputs = [], []
        for _ in range(2):
            saved.append([x.detach().clone(), y.detach().clone()])
            outputs.append(save(x, y))
            WRITES[way](x)
    # The copy of the first values stays right for `y`, which was not written.
    assert stats.copied_bytes == 2 * x.nbytes and not torch.equal(saved[0][0], saved[1][0])
    for expected, output in zip(reversed(saved), reversed(outputs), strict=True):
        assert all(map(torch.equal, restore(output), expected))


def test_a_write_by_a_sparse_tensor_is_noticed():
    sparse = torch.eye(3).to_sparse().coalesce()
    values = sparse.values()
    with saved_tensors():
        before, first = values.clone(), save(values)
        sparse.data.sin_()
        after, second = values.clone(), save(values)
    assert not torch.equal(before, after)
    assert torch.equal(restore(second)[0], after) and torch.equal(restore(first)[0], before)


def test_a_copy_that_was_written_since_is_no_copy():
    x = activation(16, 16)
    with saved_tensors() as stats:
        y = x.clone()
        first = save(x)
        y.data.mul_(2.0)
        second, expected = save(y), y.detach().clone()
    assert stats.copied_bytes == 2 * x.nbytes
    assert torch.equal(restore(second)[0], expected) and torch.equal(restore(first)[0], x)


def test_copying_within_one_storage_makes_no_copy():
    # The source is overwritten where the two overlap. Their version counters differ, so that only the storage shows the relation.
    x = activation(8)
    with saved_tensors():
        data = x.data
        data[:4].copy_(data[::2])
        y, expected = save(data[:4], x[::2]), x.detach().clone()
    assert not torch.equal(expected[:4], expected[::2])
    assert all(map(torch.equal, restore(y), (expected[:4], expected[::2])))


def test_copying_into_overlapping_windows_makes_no_copy():
    # Elements that several windows share hold what was written last.
    rows, windows = activation(5, 4), torch.zeros(8).unfold(0, 4, 1)
    with saved_tensors():
        windows.copy_(rows.detach())
        y = save(windows, rows)
    assert all(map(torch.equal, restore(y), (windows, rows)))


def test_an_operation_without_a_schema_may_write_anything():
    ledger, x, y = Ledger(hops=4), torch.zeros(3), torch.zeros(3)
    before = [ledger.content(t) for t in (x, y)]
    assert before == [ledger.content(t) for t in (x, y)]
    WriteWatch(ledger).__torch_dispatch__(lambda function, t: function(t), (), (lambda t: y.add_(1.0), x))
    assert not {*before} & {ledger.content(t) for t in (x, y)}


def test_batch_norm_in_training_writes_its_statistics():
    # Neither the schema of native_batch_norm nor a version shows it.
    torch.manual_seed(0)
    x, z = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)

    def grads(block):
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(3, momentum=0.9)
        with block:
            a = norm(x).square().sum()
            b = norm.eval()(z).square().sum()
        return torch.autograd.grad(a + b, [x, z])

    assert all(map(torch.equal, grads(saved_tensors()), grads(torch.enable_grad())))


def test_an_address_used_again_is_another_storage():
    base, addresses = activation(1024), set()

    def one(i):
        x = base * float(i)
        addresses.add(x.untyped_storage()._cdata)
        return save(x)

    for i in range(50):
        one(i)
    assert len(addresses) < 50
    with saved_tensors() as stats:
        outputs = [one(i) for i in range(50)]
    assert stats.copied_bytes == 50 * 4096
    assert all(torch.equal(restore(y)[0], base * float(i)) for i, y in enumerate(outputs))


def test_the_ledger_does_not_grow():
    ledger, x, buffer, sizes = Ledger(hops=4), torch.randn(16), torch.zeros(16), []
    gc.collect()
    with WriteWatch(ledger):
        for _ in range(3000):
            buffer.copy_(x.clone())
            sizes.append(len(ledger._contents))
    assert max(sizes) < 600 and len(ledger.content(x).kept) == 0
