"""DeiT: distillation through attention (Touvron et al. 2021, arXiv:2012.12877, section 3).

A distillation token is appended to the patch tokens. Its output is trained with the predictions of a teacher, as the
class token is trained with the labels. The classes have the arguments, parameter names and losses of
``vit_pytorch.distill``.
"""

from __future__ import annotations

import copy
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from vit_triton.checks import check_module, check_probability, type_name
from vit_triton.models.vit import ViT
from vit_triton.modules import LayerNorm, Linear

__all__ = ["DistillWrapper", "DistillableViT"]


class DistillableViT(ViT):
    """A :class:`ViT` with an optional distillation token. Arguments and parameters are those of :class:`ViT`."""

    def forward(self, img: Tensor, distill_token: Tensor | None = None) -> Any:
        """Compute (B, channels, H, W) -> (B, num_classes).

        Args:
            img: the images.
            distill_token: (1, dim), appended to the tokens without a position. The result is then a pair of the logits
                and the output of this token, (B, dim).
        """
        if distill_token is None:
            return super().forward(img)
        if distill_token.shape != (1, self.dim):
            raise ValueError(f"distill_token must have shape (1, {self.dim}), got {tuple(distill_token.shape)}")
        if self.mlp_head is None:
            raise ValueError("distill_token requires a head, but a model with num_classes=0 has no head")
        x = self.embed(img)
        token = distill_token.to(x.dtype).expand(x.shape[0], 1, -1)
        x = self.transformer(self.dropout(torch.cat((x, token), dim=1)))
        x, token = x[:, :-1], x[:, -1]
        x = x.mean(dim=1) if self.pool == "mean" else x[:, 0]
        return self.mlp_head(self.to_latent(x)), token

    def to_vit(self) -> ViT:
        """Return a :class:`ViT` with a copy of the weights, with the same device, dtype and mode."""
        vit = copy.deepcopy(self)
        vit.__class__ = ViT  # type: ignore[assignment]
        return vit


class DistillWrapper(nn.Module):
    """Compute the distillation loss of a student (arXiv:2012.12877, equations 2 and 3).

    The teacher is frozen: it runs in evaluation mode, without gradients.

    Args:
        teacher: module that maps images to logits (B, num_classes), or to an object with an attribute ``logits``.
        student: the model to train. :meth:`DistillableViT.to_vit` returns the trained model.
        temperature: temperature of soft distillation. Larger values make both distributions smoother.
        alpha: weight of the teacher's part of the loss, 0 to 1.
        hard: use the teacher's most likely class as a label instead of its distribution.
        mlp_layernorm: add a LayerNorm before the head of the distillation token.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `temperature` is not positive, `alpha` is not between 0 and 1, or `student` has no head.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module,
        student: DistillableViT,
        temperature: float = 1.0,
        alpha: float = 0.5,
        hard: bool = False,
        mlp_layernorm: bool = False,
    ) -> None:
        check_module("teacher", teacher)
        if not isinstance(student, DistillableViT):
            raise TypeError(f"student must be a vit_triton.DistillableViT, got {type_name(student)}")
        if student.mlp_head is None:
            raise ValueError("student must have at least 1 class, got num_classes=0")
        _check_loss(temperature, alpha)
        super().__init__()
        self.teacher = teacher.eval()
        self.student = student
        self.temperature = temperature
        self.alpha = alpha
        self.hard = hard
        dim, backend = student.dim, student.backend
        self.distillation_token = nn.Parameter(torch.randn(1, dim))
        self.distill_mlp = nn.Sequential(
            LayerNorm(dim, backend=backend) if mlp_layernorm else nn.Identity(),
            Linear(dim, student.num_classes, backend=backend),
        )

    def forward(
        self,
        img: Tensor,
        labels: Tensor,
        temperature: float | None = None,
        alpha: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            img: (B, channels, H, W), input of both models.
            labels: (B,), classes.
            temperature: overrides the temperature of the wrapper.
            alpha: overrides the alpha of the wrapper.
            kwargs: further arguments of the student.

        Raises:
            ValueError: The logits of teacher and student differ in shape, or an argument is invalid.
        """
        temperature = self.temperature if temperature is None else temperature
        alpha = self.alpha if alpha is None else alpha
        _check_loss(temperature, alpha)
        with torch.no_grad():
            wanted = self.teacher(img)
        wanted = getattr(wanted, "logits", wanted)
        logits, token = self.student(img, distill_token=self.distillation_token, **kwargs)
        if not isinstance(wanted, Tensor) or wanted.shape != logits.shape:
            came = f"shape {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else type_name(wanted)
            raise ValueError(f"teacher must return logits of the student's shape {tuple(logits.shape)}, got {came}")
        distilled = self.distill_mlp(token)
        if self.hard:
            from_teacher = cross_entropy(distilled, wanted.argmax(dim=-1))
        else:
            divergence = kl_div(
                log_softmax(distilled / temperature, dim=-1),
                softmax(wanted / temperature, dim=-1),
                reduction="batchmean",
            )
            from_teacher = divergence * temperature**2
        return cross_entropy(logits, labels) * (1 - alpha) + from_teacher * alpha

    def train(self, mode: bool = True) -> DistillWrapper:
        """Set the mode of the student and the distillation head. The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self


def _check_loss(temperature: float, alpha: float) -> None:
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {type_name(temperature)} {temperature!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    check_probability("alpha", alpha)
