"""Run the demonstration, `make demo`: compress a real model to 3.2 bits per weight while fine-tuning it, and fine-tune it plainly.

Each stage runs in its own process, for its own peak memory, and so that the packed file is loaded by a process that has never seen the
training. The last thing printed is one table; the exit code is 1 if the packed model is not the trained one to the bit.
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
WINDOWS = 8
WINDOW = 512
PROMPT = "What does the Python `break` statement do?"


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration, or one stage of it (for the demonstration's use)."""
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
        if error.returncode < 0:  # else the stage has printed why
            print(f"edkm: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"edkm: error: {error}", file=sys.stderr)
        return 1


def _run_stage(args: argparse.Namespace) -> int:
    figures = _STAGES[args.stage](args.out, args.steps)
    (args.out / f"{args.stage}.json").write_text(json.dumps({**figures, "peak_mib": peak_mib()}))
    return 0


def _run(args: argparse.Namespace) -> int:
    began, data, packed = time.perf_counter(), args.out / "data", args.out / "packed"
    args.out.mkdir(parents=True, exist_ok=True)
    print("1/5  model and data", flush=True)
    with progress("SmolLM2-135M-Instruct (93 MB, fetched once)"):
        save_smollm2(args.out / "model")
        pydoc_data(data)
    figures = {}
    titles = ("original model", "plain fine-tuning (control)", f"compress to {TARGET_BPW:g} bits a weight", "load the packed model afresh")
    for number, (stage, title) in enumerate(zip(_STAGES, titles), 2):
        print(f"{number}/5  {title}", flush=True)
        _in_a_process(["--stage", stage, "--out", str(args.out), "--steps", str(args.steps)])
        figures[stage] = json.loads((args.out / f"{stage}.json").read_text())
    print(_table(figures, args.steps, time.perf_counter() - began))
    again = ["compress", "MODEL", "--data", data / "train.json", "--eval-text", data / "heldout.txt", "--out", "packed"]
    print(f"\n{next_commands(['generate', packed, PROMPT], ['inspect', packed], again)}")
    return 0 if _is_trained_model(figures) else 1


def _in_a_process(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "examples.demo", *arguments], check=True)


def _original(out: Path, steps: int) -> dict[str, Any]:
    from edkm.models import load_model

    model, tokenizer = load_model(out / "model")
    weights = sum(p.numel() for p in model.parameters())
    return {**_measure(model, tokenizer, out), "bytes": weights * 2}


def _control(out: Path, steps: int) -> dict[str, Any]:
    """Run the first stages of the recipe, with every step on the model as it is."""
    from edkm import recipe

    stages = recipe.STAGES[: recipe.STAGES.index(recipe.fine_tune) + 1]
    return _train(out, "control", stages, steps=steps, finetune_steps=steps)


def _compress(out: Path, steps: int) -> dict[str, Any]:
    """Run the recipe, with its perplexities on the way."""
    import edkm
    from edkm import recipe

    before: dict[str, Any] = {}

    def measure_fitted(run: Any) -> None:
        before["start"] = _measure(run.model, run.tokenizer, out)["perplexity"]

    def measure_soft(run: Any) -> None:
        with edkm.soft_weights(run.model):
            before["soft"] = _measure(run.model, run.tokenizer, out)["perplexity"]

    after = {recipe.cluster: measure_fitted, recipe.train_clustered: measure_soft}
    stages = [stage for one in recipe.STAGES for stage in (one, after.get(one)) if stage]
    found = _train(out, "packed", stages, steps=steps, config=edkm.ClusterConfig(), target_bpw=TARGET_BPW)
    return found | before


def _train(out: Path, name: str, stages: Any, **settings: Any) -> dict[str, Any]:
    """Run stages of a recipe; return the perplexity at the end, the seconds of each phase, and how it trained."""
    from edkm.recipe import Recipe, compress
    from edkm.train.loop import named_precision

    found: dict[str, Any] = {"trained_in": named_precision("auto")}

    def note(run: Any) -> None:
        found.update(_measure(run.model, run.tokenizer, out), finetune_steps=run.recipe.finetune_steps)
        found["phases"] = {phase["name"]: phase["seconds"] for phase in run.recorder.content["phases"]}

    recipe = Recipe(block_tokens=WINDOW, **settings)
    compress(out / "model", recipe, out / name, data=out / "data" / "train.json", overwrite=True, stages=[*stages, note])
    found["seconds"] = sum(seconds for phase, seconds in found["phases"].items() if phase != "writing")
    return found


def _reload(out: Path, steps: int) -> dict[str, Any]:
    from edkm.compressed.checkpoint import summary
    from edkm.evaluate import generate
    from edkm.models import load_model

    model, tokenizer = load_model(out / "packed")
    totals = summary(out / "packed")
    sizes = {"bytes": totals["file_bytes"], **{key: totals[key] for key in ("bits_per_weight", "clustered_bits_per_weight")}}
    return {**_measure(model, tokenizer, out), **sizes, "text": generate(model, tokenizer, PROMPT, max_new_tokens=60)}


_STAGES = {"original": _original, "control": _control, "compress": _compress, "reload": _reload}


def _measure(model: Any, tokenizer: Any, out: Path) -> dict[str, Any]:
    from edkm.evaluate import perplexity

    text = (out / "data" / "heldout.txt").read_text(encoding="utf-8")
    found = perplexity(model, tokenizer, text, window=WINDOW, max_windows=WINDOWS, batch_size=4)
    return {"perplexity": found.perplexity, "measured_in": str(model.dtype).removeprefix("torch.")}


def _is_trained_model(figures: dict[str, dict[str, Any]]) -> bool:
    """Tell whether the packed model, in a fresh process, has the perplexity of the trained one to the bit."""
    return figures["reload"]["perplexity"] == figures["compress"]["perplexity"]


def _table(figures: dict[str, dict[str, Any]], steps: int, seconds: float) -> str:
    original, control, compress, packed = (figures[stage] for stage in _STAGES)
    plain, phases = compress["finetune_steps"], compress["phases"]

    def line(title: str, perplexity: float, stage: dict[str, Any], size: str = "", *cost: str) -> str:
        row = f"{title:<38} {perplexity:>10.2f} {stage.get('trained_in', '-'):>14} {size:>10} "
        return (row + " ".join(f"{cell:>10}" for cell in cost)).rstrip()

    def size(count: float) -> str:
        return f"{count / 1e6:.1f} MB"

    def cost(stage: dict[str, Any]) -> tuple[str, str]:
        return f"{stage['seconds']:.0f} s", f"{stage['peak_mib'] / 1024:.2f} GiB"

    step = phases["clustered training"] / (steps - plain) / (control["seconds"] / steps)
    same = "equal to" if _is_trained_model(figures) else "NOT EQUAL to"
    measured = " and ".join(sorted({stage["measured_in"] for stage in figures.values()}))
    return "\n".join(
        [
            "",
            f"SmolLM2-135M-Instruct, Python's reference: {steps} steps of 1,024 tokens; "
            f"perplexity on {WINDOWS} held-out windows of {WINDOW}, all measured in {measured} without autocast",
            f"{'':<38} {'perplexity':>10} {'trained in':>14} {'size':>10} {'training':>10} {'peak':>10}",
            line("original, 16 bits", original["perplexity"], original, size(original["bytes"])),
            line("plain fine-tuning (control), 16 bits", control["perplexity"], control, size(original["bytes"]), *cost(control)),
            line(f"edkm, fitted after {plain} plain steps", compress["start"], compress),
            line("edkm, soft weights", compress["soft"], compress),
            line("edkm, hard weights", compress["perplexity"], compress, "", *cost(compress)),
            line("edkm, packed file, fresh process", packed["perplexity"], compress, size(packed["bytes"])),
            "",
            f"the packed model is {same} the trained one; {packed['bits_per_weight']:.2f} bits per weight over everything, "
            f"{packed['clustered_bits_per_weight']:.2f} in the linear layers (tables counted); "
            f"{packed['bytes'] / original['bytes']:.2f} of the 16-bit size",
            f"hard perplexity is {compress['perplexity'] / control['perplexity']:.2f} times the control's; "
            f"a clustered step took {step:.2f} times as long as a plain one, the fit {phases['calibration and fit']:.0f} s; "
            f"{seconds:.0f} s in all",
            f"it says: {packed['text'].strip()!r}",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
