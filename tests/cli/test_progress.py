"""Progress of long work: on a terminal, in a pipe, on other ranks, and when something goes wrong."""

import io
import json
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr

import pytest
import torch
import transformers

import edkm
from edkm import progress
from edkm.cli import main
from edkm.train import loop
from edkm.train.prepare import clusterings
from examples.demo import __main__ as demo


class Terminal(io.StringIO):
    """A stderr that says it is a terminal, of unknown size."""

    def isatty(self):
        return True

    def lines(self):
        """What is on the screen at the end: a carriage return starts the line again."""
        shown = []
        for line in self.getvalue().split("\n"):
            row = ""
            for text in line.split("\r"):
                row = text + row[len(text) :]
            shown.append(row.rstrip())
        return shown


@contextmanager
def on_a_terminal():
    stream = Terminal()
    with redirect_stderr(stream):
        yield stream


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_program_that_calls_a_function_sees_nothing():
    with on_a_terminal() as terminal, progress.progress("fit", 2, "weights") as advance:
        advance()
    assert terminal.getvalue() == ""


def test_on_a_terminal_one_line_shows_how_far_it_is_and_one_stays(clock):
    with on_a_terminal() as terminal, progress.shown(), progress.progress("fit", 4, "weights") as advance:
        for _ in range(4):
            advance(note="loss 2.5")
    drawn = terminal.getvalue()
    assert "fit   0%|" in drawn and "0/4 weights" in drawn and " left" in drawn
    first, *rest = terminal.lines()
    assert (first, rest) == ("fit: 4 weights in 0.0 s, loss 2.5", [""])


def test_a_bar_shows_a_loss_as_soon_as_it_is_known():
    with on_a_terminal() as terminal, progress.shown(), progress.progress("training", 4, "steps") as advance:
        advance(0, "loss 2.5")
        assert terminal.getvalue().rstrip().endswith("left, loss 2.5")


def test_elsewhere_lines_come_at_the_start_at_tenths_and_at_the_end(clock, capsys):
    with progress.shown(), progress.progress("training", 100, "steps") as advance:
        for _ in range(100):
            clock[0] += 1.0
            advance(note="loss 2.5")
    first, *between, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("training: 100 steps", "training: 100 steps in 1:40, loss 2.5")
    assert between[0] == "training: 10 of 100 steps, 10 s, 1:30 left, loss 2.5" and len(between) == 9


def test_fast_work_has_two_lines_and_slow_steps_one_each_half_minute(clock, capsys):
    with progress.shown(), progress.progress("fast", 1000) as advance:
        for _ in range(1000):
            clock[0] += 0.001
            advance()
    assert capsys.readouterr().err.splitlines() == ["fast: 1,000", "fast: 1,000 in 1.0 s"]
    with progress.shown(), progress.progress("slow", 1000) as advance:
        for _ in range(10):
            clock[0] += 10.0
            advance()
    assert len(capsys.readouterr().err.splitlines()) == 1 + 3 + 1


def test_work_of_unknown_length_is_named_and_leaves_nothing_on_a_terminal(capsys):
    with on_a_terminal() as terminal, progress.shown(), progress.progress("loading x") as advance:
        advance()
    assert "loading x, 00:00" in terminal.getvalue() and terminal.lines() == [""]
    with progress.shown(), progress.progress("loading x"):
        pass
    assert capsys.readouterr().err == "loading x\n"


def test_what_was_done_before_counts_and_not_for_the_time_left(clock, capsys):
    with progress.shown(), progress.progress("training", 40, "steps", done=20) as advance:
        clock[0] = 10.0
        advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "training: 20 of 40 steps",
        "training: 30 of 40 steps, 10 s, 10 s left",
        "training: 30 of 40 steps in 10 s",
    ]


def test_an_error_ends_the_line_and_no_other_says_it_was_done(capsys):
    def fail():
        with progress.shown(), progress.progress("fit", 2, "weights") as advance:
            advance()
            raise ValueError("broken")

    with on_a_terminal() as terminal, pytest.raises(ValueError, match="broken"):
        fail()
    assert terminal.lines() == [""]
    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capsys.readouterr().err == "fit: 2 weights\n"


def test_phases_within_each_other_and_lines_above_them(clock):
    with on_a_terminal() as terminal, progress.shown(), progress.progress("outer", 2) as outer:
        outer()
        with progress.progress("inner", 1) as inner:
            inner()
        progress.say("a line")
        outer()
    lines = [line for line in terminal.getvalue().replace("\x1b[A", "").replace("\r", "\n").split("\n") if line.strip()]
    for expected in ("inner: 1 in 0.0 s", "a line", "outer: 2 in 0.0 s"):
        assert expected in [line.strip() for line in lines]


@pytest.mark.parametrize("stream", [None, "closed", "full"])
def test_without_a_stderr_the_work_goes_on(stream):
    class Full(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    broken = {None: None, "closed": io.StringIO(), "full": Full()}[stream]
    if stream == "closed":
        broken.close()
    with redirect_stderr(broken), progress.shown(), progress.progress("fit", 2) as advance:
        advance()
        advance()


def test_other_ranks_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, said in ((0, "fit: 1\nfit: 1 in 0.0 s\n"), (1, "")):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with progress.shown(), progress.progress("fit", 1) as advance:
            advance()
        assert capsys.readouterr().err == said


def test_clock():
    assert [progress.clock(s) for s in (0.04, 9.94, 9.96, 59.4, 59.6, 750, 3723)] == [
        "0.0 s",
        "9.9 s",
        "10 s",
        "59 s",
        "1:00",
        "12:30",
        "1:02:03",
    ]


def test_importing_edkm_brings_no_tqdm():
    code = "import sys, edkm.progress, edkm.cli; print('tqdm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def blocks(count, vocabulary=300):
    ids = torch.randint(vocabulary, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_training_reads_the_loss_as_often_as_it_is_logged(tiny_model, tmp_path, monkeypatch):
    steps, read = [], []
    monkeypatch.setattr(loop._Progress, "on_step_end", lambda self, *args, **kwargs: steps.append(1))
    monkeypatch.setattr(loop._Progress, "on_log", lambda self, *args, logs=None, **kwargs: read.append(logs))
    settings = loop.TrainSettings(steps=40, lr=1e-3, batch=1, precision="fp32")
    result = loop.train(tiny_model, blocks(8), settings, tmp_path)
    assert len(steps) == 40 and sum("loss" in logs for logs in read) == len(result.losses) == 20


def test_training_leaves_transformers_as_it_was(tiny_model, tmp_path, capsys):
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loop.train(tiny_model, blocks(4), loop.TrainSettings(steps=2, lr=1e-3, batch=1, precision="fp32"), tmp_path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_trainer_of_ones_own_shows_the_clustering_unless_it_has_no_bars(tiny_model, tmp_path, capsys, quiet):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, disable_tqdm=quiet, report_to=[], use_cpu=True, save_strategy="no"
    )
    callback = edkm.Callback(tmp_path / "packed", edkm.ClusterConfig(rows_per_lut=16), plain_share=0.5)
    transformers.Trainer(tiny_model, arguments, train_dataset=blocks(8), callbacks=[callback]).train()
    shown = capsys.readouterr().err
    assert ("fit: 14 weights in " in shown) == ("writing: " in shown) == (not quiet)
    assert clusterings(tiny_model)


def test_the_demonstration_ends_with_precisions_and_what_to_do_next(tmp_path, tiny_model, chat_tokenizer, capsys, monkeypatch):
    out = tmp_path / "demo"
    tiny_model.config.max_position_embeddings = 512
    tiny_model.save_pretrained(out / "model")
    chat_tokenizer.save_pretrained(out / "model")
    (out / "data").mkdir()
    (out / "data" / "heldout.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    records = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 60)]
    (out / "data" / "train.json").write_text(json.dumps(records))
    monkeypatch.setattr(demo, "pydoc_data", lambda directory: None)
    monkeypatch.setattr(demo, "peak_mib", lambda: 1.0)
    monkeypatch.setattr(loop, "resolve_precision", lambda precision: "fp32")
    monkeypatch.setattr(demo, "_in_a_process", lambda arguments: demo.main(arguments))
    assert demo.main(["--out", str(out), "--steps", "4"]) == 0
    printed, shown = capsys.readouterr()
    assert "all measured in float32 without autocast" in printed
    rows = {
        name: line for line in printed.splitlines() for name in ("original", "plain", "edkm, hard", "edkm, packed") if line.startswith(name)
    }
    assert [name for name, line in rows.items() if "float32" in line] == ["plain", "edkm, hard", "edkm, packed"]
    assert "the packed model is equal to the trained one" in printed
    commands = printed.partition("next:\n")[2].splitlines()
    assert len(commands) == 3 and f"edkm generate {out / 'packed'}" in commands[0]
    assert shown.count("perplexity: 1 windows in ") == 6 and "clustered training: 1 steps in " in shown
    reloaded = json.loads((out / "reload.json").read_text())
    (out / "reload.json").write_text(json.dumps(reloaded | {"perplexity": 0.0}))
    monkeypatch.setattr(demo, "_in_a_process", lambda arguments: None)
    assert demo.main(["--out", str(out), "--steps", "4"]) == 1  # what was written is not what was trained
    assert "NOT EQUAL" in capsys.readouterr().out


def test_an_error_of_the_demonstration_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(directory):
        raise OSError("no package index")

    monkeypatch.setattr(demo, "save_smollm2", fail)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "edkm: error: no package index"


def test_commands_show_progress_and_print_results_apart(packed_dir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    assert main(["eval", str(packed_dir), "--text", str(text), "--window", "32", "--json"]) == 0
    printed, shown = capsys.readouterr()
    assert json.loads(printed)["windows"] > 1 and "perplexity: " in shown and "windows in " in shown
    assert main(["unpack", str(packed_dir), "--out", str(tmp_path / "dense")]) == 0
    printed, shown = capsys.readouterr()
    assert printed == f"wrote {tmp_path / 'dense'}\n" and "writing: " in shown
