"""A compiled kernel as a list of instructions, for all vendors: its loops and the widths of its accesses."""

import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx

from vit_triton.kernels import launch

KERNELS = Path(launch.__file__).parent


@dataclass(frozen=True)
class Instruction:
    """``opcode``: without modifiers. ``target``: index of a branch's target. ``falls_through``: whether execution may
    continue at the next instruction. ``width``: bytes of global memory accessed per thread, 0 for other instructions.
    ``source``: (file, line) of the kernel, then of each call that it is inlined into."""

    opcode: str
    target: int | None = None
    falls_through: bool = True
    width: int = 0
    source: tuple[tuple[str, int], ...] = ()


def loops(code: Sequence[Instruction]) -> list[set[int]]:
    """The natural loops, one per header: the instructions with a path back to the header."""
    graph = networkx.DiGraph()
    graph.add_node(0)
    for i, instruction in enumerate(code):
        if instruction.falls_through and i + 1 < len(code):
            graph.add_edge(i, i + 1)
        if instruction.target is not None and instruction.target != i:
            graph.add_edge(i, instruction.target)
    above = networkx.immediate_dominators(graph, 0)

    def dominates(header: int, i: int) -> bool:
        while i != header and above.get(i) not in (None, i):
            i = above[i]
        return i == header

    found: dict[int, set[int]] = {}
    for i, header in graph.edges:  # all edges: a loop's last instruction may fall through into its header
        if i not in above or not dominates(header, i):
            continue
        body, todo = found.setdefault(header, {header}), [i]
        while todo:
            if (node := todo.pop()) not in body:
                body.add(node)
                todo += graph.predecessors(node)
    return list(found.values())


_WAITS = {"SYNCS", "NANOSLEEP", "UTCATOMSWS", "LD", "ATOMS", "YIELD", "USETMAXREG"}


def waits(code: Sequence[Instruction], body: set[int]) -> bool:
    """Whether a loop only waits: it is short and contains a barrier or a lock."""
    return len(body) <= 2 or len(body) <= 12 and any(code[i].opcode in _WAITS for i in body)


def narrow_accesses(code: Sequence[Instruction]) -> dict[str, int]:
    """{source line with its call sites: bytes} of global accesses of less than 16 bytes per thread."""
    found: dict[str, int] = {}
    for instruction in code:
        if 0 < instruction.width < 16:
            where = " < ".join(_line(*place) for place in instruction.source)
            found[where] = min(instruction.width, found.get(where, 16))
    return found


def _line(file: str, number: int) -> str:
    name = file.rpartition("/kernels/")[2] if "/kernels/" in file else Path(file).name
    # the cached kernel may have been compiled from another checkout
    lines = linecache.getlines(file) or linecache.getlines(str(KERNELS / name))
    # a load in a conditional expression has the number of the following line
    text = next((text for text in reversed(lines[:number]) if text.strip()), "")
    return f"{name}:{number}: {text.strip()}"
