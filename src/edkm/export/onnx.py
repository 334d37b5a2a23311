"""Write a packed model as a graph for ONNX Runtime: integers in blocks stay integers, in `MatMulNBits` and `GatherBlockQuantized`.

torch.onnx exports the model in float32 with its clustered layers in the place of the dense ones (onnxlayers.py). One graph serves prompts
and single tokens: it takes keys and values of the text so far, of length 0 at the start, and returns them with those of the new tokens.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edkm.compressed import checkpoint
from edkm.compressed.companions import copy_companions
from edkm.compressed.jsonfile import read_json, write_json
from edkm.compressed.modelconfig import model_config
from edkm.export.exported import Exported, need, new_directory
from edkm.export.logits import Reference, dense_model, reference_of
from edkm.export.onnxlayers import MODULE, BlockLayer, BlockLinear, Step, replace_layers
from edkm.progress import progress

_FILE = "model.onnx"
_DOMAIN = "com.microsoft"
_INT8 = 4  # ONNX Runtime's number for products of 8-bit activations
_LEAST_ROUNDED_COSINE = 0.98
# Rotary positions whose angles depend on the length of the text: a graph has those of the text that it was traced with.
_CHANGING_ROPE = ("dynamic", "longrope")


def export(directory: str | Path, out: str | Path, *, overwrite: bool = False, int8_activations: bool = False) -> Exported:
    """Write a packed causal language model as a directory with `model.onnx`, its weights beside it, config and tokenizer.

    Inputs are `input_ids` `[batch, sequence]` int64, texts of one length, and `past_key_values.I.key` and `.value`
    `[batch, heads, past, size]` float32 of each layer; outputs `logits` `[batch, sequence, vocabulary]`, `present.I.key` and `.value`.

    Args:
        directory: a packed checkpoint whose linear weights are integers with zero points, or without offsets.
        out: the directory. Nothing is left there if a check fails.
        overwrite: replace a model that is there.
        int8_activations: let linear layers round their inputs to 8 bits in blocks, as llama.cpp does: many times faster on a CPU. The
            weights are the same, and the graph is checked in float32 first.

    Raises:
        ValueError: a linear weight has another format, torch.onnx cannot take the model, or a check failed.
        FormatError: all that `checkpoint.open_items` refuses.

    Cost:
        The dense model in float32, and a trace of it.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "onnx")
    directory, out = Path(directory), Path(out)
    _check_positions(directory)
    with new_directory(out, overwrite=overwrite) as made, progress("export", 4, "parts") as advance:
        model = dense_model(directory)
        expected = reference_of(model)
        advance(note="tracing")
        layers, notes = replace_layers(model, directory)
        step = Step(model)
        _trace(step, made / _FILE)
        advance(note="checking tensors")
        _check_tensors(made / _FILE, directory, layers)
        advance(note="checking logits")
        notes.append(expected.compare(_logits(made / _FILE, step, expected), "ONNX Runtime"))
        if int8_activations:
            _round_activations(made / _FILE)
            found = _logits(made / _FILE, step, expected)
            notes.append(expected.compare(found, "ONNX Runtime with 8-bit activations", _LEAST_ROUNDED_COSINE))
        config = read_json(directory / "config.json")
        del config["quantization_config"]
        write_json(made / "config.json", config)
        copy_companions(directory, made)
        for path in made.glob(f"{_FILE}*"):
            shutil.copymode(made / "config.json", path)
        advance(note="all checked")
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        return Exported(size, len({layer.name for layer in layers.values()}), notes)


def _check_positions(directory: Path) -> None:
    rope = getattr(model_config(directory), "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") in _CHANGING_ROPE:
            raise ValueError(
                f"{directory}: rotary positions of type {part['rope_type']!r} depend on the length of the text. Use edkm unpack."
            )


def _trace(step: Step, path: Path) -> None:
    import onnxscript.optimizer
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.export import Dim

    batch, sequence, past = Dim("batch"), Dim("sequence"), Dim("past")
    ids, given = step.example()
    pair = ({0: batch, 2: past}, {0: batch, 2: past})
    with _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                step,
                (ids, given),
                dynamic_shapes={"input_ids": {0: batch, 1: sequence}, "past": [pair] * len(given)},
                input_names=["input_ids", *step.names("past_key_values")],
                output_names=["logits", *step.names("present")],
                dynamo=True,
                verbose=False,
                optimize=False,
            )
            # Constants are folded but for codes: a weight of several layers would be stored for each.
            onnxscript.optimizer.optimize_ir(program.model, should_fold=_is_foldable)
            for node in program.model.graph:
                node.name = node.metadata_props.get(MODULE, node.name)
            ClearMetadataAndDocStringPass()(program.model)  # paths of this machine
        except Exception as error:  # of torch.export, torch.onnx and each model's code
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model: torch.onnx cannot export it ({type(error).__name__}: {reason}). Use edkm unpack.") from error
        program.save(path, external_data=True)


def _is_foldable(node: Any) -> bool | None:
    """Say no for a node that reads codes; None leaves it to onnxscript."""
    return False if any(value is not None and str(value.name).endswith(".codes") for value in node.inputs) else None


def _check_tensors(path: Path, source: Path, layers: Mapping[str, BlockLayer]) -> None:
    """Read the graph back, and compare every weight of its operators, as they define it, with the packed model's.

    Raises:
        ValueError: one differs or is not there.
    """
    import onnx_ir

    nodes = {node.name: node for node in onnx_ir.load(path).graph if node.domain == _DOMAIN}
    with checkpoint.open_items(source) as items:
        for module, layer in layers.items():
            node: Any = nodes.get(module)
            tensor: Any = items[layer.name].load()
            same = node is not None and {key: node.attributes[key].as_int() for key in layer.attributes} == layer.attributes
            if not same or not torch.equal(layer.dequantize(*_parts(node, layer)), tensor.values()):
                raise ValueError(f"{layer.name}: differs in the exported file. This is a fault of edkm or of torch.onnx.")


def _parts(node: Any, layer: BlockLayer) -> list[Tensor]:
    """Read codes, scales and zeros of a node from the file."""
    codes, *others = [value for value, name in zip(node.inputs, layer.inputs, strict=True) if name]
    if codes.producer() is not None:  # those of an embedding are flattened
        codes = codes.producer().inputs[0]
    return [torch.from_numpy(np.array(value.const_value.numpy())) for value in (codes, *others)]


def _round_activations(path: Path) -> None:
    import onnx

    model = onnx.load_model(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == BlockLinear.operator:
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", _INT8))
    onnx.save_model(model, path)


def _logits(path: Path, step: Step, expected: Reference) -> Tensor:
    """Let ONNX Runtime read the tokens of a reference, most at once, then some, then the last: logits `[n, vocabulary]`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    past = dict(zip(step.names("past_key_values"), [x[:, :, :0].numpy() for pair in step.example(1)[1] for x in pair], strict=True))
    found = []
    for tokens in expected.tokens.split([expected.tokens.shape[1] - 4, 3, 1], dim=1):
        outputs: Any = session.run(None, {"input_ids": tokens.numpy(), **past})
        logits, *present = outputs
        past = dict(zip(past, present, strict=True))
        found.append(torch.from_numpy(logits[0]))
    return torch.cat(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's logs and warnings about operators of other packages, and those of exporting itself. Errors come through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
