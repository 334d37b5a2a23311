"""The report and `edkm inspect`.

1. The page shows the figures of the files, needs nothing else, and nothing in a file becomes markup or breaks it.
2. Numbers that are not finite, or were not recorded, are reported as such.
3. Two models are compared, and results of `edkm eval --json` are added; other directories are refused.
4. `edkm inspect` summarizes the run.
5. Without the extra `report` the numbers are written, and the user is told how to have the page.
"""

import json
import math
import re

import pytest
from pages import arguments, change, pictures_of, words_of

from edkm import charts, metrics
from edkm.cli import main
from edkm.compressed.checkpoint import summary
from edkm.report import duration, memory, number, page, place_of

EVIL = "<script>alert('x')</script>&\"$x_1$"


def test_every_weight_has_one_place():
    names = [
        "model.visual.blocks.3.mlp.gate_proj.weight",
        "model.language_model.layers.3.mlp.gate_proj.weight",
        "encoder.block.3.layer.0.SelfAttention.q.weight",
        "decoder.block.3.layer.0.SelfAttention.q.weight",
        "h.3.mlp.0.weight",
        "h.3.mlp.2.weight",
    ]
    assert len({place_of(name) for name in names}) == len(names)
    assert place_of("model.layers.3.mlp.experts.7.up_proj.weight") == (3, "model.layers.mlp.experts.up_proj")
    assert place_of("3.weight") == (3, "weight") and place_of("lm_head.weight") is None


def test_odd_numbers_do_not_break_the_page(copy):
    def spoil(content):
        content["phases"][0].update(seconds="inf", peak_mib="nan", peak_gpu_mib=-1)
        content["losses"][0].update(points=[[1, 1.7e308], [2, -1.7e308], ["inf", 2.0], [3, "nan"], [4, 2.0], [5]])
        content["histograms"][0]["panels"][0].update(counts=[])
        content["histograms"][0]["panels"][1].update(centroids=[[1.0], [], [2, 3, 4, 1e300]])
        content["perplexities"][0].update(perplexity="inf", tokens=2**60)
        content["settings"] = {}

    change(copy, "metrics.json", spoil)
    html = page(copy)
    assert "4 of the losses are not finite" in html and "\ninf\n" in words_of(html)
    assert all("nan" not in picture for picture in pictures_of(html))
    assert duration(math.inf) == memory(math.nan) == number(math.nan) == number(None) == "—"
    assert charts.losses([]) == charts.heat([], "bits") == charts.heat([("a", {})], "bits") == charts.histogram({}) == ""


def test_figures_are_those_of_the_files(places):
    packed = places / "packed"
    totals, html = summary(packed), page(packed)
    words = words_of(html)
    assert f"\n{totals['file_bytes'] / 1e6:,.1f} MB\n" in words and f"{totals['bytes_in_16_bits'] / 1e6:,.1f} MB in 16 bits" in words
    assert f"{totals['bytes_in_16_bits'] / totals['file_bytes']:.2f} times smaller" in words
    assert f"\n{totals['bits_per_weight']:.2f}\n{totals['clustered_bits_per_weight']:.2f} in linear\nlayers" in words
    for tensor in totals["tensors"]:
        at = words.index(f"\n{tensor['name']}\n")
        row = words[at : at + 300].split("\n")
        assert f"{tensor['stored_bytes']:,}" in row and f"{tensor['error']:.2e}" in row
    found = metrics.read(packed)[0]
    for score in found["perplexities"]:
        assert f"\n{score['perplexity']:,.3f}\n" in words and f"{score['perplexity']:,.2f}" in words
    for phase in found["phases"]:
        assert f"\n{phase['name']}\n{duration(phase['seconds'])}\n" in words
    losses, bits, errors, *histograms = pictures_of(html)
    assert all(series["name"] in losses for series in found["losses"]) and "bits per weight" in bits and "error" in errors
    assert len(histograms) == 4 and all("after training: packed tables" in picture for picture in histograms)


def test_the_page_reports_numbers_that_were_not_recorded(packed_dir):
    html = page(packed_dir)
    for reported in (
        "Losses, time and memory were not recorded: no metrics.json here",
        "not measured",
        "The weights before packing were not recorded",
        "Perplexity was not measured. To add it: edkm eval",
    ):
        assert reported in words_of(html)
    assert "packed values and tables" in pictures_of(html)[-1]


def test_nothing_in_a_file_becomes_markup(copy):
    def spoil(content):
        content |= {"model": EVIL, "settings": {EVIL: EVIL}}
        content["phases"][0]["name"] = content["losses"][0]["name"] = content["histograms"][0]["name"] = EVIL
        content["perplexities"][0] |= {"text": EVIL, "model": EVIL}

    def spoil_config(config):
        config |= {"architectures": [EVIL], "hidden_size": EVIL}
        config["quantization_config"]["settings"] = {EVIL: EVIL}

    change(copy, "metrics.json", spoil)
    change(copy, "config.json", spoil_config)
    html = page(copy)
    assert "<script" not in html and "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;" in html
    assert EVIL in pictures_of(html)[0]  # whole, and no formula


@pytest.mark.parametrize(
    ("config", "settings", "shown"),
    [
        ({"architectures": [1]}, {}, "\n1, "),
        ({"architectures": None, "model_type": None}, {}, "\nunknown architecture, "),
        ({"text_config": "x"}, {}, "\nhidden size\n64\n"),
        ({"hidden_size": {"a": 10**400}}, {}, "\nhidden size\n{&#39;a&#39;: 1000"),
        ({}, {"overrides": 5, "skip": {"a": 1}}, "\nskip\n{&#39;a&#39;: 1}"),
        ({"architectures": ["half of \ud800"]}, {"half of \udfff": 1}, "\nhalf of \\ud800, "),
    ],
)
def test_a_config_may_have_any_values(copy, config, settings, shown):
    content = json.loads((copy / "config.json").read_text()) | config
    content["quantization_config"]["settings"] |= settings
    (copy / "config.json").write_text(json.dumps(content))
    assert main(["report", str(copy), "--out", str(copy / "page.html")]) == 0
    assert shown in words_of((copy / "page.html").read_text())


def test_the_page_needs_nothing_else(places):
    html = page(places / "packed")
    addresses = re.findall(r"""(?:src|href|action|srcset|data)\s*=\s*["']?([^"'\s>]*)""", html)
    assert len(addresses) == 8 and all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import|<script|<iframe|<object|\son\w+=|https?://", html) and "default-src 'none'" in html


def test_two_models_are_compared(places, tiny_dir, packed_dir, tmp_path, capsys):
    packed = places / "packed"
    assert main(["report", str(packed), "--against", str(packed_dir), "--out", str(tmp_path / "page.html")]) == 0
    words = words_of((tmp_path / "page.html").read_text())
    totals = [summary(packed), summary(packed_dir)]
    for row, field in (("Bits per weight, over all", "bits_per_weight"), ("Bits per weight, linear layers", "clustered_bits_per_weight")):
        assert f"\n{row}\n{totals[0][field]:.3f}\n{totals[1][field]:.3f}\n" in words
    assert f"{packed_dir.name}: nothing recorded: no metrics.json here" in words
    dense = words_of(page(packed, tiny_dir))
    assert f"{sum(path.stat().st_size for path in tiny_dir.glob('*.safetensors')) / 1e6:.1f} MB" in dense
    both = page(packed, packed)
    assert f"{tiny_dir.name} ({packed})" in both and words_of(both).count("\noriginal\n") == 1
    assert pictures_of(both)[0].count("clustered training") == 2


def test_results_of_eval_are_added(places, tiny_dir, tmp_path, capsys):
    score = {"text": "a.txt", "perplexity": 12.5, "nll": 2.5, "tokens": 100, "windows": 2, "window": 51, "stride": 51}
    task = {"items": 100, "accuracy": 0.5, "accuracy_stderr": 0.05, "normalised_accuracy": "nan", "normalised_accuracy_stderr": "nan"}
    means = {"accuracy": 0.5, "normalised_accuracy": "nan"}
    packed = str(places / "packed")
    contents = [{"model": packed, **score, "perplexity": 14.25}, {"model": "org/control", **score, "perplexity": 11.75}]
    contents.append({"model": packed, "limit": 100, "tasks": {"arc_easy": {**task, "other": {}}}, "mean": means})
    files = [tmp_path / f"{i}.json" for i in range(len(contents))]
    for file, content in zip(files, contents):
        file.write_text(json.dumps(content))
    words = words_of(page(places / "packed", scores=files))
    assert "\n14.250\n" in words and "\ncontrol\n" in words and "\n11.750\n" in words and "0.5000 ± 0.0500" in words
    files[0].write_text('{"model": 3}')
    assert main(["report", packed, "--eval", str(files[0]), "--out", str(tmp_path / "page.html")]) == 1
    assert "0.json: is not a file of edkm eval --json (nll is missing)" in capsys.readouterr().err


def test_a_directory_that_is_not_packed_is_refused(tiny_dir, places, tmp_path, capsys):
    for given, more, message in (
        (tiny_dir, (), "is not packed by edkm"),
        (tmp_path, (), "has no config.json"),
        (places / "packed", ("--against", str(tmp_path)), "has no config.json"),
        (places / "packed", ("--eval", str(tmp_path / "none.json")), "none.json"),
        (places / "packed", ("--out", str(tmp_path / "no" / "page.html")), "name a file in a directory that exists"),
    ):
        assert main(["report", str(given), "--out", str(tmp_path / "page.html"), *more]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert main(["report", str(places / "packed"), "--against", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    assert "is quantized by 'gptq'" in capsys.readouterr().err


def test_inspect_summarizes_the_run(copy, packed_dir, capsys):
    change(copy, "metrics.json", lambda content: content["perplexities"][0].update(text="\x1b]0;title\x07.txt"))
    assert main(["inspect", str(copy)]) == 0
    found = metrics.read(copy)[0]
    *_, made, _, clustered, before, after = capsys.readouterr().out.splitlines()
    assert before == f"perplexity of \\x1b]0;title\\x07.txt, original: {found['perplexities'][0]['perplexity']:.2f}"
    assert after == f"perplexity of held <out>.txt, packed: {found['perplexities'][1]['perplexity']:.2f}"
    assert re.fullmatch(r"made in    \d+ s, at most \d+\.\d\d GiB; report.html shows more", made)
    points = found["losses"][1]["points"]
    assert clustered == f"{found['losses'][1]['name']}: loss {points[0][1]:.3f} to {points[-1][1]:.3f} by step 8"
    assert main(["inspect", str(packed_dir)]) == 0
    assert "total" in capsys.readouterr().out.splitlines()[-1]


def test_without_the_extra_the_numbers_are_written_and_the_page_can_be_made_later(places, tiny_dir, tmp_path, monkeypatch, capsys):
    report = ["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]
    with monkeypatch.context() as without:
        without.setattr("edkm.report.missing_package", lambda: "matplotlib")
        assert main(arguments(tiny_dir, places, tmp_path / "out", "--steps", "0")) == 0
        assert "report.html needs matplotlib: pip install 'edkm[report]', then edkm report" in capsys.readouterr().out
        assert (tmp_path / "out" / "metrics.json").is_file() and not (tmp_path / "out" / "report.html").exists()
        assert main(report) == 1
        assert "matplotlib is needed for the report. Install it: pip install 'edkm[report]'." in capsys.readouterr().err
    assert main(report) == 0
    assert "There was no training" in (tmp_path / "page.html").read_text()
