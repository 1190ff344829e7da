"""Consecutive blocks of accelerated models as one operator in inference, :func:`vit_triton.functional.encoder`.

The conditions are those of :class:`vit_triton.modules.Transformer`: no gradients, no ``torch.compile``, a backend that
selects the kernels, no active dropout, no hooks, no replaced modules. Other blocks run one by one, which is not a
fallback. Three kinds of modules are containers:

- :data:`SEQUENCE`: a Sequential that has blocks.
- :func:`iterating`: a module whose ``forward`` iterates over a ModuleList of blocks.
- :func:`reading_class_token`: a model whose head reads only the class token. The last block computes only this token.

The containers run the ``forward`` of their library. Context variables tell inner containers what outer ones read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.autocast import is_autocast_enabled
from vit_triton.backend import resolve_backend
from vit_triton.integrations.parts import (
    AttentionInput,
    BlockParts,
    check_tokens,
    compute_block,
    encoder_block,
    is_plain,
    rotary_options,
)
from vit_triton.integrations.recipes import (
    Container,
    Recipe,
    UnsupportedModule,
    accelerated_class,
    check_call_context,
    container_for,
    has_hooks,
    kernel_input,
    recipe_for,
)
from vit_triton.modules import may_fuse_blocks

__all__ = ["SEQUENCE", "iterating", "reading_class_token", "reads_class_token", "run_parts"]

_class_token_of: ContextVar[nn.Module | None] = ContextVar("class_token_of", default=None)
_iterating_over: ContextVar[nn.Module | None] = ContextVar("iterating_over", default=None)


@contextlib.contextmanager
def _set(variable: ContextVar[nn.Module | None], module: nn.Module | None) -> Iterator[None]:
    token = variable.set(module)
    try:
        yield
    finally:
        variable.reset(token)


def reads_class_token(module: nn.Module) -> bool:
    """Return whether the model that is running reads only the class token of the output of `module`."""
    return _class_token_of.get() is module


# --- running blocks ----------------------------------------------------------------------------------------


class Options(NamedTuple):
    """Arguments of :func:`vit_triton.functional.encoder` that all blocks of a call share."""

    heads: int
    scale: float
    activation: str
    rope_prefix: int = 0
    rope_layout: str = "half"


class Step(NamedTuple):
    """A block and its arguments. Blocks that are called with the same arguments have the same `rope`."""

    block: F.Block
    options: Options
    rope: F.Rope | None = None

    def continues(self, before: Step) -> bool:
        """Return whether one call may compute `before` and this block."""
        return self.options == before.options and self.block.qkv_weight.shape == before.block.qkv_weight.shape


def fuses(x: Any, backend: str | None) -> bool:
    """Return whether blocks on the tokens `x` may run as one operator."""
    if not may_fuse_blocks():
        return False
    try:
        check_call_context()
        check_tokens(kernel_input(x))
    except UnsupportedModule:
        return False
    return not is_autocast_enabled(x.device.type) and resolve_backend(backend, "encoder", x) == "triton"


def step_of(x: Tensor, parts: BlockParts, rope: F.Rope | None = None) -> Step | None:
    """Return a block as an argument of :func:`vit_triton.functional.encoder`, or None if that does not support it.

    Raises:
        UnsupportedModule: `rope` does not fit.
    """
    block = encoder_block(x, parts)
    if block is None:
        return None
    options = Options(parts.attention.heads, parts.attention.scale, parts.mlp.activation)
    if rope is not None:
        positions = rotary_options(x, parts.attention, rope)
        options = options._replace(rope_prefix=positions["rope_prefix"], rope_layout=positions["rope_layout"])
    return Step(block, options, rope)


def encode(x: Tensor, steps: list[Step], backend: str | None, first_token: bool) -> Tensor:
    blocks, rope = [step.block for step in steps], steps[0].rope
    first_token = first_token and rope is None
    return F.encoder(x, blocks, **steps[0].options._asdict(), rope=rope, first_token=first_token, backend=backend)


def run_parts(x: Tensor, blocks: list[BlockParts], backend: str | None, first_token: bool) -> Tensor:
    """Run blocks, as one operator if possible; the result may have only the first token if `first_token`."""
    if blocks and fuses(x, backend):
        steps = [step for block in blocks if (step := step_of(x, block)) is not None]
        if len(steps) == len(blocks) and all(step.continues(steps[0]) for step in steps):
            return encode(x, steps, backend, first_token)
    for block in blocks:
        x = compute_block(x, block, backend)
    return x


def run_modules(
    modules: Iterable[nn.Module],
    first_token: bool,
    backend: str | None,
    unless: Callable[[Any], bool] | None,
    x: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call modules in sequence, consecutive blocks as one operator where possible.

    Args:
        first_token: whether the result may have only the first token.
        unless: see :func:`.recipes.has_hooks`.
        x: tokens.
        args, kwargs: other arguments of every module.
    """
    run: list[Step] = []
    for module in modules:
        step = read_step(module, backend, unless, x, args, kwargs)
        if run and (step is None or not step.continues(run[0])):
            x, run = encode(x, run, backend, False), []
        if step is None:
            x = module(x, *args, **kwargs)
        else:
            run.append(step)
    return encode(x, run, backend, first_token) if run else x


def block_recipe(module: nn.Module) -> Recipe | None:
    """Return the recipe of an accelerated block, or None for other modules."""
    cls = accelerated_class(module)
    recipe = None if cls is None else recipe_for(cls._replaced)
    return recipe if recipe is not None and recipe.compute is compute_block else None


def read_step(
    module: nn.Module,
    backend: str | None,
    unless: Callable[[Any], bool] | None,
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Step | None:
    """Read an accelerated block as :func:`step_of` does, or return None if the module must run by itself."""
    recipe = block_recipe(module)
    if recipe is None or accelerated_class(module)._replaced_backend != backend:
        return None
    called_as_is = "forward" not in vars(module) and module._compiled_call_impl is None  # the latter: module.compile()
    if not called_as_is or has_hooks(module, unless) or not fuses(x, backend):
        return None
    try:
        given = recipe.find_input((x, *args), kwargs)
        if isinstance(given, AttentionInput) and given.mask is not None:
            return None
        return step_of(x, recipe.read(module), given.rope if isinstance(given, AttentionInput) else None)
    except UnsupportedModule:
        return None


# --- containers --------------------------------------------------------------------------------------------


def has_blocks(module: nn.Module | None) -> bool:
    """Return whether a Sequential or ModuleList has accelerated blocks that may be fused."""
    children = () if module is None else module.children()
    return any((recipe := block_recipe(child)) is not None and is_plain(recipe.read(child)) for child in children)


def run_sequence(
    original: Callable[..., Any], module: nn.Sequential, backend: str | None, args: tuple[Any, ...], kwargs: Any
) -> Any:
    if len(args) != 1 or kwargs:
        return original(*args, **kwargs)
    return run_modules(module, reads_class_token(module), backend, None, *args)


SEQUENCE = Container("one operator in inference", has_blocks, run_sequence)


def iterating(
    name: str,
    unless: Callable[[Any], bool] | None = None,
    supports: Callable[[Any], bool] = lambda module: True,
) -> Container:
    """Return the container for a class whose ``forward`` iterates over the ModuleList called `name`.

    During ``forward``, the first access to the attribute gives a list of one function that runs all blocks.

    Args:
        unless: see :func:`.recipes.has_hooks`.
        supports: module -> whether its ``forward`` calls all blocks with the same arguments.
    """

    def blocks(self: Any) -> Any:
        if name not in self._modules:
            raise AttributeError(name)
        modules = self._modules[name]
        in_forward = may_fuse_blocks() and _iterating_over.get() == self  # the context variable is not for Dynamo
        if not in_forward or not isinstance(modules, nn.ModuleList):
            return modules
        _iterating_over.set(None)
        return [functools.partial(run_modules, modules, reads_class_token(self), self._replaced_backend, unless)]

    def run(original: Callable[..., Any], module: Any, backend: str | None, args: Any, kwargs: Any) -> Any:
        with _set(_iterating_over, module if supports(module) else None):
            return original(*args, **kwargs)

    def holds(module: Any) -> bool:
        return supports(module) and has_blocks(module._modules.get(name))

    return Container(SEQUENCE.detail, holds, run, {name: property(blocks)})


def reading_class_token(find: Callable[[Any], nn.Module]) -> Container:
    """Return the container for a class of models whose head reads only the class token.

    Args:
        find: model -> the module of whose output the model reads only the class token. Raises UnsupportedModule if
            someone else could read another token.
    """

    def find_container(model: Any) -> nn.Module | None:
        try:
            return find(model)
        except UnsupportedModule:
            return None

    def holds(model: Any) -> bool:
        module = find_container(model)
        cls = None if module is None else accelerated_class(module)
        return cls is not None and (recipe_for(cls._replaced) or container_for(cls._replaced)) is not None

    def run(original: Callable[..., Any], model: Any, backend: str | None, args: Any, kwargs: Any) -> Any:
        with _set(_class_token_of, find_container(model)):
            return original(*args, **kwargs)

    return Container("class token only in inference", holds, run)
