"""Copy the files beside the weights that belong to a model: tokenizer, processors, chat templates, code, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edkm.compressed.jsonfile import write_json
from edkm.output import replacing

# As patterns of names; a hub's download takes the same.
COMPANIONS = (
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*processor*.json",
    "*feature_extractor*.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "modules.json",  # of sentence-transformers, with the directories that it names
    "*sentence_*.json",
    "[0-9]_*/*",
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)


def copy_companions(source: Path, out: Path) -> None:
    """Copy the files that belong to a model from its directory into another; each is copied whole or not at all."""
    if source.resolve() == out.resolve():
        return
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}:
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            shutil.copyfile(path, part)
    drop_absent_code(out)


def drop_absent_code(directory: Path) -> None:
    """Remove from each `*config.json` the classes whose code (`auto_map`) is not in the directory."""
    for path in directory.glob("*config.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):  # refused by whoever reads it
            continue
        if isinstance(content, dict) and "auto_map" in content:
            there = _code_there(content.pop("auto_map"), directory)
            write_json(path, content | ({"auto_map": there} if there else {}))


def _code_there(auto_map: Any, directory: Path) -> dict[str, Any]:
    """Keep the classes of an `auto_map` whose files lie in the directory."""
    found = {}
    for key, value in auto_map.items() if isinstance(auto_map, dict) else ():
        names = [name for name in (value if isinstance(value, (list, tuple)) else [value]) if name]
        if names and all("--" not in name and (directory / f"{name.rpartition('.')[0]}.py").is_file() for name in names):
            found[key] = value
    return found
