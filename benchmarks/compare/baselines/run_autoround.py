"""Quantize a causal language model with Intel's AutoRound; `benchmarks compare` runs this in `.venv-baselines`.

Weights of linear layers become `bits`-bit asymmetric groups, activations stay as they are. A layer at a time, signed gradients change
which way each weight is rounded and where each group ends, until the output of the layer is closest to that of the original. What is
written are the quantized weights, at their quantized values with the scale in float16, as it would be stored; nothing else changes.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from auto_round import AutoRound
from dense_weights import arguments, load, on_grid, write
from transformers import AutoTokenizer

# Blocks of an iteration, its default.
BATCH = 8


def main() -> None:
    parser = arguments(__doc__, ["autoround"])
    parser.add_argument("--iters", type=int, default=200, help="iterations of each layer, at least 1 (200, its default)")
    parser.add_argument("--blocks", type=int, help="calibrate on so many of the blocks, evenly spaced (all)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="its default, where the hardware has it, is bf16")
    args = parser.parse_args()
    model, ids = load(args)
    if args.blocks:
        ids = ids[:: max(1, len(ids) // args.blocks)][: args.blocks]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # It would take every token that pads, often also the one that ends a text, out of its loss. No block here is padded.
    tokenizer.pad_token = None
    began = time.perf_counter()
    rounding = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group,
        sym=False,
        iters=args.iters,
        dataset=[{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.unsqueeze(1)],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=BATCH,
        amp=args.precision == "bf16",
        ignore_layers=",".join(args.skip),
        # It would save a fifth of the time, and needs a compiler.
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
    )
    weights = stored(rounding.quantize()[0], args.bits)
    figures = {"blocks": len(ids), "iterations": args.iters, "batch": min(BATCH, len(ids)), "precision": args.precision}
    write(args.out, weights, list(weights), began, **figures, version=version("auto-round"))


@torch.no_grad()
def stored(model: Any, bits: int) -> dict[str, torch.Tensor]:
    """Return every quantized weight on its grid; the model has it rounded to the precision that was computed in."""
    quantized = {name: module for name, module in model.named_modules() if getattr(module, "scale", None) is not None}
    for name, module in quantized.items():
        assert module.bits == bits, f"{name}: {module.bits} bits, expected {bits}"
    return {f"{name}.weight": on_grid(m.weight.cpu(), m.scale.cpu(), m.zp.cpu(), bits) for name, m in quantized.items()}


main()
