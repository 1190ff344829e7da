"""What kernels are compiled for: the tiles, the precision of a product and the limits of a kernel depend on it."""

import functools
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# Triton decides while it is imported whether kernels are interpreted; its own functions show what it decided
INTERPRETING = isinstance(tl.cdiv, InterpretedFunction)

_KIB = 1024
# of a block; GPUs that are not named here have 64 KiB
_SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


@dataclass(frozen=True, eq=False)  # tables are compared by identity: what is cached for one is not that of another
class Tuned:
    """Configurations that were timed on a device, by a picker's name and arguments (:meth:`.picker.Picker.key`)."""

    choices: dict[tuple[Any, ...], Any]


@dataclass(frozen=True)
class Target:
    """``name``: "cpu", "interpreter", "xpu" (Intel's GPUs), or a GPU's architecture, as "sm_90" or "gfx942".
    ``family``: whose tiles it gets, "cpu", "interpreter", "sm_100" (tcgen05), "sm_90" (wgmma), "sm_80" (mma, the other
    NVIDIA GPUs) or "gfx" (AMD and Intel). ``shared_memory``: bytes of a block, 0 where there is none. ``device``: as
    the driver names it, "" where only the architecture is known."""

    name: str
    family: str
    shared_memory: int
    device: str = ""
    tuned: Tuned | None = None

    @property
    def is_gpu(self) -> bool:
        return self.family not in ("cpu", "interpreter")

    @property
    def is_nvidia(self) -> bool:
        return self.family.startswith("sm_")

    @property
    def has_tf32(self) -> bool:
        """Whether Triton takes ``input_precision="tf32"`` there."""
        return self.is_nvidia or self.name == "gfx942"


@functools.cache
def target_named(name: str) -> Target:
    """The target of a :attr:`Target.name`."""
    if name in ("cpu", "interpreter"):
        return Target(name, name, 0)
    # Intel's: AMD's tiles fit 64 KiB of shared memory in two stages, without an option of NVIDIA's compiler
    if name == "xpu" or name.startswith("gfx"):
        return Target(name, "gfx", 64 * _KIB)
    major = name.removeprefix("sm_")[:-1]
    family = {"9": "sm_90", "10": "sm_100"}.get(major, "sm_80")
    return Target(name, family, _SHARED_MEMORY.get(name, 227 if family != "sm_80" else 64) * _KIB)
