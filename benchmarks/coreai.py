"""`python -m benchmarks coreai`: a training step of one linear layer that coreai-opt has prepared, with our strategy and with its own.

Forward, backward and an SGD step, the variants in turn in the same process; ratios are those of the medians to the plain layer.
coreai-opt's own strategy gives the weight no gradient: it looks up frozen indices, and saves a matrix product that the others do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import edkm
from benchmarks.measure import kept_bytes, machine, write


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks coreai", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the weight")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    layer, x = nn.Linear(args.size, args.size, bias=False), torch.randn(args.tokens, args.size).requires_grad_()
    models = _models(layer, x.detach(), args.bits)
    steps = {name: _stepper(model, x) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat:
                times[name].append(time.perf_counter() - began)
    plain, rows = statistics.median(times["plain"]), []
    for name, model in models.items():
        weight = next(model.parameters())
        kept = kept_bytes(lambda model=model: model(x), {t.untyped_storage().data_ptr() for t in (weight, x)})
        median = statistics.median(times[name])
        rows.append({"name": name, "seconds": times[name], "ratio": median / plain, "kept_bytes": kept})
        print(
            f"{name:<52} {median / plain:6.2f} x plain  {median:7.3f} s  kept for backward beside weight and input {kept / 2**20:7.2f} MiB"
        )
    write(args.json, {"benchmark": "coreai", "settings": vars(args) | {"json": None}, "machine": machine("cpu"), "rows": rows})
    return 0


def _models(layer: nn.Linear, x: Tensor, bits: int) -> dict[str, nn.Module]:
    """Prepare the same layer in every way."""
    from coreai_opt.palettization.spec import DefaultTrainingSpec, PerGroupedChannelGranularity, PerTensorGranularity

    from edkm.coreai import EdkmTrainingSpec

    one, many = PerTensorGranularity(), PerGroupedChannelGranularity(axis=0, group_size=16)
    models: dict[str, nn.Module] = {"plain": nn.Sequential(copy.deepcopy(layer))}
    for what, granularity in (("one table", one), ("16 rows per table", many)):
        for name, strategy in (("coreai-opt's own (weight frozen)", DefaultTrainingSpec()), ("edkm strategy", EdkmTrainingSpec())):
            models[f"{name}, {what}"] = _prepared(nn.Sequential(copy.deepcopy(layer)), x[:1], bits, granularity, strategy)
        own = nn.Sequential(copy.deepcopy(layer))
        edkm.prepare(own, edkm.ClusterConfig(bits=bits, rows_per_lut=getattr(granularity, "group_size", 0)))
        models[f"edkm's own layer, {what}"] = own
    return {name: model.train() for name, model in models.items()}


def _prepared(model: nn.Module, x: Tensor, bits: int, granularity, strategy) -> nn.Module:
    from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig, PalettizationSpec

    spec = PalettizationSpec(n_bits=bits, granularity=granularity, training_strategy_spec=strategy)
    config = KMeansPalettizerConfig(global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KMeansPalettizer(model, config).prepare((x,))


def _stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step
