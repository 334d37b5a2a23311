"""Runs the cases: each in a worker whose memory and time are measured, so that a crash or a hang is a result and no accident."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.fuzz import files, texts
from benchmarks.fuzz.originals import save_originals

MUTATIONS = texts.MUTATIONS | files.MUTATIONS
# Beside twice the files: text of up to `text_limit` bytes (512 KiB and a little) takes up to 30 times its size when it is parsed, and
# transformers holds a config more than once while it loads (from_pretrained took 53 MiB for one of 512 KiB, eval 44).
ALLOWED_BYTES = 60 << 20
# Of the processor: on a busy machine the clock says nothing. Without an answer for TIMEOUT_S a worker hangs.
SLOW_S = 20.0
TIMEOUT_S = 180.0
# A reservation far beyond any of the files fails at once instead of filling the machine.
_ADDRESS_SPACE = 4 << 30
_CLEAR = re.compile(r"\S.*: .*\. [A-Z].*\.")

Load = Callable[[Path], dict[str, Any]]


class Result(NamedTuple):
    """Outcome of one case.

    Attributes:
        case: its number: with the seed it makes the case again.
        kind: of mutation.
        original: that was mutated.
        outcome: "refused" or "identical"; else what is wrong: "crash", "hang", "slow", "memory", "changed", "error" (not a ValueError),
            "unclear" (not one line with subject, rule and remedy), "refused though legal".
        message: of the error.
        extra_bytes: peak memory of the process above what the original takes.
        file_bytes: of the directory.
        seconds: of the processor.
    """

    case: int
    kind: str
    original: str
    outcome: str
    message: str
    extra_bytes: int
    file_bytes: int
    seconds: float


class Worker:
    """Process that loads one directory after another; started again after it has ended."""

    def __init__(self, load: Load, originals: list[Path], timeout_s: float) -> None:
        self.load, self.originals, self.timeout_s = load, originals, timeout_s
        self.process: Any = None

    def ask(self, directory: Path) -> dict[str, Any] | str:
        """Return the worker's answer, or "hang" or "crash"."""
        if self.process is None:
            self._start()
        self.pipe.send(directory)
        return self._answer(self.timeout_s)

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.join()
        self.process = None
        self.pipe.close()

    def _start(self) -> None:
        # A fresh interpreter: a fork would inherit memory that is not the loader's.
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self.load, self.originals), daemon=True)
        self.process.start()
        other.close()
        if (answer := self._answer(120)) != "ready":
            raise RuntimeError(f"the originals do not load: {answer}")

    def _answer(self, timeout_s: float) -> Any:
        if not self.pipe.poll(timeout_s):
            self.stop()
            return "hang"
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(5)
            self.stop()
            return "crash"


def run(
    load: Load, numbers: Iterable[int], seed: int, *, timeout_s: float = TIMEOUT_S, keep: Path | None = None, only: str = ""
) -> Iterator[Result]:
    """Damages a packed model in one way after another and loads it.

    Args:
        load: from a directory to its tensors; found by name in a fresh process, so a function of a module.
        numbers: of the cases. A case depends on its number and the seed alone.
        seed: of the damage.
        timeout_s: after which a case is a hang.
        keep: a directory that keeps the last damaged model.
        only: kinds of mutation whose names start with this.

    Yields:
        One result for each case, in order.

    Cost:
        About 10 ms a case for a loader of that speed; disk for three models of 8 MiB.
    """
    kinds = sorted(kind for kind in MUTATIONS if kind.startswith(only))
    with tempfile.TemporaryDirectory() as folder:
        originals = save_originals(Path(folder))
        expected: dict[str, Any] = {}
        worker = Worker(load, originals, timeout_s)
        try:
            for number in numbers:
                rng = Random(f"{seed}-{number}")
                original = rng.choices(originals, (20, 19, 10, 1))[0]
                kind = kinds[number % len(kinds)]
                place = Path(folder) / "case"
                directory = place / "model"
                shutil.copytree(original, directory)
                MUTATIONS[kind](directory, rng)
                if not expected:
                    expected = {path.name: worker.ask(path) for path in originals}
                answer = worker.ask(directory)
                yield judge(number, kind, original.name, answer, expected[original.name], _size(directory))
                if keep is not None:
                    shutil.copytree(directory, keep, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(place)
        finally:
            worker.stop()


def judge(number: int, kind: str, original: str, answer: Any, expected: Any, size: int) -> Result:
    """Judge a case by the worker's answers for it and for the original."""
    if isinstance(answer, str):
        return Result(number, kind, original, answer, "", 0, size, 0.0)
    message, extra = answer["message"], max(0, answer["peak_bytes"] - expected["peak_bytes"])
    if answer["error"] is None:
        outcome = "identical" if answer["tensors"] == expected["tensors"] else "changed"
    elif not answer["refusal"]:
        outcome, message = "error", f"{answer['error']}: {message}"
    elif not message.isprintable() or len(message) > 1500 or not _CLEAR.fullmatch(message):
        outcome = "unclear"
    else:
        outcome = "refused though legal" if kind.startswith("legal") else "refused"
    if extra > 2 * size + ALLOWED_BYTES:
        outcome = "memory"
    if answer["seconds"] > SLOW_S:
        outcome = "slow"
    return Result(number, kind, original, outcome, message, extra, size, answer["seconds"])


def _size(directory: Path) -> int:
    """Count the bytes of the files, and of those that links lead to; nothing else has a size."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file() and not str(path.resolve()).startswith("/proc/"))


def _work(pipe: Connection, load: Load, originals: list[Path]) -> None:
    for path in originals * 2:
        load(path)
    # What is there now stays: the collections before each case need not look at it.
    gc.collect()
    gc.freeze()
    # What a library logs about a damaged model is no result.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send("ready")
    while True:
        pipe.send(_measure(load, pipe.recv()))


def _measure(load: Load, directory: Path) -> dict[str, Any]:
    answer: dict[str, Any] = {"error": None, "refusal": False, "message": "", "tensors": {}}
    gc.collect()
    # Linux: the mark of highest memory starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status("VmRSS"), time.process_time()
    try:
        tensors = load(directory)
    # Rust's panics are BaseExceptions.
    except BaseException as error:
        answer |= {"error": type(error).__name__, "refusal": isinstance(error, ValueError), "message": str(error)}
        tensors = {}
    answer |= {"seconds": time.process_time() - start, "peak_bytes": _status("VmHWM") - before}
    answer["tensors"] = {name: _fingerprint(tensor) for name, tensor in tensors.items()}
    return answer


def _fingerprint(tensor: Any) -> str:
    import torch

    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _status(field: str) -> int:
    """Read bytes from Linux's account of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10
