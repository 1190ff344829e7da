"""Weights of a PyTorch model that was exported to ONNX.

The exporter keeps most names. It transposes the weights of linear layers and names them like ``onnx::MatMul_17``, and
names precomputed tensors, such as slices of the position embedding, like ``onnx::Concat_3``. Their names are recovered
from the graph: a MatMul followed by the addition of ``x.bias`` has the weight ``x.weight``, and the tensor that is
added to the class token and the patches is the position embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_triton.weights.lazy_tensor import LazyTensor

__all__ = ["read_onnx"]


def read_onnx(path: Path) -> dict[str, Any]:
    """Return the initializers of the graph with the names and layout of the model's parameters.

    Initializers of unsupported types, such as strings, are replaced with a description.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    if not model.HasField("graph"):  # protobuf reads many other files as an empty model
        raise ValueError("it contains no graph")
    graph = model.graph
    tensors = {tensor.name: _read_initializer(tensor, path.parent) for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    producers: dict[str, Any] = {}
    for node in graph.node:
        producers.update(dict.fromkeys(node.output, node))
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {name: tensor for name, tensor in tensors.items() if not _is_unnamed(name)}
    rest = {name: tensor for name, tensor in tensors.items() if _is_unnamed(name)}
    known = {name: tensor for name, tensor in rest.items() if isinstance(tensor, LazyTensor)}
    for node in graph.node:
        if node.op_type == "MatMul" and len(node.input) == 2 and node.input[1] in known:
            for bias in _find_bias(node.output[0], users, found):
                name = node.input[1]
                found[bias.removesuffix("bias") + "weight"] = _transpose(known.pop(name))
                rest.pop(name)
    for cls_token in [name for name in found if name.endswith("cls_token")]:
        parts = _find_position_slices(cls_token, users, producers, known)
        if parts:
            found[cls_token.removesuffix("cls_token") + "position_embeddings"] = _concatenate(
                [known.pop(part) for part in parts]
            )
            for part in parts:
                rest.pop(part)
    return {**found, **rest}


def _read_initializer(tensor: Any, folder: Path) -> LazyTensor | str:
    from onnx import helper, numpy_helper
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    try:
        like = torch.from_numpy(helper.tensor_dtype_to_np_dtype(tensor.data_type).type(0)[None])
    except (KeyError, TypeError, ValueError):  # not supported by numpy or PyTorch
        return f"ONNX type {tensor.data_type}"

    def read() -> Tensor:
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(folder))
        return torch.from_numpy(numpy_helper.to_array(tensor).copy())

    return LazyTensor(torch.empty(tuple(tensor.dims), dtype=like.dtype, device="meta"), read)


def _transpose(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.like.T, lambda: tensor.read().T)


def _concatenate(parts: list[LazyTensor]) -> LazyTensor:
    like = torch.cat([part.like for part in parts], dim=1)
    return LazyTensor(like, lambda: torch.cat([part.read() for part in parts], dim=1))


def _is_unnamed(name: str) -> bool:
    return name.startswith("onnx::")


def _find_bias(output: str, users: dict[str, list[Any]], found: dict[str, Any]) -> list[str]:
    """Return the name of the bias that is added to `output`, as a list of at most one."""
    sums = (node for node in users.get(output, []) if node.op_type == "Add")
    return [name for node in sums for name in node.input if name in found and name.endswith(".bias")][:1]


def _find_position_slices(
    cls_token: str, users: dict[str, list[Any]], producers: dict[str, Any], rest: dict[str, LazyTensor]
) -> list[str]:
    """Return the names of the slices of the position embedding, which is added to the class token."""
    pending, seen = [cls_token], {cls_token}
    while pending:
        name = pending.pop()
        for node in users.get(name, []):
            if node.op_type == "Add":
                return _find_source_tensors([other for other in node.input if other != name], producers, rest)
            if node.op_type in ("Expand", "Tile", "Cast", "Concat"):
                pending += [output for output in node.output if output not in seen]
                seen.update(node.output)
    return []


def _find_source_tensors(names: list[str], producers: dict[str, Any], rest: dict[str, LazyTensor]) -> list[str]:
    """Return the unnamed tensors (1, n, dim) from which `names` are computed, in order of concatenation."""
    found: list[str] = []
    pending, seen = names[::-1], set()
    while pending:
        name = pending.pop()
        if name in seen:  # a tensor may be used more than once
            continue
        seen.add(name)
        if name in rest:
            if rest[name].like.dim() == 3:
                found.append(name)
        elif name in producers:
            pending += reversed(producers[name].input)
    return found
