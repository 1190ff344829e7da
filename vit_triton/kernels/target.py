"""Compilation targets, on which tiles, GEMM precision and resource limits depend."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# Triton reads TRITON_INTERPRET on import; the type of its own functions shows the mode
INTERPRETING = isinstance(tl.cdiv, InterpretedFunction)

_KIB = 1024
# KiB per block; GPUs that are not listed have 64 KiB
_SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
# A100, A10, Jetson AGX Orin, L40S, H100, B200, RTX 5090
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 72, "sm_87": 16, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170}


@dataclass(frozen=True, eq=False)  # compared by identity, since pickers cache per table
class Tuned:
    """Configurations measured on a device; keys are those of :meth:`.picker.Picker.key`."""

    choices: dict[tuple[Any, ...], Any]


@dataclass(frozen=True)
class Target:
    """``name``: "cpu", "interpreter", "xpu" (Intel GPUs), or a GPU architecture such as "sm_90" or "gfx942".
    ``family``: the architecture family whose tiles it uses: "cpu", "interpreter", "sm_100" (tcgen05), "sm_90" (wgmma),
    "sm_80" (mma, all other NVIDIA GPUs) or "gfx" (AMD and Intel). ``shared_memory``: bytes per block, 0 if not a GPU.
    ``multiprocessors``: of the device, or a typical number for the architecture; 0 if unknown. ``device``: the driver's
    name of the device, "" if unknown. ``fastest``: whether a product is the one that is expected to be fastest, ours or
    the vendor's, see :mod:`.linear.expected`; else it is ours. ``features``, ``panels``: of the family "cpu"."""

    name: str
    family: str
    shared_memory: int
    multiprocessors: int = 0
    device: str = ""
    tuned: Tuned | None = None
    fastest: bool = False
    features: tuple[str, ...] = ()
    panels: tuple[tuple[torch.dtype, tuple[int, int]], ...] = ()

    def panel(self, dtype: torch.dtype) -> tuple[int, int] | None:
        """The layout of packed weights of a dtype, see :func:`.linear.pack.pack_weight`; None if not supported."""
        return None if self.prefers_vendor_gemm(dtype) else dict(self.panels).get(dtype)

    def uses_amx(self, dtype: torch.dtype) -> bool:
        """Whether products of a dtype use the tiles of AMX."""
        return dtype == torch.bfloat16 and "amx_bf16" in self.features

    def prefers_vendor_gemm(self, dtype: torch.dtype) -> bool:
        """Whether PyTorch's GEMM is used for linear layers. In float32 on Intel CPUs, it was 1.1 to 1.4 times as fast
        as ours (docs/cpu.md)."""
        return dtype == torch.float32 and "intel" in self.features

    @property
    def packs_once(self) -> bool:
        """Whether GEMMs pack their weight once per call instead of once per tile of rows; measured on Intel CPUs."""
        return "intel" in self.features

    @property
    def is_gpu(self) -> bool:
        return self.family not in ("cpu", "interpreter")

    @property
    def is_nvidia(self) -> bool:
        return self.family.startswith("sm_")

    @property
    def has_small_shared_memory(self) -> bool:
        """Whether a block has at most 99 KiB of shared memory, as on sm_86, sm_89 and sm_120."""
        return self.shared_memory <= 99 * _KIB

    @property
    def has_tf32(self) -> bool:
        """Whether Triton supports ``input_precision="tf32"``."""
        return self.is_nvidia or self.name == "gfx942"


@functools.cache
def target_named(name: str) -> Target:
    """The target of a :attr:`Target.name`."""
    if name in ("cpu", "interpreter"):
        return Target(name, name, 0)
    # Intel GPUs use AMD's tiles, which fit 64 KiB of shared memory and need no NVIDIA compiler option
    if name == "xpu" or name.startswith("gfx"):
        return Target(name, "gfx", 64 * _KIB)
    major = name.removeprefix("sm_")[:-1]
    family = {"9": "sm_90", "10": "sm_100"}.get(major, "sm_80")
    shared_memory = _SHARED_MEMORY.get(name, 227 if family != "sm_80" else 64) * _KIB
    return Target(name, family, shared_memory, multiprocessors=_MULTIPROCESSORS.get(name, 0))
