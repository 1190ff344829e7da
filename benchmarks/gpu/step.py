"""Sections and steps. Each step has its own result and can be repeated separately."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = 0  # for the inputs of every step
KERNEL_SECONDS = 0.8  # compilation of a kernel and its launcher; an assumption
COMPILE_SECONDS = 45.0  # torch.compile of a 12-block ViT in one direction; an assumption
START_SECONDS = 8.0  # start of a process: Python, imports, CUDA context; an assumption
EFFICIENCY = 0.4  # share of the GPU's peak that expected times assume


@dataclass(frozen=True)
class Context:
    """The environment of a step. ``device``: "cuda" or "cpu". ``folder``: folder of the results. ``tiny``: use tiny
    inputs. ``interpreting``: Triton's interpreter runs the kernels. ``end``: time.time() at which the command ends."""

    device: str
    folder: Path
    tiny: bool = False
    interpreting: bool = False
    end: float = float("inf")

    def select(self, real: Any, tiny: Any) -> Any:
        """``tiny`` if inputs are tiny, otherwise ``real``."""
        return tiny if self.tiny else real

    @property
    def backend(self) -> str:
        """Backend of whole models: "torch" with the interpreter, which is too slow for them."""
        return "torch" if self.interpreting else "triton"


class Skip(Exception):
    """A step does not apply on this machine; the message is the reason."""


def needs_gpu(context: Context, what: str) -> None:
    """Skip the step on a CPU; ``what``: plural."""
    if context.device != "cuda":
        raise Skip(f"{what} require a GPU")


class WrongNumbers(Exception):
    """A step found wrong numbers; ``facts`` are added to its result."""

    def __init__(self, line: str, **facts: Any) -> None:
        super().__init__(line)
        self.facts = facts


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the block, also for processes that it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Step:
    """``run`` returns the facts of the result, of which "line" is printed, or raises :class:`Skip` or
    :class:`WrongNumbers`.

    The expected time is computed from the number of ``kernels`` to compile, the ``flops`` of the calls, and ``seconds``
    for everything else. ``limit``: timeout in seconds; default: one minute plus four times the expected time.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    seconds: float
    kernels: int = 0
    flops: float = 0.0
    limit: float | None = None
    uses_remaining_time: bool = False

    def expected(self, peak: float) -> float:
        """Expected seconds on a GPU with ``peak`` dense 16-bit FLOP/s."""
        return self.seconds + self.kernels * KERNEL_SECONDS + self.flops / (EFFICIENCY * peak)


@dataclass(frozen=True)
class Section:
    """``until``: deadline as a share of the time limit. ``processes``: number of processes that run the steps in
    parallel; 1 for sections that measure time."""

    name: str
    title: str
    until: float
    steps: tuple[Step, ...] = field(repr=False)
    processes: int = 1

    def key(self, step: Step) -> str:
        """Key of the step in the results."""
        return f"{self.name}: {step.name}"
