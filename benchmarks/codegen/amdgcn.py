"""Parser for AMD machine code, in the assembly that Triton's cache keeps."""

import re
from typing import Any

from benchmarks.codegen.instructions import Instruction

MATRIX = r"v_mfma\w*"
DOUBLE = r"v_\w+_f64\w*"
LOCAL = r"scratch_\w+"
COPIES = r"(buffer|global)_load_lds\w*"
BINARY, ASSEMBLY = "hsaco", "amdgcn"

_LINE = re.compile(
    r'\s*\.file\s+(?P<file>\d+)\s+"(?P<folder>[^"]*)"\s+"(?P<name>[^"]*)"'
    r"|\s*\.loc\s+(?P<of>\d+)\s+(?P<number>\d+)"
    r"|(?P<label>\.LBB\w+):"
    r"|\t(?P<opcode>[a-z]\w+)(?:\s+(?P<operands>[^;]*))?"
)
_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "ubyte": 1, "byte": 1}


def read(kernel: Any) -> tuple[int, int, list[Instruction]]:
    """(registers per thread, vector and accumulation; bytes of scratch memory per thread, including spills;
    instructions)"""
    text = kernel.asm["amdgcn"]

    def noted(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match is not None, name
        return int(match[1])

    scratch = max(noted("private_segment_fixed_size"), 4 * noted("vgpr_spill_count"))
    return noted("vgpr_count"), scratch, parse(text)


def parse(text: str) -> list[Instruction]:
    lines = [match for match in map(_LINE.match, text.split(".Lfunc_end0:")[0].splitlines()) if match]
    labels: dict[str, int] = {}
    n = 0
    for match in lines:
        if match["label"]:
            labels[match["label"]] = n
        n += match["opcode"] is not None
    files: dict[str, str] = {}
    code: list[Instruction] = []
    source: tuple[tuple[str, int], ...] = ()
    for match in lines:
        if match["file"]:
            files[match["file"]] = f"{match['folder']}/{match['name']}"
        elif match["of"]:
            source = ((files[match["of"]], int(match["number"])),)
        elif match["opcode"]:
            opcode, operands = match["opcode"], match["operands"] or ""
            width = re.fullmatch(r"(?:global|buffer)_(?:load|store)_(?:lds_)?([a-z]+(?:x\d)?)(?:_d16(?:_hi)?)?", opcode)
            code.append(
                Instruction(
                    opcode,
                    labels.get(operands.strip()) if "branch" in opcode else None,
                    falls_through=opcode not in ("s_branch", "s_endpgm"),
                    width=_WIDTHS[width[1]] if width else 0,
                    source=source,
                )
            )
    return code
