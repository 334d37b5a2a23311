"""Formats of tables with a shape: blocks of weights whose entries are fixed values times a scale, plus an offset.

Free tables run in few places. llama.cpp, vLLM, MLX, ONNX Runtime and bitsandbytes take blocks of consecutive weights of a row, whose
entries are linear in one or two numbers, theta:

    c_j = offset + scale v_j           v_0 < v_1 < ... fixed by the format

or `c = B theta` with `B [k, p]` of columns 1 and v. So one trainer serves them all (reference.py); formats differ further in how they store
theta (storage.py). A file stands for the entries of the theta that it stores, in float32: the product is rounded once, and the sum with the
offset once more, as the readers of these formats do it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import native
from edkm.core.reference import NOT_FINITE, compute_dtype
from edkm.core.storage import SUPER_BLOCK, Float8, Floats, PowerOfTwo, Storage, SuperBlock, ThetaPart, ZeroPoint

TABLE = "table"


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

    def layout(self, rows: int, cols: int) -> dict[str, ThetaPart]:
        """List the parts of a matrix."""
        return self.storage.layout(rows, cols // self.width(cols), self.p)

    def stored_bits(self, rows: int, cols: int) -> int:
        """Count the bits of a matrix, theta included."""
        parts = self.layout(rows, cols).values()
        return rows * cols * self.bits + sum(math.prod(part.shape) * (part.bits or 8 * part.dtype.itemsize) for part in parts)

    def basis(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """Return `B [k, p]`."""
        values = self.entries(dtype, torch.device(device or "cpu"))
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

    def checked_store(self, theta: Tensor) -> dict[str, Tensor]:
        """Do what `store` does; raises ValueError if a number does not fit its type."""
        parts = self.store(theta)
        if not bool(self.storage.read(parts).isfinite().all()):
            raise ValueError(
                f"theta: {self.name} cannot hold a scale or an offset of magnitude {theta.abs().max().item():.6g}. "
                "Rescale the weight or leave it out of the clustering (skip)."
            )
        return parts

    def assign(self, weight: Tensor, theta: Tensor) -> Tensor:
        """Find the nearest entry of every weight `[rows, cols]`, as its index: uint8 `[rows, cols]`.

        Cost:
            A few passes over the weight; transient memory of some 12 bytes a weight.
        """
        dtype = compute_dtype(weight.dtype)
        x = self.scaled(weight.detach().to(dtype).unflatten(1, (theta.shape[1], -1)), theta.to(dtype))
        if self.even:
            found = self.snap(x).sub_(self.values[0])
        else:
            found = self._nearest(x)
        return found.to(torch.uint8).flatten(1)

    def scaled(self, weight: Tensor, theta: Tensor) -> Tensor:
        """Return `(weight - offset) / scale` of weights `[rows, blocks, width]`; where the scale is 0 all entries are the same."""
        scale = theta[..., -1:]
        return (weight if self.p == 1 else weight - theta[..., :1]) / torch.where(scale == 0, 1, scale)

    @property
    def even(self) -> bool:
        """Whether the values are consecutive integers."""
        return self.values[-1] - self.values[0] == len(self.values) - 1

    def snap(self, x: Tensor) -> Tensor:
        """Return the nearest of the values; halfway between two the lower one."""
        if self.even:
            return (x - 0.5).ceil_().clamp_(self.values[0], self.values[-1])
        return self.entries(x.dtype, x.device).index_select(0, self._nearest(x).view(-1).int()).view_as(x)

    def _nearest(self, x: Tensor) -> Tensor:
        """Return the indices of the nearest values."""
        rows = x.reshape(max(1, len(x)), -1)
        return native.nearest(rows, self.midpoints(x.dtype, x.device).expand(len(rows), -1)).view_as(x)

    def lookup(self, indices: Tensor, theta: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `[rows, cols]` that indices stand for, rounded from float32 to `dtype`."""
        theta = theta.to(torch.promote_types(dtype, torch.float32))
        if self.even:
            x = indices.to(theta.dtype) + self.values[0]
        else:
            # Not `entries`: where operations are recorded, a tensor would stand in the program, or the program's in the cache.
            values = torch.stack([torch.full((), value, dtype=torch.float32, device=indices.device) for value in self.values])
            x = values.to(theta.dtype)[indices.int()]
        x = x.unflatten(1, (theta.shape[1], -1)) * theta[..., -1:]
        if self.p == 2:
            x = x + theta[..., :1]
        return x.flatten(1).to(dtype)

    def entries(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the values `[k]`; made anew, as a tensor made while a program is recorded is of no use later."""
        return torch.tensor(self.values, dtype=torch.float32, device=device).to(dtype)

    @functools.cache  # noqa: B019
    def midpoints(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the middles between the values, `[k - 1]`."""
        values = self.entries(dtype, device)
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

    def entries(self) -> Tensor:
        """Return the table of every block, `[g, k, 1]` float32."""
        form = FORMATS[self.format]
        return (form.storage.read(self.parts).flatten(0, 1) @ form.basis().T).unsqueeze(-1)


def freeze_blocks(weight: Tensor, theta: Tensor, form: Format, shape: tuple[int, ...]) -> FrozenBlocks:
    """Put a weight `[rows, cols]` on the nearest entries of theta `[rows, blocks, p]` as a packed file stores them, on the CPU.

    Raises:
        ValueError: a number does not fit its type, a weight is not finite.
    """
    parts = form.checked_store(theta)
    stored = form.storage.read(parts)
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


def family(name: str) -> tuple[str, ...]:
    """List the formats that the runtimes of a format take beside it in one model, by bits a weight."""
    form, found = format_named(name), re.fullmatch(r"(int|mlx)\d(_g.*)", name)
    if form.embedding == "q8_0":
        return "q2_k", "q3_k", "q4_k", "q6_k", "q8_0"
    return tuple(f"{found[1]}{bits}{found[2]}" for bits in (2, 3, 4, 8)) if found else (name,)


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
    half, brain, full = Floats(torch.float16), Floats(torch.bfloat16), Floats(torch.float32)
    iq4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
    e2m1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    found = [
        # llama.cpp
        Format("q4_0", _integers(-8, 7), 32, 1, half, 32, "", "q8_0"),
        Format("q4_1", _integers(0, 15), 32, 2, half, 32, "", "q8_0"),
        Format("iq4_nl", iq4, 32, 1, half, 32, "", "q8_0"),
        Format("q8_0", _integers(-127, 127), 32, 1, half, 32, "", "q8_0"),
        Format("tq2_0", _integers(-1, 1), 256, 1, half, 256, "q4_0", "q8_0"),
        Format("q2_k", _integers(0, 3), 16, 2, SuperBlock(4), SUPER_BLOCK, "iq4_nl", "q8_0"),
        Format("q3_k", _integers(-4, 3), 16, 1, SuperBlock(6, 32), SUPER_BLOCK, "iq4_nl", "q8_0"),
        Format("q4_k", _integers(0, 15), 32, 2, SuperBlock(6), SUPER_BLOCK, "iq4_nl", "q8_0"),
        Format("q6_k", _integers(-32, 31), 16, 1, SuperBlock(8, 128), SUPER_BLOCK, "q8_0", "q8_0"),
        # bitsandbytes
        Format("nf4", _NF4, 64, 1, full, 64, "", ""),
        # OCP and NVIDIA
        Format("mxfp4", e2m1, 32, 1, PowerOfTwo(), 32, "", ""),
        Format("nvfp4", e2m1, 16, 1, Float8(), 16, "", ""),
        # embeddings and output layers
        Format("int8_row", _integers(0, 255), 0, 2, ZeroPoint(torch.bfloat16, 8), 1, "", "int8_row"),
    ]
    for bits, (size, smaller) in itertools.product((2, 3, 4, 8), ((32, ""), (64, "g32"), (128, "g64"))):
        integers, signed = _integers(0, 2**bits - 1), _integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        zero, int_, mlx = ZeroPoint(torch.bfloat16, bits), f"int{bits}_", f"mlx{bits}_"
        found += [
            # compressed-tensors, ONNX
            Format(f"{int_}g{size}", integers, size, 2, zero, size, smaller and int_ + smaller, ""),
            Format(f"{int_}g{size}_sym", signed, size, 1, brain, size, smaller and f"{int_}{smaller}_sym", ""),
            # MLX
            Format(f"{mlx}g{size}", integers, size, 2, brain, size, smaller and mlx + smaller, f"mlx8_g{size}"),
        ]
    return {form.name: form for form in found}


# The quantiles of a normal distribution that bitsandbytes uses (arXiv:2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMATS = _formats()
