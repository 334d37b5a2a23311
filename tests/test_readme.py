"""What the README shows runs, and the files that it names exist."""

import re
from pathlib import Path

from edkm.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippets_run(capsys, monkeypatch, tmp_path, packed_dir):
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(snippets) == 4
    (tmp_path / "packed").symlink_to(packed_dir)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert set(scope["frozen"]) == {"0.weight", "2.weight"}
    assert scope["weight"].grad.shape == (256, 512)
    assert "3 bits, 8 tables" in capsys.readouterr().out


def test_commands_parse():
    lines = re.findall(r"^    edkm (.+?)(?:  +#.*)?$", README, flags=re.M)
    assert len(lines) >= 6
    for line in lines:
        arguments = re.findall(r'"[^"]*"|\S+', line)
        assert _parser().parse_args([a.strip('"') for a in arguments]).run


def test_tree_is_true():
    tree = README.split("## How it is laid out")[1].split("## Limits")[0]
    named = re.findall(r"^      (\S+)", tree, flags=re.M)
    assert len(named) >= 8
    for name in named:
        assert (ROOT / "src" / "edkm" / name).exists(), name
    here = {p.name + ("/" if p.is_dir() else "") for p in (ROOT / "src" / "edkm").iterdir() if not p.name.startswith("_")}
    assert here - set(named) <= {"memory.py", "py.typed", "__pycache__/"}


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
