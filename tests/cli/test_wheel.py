"""The wheel that users install.

1. It holds every module, the C sources, the report's template and `py.typed`, and nothing else of the repository.
2. Installed outside the repository, `edkm --help` answers and `edkm compress` compresses a tiny model.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # setuptools works in the folder it is given: not in the repository.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(["cp", "-r", ROOT / "src", source / "src"], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    kept = {".py", ".c", ".typed", ".j2"}
    assert names == {path.relative_to(source).as_posix() for path in (source / "edkm").rglob("*") if path.suffix in kept}
    assert "edkm/py.typed" in names


def test_installed_wheel_compresses_a_model(wheel, tiny_dir, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    data = work / "data.jsonl"
    data.write_text('{"text": "the quick brown fox jumps over the lazy dog and the other dog"}\n' * 40)

    def edkm(*arguments):
        command = [sys.executable, "-m", "edkm", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=True).stdout

    assert "compress" in edkm("--help")
    options = ["--data", data, "--out", "packed", "--steps", "4", "--block-tokens", "32"]
    assert "wrote packed" in edkm("compress", tiny_dir, *options)
    assert edkm("generate", "packed", "the quick", "--max-new-tokens", "3")
