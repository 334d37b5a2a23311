"""How much memory training will take, before it starts.

There are no formulas for activations here: they would be wrong for the next architecture. Instead one training step is run on a copy
of the model whose tensors have shapes and no data (`FakeTensorMode`), with the model's own code, autograd, autocast, checkpointing and
AdamW, and a `Timeline` adds the bytes of every tensor that comes to life and takes them off when it dies. The peak of that line is the
answer, and a 7B model costs seconds. What has no shape to follow is added to the same line at the moment it would exist:

- clustering: a `_Sketch` stands in for each `Clustering`. It hands out a decoded weight and a gradient of the right size, and adds what
  the backends use meanwhile (`scratch_bytes`, the only formula);
- DDP: a bucket for every gradient, for as long as training runs;
- FSDP2: `_Gathering` repeats what torch/distributed/fsdp/_fully_shard allocates and frees around each decoder layer.

What is not seen: the inside of kernels (matrix packing, attention on a GPU), fragmentation, the CUDA context, communication libraries.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edkm.config import ClusterConfig
from edkm.core import fused, unique
from edkm.core.op import Solution, choose_backend
from edkm.core.reference import compute_dtype
from edkm.train.layer import Clustering, _Gate
from edkm.train.prepare import Entry, _install, _targets, plan

if TYPE_CHECKING:
    from edkm.train.trainer import TrainSettings

PARTS = ("weights", "gradients", "optimizer", "activations", "clustering", "communication")
# Weights of a tensor that are looked at to guess the number of its distinct values.
_SAMPLE_WEIGHTS = 1 << 20


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

    Cost:
        Seconds; no memory for weights.
    """
    _check(settings, block_tokens, learners, device_type, backend)
    from edkm.train.trainer import resolve_precision

    bf16 = resolve_precision(settings.precision) == "bf16"
    timeline = Timeline()
    clustered = {} if config is None else _choices(model, config, backend)
    with FakeTensorMode(allow_non_fake_inputs=True), _unpacked():
        twin = _twin(model, settings.checkpointing)
        buffers = list(twin.buffers())
        gathering = _Gathering(twin, timeline, learners) if settings.fsdp else None
        for target in _targets(twin):
            if target.names[0] in clustered:
                _install(target, _Sketch(target.weight, clustered[target.names[0]], config, timeline, device_type, settings.fsdp))
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
        ids = torch.zeros(settings.batch, block_tokens, dtype=torch.int64)
        with timeline:
            timeline.start()
            for _ in range(min(settings.accumulate, 2)):
                _forward_and_backward(twin, ids, bf16, timeline)
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
    if backend not in ("auto", "unique", "fused"):
        raise ValueError(f"backend: auto, unique or fused, got {backend!r}.")
    if settings.fsdp and learners == 1:
        raise ValueError("fsdp: there is one learner and nothing to shard over. Give learners=2 or more, or leave fsdp out.")


def _forward_and_backward(model: nn.Module, ids: Tensor, bf16: bool, timeline: Timeline) -> None:
    """One micro-batch, as transformers' Trainer runs it."""
    timeline.moment = "forward"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(input_ids=ids, labels=ids)
    if bf16:  # accelerate makes float32 of what leaves the model
        out.logits = out.logits.float()
    loss = out.loss
    del out
    timeline.moment = "backward"
    loss.backward()


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
    if checkpointing:
        enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return twin


@contextmanager
def _unpacked() -> Iterator[None]:
    """transformers looks into the positions for several texts in a block, and where it cannot look it makes a mask."""
    from transformers import masking_utils

    with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None, create=True):
        yield


class Timeline(TorchDispatchMode):
    """Bytes of live tensors, by part, while the mode is on; real tensors as well as fake ones.

    New storages count as `part` until `count` says otherwise. Results of operations are seen, what happens inside a kernel is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(PARTS, 0)
        self.part, self.moment = "activations", ""
        self._storages: dict[int, tuple[Any, str, int]] = {}
        self.start()

    def start(self) -> None:
        """Forget the peaks so far."""
        self.at_peak, self.largest, self.peak_moment = dict(self.now), dict(self.now), self.moment

    def add(self, part: str, size: int) -> None:
        """Bytes that no tensor stands for; negative when they are freed."""
        self.now[part] += size
        self.largest[part] = max(self.largest[part], self.now[part])
        if sum(self.now.values()) > sum(self.at_peak.values()):
            self.at_peak, self.peak_moment = dict(self.now), self.moment

    def count(self, tensor: Tensor, part: str, size: int | None = None) -> None:
        """Count a tensor's storage under `part` from now until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        _, before, held = self._storages.get(key, (None, part, 0))
        size = storage.nbytes() if size is None else size
        if before != part:
            self.now[before] -= held
            held = 0
        self._storages[key] = (weakref.ref(storage, lambda _: self._died(key)), part, size)
        self.add(part, size - held)

    def _died(self, key: int) -> None:
        _, part, size = self._storages.pop(key)
        self.now[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self.count(tensor, self.part)
        return out


def scratch_bytes(rows: int, cols: int, centroids: tuple[int, int, int], values: int, backend: str, device_type: str) -> int:
    """What a backend uses beside its result while it works on a weight `[rows, cols]`, in `adjoint`, which uses the most.

    Args:
        centroids: `(g, k, d)`.
        values: distinct values of the weight, for `unique`.
        backend: `unique` or `fused`.
    """
    groups, k, d = centroids
    weights, entries = rows * cols // groups, fused.map_entries(torch.device(device_type))
    if backend == "fused":
        points = _largest_block(groups, rows // groups // d, cols * k, entries) // k
        # Three maps; a point's weights, gradient, output and results, its importance and sums; importance averaged over vectors.
        return 4 * points * (3 * k + 6 * d + 4) + (4 * rows * cols // d if d > 1 else 0)
    together = min(groups, unique._groups_of_piece(weights))
    folds = -(-min(values, together * weights) // unique.FOLD)
    points = _largest_block(together, folds, unique.FOLD * k, entries) // k
    table = together * folds * unique.FOLD
    cells = unique.KEYS if together == 1 else table
    # Tables of values, importance, gradient and two results, and some of the chunk before; then the maps, or results by cell and a
    # block's keys, sums and results.
    tables = (5 if together == groups else 7) * table
    at_blocks = 8 * cells + 24 * min(unique.BLOCK_WEIGHTS, together * weights)
    return 4 * tables + max(4 * points * (3 * k + 10), at_blocks)


def _largest_block(groups: int, rows: int, per_row: int, budget: int) -> int:
    """Entries of the largest block of `fused.chunks`."""
    whole = rows * per_row
    return min(groups, budget // whole) * whole if whole <= budget else max(1, budget // per_row) * per_row


class _Choice(NamedTuple):
    """Of a clustered tensor: what computes it, and how many distinct 16-bit values it has."""

    entry: Entry
    backend: str
    values: int


def _choices(model: nn.Module, config: ClusterConfig, backend: str) -> dict[str, _Choice]:
    """By name. Weights without data are taken for normally distributed ones."""
    parameters, found = dict(model.named_parameters()), {}
    for entry in plan(model, config).clustered:
        flat = parameters[entry.name].detach().flatten()
        group = flat.numel() // entry.tables
        if flat.is_meta:
            flat = _normal(min(flat.numel(), _SAMPLE_WEIGHTS))
        # `auto` looks at the first group.
        chosen = choose_backend(flat[:group].view(1, -1), 1, 2**entry.bits, entry.dim, torch.bfloat16)[0] if backend == "auto" else backend
        sample = flat[:: -(-flat.numel() // _SAMPLE_WEIGHTS)]
        keys = sample.to(torch.bfloat16).view(torch.int16).int() + unique.KEYS // 2
        found[entry.name] = _Choice(entry, chosen, int((keys.bincount() > 0).sum()))
    return found


@cache
def _normal(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


class _Sketch(Clustering):
    """Takes the memory of a clustering and computes nothing."""

    def __init__(
        self,
        weight: Tensor,
        choice: _Choice,
        config: ClusterConfig,
        timeline: Timeline,
        device_type: str,
        gathers: bool,
    ) -> None:
        nn.Module.__init__(self)
        entry = choice.entry
        self.config, self.choice, self.timeline = config.for_tensor(entry.name) or config, choice, timeline
        self.device_type, self.gathers, self.kept = device_type, gathers, None
        shape, dtype, cols = (entry.tables, 2**entry.bits, entry.dim), compute_dtype(weight.dtype), weight[0].numel()
        centroids, importance, temperature = (torch.empty(s, dtype=dtype) for s in (shape, (1, cols), shape[:1]))
        weights = weight.numel() // entry.tables
        chunks = -(-entry.tables // unique._groups_of_piece(weights))
        # Keys of 8 bytes for every chunk, and a single group's importance.
        per_chunk = min(choice.values, weights) * (12 if entry.tables == 1 else 8)
        table = torch.empty(chunks * per_chunk if choice.backend == "unique" else 0, dtype=torch.uint8)
        trajectory = torch.empty(config.max_iters + 1, *shape, dtype=dtype)
        self.shape = shape
        self.solution = Solution(trajectory, importance, temperature, torch.bfloat16, choice.backend, table)
        for tensor in (centroids, importance, temperature, trajectory, table):
            timeline.count(tensor, "clustering")
        self.centroids, self.soft_in_eval = centroids, False

    def live(self, weight: Tensor) -> tuple[Tensor, Solution]:
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight.detach(), self.solution
        if self.kept is None or self.gathers:
            self._use_scratch(weight)
            self.kept = _Gate.apply(weight, self, self.solution)
        return self.kept, self.solution

    def decode(self, weight: Tensor, solution: Solution) -> Tensor:
        result = torch.empty(weight.shape, dtype=weight.dtype)
        self.timeline.count(result, "clustering")
        self._use_scratch(weight)
        return result

    def backward(self, grad: Tensor, weight: Tensor, solution: Solution) -> Tensor:
        if self.config.softness == 0:
            return grad.to(weight.dtype)
        self.timeline.count(grad, "clustering")
        return self.decode(weight, solution)

    def _use_scratch(self, weight: Tensor) -> None:
        rows, cols = weight.flatten(1).shape
        size = scratch_bytes(rows, cols, self.shape, self.choice.values, self.choice.backend, self.device_type)
        self.timeline.add("clustering", size)
        self.timeline.add("clustering", -size)


class _Gathering:
    """What FSDP2 holds beside its shards. A group of parameters is a decoder layer, or the rest of the model (the root).

    Of a group there may be a flat copy (the all-gather's output), the whole parameters cut from it, and the flat gradients that are
    reduced. A layer's are gathered for its forward and its backward, the root's for all of both. The next group is gathered early.
    """

    def __init__(self, model: nn.Module, timeline: Timeline, learners: int) -> None:
        names = set(getattr(model, "_no_split_modules", None) or ())
        layers = [m for m in model.modules() if type(m).__name__ in names and m is not model]
        self.timeline, self.modules = timeline, [*layers, model]
        self.shards: dict[nn.Parameter, nn.Parameter] = {}
        self.groups: list[list[nn.Parameter]] = []
        for module in self.modules:
            self.groups.append([p for p in module.parameters() if p not in self.shards])
            for p in self.groups[-1]:
                shape = (-(-p.shape[0] // learners), *p.shape[1:])
                self.shards[p] = nn.Parameter(torch.empty(shape, dtype=p.dtype), requires_grad=p.requires_grad)
                timeline.count(p, "communication", 0)  # gathered ones are added by hand
        self.sizes = [learners * sum(self.shards[p].nbytes for p in group) for group in self.groups]
        self.held: dict[tuple[str, int], int] = {}
        self.last_gathered = self.last_reduced = -1

    def watch(self) -> None:
        for i, (module, group) in enumerate(zip(self.modules, self.groups, strict=True)):
            module.register_forward_pre_hook(lambda module, args, i=i: self._before(i))
            module.register_forward_hook(lambda module, args, out, i=i: self._after(i, out))
            missing: set[nn.Parameter] = set()
            for p in group:
                if p.requires_grad:
                    missing.add(p)
                    p.register_post_accumulate_grad_hook(lambda p, i=i, missing=missing: self._have_gradient(p, i, missing))

    def _hold(self, what: str, i: int) -> None:
        if (what, i) not in self.held:
            self.held[what, i] = self.sizes[i]
            self.timeline.add("communication", self.sizes[i])

    def _free(self, what: str, i: int) -> None:
        self.timeline.add("communication", -self.held.pop((what, i), 0))

    def _before(self, i: int) -> None:
        if ("whole", i) in self.held:  # recomputation within backward
            return
        self._hold("flat", i)
        self._hold("whole", i)
        self._free("flat", self.last_gathered)
        self.last_gathered = i

    def _after(self, i: int, out: Any) -> None:
        if self.timeline.moment == "backward":
            return
        root = i == len(self.groups) - 1
        self._free(*(("flat", self.last_gathered) if root else ("whole", i)))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: self._before_backward(i))

    def _before_backward(self, i: int) -> None:
        self._hold("whole", i)
        self._free("flat", i)
        if i:
            self._hold("flat", i - 1)

    def _have_gradient(self, p: nn.Parameter, i: int, missing: set[nn.Parameter]) -> None:
        missing.discard(p)
        if missing:
            return
        self._free("whole", i)
        self._free("reduced", self.last_reduced)
        self._hold("reduced", i)
        for p in self.groups[i]:
            if p.requires_grad:
                missing.add(p)
                p.grad = None
                part = torch.empty_like(self.shards[p])
                self.timeline.count(part, "gradients")
                self.shards[p].grad = part
        self.last_reduced = i
        if i == len(self.groups) - 1:
            self._free("reduced", i)
