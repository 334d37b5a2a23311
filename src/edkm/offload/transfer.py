"""One tensor moved away and brought back.

On CUDA the copy goes to pinned memory on a side stream, so that it overlaps with the forward pass: the side stream waits for the
stream that made the tensor, `record_stream` keeps the allocator from handing the memory to others meanwhile, and whoever overwrites
the tensor first calls `settle`. Torch's caching host allocator is the pool of pinned memory. On the way back the current stream
waits for the side stream, which by then is already fetching the tensor that was packed just before: backward wants them in reverse.

Within one stream copies run in order, so nothing reads host memory before it has arrived.

From the CPU to the CPU the copy is a real one. It stands for the transfer, so that bytes can be counted without a GPU.
"""

from __future__ import annotations

import weakref
from functools import cache

import torch
from torch import Tensor

from edkm.offload.stats import Stats


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Copy:
    """A contiguous copy of `values` on `device`; released with the object.

    Args:
        values: any strided tensor, on the device where it is wanted back.
        device: where it is kept.
        stats: told of the bytes when the copy is made and when it goes.
        before: the copy made before this one, to be fetched ahead.
        overlap: whether the caller calls `settle` before `values` is overwritten. Otherwise it is done here.
    """

    __slots__ = ("__weakref__", "_arriving", "_before", "_done", "_host", "_origin", "_stats", "n_bytes")

    def __init__(self, values: Tensor, device: torch.device, stats: Stats, before: Copy | None = None, overlap: bool = False):
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
        """From here on the current stream may overwrite what was copied."""
        if self._done is not None:
            torch.cuda.current_stream(self._origin).wait_event(self._done)
            self._done = None

    def fetch(self) -> Tensor:
        """The values, a new tensor on the device they came from."""
        if not self._is_streamed(self._host.device):
            return self._host.to(self._origin, copy=True)
        values, ready = self._arriving or self._bring()
        self._arriving = None
        take_over(values, ready)
        before = None if self._before is None else self._before()
        if before is not None and before._arriving is None and before._is_streamed(before._host.device):
            before._arriving = before._bring()
        return values

    def _bring(self) -> tuple[Tensor, torch.cuda.Event]:
        stream = _side_stream(self._origin)
        with torch.cuda.stream(stream):
            values = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._origin)
            values.copy_(self._host, non_blocking=True)
            return values, _event(stream)

    def __del__(self):
        if hasattr(self, "_host"):
            self._stats.release(self.n_bytes)


def _send(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Pinned copy of a CUDA tensor under way, and the event of its arrival."""
    stream = _side_stream(values.device)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.contiguous(), non_blocking=True)
        done = _event(stream)
    values.record_stream(stream)
    return host, done


def made_now(device: torch.device) -> torch.cuda.Event | None:
    """For others to wait until the current stream has made what it was told to make; None where there are no streams."""
    return _event(torch.cuda.current_stream(device)) if device.type == "cuda" else None


def take_over(tensor: Tensor, ready: torch.cuda.Event | None) -> None:
    """The current stream may use a tensor that was made on another one."""
    if ready is not None:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(ready)
        tensor.record_stream(stream)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
