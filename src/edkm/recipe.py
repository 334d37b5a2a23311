"""Compress a model while it is fine-tuned: the main path of edkm on one page.

`compress` passes one `Run` through a list of stages, each a plain function. A stage that takes long leaves its result in the work
directory (`OUT/training`), so a run that is interrupted or killed goes on to the same result:

    check_out, read, choose_kind, load, begin
                             files, numbers and the model are checked before anything expensive is done
    fine_tune                the model as it is; its weights stay in `finetuned.pt`
    cluster                  `edkm.prepare`: calibrate, choose bits, fit, cluster; the config that it used stays in `config.json`,
                             and text that the model wrote for it in `written.pt`.
                             Without steps a layer at a time, each read from the checkpoint, with a result of its own in `layers`
    train_clustered          the rest of the optimizer steps
    write, tune_tables       the packed directory; where asked, its tables are trained with their indices fixed
    report                   its record and page; then the work directory is removed
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm.calibrationtext import LAYER_BATCH, LAYER_BLOCKS, SOURCES, calibration_batches, write_text
from edkm.compressed.companions import copy_companions
from edkm.compressed.jsonfile import write_json
from edkm.config import ClusterConfig
from edkm.modelfiles import model_files
from edkm.models import load_model
from edkm.presets import PRESETS
from edkm.run import (
    Run,
    begin,
    check_out,
    choose_kind,
    go_by_layer,
    load,
    print_report,
    read,
    show_plan,
    weights_dtype,
)
from edkm.train import checkpoints, distributed, loop, runstate
from edkm.train.allocate import allocate
from edkm.train.calibrate import calibrate
from edkm.train.layerwise import LayerTraining
from edkm.train.optimizers import MEMORY, check_memory
from edkm.train.prepare import plan, prepare
from edkm.train.save import write as write_packed
from edkm.train.save import write_frozen
from edkm.train.skeleton import Skeleton
from edkm.train.stream import Stream, packed_weights
from edkm.train.tables import write_tuned
from edkm.tuning import Tuning, load_tunable


@dataclass(frozen=True)
class Recipe:
    """Settings of a run of `compress`.

    Attributes:
        config: for `edkm.prepare`; the clustered steps are its `anneal_steps`.
        preset: a name in `PRESETS`, for `finetune_steps` and `target_bpw` where they are None.
        target_bpw: average bits per linear weight, tables included; None keeps the bits of the config.
        by_layer: train each decoder layer against what the original gives, when it is fitted; True for the settings of `LayerTraining`.
        calibration: text that weights are fitted on: `data`, `own` for text that the model writes before, or `both`, half of each.
        steps: optimizer steps; None for as many as `epochs` passes over the data take.
        tune_steps: steps after all these, which train the tables of the packed model with its indices fixed.
        finetune_steps: the first of these steps, which train the model as it is.
        lr, optimizer, distill, precision, fsdp, save_every, report_to: as in `loop.TrainSettings`.
        memory: a kind of `edkm.train.optimizers.MEMORY`, or `auto` for the first whose plan fits the device.
        block_tokens: tokens of a training block; `batch` blocks make a micro-batch, `grad_accumulation` micro-batches a rank's step.
        timeout_s: seconds that ranks wait for each other.
        backend: as in `edkm.prepare`.

    Raises:
        ValueError: a number out of range, an unknown preset or optimizer, `target_bpw` for vectors.
    """

    config: ClusterConfig = field(default_factory=lambda: ClusterConfig(rows_per_lut=1))
    preset: str = "balanced"
    target_bpw: float | None = None
    by_layer: LayerTraining | bool = False
    calibration: str = "data"
    steps: int | None = None
    epochs: float = 1.0
    finetune_steps: int | None = None
    tune_steps: int = 0
    lr: float = 2e-4
    optimizer: str = "adamw"
    distill: float = 0.0
    block_tokens: int = 512
    batch: int = 2
    grad_accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: str = "auto"
    memory: str = "auto"
    fsdp: bool = False
    timeout_s: float = 1800.0
    seed: int = 0
    save_every: int = 0
    report_to: tuple[str, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        at_least = {
            "steps": 0,
            "finetune_steps": 0,
            "tune_steps": 0,
            "save_every": 0,
            "block_tokens": 2,
            "batch": 1,
            "grad_accumulation": 1,
            "seed": 0,
        }
        for name, low in at_least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"{name}: at least {low}, got {value}.")
        for name in ("lr", "epochs", "timeout_s", "target_bpw"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: a positive number, got {value}.")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill: from 0 to 1, got {self.distill}.")
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {', '.join(PRESETS)}, got {self.preset!r}.")
        if self.calibration not in SOURCES:
            raise ValueError(f"calibration: {', '.join(SOURCES)}, got {self.calibration!r}.")
        if self.memory not in ("auto", *MEMORY):
            raise ValueError(f"memory: auto, {', '.join(MEMORY)}, got {self.memory!r}.")
        check_memory(self.training(1))
        if self.config.dim != 1 and self.chooses_bits:
            raise ValueError("dim: bits are chosen for single weights. Use dim 1, or neither target_bpw nor the preset best.")

    @property
    def chooses_bits(self) -> bool:
        return self.target_bpw is not None or PRESETS[self.preset].choose_bits

    @property
    def streams(self) -> bool:
        """Whether the model is compressed a layer at a time, so that it need not be in memory."""
        return self.steps == 0 and not self.chooses_bits

    @property
    def fits_last(self) -> bool:
        """Whether no step follows the fit, so that it can go a layer at a time."""
        return self.finetune_steps == self.steps and not self.chooses_bits

    @property
    def layer_training(self) -> LayerTraining | None:
        """Settings of the training of each layer, if they are trained one by one."""
        if not self.by_layer:
            return None
        given = self.by_layer if isinstance(self.by_layer, LayerTraining) else LayerTraining()
        return replace(given, precision=loop.resolve_precision(self.precision), seed=self.seed)

    def training(self, steps: int, **more: Any) -> loop.TrainSettings:
        """Return the settings of the training loop for so many steps; of memory `high` while it is to be chosen."""
        more.setdefault("memory", "high" if self.memory == "auto" else self.memory)
        more |= {"accumulate": self.grad_accumulation, "checkpointing": self.gradient_checkpointing}
        same = {name: getattr(self, name) for name in ("lr", "batch", "precision", "seed", "save_every", "fsdp", "optimizer", "report_to")}
        return loop.TrainSettings(steps=steps, **same, **more)

    def settled(self, blocks: int) -> Recipe:
        """Return the recipe for a number of training blocks, with its steps, fine-tuning steps and annealing as numbers."""
        per_step = self.training(1).blocks_per_step
        steps = max(1, math.ceil(blocks / per_step * self.epochs)) if self.steps is None else self.steps
        first = int(steps * PRESETS[self.preset].finetune_share) if self.finetune_steps is None else self.finetune_steps
        if first > steps:
            raise ValueError(f"finetune_steps: at most the {steps} steps there are, got {first}.")
        if self.distill and first == steps and not self.tune_steps:
            raise ValueError("distill: is for clustered steps, and there are none. Leave it out, or fine-tune for fewer steps.")
        return replace(self, config=replace(self.config, anneal_steps=steps - first), steps=steps, finetune_steps=first)


def fine_tune(run: Run) -> None:
    """Train the model as it is for the first steps; the memory of the optimizer is free afterwards."""
    steps, kept = run.recipe.finetune_steps, run.work / "finetuned.pt"
    if not steps:
        return
    if not kept.is_file():
        _train(run, run.recipe.training(steps), "fine-tuning", run.work / "fine-tuning")
        checkpoints.save_weights(kept, run.model)
        distributed.run_on_rank0(lambda: shutil.rmtree(run.work / "fine-tuning"))
        run.model.eval().zero_grad(set_to_none=True)
        if not run.recipe.fsdp:
            return
        run.model = None  # the fit needs whole tensors
        run.model = load_model(run.source, weights_dtype(run.recipe))[0]
    checkpoints.load_weights(kept, run.model)
    run.to_device()


def cluster(run: Run) -> None:
    """Calibrate, choose bits, fit and cluster, unless clustered training has begun: then its checkpoint has weights and tables."""
    write_text(run)
    recipe, began, chosen = run.recipe, time.perf_counter(), run.work / "config.json"
    if recipe.fits_last and run.skeleton is None:
        go_by_layer(run)
    if run.skeleton is not None:
        _cluster_by_layer(run, run.skeleton)
        return
    run.teacher = copy.deepcopy(run.model) if recipe.distill and not recipe.fits_last else None
    batches = calibration_batches(run)
    if runstate.last_checkpoint(run.work / "clustered") is not None:
        config = ClusterConfig.from_json(json.loads(chosen.read_text()))
        report = prepare(run.model, config, batches, centroids=_placeholders(run.model, config), backend=recipe.backend)
    else:
        config, target, by_layer = recipe.config, recipe.target_bpw, recipe.layer_training
        if by_layer is not None:
            if target is not None:
                config, target = allocate(run.model, config, batches, target, importance=calibrate(run.model, batches)), None
            batches = calibration_batches(run, LAYER_BLOCKS, LAYER_BATCH)
        report = prepare(run.model, config, batches, target_bpw=target, by_layer=by_layer, backend=recipe.backend)
        run.recorder.weights(run.model, "fitted")
        run.recorder.phase("calibration and fit", time.perf_counter() - began)
        if recipe.steps:
            distributed.run_on_rank0(lambda: write_json(chosen, report.config.to_json()))
    print_report(report, time.perf_counter() - began)


def _cluster_by_layer(run: Run, skeleton: Skeleton) -> None:
    """Fit and cluster a layer at a time; each leaves its result in `layers`."""
    began = last = time.perf_counter()
    training, drawn = run.recipe.layer_training, partial(run.recorder.panel, when="fitted")
    batches = calibration_batches(run, *((LAYER_BLOCKS, LAYER_BATCH) if training else ()))
    bf16 = loop.resolve_precision(run.recipe.precision) == "bf16"
    run.stream = Stream(skeleton, run.recipe.config, batches, run.work / "layers", bf16, training, drawn)
    for _ in run.stream.run():
        run.recorder.phase("calibration and fit", time.perf_counter() - last)
        last = time.perf_counter()
    print_report(run.stream.frozen()[1], last - began)


def train_clustered(run: Run) -> None:
    """Train the clustered weights for the steps that are left."""
    first, steps = run.recipe.finetune_steps or 0, run.recipe.steps or 0
    if steps > first:
        settings = run.recipe.training(steps - first, first_step=first, distill=run.recipe.distill)
        _train(run, settings, "clustered training", run.work / "clustered")
        run.recorder.weights(run.model, "trained")


def write(run: Run) -> None:
    """Write the packed directory, with the other files of the source."""
    began = time.perf_counter()
    if Path(run.source).suffix.lower() != ".gguf":
        # First: files that both have are the model's.
        distributed.run_on_rank0(lambda: copy_companions(model_files(run.source), run.packed))
    if run.stream is None:
        write_packed(run.packed, run.model, run.tokenizer)
    else:
        write_frozen(run.packed, run.model, run.tokenizer, run.recipe.config, run.stream.frozen()[0], run.stream.dense())
    run.recorder.phase("writing", time.perf_counter() - began)


def tune_tables(run: Run) -> None:
    """Train the tables of the packed model for some steps, with its indices fixed."""
    recipe = run.recipe
    if not recipe.tune_steps:
        return
    run.model = run.teacher = None
    run.teacher = _finetuned(run) if recipe.distill else None
    run.model, *_ = load_tunable(run.packed)
    run.model.to(loop.pick_device())
    same = {name: getattr(recipe, name) for name in ("batch", "seed", "save_every", "precision")}
    settings = Tuning(steps=recipe.tune_steps, **same).training(len(run.blocks), False)
    # On the data that comes after that of the steps before.
    settings = replace(settings, distill=recipe.distill, first_step=(recipe.steps or 0) * recipe.grad_accumulation)
    _train(run, settings, "tuning tables", run.work / "tables")
    write_tuned(run.model, run.packed, run.out)


def _finetuned(run: Run) -> Any:
    """Load the model as it was before it was clustered, in 16 bits where training computes in them."""
    model, kept = load_model(run.source, loop.dtype_of(run.recipe.precision))[0], run.work / "finetuned.pt"
    if kept.is_file():
        checkpoints.load_weights(kept, model)
    return model


def report(run: Run) -> None:
    """Measure the packed model, write the report, and remove the work directory."""
    if run.skeleton is not None:
        run.skeleton = run.skeleton.over(partial(packed_weights, run.out))
    run.measure("packed")
    distributed.run_on_rank0(lambda: run.recorder.finish(run.out))
    distributed.run_on_rank0(lambda: checkpoints.end_run(run.work))


Stage = Callable[[Run], None]
STAGES: tuple[Stage, ...] = (check_out, read, choose_kind, load, begin, fine_tune, cluster, train_clustered, write, tune_tables, report)
DRY_RUN: tuple[Stage, ...] = (read, load, show_plan)


def compress(
    source: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    data: str | Path,
    eval_text: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stages: Sequence[Stage] = STAGES,
) -> None:
    """Fine-tune a model while its weights are clustered, and write the packed directory. Under torchrun call it on all ranks.

    Args:
        source: as for `edkm.models.load_model`.
        out: directory of the packed model.
        data: file of training data, as for `edkm.train.data.load_blocks`.
        eval_text: file of held-out text, whose perplexity before and after is measured.
        resume: go on where an interrupted run stopped.
        overwrite: write into `out` even if it is not empty.
        stages: functions to run in order; `DRY_RUN` prints a plan and writes nothing.

    Raises:
        ValueError: files, numbers or a model that do not fit, training that diverged, other settings than those of the resumed run.
        KeyboardInterrupt: Ctrl-C; during training after the step at hand, when it is saved.
    """
    run = Run(str(source), recipe, Path(out), Path(data), None if eval_text is None else Path(eval_text), resume, overwrite)
    with distributed.session(recipe.timeout_s), distributed.report_failed_rank("Start again."):
        for stage in stages:
            stage(run)


def _train(run: Run, settings: loop.TrainSettings, phase: str, work: Path) -> None:
    """Train from the last checkpoint in `work`, if there is one; after Ctrl-C raise KeyboardInterrupt when the state is saved."""
    resume = runstate.last_checkpoint(work) is not None
    result = loop.train(run.model, run.blocks, settings, work, resume=resume, teacher=run.teacher, name=phase, log_dir=run.out / "runs")
    run.recorder.phase(phase, result.seconds)
    run.recorder.losses(phase, settings.first_step, result.losses, interrupted=result.interrupted)
    result.check(phase)


def _placeholders(model: Any, config: ClusterConfig) -> dict[str, Tensor]:
    """Make tables of the right shapes for all clustered weights, to be read from a checkpoint."""
    entries = plan(model, config).clustered
    return {e.name: torch.linspace(-1, 1, e.table_shape[1]).view(1, -1, 1).repeat(e.tables, 1, e.table_shape[2]) for e in entries}
