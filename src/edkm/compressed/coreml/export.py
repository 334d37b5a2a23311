"""Write a packed model as a Core ML package. Nothing is left on the disk unless every check passed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edkm.compressed import checkpoint, pretrained
from edkm.compressed.coreml import check, program
from edkm.compressed.coreml.shiftscale import affine_of, fits
from edkm.compressed.entries import read_entries
from edkm.compressed.modelconfig import model_config
from edkm.core.formats import FORMATS, FrozenBlocks
from edkm.output import replace_directory
from edkm.progress import progress

_SUFFIX = ".mlpackage"
_CHECKED_TOKENS = 64
# Longest text without `context`.
_CONTEXT = 2048
# Rotary positions whose angles depend on the length of the text: no table serves all lengths.
_CHANGING_ROPE = ("dynamic", "longrope")


class ExportedPackage(NamedTuple):
    """The size of an exported package and the results of its checks.

    Attributes:
        size_bytes: on disk.
        clustered: tensors stored as they are packed (tables and indices, or integers and scales), all read back equal.
        widened: tensors with indices of 5 or 7 bits, which Core ML lacks, and how many bits they are stored with.
        program: logits of the program in the package against the packed model's.
        device: those of Core ML's own prediction; None where Core ML is not.
    """

    size_bytes: int
    clustered: int
    widened: dict[str, int]
    program: check.Difference
    device: check.Difference | None

    @property
    def notes(self) -> list[str]:
        """Lines for the user, beside the sizes."""
        lines = [f"{name}: stored with {bits} bits, its values unchanged" for name, bits in self.widened.items()]
        for label, found in (("the program", self.program), ("Core ML", self.device)):
            if found is not None:
                lines.append(f"logits of {label}: cosine {found.cosine:.7f}, largest difference {found.largest:.3g}")
        return lines if self.device else [*lines, "Core ML itself was not run: that needs macOS 15"]


def export(
    directory: str | Path,
    out: str | Path,
    *,
    precision: str = "float16",
    kv_cache: bool = False,
    context: int | None = None,
    fixed: bool = False,
    overwrite: bool = False,
) -> ExportedPackage:
    """Write a packed causal language model as a Core ML package for iOS 18 and macOS 15.

    Indices of 5 and 7 bits, which Core ML lacks, are stored with 6 and 8: the same values.

    Args:
        directory: a packed checkpoint.
        out: the package, `NAME.mlpackage`. Nothing is left there if a check fails.
        precision: "float16" or "float32", of all arithmetic and of tensors that are not clustered. Tables have float16 values in both.
        kv_cache: keep keys and values in states, so that a text can be continued token by token.
        context: longest text in tokens; None for the smaller of 2048 and the model's own limit.
        fixed: take exactly `context` tokens, not 1 to `context`. Not with `kv_cache`.
        overwrite: replace a package that is there.

    Returns:
        Sizes and the results of the checks.

    Raises:
        ValueError: the model, an option or a tensor does not fit Core ML, or a check failed.
        FormatError: all that `checkpoint.read` refuses.

    Cost:
        The dense model in float32 twice (torch's and the converter's), and the tokens of the check once through it.
    """
    directory, out = Path(directory), Path(out)
    _check_options(out, precision, kv_cache, fixed, overwrite)
    with progress("export", 4, "parts") as advance:
        config = model_config(directory)
        most = _longest(directory, config, context)
        entries = read_entries(directory)
        widened = _widened(entries)
        frozen, dense, _ = checkpoint.read(directory)
        for name, tensor in frozen.items():
            if isinstance(tensor, FrozenBlocks):
                affine_of(name, tensor, program.PRECISIONS[precision])  # refused before the work, not after it
        for name, tensor in dense.items():
            check_dense(name, tensor, precision)
        model: Any = pretrained.load(directory)
        tokens, expected = _reference(model, most if fixed else min(most, _CHECKED_TOKENS))
        advance(note="writing")
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.stem}") as folder:
            package = Path(folder) / out.name
            constants = program.write_package(package, model, frozen, context=most, precision=precision, kv_cache=kv_cache, fixed=fixed)
            advance(note="checking tensors")
            function = check.read_program(package)
            check.check_tensors(function, frozen, constants, precision)
            advance(note="checking logits")
            found = check.program_logits(function, tokens, program.state_shape(model.config, most) if kv_cache else None)
            on_program = check.compare(found, expected)
            predicted = check.device_logits(package, tokens, kv_cache=kv_cache)
            on_device = None if predicted is None else check.compare(predicted, expected, device=True)
            size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
            replace_directory(package, out)
            advance(note="all checked")
    return ExportedPackage(size, len(frozen), widened, on_program, on_device)


def _check_options(out: Path, precision: str, kv_cache: bool, fixed: bool, overwrite: bool) -> None:
    if precision not in program.PRECISIONS:
        raise ValueError(f"precision: must be one of {', '.join(program.PRECISIONS)}, got {precision!r}")
    if kv_cache and fixed:
        raise ValueError("fixed: a model with a cache takes a prompt and then single tokens; leave out one of the two")
    if out.suffix != _SUFFIX:
        raise ValueError(f"{out}: the name of a Core ML package ends in {_SUFFIX}")
    if out.is_symlink():
        raise ValueError(f"{out}: is a symbolic link; name the package itself")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists; name another or add --overwrite")
    if out.exists() and not (out / "Manifest.json").is_file():
        raise ValueError(f"{out}: exists and is no package; name another")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: its directory does not exist; make it first")
    try:
        with program.quiet():
            import coremltools  # noqa: F401
    except ImportError as error:
        raise ValueError("Core ML export needs coremltools 9.0 or newer. Run: pip install 'edkm[coreml]'") from error


def _reference(model: Any, count: int) -> tuple[Tensor, Tensor]:
    """Make tokens `[1, count]` and the packed model's logits for them `[count, vocabulary]`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator, dtype=torch.int32)
    with torch.no_grad():
        return tokens, model(input_ids=tokens.long(), use_cache=False).logits[0]


def _longest(directory: Path, config: Any, context: int | None) -> int:
    """Choose the longest text of the program in tokens, or refuse the model: before it is loaded."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = (config.architectures or [config.model_type])[0]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(f"{directory}: {kind}: Core ML export takes causal language models. Use edkm unpack and another converter.")
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") in _CHANGING_ROPE:
            raise ValueError(
                f"{directory}: rotary positions of type {part['rope_type']!r} depend on the length of the text. "
                "Use edkm unpack and a converter that knows the model."
            )
    longest: int = config.max_position_embeddings
    kinds = getattr(config, "layer_types", None)
    # LLaMA has no sliding layers whatever its config holds.
    slides = config.model_type != "llama" if kinds is None else "sliding_attention" in kinds
    if slides and (window := getattr(config, "sliding_window", None)) is not None:
        longest = min(longest, window)
    tokens = min(_CONTEXT, longest) if context is None else context
    if not 1 <= tokens <= longest:
        raise ValueError(f"context: {directory} attends to 1 to {longest} tokens at a time, got {tokens}. Use at most {longest}.")
    return tokens


def _widened(entries: dict[str, Any]) -> dict[str, int]:
    """Find the tensors that Core ML stores with more bits, and how many; refuse those that are no matrices, or in formats it lacks."""
    for name, entry in entries.items():
        if len(entry.shape) != 2:
            raise ValueError(
                f"{name}: a clustered tensor of shape {list(entry.shape)}; Core ML export takes matrices. Leave it out (skip)."
            )
        if entry.form is not None and not fits(entry.form):
            known = ", ".join(name for name, form in FORMATS.items() if fits(form))
            raise ValueError(f"{name}: Core ML has no {entry.format}. Compress the model with free tables (format table), or with {known}.")
    tables = {name: entry for name, entry in entries.items() if entry.form is None}
    return {name: program.stored_bits(entry.bits) for name, entry in tables.items() if entry.bits not in program.WIDTHS}


def check_dense(name: str, tensor: Tensor, precision: str) -> None:
    """Refuse a tensor that is not clustered and does not fit the precision of the program."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: has dtype {tensor.dtype}; Core ML export takes floating-point tensors")
    values = tensor if tensor.dtype == torch.float64 else tensor.float()  # torch has no arithmetic in float8
    if not values.isfinite().all():
        raise ValueError(f"{name}: has values that are NaN or infinite. Repair the model and compress it again.")
    largest = values.abs().max()
    if largest > torch.finfo(getattr(torch, precision)).max:
        remedy = "Use --precision float32." if precision == "float16" else "Repair the model and compress it again."
        raise ValueError(f"{name}: {largest:.6g} is beyond the range of {precision}. {remedy}")
