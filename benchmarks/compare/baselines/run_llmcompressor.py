"""Quantize a causal language model with llmcompressor (GPTQ, AWQ, SmoothQuant); `benchmarks compare` runs this in `.venv-baselines`.

Weights of linear layers become `bits`-bit asymmetric groups, activations stay as they are. What is written is dense: every parameter of
the model under its own name, quantized weights at their quantized values with the scale in float16, as it would be stored.
"""

from __future__ import annotations

import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_range
from dense_weights import arguments, load, on_grid, write
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader

METHODS = ("gptq", "awq", "smoothquant")
# AWQ looks for one exponent a layer and runs it 20 times over for that: it takes every so many of the blocks, or it would take an hour.
AWQ_STRIDE = 4


def main() -> None:
    args = arguments(__doc__, METHODS).parse_args()
    if not torch.cuda.is_available():
        # Pinning needs an accelerator; without one AWQ fails there.
        IntermediatesCache.pin_memory = lambda self, *rest, **named: None
    model, ids = load(args)
    names = [name for name, _ in model.named_parameters()]
    ids = ids[:: AWQ_STRIDE if args.method == "awq" else 1]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=DataLoader(batches, batch_size=1),
        num_calibration_samples=len(batches),
        recipe=recipe(args.method, args.bits, args.group, args.skip),
    )
    quantized = store(model)
    weights = dict(model.named_parameters())
    write(args.out, {name: weights[name] for name in names}, quantized, began, blocks=len(ids))


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
        low, _ = calculate_range(arguments, torch.device("cpu"))
        zero = module.weight_zero_point.float() - low  # its codes are signed
        module.weight.copy_(on_grid(module.weight, module.weight_scale, zero, arguments.num_bits))
        found.append(f"{name}.weight")
    return found


main()
