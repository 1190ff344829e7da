"""Distillation: a student also learns the predictions of a frozen teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_triton.training.preprocessing import Preprocessing


def distillation_loss(
    logits: Tensor, wanted: Tensor, loss: Tensor, *, temperature: float, alpha: float, hard: bool
) -> Tensor:
    """Combine the ``loss`` on the labels with the teacher's predictions.

    Soft: (1 - alpha) loss + alpha T^2 KL(softmax(wanted / T) || softmax(logits / T)) (Hinton et al. 2015,
    arXiv:1503.02531, section 2). Hard: the teacher's most likely class is a label of weight alpha (Touvron et al. 2021,
    arXiv:2012.12877, equation 3).

    Args:
        logits: (B, classes), of the student; wanted: (B, classes), of the teacher.
    """
    if hard:
        from_teacher = F.cross_entropy(logits, wanted.argmax(-1))
    else:
        ours, theirs = (F.log_softmax(x / temperature, dim=-1) for x in (logits, wanted))
        from_teacher = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
    return (1 - alpha) * loss + alpha * from_teacher


class Teacher:
    """The predictions of a frozen model for the images of a student.

    The images are those that the student receives, with its augmentation: they are resized and normalized for the
    teacher.
    """

    def __init__(self, model: nn.Module, ours: Preprocessing, students: Preprocessing) -> None:
        self.model, self.ours, self.students = model.eval().requires_grad_(False), ours, students

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute images of the student (B, C, H, W) -> logits (B, classes), float32."""
        return self.model(adapted(images, self.students, self.ours)).float()


def adapted(images: Tensor, before: Preprocessing, after: Preprocessing) -> Tensor:
    """Convert images for one model to images for another."""
    if before == after:
        return images
    images = images * _per_channel(before.std, images) + _per_channel(before.mean, images)
    if before.channels != after.channels:
        images = images.expand(-1, after.channels, -1, -1) if before.channels == 1 else images.mean(1, keepdim=True)
    if before.size != after.size:
        images = F.interpolate(images, after.size, mode="bicubic", antialias=True)
    return (images - _per_channel(after.mean, images)) / _per_channel(after.std, images)


def _per_channel(numbers: tuple[float, ...], images: Tensor) -> Tensor:
    return images.new_tensor(numbers).view(-1, 1, 1)
