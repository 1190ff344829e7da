"""Whole ViTs: forward, and a training step, against the eager models of others."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.runner import OURS, Case

SIZES = {
    "ViT-B/16": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
    "ViT-S/16": dict(dim=384, depth=12, heads=6, mlp_dim=1536),
}


UNCHECKED = ("timm", "torchvision", "HF")


def build(name: str) -> dict[str, Callable[[], nn.Module]]:
    size = SIZES[name]

    def ours() -> nn.Module:
        import vit_triton

        return vit_triton.ViT(image_size=224, patch_size=16, num_classes=1000, backend="triton", **size)

    def vit_pytorch() -> nn.Module:
        import vit_pytorch

        return vit_pytorch.ViT(image_size=224, patch_size=16, num_classes=1000, **size)

    def timm() -> nn.Module:
        import timm

        return timm.create_model("vit_base_patch16_224" if name == "ViT-B/16" else "vit_small_patch16_224")

    def torchvision() -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(224, 16, size["depth"], size["heads"], size["dim"], size["mlp_dim"])

    def hugging_face() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=size["dim"],
            num_hidden_layers=size["depth"],
            num_attention_heads=size["heads"],
            intermediate_size=size["mlp_dim"],
            num_labels=1000,
        )
        return ViTForImageClassification(config)

    return {OURS: ours, "vit_pytorch": vit_pytorch, "timm": timm, "torchvision": torchvision, "HF": hugging_face}


def logits(output: Any) -> torch.Tensor:
    return getattr(output, "logits", output)


def inference(model: nn.Module, image: torch.Tensor) -> Callable[[], torch.Tensor]:
    model.eval()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return logits(model(image))

    return run


def training_step(model: nn.Module, image: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> torch.Tensor:
        loss = nn.functional.cross_entropy(logits(model(image)).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """vit_pytorch's model has our weights, and both are compared with it in float64; the others have their own."""
    for name in SIZES:
        for batch in (1, 8):
            image = torch.randn(batch, 3, 224, 224).to(dtype)
            models = {key: make().to(dtype) for key, make in build(name).items()}
            models[OURS].load_state_dict(models["vit_pytorch"].state_dict())
            exact = inference(copy.deepcopy(models["vit_pytorch"]).double(), image.double())
            providers = {key: inference(model, image) for key, model in models.items()}
            yield Case(f"{name} forward, batch {batch}", dtype, providers, exact, unchecked=UNCHECKED)
    name, image, labels = "ViT-S/16", torch.randn(8, 3, 224, 224).to(dtype), torch.randint(1000, (8,))
    providers = {key: training_step(make().to(dtype), image, labels) for key, make in build(name).items()}
    yield Case(f"{name} training step, batch 8", dtype, providers, None)
