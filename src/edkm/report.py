"""Show a packed model as one HTML page: sizes, perplexities, losses, times, bits and error of each layer, weights and their tables.

The page is rendered by jinja2 from report.html.j2, its pictures are drawn by matplotlib (the extra `report`; imported when a page is
made). It is self-contained: nothing is loaded and no script runs. Numbers that were not recorded or measured are reported as missing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edkm import charts
from edkm._version import __version__
from edkm.metrics import PERPLEXITY, TASKS, checked, chosen, describe, read

_DIMENSIONS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "feed-forward size",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest context",
}
_SAME = ("text", "tokens", "windows", "window", "stride")  # perplexities can be compared if these are equal


@dataclass(frozen=True)
class Subject:
    """A model directory.

    Attributes:
        name: shown on the page.
        directory: of the files.
        config: of the model, without `quantization_config`.
        settings: of the clustering, `{}` if the model is dense.
        summary: of `compressed.checkpoint.summary`, layer 10 after layer 9; of a dense directory the same totals and no tensors.
        metrics: of the run that made it, or None; `missing` then has the reason.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    settings: dict[str, Any]
    summary: dict[str, Any]
    metrics: dict[str, Any] | None
    missing: str


def missing_package() -> str:
    """Name a package of the extra `report` that is not installed; "" if all are."""
    return next((name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None), "")


def page(directory: Path, against: Path | None = None, scores: list[Path] | None = None) -> str:
    """Render a packed model as one HTML page.

    Args:
        directory: packed by edkm.
        against: another packed directory, or a dense one, to compare with.
        scores: files that `edkm eval --json` wrote, of these models or of others.

    Raises:
        ValueError: a directory or a file is not of these kinds, or the extra `report` is not installed.

    Cost:
        Headers of the weights; where nothing was recorded, four tensors.
    """
    if missing := missing_package():
        raise ValueError(f"{missing} is needed for the report. Install it: pip install 'edkm[report]'.")
    import jinja2

    subjects = [load(directory)]
    if not subjects[0].summary["tensors"]:
        raise ValueError(f"{directory}: is not packed by edkm, and a report is about a packed model. Give a dense one with --against.")
    subjects += [load(against)] if against is not None else []
    if len({subject.name for subject in subjects}) < len(subjects):  # two runs of one model
        subjects = [replace(subject, name=f"{subject.name} ({subject.directory})") for subject in subjects]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"number": number, "bytes": size_text, "duration": duration, "memory": memory, "words": words}
    model, found = subjects[0], _scores(subjects, scores or [])
    curves, lost = _curves(subjects)
    packed = [subject for subject in subjects if subject.summary["tensors"]]
    measured = next((score for score in found if score["of"] == model.name and "perplexity" in score), None)
    histograms = model.metrics["histograms"] if model.metrics else _packed_histograms(model)
    html = environment.get_template("report.html.j2").render(
        version=__version__,
        model=model,
        models=subjects,
        dimensions=_dimensions(model.config),
        scores=found,
        measured=measured,
        others=[s for s in found if measured and s is not measured and all(s.get(key) == measured[key] for key in _SAME)],
        losses=charts.losses(curves),
        lost=lost,
        bits=charts.heat([(s.name, _grid(s, "bits_per_weight")) for s in packed], "bits per weight"),
        errors=charts.heat([(s.name, _grid(s, "error")) for s in packed], "log10 of the error", logarithmic=True),
        histograms=[(h, charts.histogram({panel["when"]: panel for panel in h["panels"]})) for h in histograms],
    )
    # JSON can name half of a character, which UTF-8 cannot write.
    return html.encode(errors="backslashreplace").decode()


def load(directory: Path) -> Subject:
    """Read everything that a report shows of a directory.

    Raises:
        ValueError: it is no model directory, or a damaged one.
    """
    from edkm.compressed import checkpoint
    from edkm.compressed.jsonfile import read_json

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: has no config.json. Give a directory that edkm compress wrote, or with --against a dense one too.")
    config = read_json(directory / "config.json")
    quantization = config.pop("quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in (None, "edkm"):
        raise ValueError(f"{directory}: is quantized by {method!r}, which a report cannot show. Give an edkm or a dense directory.")
    if method is None:
        return Subject(directory.resolve().name, directory, config, {}, _dense(directory), None, "it is not a packed directory")
    summary, (metrics, missing), settings = checkpoint.summary(directory), read(directory), quantization.get("settings")
    summary["tensors"].sort(key=lambda tensor: natural_order(tensor["name"]))
    name = metrics["model"] if metrics else directory.resolve().name
    return Subject(name, directory, config, settings if isinstance(settings, dict) else {}, summary, metrics, missing)


def _dense(directory: Path) -> dict[str, Any]:
    """Total up an ordinary checkpoint, from the headers of its files."""
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
    bits = 8 * size / weights if weights else None
    totals = {"weights": weights, "file_bytes": size, "bits_per_weight": bits, "bytes_in_16_bits": 2 * weights}
    return {"tensors": [], "dense_tensors": len(shapes), "clustered_bits_per_weight": None, **totals}


def _packed_histograms(subject: Subject) -> list[dict[str, Any]]:
    """Describe the packed values of a few weights, for a directory without metrics."""
    from edkm.compressed import checkpoint
    from edkm.core.assign import Frozen

    found = []
    with checkpoint.open_items(subject.directory) as items:
        for name in chosen(tensor["name"] for tensor in subject.summary["tensors"] if not tensor["embedding"]):
            frozen: Any = items[name].load()
            lut = frozen.lut if isinstance(frozen, Frozen) else frozen.entries()
            panel = describe(checkpoint.dequantize(frozen), len(lut), lut)
            found.append({"name": name, "tables": len(lut), "panels": [{"when": "packed", **panel}]})
    return found


def _scores(subjects: list[Subject], paths: list[Path]) -> list[dict[str, Any]]:
    """Collect recorded perplexities and files of `edkm eval --json`, each with `of`, the model it is of."""
    found: list[dict[str, Any]] = []
    recorded = [(subject, score) for subject in subjects if subject.metrics for score in subject.metrics["perplexities"]]
    before = [score for _, score in recorded if score["model"] == "original"]
    for subject, score in recorded:
        # Two runs of one model start from the same figure, which is then shown once.
        original = "original" if all(other == before[0] for other in before) else f"original of {subject.name}"
        named = {**score, "of": subject.name if score["model"] == "packed" else original}
        found += [] if named in found else [named]
    by_directory = {subject.directory.resolve(): subject.name for subject in subjects}
    for path in paths:
        try:
            score = json.loads(path.read_text(encoding="utf-8"))
            score = checked(score, TASKS if isinstance(score, dict) and "tasks" in score else PERPLEXITY)
        except ValueError as error:
            raise ValueError(f"{path}: is not a file of edkm eval --json ({error}). Make one: edkm eval MODEL ... --json FILE") from None
        found.append({**score, "of": by_directory.get(Path(score["model"]).resolve(), Path(score["model"]).name or score["model"])})
    return found


def natural_order(name: str) -> list[Any]:
    """Return a key that sorts names by their numbers: layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def place_of(name: str) -> tuple[int, str] | None:
    """Split a weight's name into (layer, projection), such as `(3, "model.layers.self_attn.q_proj")`; None where there is no layer.

    The name before the layer's number is kept: a model for images and text has two layers 3. Experts of a layer are one place.
    """
    found = re.search(r"^(|.*?\.)(\d+)\.(.+?)(?:\.weight)?$", name)
    return (int(found[2]), found[1] + re.sub(r"(expert\w*)\.\d+\b", r"\1", found[3])) if found else None


def _curves(subjects: list[Subject]) -> tuple[list[tuple[str, int, list[tuple[float, float]]]], int]:
    """Collect the loss curves of all models, for `charts.losses`, and count the losses that cannot be drawn."""
    curves, lost = [], 0
    for number, subject in enumerate(subjects):
        for series in subject.metrics["losses"] if subject.metrics else []:
            points = [(series["first_step"] + p[0], p[1]) for p in series["points"] if len(p) == 2]
            drawn = [point for point in points if all(abs(value) < 1e30 for value in point)]
            lost += len(points) - len(drawn)
            name = series["name"] if len(subjects) == 1 else f"{subject.name}: {series['name']}"
            curves += [(name, number, drawn)] if drawn else []
    return curves, lost


def _grid(subject: Subject, key: str) -> charts.Cells:
    """Average a value over the weights at each place, which is one tensor unless there are experts."""
    sums: dict[tuple[int, str], list[float]] = {}
    for tensor in subject.summary["tensors"]:
        if not tensor["embedding"] and (place := place_of(tensor["name"])) is not None:
            total = sums.setdefault(place, [0.0, 0.0])
            total[0] += math.prod(tensor["shape"]) * tensor[key]
            total[1] += math.prod(tensor["shape"])
    return {place: value / weights for place, (value, weights) in sums.items()}


# Numbers and words of the page.


def _dimensions(config: dict[str, Any]) -> dict[str, Any]:
    """Look up sizes of the model, which a model for images and text has in its `text_config`."""
    inner = config.get("text_config")
    values = (inner if isinstance(inner, dict) else {}) | config
    return {text: values.get(key) for key, text in _DIMENSIONS.items()}


def number(value: float | None, digits: int = 3) -> str:
    """Format a number; a dash if there is none."""
    if value is None or math.isnan(value):
        return "—"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.{digits}e}"


def size_text(size: float) -> str:
    """Format bytes; 1 MB is 1,000,000."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float | None) -> str:
    """Format seconds; a dash if there is no number."""
    if seconds is None or not 0 <= seconds < 1e9:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(mib: float | None) -> str:
    """Format MiB; a dash if there is no number."""
    if mib is None or not math.isfinite(mib):
        return "—"
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def words(value: Any) -> str:
    """Format a setting of any type."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
