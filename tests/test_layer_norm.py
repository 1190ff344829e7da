"""layer_norm, with and without a residual, against the float64 reference: outputs and every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_same, double, run

from vit_triton import functional as F
from vit_triton import reference

pytestmark = pytest.mark.compiled


def absolute(inputs, grads, eps, *, residual):
    """The results of ``run``, with absolute values in every sum."""
    x, *rest = double(inputs)
    other = rest.pop(0) if residual else None
    weight, bias = rest
    total = x if other is None else x + other
    size = x.abs() if other is None else x.abs() + other.abs()
    dy = grads[0].double().abs()
    mean = total.mean(-1, keepdim=True)
    rstd = (total.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
    xhat = (total - mean).abs() * rstd
    spread = (size + size.mean(-1, keepdim=True)) * rstd
    g = dy if weight is None else dy * weight.abs()
    dx = rstd * (g + g.mean(-1, keepdim=True) + xhat * (g * xhat).mean(-1, keepdim=True))
    y = spread if weight is None else spread * weight.abs()
    y = y if bias is None else y + bias.abs()
    results = [y]
    if residual:
        dx = dx + grads[1].double().abs()
        results += [size, dx, dx]
    else:
        results += [dx]
    rows = tuple(range(x.ndim - 1))
    results += [] if weight is None else [(dy * spread).sum(rows)]
    return results + ([] if bias is None else [dy.sum(rows)])


def check(inputs, grads, eps=1e-5, *, residual):
    def function(implementation, **options):
        def call(x, *rest):
            other, weight, bias = rest if residual else (None, *rest)
            return implementation(x, weight, bias, eps=eps, residual=other, **options)

        return call

    ours = run(function(F.layer_norm, backend="triton"), inputs, grads)
    peer = run(function(reference.layer_norm), inputs, grads)
    exact = run(function(reference.layer_norm), double(inputs), double(grads))
    names = (["y", "sum", "dx", "dresidual"] if residual else ["y", "dx"]) + [
        name for name, x in zip(("dweight", "dbias"), inputs[-2:], strict=True) if x is not None
    ]
    assert len(ours) == len(names)
    assert_as_precise(ours, [peer], exact, absolute(inputs, grads, eps, residual=residual), names)


def make(shape, dtype, *, residual, affine=(True, True), layout="contiguous", offset=0.0):
    def rows():
        if layout == "transposed" and len(shape) > 1:
            return (torch.randn(*shape[:-2], shape[-1], shape[-2]) + offset).to(dtype).transpose(-1, -2)
        if layout == "slice":
            return (torch.randn(*shape[:-1], 2 * shape[-1] + 3) + offset).to(dtype)[..., 1 : 1 + shape[-1]]
        return (torch.randn(shape) + offset).to(dtype)

    affine = [torch.randn(shape[-1]).to(dtype) if wanted else None for wanted in affine]
    return [rows(), *([rows()] if residual else []), *affine]


@given(
    shape=st.sampled_from([(1, 1), (1, 7), (17, 33), (3, 5, 72), (2, 197, 40), (9, 768), (3, 1000), (2, 2049), (64,)]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "slice"]),
    gradient=st.sampled_from(["dense", "expanded", "transposed"]),
    residual=st.booleans(),
    affine=st.tuples(st.booleans(), st.booleans()),
    eps=st.sampled_from([1e-5, 1e-12, 1e-2]),
)
def test_outputs_and_gradients(shape, dtype, layout, gradient, residual, affine, eps):
    inputs = make(shape, dtype, residual=residual, affine=affine, layout=layout)

    def grad():
        if gradient == "expanded":
            return torch.randn(()).to(dtype).expand(shape)
        if gradient == "transposed" and len(shape) > 1:
            return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
        return torch.randn(shape).to(dtype)

    check(inputs, [grad() for _ in range(1 + residual)], eps, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_of_rows(small_tiles, dtype):
    check(make((25, 72), dtype, residual=True), [torch.randn(25, 72).to(dtype) for _ in range(2)], residual=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean_causes_no_cancellation(dtype):
    check(make((5, 200), dtype, residual=False, offset=1000.0), [torch.randn(5, 200).to(dtype)], residual=False)


def test_a_constant_row():
    x, weight, bias = make((3, 40), torch.float32, residual=False)
    x[1] = 3.0
    y = F.layer_norm(x, weight, bias, backend="triton")
    assert torch.equal(y[1], bias)


@pytest.mark.parametrize("only", [0, 1])
def test_gradient_of_one_of_two_outputs(only):
    inputs = make((4, 5, 40), torch.float32, residual=True)
    grads = [torch.randn(4, 5, 40) if i == only else None for i in range(2)]

    def ours(x, residual, weight, bias):
        return F.layer_norm(x, weight, bias, residual=residual, backend="triton")

    def theirs(x, residual, weight, bias):
        return reference.layer_norm(x, weight, bias, residual=residual)

    zeros = [g if g is not None else torch.zeros(4, 5, 40) for g in grads]
    results = run(ours, inputs, grads)
    exact = run(theirs, double(inputs), double(zeros))
    for a, b in zip(results, exact, strict=False):
        a = torch.zeros_like(b) if a is None else a  # the sum gives weight and bias no gradient
        assert_same(a, b, 40)


def test_the_residual_may_be_x_itself():
    x, weight, bias = make((4, 40), torch.float32, residual=False)
    dy, dsum = torch.randn(4, 40), torch.randn(4, 40)
    results = run(lambda *a: F.layer_norm(*a, residual=a[0], backend="triton"), [x, weight, bias], [dy, dsum])
    exact = run(lambda *a: reference.layer_norm(*a, residual=a[0]), double([x, weight, bias]), double([dy, dsum]))
    for a, b in zip(results, exact, strict=True):
        assert_same(a, b, 40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_row(value):
    x, weight, bias = make((5, 40), torch.float32, residual=False)
    x[2, 3] = value
    dy = torch.randn(5, 40)
    y, dx, *_ = run(lambda *a: F.layer_norm(*a, backend="triton"), [x, weight, bias], [dy])
    theirs, their_dx, *_ = run(reference.layer_norm, [x, weight, bias], [dy])
    for a, b in ((y, theirs), (dx, their_dx)):
        assert torch.equal(a.isfinite().all(1), b.isfinite().all(1))
        assert a[[0, 1, 3, 4]].isfinite().all() and a[2].isnan().any()


def test_returned_sum_is_normalised():
    x, residual, weight, bias = make((5, 72), torch.bfloat16, residual=True)
    y, total = F.layer_norm(x, weight, bias, residual=residual, backend="triton")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, F.layer_norm(total, weight, bias, backend="triton"))


def test_bitwise_reproducible():
    inputs = make((700, 40), torch.float32, residual=True)
    grads = [torch.randn(700, 40), torch.randn(700, 40)]

    def call(x, residual, weight, bias):
        return F.layer_norm(x, weight, bias, residual=residual, backend="triton")

    first, second = run(call, inputs, grads), run(call, [x.clone() for x in inputs], grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("residual", [False, True])
def test_empty_batch(residual):
    inputs = make((0, 3, 40), torch.float32, residual=residual)

    def call(x, *rest):
        other, weight, bias = rest if residual else (None, *rest)
        return F.layer_norm(x, weight, bias, residual=other, backend="triton")

    results = run(call, inputs, [torch.randn(0, 3, 40)] * (1 + residual))
    assert results[0].shape == (0, 3, 40)
    assert all(x.shape == (40,) and not x.any() for x in results[-2:])


@pytest.mark.parametrize("wanted", range(3))
def test_one_input_requires_a_gradient(wanted):
    inputs = make((3, 40), torch.float32, residual=False)
    inputs[wanted].requires_grad_()
    F.layer_norm(*inputs, backend="triton").square().sum().backward()
    grads = [x.grad for x in inputs]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    reference.layer_norm(*leaves).square().sum().backward()
    assert [g is not None for g in grads] == [i == wanted for i in range(3)]
    assert_same(grads[wanted], leaves[wanted].grad, 40)


def test_offsets_past_32_bits(virtual_memory):
    x = torch.empty_strided((4, 64), (2**30, 1))
    x.copy_(torch.randn(4, 64))
    weight, bias = torch.randn(64), torch.randn(64)
    y, total = F.layer_norm(x, weight, bias, residual=x, backend="triton")
    assert_same((y, total), reference.layer_norm(x, weight, bias, residual=x), 64)
    gradient = torch.empty_strided((4, 64), (2**30, 1))
    gradient.copy_(torch.randn(4, 64))
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.layer_norm(leaf, weight, bias, backend="triton").backward(gradient)
    reference.layer_norm(other, weight, bias).backward(gradient)
    assert_same(leaf.grad, other.grad, 64)


def test_autocast_computes_in_float32():
    x, weight, bias = torch.randn(3, 40).bfloat16(), torch.randn(40), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = F.layer_norm(x, weight, bias, backend="triton"), torch.layer_norm(x, (40,), weight, bias)
    assert ours.dtype == torch.float32
    assert_same(ours, theirs.float(), dtype=torch.bfloat16)
