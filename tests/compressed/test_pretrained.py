"""Packed models of transformers, saved, loaded and unpacked.

1. A loaded model computes with exactly the clustered values, is silent and draws no random numbers.
2. An unpacked directory is an ordinary checkpoint of exactly these values.
3. A directory whose names are not those of the model is neither written nor loaded.
"""

import json
from pathlib import Path

import pytest
import torch
from packed import TINY, edit_json, logits, pack, parts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from edkm.compressed import pretrained, weightfiles
from edkm.compressed.checkpoint import FormatError, dequantize, read

UP = "model.layers.1.mlp.up_proj.weight"


def build(tie: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tie)).to(dtype).eval()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path, tiny_tokenizer):
    """A packed model on disk, and the same model with looked-up weights in memory."""
    model = build(request.param)
    model.generation_config = GenerationConfig(max_new_tokens=17)
    return tmp_path / "packed", pack(model, tmp_path / "packed", tokenizer=tiny_tokenizer)


def test_a_loaded_model_computes_with_the_clustered_values(saved, capfd):
    directory, expected = saved
    state = torch.get_rng_state()
    model = pretrained.load(directory)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), logits(expected))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == expected.config.tie_word_embeddings
    assert not model.training and model.dtype == torch.float32
    assert model.generation_config.max_new_tokens == 17
    assert not hasattr(model.config, "quantization_config")
    narrow = pretrained.load(directory, torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.get_parameter(UP), expected.get_parameter(UP).bfloat16())


def test_the_directory_names_the_class_and_has_the_tokenizer(saved):
    directory, model = saved
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == read(directory).quantization_config
    assert not hasattr(model.config, "quantization_config")
    assert len(AutoTokenizer.from_pretrained(directory)) > 100


def test_an_unpacked_directory_is_an_ordinary_checkpoint(saved, tmp_path, monkeypatch):
    directory, expected = saved
    monkeypatch.setattr(weightfiles, "MAX_FILE_BYTES", 100_000)
    out = tmp_path / "dense"
    pretrained.unpack(directory, out)
    assert len(list(out.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits(model), logits(expected))
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert len(AutoTokenizer.from_pretrained(out)) > 100 and model.generation_config.max_new_tokens == 17
    with pytest.raises(ValueError, match="is the packed directory itself"):
        pretrained.unpack(directory, directory)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_unpacking_loses_no_digit(tmp_path, dtype, expected):
    model = build(dtype=dtype)
    frozen, dense = parts(model)
    dense = {name: tensor + 2**-7 for name, tensor in dense.items()}
    pretrained.save_pretrained(tmp_path / "packed", frozen, dense, {}, model)
    pretrained.unpack(tmp_path / "packed", tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    exact = dense | {name: dequantize(tensor, torch.float64) for name, tensor in frozen.items()}
    assert all(torch.equal(tensors[name].double(), tensor.double()) for name, tensor in exact.items())


def test_names_and_shapes_must_be_those_of_the_model(tmp_path: Path):
    model = build()
    frozen, dense = parts(model)
    for gone, more, message in (
        (UP, {}, f"LlamaForCausalLM: missing {UP}; unexpected none"),
        ("", {"extra": torch.ones(1)}, "missing none; unexpected extra"),
        ("", {"lm_head.weight": model.lm_head.weight}, r"(?=.*embed_tokens.weight)(?=.*lm_head.weight).*are one tied tensor"),
        ("", {"model.norm.weight": torch.ones(3)}, r"norm.weight: LlamaForCausalLM has shape \[64\], got \[3\]"),
    ):
        with pytest.raises(FormatError, match=message):
            kept = {name: tensor for name, tensor in frozen.items() if name != gone}
            pretrained.save_pretrained(tmp_path, kept, dense | more, {}, model)
    assert list(tmp_path.iterdir()) == []


def test_the_config_of_another_model_is_refused(tmp_path):
    pack(build(), tmp_path)
    for layers, message in (
        (3, r"missing model.layers.2.\S+(, \S+)* and 4 more; unexpected none"),
        (1, r"missing none; unexpected model.layers.1"),
    ):
        edit_json(tmp_path / "config.json", num_hidden_layers=layers)
        with pytest.raises(FormatError, match=message):
            pretrained.load(tmp_path)


def test_a_tied_weight_may_be_given_by_either_name(tmp_path):
    model = build()
    frozen, dense = parts(model)
    frozen["lm_head.weight"] = frozen.pop("model.embed_tokens.weight")
    pretrained.save_pretrained(tmp_path, frozen, dense, {}, model)
    loaded = pretrained.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, dequantize(frozen["lm_head.weight"]))
