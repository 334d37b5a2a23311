"""`python -m benchmarks layers`: training one decoder layer at a time, by the perplexity of SmolLM2-135M.

Model, data and texts are those of `python -m benchmarks compare`: calibrated and trained on instructions from Python's reference,
measured on other topics of it and on novels. Every row is a process of its own, and is not repeated if `--out` holds its result already.

fit        `edkm compress --steps 0`
own        the same with `--calibration own`: on text that the model writes itself
both       the same with `--calibration both`: half on that, half on the data
trained    `fit` with `--by-layer`: straight through the hard assignment
soft       the same with a softness of 0.5, annealed
tuned      `trained`, and then `--tune-steps` of its tables with fixed indices, on the data
taught     the same, on the predictions of the original model
whole      the fit, and then `--steps` clustered steps of the whole model
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.readme import WINDOW, make_data
from benchmarks.measure import machine, write
from edkm.memory import peak_mib
from examples.demo.data import save_smollm2

TEXTS = ("reference", "novels")
ROWS = ("fit", "own", "both", "trained", "soft", "tuned", "taught", "whole")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/layers"))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="(2 3)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="(all)")
    parser.add_argument("--steps", type=int, default=24, help="of the whole model, 1,024 tokens each (24)")
    parser.add_argument("--tune-steps", type=int, default=24, help="of the tables, 1,024 tokens each (24)")
    parser.add_argument("--max-windows", type=int, default=8, help="of 512 tokens of each text (8)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        found = run(args, args.row, args.bits[0])
        (args.out / f"{args.row}-{args.bits[0]}.json").write_text(json.dumps(found))
        return 0
    make_data(args.out / "data")
    save_smollm2(args.out / "model")
    names = [("original", 16), *((row, bits) for bits in args.bits for row in args.rows)]
    found = [_result(args, row, bits) for row, bits in names]
    print(_table(found), flush=True)
    settings = {"steps": args.steps, "tune_steps": args.tune_steps, "windows": args.max_windows, "machine": machine("cpu")}
    write(args.json, {"benchmark": "layers", **settings, "rows": found})
    return 0


def _result(args: argparse.Namespace, row: str, bits: int) -> dict[str, Any]:
    """Read the result of a row, or make it in a process of its own."""
    path = args.out / f"{row}-{bits}.json"
    if not path.is_file():
        words = ["--row", row, "--bits", bits, "--out", args.out, "--max-windows", args.max_windows]
        words += ["--steps", args.steps, "--tune-steps", args.tune_steps]
        subprocess.run([sys.executable, "-m", "benchmarks", "layers", *map(str, words)], check=True)
    found = {"row": row, "bits": bits, **json.loads(path.read_text())}
    print(_table([found]), flush=True)
    return found


def run(args: argparse.Namespace, row: str, bits: int) -> dict[str, Any]:
    """Compress the model as a row says, and score it."""
    import edkm
    from edkm.evaluate import perplexity
    from edkm.models import load_model
    from edkm.recipe import Recipe, compress
    from edkm.tuning import Tuning, tune

    data, out, began = args.out / "data" / "train.json", args.out / f"{row}-{bits}", time.perf_counter()
    if row in ("tuned", "taught"):
        tuning, teacher = Tuning(steps=args.tune_steps, block_tokens=WINDOW), args.out / "model" if row == "taught" else None
        tune(args.out / f"trained-{bits}", tuning, out, data=data, teacher=teacher, overwrite=True)
    elif row != "original":
        config, steps = edkm.ClusterConfig(bits=bits, rows_per_lut=1), args.steps if row == "whole" else 0
        by_layer = edkm.LayerTraining(softness=0.5) if row == "soft" else row == "trained"
        calibration = row if row in ("own", "both") else "data"
        recipe = Recipe(config, steps=steps, finetune_steps=0, block_tokens=WINDOW, by_layer=by_layer, calibration=calibration)
        compress(args.out / "model", recipe, out, data=data, overwrite=True)
    found = {"seconds": time.perf_counter() - began, "peak_mib": peak_mib()}
    if row in ("own", "both"):
        phases = json.loads((out / "metrics.json").read_text())["phases"]
        found["writing_seconds"] = next(phase["seconds"] for phase in phases if phase["name"] == "writing text")
    model, tokenizer = load_model(args.out / "model" if row == "original" else out)
    for name in TEXTS:
        text = (args.out / "data" / f"{name}.txt").read_text(encoding="utf-8")
        found[name] = perplexity(model, tokenizer, text, window=WINDOW, max_windows=args.max_windows).perplexity
    return found


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<10}{'bits':>5}" + "".join(f"{name:>12}" for name in TEXTS) + f"{'seconds':>10}{'writing':>10}{'peak GiB':>10}"]
    for row in rows:
        scores = "".join(f"{row[name]:>12.2f}" for name in TEXTS)
        times = f"{row['seconds']:>10.0f}{row.get('writing_seconds', 0):>10.0f}"
        lines.append(f"{row['row']:<10}{row['bits']:>5}{scores}{times}{row['peak_mib'] / 1024:>10.2f}")
    return "\n".join(lines)
