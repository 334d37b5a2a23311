"""`python -m benchmarks shapes`: time and memory of compressing a large LLaMA shape a layer at a time, with random weights in bfloat16.

A checkpoint with some layers of the shape is written, and `edkm compress --steps 0` runs on it in a process of its own, with `--by-layer`
if asked. All layers of a shape cost the same, so the time of the whole model follows from a few of them. Random weights say nothing about
quality. The tokenizer is SmolLM2's, the data that of the demonstration.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import machine, write
from edkm.memory import peak_mib
from examples.demo.data import pydoc_data, save_smollm2

VOCABULARY = 49152  # of the tokenizer


class Shape(NamedTuple):
    """Sizes of a LLaMA model."""

    hidden: int
    inner: int
    layers: int
    heads: int


SHAPES = {"1b": Shape(2048, 8192, 16, 32), "7b": Shape(4096, 11008, 32, 32)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="(1b)")
    parser.add_argument("--layers", type=int, help="of the checkpoint (those of the shape)")
    parser.add_argument("--bits", type=int, default=3, help="(3)")
    parser.add_argument("--by-layer", action="store_true", help="train each layer")
    parser.add_argument("--blocks", type=int, help="that layers are trained on (those of edkm compress); their time is in proportion")
    parser.add_argument("--out", type=Path, default=Path("out/shapes"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    layers = args.layers or shape.layers
    model = args.out / f"{args.shape}-{layers}"
    if args.run:
        _compress(args, model)
        return 0
    save_smollm2(args.out / "smollm2")
    pydoc_data(args.out / "data")
    save_random(model, shape, layers, args.out / "smollm2")
    subprocess.run([sys.executable, "-m", "benchmarks", "shapes", *argv, "--run"], check=True)
    found = json.loads((args.out / "found.json").read_text())
    found |= {
        "benchmark": "shapes",
        "shape": args.shape,
        "layers": layers,
        "bits": args.bits,
        "by_layer": args.by_layer,
        "blocks": args.blocks,
    }
    found["machine"] = machine("cpu")
    each = found["layer_seconds"]
    print(f"{layers} of {shape.layers} layers: {found['seconds']:.0f} s, {each:.0f} s a layer, peak {found['peak_mib'] / 1024:.2f} GiB")
    whole = each * shape.layers + found["outer_seconds"]
    print(
        f"the whole model, from that and {found['outer_seconds']:.0f} s for embeddings and output layer: {whole / 3600:.2f} hours",
        flush=True,
    )
    write(args.json, found)
    return 0


def _compress(args: argparse.Namespace, model: Path) -> None:
    """Compress the checkpoint, and note the time of each layer and the peak of this process."""
    import edkm
    from edkm import recipe as recipes
    from edkm.recipe import Recipe, compress

    recipes.LAYER_BLOCKS = args.blocks or recipes.LAYER_BLOCKS
    times: list[float] = []  # at the start of the first layer, and when a part is done

    class Timed(recipes.Stream):
        def run(self) -> Iterator[None]:
            times.append(time.perf_counter())
            for _ in super().run():
                times.append(time.perf_counter())
                yield

    recipes.Stream = Timed  # pyright: ignore[reportAttributeAccessIssue]
    recipe = Recipe(edkm.ClusterConfig(bits=args.bits, rows_per_lut=1), steps=0, by_layer=args.by_layer)
    began, out = time.perf_counter(), args.out / "packed"
    compress(model, recipe, out, data=args.out / "data" / "train.json", overwrite=True)
    found: dict[str, Any] = {"seconds": time.perf_counter() - began, "peak_mib": peak_mib()}
    found["layer_seconds"] = (times[-2] - times[0]) / (len(times) - 2)
    found["outer_seconds"] = times[-1] - times[-2]
    (args.out / "found.json").write_text(json.dumps(found))


def save_random(directory: Path, shape: Shape, layers: int, tokenizer: Path) -> None:
    """Write a checkpoint with random weights in bfloat16, a file for each layer, unless it is there."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    if (directory / "config.json").is_file():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    files, generator = {}, torch.Generator().manual_seed(0)
    for number, tensors in enumerate(_tensors(shape, layers, generator), 1):
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_attention_heads": shape.heads, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, tie_word_embeddings=False, max_position_embeddings=2048, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)


def _tensors(shape: Shape, layers: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Make the tensors of each layer, and then of the rest."""

    def random(rows: int, cols: int) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) * 0.02).bfloat16()

    ones, (hidden, inner, *_) = torch.ones(shape.hidden, dtype=torch.bfloat16), shape
    for layer in range(layers):
        found = {f"self_attn.{name}_proj": random(hidden, hidden) for name in "qkvo"}
        found |= {"mlp.gate_proj": random(inner, hidden), "mlp.up_proj": random(inner, hidden), "mlp.down_proj": random(hidden, inner)}
        found |= {"input_layernorm": ones, "post_attention_layernorm": ones.clone()}
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in found.items()}
    outer = {"model.embed_tokens": random(VOCABULARY, hidden), "lm_head": random(VOCABULARY, hidden), "model.norm": ones}
    yield {f"{name}.weight": tensor for name, tensor in outer.items()}
