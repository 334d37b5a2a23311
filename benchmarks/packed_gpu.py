"""`python -m benchmarks packed-gpu`: the Triton kernels for packed layers, beside dense bfloat16 and bitsandbytes' NF4, on a GPU.

As many copies of a layer as exceed the second cache run in turn, captured in one CUDA graph, so that neither launches nor Python are
timed; contestants alternate, the ratio is that of the medians. First the kernels are compared with the decoded weight: `--device cpu` does
that alone, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import machine, write
from edkm.compressed.packing import packed_bytes, unpack_indices
from edkm.core.assign import lookup

LAYERS = {"4096x4096": (4096, 4096), "14336x4096": (14336, 4096), "4096x14336": (4096, 14336)}  # LLaMA-3-8B: q_proj, up_proj, down_proj
TURN_BYTES = 256 << 20  # packed


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks packed-gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    check(args.device)
    if args.device == "cpu":
        return 0
    rows = [row for name in LAYERS for batch in args.batch for row in _layer(name, batch, args)]
    write(args.json, {"benchmark": "packed-gpu", "rounds": args.rounds, "machine": machine("cuda"), "rows": rows})
    return 0


def check(device: str) -> None:
    """Compare every width with the decoded weight in float64: at most twice the error of torch's product."""
    for bits in (1, 2, 3, 4, 5, 8):
        packed, lut = _random(48, 96, bits, device)
        weight = lookup(unpack_indices(packed, bits, 48 * 96).view(48, 96), lut)
        # Triton's interpreter multiplies the bits of bfloat16 matrices as if they were numbers.
        for batch, dtype in itertools.product((1, 4, 16, 64), (torch.float32, torch.bfloat16)[: 2 if device == "cuda" else 1]):
            x = torch.randn(batch, 96, device=device, dtype=dtype)
            truth = x.double() @ weight.double().T
            ours, plain = ((y - truth).abs().max() for y in (_product(x, packed, lut, bits, 48, 96), linear(x, weight.to(dtype))))
            if ours > 2 * plain + 1e-5:
                raise SystemExit(f"{bits} bits, batch {batch}, {dtype}: error {ours:.3g}, torch's {plain:.3g}.")


def _product(*arguments) -> Tensor:
    from edkm.compressed import gpu  # Triton is not everywhere

    return gpu.multiply(*arguments)


def _random(rows: int, cols: int, bits: int, device: str) -> tuple[Tensor, Tensor]:
    """Make a packed weight of random bits: any bits are indices; a table per row (one in all at 8 bits)."""
    packed = torch.randint(0, 256, (packed_bytes(rows * cols, bits),), dtype=torch.uint8, device=device)
    return packed, (torch.randn(1 if bits == 8 else rows, 1 << bits, 1, device=device) * 0.02).half()


def _layer(name: str, batch: int, args: argparse.Namespace) -> list[dict]:
    rows, cols = LAYERS[name]
    copies = max(2, TURN_BYTES // (rows * cols // 4))
    x = torch.randn(batch, cols, device="cuda", dtype=torch.bfloat16)
    dense = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    runs = {"bfloat16": _graph([lambda w=w: linear(x, w) for w in dense])}
    if importlib.util.find_spec("bitsandbytes"):
        runs["NF4"] = _graph(_nf4(dense, x))
    for bits in args.bits:
        runs[f"{bits} bits"] = _graph([_call(x, *_random(rows, cols, bits, "cuda"), bits, rows, cols) for _ in range(copies)])
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(args.rounds + 1):
        for who, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[who].append(begin.elapsed_time(end) / copies * 1e3)
    medians = {who: statistics.median(taken[1:]) for who, taken in times.items()}
    found = []
    for who, median in medians.items():
        ratio = medians["bfloat16"] / median
        found.append({"layer": name, "batch": batch, "who": who, "median_us": median, "faster": ratio})
        print(f"{name}, batch {batch}: {who:<9} {median:8.1f} us, {ratio:5.2f} times bfloat16", flush=True)
    return found


def _call(x: Tensor, packed: Tensor, lut: Tensor, bits: int, rows: int, cols: int) -> Callable[[], Tensor]:
    return lambda: _product(x, packed, lut, bits, rows, cols)


def _nf4(dense: list[Tensor], x: Tensor) -> list[Callable[[], Tensor]]:
    import bitsandbytes

    calls = []
    for weight in dense:
        layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        layer = layer.cuda().eval()
        calls.append(lambda layer=layer: layer(x))
    return calls


@torch.inference_mode()
def _graph(calls: list[Callable[[], Tensor]]) -> Callable[[], None]:
    """Capture all calls as one CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    # The graph knows addresses: what the calls hold must stay where it is.
    return lambda kept=(graph, calls): kept[0].replay()
