"""Weights laid out once for the CPU's matrix products, for as long as they do not change.

A product on the CPU reads its weight in panels (:func:`vit_triton.kernels.linear.pack_weight`), a patch embedding with
its columns in the order of the image's memory. While gradients are off a model's parameters seldom change, so what was
laid out is kept, at the price of the weight's size in memory, and is
made again whenever anything says that they may have changed: the parameter has other memory or another version, it was
used with gradients on, its module was put into training mode, moved, cast or given a state dict, an optimizer stepped.
In-place changes that PyTorch does not count (``p.data.copy_(x)``) show in a sample of the values that every call
compares; what changes a few values through ``.data`` and no other way calls :func:`clear`.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Kept(NamedTuple):
    weight: weakref.ref
    arranged: Tensor
    state: tuple[Any, ...]
    storage: torch.UntypedStorage  # held, so that no other tensor gets its address
    view: Tensor  # some values of the weight, where they lie
    sample: Tensor  # and as they were


_packed: dict[int, _Kept] = {}  # by the id of the weight: looking up a weak reference takes longer
_SAMPLES = 8  # along each axis
_watching_optimizers = False


def panels(weight: Tensor) -> Tensor | None:
    """The panels of a parameter on the CPU; None where there are none to have: with gradients on, while
    ``torch.compile`` traces, or if ``weight`` is no parameter or of a dtype that is not read in panels."""
    if not _keeps(weight):
        return None
    from vit_triton.cpu.driver import dot_panel

    layout = dot_panel(weight.dtype)
    if layout is None:
        return None
    from vit_triton.kernels import linear

    return _kept(weight, layout, lambda: linear.pack_weight(weight.detach(), *layout))


def in_image_order(weight: Tensor, image: Tensor, patch_size: tuple[int, int], patch_order: str) -> Tensor | None:
    """The weight of a patch embedding with its columns in the order in which ``image`` lies in memory; None as for
    :func:`panels`."""
    if not _keeps(weight):
        return None
    from vit_triton.kernels._patches import patch_layout

    layout = patch_layout(image, patch_size, patch_order)
    return _kept(weight, layout.order, lambda: cast(Tensor, layout.from_weight(weight.detach())))


def _keeps(weight: Tensor) -> bool:
    if type(weight) is not nn.Parameter or torch.compiler.is_compiling() or weight.device.type != "cpu":
        return False
    if torch.is_grad_enabled():
        drop(weight)
        return False
    return True


def _kept(weight: Tensor, arrangement: object, arrange: Callable[[], Tensor]) -> Tensor:
    version = None if weight.is_inference() else weight._version
    state = (arrangement, weight.data_ptr(), weight.shape, weight.stride(), version)
    known = _packed.get(id(weight))
    if known is not None and known.state == state and torch.equal(known.view, known.sample):
        return known.arranged
    global _watching_optimizers
    if not _watching_optimizers:
        register_optimizer_step_post_hook(lambda *_: clear())
        _watching_optimizers = True
    view = weight.detach()[tuple(slice(None, None, max(1, size // _SAMPLES)) for size in weight.shape)]
    key, arranged = id(weight), arrange()
    reference = weakref.ref(weight, lambda _: _packed.pop(key, None))
    _packed[key] = _Kept(reference, arranged, state, weight.untyped_storage(), view, view.clone())
    return arranged


def drop(weight: Tensor | None) -> None:
    """Forget the panels of one weight."""
    _packed.pop(id(weight), None)


def clear() -> None:
    """Forget all panels."""
    _packed.clear()
