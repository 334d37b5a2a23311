"""The packed checkpoint on disk.

1. A checkpoint reads as it was written, in one file or several; the same tensors give the same bytes.
2. Checkpoints written by earlier code load, to the bit.
3. docs/format.md describes the files: its reader in numpy reads them, its fields are those that are written.
4. `summary` counts bytes, weights and bits from the headers alone.
5. A failed write leaves the previous checkpoint as it was.
6. Every flipped bit, every truncation and every contradiction between `config.json`, index and files is refused in one line.
7. A writer refuses tensors that do not fit together, before anything is written.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import edit_json, freeze
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edkm import output
from edkm.compressed import weightfiles
from edkm.compressed.checkpoint import FormatError, Packed, dequantize, read, summary, write
from edkm.core.assign import Frozen

NAME, OTHER = "layers.0.proj.weight", "layers.1.proj.weight"
BEFORE = Path(__file__).parent / "packed_before"
DOCS = Path(__file__).parents[2] / "docs" / "format.md"


def save(directory: Path, tensors: dict[str, Frozen], dense: dict[str, torch.Tensor]) -> Path:
    packed = write(directory, tensors, dense, {"bits": 3})
    (directory / "config.json").write_text(json.dumps({"quantization_config": packed}))
    return directory


def dense_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "norm.weight": torch.randn(5).bfloat16(),
        "head.bias": torch.randn(3, 2),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "half.weight": torch.randn(3, 3).half().t(),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "model", {NAME: freeze((6, 7), 3, luts=2), OTHER: freeze((8, 3, 2), 4, dim=2)}, dense_tensors())


def contents(packed: Packed, empty: bool = True) -> dict[str, tuple]:
    """All values, comparable; a tensor without values has no bytes that a checksum could cover."""
    flat = {f"{name} {field}": t for name, f in packed.frozen.items() for field, t in zip(("indices", "lut"), f[:2])} | packed.dense
    return {name: (t.dtype, tuple(t.shape), t.tolist()) for name, t in flat.items() if empty or t.numel()}


def store(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file with right checksums, and as before `described` was."""
    crc = {name: weightfiles.checksum(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt", "edkm": json.dumps({"crc32": crc})})


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    start = first_byte(data)
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def refuses(directory: Path, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(directory)
    assert "\n" not in str(caught.value)


def first_byte(file: bytes) -> int:
    """Where the header ends."""
    return 8 + int.from_bytes(file[:8], "little")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'edkm', got 'gptq'"),
        ({"format_version": 3}, "format_version must be 1 to 2, got 3. Use a newer edkm"),
        ({"format_version": True}, "format_version must be 1 to 2, got True"),
        ({"format_version": 2}, f"{NAME}: lacks rows"),
        ({"scales": 1}, "unknown fields scales. Use a newer edkm"),
        ({"a\nb" * 1000: 1}, r"unknown fields a\\nba.* \.\.\. .*Use a newer edkm"),
        ({"tensors": []}, "tensors must be an object"),
        (lambda c: c.pop("settings"), "quantization_config: lacks settings"),
        (lambda c: c["tensors"].update({NAME: 3}), f"{NAME}: must be an object, got 3"),
        (lambda c: c["tensors"].pop(NAME), "header and config.json are not of one model"),
        (lambda c: c["tensors"].update(ghost=c["tensors"][NAME]), "ghost: is in config.json but in no file"),
        (lambda c: c["tensors"][NAME].pop("dim"), f"{NAME}: lacks dim"),
        ({"zero": 1}, f"{NAME}: has unknown fields zero"),
        ({"rows": 6}, f"{NAME}: has unknown fields rows"),
        ({"bits": 9}, "bits must be 1 to 8, got 9"),
        ({"bits": "3"}, "bits must be 1 to 8, got '3'"),
        ({"bits": 4}, r"must be uint8 \[21\] for 4 bits"),
        ({"shape": 7}, "shape must be a list, got 7"),
        ({"shape": []}, "list of positive numbers"),
        ({"shape": [6, -7]}, "list of positive numbers"),
        ({"shape": [6, 10**4000]}, "list of positive numbers"),
        ({"shape": [6, 2**60]}, "must be uint8"),
        ({"shape": [7, 6], "luts": 1}, r"must be float16 \[1, 5 to 8, 1\]"),
        ({"shape": [6, 7, 1]}, "header and config.json are not of one model"),
        ({"dim": 5}, "must divide the 6 rows, got dim 5"),
        ({"luts": 0}, "must divide the 6 rows, got dim 1 and luts 0"),
        ({"luts": 3}, r"must be float16 \[3, 5 to 8, 1\]"),
        ({"error": -1.0}, "error must be a finite number from 0"),
        ({"error": 10**400}, "error must be a finite number from 0"),
    ],
)
def test_a_quantization_config_that_contradicts_the_format_is_refused(saved: Path, change: Any, message: str):
    def apply(config: dict[str, Any]) -> None:
        if callable(change):
            change(config)
        else:
            of_a_tensor = change.keys() & {"zero", "rows", "bits", "shape", "dim", "luts", "error"}
            (config["tensors"][NAME] if of_a_tensor else config).update(change)

    edit_json(saved / "config.json", lambda content: apply(content["quantization_config"]))
    refuses(saved, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 2}, r"must divide the 2 rows, got dim 3 and luts 4"),
        ({"rows": 4}, r"rows must be the product of the first lengths of \[2, 12, 5\], got 4"),
        ({"rows": 24.0}, r"rows must be the product of the first lengths"),
        ({"rows": True}, r"rows must be the product of the first lengths"),
        ({"rows": 120, "luts": 16}, "must divide the 120 rows, got dim 3 and luts 16"),
    ],
)
def test_rows_that_do_not_fit_the_shape_are_refused(tmp_path: Path, fields: dict[str, Any], message: str):
    directory = save(tmp_path / "model", {NAME: freeze((2, 12, 5), 3, luts=4, dim=3, row_axes=2)}, {})
    assert read(directory).quantization_config["tensors"][NAME]["rows"] == 24
    edit_json(directory / "config.json", lambda content: content["quantization_config"]["tensors"][NAME].update(fields))
    refuses(directory, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json: No such file or directory"),
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        ("", "must have 1 to 524"),
        ('{"a": "' + "x" * 600_000 + '"}', "must have 1 to 524"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "has no quantization_config. This is an ordinary model"),
    ],
)
def test_a_config_json_that_is_no_json_object_is_refused(saved: Path, text: str | None, message: str):
    (saved / "config.json").unlink()
    if text is not None:
        (saved / "config.json").write_text(text)
    refuses(saved, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME + "_lut"), f"{NAME}_lut: is in config.json but in no file"),
        (lambda t: t.update({NAME: t[NAME].int()}), r"must be uint8 \[16\].*got int32 \[16\]"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), r"got uint8 \[15\]"),
        (lambda t: t.update({NAME: t[NAME].view(4, 4)}), r"got uint8 \[4, 4\]"),
        (lambda t: t[NAME][-1:].fill_(128), "2 padding bits after index 41 must be zero"),
        (lambda t: t.update({NAME + "_lut": t[NAME + "_lut"].float()}), r"must be float16.*got float32"),
        (lambda t: t.update({NAME + "_lut": t[NAME + "_lut"].view(2, 8)}), r"got float16 \[2, 8\]"),
        (lambda t: t.update({NAME + "_lut": t[NAME + "_lut"][:, :4].clone()}), r"5 to 8, 1\], got .* \[2, 4, 1\]"),
        (lambda t: t.update({NAME + "_lut": t[NAME + "_lut"][:, :5].clone()}), "indices must be below 5, got 7"),
        (lambda t: t[NAME + "_lut"][0, 0].fill_(torch.nan), "every centroid must be finite"),
        (lambda t: t[NAME + "_lut"][1, 7].fill_(torch.inf), "every centroid must be finite"),
    ],
)
def test_stored_tensors_that_contradict_their_entry_are_refused(saved: Path, change: Callable[[Any], Any], message: str):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    store(saved / "model.safetensors", tensors)
    refuses(saved, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["norm.weight"].update(dtype="F16"), "header and config.json are not of one model"),
        (lambda h: h["head.bias"].update(shape=[2, 3]), "header and config.json are not of one model"),
        (lambda h: h["empty"].update(shape=[0, 2**63]), "header and config.json are not of one model"),
        (lambda h: h["norm.weight"].update(dtype="F16\n"), r"not a whole safetensors file .*`F16\\n`"),
        (lambda h: h.update(x={"dtype": "U8", "shape": [0] * 600_000, "data_offsets": [0, 0]}), "have a header of at most 636"),
        (lambda h: h.update({"a\n": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), r"a\\n: a name must be printable"),
        (lambda h: h["__metadata__"].update(edkm='{"crc32": {}, "crc64": {}}'), r"unknown fields \['crc64'\]"),
        (lambda h: h["__metadata__"].update(edkm='{"crc32": {}}'), "has no checksum"),
        (lambda h: h["__metadata__"].update(edkm='{"crc32": {"a": 1}}'), "has no edkm checksums"),
        (lambda h: h["__metadata__"].update(edkm="{"), "has no edkm checksums"),
        (lambda h: h.pop("__metadata__"), "has no edkm checksums"),
    ],
)
def test_a_header_that_was_changed_is_refused(saved: Path, change: Callable[[dict[str, Any]], Any], message: str):
    edit_header(saved / "model.safetensors", change)
    refuses(saved, message)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_pipes_devices_and_directories_are_refused_at_once_and_links_are_followed(saved: Path, tmp_path: Path, file: str):
    (saved / file).rename(tmp_path / file)
    refuses(saved, f"{file}: No such file or directory")
    os.mkfifo(tmp_path / "pipe")
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to(tmp_path / "pipe"), lambda path: path.symlink_to("/dev/zero")):
        make(saved / file)
        refuses(saved, f"{file}: must be a regular file, or a link to one")
        (saved / file).rmdir() if (saved / file).is_dir() else (saved / file).unlink()
    (saved / file).symlink_to(tmp_path / file)
    assert read(saved).frozen.keys() == {NAME, OTHER}


def test_every_flipped_bit_and_every_truncation_is_refused(saved: Path):
    before = contents(read(saved), empty=False)
    path = saved / "model.safetensors"
    data = path.read_bytes()
    start, accepted = first_byte(data), 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if position >= start:
            refuses(saved, "bytes do not have their checksum")
            continue
        # In the header some bits mean nothing to us ("format", the case of a hexadecimal digit, spaces).
        try:
            assert contents(read(saved), empty=False) == before
            accepted += 1
        except FormatError:
            pass
    assert accepted < 40
    for length in [0, 7, 8, start - 1, start, len(data) - 1]:
        path.write_bytes(data[:length])
        refuses(saved, "not a whole safetensors file")
    path.write_bytes(data + b"\0")
    refuses(saved, "not a whole safetensors file")


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/a.safetensors", "a\\b.safetensors", "c:a.safetensors", ".safetensors", "a.bin", 3]
)
def test_an_index_cannot_lead_out_of_the_directory(saved: Path, file: Any):
    (saved / "model.safetensors").rename(saved.parent / "model.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: file}}))
    refuses(saved, "must lie in a plain")


def test_an_index_must_agree_with_the_files(saved: Path):
    whole, single = contents(read(saved)), saved / "model.safetensors"
    tensors = load_file(single)
    single.rename(saved / "old")
    parts = {"a.safetensors": {NAME + "_lut": tensors.pop(NAME + "_lut")}, "b.safetensors": tensors}  # a table without its indices
    for file, part in parts.items():
        store(saved / file, part)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = saved / "model.safetensors.index.json"
    for content, message in (
        ({}, "weight_map must be an object"),
        ({"weight_map": weight_map | {"ghost": "a.safetensors"}}, "lists other tensors for this file"),
        ({"weight_map": weight_map | {"norm.weight": "a.safetensors"}}, "lists other tensors for this file"),
    ):
        index.write_text(json.dumps(content))
        refuses(saved, message)
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert contents(read(saved)) == whole
    (saved / "old").rename(single)
    refuses(saved, "holds both")


GOOD, WEIGHT = freeze((6, 7), 3), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("tensors", "dense", "message"),
    [
        ({NAME: GOOD._replace(lut=GOOD.lut.float())}, {}, "lut must be float16"),
        ({NAME: GOOD._replace(shape=(7, 6))}, {}, r"rows must be the product of the first lengths of \[7, 6\], got 6"),
        ({NAME: GOOD._replace(shape=(6, 8))}, {}, r"indices must be uint8 \[6, 8\]"),
        ({NAME: GOOD._replace(indices=GOOD.indices.int())}, {}, "indices must be uint8"),
        ({NAME: GOOD._replace(lut=GOOD.lut.repeat(4, 1, 1))}, {}, "must divide the 6 rows"),
        ({NAME: GOOD._replace(lut=GOOD.lut[:, :1])}, {}, "bits must be 1 to 8, got 0"),
        ({NAME: GOOD._replace(lut=GOOD.lut[:, :6])}, {}, "indices must be below 6, got 7"),
        ({NAME: GOOD._replace(lut=GOOD.lut * torch.inf)}, {}, "every centroid must be finite"),
        ({NAME: GOOD._replace(error=float("nan"))}, {}, "error must be a finite number"),
        ({NAME: GOOD}, {NAME: WEIGHT}, "the name is taken"),
        ({"a\nb": GOOD}, {}, r"a\\nb: a name must be printable"),
        ({NAME: GOOD}, {NAME + "_lut": WEIGHT}, "the name is taken"),
        ({}, {"__metadata__": WEIGHT}, "the name is taken"),
        ({}, {"a": WEIGHT, "b": WEIGHT}, "b: is the same memory as a"),
        ({}, {"a": torch.zeros(2, dtype=torch.complex64)}, "a: torch.complex64 cannot be stored"),
    ],
)
def test_tensors_that_do_not_fit_together_are_not_written(tmp_path: Path, tensors: Any, dense: Any, message: str):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, tensors, dense, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, {NAME: GOOD}, {}, {"softness": float("nan")})
    assert list(tmp_path.iterdir()) == []
