"""Plan the memory that training takes, by torch's own tracker, and read the peak of this process.

There are no formulas for activations here: they would be wrong for the next architecture. One training step is run on a copy of the
model whose tensors have shapes and no data (`FakeTensorMode`), with the model's own code, autograd, autocast, checkpointing and
optimizer, under `MemTracker`; with FSDP2 under `FSDPMemTracker`, in a process group that sends nothing. A 7B model takes a minute.

The step is one of fine-tuning, the larger part of a run: clustering adds its tables, which are a formula. So are torchao's optimizers
(`optimizers.PlannedSteps`), whose steps are compiled. Not seen are the inside of kernels, fragmentation, the CUDA context, communication
libraries, and DDP's buckets, which are added as a copy of the gradients.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edkm.config import ClusterConfig
    from edkm.train.loop import TrainSettings
    from edkm.train.skeleton import Skeleton

# Category -> how torch's trackers name what belongs to it.
PARTS = {
    "weights": ("Parameter", "Buffer", "Sharded Param"),
    "gradients": ("Gradient", "Sharded Grad", "Unsharded Grad"),
    "optimizer": ("Optstate", "OptState"),
    "activations": ("Activation", "Temp", "Other", "Inputs"),
    "clustering": (),
    "communication": ("Unsharded Param", "All Gather", "Reduce Scatter"),
}
# Of blocks that were freed the allocator keeps some; measured on layers of 2048 dimensions.
_KEPT_BYTES = 1 << 29

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """Bytes that each process needs, by category (`PARTS`), when it needs most."""

    at_peak: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def __str__(self) -> str:
        rows = [f"{'GiB per process':<15} {'at the peak':>12}"]
        rows += [f"{part:<15} {size / GIB:>12.2f}" for part, size in self.at_peak.items()]
        return "\n".join([*rows, f"{'peak':<15} {self.peak / GIB:>12.2f}"])


def plan_memory(
    model: nn.Module,
    config: ClusterConfig | None,
    settings: TrainSettings,
    *,
    block_tokens: int,
    ranks: int = 1,
    device_type: str = "cpu",
) -> Budget:
    """Plan the memory of training from the second step on, when the optimizer has its state.

    Args:
        model: a causal language model of transformers, not prepared; not changed. It may be on the meta device.
        config: how it is clustered; None for plain fine-tuning.
        settings: of the run; `fsdp` shards over the ranks, otherwise several ranks are a DDP. With `memory` `low` or `lower` the model is
            planned in bfloat16, else in its own dtype.
        block_tokens: length of the blocks.
        ranks: processes with a device each.
        device_type: `cpu` or `cuda`, where the run will be: on a GPU most optimizers work on all weights at once.

    Raises:
        ValueError: a number below 1, an unknown device type, `fsdp` with one rank, a model that calls a module twice in a pass, which
            the tracker cannot follow; and as `edkm.prepare`.

    Cost:
        About a second for each layer; no memory for weights.
    """
    import torch
    from torch._subclasses import FakeTensorMode

    _check(settings, block_tokens, ranks, device_type)
    tables = 0 if config is None else _table_bytes(model, config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _without_data():
        dtype = None if settings.memory == "high" else torch.bfloat16
        twin = _twin(model, settings.checkpointing, dtype)
        teacher = _twin(model, False, dtype).eval() if settings.distill else None
    with _sharded(twin, ranks if settings.fsdp else 1), mode, _without_data():
        ids = torch.zeros(settings.batch, block_tokens, dtype=torch.int64)
        at_peak = _track_step(twin, teacher, ids, settings, device_type)
        weights = sum(p.nbytes for p in twin.parameters())  # of all ranks
    at_peak["clustering"] += tables
    if teacher is not None and settings.fsdp:  # not a part of the tracked model
        at_peak["weights"] += weights // ranks
    if ranks > 1 and not settings.fsdp:
        at_peak["communication"] += weights
    return Budget(at_peak)


def _track_step(twin: nn.Module, teacher: nn.Module | None, ids: Tensor, settings: TrainSettings, device_type: str) -> dict[str, int]:
    """Make a step on fake tensors; return the bytes of each part at its peak."""
    import torch
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    from edkm.train.loop import micro_loss
    from edkm.train.optimizers import BackwardSteps, plan_optimizer

    optimizer = plan_optimizer(settings.optimizer, list(twin.parameters()), settings.lr, settings.memory)
    for group in optimizer.param_groups:
        if "foreach" in group:
            # Of shards the tracker would count whole tensors too: there they are taken one by one.
            group["foreach"] = device_type == "cuda" and not settings.fsdp
    tracker: Any = FSDPMemTracker(twin, optimizer) if settings.fsdp else MemTracker()
    if not settings.fsdp:
        for p in twin.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()
        tracker.track_external(twin, optimizer)
    in_backward = None
    try:
        with tracker:
            for _ in range(2 if settings.fsdp else 1):  # that tracker knows the optimizer's state from its first step on
                for _ in range(min(settings.accumulate, 2)):
                    tracker.reset_mod_stats()
                    loss = micro_loss(twin, {"input_ids": ids, "labels": ids}, ids.numel(), ids.numel(), settings, teacher)
                    if settings.memory == "lower":  # after the tracker's hooks, which look at the gradient that these free
                        in_backward = in_backward or BackwardSteps(optimizer)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    except NotImplementedError as error:
        raise ValueError("memory: torch's tracker cannot follow a model that calls a module twice in a pass. Plan without it.") from error
    finally:
        if in_backward is not None:
            in_backward.remove()
    bytes_of: Counter[str] = Counter()
    for device in tracker.get_tracker_snapshot("peak").values():
        bytes_of.update({str(getattr(kind, "value", kind)): size for kind, size in device.items()})
    return {part: sum(bytes_of[name] for name in names) for part, names in PARTS.items()}


def _check(settings: TrainSettings, block_tokens: int, ranks: int, device_type: str) -> None:
    numbers = {"batch": settings.batch, "accumulate": settings.accumulate, "block_tokens": block_tokens, "ranks": ranks}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: at least 1, got {value}.")
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type: cpu or cuda, got {device_type!r}.")
    if settings.fsdp and ranks == 1:
        raise ValueError("fsdp: there is one rank and nothing to shard over. Give ranks=2 or more, or leave fsdp out.")


def _table_bytes(model: nn.Module, config: ClusterConfig) -> int:
    """Return the bytes of the centroids and of their values during a step, in float32."""
    from edkm.train.prepare import plan

    return sum(4 * math.prod(entry.table_shape) * (config.max_iters + 2) for entry in plan(model, config).clustered)


def _twin(model: nn.Module, checkpointing: bool, dtype: Any) -> Any:
    """Copy a model without its data, ready to train; its parameters in another dtype, if one is given."""
    import torch

    from edkm.train.loop import enable_checkpointing

    memo: dict[int, Any] = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype))
    twin: Any = copy.deepcopy(model, memo).train()
    if getattr(twin.config, "_experts_implementation", None) == "eager" and twin._can_set_experts_implementation():
        # A loop over the experts that have tokens, which only data can tell.
        twin.set_experts_implementation("grouped_mm")
    if checkpointing:
        enable_checkpointing(twin)
    return twin


@contextmanager
def _sharded(model: nn.Module, ranks: int) -> Iterator[None]:
    """Shard a model of fake tensors in place by FSDP2, for the block, in a process group that sends nothing; not for one rank."""
    if ranks == 1:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from edkm.train.sharding import shard_model

    joined = dist.is_initialized()
    if joined and dist.get_world_size() != ranks:
        raise ValueError(f"ranks: this is one of {dist.get_world_size()} ranks and plans for as many, got {ranks}. Plan outside torchrun.")
    if not joined:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        group: Any = dist.new_group(backend="fake") if joined else dist.group.WORLD
        shard_model(model, group)
        yield
    finally:
        if not joined:
            dist.destroy_process_group()


@contextmanager
def _without_data() -> Iterator[None]:
    """Keep transformers from looking into positions for several texts in a block, and at data for grouped products."""
    from transformers import masking_utils
    from transformers.integrations import moe

    with (
        patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None, create=True),
        patch.object(moe, "_can_use_grouped_mm", lambda *_, **__: False, create=True),
    ):
        yield


def plan_by_layer(skeleton: Skeleton, config: ClusterConfig, tokens: int, *, trained: bool = False) -> Budget:
    """Plan the memory of compressing a model a layer at a time, by formulas for the parts that grow with the model.

    Args:
        skeleton: of the model.
        config: how it is clustered.
        tokens: of a batch.
        trained: each layer is trained after its fit, with AdamW.
    """
    from edkm.core.gptq import WEIGHTS_AT_ONCE
    from edkm.train.targets import decide, linears_of

    linears, targets = linears_of(skeleton.model, config), decide(skeleton.model, config)
    text = skeleton.model.config.get_text_config()
    plans = []
    for modules in (skeleton.outer, *([*layer.modules()] for layer in skeleton.layers)):
        within = set(modules)
        weights = sum(target.weight.numel() for target in targets if target.modules[0] in within)
        sizes = [module.weight.shape for module in linears if module in within]
        # Of its inputs every weight has a moment; the fit takes two copies of both, and eleven of the rows that it works on.
        moments = sum(cols * cols for _, cols in sizes)
        fit = max((11 * min(rows * cols, WEIGHTS_AT_ONCE) + 2 * rows * cols + 2 * cols * cols for rows, cols in sizes), default=0)
        others = [t.weight.numel() for t in targets if t.modules[0] in within and t.modules[0] not in linears and not t.reason]
        work = moments + max(moments, fit, 3 * max(others, default=0))
        if trained and modules is not skeleton.outer:
            # Until the last weight is fitted what was fitted is kept; then there are a copy, its gradients and two moments of AdamW, too.
            work = max(work, 4 * weights) + weights
        plans.append({"weights": 4 * weights, "clustering": 4 * work + weights})
    # A block of hidden states for each layer of a batch that is trained; else a few, or logits.
    states = 4 * tokens * max(2 * text.vocab_size, 16 * text.hidden_size, (40 if trained else 0) * text.hidden_size)
    process = int(resident_mib() * 2**20) + _KEPT_BYTES
    return Budget({**max(plans, key=lambda plan: sum(plan.values())), "activations": states, "process": process})


def resident_mib() -> float:
    """Return the resident set of this process."""
    return _status("VmRSS") or peak_mib()


def peak_mib() -> float:
    """Return the largest resident set of this process. Not `ru_maxrss`, which a process inherits from the one that started it."""
    if (found := _status("VmHWM")) is not None:
        return found
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def _status(field: str) -> float | None:
    """Read a size from the kernel's status of this process, in MiB; None where there is none."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return None


def peak_gpu_mib() -> float | None:
    """Return the most memory that this process's tensors took on a GPU; None if it used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated() / 2**20
