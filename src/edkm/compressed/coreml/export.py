"""`export`: the command of this package in one function. Nothing is left on the disk unless every check passed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edkm.compressed import checkpoint, pretrained
from edkm.compressed.checkpoint import Item
from edkm.compressed.coreml import check, program, weights
from edkm.compressed.coreml.architecture import Architecture, architecture, rotary
from edkm.compressed.coreml.quiet import quiet
from edkm.compressed.entries import read_entries
from edkm.compressed.modelconfig import model_config
from edkm.progress import progress

_SUFFIX = ".mlpackage"
_CHECKED_TOKENS = 64


class Exported(NamedTuple):
    """What was written and how it was checked.

    Attributes:
        package_bytes: size on disk.
        clustered: tensors stored as tables and indices, all read back equal.
        widened: clustered tensors that are stored with more bits than packed, and how many.
        program: logits of the program in the package against the packed model's.
        device: those of Core ML's own prediction; None where Core ML is not.
    """

    package_bytes: int
    clustered: int
    widened: dict[str, int]
    program: check.Difference
    device: check.Difference | None


def export(
    directory: str | Path,
    out: str | Path,
    *,
    precision: str = "float16",
    kv_cache: bool = False,
    context: int | None = None,
    fixed: bool = False,
    widen: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Writes a packed causal language model as a Core ML package for iOS 18 and macOS 15.

    Args:
        directory: a packed checkpoint.
        out: the package, `NAME.mlpackage`. Nothing is left there if a check fails.
        precision: "float16" or "float32", of all arithmetic and of what is not clustered. Tables have float16 values in both.
        kv_cache: keep keys and values in states, so that a text can be continued token by token.
        context: longest text in tokens; None for the smaller of 2048 and what the model was made for.
        fixed: take exactly `context` tokens, not 1 to `context`. Not with `kv_cache`.
        widen: store 5- and 7-bit indices, which Core ML lacks, with 6 and 8 bits.
        overwrite: replace a package that is there.

    Returns:
        Sizes and the results of the checks.

    Raises:
        ValueError: the model, an option or a tensor does not fit Core ML, or a check failed.
        FormatError: what `checkpoint.open_items` refuses.

    Cost:
        The dense model in float32 once, for the logits to compare with; then about 2 bytes a weight. Three passes over the files.
    """
    directory, out = Path(directory), Path(out)
    _check_options(out, precision, kv_cache, fixed, overwrite)
    with checkpoint.open_items(directory) as items, progress("export", 4, "parts") as advance:
        # The model first: no remedy for a tensor helps where the architecture does not fit.
        arch = architecture(directory, model_config(directory), set(items), context)
        widened = weights.check_stored(read_entries(directory), items, widen=widen)
        rope, tokens, expected = _reference(directory, arch, arch.context if fixed else min(arch.context, _CHECKED_TOKENS))
        advance(note="writing")
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.stem}") as folder:
            package = Path(folder) / out.name
            _write(package, items, arch, rope, precision=precision, kv_cache=kv_cache, fixed=fixed)
            advance(note="checking tensors")
            clustered = check.check_tensors(package, directory, rope, precision)
            advance(note="checking logits")
            found = check.program_logits(check.read(package), arch, tokens, kv_cache=kv_cache)
            on_program = check.compare(found, expected)
            predicted = check.device_logits(package, tokens, kv_cache=kv_cache)
            on_device = None if predicted is None else check.compare(predicted, expected, device=True)
            size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
            _put(package, out)
            advance(note="all checked")
    return Exported(size, clustered, widened, on_program, on_device)


def _check_options(out: Path, precision: str, kv_cache: bool, fixed: bool, overwrite: bool) -> None:
    if precision not in weights.PRECISIONS:
        raise ValueError(f"precision: must be one of {', '.join(weights.PRECISIONS)}, got {precision!r}")
    if kv_cache and fixed:
        raise ValueError("fixed: a model with a cache takes a prompt and then single tokens; leave out one of the two")
    if out.suffix != _SUFFIX:
        raise ValueError(f"{out}: the name of a Core ML package ends in {_SUFFIX}")
    if out.is_symlink():
        raise ValueError(f"{out}: is a symbolic link; name the package itself")
    if out.exists() and (not overwrite or not (out / "Manifest.json").is_file()):
        raise ValueError(
            f"{out}: exists{'' if overwrite else '; name another or add --overwrite'}{' and is no package' if overwrite else ''}"
        )
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: its directory does not exist; make it first")
    try:
        with quiet():
            import coremltools  # noqa: F401
    except ImportError as error:
        raise ValueError("Core ML export needs coremltools 9.0 or newer. Run: pip install 'edkm[coreml]'") from error


def _put(package: Path, out: Path) -> None:
    """Gives the package its name. The old one is only moved until then: whenever this ends, one of the two is whole on the disk."""
    old = package.with_name("old")
    if out.exists():
        out.rename(old)
    try:
        package.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def _reference(directory: Path, arch: Architecture, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The packed model's rotary tables, `count` tokens `[1, count]` and its logits for them `[count, vocabulary]`."""
    model: Any = pretrained.load(directory)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator, dtype=torch.int32)
    with torch.no_grad():
        logits = model(input_ids=tokens.long(), use_cache=False).logits[0]
    return rotary(model, arch.context), tokens, logits


def _write(
    package: Path,
    items: Mapping[str, Item],
    arch: Architecture,
    rope: dict[str, Tensor],
    *,
    precision: str,
    kv_cache: bool,
    fixed: bool,
) -> None:
    import coremltools as ct

    nothing: Any = ct.PassPipeline.EMPTY
    with quiet():
        prog, inputs = program.build(arch, _constants(items, precision), rope, precision=precision, kv_cache=kv_cache, fixed=fixed)
        ct.convert(
            prog,
            inputs=inputs,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            # The program has its types already. coremltools' optimisations are left out: they rename tensors and merge equal
            # ones, and there is little to gain in a program written for Core ML.
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=nothing,
            skip_model_load=True,
            package_dir=str(package),
        )


def _constants(items: Mapping[str, Item], precision: str) -> Callable[[str], Any]:
    """A function that makes a tensor a constant of the program being written, or returns None."""
    from coremltools.converters.mil.mil import Builder, types

    mb: Any = Builder
    kinds = {bits: types.string_to_nptype(f"uint{bits}") for bits in weights.WIDTHS}

    def constant(name: str) -> Any:
        if name not in items:
            return None
        tensor, label = items[name].load(), check.tensor_name(name)
        if isinstance(tensor, Tensor):
            return mb.const(val=weights.dense(name, tensor, precision), name=label)
        found = weights.palette(tensor, precision)
        axis = {"vector_axis": np.int32(0)} if tensor.lut.shape[2] > 1 else {}
        return mb.constexpr_lut_to_dense(indices=found.indices.astype(kinds[found.bits]), lut=found.lut, name=label, **axis)

    return constant
