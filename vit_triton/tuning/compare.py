"""Measure the compiled CPU kernels against PyTorch and write the speeds to a table: ``vit-triton tune --device cpu``.

A case is one operator with the sizes of ViT-B/16, in one dtype, with or without gradients, on a small or a large input.
It calls the function of :mod:`vit_triton.functional` with backend "torch" and "triton" in turn, and in inference also
with prepacked weights if the operator has weights.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_triton import functional as F
from vit_triton.arguments import Block
from vit_triton.packing import prepack
from vit_triton.speeds import table as speeds
from vit_triton.speeds.table import Key, Speed
from vit_triton.tuning.measure import Calls, interleaved, ratios
from vit_triton.tuning.progress import progress
from vit_triton.tuning.shapes import Shape

DTYPES = ("float32", "bfloat16")  # by default; PyTorch and the kernels both convert float16 on most CPUs
PRODUCTS = ("linear", "mlp", "patch_embed", "encoder")  # the operators with weights that can be packed
MODEL, IMAGE = "B", 224
# Batch sizes. The input of every operator has 151,296 elements per image, except 150,528 of patch_embed. The large
# batch of GEMMs is the smallest one that is not small, because they take most of the time.
SMALL, LARGE, LARGE_OF_PRODUCTS = 1, 8, 4
MIN_ROUNDS = 5

Function = Callable[..., Any]  # takes x, the parameters and backend=
Operator = Callable[[Shape], tuple[Tensor, Sequence[Tensor], Function]]


def cases(dtypes: Iterable[torch.dtype]) -> list[Key]:
    return [
        Key(op, dtype, gradients, small)
        for dtype in dtypes
        for op in speeds.OPS
        for gradients in (False, True)
        if not (gradients and op == "encoder")  # with gradients, an encoder calls the other operators
        for small in (True, False)
    ]


def calls(case: Key) -> Calls:
    """Return the calls to compare: "torch", "triton" and, for a product in inference, "prepacked"."""
    torch.manual_seed(0)
    batch = SMALL if case.small else LARGE_OF_PRODUCTS if case.op in PRODUCTS else LARGE
    x, parameters, function = _OPERATORS[case.op](Shape.of(MODEL, IMAGE, batch))
    x, model = x.to(case.dtype), nn.ParameterList(parameters).to(case.dtype).eval()
    run = _training if case.gradients else _inference
    found = {backend: run(function, x, model, backend) for backend in ("torch", "triton")}
    if case.op in PRODUCTS and not case.gradients:
        copy = nn.ParameterList(each.detach().clone() for each in model).eval()
        found["prepacked"] = run(function, x, prepack(copy), "triton")
    return found


def _inference(function: Function, x: Tensor, model: nn.Module, backend: str) -> Callable[[], Any]:
    kept = model, list(model.parameters())  # a deleted model is no longer prepacked

    def run() -> Any:
        with torch.no_grad():
            return function(x, *kept[1], backend=backend)

    return run


def _training(function: Function, x: Tensor, model: nn.Module, backend: str) -> Callable[[], Any]:
    """Return a call that computes the output and the gradients of all tensors."""
    leaves = [x.detach().requires_grad_(), *model.parameters()]
    gradient: list[Tensor] = []

    def run() -> Any:
        y = function(*leaves, backend=backend)
        y = y[0] if isinstance(y, tuple) else y
        if not gradient:
            gradient.append(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype))
        return torch.autograd.grad(y, leaves, gradient[0])

    return run


# --- operators ---------------------------------------------------------------------------------------------


def _tokens(shape: Shape) -> Tensor:
    return torch.randn(shape.batch, shape.tokens, shape.size.width)


def _weight(n: int, k: int) -> Tensor:
    return torch.randn(n, k) * k**-0.5


def _vectors(*sizes: int) -> list[Tensor]:
    return [torch.randn(size) for size in sizes]


def _linear(shape: Shape) -> tuple[Tensor, Sequence[Tensor], Function]:
    width = shape.size.width

    def function(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, b: Tensor, backend: str) -> Any:
        return F.linear(x, weight, bias, norm=(g, b, 1e-5), backend=backend)

    return _tokens(shape), [_weight(3 * width, width), *_vectors(3 * width, width, width)], function


def _mlp(shape: Shape) -> tuple[Tensor, Sequence[Tensor], Function]:
    width, hidden = shape.size.width, shape.size.hidden

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, g: Tensor, b: Tensor, backend: str) -> Any:
        return F.mlp(x, w1, b1, w2, b2, norm=(g, b, 1e-5), residual=x, backend=backend)

    weights = [_weight(hidden, width), *_vectors(hidden), _weight(width, hidden), *_vectors(width)]
    return _tokens(shape), [*weights, *_vectors(width, width)], function


def _attention(shape: Shape) -> tuple[Tensor, Sequence[Tensor], Function]:
    qkv = torch.randn(shape.batch, shape.tokens, 3, shape.size.heads, shape.head_dim)
    return qkv, [], F.attention_packed


def _layer_norm(shape: Shape) -> tuple[Tensor, Sequence[Tensor], Function]:
    return _tokens(shape), _vectors(shape.size.width, shape.size.width), F.layer_norm


def _add_layer_norm(shape: Shape) -> tuple[Tensor, Sequence[Tensor], Function]:
    def function(x: Tensor, residual: Tensor, g: Tensor, b: Tensor, backend: str) -> Any:
        return F.layer_norm(x, g, b, residual=residual, backend=backend)

    return _tokens(shape), [_tokens(shape), *_vectors(shape.size.width, shape.size.width)], function


def _patch_embed(shape: Shape) -> tuple[Tensor, Sequence[Tensor], Function]:
    width, patch = shape.size.width, shape.size.patch
    pixels = 3 * patch**2

    def function(image: Tensor, weight: Tensor, *vectors: Tensor, backend: str) -> Any:
        bias, g1, b1, g2, b2, pos, prefix = vectors
        norms: dict[str, Any] = dict(pre_norm=(g1, b1, 1e-5), post_norm=(g2, b2, 1e-5))
        return F.patch_embed(image, weight, bias, patch_size=patch, **norms, pos=pos, prefix=prefix, backend=backend)

    image = torch.randn(shape.batch, 3, shape.image, shape.image)
    vectors = [*_vectors(width, pixels, pixels, width, width), torch.randn(shape.tokens - 1, width)]
    return image, [_weight(width, pixels), *vectors, torch.randn(1, width)], function


def _encoder(shape: Shape) -> tuple[Tensor, Sequence[Tensor], Function]:
    """Return one block."""
    width, hidden = shape.size.width, shape.size.hidden

    def function(x: Tensor, *parameters: Tensor, backend: str) -> Any:
        g1, b1, qkv, out, out_bias, g2, b2, *mlp = parameters
        block = Block((g1, b1, 1e-5), qkv, None, out, out_bias, (g2, b2, 1e-5), *mlp)
        return F.encoder(x, [block], heads=shape.size.heads, backend=backend)

    attention = [*_vectors(width, width), _weight(3 * width, width), _weight(width, width), *_vectors(width)]
    mlp = [_weight(hidden, width), *_vectors(hidden), _weight(width, hidden), *_vectors(width)]
    return _tokens(shape), [*attention, *_vectors(width, width), *mlp], function


_OPERATORS: dict[str, Operator] = {
    "linear": _linear,
    "mlp": _mlp,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "patch_embed": _patch_embed,
    "encoder": _encoder,
}


# --- measuring ---------------------------------------------------------------------------------------------

HEADER = f"{'':50}{'PyTorch':>11}{'kernels':>9}{'prepacked':>11}"


def compare(every: Iterable[Key], seconds: float) -> Iterator[tuple[Key, Speed]]:
    """Measure the speed of each case for about ``seconds`` per call, and print a line for each."""
    print(HEADER, flush=True)
    for case in every:
        compared = calls(case)
        rounds = interleaved(compared, seconds * len(compared), MIN_ROUNDS)
        speed = Speed(*(round(ratios(rounds, name)["torch"], 3) for name in ("triton", "prepacked") if name in rounds))
        print(_line(case, 1e3 * statistics.median(rounds["torch"]), speed), flush=True)
        yield case, speed


def format_arguments(case: Key) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    step = "forward+backward" if case.gradients else "forward"
    return f"{case.op} {step}, {dtype}, {'small' if case.small else 'large'}"


def _line(case: Key, milliseconds: float, speed: Speed) -> str:
    prepacked = f"{speed.prepacked:10.2f}x" if speed.prepacked else ""
    return f"{format_arguments(case):50}{milliseconds:8.2f} ms{speed.kernels:8.2f}x{prepacked}"


def write(path: Path, cpu: str, measured: Iterable[tuple[Key, Speed]], total: int) -> bool:
    """Write the measurements to a table, also if they are interrupted.

    Cases of an existing table that were not measured again are kept if it has the same kind of CPU, threads and
    versions.

    Returns:
        Whether all measurements were made.
    """
    new: dict[Key, Speed] = {}
    old = speeds.read(path) if path.exists() else None
    with progress(total) as bar:
        for case, speed in measured:
            new[case] = speed
            bar.advance(format_arguments(case))
    table = speeds.new_table(cpu, new)
    if old is not None and all(getattr(old, name) == getattr(table, name) for name in _SAME):
        table = speeds.new_table(cpu, {**old.speeds, **new})
    if new:
        speeds.write(path, table)
        print(f"written: {path}")
    return bar.complete


_SAME = ("cpu", "threads", "triton", "torch")
