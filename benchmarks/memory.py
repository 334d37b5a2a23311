"""`python -m benchmarks memory`: what `plan_memory` says and what training takes, SmolLM2-135M, 1,024 tokens.

`high`, `low` and `lower` are the kinds of `--memory`, in bfloat16 autocast; the other cases are in float32. `1B` is a LLaMA of 16 layers of
2048, 8192 wide, of random weights, with few tokens: what fills the memory are weights, gradients and the optimizer.

Each case runs in processes of its own. Two figures are taken: the growth of the resident memory (its peak in a step, less what was
resident before the model was loaded; every tensor of more than 1 MiB is given back to the system when it is freed), and, where one
process trains float32 weights, the peak of the bytes of all live tensors. `--llama-7b` prints plans instead; nothing is run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker

import edkm
from benchmarks.measure import machine, write
from edkm.memory import Budget, plan_memory
from edkm.memorykinds import KINDS, fits
from edkm.models import load_model
from edkm.train.distributed import share_out
from edkm.train.loop import TrainSettings, enable_checkpointing, micro_loss
from edkm.train.optimizers import BackwardSteps, check_optimizer, make_optimizer
from examples.demo.data import fetch_smollm2

BATCH, BLOCK_TOKENS = 2, 512
CASES = {
    "plain": {},
    "plain, checkpointing": {"checkpointing": True},
    "clustered": {"clustered": True},
    "clustered, checkpointing": {"clustered": True, "checkpointing": True},
    "plain, DDP": {"ranks": 2},
    "clustered, DDP": {"clustered": True, "ranks": 2},
    "plain, FSDP": {"ranks": 2, "fsdp": True},
    "clustered, FSDP": {"clustered": True, "ranks": 2, "fsdp": True},
    "high": {"precision": "bf16"},
    "low": {"precision": "bf16", "memory": "low"},
    "lower": {"precision": "bf16", "memory": "lower"},
    "lower, checkpointing": {"precision": "bf16", "memory": "lower", "checkpointing": True},
    "1B, low": {"precision": "bf16", "memory": "low", "shape": True},
    "1B, lower": {"precision": "bf16", "memory": "lower", "shape": True},
}
# glibc keeps freed memory unless told otherwise, and the resident set would show the past.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "vocab_size": 32000}
SHAPE_BATCH, SHAPE_TOKENS = 1, 64
GPU_BYTES = {"80 GB": 80e9, "24 GB": 24e9}


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--llama-7b", action="store_true", help="plans for LLaMA-7B")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "RANK", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        case, rank, directory = args.measure
        print(json.dumps(_measure(CASES[case], int(rank), Path(directory))))
        return 0
    if args.llama_7b:
        return _llama_7b(args.json)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        plans = _plan_and_save(args.cases, Path(directory))
        print(f"{'MB per process':<26} {'planned':>8} {'resident':>9} {'ratio':>6} {'tensors':>8} {'ratio':>6}")
        for case, budget in plans.items():
            measured = _run(case, directory)
            rows.append({"case": case, "planned": budget.peak, "at_peak": budget.at_peak, **measured})
            compared = [f"{size / 1e6:>8.0f} {budget.peak / size:>6.2f}" for size in measured.values() if size]
            print(f"{case:<26} {budget.peak / 1e6:>8.0f}  {' '.join(compared)}", flush=True)
            write(args.json, {"benchmark": "memory", "batch": BATCH, "block_tokens": BLOCK_TOKENS, "machine": machine("cpu"), "rows": rows})
    return 0


def _plan_and_save(cases: list[str], directory: Path) -> dict[str, Budget]:
    """Plan all cases, and save SmolLM2 plain and prepared, once for all processes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, _ = load_model(fetch_smollm2())
    plans = {}
    for case in cases:
        options = dict(CASES[case])
        config = edkm.ClusterConfig() if options.pop("clustered", False) else None
        ranks, shape = options.pop("ranks", 1), options.pop("shape", False)
        with torch.device("meta"):
            planned = LlamaForCausalLM(LlamaConfig(**LLAMA_1B)) if shape else model
        batch, tokens = (SHAPE_BATCH, SHAPE_TOKENS) if shape else (BATCH, BLOCK_TOKENS)
        plans[case] = plan_memory(planned, config, _settings(options, batch), block_tokens=tokens, ranks=ranks)
    torch.save(model, directory / "plain.pt")
    if any("clustered" in CASES[case] for case in cases):
        importance = edkm.calibrate(model, [_tokens(0)[:1]])
        edkm.prepare(model, edkm.ClusterConfig(), importance=importance)
        torch.save(model, directory / "clustered.pt")
    return plans


def _settings(options: dict, batch: int) -> TrainSettings:
    return TrainSettings(**{"steps": 1, "lr": 1e-5, "batch": batch, "precision": "fp32", **options})


def _load(directory: Path, clustered: bool, shape: bool, dtype: torch.dtype) -> torch.nn.Module:
    """Load a model as a run does, in the dtype that it trains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not shape:
        return torch.load(directory / ("clustered.pt" if clustered else "plain.pt"), weights_only=False, mmap=True).to(dtype)
    torch.set_default_dtype(dtype)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_1B))


def _tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 49152, (BATCH, BLOCK_TOKENS), generator=torch.Generator().manual_seed(seed))


def _run(case: str, directory: str) -> dict[str, int]:
    """Run the processes of a case; return the largest of their figures."""
    ranks = CASES[case].get("ranks", 1)
    Path(directory, "meet").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", case]
    environment = {**os.environ, **ALLOCATOR}
    started = [
        subprocess.Popen([*command, str(rank), directory], env=environment, stdout=subprocess.PIPE, text=True) for rank in range(ranks)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"memory: {case}: a process failed; its error is above.")
    results = [json.loads(text.splitlines()[-1]) for text in printed]
    return {key: max(result[key] for result in results) for key in results[0]}


def _measure(case: dict, rank: int, directory: Path) -> dict[str, int]:
    """Measure the resident memory in a third step, and the bytes of all tensors in a fourth.

    The first makes the optimizer's state; in the second DDP makes its buckets anew, which are resident once a backward pass has written
    them.
    """
    options = dict(case)
    clustered, ranks, shape = options.pop("clustered", False), options.pop("ranks", 1), options.pop("shape", False)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=ranks)
    settings = _settings(options, SHAPE_BATCH if shape else BATCH)
    _warm_up(settings.memory)
    before = _resident("VmRSS")
    model = _load(directory, clustered, shape, torch.float32 if settings.memory == "high" else torch.bfloat16)
    optimizer, step = training(model, _tokens(rank)[:, :SHAPE_TOKENS][:1] % 32000 if shape else _tokens(rank), settings)
    step()
    if not shape:
        step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    resident = _resident("VmHWM") - before
    # Trackers do not see into torchao's compiled step.
    tensors = 0 if ranks > 1 or settings.memory != "high" else peak_of_tensors(model, optimizer, step)
    if ranks > 1:
        torch.distributed.destroy_process_group()
    return {"resident": resident, "tensors": tensors}


def training(model, tokens, settings, optimizer=None):
    """Return the optimizer of a model, prepared or not, and a function that makes a step, both as `edkm compress` has them."""
    if settings.checkpointing:
        enable_checkpointing(model)
    wrapped = share_out(model.train(), "cpu", settings.fsdp)
    optimizer = optimizer or make_optimizer(settings.optimizer, model.parameters(), settings.lr, settings.memory)
    hooks = []

    def step() -> None:
        loss = micro_loss(wrapped, {"input_ids": tokens, "labels": tokens}, tokens.numel(), tokens.numel(), settings)
        if settings.memory == "lower" and not hooks:
            hooks.append(BackwardSteps(optimizer))
        loss.backward()
        if hooks:
            hooks[0].norm()
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step


def peak_of_tensors(model, optimizer, step) -> int:
    """Measure the peak of the bytes of all live tensors in a step; one was made before."""
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())


def _warm_up(memory: str) -> None:
    """Load all code that a step needs: it is resident, but it is not the model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 49152}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    edkm.prepare(model, edkm.ClusterConfig(embedding_bits=0))
    settings = _settings({} if memory == "high" else {"memory": memory, "precision": "bf16"}, 1)
    check_optimizer(settings.optimizer, memory, "cpu")
    model.to(torch.float32 if memory == "high" else torch.bfloat16)
    training(model, torch.zeros(1, 64, dtype=torch.int64), settings)[1]()
    gc.collect()


def _resident(which: str) -> int:
    """Read `VmRSS` or its peak `VmHWM`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) * 1024


def _llama_7b(out: Path | None) -> int:
    """Plan 2,048 tokens a GPU, 3 bits, gradient checkpointing, bfloat16 autocast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    rows = []
    cases = [(f"1 GPU, {kind}", 1, kind) for kind in KINDS] + [("8 GPUs, FSDP, high", 8, "high")]
    for name, ranks, kind in cases:
        settings = TrainSettings(steps=1, lr=1e-4, batch=1, checkpointing=True, precision="bf16", fsdp=ranks > 1, memory=kind)
        budget = plan_memory(model, edkm.ClusterConfig(bits=3), settings, block_tokens=2048, ranks=ranks, device_type="cuda")
        fitting = {gpu: fits(budget.peak, int(size)) for gpu, size in GPU_BYTES.items()}
        verdict = ", ".join(f"{gpu}: {'fits' if yes else 'does not fit'}" for gpu, yes in fitting.items())
        print(f"\n{name}: {verdict}, with a tenth to spare\n{budget}", flush=True)
        rows.append({"case": name, "peak": budget.peak, **asdict(budget), "fits": fitting})
    write(out, {"benchmark": "memory, LLaMA-7B", "block_tokens": 2048, "gpu_bytes": GPU_BYTES, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
