"""`python -m benchmarks step-gpu`: a training step of one decoder layer of LLaMA-7B on a GPU, plain and clustered.

bfloat16, random weights, 3 bits, one iteration; forward, backward and a step of AdamW, on blocks of 2,048 tokens. Plain and clustered steps
alternate, the ratio is that of the medians. First a step with the Triton kernels is compared with one of `blocks` on a small layer:
`--device cpu` does that alone, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import edkm
from benchmarks.measure import machine, write

BLOCK = 2048
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
BITS = 3


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step-gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 16384], help="a step's")
    parser.add_argument("--rows-per-lut", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    print(f"a small layer, a step with triton and with blocks: they differ by {check(args.device):.1e}", flush=True)
    if args.device == "cpu":
        return 0
    rows = [
        row
        for rows_per_lut in args.rows_per_lut
        for tokens in args.tokens
        for row in compare(rows_per_lut, tokens, args.rounds, args.device)
    ]
    write(args.json, {"benchmark": "step-gpu", "layer": LLAMA_7B, "bits": BITS, "machine": machine("cuda"), "rows": rows})
    return 0


def check(device: str) -> float:
    """Compare a step of a small layer in float32 with the Triton kernels and with `blocks`: the relative difference of the gradients."""
    found = []
    for backend in ("triton", "blocks"):
        model = layer(SMALL, backend, 4, device, torch.float32)
        step(model, tokens(8, device))
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    difference = float((found[0] - found[1]).norm() / found[1].norm())
    if not difference < 1e-4:
        raise SystemExit(f"triton and blocks differ by {difference:.3g}.")
    return difference


def layer(shape: dict[str, int], backend: str | None, rows_per_lut: int, device: str, dtype: torch.dtype) -> nn.Module:
    """Make a decoder layer between an embedding of few words and a norm, clustered unless `backend` is None."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_hidden_layers=1, vocab_size=64)
    with torch.device(device):
        model = LlamaModel(config).to(dtype).train()
    if backend is not None:
        # The quantiles of the weights' own distribution, for all tables: k-means of so many takes minutes.
        start = torch.special.ndtri((torch.arange(1 << BITS, device=device) + 0.5) / (1 << BITS)) * config.initializer_range
        weights = {name: weight for name, weight in model.named_parameters() if name.endswith("proj.weight")}
        centroids = {name: start.view(1, -1, 1).repeat(len(weight) // rows_per_lut, 1, 1) for name, weight in weights.items()}
        importance = {name: torch.rand(1, weight.shape[1], device=device) for name, weight in weights.items()}
        settings = edkm.ClusterConfig(bits=BITS, rows_per_lut=rows_per_lut, embedding_bits=0)
        edkm.prepare(model, settings, importance=importance, centroids=centroids, backend=backend)
    return model


def tokens(count: int, device: str) -> Tensor:
    """Make `count` random tokens, in blocks of 2,048."""
    return torch.randint(
        0, 64, (max(1, count // BLOCK), min(count, BLOCK)), device=device, generator=torch.Generator(device).manual_seed(0)
    )


def step(model: nn.Module, ids: Tensor) -> None:
    """Run forward and backward."""
    model(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean().backward()


def compare(rows_per_lut: int, count: int, rounds: int, device: str) -> list[dict]:
    """Time steps on `count` tokens, plain and with each backend in turn."""
    ids = tokens(count, device)
    backends = {"plain": None, "triton": "triton", "blocks": "blocks"}
    steps = {who: _stepper(layer(LLAMA_7B, backend, rows_per_lut, device, torch.bfloat16), ids) for who, backend in backends.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(rounds + 2):  # the first two compile, and make the optimizer's state
        for who, run in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[who].append(begin.elapsed_time(end))
    medians = {who: statistics.median(taken[2:]) for who, taken in times.items()}
    for who, median in medians.items():
        ratio = median / medians["plain"]
        print(f"{count:,} tokens, {rows_per_lut} rows per table: {who:<7} {median:9.2f} ms, {ratio:5.2f} times plain", flush=True)
    return [{"tokens": count, "rows_per_lut": rows_per_lut, "who": who, "ms": times[who][2:]} for who in medians]


def _stepper(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        step(model, ids)
        optimizer.step()
        optimizer.zero_grad()

    return run
