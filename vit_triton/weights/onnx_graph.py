"""The weights of a PyTorch model that was exported to ONNX.

The exporter keeps most names. Matrices of linear layers it transposes and calls ``onnx::MatMul_17``, and what it could
compute beforehand, such as slices of the position embedding, ``onnx::Concat_3``. What they are is read from the graph:
a product to which ``x.bias`` is added has the weight ``x.weight``, and what is added to the tokens that begin with the
class token are the positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_onnx"]


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The initializers of the graph, under the names and in the layout of the model's parameters."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    makers: dict[str, Any] = {}
    for node in graph.node:
        makers.update(dict.fromkeys(node.output, node))
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {name: tensor for name, tensor in tensors.items() if not _anonymous(name)}
    rest = {name: tensor for name, tensor in tensors.items() if _anonymous(name)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in rest:
            for bias in _added(node.output[0], users, found):
                found[bias.removesuffix("bias") + "weight"] = rest[node.input[1]].T
                rest.pop(node.input[1])
    for cls_token in [name for name in found if name.endswith("cls_token")]:
        parts = _positions(cls_token, users, makers, rest)
        if parts:
            found[cls_token.removesuffix("cls_token") + "position_embeddings"] = torch.cat(
                [rest.pop(part) for part in parts], dim=1
            )
    return {**found, **rest}


def _anonymous(name: str) -> bool:
    return name.startswith("onnx::")


def _added(output: str, users: dict[str, list[Any]], found: dict[str, Tensor]) -> list[str]:
    """The bias that is added to `output`."""
    sums = (node for node in users.get(output, []) if node.op_type == "Add")
    return [name for node in sums for name in node.input if name in found and name.endswith(".bias")][:1]


def _positions(
    cls_token: str, users: dict[str, list[Any]], makers: dict[str, Any], rest: dict[str, Tensor]
) -> list[str]:
    """Names of the parts of the position embedding: what flows into the sum with the class token, but not from it."""
    ways = [cls_token]
    while ways:
        name = ways.pop()
        for node in users.get(name, []):
            if node.op_type == "Add":
                added = [part for other in node.input if other != name for part in _sources(other, makers, rest)]
                return list(dict.fromkeys(added))  # the size of a part may be read from it too
            if node.op_type in ("Expand", "Tile", "Cast", "Concat"):
                ways += node.output
    return []


def _sources(name: str, makers: dict[str, Any], rest: dict[str, Tensor]) -> Iterator[str]:
    """The anonymous tokens (1, n, dim) that `name` is computed from, in the order in which they were put together."""
    if name in rest:
        if rest[name].dim() == 3:
            yield name
    elif name in makers:
        for source in makers[name].input:
            yield from _sources(source, makers, rest)
