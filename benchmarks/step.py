"""`python -m benchmarks step`: one training step of SmolLM2-135M, plain and clustered, in turn in the same process.

Blocks of 512 tokens, AdamW, forward + backward + optimizer step, in float32 or under bfloat16 autocast. Plain and clustered steps
alternate, so that both see the same disturbances of a shared machine. Seconds are those of the processor, of all threads, which do not
count the time that others had it; the ratio is that of the least of either.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path

import torch

import edkm
from benchmarks.measure import machine, write
from edkm.models import load_model
from examples.demo.data import fetch_smollm2


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iters", type=int, nargs="*", default=[1, 3], help="k-means iterations a step")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--rows-per-lut", type=int, nargs="*", default=[0, 16])
    parser.add_argument("--formats", nargs="*", default=["table", "q4_0"], help="of the weights; table: free tables")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    loaded, _ = load_model(fetch_smollm2())
    torch.manual_seed(0)
    tokens = torch.randint(0, 49152, (args.tokens // 512, 512))
    rows = []
    tables = [(name, rows_per_lut) for name in args.formats for rows_per_lut in (args.rows_per_lut if name == "table" else [0])]
    for precision, (name, rows_per_lut), iters in itertools.product(args.precision, tables, args.iters):
        plain, clustered = copy.deepcopy(loaded), copy.deepcopy(loaded)
        importance = edkm.calibrate(clustered, [tokens[:1]])
        edkm.prepare(clustered, edkm.ClusterConfig(format=name, rows_per_lut=rows_per_lut, max_iters=iters), importance=importance)
        steps = {"plain": _stepper(plain, tokens, precision), "clustered": _stepper(clustered, tokens, precision)}
        times = {name: [] for name in steps}
        for repeat in range(args.repeats + 1):
            for who, step in steps.items():
                began = time.process_time()
                step()
                if repeat:
                    times[who].append(time.process_time() - began)
        least = {name: min(values) for name, values in times.items()}
        ratio = least["clustered"] / least["plain"]
        rows.append(
            {"precision": precision, "format": name, "rows_per_lut": rows_per_lut, "max_iters": iters, "seconds": times, "ratio": ratio}
        )
        kind = name if name != "table" else f"{rows_per_lut} rows per table" if rows_per_lut else "one table per tensor"
        found = f"plain {least['plain']:.2f} s, clustered {least['clustered']:.2f} s, ratio {ratio:.2f}"
        print(f"{precision}, {kind}, {iters} iterations: {found}", flush=True)
        del plain, clustered, steps
    write(args.json, {"benchmark": "step", "tokens": tokens.numel(), "machine": machine("cpu"), "rows": rows})
    return 0


def _stepper(model, tokens, precision):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
