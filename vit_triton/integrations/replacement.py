"""Other people's models on the kernels, in place: :func:`accelerate` and :func:`restore`.

A module that is known gets a subclass of its class, made here, with a ``forward`` of its own; nothing in the module
changes, so parameters, buffers, hooks, names, state dict and ``isinstance`` stay, and so does an optimizer's hold on
the parameters. The new ``forward`` reads the module's parts at every call. Where it finds one that it does not know,
that was replaced, or that somebody watches, it calls the ``forward`` it stands in for.
"""

from __future__ import annotations

import functools
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vit_triton.backend import backend_name, check_backend_name, why_torch
from vit_triton.checks import check_module
from vit_triton.fallback import count, counter, for_a_graph, forget
from vit_triton.integrations import pytorch, timm, torchvision, vit_pytorch
from vit_triton.integrations.recipes import Recipe, Unknown, check_unwatched, recipe_of, resembles_known
from vit_triton.integrations.report import Entry, Report
from vit_triton.packing import refuse, without
from vit_triton.portable import is_portable

__all__ = ["accelerate", "restore"]

NOT_KNOWN = "no part of what is known here"
CHOICES = ("attention", "mlp", "layer_norm", "patch_embedding")


def _load_recipes() -> None:
    """Of every library that has been imported; one that is imported later adds its own at the next call."""
    for library in (pytorch, timm, torchvision, vit_pytorch):
        library.teach_all()
    if "transformers.modeling_utils" in sys.modules:  # it takes seconds to import
        from vit_triton.integrations import transformers

        transformers.teach_all()


@functools.cache
def _accelerated(cls: Any, recipe: Recipe, backend: str | None, strict: bool) -> Any:
    """The subclass of `cls` that computes by `recipe`."""
    known = cls.forward

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_portable():
            return cls.forward(self, *args, **kwargs)
        try:
            if cls.forward is not known:
                raise Unknown("the forward of its class was replaced")
            check_unwatched()
            x = recipe.find_input(args, kwargs)
            found = recipe.read(self)
            if found is None:
                raise Unknown(NOT_KNOWN)
            return recipe.compute(x, found, backend)
        except Unknown as unknown:
            if strict or not torch.compiler.is_compiling():
                _fall_back(self, unknown, strict)
        return cls.forward(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, (_, *arguments), *state = super(accelerated, self).__reduce_ex__(max(int(protocol), 2))
        return _new, (cls, (backend, strict), _names.get(self, ""), *arguments), *state

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    parts = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_replaced": cls}
    accelerated: Any = type(cls.__name__, (cls,), {**names, **parts})
    return accelerated


_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of accelerated modules, for messages


def _fall_back(module: nn.Module, reason: Unknown, strict: bool) -> None:
    """Before the library computes a call of `module`: count it, or raise if the model is to be strict."""
    if strict and not for_a_graph():
        name = _names.get(module)
        named = f"{name} ({type(module).__name__})" if name else f"the {type(module).__name__}"
        raise RuntimeError(
            f"{named} would fall back to its library's forward, and strict=True was given to accelerate: {reason}"
        )
    count(module, str(reason))


def _new(cls: Any, options: tuple[str | None, bool], name: str, *arguments: Any) -> nn.Module:
    """An empty accelerated module of `cls`, for pickle and deepcopy to fill; a plain one where it is not known."""
    _load_recipes()
    recipe = recipe_of(cls)
    module = cls.__new__(cls if recipe is None else _accelerated(cls, recipe, *options), *arguments)
    if recipe is not None:
        _names[module] = name
    return module


def accelerate(
    model: nn.Module,
    backend: str | None = "auto",
    *,
    attention: bool = True,
    mlp: bool = True,
    layer_norm: bool = True,
    patch_embedding: bool = True,
    strict: bool = False,
) -> Report:
    """Compute a model of timm, Hugging Face, torchvision or vit_pytorch with the functions of this package, in place.

    Only ``forward`` of modules that are known is replaced: patch embeddings, attention, MLPs, LayerNorms, and blocks as
    a whole, where residual, LayerScale and DropPath go into the matrix products. Parameters, buffers, names, hooks,
    state dict, ``isinstance``, deepcopy and pickle stay as they were, and an optimizer made before stays valid.
    Every call reads the module again and falls back to the library's own ``forward`` where the kernels cannot compute
    it: with a hook on an inner module, a replaced or wrapped part, an attention mask or a float64 input, and inside a
    transform of ``torch.func``. :meth:`Report.fallbacks` and :func:`vit_triton.fallbacks` count these calls; nothing is
    counted in ``torch.compile``. ``torch.jit.trace``, ONNX export and :class:`vit_triton.portable_operators` take the
    library's ``forward`` always and count nothing. Dropout draws other numbers than PyTorch's, at the same rate.

    Args:
        model: any module; what is not known in it is left alone.
        backend: "triton", "torch" or "auto", or None, as in :mod:`vit_triton.functional`.
        attention, mlp, layer_norm, patch_embedding: which to replace. Blocks need attention, mlp and layer_norm.
        strict: a call that would fall back raises RuntimeError, which names module and reason.

    Returns:
        What was replaced, and what was left and why; ``print`` shows a table. Where the model is on a GPU on which
        "auto" takes PyTorch, the reason comes first.

    Raises:
        TypeError: `model` is not a Module, or a choice is not a bool.
        ValueError: there is no such backend, or a tuned table is needed to choose one and is damaged.
        FileNotFoundError: that table is named by ``VIT_TRITON_TUNED`` and does not exist.
    """
    check_module("model", model)
    if backend is not None:
        check_backend_name(backend)
    chosen = dict(zip(CHOICES, (attention, mlp, layer_norm, patch_embedding), strict=True))
    for name, value in {**chosen, "strict": strict}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    refuse(model, "accelerate()")
    notes = _notes(model, backend)
    _load_recipes()
    restore(model)
    entries: list[Entry] = []
    accelerated: list[tuple[str, nn.Module, type[nn.Module]]] = []
    inside: tuple[str, ...] = ()  # of modules that are replaced
    for name, module in model.named_modules():
        kind: Any = type(module)
        recipe = recipe_of(kind)
        if recipe is None and name.startswith(inside):
            continue
        try:
            what = _what(module, recipe, chosen)
        except Unknown as reason:
            entries.append(Entry(name, kind.__name__, False, str(reason)))
            continue
        if what is not None and recipe is not None:
            accelerated.append((name, module, _accelerated(kind, recipe, backend, strict)))
            entries.append(Entry(name, kind.__name__, True, what))
            inside += (f"{name}." if name else "",)
    for name, module, cls in accelerated:
        module.__class__ = cls
        _names[module] = name
    replaced = [entry.name for entry in entries if entry.replaced]
    # what only holds replaced modules together says nothing
    return Report(
        tuple(
            entry
            for entry in entries
            if entry.what != NOT_KNOWN or not any(name.startswith(f"{entry.name}.".lstrip(".")) for name in replaced)
        ),
        notes,
        tuple((name, counter(module)) for name, module, _ in accelerated),
    )


def _notes(model: nn.Module, backend: str | None) -> tuple[str, ...]:
    """Why "auto" takes PyTorch on the GPUs of `model`."""
    if backend_name(backend) != "auto":
        return ()
    reasons = {device: why_torch(device) for device in dict.fromkeys(each.device for each in model.parameters())}
    return tuple(f'backend "auto" uses PyTorch on {device}: {why}' for device, why in reasons.items() if why)


def _what(module: nn.Module, recipe: Recipe | None, chosen: dict[str, bool]) -> str | None:
    """What of `module` is replaced; None if it is not one to say a word about; raises Unknown with the reason."""
    kind = type(module)
    if recipe is None:
        if resembles_known(kind):
            raise Unknown("its forward is not the one known here")
        if any(parameter is not None for parameter in module._parameters.values()):
            raise Unknown(NOT_KNOWN)
        return None
    if "forward" in vars(module):
        raise Unknown("its forward was replaced")
    if recipe.read(module) is None:
        return None
    off = [name for name in recipe.needs if not chosen[name]]
    if off:
        raise Unknown(f"{off[0]}=False")
    return ", ".join(recipe.needs).replace("_", " ")


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: every module gets its own class, and with it its own ``forward``, back.

    Returns:
        `model`.
    """
    check_module("model", model)
    refuse(model, "restore()")
    for module in model.modules():
        cls = without(type(module), "_replaced")
        if cls is not type(module):
            module.__class__ = cls
            _names.pop(module, None)
            forget(module)
    return model
