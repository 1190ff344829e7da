"""Cycles that each NVIDIA instruction occupies each pipe."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.codegen.gpus import GLOBAL_BYTES, SHARED_BYTES, Rates
from benchmarks.codegen.sass import SassInstruction

OF_A_PART = (
    "issue",
    "tensor",
    "special",
    "imad",
    "fp32",
    "integer",
    "half",
    "uniform",
)  # pipes of each of the four parts
OF_ALL = ("global", "shared", "tensor memory")  # pipes shared by all parts

INTEGER = set(
    "FMNMX FMNMX3 FSEL FSET FSETP ISETP IMNMX VIMNMX VIMNMX3 VIADDMNMX IADD3 IADD VIADD LEA LOP3 LOP PLOP3 SHF SHL SHR"
    " PRMT SEL SGXT BMSK MOV P2R R2P CS2R F2FP I2FP I2I I2IP F2IP IABS PSETP VABSDIFF LEPC ISCADD HMNMX2".split()
)
FP32 = set("FADD FMUL FFMA FSWZADD FHADD FHFMA FADD32I FMUL32I FFMA32I".split())
FP32_PAIRS = {"FADD2", "FMUL2", "FFMA2"}
HALF = {"HADD2", "HMUL2", "HFMA2", "HSET2", "HSETP2"}
SPECIAL = {"MUFU", "F2I", "I2F", "F2F", "FRND", "FLO", "POPC", "BREV", "FCHK"}
CONTROL = set(
    "BRA BRX JMP EXIT CALL RET BSSY BSYNC BREAK WARPSYNC YIELD NOP NANOSLEEP ELECT DEPBAR WARPGROUP MEMBAR FENCE ERRBAR"
    " CCTL SYNCS ACQBULK PREEXIT BMOV VOTE VOTEU LDGDEPBAR BAR B2R KILL RPCMOV CGAERRBAR UCGABAR_ARV UCGABAR_WAIT"
    " USETMAXREG WARPGROUPSET UTCBAR UTCATOMSWS UTMACCTL UTMACMDFLUSH".split()
)
MATRIX_SHAPES = {"884": 8 * 8 * 4, "1684": 16 * 8 * 4, "1688": 16 * 8 * 8, "8816": 8 * 8 * 16, "8832": 8 * 8 * 32}
MATRIX_SPEED = {"IMMA": 2.0, "QMMA": 2.0, "OMMA": 4.0, "DMMA": 1 / 16}  # relative to 16-bit operands
_BYTES = {"256": 32, "128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Work:
    """``cycles``: per warp by pipe, of one part, or of the multiprocessor for pipes in ``OF_ALL``. ``flops``: of matrix
    instructions. ``of_a_block``: issued once per block instead of once per warp."""

    cycles: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    of_a_block: bool = False

    @functools.cached_property
    def pipe(self) -> str | None:
        """The pipe that the instruction waits for."""
        order = ("tensor", "special", "imad", "fp32", "integer", "half", "global", "shared", "tensor memory", "uniform")
        return next((pipe for pipe in order if pipe in self.cycles), None)


def work_of(code: Sequence[SassInstruction], rates: Rates) -> list[Work]:
    return [_work(instruction, rates, code, i) for i, instruction in enumerate(code)]


def _work(x: SassInstruction, rates: Rates, code: Sequence[SassInstruction], i: int) -> Work:
    opcode = x.opcode
    if opcode in ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "BMMA"):
        return _warp_product(x, rates)
    if opcode in ("HGMMA", "IGMMA", "QGMMA", "BGMMA"):
        return _warp_group_product(x)
    if opcode.startswith("UTC") and opcode.endswith("MMA"):
        return _block_product(x, rates, code, i)
    if opcode in ("LDSM", "STSM"):
        matrices = int(x.modifiers[-1]) if x.modifiers and x.modifiers[-1] in "124" else 1
        return Work({"issue": 1, "shared": matrices})
    words = 32 * next((_BYTES[m] for m in x.modifiers if m in _BYTES), 4)  # bytes per warp
    if opcode in ("LDS", "STS", "ATOMS", "LDL", "STL"):
        return Work({"issue": 1, "shared": max(1, words / SHARED_BYTES)})
    if opcode in ("LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG"):
        return Work({"issue": 1, "shared": max(1, words / SHARED_BYTES), "global": words / GLOBAL_BYTES})
    if opcode in ("LDTM", "STTM"):
        columns = next((int(m[1:]) for m in x.modifiers if re.fullmatch(r"x\d+", m)), 1)
        return Work({"issue": 1, "tensor memory": columns / 4})
    if opcode.startswith(("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")):
        return Work({"issue": 1}, of_a_block=True)
    if opcode == "SYNCS" and "ARRIVE" in x.modifiers:  # announces the bytes of a TMA load
        n_bytes = _immediate(x.operands.split(",")[-1].strip(), code, i)
        if n_bytes:
            return Work(
                {"issue": 1, "shared": n_bytes / SHARED_BYTES, "global": n_bytes / GLOBAL_BYTES}, of_a_block=True
            )
    return Work({"issue": 1, **_plain(x, rates)})


def _plain(x: SassInstruction, rates: Rates) -> dict[str, float]:
    """Cycles of arithmetic and control instructions."""
    opcode = x.opcode
    if opcode in FP32:
        return {"fp32": rates.fp32}
    if opcode in FP32_PAIRS:
        return {"fp32": 2 * rates.fp32}
    if opcode in ("IMAD", "IMUL", "IDP", "IMUL32I"):  # half of the float32 pipe executes IMAD
        return {"imad": 4 if {"WIDE", "HI"} & set(x.modifiers) else rates.imad, "fp32": rates.fp32}
    if opcode in HALF:
        return {"half" if rates.fp32 == 2 else "fp32": rates.half}
    if opcode in SPECIAL:
        return {"special": rates.special}
    if opcode in INTEGER:
        return {"integer": rates.integer}
    if opcode == "SHFL":
        return {"shared": 1}
    if opcode not in CONTROL and (opcode.startswith("U") or opcode in ("R2UR", "S2UR")):
        return {"uniform": 2}  # not documented: half the rate is assumed
    return {}


def _warp_product(x: SassInstruction, rates: Rates) -> Work:
    shape = next((m for m in x.modifiers if m.isdigit() and len(m) >= 3), "16816")
    depth = int(shape[3:]) if shape.startswith("168") else 16
    fma = MATRIX_SHAPES.get(shape, 16 * 8 * depth)
    speed = MATRIX_SPEED.get(x.opcode, 0.5 if "TF32" in x.modifiers else 1.0)
    return Work({"issue": 1, "tensor": rates.hmma * fma / 2048 / speed}, flops=2 * fma)


def _warp_group_product(x: SassInstruction) -> Work:
    """wgmma. Operands in shared memory are read through descriptors; a row of either operand has 32 bytes."""
    match = re.search(r"64x(\d+)x(\d+)", ".".join(x.modifiers))
    assert match is not None, x
    columns, depth = int(match[1]), int(match[2])
    from_shared = x.operands.split(",")[1].strip().startswith("gdesc")
    read = (512 if from_shared else 0) + 8 * columns
    return Work({"issue": 1, "tensor": columns / 2, "shared": read / SHARED_BYTES}, flops=2 * 16 * columns * depth)


def _block_product(x: SassInstruction, rates: Rates, code: Sequence[SassInstruction], i: int) -> Work:
    """tcgen05: one instruction per block, or per two blocks of a cluster. Tiles below 128 rows take as long as 128."""
    descriptor = re.search(r"idesc\[(\w+)\]", x.operands)
    value = _immediate(descriptor[1], code, i) if descriptor else None
    rows, columns = ((value >> 24 & 31) << 4, (value >> 17 & 63) << 3) if value else (128, 128)
    depth, speed = {"UTCQMMA": (32, 2), "UTCOMMA": (64, 4), "UTCIMMA": (32, 2)}.get(x.opcode, (16, 1))
    blocks = 2 if "2CTA" in x.modifiers else 1
    from_shared = x.operands.split(",")[0].strip().startswith("gdesc")
    read = 32 * ((rows if from_shared else 0) + columns) / blocks
    cycles = max(rows, 128 * blocks) * columns * depth / blocks / (rates.tensor * speed)
    return Work(
        {"issue": 1, "tensor": cycles, "shared": read / SHARED_BYTES},
        flops=2 * rows * columns * depth // blocks,
        of_a_block=True,
    )


def _immediate(register: str, code: Sequence[SassInstruction], i: int) -> int | None:
    """The register's value before instruction ``i``, if its last write is an immediate; otherwise None."""
    for x in reversed(code[:i]):
        if x.operands.split(",")[0].strip() == register:
            number = re.search(r"(0x[0-9a-f]+)\s*$", x.operands)
            return int(number[1], 16) if number and x.opcode in ("UMOV", "MOV", "IMAD", "UIMAD") else None
    return None
