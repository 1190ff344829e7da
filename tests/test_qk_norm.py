"""attention with QK norm against float64: outputs, log-sum-exp and every gradient."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_model_as_precise, assert_same, double, run
from test_attention import absolute as absolute_attention
from test_attention import dropped, formula
from test_linear import EPS

from vit_triton import functional as F
from vit_triton import reference
from vit_triton.checks import NORM_TYPES

pytestmark = pytest.mark.compiled

NAMES = ("out", "lse", "q", "k", "v", "q weight", "q bias", "k weight", "k bias")


def rows_norm(x, weight, bias, rms):
    """The float64 norm as (y, size of y computed with absolute values, backward); backward maps the size of dy to the
    sizes of (dx, dweight, dbias)."""
    mean = 0 if rms else x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    xhat = (x - mean) * rstd
    spread = (x.abs() + (0 if rms else x.abs().mean(-1, keepdim=True))) * rstd
    one = torch.ones_like(x[0, 0, 0])
    y = xhat * (one if weight is None else weight) + (0 if bias is None else bias)
    size = spread * (one if weight is None else weight.abs()) + (0 if bias is None else bias.abs())

    def backward(dy):
        g = dy if weight is None else dy * weight.abs()
        dx = rstd * (
            g + (0 if rms else g.mean(-1, keepdim=True)) + xhat.abs() * (g * xhat.abs()).mean(-1, keepdim=True)
        )
        grads = [] if weight is None else [(dy * spread).sum((0, 1, 2))]
        return dx, grads + ([] if bias is None else [dy.sum((0, 1, 2))])

    return y, size, backward


def absolute(inputs, grads, scale, norm_type):
    q, k, v, q_weight, q_bias, k_weight, k_bias = double(inputs)
    q, size_q, q_backward = rows_norm(q, q_weight, q_bias, norm_type == "rms_norm")
    k, size_k, k_backward = rows_norm(k, k_weight, k_bias, norm_type == "rms_norm")
    out, lse, dq, dk, dv = absolute_attention(q, k, v, *double(grads), scale, sizes_of_qk=(size_q, size_k))
    (dq, q_norm), (dk, k_norm) = q_backward(dq), k_backward(dk)
    # The log-sum-exp is float32, but the operands of its scores are rounded to the dtype of q.
    lse = lse * (torch.finfo(inputs[0].dtype).eps / torch.finfo(torch.float32).eps)
    return [out, lse, dq, dk, dv, *q_norm, *k_norm]


def call(function, norm_type="layer_norm", **options):
    def inner(q, k, v, q_weight, q_bias, k_weight, k_bias):
        norms = dict(q_norm=(q_weight, q_bias, EPS), k_norm=(k_weight, k_bias, EPS), norm_type=norm_type)
        return function(q, k, v, **norms, return_lse=True, **options)

    return inner


def make(batch, n_q, n_k, heads, head_dim, dtype, *, affine=(True, True), layout="contiguous"):
    def one(n):
        if layout == "heads first":
            return torch.randn(batch, heads, n, head_dim).to(dtype).transpose(1, 2)
        if layout == "strided":
            return torch.randn(batch, n, heads, 2 * head_dim).to(dtype)[..., ::2]
        return (torch.randn(batch, n, heads, head_dim) + 0.5).to(dtype)

    tensors = [one(n_q), one(n_k), one(n_k)]
    if layout == "packed":
        tensors = list((torch.randn(batch, n_q, 3, heads, head_dim) + 0.5).to(dtype).unbind(2))
    return tensors + [torch.randn(head_dim).to(dtype) if wanted else None for wanted in affine * 2]


def check(inputs, grads, norm_type="layer_norm"):
    ours = run(call(F.attention, norm_type, backend="triton"), inputs, grads)
    peer = run(call(reference.attention, norm_type), inputs, grads)
    exact = run(call(reference.attention, norm_type), double(inputs), double(grads))
    names = ["out", "lse", *(name for name, x in zip(NAMES[2:], inputs, strict=True) if x is not None)]
    assert len(ours) == len(names)
    assert_as_precise(ours, [peer], exact, absolute(inputs, grads, inputs[0].shape[-1] ** -0.5, norm_type), names)


@given(
    batch=st.integers(1, 2),
    n=st.sampled_from([(1, 17), (33, 33)]),
    heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([16, 72]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["packed", "heads first", "strided"]),
    gradient=st.sampled_from(["dense", "expanded"]),
    affine=st.sampled_from([(True, True), (True, False), (False, False)]),
    norm_type=st.sampled_from(NORM_TYPES),
)
def test_outputs_and_gradients(batch, n, heads, head_dim, dtype, layout, gradient, affine, norm_type):
    n_q, n_k = (n[0], n[0]) if layout == "packed" else n
    inputs = make(batch, n_q, n_k, heads, head_dim, dtype, affine=affine, layout=layout)
    do = torch.randn(batch, n_q, heads, head_dim).to(dtype)
    if gradient == "expanded":
        do = torch.randn(()).to(dtype).expand_as(do)
    check(inputs, [do, torch.randn(batch, heads, n_q)], norm_type)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks(small_tiles, dtype, norm_type):
    inputs = make(2, 37, 50, 3, 72, dtype)
    check(inputs, [torch.randn_like(inputs[0]), torch.randn(2, 3, 37)], norm_type)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_packed_form_is_bitwise_equal(norm_type, dropout_p):
    qkv, *weights = torch.randn(2, 19, 3, 2, 40).bfloat16(), *(torch.randn(40) for _ in range(4))
    do = torch.randn(2, 19, 2, 40).bfloat16()

    def packed(qkv, **options):
        return F.attention_packed(qkv, **options)

    def apart(qkv, **options):
        return F.attention(*qkv.unbind(2), **options)

    results = []
    for function in (packed, apart):

        def inner(qkv, q_weight, q_bias, k_weight, k_bias, function=function):
            norms = dict(q_norm=(q_weight, q_bias, EPS), k_norm=(k_weight, k_bias, EPS), norm_type=norm_type)
            return function(qkv, **norms, dropout_p=dropout_p, backend="triton")

        torch.manual_seed(3)
        results.append(run(inner, [qkv, *weights], [do]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    plain = F.attention_packed(qkv, backend="triton")
    assert not torch.equal(results[0][0], plain)


@pytest.mark.parametrize("which", ["q_norm", "k_norm"])
def test_only_one_norm(which):
    q, k, v, weight, bias, *_ = make(2, 9, 11, 2, 40, torch.float32)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, weight, bias)]
        out = F.attention(*leaves[:3], **{which: (*leaves[3:], EPS)}, backend=backend)
        results.append(dict(enumerate([out, *torch.autograd.grad(out.square().sum(), leaves)])))
    assert_model_as_precise(*results, 40)


@pytest.mark.parametrize("norm_layer", [torch.nn.LayerNorm, timm.layers.RmsNorm])
def test_timms_attention_with_its_own_parameters(norm_layer):
    module = timm.layers.Attention(48, num_heads=3, qkv_bias=True, qk_norm=True, norm_layer=norm_layer)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 11, 48)
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias, backend="triton").view(2, 11, 3, 3, 16)
    norms = {
        f"{name}_norm": (norm.weight, getattr(norm, "bias", None), norm.eps)
        for name, norm in (("q", module.q_norm), ("k", module.k_norm))
    }
    norm_type = "layer_norm" if norm_layer is torch.nn.LayerNorm else "rms_norm"
    out = F.attention_packed(qkv, **norms, norm_type=norm_type, backend="triton").flatten(2)
    ours = F.linear(out, module.proj.weight, module.proj.bias, backend="triton")
    assert_same(ours, module(x), 48)


@pytest.mark.parametrize("wanted", range(7))
def test_one_input_requires_a_gradient(wanted):
    inputs = make(1, 5, 6, 2, 16, torch.float32)
    leaves, others = ([x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)] for _ in range(2))
    exact = [x.double().requires_grad_() for x in inputs]
    for tensors, backend in ((leaves, "triton"), (others, "torch"), (exact, "torch")):
        call(F.attention, backend=backend)(*tensors)[0].square().sum().backward()
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(7)]
    assert_model_as_precise(*({i: x.grad for i, x in enumerate(each)} for each in (leaves, others, exact)), 16)


def test_saved_operands_are_not_normalised():
    saved = []
    qkv, weight = torch.randn(2, 6, 3, 2, 16).requires_grad_(), torch.randn(16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                F.attention_packed(qkv, q_norm=(weight, None, EPS), k_norm=(weight, None, EPS), backend="triton")
    assert sorted(saved) == [(2, 2, 6), (2, 6, 2, 16), (2, 6, 3, 2, 16), (16,), (16,)]


def test_empty_batch():
    inputs = make(0, 5, 7, 2, 16, torch.float32)
    results = run(call(F.attention, backend="triton"), inputs, [torch.randn(0, 5, 2, 16), None])
    assert [x.shape for x in results[2:]] == [x.shape for x in inputs]
    assert not any(x.any() for x in results[2:])


def test_bitwise_reproducible():
    inputs = make(3, 70, 90, 2, 72, torch.bfloat16)
    do = torch.randn_like(inputs[0])
    copies = [[x.clone() for x in inputs] for _ in range(2)]
    first, second = (run(call(F.attention, backend="triton"), x, [do, None]) for x in copies)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2, 3, 6])
def test_nan_and_inf_propagate_as_in_pytorch(which, value, dropout_p, norm_type):
    inputs = make(1, 9, 9, 2, 16, torch.float32)
    inputs[which].view(-1)[35 % inputs[which].numel()] = value
    do = torch.randn(1, 9, 2, 16)
    keep = None if dropout_p == 0 else dropped(9, 9, 2, dropout_p, seed=5).round(decimals=5)

    def norm(x, weight, bias):
        if norm_type == "rms_norm":
            return torch.nn.functional.rms_norm(x, (16,), weight, EPS) + bias
        return torch.nn.functional.layer_norm(x, (16,), weight, bias, EPS)

    def theirs(q, k, v, q_weight, q_bias, k_weight, k_bias):
        return formula(norm(q, q_weight, q_bias), norm(k, k_weight, k_bias), v, 0.25, keep)

    torch.manual_seed(5)
    ours = run(call(F.attention, norm_type, dropout_p=dropout_p, backend="triton"), inputs, [do, None])
    for name, a, b in zip(NAMES, ours, run(theirs, inputs, [do, None]), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
        assert torch.equal(a.isnan(), b.isnan()) or name == "lse", name


def test_nan_stays_in_its_row():
    inputs = make(1, 9, 9, 2, 16, torch.float32)
    inputs[0][0, 4, 1, 3] = float("nan")
    ours, theirs = (
        call(f, **o)(*inputs)[0] for f, o in ((F.attention, {"backend": "triton"}), (reference.attention, {}))
    )
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().sum() == 16


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_past_32_bits(axis, virtual_memory):
    shape, strides = [2, 3, 2, 16], [96, 32, 16, 1]
    shape[axis], strides[axis] = 4, 2**30
    far = torch.empty_strided(shape, strides)
    far.copy_(torch.randn(shape))
    leaf, near = far.detach().requires_grad_(), far.contiguous().requires_grad_()
    weights = [torch.randn(16) for _ in range(4)]
    out = call(F.attention, backend="triton")(leaf, leaf, leaf, *weights)[0]
    expected = call(reference.attention)(near, near, near, *weights)[0]
    torch.testing.assert_close(out, expected)
    pairs = (torch.autograd.grad(y.sum(), x)[0] for y, x in ((out, leaf), (expected, near)))
    assert_same(*pairs, 48)
