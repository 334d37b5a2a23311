"""Tensors in a format in the packed checkpoint (version 3).

1. Each format reads as it was written, beside free tables, and takes the bits a weight that it announces.
2. docs/format.md lists the formats, and its reader in numpy reads each to the bit.
3. Entries, parts and values that contradict the format are refused in one line, when written and when read.
4. Indices that come later are written as those that are there.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointing import NAME, OTHER, refuses, save, store
from packed import blocks, edit_json, freeze
from safetensors.torch import load_file

from edkm.cli import main
from edkm.compressed.checkpoint import FormatError, dequantize, read, summary, write
from edkm.core.assign import LazyFrozen
from edkm.core.formats import FORMATS

DOCS = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
SHAPE = (5, 512)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_reads_as_it_was_written(name: str, tmp_path: Path):
    tensor, table = blocks(SHAPE, name), freeze((6, 7), 3)
    packed = read(save(tmp_path, {NAME: tensor, OTHER: table}, {}))
    got, free = packed.frozen[NAME], packed.frozen[OTHER]
    assert got.format == name and got.shape == SHAPE and got.error == tensor.error and torch.equal(got.indices, tensor.indices)
    assert got.parts.keys() == tensor.parts.keys()
    assert all(torch.equal(got.parts[part].float(), value.float()) for part, value in tensor.parts.items())
    assert torch.equal(dequantize(got), dequantize(tensor)) and torch.equal(dequantize(free), dequantize(table))
    entries = packed.quantization_config["tensors"]
    assert entries[NAME].keys() == {"bits", "shape", "error", "rows", "format"}
    assert packed.quantization_config["format_version"] == 3 and entries[OTHER]["format"] == "table"


@pytest.mark.parametrize("name", FORMATS)
def test_the_summary_has_the_bits_a_weight_of_the_format(name: str, tmp_path: Path):
    directory = save(tmp_path, {NAME: blocks(SHAPE, name)}, {})
    row = summary(directory)["tensors"][0]
    stored = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    assert row["stored_bytes"] == stored and row["format"] == name
    assert row["bits_per_weight"] == pytest.approx(FORMATS[name].stored_bits(*SHAPE) / 5 / 512, rel=2e-3)
    assert row["luts"] == 5 * 512 // FORMATS[name].width(512)


def test_inspect_names_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path, {NAME: blocks(SHAPE, "q4_k"), OTHER: freeze((6, 7), 3)}, {})
    assert main(["inspect", str(tmp_path)]) == 0
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[:3])
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["format"], row["bits"], row["tables"], row["bits/weight"]) for row in found] == [
        ("q4_k", "4", "80", "4.500"),
        ("table", "3", "1", "6.095"),
    ]


def test_the_reader_of_the_format_page_reads_each_format(tmp_path: Path):
    tensors = {f"layers.{name}.weight": blocks(SHAPE, name, seed) for seed, name in enumerate(FORMATS)}
    tensors |= {"experts.up": blocks((2, 3, 512), "q3_k", row_axes=2), "odd.weight": blocks((3, 7), "int8_row")}
    directory = save(tmp_path, tensors | {NAME: freeze((6, 7), 3)}, {})
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[-1], scope)
    assert scope["FORMATS"].keys() == FORMATS.keys()
    weights = scope["read_clustered"](directory)
    for name, tensor in tensors.items():
        assert weights[name].dtype == np.float32
        assert np.array_equal(weights[name], dequantize(tensor).numpy()), name


def test_the_format_page_lists_every_format_with_its_parts():
    table = dict(re.findall(r"^\| `([\w{},]+)` \| (.*) \|$", DOCS.partition("## Formats")[2].partition("## The bits")[0], re.MULTILINE))
    for name, form in FORMATS.items():
        row = re.sub(r"^(int|mlx)[2348]_g\d+", r"\1{2,3,4,8}_g{32,64,128}", name)
        parts = [part.split()[0] for part in table[row].split("|")[-1].split(",") if part.split()[0] in form.layout(1, 512)]
        assert sorted(parts) == sorted(form.layout(1, 512)), name


GOOD = blocks((4, 512), "q4_k")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (GOOD._replace(format="q5_k"), "format: 'q5_k' is not one of"),
        (GOOD._replace(format="q3_k"), "the parts of q3_k must be d float16"),
        (GOOD._replace(parts={**GOOD.parts, "d": GOOD.parts["d"].float()}), r"the parts of q4_k must be d float16 \[4, 2\]"),
        (GOOD._replace(parts={"d": GOOD.parts["d"]}), "the parts of q4_k must be"),
        (GOOD._replace(parts={**GOOD.parts, "d": GOOD.parts["d"] * torch.nan}), "every scale, offset and entry must be finite"),
        (GOOD._replace(parts={**GOOD.parts, "scale": GOOD.parts["scale"] | 64}), "scale must be below 64, got"),
        (GOOD._replace(indices=GOOD.indices | 16), "index .* does not fit|indices must be below 16"),
        (GOOD._replace(indices=GOOD.indices[:, :96], shape=(4, 96)), "q4_k needs columns that 256 divides, got 96"),
        (GOOD._replace(shape=(4, 256)), r"indices must be uint8 \[4, 256\]|the parts of q4_k"),
    ],
)
def test_a_tensor_that_does_not_fit_its_format_is_not_written(tensor: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, {NAME: tensor}, {}, {})
    with pytest.raises(FormatError, match="the name is taken"):
        write(tmp_path, {NAME: GOOD}, {NAME + "_dmin": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "q5_k"}, "format must be table, q4_0.*got 'q5_k'. Use a newer edkm"),
        ({"format": ["q4_k"]}, "format must be table, q4_0"),
        ({"format": "table"}, "lacks dim, luts"),
        ({"format": "q3_k"}, "q3_k has indices of 3 bits, got 4"),
        ({"format": "q4_0"}, "_scale: must be float16"),
        ({"dim": 1}, "has unknown fields dim"),
        ({"bits": 5}, "q4_k has indices of 4 bits, got 5"),
        ({"bits": True}, "bits must be 1 to 8, got True"),
        ({"shape": [8, 256]}, "header and config.json are not of one model|must be"),
        ({"shape": [16, 128], "rows": 16}, "q4_k needs columns that 256 divides, got 128"),
        ({"rows": 5}, "rows must be the product of the first lengths"),
        ({"format_version": 2}, "lacks dim, luts"),
        ({"format_version": 4}, "format_version must be 1 to 3, got 4. Use a newer edkm"),
    ],
)
def test_an_entry_that_contradicts_its_format_is_refused(fields: dict[str, Any], message: str, tmp_path: Path):
    directory = save(tmp_path, {NAME: GOOD}, {})

    def change(content: Any) -> None:
        packed = content["quantization_config"]
        (packed if "format_version" in fields else packed["tensors"][NAME]).update(fields)

    edit_json(directory / "config.json", change)
    refuses(directory, message)


def test_a_free_table_of_version_3_without_its_format_is_refused(tmp_path: Path):
    directory = save(tmp_path, {NAME: GOOD, OTHER: freeze((6, 7), 3)}, {})
    edit_json(directory / "config.json", lambda content: content["quantization_config"]["tensors"][OTHER].pop("format"))
    refuses(directory, f"{OTHER}: lacks format")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q4_k", lambda t: t.pop(NAME + "_dmin"), f"{NAME}_dmin: is in config.json but in no file"),
        ("q4_k", lambda t: t.update({NAME + "_d": t[NAME + "_d"].float()}), r"must be float16 \[4, 2\] for q4_k.*got float32"),
        (
            "q4_k",
            lambda t: t.update({NAME + "_scale": t[NAME + "_scale"][:-1].clone()}),
            r"must be uint8 \[48\] for q4_k.*got uint8 \[47\]",
        ),
        ("q4_k", lambda t: t[NAME + "_d"].fill_(torch.inf), "every scale, offset and entry must be finite"),
        ("q8_0", lambda t: t[NAME].fill_(255), "indices must be below 255, got 255"),
        ("tq2_0", lambda t: t[NAME].fill_(255), "indices must be below 3, got 3"),
        ("mxfp4", lambda t: t[NAME + "_exponent"].fill_(255), "every scale, offset and entry must be finite"),
        ("mxfp4", lambda t: t[NAME + "_exponent"].fill_(253), "every scale, offset and entry must be finite"),
        ("nvfp4", lambda t: t[NAME + "_global_scale"].fill_(0), "every scale, offset and entry must be finite"),
        ("mlx4_g64", lambda t: t[NAME + "_scale"].fill_(3e38), "every scale, offset and entry must be finite"),
        ("int3_g128", lambda t: t[NAME + "_zero"][-1:].fill_(255), "padding bits after index 11 must be zero"),
    ],
)
def test_parts_that_contradict_their_format_are_refused(name: str, change: Callable[[Any], Any], message: str, tmp_path: Path):
    directory = save(tmp_path, {NAME: blocks((3, 512) if name == "int3_g128" else (4, 512), name)}, {})
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    store(directory / "model.safetensors", tensors)
    refuses(directory, message)


@pytest.mark.parametrize("name", ["q2_k", "nvfp4", "int4_g64"])
def test_indices_that_come_later_are_written_as_those_that_are_there(name: str, tmp_path: Path):
    tensor = blocks(SHAPE, name)
    lazy = LazyFrozen(tensor.parts, tensor.shape, tensor.rows, tensor.error, lambda: tensor.indices, name)
    assert lazy.bits == tensor.bits
    found = [write(tmp_path / how, {NAME: given}, {}, {}) for how, given in (("now", tensor), ("later", lazy))]
    assert json.dumps(found[0]) == json.dumps(found[1])
    assert (tmp_path / "now/model.safetensors").read_bytes() == (tmp_path / "later/model.safetensors").read_bytes()
