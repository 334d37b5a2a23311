"""What is guaranteed of `edkm compress`.

1. It prints its phases and what to do next, and writes a directory that loads.
2. A run that is interrupted by Ctrl-C, or dies, is resumed to the same file, without reading its data or looking for tables again.
3. It is resumed only with the same settings, model and chat template.
4. Bits are chosen for an average (`--target-bpw`) or by a preset; options that are given go before a preset.
5. `--dry-run` prints the plan, its size and memory, and writes nothing; `--steps 0` clusters without training.
6. Options, files and models that do not fit are refused in one line, before anything expensive.
7. `--report-to tensorboard` writes the losses of both phases to OUT/runs.
8. `--format` trains into the formats of other programs; with a budget or `best` those of a family are chosen.
"""

import json
import os
import signal
import threading
from contextlib import nullcontext

import pytest
import torch

import edkm
from edkm import metrics
from edkm.cli import main
from edkm.compressed.checkpoint import read, summary
from edkm.models import load_model
from edkm.train import loop
from edkm.train.optimizers import rate_share
from edkm.train.prepare import plan


@pytest.fixture
def run(tiny_dir, data, tmp_path):
    """Run `edkm compress` with these options, into a directory of `tmp_path`; returns the exit code."""

    def compress(out, *more, model=tiny_dir, data=data):
        tables = () if {"--target-bpw", "--format"} & {*more} else ("--rows-per-lut", "16")
        return main(["compress", str(model), "--data", str(data), "--out", str(tmp_path / out), "--block-tokens", "64", *tables, *more])

    return compress


@pytest.fixture
def weights(tmp_path):
    """The bytes of the packed weights in a directory of `tmp_path`."""
    return lambda out: (tmp_path / out / "model.safetensors").read_bytes()


def test_compress_writes_a_directory_that_loads(run, tiny_dir, tmp_path, capsys):
    out = tmp_path / "packed"
    assert run(out, "--steps", "4") == 0
    printed, shown = capsys.readouterr()
    assert "training: 4 steps of 2 blocks, 3 of them fine-tuning; lr 0.0002, " in printed and "bits per weight" in printed
    assert f"edkm generate {out} " in printed and f"edkm eval {out} --text TEXT_FILE" in printed and f'from_pretrained("{out}")' in printed
    phases = ["loading", "tokenizing: ", "fine-tuning: 3 steps", "calibration", "fit", "clustered training: 1 steps", "writing"]
    found = [next(i for i, line in enumerate(shown.splitlines()) if line.startswith(phase)) for phase in phases]
    assert found == sorted(found)
    assert "loss" in next(line for line in shown.splitlines() if line.startswith("clustered training: 1 steps in "))
    assert not [word for word in ("\r", "grad_norm", "it/s", "shards") if word in printed + shown]
    model, tokenizer = load_model(out)
    assert tokenizer.chat_template and not (out / "training").exists()
    packed = read(out)
    name = "model.layers.0.mlp.up_proj.weight"
    assert packed.frozen[name].bits == 3 and packed.frozen[name].lut.shape == (8, 8, 1)
    assert packed.frozen["model.embed_tokens.weight"].bits == 8
    weight = dict(model.named_parameters())[name]
    for rows in weight.detach().view(8, -1):
        assert len(rows.unique()) <= 8
    assert not torch.equal(weight, dict(load_model(tiny_dir)[0].named_parameters())[name])


def test_tensorboard_gets_the_losses_of_both_phases(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run("out", "--steps", "4", "--report-to", "tensorboard") == 0
    written = []
    for phase in ("fine-tuning", "clustered-training"):
        events = accumulator.EventAccumulator(str(tmp_path / "out" / "runs" / phase)).Reload()
        written += [(event.step, event.value) for event in events.Scalars("train/loss")]
    recorded = [loss for series in metrics.read(tmp_path / "out")[0]["losses"] for _, loss in series["points"]]
    assert written == [(step, pytest.approx(loss)) for step, loss in enumerate(recorded, 1)] and len(written) == 4


def test_an_interruption_between_the_steps_prints_how_to_resume(run, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as fit:
        fit.setattr("edkm.train.prepare.fit", interrupt)
        assert run("out", "--steps", "2") == 130
    said = f"edkm: {tmp_path / 'out'} holds an interrupted run; the same command with --resume goes on\nedkm: interrupted\n"
    assert capsys.readouterr().err.endswith(said)
    assert run("out", "--steps", "2", "--resume") == 0


@pytest.mark.parametrize(("accumulate", "plain", "after"), [(1, 0, 3), (2, 0, 3), (1, 4, 3), (1, 3, 5), (1, 6, 2)])
def test_an_interrupted_run_resumes_to_the_same_file(run, weights, tmp_path, monkeypatch, accumulate, plain, after):
    more = ("--steps", "6", "--lr", "1e-3", "--grad-accumulation", str(accumulate), "--finetune-steps", str(plain))
    more += ("--distill", "0.5") if plain < 6 else ()
    assert run("whole", *more) == 0
    taken = []

    def interrupt(step, **options):
        taken.append(step)
        if len(taken) == after:
            os.kill(os.getpid(), signal.SIGINT)
        return rate_share(step, **options)

    monkeypatch.setattr(loop, "rate_share", interrupt)
    assert run("parts", *more) == 130
    order = [*range(plain), *range(6 - plain)]
    assert taken == order[:after] and (tmp_path / "parts" / "training" / "run.json").is_file()
    monkeypatch.setattr("edkm.run.make_blocks", None)  # the tokens are those that it began with, whatever day it is
    monkeypatch.setattr("edkm.run.read_records", None)
    if after > plain:  # in the clustered phase: tables come from the checkpoint, none are looked for
        monkeypatch.setattr("edkm.train.clustering.initial_centroids", None)
        monkeypatch.setattr("edkm.train.prepare.fit", None)
    assert run("parts", *more, "--resume") == 0
    assert taken == order and not (tmp_path / "parts" / "training").exists()
    assert weights("whole") == weights("parts")


def test_bits_for_a_budget_and_an_interrupted_run_keeps_them(run, weights, tmp_path, monkeypatch, capsys):
    more = ("--target-bpw", "3.2", "--steps", "4", "--finetune-steps", "1")
    assert run("whole", *more) == 0
    assert "bits: " in capsys.readouterr().out
    found = summary(tmp_path / "whole")
    assert 3.1 < found["clustered_bits_per_weight"] <= 3.2
    assert len({(tensor["bits"], tensor["luts"]) for tensor in found["tensors"]}) > 3
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_note_interrupts", lambda: nullcontext([0.0]))  # Ctrl-C in the first step
        assert run("parts", *more) == 130  # in the plain step
        assert run("parts", *more, "--resume") == 130  # in the clustered ones
    assert (tmp_path / "parts" / "training" / "config.json").is_file()
    monkeypatch.setattr("edkm.train.prepare.allocate", None)  # not once more
    assert run("parts", *more, "--resume") == 0
    assert weights("whole") == weights("parts")


@pytest.mark.parametrize(("preset", "plain"), [("fast", 4), ("balanced", 3), ("best", 3)])
def test_a_preset_is_what_its_options_are(run, weights, tmp_path, preset, plain, capsys):
    def compressed(name, *more):
        assert run(name, "--steps", "4", *more) == 0
        return weights(name)

    named = compressed("named", "--preset", preset)
    printed, shown = capsys.readouterr()
    assert f"fine-tuning: {plain} steps" in shown and ("clustered training: 1 steps" in shown) == (plain == 3)
    assert ("bits: " in printed) == (preset == "best")
    by_option = compressed("by option", "--finetune-steps", str(plain))
    assert (named == by_option) == (preset != "best")
    bits = {name: summary(tmp_path / name)["clustered_bits_per_weight"] for name in ("named", "by option")}
    assert bits["by option"] - 0.1 < bits["named"] <= bits["by option"] + 1e-9  # the same size, spent elsewhere
    assert compressed("other", "--preset", preset, "--finetune-steps", "0") != named  # what is given goes first
    assert "fine-tuning" not in capsys.readouterr().err.rpartition("loading")[2]


def test_resume_refuses_another_run(run, tiny_dir, tmp_path, monkeypatch, capsys):
    def refused(message, *more, out="out", model=tiny_dir):
        assert run(out, "--steps", "4", *more, model=model) == 1
        assert message in capsys.readouterr().err

    monkeypatch.setattr(loop, "_note_interrupts", lambda: nullcontext([0.0]))  # Ctrl-C in the first step
    assert run("out", "--steps", "4") == 130
    refused("--resume")
    refused("--lr: the interrupted run had 0.0002, this one has 1e-05", "--resume", "--lr", "1e-5")
    other, tokenizer = load_model(tiny_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|start|>", "<|start|>in another way, ")
    other.save_pretrained(tmp_path / "way")
    tokenizer.save_pretrained(tmp_path / "way")
    refused("chat template: the interrupted run had", "--resume", model=tmp_path / "way")
    other.model.norm.weight.data[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    load_model(tiny_dir)[1].save_pretrained(tmp_path / "other")
    refused("model: the interrupted run had", "--resume", model=tmp_path / "other")
    refused("no interrupted run", "--resume", out="none")


def test_a_run_outside_the_main_thread_trains(run):
    """Signals belong to the main thread; elsewhere training just runs."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("out", "--steps", "1")))
    thread.start()
    thread.join()
    assert codes == [0]


def test_dry_run_prints_the_plan_and_writes_nothing(run, weights, tiny_dir, tmp_path, capsys):
    assert run("out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "3 bits, 8 tables" in printed and "a vector" in printed and "optimizer" in printed
    assert run("out", "--dry-run", "--target-bpw", "3.2") == 0
    assert "bits are chosen in the run; this plan, its size and memory have 3 in every" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    expected = plan(load_model(tiny_dir)[0], edkm.ClusterConfig(rows_per_lut=16)).packed_bytes
    assert f"packed weights: {expected / 1e6:.1f} MB" in printed
    assert run("out", "--steps", "0") == 0
    assert len(weights("out")) == 8 + int.from_bytes(weights("out")[:8], "little") + expected


def test_steps_zero_clusters_without_training(run, tmp_path, capsys):
    assert run("out", "--steps", "0", "--bits", "4") == 0
    assert "training" not in "".join(capsys.readouterr())
    assert read(tmp_path / "out").frozen["model.layers.1.self_attn.q_proj.weight"].bits == 4


def test_a_format_is_trained_and_packed(run, tmp_path, capsys):
    assert run("out", "--format", "q2_k", "--steps", "4", "--finetune-steps", "2") == 0
    out = capsys.readouterr().out
    assert "q2_k does not divide the columns of 14 tensors, first model.layers.0.self_attn.q_proj.weight: they have iq4_nl" in out
    frozen = read(tmp_path / "out").frozen
    assert {name.split(".")[1]: tensor.format for name, tensor in frozen.items()} == {"embed_tokens": "q8_0", "layers": "iq4_nl"}
    assert summary(tmp_path / "out")["clustered_bits_per_weight"] == 4.5
    assert run("out2", "--format", "q2_k", "--steps", "4", "--finetune-steps", "2", "--dry-run") == 0
    assert "iq4_nl" in capsys.readouterr().out and not (tmp_path / "out2").exists()


@pytest.mark.parametrize("how", [("--target-bpw", "5.5"), ("--preset", "best")])
def test_formats_of_a_family_are_chosen(run, tmp_path, capsys, how):
    assert run("out", "--format", "mlx4_g32", "--steps", "0", *how) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bits: mlx"))
    frozen = read(tmp_path / "out").frozen
    layers = [tensor.format for name, tensor in frozen.items() if "layers" in name]
    assert {f"{name} in {layers.count(name)} tensors" for name in {*layers}} == {*line.removeprefix("bits: ").split(", ")}
    assert summary(tmp_path / "out")["clustered_bits_per_weight"] <= (5.5 if "5.5" in how else 5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps -1", "--steps: at least 0"),
        ("--seed -1", "--seed: at least 0"),
        ("--fsdp", "--fsdp: there is one process"),
        ("--target-bpw 3.2 --rows-per-lut 16", "--target-bpw: chooses rows per table too"),
        ("--format q4_0 --bits 3", "--format: q4_0 has its own bits and blocks. Leave out --bits."),
        ("--format q4_0 --rows-per-lut 1", "--format: q4_0 has its own bits and blocks. Leave out --rows-per-lut."),
        ("--format q5_9", "--format: 'q5_9' is not one of table, q4_0, "),
        ("--format q4_0 --embedding-bits 4", "--embedding-bits: q4_0 has this of its own: its embeddings have 8 bits, or 0; got 4."),
        ("--report-to paper", "--report-to: there is no 'paper'"),
        ("--out {}/file/out", "cannot be written: {}/file is no directory"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(run, tmp_path, capsys, options, message):
    (tmp_path / "file").write_text("")
    assert run("out", *options.format(tmp_path).split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(tmp_path) in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rows-per-lut 7", "model.layers.0.self_attn.q_proj.weight: 64 rows do not divide into tables of 7 rows"),
        ("--steps 2 --finetune-steps 3", "--finetune-steps: at most the 2 steps there are, got 3"),
        ("--steps 2 --finetune-steps 2 --distill 0.5", "--distill: is for clustered steps, and there are none"),
        ("--skip *", "no weight is clustered"),
        ("--format q4_0 --target-bpw 4", "target: 4 bits a weight are too few, 4.500 is the least"),
        ("--target-bpw 1.5", "target: 1.5 bits a weight are too few"),
        ("--eval-text {}/short.txt", "{}/short.txt: has 1 token(s)"),
        ("--eval-text {}/text.txt --block-tokens 300", "the model's context is 256 tokens"),
        ("--block-tokens 300", "--block-tokens=300: the model's context is 256 tokens. Use 256 or fewer."),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_any_work(run, tmp_path, capsys, options, message):
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "text.txt").write_text("the dog " * 300)
    assert run("out", *options.format(tmp_path).split()) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert message.format(tmp_path) in lines[-1] and not out and not (tmp_path / "out").exists()
    assert [line.split()[0] for line in lines[:-1]] == ["loading", "tokenizing:", "tokenizing:"]


def test_the_fields_of_the_data_are_printed(run, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1}
    path.write_text("\n".join([json.dumps(record)] * 20))
    assert run("out", "--dry-run", data=path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data: 20 examples") and lines[1:3] == ["data: fields used: messages (20)", "data: fields not used: id (20)"]


def test_clustered_steps_go_on_in_the_data_where_plain_ones_stopped(run, monkeypatch):
    seen = []
    true = loop._step

    def watched(model, blocks, *args):
        seen.append([block["input_ids"].tolist() for block in blocks])
        return true(model, blocks, *args)

    monkeypatch.setattr(loop, "_step", watched)
    for plain in ("0", "2"):
        assert run(plain, "--steps", "5", "--batch", "1", "--finetune-steps", plain) == 0
    assert len(seen) == 10 and seen[:5] == seen[5:]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(run, weights, monkeypatch):
    more = ("--steps", "2", "--lr", "1e-3")
    assert run("whole", *more) == 0
    with monkeypatch.context() as broken:
        broken.setattr(loop, "rate_share", lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("the power failed")))
        assert run("parts", *more) == 1
    assert run("parts", *more, "--resume") == 0
    assert weights("whole") == weights("parts")
