"""Weights laid out once for the CPU's matrix products, for as long as they do not change.

A product on the CPU reads its weight in panels (:func:`vit_triton.kernels.linear.pack_weight`). While gradients are
off a model's parameters seldom change, so their panels are kept, at the price of the weight's size in memory, and are
made again whenever anything says that they may have changed: the parameter has other memory or another version, it was
used with gradients on, its module was put into training mode, moved, cast or given a state dict, an optimizer stepped.
In-place changes that PyTorch does not count (``p.data.copy_(x)``) show in a sample of the values that every call
compares; what changes a few values through ``.data`` and no other way calls :func:`clear`.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Panels(NamedTuple):
    weight: weakref.ref
    panels: Tensor
    state: tuple[Any, ...]
    storage: torch.UntypedStorage  # held, so that no other tensor gets its address
    view: Tensor  # some values of the weight, where they lie
    sample: Tensor  # and as they were


_packed: dict[int, _Panels] = {}  # by the id of the weight: looking up a weak reference takes longer
_SAMPLES = 8  # along each axis
_watching_optimizers = False


def panels(weight: Tensor) -> Tensor | None:
    """The panels of a parameter on the CPU; None where there are none to have: with gradients on, while
    ``torch.compile`` traces, or if ``weight`` is no parameter or of a dtype that is not read in panels."""
    if type(weight) is not nn.Parameter or torch.compiler.is_compiling() or weight.device.type != "cpu":
        return None
    if torch.is_grad_enabled():
        drop(weight)
        return None
    from vit_triton.cpu.driver import dot_panel

    layout = dot_panel(weight.dtype)
    if layout is None:
        return None
    state = (layout, weight.data_ptr(), weight.shape, weight.stride(), _version(weight))
    known = _packed.get(id(weight))
    if known is not None and known.state == state and torch.equal(known.view, known.sample):
        return known.panels
    return _pack(weight, layout, state)


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def _pack(weight: nn.Parameter, layout: tuple[int, int], state: tuple[Any, ...]) -> Tensor:
    from vit_triton.kernels.linear import pack_weight

    global _watching_optimizers
    if not _watching_optimizers:
        register_optimizer_step_post_hook(lambda *_: clear())
        _watching_optimizers = True
    view = weight.detach()[tuple(slice(None, None, max(1, size // _SAMPLES)) for size in weight.shape)]
    key, made = id(weight), pack_weight(weight.detach(), *layout)
    reference = weakref.ref(weight, lambda _: _packed.pop(key, None))
    _packed[key] = _Panels(reference, made, state, weight.untyped_storage(), view, view.clone())
    return made


def drop(weight: Tensor | None) -> None:
    """Forget the panels of one weight."""
    _packed.pop(id(weight), None)


def clear() -> None:
    """Forget all panels."""
    _packed.clear()
