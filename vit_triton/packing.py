"""Frozen models: weights laid out once for the matrix products of the CPU target.

A product on the CPU reads its weight in panels (:func:`.kernels.linear.forward.pack_weight`), and a patch embedding
reads its weight with the columns in the order of the image's memory. Every call lays them out anew, so it uses the
values that the parameters have at that moment. :func:`prepack` keeps the copies instead.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_triton.checks import check_module

__all__ = ["prepack", "unpack"]


class _Frozen:
    """A parameter of a prepacked model, its state at that moment, and the copies made of it since.

    It holds the parameter, so that no other tensor gets its id. A weak reference would not do: with one,
    ``torch.utils.swap_tensors`` refuses the parameter.
    """

    __slots__ = ("copies", "holders", "name", "state", "tensor")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor, self.state = name, tensor, _state(tensor)
        self.holders = 0  # modules that have the parameter
        self.copies: dict[object, Tensor] = {}

    def copy(self, x: Tensor, layout: object, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(x)`` of the parameter or a view of it."""
        key = layout, x.shape, x.stride(), x.storage_offset()
        if key not in self.copies:
            with torch.no_grad(), torch.inference_mode(False):  # an inference tensor could not be saved for backward
                self.copies[key] = make(x.detach())
        return self.copies[key]


frozen: dict[int, _Frozen] = {}  # by the id of the parameter
_releases: weakref.WeakKeyDictionary[nn.Module, weakref.finalize[..., Any]] = weakref.WeakKeyDictionary()


def prepack(model: nn.Module) -> nn.Module:
    """Freeze a model for inference on a CPU: its weights are laid out at their first use and kept.

    Otherwise every call lays them out. The copies take as much memory as the weights.

    **Later edits are not seen.** A write that changes neither a parameter's address nor its version counter
    (``p.data[0] = 0``, ``p.detach().numpy()[0] = 0``, a fused optimizer, another process) has no effect on the result.
    A write that changes one of them makes the next call raise. To change a weight, call :func:`unpack`, edit, and call
    ``prepack`` again.

    Backend "torch", autocast, ``torch.compile`` and GPUs use the parameters themselves. A copy made by ``deepcopy`` or
    ``pickle`` is not prepacked.

    Args:
        model: a model of this library or an accelerated one, in evaluation mode. Changed in place. A model that is
            prepacked already is prepacked again, with the values that its parameters have now.

    Returns:
        `model`. Until :func:`unpack` it raises RuntimeError from ``train()``, ``load_state_dict``,
        :func:`vit_triton.load_weights`, ``to()`` and whatever else casts or moves parameters, and from a call after an
        edit that shows.

    Raises:
        TypeError: `model` is not a Module.
        ValueError: a module of `model` is in training mode.
    """
    unpack(model)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        which = f"{training[0]!r} of model" if training[0] else "model"
        raise ValueError(f"model must be in evaluation mode, but {which} is in training mode: call model.eval() first")
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            cls: Any = type(module)
            module.__class__ = _refusing(cls)
        entries = []
        for part, parameter in module._parameters.items():
            if parameter is not None:
                entry = frozen.setdefault(id(parameter), _Frozen(f"{name}.{part}".lstrip("."), parameter))
                entry.holders += 1
                entries.append(entry)
        _releases[module] = weakref.finalize(module, _release, entries)
        _releases[module].atexit = False
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Undo :func:`prepack`; a model that is not prepacked stays as it is.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Module.
    """
    check_module("model", model)
    for module in model.modules():
        cls: Any = type(module)
        if hasattr(cls, "_prepacked"):
            module.__class__ = without(cls, "_prepacked")
        if module in _releases:
            _releases.pop(module)()  # parameters that the module has no more, too
        for parameter in module._parameters.values():
            if id(parameter) in frozen:
                _forget(frozen[id(parameter)])
    return model


def refuse(model: nn.Module, what: str) -> None:
    """Raise RuntimeError if a part of `model` is prepacked; ``what`` names the call that is refused."""
    if any(hasattr(module, "_prepacked") for module in model.modules()):
        raise _refusal(what)


def without(cls: Any, mark: str) -> Any:
    """`cls` without the classes made here, whose attribute ``mark`` is the class they were made of; also where a
    parametrization or FSDP has made another one on top."""
    if mark in vars(cls):
        return vars(cls)[mark]
    if not hasattr(cls, mark):
        return cls
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(without(base, mark) for base in cls.__bases__), own)


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(f"{what}: the model is prepacked, its weights are frozen; call vit_triton.unpack(model) first")


@functools.cache
def _refusing(cls: Any) -> Any:
    """The subclass of `cls` that refuses what changes weights."""

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise _refusal("train()")
        return super(prepacked, self).train(mode)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _refusal("a cast or move")

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _refusal("load_state_dict()")

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        raise _refusal("load_state_dict()")

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, arguments, *rest = super(prepacked, self).__reduce_ex__(max(int(protocol), 2))
        return _made, (make, *(cls if x is prepacked else x for x in arguments)), *rest

    def __deepcopy__(self: Any, memo: Any) -> Any:
        copied = super(prepacked, self).__deepcopy__(memo)
        copied.__class__ = cls
        return copied

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = [train, _apply, load_state_dict, _load_from_state_dict, __reduce_ex__]
    if hasattr(cls, "__deepcopy__"):  # parametrizations have one, which keeps the class
        methods.append(__deepcopy__)
    prepacked: Any = type(cls.__name__, (cls,), {**names, **{f.__name__: f for f in methods}, "_prepacked": cls})
    return prepacked


def _made(make: Callable[..., Any], *arguments: Any) -> Any:
    """The object itself, for pickle and deepcopy: pickle refuses ``copyreg.__newobj__`` with another class."""
    return make(*arguments)


def _release(entries: list[_Frozen]) -> None:
    """Of a module that is gone, or no longer prepacked."""
    for entry in entries:
        entry.holders -= 1
        if not entry.holders:
            _forget(entry)


def _forget(entry: _Frozen) -> None:
    if frozen.get(id(entry.tensor)) is entry:
        del frozen[id(entry.tensor)]
        for copy in entry.copies.values():
            frozen.pop(id(copy), None)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype


# --- what operators on a CPU read --------------------------------------------------------------------------


def check(args: Sequence[Any]) -> None:
    """Raise RuntimeError if an edit of a frozen parameter among the arguments of an operator shows."""
    for x in _tensors(args):
        entry = _entry(x)
        if entry is not None and entry.state != _state(entry.tensor):
            raise RuntimeError(
                f"the parameter {entry.name} was changed after vit_triton.prepack(model); call "
                "vit_triton.unpack(model), and vit_triton.prepack(model) again if the model is to stay frozen"
            )


def _entry(x: Tensor) -> _Frozen | None:
    """That of the frozen parameter that ``x`` is, or is a view of."""
    return frozen.get(id(x)) or frozen.get(id(x._base))


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list):
            yield from _tensors(x)


def panels(weight: Tensor) -> Tensor | None:
    """The panels of a frozen weight; None if it is not frozen or if its dtype is not read in panels."""
    entry = _entry(weight)
    if entry is None:
        return None
    from vit_triton.cpu.driver import dot_panel
    from vit_triton.kernels.linear.forward import pack_weight

    layout = dot_panel(weight.dtype)
    return None if layout is None else entry.copy(weight, layout, lambda x: pack_weight(x, *layout))


def in_image_order(weight: Tensor, image: Tensor, patch_size: tuple[int, int], patch_order: str) -> Tensor | None:
    """A frozen weight of a patch embedding with its columns in the order in which ``image`` lies in memory; None if the
    weight is not frozen."""
    entry = _entry(weight)
    if entry is None:
        return None
    from vit_triton.kernels.patch_embed.patches import patch_layout

    layout = patch_layout(image, patch_size, patch_order)
    return entry.copy(weight, layout.order, layout.from_weight)  # type: ignore[arg-type] # None only for None


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat(tensors)``; kept, and frozen, while gradients are off and all of them are frozen."""
    if not frozen or torch.is_grad_enabled() or not all(id(x) in frozen for x in tensors):
        return torch.cat(list(tensors))
    check(tensors)
    layout = "concatenated", *(frozen[id(x)] for x in tensors[1:])  # a parameter frozen anew has another entry
    whole = frozen[id(tensors[0])].copy(tensors[0], layout, lambda _: torch.cat([x.detach() for x in tensors]))
    if id(whole) not in frozen:
        frozen[id(whole)] = _Frozen(f"{frozen[id(tensors[0])].name} and others", whole)
    return whole
