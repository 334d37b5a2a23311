"""The constants of a package, read from its files byte by byte.

coremltools' own reader is left out on purpose: it shares its idea of the format with the writer that is being checked. A `.mlpackage`
holds a protobuf, which names the constants and says where their bytes are, and `weight.bin`. At a constant's offset there lies a header
(`_HEADER`: a fixed mark, a type, the size and offset of the bytes, the bits of padding); short constants stand in the protobuf itself.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_HEADER = struct.Struct("<IIQQQ")
_MARK = 0xDEADBEEF
_BITS = {"FLOAT16": 16, "FLOAT32": 32, "INT32": 32} | {f"UINT{bits}": bits for bits in (1, 2, 3, 4, 6, 8)}


class Constant(NamedTuple):
    """One constant: `dtype` as MIL names it (`UINT3`, `FLOAT16`), its shape and its bytes as they are stored."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_constants(package: Path) -> dict[str, dict[str, Constant]]:
    """Every constant of the main function.

    Args:
        package: an `.mlpackage`.

    Returns:
        By name of the result: `{"val": ...}` for a dense one; `{"indices": ..., "lut": ...}` and, for vectors, `"vector_axis"` for a
        `constexpr_lut_to_dense`.

    Raises:
        ValueError: a constant is not where the package says it is.

    Cost:
        The bytes of all constants are in memory.
    """
    import coremltools as ct
    from coremltools.proto import MIL_pb2

    spec: Any = ct.utils.load_spec(str(package))
    main = spec.mlProgram.functions["main"]
    blob = (package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").read_bytes()
    found = {}
    for op in main.block_specializations[main.opset].operations:
        if op.type == "const":
            values = {"val": op.attributes["val"]}
        elif op.type == "constexpr_lut_to_dense":
            values = {name: argument.arguments[0].value for name, argument in op.inputs.items()}
        else:
            continue
        name = op.outputs[0].name
        found[name] = {
            key: _constant(f"{package.name}: {name}", value, MIL_pb2.DataType, blob)
            for key, value in values.items()
            if MIL_pb2.DataType.Name(value.type.tensorType.dataType) in _BITS
        }
    return found


def _constant(source: str, value: Any, names: Any, blob: bytes) -> Constant:
    kind = value.type.tensorType
    dtype, shape = names.Name(kind.dataType), tuple(d.constant.size for d in kind.dimensions)
    size = math.ceil(math.prod(shape) * _BITS[dtype] / 8)
    if value.WhichOneof("value") == "blobFileValue":
        start = value.blobFileValue.offset
        mark, _, stored, offset, _ = _HEADER.unpack_from(blob, start)
        if mark != _MARK or stored != size:
            raise ValueError(
                f"{source}: weight.bin has no {size} bytes at {start}. This is a fault of coremltools; edkm was tested with 9.0."
            )
        return Constant(dtype, shape, blob[offset : offset + size])
    tensor = value.immediateValue.tensor
    if dtype == "FLOAT32":
        return Constant(dtype, shape, np.array(tensor.floats.values, np.float32).tobytes())
    if dtype == "INT32":
        return Constant(dtype, shape, np.array(tensor.ints.values, np.int32).tobytes())
    return Constant(dtype, shape, tensor.bytes.values)
