"""The state shared by the passes of the lowering: locations of values, and conditions that hold in the open loops.

Each pass is a module of functions that take this state first: :mod:`expressions`, :mod:`loops`, :mod:`stores`,
:mod:`reductions`, :mod:`dots`, :mod:`control`. They write MLIR through ``State.b``.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vit_triton.cpu.axes import Axes
from vit_triton.cpu.builder import Builder, Val
from vit_triton.cpu.demand import Demand
from vit_triton.cpu.features import Block, multiplies_bf16, multiplies_tiles, register_block
from vit_triton.cpu.masks import Condition, Masks
from vit_triton.cpu.memory import Buffer, Scratch
from vit_triton.cpu.sinks import Sinks
from vit_triton.cpu.ttir import Function, Op, Value, walk
from vit_triton.cpu.vmath import Math

LANES = 16  # elements per vector, for all types


@dataclass(frozen=True)
class Position:
    """The element of a tile at ``index``, or ``lanes`` elements along ``axis`` starting there."""

    index: tuple[Val, ...] = ()
    axis: int | None = None
    lanes: int = 0

    @property
    def scalar(self) -> "Position":
        return Position(self.index)

    def with_index(self, axis: int, index: Val) -> "Position":
        return replace(self, index=(*self.index[:axis], index, *self.index[axis + 1 :]))


SCALAR = Position()  # the position of scalars


@dataclass
class State:
    """The analyses of a kernel, the MLIR builder, and the state at its current position."""

    axes: Axes
    masks: Masks
    demand: Demand
    sinks: Sinks
    b: Builder
    math: Math
    block: Block
    bf16_dot: bool  # the CPU multiplies pairs of bfloat16
    has_tiles: bool  # the CPU multiplies them in the tiles of AMX
    prefetches: bool
    scratch: Scratch
    scalars: dict[Value, Val] = field(default_factory=dict)
    buffers: dict[Value, Buffer] = field(default_factory=dict)
    offsets: dict[Value, Val] = field(default_factory=dict)  # inductions of open loops minus their initial values
    defined: set[Value] = field(default_factory=set)
    deferred: list[Value] = field(default_factory=list)  # tiles loaded by their sinks, not materialized
    # (condition, name of an index) -> the mask of lanes in which it holds; None: all lanes
    assumptions: dict[tuple[Condition, str], Val | None] = field(default_factory=dict)
    fused: set[Op] = field(default_factory=set)  # reductions lowered together with an earlier one
    # sums that a loop starts from 0 without writing zeros -> whether this iteration is the first
    first_trip: dict[Value, Val] = field(default_factory=dict)
    uses_tiles: bool = False  # the generated code uses the tiles of AMX
    generation: int = 0  # values of expressions are cached per generation

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Context manager: definitions and allocations inside are discarded at the end."""
        defined, used, deferred = set(self.defined), self.scratch.used, list(self.deferred)
        yield
        self.defined, self.scratch.used = defined, used
        self.deferred = [value for value in self.deferred if value in deferred]

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context manager: reads of memory inside are not hoisted, and their values are not reused outside."""
        self.generation += 1
        with self.b.pinned_here():
            yield
        self.generation += 1

    @contextlib.contextmanager
    def assume(self, conditions: Sequence[Condition], index: Val, mask: Val | None = None) -> Iterator[None]:
        """Context manager: ``conditions`` hold at ``index``, with ``mask`` only in its lanes."""
        before = self.assumptions
        self.assumptions = before | {(condition, index.name): mask for condition in conditions}
        yield
        self.assumptions = before

    def holds(self, condition: Condition, index: Val) -> bool:
        """Whether the open loops imply the condition in every lane."""
        key = (condition, index.name)
        return key in self.assumptions and self.assumptions[key] is None

    def origin(self, rank: int) -> tuple[Val, ...]:
        """The index of a tile's first element."""
        return (self.b.index(0),) * rank


def initial_state(function: Function, features: Sequence[str]) -> State:
    """The initial state, with the analyses of the kernel."""
    ops = list(walk(function.body))
    axes = Axes(ops)
    masks = Masks(axes)
    b, block = Builder(), register_block(features)
    return State(
        axes=axes,
        masks=masks,
        demand=Demand(ops, masks),
        sinks=Sinks(ops, axes, masks),
        b=b,
        math=Math(b, features),
        block=block,
        bf16_dot=multiplies_bf16(features),
        has_tiles=multiplies_tiles(features),
        prefetches="intel" in features,  # measured there only
        scratch=Scratch(b, Val("%scratch", "ptr"), spare_rows=block.spare_rows),
    )
