"""The schedule: which steps fit into the time limit, and the deadline of each section."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.step import START_SECONDS, Section, Step
from benchmarks.peaks import GPUS

PLANNED = ("NVIDIA H200", "NVIDIA GeForce RTX 4090")  # GPUs of --dry-run
CORES = 16  # CPU cores assumed by --dry-run
UNKNOWN = 100e12  # FLOP/s assumed for a GPU without a table entry
TINY_SECONDS = 3.0  # expected time of a step on a CPU


@dataclass(frozen=True)
class Clock:
    """``minutes`` from ``start`` (time.time()), on a GPU with ``peak`` dense 16-bit FLOP/s, or on a CPU (None)."""

    start: float
    minutes: float
    peak: float | None

    @property
    def end(self) -> float:
        return self.start + 60 * self.minutes

    def until(self, section: Section) -> float:
        return self.start + 60 * self.minutes * section.until

    def expected(self, step: Step) -> float:
        return TINY_SECONDS if self.peak is None else step.expected(self.peak)

    def fits(self, section: Section, step: Step, now: float) -> bool:
        """Whether the step is expected to end by its section's deadline. With
        ``uses_remaining_time`` it only has to start."""
        least = START_SECONDS if step.uses_remaining_time else self.expected(step)
        return now + least <= self.until(section)

    def limit(self, step: Step) -> float:
        """Timeout of the step in seconds, including the start of its process."""
        allowed = step.limit if step.limit is not None else 60 + 4 * self.expected(step)
        return max(1.0, min(START_SECONDS + allowed, self.end - time.time()))


def peak_of(name: str) -> float:
    return GPUS[name][0] * 1e12 if name in GPUS else UNKNOWN


@dataclass(frozen=True)
class Row:
    """A section in a plan: ``start`` and ``end`` in seconds from the start, computed from expected times."""

    section: Section
    num_fitting: int
    start: float
    end: float


def schedule(sections: Sequence[Section], clock: Clock) -> list[Row]:
    rows, now = [], clock.start
    for section in sections:
        start, num_fitting = now, 0
        now += START_SECONDS
        for step in section.steps:
            if clock.fits(section, step, now):
                now = (
                    clock.until(section) if step.uses_remaining_time else now + clock.expected(step) / section.processes
                )
                num_fitting += 1
        rows.append(Row(section, num_fitting, start - clock.start, now - clock.start))
    return rows


def table(sections: Sequence[Section], minutes: float, gpu: str) -> Iterable[str]:
    clock = Clock(0.0, minutes, peak_of(gpu))
    yield f"{gpu}, {minutes:g} minutes, a CPU of {CORES} cores"
    yield f"  {'section':<44}{'steps':>6}{'all of them':>13}{'fit':>5}{'from':>7}{'to':>7}"
    for row in schedule(sections, clock):
        name, processes = row.section.title, row.section.processes
        if processes > 1:
            name += f" ({processes} processes)"
        steps = row.section.steps
        whole = START_SECONDS + sum(clock.expected(step) for step in steps) / processes
        times = "".join(f"{_minutes(seconds):>7}" for seconds in (row.start, row.end))
        yield f"  {name:<44}{len(steps):>6}{_minutes(whole):>13}{row.num_fitting:>5}{times}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
