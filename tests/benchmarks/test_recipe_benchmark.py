"""`python -m benchmarks recipe`.

1. Every row of both tables runs on a tiny model.
2. The rows of the identity table agree.
"""

import shutil
from argparse import Namespace

import pytest

from benchmarks import recipe
from edkm.core import native


@pytest.fixture
def args(tiny_dir, data, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "WINDOW", 64)
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "data").mkdir()
    data.rename(tmp_path / "data" / "train.json")
    for name in ("reference", "novels"):
        (tmp_path / "data" / f"{name}.txt").write_text(f"{name} counts: " + " ".join(map(str, range(200))))
    return Namespace(out=tmp_path, steps=4, identity_steps=3, max_windows=2)


def test_dense_dkm_and_every_backend_end_alike(args):
    found = {name: recipe.run(args, f"identity-{name}") for name in recipe.IDENTITY if name != "native" or native.available()}
    dense = found.pop("reference")
    assert dense["bits"] == pytest.approx(3, abs=0.1)
    for name, row in found.items():
        for text, value in row["soft"].items():
            assert value == pytest.approx(dense["soft"][text], rel=1e-5), name
            assert row["hard"][text] == pytest.approx(dense["hard"][text], rel=1e-3), name


def test_every_row_is_another_model(args):
    found = {name: recipe.run(args, f"recipe-{name}") for name in recipe.RECIPE}
    assert len({row["hard"]["reference"] for row in found.values()}) == len(found)
    assert found["balanced"]["plain_steps"] == found["best"]["plain_steps"] == 3
    assert found["best"]["bits"] <= found["balanced"]["bits"] == found["rows"]["bits"] > found["importance"]["bits"]
    table = recipe._table([{"title": recipe.RECIPE[name].title, **row} for name, row in found.items()])
    assert len(table.splitlines()) == 1 + len(found)
