"""Memory traffic of memory-bound kernels, counted by the PTX emulator."""

import pytest
import torch
from conftest import EMULATOR

from vit_triton import functional as F

if not EMULATOR:
    pytest.skip("only the PTX emulator counts bytes", allow_module_level=True)

import ptxemu

pytestmark = pytest.mark.compiled

WIDTH, DTYPE = 768, torch.bfloat16


def touched(call) -> tuple[int, int]:
    """The distinct bytes that the launches of a call read and write (minimum DRAM traffic), and the bytes that they
    request, in sectors of 32; most repeated requests hit a cache."""
    with ptxemu.emulate(mem_stats=True) as emulator:
        call()
    distinct = sum(read + written for launch in emulator.history for _, _, read, written in launch.distinct)
    return distinct, 32 * sum(launch.sectors_load + launch.sectors_store for launch in emulator.history)


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, WIDTH).to(DTYPE)


def test_layer_norm():
    """Each row is requested once; every program requests the weight and the bias for its rows."""
    x, norm = rows(394), [torch.randn(WIDTH).to(DTYPE) for _ in range(2)]
    least = 2 * x.nbytes + 2 * norm[0].nbytes
    moved, requested = touched(lambda: F.layer_norm(x, *norm, backend="triton"))
    assert least == moved and requested <= 1.5 * least


def test_layer_norm_backward():
    """64 images. The traffic above the minimum is the partial sums for dweight and dbias, written and read."""
    x, norm = rows(64 * 197).requires_grad_(), [torch.randn(WIDTH).to(DTYPE).requires_grad_() for _ in range(2)]
    y = F.layer_norm(x, *norm, backend="triton")
    dy = rows(64 * 197)
    moved, _ = touched(lambda: y.backward(dy))
    least = 3 * x.nbytes + 3 * norm[0].nbytes + 2 * 4 * len(x)
    assert least < moved <= 1.1 * least


def test_add_and_layer_norm():
    x, residual, norm = rows(394), rows(394), [torch.randn(WIDTH).to(DTYPE) for _ in range(2)]
    least = 4 * x.nbytes + 2 * norm[0].nbytes
    moved, requested = touched(lambda: F.layer_norm(x, *norm, residual=residual, backend="triton"))
    assert least == moved and requested <= 1.25 * least


def test_patch_embed_of_uint8_images():
    """Only the image, the weights and the tokens are moved; no float image and no unfolded patches are materialized."""
    image = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    weight, bias = torch.randn(WIDTH, 768).to(DTYPE), torch.randn(WIDTH).to(DTYPE)
    pos, prefix = torch.randn(197, WIDTH).to(DTYPE), torch.randn(1, WIDTH).to(DTYPE)
    options = dict(patch_size=16, mean=[0.5] * 3, std=[0.5] * 3, pos=pos, prefix=prefix, backend="triton")
    moved, _ = touched(lambda: F.patch_embed(image, weight, bias, **options))
    tokens = 2 * 197 * WIDTH * DTYPE.itemsize
    least = sum(x.nbytes for x in (image, weight, bias, pos, prefix)) + tokens
    assert 0.99 * least < moved <= 1.1 * least


def test_window_attention():
    """Stage 1 of Swin-T, shifted: q, k and v are requested once, and the result is written once."""
    qkv, bias = torch.randn(2, 56, 56, 3, 3, 32).to(DTYPE), torch.randn(3, 49, 49).to(DTYPE)
    options = dict(window=(7, 7), shift=(3, 3), backend="triton")
    least = qkv.nbytes * 4 // 3
    moved, _ = touched(lambda: F.window_attention(qkv, bias, **options))
    assert moved == least + bias.nbytes <= 1.05 * least
    moved, requested = touched(lambda: F.window_attention(qkv, None, **options))
    assert moved == requested == least
