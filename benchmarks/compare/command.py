"""Compare edkm with other methods on one model and the same texts, each stage in its own process, in one table."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.compare import readme, table
from benchmarks.compare.making import last_line
from benchmarks.compare.methods import ALWAYS, METHODS, chosen
from benchmarks.compare.plot import plot
from benchmarks.compare.stage import SETTINGS, TASKS, path_of, write_whole
from edkm.compressed.jsonfile import printable
from edkm.output import check_output
from edkm.progress import progress, shown
from edkm.textfile import read_text
from edkm.train.records import fields, read_records

TEXT = """Compare edkm with other methods on one model: bits, size, perplexity, tasks, cost.

Every method starts from the same 16-bit model; the model itself and plain fine-tuning with the same data and
steps are always included. Each stage runs in its own process and is not repeated: the same command continues
where it stopped, and more methods, texts or tasks may be named. The table has every row that DIR has.
smoothquant, awq, gptq and autoround need `make baselines`.

DIR gets table.md, table.json and plot.svg, and METHOD/checkpoint for each method.

Without MODEL the comparison of docs/results is made: SmolLM2-135M-Instruct, trained on instructions from Python's
language reference, measured on held-out topics of it, novels (LAMBADA) and code; its table goes to benchmarks/results."""

_BASELINES = Path(".venv-baselines/bin/python")
# Settings on which some results alone depend: they may change while there is none.
_RESULTS_OF = {
    "limit": "*/task-*.json",
    "autoround_iters": "*autoround/make.json",
    "autoround_blocks": "*autoround/make.json",
}


class StageError(Exception):
    """A stage failed; the message is its last line."""


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint directory, a .gguf file, or a hub id")
    parser.add_argument("--data", type=Path, metavar="FILE", help="training and calibration data")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="held-out UTF-8 text (repeatable)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything goes")
    parser.add_argument("--bits", type=int, default=3, metavar="N", help="bits of an index, 2 to 8 (3)")
    others = [name for name in METHODS if name not in ALWAYS]
    parser.add_argument("--methods", default=",".join(others), metavar="A,B", help=f"of {', '.join(others)} (all)")
    tasks = "those of `python -m benchmarks tasks` by name, which need no hub, or others as for `edkm eval --tasks` (none)"
    parser.add_argument("--tasks", default="", metavar="A,B", help=tasks)
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (all)")
    parser.add_argument("--score", metavar="A,B", help="methods whose tasks are scored now, original and control too (all that are run)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window of the text (512)")
    parser.add_argument("--max-windows", type=int, metavar="N", help="use the first N windows (all)")
    how = parser.add_argument_group("training and calibration")
    how.add_argument("--steps", type=int, default=24, metavar="N", help="optimizer steps of every method that trains (24)")
    how.add_argument("--lr", action="append", default=[], metavar="METHOD=X", help="peak learning rate of a method (repeatable)")
    how.add_argument("--block-tokens", type=int, default=512, metavar="N", help="tokens of a block (512)")
    how.add_argument("--batch", type=int, default=2, metavar="N", help="blocks of a step (2)")
    how.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="autocast (auto: bf16 where it is fast)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="order of the data, and LLM-QAT's text (0)")
    how.add_argument("--calibration-blocks", type=int, default=32, metavar="N", help="of the baselines; awq takes every fourth (32)")
    how.add_argument("--autoround-iters", type=int, default=200, metavar="N", help="iterations of a layer (200, its default)")
    how.add_argument("--autoround-blocks", type=int, metavar="N", help="calibration blocks for it, 8 an iteration (all)")
    how.add_argument("--baselines", type=Path, default=_BASELINES, metavar="PYTHON", help=f"their environment's ({_BASELINES})")
    parser.add_argument("--fresh", action="store_true", help="start over: delete what an earlier comparison left in DIR")
    return parser


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks compare`; returns the exit code."""
    args = parser().parse_args(argv)
    given = [name for name in ("model", "data", "text", "out") if getattr(args, name)]
    if given and len(given) < 4 and given != ["out"]:
        print("error: give MODEL, --data, --text and --out together, or none of the first three.", file=sys.stderr)
        return 2
    try:
        with shown():
            if len(given) == 4:
                return run(args)
            readme.fill_in(args)
            code = run(args)
            if code == 0:
                readme.keep(args.out)
            return code
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """Make the comparison; returns 1 if a method failed, which the table then shows."""
    methods, tasks = chosen(_words(args.methods)), _words(args.tasks)
    scored = methods if args.score is None else chosen(_words(args.score), "--score", always=())
    if missing := set(scored) - set(methods):
        raise ValueError(f"--score: {min(missing)} is not among --methods. Name it there too.")
    if args.score is not None and not tasks:
        raise ValueError("--score: there is nothing to score. Name --tasks too.")
    settings = settings_of(args)
    _check(args, methods, tasks)
    _open(args.out, settings, fresh=args.fresh)
    for note in fields(read_records(args.data)):
        print(f"data: {printable(note)}")
    stages = ["make", *(f"perplexity:{text}" for text in settings["texts"])]
    failures = {}
    for number, name in enumerate(methods, 1):
        print(f"{number}/{len(methods)}  {METHODS[name].title}", flush=True)
        start = METHODS[name].start
        try:
            if start in failures:
                raise StageError(f"it starts from {start}, which failed")
            _run_stages(args.out, name, [*stages, *(f"task:{task}" for task in tasks if name in scored)])
        except StageError as error:
            if name == "original":
                raise ValueError(str(error)) from None
            failures[name] = str(error)
            print(f"     failed: {error}", file=sys.stderr)
    present = [name for name in METHODS if name in methods or path_of(args.out, name, "make").is_file()]
    rows = [table.row(args.out, name, list(settings["texts"]), failures.get(name)) for name in present]
    notes = table.notes(settings, rows)
    write_whole(args.out / "table.json", table.as_json(rows, notes, settings))
    write_whole(args.out / "table.md", table.as_markdown(rows, notes))
    plot(args.out / "plot.svg", rows, next(iter(settings["texts"])))
    print(f"\n{table.as_text(rows, notes)}\n\nwrote {args.out}/table.md, table.json, plot.svg; METHOD/checkpoint there has each model")
    return 1 if failures else 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that must be the same when a comparison continues, and the baselines' python."""
    same = ("bits", "limit", "window", "max_windows", "steps", "block_tokens", "batch", "precision", "seed", "calibration_blocks")
    same += ("autoround_iters", "autoround_blocks")
    model = Path(args.model)
    return {
        "model": str(model.resolve()) if model.exists() else args.model,
        "data": str(args.data.resolve()),
        "data_sha256": _sha256(args.data),
        "texts": _texts(args.text),
        "lr": dict(_learning_rate(word) for word in args.lr),
        # Not resolved: the link is what makes it that environment's.
        "baselines": str(args.baselines.absolute()),
        **{name: getattr(args, name) for name in same},
    }


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _texts(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Return texts by the name of the file without its ending."""
    found = {path.stem: {"path": str(path.resolve()), "sha256": _sha256(path)} for path in paths}
    if len(found) < len(paths):
        raise ValueError("--text: two files of one name. Rename one: the table's columns are named after them.")
    return found


def _sha256(path: Path) -> str:
    read_text(path)  # refused now, not when the first method is measured
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _learning_rate(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    training = [key for key, method in METHODS.items() if method.lr != 0.0]
    if name not in training:
        raise ValueError(f"--lr {word}: write METHOD=X, with METHOD one of {', '.join(training)}.")
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"--lr {word}: the rate must be a positive number.")
    return name, rate


def _check(args: argparse.Namespace, methods: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse now what would fail after hours."""
    at_least = {"steps": 0, "window": 2, "block_tokens": 2, "batch": 1, "calibration_blocks": 1, "max_windows": 1, "limit": 1}
    at_least |= {"autoround_iters": 1, "autoround_blocks": 1}
    for name, low in at_least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: at least {low}, got {value}.")
    if not 2 <= args.bits <= 8:
        raise ValueError(f"--bits: 2 to 8, got {args.bits}.")
    libraries = [name for name in methods if METHODS[name].library]
    if libraries and not args.baselines.is_file():
        raise ValueError(
            f"{args.baselines}: not found, and {', '.join(libraries)} need the environment of the baselines. "
            "Set it up with `make baselines`, name its python with --baselines, or leave them out of --methods."
        )
    if tasks:
        from benchmarks.tasks import NAMES
        from edkm.tasks import check_installed, check_tasks

        check_installed()
        if others := [task for task in tasks if task not in NAMES]:
            check_tasks(others, limit=args.limit)


def _open(out: Path, settings: dict[str, Any], *, fresh: bool) -> None:
    """Make the directory ready for this comparison, or go on with the one that is there."""
    check_output(out, overwrite=True)
    path = out / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        if fresh:
            _delete(out)
        else:
            for key in sorted((set(before) | set(settings)) - {"baselines"}):
                if key == "texts":  # more may be named
                    settings["texts"] = before["texts"] | settings["texts"]
                    changed = any(settings["texts"][name] != text for name, text in before["texts"].items())
                elif key in _RESULTS_OF and not any(out.glob(_RESULTS_OF[key])):
                    changed = False
                else:
                    changed = before.get(key) != settings.get(key)
                if changed:
                    raise ValueError(
                        f"{key}: the comparison in {out} has {before.get(key)!r}, this one {settings.get(key)!r}. "
                        "Name another directory, or start over with --fresh."
                    )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and holds no comparison. Name another directory.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=2))


def _delete(out: Path) -> None:
    """Delete the files of a comparison, and no other."""
    for name in (*METHODS, TASKS):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("table.json", "table.md", "plot.svg", "calibration.safetensors"):
        (out / name).unlink(missing_ok=True)


def _run_stages(out: Path, name: str, stages: Sequence[str]) -> None:
    """Run the stages of a method that are not done.

    Raises:
        StageError: one failed.
    """
    for stage in stages:
        if path_of(out, name, stage).is_file():
            continue
        directory = out / name
        if stage == "make":
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        log = path_of(out, name, stage).with_suffix(".log")
        if code := _process([str(out), name, stage], log):
            raise StageError(last_line(log, code))
        print(f"     {stage}: {table.brief(json.loads(path_of(out, name, stage).read_text()))}", flush=True)


def _process(arguments: list[str], log: Path) -> int:
    """Run a stage, with its output in the log; return its exit code."""
    command = [sys.executable, "-m", "benchmarks.compare.stage", *arguments]
    with (
        log.open("w") as file,
        progress(f"     {arguments[-1]} (log: {log})") as advance,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(1)
                advance(0)
        except BaseException:
            process.kill()
            raise
