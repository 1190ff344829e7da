"""Parser for NVIDIA machine code, disassembled with the tools in Triton's wheel."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

from benchmarks.codegen.instructions import Instruction

MATRIX = r"HMMA|HGMMA|UTC\w*MMA|IMMA|DMMA"
DOUBLE = r"DADD|DMUL|DFMA|DSETP|DMMA"
LOCAL = r"LDL|STL"
COPIES = r"LDGSTS|UTMALDG|UBLKCP"
BINARY, ASSEMBLY = "cubin", "ptx"

_LINE = re.compile(
    r'\s*//## File "(?P<file>[^"]+)", line (?P<number>\d+)(?P<inlined> inlined at)?'
    r"|\s*(?P<label>\.L_\w+):"
    r"|\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
    r"|\s*/\* 0x(?P<high>[0-9a-f]{16}) \*/"  # second half of the previous instruction
)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class SassInstruction(Instruction):
    """``modifiers`` of the opcode, ``guard`` predicate and ``operands`` as printed by nvdisasm.

    The schedule of ptxas: ``stall``, cycles before the warp's next instruction; the scoreboards (0 to 5, 7 for none)
    that are released after the write (``write_barrier``) and after the read (``read_barrier``); ``waits``, bit mask of
    the scoreboards to wait for. A listing without machine code has default values.
    """

    modifiers: tuple[str, ...] = ()
    guard: str = ""
    operands: str = ""
    stall: int = 0
    write_barrier: int = 7
    read_barrier: int = 7
    waits: int = 0


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], check=True, capture_output=True, text=True).stdout


def read(kernel: Any) -> tuple[int, int, list[SassInstruction]]:
    """(registers per thread; bytes of local memory per thread, including spills; instructions)"""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
        listing = _tool("nvdisasm", "-gi", "-hex", "-c", str(cubin))
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local, parse(listing)


def parse(listing: str) -> list[SassInstruction]:
    lines = [match for match in map(_LINE.match, listing.splitlines()) if match]
    labels: dict[str, int] = {}
    n = 0
    for match in lines:
        if match["label"]:
            labels[match["label"]] = n
        n += match["opcode"] is not None
    code: list[SassInstruction] = []
    source: tuple[tuple[str, int], ...] = ()
    inlined = False
    for match in lines:
        if match["file"]:
            source = (*(source if inlined else ()), (match["file"], int(match["number"])))
            inlined = match["inlined"] is not None
        elif match["opcode"]:
            code.append(_instruction(match, labels, source))
        elif match["high"]:
            code[-1] = replace(code[-1], **_schedule(int(match["high"], 16) >> 41))
    return code


def _schedule(control: int) -> dict[str, int]:
    """The schedule in the control field, which starts at bit 105 of a 128-bit instruction (Volta and later)."""
    return {
        "stall": control & 15,
        "write_barrier": control >> 5 & 7,
        "read_barrier": control >> 8 & 7,
        "waits": control >> 11 & 63,
    }


def _instruction(match: re.Match[str], labels: dict[str, int], source: tuple[tuple[str, int], ...]) -> SassInstruction:
    opcode, *modifiers = match["opcode"].split(".")
    target = re.search(r"`\((\.L_\w+)\)", match["operands"]) if opcode == "BRA" else None
    # conditional branches have a guard, or a predicate before the label
    always = not match["guard"] and (target is None or target.start() == 0) and "DIV" not in modifiers
    width = next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4) if opcode in ("LDG", "STG", "LDGSTS") else 0
    return SassInstruction(
        opcode,
        labels.get(target[1]) if target else None,
        falls_through=not (always and opcode in ("BRA", "EXIT", "RET", "BRX", "JMP")),
        width=width,
        source=source,
        modifiers=tuple(modifiers),
        guard=(match["guard"] or "").strip(),
        operands=match["operands"].strip("{} "),
    )
