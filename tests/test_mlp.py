"""mlp (norm, GEMM, activation, dropout, GEMM, dropout, residual) against float64: output, gradients, saved tensors."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_same, double, run
from test_linear import EPS, absolute_norm, absolute_norm_backward

from vit_triton import functional as F
from vit_triton import reference
from vit_triton.checks import ACTIVATIONS

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("own_gemm")]


def derivatives(z, activation):
    """Absolute values of an activation and its first two derivatives."""
    z = z.detach().requires_grad_()
    f = reference.activate(z, activation)
    (slope,) = torch.autograd.grad(f.sum(), z, create_graph=True)
    bend = torch.zeros_like(z) if activation == "relu" else torch.autograd.grad(slope.sum(), z)[0]
    return f.detach().abs(), slope.detach().abs(), bend.abs()


def absolute(inputs, dy, activation, *, norm, hidden_keep=1.0, keep=1.0):
    """The results of ``run`` for (x, w1, b1, w2, b2, residual, norm weight, norm bias, LayerScale if given), with
    absolute values in every sum.

    An error in the pre-activation z passes through the activation f as |f'(z)| dz, into f' itself as |f''(z)| dz.
    """
    x, w1, b1, w2, b2, residual, norm_weight, norm_bias, *layer_scale = double(inputs)
    shape, x, dy = x.shape, x.flatten(0, -2), dy.double().abs().flatten(0, -2)
    normed, size = absolute_norm(x, norm_weight, norm_bias)[:2] if norm else (x, x.abs())
    z = normed @ w1.T + (0 if b1 is None else b1)
    size_z = size @ w1.abs().T + (0 if b1 is None else b1.abs())
    if activation == "swiglu":
        (gate, value), (size_gate, size_value) = z.chunk(2, -1), size_z.chunk(2, -1)
        f, slope, bend = derivatives(gate, "silu")
        size_f = f * value.abs() + slope * size_gate * value.abs() + f * size_value
        size_slope = torch.cat(
            (slope * (value.abs() + size_value) + bend * size_gate * value.abs(), f + slope * size_gate), -1
        )
    else:
        f, slope, bend = derivatives(z, activation)
        size_f, size_slope = f + slope * size_z, slope + bend * size_z
    size_f = size_f * hidden_keep
    y = (size_f @ w2.abs().T + (0 if b2 is None else b2.abs())) * keep
    dout = dy * keep
    dlayer_scale = [(dy * y).sum(0) for _ in layer_scale]
    for gamma in layer_scale:
        dout, y = dout * gamma.abs(), y * gamma.abs()
    y = y if residual is None else y + residual.abs().flatten(0, -2)
    dhidden = (dout @ w2.abs()) * hidden_keep
    dz = (torch.cat((dhidden, dhidden), -1) if activation == "swiglu" else dhidden) * size_slope
    dx, dnorm = dz @ w1.abs(), []
    if norm:
        dx, dnorm = absolute_norm_backward(dx, x, norm_weight, norm_bias)
    results = [y.unflatten(0, shape[:-1]), dx.view(shape), dz.T @ size]
    results += [] if b1 is None else [dz.sum(0)]
    results += [dout.T @ size_f] + ([] if b2 is None else [dout.sum(0)])
    return results + ([] if residual is None else [dy.unflatten(0, shape[:-1])]) + dnorm + dlayer_scale


NAMES = ("x", "w1", "b1", "w2", "b2", "residual", "norm weight", "norm bias", "layer scale")


def call(function, norm=True, **options):
    def inner(x, w1, b1, w2, b2, residual, norm_weight, norm_bias, layer_scale=None):
        triple = (norm_weight, norm_bias, EPS) if norm else None
        scale = {} if layer_scale is None else {"layer_scale": layer_scale}
        return function(x, w1, b1, w2, b2, residual=residual, norm=triple, **scale, **options)

    return inner


def make(leading, k, n, out, dtype, *, bias=True, residual=True, norm=True, layout="contiguous", activation="gelu"):
    def rows(width):
        if layout == "transposed":
            return torch.randn(*leading[:-1], width, leading[-1]).to(dtype).transpose(-1, -2)
        return torch.randn(*leading, width).to(dtype)

    wide = 2 * n if activation == "swiglu" else n
    w1, w2 = (torch.randn(wide, k) * k**-0.5).to(dtype), (torch.randn(out, n) * n**-0.5).to(dtype)
    b1, b2 = (torch.randn(size).to(dtype) if bias else None for size in (wide, out))
    norms = [torch.randn(k).to(dtype) if norm else None for _ in range(2)]
    return [rows(k), w1, b1, w2, b2, rows(out) if residual else None, *norms]


def check(inputs, dy, activation, *, norm):
    ours = run(call(F.mlp, norm, activation=activation, backend="triton"), inputs, [dy])
    peer = run(call(reference.mlp, norm, activation=activation), inputs, [dy])
    exact = run(call(reference.mlp, norm, activation=activation), double(inputs), double([dy]))
    names = ["y", *(name for name, x in zip(NAMES, inputs, strict=False) if x is not None)]
    assert len(ours) == len(names)
    assert_as_precise(ours, [peer], exact, absolute(inputs, dy, activation, norm=norm), names)


@given(
    leading=st.sampled_from([(1,), (17,), (2, 13), (1, 65)]),
    k=st.sampled_from([8, 33, 72]),
    n=st.sampled_from([16, 50, 136]),
    out=st.sampled_from([1, 24, 72]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from(["contiguous", "transposed"]),
    gradient=st.sampled_from(["dense", "expanded", "transposed"]),
    bias=st.booleans(),
    residual=st.booleans(),
    norm=st.booleans(),
)
def test_outputs_and_gradients(leading, k, n, out, dtype, activation, layout, gradient, bias, residual, norm):
    options = dict(bias=bias, residual=residual, norm=norm, layout=layout, activation=activation)
    inputs = make(leading, k, n, out, dtype, **options)
    dy = torch.randn(*leading, out).to(dtype)
    if gradient == "expanded":
        dy = torch.randn(()).to(dtype).expand(*leading, out)
    elif gradient == "transposed":
        dy = torch.randn(*leading[:-1], out, leading[-1]).to(dtype).transpose(-1, -2)
    check(inputs, dy, activation, norm=norm)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles(small_tiles, dtype, activation):
    inputs = make((3, 29), 40, 70, 50, dtype, activation=activation)
    check(inputs, torch.randn(3, 29, 50).to(dtype), activation, norm=True)


@pytest.mark.parametrize("norm", [False, True])
def test_the_residual_may_be_x_itself(norm):
    x, w1, b1, w2, b2, _, *norms = make((2, 9), 40, 96, 40, torch.float32)
    dy = torch.randn(2, 9, 40)

    def function(implementation, **options):
        return lambda x, w1, b1, w2, b2, g, b: implementation(
            x, w1, b1, w2, b2, residual=x, norm=(g, b, EPS) if norm else None, **options
        )

    inputs = [x, w1, b1, w2, b2, *(norms if norm else (None, None))]
    ours = run(function(F.mlp, backend="triton"), inputs, [dy])
    exact = run(function(reference.mlp), double(inputs), double([dy]))
    for a, b in zip(ours, exact, strict=True):
        assert_same(a, b, 40)


def hidden_mask(rows, n, p, seed, activation="gelu"):
    """The hidden dropout mask of a call, 0 or 1 / (1 - p): constant hidden values, act(20) = 20, and w2 = I."""
    torch.manual_seed(seed)
    wide = 2 * n if activation == "swiglu" else n
    x, w1, b1 = torch.zeros(rows, 16), torch.zeros(wide, 16), torch.full((wide,), 20.0)
    size = 400 if activation == "swiglu" else 20
    return F.mlp(x, w1, b1, torch.eye(n), None, activation=activation, hidden_dropout_p=p, backend="triton") / size


def output_mask(rows, n, out, p, hidden_p, seed):
    """The output dropout mask of the same call: the output for w2 = 0 and a bias of ones."""
    torch.manual_seed(seed)
    x, w1, w2 = torch.zeros(rows, 16), torch.zeros(n, 16), torch.zeros(out, n)
    return F.mlp(x, w1, None, w2, torch.ones(out), hidden_dropout_p=hidden_p, dropout_p=p, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_masks_are_the_same_in_forward_and_backward(dtype, activation):
    hidden_keep, keep = (
        hidden_mask(70, 50, 0.3, seed=5, activation=activation),
        output_mask(70, 50, 24, 0.2, 0.3, seed=5),
    )
    for mask, p in ((hidden_keep, 0.3), (keep, 0.2)):
        kept = mask != 0
        assert abs(int(kept.sum()) - (1 - p) * kept.numel()) < 5 * (p * (1 - p) * kept.numel()) ** 0.5
        torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    assert not torch.equal(hidden_keep[:, :24] != 0, keep != 0)
    hidden_keep, keep = (torch.where(m != 0, 1 / (1 - p), 0.0).double() for m, p in ((hidden_keep, 0.3), (keep, 0.2)))
    inputs = make((70,), 40, 50, 24, dtype, activation=activation)
    dy = torch.randn(70, 24).to(dtype)
    torch.manual_seed(5)
    options = dict(activation=activation, hidden_dropout_p=0.3, dropout_p=0.2, backend="triton")
    ours = run(call(F.mlp, **options), inputs, [dy])

    def masked(dtype):
        def inner(x, w1, b1, w2, b2, residual, g, b):
            z = reference.linear(x, w1, b1, norm=(g, b, EPS))
            hidden = reference.activate(z, activation) * hidden_keep.to(dtype)
            return reference.linear(hidden, w2, b2) * keep.to(dtype) + residual

        return inner

    peer = run(masked(dtype), inputs, [dy])
    exact = run(masked(torch.float64), double(inputs), double([dy]))
    size = absolute(inputs, dy, activation, norm=True, hidden_keep=hidden_keep, keep=keep)
    assert_as_precise(ours, [peer], exact, size, ["y", *NAMES[:8]])


@given(
    leading=st.sampled_from([(1,), (17,), (5, 13), (3, 2, 5)]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    norm=st.booleans(),
    scale=st.sampled_from([None, 1.0, 0.0]),
    drop_path_p=st.sampled_from([0.0, 0.4]),
)
def test_layer_scale_and_drop_path(leading, dtype, bias, norm, scale, drop_path_p):
    inputs = make(leading, 33, 50, 24, dtype, bias=bias, norm=norm)
    inputs += [] if scale is None else [(torch.randn(24) * scale).to(dtype)]
    dy = torch.randn(*leading, 24).to(dtype)
    torch.manual_seed(5)
    keep = reference.drop_path_factors(inputs[0].double(), drop_path_p).repeat_interleave(inputs[0][0, ..., 0].numel())
    results, options = [], {"drop_path_p": drop_path_p}
    for function, tensors, grad in (
        (call(F.mlp, norm, backend="triton", **options), inputs, dy),
        (call(reference.mlp, norm, **options), inputs, dy),
        (call(reference.mlp, norm, **options), double(inputs), dy.double()),
    ):
        torch.manual_seed(5)
        results.append(run(function, tensors, [grad]))
    names = ["y", *(name for name, x in zip(NAMES, inputs, strict=False) if x is not None)]
    ours, peer, exact = results
    size = absolute(inputs, dy, "gelu", norm=norm, keep=keep[:, None] if drop_path_p else 1.0)
    assert_as_precise(ours, [peer], exact, size, names)


def test_only_layer_scale_requires_a_gradient():
    inputs = make((3, 7), 40, 24, 16, torch.float32)
    ours, theirs = (torch.randn(16).mul(0.0).requires_grad_() for _ in range(2))
    for function, gamma in ((call(F.mlp, backend="triton"), ours), (call(reference.mlp), theirs)):
        function(*inputs, gamma).square().sum().backward()
    assert_same(ours.grad, theirs.grad, 40)


def test_dropout_follows_the_seed_of_torch():
    assert torch.equal(hidden_mask(9, 20, 0.5, seed=1), hidden_mask(9, 20, 0.5, seed=1))
    assert not torch.equal(hidden_mask(9, 20, 0.5, seed=1), hidden_mask(9, 20, 0.5, seed=2))
    assert not hidden_mask(9, 20, 1.0, seed=1).any()
    x = torch.randn(16, 16)
    before = torch.get_rng_state()
    F.mlp(x, x, None, x, None, backend="triton")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_and_nan(activation, dtype):
    z = torch.tensor([1e4, -1e4, 90.0, -90.0, 0.0, -0.0, float("nan"), float("inf")]).to(dtype)[:, None]
    one = torch.ones(1, 1).to(dtype)
    if activation == "swiglu":  # the gates are z, the values 1
        w1, b1 = torch.tensor([[1.0], [0.0]]).to(dtype), torch.tensor([0.0, 1.0]).to(dtype)
        z = z[:-1]  # inf * 0 + 1 is NaN
        ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
        y = F.mlp(ours, w1, b1, one, None, activation=activation, backend="triton")
        expected = reference.mlp(exact, w1.double(), b1.double(), one.double(), None, activation=activation)
        torch.testing.assert_close(y, expected.to(dtype), equal_nan=True)
        for each in (y, expected):
            each.backward(torch.ones_like(each))
        torch.testing.assert_close(ours.grad, exact.grad.to(dtype), equal_nan=True)
        return
    # in float64: PyTorch's vectorised float32 GELU of inf is NaN
    ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    y = F.mlp(ours, one, None, one, None, activation=activation, backend="triton")
    expected = reference.activate(exact, activation)
    torch.testing.assert_close(y, expected.to(dtype), equal_nan=True)
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(expected))
    torch.testing.assert_close(ours.grad[:6], exact.grad[:6].to(dtype))
    assert torch.equal(ours.grad[6].isnan(), exact.grad[6].isnan())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputed_activation_is_bitwise_equal(activation):
    x, w1 = torch.randn(40, 24).bfloat16(), torch.randn(80 if activation == "swiglu" else 40, 24).bfloat16()
    one = torch.eye(40).bfloat16()  # with w2 = I the output is the activation; with dy = I so is dw2

    def mlp(x, w1, w2):
        return F.mlp(x, w1, None, w2, None, activation=activation, backend="triton")

    hidden, _, _, dw2 = run(mlp, [x, w1, one], [one])
    assert torch.equal(hidden, dw2)


def test_swiglu_accepts_parameters_of_timm_and_hugging_face():
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

    x = torch.randn(2, 9, 24)
    packed, apart = timm.layers.SwiGLUPacked(24, 64), timm.layers.SwiGLU(24, 40)
    theirs = Dinov2SwiGLUFFN(Dinov2Config(hidden_size=24, mlp_ratio=4))

    def cat(gate, value):
        return torch.cat((gate.weight, value.weight)), torch.cat((gate.bias, value.bias))

    for module, w1, b1, last in (
        (packed, packed.fc1.weight, packed.fc1.bias, packed.fc2),
        (apart, *cat(apart.fc1_g, apart.fc1_x), apart.fc2),
        (theirs, *cat(theirs.gate_proj, theirs.up_proj), theirs.down_proj),
    ):
        ours = F.mlp(x, w1, b1, last.weight, last.bias, activation="swiglu", backend="triton")
        assert_same(ours, module(x), w1.shape[0])


@pytest.mark.parametrize("wanted", range(5))
def test_swiglu_where_one_input_requires_a_gradient(wanted):
    inputs = make((7,), 40, 24, 16, torch.float32, activation="swiglu")
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    others = [x.clone().requires_grad_() for x in inputs]
    call(F.mlp, activation="swiglu", backend="triton")(*leaves).square().sum().backward()
    call(reference.mlp, activation="swiglu")(*others).square().sum().backward()
    assert_same(leaves[wanted].grad, others[wanted].grad, 40)


def test_bitwise_reproducible():
    inputs, dy = make((200,), 72, 50, 24, torch.bfloat16), torch.randn(200, 24).bfloat16()
    copies = [[x.clone() for x in inputs] for _ in range(2)]
    first, second = (run(call(F.mlp, backend="triton"), x, [dy]) for x in copies)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_empty_batch(activation):
    inputs = make((0, 5), 40, 24, 16, torch.float32, activation=activation)
    y, *grads = run(call(F.mlp, activation=activation, backend="triton"), inputs, [torch.randn(0, 5, 16)])
    assert y.shape == (0, 5, 16)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("wanted", range(8))
def test_one_input_requires_a_gradient(wanted):
    inputs = make((7,), 40, 24, 16, torch.float32)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    others = [x.clone().requires_grad_() for x in inputs]
    call(F.mlp, backend="triton")(*leaves).square().sum().backward()
    call(reference.mlp)(*others).square().sum().backward()
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(8)]
    assert_same(leaves[wanted].grad, others[wanted].grad, 40)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_the_pre_activation_is_saved(dropout, activation):
    n = 48 if activation == "swiglu" else 96
    inputs, saved = [x.requires_grad_() for x in make((7,), 40, n, 16, torch.float32, activation=activation)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        options = dict(activation=activation, hidden_dropout_p=dropout, dropout_p=dropout, backend="triton")
        call(F.mlp, **options)(*inputs)
        with torch.no_grad():
            call(F.mlp, **options)(*inputs)
    made = [tuple(x.shape) for x in saved if x.numel() > 1 and not any(x is y for y in inputs)]
    rows = [s for s in made if s[0] == 7]
    assert sorted(rows) == [(7,), (7,), (7, 96)]  # mean, 1 / std, pre-activation; x is an input


def test_offsets_past_32_bits(virtual_memory):
    x, dy = (torch.empty_strided((4, 64), (2**30, 1)) for _ in range(2))
    x.copy_(torch.randn(4, 64))
    dy.copy_(torch.randn(4, 64))
    w1, w2 = torch.randn(32, 64), torch.randn(64, 32)
    far, near = x.requires_grad_(), x.detach().contiguous().requires_grad_()
    ours = F.mlp(far, w1, None, w2, None, residual=far, backend="triton")
    theirs = reference.mlp(near, w1, None, w2, None, residual=near)
    assert_same(ours, theirs, 64)
    (grad,), (their_grad,) = (torch.autograd.grad(y, x, dy) for y, x in ((ours, far), (theirs, near)))
    assert_same(grad, their_grad, 64)


def test_autocast():
    inputs = make((7,), 40, 24, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(call(F.mlp, backend="triton"), inputs, [torch.ones(7, 16)])
        theirs = run(call(reference.mlp), inputs, [torch.ones(7, 16)])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert_same(a, b, dtype=torch.bfloat16)
