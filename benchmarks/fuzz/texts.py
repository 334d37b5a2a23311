"""Damage to the bytes and the JSON of a packed directory, in place. Each takes the directory and a `random.Random`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_HOLE = "@value@"
# JSON texts, not values: some of them no JSON writer would write.
_VALUES = [
    *("null", "true", "-1", "0", "1", "2", "3", "1.5", "1e999", "NaN", "-Infinity", "[]", "{}", "[[]]", "[0]", "[1, -1]", '""'),
    *(str(1 << 31), str(1 << 60), str(1 << 63), str(1 << 64), f"1{'0' * 400}", f"1{'0' * 5000}", f"[{'9' * 4000}, {'9' * 4000}]"),
    *('"\\u0000"', '"a\\nb: c. D."', '"\\ud800"', '"\\u001b[2J"', '"../../../etc/passwd"', '"/dev/zero"', f'"{"x" * 100_000}"'),
    *('{"a": 1, "a": 2}', f"{'[' * 400}{']' * 400}", f"{'[' * 100_000}{']' * 100_000}", f"[{'1,' * 65}1]", f"[{'1,' * 50_000}1]"),
]
_DTYPES = ["BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "F32", "F64", "I64", "F8_E4M3", "F4", "C64", "F16\n", "float16"]


def weights_file(directory: Path, rng: Random) -> Path:
    return rng.choice(sorted(directory.glob("*.safetensors")))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def join(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _damage(raw: bytes, how: str, rng: Random) -> bytes:
    at, size = rng.randrange(len(raw)), rng.choice([1, 2, 7, 64, 500])
    end = min(at + size, len(raw))
    if how == "flip":
        changed = bytearray(raw)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    middle = {
        "cut": b"",
        "zero": bytes(end - at),
        "noise": rng.randbytes(end - at),
        "insert": rng.randbytes(size) + raw[at:end],
        "repeat": raw[at:end] * 2,
    }
    return raw[:at] if how == "truncate" else raw[:at] + middle[how] + raw[end:]


def _damaged(file: str, how: str) -> Callable[[Path, Random], None]:
    def damage(directory: Path, rng: Random) -> None:
        path = directory / file if file.endswith(".json") else weights_file(directory, rng)
        if file == INDEX and not path.exists():
            path = directory / CONFIG
        raw = path.read_bytes()
        if file != "header":
            path.write_bytes(_damage(raw, how, rng))
            return
        start = 8 + int.from_bytes(raw[:8], "little")
        text = _damage(raw[8:start], how, rng)
        # Half of the time the length is put right: safetensors then looks at the text.
        length = struct.pack("<Q", len(text)) if rng.random() < 0.5 else raw[:8]
        path.write_bytes(length + text + raw[start:])

    return damage


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(*path, key) for key, _ in items]
    return found + [place for key, child in items for place in _places(child, (*path, key))]


def edit(content: dict[str, Any], rng: Random, inside: tuple[str, ...] = ()) -> bytes:
    """Replace, remove, add, rename or repeat one value somewhere in the JSON."""
    root: Any = content
    for key in inside:
        root = root[key]
    *path, last = rng.choice(_places(root))
    for key in path:
        root = root[key]
    how = rng.choice(["replace", "replace", "replace", "remove", "add", "rename", "twice", "exchange"])
    value = rng.choice(_VALUES)
    if how == "remove":
        del root[last]
    elif isinstance(root, list) or how == "replace":
        root[last] = _HOLE
    elif how == "exchange":
        other = rng.choice(list(root))
        root[last], root[other] = root[other], root[last]
    elif how == "add":
        root[rng.choice(["x", "", "__metadata__", "\n", "a" * 300])] = _HOLE
    elif how == "rename":
        root[rng.choice([last + "x", "", last + "\n", "\x1b[31m" + last])] = root.pop(last)
    else:
        value = f"{json.dumps(root[last])}, {json.dumps(last)}: {rng.choice([json.dumps(root[last]), value])}"
        root[last] = _HOLE
    return json.dumps(content).replace(json.dumps(_HOLE), value).encode("utf-8", "surrogatepass")


def config_model(directory: Path, rng: Random) -> None:
    content = json.loads((directory / CONFIG).read_text())
    quantization = content.pop("quantization_config")
    text = edit(content, rng)
    (directory / CONFIG).write_bytes(text.rstrip(b"}") + b', "quantization_config": ' + json.dumps(quantization).encode() + b"}")


def config_quantization(directory: Path, rng: Random) -> None:
    text = edit(json.loads((directory / CONFIG).read_text()), rng, ("quantization_config",))
    (directory / CONFIG).write_bytes(text)


def config_entry(directory: Path, rng: Random) -> None:
    content = json.loads((directory / CONFIG).read_text())
    name = rng.choice(sorted(content["quantization_config"]["tensors"]))
    (directory / CONFIG).write_bytes(edit(content, rng, ("quantization_config", "tensors", name)))


def config_shape_same_size(directory: Path, rng: Random) -> None:
    content = json.loads((directory / CONFIG).read_text())
    entry = rng.choice(sorted(content["quantization_config"]["tensors"].items()))[1]
    rows, cols = entry["shape"]
    entry["shape"] = rng.choice([[cols, rows], [rows * 2, cols // 2], [rows, cols, 1], [rows, 2, cols // 2], [rows * cols]])
    (directory / CONFIG).write_text(json.dumps(content))


def config_shape_huge(directory: Path, rng: Random) -> None:
    content = json.loads((directory / CONFIG).read_text())
    entry = rng.choice(sorted(content["quantization_config"]["tensors"].items()))[1]
    entry["shape"] = [entry["shape"][0] << rng.choice([20, 33, 50, 70]), entry["shape"][1] << rng.choice([0, 20])]
    if rng.random() < 0.5:
        entry["luts"] = entry.get("luts", 1) << rng.choice([10, 40])
    (directory / CONFIG).write_text(json.dumps(content))


def config_text(directory: Path, rng: Random) -> None:
    text = (directory / CONFIG).read_bytes()
    choices = [b"", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text + text, b"[" + text + b"]", b"null", b"\xff" + text]
    (directory / CONFIG).write_bytes(rng.choice(choices))


def config_huge(directory: Path, rng: Random) -> None:
    count = rng.choice([60_000, 150_000, 300_000]) if rng.random() < 0.9 else 3_000_000
    piece = rng.choice(["[],", "{},", '"\U0001f600",', "1.5,", '{"":0},', "[" * 9])
    end = "]" if piece == "[" * 9 else "0]"
    text = (directory / CONFIG).read_text().rstrip().removesuffix("}")
    (directory / CONFIG).write_text(f'{text}, "x": [{piece * count}{end}}}')


def header_json(directory: Path, rng: Random) -> None:
    path = weights_file(directory, rng)
    header, data = split(path)
    join(path, edit(header, rng), data)


def header_field(directory: Path, rng: Random) -> None:
    path = weights_file(directory, rng)
    header, data = split(path)
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    join(path, edit(header, rng, (name,)), data)


def header_dtype(directory: Path, rng: Random) -> None:
    path = weights_file(directory, rng)
    header, data = split(path)
    field = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    field["dtype"] = rng.choice([dtype for dtype in _DTYPES if dtype != field["dtype"]])
    join(path, header, data)


def header_shape(directory: Path, rng: Random) -> None:
    path = weights_file(directory, rng)
    header, data = split(path)
    field = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    shape = field["shape"]
    size = 1
    for length in shape:
        size *= length
    choices = [
        [size],
        [size, 1],
        [1] * 70 + [size],
        [],
        [0],
        [0, 1 << 63],
        [0, (1 << 64) - 1],
        [1 << 32, 1 << 32],
        [*shape, 2],
        shape[::-1],
    ]
    field["shape"] = rng.choice([choice for choice in choices if choice != shape])
    join(path, header, data)


def header_offsets(directory: Path, rng: Random) -> None:
    path = weights_file(directory, rng)
    header, data = split(path)
    names = sorted(header.keys() - {"__metadata__"})
    field, other = header[rng.choice(names)], header[rng.choice(names)]
    first, last = field["data_offsets"]
    how = rng.choice(["overlap", "hole", "odd", "reversed", "beyond", "exchange", "shift", "many"])
    if how == "hole":
        data = data[:first] + b"\0" * 8 + data[first:]
        for name in names:
            if header[name]["data_offsets"][0] >= first:
                header[name]["data_offsets"] = [offset + 8 for offset in header[name]["data_offsets"]]
    elif how == "odd":
        # One byte first, of a tensor of its own: what follows no longer starts at a multiple of its item size.
        for name in names:
            header[name]["data_offsets"] = [offset + 1 for offset in header[name]["data_offsets"]]
        header["a"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        edkm = json.loads(header["__metadata__"]["edkm"])
        edkm["crc32"]["a"] = "d202ef8d"
        header["__metadata__"]["edkm"] = json.dumps(edkm)
        data = b"\0" + data
    elif how == "exchange":
        field["data_offsets"], other["data_offsets"] = other["data_offsets"], field["data_offsets"]
    else:
        far = 1 << 62
        changed = {"overlap": other["data_offsets"], "reversed": [last, first], "beyond": [far, far + last - first], "many": [0, 1, 2]}
        field["data_offsets"] = changed.get(how, [first + 1, last + 1])
    join(path, header, data)


def header_length(directory: Path, rng: Random) -> None:
    path = weights_file(directory, rng)
    raw = path.read_bytes()
    right = int.from_bytes(raw[:8], "little")
    wrong = [0, 1, 2, right - 1, right + 1, right + 8, len(raw), 100_000_000, 100_000_001, 1 << 31, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
    path.write_bytes(struct.pack("<Q", rng.choice(wrong)) + raw[8:])


def header_huge(directory: Path, rng: Random) -> None:
    path = weights_file(directory, rng)
    header, data = split(path)
    size = rng.choice([200_000, 450_000, 2_000_000] if rng.random() < 0.9 else [20_000_000, 99_000_000, 101_000_000])
    text = json.dumps(header).encode()
    first = text.index(b"{", 1)
    make = {
        "spaces": lambda: text + b" " * size,
        "tensors": lambda: (
            text[:-1] + b"".join(b',"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(size // 53)) + b"}"
        ),
        "deep": lambda: text[:-1] + b',"x":' + b"[" * size + b"}",
        "shape": lambda: text[:-1] + b',"x":{"dtype":"U8","shape":[0' + b",0" * (size // 2) + b'],"data_offsets":[0,0]}}',
        "metadata": lambda: text[: first + 1] + b'"x":"' + b"y" * size + b'",' + text[first + 1 :],
        "lists": lambda: b'{"__metadata__":{"edkm":"{\\"crc32\\":[' + b"[]," * (size // 3) + b'0]}"}}',
        "checksums": lambda: b'{"__metadata__":{"edkm":"{' + b",".join(b'\\"%x\\":0' % i for i in range(size // 14)) + b'}"}}',
    }
    join(path, make[rng.choice(sorted(make))](), data)


MUTATIONS: dict[str, Callable[[Path, Random], None]] = {
    **{
        f"bytes: {file or 'weights'}, {how}": _damaged(file, how)
        for file in ("", "header", CONFIG, INDEX)
        for how in ("flip", "truncate", "cut", "zero", "noise", "insert", "repeat")
    },
    "config: model": config_model,
    "config: quantization_config": config_quantization,
    "config: entry": config_entry,
    "config: shape of the same size": config_shape_same_size,
    "config: huge shape": config_shape_huge,
    "config: text": config_text,
    "config: huge file": config_huge,
    "header: json": header_json,
    "header: field": header_field,
    "header: dtype": header_dtype,
    "header: shape": header_shape,
    "header: offsets": header_offsets,
    "header: length": header_length,
    "header: huge": header_huge,
}
