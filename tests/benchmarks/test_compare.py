"""What is guaranteed of `python -m benchmarks compare`.

1. Every method has a row with bits, size, perplexity, time and peak; each checkpoint is quantized as its row says, or refused.
2. Stages run in their own processes and are not repeated; other settings are refused; a method that fails is reported in the table.
3. Bits are counted with tables, scales and zero points; round to nearest is the formula, and torchao's.
4. Mistakes are named before anything is made.
"""

import contextlib
import json
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.compare import command, llm_qat, making, stage, table
from benchmarks.compare.command import main
from benchmarks.compare.dense import embedding_weights, inventory, linear_weights
from benchmarks.compare.methods import METHODS, account, budget, chosen, group_size
from benchmarks.compare.plot import plot
from benchmarks.compare.rtn import most_distinct, round_to_nearest, symmetric
from edkm.models import load_model
from edkm.train.prepare import clusterings

RECORDS = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 40)]
MADE_HERE = ("rtn", "llm-qat", "dkm", "edkm")
BASELINES = Path(__file__).resolve().parents[2] / ".venv-baselines" / "bin" / "python"
needs_baselines = pytest.mark.skipif(not BASELINES.is_file(), reason="make baselines was not run")


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


def test_round_to_nearest_is_the_formula():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    for bits, group in ((3, 16), (4, 64), (8, 64)):
        found = round_to_nearest(weight, bits, group)
        for row in range(6):
            for start in range(0, 64, group):
                w = weight[row, start : start + group].double()
                s = ((max(w.max(), 0) - min(w.min(), 0)) / (2**bits - 1)).half().double()
                z = round(float(-min(w.min(), 0) / s))
                expected = ((w / s + z).round().clamp(0, 2**bits - 1) - z) * s
                # A weight half way between two values may go either way.
                wrong = (found[row, start : start + group] - expected).abs() > 1e-6
                assert wrong.sum() == 0 or ((w / s)[wrong].frac().abs() - 0.5).abs().max() < 1e-5
    assert torch.equal(round_to_nearest(torch.zeros(2, 16), 3, 16), torch.zeros(2, 16))
    again = round_to_nearest(weight, 3, 16)
    assert (round_to_nearest(again, 3, 16) - again).abs().max() < 1e-6


def test_symmetric_has_its_largest_value_at_the_end():
    weight = torch.randn(5, 40)
    found = symmetric(weight, 3)
    for row, on_grid in zip(weight, found):
        assert len(on_grid.unique()) <= 7
        step = row.abs().max() / 3
        assert (on_grid - row).abs().max() <= step / 2 * 1.01 and torch.isclose(on_grid.abs().max(), row.abs().max(), rtol=1e-3)


def test_bits_and_distinct_values_are_counted():
    model = {"linear": [(4, 128), (8, 64)], "embeddings": [(10, 64)], "other": 100}
    rtn = account(METHODS["rtn"], 3, 64, model)
    assert rtn["linear_bits"] == 3 + 19 / 64
    assert rtn["bytes"] == (1024 * 3 + 16 * 19 + 640 * 8 + 10 * 24 + 1600) / 8
    assert account(METHODS["llm-qat"], 3, 64, model)["linear_bits"] == 3 + 12 * 16 / 1024
    assert account(METHODS["original"], 3, 64, model) == {"linear_bits": 16, "total_bits": 16, "bytes": 2 * (1024 + 640 + 100)}
    assert budget(3, 64) == 3.2 and budget(4, 64) == 4.3 and budget(2, 128) == 2.1
    weight = torch.arange(24.0).view(4, 6) // 2
    assert [most_distinct(weight, *block) for block in ((1, 0), (1, 3), (2, 0), (0, 0), (0, 2))] == [3, 2, 6, 12, 4]


def test_groups_divide_every_layer_and_the_16_bit_models_are_always_there():
    assert group_size([576, 1536]) == 64 and group_size([4096, 11008]) == 128
    with pytest.raises(ValueError, match="has 100 columns"):
        group_size([64, 100])
    assert chosen(["edkm", "rtn"]) == ["original", "control", "rtn", "edkm"]


def test_what_is_quantized(tiny_model):
    found = inventory(tiny_model)
    assert len(found["linear"]) == 14 and found["embeddings"] == [(300, 64)] and found["other"] == 5 * 64
    assert all(".layers." in name for name in linear_weights(tiny_model))


def test_dkm_has_an_absolute_temperature(tiny_model):
    from benchmarks.compare.dkm import config, prepare_dkm

    prepare_dkm(tiny_model, config(tiny_model, 3))
    found = [clustering for _, _, clustering in clusterings(tiny_model)]
    assert len(found) == 15 and all(c.tables == 1 and c.importance is None for c in found)
    tiny_model.train()
    tiny_model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    assert all(torch.equal(c.current_temperature(), torch.full((1,), 1e-4)) for c in found)


def test_llm_qat_writes_its_own_text(tiny_model):
    texts = llm_qat.write_texts(tiny_model, 3, 20, seed=1)
    assert texts.input_ids.shape == (3, 20) and len(texts) == 3
    assert torch.equal(texts.input_ids, llm_qat.write_texts(tiny_model, 3, 20, seed=1).input_ids)
    with torch.no_grad():
        expected = tiny_model(input_ids=texts.input_ids[:, :4]).logits.argmax(-1)
    assert torch.equal(texts.input_ids[:, 1:5], expected)
    weights = {name: w.detach().clone() for name, w in linear_weights(tiny_model).items()}
    llm_qat.quantize(tiny_model, 3)
    tiny_model(input_ids=texts.input_ids).logits.square().sum().backward()
    assert tiny_model.model.layers[0].mlp.up_proj.parametrizations.weight.original.grad.abs().sum() > 0
    llm_qat.settle(tiny_model, 3)
    for name, weight in linear_weights(tiny_model).items():
        assert torch.equal(weight, symmetric(weights[name], 3))


@needs_baselines
def test_round_to_nearest_is_torchaos(tmp_path):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).half().float()
    script = (
        "import sys, torch\nfrom torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_\n"
        "layer = torch.nn.Linear(128, 32, bias=False)\nlayer.weight.data = torch.load(sys.argv[1])\n"
        "quantize_(layer, IntxWeightOnlyConfig(torch.int3, PerGroup(64), MappingType.ASYMMETRIC))\n"
        "torch.save(layer.weight.dequantize(), sys.argv[1])\n"
    )
    torch.save(weight, tmp_path / "weight.pt")
    subprocess.run([str(BASELINES), "-c", script, str(tmp_path / "weight.pt")], check=True, capture_output=True)
    ours, theirs = round_to_nearest(weight, 3, 64), torch.load(tmp_path / "weight.pt")
    # Our scale is rounded to float16; a few weights near half way go to the other side for that.
    assert ((ours - theirs).abs() > 1e-3 * weight.abs().max()).float().mean() < 0.005
    assert abs(float((ours - weight).square().mean() / (theirs - weight).square().mean()) - 1) < 2e-3


@needs_baselines
@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_baselines_are_quantized(tiny_dir, tmp_path, method):
    runner = making._RUNNER
    save_file({"input_ids": torch.randint(0, 280, (4, 32))}, tmp_path / "ids.safetensors")
    words = ["--model", tiny_dir, "--calibration", tmp_path / "ids.safetensors", "--bits", 3, "--group", 32, "--skip", "lm_head"]
    command_line = [str(word) for word in (BASELINES, runner, method, *words, "--out", tmp_path)]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, before = load_file(tmp_path / "weights.safetensors"), load_file(tiny_dir / "model.safetensors")
    quantized = json.loads((tmp_path / "figures.json").read_text())["quantized"]
    assert set(found) == set(before) and len(quantized) == 14
    for name in quantized:
        assert 2 < most_distinct(found[name], 1, 32) <= 8
        assert most_distinct(before[name], 1, 32) == 32
    assert torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@needs_baselines
def test_fine_tuning_then_gptq(tiny_dir, files, tmp_path, here):
    out = tmp_path / "out"
    more = ["--methods", "control+gptq", "--baselines", str(BASELINES), "--lr", "control=0.01"]
    assert main(arguments(tiny_dir, files, out, *more)) == 0
    row = rows_of(out)["control+gptq"]
    assert row["linear_bits"] == 3 + 19 / 64 and 2 < row["most_distinct"] <= 8 and row["seconds"] > 0
    (ours, _), (control, _) = (load_model(out / name / "checkpoint") for name in ("control+gptq", "control"))
    original, _ = load_model(out / "original" / "checkpoint")
    names = [name for name, _ in ours.named_parameters() if "norm" in name]
    for name in names:
        assert torch.equal(ours.get_parameter(name), control.get_parameter(name))
    assert any(not torch.equal(ours.get_parameter(name), original.get_parameter(name)) for name in names)


def test_a_library_that_fails_says_why(compared, tmp_path):
    (tmp_path / "original").symlink_to(compared / "original")
    (tmp_path / "gptq").mkdir()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho starting\necho no module named llmcompressor\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match=r"gptq: no module named llmcompressor \(all of it: .*library\.log\)"):
        making.make(making.Job(tmp_path, "gptq", {"bits": 3, "baselines": str(python)}))


@pytest.fixture
def scored(monkeypatch):
    """Every task has the same score, without being run."""
    from edkm import tasks

    def evaluate(model, tokenizer, names, *, limit):
        return {name: tasks.TaskScore(0.5, 0.1, 0.25, float("nan"), limit) for name in names}

    monkeypatch.setattr(tasks, "evaluate_tasks", evaluate)
    monkeypatch.setattr(tasks, "check_tasks", lambda names, *, limit: None)


def test_tasks_are_scored_once_each_and_the_limit_may_change_until_then(tiny_dir, files, tmp_path, here, scored, capsys):
    def compare(*more):
        here.clear()
        return main(arguments(tiny_dir, files, tmp_path / "out", "--methods", "rtn", "--steps", "0", *more))

    assert compare() == compare("--limit", "7", "--tasks", "piqa") == compare("--limit", "7", "--tasks", "piqa,boolq") == 0
    assert here == [(name, "task:boolq") for name in ("original", "control", "rtn")]
    tasks = rows_of(tmp_path / "out")["rtn"]["tasks"]
    assert tasks["piqa"]["items"] == 7 and tasks["boolq"]["normalised_accuracy_stderr"] == "nan"
    assert "50.0 ± 10.0" in (tmp_path / "out" / "table.md").read_text()
    assert compare("--limit", "8", "--tasks", "piqa") == 1
    assert "limit: the comparison in" in capsys.readouterr().err
