"""Methods that `python -m benchmarks compare` compares.

1. Round to nearest is the formula, and torchao's; symmetric rounding has its largest value at the end.
2. Bits are counted with tables, scales and zero points; groups divide every layer.
3. DKM has an absolute temperature, and LLM-QAT trains weights on a symmetric grid.
4. Baselines of other libraries are quantized.
"""

import json
import subprocess

import pytest
import torch
from baselines import BASELINES, needs_baselines
from safetensors.torch import load_file, save_file

from benchmarks.compare import llm_qat, making
from benchmarks.compare.dense import inventory, linear_weights
from benchmarks.compare.methods import METHODS, account, budget, chosen, group_size
from benchmarks.compare.rtn import most_distinct, round_to_nearest, symmetric
from edkm.train.prepare import clusterings


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


def test_llm_qat_trains_straight_through_its_grid(tiny_model):
    weights = {name: w.detach().clone() for name, w in linear_weights(tiny_model).items()}
    llm_qat.quantize(tiny_model, 3)
    tiny_model(input_ids=torch.arange(60).view(3, 20)).logits.square().sum().backward()
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
@pytest.mark.parametrize(("method", "bits"), [("smoothquant", 2), ("awq", 2), ("gptq", 4), ("autoround", 4)])
def test_baselines_are_quantized(tiny_dir, tmp_path, method, bits):
    runner = making._RUNNERS / f"{METHODS[method].library}.py"
    save_file({"input_ids": torch.randint(0, 280, (4, 32))}, tmp_path / "ids.safetensors")
    words = ["--model", tiny_dir, "--calibration", tmp_path / "ids.safetensors", "--bits", bits, "--group", 32, "--skip", "lm_head"]
    words += ["--iters", 2, "--blocks", 3] if method == "autoround" else []
    command_line = [str(word) for word in (BASELINES, runner, method, *words, "--out", tmp_path)]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, before = load_file(tmp_path / "weights.safetensors"), load_file(tiny_dir / "model.safetensors")
    figures = json.loads((tmp_path / "figures.json").read_text())
    quantized = figures["quantized"]
    assert len(quantized) == 14 and set(found) == set(quantized if method == "autoround" else before)
    for name in quantized:
        assert 2 < most_distinct(found[name], 1, 32) <= 2**bits
        assert most_distinct(before[name], 1, 32) > 2**bits
    if method == "autoround":
        assert figures["blocks"] == figures["batch"] == 3 and figures["iterations"] == 2
    else:
        assert torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
