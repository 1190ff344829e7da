"""Python time per call, from a public function to its launches, on the GPU code path.

At batch 1 this time limits the latency. Kernels are compiled for sm_90; each launch runs up to the driver call, which
does nothing. Each round also times the same launches through Triton's own launcher, ``kernel[grid](...)``; the
difference is the library's overhead. Times are CPU times of the thread, and the minimum over all rounds is reported,
because other load only adds time. Training is a forward and a backward pass; an empty autograd Function shows PyTorch's
share. Tensors are narrow, so that the PyTorch operators between the launches, which do run, add little; Python time
does not depend on their size.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import gpu_path, options
from benchmarks.runner import describe, disable_memory_trim, machine, write_json
from vit_triton import functional as F
from vit_triton import ops
from vit_triton.cli.arguments import positive
from vit_triton.kernels import launch
from vit_triton.models import ViT
from vit_triton.modules import Transformer
from vit_triton.tuning.progress import progress
from vit_triton.tuning.shapes import DTYPES

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Input sizes at batch 1. Two heads: a block with one head of full width has no output projection."""

    tokens: int = 197
    width: int = 128
    heads: int = 2
    patch: int = 4

    @property
    def image(self) -> int:
        return round((self.tokens - 1) ** 0.5) * self.patch


SHAPE = Shape()


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a call, and of its ``launches`` through Triton's own launcher."""

    name: str
    mode: str
    launches: int
    call: float
    triton: float

    @property
    def above(self) -> float:
        return self.call - self.triton


# --- measured calls ----------------------------------------------------------------------------------------


def operators(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any], list[Tensor]]]:
    """(name, function, tensors) of every public function, with the shapes of a ViT at batch 1. In training the tensors
    require gradients."""

    def rand(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    n, width, heads = shape.tokens, shape.width, shape.heads
    head_dim, hidden, pixels = width // heads, 4 * width, 3 * shape.patch**2
    kw: dict[str, Any] = dict(backend="triton")

    def norm_linear(x, w, b, g, h):
        return F.linear(x, w, b, norm=(g, h, 1e-5), **kw)

    def mlp(x, w1, b1, w2, b2, g, h):
        return F.mlp(x, w1, b1, w2, b2, norm=(g, h, 1e-5), residual=x, **kw)

    def patch_embed(image, w, b, g, h, g2, h2, pos, prefix):
        norms = dict(pre_norm=(g, h, 1e-5), post_norm=(g2, h2, 1e-5))
        return F.patch_embed(image, w, b, patch_size=shape.patch, **norms, pos=pos, prefix=prefix, **kw)

    def encoder(x, g, h, qkv, out, out_bias, g2, h2, w1, b1, w2, b2):
        block = F.Block((g, h, 1e-5), qkv, None, out, out_bias, (g2, h2, 1e-5), w1, b1, w2, b2)
        return F.encoder(x, [block], heads=heads, **kw)

    x, vector = rand(1, n, width), rand(width)
    mlp_tensors = [rand(hidden, width), rand(hidden), rand(width, hidden), rand(width)]
    yield "layer_norm", lambda x, g, h: F.layer_norm(x, g, h, **kw), [x, vector, rand(width)]
    yield "linear", lambda x, w, b: F.linear(x, w, b, **kw), [x, rand(width, width), vector]
    yield "linear, norm", norm_linear, [x, rand(3 * width, width), rand(3 * width), vector, rand(width)]
    yield "mlp", mlp, [x, *mlp_tensors, vector, rand(width)]
    yield "attention", lambda q, k, v: F.attention(q, k, v, **kw), [rand(1, n, heads, head_dim) for _ in range(3)]
    yield "attention_packed", lambda qkv: F.attention_packed(qkv, **kw), [rand(1, n, 3, heads, head_dim)]
    embedding = [rand(width, pixels), vector, rand(pixels), rand(pixels), rand(width), rand(width)]
    positions = [rand(n - 1, width), rand(1, width)]
    yield "patch_embed", patch_embed, [rand(1, 3, shape.image, shape.image), *embedding, *positions]
    attention = [vector, rand(width), rand(3 * width, width), rand(width, width), rand(width)]
    yield "encoder, 1 block", encoder, [x, *attention, rand(width), rand(width), *mlp_tensors]


def modules(shape: Shape, dtype: torch.dtype, depth: int = 12) -> Iterator[tuple[str, nn.Module, Tensor]]:
    width, heads = shape.width, shape.heads
    size = dict(dim=width, heads=heads, dim_head=width // heads, mlp_dim=4 * width, backend="triton")
    x = torch.zeros(1, shape.tokens, width, dtype=dtype)
    yield "block and norm", Transformer(depth=1, **size).to(dtype), x
    image = torch.zeros(1, 3, shape.image, shape.image, dtype=dtype)
    sides = dict(image_size=shape.image, patch_size=shape.patch, num_classes=1000)
    yield f"ViT, {depth} blocks", ViT(**sides, depth=depth, **size).to(dtype), image


class _Nothing(torch.autograd.Function):
    """An empty Function: saves two tensors and returns a gradient for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


def calls(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, str, Call]]:
    """(name, "inference" or "training", call)"""
    nothing = torch.zeros(1, shape.tokens, shape.width, dtype=dtype), [torch.zeros(shape.width, dtype=dtype)]
    yield from _both("empty Function", _Nothing.apply, *nothing)
    for name, function, (x, *tensors) in operators(shape, dtype):
        yield from _both(name, function, x, tensors)
    for name, module, x in modules(shape, dtype):
        yield from _both(name, lambda x, *parameters, module=module: module(x), x, list(module.parameters()))


def _both(name: str, function: Callable[..., Any], x: Tensor, tensors: list[Tensor]) -> Iterator[tuple[str, str, Call]]:
    leaves = [tensor.requires_grad_() for tensor in ([x, *tensors] if x.dim() != 4 or "attention" in name else tensors)]
    dy: list[Tensor] = []

    def training() -> Any:
        y = function(x, *tensors)
        if not dy:
            dy.append(torch.zeros_like(y))
        return torch.autograd.grad(y, leaves, dy[0])

    yield name, "inference", lambda: function(x, *tensors)
    yield name, "training", training


# --- measuring ---------------------------------------------------------------------------------------------


def launches_of(call: Call) -> list[tuple[Any, Any, dict[str, Any]]]:
    """(kernel, grid, arguments) of each launch of ``call``; runs within ``gpu_path.use_gpu_path()``."""
    seen: list[tuple[Any, Any, dict[str, Any]]] = []
    start = launch.start

    def note(kernel: Any, grid: Any, device: Any, arguments: dict[str, Any]) -> None:
        seen.append((kernel, grid, arguments))
        start(kernel, grid, device, arguments)

    with launch.override_start(note), ops.override_run(ops.run_directly):
        call()
    return seen


def measure(name: str, mode: str, call: Call, rounds: int) -> Overhead:
    with torch.set_grad_enabled(mode == "training"):
        return _measure(name, mode, call, rounds)


def _measure(name: str, mode: str, call: Call, rounds: int) -> Overhead:
    launches = launches_of(call)

    def triton() -> None:
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments, enable_fp_fusion=True)

    best = [float("inf")] * 2
    for each in (call, triton):
        for _ in range(3):
            each()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for i, each in enumerate((call, triton)):
                start = time.thread_time_ns()
                each()
                best[i] = min(best[i], time.thread_time_ns() - start)
    finally:
        gc.enable()
    return Overhead(name, mode, len(launches), best[0] / 1e3, best[1] / 1e3)


# --- the command -------------------------------------------------------------------------------------------


def table(results: list[Overhead]) -> Table:
    made = Table()
    made.add_column("call")
    for heading in ("mode", "launches", "us", "us of Triton's launcher", "us above it"):
        made.add_column(heading, justify="right")
    for each in results:
        times = (f"{value:.1f}" for value in (each.call, each.triton, each.above))
        made.add_row(each.name, each.mode, str(each.launches), *times)
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--rounds", type=positive, default=1000, help="rounds per call; the minimum is shown; default: 1000"
    )
    options.add_only(parser, "calls")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    head = {"machine": machine(), **options.as_json(args), **asdict(SHAPE)}
    print(describe(head["machine"]))
    print(f"{SHAPE}; Python time, no kernel ran; excludes the guard of the current device")
    torch.set_num_threads(1)
    disable_memory_trim()  # as PyTorch's CUDA allocator does
    results: list[Overhead] = []
    with gpu_path.use_gpu_path():
        chosen = options.filter_by_name(calls(SHAPE, DTYPES[args.dtype]), args.only, lambda call: call[0])
        with progress(len(chosen)) as bar:
            for name, mode, call in chosen:
                results.append(measure(name, mode, call, args.rounds))
                if args.json:
                    shown = [{**asdict(each), "above": each.above} for each in results]
                    write_json(args.json, {**head, "results": shown})
                bar.advance(f"{name}, {mode}")
    Console(width=100).print(table(results))
    if not bar.complete:
        raise SystemExit(130)
