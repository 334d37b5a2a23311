"""The shape of the source.

1. No Python file has more than 350 lines, no function of the package more than 60.
2. The first line of a docstring begins with a verb or a noun of the field, not with what, how, who or of.
3. Every test file opens with a numbered list of what it guarantees.
4. No two modules of the package have one name, and no two public classes.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "src/edkm").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name(path):
    return str(path.relative_to(ROOT))


def nodes(path, kinds):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]


@pytest.mark.parametrize(
    "path", sorted(path for folder in ("src", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")), ids=name
)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_functions_are_short(path):
    for function in nodes(path, FUNCTIONS):
        documented = len((ast.get_docstring(function) or "").splitlines())
        assert function.end_lineno - function.lineno + 1 - documented <= 60, function.name


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    for node in nodes(path, (ast.Module, ast.ClassDef, *FUNCTIONS)):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        assert not re.match(r"(What|Who|Whose|How|Of|Where|Which|That)\b", first), first


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_test_files_list_their_guarantees(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", text, flags=re.M)]
    assert numbers and numbers == list(range(1, len(numbers) + 1))


def test_names_are_unique():
    modules = Counter(path.stem for path in PACKAGE if not path.stem.startswith("_"))
    assert not {module for module, count in modules.items() if count > 1}
    classes = Counter(node.name for path in PACKAGE for node in nodes(path, ast.ClassDef) if not node.name.startswith("_"))
    assert not {found for found, count in classes.items() if count > 1}
