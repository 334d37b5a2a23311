"""The sections of the page. Each says what is missing instead of leaving it out."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from edkm.report import charts, parts
from edkm.report.record import finite
from edkm.report.subject import Subject

_SAME = ("text", "tokens", "windows", "window", "stride")  # perplexities are of one kind if these are equal
_HOW = "edkm eval MODEL --text FILE --json scores.json, then edkm report DIR --eval scores.json"


def comparable(score: dict[str, Any], scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The other perplexities of the same windows of the same text."""
    return [
        other for other in scores if other is not score and "perplexity" in other and all(other[field] == score[field] for field in _SAME)
    ]


def side_by_side(subjects: list[Subject], scores: list[dict[str, Any]]) -> str:
    """The figures of both models in one table."""

    def time(s: Subject) -> str:
        return parts.duration(sum(p["seconds"] for p in s.record["phases"])) if s.record else "not recorded"

    def peak(s: Subject) -> str:
        return parts.memory(max((p["peak_mib"] for p in s.record["phases"]), default=None)) if s.record else "not recorded"

    def perplexity(s: Subject) -> str:
        found = [parts.fraction(x["perplexity"], 2) for x in scores if x["of"] == s.name and "perplexity" in x]
        return ", ".join(found) or "not measured"

    rows = [
        ("Size", *(parts.megabytes(s.summary["file_bytes"]) for s in subjects)),
        ("Weights", *(f"{s.summary['weights']:,}" for s in subjects)),
        ("Bits per weight, over all", *(parts.fraction(s.summary["bits_per_weight"]) for s in subjects)),
        ("Bits per weight, linear layers", *(parts.fraction(s.summary["clustered_bits_per_weight"]) for s in subjects)),
        ("Clustered tensors", *(f"{len(s.summary['tensors']):,}" for s in subjects)),
        ("Clustering error, median of linear layers", *(_median(s) for s in subjects)),
        ("Perplexity", *(perplexity(s) for s in subjects)),
        ("Made in", *(time(s) for s in subjects)),
        ("Peak memory", *(peak(s) for s in subjects)),
    ]
    return parts.section("beside", "Side by side", parts.table("Both models", ["", *(s.name for s in subjects)], rows, names=True))


def _median(subject: Subject) -> str:
    return parts.power(statistics.median(t["error"] for t in subject.linear), 2) if subject.linear else "—"


def size(subjects: list[Subject]) -> str:
    """Bars for the model in 16 bits, packed, and the other one."""
    subject = subjects[0]
    rows = [(f"{subject.name}, in 16 bits", _bytes(subject, packed=False))]
    rows += [(s.name + (", packed" if s.packed else ", dense"), _bytes(s, packed=True)) for s in subjects]
    marks = [("linear", "", "linear layers"), ("embedding", "", "embeddings"), ("dense", "", "not clustered")]
    return parts.section("size", "Size", parts.bars(rows), parts.key(marks))


def _bytes(subject: Subject, *, packed: bool) -> dict[str, int]:
    """Bytes of linear layers, embeddings, and everything else with the files' headers."""
    found = {"linear": 0, "embedding": 0}
    for tensor in subject.summary["tensors"]:
        found["embedding" if tensor["embedding"] else "linear"] += tensor["stored_bytes"] if packed else 2 * math.prod(tensor["shape"])
    total = subject.summary["file_bytes" if packed else "bytes_in_16_bits"]
    return {**found, "dense": total - sum(found.values())}


def quality(subjects: list[Subject], scores: list[dict[str, Any]]) -> str:
    """Perplexities and accuracies, as far as they were measured."""
    texts = [score for score in scores if "perplexity" in score]
    body = []
    if texts:
        head = ["model", "text", "perplexity", "tokens scored", "windows"]
        rows = [
            (
                s["of"],
                Path(s["text"]).name,
                parts.fraction(s["perplexity"]),
                f"{s['tokens']:,}",
                f"{s['windows']:,} of {s['window']:,} tokens",
            )
            for s in texts
        ]
        body += [parts.table("Perplexity", head, rows), parts.note("Lower is better. Only equal texts and windows can be compared.")]
    else:
        body.append(parts.missing(f"Perplexity was not measured. To have it here: {_HOW}."))
    tasks = [(s["of"], name, task) for s in scores for name, task in s.get("tasks", {}).items()]
    if tasks:
        rows = [(of, name, f"{t['items']:,}", _accuracy(t, ""), _accuracy(t, "normalised_")) for of, name, t in tasks]
        body.append(parts.table("Tasks", ["model", "task", "items", "accuracy", "normalised accuracy"], rows))
    return parts.section("quality", "Quality", *body)


def _accuracy(task: dict[str, Any], kind: str) -> str:
    value, error = (task[f"{kind}accuracy{end}"] for end in ("", "_stderr"))
    if math.isnan(value):
        return "—"
    return f"{value:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def training(subjects: list[Subject]) -> str:
    """Loss curves, and time and memory by phase."""
    subject = subjects[0]
    record = subject.record
    if record is None:
        body = [parts.missing(f"Losses, time and memory were not recorded: {subject.why_none}.")]
        return parts.section("training", "Training", *body)
    phases = record["phases"]
    gpu = any(phase["peak_gpu_mib"] is not None for phase in phases)
    rows = [
        [p["name"], parts.duration(p["seconds"]), parts.memory(p["peak_mib"]), *([parts.memory(p["peak_gpu_mib"])] if gpu else [])]
        for p in phases
    ]
    rows.append(["in all", parts.duration(sum(p["seconds"] for p in phases)), *[""] * (2 if gpu else 1)])
    head = ["phase", "time", "peak memory so far", *(["on the GPU"] if gpu else [])]
    costs = parts.table("Time and memory", head, rows, total=True)
    if record["lost_runs"]:
        costs += parts.missing(f"Partial: {record['lost_runs']} interrupted run(s) ended before their time could be saved.")
    return parts.section("training", "Training", parts.columns([f"<div>{_losses(subjects)}</div>", f"<div>{costs}</div>"]))


def _losses(subjects: list[Subject]) -> str:
    """The curves of both models, and a table of their values."""
    series, marks, lost, rows = [], [], 0, []
    starts: dict[float, set[int]] = {}  # a step to whose clustering starts after it
    for i, subject in enumerate(subjects):
        for number, one in enumerate(subject.record["losses"] if subject.record else []):
            shifted = [[one["first_step"] + step, loss] for step, loss in one["points"]]
            points = finite(shifted)
            lost += len(shifted) - len(points)
            rows += [(subject.name, one["name"], f"{step:g}", parts.fraction(loss, 4)) for step, loss in shifted]
            if not points:
                continue
            kind = ("one", "two")[number % 2] if i == 0 else "other"
            series.append(charts.Series(f"{subject.name}, {one['name']}", kind, points))
            if one["first_step"]:
                starts.setdefault(one["first_step"], set()).add(i)
            words = one["name"] if len(subjects) == 1 else subject.name if i else f"{subject.name}: {one['name']}"
            mark = ("dashed" if i else "line", f"border-color:var(--{'three' if i else kind})", words)
            marks += [] if mark in marks else [mark]
    body = []
    if series:
        said = [(step, _STARTS[tuple(sorted(whose))]) for step, whose in starts.items()]
        body += [parts.picture(charts.losses(series, said), "Training loss"), parts.key(marks)]
        body += [parts.note(words) for words in map(_mixture, subjects) if words]
        head = ["model", "phase", "step", "loss"]
        body.append(parts.folded("Losses as a table", parts.table("Losses", head, rows, tall=True)))
    elif not rows:
        body.append(parts.missing("There was no training: the weights were clustered as they are."))
    if lost:
        body.append(parts.missing(f"{lost} of the losses are not finite and are not drawn: the training diverged."))
    body += [parts.missing(f"{s.name}: no losses, {s.why_none}.") for s in subjects[1:] if s.record is None]
    return "".join(body)


_PANELS = {
    "fitted": "Before training: fitted tables",
    "trained": "After training: packed tables",
    "packed": "The packed values and their tables",
}


_STARTS = {(0,): "clustered from here", (1,): "the other from here", (0, 1): "both clustered from here"}


def _mixture(subject: Subject) -> str:
    """What the loss of clustered training is, if it is not that of plain fine-tuning."""
    share = subject.record["settings"].get("distillation") if subject.record else None
    if not isinstance(share, float) or not 0 < share <= 1:
        return ""
    return (
        f"{subject.name}: the loss of its clustered training is a mixture. {share:g} of it is the divergence from the predictions of the "
        f"model before it was clustered, {1 - share:g} the cross entropy of the text, which alone is the loss of plain fine-tuning."
    )


def weights(subject: Subject) -> str:
    """Histograms of a few weights with their centroids."""
    if not subject.layers:
        return parts.section("weights", "Weights and tables", parts.missing("No linear layer is clustered: there is nothing to draw."))
    words = (
        "A few weights of different kinds, from the first layers to the last. Rows that share a table are in units of their own root mean "
        "square, so that all tables lie on one axis."
    )
    if subject.record is None:
        words += f" The weights before packing were not recorded ({subject.why_none}): what is drawn are the packed values."
    pictures, beyond, vectors = [], 0, False
    for layer in subject.layers:
        by_name = {panel["when"]: panel for panel in layer["panels"]}
        original = by_name.get("original")
        drawn = [(_PANELS[when], by_name[when], original) for when in _PANELS if when in by_name]
        beyond += sum(panel["outside"] for panel in by_name.values())
        vectors |= any(not panel["centroids"] for _, panel, _ in drawn)
        one = layer["tables"] == 1
        pictures.append(
            parts.picture(
                charts.histogram(drawn, layer["name"]), layer["name"], f"{layer['tables']:,} table{'' if one else 's'}" + _median_words(one)
            )
        )
    marks = [
        ("line", "border-color:var(--two)", "centroids, the middle one of all tables"),
        ("", "background:var(--two);height:4px;vertical-align:3px", "where they lie in half of the tables"),
        ("", "background:var(--area)", "weights"),
    ]
    if subject.record is not None:
        marks.append(("line", "border-color:var(--ink);border-width:1px", "the original weights"))
    body = [parts.note(words), parts.key(marks), parts.columns(pictures)]
    if beyond:
        body.append(parts.note(f"Beyond the edges of these pictures: {beyond:,} of the weights."))
    if vectors:
        body.append(parts.note("Centroids that are vectors have no place on one axis and are not drawn."))
    return parts.section("weights", "Weights and tables", *body)


def _median_words(one: bool) -> str:
    return "" if one else "; lines are medians over them"


def settings(subjects: list[Subject]) -> str:
    """The model's dimensions, and how it was clustered and trained."""
    subject = subjects[0]
    names = {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden size",
        "intermediate_size": "feed-forward size",
        "num_attention_heads": "attention heads",
        "num_key_value_heads": "key and value heads",
        "vocab_size": "vocabulary",
        "max_position_embeddings": "longest context",
    }
    inner, overrides = subject.config.get("text_config"), subject.settings.get("overrides")
    config = {**(inner if isinstance(inner, dict) else {}), **subject.config}
    model = [(words, _say(config[key])) for key, words in names.items() if config.get(key) is not None]
    how = {key.replace("_", " "): _say(value) for key, value in subject.settings.items() if key != "overrides"}
    if isinstance(overrides, dict) and overrides:
        how["settings of their own"] = f"{len(overrides):,} tensors"
    body = [parts.facts(model)]
    body.append(parts.heading("Clustering") + (parts.facts(how.items()) if how else parts.missing("No settings are stored.")))
    recorded = subject.record["settings"] if subject.record else {}
    run = parts.facts((k.replace("_", " "), _say(v)) for k, v in recorded.items()) if recorded else ""
    body.append(parts.heading("Training") + (run or parts.missing(f"Not recorded: {subject.why_none}.")))
    return parts.section("settings", "Model and settings", *body)


def _say(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
