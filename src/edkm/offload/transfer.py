"""Move a tensor away, bring it back, and count the bytes.

On CUDA a copy goes to pinned memory on a side stream, so that it overlaps with the forward pass: the side stream waits for the stream
that made the tensor, `record_stream` keeps the allocator from reusing the memory meanwhile, and `settle` must be called before the tensor
is overwritten. On the way back the current stream waits for the side stream, which then already fetches the copy made just before:
backward wants them in reverse. Within one stream copies run in order, so host memory is never read before it has arrived.

From the CPU to the CPU the copy is a real one. It stands for the transfer, so that bytes can be counted without a GPU.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cache
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

_MIB = 1 << 20


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
    """A contiguous copy of `values` on `device`, counted in `stats` until it is freed.

    Args:
        values: any strided tensor.
        device: where the copy is kept.
        stats: counts its bytes.
        before: the copy made before this one, to be fetched ahead.
        overlap: whether the caller calls `settle` before `values` is overwritten. Otherwise it is done here.
    """

    __slots__ = ("__weakref__", "_arriving", "_before", "_done", "_host", "_origin", "_stats", "n_bytes")

    def __init__(self, values: Tensor, device: torch.device, stats: Stats, before: OffloadedCopy | None = None, overlap: bool = False):
        self._origin, self._stats = values.device, stats
        self._before = None if before is None else weakref.ref(before)
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None
        self._done: torch.cuda.Event | None = None
        self.n_bytes = values.numel() * values.itemsize
        if self._is_streamed(device):
            self._host, self._done = _send(values)
            if not overlap:
                self.settle()
        else:
            self._host = torch.empty(values.shape, dtype=values.dtype, device=device).copy_(values)
        stats.hold(self.n_bytes)

    def _is_streamed(self, device: torch.device) -> bool:
        return self._origin.type == "cuda" and device.type == "cpu"

    def settle(self) -> None:
        """Let the current stream wait until `values` may be overwritten."""
        if self._done is not None:
            torch.cuda.current_stream(self._origin).wait_event(self._done)
            self._done = None

    def fetch(self, part: slice | EllipsisType = ...) -> Tensor:
        """Return `values[part]` as a new tensor on the device they came from."""
        if not self._is_streamed(self._host.device):
            return self._host[part].to(self._origin, copy=True)
        arriving, self._arriving = self._arriving, None
        values, ready = self._bring(part) if arriving is None else (arriving[0][part], arriving[1])
        stream = torch.cuda.current_stream(values.device)
        stream.wait_event(ready)
        values.record_stream(stream)
        before = None if self._before is None else self._before()
        if before is not None and before._arriving is None and before._is_streamed(before._host.device):
            before._arriving = before._bring(...)
        return values

    def _bring(self, part: slice | EllipsisType) -> tuple[Tensor, torch.cuda.Event]:
        stream = _side_stream(self._origin)
        with torch.cuda.stream(stream):
            host = self._host[part]
            values = torch.empty(host.shape, dtype=host.dtype, device=self._origin)
            values.copy_(host, non_blocking=True)
            return values, _event(stream)

    def __del__(self):
        if hasattr(self, "_host"):
            self._stats.release(self.n_bytes)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _send(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Start copying a CUDA tensor to pinned memory; return the copy and the event of its arrival."""
    stream = _side_stream(values.device)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.contiguous(), non_blocking=True)
        done = _event(stream)
    values.record_stream(stream)
    return host, done


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
