"""The processes of a run started with torchrun: who is who, what one does for all, and which one failed.

When a rank dies, some others learn of it as a broken connection, which names nobody, and the rest wait for those. So every rank has
a thread that listens at the store where the ranks met. The first rank that fails calls the roll there; the threads answer, even
where the main thread waits for a collective, and whoever does not answer has died. All ranks then end with that verdict.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# How long a failing rank waits for the others to answer, how often they listen, and how long a main thread has to end by itself.
_PATIENCE = timedelta(seconds=10)
_POLL_S = 0.5
_GRACE_S = 3.0


class RankError(ConnectionError):
    """Another rank failed; the message names it."""


class _Terminated(BaseException):
    """SIGTERM: torchrun ends the other ranks so when one has died."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def start(timeout_s: float) -> None:
    """Join the process group that torchrun set up, if it did; ranks but the first print nothing from now on."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


@contextmanager
def session(timeout_s: float) -> Iterator[None]:
    """`start`, listen for ranks that fail, and leave the process group at the end: a rank that exits with it open may abort."""
    global _listener
    start(timeout_s)
    if world_size() == 1:
        yield
        return
    _listener = listener = _Listener()
    try:
        yield
        dist.barrier()
    finally:
        listener.over.set()
        listener.noticed.set()
        _listener = None
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
    """Until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether it is set on any rank."""
    if world_size() == 1:
        return flag
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total > 0)


def broadcast_from_rank0(tensors: Iterable[torch.Tensor]) -> None:
    """Give the tensors of all ranks rank 0's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@contextmanager
def report_failed_rank(remedy: str) -> Iterator[None]:
    """Turn a failure within the block into one that says which rank failed.

    Raises:
        RankError: another rank died, or failed first; `remedy` ends the message.
    """
    if world_size() == 1:
        yield
        return
    before = _on_terminate(_raise_terminated)
    try:
        yield
    except RankError:
        raise
    except (Exception, _Terminated) as error:
        _on_terminate(signal.SIG_IGN)
        other = _roll_call(error, remedy)
        if other is not None:
            raise other from error
        if isinstance(error, _Terminated):
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        _on_terminate(before)


def _on_terminate(handler: Any) -> Any:
    try:
        return signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)
    except ValueError:  # not the main thread
        return None


def _raise_terminated(number: int, frame: Any) -> None:
    raise _Terminated


class _Listener(threading.Thread):
    """Answers a roll call and hears the verdict; ends the process if the main thread does not do so itself.

    Attributes:
        over: set when the run has ended well.
        noticed: set when the main thread knows of a failure and is about to end the run.
        done: set when it listens no more; `verdict` is final, and empty if none was heard.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over, self.noticed, self.done, self.verdict = threading.Event(), threading.Event(), threading.Event(), ""
        self.start()

    def run(self) -> None:
        try:
            self._hear(_store(), rank(), world_size())
        except (RuntimeError, OSError):  # rank 0, where the store lives, is gone; the main thread learns of it too
            pass
        finally:
            self.done.set()
        if self.verdict and not self.noticed.wait(_GRACE_S):
            print(f"edkm: error: {self.verdict}", file=sys.stderr, flush=True)
            os._exit(1)

    def _hear(self, store: dist.Store, me: int, everyone: int) -> None:
        while not store.check(["call"]):
            if self.over.wait(_POLL_S):
                return
        store.set(f"here {me}", "")
        store.wait(["verdict"], 2 * _PATIENCE)
        self.verdict = store.get("verdict").decode()
        store.set(f"heard {me}", "")
        if me == 0:  # The store ends with this process: stay until everyone has heard.
            lost = store.get("lost").decode().split()
            _wait_for(store, [f"heard {r}" for r in range(everyone) if str(r) not in lost])


_listener: _Listener | None = None


def _store() -> dist.Store:
    """A connection of its own to where the ranks met: the default one may be busy waiting."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)
    return dist.PrefixStore("edkm/failed", store)


def _roll_call(error: BaseException, remedy: str) -> RankError | None:
    """Who failed, if it was another rank."""
    me, everyone = rank(), world_size()
    listener = _listener or _Listener()
    listener.noticed.set()
    try:
        store = _store()
        if store.add("turn", 1) == 1:
            store.set("call", "")
            missing = _wait_for(store, [f"here {r}" for r in range(everyone)])
            lost = [key.split()[1] for key in missing]
            said = f"rank {me} of {everyone} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}."
            if lost:
                said = f"rank {', '.join(lost)} of {everyone} has died or does not answer."
            store.set("lost", " ".join(lost))
            store.set("verdict", f"{said} {remedy}")
    except (RuntimeError, OSError):
        pass
    listener.done.wait(4 * _PATIENCE.total_seconds())
    verdict = listener.verdict or f"rank 0 of {everyone} has died or does not answer. {remedy}"
    return None if verdict.startswith(f"rank {me} of ") else RankError(verdict)


def _wait_for(store: dist.Store, keys: list[str]) -> list[str]:
    """Those that do not appear in the store in time."""
    deadline = time.monotonic() + _PATIENCE.total_seconds()
    while keys and time.monotonic() < deadline:
        keys = [key for key in keys if not store.check([key])]
        time.sleep(0.05)
    return keys
