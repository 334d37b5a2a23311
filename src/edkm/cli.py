"""The command line: the options of `edkm COMMAND ...`; `edkm.commands` runs them.

Exit codes: 0 done; 1 an error of the user's making, one line on stderr (`--debug` shows the traceback); 2 wrong usage; 130 interrupted.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edkm import commands
from edkm._version import __version__
from edkm.compressed.jsonfile import printable
from edkm.progress import say, shown

_MODEL = "a checkpoint directory (ordinary or packed by edkm), a .gguf file, or a hub id"
_PACKED = "a directory packed by edkm, or its hub id"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments after the program's name; None means those of the process.

    Raises:
        SystemExit: from argparse: 0 after `--help` or `--version`, 2 for wrong usage.
    """
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # where torchao is installed it warns of kernels for other machines, however it is imported
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "command"):
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    try:
        with shown():
            return commands.RUN[args.command](args)
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
        print(f"edkm: error: {printable(_with_option(message, args))}", file=sys.stderr)
        return 1


def _with_option(message: str, args: argparse.Namespace) -> str:
    """Name the option where the library's message begins with the setting: `--finetune-steps: ...`."""
    options = vars(args).keys() - {"model", "directory", "prompt"}
    return re.sub(r"^\w+(?=[:=])", lambda found: f"--{found[0].replace('_', '-')}" if found[0] in options else found[0], message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edkm",
        description="Compress language models while they are fine-tuned: weights become indices into small tables.",
        epilog="edkm COMMAND --help describes a command, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"edkm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for add in (_add_compress, _add_tune, _add_generate, _add_eval, _add_inspect, _add_report, _add_export, _add_unpack):
        add(subparsers)
    return parser


def _command(subparsers: Any, name: str, *, text: str, example: str, **more: Any) -> argparse.ArgumentParser:
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
    parser.set_defaults(command=name)
    return parser


_COMPRESS = """Fine-tune a model while clustering its weights, and write the packed model.

MODEL is a checkpoint directory, a .gguf file or a hub id. FILE is JSON or JSONL or plain text. A record of JSON has
messages (role, content), or prompt and completion, or instruction and output (Alpaca: input, system and history,
too), or text; the model's chat template writes it, and the loss is on the assistant's answers. Ctrl-C finishes
the step and saves; the same command with --resume goes on to the same result.

Several GPUs: torchrun --nproc-per-node N -m edkm compress ...; --batch is then per GPU."""


def _add_compress(subparsers: Any) -> None:
    example = "edkm compress ./SmolLM2-135M --data train.json --out ./packed --bits 3 --steps 100"
    # Only options that are given are in the result: the defaults are those of edkm.recipe.
    parser = _command(subparsers, "compress", text=_COMPRESS, example=example, argument_default=argparse.SUPPRESS)
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
    formats = "llama.cpp: q4_0, q4_k, q2_k, ...; vLLM: int4_g64, ...; MLX: mlx4_g64, ...; nf4; table: free tables (table)"
    add("--format", metavar="NAME", help=formats)
    add("--rows-per-lut", type=int, metavar="N", help="rows that share a table; 0: one table per tensor (1; chosen for --target-bpw)")
    add("--embedding-bits", type=int, metavar="N", help="bits of embeddings; 0 leaves them alone (8)")
    add("--skip", action="append", metavar="PATTERN", help="leave weights of this name alone, or all in a module of this name (repeatable)")
    by_layer = "train each decoder layer against the original layer when it is fitted; also with --steps 0"
    add("--by-layer", action="store_true", help=by_layer)
    calibration = "text that weights are fitted on: the data, text that the model writes itself before, or half of each (data)"
    add("--calibration", choices=("data", "own", "both"), help=calibration)
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, metavar="N", help="optimizer steps; 0 clusters without training (one pass over the data)")
    add("--finetune-steps", type=int, metavar="N", help="the first N of these train the model as it is (three quarters; all for fast)")
    add("--tune-steps", type=int, metavar="N", help="N more at the end train the tables alone, as edkm tune does (0)")
    add("--lr", type=float, metavar="X", help="peak learning rate (2e-4)")
    add("--distill", type=float, metavar="X", help="share of the clustered steps' loss that keeps to the model before, 0 to 1 (0)")
    add("--block-tokens", type=int, metavar="N", help="tokens of a training block, and of a window of --eval-text (512)")
    add("--batch", type=int, metavar="N", help="blocks of a micro-batch (2)")
    add("--grad-accumulation", type=int, metavar="N", help="micro-batches of a step (1)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    memory = "high: float32 weights; low: bfloat16, 8-bit AdamW; lower: and steps in the backward pass (auto: the first that fits)"
    add("--memory", choices=("auto", "high", "low", "lower"), help=memory)
    add("--fsdp", action="store_true", help="under torchrun: shard the model over the ranks (FSDP2; else DDP)")
    add("--seed", type=int, metavar="N", help="order of the data (0)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (0: only on Ctrl-C)")
    trackers = "log to these, with commas between: tensorboard (into DIR/runs), wandb, ...; all that are installed: all (none)"
    add("--report-to", type=lambda names: tuple(names.split(",")), metavar="NAMES", help=trackers)
    parser.add_argument("--resume", action="store_true", default=False, help="go on where an interrupted run in DIR stopped")
    parser.add_argument("--overwrite", action="store_true", default=False, help="write into DIR even if it is not empty")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the size to expect and the memory needed, and stop")


_TUNE = """Train the tables of a packed model, with its indices fixed, and write it to another directory.

Norms and biases are trained with them. The loss is that of the data, or with --teacher the divergence from the
predictions of the model that was compressed. --lr is a share of a table's typical size. Ctrl-C finishes the step
and saves; the same command with --resume goes on to the same result, also after a kill."""


def _add_tune(subparsers: Any) -> None:
    example = "edkm tune ./packed --data train.json --out ./tuned --teacher ./SmolLM2-135M"
    parser = _command(subparsers, "tune", text=_TUNE, example=example, argument_default=argparse.SUPPRESS)
    parser.usage = "%(prog)s PACKED --data FILE --out DIR [options]"
    add = parser.add_argument
    add("model", metavar="PACKED", help=_PACKED)
    add("--data", required=True, type=Path, metavar="FILE", help="training data, as for edkm compress")
    add("--out", required=True, type=Path, metavar="DIR", help="where to write the tuned model")
    add("--eval-text", type=Path, metavar="FILE", help="held-out UTF-8 text: its perplexity before and after is printed")
    add("--teacher", metavar="MODEL", help="the model that was compressed, whose predictions are to be kept")
    add("--distill", type=float, metavar="X", help="share of the loss that keeps to the teacher, above 0 to 1 (1 with --teacher)")
    add("--steps", type=int, metavar="N", help="optimizer steps (one pass over the data)")
    add("--lr", type=float, metavar="X", help="peak learning rate (4e-3)")
    add("--block-tokens", type=int, metavar="N", help="tokens of a training block, and of a window of --eval-text (512)")
    add("--batch", type=int, metavar="N", help="blocks of a step (2)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--seed", type=int, metavar="N", help="order of the data (0)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints; 0: only on Ctrl-C (20)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on where an interrupted run in DIR stopped")
    parser.add_argument("--overwrite", action="store_true", default=False, help="write into DIR even if it is not empty")


_EVAL = """Perplexity of a text under a model, or its accuracy on tasks.

--text: windows of --window tokens start every --stride tokens; each token is scored once, in
the first window that has it; a window's first token is not scored where it has no context.
Where the tokenizer puts a beginning-of-sequence token before every text, each window begins with it.
float32, no autocast.

--tasks: tasks of lm-eval, such as piqa or arc_easy (data from the hub), or .yaml files in its form.
Needs pip install 'edkm[tasks]'."""


def _add_eval(subparsers: Any) -> None:
    parser = _command(subparsers, "eval", text=_EVAL, example="edkm eval ./packed --tasks piqa,arc_easy --limit 100")
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


_GENERATE = """Answer a prompt with a model.

The prompt is written with the model's chat template, if it has one; --raw continues it as it stands."""


def _add_generate(subparsers: Any) -> None:
    example = 'edkm generate ./packed "What is a Python decorator?" --max-new-tokens 60'
    add = _command(subparsers, "generate", text=_GENERATE, example=example).add_argument
    add("model", metavar="MODEL", help=_MODEL)
    add("prompt", metavar="PROMPT", help="text to answer, or with --raw to continue")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="at most N tokens (100), as far as the context goes")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    add("--raw", action="store_true", help="do not use the chat template")


def _add_inspect(subparsers: Any) -> None:
    text = "List each tensor of a packed model: its bits, tables, bytes and clustering error."
    parser = _command(subparsers, "inspect", text=text, example="edkm inspect ./packed")
    parser.add_argument("directory", metavar="DIR", type=Path, help=_PACKED)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


_REPORT = """Show a packed model on one page: sizes, quality, training, layers, weights and their tables.

The page is one HTML file that loads nothing. The numbers of the run are read from metrics.json in DIR.
--eval adds the results of `edkm eval --json`, of this model or of others. Needs pip install 'edkm[report]'."""


def _add_report(subparsers: Any) -> None:
    example = "edkm report ./packed --against ./packed2 --out report.html"
    add = _command(subparsers, "report", text=_REPORT, example=example).add_argument
    add("directory", metavar="DIR", type=Path, help=_PACKED)
    add("--against", metavar="OTHER", type=Path, help="another packed directory or a dense one, to compare with")
    add("--eval", action="append", default=[], metavar="FILE", type=Path, help="results of edkm eval --json (repeatable)")
    add("--out", default=Path("report.html"), metavar="FILE", type=Path, help="the page to write (report.html)")


_EXPORT = """Write a packed model for another runtime, with its indices and tables as they are.

Everything on the disk is read back and must equal the packed weights, bit for bit; else nothing is written.

--to coreml: a package for iOS 18 and macOS 15, made on Linux or macOS. Inputs inputIds and, with
--kv-cache, fullAttentionMask; output logits; states keyCache and valueCache. The program must give the
packed model's logits. Any causal language model that torch traces, with free tables.
Needs pip install 'edkm[coreml]'.

--to gguf: a file for llama.cpp. --to compressed-tensors: a directory for vLLM and transformers. --to mlx: a
directory for MLX. --to bitsandbytes: a directory for transformers with bitsandbytes. --to onnx: a directory
for ONNX Runtime. These take models that were compressed into a format of the runtime (docs/runtimes.md)."""


def _add_export(subparsers: Any) -> None:
    example = "edkm export ./packed --to coreml --out Model.mlpackage --kv-cache"
    # Only options that are given are in the result: each runtime has its own.
    parser = _command(subparsers, "export", text=_EXPORT, example=example, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("directory", metavar="DIR", type=Path, help=_PACKED)
    add("--to", required=True, choices=tuple(commands.EXPORTS), help="the runtime")
    add("--out", required=True, metavar="OUT", type=Path, help="M.mlpackage, M.gguf or a directory to write")
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace OUT if it is there")
    add = parser.add_argument_group("coreml").add_argument
    add("--precision", choices=("float16", "float32"), help="of all arithmetic (float16)")
    add("--kv-cache", action="store_true", help="keep keys and values in a state, to continue a text token by token")
    add("--context", type=int, metavar="N", help="longest text in tokens (2048, or what the model was made for)")
    add("--fixed", action="store_true", help="take exactly N tokens, not 1 to N; not with --kv-cache")
    add = parser.add_argument_group("gguf").add_argument
    add("--tokenizer-pre", metavar="NAME", help="llama.cpp's name of the tokenizer's splitting of text, where it is not known by itself")
    add("--like", type=Path, metavar="FILE", help="take metadata and tokenizer from this .gguf file of the same model")
    add = parser.add_argument_group("onnx").add_argument
    add("--int8-activations", action="store_true", help="let linear layers round their inputs to 8 bits: many times faster on a CPU")


_UNPACK = """Write a packed model as an ordinary checkpoint, for programs that do not know edkm.

The weights are exactly those of the packed model, one float each."""


def _add_unpack(subparsers: Any) -> None:
    add = _command(subparsers, "unpack", text=_UNPACK, example="edkm unpack ./packed --out ./dense").add_argument
    add("directory", metavar="DIR", type=Path, help=_PACKED)
    add("--out", required=True, metavar="DENSE", type=Path, help="directory to write")
    add("--overwrite", action="store_true", help="write into DENSE even if it is not empty")
