"""linear (norm, GEMM, bias, dropout, residual) against the float64 reference: output and every gradient."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_same, double, run

from vit_triton import functional as F
from vit_triton import reference

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("own_gemm")]

EPS = 1e-5


def absolute_norm(x, weight, bias):
    """(normed, its size with absolute values in every sum, 1 / std, xhat, the size of xhat) of a float64 layer norm."""
    rstd = (x.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
    xhat = (x - x.mean(-1, keepdim=True)) * rstd
    spread = (x.abs() + x.abs().mean(-1, keepdim=True)) * rstd
    one = torch.ones_like(x[0])
    weight, bias = one if weight is None else weight, 0 * one if bias is None else bias
    return xhat * weight + bias, spread * weight.abs() + bias.abs(), rstd, xhat, spread


def absolute_norm_backward(dnormed, x, weight, bias):
    """Sizes of dx and [dweight, dbias], given the size of the gradient for the norm's output."""
    _, _, rstd, xhat, spread = absolute_norm(x, weight, bias)
    g = dnormed if weight is None else dnormed * weight.abs()
    dx = rstd * (g + g.mean(-1, keepdim=True) + xhat.abs() * (g * xhat.abs()).mean(-1, keepdim=True))
    grads = [] if weight is None else [(dnormed * spread).sum(0)]
    return dx, grads + ([] if bias is None else [dnormed.sum(0)])


def absolute(inputs, dy, *, norm, keep=1.0):
    """The results of ``run`` for (x, weight, bias, residual, norm weight, norm bias, LayerScale if given), with
    absolute values in every sum; ``keep`` is the factor of dropout and stochastic depth."""
    x, weight, bias, residual, norm_weight, norm_bias, *layer_scale = double(inputs)
    shape, x, dy = x.shape, x.flatten(0, -2), dy.double().abs().flatten(0, -2)
    size = absolute_norm(x, norm_weight, norm_bias)[1] if norm else x.abs()
    dz = dy * keep
    y = (size @ weight.abs().T + (0 if bias is None else bias.abs())) * keep
    dlayer_scale = [(dy * y).sum(0) for _ in layer_scale]
    for gamma in layer_scale:
        dz, y = dz * gamma.abs(), y * gamma.abs()
    y = y if residual is None else y + residual.abs().flatten(0, -2)
    dx, dnorm = dz @ weight.abs(), []
    if norm:
        dx, dnorm = absolute_norm_backward(dx, x, norm_weight, norm_bias)
    results = [y.unflatten(0, shape[:-1]), dx.view(shape), dz.T @ size]
    results += [] if bias is None else [dz.sum(0)]
    return results + ([] if residual is None else [dy.unflatten(0, shape[:-1])]) + dnorm + dlayer_scale


def call(function, norm, **options):
    def inner(x, weight, bias, residual, norm_weight, norm_bias, layer_scale=None):
        triple = (norm_weight, norm_bias, EPS) if norm else None
        scale = {} if layer_scale is None else {"layer_scale": layer_scale}
        return function(x, weight, bias, residual=residual, norm=triple, **scale, **options)

    return inner


NAMES = ("x", "weight", "bias", "residual", "norm weight", "norm bias", "layer scale")


def make(leading, k, n, dtype, *, bias=True, residual=True, affine=(True, True), layout="contiguous"):
    def rows(width):
        if layout == "transposed" and leading:
            return torch.randn(*leading[:-1], width, leading[-1]).to(dtype).transpose(-1, -2)
        if layout == "slice":
            return torch.randn(*leading, width + 5).to(dtype)[..., 2 : 2 + width]
        return torch.randn(*leading, width).to(dtype)

    weight = (torch.randn(n, k) * k**-0.5).to(dtype)
    if layout == "transposed":
        weight = weight.T.contiguous().T
    vectors = [torch.randn(k).to(dtype) if wanted else None for wanted in affine]
    return [rows(k), weight, torch.randn(n).to(dtype) if bias else None, rows(n) if residual else None, *vectors]


def check(inputs, dy, *, norm):
    ours = run(call(F.linear, norm, backend="triton"), inputs, [dy])
    peer = run(call(reference.linear, norm), inputs, [dy])
    exact = run(call(reference.linear, norm), double(inputs), double([dy]))
    names = ["y", *(name for name, x in zip(NAMES, inputs, strict=False) if x is not None)]
    assert len(ours) == len(names)
    assert_as_precise(ours, [peer], exact, absolute(inputs, dy, norm=norm), names)


@given(
    leading=st.sampled_from([(1,), (17,), (2, 13), (1, 65), (2, 2, 5), (130,)]),
    k=st.sampled_from([8, 33, 40, 72, 130]),
    n=st.sampled_from([1, 16, 50, 136]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "slice"]),
    gradient=st.sampled_from(["dense", "expanded", "transposed"]),
    bias=st.booleans(),
    residual=st.booleans(),
    norm=st.booleans(),
    affine=st.tuples(st.booleans(), st.booleans()),
)
def test_outputs_and_gradients(leading, k, n, dtype, layout, gradient, bias, residual, norm, affine):
    affine = affine if norm else (False, False)
    inputs = make(leading, k, n, dtype, bias=bias, residual=residual, affine=affine, layout=layout)
    dy = torch.randn(*leading, n).to(dtype)
    if gradient == "expanded":
        dy = torch.randn(()).to(dtype).expand(*leading, n)
    elif gradient == "transposed":
        dy = torch.randn(*leading[:-1], n, leading[-1]).to(dtype).transpose(-1, -2)
    check(inputs, dy, norm=norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles(small_tiles, dtype):
    check(make((3, 37), 50, 70, dtype), torch.randn(3, 37, 70).to(dtype), norm=True)


def test_a_vector():
    x, weight, bias, *_ = make((), 40, 24, torch.float32)
    torch.testing.assert_close(F.linear(x, weight, bias, backend="triton"), torch.nn.functional.linear(x, weight, bias))


def test_a_bias_may_be_a_view():
    x, weight, bias, *_ = make((5,), 40, 24, torch.float32)
    for strided in (torch.randn(24, 2)[:, 1], bias[:1].expand(24)):
        ours = F.linear(x, weight, strided, backend="triton")
        torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight, strided))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
def test_the_residual_may_be_x_itself(dtype, norm):
    inputs = make((2, 9), 40, 40, dtype, residual=False)
    dy = torch.randn(2, 9, 40).to(dtype)

    def function(implementation, **options):
        def inner(x, weight, bias, norm_weight, norm_bias):
            triple = (norm_weight, norm_bias, EPS) if norm else None
            return implementation(x, weight, bias, norm=triple, residual=x, **options)

        return inner

    inputs = [x for x in inputs if x is not None][: 5 if norm else 3] + [None] * (0 if norm else 2)
    ours = run(function(F.linear, backend="triton"), inputs, [dy])
    peer = run(function(reference.linear), inputs, [dy])
    exact = run(function(reference.linear), double(inputs), double([dy]))
    apart = [*inputs[:3], inputs[0], *inputs[3:]]
    y, dx, dweight, dbias, dresidual, *dnorm = absolute(apart, dy, norm=norm)
    names = ["y", "x", "weight", "bias", "norm weight", "norm bias"][: len(ours)]
    assert_as_precise(ours, [peer], exact, [y, dx + dresidual, dweight, dbias, *dnorm], names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_gradient_of_the_returned_input_is_added(dtype, norm, expanded):
    inputs = make((2, 9), 40, 24, dtype, residual=False)
    grads = [torch.randn(2, 9, 24).to(dtype), torch.randn(2, 9, 1 if expanded else 40).to(dtype).expand(2, 9, 40)]

    def function(implementation, **options):
        def inner(x, weight, bias, norm_weight, norm_bias):
            return implementation(x, weight, bias, norm=(norm_weight, norm_bias, EPS) if norm else None, **options)

        return inner

    def apart(*args, **options):
        return reference.linear(*args, **options), args[0]

    inputs = [x for x in inputs if x is not None][: 5 if norm else 3] + [None] * (0 if norm else 2)
    ours = run(function(F.linear_and_input, backend="triton"), inputs, grads)
    peer = run(function(apart), inputs, grads)
    exact = run(function(apart), double(inputs), double(grads))
    assert torch.equal(ours[1], inputs[0])
    y, dx, *others = absolute([*inputs[:3], None, *inputs[3:]], grads[0], norm=norm)
    sizes = [y, double(inputs)[0].abs(), dx + double(grads)[1].abs(), *others]
    names = ["y", "returned x", "x", "weight", "bias", "norm weight", "norm bias"][: len(ours)]
    assert_as_precise(ours, [peer], exact, sizes, names)


def test_input_without_a_gradient_is_returned_itself():
    x, weight, bias, *_ = make((5,), 40, 24, torch.float32)
    for backend in ("triton", "torch"):
        y, passed = F.linear_and_input(x, weight.requires_grad_(), bias, backend=backend)
        assert passed is x and y.requires_grad
    with torch.no_grad():
        assert F.linear_and_input(x.requires_grad_(), weight, backend="triton")[1] is x


def dropped(rows, cols, p, seed):
    """The dropout mask of a call, 0 or 1 / (1 - p): the output for x = 0 and a bias of ones."""
    torch.manual_seed(seed)
    x, weight = torch.zeros(rows, 16), torch.zeros(cols, 16)
    return F.linear(x, weight, torch.ones(cols), dropout_p=p, backend="triton")


def test_dropout_share_and_scale():
    keep = dropped(400, 300, 0.2, seed=0)
    kept = keep != 0
    torch.testing.assert_close(keep[kept], torch.full_like(keep[kept], 1.25))
    assert abs(int(kept.sum()) - 0.8 * kept.numel()) < 5 * (0.8 * 0.2 * kept.numel()) ** 0.5
    assert len(kept.unique(dim=0)) == 400 and len(kept.T.unique(dim=0)) == 300


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_mask_is_the_same_in_forward_and_backward(dtype):
    keep = dropped(70, 50, 0.2, seed=5).double()
    inputs = make((70,), 40, 50, dtype)
    dy = torch.randn(70, 50).to(dtype)
    torch.manual_seed(5)
    ours = run(call(F.linear, True, dropout_p=0.2, backend="triton"), inputs, [dy])

    def masked(mask):
        def inner(x, weight, bias, residual, norm_weight, norm_bias):
            return reference.linear(x, weight, bias, norm=(norm_weight, norm_bias, EPS)) * mask + residual

        return inner

    peer = run(masked(keep.to(dtype)), inputs, [dy])
    exact = run(masked(keep), double(inputs), double([dy]))
    assert_as_precise(ours, [peer], exact, absolute(inputs, dy, norm=True, keep=keep), ["y", *NAMES[:6]])


def test_dropout_follows_the_seed_of_torch():
    assert torch.equal(dropped(9, 20, 0.5, seed=1), dropped(9, 20, 0.5, seed=1))
    assert not torch.equal(dropped(9, 20, 0.5, seed=1), dropped(9, 20, 0.5, seed=2))
    assert not dropped(9, 20, 1.0, seed=1).any()
    x = torch.randn(3, 16)
    before = torch.get_rng_state()
    F.linear(x, x, backend="triton")
    assert torch.equal(before, torch.get_rng_state())


# --- LayerScale and stochastic depth -----------------------------------------------------------------------


def check_branch(inputs, dy, *, norm, drop_path_p):
    """One seed makes ours, PyTorch and the float64 reference draw the same samples."""
    options, kept = {"drop_path_p": drop_path_p}, 1.0
    if drop_path_p:
        torch.manual_seed(5)
        kept = reference.drop_path_factors(double(inputs)[0], drop_path_p)
        kept = kept.repeat_interleave(inputs[0][0, ..., 0].numel())[:, None]
    results = []
    for function, tensors, grad in (
        (call(F.linear, norm, backend="triton", **options), inputs, dy),
        (call(reference.linear, norm, **options), inputs, dy),
        (call(reference.linear, norm, **options), double(inputs), dy.double()),
    ):
        torch.manual_seed(5)
        results.append(run(function, tensors, [grad]))
    names = ["y", *(name for name, x in zip(NAMES, inputs, strict=False) if x is not None)]
    ours, peer, exact = results
    assert len(ours) == len(names)
    assert_as_precise(ours, [peer], exact, absolute(inputs, dy, norm=norm, keep=kept), names)


@given(
    leading=st.sampled_from([(1,), (17,), (2, 13), (5, 65), (3, 2, 5), (130, 1)]),
    k=st.sampled_from([33, 130]),
    n=st.sampled_from([1, 16, 50]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed"]),
    gradient=st.sampled_from(["dense", "expanded"]),
    bias=st.booleans(),
    norm=st.booleans(),
    scale=st.sampled_from([None, 1.0, 1e-4, 0.0]),
    drop_path_p=st.sampled_from([0.0, 0.4]),
)
def test_layer_scale_and_drop_path(leading, k, n, dtype, layout, gradient, bias, norm, scale, drop_path_p):
    inputs = make(leading, k, n, dtype, bias=bias, affine=(norm, norm), layout=layout)
    inputs += [] if scale is None else [(torch.randn(n) * scale).to(dtype)]
    dy = torch.randn(*leading, n).to(dtype)
    if gradient == "expanded":
        dy = torch.randn(()).to(dtype).expand(*leading, n)
    check_branch(inputs, dy, norm=norm, drop_path_p=drop_path_p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_scale_and_drop_path_of_several_tiles(small_tiles, dtype):
    inputs = [*make((3, 37), 50, 70, dtype), torch.randn(70).to(dtype)]
    check_branch(inputs, torch.randn(3, 37, 70).to(dtype), norm=True, drop_path_p=0.4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_and_drop_path_masks_are_the_same_in_forward_and_backward(dtype):
    options = dict(drop_path_p=0.4, dropout_p=0.2, backend="triton")
    torch.manual_seed(5)
    zeros, weight, residual = torch.zeros(7, 10, 40), torch.zeros(50, 40), torch.zeros(7, 10, 50)
    keep = F.linear(zeros, weight, torch.ones(50), residual=residual, **options).flatten(0, 1).double()
    assert set(keep.unique().tolist()) == {0.0, float(torch.tensor(1.25 / 0.6))}
    inputs = [*make((7, 10), 40, 50, dtype), torch.randn(50).to(dtype)]
    dy = torch.randn(7, 10, 50).to(dtype)
    torch.manual_seed(5)
    ours = run(call(F.linear, True, **options), inputs, [dy])

    def masked(mask):
        def inner(x, weight, bias, residual, norm_weight, norm_bias, gamma):
            y = reference.linear(x, weight, bias, norm=(norm_weight, norm_bias, EPS))
            return y * mask.view(7, 10, 50) * gamma + residual

        return inner

    peer = run(masked(keep.to(dtype)), inputs, [dy])
    exact = run(masked(keep), double(inputs), double([dy]))
    assert_as_precise(ours, [peer], exact, absolute(inputs, dy, norm=True, keep=keep), ["y", *NAMES])


@pytest.mark.parametrize("shape", [(6, 5, 8), (11, 8), (4, 3, 2, 8)])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_drop_path_draws_as_in_timm(shape, p):
    x, weight = torch.randn(shape), torch.randn(8, 8)
    torch.manual_seed(2)
    ours = F.linear(x, weight, residual=x, drop_path_p=p, backend="triton")
    torch.manual_seed(2)
    theirs = timm.layers.DropPath(p).train()(torch.nn.functional.linear(x, weight)) + x
    torch.testing.assert_close(ours, theirs)


def test_drop_path_with_empty_batch_and_with_probability_zero():
    x = torch.randn(0, 5, 16)
    assert F.linear(x, torch.randn(16, 16), residual=x, drop_path_p=0.5, backend="triton").shape == (0, 5, 16)
    before = torch.get_rng_state()
    F.linear(torch.randn(16), torch.randn(16, 16), residual=torch.randn(16), drop_path_p=0.0, backend="triton")
    assert not torch.equal(before, torch.get_rng_state())  # randn draws
    before = torch.get_rng_state()
    F.linear(x, torch.zeros(16, 16), residual=x, drop_path_p=0.0, backend="triton")
    assert torch.equal(before, torch.get_rng_state())


def test_only_layer_scale_requires_a_gradient():
    x, weight, bias, residual, *_ = make((3, 7), 40, 24, torch.float32)
    ours, theirs = (torch.zeros(48)[::2].requires_grad_() for _ in range(2))
    for function, gamma, options in ((F.linear, ours, {"backend": "triton"}), (reference.linear, theirs, {})):
        y = function(x, weight, bias, residual=residual, layer_scale=gamma, **options)
        y.square().sum().backward()
    assert_same(ours.grad, theirs.grad, 40)


def test_layer_scale_saves_only_parameters():
    inputs, saved = [x.requires_grad_() for x in [*make((7, 2), 40, 24, torch.float32), torch.randn(24)]], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        call(F.linear, False, drop_path_p=0.5, backend="triton")(*inputs)
    assert sorted(s for s in saved if s != (40,)) == [(7,), (7, 2, 40), (24,), (24,), (24, 40)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(value):
    x, weight, bias, *_ = make((5,), 40, 24, torch.float32)
    x[3, 7] = value
    ours, theirs = F.linear(x, weight, bias, backend="triton"), torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(ours.isfinite(), theirs.isfinite()) and torch.equal(ours.isnan(), theirs.isnan())


def test_bitwise_reproducible():
    inputs, dy = make((200,), 72, 50, torch.bfloat16), torch.randn(200, 50).bfloat16()
    copies = [[x.clone() for x in inputs] for _ in range(2)]
    first, second = (run(call(F.linear, True, backend="triton"), x, [dy]) for x in copies)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batch():
    y, *grads = run(
        call(F.linear, True, backend="triton"), make((0, 5), 40, 24, torch.float32), [torch.randn(0, 5, 24)]
    )
    assert y.shape == (0, 5, 24)
    assert [tuple(g.shape) for g in grads] == [(0, 5, 40), (24, 40), (24,), (0, 5, 24), (40,), (40,)]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("wanted", range(6))
def test_one_input_requires_a_gradient(wanted):
    inputs = make((7,), 40, 24, torch.float32)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    others = [x.clone().requires_grad_() for x in inputs]
    call(F.linear, True, backend="triton")(*leaves).square().sum().backward()
    call(reference.linear, True)(*others).square().sum().backward()
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(6)]
    assert_same(leaves[wanted].grad, others[wanted].grad, 40)


def test_saved_tensors_are_x_weights_and_statistics():
    inputs, saved = [x.requires_grad_() for x in make((7,), 40, 24, torch.float32)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        call(F.linear, True, backend="triton")(*inputs)
        with torch.no_grad():
            call(F.linear, True, backend="triton")(*inputs)
    assert sorted(s for s in saved if s != (40,)) == [(7,), (7,), (7, 40), (24, 40)]


def test_offsets_past_32_bits(virtual_memory):
    x, residual = (torch.empty_strided((4, 64), (2**30, 1)) for _ in range(2))
    x.copy_(torch.randn(4, 64))
    residual.copy_(torch.randn(4, 64))
    dy = torch.empty_strided((4, 64), (2**30, 1))
    dy.copy_(torch.randn(4, 64))
    weight = torch.empty_strided((64, 64), (2**25, 1))
    weight.copy_(torch.randn(64, 64))
    far = [x.requires_grad_(), weight.requires_grad_()]
    near = [x.detach().contiguous().requires_grad_() for x in far]
    ours = F.linear(*far, residual=residual, backend="triton")
    theirs = reference.linear(*near, residual=residual)
    assert_same(ours, theirs, 64)
    grads, their_grads = (torch.autograd.grad(y, x, dy) for y, x in ((ours, far), (theirs, near)))
    assert_same(grads, their_grads, 64)


def test_autocast():
    inputs = make((7,), 40, 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(call(F.linear, True, backend="triton"), inputs, [torch.ones(7, 24)])
        theirs = run(call(reference.linear, True), inputs, [torch.ones(7, 24)])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert_same(a, b, dtype=torch.bfloat16)
