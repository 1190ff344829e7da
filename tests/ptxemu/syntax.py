"""Operands, instructions and modules of PTX."""

import re
from dataclasses import dataclass, field

TYPE_BYTES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
    "e4m3x2": 2,
    "e5m2x2": 2,
}

SPECIAL = re.compile(
    r"^%(tid|ntid|ctaid|nctaid)\.[xyz]$|^%(laneid|warpid|nwarpid|smid|nsmid|clock|clock64|clock_hi|globaltimer"
    r"|globaltimer_lo|globaltimer_hi|lanemask_(lt|le|eq|ge|gt)|gridid|dynamic_smem_size|total_smem_size)$"
)


@dataclass(frozen=True)
class Reg:
    name: str
    width: int  # bytes; 0 = predicate
    neg: bool = False  # !%p


@dataclass(frozen=True)
class SReg:
    name: str


@dataclass(frozen=True)
class Imm:
    bits: int
    kind: str  # 'i' integer, 'f' 32-bit float image, 'd' 64-bit float image


@dataclass(frozen=True)
class Sym:
    name: str


@dataclass(frozen=True)
class Vec:
    elems: tuple


@dataclass(frozen=True)
class Mem:
    base: object  # Reg | Sym | Imm
    offset: int


@dataclass(frozen=True)
class Pair:
    first: object
    second: object


@dataclass
class Instr:
    op: str
    parts: tuple
    ops: list
    guard: Reg | None = None
    guard_neg: bool = False
    loc: tuple = (0, 0, 0)
    asm: int = 0  # id of the inline-asm block, 0 = none
    text: str = ""
    poison: str = ""  # "ld"/"atom": a `mov %r, 0x0` that may stand for "masked off, no `other`"
    asm_loc: tuple = (0, 0, 0)
    index: int = -1

    @property
    def type(self):
        return self.parts[-1]


@dataclass
class Symbol:
    name: str
    space: str  # shared | local | global | const
    align: int
    size: int  # bytes, 0 for extern []
    data: bytes | None = None
    extern: bool = False


@dataclass
class Kernel:
    name: str
    params: list  # (name, type, bytes, count)
    body: list  # Instr | ('label', name)
    symbols: dict
    files: dict = field(default_factory=dict)


@dataclass
class PtxModule:
    kernels: dict
    symbols: dict
