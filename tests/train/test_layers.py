"""Clustered layers:

1. a layer of any kind computes with the soft weight that `edkm.cluster` gives, and has its gradients, tied weights and vectors too;
2. a weight that is read anywhere in a forward pass is the clustered one, outside it is the parameter; what would escape is refused;
3. layers keep for backward what plain layers keep, and centroids are found once per optimizer step;
4. evaluation, copies and other optimizers move no state, and a resumed run is the same run;
5. `eval()` is what `freeze` packs; annealing goes from the start to the factor; 16 bits are as precise as in plain layers.
"""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from measuring import saved_bytes
from tied import CONFIG, IDS, Tied, assert_equal_states, loss_of, prepared, random, seeded, states
from torch import nn
from torch.utils.checkpoint import checkpoint

import edkm
from edkm.core.assign import lookup
from edkm.train import clustering as clustering_module
from edkm.train.layers import ClusteredEmbedding, ClusteredLinear
from edkm.train.prepare import clusterings, unclustered


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


def assert_clustered(make, x, config=CONFIG, *, plain=None, **options):
    """A prepared model computes, with all gradients, as a plain one with its soft weights; in evaluation with those that are written."""
    model, plain = prepared(make, config, **options), seeded(plain or make)
    found = {name: clustering for name, _, clustering in clusterings(model)}
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in plain.named_parameters()}
    soft_weights = {name: soft(leaves[name], clustering) for name, clustering in found.items()}
    inputs, others = ((x.clone().requires_grad_(x.is_floating_point()),) for _ in range(2))
    expected = torch.func.functional_call(plain, leaves | {name: weight for name, (weight, _) in soft_weights.items()}, others)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    out = model(*inputs)
    out.backward(upstream)
    assert torch.allclose(out, expected, rtol=1e-10)
    for name, parameter in model.named_parameters():
        gradient = leaves[name].grad
        assert (gradient is None) == (parameter.grad is None), name
        assert gradient is None or torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12), name
    assert all(leaves[name].grad.norm() > 0 for name in found)
    assert not x.is_floating_point() or torch.allclose(inputs[0].grad, others[0].grad, rtol=1e-9, atol=1e-12)
    for name, (_, centroids) in soft_weights.items():
        assert torch.allclose(found[name].centroids.double(), centroids, rtol=1e-10), name
    written = {name: lookup(f.indices, f.lut, torch.float64).view(f.shape) for name, f in edkm.freeze(model).items()}
    with torch.no_grad():
        expected = torch.func.functional_call(plain.eval(), written, (x,))
        for other in (model.eval(), copy.deepcopy(model)):
            assert torch.allclose(other(x), expected, rtol=1e-10)
    return model


# Layers.


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["histogram", "blocks", "native", "auto"])
def test_linear(backend, bias, importance):
    config = edkm.ClusterConfig(bits=2, rows_per_lut=0) if backend == "histogram" else CONFIG
    s = {"0.weight": random(1, 6).square()} if importance else None
    model = assert_clustered(lambda: nn.Sequential(nn.Linear(6, 8, bias=bias)), random(3, 5, 6), config, importance=s, backend=backend)
    assert isinstance(model[0], ClusteredLinear)


@pytest.mark.parametrize("rows_per_lut, tables", [(0, 1), (4, 3)])
@pytest.mark.parametrize("bits", [2, 3])
def test_embedding(bits, rows_per_lut, tables):
    config = edkm.ClusterConfig(embedding_bits=bits, overrides={"*": {"rows_per_lut": rows_per_lut}})
    model = assert_clustered(lambda: nn.Sequential(nn.Embedding(12, 8, padding_idx=3)), IDS, config)
    assert isinstance(model[0], ClusteredEmbedding) and model[0].clustering.tables == tables


class OwnAttention(nn.MultiheadAttention):
    """Its `out_proj` is a subclass of `nn.Linear`, whose weight is given to a function."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


VECTORS = edkm.ClusterConfig(bits=2, dim=2, rows_per_lut=0)


@pytest.mark.parametrize(
    "make, shape, config",
    [
        (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding=1)), (2, 4, 10), CONFIG),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), (2, 4, 5, 5), CONFIG),
        (lambda: OwnAttention(8, 2, batch_first=True), (2, 3, 8), CONFIG),
        (lambda: nn.Sequential(nn.Linear(6, 8)), (5, 6), VECTORS),
    ],
)
def test_convolutions_subclasses_and_vectors(make, shape, config):
    assert len(clusterings(assert_clustered(make, random(*shape), config))) == 1


def test_tied_weight_has_one_state_and_is_found_once():
    model = assert_clustered(Tied, IDS)
    names = ["embed.weight", "hidden.weight"]
    assert [name for name, _, _ in clusterings(model)] == names and set(edkm.freeze(model)) == set(names)
    assert model.head.clustering is model.embed.clustering
    assert [n for n in model.state_dict() if n.endswith("clustering.centroids")] == [
        "embed.clustering.centroids",
        "hidden.clustering.centroids",
    ]
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
    # `functional_call` does not last until backward.
    assert_clustered(make, IDS, plain=TiedByUse if make is ReadInBackward else None)


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
    model = prepared(TiedByUse)
    parameters = dict(model.named_parameters())
    for _ in range(2):
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        with pytest.raises((IndexError, RuntimeError)):
            model(IDS + 100)  # fails in the middle of a pass
    assert set(parameters) == {"tokens.weight", "mix.weight", "mix.bias", "gate.weight"}
    assert {name for name in model.state_dict() if ".clustering." not in name} == set(parameters)


def test_a_pickled_model_is_the_same_model():
    model = prepared(lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(64, 8)), dtype=torch.float32)
    again, x = pickle.loads(pickle.dumps(model.eval())), torch.randn(3, 4, 10)
    assert torch.equal(again(x), model(x)) and str(again) == str(model)
    optimizer = torch.optim.SGD(again.train().parameters(), lr=0.1)
    again(x).sum().backward()
    optimizer.step()
    assert not torch.equal(again.eval()(x), model(x))


# Outputs.


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 12), lambda: nn.Linear(8, 12, bias=False)])
def test_the_output_of_a_linear_layer_can_be_changed_in_place(make, shape):
    assert_changes_in_place(make, random(*shape))


@pytest.mark.parametrize("ids", [torch.tensor(3), torch.tensor([]).long(), IDS, IDS[:, :0], IDS.int()])
@pytest.mark.parametrize("rows", [0, 4])
def test_the_output_of_an_embedding_can_be_changed_in_place(ids, rows):
    assert_changes_in_place(lambda: nn.Embedding(12, 8), ids, overrides={"0.weight": {"rows_per_lut": rows}})


def assert_changes_in_place(make, x, **settings):
    def changed(out):
        out += 1.0
        out[..., :2] = out[..., :2].tanh()
        return out.mul_(0.5).relu_()

    config = dataclasses.replace(CONFIG, **settings)
    model, plain = prepared(lambda: nn.Sequential(make()), config), seeded(lambda: nn.Sequential(make()))
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


# Evaluation, temperature, precision.


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
