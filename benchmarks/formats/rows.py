"""Make the rows of the formats: the control, the other methods on its checkpoint, and edkm's."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.dense import linear_weights
from benchmarks.compare.making import run_library
from benchmarks.compare.readme import WINDOW
from benchmarks.compare.rtn import round_to_nearest
from benchmarks.formats.llama import LlamaCpp
from benchmarks.formats.starts import CALIBRATION, load_blocks, save_wide

TEXTS = ("reference", "novels")
STARTS = ("original", "control")
OTHERS = ("rounded", "imatrix", "gptq", "awq")
EDKM = ("fit", "layers", "trained")
GGUF = ("q4_0", "iq4_nl", "q3_k", "q2_k", "tq2_0")
INTEGERS = {"int4_g64": (4, 64)}


def methods_of(name: str) -> tuple[str, ...]:
    """List the methods that there are for a format."""
    if name.startswith("table"):
        return ("fit", "trained") if "@" in name else EDKM  # bits are chosen in memory, layers are not
    return (*(("rounded", "imatrix") if name in GGUF else ("rounded", "gptq", "awq") if name in INTEGERS else ("rounded",)), *EDKM)


def run(args: argparse.Namespace, model: str, name: str, method: str) -> None:
    """Make one row and write its result."""
    from edkm.memory import peak_mib

    folder, began = args.out / model, time.perf_counter()
    if name == "bf16":
        loaded, bits = _start(args, folder, method), 16.0
    elif method in EDKM:
        loaded, bits = _edkm(args, folder, name, method)
    else:
        loaded = _other(args, folder, name, method)
        bits = _bits(loaded, name)
    found = {"model": model, "format": name, "method": method, "bits": bits, "steps": args.steps, "windows": args.max_windows}
    found |= {"seconds": time.perf_counter() - began, "peak_mib": peak_mib()}
    if (figures := folder / method / "figures.json").is_file():  # of a process of its own
        found |= {key: json.loads(figures.read_text())[key] for key in ("seconds", "peak_mib")}
    found |= _perplexities(args, folder, loaded)
    part = folder / "rows" / "part.json"
    part.write_text(json.dumps(found))
    part.replace(folder / "rows" / f"{name}-{method}.json")


def _perplexities(args: argparse.Namespace, folder: Path, model: Any) -> dict[str, float]:
    from edkm.evaluate import perplexity
    from edkm.models import load_tokenizer

    tokenizer = load_tokenizer(folder / "original", folder / "original")
    found = {}
    for name in TEXTS:
        text = (args.out / "data" / f"{name}.txt").read_text(encoding="utf-8")
        found[name] = perplexity(model, tokenizer, text, window=WINDOW, max_windows=args.max_windows).perplexity
    return found


def _start(args: argparse.Namespace, folder: Path, method: str) -> Any:
    """Load the original, or train the control from it and save it; widen that for the wide model."""
    from benchmarks.compare.dense import save
    from edkm.models import load_model
    from edkm.recipe import Recipe
    from edkm.train import loop

    if folder.name == "wide":
        save_wide(args.out / "smollm2" / method, folder / method)
        return load_model(folder / method)[0]
    model, tokenizer = load_model(folder / "original")
    if method == "control":
        blocks = load_blocks(args.out, folder / "original")
        recipe = Recipe(steps=args.steps, block_tokens=WINDOW, memory="high").settled(len(blocks))
        result = loop.train(model, blocks, recipe.training(args.steps), folder / "control-training")
        result.check("fine-tuning")
        save(model, tokenizer, folder / "control")
    return model


def _other(args: argparse.Namespace, folder: Path, name: str, method: str) -> Any:
    """Load the control, quantized by another method."""
    from edkm.models import load_model

    if name in GGUF:
        tools = LlamaCpp(args.llama_cpp, folder)
        dense = tools.convert(folder / "control")
        matrix = tools.importance(dense, folder / "calibration.txt") if method == "imatrix" else None
        quantized = tools.quantize(dense, name, matrix)
        model = load_model(quantized)[0]
        quantized.unlink()
        return model
    model = load_model(folder / "control")[0]
    if method in ("gptq", "awq"):
        model.load_state_dict(_llmcompressor(args, folder, method, *INTEGERS[name]), strict=False)
    else:
        with torch.no_grad():
            for weight in linear_weights(model).values():
                weight.copy_(_nf4(weight) if name == "nf4" else round_to_nearest(weight, *INTEGERS[name]))
    return model


def _bits(model: Any, name: str) -> float:
    """Count the bits of a linear weight, scales and zero points included; GPTQ's and AWQ's scales are float16, the format's bfloat16."""
    from edkm.core.formats import format_named

    weights = linear_weights(model).values()
    return sum(format_named(name).stored_bits(*weight.shape) for weight in weights) / sum(weight.numel() for weight in weights)


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    """Round to NF4 in blocks of 64, as bitsandbytes does."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.detach().contiguous(), blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)


def _llmcompressor(args: argparse.Namespace, folder: Path, method: str, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Quantize the control in the environment of the baselines."""
    from safetensors.torch import load_file

    if not args.baselines.is_file():
        raise SystemExit(f"{args.baselines}: is not there. Make it (make baselines), or leave {method} out of --methods.")
    work = (folder / method).resolve()
    work.mkdir(exist_ok=True)
    if not (work / "weights.safetensors").is_file():
        files = {"model": folder / "control", "calibration": folder / CALIBRATION}
        words = ["--bits", bits, "--group", group, "--skip", "lm_head"]
        run_library(args.baselines.absolute(), "run_llmcompressor.py", method, files, words, work, method)
    return load_file(work / "weights.safetensors")


def _edkm(args: argparse.Namespace, folder: Path, name: str, method: str) -> tuple[Any, float]:
    """Compress with edkm, and load the packed model; with its bits a linear weight."""
    import edkm
    from edkm.compressed.checkpoint import summary
    from edkm.models import load_model
    from edkm.recipe import Recipe, compress

    kind, _, target = name.partition("@")
    if kind == "table":
        config = edkm.ClusterConfig(bits=4, rows_per_lut=1)
    else:
        config = edkm.ClusterConfig(format=kind)
    trained = method == "trained"
    settings: dict[str, Any] = {"target_bpw": float(target) if target else None, "by_layer": method == "layers"}
    recipe = Recipe(config, steps=args.steps if trained else 0, block_tokens=WINDOW, memory="high", **settings)
    out = folder / f"{name}-{method}"
    resume = (out / "training" / "run.json").is_file()
    source = folder / ("original" if trained else "control")
    compress(source, recipe, out, data=args.out / "data" / "train.json", resume=resume, overwrite=not resume)
    return load_model(out)[0], summary(out)["clustered_bits_per_weight"]
