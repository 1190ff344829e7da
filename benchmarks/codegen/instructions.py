"""A compiled kernel as a list of instructions, whatever the vendor: its loops, and how wide it reads and writes."""

import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx

from vit_triton.kernels import launch

KERNELS = Path(launch.__file__).parent


@dataclass(frozen=True)
class Instruction:
    """``opcode`` without modifiers. ``target``: index of the instruction that a branch goes to. ``falls_through``: the
    next one may follow. ``width``: bytes a thread reads or writes in global memory, 0 for other instructions.
    ``source``: file and line of the kernel, then those of the call that it was inlined at, and so on."""

    opcode: str
    target: int | None = None
    falls_through: bool = True
    width: int = 0
    source: tuple[tuple[str, int], ...] = ()


def loops(code: Sequence[Instruction]) -> list[set[int]]:
    """The natural loops: for each header the instructions from which a way leads back to it without passing it."""
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
    for i, header in graph.edges:  # not branches alone: the last instruction of a loop may fall into its first
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
    """Whether a loop only waits for something: one of a few instructions, with a barrier or a lock among them."""
    return len(body) <= 2 or len(body) <= 12 and any(code[i].opcode in _WAITS for i in body)


def narrow_accesses(code: Sequence[Instruction]) -> dict[str, int]:
    """The lines of the kernel that read or write global memory by less than 16 bytes a thread, each with the lines that
    it was called from, and the bytes."""
    found: dict[str, int] = {}
    for instruction in code:
        if 0 < instruction.width < 16:
            where = " < ".join(_line(*place) for place in instruction.source)
            found[where] = min(instruction.width, found.get(where, 16))
    return found


def _line(file: str, number: int) -> str:
    name = file.rpartition("/kernels/")[2] if "/kernels/" in file else Path(file).name
    # Triton's cache may name the files of a checkout that is gone
    lines = linecache.getlines(file) or linecache.getlines(str(KERNELS / name))
    # and a load in a conditional expression is noted at the line behind it
    text = next((text for text in reversed(lines[:number]) if text.strip()), "")
    return f"{name}:{number}: {text.strip()}"
