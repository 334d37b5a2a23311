"""The packed checkpoint on disk.

1. A checkpoint reads as it was written, in one file or several; the same tensors give the same bytes.
2. Checkpoints written by earlier code load, to the bit.
3. docs/format.md describes the files: its reader in numpy reads them, its fields are those that are written.
4. `summary` counts bytes, weights and bits from the headers alone.
5. A failed write leaves the previous checkpoint as it was.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointing import NAME, contents, dense_tensors, first_byte, refuses, save, save_small
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import freeze
from safetensors import safe_open

from edkm import output
from edkm.compressed import weightfiles
from edkm.compressed.checkpoint import dequantize, read, summary, write
from edkm.core.assign import Frozen

BEFORE = Path(__file__).parent / "packed_before"
DOCS = Path(__file__).parents[2] / "docs" / "format.md"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_small(tmp_path / "model")


@st.composite
def clustered(draw: st.DrawFn) -> Frozen:
    bits, luts, dim = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rest = draw(st.lists(st.integers(1, 5), max_size=2))
    k = draw(st.integers(2 ** (bits - 1) + 1, 2**bits))
    before = draw(st.lists(st.integers(1, 4), max_size=2))
    return freeze((*before, luts * dim * draw(st.integers(1, 4)), *rest), bits, luts, dim, k, row_axes=len(before) + 1)


@given(tensor=clustered())
@settings(deadline=None, max_examples=60)
def test_a_clustered_tensor_reads_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, tensor: Frozen):
    packed = read(save(tmp_path_factory.mktemp("model"), {NAME: tensor}, {}))
    assert packed.dense == {} and packed.frozen.keys() == {NAME}
    got = packed.frozen[NAME]
    assert torch.equal(got.indices, tensor.indices) and torch.equal(got.lut, tensor.lut)
    assert (got.shape, got.error, got.bits) == (tensor.shape, tensor.error, tensor.bits)
    assert torch.equal(dequantize(got), dequantize(tensor)) and dequantize(got).shape == tensor.shape


def test_dense_tensors_and_settings_read_as_they_were_written_and_outlive_the_file(saved: Path):
    packed = read(saved)
    path = saved / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert packed.dense.keys() == dense_tensors().keys()
    for name, tensor in dense_tensors().items():
        assert packed.dense[name].dtype == tensor.dtype and torch.equal(packed.dense[name], tensor)
    assert packed.quantization_config["settings"] == {"bits": 3}


@pytest.mark.parametrize(
    ("directory", "values"),
    [
        ("version_1", "89c795e48291f03a5887e74b4e8e7636692b3b2111da676fca48f7bec1cc61fc"),
        ("version_1_several_files", "ec5ffb8049c53acae6a357c736c42e018b2345defadf945c99630ae53de63a6e"),
        ("version_2", "7eeb03c4471276a2849711d1bca6ca449c4a1066fcdae9f1dab2ac3cf779d7f6"),
    ],
)
def test_checkpoints_of_earlier_code_load_and_are_written_the_same(directory: str, values: str, tmp_path: Path):
    """Bits 1 to 8, tables of single values and of vectors, all kinds of dense tensors; the hashes were made by the same code."""
    packed = read(BEFORE / directory)
    digest = hashlib.sha256()
    tensors = {name: dequantize(tensor) for name, tensor in packed.frozen.items()} | packed.dense
    for name, tensor in sorted(tensors.items()):
        array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    assert digest.hexdigest() == values
    again = save(tmp_path, packed.frozen, packed.dense)
    assert read(again).quantization_config == packed.quantization_config
    if "several" not in directory:
        assert (again / "model.safetensors").read_bytes() == (BEFORE / directory / "model.safetensors").read_bytes()


def test_files_are_plain_safetensors(saved: Path):
    with safe_open(saved / "model.safetensors", framework="pt") as handle:
        assert handle.get_tensor(NAME).dtype == torch.uint8 and handle.get_tensor(NAME).shape == (16,)  # 42 indices of 3 bits
        assert handle.get_tensor(NAME + "_lut").shape == (2, 8, 1) and handle.metadata()["format"] == "pt"


def test_several_files_replace_one_and_one_replaces_several(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = read(saved)
    monkeypatch.setattr(weightfiles, "MAX_FILE_BYTES", 50)
    save(saved, before.frozen, before.dense)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and {path.name for path in saved.glob("*.safetensors")} == files
    assert contents(read(saved)) == contents(before)
    assert summary(saved)["weights"] == 42 + 48 + 5 + 6 + 1 + 3 + 0 + 9
    monkeypatch.undo()
    save(saved, before.frozen, before.dense)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_write_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(saved, {NAME: freeze((4, 4), 2)}, {}, {})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_summary_counts_bytes_weights_and_bits(saved: Path):
    result = summary(saved)
    first = result["tensors"][0]
    assert (first["name"], first["bits"], first["luts"], first["shape"]) == (NAME, 3, 2, [6, 7])
    assert first["stored_bytes"] == 16 + 2 * 8 * 2 and first["bits_per_weight"] == pytest.approx(8 * 48 / 42)
    assert result["file_bytes"] == (saved / "model.safetensors").stat().st_size
    assert result["dense_weights"] == 24 and result["dense_tensors"] == 6
    assert result["bytes_in_16_bits"] == 2 * result["weights"] == 2 * (42 + 48 + 24)
    assert result["bits_per_weight"] == pytest.approx(8 * result["file_bytes"] / result["weights"])
    # 24 indices of 4 bits and 16 centroids of two values
    assert result["clustered_bits_per_weight"] == pytest.approx(8 * (48 + 12 + 64) / (42 + 48))
    json.dumps(result, allow_nan=False)


def test_summary_counts_embeddings_separately_and_reads_no_data(tmp_path: Path):
    directory = save(tmp_path, {NAME: freeze((4, 8), 2), "model.embed_tokens.weight": freeze((16, 8), 8)}, {})
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: first_byte(data)].ljust(len(data), b"\0"))
    result = summary(directory)
    assert [row["embedding"] for row in result["tensors"]] == [False, True]
    assert result["clustered_bits_per_weight"] == 8 * (8 + 8) / 32
    refuses(directory, "do not have their checksum")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limit", [600_000_000, 60])
def test_the_reader_of_the_format_page_reads_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, version: int):
    monkeypatch.setattr(weightfiles, "MAX_FILE_BYTES", limit)
    tensors = {f"layers.{bits}.weight": freeze((12, 5), bits, luts=2, dim=3) for bits in range(1, 9)}
    tensors |= {"fused.weight": freeze((4, 3, 2), 3), "bias": freeze((6,), 2, k=3)}
    if version == 2:
        tensors |= {"experts.up": freeze((2, 6, 5), 3, luts=4, dim=3, row_axes=2), "experts.down": freeze((2, 3, 5), 2, luts=6, row_axes=2)}
    directory = save(tmp_path, tensors, {"norm.weight": torch.ones(3, dtype=torch.bfloat16)})
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[-1], scope)
    weights = scope["read_clustered"](directory)
    assert read(directory).quantization_config["format_version"] == version and weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(weights[name], dequantize(tensor, torch.float16).numpy())


def test_the_format_page_has_the_fields_that_are_written(saved: Path):
    config, text = read(saved).quantization_config, DOCS.read_text()
    example = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
    assert example.keys() == config.keys()
    assert next(iter(example["tensors"].values())).keys() == config["tensors"][NAME].keys()
    assert {*config, *config["tensors"][NAME], "rows"} <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
