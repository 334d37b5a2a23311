"""Quantize a causal language model with llmcompressor (GPTQ, AWQ, SmoothQuant); `benchmarks compare` runs this in `.venv-baselines`.

Weights of linear layers become `bits`-bit asymmetric groups, activations stay as they are. What is written is dense: every parameter of
the model under its own name, quantized weights at their quantized values with the scale in float16, as it would be stored.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_range
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

METHODS = ("gptq", "awq", "smoothquant")
# AWQ looks for one exponent a layer and runs it 20 times over for that: it takes every so many of the blocks, or it would take an hour.
AWQ_STRIDE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--model", type=Path, required=True, help="an ordinary checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="safetensors with input_ids [blocks, tokens]")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="columns that share a scale")
    parser.add_argument("--skip", nargs="*", default=[], help="linear layers left alone")
    parser.add_argument("--out", type=Path, required=True, help="weights.safetensors and figures.json go there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        # Pinning needs an accelerator; without one AWQ fails there.
        IntermediatesCache.pin_memory = lambda self, *rest, **named: None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    ids = load_file(args.calibration)["input_ids"][:: AWQ_STRIDE if args.method == "awq" else 1]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=DataLoader(batches, batch_size=1),
        num_calibration_samples=len(batches),
        recipe=recipe(args.method, args.bits, args.group, args.skip),
    )
    quantized = store(model)
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    figures = {
        "seconds": time.perf_counter() - began,
        "blocks": len(ids),
        "quantized": quantized,
        "peak_mib": peak_mib(),
        "peak_gpu_mib": gpu,
    }
    weights = dict(model.named_parameters())
    save_file({name: weights[name].detach().contiguous().cpu() for name in names}, args.out / "weights.safetensors")
    (args.out / "figures.json").write_text(json.dumps(figures))


def recipe(method: str, bits: int, group: int, skip: list[str]) -> list:
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group)
    quantize = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": skip}
    if method == "gptq":
        return [GPTQModifier(**quantize)]
    first = AWQModifier() if method == "awq" else SmoothQuantModifier()
    return [first, QuantizationModifier(**quantize)]


@torch.no_grad()
def store(model: torch.nn.Module) -> list[str]:
    """Put every quantized weight on its grid, in place; llmcompressor leaves that to its own file format. Returns their names."""
    found = []
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        arguments = scheme.weights
        assert arguments.strategy == QuantizationStrategy.GROUP, arguments.strategy
        low, high = calculate_range(arguments, torch.device("cpu"))
        groups = module.weight.unflatten(1, (-1, arguments.group_size))  # [rows, groups, group]
        scale, zero = module.weight_scale.unsqueeze(-1), module.weight_zero_point.unsqueeze(-1).float()
        codes = (groups / scale + zero).round().clamp(low, high)
        module.weight.copy_(((codes - zero) * scale.half().float()).flatten(1))
        found.append(f"{name}.weight")
    return found


def peak_mib() -> float:
    """Read the largest resident set of this process. Not `ru_maxrss`, which a process inherits from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


main()
