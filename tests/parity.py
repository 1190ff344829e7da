"""A model and vit_pytorch's, on the same weights and images: what the tests of the drop-ins share."""

import copy

import torch
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


def sizes(config: dict) -> tuple[int, int, int]:
    size = config["image_size"]
    return config.get("channels", 3), *(size if isinstance(size, tuple) else (size, size))


def images(config: dict, batch: int = 2) -> Tensor:
    return torch.randn(batch, *sizes(config), generator=torch.Generator().manual_seed(1))


def shake(model: nn.Module) -> None:
    """LayerNorms start at weight 1 and bias 0, which would hide a swap."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def pair(their_class: type, our_class: type, backend: str, **changes) -> tuple[nn.Module, nn.Module, dict]:
    """Their model, ours with its parameters, and the configuration; in eval mode."""
    config = {**BASE, **changes}
    torch.manual_seed(0)
    theirs = their_class(**config)
    shake(theirs)
    ours = our_class(**config, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval(), config


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The floor of oracle.py, relative: a float32 sum of n terms of either sign is of terms sqrt(n) as large as it."""
    return 4 * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * terms**0.5)


def assert_as_precise(ours: Tensor | None, theirs: Tensor | None, exact: Tensor | None, what: str = "output") -> None:
    """Our error against the float64 model is at most twice vit_pytorch's in the same dtype and what rounding can do."""
    assert (ours is None) == (theirs is None), what
    if ours is None or theirs is None or exact is None:
        return
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    error = (ours.double() - exact).norm()
    allowed = 2 * (theirs.double() - exact).norm() + rounding(theirs.dtype, BASE["mlp_dim"]) * exact.norm()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def run(model: nn.Module, image: Tensor, **options) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and the gradients of image and parameters for a loss that weighs every output differently."""
    image = image.clone().requires_grad_()
    out = model(image, **options)
    out = torch.cat(out, dim=-1) if isinstance(out, tuple) else out
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weights).sum().backward()
    return out.detach(), {"image": image.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_parity(theirs: nn.Module, ours: nn.Module, image: Tensor, **options) -> None:
    """Outputs and every gradient, by the rule; ``options`` are tensors."""
    exact_options = {name: value.double() for name, value in options.items()}
    exact_out, exact = run(copy.deepcopy(theirs).double(), image.double(), **exact_options)
    their_out, their_grads = run(theirs, image, **options)
    our_out, our_grads = run(ours, image, **options)
    assert_as_precise(our_out, their_out, exact_out)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in our_grads.items():
        assert_as_precise(grad, their_grads[name], exact[name], name)


def assert_accelerated(model: nn.Module, *inputs: Tensor, low: bool = False, seed: int | None = None):
    """Output and every gradient of an accelerated model, by the rule, against those of the model before, in float32
    and, if ``low``, in bfloat16; ``seed``: of the random numbers that all draw alike. Returns the report."""
    if low:  # the same numbers in every dtype
        model, inputs = model.bfloat16().float(), tuple(x.bfloat16().float() for x in inputs)
    exact_out, exact = seeded(copy.deepcopy(model).double(), [x.double() for x in inputs], seed)
    # the bias of a key has no gradient but rounding: measure that by what an element of a gradient is like
    size = torch.cat([grad.flatten() for grad in exact.values() if grad is not None]).square().mean().sqrt()
    terms = max(n for parameter in model.parameters() for n in parameter.shape)
    for dtype in (torch.float32, torch.bfloat16) if low else (torch.float32,):
        here = copy.deepcopy(model).to(dtype)
        their_out, theirs = seeded(here, [x.to(dtype) for x in inputs], seed)
        report = accelerate(here, backend="triton")
        our_out, ours = seeded(here, [x.to(dtype) for x in inputs], seed)
        assert ours.keys() == theirs.keys()
        for name, grad in {"output": our_out, **ours}.items():
            peer, truth = (their_out, exact_out) if name == "output" else (theirs[name], exact[name])
            if peer is None:
                assert grad is None, name
                continue
            assert grad.dtype == peer.dtype and grad.shape == peer.shape, name
            error, allowed = (grad.double() - truth).norm(), 2 * (peer.double() - truth).norm()
            floor = rounding(dtype, terms) * max(truth.norm(), size * truth.numel() ** 0.5)
            assert error <= allowed + floor, f"{name}, {dtype}: error {error:.3g}, allowed {allowed:.3g} + {floor:.3g}"
    return report


def seeded(model: nn.Module, inputs, seed: int | None) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    if seed is not None:
        torch.manual_seed(seed)
    return run(model, *inputs)
