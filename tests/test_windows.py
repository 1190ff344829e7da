"""window_attention and relative_position_bias against float64 formulas, PyTorch's ops, torchvision and timm."""

import functools
import math

import pytest
import torch
import torch.nn.functional as torch_F
from precision import DTYPES, assert_as_precise, assert_same, double, run

from vit_triton import functional as F
from vit_triton import reference

pytestmark = pytest.mark.compiled


def places(height, width, window, shift):
    """For each window, the flat positions of its tokens, (windows, N), and whether two of them are from different
    regions of the map, (windows, N, N). Token by token, without rolling."""
    positions, regions = [], []
    for top in range(0, height, window[0]):
        for left in range(0, width, window[1]):
            tokens = [(top + i + shift[0], left + j + shift[1]) for i in range(window[0]) for j in range(window[1])]
            positions.append([y % height * width + x % width for y, x in tokens])
            regions.append([2 * (y >= height) + (x >= width) for y, x in tokens])
    regions = torch.tensor(regions)
    return torch.tensor(positions), regions[:, :, None] != regions[:, None, :]


def split(x, positions):
    """(B, H, W, ..., heads, D) -> (B, windows, ..., heads, N, D)"""
    return x.flatten(1, 2)[:, positions].movedim(2, -2)


def join(x, positions, height, width):
    """The inverse of :func:`split`."""
    x = x.movedim(-2, 2)
    flat = torch.zeros(x.shape[0], height * width, *x.shape[3:], dtype=x.dtype)
    return flat.index_copy(1, positions.flatten(), x.flatten(1, 2)).unflatten(1, (height, width))


def formula(qkv, bias, logit_scale, window, shift, mask_value=-100.0, scale=None, keep=None):
    """``keep`` (B, windows, heads, N, N): the dropout mask, already divided by 1 - p."""
    height, width = qkv.shape[1:3]
    positions, other = places(height, width, window, shift)
    q, k, v = split(qkv, positions).unbind(2)
    if logit_scale is None:
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        q, k = torch_F.normalize(q, dim=-1), torch_F.normalize(k, dim=-1)
        scores = q @ k.transpose(-1, -2) * logit_scale[:, None, None]
    scores = scores if bias is None else scores + bias
    scores = scores + torch.zeros(other.shape, dtype=scores.dtype).masked_fill(other, mask_value)[:, None]
    p = scores.softmax(-1)
    return join((p if keep is None else p * keep).to(v.dtype) @ v, positions, height, width)


def absolute(qkv, bias, logit_scale, do, window, shift, scale=None, keep=None):
    """out, dqkv, dbias and dlogit_scale with absolute values in every sum, from float64 tensors."""
    height, width = qkv.shape[1:3]
    positions, other = places(height, width, window, shift)
    q, k, v = split(qkv, positions).unbind(2)
    do = split(do, positions).abs()
    lengths = [x.norm(dim=-1, keepdim=True) if logit_scale is not None else None for x in (q, k)]
    if logit_scale is None:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
    else:
        q, k, factor = q / lengths[0], k / lengths[1], logit_scale[:, None, None]
    scores = q @ k.transpose(-1, -2) * factor
    products = q.abs() @ k.abs().transpose(-1, -2)
    sizes = products * abs(factor)
    if bias is not None:
        scores, sizes = scores + bias, sizes + bias.abs()
    scores = scores + -100.0 * other[:, None].double()
    sizes = sizes + 100.0 * other[:, None].double()
    p = scores.softmax(-1)
    keep = torch.ones_like(p) if keep is None else keep
    weights = p * (1 + sizes)
    dp = keep * (do @ v.abs().transpose(-1, -2))
    ds = weights * (dp + (p * dp).sum(-1, keepdim=True))
    dq, dk = ds @ k.abs() * abs(factor), ds.transpose(-1, -2) @ q.abs() * abs(factor)
    dv = (weights * keep).transpose(-1, -2) @ do
    if logit_scale is not None:
        dq, dk = (
            (grad + x.abs() * (grad * x.abs()).sum(-1, keepdim=True)) / length
            for grad, x, length in zip((dq, dk), (q, k), lengths, strict=True)
        )
    dqkv = join(torch.stack((dq, dk, dv), 2), positions, height, width)
    results = [join((weights * keep) @ v.abs(), positions, height, width), dqkv]
    results += [] if bias is None else [ds.sum((0, 1))]
    return [*results, *([] if logit_scale is None else [(ds * products).sum((0, 1, 3, 4))])]


def check(qkv, bias, logit_scale, do, window, shift, keep=None, seed=None, **options):
    scale = options.get("scale")
    names = ["out", "dqkv", *["dbias"] * (bias is not None), *["dlogit_scale"] * (logit_scale is not None)]
    inputs = [qkv, bias, logit_scale]

    def ours(qkv, bias, logit_scale):
        if seed is not None:
            torch.manual_seed(seed)
        return F.window_attention(
            qkv, bias, window=window, shift=shift, logit_scale=logit_scale, backend="triton", **options
        )

    def peer(*inputs):
        return formula(*inputs, window, shift, scale=scale, keep=None if keep is None else keep.to(qkv.dtype))

    peers = [run(peer, inputs, [do])]
    if keep is None:
        twin = functools.partial(reference.window_attention, window=window, shift=shift, scale=scale)
        peers.append(run(lambda x, b, s: twin(x, b, logit_scale=s), inputs, [do]))
    exact = run(lambda *x: formula(*x, window, shift, scale=scale, keep=keep), double(inputs), double([do]))
    sizes = absolute(*double(inputs), do.double(), window, shift, scale, keep)
    results = run(ours, inputs, [do])
    assert_as_precise(results, peers, exact, sizes, names)
    assert results[0].is_contiguous()
    return results


def make(batch, height, width, heads, head_dim, window, dtype=torch.float32, cosine=False):
    """qkv, bias, logit_scale, do"""
    tokens = window[0] * window[1]
    qkv = torch.randn(batch, height, width, 3, heads, head_dim).to(dtype)
    bias = torch.randn(heads, tokens, tokens).to(dtype)
    logit_scale = torch.linspace(2.0, 20.0, heads).to(dtype) if cosine else None
    return qkv, bias, logit_scale, torch.randn(batch, height, width, heads, head_dim).to(dtype)


CASES = {  # batch, height, width, heads, head size, window, shift, cosine
    "swin": (2, 14, 21, 3, 32, (7, 7), (3, 3), False),
    "swin v2": (1, 16, 16, 2, 32, (8, 8), (4, 4), True),
    "not shifted": (3, 7, 14, 2, 32, (7, 7), (0, 0), False),
    "rows only, width of a window": (1, 8, 6, 2, 16, (4, 6), (3, 0), False),
    "columns only, height of a window": (2, 2, 12, 1, 24, (2, 4), (0, 1), True),
}
LARGE = {
    "144 tokens": (1, 12, 24, 2, 32, (12, 12), (6, 6), False),
    "256 tokens, cosine": (1, 16, 32, 1, 32, (16, 16), (8, 0), True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, dtype):
    *shape, window, shift, cosine = CASES[name]
    check(*make(*shape, window, dtype, cosine), window, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_windows_of_several_blocks(name, dtype):
    *shape, window, shift, cosine = LARGE[name]
    check(*make(*shape, window, dtype, cosine), window, shift)


def test_groups_of_windows_add_their_gradients_of_the_bias(monkeypatch):
    """Three windows per program; the last group has one."""
    import dataclasses

    from vit_triton.kernels.attention import windows, windows_backward

    for module, name in ((windows, "pick_window_fwd"), (windows_backward, "pick_window_bwd")):
        pick = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, pick=pick: dataclasses.replace(pick(*args), group=3))
    *shape, window, shift, cosine = CASES["swin"]
    qkv, bias, _, do = make(*shape[:1], 14, 35, *shape[3:], window)
    check(qkv, bias, None, do, window, shift)


@pytest.mark.parametrize("layout", ["strided", "heads first", "expanded gradient"])
def test_strides(layout):
    qkv, bias, logit_scale, do = make(2, 14, 7, 2, 32, (7, 7))
    if layout == "strided":
        qkv = torch.randn(2, 14, 7, 3, 2, 64)[..., ::2]
        bias = torch.randn(49, 49, 2).permute(2, 0, 1)
    elif layout == "heads first":
        qkv = torch.randn(3, 2, 2, 14, 7, 32).permute(2, 3, 4, 0, 1, 5)
        do = torch.randn(2, 2, 14, 7, 32).permute(0, 2, 3, 1, 4)
    else:
        do = torch.randn(()).expand_as(do)
    check(qkv, bias, logit_scale, do, (7, 7), (3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_bias(dtype):
    qkv, _, _, do = make(1, 14, 14, 2, 32, (7, 7), dtype)
    check(qkv, None, None, do, (7, 7), (3, 3), scale=-0.3)


def test_bias_and_logit_scale_in_float32():
    qkv, _, _, do = make(1, 16, 16, 2, 32, (8, 8), torch.bfloat16)
    _, bias, logit_scale, _ = make(1, 16, 16, 2, 32, (8, 8), cosine=True)
    *_, dbias, dlogit_scale = check(qkv, bias, logit_scale, do, (8, 8), (4, 4))
    assert dbias.dtype == dlogit_scale.dtype == torch.float32


def test_zero_vectors_in_cosine_attention():
    """Padded tokens without a bias have q = k = 0; float16 cannot represent 1 / 1e-12."""
    qkv, bias, logit_scale, do = make(1, 16, 16, 2, 32, (8, 8), torch.float16, cosine=True)
    qkv[:, 12:, :, :2] = 0
    results = run(
        lambda *x: F.window_attention(*x[:2], window=(8, 8), logit_scale=x[2], backend="triton"),
        [qkv, bias, logit_scale],
        [do],
    )
    exact = run(lambda *x: formula(*x, (8, 8), (0, 0)), double([qkv, bias, logit_scale]), double([do]))
    assert all(x.isfinite().all() for i, x in enumerate(results) if i != 1)
    rows = results[1][:, :12], exact[1][:, :12]  # the gradient of a zero vector is beyond float16
    assert rows[0].isfinite().all()
    assert_same(rows[0], rows[1].half(), 64)


@pytest.mark.parametrize("mask_value", [-100.0, -200.0, -math.inf])
def test_mask_value_at_a_logit_scale_of_100(mask_value):
    """Keys from the other region have the scores 100, keys of the own region -100: the other region outweighs the own
    one with a mask value of -100, equals it with -200, and does not take part with -inf."""
    window, shift, height = (4, 4), (2, 0), 8
    qkv = torch.randn(1, height, 4, 3, 1, 16)
    direction = torch_F.normalize(torch.randn(16), dim=0)
    wrapped = torch.zeros(1, height, 4, 1)
    wrapped[:, : shift[0]] = 1
    qkv[..., 0, 0, :] = direction * (1 - 2 * wrapped)
    qkv[..., 1, 0, :] = -direction * (1 - 2 * wrapped)
    scale = torch.tensor([100.0])
    out = F.window_attention(
        qkv, None, window=window, shift=shift, mask_value=mask_value, logit_scale=scale, backend="triton"
    )
    exact = formula(*double([qkv, None, scale]), window, shift, mask_value)
    assert_same(out, exact.float(), 1000)
    values = qkv[0, :, :, 2, 0]
    own, others = values[:2].mean((0, 1)), values[6:].mean((0, 1))
    expected = {-100.0: others, -200.0: (own + others) / 2, -math.inf: own}[mask_value]
    torch.testing.assert_close(out[0, 0, 0, 0], expected, rtol=1e-4, atol=1e-4)


def test_mask_value_of_a_shifted_window_with_bias():
    qkv, bias, _, _ = make(1, 8, 8, 2, 16, (4, 4))
    results = [
        F.window_attention(qkv, bias, window=(4, 4), shift=(2, 1), mask_value=value, backend="triton")
        for value in (-100.0, -1.0)
    ]
    assert_same(results[1], formula(*double([qkv, bias, None]), (4, 4), (2, 1), -1.0).float(), 64)
    assert not torch.allclose(*results, atol=1e-3)


# --- dropout -----------------------------------------------------------------------------------------------


def dropped(p, seed):
    """The dropout mask (B, windows, heads, N, N) for a map of 14 x 14 tokens, two images and two heads."""
    positions, _ = places(14, 14, (7, 7), (3, 3))
    qkv = torch.zeros(2, 14, 14, 3, 2, 64)
    window_values = torch.eye(49, 64).expand(2, 4, 2, 49, 64)
    qkv[..., 2, :, :] = join(window_values, positions, 14, 14)
    torch.manual_seed(seed)
    out = F.window_attention(qkv, None, window=(7, 7), shift=(3, 3), mask_value=0.0, dropout_p=p, backend="triton")
    return split(out, positions)[..., :49] * 49


def test_dropout_mask_is_the_same_in_forward_and_backward():
    keep = torch.where(dropped(0.3, 7) > 0.5, 1 / 0.7, 0.0).double()
    share = (keep > 0).double().mean()
    assert abs(share - 0.7) < 5 * math.sqrt(0.7 * 0.3 / keep.numel())
    rows = (keep > 0).flatten(0, 3)
    assert len(rows.unique(dim=0)) == len(rows)  # windows, heads and rows are independent
    qkv, bias, _, do = make(2, 14, 14, 2, 32, (7, 7))
    check(qkv, bias, None, do, (7, 7), (3, 3), keep=keep, seed=7, dropout_p=0.3)


def test_dropout_probability_one():
    qkv, bias, _, do = make(1, 14, 14, 2, 32, (7, 7))
    results = run(
        lambda *x: F.window_attention(*x, window=(7, 7), shift=(3, 3), dropout_p=1.0, backend="triton"),
        [qkv, bias],
        [do],
    )
    assert all(not x.any() for x in results)


# --- bits, batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin", "swin v2"])
def test_bitwise_reproducible_and_independent_of_the_batch(name):
    *shape, window, shift, cosine = CASES[name]
    qkv, bias, logit_scale, do = make(3, *shape[1:], window, torch.bfloat16, cosine)

    def results(images):
        return run(
            lambda x, b, s: F.window_attention(x, b, window=window, shift=shift, logit_scale=s, backend="triton"),
            [qkv[images].clone(), bias, logit_scale],
            [do[images].clone()],
        )

    first, again, one = results(slice(None)), results(slice(None)), results(slice(1, 2))
    assert all(map(torch.equal, first, again))
    assert torch.equal(first[0][1:2], one[0]) and torch.equal(first[1][1:2], one[1])


@pytest.mark.parametrize("shift", [(0, 0), (3, 3)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_batch(backend, shift):
    qkv, bias, logit_scale, do = make(0, 14, 14, 2, 32, (7, 7), cosine=True)
    out, dqkv, dbias, dlogit_scale = run(
        lambda x, b, s: F.window_attention(x, b, window=(7, 7), shift=shift, logit_scale=s, backend=backend),
        [qkv, bias, logit_scale],
        [do],
    )
    assert out.shape == do.shape and dqkv.shape == qkv.shape
    assert dbias.shape == bias.shape and not dbias.any() and not dlogit_scale.any()


def test_saved_tensors_are_the_arguments():
    qkv, bias, logit_scale, _ = (
        x if x is None else x.requires_grad_() for x in make(1, 8, 8, 2, 16, (4, 4), cosine=True)
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        F.window_attention(qkv, bias, window=(4, 4), logit_scale=logit_scale, backend="triton")
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in (qkv, bias, logit_scale)]


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_required_gradients_are_computed(wanted):
    tensors = make(1, 8, 8, 2, 16, (4, 4), cosine=True)[:3]
    grads = []
    for backend in ("triton", "torch"):
        leaves = [x.clone().requires_grad_(bool(wanted & 1 << i)) for i, x in enumerate(tensors)]
        out = F.window_attention(*leaves[:2], window=(4, 4), shift=(1, 2), logit_scale=leaves[2], backend=backend)
        out.square().sum().backward()
        grads.append([x.grad for x in leaves])
    for i, (ours, theirs) in enumerate(zip(*grads, strict=True)):
        assert (ours is not None) == bool(wanted & 1 << i)
        if ours is not None:
            assert_same(ours, theirs, 64)


# --- the relative position bias ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "prefix_tokens", "dtype"),
    [
        ((7, 7), 0, torch.float32),
        ((7, 7), 0, torch.bfloat16),
        ((2, 5), 0, torch.float16),
        ((1, 3), 0, torch.float32),
        ((14, 14), 1, torch.bfloat16),
        ((3, 4), 1, torch.float32),
    ],
)
def test_relative_position_bias(window, prefix_tokens, dtype):
    from timm.layers import gen_relative_position_index

    index = gen_relative_position_index(window, class_token=bool(prefix_tokens))
    table = torch.randn(int(index.max()) + 1, 3).to(dtype)
    tokens = window[0] * window[1] + prefix_tokens
    dbias = torch.randn(3, tokens, tokens).to(dtype)

    def gather(table):
        return table[index.flatten()].view(tokens, tokens, 3).permute(2, 0, 1)

    ours = run(lambda t: F.relative_position_bias(t, window, prefix_tokens=prefix_tokens, backend="triton"),
               [table], [dbias])  # fmt: skip
    exact = run(gather, double([table]), double([dbias]))
    size = run(gather, double([table.abs()]), double([dbias.abs()]))
    assert torch.equal(ours[0].double(), exact[0])
    assert_as_precise(ours, [run(gather, [table], [dbias])], exact, size, ("bias", "dtable"))
    again = run(lambda t: F.relative_position_bias(t, window, prefix_tokens=prefix_tokens, backend="triton"),
                [table], [dbias])  # fmt: skip
    assert torch.equal(ours[1], again[1])
    torch.testing.assert_close(
        F.relative_position_bias(table, window, prefix_tokens=prefix_tokens, backend="torch"), ours[0]
    )


def test_relative_position_bias_with_strides():
    table, dbias = torch.randn(4, 169).T, torch.randn(()).expand(4, 49, 49)
    results = [
        run(lambda t, b=backend: F.relative_position_bias(t, (7, 7), backend=b), [table], [dbias])
        for backend in ("triton", "torch")
    ]
    assert_same(*results, terms=49)


# --- other libraries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [(0, 0), (3, 3), (3, 0)])
def test_torchvision_swin(shift):
    from torchvision.models import swin_transformer as theirs

    torch.manual_seed(1)
    module = theirs.ShiftedWindowAttention(96, [7, 7], list(shift), 3)
    with torch.no_grad():
        module.relative_position_bias_table.normal_()
        module.qkv.bias.normal_()
    x = torch.randn(1, 14, 14, 96)
    qkv = torch_F.linear(x, module.qkv.weight, module.qkv.bias).unflatten(-1, (3, 3, 32))
    table = module.relative_position_bias_table
    results = []
    for ours in (True, False):
        table.grad = None
        if ours:
            bias = F.relative_position_bias(table, (7, 7), backend="triton")
            out = F.window_attention(qkv, bias, window=(7, 7), shift=shift, backend="triton")
            y = module.proj(out.flatten(-2))
        else:
            y = module(x)
        y.square().sum().backward(retain_graph=True)
        results.append((y, table.grad))
    assert_same(*results, terms=96)


@pytest.mark.parametrize("shift", [0, 3])
def test_torchvision_swin_v2(shift):
    from torchvision.models import swin_transformer as theirs

    torch.manual_seed(1)
    module = theirs.ShiftedWindowAttentionV2(96, [8, 8], [shift, shift], 3)
    with torch.no_grad():
        module.logit_scale.copy_(torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1))  # the last is clamped
        module.qkv.bias.normal_()
    x = torch.randn(1, 16, 16, 96)
    bias = module.qkv.bias.detach().clone()
    bias[96:192] = 0
    results = []
    for ours in (True, False):
        module.zero_grad()
        if ours:
            qkv = torch_F.linear(x, module.qkv.weight, bias).unflatten(-1, (3, 3, 32))
            position_bias = module.get_relative_position_bias()[0]
            factor = module.logit_scale.clamp(max=math.log(100.0)).exp().flatten()
            out = F.window_attention(
                qkv, position_bias, window=(8, 8), shift=(shift, shift), logit_scale=factor, backend="triton"
            )
            y = module.proj(out.flatten(-2))
        else:
            y = module(x)
        y.square().sum().backward()
        results.append((y, module.logit_scale.grad, module.cpb_mlp[0].weight.grad, module.qkv.weight.grad))
    assert_same(*results, terms=512)


@pytest.mark.parametrize("shift", [0, 3])
def test_timm_swin(shift):
    from timm.models.swin_transformer import SwinTransformerBlock

    torch.manual_seed(1)
    block = SwinTransformerBlock(96, (14, 14), 3, window_size=7, shift_size=shift)
    attention = block.attn
    with torch.no_grad():
        attention.relative_position_bias_table.normal_()
    x = torch.randn(2, 14, 14, 96)
    qkv = attention.qkv(x).unflatten(-1, (3, 3, 32))
    bias = F.relative_position_bias(attention.relative_position_bias_table, (7, 7), backend="triton")
    out = F.window_attention(qkv, bias, window=(7, 7), shift=(shift, shift), backend="triton")
    assert_same(attention.proj(out.flatten(-2)), block._attn(x), terms=96)


# --- arguments ---------------------------------------------------------------------------------------------


def _call(**changes):
    qkv, bias, *_ = make(1, 8, 8, 2, 16, (4, 4))
    arguments = {"qkv": qkv, "bias": bias, "window": (4, 4), **changes}
    return F.window_attention(arguments.pop("qkv"), arguments.pop("bias"), **arguments, backend="triton")


NOT_SIX = r"qkv must be \(B, H, W, 3, heads, D\), got "
NOT_DIVISIBLE = "qkv must have H and W divisible by the window 4 x 4, got "
BAD_SHIFT = "shift must be at least 0 and less than the window 4 x 4, got "
INVALID = [
    (dict(qkv=torch.randn(1, 8, 8, 96)), ValueError, NOT_SIX + r"shape \(1, 8, 8, 96\)"),
    (dict(qkv=torch.randn(1, 8, 8, 2, 2, 16)), ValueError, NOT_SIX + r"\(1, 8, 8, 2, 2, 16\)"),
    (dict(qkv=torch.randn(1, 8, 9, 3, 2, 16)), ValueError, NOT_DIVISIBLE + "8 x 9"),
    (dict(qkv=torch.randn(1, 0, 8, 3, 2, 16)), ValueError, NOT_DIVISIBLE + "0 x 8"),
    (dict(qkv=None), TypeError, "qkv must be a torch.Tensor, got NoneType"),
    (dict(qkv=torch.randn(1, 8, 8, 3, 2, 16).double(), bias=None), TypeError, "qkv is torch.float64"),
    (dict(window=4), TypeError, "window must be two integers, got 4"),
    (dict(window=(4, 4, 4)), ValueError, r"window must be two integers, got \(4, 4, 4\)"),
    (dict(window=(0, 4)), ValueError, r"window must be positive, got \(0, 4\)"),
    (dict(qkv=torch.randn(1, 20, 20, 3, 2, 16), bias=None, window=(20, 20)), ValueError, "at most 256 tokens"),
    (dict(shift=(4, 0)), ValueError, BAD_SHIFT + r"\(4, 0\)"),
    (dict(shift=(0, -1)), ValueError, BAD_SHIFT + r"\(0, -1\)"),
    (dict(shift=2), TypeError, "shift must be two integers, got 2"),
    (dict(bias=torch.randn(2, 16, 15)), ValueError, r"bias must be \(heads, N, N\) = \(2, 16, 16\), got \(2, 16, 15\)"),
    (
        dict(bias=torch.randn(2, 16, 16).half()),
        TypeError,
        "bias must be torch.float32, as qkv, got torch.f",
    ),
    (dict(logit_scale=torch.randn(2, 1, 1)), ValueError, r"logit_scale must be \(heads,\) = \(2,\), got \(2, 1, 1\)"),
    (dict(logit_scale=torch.randn(2), scale=1.0), ValueError, "scale must be None with logit_scale, which replaces it"),
    (dict(mask_value="low"), TypeError, "mask_value must be a number, got 'low'"),
    (dict(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
]


@pytest.mark.parametrize(("changes", "error", "message"), INVALID)
def test_invalid_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(48, 2), (4, 4)), ValueError, "table must have 49 rows for a window of 4 x 4 and 0 prefix tokens"),
        ((torch.randn(49), (4, 4)), ValueError, r"table must be \(offsets, heads\), got shape \(49,\)"),
        ((torch.randn(49, 2), (4, 4), 2), ValueError, "prefix_tokens must be 0 or 1, got 2"),
        ((torch.randn(49, 2), 4), TypeError, "window must be two integers, got 4"),
    ],
)
def test_invalid_tables(arguments, error, message):
    with pytest.raises(error, match=message):
        F.relative_position_bias(*arguments[:2], prefix_tokens=(arguments[2:] or (0,))[0], backend="triton")


def test_large_windows_use_pytorch_by_default():
    qkv = torch.randn(1, 20, 20, 3, 1, 16)
    out = F.window_attention(qkv, None, window=(20, 20), backend="auto")
    assert_same(out, formula(qkv, None, None, (20, 20), (0, 0)), 64)
