"""The state that the passes of the lowering share: where values are, and what holds in the loops that are open.

Each pass is a module of functions that take this state first: :mod:`expressions`, :mod:`loops`, :mod:`stores`,
:mod:`reductions`, :mod:`dots`, :mod:`control`. They write MLIR through ``State.b``.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vit_triton.cpu.axes import Axes
from vit_triton.cpu.builder import Builder, Val
from vit_triton.cpu.demand import Demand
from vit_triton.cpu.masks import Condition, Masks
from vit_triton.cpu.memory import Buffer, Scratch
from vit_triton.cpu.sinks import Sinks
from vit_triton.cpu.ttir import Function, Op, Value, walk
from vit_triton.cpu.vmath import Math

LANES = 16  # elements of a vector, whatever their type


@dataclass(frozen=True)
class Position:
    """The element of a tile at ``index``, or the ``lanes`` elements from it on along ``axis``."""

    index: tuple[Val, ...] = ()
    axis: int | None = None
    lanes: int = 0

    @property
    def scalar(self) -> "Position":
        return Position(self.index)

    def moved(self, axis: int, index: Val) -> "Position":
        return replace(self, index=(*self.index[:axis], index, *self.index[axis + 1 :]))


SCALAR = Position()  # of what is no tile


@dataclass
class State:
    """The analyses of a kernel, the writer of MLIR, and what is known where it writes."""

    axes: Axes
    masks: Masks
    demand: Demand
    sinks: Sinks
    b: Builder
    math: Math
    bf16_dot: bool  # the CPU multiplies pairs of bfloat16
    scratch: Scratch
    scalars: dict[Value, Val] = field(default_factory=dict)
    buffers: dict[Value, Buffer] = field(default_factory=dict)
    offsets: dict[Value, Val] = field(default_factory=dict)  # of open loops' inductions, from their initial values
    defined: set[Value] = field(default_factory=set)
    deferred: list[Value] = field(default_factory=list)  # loaded tiles; each sink loads what it needs of them
    # conditions that hold at an index, by its name: in every lane (None) or in the lanes of a mask
    assumed: dict[tuple[Condition, str], Val | None] = field(default_factory=dict)
    fused: set[Op] = field(default_factory=set)  # reductions that were lowered with an earlier one
    generation: int = 0  # values of expressions are reused within one

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is defined and allocated inside is gone outside."""
        defined, used, deferred = set(self.defined), self.scratch.used, list(self.deferred)
        yield
        self.defined, self.scratch.used = defined, used
        self.deferred = [value for value in self.deferred if value in deferred]

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Reads of memory are not hoisted out of it, and their values are not reused inside and outside."""
        self.generation += 1
        with self.b.pinned_here():
            yield
        self.generation += 1

    @contextlib.contextmanager
    def assuming(self, conditions: Sequence[Condition], index: Val, mask: Val | None = None) -> Iterator[None]:
        """Inside, ``conditions`` hold at ``index``; with ``mask``, in its lanes only."""
        before = self.assumed
        self.assumed = before | {(condition, index.name): mask for condition in conditions}
        yield
        self.assumed = before

    def holds(self, condition: Condition, index: Val) -> bool:
        """Whether the open loops make it true in every lane."""
        key = (condition, index.name)
        return key in self.assumed and self.assumed[key] is None

    def origin(self, rank: int) -> tuple[Val, ...]:
        """The index of a tile's first element."""
        return (self.b.index(0),) * rank


def begin(function: Function, features: Sequence[str]) -> State:
    """The state before anything is written: the analyses of the kernel, the CPU it is compiled for."""
    ops = list(walk(function.body))
    axes = Axes(ops)
    masks = Masks(axes)
    b = Builder()
    return State(
        axes=axes,
        masks=masks,
        demand=Demand(ops, masks),
        sinks=Sinks(ops, axes, masks),
        b=b,
        math=Math(b, features),
        bf16_dot="avx512_bf16" in features,
        scratch=Scratch(b, Val("%scratch", "ptr")),
    )
