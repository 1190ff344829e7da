"""Whole models: images per second and memory of eager, torch.compile and accelerated variants, in interleaved rounds.

Inference runs in bfloat16. A training step uses float32 parameters, autocast to bfloat16 and fused AdamW. Weights are
random. Before timing, the logits (in training: the loss and all gradients) are compared with float64.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vit_triton
from benchmarks.gpu.step import COMPILE_SECONDS, SEED, Context, Skip, Step, WrongNumbers
from benchmarks.models import gradients, hugging_face, inference, loss, ours, torchvision
from benchmarks.runner import limits
from benchmarks.timing import METHODS
from vit_triton.cli.errors import is_out_of_memory
from vit_triton.tuning.measure import errors, ratios
from vit_triton.tuning.shapes import CLASSES, Shape
from vit_triton.tuning.sizes import SIZES, Size

SECONDS = 3.0  # measuring time of a step
CHECKED = 2  # images in the comparison with float64
CALLS = 40  # expected calls per measurement, over all variants
TINY = Size(48, 2, 2, 96)
DINOV2_S = dataclasses.replace(SIZES["S"], patch=14)


@dataclass(frozen=True)
class Model:
    """``timm``: the name of timm's model; ``batch``: images per call in inference and in training."""

    name: str
    timm: str
    size: Size
    image: int
    batch: tuple[int, int]

    def build(self, context: Context) -> tuple[str, nn.Module]:
        """(library, model) of the first installed library; without any, vit_triton's model with backend "torch"."""
        shape = self.shape(context)
        torch.manual_seed(SEED)
        with torch.device(context.device):
            for library, build in {
                "timm": self._timm,
                "torchvision": torchvision,
                "transformers": hugging_face,
            }.items():
                if importlib.util.find_spec(library) is not None:
                    with contextlib.suppress(ImportError):  # incompatible versions
                        return library, build(shape)
            return "vit_triton", ours(shape, backend="torch")

    def shape(self, context: Context) -> Shape:
        size, image = context.select((self.size, self.image), (TINY, 2 * TINY.patch))
        return Shape(self.name, 1, image, (image // size.patch) ** 2 + 1, size)

    def _timm(self, shape: Shape) -> nn.Module:
        import timm

        size = shape.size
        sizes = dict(patch_size=size.patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads)
        return timm.create_model(self.timm, img_size=shape.image, num_classes=CLASSES, **sizes)

    @property
    def flops(self) -> float:
        """FLOPs of the GEMMs of one image in a forward pass."""
        tokens, width = (self.image // self.size.patch) ** 2 + 1, self.size.width
        block = 2 * tokens * width * (4 * width + 2 * self.size.hidden) + 4 * tokens**2 * width
        return float(self.size.depth * block)


MODELS = (
    Model("ViT-B/16", "vit_base_patch16_224", SIZES["B"], 224, (256, 128)),
    Model("ViT-L/16", "vit_large_patch16_224", SIZES["L"], 224, (128, 64)),
    Model("DINOv2-S at 518", "vit_small_patch14_dinov2", DINOV2_S, 518, (64, 32)),
    Model("SO400M/14", "vit_so400m_patch14_siglip_224", SIZES["SO400M"], 224, (128, 32)),
)
INFERENCE, TRAINING = "inference", "training step"


def accelerated_copy(library: str, model: nn.Module, context: Context) -> nn.Module:
    made = copy.deepcopy(model)
    if library == "vit_triton":
        for module in made.modules():
            if hasattr(module, "backend"):
                module.backend = context.backend
    else:
        vit_triton.accelerate(made, backend=context.backend)
    return made


def call_of(what: str, model: nn.Module, image: Tensor, labels: Tensor) -> Callable[[], Any]:
    if what == INFERENCE:
        return inference(model, image)
    fused = {"fused": True} if image.is_cuda else {}
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, **fused)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(image.device.type, torch.bfloat16):
            value = loss(model, image, labels)
        value.backward()
        optimizer.step()

    return step


def _errors(what: str, model: nn.Module, exact: Any, image: Tensor, labels: Tensor) -> list[float]:
    with torch.autocast(image.device.type, torch.bfloat16, enabled=what == TRAINING):
        call = inference(model, image) if what == INFERENCE else gradients(model, image, labels)
        return errors(call(), exact)


def _compare(what: str, plain: nn.Module, ours: nn.Module, image: Tensor, labels: Tensor) -> dict[str, float]:
    """The largest errors of ours and of PyTorch. Raises :class:`WrongNumbers` if ours exceeds the limit."""
    double = copy.deepcopy(plain).double()
    exact = (inference(double, image.double()) if what == INFERENCE else gradients(double, image.double(), labels))()
    del double
    theirs, found = (_errors(what, model, exact, image, labels) for model in (plain, ours))
    for error, peer, limit in zip(found, theirs, limits(theirs, torch.bfloat16), strict=True):
        if not error <= limit:
            raise WrongNumbers(f"error {error:.1e}, PyTorch's {peer:.1e}", error=error, pytorch=peer)
    return {"error": max(found), "pytorch": max(theirs)}


def _measure(what: str, model: Model, compiled: bool, context: Context) -> dict[str, Any]:
    if compiled and context.device == "cpu":
        raise Skip("torch.compile takes minutes on a CPU")
    batch = context.select(model.batch[what == TRAINING], 2)
    while True:
        try:
            return _measure_batch(what, model, compiled, context, batch)
        except Exception as error:  # out of memory is a RuntimeError on a CPU
            if not is_out_of_memory(error) or batch == 1:
                raise
            batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _measure_batch(what: str, model: Model, compiled: bool, context: Context, batch: int) -> dict[str, Any]:
    library, eager = model.build(context)
    eager = eager.to(torch.bfloat16 if what == INFERENCE else torch.float32)
    accelerated = accelerated_copy(library, eager, context)
    side = model.shape(context).image
    image = torch.randn(batch, 3, side, side, device=context.device).to(next(eager.parameters()).dtype)
    labels = torch.randint(CLASSES, (batch,), device=context.device)
    facts: dict[str, Any] = {"library": library, "batch": batch}
    if not compiled:
        facts |= _compare(what, eager, accelerated, image[:CHECKED], labels[:CHECKED])
    variants = {"accelerated": accelerated, "eager": eager}
    if compiled:
        torch.compiler.reset()
        variants = {"accelerated": accelerated, "torch.compile": torch.compile(eager, dynamic=False)}
    calls = {name: call_of(what, variant, image, labels) for name, variant in variants.items()}
    facts["memory"] = {name: _peak(call, context) for name, call in calls.items()}
    rounds = METHODS[context.device](calls, context.select(SECONDS, 0.2), False).rounds
    seconds = {name: statistics.median(each) for name, each in rounds.items()}
    facts["images_per_second"] = {name: batch / each for name, each in seconds.items()}
    facts["ratio"] = ratios(rounds, "accelerated")
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in facts["images_per_second"].items())
    against = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in facts["ratio"].items())
    return {"line": f"{rates} images/s at batch {batch}; median of the rounds: {against} ({library})", **facts}


def _peak(call: Callable[[], Any], context: Context) -> int | None:
    """Peak bytes that a second call allocates; the first call creates the optimizer's state."""
    call()
    if context.device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def steps(compiled: bool) -> Iterator[Step]:
    for model in MODELS:
        for what in (INFERENCE, TRAINING):
            name = f"{model.name}, {what}" + (", torch.compile" if compiled else "")
            run = functools.partial(_measure, what, model, compiled)
            training = what == TRAINING
            flops = model.flops * model.batch[training] * (3 if training else 1) * CALLS
            seconds = SECONDS + 4 + (COMPILE_SECONDS * (2 if training else 1) if compiled else 0)
            kernels = 0 if compiled else 30 if training else 7
            yield Step(name, run, seconds, kernels=kernels, flops=flops)
