"""Tile sizes: frozen dataclasses and ``pick_*`` functions, plain Python.

A pick depends on sequence length, head size, width, dtype and architecture, never on the batch, so that a
sample's result does not depend on its neighbours.

The choices for GPUs (sm_*, gfx*) are computed only, from registers, shared memory and instructions: none was timed on
one. Beside each picker stand the tiles that were weighed; `vit-triton tune` times them, and what it writes
(:mod:`._tuned`) takes the place of the choices made here, on the device that it names.
"""

import bisect
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from triton.runtime import driver

from vit_triton.kernels import _launch

# the interpreter pays per operation, not per element: large tiles, up to Triton's limit of 2**20 elements
INTERPRETER_TILE = 2**20


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv outside of a kernel takes 4 microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def architecture(device: torch.device) -> str:
    """"interpreter", "cpu", or the GPU's, as "sm_90" or "gfx942"; an emulated GPU's where a driver runs one."""
    if _launch.INTERPRETING:
        return "interpreter"
    if device.type != "cpu":
        return _gpu_architecture(device)
    target = driver.active.get_current_target()
    return {"cpu": "cpu", "cuda": f"sm_{target.arch}"}.get(target.backend, target.arch)


@functools.cache
def _gpu_architecture(device: torch.device) -> str:
    from vit_triton.kernels import _tuned  # which reads configurations of the kinds below

    properties = torch.cuda.get_device_properties(device)
    hip, sm = torch.version.hip, f"sm_{properties.major}{properties.minor}"
    arch = properties.gcnArchName.split(":")[0] if hip else sm
    table = _tuned.table(properties.name, arch)
    return arch if table is None else TunedArchitecture(arch, table.choices)


# --- tuning ------------------------------------------------------------------------------------------------

Choices = dict[tuple[Any, ...], Any]  # from a picker's name and its arguments but m and arch to a configuration


class TunedArchitecture(str):
    """The name of an architecture, with what was tuned for one device of it."""

    choices: Choices
    __hash__ = object.__hash__  # what is cached for a device is not that of another one of the same architecture

    def __new__(cls, name: str, choices: Choices) -> "TunedArchitecture":
        self = super().__new__(cls, name)
        self.choices = choices
        return self


@dataclass(frozen=True)
class Picker:
    """A ``pick_*`` function as :func:`tunable` found it: the ``kinds`` of configuration it may give, the ``names`` of all
    of its arguments, the types of those ``arguments`` that a tuned choice depends on, and what was ``weighed``."""

    name: str
    default: Callable[..., Any]
    kinds: tuple[type, ...]
    names: tuple[str, ...]
    arguments: dict[str, type]
    weighed: Callable[..., Iterable[Any]]

    def key(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of a call, in :data:`Choices`."""
        return self.name, *(value for name, value in zip(self.names, args, strict=True) if name in self.arguments)

    def candidates(self, args: tuple[Any, ...]) -> list[Any]:
        """The default, then what else was weighed for these arguments, each once."""
        return list(dict.fromkeys([self.default(*args), *self.weighed(*args)]))


PICKERS: dict[str, Picker] = {}
Pick = TypeVar("Pick", bound=Callable[..., Any])


def tunable(*kinds: type, weighed: Callable[..., Iterable[Any]]) -> Callable[[Pick], Pick]:
    """Decorate a picker: it gives the user's tuned choice where ``arch`` carries one, else its own, and remembers it.
    ``weighed``, of the picker's arguments: what `tune` measures beside the picker's own choice."""

    def decorate(pick: Pick) -> Pick:
        parameters = inspect.signature(pick).parameters
        names = tuple(parameters)
        arguments = {name: parameters[name].annotation for name in names if name not in ("m", "arch")}
        picker = PICKERS[pick.__name__] = Picker(pick.__name__, pick, kinds, names, arguments, weighed)
        arch = names.index("arch")

        @functools.lru_cache(1024)
        @functools.wraps(pick)
        def choose(*args: Any) -> Any:
            tuned = args[arch].choices.get(picker.key(args)) if isinstance(args[arch], TunedArchitecture) else None
            return pick(*args) if tuned is None else tuned

        return choose  # type: ignore[return-value]

    return decorate


def _generation(arch: str) -> str:
    """Whose tiles a GPU gets: "sm_100" (tcgen05), "sm_90" (wgmma), "gfx" (AMD), and "sm_80" (mma) for sm_86, 89, 120 too."""
    known = ("cpu", "interpreter", "gfx", "sm_90", "sm_100")
    return next((name for name in known if arch.startswith(name[:5])), "sm_80")


# --- attention ---------------------------------------------------------------------------------------------


class _Compiled:
    """What the compiler is told, too: a thread gets at most ``max_registers``, of which an NVIDIA GPU has 255."""

    num_warps: int
    num_stages: int
    max_registers: int

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler, as a launch takes them."""
        limit = {"maxnreg": self.max_registers} if self.max_registers < 255 else {}  # only NVIDIA's knows it
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, **limit)


@dataclass(frozen=True)
class AttentionConfig(_Compiled):
    """``block_m`` query rows, ``block_n`` keys per step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 255


def split_head_dim(head_dim: int, dtype: torch.dtype, arch: str) -> tuple[int, int]:
    """Powers of two (main, tail) that cover ``head_dim``: 72 -> (64, 16), 96 -> (64, 32), 64 -> (64, 0).

    A tile of tl.dot is a power of two of at least 16; the tail saves padding 72 to 128.
    """
    whole = max(16, next_power_of_2(head_dim))
    main = whole // 2
    tail = max(16, next_power_of_2(head_dim - main))
    if main < 16 or main + tail >= whole:
        return whole, 0
    if dtype == torch.float32 and main + tail > 80 and arch.startswith("sm_"):
        return whole, 0  # NVIDIA's FMAs hold both operands in registers: those of two tiles spill (computed)
    return main, tail


def attention_tail(length: int, block: int) -> int:
    """Width of the one masked step after the full blocks of ``block``: 0 or a power of two of at least 16."""
    rest = length % block
    return max(16, next_power_of_2(rest)) if rest else 0


def _pick_interpreted_attention(n_rows: int, n_cols: int) -> AttentionConfig:
    block_m = min(256, max(16, next_power_of_2(n_rows)))
    block_n = min(256, max(16, next_power_of_2(n_cols)))
    return AttentionConfig(block_m, block_n, 4, 1)


def _pick_cpu_attention(n_rows: int, n_cols: int, block_m: int, block_n: int) -> AttentionConfig:
    """The sizes are the fastest measured at 197 x 64: a tile of scores beside its keys and values in the L2 cache."""
    return AttentionConfig(_clip(block_m, n_rows), _clip(block_n, n_cols), 1, 1)


AttentionTable = dict[str, tuple[tuple[int, int, int, int], ...]]  # of a generation: block_m, block_n, warps, stages
_HEAD_DIMS = (64, 96, 128, 192, 256)  # a row of tiles below: for head sizes up to each of these

# What was weighed, all of it computed from the machine code: in bfloat16 none spills at any of these head sizes, and at 192
# and 256 the tile is what does not; products are the architecture's own matrix instruction wherever they have 64 rows; loads are
# asynchronous. us: B = 128, H = 12, 197 tokens, bfloat16.
_ATTENTION_FWD: AttentionTable = {
    # 128 x 64 is bound by the tensor cores alone (147 us; 64 x 64: 211); from 65 on its accumulators spill
    "sm_80": ((128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2), (64, 16, 4, 2), (32, 32, 8, 1)),
    # wgmma wants 64 rows; four blocks on a multiprocessor (70 us; 128 x 32: 73, 128 x 64: 73), from 65 on with 32 keys a
    # step (88, 257 tokens: 156; 64 x 64: 171, 128 x 64: 165; 128, where 64 x 64 has two blocks: 214 and 259)
    "sm_90": ((64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2)),
    # 64 keys a step spill at 104 (128: 103 us; three stages of 64: 110, 128 x 64 with eight warps: 111)
    "sm_100": ((128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    "gfx": ((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    # IEEE dots are plain FMA with both operands in registers: larger tiles spill (128: 16 x 32 5734 us, 16 x 64 3818)
    "sm_ float32": ((32, 32, 4, 2), (32, 32, 4, 2), (16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
    "gfx float32": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
}
_ATTENTION_FWD_DROPOUT = _ATTENTION_FWD | {  # Philox wants some 40 registers beside the tile
    "sm_80": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 16, 8, 2), (64, 16, 4, 2), (16, 32, 4, 1)),
    "sm_90": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    "sm_100": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    "gfx": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
}
# wgmma at 128 x 64 with eight warps and two blocks: from some 500 keys on (577: 363 us against 390 of 64 x 64; 257: 125
# against 114; SO400M's heads of 72 and 729 tokens: 590 against 799)
_LONG_FWD = {"sm_90": AttentionConfig(128, 64, 8, 3, max_registers=128)}
_ATTENTION_BWD_DQ: AttentionTable = {
    # three blocks of 168 registers (214 us; 64 x 64: 248 with two). At 72 64 x 64 is faster on an A100 (295 against 323)
    # and spills on sm_86
    "sm_80": ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
    # five blocks of 90 registers (77 us; 64 x 64: 89, 128 x 64: 81). 192: 330 (64 x 64 with eight warps: 589)
    "sm_90": ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
    "sm_100": ((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),  # 52 us; 64 x 64: 74
    "gfx": ((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    "sm_ float32": ((64, 32, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
    "99 KiB float32": ((64, 32, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    "gfx float32": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
_ATTENTION_BWD_DQ_DROPOUT = _ATTENTION_BWD_DQ | {
    "sm_80": ((64, 64, 4, 2), (64, 32, 4, 3), (32, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
    "sm_90": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
    "sm_100": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
}
_ATTENTION_BWD_DKDV: AttentionTable = {  # query rows a step, keys a program
    # 294 us; two stages 333, 128 keys spill. 72: 383 (16 x 64: 428)
    "sm_80": ((32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3), (16, 16, 4, 2), (32, 16, 8, 2)),
    # 122 us; two stages 136, 64 x 64 156. 192: 838 (16 x 64 with eight warps: 1348)
    "sm_90": ((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (32, 16, 4, 3), (32, 16, 8, 2)),
    # 88 us; 64 keys: 112. 96: 179 (32 x 64 with four warps spills)
    "sm_100": ((32, 128, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
    "gfx": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 8, 1)),
    "sm_ float32": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    # past 128 what does not spill needs 100 KiB of shared memory; this spills 3 KiB a thread
    "99 KiB float32": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "gfx float32": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
_ATTENTION_BWD_DKDV_DROPOUT = _ATTENTION_BWD_DKDV | {
    # 72: 534 us (32 x 64 with eight warps: 1225)
    "sm_80": ((32, 64, 4, 2), (16, 64, 4, 3), (32, 32, 8, 1), (16, 16, 4, 2), (32, 16, 8, 2)),
    "sm_90": ((32, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2), (32, 16, 4, 3), (32, 16, 8, 2)),
    "sm_100": ((16, 64, 4, 2), (16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2)),  # 192: 32 x 64 spills
    "sm_ float32": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 2), (32, 16, 8, 1), (32, 16, 8, 1)),
}


def _attention_rows(table: AttentionTable, dtype: torch.dtype, arch: str) -> tuple[tuple[int, int, int, int], ...]:
    if dtype != torch.float32:
        return table[_generation(arch)]
    if arch in ("sm_86", "sm_89", "sm_120") and "99 KiB float32" in table:  # of shared memory for a block
        return table["99 KiB float32"]
    return table["gfx float32" if arch.startswith("gfx") else "sm_ float32"]


def _attention_tile(table: AttentionTable, head_dim: int, dtype: torch.dtype, arch: str) -> AttentionConfig:
    covered = sum(split_head_dim(head_dim, dtype, arch))
    rows = _attention_rows(table, dtype, arch)
    return AttentionConfig(*rows[bisect.bisect_left(_HEAD_DIMS, covered)])


def _weighed_attention(table: AttentionTable, more: Iterable[tuple[int, int, int, int]]) -> Callable[..., Any]:
    """The tiles of every architecture and head size, and ``more``."""

    def weighed(
        n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, arch: str, dropout: bool
    ) -> Iterable[AttentionConfig]:
        most_m, most_n = (max(64, next_power_of_2(n)) for n in (n_q, n_k))
        float32 = dtype == torch.float32
        own = [rows for name, rows in table.items() if name.endswith("float32") == float32] + ([] if float32 else [more])
        tiles = (AttentionConfig(*tile) for tile in itertools.chain(*own))
        return [tile for tile in tiles if tile.block_m <= most_m and tile.block_n <= most_n]

    return weighed


@tunable(AttentionConfig, weighed=_weighed_attention(_ATTENTION_FWD, [(128, 64, 8, 3), (128, 32, 4, 3), (16, 64, 4, 2)]))
def pick_attention_fwd(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, arch: str, dropout: bool
) -> AttentionConfig:
    """Tiles of ``attention_fwd_kernel``."""
    if arch == "interpreter":
        return _pick_interpreted_attention(n_q, n_k)
    if arch == "cpu":
        return _pick_cpu_attention(n_q, n_k, 256, 64)
    if n_q <= 16 and head_dim <= 128 and dtype != torch.float32:
        # one query row (a class token, pooling) must not compute 64
        return AttentionConfig(16, 64 if head_dim <= 64 or not dropout else 32, 4, 2)
    fits = head_dim <= 64 or head_dim <= 96 and attention_tail(n_k, 64) < 64  # a masked step of 64 keys would spill
    if n_k > 512 and fits and dtype != torch.float32 and not dropout and _generation(arch) in _LONG_FWD:
        return _LONG_FWD[_generation(arch)]
    return _attention_tile(_ATTENTION_FWD_DROPOUT if dropout else _ATTENTION_FWD, head_dim, dtype, arch)


_CPU_MOST_KEYS = 512  # of a program that computes dq, dk and dv: its tiles of scores then fit the L2 cache


@tunable(AttentionConfig, weighed=_weighed_attention(_ATTENTION_BWD_DQ, [(64, 64, 4, 2), (128, 64, 8, 2)]))
def pick_attention_bwd_dq(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, arch: str, dropout: bool
) -> AttentionConfig | None:
    """Tiles of ``attention_bwd_dq_kernel``; None where ``attention_bwd_dkdv_kernel`` holds all keys and gives dq too."""
    if arch == "interpreter":
        return _pick_interpreted_attention(n_q, n_k)
    if arch == "cpu":
        return None if n_k <= _CPU_MOST_KEYS else _pick_cpu_attention(n_q, n_k, 128, 64)
    return _attention_tile(_ATTENTION_BWD_DQ_DROPOUT if dropout else _ATTENTION_BWD_DQ, head_dim, dtype, arch)


@tunable(AttentionConfig, weighed=_weighed_attention(_ATTENTION_BWD_DKDV, [(32, 64, 4, 2), (64, 64, 4, 2)]))
def pick_attention_bwd_dkdv(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, arch: str, dropout: bool
) -> AttentionConfig:
    """Tiles of ``attention_bwd_dkdv_kernel``: ``block_n`` keys per program, ``block_m`` query rows per step."""
    if arch == "interpreter":
        return _pick_interpreted_attention(n_q, n_k)
    if arch == "cpu":
        return _pick_cpu_attention(n_q, n_k, 64, _CPU_MOST_KEYS if n_k <= _CPU_MOST_KEYS else 256)
    return _attention_tile(_ATTENTION_BWD_DKDV_DROPOUT if dropout else _ATTENTION_BWD_DKDV, head_dim, dtype, arch)


# --- LayerNorm ---------------------------------------------------------------------------------------------

MAX_LAYER_NORM_WIDTH = 2**16
# 2 programs for each of the 132 multiprocessors of an H100; fixed, so that every card adds the same partial sums
LAYER_NORM_PARTIALS = 264


@dataclass(frozen=True)
class LayerNormConfig:
    """``block_m`` rows at a time, each held whole in ``block_d`` >= width lanes of ``num_warps`` warps; the backward
    kernel leaves at most ``partials`` partial sums."""

    block_m: int
    block_d: int
    num_warps: int
    partials: int = LAYER_NORM_PARTIALS


def check_layer_norm_width(width: int) -> None:
    """A row lives in the registers of one program, which bounds its width."""
    if not 0 < width <= MAX_LAYER_NORM_WIDTH:
        raise ValueError(f"layer_norm: width must be 1 to {MAX_LAYER_NORM_WIDTH}, got {width}")


def _weighed_layer_norm(width: int, arch: str) -> Iterable[LayerNormConfig]:
    block_d = next_power_of_2(width)
    for num_warps in (1, 2, 4, 8, 16, 32):
        for per_thread in (8, 16, 32):
            rows = num_warps * 32 * per_thread // block_d
            if 1 <= rows <= 16:
                yield LayerNormConfig(rows, block_d, num_warps)


@tunable(LayerNormConfig, weighed=_weighed_layer_norm)
def pick_layer_norm(width: int, arch: str) -> LayerNormConfig:
    """Tiles of both LayerNorm kernels."""
    block_d = next_power_of_2(width)
    if arch == "interpreter":
        # 2**17: one more row is then cheaper than one more program, and tiny inputs do not pay for 2**20 elements
        return LayerNormConfig(max(1, 2**17 // block_d), block_d, 4)
    if arch == "cpu":
        # a row, and backward the sums of the columns, stay in the L1 cache from one pass over them to the next
        return LayerNormConfig(1, block_d, 1, partials=32)
    # 16 elements a thread: two 16-byte loads of bfloat16 in flight, and the backward kernel fits its registers
    num_warps = 4 if block_d <= 1024 else min(16, block_d // 256) if block_d <= 8192 else 32
    return LayerNormConfig(max(1, min(16, num_warps * 512 // block_d)), block_d, num_warps)


def pick_qk_norm(head_dim: int, arch: str) -> LayerNormConfig:
    """Tiles of both kernels that normalise queries and keys: the rows are a head long, and many."""
    block_d = next_power_of_2(head_dim)
    if arch == "interpreter":
        return pick_layer_norm(head_dim, arch)
    if arch == "cpu":
        return LayerNormConfig(max(1, 1024 // block_d), block_d, 1, partials=32)
    return LayerNormConfig(max(1, min(128, 2048 // block_d)), block_d, 4)  # 16 elements a thread, as above


def layer_norm_stretch(n_rows: int, config: LayerNormConfig) -> tuple[int, int]:
    """(programs, steps of ``block_m`` rows each takes) of the backward kernel: at most ``partials`` programs."""
    n_blocks = -(-n_rows // config.block_m)
    n_steps = max(1, -(-n_blocks // config.partials))
    return -(-n_blocks // n_steps), n_steps


# --- sums of parts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumConfig:
    """``block_p`` parts at a time of ``block`` elements each."""

    block_p: int
    block: int
    num_warps: int


def _weighed_sum_parts(n_parts: int, arch: str) -> Iterable[SumConfig]:
    for block in (32, 64, 128, 256):
        for most in (8, 32, 64):
            yield SumConfig(min(most, next_power_of_2(n_parts)), block, 4)


@tunable(SumConfig, weighed=_weighed_sum_parts)
def pick_sum_parts(n_parts: int, arch: str) -> SumConfig:
    """Tiles of ``sum_parts_kernel``."""
    if arch == "interpreter":
        return SumConfig(min(1024, next_power_of_2(n_parts)), 1024, 4)
    if arch == "cpu":
        return SumConfig(min(32, next_power_of_2(n_parts)), 256, 1)
    # a LayerNorm's 264 parts of 768 numbers must occupy more than a few multiprocessors; few parts are of a large weight
    block_p = min(32, next_power_of_2(n_parts))
    return SumConfig(block_p, 32 if block_p == 32 else 2048 // block_p, 4)


# --- elementwise -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileConfig:
    """``rows`` x ``cols`` elements at a time."""

    rows: int
    cols: int
    num_warps: int


def pick_layer_scale_bwd(k: int, arch: str) -> TileConfig:
    """Tiles of ``layer_scale_bwd_kernel``: a program walks along one row of k weights."""
    return TileConfig(1, min(1024, next_power_of_2(k)), 1 if arch == "cpu" else 4)


def pick_swiglu(h: int, arch: str) -> TileConfig:
    """Tiles of both SwiGLU kernels, of a hidden width h."""
    cols = min(256, next_power_of_2(h))
    if arch == "interpreter":
        return TileConfig(256, cols, 4)
    return TileConfig(1024 // cols, cols, 1 if arch == "cpu" else 4)  # 8 elements a thread: 16 bytes of bfloat16


# --- GEMM --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmConfig(_Compiled):
    """An output tile of ``rows`` x ``cols``, ``depth`` of the contraction per step; ``group`` rows of tiles share
    the L2 cache; ``split`` parts of the contraction are computed apart and added; the epilogue takes the tile's columns in
    ``parts``."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 8
    split: int = 1
    parts: int = 1
    max_registers: int = 255


@dataclass(frozen=True)
class VendorGemm(GemmConfig):
    """The library of the GPU's vendor multiplies; what stands behind the product is one pass over it by the same
    kernel, in tiles of ``rows`` x ``cols``. Only a tuned table chooses it."""

    rows: int = 32
    cols: int = 128
    depth: int = 16
    num_warps: int = 4
    num_stages: int = 1


GEMM_TILES = (
    *(GemmConfig(128, 128, 32, 4, 4), GemmConfig(128, 64, 32, 4, 4), GemmConfig(64, 64, 32, 4, 4)),
    *(GemmConfig(128, 128, 64, 8, 3), GemmConfig(128, 256, 64, 8, 3), GemmConfig(128, 64, 64, 8, 3)),
    *(GemmConfig(128, 64, 64, 4, 3), GemmConfig(64, 64, 64, 4, 3), GemmConfig(64, 128, 64, 4, 3)),
)
GEMM_FLOAT32_TILES = (
    *(GemmConfig(64, 32, 16, 8, 2), GemmConfig(64, 64, 32, 4, 3), GemmConfig(64, 64, 32, 8, 3)),
    *(GemmConfig(128, 64, 16, 8, 2), GemmConfig(32, 32, 16, 4, 2)),
)


# wgmma and tcgen05 want tiles of 128 x 64 of depth. This one makes two or three blocks on a multiprocessor where what
# stands beside the product leaves room for one of 128 x 128
_NARROW = GemmConfig(64, 128, 64, 4, 3)


def _clip(tile: int, size: int) -> int:
    return min(tile, max(16, next_power_of_2(size)))  # tl.dot wants at least 16


def _pick_gemm(
    rows: int, cols: int, depth: int, dtype: torch.dtype, arch: str, precision: str, epilogue: str
) -> GemmConfig:
    if arch == "interpreter":
        tile = GemmConfig(256, 512, 256, 4, 1)  # 0.27 s where 64 x 64 x 64 takes 4.4 s
    elif arch == "cpu":
        # deep and narrow: 64 columns of the weight stay in the L2 cache for 512 rows (measured: 5 to 10 % over
        # 256 x 256 x 128)
        tile = GemmConfig(512, 64, 1024, 1, 1)
    elif dtype == torch.float32 and precision == "ieee":
        tile = GemmConfig(64, 32, 16, 8, 2)
    elif dtype == torch.float32:
        # TF32: twice the bytes of bfloat16; an activation beside the weight gradient spills at four warps
        tile = GemmConfig(64, 64, 32, 8 if epilogue in ("elementwise", "branch") else 4, 3)
    elif _generation(arch) == "gfx":
        tile = GemmConfig(128, 128, 64, 8, 2) if epilogue == "none" else GemmConfig(128, 64, 64, 8, 2)
    elif _generation(arch) in ("sm_90", "sm_100"):
        # An epilogue in two parts keeps two blocks on a multiprocessor:
        # 137 registers or fewer instead of up to 210 (computed: fc1 + GELU 279 against 372 us on an H100, fc2 + residual
        # 187 against 264). Philox spills at 128 columns. 128 x 256 has one block: no faster (274 us)
        tile = GemmConfig(128, 64 if epilogue == "dropout" else 128, 64, 8, 3, parts=1 if epilogue == "none" else 2)
    else:
        # A100 (computed): two blocks on an SM, no spills. 128 x 128 leaves no registers beside the accumulator and
        # the operands; a Philox word per element takes more than a GELU
        sides = {"none": (128, 128), "elementwise": (128, 64), "branch": (128, 64), "dropout": (64, 64)}
        tile = GemmConfig(*sides[epilogue], 32, 4, 4)
    return _clipped(tile, rows, cols, depth)


def _clipped(tile: GemmConfig, rows: int, cols: int, depth: int) -> GemmConfig:
    sides = _clip(tile.rows, rows), _clip(tile.cols, cols)
    most = tile.max_registers if sides == (tile.rows, tile.cols) else 255  # a cap is of the whole tile
    return replace(tile, rows=sides[0], cols=sides[1], depth=_clip(tile.depth, depth), max_registers=most)


def _weighed_gemm(rows: int, cols: int, depth: int, dtype: torch.dtype) -> list[GemmConfig]:
    tiles = GEMM_FLOAT32_TILES if dtype == torch.float32 else GEMM_TILES
    return [_clipped(tile, rows, cols, depth) for tile in tiles]


def _tokens(m: int, arch: str) -> int:
    """``m`` for the interpreter only: on a GPU the tile must not depend on the batch."""
    return m if arch == "interpreter" else 2**30


def _weighed_linear_fwd(m, n, k, dtype, arch, precision, epilogue):
    return [*_weighed_gemm(_tokens(m, arch), n, k, dtype), VendorGemm()]


@tunable(GemmConfig, VendorGemm, weighed=_weighed_linear_fwd)
def pick_linear_fwd(
    m: int, n: int, k: int, dtype: torch.dtype, arch: str, precision: str, epilogue: str
) -> GemmConfig:
    """Tiles of ``linear_fwd_kernel`` ((m, k) -> (m, n)); ``epilogue``: what is done beside the product,
    "none", "elementwise" (an activation or a residual), "branch" (LayerScale or stochastic depth too) or "dropout"."""
    tile = _pick_gemm(_tokens(m, arch), n, k, dtype, arch, precision, epilogue)
    if dtype == torch.float32 or epilogue == "none":
        return tile
    if _generation(arch) == "sm_80":
        # A100 (computed), the epilogue in two parts. With eight warps it fits 128 registers, and two blocks an SM: bound
        # 0.96 of the tensor cores where 128 x 64 has 0.85. What needs more registers does not: one block, 116 us for
        # LayerScale and 555 for dropout where 128 x 64 takes 80 and 414
        cols, num_warps = (128, 8) if epilogue == "elementwise" else (64, 4)
        return replace(tile, rows=128, cols=_clip(cols, n), num_warps=num_warps, parts=2)
    if arch == "sm_90" and epilogue == "dropout":
        return _clipped(replace(_NARROW, parts=2, max_registers=168), 2**30, n, k)  # 200 us (128 x 64, eight warps: 236)
    if arch == "sm_90":
        return replace(tile, max_registers=128)  # of its own the compiler takes 137, and then one block fits, not two
    return tile


def _weighed_linear_bwd_input(m, n, k, dtype, arch, precision, epilogue):
    return [*_weighed_gemm(_tokens(m, arch), k, n, dtype), VendorGemm()]


@tunable(GemmConfig, VendorGemm, weighed=_weighed_linear_bwd_input)
def pick_linear_bwd_input(
    m: int, n: int, k: int, dtype: torch.dtype, arch: str, precision: str, epilogue: str
) -> GemmConfig:
    """Tiles of ``linear_bwd_input_kernel`` ((m, n) -> (m, k), depth n)."""
    tile = _pick_gemm(_tokens(m, arch), k, n, dtype, arch, precision, epilogue)
    if dtype == torch.float32 or epilogue == "none":
        return tile
    # the activation and its derivative at once: in one part they spill on an A100 (computed)
    if _generation(arch) == "sm_80":
        return replace(tile, parts=2)
    if arch == "sm_90" and epilogue == "branch":
        return _clipped(replace(_NARROW, parts=4, max_registers=168), 2**30, k, n)  # 39 us (one block of 128 x 128: 57)
    if arch == "sm_90":  # two blocks; dropout 193 us (64 columns: 236)
        return replace(tile, cols=_clip(128, k), parts=4, max_registers=128)
    return tile


def _in_parts(tile: GemmConfig, n: int, k: int) -> GemmConfig:
    """A weight has few tiles (768 x 768: 36) and the contraction is long: parts fill the GPU."""
    tiles = -(-n // tile.rows) * -(-k // tile.cols)
    return replace(tile, split=min(16, next_power_of_2(-(-216 // max(tiles, 1)))))  # two per SM of an A100


def _weighed_bwd_weight(m, n, k, dtype, arch, precision):
    return [_in_parts(tile, n, k) for tile in _weighed_gemm(n, k, _tokens(m, arch), dtype)]


def _weighed_linear_bwd_weight(m, n, k, dtype, arch, precision, epilogue):
    return [*_weighed_bwd_weight(m, n, k, dtype, arch, precision), VendorGemm()]


@tunable(GemmConfig, VendorGemm, weighed=_weighed_linear_bwd_weight)
def pick_linear_bwd_weight(
    m: int, n: int, k: int, dtype: torch.dtype, arch: str, precision: str, epilogue: str
) -> GemmConfig:
    """Tiles of ``linear_bwd_weight_kernel`` ((n, k), depth m), and in how many parts m is cut; ``epilogue``: "none",
    "elementwise" (the gradient of a bias) or "branch" (stochastic depth)."""
    tile = _pick_bwd_weight(m, n, k, dtype, arch, precision, epilogue)
    if dtype == torch.float32 or epilogue == "none" or _generation(arch) not in ("sm_90", "sm_100"):
        return tile
    if arch == "sm_90" and epilogue == "elementwise":  # two blocks: 149 us (one with 166 registers: 196)
        return tile if tile.rows * tile.cols < 128 * 128 else replace(tile, max_registers=128)
    narrow = _in_parts(_clipped(_NARROW, n, k, 2**30), n, k)
    if arch == "sm_90":  # 48 us (128 x 128: 62); what is smaller spills
        return tile if narrow.rows * narrow.cols < 64 * 128 else replace(narrow, max_registers=168)
    return narrow


def _pick_bwd_weight(
    m: int, n: int, k: int, dtype: torch.dtype, arch: str, precision: str, epilogue: str
) -> GemmConfig:
    if arch == "cpu":
        return GemmConfig(_clip(256, n), _clip(256, k), _clip(128, _tokens(m, arch)), 1, 1)
    tile = _pick_gemm(n, k, _tokens(m, arch), dtype, arch, precision, epilogue)
    return tile if arch == "interpreter" else _in_parts(tile, n, k)


# --- patch embedding ---------------------------------------------------------------------------------------

# As the GEMMs, with an epilogue always: the addresses of the gathered tile hold registers on top of the accumulator.


def _narrow_patches(patch_dim: int, dtype: torch.dtype, arch: str) -> bool:
    """On sm_100 patches of 14 spill in the narrow tile."""
    fits = arch == "sm_90" or _generation(arch) == "sm_100" and patch_dim % _NARROW.depth == 0
    return fits and dtype != torch.float32


def _weighed_patch_embed_fwd(m, dim, patch_dim, dtype, arch, precision):
    return _weighed_gemm(_tokens(m, arch), dim, patch_dim, dtype)


@tunable(GemmConfig, weighed=_weighed_patch_embed_fwd)
def pick_patch_embed_fwd(m: int, dim: int, patch_dim: int, dtype: torch.dtype, arch: str, precision: str) -> GemmConfig:
    """Tiles of ``patch_embed_fwd_kernel`` ((m, patch_dim) -> (m, dim))."""
    if arch == "cpu":  # wide: the patches are gathered and normalised again for every tile of columns
        return GemmConfig(256, _clip(256, dim), _clip(256, patch_dim), 1, 1)
    if _narrow_patches(patch_dim, dtype, arch):
        return _clipped(_NARROW, 2**30, dim, patch_dim)  # H100: 43 us, of bytes 89 (128 x 128: 64, 101)
    if _generation(arch) == "sm_80" and dtype != torch.float32:
        # A100: 153 us, of bytes 256. 128 x 64 (146, 244) spills where patches of 14 are read, or bytes without a norm
        return _clipped(GemmConfig(64, 64, 32, 4, 4), 2**30, dim, patch_dim)
    return _pick_gemm(_tokens(m, arch), dim, patch_dim, dtype, arch, precision, "elementwise")


def _weighed_patch_embed_bwd_image(m, dim, patch_dim, dtype, arch, precision):
    return _weighed_gemm(_tokens(m, arch), patch_dim, dim, dtype)


@tunable(GemmConfig, weighed=_weighed_patch_embed_bwd_image)
def pick_patch_embed_bwd_image(
    m: int, dim: int, patch_dim: int, dtype: torch.dtype, arch: str, precision: str
) -> GemmConfig:
    """Tiles of ``patch_embed_bwd_image_kernel`` ((m, dim) -> (m, patch_dim), depth dim)."""
    return _pick_gemm(_tokens(m, arch), patch_dim, dim, dtype, arch, precision, "elementwise")


@tunable(GemmConfig, weighed=_weighed_bwd_weight)
def pick_patch_embed_bwd_weight(
    m: int, dim: int, patch_dim: int, dtype: torch.dtype, arch: str, precision: str
) -> GemmConfig:
    """Tiles of ``patch_embed_bwd_weight_kernel`` ((dim, patch_dim), depth m), and in how many parts m is cut."""
    if _narrow_patches(patch_dim, dtype, arch):
        # H100, two blocks: 146 us, of bytes 134 (one of 128 x 128: 128, 139; held to 168 registers patches of 14 spill)
        return _in_parts(_clipped(_NARROW, dim, patch_dim, 2**30), dim, patch_dim)
    if _generation(arch) == "sm_80" and dtype != torch.float32:
        # A100: 255 us, of bytes 293 (with eight warps 348, 530). Left to itself the compiler spills for a third block
        return _in_parts(_clipped(GemmConfig(128, 64, 32, 4, 4, max_registers=248), dim, patch_dim, 2**30), dim, patch_dim)
    return _pick_bwd_weight(m, dim, patch_dim, dtype, arch, precision, "elementwise")
