"""The precision rule of the tests.

The error of a result is the L2 norm of its difference from the float64 reference. Two limits apply, and the larger
one counts: twice the error of PyTorch's ops in the same dtype (the worst, if PyTorch has several), and the floor,
4 eps(dtype) times the norm of the result computed with absolute values. The floor is the error from rounding every
operand of every sum once or twice. :func:`assert_as_precise` applies the rule to ops, whose tests compute the absolute
values; :func:`assert_model_as_precise` to models, with an estimate; :func:`assert_same` compares two results without a
float64 reference.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def floor(absolute: Tensor, dtype: torch.dtype) -> Tensor:
    return 4 * torch.finfo(dtype).eps * absolute.double().norm()


def estimate(exact: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """Estimate the result computed with absolute values: for a sum of ``terms`` numbers of random sign, it is
    sqrt(terms) times larger. Sums are float32; in lower dtypes, rounding the results outweighs rounding the sums."""
    ratio = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    return exact.double() * max(1.0, ratio * terms**0.5)


def apply_rule(ours: Tensor, peers: Sequence[Tensor], exact: Tensor, floor: Tensor, name: str) -> None:
    """Apply the rule to one result."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    error = (ours.double() - exact).norm()
    theirs = max((peer.double() - exact).norm() for peer in peers)
    # a comparison with NaN is false, so a NaN of PyTorch's allows no error
    assert error <= 2 * theirs or error <= floor, (
        f"{name} ({ours.dtype}): error {error:.3e}, PyTorch's {theirs:.3e}, floor {floor:.3e}"
    )


def assert_as_precise(
    ours: Sequence[Tensor],
    peers: Sequence[Sequence[Tensor]],
    exact: Sequence[Tensor],
    absolute: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """Apply the rule to each of ``ours``; ``peers`` are the results of PyTorch's ops, ``absolute`` the results computed
    with absolute values."""
    for i, name in enumerate(names):
        apply_rule(ours[i], [peer[i] for peer in peers], exact[i], floor(absolute[i], ours[i].dtype), name)


Results = Tensor | Mapping[str, Tensor | None]


def assert_model_as_precise(
    ours: Results, theirs: Results, exact: Results, terms: int, dtype: torch.dtype | None = None
) -> None:
    """Apply the rule to a model's output or to its gradients by name; a gradient is None exactly if ``theirs`` is.

    Args:
        terms: Length of the model's longest sum, see :func:`estimate`.
        dtype: Dtype of the computation, if the results have another.
    """
    if isinstance(ours, Tensor):
        ours, theirs, exact = ({"output": x} for x in (ours, theirs, exact))
    assert ours.keys() == theirs.keys()
    # exact sums of 0, such as the key bias gradient: assume terms as large as the other gradients' elements
    size = torch.cat([x.detach().flatten() for x in exact.values() if x is not None]).square().mean().sqrt()
    for name, result in ours.items():
        peer, truth = theirs[name], exact[name]
        assert (result is None) == (peer is None), name
        if result is None:
            continue
        assert result.dtype == peer.dtype and result.shape == peer.shape, name
        terms_of = truth.detach() if truth.norm() > 1e-9 * size * truth.numel() ** 0.5 else size.expand_as(truth)
        allowed = floor(estimate(terms_of, dtype or peer.dtype, terms), dtype or peer.dtype)
        apply_rule(result.detach(), [peer.detach()], truth.detach(), allowed, name)


def longest_sum(model: nn.Module) -> int:
    """Length of the longest sum in the model's GEMMs: the longest side of a weight."""
    return max(n for parameter in model.parameters() for n in parameter.shape)


def assert_same(
    ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor], terms: int = 1, dtype: torch.dtype | None = None
) -> None:
    """Compare two results, or sequences of results, of one formula; the floor limits their difference. ``terms`` and
    ``dtype`` as in :func:`assert_model_as_precise`."""
    if not isinstance(ours, Tensor):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, terms, dtype)
        return
    assert ours.shape == theirs.shape
    error = (ours.detach().double() - theirs.detach().double()).norm()
    allowed = floor(estimate(theirs.detach(), dtype or ours.dtype, terms), dtype or ours.dtype)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
