"""Computed times of one encoder block for every size of Vision Transformer, batch and number of tokens."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.codegen import workloads
from benchmarks.codegen.driver import compile_for
from benchmarks.codegen.figures import DTYPES, precision
from benchmarks.codegen.gpus import GPUS
from benchmarks.codegen.times import price, tile_of

WORST = 4  # kernels of a printed line


@dataclass(frozen=True)
class Size:
    """A block of ``width`` and ``hidden`` width for ``batch`` images of ``n_tokens``."""

    name: str
    width: int
    hidden: int
    heads: int
    batch: int
    n_tokens: int
    training: bool

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {self.n_tokens} tokens, {self.direction}"

    @property
    def direction(self) -> str:
        return "training" if self.training else "inference"


def _sizes() -> Iterator[Size]:
    for training in (False, True):
        for name, width, hidden, heads in (
            *(("Ti", 192, 768, 3), ("S", 384, 1536, 6), ("B", 768, 3072, 12), ("L", 1024, 4096, 16)),
            ("SO400M", 1152, 4304, 16),
        ):
            # 1,370 tokens: 518 x 518 pixels in patches of 14
            for batch, n_tokens in ((1, 197), (8, 197), (64, 197), (1, 1370)):
                yield Size(name, width, hidden, heads, batch, n_tokens, training)


SIZES = tuple(_sizes())


@dataclass(frozen=True)
class Part:
    """Launches of one kernel with equal arguments: time and limit of all of them in seconds."""

    kernel: str
    tile: str
    grid: int
    blocks: int
    launches: int
    seconds: float
    limit: float


@dataclass(frozen=True)
class Row:
    size: str
    gpu: str
    dtype: str
    parts: list[Part]

    @property
    def launches(self) -> int:
        return sum(part.launches for part in self.parts)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def limit(self) -> float:
        """The sum of the kernels' limits, each the larger one of FLOPs at the peak rate and bytes at the memory's."""
        return sum(part.limit for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        totals = dict(launches=self.launches, seconds=self.seconds, limit=self.limit)
        return {**asdict(self), **totals}


def row(gpu: str, dtype: str, size: Size) -> Row:
    block = functools.partial(workloads.block, width=size.width, hidden=size.hidden, heads=size.heads)
    with compile_for(GPUS[gpu].arch) as found, precision(dtype):
        block(DTYPES[dtype], batch=size.batch, n_tokens=size.n_tokens, training=size.training)
    parts: dict[tuple[Any, ...], Part] = {}
    for each in found:
        for grid, arguments in each.launches:
            _, times = price(gpu, each.kernel, grid, arguments)
            part = Part(each.kernel.name, tile_of(arguments), grid, times.blocks, 1, times.seconds, times.limit)
            key = part.kernel, part.tile, grid, part.seconds, part.limit
            before = parts.get(key)
            n = 1 if before is None else before.launches + 1
            parts[key] = Part(*key[:3], times.blocks, n, n * times.seconds, n * times.limit)
    return Row(str(size), gpu, dtype, sorted(parts.values(), key=lambda part: part.limit - part.seconds))


HEADER = f"{'block':<44}{'GPU':<6}{'dtype':<10}{'kernels':>7}{'us':>8}{'limit':>8}{'ratio':>7}  us lost, and kernels"


def line(row: Row) -> str:
    """A printed line; the kernels whose times exceed their limits most have their tile, grid and resident blocks."""
    worst = [
        f"{1e6 * (part.seconds - part.limit):.0f} {f'{part.launches}x ' if part.launches > 1 else ''}"
        f"{part.kernel.removesuffix('_kernel')} {part.tile} ({part.grid}, {part.blocks})"
        for part in row.parts[:WORST]
    ]
    return (
        f"{row.size:<44}{row.gpu:<6}{row.dtype:<10}{row.launches:>7}{1e6 * row.seconds:>8.0f}{1e6 * row.limit:>8.0f}"
        f"{row.seconds / row.limit:>7.1f}  {', '.join(worst)}"
    )
