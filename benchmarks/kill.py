"""`python -m benchmarks kill`: a run of `edkm compress` killed by SIGKILL at random moments ends as the unkilled one, bit for bit.

A tiny random model is fine-tuned, fitted, clustered and written. Each trial kills the command once at a moment drawn over the whole
length of a run, the fit and the writing among them, and then twice more as it goes on with --resume, until it is done. All files of
weights must equal those of a run that nobody killed. Exits with 1 if one does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import machine, write

KILLS_PER_RUN = 3


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kill", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="kills in all (20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    generator, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        _make_inputs(folder)
        expected, unkilled_s = _unkilled(folder)
        print(f"unkilled: {unkilled_s:.1f} s\n{'kill':>5} {'after s':>8}  {'in':<22} weights", flush=True)
        while (left := args.kills - len(rows)) > 0:
            killed = _killed_run(folder, generator, min(left, KILLS_PER_RUN), unkilled_s)
            same = _digests(folder / "killed") == expected
            for kill in killed:
                rows.append({**kill, "same": same})
                print(f"{len(rows):>5} {kill['after_s']:>8.2f}  {kill['phase']:<22} {'same' if same else 'DIFFERENT'}", flush=True)
    different = sum(not row["same"] for row in rows)
    print(f"{len(rows)} kills, {different} with other weights")
    write(args.json, {"benchmark": "kill", "seed": args.seed, "machine": machine("cpu"), "unkilled_s": unkilled_s, "rows": rows})
    return int(different > 0)


def _make_inputs(folder: Path) -> None:
    """Write a tiny LLaMA with dropout in its attention, a tokenizer of bytes and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    config = LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0, attention_dropout=0.1)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = random.Random(0).choices(["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"], k=3000)
    (folder / "train.txt").write_text(" ".join(words))


def _command(folder: Path, out: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "edkm", "compress", str(folder / "model"), "--data", str(folder / "train.txt")]
    command += ["--out", str(folder / out), "--block-tokens", "64", "--steps", "40", "--finetune-steps", "20", "--save-every", "3"]
    return [*command, "--lr", "1e-3", *more]


def _run(folder: Path, out: str, *more: str, kill_after_s: float | None = None) -> tuple[bool, str]:
    """Run the command, killed after so many seconds; returns whether it was done before, and the last phase that it showed."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(_command(folder, out, *more), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            code = process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    lines = (folder / "log").read_text().splitlines()
    if code not in (0, None):
        raise SystemExit("kill: the command failed:\n" + "\n".join(lines[-20:]))
    phases = ("loading", "tokenizing", "calibration", "fine-tuning", "fit", "tables", "clustered training", "writing")
    shown = [line.partition(":")[0] for line in lines if line.startswith(phases)]
    return code == 0, shown[-1].split(" /")[0] if shown else "start"


def _unkilled(folder: Path) -> tuple[dict[str, str], float]:
    _run(folder, "unkilled")  # once for compiled code and caches
    began = time.perf_counter()
    _run(folder, "unkilled", "--overwrite")
    return _digests(folder / "unkilled"), time.perf_counter() - began


def _killed_run(folder: Path, generator: random.Random, kills: int, unkilled_s: float) -> list[dict]:
    """Run to the end with so many kills, each at a moment drawn over the length of a run."""
    found: list[dict] = []
    out = folder / "killed"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    while True:
        resume = ("--resume",) if (out / "training" / "run.json").is_file() else ("--overwrite",)
        after_s = generator.uniform(0.3, 1) * unkilled_s if len(found) < kills else None
        done, phase = _run(folder, "killed", *resume, kill_after_s=after_s)
        if done and len(found) == kills:
            return found
        if done:  # before the kill: it counts for nothing
            subprocess.run(["rm", "-rf", str(out)], check=True)
            continue
        found.append({"after_s": after_s, "phase": phase})


def _digests(directory: Path) -> dict[str, str]:
    """Hash all files of weights, and the config with its quantization."""
    names = sorted(path for path in directory.glob("*") if path.suffix == ".safetensors" or path.name == "config.json")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
    assert "model.safetensors" in digests, json.dumps(digests)
    return digests


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
