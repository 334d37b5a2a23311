"""Make the checkpoint of each method: one function per maker, each run in its own process (`stage.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.methods import METHODS, Method, account, budget, group_size

CHECKPOINT = "checkpoint"
_CALIBRATION = "calibration.safetensors"
_RUNNERS = Path(__file__).parent / "baselines"


@dataclass(frozen=True)
class Job:
    """One method in one comparison.

    Attributes:
        root: the comparison's directory.
        name: of the method.
        settings: what the comparison was asked for; see `command.settings_of`.
    """

    root: Path
    name: str
    settings: dict[str, Any]

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def directory(self) -> Path:
        return self.root / self.name

    @property
    def bits(self) -> int:
        return self.settings["bits"]

    @property
    def start(self) -> Path:
        return self.root / self.method.start / CHECKPOINT

    def original(self) -> dict[str, Any]:
        """Read the results of `make_original`: `model`, the inventory, and `group`."""
        return json.loads((self.root / "original" / "make.json").read_text())

    @property
    def lr(self) -> float | None:
        return self.settings["lr"].get(self.name, self.method.lr)


def make(job: Job) -> dict[str, Any]:
    """Make the checkpoint of a method.

    Returns:
        `seconds`; `linear_bits`, `total_bits` and `bytes`; `block`, the `(rows, columns)` that share a scale; or `tables`, for each
        tensor of a packed file the rows that share a table and its entries; neither in 16 bits; and what else the maker has to say.
    """
    began = time.perf_counter()
    found = _MAKERS[job.method.maker](job)
    seconds = found.pop("seconds", time.perf_counter() - began)
    return {"seconds": seconds, **found}


def last_line(log: Path, code: int) -> str:
    """Return the last line of a process's log, and where the rest is."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    said = f"ended by signal {-code}" if code < 0 else lines[-1] if lines else f"exit code {code}"
    return f"{said} (all of it: {log})"


def _make_original(job: Job) -> dict[str, Any]:
    """Save the model that all start from, in 16 bits, and the blocks that post-training methods are calibrated on."""
    from safetensors.torch import save_file

    from benchmarks.compare.dense import inventory, save_16_bit, untied_head
    from edkm.models import load_model

    model, tokenizer = load_model(job.settings["model"])
    blocks = _blocks(job, model, tokenizer)
    save_file({"input_ids": blocks.spread(job.settings["calibration_blocks"]).contiguous()}, job.root / _CALIBRATION)
    found = inventory(model)
    group = group_size(columns for _, columns in found["linear"])
    dtype = save_16_bit(model, tokenizer, job.directory / CHECKPOINT)
    head = untied_head(model)
    return {"seconds": 0.0, "dtype": dtype, "model": found, "group": group, "untied_head": head, **_bits(job, found, group)}


def _make_control(job: Job) -> dict[str, Any]:
    from benchmarks.compare.dense import save_16_bit

    model, tokenizer = _load(job)
    seconds = _train(job, model, _blocks(job, model, tokenizer))
    save_16_bit(model, tokenizer, job.directory / CHECKPOINT)
    return {"seconds": seconds, **_bits(job)}


def _make_rtn(job: Job) -> dict[str, Any]:
    import torch

    from benchmarks.compare.dense import linear_weights
    from benchmarks.compare.rtn import round_to_nearest

    model, tokenizer = _load(job)
    began = time.perf_counter()
    with torch.no_grad():
        for weight in linear_weights(model).values():
            weight.copy_(round_to_nearest(weight, job.bits, job.original()["group"]))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **_finish(job, model, tokenizer)}


def run_library(
    python: str | Path, runner: str, method: str, files: Mapping[str, Path], words: Sequence[Any], folder: Path, name: str
) -> dict[str, Any]:
    """Run a method of the environment of the baselines; it leaves `weights.safetensors`, its figures are returned.

    Args:
        runner: file name in `baselines`.
        files: those of its options that name files.
        words: its other options.
        folder: of all that it writes.
        name: for the error.

    Raises:
        ValueError: it failed, with the last line that it printed.
    """
    command = [python, _RUNNERS / runner, method, *(word for key, path in files.items() for word in (f"--{key}", path.resolve()))]
    command += ["--out", folder.resolve(), *words]
    # In its own folder: the library keeps logs where it runs. It has its own packages: ours must not be found first.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    log = folder / "library.log"
    with log.open("w") as file:
        done = subprocess.run([str(p) for p in command], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ValueError(f"{name}: {last_line(log, done.returncode)}")
    return json.loads((folder / "figures.json").read_text())


def _make_library(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file

    from benchmarks.compare.dense import linear_weights

    original = job.original()
    algorithm = job.name.rpartition("+")[2]
    runner = f"{job.method.library}.py"
    words = ["--bits", job.bits, "--group", original["group"]]
    words += ["--skip", *(name.removesuffix(".weight") for name in original["untied_head"]), "lm_head"]
    words += _autoround(job) if algorithm == "autoround" else []
    files = {"model": job.start, "calibration": job.root / _CALIBRATION}
    figures = run_library(job.settings["baselines"], runner, algorithm, files, words, job.directory, job.name)
    model, tokenizer = _load(job)
    missed = set(linear_weights(model)) - set(figures["quantized"])
    if missed:
        raise ValueError(f"{job.name}: the library did not quantize {sorted(missed)[0]} and {len(missed) - 1} more.")
    weights = job.directory / "weights.safetensors"
    model.load_state_dict(load_file(weights), strict=False)
    weights.unlink()
    return {**{key: found for key, found in figures.items() if key != "quantized"}, **_finish(job, model, tokenizer)}


def _autoround(job: Job) -> list[Any]:
    """Return what AutoRound, which trains, is told besides; it computes in the precision of the other methods that train."""
    from edkm.train.loop import resolve_precision

    blocks = job.settings["autoround_blocks"]
    options = ["--iters", job.settings["autoround_iters"], "--precision", resolve_precision(job.settings["precision"])]
    return [*options, "--blocks", blocks] if blocks else options


def _make_llm_qat(job: Job) -> dict[str, Any]:
    from benchmarks.compare import llm_qat
    from edkm.calibrationtext import write_texts

    model, tokenizer = _load(job)
    teacher, _ = _load(job)
    count = max(1, job.settings["steps"] * job.settings["batch"])
    began = time.perf_counter()
    chosen = count, job.settings["block_tokens"], job.settings["seed"]
    texts = write_texts(teacher, tokenizer, *chosen) if job.settings["steps"] else None
    writing = time.perf_counter() - began
    llm_qat.quantize(model, job.bits)
    training = _train(job, model, texts, teacher)
    llm_qat.settle(model, job.bits)
    return {"seconds": writing + training, "writing_seconds": writing, **_finish(job, model, tokenizer)}


def _make_dkm(job: Job) -> dict[str, Any]:
    from benchmarks.compare.dkm import config, prepare_dkm
    from edkm.train import loop  # noqa: F401  # now, so that its import is not measured
    from edkm.train.save import write

    model, tokenizer = _load(job)
    blocks = _blocks(job, model, tokenizer)
    began = time.perf_counter()
    settings = config(model, job.bits)
    prepare_dkm(model, settings)
    _train(job, model, blocks)
    seconds = time.perf_counter() - began
    write(job.directory / CHECKPOINT, model.cpu(), tokenizer)
    return {"seconds": seconds, **_packed(job)}


def _make_edkm(job: Job) -> dict[str, Any]:
    """Run the recipe of `edkm compress` with its defaults, for no more bits than the methods with groups take."""
    from edkm.config import ClusterConfig
    from edkm.recipe import Recipe, compress

    original, settings = job.original(), job.settings
    target = budget(job.bits, original["group"])
    chosen = {name: settings[name] for name in ("steps", "block_tokens", "batch", "seed", "precision")}
    chosen |= {} if job.lr is None else {"lr": job.lr}
    config = ClusterConfig(rows_per_lut=1, skip=tuple(original["untied_head"]))
    began = time.perf_counter()
    compress(job.start, Recipe(config, target_bpw=target, **chosen), job.directory / CHECKPOINT, data=settings["data"])
    return {"seconds": time.perf_counter() - began, "target_bpw": target, **_packed(job)}


_MAKERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "original": _make_original,
    "control": _make_control,
    "rtn": _make_rtn,
    "library": _make_library,
    "llm_qat": _make_llm_qat,
    "dkm": _make_dkm,
    "edkm": _make_edkm,
}


def _load(job: Job) -> tuple[Any, Any]:
    from edkm.models import load_model

    return load_model(job.start)


def _blocks(job: Job, model: Any, tokenizer: Any) -> Any:
    from edkm.train.data import load_blocks

    return load_blocks(job.settings["data"], tokenizer, block_tokens=job.settings["block_tokens"], model=model)


def _train(job: Job, model: Any, blocks: Any, teacher: Any = None) -> float:
    """Train in place, the same number of blocks for every method, to predict them or as the teacher does; return the seconds."""
    from edkm.train.loop import TrainSettings, train

    if not job.settings["steps"]:
        return 0.0
    chosen = {name: job.settings[name] for name in ("steps", "batch", "precision", "seed")}
    settings = TrainSettings(lr=job.lr, distill=0.0 if teacher is None else 1.0, **chosen)
    result = train(model, blocks, settings, job.directory / "training", teacher=teacher)
    if result.interrupted:
        raise KeyboardInterrupt
    return result.seconds


def _finish(job: Job, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Put embeddings on 8 bits, and save; float32 holds every quantized value exactly."""
    from benchmarks.compare.dense import round_embeddings, save

    round_embeddings(model)
    save(model.float(), tokenizer, job.directory / CHECKPOINT)
    return {"block": job.method.block_of(job.original()["group"]), **_bits(job)}


def _bits(job: Job, model: dict[str, Any] | None = None, group: int = 0) -> dict[str, float]:
    if model is None:
        original = job.original()
        model, group = original["model"], original["group"]
    return account(job.method, job.bits, group, model)


def _packed(job: Job) -> dict[str, Any]:
    """Read the figures of a packed directory from its files."""
    from edkm.compressed.checkpoint import summary

    found = summary(job.directory / CHECKPOINT)
    names = {"clustered_bits_per_weight": "linear_bits", "bits_per_weight": "total_bits", "file_bytes": "bytes"}
    blocks = {tensor["name"]: (tensor["shape"][0] // tensor["luts"], 2 ** tensor["bits"]) for tensor in found["tensors"]}
    return {"tables": blocks, **{ours: found[theirs] for theirs, ours in names.items()}}
