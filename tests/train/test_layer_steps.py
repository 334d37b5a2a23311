"""Clustered layers from one optimizer step to the next:

1. layers keep for backward what plain layers keep, and centroids are found once per optimizer step;
2. micro-batches add up to the batch, and activation checkpoints change nothing;
3. evaluation and `soft_weights` move no state;
4. an optimizer that writes through `data` is noticed, and steps of others move a frozen weight and no other;
5. a resumed run is the same run, a copy is trained apart, and a narrower model keeps its centroids.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from measuring import saved_bytes
from tied import IDS, Tied, assert_equal_states, loss_of, prepared, random, seeded, soft, states, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import edkm
from edkm.train.prepare import clusterings

# Cost.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["histogram", "blocks", "native"])
def test_linear_keeps_what_a_linear_keeps_and_a_kibibyte(dtype, backend):
    plain = seeded(lambda: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)), dtype)
    model = copy.deepcopy(plain)
    edkm.prepare(model, edkm.ClusterConfig(bits=3, rows_per_lut=0), backend=backend)
    x = random(10, 64, dtype=dtype)
    # The parameters are there anyway.
    before, _ = saved_bytes(lambda: plain(x), *plain.parameters())
    after, out = saved_bytes(lambda: model(x), *model.parameters())
    assert before > 0
    assert after <= before
    # Beside what autograd keeps, a layer has its solution: centroids and, for `histogram`, a histogram.
    for _, weight, clustering in clusterings(model):
        solution = clustering.solve(weight)
        assert solution.trajectory.numel() * 4 <= 1024
        assert bool(solution.kept) == (backend == "histogram")
        assert all(t.numel() <= len(weight.bfloat16().unique()) + 255 for t in solution.kept or [])
    out.sum().backward()


def test_one_solve_per_step_whatever_the_number_of_micro_batches(solves):
    model = prepared(Tied, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        for micro in range(3):
            loss_of(model, (IDS + micro) % 12).backward()
        assert len(solves) == 2 * step
        assert int(model.embed.clustering.step) == step
        optimizer.step()
        optimizer.zero_grad()


def test_micro_batches_add_up_to_the_batch():
    one, many = prepared(Tied), prepared(Tied)
    upstream = random(2, 4, 12)
    (one(IDS) * upstream).sum().backward()
    for i in range(2):
        (many(IDS[i : i + 1]) * upstream[i : i + 1]).sum().backward()
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_change_nothing(use_reentrant, solves):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.recompute = False

        def forward(self, x):
            return checkpoint(self.inside, x, use_reentrant=use_reentrant) if self.recompute else self.inside(x)

    results = []
    for recompute in (False, True):
        model = prepared(Block)
        model.recompute = recompute
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for step in range(1, 3):
            optimizer.zero_grad()
            for micro in range(2):
                model(random(3, 8, seed=micro).requires_grad_()).square().sum().backward()
            grads = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            assert int(clusterings(model)[0][2].step) == step
        assert len(solves) == 2 * 2
        solves.clear()
        results.append((grads, states(model)))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
    for name, tensor in results[0][1].items():
        assert torch.allclose(tensor, results[1][1][name], rtol=1e-9, atol=1e-12), name


# State.


def test_evaluation_and_soft_weights_move_no_state():
    model = prepared(Tied)
    before = states(model)
    with torch.no_grad():
        model(IDS)
    model.eval()
    model(IDS)
    with edkm.soft_weights(model):
        loss_of(model).backward()
    edkm.freeze(model)
    assert_equal_states(before, states(model))
    model.train()
    model(IDS)
    assert int(model.embed.clustering.step) == 1
    assert not torch.equal(model.embed.clustering.centroids, before["embed.clustering.centroids"])


def test_soft_weights_are_the_weights_of_training():
    model = prepared(Tied)
    with torch.no_grad():
        training = model(IDS)
    model.eval()
    hard = model(IDS)
    with edkm.soft_weights(model) as same:
        assert same is model
        assert torch.equal(model(IDS), training)
    assert torch.equal(model(IDS), hard) and not torch.allclose(hard, training)
    with pytest.raises(RuntimeError, match="mine"), edkm.soft_weights(model):
        raise RuntimeError("mine")
    assert torch.equal(model(IDS), hard)


class ThroughData(torch.optim.Optimizer):
    """Writes where no version counter sees it."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-0.5)


def test_an_optimizer_that_writes_through_data_is_noticed(solves):
    model = prepared(Tied)
    optimizer = ThroughData(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    assert len(solves) == 2
    weight = model.hidden.weight.detach().clone()
    truth, _ = soft(weight, model.hidden.clustering)
    x = random(3, 8)
    assert torch.allclose(model.hidden(x), F.linear(x, truth, model.hidden.bias), rtol=1e-9)
    loss_of(model)
    assert len(solves) == 4 and int(model.hidden.clustering.step) == 2


def test_steps_of_others_move_a_frozen_weight_and_no_other():
    """A frozen weight is annealed with those that are trained; one that waits for its own optimizer is not moved by another's."""
    layers = [seeded(lambda: nn.Linear(16, 32)) for _ in range(2)]
    model, other = nn.Sequential(layers[0]), nn.Sequential(layers[1], seeded(lambda: nn.Linear(32, 8)))
    other[0].weight.requires_grad_(False)
    for m in (model, other):
        edkm.prepare(m, edkm.ClusterConfig(bits=2, rows_per_lut=8, anneal_steps=4))
    x = random(4, 16)
    model.train()(x).sum().backward()
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2)
    for _ in range(3):
        other.train()(x).sum().backward()
        optimizer.step()
        model(x).sum().backward()
    assert [int(m[0].clustering.step) for m in (model, other)] == [1, 3] and int(other[1].clustering.step) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_run(dtype):
    config = edkm.ClusterConfig(bits=2, rows_per_lut=4, embedding_bits=3, anneal=0.1, anneal_steps=6)
    importance = {"hidden.weight": random(1, 8).square().float()}

    def fresh():
        model = prepared(Tied, config, dtype, importance=importance)
        return model, torch.optim.AdamW(model.parameters(), lr=0.02)

    whole, optimizer = fresh()
    train(whole, optimizer, 6)
    first, optimizer = fresh()
    train(first, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    train(second, optimizer, 1)  # a model that has been elsewhere
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, 3, start=3)
    assert_equal_states(states(whole), states(second))
    assert int(second.embed.clustering.step) == 6


def test_a_copy_is_trained_apart_from_the_original():
    model = prepared(Tied)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), 1)
    other = copy.deepcopy(model)
    assert_equal_states(states(model), states(other))
    assert other.head.weight is other.embed.weight and other.head.clustering is other.embed.clustering
    before = states(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    train(other, optimizer, 2)
    assert_equal_states(before, states(model))
    assert not torch.equal(other.embed.clustering.centroids, model.embed.clustering.centroids)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), 2)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, dict(other.named_parameters())[name]), name


def test_a_narrower_model_keeps_its_centroids():
    model = prepared(Tied, dtype=torch.float32, importance={"hidden.weight": torch.rand(1, 8)})
    before = states(model)
    model.to(torch.bfloat16)
    assert model.hidden.weight.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if ".clustering." in name:
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
    model(IDS).float().sum().backward()
    assert model.hidden.weight.grad.dtype == torch.bfloat16
    assert model.hidden.clustering.centroids.dtype == torch.float32
