"""Forward and backward calls of a provider's function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]
Function = Callable[..., Any]


def forward(function: Function, inputs: Sequence[Tensor], gradient: Tensor | None = None) -> Call:
    """A call without gradients. As in a model, all ``inputs`` after the first are parameters."""
    inputs = [inputs[0], *map(nn.Parameter, inputs[1:])]

    def run() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


def both(function: Function, inputs: Sequence[Tensor], gradient: Tensor) -> Call:
    """A call that returns the output and the gradients of all floating ``inputs``."""
    leaves, wanted = _leaves(inputs)

    def run() -> list[Tensor]:
        y = _first(function(*leaves))
        return [y, *torch.autograd.grad(y, wanted, gradient)]

    return run


def backward(function: Function, inputs: Sequence[Tensor], gradient: Tensor) -> Call:
    """A call that returns the gradients alone. The first call builds the graph; all calls reuse it."""
    leaves, wanted = _leaves(inputs)
    output: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        if not output:
            output.append(_first(function(*leaves)))
        return torch.autograd.grad(output[0], wanted, gradient, retain_graph=True)

    return run


DIRECTIONS = {"forward": forward, "backward": backward, "both": both}
LABELS = {"forward": "forward", "backward": "backward", "both": "forward+backward"}


def _first(results: Any) -> Tensor:
    return results[0] if isinstance(results, tuple) else results


def _leaves(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    return leaves, [x for x in leaves if x.requires_grad]


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast floating tensors to ``dtype``; others are unchanged."""
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]
