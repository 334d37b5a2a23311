"""The page: what is said of a packed model, in what order."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from edkm._version import __version__
from edkm.report import parts, sections
from edkm.report.layers import layers
from edkm.report.style import STYLE
from edkm.report.subject import Subject, look_at, with_scores

# A page that asks for nothing: browsers are told to refuse whatever would be loaded or run.
_HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="edkm">
<link rel="icon" href="data:,">"""


def report(directory: Path, against: Path | None = None, scores: list[Path] | None = None) -> str:
    """A packed model as one HTML page.

    Args:
        directory: that edkm packed.
        against: another packed directory, or a dense one, to put beside it.
        scores: files that `edkm eval --json` wrote, of these models or of others.

    Returns:
        The page: no scripts, and nothing that it would load.

    Raises:
        ValueError: a directory or a file that is not what it should be, one line.

    Cost:
        Headers of the weights; where nothing was recorded, four tensors.
    """
    subjects = [look_at(directory)]
    if not subjects[0].packed:
        raise ValueError(f"{directory}: is not packed by edkm; a report is about a packed model. Give a dense one with --against.")
    if against is not None:
        subjects.append(look_at(against))
    subjects = _told_apart(subjects)
    return page(subjects, with_scores(subjects, scores or []))


def page(subjects: list[Subject], scores: list[dict[str, Any]]) -> str:
    """The page about the first subject, beside the second if there is one."""
    body = [
        _header(subjects[0]),
        _tiles(subjects, scores),
        "</header><main>",
        sections.side_by_side(subjects, scores) if len(subjects) > 1 else "",
        sections.size(subjects),
        sections.quality(subjects, scores),
        sections.training(subjects),
        layers(subjects),
        sections.weights(subjects[0]),
        sections.settings(subjects),
        "</main>",
        f"<footer>Made by edkm {escape(__version__)} from the files of the model. Sizes are those of the weight files; "
        "1 MB is 1,000,000 bytes. Bits count indices, tables and what is not clustered.</footer>",
    ]
    title = escape(f"{subjects[0].name}, packed by edkm")
    head = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{_HEAD}\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
    # JSON can name half of a character, which UTF-8 cannot write.
    return (head + "\n".join(body) + "\n</body>\n</html>\n").encode(errors="backslashreplace").decode()


def _told_apart(subjects: list[Subject]) -> list[Subject]:
    """Two runs of one model have one name: the directories tell them apart."""
    if len({subject.name for subject in subjects}) == len(subjects):
        return subjects
    from dataclasses import replace

    folders = [subject.directory.resolve().name for subject in subjects]
    if len(set(folders)) < len(folders):
        folders = [str(subject.directory) for subject in subjects]
    return [replace(subject, name=f"{subject.name} ({folder})") for subject, folder in zip(subjects, folders, strict=True)]


def _header(subject: Subject) -> str:
    named = subject.config.get("architectures") or subject.config.get("model_type")
    architecture = ", ".join(map(str, named)) if isinstance(named, list) else str(named or "unknown architecture")
    tied = "input and output embeddings tied" if subject.tied else "input and output embeddings apart"
    lead = f"{architecture}, {parts.count(subject.summary['weights'])} weights, {tied}."
    return f'<header><div class="eyebrow">edkm report</div><h1>{escape(subject.name)}</h1><p class="lead">{escape(lead)}</p>'


def _tiles(subjects: list[Subject], scores: list[dict[str, Any]]) -> str:
    subject, others = subjects[0], subjects[1:]
    summary = subject.summary
    size, unit = parts.megabytes(summary["file_bytes"]).split(" ")
    before = summary["bytes_in_16_bits"]
    lines = [f"from {parts.megabytes(before)} at 16 bits,", f"{before / summary['file_bytes']:.2f} times smaller"]
    made = [parts.tile("Size", (size, unit), lines + [f"{o.name}: {parts.megabytes(o.summary['file_bytes'])}" for o in others])]
    lines = [f"{parts.fraction(summary['clustered_bits_per_weight'], 2)} in linear layers,", "tables counted"]
    lines += [f"{o.name}: {parts.fraction(o.summary['bits_per_weight'], 2)}" for o in others]
    made.append(parts.tile("Bits per weight", (f"{summary['bits_per_weight']:.2f}", "over all"), lines))
    made.append(_perplexity_tile(subject, scores))
    made.append(_cost_tile(subject))
    return f'<dl class="tiles">{"".join(made)}</dl>'


def _perplexity_tile(subject: Subject, scores: list[dict[str, Any]]) -> str:
    """The first text that the packed model was measured on, and what the other models have on it."""
    ours = next((score for score in scores if score["of"] == subject.name and "perplexity" in score), None)
    if ours is None:
        return parts.tile("Perplexity", None, ["not measured"])
    lines = [f"{score['of']}: {parts.fraction(score['perplexity'], 2)}" for score in sections.comparable(ours, scores)]
    lines += [] if lines else [f"on {Path(ours['text']).name}"]
    return parts.tile("Perplexity", (parts.fraction(ours["perplexity"], 2), ""), lines[:3])


def _cost_tile(subject: Subject) -> str:
    if subject.record is None:
        return parts.tile("Made in", None, ["not recorded"])
    phases = subject.record["phases"]
    shown = parts.duration(sum(phase["seconds"] for phase in phases))
    number, _, rest = shown.partition(" ")
    lines = [f"{parts.memory(max(phase['peak_mib'] for phase in phases))} at most"] if phases else []
    gpu = [phase["peak_gpu_mib"] for phase in phases if phase["peak_gpu_mib"] is not None]
    lines += [f"{parts.memory(max(gpu))} on the GPU"] if gpu else []
    lines += ["without what died unsaved"] if subject.record["lost_runs"] else []
    return parts.tile("Made in", (number, rest), lines)
