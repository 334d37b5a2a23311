"""`edkm.fit`, and `edkm.prepare` given batches.

1. A fitted model is closer to the original than one clustered by k-means, and its packed weights are the fitted ones.
2. Layers are fitted one after another, to the inputs of the model as compressed so far, also where they return several things.
3. Each layer runs twice per batch, a third time only where its outputs must be known; models are left as they were.
4. Any module can be fitted; weights that cannot be are left to `prepare`.
5. `prepare` with batches calibrates, allocates and fits, to the same bits as by hand and with any number of threads.
6. Missing batches, bad values and tables of other shapes are refused.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_outputs import BaseModelOutput

import edkm
from edkm.core.assign import lookup
from edkm.train.calibrate import without_cache
from edkm.train.chain import chain

CONFIG = edkm.ClusterConfig(bits=2, rows_per_lut=16)
QUERY = "model.layers.0.self_attn.q_proj.weight"


BATCHES = [{"input_ids": ids} for ids in torch.randint(0, 300, (4, 2, 32), generator=torch.Generator().manual_seed(0))]


def test_a_fitted_model_is_closer_to_the_original(tiny_model):
    def divergence(centroids):
        model = copy.deepcopy(tiny_model)
        start = edkm.fit(model, CONFIG, BATCHES) if centroids is None else centroids
        edkm.prepare(model, CONFIG, importance=importance, centroids=start)
        with torch.no_grad():
            a, b = (m.eval()(**BATCHES[0]).logits.log_softmax(-1) for m in (model, tiny_model))
        return float((b.exp() * (b - a)).sum(-1).mean())

    importance = edkm.calibrate(tiny_model, BATCHES)
    assert divergence(None) < 0.8 * divergence({})


def test_the_packed_weights_are_the_ones_that_were_fitted(tiny_model):
    reports = {}
    start = edkm.fit(tiny_model, CONFIG, BATCHES, report=reports.__setitem__)
    assert set(reports) == set(start) and all(0 < e < 1 for e in reports.values())
    assert len(start) == 14 and not tiny_model.training and tiny_model.config.use_cache
    edkm.prepare(tiny_model, CONFIG, centroids=start)
    frozen = edkm.freeze(tiny_model)
    for name, centroids in start.items():
        assert torch.equal(frozen[name].lut, centroids.half())
        assert not torch.equal(lookup(frozen[name].indices, frozen[name].lut), dict(tiny_model.named_parameters())[name])


def test_layers_see_the_inputs_of_the_model_as_compressed_so_far(tiny_model):
    together = copy.deepcopy(tiny_model)
    together._no_split_modules = []
    at_once, in_turn = (edkm.fit(model, CONFIG, BATCHES) for model in (together, tiny_model))
    second = QUERY.replace("0", "1")
    assert torch.equal(at_once[QUERY], in_turn[QUERY]) and not torch.equal(at_once[second], in_turn[second])


def test_any_module_can_be_fitted():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16), torch.nn.Conv1d(1, 1, 3)).train()
    before = model[0].weight.clone()
    start = edkm.fit(model[:3], edkm.ClusterConfig(bits=3, rows_per_lut=16), [torch.randn(100, 32)])
    assert set(start) == {"0.weight", "2.weight"} and model.training and not torch.equal(model[0].weight, before)


def test_skipped_weights_and_vectors_are_left_as_they_are(tiny_model):
    config = edkm.ClusterConfig(bits=2, rows_per_lut=16, skip=("*q_proj*",), overrides={"*k_proj*": {"dim": 2}})
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    start = edkm.fit(tiny_model, config, BATCHES)
    assert len(start) == 10
    for name, p in tiny_model.named_parameters():
        assert torch.equal(before[name], p) == (name not in start)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"batches": []}, "at least one batch"),
        (edkm.ClusterConfig(rows_per_lut=7), {"batches": BATCHES}, "rows do not divide"),
        (edkm.ClusterConfig(bits=3), {"centroids": {QUERY: torch.ones(4, 4, 1)}}, r"q_proj.weight: centroids: expected \[4, 8, 1\]"),
        (CONFIG, {"centroids": {"nothing": torch.ones(1)}}, "^centroids: the model has no clusterable weight 'nothing'"),
        (CONFIG, {"importance": {"nothing": torch.ones(1)}}, "^importance: the model has no clusterable weight 'nothing'"),
        (CONFIG, {"target_bpw": 3.2}, r"^target_bpw: bits are chosen on data\. Give batches"),
    ],
)
def test_missing_batches_and_tables_of_other_shapes_are_refused(tiny_model, config, options, message):
    with pytest.raises(ValueError, match=message):
        edkm.prepare(tiny_model, config, **options)
    if "batches" in options:
        with pytest.raises(ValueError, match=message):
            edkm.fit(tiny_model, config, options["batches"])


def test_later_batches_are_called_as_the_first_and_the_model_is_left_as_it_was(tiny_model):
    mine = tiny_model.model.layers[0].forward = tiny_model.model.layers[0].forward  # as a library does that wraps it
    layers, calls = chain(tiny_model, BATCHES[:3])
    assert len(layers) == 2
    assert layers[0].forward is mine and "forward" not in vars(layers[1])
    for i, batch in enumerate(BATCHES[:3]):
        _, alone = chain(tiny_model, [batch])
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


EXAMPLES = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 20, 16), (3, 9, 16))]
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
    expected = edkm.fit(Layers(lambda x, state: x), CONFIG, EXAMPLES)
    alone = edkm.fit(Layers(lambda x, state: x), CONFIG, EXAMPLES[:1])
    for options in ({}, {"in_place": True}):
        found = edkm.fit(Layers(WAYS[way], **options), CONFIG, EXAMPLES)
        assert len(found) == 6 and all(torch.equal(found[name], expected[name]) for name in expected)
        assert not torch.equal(found["layers.2.down.weight"], alone["layers.2.down.weight"])
    assert chain(Layers(WAYS[way]), EXAMPLES)[0]


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
    edkm.fit(model, CONFIG, [torch.randn(2, 20, 16) for _ in range(5)])
    assert len(ran) == times
    assert all("forward" not in vars(layer) for layer in model.layers)


@pytest.mark.parametrize(("way", "again"), [("three", 2), ("one of one", 1)])
def test_layers_that_are_run_again_are_no_chain(way, again):
    model = Layers(WAYS[way], again=again)
    assert chain(model, EXAMPLES) == ([], {})
    assert len(edkm.fit(model, CONFIG, EXAMPLES)) == 6


def test_layers_may_pass_on_more_than_hidden_states():
    model, examples = Layers(WAYS["three"]), [{"x": x, "use_state": True} for x in EXAMPLES]
    layers, calls = chain(model, examples)
    assert [args[1].shape for args, _ in calls[layers[2]]] == [(2, 20, 1), (3, 9, 1)]
    assert len(edkm.fit(model, CONFIG, examples)) == 6


def test_a_model_within_a_model_keeps_no_cache(tiny_model):
    outer = torch.nn.Module()
    outer.text, outer.config = tiny_model, LlamaConfig(use_cache=True)
    with without_cache(outer):
        assert outer.config.use_cache is False and outer.text.config.use_cache is False
        assert outer.text(**BATCHES[0]).past_key_values is None
    assert outer.config.use_cache is True and outer.text.config.use_cache is True


def test_prepare_with_batches_calibrates_allocates_and_fits_in_that_order(tiny_model):
    by_hand, at_once = tiny_model, copy.deepcopy(tiny_model)
    importance = edkm.calibrate(by_hand, BATCHES)
    config = edkm.allocate(by_hand, CONFIG, BATCHES, 3.2, importance=importance)
    errors = {}
    start = edkm.fit(by_hand, config, BATCHES, importance=importance, report=errors.__setitem__)
    expected = edkm.prepare(by_hand, config, importance=importance, centroids=start)
    found = edkm.prepare(at_once, CONFIG, iter(BATCHES), target_bpw=3.2)
    assert found.config == expected.config == config and str(found) == str(expected)
    assert {entry.name: entry.error for entry in found.entries if entry.error is not None} == errors
    assert by_hand.state_dict().keys() == at_once.state_dict().keys()
    assert all(torch.equal(tensor, at_once.state_dict()[name]) for name, tensor in by_hand.state_dict().items())


def test_given_importance_and_centroids_are_not_made_again(tiny_model):
    given, plain = tiny_model, copy.deepcopy(tiny_model)
    weights = {name: p.clone() for name, p in given.named_parameters()}
    importance = {name: tensor + 1 for name, tensor in edkm.calibrate(given, BATCHES).items()}
    report = edkm.prepare(given, CONFIG, BATCHES, importance=importance, centroids={})
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
