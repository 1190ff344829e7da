"""What this CPU can do, by the names LLVM gives it."""

import ctypes
import functools
import platform
from pathlib import Path

# What the generated code makes use of; all of x86-64-v3 is required.
REQUIRED = ("avx2", "fma", "f16c", "bmi2")
OPTIONAL = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")


@functools.cache
def detect() -> tuple[str, ...]:
    """Names of /proc/cpuinfo of those features above that this CPU has; none where that cannot be told."""
    has = _cpuinfo("flags").split()
    return tuple(name for name in (*REQUIRED, *OPTIONAL) if name in has)


def vendor() -> str:
    """Who made this CPU, as /proc/cpuinfo says it: "AuthenticAMD", "GenuineIntel"; "" where that cannot be told."""
    return _cpuinfo("vendor_id")


@functools.cache
def _cpuinfo(field: str) -> str:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return ""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == field), "")


@functools.cache
def llvm_has_x86() -> bool:
    """Whether Triton's LLVM was built with x86-64: it crashes the process where a target is asked for that it lacks."""
    from triton._C import libtriton

    return hasattr(ctypes.CDLL(libtriton.__file__), "LLVMInitializeX86Target")


def llvm_target(arch: str) -> tuple[str, str]:
    """(cpu, features) for LLVM. Vectors are 512 bits wide where they can be: LLVM's default prefers 256."""
    names = arch.split(",")
    enabled = ["+" + name.replace("avx512_bf16", "avx512bf16") for name in names if name.startswith("avx512")]
    return "x86-64-v3", ",".join([*enabled, "-prefer-256-bit"] if enabled else [])
