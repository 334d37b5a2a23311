"""Run the commands of `edkm`: each function takes the parsed options of one and returns the exit code.

torch and transformers are imported inside these functions, so that `edkm --help` answers at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from edkm.compressed.jsonfile import dumps, printable
from edkm.output import check_output
from edkm.printing import summary_table, task_table, written_lines
from edkm.progress import progress, say


def run_compress(args: argparse.Namespace) -> int:
    """Fine-tune, cluster and write a model, or print the plan."""
    from edkm.modelfiles import require

    for package in ("transformers", "accelerate"):
        require(package, "to fine-tune")
    given = vars(args)
    if "target_bpw" in given and "rows_per_lut" in given:
        raise ValueError("--target-bpw: chooses rows per table too. Leave out --rows-per-lut, or give --bits.")

    from edkm import recipe
    from edkm.config import ClusterConfig

    for name in ("bits", "rows_per_lut"):
        if "format" in given and name in given:
            raise ValueError(f"--format: {given['format']} has its own bits and blocks. Leave out --{name.replace('_', '-')}.")
    chosen = {name: given[name] for name in ("format", "bits", "rows_per_lut", "embedding_bits", "skip") if name in given}
    settings = {field.name: given[field.name] for field in fields(recipe.Recipe) if field.name in given}
    settings["config"] = ClusterConfig(**{"rows_per_lut": 1, **chosen})
    options = {"data": args.data, "eval_text": given.get("eval_text"), "resume": args.resume, "overwrite": args.overwrite}
    if "dry_run" in given:
        options["stages"] = recipe.DRY_RUN
    with _saying_how_to_resume(args.out, "dry_run" not in given):
        recipe.compress(args.model, recipe.Recipe(**settings), args.out, **options)
    if "dry_run" not in given:
        print(written_lines(args.out, given.get("eval_text", "TEXT_FILE")))
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """Train the tables of a packed model."""
    from edkm.modelfiles import require

    for package in ("transformers", "accelerate"):
        require(package, "to train")
    from edkm.tuning import Tuning, tune

    given = vars(args)
    settings = {field.name: given[field.name] for field in fields(Tuning) if field.name in given}
    names = ("data", "eval_text", "teacher", "resume", "overwrite")
    with _saying_how_to_resume(args.out):
        tune(args.model, Tuning(**settings), args.out, **{name: given[name] for name in names if name in given})
    print(written_lines(args.out, given.get("eval_text", "TEXT_FILE")))
    return 0


@contextmanager
def _saying_how_to_resume(out: Path, resumable: bool = True) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if (out / "training" / "run.json").is_file() and resumable:
            say(f"edkm: {out} holds an interrupted run; the same command with --resume goes on")
        raise


def run_eval(args: argparse.Namespace) -> int:
    """Score a text or tasks."""
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
    _report(args.json, task_table(scores, mean), value)
    return 0


def _report(target: str | None, text: str, value: dict[str, Any]) -> None:
    """Print the text, and write the JSON to a file if one is named; "-" prints the JSON instead of the text."""
    if target == "-":
        print(dumps(value))
        return
    if target is not None:
        Path(target).write_text(dumps(value) + "\n", encoding="utf-8")
    print(text)


def run_generate(args: argparse.Namespace) -> int:
    """Answer a prompt."""
    from edkm.evaluate import check_generation, generate

    numbers = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    check_generation(**numbers)
    model, tokenizer = _load(args.model, keep_packed=True)
    print(generate(model, tokenizer, args.prompt, chat=False if args.raw else None, **numbers))
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """List the tensors of a packed model."""
    from edkm.compressed import checkpoint
    from edkm.metrics import summary_lines
    from edkm.modelfiles import packed_directory

    directory = packed_directory(args.directory)
    summary = checkpoint.summary(directory)
    if args.json:
        print(dumps(summary))
        return 0
    print(summary_table(summary))
    for line in summary_lines(directory):
        print(printable(line))
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Write the page of a packed model."""
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: name a file in a directory that exists")
    from edkm.modelfiles import packed_directory
    from edkm.report import page

    args.out.write_text(page(packed_directory(args.directory), args.against, args.eval), encoding="utf-8")
    print(f"wrote {args.out}")
    return 0


# Of each runtime: the module that writes for it, and the options that it alone has.
EXPORTS = {
    "coreml": ("edkm.compressed.coreml.export", ("precision", "kv_cache", "context", "fixed")),
    "gguf": ("edkm.export.gguf", ("tokenizer_pre", "like")),
    "compressed-tensors": ("edkm.export.compressed_tensors", ()),
    "mlx": ("edkm.export.mlx", ()),
    "bitsandbytes": ("edkm.export.bnb", ()),
    "onnx": ("edkm.export.onnx", ("int8_activations",)),
}


def run_export(args: argparse.Namespace) -> int:
    """Write a packed model for another runtime."""
    from importlib import import_module

    from edkm.modelfiles import packed_directory

    module, own = EXPORTS[args.to]
    for runtime, (_, names) in EXPORTS.items():
        if odd := next((name for name in names if name in args and name not in own), None):
            raise ValueError(f"--{odd.replace('_', '-')}: is an option of --to {runtime}; leave it out")
    options = {name: getattr(args, name) for name in own if name in args}
    done = import_module(module).export(packed_directory(args.directory), args.out, overwrite=args.overwrite, **options)
    print(f"wrote {args.out}: {done.size_bytes:,} bytes, {done.clustered} clustered tensors, read back equal")
    for note in done.notes:
        print(note)
    return 0


def run_unpack(args: argparse.Namespace) -> int:
    """Write an ordinary checkpoint."""
    if args.out.resolve() == args.directory.resolve():
        raise ValueError(f"--out {args.out} is the packed directory itself; name another")
    check_output(args.out, overwrite=args.overwrite)
    from edkm.compressed import pretrained
    from edkm.modelfiles import packed_directory

    pretrained.unpack(packed_directory(args.directory), args.out)
    print(f"wrote {args.out}")
    return 0


def _load(source: str, *, keep_packed: bool = False) -> tuple[Any, Any]:
    from edkm.models import load_model

    with progress(f"loading {source}"):
        return load_model(source, keep_packed=keep_packed)


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "compress": run_compress,
    "tune": run_tune,
    "generate": run_generate,
    "eval": run_eval,
    "inspect": run_inspect,
    "report": run_report,
    "export": run_export,
    "unpack": run_unpack,
}
