"""`core.gptq`, the fit to the second moment of a layer's inputs:

1. the output error falls with every turn, and lies below that of k-means and of rounding;
2. tables are least squares for their indices, and indices the nearest centroids of the targets, after rounding too;
3. shrinkage, dead inputs and few tokens are harmless;
4. the result is the same to the bit with and without a C compiler, with one thread and with two;
5. blocks of columns and sweeps within them are those of the plain loop, and bfloat16 where it is fast costs nothing;
6. the kernel for a GPU rounds as the loop does, and compiles for compute capability 8.0, 9.0 and 10.0;
7. errors name the argument and the rule.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import edkm
from edkm.core import gptq, gptq_tables, native
from edkm.core.assign import assign, lookup, round_lut


def problem(rows=24, cols=40, bits=3, rows_per_lut=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, cols, generator=generator, dtype=dtype) @ torch.randn(cols, cols, generator=generator, dtype=dtype)
    weight = torch.randn(rows, cols, generator=generator, dtype=dtype) * 0.05
    moment = inputs.T @ inputs / 300
    start = edkm.initial_centroids(weight, bits, rows_per_lut=rows_per_lut, importance=moment.diagonal().unsqueeze(0))
    return weight, moment, start


def error(weight, hard, moment):
    e = hard - weight
    return float(((e @ moment) * e).sum() / ((weight @ moment) * weight).sum())


def hard(weight, centroids):
    lut = round_lut(centroids)
    return lookup(assign(weight, lut), lut, weight.dtype)


def test_shrinkage_is_made_for_other_inputs_than_the_calibration():
    generator = torch.Generator().manual_seed(0)
    found = {0.0: 0.0, 0.2: 0.0, 1.0: 0.0}
    for _ in range(5):
        scales = torch.randn(64, generator=generator, dtype=torch.float64).exp()
        mix = torch.randn(64, 64, generator=generator, dtype=torch.float64) * scales
        inputs = torch.randn(96, 64, generator=generator, dtype=torch.float64) @ mix
        weight = torch.randn(24, 64, generator=generator, dtype=torch.float64)
        for shrinkage in found:
            fitted = gptq.fit(weight, inputs.T @ inputs / 96, 3, rows_per_lut=8, shrinkage=shrinkage)
            found[shrinkage] += error(weight, hard(fitted.weight, fitted.centroids), mix.T @ mix)
    assert found[0.2] < 0.95 * found[0.0] and found[0.2] < 0.8 * found[1.0]
    chosen, unsaid = (gptq.fit(weight, inputs.T @ inputs / 96, 3, rows_per_lut=8, **how).weight for how in ({"shrinkage": 0.2}, {}))
    assert torch.equal(chosen, unsaid)


@pytest.mark.parametrize("rows_per_lut", [1, 8, 24])
def test_every_turn_lowers_the_error_that_it_reports(rows_per_lut):
    weight, moment, start = problem(rows_per_lut=rows_per_lut)
    found = gptq.fit(weight, moment, 3, rows_per_lut=rows_per_lut, turns=4, shrinkage=0.0)
    assert 3 <= len(found.errors) <= 5
    # Rounding tables to float16 may cost a little.
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(found.errors))
    assert found.errors[-1] == pytest.approx(error(weight, hard(found.weight, found.centroids), moment), rel=1e-6)
    assert found.errors[-1] < 0.85 * error(weight, hard(weight, start), moment)
    assert found.errors[-1] < 0.97 * found.errors[0]


def test_no_single_index_could_be_better(monkeypatch):
    monkeypatch.setattr(gptq, "_LEAST_GAIN", 0)
    weight, moment, _ = problem(rows=4, cols=12, bits=2, rows_per_lut=4)
    found = gptq.fit(weight, moment, 2, turns=30, shrinkage=0.0)
    best = hard(found.weight, found.centroids)
    for row, col in itertools.product(range(4), range(12)):
        for entry in found.centroids.flatten():
            other = best.clone()
            other[row, col] = entry
            assert error(weight, other, moment) >= found.errors[-1] - 1e-12


def test_tables_are_least_squares():
    weight, moment, start = problem(rows=6, cols=20, bits=2, rows_per_lut=3)
    tables = gptq.Tables(start, 6)
    index = assign(weight, round_lut(start)).long() + 4 * torch.arange(2).repeat_interleave(3).unsqueeze(1)  # [rows, cols]
    indices, slope = index.T.int(), moment @ (hard(weight, start) - weight).T
    scale = float(slope.abs().max())
    for _ in range(200):  # steps of steepest descent
        tables.refit(moment, indices, slope)
    # It lags behind by what rounding to float16 moved the tables.
    torch.testing.assert_close(slope, moment @ (tables.values(indices) - weight.T), rtol=0, atol=2e-3 * scale)
    # All weights in one vector: (onehot^T H onehot) centroids = onehot^T H w.
    onehot = torch.nn.functional.one_hot(index.flatten(), 8).double()
    whole = torch.block_diag(*[moment] * 6)
    expected = torch.linalg.lstsq(onehot.T @ whole @ onehot, onehot.T @ whole @ weight.flatten()).solution
    torch.testing.assert_close(tables.centroids.flatten(), expected, rtol=2e-3, atol=1e-4)


def test_uncorrelated_inputs_make_it_k_means():
    """The targets are the weights then, and the tables end as their means, but for float16 and turns."""
    weight, _, _ = problem()
    found = gptq.fit(weight, torch.eye(40, dtype=torch.float64), 3, rows_per_lut=8, turns=10)
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rows_per_lut", [1, 8, 24])
def test_the_tables_are_the_means_of_the_weights_on_them(rows_per_lut):
    weight, moment, _ = problem(rows_per_lut=rows_per_lut)
    found = gptq.fit(weight, moment, 3, rows_per_lut=rows_per_lut)
    importance = moment.diagonal().unsqueeze(0)
    lut = round_lut(found.centroids)
    cells = assign(found.weight, lut).long().view(len(lut), -1)  # [g, weights]
    mass = torch.zeros(len(lut), 8, dtype=torch.float64).scatter_add_(1, cells, importance.expand_as(weight).reshape(len(lut), -1))
    total = torch.zeros_like(mass).scatter_add_(1, cells, (importance * found.weight).reshape(len(lut), -1))
    gap = found.centroids.squeeze(2).diff(dim=1).mean()
    away = (total / mass - found.centroids.squeeze(2)).abs()[mass > 0]
    assert away.mean() < 0.01 * gap and away.max() < 0.2 * gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_per_lut", [1, 8])
def test_the_fit_is_the_same_to_the_bit_without_a_compiler_and_with_threads(dtype, rows_per_lut, monkeypatch):
    weight, moment, _ = problem(cols=150, dtype=dtype)
    before, found = torch.get_num_threads(), []
    for compiler, threads in ((native.available(), 1), (False, 1), (native.available(), 2)):
        monkeypatch.setattr(native, "available", lambda compiler=compiler: compiler)
        torch.set_num_threads(threads)
        found.append(gptq.fit(weight, moment, 3, rows_per_lut=rows_per_lut, shrinkage=0.01))
        torch.set_num_threads(before)
        monkeypatch.undo()
    for other in found[1:]:
        assert torch.equal(other.weight, found[0].weight) and torch.equal(other.centroids, found[0].centroids)


def test_rows_are_fitted_some_tables_at_a_time_each_as_if_alone(monkeypatch):
    monkeypatch.setattr(gptq, "WEIGHTS_AT_ONCE", 10 * 32)
    torch.manual_seed(0)
    weight, x = torch.randn(20, 32), torch.randn(100, 32)
    found = gptq.fit(weight, x.T @ x / 100, 2, rows_per_lut=4)
    parts = [gptq.fit(rows, x.T @ x / 100, 2, rows_per_lut=4) for rows in weight.split(8)]
    assert len(parts) == 3
    assert torch.equal(found.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(found.centroids, torch.cat([part.centroids for part in parts]))
    assert min(part.errors[-1] for part in parts) < found.errors[-1] < max(part.errors[-1] for part in parts)


def test_importance_of_columns_in_the_start_lowers_the_error(monkeypatch):
    weight, moment, _ = problem(cols=150)
    found = gptq.fit(weight, moment, 3, rows_per_lut=8, shrinkage=0.01)
    start = edkm.initial_centroids(weight, 3, rows_per_lut=8)
    monkeypatch.setattr(gptq, "initial_centroids", lambda *_, **__: start)
    assert found.errors[-1] < gptq.fit(weight, moment, 3, rows_per_lut=8, shrinkage=0.01).errors[-1]


def test_columns_that_no_input_reached_are_harmless():
    weight, moment, _ = problem()
    moment[:, 5] = moment[5] = 0
    found = gptq.fit(weight, moment, 3, rows_per_lut=8)
    assert found.weight.isfinite().all() and found.errors[-1] < found.errors[0]


def test_the_nearest_centroids_of_the_result_are_the_ones_found_in_float32_and_bfloat16():
    for dtype in (torch.float32, torch.bfloat16):
        weight, moment, _ = problem(dtype=torch.float32)
        found = gptq.fit(weight.to(dtype), moment, 3, rows_per_lut=8, shrinkage=0.01)
        assert found.weight.dtype == dtype
        assert error(weight, hard(found.weight, found.centroids).float(), moment) == pytest.approx(found.errors[-1], rel=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"moment": torch.ones(3, 3)}, "moment: must be"),
        ({"rows_per_lut": 7}, "rows do not divide into tables of 7"),
        ({"shrinkage": 1.5}, "shrinkage: must be between 0 and 1"),
        ({"bits": 9}, "bits: an index has 1 to 8"),
        ({"weight": torch.full((24, 40), torch.nan)}, "weight: NaN"),
        ({"moment": torch.full((40, 40), torch.inf)}, "moment: NaN or infinite"),
    ],
)
def test_bad_input_is_refused(change, message):
    weight, moment, _ = problem()
    with pytest.raises(ValueError, match=message):
        gptq.fit(**{"weight": weight, "moment": moment, "bits": 3, **change})


def test_the_factor_of_a_moment_is_the_same_by_any_number_of_threads():
    x = torch.randn(600, 256, generator=torch.Generator().manual_seed(0))
    h, before, found = x.T @ x / len(x), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gptq._root(h))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found) and torch.equal(found[0], found[0].tril())
    torch.testing.assert_close(found[0].T @ found[0], h, rtol=0, atol=1e-5)


def test_more_columns_than_a_block_are_rounded_as_one_by_one(monkeypatch):
    weight, moment, start = problem(rows=6, cols=40, bits=2, rows_per_lut=3)
    w, root, tables = weight.T.contiguous(), gptq._root(moment), gptq.Tables(start, 6)
    target, q = w.clone(), torch.empty_like(w)
    for j in range(40):
        target[j] -= root[j, :j] @ (q - w)[:j] / root[j, j]
        index = (target[j] > tables.midpoints).sum(0)
        q[j] = tables.by_row.gather(0, index.unsqueeze(0))
    for block in (1, 16, 64):
        monkeypatch.setattr(gptq, "_BLOCK", block)
        found = w.clone()
        assert torch.equal(tables.values(gptq._round(w, found, root, tables)), q)
        torch.testing.assert_close(found, target, rtol=0, atol=1e-12)


def test_sweeps_within_a_block_go_on_where_the_last_one_ended():
    """All columns are in one block here: two sweeps are two calls."""
    weight, moment, start = problem(rows=6, cols=40, bits=2, rows_per_lut=3)
    w, tables = weight.T.contiguous(), gptq.Tables(start, 6)
    q, diagonal = hard(weight, start).T.contiguous(), moment.diagonal().unsqueeze(1)
    both = q - moment @ (q - w) / diagonal
    indices = gptq._round(q, both, moment, tables, 2)
    for _ in range(2):
        one = q - moment @ (q - w) / diagonal
        found = gptq._round(q, one, moment, tables)
        q = tables.values(found)
    assert torch.equal(indices, found)
    torch.testing.assert_close(both, one, rtol=0, atol=1e-12)


def test_products_in_bfloat16_cost_hardly_anything(monkeypatch):
    weight, moment, _ = problem(rows=64, cols=300, dtype=torch.float32)
    errors = []
    for fast in (False, True):
        monkeypatch.setattr(gptq_tables, "_fast_bfloat16", lambda device, fast=fast: fast)
        found = gptq.fit(weight, moment, 3, rows_per_lut=8)
        errors.append(error(weight, hard(found.weight, found.centroids), gptq._shrunk(moment, 0.2)))
        assert found.errors[-1] == pytest.approx(errors[-1], rel=1e-3)
    assert errors[1] == pytest.approx(errors[0], rel=0.01) and errors[1] != errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, cols", [(24, 40), (6, 5), (40, 64)])
def test_the_kernel_for_a_gpu_rounds_as_the_loop_does(rows, cols, dtype, monkeypatch):
    """In Triton's interpreter on a CPU, or on a GPU where there is one."""
    pytest.importorskip("triton", reason="Triton is not made for this platform")
    from edkm.core import gptq_cuda

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, moment, start = problem(rows, cols, 2, rows // 2, dtype=dtype)
    w, coupling = weight.T.contiguous(), moment / moment.diagonal().unsqueeze(1)
    before, tables = w + 0.01, gptq.Tables(start, rows)
    found, target = w.clone().to(device), w.clone()
    arguments = [x.to(device) for x in (before, coupling, tables.by_row, tables.midpoints)]
    indices = gptq_cuda.columns(found, *arguments, tables.groups)
    monkeypatch.setattr(native, "available", lambda: False)
    assert torch.equal(indices.cpu(), tables.round_columns(target, before, coupling))
    torch.testing.assert_close(found.cpu(), target, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edkm.core.gptq_cuda import _WIDTH, _columns

numbers, constants = ("count", "rows", "rows_per_table"), {"k": 8, "size": 256, "width": _WIDTH}
kinds = {n: "constexpr" if n in constants else "i32" if n in numbers else "*fp32" for n in _columns.arg_names} | {"indices": "*i32"}
for architecture in (80, 90, 100):
    source = ASTSource(_columns, kinds, {(_columns.arg_names.index(n),): value for n, value in constants.items()})
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    print(architecture, built.metadata.shared, ".local" in built.asm["ptx"])
"""


def test_the_kernel_compiles_for_gpus():
    pytest.importorskip("triton", reason="Triton is not made for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3 and all(int(shared) <= 16384 and local == "False" for _, shared, local in lines), done.stdout + done.stderr
