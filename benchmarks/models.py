"""Cases of whole ViTs: inference and a training step, against other libraries' models."""

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vit_triton
from benchmarks import runtimes
from benchmarks.cost import Cost, nbytes, trace
from benchmarks.runner import COMPILE, EAGER, OURS, PREPACKED, RUNTIME, Case, Provider
from vit_triton.extras import install
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
    model = VisionTransformer(shape.image, size.patch, size.depth, size.heads, size.width, size.hidden)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # zero by default: every result would be right
    return model


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
FROZEN = " compiled frozen"
LIBRARIES: dict[str, Build] = {
    "vit_pytorch": vit_pytorch,
    "timm": timm,
    "torchvision": torchvision,
    "Hugging Face": hugging_face,
}
PYTHON = {"Hugging Face": "transformers"}  # the module to import, where it has another name
ACCELERATED = ("timm", "torchvision", "Hugging Face")
EXPORTED = "timm"  # the library whose model runs in ONNX Runtime and OpenVINO
GROUPS = {EAGER: "PyTorch's eager mode", COMPILE: "torch.compile", RUNTIME: "ONNX Runtime and OpenVINO"}


@dataclass(frozen=True)
class Variant:
    """One way to run the model of a library. Variants of the same library have the same weights.

    Args:
        library: a name in :data:`LIBRARIES`; float64 results of its model are the reference.
        make: returns the module to call, for the library's model, which it does not change, and the shape.
        group: a name in :data:`GROUPS`; "" for our own variants.
        requires: Python modules.
        lacks: the reason why a dtype is not supported, "" if it is.
    """

    library: str
    make: Callable[[nn.Module, Shape], nn.Module]
    group: str = ""
    training: bool = True
    requires: tuple[str, ...] = ()
    lacks: Callable[[torch.dtype], str] = lambda dtype: ""

    def left_out(self, dtype: torch.dtype) -> str:
        """The reason why this variant cannot run here; "" if it can."""
        needed = (PYTHON.get(self.library, self.library), *self.requires)
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed; {install('bench-cpu')}"
        reason = self.lacks(dtype)
        return reason and f"in {str(dtype).removeprefix('torch.')}, {reason}"


def _ours(model: nn.Module, shape: Shape, backend: str = "triton") -> nn.Module:
    made = ours(shape, backend).to(next(model.parameters()))
    made.load_state_dict(model.state_dict())
    return made


def _copied(model: nn.Module, shape: Shape) -> nn.Module:
    return copy.deepcopy(model)


def _accelerated(model: nn.Module, shape: Shape) -> nn.Module:
    made = copy.deepcopy(model)
    vit_triton.accelerate(made, "triton", strict=True)  # a time of another library's code would be no result
    return made


def _prepacked(model: nn.Module) -> nn.Module:
    return vit_triton.prepack(model.eval())


def _compiled(model: nn.Module) -> nn.Module:
    model.compile(dynamic=False)
    return model


def _then(change: Callable[[nn.Module], nn.Module], variant: Variant, **fields: Any) -> Variant:
    """The variant with ``change`` applied to its module."""
    return dataclasses.replace(variant, make=lambda model, shape: change(variant.make(model, shape)), **fields)


def variants(device: str, compiled: bool) -> dict[str, Variant]:
    """The providers by name."""
    kernels = {OURS: Variant("vit_pytorch", _ours)}
    kernels |= {f"{OURS} {library}": Variant(library, _accelerated) for library in ACCELERATED}
    plain = {f"{OURS} torch": Variant("vit_pytorch", functools.partial(_ours, backend="torch"))}
    plain |= {library: Variant(library, _copied, EAGER) for library in LIBRARIES}
    found = {}
    for name, variant in kernels.items():
        found[name] = variant
        if device == "cpu":  # on a GPU, prepack has no effect
            found[f"{name}{PREPACKED}"] = _then(_prepacked, variant, training=False)
    found |= plain
    if compiled:
        for name, variant in {OURS: kernels[OURS], **plain}.items():
            group = variant.group and COMPILE
            found[f"{name}{COMPILED}"] = _then(_compiled, variant, group=group)
            if group and device == "cpu":
                found[f"{name}{FROZEN}"] = _then(runtimes.Frozen, variant, group=group, training=False)
    if device == "cpu":
        onnx = Variant(EXPORTED, lambda model, shape: runtimes.OnnxRuntime(model), RUNTIME, training=False)
        found["ONNX Runtime"] = dataclasses.replace(
            onnx, requires=("onnx", "onnxscript", "onnxruntime"), lacks=runtimes.onnx_runtime_lacks
        )
        openvino = Variant(EXPORTED, lambda model, shape: runtimes.OpenVino(model), RUNTIME, training=False)
        found["OpenVINO"] = dataclasses.replace(openvino, requires=("openvino",), lacks=runtimes.openvino_lacks)
    return found


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
    shapes: Iterable[Shape], directions: Iterable[str], dtype: torch.dtype, device: str, wanted: Mapping[str, Variant]
) -> Iterator[Case]:
    """Cases of every shape and direction. Every provider is checked against its library's model in float64; ours has
    the weights of vit_pytorch's model."""
    left_out = {name: reason for name, variant in wanted.items() if (reason := variant.left_out(dtype))}
    able = {name: variant for name, variant in wanted.items() if name not in left_out}
    for shape in shapes:
        for direction in directions:
            chosen = {name: variant for name, variant in able.items() if direction == "forward" or variant.training}
            yield Case(
                LABELS[direction],
                f"ViT-{shape.label}",
                dtype,
                device,
                functools.cache(functools.partial(_cost, shape, direction, dtype, len(chosen))),
                functools.partial(_prepare, shape, direction, dtype, device, chosen),
                replay=direction == "forward",
                left_out=left_out,
            )


def _prepare(
    shape: Shape, direction: str, dtype: torch.dtype, device: str, wanted: Mapping[str, Variant]
) -> dict[str, Provider]:
    if any(COMPILED in name for name in wanted):
        torch.compiler.reset()  # past eight shapes torch.compile falls back to eager
    needed = {"vit_pytorch", *(variant.library for variant in wanted.values())}
    with torch.device(device):
        image = torch.randn(shape.batch, 3, shape.image, shape.image).to(dtype)
        labels = torch.randint(CLASSES, (shape.batch,))
        references = {name: build(shape).to(dtype) for name, build in LIBRARIES.items() if name in needed}
    arguments = (image,) if direction == "forward" else (image, labels)
    numbers = inference if direction == "forward" else gradients
    exact = functools.cache(lambda library: _exact(numbers, references[library], arguments))

    @functools.cache
    def plain() -> list[float]:
        return errors(numbers(references["vit_pytorch"], *arguments)(), exact("vit_pytorch"))

    providers = {}
    for name, variant in wanted.items():
        reference = references[variant.library]
        with torch.device(device):
            model = variant.make(reference, shape)
        right = functools.partial(exact, variant.library)
        if direction == "forward":
            providers[name] = Provider(inference(model, image), right, plain, group=variant.group)
        else:
            first = functools.partial(_restored, model, reference, gradients(model, image, labels))
            providers[name] = Provider(training_step(model, image, labels), right, plain, first, variant.group)
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
