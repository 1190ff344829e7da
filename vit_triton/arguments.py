"""Groups of arguments, passed from the public functions to the kernel launchers."""

from typing import NamedTuple

from torch import Tensor

# LayerNorm or RMSNorm over the last dimension D: weight (D,) or None, bias (D,) or None, eps
Norm = tuple[Tensor | None, Tensor | None, float]
# tables of rotary positions: cos and sin
Rope = tuple[Tensor, Tensor]


class Rotation(NamedTuple):
    """Rotary positions of q and k in a packed projection, (samples * tokens, 3 * heads * head size).

    Attributes:
        cos, sin: (samples or 1, heads or 1, tokens - prefix, columns) or (tokens - prefix, columns).
        prefix: number of tokens at the start of a sample that are not rotated.
        interleaved: whether neighbours are a pair; else channel i and channel i + D' / 2, D' the rotated channels.
    """

    cos: Tensor
    sin: Tensor
    tokens: int
    heads: int
    prefix: int
    interleaved: bool


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


class DecomposedBias(NamedTuple):
    """A bias of attention scores over Hk rows of Wk keys (Li et al. 2022, arXiv:2112.01526, section 4.1).

    The bias of query n and key k is rel_h[..., n, k // Wk] + rel_w[..., n, k % Wk]. The kernels never compute it as a
    matrix.

    Attributes:
        rel_h: (B, H, N, Hk).
        rel_w: (B, H, N, Wk).
    """

    rel_h: Tensor
    rel_w: Tensor


class Packed(NamedTuple):
    """Packed sequences.

    Attributes:
        tokens: (total, ...), the valid tokens of the first sequence, then those of the second, and so on.
        indices: (total,), int64: the position of each token in the flattened (B, N).
        cu_seqlens: (B + 1,), int32: the first token of each sequence, and the number of tokens.
        max_seqlen: the longest length.
    """

    tokens: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class ScoreMask(NamedTuple):
    """The bias of attention scores and the keys that take part.

    Attributes:
        bias: broadcasts to (B, H, N_q, N_k); floating, added after the scale, or bool, True takes part.
        rel: a decomposed bias; excludes ``bias``.
        key_lengths: (B,), int32 or int64; keys at or past the length do not take part.
        causal: "" for none; "top_left": query i attends to keys up to i; "bottom_right": to keys up to i + N_k - N_q.
    """

    bias: Tensor | None = None
    rel: DecomposedBias | None = None
    key_lengths: Tensor | None = None
    causal: str = ""

    @property
    def floating(self) -> bool:
        """Whether a bias is added to the scores."""
        return self.rel is not None or self.bias is not None and self.bias.is_floating_point()

    @property
    def biased(self) -> bool:
        """Whether there is a bias of any kind."""
        return self.bias is not None or self.rel is not None

    @property
    def empty_rows(self) -> bool:
        """Whether a row may have no keys."""
        return self.biased or self.key_lengths is not None or self.causal != ""


NO_BRANCH = Branch()
NO_DROPOUT = Dropout()
NO_MASK = ScoreMask()


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
