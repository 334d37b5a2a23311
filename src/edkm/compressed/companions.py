"""Files that lie beside the weights and belong to the model: tokenizer, processors, chat templates, code, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
    """Copy what belongs to a model from its directory into another one; each file there is a whole one, or not there."""
    if source.resolve() == out.resolve():
        return
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                target = out / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.part")
                shutil.copyfile(path, part)
                part.replace(target)
    drop_absent_code(out)


def drop_absent_code(directory: Path) -> None:
    """Remove from each `*config.json` the classes whose code (`auto_map`) is not in the directory."""
    for path in directory.glob("*config.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):  # whoever reads it will say so
            continue
        if isinstance(content, dict) and "auto_map" in content:
            there = _code_there(content.pop("auto_map"), directory)
            path.write_text(json.dumps(content | ({"auto_map": there} if there else {}), indent=2) + "\n", encoding="utf-8")


def _code_there(auto_map: Any, directory: Path) -> dict[str, Any]:
    """The classes of an `auto_map` whose files lie in the directory."""
    found = {}
    for key, value in auto_map.items() if isinstance(auto_map, dict) else ():
        names = [name for name in (value if isinstance(value, (list, tuple)) else [value]) if name]
        if names and all("--" not in name and (directory / f"{name.rpartition('.')[0]}.py").is_file() for name in names):
            found[key] = value
    return found
