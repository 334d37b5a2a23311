"""What other code sees where it reads the weight of a packed module: the dense weight, decoded when it is used.

Some code reads a layer's `weight` and not only calls the layer: Gemma's embedding and T5's output layer ask for its dtype, Mamba
multiplies by it, TRL's losses take the output layer's, adapters ask for its shape and device and, when they are merged, add to it. A
`DenseView` answers at once what costs nothing, decodes the weight for every operation, and refuses to be changed: a change would be lost.

What is set in its place (a tied weight, one that accelerate has moved) is the packed weight again: `Parameters`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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
        view._is_param = True  # `isinstance(view, nn.Parameter)`, for those who look for one
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
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                value._refuse()
        args, kwargs = tree_map_only(cls, lambda view: view.packed.dense(view.dtype), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> DenseView:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Itself: what is written to it is refused, too."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        self._refuse()

    def data_ptr(self) -> int:
        """Of the indices: equal for tied weights."""
        return self.packed.stream.data_ptr()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DenseView({self.label}, {list(self.shape)}, {self.dtype}, packed in {self.packed.stream.numel()} bytes)"

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self.label} {list(self.shape)}: a packed weight is a constant and cannot be changed (by merging an adapter, say). "
            "Call dequantize() on the model first (on get_base_model() of a PeftModel, which keeps its adapters)."
        )


class Parameters(dict[str, Any]):
    """A module's parameters: of a `DenseView` that is set, the stream of indices is kept.

    Attributes:
        known: weights as they were last used, with their tables and device. Until another is set: nothing is held that was offloaded.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.known: dict[str, tuple[PackedWeight, Tensor, torch.device]] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, DenseView):
            stream = value.packed.stream
            value = stream if isinstance(stream, nn.Parameter) else nn.Parameter(stream, requires_grad=False)
        self.known.pop(name, None)
        super().__setitem__(name, value)

    def __reduce__(self) -> Any:
        return Parameters, (dict(self),)
