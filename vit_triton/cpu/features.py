"""Features of this CPU."""

import ctypes
import functools
import platform
from pathlib import Path

# Features used by the generated code; x86-64-v3 is required.
REQUIRED = ("avx2", "fma", "f16c", "bmi2")
OPTIONAL = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
# Levels in the name of a kind of CPU, each with the features that it adds to the one before. Kernels do not use AMX.
_LEVELS = {
    "AVX2": REQUIRED,
    "AVX-512": OPTIONAL[:4],
    "AVX-512 BF16": OPTIONAL[4:],
    "AMX": ("amx_tile", "amx_bf16"),
}
_VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}


@functools.cache
def detect() -> tuple[str, ...]:
    """The supported features, by their names in /proc/cpuinfo; empty on other systems."""
    has = _cpuinfo("flags").split()
    return tuple(name for name in (*REQUIRED, *OPTIONAL) if name in has)


def kind() -> str:
    """The vendor and the highest level of vector instructions, e.g. "AMD AVX-512 BF16" or "Intel AMX". "" if the CPU
    lacks a required feature, and on other systems."""
    has = set(_cpuinfo("flags").split())
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
    return "x86-64-v3", ",".join([*enabled, "-prefer-256-bit"] if enabled else [])
