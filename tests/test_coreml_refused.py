"""Core ML export: what it refuses, and that nothing that was on the disk is lost."""

import sys
from pathlib import Path

import pytest
import torch
from test_coreml import pack

from edkm.compressed.coreml import export, weights
from edkm.compressed.entries import read_entries


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed"))


def test_five_bits_need_a_word(tmp_path):
    directory = pack(tmp_path / "packed", plans=[(5, 32, 1, 20), (7, 16, 1, 100), (4, 16, 1, 16)])
    odd = {name for name, entry in read_entries(directory).items() if entry.bits in (5, 7)}
    with pytest.raises(ValueError, match=rf"\S+: [57] bits; Core ML has 1, 2, 3, 4, 6, 8 \({len(odd)} such tensors\). Use --widen"):
        export.export(directory, tmp_path / "M.mlpackage")
    assert not (tmp_path / "M.mlpackage").exists()
    done = export.export(directory, tmp_path / "M.mlpackage", widen=True)
    assert set(done.widened.values()) == {6, 8} and done.widened.keys() == odd
    assert done.program.cosine > 0.99995


@pytest.mark.parametrize(
    ("options", "out", "message"),
    [
        ({"precision": "bfloat16"}, "M.mlpackage", "precision: must be one of float16, float32"),
        ({"kv_cache": True, "fixed": True}, "M.mlpackage", "fixed: a model with a cache"),
        ({}, "M.mlmodel", "the name of a Core ML package ends in .mlpackage"),
        ({}, "taken.mlpackage", "exists; name another or add --overwrite"),
        ({"overwrite": True}, "taken.mlpackage", "exists and is no package"),
        ({}, "missing/M.mlpackage", "its directory does not exist"),
        ({}, "dangling.mlpackage", "is a symbolic link; name the package itself"),
        ({"overwrite": True}, "link.mlpackage", "is a symbolic link; name the package itself"),
        ({"context": 65}, "M.mlpackage", "attends to 1 to 64 tokens at a time, got 65"),
        ({"context": 0}, "M.mlpackage", "attends to 1 to 64 tokens at a time, got 0"),
    ],
)
def test_options_are_refused(packed, tmp_path, monkeypatch, options, out, message):
    (tmp_path / "taken.mlpackage").mkdir()
    (tmp_path / "dangling.mlpackage").symlink_to(tmp_path / "nothing")
    (tmp_path / "link.mlpackage").symlink_to(tmp_path / "taken.mlpackage")
    before = set(tmp_path.iterdir())
    # Before any work.
    monkeypatch.setattr(export, "_reference", None)
    with pytest.raises(ValueError, match=message):
        export.export(packed, tmp_path / out, **options)
    assert set(tmp_path.iterdir()) == before


def test_a_package_is_replaced_or_stays(packed, tmp_path, monkeypatch):
    out, real = tmp_path / "M.mlpackage", Path.rename
    out.mkdir()
    (out / "Manifest.json").write_text("old")

    def rename(path, target):
        if (path.parent != tmp_path, path.name, target) == (True, out.name, out):
            # Where a process may be killed: the old package is still on the disk.
            assert [found for found in tmp_path.rglob("Manifest.json") if found.parent != path]
            raise OSError("the disk is gone")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        export.export(packed, out, overwrite=True, context=12)
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "Manifest.json").read_text() == "old"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("Gemma", {}, "the architecture 'gemma' is not among"),
        ("Llama", {"hidden_act": "gelu"}, "the activation 'gelu' is not silu"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
    ],
)
def test_architectures_are_refused(tmp_path, kind, fields, message):
    directory = pack(tmp_path / "packed", kind, **fields)
    with pytest.raises(ValueError, match=message) as error:
        export.export(directory, tmp_path / "M.mlpackage")
    assert "edkm unpack" in str(error.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("Model", r"has neither model\.embed_tokens\.weight nor lm_head\.weight; Core ML export takes causal language models"),
        ("ForQuestionAnswering", r"has neither model\.embed_tokens\.weight"),
        ("ForSequenceClassification", r"the exported program has no place for score\.weight \(1 such tensors\)"),
    ],
)
def test_other_heads_are_refused(tmp_path, monkeypatch, head, message):
    directory = pack(tmp_path / "packed", head=head)
    # Before the model is loaded.
    monkeypatch.setattr(export, "_reference", None)
    with pytest.raises(ValueError, match=message):
        export.export(directory, tmp_path / "M.mlpackage")


def test_the_architecture_comes_before_a_remedy_for_a_tensor(tmp_path):
    directory = pack(tmp_path / "packed", "Gemma", plans=[(5, 32, 1, 20)])
    with pytest.raises(ValueError, match="the architecture 'gemma' is not among"):
        export.export(directory, tmp_path / "M.mlpackage")


def test_a_sliding_window_limits_the_context(tmp_path):
    directory = pack(tmp_path / "packed", "Mistral", sliding_window=16)
    with pytest.raises(ValueError, match="attends to 1 to 16 tokens at a time, got 17"):
        export.export(directory, tmp_path / "M.mlpackage", context=17)


def test_llama_has_no_sliding_window(tmp_path):
    directory = pack(tmp_path / "packed", sliding_window=16)
    assert export.export(directory, tmp_path / "M.mlpackage", context=17).program.cosine > 0.99995


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_dense_tensors_of_any_dtype(dtype, precision):
    values = torch.tensor([1.0, -0.25, 3.5])
    found = weights.dense("norm.weight", values.to(dtype), precision)
    assert found.dtype == precision and found.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("value", "dtype", "precision", "message"),
    [
        (-7e4, torch.float32, "float16", r"70000 is beyond the range of float16\. Use --precision float32"),
        (1e300, torch.float64, "float16", r"1e\+300 is beyond the range of float16"),
        (1e300, torch.float64, "float32", r"1e\+300 is beyond the range of float32\. Repair the model"),
        (float("nan"), torch.float16, "float16", "has values that are NaN or infinite"),
        (float("nan"), torch.float8_e4m3fn, "float32", "has values that are NaN or infinite"),
        (float("-inf"), torch.bfloat16, "float32", "has values that are NaN or infinite"),
    ],
)
def test_values_that_do_not_fit_are_refused(value, dtype, precision, message):
    with pytest.raises(ValueError, match=rf"norm\.weight: {message}"):
        weights.dense("norm.weight", torch.tensor([1.0, value], dtype=torch.float64).to(dtype), precision)


def test_without_coremltools(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ValueError, match=r"pip install 'edkm\[coreml\]'"):
        export.export(packed, tmp_path / "M.mlpackage")
