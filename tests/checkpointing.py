"""A small packed checkpoint, written, read back and refused."""

import json
from pathlib import Path

import pytest
import torch
from packed import freeze
from safetensors.torch import save_file

from edkm.compressed import weightfiles
from edkm.compressed.checkpoint import FormatError, Packed, read, write
from edkm.core.assign import Clustered

NAME, OTHER = "layers.0.proj.weight", "layers.1.proj.weight"


def save(directory: Path, tensors: dict[str, Clustered], dense: dict[str, torch.Tensor]) -> Path:
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


def save_small(directory: Path) -> Path:
    return save(directory, {NAME: freeze((6, 7), 3, luts=2), OTHER: freeze((8, 3, 2), 4, dim=2)}, dense_tensors())


def contents(packed: Packed, empty: bool = True) -> dict[str, tuple]:
    """All values, comparable; a tensor without values has no bytes that a checksum could cover."""
    flat = {f"{name} {field}": t for name, f in packed.frozen.items() for field, t in zip(("indices", "lut"), f[:2])} | packed.dense
    return {name: (t.dtype, tuple(t.shape), t.tolist()) for name, t in flat.items() if empty or t.numel()}


def store(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file with right checksums, and as before `described` was."""
    crc = {name: weightfiles.checksum(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt", "edkm": json.dumps({"crc32": crc})})


def refuses(directory: Path, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(directory)
    assert "\n" not in str(caught.value)


def first_byte(file: bytes) -> int:
    """Where the header ends."""
    return 8 + int.from_bytes(file[:8], "little")
