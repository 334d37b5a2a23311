"""Training the tables of a packed model with its indices fixed, and `edkm tune`:

1. Gradients of tables and inputs are those of a dense weight that is looked up, for every layout of indices.
2. No dense weight is kept for backward.
3. What is trained is what is stored: rounded values, gradients straight through; without a step nothing changes.
4. Tables and vectors are trained; indices, embeddings, what is tied to them and all other tensors are as they were, to the byte.
5. The tuned directory loads to the logits of the trained model, bit for bit.
6. A run that is interrupted or killed is resumed to the same file, and only with the same settings.
7. With a teacher its predictions are trained for.
8. What does not fit is refused in one line, before anything is trained.
"""

import json
import os
import shutil
import signal

import packed
import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

from edkm import metrics
from edkm.cli import main
from edkm.compressed import checkpoint, pretrained
from edkm.compressed.modules import pack_module
from edkm.core.assign import lookup
from edkm.models import load_model
from edkm.train import loop, tables
from edkm.tuning import Tuning, tune

# Shape, bits, tables, dim, centroids.
LAYOUTS = [
    ((24, 20), 3, 24, 1, 8),
    ((30, 7), 2, 30, 1, 3),
    ((16, 33), 5, 4, 1, 32),
    ((12, 16), 8, 1, 1, 200),
    ((16, 16), 1, 8, 1, 2),
    ((24, 10), 4, 3, 2, 16),
    ((20, 8), 3, 1, 4, 8),
]


def layer(frozen):
    """A packed linear layer on the weight."""
    linear = torch.nn.Linear(frozen.shape[1], frozen.shape[0])
    weight = packed.packed(frozen)
    pack_module(linear, "weight", weight.entry, frozen.lut.shape[1], torch.float32, "cpu")
    linear.load_state_dict({"weight": weight.stream, "weight_lut": weight.lut, "bias": linear.bias})
    return tables.TunedLinear(linear)


@pytest.fixture
def source(tmp_path, chat_tokenizer):
    """A packed LLaMA of 3 bits with tied 8-bit embeddings, vectors in bfloat16, and a tokenizer."""
    model = packed.make("llama", tie_word_embeddings=True)
    frozen, dense = packed.parts(model)
    generator = torch.Generator().manual_seed(1)
    for name, vector in dense.items():
        dense[name] = (0.5 + torch.rand(vector.shape, generator=generator)).bfloat16()
    pretrained.save_pretrained(tmp_path / "packed", frozen, dense, {"bits": 3}, model, chat_tokenizer)
    return tmp_path / "packed"


@pytest.fixture
def run(source, data, tmp_path):
    """Run `edkm tune` into a directory of `tmp_path`; returns the exit code."""

    def call(out, *more, source=source):
        given = ["tune", str(source), "--data", str(data), "--out", str(tmp_path / out), "--block-tokens", "48", "--lr", "0.02"]
        return main([*given, *more])

    return call


def loaded(source):
    with checkpoint.open_items(source) as items:
        stored = {name: item.dtype for name, item in items.items()}
    model = pretrained.load_packed(source)
    return model, tables.train_tables(model, stored)


def blocks(count=8, tokens=24):
    ids = torch.randint(250, (count, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_a_dense_weight(layout, dtype):
    shape, bits, luts, dim, k = layout
    frozen = packed.freeze(shape, bits, luts, dim, k)
    tuned = layer(frozen)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, shape[1], generator=generator, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, shape[0], generator=generator, dtype=dtype)
    lut = frozen.lut.double().requires_grad_()
    tuned(x).backward(dy)
    stored = tuned.parametrizations.tables
    found = x.grad.clone(), stored.original.grad / stored[0].size
    x.grad = None
    dense = (lookup(frozen.indices, lut, torch.float64) @ x.double().mT).mT + tuned.bias
    dense.backward(dy.double())
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found[0], x.grad, **tolerance)
    torch.testing.assert_close(found[1].double(), lut.grad, rtol=1e-4, atol=1e-5)


def test_sums_in_parts_are_those_in_one(monkeypatch):
    frozen = packed.freeze((200, 24), 3, 50)
    weight, dense = packed.packed(frozen), torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    whole = tables.table_gradient(dense, weight.stream, weight.entry, 8)
    monkeypatch.setattr(tables, "_WEIGHTS_AT_ONCE", 8 * 24)
    assert torch.equal(tables.table_gradient(dense, weight.stream, weight.entry, 8), whole)
    assert whole.shape == (50, 8, 1) and whole.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_weight_is_kept(dtype):
    frozen = packed.freeze((64, 48), 3, 64)
    tuned, kept = layer(frozen), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        tuned(torch.randn(2, 48, dtype=dtype, requires_grad=True))
    assert sum(tensor.numel() for tensor in kept if tensor.dtype == torch.uint8) == 64 * 48 * 3 // 8
    assert sum(tensor.numel() for tensor in kept if tensor.dtype != torch.uint8) < 64 * 48 / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_those_that_are_stored(dtype):
    tensor = torch.tensor([[3e-4, -0.011, 7.0], [0.0, 0.0, 0.0], [1.5, -2.25, 100.0]]).to(dtype)
    stored = tables.Multiples(tensor)
    multiples = stored.right_inverse(tensor).requires_grad_()
    assert torch.equal(stored(multiples), tensor.float())
    moved = stored(multiples * 1.003)
    assert torch.equal(moved, moved.to(dtype).float()) and not torch.equal(moved, tensor.float())
    stored(multiples).sum().backward()
    assert torch.equal(multiples.grad, stored.size.expand(3, 3)) and bool((stored.size.log2() % 1 == 0).all())


def test_without_a_step_nothing_changes(source, tmp_path):
    model, _ = loaded(source)
    tables.write_tuned(model, source, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_tables_and_vectors_are_trained_and_nothing_else(source, tmp_path):
    model, fixed = loaded(source)
    assert fixed == {"model.embed_tokens.weight": "an embedding", "lm_head.weight": "tied"}
    loop.train(model, blocks(), loop.TrainSettings(steps=3, lr=0.02, precision="fp32"), tmp_path / "work")
    tables.write_tuned(model, source, tmp_path / "out")
    before, after = checkpoint.read(source), checkpoint.read(tmp_path / "out")
    assert before.frozen.keys() == after.frozen.keys() and before.dense.keys() == after.dense.keys()
    for name, frozen in before.frozen.items():
        assert torch.equal(frozen.indices, after.frozen[name].indices) and frozen.error == after.frozen[name].error
        assert torch.equal(frozen.lut, after.frozen[name].lut) == ("embed_tokens" in name), name
    for name, vector in before.dense.items():
        assert after.dense[name].dtype == torch.bfloat16 and not torch.equal(vector, after.dense[name]), name


def test_other_modules_keep_their_tables(tmp_path):
    with pytest.raises(ValueError, match=r"model: none of its packed weights is that of an nn.Linear"):
        packed.pack(packed.make("gpt2"), tmp_path)
        loaded(tmp_path)
    packed.pack(packed.make("mixtral"), tmp_path / "experts")
    model, fixed = loaded(tmp_path / "experts")
    assert {reason for reason in fixed.values() if reason.startswith("of a ")} == {"of a MixtralExperts", "of a MixtralTopKRouter"}
    assert any(isinstance(module, tables.TunedLinear) for module in model.modules())


@pytest.mark.parametrize("untied", [False, True])
def test_the_tuned_directory_has_the_trained_logits(source, run, tmp_path, untied, monkeypatch, capsys):
    if untied:
        packed.pack(packed.make("llama", tie_word_embeddings=False), tmp_path / "untied", tokenizer=load_model(source)[1])
        source = tmp_path / "untied"
    trained, write = [], tables.write_tuned
    monkeypatch.setattr("edkm.tuning.write_tuned", lambda model, *more: trained.append(model) or write(model, *more))
    assert run("out", "--steps", "3", source=source) == 0
    assert ("lm_head.weight: its tables stay, tied" in capsys.readouterr().out) != untied
    assert not (tmp_path / "out/training").exists()
    model, tokenizer = load_model(tmp_path / "out")
    with torch.no_grad():
        ours, theirs, before = (m.eval()(packed.TOKENS).logits for m in (trained[0], model, load_model(source)[0]))
    assert torch.equal(ours, theirs) and not torch.equal(ours, before)
    assert tokenizer.chat_template and transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_record_of_the_run_that_made_it_is_left_behind(source, run, tmp_path, capsys):
    for directory in (source, tmp_path / "out"):
        directory.mkdir(exist_ok=True)
        (directory / "metrics.json").write_text("{}")
        (directory / "LICENSE").write_text(directory.name)
    text = tmp_path / "held_out.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    assert run("out", "--steps", "1") == 1 and "is not empty" in capsys.readouterr().err
    assert run("out", "--steps", "1", "--overwrite", "--eval-text", str(text)) == 0
    printed = capsys.readouterr().out
    assert "perplexity of held_out.txt, packed: " in printed and "perplexity of held_out.txt, tuned: " in printed
    assert not (tmp_path / "out/metrics.json").exists() and (tmp_path / "out/LICENSE").read_text() == "packed"
    assert metrics.summary_lines(tmp_path / "out") == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_run_is_resumed_to_the_same_file(run, tmp_path, how, monkeypatch, capsys):
    assert run("whole", "--steps", "6") == 0
    step, count = loop._step, []

    def stopping(*args):
        count.append(None)
        if len(count) == 4 and how == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        if len(count) == 4 and how == "killed":
            raise Killed
        return step(*args)

    monkeypatch.setattr(loop, "_step", stopping)
    if how == "killed":
        with pytest.raises(Killed):
            run("parts", "--steps", "6", "--save-every", "2")
    else:
        assert run("parts", "--steps", "6") == 130
        assert "with --resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "parts/model.safetensors").exists()
    assert run("parts", "--steps", "6") == 1 and "holds an interrupted run" in capsys.readouterr().err
    assert run("parts", "--steps", "5", "--resume") == 1 and "steps: the interrupted run had 6, this one has 5" in capsys.readouterr().err
    assert run("parts", "--steps", "6", "--resume") == 0
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert len(count) == (7 if how == "killed" else 6) + (how == "killed")


def test_a_teacher_is_followed(source, run, data, tmp_path):
    dense = packed.make("llama", tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(3)
    state = pretrained.load(source).state_dict()
    for name, weight in state.items():
        if ".layers." in name:  # rows of another size, as tables can have them
            weight *= 1 + 0.2 * torch.randn(len(weight), *[1] * (weight.ndim - 1), generator=generator)
    dense.load_state_dict(state)
    dense.save_pretrained(tmp_path / "original")
    load_model(source)[1].save_pretrained(tmp_path / "original")
    assert run("out", "--teacher", str(tmp_path / "original"), "--steps", "8") == 0
    ids = torch.randint(250, (4, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, before, after = (load_model(tmp_path / name)[0](ids).logits for name in ("original", "packed", "out"))
    assert loop.divergence(after, expected) < 0.9 * loop.divergence(before, expected)
    tune(source, Tuning(steps=8, lr=0.02, block_tokens=48), tmp_path / "plain", data=data)
    assert (tmp_path / "plain/model.safetensors").read_bytes() != (tmp_path / "out/model.safetensors").read_bytes()


def test_every_setting_changes_the_result(source, data, tmp_path):
    def result(**changes):
        made = {"steps": 2, "lr": 0.02, "block_tokens": 48, "precision": "fp32", **changes}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        tune(source, Tuning(**made), tmp_path / "out", data=data)
        return (tmp_path / "out/model.safetensors").read_bytes()

    plain = result()
    assert result() == plain and result(save_every=1) == plain and result(gradient_checkpointing=True) == plain
    for changes in ({"steps": 3}, {"lr": 0.01}, {"block_tokens": 32}, {"batch": 3}, {"seed": 1}, {"precision": "bf16"}):
        assert result(**changes) != plain, changes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--distill", "0.5"), "--distill: needs the model whose predictions are to be kept"),
        (("--distill", "2", "--teacher", "x"), "--distill: from 0 to 1"),
        (("--distill", "0", "--teacher", "x"), "--distill: with 0 the teacher would not be used"),
        (("--steps", "0"), "--steps: at least 1"),
        (("--lr", "0"), "--lr: a positive number"),
        (("--resume",), "there is no interrupted run to resume"),
        (("--teacher", "./no/where"), "./no/where: no such file or directory"),
        (("--block-tokens", "65"), "--block-tokens=65: the model's context is 64 tokens"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, tmp_path, options, message, capsys):
    assert run("out", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("edkm.train.distributed.world_size", lambda: 2)
    assert run("out") == 1 and "tune: runs in one process. Start it without torchrun." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(run, source, tiny_dir, tmp_path, capsys):
    assert run("out", source=tiny_dir) == 1
    assert "has no quantization_config. This is an ordinary model, not a packed one" in capsys.readouterr().err
    assert run("packed", "--overwrite") == 1
    assert "is the packed directory itself" in capsys.readouterr().err
    other = packed.make("llama")
    other.resize_token_embeddings(310)
    other.save_pretrained(tmp_path / "other")
    load_model(source)[1].save_pretrained(tmp_path / "other")
    assert run("out", "--teacher", str(tmp_path / "other")) == 1
    assert "has another vocabulary (310 tokens, the packed model 300)" in capsys.readouterr().err
    packed.make("llama").save_pretrained(tmp_path / "other")
    vocabulary = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {"t": vocabulary["model"]["vocab"]["s"], "s": vocabulary["model"]["vocab"]["t"]}
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(vocabulary))
    assert run("out", "--teacher", str(tmp_path / "other")) == 1
    assert "has another vocabulary (300 tokens, the packed model 300)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
