"""Prepacked models, whose weights are packed once for the GEMMs of the CPU target.

A GEMM on the CPU reads its weight in panels (:func:`.kernels.linear.pack.pack_weight`), and a patch embedding reads
its weight with the columns in the memory order of the image. By default every call packs the weights, so that it uses
the current values of the parameters. :func:`prepack` caches the packed copies.
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


class _PrepackedParameter:
    """A parameter of a prepacked model, its state when it was prepacked, and its packed copies.

    Holds a reference to the parameter, so that its id stays unique. ``torch.utils.swap_tensors`` does not support
    parameters with weak references.
    """

    __slots__ = ("copies", "num_modules", "name", "state", "tensor")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor, self.state = name, tensor, _state(tensor)
        self.num_modules = 0  # number of modules with the parameter
        self.copies: dict[object, Tensor] = {}

    def copy(self, x: Tensor, layout: object, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the cached ``make(x)``, where x is the parameter or a view of it."""
        key = layout, x.shape, x.stride(), x.storage_offset()
        if key not in self.copies:
            with torch.no_grad(), torch.inference_mode(False):  # inference tensors cannot be saved for backward
                self.copies[key] = make(x.detach())
        return self.copies[key]


frozen: dict[int, _PrepackedParameter] = {}  # by the id of the parameter
_finalizers: weakref.WeakKeyDictionary[nn.Module, weakref.finalize[..., Any]] = weakref.WeakKeyDictionary()


def prepack(model: nn.Module) -> nn.Module:
    """Freeze a model for inference on a CPU: its weights are packed on first use and cached.

    Without prepack, every call packs the weights. The cached copies take at most as much memory as the weights.

    Linear layers in float32 on Intel CPUs use PyTorch's GEMM, for which nothing is packed.

    **Do not edit a prepacked model.** Writes that change neither the address nor the version counter of a parameter
    (``p.data[0] = 0``, ``p.detach().numpy()[0] = 0``, a fused optimizer, another process) are not detected, and have no
    effect where a packed copy is used. Other writes make the next kernel that reads the parameter raise RuntimeError;
    an operation that runs on PyTorch uses the new values. To change a weight, call :func:`unpack`, edit it, and call
    ``prepack`` again.

    Backend "torch", autocast, ``torch.compile`` and GPUs use the parameters directly. Copies made by ``deepcopy`` or
    ``pickle`` are not prepacked.

    Args:
        model: a model of this package or an accelerated model, in evaluation mode. Changed in place. A prepacked model
            is prepacked again with the current values of its parameters.

    Returns:
        `model`. Until :func:`unpack`, ``train()``, ``load_state_dict``, :func:`vit_triton.load_weights`, ``to()`` and
        other casts or moves of parameters raise RuntimeError.

    Raises:
        TypeError: `model` is not a Module.
        ValueError: A module of `model` is in training mode.
    """
    unpack(model)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        which = f"{training[0]!r} of model" if training[0] else "model"
        raise ValueError(f"model must be in evaluation mode, but {which} is in training mode: call model.eval() first")
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            cls: Any = type(module)
            module.__class__ = _prepacked_class(cls)
        entries = []
        for part, parameter in module._parameters.items():
            if parameter is not None:
                entry = frozen.setdefault(id(parameter), _PrepackedParameter(f"{name}.{part}".lstrip("."), parameter))
                entry.num_modules += 1
                entries.append(entry)
        _finalizers[module] = weakref.finalize(module, _release, entries)
        _finalizers[module].atexit = False
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Undo :func:`prepack`. A model that is not prepacked is not changed.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Module.
    """
    check_module("model", model)
    for module in model.modules():
        cls: Any = type(module)
        if hasattr(cls, "_prepacked"):
            module.__class__ = without_mark(cls, "_prepacked")
        if module in _finalizers:
            _finalizers.pop(module)()  # also releases parameters that were removed from the module
        for parameter in module._parameters.values():
            if id(parameter) in frozen:
                _remove_entry(frozen[id(parameter)])
    return model


def raise_if_prepacked(model: nn.Module, what: str) -> None:
    """Raise RuntimeError if a module of `model` is prepacked; ``what`` names the call in the message."""
    if any(hasattr(module, "_prepacked") for module in model.modules()):
        raise _prepacked_error(what)


def without_mark(cls: Any, mark: str) -> Any:
    """Return `cls` without generated subclasses, whose attribute ``mark`` is the original class.

    Classes that a parametrization or FSDP derives from a generated subclass are rebuilt on the original class.
    """
    if mark in vars(cls):
        return vars(cls)[mark]
    if not hasattr(cls, mark):
        return cls
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(without_mark(base, mark) for base in cls.__bases__), own)


def _prepacked_error(what: str) -> RuntimeError:
    return RuntimeError(f"{what} is not supported on a prepacked model; call vit_triton.unpack(model) first")


@functools.cache
def _prepacked_class(cls: Any) -> Any:
    """Return the subclass of `cls` whose methods that change weights raise RuntimeError."""

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise _prepacked_error("train()")
        return super(prepacked, self).train(mode)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _prepacked_error("a cast or move")

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _prepacked_error("load_state_dict()")

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        raise _prepacked_error("load_state_dict()")

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, arguments, *rest = super(prepacked, self).__reduce_ex__(max(int(protocol), 2))
        return _build, (make, *(cls if x is prepacked else x for x in arguments)), *rest

    def __deepcopy__(self: Any, memo: Any) -> Any:
        copied = super(prepacked, self).__deepcopy__(memo)
        copied.__class__ = cls
        return copied

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = [train, _apply, load_state_dict, _load_from_state_dict, __reduce_ex__]
    if hasattr(cls, "__deepcopy__"):  # that of parametrizations keeps the class
        methods.append(__deepcopy__)
    prepacked: Any = type(cls.__name__, (cls,), {**names, **{f.__name__: f for f in methods}, "_prepacked": cls})
    return prepacked


def _build(make: Callable[..., Any], *arguments: Any) -> Any:
    """Create an object for pickle and deepcopy; pickle does not support ``copyreg.__newobj__`` with another class."""
    return make(*arguments)


def _release(entries: list[_PrepackedParameter]) -> None:
    """Release the parameters of a module that was deleted or unpacked."""
    for entry in entries:
        entry.num_modules -= 1
        if not entry.num_modules:
            _remove_entry(entry)


def _remove_entry(entry: _PrepackedParameter) -> None:
    if frozen.get(id(entry.tensor)) is entry:
        del frozen[id(entry.tensor)]
        for copy in entry.copies.values():
            frozen.pop(id(copy), None)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype


# --- packed weights for the operators ----------------------------------------------------------------------


def check(args: Sequence[Any]) -> None:
    """Raise RuntimeError if a prepacked parameter among the arguments of an operator was changed."""
    for x in _tensors(args):
        entry = _entry(x)
        if entry is not None and entry.state != _state(entry.tensor):
            raise RuntimeError(
                f"the parameter {entry.name} was changed after vit_triton.prepack(model); call "
                "vit_triton.unpack(model), then vit_triton.prepack(model) to pack the new weights"
            )


def is_packed(x: Tensor) -> bool:
    """Return whether ``x`` is a prepacked parameter or a view of one."""
    return bool(frozen) and _entry(x) is not None


def _entry(x: Tensor) -> _PrepackedParameter | None:
    """Return the entry of the prepacked parameter ``x``, or of the one it is a view of."""
    return frozen.get(id(x)) or frozen.get(id(x._base))


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list):
            yield from _tensors(x)


def _target() -> Any:
    """Return the :class:`.kernels.target.Target` of launches on CPU tensors, or None in the interpreter."""
    from vit_triton.cpu.driver import launch_driver
    from vit_triton.kernels.device import target_of_driver

    active = launch_driver()
    return None if active is None else target_of_driver(active)


def panels(weight: Tensor) -> Tensor | None:
    """Return the packed panels of a weight, or None if it is not prepacked or its dtype does not use panels."""
    entry = _entry(weight)
    if entry is None:
        return None
    from vit_triton.cpu.driver import use_cpu_driver
    from vit_triton.kernels.linear.pack import pack_weight

    target = _target()
    layout = None if target is None else target.panel(weight.dtype)
    if layout is None:
        return None

    def pack(x: Tensor) -> Tensor:
        with use_cpu_driver():  # not for a cached copy: with a GPU, it takes a lock
            return pack_weight(x, *layout)

    return entry.copy(weight, layout, pack)


def in_image_order(weight: Tensor, image: Tensor, patch_size: tuple[int, int], patch_order: str) -> Tensor | None:
    """Return the weight of a patch embedding with its columns in the memory order of ``image``, or None if it is not
    prepacked or read in its own order."""
    entry = _entry(weight)
    if entry is None:
        return None
    target = _target()
    if target is not None and target.prefers_vendor_gemm(weight.dtype):
        return None
    from vit_triton.kernels.patch_embed.patches import patch_layout

    layout = patch_layout(image, patch_size, patch_order)
    return entry.copy(weight, layout.order, layout.from_weight)  # type: ignore[arg-type] # None only for None


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``torch.cat(tensors)``, cached if gradients are disabled and all tensors are prepacked.

    ``torch.compile`` traces this function: it must not guard on `frozen`, which changes with other models.
    """
    cached = not torch.compiler.is_compiling() and bool(frozen) and not torch.is_grad_enabled()
    if not (cached and all(id(x) in frozen for x in tensors)):
        return torch.cat(list(tensors))
    check(tensors)
    layout = "concatenated", *(frozen[id(x)] for x in tensors[1:])  # another prepack creates another entry
    whole = frozen[id(tensors[0])].copy(tensors[0], layout, lambda _: torch.cat([x.detach() for x in tensors]))
    if id(whole) not in frozen:
        frozen[id(whole)] = _PrepackedParameter(f"{frozen[id(tensors[0])].name} and others", whole)
    return whole
