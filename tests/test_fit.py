"""`edkm.fit`: weights and tables fitted to their inputs, layer by layer."""

import pytest
import torch

import edkm
from edkm.core.assign import lookup
from edkm.models import load_model

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
    """Had the second layer been fitted to the uncompressed model's inputs it would be another."""
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


def test_what_cannot_be_fitted_is_left_to_prepare(tiny_dir):
    model = load_model(tiny_dir)[0]
    config = edkm.ClusterConfig(bits=2, rows_per_lut=16, skip=("*q_proj*",), overrides={"*k_proj*": {"dim": 2}})
    before = {name: p.clone() for name, p in model.named_parameters()}
    start = edkm.fit(model, config, batches())
    assert len(start) == 10
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) == (name not in start)


def test_bad_input_is_refused(tiny_dir):
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
