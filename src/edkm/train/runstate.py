"""Save and load the state of a training run: model, optimizer, step, losses and random numbers.

A checkpoint is a directory `step-N`, written under another name and renamed when it is complete. Weights and optimizer are in the format
of torch.distributed.checkpoint, sharded or not, so that any number of ranks can read what any other wrote.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from edkm.train import distributed


@dataclass
class RunState:
    """Steps made, losses logged, and the sum of this rank's losses since the last that was logged."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    loss_sum: Tensor | float = 0.0

    def add(self, loss: Tensor) -> None:
        """Count a step."""
        self.step += 1
        self.loss_sum = loss + self.loss_sum

    def log(self) -> float:
        """Return the mean loss over the ranks and the steps since the last call."""
        before = self.losses[-1][0] if self.losses else 0
        self.losses.append((self.step, distributed.mean_over_ranks(self.loss_sum) / (self.step - before)))
        self.loss_sum = 0.0
        return self.losses[-1][1]


def last_checkpoint(work: Path) -> Path | None:
    """Find the last complete checkpoint in a directory."""
    found = {int(path.name.partition("-")[2]): path for path in work.glob("step-*") if path.name.partition("-")[2].isdecimal()}
    return found[max(found)] if found else None


def clear_checkpoints(work: Path, *, keep: Path | None = None) -> None:
    """Make the directory of checkpoints, or remove those in it, complete or not, but the one to keep."""

    def clear() -> None:
        work.mkdir(parents=True, exist_ok=True)
        for path in work.glob("step-*"):
            if path != keep:
                shutil.rmtree(path)

    distributed.run_on_rank0(clear)


def save_checkpoint(work: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> None:
    """Write a checkpoint, then remove those before it; call it on all ranks."""
    path, part = work / f"step-{state.step}", work / f"step-{state.step}.part"
    distributed.run_on_rank0(lambda: shutil.rmtree(part, ignore_errors=True))
    with _alone_is_fine():
        save(_tensors(model, optimizer), checkpoint_id=part)
    generators = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    torch.save(generators, part / f"random-{distributed.rank()}.pt")
    found = {"step": state.step, "losses": state.losses, "loss_sum": distributed.mean_over_ranks(state.loss_sum)}
    distributed.barrier()

    def complete() -> None:
        (part / "run.json").write_text(json.dumps(found))
        part.rename(path)

    distributed.run_on_rank0(complete)
    clear_checkpoints(work, keep=path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> None:
    """Read a checkpoint into the model, the optimizer, the state and the generators of random numbers, in place."""
    found = _tensors(model, optimizer)
    with _alone_is_fine():
        load(found, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    run = json.loads((path / "run.json").read_text())
    state.step, state.loss_sum = run["step"], run["loss_sum"]
    state.losses = [(step, loss) for step, loss in run["losses"]]
    generators = path / f"random-{distributed.rank()}.pt"
    if generators.is_file():  # else there were fewer ranks
        states = torch.load(generators, weights_only=True)
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
