"""`python -m benchmarks offload`: a fine-tuning step of SmolLM2-135M with what it saves for backward moved away.

Forward and backward in float32, no optimizer, in blocks of 512 tokens. Rows:

    plain          autograd's own way; kept are the distinct storages that it saves, but for parameters
    save_on_cpu    every saved tensor is copied, parameters and repeats too, as `torch.autograd.graph.save_on_cpu` does
    edkm.offload   `edkm.offload.saved_tensors()`

Where tensors are on the CPU already, `save_on_cpu` copies nothing; `saved_tensors(marshal=False, uniquify=False)` stands in for it, which
makes real copies of all but the parameters; those are counted in. The sum must be what a hook of its own counts in one more forward pass.
Loss and every gradient must equal those of the plain step, bit for bit, in every repeat, or no table is printed. The rows take turns, so
that all see the same disturbances of a shared machine. The seconds are those of copying within the memory of one machine: they show what
the bookkeeping costs, not what a transfer from a GPU costs.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import kept_bytes, machine, write
from edkm.models import load_model
from edkm.offload import saved_tensors
from examples.demo.data import fetch_smollm2

BLOCK = 512
ROWS = {"plain": None, "save_on_cpu": {"marshal": False, "uniquify": False}, "edkm.offload": {}}


def main(argv: list[str]) -> int:
    """Run the benchmark, check losses and gradients and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks offload", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {BLOCK}, or fewer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    model, _ = load_model(fetch_smollm2())
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (args.tokens,)).view(-1, min(BLOCK, args.tokens))
    result = run(model, tokens, args.repeats)
    print(_table(result))
    write(args.json, result)
    return 0


def run(model: Any, tokens: Tensor, repeats: int) -> dict:
    """Measure all rows, as the JSON result; raises where a loss or a gradient differs from the plain step."""
    model.train()
    loss = lambda: model(input_ids=tokens, labels=tokens).loss  # noqa: E731
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own, requested = kept_bytes(loss, parameters), requested_bytes(loss)
    rows = {name: {"name": name, "times": []} for name in ROWS}
    expected = None
    # The first step of each is not timed.
    for repeat in range(repeats + 1):
        for name, options in ROWS.items():
            model.zero_grad()
            began = time.perf_counter()
            with saved_tensors(**options) if options is not None else nullcontext() as stats:
                value = loss()
            value.backward()
            elapsed = time.perf_counter() - began
            found = (value.item(), _digest(model))
            expected = expected or found
            if found != expected:
                raise RuntimeError(f"{name}, step {repeat}: loss or gradients differ from the plain step: {found}, not {expected}.")
            if repeat:
                rows[name]["times"].append(elapsed)
            if stats is not None:
                rows[name] |= {"stats": asdict(stats), "copied_bytes": stats.copied_bytes, "peak_kept_bytes": stats.peak_kept_bytes}
    rows["plain"] |= {"copied_bytes": 0, "peak_kept_bytes": own}
    for row in rows.values():
        row["seconds"] = statistics.median(row["times"])
        row["seconds_ratio"] = row["seconds"] / statistics.median(rows["plain"]["times"])
    _as_save_on_cpu(rows["save_on_cpu"], requested)
    for row in rows.values():
        row["ratio"] = requested / row["peak_kept_bytes"]
    layout = {"tokens": tokens.numel(), "repeats": repeats, "loss": expected[0], "gradients": expected[1]}
    return {"benchmark": "offload", **layout, "machine": machine("cpu"), "requested_bytes": requested, "rows": list(rows.values())}


def requested_bytes(forward: Callable[[], Any]) -> int:
    """Count the bytes of all tensors that `forward` saves for backward, parameters and repeats too: what `save_on_cpu` copies."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return total


def _digest(model: Any) -> str:
    """Hash all gradients."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.grad is not None:
            digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()


def _as_save_on_cpu(row: dict, requested: int) -> None:
    """Add the parameters, which the stand-in refers to and `save_on_cpu` copies."""
    referenced = row["stats"]["avoided_bytes"]["reference"]
    for key in ("copied_bytes", "peak_kept_bytes"):
        row[key] += referenced
        if row[key] != requested:
            raise RuntimeError(f"save_on_cpu: {key} are {row[key]}, parameters counted in; {requested} were asked for.")


def _table(result: dict) -> str:
    lines = [
        f"SmolLM2-135M, {result['tokens']} tokens, float32, {result['machine']['device']}, {result['machine']['threads']} threads",
        f"loss {result['loss']:.6f} and all gradients equal bit for bit; {result['requested_bytes'] / 2**20:,.0f} MiB asked to be saved",
        f"{'row':<13} {'copied MiB':>10} {'kept MiB':>9} {'times less':>10} {'seconds':>8} {'to plain':>8}",
    ]
    for row in result["rows"]:
        copied, kept = (row[key] / 2**20 for key in ("copied_bytes", "peak_kept_bytes"))
        columns = f"{copied:>10,.0f} {kept:>9,.0f} {row['ratio']:>10.2f} {row['seconds']:>8.2f} {row['seconds_ratio']:>8.2f}"
        lines.append(f"{row['name']:<13} {columns}")
    lines.append(f"Kept: the most at any time. Seconds: forward and backward, median of {result['repeats']}.")
    return "\n".join(lines)
