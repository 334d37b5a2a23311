"""Packed models of several families in other people's code.

1. They load, run, are saved, cut into files and dequantized without a change.
2. They run offloaded to disk or memory, and what is offloaded is not in memory.
3. Copies and threads compute the same.
4. Only checked files are read, and unknown fields are refused.
5. Resizing an embedding is refused, unless it changes nothing.
"""

import copy
import gc
import io
import json
import shutil
import threading
import weakref

import pytest
import torch
import transformers
from packed import CONSTANT, FAMILIES, TOKENS, load, logits, make, pack, same

from edkm.compressed import modules, pretrained
from edkm.compressed.checkpoint import FormatError
from edkm.compressed.modules import PackedModule


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return directory, pack(make(request.param), directory)


def test_from_pretrained_and_back(saved, tmp_path):
    directory, model = saved
    loaded = load(directory)
    same(loaded, model)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(pretrained.load(tmp_path)), logits(model))
    assert torch.equal(logits(loaded.dequantize()), logits(model))


T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 300, "feed_forward_proj": "gated-gelu"}
RESNET = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.mark.parametrize(
    ("family", "fields", "kind", "inputs"),
    [
        ("t5", T5, transformers.AutoModelForSeq2SeqLM, {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
        ("resnet", RESNET, transformers.AutoModelForImageClassification, {"pixel_values": torch.ones(2, 1, 32, 32).cumsum(3).cos()}),
    ],
)
def test_models_of_other_kinds(family, fields, kind, inputs, tmp_path):
    torch.manual_seed(0)
    model = pack(kind.from_config(transformers.AutoConfig.for_model(family, **fields)), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(kind.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize(
    ("family", "places"),
    # Not Mamba: its layers read weights of others, dense ones too.
    [*((family, {"": "disk"}) for family in ("llama", "gemma3_text", "gpt2", "mixtral")), ("llama", {**PLACES, "model.rotary_emb": "cpu"})],
)
def test_offloaded(family, places, tmp_path):
    model = pack(make(family), tmp_path / "model")
    check_offloaded(load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"), model)


def check_offloaded(loaded, model):
    for _ in range(2):
        same(loaded, model)
    assert any(p is not None and p.is_meta for m in loaded.modules() if isinstance(m, PackedModule) for p in m._parameters.values())
    for refused in (lambda: loaded.save_pretrained("nowhere"), loaded.dequantize):
        with pytest.raises(FormatError, match="is offloaded"):
            refused()
    same(loaded, model)


def test_offloaded_to_memory(llama):
    from accelerate import cpu_offload

    loaded = load(llama[0])
    cpu_offload(loaded, execution_device=torch.device("cpu"))
    check_offloaded(loaded, llama[1])


def test_tied_tables_are_not_offloaded(tmp_path):
    pack(make("llama", tie_word_embeddings=True), tmp_path / "model")
    loaded = load(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload", offload_buffers=True)
    with pytest.raises(ValueError, match=r"PackedLinear.weight: its tables are offloaded.*Load without offload_buffers\."):
        logits(loaded)


def test_what_is_offloaded_is_not_in_memory(llama, tmp_path, monkeypatch):
    loaded, seen, multiply = load(llama[0], device_map={"": "disk"}, offload_folder=tmp_path), [], modules.packed_linear

    def watched(x, weight):
        seen.append(weakref.ref(weight.stream))
        return multiply(x, weight)

    monkeypatch.setattr(modules, "packed_linear", watched)
    logits(loaded)
    gc.collect()
    assert len(seen) == 15 and not any(stream() is not None for stream in seen)


@pytest.mark.parametrize("kilobytes", [2, 11, 20, 32, 47, 59])
def test_saved_in_several_files_wherever_they_are_cut(saved, tmp_path, kilobytes):
    directory, model = saved
    load(directory).save_pretrained(tmp_path, max_shard_size=f"{kilobytes}KB")
    same(load(tmp_path), model)
    assert torch.equal(logits(pretrained.load(tmp_path)), logits(model))


def test_only_checked_files_are_read(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path, dirs_exist_ok=True)
    state = {name: torch.zeros_like(tensor) for name, tensor in load(tmp_path).state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    for options in ({"use_safetensors": False}, {"variant": "fp16"}):
        with pytest.raises(FormatError, match="reads other files"):
            load(tmp_path, **options)


def test_an_unknown_field_is_refused(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["to_dict"] = "x"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="unknown fields"):
        load(tmp_path)


def test_copies(saved):
    directory, model = saved
    loaded = load(directory)
    logits(loaded)
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for again in (copy.deepcopy(loaded), torch.load(file, weights_only=False)):
        same(again, model)
        assert [type(m) for m in again.modules()] == [type(m) for m in loaded.modules()]


def test_threads(saved):
    directory, model = saved
    loaded, expected, found = load(directory), logits(model), []

    def run():
        for _ in range(5):
            found.append(logits(loaded))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_resizing_the_embedding(llama):
    loaded = load(llama[0])
    assert loaded.resize_token_embeddings(300) is loaded.model.embed_tokens
    with pytest.raises(ValueError, match=CONSTANT):
        loaded.resize_token_embeddings(310)
    same(load(llama[0]), llama[1])
