"""Make one table from the results of the stages: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.compare.methods import METHODS
from benchmarks.compare.stage import path_of
from edkm.compressed.jsonfile import dumps


def row(out: Path, name: str, texts: list[str], error: str | None) -> dict[str, Any]:
    """Collect the figures of a method; those of stages that are not done are missing or None.

    `linear_bits` and `total_bits` are bits a weight; `texts` maps a text to its `Perplexity`, `tasks` each task that was scored to its
    `TaskScore`; `perplexity` is that of the first text.
    """
    made = _read(out, name, "make")
    found = {text: stage for text in texts if (stage := _read(out, name, f"perplexity:{text}"))}
    first = found.get(texts[0], {})
    scores: dict[str, Any] = {}
    for path in sorted((out / name).glob("task-*.json")):
        scores |= json.loads(path.read_text())["scores"]
    keys = ("linear_bits", "total_bits", "bytes", "seconds", "peak_mib", "peak_gpu_mib", "block", "blocks", "target_bpw")
    keys += ("iterations", "batch", "precision", "version")
    return {
        "method": name,
        "title": METHODS[name].title,
        **{key: made.get(key) for key in keys},
        "perplexity": first.get("perplexity"),
        "texts": {text: {key: stage[key] for key in ("perplexity", "tokens", "windows")} for text, stage in found.items()},
        "most_distinct": first.get("most_distinct"),
        "tasks": scores,
        "error": error,
    }


def _read(out: Path, name: str, stage: str) -> dict[str, Any]:
    path = path_of(out, name, stage)
    return json.loads(path.read_text()) if path.is_file() else {}


def notes(settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Explain the table in notes."""
    original = rows[0]
    groups = next((r["block"][1] for r in rows if METHODS[r["method"]].block == "group" and r["block"]), None)
    found = [
        *(
            f"Perplexity: {Path(settings['texts'][name]['path']).name} (sha256 {settings['texts'][name]['sha256'][:12]}), "
            f"{text['tokens']:,} tokens in {text['windows']} windows of {settings['window']}."
            for name, text in original["texts"].items()
        ),
        f"Training: {settings['steps']} steps of {settings['batch']} blocks of {settings['block_tokens']} tokens of "
        f"{Path(settings['data']).name}, seed {settings['seed']}; one run.",
        "Bits: a weight of the linear layers with tables, scales and zero points, and a weight of the whole model. Embeddings, and a last "
        "linear layer over the vocabulary, take 8 bits: a scale and a zero point a row, or for dkm and edkm one table a tensor (a last "
        "linear layer of its own stays in 16 bits there).",
        "Size: of the packed weight files for dkm and edkm; for the others what their bits come to, since they are stored dense here.",
        "Making: seconds to train or calibrate, and the largest resident set of that process (and its tensors on a GPU).",
    ]
    target = next((r["target_bpw"] for r in rows if r["method"] == "edkm"), None)
    if target is not None:
        found.insert(-2, f"edkm: `edkm compress --target-bpw {target:g}` with its defaults: no more bits than the methods with groups.")
    calibrated = [f"{r['method']} {r['blocks']}" for r in rows if r["blocks"]]
    if calibrated:
        found.insert(-2, f"Calibration, in blocks of {settings['block_tokens']} tokens of the training data: {', '.join(calibrated)}.")
    if groups:
        found.insert(
            -2, f"rtn, smoothquant, awq, gptq, autoround: asymmetric groups of {groups} columns, scale in 16 bits, zero point as the index."
        )
    found[-2:-2] = [
        f"{r['method']}: version {r['version']}, {r['iterations']} iterations of each layer on {r['batch']} blocks, in {r['precision']}."
        for r in rows
        if r["iterations"]
    ]
    if any(r["tasks"] for r in rows):
        items = "all items" if settings["limit"] is None else f"the first {settings['limit']} items"
        found.append(f"Tasks: accuracy in percent and its standard error, on {items} of each as `python -m benchmarks tasks` writes them.")
    return found


def as_text(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """Align the columns."""
    cells = [_header(rows), *(_cells(row, rows) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]).rstrip() for line in cells
    ]
    return "\n".join([*lines, "", *notes, *_errors(rows)])


def as_markdown(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """Format a table of GitHub's Markdown, with the notes under it."""
    header = _header(rows)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(_cells(row, rows) for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*text, "", *(f"- {note}" for note in [*notes, *_errors(rows)]), ""])


def as_json(rows: list[dict[str, Any]], notes: list[str], settings: dict[str, Any]) -> str:
    """Format everything, with inf and nan as strings, which JSON does not have."""
    return dumps({"settings": settings, "rows": rows, "notes": notes}) + "\n"


def brief(found: dict[str, Any]) -> str:
    """Describe one stage in a line."""
    if "perplexity" in found:
        return _number(found["perplexity"])
    if "scores" in found:
        return ", ".join(f"{name} {_score(score)}" for name, score in found["scores"].items())
    return f"{found['linear_bits']:.2f} bits a weight, {found['seconds']:.0f} s, {found['peak_mib'] / 1024:.2f} GiB"


def _header(rows: list[dict[str, Any]]) -> list[str]:
    texts = _texts(rows)
    perplexity = ["perplexity"] if len(texts) < 2 else [f"perplexity, {text}" for text in texts]
    return ["method", "bits, linear", "bits, all", "size", *perplexity, *_tasks(rows), "making", "peak"]


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return list(rows[0]["texts"])


def _tasks(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row["tasks"]))


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    def show(key: str, form: Any) -> str:
        return "" if row[key] is None else form(row[key])

    title = row["title"] + (" (failed)" if row["error"] else "")
    return [
        title,
        show("linear_bits", "{:.2f}".format),
        show("total_bits", "{:.2f}".format),
        show("bytes", lambda count: f"{count / 1e6:.1f} MB"),
        *(_number(row["texts"][text]["perplexity"]) if text in row["texts"] else "" for text in _texts(rows)),
        *(_score(row["tasks"][task]) if task in row["tasks"] else "" for task in _tasks(rows)),
        show("seconds", "{:.0f} s".format),
        show("peak_mib", lambda mib: f"{mib / 1024:.2f} GiB") + show("peak_gpu_mib", lambda mib: f" + {mib / 1024:.2f} GPU"),
    ]


def _score(score: dict[str, Any]) -> str:
    """Format accuracy in percent and its standard error."""
    error = score["accuracy_stderr"]
    return f"{100 * score['accuracy']:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _errors(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['method']} failed: {row['error']}" for row in rows if row["error"]]
