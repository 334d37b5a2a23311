"""Train the tables of a packed model with its indices fixed: to packed models what adapters are to dense ones.

A weight of 3 bits with a table for each row has 8 numbers to train a row, and the indices stay as they were packed; a weight in a format
has the scale and the offset of each block. The loss is that of the model as it will be stored: in forward tables hold the numbers that the
file will have, and gradients pass the rounding straight through. Vectors (norms, biases) are trained with them, in the dtype that they are
stored in.

Each trained tensor is held as multiples of its typical size (`Multiples`), so that one learning rate fits tables of every scale: with Adam
it is the share of its size by which an entry moves in a step.

Embeddings, weights that several modules share (an output layer tied to them) and those of other modules than `nn.Linear` keep their tables;
gradients pass through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from edkm.compressed import checkpoint
from edkm.compressed.companions import copy_companions
from edkm.compressed.entries import RECORD, Entry, quantization_config
from edkm.compressed.formatweight import FormatWeight
from edkm.compressed.jsonfile import read_json, write_json
from edkm.compressed.linear import PackedWeight
from edkm.compressed.modules import PackedLinear, PackedModule
from edkm.compressed.packing import unpack_rows
from edkm.core.assign import LUT_DTYPE, Clustered, LazyFrozen
from edkm.core.formats import Format
from edkm.core.storage import Floats, SuperBlock
from edkm.metrics import PAGE
from edkm.train.clustering import reshaped
from edkm.train.loop import TrainResult, TrainSettings, train

# Of a gradient that are summed at once: 12 bytes live for each.
_WEIGHTS_AT_ONCE = 1 << 20


class Multiples(nn.Module):
    """Parametrization of a tensor by its multiples of a typical size; its value is rounded as it will be stored.

    Args:
        tensor: as it is stored; its first axis is that of tables. A vector has one size, a table each its own.
        form: of theta `[rows, blocks, p]`: scales have a size for each row, and offsets half the range of their entries.
    """

    def __init__(self, tensor: Tensor, form: Format | None = None) -> None:
        super().__init__()
        axes = tuple(range(1, tensor.ndim)) or (0,)
        numbers = tensor.detach().double()
        size = (numbers if form is None else numbers[..., -1:]).square().mean(axes, keepdim=True).sqrt()
        if form is not None and form.p == 2:
            size = torch.cat([size * (form.values[-1] - form.values[0]) / 2, size], -1)
        # A power of two: dividing and multiplying by it loses nothing.
        size = torch.where(size > 0, size, 1.0).log2().round().exp2().float()
        self.dtype, self.form = tensor.dtype, form
        self.size: Tensor
        self.register_buffer("size", size, persistent=False)

    def forward(self, multiples: Tensor) -> Tensor:
        value = multiples * self.size
        kept = value.detach()
        if self.form is None:
            return value - kept + kept.to(self.dtype).to(kept.dtype)
        if self.form.p == 2 or not isinstance(self.form.storage, Floats | SuperBlock):
            # These have no sign: a table that falls would be stored as one that rises, with other indices.
            kept = kept.clone()
            kept[..., -1].clamp_(min=torch.finfo(kept.dtype).tiny)
        return value - value.detach() + self.form.round(kept)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.float() / self.size  # pyright: ignore[reportOperatorIssue]


class _Product(torch.autograd.Function):
    """`x @ W.T` of a packed weight, differentiable in `x` and in its tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tables: Tensor, stream: Tensor, entry: Entry) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        lut = tables.to(LUT_DTYPE) if entry.form is None else tables
        ctx.entry = entry
        ctx.save_for_backward(x, stream, lut)
        out = F.linear(x, _dense(stream, lut, entry, x.dtype))
        return reshaped(out, out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, stream, lut = ctx.saved_tensors
        dx = tables = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ _dense(stream, lut, ctx.entry, dy.dtype)
            if ctx.needs_input_grad[1]:
                dense = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])  # [rows, cols]
                gradient = table_gradient if ctx.entry.form is None else theta_gradient
                tables = gradient(dense, stream, ctx.entry, lut.shape[1])
        return dx, tables, None, None


def _dense(stream: Tensor, tables: Tensor, entry: Entry, dtype: torch.dtype) -> Tensor:
    if entry.form is None:
        return PackedWeight(stream, tables, entry).dense(dtype)
    indices = unpack_rows(stream, entry.bits, entry.grid, 0, entry.rows)
    return entry.form.lookup(indices, tables, dtype)


def theta_gradient(dense: Tensor, stream: Tensor, entry: Entry, blocks: int) -> Tensor:
    """Sum the gradient of a weight over the blocks of a format: `[rows, blocks, p]`; arguments and cost as `table_gradient`."""
    (rows, cols), form = entry.grid, entry.form
    assert form is not None
    kind = torch.promote_types(dense.dtype, torch.float32)
    values, found = form.entries(kind, dense.device), []
    step = max(1, _WEIGHTS_AT_ONCE // (8 * cols)) * 8
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = dense[start:stop].to(kind)
        scale = part * values[unpack_rows(stream, entry.bits, entry.grid, start, stop).int()]
        found.append(torch.stack([x.unflatten(1, (blocks, -1)).sum(-1) for x in (part, scale)[-form.p :]], -1))
    return torch.cat(found)


def table_gradient(dense: Tensor, stream: Tensor, entry: Entry, k: int) -> Tensor:
    """Sum the gradient of a weight over the weights that share an entry of a table.

    Args:
        dense: `[rows, cols]`, gradient of the weight.
        stream, entry: the packed indices of the weight.
        k: entries of a table.

    Returns:
        `[g, k, d]` float32, or float64 if `dense` is. Sums are in order on a CPU: the same bits each time.

    Cost:
        One pass over the weight, about a third of a product of 1,024 rows in 16 bits; 12 MiB live besides.
    """
    rows, cols = entry.grid  # of indices
    total = dense.new_zeros(entry.dim, entry.luts * k, dtype=torch.promote_types(dense.dtype, torch.float32))
    step = max(1, _WEIGHTS_AT_ONCE // (8 * cols * entry.dim)) * 8
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        keys = unpack_rows(stream, entry.bits, entry.grid, start, stop).int()  # [r, cols]
        table = torch.arange(start, stop, dtype=torch.int32, device=keys.device) // (rows // entry.luts)
        keys += k * table.unsqueeze(1)
        block = dense[start * entry.dim : stop * entry.dim].to(total.dtype).view(stop - start, entry.dim, cols)
        for d in range(entry.dim):
            total[d].index_add_(0, keys.view(-1), block[:, d].reshape(-1))
    return total.T.reshape(entry.luts, k, entry.dim)


class TunedLinear(nn.Module):
    """A packed linear layer whose tables are trained.

    Args:
        packed: the layer that it replaces; its indices and bias are shared, not copied.

    Attributes:
        tables: parameter `[g, k, d]` float32, or theta `[rows, blocks, p]` of a format.

    Cost:
        Keeps for backward its input, and the indices and tables that it has anyway. The dense weight lives while the layer is multiplied,
        and again with its gradient in backward.
    """

    tables: Tensor
    stream: Tensor

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        weight = packed.packed()
        self.entry = weight.entry
        self.register_buffer("stream", weight.stream.detach(), persistent=False)
        tables = weight.read_theta() if isinstance(weight, FormatWeight) else weight.lut
        self.tables = nn.Parameter(tables.float())
        self.bias = packed.bias
        self.in_features, self.out_features = packed.in_features, packed.out_features
        _parametrize(self, "tables", tables, weight.entry.form)

    def forward(self, input: Tensor) -> Tensor:
        out: Any = _Product.apply(input, self.tables, self.stream, self.entry)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        kind = f"{self.entry.bits} bits, {self.entry.luts} tables" if self.entry.form is None else self.entry.format
        return f"{self.in_features}, {self.out_features}, {kind}"

    def stored(self) -> dict[str, Tensor]:
        """Return tables, or the parts of theta, as they are stored, on the CPU."""
        tables, form = self.tables.detach(), self.entry.form
        parts = {"lut": tables.to(LUT_DTYPE)} if form is None else form.store(tables)
        return {part: tensor.cpu().contiguous() for part, tensor in parts.items()}


def train_tables(model: nn.Module, stored: Mapping[str, torch.dtype | None]) -> dict[str, str]:
    """Make the tables and the vectors of a packed model its only trained parameters, in place.

    Args:
        model: loaded packed (`pretrained.load_packed`).
        stored: dtypes in the checkpoint, by name, of the tensors that are not clustered.

    Returns:
        Clustered weights whose tables stay as they are, with the reason.

    Raises:
        ValueError: the model has no packed linear layer of its own.
    """
    model.requires_grad_(False)
    fixed: dict[str, str] = {}
    packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedModule)]
    uses = Counter(id(module._parameters[name]) for _, module in packed for name in module.packed_entries)
    for path, module in packed:
        if type(module) is PackedLinear and uses[id(module._parameters["weight"])] == 1:
            model.set_submodule(path, TunedLinear(module))
            continue
        kind = "an embedding" if isinstance(module, nn.Embedding) else f"of a {module.ordinary.__name__}"
        fixed |= {f"{path}.{name}": "tied" if type(module) is PackedLinear else kind for name in module.packed_entries}
    if len(packed) == len(fixed):
        raise ValueError("model: none of its packed weights is that of an nn.Linear alone. Fine-tune the model and pack it again.")
    _train_vectors(model, stored)
    return fixed


def _train_vectors(model: nn.Module, stored: Mapping[str, torch.dtype | None]) -> None:
    """Parametrize every vector that one module alone owns; those of modules that stay packed stay, too."""
    owners = [
        (path, module, key, id(parameter))
        for path, module in model.named_modules()
        if not isinstance(module, PackedModule | parametrize.ParametrizationList)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 1 and parameter.is_floating_point()
    ]
    uses = Counter(owner[3] for owner in owners)
    for path, module, key, identity in owners:
        dtype = stored.get(f"{path}.{key}".lstrip("."))
        if dtype is not None and uses[identity] == 1:
            _parametrize(module, key, getattr(module, key).detach().to(dtype))


def _parametrize(module: nn.Module, key: str, stored: Tensor, form: Format | None = None) -> None:
    parametrize.register_parametrization(module, key, Multiples(stored, form))
    module.parametrizations[key].original.requires_grad_(True)  # pyright: ignore


def tuned_tensors(model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Collect what `train_tables` made trainable, as it is stored, on the CPU: the parts of weights, and vectors, by their names."""
    weights, vectors = {}, {}
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for key, made in module.parametrizations.items():  # pyright: ignore
            if isinstance(module, TunedLinear) and key == "tables":
                weights[f"{path}.weight".lstrip(".")] = module.stored()
            else:
                vectors[f"{path}.{key}".lstrip(".")] = getattr(module, key).detach().to("cpu", made[0].dtype)
    return weights, vectors


def tune_tables(
    model: nn.Module, blocks: Any, settings: TrainSettings, work: Path, *, resume: bool = False, teacher: nn.Module | None = None
) -> TrainResult:
    """Train what `train_tables` made trainable, in place, with the loop of all training; arguments and errors as `loop.train`."""
    return train(model, blocks, settings, work, resume=resume, teacher=teacher, name="tuning")


def write_tuned(model: nn.Module, packed: Path, out: Path) -> None:
    """Write the packed model with its tuned tables and vectors, and all else as it was.

    Args:
        model: trained by `tune_tables`.
        packed: the directory that it was loaded from; its record of the run that made it is left behind.
        out: another directory; a packed model in it is replaced.

    Raises:
        FormatError: a centroid is not finite; and all that `checkpoint.open_items` refuses.

    Cost:
        Two passes over the packed files; memory of the tensors that are not clustered, and of the indices of one that is.
    """
    (tuned, vectors), before = tuned_tensors(model), quantization_config(packed)
    frozen: dict[str, Clustered | LazyFrozen] = {}
    dense: dict[str, Tensor] = {}
    copy_companions(packed, out)
    for name in (RECORD, PAGE):  # of the weights that are replaced
        (out / name).unlink(missing_ok=True)
    with checkpoint.open_items(packed) as items:
        for name, item in items.items():
            if (entry := item.entry) is None:
                dense[name] = vectors[name] if name in vectors else cast(Tensor, item.load())
            elif (parts := tuned.get(name)) is None:
                frozen[name] = cast(Clustered, item.load())
            else:
                frozen[name] = LazyFrozen(parts, item.shape, entry.rows, entry.error, partial(_indices, item), entry.format)
        quantization = checkpoint.write(out, frozen, dense, before["settings"])
    write_json(out / "config.json", read_json(packed / "config.json") | {"quantization_config": quantization})


def _indices(item: checkpoint.Item) -> Tensor:
    return cast(Clustered, item.load()).indices
