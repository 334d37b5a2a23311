"""Work as one of several processes that torchrun started: rank, collectives, sharing a model, and an end when a rank fails.

torchrun names the rank that failed first ("Root Cause") and ends the others. This file adds what to do then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel

# torchrun looks at its ranks ten times a second. A rank that lost another stays for so long: the first that it finds dead, it names.
_BEFORE_EXIT_S = 2.0


class RankError(ConnectionError):
    """Another rank failed."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def session(timeout_s: float) -> Iterator[None]:
    """Be in the process group that torchrun set up, if it did, where only the first rank prints; report an error to torchrun.

    A rank that exits with the group open may abort.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if world_size() == 1:
        yield
        return
    handler = get_error_handler()
    handler.initialize()
    try:
        yield
        dist.barrier()
    except RankError:
        raise
    except Exception as error:
        handler.record_exception(error)
        raise
    finally:
        dist.destroy_process_group()


def run_on_rank0(work: Callable[[], Any]) -> None:
    """Run `work` on rank 0 while the others wait.

    Raises:
        ValueError: on all ranks, if it raised ValueError or OSError on rank 0.
    """
    if world_size() == 1:
        work()
        return
    message: list[str | None] = [None]
    if rank() == 0:
        try:
            work()
        except (ValueError, OSError) as error:
            message = [str(error) or type(error).__name__]
    dist.broadcast_object_list(message, 0)
    if message[0] is not None:
        raise ValueError(message[0])


def check_several_ranks() -> None:
    """Refuse to shard a model (`--fsdp`) in one process."""
    if world_size() == 1:
        raise ValueError("--fsdp: there is one process and nothing to shard over. Start with torchrun --nproc-per-node N.")


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return mean_over_ranks(float(flag)) > 0


def mean_over_ranks(value: Tensor | float) -> float:
    """Return the mean of a number over the ranks."""
    if world_size() == 1:
        return float(value)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.as_tensor(value, dtype=torch.float32, device=device).clone()
    dist.all_reduce(total)
    return float(total) / world_size()


def of_rank0(value: int) -> int:
    """Return rank 0's value."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Give the tensors of all ranks rank 0's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def share_out(model: nn.Module, device: str, fsdp: bool) -> nn.Module:
    """Move a model to the device and share it with the other ranks; returns the module to call, which DDP wraps."""
    from edkm.train.prepare import clusterings
    from edkm.train.sharding import distribute, shard_model

    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        wrapped = model  # sharded before
    else:
        wrapped = model.to(device)
        if fsdp:
            shard_model(model)
        elif world_size() > 1 and any(p.requires_grad for p in model.parameters()):
            with warnings.catch_warnings():
                # The successor of the option sends all buffers once, tables among them.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers")
                wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    if world_size() > 1 and clusterings(model):
        distribute(model)
    return wrapped


@contextmanager
def report_failed_rank(remedy: str) -> Iterator[None]:
    """End this rank soon when another fails, and say so with a remedy; torchrun says which one.

    Raises:
        RankError: the connection to another rank was lost.
    """
    if world_size() == 1:
        yield
        return
    message = f"another rank failed, which torchrun names as the root cause. {remedy}"
    hung = f"another rank did not answer in time: it hangs, or its machine cannot be reached. {remedy}"
    with _end_on_sigterm(message):
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            time.sleep(_BEFORE_EXIT_S)
            raise RankError(f"rank {rank()} of {world_size()}: {hung if 'timed out' in str(error).lower() else message}") from error


@contextmanager
def _end_on_sigterm(message: str) -> Iterator[None]:
    """End the process with a message at SIGTERM, by which torchrun ends the others, even where its main thread waits for a collective."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    inside, outside = os.pipe()
    os.set_blocking(outside, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    number = signal.set_wakeup_fd(outside, warn_on_full_buffer=False)

    def listen() -> None:
        while (received := os.read(inside, 1)) and received[0] != signal.SIGTERM:
            pass
        if received:
            print(f"edkm: error: rank {rank()} of {world_size()} was ended: {message}", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)
        os.close(inside)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(number)
        signal.signal(signal.SIGTERM, before)
        os.close(outside)
