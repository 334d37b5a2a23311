"""Find the scale, and the offset, that blocks of weights in a format start from: a weighted search as llama.cpp's quantisation does it.

Some scales are tried for every block. Given the entries that are nearest then, the best theta is one step of weighted least squares,

    theta = (B^T diag(M) B)^-1 B^T m          M_j, m_j: sums of s_i and of s_i w_i over the weights nearest to entry j

and the theta with the least weighted error is kept, after it was rounded to what the format stores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edkm.core.formats import Format
from edkm.core.reference import NOT_FINITE, compute_dtype
from edkm.core.storage import Floats, SuperBlock

# Searched at once: they stay in the second cache.
_WEIGHTS_AT_ONCE = 1 << 18
# Ranges that are tried at each end, and steps of least squares from the best.
_RANGES = 14
_STEPS = 2


def initial_theta(weight: Tensor, form: Format, importance: Tensor | None = None) -> Tensor:
    """Find theta of every block of a weight, by an importance-weighted search. Deterministic.

    Args:
        weight: `[rows, cols]`, any float dtype.
        form: divides `cols`.
        importance: None, or non-negative and broadcastable to `weight`.

    Returns:
        `[rows, blocks, p]` float32 (float64 for a float64 weight), as the format stores it.

    Raises:
        ValueError: weights that are not finite, or too large for the format.

    Cost:
        Some 500 passes over a part of the weight that stays in a cache: a second for a million weights. Memory of the parts.
    """
    rows, cols = weight.shape
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weight: {NOT_FINITE}")
    dtype, shape = compute_dtype(weight.dtype), (-1, cols // form.width(cols), form.width(cols))
    shares = None if importance is None else importance.to(weight.device, dtype).expand(rows, cols)
    found = []
    for start in range(0, rows, step := max(1, _WEIGHTS_AT_ONCE // cols)):
        x = weight.detach()[start : start + step].to(dtype).reshape(shape)
        s = torch.ones_like(x) if shares is None else shares[start : start + step].reshape(shape)
        # A block without any importance is like one of equal weights.
        found.append(_search(x, torch.where(s.sum(-1, keepdim=True) > 0, s, 1), form))
    theta = torch.cat(found)
    return form.storage.read(form.checked_store(theta)).to(dtype)


def least_squares(x: Tensor, v: Tensor, s: Tensor, theta: Tensor) -> Tensor:
    """Find the theta with which entries `v` come nearest to weights `x`, both `[..., width]` with importance `s`: `[..., p]`.

    Where the entries do not tell scale and offset apart, theta stays in its direction.
    """
    if theta.shape[-1] == 1:
        return _ratio((s * v * x).sum(-1), (s * v * v).sum(-1), theta[..., 0]).unsqueeze(-1)
    total, offset, scale = s.sum(-1), *theta.unbind(-1)
    mean_v, mean_x = (s * v).sum(-1) / total, (s * x).sum(-1) / total
    v = v - mean_v.unsqueeze(-1)
    spread, along = (s * v * v).sum(-1), (s * v * x).sum(-1)
    # Entries that are all the same differ from their mean by its rounding.
    spread = torch.where(spread > 1e-12 * total * mean_v.square(), spread, 0)
    slope = _ratio(along, spread, scale)
    return torch.stack([torch.where(spread > 0, mean_x - slope * mean_v, offset), slope], -1)


def _ratio(x: Tensor, w: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(w > 0, x / torch.where(w > 0, w, 1), otherwise)


def _search(x: Tensor, s: Tensor, form: Format) -> Tensor:
    """Find theta `[rows, blocks, p]` of `x [rows, blocks, width]` with importance `s`."""
    # The blocks of a super-block are stored together: each is chosen as if theta were exact.
    stored = (lambda theta: theta) if isinstance(form.storage, SuperBlock) else form.round
    candidates = _candidates(x, form)
    best, least = stored(candidates[0]), x.new_full(x.shape[:2], torch.inf)

    def compare(theta: Tensor, v: Tensor) -> None:
        """Take theta where entries `v`, in units of its scale, have less error."""
        nonlocal best, least
        away = x - (v * theta[..., -1:] if form.p == 1 else v * theta[..., -1:] + theta[..., :1])
        error = (s * away * away).sum(-1)
        better = error < least  # not where theta is infinite, and the error not a number
        best, least = torch.where(better.unsqueeze(-1), theta, best), torch.where(better, error, least)

    for theta in candidates:
        v = form.snap(form.scaled(x, theta := stored(theta)))
        compare(theta, v)
        compare(stored(least_squares(x, v, s, theta)), v)
    for _ in range(_STEPS):
        v = form.snap(form.scaled(x, best))
        compare(best, v)
        compare(stored(least_squares(x, v, s, best)), v)
        if form.p == 2:  # with the zero point as it is stored, the best scale
            v = form.snap(form.scaled(x, best))
            q = v * best[..., -1:] + best[..., :1]
            compare(stored(best * least_squares(x, q, s, torch.ones_like(best[..., :1]))), v)
    return best


def _candidates(x: Tensor, form: Format) -> list[Tensor]:
    """List theta to try: the largest weight, or the smallest and the largest, on or around the ends of the table."""
    first, last, k = form.values[0], form.values[-1], len(form.values)
    # From entries beyond all weights to few: a weight that matters more than all others may be a small one.
    factors = torch.linspace(math.log(1 / (1 + 6 / k)), math.log(1 + 40 / k), _RANGES, dtype=torch.float64).exp().tolist()
    if form.p == 1:
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        ends = {first, last} if first != -last else {last}
        return [largest / (end * factor) for end in sorted(ends) for factor in factors]
    low, high = x.amin(-1), x.amax(-1)
    if not isinstance(form.storage, Floats):  # a zero point is one of the entries
        low, high = low.clamp_max(0), high.clamp_min(0)
    found = []
    for factor in factors:
        cut = (high - low) * (1 - 1 / factor)
        for share in (0.0, 0.5, 1.0):
            bottom, top = low + share * cut, high - (1 - share) * cut
            scale = (top - bottom) / (last - first)
            found.append(torch.stack([bottom - first * scale, scale], -1))
    return found
