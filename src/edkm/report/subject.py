"""What is known about a directory, packed or dense, as plain data for a page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edkm.report import record as records

NOT_RECORDED = "this directory has no edkm_report.json; edkm compress writes one"


@dataclass(frozen=True)
class Subject:
    """A model directory.

    Attributes:
        name: what to call it.
        directory: where it lies.
        config: of the model, without `quantization_config`.
        settings: how its tables were made, `{}` if it is dense.
        summary: of `compressed.checkpoint.summary`; of a dense directory the same totals and no tensors.
        tied: whether input and output embeddings are one tensor.
        record: of the run that made it, or None; `why_none` then says why.
        layers: as in a record; of the packed weights alone if there is no record.
        scores: perplexities and accuracies, as `edkm eval --json` writes them.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    settings: dict[str, Any]
    summary: dict[str, Any]
    tied: bool
    record: dict[str, Any] | None
    why_none: str
    layers: list[dict[str, Any]]
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def packed(self) -> bool:
        return bool(self.summary["tensors"])

    @property
    def linear(self) -> list[dict[str, Any]]:
        """The clustered tensors that are not embeddings."""
        return [tensor for tensor in self.summary["tensors"] if not tensor["embedding"]]


def look_at(directory: Path) -> Subject:
    """Everything a report says about a directory.

    Raises:
        ValueError: it is no model directory, a damaged one, or its record cannot be read.

    Cost:
        Headers, and the few tensors whose weights are drawn where no record has them.
    """
    config = _config(directory)
    quantization = config.pop("quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in (None, "edkm"):
        raise ValueError(f"{directory}: is quantized by {method!r}, of which a report knows nothing. Give an edkm or a dense directory.")
    packed = method == "edkm"
    record = records.read(directory) if packed else None
    if packed:
        from edkm.compressed import checkpoint

        summary = checkpoint.summary(directory)
        names = {tensor["name"] for tensor in summary["tensors"]}
        with checkpoint.open_items(directory) as items:
            names |= set(items)
    else:
        summary, names = _dense(directory)
    return Subject(
        name=record["model"] if record else directory.resolve().name,
        directory=directory,
        config=config,
        settings=quantization.get("settings", {}) if packed else {},
        summary=summary,
        tied=_tied(config, names),
        record=record,
        why_none="" if record else NOT_RECORDED if packed else "it is not a packed directory",
        layers=record["layers"] if record else _layers(directory, summary) if packed else [],
        scores=list(record["scores"]) if record else [],
    )


def _tied(config: dict[str, Any], names: set[str]) -> bool:
    """As the config says; configs leave out what is the default of their class, and then a head of its own tells."""
    said = config.get("tie_word_embeddings")
    return said if isinstance(said, bool) else not any(re.search(r"(^|\.)lm_head\.weight$", name) for name in names)


def _config(directory: Path) -> dict[str, Any]:
    from edkm.compressed.jsonfile import read_json

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: has no config.json. Give a directory that edkm compress wrote, or with --against a dense one too.")
    return read_json(directory / "config.json")


def _dense(directory: Path) -> tuple[dict[str, Any], set[str]]:
    """The totals of an ordinary checkpoint, from the headers of its files."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{directory}: has no *.safetensors. Save the model with save_pretrained.")
    shapes: dict[str, list[int]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as handle:
                shapes |= {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}). Fetch it again.") from error
    weights = sum(map(math.prod, shapes.values()))
    size = sum(path.stat().st_size for path in paths)
    return {
        "tensors": [],
        "dense_tensors": len(shapes),
        "dense_weights": weights,
        "weights": weights,
        "file_bytes": size,
        "bits_per_weight": 8 * size / weights if weights else None,
        "clustered_bits_per_weight": None,
        "bytes_in_16_bits": 2 * weights,
    }, set(shapes)


def _layers(directory: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The packed values of a few weights: what a directory without a record can still show."""
    from edkm.compressed import checkpoint
    from edkm.report.histogram import chosen, describe

    names = sorted((t["name"] for t in summary["tensors"] if not t["embedding"]), key=in_order)
    found = []
    with checkpoint.open_items(directory) as items:
        for name in chosen(names):
            frozen: Any = items[name].load()
            panel = describe(checkpoint.dequantize(frozen), len(frozen.lut), frozen.lut)
            found.append({"name": name, "tables": len(frozen.lut), "panels": [{"when": "packed", **panel}]})
    return found


def in_order(name: str) -> list[Any]:
    """A key that sorts names by their numbers: layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def place_of(name: str) -> tuple[int, str] | None:
    """`(layer, projection)` of a weight, such as `(3, "model.layers.self_attn.q_proj")`; None where there is no layer.

    What comes before the layer's number is kept: a model that sees and reads has two layers 3. Numbers after it too, but those of
    experts, which are one place.
    """
    found = re.search(r"^(|.*?\.)(\d+)\.(.+?)(?:\.weight)?$", name)
    return (int(found[2]), found[1] + re.sub(r"(expert\w*)\.\d+\b", r"\1", found[3])) if found else None


def with_scores(subjects: list[Subject], paths: list[Path]) -> list[dict[str, Any]]:
    """Files that `edkm eval --json` wrote, each with `of`: the name of the subject whose directory it measured, or the model's own.

    Raises:
        ValueError: a file is not one of these.
    """
    by_directory = {subject.directory.resolve(): subject for subject in subjects}
    recorded = [(subject, score) for subject in subjects for score in subject.scores]
    before = [score for _, score in recorded if score["model"] == "original"]
    found: list[dict[str, Any]] = []
    for subject, score in recorded:
        # Two runs of one model start from the same figure: it is said once.
        original = "original" if all(other == before[0] for other in before) else f"original of {subject.name}"
        # A record has the name of the directory that was compressed.
        dense = [s.name for s in subjects if not s.packed and subject.record and s.directory.resolve().name == subject.record["model"]]
        named = {**score, "of": subject.name if score["model"] == "packed" else (dense or [original])[0]}
        found += [] if named in found else [named]
    for path in paths:
        try:
            score = json.loads(path.read_text(encoding="utf-8"))
            score = records.checked(score, records.TASKS if "tasks" in score else records.PERPLEXITY)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: is not what edkm eval --json writes ({error}). Make it by: edkm eval MODEL ... --json FILE"
            ) from None
        subject = by_directory.get(Path(score["model"]).resolve())
        found.append({**score, "of": subject.name if subject else Path(score["model"]).name or score["model"]})
    return found
