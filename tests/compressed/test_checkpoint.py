"""The packed checkpoint: what is read is what was written, and whatever else is refused in one line."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edkm.compressed import checkpoint, jsonfile, weightfiles
from edkm.compressed.checkpoint import FormatError, dequantize, read, summary, write
from edkm.core.assign import Frozen

NAME = "layers.0.proj.weight"
BEFORE = Path(__file__).parent / "packed_before"
DOCS = Path(__file__).parents[2] / "docs" / "format.md"


def frozen(shape: tuple[int, ...], bits: int, luts: int = 1, dim: int = 1, k: int | None = None, row_axes: int = 1) -> Frozen:
    generator = torch.Generator().manual_seed(sum(shape) + bits)
    k = k or 2**bits
    rows = int(np.prod(shape[:row_axes]))
    indices = torch.randint(0, k, (rows // dim, int(np.prod(shape[row_axes:]))), dtype=torch.uint8, generator=generator)
    lut = torch.randn(luts, k, dim, generator=generator).sort(1).values.half()
    return Frozen(indices, lut, shape, 0.25)


def save(directory: Path, tensors: dict[str, Frozen], dense: dict[str, torch.Tensor], **config: Any) -> Path:
    packed = write(directory, tensors, dense, {"bits": 3})
    (directory / "config.json").write_text(json.dumps({"quantization_config": packed | config}))
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
    tensors = {NAME: frozen((6, 7), 3, luts=2), "layers.1.proj.weight": frozen((8, 3, 2), 4, dim=2)}
    return save(tmp_path / "model", tensors, dense_tensors())


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the file, with checksums that are right for the changed tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    crc = {name: weightfiles.checksum(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt", "edkm": json.dumps({"crc32": crc})})


def refuses(directory: Path, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(directory)
    assert "\n" not in str(caught.value)


@st.composite
def clustered(draw: st.DrawFn) -> Frozen:
    bits, luts, dim = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rest = draw(st.lists(st.integers(1, 5), max_size=2))
    k = draw(st.integers(2 ** (bits - 1) + 1, 2**bits))
    before = draw(st.lists(st.integers(1, 4), max_size=2))
    shape = (*before, luts * dim * draw(st.integers(1, 4)), *rest)
    return frozen(shape, bits, luts, dim, k, row_axes=len(before) + 1)


@given(tensor=clustered())
@settings(deadline=None, max_examples=60)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tensor: Frozen):
    directory = save(tmp_path_factory.mktemp("model"), {NAME: tensor}, {})
    packed = read(directory)
    assert packed.dense == {} and packed.frozen.keys() == {NAME}
    got = packed.frozen[NAME]
    assert torch.equal(got.indices, tensor.indices) and torch.equal(got.lut, tensor.lut)
    assert (got.shape, got.error, got.bits) == (tensor.shape, tensor.error, tensor.bits)
    assert torch.equal(dequantize(got), dequantize(tensor))
    assert dequantize(got).shape == tensor.shape


def test_dense_tensors_and_settings_come_back(saved: Path):
    packed = read(saved)
    expected = dense_tensors()
    assert packed.dense.keys() == expected.keys()
    for name, tensor in expected.items():
        assert packed.dense[name].dtype == tensor.dtype
        assert torch.equal(packed.dense[name], tensor)
    assert packed.quantization_config["settings"] == {"bits": 3}


@pytest.mark.parametrize(
    ("directory", "values"),
    [
        ("version_1", "89c795e48291f03a5887e74b4e8e7636692b3b2111da676fca48f7bec1cc61fc"),
        ("version_1_several_files", "ec5ffb8049c53acae6a357c736c42e018b2345defadf945c99630ae53de63a6e"),
        ("version_2", "7eeb03c4471276a2849711d1bca6ca449c4a1066fcdae9f1dab2ac3cf779d7f6"),
    ],
)
def test_models_written_by_earlier_code_load(directory: str, values: str, tmp_path: Path):
    """Bits 1 to 8, tables of one and several values, all kinds of dense tensors, one file and several; hashes of the same code."""
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


def test_dequantize_by_hand():
    lut = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]]).half()  # [2, 2, 2]
    tensor = Frozen(torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8), lut, (4, 2), 0.0)
    assert dequantize(tensor).tolist() == [[0, 2], [1, 3], [6, 4], [7, 5]]
    assert dequantize(tensor, torch.bfloat16).dtype == torch.bfloat16


def test_files_are_plain_safetensors_and_reproducible(saved: Path, tmp_path: Path):
    with safe_open(saved / "model.safetensors", framework="pt") as handle:
        assert handle.get_tensor(NAME).dtype == torch.uint8
        assert handle.get_tensor(NAME).shape == (16,)  # 42 indices of 3 bits
        assert handle.get_tensor(NAME + "_lut").shape == (2, 8, 1)
        assert handle.metadata()["format"] == "pt"
    packed = read(saved)
    again = save(tmp_path / "again", packed.frozen, packed.dense)
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert sorted(path.name for path in again.iterdir()) == ["config.json", "model.safetensors"]


def test_several_files(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = read(saved)
    monkeypatch.setattr(weightfiles, "MAX_FILE_BYTES", 50)
    save(saved, before.frozen, before.dense)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and not (saved / "model.safetensors").exists()
    assert index["weight_map"].keys() == {NAME, NAME + "_lut", "layers.1.proj.weight", "layers.1.proj.weight_lut", *dense_tensors()}
    assert {path.name for path in saved.glob("*.safetensors")} == files
    after = read(saved)
    assert all(torch.equal(after.frozen[name].indices, t.indices) for name, t in before.frozen.items())
    assert all(torch.equal(after.dense[name], t) for name, t in before.dense.items())
    assert summary(saved)["weights"] == 42 + 48 + 5 + 6 + 1 + 3 + 0 + 9
    monkeypatch.undo()
    save(saved, before.frozen, before.dense)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_write_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(jsonfile.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(saved, {NAME: frozen((4, 4), 2)}, {}, {})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_tensors_survive_the_file(saved: Path):
    packed = read(saved)
    copies = {name: tensor.clone() for name, tensor in packed.dense.items()}
    path = saved / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(packed.dense[name], tensor) for name, tensor in copies.items())


def test_summary_counts(saved: Path):
    result = summary(saved)
    first = result["tensors"][0]
    assert (first["name"], first["bits"], first["luts"], first["shape"]) == (NAME, 3, 2, [6, 7])
    assert first["stored_bytes"] == 16 + 2 * 8 * 2
    assert first["bits_per_weight"] == pytest.approx(8 * 48 / 42)
    assert result["file_bytes"] == (saved / "model.safetensors").stat().st_size
    assert result["dense_weights"] == 24 and result["dense_tensors"] == 6
    assert result["bytes_in_16_bits"] == 2 * result["weights"] == 2 * (42 + 48 + 24)
    assert result["bits_per_weight"] == pytest.approx(8 * result["file_bytes"] / result["weights"])
    # 24 indices of 4 bits and 16 centroids of two values
    assert result["clustered_bits_per_weight"] == pytest.approx(8 * (48 + 12 + 64) / (42 + 48))
    json.dumps(result, allow_nan=False)


def test_summary_keeps_embeddings_apart_and_reads_no_data(tmp_path: Path):
    tensors = {NAME: frozen((4, 8), 2), "model.embed_tokens.weight": frozen((16, 8), 8)}
    directory = save(tmp_path, tensors, {})
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(bytes(data[:start]) + bytes(len(data) - start))
    result = summary(directory)
    assert [row["embedding"] for row in result["tensors"]] == [False, True]
    assert result["clustered_bits_per_weight"] == 8 * (8 + 8) / 32
    refuses(directory, "do not have their checksum")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limit", [600_000_000, 60])
def test_reader_of_the_format_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, version: int):
    monkeypatch.setattr(weightfiles, "MAX_FILE_BYTES", limit)
    tensors = {f"layers.{bits}.weight": frozen((12, 5), bits, luts=2, dim=3) for bits in range(1, 9)}
    tensors |= {"fused.weight": frozen((4, 3, 2), 3), "bias": frozen((6,), 2, k=3)}
    if version == 2:
        tensors |= {"experts.up": frozen((2, 6, 5), 3, luts=4, dim=3, row_axes=2), "experts.down": frozen((2, 3, 5), 2, luts=6, row_axes=2)}
    directory = save(tmp_path, tensors, {"norm.weight": torch.ones(3, dtype=torch.bfloat16)})
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[-1]
    scope: dict[str, Any] = {}
    exec(code, scope)
    weights = scope["read_clustered"](directory)
    assert read(directory).quantization_config["format_version"] == version
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(weights[name], dequantize(tensor, torch.float16).numpy())


def test_fields_of_the_format_page(saved: Path):
    config = read(saved).quantization_config
    text = DOCS.read_text()
    example = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
    assert example.keys() == config.keys()
    assert next(iter(example["tensors"].values())).keys() == config["tensors"][NAME].keys()
    fields = {*config, *config["tensors"][NAME], "rows"}
    assert fields <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quant_method="gptq"), "quant_method must be 'edkm', got 'gptq'"),
        (lambda c: c.update(format_version=3), "format_version must be 1 to 2, got 3. Use a newer edkm"),
        (lambda c: c.update(format_version=0), "format_version must be 1 to 2, got 0"),
        (lambda c: c.update(format_version=True), "format_version must be 1 to 2, got True"),
        (lambda c: c.update(format_version=2), f"{NAME}: lacks rows"),
        (lambda c: c["tensors"][NAME].update(rows=6), f"{NAME}: has unknown fields rows"),
        (lambda c: c.pop("settings"), "quantization_config: lacks settings"),
        (lambda c: c.update(scales=1), "unknown fields scales. Use a newer edkm"),
        (lambda c: c.update(tensors=[]), "tensors must be an object"),
        (lambda c: c["tensors"].update({NAME: 3}), f"{NAME}: must be an object, got 3"),
        (lambda c: c["tensors"][NAME].update(zero=1), f"{NAME}: has unknown fields zero"),
        (lambda c: c["tensors"][NAME].pop("dim"), f"{NAME}: lacks dim"),
        (lambda c: c["tensors"][NAME].update(bits=9), "bits must be 1 to 8, got 9"),
        (lambda c: c["tensors"][NAME].update(bits="3"), "bits must be 1 to 8, got '3'"),
        (lambda c: c["tensors"][NAME].update(bits=4), r"must be uint8 \[21\] for 4 bits"),
        (lambda c: c["tensors"][NAME].update(shape=7), "shape must be a list, got 7"),
        (lambda c: c["tensors"][NAME].update(shape=[]), "list of positive numbers"),
        (lambda c: c["tensors"][NAME].update(shape=[6, -7]), "list of positive numbers"),
        (lambda c: c["tensors"][NAME].update(shape=[6, 2**60]), "must be uint8"),
        (lambda c: c["tensors"][NAME].update(shape=[7, 6], luts=1), r"must be float16 \[1, 5 to 8, 1\]"),
        (lambda c: c["tensors"][NAME].update(shape=[6, 7, 1]), "header and config.json are not of one model"),
        (lambda c: c["tensors"][NAME].update(shape=[6, 10**4000]), "list of positive numbers"),
        (lambda c: c["tensors"].pop(NAME), "header and config.json are not of one model"),
        (lambda c: c.update({"a\nb" * 1000: 1}), r"unknown fields a\\nba.* \.\.\. .*Use a newer edkm"),
        (lambda c: c["tensors"][NAME].update(dim=5), "must divide the 6 rows, got dim 5"),
        (lambda c: c["tensors"][NAME].update(luts=0), "must divide the 6 rows, got dim 1 and luts 0"),
        (lambda c: c["tensors"][NAME].update(luts=3), r"must be float16 \[3, 5 to 8, 1\]"),
        (lambda c: c["tensors"][NAME].update(error=-1.0), "error must be a finite number from 0"),
        (lambda c: c["tensors"][NAME].update(error=10**400), "error must be a finite number from 0"),
        (lambda c: c["tensors"].update(ghost=c["tensors"][NAME]), "ghost: is in config.json but in no file"),
    ],
)
def test_config_refused(saved: Path, change: Callable[[dict[str, Any]], Any], message: str):
    edit_config(saved, change)
    refuses(saved, message)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, f"{NAME}: lacks rows"),
        (2, r"must divide the 2 rows, got dim 3 and luts 4"),
        (4, r"rows must be the product of the first lengths of \[2, 12, 5\], got 4"),
        (24.0, r"rows must be the product of the first lengths"),
        (True, r"rows must be the product of the first lengths"),
        (0, r"rows must be the product of the first lengths"),
        (120, "must divide the 120 rows, got dim 3 and luts 16"),
    ],
)
def test_rows_refused(tmp_path: Path, rows: Any, message: str):
    luts = 16 if rows == 120 else 4
    directory = save(tmp_path / "model", {NAME: frozen((2, 12, 5), 3, luts=4, dim=3, row_axes=2)}, {})
    fields = read(directory).quantization_config
    assert fields["format_version"] == 2 and fields["tensors"][NAME]["rows"] == 24

    def change(config: dict[str, Any]) -> None:
        tensor = config["tensors"][NAME]
        tensor["luts"] = luts
        if rows is None:
            del tensor["rows"]
        else:
            tensor["rows"] = rows

    edit_config(directory, change)
    refuses(directory, message)


def test_version_1_is_written_where_it_can_say_it(saved: Path, tmp_path: Path):
    config = read(saved).quantization_config
    assert config["format_version"] == 1 and all("rows" not in tensor for tensor in config["tensors"].values())
    one, three = frozen((3, 4), 2, row_axes=1), frozen((1, 3, 4), 2, row_axes=2)
    assert write(tmp_path / "a", {NAME: one, "stack": three}, {}, {})["format_version"] == 2
    assert write(tmp_path / "b", {NAME: one}, {}, {})["format_version"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
def test_config_file_refused(saved: Path, text: str, message: str):
    (saved / "config.json").write_text(text)
    refuses(saved, message)


def test_missing_files_refused(saved: Path, tmp_path: Path):
    (saved / "model.safetensors").rename(tmp_path / "elsewhere")
    refuses(saved, "model.safetensors: No such file or directory")
    (saved / "config.json").unlink()
    refuses(saved, "config.json: No such file or directory")


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
        (
            lambda t: t.update({NAME + "_lut": t[NAME + "_lut"][:, :4].clone()}),
            r"5 to 8, 1\], got .* \[2, 4, 1\]",
        ),
        (
            lambda t: t.update({NAME + "_lut": t[NAME + "_lut"][:, :5].clone()}),
            "indices must be below 5, got 7",
        ),
        (lambda t: t[NAME + "_lut"][0, 0].fill_(torch.nan), "every centroid must be finite"),
        (lambda t: t[NAME + "_lut"][1, 7].fill_(torch.inf), "every centroid must be finite"),
    ],
)
def test_stored_tensors_refused(saved: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str):
    edit_weights(saved, change)
    refuses(saved, message)


def test_checksums_must_be_there(saved: Path):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    for metadata in (None, {"edkm": "{"}, {"edkm": "[]"}, {"edkm": '{"crc32": {"a": 1}}'}):
        save_file(tensors, path, metadata)
        refuses(saved, "has no edkm checksums")
    save_file(tensors, path, {"edkm": '{"crc32": {}}'})
    refuses(saved, "has no checksum")


def edit_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["norm.weight"].update(dtype="F16"), "header and config.json are not of one model"),
        (lambda h: h["head.bias"].update(shape=[2, 3]), "header and config.json are not of one model"),
        (lambda h: h["empty"].update(shape=[0, 5]), "header and config.json are not of one model"),
        (lambda h: h["empty"].update(shape=[0, 2**63]), "header and config.json are not of one model"),
        (lambda h: h["norm.weight"].update(dtype="F16\n"), r"not a whole safetensors file .*`F16\\n`"),
        (lambda h: h.update(x={"dtype": "U8", "shape": [0] * 600_000, "data_offsets": [0, 0]}), "have a header of at most 636"),
        (lambda h: h.update({"a\n": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), r"a\\n: a name must be printable"),
        (lambda h: h["__metadata__"].update(edkm='{"crc32": {}, "crc64": {}}'), r"unknown fields \['crc64'\]"),
    ],
)
def test_header_refused(saved: Path, change: Callable[[dict[str, Any]], Any], message: str):
    edit_header(saved, change)
    refuses(saved, message)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_is_no_plain_file_is_not_waited_for(saved: Path, tmp_path: Path, file: str):
    (saved / file).rename(tmp_path / file)
    os.mkfifo(tmp_path / "pipe")
    for make in (
        os.mkfifo,
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(tmp_path / "pipe"),
        lambda path: path.symlink_to("/dev/zero"),
    ):
        make(saved / file)
        refuses(saved, f"{file}: must be a regular file, or a link to one")
        (saved / file).rmdir() if (saved / file).is_dir() else (saved / file).unlink()
    (saved / file).symlink_to(tmp_path / file)
    assert read(saved).frozen.keys() == {NAME, "layers.1.proj.weight"}


def same(a: checkpoint.Packed, b: checkpoint.Packed) -> bool:
    def parts(packed: checkpoint.Packed) -> dict[str, torch.Tensor]:
        flat = {f"{name} {field}": t for name, f in packed.frozen.items() for field, t in zip("il", f[:2])}
        # A tensor without values has no bytes that a checksum could cover.
        return flat | {name: t for name, t in packed.dense.items() if t.numel()}

    x, y = parts(a), parts(b)
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


def test_every_flipped_bit_and_every_truncation_is_refused(saved: Path):
    before = read(saved)
    assert same(before, read(saved))
    path = saved / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    accepted = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if position >= start:
            refuses(saved, "bytes do not have their checksum")
            continue
        # In the header some bits mean nothing to us ("format", the case of a hexadecimal digit, spaces).
        try:
            assert same(before, read(saved))
            accepted += 1
        except FormatError:
            pass
    assert accepted < 40
    for length in [0, 7, 8, start - 1, start, len(data) - 1]:
        path.write_bytes(data[:length])
        refuses(saved, "not a whole safetensors file")
    path.write_bytes(data + b"\0")
    refuses(saved, "not a whole safetensors file")


def test_an_empty_file_is_not_opened(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Those in /proc are regular files without a size, and reading them may wait for ever."""
    (saved / "model.safetensors").write_bytes(b"1234567")
    real = Path.open

    def watched(self: Path, *args: Any, **kwargs: Any) -> Any:
        assert self.name != "model.safetensors"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watched)
    refuses(saved, "not a whole safetensors file .7 bytes")


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/a.safetensors",
        "a\\b.safetensors",
        "c:a.safetensors",
        ".safetensors",
        "a.bin",
        3,
    ],
)
def test_index_cannot_leave_the_directory(saved: Path, file: Any):
    (saved / "model.safetensors").rename(saved.parent / "model.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: file}}))
    refuses(saved, "must lie in a plain")


def test_index_must_agree_with_the_files(saved: Path, monkeypatch: pytest.MonkeyPatch):
    packed = read(saved)
    single = (saved / "model.safetensors").read_bytes()
    monkeypatch.setattr(weightfiles, "MAX_FILE_BYTES", 50)
    save(saved, packed.frozen, packed.dense)
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text("{}")
    refuses(saved, "weight_map must be an object")
    for change in ({"ghost": index["weight_map"][NAME]}, {"norm.weight": index["weight_map"][NAME]}):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        refuses(saved, "lists other tensors for this file")
    path.write_text(json.dumps(index))
    (saved / "model.safetensors").write_bytes(single)
    refuses(saved, "holds both")


def test_a_table_may_lie_in_another_file_than_its_indices(saved: Path):
    whole = read(saved)
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    parts = {"a": {NAME + "_lut": tensors.pop(NAME + "_lut")}, "b": tensors}
    for file, part in parts.items():
        crc = {name: weightfiles.checksum(tensor) for name, tensor in part.items()}
        save_file(part, saved / f"{file}.safetensors", {"edkm": json.dumps({"crc32": crc})})
    weight_map = {name: f"{file}.safetensors" for file, part in parts.items() for name in part}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = read(saved)
    assert all(torch.equal(a, b) for one, other in zip(whole.frozen.values(), found.frozen.values()) for a, b in zip(one[:2], other[:2]))


def test_write_refuses(tmp_path: Path):
    good = frozen((6, 7), 3)
    weight = torch.ones(2, 2)
    cases: list[tuple[dict[str, Frozen], dict[str, torch.Tensor], str]] = [
        ({NAME: good._replace(lut=good.lut.float())}, {}, "lut must be float16"),
        ({NAME: good._replace(shape=(7, 6))}, {}, r"rows must be the product of the first lengths of \[7, 6\], got 6"),
        ({NAME: good._replace(shape=(6, 8))}, {}, r"indices must be uint8 \[6, 8\]"),
        ({NAME: good._replace(indices=good.indices.int())}, {}, "indices must be uint8"),
        ({NAME: good._replace(lut=good.lut.repeat(4, 1, 1))}, {}, "must divide the 6 rows"),
        ({NAME: good._replace(lut=good.lut[:, :1])}, {}, "bits must be 1 to 8, got 0"),
        ({NAME: good._replace(lut=good.lut[:, :6])}, {}, "indices must be below 6, got 7"),
        ({NAME: good._replace(lut=good.lut * torch.inf)}, {}, "every centroid must be finite"),
        ({NAME: good._replace(error=float("nan"))}, {}, "error must be a finite number"),
        ({NAME: good}, {NAME: weight}, "the name is taken"),
        ({"a\nb": good}, {}, r"a\\nb: a name must be printable"),
        ({NAME: good}, {NAME + "_lut": weight}, "the name is taken"),
        ({}, {"__metadata__": weight}, "the name is taken"),
        ({}, {"a": weight, "b": weight}, "b: is the same memory as a"),
    ]
    for tensors, dense, message in cases:
        with pytest.raises(FormatError, match=message):
            write(tmp_path, tensors, dense, {})
    with pytest.raises(ValueError, match=r"a: torch.complex64 cannot be stored"):
        write(tmp_path, {}, {"a": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, {NAME: good}, {}, {"softness": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_format_error_is_a_value_error():
    assert issubclass(checkpoint.FormatError, ValueError)
