"""y = x W^T on a CPU with W as it is stored: a stream of indices (`packing`) and tables of single values.

Up to some 32 rows of x, `cpu.c` reads the indices and multiplies in one pass: a weight of 3 bits is then a fifth of what bfloat16 has to
read. More rows are worth unpacking W for, a tile of rows at a time, and torch's matrix product. Sums are in float32.

Threads are those of torch: `cpu.c` is given the entry of the OpenMP library that torch has loaded, so that there is one pool.

Without a compiler tiles are unpacked in torch, many times slower for few rows; that is said once.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from edkm.compressed.packing import packed_bytes, unpack_rows
from edkm.core import native
from edkm.core.assign import lookup

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-ffp-contract=fast",)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in cpu.c
# Weights unpacked at once: 4 MiB of float32, which stay in the second or third cache until they are multiplied.
_TILE = 1 << 20
# Fewer weights are not worth a second thread.
_WORTH_THREADS = 1 << 17


def reads(packed: Tensor, lut: Tensor, bits: int, rows: int, cols: int) -> bool:
    """Whether there are compiled kernels for this weight. Says once if they cannot be built."""
    return _wrong(packed, lut, bits, rows, cols) is None and _library() is not None


def linear(x: Tensor, packed: Tensor, lut: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    """`x W^T`, W packed.

    Not differentiable: what needs the gradient of `x` multiplies by `unpack` in its backward.

    Args:
        x: `[..., cols]`, float32, bfloat16 or float16, on a CPU.
        packed: uint8 `[ceil(rows * cols * bits / 8)]`, the indices as docs/format.md lays them out.
        lut: `[luts, k, 1]`, float16, bfloat16 or float32, finite; the rows are split evenly, in order, over the tables. An index of `k`
            or above counts as a weight of zero.
        bits: width of an index, 1 to 8.
        rows, cols: shape of W.

    Returns:
        `[..., rows]` in the dtype of `x`; sums in float32.

    Raises:
        ValueError: a shape, dtype or device that does not fit the above.

    Cost:
        Up to 32 rows of x (16 with AVX2, 8 elsewhere): one pass over `packed`, from cache once more for every 4 rows of x; `4.2 * cols`
        bytes live for a row of x. Rows that are not whole bytes, or more than 4 bits: half as many, and 8 rows of W live for every thread.
        More rows of x: one pass, and a tile of 4 MiB. Without a compiler always the latter, with 28 MiB.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: the packed product has no gradient. Call it under torch.no_grad, or from an autograd.Function.")
    if x.dtype not in TYPES or x.shape[-1:] != (cols,) or not x.is_cpu:
        raise ValueError(f"x must be float [..., {cols}] on a CPU, got {x.dtype} {list(x.shape)} on {x.device}.")
    if wrong := _wrong(packed, lut, bits, rows, cols):
        raise ValueError(wrong)
    return multiply(x, packed, lut, bits, rows, cols)


def multiply(x: Tensor, packed: Tensor, lut: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    """`linear`, which checks everything, for a caller that has: what does not fit reads memory that is not its own."""
    batch = x.numel() // cols
    library = _library()
    if library is None or (batch > 4 and batch > library.edkm_most(cols, bits)):
        return _by_tiles(x, packed, lut, bits, rows, cols)
    half = x.dtype == torch.float16
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows, dtype=torch.float32 if half else None)
    if batch:
        weight = packed.data_ptr(), lut.data_ptr(), rows, cols, bits, lut.shape[0], lut.shape[1], TYPES[lut.dtype]
        if library.edkm_linear(*weight, x.data_ptr(), out.data_ptr(), batch, TYPES[x.dtype], _threads(batch * rows * cols)):
            raise MemoryError(f"{4 * batch * cols} bytes for the activations of a packed product.")
    return out.half() if half else out


def unpack(
    packed: Tensor,
    lut: Tensor,
    bits: int,
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.float32,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Rows `start` to before `stop` of W, all by default, `[stop - start, cols]` in `dtype`. The rest as for `linear`.

    Raises:
        ValueError: as `linear`; or `start` is not a multiple of 8, or rows are asked for that there are not.

    Cost:
        One pass over `packed`; besides the result 4 MiB (28 without a compiler).
    """
    if wrong := _wrong(packed, lut, bits, rows, cols):
        raise ValueError(wrong)
    stop = rows if stop is None else stop
    if start % 8 or not 0 <= start <= stop <= rows:
        raise ValueError(f"start must be a multiple of 8 and 0 <= start <= stop <= {rows}, got {start}, {stop}.")
    out = torch.empty(stop - start, cols, dtype=dtype, device=packed.device)
    into = out if dtype == torch.float32 else None
    for first, last, tile in _tiles(packed, lut, bits, rows, cols, into, start, stop):
        if into is None:
            out[first - start : last - start] = tile
    return out


def _by_tiles(x: Tensor, packed: Tensor, lut: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    flat = x.reshape(-1, cols).float()
    # In its own shape from the start: the output of an autograd.Function must not be a view.
    out = torch.empty(*x.shape[:-1], rows, dtype=torch.float32, device=x.device)
    for first, stop, tile in _tiles(packed, lut, bits, rows, cols):
        torch.mm(flat, tile.T, out=out.view(-1, rows)[:, first:stop])
    return out.to(x.dtype)


def _tiles(
    packed: Tensor,
    lut: Tensor,
    bits: int,
    rows: int,
    cols: int,
    into: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """`(first, last, rows first to before last of W in float32)`, each overwritten by the next, or parts of `into [stop - start, cols]`."""
    library = _library()
    stop = rows if stop is None else stop
    height = max(8, min(_TILE // cols, stop - start) // 8 * 8)  # 8 rows end on a whole byte
    memory = torch.empty(height, cols, dtype=torch.float32, device=packed.device) if into is None else into
    for first in range(start, stop, height):
        last = min(first + height, stop)
        tile = memory[: last - first] if into is None else into[first - start : last - start]
        if library is None:
            tile.copy_(_tile(packed, lut, bits, rows, cols, first, last))
        else:
            weight = packed.data_ptr(), lut.data_ptr(), rows, cols, bits, lut.shape[0], lut.shape[1], TYPES[lut.dtype]
            library.edkm_unpack(*weight, tile.data_ptr(), first, last, _threads(tile.numel()))
        yield first, last, tile


def _tile(packed: Tensor, lut: Tensor, bits: int, rows: int, cols: int, first: int, last: int) -> Tensor:
    """Rows of W in torch."""
    luts, k, _ = lut.shape
    tables = pad(lut, (0, 0, 0, (1 << bits) - k))[torch.arange(first, last, device=packed.device) // (rows // luts)]
    return lookup(unpack_rows(packed, bits, (rows, cols), first, last), tables)


def _threads(weights: int) -> int:
    """One or all: a pool that changes its size starts threads anew."""
    return torch.get_num_threads() if weights >= _WORTH_THREADS else 1


def _wrong(packed: Tensor, lut: Tensor, bits: int, rows: int, cols: int) -> str | None:
    """What the kernels, which check nothing, could not read."""
    if not 1 <= bits <= 8 or rows < 1 or cols < 1:
        return f"bits must be 1 to 8, rows and cols at least 1, got {bits}, {rows}, {cols}."
    size = packed_bytes(rows * cols, bits)
    if packed.dtype != torch.uint8 or packed.shape != (size,) or not packed.is_cpu or not packed.is_contiguous():
        found = f"{packed.dtype} {list(packed.shape)} on {packed.device}"
        return f"packed: {rows} x {cols} indices of {bits} bits are uint8 [{size}], contiguous, on a CPU, got {found}."
    luts, k, dim = lut.shape if lut.dim() == 3 else (0, 0, 0)
    fits = dim == 1 and 1 <= k <= 1 << bits and luts and not rows % luts
    if not fits or lut.dtype not in TYPES or not lut.is_cpu or not lut.is_contiguous():
        want = f"float [luts, 1 to {1 << bits}, 1], contiguous, on a CPU, luts a divisor of {rows}"
        return f"lut: {want}, got {lut.dtype} {list(lut.shape)} on {lut.device}. Tables of vectors have no kernel: unpack them."
    return None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels; None, and a warning, if they cannot be built."""
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
    """Types of what `cpu.c` exports, and the threads it may use."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    weight = [pointer, pointer, *[integer] * 6]
    library.edkm_linear.argtypes = [*weight, pointer, pointer, integer, integer, integer]
    library.edkm_unpack.argtypes = [*weight, pointer, integer, integer, integer]
    library.edkm_unpack.restype = None
    library.edkm_most.argtypes = [integer, integer]
    library.edkm_most.restype = integer
    library.edkm_use.argtypes = [pointer]
    library.edkm_use.restype = None
    library.edkm_use(_parallel())
    return library


def _parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP library that torch has loaded; GNU's, LLVM's and Intel's have it. None: one thread."""
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
