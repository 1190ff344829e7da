"""Forward and backward as one call, for any provider."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def forward_backward(function: Callable[..., Any], inputs: Sequence[Tensor], gradient: Tensor) -> Callable[[], Any]:
    """A call that returns the output and the gradients of all floating ``inputs``."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def run() -> list[Tensor]:
        y = function(*leaves)
        y = y[0] if isinstance(y, tuple) else y
        return [y, *torch.autograd.grad(y, wanted, gradient)]

    return run


def forward(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """A call without gradients; as in a model, all ``inputs`` but the first are its parameters."""
    inputs = [inputs[0], *map(nn.Parameter, inputs[1:])]

    def run() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]
