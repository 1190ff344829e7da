"""The pieces of the work: sections of steps. A step is run, kept and repeated on its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SEED = 0  # of the inputs of every step
# Seconds to compile a kernel and its launcher. The operators of numbers.py, 142 kernels in bfloat16 for sm_90, took
# 0.56 each with Triton 3.8 on an Intel Xeon (Sapphire Rapids); Triton 3.6 has a C compiler build each launcher too.
KERNEL_SECONDS = 0.8
COMPILE_SECONDS = 45.0  # torch.compile, a ViT of 12 blocks in one direction; an assumption
START_SECONDS = 8.0  # Python, the imports and the CUDA context of a process; an assumption
EFFICIENCY = 0.4  # of the GPU's peak, which the expected times assume


@dataclass(frozen=True)
class Context:
    """What a step runs on. ``device``: "cuda" or "cpu". ``folder``: that of the results. ``tiny``: whether inputs are.
    ``interpreting``: whether Triton's interpreter runs the kernels. ``end``: when the command ends, as time.time()."""

    device: str
    folder: Path
    tiny: bool = False
    interpreting: bool = False
    end: float = float("inf")

    def at(self, real: Any, tiny: Any) -> Any:
        """The size of an input."""
        return tiny if self.tiny else real

    @property
    def backend(self) -> str:
        """Of whole models, which take too long in the interpreter."""
        return "torch" if self.interpreting else "triton"


class Skip(Exception):
    """The reason why a step does not apply here."""


class Wrong(Exception):
    """The numbers that are wrong; ``facts`` go into the results."""

    def __init__(self, line: str, **facts: Any) -> None:
        super().__init__(line)
        self.facts = facts


def is_of_memory(error: Exception) -> bool:
    """Whether memory ran out: on a CPU PyTorch has no class of its own for it."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


@dataclass(frozen=True)
class Step:
    """``run`` gives the facts that are kept, of which "line" is printed; it raises :class:`Skip` or :class:`Wrong`.

    The expected time follows from the ``kernels`` that it compiles first, the ``flops`` of its calls, and ``seconds``
    of everything else. ``limit``: seconds until it counts as hung, by default a minute and four times what is expected.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    seconds: float
    kernels: int = 0
    flops: float = 0.0
    limit: float | None = None
    fills: bool = False  # takes all the time that is left

    def expected(self, peak: float) -> float:
        """Seconds, on a GPU of ``peak`` dense 16-bit FLOP/s."""
        return self.seconds + self.kernels * KERNEL_SECONDS + self.flops / (EFFICIENCY * peak)


@dataclass(frozen=True)
class Section:
    """``until``: the part of all minutes at whose end no further step of it begins. ``processes`` run its steps side by
    side, where each step is about numbers and not about time."""

    name: str
    title: str
    until: float
    steps: tuple[Step, ...] = field(repr=False)
    processes: int = 1

    def key(self, step: Step) -> str:
        """The name of a step in the results."""
        return f"{self.name}: {step.name}"
