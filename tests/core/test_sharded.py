"""Clustering of rows that lie on several ranks, for which threads stand:

1. any cut of the rows gives the centroids, output and gradient of the whole weight, and all ranks the same bits;
2. frozen pieces one after another are the frozen whole;
3. a weight that is not finite on one rank is noticed on all;
4. no rank reads a row of another: only sums travel;
5. blocks of columns, in a format, are clustered and frozen as in one process.
"""

import itertools
import threading

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edkm.core import op, sharded
from edkm.core.assign import assign, round_lut, stored_parts, stored_tables
from edkm.core.formats import FORMATS, freeze_blocks
from edkm.core.reference import Problem
from edkm.core.sharded import Rows
from edkm.core.theta import initial_theta


class Ranks:
    """Runs a function as several ranks, each in a thread, with a `reduce` that adds up."""

    def __init__(self, world):
        self.world, self.results, self.errors = world, [None] * world, [None] * world
        self.boxes, self.barrier = [None] * world, threading.Barrier(world, timeout=30)

    def run(self, function):
        def one(rank):
            def reduce(x):
                self.boxes[rank] = x.clone()
                self.barrier.wait()
                shapes = {tuple(box.shape) for box in self.boxes}
                total = torch.stack(self.boxes).sum(0)
                self.barrier.wait()
                assert len(shapes) == 1
                return total

            try:
                self.results[rank] = function(rank, reduce)
            except Exception as error:
                self.errors[rank] = error

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results


def cut(weight, edges):
    ends = [0, *sorted(edges), len(weight)]
    return [Rows(weight[a:b], a, len(weight)) for a, b in itertools.pairwise(ends)]


def problem(rows=24, cols=10, groups=3, k=4, d=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    centroids = torch.randn(groups, k, d, generator=generator, dtype=torch.float64).to(compute).sort(1).values
    importance = torch.rand(rows, cols, generator=generator, dtype=torch.float64).to(compute)
    return weight, importance, centroids, torch.full((groups,), 0.3, dtype=compute)


def both(weight, importance, centroids, tau, edges, backend, round_to=None, iters=3):
    """Solutions of the whole weight and of every rank."""
    whole = op.solve(weight, centroids, Problem(tau, importance, round_to), iters, backend)
    pieces = cut(weight, edges)
    ranks = Ranks(len(pieces))
    ranks.run(lambda rank, reduce: sharded.solve(pieces[rank], centroids, Problem(tau, importance, round_to), iters, backend, reduce))
    assert ranks.errors == [None] * len(pieces)
    return whole, ranks.results


def assert_agree(whole, ranks, weight, rtol, atol):
    """All ranks have the same bits, and the solution of the whole; the gradient may differ by ten times as much."""
    grad = torch.randn_like(weight)
    for solution in ranks:
        assert torch.equal(solution.trajectory, ranks[0].trajectory)
        torch.testing.assert_close(solution.trajectory, whole.trajectory, rtol=rtol, atol=atol)
        torch.testing.assert_close(solution.decode(weight), whole.decode(weight), rtol=rtol, atol=atol)
        torch.testing.assert_close(solution.adjoint(grad, weight), whole.adjoint(grad, weight), rtol=10 * rtol, atol=10 * atol)


GRIDS = st.sampled_from([(1, 1), (3, 1), (24, 1), (3, 2), (1, 8), (3, 4)])
EDGES = st.lists(st.integers(0, 24), min_size=1, max_size=5)


@pytest.mark.parametrize("backend", ["blocks", "native"])
@settings(max_examples=40, deadline=None)
@given(EDGES, GRIDS, st.booleans())
def test_any_cut_gives_the_same_centroids_and_gradients(backend, edges, grid, with_importance):
    groups, d = grid
    assume(d == 1 or backend == "blocks")
    weight, importance, centroids, tau = problem(groups=groups, d=d)
    importance = importance if with_importance else None
    whole, ranks = both(weight, importance, centroids, tau, edges, backend)
    assert_agree(whole, ranks, weight, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(EDGES, st.sampled_from(["none", "full", "zeros"]))
def test_a_histogram_of_pieces_is_that_of_the_whole(edges, kind):
    weight, importance, centroids, tau = problem(cols=40, groups=1, dtype=torch.float32)
    importance = None if kind == "none" else importance * (importance > 0.5) if kind == "zeros" else importance
    whole, ranks = both(weight, importance, centroids, tau, edges, "histogram", torch.bfloat16)
    assert_agree(whole, ranks, weight, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(EDGES, GRIDS)
def test_frozen_shards_one_after_another_are_the_frozen_whole(edges, grid):
    groups, d = grid
    weight, _, centroids, _ = problem(groups=groups, d=d)
    lut, pieces = round_lut(centroids), cut(weight, edges)
    ranks = Ranks(len(pieces))
    ranks.run(lambda rank, reduce: sharded.freeze(pieces[rank], lut, reduce))
    assert ranks.errors == [None] * len(pieces)
    assert torch.equal(torch.cat([indices for indices, _ in ranks.results]), assign(weight, lut))
    errors = {error for _, error in ranks.results}
    assert len(errors) == 1 and 0 < errors.pop() < 10


@pytest.mark.parametrize("backend", ["histogram", "blocks", "native"])
def test_a_weight_that_is_not_finite_on_one_rank_makes_centroids_nan_on_all(backend):
    weight, importance, centroids, tau = problem(groups=1 if backend == "histogram" else 3, dtype=torch.float32)
    weight[20, 3] = torch.nan
    pieces = cut(weight, [8, 16])
    ranks = Ranks(3)
    ranks.run(lambda rank, reduce: sharded.solve(pieces[rank], centroids, Problem(tau, importance), 1, backend, reduce))
    assert ranks.errors == [None] * 3
    assert all(bool(solution.trajectory[-1].isnan().any()) for solution in ranks.results)


@pytest.mark.parametrize(("backend", "groups", "travels"), [("blocks", 4, 4 * 4 * 2), ("histogram", 1, 1 << 16)])
def test_no_rank_reads_a_row_of_another(backend, groups, travels):
    """Rows are all that a rank is given, and only sums of the size of the centroids, or of all 16-bit values, travel."""
    weight, importance, centroids, tau = problem(rows=64, cols=64, groups=groups, dtype=torch.float32)
    pieces, sizes = cut(weight, [10, 40]), []

    def one(rank, reduce):
        def watched(x):
            sizes.append(x.numel())
            return reduce(x)

        return sharded.solve(pieces[rank], centroids, Problem(tau, importance), 2, backend, watched)

    Ranks(3).run(one)
    assert set(sizes) == {travels}


@pytest.mark.parametrize("name", ["q4_0", "q2_k", "nvfp4"])
def test_blocks_of_columns_are_clustered_and_frozen_as_in_one_process(name):
    form, edges = FORMATS[name], (3, 3)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    theta = initial_theta(weight, form)
    start, tau = theta.reshape(-1, form.p, 1), torch.full((theta.shape[0] * theta.shape[1],), 0.02)
    groups = len(start)
    importance = torch.rand(1, 256, generator=torch.Generator().manual_seed(1)).view(-1, form.block)
    given = Problem(tau, importance, None, form.basis())
    whole = op.solve(weight.view(groups, -1), start, given, 2, "blocks")
    expected = freeze_blocks(weight, whole.trajectory[-1].view_as(theta), form, (8, 256))

    def one(rank, reduce):
        rows = cut(weight, edges)[rank]
        found = sharded.solve(rows.in_blocks(groups), start, given, 2, "blocks", reduce)
        after = found.trajectory[-1]
        return after, *sharded.freeze(rows, stored_tables(after, form, 8), reduce, form)

    results = Ranks(3).run(one)
    for after, _, error in results:
        assert torch.allclose(after, whole.trajectory[-1], rtol=1e-4, atol=1e-6) and torch.equal(after, results[0][0])
        assert error == pytest.approx(expected.error, rel=1e-3)
    indices = torch.cat([indices for _, indices, _ in results])
    assert (indices != expected.indices).float().mean() < 1e-2
    parts = stored_parts(results[0][0], form, 8)
    assert all(torch.allclose(parts[part].float(), expected.parts[part].float(), rtol=0.15, atol=1) for part in parts)
