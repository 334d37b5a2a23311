"""`python -m benchmarks step-gpu`, as far as it runs without a GPU:

1. a step with the Triton kernels is that of `blocks`, or it says so;
2. plain and clustered steps are timed in turn;
3. the layer that is timed has the shapes of LLaMA-7B, and all its weights are clustered.
"""

import time

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not made for this platform")
from benchmarks import step_gpu
from edkm.core import cuda
from edkm.train.prepare import clusterings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_step_is_that_of_blocks(capsys, monkeypatch):
    assert step_gpu.main(["--device", "cpu"] if DEVICE == "cpu" else ["--tokens"]) == 0
    assert "they differ by" in capsys.readouterr().out
    adjoint = cuda.adjoint
    monkeypatch.setattr(cuda, "adjoint", lambda *args: adjoint(*args) * 1.01)
    with pytest.raises(SystemExit, match=r"triton and blocks differ by 0\.00"):
        step_gpu.check(DEVICE)


class Clock:
    """In the place of an event on a CPU."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


def test_steps_are_timed_in_turn(capsys, monkeypatch):
    monkeypatch.setattr(step_gpu, "LLAMA_7B", step_gpu.SMALL)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "Event", Clock)
    rows = step_gpu.compare(8, 4, 1, DEVICE)
    assert [row["who"] for row in rows] == ["plain", "triton", "blocks"] and all(len(row["ms"]) == 1 for row in rows)
    assert "4 tokens, 8 rows per table: plain" in capsys.readouterr().out


def test_the_layer_is_that_of_llama_7b():
    plain = step_gpu.layer(step_gpu.LLAMA_7B, None, 16, "meta", torch.bfloat16)
    assert sum(weight.numel() for name, weight in plain.named_parameters() if "proj" in name) == 4 * 4096**2 + 3 * 4096 * 11008
    assert len(list(clusterings(step_gpu.layer(step_gpu.SMALL, "blocks", 8, "cpu", torch.float32)))) == 7
