"""In-order simulation of the warps in one part of a multiprocessor, with the schedule encoded by ptxas.

An instruction starts when its scoreboards are released, its pipe is free, and the asynchronous copies, warp group
matrix instructions and barriers that it waits for are complete. The part issues one instruction per cycle, from the
warp that is ready first. Latencies are from published microbenchmarks.
"""

import collections
import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.codegen.gpus import PARTS
from benchmarks.codegen.pipes import OF_ALL
from benchmarks.codegen.program import Kernel, Loop

# cycles until a scoreboard is released
LATENCY = {
    **dict(LDS=24, LDSM=30, SHFL=24, MUFU=20, S2R=30, S2UR=30, LDC=40, LDCU=40, ULDC=20, LDG=320, LD=320, LDL=40),
    **dict(ATOM=600, LDGSTS=340, LDTM=40, HGMMA=24, BAR=20, R2UR=12, SYNCS=24, UTMALDG=620),
}
OTHER_LATENCY, READ_LATENCY = 20, 8
QUEUE = {"shared": 48, "global": 256, "special": 16}  # cycles of work that a pipe queues
NEXT_BLOCK = 30  # cycles between the end of a block and the start of its successor
LONGEST = 6  # simulated trips of a loop; longer loops are extrapolated


@dataclass
class _Warp:
    pc: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: float = 0.0  # completion of the asynchronous copies since the last group
    copy_groups: list[float] = field(default_factory=list)
    product: float = 0.0  # completion of the last warp group matrix instruction
    product_groups: list[float] = field(default_factory=list)
    tma: list[float] = field(default_factory=list)


@dataclass
class _Block:
    left: int
    arrived: list[tuple[float, int, tuple[int, int]]] = field(default_factory=list)


def extrapolated(
    kernel: Kernel, trips: Sequence[int], resident: int, total: int, *, dram_latency: int, stagger: int
) -> float:
    """Cycles of ``total`` blocks on a multiprocessor with ``resident`` resident blocks. Long loops and many blocks are
    extrapolated linearly."""

    def run(trips: Sequence[int], blocks: int) -> float:
        key = *trips, resident, blocks, dram_latency, stagger
        if key not in kernel.replayed:
            kernel.replayed[key] = simulate(kernel, _trace(kernel, trips), resident, blocks, dram_latency, stagger)
        return kernel.replayed[key]

    def over_trips(blocks: int, *simulated: int) -> float:
        """``simulated``: trips of the first loops."""
        if len(simulated) == len(trips):
            return run(simulated, blocks)
        n = trips[len(simulated)]
        if n <= LONGEST:
            return over_trips(blocks, *simulated, n)
        cycles, half = (over_trips(blocks, *simulated, short) for short in (LONGEST, LONGEST // 2))
        return cycles + (n - LONGEST) * (cycles - half) / (LONGEST - LONGEST // 2)

    if total <= 3 * resident:
        return over_trips(total)
    two, three = over_trips(2 * resident), over_trips(3 * resident)
    return three + (total - 3 * resident) * (three - two) / resident


def _trace(kernel: Kernel, trips: Sequence[int]) -> list[int]:
    """The instructions that a warp executes: in address order, with each loop repeated by its trips."""
    count = {id(loop): n for loop, n in zip(kernel.loops, trips, strict=True)}

    def emit(own: Sequence[int], inner: Sequence[Loop]) -> list[int]:
        starts = {min(loop.body): loop for loop in inner}
        out: list[int] = []
        for i in sorted({*own, *starts}):
            if i in starts:
                out += emit(starts[i].own, starts[i].inner) * count[id(starts[i])]
            else:
                out.append(i)
        return out

    outermost = [loop for loop in kernel.loops if not any(loop.body < other.body for other in kernel.loops)]
    return emit(kernel.once, outermost)


def simulate(
    kernel: Kernel, trace: Sequence[int], resident: int, total: int, dram_latency: int = 0, stagger: int = 0
) -> float:
    """Cycles until all ``total`` blocks, ``resident`` at a time, have executed ``trace``."""
    return _Replay(kernel, trace, resident, total, dram_latency, stagger).run()


class _Replay:
    def __init__(
        self, kernel: Kernel, trace: Sequence[int], resident: int, total: int, dram_latency: int, stagger: int
    ) -> None:
        self.trace = [(kernel.code[i], kernel.work[i]) for i in trace]
        self.dram_latency = dram_latency
        self.warps = max(1, kernel.warps // PARTS)  # warps of a block in this part
        if kernel.warps < PARTS:  # the part runs only some of the blocks
            resident = max(1, round(resident * kernel.warps / PARTS))
            total = max(1, round(total * kernel.warps / PARTS))
        self.total = total
        self.free: collections.Counter[str] = collections.Counter()  # pipe -> time at which it is free
        self.queue: list[tuple[float, int, tuple[int, int]]] = []  # (ready, priority, warp)
        self.state: dict[tuple[int, int], _Warp] = {}
        self.blocks: list[_Block] = []
        for i in range(min(resident, total)):
            self._start(i * stagger)

    def _start(self, time: float) -> None:
        block = len(self.blocks)
        self.blocks.append(_Block(self.warps))
        for w in range(self.warps):
            self.state[block, w] = _Warp()
            heapq.heappush(self.queue, (time, block * self.warps + w, (block, w)))

    def run(self) -> float:
        clock = last = 0.0
        while self.queue:
            time, priority, key = heapq.heappop(self.queue)
            warp = self.state[key]
            x, _ = self.trace[warp.pc]
            ready = self._ready(warp, time)
            if ready > time and self.queue and self.queue[0][0] < ready:  # another warp may issue first
                heapq.heappush(self.queue, (ready, priority, key))
                continue
            time = max(ready, clock)
            clock = time + 1
            self._issue(warp, time)
            following = time + max(x.stall, 1)
            warp.pc += 1
            if warp.pc == len(self.trace):
                block = self.blocks[key[0]]
                block.left -= 1
                if not block.left:
                    last = max(last, time)
                    if len(self.blocks) < self.total:
                        self._start(time + NEXT_BLOCK)
            elif x.opcode == "BAR" and self.warps > 1:
                self._arrive(self.blocks[key[0]], (following, priority, key))
            else:
                heapq.heappush(self.queue, (following + (LATENCY["BAR"] if x.opcode == "BAR" else 0), priority, key))
        return last

    def _arrive(self, block: _Block, arrival: tuple[float, int, tuple[int, int]]) -> None:
        block.arrived.append(arrival)
        if len(block.arrived) == self.warps:
            release = max(time for time, _, _ in block.arrived) + LATENCY["BAR"]
            for _, priority, key in block.arrived:
                heapq.heappush(self.queue, (release, priority, key))
            block.arrived.clear()

    def _ready(self, warp: _Warp, time: float) -> float:
        """Earliest start of the warp's next instruction, at least ``time``."""
        x, work = self.trace[warp.pc]
        ready = max([time, *(warp.scoreboards[i] for i in range(6) if x.waits >> i & 1)])
        pipe = None if x.opcode == "SYNCS" else work.pipe
        if pipe is not None and x.opcode not in _WARP_GROUP:
            ready = max(ready, self.free[pipe] - QUEUE.get(pipe, 0))
        if pipe == "imad":
            ready = max(ready, self.free["fp32"])
        if x.opcode == "DEPBAR" and "SB0" in x.operands and warp.copy_groups:
            n = _count(x.operands)
            if len(warp.copy_groups) > n:
                ready = max(ready, warp.copy_groups[len(warp.copy_groups) - 1 - n])
                warp.copy_groups = warp.copy_groups[len(warp.copy_groups) - n :] if n else []
        if x.opcode == "WARPGROUP" and "DEPBAR" in x.modifiers:
            n = _count(x.operands)
            if len(warp.product_groups) > n:
                ready = max(ready, warp.product_groups[len(warp.product_groups) - 1 - n])
        if (
            x.opcode == "SYNCS" and "PHASECHK" in x.modifiers and warp.tma
        ):  # waits complete in the order of the TMA loads
            ready = max(ready, warp.tma[0])
            if ready <= time or not self.queue or self.queue[0][0] >= ready:
                warp.tma.pop(0)
        return ready

    def _issue(self, warp: _Warp, time: float) -> None:
        x, work = self.trace[warp.pc]
        done = time
        for pipe, cycles in work.cycles.items():
            if pipe == "issue":
                continue
            if pipe in OF_ALL:  # shared by four parts; an instruction of a block is divided by its warps
                cycles = cycles / self.warps if work.of_a_block else cycles * PARTS
            self.free[pipe] = max(self.free[pipe], time) + cycles
            done = max(done, self.free[pipe])
        if x.opcode in _WARP_GROUP:
            warp.product = done + LATENCY["HGMMA"]
            if "gsb0" in x.operands:
                warp.product_groups.append(warp.product)
        elif x.opcode.startswith("UTMALDG"):
            warp.tma.append(time + LATENCY["UTMALDG"] + self.dram_latency)
        elif x.opcode == "LDGSTS":
            warp.copies = max(warp.copies, done + LATENCY["LDGSTS"] + self.dram_latency)
        elif x.opcode == "LDGDEPBAR":
            warp.copy_groups.append(warp.copies)
        if x.write_barrier < 6 and x.opcode != "LDGDEPBAR":
            latency = LATENCY.get(x.opcode, OTHER_LATENCY) + (self.dram_latency if x.opcode in ("LDG", "LD") else 0)
            warp.scoreboards[x.write_barrier] = max(warp.scoreboards[x.write_barrier], done + latency)
        if x.read_barrier < 6:
            warp.scoreboards[x.read_barrier] = max(warp.scoreboards[x.read_barrier], done + READ_LATENCY)


_WARP_GROUP = {"HGMMA", "IGMMA", "QGMMA", "BGMMA"}


def _count(operands: str) -> int:
    match = re.search(r"0x([0-9a-f]+)", operands)
    return int(match[1], 16) if match else 0
