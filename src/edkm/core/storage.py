"""Store theta, the scale and the offset of each block of weights, as parts of few bits, and read it back.

Every storage keeps what it can hold: `store(read(parts))` gives the same parts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SUPER_BLOCK = 256


class ThetaPart(NamedTuple):
    """One stored tensor of a format.

    Attributes:
        shape, dtype: in memory.
        bits: of each of its integers, which a file packs as a stream; 0: a file has it as it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int = 0


class Storage(Protocol):
    """A way to store theta `[rows, blocks, p]` of a matrix."""

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, ThetaPart]:
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

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, ThetaPart]:
        return {name: ThetaPart((rows, blocks), self.dtype) for name in ("offset", "scale")[-p:]}

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: x.to(self.dtype) for name, x in zip(("offset", "scale")[-theta.shape[-1] :], theta.unbind(-1), strict=True)}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([parts[name].float() for name in ("offset", "scale") if name in parts], -1)


class ZeroPoint(NamedTuple):
    """A floating-point scale, and the index whose entry is zero: `c_j = scale (j - zero)`."""

    dtype: torch.dtype
    bits: int

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, ThetaPart]:
        return {"scale": ThetaPart((rows, blocks), self.dtype), "zero": ThetaPart((rows, blocks), torch.uint8, self.bits)}

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

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, ThetaPart]:
        per = SUPER_BLOCK // self._block(p)
        found = {"d": ThetaPart((rows, blocks // per), torch.float16), "scale": ThetaPart((rows, blocks), torch.uint8, self.bits)}
        if p == 2:
            found |= {"dmin": ThetaPart((rows, blocks // per), torch.float16), "minimum": ThetaPart((rows, blocks), torch.uint8, self.bits)}
        return found

    def _block(self, p: int) -> int:
        return 32 if p == 2 and self.bits == 6 else 16

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        per = SUPER_BLOCK // self._block(theta.shape[-1])
        found: dict[str, Tensor] = dict(zip(("d", "scale"), self._integers(theta[..., -1].unflatten(-1, (-1, per))), strict=True))
        if theta.shape[-1] == 2:
            found |= dict(zip(("dmin", "minimum"), self._integers(-theta[..., 0].unflatten(-1, (-1, per))), strict=True))
        return found

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Find `(d [rows, supers], integers [rows, blocks])` with `d (integer - zero)` nearest to `x [rows, supers, blocks]`.

        All integers are tried for the largest of `x`; numbers that are stored already come out as they are.
        """
        low, high = -self.zero, 2**self.bits - 1 - self.zero
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)) if self.zero else x.amax(-1, keepdim=True)
        best, least = (largest / high).to(torch.float16).to(x.dtype), torch.full_like(largest, torch.inf)  # infinite if all are
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

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, ThetaPart]:
        return {"exponent": ThetaPart((rows, blocks), torch.uint8)}

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        mantissa, exponent = torch.frexp(theta[..., 0].abs())  # a mantissa from 0.5 to 1
        return {"exponent": (exponent + 126 + (mantissa >= 0.75)).clamp(0, 254).to(torch.uint8)}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        exponent = parts["exponent"]
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.float() - 127).unsqueeze(-1)


class Float8:
    """A scale in float8 (e4m3) over a float32 of the tensor, a power of two."""

    def layout(self, rows: int, blocks: int, p: int) -> dict[str, ThetaPart]:
        return {"scale": ThetaPart((rows, blocks), torch.float8_e4m3fn), "global_scale": ThetaPart((1,), torch.float32)}

    def store(self, theta: Tensor) -> dict[str, Tensor]:
        scale, most = theta[..., 0].abs(), torch.finfo(torch.float8_e4m3fn).max  # 448, or 0.875 of 2^9
        # A power of two that makes the largest scale, rounded, 240 to 448: some rows alone are then stored as in the whole tensor.
        mantissa, exponent = torch.frexp(scale.amax())
        exponent = 9 - exponent - ((16 * mantissa).round() > 14).to(exponent.dtype)
        whole = torch.ldexp(torch.ones((1,), device=scale.device), exponent.clamp(-126, 126))
        return {"scale": (scale * whole).clamp_max(most).to(torch.float8_e4m3fn), "global_scale": whole}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        return (parts["scale"].float() / parts["global_scale"]).unsqueeze(-1)
