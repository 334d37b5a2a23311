"""`python -m benchmarks small-model`: train a small language model from nothing, to learn on.

A LLaMA of 5.8 million parameters, whose widths are multiples of 256 so that every table format fits, with a vocabulary of 4,096 tokens
of its own. Its text is on every machine that ran `make setup`: the Python sources of the standard library and of installed packages,
whose versions `constraints.txt` pins. Whole packages are held out. Everything is made in `--out`, and what is there is not made again:

data/pretraining.jsonl   a record per file of the packages that the model learns first
data/finetuning.jsonl    of other packages, to fine-tune it on
data/same.txt, other.txt two held-out packages: one of the kind of the fine-tuning, one of the kind of the pretraining
pretraining/             checkpoints while it trains: a run that was stopped goes on
model/                   the trained model, in transformers' form
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, write

STANDARD_LIBRARY = "the standard library"
PRETRAINING = (STANDARD_LIBRARY, "torch", "sympy", "networkx", "matplotlib", "nltk", "fontTools", "pygments", "setuptools", "pip")
FINETUNING = ("pandas", "scipy", "numpy")
HELDOUT = {"same": ("sklearn",), "other": ("tornado", "mpmath", "hypothesis")}

VOCABULARY, WINDOW = 4096, 256
# Longer files are mostly tables, shorter ones mostly empty.
CHARACTERS = range(500, 200_000)
HELDOUT_CHARACTERS = 600_000  # some 180,000 tokens
_END = "<|endoftext|>"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks small-model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/small"))
    parser.add_argument("--tokens", type=float, default=16e6, help="to train on (16e6)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (2e-3)")
    parser.add_argument("--batch", type=int, default=16, help="blocks of 256 tokens a step (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that share each step (one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.batch % args.processes:
        parser.error(f"--batch: a multiple of the {args.processes} processes, got {args.batch}.")
    if args.train:
        from edkm.train import distributed

        with distributed.session(1800.0):
            train(args)
        return 0
    make_data(args.out / "data")
    model, losses = make_model(args)
    found = {name: score(model, args.out, name) for name in HELDOUT}
    print(f"perplexity on held-out windows of {WINDOW} tokens: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    settings = {"tokens": args.tokens, "lr": args.lr, "batch": args.batch, "seed": args.seed}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {"benchmark": "small-model", **settings, "machine": machine("cpu"), "parameters": parameters, "perplexity": found, **losses}
    write(args.json, result)
    return 0


def make_data(folder: Path) -> None:
    """Write the texts, unless they are there: files in an order that depends on nothing but their content."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()  # some packages carry copies of others: what is held out must not be trained on
    for name, packages in HELDOUT.items():
        text = "\n\n".join(files(packages, seen))[:HELDOUT_CHARACTERS]
        _write(folder / f"{name}.txt", text)
    for name, packages in (("pretraining", PRETRAINING), ("finetuning", FINETUNING)):
        lines = [json.dumps({"text": text}) for text in files(packages, seen)]
        _write(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    if not path.is_file():
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def files(packages: tuple[str, ...], seen: set[bytes] | None = None) -> Iterator[str]:
    """Yield the sources of packages, none twice, in the order of their hashes; without those seen before, to which they are added."""
    seen = set() if seen is None else seen
    found = {}
    for package in packages:
        for path in _folder(package).rglob("*.py"):
            if not {"site-packages", "dist-packages"} & set(path.relative_to(_folder(package)).parts):
                content = path.read_bytes()
                if len(content) in CHARACTERS:
                    found[hashlib.sha256(content).digest()] = content
    for digest in sorted(found):
        if digest not in seen:
            seen.add(digest)
            yield found[digest].decode(errors="replace")


def _folder(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package}: is not installed. `make setup` installs it, in .venv.")
    return Path(found.origin).parent


def make_tokenizer(data: Path) -> Any:
    """Learn a vocabulary of bytes and their pairs from every eighth file of the pretraining."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for line in (data / "pretraining.jsonl").read_text(encoding="utf-8").splitlines()[::8]]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(iter(texts), VOCABULARY, special_tokens=[_END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, eos_token=_END, pad_token=_END)


def make_model(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train the model and save it, unless it is there; return it with its losses and seconds.

    Every core is a process of its own, each with a part of every step: at this size two threads are hardly faster than one.
    """
    from edkm.models import load_model
    from edkm.train import data

    folder, kept = args.out / "model", args.out / "pretraining.pt"
    if not (folder / "config.json").is_file():
        if not kept.is_file():
            tokenizer = make_tokenizer(args.out / "data")
            tokenizer.save_pretrained(args.out / "tokenizer")
            data.load_blocks(args.out / "data" / "pretraining.jsonl", tokenizer, block_tokens=WINDOW).save(kept)
        words = ["--nproc-per-node", args.processes, "-m", "benchmarks", "small-model", "--train", "--out", args.out]
        words += ["--tokens", args.tokens, "--lr", args.lr, "--batch", args.batch, "--seed", args.seed]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, words)], env=environment, check=True)
        kept.unlink()
    return load_model(folder)[0], json.loads((folder / "losses.json").read_text())


def train(args: argparse.Namespace) -> None:
    """Train the model from nothing, on every rank; go on from the last checkpoint if there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from edkm.models import load_tokenizer
    from edkm.train import data, distributed, loop, runstate

    tokenizer, blocks = load_tokenizer(args.out / "tokenizer", args.out / "tokenizer"), data.Blocks.read(args.out / "pretraining.pt")
    work, steps = args.out / "pretraining", round(args.tokens / args.batch / WINDOW)
    if steps * args.batch > len(blocks):
        raise ValueError(f"--tokens: the text has {len(blocks) * WINDOW:,}. Give at most as many.")
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2 * WINDOW,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    settings = loop.TrainSettings(steps, args.lr, args.batch // distributed.world_size(), seed=args.seed, save_every=500)
    began = time.perf_counter()
    result = loop.train(model, blocks, settings, work, resume=runstate.last_checkpoint(work) is not None, name="pretraining")
    result.check("pretraining")
    losses = {"seconds_since_resumed": time.perf_counter() - began, "text_tokens": blocks.tokens, "losses": result.losses}
    distributed.run_on_rank0(lambda: _save(model, tokenizer, losses, args.out))


def _save(model: Any, tokenizer: Any, losses: dict[str, Any], out: Path) -> None:
    part = out / "model.part"  # which has its name only when it is complete
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    (part / "losses.json").write_text(json.dumps(losses))
    part.replace(out / "model")
    shutil.rmtree(out / "pretraining", ignore_errors=True)


def score(model: Any, out: Path, text: str, windows: int = 128) -> float:
    """Measure the perplexity on a held-out text."""
    from edkm.evaluate import perplexity
    from edkm.models import load_tokenizer

    tokenizer = load_tokenizer(out / "model", out / "model")
    content = (out / "data" / f"{text}.txt").read_text(encoding="utf-8")
    return perplexity(model, tokenizer, content, window=WINDOW, max_windows=windows).perplexity
