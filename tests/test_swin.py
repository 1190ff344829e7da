"""SwinTransformer against torchvision's: state dicts, logits and gradients."""

import copy

import pytest
import torch
from precision import assert_model_as_precise, longest_sum
from torch import nn
from torchvision.models import swin_transformer as theirs

import vit_triton
from vit_triton.models.swin import SwinTransformer

SMALL = dict(patch_size=[4, 4], embed_dim=96, depths=[2, 2], num_heads=[3, 6], num_classes=10)


def pair(version, window, **options):
    """Torchvision's model with random weights, and ours with the same weights."""
    torch.manual_seed(3)
    arguments = {**SMALL, "window_size": window, **options}
    layers = dict(block=theirs.SwinTransformerBlockV2, downsample_layer=theirs.PatchMergingV2) if version == 2 else {}
    reference = theirs.SwinTransformer(**arguments, **layers)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 1 and "bias" in name:
                parameter.normal_(std=0.1)
            if "table" in name:
                parameter.normal_()
    ours = SwinTransformer(**arguments, version=version, backend="triton")
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.eval(), reference.eval()


def results(model, image):
    logits = model(image)
    logits.float().square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(ours, reference, image, dtype):
    exact = results(copy.deepcopy(reference).double(), image.to(dtype).double())
    outcome = [results(model.to(dtype), image.to(dtype)) for model in (ours, reference)]
    for result, peer, truth in zip(*outcome, exact, strict=True):
        assert_model_as_precise(result, peer, truth, longest_sum(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("version", "window", "size"), [(1, [7, 7], (112, 56)), (2, [8, 8], (64, 64))])
def test_logits_and_gradients(version, window, size, dtype):
    check(*pair(version, window), torch.randn(2, 3, *size), dtype)


@pytest.mark.parametrize("version", [1, 2])
def test_padded_maps(version):
    """22 x 14 tokens are padded to 24 x 16. The second stage has 11 x 7 tokens, padded to 12 x 8; its windows cover the
    width, so the shift is dropped there. The last pixels fill no patch."""
    ours, reference = pair(version, [4, 8])
    check(ours, reference, torch.randn(1, 3, 90, 59), torch.float32)


def test_published_sizes_have_the_same_state_dict():
    for version, build in ((1, theirs.swin_t), (2, theirs.swin_v2_t)):
        with torch.device("meta"):
            reference = build()
            ours = SwinTransformer(4, 96, (2, 2, 6, 2), (3, 6, 12, 24), 7 if version == 1 else 8, version=version)
        shapes = [{name: x.shape for name, x in model.state_dict().items()} for model in (ours, reference)]
        assert shapes[0] == shapes[1]


def test_buffers_are_those_of_torchvision():
    for version in (1, 2):
        _, reference = pair(version, [4, 6])
        ours = dict(SwinTransformer(**SMALL, window_size=(4, 6), version=version).named_buffers())
        buffers = dict(reference.named_buffers())
        assert ours.keys() == buffers.keys() and all(torch.equal(ours[name], x) for name, x in buffers.items())


def test_stochastic_depth_and_dropout():
    """With probability 1, the last block's branches are dropped; with dropout 1 in training, all are."""
    ours, reference = pair(1, [7, 7], stochastic_depth_prob=1.0, depths=[1, 1])
    image = torch.randn(2, 3, 56, 56)
    last = ours.train().features[3][0]
    x = torch.randn(2, 7, 7, 192)
    assert torch.equal(last(x), x)
    assert not torch.equal(last.eval()(x), x)
    dropping, _ = pair(2, [7, 7], dropout=1.0)
    block = dropping.train().features[1][0]
    x = torch.randn(2, 14, 14, 96)
    torch.testing.assert_close(block(x), x + block.norm1.bias + block.norm2.bias)
    assert ours.eval()(image).shape == reference(image).shape


def test_hooked_modules_see_the_inputs_of_an_unfused_model():
    ours, reference = pair(1, [7, 7])
    image = torch.randn(1, 3, 56, 56)
    plain = ours(image)
    names = ["features.0.2", "features.1.0.norm1", "features.1.1.attn", "features.1.1.mlp", "features.3.0.mlp.1"]
    seen = []
    for model in (ours, reference):
        outputs = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, outputs=outputs: outputs.__setitem__(name, output)
            )
        logits = model(image)
        seen.append(outputs)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
    assert seen[0].keys() == seen[1].keys() == set(names)
    for name in names:
        torch.testing.assert_close(seen[0][name], seen[1][name], rtol=1e-3, atol=1e-4)


def test_backend_of_all_modules():
    model = SwinTransformer(**SMALL, window_size=7, backend="triton")
    model.backend = "torch"
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {"torch"}
    image = torch.randn(1, 3, 64, 64)
    first = model.eval()(image)
    model.backend = "triton"
    torch.testing.assert_close(model(image), first, rtol=1e-4, atol=1e-5)


def test_exported_at_the_top():
    assert vit_triton.SwinTransformer is SwinTransformer and issubclass(SwinTransformer, nn.Module)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(version=3), ValueError, "version must be 1 or 2, got 3"),
        (
            dict(num_heads=[3]),
            ValueError,
            r"depths and num_heads must have one number per stage, got \[2, 2\] and \[3\]",
        ),
        (dict(depths=2), TypeError, "depths must be a sequence of integers, one per stage, got 2"),
        (dict(num_heads=[5, 6]), ValueError, r"num_heads\[0\] must divide the width 96, got 5"),
        (dict(window_size=(7, 7, 7)), ValueError, "window_size must be an integer or two of them"),
        (dict(dropout=2.0), ValueError, "dropout must be between 0 and 1, got 2.0"),
        (dict(embed_dim="96"), TypeError, "embed_dim must be an integer, got '96'"),
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(backend="cuda"), ValueError, "backend must be one of"),
    ],
)
def test_invalid_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        SwinTransformer(**{**SMALL, "window_size": 7, **changes})


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 56, 56), ValueError, "image must be 4-D"),
        (torch.zeros(1, 4, 56, 56), ValueError, "image must have 3 channels"),
        (torch.zeros(1, 3, 56, 3), ValueError, "img must have at least 4 x 4 pixels, got 56 x 3"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), TypeError, "image must have a floating-point dtype"),
    ],
)
def test_invalid_images(image, error, message):
    with pytest.raises(error, match=message):
        SwinTransformer(**SMALL, window_size=7)(image)
