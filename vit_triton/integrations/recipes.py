"""Recipes, which compute the modules of a library with the kernels, and the checks that recipes share.

A check that fails raises :class:`UnsupportedModule`; the call then falls back to the library's ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from vit_triton.checks import KERNEL_DTYPES

__all__ = [
    "Container",
    "Recipe",
    "UnsupportedModule",
    "accelerated_class",
    "check_call_context",
    "kernel_input",
    "trust",
    "check_members",
    "check_methods",
    "container_for",
    "has_hooks",
    "submodule",
    "plain_input",
    "recipe_for",
    "derives_from_registered",
    "is_sharded",
    "register",
    "register_container",
]


class UnsupportedModule(Exception):
    """A module or its input is not supported; the message gives the reason."""


def plain_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first argument of a call.

    Raises:
        UnsupportedModule: The kernels do not support the tensor, or another argument is neither None nor False.
    """
    values = (*args, *kwargs.values())
    for i, value in enumerate(values[1:], 1):
        if value is not None and value is not False:
            name = f"argument {i + 1}" if i < len(args) else list(kwargs)[i - len(args)]
            raise UnsupportedModule(f"called with {name}")
    return kernel_input(values[0] if values else None)


def kernel_input(x: Any, *also: torch.dtype) -> Tensor:
    """Return `x` if the kernels support it; ``also``: other dtypes that are supported.

    Raises:
        UnsupportedModule: `x` has another dtype, is nested, sparse or sharded, or is a tensor subclass.
    """
    if type(x) is not Tensor and not isinstance(x, _TENSOR_TYPES):
        raise UnsupportedModule(f"input is a {type(x).__name__}")
    if x.dtype not in (*KERNEL_DTYPES, *also):
        raise UnsupportedModule(f"{x.dtype} input")
    if x.is_nested or x.layout is not torch.strided:
        raise UnsupportedModule("nested or sparse input")
    if is_sharded(x):
        raise UnsupportedModule("sharded input")
    return x


# isinstance, since nn.Buffer and nn.Parameter override it; torch.compile passes FunctionalTensors
_TENSOR_TYPES = (nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor)


def is_sharded(x: Tensor) -> bool:
    """Return whether `x` is a DTensor, without importing ``torch.distributed.tensor``."""
    return hasattr(x, "to_local")


def check_call_context() -> None:
    """Raise UnsupportedModule inside torch.func transforms, in forward-mode differentiation and with global hooks."""
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedModule("torch.func transform")
    if torch.autograd.forward_ad._current_level >= 0:
        raise UnsupportedModule("forward-mode differentiation")
    if nn.modules.module._has_any_global_hook():
        raise UnsupportedModule("global module hook")


class Recipe(NamedTuple):
    """The functions that compute modules of one class. All of them may raise :class:`UnsupportedModule`.

    Attributes:
        needs: options of :func:`accelerate` that must be enabled.
        read: module -> parts, the weights and options that `compute` uses. None excludes the module from the report.
        compute: (input, parts, backend) -> output. It raises before it draws a random number.
        find_input: (args, kwargs) -> input, a tensor or a :class:`.parts.AttentionInput`.
    """

    needs: tuple[str, ...]
    read: Callable[[Any], Any]
    compute: Callable[[Any, Any, str | None], Any]
    find_input: Callable[[tuple[Any, ...], dict[str, Any]], Any] = plain_input


class Container(NamedTuple):
    """How modules of one class make the blocks inside them run as one operator, see :mod:`.encoder`.

    Attributes:
        detail: the effect, for the report.
        holds: module -> whether it has accelerated blocks.
        run: (original ``forward`` of the module, module, backend, args, kwargs) -> output. Unlike a recipe, it runs the
            blocks one by one where they cannot be fused.
        members: other attributes of the generated class.
    """

    detail: str
    holds: Callable[[Any], bool]
    run: Callable[[Callable[..., Any], Any, str | None, tuple[Any, ...], dict[str, Any]], Any]
    members: dict[str, Any] = {}


_recipes: dict[type[nn.Module], Recipe] = {}
_containers: dict[type[nn.Module], Container] = {}
_methods: dict[tuple[type[nn.Module], str], Any] = {}
_forwards: dict[type[nn.Module], Any] = {}  # class -> the forward it had when it was trusted, None if replaced by then


def trust(*classes: type[nn.Module] | None) -> None:
    """Record the current ``forward`` of these classes as the one that recipes implement.

    A class whose ``forward`` has already been replaced is not trusted; None is ignored.
    """
    for cls in classes:
        if cls is None or _forwards.get(cls) is not None:
            continue
        _forwards[cls] = _own_method(next(base for base in cls.__mro__ if "forward" in vars(base)), "forward")


def _own_method(cls: type[nn.Module], name: str) -> Any:
    """Return the method that the file of `cls` defines, or None if it was replaced."""
    method = vars(cls).get(name)
    named = getattr(method, "__module__", None), getattr(method, "__qualname__", None)
    return method if named == (cls.__module__, f"{cls.__qualname__}.{name}") else None


def register(cls: type[nn.Module] | None, recipe: Recipe) -> None:
    """Trust `cls` and register `recipe` for it; None is ignored."""
    if cls is not None:
        trust(cls)
        _recipes[cls] = recipe


def register_container(cls: type[nn.Module] | None, container: Container, *methods: str) -> None:
    """Trust `cls`, and its `methods` for :func:`check_methods`, and register `container` for it; None is ignored."""
    if cls is not None:
        trust(cls)
        _containers[cls] = container
        for name in methods:
            _methods.setdefault((cls, name), _own_method(cls, name))


def recipe_for(cls: type[nn.Module]) -> Recipe | None:
    """Return the recipe for `cls` or for the base class whose ``forward`` it inherits, as FSDP's classes do."""
    return _registered(cls, _recipes)


def container_for(cls: type[nn.Module]) -> Container | None:
    """Return the container for `cls` or for the base class whose ``forward`` it inherits."""
    return _registered(cls, _containers)


def _registered(cls: Any, registry: dict[type[nn.Module], Any]) -> Any:
    for base in cls.__mro__:
        if base in registry:
            return registry[base] if cls.forward is _forwards[base] else None
    return None


def accelerated_class(module: nn.Module) -> Any:
    """Return the generated class of an accelerated module, whose ``_replaced`` is the original class; else None."""
    cls = vars(type(module)).get("_prepacked", type(module))
    return cls if "_replaced" in vars(cls) else None


def derives_from_registered(cls: type[nn.Module]) -> bool:
    """Return whether `cls` derives from a class that has a recipe."""
    return any(base in _recipes and base is not nn.Sequential for base in cls.__mro__)


# --- checks of modules -------------------------------------------------------------------------------------


def is_unmodified(
    module: object, *classes: type[nn.Module] | None, unless: Callable[[Any], bool] | None = None
) -> bool:
    """Return whether `module` has the trusted ``forward`` of one of `classes` and no hooks.

    Forward hooks for which ``unless(hook)`` is true are ignored.
    """
    kind: Any = type(module)
    for cls in classes:
        if cls is not None and isinstance(module, cls):
            if _forwards.get(cls) is getattr(kind, "_replaced", kind).forward:
                return "forward" not in module.__dict__ and not has_hooks(module, unless)
    return False


def has_hooks(module: nn.Module, unless: Callable[[Any], bool] | None = None) -> bool:
    """Return whether `module` has hooks, except forward hooks for which ``unless(hook)`` is true."""
    forward_hooks: Any = module._forward_hooks
    if forward_hooks and unless is not None:
        forward_hooks = not all(map(unless, forward_hooks.values()))
    return bool(forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def submodule(
    module: nn.Module, name: str, *classes: type[nn.Module] | None, unless: Callable[[Any], bool] | None = None
) -> Any:
    """Return the submodule called `name`.

    Raises:
        UnsupportedModule: The submodule fails :func:`is_unmodified`.
    """
    child = module._modules.get(name)
    if is_unmodified(child, *classes, unless=unless):
        return child
    raise UnsupportedModule(f"{name}: {why_modified(child, classes)}")


def check_methods(module: nn.Module, cls: type[nn.Module], *names: str) -> None:
    """Raise UnsupportedModule unless `module` has the methods of `cls`, as they were when `cls` was registered."""
    for name in names:
        if getattr(type(module), name) is not _methods[cls, name] or name in vars(module):
            raise UnsupportedModule(f"{name} was replaced")


def why_modified(module: object, classes: Iterable[type[nn.Module] | None]) -> str:
    """Return the reason why :func:`is_unmodified` is false."""
    if not isinstance(module, nn.Module):
        return "missing"
    if has_hooks(module):
        return "has hooks"
    if "forward" in vars(module):
        return "forward was replaced"
    if any(cls is not None and isinstance(module, cls) for cls in classes):
        return f"{type(module).__name__} overrides forward"
    return f"{type(module).__name__} is not supported"


def check_members(module: nn.Module, *names: str) -> None:
    """Raise UnsupportedModule if `module` has other submodules or parameters, as another version of its library may."""
    for name, member in {**module._modules, **module._parameters}.items():
        if member is not None and name not in names and name != "parametrizations":
            raise UnsupportedModule(f"unexpected submodule or parameter {name}")
