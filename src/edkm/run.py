"""Load the files of a run and check everything before anything expensive is done; measure, and plan a dry run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edkm.calibrationtext import LAYER_BATCH, calibration_batches, check_room, written_blocks
from edkm.compressed.jsonfile import printable
from edkm.core.formats import TABLE
from edkm.evaluate import perplexity, perplexity_by_layer
from edkm.memory import GIB, plan_by_layer, plan_memory
from edkm.memorykinds import KINDS, choose_memory, first_fit, fits, free_memory, possible_kinds
from edkm.metrics import Recorder
from edkm.modelfiles import first_line
from edkm.models import load_model, model_shapes
from edkm.progress import progress, shown
from edkm.textfile import read_text
from edkm.train import checkpoints, distributed, loop
from edkm.train.allocate import bits_of, check_target
from edkm.train.calibrate import calibrate
from edkm.train.checkpoints import begin_run, check_same_run, fingerprint
from edkm.train.data import Blocks, make_blocks
from edkm.train.limits import tokens_to_score
from edkm.train.optimizers import check_optimizer, is_quantized
from edkm.train.prepare import Report, check, plan
from edkm.train.records import read_records
from edkm.train.skeleton import NotStreamable, Skeleton, open_skeleton
from edkm.train.stream import Stream, check_by_layer
from edkm.train.tracking import check_report_to

if TYPE_CHECKING:
    from edkm.recipe import Recipe

# Settings that may change when a run is resumed: how a step is shared out, and what is shown or saved meanwhile.
_FREE = ("preset", "epochs", "batch", "grad_accumulation", "fsdp", "timeout_s", "save_every", "report_to")


@dataclass
class Run:
    """State that the stages of a run share; from `load` on, its recipe has every number that depends on the model and the data."""

    source: str
    recipe: Recipe
    out: Path
    data: Path
    eval_text: Path | None = None
    resume: bool = False
    overwrite: bool = False
    text: str | None = None
    model: Any = None
    tokenizer: Any = None
    records: Any = None
    why: str = ""
    blocks: Any = None
    written: Blocks | None = None  # by the model, to calibrate on
    recorder: Any = None
    teacher: Any = None
    skeleton: Skeleton | None = None  # in the place of the model where the run goes layer by layer
    stream: Stream | None = None

    @property
    def work(self) -> Path:
        return self.out / "training"

    @property
    def packed(self) -> Path:
        """Name the directory of the packed model: that of the run, unless its tables are to be tuned."""
        return self.work / "packed" if self.recipe.tune_steps else self.out

    def to_device(self) -> str:
        """Move the model to the device it trains on and name that; a model that is to be sharded may be too large for one."""
        device = loop.pick_device()
        if not self.recipe.fsdp and self.skeleton is None:
            self.model.to(device)
        return device

    def measure(self, name: str) -> None:
        """Record the perplexity of the held-out text, unless there is none or an earlier part of the run did."""
        if self.text is None or self.eval_text is None or self.recorder.measured(name):
            return
        window = self.recipe.block_tokens
        if self.skeleton is None:
            found = perplexity(self.model, self.tokenizer, self.text, window=window)
        else:
            found = perplexity_by_layer(self.skeleton, self.tokenizer, self.text, self.work, window=window)
        self.recorder.measure(name, {"text": self.eval_text.name, **vars(found)})
        print(f"perplexity of {self.eval_text.name}, {name}: {found.perplexity:.2f}", flush=True)

    def identity(self) -> dict[str, Any]:
        """Return everything that the result of the run depends on."""
        template = json.dumps(getattr(self.tokenizer, "chat_template", None))
        return {
            **{name: value for name, value in asdict(self.recipe).items() if name not in _FREE},
            "config": self.recipe.config.to_json(),
            "blocks_per_step": self.recipe.training(1).blocks_per_step,
            "model": fingerprint(self.model.named_parameters() if self.skeleton is None else self.skeleton.stored()),
            "data": hashlib.sha256(self.data.read_bytes()).hexdigest(),
            "chat template": hashlib.sha256(template.encode()).hexdigest(),
        }

    def settings(self) -> dict[str, Any]:
        """Return the settings that the report shows, by name."""
        shown = {name.replace("_", " "): value for name, value in asdict(self.recipe).items() if not isinstance(value, Mapping | tuple)}
        return shown | {
            "model": self.source,
            "precision": loop.resolve_precision(self.recipe.precision),
            "processes": distributed.world_size(),
            "data": self.data.name,
            "examples": self.blocks.examples,
            "tokens trained on": self.blocks.trained_tokens,
        }


def check_out(run: Run) -> None:
    """Refuse an output directory that would lose files, a run that cannot be resumed, and trackers that are not there."""
    check_report_to(run.recipe.report_to)
    distributed.run_on_rank0(lambda: checkpoints.check_out(run.out, resume=run.resume, overwrite=run.overwrite))
    if run.recipe.fsdp:
        distributed.check_several_ranks()
    if run.recipe.tune_steps and distributed.world_size() > 1:
        raise ValueError("tune_steps: tables are tuned in one process. Leave it out, and use edkm tune afterwards without torchrun.")


def read(run: Run) -> None:
    """Read the data, before the model: a misspelt name should not cost the minutes of loading it."""
    # A resumed run goes on with the blocks that it began with: some chat templates write today's date.
    kept = run.work / "blocks.pt"
    if run.resume and kept.is_file():
        run.blocks = Blocks.read(kept)
    else:
        run.records = read_records(run.data)
    run.text = None if run.eval_text is None else read_text(run.eval_text)


def choose_kind(run: Run) -> None:
    """Choose how much memory training takes, if it is to be chosen, and make sure that its optimizer works here."""
    recipe = run.recipe
    if recipe.memory == "auto":
        kept = run.work / "run.json"
        if run.resume and kept.is_file():
            kind, why = json.loads(kept.read_text()).get("memory", "high"), "as in the interrupted run"
        elif recipe.steps == 0:
            kind, why = "high", ""
        else:
            kind, why = _fitting_kind(run)
        run.recipe, run.why = replace(recipe, memory=kind), why
        recipe = run.recipe
    if recipe.steps != 0:
        with progress("compiling the optimizer") if is_quantized(recipe.optimizer, recipe.memory) else nullcontext():
            check_optimizer(recipe.optimizer, recipe.memory, loop.pick_device())


def _fitting_kind(run: Run) -> tuple[str, str]:
    """Choose by the plan of the model's shapes; the same on all ranks."""
    recipe, device, ranks = run.recipe, loop.pick_device(), distributed.world_size()
    shapes = model_shapes(run.source)
    free = distributed.of_rank0(free_memory(device, ranks))
    try:
        return choose_memory(shapes, recipe.training(1), free, block_tokens=recipe.block_tokens, ranks=ranks, device_type=_type(device))
    except Exception as error:  # a plan runs code of transformers on tensors without data, which not every model is made for
        return "high", f"no plan could be made ({first_line(error)})"


def _type(device: str) -> str:
    return "cuda" if device == "cuda" else "cpu"  # a Mac's memory is one


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype in which a run loads and trains its weights."""
    return torch.bfloat16 if recipe.memory in ("low", "lower") else torch.float32


def load(run: Run) -> None:
    """Load the model, cut the data into blocks, and settle the numbers that depend on them."""
    _open(run)
    tokens = run.recipe.block_tokens
    if run.blocks is None:
        run.blocks = make_blocks(run.records, run.tokenizer, block_tokens=tokens, source=str(run.data), model=run.model)
    run.records = []
    if run.text is not None:
        tokens_to_score(run.model, run.tokenizer, run.text, window=tokens, source=str(run.eval_text))
    recipe = run.recipe.settled(len(run.blocks))
    if run.skeleton is not None:
        try:
            check_by_layer(run.skeleton, recipe.config, run.blocks.input_ids[:1, :16])
        except NotStreamable as reason:
            _hold(run, str(reason))
    if run.skeleton is None:
        check(run.model, recipe.config, recipe.backend)
    check_room(run)
    if recipe.chooses_bits:
        target = bits_of(run.model, recipe.config) if recipe.target_bpw is None else recipe.target_bpw
        check_target(run.model, recipe.config, target)
        recipe = replace(recipe, target_bpw=target)
    run.recipe = recipe
    _print_counts(run)


def _open(run: Run) -> None:
    """Open the model layer by layer where the run can go so, else load it."""
    if not run.recipe.streams or distributed.world_size() > 1:
        _hold(run)
        return
    try:
        with progress(f"opening {run.source}"):
            run.skeleton, run.tokenizer = open_skeleton(run.source, loop.pick_device())
        run.model = run.skeleton.model
    except NotStreamable as reason:
        _hold(run, str(reason))


def _hold(run: Run, reason: str = "") -> None:
    """Load the whole model; `reason` says why it does not go layer by layer."""
    run.skeleton = run.model = None
    with progress(f"loading {run.source}"):
        run.model, run.tokenizer = load_model(run.source, weights_dtype(run.recipe))
    if reason:
        print(f"memory: the whole model is held, not a layer at a time: {printable(reason)}", flush=True)


def go_by_layer(run: Run) -> None:
    """Go on with the fine-tuned model a layer at a time, each read from `finetuned.pt`, where its layers can be read one by one."""
    kept = run.work / "finetuned.pt"
    if distributed.world_size() > 1 or not kept.is_file():
        return
    try:
        skeleton = open_skeleton(run.source, loop.pick_device())[0].over(partial(checkpoints.kept_weights, kept))
        check_by_layer(skeleton, run.recipe.config, run.blocks.input_ids[:1, :16])
    except NotStreamable:
        return
    run.skeleton, run.model = skeleton, skeleton.model


def begin(run: Run) -> None:
    """Open the work directory, move the model to its device, and measure it as it is."""
    identity = run.identity()
    if run.resume:
        check_same_run(run.work, identity)
    else:
        distributed.run_on_rank0(lambda: shutil.rmtree(run.work) if run.work.exists() else None)
        distributed.run_on_rank0(lambda: begin_run(run.work, identity, run.blocks))
    print(f"device: {run.to_device()}", flush=True)
    if run.recipe.finetune_steps and not run.resume:
        # Values that are not finite before any training are no matter of the learning rate.
        with shown(False):
            calibrate(run.model, calibration_batches(run, 1))
    run.recorder = Recorder(run.work / "metrics.json", run.settings())
    run.recorder.keep(run.model, run.recipe.config, *(() if run.skeleton is None else (run.skeleton.read,)))
    run.measure("original")


def show_plan(run: Run) -> None:
    """Print what will be clustered, the size to expect and the memory that training needs."""
    recipe, found = run.recipe, plan(run.model, run.recipe.config)
    print(found)
    if recipe.target_bpw is not None:
        print(f"bits are chosen in the run; this plan, its size and memory have {recipe.config.bits} in every linear weight")
    weights = sum(p.numel() for p in run.model.parameters())
    print(f"packed weights: {found.packed_bytes / 1e6:.1f} MB to expect (16-bit model: {weights * 2 / 1e6:.1f} MB)")
    if run.skeleton is not None:
        print("compressed a layer at a time, read from the checkpoint:")
        tokens = run.blocks.block_tokens * (LAYER_BATCH if recipe.by_layer else 1)
        print(plan_by_layer(run.skeleton, recipe.config, tokens, trained=bool(recipe.by_layer)))
        if needed := check_room(run):
            print(f"before that it is in memory as a whole, to write text: {needed / GIB:.2f} GiB")
        return
    _show_memory(run)


def _show_memory(run: Run) -> None:
    """Print the peak of each kind of memory on this device, and the plan of the one that a run takes."""
    recipe, ranks, device = run.recipe, distributed.world_size(), loop.pick_device()
    settings, free = recipe.training(1, distill=recipe.distill), distributed.of_rank0(free_memory(device, ranks))
    shared = "" if ranks == 1 else f", {ranks} ranks, {'FSDP' if recipe.fsdp else 'DDP'}"
    print(f"training on {device}{shared}, {free / GIB:.1f} GiB free; peaks in GiB:")
    budgets, possible = {}, possible_kinds(settings)
    for kind, text in KINDS.items():
        if kind not in possible:
            print(f"  {kind:<6} {'-':>8}  not with the other settings  {text}")
            continue
        budgets[kind] = budget = plan_memory(
            run.model,
            recipe.config,
            replace(settings, memory=kind),
            block_tokens=run.blocks.block_tokens,
            ranks=ranks,
            device_type=_type(device),
        )
        print(f"  {kind:<6} {budget.peak / GIB:>8.2f}  {'fits' if fits(budget.peak, free) else 'does not fit':<12}  {text}")
    chosen = recipe.memory if recipe.memory != "auto" else first_fit({kind: budget.peak for kind, budget in budgets.items()}, free)
    print(f"{recipe.memory} takes {chosen}:" if recipe.memory == "auto" else f"{chosen}:")
    print(budgets[chosen])


def print_report(report: Report, seconds: float) -> None:
    """Print how many tensors were clustered, with what bits and error, and the matrices that were not."""
    if report.config.overrides:
        chosen = [entry for entry in report.clustered if entry.name in report.config.overrides]
        tables = Counter(entry.bits for entry in chosen if entry.format == TABLE)
        formats = Counter(entry.format for entry in chosen if entry.format != TABLE)
        counts = [f"{bits} in {count} tensors" for bits, count in sorted(tables.items())]
        print("bits: " + ", ".join(counts + [f"{name} in {count} tensors" for name, count in sorted(formats.items())]))
    errors = [entry.error for entry in report.clustered if entry.error is not None]
    if errors:
        mean = sum(errors) / len(errors)
        print(f"fitted {len(errors)} tensors; relative output error {mean:.4f} on average, {max(errors):.4f} at most")
    print(f"clustered {len(report.clustered)} tensors, left {len(report.skipped)} alone ({seconds:.0f} s)", flush=True)
    for entry in report.skipped:
        if len(entry.shape) > 1:
            print(f"  {entry.name}: left alone, {entry.note}")
    others: dict[tuple[str, str], list[str]] = {}
    for entry in report.clustered:
        if entry.instead_of:
            others.setdefault((entry.instead_of, entry.format), []).append(entry.name)
    for (asked, taken), names in others.items():
        print(f"  {asked} does not divide the columns of {len(names)} tensors, first {names[0]}: they have {taken}")


def _print_counts(run: Run) -> None:
    """Print the counts of the data and the steps of training."""
    recipe, blocks = run.recipe, run.blocks
    counts = f"{blocks.examples:,} examples, {blocks.tokens:,} tokens ({blocks.trained_tokens:,} trained on)"
    print(f"data: {counts}, {len(blocks):,} blocks of {blocks.block_tokens}")
    for note in blocks.notes:
        print(f"data: {printable(note)}")
    if count := written_blocks(recipe):
        print(
            f"calibration: {count} blocks that the model writes" + (", up to as many of the data" if recipe.calibration == "both" else "")
        )
    if recipe.steps:
        steps = f"{recipe.steps:,} steps of {recipe.training(1).blocks_per_step} blocks, {recipe.finetune_steps:,} of them fine-tuning"
        precision = loop.named_precision(recipe.precision) if recipe.memory in ("auto", "high") else "bfloat16 weights"
        print(f"training: {steps}; lr {recipe.lr:g}, {precision}")
        if run.why:
            print(f"memory: {recipe.memory}; {run.why}")
    if recipe.target_bpw is not None:
        print(f"bits: {recipe.target_bpw:.3f} per linear weight on average, tables included", flush=True)
