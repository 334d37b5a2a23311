"""`python -m benchmarks generation`: tokens a second of whole models, packed at 3 bits, beside dense bfloat16 and bitsandbytes' NF4.

Random weights in the shapes of real models: speed does not depend on what they are. One sequence is decoded greedily with a key-value
cache, as `generate` does it; contestants alternate, so that they see the same disturbances of a shared machine. NF4 is in the linear layers
alone, as bitsandbytes has it: its embedding and output layer stay in bfloat16, while those of the packed model have 8 bits.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import machine, write
from edkm.compressed.entries import Entry
from edkm.compressed.modules import PackedModule, pack_module, tie_module
from edkm.compressed.siblings import link

MODELS = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks generation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--prompt", type=int, default=16, help="tokens before those that are decoded (16)")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in a round (16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rows = [row for name in args.models for row in _model(name, args)]
    write(
        args.json, {"benchmark": "generation", "prompt": args.prompt, "tokens": args.tokens, "machine": machine(args.device), "rows": rows}
    )
    return 0


def _model(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    contestants = {"bfloat16": _dense(name, args.device)}
    if importlib.util.find_spec("bitsandbytes"):
        contestants["NF4"] = _nf4(_dense(name, args.device), args.device)
    for dtype in (torch.bfloat16, torch.float32):
        contestants[f"{args.bits} bits, {str(dtype).removeprefix('torch.')}"] = _packed(name, args.bits, dtype, args.device)
    gc.collect()
    rates: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(args.rounds + 1):
        for who, model in contestants.items():
            rates[who].append(_rate(model, args.prompt, args.tokens))
    rows = []
    for who, model in contestants.items():
        size = sum(t.numel() * t.itemsize for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
        rate = statistics.median(rates[who][1:])
        ratio = rate / statistics.median(rates["bfloat16"][1:])
        rows.append({"model": name, "who": who, "bytes": size, "tokens_per_second": rates[who][1:], "ratio": ratio})
        print(f"{name}: {who:<18} {rate:6.2f} tokens/s, {ratio:5.2f} times bfloat16, {size / 1e6:7.1f} MB", flush=True)
    return rows


@torch.no_grad()
def _rate(model: Any, prompt: int, tokens: int) -> float:
    """Measure tokens a second after the prompt."""
    device = model.model.norm.weight.device
    out = model(torch.arange(prompt, device=device).view(1, -1), use_cache=True)
    began = 0.0
    for step in range(tokens + 1):
        if step == 1:  # the first is a warm-up
            began = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        out.logits[0, -1, 0].item()
    return tokens / (time.perf_counter() - began)


def _empty(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**MODELS[name], tie_word_embeddings=True)).eval()


def _materialise(model: Any, dtype: torch.dtype, device: str) -> Any:
    """Make memory and numbers for the parameters that are on no device yet."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[name] = nn.Parameter(
                    torch.empty_like(p, device=device, dtype=dtype).normal_(std=0.02), requires_grad=False
                )
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model


def _dense(name: str, device: str) -> Any:
    model = _empty(name)
    model.lm_head.weight = model.model.embed_tokens.weight
    model = _materialise(model, torch.bfloat16, device)
    model.tie_weights()
    return model


def _nf4(model: Any, device: str) -> Any:
    import bitsandbytes

    for layer in model.model.layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                made = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                made.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                layer.set_submodule(path, made.to(device).eval())
    return model


def _packed(name: str, bits: int, dtype: torch.dtype, device: str) -> Any:
    """Make packed weights of random bits: any bits are indices."""
    model = _empty(name)
    embedding, head = model.model.embed_tokens, model.lm_head
    for module in [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]:
        rows, cols = module.weight.shape
        embeds = module in (embedding, head)
        entry = Entry(8, (rows, cols), 1, rows, 0.0, rows, "int8_row") if embeds else Entry(bits, (rows, cols), 1, rows, 0.0, rows)
        pack_module(module, "weight", entry, 1 << bits, dtype, device)
        assert isinstance(module, PackedModule)
        module._parameters["weight"].random_(0, 256)  # pyright: ignore
        if embeds:
            module.weight_scale.fill_(0.02 / 64)
            module.weight_zero.fill_(128)
        else:
            module.weight_lut.normal_(std=0.02)
    tie_module(head, "weight", embedding)
    link(model)
    head._parameters["weight"] = embedding._parameters["weight"]
    return _materialise(model, dtype, device)
