"""patch_embed against the float64 reference: layouts, orders, norms, uint8 images, every gradient."""

import functools

import pytest
import torch
import torch.nn.functional as torch_F
from hypothesis import given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_same, double, run

from vit_triton import functional as F
from vit_triton import reference
from vit_triton.checks import PATCH_ORDERS

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("own_gemm")]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def embed(function, image, weight, bias, pos, prefix, pre_weight, pre_bias, post_weight, post_bias, **options):
    pre_norm = (pre_weight, pre_bias, 1e-5) if options.pop("pre") else None
    post_norm = (post_weight, post_bias, 1e-5) if options.pop("post") else None
    return function(image, weight, bias, pos=pos, prefix=prefix, pre_norm=pre_norm, post_norm=post_norm, **options)


def absolute_norm(x, weight, bias, gradient_of_y):
    """Values and gradients of layer_norm of a signed x, with absolute values in every sum."""
    mean, rstd = x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    normal = (x - mean).abs() * rstd
    spread = (x.abs() + mean.abs()) * rstd
    y = spread * weight.abs() + bias.abs()
    g = gradient_of_y * weight.abs()
    dx = rstd * (g + g.mean(-1, keepdim=True) + normal * (g * normal).mean(-1, keepdim=True))
    rows = tuple(range(x.ndim - 1))
    return y, dx, (gradient_of_y * spread).sum(rows), gradient_of_y.sum(rows)


def absolute(inputs, dtokens, *, pre, post, patch_size, patch_order, mean=None, std=None):
    """The results of ``run``, from the op's formulas with absolute values in every sum."""
    image, weight, bias, pos, prefix, pre_weight, pre_bias, post_weight, post_bias = double(inputs)
    differentiable = image.is_floating_point() and inputs[0].is_floating_point()
    if mean is not None:
        mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        image = (image / 255 - mean) / std
    n = 0 if prefix is None else len(prefix)
    dtokens = dtokens.double().abs()
    patches = reference.unfold_patches(image, patch_size, patch_order)
    a = torch_F.layer_norm(patches, patches.shape[-1:], pre_weight, pre_bias) if pre else patches
    z = a @ weight.T + (0 if bias is None else bias)
    dz = dtokens[:, n:]
    dpos, dprefix = dz.sum(0), dtokens[:, :n].sum(0)
    size_a = a.abs()
    if pre:
        size_a, _, _, _ = absolute_norm(patches, pre_weight, pre_bias, torch.zeros_like(patches))
    size_z = size_a @ weight.abs().T + (0 if bias is None else bias.abs())
    tokens, dpost = size_z, ()
    if post:
        _, dz, *dpost = absolute_norm(z, post_weight, post_bias, dz)
        rstd = (z.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        tokens = size_z * rstd * post_weight.abs() + post_bias.abs()
    tokens = tokens + (0 if pos is None else pos.abs())
    if prefix is not None:
        tokens = torch.cat((prefix.abs().expand(len(tokens), -1, -1), tokens), 1)
    dweight, dbias = torch.einsum("bpn,bpk->nk", dz, size_a), dz.sum((0, 1))
    dpatches, dpre = dz @ weight.abs(), ()
    if pre:
        _, dpatches, *dpre = absolute_norm(patches, pre_weight, pre_bias, dpatches)
    grads = [dpatches] if differentiable else []  # permutes the image's gradient: its norm is equal
    grads += [dweight]
    grads += [g for g, x in ((dbias, bias), (dpos, pos), (dprefix, prefix)) if x is not None]
    return [tokens, *grads, *dpre, *dpost]


def make_inputs(batch, channels, grid, patch_size, dim, dtype, *, layout="contiguous", bias=True, prefix=1, norms=True):
    p1, p2 = patch_size
    height, width = grid[0] * p1, grid[1] * p2
    if layout == "uint8":
        image = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)
    elif layout == "crop":
        image = torch.randn(batch, channels, height + 3, width + 5).to(dtype)[:, :, 2:-1, 1:-4]
    else:
        image = torch.randn(batch, channels, height, width).to(dtype)
        if layout == "channels_last":
            image = image.contiguous(memory_format=torch.channels_last)
    size = channels * p1 * p2
    weight = (torch.randn(dim, size) * size**-0.5).to(dtype)
    rows = [torch.randn(dim).to(dtype) if bias else None, torch.randn(grid[0] * grid[1], dim).to(dtype)]
    rows += [torch.randn(prefix, dim).to(dtype) if prefix else None]
    norm = [torch.randn(n).to(dtype) for n in (size, size, dim, dim)] if norms else [None] * 4
    return [image, weight, *rows, *norm]


def check(inputs, *, gradient=None, **options):
    tokens_shape = embed(reference.patch_embed, *inputs, **_tensors(options, torch.float32)).shape
    dtokens = torch.randn(tokens_shape).to(inputs[1].dtype) if gradient is None else gradient(tokens_shape)
    ours = run(functools.partial(embed, F.patch_embed, backend="triton", **options), inputs, [dtokens])
    peer = run(functools.partial(embed, reference.patch_embed, **_tensors(options, torch.float32)), inputs, [dtokens])
    exact = run(
        functools.partial(embed, reference.patch_embed, **_tensors(options, torch.float64)),
        double(inputs),
        double([dtokens]),
    )
    used = [*inputs[:5], *(inputs[5:7] if options["pre"] else ()), *(inputs[7:] if options["post"] else ())]
    names = ["tokens", "image", "weight", "bias", "pos", "prefix"]
    names += ["pre weight", "pre bias"] * options["pre"] + ["post weight", "post bias"] * options["post"]
    names = ["tokens"] + [
        name for name, x in zip(names[1:], used, strict=True) if x is not None and x.is_floating_point()
    ]
    keep = [i for i, result in enumerate(exact) if result is not None]
    sizes = absolute(inputs, dtokens, **options)
    ours, peer, exact = ([results[i] for i in keep] for results in (ours, peer, exact))
    assert len(ours) == len(sizes) == len(names)
    assert_as_precise(ours, [peer], exact, sizes, names)


def _tensors(options, dtype):
    return {k: torch.tensor(v, dtype=dtype) if k in ("mean", "std") else v for k, v in options.items()}


@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 4]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    patch_size=st.sampled_from([(4, 4), (2, 7), (5, 3), (16, 16)]),
    dim=st.sampled_from([16, 40, 72]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "crop"]),
    patch_order=st.sampled_from(PATCH_ORDERS),
    pre=st.booleans(),
    post=st.booleans(),
    bias=st.booleans(),
    prefix=st.integers(0, 5),
)
def test_float_images(batch, channels, grid, patch_size, dim, dtype, layout, patch_order, pre, post, bias, prefix):
    inputs = make_inputs(batch, channels, grid, patch_size, dim, dtype, layout=layout, bias=bias, prefix=prefix)
    check(inputs, patch_size=patch_size, patch_order=patch_order, pre=pre, post=post)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch_order", PATCH_ORDERS)
def test_uint8_images_are_normalised_in_the_load(dtype, patch_order):
    inputs = make_inputs(2, 3, (3, 2), (4, 6), 40, dtype, layout="uint8")
    check(inputs, patch_size=(4, 6), patch_order=patch_order, pre=True, post=True, mean=MEAN, std=STD)


def test_statistics_may_be_views():
    image, weight, *_ = make_inputs(2, 3, (3, 2), (4, 6), 40, torch.float32, layout="uint8")
    std = torch.tensor([[0.5, 9.0], [0.25, 9.0], [0.125, 9.0]])[:, 0]
    views, lists = dict(mean=torch.tensor(0.5).expand(3), std=std), dict(mean=[0.5] * 3, std=std.tolist())
    weight.requires_grad_()
    results = []
    for statistics in (views, lists):
        y = F.patch_embed(image, weight, **statistics, patch_size=(4, 6), backend="triton")
        results.append([y, *torch.autograd.grad(y.square().sum(), weight)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_statistics_cached_in_inference_mode_work_in_training():
    image, weight, *_ = make_inputs(1, 3, (2, 2), (4, 4), 16, torch.float32, layout="uint8")
    numbers = dict(patch_size=4, mean=[0.11, 0.12, 0.13], std=[0.21, 0.22, 0.23], backend="triton")
    with torch.inference_mode():
        F.patch_embed(image, weight, **numbers)
    F.patch_embed(image, weight.requires_grad_(), **numbers).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["uint8", "channels_last"])
def test_several_tiles(small_tiles, layout, dtype):
    inputs = make_inputs(3, 3, (3, 5), (4, 6), 72, dtype, layout=layout, prefix=2)
    statistics = dict(mean=MEAN, std=STD) if layout == "uint8" else {}
    check(inputs, patch_size=(4, 6), patch_order="c p1 p2", pre=True, post=True, **statistics)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_patch_as_wide_as_a_vector(dtype):
    # a vector of 16 is one contiguous row of the patch; the rows are apart in memory
    inputs = make_inputs(1, 1, (1, 2), (16, 16), 16, dtype)
    check(inputs, patch_size=(16, 16), patch_order="p1 p2 c", pre=False, post=False)


def test_gradient_with_zero_strides():
    inputs = make_inputs(2, 3, (3, 3), (4, 4), 40, torch.float32)
    ones = torch.ones(()).expand
    check(inputs, gradient=ones, patch_size=(4, 4), patch_order="p1 p2 c", pre=True, post=False)


def test_the_flattened_conv2d_weight_is_channels_first():
    conv = torch.nn.Conv2d(3, 24, (4, 2), stride=(4, 2))
    image = torch.randn(2, 3, 8, 6)
    ours = F.patch_embed(
        image, conv.weight.flatten(1), conv.bias, patch_size=(4, 2), patch_order="c p1 p2", backend="triton"
    )
    torch.testing.assert_close(ours, conv(image).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("post", [False, True])
def test_autocast_keeps_tokens_in_float32(post):
    inputs = make_inputs(1, 3, (2, 2), (4, 4), 24, torch.float32)
    options = dict(patch_size=(4, 4), pre=True, post=post)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(functools.partial(embed, F.patch_embed, backend="triton", **options), inputs, [torch.ones(1, 5, 24)])
        peer = run(functools.partial(embed, reference.patch_embed, **options), inputs, [torch.ones(1, 5, 24)])
    assert ours[0].dtype == peer[0].dtype == torch.float32
    for a, b in zip(ours, peer, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert_same(a, b, dtype=torch.bfloat16)


@pytest.mark.parametrize("post", [False, True])
def test_empty_batch(post):
    inputs = make_inputs(0, 3, (2, 2), (4, 4), 24, torch.float32)
    function = functools.partial(embed, F.patch_embed, patch_size=4, pre=True, post=post, backend="triton")
    results = run(function, inputs, [torch.randn(0, 5, 24)])
    assert results[0].shape == (0, 5, 24)
    assert all(not result.any() for result in results[1:] if result is not None)


def test_image_that_requires_no_gradient():
    inputs = make_inputs(1, 3, (2, 2), (4, 4), 24, torch.float32)
    leaves = [inputs[0], *(x.requires_grad_() for x in inputs[1:])]
    embed(F.patch_embed, *leaves, patch_size=4, pre=True, post=True, backend="triton").sum().backward()
    assert inputs[0].grad is None
    assert all(x.grad is not None for x in inputs[1:])


def test_more_positions_than_patches():
    image, weight, bias, pos, *_ = make_inputs(1, 3, (3, 3), (4, 4), 24, torch.float32)
    pos.requires_grad_()
    small = F.patch_embed(image[:, :, :4], weight, bias, patch_size=4, pos=pos, backend="triton")
    torch.testing.assert_close(small, reference.patch_embed(image[:, :, :4], weight, bias, patch_size=4, pos=pos))
    small.sum().backward()
    assert pos.grad[:3].eq(1).all() and pos.grad[3:].eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_patch(value):
    image, weight, *_ = make_inputs(1, 3, (2, 2), (4, 4), 24, torch.float32)
    image[0, 1, 1, 5] = value  # in the second patch of the first row
    ours = F.patch_embed(image, weight, patch_size=4, backend="triton")
    theirs = reference.patch_embed(image, weight, patch_size=4)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert not ours[:, 1].isfinite().any() and ours[:, [0, 2, 3]].isfinite().all()


def test_bitwise_reproducible():
    inputs = make_inputs(2, 3, (3, 3), (4, 4), 40, torch.bfloat16)
    function = functools.partial(embed, F.patch_embed, patch_size=4, pre=True, post=True, backend="triton")
    dtokens = torch.randn(2, 10, 40).bfloat16()
    first, second = (run(function, [x.clone() for x in inputs], [dtokens]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_past_32_bits(virtual_memory):
    image = torch.empty_strided((4, 1, 4, 4), (2**30, 16, 4, 1))
    image.copy_(torch.randn(4, 1, 4, 4))
    weight = torch.randn(16, 16)
    ours = F.patch_embed(image, weight, patch_size=4, backend="triton")
    torch.testing.assert_close(ours, reference.patch_embed(image, weight, patch_size=4))
