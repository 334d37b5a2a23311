"""`edkm.coreai` in Apple's own coreai-opt (its environment is another: make test-coreai).

1. Training lowers the loss, is that of edkm's layers, to the bit or within rounding, and has the reference's gradient, in 16 bits too.
2. Evaluation and export have exactly the tables and indices of `freeze`; soft weights are not exported.
3. No more is kept for backward than coreai-opt keeps.
4. The example runs.
"""

import copy
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("coreai_opt", reason="its environment is another: make test-coreai")

from coreai_opt import ExportBackend
from coreai_opt.palettization.spec import DefaultTrainingSpec, PerTensorGranularity
from measuring import saved_bytes
from palettized import IMAGES, MARKS, ROWS4, X, Y, convolution, linears, prepared, random, steps_of, train
from torch import nn

import edkm
from edkm.core.assign import lookup
from edkm.coreai import EdkmTrainingSpec, attach

pytestmark = MARKS
ROOT = Path(__file__).resolve().parents[2]


def assert_hard(step, weight, out):
    """`out` is the weight by our own freeze, and coreai-opt's tables and indices are ours."""
    frozen = step._training_strategy.clustering.freeze(weight)
    assert torch.equal(step.indices.flatten(1), frozen.indices)
    assert torch.equal(step.lut.flatten(), frozen.lut.flatten().to(step.lut.dtype))
    assert torch.equal(out, lookup(frozen.indices, frozen.lut, weight.dtype).view(weight.shape))
    for rows in out.detach().reshape(frozen.lut.shape[0], -1):
        assert rows.unique().numel() <= 2**step.n_bits * step.cluster_dim


GRANULARITIES = [(PerTensorGranularity(), 1), (ROWS4, 1), (PerTensorGranularity(), 2), (ROWS4, 2)]


def test_training_lowers_the_loss_where_coreai_opt_cannot():
    losses, y = {}, X[:, :8]
    for strategy in (EdkmTrainingSpec(anneal_steps=60), DefaultTrainingSpec()):
        palettizer, model = prepared(linears(), strategy=strategy)
        start = F.mse_loss(model.eval()(X), y).item()
        with palettizer.training_mode():
            train(model, 60, y=y, palettizer=palettizer)
        losses[type(strategy)] = F.mse_loss(model.eval()(X), y).item() / start
    assert losses[EdkmTrainingSpec] < 0.5
    assert losses[DefaultTrainingSpec] > 0.9  # trains the biases alone


def twins(make, x, granularity, dim):
    """A model that coreai-opt has prepared for the strategy, and edkm's own from the same tables."""
    twin = make()
    _, model = prepared(make(), x, granularity=granularity, cluster_dim=dim)
    start = {name: step.centroids.clone() for name, (step, _) in steps_of(model).items()}
    rows = getattr(granularity, "group_size", 0)
    edkm.prepare(twin, edkm.ClusterConfig(bits=2, dim=dim, rows_per_lut=rows, anneal_steps=10), centroids=start)
    return model, twin


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_same_run_as_our_convolutions_to_the_bit(granularity, dim):
    model, twin = twins(convolution, IMAGES[0], granularity, dim)
    for seed in range(4):
        losses = [train(m.train(), 2, torch.optim.SGD(m.parameters(), lr=0.1), *IMAGES) for m in (model, twin)]
        assert losses[0] == losses[1], seed
    for name, (step, weight) in steps_of(model).items():
        layer = twin.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(weight, layer.weight)
        assert torch.equal(step._training_strategy.clustering.centroids, layer.clustering.centroids)
    assert torch.equal(model.eval()(IMAGES[0]), twin.eval()(IMAGES[0]))


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_same_run_as_our_linear_layers(granularity, dim):
    model, twin = twins(linears, X, granularity, dim)
    # The same state gives the same soft weight, to the bit.
    clustering = twin[0].clustering
    assert torch.equal(model.train()[0].weight, clustering.decode(*clustering.attach(twin[0].weight)))
    for m in (model, twin):
        train(m.train(), 8, torch.optim.SGD(m.parameters(), lr=0.1))
    for name, (step, weight) in steps_of(model).items():
        layer = twin.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(weight, layer.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(step._training_strategy.clustering.centroids, layer.clustering.centroids, rtol=0, atol=1e-6)
        assert step._training_strategy.clustering.step == layer.clustering.step == 8


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_gradient_is_that_of_the_reference(granularity, dim):
    _, model = prepared(linears(torch.float64), X.double(), granularity=granularity, cluster_dim=dim)
    attach(model)
    for step, weight in steps_of(model).values():
        clustering, g = step._training_strategy.clustering, random(*weight.shape, dtype=torch.float64)
        other = weight.detach().clone().requires_grad_()
        tau = clustering.current_temperature()
        out = edkm.cluster(other, clustering.centroids.clone(), temperature=tau, max_iters=1, backend="reference").weight
        soft = step.train()(weight)
        torch.testing.assert_close(soft, out, rtol=1e-10, atol=1e-12)
        (expected,) = torch.autograd.grad(out, other, g)
        (found,) = torch.autograd.grad(soft, weight, g)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_finalize_exports_our_tables(granularity, dim):
    palettizer, model = prepared(linears(), granularity=granularity, cluster_dim=dim)
    with palettizer.training_mode():
        train(model, 5, palettizer=palettizer)
    model.eval()
    for name, (step, weight) in steps_of(model).items():
        assert_hard(step, weight, model.get_submodule(name.removesuffix(".weight")).weight)
    frozen = {name: step._training_strategy.clustering.freeze(weight) for name, (step, weight) in steps_of(model).items()}
    before = model(X)
    palettizer.finalize(backend=ExportBackend.CoreML)
    assert torch.equal(model(X), before)
    for name, (indices, lut, shape, _) in frozen.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight, lookup(indices, lut).view(shape))
        exported = dict(layer.named_buffers())["_COREML_/weight/lut"]
        assert torch.equal(exported.flatten(), lut.float().flatten()) and exported.shape == (len(lut), 1, *lut.shape[1:])


def test_finalize_refuses_soft_weights():
    palettizer, model = prepared(linears().train())
    with palettizer.training_mode():
        train(model, 2, palettizer=palettizer)
    assert model.training  # as before training_mode
    with pytest.raises(RuntimeError, match=r"^0\.weight: in training mode .* Call model.eval\(\) before finalize\(\)\.$"):
        palettizer.finalize(backend=ExportBackend.CoreML)


def test_nearest_centroids_are_exact_at_8_bits():
    weight = random(64, 512, seed=3)
    layer = nn.Linear(512, 64, bias=False)
    layer.weight.data.copy_(weight)
    _, model = prepared(nn.Sequential(layer), random(2, 512), n_bits=8, fast=True)
    attach(model)
    step, weight = steps_of(model.eval())["0.weight"]
    assert_hard(step, weight, model[0].weight)
    distance = (weight.detach().double().view(-1, 1) - step.lut.double().view(1, -1)).abs()
    best = distance.amin(1)
    assert torch.equal(distance.gather(1, step.indices.long().view(-1, 1)).squeeze(1), best)


def test_evaluation_before_the_optimizer_steps_leaves_no_old_indices():
    _, model = prepared(linears())
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    F.mse_loss(model.train()(X), Y).backward()
    before = model.eval()[0].weight
    optimizer.step()
    step, weight = steps_of(model)["0.weight"]
    after = model[0].weight
    assert_hard(step, weight, after)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype):
    _, model = prepared(linears(dtype), X.to(dtype), granularity=ROWS4)
    losses = train(model.train(), 12, torch.optim.SGD(model.parameters(), lr=0.1), X.to(dtype), Y.to(dtype))
    assert losses[-1] < losses[0]
    for name, (step, weight) in steps_of(model.eval()).items():
        assert_hard(step, weight, model.get_submodule(name.removesuffix(".weight")).weight)
        assert step._training_strategy.clustering.centroids.dtype == torch.float32


def test_nothing_more_is_kept_than_coreai_opt_keeps():
    layer = nn.Linear(256, 128, bias=False)
    kept, x = {}, random(8, 256).requires_grad_()
    for strategy in (EdkmTrainingSpec(), DefaultTrainingSpec()):
        _, model = prepared(nn.Sequential(copy.deepcopy(layer)), x.detach(), strategy=strategy, n_bits=3)
        model.train()(x)  # the first use makes the state
        kept[type(strategy)], _ = saved_bytes(lambda: model(x), *model.parameters(), x)  # noqa: B023
    weight = copy.deepcopy(layer.weight)
    dense, _ = saved_bytes(
        lambda: F.linear(
            x, edkm.cluster(weight, edkm.initial_centroids(weight, 3), temperature=1e-3, max_iters=1, backend="reference").weight
        ),
        weight,
        x,
    )
    one_weight = 4 * layer.weight.numel()
    # One dense weight, which the layer multiplies by: so does coreai-opt's own strategy, which has no gradient for it.
    assert kept[DefaultTrainingSpec] == one_weight
    assert one_weight <= kept[EdkmTrainingSpec] <= one_weight + 1024
    assert dense > 8 * one_weight


def test_the_example_runs(capsys):
    source = ROOT / "examples" / "train_coreai.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 25
    runpy.run_path(str(source))
    printed = capsys.readouterr().out
    assert float(printed.split()[1].rstrip(",")) < 1.0 and "8 values in the first weight" in printed
