"""`edkm report`: write the page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = """Show a packed model on one page: sizes, quality, training, layers, weights and their tables.

The page is one HTML file that loads nothing. What a run recorded is read from edkm_report.json in DIR; what
was not recorded is said to be missing. --eval adds what `edkm eval --json` measured, of this model or of
others: their names are those of the models that were measured."""


def add_report(subparsers: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Describe the command; `command` is cli's way to add one."""
    parser = command(subparsers, "report", run, text=TEXT, example="edkm report ./packed --against ./packed2 --out report.html")
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory packed by edkm, or its hub id")
    parser.add_argument("--against", metavar="OTHER", type=Path, help="another packed directory or a dense one, to put beside it")
    parser.add_argument("--eval", action="append", default=[], metavar="FILE", type=Path, help="what edkm eval --json wrote (repeatable)")
    parser.add_argument("--out", default=Path("report.html"), metavar="FILE", type=Path, help="the page to write (report.html)")


def run(args: argparse.Namespace) -> int:
    """Run `edkm report`; returns the exit code."""
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: name a file in a directory that exists")
    from edkm.modelfiles import packed_directory
    from edkm.report.page import report

    args.out.write_text(report(packed_directory(args.directory), args.against, args.eval), encoding="utf-8")
    print(f"wrote {args.out}")
    return 0
