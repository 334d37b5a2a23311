"""Loading models.

1. Directories, packed directories, GGUF files and hub ids load as ordinary dense models in the dtype asked for, silently; a packed one
   stays packed if that is asked for.
2. A checkpoint that lacks weights, holds more for a layer than the layer reads, or holds codes in the place of weights is refused.
3. Quantized checkpoints are dequantised for good, or refused before they are read.
4. Directories of other kinds, damaged files and missing packages are explained in one line with a remedy.
"""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from packed import edit_json
from safetensors.torch import load_file, save_file

from edkm.models import ModelError, load_model

UP = "model.layers.1.mlp.up_proj.weight"


def edit_config(source, target, **changes):
    """A copy of a checkpoint with other values in its config.json."""
    edit_json(shutil.copytree(source, target) / "config.json", **changes)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_loads(tiny_dir, tiny_model, dtype):
    model, tokenizer = load_model(tiny_dir, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = tiny_model.to(dtype).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert "<|start|>" in tokenizer.chat_template


def test_loading_shows_no_bars_and_leaves_their_settings(tiny_dir, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    load_model(str(tiny_dir))
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_directory_loads(packed_dir, tiny_model, dtype):
    model, tokenizer = load_model(packed_dir, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert "<|start|>" in tokenizer.chat_template
    assert not model.training
    clustered = model.model.layers[1].mlp.up_proj.weight
    assert len(clustered.unique()) == 8
    assert not torch.equal(clustered, tiny_model.model.layers[1].mlp.up_proj.weight.to(dtype))
    assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight.to(dtype))


def test_a_packed_directory_is_kept_packed_if_asked_to(packed_dir):
    model, _ = load_model(packed_dir, keep_packed=True)
    dense, _ = load_model(packed_dir)
    assert not model.training
    assert model.state_dict()["model.layers.1.mlp.up_proj.weight"].dtype == torch.uint8
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_packed_directory_without_tokenizer_is_refused(packed_dir, tmp_path):
    directory = tmp_path / "packed"
    shutil.copytree(packed_dir, directory, ignore=shutil.ignore_patterns("token*", "*.jinja"))
    with pytest.raises(ModelError, match=r"packed: its tokenizer cannot be loaded: .* Save the tokenizer there"):
        load_model(directory)


def test_a_gguf_file_loads_and_saves_as_an_ordinary_model(tmp_path, tiny_model, capfd):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model)
    capfd.readouterr()
    model, tokenizer = load_model(path)
    assert capfd.readouterr() == ("", "")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, tiny_model(ids).logits, atol=1e-5)
    assert tokenizer.chat_template == "{{ messages }}"
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    again, _ = load_model(tmp_path / "dense", torch.bfloat16)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def close_gguf(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path, model, without=(), parts=1, more=()):
    """`tiny_model` as llama.cpp would store it, in float32, with a vocabulary of bytes."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"<{i}>" for i in range(3, config.vocab_size))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" or name in without:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp interleaves the two halves of a rotary head; transformers undoes it.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy().copy())
    for name in more:
        writer.add_tensor(name, torch.ones(64).numpy())
    close_gguf(writer)
    return path


def test_a_gguf_file_that_is_not_a_whole_model_is_refused(tmp_path, tiny_model):
    import gguf

    with pytest.raises(ModelError, match=rf"a\.gguf: 1 weights of LlamaForCausalLM are not in the checkpoint, first {UP}; they would be"):
        load_model(write_gguf(tmp_path / "a.gguf", tiny_model, without=[UP]))
    with pytest.raises(ModelError, match=r"b\.gguf: is one of 2 parts of a GGUF model\. Join them first \(llama-gguf-split --merge"):
        load_model(write_gguf(tmp_path / "b.gguf", tiny_model, parts=2))
    # transformers would build a model of 7B parameters for these.
    for kind, message in (("adapter", r"holds no model \(adapter\)"), ("model", "holds no weights")):
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", "llama")
        writer.add_type(kind)
        close_gguf(writer)
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / f"{kind}.gguf")


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.2.ffn_up.weight"])
def test_a_gguf_file_with_weights_that_transformers_does_not_read_is_refused(tmp_path, tiny_model, name):
    with pytest.raises(ModelError, match=r"model\.layers\.\S+ is in the checkpoint and LlamaForCausalLM does not read it"):
        load_model(write_gguf(tmp_path / "more.gguf", tiny_model, more=[name]))


def test_frequencies_in_a_gguf_file_are_left_out_with_a_warning(tmp_path, tiny_model):
    with pytest.warns(UserWarning, match=r"leaves out 1 tensors of the checkpoint, first rope_freqs\.weight"):
        load_model(write_gguf(tmp_path / "more.gguf", tiny_model, more=["rope_freqs.weight"]))


def add_tensors(directory, **tensors):
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def test_weights_in_float8_are_dequantised_for_good(tiny_dir, tmp_path):
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    directory = edit_config(tiny_dir, tmp_path / "float8", quantization_config=quantization)
    stored, expected = {}, {}
    for name, value in load_file(tiny_dir / "model.safetensors").items():
        stored[name] = expected[name] = value
        if "proj" in name:
            scale = value.abs().amax() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.view(1, 1)
            expected[name] = stored[name].float() * scale
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(directory)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == expected.keys() and all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "nonesuch"}}, "nonesuch"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "method not named"),  # MLX
    ],
)
def test_quantized_weights_are_refused_before_they_are_read(tiny_dir, tmp_path, fields, method):
    directory = edit_config(tiny_dir, tmp_path / "quantized", **fields)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"quantized: its weights are quantized \({method}\).* Give the checkpoint that they"):
        load_model(directory)


@pytest.mark.parametrize(
    "name",
    [
        "0.self_attn.q_proj.bias",
        "0.mlp.up_proj.weight_scale",
        "0.self_attn.q_norm.weight",
        "0.self_attn.q_proj.lora_A.weight",
        "2.mlp.up_proj.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_layer_with_weights_that_it_does_not_read_is_refused(tiny_dir, tmp_path, name, prefix):
    directory = edit_config(tiny_dir, tmp_path / "more")
    add_tensors(directory, **{f"{prefix}layers.{name}": torch.ones(64)})
    with pytest.raises(ModelError, match=rf"layers\.{name} is in the checkpoint and LlamaForCausalLM does not read it"):
        load_model(directory)


@pytest.mark.parametrize("name", ["vision_tower.layers.0.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.bias"])
def test_parts_that_the_class_does_not_have_are_left_out_with_a_warning(tiny_dir, tmp_path, name):
    directory = edit_config(tiny_dir, tmp_path / "more", num_nextn_predict_layers=1)
    add_tensors(directory, **{name: torch.ones(64)})
    with pytest.warns(UserWarning, match=rf"LlamaForCausalLM leaves out 1 tensors of the checkpoint, first {name}"):
        load_model(directory)


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({}, b"damaged", "source: the checkpoint cannot be loaded: .*Save model and tokenizer"),
        ({}, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", r"model\.safetensors is a pointer of Git LFS"),
        ({}, {UP: torch.ones(128, 64, dtype=torch.int8)}, rf"source: {UP} holds integers, codes of a quantized weight"),
        ({"num_hidden_layers": 3}, {}, r"9 weights of LlamaForCausalLM are not .* first model\.layers\.2\."),
        ({"vocab_size": 310}, {}, r"embed_tokens\.weight: LlamaForCausalLM has shape \[310, 64\], the checkpoint \[300, 64\]"),
    ],
    ids=["damaged", "pointer", "integers", "missing", "shape"],
)
def test_a_checkpoint_that_lacks_weights_or_has_others_is_refused(tiny_dir, tmp_path, changes, weights, message):
    directory = edit_config(tiny_dir, tmp_path / "source", **changes)
    if isinstance(weights, bytes):
        (directory / "model.safetensors").write_bytes(weights)
    else:
        add_tensors(directory, **weights)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


def test_a_packed_model_is_found_by_its_hub_id(packed_dir, tmp_path, monkeypatch, capsys):
    from edkm.cli import main

    folder = tmp_path / "hub" / "models--someone--packed"
    shutil.copytree(packed_dir, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, _ = load_model("someone/packed")
    expected, _ = load_model(packed_dir)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert main(["inspect", "someone/packed"]) == 0 and "bits per weight" in capsys.readouterr().out
    assert main(["unpack", "someone/packed", "--out", str(tmp_path / "dense")]) == 0
    assert main(["report", "someone/packed", "--out", str(tmp_path / "page.html")]) == 0
    assert main(["inspect", "someone/none"]) == 1 and "is no local path, and as a hub id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "some/base"}'}, r"is an adapter for some/base, not a whole model\. Merge it"),
        ({"config.json": "{}", "adapter_config.json": "{}"}, "is an adapter, not a whole model"),
        ({"checkpoint-8/config.json": "{}", "checkpoint-16/config.json": "{}"}, r"Name the model in it: \S+/checkpoint-16\."),
        ({"refs/main": "ab", "snapshots/ab/config.json": "{}"}, r"Name the model in it: \S+/snapshots/ab\."),
        ({"modules.json": "[]", "0_Transformer/config.json": "{}"}, r"Name the model in it: \S+/0_Transformer\."),
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "holds a pipeline of diffusers"),
        ({"params.json": "{}", "consolidated.safetensors": ""}, r"in its maker's format \(params\.json\)"),
        (
            {"config.json": '{"model_type": "own", "auto_map": {"AutoConfig": "a.B"}, "architectures": ["Own"]}'},
            "Own is not a class of tr",
        ),
        ({"config.json": '{"model_type": "llama", "architectures": ["Own"]}'}, "Own is not a class of transformers but code of its own"),
        ({}, r"has no config\.json; .* Check that the model was saved there"),
        ({"a.gguf": ""}, r"Name the file: .*a\.gguf"),
        ({"config.json": "{"}, r"config\.json: is not a JSON object"),
        ({"config.json": "[]"}, r"config\.json: is not a JSON object"),
        ({"config.json": '{"model_type": "nonesuch"}'}, r"cannot be loaded: .*nonesuch"),
        ({"config.json": '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'}, "BertForMaskedLM is not a causal language model"),
        ({"config.json": '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'}, "T5F.* is not a causal language model"),
    ],
)
def test_directories_of_other_kinds_are_explained(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_missing_paths_and_other_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    for source, message in (
        (tmp_path / "none", rf"{re.escape(str(tmp_path))}/none: no such file.*Check the path"),
        (tmp_path / "none.gguf", r"none\.gguf: no such file.*Check the path"),
        (tmp_path / "weights.bin", r"weights\.bin: is a file, but only \.gguf files are read"),
        (tmp_path / "broken.gguf", r"broken\.gguf: cannot be read as a GGUF"),
        ("nobody/nothing", r"nobody/nothing: is no local path, .*Check the spelling"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load_model(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_packages_that_are_not_installed_are_named(tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name))
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=rf"{package} is needed .* pip install 'edkm\[hf\]'"):
        load_model(tmp_path / "a.gguf")
