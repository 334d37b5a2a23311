"""`python -m benchmarks small-model` and `budget`.

1. Text that is held out is in neither of the texts that are trained on, though a package has a copy of it.
2. The small model is trained, saved and scored; what is there is not made again.
3. Every kind of row spends its budget from one start: plain, fitted, clustered, by layer, tables, towards the start's predictions.
4. A row starts when the controls that it starts from are there; rows that make no sense are left out.
5. The table gives the distance from the control of the same budget; the chart has a panel for each form.
"""

import json
import math
from argparse import Namespace

import pytest

from benchmarks import budget, small_model
from benchmarks.budget import chart, rows
from benchmarks.budget.rows import ROWS, STEP_TOKENS, Spec


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A model that has seen two steps of a few packages."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_model, "PRETRAINING", ("filelock", "packaging"))
        patch.setattr(small_model, "FINETUNING", ("idna",))
        patch.setattr(small_model, "HELDOUT", {"same": ("certifi",), "other": ("markupsafe",)})
        patch.setattr(small_model, "score", lambda *_: 1.0)
        small_model.main(["--out", str(folder), "--tokens", str(2 * 4 * small_model.WINDOW), "--batch", "4"])
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(rows, "START_TOKENS", STEP_TOKENS)
    monkeypatch.setattr(rows, "CALIBRATION_BLOCKS", 4)
    monkeypatch.setattr(rows, "score", lambda model, out, text: small_model.score(model, out, text, windows=2))


def test_heldout_text_is_not_trained_on(tmp_path, monkeypatch):
    for package in ("one", "two"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "copied.py").write_text("copied = 1\n" * 100)
        (tmp_path / package / "own.py").write_text(f"{package} = 2\n" * 100)
    monkeypatch.setattr(small_model, "_folder", lambda package: tmp_path / package)
    monkeypatch.setattr(small_model, "HELDOUT", {"same": ("one",)})
    monkeypatch.setattr(small_model, "PRETRAINING", ("two",))
    monkeypatch.setattr(small_model, "FINETUNING", ("one", "two"))
    small_model.make_data(tmp_path / "data")
    found = {path.name: path.read_text() for path in (tmp_path / "data").iterdir()}
    assert "copied" in found["same.txt"] and "one = 2" in found["same.txt"]
    assert "two = 2" in found["pretraining.jsonl"] and "copied" not in found["pretraining.jsonl"]
    assert not found["finetuning.jsonl"].strip()


def test_what_is_there_is_not_made_again(out, monkeypatch):
    losses = json.loads((out / "model" / "losses.json").read_text())
    assert math.isfinite(losses["losses"][-1][1]) and losses["text_tokens"] > 2048
    assert not (out / "pretraining").exists()
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(small_model, "make_tokenizer", None)
    small_model.make_model(Namespace(out=out))
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_every_row_spends_its_budget_from_one_start(out, short, monkeypatch):
    spent = []
    monkeypatch.setattr(rows, "_train", spy(rows._train, spent))
    (out / "rows").mkdir(exist_ok=True)
    first, control = Spec("control", "16", 0, 0, 0.0), Spec("control", "16", 4 * STEP_TOKENS, 0, 1e-3)
    found = {}
    for spec in (
        first,
        control,
        *(Spec(row, "2", 4 * STEP_TOKENS, 0, 1e-3) for row in ("fit", "straight-jsd", "stages", "half", "layers+tables")),
    ):
        spent.clear()
        rows.run(out, spec, out)
        found[spec.row] = json.loads((out / "rows" / f"{spec.name}.json").read_text())
        assert math.isfinite(found[spec.row]["same"])
        bits = found[spec.row]["bits"]
        assert bits == 16 if spec.row == "control" else 2.1 < bits < 2.3
        assert sum(spent) == {"layers": 0, "layers+tables": 0, "fit": 0}.get(spec.row, 4 if spec.tokens else 1), spec.row
    assert len({row["same"] for row in found.values()}) == len(found)


def spy(train, spent):
    def noted(model, blocks, spec, steps, *args, **named):
        spent.append(steps)
        return train(model, blocks, spec, steps, *args, **named)

    return noted


def test_rows_wait_for_what_they_start_from():
    first, control = Spec("control", "16", 0, 0, 0.0), Spec("control", "16", 4096, 1, 1e-3)
    assert Spec("fit", "3", 4096, 1, 1e-3).starts() == [first, control]
    assert Spec("fit", "3", 0, 1, 1e-3).starts() == Spec("soft", "3", 4096, 1, 1e-3).starts() == [first]
    kept = [row for row in ROWS if Spec(row, "2", 0, 0, 1e-3).exists()]
    assert kept == ["gptq", "autoround", "fit"]
    assert not Spec("gptq", "q2_k", 4096, 0, 1e-3).exists() and not Spec("stages", "4", 4096, 0, 1e-3).exists()
    assert Spec.parse(control.name) == control


def test_table_and_chart_name_the_control(tmp_path):
    found = [
        {"row": row, "form": form, "tokens": 4096, "seed": 0, "lr": 1e-3, "same": same, "other": 9.0, "seconds": 1.0, "peak_mib": 1.0}
        for row, form, same in (("control", "16", 2.0), ("fit", "3", 2.0 * math.e))
    ]
    line = next(line for line in budget.table(found).splitlines() if line.startswith("fit"))
    assert line.split()[-3] == "1.000"
    chart.draw(tmp_path / "chart.svg", found)
    drawn = (tmp_path / "chart.svg").read_text()
    assert "3 bits" in drawn and "control" in drawn and "fit" in drawn
