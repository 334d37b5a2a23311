"""`edkm report`: the record that a run leaves, the page that is made of it, and how the page looks in a browser."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import browser
import pytest
import torch
from test_compress import RECORDS, arguments
from test_package import SOURCE, files_of, refuse, within

import edkm
from edkm.cli import main
from edkm.compressed import pretrained
from edkm.compressed.checkpoint import read as read_packed
from edkm.compressed.checkpoint import summary
from edkm.report import charts, record
from edkm.report.histogram import BINS, REACH, chosen, describe
from edkm.report.page import page as page_of
from edkm.report.page import report
from edkm.report.subject import look_at, place_of, with_scores
from edkm.report.svg import ticks
from edkm.train import loop

EVIL = "<script>alert('x')</script>&\""
MORE = ("--steps", "6", "--plain-steps", "3", "--lr", "1e-3")


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_dir):
    """Data, a held-out text, and a run that was recorded, perplexity and all. Shared: do not write there."""
    root = tmp_path_factory.mktemp("report")
    data, text = root / "train.json", root / "held <out>.txt"
    data.write_text(json.dumps(RECORDS))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    assert main(arguments(tiny_dir, data, root / "packed", *MORE, "--eval-text", str(text))) == 0
    return root


@pytest.fixture
def copy(places, tmp_path):
    """The recorded directory, to be spoilt."""
    out = tmp_path / "copy"
    out.mkdir()
    for path in (places / "packed").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def words_of(page):
    """What a reader sees, one piece of text a line."""
    return re.sub(r"<[^>]+>", "\n", re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.S))


def test_a_record_goes_with_the_weights_it_is_of(copy, tiny_model):
    edkm.prepare(tiny_model, edkm.ClusterConfig())
    edkm.save(tiny_model, copy)
    assert record.read(copy) is None and not (copy / record.PAGE).exists()
    assert summary(copy)["clustered_bits_per_weight"] > 3


def test_compress_leaves_a_record_and_a_page(places, tiny_dir):
    packed = places / "packed"
    found = record.read(packed)
    assert found["model"] == tiny_dir.name and found["lost_runs"] == 0
    assert [phase["name"] for phase in found["phases"]] == ["plain fine-tuning", "calibration and fit", "clustered training", "writing"]
    assert all(phase["seconds"] > 0 and phase["peak_mib"] > 50 for phase in found["phases"])
    plain, clustered = found["losses"]
    assert (plain["first_step"], clustered["first_step"]) == (0, 3)
    assert [step for step, _ in plain["points"]] == [step for step, _ in clustered["points"]] == [1, 2, 3]
    assert found["settings"]["optimizer steps"] == 6 and found["settings"]["of these plain"] == 3
    assert [(s["model"], s["text"]) for s in found["scores"]] == [("original", "held <out>.txt"), ("packed", "held <out>.txt")]
    assert (packed / "report.html").read_text() == report(packed)
    assert not (packed / "training").exists()


def test_the_perplexities_of_the_record_are_those_of_eval(places, tiny_dir, capsys):
    for score, model in zip(record.read(places / "packed")["scores"], (tiny_dir, places / "packed"), strict=True):
        capsys.readouterr()
        assert main(["eval", str(model), "--text", str(places / "held <out>.txt"), "--window", "64", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(score["perplexity"], rel=1e-6)


def test_recorded_weights_are_the_model_s(places, tiny_dir):
    from edkm.models import load_model

    original = dict(load_model(tiny_dir)[0].named_parameters())
    packed = read_packed(places / "packed").frozen
    layers = record.read(places / "packed")["layers"]
    assert len(layers) == 4 and len({layer["name"].split(".", 3)[3] for layer in layers}) == 4
    for layer in layers:
        assert [panel["when"] for panel in layer["panels"]] == ["original", "fitted", "trained"]
        lut = packed[layer["name"]].lut
        assert layer["tables"] == len(lut)
        before, fitted, trained = layer["panels"]
        assert before["centroids"] == [] and before["counts"] == describe(original[layer["name"]].bfloat16(), len(lut))["counts"]
        for panel in (before, fitted, trained):
            assert sum(panel["counts"]) + panel["outside"] == math.prod(packed[layer["name"]].shape)
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


def test_the_weights_drawn_are_of_several_kinds_and_depths():
    names = [f"model.layers.{i}.{kind}.weight" for i in range(30) for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    assert chosen(names) == [
        "model.layers.0.q.weight",
        "model.layers.10.v.weight",
        "model.layers.19.gate.weight",
        "model.layers.29.down.weight",
    ]
    assert chosen(["0.weight", "2.weight"]) == ["0.weight", "2.weight"] and chosen(["fc.weight"]) == ["fc.weight"] and chosen([]) == []
    assert place_of("model.layers.3.mlp.experts.7.up_proj.weight") == (3, "model.layers.mlp.experts.up_proj")
    assert place_of("3.weight") == (3, "weight") and place_of("0.fc.weight") == (0, "fc")
    assert place_of("lm_head.weight") is None


def test_every_weight_has_a_place_and_a_name_of_its_own():
    names = [
        "model.visual.blocks.3.mlp.gate_proj.weight",
        "model.language_model.layers.3.mlp.gate_proj.weight",
        "model.language_model.layers.3.mlp.shared_expert.gate_proj.weight",
        "model.language_model.layers.3.self_attn.q_proj.weight",
        "encoder.block.3.layer.0.SelfAttention.q.weight",
        "decoder.block.3.layer.0.SelfAttention.q.weight",
        "h.3.mlp.0.weight",
        "h.3.mlp.2.weight",
    ]
    places = [place_of(name) for name in names]
    assert len(set(places)) == len(names) and {layer for layer, _ in places} == {3}
    assert list(charts.labels([kind for _, kind in places]).values()) == [
        "blocks.mlp.gate_proj",
        "layers.mlp.gate_proj",
        "shared_expe….gate_proj",
        "q_proj",
        "encoder.blo…ttention.q",
        "decoder.blo…ttention.q",
        "mlp.0",
        "mlp.2",
    ]
    assert charts.labels(["a.b", "b", "c.a.b"]) == {"a.b": "a.b", "b": "b", "c.a.b": "c.a.b"}


def test_what_is_in_no_layer_is_said(places, monkeypatch):
    true = summary(places / "packed")
    head = {**true["tensors"][0], "name": "lm_head.weight", "embedding": False, "bits_per_weight": 4.25, "error": 0.0012}
    monkeypatch.setattr("edkm.compressed.checkpoint.summary", lambda directory: {**true, "tensors": [*true["tensors"], head]})
    words = words_of(report(places / "packed"))
    assert "lm_head.weight is in no layer and in neither picture: 4.25 bits per weight, error 1.2e\N{MINUS SIGN}03." in words
    assert words.count("is in no layer") == 1


def test_a_run_in_three_pieces_has_one_record(places, tiny_dir, tmp_path, monkeypatch):
    taken = []

    def interrupt(self, args, state, control, **kwargs):
        taken.append(state.global_step)
        if len(taken) in (2, 5):  # once in the plain steps, once in the clustered ones
            os.kill(os.getpid(), signal.SIGINT)

    command = arguments(tiny_dir, places / "train.json", tmp_path / "out", *MORE)
    monkeypatch.setattr(loop._Stop, "on_step_begin", interrupt)
    assert [main(command), main([*command, "--resume"]), main([*command, "--resume"])] == [130, 130, 0]
    found, whole = record.read(tmp_path / "out"), record.read(places / "packed")
    assert found["losses"] == whole["losses"] and found["layers"] == whole["layers"] and found["lost_runs"] == 0
    assert {phase["name"] for phase in found["phases"]} == {phase["name"] for phase in whole["phases"]}


def test_a_run_that_died_is_said_to_be_partial(places, tiny_dir, tmp_path, monkeypatch):
    command = arguments(tiny_dir, places / "train.json", tmp_path / "out", *MORE)
    with monkeypatch.context() as broken:
        broken.setattr(loop._Stop, "on_step_begin", lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("the power failed")))
        assert main(command) == 1
    assert main([*command, "--resume"]) == 0
    assert record.read(tmp_path / "out")["lost_runs"] == 1
    assert "Partial: 1 interrupted run" in (tmp_path / "out" / "report.html").read_text()


def with_losses(monkeypatch, spoil):
    """Let `spoil(loss, step)` be the loss of training."""
    true = loop._Trainer.compute_loss
    monkeypatch.setattr(loop._Trainer, "compute_loss", lambda self, *args, **kw: spoil(true(self, *args, **kw), self.state.global_step))


def test_a_loss_that_is_not_finite_is_recorded_as_it_is(places, tiny_dir, tmp_path, monkeypatch):
    with_losses(monkeypatch, lambda loss, step: loss + math.inf if step == 1 else loss)  # the gradient is none the worse
    assert main(arguments(tiny_dir, places / "train.json", tmp_path / "out", "--steps", "3", "--plain-steps", "0", "--lr", "1e-3")) == 0
    assert [math.isfinite(loss) for _, loss in record.read(tmp_path / "out")["losses"][0]["points"]] == [True, False, True]
    assert "1 of the losses are not finite" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("plain", "phase"), [("3", "plain fine-tuning"), ("0", "clustered training")])
def test_a_training_that_diverged_ends_there(places, tiny_dir, tmp_path, monkeypatch, capsys, plain, phase):
    with_losses(monkeypatch, lambda loss, step: loss * math.nan if step == 2 else loss)
    assert main(arguments(tiny_dir, places / "train.json", tmp_path / "out", "--steps", "3", "--plain-steps", plain)) == 1
    assert f"edkm: error: {phase}: the training diverged, its last loss is nan. Start again" in capsys.readouterr().err
    losses = json.loads((tmp_path / "out" / "training" / "record.json").read_text())["losses"]
    assert losses[0]["points"][-1] == [3, "nan"]


def test_without_training_the_page_says_so(places, tiny_dir, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(tiny_dir, places / "train.json", out, "--steps", "0", "--dim", "2")) == 0
    words = words_of((out / "report.html").read_text())
    assert "There was no training" in words and "Perplexity was not measured" in words and "Centroids that are vectors" in words


def test_other_readers_do_not_mind_the_record(places, tmp_path):
    packed = places / "packed"
    pretrained.load(packed)
    pretrained.unpack(packed, tmp_path / "dense")
    left = {path.name for path in (tmp_path / "dense").iterdir()}
    assert "tokenizer.json" in left and not left & {"edkm_report.json", "report.html"}


def test_figures_are_those_of_the_files(places):
    packed = places / "packed"
    totals, words = summary(packed), words_of(report(packed))
    size = f"{totals['file_bytes'] / 1e6:,.1f}"
    assert f"\n{size} \nMB\n" in words and f"\n{size} MB\n" in words  # above, and beside the bar
    assert f"from {totals['bytes_in_16_bits'] / 1e6:,.1f} MB at 16 bits" in words
    assert f"{totals['bytes_in_16_bits'] / totals['file_bytes']:.2f} times smaller" in words
    assert f"\n{totals['bits_per_weight']:.2f}" in words and f"{totals['clustered_bits_per_weight']:.2f} in linear layers" in words
    assert "input and output embeddings tied" in words
    for tensor in totals["tensors"]:
        at = words.index(f"\n{tensor['name']}\n\n")
        row = words[at : at + 300].split("\n\n")
        assert f"{tensor['stored_bytes']:,}" in row and f"{tensor['error']:.2e}" in row
    for score in record.read(packed)["scores"]:
        assert f"\n{score['perplexity']:,.3f}\n" in words and f"{score['perplexity']:,.2f}" in words
    for series in record.read(packed)["losses"]:
        for step, loss in series["points"]:
            assert f"\n{series['first_step'] + step:g}\n\n{loss:.4f}\n" in words


def test_what_was_not_recorded_is_missing(packed_dir):
    words = words_of(report(packed_dir))
    assert "Losses, time and memory were not recorded: this directory has no edkm_report.json" in words
    assert "The weights before packing were not recorded" in words and "not measured" in words and "No settings are stored." in words
    assert "The packed values and their tables" in report(packed_dir) and "After training" not in report(packed_dir)


def test_nothing_in_a_file_becomes_markup(copy):
    content = json.loads((copy / "edkm_report.json").read_text())
    content["model"] = EVIL
    content["settings"] = {EVIL: EVIL}
    content["phases"][0]["name"] = content["losses"][0]["name"] = content["layers"][0]["name"] = EVIL
    content["scores"][0] |= {"text": EVIL, "model": EVIL}
    (copy / "edkm_report.json").write_text(json.dumps(content))
    config = json.loads((copy / "config.json").read_text())
    config |= {"architectures": [EVIL], "hidden_size": EVIL}
    config["quantization_config"]["settings"] = {EVIL: EVIL}
    (copy / "config.json").write_text(json.dumps(config))
    page = report(copy)
    assert "<script" not in page and "alert(&#x27;x&#x27;)" in page and "&lt;/script&gt;&amp;&quot;" in page


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ({"architectures": [1]}, {}, "\n1, "),
        ({"architectures": 5}, {}, "\n5, "),
        ({"architectures": None, "model_type": None}, {}, "\nunknown architecture, "),
        ({"architectures": None, "model_type": 5}, {}, "\n5, "),
        ({"text_config": "x"}, {}, "\nhidden size\n\n64\n"),
        ({"hidden_size": {"a": 10**400}}, {}, "\nhidden size\n\n{&#x27;a&#x27;: 1000"),
        ({}, {"overrides": 5, "skip": {"a": 1}}, "\nskip\n\n{&#x27;a&#x27;: 1}"),
        ({"architectures": ["half of \ud800"]}, {"half of \udfff": 1}, "\nhalf of \\ud800, "),
    ],
)
def test_a_config_may_say_anything(copy, config, settings, said):
    content = json.loads((copy / "config.json").read_text())
    content |= config
    content["quantization_config"]["settings"] |= settings
    (copy / "config.json").write_text(json.dumps(content))
    assert main(["report", str(copy), "--out", str(copy / "page.html")]) == 0
    assert said in words_of((copy / "page.html").read_text())


def test_a_record_may_name_half_of_a_character(copy):
    content = json.loads((copy / "edkm_report.json").read_text())
    content["model"] = "half of \ud800"
    (copy / "edkm_report.json").write_text(json.dumps(content))
    assert main(["report", str(copy), "--out", str(copy / "page.html")]) == 0
    assert "<h1>half of \\ud800</h1>" in (copy / "page.html").read_text()


def test_the_page_needs_nothing_else(places):
    page = report(places / "packed")
    assert re.findall(r"""(?:src|href|action|srcset|data)\s*=\s*["']?([^"'\s>]*)""", page) == ["data:,"]
    assert not re.search(r"url\(|@import|<script|<iframe|<object|\son\w+=", page)
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in page
    for drawn in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        assert ElementTree.fromstring(drawn).get("aria-label")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.pop("phases"), "phases is missing"),
        (lambda c: c.update(extra=1), "extra is unknown"),
        (lambda c: c.update(report_version=2), "report_version is 2, this edkm reads up to 1"),
        (lambda c: c.update(report_version=True), "report_version is True"),
        (lambda c: c["phases"][1].update(seconds="long"), "phases: 1: seconds: expected a number, got 'long'"),
        (lambda c: c["losses"][0]["points"].append([1.0]), "losses: a point is [step, loss]"),
        (lambda c: c["layers"][0]["panels"][0]["counts"].append(-1), "expected a whole number from 0, below 2**63, got -1"),
        (lambda c: c["layers"][0]["panels"][0].update(counts=[]), "counts: a histogram needs at least one bin"),
        (lambda c: c["layers"][0]["panels"][1]["centroids"].append([1.0]), "centroids: each has three quantiles"),
        (lambda c: c.update(layers={}), "layers: expected a list, got {}"),
        (lambda c: c["phases"][0].update(seconds="inf"), "phases: time and memory are finite numbers from 0"),
        (lambda c: c["phases"][0].update(peak_mib="nan"), "phases: time and memory are finite numbers from 0"),
        (lambda c: c["phases"][0].update(seconds=-1), "phases: time and memory are finite numbers from 0"),
        (lambda c: c["phases"][0].update(seconds=10**400), "phases: 0: seconds: expected a number, got 1000"),
        (
            lambda c: c["losses"][0].update(first_step=10**400),
            "losses: 0: first_step: expected a whole number from 0, below 2**63, got 1000",
        ),
        (lambda c: c["losses"][0].update(points=[[1, 1.7e308], [2, -1.7e308]]), "losses: finite ones reach to 3.40282e+38"),
        (lambda c: c["losses"][0].update(points=[["inf", 2.0]]), "losses: a step is a finite number from 0"),
        (
            lambda c: c["layers"][0]["panels"][0].update(counts=[10**400]),
            "counts: 0: expected a whole number from 0, below 2**63, got 1000",
        ),
        (lambda c: c["scores"].append({"model": "packed", "perplexity": []}), "scores: 2: nll is missing"),
        (lambda c: c["scores"][0].update(perplexity=[]), "scores: 0: perplexity: expected a number, got []"),
        (lambda c: c.update(weights="0" * 64), "belongs to other weights"),
    ],
)
def test_a_damaged_record_is_refused(copy, spoil, said, capsys):
    content = json.loads((copy / "edkm_report.json").read_text())
    spoil(content)
    (copy / "edkm_report.json").write_text(json.dumps(content))
    for command in (["report", str(copy), "--out", str(copy / "page.html")], ["inspect", str(copy)]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert said in error and "edkm_report.json" in error and "delete the file" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"report_version": 1, "x": NaN}', "[" * 100_000])
def test_a_record_that_is_no_json_is_refused(copy, text, capsys):
    (copy / "edkm_report.json").write_text(text)
    assert main(["report", str(copy), "--out", str(copy / "page.html")]) == 1
    error = capsys.readouterr().err
    assert "edkm_report.json" in error and "delete the file: the model loads without it" in error
    pretrained.load(copy)


def test_losses_that_are_not_finite_are_said(copy):
    content = json.loads((copy / "edkm_report.json").read_text())
    content["losses"][1]["points"][-1][1] = "nan"
    (copy / "edkm_report.json").write_text(json.dumps(content))
    page = report(copy)
    assert "1 of the losses are not finite" in page and ">nan<" in page and "nan" not in "".join(re.findall(r' d="([^"]*)"', page))
    content["losses"] = [{"name": "plain fine-tuning", "first_step": 0, "points": [[1, "inf"]]}]
    (copy / "edkm_report.json").write_text(json.dumps(content))
    assert "1 of the losses are not finite" in report(copy)


def test_the_loss_is_named_and_a_mixture_is_said(copy):
    assert "\nTraining loss\n" in words_of(report(copy)) and "mixture" not in report(copy)
    content = json.loads((copy / "edkm_report.json").read_text())
    content["settings"]["distillation"] = 0.25
    (copy / "edkm_report.json").write_text(json.dumps(content))
    words = words_of(report(copy))
    assert "training is a mixture. 0.25 of it is the divergence" in words and "0.75 the cross entropy of the text" in words
    content["settings"]["distillation"] = "much"
    (copy / "edkm_report.json").write_text(json.dumps(content))
    assert "mixture" not in report(copy)


def test_where_clustering_began_is_said_of_both(copy, places):
    assert report(copy).count(">clustered from here<") == 1
    assert report(copy, places / "packed").count(">both clustered from here<") == 1
    content = json.loads((copy / "edkm_report.json").read_text())
    content["losses"][1]["first_step"] = 2
    (copy / "edkm_report.json").write_text(json.dumps(content))
    drawn = report(copy, places / "packed")
    assert [drawn.count(f">{words} from here<") for words in ("clustered", "the other", "both clustered")] == [1, 1, 0]


def test_against_another_packed_directory_and_a_dense_one(places, tiny_dir, packed_dir, tmp_path):
    packed = places / "packed"
    assert main(["report", str(packed), "--against", str(packed_dir), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    words = words_of(page)
    totals = [summary(packed), summary(packed_dir)]
    assert "Side by side" in words
    for row, field in (("Bits per weight, over all", "bits_per_weight"), ("Bits per weight, linear layers", "clustered_bits_per_weight")):
        at = words.index(f"\n{row}\n")
        assert [f"{t[field]:.3f}" in words[at : at + 120] for t in totals] == [True, True]
    assert f"{packed_dir.name}: no losses, this directory has no edkm_report.json" in words
    assert page.count("Clustering error. ") == 2
    words = words_of(report(packed, tiny_dir))
    size = sum(path.stat().st_size for path in tiny_dir.glob("*.safetensors"))
    assert f"{size / 1e6:.1f} MB" in words and "nothing is clustered in it" in words
    original, ours = (f"{score['perplexity']:.2f}" for score in record.read(packed)["scores"])
    assert f"\nPerplexity\n\n{ours}\n\n{original}\n" in words  # as the record has it
    assert "\noriginal\n" not in words
    shutil.copytree(tiny_dir, tmp_path / "other")
    assert "\noriginal\n" in words_of(report(packed, tmp_path / "other"))
    words = words_of(report(packed, packed))
    assert f"{tiny_dir.name} ({packed})" in words  # two of one name
    assert words.count("\noriginal\n") == 1  # and of one start


def test_measured_elsewhere(places, tiny_dir, tmp_path, capsys):
    score = {"text": "a.txt", "perplexity": 12.5, "nll": 2.5, "tokens": 100, "windows": 2, "window": 51, "stride": 51}
    files = []
    for model, value in ((places / "packed", 14.25), (tiny_dir, 12.5), ("org/control", 11.75)):
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps({"model": str(model), **score, "perplexity": value}))
    files.append(tmp_path / "tasks.json")
    task = {
        "items": 100,
        "accuracy": 0.5,
        "accuracy_stderr": 0.05,
        "normalised_accuracy": "nan",
        "normalised_accuracy_stderr": "nan",
        "other": {},
    }
    files[-1].write_text(
        json.dumps(
            {
                "model": str(places / "packed"),
                "limit": 100,
                "tasks": {"arc_easy": task},
                "mean": {"accuracy": 0.5, "normalised_accuracy": "nan"},
            }
        )
    )
    words = words_of(report(places / "packed", scores=files))
    assert "\n14.250\n" in words and "\ncontrol\n" in words and "\n11.750\n" in words and "0.5000 ± 0.0500" in words
    files[0].write_text('{"model": 3}')
    assert main(["report", str(places / "packed"), "--eval", str(files[0]), "--out", str(tmp_path / "page.html")]) == 1
    assert "0.json: is not what edkm eval --json writes (nll is missing)" in capsys.readouterr().err


def test_what_is_no_packed_directory_is_refused(tiny_dir, places, tmp_path, capsys):
    for given, more, said in (
        (tiny_dir, (), "is not packed by edkm"),
        (tmp_path, (), "has no config.json"),
        (places / "packed", ("--against", str(tmp_path)), "has no config.json"),
        (places / "packed", ("--eval", str(tmp_path / "none.json")), "none.json"),
    ):
        assert main(["report", str(given), "--out", str(tmp_path / "page.html"), *more]) == 1
        assert said in capsys.readouterr().err
    assert main(["report", str(places / "packed"), "--out", str(tmp_path / "no" / "page.html")]) == 1
    assert "name a file in a directory that exists" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert main(["report", str(places / "packed"), "--against", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    assert "is quantized by 'gptq'" in capsys.readouterr().err


def test_inspect_tells_what_was_recorded(places, packed_dir, capsys):
    assert main(["inspect", str(places / "packed")]) == 0
    plain, clustered = record.read(places / "packed")["losses"]
    *lines, before, after = capsys.readouterr().out.splitlines()
    scores = record.read(places / "packed")["scores"]
    assert before == f"perplexity of held <out>.txt, original: {scores[0]['perplexity']:.2f}"
    assert after == f"perplexity of held <out>.txt, packed: {scores[1]['perplexity']:.2f}"
    assert re.fullmatch(r"made in    \d+ s, \d+\.\d\d GiB at most; report.html has the whole story", lines[-3])
    assert lines[-2] == f"plain fine-tuning: loss {plain['points'][0][1]:.3f} to {plain['points'][-1][1]:.3f} by step 3"
    assert lines[-1] == f"clustered training: loss {clustered['points'][0][1]:.3f} to {clustered['points'][-1][1]:.3f} by step 6"


def test_a_terminal_is_told_no_commands(copy, capsys):
    content = json.loads((copy / "edkm_report.json").read_text())
    content["losses"][0]["name"] = "\x1b[31mred\n\x9b"
    content["scores"][0]["text"] = "\x1b]0;title\x07.txt"
    (copy / "edkm_report.json").write_text(json.dumps(content))
    assert main(["inspect", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "\n\\x1b[31mred\\n\\x9b: loss" in printed and "perplexity of \\x1b]0;title\\x07.txt, original" in printed
    assert printed.replace("\n", "").isprintable()
    (copy / "edkm_report.json").write_text(json.dumps(content | {"\x1b[2J": 1}))
    assert main(["inspect", str(copy)]) == 1
    error = capsys.readouterr().err
    assert "\\x1b[2J is unknown" in error and error.strip().isprintable()


def test_charts_of_odd_data():
    flat = charts.losses([charts.Series("one", "one", [[1, 2.0]])], [])
    ElementTree.fromstring(flat)
    ElementTree.fromstring(charts.heat({(0, "a" * 30): 0.0}, "none", ".2f", [0.0], logarithmic=True))
    ElementTree.fromstring(charts.heat({(0, "a"): 3.0, (7, "b"): 3.0}, "same", ".2f", [3.0, 3.0]))
    assert ticks(0, 200, whole=True) == [0, 50, 100, 150, 200] and ticks(0.0, 1.0)[-1] == 1 and ticks(3, 3) == [3]
    for low, high in ((0.0, 1e-9), (-5.0, 7e12), (2.31, 2.32), (0, 1)):
        assert 2 <= len(ticks(low, high)) <= 6


def test_the_report_knows_nothing_of_training():
    refuse(files_of("report"), lambda name: within(name, {"edkm.train", "edkm.cli", "benchmarks.compare", "edkm.evaluate"}))
    assert (SOURCE / "report" / "page.py").is_file()


def colours_of(png):
    """Size of a PNG and the share of each colour (r, g, b) in it."""
    width, height = struct.unpack(">II", png[16:24])
    channels = {2: 3, 6: 4}[png[25]]
    data, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += size + 12
    return width, height, len(set(zlib.decompress(data))), channels


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.find() is None:
        if os.environ.get("EDKM_REQUIRE_BROWSER"):
            pytest.fail(browser.REMEDY)
        pytest.skip(browser.REMEDY)
    with browser.open_browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


# Every word in a picture is inside it, and can be read.
OUTSIDE = """[...document.querySelectorAll('svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
    const a = svg.getBoundingClientRect(), b = text.getBoundingClientRect(), unit = a.width / svg.viewBox.baseVal.width;
    const small = parseFloat(getComputedStyle(text).fontSize) * unit < 11.4;
    return b.left < a.left - 1 || b.right > a.right + 1 || b.top < a.top - 1 || b.bottom > a.bottom + 1 || small;
}).map(text => text.textContent))"""
# Tables that do not fit, but for those that have a row or a column for anything there is.
CUT = """[...document.querySelectorAll('.scroll:not(.tall)')].filter(box => box.scrollWidth > box.clientWidth)
    .map(box => box.getAttribute('aria-label'))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(chromium, places, packed_dir, tmp_path, width, scheme):
    for against in (None, packed_dir):
        (tmp_path / "page.html").write_text(report(places / "packed", against), encoding="utf-8")
        chromium.show(tmp_path / "page.html", width=width, scheme=scheme)
        assert chromium.complaints() == []
        assert chromium.requested() == [(tmp_path / "page.html").resolve().as_uri()]
        assert chromium.value("document.documentElement.scrollWidth") == width  # nothing sticks out
        assert chromium.value("innerWidth") == width and chromium.value("document.querySelectorAll('svg').length") >= 7
        assert chromium.value(OUTSIDE) == [] and chromium.value(CUT) == []
        paper = chromium.value("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) > 380) == (scheme == "light")
        shown_width, height, distinct, _ = colours_of(chromium.picture())
        assert shown_width == width and height > 1500 and distinct > 64


def crowded(subject, name, start, end):
    """The subject with long names, many steps, a GPU, and layers of several kinds."""
    steps = [start * i // 8 for i in range(1, 9)], [(end - start) * i // 8 for i in range(1, 9)]
    losses = [("plain fine-tuning", 0, 0.00032), ("clustered training", start, 0.00031)]
    series = [
        {"name": what, "first_step": first, "points": [[step, loss - 1e-6 * i] for i, step in enumerate(at)]}
        for at, (what, first, loss) in zip(steps, losses, strict=True)
    ]
    phases = [{**phase, "seconds": 3400.0, "peak_mib": 15300.0, "peak_gpu_mib": 24200.0} for phase in subject.record["phases"]]
    kinds = ("visual.blocks.{}.mlp.gate_proj", "language_model.layers.{}.mlp.gate_proj", "language_model.layers.{}.shared_expert.up_proj")
    tensors = [{**subject.linear[0], "name": f"model.{kind.format(i)}.weight"} for kind in kinds for i in range(101)]
    return dataclasses.replace(
        subject,
        name=name,
        record={**subject.record, "losses": series, "phases": phases},
        summary={**subject.summary, "tensors": tensors},
    )


@pytest.mark.parametrize("width", [1280, 1024, 390])
def test_long_names_and_large_numbers_in_a_browser(chromium, places, tmp_path, width):
    subject = look_at(places / "packed")
    ours = crowded(subject, "a_model_of_a_name_without_any_place_to_break_it_that_goes_on_and_on_and_on", 10_000, 20_000)
    theirs = crowded(subject, "another_model_of_a_name_without_any_place_to_break_it_and_even_longer_than_it", 8_000, 100_000)
    for subjects in ([ours], [ours, theirs]):
        (tmp_path / "page.html").write_text(page_of(subjects, with_scores(subjects, [])), encoding="utf-8")
        chromium.show(tmp_path / "page.html", width=width, scheme="light")
        assert chromium.value("document.documentElement.scrollWidth") == width
        assert chromium.value(OUTSIDE) == [] and chromium.value(CUT) == []
        assert chromium.value("[...document.querySelectorAll('th')].some(cell => cell.textContent == 'on the GPU')")


def contrast(*colours):
    """Of two colours as a browser says them, after WCAG 2."""
    lights = []
    for colour in colours:
        red, green, blue = (
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(c) / 255 for c in re.findall(r"\d+", colour)[:3])
        )
        lights.append(0.05 + 0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return max(lights) / min(lights)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_drawn_can_be_seen_and_looks_as_its_key(chromium, places, tmp_path, scheme):
    (tmp_path / "page.html").write_text(report(places / "packed"), encoding="utf-8")
    chromium.show(tmp_path / "page.html", width=1280, scheme=scheme)
    style = "(s => [s.{}, s.opacity, s.fillOpacity, s.strokeOpacity])(getComputedStyle(document.querySelector({!r})))"
    paper = chromium.value("getComputedStyle(document.body).backgroundColor")
    key = chromium.value(
        "[...document.querySelectorAll('section[aria-labelledby=weights] .key i')].map(i => getComputedStyle(i)).map("
        "s => [s.borderTopWidth == '0px' ? s.backgroundColor : s.borderTopColor, s.opacity])"
    )
    drawn = [("rect.centroid", "fill"), ("rect.spread", "fill"), ("path.area", "fill"), ("path.outline", "stroke")]
    for (what, how), shown in zip(drawn, key, strict=True):
        colour, *opacities = chromium.value(style.format(how, what))
        assert opacities == ["1", "1", "1"] and shown == [colour, "1"]
        assert contrast(colour, paper) > 3


def test_the_browser_would_notice(chromium, tmp_path):
    (tmp_path / "bad.html").write_text("<title>x</title><script>console.error('a'); none.such()</script><img src='gone.png'>")
    chromium.show(tmp_path / "bad.html", width=390, scheme="light")
    assert len(chromium.complaints()) >= 2 and len(chromium.requested()) == 2
