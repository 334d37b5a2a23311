"""`plan_memory`: simulate a training step and report its peak."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from edkm.config import ClusterConfig
from edkm.core.op import BACKENDS
from edkm.train.memory.gathering import Gathering
from edkm.train.memory.sketch import Sketch, choices
from edkm.train.memory.timeline import PARTS, Timeline
from edkm.train.prepare import install
from edkm.train.targets import targets_of

if TYPE_CHECKING:
    from edkm.train.loop import TrainSettings


@dataclass(frozen=True)
class Budget:
    """Bytes that each process needs.

    Attributes:
        at_peak: part (`PARTS`) -> bytes at the moment when most is held.
        largest: part -> the most it ever holds; not all at one time.
        moment: `forward`, `backward` or `optimizer step`: when the peak is.
    """

    at_peak: dict[str, int]
    largest: dict[str, int]
    moment: str

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def __str__(self) -> str:
        rows = [f"{'GiB per process':<15} {'at the peak':>12} {'at most':>9}"]
        rows += [f"{part:<15} {self.at_peak[part] / 2**30:>12.2f} {self.largest[part] / 2**30:>9.2f}" for part in PARTS]
        return "\n".join([*rows, f"{'peak':<15} {self.peak / 2**30:>12.2f}   (in the {self.moment})"])


def plan_memory(
    model: nn.Module,
    config: ClusterConfig | None,
    settings: TrainSettings,
    *,
    block_tokens: int,
    learners: int = 1,
    device_type: str = "cpu",
    backend: str = "auto",
) -> Budget:
    """The memory of training from the second step on, when the optimizer has its state.

    Args:
        model: a causal language model of transformers, not prepared; not changed. It may be on the meta device.
        config: how it is clustered; None for plain fine-tuning.
        settings: of the run; `fsdp` shards over the learners, otherwise several learners are a DDP.
        block_tokens: length of the blocks.
        learners: processes with a device each.
        device_type: `cpu` or `cuda`, where the run will be: blocks of maps are larger on a GPU and AdamW works on all weights at once.
        backend: for `edkm.prepare`.

    Raises:
        ValueError: a number below 1, an unknown device type or backend, `fsdp` with one learner; and as `edkm.prepare`.

    A teacher (`settings.distill`) is counted with the weights; under FSDP as shards, without its gathered layers.

    Cost:
        Seconds; no memory for weights.
    """
    _check(settings, block_tokens, learners, device_type, backend)
    from edkm.train.loop import divergence, resolve_precision

    bf16 = resolve_precision(settings.precision) == "bf16"
    timeline = Timeline()
    clustered = {} if config is None else choices(model, config, backend, device_type)
    with FakeTensorMode(allow_non_fake_inputs=True), _without_data():
        twin = _twin(model, settings.checkpointing)
        buffers = list(twin.buffers())
        gathering = Gathering(twin, timeline, learners) if settings.fsdp else None
        sketches = [
            (target, Sketch(target, clustered[target.names[0]], config, timeline, device_type, gathers=settings.fsdp))
            for target in targets_of(twin)
            if target.names[0] in clustered
        ]
        install(twin, sketches)
        held = list(twin.parameters()) if gathering is None else list(gathering.shards.values())
        for tensor in [*held, *buffers]:
            timeline.count(tensor, "weights")
        trained = [p for p in held if p.requires_grad]
        optimizer = _optimizer(trained, timeline, foreach=device_type == "cuda")
        if learners > 1 and gathering is None:
            timeline.add("communication", sum(p.nbytes for p in trained))
        for p in twin.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: timeline.count(p.grad, "gradients"))
        if gathering is not None:
            gathering.watch()
        teacher = _twin(model, False).eval().requires_grad_(False) if settings.distill else None
        for p in () if teacher is None else teacher.parameters():
            timeline.count(p, "weights", p.nbytes // learners if settings.fsdp else None)
        ids = torch.zeros(settings.batch, block_tokens, dtype=torch.int64)
        with timeline:
            timeline.start()
            for _ in range(min(settings.accumulate, 2)):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    timeline.moment = "forward"
                    loss = _loss(twin, teacher, ids, bf16, divergence)
                timeline.moment = "backward"
                loss.backward()
                del loss
            timeline.moment = "optimizer step"
            optimizer.step()
    return Budget(timeline.at_peak, timeline.largest, timeline.peak_moment)


def _check(settings: TrainSettings, block_tokens: int, learners: int, device_type: str, backend: str) -> None:
    numbers = {"batch": settings.batch, "accumulate": settings.accumulate, "block_tokens": block_tokens, "learners": learners}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: at least 1, got {value}.")
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type: cpu or cuda, got {device_type!r}.")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: {', '.join(BACKENDS)} or auto, got {backend!r}.")
    if settings.fsdp and learners == 1:
        raise ValueError("fsdp: there is one learner and nothing to shard over. Give learners=2 or more, or leave fsdp out.")


def _loss(model: nn.Module, teacher: nn.Module | None, ids: Tensor, bf16: bool, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of one micro-batch, as our Trainer computes it."""
    out = model(input_ids=ids, labels=ids)
    if bf16:  # accelerate makes float32 of what leaves the model
        out.logits = out.logits.float()
    if teacher is None:
        return out.loss
    with torch.no_grad():
        expected = teacher(input_ids=ids, use_cache=False).logits
    return out.loss + divergence(out.logits, expected)


def _optimizer(parameters: list[nn.Parameter], timeline: Timeline, *, foreach: bool) -> torch.optim.AdamW:
    """AdamW that has made a step."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, foreach=foreach)
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        for tensor in state.values():
            timeline.count(tensor, "optimizer")
    return optimizer


def _twin(model: nn.Module, checkpointing: bool) -> nn.Module:
    """The model without its data, ready to train."""
    memo: dict[int, Any] = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
    twin = copy.deepcopy(model, memo).train()
    twin.config.use_cache = False
    if getattr(twin.config, "_experts_implementation", None) == "eager" and twin._can_set_experts_implementation():
        # A loop over the experts that have tokens, which only data can tell.
        twin.set_experts_implementation("grouped_mm")
    if checkpointing:
        from edkm.train.loop import enable_checkpointing

        enable_checkpointing(twin)
    return twin


@contextmanager
def _without_data() -> Iterator[None]:
    """transformers looks into the positions for several texts in a block, and where it cannot look it makes a mask; and PyTorch knows
    what its grouped product returns in bfloat16 only, where transformers' own does in any dtype."""
    from transformers import masking_utils
    from transformers.integrations import moe

    with (
        patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None, create=True),
        patch.object(moe, "_can_use_grouped_mm", lambda *_, **__: False, create=True),
    ):
        yield
