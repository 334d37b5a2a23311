"""Run one stage of a comparison in its own process, for its own peak memory: `python -m benchmarks.compare.stage DIR METHOD STAGE`.

STAGE is `make`, `perplexity:TEXT` or `task:NAME`. What it found goes into `DIR/METHOD/STAGE.json`, which is there only when it is done.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.making import CHECKPOINT, Job, make
from edkm.memory import peak_gpu_mib, peak_mib
from edkm.progress import shown
from edkm.textfile import read_text

SETTINGS = "compare.json"
TASKS = "tasks"


def path_of(root: Path, method: str, stage: str) -> Path:
    """Return the file of a stage's results."""
    return root / method / f"{stage.replace(':', '-').replace('/', '-')}.json"


def main(arguments: list[str]) -> int:
    root, name, stage = Path(arguments[0]), arguments[1], arguments[2]
    job = Job(root, name, json.loads((root / SETTINGS).read_text()))
    try:
        kind, _, what = stage.partition(":")
        with shown():
            found = make(job) if kind == "make" else {"perplexity": _perplexity, "task": _task}[kind](job, what)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    write_whole(path_of(root, name, stage), json.dumps({"peak_mib": peak_mib(), "peak_gpu_mib": peak_gpu_mib(), **found}, indent=2))
    return 0


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _load(job: Job) -> tuple[Any, Any]:
    import torch

    from edkm.models import load_model

    model, tokenizer = load_model(job.directory / CHECKPOINT)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _perplexity(job: Job, name: str) -> dict[str, Any]:
    """Measure perplexity, after a check that the checkpoint is quantized as the method says."""
    from edkm.evaluate import perplexity

    model, tokenizer = _load(job)
    distinct = check_quantized(job, model)
    text = read_text(job.settings["texts"][name]["path"])
    result = perplexity(model, tokenizer, text, window=job.settings["window"], max_windows=job.settings["max_windows"])
    return {"most_distinct": distinct, **asdict(result)}


def check_quantized(job: Job, model: Any) -> int | None:
    """Count the most distinct values in a block that shares a scale or a table; None for a model in 16 bits.

    Raises:
        ValueError: there are more than the method allows: the model is not quantized.
    """
    from benchmarks.compare.dense import linear_weights
    from benchmarks.compare.rtn import most_distinct

    made = json.loads(path_of(job.root, job.name, "make").read_text())
    block, tables = made.get("block"), made.get("tables")
    if block is None and tables is None:
        return None
    found = {}
    for name, weight in linear_weights(model).items():
        rows, most = tables[name] if tables else (block[0], 2**job.bits)
        found[name] = most_distinct(weight, rows, block[1] if block else 0)
        if found[name] > most:
            raise ValueError(f"{job.name}: {name} has {found[name]} distinct values where {most} are allowed.")
    return max(found.values())


def _task(job: Job, task: str) -> dict[str, Any]:
    """Score a task: by the file that `benchmarks tasks` writes if it knows the name, else as `edkm eval` does."""
    from benchmarks import tasks
    from edkm.tasks import evaluate_tasks

    source = task
    if task in tasks.NAMES:
        folder = job.root / TASKS
        folder.mkdir(exist_ok=True)
        file = folder / f"{task}.yaml"
        source = str(file if file.is_file() else tasks.write(folder, task))
    model, tokenizer = _load(job)
    scores = evaluate_tasks(model, tokenizer, [source], limit=job.settings["limit"])
    return {"scores": {name: asdict(score) for name, score in scores.items()}}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
