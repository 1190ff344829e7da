"""Accelerated torchvision models: logits and all gradients, by the precision rule."""

import pytest
import torch
from parity import assert_accelerated
from torch import Tensor, nn
from torchvision.models import vision_transformer

WIDTHS = {"B": (12, 768, 3072), "L": (16, 1024, 4096), "H": (16, 1280, 5120)}


def model_of(heads: int, width: int, hidden: int, **changes) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_classes": 5, **changes}
    model = vision_transformer.VisionTransformer(num_heads=heads, hidden_dim=width, mlp_dim=hidden, **sizes)
    with torch.no_grad():
        model.heads.head.weight.normal_(std=0.1)  # initialized to 0
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("sizes", WIDTHS.values(), ids=WIDTHS)
def test_outputs_and_gradients_match_torchvision(sizes):
    model, images = model_of(*sizes)
    report = assert_accelerated(model, images, low=True)
    replaced = {"EncoderBlock", "MultiheadAttention", "MLPBlock", "LayerNorm", "Conv2d"}
    replaced |= {"Sequential", "VisionTransformer"}  # containers of blocks
    assert {entry.cls for entry in report.replaced} == replaced
    assert [entry.name for entry in report.not_replaced] == ["heads.head"]


def test_two_layers_and_representation_layer():
    model, images = model_of(3, 48, 96, num_layers=2, representation_size=24)
    assert_accelerated(model, images)


def test_convolutional_stem_is_not_replaced():
    stem = [vision_transformer.ConvStemConfig(8, 3, 4), vision_transformer.ConvStemConfig(16, 3, 4)]
    model, images = model_of(3, 48, 96, conv_stem_configs=stem)
    report = assert_accelerated(model, images)
    assert "conv_proj.conv_bn_relu_0.0" in {entry.name for entry in report.not_replaced}


@pytest.mark.parametrize("where", ["self_attention", "dropout", "mlp.2", "mlp.4"])
def test_each_dropout_is_applied(where):
    model, images = model_of(3, 48, 96)
    part = model.encoder.layers[0].get_submodule(where)
    setattr(part, "dropout" if where == "self_attention" else "p", 1.0)  # deterministic outputs
    assert_accelerated(model.train(), images)
    assert_accelerated(model.eval(), images)
