"""Clustered layers:

1. a layer of any kind computes with the soft weight that `edkm.cluster` gives, and has its gradients, tied weights and vectors too;
2. a weight that is read anywhere in a forward pass is the clustered one, outside it is the parameter; what would escape is refused;
3. layers keep for backward what plain layers keep, and centroids are found once per optimizer step;
4. evaluation, looking, copies and other optimizers move no state, and a resumed run is the same run;
5. `eval()` is what `freeze` packs; annealing goes from the start to the factor; 16 bits are as precise as in plain layers;
6. `prepare` reports every parameter with a reason, refuses with names, and leaves the model untouched when it does.
"""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from measuring import saved_bytes
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import edkm
from edkm.core.assign import lookup
from edkm.train import clustering as clustering_module
from edkm.train.calibrate import calibrate
from edkm.train.clustering import Clustering
from edkm.train.layers import ClusteredEmbedding, ClusteredLinear
from edkm.train.prepare import clusterings, unclustered

CONFIG = edkm.ClusterConfig(bits=2, rows_per_lut=4, embedding_bits=3)


def seeded(make, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype)


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def soft(weight, clustering, backend="reference"):
    """The clustered weight by `edkm.cluster`, differentiable in `weight`, from the clustering's state before it moves."""
    result = edkm.cluster(
        weight.flatten(1),
        clustering.centroids.clone().to(torch.float64 if weight.dtype == torch.float64 else torch.float32),
        temperature=clustering.current_temperature(),
        importance=clustering.importance,
        max_iters=clustering.config.max_iters,
        backend=backend,
    )
    return result.weight.view_as(weight), result.centroids


class Tied(nn.Module):
    """Embedding, two layers, and a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + torch.tanh(self.hidden(x))))


IDS = torch.tensor([[0, 3, 3, 11], [7, 1, 5, 0]])


def loss_of(model, ids=IDS):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# The same numbers.


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["reference", "histogram", "blocks", "native", "auto"])
def test_linear(backend, bias, importance):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8, bias=bias)))
    s = {"0.weight": random(1, 6).square()} if importance else None
    used = "blocks" if backend == "reference" else backend
    config = edkm.ClusterConfig(bits=2, rows_per_lut=0) if backend == "histogram" else CONFIG
    edkm.prepare(model, config, importance=s, backend=used)
    (linear,), x, upstream = model, random(3, 5, 6), random(3, 5, 8, seed=2)
    weight = linear.weight.detach().clone().requires_grad_()
    truth, centroids = soft(weight, linear.clustering, backend)
    other = x.clone().requires_grad_()
    expected = F.linear(other, truth, linear.bias)
    grads = torch.autograd.grad(expected, [other, weight, *([linear.bias] if bias else [])], upstream)
    x.requires_grad_()
    out = model(x)
    out.backward(upstream)
    assert isinstance(linear, ClusteredLinear)
    assert torch.allclose(out, expected, rtol=1e-10)
    assert torch.allclose(linear.clustering.centroids.double(), centroids, rtol=1e-10)
    mine = [x.grad, linear.weight.grad, *([linear.bias.grad] if bias else [])]
    for got, grad in zip(mine, grads, strict=True):
        assert torch.allclose(got, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3])
def test_embedding(bits):
    model = seeded(lambda: nn.Sequential(nn.Embedding(12, 8, padding_idx=3)))
    edkm.prepare(model, edkm.ClusterConfig(embedding_bits=bits))
    (embedding,) = model
    weight = embedding.weight.detach().clone().requires_grad_()
    truth, _ = soft(weight, embedding.clustering)
    upstream = random(2, 4, 8)
    (expected,) = torch.autograd.grad(F.embedding(IDS, truth, padding_idx=3), weight, upstream)
    out = model(IDS)
    out.backward(upstream)
    assert isinstance(embedding, ClusteredEmbedding)
    assert torch.allclose(out, truth[IDS], rtol=1e-10)
    assert torch.allclose(embedding.weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_embedding_with_several_tables():
    model = seeded(lambda: nn.Sequential(nn.Embedding(12, 8)))
    edkm.prepare(model, edkm.ClusterConfig(embedding_bits=2, overrides={"*": {"rows_per_lut": 4}}))
    assert model[0].clustering.tables == 3
    truth, _ = soft(model[0].weight.detach(), model[0].clustering)
    assert torch.allclose(model(IDS), truth[IDS], rtol=1e-10)
    assert torch.equal(model.eval()(IDS), model[0].clustering.hard(model[0].weight)[IDS])


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Conv1d(4, 8, 3, padding=1), (2, 4, 10)),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    ],
)
def test_convolution(make, shape):
    model = seeded(lambda: nn.Sequential(make()))
    edkm.prepare(model, CONFIG)
    (conv,), x = model, random(*shape)
    _, parameter, clustering = clusterings(model)[0]
    weight = parameter.detach().clone().requires_grad_()
    truth, _ = soft(weight, clustering)
    expected = conv._conv_forward(x, truth, conv.bias)
    upstream = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(expected, weight, upstream)
    out = model(x)
    out.backward(upstream)
    assert torch.allclose(out, expected, rtol=1e-10)
    assert torch.allclose(parameter.grad, grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.eval()(x), conv._conv_forward(x, clustering.hard(parameter), conv.bias))


def test_linear_subclass_goes_through_the_parametrization():
    model = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    report = edkm.prepare(model, CONFIG)
    assert [e.name for e in report.clustered] == ["out_proj.weight"]
    (_, parameter, clustering), x = clusterings(model)[0], random(2, 3, 8)
    weight = parameter.detach().clone().requires_grad_()
    truth, _ = soft(weight, clustering)
    plain = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    functional = {"out_proj.weight": truth}
    expected, _ = torch.func.functional_call(plain, functional, (x, x, x))
    out, _ = model(x, x, x)
    assert torch.allclose(out, expected, rtol=1e-10)
    (grad,) = torch.autograd.grad(expected.sum(), weight)
    out.sum().backward()
    assert torch.allclose(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def test_vectors():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8)))
    edkm.prepare(model, edkm.ClusterConfig(bits=2, dim=2, rows_per_lut=0))
    weight = model[0].weight.detach().clone().requires_grad_()
    truth, _ = soft(weight, model[0].clustering)
    x = random(5, 6)
    (grad,) = torch.autograd.grad(F.linear(x, truth).sum(), weight)
    model(x).sum().backward()
    assert torch.allclose(model[0].weight.grad, grad, rtol=1e-9, atol=1e-12)


# Tied weights.


def test_tied_weight_gets_the_sum_of_both_uses_and_one_state():
    model = seeded(Tied)
    report = edkm.prepare(model, CONFIG)
    assert [e.name for e in report.clustered] == ["embed.weight", "hidden.weight"]
    assert model.head.clustering is model.embed.clustering
    assert [n for n in model.state_dict() if n.endswith("clustering.centroids")] == [
        "embed.clustering.centroids",
        "hidden.clustering.centroids",
    ]
    plain, weights = seeded(Tied), {}
    for name, module in (("embed.weight", model.embed), ("hidden.weight", model.hidden)):
        leaf = module.weight.detach().clone().requires_grad_()
        weights[name] = leaf, soft(leaf, module.clustering)[0]
    replaced = {name: clustered for name, (_, clustered) in weights.items()}
    expected = torch.func.functional_call(plain, replaced | {"head.weight": replaced["embed.weight"]}, (IDS,))
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [leaf for leaf, _ in weights.values()], upstream)
    out = model(IDS)
    out.backward(upstream)
    assert torch.allclose(out, expected, rtol=1e-9)
    assert torch.allclose(model.embed.weight.grad, grads[0], rtol=1e-8, atol=1e-11)
    assert torch.allclose(model.hidden.weight.grad, grads[1], rtol=1e-8, atol=1e-11)


def test_tied_weight_is_found_once():
    model = seeded(Tied)
    edkm.prepare(model, CONFIG)
    names = [name for name, _, _ in clusterings(model)]
    assert names == ["embed.weight", "hidden.weight"] and set(edkm.freeze(model)) == set(names)
    assert set(unclustered(model)) == {"hidden.bias", "norm.weight", "norm.bias"}


# A weight that is read and not called.


class TiedByUse(nn.Module):
    """Multiplies by the weights of an embedding and of a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.tokens, self.mix, self.gate = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, ids):
        x = self.mix(self.tokens(ids))
        return self.logits(x * F.linear(x, self.gate.weight).sigmoid())

    def logits(self, x):
        return F.linear(x, self.tokens.weight)


class ReadInBackward(TiedByUse):
    """Computes its activations again in backward, by a function that belongs to no module."""

    def logits(self, x):
        return checkpoint(super().logits, x, use_reentrant=False)


class SharedWithOthers(nn.Module):
    """Its weights are also parameters of modules that could not be clustered by themselves."""

    def __init__(self):
        super().__init__()
        self.bag, self.head, self.mix = nn.EmbeddingBag(12, 8, mode="sum"), nn.Linear(8, 12, bias=False), nn.Linear(8, 8)
        self.head.weight, self.raw = self.bag.weight, self.mix.weight

    def forward(self, ids):
        return self.head(self.mix(self.bag(ids)) @ self.raw)


class Attention(nn.Module):
    """PyTorch's own layer, which in evaluation gives all its weights to one function."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, ids):
        return self.layer(self.tokens(ids))


def a_library_put_a_forward_there():
    model = TiedByUse()
    plain = model.mix.forward
    model.mix.forward = lambda x: plain(x)
    return model


READERS = [TiedByUse, ReadInBackward, SharedWithOthers, Attention, lambda: nn.Sequential(TiedByUse()), a_library_put_a_forward_there]


@pytest.mark.parametrize("make", READERS)
def test_a_weight_that_is_read_is_the_clustered_one(make):
    """In evaluation that which is written, in training the soft one with its gradient, whoever reads it."""
    # `functional_call` does not last until backward.
    model, plain = seeded(make), seeded(TiedByUse if make is ReadInBackward else make)
    edkm.prepare(model, CONFIG)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight, _ in clusterings(model)}
    replaced = {name: soft(leaves[name], clustering)[0] for name, _, clustering in clusterings(model)}
    expected = torch.func.functional_call(plain, replaced, (IDS,))
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, list(leaves.values()), upstream)
    out = model(IDS)
    out.backward(upstream)
    assert torch.allclose(out, expected, rtol=1e-8)
    for (name, weight, _), gradient in zip(clusterings(model), gradients, strict=True):
        assert gradient.norm() > 0 and torch.allclose(weight.grad, gradient, rtol=1e-7, atol=1e-10), name
    written = {name: lookup(f.indices, f.lut, torch.float64).view(f.shape) for name, f in edkm.freeze(model).items()}
    with torch.no_grad():
        expected = torch.func.functional_call(plain.eval(), written, (IDS,))
        for other in (model.eval(), copy.deepcopy(model)):
            assert torch.allclose(other(IDS), expected, rtol=1e-10)


@pytest.mark.parametrize("hold", [lambda w: w, lambda w: [w], lambda w: (None, w), lambda w: {"w": w}, lambda w: {"a": [(w,)]}])
def test_a_weight_that_could_be_read_from_elsewhere_is_refused(hold):
    model = seeded(lambda: nn.Sequential(TiedByUse(), nn.Identity()))
    model[1].__dict__["aside"] = hold(model[0].mix.weight)
    with pytest.raises(ValueError, match=r"^0\.mix\.weight: 1\.aside holds it, too"):
        edkm.prepare(model, CONFIG)
    assert len(edkm.prepare(model, dataclasses.replace(CONFIG, skip=("0.mix",))).clustered) == 2


class Limited(nn.Conv1d):
    """Keeps its weight small by writing to it in each pass, as is usual in networks for EEG."""

    def forward(self, x):
        self.weight.data = self.weight.data.renorm(2, 0, 0.1)
        return super().forward(x)


class LimitedInPlace(nn.Conv1d):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
            return super().forward(x)


@pytest.mark.parametrize("kind", [Limited, LimitedInPlace])
def test_a_forward_that_writes_to_its_weight_is_refused(kind):
    model, x = nn.Sequential(kind(4, 8, 3)), torch.randn(2, 4, 10)
    edkm.prepare(model, CONFIG)
    for m in (model.train(), model.eval()):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}\.weight: the forward of its module writes to it.*skip"):
            m(x)


def test_outside_of_a_forward_pass_a_weight_is_the_parameter():
    model = seeded(TiedByUse)
    edkm.prepare(model, CONFIG)
    parameters = dict(model.named_parameters())
    for _ in range(2):
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        with pytest.raises((IndexError, RuntimeError)):
            model(IDS + 100)  # fails in the middle of a pass
    assert set(parameters) == {"tokens.weight", "mix.weight", "mix.bias", "gate.weight"}
    assert {name for name in model.state_dict() if ".clustering." not in name} == set(parameters)


def test_a_pickled_model_is_the_same_model():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(64, 8))
    edkm.prepare(model, CONFIG)
    again, x = pickle.loads(pickle.dumps(model.eval())), torch.randn(3, 4, 10)
    assert torch.equal(again(x), model(x)) and str(again) == str(model)
    train_of = torch.optim.SGD(again.train().parameters(), lr=0.1)
    again(x).sum().backward()
    train_of.step()
    assert not torch.equal(again.eval()(x), model(x))


# What a layer returns.


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 12), lambda: nn.Linear(8, 12, bias=False)])
def test_what_a_linear_layer_returned_can_be_changed_in_place(make, shape):
    assert_changes_in_place(make, random(*shape))


@pytest.mark.parametrize("ids", [torch.tensor(3), torch.tensor([]).long(), IDS, IDS[:, :0], IDS.int()])
@pytest.mark.parametrize("rows", [0, 4])
def test_what_an_embedding_returned_can_be_changed_in_place(ids, rows):
    assert_changes_in_place(lambda: nn.Embedding(12, 8), ids, overrides={"0.weight": {"rows_per_lut": rows}})


def assert_changes_in_place(make, x, **settings):
    def changed(out):
        out += 1.0
        out[..., :2] = out[..., :2].tanh()
        return out.mul_(0.5).relu_()

    model, plain = seeded(lambda: nn.Sequential(make())), seeded(lambda: nn.Sequential(make()))
    edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, embedding_bits=3, **settings))
    leaf = model[0].weight.detach().clone().requires_grad_()
    expected = changed(torch.func.functional_call(plain, {"0.weight": soft(leaf, model[0].clustering)[0]}, (x,)))
    out = changed(model(x))
    assert out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-10)
    out.square().sum().backward()
    (gradient,) = torch.autograd.grad(expected.square().sum(), leaf)
    assert torch.allclose(model[0].weight.grad, gradient, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        before = model.eval()(x).clone()
        model(x).zero_()
        assert torch.equal(model(x), before)


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


@pytest.fixture
def solves(monkeypatch):
    """Counts the clusterings that layers solve."""
    calls, solve = [], clustering_module.solve

    def counted(*args):
        calls.append(args)
        return solve(*args)

    monkeypatch.setattr(clustering_module, "solve", counted)
    return calls


def test_one_solve_per_step_whatever_the_number_of_micro_batches(solves):
    model = seeded(Tied, torch.float32)
    edkm.prepare(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        for micro in range(3):
            loss_of(model, (IDS + micro) % 12).backward()
        assert len(solves) == 2 * step
        assert int(model.embed.clustering.step) == step
        optimizer.step()
        optimizer.zero_grad()


def test_micro_batches_add_up_to_the_batch():
    one, many = seeded(Tied), seeded(Tied)
    for model in (one, many):
        edkm.prepare(model, CONFIG)
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
        model = seeded(Block)
        edkm.prepare(model, CONFIG)
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


def test_looking_moves_no_state():
    model = seeded(Tied)
    edkm.prepare(model, CONFIG)
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
    model = seeded(Tied)
    edkm.prepare(model, CONFIG)
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
    model = seeded(Tied)
    edkm.prepare(model, CONFIG)
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


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, (IDS + step) % 12).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_run(dtype):
    config = edkm.ClusterConfig(bits=2, rows_per_lut=4, embedding_bits=3, anneal=0.1, anneal_steps=6)
    importance = {"hidden.weight": random(1, 8).square().float()}

    def fresh():
        model = seeded(Tied, dtype)
        edkm.prepare(model, config, importance=importance)
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


def test_a_copy_goes_its_own_way():
    model = seeded(Tied)
    edkm.prepare(model, CONFIG)
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
    model = seeded(Tied, torch.float32)
    edkm.prepare(model, CONFIG, importance={"hidden.weight": torch.rand(1, 8)})
    before = states(model)
    model.to(torch.bfloat16)
    assert model.hidden.weight.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if ".clustering." in name:
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
    model(IDS).float().sum().backward()
    assert model.hidden.weight.grad.dtype == torch.bfloat16
    assert model.hidden.clustering.centroids.dtype == torch.float32


# Evaluation, temperature, precision.


def test_evaluation_is_what_freeze_packs():
    model = seeded(Tied, torch.float32)
    edkm.prepare(model, CONFIG)
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
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8)))
    edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, softness=0.0))
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
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8)))
    edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, anneal=0.01, anneal_steps=4))
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
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8)))
    edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, anneal=0.01))
    clustering = model[0].clustering
    clustering.step += 100
    assert torch.equal(clustering.current_temperature(), clustering.temperature)


def test_autocast_is_as_precise_as_that_of_a_plain_linear():
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12)), torch.float32)
    edkm.prepare(model, CONFIG)
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
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8)))
    edkm.prepare(model, CONFIG)
    x = random(3, 6).requires_grad_(frozen != "input")
    for name, parameter in model[0].named_parameters():
        parameter.requires_grad_(name != frozen)
    model(x).sum().backward()
    grads = {"weight": model[0].weight.grad, "bias": model[0].bias.grad, "input": x.grad}
    assert {name for name, grad in grads.items() if grad is None} == {frozen}


# prepare.


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.limited = nn.Embedding(8, 4, max_norm=1.0)
        self.conv = nn.Conv1d(4, 8, 3)
        self.grid = nn.Parameter(torch.randn(4, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)


def test_report_has_every_parameter_and_a_reason():
    model = seeded(Zoo, torch.float32)
    names = [name for name, _ in model.named_parameters()]
    shapes = [tuple(p.shape) for p in model.parameters()]
    report = edkm.prepare(
        model, edkm.ClusterConfig(bits=2, rows_per_lut=2, embedding_bits=4, skip=("down*",)), importance={"up.weight": torch.ones(1, 4)}
    )
    assert [e.name for e in report.entries] == names and [e.shape for e in report.entries] == shapes
    notes = {e.name: e.note for e in report.entries}
    assert notes["down.weight"] == "matches skip"
    assert notes["limited.weight"] == "an embedding with max_norm or sparse gradients"
    assert notes["grid"] == notes["positions"]
    assert notes["grid"] == "neither the weight of a Linear, Embedding, Conv1d or Conv2d nor a stack of matrices"
    assert notes["norm.weight"] == notes["up.bias"] == "a vector"
    assert {e.name: (e.bits, e.tables, e.dim) for e in report.clustered} == {
        "embed.weight": (4, 1, 1),
        "conv.weight": (2, 4, 1),
        "up.weight": (2, 4, 1),
    }
    assert all(e.note for e in report.entries)
    assert "no importance" in notes["conv.weight"] and "no importance" not in notes["up.weight"]
    assert set(report.clustered) | set(report.skipped) == set(report.entries)
    assert all(name in str(report) and notes[name] in str(report) for name in names)
    packed = (32 * 4 + 7) // 8 + 16 * 2 + (96 * 2) // 8 + 4 * 4 * 2 + (32 * 2) // 8 + 4 * 4 * 2
    assert report.packed_bytes == packed + 4 * sum(torch.Size(e.shape).numel() for e in report.skipped)


def test_overrides_and_embedding_bits():
    config = edkm.ClusterConfig(
        bits=2, rows_per_lut=0, embedding_bits=0, overrides={"up*": {"bits": 3, "rows_per_lut": 4}, "*.weight": {"dim": 2}}
    )
    report = edkm.prepare(seeded(Zoo, torch.float32), config)
    assert {e.name: (e.bits, e.tables, e.dim) for e in report.clustered} == {
        "conv.weight": (2, 1, 2),
        "up.weight": (3, 2, 1),
        "down.weight": (2, 1, 2),
    }
    notes = {e.name: e.note for e in report.skipped}
    assert notes["embed.weight"] == notes["limited.weight"] == "an embedding, and embedding_bits is 0"


def test_embedding_bits_0_leaves_a_tied_head_alone():
    model = seeded(Tied)
    report = edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, embedding_bits=0))
    assert [e.name for e in report.clustered] == ["hidden.weight"]
    assert type(model.head) is nn.Linear and type(model.embed) is nn.Embedding


@pytest.mark.parametrize("pattern", ["embed.weight", "head.weight"])
def test_skip_matches_any_name_of_a_tied_weight(pattern):
    report = edkm.prepare(seeded(Tied), edkm.ClusterConfig(bits=2, rows_per_lut=4, skip=(pattern,)))
    assert [e.name for e in report.clustered] == ["hidden.weight"]


@pytest.mark.parametrize(
    "config, importance, message",
    [
        ({"bits": 8, "rows_per_lut": 2}, None, "up.weight: 256 centroids need at least 256 weights.*skip"),
        ({"bits": 2, "rows_per_lut": 3}, None, "up.weight: 8 rows do not divide into tables of 3 rows.*skip"),
        ({"bits": 2, "rows_per_lut": 2}, {"left.weight": torch.ones(1, 4)}, "importance: .*'left.weight'.*Calibrate"),
        ({"bits": 2, "rows_per_lut": 2}, {"down.weight": torch.ones(1, 5)}, "down.weight: importance: .*broadcast"),
        ({"skip": ("*",), "bits": 2}, None, r"model: no weight is clustered \(.*matches skip.*\).*Check skip"),
    ],
)
def test_errors_leave_the_model_untouched(config, importance, message):
    model = seeded(lambda: nn.Sequential(), torch.float32)
    model.up, model.down = nn.Linear(4, 8), nn.Linear(8, 4)
    before = states(model)
    with pytest.raises(ValueError, match=f"^{message}"):
        edkm.prepare(model, edkm.ClusterConfig(**config), importance=importance)
    assert type(model.up) is type(model.down) is nn.Linear
    assert_equal_states(before, states(model))


def test_non_finite_weights_are_named_and_the_others_untouched():
    model = seeded(Tied, torch.float32)
    with torch.no_grad():
        model.hidden.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^hidden\.weight: NaN or infinite"):
        edkm.prepare(model, CONFIG)
    assert type(model.embed) is nn.Embedding and "embed.clustering.centroids" not in model.state_dict()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda w: w.mul_(1e-9), "stored in float16, which would lose 100%.*skip"),
        (lambda w: w[0, 0].fill_(1e5), r"a weight of magnitude.*at most 65504.*skip"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_float16_tables_cannot_hold_are_refused(weight, message, dtype):
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8)).to(dtype)
    weight(model[1].weight.data)
    with pytest.raises(ValueError, match=rf"^1\.weight: .*{message}"):
        edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=1))
    report = edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=1, skip=("1",)))
    assert [entry.name for entry in report.clustered] == ["0.weight"]


def test_small_weights_that_float16_resolves_and_zeros_are_kept():
    model = nn.Sequential(nn.Linear(256, 8, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(std=1e-6)
        model[0].weight[3] = 0
    edkm.prepare(model, edkm.ClusterConfig(bits=4, rows_per_lut=1))
    assert edkm.freeze(model)["0.weight"].error < 0.02
    with torch.no_grad():
        model[0].weight[1] *= 1e-3
    with pytest.warns(UserWarning, match=r"0\.weight: some of its rows are so small that float16 tables lose 100%"):
        edkm.freeze(model)


def test_a_row_that_is_nearly_dead_is_warned_of():
    model = nn.Sequential(nn.Linear(256, 8, bias=False))
    model[0].weight.data[2] *= 1e-9
    with pytest.warns(UserWarning, match=r"0\.weight: some of its rows are so small.*skip"):
        edkm.prepare(model, edkm.ClusterConfig(bits=4, rows_per_lut=1))


def test_nan_in_a_parameter_that_is_left_alone_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model[1].weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"^1\.weight: NaN or infinite values"):
        edkm.prepare(model, CONFIG)


def as_parameter(weight):
    return nn.Parameter(weight, requires_grad=weight.is_floating_point() and weight.dtype.itemsize > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to(torch.uint8), r"^1\.weight: .*torch\.uint8.*Dequantize"),
        (lambda w: w.to(torch.int8), r"^1\.weight: .*torch\.int8.*Dequantize"),
        (lambda w: w.to(torch.float8_e4m3fn), r"^1\.weight: .*torch\.float8_e4m3fn.*Dequantize"),
        (lambda w: w.to(torch.complex64), r"^1\.weight: .*torch\.complex64"),
        (lambda w: w.to_sparse(), r"^1\.weight: .*sparse.*to_dense"),
        (lambda w: w.to("meta"), r"^1\.weight: .*meta.*Load the weights"),
        (lambda w: TwoTensor(w, w), r"^1\.weight: .*TwoTensor.*Dequantize"),
    ],
)
def test_what_is_no_plain_weight_is_refused(change, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = as_parameter(change(model[1].weight.detach()))
    with pytest.raises(ValueError, match=message):
        edkm.prepare(model, CONFIG)
    assert type(model[0]) is nn.Linear
    if model[1].weight.dtype.itemsize == 1:  # of a kind that can be written as it is
        assert len(edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, skip=("1.weight",))).clustered) == 1


def test_quantized_layers_of_others_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    model[1].register_buffer("qweight", torch.zeros(8, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^1: its weight is packed or quantized already\. Load the model dequantized"):
        edkm.prepare(model, CONFIG)
    lazy = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"^0\.weight: has no shape yet"):
        edkm.prepare(lazy, CONFIG)


@pytest.mark.parametrize(("backend", "message"), [("none", "is not one of"), ("histogram", "histogram needs one table")])
def test_a_backend_that_would_fail_in_training_is_refused(backend, message):
    with pytest.raises(ValueError, match=message):
        edkm.prepare(seeded(Tied), edkm.ClusterConfig(bits=2, dim=2, rows_per_lut=4, embedding_bits=0), backend=backend)


def test_prepare_twice_and_freeze_before():
    model = seeded(Tied)
    with pytest.raises(ValueError, match=r"^model: nothing in it is clustered. Call edkm.prepare first."):
        edkm.freeze(model)
    edkm.prepare(model, CONFIG)
    with pytest.raises(ValueError, match=r"^model: it is prepared already.*afresh"):
        edkm.prepare(model, CONFIG)
    with pytest.raises(ValueError, match=r"^model: no weight is clustered"):
        edkm.prepare(nn.LayerNorm(4), CONFIG)
    assert sum(isinstance(m, Clustering) for m in model.modules()) == 2


def test_prepare_keeps_parameters_and_names():
    model = seeded(Tied)
    before = dict(model.named_parameters())
    edkm.prepare(model, CONFIG)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


# calibrate.


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(self.drop(self.conv(x).mT))


def test_calibrate_is_the_mean_of_squares():
    model = seeded(Watched, torch.float32)
    model.drop.eval()
    batches = [random(2, 4, 7, seed=i, dtype=torch.float32) for i in range(3)]
    batches[1] = batches[1][:1]
    importance = calibrate(model, batches)
    assert set(importance) == {"conv.weight", "linear.weight"}
    with torch.no_grad():
        inputs = torch.cat([model.conv(b).mT.flatten(0, 1) for b in batches])
    assert importance["linear.weight"].shape == (1, 6) and importance["linear.weight"].dtype == torch.float32
    assert torch.allclose(importance["linear.weight"][0], inputs.square().mean(0), rtol=1e-5)
    channels = torch.cat([b.mT.flatten(0, 1) for b in batches]).square().mean(0)  # [4]
    assert torch.allclose(importance["conv.weight"][0], channels.view(2, 2).mean(0).repeat_interleave(3), rtol=1e-5)
    assert not model.drop.training and model.training and model.linear.training
    edkm.prepare(model, edkm.ClusterConfig(bits=1, rows_per_lut=0), importance=importance)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_calibrate_takes_tensors_sequences_and_mappings(wrap):
    model, x = seeded(Watched, torch.float32), random(2, 4, 7, dtype=torch.float32)
    expected = calibrate(model, [x])
    got = calibrate(model, [wrap(x)])
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_calibrate_cleans_up_after_a_failure():
    model = seeded(Watched, torch.float32)
    model.linear.eval()
    flags = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=r"^linear\.weight: its input is NaN or infinite|^conv\.weight: its input"):
        calibrate(model, [torch.full((1, 4, 7), torch.nan)])
    with pytest.raises(ValueError, match=r"^batches: calibration needs at least one batch"):
        calibrate(model, [])
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.ones(1, 5, 7)])
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())
