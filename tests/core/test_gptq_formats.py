"""`core.gptq` for blocks of weights in a format:

1. the output error falls with every turn, far below that of rounding with importance, and is that of what is stored;
2. the weight that is returned goes to the entries found, in 16 bits too, and theta is a fixed point of the weighted update;
3. columns are rounded with the scale of their own block, in any order, as by the plain loop;
4. the result is the same to the bit with and without a C compiler, with one thread and with two, and rows go some at a time;
5. theta of a row moves only if its error falls;
6. the kernel for a GPU rounds as the loop does, and compiles;
7. inputs that are always zero are harmless; columns that do not divide are refused.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from edkm.core import gptq, native
from edkm.core.formats import FORMATS
from edkm.core.gptq_tables import BlockTables
from edkm.core.theta import initial_theta, least_squares

NAMES = ["q4_0", "q4_1", "iq4_nl", "tq2_0", "q2_k", "q3_k", "nf4", "mxfp4", "nvfp4", "int8_row", "int2_g64", "int3_g32_sym", "mlx4_g64"]


def problem(rows=24, cols=256, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator, dtype=dtype) * torch.randn(cols, generator=generator, dtype=dtype).exp()
    inputs = torch.randn(600, cols, generator=generator, dtype=dtype) @ mix
    return torch.randn(rows, cols, generator=generator, dtype=dtype) * 0.05, inputs.T @ inputs / 600


def error(weight, hard, moment):
    away = (hard - weight).double()
    return float(((away @ moment.double()) * away).sum() / ((weight.double() @ moment.double()) * weight.double()).sum())


def theta_of(found, form, weight):
    return found.centroids.view(len(weight), -1, form.p)


def hard(weight, theta, form):
    return form.lookup(form.assign(weight, theta), theta)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_falls_and_is_that_of_what_is_stored(name):
    form, (weight, moment) = FORMATS[name], problem()
    found = gptq.fit(weight, moment, 4, form=form)
    theta, h = theta_of(found, form, weight), gptq._shrunk(moment, 0.2)
    assert torch.equal(form.round(theta), theta)
    assert all(after <= before * 1.002 for before, after in itertools.pairwise(found.errors)) and len(found.errors) > 1
    assert found.errors[-1] == pytest.approx(error(weight, hard(found.weight, theta, form), h), rel=5e-3)
    rounded = initial_theta(weight, form, moment.diagonal().unsqueeze(0))
    assert found.errors[-1] < 0.75 * error(weight, hard(weight, rounded, form), h)
    assert form.bits > 4 or found.errors[-1] < 0.99 * found.errors[0]


@pytest.mark.parametrize("name, dtype", [*itertools.product(NAMES, [torch.float32]), ("q4_0", torch.bfloat16), ("q2_k", torch.bfloat16)])
def test_theta_is_a_fixed_point_of_the_weighted_update(name, dtype):
    form, (weight, moment) = FORMATS[name], problem()
    found = gptq.fit(weight.to(dtype), moment, 4, form=form)
    assert found.weight.dtype == dtype
    theta, importance = theta_of(found, form, weight), moment.diagonal().expand(weight.shape)
    x, s = (t.float().unflatten(1, (theta.shape[1], -1)) for t in (found.weight, importance))
    units = form.snap(form.scaled(x, theta))
    entries = (units.unsqueeze(-1) * theta[..., -1:].unsqueeze(2))[..., 0] + (theta[..., :1] if form.p == 2 else 0)
    updated = least_squares(x, units, s, theta)
    away = (updated[..., -1:] - theta[..., -1:]) * units + (updated[..., :1] - theta[..., :1] if form.p == 2 else 0)
    # Weights in cells with an end, and 16 bits, leave some of it.
    assert (s * away.square()).sum() < 0.02 * (s * (x - entries).square()).sum()
    assert error(weight.to(dtype), entries.flatten(1), gptq._shrunk(moment, 0.2)) == pytest.approx(found.errors[-1], rel=0.01)


@pytest.mark.parametrize("name", ["q4_1", "iq4_nl", "q2_k", "int3_g32_sym"])
@pytest.mark.parametrize("block", [16, 100])
def test_columns_take_the_scale_of_their_own_block(name, block, monkeypatch):
    form, (weight, moment) = FORMATS[name], problem(rows=6, dtype=torch.float64)
    theta = initial_theta(weight, form)
    order = moment.diagonal().argsort(descending=True)
    root = gptq._root(moment[order][:, order])
    target, q = weight.clone(), torch.empty_like(weight)
    for place, j in enumerate(order.tolist()):
        before = order[:place]
        target[:, j] -= (q - weight)[:, before] @ root[place, :place] / root[place, place]
        q[:, j] = hard(target, theta, form)[:, j]  # the other columns do not matter
    monkeypatch.setattr(gptq, "_BLOCK", block)
    w, tables = weight[:, order].T.contiguous(), BlockTables(theta, form, order)
    found = w.clone()
    indices = gptq._round(w, found, root, tables)
    torch.testing.assert_close(tables.values(indices), q[:, order].T, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, target[:, order].T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["q4_0", "nf4", "q2_k", "nvfp4", "int8_row"])
def test_the_fit_is_the_same_to_the_bit_without_a_compiler_and_with_threads(name, monkeypatch):
    form, (weight, moment) = FORMATS[name], problem()
    before, found = torch.get_num_threads(), []
    for compiler, threads in ((native.available(), 1), (False, 1), (native.available(), 2)):
        monkeypatch.setattr(native, "available", lambda compiler=compiler: compiler)
        torch.set_num_threads(threads)
        found.append(gptq.fit(weight, moment, 4, form=form, turns=1))
        torch.set_num_threads(before)
        monkeypatch.undo()
    for other in found[1:]:
        assert torch.equal(other.weight, found[0].weight) and torch.equal(other.centroids, found[0].centroids)


@pytest.mark.parametrize("name", ["iq4_nl", "q3_k", "nvfp4"])
def test_rows_are_fitted_some_at_a_time_each_as_if_alone(name, monkeypatch):
    monkeypatch.setattr(gptq, "WEIGHTS_AT_ONCE", 3 * 8 * 256)
    form, (weight, moment) = FORMATS[name], problem()
    found, parts = (
        gptq.fit(weight, moment, 4, form=form, turns=1),
        [gptq.fit(rows, moment, 4, form=form, turns=1) for rows in weight.split(8)],
    )
    assert torch.equal(found.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(found.centroids, torch.cat([part.centroids for part in parts]))


def test_rows_whose_error_a_step_would_raise_keep_their_theta():
    """Inputs that all say the same: every block alone would take the whole error upon itself."""
    form, weight = FORMATS["q4_0"], problem(rows=8)[0].double()
    h = torch.ones(256, 256, dtype=torch.float64) + 1e-3 * torch.eye(256, dtype=torch.float64)
    tables = BlockTables(initial_theta(weight, form), form, torch.arange(256))
    indices = form.assign(weight, tables.theta.permute(2, 1, 0)).T.int()
    before, theta = tables.values(indices) - weight.T, tables.theta.clone()
    slope = h @ before
    kept = slope.clone()
    tables.refit(h, indices, slope)
    assert torch.equal(tables.theta, theta) and torch.equal(slope, kept)
    tables.refit(torch.eye(256, dtype=torch.float64), indices, slope := before.clone())
    assert (tables.theta != theta).any() and not torch.equal(slope, before)
    torch.testing.assert_close(slope, tables.values(indices) - weight.T)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "q4_1"])
@pytest.mark.parametrize("rows, dtype", [(24, torch.float32), (5, torch.float64)])
def test_the_kernel_for_a_gpu_rounds_as_the_loop_does(name, rows, dtype, monkeypatch):
    """In Triton's interpreter on a CPU, or on a GPU where there is one."""
    pytest.importorskip("triton", reason="Triton is not made for this platform")
    from edkm.core import gptq_cuda

    device = "cuda" if torch.cuda.is_available() else "cpu"
    form, (weight, moment) = FORMATS[name], problem(rows, 64, dtype=dtype)
    order = moment.diagonal().argsort()
    tables = BlockTables(initial_theta(weight, form), form, order)
    w, coupling = weight[:, order].T.contiguous(), moment[order][:, order] / moment[order][:, order].diagonal().unsqueeze(1)
    before, found, target = w + 0.01, w.clone().to(device), w.clone()
    offset = tables.theta[0].to(device) if form.p == 2 else None
    tensors = (before, coupling, tables.entries, tables.midpoints, tables.block_of, tables.theta[-1])
    indices = gptq_cuda.columns_of_format(found, *(x.to(device) for x in tensors), offset, form.even)
    monkeypatch.setattr(native, "available", lambda: False)
    assert torch.equal(indices.cpu(), tables.round_columns(target, before, coupling))
    torch.testing.assert_close(found.cpu(), target, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edkm.core.gptq_cuda import _WIDTH, _columns_of_format

names = _columns_of_format.arg_names
for even, architecture in itertools.product((False, True), (80, 90, 100)):
    constants = {"k": 16, "even": even, "has_offset": True, "size": 256, "width": _WIDTH}
    kinds = {n: "constexpr" if n in constants else "i32" if n in ("count", "rows") else "*fp32" for n in names}
    kinds |= {"indices": "*i32", "block_of": "*i32"}
    source = ASTSource(_columns_of_format, kinds, {(names.index(n),): value for n, value in constants.items()})
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    print(architecture, built.metadata.shared, ".local" in built.asm["ptx"])
"""


def test_the_kernel_compiles_for_gpus():
    pytest.importorskip("triton", reason="Triton is not made for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 6 and all(int(shared) <= 16384 and local == "False" for _, shared, local in lines), done.stdout + done.stderr


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q2_k"])
def test_blocks_that_no_input_reached_are_harmless(name):
    form, (weight, moment) = FORMATS[name], problem()
    moment[:, 32:64] = moment[32:64] = 0
    found = gptq.fit(weight, moment, 4, form=form, importance=moment.diagonal().unsqueeze(0))
    assert found.weight.isfinite().all() and found.errors[-1] < found.errors[0]
    away = hard(found.weight, theta_of(found, form, weight), form)[:, 32:64] - weight[:, 32:64]
    assert away.square().mean() < 0.1 * weight.square().mean()


def test_columns_that_do_not_divide_are_refused():
    weight, moment = problem(cols=40)
    with pytest.raises(ValueError, match=r"weight: q4_0 needs columns in multiples of 32, got \[24, 40\]"):
        gptq.fit(weight, moment, 4, form=FORMATS["q4_0"])
