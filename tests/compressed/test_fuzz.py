"""Damaged models, as `python -m benchmarks fuzz` makes them by the thousand.

1. Each is refused with one clear line or loads as it was.
2. The fuzzer sees crashes, hangs, memory, changes and unclear messages.
3. A case is made again by its number and seed.
"""

import os
import time
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz.run import ALLOWED_BYTES, MUTATIONS, Worker, judge, run
from benchmarks.fuzz.targets import checkpoint


def test_damaged_models_are_refused_clearly_or_load_as_they_were():
    results = list(run(checkpoint, range(3 * len(MUTATIONS)), seed=1))
    wrong = [result for result in results if result.outcome not in ("refused", "identical")]
    assert not wrong, wrong[:5]
    assert {result.outcome for result in results if result.kind.startswith("legal")} == {"identical"}
    assert sum(result.outcome == "refused" for result in results) > len(results) / 2
    table = fuzz.table(fuzz.summarise(results))
    assert all(kind in table for kind in MUTATIONS) and "do not have their checksum" in table


def misbehave(directory: Path) -> dict:
    """Fail in the way that the directory's name asks for."""
    how = directory.name
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(60)
    if how == "memory":
        bytearray(ALLOWED_BYTES + (10 << 20))[::4096] = b"1" * ((ALLOWED_BYTES + (10 << 20)) // 4096)
    if how == "panic":
        raise BaseException("rust")
    errors = {"error": KeyError("bits"), "refused": ValueError("a.json: lacks bits. Fetch it."), "lines": ValueError("a: b.\nFetch it.")}
    if how in errors or how in ("no remedy", "escape"):
        raise errors.get(how, ValueError({"no remedy": "a.json: lacks bits", "escape": "a: \x1b[2J. Fetch it."}.get(how)))
    return {}


def test_the_fuzzer_sees_each_kind_of_failure(tmp_path: Path):
    outcomes = {
        **{"refused": "refused", "fine": "identical", "error": "error", "panic": "error", "lines": "unclear", "no remedy": "unclear"},
        **{"escape": "unclear", "memory": "memory", "crash": "crash", "hang": "hang", "fine again": "identical"},
    }
    worker = Worker(misbehave, [], timeout_s=3)
    try:
        original = worker.ask(tmp_path)
        assert isinstance(original, dict)
        for how, outcome in outcomes.items():
            answer = worker.ask(tmp_path / how)
            assert judge(0, "kind", "one", answer, original, 0).outcome == outcome, how
    finally:
        worker.stop()
    assert judge(0, "kind", "one", original | {"tensors": {"a": "other"}}, original, 0).outcome == "changed"
    assert judge(0, "kind", "one", original | {"seconds": 30.0}, original, 0).outcome == "slow"
    refusal = original | {"error": "ValueError", "refusal": True, "message": "a: b. Fetch it."}
    assert judge(0, "legal: links", "one", refusal, original, 0).outcome == "refused though legal"


def test_a_case_is_made_again_by_its_number_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = []
    for folder in ("a", "b"):
        assert fuzz.main(["--target", "checkpoint", "--case", "8", "--seed", "3", "--keep", str(tmp_path / folder)]) == 0
        made.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert made[0] == made[1]
    assert capsys.readouterr().out.count("case 8: ") == 2
