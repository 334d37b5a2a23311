"""Move a tensor away, bring it back, and count the bytes.

On CUDA copies go to pinned memory on a side stream, so that they overlap with the forward pass: the side stream waits for the stream that
made the tensor, `record_stream` keeps the allocator from reusing the memory meanwhile, and `settle` must be called before the tensor is
overwritten. On the way back the current stream waits for the side stream, which then already fetches the copy made just before: backward
wants them in reverse. Within one stream copies run in order, so host memory is never read before it has arrived.

From the CPU to the CPU the copy is a real one. It stands for the transfer, so that bytes can be counted without a GPU.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

_MIB = 1 << 20
_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


@dataclass
class Stats:
    """Counts of one `saved_tensors` block; live, so they can be read at any time.

    Every saved tensor is accounted for once, by `numel * itemsize`: `requested_bytes == copied_bytes + sum(avoided_bytes.values())`.
    """

    tensors: int = 0
    """Tensors that autograd saved."""
    requested_bytes: int = 0
    """Their bytes, as if each were copied by itself."""
    copied_bytes: int = 0
    """Bytes really copied by this process."""
    kept_bytes: int = 0
    """Bytes of the copies held now; zero once backward has used them all."""
    peak_kept_bytes: int = 0
    avoided_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("reference", "marshal", "uniquify", "shard"), 0))
    """By reason: `reference` (lives on anyway), `marshal` (a view or copy of a kept tensor, or repeated by `expand`), `uniquify` (a table
    and an index list instead of a map), `shard` (kept by other ranks)."""
    seconds: float = 0.0
    """Time in the hooks, both directions. On CUDA the time to queue the copies, not that of the copies."""

    def hold(self, n_bytes: int) -> None:
        """Count a copy that was made."""
        self.copied_bytes += n_bytes
        self.kept_bytes += n_bytes
        self.peak_kept_bytes = max(self.peak_kept_bytes, self.kept_bytes)

    def release(self, n_bytes: int) -> None:
        """Count a copy that was freed."""
        self.kept_bytes -= n_bytes

    def avoid(self, reason: str, n_bytes: int) -> None:
        """Count bytes that need no copy."""
        self.avoided_bytes[reason] += n_bytes

    def __str__(self) -> str:
        avoided = ", ".join(f"{reason} {n / _MIB:.1f}" for reason, n in self.avoided_bytes.items())
        return (
            f"{self.tensors} saved tensors of {self.requested_bytes / _MIB:.1f} MiB: copied {self.copied_bytes / _MIB:.1f}, avoided "
            f"({avoided}), holding {self.kept_bytes / _MIB:.1f} (peak {self.peak_kept_bytes / _MIB:.1f}), {self.seconds:.2f} s"
        )


class Source(Protocol):
    """Provider of kept values: a copy, a slice of one on every rank, or a table with an index list."""

    def fetch(self) -> Tensor:
        """Return the values as a new tensor on the device they came from."""
        ...


class OffloadedCopy:
    """A copy of `values` on `device`, counted in `stats` until it is freed.

    Args:
        values: any tensor.
        device: where the copy is kept.
        stats: counts its bytes.
        before: the copy made before this one, to be fetched ahead.
        streamed: whether a copy from CUDA to the CPU may overlap with what follows; tensors that are more than strided memory must not.
    """

    __slots__ = ("__weakref__", "_arriving", "_before", "_host", "_origin", "_stats", "_streamed", "n_bytes")

    def __init__(self, values: Tensor, device: torch.device, stats: Stats, before: OffloadedCopy | None = None, *, streamed: bool = True):
        self._origin, self._stats = values.device, stats
        self._before = None if before is None else weakref.ref(before)
        self._arriving: Tensor | None = None
        self._streamed = streamed and _is_streamed(values.device, device)
        self.n_bytes = values.numel() * values.itemsize
        self._host = _send(values) if self._streamed else _moved(values, device)
        stats.hold(self.n_bytes)

    def fetch(self, part: slice | EllipsisType = ...) -> Tensor:
        """Return `values[part]` as a new tensor on the device they came from."""
        if not self._streamed:
            return _moved(self._host if part is ... else self._host[part], self._origin)
        values, self._arriving = self._bring(part) if self._arriving is None else self._arriving[part], None
        stream = torch.cuda.current_stream(self._origin)
        stream.wait_stream(_side_stream(self._origin))
        values.record_stream(stream)
        before = None if self._before is None else self._before()
        if before is not None and before._streamed and before._arriving is None:
            before._arriving = before._bring(...)
        return values

    def _bring(self, part: slice | EllipsisType) -> Tensor:
        host = self._host[part]
        with torch.cuda.stream(_side_stream(self._origin)):
            return torch.empty(host.shape, dtype=host.dtype, device=self._origin).copy_(host, non_blocking=True)

    def __del__(self):
        # Not set when making the copy failed.
        if hasattr(self, "_host"):
            self._stats.release(self.n_bytes)


def settle() -> None:
    """Let the current streams wait for the copies queued so far, whose tensors are about to be overwritten."""
    for device, stream in _SIDE_STREAMS.items():
        torch.cuda.current_stream(device).wait_stream(stream)


def _is_streamed(origin: torch.device, device: torch.device) -> bool:
    return origin.type == "cuda" and device.type == "cpu"


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # `to(copy=True)` is missing for some layouts.
    return tensor.clone() if tensor.device == device else tensor.to(device)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]


def _send(values: Tensor) -> Tensor:
    """Start copying a CUDA tensor to pinned memory."""
    stream = _side_stream(values.device)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values.contiguous(), non_blocking=True)
    values.record_stream(stream)
    return host
