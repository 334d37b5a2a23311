"""Choose the kind of memory of a training, of `edkm.train.optimizers.MEMORY`: the first whose plan fits the device."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edkm.memory import GIB, plan_memory
from edkm.progress import progress

if TYPE_CHECKING:
    from torch import nn

    from edkm.train.loop import TrainSettings

# Kinds of `optimizers.MEMORY`: what is kept, and what that gives up.
KINDS = {
    "high": "float32 weights",
    "low": "bfloat16 weights, AdamW in 8 bits; gives up float32 weights",
    "lower": "and steps in the backward pass; gives up accumulation and clipping",
}
# Of the free memory: the rest is for what a plan does not see.
_USABLE = 0.9
# Float32 weights, gradients, AdamW's moments, and its temporaries on a GPU.
_HIGH_BYTES = 20


def possible_kinds(settings: TrainSettings) -> list[str]:
    """List the kinds of memory that go with the other settings."""
    from edkm.train.optimizers import check_memory

    found = []
    for kind in KINDS:
        with suppress(ValueError):
            check_memory(replace(settings, memory=kind))
            found.append(kind)
    return found


def choose_memory(
    model: nn.Module, settings: TrainSettings, free_bytes: int, *, block_tokens: int, ranks: int = 1, device_type: str = "cpu"
) -> tuple[str, str]:
    """Choose the first kind of memory that fits a device, by a plan; the last, if none does. Return it and the reason.

    Where float32 weights, gradients and AdamW's states take less than a quarter of the memory nothing is planned: activations alone could
    fill the rest, and of these the other kinds save little.

    Args:
        model: as for `plan_memory`, in float32.
        free_bytes: of the device, before the model is there.
    """
    kinds = possible_kinds(settings)
    known = _HIGH_BYTES * sum(p.numel() for p in model.parameters()) // (ranks if settings.fsdp else 1)
    free = f"{free_bytes / GIB:.2f} GiB free"
    if len(kinds) == 1:
        return kinds[0], "the other settings go with no other"
    if known < free_bytes / 4:
        return "high", f"float32 weights and AdamW take {known / GIB:.2f} of {free}"
    peaks: dict[str, int] = {}
    with progress("planning memory"):
        for kind in kinds:
            asked = replace(settings, memory=kind)
            peaks[kind] = plan_memory(model, None, asked, block_tokens=block_tokens, ranks=ranks, device_type=device_type).peak
            if fits(peaks[kind], free_bytes):
                break
    needed = ", ".join(f"{kind} takes {peak / GIB:.2f}" for kind, peak in peaks.items())
    kind = first_fit(peaks, free_bytes)
    rest = "" if fits(peaks[kind], free_bytes) else ": it may run out. Gradient checkpointing, shorter blocks or FSDP take less"
    return kind, f"{needed} of {free}{rest}"


def fits(peak: int, free_bytes: int) -> bool:
    """Tell whether a plan fits, with a tenth to spare for what it does not see."""
    return peak <= _USABLE * free_bytes


def first_fit(peaks: dict[str, int], free_bytes: int) -> str:
    """Name the first kind of memory that fits; the last, if none does."""
    return next((kind for kind, peak in peaks.items() if fits(peak, free_bytes)), [*peaks][-1])


def free_memory(device: str, ranks: int = 1) -> int:
    """Return the bytes that are free on a device (`cuda`, `mps` or `cpu`) for each of the ranks that share it."""
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory()
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    limits = [int(text) for text in [limit.read_text().strip()] if text.isdecimal()] if limit.is_file() else []
    return min([psutil.virtual_memory().available, *limits]) // ranks
