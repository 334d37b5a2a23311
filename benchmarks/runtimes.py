"""`python -m benchmarks runtimes`: tokens a second of one shape in edkm's own layers, in llama.cpp on exported files, and dense.

The shape is that of LLaMA 3.2 1B with the vocabulary of the given tokenizer; weights are random, as speed does not depend on them. Models
in a format of llama.cpp are written as packed directories and exported as `edkm export --to gguf` does; llama-bench runs the files. One
sequence, greedy, with a key-value cache. llama.cpp's threads wait actively: on a machine that does anything else its figures are of no use.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from pathlib import Path

import torch

from benchmarks import generation
from benchmarks.measure import machine, write
from edkm.compressed import checkpoint
from edkm.compressed.jsonfile import write_json
from edkm.core.formats import FORMATS, FrozenBlocks
from edkm.export import gguf

SHAPE = "Llama-3.2-1B"


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks runtimes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a checkpoint directory whose tokenizer is used")
    parser.add_argument("--llama-cpp", type=Path, default=Path(".llama.cpp/build/bin"), metavar="DIR", help="folder of llama-bench")
    parser.add_argument("--formats", nargs="*", default=["q4_0", "q3_k"])
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3], help="of free tables in edkm's own layers")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in a round (24)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/runtimes"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    vocabulary = json.loads((args.tokenizer / "config.json").read_text())["vocab_size"]
    shape = generation.MODELS[SHAPE] | {"vocab_size": vocabulary, "num_hidden_layers": args.layers}
    generation.MODELS["shape"] = shape
    files = {name: _exported(name, shape, args) for name in args.formats}
    contestants = {"dense bfloat16": generation._dense("shape", "cpu")}
    contestants |= {f"edkm, table, {bits} bits": generation._packed("shape", bits, torch.bfloat16, "cpu") for bits in args.bits}
    rates: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(args.rounds + 1):  # in turn, and the first is a warm-up
        for who, model in contestants.items():
            rates[who].append(generation._rate(model, 16, args.tokens))
    rates = {who: found[1:] for who, found in rates.items()}
    contestants.clear()
    for name, file in files.items():
        rates[f"llama.cpp, {name}"] = _llama_bench(args.llama_cpp / "llama-bench", file, args)
    base, rows = statistics.median(rates["dense bfloat16"]), []
    for who, found in rates.items():
        rate = statistics.median(found)
        rows.append({"who": who, "tokens_per_second": found, "ratio": rate / base})
        print(f"{who:<20} {rate:6.2f} tokens/s ({min(found):.2f} to {max(found):.2f}), {rate / base:5.2f} times dense", flush=True)
    write(args.json, {"benchmark": "runtimes", "shape": shape, "threads": args.threads, "machine": machine("cpu"), "rows": rows})
    return 0


def _exported(name: str, shape: dict[str, int], args: argparse.Namespace) -> Path:
    """Write a packed directory of random weights in a format, and export it."""
    folder, out = args.work / name, args.work / f"{name}.gguf"
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_file():
        return out
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, tie_word_embeddings=True)  # pyright: ignore
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    frozen, dense = {}, {}
    for key, parameter in model.named_parameters():
        if parameter.ndim < 2:
            dense[key] = torch.ones(parameter.shape)
        else:
            frozen[key] = _random("q8_0" if "embed" in key else name, *parameter.shape)
    shutil.rmtree(folder, ignore_errors=True)
    quantization = checkpoint.write(folder, frozen, dense, {})
    write_json(folder / "config.json", {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantization})
    for file in (*args.tokenizer.glob("tokenizer*"), *args.tokenizer.glob("chat_template*")):
        shutil.copy(file, folder)
    gguf.export(folder, out)
    shutil.rmtree(folder)
    return out


def _random(name: str, rows: int, cols: int) -> FrozenBlocks:
    form = FORMATS[name]
    indices = torch.randint(len(form.values), (rows, cols), dtype=torch.uint8)
    theta = torch.full((rows, cols // form.width(cols), form.p), 0.02 / max(form.values))
    return FrozenBlocks(indices, form.store(theta), (rows, cols), 0.0, name)


def _llama_bench(program: Path, file: Path, args: argparse.Namespace) -> list[float]:
    command = [program, "-m", file, "-t", args.threads, "-p", 0, "-n", args.tokens, "-r", args.rounds, "-o", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[0]["samples_ts"]
