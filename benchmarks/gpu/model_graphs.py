"""CUDA graphs of a ViT-B/16 at batch 1: ``torch.compile(mode="reduce-overhead")`` and
``torch.cuda.make_graphed_callables`` against eager calls.

The models are vit_triton's own ViT, and the accelerated model of another library. Results and gradients of the variants
are compared with those of eager calls, which the steps of whole models compare with float64.
"""

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import INFERENCE, MODELS, TRAINING, accelerated_copy, call_of
from benchmarks.gpu.step import SEED, Context, Skip, Step, WrongNumbers, needs_gpu
from benchmarks.models import gradients, inference, ours
from benchmarks.runner import TOLERANCE
from vit_triton.tuning.measure import errors, flat, interleaved, ratios

EAGER, COMPILED, GRAPHED = "eager", "reduce-overhead", "graphed callable"
VARIANTS = (EAGER, COMPILED, GRAPHED)
OURS, OTHER = "vit_triton", "accelerated"
SECONDS = 2.0  # measuring time of a step
COMPILE_SECONDS = 15.0  # torch.compile in one direction, where the blocks are few operators; an assumption
DROPOUT = 0.1


def _build(library: str, what: str, context: Context, depth: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, and two batches of one image each."""
    base = MODELS[0]
    base = base if depth is None else dataclasses.replace(base, size=dataclasses.replace(base.size, depth=depth))
    dtype = torch.bfloat16 if what == INFERENCE else torch.float32
    if library == OURS:
        torch.manual_seed(SEED)
        with torch.device(context.device):
            model = ours(base.shape(context), backend=context.backend)
    else:
        found, plain = base.build(context)
        if found == OURS:
            raise Skip("no other library is installed")
        model = accelerated_copy(found, plain, context)
    side = base.shape(context).image
    first, second = torch.randn(2, 1, 3, side, side, device=context.device).to(dtype)
    return model.to(dtype).train(what == TRAINING), first, second


def variants(what: str, model: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """The model, and copies of it that run in CUDA graphs."""
    torch.compiler.reset()
    training = what == TRAINING
    # a capture supports autocast only without its cache
    autocast = torch.autocast(image.device.type, torch.bfloat16, enabled=training, cache_enabled=False)
    with torch.set_grad_enabled(training), autocast:
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (image.clone(),))
    compiled = torch.compile(copy.deepcopy(model), mode="reduce-overhead", dynamic=False)
    return {EAGER: model, COMPILED: compiled, GRAPHED: graphed}


def _results(what: str, model: nn.Module, image: Tensor, labels: Tensor) -> list[Tensor]:
    """Copies of the logits, or of the loss and all gradients: the next replay overwrites them."""
    run: Callable[[], Any] = inference(model, image) if what == INFERENCE else gradients(model, image, labels)
    with torch.autocast(image.device.type, torch.bfloat16, enabled=what == TRAINING):
        return [x.clone() for x in flat(run())]


def latency(library: str, what: str, context: Context) -> dict[str, Any]:
    model, first, second = _build(library, what, context)
    labels = torch.zeros(1, dtype=torch.int64, device=context.device)
    made = variants(what, model, first)
    allowed = TOLERANCE * torch.finfo(torch.bfloat16).eps
    largest = dict.fromkeys((COMPILED, GRAPHED), 0.0)
    for image in (first, second, first, second):  # the first calls of a compiled model are not replays
        expected = [x.double() for x in _results(what, model, image, labels)]
        for name in largest:
            error = max(errors(_results(what, made[name], image, labels), expected))
            largest[name] = max(largest[name], error)
            if not error <= allowed:
                raise WrongNumbers(f"{name}: error {error:.1e} against eager calls, allowed {allowed:.1e}")
    calls = {name: _synchronized(call_of(what, variant, first, labels)) for name, variant in made.items()}
    rounds = interleaved(calls, context.select(SECONDS, 0.2))
    ms = {name: 1e3 * statistics.median(each) for name, each in rounds.items()}
    times = ", ".join(f"{name} {each:.3f}" for name, each in ms.items())
    line = f"ms at batch 1: {times}; error against eager calls {max(largest.values()):.1e}"
    return {"line": line, "milliseconds": ms, "ratio": ratios(rounds, EAGER), "errors": largest}


def _synchronized(run: Callable[[], Any]) -> Callable[[], None]:
    def synchronized() -> None:
        run()
        torch.cuda.synchronize()

    return synchronized


def dropout(library: str, context: Context) -> dict[str, Any]:
    """Every replay draws new masks."""
    model, image, _ = _build(library, TRAINING, context, depth=2)
    labels = torch.zeros(1, dtype=torch.int64, device=context.device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = DROPOUT
    for name, variant in variants(TRAINING, model, image).items():
        found = [_results(TRAINING, variant, image, labels)[1] for _ in range(5)]
        if any(torch.equal(x, y) for i, x in enumerate(found) for y in found[:i]):
            raise WrongNumbers(f"{name}: the gradients of two calls are equal, thus their masks")
    return {"line": f"dropout {DROPOUT}: the gradients of five calls differ, in every variant"}


def _latency(library: str, what: str, context: Context) -> dict[str, Any]:
    needs_gpu(context, "CUDA graphs")
    return latency(library, what, context)


def _dropout(library: str, context: Context) -> dict[str, Any]:
    needs_gpu(context, "CUDA graphs")
    return dropout(library, context)


def name_of(library: str, what: str) -> str:
    return f"{MODELS[0].name}, {library}, CUDA graphs, {what}"


def steps() -> Iterator[Step]:
    for library in (OURS, OTHER):
        for what in (INFERENCE, TRAINING):
            seconds = SECONDS + 4 + COMPILE_SECONDS * (2 if what == TRAINING else 1)
            run = functools.partial(_latency, library, what)
            yield Step(name_of(library, what), run, seconds, kernels=30 if what == TRAINING else 7)
        run = functools.partial(_dropout, library)
        yield Step(name_of(library, "dropout"), run, 4 + 2 * COMPILE_SECONDS, kernels=30)
