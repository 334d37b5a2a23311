"""Core ML export refuses early and by name, and loses nothing that was on the disk.

1. Options, paths and contexts that do not fit are refused before any work, with the remedy.
2. Models that are no causal language models, or that cannot be traced, are refused by the name of their kind.
3. Dense values that do not fit the precision are refused by the name of their tensor.
4. A package that is replaced is whole at any moment: the old one or the new one.
"""

import sys
from pathlib import Path

import pytest
import torch
from packed import blocks
from test_coreml import pack

from edkm.compressed import checkpoint, pretrained
from edkm.compressed.coreml import export
from edkm.output import replace_directory

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
OTHER_HEADS = ("Model", "ForQuestionAnswering", "ForSequenceClassification")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed"))


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


def test_formats_that_core_ml_lacks_and_scales_that_float16_lacks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_reference", None)  # before any work
    name = "model.layers.0.mlp.up_proj.weight"
    for form, change, message in (
        ("q4_1", lambda tensor: None, f"{name}: Core ML has no q4_1. Compress the model with free tables .* or with q4_0, q8_0, int8_row"),
        (
            "int8_row",
            lambda tensor: tensor.parts["scale"][0].fill_(1.1e-7),
            f"{name}: float16 does not hold a scale .* --precision float32",
        ),
    ):
        directory = pack(tmp_path / form)
        frozen, dense, _ = checkpoint.read(directory)
        frozen[name] = blocks(frozen[name].shape, form)
        change(frozen[name])
        pretrained.save_pretrained(directory, frozen, dense, {}, pretrained.load(directory))
        with pytest.raises(ValueError, match=message):
            export.export(directory, tmp_path / "M.mlpackage")


def test_a_package_is_replaced_or_stays(tmp_path, monkeypatch):
    out, new, real = tmp_path / "M.mlpackage", tmp_path / "new" / "M.mlpackage", Path.rename
    for package, content in ((out, "old"), (new, "new")):
        package.mkdir(parents=True)
        (package / "Manifest.json").write_text(content)

    def rename(path, target):
        if target == out and path == new:
            # Where a process may be killed: the old package is still on the disk.
            assert "old" in [found.read_text() for found in tmp_path.rglob("Manifest.json")]
            raise OSError("the disk is gone")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="the disk is gone"):
            replace_directory(new, out)
    assert (out / "Manifest.json").read_text() == "old"
    replace_directory(new, out)
    assert (out / "Manifest.json").read_text() == "new" and not new.exists()


@pytest.mark.parametrize(
    ("kind", "head", "fields", "message"),
    [
        ("Gemma2", "ForCausalLM", {"pad_token_id": 0}, "gemma2: torch cannot trace it: its attention caps its scores.*edkm unpack"),
        ("Llama", "ForCausalLM", {"rope_parameters": DYNAMIC}, "rotary positions of type 'dynamic'.*edkm unpack"),
        ("Mistral", "ForCausalLM", {"sliding_window": 16}, "attends to 1 to 16 tokens at a time, got 17"),
        *(("Llama", head, {}, f"Llama{head}: Core ML export takes causal language models.*edkm unpack") for head in OTHER_HEADS),
    ],
)
def test_models_are_refused(tmp_path, monkeypatch, kind, head, fields, message):
    directory = pack(tmp_path / "packed", kind, head=head, **fields)
    if kind != "Gemma2":  # before the model is loaded
        monkeypatch.setattr(export, "_reference", None)
    with pytest.raises(ValueError, match=message) as error:
        export.export(directory, tmp_path / "M.mlpackage", context=17)
    assert len(str(error.value).splitlines()) == 1


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
        export.check_dense("norm.weight", torch.tensor([1.0, value], dtype=torch.float64).to(dtype), precision)


def test_without_coremltools(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ValueError, match=r"pip install 'edkm\[coreml\]'"):
        export.export(packed, tmp_path / "M.mlpackage")
