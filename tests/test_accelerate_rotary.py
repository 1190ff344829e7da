"""Accelerated models with rotary positions of timm and transformers: logits and all gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from parity import assert_accelerated
from precision import assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vit_triton
from vit_triton import functional as F
from vit_triton.integrations import parts

# real widths, one or two blocks
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "DINOv3": ("vit_small_patch16_dinov3", 48, {"depth": 2}),
    "DINOv3 with biases of q and v": ("vit_small_patch16_dinov3_qkvb", 32, {}),
    "DINOv3 H+, SwiGLU": ("vit_huge_plus_patch16_dinov3", 32, {"embed_dim": 320, "num_heads": 5}),
    "EVA-02 S, three projections": ("eva02_small_patch14_224", 42, {}),
    "EVA-02 B, norm in the MLP": ("eva02_base_patch14_224", 28, {}),
    "EVA-02 CLIP, norm after attention": ("eva02_base_patch16_clip_224", 32, {}),
    "PE": ("vit_pe_core_base_patch16_224", 48, {}),
    "RoPE-ViT": ("vit_small_patch16_rope_224", 48, {}),
    "post norm": ("eva02_enormous_patch14_clip_224", 28, {"embed_dim": 192, "num_heads": 3}),
    "no rotary positions": ("eva_giant_patch14_224", 28, {"embed_dim": 192, "num_heads": 3, "mlp_ratio": 4.0}),
}


def model_of(architecture: str, size: int, **changes: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(architecture, img_size=size, num_classes=5, **{"depth": 1, **changes})
    shake(model)
    return model.eval(), torch.randn(2, 3, size, size)


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # the initial values (biases 0, LayerScales 1e-5) would hide swaps
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim == 2 and parameter.shape[0] == 5:
                parameter.normal_(std=0.05)  # EVA's head starts with small weights


@pytest.mark.parametrize("name, size, changes", MODELS.values(), ids=MODELS)
def test_timm(name, size, changes):
    model, images = model_of(name, size, **changes)
    report = assert_accelerated(model, images, low=True)
    replaced = {entry.cls for entry in report.replaced}
    assert {"EvaBlock", "EvaBlockPostNorm"} & replaced and {"EvaAttention", "AttentionRope"} & replaced
    assert {entry.cls for entry in report.not_replaced} <= {"Linear", "Eva"}


SMALL = dict(embed_dim=48, num_heads=2)
DINOV3 = "vit_small_patch16_dinov3"
VARIANTS = {
    "qk-norm": (DINOV3, {"qk_norm": True}),
    "RMSNorm": (DINOV3, {"norm_layer": timm.layers.RmsNorm, "qk_norm": True, "swiglu_mlp": True, "scale_mlp": True}),
    "inner norms": (DINOV3, {"scale_attn_inner": True, "scale_mlp": True}),
    "post norm": (DINOV3, {"use_post_norm": True, "qk_norm": False}),
    "no prefix tokens": (DINOV3, {"class_token": False, "num_reg_tokens": 0, "global_pool": "avg"}),
    "AttentionRope, three projections": ("vit_pe_core_base_patch16_224", {"qkv_fused": False}),
    "LayerScale of attention only": (DINOV3, {"attn_only_layer_scale": True}),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name, changes", VARIANTS.values(), ids=VARIANTS)
def test_variants(name, changes, fused):
    model, images = model_of(name, 32, **SMALL, **changes)
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = fused, 0.3  # PyTorch's fused attention ignores the scale
    assert not [e for e in assert_accelerated(model, images).not_replaced if "block" in e.name]


def test_each_dropout_is_applied():
    # probability 1 makes the outputs comparable
    for where in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"):
        model, images = model_of("eva02_base_patch14_224", 28, **SMALL)
        model.get_submodule(f"blocks.0.{where}").p = 1.0
        assert_accelerated(model.train(), images)


@pytest.mark.parametrize(
    "changes", [{"drop_path_rate": 0.5}, {"patch_drop_rate": 0.5}, {"use_post_norm": True, "drop_path_rate": 0.5}]
)
def test_drop_path_and_patch_dropout_draw_as_in_timm(changes):
    """Patch dropout gives each sample its own tables."""
    model, _ = model_of(DINOV3, 48, **SMALL, depth=2, **changes)
    assert_accelerated(model.train(), torch.randn(5, 3, 48, 48), seed=3)


def test_dynamic_image_size_and_augmented_tables():
    model, _ = model_of(DINOV3, 48, **SMALL, rope_jitter_coords=2.0)
    for size in ((32, 48), (64, 32)):
        assert_accelerated(model.train(), torch.randn(2, 3, *size), seed=3)


def test_learned_tables_fall_back_if_they_require_a_gradient():
    model, images = model_of("vit_small_patch16_rope_mixed_224", 48, **SMALL, depth=2)
    with torch.no_grad():
        theirs = model(images)
    ours = copy.deepcopy(model)
    report = vit_triton.accelerate(ours, "triton")
    with torch.no_grad():
        assert_same(ours(images), theirs, 192)
    assert not report.fallbacks()
    assert_accelerated(model, images)
    ours(images)
    assert report.fallbacks()["blocks.1"] == {"rotary tables require a gradient": 1}


def test_masks():
    model, images = model_of(DINOV3, 32, **SMALL)
    mask = torch.rand(2, 1, 9, 9) > 0.3
    mask[..., 0] = True
    expected = model.forward_features(images, attn_mask=mask)
    report = vit_triton.accelerate(model, "triton")
    assert_same(model.forward_features(images, attn_mask=mask), expected, 192)
    assert not report.fallbacks()
    model.blocks[0](torch.randn(2, 9, 48), is_causal=True)
    assert "is_causal" in str(report.fallbacks()["blocks.0"])
    with pytest.raises(RuntimeError, match="must match"):
        model.forward_features(images, attn_mask=mask[..., :-1])
    assert "attention mask must broadcast" in str(report.fallbacks()["blocks.0"])


@pytest.mark.parametrize("changes, why", [({"gated_attn": True}, "gate"), ({"num_kv_heads": 1}, "heads of keys")])
def test_blocks_that_are_not_supported(changes, why):
    block = timm.models.eva.EvaBlock(48, 2, attn_type="rope", qkv_fused=False, **changes)
    reasons = {entry.name: entry.detail for entry in vit_triton.accelerate(block, "triton").not_replaced}
    assert why in reasons[""] and why in reasons["attn"]


def test_tables_of_another_length_raise_as_in_timm():
    model, images = model_of(DINOV3, 32, **SMALL)
    vit_triton.accelerate(model, "triton")
    block, x = model.blocks[0], torch.randn(2, 9, 48)
    with pytest.raises(RuntimeError, match="must match"):
        block(x, rope=torch.randn(3, 48))


# --- transformers ------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).last_hidden_state


def dinov3(**changes: Any) -> Wrapped:
    torch.manual_seed(0)
    sizes = dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=2, image_size=48)
    model = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**{**sizes, **changes}))
    shake(model)
    return Wrapped(model).eval()


WIDE = dict(hidden_size=640, num_attention_heads=10, intermediate_size=2560, num_hidden_layers=1)
CONFIGS = {
    "S": {},
    "H+": dict(use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False, **WIDE),
    "eager": dict(attn_implementation="eager", num_hidden_layers=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers(config):
    report = assert_accelerated(dinov3(**config), torch.randn(2, 3, 48, 32), low=True)
    layers = {e.name for e in report.replaced if e.cls == "DINOv3ViTLayer"}
    assert layers == {f"model.model.layer.{i}" for i in range(config.get("num_hidden_layers", 2))}


SMALL_CONFIG = dict(hidden_size=48, num_attention_heads=2, intermediate_size=96)


def test_transformers_in_training():
    model = dinov3(**SMALL_CONFIG, pos_embed_shift=0.2, pos_embed_rescale=2.0, layerscale_value=0.5)
    assert_accelerated(model.train(), torch.randn(2, 3, 48, 48), seed=3)


def test_outputs_of_transformers():
    """hidden_states of all layers, and attention weights, for which the layers fall back."""
    untouched = dinov3(**SMALL_CONFIG, attn_implementation="eager").model
    ours, images = copy.deepcopy(untouched), torch.randn(2, 3, 48, 48)
    vit_triton.accelerate(ours, "triton")
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        results = [model(pixel_values=images, **options) for model in (ours, untouched)]
        a, b = (each.attentions if "output_attentions" in options else each.hidden_states for each in results)
        assert len(a) == len(b) > 1
        assert_same(a, b, 96)


# --- compiled and prepacked --------------------------------------------------------------------------------


def eva02() -> nn.Module:
    return model_of("eva02_small_patch14_224", 28, **SMALL, depth=2)[0]


@pytest.mark.parametrize("make", [eva02, lambda: dinov3(**SMALL_CONFIG)], ids=["timm", "transformers"])
def test_rotation_in_the_projection(make: Callable[[], nn.Module], monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(parts, "rotates_in_projection", lambda x, parts: parts.q_norm is None)
    monkeypatch.setattr(F, "_rotate", lambda *_: pytest.fail("attention rotates"))
    size = 28 if make is eva02 else 48
    assert_accelerated(make(), torch.randn(2, 3, size, size), low=True)


@pytest.mark.parametrize("make", [eva02, lambda: dinov3(**SMALL_CONFIG)], ids=["timm", "transformers"])
def test_compiled_and_prepacked(make: Callable[[], nn.Module], monkeypatch):
    model, images = make(), torch.randn(2, 3, 28, 28) if make is eva02 else torch.randn(2, 3, 48, 48)
    vit_triton.accelerate(model, "triton")
    expected = model(images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(images), expected, 192)
    compiled(images).sum().backward()
    vit_triton.prepack(model)
    calls = []
    encoder = F.encoder
    monkeypatch.setattr(F, "encoder", lambda x, blocks, **o: calls.append((len(blocks), o)) or encoder(x, blocks, **o))
    with torch.no_grad():
        for _ in range(2):
            assert_same(model(images), expected, 192)
    assert [count for count, _ in calls] == [2, 2] and all(options["rope"] for _, options in calls)


def test_compiled_while_models_are_prepacked():
    """Dynamo must not guard on the prepacked parameters: those of another model can be deleted at any time."""
    model, other, images = dinov3(**SMALL_CONFIG), dinov3(**SMALL_CONFIG), torch.randn(2, 3, 48, 48)
    for each in (model, other):
        vit_triton.accelerate(each, "triton")
        vit_triton.prepack(each)
    with torch.no_grad():
        expected = model(images)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        assert_same(compiled(images), expected, 192)
        vit_triton.unpack(other)
        assert_same(compiled(images), expected, 192)
        assert counter.frame_count == 1
