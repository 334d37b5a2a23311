"""Guarantees of the progress display:

1. On a terminal one line shows the phase, the count, the time left and a note; one line stays at the end.
2. In a file or pipe a line comes at the start, each half minute, and at the end.
3. Functions that a program calls, and ranks other than the first, are silent; results are printed apart from progress.
4. A stderr that is closed or full, or an error within a phase, does no further harm.
5. Training and the demonstration show their phases; what transformers shows is left as it was.
"""

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
    """A stderr that is a terminal of unknown size."""

    def isatty(self):
        return True

    def lines(self):
        """Return the screen at the end: a carriage return starts the line again."""
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
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_function_that_a_program_calls_is_silent():
    with on_a_terminal() as terminal, progress.progress("fit", 2, "weights") as advance:
        advance()
    assert terminal.getvalue() == ""


def test_a_terminal_shows_one_line_of_progress_and_keeps_one_at_the_end(clock):
    with on_a_terminal() as terminal, progress.shown(), progress.progress("fit", 4, "weights") as advance:
        advance(0, "loss 3.5")
        assert terminal.getvalue().rstrip().endswith("left, loss 3.5")  # as soon as it is known
        for _ in range(4):
            advance(note="loss 2.5")
    drawn = terminal.getvalue()
    assert "fit   0%|" in drawn and "0/4 weights" in drawn and " left" in drawn
    assert terminal.lines() == ["fit: 4 weights in 00:00, loss 2.5", ""]


def test_a_file_gets_a_line_at_the_start_each_half_minute_and_at_the_end(clock, capsys):
    with progress.shown(), progress.progress("training", 2000, "steps") as advance:
        for _ in range(100):
            clock[0] += 1.0
            advance(20, note="loss 2.5")
    # Steps of before an interruption count, but not for the time left.
    with progress.shown(), progress.progress("training", 60, "steps", done=20) as advance:
        clock[0] += 40.0
        advance(20)
    assert capsys.readouterr().err.splitlines() == [
        "training: 0 of 2,000 steps, 00:00, ? left",
        "training: 600 of 2,000 steps, 00:30, 01:10 left, loss 2.5",
        "training: 1,200 of 2,000 steps, 01:00, 00:40 left, loss 2.5",
        "training: 1,800 of 2,000 steps, 01:30, 00:09 left, loss 2.5",
        "training: 2,000 steps in 01:40, loss 2.5",
        "training: 20 of 60 steps, 00:00, ? left",
        "training: 40 of 60 steps, 00:40, 00:40 left",
        "training: 40 of 60 steps in 00:40",
    ]


def test_work_of_unknown_length_is_named_and_leaves_nothing_on_a_terminal(capsys):
    with on_a_terminal() as terminal, progress.shown(), progress.progress("loading x") as advance:
        advance()
    assert "loading x, 00:00" in terminal.getvalue() and terminal.lines() == [""]
    with progress.shown(), progress.progress("loading x"):
        pass
    assert capsys.readouterr().err == "loading x, 00:00\n"


def test_an_error_ends_the_line_and_the_phase_is_not_reported_as_done(capsys):
    def fail():
        with progress.shown(), progress.progress("fit", 2, "weights") as advance:
            advance()
            raise ValueError("broken")

    with on_a_terminal() as terminal, pytest.raises(ValueError, match="broken"):
        fail()
    assert terminal.lines() == [""]
    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capsys.readouterr().err == "fit: 0 of 2 weights, 00:00, ? left\n"


def test_phases_nest_and_lines_appear_above_them(capsys):
    def work():
        with progress.shown(), progress.progress("outer", 2) as outer:
            outer()
            with progress.progress("inner", 1) as inner:
                inner()
            progress.say("a line")
            outer()

    with on_a_terminal() as terminal:
        work()
    drawn = [line.strip() for line in terminal.getvalue().replace("\x1b[A", "").replace("\r", "\n").split("\n")]
    work()
    for lines in (drawn, capsys.readouterr().err.splitlines()):
        assert {"inner: 1 in 00:00", "a line", "outer: 2 in 00:00"} <= {*lines}


@pytest.mark.parametrize("stream", [None, "closed", "full"])
def test_without_a_stderr_the_work_goes_on(stream):
    class Full(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    broken = {None: None, "closed": io.StringIO(), "full": Full()}[stream]
    if stream == "closed":
        broken.close()
    done = []
    with redirect_stderr(broken), progress.shown(), progress.progress("fit", 2) as advance:
        for number in range(2):
            advance()
            done.append(number)
    assert done == [0, 1]


def test_only_the_first_rank_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, last in ((0, "fit: 1 in 00:00"), (1, None)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with progress.shown(), progress.progress("fit", 1) as advance:
            advance()
        assert ([None, *capsys.readouterr().err.splitlines()])[-1] == last


def test_importing_edkm_brings_no_tqdm():
    code = "import sys, edkm.progress, edkm.cli; print('tqdm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def blocks(count, vocabulary=300):
    ids = torch.randint(vocabulary, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_training_leaves_transformers_as_it_was(tiny_model, tmp_path, capsys):
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loop.train(tiny_model, blocks(4), loop.TrainSettings(steps=2, lr=1e-3, batch=1, precision="fp32"), tmp_path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_the_callback_shows_its_phases_unless_the_trainer_shows_no_bars(tiny_model, tmp_path, capsys, quiet):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, disable_tqdm=quiet, report_to=[], use_cpu=True, save_strategy="no"
    )
    callback = edkm.Callback(tmp_path / "packed", edkm.ClusterConfig(rows_per_lut=16), plain_share=0.5)
    transformers.Trainer(tiny_model, arguments, train_dataset=blocks(8), callbacks=[callback]).train()
    shown = capsys.readouterr().err
    assert ("fit: 14 weights in " in shown) == ("writing: " in shown) == (not quiet)
    assert clusterings(tiny_model)


def test_the_demonstration_ends_with_precisions_and_commands_to_try(tmp_path, tiny_model, chat_tokenizer, capsys, monkeypatch):
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
    names = ("original", "plain", "edkm, hard", "edkm, packed")
    measured = [name for line in printed.splitlines() for name in names if line.startswith(name) and "float32" in line]
    assert measured == ["plain", "edkm, hard", "edkm, packed"]
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
