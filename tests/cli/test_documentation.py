"""The README and the pages under docs/.

1. Every Python example runs, page by page.
2. The command line takes every `edkm` command shown, and every option named exists.
3. Every file that a page links to exists, every make target and benchmark that a page names exists.
4. The README has at most 160 lines; the tree in docs/how-it-works.md lists the package.
5. The notebook runs from top to bottom.
"""

import json
import re
from pathlib import Path

import pytest

from edkm.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [page for page in PAGES if page.name != "log.md"]
NAMES = [str(page.relative_to(ROOT)) for page in GUIDES]


def commands():
    """Return the parser of every command."""
    return next(action.choices for action in _parser()._actions if action.metavar == "COMMAND")


def options():
    return {option for parser in commands().values() for option in parser._option_string_actions}


def python_examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", [page for page in GUIDES if python_examples(page)], ids=lambda page: page.stem)
def test_python_examples_run(page, monkeypatch, tmp_path, packed_dir):
    (tmp_path / "packed").symlink_to(packed_dir)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for example in python_examples(page):
        exec(example, scope)
    assert len(scope) > 1


def test_readme_example_clusters_both_layers(capsys):
    scope = {}
    exec(python_examples(ROOT / "README.md")[0], scope)
    assert set(scope["frozen"]) == {"0.weight", "2.weight"}
    assert "3 bits, 8 tables" in capsys.readouterr().out


@pytest.mark.parametrize("page", GUIDES, ids=NAMES)
def test_commands_shown_are_accepted(page):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^    edkm (.+?)(?:  +#.*)?$", text, flags=re.M) + re.findall(r"`edkm ([a-z]+ [^`]*)`", text)
    for line in shown:
        if not re.search(r" (MODEL|DIR|packed) ?", line):  # part of a command
            continue
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        assert _parser().parse_args(words).command, line


def test_readme_shows_every_command():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert len(commands()) >= 7
    for command in commands():
        assert f"`edkm {command} " in readme, command


@pytest.mark.parametrize("page", GUIDES, ids=NAMES)
def test_options_named_exist(page):
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").rglob("*.py")))
    others = {"--nproc-per-node", "--help"}
    for option in set(re.findall(r"`[^`]*?(--[a-z][a-z0-9-]+)", page.read_text(encoding="utf-8"))) - others:
        assert option in options() or f'"{option}"' in benchmarks, option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_files_exist(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).is_file(), link


@pytest.mark.parametrize("page", GUIDES, ids=NAMES)
def test_make_targets_and_benchmarks_exist(page):
    text, makefile = page.read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for name in set(re.findall(r"-m benchmarks ([a-z_-]+)", text)):
        module = ROOT / "benchmarks" / name.replace("-", "_")
        assert module.with_suffix(".py").is_file() or module.is_dir(), name


def test_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 160


def test_tree_lists_the_package():
    tree = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8").split("    src/edkm/\n")[1].split("\n\n")[0]
    named = set(re.findall(r"^      (\S+)", tree, flags=re.M))
    here = {p.name + ("/" if p.is_dir() else "") for p in (ROOT / "src/edkm").iterdir()}
    assert named == {name for name in here if not name.startswith(("_", "."))} - {"py.typed"}


@pytest.mark.filterwarnings("ignore")  # the notebook's own processes and files
def test_notebook_runs(tiny_dir, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(ROOT / "examples/first_model.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "MODEL = " in cell.source)
    parameters.source = f"MODEL, STEPS, TOKENS, WINDOWS = {str(tiny_dir)!r}, 4, 32, 2"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "packed" / "model.safetensors").is_file()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


def test_notebook_is_stored_without_outputs():
    cells = json.loads((ROOT / "examples/first_model.ipynb").read_text(encoding="utf-8"))["cells"]
    assert cells and not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
