"""`python -m benchmarks compare`.

1. Every method has a row with bits, size, perplexity, time and peak; each checkpoint is quantized as its row says, or refused.
2. Stages run in their own processes and are not repeated; other settings are refused; a method that fails is reported in the table.
   The table has every row that was ever made; tasks are scored later, of all methods or of some.
3. Mistakes are named before anything is made.
"""

import contextlib
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from baselines import BASELINES, needs_baselines
from safetensors.torch import load_file

from benchmarks.compare import command, making, stage, table
from benchmarks.compare.command import main
from benchmarks.compare.dense import embedding_weights, linear_weights
from benchmarks.compare.plot import plot
from benchmarks.compare.rtn import most_distinct
from edkm.models import load_model

RECORDS = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 40)]
MADE_HERE = ("rtn", "llm-qat", "dkm", "edkm")
FROM_CONTROL = ("control+gptq", "control+autoround")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.json").write_text(json.dumps(RECORDS))
    (folder / "heldout.txt").write_text(" ".join(map(str, range(100))))
    return folder


def arguments(tiny_dir, files, out, *more):
    data = ["--data", str(files / "train.json"), "--text", str(files / "heldout.txt"), "--out", str(out)]
    small = ["--steps", "2", "--block-tokens", "48", "--window", "64", "--max-windows", "3", "--precision", "fp32"]
    return [str(tiny_dir), *data, *small, *more]


def in_this_process(words, log):
    """Run a stage here, to save its imports."""
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return stage.main(words)


@pytest.fixture
def here(monkeypatch):
    """Stages run in this process; the list of those that ran."""
    ran = []
    monkeypatch.setattr(command, "_process", lambda words, log: ran.append(tuple(words[1:3])) or in_this_process(words, log))
    return ran


@pytest.fixture(scope="module")
def compared(tiny_dir, files, tmp_path_factory):
    """A comparison of everything that needs no other environment. Shared: do not write there."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_process", in_this_process)
        assert main(arguments(tiny_dir, files, out, "--methods", ",".join(MADE_HERE))) == 0
    return out


def rows_of(out):
    return {row["method"]: row for row in json.loads((out / "table.json").read_text())["rows"]}


def test_every_row_is_there_with_its_figures(compared):
    rows = rows_of(compared)
    assert list(rows) == ["original", "control", *MADE_HERE]
    for row in rows.values():
        assert row["error"] is None and row["perplexity"] > 1 and row["texts"]["heldout"]["windows"] == 3 and row["peak_mib"] > 0
    assert rows["original"]["linear_bits"] == rows["control"]["total_bits"] == 16
    assert rows["control"]["perplexity"] != rows["original"]["perplexity"]
    assert rows["rtn"]["linear_bits"] == 3 + (16 + 3) / 64
    for name in MADE_HERE:
        assert 3 < rows[name]["linear_bits"] <= rows["rtn"]["linear_bits"]
        assert rows[name]["bytes"] < rows["original"]["bytes"] / 2
    packed = sum(path.stat().st_size for path in (compared / "edkm" / "checkpoint").glob("*.safetensors"))
    assert rows["edkm"]["bytes"] == packed


@pytest.mark.parametrize(("name", "block", "most"), [("rtn", (1, 64), 8), ("llm-qat", (1, 0), 7), ("dkm", (0, 0), 8)])
def test_each_row_is_quantized(compared, name, block, most):
    model, _ = load_model(compared / name / "checkpoint")
    weights = linear_weights(model)
    assert len(weights) == 14
    for weight in weights.values():
        height, width = block[0] or weight.shape[0], block[1] or weight.shape[1]
        for top in range(0, weight.shape[0], height):
            for left in range(0, weight.shape[1], width):
                values = weight.detach()[top : top + height, left : left + width].unique()
                assert len(values) <= most
    assert max(most_distinct(w, *block) for w in weights.values()) == rows_of(compared)[name]["most_distinct"] <= most
    (embedding,) = embedding_weights(model).values()
    assert all(len(row.unique()) <= 256 for row in embedding.detach())
    original, _ = load_model(compared / "original" / "checkpoint")
    assert not torch.equal(dict(original.named_parameters())["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("bits", [2, 4])
def test_there_are_as_many_values_as_the_bits_allow(tiny_dir, files, tmp_path, here, bits):
    assert main(arguments(tiny_dir, files, tmp_path, "--bits", str(bits), "--steps", "1", "--methods", ",".join(MADE_HERE))) == 0
    rows = rows_of(tmp_path)
    most = {"rtn": 2**bits, "llm-qat": 2**bits - 1, "dkm": 2**bits}
    assert {name: rows[name]["most_distinct"] for name in most} == most
    assert all(bits < rows[name]["linear_bits"] <= bits + (16 + bits) / 64 for name in MADE_HERE)


def test_the_packed_row_is_quantized_as_its_file_says(compared):
    tables = json.loads((compared / "edkm" / "make.json").read_text())["tables"]
    model, _ = load_model(compared / "edkm" / "checkpoint")
    for name, weight in linear_weights(model).items():
        rows, most = tables[name]
        assert all(len(part.unique()) <= most for part in weight.detach().split(rows))
    assert len({tuple(table) for table in tables.values()}) > 2  # not all alike
    found = rows_of(compared)["edkm"]
    assert found["target_bpw"] == 3.2 and 3.1 < found["linear_bits"] <= 3.2


def test_a_checkpoint_that_is_not_quantized_is_refused(compared, tmp_path):
    (tmp_path / "rtn").mkdir()
    (tmp_path / "rtn" / "make.json").write_text(json.dumps({"block": [1, 64]}))
    model, _ = load_model(compared / "original" / "checkpoint")
    with pytest.raises(ValueError, match=r"rtn: model\.layers\..* has \d+ distinct values where 8 are allowed"):
        stage.check_quantized(making.Job(tmp_path, "rtn", {"bits": 3}), model)


def test_tables(compared, capsys):
    found = json.loads((compared / "table.json").read_text())
    assert found["settings"]["steps"] == 2 and len(found["notes"]) == 7
    lines = (compared / "table.md").read_text().splitlines()
    assert lines[0] == "| method | bits, linear | bits, all | size | perplexity | making | peak |"
    assert len({line.count("|") for line in lines[:8]}) == 1 and lines[8] == ""
    assert any("heldout.txt" in line for line in lines) and any("8 bits" in line for line in lines)
    score = {"accuracy": 0.251, "accuracy_stderr": 0.0123}
    rows = [{**row, "tasks": {"piqa": score} if row["method"] == "rtn" else {}} for row in found["rows"]]
    rows[3] |= {"perplexity": float("inf"), "texts": {"heldout": {"perplexity": float("inf")}}, "error": "no memory"}
    text = table.as_text(rows, found["notes"])
    assert "25.1 ± 1.2" in text and "(failed)" in text and "llm-qat failed: no memory" in text
    assert json.loads(table.as_json(rows, [], {}))["rows"][3]["perplexity"] == "inf"


def test_plot(compared, tmp_path):
    def words(path):
        return [element.text for element in ElementTree.parse(path).getroot().iter() if element.tag.endswith("}text")]

    assert {*MADE_HERE, "original", "control", "perplexity, heldout"} <= set(words(compared / "plot.svg"))
    rows = list(rows_of(compared).values())
    rows[2]["perplexity"], rows[3]["perplexity"] = 3e7, float("nan")
    plot(tmp_path / "plot.svg", rows, "a<b$.txt$")
    assert "perplexity, a<b$.txt$" in words(tmp_path / "plot.svg") and rows[3]["method"] not in words(tmp_path / "plot.svg")


def test_it_goes_on_where_it_stopped(tiny_dir, files, tmp_path, here, capsys, monkeypatch):
    def make(*more):
        here.clear()
        return main(arguments(tiny_dir, files, tmp_path / "out", "--steps", "0", *more))

    with monkeypatch.context() as broken:
        broken.setitem(making._MAKERS, "rtn", lambda job: (_ for _ in ()).throw(ValueError("no such luck")))
        assert make("--methods", "rtn") == 1
    assert here == [*((name, done) for name in ("original", "control") for done in ("make", "perplexity:heldout")), ("rtn", "make")]
    assert rows_of(tmp_path / "out")["rtn"]["error"] and rows_of(tmp_path / "out")["control"]["perplexity"]
    assert "failed" in capsys.readouterr().err
    assert make("--methods", "rtn") == 0
    assert here == [("rtn", "make"), ("rtn", "perplexity:heldout")]
    assert make("--methods", "rtn", "--baselines", "elsewhere") == 0 and here == []
    assert make("--methods", "rtn,llm-qat") == 0 and here == [("llm-qat", "make"), ("llm-qat", "perplexity:heldout")]
    other = tmp_path / "other.txt"
    other.write_text("one two three " * 100)
    assert make("--methods", "rtn", "--text", str(other)) == 0
    assert here == [(name, "perplexity:other") for name in ("original", "control", "rtn")]
    assert make("--methods", "rtn") == 0 and here == []
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["original", "control", "rtn", "llm-qat"] and list(rows["llm-qat"]["texts"]) == ["heldout"]
    header, original = (tmp_path / "out" / "table.md").read_text().splitlines()[0:3:2]
    assert header.split(" | ")[4:6] == ["perplexity, heldout", "perplexity, other"] and original.count(" | ") == header.count(" | ")
    other.write_text("four")
    assert make("--methods", "rtn", "--text", str(other)) == 1
    assert "texts: the comparison in" in capsys.readouterr().err
    assert make("--methods", "rtn", "--text", str(tmp_path / "heldout.txt")) == 1
    assert make("--methods", "rtn", "--bits", "4") == 1
    assert "bits: the comparison in" in capsys.readouterr().err
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert make("--methods", "rtn", "--bits", "4", "--fresh") == 0 and len(here) == 6
    assert rows_of(tmp_path / "out")["rtn"]["linear_bits"] == 4 + 20 / 64
    assert (tmp_path / "out" / "mine.txt").exists() and not (tmp_path / "out" / "llm-qat").exists()


def test_stages_are_processes_of_their_own(tiny_dir, files, tmp_path):
    """And the first one imports nothing that the next needs."""
    out = tmp_path / "out"
    out.mkdir()
    args = command.parser().parse_args(arguments(tiny_dir, files, out))
    (out / "compare.json").write_text(json.dumps(command.settings_of(args)))
    (out / "original").mkdir()
    assert command._process([str(out), "original", "make"], out / "log") == 0, (out / "log").read_text()
    found = json.loads((out / "original" / "make.json").read_text())
    assert found["dtype"] == "float16" and found["group"] == 64 and found["peak_mib"] > 50
    assert load_file(out / "calibration.safetensors")["input_ids"].shape[1] == 48


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "rtm"], "unknown method 'rtm'. Known are original, control, rtn, smoothquant"),
        (["--methods", "rtn,gptq", "--baselines", "no/python"], "no/python: not found, and gptq need the environment"),
        (["--methods", ","], "name at least one"),
        (["--methods", "rtn", "--lr", "rtn=1"], "--lr rtn=1"),
        (["--methods", "rtn", "--lr", "dkm=fast"], "positive number"),
        (["--methods", "rtn", "--bits", "1"], "--bits: 2 to 8, got 1."),
        (["--methods", "rtn", "--steps", "-1"], "--steps: at least 0, got -1."),
        (["--methods", "rtn", "--autoround-iters", "0"], "--autoround-iters: at least 1, got 0."),
        (["--methods", "rtn", "--score", "gptq"], "--score: gptq is not among --methods."),
        (["--methods", "rtn", "--score", "rtn"], "--score: there is nothing to score."),
    ],
)
def test_mistakes_are_named_before_anything_is_made(tiny_dir, files, tmp_path, capsys, here, more, message):
    assert main(arguments(tiny_dir, files, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err and here == [] and not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_refused(tiny_dir, files, tmp_path, capsys, here):
    (tmp_path / "thing").write_text("")
    for out, message in ((tmp_path, "holds no comparison"), (tmp_path / "thing", "is a file, expected a directory")):
        assert main(arguments(tiny_dir, files, out, "--methods", "rtn")) == 1
        assert message in capsys.readouterr().err and here == []


@needs_baselines
def test_fine_tuning_then_a_library(tiny_dir, files, tmp_path, here):
    out = tmp_path / "out"
    more = ["--methods", ",".join(FROM_CONTROL), "--baselines", str(BASELINES), "--lr", "control=0.01", "--autoround-iters", "2"]
    assert main(arguments(tiny_dir, files, out, *more)) == 0
    rows = rows_of(out)
    models = {name: load_model(out / name / "checkpoint")[0] for name in ("original", "control", *FROM_CONTROL)}
    norms = [name for name, _ in models["control"].named_parameters() if "norm" in name]
    assert any(not torch.equal(models["control"].get_parameter(name), models["original"].get_parameter(name)) for name in norms)
    for made in FROM_CONTROL:
        assert rows[made]["linear_bits"] == 3 + 19 / 64 and 2 < rows[made]["most_distinct"] <= 8 and rows[made]["seconds"] > 0
        assert all(torch.equal(models[made].get_parameter(name), models["control"].get_parameter(name)) for name in norms)
    assert rows["control+autoround"]["iterations"] == 2 and rows["control+autoround"]["precision"] == "fp32"
    assert "2 iterations of each layer" in (out / "table.md").read_text()
    assert main(arguments(tiny_dir, files, out, *more[:-1], "3")) == 1  # some rows depend on it


def failing_library(compared, folder, method, script):
    """Make what a method needs in a folder, and a Python that runs the script and fails."""
    (folder / "original").symlink_to(compared / "original")
    (folder / method).mkdir()
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\nexit 3\n")
    python.chmod(0o755)
    return python


def test_autoround_gets_its_options(compared, tmp_path):
    python = failing_library(compared, tmp_path, "autoround", "echo $@")
    settings = {"bits": 2, "baselines": str(python), "precision": "bf16", "autoround_iters": 50, "autoround_blocks": 4}
    with pytest.raises(ValueError, match=r"run_autoround.py autoround .* --bits 2 .* --iters 50 --precision bf16 --blocks 4 "):
        making.make(making.Job(tmp_path, "autoround", settings))


def test_a_library_that_fails_says_why(compared, tmp_path):
    python = failing_library(compared, tmp_path, "gptq", "echo starting\necho no module named llmcompressor")
    with pytest.raises(ValueError, match=r"gptq: no module named llmcompressor \(all of it: .*library\.log\)"):
        making.make(making.Job(tmp_path, "gptq", {"bits": 3, "baselines": str(python)}))


@pytest.fixture
def scored(monkeypatch):
    """Every task has the same score, without being run; the list of the files that were written."""
    from edkm import tasks

    written = []

    def evaluate(model, tokenizer, names, *, limit):
        assert all(Path(name).is_file() for name in names)
        return {Path(name).stem: tasks.TaskScore(0.5, 0.1, 0.25, float("nan"), limit) for name in names}

    def write(folder, name):
        (folder / f"{name}.yaml").write_text("{}")
        written.append(name)
        return folder / f"{name}.yaml"

    monkeypatch.setattr(tasks, "evaluate_tasks", evaluate)
    monkeypatch.setattr(tasks, "check_installed", lambda: None)
    monkeypatch.setattr("benchmarks.tasks.write", write)
    return written


def test_tasks_are_scored_once_each_and_the_limit_may_change_until_then(tiny_dir, files, tmp_path, here, scored, capsys):
    def compare(*more):
        here.clear()
        return main(arguments(tiny_dir, files, tmp_path / "out", "--methods", "rtn", "--steps", "0", *more))

    assert compare() == compare("--limit", "7", "--tasks", "piqa") == compare("--limit", "7", "--tasks", "piqa,boolq") == 0
    assert here == [(name, "task:boolq") for name in ("original", "control", "rtn")]
    assert scored == ["piqa", "boolq"]
    tasks = rows_of(tmp_path / "out")["rtn"]["tasks"]
    assert tasks["piqa"]["items"] == 7 and tasks["boolq"]["normalised_accuracy_stderr"] == "nan"
    assert "50.0 ± 10.0" in (tmp_path / "out" / "table.md").read_text()
    assert compare("--limit", "8", "--tasks", "piqa") == 1
    assert "limit: the comparison in" in capsys.readouterr().err
    assert compare("--limit", "7", "--tasks", "winogrande,boolq", "--score", "rtn") == 0 and here == [("rtn", "task:winogrande")]
    rows = rows_of(tmp_path / "out")
    assert [set(rows[name]["tasks"]) for name in ("control", "rtn")] == [{"piqa", "boolq"}, {"piqa", "boolq", "winogrande"}]
    assert compare("--limit", "7") == 0 and here == [] and rows_of(tmp_path / "out") == rows
    assert compare("--limit", "7", "--tasks", "none.yaml") == 1 and "'none.yaml' is neither" in capsys.readouterr().err
