"""From uint8 images to tokens: normalise, vit-pytorch's stem (patches, norm, product, norm), positions, class token."""

from collections.abc import Iterator

import torch

from benchmarks.derivative import double, forward, forward_backward
from benchmarks.runner import OURS, Case
from benchmarks.shapes import BATCH, TOKENS, WIDTH
from vit_triton import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 16


def ours(image, weight, bias, g1, b1, g2, b2, pos, prefix):
    return F.patch_embed(
        image,
        weight,
        bias,
        patch_size=PATCH,
        pre_norm=(g1, b1, 1e-5),
        post_norm=(g2, b2, 1e-5),
        pos=pos,
        prefix=prefix,
        mean=MEAN,
        std=STD,
        backend="triton",
    )


def pytorch(image, weight, bias, g1, b1, g2, b2, pos, prefix):
    mean, std = (torch.tensor(x, dtype=weight.dtype)[:, None, None] for x in (MEAN, STD))
    x = (image.to(weight.dtype) / 255 - mean) / std
    batch, channels, height, width = x.shape
    x = x.unflatten(3, (width // PATCH, PATCH)).unflatten(2, (height // PATCH, PATCH))
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * PATCH * PATCH)
    x = torch.nn.functional.layer_norm(x, g1.shape, g1, b1)
    x = torch.nn.functional.layer_norm(torch.nn.functional.linear(x, weight, bias), g2.shape, g2, b2)
    return torch.cat((prefix.expand(batch, -1, -1), x + pos), 1)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    image = torch.randint(256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    size = 3 * PATCH * PATCH
    inputs = [torch.randn(WIDTH, size) * size**-0.5, torch.randn(WIDTH)]
    inputs += [torch.randn(n) for n in (size, size, WIDTH, WIDTH)]
    inputs += [torch.randn(TOKENS - 1, WIDTH), torch.randn(1, WIDTH)]
    inputs = [image, *(x.to(dtype) for x in inputs)]
    gradient = torch.randn(BATCH, TOKENS, WIDTH).to(dtype)
    providers = {OURS: ours, "normalise + vit_pytorch's stem": pytorch}
    yield Case(
        "patch_embed from uint8",
        dtype,
        {name: forward(f, inputs) for name, f in providers.items()},
        forward(pytorch, double(inputs)),
    )
    yield Case(
        "patch_embed from uint8 forward+backward",
        dtype,
        {name: forward_backward(f, inputs, gradient) for name, f in providers.items()},
        forward_backward(pytorch, double(inputs), gradient.double()),
    )
