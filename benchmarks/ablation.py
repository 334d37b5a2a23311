"""`python -m benchmarks ablation`: memory that each technique of the eDKM paper saves, on one attention layer of LLaMA-7B.

Four 4096 x 4096 projections (q, k, v, o; `--scale` divides each side), 3 bits, one table per tensor, softness 0.5, dense DKM
(`edkm.core.reference`, float32 maps of bfloat16-rounded weights) and causal attention, without rotary positions. The weights are random.
Rows, cumulative as in the paper (arXiv:2309.00964, ablation):

    base      every saved tensor is copied, as `torch.autograd.graph.save_on_cpu` does
    M         marshaling: one copy per storage
    M+U       maps whose rows are a function of a 16-bit weight become a table and an index
    M+S       and M+U+S: tensors that all learners share are kept 1/learners on each
    histogram `edkm.cluster(backend="histogram")`, which keeps centroids and needs none of the above

Only the clustering (weight to soft weight) is inside the saved-tensors block; activations, live weights and the soft weights that
`F.linear` saves are counted in no row. Learners are processes (gloo, one thread each) with the same weights and different data. On a
CPU `save_on_cpu` copies nothing; there the base is `saved_tensors(marshal=False, uniquify=False)`, whose bytes are checked against a
count of the bytes `save_on_cpu` is asked to save.

**Gradients first.** Gradients of the dense rows must equal, bit for bit on every learner, those of the same layer without any hook;
those of `histogram` may err from a float64 run by at most twice the error of the dense float32 run. No table is printed otherwise.

The ratios differ from the paper's (M 2.9, M+S 23.5, M+U 16.4, M+U+S 130, 8 learners). With T iterations and k centroids the dense
reference saves 4 (T (3k + 2) + k) bytes per weight, 344 at 3 bits and 3 iterations. M is smaller here: only 48 of these are saved
twice. U is larger: all maps of a weight share one index of 2 bytes, and tables of u distinct values hardly grow with the layer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import edkm
from benchmarks.attention import DTYPES, PROJECTIONS, SIDE, Data, Layer, attention, make_data, make_layer, place, soft_weights, truth
from benchmarks.measure import kept_bytes, machine, write
from benchmarks.offload import requested_bytes
from edkm.offload import saved_tensors

# What a row asks of saved_tensors; "shard" is replaced by the process group.
ROWS = {
    "base": {"marshal": False, "uniquify": False},
    "M": {"marshal": True, "uniquify": False},
    "M+U": {"marshal": True, "uniquify": True},
    "M+S": {"marshal": True, "uniquify": False, "shard": True},
    "M+U+S": {"marshal": True, "uniquify": True, "shard": True},
    "histogram": None,
}
# arXiv:2309.00964, ablation: times less memory than the base, on 8 learners.
PAPER = {"base": 1.0, "M": 2.9, "M+S": 23.5, "M+U": 16.4, "M+U+S": 130.0}
HISTOGRAM_ERROR = 2.0


class Step(NamedTuple):
    """Bytes kept at the end of a forward pass, the most at any time, and seconds of forward and backward."""

    kept: int
    peak: int
    seconds: float


def main(argv: list[str]) -> int:
    """Run the benchmark, check the gradients and print a table."""
    args = _parse(argv)
    result = run(args)
    print(_table(result, args.learners))
    write(args.json, result)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ablation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scale", type=int, help=f"divides the side of {SIDE}: 4 unless given, 1 on a GPU")
    parser.add_argument("--learners", type=int, nargs="+", help="processes: 1 2 4 8 unless given, 1 on a GPU")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--iters", type=int, default=3, help="k-means iterations")
    parser.add_argument("--tokens", type=int, default=128, help="of each learner")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    args.scale = args.scale or (1 if on_gpu else 4)
    args.learners = sorted({1, *(args.learners or ([1] if on_gpu else [1, 2, 4, 8]))})
    if SIDE % args.scale:
        parser.error(f"--scale: must divide {SIDE}, got {args.scale}")
    return args


def run(args: argparse.Namespace) -> dict:
    """Measure all rows on all numbers of learners, as the JSON result; raises where gradients differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every learner: sums are cut alike, so that gradients can be equal bit for bit
    try:
        layer = make_layer(args)
        expected = _plain(layer, [make_data(args, learner) for learner in range(max(args.learners))])
        error = _histogram_error(layer, make_data(args, 0))
        counted = requested_bytes(lambda: soft_weights(layer))
        rows = []
        for learners in args.learners:
            rows += _measure(args, layer, learners, counted)
        _check(rows, expected, counted)
        where = machine(args.device)
    finally:
        torch.set_num_threads(threads)
    for row in rows:
        base = next((one for one in rows if one["name"] == "base" and one["learners"] == row["learners"]), None)
        row["ratio"] = counted / row["peak_bytes"]
        row["seconds_ratio"] = row["seconds"] / base["seconds"] if base else None
        row["paper_ratio"] = PAPER.get(row["name"])
        del row["digests"]
    layout = {"scale": args.scale, "side": SIDE // args.scale, "bits": args.bits, "iters": args.iters, "tokens": args.tokens}
    layout |= {"dtype": args.dtype, "repeats": args.repeats}
    gradients = {"dense": "equal bit for bit on every learner to those without hooks", "histogram": error}
    return {"benchmark": "ablation", **layout, "machine": where, "base_bytes": counted, "gradients": gradients, "rows": rows}


def _histogram(layer: Layer) -> list[Tensor]:
    tables = zip(*layer[:3], strict=True)
    return [edkm.cluster(w, c, temperature=t, max_iters=layer.iters, backend="histogram").weight for w, c, t in tables]


def _backward(layer: Layer, soft: list[Tensor], data: Data, again: bool = False) -> None:
    for weight in layer.weights:
        weight.grad = None
    # As within a decoder, where gradients go on to the layers below.
    attention(soft, data.inputs.detach().requires_grad_()).backward(data.grad, retain_graph=again)


def _digests(layer: Layer) -> list[str]:
    """Hash the gradients."""
    return [hashlib.sha256(weight.grad.cpu().view(torch.uint8).numpy().tobytes()).hexdigest() for weight in layer.weights]


def _plain(layer: Layer, data_of_learners: list[Data]) -> list[list[str]]:
    """Hash gradients without any hook, per learner. The soft weights are alike, so one graph serves all."""
    soft, digests = soft_weights(layer), []
    for data in data_of_learners:
        _backward(layer, soft, data, again=True)
        digests.append(_digests(layer))
    return digests


def _histogram_error(layer: Layer, data: Data) -> dict[str, float]:
    """Compute the largest relative gradient errors against float64, of `histogram` and of the dense layer; raises if it is worse."""
    exact_gradients = truth(layer, data)
    errors = {}
    for name, cluster in (("dense", soft_weights), ("histogram", _histogram)):
        _backward(layer, cluster(layer), data)
        pairs = zip(layer.weights, exact_gradients, strict=True)
        errors[name] = max(((weight.grad - exact).norm() / exact.norm()).item() for weight, exact in pairs)
    if not errors["histogram"] <= HISTOGRAM_ERROR * errors["dense"]:
        raise RuntimeError(
            f"histogram: relative error {errors['histogram']:.2e} of the gradients, dense DKM errs by {errors['dense']:.2e}."
        )
    return errors


def _measure(args: argparse.Namespace, layer: Layer, learners: int, counted: int) -> list[dict]:
    """Measure the rows that depend on the number of learners; M, M+U and `histogram` do not."""
    names = ["base", "M", "M+U", "histogram"] if learners == 1 else ["base", "M+S", "M+U+S"]
    if learners > 1 and not _fits(counted * learners, args.device):
        print(f"base on {learners} learners: left out, {counted * learners / 2**30:.1f} GiB would not fit; no ratio of seconds there")
        names.remove("base")
    if learners == 1:
        found = [_rows(args, layer, names, 0, None)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            cpu = Layer(*([tensor.detach().cpu() for tensor in tensors] for tensors in layer[:3]), layer.iters)
            torch.save(tuple(cpu), Path(folder) / "layer.pt")
            torch.multiprocessing.spawn(_learner, (args, names, learners, folder), nprocs=learners)
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(learners)]
    rows = []
    for per_learner in zip(*found, strict=True):
        row = {"name": per_learner[0]["name"], "learners": learners, "digests": [one["digests"] for one in per_learner]}
        # The learner that keeps most, and the one that all others wait for.
        row |= {key: max(one[key] for one in per_learner) for key in ("kept_bytes", "peak_bytes")}
        row["times"] = [max(times) for times in zip(*(one["times"] for one in per_learner), strict=True)]
        row["seconds"] = statistics.median(row["times"])
        rows.append(row)
    return rows


def _fits(needed: int, device: str) -> bool:
    if device == "cuda":
        return False
    return 1.5 * needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _learner(rank: int, args: argparse.Namespace, names: list[str], learners: int, folder: str) -> None:
    """Run one process of a data-parallel run."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", learners)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=learners)
    layer = place(Layer(*torch.load(Path(folder) / "layer.pt")), args.device)
    rows = _rows(args, layer, names, rank, dist.group.WORLD)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _rows(args: argparse.Namespace, layer: Layer, names: list[str], rank: int, group: dist.ProcessGroup | None) -> list[dict]:
    data = make_data(args, rank)
    rows = []
    for name in names:
        steps, digests = [], []
        for _ in range(args.repeats):
            if group is not None:
                dist.barrier(group)
            steps.append(_step(name, layer, data, group))
            digests.append(_digests(layer))
        if any(digest != digests[0] for digest in digests):
            raise RuntimeError(f"{name}: gradients differ between repeats of one step.")
        times = [step.seconds for step in steps]
        row = {"name": name, "kept_bytes": steps[-1].kept, "peak_bytes": steps[-1].peak, "times": times, "digests": digests[0]}
        if name == "histogram":
            free = {weight.untyped_storage().data_ptr() for weight in layer.weights}
            row["kept_bytes"] = row["peak_bytes"] = kept_bytes(lambda: _histogram(layer), free)
        rows.append(row)
    return rows


def _step(name: str, layer: Layer, data: Data, group: dist.ProcessGroup | None) -> Step:
    options, cuda = ROWS[name], layer.weights[0].is_cuda
    if options is None:
        block = nullcontext()
    elif name == "base" and cuda:
        block = torch.autograd.graph.save_on_cpu()
    else:
        block = saved_tensors(**options | ({"shard": group} if "shard" in options else {}))
    began = _now(cuda)
    with block as stats:
        soft = _histogram(layer) if name == "histogram" else soft_weights(layer)
    # torch's own manager counts nothing, and `histogram` is counted apart.
    kept = stats.kept_bytes if stats is not None else 0
    _backward(layer, soft, data)
    return Step(kept, stats.peak_kept_bytes if stats is not None else 0, _now(cuda) - began)


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _check(rows: list[dict], expected: list[list[str]], counted: int) -> None:
    """Require equal dense gradients on every learner, and a base that copies all that it is asked to save."""
    for row in rows:
        where = f"{row['name']} on {row['learners']} learners"
        if row["name"] == "base":
            if row["peak_bytes"] == 0:  # torch's own manager, see `_step`
                row["kept_bytes"] = row["peak_bytes"] = counted
            if not row["kept_bytes"] == row["peak_bytes"] == counted:
                raise RuntimeError(f"{where}: {row['peak_bytes']} bytes kept, {counted} were asked for.")
        if row["name"] == "histogram":  # by its error, see `_histogram_error`
            continue
        for learner, digests in enumerate(row["digests"]):
            differ = [name for name, a, b in zip(PROJECTIONS, digests, expected[learner], strict=True) if a != b]
            if differ:
                raise RuntimeError(f"{where}: gradients of {', '.join(differ)} on learner {learner} differ from those without hooks.")


def _table(result: dict, learners: list[int]) -> str:
    error = result["gradients"]["histogram"]
    lines = [
        f"4 x {result['side']} x {result['side']}, {result['bits']} bits, {result['iters']} iterations, {result['dtype']} weights, "
        f"{result['tokens']} tokens a learner, {result['machine']['device']}",
        f"gradients: dense rows equal bit for bit to those without hooks, on every learner; relative error of histogram "
        f"{error['histogram']:.1e}, of dense {error['dense']:.1e}",
        f"{'row':<8} {'learners':>8} {'MiB kept':>10} {'peak MiB':>10} {'times less':>12} {'paper':>6} {'seconds':>8} {'to base':>8}",
    ]
    for row in result["rows"]:
        paper = f"{row['paper_ratio']:g}" if row["paper_ratio"] and (row["learners"] == 8 or "S" not in row["name"]) else ""
        slower = f"{row['seconds_ratio']:.2f}" if row["seconds_ratio"] else ""
        kept, peak = (_mib(row[key]) for key in ("kept_bytes", "peak_bytes"))
        columns = f"{kept:>10} {peak:>10} {row['ratio']:>12,.1f} {paper:>6} {row['seconds']:>8.2f} {slower:>8}"
        lines.append(f"{row['name']:<8} {row['learners']:>8} {columns}")
    lines.append(f"Per learner, the clustering alone. Seconds: forward and backward, median of {result['repeats']}, one thread a learner.")
    return "\n".join(lines)


def _mib(count: int) -> str:
    """Format MiB with three significant digits."""
    mib = count / 2**20
    return f"{mib:.{max(0, 2 - math.floor(math.log10(mib)))}f}" if mib > 0 else "0"
