"""Make one row of the study: spend its budget of tokens, compress the small model, and score it on both held-out texts."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.small_model import HELDOUT, WINDOW, score

BATCH = 8
STEP_TOKENS = BATCH * WINDOW
START_TOKENS = 1_000_000  # of plain fine-tuning before every budget
START_LR = 1e-3
CALIBRATION_BLOCKS = 64
LAYER_TOKENS = 262_144  # at most by layer, where clustered steps of the whole model follow
GROUP = 64
FORMS = ("1", "2", "3", "4", "q2_k")
LIBRARIES = {"gptq": "run_llmcompressor.py", "autoround": "run_autoround.py"}


class Row(NamedTuple):
    """How a row spends its budget: shares of plain steps, of training by layer and of tuning tables; the rest are clustered steps.

    `divergence` is that from the model as it was when it was clustered, in the place of the loss of the data.
    """

    plain: float = 0.0
    softness: float = 0.0
    divergence: str = ""
    stages: bool = False
    layers: float = 0.0
    tables: float = 0.0


ROWS = {
    "control": Row(plain=1),
    "gptq": Row(plain=1),
    "autoround": Row(plain=1),
    "fit": Row(plain=1),
    "soft": Row(softness=0.5),
    "straight": Row(),
    "soft-kl": Row(softness=0.5, divergence="kl"),
    "straight-kl": Row(divergence="kl"),
    "straight-jsd": Row(divergence="jsd"),
    "stages": Row(softness=0.5, divergence="kl", stages=True),
    "half": Row(plain=0.5, softness=0.5, divergence="kl"),
    "most": Row(plain=0.75, softness=0.5, divergence="kl"),
    "most-data": Row(plain=0.75, softness=0.5),
    "half+layers+tables": Row(plain=0.5, layers=0.25, tables=0.25, divergence="kl"),
    "most+layers": Row(plain=0.75, softness=0.5, divergence="kl", layers=0.05),
    "most+layers+tables": Row(plain=0.75, divergence="kl", layers=0.05, tables=0.2),
    "layers": Row(layers=1),
    "layers+tables": Row(layers=0.5, tables=0.5),
    "layers+tables-kl": Row(layers=0.5, tables=0.5, divergence="kl"),
    "layers+straight-kl": Row(layers=0.5, divergence="kl"),
    "layers+soft-kl": Row(layers=0.5, softness=0.5, divergence="kl"),
}


class Spec(NamedTuple):
    """One result: a row in a form (bits of a free table a row, or a format), for a budget, a seed and a learning rate."""

    row: str
    form: str
    tokens: int
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.row},{self.form},{self.tokens},{self.seed},{self.lr:g}"

    @classmethod
    def parse(cls, name: str) -> Spec:
        row, form, tokens, seed, lr = name.split(",")
        return cls(row, form, int(tokens), int(seed), float(lr))

    @property
    def steps(self) -> int:
        return self.tokens // STEP_TOKENS

    def starts(self) -> list[Spec]:
        """List the controls that it starts from: that of no budget, and for rows that end with a fit that of their budget."""
        first = Spec("control", "16", 0, 0, 0.0)
        return [first, self._replace(row="control", form="16")] if self.tokens and ROWS[self.row].plain == 1 else [first]

    def exists(self) -> bool:
        """Whether there is such a row: a budget of nothing leaves nothing to do but to fit, and a control has no form."""
        if self.row == "control":
            return self.form == "16" and (self.tokens > 0) == (self.lr > 0)
        if (self.row in LIBRARIES and self.form in ("1", "q2_k")) or (self.row == "stages" and self.form == "4"):
            return False
        return self.tokens > 0 or self.row in ("fit", *LIBRARIES)


def run(out: Path, spec: Spec, baselines: Path) -> None:
    """Make a row and write its result."""
    from edkm.memory import peak_mib

    work, began = out / "work" / spec.name, time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    maker = _control if spec.row == "control" else _compressed
    model, bits = maker(out, work, spec, baselines)
    found = {**spec._asdict(), "bits": bits, "seconds": time.perf_counter() - began, "peak_mib": peak_mib()}
    model.eval()
    found |= {text: score(model, out, text) for text in HELDOUT}
    if spec.row == "control":
        _save(model, out, spec)
    part = out / "rows" / f"{spec.name}.part"
    part.write_text(json.dumps(found))
    part.replace(part.with_suffix(".json"))
    shutil.rmtree(work)


def _blocks(out: Path) -> Any:
    """Read the blocks of the fine-tuning text; the first row tokenizes it."""
    from edkm.models import load_tokenizer
    from edkm.train.data import Blocks, load_blocks

    kept = out / "finetuning.pt"
    if not kept.is_file():
        tokenizer = load_tokenizer(out / "model", out / "model")
        load_blocks(out / "data" / "finetuning.jsonl", tokenizer, block_tokens=WINDOW).save(kept)
    return Blocks.read(kept)


def _checkpoint(out: Path, control: Spec) -> Path:
    return out / "controls" / control.name


def _save(model: Any, out: Path, control: Spec) -> None:
    from edkm.models import load_tokenizer

    folder = _checkpoint(out, control)
    model.save_pretrained(folder)
    load_tokenizer(out / "model", out / "model").save_pretrained(folder)


def _train(model: Any, blocks: Any, spec: Spec, steps: int, work: Path, done: int, **more: Any) -> None:
    """Train for some steps, after `done` of the budget; go on from a checkpoint if there is one."""
    from edkm.train import loop, runstate

    if not steps:
        return
    teacher = more.pop("teacher", None)
    first = (START_TOKENS if spec.tokens else 0) // STEP_TOKENS + done
    settings = loop.TrainSettings(steps, spec.lr, BATCH, seed=spec.seed, first_step=first, save_every=250, **more)
    resume = runstate.last_checkpoint(work) is not None
    loop.train(model, blocks, settings, work, resume=resume, teacher=teacher, name=spec.name).check(spec.name)


def _control(out: Path, work: Path, spec: Spec, baselines: Path) -> tuple[Any, float]:
    """Fine-tune the model as it is: from the small model to the start of all budgets, or from there with the budget."""
    from edkm.models import load_model

    if spec.tokens:
        model = load_model(_checkpoint(out, spec.starts()[0]))[0]
        _train(model, _blocks(out), spec, spec.steps, work / "plain", 0)
    else:
        model = load_model(out / "model")[0]
        _train(model, _blocks(out), spec._replace(lr=START_LR), START_TOKENS // STEP_TOKENS, work / "plain", 0)
    return model, 16.0


def _compressed(out: Path, work: Path, spec: Spec, baselines: Path) -> tuple[Any, float]:
    from edkm.models import load_model, load_tokenizer

    row, start = ROWS[spec.row], _checkpoint(out, spec.starts()[-1])
    model = load_model(start)[0]
    if spec.row in LIBRARIES:
        return _quantized(out, work, start, model, spec, baselines)
    blocks, plain = _blocks(out), round(spec.steps * row.plain) if row.plain < 1 else 0
    _train(model, blocks, spec, plain, work / "plain", 0)
    teacher = copy.deepcopy(model) if row.divergence else None
    tables = round(spec.steps * row.tables)
    clustered = 0 if row.layers == 1 or row.tables or row.plain == 1 else spec.steps - plain
    if row.stages:
        _cluster(model, blocks, row, spec._replace(form="4"), clustered // 2)
        _train(model, blocks, spec, clustered // 2, work / "first", plain)
        model, prepared = load_model(start)[0], dict(model.named_parameters())
        model.load_state_dict({name: prepared[name] for name, _ in model.named_parameters()}, strict=False)
        plain, clustered = plain + clustered // 2, clustered - clustered // 2
    passes = int(spec.tokens * row.layers)
    if clustered and passes:
        passes = min(passes, LAYER_TOKENS)
        clustered -= passes // STEP_TOKENS
    bits = _cluster(model, blocks, row, spec, clustered, passes)
    more: dict[str, Any] = {"distill": 1.0, "divergence": row.divergence, "teacher": teacher} if teacher is not None else {}
    _train(model, blocks, spec, clustered, work / "clustered", plain, **more)
    if tables:
        model = _tune(model, load_tokenizer(start, start), blocks, spec, tables, work, **more)
    return model, bits


def _cluster(model: Any, blocks: Any, row: Row, spec: Spec, steps: int, passes: int = 0) -> float:
    """Cluster a model for a number of steps to come, by layer if so many tokens are to be spent on that; return the bits a weight."""
    import edkm
    from edkm.calibrationtext import LAYER_BATCH
    from edkm.train.allocate import bits_of

    form: dict[str, Any] = {"bits": int(spec.form), "rows_per_lut": 1} if spec.form.isdigit() else {"format": spec.form}
    config = edkm.ClusterConfig(softness=row.softness, anneal_steps=steps if row.softness else 0, **form)
    by_layer, batches = None, _batches(blocks, CALIBRATION_BLOCKS)
    if passes:
        by_layer = edkm.LayerTraining(epochs=2, precision="bf16", seed=spec.seed)
        batches = _batches(blocks, max(CALIBRATION_BLOCKS, passes // by_layer.epochs // WINDOW), LAYER_BATCH)
    bits = bits_of(model, config)
    edkm.prepare(model, config, batches, by_layer=by_layer)
    return bits


def _batches(blocks: Any, count: int, size: int = 1) -> list[dict[str, Any]]:
    """Choose blocks spread over the text, in batches."""
    return [{"input_ids": batch} for batch in blocks.spread(count).split(size) if len(batch) == size]


def _tune(model: Any, tokenizer: Any, blocks: Any, spec: Spec, steps: int, work: Path, teacher: Any = None, **more: Any) -> Any:
    """Pack the model, and train its tables with its indices fixed."""
    import edkm
    from edkm.train import loop, runstate
    from edkm.tuning import Tuning, load_tunable

    packed = work / "packed"
    edkm.save(model, packed, tokenizer)
    tunable = load_tunable(packed)[0]
    settings = Tuning(steps=steps, batch=BATCH, seed=spec.seed).training(len(blocks), False)
    settings = replace(settings, first_step=START_TOKENS // STEP_TOKENS + spec.steps - steps, **more)
    resume = runstate.last_checkpoint(work / "tables") is not None
    loop.train(tunable, blocks, settings, work / "tables", resume=resume, teacher=teacher, name=f"{spec.name}: tables").check(spec.name)
    return tunable


def _quantized(out: Path, work: Path, start: Path, model: Any, spec: Spec, baselines: Path) -> tuple[Any, float]:
    """Quantize the control by a library, in the environment of the baselines, calibrated on the same blocks as the fit."""
    from safetensors.torch import load_file, save_file

    from benchmarks.compare.making import run_library

    if not baselines.is_file():
        raise SystemExit(f"{baselines}: is not there. Make it (make baselines), or leave {spec.row} out of --rows.")
    calibration = work / "calibration.safetensors"
    save_file({"input_ids": _blocks(out).spread(CALIBRATION_BLOCKS).contiguous()}, calibration)
    words = ["--bits", spec.form, "--group", GROUP, "--skip", "lm_head"]
    files = {"model": start, "calibration": calibration}
    run_library(baselines.absolute(), LIBRARIES[spec.row], spec.row, files, words, work, spec.name)
    model.load_state_dict(load_file(work / "weights.safetensors"), strict=False)
    return model, int(spec.form) + (16 + int(spec.form)) / GROUP
