"""`ClusterConfig`.

1. A config converts to JSON and back; unknown fields are refused.
2. Values of the wrong kind or out of range are refused, in overrides too; a config is frozen and shares nothing.
3. Each field and each override changes the result of training.
4. A pattern names a weight or a module, a tied weight by any of its names; a pattern without effect is refused.
"""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import edkm
from edkm import ClusterConfig
from edkm.train.prepare import plan

RANGES = {
    "bits": (1, 8),
    "dim": (1, 64),
    "rows_per_lut": (0, 1 << 30),
    "softness": (0.0, 100.0),
    "anneal": (1e-6, 1.0),
    "anneal_steps": (0, 1 << 40),
    "max_iters": (1, 1000),
    "embedding_bits": (0, 8),
}
PER_TENSOR = ("bits", "dim", "rows_per_lut", "softness")
NUMBERS = {name: (st.integers if isinstance(low, int) else st.floats)(low, high) for name, (low, high) in RANGES.items()}
OVERRIDES = st.dictionaries(st.text(), st.fixed_dictionaries({}, optional={name: NUMBERS[name] for name in PER_TENSOR}), max_size=3)


@given(st.builds(ClusterConfig, **NUMBERS, skip=st.lists(st.text(), max_size=3).map(tuple), overrides=OVERRIDES))
def test_a_config_converts_to_json_and_back(config):
    text = json.dumps(config.to_json())
    again = ClusterConfig.from_json(json.loads(text))
    assert again == config
    assert list(again.overrides) == list(config.overrides)  # the first match counts
    assert json.dumps(again.to_json()) == text


@pytest.mark.parametrize("name", RANGES)
def test_numbers_are_of_their_kind_and_in_range(name):
    low, high = RANGES[name]
    integer = isinstance(low, int)
    wrong = (low - 1, high + 1, 1.5, 2.0) if integer else (low - 1e-6, high * 1.01, float("nan"), float("inf"))
    for value in (low, high, 1):
        assert getattr(ClusterConfig(**{name: value}), name) == value
    for value in (*wrong, True, "3", None):
        kind = "an integer" if integer else "a number"
        with pytest.raises(ValueError, match=rf"^{name}: {kind} from {low} to {high}, got {value!r}\."):
            ClusterConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3, "b": 1, "a": 2}, r"^config: unknown field a, b\. Was it written by a newer edkm\?"),
        ({"skip": "lm_head"}, r"^skip: a tuple of patterns, got the string 'lm_head'\. Write \('lm_head',\)\."),
        (
            {"overrides": {"a*": {"max_iters": 2, "anneal": 0.5}}},
            r"^overrides\['a\*'\]: anneal, max_iters cannot differ by tensor\. Only bits, .*use skip",
        ),
        ({"format": "q5_9"}, r"^format: 'q5_9' is not one of table, q4_0, "),
        ({"format": "q4_0", "bits": 2}, r"^bits: q4_0 has this of its own: its indices have 4 bits, one a weight; got 2\. Leave it out\."),
        ({"format": "q4_0", "embedding_bits": 4}, r"^embedding_bits: q4_0 has this of its own: its embeddings have 8 bits, or 0; got 4\."),
        ({"format": "q4_0", "overrides": {"a*": {"bits": 3}}}, r"^overrides\['a\*'\]: bits: q4_0 has this of its own"),
        ({"overrides": {"a*": {"bits": 9}}}, r"^overrides\['a\*'\]: bits: an integer from 1 to 8, got 9\."),
    ],
)
def test_other_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        ClusterConfig.from_json(fields)


def test_a_config_is_frozen_and_shares_nothing():
    given = {"a": {"bits": 2}}
    config = ClusterConfig(overrides=given)
    given["a"]["bits"] = 9
    given["b"] = {}
    assert config.overrides == {"a": {"bits": 2}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4
    assert ClusterConfig().overrides is not ClusterConfig().overrides
    assert ClusterConfig.from_json({}) == ClusterConfig() and ClusterConfig(skip=["a", "b"]).skip == ("a", "b")


def test_the_first_matching_override_gives_the_settings_of_a_tensor():
    config = ClusterConfig(skip=("*.head.*",), overrides={"*.up.weight": {"bits": 2}, "*.weight": {"bits": 5, "dim": 2}}, softness=0.25)
    assert config.for_tensor("m.head.weight") is None
    assert config.for_tensor("m.up.weight") == ClusterConfig(bits=2, softness=0.25, skip=("*.head.*",))
    assert config.for_tensor("m.down.weight").bits == 5 and config.for_tensor("m.down.weight").dim == 2
    assert config.for_tensor("m.bias") == config
    assert config.for_tensor("M.UP.weight").bits == 5  # case counts
    mixed = ClusterConfig(bits=2, overrides={"a": {"format": "q4_0"}, "b": {"format": "table", "bits": 3}})
    assert [(mixed.for_tensor(name).format, mixed.for_tensor(name).bits) for name in "abc"] == [("q4_0", 3), ("table", 3), ("table", 2)]
    blocks = ClusterConfig(format="q4_0", overrides={"b": {"format": "table", "bits": 3}})
    assert [blocks.for_tensor(name).format for name in "ab"] == ["q4_0", "table"]


OFF_DEFAULT = {
    "format": "nvfp4",
    "bits": 2,
    "dim": 2,
    "rows_per_lut": 8,
    "softness": 0.1,
    "anneal": 0.5,
    "anneal_steps": 5,
    "max_iters": 3,
    "embedding_bits": 4,
    "skip": ("1.weight",),
    "overrides": {"1.*": {"bits": 1}},
}


def outcome(**fields):
    """Train three steps; return the weights, and the outputs of the model in evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    edkm.prepare(model, ClusterConfig(**{"embedding_bits": 3} | fields))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(32)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    hard = model.eval()(ids).detach()
    return [p.detach().clone() for p in model.parameters()] + [hard]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_field_changes_something():
    assert set(OFF_DEFAULT) == {f.name for f in dataclasses.fields(ClusterConfig)}
    assert same(outcome(), outcome())
    for name, value in OFF_DEFAULT.items():
        assert value != getattr(ClusterConfig(), name)
        # Without steps nothing is annealed, and beside a format embeddings have 8 bits or are left alone.
        base = {"anneal": {"anneal_steps": 4}, "format": {"embedding_bits": 8}}.get(name, {})
        assert not same(outcome(**base), outcome(**base | {name: value})), name


@pytest.mark.parametrize("name", (*PER_TENSOR, "format"))
def test_every_override_changes_something(name):
    assert not same(outcome(), outcome(overrides={"1.weight": {name: OFF_DEFAULT[name]}}))


def blocks():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2)])
    model.tokens, model.lm_head = nn.Embedding(16, 8), nn.Linear(8, 16)
    return model


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("lm_head", {"lm_head"}),
        ("lm_head.weight", {"lm_head"}),
        ("blocks.1", {"blocks.1.up", "blocks.1.down"}),
        ("blocks.?.up", {"blocks.0.up", "blocks.1.up"}),
        ("*.up", {"blocks.0.up", "blocks.1.up"}),
        ("*down.w*", {"blocks.0.down", "blocks.1.down"}),
        ("blocks", {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}),
    ],
)
def test_a_pattern_names_a_weight_or_a_module(pattern, left):
    model = blocks()
    expected = {f"{name}.weight" for name in left}
    config = ClusterConfig(bits=2, rows_per_lut=0, embedding_bits=2)
    for report in (plan(model, replace(config, skip=(pattern,))), edkm.prepare(blocks(), replace(config, skip=(pattern,)))):
        assert {entry.name for entry in report.entries if entry.note == "matches skip"} == expected
    report = plan(model, replace(config, overrides={pattern: {"bits": 1}}))
    assert {entry.name for entry in report.clustered if entry.bits == 1} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skip": ("lm_haed",)}, r"^skip: 'lm_haed' matches no weight or module of the model\. Did you mean 'lm_head'"),
        ({"skip": ("down",)}, r"^skip: 'down' matches no .* Did you mean '\*down\*'"),
        ({"skip": ("re:.*head",)}, r"^skip: 're:\.\*head' matches no "),
        ({"overrides": {"blocks.0.upp": {"bits": 3}}}, r"^overrides: 'blocks.0.upp' matches no .* Did you mean 'blocks.0.up'"),
        ({"overrides": {"*": {"bits": 1}, "lm_head": {"bits": 3}}}, r"^overrides: 'lm_head' changes nothing"),
        ({"overrides": {"lm_head": {"bits": 3}}, "skip": ("lm_*",)}, r"^overrides: 'lm_head' changes nothing"),
        ({"overrides": {"tokens": {"bits": 3}}, "embedding_bits": 0}, r"^overrides: 'tokens' changes nothing"),
        ({"overrides": {"*bias": {"bits": 3}}}, r"^overrides: '\*bias' changes nothing"),
    ],
)
def test_a_pattern_without_effect_is_refused(fields, message):
    config = ClusterConfig(**{"bits": 2, "rows_per_lut": 0, "embedding_bits": 2, **fields})
    for refuses in (edkm.prepare, plan):
        with pytest.raises(ValueError, match=message):
            refuses(blocks(), config)


def test_a_pattern_may_take_any_name_of_a_tied_weight():
    model = blocks()
    model.lm_head.weight = model.tokens.weight
    report = edkm.prepare(model, ClusterConfig(bits=2, rows_per_lut=0, overrides={"lm_head": {"bits": 3}}))
    assert {entry.name: entry.bits for entry in report.clustered}["tokens.weight"] == 3
