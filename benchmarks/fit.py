"""`python -m benchmarks fit`: `core.gptq.fit` of one weight, beside a plain pass of GPTQ, and what a whole LLaMA-7B would take.

Weights are random normal, inputs correlated and of widely different scales; a table per row. The peer is GPTQ as its paper has it
(arXiv:2210.17323): an even grid per row, columns in the order of their inputs, the inverse by Cholesky, blocks of 128 columns. Each is
timed once, GPTQ first, after a small weight to warm up. Processor time, over threads, shows less of other work on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, write
from edkm.core import gptq

# Shape, and how often LLaMA-7B has it.
LAYERS = {
    "SmolLM2-135M q_proj": ((576, 576), 0),
    "SmolLM2-135M up_proj": ((1536, 576), 0),
    "SmolLM2-135M down_proj": ((576, 1536), 0),
    "LLaMA-7B q_proj": ((4096, 4096), 4 * 32),
    "LLaMA-7B up_proj": ((11008, 4096), 2 * 32),
    "LLaMA-7B down_proj": ((4096, 11008), 32),
}
_TOKENS = 1024
_BLOCK = 128


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fit", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--layers", nargs="*", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    _measure((64, 64), args)
    rows = []
    print(f"{'layer':<24} {'fit':>8} {'processor':>10} {'GPTQ':>8} {'processor':>10} {'ratio':>6} {'turns':>6} {'error':>8} {'GPTQ':>8}")
    for layer in args.layers:
        row = {"layer": layer, **_measure(LAYERS[layer][0], args)}
        rows.append(row)
        print(
            f"{layer:<24} {row['seconds']:>8.2f} {row['processor']:>10.2f} {row['gptq_seconds']:>8.2f} {row['gptq_processor']:>10.2f}"
            f" {row['processor'] / row['gptq_processor']:>6.2f} {row['turns']:>6} {row['error']:>8.5f} {row['gptq_error']:>8.5f}",
            flush=True,
        )
    whole = _whole(rows)
    if whole:
        print("LLaMA-7B: " + ", ".join(f"{hours:.2f} hours ({name})" for name, hours in whole.items()))
    write(args.json, {"benchmark": "fit", "bits": args.bits, "machine": machine(args.device), "rows": rows, "llama_7b_hours": whole})
    return 0


def _measure(shape: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    weight, moment = _problem(shape, args.device)
    peer, *peer_seconds = timed(lambda: _gptq(weight, moment, args.bits))
    found, *seconds = timed(lambda: gptq.fit(weight, moment, args.bits, rows_per_lut=1))
    h = gptq._shrunk(moment, 0.2)
    lost, scale = (float(((h @ x.T) * x.T).sum()) for x in (peer - weight, weight))
    names = ("gptq_seconds", "gptq_processor", "seconds", "processor")
    return {
        "shape": list(shape),
        **dict(zip(names, (*peer_seconds, *seconds), strict=True)),
        "turns": len(found.errors) - 1,
        "error": found.errors[-1],
        "gptq_error": lost / scale,
    }


def _problem(shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """Draw a weight and the moment of its inputs: random directions, many of which share their inputs' variance unevenly."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    hidden = torch.randn(_TOKENS, cols // 4, generator=generator)
    x = hidden @ torch.randn(cols // 4, cols, generator=generator) * (4 / cols) ** 0.5 + torch.randn(_TOKENS, cols, generator=generator)
    x = (x * torch.randn(cols, generator=generator).exp()).to(device)
    return (0.02 * torch.randn(rows, cols, generator=generator)).to(device), x.T @ x / _TOKENS


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result, seconds, and seconds of processor time over threads."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began, worked = time.perf_counter(), time.process_time()
    result = run()
    wait()
    return result, time.perf_counter() - began, (time.process_time() - worked) / torch.get_num_threads()


def _gptq(weight: Tensor, moment: Tensor, bits: int) -> Tensor:
    """Round a weight by GPTQ to an even grid per row, with the damping of its paper."""
    h = moment.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    low, high = weight.aminmax(dim=1)
    step = (high - low) / (2**bits - 1)
    w, q = weight.clone(), torch.empty_like(weight)
    for start in range(0, w.shape[1], _BLOCK):
        here, later = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        block, factor = w[:, here].clone(), upper[here, here]
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            q[:, start + j] = ((block[:, j] - low) / step).round().clamp(0, 2**bits - 1) * step + low
            errors[:, j] = (block[:, j] - q[:, start + j]) / factor[j, j]
            block[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
        w[:, later] -= errors @ upper[here, later]
    return q


def _whole(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Add up hours of all weights of LLaMA-7B, if each of its shapes was measured."""
    counts = {layer: count for layer, (_, count) in LAYERS.items() if count}
    measured = {row["layer"]: row for row in rows if row["layer"] in counts}
    if measured.keys() != counts.keys():
        return {}
    names = {"fit": "seconds", "fit, processor time": "processor", "GPTQ": "gptq_seconds", "GPTQ, processor time": "gptq_processor"}
    return {name: sum(counts[layer] * measured[layer][key] for layer in counts) / 3600 for name, key in names.items()}
