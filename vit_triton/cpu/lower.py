"""Lower TTIR to MLIR's scf, arith and llvm dialects: loops over vectors instead of tiles.

Each program of the grid is one call of the generated function. Elementwise operations are fused into their sinks
(stores, reductions, dots, loop-carried values), which evaluate the whole expression one vector at a time
(:mod:`vit_triton.cpu.expressions`). Sinks loop over the part of the tile that is read and that satisfies the mask. Only
results of sinks, and expressions that several sinks need, are materialized in a buffer in the thread's scratch memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vit_triton.cpu.buffers import materialize
from vit_triton.cpu.builder import Val, mlir_type
from vit_triton.cpu.control import branch, for_loop
from vit_triton.cpu.dots import dot
from vit_triton.cpu.entry import entry
from vit_triton.cpu.expressions import compute, load
from vit_triton.cpu.reductions import reduce
from vit_triton.cpu.sinks import LAZY
from vit_triton.cpu.state import State, initial_state
from vit_triton.cpu.stores import is_stored_next, store
from vit_triton.cpu.ttir import Function, Op, Region, Unsupported
from vit_triton.cpu.vmath import declarations

TRIPLE = "x86_64-unknown-linux-gnu"
_SCALAR_RESULTS = {"tt.get_program_id": "pid", "tt.get_num_programs": "grid"}


@dataclass(frozen=True)
class Program:
    """``text`` defines ``entry(launch block)``; each thread needs ``scratch_bytes`` of scratch memory."""

    name: str
    text: str
    scratch_bytes: int


def lower(function: Function, features: Sequence[str]) -> Program:
    """Generate the MLIR module of a kernel for a CPU with these features.

    Raises:
        Unsupported: if an operation or type is not supported; the message contains it.
    """
    s = initial_state(function, features)
    parameters = []
    for i, value in enumerate(function.arguments):
        if value.type.is_tile:
            raise Unsupported("a tile as an argument of a kernel")
        s.scalars[value] = Val(f"%arg{i}", value.type.elem)
        s.defined.add(value)
        parameters.append(f"%arg{i}: {mlir_type(value.type.elem)}")
    _lower_region(s, function.body)
    parameters += [f"%pid{axis}: i32, %grid{axis}: i32" for axis in range(3)]
    lines = [
        f'module attributes {{llvm.target_triple = "{TRIPLE}"}} {{',
        *declarations(s.math.libm_used),
        f"llvm.func internal @kernel({', '.join(parameters)}, %scratch: !llvm.ptr {{llvm.noalias}}) {{",
        *s.b.regions[0].lines,
        "llvm.return",
        "}",
        *entry(function, configures_tiles=s.uses_tiles),
        "}",
    ]
    return Program(function.name, "\n".join(lines) + "\n", s.scratch.most_used)


def _lower_region(s: State, region: Region) -> None:
    for op in region.ops:
        with s.evaluation():
            _lower_op(s, op)
        s.defined.update(op.results)


def _lower_op(s: State, op: Op) -> None:
    name = op.name
    if name in ("tt.return", "scf.yield", "tt.reduce.return"):
        return
    if name in _SCALAR_RESULTS:
        axis = "xyz".index(op.attrs["words"][0])
        s.scalars[op.results[0]] = Val(f"%{_SCALAR_RESULTS[name]}{axis}", "i32")
    elif name == "tt.store":
        store(s, op)
    elif name == "tt.dot":
        dot(s, op)
    elif name == "tt.reduce":
        reduce(s, op)
    elif name == "scf.for":
        for_loop(s, op, _lower_region)
    elif name == "scf.if":
        branch(s, op, _lower_region)
    elif name == "tt.load":
        if op.results[0].type.is_tile:
            s.deferred.append(op.results[0])
        else:
            s.scalars[op.results[0]] = load(s, op)
    elif name in LAZY:
        result = op.results[0]
        if not result.type.is_tile:
            s.scalars[result] = compute(s, op)
        elif result in s.sinks.materialized and not is_stored_next(s, op):
            materialize(s, result)
    else:
        raise Unsupported(f"operation {name}")
