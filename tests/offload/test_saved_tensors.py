"""How edkm.offload.saved_tensors copies, restores and frees tensors, in one process:

1. Never more is copied than the tensor itself; parameters, and buffers of `resident`, are referenced and must not change.
2. Restored tensors are the saved ones, with their strides if they are plain; copies are freed one by one, without a cycle.
3. On CUDA a copy waits for its source, an overwrite for the copy, and backward fetches one copy ahead.
4. Blocks nest, end with an exception, and count every byte once.
"""

import gc
from contextlib import contextmanager

import pytest
import torch
from saving import MIB, activation, assert_accounted, copied_mib, restore, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from edkm.offload import marshal, saved_tensors, transfer
from edkm.offload.transfer import OffloadedCopy

# --- how much is copied ---


@pytest.mark.parametrize(
    ("make", "n_bytes"),
    [
        (lambda x: (x[:, 0],), 4096),
        (lambda x: (x[::2, ::2],), MIB),
        (lambda x: (x[100:200],), 100 * 4096),
        (lambda x: (x[0].expand(1024, 1024),), 4096),
        (lambda x: (x[:, :8], x[:, :8].t(), x[:, :8].unsqueeze(0)), 8 * 4096),
    ],
)
def test_no_more_than_the_distinct_elements_of_a_tensor_are_copied(make, n_bytes):
    assert copied_mib(make) == n_bytes / MIB


def test_a_view_of_another_dtype_that_is_not_aligned_to_the_copy_is_copied():
    x = activation(64).detach().view(torch.int8)
    with saved_tensors() as stats:
        y = save(x[1:33], x.view(torch.float32)[1:8])
    assert stats.copied_bytes == 32 + 28
    assert torch.equal(restore(y)[1], x.view(torch.float32)[1:8])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse", "ignore:torch.quantize")
@pytest.mark.parametrize("share", [True, False])
def test_tensors_that_are_more_than_strided_memory_are_copied_whole(share):
    z, matrix = activation(4, 3, dtype=torch.complex64), torch.eye(4)
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    tensors = [z, z.conj(), z.conj().imag, activation(), activation(0, 3), activation(5)[2:2], torch.arange(3), activation(3) > 0]
    tensors += [activation(9).unfold(0, 4, 2), matrix.to_sparse(), matrix.to_sparse_csr(), matrix.to_sparse_bsc((2, 2)), matrix.to_mkldnn()]
    tensors += [torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8), nested]
    with saved_tensors(marshal=share) as stats:
        y = save(*tensors)
    assert_accounted(stats)
    for restored, saved in zip(restore(y), tensors, strict=True):
        assert restored.layout == saved.layout and restored.dtype == saved.dtype and restored.shape == saved.shape
        if saved is nested:
            restored, saved = restored.values(), saved.values()
        elif saved.is_quantized:
            restored, saved = restored.int_repr(), saved.int_repr()
        elif saved.layout != torch.strided:
            restored, saved = restored.to_dense(), saved.to_dense()
        assert torch.equal(restored, saved)
    assert stats.kept_bytes == 0


def test_fake_tensors_are_kept_as_others_are():
    with FakeTensorMode(), saved_tensors() as stats:
        h = nn.Linear(8, 4)(torch.ones(2, 8)).exp()
    assert stats.copied_bytes == (2 * 8 + 2 * 4) * 4
    h.sum().backward()
    assert stats.kept_bytes == 0


# --- parameters ---


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_are_referenced(frozen):
    linear, x = nn.Linear(64, 64).requires_grad_(not frozen), activation(8, 64)
    with saved_tensors() as stats:
        linear(linear(x)).sum().backward()
    # The two inputs, for the gradient of the weight; weight.t() is a view.
    assert stats.copied_bytes == (0 if frozen else 2 * 8 * 64 * 4)
    assert stats.avoided_bytes["reference"] >= 64 * 64 * 4


def test_buffers_are_referenced_when_resident():
    norm = nn.BatchNorm1d(64).eval()
    for resident, copied in ((None, 2 * 64 * 4), (norm, 0)):
        x = activation(8, 64)
        with saved_tensors(resident=resident) as stats:
            norm(x).sum().backward()
        assert stats.copied_bytes == copied + x.nbytes


@pytest.mark.parametrize("kind", ["parameter", "view", "buffer"])
def test_a_referenced_tensor_must_not_change_until_backward(kind):
    module = nn.Linear(3, 2)
    module.register_buffer("scale", torch.ones(2, 3))
    tensor = {"parameter": module.weight, "view": module.weight.t(), "buffer": module.scale}[kind]
    with saved_tensors(resident=module):
        y = save(tensor)
    with torch.no_grad():
        (module.scale if kind == "buffer" else module.weight).add_(1)
    shape = r"\[3, 2\]" if kind == "view" else r"\[2, 3\]"
    message = rf"saved tensor {shape} torch.float32, referenced.*it is at version \d+, saved was version \d+.*after backward"
    with pytest.raises(RuntimeError, match=message):
        y.backward()


# --- restoring ---


def test_writing_into_a_restored_tensor_does_not_reach_the_next():
    class Rough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * x.mul_(2.0)

    p = torch.randn(5, requires_grad=True)
    with saved_tensors():
        x = p * 1.0
        y = Rough.apply(x) + Rough.apply(x)
    for retain in (True, False):
        assert torch.equal(torch.autograd.grad(y, p, retain_graph=retain)[0], 4 * p)


def test_a_slice_of_a_large_tensor_is_restored_without_the_rest():
    x = activation(1000)
    with saved_tensors() as stats:
        outputs = [save(x), *(save(x[i : i + 2]) for i in range(0, 1000, 100))]
    assert stats.copied_bytes == x.nbytes
    for i, y in enumerate(outputs[1:]):
        (restored,) = restore(y)
        assert restored.untyped_storage().nbytes() == 8 and torch.equal(restored, x[100 * i : 100 * i + 2])


def test_copies_are_freed_one_by_one():
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


def test_freeing_the_graph_frees_the_copies_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Softmax(-1))
        x, base = torch.randn(4, 8), torch.randn(1000).requires_grad_().clone()
        with saved_tensors() as stats:
            h = model(x)
            loss = h.t().contiguous().exp().prod()
            empty = save(base[:0])
        assert stats.kept_bytes > 0
        storages = [StorageWeakRef(t.untyped_storage()) for t in (h, loss, base)]
        del h, loss, base
        assert stats.kept_bytes == 0
        # An empty view, still saved, keeps no storage.
        assert all(ref.expired() for ref in storages)
        del empty
    finally:
        gc.enable()


# --- CUDA's path, with streams that only record their calls ---


@pytest.fixture
def streams(monkeypatch):
    """Let `OffloadedCopy` take tensors for CUDA tensors. Copies are made at once; the test checks who waits for whom."""
    log, current = [], []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append((self.name, "waits for", other.name))

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    main, empty = Stream("main"), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append((stream.name, "uses", tensor.numel())))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1] if current else main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(transfer, "_SIDE_STREAMS", {torch.device("cpu"): Stream("side")})
    monkeypatch.setattr(transfer, "_is_streamed", lambda origin, device: True)
    return log


def test_a_copy_waits_for_its_source_and_an_overwrite_for_the_copy(streams):
    copied, settled = [("side", "waits for", "main"), ("side", "uses", 4)], [("main", "waits for", "side")]
    x = activation(4)
    with saved_tensors():
        y = save(x)
        assert streams == copied
        x.data.add_(1.0)
        x.data.add_(1.0)
        assert streams == copied + settled
        z = save(x)
    # After the block nobody watches writes, and without marshal nobody does in it.
    assert streams == 2 * (copied + settled)
    with saved_tensors(marshal=False, uniquify=False):
        save(x)
        assert streams[-3:] == copied + settled
    assert torch.equal(restore(y)[0], activation(4))
    del z


@pytest.mark.parametrize("when", ["written", "written by data", "written by a sparse tensor", "block ended"])
def test_an_overwrite_waits_for_the_copy_however_it_is_made(when, monkeypatch):
    x, sparse, seen = activation(4), torch.eye(3).to_sparse().coalesce(), []
    monkeypatch.setattr(marshal, "settle", lambda: seen.append(x.detach().clone()))
    with saved_tensors():
        y = save(x)
        del seen[:]
        if when == "written":
            x.detach().mul_(2.0)
        elif when == "written by data":
            x.data.mul_(2.0)
        elif when == "written by a sparse tensor":
            sparse.sin_()
        assert len(seen) == (when != "block ended")
    assert seen and torch.equal(seen[0], activation(4)) and torch.equal(restore(y)[0], activation(4))


def test_backward_fetches_one_copy_ahead(streams):
    with saved_tensors():
        outputs = [save(activation(n)) for n in (2, 3, 4)]
    fetched = []
    bring = OffloadedCopy._bring
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            OffloadedCopy, "_bring", lambda copy, part: streams.append(("side", "brings", copy.n_bytes // 4)) or bring(copy, part)
        )
        for n in (4, 3, 2):
            del streams[:]
            assert torch.equal(restore(outputs.pop())[0], activation(n))
            fetched.append(streams[:])
    waits = ("main", "waits for", "side")
    # The first is fetched on demand. Then the next one is on its way already.
    assert fetched == [
        [("side", "brings", 4), waits, ("main", "uses", 4), ("side", "brings", 3)],
        [waits, ("main", "uses", 3), ("side", "brings", 2)],
        [waits, ("main", "uses", 2)],
    ]


# --- the block ---


def test_stats_are_one_line():
    x = activation(512, 512)
    with saved_tensors() as stats:
        y = save(x, x.t())
    assert str(stats).startswith(
        "2 saved tensors of 2.0 MiB: copied 1.0, avoided (reference 0.0, marshal 1.0, uniquify 0.0, shard 0.0), holding 1.0 (peak 1.0), "
    )
    assert "\n" not in str(stats) and stats.seconds > 0
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


def test_blocks_nest_and_the_inner_one_applies():
    with saved_tensors() as outer:
        a = activation(4).exp()
        with saved_tensors() as inner:
            b = a.exp()
        c = b.exp()
    assert (outer.tensors, inner.tensors) == (2, 1)
    c.sum().backward()
    assert outer.kept_bytes == inner.kept_bytes == 0
