"""Accelerated models with adapters of peft: their Linears run as modules, the rest on the kernels."""

import pytest
import torch
from torch import nn

from vit_triton.integrations import accelerate, restore

for package in ("peft", "timm", "transformers"):
    pytest.importorskip(package)
import peft  # noqa: E402 - after the skip
import timm  # noqa: E402
import transformers  # noqa: E402


def timm_vit() -> nn.Module:
    options = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=3, drop_path_rate=0.0)
    return timm.models.vision_transformer.VisionTransformer(**options, init_values=0.5, qkv_bias=True)


def timm_eva() -> nn.Module:
    """Rotary positions, three projections with two biases, and SwiGLU."""
    options = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    return timm.models.eva.Eva(
        **options, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_abs_pos_emb=False
    )


def timm_swin() -> nn.Module:
    options = dict(img_size=16, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=2, num_classes=3)
    return timm.models.swin_transformer.SwinTransformer(**options, drop_path_rate=0.0)


def hugging_face_vit() -> nn.Module:
    options = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, num_labels=3)
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=16, **options))


# targets: both Linears of attention and MLP, or the values alone, next to plain Linears
MODELS = {
    "timm": (timm_vit, ["qkv", "attn.proj", "fc1", "fc2"]),
    "timm MLP": (timm_vit, ["fc2"]),
    "Eva": (timm_eva, ["v_proj", "attn.proj", "fc1_x", "fc2"]),
    "Swin": (timm_swin, ["qkv", "attn.proj", "fc1"]),
    "transformers": (hugging_face_vit, ["q_proj", "v_proj", "fc1"]),
}


def adapted(kind: str) -> nn.Module:
    build, targets = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return insert(model, targets)


def insert(model: nn.Module, targets: list[str]) -> nn.Module:
    torch.manual_seed(1)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    return model


def run(model: nn.Module) -> list[torch.Tensor]:
    """Logits and the gradients of all parameters."""
    side = 16 if isinstance(model, timm.models.swin_transformer.SwinTransformer) else 32
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    logits = model(images)
    logits = getattr(logits, "logits", logits)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_before_and_after_accelerate(kind):
    build, targets = MODELS[kind]
    model = adapted(kind)
    expected = run(model)
    report = accelerate(model, "triton", strict=True)
    assert {entry.name for entry in report.not_replaced} <= {"head", "head.fc", "classifier"}
    before = run(model)
    for ours, theirs in zip(before, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not report.fallbacks()
    state = restore(model).state_dict()

    torch.manual_seed(0)
    model = build()
    accelerate(model, "triton", strict=True)
    insert(model, targets).load_state_dict(state)
    for ours, theirs in zip(run(model), before, strict=True):
        assert torch.equal(ours, theirs)


def test_blocks_with_adapters_run_in_inference():
    """They do not run as one operator, which reads the weights of the Linears."""
    model = adapted("timm").eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images)
        report = accelerate(model, "triton", strict=True)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert {entry.name for entry in report.replaced} >= {"blocks.0", "blocks.1", "blocks.0.attn", "blocks.0.mlp"}


def test_hook_on_an_adapter_falls_back():
    model, calls = adapted("timm"), []
    report = accelerate(model, "triton")
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    run(model)
    assert calls and any("has hooks" in str(reason) for reason in report.fallbacks().values())


def test_dropout_and_stochastic_depth_with_adapters():
    """Stochastic depth drops whole samples: with probability 1, a block returns its input."""
    model = adapted("timm").train()
    accelerate(model, "triton", strict=True)
    block, x = model.blocks[0], torch.rand(2, 5, 24)
    for number in "12":
        setattr(block, f"drop_path{number}", timm.layers.DropPath(1.0))
    assert torch.equal(block(x), x)
    block.mlp.drop2.p = block.attn.proj_drop.p = 1.0
    for number in "12":
        setattr(block, f"drop_path{number}", nn.Identity())
    assert torch.equal(block(x), x)
