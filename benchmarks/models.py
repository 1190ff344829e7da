"""Cases of whole ViTs: inference and a training step, against other libraries' models."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import vit_triton
from benchmarks.cost import Cost, nbytes, trace
from benchmarks.runner import OURS, Case, Provider
from vit_triton.tuning.measure import errors
from vit_triton.tuning.shapes import CLASSES, Shape

Build = Callable[[Shape], nn.Module]


def ours(shape: Shape, backend: str = "triton", **more: Any) -> nn.Module:
    return vit_triton.ViT(backend=backend, **shape.vit(), **more)


def vit_pytorch(shape: Shape) -> nn.Module:
    import vit_pytorch

    return vit_pytorch.ViT(**shape.vit())


def timm(shape: Shape) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    size = shape.size
    return VisionTransformer(
        img_size=shape.image,
        patch_size=size.patch,
        num_classes=CLASSES,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.hidden / size.width,
    )


def torchvision(shape: Shape) -> nn.Module:
    from torchvision.models import VisionTransformer

    size = shape.size
    return VisionTransformer(shape.image, size.patch, size.depth, size.heads, size.width, size.hidden)


def hugging_face(shape: Shape) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = shape.size
    config = ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=size.hidden,
        image_size=shape.image,
        patch_size=size.patch,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


COMPILED = " compiled"
PREPACKED = " prepacked"  # inference only
BUILDS: dict[str, Build] = {
    OURS: ours,
    f"{OURS}{PREPACKED}": ours,
    f"{OURS} torch": functools.partial(ours, backend="torch"),
    "vit_pytorch": vit_pytorch,
    "timm": timm,
    "torchvision": torchvision,
    "Hugging Face": hugging_face,
}
SAME_WEIGHTS = (OURS, f"{OURS}{PREPACKED}", f"{OURS} torch", "vit_pytorch")


def builds(compiled: bool) -> dict[str, Build]:
    return {**BUILDS, **({f"{name}{COMPILED}": build for name, build in BUILDS.items()} if compiled else {})}


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def inference(model: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    model.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            return logits(model(image))

    return run


def loss(model: nn.Module, image: Tensor, labels: Tensor) -> Tensor:
    x = logits(model(image))
    return nn.functional.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), labels)


def training_step(model: nn.Module, image: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> Tensor:
        value = loss(model, image, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return run


def gradients(model: nn.Module, image: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The loss, and all gradients as one vector: a key bias has gradient zero, thus no relative error of its own."""
    model.train()

    def run() -> tuple[Tensor, Tensor]:
        value = loss(model, image, labels)
        found = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
        return value.detach(), torch.cat([x.flatten() for x in found])

    return run


LABELS = {"forward": "inference", "both": "training step"}


def cases(
    shapes: Iterable[Shape], directions: Iterable[str], dtype: torch.dtype, device: str, wanted: Mapping[str, Build]
) -> Iterator[Case]:
    """Cases of every shape and direction. Our models load the weights of vit_pytorch's model and are checked against it
    in float64; every other model is checked against its own float64 copy."""
    for shape in shapes:
        for direction in directions:
            yield Case(
                LABELS[direction],
                f"ViT-{shape.label}",
                dtype,
                device,
                functools.cache(functools.partial(_cost, shape, direction, dtype, len(wanted))),
                functools.partial(_prepare, shape, direction, dtype, device, wanted),
                replay=direction == "forward",
            )


def _prepare(
    shape: Shape, direction: str, dtype: torch.dtype, device: str, wanted: Mapping[str, Build]
) -> dict[str, Provider]:
    if any(name.endswith(COMPILED) for name in wanted):
        torch.compiler.reset()  # past eight shapes torch.compile falls back to eager
    with torch.device(device):
        image = torch.randn(shape.batch, 3, shape.image, shape.image).to(dtype)
        labels = torch.randint(CLASSES, (shape.batch,))
        reference = vit_pytorch(shape).to(dtype)
    arguments = (image,) if direction == "forward" else (image, labels)
    numbers = inference if direction == "forward" else gradients

    @functools.cache
    def plain() -> list[float]:
        return errors(numbers(reference, *arguments)(), _exact(numbers, reference, arguments))

    providers = {}
    for name, build in wanted.items():
        if PREPACKED in name and direction != "forward":
            continue
        base = name.removesuffix(COMPILED)
        with torch.device(device):
            model = build(shape).to(dtype)
        if base in SAME_WEIGHTS:
            model.load_state_dict(reference.state_dict())
        peer = reference if base in SAME_WEIGHTS else copy.deepcopy(model)
        exact = functools.cache(functools.partial(_exact, numbers, peer, arguments))
        if PREPACKED in name:
            vit_triton.prepack(model.eval())
        called = torch.compile(model, dynamic=False) if name.endswith(COMPILED) else model
        if direction == "forward":
            providers[name] = Provider(inference(called, image), exact, plain)
        else:
            first = functools.partial(_restored, model, peer, gradients(called, image, labels))
            providers[name] = Provider(training_step(called, image, labels), exact, plain, first)
    return providers


def _exact(make: Callable[..., Callable[[], Any]], model: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    image, *labels = arguments
    return make(copy.deepcopy(model).double(), image.double(), *labels)()


def _restored(model: nn.Module, peer: nn.Module, call: Callable[[], Any]) -> Any:
    """Load the original weights first: training steps change them."""
    model.load_state_dict(peer.state_dict())
    return call()


def _cost(shape: Shape, direction: str, dtype: torch.dtype, providers: int) -> Cost:
    """Cost of vit_pytorch's model, which computes all tokens in every block.

    Bytes: weights, image and logits once. In training, weights and Adam's two moments are read and written, and
    gradients are written and read.
    """

    def traced(dtype: torch.dtype) -> tuple[int, int, int]:
        made: list[nn.Module] = []

        def make() -> Callable[[], Any]:
            made.append(vit_pytorch(shape).to(dtype))
            image = torch.empty(shape.batch, 3, shape.image, shape.image, dtype=dtype)
            if direction == "forward":
                return inference(made[0], image)
            return gradients(made[0], image, torch.empty(shape.batch, dtype=torch.int64))

        _, flops, memory = trace(make)
        return flops, nbytes(list(made[0].parameters())), memory

    flops, weights, memory = traced(dtype)
    outside = shape.batch * (3 * shape.image**2 + CLASSES) * dtype.itemsize
    copies = 1 if direction == "forward" else 4  # weights; in training also gradients and two moments
    size = weights * (1 if direction == "forward" else 8) + outside
    return Cost(flops, size, memory + providers * weights * (copies + 1) + traced(torch.float64)[2])
