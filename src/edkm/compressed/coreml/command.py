"""`edkm export`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEXT = """Write a packed model for another runtime, with its indices and tables as they are.

--to coreml: a package for iOS 18 and macOS 15, made on Linux or macOS. Inputs inputIds and, with
--kv-cache, fullAttentionMask; output logits; states keyCache and valueCache. The tables and indices on the
disk must equal the packed ones, and the program must give the packed model's logits; else nothing is
written. LLaMA (SmolLM2), Mistral, Qwen2 and Qwen3. Needs pip install 'edkm[coreml]'."""


def add_export(subparsers: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = command(subparsers, "export", _run, text=_TEXT, example="edkm export ./packed --to coreml --out Model.mlpackage --kv-cache")
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory packed by edkm, or its hub id")
    parser.add_argument("--to", required=True, choices=("coreml",), help="the runtime")
    parser.add_argument("--out", required=True, metavar="M.mlpackage", type=Path, help="package to write")
    parser.add_argument("--precision", default="float16", choices=("float16", "float32"), help="of all arithmetic (float16)")
    parser.add_argument("--kv-cache", action="store_true", help="keep keys and values in a state, to continue a text token by token")
    parser.add_argument("--context", type=int, metavar="N", help="longest text in tokens (2048, or what the model was made for)")
    parser.add_argument("--fixed", action="store_true", help="take exactly N tokens, not 1 to N; not with --kv-cache")
    parser.add_argument("--widen", action="store_true", help="store 5- and 7-bit indices, which Core ML lacks, with 6 and 8 bits")
    parser.add_argument("--overwrite", action="store_true", help="replace the package if there is one")


def _run(args: argparse.Namespace) -> int:
    from ...modelfiles import packed_directory
    from .export import export

    done = export(
        packed_directory(args.directory),
        args.out,
        precision=args.precision,
        kv_cache=args.kv_cache,
        context=args.context,
        fixed=args.fixed,
        widen=args.widen,
        overwrite=args.overwrite,
    )
    print(f"wrote {args.out}: {done.package_bytes:,} bytes, {done.clustered} clustered tensors, indices and tables on the disk equal")
    for name, bits in done.widened.items():
        print(f"{name}: stored with {bits} bits, its values unchanged")
    for label, found in (("the program", done.program), ("Core ML", done.device)):
        if found is not None:
            print(f"logits of {label}: cosine {found.cosine:.7f}, largest difference {found.largest:.3g}")
    if done.device is None:
        print("Core ML itself was not run: that needs macOS 15")
    return 0
