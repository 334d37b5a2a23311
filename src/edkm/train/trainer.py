"""Training with transformers' Trainer: the only file that imports it.

A prepared model trains like any other; what this file adds is a checkpoint that holds all clustering state, Ctrl-C that finishes the
step and saves, and a precision chosen by what the machine does fast.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

_STATE = "edkm_state.pt"


@dataclass(frozen=True)
class TrainSettings:
    """How to train. `batch` blocks make a micro-batch, `accumulate` micro-batches a step.

    `precision`: `bf16` autocast, `fp32`, or `auto` (see `resolve_precision`). `save_every`: steps between checkpoints, 0 for none.
    """

    steps: int
    lr: float
    batch: int = 2
    accumulate: int = 1
    checkpointing: bool = False
    precision: str = "auto"
    seed: int = 0
    save_every: int = 0


@dataclass(frozen=True)
class TrainResult:
    """`steps` reached, wall `seconds` of this call, `losses` as logged `(step, loss)`; `interrupted` if Ctrl-C ended it."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]]
    interrupted: bool


def resolve_precision(precision: str) -> str:
    """`auto` is bf16 autocast where the hardware multiplies bf16 fast, fp32 elsewhere (a CPU without it is 3 times slower in bf16)."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    supported = [getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if any(supported) else "fp32"


def train(model: nn.Module, blocks: Any, settings: TrainSettings, work: Path, *, resume: bool = False) -> TrainResult:
    """Train a causal language model, prepared or not, in place.

    AdamW, betas 0.9 and 0.95, no weight decay, gradient norm clipped to 1, linear schedule with a tenth of the steps to warm up (the
    optimizer settings of eDKM, arXiv:2309.00964, section 4).

    Args:
        model: a transformers model; after a clustered run it is left in `train()` mode.
        blocks: dataset of `input_ids` and `labels`.
        work: directory for checkpoints; holds the run's state afterwards if it was interrupted.
        resume: go on from the last checkpoint in `work`.

    Raises:
        ValueError: `resume` without a checkpoint.
    """
    checkpoint = get_last_checkpoint(str(work)) if resume and work.is_dir() else None
    if resume and checkpoint is None:
        raise ValueError(f"{work}: there is no checkpoint to resume from. Start without --resume.")
    if settings.checkpointing:
        # Renamed in transformers 5.2x, where the old name warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trainer = _Trainer(model=model, args=_arguments(settings, work), train_dataset=blocks)
    began = time.perf_counter()
    with _stop_on_signal(trainer) as stop:
        trainer.train(resume_from_checkpoint=checkpoint)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    done = trainer.state.global_step
    return TrainResult(done, time.perf_counter() - began, losses, stop.asked and done < settings.steps)


def _arguments(settings: TrainSettings, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=round(0.1 * settings.steps),
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=resolve_precision(settings.precision) == "bf16",
        use_cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=max(1, settings.steps // 20),
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
    )


class _Trainer(transformers.Trainer):
    """Checkpoints are the plain state dict: `save_pretrained` knows nothing of clustering buffers."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), directory / _STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = torch.load(Path(resume_from_checkpoint) / _STATE, map_location="cpu", weights_only=True)
        (model or self.model).load_state_dict(state)


class _Stop(TrainerCallback):
    """Ends training after the step at hand, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True


@contextmanager
def _stop_on_signal(trainer: _Trainer) -> Iterator[_Stop]:
    """The first Ctrl-C asks the trainer to stop, the second interrupts at once."""
    stop = _Stop()
    trainer.add_callback(stop)

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print("\nedkm: finishing this step, then saving; Ctrl-C again stops at once", flush=True)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: whoever owns it handles Ctrl-C
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def remember_run(work: Path, run: dict[str, Any]) -> None:
    """Note beside the checkpoints what run they belong to."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "run.json").write_text(json.dumps(run, indent=2))


def check_same_run(work: Path, run: dict[str, Any]) -> None:
    """Refuse to resume a different run: the result would be neither the one nor the other.

    Raises:
        ValueError: no run to resume, or a setting that differs (named).
    """
    path = work / "run.json"
    if not path.is_file():
        raise ValueError(f"{work}: there is no interrupted run to resume. Start without --resume.")
    before = json.loads(path.read_text())
    for key in sorted(set(before) | set(run)):
        if before.get(key) != run.get(key):
            raise ValueError(
                f"{key}: the interrupted run had {before.get(key)!r}, this one has {run.get(key)!r}. Resume with the same settings, "
                "or start again with --overwrite."
            )
