"""Damage to a directory: its index and its files, what the tensors mean under checksums that are right, and changes that are none."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.texts import CONFIG, INDEX, edit, join, split, weights_file

_ENTRIES = ("quantization_config", "tensors")


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG).read_text())


def checksums(directory: Path, rng: Random) -> None:
    """Change the text in the header's metadata."""
    path = weights_file(directory, rng)
    header, data = split(path)
    edkm = json.loads(header["__metadata__"]["edkm"])
    if rng.random() < 0.3:
        name = rng.choice(sorted(edkm["crc32"]))
        edkm["crc32"][name] = rng.choice(["00000000", edkm["crc32"][name][::-1], "", "g", "-1", "0" * 5000, 7, None])
        text = json.dumps(edkm)
    else:
        text = edit(edkm, rng).decode("utf-8", "replace")
    header["__metadata__"]["edkm"] = text
    join(path, header, data)


def index_json(directory: Path, rng: Random) -> None:
    if not (directory / INDEX).exists():
        _split_up(directory)
    content = json.loads((directory / INDEX).read_text())
    (directory / INDEX).write_bytes(edit(content, rng, rng.choice([(), ("weight_map",)])))


def index_names(directory: Path, rng: Random) -> None:
    """Let the index lead out of the directory, to an existing file."""
    if not (directory / INDEX).exists():
        _split_up(directory)
    content = json.loads((directory / INDEX).read_text())
    file = rng.choice(sorted(set(content["weight_map"].values())))
    outside = directory.parent / "outside.safetensors"
    shutil.copyfile(directory / file, outside)
    names = [
        "../outside.safetensors",
        str(outside),
        f"./{file}",
        f"x/../{file}",
        f"..\\{file}",
        f"c:{file}",
        f"{file}\0",
        f"{file}\n.safetensors",
    ]
    names += [
        ".safetensors",
        "..",
        "",
        ".",
        f"{'x' * 250}.safetensors",
        f"{'x' * 5000}.safetensors",
        "\ud800.safetensors",
        "~/x.safetensors",
    ]
    names += [
        "%2e%2e/outside.safetensors",
        "/dev/zero",
        "/dev/stdin",
        "CON.safetensors",
        f"{file.upper()}",
        file.removesuffix(".safetensors"),
    ]
    other = rng.choice(names)
    content["weight_map"] = {name: other if where == file else where for name, where in content["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(content))


def shards(directory: Path, rng: Random) -> None:
    """Files of a set that do not belong together."""
    if not (directory / INDEX).exists():
        _split_up(directory)
    files = sorted(directory.glob("*.safetensors"))
    one, other = rng.sample(files, 2)
    index = json.loads((directory / INDEX).read_text())
    how = rng.choice(["missing", "exchanged", "same", "both", "twice", "moved", "no index", "extra", "renamed"])
    if how == "missing":
        one.unlink()
    elif how == "exchanged":
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif how == "same":
        shutil.copyfile(one, other)
    elif how == "both":
        shutil.copyfile(one, directory / "model.safetensors")
    elif how == "renamed":
        one.rename(directory / "model.safetensors.old")
    elif how == "extra":
        index["weight_map"]["ghost.weight"] = rng.choice([one.name, "model-00099-of-00099.safetensors"])
    elif how in ("twice", "moved"):
        # A tensor in a second file as well; with the index of the one, or of the other.
        header, data = split(one)
        name = rng.choice(sorted(header.keys() - {"__metadata__"}))
        _add(other, name, header[name], data)
        if how == "moved":
            index["weight_map"][name] = other.name
    (directory / INDEX).write_text(json.dumps(index))
    if how == "no index":
        (directory / INDEX).unlink()


def no_plain_file(directory: Path, rng: Random) -> None:
    """Something else in the place of a file: none of it may be waited for."""
    path = rng.choice([directory / CONFIG, *sorted(directory.glob("*.safetensors")), directory / INDEX])
    path.unlink(missing_ok=True)
    how = rng.choice(["missing", "empty", "directory", "pipe", "zero", "null", "loop", "dangling", "pipe link", "self", "passwd", "proc"])
    pipe = directory.parent / "pipe"
    if how == "directory":
        path.mkdir()
    elif how == "empty":
        path.touch()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "pipe link":
        os.mkfifo(pipe)
        path.symlink_to(pipe)
    elif how != "missing":
        target = {"zero": "/dev/zero", "null": "/dev/null", "loop": path.name, "self": ".", "passwd": "/etc/passwd", "proc": "/proc/kmsg"}
        path.symlink_to(target.get(how, "nowhere"))


def sparse(directory: Path, rng: Random) -> None:
    """Make a file that claims to be large, in its header or not."""
    path = weights_file(directory, rng)
    size = rng.choice([10_000_000, 100_000_000, 1 << 40])
    header, data = split(path)
    if rng.random() < 0.5 and size < 1 << 40:
        end = len(data)
        header["big"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        join(path, header, data)
    os.truncate(path, path.stat().st_size + size)


def meaning(directory: Path, rng: Random) -> None:
    """Tensors that fit their checksums and break another rule of the format."""
    config = config_of(directory)
    entries = config[_ENTRIES[0]][_ENTRIES[1]]
    how = rng.choice(["padding", "index", "nan", "few", "many", "none", "luts", "flat", "dtype", "signed", "long", "gone", "dense", "name"])
    # In the originals only these have bits after the last index, and indices beyond their table.
    part = {"padding": "q_proj", "index": "up_proj"}.get(how, "")
    name = rng.choice([name for name in sorted(entries) if part in name])
    if entries[name].get("format", "table") != "table":
        _meaning_of_format(directory, config, name, rng)
        return
    path = next(path for path in sorted(directory.glob("*.safetensors")) if name in split(path)[0])
    entry = entries[name]
    tensors = _tensors(path)
    kind, shape, stream = tensors[name]
    lut_kind, lut_shape, lut = tensors[f"{name}_lut"]
    luts, k, dim = lut_shape
    if how == "padding":
        stream = stream[:-1] + b"\xff"
    elif how == "index":
        stream = b"\xff" * len(stream)
    elif how == "nan":
        at = rng.randrange(len(lut) // 2) * 2
        lut = lut[:at] + rng.choice([b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"]) + lut[at + 2 :]
    elif how in ("few", "many", "none", "luts"):
        k = {"few": 1 << entry["bits"] - 1, "many": (1 << entry["bits"]) + 1, "none": 0}.get(how, k)
        luts = rng.choice([0, entry["shape"][0] - 1, entry["shape"][0] * 2]) if how == "luts" else luts
        entry["luts"] = luts
        lut_shape, lut = [luts, k, dim], bytes(2 * luts * k * dim)
    elif how == "flat":
        lut_shape = rng.choice([[luts * k * dim], [luts, k * dim], [luts, k, dim, 1], [k, luts, dim]])
    elif how == "dtype":
        lut_kind = rng.choice(["BF16", "I16"])
    elif how == "signed":
        kind = rng.choice(["I8", "BOOL", "F8_E4M3"])
    elif how == "long":
        stream += b"\0"
        shape = [len(stream)]
    tensors[name], tensors[f"{name}_lut"] = (kind, shape, stream), (lut_kind, lut_shape, lut)
    if how == "gone":
        del tensors[rng.choice([name, f"{name}_lut"])]
    elif how == "name":
        tensors[rng.choice(["a\nb", "\x1b[2J"])] = ("U8", [0], b"")
    if how == "dense":
        # Two tensors that are what they were, of a model that is another.
        del entries[name]
    else:
        _store(path, tensors)
    (directory / CONFIG).write_text(json.dumps(config))


def _meaning_of_format(directory: Path, config: dict[str, Any], name: str, rng: Random) -> None:
    """Do as `meaning` does, to a tensor in a format."""
    path = next(path for path in sorted(directory.glob("*.safetensors")) if name in split(path)[0])
    entry, tensors = config[_ENTRIES[0]][_ENTRIES[1]][name], _tensors(path)
    part = rng.choice(sorted(other for other in tensors if other.startswith(name) and other != name))
    kind, shape, data = tensors[part]
    how = rng.choice(["nan", "dtype", "long", "flat", "gone", "format", "bits", "table", "short"])
    if how == "nan" and kind in ("F16", "BF16", "F32", "F8_E4M3"):
        tensors[part] = kind, shape, b"\xff" * len(data)
    elif how == "dtype":
        tensors[part] = {"F16": "BF16", "BF16": "F16", "F32": "I32"}.get(kind, "I8"), shape, data
    elif how == "long":
        tensors[name] = "U8", [len(tensors[name][2]) + 1], tensors[name][2] + b"\0"
    elif how == "flat":
        tensors[part] = kind, [*shape, 1], data
    elif how in ("format", "table"):
        entry["format"] = "table" if how == "table" else rng.choice(["q4_0", "int8_g32", "q5_k", "", 4])
    elif how == "bits":
        entry["bits"] += rng.choice([-1, 1])
    elif how == "short":
        entry["shape"] = [entry["shape"][0], entry["shape"][1] // 2]
    else:
        del tensors[rng.choice([name, part])]
    _store(path, tensors)
    (directory / CONFIG).write_text(json.dumps(config))


def links_of_a_hub(directory: Path, rng: Random) -> None:
    """Store files as a hub's cache does: links to blobs in another folder."""
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))


def other_spelling(directory: Path, rng: Random) -> None:
    """Write the same JSON with other spaces and in another order."""
    config = config_of(directory)
    keys = sorted(config, key=lambda _: rng.random())
    (directory / CONFIG).write_text(json.dumps({key: config[key] for key in keys}, indent=rng.choice([None, 1, 4])))
    for path in directory.glob("*.safetensors"):
        header, data = split(path)
        keys = sorted(header, key=lambda _: rng.random())
        join(path, {key: header[key] for key in keys}, data)


def other_files(directory: Path, rng: Random) -> None:
    """Files beside the model that are none of its own."""
    (directory / rng.choice(["pytorch_model.bin", "evil.pkl", "README.md", "\n.txt"])).write_bytes(rng.randbytes(100))
    os.mkfifo(directory / "pipe")
    (directory / "loop").symlink_to(".")


def other_order(directory: Path, rng: Random) -> None:
    """Write the same tensors in another order of bytes, without the checksum of the description, as older versions wrote them."""
    for path in directory.glob("*.safetensors"):
        tensors = _tensors(path)
        keys = sorted(tensors, key=lambda name: (-len(tensors[name][2]), name))
        _store(path, {key: tensors[key] for key in keys})


def _tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    header, data = split(path)
    del header["__metadata__"]
    return {name: (field["dtype"], field["shape"], data[slice(*field["data_offsets"])]) for name, field in header.items()}


def _store(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    crc = {name: f"{zlib.crc32(data):08x}" for name, (_, _, data) in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "edkm": json.dumps({"crc32": crc})}}
    end = 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + len(data)]}
    join(path, header, b"".join(data for _, _, data in tensors.values()))


def _add(path: Path, name: str, field: dict[str, Any], data: bytes) -> None:
    _store(path, _tensors(path) | {name: (field["dtype"], field["shape"], data[slice(*field["data_offsets"])])})


def _split_up(directory: Path) -> None:
    """Split one file into two and an index."""
    whole = directory / "model.safetensors"
    tensors = _tensors(whole)
    whole.unlink()
    weight_map = {}
    for number in (0, 1):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {name: tensor for name, tensor in tensors.items() if ("layers.1." in name) == number}
        _store(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


MUTATIONS: dict[str, Callable[[Path, Random], None]] = {
    "checksums": checksums,
    "index: json": index_json,
    "index: names": index_names,
    "files: wrong set": shards,
    "files: none, pipe, device, link": no_plain_file,
    "files: sparse": sparse,
    "tensors: meaning": meaning,
    "legal: links of a hub's cache": links_of_a_hub,
    "legal: json spelt otherwise": other_spelling,
    "legal: more files": other_files,
    "legal: tensors in another order": other_order,
}
