"""Tune a packed model: `edkm tune` as a function.

Only the tables and the vectors are trained, the indices stay (train/tables.py). The run is kept in `OUT/training` as that of `compress` is,
so that one that is interrupted or killed goes on to the same result.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edkm.compressed import checkpoint
from edkm.compressed.jsonfile import printable
from edkm.compressed.pretrained import load_packed
from edkm.evaluate import perplexity
from edkm.metrics import identity
from edkm.modelfiles import packed_directory
from edkm.models import load_model, load_tokenizer
from edkm.progress import progress
from edkm.textfile import read_text
from edkm.train import checkpoints, distributed, loop, runstate
from edkm.train.data import Blocks, make_blocks
from edkm.train.limits import tokens_to_score
from edkm.train.records import read_records
from edkm.train.tables import train_tables, tune_tables, tuned_tensors, write_tuned


@dataclass(frozen=True)
class Tuning:
    """Settings of `tune`.

    Attributes:
        steps: optimizer steps; None for one pass over the data.
        lr: highest learning rate, as a share of the typical size of a table or vector.
        distill: share of the loss that is the divergence from the teacher's predictions; None for all of it if there is a teacher.
        block_tokens: tokens of a training block; `batch` blocks make a step.
        gradient_checkpointing: recompute activations in the backward pass.
        seed, save_every, precision: as in `loop.TrainSettings`.

    Raises:
        ValueError: a number out of range.
    """

    steps: int | None = None
    lr: float = 4e-3
    distill: float | None = None
    block_tokens: int = 512
    batch: int = 2
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 20
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, low in {"steps": 1, "block_tokens": 2, "batch": 1, "seed": 0, "save_every": 0}.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"{name}: at least {low}, got {value}.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: a positive number, got {self.lr}.")
        if self.distill is not None and not 0 <= self.distill <= 1:
            raise ValueError(f"distill: from 0 to 1, got {self.distill}.")

    def training(self, blocks: int, has_teacher: bool) -> loop.TrainSettings:
        """Return the settings of the training loop for a number of training blocks."""
        if self.distill and not has_teacher:
            raise ValueError("distill: needs the model whose predictions are to be kept. Name it with --teacher.")
        if self.distill == 0 and has_teacher:
            raise ValueError("distill: with 0 the teacher would not be used. Leave the teacher out.")
        same = {name: getattr(self, name) for name in ("lr", "batch", "seed", "save_every", "precision")}
        share = self.distill if self.distill is not None else float(has_teacher)
        steps = math.ceil(blocks / self.batch) if self.steps is None else self.steps
        return loop.TrainSettings(steps=steps, distill=share, checkpointing=self.gradient_checkpointing, **same)


def tune(
    source: str | Path,
    tuning: Tuning,
    out: str | Path,
    *,
    data: str | Path | Blocks,
    eval_text: str | Path | None = None,
    teacher: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train the tables and vectors of a packed model with its indices fixed, and write it to another directory.

    Args:
        source: a packed directory, or its hub id.
        out: directory of the tuned model.
        data: file of training data, as for `edkm.train.data.load_blocks`, or its blocks.
        eval_text: file of held-out text, whose perplexity before and after is printed.
        teacher: the original model, as for `edkm.models.load_model`; its predictions are then what is trained for (see `Tuning.distill`).
        resume: go on where an interrupted run stopped.
        overwrite: write into `out` even if it is not empty.

    Raises:
        ValueError: files, numbers or models that do not fit, training that diverged, other settings than those of the resumed run.
        KeyboardInterrupt: Ctrl-C, after the step at hand, when it is saved.

    Cost:
        Memory of the packed model, the activations of a batch, one dense layer with its gradient, 16 bytes for each entry of a table,
        and the teacher's dense weights.
    """
    out, packed = Path(out), packed_directory(source)
    work, kept = out / "training", out / "training" / "blocks.pt"
    tuning.training(1, teacher is not None)
    if distributed.world_size() > 1:
        raise ValueError("tune: runs in one process. Start it without torchrun.")
    if out.resolve() == packed.resolve():
        raise ValueError(f"{out}: is the packed directory itself. Name another.")
    checkpoints.check_out(out, resume=resume, overwrite=overwrite)
    # Files first: a misspelt name should not cost the time of loading models.
    text = None if eval_text is None else read_text(Path(eval_text))
    blocks = Blocks.read(kept) if resume and kept.is_file() else data
    records = [] if isinstance(blocks, Blocks) else read_records(Path(blocks))
    model, tokenizer, fixed = load_tunable(packed)
    if not isinstance(blocks, Blocks):
        blocks = make_blocks(records, tokenizer, block_tokens=tuning.block_tokens, source=str(data), model=model)
    if text is not None:
        tokens_to_score(model, tokenizer, text, window=tuning.block_tokens, source=str(eval_text))
    teaching = None if teacher is None else _teacher(teacher, model, tokenizer, blocks, tuning.precision)
    settings = tuning.training(len(blocks), teacher is not None)
    _begin(work, packed, settings, blocks, teaching, resume)
    _print_counts(blocks, settings, model, fixed)
    model.to(loop.pick_device())

    def measure(when: str) -> None:
        if text is not None:
            found = perplexity(model, tokenizer, text, window=tuning.block_tokens)
            print(f"perplexity of {Path(str(eval_text)).name}, {when}: {found.perplexity:.2f}", flush=True)

    if not resume:
        measure("packed")
    steps = work / "steps"
    result = tune_tables(model, blocks, settings, steps, resume=runstate.last_checkpoint(steps) is not None, teacher=teaching)
    result.check("tuning")
    write_tuned(model, packed, out)
    measure("tuned")
    checkpoints.end_run(work)


def load_tunable(packed: Path) -> tuple[Any, Any, dict[str, str]]:
    """Load a packed model with trainable tables, its tokenizer, and the weights that stay as they are."""
    with progress(f"loading {packed}"):
        with checkpoint.open_items(packed) as items:  # refuses a model that is not packed
            stored = {name: item.dtype for name, item in items.items()}
        model = load_packed(packed)
        return model, load_tokenizer(str(packed), packed), train_tables(model, stored)


def _teacher(source: str | Path, model: Any, tokenizer: Any, blocks: Blocks, precision: str) -> Any:
    """Load the teacher, in 16 bits where training computes in them; refuse one to which the tokens of the data are others."""
    with progress(f"loading {source}"):
        teacher, its_tokenizer = load_model(source, loop.dtype_of(precision))
    ours, theirs = (each.config.get_text_config().vocab_size for each in (model, teacher))
    used = blocks.input_ids.unique().tolist()
    if ours != theirs or tokenizer.convert_ids_to_tokens(used) != its_tokenizer.convert_ids_to_tokens(used):
        raise ValueError(
            f"teacher: {source} has another vocabulary ({theirs} tokens, the packed model {ours}). Name the model that was compressed."
        )
    return teacher


def _begin(work: Path, packed: Path, settings: loop.TrainSettings, blocks: Blocks, teacher: Any, resume: bool) -> None:
    """Open the work directory of a new run, or check that it is the one to resume."""
    tokens = hashlib.sha256(blocks.input_ids.numpy().tobytes() + blocks.labels.numpy().tobytes()).hexdigest()
    found = {name: value for name, value in asdict(settings).items() if name not in ("save_every", "report_to")}
    found |= {
        "model": identity(packed),
        "data": tokens,
        "teacher": None if teacher is None else checkpoints.fingerprint(teacher.named_parameters()),
    }
    if resume:
        checkpoints.check_same_run(work, found)
        return
    shutil.rmtree(work, ignore_errors=True)
    checkpoints.begin_run(work, found, blocks)


def _print_counts(blocks: Blocks, settings: loop.TrainSettings, model: Any, fixed: dict[str, str]) -> None:
    print(f"data: {blocks.examples:,} examples, {blocks.tokens:,} tokens ({blocks.trained_tokens:,} trained on), {len(blocks):,} blocks")
    for note in blocks.notes:
        print(f"data: {printable(note)}")
    weights, vectors = tuned_tensors(model)
    numbers = sum(tensor.numel() for tensors in (*weights.values(), vectors) for tensor in tensors.values())
    print(f"tuning: {numbers:,} numbers, in the tables of {len(weights):,} weights and {len(vectors):,} vectors")
    for name, reason in fixed.items():
        print(f"  {name}: its tables stay, {reason}")
    precision = loop.named_precision(settings.precision)
    print(f"training: {settings.steps:,} steps of {settings.batch} blocks; lr {settings.lr:g}, {precision}", flush=True)
