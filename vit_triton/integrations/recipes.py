"""What the file of a library is written with: recipes for its classes, and how they read the parts of a module.

A part that is not as it is known raises :class:`Unknown`, and the library's own ``forward`` computes that call.
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
    "Recipe",
    "Unknown",
    "check_unwatched",
    "kernel_input",
    "know",
    "only",
    "part",
    "plain_input",
    "recipe_of",
    "resembles_known",
    "sharded",
    "teach",
]


class Unknown(Exception):
    """Why a module, or what it was called with, cannot be computed here."""


def plain_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a call, if it is a tensor for the kernels and every other argument is None or False.

    Raises:
        Unknown: it is not.
    """
    values = (*args, *kwargs.values())
    for i, value in enumerate(values[1:], 1):
        if value is not None and value is not False:
            name = f"argument {i + 1}" if i < len(args) else list(kwargs)[i - len(args)]
            raise Unknown(f"called with {name}")
    return kernel_input(values[0] if values else None)


def kernel_input(x: Any) -> Tensor:
    """`x`, if the kernels take such a tensor: of a dtype of theirs, dense, not sharded, and no kind of its own.

    Raises:
        Unknown: they do not.
    """
    if type(x) is not Tensor and not isinstance(x, _KINDS):
        raise Unknown(f"its input is a {type(x).__name__}")
    if x.dtype not in KERNEL_DTYPES:
        raise Unknown(f"{x.dtype} input")
    if x.is_nested or x.layout is not torch.strided:
        raise Unknown("a nested or sparse input")
    if sharded(x):
        raise Unknown("a sharded input")
    return x


# nn.Buffer and nn.Parameter have no instances of their own class; FunctionalTensors come from torch.compile
_KINDS = (nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor)


def sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor, asked without importing them."""
    return hasattr(x, "to_local")


def check_unwatched() -> None:
    """Raise Unknown if a hook is called with every module, or a function is transformed in a way that no kernel has:
    those of torch.func, and forward mode."""
    if torch._C._are_functorch_transforms_active():
        raise Unknown("inside a transform of torch.func")
    if torch.autograd.forward_ad._current_level >= 0:
        raise Unknown("inside forward-mode differentiation")
    if nn.modules.module._has_any_global_hook():
        raise Unknown("a hook on every module")


class Recipe(NamedTuple):
    """How the modules of one class are computed here.

    Attributes:
        needs: which of accelerate's choices must be on.
        read: module -> what `compute` takes of it; raises :class:`Unknown`. None: not such a module, nothing to say.
        compute: (input, what was read, backend) -> what the module returns; raises :class:`Unknown`, too, before it
            draws a random number.
        find_input: (args, kwargs) -> the input; raises :class:`Unknown` where this call is for the module's own
            ``forward``.
    """

    needs: tuple[str, ...]
    read: Callable[[Any], Any]
    compute: Callable[[Tensor, Any, str | None], Any]
    find_input: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] = plain_input


_recipes: dict[type[nn.Module], Recipe] = {}
_forwards: dict[type[nn.Module], Any] = {}  # the forward of every class that is known, as it was when it was first seen


def know(*classes: type[nn.Module] | None) -> None:
    """Trust these classes to compute what they do today, unless somebody has replaced their forward already."""
    for cls in classes:
        if cls is None or _forwards.get(cls) is not None:
            continue
        home = next(base for base in cls.__mro__ if "forward" in vars(base))
        forward = vars(home)["forward"]
        named = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
        _forwards[cls] = forward if named == (home.__module__, f"{home.__qualname__}.forward") else None


def teach(cls: type[nn.Module] | None, recipe: Recipe) -> None:
    """Have modules of `cls` computed by `recipe`; nothing where a library has no such class."""
    if cls is not None:
        know(cls)
        _recipes[cls] = recipe


def recipe_of(cls: type[nn.Module]) -> Recipe | None:
    """The recipe for `cls`, or for the class whose forward it inherits, as the classes that FSDP makes do."""
    for base in cls.__mro__:
        if base in _recipes:
            return _recipes[base] if cls.forward is _forwards[base] else None
    return None


def resembles_known(cls: type[nn.Module]) -> bool:
    """Whether `cls` derives from a class that has a recipe."""
    return any(base in _recipes and base is not nn.Sequential for base in cls.__mro__)


# --- what the recipes ask of a module ----------------------------------------------------------------------


def intact(module: object, *classes: type[nn.Module] | None, unless: Callable[[Any], bool] | None = None) -> bool:
    """Whether `module` computes what one of the known `classes` computes, and nobody wraps it, nor watches it with a
    hook; a forward hook does not count if ``unless(hook)``."""
    kind: Any = type(module)
    for cls in classes:
        if cls is not None and isinstance(module, cls):
            if _forwards.get(cls) is getattr(kind, "_replaced", kind).forward:
                return "forward" not in module.__dict__ and not hooked(module, unless)
    return False


def hooked(module: nn.Module, unless: Callable[[Any], bool] | None = None) -> bool:
    """Whether a hook would be called with `module`, other than forward hooks of which ``unless(hook)``."""
    forward_hooks: Any = module._forward_hooks
    if forward_hooks and unless is not None:
        forward_hooks = not all(map(unless, forward_hooks.values()))
    return bool(forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def part(
    module: nn.Module, name: str, *classes: type[nn.Module] | None, unless: Callable[[Any], bool] | None = None
) -> Any:
    """The submodule of that name, if it is intact and of one of `classes`; ``unless`` as of :func:`intact`.

    Raises:
        Unknown: it is not.
    """
    child = module._modules.get(name)
    if intact(child, *classes, unless=unless):
        return child
    raise Unknown(f"{name}: {why_not_intact(child, classes)}")


def why_not_intact(module: object, classes: Iterable[type[nn.Module] | None]) -> str:
    if not isinstance(module, nn.Module):
        return "is missing"
    if hooked(module):
        return "has hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    if any(cls is not None and isinstance(module, cls) for cls in classes):
        return f"{type(module).__name__} has a forward of its own"
    return f"a {type(module).__name__} is not known here"


def only(module: nn.Module, *names: str) -> None:
    """Raise Unknown if `module` has submodules or parameters besides these: then it is of a version not known here."""
    here = [name for mapping in (module._modules, module._parameters) for name, x in mapping.items() if x is not None]
    for name in here:
        if name not in names and name != "parametrizations":
            raise Unknown(f"has a part that is not known here, {name}")
