"""Triton kernels of cuda.py: differentiable k-means of single values, one table after another. blocks.py states the equations.

Points are the weights of a table, rows x cols, contiguous. A program works through rows of one table, a tile of a row at a time. A thread
has one point of the tile with its k entries of A, in registers: sums over centroids need no other thread, sums over points are made by
thread and, at the end, once over the threads. Nothing is added in an order that may change. Two tiles are under way at a time, so that one
can be read while the other is computed.

A = e / sum_j e_j is not written out where sums of e times a factor of the point will do. The output's gradient `v` and that of the
iteration enter dZ together: with `q_j = (s h_j - v) (w - c'_j)`,

    dZ_j = A_j (q_j - sum_m A_m q_m)          dL/dw = s sum_j A_j h_j - (2/tau) sum_j dZ_j (w - c_j)

which is the sum of both of `blocks`, since a term `v w` that all j share leaves dZ as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# More centroids than this are spread over four threads, and a program has one warp.
MOST_BY_THREAD = 16


def constants(round_to: torch.dtype | None, k: int, warps: int) -> dict[str, Any]:
    """List what every kernel is compiled for, and options of the launch; `warps` is 1 for more than `MOST_BY_THREAD` centroids."""
    rounded = None if round_to is None else getattr(tl, str(round_to).removeprefix("torch."))
    width = 32 * warps if k <= MOST_BY_THREAD else 8
    tile = {"round_to": rounded, "k": k, "size": max(2, triton.next_power_of_2(k)), "width": width}
    return {**tile, "num_warps": warps, "enable_fp_fusion": True}


@triton.jit
def solve(
    weight, importance, stride, trajectory, temperature, iters, groups, rows, cols,
    round_to: tl.constexpr, floor: tl.constexpr, k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Run all iterations of a table: write `trajectory[1:]`."""
    g = tl.program_id(0)
    j = tl.arange(0, size)
    tau = tl.load(temperature + g)
    c = tl.load(trajectory + g * k + j, mask=j < k, other=0.0)
    for t in range(iters):
        mass, total = _sums(
            weight, importance, stride, weight, g.to(tl.int64) * rows, rows, cols, c, tau, round_to, False, False, k, size, width
        )
        stays = mass <= floor * tl.sum(mass, 0)  # false for NaN, which is to be reported
        c = tl.where(stays, c, total / tl.where(stays, 1.0, mass))
        tl.store(trajectory + ((t + 1) * groups + g) * k + j, c, mask=j < k)


@triton.jit
def sums(
    weight, importance, stride, grad, centroids, temperature, out, parts, per_part, rows, cols,
    round_to: tl.constexpr, adjoint: tl.constexpr, last: tl.constexpr, k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Add up a part of a table for one iteration: `out [g, parts, k, 2]`, as `_sums`."""
    g, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    j = tl.arange(0, size)
    c = tl.load(centroids + g * k + j, mask=j < k, other=0.0)
    first = g.to(tl.int64) * rows + part * per_part
    count = tl.minimum(per_part, rows - part * per_part)
    mass, total = _sums(
        weight, importance, stride, grad, first, count, cols, c, tl.load(temperature + g), round_to, adjoint, last, k, size, width
    )
    at = out + (tl.program_id(0) * k + j) * 2
    tl.store(at, mass, mask=j < k)
    tl.store(at + 1, total, mask=j < k)


@triton.jit
def decode(
    weight, centroids, c_next, temperature, out, parts, per_part, rows, cols,
    round_to: tl.constexpr, k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Write `sum_j A_j c'_j` of a part of a table."""
    g, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    j = tl.arange(0, size)
    c = tl.load(centroids + g * k + j, mask=j < k, other=0.0)
    after = tl.load(c_next + g * k + j, mask=j < k, other=0.0)
    tau = tl.load(temperature + g)
    first = g.to(tl.int64) * rows + part * per_part
    for row in range(tl.minimum(per_part, rows - part * per_part)):
        for start in tl.range(0, cols, width, loop_unroll_factor=2):
            at, _, mask = _tile(first + row, start, cols, width)
            w = _values(weight + at, mask, round_to, c.dtype)
            e, over = _assignment(w, c, tau, k, size)
            soft = tl.sum(e * after[:, None], 0) * over
            tl.store(out + at, soft.to(out.dtype.element_ty), mask=mask)


@triton.jit
def adjoint(
    weight, importance, stride, grad, dw, trajectory, temperature, iters, groups, rows, cols,
    round_to: tl.constexpr, floor: tl.constexpr, once: tl.constexpr, k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Reverse all iterations of a table: write dL/dw. `once`: there is one iteration."""
    g = tl.program_id(0)
    j = tl.arange(0, size)
    tau = tl.load(temperature + g)
    first = g.to(tl.int64) * rows
    table = trajectory + g * k + j
    c_next = tl.load(table + iters * groups * k, mask=j < k, other=0.0)
    c = tl.load(table + (iters - 1) * groups * k, mask=j < k, other=0.0)
    mass, gc = _sums(weight, importance, stride, grad, first, rows, cols, c, tau, round_to, True, True, k, size, width)
    h, stay = _update_adjoint(gc, mass, floor)
    share = _gradients(weight, importance, stride, grad, dw, first, rows, cols, c, c_next, h, tau, round_to, True, once, k, size, width)
    if not once:
        gc = stay + share
        for after in range(1, iters):
            tl.debug_barrier()  # a thread may read sums of dw that another wrote
            c_next = c
            c = tl.load(table + (iters - 1 - after) * groups * k, mask=j < k, other=0.0)
            mass, _ = _sums(weight, importance, stride, grad, first, rows, cols, c, tau, round_to, True, False, k, size, width)
            h, stay = _update_adjoint(gc, mass, floor)
            share = _gradients(
                weight, importance, stride, grad, dw, first, rows, cols, c, c_next, h, tau, round_to, False, False, k, size, width
            )
            gc = stay + share


@triton.jit
def gradients(
    weight, importance, stride, grad, dw, centroids, c_next, pull, temperature, out, parts, per_part, rows, cols,
    round_to: tl.constexpr, last: tl.constexpr, k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Add an iteration's terms of a part of a table to dL/dw, with `pull` = h: `out [g, parts, k]`, its share of dL/dc."""
    g, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    j = tl.arange(0, size)
    c = tl.load(centroids + g * k + j, mask=j < k, other=0.0)
    after = tl.load(c_next + g * k + j, mask=j < k, other=0.0)
    h = tl.load(pull + g * k + j, mask=j < k, other=0.0)
    first = g.to(tl.int64) * rows + part * per_part
    count = tl.minimum(per_part, rows - part * per_part)
    tau = tl.load(temperature + g)
    share = _gradients(weight, importance, stride, grad, dw, first, count, cols, c, after, h, tau, round_to, last, False, k, size, width)
    tl.store(out + tl.program_id(0) * k + j, share, mask=j < k)


@triton.jit
def _sums(
    weight, importance, stride, grad, first, count, cols, c, tau,
    round_to: tl.constexpr, adjoint: tl.constexpr, last: tl.constexpr, k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Compute `sum_i s_i A_ij` over rows, and `sum_i s_i A_ij w_i`; in the adjoint of the last iteration `sum_i A_ij v_i`."""
    mass = tl.zeros([size, width], c.dtype)
    total = tl.zeros([size, width], c.dtype)
    for row in range(count):
        for start in tl.range(0, cols, width, loop_unroll_factor=2):
            at, i, mask = _tile(first + row, start, cols, width)
            w = _values(weight + at, mask, round_to, c.dtype)
            s = _importance(importance, (first + row) * stride + i, mask, c.dtype)
            e, over = _assignment(w, c, tau, k, size)
            scaled = s * over
            mass += e * scaled[None, :]
            if last:
                total += e * (_values(grad + at, mask, None, c.dtype) * over)[None, :]
            elif not adjoint:
                total += e * (scaled * w)[None, :]
    return tl.sum(mass, 1), tl.sum(total, 1)


@triton.jit
def _gradients(
    weight, importance, stride, grad, dw, first, count, cols, c, c_next, h, tau,
    round_to: tl.constexpr, last: tl.constexpr, once: tl.constexpr, k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Add an iteration's terms to dL/dw over rows; return its share of dL/d(centroids before), which nobody needs if `once`."""
    share = tl.zeros([size, width], c.dtype)
    for row in range(count):
        for start in tl.range(0, cols, width, loop_unroll_factor=2):
            at, i, mask = _tile(first + row, start, cols, width)
            w = _values(weight + at, mask, round_to, c.dtype)
            s = _importance(importance, (first + row) * stride + i, mask, c.dtype)
            e, over = _assignment(w, c, tau, k, size)
            q = s[None, :] * h[:, None]
            if last:
                q -= _values(grad + at, mask, None, c.dtype)[None, :]
            q *= w[None, :] - c_next[:, None]
            q -= (tl.sum(e * q, 0) * over)[None, :]
            moment = e * q * (w[None, :] - c[:, None])  # dZ (w - c), to be multiplied by `over` as all sums of e
            term = over * (s * tl.sum(e * h[:, None], 0) - (2.0 / tau) * tl.sum(moment, 0))
            if not last:
                term += tl.load(dw + at, mask=mask, other=0.0)
            tl.store(dw + at, term.to(dw.dtype.element_ty), mask=mask)
            if not once:
                share += moment * over[None, :]
    return tl.sum(share, 1) * (2.0 / tau)


@triton.jit
def _update_adjoint(gc, mass, floor: tl.constexpr):
    """Do what `blocks.update_adjoint` does."""
    alive = mass > floor * tl.sum(mass, 0)
    return tl.where(alive, gc / tl.where(alive, mass, 1.0), 0.0), tl.where(alive, 0.0, gc)


@triton.jit
def _assignment(w, c, tau, k: tl.constexpr, size: tl.constexpr):
    """Compute e [size, width] and the reciprocal of its sum [width]: A is their product. Centroids from `k` on are none."""
    away = w[None, :] - c[:, None]
    away *= away
    if k < size:
        away = tl.where((tl.arange(0, size) < k)[:, None], away, float("inf"))
    rate = LOG2_E / tau
    e = tl.exp2((tl.min(away, 0) * rate)[None, :] - away * rate)
    return e, 1.0 / tl.sum(e, 0)


@triton.jit
def _tile(row, start, cols, width: tl.constexpr):
    """Name a tile of a row: where its points are, their columns, and which of them there are."""
    i = start + tl.arange(0, width)
    return row * cols + i, i, i < cols


@triton.jit
def _values(at, mask, round_to: tl.constexpr, dtype: tl.constexpr):
    values = tl.load(at, mask=mask, other=0.0)
    if round_to is not None:
        if round_to == tl.bfloat16:  # by its bits, since Triton's interpreter only cuts digits off
            wide = values.to(tl.float32)
            bits = wide.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            values = tl.where(wide == wide, bits.to(tl.float32, bitcast=True), wide)
        else:
            values = values.to(round_to)
    return values.to(dtype)


@triton.jit
def _importance(importance, at, mask, dtype: tl.constexpr):
    """Read the importance of points: 1 without any, 0 beyond the row."""
    if importance is None:
        s = mask.to(dtype)
    else:
        s = tl.load(importance + at, mask=mask, other=0.0).to(dtype)
    return s
