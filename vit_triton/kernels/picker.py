"""Pickers: functions ``pick_*`` that choose the tiles of a kernel, frozen dataclasses, in plain Python.

A pick depends on sequence length, head size, width, dtype and target, never on the batch, so that the result of a
sample does not depend on its neighbours. The pickers of a family of kernels are in its ``config.py``.

The choices for GPUs (sm_*, gfx*) are computed only, from registers, shared memory and instructions: none was timed on
one. Each picker declares its candidates; ``vit-triton tune`` times them, and the table that it writes (:mod:`.tuned`)
takes precedence over the choices made here, on the device that it names.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

# the interpreter pays per operation, not per element: large tiles, up to Triton's limit of 2**20 elements
INTERPRETER_TILE = 2**20


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv outside of a kernel takes 4 microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def clip(tile: int, size: int) -> int:
    """``tile``, or where ``size`` is smaller the least power of two that covers it and that tl.dot takes."""
    return min(tile, max(16, next_power_of_2(size)))


class Compiled:
    """Mixed into configurations of products: a thread gets at most ``max_registers``, of which an NVIDIA GPU has
    255."""

    num_warps: int
    num_stages: int
    max_registers: int

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options, as a launch takes them."""
        limit = {"maxnreg": self.max_registers} if self.max_registers < 255 else {}  # an option of NVIDIA's compiler
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, **limit)


@dataclass(frozen=True)
class Picker:
    """A ``pick_*`` function as :func:`tunable` registered it: the ``kinds`` of configuration it may give, the ``names``
    of all of its arguments, the types of those ``arguments`` that a tuned choice depends on, and its ``others``."""

    name: str
    default: Callable[..., Any]
    kinds: tuple[type, ...]
    names: tuple[str, ...]
    arguments: dict[str, type]
    others: Callable[..., Iterable[Any]]

    def key(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of a call, in :attr:`.target.Tuned.choices`."""
        return self.name, *(value for name, value in zip(self.names, args, strict=True) if name in self.arguments)

    def candidates(self, args: tuple[Any, ...]) -> list[Any]:
        """The default for these arguments, then the other candidates, each once."""
        return list(dict.fromkeys([self.default(*args), *self.others(*args)]))


PICKERS: dict[str, Picker] = {}
Pick = TypeVar("Pick", bound=Callable[..., Any])


def tunable(*kinds: type, candidates: Callable[..., Iterable[Any]]) -> Callable[[Pick], Pick]:
    """Decorate a picker: it gives the tuned choice of ``target`` where there is one, else its own, and caches it.

    ``candidates``: a function of the picker's arguments; ``vit-triton tune`` times them beside the picker's own choice.
    """

    def decorate(pick: Pick) -> Pick:
        parameters = inspect.signature(pick).parameters
        names = tuple(parameters)
        arguments = {name: parameters[name].annotation for name in names if name not in ("m", "target")}
        picker = PICKERS[pick.__name__] = Picker(pick.__name__, pick, kinds, names, arguments, candidates)
        target = names.index("target")

        @functools.lru_cache(1024)
        def choice(*args: Any) -> Any:
            tuned = args[target].tuned
            chosen = None if tuned is None else tuned.choices.get(picker.key(args))
            return pick(*args) if chosen is None else chosen

        @functools.wraps(pick)
        def choose(*args: Any) -> Any:
            return choice(*args) if _choose is None else _choose(PICKERS[picker.name], args)

        return choose  # type: ignore[return-value]

    return decorate


_choose: Callable[[Picker, tuple[Any, ...]], Any] | None = None


@contextlib.contextmanager
def choosing(by: Callable[[Picker, tuple[Any, ...]], Any]) -> Iterator[None]:
    """A hook for measurements: inside it ``by(picker, arguments)`` gives the configurations, in all threads."""
    global _choose
    before, _choose = _choose, by
    try:
        yield
    finally:
        _choose = before
