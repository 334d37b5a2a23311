"""Core ML export. Core ML itself runs on macOS only; here the program of the written package is run by `interpreter`.

1. Indices and tables are in the package as they are packed, byte for byte, those of 5 and 7 bits with 6 and 8; integers and scales of
   formats too; tied weights once.
2. The program gives the packed model's logits for other tokens than it was traced and checked with: with and without a cache, of fixed
   length, in float16 and float32, for several architectures, for values whose square is beyond float16.
3. Inputs, outputs and states have the documented names and ranges.
4. A package that differs from the packed model in a table, an index, the mask, a position or the cache is not left on the disk.
5. The command prints results and nothing of coremltools; Core ML's own prediction is compared where there is one.
"""

import functools
import json
import sys
import types

import numpy as np
import packed as packed_models
import pytest
import torch
import transformers
from packed import TINY

from edkm import cli
from edkm.compressed import checkpoint, pretrained
from edkm.compressed.coreml import check, export, interpreter, program
from edkm.compressed.entries import read_entries
from edkm.compressed.weightfiles import open_files

# Bits, rows per table, dim and centroids of the seven matrices of each layer: every width, tables of a tensor, of groups, of a row.
PLANS = [(1, 32, 1, 2), (2, 1, 1, 4), (3, 4, 1, 7), (4, 32, 1, 16), (6, 16, 1, 40), (8, 48, 1, 256), (3, 8, 2, 8)]


def pack(directory, kind="Llama", plans=PLANS, head="ForCausalLM", **fields):
    """A random model of two layers, packed by `plans`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 70, "tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **sizes, **fields})

    def plan(name, shape, number):
        if "embed" in name or shape[0] % 16:
            return 8, 1, 1, 250
        bits, rows, dim, k = plans[number % len(plans)]
        return bits, shape[0] // (rows if shape[0] % rows == 0 else 16), dim, k

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind + head)(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.2)
    packed_models.pack(model, directory, plan=plan)
    return directory


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def exported(packed, tmp_path_factory):
    """Export the model with some options, once for all tests: the package and the result."""

    @functools.cache
    def export_with(**options):
        out = tmp_path_factory.mktemp("out") / "M.mlpackage"
        return out, export.export(packed, out, **options)

    return export_with


CACHED = {"kv_cache": True, "context": 24}


def tables(function):
    return {op.outputs[0].name: op for op in function.operations if op.op_type == "constexpr_lut_to_dense"}


def test_tables_and_indices_are_the_packed_ones(packed, exported):
    package, _ = exported()
    found, blob = tables(check.read_program(package)), (package / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()
    frozen = checkpoint.read(packed).frozen
    assert {program.tensor_name(name) for name in frozen} == found.keys()
    assert {op.indices.dtype.get_bitwidth() for op in found.values()} == {1, 2, 3, 4, 6, 8}
    for name, tensor in frozen.items():
        op = found[program.tensor_name(name)]
        np.testing.assert_array_equal(np.asarray(op.indices.val), tensor.indices.numpy())
        np.testing.assert_array_equal(op.lut.val[:, 0, : tensor.lut.shape[1]], tensor.lut.numpy())
        # coremltools' own decompression is the packed weight.
        np.testing.assert_array_equal(op.materialized_val_inference(), checkpoint.dequantize(tensor, torch.float16).numpy())
    with open_files(packed) as tensors:
        assert all(tensors[name].load().numpy().tobytes() in blob for name in read_entries(packed))


def test_tied_weights_are_stored_once(exported):
    tied = [op for op in tables(check.read_program(exported()[0])).values() if op.outputs[0].shape[0] == 70]
    assert len(tied) == 1
    assert {op.op_type for op in tied[0].outputs[0].child_ops} == {"gather", "linear"}


def test_untied_weights_are_both_there_and_five_and_seven_bits_are_stored_with_more(tmp_path):
    directory = pack(tmp_path / "packed", plans=[(5, 32, 1, 20), (7, 16, 1, 100), (4, 16, 1, 16)], tie_word_embeddings=False)
    odd = {name: entry.bits + 1 for name, entry in read_entries(directory).items() if entry.bits in (5, 7)}
    done = export.export(directory, tmp_path / "M.mlpackage")
    assert done.clustered == 16 and done.program.cosine > 0.99995
    assert done.widened == odd and set(odd.values()) == {6, 8}


@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        ({}, 0.99995),
        (CACHED, 0.99995),
        ({"fixed": True, "context": 20, "precision": "float32"}, 1 - 1e-10),
        ({"kv_cache": True, "precision": "float32"}, 0.99995),
    ],
)
def test_the_program_is_the_model(packed, exported, options, cosine):
    out, done = exported(**options)
    assert done.clustered == 15 and done.program.cosine > cosine
    assert done.size_bytes == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    # Other tokens, and for a cache other steps, than those of the check.
    tokens = torch.randint(70, (1, options["context"] if "fixed" in options else 9), dtype=torch.int32)
    with torch.no_grad():
        expected = pretrained.load(packed)(input_ids=tokens.long()).logits[0]
    function, states, steps = check.read_program(out), {}, [{"inputIds": tokens.numpy()}]
    if "kv_cache" in options:
        states = {name: np.zeros((2, 1, 2, options.get("context", 64), 8), np.float32) for name in ("keyCache", "valueCache")}
        steps = []
        for past, end in ((0, 1), (1, 5), (5, 9)):
            mask = torch.full((end, end), -65504.0).triu(1)[past:][None, None]
            steps.append({"inputIds": tokens[:, past:end].numpy(), "fullAttentionMask": mask.numpy()})
    found = torch.from_numpy(np.concatenate([interpreter.run_program(function, step, states)[0][0] for step in steps]))
    assert all(state[:, :, :, :9].any(-1).all() and not state[:, :, :, 9:].any() for state in states.values())
    assert check.compare(found, expected).cosine > cosine


def test_the_interface(exported):
    import coremltools as ct

    spec = ct.utils.load_spec(str(exported()[0]))
    (tokens,), (logits,) = spec.description.input, spec.description.output
    assert (tokens.name, logits.name, spec.specificationVersion) == ("inputIds", "logits", 9)
    (one, length) = tokens.type.multiArrayType.shapeRange.sizeRanges
    assert (one.upperBound, length.lowerBound, length.upperBound) == (1, 1, 64)


@pytest.mark.parametrize(
    ("kind", "fields", "kv_cache"),
    [
        ("Qwen3", {}, False),
        # LLaMA has no sliding window whatever its config holds.
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "sliding_window": 16}, True),
        # Scaled embeddings and norms with one added to their weight; layers that run side by side; weights joined in one.
        ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}, True),
        ("GPTNeoX", {"num_key_value_heads": 4}, False),
        ("Phi3", {"pad_token_id": 0}, False),
    ],
)
def test_architectures(tmp_path, kind, fields, kv_cache):
    packed = pack(tmp_path / "packed", kind, num_hidden_layers=1, **fields)
    assert export.export(packed, tmp_path / "M.mlpackage", kv_cache=kv_cache, context=40).program.cosine > 0.99995


def test_large_activations_fit_float16_and_a_tied_weight_may_have_the_name_of_the_head(packed, tmp_path):
    frozen, dense, _ = checkpoint.read(packed)
    tied = frozen.pop("model.embed_tokens.weight")
    # Squares of these values are beyond float16; the norm brings them back.
    frozen["lm_head.weight"] = tied._replace(lut=tied.lut * 8000)
    # The logits go through the same weights: the last norm keeps them within float16.
    dense["model.norm.weight"] = dense["model.norm.weight"] * 1e-3
    pretrained.save_pretrained(tmp_path / "large", frozen, dense, {}, pretrained.load(packed))
    assert pretrained.load(tmp_path / "large").get_input_embeddings().weight.abs().max() > 1000
    assert export.export(tmp_path / "large", tmp_path / "M.mlpackage").program.cosine > 0.9999


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_integers_and_scales_are_the_packed_ones(tmp_path, tied, precision):
    """Embeddings as rows of 8 bits; blocks of 4 and 8 bits, with zero points and without."""
    kinds = ("int4_g32", "int4_g64_sym", "q8_0", "q4_0", "int8_g64", (3, 1, 1, 8))

    def plan(name, shape, number):
        return "int8_row" if "embed" in name or "lm_head" in name else kinds[number % len(kinds)]

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 70, "tie_word_embeddings": tied}
    config = transformers.LlamaConfig(**{**TINY, **sizes})
    packed_models.pack(transformers.LlamaForCausalLM(config), tmp_path / "packed", plan=plan)
    done = export.export(tmp_path / "packed", tmp_path / "M.mlpackage", precision=precision, kv_cache=tied)
    assert done.clustered == 15 + (not tied) and done.program.cosine > 0.99995 and not done.widened
    function, frozen = check.read_program(tmp_path / "M.mlpackage"), checkpoint.read(tmp_path / "packed").frozen
    found = {op.outputs[0].name: op for op in function.operations if op.op_type == "constexpr_blockwise_shift_scale"}
    assert {name for name, tensor in frozen.items() if tensor.format != "table"} == {
        name for name in frozen if program.tensor_name(name) in found
    }
    for name, tensor in frozen.items():
        if (op := found.get(program.tensor_name(name))) is not None:
            made = torch.from_numpy(op.materialized_val_inference()).float()
            torch.testing.assert_close(made, checkpoint.dequantize(tensor), rtol=1e-3 if precision == "float16" else 1e-6, atol=1e-8)
            assert op.data.dtype.get_bitwidth() == tensor.bits
    name = "model.embed_tokens.weight"
    frozen[name].parts["zero"][-1] ^= 1
    with pytest.raises(ValueError, match=f"{name}: differs in the package"):
        check.check_tensors(function, {name: frozen[name]}, {}, precision)


def test_the_interpreter_replaces_a_part():
    x = torch.linspace(-2, 3, 24).reshape(2, 3, 4)
    masks = {"begin_mask": [False, False, True], "end_mask": [False, True, False], "squeeze_mask": [True, False, False]}
    limits = {"begin": torch.tensor([1, 1, 3]), "end": torch.tensor([2, 0, 2])}
    part = interpreter._slice_update(x, torch.ones(2, 2), **limits, **{name: torch.tensor(mask) for name, mask in masks.items()})
    expected = x.clone()
    expected[1, 1:, :2] = 1
    assert torch.equal(part, expected)


def nudged(name, frozen, dtype, dense, real=program._table):
    lut = frozen.lut.clone()
    lut[-1, 0, 0] = torch.nextafter(lut[-1, 0, 0], torch.tensor(1.0).half())
    return real(name, frozen._replace(lut=lut), dtype, dense)


def forgetful(self, key, value, layer, *_, **__):
    """Forgets what was there before."""
    self.keys[layer], self.values[layer] = 0, 0
    self.keys[layer, :, :, self.past : self.end] = key
    self.values[layer, :, :, self.past : self.end] = value
    return self.keys[layer, :, :, : self.end], self.values[layer, :, :, : self.end]


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (program, "_table", nudged, "model.embed_tokens.weight: differs in the package"),
        (program, "_NEVER", 0.0, "the exported program differs from the packed model: cosine"),
        (program._States, "update", forgetful, "the exported program differs"),
    ],
)
def test_a_wrong_package_is_not_left_there(packed, tmp_path, monkeypatch, owner, name, value, message):
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(ValueError, match=message):
        export.export(packed, tmp_path / "M.mlpackage", kv_cache=owner is not program)
    assert list(tmp_path.iterdir()) == []


def test_every_index_and_every_position_is_compared(packed, exported):
    model = pretrained.load(packed)
    cosines, sines = (part[0].clone() for part in model.model.rotary_emb(torch.zeros(1), torch.arange(64).unsqueeze(0)))
    frozen, dense = checkpoint.read(packed).frozen, {"model.model.rotary_emb.cosines": cosines, "model.model.rotary_emb.sines": sines}
    function = check.read_program(exported()[0])
    check.check_tensors(function, frozen, dense, "float16")
    cosines[-1, 0] += 1e-2  # a position that no text of the check reaches
    with pytest.raises(ValueError, match="cosines: differs in the package"):
        check.check_tensors(function, frozen, dense, "float16")
    for name, tensor in frozen.items():
        tensor.indices[-1, -1] ^= 1
        with pytest.raises(ValueError, match=f"{name}: differs in the package"):
            check.check_tensors(function, {name: tensor}, {}, "float16")


def test_the_command(packed, tmp_path, capsys, caplog):
    caplog.set_level("WARNING", "coremltools")
    out = tmp_path / "M.mlpackage"
    out.mkdir()
    (out / "Manifest.json").write_text("old")
    arguments = ["export", str(packed), "--to", "coreml", "--out", str(out), "--context", "12", "--kv-cache"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"edkm: error: {out}: exists; name another or add --overwrite\n"
    assert cli.main([*arguments, "--overwrite"]) == 0
    printed = capsys.readouterr()
    assert "15 clustered tensors, read back equal" in printed.out
    assert "logits of the program: cosine 0.9999" in printed.out
    # Nothing of coremltools.
    assert all(line.startswith("export: ") for line in printed.err.splitlines()) and "all checked" in printed.err
    assert not caplog.records
    assert json.loads((out / "Manifest.json").read_text())["fileFormatVersion"]


@pytest.mark.parametrize("kv_cache", [False, True])
def test_the_device_check_with_a_stand_in(packed, exported, monkeypatch, kv_cache):
    """Run the check of macOS with the interpreter in the place of Core ML."""
    import coremltools as ct

    out, _ = exported(**(CACHED if kv_cache else {}))
    function = check.read_program(out)

    class Model:
        def __init__(self, path):
            assert path == str(out)

        def make_state(self):
            return {name: np.zeros((2, 1, 2, 24, 8), np.float32) for name in ("keyCache", "valueCache")}

        def predict(self, given, state=None):
            assert (state is not None) == kv_cache
            assert given["inputIds"].dtype == np.int32 and (not kv_cache or given["fullAttentionMask"].dtype == np.float16)
            inputs = {name: value.astype(np.int32 if name == "inputIds" else np.float32) for name, value in given.items()}
            return {"logits": interpreter.run_program(function, inputs, state or {})[0]}

    assert check.device_logits(out, torch.zeros(1, 8, dtype=torch.int32), kv_cache=kv_cache) is None or sys.platform == "darwin"
    monkeypatch.setattr(check, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(check.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(ct.models, "MLModel", Model)
    tokens = torch.randint(70, (1, 8), dtype=torch.int32)
    with torch.no_grad():
        expected = pretrained.load(packed)(input_ids=tokens.long()).logits[0]
    found = check.device_logits(out, tokens, kv_cache=kv_cache)
    assert found is not None and check.compare(found, expected, device=True).cosine > 0.9999
    with pytest.raises(ValueError, match="Core ML's prediction differs"):
        check.compare(found.flip(0), expected, device=True)


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
@pytest.mark.parametrize("kv_cache", [False, True])
def test_core_ml_predicts_the_same(tmp_path, kv_cache):
    # The Neural Engine was reported to refuse states of other widths than multiples of 32 (docs/runtimes.md).
    done = export.export(pack(tmp_path / "packed", head_dim=32), tmp_path / "M.mlpackage", kv_cache=kv_cache)
    assert done.device is not None and done.device.cosine > 0.999
