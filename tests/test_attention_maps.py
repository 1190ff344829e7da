"""attention_maps: the weights of the library, put in their places in the image."""

import copy
import re

import pytest
import timm
import torch
import torchvision
import transformers
from conftest import EMULATOR, INTERPRETER
from precision import assert_model_as_precise, assert_same
from test_accelerate_swin import of_timm, of_torchvision, prepared
from torch import nn

import vit_triton
from vit_triton import DecomposedBias, attention_maps
from vit_triton import functional as F

if INTERPRETER or EMULATOR:
    pytest.skip("models run on the CPU target only", allow_module_level=True)

TERMS = 8 * 96


def softmaxes(model, image, monkeypatch):
    """The results of torch.nn.functional.softmax and nn.Softmax while the model runs."""
    seen, softmax = [], nn.functional.softmax

    def spy(*args, **options):
        options.pop("_stacklevel", None)
        seen.append(softmax(*args, **options))
        return seen[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", spy)
        model(image)
    return seen


def placed(weights, size, window, shift):
    """Weights of the windows of a padded and rolled map, (B * windows, heads, N, N), as (B, heads, H, W, H, W)."""
    (height, width), (h, w) = size, window
    padded = -(-height // h) * h, -(-width // w) * w
    shift = [0 if side <= n else by for side, n, by in zip(padded, window, shift, strict=True)]
    index = torch.full(padded, height * width)  # the last place collects padding
    index[:height, :width] = torch.arange(height * width).view(height, width)
    index = index.roll((-shift[0], -shift[1]), (0, 1)).unfold(0, h, h).unfold(1, w, w).reshape(-1, h * w)
    batch, heads = len(weights) // len(index), weights.shape[1]
    maps = weights.new_zeros(batch, heads, height * width + 1, height * width + 1)
    for i, tokens in enumerate(index):
        maps[:, :, tokens[:, None], tokens] = weights[i :: len(index)]
    return maps[:, :, :-1, :-1].reshape(batch, heads, *size, *size)


def ours_of(version, window, **options):
    theirs = prepared(of_torchvision(version, window))
    sizes = dict(patch_size=4, embed_dim=96, depths=(2, 1), num_heads=(3, 6), num_classes=5)
    ours = vit_triton.SwinTransformer(**sizes, window_size=window, version=version, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def accelerated(make, *args, **options):
    theirs = prepared(make(*args, **options))
    ours = copy.deepcopy(theirs)
    vit_triton.accelerate(ours, "triton")
    return theirs, ours


def untouched(make, *args, **options):
    theirs = prepared(make(*args, **options))
    return theirs, copy.deepcopy(theirs)


# how to make the library's model and ours, the window, the size of the image
SWIN = {
    "ours": (ours_of, (1, (7, 7)), {}, (7, 7), (56, 84)),
    "ours, padded": (ours_of, (1, (5, 7)), {}, (5, 7), (56, 76)),
    "ours, one window high": (ours_of, (1, (7, 7)), {}, (7, 7), (28, 84)),
    "ours, V2": (ours_of, (2, (8, 8)), {}, (8, 8), (64, 96)),
    "accelerated torchvision": (accelerated, (of_torchvision,), dict(window=(5, 7)), (5, 7), (56, 76)),
    "accelerated timm": (accelerated, (of_timm,), dict(img_size=(56, 84), window=(7, 3)), (7, 3), (56, 84)),
    "accelerated timm V2": (accelerated, (of_timm,), dict(version=2, window=8, img_size=64), (8, 8), (64, 64)),
    "torchvision": (untouched, (of_torchvision,), dict(version=2, window=(8, 8)), (8, 8), (64, 96)),
}


@pytest.mark.parametrize("query", [None, "mean", (9, 5)])
def test_maps_of_an_empty_batch(query):
    _, model = ours_of(1, [7, 7])
    maps, one = (attention_maps(model, torch.randn(batch, 3, 56, 56), query=query) for batch in (0, 1))
    assert [each.shape for each in maps] == [(0, *each.shape[1:]) for each in one]


@pytest.mark.parametrize("name", SWIN)
def test_maps_of_windows(name, monkeypatch):
    make, args, options, window, size = SWIN[name]
    theirs, ours = make(*args, **options)
    theirs, ours, image = theirs.eval(), ours.eval(), torch.randn(2, 3, *size)
    for block in theirs.modules():  # timm's fused attention does not call softmax
        if hasattr(block, "fused_attn"):
            block.fused_attn = False
    maps = attention_maps(ours, image)
    expected = softmaxes(theirs, image, monkeypatch)
    exact = softmaxes(copy.deepcopy(theirs).double(), image.double(), monkeypatch)
    assert len(maps) == len(expected) == 3
    for i, (got, *weights) in enumerate(zip(maps, expected, exact, strict=True)):
        grid = [-(n // -4) if i < 2 else -(n // -8) for n in size]
        shift = [n // 2 for n in window] if i == 1 else [0, 0]
        near, truth = (placed(each, grid, window, shift) for each in weights)
        assert got.dtype == torch.float32 and not got.requires_grad
        assert_model_as_precise(got, near, truth, TERMS)
    for y, x in ((0, 0), (size[0] - 1, size[1] - 1), (33, 13) if size[0] > 33 else (13, 33)):
        for got, whole in zip(attention_maps(ours, image, query=(y, x)), maps, strict=True):
            grid = whole.shape[-2:]
            assert torch.equal(got, whole[:, :, y * grid[0] // size[0], x * grid[1] // size[1]])
    for got, whole in zip(attention_maps(ours, image, query="mean"), maps, strict=True):
        assert_same(got, whole.mean((2, 3)))


def test_maps_of_transformers_swin():
    config = transformers.SwinConfig(
        image_size=60, patch_size=4, embed_dim=96, depths=[2, 1], num_heads=[3, 6], window_size=7
    )
    theirs = prepared(transformers.SwinModel(config)).eval()
    ours, image = copy.deepcopy(theirs), torch.randn(2, 3, 60, 60)
    maps = attention_maps(ours, image)
    assert type(ours.encoder.layers[0].blocks[0]) is type(theirs.encoder.layers[0].blocks[0])
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(image.double(), output_attentions=True).attentions
        near = theirs(image, output_attentions=True).attentions
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True))
    # output_attentions gives one block per stage
    for got, side, shift, *weights in zip(maps[1:], (15, 8), (3, 0), near, exact, strict=True):
        a, b = (placed(each, (side, side), (7, 7), (shift, shift)) for each in weights)
        assert_model_as_precise(got, a, b, TERMS)


ROTARY = {
    "DINOv3": ("vit_small_patch16_dinov3", dict(img_size=48)),
    "DINOv3, qk-norm": ("vit_small_patch16_dinov3", dict(img_size=48, qk_norm=True)),
    "EVA-02": ("eva02_small_patch14_224", dict(img_size=42)),
}


@pytest.mark.parametrize("accelerates", [True, False])
@pytest.mark.parametrize("architecture, options", ROTARY.values(), ids=ROTARY)
def test_maps_with_rotary_positions(architecture, options, accelerates, monkeypatch):
    torch.manual_seed(0)
    theirs = timm.create_model(architecture, depth=2, **options).eval()
    ours = copy.deepcopy(theirs)
    for block in theirs.blocks:
        block.attn.fused_attn = False
    if accelerates:
        vit_triton.accelerate(ours, "triton", strict=True)
    image = torch.randn(2, 3, options["img_size"], options["img_size"])

    def weights(model, x):
        seen = []
        for block in model.blocks:
            block.attn.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        model(x)
        return torch.stack(seen, 1)

    maps = attention_maps(ours, image)
    exact = weights(copy.deepcopy(theirs).double(), image.double())
    assert_model_as_precise(maps, weights(theirs, image), exact, 4 * 384)
    assert_same(attention_maps(ours, image, query=7), maps[..., 7, :])
    assert_same(attention_maps(ours, image, query="mean"), maps.mean(-2))
    with torch.no_grad():
        assert_same(ours(image), theirs(image), 4 * 384)  # blocks are fused again


@pytest.mark.parametrize("accelerates", [True, False])
def test_maps_of_transformers_dinov3(accelerates):
    sizes = dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=2, image_size=48)
    ours = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes)).eval()
    theirs, image = copy.deepcopy(ours), torch.randn(2, 3, 48, 32)
    theirs.set_attn_implementation("eager")
    if accelerates:
        vit_triton.accelerate(ours, "triton", strict=True)
    maps = attention_maps(ours, image)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(image.double(), output_attentions=True).attentions
        near = theirs(image, output_attentions=True).attentions
    assert_model_as_precise(maps, torch.stack(near, 1), torch.stack(exact, 1), 1536)


class Call(nn.Module):
    """Calls attention with options, as a user's own module may. The image has 3 * heads channels, 6 x 6 pixels."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, image):
        qkv = image.unflatten(1, (3, -1)).permute(0, 3, 1, 2, 4)
        return F.attention_packed(qkv, **self.options, backend="torch")


BIAS = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "bias": dict(bias=BIAS),
    "bias of the keys": dict(bias=BIAS[:, :, :1]),
    "mask without keys for one query": dict(bias=BIAS.abs() > torch.tensor([0.3, 9, 0, 0, 0, 0])[:, None]),
    "causal": dict(causal=True),
    "lengths": dict(key_lengths=torch.tensor([4, 6])),
    "decomposed": dict(bias=DecomposedBias(*BIAS.repeat(1, 3, 1, 1)[..., :5].split((2, 3), -1))),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_biases_and_masks(options):
    """With the identity as v, the result of attention is its weights."""
    image = torch.randn(2, 9, 6, 6)
    maps = attention_maps(Call(**options), image)
    q, k, _ = image.unflatten(1, (3, 3)).permute(1, 0, 3, 2, 4)
    v = torch.eye(6)[:, None].expand(2, -1, 3, -1)
    assert_same(maps[:, 0], F.attention(q, k, v, **options, backend="torch").transpose(1, 2))
    for query in (1, 5):
        assert_same(attention_maps(Call(**options), image, query=query), maps[..., query, :])


def test_layers_that_run_on_their_library_raise():
    """The list of maps would lack a layer."""
    _, ours = accelerated(of_torchvision)
    ours.features[1][1].attn.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"attention of features.1.1, .*: attn: has hooks"):
        attention_maps(ours, torch.randn(1, 3, 56, 56))
    _, ours = accelerated(of_timm, img_size=60, always_partition=True)
    with pytest.raises(ValueError, match="padding of shifted windows"):
        attention_maps(ours.eval(), torch.randn(1, 3, 60, 60))


def test_queries_of_the_other_kind():
    swin, image = of_torchvision(), torch.randn(1, 3, 56, 28)
    with pytest.raises(ValueError, match="query must be a pixel .* windows, got 0"):
        attention_maps(swin, image, query=0)
    for query in ((56, 0), (0, 28), (-1, 0)):
        message = f"query must be a pixel (y, x) of the 56 x 28 image, got {query}"
        with pytest.raises(ValueError, match=re.escape(message)):
            attention_maps(swin, image, query=query)
    for query in ((1.0, 2), [1, True], (1, 2, 3), "max"):
        message = f'query must be None, "mean", the index of a token or the pixel (y, x), got {query!r}'
        with pytest.raises(TypeError, match=re.escape(message)):
            attention_maps(swin, image, query=query)
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 24, 48, num_classes=5)
    with pytest.raises(ValueError, match=r"query must be the index of a token.* windows, got \(3, 3\)"):
        attention_maps(vit, torch.randn(1, 3, 16, 16), query=(3, 3))
    with pytest.raises(ValueError, match="query must be one of the model's 5 tokens, from 0 to 4, got -1"):
        attention_maps(vit, torch.randn(1, 3, 16, 16), query=-1)
    assert attention_maps(vit, torch.randn(1, 3, 16, 16), query=0).shape == (1, 1, 2, 5)
    pair, listed = (attention_maps(swin, image, query=query) for query in ((33, 13), [33, 13]))
    assert all(torch.equal(p, q) for p, q in zip(pair, listed, strict=True))


def test_models_without_attention_that_can_be_shown():
    with pytest.raises(ValueError, match=r"model must call attention .* ResNet that calls none"):
        attention_maps(torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64))
    model = nn.MultiheadAttention(8, 2)
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="attention of MultiheadAttention, which is not accelerated: forward was"):
        attention_maps(model, torch.randn(1, 3, 64, 64))


def test_packed_sequences_raise():
    class Packed(nn.Module):
        def forward(self, image):
            q = image.flatten(0, 1)
            return F.attention_varlen(q, q, q, torch.tensor([0, 4], dtype=torch.int32), 4, backend="torch")

    with pytest.raises(ValueError, match=r"packed sequences .* needs images of one size in a tensor \(B, C, H, W\)"):
        attention_maps(Packed(), torch.randn(1, 4, 2, 8))


def sam_of(library, **sizes):
    """SAM's image encoder for a map of 5 x 5 tokens; `sizes`: depth, window_size and global_attn_indexes."""
    if library == "timm":
        return timm.create_model("samvit_base_patch16", img_size=80, embed_dim=64, num_heads=2, **sizes).eval()
    sizes = dict(num_hidden_layers=sizes.pop("depth"), **sizes)
    config = transformers.SamVisionConfig(
        hidden_size=64, num_attention_heads=2, mlp_dim=64, image_size=80, output_channels=8, **sizes
    )
    return transformers.SamVisionModel(config).eval()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_windowed_layers_of_sam_raise(library):
    image = torch.randn(2, 3, 80, 80)
    message = "attention_maps does not support the windowed layers of SAM.* layer"
    for depth, whole in ((1, ()), (2, (0,))):
        model = sam_of(library, depth=depth, window_size=3, global_attn_indexes=whole)
        with pytest.raises(ValueError, match=f"{message} {depth - 1} has a batch of 8, the image of 2"):
            attention_maps(model, image)
    with pytest.raises(ValueError, match=f"{message} 0 pads 5 x 5 tokens to a window of 7 x 7"):
        attention_maps(sam_of(library, depth=1, window_size=7, global_attn_indexes=()), image)
    maps = attention_maps(sam_of(library, depth=2, window_size=3, global_attn_indexes=(0, 1)), image)
    assert maps.shape == (2, 2, 2, 25, 25)


@pytest.mark.parametrize("size, layer, stride, pixel", [(70, 0, 4, 4), (70, 0, 4, 64), (70, 0, 4, 69), (100, 1, 8, 93)])
def test_pixels_of_maps_that_do_not_divide_the_image(size, layer, stride, pixel):
    model, image = (
        vit_triton.SwinTransformer(4, 16, (1, 1), (2, 4), window_size=4).eval(),
        torch.randn(1, 3, size, size),
    )
    every = attention_maps(model, image)[layer]
    token = min(pixel // stride, every.shape[2] - 1)
    torch.testing.assert_close(attention_maps(model, image, query=(pixel, 0))[layer], every[:, :, token, 0])


@pytest.mark.parametrize("change", ["one block", "no attention", "compiled"])
def test_models_that_are_accelerated_in_part_show_every_layer(change):
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = attention_maps(model, image)
    if change == "one block":
        vit_triton.accelerate(model.blocks[1], "triton")
    elif change == "no attention":
        vit_triton.accelerate(model, "triton", attention=False)
    else:
        vit_triton.accelerate(model, "triton")
        model.blocks[1].compile(backend="eager")
    assert_same(attention_maps(model, image), expected, 17)
