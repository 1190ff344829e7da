"""uint8 images to tokens: normalization, vit-pytorch's stem (patches, norm, linear, norm), positions, class token."""

import functools

import torch

from benchmarks.ops.op import Op
from vit_triton import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inputs(shape):
    width, size = shape.size.width, 3 * shape.size.patch**2
    image = torch.randint(256, (shape.batch, 3, shape.image, shape.image), dtype=torch.uint8)
    parameters = [torch.randn(width, size) * size**-0.5, *(torch.randn(n) for n in (width, size, size, width, width))]
    return [image, *parameters, torch.randn(shape.tokens - 1, width), torch.randn(1, width)]


def ours(shape, image, weight, bias, g1, b1, g2, b2, pos, prefix, backend):
    return F.patch_embed(
        image,
        weight,
        bias,
        patch_size=shape.size.patch,
        pre_norm=(g1, b1, 1e-5),
        post_norm=(g2, b2, 1e-5),
        pos=pos,
        prefix=prefix,
        mean=MEAN,
        std=STD,
        backend=backend,
    )


@functools.cache
def constant(values, dtype, device):
    """A tensor that is copied to the device once: a CUDA graph cannot capture a copy from the CPU."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def pytorch(shape, image, weight, bias, g1, b1, g2, b2, pos, prefix):
    mean, std = (constant(x, weight.dtype, image.device) for x in (MEAN, STD))
    patch = shape.size.patch
    x = (image.to(weight.dtype) / 255 - mean) / std
    batch, channels, height, width = x.shape
    x = x.unflatten(3, (width // patch, patch)).unflatten(2, (height // patch, patch))
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * patch * patch)
    x = torch.nn.functional.layer_norm(x, g1.shape, g1, b1)
    x = torch.nn.functional.layer_norm(torch.nn.functional.linear(x, weight, bias), g2.shape, g2, b2)
    return torch.cat((prefix.expand(batch, -1, -1), x + pos), 1)


OPS = [Op("patch_embed from uint8", inputs, ours, lambda device: {"pytorch": pytorch}, pytorch)]
