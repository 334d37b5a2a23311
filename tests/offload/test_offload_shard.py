"""Guarantees of edkm.offload over process groups (gloo processes on this machine, each a rank):

1. Copies sharded over 2 or 4 ranks give equal gradients, and each rank keeps its part only.
2. Tensors that differ between ranks are refused on all of them, and the group stays usable.
3. Parameters under FSDP2 are referenced, writes by collectives are noticed, DTensors are copied.
"""

import datetime
import os
import socket
import traceback
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from saving import assert_accounted, restore, save
from torch import nn

from edkm.core import reference
from edkm.offload import function_of, saved_tensors, shard


def _rank(rank, world, port, function, results):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=30)
    )
    try:
        results.put((rank, function(rank, world), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def on_ranks(world, function):
    """Run `function(rank, world)` on every rank; return the results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A server that has imported torch once forks the ranks.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "edkm.core.reference", "edkm.offload"])
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(r, world, port, function, results), daemon=True) for r in range(world)]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    assert not [error for *_, error in answers if error], answers
    return [answer for _, answer, _ in answers]


def chain(w):
    h = w.exp()
    return ((h @ h.t()).t().contiguous().sigmoid() * h.sum(1)).view(-1).clone().square()


def clustered(w):
    centroids = torch.linspace(-2, 2, 8).view(1, 8, 1)
    return reference.cluster(w, centroids, reference.Problem(torch.tensor([0.1])), 2)[0]


def measured(loss, w, **options):
    w = w.clone().requires_grad_()
    declared = function_of(w) if loss is clustered else nullcontext()
    with saved_tensors(**options) as stats, declared:
        out = loss(w)
    kept = stats.kept_bytes
    # Outside: this factor is no function of the weight.
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert stats.kept_bytes == 0
    assert_accounted(stats)
    return w.grad, kept


def compare(rank, world):
    """Every claim that needs replicated data, in one set of processes."""
    torch.manual_seed(0)
    group = dist.group.WORLD
    kept = {}
    for name, loss, w in (("chain", chain, torch.randn(63, 65)), ("clustered", clustered, torch.randn(96, 96).bfloat16())):
        plain, _ = measured(loss, w, marshal=False, uniquify=False)
        for options in ({"uniquify": False}, {}, {"marshal": False}):
            whole, one = measured(loss, w, **options)
            parts, mine = measured(loss, w, shard=group, **options)
            assert torch.equal(whole, plain) and torch.equal(parts, plain)
            kept[name, str(options)] = one, mine
    twice(group)
    odd_sizes(group)
    nested(rank, group)
    refused(rank, group)
    freed_at_different_times(rank, group)
    return kept


def twice(group):
    """A graph used twice, and its double backward."""
    w = torch.linspace(-1, 1, 4096).view(64, 64).requires_grad_()
    with saved_tensors(shard=group):
        y = chain(w).sum()
    first = torch.autograd.grad(y, w, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, w, create_graph=True)[0], first)


def odd_sizes(group):
    tensors = [
        torch.arange(512, dtype=torch.uint8),
        torch.arange(511, dtype=torch.uint8),
        torch.rand(129),
        torch.rand(1001).double()[1:],
        torch.rand(33, 17)[:, 1:12],
        torch.rand(300) > 0.5,
        torch.rand(999, dtype=torch.complex64),
        torch.rand(1, 1),
        torch.rand(3).expand(500, 3),
    ]
    dist.broadcast_object_list(box := [tensors])
    with saved_tensors(shard=group) as stats:
        y = save(*box[0])
    assert all(map(torch.equal, restore(y), box[0]))
    assert stats.kept_bytes == 0


def nested(rank, group):
    """Only the inner block is sharded; activations differ."""
    torch.manual_seed(0)
    w = torch.randn(40, 40, requires_grad=True)
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(rank))
    with saved_tensors() as outer:
        with saved_tensors(shard=group) as inner:
            soft = w.exp().sigmoid()
        loss = (x @ soft).square().sum()
    (grad,) = torch.autograd.grad(loss, w)
    (plain,) = torch.autograd.grad((x @ w.exp().sigmoid()).square().sum(), w)
    assert torch.equal(grad, plain)
    assert inner.avoided_bytes["shard"] > 0 and outer.avoided_bytes["shard"] == 0


def refused(rank, group):
    """What is not replicated is refused on every rank, in values, in one byte, in a weight; and the group is still usable."""
    message = "number 1 of the block: not the same on all"
    for change in (1.0, 1e-7):
        x = torch.ones(300, 2)
        x[-1, -1] += change * (rank == 1)
        # The first tensor is the same everywhere.
        expect(message, r"saved tensor [300, 2] torch.float32", group, torch.ones(200), x)
    # Swapped values have the same sum.
    x = torch.arange(1000.0)
    x[[5, 900] if rank == 0 else [900, 5]] = torch.tensor([1.0, 2.0])
    expect(message, "[1000]", group, torch.ones(200), x)
    w = ((torch.arange(4000) + (rank == 1)) % 16).bfloat16()
    with function_of(w):
        expect("not the same on all", "function_of: weight [4000]", group, torch.zeros(4000, 4))
    with saved_tensors(shard=group):
        save(torch.ones(1000)).backward()


def expect(rule, name, group, *tensors):
    try:
        with saved_tensors(shard=group):
            save(*tensors)
    except ValueError as error:
        assert rule in str(error) and name in str(error) and "blocks nest" in str(error), error
    else:
        raise AssertionError("was kept")


def freed_at_different_times(rank, group):
    """One rank has freed a graph that another still holds: all of them still use the same copies."""
    x = torch.rand(1000)
    dist.broadcast(x, 0)
    w = (torch.arange(1000) % 7).bfloat16()
    maps = [torch.stack([w.float()] * n, 1) for n in (30, 31)]
    with saved_tensors(shard=group) as stats:
        first = save(x)
        if rank == 0:
            del first
        second = save(x)
        y = x.clone()
        third = save(y)
        if rank == 1:
            del second
        with function_of(w):
            fourth = save(maps[0])
            if rank == 0:
                del fourth
            fifth = save(maps[1])
    assert stats.copied_bytes > 0
    assert torch.equal(restore(third)[0], x) and torch.equal(restore(fifth)[0], maps[1])


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_whole(world):
    for kept in on_ranks(world, compare):
        for (name, options), (one, mine) in kept.items():
            # Scalars and other small tensors are whole on each rank.
            assert mine <= one / world + 600, (name, options)
            assert mine >= one / world


def fsdp(rank, world):
    """FSDP2 frees unsharded parameters after forward and gathers them again into the same storage."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))

    def run(block, frozen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 32))
        model[2].weight.requires_grad_(not frozen)
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(rank))
        with block as stats:
            loss = model(x).square().sum()
        loss.backward()
        return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None], stats

    for frozen in (False, True):
        plain, _ = run(torch.enable_grad(), frozen)
        ours, stats = run(saved_tensors(), frozen)
        assert len(plain) == 6 - frozen
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        # Weights are 32 * 48 * 4 bytes and more; all activations together are less than one of them.
        assert stats.copied_bytes <= 4 * 4 * (32 + 2 * 48 + 2 * 32 + 32) < 32 * 48 * 4
        assert stats.avoided_bytes["reference"] >= 2 * 32 * 32 * 4
        assert stats.kept_bytes == 0
    return True


def test_fsdp_parameters_are_referenced():
    assert on_ranks(2, fsdp) == [True, True]


def collectives(rank, world):
    """They write their arguments without a new version, and their schemas do not say so."""
    own, group = torch.arange(8.0) + rank, dist.group.WORLD
    writes = [
        ("all_reduce", own, lambda t: dist.all_reduce(t)),
        ("all_reduce, async", own, lambda t: dist.all_reduce(t, async_op=True).wait()),
        ("broadcast", own, lambda t: dist.broadcast(t, 1)),
        ("all_gather", torch.zeros(world * 8), lambda t: dist.all_gather(list(t.chunk(world)), own)),
        ("all_gather, one tensor", torch.zeros(world * 8), lambda t: dist.all_gather_into_tensor(t, own)),
        ("reduce_scatter", torch.zeros(8 // world), lambda t: dist.reduce_scatter_tensor(t, own.clone())),
        ("all_to_all", torch.zeros(8), lambda t: dist.all_to_all_single(t, own)),
        ("scatter", torch.zeros(8), lambda t: dist.scatter(t, [own + 1] * world if rank == 0 else None)),
        ("send", torch.zeros(8), lambda t: dist.send(own, 0) if rank else dist.recv(t, 1)),
    ]
    changed = set()
    for name, start, write in writes:
        with saved_tensors(uniquify=False):
            x = start.clone()
            first = save(x)
            y = x.clone()
            write(x)
            write(y)
            expected = x.detach().clone()
            second = save(x, y)
        if not torch.equal(expected, start):
            changed.add(name)
        assert all(torch.equal(restored, expected) for restored in restore(second)), name
        assert torch.equal(restore(first)[0], start), name
    dist.barrier(group)
    return len(changed)


def test_writes_by_collectives_are_noticed():
    # One receives and one sends, one broadcasts, and what zeros receive are rank 0's numbers.
    assert min(on_ranks(2, collectives)) >= 7


def tensor_parallel(rank, world):
    """DTensor is memory within a wrapper; torch works out its shardings on fake tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": SequenceParallel()}
    parallelize_module(model, init_device_mesh("cpu", (world,)), plan)

    def run(block):
        model.zero_grad()
        with block as stats:
            loss = model(torch.linspace(-1, 1, 4 * 6 * 8).view(4, 6, 8)).to_local().square().sum()
        loss.backward()
        return [p.grad.full_tensor() for p in model.parameters()], stats

    plain, _ = run(torch.enable_grad())
    ours, stats = run(saved_tensors())
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert stats.copied_bytes > 0 and stats.kept_bytes == 0
    assert_accounted(stats)
    return True


def test_tensor_parallel_models_have_equal_gradients():
    assert on_ranks(2, tensor_parallel) == [True, True]


# --- without processes ---


def test_the_checksum_depends_on_every_byte_and_its_place():
    torch.manual_seed(0)
    for n in (1, 7, 8, 9, 1000, (1 << 23) + 5):
        x = torch.randint(256, (n,), dtype=torch.uint8)
        own = shard.hash_bytes(x)
        assert torch.equal(shard.hash_bytes(x.clone()), own)
        for i in {0, n // 2, n - 1}:
            for bit in (1, 128):
                y = x.clone()
                y[i] ^= bit
                assert not torch.equal(shard.hash_bytes(y), own)
        if n > 16 and not torch.equal(x[:8], x[-8:]):
            y = x.clone()
            y[:8], y[-8:] = x[-8:].clone(), x[:8].clone()
            assert not torch.equal(shard.hash_bytes(y), own)
    assert torch.equal(shard.hash_bytes(torch.arange(9.0)[1:]), shard.hash_bytes(torch.arange(1.0, 9.0)))
