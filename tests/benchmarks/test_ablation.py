"""What is guaranteed of `python -m benchmarks ablation`, checked on tiny layers.

1. Each technique keeps fewer bytes; sharding divides them by the learners; `histogram` keeps centroids alone.
2. The base copies the bytes that `save_on_cpu` is asked to.
3. No table is printed if gradients differ from those without hooks.
"""

import argparse
import json
from contextlib import contextmanager

import pytest
import torch

from benchmarks import ablation


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One run through the front door on one and two learners, by name and learners."""
    file = tmp_path_factory.mktemp("ablation") / "result.json"
    argv = ["--scale", "64", "--learners", "1", "2", "--tokens", "8", "--repeats", "1", "--json", str(file)]
    assert ablation.main(argv) == 0
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 7
    return {(row["name"], row["learners"]): row for row in result["rows"]}


def test_each_technique_saves(rows):
    peak = {key: row["peak_bytes"] for key, row in rows.items()}
    # The maps of the docstring, and centroids.
    assert 0 <= peak["base", 1] - 344 * 4 * 64 * 64 < 4 * 1024
    assert peak["base", 1] == peak["base", 2]
    assert peak["base", 1] > 1.05 * peak["M", 1]
    assert peak["M", 1] > 2 * peak["M+U", 1]  # a 64 x 64 weight has nearly as many values as weights, so tables save little
    assert all(row["kept_bytes"] <= row["peak_bytes"] for row in rows.values())


def test_sharding_divides_by_the_learners(rows):
    for plain, sharded in (("M", "M+S"), ("M+U", "M+U+S")):
        assert rows[plain, 1]["peak_bytes"] / rows[sharded, 2]["peak_bytes"] == pytest.approx(2, rel=0.05)


def test_histogram_keeps_only_centroids(rows):
    assert rows["histogram", 1]["peak_bytes"] <= 4 * 1024
    assert rows["histogram", 1]["ratio"] > 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_copies_what_save_on_cpu_is_asked_to(dtype):
    args = argparse.Namespace(scale=64, bits=2, iters=2, tokens=8, dtype=dtype, device="cpu")
    layer, sizes = ablation.make_layer(args), []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ablation.soft_weights(layer)
    step = ablation._step("base", layer, ablation.make_data(args, 0), None)
    assert step.kept == step.peak == sum(sizes) == ablation.requested_bytes(lambda: ablation.soft_weights(layer))


def test_no_table_over_wrong_gradients(monkeypatch, capsys):
    def pack(tensor):
        return tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor

    @contextmanager
    def lossy(**_):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield argparse.Namespace(kept_bytes=asked, peak_kept_bytes=asked)

    argv = ["--scale", "64", "--learners", "1", "--tokens", "8", "--repeats", "1"]
    layer = ablation.make_layer(ablation._parse(argv))
    asked = ablation.requested_bytes(lambda: ablation.soft_weights(layer))
    monkeypatch.setattr(ablation, "saved_tensors", lossy)
    with pytest.raises(RuntimeError, match="base on 1 learners: gradients of q_proj"):
        ablation.main(argv)
    whole = ablation._histogram
    monkeypatch.setattr(ablation, "_histogram", lambda layer: [out * 0.5 for out in whole(layer)])
    with pytest.raises(RuntimeError, match="histogram: relative error"):
        ablation.main(argv)
    assert "times less" not in capsys.readouterr().out
