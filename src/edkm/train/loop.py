"""Training with transformers' Trainer: the only file that imports it.

A prepared model trains like any other; what this file adds is a checkpoint that holds all clustering state and can be resumed by
another number of ranks, Ctrl-C that finishes the step and saves, an order of the data that does not depend on the number of ranks,
and a precision chosen by what the machine does fast. Under torchrun ranks share the work by DDP, or by FSDP2.
"""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from edkm.progress import progress, say
from edkm.train import distributed
from edkm.train.checkpoints import last_checkpoint
from edkm.train.prepare import clusterings

_STATE, _SCHEDULE = "state", "schedule.pt"
# The terminal and torchrun both pass a Ctrl-C on: twice within this many seconds is once.
_SAME_PRESS_S = 2.0


@dataclass(frozen=True)
class TrainSettings:
    """How to train. `batch` blocks make a rank's micro-batch, `accumulate` micro-batches of all ranks a step.

    `precision`: `bf16` autocast, `fp32`, or `auto` (see `resolve_precision`). `save_every`: steps between checkpoints, 0 for none.
    `fsdp`: shard weights, gradients and optimizer over the ranks instead of repeating them. `distill`: share of the loss, 0 to 1, that
    is the divergence from the teacher's predictions, on every token; the rest is the cross entropy of the labels. `first_step`: where in
    the order of the data to begin, after so many steps of an earlier training.
    """

    steps: int
    lr: float
    batch: int = 2
    accumulate: int = 1
    checkpointing: bool = False
    precision: str = "auto"
    seed: int = 0
    save_every: int = 0
    fsdp: bool = False
    distill: float = 0.0
    first_step: int = 0

    @property
    def blocks_per_step(self) -> int:
        return self.batch * self.accumulate * distributed.world_size()


@dataclass(frozen=True)
class TrainResult:
    """`steps` reached, wall `seconds` of this call, `losses` as logged `(step, loss)`; `interrupted` if Ctrl-C ended it."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]]
    interrupted: bool


def pick_device() -> str:
    """Name the device to train on: `cuda`, or `mps` on a Mac (of which processes cannot share the work), else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and distributed.world_size() == 1 else "cpu"


def resolve_precision(precision: str) -> str:
    """`auto` is bf16 autocast where the hardware is known to multiply bf16 fast, fp32 elsewhere (a CPU without it is 3 times slower)."""
    if precision != "auto":
        return precision
    device = pick_device()
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    supported = [getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if device == "cpu" and any(supported) else "fp32"


def named_precision(precision: str) -> str:
    """Name the precision that training computes in."""
    return {"bf16": "bf16 autocast", "fp32": "float32"}[resolve_precision(precision)]


def train(
    model: nn.Module,
    blocks: Any,
    settings: TrainSettings,
    work: Path,
    *,
    resume: bool = False,
    teacher: nn.Module | None = None,
    name: str = "training",
) -> TrainResult:
    """Train a causal language model, prepared or not, in place.

    AdamW, betas 0.9 and 0.95, no weight decay, gradient norm clipped to 1, linear schedule with a tenth of the steps to warm up (the
    optimizer settings of eDKM, arXiv:2309.00964, section 4).

    Args:
        model: a transformers model; after a clustered run it is left in `train()` mode, and its `forward` as it was.
        blocks: dataset of `input_ids` and `labels`.
        work: directory for checkpoints; holds the run's state afterwards if it was interrupted.
        resume: go on from the last checkpoint in `work`.
        teacher: with `settings.distill`, a model of the same vocabulary whose predictions are to be kept; only run, never changed.
        name: of the phase, for its progress.

    Raises:
        ValueError: `resume` without a checkpoint, `fsdp` without other ranks, `distill` without a teacher.
        RankError: another rank died or failed.
    """
    checkpoint = last_checkpoint(work) if resume else None
    if resume and checkpoint is None:
        raise ValueError(f"{work}: there is no checkpoint to resume from. Start without --resume.")
    if settings.checkpointing:
        enable_checkpointing(model)
    arguments = _arguments(settings, work)
    if settings.distill:
        if teacher is None:
            raise ValueError("distill: there is no teacher. Give the model as it was before it was prepared.")
        teacher = teacher.to(arguments.device).eval().requires_grad_(False)
    if settings.fsdp:
        distributed.check_several_ranks()
        from edkm.train.sharding import shard_model

        shard_model(model.to(arguments.device))
        if settings.distill:
            shard_model(teacher)
    first, stop = (n * settings.blocks_per_step for n in (settings.first_step, settings.first_step + settings.steps))
    order = _Order(blocks, first, stop, settings.seed)
    trainer = _Trainer(model=model, args=arguments, train_dataset=order, teacher=teacher, distill=settings.distill)
    began = time.perf_counter()
    remedy = (
        "The same command with --resume goes on from the last checkpoint." if settings.save_every else "Start again; --save-every helps."
    )
    before = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    shown = progress(name, settings.steps, "steps", done=before)
    with shown as advance, _forward_as_found(model), _stop_on_signal(trainer) as stop, distributed.report_failed_rank(remedy):
        trainer.add_callback(_Progress(advance))
        with warnings.catch_warnings():
            # torch 2.13's successor of the option sends all buffers once, tables among them; transformers has no name for it.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            trainer.train(resume_from_checkpoint=checkpoint)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    done = trainer.state.global_step
    return TrainResult(done, time.perf_counter() - began, losses, stop.stopped and done < settings.steps)


def enable_checkpointing(model: Any) -> None:
    """Activation checkpointing, renamed in transformers 5.2x, where the old name warns."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


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
        use_cpu=pick_device() == "cpu",
        dataloader_pin_memory=pick_device() == "cuda",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        seed=settings.seed,
        logging_steps=max(1, settings.steps // 20),
        # By default a loss that is NaN or infinite is logged as another number.
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Mean over all tokens of `KL(softmax(expected) || softmax(logits))`, both `[..., vocabulary]`; no gradient to `expected`."""
    odds = expected.detach().flatten(0, -2).float().log_softmax(-1)
    probabilities = odds.exp()
    entropy = -(probabilities * odds).sum(-1).mean()
    return F.cross_entropy(logits.flatten(0, -2).float(), probabilities) - entropy


def rate_share(step: int, *, steps: int, warmup: int) -> float:
    """Linear, up and down. Unlike transformers', which makes the first step at a rate of zero: of twelve steps that is one."""
    return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


class _Order(Dataset):
    """Blocks `first` to `stop` in the order of training: each permutation of the data is used up before the next.

    Cut into steps from front to back, whatever number of ranks shares a step.
    """

    def __init__(self, blocks: Any, first: int, stop: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        passes = -(-stop // len(blocks))
        self.blocks = blocks
        self.order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(passes)])[first:stop]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.blocks[int(self.order[index])]


class _Trainer(transformers.Trainer):
    """Checkpoints are written and read by torch.distributed.checkpoint, sharded or not: `save_pretrained` knows nothing of clustering
    buffers, and any number of ranks can read what any other number wrote."""

    def __init__(self, *, teacher: nn.Module | None, distill: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # `_Progress` says how far it is
        self.teacher, self.distill = teacher, distill
        self.sharded = any(hasattr(p, "full_tensor") for p in self.model.parameters())
        if self.sharded:
            # The model is sharded already; to accelerate it looks like one that DDP should wrap.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **rest: prepare(model, **{**rest, "evaluation_mode": True})
        if distributed.world_size() > 1 and clusterings(self.model):
            self.add_callback(_Distribute())

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            share = partial(rate_share, steps=num_training_steps, warmup=self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.distill:
            assert self.teacher is not None
            with torch.no_grad():
                expected = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
            # A mean over this micro-batch, where the other part may be divided by the tokens of the whole step already.
            share = 1 if num_items_in_batch is None else self.args.gradient_accumulation_steps
            loss = (1 - self.distill) * loss + self.distill / share * divergence(outputs.logits, expected)
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        logged = self.control.should_log
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if logged:
            # transformers subtracts the sum from itself: after one infinite loss all others would be NaN.
            tr_loss.zero_()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Everything is saved with the optimizer."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Everything is loaded with the optimizer."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer.optimizer)
        with _alone_is_fine():
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=Path(output_dir) / _STATE)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULE)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Rank 0 writes the trainer's state next, by which `last_checkpoint` takes this one for whole: no rank may still be writing.
        distributed.barrier()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        model, optimizer = get_state_dict(self.model, self.optimizer.optimizer)
        state = {"model": model, "optimizer": optimizer}
        with _alone_is_fine():
            dcp.load(state, checkpoint_id=Path(checkpoint) / _STATE)
        set_state_dict(self.model, self.optimizer.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULE, weights_only=True))


@contextmanager
def _forward_as_found(model: nn.Module) -> Iterator[None]:
    """Put back `forward` after the block: for mixed precision Accelerate leaves it in autocast, and later work would run in 16 bits."""
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Distribute(TrainerCallback):
    """Shares the clustering over the ranks once the model is where it trains."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        from edkm.train.sharding import distribute

        distribute(model)


class _Progress(TrainerCallback):
    """Shows the steps, and the loss as often as it is logged: reading it makes the device wait."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.advance(0, f"loss {logs['loss']:.3f}")


class _Stop(TrainerCallback):
    """Ends training after the step at hand, with a checkpoint; on all ranks after the same step."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if distributed.any_rank(self.asked_at is not None):
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def _stop_on_signal(trainer: _Trainer) -> Iterator[_Stop]:
    """The first Ctrl-C asks the trainer to stop, the second interrupts at once."""
    stop = _Stop()
    trainer.add_callback(stop)

    def ask(number: int, frame: Any) -> None:
        now = time.monotonic()
        if stop.asked_at is None:
            stop.asked_at = now
            if distributed.rank() == 0:
                say("edkm: finishing this step, then saving; Ctrl-C again stops at once")
        elif distributed.world_size() == 1 or now - stop.asked_at > _SAME_PRESS_S:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: whoever owns it handles Ctrl-C
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
