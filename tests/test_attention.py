"""attention and attention_packed against the float64 formula: outputs, log-sum-exp, every gradient, dropout."""

import math

import pytest
import torch
import torch.nn.functional as torch_F
from hypothesis import given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_same, double, run

from vit_triton import functional as F
from vit_triton.kernels.attention.config import AttentionConfig, attention_tail, split_head_dim

pytestmark = pytest.mark.compiled


def formula(q, k, v, scale, keep=None):
    """(out, lse) with any dtype; ``keep`` (B, H, N_q, N_k) is the dropout mask, already divided by 1 - p."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    p = scores.softmax(-1)
    out = ((p if keep is None else p * keep) @ v).transpose(1, 2)
    return out, scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)


def sdpa(q, k, v, scale):
    out = torch_F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)
    return out, formula(q, k, v, scale)[1]


def absolute(q, k, v, do, dlse, scale, keep=None, sizes_of_qk=None):
    """out, lse, dq, dk, dv with absolute values in every sum, from float64 (B, N, H, D) tensors. ``sizes_of_qk``: q and
    k computed with absolute values, if they are themselves sums."""
    size_q, size_k = (x.transpose(1, 2) for x in sizes_of_qk or (q.abs(), k.abs()))
    q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
    sizes = size_q @ size_k.transpose(-1, -2) * abs(scale)  # the scores, with absolute values
    p = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    keep = torch.ones_like(p) if keep is None else keep
    # a relative error eps in a score is a relative error eps * score in its weight
    weights = p * (1 + sizes)
    out = (weights * keep) @ v.abs()
    dp = keep * (do.abs() @ v.abs().transpose(-1, -2))
    ds = weights * (dp + (p * dp).sum(-1, keepdim=True) + dlse.abs()[..., None])
    dq, dk = ds @ size_k * abs(scale), ds.transpose(-1, -2) @ size_q * abs(scale)
    dv = (weights * keep).transpose(-1, -2) @ do.abs()
    lse = sizes.max(-1).values + math.log(k.shape[-2]) + 1
    return [out.transpose(1, 2), lse, *(x.transpose(1, 2) for x in (dq, dk, dv))]


NAMES = ("out", "lse", "dq", "dk", "dv")


def make(batch, n_q, n_k, heads, head_dim, dtype, layout="contiguous"):
    def one(n):
        if layout == "heads first":
            return torch.randn(batch, heads, n, head_dim).to(dtype).transpose(1, 2)
        if layout == "strided":
            return torch.randn(batch, n, heads, 2 * head_dim).to(dtype)[..., ::2]
        return torch.randn(batch, n, heads, head_dim).to(dtype)

    if layout == "packed" and n_q == n_k:
        return list(torch.randn(batch, n_q, 3, heads, head_dim).to(dtype).unbind(2))
    return [one(n_q), one(n_k), one(n_k)]


def check(q, k, v, do, dlse, scale=None):
    number = q.shape[-1] ** -0.5 if scale is None else scale
    grads = [do, dlse]
    ours = run(lambda *x: F.attention(*x, scale=scale, return_lse=True, backend="triton"), [q, k, v], grads)
    peers = [run(lambda *x, peer=peer: peer(*x, number), [q, k, v], grads) for peer in (formula, sdpa)]
    exact = run(lambda *x: formula(*x, number), double([q, k, v]), double(grads))
    size = absolute(*double([q, k, v, do, dlse]), number)
    assert_as_precise(ours, peers, exact, size, NAMES)
    assert ours[0].is_contiguous()


@given(
    batch=st.integers(1, 2),
    n=st.sampled_from([(1, 1), (1, 17), (16, 16), (33, 33), (65, 65), (5, 70), (130, 3)]),
    heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([16, 40, 64, 72, 80, 88, 128]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "packed", "heads first", "strided"]),
    gradient=st.sampled_from(["dense", "expanded", "transposed"]),
    scale=st.sampled_from([None, 0.3, -1.0]),
)
def test_outputs_and_gradients(batch, n, heads, head_dim, dtype, layout, gradient, scale):
    q, k, v = make(batch, *n, heads, head_dim, dtype, layout)
    shape = (batch, n[0], heads, head_dim)
    if gradient == "expanded":
        do, dlse = torch.randn(()).to(dtype).expand(shape), torch.randn(()).expand(batch, heads, n[0])
    elif gradient == "transposed":
        do, dlse = (
            torch.randn(shape[::-1]).to(dtype).permute(3, 2, 1, 0),
            torch.randn(n[0], heads, batch).permute(2, 1, 0),
        )
    else:
        do, dlse = torch.randn(shape).to(dtype), torch.randn(batch, heads, n[0])
    check(q, k, v, do, dlse, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [(70, 50), (64, 48)])
def test_several_blocks(small_tiles, n, dtype):
    q, k, v = make(1, *n, 2, 72, dtype)
    check(q, k, v, torch.randn_like(q), torch.randn(1, 2, n[0]), scale=0.4)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_non_positive_scale(scale):
    """The largest score has the smallest product (scale < 0), or all scores are 0; 40 keys need a masked step."""
    q, k, v = (torch.randn(1, 40, 2, 24) for _ in range(3))
    check(q, k, v, torch.randn_like(q), torch.randn(1, 2, 40), scale=scale)


def test_first_block_of_minus_infinity(small_tiles):
    q, k, v = make(1, 20, 50, 2, 16, torch.float32)
    q = q.abs()
    k[:, :20, :, 3] = -math.inf  # the first block and part of the second
    out, lse = F.attention(q, k, v, return_lse=True, backend="triton")
    for ours, theirs in zip((out, lse), formula(q, k, v, 0.25), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head_dim", [1, 8, 96, 104, 160, 256])
def test_other_head_sizes(head_dim):
    q, k, v = make(1, 21, 21, 2, head_dim, torch.bfloat16)
    check(q, k, v, torch.randn_like(q), torch.zeros(1, 2, 21))


@pytest.mark.parametrize("dtype", DTYPES)
def test_vit_b_16_at_224(dtype):
    q, k, v = make(1, 197, 197, 2, 64, dtype, "packed")
    check(q, k, v, torch.randn_like(q), torch.zeros(1, 2, 197))


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dkdv_kernel_with_all_keys_computes_every_gradient(dtype, head_dim, small_tiles, monkeypatch):
    from vit_triton.kernels.attention import backward as kernels

    monkeypatch.setattr(kernels, "pick_attention_bwd_dq", lambda *args: None)
    monkeypatch.setattr(kernels, "pick_attention_bwd_dkdv", lambda *args: AttentionConfig(16, 32, 4, 1))
    q, k, v = make(2, 37, 21, 2, head_dim, dtype)
    check(q, k, v, torch.randn_like(q), torch.zeros(2, 2, 37))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_form_is_bitwise_equal(dropout_p):
    qkv = torch.randn(2, 19, 3, 2, 40).bfloat16()
    do = torch.randn(2, 19, 2, 40).bfloat16()
    results = []
    for function in (F.attention_packed, lambda x, **kw: F.attention(*x.unbind(2), **kw)):
        torch.manual_seed(3)
        results.append(run(lambda x, f=function: f(x, dropout_p=dropout_p, backend="triton"), [qkv], [do]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def dropped(n_q, n_k, heads, p, seed, *, batch=1):
    """The dropout mask (B, H, N_q, N_k) of a call: with equal scores and v = 1 on the diagonal, out is the mask."""
    size = 1 << (n_k - 1).bit_length()
    q, k = torch.zeros(batch, n_q, heads, size), torch.zeros(batch, n_k, heads, size)
    v = torch.eye(n_k, size).view(1, n_k, 1, size).expand(batch, n_k, heads, size)
    torch.manual_seed(seed)
    out = F.attention(q, k, v, dropout_p=p, backend="triton")
    return (out[..., :n_k] * n_k).transpose(1, 2)


def test_dropout_share_and_scale():
    keep = dropped(90, 120, 2, 0.3, seed=0)
    kept = keep != 0
    assert_same(keep[kept], torch.full_like(keep[kept], 1 / 0.7))
    count, deviation = 0.7 * kept.numel(), math.sqrt(0.7 * 0.3 * kept.numel())
    assert abs(int(kept.sum()) - count) < 5 * deviation
    # rows, columns and heads are independent: all rows and columns differ
    rows = kept.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)
    assert len(kept[0, 0].T.unique(dim=0)) == 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_mask_is_the_same_in_forward_and_backward(dtype):
    n_q, n_k, heads, scale = 37, 50, 2, 0.25
    keep = dropped(n_q, n_k, heads, 0.3, seed=7, batch=2).round(decimals=5).double()
    keep = torch.where(keep != 0, 1 / 0.7, 0.0)
    q, k, v = make(2, n_q, n_k, heads, 16, dtype)
    do, dlse = torch.randn_like(q), torch.zeros(2, heads, n_q)
    torch.manual_seed(7)
    ours = run(
        lambda *x: F.attention(*x, scale=scale, dropout_p=0.3, return_lse=True, backend="triton"), [q, k, v], [do, dlse]
    )
    peer = run(lambda *x: formula(*x, scale, keep.to(dtype)), [q, k, v], [do, dlse])
    exact = run(lambda *x: formula(*x, scale, keep), double([q, k, v]), double([do, dlse]))
    assert_as_precise(ours, [peer], exact, absolute(*double([q, k, v, do, dlse]), scale, keep), NAMES)


def test_dropout_follows_the_seed_of_torch():
    first, again = dropped(20, 30, 1, 0.5, seed=1), dropped(20, 30, 1, 0.5, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, dropped(20, 30, 1, 0.5, seed=2))
    q = torch.randn(1, 20, 1, 16)
    torch.manual_seed(0)
    a, b = (F.attention(q, q, q, dropout_p=0.5, backend="triton") for _ in range(2))
    assert not torch.equal(a, b)


def test_without_dropout_no_random_number_is_drawn():
    q = torch.randn(1, 4, 1, 16)
    before = torch.get_rng_state()
    F.attention(q, q, q, backend="triton")
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_probability_one():
    q, k, v = make(1, 5, 9, 2, 16, torch.float32)
    results = run(lambda *x: F.attention(*x, dropout_p=1.0, backend="triton"), [q, k, v], [torch.randn_like(q)])
    assert all(not x.any() for x in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(dtype, size):
    q, k, v = make(1, 20, 40, 1, 16, torch.float32)
    q = torch.where(torch.rand_like(q) < 0.5, 1.0, -1.0) * size / 16
    k = torch.where(torch.rand_like(k) < 0.5, 1.0, -1.0)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    do = torch.randn_like(q)
    ours = run(lambda *x: F.attention(*x, scale=1.0, backend="triton"), [q, k, v], [do])
    exact = run(lambda *x: formula(*x, 1.0)[0], double([q, k, v]), double([do]))
    peer = run(lambda *x: formula(*x, 1.0)[0], [q, k, v], [do])
    size = absolute(*double([q, k, v, do]), torch.zeros(1, 1, 20), 1.0)
    assert all(x.isfinite().all() for x in ours)
    assert_as_precise(ours, [peer], exact, [size[0], *size[2:]], ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3e3, 3e5, 1e8, 1e9])
def test_the_documented_limits_of_large_scores(size, dtype):
    if dtype == torch.float16 and size > 1e8:
        pytest.skip("beyond the limit")
    q, k, v = make(1, 40, 40, 1, 16, torch.float32)
    size_now = float((q.squeeze() @ k.squeeze().T).abs().max())
    q, k, v = (x.to(dtype) for x in (q * (size / size_now) ** 0.5, k * (size / size_now) ** 0.5, v))
    do = torch.randn_like(q)
    out, _, _, dv = run(lambda *x: F.attention(*x, scale=1.0, backend="triton"), [q, k, v], [do])
    exact, _, _, exact_dv = run(lambda *x: formula(*x, 1.0)[0], double([q, k, v]), double([do]))
    rounding = 4 * torch.finfo(dtype).eps
    close = 2e-7 * size if size < 1e6 else 0  # from the scores; of larger ones, one key gets all the weight
    assert (out - exact).norm() <= (close + rounding) * exact.norm()
    if size < 1e6:
        assert (dv - exact_dv).norm() <= (close + rounding) * exact_dv.norm()


def test_rows_of_only_very_negative_scores():
    # exp(-lse) overflows, so lanes past the last key or query must be masked
    q, k, v = make(1, 21, 37, 1, 16, torch.float32)
    q, k = q.abs() + 1, -k.abs() - 1
    check(q, k, v, torch.randn_like(q), torch.zeros(1, 1, 21), scale=100.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
@pytest.mark.parametrize("n", [7, 33])
def test_nan_and_inf_propagate_as_in_the_formula(value, which, n, dropout_p):
    """They also spread through dropped weights: 0 times NaN is NaN."""
    q, k, v = make(1, n, n, 2, 16, torch.float32)
    do = torch.randn_like(q)
    {"q": q, "k": k, "v": v, "do": do}[which][0, n // 2, 1, 3] = value
    keep = None if dropout_p == 0 else dropped(n, n, 2, dropout_p, seed=5).round(decimals=5)
    torch.manual_seed(5)
    ours = run(
        lambda *x: F.attention(*x, dropout_p=dropout_p, return_lse=True, backend="triton"), [q, k, v], [do, None]
    )
    theirs = run(lambda *x: formula(*x, 0.25, keep), [q, k, v], [do, None])
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
        # an infinite incoming gradient gives inf - inf in some summation orders only
        assert torch.equal(a.isnan(), b.isnan()) or name == "lse" or which == "do", name
    assert ours[0][:, :, 0].isfinite().all()


def test_bitwise_reproducible():
    q, k, v = make(2, 70, 90, 2, 72, torch.bfloat16)
    do = torch.randn_like(q)
    first, second = (
        run(lambda *x: F.attention(*x, backend="triton"), [x.clone() for x in (q, k, v)], [do]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_empty_batch_and_empty_query(shape):
    q, k = torch.randn(shape), torch.randn(shape[0], 7, 2, 16)
    out, dq, dk, dv = run(lambda *x: F.attention(*x, backend="triton"), [q, k, k.clone()], [torch.randn(shape)])
    assert out.shape == dq.shape == shape
    assert dk.shape == k.shape and not dk.any() and not dv.any()


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_required_gradients_are_computed(wanted):
    tensors = make(1, 5, 6, 2, 16, torch.float32)
    leaves, others = ([x.clone() for x in tensors] for _ in range(2))
    for i in range(3):
        leaves[i].requires_grad_(bool(wanted & 1 << i))
        others[i].requires_grad_()
    F.attention(*leaves, backend="triton").square().sum().backward()
    formula(*others, 0.25)[0].square().sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            assert_same(leaf.grad, other.grad, 16)


def test_saved_tensors_are_operands_output_and_log_sum_exp():
    saved = []
    q, k, v = (x.requires_grad_() for x in make(2, 6, 7, 2, 16, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        F.attention(q, k, v, backend="triton")
        with torch.no_grad():
            F.attention(q, k, v, backend="triton")
    assert sorted(saved) == sorted([(2, 6, 2, 16), (2, 7, 2, 16), (2, 7, 2, 16), (2, 6, 2, 16), (2, 2, 6)])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_past_32_bits(axis, virtual_memory):
    shape, strides = [2, 3, 2, 16], [96, 32, 16, 1]
    shape[axis], strides[axis] = 4, 2**30
    far = torch.empty_strided(shape, strides)
    far.copy_(torch.randn(shape))
    leaf, near = far.detach().requires_grad_(), far.contiguous().requires_grad_()
    do = torch.empty_strided(shape, strides)
    do.copy_(torch.randn(shape))
    out = F.attention(leaf, leaf, leaf, backend="triton")
    expected = formula(near, near, near, 0.25)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, do)[0] for y, x in ((out, leaf), (expected, near))))


@pytest.mark.parametrize(
    ("head_dim", "split"),
    [(1, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (88, (64, 32)),
     (96, (64, 32)), (104, (128, 0)), (128, (128, 0)), (160, (128, 32)), (256, (256, 0))],
)  # fmt: skip
def test_head_size_is_covered_by_two_tiles(head_dim, split):
    assert split_head_dim(head_dim, torch.bfloat16, "sm_90") == split


def test_last_block_of_keys_is_minimal():
    assert [attention_tail(n, 64) for n in (64, 65, 197, 257, 577, 1370, 100)] == [0, 16, 16, 16, 16, 32, 64]
