"""Accelerated timm models: logits and all gradients, by the precision rule."""

import functools

import pytest
import timm
import torch
from parity import assert_accelerated
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn

import vit_triton

# two by two patches of the model's real width
SMALL = {"depth": 1, "num_classes": 5, "weight_init": "skip"}
MODELS = {
    "B": ("vit_base_patch16_224", 112),
    "L": ("vit_large_patch16_224", 32),
    "H": ("vit_huge_patch14_224", 28),
    "g": ("vit_giant_patch14_224", 28),
    "SO400M": ("vit_so400m_patch14_siglip_224", 28),
    "DeiT": ("deit_small_patch16_224", 32),
    "DeiT, distilled": ("deit_small_distilled_patch16_224", 32),
    "DeiT-III": ("deit3_small_patch16_224", 32),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", 28),
    "SigLIP": ("vit_base_patch16_siglip_224", 32),
    "CLIP": ("vit_base_patch32_clip_quickgelu_224", 64),
}


def model_of(architecture: str, size: int, **changes) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(architecture, **{**SMALL, "img_size": size, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("pos_embed", "_token", "latent")):  # uninitialized with weight_init="skip"
                parameter.normal_(std=0.1)
            elif parameter.ndim == 1:  # nonzero biases, LayerScales other than 1e-5
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name, size", MODELS.values(), ids=MODELS)
def test_outputs_and_gradients_match_timm(name, size):
    model, images = model_of(name, size)
    report = assert_accelerated(model, images, low=True)
    replaced = {entry.cls for entry in report.replaced}
    assert {"Block", "Conv2d", "Attention", "Mlp", "LayerNorm"} <= replaced
    assert ("AttentionPoolLatent" in replaced) == ("siglip" in name)
    assert {entry.cls for entry in report.not_replaced} == {"Linear"}  # the heads


SMALLER = dict(embed_dim=48, num_heads=3, patch_size=8)
CHANGES = {
    "qk-norm": {"qk_norm": True},
    "RMS qk-norm": {"qk_norm": True, "norm_layer": "rmsnorm"},
    "norms of attention and MLP": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "SwiGLU": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "SwiGLU, packed": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
    "ReLU": {"act_layer": "relu"},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "norm before": {"pre_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "tokens, unpooled": {"global_pool": ""},
    "max pool": {"global_pool": "max"},
    "mean and max pool": {"global_pool": "avgmax"},
    "map pool": {"global_pool": "map", "init_values": 0.1},
    "self-attention pool": {"global_pool": "prr"},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_variants(changes):
    model, images = model_of("vit_tiny_patch16_224", 24, **{**SMALLER, **changes})
    assert_accelerated(model, images)


def test_block_with_unsupported_norm_is_not_replaced():
    model, images = model_of("vit_tiny_patch16_224", 24, **SMALLER, norm_layer="rmsnorm", mlp_layer=SwiGLU)
    report = assert_accelerated(model, images)
    reasons = {entry.name: entry.detail for entry in report.not_replaced}
    assert "RmsNorm" in reasons["blocks.0"] and "SiLU" in reasons["blocks.0.mlp"]
    assert "blocks.0.attn" in {entry.name for entry in report.replaced}


def test_gate_last_mlp_is_not_replaced():
    gate_last = functools.partial(GluMlp, gate_last=True)
    model, images = model_of("vit_tiny_patch16_224", 24, **SMALLER, mlp_layer=gate_last, act_layer=nn.SiLU)
    report = assert_accelerated(model, images)
    assert "gate" in {entry.name: entry.detail for entry in report.not_replaced}["blocks.0.mlp"]


@pytest.mark.parametrize("size", [24, 40])
def test_dynamic_image_size(size):
    model, _ = model_of("vit_tiny_patch16_224", 24, **SMALLER, dynamic_img_size=True)
    assert_accelerated(model, torch.randn(2, 3, size, 16))


def test_dynamic_padding():
    model, _ = model_of("vit_tiny_patch16_224", 24, **SMALLER, dynamic_img_size=True, dynamic_img_pad=True)
    assert_accelerated(model, torch.randn(2, 3, 21, 24))


def test_wrong_image_size_still_raises():
    model, _ = model_of("vit_tiny_patch16_224", 24, **SMALLER)
    vit_triton.accelerate(model, "triton")
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(torch.randn(2, 3, 32, 24))


@pytest.mark.parametrize(
    "changes",
    [{"drop_path_rate": 0.5, "init_values": 0.1}, {"patch_drop_rate": 0.5}],
    ids=["drop path", "patch dropout"],
)
def test_drop_path_and_patch_dropout_draw_as_in_timm(changes):
    model, _ = model_of("vit_tiny_patch16_224", 24, **SMALLER, depth=3, **changes)
    assert_accelerated(model.train(), torch.randn(7, 3, 24, 24), seed=3)


@pytest.mark.parametrize("where", ["attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"])
@pytest.mark.parametrize("fused", [True, False])
def test_each_dropout_is_applied(where, fused):
    # probability 1 makes the outputs comparable
    model, images = model_of("vit_tiny_patch16_224", 24, **SMALLER)
    model.blocks[0].attn.fused_attn = fused
    model.get_submodule(f"blocks.0.{where}").p = 1.0
    assert_accelerated(model.train(), images)
    assert_accelerated(model.eval(), images)


@pytest.mark.parametrize("fused", [True, False])
def test_training_mode_for_attention_dropout_matches_timm(fused):
    model, images = model_of("vit_tiny_patch16_224", 24, **SMALLER)
    attention = model.eval().blocks[0].attn
    attention.fused_attn, attention.attn_drop.p = fused, 1.0
    attention.attn_drop.train()  # PyTorch's fused attention ignores this mode
    assert_accelerated(model, images)


def test_drop_path_without_scaling_is_not_replaced():
    model, images = model_of("vit_tiny_patch16_224", 24, **SMALLER, drop_path_rate=0.5, depth=2)
    model.blocks[1].drop_path1.scale_by_keep = False
    report = assert_accelerated(model.train(), images, seed=0)
    assert "drop_path1" in {entry.name: entry.detail for entry in report.not_replaced}["blocks.1"]


def test_attention_mask():
    model, images = model_of("vit_tiny_patch16_224", 24, **SMALLER)
    mask = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., 0] = True
    theirs = model.forward_features(images, attn_mask=mask)
    report = vit_triton.accelerate(model, "triton")
    torch.testing.assert_close(model.forward_features(images, attn_mask=mask), theirs)
    assert not report.fallbacks()
    assert not torch.allclose(model.forward_features(images), theirs, atol=1e-3)
