"""Training one decoder layer at a time: `by_layer` of `edkm.fit` and `edkm.prepare`.

1. A trained layer is nearer to the original layer than a fitted one, and so is the model; what is packed is what was trained.
2. Weights in 16 bits are trained in 32.
3. The same settings give the same bits; embeddings and skipped weights stay as they are.
4. Models without a chain of layers, and settings out of range, are refused.
"""

import copy

import pytest
import torch

import edkm
from edkm.core.assign import lookup

CONFIG = edkm.ClusterConfig(bits=2, rows_per_lut=8, skip=("*q_proj*",), embedding_bits=0)
TRAINING = edkm.LayerTraining(epochs=8, rate=0.02)
BATCHES = [{"input_ids": ids} for ids in torch.randint(0, 300, (4, 2, 32), generator=torch.Generator().manual_seed(0))]
FIRST = "model.layers.0.mlp.down_proj.weight"


def compressed(model, by_layer):
    model = copy.deepcopy(model)
    edkm.prepare(model, CONFIG, BATCHES, by_layer=by_layer)
    return model.eval()


def outputs(model, layer):
    found = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    return torch.cat(found)


def test_trained_layers_are_nearer_to_the_original_than_fitted_ones(tiny_model):
    fitted, trained = (compressed(tiny_model, by_layer) for by_layer in (None, TRAINING))
    for layer in range(2):
        expected = outputs(tiny_model.eval(), layer)
        errors = [(outputs(model, layer) - expected).square().mean() for model in (fitted, trained)]
        assert errors[1] < 0.9 * errors[0]


def test_the_packed_weights_are_the_trained_ones_and_others_stay(tiny_model):
    trained = compressed(tiny_model, TRAINING)
    frozen = edkm.freeze(trained)[FIRST]
    assert len(frozen.lut) == len(tiny_model.get_parameter(FIRST)) // 8
    fitted = edkm.freeze(compressed(tiny_model, None))[FIRST]
    assert not torch.equal(lookup(frozen.indices, frozen.lut), lookup(fitted.indices, fitted.lut))
    before, after = dict(tiny_model.named_parameters()), dict(trained.named_parameters())
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    name = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(before[name], after[name]) and after[name].requires_grad


def test_the_same_settings_give_the_same_bits(tiny_model):
    first, again, other = (compressed(tiny_model, t).state_dict() for t in (TRAINING, TRAINING, edkm.LayerTraining(8, 0.02, seed=1)))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first[FIRST], other[FIRST])


def test_weights_in_16_bits_are_trained_in_32(tiny_model):
    fitted, trained = (compressed(tiny_model.bfloat16(), by_layer) for by_layer in (None, TRAINING))
    expected = outputs(tiny_model.eval(), 1).float()
    errors = [(outputs(model, 1) - expected).square().mean() for model in (fitted, trained)]
    assert errors[1] < 0.9 * errors[0] and {p.dtype for p in trained.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("options", "message"), [({"epochs": 0}, "at least one epoch"), ({"rate": 1.5}, "rate between 0 and 1")])
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        edkm.LayerTraining(**options)


def test_models_without_a_chain_of_layers_are_refused(tiny_model):
    tiny_model._no_split_modules = []
    with pytest.raises(ValueError, match=r"^by_layer: the model has no decoder layers"):
        edkm.fit(tiny_model, CONFIG, BATCHES, by_layer=TRAINING)
    with pytest.raises(ValueError, match=r"^by_layer: layers are trained on data, from a fit\."):
        edkm.prepare(tiny_model, CONFIG, by_layer=TRAINING)
