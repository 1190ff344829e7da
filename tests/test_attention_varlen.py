"""Attention of packed sequences: against each sequence alone, and bit for bit against a padded batch."""

import functools

import pytest
import torch
from precision import assert_as_precise, double, run
from test_attention_bias import absolute, formula

from vit_triton import functional as F
from vit_triton import reference

pytestmark = pytest.mark.compiled
LENGTHS_Q, LENGTHS_K = (5, 0, 40, 1, 33), (9, 7, 40, 0, 100)


def starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def alone(q, k, v, causal):
    """(out, lse) of packed sequences from the formula, one by one."""
    results = [
        formula(q[None, rows], k[None, keys], v[None, keys], None, q.shape[-1] ** -0.5, None, causal)
        for rows, keys in parts()
    ]
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], 1)


def parts():
    ends = starts(LENGTHS_Q).tolist(), starts(LENGTHS_K).tolist()
    return [(slice(*q), slice(*k)) for q, k in zip(*(zip(e, e[1:], strict=False) for e in ends), strict=True)]


def sizes(q, k, v, do, dlse, causal):
    """The results of ``alone`` and its gradients with absolute values in every sum."""
    results = []
    for rows, keys in parts():
        one = q[None, rows], k[None, keys], v[None, keys], do[None, rows], dlse[None, :, rows]
        if k[keys].shape[0] == 0:
            results.append([x * 0 for x in (one[0], one[4], one[0], one[1], one[2])])
        else:
            results.append(absolute(*one, None, q.shape[-1] ** -0.5, None, causal)[0])
    return [
        torch.cat([x[0] for x in column], 1 if i == 1 else 0) for i, column in enumerate(zip(*results, strict=True))
    ]


def varlen(q, k, v, **options):
    ends = starts(LENGTHS_Q), max(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_K)
    return F.attention_varlen(q, k, v, *ends, return_lse=True, **options)


def compare(dtype, head_dim, causal=False):
    q, k, v = (torch.randn(n, 2, head_dim).to(dtype) for n in (sum(LENGTHS_Q), sum(LENGTHS_K), sum(LENGTHS_K)))
    empty = torch.cat([torch.full((n,), m == 0) for n, m in zip(LENGTHS_Q, LENGTHS_K, strict=True)])
    if causal == "bottom_right":  # no row of these lengths is past the diagonal
        assert all(m == 0 or n <= m for n, m in zip(LENGTHS_Q, LENGTHS_K, strict=True))
    do = torch.randn(2, *q.shape).to(dtype).sum(0)
    dlse = torch.randn(2, len(q)).masked_fill(empty, 0.0)
    ours = run(lambda *x: varlen(*x, causal=causal, backend="triton"), [q, k, v], [do, dlse])
    peer = run(lambda *x: alone(*x, causal), [q, k, v], [do, dlse])
    exact = run(lambda *x: alone(*x, causal), double([q, k, v]), double([do, dlse]))
    assert torch.equal(ours[1] == -torch.inf, empty.expand(2, -1))
    for results in (ours, peer, exact):
        results[1] = results[1].masked_fill(empty, 0.0)
    size = sizes(*double([q, k, v, do, dlse]), causal)
    assert_as_precise(ours, [peer], exact, size, ("out", "lse", "dq", "dk", "dv"))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 80), (torch.bfloat16, 64)])
def test_sequences_alone(dtype, head_dim):
    compare(dtype, head_dim)


@pytest.mark.parametrize("causal", [True, "bottom_right"])
def test_causal(causal, small_tiles):
    compare(torch.float32, 72, causal)


@pytest.mark.parametrize(("n", "dropout_p"), [(70, 0.0), (70, 0.3), (600, 0.3)])
def test_equals_a_padded_batch_bit_for_bit(n, dropout_p):
    """With the lengths of the keys and the same longest sequence; padded queries get no gradient."""
    lengths = torch.tensor([n, 0, 1, n // 2])
    valid = torch.arange(n) < lengths[:, None]
    qkv, do = torch.randn(4, n, 3, 2, 64), torch.randn(4, n, 2, 64) * valid[..., None, None]
    packed = F.pack(qkv, valid)
    assert packed.cu_seqlens.tolist() == [0, n, n, n + 1, n + 1 + n // 2] and packed.max_seqlen == n

    def padded_of(x):
        torch.manual_seed(1)
        return F.attention_packed(x, key_lengths=lengths, dropout_p=dropout_p, backend="triton")

    def packed_of(x):
        torch.manual_seed(1)
        ends = packed.cu_seqlens, packed.max_seqlen
        return F.attention_varlen(*x.unbind(1), *ends, dropout_p=dropout_p, backend="triton")

    out, grad = run(padded_of, [qkv], [do])
    packed_out, packed_grad = run(packed_of, [packed.tokens], [do[valid]])
    assert torch.equal(out[valid], packed_out) and torch.equal(grad[valid], packed_grad)
    assert not grad[~valid].any()


def test_pack_and_unpack_tokens_that_are_not_first():
    x = torch.randn(3, 5, 2, requires_grad=True)
    valid = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
    packed = F.pack(x, valid)
    assert torch.equal(packed.tokens, x[valid]) and packed.max_seqlen == 3
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 5] and packed.cu_seqlens.dtype == torch.int32
    y = F.unpack(packed.tokens, packed.indices, 3, 5)
    assert torch.equal(y, x * valid[..., None])
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, valid[..., None].expand(3, 5, 2).float())


def test_no_tokens():
    x = torch.randn(0, 2, 16)
    for ends in (starts(()), starts((0, 0))):
        grads = run(lambda *y, ends=ends: F.attention_varlen(*y, ends, 0, backend="triton"), [x, x, x], [x])
        assert all(grad.shape == (0, 2, 16) for grad in grads)
    empty = F.pack(torch.randn(0, 4, 3), torch.zeros(0, 4, dtype=torch.bool))
    assert empty.max_seqlen == 0 and empty.cu_seqlens.tolist() == [0]


def test_reference():
    q, k, v = (torch.randn(n, 2, 16).double() for n in (sum(LENGTHS_Q), sum(LENGTHS_K), sum(LENGTHS_K)))
    ends = starts(LENGTHS_Q), max(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_K)
    for causal in (False, True):
        ours = reference.attention_varlen(q, k, v, *ends, causal=causal, return_lse=True)
        for a, b in zip(ours, alone(q, k, v, causal), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_errors(backend):
    q = torch.randn(6, 2, 16)
    good = starts((2, 4))
    for message, arguments in {
        r"cu_seqlens_q must ascend from 0 to the number of rows, 6, got \[0, 4, 2, 6\]": (starts((4, -2, 4)), 4),
        r"cu_seqlens_q must ascend .* got \[0, 2, 5\]": (starts((2, 3)), 4),
        r"cu_seqlens_q must ascend .* got \[1, 2, 6\]": (torch.tensor([1, 2, 6], dtype=torch.int32), 4),
        "cu_seqlens_q must be int32, got torch.int64": (good.long(), 4),
        "cu_seqlens_q must be on cpu, got meta": (good.to("meta"), 4),
        r"cu_seqlens_q must be \(sequences . 1,\), got \(1, 3\)": (good[None], 4),
        "max_seqlen_q must be at least the longest length, 4, got 3": (good, 3),
        "max_seqlen_q must be an integer, got 4.0": (good, 4.0),
        r"cu_seqlens_q and cu_seqlens_k must have one shape, got \(3,\) and \(2,\)": (good, 4, starts((6,)), 6),
        "max_seqlen_k must be at least the longest length, 4, got 2": (good, 4, good, 2),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            F.attention_varlen(q, q, q, *arguments, backend=backend)
    with pytest.raises(ValueError, match=r"q must be \(total, H, D\), got shape \(1, 6, 2, 16\)"):
        F.attention_varlen(q[None], q[None], q[None], good, 4, backend=backend)
    with pytest.raises(ValueError, match="causal must be"):
        F.attention_varlen(q, q, q, good, 4, causal="top", backend=backend)
    with pytest.raises(TypeError, match="valid must be a bool tensor, got torch.float32"):
        F.pack(q, torch.ones(6, 2))
    with pytest.raises(ValueError, match=r"valid must be \(B, N\) = \(6, 2\) on cpu, got \(6, 3\) on cpu"):
        F.pack(q, torch.ones(6, 3).bool())
    with pytest.raises(ValueError, match=r"cu_seqlens_k is required .* got \(6, 2, 16\) and \(4, 2, 16\)"):
        F.attention_varlen(q, q[:4], q[:4], good, 4, backend=backend)
    with pytest.raises(ValueError, match="rope_prefix requires rope, got rope_prefix=1"):
        F.attention_varlen(q, q, q, good, 4, rope_prefix=1, backend=backend)
    for indices, message in (
        ([0, 4], r"indices must have one number per row of x, \(6, 2, 16\) on cpu, got \(2,\) on cpu"),
        ([0, 1, 2, 3, 4, 6], r"indices must be at least 0 and less than batch \* length = 2 \* 3, got 0 to 6"),
        ([-1, 1, 2, 3, 4, 5], "got -1 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            F.unpack(q, torch.tensor(indices), 2, 3)
    with pytest.raises(TypeError, match="indices must be an int32 or int64 tensor, got torch.float32"):
        F.unpack(q, torch.ones(6), 2, 3)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("layout, prefix", [("half", 0), ("half", 2), ("interleaved", 1), ("interleaved", 5)])
def test_rotary_positions_of_every_row(layout, prefix, backend):
    lengths = [5, 0, 1, 9]
    starts = torch.tensor([0, 5, 5, 6, 15], dtype=torch.int32)
    q, k, v = (torch.randn(15, 2, 16, requires_grad=True) for _ in range(3))
    angles = torch.randn(15, 8)
    rope = angles.cos(), angles.sin()
    options = dict(rope_layout=layout, backend=backend)
    varlen = functools.partial(F.attention_varlen, q, k, v, starts, 9, rope_prefix=prefix, **options)
    y = varlen(rope=rope)
    parts = []
    for start, n in zip(starts[:-1].tolist(), lengths, strict=True):
        rows = slice(start, start + n)
        if n:
            tables = tuple(table[rows][prefix:] for table in rope)
            inputs = (x[None, rows] for x in (q, k, v))
            parts.append(F.attention(*inputs, rope=tables, rope_prefix=min(prefix, n), **options)[0])
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = (torch.autograd.grad(x, (q, k, v), dy) for x in (y, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"or \(15, columns\) with rows for the prefix too, got \(14, 8\)"):
        varlen(rope=tuple(table[1:] for table in rope))
    tables = tuple(table.expand(1, 2, 15, 8) for table in rope)
    torch.testing.assert_close(varlen(rope=tables), y)
    if prefix:
        with pytest.raises(ValueError, match="rope_prefix requires the keys of the queries' sequences"):
            varlen(starts.clone(), 9, rope=rope)
    with pytest.raises(ValueError, match="rope_prefix must be at least 0, got -1"):
        F.attention_varlen(q, k, v, starts, 9, rope=rope, rope_prefix=-1)
