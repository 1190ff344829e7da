"""Shared helpers of the drop-in tests: compare a model with vit_pytorch's on equal weights and images."""

import copy

import torch
from precision import assert_model_as_precise, longest_sum
from torch import Tensor, nn

from vit_triton import accelerate

BASE = {
    "image_size": 16,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 40,
    "dim_head": 8,
}
TERMS = BASE["mlp_dim"]  # length of the longest sum


def sizes(config: dict) -> tuple[int, int, int]:
    size = config["image_size"]
    return config.get("channels", 3), *(size if isinstance(size, tuple) else (size, size))


def images(config: dict, batch: int = 2) -> Tensor:
    return torch.randn(batch, *sizes(config), generator=torch.Generator().manual_seed(1))


def shake(model: nn.Module) -> None:
    """Randomize all parameters; LayerNorms start at weight 1 and bias 0, which would hide swapped norms."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def pair(their_class: type, our_class: type, backend: str, **changes) -> tuple[nn.Module, nn.Module, dict]:
    """Their model, ours with the same parameters, and the configuration; both models in eval mode."""
    config = {**BASE, **changes}
    torch.manual_seed(0)
    theirs = their_class(**config)
    shake(theirs)
    ours = our_class(**config, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval(), config


def run(model: nn.Module, image: Tensor, **options) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output and the gradients of image and parameters; the loss weighs every output differently."""
    image = image.clone().requires_grad_()
    out = model(image, **options)
    out = torch.cat(out, dim=-1) if isinstance(out, tuple) else out
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weights).sum().backward()
    return out.detach(), {"image": image.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_parity(theirs: nn.Module, ours: nn.Module, image: Tensor, **options) -> None:
    """Compare outputs and all gradients by the precision rule; ``options`` are tensors."""
    exact_options = {name: value.double() for name, value in options.items()}
    exact_out, exact = run(copy.deepcopy(theirs).double(), image.double(), **exact_options)
    their_out, their_grads = run(theirs, image, **options)
    our_out, our_grads = run(ours, image, **options)
    terms = longest_sum(theirs)
    assert_model_as_precise(our_out, their_out, exact_out, terms)
    assert_model_as_precise(our_grads, their_grads, exact, terms)


def assert_accelerated(model: nn.Module, *inputs: Tensor, low: bool = False, seed: int | None = None):
    """Compare output and all gradients before and after ``accelerate`` by the precision rule, in float32 and, if
    ``low``, in bfloat16. ``seed`` is set before each run. Returns the report."""
    if low:  # parameters and inputs are exact in every dtype
        model, inputs = model.bfloat16().float(), tuple(x.bfloat16().float() for x in inputs)
    exact_out, exact = seeded(copy.deepcopy(model).double(), [x.double() for x in inputs], seed)
    for dtype in (torch.float32, torch.bfloat16) if low else (torch.float32,):
        here = copy.deepcopy(model).to(dtype)
        their_out, theirs = seeded(here, [x.to(dtype) for x in inputs], seed)
        report = accelerate(here, backend="triton")
        our_out, ours = seeded(here, [x.to(dtype) for x in inputs], seed)
        assert_model_as_precise(our_out, their_out, exact_out, longest_sum(model))
        assert_model_as_precise(ours, theirs, exact, longest_sum(model))
    return report


def seeded(model: nn.Module, inputs, seed: int | None) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    if seed is not None:
        torch.manual_seed(seed)
    return run(model, *inputs)
