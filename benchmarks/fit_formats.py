"""`python -m benchmarks fit-formats`: error and time of the fit in formats of tables with a shape, on weights of SmolLM2-135M.

Six weights of several kinds and depths, inputs from the first blocks of a data file. Errors are relative output errors,
`tr (W-Q) H (W-Q)^T / tr W H W^T` with the moment `H` shrunk as the fit does it, of

- rounded: the ends of the table on the ends of each block;
- searched: theta by the weighted search with the mean squared inputs as importance, as llama.cpp does it with an importance matrix;
- first pass: columns rounded one after another, as GPTQ does it;
- fit: after the turns of tables and indices;

and beside them the fit of a free table per row with as many bits. K-quants see the first 512 columns. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fit import timed
from benchmarks.measure import machine, write
from edkm.core import gptq
from edkm.core.formats import FORMATS, Format
from edkm.core.theta import initial_theta
from edkm.models import load_model
from edkm.train.data import load_blocks
from edkm.train.fit import input_moments
from examples.demo.data import fetch_smollm2

WEIGHTS = ("0.self_attn.q_proj", "2.mlp.down_proj", "10.mlp.up_proj", "15.self_attn.o_proj", "20.self_attn.v_proj", "28.mlp.down_proj")
NAMES = ("q4_0", "iq4_nl", "nf4", "int4_g64", "mxfp4", "q3_k", "q2_k", "tq2_0")
_COLUMNS = ("rounded", "searched", "first_pass", "fit", "free", "search_seconds", "fit_seconds", "free_seconds")


def main(argv: list[str]) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fit-formats", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="records to calibrate on, as for edkm compress")
    parser.add_argument("--blocks", type=int, default=8, help="of 512 tokens")
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(NAMES), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    problems = _problems(args.data, args.blocks)
    print(f"{'format':<12} {'weight':<20}" + "".join(f"{name.replace('_', ' '):>15}" for name in _COLUMNS))
    rows = []
    for name in args.formats:
        for weight, (matrix, moment) in problems.items():
            row = {"format": name, "weight": weight, **_measure(FORMATS[name], matrix, moment)}
            rows.append(row)
            print(f"{name:<12} {weight:<20}" + "".join(f"{row[column]:>15.5f}" for column in _COLUMNS), flush=True)
    for name in args.formats:
        mine = [row for row in rows if row["format"] == name]
        ratios = [torch.tensor([row["fit"] / row[column] for row in mine]).log().mean().exp() for column in _COLUMNS[:5]]
        print(f"{name:<12} fit over each, geometric mean " + "".join(f"{float(ratio):>15.3f}" for ratio in ratios))
    write(args.json, {"benchmark": "fit-formats", "blocks": args.blocks, "machine": machine("cpu"), "rows": rows})
    return 0


def _problems(data: Path, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Take the weights, and the moments of their inputs."""
    model, tokenizer = load_model(fetch_smollm2())
    tokens = load_blocks(data, tokenizer, block_tokens=512).input_ids[:count]
    modules = {name: model.get_submodule(f"model.layers.{name}") for name in WEIGHTS}
    linears = [module for module in modules.values() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        moments = input_moments(linears, lambda: [model(block[None]) for block in tokens])
    return {name: (module.weight.detach(), moments[module]) for name, module in modules.items() if isinstance(module, nn.Linear)}


def _measure(form: Format, weight: Tensor, moment: Tensor) -> dict[str, Any]:
    cols = weight.shape[1] // form.divisor * form.divisor
    weight, moment = weight[:, :cols], moment[:cols, :cols]
    h = gptq._shrunk(moment, 0.2)
    searched, _, search_seconds = timed(lambda: initial_theta(weight, form, moment.diagonal().unsqueeze(0)))
    found, _, seconds = timed(lambda: gptq.fit(weight, moment, form.bits, form=form))
    free, _, free_seconds = timed(lambda: gptq.fit(weight, moment, form.bits, rows_per_lut=1))

    def error(theta: Tensor) -> float:
        away = form.lookup(form.assign(weight, theta), theta) - weight
        return float(((away @ h) * away).sum() / ((weight @ h) * weight).sum())

    errors = error(form.round(_range(weight, form))), error(searched), found.errors[0], found.errors[-1], free.errors[-1]
    return dict(zip(_COLUMNS, (*errors, search_seconds, seconds, free_seconds), strict=True)) | {"turns": len(found.errors) - 1}


def _range(weight: Tensor, form: Format) -> Tensor:
    """Put the ends of the table on the ends of each block."""
    first, last = form.values[0], form.values[-1]
    x = weight.unflatten(1, (-1, form.width(weight.shape[1])))
    if form.p == 1:
        return x.gather(-1, x.abs().argmax(-1, keepdim=True)) / (first if -first > last else last)
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    scale = (high - low) / (last - first)
    return torch.stack([low - scale * first, scale], -1)
