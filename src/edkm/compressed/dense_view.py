"""Show the weight of a packed module to code that reads it: a dense weight, decoded when it is used.

Some code reads a layer's `weight` and not only calls the layer: Gemma's embedding and T5's output layer ask for its dtype, Mamba
multiplies by it, TRL's losses take the output layer's, adapters ask for its shape and device and, when they are merged, add to it;
others go over all parameters, to count them or to find the embedding. A `DenseView` gives shape and dtype at once, decodes the weight
for every operation, and refuses to be changed or trained: a change would be lost.

A view that is set as a parameter (a tied weight, one that accelerate has moved) becomes the packed weight again: `Parameters`.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.jit import _trace
from torch.utils._pytree import tree_leaves, tree_map_only

from edkm.compressed.linear import PackedWeight


class DenseView(Tensor):
    """A packed weight that looks like a dense parameter.

    Args:
        packed: the weight.
        dtype: of the dense one.
        label: for messages.

    Cost:
        Nothing until it is used; then the dense weight, once for each operation. Moved to another device, it is packed there.
    """

    packed: PackedWeight
    label: str

    @staticmethod
    def __new__(cls, packed: PackedWeight, dtype: torch.dtype, label: str) -> DenseView:
        make = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        view = make(cls, packed.entry.shape, dtype=dtype, device=packed.stream.device)
        view.packed, view.label = packed, label
        view._is_param = True  # for code that asks `isinstance(view, nn.Parameter)`
        view._is_hf_initialized = True  # transformers leaves it alone
        return view

    def __init__(self, *_: Any) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].dtype, args[0].label)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype) and kwargs.get("device") is not None:
            return cls(args[0].packed.to(kwargs["device"]), args[0].dtype, args[0].label)
        written = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written += [view for view in tree_leaves(value) if isinstance(view, cls)]
        dense: dict[int, Tensor] = {}
        args, kwargs = tree_map_only(cls, lambda view: dense.setdefault(id(view), view.packed.dense(view.dtype)), (args, kwargs))
        out = func(*args, **kwargs)
        for view in written:
            # An average over all parameters writes equal values: that is no change.
            if not view._is_equal(dense[id(view)]):
                view._refuse("changed (by merging an adapter, say)")
        return out

    def shows(self, weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Say whether this is `weight` in `dtype`; its tables may be a copy."""
        mine = self.packed
        same = mine.stream is weight.stream and self.device == weight.stream.device and self.dtype == dtype
        pairs = zip(mine.parts.values(), weight.parts.values(), strict=True)
        return same and all(a is b or a.is_meta or torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)

    @property
    def data(self) -> DenseView:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The view itself, which refuses to be written to."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        # Some code sets all parameters in another dtype: that is no change.
        if value is not self and not self._is_equal(value):
            self._refuse("changed (by merging an adapter, say)")

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> DenseView:  # pyright: ignore[reportIncompatibleMethodOverride]
        if requires_grad:
            self._refuse("trained (put an adapter on its layer, or leave the layer out when compressing)")
        return self

    @property
    def nbytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.packed.stream.numel()

    @property
    def itemsize(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.element_size()

    def element_size(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Bytes that a weight takes, a fraction: transformers multiplies it by their number."""
        return self.nbytes / self.numel()

    def data_ptr(self) -> int:
        """Return the address of the indices, which tied weights share."""
        return self.packed.stream.data_ptr()

    def is_contiguous(self, *_: Any, **__: Any) -> bool:
        """Say no: code that reads memory by address then calls `contiguous()` first, which gives the dense weight."""
        return False

    def contiguous(self, *_: Any, **__: Any) -> Tensor:
        return self.packed.dense(self.dtype)

    def numpy(self, **options: Any) -> Any:
        return self.contiguous().numpy(**options)

    def tolist(self) -> Any:
        return self.contiguous().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.packed.stream.untyped_storage()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DenseView({self.label}, {list(self.shape)}, {self.dtype}, packed in {self.packed.stream.numel()} bytes)"

    def __deepcopy__(self, memo: Any) -> DenseView:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.packed.dense(self.dtype).__reduce_ex__(protocol)

    def _is_equal(self, other: Tensor) -> bool:
        if other.shape != self.shape or other.is_meta != self.is_meta:
            return False
        return self.is_meta or torch.equal(other, self.packed.dense(self.dtype).to(other.dtype))

    def _refuse(self, done: str) -> NoReturn:
        raise ValueError(
            f"{self.label} {list(self.shape)}: a packed weight is a constant and cannot be {done}. "
            "Call dequantize() on the model first (on get_base_model() of a PeftModel, which keeps its adapters)."
        )


class Parameters(dict[str, Any]):
    """The parameters of a packed module: it holds streams of indices, and gives their `DenseView` to code that goes over all parameters.

    Attributes:
        module: the packed module, weakly.
        known: weights as they were last used, with their tables and device. Until another is set: nothing is held that was offloaded.
        views: of these weights, with the weight.
    """

    def __init__(self, content: dict[str, Any], module: nn.Module) -> None:
        super().__init__(content)
        self.module: Any = weakref.ref(module)
        self.known: dict[str, tuple[PackedWeight, dict[str, Tensor], torch.device]] = {}
        self.views: dict[str, tuple[PackedWeight, DenseView]] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, DenseView):
            stream = value.packed.stream
            value = stream if isinstance(stream, nn.Parameter) else nn.Parameter(stream, requires_grad=False)
        elif value is not None and value.dtype != torch.uint8 and name in self.module().packed_entries:
            raise ValueError(
                f"{type(self.module()).__name__}.{name}: is packed, and {value.dtype} {list(value.shape)} cannot be set in its place. "
                "Call dequantize() on the model first."
            )
        self.known.pop(name, None)
        self.views.pop(name, None)
        super().__setitem__(name, value)

    def items(self) -> Any:
        kept, module = dict(self), self.module()
        # torch makes a program of the model, and collects the parameters before and after it records.
        if getattr(sys.modules.get("torch.export._trace"), "_EXPORT_MODULE_HIERARCHY", None) is not None:
            return kept.items()  # of bytes
        if getattr(_trace, "_trace_module_map", None) is not None:  # there they are constants
            return {name: value for name, value in kept.items() if name not in module.packed_entries}.items()
        return {name: module.view(name, value) for name, value in kept.items()}.items()

    def values(self) -> Any:
        return dict(self.items()).values()
