"""`python -m benchmarks formats`: fixed formats, by the perplexity of SmolLM2-135M against its 16-bit control.

Model, data and texts are those of `python -m benchmarks compare`: trained and calibrated on instructions from Python's reference, measured
on other topics of it (`reference`) and on passages of novels, the first `--max-windows` windows of 512 tokens of each. Every method has
`--steps` optimizer steps of 1,024 tokens and, where it calibrates, the same 32 blocks of 512. Every row is a process of its own, and is not
repeated if `--out` holds its result already.

control    plain fine-tuning for all the steps, 16 bits: the next five start from its checkpoint
rounded    the format's usual rounding: llama-quantize without an importance matrix; NF4 by bitsandbytes; nearest of a range for integers
imatrix    llama-imatrix on the calibration blocks, then llama-quantize with it
gptq, awq  by llmcompressor, for integers (`make baselines`)
fit        edkm: `edkm compress --steps 0 --format`
layers     edkm: the same with `--by-layer`
trained    edkm: from the original, `edkm compress --format` with the preset `balanced`: the last quarter of the steps is clustered

All linear weights are in the format and nothing else is (llama-quantize with `--pure`). The embedding, which is the output layer too, is in
Q8_0 in GGUF formats and in 16 bits beside NF4 and integers. The formats `table` and `table@BITS` are free tables, one a row: 4 bits, and
bits chosen to that average; the embedding is in 8 bits.

`--model wide` is the same function in a width of 768, padded with zeros, for formats whose blocks are of 256; so is its control.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.formats.rows import EDKM, OTHERS, STARTS, TEXTS, methods_of, run
from benchmarks.formats.starts import make_starts
from benchmarks.measure import machine, write

FORMATS = {"smollm2": ("q4_0", "iq4_nl", "nf4", "int4_g64", "table", "table@4.5"), "wide": ("q3_k", "q2_k", "tq2_0")}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(FORMATS), nargs="+", default=["smollm2"], help="(smollm2)")
    parser.add_argument("--out", type=Path, default=Path("out/formats"))
    parser.add_argument("--formats", nargs="+", metavar="NAME", help="(those of the model)")
    parser.add_argument("--methods", nargs="+", choices=(*OTHERS, *EDKM), default=[*OTHERS, "fit", "trained"], help="(all but layers)")
    parser.add_argument("--steps", type=int, default=24, help="of 1,024 tokens (24)")
    parser.add_argument("--max-windows", type=int, default=16, help="of 512 tokens of each text (16)")
    folder = os.environ.get("LLAMA_CPP", ".llama.cpp")
    parser.add_argument("--llama-cpp", type=Path, default=Path(folder), metavar="FOLDER", help="built ($LLAMA_CPP, or .llama.cpp)")
    python = Path(".venv-baselines/bin/python")
    parser.add_argument("--baselines", type=Path, default=python, metavar="PYTHON", help=f"that has llmcompressor ({python})")
    parser.add_argument("--kept", action="store_true", help="only the rows whose results are there; none is made")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        run(args, args.model[0], *args.row.split("/"))
        return 0
    found = [row for model in args.model for row in _results(args, model)]
    print(f"\n{table(found)}\n", flush=True)
    settings = {"steps": args.steps, "windows": args.max_windows, "window": 512, "machine": machine("cpu")}
    write(args.json, {"benchmark": "formats", **settings, "rows": found})
    return 0


def _results(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Make the rows of a model; each is printed when it is there."""
    if not args.kept:
        make_starts(args.out, model)
    rows = [("bf16", start) for start in (STARTS if model == "smollm2" else STARTS[1:])]
    rows += [(name, method) for name in args.formats or FORMATS[model] for method in methods_of(name) if method in args.methods]
    if args.kept:
        return [_result(args, model, *row) for row in rows if (args.out / model / "rows" / f"{row[0]}-{row[1]}.json").is_file()]
    found = []
    if model == "wide":
        _result(args, "smollm2", "bf16", "control")
    for row in rows:
        found.append(_result(args, model, *row))
        control = [row for row in found if row["method"] == "control"]
        print(table([*control, found[-1]]).splitlines()[-1], flush=True)
    return found


def _result(args: argparse.Namespace, model: str, name: str, method: str) -> dict[str, Any]:
    """Read the result of a row, or make it in a process of its own."""
    path = args.out / model / "rows" / f"{name}-{method}.json"
    if not path.is_file():
        words = ["--row", f"{name}/{method}", "--model", model, "--out", args.out, "--steps", args.steps, "--max-windows", args.max_windows]
        words += ["--llama-cpp", args.llama_cpp, "--baselines", args.baselines]
        subprocess.run([sys.executable, "-m", "benchmarks", "formats", *map(str, words)], check=True)
    found = json.loads(path.read_text())
    for setting in ("steps", "windows"):
        if found[setting] != (wanted := args.steps if setting == "steps" else args.max_windows):
            raise SystemExit(f"{path}: was made with {found[setting]} {setting}, not {wanted}. Name another --out.")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Print the rows; `left` is the distance to the control of the same model, and `of best` its share of the best of the others'."""
    controls = {row["model"]: row for row in rows if row["method"] == "control"}
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        for text in TEXTS if row["method"] in OTHERS and row["model"] in controls else ():
            key, left = (row["model"], row["format"], text), row[text] - controls[row["model"]][text]
            best[key] = min(left, best.get(key, left))
    head = f"{'model':<9}{'format':<10}{'method':<9}{'bits':>6}"
    lines = [head + "".join(f"{text:>12}{'left':>8}{'of best':>9}" for text in TEXTS) + f"{'seconds':>9}{'GiB':>6}"]
    for row in rows:
        line = f"{row['model']:<9}{row['format']:<10}{row['method']:<9}{row['bits']:>6.2f}"
        for text in TEXTS:
            control = controls.get(row["model"], row)
            left = row[text] - control[text]
            others = best.get((row["model"], row["format"], text), best.get((row["model"], "q4_0", text)))
            share = f"{left / others:.2f}" if others and row["method"] in (*OTHERS, *EDKM) else ""
            cells = (f"{value:.3f}" if value < 1000 else f"{value:.2g}" for value in (row[text], left))  # ruined, by how much is no matter
            line += "".join(f"{cell:>{width}}" for cell, width in zip((*cells, share), (12, 8, 9)))
        lines.append(f"{line}{row['seconds']:>9.0f}{row['peak_mib'] / 1024:>6.2f}")
    return "\n".join(lines)
