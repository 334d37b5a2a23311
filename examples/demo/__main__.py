"""The demonstration, `make demo`: compress a real model to 3.2 bits a weight while fine-tuning it, beside plain fine-tuning.

Each stage runs in a process of its own, so that peak memory is its own too and the packed file is loaded by a process that has never
seen the training. The last thing printed is one table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edkm.memory import peak_mib
from edkm.printing import next_commands
from edkm.progress import progress, say, shown
from examples.demo.data import pydoc_data, save_smollm2

# Chosen by experiment: docs/log.md, 2026-11-21.
STEPS = 12
TARGET_BPW = 3.2
LR = 2e-4
WINDOWS = 8
WINDOW = 512
PROMPT = "What does the Python `break` statement do?"


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration, or one stage of it (for the demonstration's own use)."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where everything goes (out/demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of 1,024 tokens ({STEPS})")
    parser.add_argument("--stage", choices=sorted(_STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        with shown():
            return _run_stage(args) if args.stage else _run(args)
    except KeyboardInterrupt:
        if not args.stage:
            say("edkm: interrupted")
        return 130
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:  # else the stage has said why
            print(f"edkm: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"edkm: error: {error}", file=sys.stderr)
        return 1


def _run_stage(args: argparse.Namespace) -> int:
    figures = _STAGES[args.stage](args)
    figures["peak_mib"] = peak_mib()
    (args.out / f"{args.stage}.json").write_text(json.dumps(figures))
    return 0


def _run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    print("1/5  model and data", flush=True)
    with progress("SmolLM2-135M-Instruct (93 MB, fetched once)"):
        _fetch(args.out)
    figures = {}
    titles = {
        "original": "original model",
        "control": "plain fine-tuning (control)",
        "compress": f"compress to {TARGET_BPW:g} bits a weight",
        "reload": "load the packed model afresh",
    }
    for number, (stage, title) in enumerate(titles.items(), 2):
        print(f"{number}/5  {title}", flush=True)
        _in_a_process(["--stage", stage, "--out", str(args.out), "--steps", str(args.steps)])
        figures[stage] = json.loads((args.out / f"{stage}.json").read_text())
    print(_table(figures, args, time.perf_counter() - began))
    packed, data = args.out / "packed", args.out / "data"
    again = ["compress", "MODEL", "--data", data / "train.json", "--eval-text", data / "heldout.txt", "--out", "packed"]
    print(f"\n{next_commands(['generate', packed, PROMPT], ['inspect', packed], again)}")
    return 0 if _is_trained_model(figures) else 1


def _in_a_process(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "examples.demo", *arguments], check=True)


def _fetch(out: Path) -> None:
    """The model as an ordinary checkpoint in `out/model` (converted once), the data in `out/data`."""
    save_smollm2(out / "model")
    pydoc_data(out / "data")


def _load(args: argparse.Namespace):
    from edkm.models import load_model
    from edkm.train.data import load_blocks

    model, tokenizer = load_model(args.out / "model")
    return model, tokenizer, load_blocks(args.out / "data" / "train.json", tokenizer, block_tokens=WINDOW)


def _measure(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    from edkm.evaluate import perplexity

    text = (args.out / "data" / "heldout.txt").read_text(encoding="utf-8")
    found = perplexity(model, tokenizer, text, window=WINDOW, max_windows=WINDOWS, batch_size=4)
    return {"perplexity": found.perplexity, "measured_in": str(model.dtype).removeprefix("torch.")}


def _train(model: Any, blocks: Any, args: argparse.Namespace, steps: int, first_step: int = 0) -> float:
    """Seconds of training."""
    from edkm.train.loop import TrainSettings, train

    name = "clustered training" if first_step else "plain fine-tuning"
    return train(model, blocks, TrainSettings(steps=steps, lr=LR, first_step=first_step), args.out / "training", name=name).seconds


def _original(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, _ = _load(args)
    weights = sum(p.numel() for p in model.parameters())
    return {**_measure(model, tokenizer, args), "weights": weights, "bytes": weights * 2}


def _control(args: argparse.Namespace) -> dict[str, Any]:
    from edkm.train.loop import named_precision

    model, tokenizer, blocks = _load(args)
    seconds = _train(model, blocks, args, args.steps)
    return {**_measure(model, tokenizer, args), "seconds": seconds, "trained_in": named_precision("auto")}


def _compress(args: argparse.Namespace) -> dict[str, Any]:
    """Run the stages of `edkm compress`, and measure the model between them."""
    import edkm
    from edkm import recipe
    from edkm.train.loop import named_precision

    figures: dict[str, Any] = {"trained_in": named_precision("auto")}

    def measure_fitted(run: Any) -> None:
        figures["start"] = _measure(run.model, run.tokenizer, args)["perplexity"]

    def measure_trained(run: Any) -> None:
        with edkm.soft_weights(run.model):
            figures["soft"] = _measure(run.model, run.tokenizer, args)["perplexity"]
        hard = _measure(run.model, run.tokenizer, args)
        figures.update(hard=hard["perplexity"], measured_in=hard["measured_in"], plain_steps=run.recipe.finetune_steps)
        seconds = [phase["seconds"] for phase in run.recorder.content["phases"]]
        figures.update(zip(("plain_seconds", "prepare_seconds", "clustered_seconds"), seconds, strict=True), seconds=sum(seconds))

    stages = list(recipe.STAGES)
    stages.insert(stages.index(recipe.train_clustered), measure_fitted)
    stages.insert(stages.index(recipe.write), measure_trained)
    settings = recipe.Recipe(target_bpw=TARGET_BPW, steps=args.steps, lr=LR, block_tokens=WINDOW)
    data = args.out / "data" / "train.json"
    recipe.compress(args.out / "model", settings, args.out / "packed", data=data, overwrite=True, stages=stages)
    return figures


def _reload(args: argparse.Namespace) -> dict[str, Any]:
    from edkm.compressed.checkpoint import summary
    from edkm.evaluate import generate
    from edkm.models import load_model

    model, tokenizer = load_model(args.out / "packed")
    totals = summary(args.out / "packed")
    return {
        **_measure(model, tokenizer, args),
        "text": generate(model, tokenizer, PROMPT, max_new_tokens=60),
        "bytes": totals["file_bytes"],
        "bits_per_weight": totals["bits_per_weight"],
        "clustered_bits_per_weight": totals["clustered_bits_per_weight"],
    }


_STAGES = {"original": _original, "control": _control, "compress": _compress, "reload": _reload}


def _is_trained_model(figures: dict[str, dict[str, Any]]) -> bool:
    """Say whether the packed model, in a fresh process, has the perplexity of the trained one to the bit."""
    return figures["reload"]["perplexity"] == figures["compress"]["hard"]


def _table(figures: dict[str, dict[str, Any]], args: argparse.Namespace, seconds: float) -> str:
    original, control, compress, packed = (figures[stage] for stage in ("original", "control", "compress", "reload"))

    def line(what: str, perplexity: float, stage: dict[str, Any], size: str = "", *cost: str) -> str:
        row = f"{what:<38} {perplexity:>10.2f} {stage.get('trained_in', '-'):>14} {size:>10} "
        return (row + " ".join(f"{cell:>10}" for cell in cost)).rstrip()

    def size(count: float) -> str:
        return f"{count / 1e6:.1f} MB"

    def cost(stage: dict[str, Any]) -> tuple[str, str]:
        return f"{stage['seconds']:.0f} s", f"{stage['peak_mib'] / 1024:.2f} GiB"

    step = compress["clustered_seconds"] / (args.steps - compress["plain_steps"]) / (control["seconds"] / args.steps)
    same = "equal to" if _is_trained_model(figures) else "NOT EQUAL to"
    measured = " and ".join(sorted({stage["measured_in"] for stage in figures.values()}))
    return "\n".join(
        [
            "",
            f"SmolLM2-135M-Instruct, Python's reference: {args.steps} steps of 1,024 tokens; "
            f"perplexity on {WINDOWS} held-out windows of {WINDOW}, all measured in {measured} without autocast",
            f"{'':<38} {'perplexity':>10} {'trained in':>14} {'size':>10} {'training':>10} {'peak':>10}",
            line("original, 16 bits", original["perplexity"], original, size(original["bytes"])),
            line("plain fine-tuning (control), 16 bits", control["perplexity"], control, size(original["bytes"]), *cost(control)),
            line(f"edkm, fitted after {compress['plain_steps']} plain steps", compress["start"], compress),
            line("edkm, soft weights", compress["soft"], compress),
            line("edkm, hard weights", compress["hard"], compress, "", *cost(compress)),
            line("edkm, packed file, fresh process", packed["perplexity"], compress, size(packed["bytes"])),
            "",
            f"the packed model is {same} the trained one; {packed['bits_per_weight']:.2f} bits per weight over everything, "
            f"{packed['clustered_bits_per_weight']:.2f} in the linear layers (tables counted); "
            f"{packed['bytes'] / original['bytes']:.2f} of the 16-bit size",
            f"hard perplexity is {compress['hard'] / control['perplexity']:.2f} times the control's; "
            f"a clustered step took {step:.2f} times as long as a plain one, the fit {compress['prepare_seconds']:.0f} s; "
            f"{seconds:.0f} s in all",
            f"it says: {packed['text'].strip()!r}",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
