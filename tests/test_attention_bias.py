"""Biases, masks, key lengths and causal masks of attention against the float64 formula and PyTorch's SDPA."""

import math

import pytest
import torch
import torch.nn.functional as torch_F
from precision import assert_as_precise, double, run
from test_attention import make

from vit_triton import functional as F
from vit_triton import reference
from vit_triton.arguments import DecomposedBias

pytestmark = pytest.mark.compiled
MIN = torch.finfo(torch.float32).min


def allowed(shape, bias, key_lengths, causal):
    """Which keys take part: bool, broadcasts to ``shape``."""
    n_q, n_k = shape[2:]
    taking = torch.ones(n_q, n_k, dtype=torch.bool)
    if causal:
        taking = taking.tril(n_k - n_q if causal == "bottom_right" else 0)
    if key_lengths is not None:
        taking = taking & (torch.arange(n_k) < key_lengths.view(-1, 1, 1, 1))
    return taking & bias if isinstance(bias, torch.Tensor) and bias.dtype == torch.bool else taking


def added(bias):
    """The bias that is added to the scores."""
    if isinstance(bias, DecomposedBias):
        return (bias.rel_h[..., None] + bias.rel_w[..., None, :]).flatten(-2)
    return None if bias is None or bias.dtype == torch.bool else bias


def formula(q, k, v, bias, scale, key_lengths, causal):
    """(out, lse) in any dtype; rows without keys are zeros."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if added(bias) is None else scores + added(bias)
    scores = scores.masked_fill(~allowed(scores.shape, bias, key_lengths, causal), -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    p = scores.softmax(-1).masked_fill(empty, 0.0)
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return (p.to(v.dtype) @ v).transpose(1, 2), lse.masked_fill(empty[..., 0], -math.inf)


def absolute(q, k, v, do, dlse, bias, scale, key_lengths, causal):
    """out, lse, dq, dk, dv and the gradient of the whole bias, with absolute values in every sum, in float64."""
    q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
    sizes, scores = q.abs() @ k.abs().transpose(-1, -2) * abs(scale), q @ k.transpose(-1, -2) * scale
    if added(bias) is not None:
        # masked elements have no size
        sizes = sizes + added(bias).abs().where(added(bias) > MIN, 0.0)
        scores = scores + added(bias)
    scores = scores.masked_fill(~allowed(scores.shape, bias, key_lengths, causal), -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    p = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    weights = p * (1 + sizes)
    dp = do.abs() @ v.abs().transpose(-1, -2)
    ds = weights * (dp + (p * dp).sum(-1, keepdim=True) + dlse.abs()[..., None])
    dq, dk, dv = ds @ k.abs() * abs(scale), ds.transpose(-1, -2) @ q.abs() * abs(scale), weights.mT @ do.abs()
    lse = sizes.max(-1).values + math.log(k.shape[-2]) + 1
    return [(weights @ v.abs()).transpose(1, 2), lse, *(x.transpose(1, 2) for x in (dq, dk, dv))], ds


def reduced(ds, bias):
    """The gradients of the tensors of ``bias`` from that of the whole bias."""
    if isinstance(bias, DecomposedBias):
        grid = ds.unflatten(-1, (bias.rel_h.shape[-1], -1))
        return [grid.sum(-1), grid.sum(-2)]
    return [] if added(bias) is None else [ds.sum_to_size((1,) * (4 - bias.ndim) + bias.shape).view(bias.shape)]


def check(q, k, v, bias=None, *, scale=None, key_lengths=None, causal=False, do=None, dlse=None, packed=False):
    number = q.shape[-1] ** -0.5 if scale is None else scale
    options = dict(key_lengths=key_lengths, causal=causal)
    tensors = list(bias) if isinstance(bias, DecomposedBias) else [] if bias is None else [bias]

    def with_bias(function, **more):
        def call(q, k, v, *parts):
            whole = DecomposedBias(*parts) if isinstance(bias, DecomposedBias) else parts[0] if parts else None
            return function(q, k, v, bias=whole, **options, **more)

        return call

    def ours_of(q, k, v, **more):
        if packed:
            return F.attention_packed(torch.stack((q, k, v), 2), **more)
        return F.attention(q, k, v, **more)

    inputs = [q, k, v, *tensors]
    do = torch.randn_like(q) if do is None else do
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1]) if dlse is None else dlse
    exact = run(with_bias(formula, scale=number), double(inputs), double([do, dlse]))
    empty = exact[1] == -math.inf
    dlse = dlse.masked_fill(empty, 0.0)
    ours = run(with_bias(ours_of, scale=scale, return_lse=True, backend="triton"), inputs, [do, dlse])
    # 16-bit biases take part in float32 sums, as in our kernels
    peer = run(with_bias(formula, scale=number), inputs, [do, dlse])
    exact = run(with_bias(formula, scale=number), double(inputs), double([do, dlse]))
    wide = DecomposedBias(*double(tensors)) if isinstance(bias, DecomposedBias) else double([bias])[0]
    sizes, ds = absolute(*double([q, k, v, do, dlse]), wide, number, key_lengths, causal)
    assert torch.equal(ours[1] == -math.inf, empty)
    assert not ours[0].transpose(1, 2)[empty].any() and not ours[2].transpose(1, 2)[empty].any()
    for results in (ours, peer, exact):
        results[1] = results[1].masked_fill(empty, 0.0)
    sizes = [*sizes, *reduced(ds, bias)]
    floats = [x for x in tensors if x.is_floating_point()]
    names = ["out", "lse", "dq", "dk", "dv", *(f"dbias[{i}]" for i in range(len(floats)))]
    for ours_grad, x in zip(ours[5:], floats, strict=True):
        assert ours_grad.dtype == x.dtype
    assert_as_precise(ours, [peer], exact, sizes, names)
    return ours


SHAPES = {"full": (2, 3, 37, 53), "keys": (2, 1, 1, 53), "queries": (3, 37, 1), "one": (1,)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_broadcast_bias(shape):
    q, k, v = make(2, 37, 53, 3, 72, torch.float32)
    check(q, k, v, torch.randn(shape))


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float16, True), (torch.bfloat16, False)])
def test_bias_in_16_bits_and_float32(dtype, wide):
    q, k, v = make(2, 37, 53, 3, 80, dtype, "strided")
    bias = torch.randn(3, 37, 53)
    check(q, k, v, bias if wide else bias.to(dtype), scale=-0.3, do=torch.randn(()).to(dtype).expand(q.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_all_samples(dtype):
    """On a CPU, the gradient is summed over groups of 32 / heads samples, of which the last is smaller."""
    q, k, v = make(7, 21, 37, 16, 24, dtype)
    bias, lengths = torch.randn(16, 21, 37).to(dtype), torch.tensor([37, 0, 5, 36, 1, 37, 16])
    options = dict(key_lengths=lengths, causal="bottom_right")
    check(q, k, v, bias, **options)
    gradients = []
    for leaf in (bias.clone().requires_grad_(), bias.clone().requires_grad_()):
        F.attention(q, k, v, bias=leaf, **options, backend="triton").square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_bias_with_odd_strides_and_strides_of_zero():
    """Columns of longer rows, and one column expanded along every other dimension."""
    q, k, v = make(2, 53, 53, 3, 64, torch.float32, "packed")
    storage = torch.randn(3, 53, 59)
    for bias in (storage[:, :, 3:56], storage[:1, :, :1].expand(2, 3, 53, 53)):
        ours = check(q, k, v, bias, packed=True)
        assert ours[5].shape == bias.shape


def test_splits_of_the_bias_gradient(small_tiles):
    """Several tiles, samples and splits, whose sums have a fixed order."""
    q, k, v = make(5, 37, 50, 2, 16, torch.float32)
    bias = torch.randn(1, 2, 37, 50)
    first, second = (check(q, k, v, bias, do=q.sin(), dlse=torch.ones(5, 2, 37)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(q, k, v, torch.randn(2, 37, 1), causal=True, key_lengths=torch.tensor([50, 0, 1, 33, 17]))


@pytest.mark.parametrize("n", [(197, 197), (1, 1), (1, 70)])
def test_lengths_of_models(n):
    q, k, v = make(2, *n, 2, 64, torch.float32)
    check(q, k, v, torch.randn(2, *n))


def test_more_keys_than_one_program_of_a_cpu_holds():
    q, k, v = make(1, 40, 600, 2, 64, torch.float32)
    check(q, k, v, torch.randn(2, 40, 600))
    check(q, k, v, torch.rand(40, 600) < 0.5, key_lengths=torch.tensor([555]), causal="bottom_right")


@pytest.mark.parametrize(
    ("n", "causal", "key_lengths"),
    [((37, 53), True, torch.tensor([30, 53])), ((53, 37), "bottom_right", None), ((37, 53), "bottom_right", None)],
)
def test_causal(n, causal, key_lengths, small_tiles):
    q, k, v = make(2, *n, 2, 72, torch.float32)
    for scale in (0.0, 0.3):
        check(q, k, v, causal=causal, key_lengths=key_lengths, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_lengths(dtype):
    q, k, v = make(4, 37, 53, 2, 64, dtype)
    lengths = torch.tensor([0, 1, 53, 20], dtype=torch.int32)
    _, _, _, dk, dv = check(q, k, v, key_lengths=lengths)
    for i, length in enumerate(lengths):
        assert not dk[i, length:].any() and not dv[i, length:].any()
    q[0] = math.nan  # of a sample without keys
    k[1, 1:] = v[1, 1:] = math.nan  # past the length
    out = F.attention(q, k, v, key_lengths=lengths.long(), backend="triton")
    assert not out[0].any() and out[1:].isfinite().all()


def test_masks_of_sdpa():
    """PyTorch's own results: bool and infinite masks, rows without keys, and finite minima, which average."""
    q, k, v = make(2, 33, 33, 2, 64, torch.float32)
    mask = torch.rand(2, 1, 33, 33) < 0.5
    mask[0, 0, 3] = mask[1, 0, 20:] = False

    def sdpa(*x, bias):
        # PyTorch's fused kernel gives rows of finite minima a gradient that is N_k times too large
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch_F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x), attn_mask=bias)
        return out.transpose(1, 2)

    for bias in (mask, *(torch.zeros(mask.shape).masked_fill(~mask, value) for value in (-math.inf, MIN))):
        theirs = run(lambda *x, bias=bias: sdpa(*x, bias=bias), [q, k, v], [q.cos()])
        ours = run(lambda *x, bias=bias: F.attention(*x, bias=bias, backend="triton"), [q, k, v], [q.cos()])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        check(q, k, v, bias, dlse=torch.zeros(2, 2, 33))


def test_finite_minimum_averages():
    q, k, v = make(1, 16, 40, 1, 64, torch.float32)
    bias = torch.full((16, 40), MIN)
    out, dq, _, dv = run(lambda *x: F.attention(*x, bias=bias, backend="triton"), [q, k, v], [torch.ones_like(q)])
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))
    torch.testing.assert_close(dv, torch.full_like(dv, 16 / 40))
    check(q, k, v, bias, dlse=torch.zeros(1, 1, 16))


def test_decomposed_bias():
    grid = 5, 7
    q, k, v = make(2, 30, math.prod(grid), 2, 64, torch.float32)
    rel_h, rel_w = (torch.randn(2, 30, 2, n).transpose(1, 2) for n in grid)  # strided
    check(q, k, v, DecomposedBias(rel_h, rel_w), scale=-0.2)
    sizes = dict(key_lengths=torch.tensor([0, 20]), causal="bottom_right")
    check(q, k, v, DecomposedBias(rel_h, rel_w), **sizes)


def test_decomposed_bias_of_16_bits(small_tiles):
    q, k, v = make(1, 37, 35, 2, 80, torch.bfloat16)
    check(q, k, v, DecomposedBias(*(torch.randn(1, 2, 37, n).bfloat16() for n in (5, 7))))


def test_dropout_and_norms_with_a_bias():
    """The dropout mask and the norms are those of calls without a bias."""
    q, k, v = make(2, 20, 20, 2, 16, torch.float32)
    bias, norm = torch.zeros(2, 20, 20), (torch.randn(16), torch.randn(16), 1e-6)
    results = []
    for given in (bias, None):
        torch.manual_seed(4)
        options = dict(bias=given, dropout_p=0.3, q_norm=norm, k_norm=norm, backend="triton")
        results.append(run(lambda *x, o=options: F.attention(*x, **o), [q, k, v], [q.cos()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grid", [None, (4, 8)], ids=["matrix", "decomposed"])
def test_gradient_of_a_bias_with_dropout(grid):
    """v = 1 on the diagonal: out is the matrix of weights after dropout, so that autograd has the same mask. A row of
    the grid of a decomposed bias starts at a key that is no multiple of 16."""
    n, p = 32, 0.4
    q, k, v = torch.randn(1, n, 1, n), torch.randn(1, n, 1, n), torch.eye(n).view(1, n, 1, n)
    parts, do = [torch.randn(1, 1, n, size) for size in grid or (n,)], torch.randn(1, n, 1, n)
    torch.manual_seed(0)

    def ours(*parts):
        return F.attention(q, k, v, bias=DecomposedBias(*parts) if grid else parts[0], dropout_p=p, backend="triton")

    out, *grads = run(ours, parts, [do])
    kept = (out != 0).transpose(1, 2)

    def theirs(*parts):
        bias = (parts[0][..., None] + parts[1][..., None, :]).flatten(-2) if grid else parts[0]
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * n**-0.5 + bias).softmax(-1) * kept / (1 - p)
        return weights.transpose(1, 2)

    for a, b in zip((out, *grads), run(theirs, parts, [do]), strict=True):
        torch.testing.assert_close(a, b)


def test_empty_batch():
    q, k, v = (torch.randn(0, n, 2, 16) for n in (5, 7, 7))
    bias, lengths = torch.randn(2, 5, 7), torch.zeros(0, dtype=torch.int64)
    call = lambda *x: F.attention(*x[:3], bias=x[3], key_lengths=lengths, backend="triton")  # noqa: E731
    *grads, dbias = run(call, [q, k, v, bias], [torch.randn(0, 5, 2, 16)])
    assert [len(x) for x in grads] == [0] * 4 and not dbias.any()


def test_matrix_of_scores_is_not_allocated():
    """A broadcast bias: nothing of batch * heads * queries * keys elements, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    q, k, v = (x.requires_grad_() for x in make(8, 64, 64, 4, 16, torch.float32))
    bias = torch.randn(64, 64, requires_grad=True)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            largest.extend(x.untyped_storage().nbytes() for x in (result if isinstance(result, tuple) else [result]))
            return result

    with Sizes():
        F.attention(q, k, v, bias=bias, backend="triton").sum().backward()
    assert 0 < max(largest) < 8 * 4 * 64 * 64 * 4


@pytest.mark.parametrize("options", [dict(causal="bottom_right"), dict(key_lengths=torch.tensor([3, 5]))])
def test_reference_equals_the_formula(options):
    q, k, v = make(2, 5, 7, 2, 16, torch.float64)
    bias = torch.randn(2, 1, 5, 7).double()
    for given in (bias, bias > 0, DecomposedBias(torch.randn(2, 2, 5, 1), torch.randn(2, 2, 5, 7))):
        ours = reference.attention(q, k, v, bias=given, return_lse=True, **options)
        theirs = formula(q, k, v, given, 0.25, options.get("key_lengths"), options.get("causal", False))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


BAD = {
    "bias must broadcast to .*2, 2, 5, 7.*got .3, 5, 7": dict(bias=torch.zeros(3, 5, 7)),
    "bias must broadcast to .*got .1, 1, 1, 5, 7": dict(bias=torch.zeros(1, 1, 1, 5, 7)),
    "bias must be float32 or bool, got torch.float16": dict(bias=torch.zeros(5, 7).half()),
    "bias must be a torch.Tensor or vit_triton.DecomposedBias, got list": dict(bias=[0.0]),
    "bias must be on cpu, got meta": dict(bias=torch.zeros(5, 7, device="meta")),
    "rel_h must be .*Hk.* got .2, 2, 7, 1": dict(bias=DecomposedBias(torch.zeros(2, 2, 7, 1), torch.zeros(2, 2, 5, 7))),
    "Hk . Wk = 7 keys, got 2 . 7": dict(bias=DecomposedBias(torch.zeros(2, 2, 5, 2), torch.zeros(2, 2, 5, 7))),
    "key_lengths must be .batch,. = .2,., got .3,": dict(key_lengths=torch.ones(3, dtype=torch.int32)),
    "key_lengths must be int32 or int64, got torch.float32": dict(key_lengths=torch.ones(2)),
    "key_lengths must be from 0 to N_k = 7, got 1 to 8": dict(key_lengths=torch.tensor([1, 8])),
    "key_lengths must be from 0 to N_k = 7, got -1 to 2": dict(key_lengths=torch.tensor([2, -1])),
    "causal must be True, False or 'bottom_right', got 'top'": dict(causal="top"),
    "causal must be True, False or 'bottom_right', got 1": dict(causal=1),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_errors(backend):
    q, k, v = make(2, 5, 7, 2, 16, torch.float32)
    for message, options in BAD.items():
        with pytest.raises((TypeError, ValueError), match=message):
            F.attention(q, k, v, **options, backend=backend)
    with pytest.raises(ValueError, match="q has 2 heads, k and v have 1; they must be equal"):
        F.attention(q, k[:, :, :1], v[:, :, :1], backend=backend)
    with pytest.raises(ValueError, match=r"bias must broadcast to .* got \(5, 7\)"):
        F.attention_packed(torch.randn(2, 7, 3, 2, 16), bias=torch.zeros(5, 7), backend=backend)
