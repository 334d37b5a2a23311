"""`python -m benchmarks packed`: a linear layer from packed weights, beside dense bfloat16 and float32 and bitsandbytes' NF4.

As many copies of a layer as exceed the caches run in turn, as the layers of a model do; all contestants run once a round, so that they
see the same disturbances of a shared machine. `least` is the mean over copies of a copy's least time in any round, which other work on the
machine touches little, as long as a call is shorter than a slice of its scheduler; the median is that of all calls. Ratios are to dense
bfloat16. First the kernels are compared with unpacked weights in float64: no figure is printed for one that computes something else.
Tables are float16, one per row (one in all at 8 bits); formats are those of `--formats`; activations bfloat16, float32 for the dense
float32 layer. `--flags=-mno-avx512f` builds the kernels without AVX-512.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import machine, write
from edkm.compressed import cpu
from edkm.compressed.entries import Entry
from edkm.compressed.formatweight import weight_of
from edkm.compressed.linear import PackedWeight, multiply
from edkm.compressed.packing import pack_indices, packed_bytes
from edkm.core import native
from edkm.core.formats import FORMATS

LAYERS = {  # rows, cols
    "2048x2048": (2048, 2048),
    "SmolLM2-135M q_proj": (576, 576),
    "SmolLM2-135M up_proj": (1536, 576),
    "SmolLM2-135M lm_head": (49152, 576),
    "LLaMA-7B q_proj": (4096, 4096),
    "LLaMA-7B down_proj": (4096, 11008),
}
# Bytes in bfloat16 of the copies that run in turn: 24 of 2048 x 2048.
TURN_BYTES = 24 * 2048 * 2048 * 2
Copies = list[Callable[[Tensor], object]]  # of one layer


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks packed", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--layers", nargs="*", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--bits", type=int, nargs="*", default=[1, 2, 3, 4, 8])
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=["int8_row", "q4_0"])
    parser.add_argument("--flags", default="", help="of the compiler, besides its own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-nf4", action="store_true", help="leave bitsandbytes out: without AVX512-BF16 it unpacks at every call")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.flags:
        library = native.library(cpu._SOURCE, *cpu._FLAGS, *args.flags.split())
        assert library is not None
        built = cpu.declare(library)
        cpu._library = lambda: built
    check()
    before = torch.get_num_threads()
    with torch.inference_mode():
        rows = [row for layer in args.layers for row in _layer(layer, args)]
    torch.set_num_threads(before)
    write(args.json, {"benchmark": "packed", "rounds": args.rounds, "flags": args.flags, "machine": machine("cpu"), "layers": rows})
    return 0


def check() -> None:
    """Compare every width and format with the unpacked weight in float64: at most twice the error of torch's float32 product."""
    torch.manual_seed(0)
    shapes = [(bits, shape) for bits in range(1, 9) for shape in ((64, 576, 64), (36, 1000, 1))]
    weights = {f"{bits} bits": _random(rows, cols, bits, luts) for bits, (rows, cols, luts) in shapes}
    for name, packed in (weights | {name: _random_blocks(64, 512, name) for name in FORMATS}).items():
        weight = packed.dense(torch.float32)
        for batch in (1, 3, 16, 64):
            x = torch.randn(batch, packed.cols)
            truth = x.double() @ weight.double().T
            ours, plain = ((y - truth).abs().max() for y in (multiply(x, packed), linear(x, weight)))
            if ours > 2 * plain + 1e-6:
                raise SystemExit(f"{name}, {packed.rows} x {packed.cols}, batch {batch}: error {ours:.3g}, torch's {plain:.3g}.")


def _random(rows: int, cols: int, bits: int, luts: int) -> PackedWeight:
    """Make a packed weight of random bits: any bits are indices."""
    packed = torch.randint(0, 256, (packed_bytes(rows * cols, bits),), dtype=torch.uint8)
    if used := rows * cols * bits % 8:
        packed[-1] &= (1 << used) - 1
    return PackedWeight(packed, (torch.randn(luts, 1 << bits, 1) * 0.02).half(), Entry(bits, (rows, cols), 1, luts, 0.0, rows))


def _random_blocks(rows: int, cols: int, name: str) -> PackedWeight:
    """Make a packed weight in a format of random indices, with the scales of weights of a size of 0.02."""
    form = FORMATS[name]
    indices = torch.randint(0, len(form.values), (rows, cols), dtype=torch.uint8)
    scale = torch.full((rows, cols // form.width(cols)), 0.04 / (form.values[-1] - form.values[0]))
    theta = torch.stack([-0.02 - scale * form.values[0], scale], -1)[..., -form.p :]
    entry = Entry(form.bits, (rows, cols), 1, 1, 0.0, rows, name)
    parts, layout = form.store(theta), entry.layout
    stored = {part: pack_indices(tensor, layout[part].bits) if layout[part].bits else tensor for part, tensor in parts.items()}
    return weight_of(pack_indices(indices, form.bits), {part: tensor.contiguous() for part, tensor in stored.items()}, entry)


def _layer(name: str, args: argparse.Namespace) -> list[dict]:
    rows, cols = LAYERS[name]
    copies = max(1, TURN_BYTES // (2 * rows * cols))
    contestants = _contestants(rows, cols, copies, args)
    found = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batch:
            times = _in_turn(contestants, torch.randn(batch, cols).bfloat16(), args.rounds)
            least = {who: float(taken.amin(0).mean()) for who, taken in times.items()}
            median = {who: float(taken.median()) for who, taken in times.items()}
            print(f"{name}, batch {batch}, {threads} threads, {copies} copies")
            for who in times:
                row = {"layer": name, "batch": batch, "threads": threads, "who": who, "least_ms": least[who], "median_ms": median[who]}
                row |= {"faster_by_least": least["bfloat16"] / least[who], "faster_by_median": median["bfloat16"] / median[who]}
                found.append(row)
                by = f"{row['faster_by_least']:>6.2f} times bfloat16 ({row['faster_by_median']:.2f} by median)"
                print(f"  {who:<10}{by:<42}least {least[who]:>8.3f} ms   median {median[who]:>8.3f} ms", flush=True)
    return found


def _in_turn(contestants: dict[str, Copies], x: Tensor, rounds: int) -> dict[str, Tensor]:
    """Measure milliseconds of every call, `[rounds, copies]`; one more round warms up."""
    times = {who: [] for who in contestants}
    for _ in range(rounds + 1):
        for who, copies in contestants.items():
            given = x.float() if who == "float32" else x
            marks = [time.perf_counter()]
            for call in copies:
                call(given)
                marks.append(time.perf_counter())
            times[who].append(marks)
    return {who: 1e3 * torch.tensor(marks[1:], dtype=torch.float64).diff() for who, marks in times.items()}


def _contestants(rows: int, cols: int, copies: int, args: argparse.Namespace) -> dict[str, Copies]:
    dense = [torch.randn(rows, cols) * 0.02 for _ in range(copies)]
    found: dict[str, Copies] = {
        "bfloat16": [partial(linear, weight=weight.bfloat16()) for weight in dense],
        "float32": [partial(linear, weight=weight) for weight in dense],
    }
    if importlib.util.find_spec("bitsandbytes") and not args.no_nf4:
        found["NF4"] = _nf4(dense[0].bfloat16(), copies)
    for bits in args.bits:
        found[f"{bits} bits"] = [_ours(_random(rows, cols, bits, 1 if bits == 8 else rows)) for _ in range(copies)]
    for name in args.formats:
        if cols % FORMATS[name].divisor == 0:
            found[name] = [_ours(_random_blocks(rows, cols, name)) for _ in range(copies)]
    return found


def _ours(packed: PackedWeight) -> Callable[[Tensor], Tensor]:
    return lambda x: multiply(x, packed)


def _nf4(weight: Tensor, copies: int) -> Copies:
    import bitsandbytes

    rows, cols = weight.shape
    layer = bitsandbytes.nn.Linear4bit(cols, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").eval()
    return [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
