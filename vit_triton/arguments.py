"""Arguments that travel together, from the public functions to the launchers of the kernels."""

from typing import NamedTuple

from torch import Tensor

# LayerNorm or RMSNorm over the last dimension D: weight and bias, each (D,) or None, and eps
Norm = tuple[Tensor | None, Tensor | None, float]


class SavedNorm(NamedTuple):
    """A LayerNorm that ran: ``weight``, ``bias``: (D,) or None; ``mean``, ``rstd``: (rows,), float32."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor


class Branch(NamedTuple):
    """What multiplies a branch before it is added to its residual. ``layer_scale``: gamma (N,), for each column
    (Touvron et al. 2021, arXiv:2103.17239). ``samples``: s (B,), float32, for each sample of rows / B rows (stochastic
    depth, Huang et al. 2016, arXiv:1603.09382)."""

    layer_scale: Tensor | None = None
    samples: Tensor | None = None

    @property
    def scales(self) -> bool:
        return self.layer_scale is not None or self.samples is not None


class Dropout(NamedTuple):
    """``p``: the probability that an element is zeroed. ``seed``: one int64, needed where ``p`` is above 0."""

    p: float = 0.0
    seed: Tensor | None = None

    @property
    def scale(self) -> float:
        """The factor of the elements that are kept; with a ``p`` of 1 there are none."""
        return 1.0 / (1.0 - self.p) if self.p < 1 else 0.0


NO_BRANCH = Branch()
NO_DROPOUT = Dropout()


class Block(NamedTuple):
    """A pre-norm block of a Transformer encoder on tokens of width D: x + out(attention(qkv(norm1(x)))), and then
    x + mlp(norm2(x)); each branch times its LayerScale (D,), where it has one. The weight of qkv is (3 * I, D), its
    rows in the order (3, heads, head size); that of out is (D, I), w1 (hidden, D), w2 (D, hidden)."""

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
