"""Compressing a model a layer at a time (`edkm.train.skeleton`, `relay`, `stream`), as is done where no step follows the fit.

1. The packed model is the one that is made in memory, also if layers are trained, or the model was fine-tuned before: the same bytes
   with hidden states in float32, nearly the same in bfloat16.
2. Perplexity before and after is that of the whole model, to the rounding of hidden states.
3. At no time is more than one decoder layer in memory, which is what `--dry-run` plans for.
4. Tables are tuned in the same run, in memory or not.
5. A run that ends at any moment, killed or by Ctrl-C, is resumed to the same bytes, from the layer it was in; another model is refused.
6. A model whose files or layers do not allow it is held in memory, and the reason is said; weights that are not finite are named.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from edkm import recipe
from edkm.compressed.checkpoint import dequantize, read
from edkm.memory import plan_by_layer
from edkm.modelfiles import ModelError
from edkm.models import load_model
from edkm.recipe import DRY_RUN, Recipe, compress
from edkm.train import relay, stream
from edkm.train.skeleton import NotStreamable, open_skeleton


class Ended(BaseException):
    """The end of a process."""


SETTINGS = Recipe(families.CONFIG, steps=0, block_tokens=24, precision="fp32")
TEXT = "the quick brown fox jumps over the lazy dog and the other dog. " * 4


@pytest.fixture
def checkpoint(tmp_path, chat_tokenizer):
    """Make the checkpoint of a tiny model of a family."""

    def make(family, **changes):
        directory = tmp_path / family
        families.build(family, vocab_size=300, **changes).save_pretrained(directory)
        chat_tokenizer.save_pretrained(directory)
        return directory

    return make


def in_memory(monkeypatch):
    monkeypatch.setattr(Recipe, "streams", property(lambda recipe: False))


def weights(out):
    return (out / "model.safetensors").read_bytes(), (out / "config.json").read_bytes()


def perplexities(out):
    return {score["model"]: score["perplexity"] for score in json.loads((out / "metrics.json").read_text())["perplexities"]}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "phi"])
def test_the_packed_model_is_the_one_made_in_memory(family, checkpoint, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    given = {"data": data, "eval_text": tmp_path / "text.txt"}
    source = checkpoint(family)
    compress(source, replace(SETTINGS, precision="bf16"), tmp_path / "rounded", **given)
    assert "held" not in capsys.readouterr().out and not (tmp_path / "rounded" / "training").exists()
    with monkeypatch.context() as patch:
        patch.setattr(relay, "DTYPE", torch.float32)
        compress(source, SETTINGS, tmp_path / "streamed", **given)
    in_memory(monkeypatch)
    compress(source, SETTINGS, tmp_path / "whole", **given)
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("rounded", "streamed", "whole")]
    assert names[0] == names[1] == names[2] and weights(tmp_path / "streamed") == weights(tmp_path / "whole")
    assert perplexities(tmp_path / "streamed") == pytest.approx(perplexities(tmp_path / "whole"), rel=1e-5)
    assert perplexities(tmp_path / "rounded") == pytest.approx(perplexities(tmp_path / "whole"), rel=0.03)
    whole, rounded = read(tmp_path / "whole").frozen, read(tmp_path / "rounded").frozen
    for name, weight in whole.items():
        torch.testing.assert_close(dequantize(rounded[name]), dequantize(weight), rtol=0, atol=0.05)
    records = [json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("streamed", "whole")]
    assert records[0]["histograms"] == records[1]["histograms"]


def test_a_dry_run_plans_the_memory_of_a_layer(checkpoint, data, tmp_path, capsys):
    source = checkpoint("llama", intermediate_size=640, num_hidden_layers=3)
    compress(source, SETTINGS, tmp_path / "out", data=data, stages=DRY_RUN)
    assert "compressed a layer at a time" in capsys.readouterr().out and not (tmp_path / "out").exists()
    skeleton, _ = open_skeleton(source)
    plans = [plan_by_layer(skeleton, SETTINGS.config, 24, trained=trained).at_peak for trained in (False, True)]
    layer = sum(p.numel() for p in skeleton.layers[0].parameters())
    assert plans[0]["weights"] == plans[1]["weights"] == 4 * layer and plans[0]["clustering"] > 4 * 3 * 640**2
    assert plans[1]["clustering"] >= plans[0]["clustering"] + 4 * layer and plans[0]["activations"] < plans[1]["activations"]


def test_layers_are_trained_as_they_are_in_memory(checkpoint, data, tmp_path, monkeypatch):
    """The same bytes with hidden states in float32, norms included; another model than without training."""
    source, settings = checkpoint("llama"), replace(SETTINGS, by_layer=True)
    monkeypatch.setattr(relay, "DTYPE", torch.float32)
    compress(source, SETTINGS, tmp_path / "fitted", data=data)
    compress(source, settings, tmp_path / "streamed", data=data)
    in_memory(monkeypatch)
    compress(source, settings, tmp_path / "whole", data=data)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "whole")
    norms = [read(tmp_path / out).dense["model.layers.1.input_layernorm.weight"] for out in ("fitted", "streamed")]
    assert not torch.equal(*norms)


@pytest.mark.parametrize("steps", [{}, {"by_layer": True, "tune_steps": 1, "distill": 1.0}])
def test_layers_after_fine_tuning_are_compressed_as_they_are_in_memory(steps, checkpoint, data, tmp_path, monkeypatch):
    source, settings = checkpoint("llama"), replace(SETTINGS, steps=2, finetune_steps=2, **steps)
    monkeypatch.setattr(relay, "DTYPE", torch.float32)
    compress(source, settings, tmp_path / "streamed", data=data)
    made = []
    monkeypatch.setattr(recipe, "go_by_layer", lambda run: made.append(run.skeleton))
    compress(source, settings, tmp_path / "whole", data=data)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "whole") and made == [None]


@pytest.mark.parametrize("streams", [True, False])
def test_tables_are_tuned_in_the_same_run_and_a_tuning_that_ends_is_resumed(streams, tiny_dir, data, tmp_path, monkeypatch):
    settings = replace(SETTINGS, tune_steps=4, save_every=1, block_tokens=32, distill=0.5)
    if not streams:
        in_memory(monkeypatch)
    compress(tiny_dir, replace(settings, tune_steps=0, distill=0), tmp_path / "untuned", data=data)
    compress(tiny_dir, settings, tmp_path / "whole", data=data)
    before, after = (read(tmp_path / out).frozen for out in ("untuned", "whole"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(before[name].indices, after[name].indices) and not torch.equal(before[name].lut, after[name].lut)

    def stop(*_, **__):
        raise Ended

    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(recipe, "write_tuned", stop)
        compress(tiny_dir, settings, tmp_path / "parts", data=data)
    compress(tiny_dir, settings, tmp_path / "parts", data=data, resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") and not (tmp_path / "parts" / "training").exists()


def test_one_layer_is_in_memory_at_a_time(checkpoint, data, tmp_path, monkeypatch):
    source, seen, write = checkpoint("llama", num_hidden_layers=3), [], relay.HiddenStates.__setitem__
    opened = []
    monkeypatch.setattr("edkm.run.open_skeleton", lambda *args: opened.append(open_skeleton(*args)) or opened[0])

    def watch(self, i, states):
        layers = opened[0][0].layers
        seen.append([n for n, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())])
        write(self, i, states)

    monkeypatch.setattr(relay.HiddenStates, "__setitem__", watch)
    compress(source, SETTINGS, tmp_path / "out", data=data)
    assert {tuple(layers) for layers in seen} == {(), (0,), (1,), (2,)}


MOMENTS = [
    "states 3",
    "states 70",
    "states 110",
    "result 1",
    "result 2",
    "after 1",
    "after 2",
    "trained states 12",
    "trained after 1",
    "finetuned after 1",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_ends_at_any_moment_is_resumed_to_the_same_bytes(moment, checkpoint, data, tmp_path, monkeypatch):
    source, (*trained, kind, number) = checkpoint("mistral"), moment.split()
    steps = 2 if trained == ["finetuned"] else 0
    settings = replace(SETTINGS, by_layer=trained == ["trained"], steps=steps, finetune_steps=steps)
    compress(source, settings, tmp_path / "whole", data=data)
    write, save, left = relay.HiddenStates.__setitem__, stream.Stream._save, [int(number)]

    def end_soon():
        left[0] -= 1
        if left[0] < 0:
            raise Ended

    def write_or_end(self, i, states):
        end_soon()
        write(self, i, states)

    def save_or_end(self, *args):
        if kind == "result":
            end_soon()
        save(self, *args)
        if kind == "after":
            end_soon()

    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(stream.Stream, "_save", save_or_end)
        if kind == "states":
            patch.setattr(relay.HiddenStates, "__setitem__", write_or_end)
        compress(source, settings, tmp_path / "parts", data=data)
    done = len(list((tmp_path / "parts" / "training" / "layers").glob("*.safetensors")))
    ran = []
    monkeypatch.setattr(stream.Stream, "_save", lambda self, *args: ran.append(args[0]) or save(self, *args))
    compress(source, settings, tmp_path / "parts", data=data, resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") and len(ran) == 3 - done
    assert not (tmp_path / "parts" / "training").exists()


def test_a_run_that_is_killed_is_resumed_to_the_same_bytes(tiny_dir, data, tmp_path):
    script = (
        "import os, sys\nfrom edkm.cli import main\nfrom edkm.train import relay\nwrite, left = relay.HiddenStates.__setitem__, [40]\n"
        "def kill(self, i, states):\n    left[0] -= 1\n    os.kill(os.getpid(), 9) if not left[0] else write(self, i, states)\n"
        "relay.HiddenStates.__setitem__ = kill\nmain(sys.argv[1:])\n"
    )
    settings = replace(SETTINGS, block_tokens=32, precision="auto")
    arguments = ["compress", str(tiny_dir), "--data", str(data), "--steps", "0", "--block-tokens", "32", "--rows-per-lut", "4"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--embedding-bits", "5", "--out", str(tmp_path / "parts")], check=False
    )
    assert done.returncode == -9 and (tmp_path / "parts" / "training" / "run.json").is_file()
    compress(tiny_dir, settings, tmp_path / "parts", data=data, resume=True)
    compress(tiny_dir, settings, tmp_path / "whole", data=data)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_run_of_another_model_is_not_resumed(checkpoint, data, tmp_path, monkeypatch):
    source = checkpoint("llama")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream.Stream, "_save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        compress(source, SETTINGS, tmp_path / "out", data=data)
    change(source, "model.layers.1.mlp.down_proj.weight", lambda weight: weight + 1e-3)
    with pytest.raises(ValueError, match=r"^model: the interrupted run had"):
        compress(source, SETTINGS, tmp_path / "out", data=data, resume=True)


def change(source, name, new, **renamed):
    tensors = load_file(source / "model.safetensors")
    tensors[name] = new(tensors[name])
    save_file({renamed.get(key, key): tensor for key, tensor in tensors.items()}, source / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mixtral", "transformers converts model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("pair", "its layers return more than hidden states"),
        ("double", r"lm_head.weight is stored as F64 \[300, 32\]"),
    ],
)
def test_a_model_that_cannot_go_by_layers_is_held_in_memory(family, reason, checkpoint, data, tmp_path, monkeypatch, capsys):
    source = checkpoint("mistral" if family in ("pair", "double") else family)
    if family == "double":
        change(source, "lm_head.weight", lambda weight: weight.double())
    if family == "pair":
        from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

        forward = MistralDecoderLayer.forward
        monkeypatch.setattr(MistralDecoderLayer, "forward", lambda self, x, **kwargs: forward(self, x, **kwargs).unsqueeze(0))
        monkeypatch.setattr("edkm.run.load_model", lambda source, dtype: monkeypatch.undo() or load_model(source, dtype))
    compress(source, SETTINGS, tmp_path / "out", data=data)
    assert re.search(f"memory: the whole model is held, not a layer at a time: {reason}", capsys.readouterr().out)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_weight_that_is_not_finite_is_named_before_any_work(checkpoint, data, tmp_path):
    source = checkpoint("llama")
    change(source, "model.layers.1.self_attn.k_proj.weight", lambda weight: weight.index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(ValueError, match=r"^model.layers.1.self_attn.k_proj.weight: NaN or infinite values"):
        compress(source, SETTINGS, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_tied_tensors_that_differ_in_the_files_are_not_streamed(checkpoint):
    source = checkpoint("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotStreamable, match=r"model.embed_tokens.weight and lm_head.weight are tied and differ"):
        open_skeleton(source)


def test_a_damaged_file_is_refused_in_one_line(checkpoint):
    source = checkpoint("llama")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"llama: the checkpoint cannot be loaded: .* Save model and tokenizer there again\.$") as caught:
        open_skeleton(source)
    assert "\n" not in str(caught.value)
