"""`python -m benchmarks op`: forward and backward of clustering one weight, by backend and beside peers.

Shapes are those of real layers. Weights are random normal with a standard deviation of 0.02, gradients random; softness 0.5, three
iterations, importance per column. Beside free tables stand formats, in what a layer does in a step: q4_0, a scale for 32 weights, to be
compared with a table for each row at `--bits 4`; int8_row, offset and scale of a row, also assigned hard (softness 0).

First the backends are compared with the reference in float64 on a small weight: no figure is printed for a backend that computes
something else. coremltools runs in its own environment (`--peers PYTHON`), in the same run on the same machine, on the same shapes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import torch

import edkm
from benchmarks.measure import kept_bytes, machine, peak_bytes, seconds, write
from edkm.core import cuda, native
from edkm.core.formats import FORMATS
from edkm.core.kmeans import temperature_for
from edkm.core.op import pick_backend, solve
from edkm.core.reference import Problem, importance_in_blocks, in_blocks, table_shape
from edkm.core.theta import initial_theta

LAYERS = {
    "SmolLM2-135M q_proj": (576, 576),
    "SmolLM2-135M up_proj": (1536, 576),
    "2048x2048": (2048, 2048),
    "LLaMA-7B q_proj": (4096, 4096),
    "LLaMA-7B up_proj": (11008, 4096),
}
# Format and softness of what is measured beside the free tables.
FORMATS_MEASURED = (("q4_0", 0.5), ("int8_row", 0.5), ("int8_row", 0.0))
# Dense maps of the largest layers do not fit small machines: reference and coremltools stop at this many weights, and take one table.
DENSE_LIMIT = 1 << 22


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks op", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", nargs="*", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="a python with torch and coremltools")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    check(args.device)
    rows = []
    print(f"{'layer':<22} {'dtype':<9} {'rows/LUT':<9} {'who':<12} {'seconds':>9} {'spread':>8} {'kept':>12} {'peak':>10}")
    for layer in args.layers:
        for dtype in (torch.float32, torch.bfloat16):
            for rows_per_lut in (None, 16, 1):
                for backend in (*_backends(args.device, rows_per_lut is None), "reference"):
                    if backend == "reference" and (rows_per_lut or torch.Size(LAYERS[layer]).numel() > DENSE_LIMIT):
                        continue
                    rows.append(_ours(layer, dtype, rows_per_lut, backend, args))
                    _print(rows[-1])
            for name, softness in FORMATS_MEASURED:
                rows.append(_in_format(layer, dtype, name, softness, args))
                _print(rows[-1])
            if args.peers and torch.Size(LAYERS[layer]).numel() <= DENSE_LIMIT:
                rows.append(_peer(layer, dtype, args))
                _print(rows[-1])
    ratios = _ratios(rows)
    for line in ratios:
        print(line)
    write(
        args.json,
        {
            "benchmark": "op",
            "bits": args.bits,
            "machine": machine(args.device),
            "rows": rows,
            "ratios": ratios,
        },
    )
    return 0


def check(device: str) -> None:
    """Compare every backend with the reference, in float64, output and gradient."""
    for rows_per_lut in (None, 8):
        _check(rows_per_lut, device)


def _check(rows_per_lut: int | None, device: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 96, dtype=torch.float64, device=device) * 0.02
    importance = torch.rand(1, 96, dtype=torch.float64, device=device)
    centroids = edkm.initial_centroids(weight, 3, rows_per_lut=rows_per_lut, importance=importance)
    results = {}
    for backend in ("reference", *_backends(device, rows_per_lut is None)):
        w = weight.clone().requires_grad_()
        out = edkm.cluster(w, centroids, temperature=1e-5, importance=importance, backend=backend).weight
        out.backward(torch.cos(torch.arange(w.numel(), dtype=torch.float64, device=device)).view_as(w))
        results[backend] = out.detach(), w.grad
    for backend in _backends(device, rows_per_lut is None):
        for ours, truth in zip(results[backend], results["reference"], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))


def _backends(device: str, one_table: bool) -> list[str]:
    compiled = "triton" if device == "cuda" and cuda.takes(torch.device(device), 8, 1) else None
    compiled = "native" if native.takes(torch.device(device), 8, 1) else compiled
    return [*(["histogram"] if one_table else []), "blocks", *([compiled] if compiled else [])]


def _ours(layer: str, dtype: torch.dtype, rows_per_lut: int | None, backend: str, args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    rows, cols = LAYERS[layer]
    weight = (torch.randn(rows, cols) * 0.02).to(args.device, dtype).requires_grad_()
    importance = torch.rand(1, cols, device=args.device)
    grad = torch.randn(rows, cols, device=args.device).to(dtype)
    start = edkm.initial_centroids(weight, args.bits, rows_per_lut=rows_per_lut, importance=importance)
    tau = temperature_for(weight, start, importance, 0.5)

    def forward() -> torch.Tensor:
        return edkm.cluster(weight, start, temperature=tau, importance=importance, backend=backend).weight

    def run() -> None:
        weight.grad = None
        forward().backward(grad)

    median, spread = seconds(run, args.device, args.repeats if backend != "reference" else min(args.repeats, 3))
    free = {t.untyped_storage().data_ptr() for t in (weight, importance, tau)}
    return {
        "layer": layer,
        "shape": [rows, cols],
        "dtype": str(dtype).removeprefix("torch."),
        "rows_per_lut": rows_per_lut,
        "who": backend,
        "seconds": median,
        "spread": spread,
        "kept_bytes": kept_bytes(forward, free),
        "peak_bytes": peak_bytes(run, args.device),
    }


def _in_format(layer: str, dtype: torch.dtype, name: str, softness: float, args: argparse.Namespace) -> dict:
    """Measure what a layer in a format does in a step."""
    torch.manual_seed(0)
    rows, cols = LAYERS[layer]
    form = FORMATS[name]
    weight = (torch.randn(rows, cols) * 0.02).to(args.device, dtype)
    importance, grad = torch.rand(1, cols, device=args.device), torch.randn(rows, cols, device=args.device).to(dtype)
    theta = initial_theta(weight, form, importance).reshape(-1, form.p, 1)
    tau, basis = temperature_for(weight, theta, importance, softness, form), form.basis(device=args.device)
    problem = Problem(tau, importance_in_blocks(importance, weight.shape, len(theta)), torch.bfloat16, basis)
    matrix = in_blocks(weight, len(theta))
    backend = pick_backend("auto", matrix, table_shape(theta, basis), torch.bfloat16, shaped=True)[0] if softness else "hard"

    def run() -> None:
        solution = solve(matrix, theta, problem, 3, backend)
        solution.decode(matrix), solution.adjoint(grad.view_as(matrix), matrix)

    median, spread = seconds(run, args.device, args.repeats)
    return {
        "layer": layer,
        "shape": [rows, cols],
        "dtype": str(dtype).removeprefix("torch."),
        "rows_per_lut": None,
        "who": name if softness else f"{name} hard",
        "seconds": median,
        "spread": spread,
        "kept_bytes": 4 * theta.nbytes,  # the trajectory
        "peak_bytes": peak_bytes(run, args.device),
    }


def _peer(layer: str, dtype: torch.dtype, args: argparse.Namespace) -> dict:
    """Compare one table per tensor, coremltools' default."""
    rows, cols = LAYERS[layer]
    name = str(dtype).removeprefix("torch.")
    command = [str(args.peers), "-W", "ignore", str(Path(__file__).with_name("peer_coremltools.py"))]
    command += [str(rows), str(cols), str(args.bits), name, str(min(args.repeats, 3))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"coremltools failed on {layer} {name}:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "layer": layer,
        "shape": [rows, cols],
        "dtype": name,
        "rows_per_lut": None,
        "who": "coremltools",
        **figures,
    }


def _print(row: dict) -> None:
    print(
        f"{row['layer']:<22} {row['dtype']:<9} {row['rows_per_lut'] or 'tensor'!s:<9} {row['who']:<12} {row['seconds']:>9.4f} "
        f"{row['spread']:>8.4f} {row['kept_bytes'] / 1024:>8.1f} KiB {row['peak_bytes'] / 2**20:>6.0f} MiB",
        flush=True,
    )


def _ratios(rows: list[dict]) -> list[str]:
    """Compare every dense implementation with the backend that `auto` takes on a CPU, same layer, dtype and tables."""
    ours = {(r["layer"], r["dtype"], r["rows_per_lut"]): r for r in rows if r["who"] == ("native" if r["rows_per_lut"] else "histogram")}
    lines = []
    for row in rows:
        best = ours.get((row["layer"], row["dtype"], row["rows_per_lut"]))
        if best and row["who"] in ("reference", "coremltools"):
            tables = f"{row['rows_per_lut']} rows/LUT" if row["rows_per_lut"] else "one table"
            lines.append(
                f"{row['layer']}, {row['dtype']}, {tables}: {row['who']} takes {row['seconds'] / best['seconds']:.0f} times the seconds "
                f"of {best['who']} and keeps {row['kept_bytes'] / 2**20:.0f} MiB against {best['kept_bytes']} bytes"
            )
    return lines
