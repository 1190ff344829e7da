"""accelerate on Swin and Swin V2 of timm, torchvision and transformers: the results of the library."""

import copy
import math

import pytest
import timm
import torch
import torchvision
import transformers
from conftest import EMULATOR, INTERPRETER
from precision import assert_model_as_precise
from torch import nn

import vit_triton
from vit_triton import functional as F

if INTERPRETER or EMULATOR:
    pytest.skip("models run on the CPU target only", allow_module_level=True)

swin = torchvision.models.swin_transformer
TERMS = 8 * 96  # the longest sum: the projection after the merging of patches


def of_torchvision(version=1, window=(7, 7), **options):
    kinds = {} if version == 1 else dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
    sizes = dict(patch_size=[4, 4], embed_dim=96, depths=[2, 1], num_heads=[3, 6], num_classes=5)
    return torchvision.models.SwinTransformer(**{**sizes, **kinds, **options}, window_size=list(window))


def of_timm(version=1, window=7, **options):
    module = timm.models.swin_transformer if version == 1 else timm.models.swin_transformer_v2
    cls = module.SwinTransformer if version == 1 else module.SwinTransformerV2
    sizes = dict(patch_size=4, embed_dim=96, depths=(2, 1), num_heads=(3, 6), num_classes=5)
    return cls(**{**sizes, **options}, window_size=window)


def prepared(model):
    """Weights large enough for every branch to count."""
    for name, p in model.named_parameters():
        if p.ndim > 1 and "logit_scale" not in name:
            nn.init.normal_(p, std=p[0].numel() ** -0.5 if "table" not in name else 0.5)
        elif "bias" in name:
            nn.init.normal_(p, std=0.3)
    if any("logit_scale" in name for name, _ in model.named_parameters()):  # V2 starts with norms of 0 in timm
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.normal_(p, mean=1.0, std=0.2)
    return model


def outcome(model, x):
    """Logits, and gradients by name."""
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


class OfTransformers(nn.Module):
    """Logits of transformers' model."""

    def __init__(self, size, version=1, **options):
        super().__init__()
        sizes = dict(image_size=size, patch_size=4, embed_dim=96, depths=[2, 1], num_heads=[3, 6], num_labels=5)
        if version == 1:
            config = transformers.SwinConfig(**{**sizes, "window_size": 7, **options})
            self.model = transformers.SwinForImageClassification(config)
        else:
            config = transformers.Swinv2Config(**{**sizes, "window_size": 8, **options})
            self.model = transformers.Swinv2ForImageClassification(config)

    def forward(self, x):
        return self.model(x).logits


MODELS = {
    "torchvision": (of_torchvision, {}, (56, 84)),
    "torchvision, padded": (of_torchvision, dict(window=(5, 7)), (56, 76)),
    "torchvision, one window high": (of_torchvision, {}, (28, 84)),
    "torchvision V2": (of_torchvision, dict(version=2, window=(8, 8)), (64, 96)),
    "transformers": (OfTransformers, dict(size=56), (56, 56)),
    "transformers, padded": (OfTransformers, dict(size=60), (60, 60)),
    "transformers V2": (OfTransformers, dict(version=2, size=64), (64, 64)),
    "transformers V2, padded": (OfTransformers, dict(version=2, size=60, qkv_bias=False), (60, 60)),
    "timm": (of_timm, dict(img_size=56), (56, 56)),
    "timm, not square": (of_timm, dict(img_size=(56, 84), window=(7, 3)), (56, 84)),
    "timm V2": (of_timm, dict(version=2, window=8, img_size=64), (64, 64)),
    "timm V2, 16 x 16": (of_timm, dict(version=2, window=16, img_size=128, depths=(2,), num_heads=(3,)), (128, 128)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, dtype):
    make, options, size = MODELS[name]
    untouched = prepared(make(**options)).eval().to(dtype)
    ours = copy.deepcopy(untouched)
    report = vit_triton.accelerate(ours, backend="triton", strict=True)
    assert not [entry for entry in report.not_replaced if entry.name.split(".")[-1] not in ("head", "fc", "classifier")]
    x = torch.randn(2, 3, *size).to(dtype)
    exact = outcome(copy.deepcopy(untouched).double(), x.double())
    for ours_, theirs, exact_ in zip(outcome(ours, x), outcome(untouched, x), exact, strict=True):
        assert_model_as_precise(ours_, theirs, exact_, TERMS)


def test_stochastic_depth_draws_the_same_samples():
    cases = (
        (of_torchvision, dict(stochastic_depth_prob=0.5)),
        (of_timm, dict(drop_path_rate=0.5, img_size=56)),
        (OfTransformers, dict(drop_path_rate=0.5, size=56, version=2, window_size=7)),
    )
    for make, options in cases:
        untouched = prepared(make(**options)).train()
        ours = copy.deepcopy(untouched)
        vit_triton.accelerate(ours, backend="triton", strict=True)
        x = torch.randn(4, 3, 56, 56)
        torch.manual_seed(3)
        expected = untouched(x)
        torch.manual_seed(3)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def swin_v2_layer(**options):
    """The shifted layer of a map of 8 x 8 tokens with windows of 4 x 4."""
    config = transformers.Swinv2Config(window_size=4, embed_dim=32, **options)
    modeling = transformers.models.swinv2.modeling_swinv2
    return modeling.Swinv2Layer(config, 32, (8, 8), 2, shift_size=2).eval()


def test_transformers_adds_the_mask_of_swin_v2_twice(monkeypatch):
    """The cosine of tokens is -1 in one region and 1 in neighbouring regions. At a logit scale of 100, a mask of -100
    makes the masked tokens dominate; with -200 they weigh the same as the others."""
    torch.manual_seed(0)
    untouched = prepared(swin_v2_layer())
    attention = untouched.attention.self
    with torch.no_grad():
        attention.logit_scale.fill_(math.log(100.0))
        attention.query.weight.copy_(torch.eye(32))
        attention.key.weight.copy_(-torch.eye(32))
        attention.query.bias.zero_()
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    sign = torch.where((y < 2) ^ (x < 2), -1.0, 1.0).view(1, 64, 1)  # the roll moves the first two rows to the end
    tokens = sign * torch.randn(32) + 0.01 * torch.randn(3, 64, 32)
    ours = copy.deepcopy(untouched)
    vit_triton.accelerate(ours, backend="triton", strict=True)
    results = {"exact": copy.deepcopy(untouched).double()(tokens.double(), (8, 8))[0]}
    results |= {name: model(tokens, (8, 8))[0] for name, model in (("ours", ours), ("theirs", untouched))}
    assert_model_as_precise(results["ours"], results["theirs"], results["exact"], TERMS)
    window_attention = F.window_attention
    monkeypatch.setattr(F, "window_attention", lambda *a, **o: window_attention(*a, **{**o, "mask_value": -100.0}))
    once = ours(tokens, (8, 8))[0]
    assert (once - results["theirs"]).norm() > 0.1 * results["theirs"].norm()


def test_dropouts_of_swin_v2_of_transformers():
    """The output of attention is dropped with the probability of the attention weights. 1 makes outputs comparable."""
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        untouched = prepared(swin_v2_layer(**{name: 1.0})).train()
        ours, x = copy.deepcopy(untouched), torch.randn(2, 64, 32)
        vit_triton.accelerate(ours, backend="triton", strict=True)
        torch.testing.assert_close(ours(x, (8, 8))[0], untouched(x, (8, 8))[0], rtol=1e-4, atol=1e-4)


def test_attention_weights_of_swin_v2_of_transformers():
    untouched = prepared(OfTransformers(version=2, size=64)).eval().model
    ours = copy.deepcopy(untouched)
    report = vit_triton.accelerate(ours, backend="triton")
    x = torch.randn(1, 3, 64, 64)
    results = (model(x, output_attentions=True).attentions for model in (ours, untouched))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "output_attentions" in str(report.fallbacks())


def test_padded_and_shifted_windows_of_timm_fall_back():
    """timm rolls before it pads."""
    untouched = prepared(of_timm(img_size=60, always_partition=True)).eval()
    ours = copy.deepcopy(untouched)
    report = vit_triton.accelerate(ours, backend="triton")
    x = torch.randn(1, 3, 60, 60)
    torch.testing.assert_close(ours(x), untouched(x), rtol=1e-4, atol=1e-4)
    assert "padding of shifted windows" in str(report.fallbacks())


def test_large_windows_and_hooks_are_left_to_the_library():
    ours = of_timm(img_size=136, window=17, depths=(1,), num_heads=(3,)).eval()
    report = vit_triton.accelerate(ours, backend="triton")
    assert "exceeds the maximum, 256 tokens" in str(report)
    ours = prepared(of_torchvision()).eval()
    untouched = copy.deepcopy(ours)
    vit_triton.accelerate(ours, backend="triton")
    seen = []
    ours.features[1][1].attn.register_forward_hook(lambda *args: seen.append(args[2].shape))
    x = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(ours(x), untouched(x), rtol=1e-4, atol=1e-4)
    assert seen == [(1, 14, 14, 96)]


def test_shift_is_read_in_every_call():
    """A map of one window is not shifted; a larger one is."""
    untouched = prepared(of_timm(img_size=28, depths=(2,), num_heads=(3,))).eval()
    ours = copy.deepcopy(untouched)
    vit_triton.accelerate(ours, backend="triton", strict=True)
    for model in (untouched, ours):
        assert model.layers[0].blocks[1].shift_size == (0, 0)
        model.set_input_size((56, 56), window_size=(7, 7))
        assert model.layers[0].blocks[1].shift_size == (3, 3)
    x = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(ours(x), untouched(x), rtol=1e-4, atol=1e-4)
