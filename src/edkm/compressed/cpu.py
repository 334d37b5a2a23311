"""Call the kernels of `cpu.c`, which read a weight as it is stored: a stream of indices (`packing`) and tables of single values.

Up to some 32 rows of x, a kernel reads the indices and multiplies in one pass: a weight of 3 bits is then a fifth of what bfloat16 has to
read. For more rows linear.py unpacks W, a tile of rows at a time, for torch's matrix product. Sums are in float32.

Threads are those of torch: `cpu.c` is given the entry of the OpenMP library that torch has loaded, so that there is one pool.
The kernels check nothing. Ask `reads` about a weight first; without a compiler it warns once and says no.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.compressed.packing import packed_bytes
from edkm.core import native

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-ffp-contract=fast",)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in cpu.c
# Fewer weights are not worth a second thread.
_WORTH_THREADS = 1 << 17
# Weights in one call, as in cpu.c.
MOST = 8
_WEIGHT = struct.Struct("14q").pack


class Theta(NamedTuple):
    """Scale and offset of the blocks of a weight in a format.

    Attributes:
        scale: `[rows, blocks]`, float16, bfloat16 or float32.
        offset: the same; or a stream of integers of `zero_bits`, the indices whose entries are zero; or None.
        wide: columns of a block.
    """

    scale: Tensor
    offset: Tensor | None
    wide: int
    zero_bits: int = 0


# A stream of indices, its tables (values of a format), bits, rows, columns, and theta of a format.
Matrix = tuple[Tensor, Tensor, int, int, int, Theta | None]


def reads(stream: Tensor, lut: Tensor, bits: int, rows: int, cols: int, theta: Theta | None = None) -> bool:
    """Say whether the kernels can read a weight: its layout is theirs, and they can be built.

    Args:
        stream: uint8 `[ceil(rows * cols * bits / 8)]`, the indices as docs/format.md lays them out.
        lut: `[luts, k, 1]`, float16, bfloat16 or float32, finite; the rows are split evenly, in order, over the tables. An index of `k`
            or above counts as a weight of zero.
        bits: width of an index, 1 to 8.
        rows, cols: shape of W.
        theta: of a format with entries `offset + scale lut`, of at most 4 bits or of 8 bits and integer values one after another.
    """
    if theta is not None and not (theta.scale.is_contiguous() and theta.scale.dtype in TYPES):
        return False
    if not (stream.is_cpu and lut.is_cpu and stream.is_contiguous() and lut.is_contiguous() and lut.dim() == 3):
        return False
    luts, k, dim = lut.shape
    whole = stream.dtype == torch.uint8 and 1 <= bits <= 8 and stream.shape == (packed_bytes(rows * cols, bits),)
    tables = dim == 1 and 1 <= k <= 1 << bits and luts > 0 and rows % luts == 0 and lut.dtype in TYPES
    return whole and tables and rows > 0 and cols > 0 and _library() is not None


def most_rows(cols: int, bits: int) -> int:
    """The most rows of x that `multiply` takes less time for than a matrix product with the unpacked weight."""
    library = _library()
    assert library is not None
    return library.edkm_most(cols, bits)


def multiply(x: Tensor, stream: Tensor, lut: Tensor, bits: int, rows: int, cols: int, theta: Theta | None = None) -> Tensor:
    """Multiply a few rows of x by W^T, W packed.

    Args:
        x: `[..., cols]`, float32, bfloat16 or float16, on a CPU.
        stream, lut, bits, rows, cols, theta: a weight that `reads` accepts.

    Returns:
        `[..., rows]` in the dtype of `x`; sums in float32.

    Cost:
        One pass over `stream`, from cache once more for every 4 rows of x; `4.2 * cols` bytes live for a row of x. Rows that are not whole
        bytes, or more than 4 bits: half as fast, and 8 rows of W live for every thread.
    """
    return products(x, [(stream, lut, bits, rows, cols, theta)])[0]


def products(x: Tensor, weights: Sequence[Matrix]) -> list[Tensor]:
    """Multiply as `multiply` does by up to `MOST` weights alike in columns, bits and blocks: x is prepared once, threads are woken once."""
    library, (_, _, bits, _, cols, theta) = _library(), weights[0]
    batch, total = x.numel() // cols, sum(weight[3] for weight in weights)
    half = x.dtype == torch.float16
    x = x.contiguous()
    outs, described = [], b""
    for weight in weights:
        assert weight[2] == bits and weight[4] == cols and _wide(weight[5]) == _wide(theta) and len(weights) <= MOST
        out = x.new_empty(*x.shape[:-1], weight[3], dtype=torch.float32 if half else None)
        outs.append(out)
        described += _described(weight, out)
    assert library is not None
    if batch and library.edkm_linear(described, len(outs), x.data_ptr(), batch, TYPES[x.dtype], _threads(batch * total * cols)):
        raise MemoryError(f"{4 * batch * cols} bytes for the activations of a packed product.")
    return [out.half() for out in outs] if half else outs


def unpack(weight: Matrix, start: int, stop: int, out: Tensor) -> None:
    """Write rows `start` (a multiple of 8) to before `stop` of a weight that `reads` accepts to `out`, contiguous float32."""
    rows = weight[3]
    assert start % 8 == 0 and 0 <= start <= stop <= rows and out.dtype == torch.float32 and out.is_contiguous()
    library = _library()
    assert library is not None
    if library.edkm_unpack(_described(weight, out), start, stop, _threads(out.numel())):
        raise MemoryError("the scales of a packed weight.")


def _described(weight: Matrix, out: Tensor) -> bytes:
    """Write the struct `Weight` of `cpu.c`: converting one argument takes less time than nine."""
    stream, lut, bits, rows, cols, theta = weight
    blocks = (0, 0, 1, 0, 0)
    if theta is not None:
        offset = 0 if theta.offset is None else theta.offset.data_ptr()
        blocks = theta.scale.data_ptr(), offset, theta.wide, TYPES[theta.scale.dtype], theta.zero_bits
    tables = *lut.shape[:2], TYPES[lut.dtype]
    return _WEIGHT(stream.data_ptr(), lut.data_ptr(), rows, cols, bits, *tables, *blocks, out.data_ptr())


def _wide(theta: Theta | None) -> int:
    return 0 if theta is None else theta.wide


def _threads(weights: int) -> int:
    """Choose one thread or all: a pool that changes its size starts threads anew."""
    return torch.get_num_threads() if weights >= _WORTH_THREADS else 1


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Build the kernels; None, and a warning, if that fails."""
    try:
        library = native.library(_SOURCE, *_FLAGS)
        reason = "there is no C compiler"
    except native.FAILURES as error:
        library, reason = None, native.why(error)
    if library is None:
        warnings.warn(f"edkm: packed layers run in plain torch, many times slower: {reason}.", stacklevel=3)
        return None
    return declare(library)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the functions that `cpu.c` exports, and give it torch's threads."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.edkm_linear.argtypes = [ctypes.c_char_p, integer, pointer, integer, integer, integer]
    library.edkm_unpack.argtypes = [ctypes.c_char_p, integer, integer, integer]
    library.edkm_most.argtypes = [integer, integer]
    library.edkm_most.restype = integer
    library.edkm_use.argtypes = [pointer]
    library.edkm_use.restype = None
    library.edkm_use(_parallel())
    return library


def _parallel() -> int | None:
    """Find `GOMP_parallel` in the OpenMP library that torch has loaded; GNU's, LLVM's and Intel's have it. None: one thread."""
    try:
        maps = Path("/proc/self/maps").read_text().split()
    except OSError:
        maps = []
    for name in (None, *sorted({path for path in maps if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))})):
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
