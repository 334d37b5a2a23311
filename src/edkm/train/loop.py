"""Train a causal language model: a plain loop over any number of processes.

A step's blocks are the same in the same order for any number of ranks and micro-batches, and its loss is the mean over their trained
tokens. The model is only lent: DDP wraps it from outside, autocast surrounds its forward, its modes are put back at the end.
"""

from __future__ import annotations

import inspect
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from edkm.progress import progress, say
from edkm.train import distributed
from edkm.train.divergence import divergence
from edkm.train.optimizers import BackwardSteps, check_memory, check_optimizer, make_optimizer, rate_share, set_rate
from edkm.train.runstate import RunState, clear_checkpoints, last_checkpoint, load_checkpoint, save_checkpoint
from edkm.train.tracking import check_report_to, tracking

# The terminal and torchrun both pass a Ctrl-C on: twice within this many seconds is once.
_SAME_PRESS_S = 2.0


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the training loop.

    Attributes:
        steps: optimizer steps; `lr` is the highest learning rate of their schedule.
        batch: blocks of a micro-batch, of which each rank has `accumulate` in a step.
        checkpointing: recompute activations in the backward pass.
        precision: `bf16` autocast, `fp32`, or `auto` (see `resolve_precision`).
        seed: for the order of the data, and for dropout.
        save_every: steps between checkpoints, 0 for none.
        fsdp: shard weights, gradients and optimizer over the ranks instead of repeating them.
        distill: share of the loss, 0 to 1, that is the divergence from the teacher's predictions, on every token; the rest is the
            cross entropy of the labels.
        divergence: `kl`, Kullback and Leibler's, or `jsd`, Jensen and Shannon's.
        first_step: steps of an earlier training on the same data, whose blocks are passed over.
        optimizer: name of a class of `torch.optim`, or of torchao's 8- and 4-bit Adam and AdamW, in any case.
        memory: `high`, `low` or `lower` (`edkm.train.optimizers`); for the latter two the model is in bfloat16.
        report_to: trackers to log to, by accelerate's names: `tensorboard`, `wandb`, ..., `all` or `none`.
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
    divergence: str = "kl"
    first_step: int = 0
    optimizer: str = "adamw"
    memory: str = "high"
    report_to: tuple[str, ...] = ()

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

    def check(self, phase: str) -> None:
        """Raise KeyboardInterrupt, on all ranks at once, where Ctrl-C ended the training, and ValueError where it diverged."""
        if self.interrupted:
            say(f"edkm: interrupted after step {self.steps} of {phase}, saved")
            distributed.barrier()
            raise KeyboardInterrupt
        first, last = self.losses[0][1], self.losses[-1][1]
        if not math.isfinite(last):
            raise ValueError(
                f"{phase}: the training diverged, its last loss is {last}. Start again with --overwrite and a lower --lr; if the first "
                f"loss ({first:g}) is no better, the model or the data is damaged."
            )


def pick_device() -> str:
    """Name the device to train on: `cuda`, or `mps` on a Mac (which processes cannot share), else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and distributed.world_size() == 1 else "cpu"


def resolve_precision(precision: str) -> str:
    """Choose for `auto`: bf16 where the hardware is known to multiply it fast, else fp32 (3 times faster on a CPU without it)."""
    if precision != "auto":
        return precision
    device = pick_device()
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    supported = [getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if device == "cpu" and any(supported) else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype that products are computed in: that of a model which is only run, not trained."""
    return torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32


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
    log_dir: Path | None = None,
) -> TrainResult:
    """Train a causal language model, prepared or not, in place.

    By default AdamW with betas 0.9 and 0.95 and no weight decay; gradient norm clipped to 1, linear schedule with a tenth of the steps
    to warm up (the optimizer settings of eDKM, arXiv:2309.00964, section 4).

    Args:
        model: of transformers; moved to the device, sharded by `fsdp`, trained, and else left as it was.
        blocks: dataset of `input_ids` and `labels`.
        work: directory for checkpoints; holds the run's state afterwards if it was interrupted.
        resume: go on from the last checkpoint in `work`; without it checkpoints there are removed.
        teacher: with `settings.distill`, a model of the same vocabulary whose predictions are to be kept; its weights do not change.
        name: of the phase, for progress and trackers.
        log_dir: directory for trackers that write files; None for `runs` in `work`.

    Raises:
        ValueError: `resume` without a checkpoint, `fsdp` without other ranks, `distill` without a teacher, an unknown optimizer or
            tracker, `memory` that does not go with other settings or the dtype of the model.
        RankError: another rank failed.
    """
    checkpoint = last_checkpoint(work) if resume else None
    if resume and checkpoint is None:
        raise ValueError(f"{work}: there is no checkpoint to resume from. Start without --resume.")
    teacher = teacher if settings.distill else None
    if settings.distill and teacher is None:
        raise ValueError("distill: there is no teacher. Give the model as it was before it was prepared.")
    if settings.fsdp:
        distributed.check_several_ranks()
    check_memory(settings)
    _check_dtype(model, settings.memory)
    check_optimizer(settings.optimizer, settings.memory, pick_device())
    trackers = check_report_to(settings.report_to)
    remedy = "The same command with --resume goes on from the last checkpoint." if settings.save_every else "Start again."
    began, state, interrupted = time.perf_counter(), RunState(), False
    with _training(model, settings.checkpointing), distributed.report_failed_rank(remedy), _note_interrupts() as interrupts:
        wrapped = distributed.share_out(model, pick_device(), settings.fsdp)
        if teacher is not None:
            distributed.share_out(teacher.eval().requires_grad_(False), pick_device(), settings.fsdp)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(settings.optimizer, parameters, settings.lr, settings.memory)
        torch.manual_seed(settings.seed + distributed.rank())  # for dropout, which differs from rank to rank
        if checkpoint is None:
            clear_checkpoints(work)
        else:
            load_checkpoint(checkpoint, model, optimizer, state)
        order, size = _order(len(blocks), settings), settings.blocks_per_step
        bar = progress(name, settings.steps, "steps", done=state.step)
        with bar as advance, tracking(trackers, name, log_dir or work / "runs") as log, _in_backward(optimizer, settings) as in_backward:
            while state.step < settings.steps and not interrupted:
                rate = settings.lr * rate_share(state.step, steps=settings.steps, warmup=round(0.1 * settings.steps))
                chosen = [blocks[i] for i in order[state.step * size : (state.step + 1) * size]]
                set_rate(optimizer, rate)
                loss, norm = _step(wrapped, chosen, settings, teacher, in_backward)
                with _rounding(settings, state.step):
                    optimizer.step()
                optimizer.zero_grad()
                state.add(loss)
                advance()
                if state.step % max(1, settings.steps // 20) == 0:  # not more often: reading it makes the device wait
                    loss = state.log()
                    advance(0, f"loss {loss:.3f}")
                    log({"loss": loss, "learning_rate": rate, "grad_norm": norm}, settings.first_step + state.step)
                interrupted = distributed.any_rank(bool(interrupts))
                due = settings.save_every and (state.step % settings.save_every == 0 or state.step == settings.steps)
                if due or interrupted:
                    save_checkpoint(work, model, optimizer, state)
    return TrainResult(state.step, time.perf_counter() - began, state.losses, interrupted and state.step < settings.steps)


def _check_dtype(model: nn.Module, memory: str) -> None:
    for name, p in model.named_parameters():
        if memory != "high" and p.requires_grad and p.dtype != torch.bfloat16:
            raise ValueError(
                f"memory: {memory} trains weights in bfloat16, and {name} is {p.dtype}. Load the model in it, or use memory high."
            )


@contextmanager
def _in_backward(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> Iterator[BackwardSteps | None]:
    """Make steps in the backward pass within the block, if the settings ask for it."""
    steps = BackwardSteps(optimizer) if settings.memory == "lower" else None
    try:
        yield steps
    finally:
        if steps is not None:
            steps.remove()


@contextmanager
def _rounding(settings: TrainSettings, step: int) -> Iterator[None]:
    """Draw the random numbers of rounding within the block from the seed and the step, so that the replicas of DDP stay the same."""
    if settings.memory != "low":
        yield
        return
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed((settings.seed << 32) + settings.first_step + step)
        yield


def _order(count: int, settings: TrainSettings) -> list[int]:
    """List the blocks of a training in order: each permutation of the data is used up before the next."""
    first, stop = (n * settings.blocks_per_step for n in (settings.first_step, settings.first_step + settings.steps))
    generator = torch.Generator().manual_seed(settings.seed)
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-stop // count))]
    return torch.cat(passes)[first:stop].tolist() if passes else []


def _step(
    model: nn.Module,
    blocks: list[dict[str, Tensor]],
    settings: TrainSettings,
    teacher: nn.Module | None,
    in_backward: BackwardSteps | None,
) -> tuple[Tensor, Tensor]:
    """Find the gradient of this rank's part of the blocks, clipped; return its loss (see `micro_loss`) and the norm before clipping."""
    counts = [int((block["labels"][1:] != -100).sum()) for block in blocks]  # a model shifts labels, and nothing predicts the first
    starts = range(distributed.rank() * settings.batch, len(blocks), settings.batch * distributed.world_size())
    device, losses = next(model.parameters()).device, []
    for start in starts:
        chosen = blocks[start : start + settings.batch]
        batch = {key: torch.stack([block[key] for block in chosen]).to(device) for key in chosen[0]}
        # Gradients are summed over the ranks with the last.
        held: Any = model.no_sync if isinstance(model, DistributedDataParallel) and start != starts[-1] else nullcontext
        with held():
            loss = micro_loss(model, batch, sum(counts[start : start + settings.batch]), sum(counts), settings, teacher)
            loss.backward()
        losses.append(loss.detach())
    if in_backward is not None:
        return torch.stack(losses).sum(), in_backward.norm()
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return torch.stack(losses).sum(), norm.full_tensor() if settings.fsdp else norm


def micro_loss(
    model: nn.Module, batch: dict[str, Tensor], trained: int, tokens: int, settings: TrainSettings, teacher: nn.Module | None = None
) -> Tensor:
    """Compute the loss of a micro-batch, so scaled that the mean over the ranks of their sums is the step's loss.

    Args:
        trained: tokens of the micro-batch that the loss counts; `tokens` those of the whole step, over all ranks.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = inspect.signature(inner.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    # As transformers' Trainer does: such a model divides the sum of its losses by these tokens, others by their own.
    if getattr(inner, "accepts_loss_kwargs", any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
        options["num_items_in_batch"] = tokens
        scale = distributed.world_size()
    else:
        scale = distributed.world_size() * trained / tokens
    bf16 = resolve_precision(settings.precision) == "bf16"
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=bf16):
        out = model(**batch, **options)
    loss = out.loss * scale
    if teacher is not None:
        with torch.no_grad(), torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=bf16):
            expected = teacher(input_ids=batch["input_ids"], use_cache=False).logits
        share = settings.distill / settings.accumulate
        loss = (1 - settings.distill) * loss + share * divergence(out.logits, expected, settings.divergence)
    return loss


def enable_checkpointing(model: Any) -> None:
    """Enable activation checkpointing, renamed in transformers 5.2x, where the old name warns."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def _training(model: Any, checkpointing: bool) -> Iterator[None]:
    """Put a model in training mode, with activation checkpointing if asked, and back afterwards, without gradients."""
    modes = {module: module.training for module in model.modules()}
    turned_on = checkpointing and not getattr(model, "is_activation_checkpointing", False)
    if turned_on:
        enable_checkpointing(model)
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if turned_on:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
            model.disable_input_require_grads()  # enabled with it
        model.zero_grad()


@contextmanager
def _note_interrupts() -> Iterator[list[float]]:
    """Give a list that gets the time of the first Ctrl-C; the second interrupts."""
    times: list[float] = []

    def note(number: int, frame: Any) -> None:
        now = time.monotonic()
        if not times:
            times.append(now)
            if distributed.rank() == 0:
                say("edkm: finishing this step, then saving; Ctrl-C again stops at once")
        elif distributed.world_size() == 1 or now - times[0] > _SAME_PRESS_S:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which handles Ctrl-C
        yield times
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield times
    finally:
        signal.signal(signal.SIGINT, before)
