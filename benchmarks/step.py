"""`python -m benchmarks step`: one training step of SmolLM2-135M, plain and clustered, in turn in the same process.

2,048 tokens (4 blocks of 512), AdamW, forward + backward + optimizer step. Plain and clustered steps alternate, so that both see the
same disturbances of a shared machine; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
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
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    loaded, _ = load_model(fetch_smollm2())
    torch.manual_seed(0)
    tokens = torch.randint(0, 49152, (4, 512))
    rows = []
    for rows_per_lut in (0, 16):
        for iters in args.iters:
            plain, clustered = copy.deepcopy(loaded), copy.deepcopy(loaded)
            importance = edkm.calibrate(clustered, [tokens[:2]])
            config = edkm.ClusterConfig(rows_per_lut=rows_per_lut, max_iters=iters)
            edkm.prepare(clustered, config, importance=importance)
            steps = {"plain": _stepper(plain, tokens), "clustered": _stepper(clustered, tokens)}
            times = {name: [] for name in steps}
            for repeat in range(args.repeats + 1):
                for name, step in steps.items():
                    began = time.perf_counter()
                    step()
                    if repeat:
                        times[name].append(time.perf_counter() - began)
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratio = medians["clustered"] / medians["plain"]
            rows.append({"rows_per_lut": rows_per_lut, "max_iters": iters, "seconds": times, "ratio": ratio})
            tables = f"{rows_per_lut} rows per table" if rows_per_lut else "one table per tensor"
            print(
                f"{tables}, {iters} iterations: plain {medians['plain']:.2f} s, clustered {medians['clustered']:.2f} s, ratio {ratio:.2f}",
                flush=True,
            )
            del plain, clustered, steps
    write(args.json, {"benchmark": "step", "tokens": tokens.numel(), "machine": machine("cpu"), "rows": rows})
    return 0


def _stepper(model, tokens):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
