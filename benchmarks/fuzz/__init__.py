"""Damaged models for the reader of packed directories: `python -m benchmarks fuzz --cases 10000 --seed 0`.

Each case copies a packed model, damages it in one of some fifty ways, and gives it to a loader in another process. The loader
must refuse it with one clear line or give exactly the original's tensors; a crash, a hang, or memory beyond twice the files is a
failure. A case is made again by its number and seed.

Read: originals (what is damaged), texts and files (how), targets (what loads it), run (how it is judged).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.fuzz.run import Result, run
    from benchmarks.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="checkpoint", help="what loads the directory (checkpoint)")
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="how many (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, metavar="N", help="this one alone")
    parser.add_argument("--kind", default="", metavar="TEXT", help="mutations whose names start with this (all)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the last damaged model there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    numbers = range(args.cases) if args.case is None else [args.case]
    results: list[Result] = []
    for result in run(TARGETS[args.target], numbers, args.seed, keep=args.keep, only=args.kind):
        results.append(result)
        if result.outcome not in ("refused", "identical") or args.case is not None:
            print(f"case {result.case}: {result.kind}, {result.original}: {result.outcome}: {result.message[:1000]}", flush=True)
    summary = summarise(results)
    print(table(summary))
    if args.json is not None:
        heading = {"target": args.target, "cases": len(results), "seed": args.seed}
        args.json.write_text(json.dumps(heading | summary, indent=2) + "\n")
    return int(any(result.outcome not in ("refused", "identical") for result in results))


def summarise(results: Sequence) -> dict:
    """Counts of outcomes by kind, of messages with names and numbers left out, and the largest figures."""
    kinds: dict[str, Counter[str]] = {}
    for result in results:
        kinds.setdefault(result.kind, Counter())[result.outcome] += 1
    messages = Counter(_shape_of(result.message) for result in results if result.outcome == "refused")
    most = max(results, key=lambda result: result.extra_bytes)
    slowest = max(results, key=lambda result: result.seconds)
    return {
        "outcomes": dict(Counter(result.outcome for result in results)),
        "kinds": {kind: dict(counts) for kind, counts in sorted(kinds.items())},
        "messages": dict(messages.most_common()),
        "most_memory": {"extra_bytes": most.extra_bytes, "file_bytes": most.file_bytes, "kind": most.kind, "case": most.case},
        "slowest": {"seconds": round(slowest.seconds, 3), "kind": slowest.kind, "case": slowest.case},
    }


def table(summary: dict) -> str:
    names = sorted(summary["outcomes"], key=lambda name: (name not in ("refused", "identical"), name))
    rows = [("mutation", *names)]
    for kind, counts in [*summary["kinds"].items(), ("all", summary["outcomes"])]:
        rows.append((kind, *(f"{counts.get(name, 0):,}" for name in names)))
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(cell.rjust(max(11, len(name) + 2)) for cell, name in zip(row[1:], names)) for row in rows]
    most, slowest = summary["most_memory"], summary["slowest"]
    lines += ["", f"{len(summary['messages'])} messages, names and numbers left out:"]
    lines += [f"{count:6,}  {message}" for message, count in summary["messages"].items()]
    lines += [
        "",
        f"most memory above the original's: {most['extra_bytes'] / 2**20:.1f} MiB, files of {most['file_bytes'] / 2**20:.1f} MiB "
        f"(case {most['case']}, {most['kind']})",
        f"slowest: {slowest['seconds']:.2f} s (case {slowest['case']}, {slowest['kind']})",
    ]
    return "\n".join(lines)


def _shape_of(message: str) -> str:
    """Strip from a message paths, names of tensors, values and numbers, which differ between cases."""
    message = re.sub(r"/\S*/", "", message)
    message = re.sub(r"model(-\d+-of-\d+)?\.safetensors(?!\.)", "FILE", message)
    message = re.sub(r"got .*?(?=\. [A-Z][^.]*\.$)", "got VALUE", message)
    message = re.sub(r"(?<=[:(] )\S*(weight|_lut)\S*|\S*layers\.\S*", "NAME", message)
    message = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "'...'", message)
    return re.sub(r"-?\d+(\.\d+)?", "N", message)[:220]
