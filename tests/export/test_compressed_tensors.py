"""`edkm export --to compressed-tensors`.

1. Each format that it takes is decoded by the library to the packed model's weights, bit for bit, in every dtype that may be chosen; the
   others have no scheme.
2. transformers loads the directory where edkm cannot be imported, and computes the packed model's logits.
3. Layers with several formats are named in the config; embeddings and output layers are dense; scales choose the dtype.
4. What cannot be written is refused by name, and a directory that fails a check is not left.
"""

import json
import subprocess
import sys

import pytest
import torch
from packed import TINY, TOKENS, blocks, freeze, make
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from edkm.compressed import pretrained
from edkm.core.formats import FORMATS
from edkm.export import compressed_tensors
from edkm.export.compressed_tensors import export, scheme_of, stored

INTEGERS = [f"int{bits}_g{size}{sym}" for bits in (2, 3, 4, 8) for size in (32, 64, 128) for sym in ("", "_sym")]
TAKEN = {*INTEGERS, "int8_row", "q4_0", "q8_0", "tq2_0", "mxfp4", "nvfp4"}
FLOAT16 = {"q4_0", "q8_0", "tq2_0"}
BFLOAT16 = {"mxfp4", "nvfp4"}
WIDE = TINY | {"intermediate_size": 128}


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_the_library_decodes_the_packed_weights(name):
    from compressed_tensors.compressors import BaseCompressor

    form = FORMATS[name]
    scheme = scheme_of(form, ["Linear"])
    frozen = blocks((24, 256), name)
    for dtype in compressed_tensors._holding(form):
        parts = stored(frozen, dtype)
        assert parts.keys() <= set(BaseCompressor.get_value_from_registry(scheme.format).compression_param_names(scheme))
        found = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
        assert found.dtype == dtype and torch.equal(found, frozen.values(dtype))


def test_other_formats_have_no_scheme():
    assert {name for name, form in FORMATS.items() if scheme_of(form)} == TAKEN


def model_with(directory, plan, dtype=torch.bfloat16, **options):
    """Write a packed model; `plan` gives the format of a weight by its name, "table" or None."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**WIDE, **options, bos_token_id=None, eos_token_id=0, pad_token_id=0)).to(dtype)
    model.config.architectures = ["LlamaForCausalLM"]
    frozen, dense = {}, {}
    for seed, (name, weight) in enumerate(model.named_parameters()):
        kind = plan(name) if weight.dim() == 2 else None
        if kind is None:
            dense[name] = weight.detach()
        else:
            frozen[name] = freeze(weight.shape, 3, len(weight)) if kind == "table" else blocks(weight.shape, kind, seed)
    pretrained.save_pretrained(directory, frozen, dense, {}, model)
    return directory


def test_transformers_loads_it_without_edkm(tmp_path):
    source = model_with(tmp_path / "packed", lambda name: "int4_g64" if "proj" in name else None)
    done = export(source, tmp_path / "out")
    assert done.clustered == 14 and done.notes == ["dtype of the model: bfloat16", "logits of transformers: largest difference 0"]
    script = (
        "import sys, torch; sys.modules['edkm'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"torch.save((model.dtype, model(torch.tensor({TOKENS.tolist()})).logits.detach()), {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True)
    dtype, found = torch.load(tmp_path / "logits")
    with torch.no_grad():
        assert dtype == torch.bfloat16 and torch.equal(found, pretrained.load(source, torch.bfloat16)(TOKENS).logits)


def test_the_command_writes_no_bars(tmp_path, capfd):
    from edkm.cli import main

    source = model_with(tmp_path / "packed", lambda name: "int4_g32_sym" if "proj" in name else None)
    assert main(["export", str(source), "--to", "compressed-tensors", "--out", str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    assert "14 clustered tensors, read back equal" in out and "ressing" not in err


def test_layers_with_several_formats_are_named(tmp_path):
    def plan(name):
        return "int8_g32_sym" if "down" in name else "int4_g64_sym" if "proj" in name else None

    export(model_with(tmp_path / "packed", plan), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized" and config["ignore"] == ["lm_head"]
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert by_bits[8] == [f"model.layers.{at}.mlp.down_proj" for at in (0, 1)] and len(by_bits[4]) == 12


def test_several_schemes_with_zero_points_are_for_vllm_alone(tmp_path):
    done = export(model_with(tmp_path / "packed", lambda name: "int8_row" if "down" in name else "int4_g32"), tmp_path / "out")
    assert done.notes[-1] == compressed_tensors._NOT_LOADED and done.clustered == 14


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_output_layers_are_dense(tmp_path, tied):
    def plan(name):
        return "int4_g32_sym" if "proj" in name else "table" if "lm_head" in name else "int8_row"

    done = export(model_with(tmp_path / "packed", plan, tie_word_embeddings=tied), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = pretrained.load(tmp_path / "packed", torch.bfloat16)
    assert torch.equal(tensors["model.embed_tokens.weight"], expected.model.embed_tokens.weight)
    assert tied or torch.equal(tensors["lm_head.weight"], expected.lm_head.weight)
    dense = ["model.embed_tokens.weight"] if tied else ["lm_head.weight", "model.embed_tokens.weight"]
    assert done.notes[:-2] == [f"{name}: written dense, in bfloat16" for name in dense]


@pytest.mark.parametrize(
    ("own", "form", "chosen"),
    [("bfloat16", "q4_0", "float16"), ("float32", "q4_0", "float32"), ("float16", "mxfp4", "bfloat16"), ("float16", "int4_g32", "float16")],
)
def test_scales_choose_the_dtype(tmp_path, own, form, chosen):
    source = model_with(tmp_path / "packed", lambda name: form if "proj" in name else None, getattr(torch, own))
    assert f"dtype of the model: {chosen}" in export(source, tmp_path / "out").notes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == chosen


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (lambda name: "table" if "proj" in name else None, "0.mlp.down_proj.weight: has free tables, which compressed-tensors lacks"),
        (lambda name: "iq4_nl" if "down" in name else None, "0.mlp.down_proj.weight: is in format iq4_nl, which compressed-tensors lacks"),
        (lambda name: "int8_row" if "embed" in name else None, "no linear layer is in a format"),
        (lambda name: "mxfp4" if "down" in name else "q4_0", "no dtype holds the scales of mxfp4, q4_0 together"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, plan, said):
    with pytest.raises(ValueError, match=said):
        export(model_with(tmp_path / "packed", plan), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_scale_that_the_dtype_does_not_hold_is_found(tmp_path, monkeypatch):
    source = model_with(tmp_path / "packed", lambda name: "q4_0" if "proj" in name else None)
    monkeypatch.setattr(compressed_tensors, "_holding", lambda form: (torch.bfloat16,))
    with pytest.raises(ValueError, match="compressed-tensors reads another weight than the packed model's in bfloat16"):
        export(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_other_modules_are_refused_by_name(tmp_path):
    model = make("gpt2")
    model.config.architectures = ["GPT2LMHeadModel"]
    name = "transformer.h.0.mlp.c_fc.weight"
    dense = {key: value.detach() for key, value in model.named_parameters() if key != name}
    pretrained.save_pretrained(tmp_path / "packed", {name: blocks((32, 128), "int4_g32")}, dense, {}, model)
    with pytest.raises(ValueError, match=f"{name}: belongs to a Conv1D; compressed-tensors takes linear layers"):
        export(tmp_path / "packed", tmp_path / "out")
