"""Checks of every operator, forward and backward, against float64; memory, CUDA graphs, streams and the sanitizer.

The allowed relative L2 error of a result is 16 eps, or twice the error of PyTorch's operators in the same dtype if that
is larger.
"""

import functools
import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.step import SEED, Context, Skip, Step, WrongNumbers, needs_gpu
from benchmarks.runner import TOLERANCE, limits
from vit_triton import ViT
from vit_triton import functional as F
from vit_triton.tuning.measure import errors, flat
from vit_triton.tuning.shapes import DTYPES

Select = Callable[[Any, Any], Any]  # Context.at
Make = Callable[[Select], list[Tensor]]


@dataclass(frozen=True)
class Check:
    """A check of an operator.

    ``function`` takes the tensors of ``inputs``, and ``backend=``. ``kernels``: number of kernels compiled per dtype,
    forward and backward. ``expanded``: the incoming gradient has stride 0, as in .sum().backward().
    """

    name: str
    inputs: Make
    function: Callable[..., Any]
    kernels: int
    expanded: bool = False

    def step(self, dtype: str) -> Step:
        run = functools.partial(_check, self, DTYPES[dtype])
        return Step(f"{self.name}, {dtype}", run, seconds=0.5, kernels=self.kernels)


# --- the operators -----------------------------------------------------------------------------------------


def _qkv(tokens: int, heads: int, head_dim: int, batch: int = 4) -> Make:
    return lambda select: [
        torch.randn(select(batch, 1), select(tokens, min(tokens, 19)), 3, select(heads, min(heads, 2)), head_dim)
    ]


def _packed(qkv: Tensor, backend: str) -> Any:
    return F.attention_packed(qkv, backend=backend)


def _cross(queries: int, keys: int, heads: int, head_dim: int) -> Make:
    """Views (B, N, H, D) of tensors (B, H, N, D)."""

    def make(select: Select) -> list[Tensor]:
        batch, h = select(4, 1), select(heads, 2)
        lengths = [select(n, min(n, 19)) for n in (queries, keys, keys)]
        return [torch.randn(batch, h, n, head_dim).transpose(1, 2) for n in lengths]

    return make


def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Any:
    return F.attention(q, k, v, return_lse=True, backend=backend)


def _normed(norm_type: str, qkv: Tensor, *norms: Tensor, backend: str) -> Any:
    """The keys' norm has no bias: its gradient is zero, because it shifts all scores of a row equally."""
    q_weight, *q_bias, k_weight = norms
    q_norm, k_norm = (q_weight, *(q_bias or [None]), 1e-6), (k_weight, None, 1e-6)
    return F.attention_packed(qkv, q_norm=q_norm, k_norm=k_norm, norm_type=norm_type, backend=backend)


def _normed_qkv(parameters: int) -> Make:
    return lambda select: [*_qkv(197, 12, 64)(select), *(torch.randn(64) for _ in range(parameters))]


def _rows(width: int, *others: tuple[int, ...], rows: int = 8 * 197) -> Make:
    """x (rows, width) and tensors of the shapes ``others``, where -1 stands for ``rows``."""

    def make(select: Select) -> list[Tensor]:
        n = select(rows, min(rows, 21))
        made = [torch.randn(n, width)]
        for first, *rest in others:
            scale = rest[0] ** -0.5 if rest and first != -1 else 1.0  # weights only
            made.append(torch.randn(n if first == -1 else first, *rest) * scale)
        return made

    return make


def _small(make: Callable[[Callable[[int], int]], Make]) -> Make:
    """Divide the widths by 8 if sizes are tiny."""
    return lambda select: make(lambda width: select(width, max(8, width // 8)))(select)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Any:
    return F.layer_norm(x, weight, bias, backend=backend)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Any:
    return F.layer_norm(x, weight, bias, residual=residual, backend=backend)


def _columns(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Any:
    """LayerNorm of every second row and column of x."""
    return F.layer_norm(x[::2, ::2], weight, bias, backend=backend)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Any:
    return F.linear(x, weight, bias, backend=backend)


def _norm_linear(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, b: Tensor, backend: str) -> Any:
    return F.linear(x, weight, bias, norm=(g, b, 1e-6), backend=backend)


def _branch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, backend: str) -> Any:
    return F.linear(x, weight, bias, residual=residual, layer_scale=scale, backend=backend)


def _mlp(
    activation: str, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *norm: Tensor, backend: str
) -> Any:
    residual = x if norm else None
    parameters = (*norm, 1e-6) if norm else None
    return F.mlp(x, w1, b1, w2, b2, norm=parameters, activation=activation, residual=residual, backend=backend)


def _mlp_inputs(width: int, hidden: int, norm: bool = False, gated: bool = False) -> Make:
    def make(size: Callable[[int], int]) -> Make:
        k, n = size(width), size(hidden)
        rows = 2 * n if gated else n
        return _rows(k, (rows, k), (rows,), (k, n), (k,), *([(k,), (k,)] if norm else []))

    return _small(make)


def _image(patch: int, side: int, width: int, *, floats: bool) -> Make:
    def make(select: Select) -> list[Tensor]:
        batch, pixels, d = select(4, 1), select(side, 2 * patch), select(width, 24)
        shape = (batch, 3, pixels, pixels)
        image = torch.randn(shape) if floats else torch.randint(256, shape, dtype=torch.uint8)
        size = 3 * patch**2
        parameters = [torch.randn(d, size) * size**-0.5, torch.randn(d)]
        return [image, *parameters, torch.randn((pixels // patch) ** 2 + 1, d), torch.randn(1, d)]

    return make


def _embed(patch: int, image: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor, backend: str) -> Any:
    norm = {} if image.is_floating_point() else dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    order = "c p1 p2"  # order of a convolution's weight
    return F.patch_embed(
        image, weight, bias, patch_size=patch, patch_order=order, pos=pos[1:], prefix=prefix, backend=backend, **norm
    )


def _stem(
    image: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor, *norms: Tensor, backend: str
) -> Any:
    """vit_pytorch's stem, with both norms, on a channels-last image."""
    g1, b1, g2, b2 = norms
    image = image.contiguous(memory_format=torch.channels_last)
    options = dict(patch_size=16, pre_norm=(g1, b1, 1e-5), post_norm=(g2, b2, 1e-5), pos=pos[1:], prefix=prefix)
    return F.patch_embed(image, weight, bias, backend=backend, **options)


def _stem_inputs(select: Select) -> list[Tensor]:
    made = _image(16, 224, 768, floats=True)(select)
    size, width = made[1].shape[1], made[1].shape[0]
    return [*made, *(torch.randn(n) for n in (size, size, width, width))]


OPERATORS = (
    Check("attention of ViT-B/16", _qkv(197, 12, 64), _packed, 5),
    Check("layer_norm of ViT-B/16", _rows(768, (768,), (768,)), _layer_norm, 4),
    Check("add + layer_norm of ViT-B/16", _rows(768, (-1, 768), (768,), (768,)), _add_layer_norm, 4),
    Check(
        "norm + qkv of ViT-B/16",
        _small(lambda s: _rows(s(768), (s(2304), s(768)), (s(2304),), (s(768),), (s(768),))),
        _norm_linear,
        9,
    ),
    Check(
        "projection + LayerScale + residual of ViT-B/16",
        _small(lambda s: _rows(s(768), (s(768), s(768)), (s(768),), (-1, s(768)), (s(768),))),
        _branch,
        4,
    ),
    Check("mlp of ViT-B/16, norm and residual", _mlp_inputs(768, 3072, norm=True), functools.partial(_mlp, "gelu"), 12),
    Check(
        "patch_embed of ViT-B/16", _image(16, 224, 768, floats=True), functools.partial(_embed, 16), 4, expanded=True
    ),
    Check("patch_embed of ViT-B/16, uint8", _image(16, 224, 768, floats=False), functools.partial(_embed, 16), 3),
    Check("patch_embed of vit_pytorch, channels last", _stem_inputs, _stem, 10),
    Check("classifier of ViT-B/16", _small(lambda s: _rows(s(768), (1000, s(768)), (1000,), rows=8)), _linear, 5),
    Check("attention, 257 tokens, heads of 80", _qkv(257, 16, 80), _packed, 5),
    Check("attention, 1370 tokens, heads of 64", _qkv(1370, 6, 64, batch=2), _packed, 5, expanded=True),
    Check("attention, 577 tokens, heads of 72", _qkv(577, 16, 72), _packed, 5),
    Check("attention of views, heads of 88", _cross(257, 257, 16, 88), _attention, 4),
    Check("attention, 1 query and 197 keys", _cross(1, 197, 12, 64), _attention, 4),
    Check("attention, 1 token, heads of 128", _qkv(1, 16, 128), _packed, 5),
    Check("attention, 50 tokens, heads of 192", _qkv(50, 4, 192), _packed, 5),
    Check("attention, LayerNorm of q and k", _normed_qkv(3), functools.partial(_normed, "layer_norm"), 8),
    Check("attention, RMSNorm of q and k", _normed_qkv(2), functools.partial(_normed, "rms_norm"), 8),
    Check("mlp of SO400M, tanh GELU", _mlp_inputs(1152, 4304), functools.partial(_mlp, "gelu_tanh"), 6),
    Check("mlp, SwiGLU", _mlp_inputs(1536, 4096, gated=True), functools.partial(_mlp, "swiglu"), 5),
    Check("patch_embed of DINOv2, 518 pixels", _image(14, 518, 384, floats=True), functools.partial(_embed, 14), 4),
    Check("layer_norm of columns with gaps", _rows(1408, (704,), (704,), rows=394), _columns, 4),
    Check("layer_norm, one row", _rows(1000, (1000,), (1000,), rows=1), _layer_norm, 3, expanded=True),
    Check("linear, odd widths", _rows(197, (333, 197), (333,), rows=77), _linear, 4, expanded=True),
    Check("linear, one row", _rows(768, (10, 768), (10,), rows=1), _linear, 5),
    Check("linear, no rows", _rows(64, (32, 64), (32,), rows=0), _linear, 2),
)


def _both(function: Callable[..., Any], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """{name: tensor}: results in inference, results in training, gradients of all floating inputs."""
    with torch.no_grad():
        inference = flat(function(*inputs))
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    made = function(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    wanted = [(i, x) for i, x in enumerate(leaves) if x.requires_grad]
    found = torch.autograd.grad(outputs, [x for _, x in wanted], list(gradients))
    return {
        **{f"inference result {i}": x for i, x in enumerate(inference)},
        **{f"result {i}": x.detach() for i, x in enumerate(outputs)},
        **{f"gradient of input {i}": x for (i, _), x in zip(wanted, found, strict=True)},
    }


def _made(check: Check, dtype: torch.dtype, context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, and gradients in the dtypes of the results: a log-sum-exp is float32."""
    with torch.device(context.device):
        inputs = _cast(check.inputs(context.select), dtype)
        with torch.no_grad():
            results = flat(check.function(*inputs, backend="torch"))
        gradients = [torch.randn(1 if check.expanded else y.shape).to(y.dtype).expand(y.shape) for y in results]
    return inputs, gradients


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]


def _check(check: Check, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    inputs, gradients = _made(check, dtype, context)
    # with "auto", a GPU may compute the products with the vendor's GEMM
    backends = {"": "triton", ", auto": "auto"} if context.device == "cuda" else {"": "triton"}

    def run(backend: str) -> dict[str, Tensor]:
        return _both(functools.partial(check.function, backend=backend), inputs, gradients)

    def ours() -> dict[str, Tensor]:
        return {name + suffix: x for suffix, backend in backends.items() for name, x in run(backend).items()}

    def twice(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name + suffix: x for suffix in backends for name, x in results.items()}

    pytorch = functools.partial(check.function, backend="torch")
    exact = twice(_both(pytorch, _cast(inputs, torch.float64), _cast(gradients, torch.float64)))
    return check_results(ours(), ours(), exact, lambda: twice(run("torch")), dtype)


def check_results(
    found: dict[str, Tensor],
    again: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: Callable[[], dict[str, Tensor]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Compare ``found`` with ``exact``, and bitwise with ``again``; ``plain`` returns PyTorch's results.

    Returns the facts of a step, or raises :class:`WrongNumbers`.
    """
    error = dict(zip(exact, errors(list(found.values()), list(exact.values())), strict=True))
    peers = dict(zip(exact, errors(list(plain().values()), list(exact.values())), strict=True))
    limit = dict(zip(exact, limits(peers.values(), dtype), strict=True))
    wrong = {name: e for name, e in error.items() if not e <= limit[name]}
    # NaN counts as the largest error
    worst = max(error, key=lambda name: (error[name] != error[name], error[name] / limit[name]), default=None)
    facts = {"errors": error, "pytorch": peers, "worst": worst}
    if wrong:
        messages = (f"{name}: error {e:.1e}, PyTorch's {peers[name]:.1e}" for name, e in wrong.items())
        raise WrongNumbers("; ".join(messages), **facts)
    differs = [name for name, x in found.items() if not torch.equal(x, again[name])]
    if differs:
        raise WrongNumbers(f"two equal calls differ in bits: {', '.join(differs)}", **facts)
    if worst is None or not any(x.numel() for x in found.values()):
        return {"line": "no elements", **facts}
    return {"line": f"{worst}: error {error[worst]:.1e}, PyTorch's {peers[worst]:.1e}; bitwise reproducible", **facts}


# --- whole models, dropout ---------------------------------------------------------------------------------


def _vit(context: Context, backend: str, dtype: torch.dtype) -> ViT:
    torch.manual_seed(SEED)
    real = dict(image_size=224, patch_size=16, dim=768, heads=12, dim_head=64, mlp_dim=3072)
    tiny = dict(image_size=32, patch_size=16, dim=48, heads=2, dim_head=24, mlp_dim=96)
    with torch.device(context.device):
        return ViT(**context.select(real, tiny), depth=2, num_classes=10, backend=backend).to(dtype)


def _image_for(context: Context, dtype: torch.dtype, batch: int = 4) -> Tensor:
    side = context.select(224, 32)
    return torch.randn(context.select(batch, 1), 3, side, side, device=context.device).to(dtype)


def _model(dtype: torch.dtype, context: Context) -> dict[str, Any]:
    image = _image_for(context, dtype)
    models = {name: _vit(context, name, dtype) for name in ("triton", "torch")}
    gradient = torch.randn(image.shape[0], 10, device=context.device).to(dtype)

    def run(model: Any, image: Tensor) -> dict[str, Tensor]:
        parameters = list(model.parameters())
        found = _both(lambda image, *_: model(image), [image], [gradient.to(image.dtype)])
        y = model(image)
        every = torch.autograd.grad(y, parameters, gradient.to(y.dtype))
        return {**found, "gradient of the parameters": torch.cat([g.flatten() for g in every])}

    found, again = run(models["triton"], image), run(models["triton"], image)
    exact_model = _vit(context, "torch", dtype).double()
    return check_results(found, again, run(exact_model, image.double()), lambda: run(models["torch"], image), dtype)


def _dropout(context: Context) -> dict[str, Any]:
    """Check dropout: each element is 0 or scaled by 1 / (1 - p). For attention, v is the identity, so the output equals
    the attention weights."""
    p, n, dtype = 0.25, 64, torch.float32
    with torch.device(context.device):
        x, weight = torch.randn(context.select(1576, 100), 96), torch.randn(160, 96)
        q, k = torch.randn(2, context.select(8, 2), n, 2, n)
        v = torch.eye(n)[None, :, None].expand(q.shape)
    calls = {
        "linear": lambda p: F.linear(x, weight, dropout_p=p, backend="triton"),
        "attention": lambda p: F.attention(q, k, v, dropout_p=p, backend="triton"),
    }
    shares = {}
    for name, call in calls.items():
        torch.manual_seed(SEED)
        dropped = call(p)
        torch.manual_seed(SEED)
        if not torch.equal(dropped, call(p)):
            raise WrongNumbers(f"{name}: the same seed gives different bits")
        kept, full = dropped != 0, call(0.0)
        shares[name] = 1 - kept.double().mean().item()
        error = errors(dropped[kept], full.double()[kept] / (1 - p))[0]
        sigma = (p * (1 - p) / kept.numel()) ** 0.5
        if error > TOLERANCE * torch.finfo(dtype).eps or abs(shares[name] - p) > 6 * sigma:
            raise WrongNumbers(
                f"{name}: share dropped {shares[name]:.4f}, expected {p}; error of the other elements {error:.1e}"
            )
    line = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
    return {"line": f"share dropped, expected {p}: {line}; other elements match", "shares": shares}


# --- GPU only -----------------------------------------------------------------------------------


def _memory(context: Context) -> dict[str, Any]:
    needs_gpu(context, "memory counters")

    def call(tokens: int) -> None:
        qkv = torch.randn(2, tokens, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        x = torch.randn(2, tokens, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = F.layer_norm(x + F.attention_packed(qkv, backend="triton").flatten(2), None, None, backend="triton")
        y.sum().backward()

    shapes = range(190, 200)
    for tokens in shapes:
        call(tokens)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        for tokens in shapes:
            call(tokens)
    gc.collect()
    torch.cuda.synchronize()
    grown = torch.cuda.memory_allocated() - before
    if grown:
        raise WrongNumbers(f"memory grew by {grown} bytes in 100 calls of 10 shapes", bytes=grown)
    return {"line": f"{before} bytes before and after 100 calls of 10 shapes", "bytes": 0}


def _graph(context: Context) -> dict[str, Any]:
    """Capture inference and training in CUDA graphs, and replay them with another image."""
    needs_gpu(context, "CUDA graphs")
    model = _vit(context, "triton", torch.bfloat16)
    image = _image_for(context, torch.bfloat16)
    parameters = list(model.parameters())

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return [model(image)]

    def training() -> list[Tensor]:
        y = model(image)
        return [y.detach(), *torch.autograd.grad(y.float().sum(), parameters)]

    for name, call in (("inference", inference), ("training", training)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        image.copy_(torch.randn_like(image))
        graph.replay()
        torch.cuda.synchronize()
        got = [x.clone() for x in captured]
        if not all(map(torch.equal, got, call())):
            raise WrongNumbers(f"the replayed graph of {name} and the call differ in bits")
    return {"line": "inference and training captured; replays match the calls bitwise"}


def _streams(context: Context) -> dict[str, Any]:
    """Run on a second stream while the default stream is busy, then in four concurrent threads."""
    needs_gpu(context, "streams")
    model = _vit(context, "triton", torch.bfloat16)
    image = _image_for(context, torch.bfloat16)
    busy = torch.randn(4096, 4096, device="cuda")
    with torch.no_grad():
        expected = model(image)
        source = image.clone()
        image.zero_()
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(20):
                busy = busy @ busy * 1e-4
            image.copy_(source)  # a kernel on a wrong stream reads zeros
            found = model(image)
        stream.synchronize()
    if not torch.equal(found, expected):
        raise WrongNumbers("a call on a second stream gives different bits")
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for _ in range(20):
                found = model(image)
            torch.cuda.current_stream().synchronize()
            results[i] = found

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) < 4 or not all(torch.equal(x, expected) for x in results.values()):
        raise WrongNumbers("four threads, each with a stream: different bits, or an error in the log")
    return {"line": "a second stream, and four threads with a stream each, give the same bits"}


def small_call() -> None:
    """The code under the sanitizer: ViT-B/16's operators in tiny sizes, forward and backward."""
    context = Context("cuda", Path(), tiny=True)
    for check in OPERATORS:
        if "of ViT-B/16" in check.name:
            inputs, gradients = _made(check, torch.bfloat16, context)
            _both(functools.partial(check.function, backend="triton"), inputs, gradients)
    torch.cuda.synchronize()


def _sanitizer(context: Context) -> dict[str, Any]:
    needs_gpu(context, "compute-sanitizer checks")
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    tool = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if tool is None:
        raise Skip("compute-sanitizer is not installed")
    code = "from benchmarks.gpu.numbers import small_call; small_call()"
    options = ("--tool", "memcheck", "--error-exitcode", "99", "--print-limit", "3")
    options += ("--report-api-errors", "no")  # PyTorch and Triton make driver calls that may fail harmlessly
    command = [tool, *options, sys.executable, "-c", code]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a separate block for each tensor
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    output = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:]
        raise WrongNumbers(f"exit code {done.returncode}: {' '.join([*output[:6], *tail])}", output=output[:60])
    return {"line": output[-1].strip("= ") if output else "no errors"}


def steps() -> Iterator[Step]:
    """Steps in order of importance: a run may end after any of them."""
    for check in OPERATORS:
        yield check.step("bfloat16")
    yield Step("ViT of 2 blocks, bfloat16", functools.partial(_model, torch.bfloat16), 1.0, kernels=12)
    yield Step("CUDA graph", _graph, 2.0)
    yield Step("streams and threads", _streams, 2.0)
    yield Step("memory after 100 calls of 10 shapes", _memory, 3.0, kernels=5)
    yield Step("dropout", _dropout, 0.5, kernels=4)
    yield Step("compute-sanitizer memcheck", _sanitizer, 40.0, limit=150)
    for dtype in ("float32", "float16"):
        for check in OPERATORS:
            yield check.step(dtype)
        yield Step(f"ViT of 2 blocks, {dtype}", functools.partial(_model, DTYPES[dtype]), 1.0, kernels=12)
