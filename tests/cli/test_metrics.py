"""`metrics.json`.

1. `edkm compress` leaves the settings, sizes, losses, times, peaks and perplexities of the run in `metrics.json`, which is strict JSON.
2. Its perplexities are those of `edkm eval`; its histograms are of the original, the fitted and the packed weights.
3. An interrupted run that is resumed has one record; a run that died makes it "partial"; a training that diverged is an error.
4. Metrics that cannot be read, or are of other weights, prevent neither report, inspect nor loading: the reason is shown.
"""

import json
import math
import re

import pytest
import torch
from pages import arguments, change

import edkm
from edkm import metrics
from edkm.cli import main
from edkm.compressed import pretrained
from edkm.compressed.checkpoint import read as read_packed
from edkm.compressed.checkpoint import summary
from edkm.metrics import BINS, REACH, Recorder, chosen, describe
from edkm.report import page


def test_compress_leaves_metrics_and_a_page(places, tiny_dir):
    packed = places / "packed"
    content = json.loads((packed / "metrics.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    found, reason = metrics.read(packed)
    assert content.keys() == found.keys() == metrics._SHAPE.keys() and reason == ""
    assert found["model"] == tiny_dir.name and found["lost_runs"] == 0
    assert {"clustered training", "writing"} < {phase["name"] for phase in found["phases"]}
    assert all(phase["seconds"] > 0 and phase["peak_mib"] > 50 for phase in found["phases"])
    plain, clustered = found["losses"]
    assert plain["first_step"] == 0 and clustered["first_step"] == plain["points"][-1][0] > 0
    assert clustered["first_step"] + clustered["points"][-1][0] == 8
    assert [(s["model"], s["text"]) for s in found["perplexities"]] == [("original", "held <out>.txt"), ("packed", "held <out>.txt")]
    assert found["sizes"] == {key: summary(packed)[key] for key in metrics._SIZES}
    assert (packed / "report.html").read_text() == page(packed)
    assert not (packed / "training").exists()


def test_perplexities_are_those_of_eval(places, tiny_dir, capsys):
    for score, model in zip(metrics.read(places / "packed")[0]["perplexities"], (tiny_dir, places / "packed"), strict=True):
        capsys.readouterr()
        assert main(["eval", str(model), "--text", str(places / "held <out>.txt"), "--window", "64", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(score["perplexity"], rel=1e-6)


def test_histograms_are_of_the_weights_before_and_after(places, tiny_dir):
    from edkm.models import load_model

    original = dict(load_model(tiny_dir)[0].named_parameters())
    packed = read_packed(places / "packed").frozen
    histograms = metrics.read(places / "packed")[0]["histograms"]
    assert len(histograms) == 4 and len({h["name"].split(".", 3)[3] for h in histograms}) == 4
    for h in histograms:
        assert [panel["when"] for panel in h["panels"]] == ["original", "fitted", "trained"]
        lut = packed[h["name"]].lut
        assert h["tables"] == len(lut)
        before, fitted, trained = h["panels"]
        assert before["centroids"] == [] and before["counts"] == describe(original[h["name"]].bfloat16(), len(lut))["counts"]
        for panel in (before, fitted, trained):
            assert sum(panel["counts"]) + panel["outside"] == math.prod(packed[h["name"]].shape)
        assert fitted["counts"] != before["counts"] and trained["counts"] != fitted["counts"]
        assert len(fitted["centroids"]) == len(trained["centroids"]) == lut.shape[1]


def test_a_histogram_is_in_units_of_each_table():
    weight = torch.cat([torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([[100.0, -100.0, 100.0, -100.0]])])
    lut = torch.tensor([[[-1.0], [1.0]], [[-100.0], [50.0]]]).half()
    found = describe(weight, 2, lut)
    bins = {i: count for i, count in enumerate(found["counts"]) if count}
    assert sum(bins.values()) == 8 and len(bins) == 2 and found["outside"] == 0
    assert sorted(round(-REACH + (i + 0.5) * 2 * REACH / BINS) for i in bins) == [-1, 1]
    assert found["centroids"] == [[-1.0, -1.0, -1.0], [0.625, 0.75, 0.875]]
    assert describe(weight, 1, torch.zeros(1, 4, 2))["centroids"] == []  # vectors
    wide = torch.zeros(1, 1000)
    wide[0, :2] = torch.tensor([30.0, -30.0])
    assert describe(wide, 1)["outside"] == 2


def test_drawn_weights_are_of_several_kinds_and_depths():
    names = [f"model.layers.{i}.{kind}.weight" for i in range(30) for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    expected = ["0.q", "10.v", "19.gate", "29.down"]
    assert chosen(names) == [f"model.layers.{name}.weight" for name in expected]
    assert chosen(["0.weight", "2.weight"]) == ["0.weight", "2.weight"] and chosen(["fc.weight"]) == ["fc.weight"] and chosen([]) == []


def test_a_resumed_run_has_one_record(tmp_path):
    path = tmp_path / "metrics.json"
    first = Recorder(path, {"model": "some/model", "lr": 1.0})
    first.phase("fine-tuning", 2.0)
    first.losses("fine-tuning", 0, [(1, 3.0)], interrupted=True)
    second = Recorder(path, {"model": "some/model", "lr": 1.0})
    second.measure("original", {"text": "a.txt", "perplexity": math.inf})
    second.phase("fine-tuning", 1.0)
    second.losses("fine-tuning", 0, [(1, 3.0), (2, math.nan)], interrupted=False)
    third = Recorder(path, {"model": "some/model", "lr": 1.0})  # the second ended without saying that it was interrupted
    assert second.content["lost_runs"] == 0 and third.content["lost_runs"] == 1 and third.measured("original")
    assert third.content["model"] == "model" and not third.measured("packed")
    assert third.content["phases"][0]["seconds"] == 3.0 and len(third.content["losses"]) == 1
    assert json.loads(path.read_text())["losses"][0]["points"] == [[1, 3.0], [2, "nan"]]
    assert not Recorder(tmp_path / "none" / "metrics.json", {"model": "m"}).path.exists()


def test_a_training_that_diverged_is_an_error(places, tiny_dir, tmp_path, monkeypatch, capsys):
    from transformers import LlamaForCausalLM

    forward, steps = LlamaForCausalLM.forward, []

    def spoilt(self, *args, **options):
        found = forward(self, *args, **options)
        steps.extend([1] * self.training)
        if self.training and len(steps) > 2 and found.loss is not None:
            found.loss = found.loss * math.nan
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", spoilt)
    assert main(arguments(tiny_dir, places, tmp_path / "out", "--steps", "4")) == 1
    assert "the training diverged, its last loss is nan" in capsys.readouterr().err
    losses = json.loads((tmp_path / "out" / "training" / "metrics.json").read_text())["losses"]
    assert losses[0]["points"][-1][1] == "nan"


def test_metrics_go_with_their_weights_and_other_readers_ignore_them(copy, tiny_model, tmp_path):
    pretrained.load(copy)
    pretrained.unpack(copy, tmp_path / "dense")
    left = {path.name for path in (tmp_path / "dense").iterdir()}
    assert "tokenizer.json" in left and not left & {"metrics.json", "report.html"}
    edkm.prepare(tiny_model, edkm.ClusterConfig())
    edkm.save(tiny_model, copy)
    assert metrics.read(copy) == (None, "no metrics.json here; edkm compress writes one") and not (copy / metrics.PAGE).exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda c: c.pop("phases"), "phases is missing"),
        (lambda c: c.update(extra=1), "extra is unknown"),
        (lambda c: c.update(metrics_version=2), "is of version 2, this edkm reads 1"),
        (lambda c: c["phases"][1].update(seconds="long"), "phases: 1: seconds: expected float, got 'long'"),
        (lambda c: c["histograms"][0]["panels"][0]["counts"].append(-1), "expected int, got -1"),
        (lambda c: c.update(histograms={}), "histograms: expected a list, got {}"),
        (lambda c: c["phases"][0].update(seconds=10**400), "phases: 0: seconds: expected float, got 1000"),
        (lambda c: c["perplexities"].append({"model": "packed"}), "perplexities: 2: nll is missing"),
        (lambda c: c["settings"].update(a=[1]), "settings: a: expected str, int, float, bool, None, got [1]"),
        (lambda c: c.update(weights="0" * 64), "belongs to other weights"),
        (lambda c: c.update({"\x1b[2J": 1}), "\\x1b[2J is unknown"),
    ],
)
def test_metrics_that_cannot_be_read_are_explained(copy, spoil, reason, capsys):
    change(copy, "metrics.json", spoil)
    assert reason in metrics.read(copy)[1].replace("\x1b", "\\x1b")
    assert main(["inspect", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "run        not shown: metrics.json" in printed and reason in printed and printed.replace("\n", "").isprintable()
    assert "were not recorded: metrics.json" in page(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metrics_version": 1, "x": NaN}', "[" * 100_000])
def test_metrics_that_are_no_json_are_explained(copy, text, capsys):
    (copy / "metrics.json").write_text(text)
    assert main(["inspect", str(copy)]) == 0
    assert re.search(r"not shown: .*metrics\.json: ", capsys.readouterr().out)
    pretrained.load(copy)
