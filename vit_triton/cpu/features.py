"""Features of this CPU."""

import ctypes
import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Features used by the generated code; x86-64-v3 is required.
REQUIRED = ("avx2", "fma", "f16c", "bmi2")
AMX = ("amx_tile", "amx_bf16")
OPTIONAL = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", *AMX)
# levels in the name of a kind of CPU, each with the features that it adds to the one before
_LEVELS = {"AVX2": REQUIRED, "AVX-512": OPTIONAL[:4], "AVX-512 BF16": ("avx512_bf16",), "AMX": AMX}
_VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}


class Block(NamedTuple):
    """The results of a product that are in registers at a time. The columns are also the width of a panel."""

    rows: int
    columns: int

    @property
    def spare_rows(self) -> int:
        """Rows after the end of a tile that its last block may compute; tiles have a power of two of rows."""
        return self.rows - 1 if self.rows & (self.rows - 1) else 0


def register_block(features: Sequence[str]) -> Block:
    """With AVX-512, 8 x 32 takes 16 of 32 registers; 12 and 14 rows were not faster. AVX2 has 16 registers of half the
    width: 6 x 16 takes 12 of them and leaves three for B and a broadcast element of A."""
    return Block(8, 32) if "avx512f" in features else Block(6, 16)


def multiplies_bf16(features: Sequence[str]) -> bool:
    """Whether products of bfloat16 use AMX or vdpbf16ps. On Intel's CPUs, widening to float32 is faster than vdpbf16ps
    alone."""
    return multiplies_tiles(features) or "avx512_bf16" in features and "intel" not in features


def multiplies_tiles(features: Sequence[str]) -> bool:
    """Whether products of bfloat16 use the tiles of AMX; vdpbf16ps computes what tiles do not cover."""
    return {*AMX, "avx512f", "avx512_bf16"} <= set(features)


@functools.cache
def detect() -> tuple[str, ...]:
    """The supported features, by their names in /proc/cpuinfo; empty on other systems. Includes AMX only if Linux
    permits its use."""
    has = _cpuinfo("flags").split()
    if not (multiplies_tiles(has) and _request_tiles()):
        has = [name for name in has if name not in AMX]
    return tuple(name for name in (*REQUIRED, *OPTIONAL) if name in has)


def _request_tiles() -> bool:
    """Request the registers of AMX from Linux; without permission, their first use is a SIGILL. The permission applies
    to all threads of the process and to forked children."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def arch() -> str:
    """The name of this CPU as a target: its features, and "intel" for choices that were measured on Intel's CPUs."""
    return ",".join([*detect(), *(["intel"] if _cpuinfo("vendor_id") == "GenuineIntel" else [])])


def kind() -> str:
    """The vendor and the highest level of vector instructions, e.g. "AMD AVX-512 BF16" or "Intel AMX". "" if the CPU
    lacks a required feature, and on other systems."""
    has = set(detect())
    level = ""
    for name, features in _LEVELS.items():
        if not has.issuperset(features):
            break
        level = name
    vendor = _cpuinfo("vendor_id")
    return f"{_VENDORS.get(vendor, vendor)} {level}".strip() if level else ""


@functools.cache
def _cpuinfo(field: str) -> str:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return ""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == field), "")


@functools.cache
def llvm_has_x86() -> bool:
    """Whether Triton's LLVM includes the x86-64 target; requesting a missing target crashes the process."""
    from triton._C import libtriton

    return hasattr(ctypes.CDLL(libtriton.__file__), "LLVMInitializeX86Target")


def llvm_target(arch: str) -> tuple[str, str]:
    """(cpu, features) for LLVM. Enables vectors of 512 bits, where LLVM prefers 256 by default."""
    names = arch.split(",")
    enabled = ["+" + name.replace("avx512_bf16", "avx512bf16") for name in names if name.startswith("avx512")]
    enabled += ["-prefer-256-bit"] if enabled else []
    return "x86-64-v3", ",".join([*enabled, *("+" + name.replace("_", "-") for name in AMX if name in names)])
