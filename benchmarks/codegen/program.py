"""A kernel's machine code with its loops, and their cycles on each pipe."""

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.codegen.gpus import GPU, PARTS
from benchmarks.codegen.instructions import loops, waits
from benchmarks.codegen.pipes import OF_ALL, Work, work_of
from benchmarks.codegen.sass import SassInstruction


@dataclass
class Loop:
    """``body``: all instructions; ``own``: instructions outside of inner loops, by address."""

    body: set[int]
    own: list[int]
    inner: list["Loop"]


class Kernel:
    """The instructions of a kernel with ``warps`` warps per block, and their cycles on ``gpu``."""

    def __init__(self, code: Sequence[SassInstruction], warps: int, gpu: GPU) -> None:
        self.code, self.warps, self.gpu = code, warps, gpu
        self.replayed: dict[tuple[int, ...], float] = {}  # cycles by the arguments of a replay, see `extrapolated`
        self.work: list[Work] = work_of(code, gpu.rates)
        bodies = sorted(loops(code), key=min)
        waiting = [body for body in bodies if waits(code, body)]
        self.loops = _nested([body for body in bodies if body not in waiting], waiting)
        exits = [i for i, x in enumerate(code) if x.opcode == "EXIT" and not x.guard]
        end = exits[-1] + 1 if exits else len(code)  # code after the last EXIT consists of called functions
        self.once = sorted(set(range(end)).difference(*bodies))

    @property
    def replays(self) -> bool:
        return not any(x.opcode.startswith("UTC") and x.opcode.endswith("MMA") for x in self.code)

    @property
    def multiplies(self) -> bool:
        """Whether the kernel has matrix instructions."""
        return any(work.flops for work in self.work)

    def flops(self, part: Iterable[int]) -> int:
        """FLOPs of matrix instructions per block."""
        return sum(self.work[i].flops * (1 if self.work[i].of_a_block else self.warps) for i in part)

    def cycles(self, part: Iterable[int], blocks: int) -> collections.Counter[str]:
        """Cycles by pipe when ``blocks`` blocks of a multiprocessor execute the instructions ``part`` once."""
        total: collections.Counter[str] = collections.Counter()
        for i in part:
            for pipe, cycles in self.work[i].cycles.items():
                if self.work[i].of_a_block and pipe != "issue":
                    total[pipe] += cycles * blocks
                elif pipe in OF_ALL and pipe != "tensor memory":
                    total[pipe] += cycles * blocks * self.warps
                else:
                    total[pipe] += cycles * blocks * self.warps / PARTS
        return total

    def trips(self, main: int, others: int = 1) -> list[int]:
        """Trips of each loop: ``main`` for loops with matrix instructions, minus the trips that the compiler peels
        (sm_100), and ``others`` for those without. Without such loops, ``main`` for the longest loop, else 1."""
        if self.multiplies and any(self.flops(loop.own) for loop in self.loops):
            moved = self.flops(self.once)  # includes the code after the loop, which is less than a trip
            each = [self.flops(loop.own) for loop in self.loops]
            return [max(0, main - moved // flops) if flops else others for flops in each]
        longest = max((len(loop.body) for loop in self.loops), default=0)
        return [main if len(loop.body) == longest else 1 for loop in self.loops]

    def tensor_share(self) -> float | None:
        """Maximum share of the tensor cores' rate in the loop with the most matrix FLOPs; None without matrix FLOPs."""
        loop = max(self.loops, key=lambda loop: self.flops(loop.own), default=None)
        if loop is None or not self.flops(loop.own):
            return None
        cycles = self.cycles(loop.own, 1)
        return cycles["tensor"] / max(cycles.values())


def _nested(bodies: list[set[int]], waiting: list[set[int]]) -> list[Loop]:
    """Build the loops of ``bodies``; instructions of ``waiting`` loops are excluded."""
    found = []
    for body in bodies:
        inside = [other for other in (*bodies, *waiting) if other < body]
        found.append(Loop(body, sorted(body.difference(*inside)), []))
    for loop in found:
        within = [other for other in found if other.body < loop.body]
        loop.inner = [a for a in within if not any(a.body < b.body for b in within)]
    return found
