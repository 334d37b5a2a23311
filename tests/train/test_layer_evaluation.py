"""Evaluation, annealing and precision of clustered layers:

1. `eval()` is what `freeze` packs, and softness 0 is straight through;
2. annealing goes from the start to the factor, and without steps there is none;
3. autocast and 16 bits are as precise as in plain layers;
4. there is no gradient where none is wanted.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from tied import CONFIG, IDS, Tied, prepared, random, seeded, soft, train
from torch import nn

import edkm
from edkm.core.assign import lookup
from edkm.train.prepare import clusterings, unclustered


def test_evaluation_is_what_freeze_packs():
    model = prepared(Tied, dtype=torch.float32)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    model.eval()
    frozen = edkm.freeze(model)
    plain = seeded(Tied, torch.float32)
    plain.load_state_dict({name: lookup(f.indices, f.lut).view(f.shape) for name, f in frozen.items()} | unclustered(model), strict=False)
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(model(IDS), plain.eval()(IDS))
    for name, f in frozen.items():
        weight = model.get_parameter(name).detach()
        error = (weight - lookup(f.indices, f.lut)).square().sum() / weight.square().sum()
        assert f.error == pytest.approx(error.item(), rel=1e-5) and f.error > 0
        assert f.shape == weight.shape and f.lut.dtype == torch.float16 and f.indices.dtype == torch.uint8


def test_softness_0_is_straight_through():
    model = prepared(lambda: nn.Sequential(nn.Linear(6, 8)), edkm.ClusterConfig(bits=2, rows_per_lut=4, softness=0.0))
    x, upstream = random(5, 6), random(5, 8, seed=2)
    out = model(x)
    out.backward(upstream)
    linear = model[0]
    assert torch.equal(linear.weight.grad, upstream.mT @ x)
    soft_weight = out - linear.bias
    # The centroids have not been rounded to float16 here.
    hard = F.linear(x, linear.clustering.hard(linear.weight))
    assert torch.allclose(soft_weight, hard, atol=1e-2)
    with torch.no_grad():
        assert len(model[0].clustering.decode(linear.weight, linear.clustering.solve(linear.weight))[:4].unique()) <= 4


def test_annealing_is_geometric_from_the_start_to_the_factor(solves):
    model = prepared(lambda: nn.Sequential(nn.Linear(6, 8)), edkm.ClusterConfig(bits=2, rows_per_lut=4, anneal=0.01, anneal_steps=4))
    clustering, start = model[0].clustering, model[0].clustering.temperature.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        assert torch.allclose(clustering.current_temperature(), start * 0.01 ** (step / 4))
        model(random(3, 6)).sum().backward()
        optimizer.step()
    for step, args in enumerate(solves):
        assert torch.allclose(args[2].temperature, start * 0.01 ** (step / 4))
    assert torch.equal(clustering.temperature, start)


def test_no_annealing_without_steps():
    model = prepared(lambda: nn.Sequential(nn.Linear(6, 8)), edkm.ClusterConfig(bits=2, rows_per_lut=4, anneal=0.01))
    clustering = model[0].clustering
    clustering.step += 100
    assert torch.equal(clustering.current_temperature(), clustering.temperature)


def test_autocast_is_as_precise_as_that_of_a_plain_linear():
    model = prepared(lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12)), dtype=torch.float32)
    x, upstream = random(6, 16, dtype=torch.float32), random(6, 12, seed=2, dtype=torch.float32)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight, _ in clusterings(model)}
    state = {name: copy.deepcopy(clustering) for name, _, clustering in clusterings(model)}
    rest = {name: p.detach() for name, p in model.named_parameters() if "bias" in name}

    def plain(autocast):
        weights = {name: soft(leaf, state[name])[0] for name, leaf in leaves.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = F.linear(F.linear(x, weights["0.weight"], rest["0.bias"]), weights["1.weight"], rest["1.bias"])
        return torch.autograd.grad(y.float(), list(leaves.values()), upstream)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().backward(upstream)
    for (_, weight, _), truth, other in zip(clusterings(model), plain(False), plain(True), strict=True):
        assert weight.grad.dtype == torch.float32
        assert (weight.grad - truth).norm() <= 1.5 * (other - truth).norm()
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_bfloat16_gradients_are_near_float32():
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 8)), torch.bfloat16)
    wide = copy.deepcopy(model).float()
    for m in (model, wide):
        edkm.prepare(m, CONFIG)
    x = random(4, 16, dtype=torch.bfloat16)
    model(x).sum().backward()
    wide(x.float()).sum().backward()
    difference = model[0].weight.grad.float() - wide[0].weight.grad
    assert difference.norm() <= 4 * torch.finfo(torch.bfloat16).eps * wide[0].weight.grad.norm()


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_no_gradient_where_none_is_wanted(frozen):
    model = prepared(lambda: nn.Sequential(nn.Linear(6, 8)))
    x = random(3, 6).requires_grad_(frozen != "input")
    for name, parameter in model[0].named_parameters():
        parameter.requires_grad_(name != frozen)
    model(x).sum().backward()
    grads = {"weight": model[0].weight.grad, "bias": model[0].bias.grad, "input": x.grad}
    assert {name for name, grad in grads.items() if grad is None} == {frozen}
