"""Checkpoints that are refused.

1. Every flipped bit, every truncation and every contradiction between `config.json`, index and files is refused in one line.
2. Pipes, devices and directories are refused at once, and an index cannot lead out of the directory.
3. A writer refuses tensors that do not fit together, before anything is written.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import NAME, OTHER, contents, first_byte, refuses, save, save_small, store
from packed import edit_json, freeze
from safetensors.torch import load_file

from edkm.compressed.checkpoint import FormatError, read, write


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_small(tmp_path / "model")


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    start = first_byte(data)
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'edkm', got 'gptq'"),
        ({"format_version": 4}, "format_version must be 1 to 3, got 4. Use a newer edkm"),
        ({"format_version": True}, "format_version must be 1 to 3, got True"),
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
