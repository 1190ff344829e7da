"""Rotary positions of q and k against float64: the rotation alone, and attention with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_same, double, run
from test_attention import absolute as absolute_attention
from test_attention import formula
from test_linear import EPS
from test_qk_norm import rows_norm
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed,
    apply_rot_embed_cat,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb
from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

from vit_triton import functional as F
from vit_triton import reference
from vit_triton.autograd import RotaryFunction

pytestmark = pytest.mark.compiled

LAYOUTS = ("half", "interleaved")
NO_NORMS = (None,) * 4


def tables(kind, batch, heads, n, columns, dtype=torch.float32):
    """Random cos and sin, with an angle of its own in every column."""
    shape = {
        "plain": (n,),
        "shared": (1, 1, n),
        "sample": (batch, 1, n),
        "head": (1, heads, n),
        "both": (batch, heads, n),
    }
    angles = 3 * torch.randn(*shape[kind], columns)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def pairs(columns, head_dim, layout):
    """Channels of the first and of the second element of each pair, and the columns of their angles."""
    width = columns if 2 * columns > head_dim else 2 * columns
    channels = torch.arange(width)
    first, second = (channels[::2], channels[1::2]) if layout == "interleaved" else channels.chunk(2)
    return first, second, *((first, second) if width == columns else (torch.arange(columns),) * 2)


def rotated(x, cos, sin, prefix, layout, absolute=False, transposed=False):
    """The rotation element by element, in the dtype of x; with ``absolute``, its size with absolute values."""
    cos, sin = (t[None, None] if t.ndim == 2 else t for t in (cos.to(x.dtype), sin.to(x.dtype)))
    cos, sin = (t.transpose(1, 2) for t in (cos, sin))
    first, second, of_first, of_second = pairs(cos.shape[-1], x.shape[-1], layout)
    tokens = x[:, prefix:]
    a, b = tokens[..., first], tokens[..., second]
    c, d, s, t = cos[..., of_first], cos[..., of_second], sin[..., of_first], sin[..., of_second]
    s, t = (t, s) if transposed else (s, t)
    u, w = (c.abs() * a + s.abs() * b, d.abs() * b + t.abs() * a) if absolute else (c * a - s * b, d * b + t * a)
    rest = tokens[..., 2 * len(first) :]
    order = torch.cat((first, second)).argsort()
    return torch.cat((x[:, :prefix], torch.cat((torch.cat((u, w), -1)[..., order], rest), -1)), 1)


def rotate(q, k, rope, prefix, layout):
    """q and k, or a packed projection, rotated by the kernel."""
    out = RotaryFunction.apply(q, k, *NO_NORMS, *rope, None, None, False, prefix, layout == "interleaved")
    return out.unbind(2) if k is None else out


def make(batch, n, heads, head_dim, dtype, form="apart"):
    if form == "packed":
        return [torch.randn(batch, n, 3, heads, head_dim).to(dtype)]
    if form == "heads first":
        return [torch.randn(batch, heads, n, head_dim).to(dtype).transpose(1, 2) for _ in range(3)]
    if form == "strided":
        return [torch.randn(batch, n, heads, 2 * head_dim).to(dtype)[..., ::2] for _ in range(3)]
    return [torch.randn(batch, n, heads, head_dim).to(dtype) for _ in range(3)]


def some_columns(head_dim):
    """Tables for all channels, for all pairs, and both for a part of the head."""
    return head_dim, head_dim // 2, head_dim - 4, head_dim // 2 - 2


@given(
    shape=st.sampled_from([(1, 6, 1), (2, 9, 3)]),
    head_dim=st.sampled_from([64, 72, 80]),
    columns=st.integers(0, 3),
    layout=st.sampled_from(LAYOUTS),
    prefix=st.sampled_from([0, 1, 5]),
    kind=st.sampled_from(["plain", "shared", "sample", "head", "both"]),
    form=st.sampled_from(["apart", "packed", "heads first", "strided"]),
    gradient=st.sampled_from(["dense", "expanded", "transposed"]),
    table_form=st.sampled_from(["float32", "own", "view", "strided"]),
    dtype=st.sampled_from(DTYPES),
)
def test_rotation(shape, head_dim, columns, layout, prefix, kind, form, gradient, table_form, dtype):
    batch, n, heads = shape
    columns = some_columns(head_dim)[columns]
    rope = tables(kind, batch, heads, n - prefix, columns, dtype if table_form == "own" else torch.float32)
    if table_form == "view":  # as timm's sin and cos
        rope = torch.cat(rope, -1).chunk(2, -1)
    if table_form == "strided":
        rope = torch.stack((rope[0], rope[0]), -1)[..., 0], rope[1]
    inputs = make(batch, n, heads, head_dim, dtype, form)[: 1 if form == "packed" else 2]
    grads = make(batch, n, heads, head_dim, dtype, "heads first" if gradient == "transposed" else "apart")
    if gradient == "expanded":
        grads = [torch.randn(()).to(dtype).expand(batch, n, heads, head_dim) for _ in range(3)]
    grads = grads[: 3 if form == "packed" else 2]

    def theirs(*inputs, rotate=lambda x: reference.rotate(x, rope, prefix, layout)):
        q, k, *v = inputs[0].unbind(2) if form == "packed" else inputs
        return rotate(q), rotate(k), *v

    ours = run(lambda q, k=None: tuple(rotate(q, k, rope, prefix, layout)), inputs, grads)
    peer = run(theirs, inputs, grads)
    exact = run(
        lambda *x: theirs(*x, rotate=lambda x: rotated(x, *rope, prefix, layout)), double(inputs), double(grads)
    )
    sizes = list(theirs(*(x.abs() for x in double(inputs)), rotate=lambda x: rotated(x, *rope, prefix, layout, True)))
    back = [rotated(g.abs(), *rope, prefix, layout, True, True) for g in double(grads[:2])]
    sizes += [torch.stack((*back, grads[2].double().abs()), 2)] if form == "packed" else back
    assert_as_precise(ours, [peer], exact, sizes, ["out"] * len(grads) + ["gradient"] * len(inputs))


# --- attention ---------------------------------------------------------------------------------------------


def attention(function, inputs, rope, prefix, layout, norm_type, **options):
    """out and lse of attention or attention_packed; ``inputs``: q, k and v or a projection, and parameters of norms."""
    packed = inputs[0].ndim == 5
    heads, norms = (inputs[:1], inputs[1:]) if packed else (inputs[:3], inputs[3:])
    if norms:
        options |= dict(q_norm=(*norms[:2], EPS), k_norm=(*norms[2:], EPS), norm_type=norm_type)
    positions = dict(rope=rope, rope_prefix=prefix, rope_layout=layout)
    return getattr(function, "attention_packed" if packed else "attention")(*heads, **positions, **options)


@pytest.mark.parametrize("norm_type", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("form", ["packed", "apart"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype, layout, form, norm_type):
    batch, n, heads, head_dim, prefix = 2, 33, 3, 72, 5
    if dtype == torch.float16 and (form == "packed") != (layout == "half"):
        pytest.skip("fewer combinations")
    rope = tables("sample", batch, heads, n - prefix, head_dim)
    inputs = make(batch, n, heads, head_dim, dtype, form)
    inputs += [torch.randn(head_dim).to(dtype) for _ in range(4)] if norm_type else []
    do, dlse = torch.randn(batch, n, heads, head_dim).to(dtype), torch.randn(batch, heads, n)
    options = rope, prefix, layout, norm_type
    ours = run(lambda *x: attention(F, x, *options, return_lse=True, backend="triton"), inputs, [do, dlse])
    peer = run(lambda *x: attention(reference, x, *options, return_lse=True), inputs, [do, dlse])

    def by_formula(*x):
        (q, k, v), norms = (x[0].unbind(2), x[1:]) if form == "packed" else (x[:3], x[3:])
        if norm_type:
            q, k = (rows_norm(t, *p, norm_type == "rms_norm")[0] for t, p in ((q, norms[:2]), (k, norms[2:])))
        q, k = (rotated(t, *rope, prefix, layout) for t in (q, k))
        return formula(q, k, v, head_dim**-0.5)

    exact = run(by_formula, double(inputs), double([do, dlse]))

    # sizes, computed with absolute values
    (q, k, v), norms = (inputs[0].unbind(2), inputs[1:]) if form == "packed" else (inputs[:3], inputs[3:])
    q, k, v, *norms = double([q, k, v, *norms])
    sizes, backward = [q.abs(), k.abs()], [lambda dy: (dy, [])] * 2
    if norm_type:
        parts = [rows_norm(t, *p, norm_type == "rms_norm") for t, p in ((q, norms[:2]), (k, norms[2:]))]
        (q, size_q, back_q), (k, size_k, back_k) = parts
        sizes, backward = [size_q, size_k], [back_q, back_k]
    sizes = [rotated(x, *rope, prefix, layout, True) for x in sizes]
    q, k = (rotated(x, *rope, prefix, layout) for x in (q, k))
    out, lse, dq, dk, dv = absolute_attention(q, k, v, *double([do, dlse]), head_dim**-0.5, sizes_of_qk=sizes)
    lse = lse * (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)  # the rotated q and k are rounded
    turned = [rotated(g, *rope, prefix, layout, True, True) for g in (dq, dk)]
    (dq, q_norm), (dk, k_norm) = (back(g) for back, g in zip(backward, turned, strict=True))
    heads_size = [torch.stack((dq, dk, dv), 2)] if form == "packed" else [dq, dk, dv]
    names = ["out", "lse", *(["dqkv"] if form == "packed" else ["dq", "dk", "dv"]), *["norm"] * len(norms)]
    assert_as_precise(ours, [peer], exact, [out, lse, *heads_size, *q_norm, *k_norm], names)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("form", ["packed", "apart"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_of_rotated_tensors_is_bitwise_equal(layout, form, dropout_p):
    """With dropout too, and with and without gradients."""
    inputs = make(2, 19, 2, 16, torch.bfloat16, form)
    rope = tables("head", 2, 2, 18, 8)
    do = torch.randn(2, 19, 2, 16).bfloat16()
    options = dict(dropout_p=dropout_p, backend="triton")

    def composed(q, k=None, v=None):
        return F.attention(*rotate(q, k, rope, 1, layout), *(() if k is None else (v,)), **options)

    results = []
    for function in (lambda *x: attention(F, x, rope, 1, layout, None, **options), composed):
        torch.manual_seed(3)
        results.append(run(function, inputs, [do]))
        with torch.no_grad():
            torch.manual_seed(3)
            assert torch.equal(function(*inputs), results[-1][0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.manual_seed(3)
    plain = run(lambda *x: attention(F, x, None, 0, layout, None, **options), inputs, [do])
    assert not any(torch.equal(a, b) for a, b in zip(results[0][:2], plain[:2], strict=True))


@pytest.mark.parametrize("n", [5, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_tokens_after_the_prefix(layout, n):
    (qkv,) = make(2, n, 2, 16, torch.float32, "packed")
    rope = tables("shared", 2, 2, n - 5, 16)
    ours = run(lambda x: F.attention_packed(x, rope=rope, rope_prefix=5, rope_layout=layout, backend="triton"), [qkv],
               [torch.ones(2, n, 2, 16)])  # fmt: skip
    plain = run(lambda x: F.attention_packed(x, backend="triton"), [qkv], [torch.ones(2, n, 2, 16)])
    assert all(torch.equal(a, b) == (n == 5) for a, b in zip(ours, plain, strict=True))


def test_empty_batch():
    inputs = make(0, 7, 2, 16, torch.float32)
    rope = tables("sample", 0, 2, 6, 16)
    results = run(lambda *x: attention(F, x, rope, 1, "half", None, backend="triton"), inputs, [inputs[0]])
    assert [x.shape for x in results] == [inputs[0].shape] * 4


def test_bitwise_reproducible():
    inputs = make(2, 19, 2, 16, torch.bfloat16)
    rope = tables("sample", 2, 2, 18, 8)
    results = []
    for _ in range(2):
        copies = [x.clone() for x in inputs]
        results.append(run(lambda *x: attention(F, x, rope, 1, "half", None, backend="triton"), copies, [inputs[0]]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_are_not_finite_stay_in_their_pair(layout, value):
    (x,) = make(1, 4, 3, 16, torch.float32, "packed")
    x[0, :, :, 1, 2] = value  # one channel of the second head
    rope = tables("shared", 1, 3, 3, 16)
    ours = torch.stack(rotate(x.requires_grad_(), None, rope, 1, layout), 2).isfinite()
    first, second, *_ = pairs(16, 16, layout)
    partner = int(second[first == 2] if 2 in first else first[second == 2])
    finite = torch.ones_like(x, dtype=torch.bool)
    finite[0, :, :, 1, 2] = False
    finite[0, 1:, :2, 1, partner] = False  # not in prefix tokens, and not in v
    assert torch.equal(ours, finite)


def test_saved_tensors():
    """Without norms, the rotated tensors are saved in place of the original ones."""
    qkv, weight = torch.randn(2, 6, 3, 2, 16).requires_grad_(), torch.randn(16)
    rope, norm = tables("shared", 2, 2, 5, 8), (weight, None, EPS)
    saved = {}
    for norms in ({}, dict(q_norm=norm, k_norm=norm)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    F.attention_packed(qkv, rope=rope, rope_prefix=1, **norms, backend="triton")
        shapes = sorted(tuple(x.shape) for x in saved.values())
        projections = [(2, 6, 3, 2, 16)] * (2 if norms else 1)
        vectors = [(16,)] * (1 if norms else 0)
        assert shapes == sorted([(2, 2, 6), (2, 6, 2, 16), (1, 1, 5, 8), (1, 1, 5, 8), *projections, *vectors])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_past_32_bits(axis, virtual_memory):
    shape, strides = [2, 3, 2, 16], [96, 32, 16, 1]
    shape[axis], strides[axis] = 4, 2**30
    far = torch.empty_strided(shape, strides)
    far.copy_(torch.randn(shape))
    rope = tables("shared", 1, 1, shape[1], 16)
    ours = rotate(far.requires_grad_(), far, rope, 0, "half")
    assert_same(ours, [rotated(far.contiguous(), *rope, 0, "half")] * 2, 2)


# --- tables that require a gradient ------------------------------------------------------------------------


def test_gradients_of_tables_require_torch():
    inputs, rope = make(1, 4, 2, 16, torch.float32), tables("shared", 1, 2, 4, 16)
    rope[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=r'rope.*backend="torch"'):
        F.attention(*inputs, rope=rope, backend="triton")
    with torch.no_grad():
        F.attention(*inputs, rope=rope, backend="triton")
    for backend in ("torch", "auto"):
        F.attention(*inputs, rope=rope, backend=backend).sum().backward()
        assert rope[0].grad.any()
        rope[0].grad = None


# --- the libraries -----------------------------------------------------------------------------------------


def our_rotation(q, k, *arguments):
    return [x.transpose(1, 2) for x in rotate(*(x.transpose(1, 2).requires_grad_() for x in (q, k)), *arguments)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["DINOv3", "EVA-02", "mixed"])
def test_timm(name, dtype):
    heads, head_dim = 6, 64
    grid = dict(feat_shape=[6, 7])
    if name == "DINOv3":
        emb, prefix, half = RotaryEmbeddingDinoV3(head_dim, rotate_half=True, **grid).get_embed(), 5, True
    elif name == "EVA-02":
        emb = RotaryEmbeddingCat(head_dim, in_pixels=False, ref_feat_shape=[16, 16], **grid).get_embed()
        prefix, half = 1, False
    else:
        mixed = RotaryEmbeddingMixed(heads * head_dim, depth=2, num_heads=heads, temperature=10.0, **grid)
        emb, prefix, half = mixed.get_embed()[1].detach(), 1, False
    q, k = (torch.randn(2, heads, prefix + 42, head_dim).to(dtype) for _ in range(2))
    theirs = [torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], emb, half=half)), 2) for x in (q, k)]
    sin, cos = (t[None] if t.ndim == 3 else t for t in emb.chunk(2, -1))
    assert torch.equal(apply_rot_embed(q[:, :, prefix:], sin, cos, half=half), theirs[0][:, :, prefix:])
    ours = our_rotation(q, k, (cos, sin), prefix, "half" if half else "interleaved")
    assert_same(ours, theirs, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dinov3_of_transformers(dtype):
    q, k = (torch.randn(2, 6, 5 + 42, 64) for _ in range(2))
    angles = (6 * torch.rand(42, 32)).tile(2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    theirs = apply_rotary_pos_emb(q, k, cos.float(), sin.float())
    ours = our_rotation(q.to(dtype), k.to(dtype), (cos, sin), 5, "half")
    assert_same(ours, theirs, 2, dtype)


def test_vjepa2():
    """Three axes of 20 channels whose pairs have two angles, and 4 channels that are not rotated."""
    x = torch.randn(2, 3, 30, 64)
    positions = [torch.randint(0, 9, (30,)).float() for _ in range(3)]
    parts = [rotate_queries_or_keys(x[..., 20 * i : 20 * i + 20], pos[None, None]) for i, pos in enumerate(positions)]
    frequencies = 1 / 10000 ** (torch.arange(10) / 10)
    angles = torch.cat([(pos[:, None] * frequencies).tile(2) for pos in positions], -1)
    ours = our_rotation(x, x, (angles.cos(), angles.sin()), 0, "interleaved")
    assert_same(ours[0], torch.cat((*parts, x[..., 60:]), -1), 2)
