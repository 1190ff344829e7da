"""Pickers: functions ``pick_*`` that return the tiles of a kernel as a frozen dataclass.

Tiles depend on sequence length, head size, width, dtype and target. What the bits of a result depend on, the order of
its sums and the matrix instruction, does not depend on the batch, so the result of a sample is the same in every batch.
The tiles of 16-bit products and of attention depend on the number of rows where few rows would not fill the GPU
(:func:`.linear.config.for_rows`, :func:`.attention.config.for_heads`). The pickers of each family of kernels are in its
``config.py``.

The tiles for GPUs (sm_*, gfx*) are computed from registers, shared memory and instructions; they are not measured. Each
picker declares candidates. ``vit-triton tune`` measures them and writes a table (:mod:`.tuned`), which takes precedence
over the tiles chosen here on the device it was measured on.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

# the interpreter's cost is per operation, not per element; 2**20 elements is Triton's limit
INTERPRETER_TILE = 2**20


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv is slow outside of kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def time_of(programs: int, multiprocessors: int, times: tuple[float, ...]) -> float:
    """The time of ``programs``; ``times``: of 1, 2, ... per multiprocessor, beyond which it is proportional."""
    each = cdiv(programs, multiprocessors)
    return times[each - 1] if each <= len(times) else each * times[-1] / len(times)


def clip(tile: int, size: int) -> int:
    """``tile``, or the smallest power of two of at least 16 that covers ``size``, if that is smaller."""
    return min(tile, max(16, next_power_of_2(size)))


class CompilerOptions:
    """Mixin for configurations of kernels with tl.dot: compiler options. ``max_registers`` limits the registers per
    thread; 255 is no limit."""

    num_warps: int
    num_stages: int
    max_registers: int

    @property
    def options(self) -> dict[str, int]:
        """Compiler options, as keyword arguments of a launch."""
        limit = {"maxnreg": self.max_registers} if self.max_registers < 255 else {}  # NVIDIA only
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, **limit)


@dataclass(frozen=True)
class Picker:
    """A ``pick_*`` function registered by :func:`tunable`. ``kinds``: configuration classes it may return; ``names``:
    its argument names; ``arguments``: types of the arguments in the key of a tuned table; ``others``: candidates
    besides the default."""

    name: str
    default: Callable[..., Any]
    kinds: tuple[type, ...]
    names: tuple[str, ...]
    arguments: dict[str, type]
    others: Callable[..., Iterable[Any]]

    def key(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The key of a call in :attr:`.target.Tuned.choices`."""
        return self.name, *(value for name, value in zip(self.names, args, strict=True) if name in self.arguments)

    def candidates(self, args: tuple[Any, ...]) -> list[Any]:
        """The default for these arguments, then the other candidates, without duplicates."""
        return list(dict.fromkeys([self.default(*args), *self.others(*args)]))


PICKERS: dict[str, Picker] = {}
Pick = TypeVar("Pick", bound=Callable[..., Any])


def tunable(
    *kinds: type, candidates: Callable[..., Iterable[Any]], adapt: Callable[..., Any] | None = None
) -> Callable[[Pick], Pick]:
    """Decorate a picker: return the tuned configuration of ``target`` if there is one, else the picker's, cached.

    ``candidates``: a function of the picker's arguments; ``vit-triton tune`` measures them and the picker's default.
    ``adapt``: a function of the undecorated picker, a tuned configuration and the picker's arguments -> the
    configuration to use.
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
            if chosen is None:
                return pick(*args)
            return chosen if adapt is None else adapt(pick, chosen, *args)

        @functools.wraps(pick)
        def choose(*args: Any) -> Any:
            return choice(*args) if _choose is None else _choose(PICKERS[picker.name], args)

        return choose  # type: ignore[return-value]

    return decorate


_choose: Callable[[Picker, tuple[Any, ...]], Any] | None = None


@contextlib.contextmanager
def override_choice(choose: Callable[[Picker, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Context manager for measurements: ``choose(picker, arguments)`` returns the configurations, in all threads."""
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before
