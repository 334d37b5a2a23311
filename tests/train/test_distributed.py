"""Several ranks (gloo):

1. `edkm compress` and `edkm.Callback` make the model of one process, with DDP and with FSDP2, started by torchrun or otherwise.
2. A run is resumed by another number of ranks.
3. A rank that is killed ends the run soon: torchrun names it, and the others print the remedy; so does one that waits in vain.
4. A checkpoint is complete only when every rank has written its part.
5. An error of rank 0 ends all ranks with its message.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import edkm
from edkm import metrics, recipe
from edkm.cli import main
from edkm.compressed.checkpoint import read
from edkm.train import distributed

RECORDS = [{"instruction": f"question {i} fox", "output": f"the answer {i} is a quick dog over {i * i} lazy foxes"} for i in range(60)]
# The 8-bit tables of a vocabulary this small have centroids next to nothing, where rounding errors are all that moves them.
SETTINGS = ["--lr", "1e-3", "--block-tokens", "64", "--seed", "3", "--embedding-bits", "0"]
# A fit is made of decisions: it turns rounding errors of the steps before into other indices.
SETTINGS += ["--finetune-steps", "0", "--rows-per-lut", "16"]


# Ranks are forked from a process that has imported what they need: that takes longer than their work.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["edkm.recipe", "edkm.train.loop", "edkm.train.sharding", "edkm.train.callback", "transformers.models.llama.modeling_llama"]
)


@dataclass(frozen=True)
class Exact(recipe.Recipe):
    """Settings that the command line leaves to the library: float32, and no annealing."""

    precision: str = "fp32"

    def __post_init__(self):
        object.__setattr__(self, "config", replace(self.config, anneal=1.0))
        object.__setattr__(self, "backend", os.environ["BACKEND"])


def be_a_rank(argv, log, place):
    """The command, in a process of its own."""
    recipe.Recipe = Exact
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(place)
    torch.set_num_threads(1)
    sys.exit(main(argv))


def be_slow(argv, log, place):
    """The same, with time to kill it between two steps."""
    from edkm.train import loop

    true = loop.rate_share
    loop.rate_share = lambda step, **options: time.sleep(0.5 * (step > 1)) or true(step, **options)
    be_a_rank(argv, log, place)


def be_slow_to_save(argv, log, place):
    """The same, with ranks that write their part of a checkpoint long after rank 0."""
    save = torch.save

    def later(found, path):
        if "random-" in str(path):
            time.sleep(2 * int(place["RANK"]))
        save(found, path)

    torch.save = later
    be_a_rank(argv, log, place)


def be_a_trainer(directory, batch, place):
    """transformers' own Trainer with our callback, in a process of its own."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    os.environ.update(place)
    torch.set_num_threads(1)
    work, model = directory.parent, AutoModelForCausalLM.from_pretrained(directory.parent / "model", dtype=torch.float32)
    ids = torch.randint(0, 250, (12, 48), generator=torch.Generator().manual_seed(0)).tolist()
    config = edkm.ClusterConfig(rows_per_lut=16, anneal=1.0, embedding_bits=0)
    training = {"max_steps": 3, "per_device_train_batch_size": batch, "learning_rate": 1e-3, "save_strategy": "no", "seed": 3}
    arguments = TrainingArguments(work / f"run-{directory.name}", use_cpu=True, report_to=[], dataloader_pin_memory=False, **training)
    callback = edkm.Callback(directory, config, plain_share=0, calibration_tokens=200)
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def arguments(tiny_dir, folder, out, ranks, *options, steps=6):
    (folder / "train.json").write_text(json.dumps(RECORDS))
    argv = ["compress", str(tiny_dir), "--data", str(folder / "train.json"), "--out", str(out), "--steps", str(steps)]
    return [*argv, "--batch", str(4 // ranks), *SETTINGS, *options]


def losses_in(out):
    """Of every step, as the run recorded them."""
    return [loss for series in metrics.read(out)[0]["losses"] for _, loss in series["points"]]


class Run:
    """`edkm compress` as `ranks` processes, each with its output in a file."""

    def __init__(self, tiny_dir, folder, out, ranks, *options, steps=6, target=be_a_rank, backend="auto"):
        argv = arguments(tiny_dir, folder, out, ranks, *options, steps=steps)
        name, port = f"{out.name}-{time.monotonic_ns()}", free_port()
        self.out = out
        self.logs = [folder / f"{name}-{rank}.log" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "BACKEND": backend}
            self.processes.append(FORKS.Process(target=target, args=(argv, log, place)))
            self.processes[-1].start()

    def wait(self):
        """Exit codes."""
        for process in self.processes:
            process.join(240)
        return [process.exitcode for process in self.processes]

    def text(self, rank=0):
        return self.logs[rank].read_text()

    def losses(self):
        return losses_in(self.out)

    def finish(self):
        codes = self.wait()
        assert codes == [0] * len(codes), self.text()[-3000:]
        return self


def assert_same_model(one, other):
    a, b = read(one), read(other)
    assert a.frozen.keys() == b.frozen.keys() and a.dense.keys() == b.dense.keys()
    weights = sum(f.indices.numel() for f in a.frozen.values())
    different = sum(int((a.frozen[name].indices != b.frozen[name].indices).sum()) for name in a.frozen)
    assert different <= 1e-3 * weights
    for name in a.frozen:
        torch.testing.assert_close(a.frozen[name].lut.float(), b.frozen[name].lut.float(), rtol=2e-3, atol=1e-4)
    for name in a.dense:
        torch.testing.assert_close(a.dense[name], b.dense[name], rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def alone(tiny_dir, tmp_path_factory):
    """The run of one process, and the directory it wrote."""
    folder = tmp_path_factory.mktemp("alone")
    return Run(tiny_dir, folder, folder / "out", 1).finish(), folder / "out"


@pytest.mark.parametrize(("ranks", "backend"), [(2, "auto"), (4, "blocks")])
def test_ranks_make_the_model_of_one_process(alone, tiny_dir, tmp_path, ranks, backend):
    run = Run(tiny_dir, tmp_path, tmp_path / "out", ranks, "--fsdp", backend=backend).finish()
    assert len(run.losses()) == 6
    assert run.losses() == pytest.approx(alone[0].losses(), abs=2e-3)
    assert_same_model(alone[1], tmp_path / "out")
    # One rank speaks for all, and nothing of the run is left behind.
    assert "clustered" not in run.text(1) and not (tmp_path / "out" / "training").exists()
    ours, theirs = (metrics.read(out)[0] for out in (tmp_path / "out", alone[1]))
    assert ours["settings"]["processes"] == ranks and (tmp_path / "out" / "report.html").is_file()
    for one, other in zip(ours["histograms"], theirs["histograms"], strict=True):
        assert (one["name"], one["panels"][0]) == (other["name"], other["panels"][0])
        for mine, its in zip(one["panels"][1:], other["panels"][1:], strict=True):
            assert sum(abs(a - b) for a, b in zip(mine["counts"], its["counts"], strict=True)) <= 0.02 * sum(its["counts"])


def test_the_callback_on_two_ranks_makes_the_model_of_one(tiny_dir, tmp_path):
    (tmp_path / "model").symlink_to(tiny_dir)
    runs = []
    for ranks in (1, 2):
        port = free_port()
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            runs.append(FORKS.Process(target=be_a_trainer, args=(tmp_path / f"on-{ranks}", 4 // ranks, place)))
            runs[-1].start()
    for run in runs:
        run.join(240)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert_same_model(tmp_path / "on-1", tmp_path / "on-2")


def test_plain_steps_of_sharded_ranks_are_those_of_one_process(tiny_dir, tmp_path):
    plain = ("--finetune-steps", "3")
    alone = Run(tiny_dir, tmp_path, tmp_path / "alone", 1, *plain).finish()
    sharded = Run(tiny_dir, tmp_path, tmp_path / "sharded", 2, "--fsdp", *plain).finish()
    assert len(sharded.losses()) == 6 and sharded.losses()[:3] == pytest.approx(alone.losses()[:3], abs=2e-3)
    assert sharded.losses()[3:] == pytest.approx(alone.losses()[3:], abs=2e-2)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("alone", "sharded")]
    for config in configs:
        config.pop("quantization_config")  # holds the error of every tensor
    assert configs[0] == configs[1] and configs[0]["architectures"] == ["LlamaForCausalLM"]


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "edkm"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *argv], env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def test_torchrun_starts_the_command_on_every_rank(tiny_dir, tmp_path):
    run = torchrun(*arguments(tiny_dir, tmp_path, tmp_path / "out", 2, "--calibration", "both"))
    printed, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors[-3000:]
    assert errors.count("writing text: 1,008 tokens in ") == 1
    assert errors.count("clustered training: 6 steps in ") == printed.count("wrote ") == 1  # one rank speaks for all
    assert metrics.read(tmp_path / "out")[0]["settings"]["processes"] == 2 and len(losses_in(tmp_path / "out")) == 6


def test_torchrun_names_a_killed_rank_and_the_others_print_the_remedy(tiny_dir, tmp_path):
    argv = arguments(tiny_dir, tmp_path, tmp_path / "out", 2, "--save-every", "2", steps=100000)
    run = torchrun(*argv)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / "training").glob("clustered/step-*[0-9]")):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.1)
    ranks = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found = dict(item.split("=", 1) for item in path.read_text().split("\0") if "=" in item)
            if str(tmp_path / "out") in (path.parent / "cmdline").read_text() and "RANK" in found:
                ranks[found["RANK"]] = int(path.parent.name)
    assert set(ranks) == {"0", "1"}
    os.kill(ranks["1"], signal.SIGKILL)
    began = time.monotonic()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and time.monotonic() - began < 60
    assert "another rank failed" in errors and "The same command with --resume goes on from the last checkpoint." in errors
    named = errors[errors.index("Root Cause (first observed failure)") :]
    assert re.search(r"rank +: 1 ", named) and "SIGKILL" in named


def test_a_time_out_prints_the_remedy(monkeypatch):
    for name, value in {"world_size": lambda: 2, "_BEFORE_EXIT_S": 0}.items():
        monkeypatch.setattr(distributed, name, value)
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete")
    expected = r"another rank did not answer in time: .* Start again\."
    with pytest.raises(distributed.RankError, match=expected), distributed.report_failed_rank("Start again."):
        raise late


def wait_for(path, run):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and run.processes[0].is_alive(), run.text()[-3000:]
        time.sleep(0.05)


@pytest.mark.parametrize(("first", "then"), [((2, "--fsdp"), (4, "--fsdp")), ((4,), (1,))])
def test_a_rank_that_dies_ends_the_others_and_the_run_is_resumed_by_another_number(alone, tiny_dir, tmp_path, first, then):
    ranks, *options = first
    run = Run(tiny_dir, tmp_path, tmp_path / "out", ranks, *options, "--save-every", "2", target=be_slow)
    wait_for(tmp_path / "out" / "training" / "clustered" / "step-2", run)
    run.processes[1].kill()
    began = time.monotonic()
    codes = run.wait()
    assert time.monotonic() - began < 60
    assert codes == [-signal.SIGKILL if rank == 1 else 1 for rank in range(ranks)]
    for rank in range(ranks):
        if rank != 1:
            assert f"edkm: error: rank {rank} of {ranks}: another rank failed" in run.text(rank) and "--resume" in run.text(rank)
    ranks, *options = then
    resumed = Run(tiny_dir, tmp_path, tmp_path / "out", ranks, *options, "--save-every", "2", "--resume").finish()
    assert re.search(r"^clustered training: [2-5] of 6 steps, ", resumed.text(), re.MULTILINE)  # not from the beginning
    assert resumed.losses() == pytest.approx(alone[0].losses(), abs=2e-3)
    assert_same_model(alone[1], tmp_path / "out")


def test_a_checkpoint_is_complete_only_when_every_rank_has_written_its_part(tiny_dir, tmp_path):
    run = Run(tiny_dir, tmp_path, tmp_path / "out", 2, "--save-every", "2", steps=4, target=be_slow_to_save)
    checkpoint = tmp_path / "out" / "training" / "clustered" / "step-2"
    wait_for(checkpoint, run)
    states = [torch.load(checkpoint / f"random-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all("torch" in state for state in states)
    assert run.wait() == [0, 0]


def test_an_error_on_rank_0_ends_all_ranks(tiny_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    run = Run(tiny_dir, tmp_path, tmp_path / "out", 2)
    assert run.wait() == [1, 1]
    for rank in range(2):
        assert "is not empty; name another directory or add --overwrite" in run.text(rank)
