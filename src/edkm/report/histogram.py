"""How the weights of a layer lie, and where its centroids lie among them, small enough for a report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BINS = 128
# In root mean squares of the weights that share a table: the few weights beyond are counted, not drawn.
REACH = 4.0
_ROWS_AT_ONCE = 1 << 20


def describe(weight: Tensor, tables: int, lut: Tensor | None = None) -> dict[str, Any]:
    """A histogram of a weight and the spread of its centroids, each in units of its own table.

    Rows that share a table have a scale of their own, so every weight is divided by the root mean square of the weights of its table,
    and so is every centroid. Otherwise the centroids of hundreds of tables would lie on each other.

    Args:
        weight: `[rows, ...]`, any float dtype.
        tables: tables of the weight, in order of its rows; divides `rows`.
        lut: `[tables, k, 1]`, or None. Tables of vectors have no place on one axis and are left out.

    Returns:
        A JSON object: `counts`, weights in each of `BINS` equal bins from -REACH to REACH; `outside`, weights beyond;
        `centroids`, for each of k the [25 %, 50 %, 75 %] quantiles over the tables, ascending; empty without scalar tables.

    Cost:
        Two passes over the weight; transient memory is bounded by a block.
    """
    groups = weight.detach().flatten(1).reshape(tables, -1)  # [tables, weights of a table]
    scales = groups.float().square().mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)  # [tables]
    counts = torch.zeros(BINS, dtype=torch.int64)
    step = max(1, _ROWS_AT_ONCE // groups.shape[1])
    for start in range(0, tables, step):
        block = groups[start : start + step].float() / scales[start : start + step, None]
        counts += torch.histc(block.cpu(), BINS, -REACH, REACH).long()
    centroids: list[list[float]] = []
    if lut is not None and lut.shape[2] == 1:
        scaled = lut[:, :, 0].float() / scales[:, None].to(lut.device)  # [tables, k]
        spread = torch.quantile(scaled.sort(dim=1).values.cpu(), torch.tensor([0.25, 0.5, 0.75]), dim=0)  # [3, k]
        centroids = [[round(value, 4) for value in one] for one in spread.T.tolist()]
    return {"counts": counts.tolist(), "outside": weight.numel() - int(counts.sum()), "centroids": centroids}


def chosen(names: Iterable[str], most: int = 4) -> list[str]:
    """Names of a few weights that stand for the others: of different kinds, from the first layer to the last.

    Args:
        names: of weights in the order of the model; the first number in a name is its layer.
        most: how many.

    Returns:
        At most `most` of the names.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    found = []
    picked = list(kinds)
    count = min(most, sum(map(len, kinds.values())))
    for i in range(count):
        share = i / max(1, count - 1)
        members = kinds[picked[round(share * (len(picked) - 1))]]
        found.append(members[round(share * (len(members) - 1))])
    return list(dict.fromkeys(found))
