"""Keep the state of a run in its work directory: its identity, its tokens, and its weights after fine-tuning."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edkm.compressed.jsonfile import write_json
from edkm.output import check_output, replacing
from edkm.train import distributed


def check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output directory that would lose files, and a run that cannot be resumed."""
    interrupted = (out / "training" / "run.json").is_file()
    if resume and not interrupted:
        raise ValueError(f"{out}: there is no interrupted run to resume. Start without --resume.")
    if interrupted and not resume and not overwrite:
        raise ValueError(f"{out}: holds an interrupted run. Go on with --resume, or start again with --overwrite.")
    check_output(out, overwrite=overwrite or resume)


def begin_run(work: Path, identity: dict[str, Any], blocks: Any) -> None:
    """Write the identity and the tokens of a run."""
    work.mkdir(parents=True)
    blocks.save(work / "blocks.pt")
    write_json(work / "run.json", identity)


def check_same_run(work: Path, identity: dict[str, Any]) -> None:
    """Refuse to resume a run with other settings.

    Raises:
        ValueError: with the name of a setting that differs.
    """
    before = json.loads((work / "run.json").read_text())
    now = json.loads(json.dumps(identity))
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{key}: the interrupted run had {before.get(key)!r}, this one has {now.get(key)!r}. Resume with the same settings, "
                "or start again with --overwrite."
            )


def end_run(work: Path) -> None:
    """Remove the work directory, first the identity: a rest of it cannot be resumed."""
    (work / "run.json").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the state of a model, all of it or nothing; the weights of a sharded model are gathered on rank 0."""
    state = model.state_dict()
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def save() -> None:
        with replacing(path) as part:
            torch.save(state, part)

    distributed.run_on_rank0(save)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read the state that `save_weights` wrote into the same model, loaded afresh."""
    model.load_state_dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))


@contextmanager
def kept_weights(path: Path) -> Iterator[Callable[[Sequence[str]], Tensor]]:
    """Open the file that `save_weights` wrote in the place of a skeleton's checkpoint."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    yield lambda names: state[next(name for name in names if name in state)]


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes and some evenly spread values of the parameters of a model."""
    found = hashlib.sha256()
    for name, p in parameters:
        values = p.detach().flatten()[:: max(1, p.numel() // 1024)].cpu().double()
        found.update(f"{name} {tuple(p.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()
