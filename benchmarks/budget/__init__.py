"""`python -m benchmarks budget`: which method is best, by bits and by the tokens that one can afford.

On the model of `python -m benchmarks small-model`, which is made first. It is fine-tuned on text of another family of packages; from
there every row spends a further budget of tokens of the same text (0: only what is fitted). A row is a process of its own on one thread,
and is not made again if `--out` holds its result; one that was stopped goes on from its last checkpoint.

control           plain fine-tuning with the budget, in 16 bits
gptq, autoround   the control, then GPTQ or AutoRound in groups of 64 (needs `make baselines`)
fit               the control, then `edkm.prepare`
soft              the fit, then soft clustered steps, annealed
straight          the fit, then clustered steps straight through the hard assignment
soft-kl, straight-kl, straight-jsd
                  the same, with the divergence from the predictions before clustering in the place of the loss of the data
stages            the fit at 4 bits, half of the steps as `soft-kl`, the fit at fewer bits, the other half
half, most        half, and three quarters, of the budget plain, then as `soft-kl`, towards the model as it is by then
most-data         as `most`, with the loss of the data
half+layers+tables, most+layers+tables
                  half (three quarters) of it plain, a quarter (a twentieth) by layer, the rest for tables, towards the model by then
most+layers       as `most`, with a twentieth of the budget by layer before the clustered steps
layers            by layer, with the budget as its passes over the calibration blocks
layers+tables, layers+tables-kl
                  by layer with half of the budget, then its tables with the other
layers+soft-kl, layers+straight-kl
                  by layer with half of the budget, and at most 262,144 tokens, then as `soft-kl`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import small_model
from benchmarks.budget.chart import draw
from benchmarks.budget.rows import FORMS, ROWS, Spec, run
from benchmarks.measure import machine, write


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/small"), help="of `benchmarks small-model`")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="(all)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help=f"({' '.join(FORMS)})")
    parser.add_argument("--tokens", nargs="+", type=float, default=[0, 1e5, 1e6], help="(0 1e5 1e6)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(0)")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3], help="highest learning rates of whole models (1e-3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rows at a time (one a core)")
    parser.add_argument("--baselines", type=Path, default=Path(".venv-baselines/bin/python"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows that --out holds")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw all rows that --out holds")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        run(args.out, Spec.parse(args.row), args.baselines)
        return 0
    if not (args.out / "model" / "config.json").is_file():
        small_model.main(["--out", str(args.out)])
    specs = [
        Spec(row, form, int(tokens), seed, lr)
        for tokens in args.tokens
        for row in args.rows
        for form in (["16"] if row == "control" else args.forms)
        for seed in args.seeds
        for lr in args.lr
    ]
    make(args, [*dict.fromkeys(start for spec in specs for start in spec.starts()), *specs])
    found = [json.loads(path.read_text()) for path in sorted((args.out / "rows").glob("*.json"))]
    print(table(found))
    write(args.json, {"benchmark": "budget", "machine": machine("cpu"), "rows": found})
    if args.plot is not None:
        draw(args.plot, found)
    return 0


def make(args: argparse.Namespace, specs: list[Spec]) -> None:
    """Make the rows that are not there, several at a time, each when what it starts from is there."""
    folder, running = args.out / "rows", dict[str, subprocess.Popen]()
    folder.mkdir(exist_ok=True)
    waiting = {spec.name: spec for spec in specs if spec.exists() and not (folder / f"{spec.name}.json").is_file()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while waiting or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    raise SystemExit(f"{name}: failed; its output is in {folder / name}.log. The other rows are kept.")
                row = json.loads((folder / f"{name}.json").read_text())
                print(f"{name:<40}{row['same']:>10.3f}{row['other']:>10.3f}{row['seconds']:>8.0f} s", flush=True)
        ready = [
            spec for spec in waiting.values() if all((folder / f"{start.name}.json").is_file() for start in spec.starts() if start != spec)
        ]
        for spec in ready[: args.jobs - len(running)]:
            command = [sys.executable, "-m", "benchmarks", "budget", "--out", args.out, "--baselines", args.baselines, "--row", spec.name]
            with (folder / f"{spec.name}.log").open("w") as log:
                running[spec.name] = subprocess.Popen(
                    [str(word) for word in command], stdout=log, stderr=subprocess.STDOUT, env=environment
                )
            del waiting[spec.name]
        time.sleep(0.5)


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as text: perplexities, and the distance of their loss from the control's of the same budget."""
    controls: dict[int, float] = {}  # of all rates and seeds the best
    for row in rows:
        if row["row"] == "control":
            controls[row["tokens"]] = min(row["same"], controls.get(row["tokens"], math.inf))
    lines = [f"{'':<18}{'form':>6}{'tokens':>12}{'seed':>6}{'lr':>9}{'same':>10}{'other':>10}{'nats':>8}{'seconds':>9}{'GiB':>6}"]
    for row in sorted(rows, key=lambda row: (row["form"], row["tokens"], row["same"])):
        nats = math.log(row["same"] / controls[row["tokens"]]) if row["tokens"] in controls else math.nan
        numbers = f"{row['tokens']:>12,}{row['seed']:>6}{row['lr']:>9.0e}{row['same']:>10.3f}{row['other']:>10.3f}{nats:>8.3f}"
        lines.append(f"{row['row']:<18}{row['form']:>6}{numbers}{row['seconds']:>9.0f}{row['peak_mib'] / 1024:>6.1f}")
    return "\n".join(lines)
