"""Format the results of commands for a terminal."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def columns(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Align rows of cells in columns two spaces apart; those in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ((cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def summary_table(summary: dict[str, Any]) -> str:
    """Format `checkpoint.summary`: one line a tensor, layer 10 after layer 9, totals last."""
    from edkm.report import natural_order

    rows = [["tensor", "shape", "format", "bits", "dim", "tables", "bytes", "bits/weight", "error"]]
    for row in sorted(summary["tensors"], key=lambda row: natural_order(row["name"])):
        counts = [f"{row[key]:,}" for key in ("bits", "dim", "luts", "stored_bytes")]
        rows.append(
            [row["name"], "x".join(map(str, row["shape"])), row["format"], *counts, f"{row['bits_per_weight']:.3f}", f"{row['error']:.3e}"]
        )
    size, plain = summary["file_bytes"], summary["bytes_in_16_bits"]
    ratio = f", {plain / size:.2f} times smaller than in 16 bits ({plain:,})" if size else ""
    totals = [
        "",
        f"clustered  {len(summary['tensors']):,} tensors; linear layers {_bits(summary['clustered_bits_per_weight'])}",
        f"dense      {summary['dense_tensors']:,} tensors, {summary['dense_weights']:,} weights",
        f"total      {summary['weights']:,} weights, {size:,} bytes, {_bits(summary['bits_per_weight'])}{ratio}",
    ]
    return "\n".join([*columns(rows, right=range(3, 9)), *totals])


def task_table(scores: dict[str, Any], mean: tuple[float, float]) -> str:
    """Format scores of tasks: one line a task, accuracies with their standard errors, the means last, then lm-eval's other metrics."""
    rows = [["task", "items", "acc", "acc_norm"]]
    for name, s in scores.items():
        accuracies = (s.accuracy, s.accuracy_stderr), (s.normalised_accuracy, s.normalised_accuracy_stderr)
        rows.append([name, f"{s.items:,}", *(_accuracy(*pair) for pair in accuracies)])
    rows.append(["mean", "", *map(_accuracy, mean)])
    others = [f"{name}: {metric} {value:.4f}" for name, s in scores.items() for metric, value in s.other.items()]
    return "\n".join([*columns(rows, right=[1]), *others])


def written_lines(out: Path, text: Path | str) -> str:
    """Format the sizes of a packed directory that was just written, and what to do with it next."""
    from edkm.compressed.checkpoint import summary
    from edkm.metrics import PAGE, RECORD

    totals = summary(out)
    shown_in = next((f"; {path} shows it" for path in (out / PAGE, out / RECORD) if path.is_file()), "")
    return (
        f"wrote {out}: {totals['file_bytes'] / 1e6:.1f} MB, {totals['bits_per_weight']:.2f} bits per weight "
        f"(16-bit model: {totals['bytes_in_16_bits'] / 1e6:.1f} MB){shown_in}\n"
        + next_commands(["generate", out, "Who are you?"], ["eval", out, "--text", text], ["inspect", out])
        + f'\nor in Python: import edkm; model = transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    )


def next_commands(*commands: Sequence[Any]) -> str:
    """Format commands to type next: `edkm`, as it is called here, with each of these arguments."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    program = ["edkm"] if shutil.which("edkm") else [python, "-m", "edkm"]
    return "\n".join(["next:", *("  " + shlex.join(map(str, [*program, *command])) for command in commands)])


def _accuracy(value: float, error: float | None = None) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _bits(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f} bits per weight"
