"""Core ML export: what is in the package, and that the check sees damage. Core ML itself runs on macOS only."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from edkm import cli
from edkm.compressed import checkpoint, pretrained
from edkm.compressed.coreml import arithmetic, check, export, program, stored, weights
from edkm.compressed.entries import read_entries
from edkm.compressed.weightfiles import open_files
from edkm.core.assign import Frozen

# Bits, rows per table, dim and centroids of the seven matrices of each layer: every width, tables of a tensor, of groups, of a row.
PLANS = [(1, 32, 1, 2), (2, 1, 1, 4), (3, 4, 1, 7), (4, 32, 1, 16), (6, 16, 1, 40), (8, 48, 1, 256), (3, 8, 2, 8)]


def frozen_of(weight, bits, rows, dim, k, seed=0):
    """Random indices and tables of about the weight's scale; `k` centroids in each."""
    height, width = weight.shape
    generator = torch.Generator().manual_seed(seed)
    luts = height // rows
    lut = (torch.randn(luts, k, dim, generator=generator) * 0.1).half()
    indices = torch.randint(k, (height // dim, width), generator=generator, dtype=torch.uint8)
    assert (k - 1).bit_length() == bits
    return Frozen(indices, lut, (height, width), 0.0)


def pack(directory, kind="Llama", plans=PLANS, head="ForCausalLM", **fields):
    """A random model of two layers, packed by `plans`."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 70,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "architectures": [kind + head],
        }
        | fields
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind + head)(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.2)
    frozen, dense = {}, {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() != 2 or parameter.shape[0] < 16:
            dense[name] = parameter.detach()
        elif "embed" in name or "lm_head" in name:
            frozen[name] = frozen_of(parameter, 8, 70, 1, 250)
        else:
            bits, rows, dim, k = plans[i % len(plans)]
            frozen[name] = frozen_of(parameter, bits, rows if parameter.shape[0] % rows == 0 else 16, dim, k, seed=i)
    pretrained.save_pretrained(directory, frozen, dense, {}, model)
    return directory


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def package(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "M.mlpackage"
    export.export(packed, out)
    return out


def constants(function):
    return [op for op in function.operations if op.op_type == "constexpr_lut_to_dense"]


def test_tables_and_indices_are_ours(packed, package):
    with checkpoint.open_items(packed) as items:
        ours = {name: item.load() for name, item in items.items()}
    found = {op.outputs[0].name: op for op in constants(check.read(package))}
    clustered = {name: tensor for name, tensor in ours.items() if isinstance(tensor, Frozen)}
    assert {check.tensor_name(name) for name in clustered} == found.keys()
    widths = set()
    for name, tensor in clustered.items():
        op = found[check.tensor_name(name)]
        widths.add(op.indices.dtype.get_bitwidth())
        np.testing.assert_array_equal(np.asarray(op.indices.val), tensor.indices.numpy())
        np.testing.assert_array_equal(op.lut.val[:, 0, : tensor.lut.shape[1]], tensor.lut.numpy())
        # coremltools' own decompression and ours are the packed weight.
        np.testing.assert_array_equal(op.materialized_val_inference(), checkpoint.dequantize(tensor, torch.float16).numpy())
        assert torch.equal(arithmetic.weight(op), checkpoint.dequantize(tensor))
    assert widths == {1, 2, 3, 4, 6, 8}


def test_the_stored_bytes_are_the_packed_stream(packed, package):
    found = stored.read_constants(package)
    blob = (package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").read_bytes()
    with open_files(packed) as tensors:
        for name in read_entries(packed):
            stream = tensors[name].load().numpy().tobytes()
            assert found[check.tensor_name(name)]["indices"].data == stream
            assert stream in blob


def test_tied_weights_are_stored_once(package, tmp_path):
    tied = [op for op in constants(check.read(package)) if op.outputs[0].shape[0] == 70]
    assert len(tied) == 1
    assert {op.op_type for op in tied[0].outputs[0].child_ops} == {"gather", "linear"}
    done = export.export(pack(tmp_path / "untied", tie_word_embeddings=False), tmp_path / "M.mlpackage")
    assert done.clustered == 16


@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        ({"kv_cache": True, "context": 24}, 0.99995),
        ({"fixed": True, "context": 20}, 0.99995),
        ({"precision": "float32"}, 1 - 1e-10),
        ({"precision": "float32", "kv_cache": True}, 0.99995),
    ],
)
def test_the_program_is_the_model(packed, tmp_path, options, cosine):
    out = tmp_path / "M.mlpackage"
    done = export.export(packed, out, **options)
    assert done.clustered == 15 and done.program.cosine > cosine
    assert done.package_bytes == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    # Other tokens, and for a cache other steps, than those of the check.
    tokens = torch.randint(70, (1, options.get("context", 9) if "fixed" in options else 9), dtype=torch.int32)
    with torch.no_grad():
        expected = pretrained.load(packed)(input_ids=tokens.long()).logits[0]
    function, states = check.read(out), {}
    if "kv_cache" in options:
        states = {name: torch.zeros(2, 1, 2, options.get("context", 64), 8) for name in ("keyCache", "valueCache")}
        found = []
        for past, end in ((0, 1), (1, 5), (5, 9)):
            mask = torch.full((end, end), -65504.0).triu(1)[past:][None, None]
            given = {"inputIds": tokens[:, past:end], "fullAttentionMask": mask}
            found.append(arithmetic.run(function, given, states)[0][0])
        found = torch.cat(found)
        assert all(state[:, :, :, :9].any(-1).all() and not state[:, :, :, 9:].any() for state in states.values())
    else:
        found = arithmetic.run(function, {"inputIds": tokens}, {})[0][0]
    assert check.compare(found, expected).cosine > cosine


def test_the_interface(package):
    import coremltools as ct

    spec = ct.utils.load_spec(str(package))
    (tokens,), (logits,) = spec.description.input, spec.description.output
    assert (tokens.name, logits.name, spec.specificationVersion) == ("inputIds", "logits", 9)
    (one, length) = tokens.type.multiArrayType.shapeRange.sizeRanges
    assert (one.upperBound, length.lowerBound, length.upperBound) == (1, 1, 64)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Mistral", {"sliding_window": 64}),
        ("Llama", {"hidden_act": "swish"}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ],
)
def test_architectures(tmp_path, kind, fields):
    done = export.export(pack(tmp_path / "packed", kind, **fields), tmp_path / "M.mlpackage")
    assert done.program.cosine > 0.99995


def test_a_tied_weight_may_have_the_name_of_the_head(packed, tmp_path):
    frozen, dense, _ = checkpoint.read(packed)
    frozen["lm_head.weight"] = frozen.pop("model.embed_tokens.weight")
    pretrained.save_pretrained(tmp_path / "packed", frozen, dense, {}, pretrained.load(packed))
    assert export.export(tmp_path / "packed", tmp_path / "M.mlpackage").program.cosine > 0.99995


def test_large_activations_fit_float16(tmp_path):
    directory = pack(tmp_path / "packed")
    frozen, dense, _ = checkpoint.read(directory)
    name = "model.embed_tokens.weight"
    # Squares of these values are beyond float16; the norm brings them back.
    frozen[name] = frozen[name]._replace(lut=frozen[name].lut * 4000)
    model = pretrained.load(directory)
    pretrained.save_pretrained(tmp_path / "large", frozen, dense, {}, model)
    with torch.no_grad():
        assert pretrained.load(tmp_path / "large").model.embed_tokens.weight.abs().max() > 1000
    # The logits go through the same weights: keep them within float16 by what the last norm multiplies with.
    dense["model.norm.weight"] = dense["model.norm.weight"] * 1e-3
    pretrained.save_pretrained(tmp_path / "large", frozen, dense, {}, model)
    assert export.export(tmp_path / "large", tmp_path / "M.mlpackage").program.cosine > 0.9999


def test_arithmetic_agrees_with_coremltools():
    """Each operation on constants, where coremltools computes it too."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function

    x = np.linspace(-2, 3, 24, dtype=np.float32).reshape(2, 3, 4)
    y = (x[:, ::-1] + 0.3).copy()
    masks = [False, True, False]
    given = {
        "abs": {"x": x},
        "add": {"x": x, "y": y},
        "cast": {"x": x, "dtype": "int32"},
        "concat": {"values": [x, y], "axis": -1},
        "expand_dims": {"x": x, "axes": [0, 2]},
        "gather": {"x": x, "indices": np.array([[1, 0], [0, 2]], np.int32), "axis": 1},
        "greater": {"x": x, "y": y},
        "linear": {"x": x, "weight": np.ones((5, 4), np.float32) * 0.3, "bias": np.arange(5, dtype=np.float32)},
        "maximum": {"x": x, "y": y},
        "mul": {"x": x, "y": y},
        "range_1d": {"start": 2, "end": 11, "step": 3},
        "real_div": {"x": x, "y": y},
        "reduce_max": {"x": x, "axes": [-1], "keep_dims": True},
        "reduce_mean": {"x": x, "axes": [-1], "keep_dims": True},
        "reshape": {"x": x, "shape": [4, -1]},
        "rsqrt": {"x": np.abs(x) + 1, "epsilon": np.float32(0.5)},
        "scaled_dot_product_attention": None,
        "shape": {"x": x},
        "silu": {"x": x},
        "slice_by_index": {"x": x, "begin": [1, 0, 1], "end": [2, 0, 3], "end_mask": masks, "squeeze_mask": [True, False, False]},
        "slice_update": None,
        "split": {"x": x, "num_splits": 2, "axis": -1},
        "sub": {"x": x, "y": y},
        "tile": {"x": x, "reps": [1, 2, 3]},
        "transpose": {"x": x, "perm": [2, 0, 1]},
    }  # fmt: skip
    assert given.keys() == arithmetic._OPERATIONS.keys()
    compared = set()
    with Function({}, opset_version=ct.target.iOS18):
        for kind, arguments in given.items():
            if arguments is None:
                continue
            made = getattr(mb, kind)(**arguments)
            made = made if isinstance(made, (list, tuple)) else [made]
            if made[0].val is None:
                continue
            op = made[0].op
            inputs = {
                name: [arithmetic._tensor(v.val) for v in var] if isinstance(var, (list, tuple)) else arithmetic._tensor(var.val)
                for name, var in op.inputs.items()
                if var is not None
            }
            ours = arithmetic._OPERATIONS[kind](**inputs)
            for var, result in zip(made, ours if isinstance(ours, tuple) else (ours,), strict=True):
                np.testing.assert_allclose(np.asarray(result), var.val, rtol=1e-6, atol=1e-6)
            compared.add(kind)
    # coremltools has no arithmetic for these three.
    assert given.keys() - compared == {"scaled_dot_product_attention", "slice_update", "silu"}


def swapped(frozen, precision, real=weights.palette):
    found = real(frozen, precision)
    return found._replace(indices=found.indices[:, ::-1].copy())


def nudged(frozen, precision, real=weights.palette):
    found = real(frozen, precision)
    lut = found.lut.copy()
    lut[-1, 0, 0, 0] = np.nextafter(lut[-1, 0, 0, 0], np.float16(1))
    return found._replace(lut=lut)


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (weights, "palette", swapped, "model.embed_tokens.weight: differs in the package"),
        (weights, "palette", nudged, "model.embed_tokens.weight: differs in the package"),
        (program, "_NEVER", 0, "the exported program differs from the packed model: cosine"),
        (program, "_repeat", lambda mb, x, arch: mb.tile(x=x, reps=[1, 2, 1, 1]), "the exported program differs"),
    ],
)
def test_a_wrong_package_is_not_left_there(packed, tmp_path, monkeypatch, module, name, value, message):
    monkeypatch.setattr(module, name, value)
    with pytest.raises(ValueError, match=message):
        export.export(packed, tmp_path / "M.mlpackage")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A model for texts that are longer than the one of the check."""
    return pack(tmp_path_factory.mktemp("long"), max_position_embeddings=128)


@pytest.mark.parametrize("name", ["cosines", "sines"])
@pytest.mark.parametrize("kv_cache", [False, True])
def test_a_position_that_no_text_of_the_check_reaches(long, tmp_path, monkeypatch, name, kv_cache):
    real = program._between

    def wrong(mb, rope, *rest):
        table = rope[name].clone()
        table[-1, 0] += 1e-2
        return real(mb, rope | {name: table}, *rest)

    monkeypatch.setattr(program, "_between", wrong)
    with pytest.raises(ValueError, match=f"{name}: differs in the package"):
        export.export(long, tmp_path / "M.mlpackage", kv_cache=kv_cache)
    assert list(tmp_path.iterdir()) == []


def test_tables_of_positions_are_not_only_compared_with_themselves(long, tmp_path, monkeypatch):
    real = export.rotary

    def wrong(model, context):
        return {name: torch.cat((table[:16], table[:1].expand(context - 16, -1))) for name, table in real(model, context).items()}

    monkeypatch.setattr(export, "rotary", wrong)
    with pytest.raises(ValueError, match="the exported program differs"):
        export.export(long, tmp_path / "M.mlpackage")


def test_a_cache_that_forgets_is_found(packed, tmp_path, monkeypatch):
    """Both layers update the states as they were at the start, so that the second undoes the first: what coremltools' default passes
    make of a program that reads a state before every update."""
    real = program._cached

    def forgetful(*arguments):
        attend = [real(*arguments) for _ in range(2)]
        return lambda layer, key, value: attend[layer](layer, key, value)

    monkeypatch.setattr(program, "_cached", forgetful)
    with pytest.raises(ValueError, match="the exported program differs"):
        export.export(packed, tmp_path / "M.mlpackage", kv_cache=True)


def test_the_command(packed, tmp_path, capsys):
    out = tmp_path / "M.mlpackage"
    arguments = ["export", str(packed), "--to", "coreml", "--out", str(out), "--context", "12", "--kv-cache"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "15 clustered tensors, indices and tables on the disk equal" in printed.out
    assert "logits of the program: cosine 0.9999" in printed.out
    assert all(line.startswith("export: ") for line in printed.err.splitlines()) and "all checked" in printed.err  # nothing of coremltools
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"edkm: error: {out}: exists; name another or add --overwrite\n"
    assert json.loads((out / "Manifest.json").read_text())["fileFormatVersion"]
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_coremltools_says_nothing(packed, tmp_path, caplog):
    caplog.set_level("WARNING", "coremltools")
    export.export(packed, tmp_path / "M.mlpackage", fixed=True, context=12)
    assert not caplog.records


@pytest.mark.parametrize("kv_cache", [False, True])
def test_the_device_check_with_a_stand_in(packed, tmp_path, monkeypatch, kv_cache):
    """What runs on macOS, with `arithmetic` in the place of Core ML."""
    import coremltools as ct

    out = tmp_path / "M.mlpackage"
    export.export(packed, out, kv_cache=kv_cache, context=12)
    function = check.read(out)

    class Model:
        def __init__(self, path):
            assert path == str(out)

        def make_state(self):
            return {name: torch.zeros(2, 1, 2, 12, 8) for name in ("keyCache", "valueCache")}

        def predict(self, given, state=None):
            assert (state is not None) == kv_cache
            assert given["inputIds"].dtype == np.int32 and (not kv_cache or given["fullAttentionMask"].dtype == np.float16)
            inputs = {name: torch.from_numpy(value.astype(np.int32 if name == "inputIds" else np.float32)) for name, value in given.items()}
            return {"logits": arithmetic.run(function, inputs, state or {})[0].numpy()}

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
