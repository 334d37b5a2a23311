"""Clustered layers and the weights that they compute with:

1. a layer of any kind computes with the soft weight that `edkm.cluster` gives, and has its gradients, tied weights and vectors too;
2. a weight that is read anywhere in a forward pass is the clustered one, outside it is the parameter;
3. a weight that could be read from elsewhere, or that its module writes to, is refused;
4. a pickled model is the same model, and outputs can be changed in place.
"""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from tied import CONFIG, IDS, Tied, prepared, random, seeded, soft
from torch import nn
from torch.utils.checkpoint import checkpoint

import edkm
from edkm.core.assign import lookup
from edkm.train.layers import ClusteredEmbedding, ClusteredLinear
from edkm.train.prepare import clusterings, unclustered


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
