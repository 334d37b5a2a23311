"""Run modules on packed weights: the bytes of the file are all they keep.

`pack_module` turns a module into its packed form in place. A linear layer multiplies by its packed weight, an embedding decodes the rows
that it is asked for, and whatever else has a clustered parameter (convolutions, experts) decodes its dense weight each time it is called.
Parameters and buffers are named as in the packed file (docs/format.md): a state dict is the file's content. Read from outside, a packed
parameter is a `DenseView`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from edkm.compressed.dense_view import DenseView, Parameters
from edkm.compressed.entries import Entry, stored_kind
from edkm.compressed.formatweight import weight_of
from edkm.compressed.linear import PackedWeight, embed, is_recorded, is_taken_whole, packed_linear
from edkm.compressed.operators import embedding
from edkm.compressed.siblings import Siblings
from edkm.core.assign import LUT_DTYPE

# The view of each stream of indices in use, by the id of the stream.
_VIEWS: WeakValueDictionary[int, DenseView] = WeakValueDictionary()


class PackedModule(nn.Module):
    """A module with packed parameters; `pack_module` makes it of an ordinary one.

    Attributes:
        packed_entries: parameter name -> bits, tables and shape.
        dense_dtype: of the weights that it stands for; follows `.to(dtype)`, while the tables stay as they are stored.
        ordinary: the class it had.
        tables_of: the module whose tables it uses, if a parameter is tied.
        decoded: dense weights by name, for each thread that is in a call.
    """

    packed_entries: dict[str, Entry]
    dense_dtype: torch.dtype
    ordinary: type[nn.Module]
    tables_of: PackedModule | None
    decoded: dict[int, dict[str, Tensor]]

    def packed(self, name: str = "weight") -> PackedWeight:
        """Return the packed weight of parameter `name`."""
        parameters: Any = self._parameters  # `Parameters`
        stream = parameters.get(name)
        if stream is None:
            raise ValueError(
                f"{type(self).__name__}.{name}: a packed weight is a constant, and something (an adapter on it, say) has taken it away. "
                "Put adapters on linear layers and embeddings, or call dequantize() on the model first."
            )
        buffers: Any = (self if self.tables_of is None else self.tables_of)._buffers
        # Once and not at every product: a small layer is multiplied in less time than this takes.
        known = None if torch.compiler.is_compiling() else parameters.known.get(name)
        same = known is not None and known[0].stream is stream and known[2] == stream.device
        if known is not None and same and all(buffers[key] is part for key, part in known[1].items()):
            return known[0]
        entry = self.packed_entries[name]
        parts = {part: buffers[name + suffix] for part, suffix in entry.suffixes.items()}
        if any(part.is_meta for part in parts.values()) and not stream.is_meta:
            kind = type(self).__name__
            raise ValueError(f"{kind}.{name}: its tables are offloaded with the layer it is tied to. Load without offload_buffers.")
        weight = weight_of(stream, {key: part.to(stream.device) for key, part in parts.items()}, entry)
        if not is_recorded(stream):  # a tensor made while operations are recorded is of no use later
            parameters.known[name] = weight, {name + entry.suffixes[part]: tensor for part, tensor in parts.items()}, stream.device
        return weight

    def seen(self, name: str) -> Tensor:
        """Return a dense view of parameter `name`; the meta tensor itself while it is not loaded or is offloaded."""
        stream = self._parameters.get(name)
        if stream is not None and stream.is_meta:
            return stream
        weight = self.packed(name)
        return weight.dense(self.dense_dtype) if is_recorded(weight.stream) else self.view(name, stream)

    def view(self, name: str, parameter: Any) -> Any:
        """Return a parameter, or the dense view of a packed one: the same for all modules that share it."""
        if parameter is None or name not in self.packed_entries:
            return parameter
        weight, views = self.packed(name), cast(Parameters, self._parameters).views
        known = views.get(name)
        if known is None or known[0] is not weight or known[1].dtype != self.dense_dtype:
            view = _VIEWS.get(id(parameter))
            if view is None or not view.shows(weight, self.dense_dtype):
                view = _VIEWS[id(parameter)] = DenseView(weight, self.dense_dtype, f"{type(self).__name__}.{name}")
            known = views[name] = weight, view
        return known[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made here have no name to be found by.
        dims = [(name, entry.dim) for name, entry in self.packed_entries.items()]
        return _blank, (self.ordinary, dims), {**self.__dict__, "decoded": {}, "siblings": None, "_parameters": dict(self._parameters)}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._parameters = Parameters(self._parameters, self)  # pyright: ignore

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the module. Copied alone it becomes dense and ordinary: such copies are trained (PEFT's `modules_to_save`)."""
        alone = not memo
        make, arguments, state = self.__reduce_ex__(4)
        memo[id(self)] = other = make(*arguments)
        other.__setstate__(copy.deepcopy(state, memo))
        if alone:
            unpack_modules(other)
        return other

    @contextmanager
    def _as_kept(self) -> Iterator[None]:
        """Give torch's own methods the packed bytes of parameters within the block, in the place of their views."""
        parameters = self._parameters
        self._parameters = dict(parameters)
        try:
            yield
        finally:
            kept, self._parameters = self._parameters, parameters
            for name, parameter in kept.items():
                parameters[name] = parameter

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed_entries:
            if (stream := self._parameters.get(name)) is not None:
                destination[prefix + name] = stream if keep_vars else stream.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._as_kept():
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        kept = {key: b for name in self.packed_entries for key in self._keys(name) if (b := self._buffers.get(key)) is not None}
        with self._as_kept():
            super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != before.dtype:  # a table in another dtype would be another table
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        cut = [
            f"{name}: {e.bits} bits, {e.luts} tables" + (f", dim {e.dim}" if e.dim > 1 else "") if e.form is None else f"{name}: {e.format}"
            for name, e in self.packed_entries.items()
        ]
        return "; ".join(text for text in (super().extra_repr(), *cut) if text)

    def _keys(self, name: str) -> list[str]:
        """List the buffers of parameter `name`."""
        return [name + suffix for suffix in self.packed_entries[name].suffixes.values()]


class PackedLinear(PackedModule, nn.Linear):
    """A linear layer on a packed weight."""

    weight = property(lambda self: self.seen("weight"))  # pyright: ignore

    # Layers that are multiplied in one call with it.
    siblings: Siblings | None = None

    def forward(self, input: Tensor) -> Tensor:
        out = None if self.siblings is None else self.siblings.product(self, input)
        if out is None:
            out = packed_linear(input, self.packed())
        return out if self.bias is None else out + self.bias.to(out.dtype)


class PackedEmbedding(PackedModule, nn.Embedding):
    """An embedding on a packed weight with `dim` 1: decodes the rows of its tokens."""

    weight = property(lambda self: self.seen("weight"))  # pyright: ignore

    def forward(self, input: Tensor) -> Tensor:
        weight = self.packed()
        if is_taken_whole():
            return embedding(input, *weight.arguments, self.dense_dtype)
        return embed(input, weight, self.dense_dtype)


class _DecodedModule(PackedModule):
    """Any other module: reads dense weights, decoded when it is called. Backward decodes them again, so that none is kept for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_recorded(*(self._parameters.get(name) for name in self.packed_entries)):  # pyright: ignore
            return super().forward(*args, **kwargs)
        thread = threading.get_ident()
        # Experts read their weights once for each expert.
        mine = self.decoded[thread] = {name: self.packed(name).dense(self.dense_dtype) for name in self.packed_entries}
        names = {dense.untyped_storage().data_ptr(): name for name, dense in mine.items()}

        def forget(kept: Tensor) -> Any:
            name = names.get(kept.untyped_storage().data_ptr())
            return (name, kept.dtype, kept.shape, kept.stride(), kept.storage_offset()) if name and kept.numel() else kept

        try:
            with saved_tensors_hooks(forget, self._remember):
                return super().forward(*args, **kwargs)
        finally:
            del self.decoded[thread]

    def _remember(self, kept: Any) -> Tensor:
        """Decode again a part of a weight that was not kept, from the rows that it lies in."""
        if isinstance(kept, Tensor):
            return kept
        name, dtype, shape, stride, offset = kept
        weight = self.packed(name)
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        first_row = offset // weight.cols // weight.row_step * weight.row_step
        last_row = min(-(-(last // weight.cols + 1) // weight.row_step) * weight.row_step, weight.rows)
        return weight.decode_rows(first_row, last_row, dtype).as_strided(shape, stride, offset - first_row * weight.cols)

    def _read(self, name: str) -> Tensor:
        mine = self.decoded.get(threading.get_ident()) if self.decoded else None
        return self.seen(name) if mine is None else mine[name]


def pack_module(module: nn.Module, name: str, entry: Entry, k: int, dtype: torch.dtype, device: torch.device | str = "meta") -> None:
    """Pack the parameter `name` of a module, in place. The bytes come later, from a state dict.

    Args:
        module: owns the parameter, of the shape in `entry`.
        name: of the parameter in it.
        entry: its bits, tables and shape.
        k: centroids in a table; of no use for a format.
        dtype: of the weights that it stands for.
        device: of the empty tensors that wait for the bytes.
    """
    if not isinstance(module, PackedModule):
        # Not through setattr: a module in an attribute would be a child.
        module.__dict__ |= {"packed_entries": {}, "dense_dtype": dtype, "ordinary": type(module), "tables_of": None}
        module.__dict__ |= {"decoded": {}, "_parameters": Parameters(module._parameters, module)}
    module.__class__ = _packed_class(type(module), name, entry.dim)  # pyright: ignore
    assert isinstance(module, PackedModule)
    module.packed_entries[name] = entry
    stream = torch.empty(entry.packed_bytes, dtype=torch.uint8, device=device)
    module._parameters[name] = nn.Parameter(stream, requires_grad=False)
    kinds = {part: stored_kind(about) for part, about in entry.layout.items()} or {"lut": (LUT_DTYPE, (entry.luts, k, entry.dim))}
    for part, (dtype_of_part, shape) in kinds.items():
        module.register_buffer(name + entry.suffixes[part], torch.empty(shape, dtype=dtype_of_part, device=device))
    # transformers would give random values to a parameter that is not loaded because it stays on disk.
    module._parameters[name]._is_hf_initialized = True  # pyright: ignore


@cache
def _packed_class(kind: type[nn.Module], name: str, dim: int) -> type[nn.Module]:
    if kind is nn.Linear:
        return PackedLinear
    if issubclass(kind, nn.Embedding) and dim == 1:
        # Gemma's, say, scales the result of its base class.
        return PackedEmbedding if kind is nn.Embedding else type(kind.__name__, (kind, PackedEmbedding), {})  # pyright: ignore
    bases = (kind,) if issubclass(kind, _DecodedModule) else (_DecodedModule, kind)
    return type(kind.__name__, bases, {name: property(lambda self: self._read(name))})


def _blank(ordinary: type[nn.Module], dims: Iterable[tuple[str, int]]) -> nn.Module:
    """Make a packed module without its state, for pickle and copies."""
    kind = ordinary
    for name, dim in dims:
        kind = _packed_class(kind, name, dim)
    return kind.__new__(kind)


def tie_module(module: PackedModule, name: str, owner: PackedModule) -> None:
    """Use the tables of `owner` for the parameter `name`, in place; its stream is tied as any parameter is."""
    for key in module._keys(name):
        module._buffers.pop(key)
    module.__dict__["tables_of"] = owner


def unpack_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make all packed modules ordinary ones again, in place; tied parameters stay tied.

    Args:
        model: with packed modules, loaded.
        dtype: of the dense weights; by default that of each module.

    Cost:
        The memory of the dense model.
    """
    packed = {m: {name: m.packed(name) for name in m.packed_entries} for m in model.modules() if isinstance(m, PackedModule)}
    dense: dict[Tensor, nn.Parameter] = {}
    for module, weights in packed.items():
        module._parameters = dict(module._parameters)
        for name, weight in weights.items():
            if weight.stream not in dense:
                dense[weight.stream] = nn.Parameter(weight.dense(dtype or module.dense_dtype))
            module._parameters[name] = dense[weight.stream]
            for key in module._keys(name):
                module._buffers.pop(key, None)
        module.__class__ = module.ordinary  # pyright: ignore
        for attribute in ("packed_entries", "dense_dtype", "ordinary", "tables_of", "decoded", "siblings"):
            module.__dict__.pop(attribute, None)
