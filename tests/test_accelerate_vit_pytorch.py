"""Accelerated vit_pytorch models: outputs and all gradients, by the precision rule."""

import pytest
import torch
import vit_pytorch
from parity import BASE, assert_accelerated, images, shake
from torch import Tensor, nn
from vit_pytorch.distill import DistillableViT, DistillWrapper

from vit_triton import accelerate

REAL = {"image_size": 32, "patch_size": 16, "dim": 768, "heads": 12, "mlp_dim": 3072, "depth": 1, "dim_head": 64}
REPLACED = {"Sequential", "Transformer", "Attention", "FeedForward", "LayerNorm"}


def model_of(cls: type, **changes) -> tuple[nn.Module, Tensor]:
    config = {**BASE, **changes}
    torch.manual_seed(0)
    model = cls(**config)
    shake(model)
    return model, images(config)


@pytest.mark.parametrize("cls", [vit_pytorch.ViT, vit_pytorch.SimpleViT], ids=["ViT", "SimpleViT"])
def test_outputs_and_gradients_match_vit_pytorch(cls):
    torch.manual_seed(0)
    model = cls(**{**BASE, **REAL})
    report = assert_accelerated(model, images(REAL), low=True)
    assert {entry.cls for entry in report.replaced} == REPLACED | ({"ViT"} & {cls.__name__})
    assert [entry.cls for entry in report.not_replaced] == ["Linear"]  # the head


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "mean"},
        {"heads": 1, "dim_head": 24},
        {"num_classes": 0},
        {"image_size": (24, 16), "patch_size": (12, 4)},
    ],
    ids=["mean pool", "no output projection", "all tokens", "non-square"],
)
def test_variants(changes):
    assert_accelerated(*model_of(vit_pytorch.ViT, **changes))


class Distilling(nn.Module):
    """A DistillWrapper that maps images to its loss."""

    def __init__(self, **options) -> None:
        super().__init__()
        student, _ = model_of(DistillableViT)
        teacher, _ = model_of(vit_pytorch.ViT, dim=32)
        self.wrapper = DistillWrapper(student=student, teacher=teacher.eval(), **options)

    def forward(self, image: Tensor) -> Tensor:
        return self.wrapper(image, torch.arange(len(image)))


@pytest.mark.parametrize("options", [{"temperature": 3.0}, {"hard": True, "mlp_layernorm": True}], ids=["soft", "hard"])
def test_student_and_teacher_inside_a_distill_wrapper(options):
    torch.manual_seed(0)
    model = Distilling(**options)
    report = assert_accelerated(model, images(BASE))
    replaced = {entry.name for entry in report.replaced}
    assert {"wrapper.student.transformer", "wrapper.teacher.transformer"} <= replaced


@pytest.mark.parametrize("where", ["0.dropout", "0.to_out.1", "1.net.3", "1.net.5"])
def test_each_dropout_is_applied(where):
    model, image = model_of(vit_pytorch.ViT)
    model.transformer.layers[0].get_submodule(where).p = 1.0  # deterministic outputs
    assert_accelerated(model.train(), image)
    assert_accelerated(model.eval(), image)


@pytest.mark.parametrize("cls", [vit_pytorch.ViT, vit_pytorch.SimpleViT], ids=["ViT", "SimpleViT"])
def test_empty_batch_runs_without_fallback(cls):
    model, image = model_of(cls)
    accelerate(model, "triton", strict=True)
    assert model.eval()(image[:0]).shape == (0, 5)
