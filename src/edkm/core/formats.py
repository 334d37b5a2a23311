"""Formats of tables with a shape: blocks of weights whose entries are fixed values times a scale, plus an offset.

Free tables run in few places. llama.cpp, vLLM, MLX, ONNX Runtime and bitsandbytes all take blocks of consecutive weights of a row, whose
entries are linear in one or two numbers, theta:

    c_j = offset + scale v_j           v_0 < v_1 < ... fixed by the format

or `c = B theta` with `B [k, p]` of columns 1 and v. So one trainer serves them all (reference.py). What distinguishes formats further is how
theta is stored: `Storage` turns theta into parts of few bits and back. The entries that a file stands for are those of the stored theta, in
float32: the scale times the value is rounded once, the sum with the offset once more, as the readers of these formats do it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edkm.core.reference import NOT_FINITE, compute_dtype

TABLE = "table"
SUPER_BLOCK = 256


class Part(NamedTuple):
    """One stored tensor of a format.

    Attributes:
        shape, dtype: in memory.
        bits: of each of its integers, which a file packs as a stream; 0: a file has it as it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int = 0


class Storage(Protocol):
    """How theta `[rows, blocks, p]` of a matrix is stored."""

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, Part]:
        """List the parts."""
        ...

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        """Round theta to its parts."""
        ...

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the theta that parts stand for, float32."""
        ...


class Floats(NamedTuple):
    """Scale, and offset if there is one, in a floating-point type."""

    dtype: torch.dtype

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, Part]:
        return {name: Part((rows, blocks), self.dtype) for name in ("offset", "scale")[-p:]}

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: x.to(self.dtype) for name, x in zip(("offset", "scale")[-theta.shape[-1] :], theta.unbind(-1), strict=True)}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([parts[name].float() for name in ("offset", "scale") if name in parts], -1)


class ZeroPoint(NamedTuple):
    """A floating-point scale, and the index whose entry is zero: `c_j = scale (j - zero)`."""

    dtype: torch.dtype
    bits: int

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, Part]:
        return {"scale": Part((rows, blocks), self.dtype), "zero": Part((rows, blocks), torch.uint8, self.bits)}

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        offset, scale = theta.unbind(-1)
        stored = scale.to(self.dtype)
        zero = -offset / torch.where(stored == 0, 1, stored).to(scale.dtype)
        return {"scale": stored, "zero": zero.round().nan_to_num().clamp(0, 2**self.bits - 1).to(torch.uint8)}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        scale = parts["scale"].float()
        return torch.stack([-scale * parts["zero"], scale], -1)


class SuperBlock(NamedTuple):
    """Integers times a float16 of 256 weights: the K-quants of llama.cpp.

    Attributes:
        bits: of the integers.
        zero: the integer that stands for 0, of scales with a sign.
    """

    bits: int
    zero: int = 0

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, Part]:
        per = SUPER_BLOCK // self._block(p)
        found = {"d": Part((rows, blocks // per), torch.float16), "scale": Part((rows, blocks), torch.uint8, self.bits)}
        if p == 2:
            found |= {"dmin": Part((rows, blocks // per), torch.float16), "minimum": Part((rows, blocks), torch.uint8, self.bits)}
        return found

    def _block(self, p: int) -> int:
        return 32 if p == 2 and self.bits == 6 else 16

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        per = SUPER_BLOCK // self._block(theta.shape[-1])
        found = dict(zip(("d", "scale"), self._integers(theta[..., -1].unflatten(-1, (-1, per))), strict=True))
        if theta.shape[-1] == 2:
            found |= dict(zip(("dmin", "minimum"), self._integers(-theta[..., 0].unflatten(-1, (-1, per))), strict=True))
        return found

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Find `(d [rows, supers], integers [rows, blocks])` with `d (integer - zero)` nearest to `x [rows, supers, blocks]`.

        All integers are tried for the largest of `x`; numbers that are stored already come out as they are.
        """
        low, high = -self.zero, 2**self.bits - 1 - self.zero
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)) if self.zero else x.amax(-1, keepdim=True)
        best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
        for integer in [*range(low, 0), *range(1, high + 1)]:
            d = (largest / integer).to(torch.float16).to(x.dtype)
            away = (x - d * self._nearest(x, d)).square_().sum(-1, keepdim=True)
            best, least = torch.where(away < least, d, best), torch.minimum(away, least)
        return best.squeeze(-1).to(torch.float16), (self._nearest(x, best) + self.zero).to(torch.uint8).flatten(-2)

    def _nearest(self, x: Tensor, d: Tensor) -> Tensor:
        return (x / torch.where(d == 0, 1, d)).round_().clamp_(-self.zero, 2**self.bits - 1 - self.zero)

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        pairs = [("d", "scale")] if "dmin" not in parts else [("dmin", "minimum"), ("d", "scale")]
        found = []
        for outer, inner in pairs:
            integers = parts[inner].float() - self.zero
            per = integers.shape[-1] // parts[outer].shape[-1]
            found.append(parts[outer].float().repeat_interleave(per, -1) * integers)
        if len(found) == 2:
            found[0] = -found[0]
        return torch.stack(found, -1)


class PowerOfTwo:
    """A scale `2^(exponent - 127)`."""

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, Part]:
        return {"exponent": Part((rows, blocks), torch.uint8)}

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        mantissa, exponent = torch.frexp(theta[..., 0].abs())  # a mantissa from 0.5 to 1
        return {"exponent": (exponent + 126 + (mantissa >= 0.75)).clamp(0, 254).to(torch.uint8)}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        exponent = parts["exponent"]
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.float() - 127).unsqueeze(-1)


class Float8:
    """A scale in float8 (e4m3) over a float32 of the tensor."""

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, Part]:
        return {"scale": Part((rows, blocks), torch.float8_e4m3fn), "global_scale": Part((1,), torch.float32)}

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        scale, most = theta[..., 0].abs(), torch.finfo(torch.float8_e4m3fn).max
        whole = most / scale.amax().clamp_min(torch.finfo(torch.float32).tiny * most)
        whole = whole.float()
        return {"scale": (scale * whole).clamp_max(most).to(torch.float8_e4m3fn), "global_scale": whole.reshape(1)}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        return (parts["scale"].float() / parts["global_scale"]).unsqueeze(-1)


class Format(NamedTuple):
    """A format of blocks of weights. Methods take theta as `[rows, blocks, p]`: `(scale)` or `(offset, scale)` of every block.

    Attributes:
        values: `v`, ascending.
        block: consecutive weights of a row that share theta; 0 for the whole row.
        p: numbers of theta: 1, a scale, or 2, offset and scale.
        storage: of theta.
        divisor: of the columns of a matrix that has this format.
        next: the format of a weight whose columns it does not divide; "" leaves the weight alone.
        embedding: the format of embeddings, and of output layers tied to them, beside it; "" leaves them alone.
    """

    name: str
    values: tuple[float, ...]
    block: int
    p: int
    storage: Storage
    divisor: int
    next: str
    embedding: str

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (len(self.values) - 1).bit_length()

    def width(self, cols: int) -> int:
        """Return the number of weights in a block of a row of `cols`."""
        return self.block or cols

    def layout(self, rows: int, cols: int) -> dict[str, Part]:
        """List the parts of a matrix."""
        return self.storage.layout(rows, cols // self.width(cols), self.p)

    def stored_bits(self, rows: int, cols: int) -> int:
        """Count the bits of a matrix, theta included."""
        parts = self.layout(rows, cols).values()
        return rows * cols * self.bits + sum(math.prod(part.shape) * (part.bits or 8 * part.dtype.itemsize) for part in parts)

    def basis(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """Return `B [k, p]`."""
        values = torch.tensor(self.values, dtype=torch.float32, device=device).to(dtype)
        return torch.stack([torch.ones_like(values), values][-self.p :], 1)

    def round(self, theta: Tensor) -> Tensor:
        """Return theta as it is stored, in its dtype; values that do not fit become infinite."""
        return self.storage.read(self.store(theta)).to(theta.dtype)

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        """Round theta to the parts that are stored."""
        if self.p == 2:
            # A falling table is the same as a rising one that starts at its other end.
            offset, scale = theta.unbind(-1)
            first, last = self.values[0], self.values[-1]
            theta = torch.stack([torch.where(scale < 0, offset + scale * (first + last), offset), scale.abs()], -1)
        return self.storage.store(theta.detach())

    def assign(self, weight: Tensor, theta: Tensor) -> Tensor:
        """Find the nearest entry of every weight `[rows, cols]`, as its index: uint8 `[rows, cols]`.

        Cost:
            A few passes over the weight; transient memory of some 12 bytes a weight.
        """
        dtype = compute_dtype(weight.dtype)
        theta = theta.to(dtype)
        scale = theta[..., -1:]
        x = weight.detach().to(dtype).unflatten(1, (theta.shape[1], -1))
        if self.p == 2:
            x = x - theta[..., :1]
        x = x / torch.where(scale == 0, 1, scale)
        return torch.bucketize(x, self._midpoints(dtype, x.device), out_int32=True).to(torch.uint8).flatten(1)

    def lookup(self, indices: Tensor, theta: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `[rows, cols]` that indices stand for, rounded from float32 to `dtype`."""
        theta = theta.to(torch.promote_types(dtype, torch.float32))
        values = torch.tensor(self.values, dtype=torch.float32, device=indices.device).to(theta.dtype)
        x = values[indices.int()].unflatten(1, (theta.shape[1], -1)) * theta[..., -1:]
        if self.p == 2:
            x = x + theta[..., :1]
        return x.flatten(1).to(dtype)

    @functools.cache  # noqa: B019
    def _midpoints(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float32, device=device).to(dtype)
        return (values[1:] + values[:-1]) / 2


class FrozenBlocks(NamedTuple):
    """One clustered tensor in a format, ready to be packed.

    Attributes:
        indices: `[rows, cols]` uint8.
        parts: of theta, as stored.
        shape: of the weight in its module, as in `assign.Frozen`.
        error: `sum (w - w_hat)^2 / sum w^2` against the weight that was frozen.
        format: its name.
    """

    indices: Tensor
    parts: dict[str, Tensor]
    shape: tuple[int, ...]
    error: float
    format: str

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits

    @property
    def rows(self) -> int:
        return len(self.indices)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the tensor stands for, in its own shape."""
        form = FORMATS[self.format]
        return form.lookup(self.indices, form.storage.read(self.parts), dtype).view(self.shape)


def freeze_blocks(weight: Tensor, theta: Tensor, form: Format, shape: tuple[int, ...]) -> FrozenBlocks:
    """Put a weight `[rows, cols]` on the nearest entries of theta `[rows, blocks, p]` as a packed file stores them, on the CPU.

    Raises:
        ValueError: a number does not fit its type, a weight is not finite.
    """
    parts = form.store(theta)
    stored = form.storage.read(parts)
    if not bool(stored.isfinite().all()):
        raise ValueError(
            f"theta: {form.name} cannot hold a scale or an offset of magnitude {theta.abs().max().item():.6g}. "
            "Rescale the weight or leave it out of the clustering (skip)."
        )
    indices = form.assign(weight, stored)
    away = weight.detach().float() - form.lookup(indices, stored)
    error = float(away.square().sum() / weight.detach().float().square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    if not math.isfinite(error):
        raise ValueError(NOT_FINITE)
    return FrozenBlocks(indices.cpu(), {name: part.cpu() for name, part in parts.items()}, tuple(shape), error, form.name)


def format_named(name: str) -> Format:
    """Find a format.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in FORMATS:
        raise ValueError(f"format: {name!r} is not one of {TABLE}, {', '.join(FORMATS)}.")
    return FORMATS[name]


def format_for(name: str, cols: int) -> Format | None:
    """Find the format of a weight with `cols` columns: the named one, or the next that divides them; None if none does."""
    form = format_named(name)
    while cols % form.divisor:
        if not form.next:
            return None
        form = FORMATS[form.next]
    return form


def _integers(first: int, last: int) -> tuple[float, ...]:
    return tuple(float(value) for value in range(first, last + 1))


def _formats() -> dict[str, Format]:
    half, brain = Floats(torch.float16), Floats(torch.bfloat16)
    iq4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    e2m1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    e2m1 = (*(-x for x in reversed(e2m1)), 0.0, *e2m1)
    found = [
        # llama.cpp
        Format("q4_0", _integers(-8, 7), 32, 1, half, 32, "", "q8_0"),
        Format("q4_1", _integers(0, 15), 32, 2, half, 32, "", "q8_0"),
        Format("iq4_nl", tuple(map(float, iq4)), 32, 1, half, 32, "", "q8_0"),
        Format("q8_0", _integers(-127, 127), 32, 1, half, 32, "", "q8_0"),
        Format("tq2_0", _integers(-1, 1), 256, 1, half, 256, "q4_0", "q8_0"),
        Format("q2_k", _integers(0, 3), 16, 2, SuperBlock(4), 256, "iq4_nl", "q8_0"),
        Format("q3_k", _integers(-4, 3), 16, 1, SuperBlock(6, 32), 256, "iq4_nl", "q8_0"),
        Format("q4_k", _integers(0, 15), 32, 2, SuperBlock(6), 256, "iq4_nl", "q8_0"),
        Format("q6_k", _integers(-32, 31), 16, 1, SuperBlock(8, 128), 256, "q8_0", "q8_0"),
        # bitsandbytes
        Format("nf4", _NF4, 64, 1, Floats(torch.float32), 64, "", ""),
        # OCP and NVIDIA
        Format("mxfp4", e2m1, 32, 1, PowerOfTwo(), 32, "", ""),
        Format("nvfp4", e2m1, 16, 1, Float8(), 16, "", ""),
        # Affine rows: embeddings and output layers
        Format("int8_row", _integers(0, 255), 0, 2, ZeroPoint(torch.bfloat16, 8), 1, "", "int8_row"),
    ]
    for size, smaller in ((32, 0), (64, 32), (128, 64)):
        for bits in (2, 3, 4, 8):
            most, half_way = 2**bits - 1, 2 ** (bits - 1)
            names = f"int{bits}_g", f"mlx{bits}_g"
            next_of = [f"{name}{smaller}" if smaller else "" for name in names]
            found += [
                # compressed-tensors, ONNX
                Format(f"{names[0]}{size}", _integers(0, most), size, 2, ZeroPoint(torch.bfloat16, bits), size, next_of[0], ""),
                Format(
                    f"{names[0]}{size}_sym",
                    _integers(-half_way, half_way - 1),
                    size,
                    1,
                    brain,
                    size,
                    next_of[0] and f"{next_of[0]}_sym",
                    "",
                ),
                # MLX
                Format(f"{names[1]}{size}", _integers(0, most), size, 2, brain, size, next_of[1], f"mlx8_g{size}"),
            ]
    return {form.name: form for form in found}


# The quantiles of a normal distribution that bitsandbytes uses (arXiv:2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMATS = _formats()
