"""Read and write files of the runners here: an ordinary checkpoint and calibration blocks in, weights at their quantized values out.

A runner is a script of the environment of the baselines, so it finds this file beside itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def arguments(description: str | None, methods: Iterable[str]) -> argparse.ArgumentParser:
    """Describe the command line that runners share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("method", choices=tuple(methods))
    parser.add_argument("--model", type=Path, required=True, help="an ordinary checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="safetensors with input_ids [blocks, tokens]")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="columns that share a scale")
    parser.add_argument("--skip", nargs="*", default=[], help="linear layers left alone")
    parser.add_argument("--out", type=Path, required=True, help="weights.safetensors and figures.json go there")
    return parser


def load(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """Load the model in float32 and the calibration blocks, `[blocks, tokens]`."""
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), load_file(args.calibration)["input_ids"]


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Put a weight `[rows, columns]` on the grid of its groups, with the scale in float16 as it would be stored.

    Args:
        weight: any that rounds to the codes meant.
        scale: `[rows, groups]`.
        zero: `[rows, groups]`, of the codes 0 to `2**bits - 1`.
        bits: of a code.
    """
    groups = weight.float().unflatten(1, (scale.shape[1], -1))  # [rows, groups, columns of a group]
    scale, zero = scale.unsqueeze(-1).float(), zero.unsqueeze(-1).float()
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) * scale.half().float()).flatten(1)


def write(out: Path, weights: dict[str, Tensor], quantized: list[str], began: float, **more: Any) -> None:
    """Write weights, and figures: the seconds since `began`, the peaks, the names of quantized weights, and what more there is."""
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    figures = {"seconds": time.perf_counter() - began, "quantized": quantized, "peak_mib": peak_mib(), "peak_gpu_mib": gpu, **more}
    save_file({name: weight.detach().contiguous().cpu() for name, weight in weights.items()}, out / "weights.safetensors")
    (out / "figures.json").write_text(json.dumps(figures))


def peak_mib() -> float:
    """Read the largest resident set of this process. Not `ru_maxrss`, which a process inherits from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
