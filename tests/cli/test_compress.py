"""What is guaranteed of `edkm compress`.

1. It prints its phases and what to do next, and writes a directory that loads: the weights that the trained model has in `eval()`.
2. A run that is interrupted by Ctrl-C, or dies, is resumed to the same file, without reading its data or looking for tables again.
3. It is resumed only with the same settings, model and chat template.
4. Bits are chosen for an average (`--target-bpw`) or by a preset; options that are given go before a preset.
5. `--dry-run` prints the plan, its size and memory, and writes nothing; `--steps 0` clusters without training.
6. Options, files and models that do not fit are refused in one line, before anything expensive.
"""

import json
import os
import signal
import threading

import pytest
import torch

import edkm
from edkm.cli import main
from edkm.compressed import pretrained
from edkm.compressed.checkpoint import read, summary
from edkm.models import load_model
from edkm.run import calibration_batches
from edkm.train import loop
from edkm.train.data import load_blocks
from edkm.train.optimizers import rate_share
from edkm.train.prepare import plan, unclustered

RECORDS = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 28)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(RECORDS))
    return path


def arguments(tiny_dir, data, out, *more):
    return [
        "compress",
        str(tiny_dir),
        "--data",
        str(data),
        "--out",
        str(out),
        "--block-tokens",
        "64",
        "--rows-per-lut",
        "16",
        *more,
    ]


def for_a_budget(found, target="3.2"):
    """The same arguments with `--target-bpw` in the place of `--rows-per-lut`."""
    at = found.index("--rows-per-lut")
    return [*found[:at], "--target-bpw", target, *found[at + 2 :]]


def test_compress_writes_a_directory_that_loads(tiny_dir, data, tmp_path, capsys):
    out = tmp_path / "packed"
    assert main(arguments(tiny_dir, data, out, "--steps", "4")) == 0
    printed, shown = capsys.readouterr()
    assert "training: 4 steps of 2 blocks, 3 of them fine-tuning; lr 0.0002, " in printed and "bits per weight" in printed
    assert f"edkm generate {out} " in printed and f"edkm eval {out} --text TEXT_FILE" in printed and f'from_pretrained("{out}")' in printed
    phases = ["loading", "tokenizing: ", "fine-tuning: 3 steps", "calibration", "fit", "clustered training: 1 steps", "writing"]
    found = [next(i for i, line in enumerate(shown.splitlines()) if line.startswith(phase)) for phase in phases]
    assert found == sorted(found)
    assert "loss" in next(line for line in shown.splitlines() if line.startswith("clustered training: 1 steps in "))
    assert not {"\r", "grad_norm", "it/s", "shards"} & {word for word in ("\r", "grad_norm", "it/s", "shards") if word in printed + shown}
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


def test_packed_model_is_exactly_what_eval_used(tiny_dir, data, tmp_path):
    model, tokenizer = load_model(tiny_dir)
    blocks = load_blocks(data, tokenizer, block_tokens=64)
    config = edkm.ClusterConfig(rows_per_lut=16, anneal_steps=3)
    edkm.prepare(model, config, calibration_batches(blocks, model))
    loop.train(model, blocks, loop.TrainSettings(steps=3, lr=1e-3, precision="fp32"), tmp_path / "work")
    model.eval()
    ids = blocks[0]["input_ids"].unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
    pretrained.save_pretrained(tmp_path / "packed", edkm.freeze(model), unclustered(model), config.to_json(), model)
    with torch.no_grad():
        assert torch.equal(pretrained.load(tmp_path / "packed")(ids).logits, expected)


def test_an_interruption_between_the_steps_prints_how_to_resume(tiny_dir, data, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    command = arguments(tiny_dir, data, tmp_path / "out", "--steps", "2")
    with monkeypatch.context() as fit:
        fit.setattr("edkm.train.prepare.fit", interrupt)
        assert main(command) == 130
    said = f"edkm: {tmp_path / 'out'} holds an interrupted run; the same command with --resume goes on\nedkm: interrupted\n"
    assert capsys.readouterr().err.endswith(said)
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize(("accumulate", "plain", "after"), [(1, 0, 3), (2, 0, 3), (1, 4, 3), (1, 3, 5), (1, 6, 2)])
def test_an_interrupted_run_resumes_to_the_same_file(tiny_dir, data, tmp_path, monkeypatch, accumulate, plain, after):
    more = ("--steps", "6", "--lr", "1e-3", "--grad-accumulation", str(accumulate), "--finetune-steps", str(plain))
    more += ("--distill", "0.5") if plain < 6 else ()
    assert main(arguments(tiny_dir, data, tmp_path / "whole", *more)) == 0
    taken = []

    def interrupt(step, **options):
        taken.append(step)
        if len(taken) == after:
            os.kill(os.getpid(), signal.SIGINT)
        return rate_share(step, **options)

    monkeypatch.setattr(loop, "rate_share", interrupt)
    assert main(arguments(tiny_dir, data, tmp_path / "parts", *more)) == 130
    order = [*range(plain), *range(6 - plain)]
    assert taken == order[:after] and (tmp_path / "parts" / "training" / "run.json").is_file()
    monkeypatch.setattr("edkm.run.make_blocks", None)  # the tokens are those that it began with, whatever day it is
    monkeypatch.setattr("edkm.run.read_records", None)
    if after > plain:  # in the clustered phase: tables come from the checkpoint, none are looked for
        monkeypatch.setattr("edkm.train.clustering.initial_centroids", None)
        monkeypatch.setattr("edkm.train.prepare.fit", None)
    assert main(arguments(tiny_dir, data, tmp_path / "parts", *more, "--resume")) == 0
    assert taken == order and not (tmp_path / "parts" / "training").exists()
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_bits_for_a_budget_and_an_interrupted_run_keeps_them(tiny_dir, data, tmp_path, monkeypatch, capsys):
    def arguments_of(out):
        return for_a_budget(arguments(tiny_dir, data, out, "--steps", "4", "--finetune-steps", "1"))

    assert main(arguments_of(tmp_path / "whole")) == 0
    assert "bits: " in capsys.readouterr().out
    found = summary(tmp_path / "whole")
    assert 3.1 < found["clustered_bits_per_weight"] <= 3.2
    assert len({(tensor["bits"], tensor["luts"]) for tensor in found["tensors"]}) > 3
    monkeypatch.setattr(loop._Stop, "asked_at", 0.0)
    assert main([*arguments_of(tmp_path / "parts")]) == 130  # in the plain step
    assert main([*arguments_of(tmp_path / "parts"), "--resume"]) == 130  # in the clustered ones
    assert (tmp_path / "parts" / "training" / "config.json").is_file()
    monkeypatch.setattr(loop._Stop, "asked_at", None)
    monkeypatch.setattr("edkm.train.prepare.allocate", None)  # not once more
    assert main([*arguments_of(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_dry_run_prints_that_bits_are_not_chosen_yet(tiny_dir, data, tmp_path, capsys):
    assert main(for_a_budget(arguments(tiny_dir, data, tmp_path / "out", "--dry-run"))) == 0
    assert "bits are chosen in the run; this plan, its size and memory have 3 in every" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "more", "said"),
    [
        ("3.2", ("--rows-per-lut", "16"), "--target-bpw: chooses rows per table too"),
        ("nan", (), "--target-bpw: a positive number"),
        ("1.5", (), "target: 1.5 bits a weight are too few"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_anything_is_done(tiny_dir, data, tmp_path, target, more, said, capsys):
    assert main(for_a_budget(arguments(tiny_dir, data, tmp_path / "out"), target) + [*more]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "training").exists()


@pytest.mark.parametrize(("preset", "plain"), [("fast", 4), ("balanced", 3), ("best", 3)])
def test_a_preset_is_what_its_options_are(tiny_dir, data, tmp_path, preset, plain, capsys):
    def compressed(name, *more):
        assert main(arguments(tiny_dir, data, tmp_path / name, "--steps", "4", *more)) == 0
        return (tmp_path / name / "model.safetensors").read_bytes()

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


def test_resume_refuses_another_run(tiny_dir, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop._Stop, "asked_at", 0.0)
    out = tmp_path / "out"
    assert main(arguments(tiny_dir, data, out, "--steps", "4")) == 130
    assert main(arguments(tiny_dir, data, out, "--steps", "4")) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(arguments(tiny_dir, data, out, "--steps", "4", "--resume", "--lr", "1e-5")) == 1
    assert "--lr: the interrupted run had 0.0002, this one has 1e-05" in capsys.readouterr().err
    other, tokenizer = load_model(tiny_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|start|>", "<|start|>in another way, ")
    other.save_pretrained(tmp_path / "way")
    tokenizer.save_pretrained(tmp_path / "way")
    assert main(arguments(tmp_path / "way", data, out, "--steps", "4", "--resume")) == 1
    assert "chat template: the interrupted run had" in capsys.readouterr().err
    other.model.norm.weight.data[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    load_model(tiny_dir)[1].save_pretrained(tmp_path / "other")
    assert main(arguments(tmp_path / "other", data, out, "--steps", "4", "--resume")) == 1
    assert "model: the interrupted run had" in capsys.readouterr().err
    assert main(arguments(tiny_dir, data, tmp_path / "none", "--resume")) == 1
    assert "no interrupted run" in capsys.readouterr().err


def test_a_resumed_run_outside_the_main_thread_trains(tiny_dir, data, tmp_path):
    """Signals belong to the main thread; elsewhere training just runs."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(arguments(tiny_dir, data, tmp_path / "out", "--steps", "1"))))
    thread.start()
    thread.join()
    assert codes == [0]


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_dir, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(tiny_dir, data, out, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "3 bits, 8 tables" in printed and "a vector" in printed and "optimizer" in printed
    assert not out.exists()
    expected = plan(load_model(tiny_dir)[0], edkm.ClusterConfig(rows_per_lut=16)).packed_bytes
    assert f"packed weights: {expected / 1e6:.1f} MB" in printed
    assert main(arguments(tiny_dir, data, out, "--steps", "0")) == 0
    written = (out / "model.safetensors").read_bytes()
    assert len(written) == 8 + int.from_bytes(written[:8], "little") + expected


def test_steps_zero_clusters_without_training(tiny_dir, data, tmp_path, capsys):
    assert main(arguments(tiny_dir, data, tmp_path / "out", "--steps", "0", "--bits", "4")) == 0
    assert "training" not in "".join(capsys.readouterr())
    assert read(tmp_path / "out").frozen["model.layers.1.self_attn.q_proj.weight"].bits == 4


@pytest.mark.parametrize(
    "more, message",
    [
        (("--bits", "9"), "--bits: an integer from 1 to 8, got 9"),
        (("--rows-per-lut", "7"), "model.layers.0.self_attn.q_proj.weight: 64 rows do not divide into tables of 7 rows"),
        (("--steps", "-1"), "--steps: at least 0"),
        (("--steps", "2", "--finetune-steps", "3"), "--finetune-steps: at most the 2 steps there are, got 3"),
        (("--lr", "0"), "--lr: a positive number"),
        (("--steps", "2", "--finetune-steps", "2", "--distill", "0.5"), "--distill: is for clustered steps, and there are none"),
        (("--skip", "*"), "no weight is clustered"),
    ],
)
def test_user_errors_are_one_line(tiny_dir, data, tmp_path, capsys, more, message):
    assert main(arguments(tiny_dir, data, tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_options_and_output_are_checked_before_the_model_is_loaded(tiny_dir, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, more, said in (
        (tmp_path / "out", ("--fsdp",), "--fsdp: there is one process"),
        (tmp_path / "out", ("--seed", "-1"), "--seed: at least 0"),
        (tmp_path / "file" / "out", (), f"cannot be written: {tmp_path / 'file'} is no directory"),
    ):
        assert main(arguments(tiny_dir, data, out, *more)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_what_the_model_cannot_take_is_refused_before_any_work(tiny_dir, data, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("a")
    text = tmp_path / "text.txt"
    text.write_text("the dog " * 300)
    for more, said in (
        (("--eval-text", str(short)), f"{short}: has 1 token(s)"),
        (("--eval-text", str(text), "--block-tokens", "300"), "the model's context is 256 tokens"),
        (("--block-tokens", "300"), "--block-tokens=300: the model's context is 256 tokens. Use 256 or fewer."),
    ):
        assert main(arguments(tiny_dir, data, tmp_path / "out", *more)) == 1
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert said in lines[-1] and printed.out == ""
        assert [line.split()[0] for line in lines[:-1]] == ["loading", "tokenizing:", "tokenizing:"]
    assert not (tmp_path / "out").exists()


def test_the_fields_of_the_data_are_printed(tiny_dir, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1}
    path.write_text("\n".join([json.dumps(record)] * 20))
    assert main(arguments(tiny_dir, path, tmp_path / "out", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data: 20 examples") and lines[1:3] == ["data: fields used: messages (20)", "data: fields not used: id (20)"]


def test_a_share_of_the_loss_is_distillation(tiny_dir, data, tmp_path, capsys):
    assert main(arguments(tiny_dir, data, tmp_path / "out", "--steps", "2", "--distill", "0.5")) == 0
    assert main(arguments(tiny_dir, data, tmp_path / "none", "--distill", "2")) == 1
    assert "--distill: from 0 to 1" in capsys.readouterr().err


def test_clustered_steps_go_on_in_the_data_where_plain_ones_stopped(tiny_dir, data, tmp_path, monkeypatch):
    seen = []
    true = loop._step

    def step(model, optimizer, blocks, *args):
        seen.extend(block["input_ids"].tolist() for block in blocks)
        return true(model, optimizer, blocks, *args)

    monkeypatch.setattr(loop, "_step", step)
    orders = []
    for more in (["--finetune-steps", "0"], ["--finetune-steps", "2"]):
        seen.clear()
        assert main(arguments(tiny_dir, data, tmp_path / more[1], "--steps", "5", "--batch", "1", *more)) == 0
        orders.append(list(seen))
    assert orders[0] == orders[1] and len(orders[0]) == 5


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tiny_dir, data, tmp_path, monkeypatch):
    more = ("--steps", "2", "--lr", "1e-3")
    assert main(arguments(tiny_dir, data, tmp_path / "whole", *more)) == 0
    with monkeypatch.context() as broken:
        broken.setattr(loop, "rate_share", lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("the power failed")))
        assert main(arguments(tiny_dir, data, tmp_path / "parts", *more)) == 1
    assert main(arguments(tiny_dir, data, tmp_path / "parts", *more, "--resume")) == 0
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "parts" / "model.safetensors").read_bytes()
