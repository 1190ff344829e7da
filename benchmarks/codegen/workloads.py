"""Calls of the operators, forward and backward, that together launch all kernels."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vit_triton import functional as F
from vit_triton.arguments import Block, DecomposedBias
from vit_triton.kernels.picker import Picker, override_choice
from vit_triton.kernels.sums.sum_parts import sum_parts

TOKENS, WIDTH, HIDDEN, HEADS, HEAD_DIM = 197, 768, 3072, 12, 64  # ViT-B/16 at 224 x 224
HEAD_DIMS = (16, 32, 64, 72, 80, 88, 96, 104, 128, 192, 256)
# (width, hidden): ViT Ti, S, B, L, H, g and SO400M
WIDTHS = ((192, 768), (384, 1536), (768, 3072), (1024, 4096), (1280, 5120), (1408, 6144), (1152, 4304))
# remainders of 16, 32 and 64 for the masked last block; long sequences use other tiles
LENGTHS = (16, 17, 26, 50, 64, 257, 577, 1370)
WINDOWS = (4, 5, 7, 9, 12)  # sides of windows in tiles of 16, 32, 64, 128 and 256 tokens
BATCH = 8
ROWS = 8
# every_tile compiles the tiles of products for so many rows, and those of attention for so many heads of all samples
ROW_COUNTS = (8, 400, 1600, 2**30)
HEAD_COUNTS = (8, 2**30)
BY_ROWS = ("pick_linear_fwd", "pick_linear_bwd_input", "pick_attention_fwd")  # pickers whose tiles depend on the rows


def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _norm(dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor, float]:
    return _zeros(dtype, width), _zeros(dtype, width), 1e-5


def _differentiate(y: Any, expanded: bool = False) -> None:
    """Run backward with a contiguous gradient, or with an ``expanded`` one, as in .sum().backward()."""
    outputs = [y] if isinstance(y, Tensor) else list(y)
    if not outputs[0].requires_grad:
        return
    one = torch.ones(1, dtype=outputs[0].dtype)
    torch.autograd.backward(
        outputs,
        [one.to(y.dtype).expand_as(y) if expanded else torch.zeros_like(y) for y in outputs],
    )


def main_kernels(dtype: torch.dtype) -> None:
    """Launch attention, MLP, LayerNorm and patch embedding of ViT-B/16 at 224 x 224."""
    x = _zeros(dtype, BATCH, TOKENS, WIDTH)
    _differentiate(F.attention_packed(_zeros(dtype, BATCH, TOKENS, 3, HEADS, HEAD_DIM), backend="triton"))
    _mlp(x, WIDTH, HIDDEN, norm=_norm(dtype, WIDTH), residual=x)
    _patches(_zeros(dtype, BATCH, 3, 224, 224), dtype, 16, WIDTH)


def each_kernel(dtype: torch.dtype) -> None:
    """Launch every kernel of ViT-B/16 at 224 x 224, in few variants."""
    main_kernels(dtype)
    x = _zeros(dtype, BATCH, TOKENS, WIDTH)
    qkv, normed = _zeros(dtype, BATCH, TOKENS, 3, HEADS, HEAD_DIM), _norm(dtype, HEAD_DIM)
    _differentiate(F.attention_packed(qkv, q_norm=normed, k_norm=normed, backend="triton"))
    for layout in ("half", "interleaved"):
        rotary_attention(dtype, BATCH, TOKENS, layout)
    qkv_projection(dtype, BATCH, TOKENS, "half")
    biased_attention(dtype, BATCH, TOKENS, HEAD_DIM)
    rel = DecomposedBias(*(_zeros(dtype, BATCH, HEADS, 196, 14) for _ in range(2)))
    _differentiate(F.attention_packed(_zeros(dtype, BATCH, 196, 3, HEADS, HEAD_DIM), bias=rel, backend="triton"))
    _gated(x, HIDDEN)
    branch = dict(residual=x, layer_scale=_zeros(dtype, WIDTH), drop_path_p=0.1)
    _linear(x, WIDTH, **branch)
    swin_attention(dtype, BATCH, 56, 3, 7)
    swin_attention(dtype, BATCH, 32, 3, 16)


def swin_attention(
    dtype: torch.dtype,
    batch: int,
    side: int,
    heads: int,
    window: int,
    *,
    shifted: bool = True,
    cosine: bool = False,
    head_dim: int = 32,
    **options: Any,
) -> None:
    """Attention of a Swin block on ``side`` x ``side`` tokens; stage 1 of Swin-T: 56, 3 heads, window 7."""
    table = _zeros(dtype, (2 * window - 1) ** 2, heads)
    out = F.window_attention(
        _zeros(dtype, batch, side, side, 3, heads, head_dim),
        F.relative_position_bias(table, (window, window), backend="triton"),
        window=(window, window),
        shift=(window // 2, window // 2) if shifted else (0, 0),
        logit_scale=_zeros(dtype, heads) if cosine else None,
        **options,
        backend="triton",
    )
    _differentiate(out)


def vit_b_16(dtype: torch.dtype) -> None:
    """Launch every kernel variant of ViT-B/16 at 224 x 224, and a plain LayerNorm."""
    each_kernel(dtype)
    x, residual = (_zeros(dtype, BATCH, TOKENS, WIDTH) for _ in range(2))
    _differentiate(F.linear(x, _zeros(dtype, 3 * WIDTH, WIDTH), norm=_norm(dtype, WIDTH), backend="triton"))
    _differentiate(F.layer_norm(x, *_norm(dtype, WIDTH)[:2], residual=residual, backend="triton")[0])
    _patches(torch.zeros(BATCH, 3, 224, 224, dtype=torch.uint8), dtype, 16, WIDTH, mean=[0.5] * 3, std=[0.5] * 3)


def expanded_gradients(dtype: torch.dtype) -> None:
    """Run backward with stride-0 gradients, as in .sum().backward()."""
    q, k, v = (_zeros(dtype, 1, TOKENS, 2, HEAD_DIM) for _ in range(3))
    _differentiate(F.attention(q, k, v, backend="triton"), expanded=True)
    x = _zeros(dtype, ROWS, WIDTH)
    _mlp(x, WIDTH, HIDDEN, expanded=True)
    _linear(x, WIDTH, expanded=True)
    image = _zeros(dtype, 1, 3, 64, 64)
    _differentiate(F.patch_embed(image, _zeros(dtype, WIDTH, 768), patch_size=16, backend="triton"), expanded=True)


def attention(dtype: torch.dtype, head_dim: int, dropout_p: float, n_q: int = TOKENS, n_k: int = TOKENS) -> None:
    q, k, v = (_zeros(dtype, 1, n, 2, head_dim) for n in (n_q, n_k, n_k))
    _differentiate(F.attention(q, k, v, dropout_p=dropout_p, backend="triton"))


def masked_attention(dtype: torch.dtype, head_dim: int = HEAD_DIM) -> None:
    """Launch attention with a bias, key lengths, a causal mask and a decomposed bias, and on packed sequences."""
    sides = 14, 14
    n = sides[0] * sides[1]
    qkv = _zeros(dtype, BATCH, TOKENS, 3, HEADS, head_dim)
    lengths = torch.full((BATCH,), TOKENS)
    biased_attention(dtype, BATCH, TOKENS, head_dim)
    for options in (dict(key_lengths=lengths), dict(causal=True)):
        _differentiate(F.attention_packed(qkv, **options, backend="triton"))
    rel = DecomposedBias(*(_zeros(dtype, BATCH, HEADS, n, side) for side in sides))
    _differentiate(F.attention_packed(_zeros(dtype, BATCH, n, 3, HEADS, head_dim), bias=rel, backend="triton"))
    q, k, v = _zeros(dtype, BATCH * TOKENS, 3, HEADS, head_dim).unbind(1)
    cu_seqlens = torch.arange(BATCH + 1, dtype=torch.int32) * TOKENS
    _differentiate(F.attention_varlen(q, k, v, cu_seqlens, TOKENS, backend="triton"))


def biased_attention(dtype: torch.dtype, batch: int, n_tokens: int, head_dim: int = HEAD_DIM) -> None:
    """Attention with a bias that all samples share."""
    bias = _zeros(dtype, HEADS, n_tokens, n_tokens)
    qkv = _zeros(dtype, batch, n_tokens, 3, HEADS, head_dim)
    _differentiate(F.attention_packed(qkv, bias=bias, backend="triton"))


def rotary_attention(
    dtype: torch.dtype, batch: int, n_tokens: int, layout: str, heads: int = HEADS, head_dim: int = HEAD_DIM
) -> None:
    """Attention with one prefix token and an angle per channel."""
    qkv, table = _zeros(dtype, batch, n_tokens, 3, heads, head_dim), torch.zeros(n_tokens - 1, head_dim)
    rope = dict(rope=(table, table), rope_prefix=1, rope_layout=layout)
    _differentiate(F.attention_packed(qkv, **rope, backend="triton"))


def qkv_projection(dtype: torch.dtype, batch: int, n_tokens: int, layout: str | None = None) -> None:
    """The projection to q, k and v, with rotated q and k for a ``layout``: one prefix token and an angle per pair."""
    table = torch.zeros(n_tokens - 1, HEAD_DIM // 2)
    rope = {} if layout is None else dict(rope=(table, table), rope_heads=HEADS, rope_prefix=1, rope_layout=layout)
    _linear(_zeros(dtype, batch, n_tokens, WIDTH), 3 * WIDTH, **rope)


def packed_attention(dtype: torch.dtype, batch: int, n_tokens: int, head_dim: int, dropout_p: float = 0.0) -> None:
    qkv = _zeros(dtype, batch, n_tokens, 3, HEADS, head_dim)
    _differentiate(F.attention_packed(qkv, dropout_p=dropout_p, backend="triton"))


def linear_alone(dtype: torch.dtype, batch: int) -> None:
    """The first linear layer of an MLP, as a separate call."""
    _linear(_zeros(dtype, batch, TOKENS, WIDTH), HIDDEN)


def scaled_linear(dtype: torch.dtype, batch: int) -> None:
    """The second linear layer of an MLP with LayerScale and residual, as a separate call."""
    x, residual = _zeros(dtype, batch, TOKENS, HIDDEN), _zeros(dtype, batch, TOKENS, WIDTH)
    weight, bias, scale = _zeros(dtype, WIDTH, HIDDEN), _zeros(dtype, WIDTH), _zeros(dtype, WIDTH)
    _differentiate(F.linear(x, weight, bias, residual=residual, layer_scale=scale, backend="triton"))


def block(dtype: torch.dtype, width: int, hidden: int, heads: int, batch: int, n_tokens: int, training: bool) -> None:
    """A pre-norm encoder block, in inference or forward and backward."""
    x = _zeros(dtype, batch, n_tokens, width)
    weights = (_zeros(dtype, *shape) for shape in ((3 * width, width), (3 * width,), (width, width), (width,)))
    mlp = (_zeros(dtype, *shape) for shape in ((hidden, width), (hidden,), (width, hidden), (width,)))
    tensors = Block(_norm(dtype, width), *weights, _norm(dtype, width), *mlp)
    with torch.set_grad_enabled(training):
        _differentiate(F.encoder(x, [tensors], heads=heads, backend="triton"))


def residual_mlp(dtype: torch.dtype, batch: int, training: bool = True, hidden: int = HIDDEN, **dropout: float) -> None:
    x = _zeros(dtype, batch, TOKENS, WIDTH)
    with torch.set_grad_enabled(training):
        _mlp(x, WIDTH, hidden, residual=x, **dropout)


def patches_of_images(dtype: torch.dtype, batch: int, from_bytes: bool) -> None:
    """Patch embedding with 16 x 16 patches of 224 x 224 images."""
    if from_bytes:
        image = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8)
        _patches(image, dtype, 16, WIDTH, mean=[0.5] * 3, std=[0.5] * 3)
    else:
        _patches(_zeros(dtype, batch, 3, 224, 224), dtype, 16, WIDTH)


def every_tile(dtype: torch.dtype) -> None:
    """Launch every tile that a ``pick_*`` function can return for ``dtype`` on the current architecture, and every
    kernel variant with a different register use. tests/test_codegen.py checks that none is missing."""
    vit_b_16(dtype)
    expanded_gradients(dtype)
    for power in range(1, 10):
        sum_parts(torch.zeros(2**power, WIDTH), torch.float32)
    q, k, v = (_zeros(dtype, 1, TOKENS, 2, HEAD_DIM) for _ in range(3))
    _differentiate(F.attention(q, k, v, return_lse=True, backend="triton"))
    for power, norm_type in itertools.product(range(9), ("layer_norm", "rms_norm")):
        head_dim, norm = 2**power, (_zeros(dtype, 2**power), None, 1e-5)
        qkv = _zeros(dtype, 1, ROWS, 3, 2, head_dim)
        _differentiate(F.attention_packed(qkv, q_norm=norm, k_norm=norm, norm_type=norm_type, backend="triton"))

    for power, layout in itertools.product(range(1, 9), ("half", "interleaved")):
        rotary_attention(dtype, 1, ROWS, layout, 2, 2**power)
    for window, head_dim in itertools.product(WINDOWS, (16, 32, 64)):
        for cosine, dropout_p in itertools.product((False, True), (0.0, 0.1)):
            swin_attention(dtype, 1, window, 2, window, cosine=cosine, head_dim=head_dim, dropout_p=dropout_p)

    for heads in HEAD_COUNTS:
        with tiles_of(heads):
            _attentions(dtype)
    for rows in ROW_COUNTS:
        with tiles_of(rows):
            _products(dtype)

    for power in range(17):
        x = _zeros(dtype, ROWS, 2**power)
        _differentiate(F.layer_norm(x, *_norm(dtype, 2**power)[:2], backend="triton"))
        _differentiate(F.layer_norm(x, None, None, residual=x, backend="triton"))
    for n_rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):  # the number of partial sums is the number of programs
        x = _zeros(dtype, n_rows, WIDTH)
        _differentiate(F.layer_norm(x, *_norm(dtype, WIDTH)[:2], backend="triton"))

    for patch, dim in itertools.product((2, 3, 4, 8, 14, 16, 32), (16, 32, 64, WIDTH)):
        _patches(_zeros(dtype, 1, 3, 4 * patch, 4 * patch), dtype, patch, dim)
    for patch, dim in ((4, WIDTH), (5, WIDTH), (8, WIDTH), (8, 16), (8, 32)):
        _patches(_zeros(dtype, 1, 1, 4 * patch, 4 * patch), dtype, patch, dim)
    image = _zeros(dtype, 1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    _patches(image, dtype, 16, WIDTH)


def _attentions(dtype: torch.dtype) -> None:
    for head_dim, dropout_p, n_q in itertools.product(HEAD_DIMS, (0.0, 0.1), (TOKENS, 1)):
        attention(dtype, head_dim, dropout_p, n_q)
    for n_tokens in LENGTHS:
        packed_attention(dtype, 1, n_tokens, HEAD_DIM)


def _products(dtype: torch.dtype) -> None:
    for width, hidden in WIDTHS:
        x = _zeros(dtype, ROWS, width)
        _mlp(x, width, hidden, norm=_norm(dtype, width), residual=x)
        _linear(x, 3 * width, norm=_norm(dtype, width))
        _linear(x, width)
    x = _zeros(dtype, ROWS, WIDTH)
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu"):
        for hidden_dropout_p, dropout_p in itertools.product((0.0, 0.1), repeat=2):
            dropout = dict(hidden_dropout_p=hidden_dropout_p, dropout_p=dropout_p)
            _mlp(x, WIDTH, HIDDEN, residual=x, activation=activation, **dropout)
    branch = dict(residual=x, layer_scale=_zeros(dtype, WIDTH), drop_path_p=0.1)
    _mlp(x, WIDTH, HIDDEN, **branch)
    for dropout_p in (0.0, 0.1):
        _linear(x, WIDTH, **branch, dropout_p=dropout_p)
        for power in range(12):
            _gated(x, 2**power, hidden_dropout_p=dropout_p)
    for power in range(11):
        narrow = dict(residual=_zeros(dtype, ROWS, 16), layer_scale=_zeros(dtype, 16))
        _linear(_zeros(dtype, ROWS, 2**power), 16, **narrow)
    _linear(x, WIDTH, residual=x, dropout_p=0.1)
    # tiles are clipped to small sizes; the split-K of a weight's gradient depends on the number of its tiles
    for width, hidden in itertools.product((16, 32, 64, 256), repeat=2):
        x = _zeros(dtype, ROWS, width)
        _mlp(x, width, hidden, residual=x)
        _mlp(x, width, hidden, residual=x, hidden_dropout_p=0.1, dropout_p=0.1)
        _linear(x, hidden, bias=False)
        _linear(x, hidden, bias=False, dropout_p=0.1)
        wide = _zeros(dtype, ROWS, hidden)
        _linear(x, hidden, residual=wide, layer_scale=_zeros(dtype, hidden), drop_path_p=0.1)

    for width in (16, 32, WIDTH):
        _mlp(_zeros(dtype, ROWS, width), width, 136)  # a hidden width that is no multiple of 16

    for width, hidden in itertools.product((16, 32), (192, 1152, 1536, 3072, 4096)):  # wide products of a small depth
        x = _zeros(dtype, ROWS, width)
        _linear(x, hidden)
        _linear(x, hidden, residual=_zeros(dtype, ROWS, hidden))
        _linear(_zeros(dtype, ROWS, hidden), width)

    for width, head_dim in itertools.product((16, 32, 64), (4, 8, 16, 32)):
        tables = (torch.zeros(ROWS, head_dim // 2),) * 2
        _linear(_zeros(dtype, 1, ROWS, width), 3 * head_dim, rope=tables, rope_heads=1)


@contextlib.contextmanager
def tiles_of(rows: int) -> Iterator[None]:
    """Products and attention have the tiles for ``rows`` rows, or heads of all samples."""

    def choose(picker: Picker, args: tuple[Any, ...]) -> Any:
        return picker.default(*((rows, *args[1:]) if picker.name in BY_ROWS else args))

    with override_choice(choose):
        yield


def _mlp(x: Tensor, width: int, hidden: int, *, expanded: bool = False, **options: Any) -> None:
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    weights = (_zeros(x.dtype, *shape) for shape in shapes)
    _differentiate(F.mlp(x, *weights, **options, backend="triton"), expanded)


def _gated(x: Tensor, hidden: int, **options: Any) -> None:
    weights = (_zeros(x.dtype, 2 * hidden, x.shape[-1]), None, _zeros(x.dtype, x.shape[-1], hidden), None)
    _differentiate(F.mlp(x, *weights, activation="swiglu", **options, backend="triton"))


def _linear(x: Tensor, features: int, *, bias: bool = True, expanded: bool = False, **options: Any) -> None:
    weight, b = _zeros(x.dtype, features, x.shape[-1]), _zeros(x.dtype, features) if bias else None
    _differentiate(F.linear(x, weight, b, **options, backend="triton"), expanded)


def _patches(image: Tensor, dtype: torch.dtype, patch: int, dim: int, **statistics: Any) -> None:
    pixels = image.shape[1] * patch**2
    n_patches = image.shape[2] // patch * (image.shape[3] // patch)
    tokens = F.patch_embed(
        image,
        _zeros(dtype, dim, pixels),
        _zeros(dtype, dim),
        patch_size=patch,
        pre_norm=_norm(dtype, pixels),
        post_norm=_norm(dtype, dim),
        pos=_zeros(dtype, n_patches, dim),
        prefix=_zeros(dtype, 1, dim),
        backend="triton",
        **statistics,
    )
    _differentiate(tokens)
