"""Make an optimizer by its name, for a kind of memory; step in the backward pass; the schedule of the learning rate.

Three kinds of memory, `MEMORY`:

    high     float32 weights and an optimizer of torch.optim: 16 bytes a weight with AdamW, and on a GPU 4 more during its step
    low      bfloat16 weights, rounded at random so that small updates count on average, and torchao's AdamW with moments of 8 bits: 6 bytes
    lower    the same, each weight stepped on when its gradient is complete and the gradient freed: 4 bytes. A gradient is gone before the
             next is there, so they can neither be accumulated nor clipped together
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edkm.train import distributed

MEMORY = ("high", "low", "lower")
# These are none, or need a closure or sparse gradients.
_NOT_THESE = {"optimizer", "lbfgs", "sparseadam"}
# Of torchao, by the name of the class in lower case: it, the bits of its moments, and how many values share a scale.
_QUANTIZED = {
    "adam8bit": ("Adam8bit", 8, 256),
    "adamw8bit": ("AdamW8bit", 8, 256),
    "adam4bit": ("Adam4bit", 4, 128),
    "adamw4bit": ("AdamW4bit", 4, 128),
}
_LOW = {"adamw": "adamw8bit", "adam": "adam8bit"}


def optimizer_name(name: str, memory: str = "high") -> str:
    """Return the name in lower case of the optimizer that a name stands for; with little memory `adamw` is `adamw8bit`.

    Raises:
        ValueError: no such optimizer or kind of memory, or one that does not round at random where the memory asks for it.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory: {', '.join(MEMORY)}, got {memory!r}.")
    key = name.lower()
    names = sorted(_torch_classes().keys() | _QUANTIZED)
    if key not in names:
        raise ValueError(f"optimizer: there is no {name!r}. Use one of {', '.join(names)}.")
    if memory == "high":
        return key
    key = _LOW.get(key, key)
    if key not in _QUANTIZED:
        allowed = ", ".join((*_LOW, *_QUANTIZED))
        raise ValueError(f"optimizer: {key} does not round bfloat16 weights at random. Use one of {allowed}, or memory high.")
    return key


def is_quantized(name: str, memory: str) -> bool:
    """Tell whether an optimizer is one of torchao's, with states in few bits."""
    return optimizer_name(name, memory) in _QUANTIZED


def make_optimizer(name: str, params: Iterable[nn.Parameter], lr: float, memory: str = "high") -> torch.optim.Optimizer:
    """Make the optimizer of `optimizer_name`; betas are 0.9 and 0.95 and there is no weight decay, for those that have them.

    Those of torchao round weights in bfloat16 at random.

    Raises:
        ValueError: as `optimizer_name`, or torchao is not installed.
    """
    key = optimizer_name(name, memory)
    kind = _torchao_class(key) if key in _QUANTIZED else _torch_classes()[key]
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "bf16_stochastic_round": True}
    accepted = inspect.signature(kind).parameters
    return kind(params, lr=lr, **{key: value for key, value in options.items() if key in accepted})


def check_memory(settings: Any) -> None:
    """Refuse `loop.TrainSettings` that do not go with their kind of memory.

    Raises:
        ValueError: with the remedy.
    """
    memory, name = settings.memory, optimizer_name(settings.optimizer, settings.memory)
    if settings.fsdp and name in _QUANTIZED:
        # DTensors of its states cannot be computed with: torch 2.13, torchao 0.18.
        raise ValueError(f"fsdp: torchao's {name} has no shards. Use memory high, or leave fsdp out.")
    if memory != "high" and settings.precision == "fp32":
        raise ValueError(f"memory: {memory} computes in bfloat16, and precision is fp32. Leave precision out, or use memory high.")
    if memory == "lower" and settings.accumulate > 1:
        raise ValueError(
            "memory: lower frees every gradient in the backward pass, and grad_accumulation adds them up. Use memory low, or 1 micro-batch."
        )
    if memory == "lower" and distributed.world_size() > 1:
        raise ValueError("memory: lower steps before the ranks have added up their gradients. Use memory low, or one process.")


def check_optimizer(name: str, memory: str, device: str) -> None:
    """Make a step of an optimizer of torchao, which compiles it, on a small weight: refuse here what would fail after loading.

    Raises:
        ValueError: as `optimizer_name`; torchao is not installed, or its step cannot be compiled for the device.
    """
    key = optimizer_name(name, memory)
    if key not in _QUANTIZED:
        return
    probe = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16, device=device))
    probe.grad = torch.zeros_like(probe)
    optimizer = make_optimizer(key, [probe], 0.0)
    try:
        with quiet():
            optimizer.step()
    except Exception as error:
        cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"optimizer: torchao's {key} cannot be compiled on {device}: {cause} Install a C++ compiler, or use memory high."
        ) from error


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters; torchao's is a tensor, which its compiled step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class BackwardSteps:
    """Step on each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

    `optimizer.step()` afterwards finds no gradients: it only tells who counts steps that one is done. To be removed after training.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._squares = optimizer, []
        # Without the hooks that count steps: one step is one pass over all parameters.
        step: Any = type(optimizer).step
        self._step = step.__wrapped__
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._handles = [parameter.register_post_accumulate_grad_hook(self._of) for parameter in parameters]

    def _of(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._squares.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square())
        self._step(self._optimizer)
        parameter.grad = None

    def norm(self) -> Tensor:
        """Return the norm of the gradient of the last pass."""
        norm, self._squares = torch.stack(self._squares).sum().sqrt(), []
        return norm

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()


class PlannedSteps(torch.optim.Optimizer):
    """Stand for an optimizer of torchao in a plan: its states and the temporaries of its step, by their sizes.

    The step is compiled, and trackers of memory do not see into it. For each weight it makes both new moments in float32 and their scales.
    """

    def __init__(self, params: Iterable[nn.Parameter], name: str) -> None:
        super().__init__(params, {})
        _, self.bits, self.block = _QUANTIZED[name]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make the states if there are none, and the temporaries."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None):
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            count, state, names = local.numel(), self.state[parameter], ("exp_avg", "exp_avg_sq")
            if count < 4096 or count % self.block:  # torchao does not quantize these
                made, temporary = torch.empty_like, 0
            else:
                scales = count // self.block
                stored, temporary = count * self.bits // 8 + 4 * scales + 4 * 2**self.bits, 4 * (count + scales)
                made = partial(_bytes, stored)
            for name in names:
                if name not in state:
                    state[name] = made(local)
            temporaries = [_bytes(temporary, local) for _ in names]
            del temporaries


def _bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def plan_optimizer(name: str, params: Iterable[nn.Parameter], lr: float, memory: str) -> torch.optim.Optimizer:
    """Make the optimizer of `make_optimizer` for a plan of memory: for those of torchao, which need not be installed, a stand-in."""
    key = optimizer_name(name, memory)
    return PlannedSteps(params, key) if key in _QUANTIZED else make_optimizer(key, params, lr)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torchao and the compiler from warning of kernels for other machines, of caches, and of their own old code."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def rate_share(step: int, *, steps: int, warmup: int) -> float:
    """Return the learning rate of a step, linear up and down, as a share of the highest.

    Unlike transformers', which makes the first step at a rate of zero: of twelve steps that is one.
    """
    return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


def _torch_classes() -> dict[str, Any]:
    classes = {key.lower(): found for key, found in vars(torch.optim).items() if inspect.isclass(found)}
    return {key: found for key, found in classes.items() if key not in _NOT_THESE}


def _torchao_class(key: str) -> Any:
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"optimizer: {key} is torchao's, which is not installed. Install it with pip install 'edkm[low]'.")
    with quiet():
        import torchao.optim
    return getattr(torchao.optim, _QUANTIZED[key][0])
