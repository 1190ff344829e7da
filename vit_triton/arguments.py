"""Groups of arguments, passed from the public functions to the kernel launchers."""

from typing import NamedTuple

from torch import Tensor

# LayerNorm or RMSNorm over the last dimension D: weight (D,) or None, bias (D,) or None, eps
Norm = tuple[Tensor | None, Tensor | None, float]
# tables of rotary positions: cos and sin
Rope = tuple[Tensor, Tensor]


class SavedNorm(NamedTuple):
    """A LayerNorm saved for backward. ``weight``, ``bias``: (D,) or None; ``mean``, ``rstd``: (rows,), float32."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor


class Branch(NamedTuple):
    """Factors of a branch, applied before the residual is added.

    Attributes:
        layer_scale: gamma (N,), one factor per column (Touvron et al. 2021, arXiv:2103.17239).
        samples: (B,), float32, one factor per sample for stochastic depth (Huang et al. 2016, arXiv:1603.09382).
    """

    layer_scale: Tensor | None = None
    samples: Tensor | None = None

    @property
    def scales(self) -> bool:
        return self.layer_scale is not None or self.samples is not None


class Dropout(NamedTuple):
    """``p``: probability of zeroing an element. ``seed``: one int64, required if ``p`` > 0."""

    p: float = 0.0
    seed: Tensor | None = None

    @property
    def scale(self) -> float:
        """The factor of the remaining elements; 0 if ``p`` is 1."""
        return 1.0 / (1.0 - self.p) if self.p < 1 else 0.0


NO_BRANCH = Branch()
NO_DROPOUT = Dropout()


class Block(NamedTuple):
    """The weights of a pre-norm encoder block on tokens of width D.

    The block computes x = x + layer_scale1 * out(attention(qkv(norm1(x)))), then x + layer_scale2 * mlp(norm2(x)).
    Shapes: qkv_weight (3 * heads * head size, D), rows ordered (3, heads, head size); out_weight (D, heads * head
    size); w1 (hidden, D); w2 (D, hidden); layer_scale1 and layer_scale2 (D,) or None.
    """

    norm1: Norm
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    norm2: Norm
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    layer_scale1: Tensor | None = None
    layer_scale2: Tensor | None = None
