"""Run one layer through coremltools' DKMPalettizer; `benchmarks op` runs this in a separate environment. Prints one line of JSON."""

import json
import sys
from pathlib import Path

import torch
from coremltools.optimize.torch.palettization import (
    DKMPalettizer,
    DKMPalettizerConfig,
    ModuleDKMPalettizerConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import kept_bytes, peak_bytes, seconds


def main() -> None:
    """Read `rows cols bits dtype repeats` from the command line, measure and print."""
    rows, cols, bits, repeats = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[5])
    dtype = getattr(torch, sys.argv[4])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(cols, rows, bias=False))
    model[0].weight.data.mul_(0.02 / model[0].weight.std())
    model = model.to(dtype)
    module = ModuleDKMPalettizerConfig(n_bits=bits, cluster_dim=1, weight_threshold=0, kmeans_init="opt1d")
    palettizer = DKMPalettizer(model, DKMPalettizerConfig(global_config=module))
    model = palettizer.prepare()
    x = torch.randn(1, cols, dtype=dtype)
    model.train()
    palettizer.step()
    weight = next(p for p in model.parameters() if p.numel() == rows * cols)

    def forward() -> torch.Tensor:
        return model(x)

    def run() -> None:
        weight.grad = None
        forward().sum().backward()

    median, spread = seconds(run, "cpu", repeats)
    free = {weight.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    kept = kept_bytes(forward, free)
    print(json.dumps({"seconds": median, "spread": spread, "kept_bytes": kept, "peak_bytes": peak_bytes(run, "cpu")}))


main()
