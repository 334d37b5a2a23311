"""Triton kernels of cuda.py for tables with a shape, `c_j = o + a v_j`: kernels.c says how an iteration does without A.

All that is needed of A are the moments e_m of `y_j = v_j - near` about the value nearest to a weight, in registers. Groups are small: a
program has several, each a row of its tile, and goes through all iterations; a group longer than a tile is gone through tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from edkm.core.gpukernels import LOG2_E, _importance, _values
from edkm.core.reference import LEAST_SPREAD

_TILE = 512
_FAR = tl.constexpr(1e18)
_LEAST = tl.constexpr(LEAST_SPREAD)


def constants(round_to: torch.dtype | None, values: torch.Tensor, points: int, p: int, *, hard: bool) -> dict[str, Any]:
    """List what every kernel is compiled for, and options of the launch, for groups of so many points."""
    rounded = None if round_to is None else getattr(tl, str(round_to).removeprefix("torch."))
    width = min(_TILE, triton.next_power_of_2(points))
    lowest = -156.0 if values.dtype == torch.float64 else -69.0  # under 2^this an entry of A is noise
    form = {"round_to": rounded, "p": p, "k": len(values), "size": triton.next_power_of_2(len(values)), "hard": hard, "lowest": lowest}
    return {**form, "several": _TILE // width, "width": width, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def solve(
    weight, importance, period, trajectory, temperature, values, iters, groups, points,
    round_to: tl.constexpr, p: tl.constexpr, k: tl.constexpr, hard: tl.constexpr, lowest: tl.constexpr,
    size: tl.constexpr, several: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Run all iterations of some groups: write theta into `trajectory[1:]`, `[iters + 1, groups, p]`."""
    integers = _are_integers(values, k, size)
    g = tl.program_id(0) * several + tl.arange(0, several)
    o, a = _theta(trajectory, g, g < groups, p)
    for t in range(iters):
        rate, steps = _rate(temperature, g, g < groups, a, k, hard, lowest)
        middle = _middle(weight, g, g < groups, points, o, a, values, integers, round_to, p, k)
        mass, first, second, right0, right1, _, _ = _sums(
            weight, importance, period, weight, False, g, g < groups, points, o, a, rate, steps, middle, values, integers,
            round_to, k, hard, lowest, several, width,
        )  # fmt: skip
        alive, mean, over, inverse = _normal(mass, first, second, values, p, k)
        scale = (right1 - mean * right0) * inverse
        a += tl.where(alive, scale, 0.0)
        o += tl.where(alive, right0 * over - scale * (mean + middle), 0.0) if p == 2 else tl.zeros_like(o)
        to = trajectory + ((t + 1) * groups + g.to(tl.int64)) * p
        tl.store(to + p - 1, a, mask=g < groups)
        if p == 2:
            tl.store(to, o, mask=g < groups)


@triton.jit
def decode(
    weight, theta, after, temperature, values, out, groups, points,
    round_to: tl.constexpr, p: tl.constexpr, k: tl.constexpr, hard: tl.constexpr, lowest: tl.constexpr,
    size: tl.constexpr, several: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Write `sum_j A_j c'_j` of some groups."""
    integers = _are_integers(values, k, size)
    g = tl.program_id(0) * several + tl.arange(0, several)
    o, a = _theta(theta, g, g < groups, p)
    o_next, a_next = _theta(after, g, g < groups, p)
    rate, steps = _rate(temperature, g, g < groups, a, k, hard, lowest)
    for start in range(0, points, width):
        at, mask = _tile(g, g < groups, start, points, width)
        _, near, u = _cells(weight + at, mask, o, a, values, integers, round_to, k)
        e1, _, _, _ = _moments(u, near, rate, steps, values, integers, k, hard, lowest, False)
        soft = a_next[:, None] * (near + e1) + o_next[:, None]
        tl.store(out + at, soft.to(out.dtype.element_ty), mask=mask)


@triton.jit
def adjoint(
    weight, importance, period, grad, dw, trajectory, temperature, values, iters, groups, points,
    round_to: tl.constexpr, p: tl.constexpr, k: tl.constexpr, hard: tl.constexpr, lowest: tl.constexpr,
    size: tl.constexpr, several: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Reverse all iterations of some groups: write dL/dw."""
    integers = _are_integers(values, k, size)
    g = tl.program_id(0) * several + tl.arange(0, several)
    there = g < groups
    tau = tl.load(temperature + g, mask=there, other=1.0)
    o_next, a_next = _theta(trajectory + iters * groups * p, g, there, p)
    pull_o, pull_a = tl.zeros_like(o_next), tl.zeros_like(o_next)  # dL/dtheta of the iteration's result
    for back in range(iters):
        last = back == 0
        tl.debug_barrier()  # a thread may read sums of dw that another wrote
        o, a = _theta(trajectory + (iters - 1 - back) * groups * p, g, there, p)
        rate, steps = _rate(temperature, g, there, a, k, hard, lowest)
        middle = _middle(weight, g, there, points, o, a, values, integers, round_to, p, k)
        mass, first, second, _, _, grad0, grad1 = _sums(
            weight, importance, period, grad, last, g, there, points, o, a, rate, steps, middle, values, integers,
            round_to, k, hard, lowest, several, width,
        )  # fmt: skip
        pull_o = tl.where(last, grad0, pull_o)
        pull_a = tl.where(last, grad1 + middle * grad0, pull_a)
        alive, mean, over, inverse = _normal(mass, first, second, values, p, k)
        # As blocks.update_adjoint: h_j = h0 + h1 (v_j - middle) where theta moved; where it stayed, its gradient goes past the iteration.
        h1 = tl.where(alive, (pull_a - (mean + middle) * pull_o) * inverse, 0.0)
        h0 = tl.where(alive, pull_o * over, 0.0) - h1 * mean if p == 2 else tl.zeros_like(h1)
        pull_o, pull_a = tl.where(alive, 0.0, pull_o), tl.where(alive, 0.0, pull_a)
        for start in range(0, points, width):
            at, mask = _tile(g, there, start, points, width)
            w, near, u = _cells(weight + at, mask, o, a, values, integers, round_to, k)
            e1, e2, e3, e4 = _moments(u, near, rate, steps, values, integers, k, hard, lowest, True)
            s = _importance(importance, at % period, mask, w.dtype)
            v = _values(grad + at, mask & last, None, w.dtype)
            # q_j = (w - c'_j) (s h_j - v) is a quadratic in y_j; its covariances with y and y^2.
            t = near - middle[:, None]
            h = h0[:, None] + h1[:, None] * t
            right = s * h - v
            q1 = (w - (o_next[:, None] + a_next[:, None] * near)) * s * h1[:, None] - a_next[:, None] * right
            q2 = -a_next[:, None] * s * h1[:, None]
            k11, k12, k22 = e2 - e1 * e1, e3 - e1 * e2, e4 - e2 * e2
            sharp = (2.0 / tau)[:, None]
            on_y, on_square = q1 * k11 + q2 * k12, q1 * k12 + q2 * k22
            term = s * (h + h1[:, None] * e1) + sharp * a[:, None] * on_y
            term += tl.load(dw + at, mask=mask & (back > 0), other=0.0)
            tl.store(dw + at, term.to(dw.dtype.element_ty), mask=mask)
            away = w - (o[:, None] + a[:, None] * near) - a[:, None] * t
            on_o = tl.sum(tl.where(mask, -sharp * a[:, None] * on_y, 0.0), 1)
            pull_a += tl.sum(tl.where(mask, sharp * (away * on_y - a[:, None] * on_square), 0.0), 1) + middle * on_o
            pull_o += on_o
        o_next, a_next = o, a


@triton.jit
def _sums(
    weight, importance, period, grad, last, g, there, points, o, a, rate, steps, middle, values, integers,
    round_to: tl.constexpr, k: tl.constexpr, hard: tl.constexpr, lowest: tl.constexpr,
    several: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Compute `Sums` of kernels.c of every group, those of the gradient if it is the `last` iteration."""
    mass = tl.zeros([several], o.dtype)
    first, second, right0, right1, grad0, grad1 = mass, mass, mass, mass, mass, mass
    for start in range(0, points, width):
        at, mask = _tile(g, there, start, points, width)
        w, near, u = _cells(weight + at, mask, o, a, values, integers, round_to, k)
        e1, e2, _, _ = _moments(u, near, rate, steps, values, integers, k, hard, lowest, False)
        s = _importance(importance, at % period, mask, w.dtype)
        v = _values(grad + at, mask & last, None, w.dtype)
        t = near - middle[:, None]
        d = w - (o[:, None] + a[:, None] * near)
        away = d - a[:, None] * e1
        mass += tl.sum(s, 1)
        first += tl.sum(s * (t + e1), 1)
        second += tl.sum(s * (t * (t + 2 * e1) + e2), 1)
        right0 += tl.sum(s * away, 1)
        right1 += tl.sum(s * (t * away + (d * e1 - a[:, None] * e2)), 1)
        grad0 += tl.sum(v, 1)
        grad1 += tl.sum(v * (t + e1), 1)
    return mass, first, second, right0, right1, grad0, grad1


@triton.jit
def _normal(mass, first, second, values, p: tl.constexpr, k: tl.constexpr):
    """Do what reference.normal_inverse does: which groups move, the mean of their values, 1 / mass and 1 / spread."""
    step = (tl.load(values + k - 1) - tl.load(values)) / (k - 1)
    over = 1.0 / tl.where(mass == 0, 1.0, mass)
    mean = first * over if p == 2 else tl.zeros_like(mass)
    spread = second - first * mean
    stays = (mass == 0) | (spread <= _LEAST * step * step * mass)  # false for NaN, which is to be reported
    return ~stays, mean, over, 1.0 / tl.where(stays, 1.0, spread)


@triton.jit
def _theta(theta, g, there, p: tl.constexpr):
    """Read offset and scale."""
    a = tl.load(theta + g.to(tl.int64) * p + p - 1, mask=there, other=1.0)
    o = tl.load(theta + g.to(tl.int64) * p, mask=there, other=0.0) if p == 2 else tl.zeros_like(a)
    return o, a


@triton.jit
def _rate(temperature, g, there, a, k: tl.constexpr, hard: tl.constexpr, lowest: tl.constexpr):
    """Compute a^2 / tau for powers of 2, and the steps from the nearest value that count in any group."""
    if hard:
        return tl.zeros_like(a), 1
    tau = tl.load(temperature + g, mask=there, other=1e-9)
    rate = tl.maximum(a * a / tau * LOG2_E, 1.0 / _FAR)
    steps = 1.5 + tl.sqrt(-lowest / tl.min(rate, 0) + 0.25)
    return rate, tl.minimum(steps, k).to(tl.int32)


@triton.jit
def _middle(weight, g, there, points, o, a, values, integers, round_to: tl.constexpr, p: tl.constexpr, k: tl.constexpr):
    """Find the value about which a group's sums are made, so that they lose no digits: that of its first point."""
    if p == 1:
        return tl.zeros_like(a)
    w = _values(weight + g.to(tl.int64) * points, there, round_to, a.dtype)
    return _snap((w - o) / tl.where(a == 0, 1.0, a), values, integers, k)


@triton.jit
def _tile(g, there, start, points, width: tl.constexpr):
    """Name a tile of groups: where its points are, and which of them there are."""
    i = start + tl.arange(0, width)
    return g.to(tl.int64)[:, None] * points + i[None, :], there[:, None] & (i < points)[None, :]


@triton.jit
def _cells(at, mask, o, a, values, integers, round_to: tl.constexpr, k: tl.constexpr):
    """Read points: their weight, nearest value, and distance from it in units of the scale."""
    w = _values(at, mask, round_to, a.dtype)
    x = (w - o[:, None]) / tl.where(a == 0, 1.0, a)[:, None]
    near = _snap(x, values, integers, k)
    return w, near, x - near


@triton.jit
def _are_integers(values, k: tl.constexpr, size: tl.constexpr):
    """Tell whether the values are consecutive integers: only some near a weight count then."""
    low, j = tl.load(values), tl.arange(0, size)
    same = tl.load(values + j, mask=j < k, other=0.0) == tl.where(j < k, low + j, 0.0)
    return (tl.min(same.to(tl.int32), 0) != 0) & (low == tl.floor(low))


@triton.jit
def _snap(x, values, integers, k: tl.constexpr):
    """Find the nearest value; halfway between two the lower one."""
    low, high = tl.load(values), tl.load(values + k - 1)
    if integers:
        return tl.minimum(tl.maximum(tl.ceil(x - 0.5), low), high)
    near = tl.zeros_like(x) + low
    for j in range(1, k):
        value = tl.load(values + j)
        near = tl.where(x > (tl.load(values + j - 1) + value) / 2, value, near)
    return near


@triton.jit
def _moments(
    u, near, rate, steps, values, integers,
    k: tl.constexpr, hard: tl.constexpr, lowest: tl.constexpr, all4: tl.constexpr,
):  # fmt: skip
    """Compute e1 to e4, e3 and e4 only if asked for."""
    e0, e1, e2 = tl.zeros_like(u), tl.zeros_like(u), tl.zeros_like(u)
    e3, e4 = e1, e1
    if hard:
        return e1, e1, e1, e1
    low, high = tl.load(values), tl.load(values + k - 1)
    first, stop = tl.where(integers, 1 - steps, 0), tl.where(integers, steps, k)
    for j in range(first, stop):
        y = tl.load(values + tl.maximum(j, 0)) - near
        if integers:
            y = tl.zeros_like(u) + j
        x = -rate[:, None] * y * (y - 2 * u)
        counts = (x > lowest) & ((near + y >= low) & (near + y <= high) | ~integers)
        e = tl.where(counts, tl.exp2(tl.where(counts, x, 0.0)), 0.0)
        e0 += e
        e *= y
        e1 += e
        e *= y
        e2 += e
        if all4:
            e *= y
            e3 += e
            e *= y
            e4 += e
    share = 1.0 / e0
    return e1 * share, e2 * share, e3 * share, e4 * share
