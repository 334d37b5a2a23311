"""Choice of a backend and arguments of `edkm.cluster`:

1. `auto` goes by shape, dtype and device, and gives the bits of the backend that it chose;
2. errors name the argument, the rule and the remedy;
3. `histogram` is refused for tables, vectors and values that it cannot take.
"""

import pytest
import torch
from problems import C, W, make, run

import edkm
from edkm.core import histogram, native

# The choice of a backend.


@pytest.mark.parametrize("compiler", [False, True])
def test_auto_goes_by_shape_dtype_and_device(compiler, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: compiler)
    loops = "native" if compiler else "blocks"
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(256, 512, generator=generator).mul_(0.02).bfloat16(), torch.randn(32, 64, generator=generator)
    name, why = edkm.choose_backend(many, 1, 16, 1, None)
    assert name == "histogram" and "about 4,096 distinct values in 131,072 weights" in why
    # On other devices every bin counts: which are empty would have to be read from there.
    assert edkm.choose_backend(many, 1, 16, 1, None, torch.device("mps"))[0] == "histogram"
    assert edkm.choose_backend(many, 2, 16, 1, None, torch.device("xpu"))[0] == "blocks"
    assert edkm.choose_backend(few, 32, 16, 1, torch.bfloat16)[0] == loops
    why = "16 centroids, on a CPU with a compiler" if compiler else "weights wider than 16 bits"
    assert edkm.choose_backend(few, 1, 16, 1, None) == (loops, why)
    assert edkm.choose_backend(many, 1, 8, 2, None) == ("blocks", "vectors of 2 values")


@pytest.mark.parametrize("groups, cols, chosen", [(1, 8192, "histogram"), (8, 8, "blocks")])
def test_auto_gives_the_bits_of_the_backend_that_it_chose(groups, cols, chosen, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    problem = make(groups, 1, vectors=2, cols=cols, kind="repeated", dtype=torch.float32)
    assert edkm.choose_backend(problem[0], groups, 4, 1, torch.bfloat16)[0] == chosen
    assert all(torch.equal(a, b) for a, b in zip(run(problem, "auto", torch.bfloat16), run(problem, chosen, torch.bfloat16)))


# Errors: the tensor or argument, the rule, the remedy.


@pytest.mark.parametrize(
    "change, named, rule, remedy",
    [
        ({"weight": W.view(2, 4, 8)}, "weight: ", "matrix [rows, cols]", "Flatten"),
        ({"weight": W.to(torch.int8)}, "weight: ", "floating-point", "Flatten"),
        ({"centroids": C.view(4, 1)}, "centroids: ", "[g, k, d]", "edkm.initial_centroids"),
        ({"centroids": C.bfloat16()}, "centroids: ", "torch.float32", "edkm.initial_centroids"),
        ({"weight": W.double()}, "centroids: ", "torch.float64", "edkm.initial_centroids"),
        ({"centroids": C.repeat(3, 1, 1)}, "weight: ", "8 rows do not divide into 3 tables", "rows_per_lut"),
        ({"centroids": C.repeat(1, 1, 3)}, "weight: ", "vectors of 3 rows", "dim that divide"),
        ({"centroids": C.repeat(0, 1, 1)}, "weight: ", "0 tables", "skip the tensor"),
        ({"centroids": C.repeat(8, 4, 1)}, "weight: ", "16 centroids need at least 16 weights, got 8", "fewer bits"),
        ({"weight": torch.zeros(0, 8)}, "weight: ", "0 rows", "skip the tensor"),
        ({"max_iters": 0}, "max_iters: ", "at least one", "got 0"),
        ({"importance": torch.ones(3, 8)}, "importance: ", "does not broadcast", "[1, cols]"),
        ({"importance": -torch.ones(1, 8)}, "importance: ", "not negative", "squared"),
        ({"importance": torch.full((1, 8), torch.nan)}, "importance: ", "finite", "squared"),
        ({"temperature": torch.zeros(1)}, "temperature: ", "must be positive, got 0", "squared weight units"),
        ({"temperature": -1.0}, "temperature: ", "must be positive, got -1", "squared weight units"),
        ({"temperature": torch.nan}, "temperature: ", "must be positive", "squared weight units"),
        ({"weight": W.clone().fill_diagonal_(torch.nan)}, "weight: ", "NaN or infinite", "learning rate"),
        ({"weight": W.clone().fill_diagonal_(torch.inf)}, "weight: ", "NaN or infinite", "learning rate"),
        ({"weight": W * 1e6, "round_to": torch.float16}, "weight: ", "range of 16 bits", "learning rate"),
        (
            {"backend": "dense"},
            "backend: ",
            "'dense' is not one of",
            "histogram, blocks, native, triton, auto; edkm.cluster takes reference",
        ),
    ],
)
def test_errors(change, named, rule, remedy):
    arguments = {"weight": W, "centroids": C, "temperature": 0.1} | change
    names = [change["backend"]] if "backend" in change else ["reference", "blocks", "histogram", "auto"]
    for backend in names:
        with pytest.raises(ValueError) as error:
            edkm.cluster(**arguments | {"backend": backend})
        message = str(error.value)
        assert message.startswith(named), (backend, message)
        assert rule in message and remedy in message, (backend, message)


@pytest.mark.parametrize(
    "change",
    [{"round_to": None}, {"round_to": torch.float32}, {"centroids": C.repeat(1, 1, 2)}, {"centroids": C.repeat(2, 1, 1)}],
)
def test_histogram_is_refused_where_it_cannot_be(change):
    arguments = {"weight": W, "centroids": C, "temperature": 0.1} | change
    with pytest.raises(ValueError, match=r"^backend: histogram needs one table of single 16-bit values.*Use auto"):
        edkm.cluster(**arguments, backend="histogram")
    assert edkm.cluster(**arguments, backend="auto").weight.isfinite().all()


@pytest.mark.parametrize("value, refused", [(2.0**62, False), (2.0**63, True)])
def test_a_histogram_with_empty_bins_takes_values_up_to_2_62_and_refuses_larger_ones(value, refused, monkeypatch):
    monkeypatch.setattr(histogram, "drops_empty_bins", lambda device: False)  # as on a GPU
    weight = W.clone()
    weight[0, 0] = value
    if refused:
        with pytest.raises(ValueError, match=r"^weight: NaN or infinite values, or values beyond"):
            edkm.cluster(weight, C, temperature=0.1, backend="histogram")
    else:
        assert edkm.cluster(weight, C, temperature=0.1, backend="histogram").centroids.max() == value
