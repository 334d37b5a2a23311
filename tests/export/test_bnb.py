"""`edkm export --to bitsandbytes`:

1. a weight in NF4 becomes bitsandbytes' own tensors, which it dequantises bit for bit in every type;
2. transformers loads the directory without edkm and gives the packed model's logits;
3. embeddings in other formats are written dense, and that is said; linear layers in other formats are refused by name;
4. a file that differs is not given a name.
"""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM

from edkm import cli
from edkm.export import bnb
from tests.blocked import build, freeze, pack

FAMILIES = {"llama": {"tie_word_embeddings": True}, "qwen3": {"tie_word_embeddings": False}, "gemma3_text": {"head_dim": 32}, "phi3": {}}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed") / "model"
    pack(build("llama", tie_word_embeddings=True), directory, "nf4", "int8_row")
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_dequantises_the_packed_weight(dtype):
    tensor = freeze(torch.randn(8, 192) * torch.logspace(-6, 2, 8).unsqueeze(1), "nf4")
    data, state = bnb.state(tensor, dtype)
    assert data.dtype == torch.uint8 and data.shape == (8 * 192 // 2, 1)
    assert torch.equal(dequantize_4bit(data, state), tensor.values(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_packed_models_logits(family, tmp_path):
    dense = build(family, **FAMILIES[family])
    pack(dense, tmp_path / "packed", "nf4")
    done = bnb.export(tmp_path / "packed", tmp_path / "out")
    (line,) = [note for note in done.notes if "logits" in note]
    assert float(line.split("cosine ")[1].split(",")[0]) > 0.999999 and float(line.split()[-1]) < 1e-3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=0.05, atol=0.05)  # computes in bfloat16


def test_embeddings_are_dense_and_linear_layers_that_are_not_nf4_are_named(packed, tmp_path):
    done = bnb.export(packed, tmp_path / "out")
    assert "model.embed_tokens.weight: written dense: bitsandbytes has linear layers alone" in done.notes
    assert "numbers of the file: float32" in done.notes  # an 8-bit row has entries that 16 bits do not hold
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes" and quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["llm_int8_skip_modules"] == ["lm_head"] and not quantization["bnb_4bit_use_double_quant"]


def test_a_linear_layer_in_another_format_is_refused(tmp_path):
    pack(build("llama"), tmp_path / "packed", "int4_g64")
    with pytest.raises(ValueError, match=r"weight: format int4_g64: bitsandbytes takes nf4 alone.*--format nf4"):
        bnb.export(tmp_path / "packed", tmp_path / "out")
    pack(build("llama", hidden_size=96, intermediate_size=96), tmp_path / "none", "nf4", "int8_row")
    with pytest.raises(ValueError, match="no linear layer has the format nf4"):
        bnb.export(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_differs_gets_no_name(packed, tmp_path, monkeypatch):
    make = bnb.state

    def state(tensor, dtype):
        data, found = make(tensor, dtype)
        return data.flip(0), found

    monkeypatch.setattr(bnb, "state", state)
    with pytest.raises(ValueError, match="weight: differs in the exported file"):
        bnb.export(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(packed, tmp_path, capsys):
    assert cli.main(["export", str(packed), "--to", "bitsandbytes", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "14 clustered tensors, read back equal" in printed and "logits of bitsandbytes in float32: cosine 1.0000" in printed
