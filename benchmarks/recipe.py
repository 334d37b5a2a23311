"""`python -m benchmarks recipe`: what each part of the recipe adds, by the perplexity of SmolLM2-135M at 3 bits.

Two tables, on the model, data and texts of `python -m benchmarks compare`; every row is a process of its own and is not repeated if
`--out` holds its result already.

**Identity** (`--identity-steps`): the same clustering (k-means, importance, one table a tensor, one iteration a step, embeddings
left alone), trained by dense DKM's equations in plain autograd (`edkm.core.reference`, recomputed in backward, for its maps would not
fit) and by each backend. Perplexities must agree to noise; seconds are a step's.

**Recipe** (`--steps`): from DKM at coremltools' defaults to `edkm compress --preset best`, one change a row. All rows have the
same steps, learning rate and data, embeddings in 8 bits; the last rows spend three quarters of the steps on the model before it is
clustered. `soft` is the perplexity of the softly clustered weights, before they are put on their nearest entries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare.readme import WINDOW, make_data
from benchmarks.measure import machine, write
from edkm.core.op import BACKENDS
from examples.demo.data import save_smollm2

BITS, LR = 3, 2e-4


class Row(NamedTuple):
    """One run. The defaults are those of DKM but for its temperature."""

    title: str
    backend: str = "auto"
    fitted: bool = False
    rows_per_lut: int = 0
    importance: bool = True
    absolute: bool = False  # temperature 1e-4 and three iterations a step, as coremltools has them
    preset: str = ""  # its share of plain steps, and whether bits are chosen


IDENTITY = {
    "reference": Row("dense DKM, plain autograd", backend="reference"),
    **{name: Row(name, backend=name) for name in BACKENDS if name != "triton"},  # on a CPU
}
RECIPE = {
    "dkm": Row("DKM: absolute temperature, no importance", importance=False, absolute=True),
    "relative": Row("temperature from the error, annealed", importance=False),
    "importance": Row("+ importance"),
    "rows": Row("+ a table per row", rows_per_lut=1),
    "fit": Row("+ fitted start", rows_per_lut=1, fitted=True),
    "balanced": Row("+ plain steps first (balanced)", rows_per_lut=1, fitted=True, preset="balanced"),
    "best": Row("+ bits where they matter (best)", rows_per_lut=1, fitted=True, preset="best"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/recipe"))
    parser.add_argument("--steps", type=int, default=24, help="of 1,024 tokens (24); 0 leaves the table out")
    parser.add_argument("--identity-steps", type=int, default=4, help="of 1,024 tokens (4); 0 leaves the table out")
    parser.add_argument("--rows", help="of the second table, with commas between them (all)")
    parser.add_argument("--max-windows", type=int, default=8, help="of each text (8)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    wanted = args.rows.split(",") if args.rows else list(RECIPE)
    if unknown := sorted(set(wanted) - set(RECIPE)):
        parser.error(f"--rows: unknown row {unknown[0]!r}. Known are {', '.join(RECIPE)}.")
    if args.row:
        result = run(args, args.row)
        (args.out / f"{args.row}.json").write_text(json.dumps(result))
        return 0
    make_data(args.out / "data")
    save_smollm2(args.out / "model")
    tables = {"identity": (IDENTITY, list(IDENTITY), args.identity_steps), "recipe": (RECIPE, wanted, args.steps)}
    found: dict[str, list[dict[str, Any]]] = {}
    for table, (rows, names, steps) in tables.items():
        found[table] = [_result(args, f"{table}-{name}", rows[name].title, steps) for name in names] if steps else []
        print(f"\n{table}, {steps} steps\n{_table(found[table])}\n", flush=True)
    settings = {"bits": BITS, "lr": LR, "steps": args.steps, "identity_steps": args.identity_steps, "windows": args.max_windows}
    write(args.json, {"benchmark": "recipe", **settings, "machine": machine("cpu"), **found})
    return 0


def _result(args: argparse.Namespace, name: str, title: str, steps: int) -> dict[str, Any]:
    path = args.out / f"{name}.json"
    if not path.is_file():
        command = [sys.executable, "-m", "benchmarks", "recipe", "--row", name, "--out", args.out, "--max-windows", args.max_windows]
        command += ["--identity-steps", steps] if name.startswith("identity") else ["--steps", steps]
        subprocess.run([str(word) for word in command], check=True)
    found = json.loads(path.read_text())
    if found["steps"] != steps:
        raise SystemExit(f"{path}: was made with {found['steps']} steps, not {steps}. Name another --out.")
    return {"row": name, "title": title, **found}


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    texts = list(rows[0]["hard"])
    lines = [f"{'':<44}{'bits':>6}" + "".join(f"{text:>12}{'soft':>10}" for text in texts) + f"{'s/step':>8}{'start':>8}"]
    for row in rows:
        cells = "".join(f"{row['hard'][text]:>12.3f}{row['soft'][text]:>10.3f}" for text in texts)
        lines.append(f"{row['title']:<44}{row['bits']:>6.2f}{cells}{row['step_seconds']:>8.1f}{row['start_seconds']:>8.0f}")
    return "\n".join(lines)


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Make a row: run the stages of the recipe with the row's clustering, and score soft and hard weights on every text."""
    import edkm
    from edkm import recipe
    from edkm.models import load_model
    from edkm.train.allocate import bits_of
    from edkm.train.prepare import clusterings

    table, _, key = name.partition("-")
    identity = table == "identity"
    row, steps = (IDENTITY[key], args.identity_steps) if identity else (RECIPE[key], args.steps)
    config = edkm.ClusterConfig(bits=BITS, rows_per_lut=row.rows_per_lut, embedding_bits=0 if identity else 8)
    settings = {"steps": steps, "lr": LR, "block_tokens": WINDOW, "precision": "fp32"}
    settings |= {"preset": row.preset} if row.preset else {"finetune_steps": 0}
    found: dict[str, Any] = {"steps": steps}

    def measure(run: Any) -> None:
        with edkm.soft_weights(run.model):
            soft = _perplexities(run.model, run.tokenizer, args)
        found.update(plain_steps=run.recipe.finetune_steps, hard=_perplexities(run.model, run.tokenizer, args), soft=soft)
        seconds = {phase["name"]: phase["seconds"] for phase in run.recorder.content["phases"]}
        found["start_seconds"] = seconds["calibration and fit"]
        found["step_seconds"] = seconds["clustered training"] / (steps - run.recipe.finetune_steps)
        found["bits"] = bits_of(load_model(run.source)[0], clusterings(run.model)[0][2].prepared_by)

    cluster = recipe.cluster if row.fitted else partial(_cluster, row=row)
    stages = [cluster if stage is recipe.cluster else stage for stage in recipe.STAGES if stage not in (recipe.write, recipe.report)]
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        data = args.out / "data" / "train.json"
        recipe.compress(args.out / "model", recipe.Recipe(config, **settings), folder, data=data, stages=[*stages, measure])
    return found


def _cluster(run: Any, row: Row) -> None:
    """Cluster without a fit, as the row says."""
    import edkm
    from benchmarks.compare.dkm import config as dkm_config
    from benchmarks.compare.dkm import prepare_dkm
    from edkm.calibrationtext import calibration_batches

    began = time.perf_counter()
    if row.absolute:
        prepare_dkm(run.model, dkm_config(run.model, BITS))
    elif row.importance:
        backend = "auto" if row.backend == "reference" else row.backend  # which takes its place afterwards
        edkm.prepare(run.model, run.recipe.config, calibration_batches(run), centroids={}, backend=backend)
    else:
        edkm.prepare(run.model, run.recipe.config)
    run.recorder.phase("calibration and fit", time.perf_counter() - began)
    if row.backend == "reference":
        _make_dense(run.model)


def _make_dense(model: Any) -> None:
    """Put dense DKM in the place of what keeps nothing, in place: plain autograd through the reference, layer by layer."""
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    from edkm.core import reference
    from edkm.train.layers import ClusteredLinear

    class DenseLinear(ClusteredLinear):
        _clustered = ("weight",)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if not self.clustering.is_soft:
                return super().forward(input)
            self.clustering.solve(self.weight)  # moves the state
            return checkpoint(self._dense, input, use_reentrant=False)

        def _dense(self, input: torch.Tensor) -> torch.Tensor:
            found = self.clustering.solve(self.weight)
            start, iters = found.trajectory[0], len(found.trajectory) - 1
            soft, _ = reference.cluster(self.weight, start, found.problem, iters)
            return F.linear(input, soft, self.bias)

    for module in model.modules():
        if isinstance(module, ClusteredLinear):
            module.__class__ = DenseLinear


def _perplexities(model: Any, tokenizer: Any, args: argparse.Namespace) -> Mapping[str, float]:
    from edkm.evaluate import perplexity

    found = {}
    for name in ("reference", "novels"):
        text = (args.out / "data" / f"{name}.txt").read_text(encoding="utf-8")
        found[name] = perplexity(model, tokenizer, text, window=WINDOW, max_windows=args.max_windows).perplexity
    return found
