"""Run models of other libraries on the kernels, in place: :func:`accelerate` and :func:`restore`.

The class of each supported module is replaced with a generated subclass that overrides ``forward``. The module itself
does not change: parameters, buffers, hooks, names, state dict, ``isinstance`` and existing optimizers stay valid. The
new ``forward`` reads the submodules on every call. If one is unsupported, replaced or hooked, it calls the original
``forward``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vit_triton.backend import backend_name, check_backend_name, torch_reason
from vit_triton.checks import check_module
from vit_triton.fallback import clear_fallbacks, count_fallback, fallback_counter, is_capturing
from vit_triton.integrations import pytorch, timm, timm_relative, torchvision, vit_pytorch
from vit_triton.integrations.recipes import (
    Container,
    Recipe,
    UnsupportedModule,
    check_call_context,
    container_for,
    derives_from_registered,
    recipe_for,
)
from vit_triton.integrations.report import Entry, Report
from vit_triton.modules import may_fuse_blocks
from vit_triton.packing import raise_if_prepacked, without_mark
from vit_triton.portable import is_portable
from vit_triton.recording import Recorder, active_recorder

__all__ = ["accelerate", "restore"]

NOT_SUPPORTED = "not supported"
OWN = "runs on the kernels already; its attribute backend selects them"
CHOICES = ("attention", "mlp", "layer_norm", "patch_embedding")


def _load_recipes() -> None:
    """Register the recipes for every library that has been imported."""
    for library in (pytorch, timm, timm_relative, torchvision, vit_pytorch):
        library.register_all()
    if "transformers.modeling_utils" in sys.modules:  # importing it takes seconds
        from vit_triton.integrations import transformers, transformers_relative, transformers_swin

        for files in (transformers, transformers_relative, transformers_swin):
            files.register_all()


@functools.cache
def _accelerated(cls: Any, recipe: Recipe, backend: str | None, strict: bool) -> Any:
    """Return the subclass of `cls` that computes `recipe`."""
    trusted = cls.forward

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_portable():
            return cls.forward(self, *args, **kwargs)
        try:
            if cls.forward is not trusted:
                raise UnsupportedModule("forward of the class was replaced")
            check_call_context()
            x = recipe.find_input(args, kwargs)
            parts = recipe.read(self)
            if parts is None:
                raise UnsupportedModule(NOT_SUPPORTED)
            return recipe.compute(x, parts, backend)
        except UnsupportedModule as reason:
            if strict or not torch.compiler.is_compiling():
                _record_fallback(self, reason, strict)
            recorder = active_recorder() if "attention" in recipe.needs else None
            if recorder is not None:
                return _call_recorded(recorder, functools.partial(cls.forward, self, *args, **kwargs), self, reason)
        return cls.forward(self, *args, **kwargs)

    return _subclass(cls, forward, backend, (_unpickle, (backend, strict)))


def _call_recorded(recorder: Recorder, forward: Callable[[], Any], module: nn.Module, reason: UnsupportedModule) -> Any:
    """Call the original ``forward``; raise ValueError if the recorder of attention_maps did not receive its attention,
    since the maps would lack a layer."""
    before = len(recorder.maps)
    result = forward()
    if len(recorder.maps) == before:
        name = _module_names.get(module) or type(module).__name__
        raise ValueError(f"attention_maps does not see the attention of {name}, which runs on its library: {reason}")
    return result


@functools.cache
def _containing(cls: Any, backend: str | None) -> Any:
    """Return the subclass of `cls`, which has a container, that runs the blocks inside as one operator in inference."""
    container, trusted = cast(Container, container_for(cls)), cls.forward

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_portable() or not may_fuse_blocks() or cls.forward is not trusted:
            return cls.forward(self, *args, **kwargs)
        return container.run(functools.partial(cls.forward, self), self, backend, args, kwargs)

    return _subclass(cls, forward, backend, (_unpickle_container, backend), **container.members)


def _subclass(
    cls: Any, forward: Callable[..., Any], backend: str | None, unpickle: tuple[Callable[..., Any], Any], **members: Any
) -> Any:
    """Return a subclass of `cls` with another ``forward``; ``unpickle`` are a function and its second argument."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, (_, *arguments), *state = super(accelerated, self).__reduce_ex__(max(int(protocol), 2))
        return unpickle[0], (cls, unpickle[1], _module_names.get(self, ""), *arguments), *state

    def __prepare_scriptable__(self: Any) -> Any:  # called by torch.jit.script
        raise RuntimeError("torch.jit.script does not support an accelerated model; call vit_triton.restore(model)")

    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members |= {"__prepare_scriptable__": __prepare_scriptable__}
    members |= {"forward": forward, "__reduce_ex__": __reduce_ex__, "_replaced": cls, "_replaced_backend": backend}
    accelerated: Any = type(cls.__name__, (cls,), members)
    return accelerated


_module_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # accelerated modules -> name, for messages


def _record_fallback(module: nn.Module, reason: UnsupportedModule, strict: bool) -> None:
    """Count a call that falls back to the library's ``forward``; raise RuntimeError if `strict`."""
    if strict and not is_capturing():
        name = _module_names.get(module)
        named = f"{name} ({type(module).__name__})" if name else f"the {type(module).__name__}"
        raise RuntimeError(f"{named} would fall back to its original forward, but strict=True: {reason}")
    count_fallback(module, str(reason))


def _unpickle(cls: Any, options: tuple[str | None, bool], name: str, *arguments: Any) -> nn.Module:
    """Create an empty accelerated module for pickle and deepcopy, or an unaccelerated one if `cls` has no recipe."""
    _load_recipes()
    recipe = recipe_for(cls)
    module = cls.__new__(cls if recipe is None else _accelerated(cls, recipe, *options), *arguments)
    if recipe is not None:
        _module_names[module] = name
    return module


def _unpickle_container(cls: Any, backend: str | None, name: str, *arguments: Any) -> nn.Module:
    """Create an empty accelerated container for pickle and deepcopy."""
    _load_recipes()
    supported = container_for(cls) is not None
    return cast(nn.Module, cls.__new__(_containing(cls, backend) if supported else cls, *arguments))


def accelerate(
    model: nn.Module,
    backend: str | None = None,
    *,
    attention: bool = True,
    mlp: bool = True,
    layer_norm: bool = True,
    patch_embedding: bool = True,
    strict: bool = False,
) -> Report:
    """Run a timm, Hugging Face, torchvision or vit_pytorch model on the kernels, in place.

    Replaces ``forward`` of patch embeddings, attention, MLPs, LayerNorms and whole blocks. In a block, the residual,
    LayerScale and stochastic depth are part of the GEMM epilogue. In inference, consecutive blocks are one operator,
    and the last block computes only the class token if the model's head reads nothing else. Parameters, buffers,
    names, hooks, state dict, ``isinstance``, deepcopy, pickle and existing optimizers are unaffected.

    A call falls back to the original ``forward`` if the kernels do not support it: an inner module has a hook or was
    replaced or wrapped, a mask does not fit, the input is float64, or a ``torch.func`` transform is active.
    :meth:`Report.fallbacks` and :func:`vit_triton.fallbacks` count these calls, except under ``torch.compile``.
    ``torch.jit.trace``, ONNX export and :class:`vit_triton.portable_operators` always use the original ``forward``,
    uncounted. Dropout has the same rate as in PyTorch but draws other random numbers.

    Args:
        model: any module. Unsupported modules are left unchanged and listed in the report.
        backend: "triton", "torch" or "auto"; None is the default backend, see :class:`vit_triton.use_backend`.
        attention, mlp, layer_norm, patch_embedding: modules to replace. Blocks require attention, mlp and layer_norm.
        strict: raise RuntimeError with module and reason instead of falling back.

    Returns:
        The modules that were replaced, and the others with the reason; ``print`` shows a table. If "auto" selects
        PyTorch on the model's GPU, the table starts with the reason.

    Raises:
        TypeError: `model` is not a Module, or an option is not a bool.
        ValueError: `backend` is not a backend, or the tuned table that selects one is damaged.
        FileNotFoundError: ``VIT_TRITON_TUNED`` names a table that does not exist.
    """
    check_module("model", model)
    if backend is not None:
        check_backend_name(backend)
    chosen = dict(zip(CHOICES, (attention, mlp, layer_norm, patch_embedding), strict=True))
    for name, value in {**chosen, "strict": strict}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    raise_if_prepacked(model, "accelerate()")
    notes = _auto_notes(model, backend)
    _load_recipes()
    restore(model)
    entries: list[Entry] = []
    accelerated: list[tuple[str, nn.Module, type[nn.Module]]] = []
    inside: tuple[str, ...] = ()  # name prefixes of replaced modules
    own: dict[str, bool] = {}  # by name: whether the module belongs to one of this package's modules
    for name, module in model.named_modules():
        kind: Any = type(module)
        in_own = own.get(name.rpartition(".")[0], False)
        own[name] = _is_own(module) or (in_own and kind.__module__.startswith(("torch.nn.", "vit_triton.")))
        if own[name]:
            entries += [] if in_own else [Entry(name, kind.__name__, False, OWN)]
            continue
        recipe = recipe_for(kind)
        if recipe is None and name.startswith(inside):
            continue
        try:
            parts = _replaced_parts(module, recipe, chosen)
        except UnsupportedModule as reason:
            entries.append(Entry(name, kind.__name__, False, str(reason)))
            continue
        if parts is not None and recipe is not None:
            accelerated.append((name, module, _accelerated(kind, recipe, backend, strict)))
            entries.append(Entry(name, kind.__name__, True, parts))
            inside += (f"{name}." if name else "",)
    for name, module, cls in accelerated:
        module.__class__ = cls
        _module_names[module] = name
    entries += _replace_containers(model, backend)
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}
    entries.sort(key=lambda entry: places[entry.name])
    replaced = [entry.name for entry in entries if entry.replaced]
    # containers of replaced modules are not listed
    return Report(
        tuple(
            entry
            for entry in entries
            if entry.detail != NOT_SUPPORTED
            or not any(name.startswith(f"{entry.name}.".lstrip(".")) for name in replaced)
        ),
        notes,
        tuple((name, fallback_counter(module)) for name, module, _ in accelerated),
    )


def _is_own(module: nn.Module) -> bool:
    """Return whether a module is one of this package's that has a backend."""
    ours = any(base.__module__.startswith("vit_triton.") for base in type(module).__mro__)
    return ours and hasattr(module, "backend")


def _replace_containers(model: nn.Module, backend: str | None) -> list[Entry]:
    """Replace the containers of accelerated blocks."""
    entries = []
    for name, module in reversed(list(model.named_modules())):  # children first: models require accelerated containers
        kind: Any = type(module)
        container = container_for(kind)
        if container is not None and "forward" not in vars(module) and container.holds(module):
            module.__class__ = _containing(kind, backend)
            entries.append(Entry(name, kind.__name__, True, container.detail))
    return entries


def _auto_notes(model: nn.Module, backend: str | None) -> tuple[str, ...]:
    """Return the reason why "auto" selects PyTorch for all operators, for each device of `model` where it does."""
    if backend_name(backend) != "auto":
        return ()
    reasons = {device: torch_reason(device) for device in dict.fromkeys(each.device for each in model.parameters())}
    return tuple(f'backend "auto" selects PyTorch on {device}: {why}' for device, why in reasons.items() if why)


def _replaced_parts(module: nn.Module, recipe: Recipe | None, chosen: dict[str, bool]) -> str | None:
    """Return which parts of `module` are replaced, or None if the report does not list it.

    Raises:
        UnsupportedModule: The module is not replaced.
    """
    kind = type(module)
    if recipe is None:
        if derives_from_registered(kind):
            raise UnsupportedModule("overrides forward")
        if any(parameter is not None for parameter in module._parameters.values()):
            raise UnsupportedModule(NOT_SUPPORTED)
        return None
    if "forward" in vars(module):
        raise UnsupportedModule("forward was replaced")
    if recipe.read(module) is None:
        return None
    off = [name for name in recipe.needs if not chosen[name]]
    if off:
        raise UnsupportedModule(f"{off[0]}=False")
    return ", ".join(recipe.needs).replace("_", " ")


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: restore the class of every module, and with it the original ``forward``.

    Returns:
        `model`.
    """
    check_module("model", model)
    raise_if_prepacked(model, "restore()")
    for module in model.modules():
        cls = without_mark(type(module), "_replaced")
        if cls is not type(module):
            module.__class__ = cls
            _module_names.pop(module, None)
            clear_fallbacks(module)
    return model
