"""edkm.offload: what shares a copy, what is copied, and that restored tensors are the saved ones."""

import gc
from contextlib import contextmanager
from itertools import count
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from edkm.offload import Stats, piece, saved_tensors, transfer
from edkm.offload.marshal import Ledger, Watch
from edkm.offload.transfer import Copy

MIB = 1 << 20


class Save(torch.autograd.Function):
    """Saves the tensors it is given; backward leaves in `got` what comes back."""

    got = None

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return tensors[0].detach().reshape(-1)[:1].sum() * 1.0

    @staticmethod
    def backward(ctx, _):
        Save.got = [t.detach() for t in ctx.saved_tensors]
        return (None,) * len(Save.got)


@pytest.fixture(autouse=True)
def forget():
    yield
    Save.got = None


def activation(*shape, dtype=torch.float32):
    """Not a leaf, so that it is copied."""
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype).requires_grad_().clone()


def check(stats, y, expected):
    """Run backward, compare what was restored, and see everything released."""
    assert stats.requested_bytes == stats.copied_bytes + sum(stats.avoided_bytes.values())
    assert stats.kept_bytes == stats.copied_bytes
    y.backward()
    for restored, saved in zip(Save.got, expected, strict=True):
        assert restored.dtype == saved.dtype and restored.shape == saved.shape and restored.stride() == saved.stride()
        assert torch.equal(restored, saved)
    assert stats.kept_bytes == 0


def save(make, **options):
    """Mebibytes copied for the tensors that `make` derives from one [1024, 1024] float32 activation of 4 MiB."""
    x = activation(1024, 1024)
    with saved_tensors(**options) as stats:
        tensors = make(x)
        y = Save.apply(*tensors)
    check(stats, y, [t.detach().clone() if t.is_contiguous() else t.detach() for t in tensors])
    return stats.copied_bytes / MIB


def copies(n, of=lambda x: x):
    def make(x):
        y = x
        for _ in range(n):
            y = y.t().contiguous()
        return of(x), y

    return make


# --- marshaling: the paper's Table 1 ---


def test_view_costs_nothing_more():
    def pair(x):
        return x, x.view(-1, 1)

    assert save(pair, marshal=False) == 8
    assert save(pair) == 4


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x.view(-1, 1),
        lambda x: x[3:90],
        lambda x: x.unsqueeze(1).expand(1024, 2, 1024),
        lambda x: x.view(torch.int32),
        lambda x: x[:, ::2],
        lambda x: x.unfold(0, 4, 2),
        lambda x: x.detach(),
    ],
)
def test_views_share_the_copy(view):
    assert save(lambda x: (x, view(x))) == 4


@pytest.mark.parametrize(
    "copy",
    [
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
def test_copies_are_recipes(copy):
    assert save(lambda x: (x, copy(x))) == 4


@pytest.mark.parametrize(
    "copy", [lambda x: x.clone(), lambda x: x.t().contiguous(), lambda x: torch.empty_like(x).copy_(x), lambda x: x.t().reshape(-1)]
)
def test_recipes_work_in_the_other_direction(copy):
    assert save(lambda x: (copy(x), x)) == 4


def test_an_expanded_copy_serves_its_origin():
    # The copy of [4, 1024, 1024] is kept; its origin is a quarter of it.
    assert save(lambda x: (x.expand(4, 1024, 1024).contiguous(), x)) == 16


def test_a_part_does_not_serve_the_whole():
    assert save(lambda x: (x[:512].clone(), x)) == 6


def test_four_copies_are_followed_and_five_are_not():
    assert [save(copies(n)) for n in (1, 3, 4, 5)] == [4, 4, 4, 8]
    assert save(copies(5), hops=5) == 4
    assert [save(copies(n), hops=1) for n in (1, 2)] == [4, 8]
    assert save(copies(1), hops=0) == 8 and save(copies(0, of=lambda x: x.t()), hops=0) == 4


def test_a_recipe_is_no_origin_of_recipes():
    def make(x):
        return x, *(y for n in (4, 7) for y in copies(n)(x)[1:])

    def further(x):
        y = copies(4)(x)[1]
        return x, y, copies(3)(y)[1]

    assert save(make) == 8 and save(further) == 8


def test_views_on_the_way_cost_no_hop():
    def make(x):
        y = x
        for _ in range(4):
            y = y.view(512, -1).t().t().view(1024, 1024).t().contiguous()
        return x, y

    assert save(make) == 4


def test_intermediate_copies_may_be_gone():
    def make(x):
        y = x.t().contiguous()
        z = y.t().contiguous()
        del y
        return x, z

    assert save(make) == 4


def test_other_values_share_nothing():
    assert save(lambda x: (x, x * 1.0)) == 8
    assert save(lambda x: (x, x.to(torch.bfloat16))) == 6
    assert save(lambda x: (x, x.detach().roll(1))) == 8


def test_changed_in_place_is_another_tensor():
    x = activation(256, 1024)
    with saved_tensors() as stats:
        before, a = x.detach().clone(), Save.apply(x)
        with torch.no_grad():
            x.add_(1.0)
        after, b = x.detach().clone(), Save.apply(x)
    assert stats.copied_bytes == 2 * MIB
    for y, expected in ((b, after), (a, before)):
        y.backward()
        assert torch.equal(Save.got[0], expected)


@pytest.mark.parametrize("write", ["data", "foreach", "out", "copy_", "index"])
def test_writes_that_version_counters_miss(write):
    x = activation(16, 16)
    with saved_tensors():
        before, a = x.detach().clone(), Save.apply(x)
        version, data = x._version, x.data
        if write == "data":
            data.add_(1.0)
        elif write == "foreach":
            torch._foreach_add_([data], 1.0)
        elif write == "out":
            torch.add(data, 1.0, out=data)
        elif write == "copy_":
            data.copy_(torch.ones(16, 16))
        else:
            data[3] = 7.0
        assert x._version == version
        after, b = x.detach().clone(), Save.apply(x)
    assert not torch.equal(before, after)
    for y, expected in ((b, after), (a, before)):
        y.backward()
        assert torch.equal(Save.got[0], expected)


def test_a_copy_of_what_has_changed_since_is_no_copy():
    x = activation(16, 16)
    with saved_tensors() as stats:
        y = x.clone()
        a = Save.apply(x)
        y.data.mul_(2.0)
        b = Save.apply(y)
        expected = y.detach().clone()
    assert stats.copied_bytes == 2 * x.nbytes
    b.backward()
    assert torch.equal(Save.got[0], expected)
    del a


def test_moving_within_one_storage_is_no_copy():
    # The source is overwritten where the two overlap: what was copied is no longer there.
    x = activation(8)
    with saved_tensors():
        data = x.data
        data[:4].copy_(data[::2])
        # Their version counters differ, so that nothing but the storage says that they are related.
        y = Save.apply(activation(1), data[:4], x[::2])
        expected = x.detach().clone()
    y.backward()
    assert not torch.equal(expected[:4], expected[::2])
    assert torch.equal(Save.got[1], expected[:4]) and torch.equal(Save.got[2], expected[::2])


def test_a_copy_into_overlapping_windows_is_no_copy():
    # Elements that several windows share hold what was written last.
    rows, windows = activation(5, 4), torch.zeros(8).unfold(0, 4, 1)
    with saved_tensors():
        windows.copy_(rows.detach())
        y = Save.apply(activation(1), windows, rows)
    y.backward()
    assert torch.equal(Save.got[1], windows) and torch.equal(Save.got[2], rows)


def test_writes_through_a_subclass_and_through_sparse_tensors():
    class Named(torch.Tensor):
        pass

    x, sparse = activation(8), torch.eye(3).to_sparse().coalesce()
    values = sparse.values()
    for tensor, write in ((x, lambda: x.as_subclass(Named).data.add_(1.0)), (values, lambda: sparse.data.sin_())):
        with saved_tensors():
            before, a = tensor.detach().clone(), Save.apply(activation(1), tensor)
            write()
            after, b = tensor.detach().clone(), Save.apply(activation(1), tensor)
        assert not torch.equal(before, after)
        for y, expected in ((b, after), (a, before)):
            y.backward()
            assert torch.equal(Save.got[1], expected)


def test_an_operation_without_a_schema_may_write_anything():
    ledger, x, y = Ledger(hops=4), torch.zeros(3), torch.zeros(3)
    before = [ledger.content(t) for t in (x, y)]
    assert before == [ledger.content(t) for t in (x, y)]
    Watch(ledger).__torch_dispatch__(lambda function, t: function(t), (), (lambda t: y.add_(1.0), x))
    assert not {*before} & {ledger.content(t) for t in (x, y)}


def test_increment_version_announces_a_raw_write():
    x = activation(16)
    with saved_tensors() as stats:
        a = Save.apply(x)
        y = x.clone()
        for tensor in (x, y):
            tensor.detach().numpy()[:] = 3.0
            torch.autograd.graph.increment_version(tensor)
        b = Save.apply(x, y)
    assert stats.copied_bytes == 3 * x.nbytes
    b.backward()
    assert all(bool((restored == 3.0).all()) for restored in Save.got)
    del a


def test_batch_norm_in_training_writes_its_statistics():
    # native_batch_norm writes running_mean and says so neither in its schema nor in a version.
    torch.manual_seed(0)
    x, z = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)

    def grads(block):
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(3, momentum=0.9)
        with block:
            a = norm(x).square().sum()
            b = norm.eval()(z).square().sum()
        return torch.autograd.grad(a + b, [x, z])

    for plain, ours in zip(grads(torch.enable_grad()), grads(saved_tensors()), strict=True):
        assert torch.equal(plain, ours)


def test_an_address_used_again_is_another_storage():
    base, addresses = activation(1024), set()

    def one(i):
        x = base * float(i)
        addresses.add(x.untyped_storage()._cdata)
        return Save.apply(x)

    for i in range(50):
        one(i)
    assert len(addresses) < 50
    with saved_tensors() as stats:
        outputs = [one(i) for i in range(50)]
    assert stats.copied_bytes == 50 * 4096
    for i, y in enumerate(outputs):
        torch.autograd.grad(y, base, retain_graph=True, allow_unused=True)
        assert torch.equal(Save.got[0], base * float(i))


def test_the_ledger_does_not_grow():
    ledger, x, buffer, sizes = Ledger(hops=4), torch.randn(16), torch.zeros(16), []
    with Watch(ledger):
        for _ in range(3000):
            buffer.copy_(x.clone())
            sizes.append(len(ledger._edges) + len(ledger._contents))
    assert max(sizes) < 2000


@pytest.mark.parametrize("when", ["written", "written by data", "written by a sparse tensor", "block ended"])
def test_who_overwrites_waits_for_the_copy(when, monkeypatch):
    # On CUDA the copy may still be under way. Nobody says when the tensor is overwritten after the block.
    x, sparse, seen = activation(4), torch.eye(3).to_sparse().coalesce(), []
    monkeypatch.setattr(Copy, "settle", lambda copy: seen.append(x.detach().clone()))
    with saved_tensors():
        y = Save.apply(x)
        del seen[:]
        if when == "written":
            x.detach().mul_(2.0)
        elif when == "written by data":
            x.data.mul_(2.0)
        elif when == "written by a sparse tensor":
            sparse.sin_()
        assert len(seen) == (when != "block ended")
    assert seen and torch.equal(seen[0], activation(4))
    y.backward()
    assert torch.equal(Save.got[0], activation(4))


# --- how much is copied ---


def test_a_piece_of_a_large_storage_is_not_the_storage():
    assert save(lambda x: (x[:, 0],)) == 4096 / MIB
    assert save(lambda x: (x[::2, ::2],)) == 1
    assert save(lambda x: (x[100:200],)) == 100 * 4096 / MIB


def test_an_expanded_tensor_costs_its_distinct_elements():
    assert save(lambda x: (x[0].expand(1024, 1024),)) == 4096 / MIB
    assert save(lambda x: (x[0].expand(1024, 1024),), marshal=False) == 4


def test_transposes_of_a_piece_share_it():
    assert save(lambda x: (x[:, :8], x[:, :8].t(), x[:, :8].unsqueeze(0))) == 8 * 4096 / MIB


def test_overlapping_windows():
    assert save(lambda x: (x.view(-1)[:1000].unfold(0, 8, 1),)) == 4000 / MIB
    assert save(lambda x: (x.as_strided((3, 3), (1000, 1000)),)) == 36 / MIB


def test_a_dtype_view_that_is_not_aligned_to_the_copy():
    x = activation(64).detach().view(torch.int8)
    with saved_tensors() as stats:
        y = Save.apply(activation(1), x[1:33], x.view(torch.float32)[1:8])
    y.backward()
    assert stats.copied_bytes == 4 + 32 + 28
    assert torch.equal(Save.got[2], x.view(torch.float32)[1:8])


@pytest.mark.parametrize("marshal", [True, False])
def test_odd_tensors(marshal):
    z = activation(4, 3, dtype=torch.complex64)
    tensors = [
        z,
        z.conj(),
        z.conj().imag,
        activation(),
        activation(0, 3),
        activation(5)[2:2],
        torch.randn(3, 3).to_sparse(),
        torch.arange(3),
        activation(3) > 0,
    ]
    with saved_tensors(marshal=marshal) as stats:
        y = Save.apply(activation(1), *tensors)
    assert stats.requested_bytes == stats.copied_bytes + sum(stats.avoided_bytes.values())
    y.backward()
    for restored, saved in zip(Save.got[1:], tensors, strict=True):
        assert restored.layout == saved.layout and restored.dtype == saved.dtype
        same = (restored.to_dense(), saved.to_dense()) if saved.is_sparse else (restored, saved)
        assert torch.equal(*same)
    assert stats.kept_bytes == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse", "ignore:torch.quantize")
def test_tensors_without_strided_memory():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    matrix = torch.eye(4)
    tensors = [
        # Values and the ends of rows.
        (nested, 6 * 3 * 4 + 3 * 8, lambda t: t.to_padded_tensor(0.0)),
        (matrix.to_mkldnn(), 64, lambda t: t.to_dense()),
        # Values, and 64-bit indices: one per row or block row, and its end; one per value or block.
        (matrix.to_sparse_csr(), 4 * 4 + (5 + 4) * 8, lambda t: t.to_dense()),
        (matrix.to_sparse_bsc((2, 2)), 8 * 4 + (3 + 2) * 8, lambda t: t.to_dense()),
        (torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8), 16, lambda t: t.int_repr()),
    ]
    for tensor, n_bytes, dense in tensors:
        with saved_tensors() as stats:
            y = Save.apply(torch.zeros((), requires_grad=True), tensor)
        assert stats.copied_bytes == stats.requested_bytes - 4 == n_bytes
        y.backward()
        assert Save.got[1].layout == tensor.layout and torch.equal(dense(Save.got[1]), dense(tensor))
        assert stats.kept_bytes == 0


def test_under_a_fake_tensor_mode():
    with FakeTensorMode(), saved_tensors() as stats:
        h = nn.Linear(8, 4)(torch.ones(2, 8)).exp()
    assert stats.copied_bytes == (2 * 8 + 2 * 4) * 4
    h.sum().backward()
    assert stats.kept_bytes == 0


def test_an_empty_view_keeps_no_storage():
    x = torch.randn(1000).requires_grad_().clone()
    ref = StorageWeakRef(x.untyped_storage())
    with saved_tensors():
        y = Save.apply(x[:0], activation(1))
    del x
    # The history of the view holds no memory.
    assert ref.expired()
    del y


# --- parameters ---


def test_parameters_are_referenced():
    linear, x = nn.Linear(64, 64), activation(8, 64)
    with saved_tensors() as stats:
        linear(linear(x)).sum().backward()
    # The two inputs; weight.t() is a view.
    assert stats.copied_bytes == 2 * 8 * 64 * 4
    assert stats.avoided_bytes["reference"] > 0


def test_frozen_parameters_are_referenced():
    linear = nn.Linear(64, 64).requires_grad_(False)
    with saved_tensors() as stats:
        linear(activation(8, 64)).sum().backward()
    assert stats.copied_bytes == 0 and stats.avoided_bytes["reference"] == 64 * 64 * 4


def test_buffers_are_referenced_when_resident():
    norm = nn.BatchNorm1d(64).eval()
    for resident, copied in ((None, 2 * 64 * 4), (norm, 0)):
        x = activation(8, 64)
        with saved_tensors(resident=resident) as stats:
            norm(x).sum().backward()
        assert stats.copied_bytes == copied + x.nbytes


@pytest.mark.parametrize("of", ["parameter", "view", "buffer"])
def test_a_reference_must_not_change(of):
    module = nn.Linear(3, 2)
    module.register_buffer("scale", torch.ones(2, 3))
    tensor = {"parameter": module.weight, "view": module.weight.t(), "buffer": module.scale}[of]
    with saved_tensors(resident=module):
        y = Save.apply(activation(1), tensor)
    with torch.no_grad():
        (module.scale if of == "buffer" else module.weight).add_(1)
    shape = r"\[3, 2\]" if of == "view" else r"\[2, 3\]"
    message = rf"saved tensor {shape} torch.float32, referenced.*it is at version \d+, saved was version \d+.*after backward"
    with pytest.raises(RuntimeError, match=message):
        y.backward()


def test_a_reference_whose_memory_is_gone():
    w = nn.Parameter(torch.randn(3))
    with saved_tensors():
        y = Save.apply(activation(1), w)
    w.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"\[3\] torch.float32.*memory was freed.*FSDP2"):
        y.backward()


# --- restoring ---


def test_tensors_in_use_together_share_one_buffer():
    x = activation(16, 16)
    with saved_tensors():
        a, b = Save.apply(x), Save.apply(x.t())
    a.backward()
    first = Save.got[0]
    b.backward()
    assert Save.got[0].data_ptr() == first.data_ptr()


def test_writing_into_a_restored_tensor_does_not_reach_the_next():
    class Rough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            Rough.held = x
            return g * x.mul_(2.0)

    p = torch.randn(5, requires_grad=True)
    with saved_tensors():
        x = p * 1.0
        y = Rough.apply(x) + Rough.apply(x)
    (grad,) = torch.autograd.grad(y, p, retain_graph=True)
    assert torch.equal(grad, 4 * p)
    # And again from the same graph: the copy is as it was.
    assert torch.equal(torch.autograd.grad(y, p)[0], 4 * p)


def test_the_offset_is_the_original_where_the_storage_is_kept_from_its_start():
    x = activation(16, 16)
    with saved_tensors():
        y = Save.apply(x, x[3:5])
    y.backward()
    assert Save.got[1].storage_offset() == 48 and Save.got[1].data_ptr() == Save.got[0][3].data_ptr()


def test_copies_go_one_by_one():
    held = []
    x = torch.randn(1000, requires_grad=True)
    with saved_tensors() as stats:
        y = x * 1.0
        for _ in range(5):
            y = y.exp().sigmoid()
            y.register_hook(lambda g: held.append(stats.kept_bytes))
    y.sum().backward()
    assert stats.peak_kept_bytes == 10 * 4000
    assert held == [40_000, 32_000, 24_000, 16_000, 8_000] and stats.kept_bytes == 0


def test_no_reference_cycles():
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Softmax(-1))
        x = torch.randn(4, 8)
        with saved_tensors() as stats:
            h = model(x)
            loss = h.t().contiguous().exp().prod()
        assert stats.kept_bytes > 0
        storages = [StorageWeakRef(t.untyped_storage()) for t in (h, loss)]
        del h, loss
        # Never used in backward: letting go of the graph is enough.
        assert stats.kept_bytes == 0
        assert all(ref.expired() for ref in storages)
    finally:
        gc.enable()


# --- CUDA's path, with streams that only note what they are told ---


class Stream:
    log: ClassVar[list] = []
    events: ClassVar = count()

    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event.name))


class Event:
    def record(self, stream):
        self.name = f"event {next(Stream.events)}"
        Stream.log.append((stream.name, "records", self.name))


@pytest.fixture
def streams(monkeypatch):
    """`Copy` takes tensors for CUDA tensors. Copies are made at once, so what is checked is who waits for what."""
    main, side, current = Stream("main"), Stream("side"), []

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: Stream.log.append((stream.name, "uses", tensor.numel())))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1] if current else main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(transfer, "_side_stream", lambda device: side)
    monkeypatch.setattr(Copy, "_is_streamed", lambda copy, device: True)
    monkeypatch.setattr(Stream, "log", [])
    monkeypatch.setattr(Stream, "events", count())
    return Stream.log


def test_a_copy_waits_for_its_source_and_an_overwrite_for_the_copy(streams):
    x = activation(4)
    with saved_tensors():
        y = Save.apply(x)
        assert streams == [("side", "waits for", "main"), ("side", "records", "event 0"), ("side", "uses", 4)]
        del streams[:]
        x.data.add_(1.0)
        x.data.add_(1.0)
        assert streams == [("main", "waits for", "event 0")]
        z = Save.apply(x)
        del streams[:]
    assert streams == [("main", "waits for", "event 1")]
    del streams[:]
    with saved_tensors(marshal=False):
        Save.apply(x)
    # Nobody watches.
    assert streams[-2:] == [("side", "uses", 4), ("main", "waits for", "event 2")]
    y.backward()
    assert torch.equal(Save.got[0], activation(4))
    del z


def test_backward_fetches_ahead(streams):
    tensors = [activation(n) for n in (2, 3, 4)]
    with saved_tensors():
        outputs = [Save.apply(t) for t in tensors]
    fetched = []
    for n in (4, 3, 2):
        del streams[:]
        outputs.pop().backward()
        assert torch.equal(Save.got[0], activation(n))
        fetched.append([entry for entry in streams if entry[1] != "waits for"])
    # The first is fetched on demand. Then the next one is on its way already.
    assert fetched == [
        [("side", "records", "event 3"), ("main", "uses", 4), ("side", "records", "event 4")],
        [("main", "uses", 3), ("side", "records", "event 5")],
        [("main", "uses", 2)],
    ]


def test_a_shared_buffer_is_waited_for_on_another_stream(streams, monkeypatch):
    x = activation(4)
    with saved_tensors():
        a, b = Save.apply(x), Save.apply(x[1:])
    made = Event()
    made.record(Stream("main"))
    monkeypatch.setattr(piece, "made_now", lambda device: made)
    a.backward()
    held = Save.got
    del streams[:]
    with torch.cuda.stream(Stream("other")):
        b.backward()
    assert streams == [("other", "waits for", made.name), ("other", "uses", 3)]
    assert Save.got[0].untyped_storage()._cdata == held[0].untyped_storage()._cdata


# --- the block ---


def test_stats_in_one_line():
    x = activation(512, 512)
    with saved_tensors() as stats:
        y = Save.apply(x, x.t())
    assert str(stats).startswith(
        "2 saved tensors of 2.0 MiB: copied 1.0, avoided (reference 0.0, marshal 1.0, uniquify 0.0, shard 0.0), holding 1.0 (peak 1.0), "
    )
    assert "\n" not in str(stats) and stats.seconds > 0
    assert isinstance(stats, Stats)
    del y


def test_an_exception_ends_the_block():
    with pytest.raises(KeyError), saved_tensors() as stats:
        y = activation(4).exp()
        raise KeyError
    assert stats.tensors == 1
    z = activation(4).exp()
    assert stats.tensors == 1
    (y.sum() + z.sum()).backward()
    assert stats.kept_bytes == 0


def test_blocks_nest_and_the_inner_applies():
    with saved_tensors() as outer:
        a = activation(4).exp()
        with saved_tensors() as inner:
            b = a.exp()
        c = b.exp()
    assert (outer.tensors, inner.tensors) == (2, 1)
    c.sum().backward()
    assert outer.kept_bytes == inner.kept_bytes == 0


def test_hops_are_not_negative():
    with pytest.raises(ValueError, match="hops=-1: must not be negative"), saved_tensors(hops=-1):
        pass
