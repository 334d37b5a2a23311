"""`edkm.fit` and `edkm.prepare` given batches, in formats of tables with a shape:

1. a fitted model is nearer to the original than one that starts from the search alone, and its frozen weights are the fitted ones;
2. layers trained one at a time, hard or soft, are nearer still; what is frozen is what evaluation uses;
3. compressing a layer at a time from a checkpoint gives the bytes that are made in memory, tables of different kinds beside each other.
"""

import copy

import families
import pytest
import torch

import edkm
from edkm.compressed.checkpoint import read
from edkm.core.formats import FORMATS, FrozenBlocks
from edkm.recipe import Recipe, compress
from edkm.train import relay

BATCHES = [{"input_ids": ids} for ids in torch.randint(0, 300, (4, 2, 32), generator=torch.Generator().manual_seed(0))]
FIRST, LAST = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"


def divergence(model, original):
    with torch.no_grad():
        a, b = (m.eval()(**BATCHES[0]).logits.log_softmax(-1) for m in (model, original))
    return float((b.exp() * (b - a)).sum(-1).mean())


def prepared(model, config, batches=None, **options):
    model = copy.deepcopy(model)
    edkm.prepare(model, config, batches, **options)
    return model


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "mxfp4", "nvfp4", "int2_g32", "mlx2_g64", "nf4"])
def test_a_fitted_model_is_nearer_and_its_frozen_weights_are_the_fitted_ones(name, tiny_model):
    config = edkm.ClusterConfig(format=name, embedding_bits=0)
    fitted = prepared(tiny_model, config, BATCHES)
    assert divergence(fitted, tiny_model) < 0.9 * divergence(prepared(tiny_model, config), tiny_model)
    start = edkm.fit(moved := copy.deepcopy(tiny_model), config, BATCHES, importance=edkm.calibrate(tiny_model, BATCHES))
    frozen = edkm.freeze(fitted)
    assert start.keys() == frozen.keys() and len(start) == 14
    for key, theta in start.items():
        found = frozen[key]
        assert isinstance(found, FrozenBlocks)
        form = FORMATS[found.format]
        assert torch.equal(form.storage.read(found.parts).reshape(theta.shape), theta)
        assert torch.equal(form.assign(moved.get_parameter(key), theta.view(len(found.indices), -1, form.p)), found.indices)


@pytest.mark.parametrize("name, softness", [("int2_g32", 0.5), ("tq2_0", 0.0), ("q2_k", 0.0), ("q2_k", 0.5)])
def test_trained_layers_are_nearer_still(name, softness):
    original = families.build("llama", hidden_size=256, intermediate_size=256, vocab_size=300).eval()
    config = edkm.ClusterConfig(format=name, embedding_bits=0, softness=softness)
    training = edkm.LayerTraining(epochs=6, rate=0.02, softness=softness)
    trained = prepared(original, config, BATCHES, by_layer=training)
    fitted = prepared(original, config, BATCHES)
    assert divergence(trained, original) < divergence(fitted, original)
    frozen = edkm.freeze(trained)
    assert torch.equal(trained.model.layers[1].mlp.down_proj.clustering.hard(trained.get_parameter(LAST)), frozen[LAST].values())
    assert not torch.equal(frozen[LAST].values(), edkm.freeze(fitted)[LAST].values())


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        edkm.ClusterConfig(format="q4_0"),
        edkm.ClusterConfig(format="int3_g32", overrides={"*down_proj": {"format": "table", "bits": 3, "rows_per_lut": 4}}),
        edkm.ClusterConfig(format="nvfp4"),
    ],
    ids=lambda config: config.format,
)
def test_a_layer_at_a_time_gives_the_bytes_made_in_memory(config, by_layer, data, tmp_path, chat_tokenizer, monkeypatch):
    source = tmp_path / "model"
    families.build("llama", intermediate_size=64, vocab_size=300).save_pretrained(source)
    chat_tokenizer.save_pretrained(source)
    monkeypatch.setattr(relay, "DTYPE", torch.float32)
    settings = Recipe(config, steps=0, block_tokens=24, precision="fp32", by_layer=by_layer)
    compress(source, settings, tmp_path / "streamed", data=data)
    assert not (tmp_path / "streamed" / "training").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "streams", property(lambda recipe: False))
        compress(source, settings, tmp_path / "whole", data=data)
    streamed, whole = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("streamed", "whole"))
    assert streamed == whole
    frozen = read(tmp_path / "whole").frozen
    assert {frozen[FIRST].format, frozen["model.layers.0.mlp.up_proj.weight"].format} <= {config.format, "table"}
    assert config.format in {tensor.format for tensor in frozen.values()}
