"""Computed times of ViT-B/16's kernels, and of other head sizes and sequence lengths."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.codegen import sass, workloads
from benchmarks.codegen.cost import COSTS, OTHER_TRIPS, Arguments, min_bytes
from benchmarks.codegen.driver import compile_for
from benchmarks.codegen.figures import DTYPES, precision, tensor_columns
from benchmarks.codegen.gpus import GPUS
from benchmarks.codegen.model import Times, times
from benchmarks.codegen.program import Kernel
from benchmarks.codegen.workloads import HIDDEN, TOKENS, WIDTH

BATCH = 128


@dataclass(frozen=True)
class Case:
    """The launch of ``kernel`` within ``call`` whose arguments include ``where``."""

    name: str
    kernel: str
    call: Callable[[torch.dtype], None]
    where: Arguments = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _attention(n_tokens: int, head_dim: int) -> Callable[[torch.dtype], None]:
    return functools.partial(workloads.packed_attention, batch=BATCH, n_tokens=n_tokens, head_dim=head_dim)


def _mlp(**options: Any) -> Callable[[torch.dtype], None]:
    return functools.partial(workloads.residual_mlp, batch=BATCH, **options)


def _branch() -> Callable[[torch.dtype], None]:
    return functools.partial(workloads.scaled_linear, batch=BATCH)


def _patches(from_bytes: bool) -> Callable[[torch.dtype], None]:
    return functools.partial(workloads.patches_of_images, batch=BATCH, from_bytes=from_bytes)


def _cases() -> Iterator[Case]:
    for head_dim, n_tokens in (
        *((64, n) for n in (TOKENS, 257, 570, 577, 1025)),
        *((72, TOKENS), (80, TOKENS), (96, TOKENS), (80, 257), (88, 257), (128, 257)),
    ):
        yield Case(
            f"attention, {n_tokens} tokens, heads of {head_dim}",
            "attention_fwd_kernel",
            _attention(n_tokens, head_dim),
        )
    for n_tokens in (TOKENS, 577):
        for gradients, kernel in (("dq", "attention_bwd_dq_kernel"), ("dk and dv", "attention_bwd_dkdv_kernel")):
            yield Case(f"{gradients}, {n_tokens} tokens, heads of 64", kernel, _attention(n_tokens, 64))

    dropped = functools.partial(workloads.packed_attention, batch=BATCH, n_tokens=TOKENS, head_dim=64, dropout_p=0.1)
    for name, kernel in (
        ("", "attention_fwd_kernel"),
        (": dq", "attention_bwd_dq_kernel"),
        (": dk and dv", "attention_bwd_dkdv_kernel"),
    ):
        yield Case(f"attention with dropout{name}", kernel, dropped)

    biased = functools.partial(workloads.biased_attention, batch=BATCH, n_tokens=201)
    for name, kernel in (
        ("", "attention_fwd_kernel"),
        (": dq", "attention_bwd_dq_kernel"),
        (": dk and dv", "attention_bwd_dkdv_kernel"),
        (": dbias", "attention_bwd_bias_kernel"),
    ):
        yield Case(f"attention with bias, 201 tokens{name}", kernel, biased)
    for name, cosine in (("window attention", False), ("cosine window attention", True)):
        swin = functools.partial(workloads.swin_attention, batch=BATCH, side=56, heads=3, window=7, cosine=cosine)
        yield Case(f"{name}, Swin-T", "window_attention_fwd_kernel", swin)
        yield Case(f"{name}, Swin-T, gradients", "window_attention_bwd_kernel", swin)
    for layout in ("half", "interleaved"):
        rotary = functools.partial(workloads.rotary_attention, batch=BATCH, n_tokens=201, layout=layout)
        yield Case(f"rotation of q and k, {layout}", "rotary_kernel", rotary, {"TRANSPOSED": False})

    for name, rotation in (("", None), (" + rotation, half", "half"), (" + rotation, interleaved", "interleaved")):
        projection = functools.partial(workloads.qkv_projection, batch=BATCH, n_tokens=201, layout=rotation)
        yield Case(f"qkv projection{name}", "linear_fwd_kernel", projection)

    wide, narrow = {"N": HIDDEN}, {"N": WIDTH}
    inference, training = _mlp(training=False), _mlp()
    yield Case("fc1", "linear_fwd_kernel", functools.partial(workloads.linear_alone, batch=BATCH), wide)
    yield Case("fc1 + GELU, inference", "linear_fwd_kernel", inference, wide)
    yield Case("fc1 + GELU, training", "linear_fwd_kernel", training, wide)
    yield Case("fc2 + residual", "linear_fwd_kernel", inference, narrow)
    yield Case("gradient of fc1's input", "linear_bwd_input_kernel", training, wide)
    yield Case("gradient of fc2's input, with GELU", "linear_bwd_input_kernel", training, narrow)
    yield Case("gradient of fc1's weight and bias", "linear_bwd_weight_kernel", training, wide)
    yield Case("gradient of fc2's weight and bias", "linear_bwd_weight_kernel", training, narrow)
    yield Case("fc2 + LayerScale + residual", "linear_fwd_kernel", _branch())
    yield Case("gradient of fc2's input, with LayerScale", "linear_bwd_input_kernel", _branch())
    yield Case("gradient of fc2's weight, with LayerScale", "linear_bwd_weight_kernel", _branch())
    dropped = _mlp(hidden_dropout_p=0.1, dropout_p=0.1)
    product = {"MULTIPLIED": False}
    yield Case("fc1 + GELU + dropout, training", "linear_fwd_kernel", dropped, {**wide, **product})
    yield Case("fc2 + dropout + residual", "linear_fwd_kernel", dropped, {**narrow, **product})
    yield Case("gradient of fc2's input, with GELU and dropout", "linear_bwd_input_kernel", dropped, narrow)
    yield Case("dropout of the gradient behind fc2", "linear_fwd_kernel", dropped, {"MULTIPLIED": True})
    for source, from_bytes in (("floats", False), ("bytes", True)):
        yield Case(f"patch embedding from {source}", "patch_embed_fwd_kernel", _patches(from_bytes))
        yield Case(
            f"patch embedding from {source}: weight's gradient", "patch_embed_bwd_weight_kernel", _patches(from_bytes)
        )


CASES = tuple(_cases())


@dataclass(frozen=True)
class Row:
    """Computed times of a case on a GPU, and the figures of its launch."""

    case: str
    kernel: str
    gpu: str
    dtype: str
    tile: str
    grid: int
    registers: int
    times: Times

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def row(gpu: str, dtype: str, case: Case) -> Row:
    with compile_for(GPUS[gpu].arch, case.kernel) as found, precision(dtype):
        case.call(DTYPES[dtype])
    launches = [
        (each.kernel, grid, arguments)
        for each in found
        for grid, arguments in each.launches
        if all(arguments[name] == value for name, value in case.where.items())
    ]
    ((compiled, grid, arguments),) = launches
    registers, computed = price(gpu, compiled, grid, arguments)
    return Row(case.name, case.kernel, gpu, dtype, tile_of(arguments), grid, registers, computed)


def price(gpu: str, compiled: Any, grid: int, arguments: Arguments) -> tuple[int, Times]:
    """Registers of a compiled kernel, and the times of a launch of it."""
    key = gpu, compiled.hash
    if key not in _kernels:
        _kernels[key] = _read(gpu, compiled)
    registers, blocks, kernel = _kernels[key]
    flops, trips = COSTS[compiled.name]
    others = OTHER_TRIPS.get(compiled.name, lambda a: 1)
    return registers, times(
        kernel,
        grid,
        kernel.trips(trips(arguments), others(arguments)),
        blocks,
        flops=flops(arguments) if kernel.multiplies else 0,
        n_bytes=min_bytes(compiled.name, arguments),
    )


# results of _read by GPU and hash: a :class:`.Kernel` keeps the results of its replays
_kernels: dict[tuple[str, str], tuple[int, int, Kernel]] = {}


def _read(gpu: str, compiled: Any) -> tuple[int, int, Kernel]:
    """Registers, resident blocks and machine code of a compiled kernel."""
    metadata = compiled.metadata
    registers, _, code = sass.read(compiled)
    blocks, _ = GPUS[gpu].architecture.resident(
        registers, metadata.num_warps, metadata.shared, tensor_columns(compiled)
    )
    return registers, blocks, Kernel(code, metadata.num_warps, GPUS[gpu])


def tile_of(arguments: Arguments) -> str:
    return "x".join(str(arguments[name]) for name in arguments if name.startswith("BLOCK_"))


HEADER = (
    f"{'case':<48}{'GPU':<6}{'dtype':<10}{'tile':<12}{'grid':>6}{'regs':>5}{'CTAs':>5}{'tensor':>7} {'busiest':<14}"
    f"{'bound':>8}{'replay':>8}{'limit':>8}"
)


def line(row: Row) -> str:
    """A printed line, with times in microseconds."""
    t = row.times
    share = "-" if t.tensor_share is None else f"{t.tensor_share:.2f}"
    replayed = "-" if t.replayed is None else f"{1e6 * t.replayed:.0f}"
    return (
        f"{row.case:<48}{row.gpu:<6}{row.dtype:<10}{row.tile:<12}{row.grid:>6}{row.registers:>5}{t.blocks:>5}{share:>7}"
        f" {t.pipe:<14}{1e6 * t.bound:>8.0f}{replayed:>8}{1e6 * t.limit:>8.0f}"
    )
