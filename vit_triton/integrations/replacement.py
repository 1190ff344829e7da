"""Other people's models on the kernels, in place: :func:`accelerate` and :func:`restore`.

A module that is known gets a subclass of its class, made here, with a ``forward`` of its own; nothing in the module
changes, so parameters, buffers, hooks, names, state dict and ``isinstance`` stay, and so does an optimizer's hold on
the parameters. The new ``forward`` reads the module's parts at every call. Where it finds one that it does not know,
that was replaced, or that somebody watches, it calls the ``forward`` it stands in for.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from vit_triton.backend import check_backend_name, is_portable
from vit_triton.checks import check_module
from vit_triton.fallback import count, counter, for_a_graph, forget
from vit_triton.functional import KERNEL_DTYPES
from vit_triton.packing import refuse, without

__all__ = ["Entry", "Recipe", "Report", "Unknown", "accelerate", "restore"]

NOT_KNOWN = "no part of what is known here"
CHOICES = ("attention", "mlp", "layer_norm", "patch_embedding")


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


def _load_recipes() -> None:
    from vit_triton.integrations import pytorch, timm, torchvision, vit_pytorch

    for library in (pytorch, timm, torchvision, vit_pytorch):
        library.teach_all()
    if "transformers.modeling_utils" in sys.modules:  # it takes seconds to import
        from vit_triton.integrations import transformers

        transformers.teach_all()


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


# --- replacing ---------------------------------------------------------------------------------------------


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
    recipe = _recipe_of(cls)
    module = cls.__new__(cls if recipe is None else _accelerated(cls, recipe, *options), *arguments)
    if recipe is not None:
        _names[module] = name
    return module


def _recipe_of(cls: type[nn.Module]) -> Recipe | None:
    """The recipe for `cls`, or for the class whose forward it inherits, as the classes that FSDP makes do."""
    for base in cls.__mro__:
        if base in _recipes:
            return _recipes[base] if cls.forward is _forwards[base] else None
    return None


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
        What was replaced, and what was left and why; ``print`` shows a table.

    Raises:
        TypeError: `model` is not a Module, or a choice is not a bool.
        ValueError: there is no such backend.
    """
    check_module("model", model)
    if backend is not None:
        check_backend_name(backend)
    chosen = dict(zip(CHOICES, (attention, mlp, layer_norm, patch_embedding), strict=True))
    for name, value in {**chosen, "strict": strict}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    refuse(model, "accelerate()")
    _load_recipes()
    restore(model)
    entries: list[Entry] = []
    accelerated: list[tuple[str, nn.Module, type[nn.Module]]] = []
    inside: tuple[str, ...] = ()  # of modules that are replaced
    for name, module in model.named_modules():
        kind: Any = type(module)
        recipe = _recipe_of(kind)
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
        tuple((name, counter(module)) for name, module, _ in accelerated),
    )


def _what(module: nn.Module, recipe: Recipe | None, chosen: dict[str, bool]) -> str | None:
    """What of `module` is replaced; None if it is not one to say a word about; raises Unknown with the reason."""
    kind = type(module)
    if recipe is None:
        if any(base in _recipes and base is not nn.Sequential for base in kind.__mro__):
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


# --- reporting ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        name: its name in the model, "" for the model itself.
        cls: the name of its class.
        replaced: whether its forward is.
        what: what of it is replaced, or the reason why nothing is.
    """

    name: str
    cls: str
    replaced: bool
    what: str


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did, module by module; ``str`` is a table with one line for modules of a kind."""

    entries: tuple[Entry, ...]
    _calls: tuple[tuple[str, Counter[str]], ...] = field(default=(), repr=False, compare=False)

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """For each module that the library has computed since, how many calls each reason had, as
        :func:`vit_triton.fallbacks` gives them. They end with the next :func:`accelerate` or :func:`restore`."""
        return {name: dict(calls) for name, calls in self._calls if calls}

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replaced)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.replaced)

    def __str__(self) -> str:
        return "\n".join("  ".join(cells).rstrip() for cells in self._aligned())

    def _aligned(self) -> Iterator[list[str]]:
        rows: Counter[tuple[str, ...]] = Counter()
        for entry in self.entries:
            done = "replaced" if entry.replaced else "left"
            rows[re.sub(r"\d+", "*", entry.name) or "(model)", entry.cls, done, entry.what] += 1
        table = [("module", "class", "", "", "what or why")]
        table += [(name, cls, f"{n} x", done, what) for (name, cls, done, what), n in rows.items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            yield [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
