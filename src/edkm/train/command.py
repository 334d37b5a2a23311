"""`edkm compress`: load, calibrate, prepare, train, freeze, write."""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..metrics import Recorder
from ..progress import progress, say, shown
from .presets import DEFAULT, PRESETS, plain_steps_of
from .stages import check_directory, fingerprint, load_weights, prepare_on, save_weights, write

# torch and transformers are imported when a command runs: see cli.py.

TEXT = """Fine-tune a model while clustering its weights, and write the packed model.

MODEL is a checkpoint directory, a .gguf file or a hub id. FILE is JSON or JSONL or plain text. A record of JSON has
messages (role, content), or prompt and completion, or instruction and output (Alpaca: input, system and history,
too), or text; the model's chat template writes it, and the loss is on the assistant's answers. Ctrl-C finishes
the step and saves; the same command with --resume goes on to the same result.

Several GPUs: torchrun --nproc-per-node N -m edkm compress ...; --batch is then per GPU."""


def add_compress(
    subparsers: Any, command: Callable[..., argparse.ArgumentParser], perplexity: Callable[..., dict[str, Any]] | None = None
) -> None:
    """Describe the command; `command` is cli's way to add one, `perplexity` measures for --eval-text: training knows no evaluation."""
    example = "edkm compress ./SmolLM2-135M --data train.json --out ./packed --bits 3 --steps 100"
    parser = command(subparsers, "compress", run, text=TEXT, example=example)
    parser.usage = "%(prog)s MODEL --data FILE --out DIR [options]"  # all of them take fifteen lines
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a .gguf file, or a hub id")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="training data")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write the packed model")
    if perplexity is not None:
        text = "held-out UTF-8 text: its perplexity before and after goes into the report, in windows of --block-tokens"
        parser.add_argument("--eval-text", type=Path, metavar="FILE", help=text)
    parser.set_defaults(perplexity=perplexity, eval_text=None)
    parser.add_argument(
        "--preset",
        default=DEFAULT,
        choices=tuple(PRESETS),
        help="fast: no clustered steps; balanced: the last quarter; best: and bits where they matter, in the same size. Other "
        f"options go first ({DEFAULT})",
    )
    what = parser.add_argument_group("clustering")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--bits", type=int, default=3, metavar="N", help="bits of an index, 1 to 8, for all linear weights (3)")
    size.add_argument(
        "--target-bpw",
        type=float,
        metavar="X",
        help="or bits a linear weight in all, tables counted: each gets the bits and rows per table that its effect on the loss is worth",
    )
    what.add_argument("--dim", type=int, default=1, metavar="N", help="weights that share an index (1)")
    what.add_argument(
        "--rows-per-lut",
        type=int,
        metavar="N",
        help="rows that share a table; 0: one table a tensor (1; chosen for --target-bpw and --preset best)",
    )
    what.add_argument("--embedding-bits", type=int, default=8, metavar="N", help="bits of embeddings; 0 leaves them (8)")
    what.add_argument(
        "--softness",
        type=float,
        default=0.5,
        metavar="X",
        help="start temperature in units of the error (0.5)",
    )
    what.add_argument("--anneal", type=float, default=0.01, metavar="X", help="factor on the temperature at the end (0.01)")
    what.add_argument("--iters", type=int, default=1, metavar="N", help="k-means iterations a step (1)")
    what.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave weights of this name alone, or all in a module of this name (repeatable)",
    )
    what.add_argument(
        "--start",
        default="fit",
        choices=("fit", "kmeans"),
        help="fit weights and tables to the layers' inputs; k-means only is much worse (fit)",
    )
    what.add_argument("--backend", default="auto", choices=("auto", "histogram", "blocks", "native"), help="how to compute it (auto)")
    how = parser.add_argument_group("training")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps; 0 clusters without training")
    length.add_argument("--epochs", type=float, metavar="X", help="passes over the data (1)")
    how.add_argument(
        "--plain-steps",
        type=int,
        metavar="N",
        help="of these the first N fine-tune the model as it is, before it is clustered (three quarters; all with --preset fast)",
    )
    how.add_argument("--lr", type=float, default=2e-4, metavar="X", help="peak learning rate (2e-4)")
    how.add_argument(
        "--distill",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the clustered steps' loss that keeps to the predictions of the model before, 0 to 1 (0)",
    )
    how.add_argument("--block-tokens", type=int, default=512, metavar="N", help="tokens of a training block (512)")
    how.add_argument("--batch", type=int, default=2, metavar="N", help="blocks of a micro-batch (2)")
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step (1)")
    how.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model over the ranks (FSDP2; else DDP)")
    how.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds that ranks wait for each other (1800)")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    how.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "bf16", "fp32"),
        help="autocast (auto: bf16 where it is fast)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="order of the data (0)")
    how.add_argument("--save-every", type=int, default=0, metavar="N", help="steps between checkpoints (0: only on Ctrl-C)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run in DIR stopped")
    parser.add_argument("--overwrite", action="store_true", help="write into DIR even if it is not empty")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, the size to expect and the memory needed, and stop",
    )
    parser.add_argument("--learners", type=int, metavar="N", help="with --dry-run: plan the memory for N processes")


def run(args: argparse.Namespace) -> int:
    """Run `edkm compress`; returns the exit code."""
    from ..modelfiles import require

    for package in ("transformers", "accelerate"):
        require(package, "to fine-tune")
    _check_numbers(args)
    if args.learners is not None and not args.dry_run:
        raise ValueError("--learners: plans the memory, with --dry-run. To train on N processes start with torchrun --nproc-per-node N.")
    from . import distributed

    try:
        with distributed.session(args.timeout), distributed.report_failed_rank("Start again."):
            return _run(args)
    except KeyboardInterrupt:
        if (args.out / "training" / "run.json").is_file() and not args.dry_run:
            say(f"edkm: {args.out} holds an interrupted run; the same command with --resume goes on")
        raise


def _check_directories(args: argparse.Namespace) -> None:
    work = args.out / "training"
    if args.resume and not (work / "run.json").is_file():
        raise ValueError(f"{args.out}: there is no interrupted run to resume. Start without --resume.")
    if not args.resume and not args.dry_run:
        if not args.overwrite and (work / "run.json").is_file():
            raise ValueError(f"{args.out}: holds an interrupted run. Go on with --resume, or start again with --overwrite.")
        check_output(args.out, overwrite=args.overwrite)


def _run(args: argparse.Namespace) -> int:
    from . import distributed

    distributed.run_on_rank0(lambda: _check_directories(args))
    if args.fsdp and not args.dry_run:
        distributed.check_several_ranks()
    from ..models import load_model
    from ..textfile import read_text
    from .calibrate import calibrate
    from .data import Blocks, make_blocks
    from .limits import tokens_to_score
    from .prepare import check
    from .records import read_records

    # Files and numbers first: a misspelt name should not cost the minutes of loading a model.
    config = _config(args)
    records = read_records(args.data)
    text = None if args.eval_text is None else read_text(args.eval_text)
    with progress(f"loading {args.model}"):
        model, tokenizer = load_model(args.model)
    work, kept = args.out / "training", args.out / "training" / "blocks.pt"
    if args.resume and kept.is_file():
        blocks = Blocks.read(kept)
    else:
        blocks = make_blocks(records, tokenizer, block_tokens=args.block_tokens, source=str(args.data), model=model)
    del records
    if text is not None:
        tokens_to_score(model, tokenizer, text, window=args.block_tokens, source=str(args.eval_text))
    steps = _steps(args, len(blocks), distributed.world_size())
    plain_steps = plain_steps_of(steps, args.preset) if args.plain_steps is None else args.plain_steps
    if plain_steps > steps:
        raise ValueError(f"--plain-steps: at most the {steps} steps there are, got {plain_steps}.")
    if args.distill and plain_steps == steps:
        raise ValueError("--distill: is for clustered steps, and there are none. Leave it out, or give fewer --plain-steps.")
    config = replace(config, anneal_steps=steps - plain_steps)
    check(model, config, args.backend)
    _print_plan(args, blocks, steps, plain_steps)
    if args.target_bpw is None and PRESETS[args.preset].chosen_bits:
        from .allocate import bits_of

        args.target_bpw = bits_of(model, config)
        print(
            f"--preset {args.preset}: as many bits as --bits {args.bits} takes, {args.target_bpw:.3f} a linear weight with tables",
            flush=True,
        )
    if args.target_bpw is not None:
        from .allocate import check_target

        check_target(model, config, args.target_bpw)
    if args.dry_run:
        return _dry_run(model, config, args, blocks.block_tokens)
    from .checkpoints import check_same_run, remember_run

    settings = _settings(args, steps)
    identity = _identity(args, model, tokenizer, config, settings, plain_steps)
    if args.resume:
        check_same_run(work, identity)
    else:
        distributed.run_on_rank0(lambda: shutil.rmtree(work) if work.exists() else None)
        if steps:
            distributed.run_on_rank0(lambda: (work.mkdir(parents=True), blocks.save(kept), remember_run(work, identity)))
    device = _to_device(model, args)
    print(f"device: {device}", flush=True)
    if plain_steps and not args.resume:
        # What is not finite before any training is no matter of the learning rate.
        with shown(False):
            calibrate(model, [{"input_ids": blocks[0]["input_ids"].unsqueeze(0).to(next(model.parameters()).device)}])
    recorder = Recorder(work / "metrics.json", _run_settings(args, blocks, settings, plain_steps))
    recorder.keep(model, config)
    _measure(recorder, "original", model, tokenizer, text, args)
    if plain_steps:
        plain = work / "plain.pt"
        if not _fine_tune(model, blocks, replace(settings, steps=plain_steps, distill=0.0), plain, recorder):
            return 130
        del model
        gc.collect()  # the optimizer is part of cycles; weights and moments go before the next model comes
        # Into the same model, and not one that is written and read: a config may not say all that the model is.
        model = load_model(args.model)[0]
        load_weights(plain, model)
        settings = replace(settings, steps=steps - plain_steps, first_step=plain_steps)
    return _compress(args, model, tokenizer, blocks, config, settings, recorder, text)


def _config(args: argparse.Namespace) -> Any:
    """Make the config of a run; how long to anneal is known when the data is."""
    from ..config import ClusterConfig

    return ClusterConfig(
        bits=args.bits,
        dim=args.dim,
        rows_per_lut=1 if args.rows_per_lut is None else args.rows_per_lut,
        softness=args.softness,
        anneal=args.anneal,
        max_iters=args.iters,
        embedding_bits=args.embedding_bits,
        skip=tuple(args.skip),
    )


def _print_plan(args: argparse.Namespace, blocks: Any, steps: int, plain_steps: int) -> None:
    """Print the counts of the data, and how it will be trained on."""
    from ..compressed.jsonfile import printable
    from . import distributed
    from .loop import named_precision

    print(
        f"data: {blocks.examples:,} examples, {blocks.tokens:,} tokens ({blocks.trained_tokens:,} trained on), "
        f"{len(blocks):,} blocks of {blocks.block_tokens}",
        flush=True,
    )
    for note in blocks.notes:
        print(f"data: {printable(note)}")
    if steps:
        print(
            f"training: {steps:,} steps of {args.batch * args.accumulate * distributed.world_size()} blocks, "
            f"{plain_steps:,} of them plain; lr {args.lr:g}, {named_precision(args.precision)}",
            flush=True,
        )


def _identity(args: argparse.Namespace, model: Any, tokenizer: Any, config: Any, settings: Any, plain_steps: int) -> dict[str, Any]:
    """Collect everything that the result of a run depends on: a run that is resumed must have the same."""
    # Not how the work is shared out, or when it is saved: another number of ranks may go on.
    free = ("batch", "accumulate", "fsdp", "save_every")
    return {
        **{key: value for key, value in vars(settings).items() if key not in free},
        "model": fingerprint(model),
        "blocks_per_step": settings.blocks_per_step,
        "config": config.to_json(),
        "block_tokens": args.block_tokens,
        "data": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "chat template": hashlib.sha256(json.dumps(getattr(tokenizer, "chat_template", None)).encode()).hexdigest(),
        "backend": args.backend,
        "start": args.start,
        "target_bpw": args.target_bpw,
        "plain_steps": plain_steps,
    }


def _to_device(model: Any, args: argparse.Namespace) -> str:
    """Move the model to the device it trains on, and name that; not one that is to be sharded and may be too large for one."""
    from .loop import pick_device

    device = pick_device()
    if not args.fsdp:
        model.to(device)
    return device


def _fine_tune(model: Any, blocks: Any, settings: Any, out: Path, recorder: Recorder) -> bool:
    """Fine-tune and save in `out`, unless that was done before; False if it was interrupted. Any rank reads the same from there."""
    from . import distributed

    if not out.is_file():
        if not _train(model, blocks, settings, out.with_name("plain-steps"), "plain fine-tuning", recorder):
            return False
        save_weights(out, model)
        distributed.run_on_rank0(lambda: shutil.rmtree(out.with_name("plain-steps")))
    return True


def _train(model: Any, blocks: Any, settings: Any, work: Path, phase: str, recorder: Recorder, teacher: Any = None) -> bool:
    """Train from the last checkpoint in `work`, if there is one; False if it was interrupted."""
    from . import distributed
    from .checkpoints import last_checkpoint
    from .loop import train

    resume = last_checkpoint(work) is not None
    result = train(model, blocks, settings, work, resume=resume, teacher=teacher, name=phase)
    recorder.phase(phase, result.seconds)
    recorder.losses(phase, settings.first_step, result.losses, interrupted=result.interrupted)
    if result.interrupted:
        if distributed.rank() == 0:
            say(f"edkm: interrupted after step {result.steps}, saved; the same command with --resume goes on")
        return False
    last = result.losses[-1][1]
    if not math.isfinite(last):
        raise ValueError(
            f"{phase}: the training diverged, its last loss is {last}. Start again with --overwrite and a lower --lr; if the first loss "
            f"({result.losses[0][1]:g}) is no better, the model or the data is damaged."
        )
    return True


def _compress(args, model, tokenizer, blocks, config, settings, recorder, text) -> int:
    from ..compressed.companions import copy_companions
    from ..compressed.jsonfile import write_json
    from ..config import ClusterConfig
    from ..modelfiles import model_files
    from . import distributed
    from .checkpoints import last_checkpoint

    work = args.out / "training"
    _to_device(model, args)
    began = time.perf_counter()
    teacher = copy.deepcopy(model) if settings.distill else None
    if last_checkpoint(work / "clustered") is not None:
        config = ClusterConfig.from_json(json.loads((work / "config.json").read_text()))
        report, _ = prepare_on(model, config, blocks, start="checkpoint", backend=args.backend)
    else:
        report, config = prepare_on(model, config, blocks, target_bpw=args.target_bpw, start=args.start, backend=args.backend)
        recorder.weights(model, "fitted")
        recorder.phase("calibration and fit", time.perf_counter() - began)
        if settings.steps:
            distributed.run_on_rank0(lambda: write_json(work / "config.json", config.to_json()))
    print(
        f"clustered {len(report.clustered)} tensors, left {len(report.skipped)} alone ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )
    for entry in report.skipped:
        if len(entry.shape) > 1:
            print(f"  {entry.name}: left alone, {entry.note}")
    if settings.steps and not _train(model, blocks, settings, work / "clustered", "clustered training", recorder, teacher):
        return 130
    if settings.steps:
        recorder.weights(model, "trained")
    began = time.perf_counter()
    if Path(args.model).suffix.lower() != ".gguf":
        # First: of the files that both have, those that are written now are the model's.
        distributed.run_on_rank0(lambda: copy_companions(model_files(args.model), args.out))
    write(args.out, model, tokenizer, config)
    recorder.phase("writing", time.perf_counter() - began)
    _measure(recorder, "packed", model, tokenizer, text, args)
    distributed.run_on_rank0(lambda: _finish(recorder, args.out, work))
    from ..compressed.checkpoint import summary
    from ..metrics import PAGE, RECORD

    totals = summary(args.out)
    shown_in = next(path for path in (args.out / PAGE, args.out / RECORD) if path.is_file())
    text = args.eval_text or "TEXT_FILE"
    print(
        f"wrote {args.out}: {totals['file_bytes'] / 1e6:.1f} MB, {totals['bits_per_weight']:.2f} bits per weight "
        f"(16-bit model: {totals['bytes_in_16_bits'] / 1e6:.1f} MB); {shown_in} shows it\n"
        + what_next(["generate", args.out, "Who are you?"], ["eval", args.out, "--text", text], ["inspect", args.out])
        + f'\nor in Python: import edkm; model = transformers.AutoModelForCausalLM.from_pretrained("{args.out}")'
    )
    return 0


def _measure(recorder: Recorder, name: str, model: Any, tokenizer: Any, text: str | None, args: argparse.Namespace) -> None:
    """Record the perplexity of a model, if a text was given; on all ranks, each of which may hold a part of the model."""
    if text is None or recorder.measured(name):
        return
    found = args.perplexity(model, tokenizer, text, window=args.block_tokens)
    recorder.measure(name, {"text": args.eval_text.name, **found})
    print(f"perplexity of {args.eval_text.name}, {name}: {found['perplexity']:.2f}", flush=True)


def _run_settings(args: Any, blocks: Any, settings: Any, plain_steps: int) -> dict[str, Any]:
    """Describe a run for its report: names to words and numbers."""
    from . import distributed
    from .loop import resolve_precision

    return {
        "model": args.model,
        "preset": args.preset,
        "start": args.start,
        "bits a linear weight asked for": args.target_bpw,
        "optimizer steps": settings.steps,
        "of these plain": plain_steps,
        "peak learning rate": args.lr,
        "tokens per step": settings.blocks_per_step * blocks.block_tokens,
        "tokens per block": blocks.block_tokens,
        "precision": resolve_precision(args.precision),
        "distillation": args.distill,
        "seed": args.seed,
        "processes": distributed.world_size(),
        "data": args.data.name,
        "examples": blocks.examples,
        "tokens trained on": blocks.trained_tokens,
    }


def _finish(recorder: Recorder, out: Path, work: Path) -> None:
    """Write the report, and remove the run: first the note of it, since what is left of one cannot be resumed."""
    recorder.finish(out)
    (work / "run.json").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def what_next(*commands: Sequence[Any]) -> str:
    """Show the commands to go on with, as they are typed here: `edkm` with each of these arguments."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    program = ["edkm"] if shutil.which("edkm") else [python, "-m", "edkm"]
    return "\n".join(["next:", *("  " + shlex.join(map(str, [*program, *command])) for command in commands)])


def _dry_run(model: Any, config: Any, args: argparse.Namespace, block_tokens: int) -> int:
    from . import distributed
    from .loop import pick_device
    from .memory import plan_memory
    from .prepare import plan

    report = plan(model, config)
    print(report)
    total = sum(p.numel() for p in model.parameters())
    if args.target_bpw is not None:
        print(f"bits are chosen in the run; this plan, its size and memory have {config.bits} in every linear weight")
    print(f"packed weights: {report.packed_bytes / 1e6:.1f} MB to expect (16-bit model: {total * 2 / 1e6:.1f} MB)")
    learners = args.learners or distributed.world_size()
    device = pick_device()
    how = "" if learners == 1 else f", {learners} processes, {'FSDP' if args.fsdp else 'DDP'}"
    print(f"training on {device}{how}:")
    budget = plan_memory(
        model,
        config,
        _settings(args, 1),
        block_tokens=block_tokens,
        learners=learners,
        device_type="cuda" if device == "cuda" else "cpu",  # a Mac's memory is one
        backend=args.backend,
    )
    print(budget)
    return 0


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory whose files a command would write over.

    Raises:
        ValueError: as `check_directory`, or `directory` holds something and `overwrite` is False.
    """
    check_directory(directory)
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"{directory}: is not empty; name another directory or add --overwrite")


def _steps(args: argparse.Namespace, blocks: int, learners: int) -> int:
    if args.steps is not None:
        return args.steps
    return max(1, math.ceil(blocks / (args.batch * args.accumulate * learners) * (1 if args.epochs is None else args.epochs)))


def _settings(args: argparse.Namespace, steps: int):
    from .loop import TrainSettings

    return TrainSettings(
        steps=steps,
        lr=args.lr,
        batch=args.batch,
        accumulate=args.accumulate,
        checkpointing=args.gradient_checkpointing,
        precision=args.precision,
        seed=args.seed,
        save_every=args.save_every,
        fsdp=args.fsdp,
        distill=args.distill,
    )


def _check_numbers(args: argparse.Namespace) -> None:
    at_least = {"steps": 0, "plain_steps": 0, "save_every": 0, "block_tokens": 2, "batch": 1, "accumulate": 1, "learners": 1, "seed": 0}
    for name, low in at_least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: at least {low}, got {value}.")
    if not 0 <= args.distill <= 1:
        raise ValueError(f"--distill: from 0 to 1, got {args.distill}.")
    for name in ("lr", "epochs", "timeout", "target_bpw"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"--{name.replace('_', '-')}: a positive number, got {value}.")
    if PRESETS[args.preset].chosen_bits and args.dim != 1:
        raise ValueError(f"--preset {args.preset}: chooses the bits of single weights. Leave out --dim, or take another preset.")
    if args.target_bpw is not None and (args.rows_per_lut is not None or args.dim != 1):
        raise ValueError("--target-bpw: chooses rows per table too, of single weights. Leave out --rows-per-lut and --dim, or give --bits.")
