"""`edkm.fit`, and `edkm.prepare` given batches.

1. A fitted model is closer to the original than one clustered by k-means, and its packed weights are the fitted ones.
2. Layers are fitted one after another, to the inputs of the model as compressed so far, also where they return several things.
3. Each layer runs twice per batch, a third time only where its outputs must be known; models are left as they were.
4. Any module can be fitted; weights that cannot be are left to `prepare`.
5. `prepare` with batches calibrates, allocates and fits, to the same bits as by hand and with any number of threads.
6. Missing batches, bad values and tables of other shapes are refused.
"""

from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_outputs import BaseModelOutput

import edkm
from edkm.core.assign import lookup
from edkm.models import load_model
from edkm.train import fit
from edkm.train.calibrate import without_cache

CONFIG = edkm.ClusterConfig(bits=2, rows_per_lut=16)


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 300, (2, 32), generator=generator)} for _ in range(count)]


def divergence(model, other):
    with torch.no_grad():
        a, b = (m(**batches()[0]).logits.log_softmax(-1) for m in (model, other))
    return float((b.exp() * (b - a)).sum(-1).mean())


def compressed(tiny_dir, fitted, config=CONFIG):
    model = load_model(tiny_dir)[0]
    start = edkm.fit(model, config, batches()) if fitted else None
    edkm.prepare(model, config, importance=edkm.calibrate(load_model(tiny_dir)[0], batches()), centroids=start)
    return model.eval(), start


def test_a_fitted_model_is_closer_to_the_original(tiny_dir):
    original = load_model(tiny_dir)[0]
    plain, fitted = compressed(tiny_dir, False)[0], compressed(tiny_dir, True)[0]
    assert divergence(fitted, original) < 0.8 * divergence(plain, original)


def test_the_packed_weights_are_the_ones_that_were_fitted(tiny_dir):
    reports = {}
    model = load_model(tiny_dir)[0]
    start = edkm.fit(model, CONFIG, batches(), report=reports.__setitem__)
    assert set(reports) == set(start) and all(0 < e < 1 for e in reports.values())
    assert len(start) == 14 and not model.training and model.config.use_cache
    edkm.prepare(model, CONFIG, centroids=start)
    frozen = edkm.freeze(model)
    for name, centroids in start.items():
        assert torch.equal(frozen[name].lut, centroids.half())
        assert not torch.equal(lookup(frozen[name].indices, frozen[name].lut), dict(model.named_parameters())[name])


def test_layers_see_the_inputs_of_the_model_as_compressed_so_far(tiny_dir):
    together = load_model(tiny_dir)[0]
    together._no_split_modules = []
    at_once = edkm.fit(together, CONFIG, batches())
    in_turn = edkm.fit(load_model(tiny_dir)[0], CONFIG, batches())
    first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(at_once[first], in_turn[first]) and not torch.equal(at_once[second], in_turn[second])


def test_any_module_can_be_fitted():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16), torch.nn.Conv1d(1, 1, 3)).train()
    before = model[0].weight.clone()
    start = edkm.fit(model[:3], edkm.ClusterConfig(bits=3, rows_per_lut=16), [torch.randn(100, 32)])
    assert set(start) == {"0.weight", "2.weight"} and model.training and not torch.equal(model[0].weight, before)


def test_skipped_weights_and_vectors_are_left_as_they_are(tiny_dir):
    model = load_model(tiny_dir)[0]
    config = edkm.ClusterConfig(bits=2, rows_per_lut=16, skip=("*q_proj*",), overrides={"*k_proj*": {"dim": 2}})
    before = {name: p.clone() for name, p in model.named_parameters()}
    start = edkm.fit(model, config, batches())
    assert len(start) == 10
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) == (name not in start)


def test_missing_batches_and_tables_of_other_shapes_are_refused(tiny_dir):
    model = load_model(tiny_dir)[0]
    with pytest.raises(ValueError, match="at least one batch"):
        edkm.fit(model, CONFIG, [])
    with pytest.raises(ValueError, match="rows do not divide"):
        edkm.fit(model, edkm.ClusterConfig(rows_per_lut=7), batches())
    start = edkm.fit(model, CONFIG, batches())
    with pytest.raises(ValueError, match=r"q_proj.weight: centroids: expected \[4, 8, 1\]"):
        edkm.prepare(model, edkm.ClusterConfig(bits=3, rows_per_lut=16), centroids=start)
    with pytest.raises(ValueError, match="no clusterable weight 'nothing'"):
        edkm.prepare(model, CONFIG, centroids={"nothing": torch.ones(1)})
    with pytest.raises(ValueError, match=r"^target_bpw: bits are chosen on data\. Give batches"):
        edkm.prepare(model, CONFIG, target_bpw=3.2)


def test_later_batches_are_called_as_the_first_and_the_model_is_left_as_it_was(tiny_dir):
    model = load_model(tiny_dir)[0]
    mine = model.model.layers[0].forward = model.model.layers[0].forward  # as a library does that wraps it
    layers, calls = fit._chain(model, batches(3))
    assert len(layers) == 2
    assert layers[0].forward is mine and "forward" not in vars(layers[1])
    for i, batch in enumerate(batches(3)):
        _, alone = fit._chain(model, [batch])
        for layer in layers:
            (args, kwargs), (args_alone, kwargs_alone) = calls[layer][i], alone[layer][0]
            assert (args[0] is None) == (layer is layers[1]) and kwargs.keys() == kwargs_alone.keys()
            torch.testing.assert_close([*args[:1], *kwargs["position_embeddings"]], [*args_alone[:1], *kwargs_alone["position_embeddings"]])


class Layer(torch.nn.Module):
    """A layer that returns its hidden states in one of many ways."""

    def __init__(self, returns):
        super().__init__()
        self.up, self.down, self.returns = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), returns

    def forward(self, x, state=None, in_place=False):
        delta = self.down(torch.tanh(self.up(input=x)))
        x = x.add_(delta) if in_place else x + delta
        state = x.sum(-1, keepdim=True) if state is None else state + 1
        return self.returns(x, state)


class Layers(torch.nn.Module):
    _no_split_modules = ("Layer",)

    def __init__(self, returns, again=0, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.again, self.options = torch.nn.ModuleList([Layer(returns) for _ in range(3)]), again, options

    def forward(self, x, use_state=False):
        x, state = x.clone(), None
        for layer in [*self.layers, *self.layers[: self.again]]:
            out = layer(x, state if use_state else None, **self.options)
            found = list(out.values()) if isinstance(out, dict) else out
            x, *others = found if isinstance(found, (tuple, list)) else [found]
            state = others[0] if others else None
        return x


class Named(NamedTuple):
    hidden: torch.Tensor
    state: torch.Tensor


WAYS = {
    "one of one": lambda x, state: (x,),
    "none beside": lambda x, state: (x, None),
    "three": lambda x, state: (x, state, None),
    "list": lambda x, state: [x, state],
    "named": Named,
    "mapping": lambda x, state: {"hidden": x, "state": state},
    "output": lambda x, state: BaseModelOutput(last_hidden_state=x, attentions=state),
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_may_return_several_things(way):
    """Fitted one after another, to the same result as if each returned its hidden states alone."""
    examples = [torch.randn(2, 20, 16), torch.randn(3, 9, 16)]  # of different shapes
    config = edkm.ClusterConfig(bits=2, rows_per_lut=16)
    expected = edkm.fit(Layers(lambda x, state: x), config, examples)
    alone = edkm.fit(Layers(lambda x, state: x), config, examples[:1])
    for options in ({}, {"in_place": True}):
        found = edkm.fit(Layers(WAYS[way], **options), config, examples)
        assert len(found) == 6 and all(torch.equal(found[name], expected[name]) for name in expected)
        assert not torch.equal(found["layers.2.down.weight"], alone["layers.2.down.weight"])
    assert fit._chain(Layers(WAYS[way]), examples)[0]


class Product(torch.nn.Linear):
    """Multiplies in its own way, as Falcon does."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Pair(torch.nn.Linear):
    """Returns something else, as a router does."""

    def forward(self, x):
        return super().forward(x), x


class Grouped(torch.nn.Linear):
    """Groups of rows with different inputs."""

    def forward(self, x):
        return torch.einsum("tgi,goi->tgo", x.unflatten(-1, (2, -1)), self.weight.unflatten(0, (2, -1))).flatten(-2)


def test_subclasses_of_linear_layers_are_fitted_where_they_multiply():
    config = edkm.ClusterConfig(bits=2, rows_per_lut=8)
    example = torch.randn(50, 16)
    plain, own = (torch.nn.Sequential(kind(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)) for kind in (torch.nn.Linear, Product))
    own.load_state_dict(plain.state_dict())
    expected, found = (edkm.fit(model, config, [example]) for model in (plain, own))
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    for other in (Pair(16, 32), Grouped(8, 32)):
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), other)
        before = other.weight.clone()
        assert set(edkm.fit(model, config, [example])) == {"0.weight"} and torch.equal(other.weight, before)


@pytest.mark.parametrize(("way", "times"), [("one of one", 11), ("none beside", 11), ("three", 15)])
def test_layers_run_twice_for_each_batch_and_once_for_the_first(way, times):
    """A third time for every batch only where what they return beside hidden states is needed to see how they are called."""
    model, ran = Layers(WAYS[way]), []
    model.layers[1].up.register_forward_hook(lambda *_: ran.append(1))
    edkm.fit(model, edkm.ClusterConfig(bits=2, rows_per_lut=16), [torch.randn(2, 20, 16) for _ in range(5)])
    assert len(ran) == times
    assert all("forward" not in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("model", [lambda: Layers(WAYS["three"], again=2), lambda: Layers(lambda x, state: x, again=1)])
def test_layers_that_are_run_again_are_no_chain(model):
    examples = [torch.randn(2, 20, 16), torch.randn(3, 9, 16)]
    assert fit._chain(model(), examples) == ([], {})
    assert len(edkm.fit(model(), edkm.ClusterConfig(bits=2, rows_per_lut=16), examples)) == 6


def test_layers_may_pass_on_more_than_hidden_states():
    model = Layers(WAYS["three"])
    examples = [{"x": torch.randn(2, 20, 16), "use_state": True}, {"x": torch.randn(3, 9, 16), "use_state": True}]
    layers, calls = fit._chain(model, examples)
    assert [args[1].shape for args, _ in calls[layers[2]]] == [(2, 20, 1), (3, 9, 1)]
    assert len(edkm.fit(model, edkm.ClusterConfig(bits=2, rows_per_lut=16), examples)) == 6


def test_a_model_within_a_model_keeps_no_cache(tiny_dir):
    outer = torch.nn.Module()
    outer.text, outer.config = load_model(tiny_dir)[0], LlamaConfig(use_cache=True)
    with without_cache(outer):
        assert outer.config.use_cache is False and outer.text.config.use_cache is False
        assert outer.text(**batches()[0]).past_key_values is None
    assert outer.config.use_cache is True and outer.text.config.use_cache is True


def test_prepare_with_batches_calibrates_allocates_and_fits_in_that_order(tiny_dir):
    by_hand, at_once = load_model(tiny_dir)[0], load_model(tiny_dir)[0]
    importance = edkm.calibrate(by_hand, batches())
    config = edkm.allocate(by_hand, CONFIG, batches(), 3.2, importance=importance)
    errors = {}
    start = edkm.fit(by_hand, config, batches(), importance=importance, report=errors.__setitem__)
    expected = edkm.prepare(by_hand, config, importance=importance, centroids=start)
    found = edkm.prepare(at_once, CONFIG, iter(batches()), target_bpw=3.2)
    assert found.config == expected.config == config and str(found) == str(expected)
    assert {entry.name: entry.error for entry in found.entries if entry.error is not None} == errors
    assert by_hand.state_dict().keys() == at_once.state_dict().keys()
    assert all(torch.equal(tensor, at_once.state_dict()[name]) for name, tensor in by_hand.state_dict().items())


def test_given_importance_and_centroids_are_not_made_again(tiny_dir):
    given, plain = load_model(tiny_dir)[0], load_model(tiny_dir)[0]
    weights = {name: p.clone() for name, p in given.named_parameters()}
    importance = {name: tensor + 1 for name, tensor in edkm.calibrate(given, batches()).items()}
    report = edkm.prepare(given, CONFIG, batches(), importance=importance, centroids={})
    assert str(report) == str(edkm.prepare(plain, CONFIG, importance=importance))
    assert all(torch.equal(p, weights[name]) for name, p in given.named_parameters())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in given.state_dict().items())


def test_the_number_of_threads_changes_no_bit():
    def prepared(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
            edkm.prepare(model, edkm.ClusterConfig(rows_per_lut=4), [torch.randn(300, 256)])
            return model.state_dict()
        finally:
            torch.set_num_threads(before)

    one, two = prepared(1), prepared(2)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
