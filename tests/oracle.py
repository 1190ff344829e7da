"""The precision rule of the tests.

The error of a result is the L2 norm of its difference to the float64 reference. It may be twice that of PyTorch's own
ops in the same dtype, the worse of several where PyTorch has several, and may always be 4 eps(dtype) times the norm of
the same quantity computed with absolute values: what rounding every operand of every sum once or twice can do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs of ``function`` and the gradients of all inputs that require one, given the outputs' gradients."""
    leaves = [x if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    return [*(y.detach() for y in outputs), *(x.grad for x in leaves if x is not None and x.requires_grad)]


def double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def magnitude(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.abs() for x in double(tensors)]


def assert_as_precise(
    ours: Sequence[Tensor],
    peers: Sequence[Sequence[Tensor]],
    exact: Sequence[Tensor],
    absolute: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """Hold each of ``ours`` to the rule; ``peers`` are the results of PyTorch's ops, ``absolute`` those with absolute
    values."""
    for i, name in enumerate(names):
        assert ours[i].shape == exact[i].shape, f"{name}: shape {tuple(ours[i].shape)}, not {tuple(exact[i].shape)}"
        error = (ours[i].double() - exact[i]).norm()
        theirs = max((peer[i].double() - exact[i]).norm() for peer in peers)
        floor = 4 * torch.finfo(ours[i].dtype).eps * absolute[i].norm()
        # a comparison with a peer's NaN is false: it excuses nothing
        assert error <= 2 * theirs or error <= floor, (
            f"{name} ({ours[i].dtype}): error {error:.3e}, PyTorch's {theirs:.3e}, floor {floor:.3e}"
        )
