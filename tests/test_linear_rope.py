"""linear with rope: projections to q, k and v whose q and k are rotated, against float64."""

import pytest
import torch
from conftest import EMULATOR, forget_recordings
from hypothesis import example, given
from hypothesis import strategies as st
from precision import DTYPES, assert_as_precise, assert_same, double, run
from test_linear import EPS, absolute
from test_linear import make as make_linear
from test_rotary import LAYOUTS, rotated, tables

from vit_triton import functional as F
from vit_triton import reference
from vit_triton.kernels.linear import forward
from vit_triton.kernels.linear.config import VendorGemm

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("own_gemm")]


def options(rope, heads, prefix, layout):
    return dict(rope=rope, rope_heads=heads, rope_prefix=prefix, rope_layout=layout)


def make(batch, n, k, heads, head_dim, dtype, *, bias=True, norm=False):
    """x, weight, bias and the parameters of a norm."""
    x, weight, b, _, *affine = make_linear((batch, n), k, 3 * heads * head_dim, dtype, bias=bias, residual=False)
    return [x, weight, b, *(affine if norm else (None, None))]


def call(function, norm, **options):
    def inner(x, weight, bias, norm_weight, norm_bias):
        return function(x, weight, bias, norm=(norm_weight, norm_bias, EPS) if norm else None, **options)

    return inner


def rotate_by_formula(y, heads, rope, prefix, layout, *flags):
    q, k, v = y.unflatten(-1, (3, heads, -1)).unbind(2)
    q, k = (rotated(x, *rope, prefix, layout, *flags) for x in (q, k))
    return torch.stack((q, k, v), 2).flatten(2)


def check(inputs, dy, heads, rope, prefix, layout):
    norm = inputs[3] is not None
    positions = heads, rope, prefix, layout
    given = options(rope, heads, prefix, layout)
    ours = run(call(F.linear, norm, **given, backend="triton"), inputs, [dy])
    peer = run(call(reference.linear, norm, **given), inputs, [dy])
    plain = call(reference.linear, norm)
    exact = run(lambda *x: rotate_by_formula(plain(*x), *positions), double(inputs), double([dy]))
    dz = rotate_by_formula(dy.double().abs(), *positions, True, True)
    y, *sizes = absolute([*inputs[:3], None, *inputs[3:]], dz, norm=norm)
    names = ["y", "x", "weight", *(["bias"] if inputs[2] is not None else []), "norm weight", "norm bias"][: len(ours)]
    assert_as_precise(ours, [peer], exact, [rotate_by_formula(y, *positions, True), *sizes], names)
    with torch.no_grad():
        assert torch.equal(call(F.linear, norm, **given, backend="triton")(*inputs), ours[0])


@example((2, 197, 1), 33, 64, "channels", "half", 0, "plain", False, "expanded", False, True, torch.float32)
@given(
    shape=st.sampled_from([(1, 6, 1), (2, 9, 3), (2, 197, 1)]),
    k=st.sampled_from([33, 40]),
    head_dim=st.sampled_from([64, 72, 80]),
    columns=st.sampled_from(["channels", "pairs", "part"]),
    layout=st.sampled_from(LAYOUTS),
    prefix=st.sampled_from([0, 1, 5]),
    kind=st.sampled_from(["plain", "shared", "sample", "head", "both"]),
    own_dtype=st.booleans(),
    gradient=st.sampled_from(["dense", "expanded", "transposed"]),
    norm=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_outputs_and_gradients(
    shape, k, head_dim, columns, layout, prefix, kind, own_dtype, gradient, norm, bias, dtype
):
    batch, n, heads = shape
    columns = {"channels": head_dim, "pairs": head_dim // 2, "part": head_dim // 2 - 2}[columns]
    rope = tables(kind, batch, heads, n - prefix, columns, dtype if own_dtype else torch.float32)
    inputs = make(batch, n, k, heads, head_dim, dtype, bias=bias, norm=norm)
    dy = torch.randn(batch, n, 3 * heads * head_dim).to(dtype)
    if gradient == "expanded":
        dy = torch.randn(()).to(dtype).expand_as(dy)
    elif gradient == "transposed":
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs, dy, heads, rope, prefix, layout)


@pytest.fixture
def only_in_epilogue(monkeypatch):
    """Fail if a GPU's code rotates in a separate kernel."""
    if EMULATOR:
        monkeypatch.setattr(forward, "rotate_packed", lambda *_: pytest.fail("a separate kernel"))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kind", ["plain", "sample"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_in_the_epilogue(dtype, layout, kind, prefix, only_in_epilogue):
    """Several tiles of rows, of which one holds rows of two samples, and of columns."""
    if dtype != torch.bfloat16 and prefix != 5:
        pytest.skip("fewer combinations")
    batch, n, heads, head_dim = 2, 71, 4, 32
    columns = head_dim if dtype == torch.float16 and layout == "half" else head_dim // 2
    rope = tables(kind, batch, heads, n - prefix, columns, dtype if dtype == torch.float16 else torch.float32)
    dy = torch.randn(batch, n, 3 * heads * head_dim).to(dtype)
    check(make(batch, n, 40, heads, head_dim, dtype, norm=prefix == 5), dy, heads, rope, prefix, layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("layout", "channel", "other"), [("half", 0, 8), ("half", 8, 0), ("interleaved", 0, 1), ("interleaved", 1, 0)]
)
def test_values_that_are_not_finite_stay_in_their_pair(layout, channel, other, value, only_in_epilogue):
    x, weight, bias, *_ = make(2, 4, 16, 2, 16, torch.float32)
    bias[channel] = value  # q, first head
    rope = tables("shared", 2, 2, 3, 8)
    y = F.linear(x, weight, bias, **options(rope, 2, 1, layout), backend="triton").isfinite()
    finite = torch.ones_like(y)
    finite[:, :, channel] = False
    finite[:, 1:, other] = False  # not in prefix tokens
    assert torch.equal(y, finite)


@pytest.mark.parametrize("batch", [1, 2])
def test_several_tiles(small_tiles, batch):
    rope = tables("sample", batch, 2, 33, 8)
    inputs, dy = make(batch, 34, 40, 2, 16, torch.bfloat16, norm=True), torch.randn(batch, 34, 96).bfloat16()
    check(inputs, dy, 2, rope, 1, "interleaved")


def test_vendor_gemm(monkeypatch, request):
    """The second kernel rotates the result of the vendor's GEMM."""
    forget_recordings()
    request.addfinalizer(forget_recordings)
    monkeypatch.setattr(forward, "pick_linear_fwd", lambda *args: VendorGemm())
    rope = tables("shared", 2, 2, 8, 8)
    check(make(2, 9, 16, 2, 16, torch.float32, norm=True), torch.randn(2, 9, 96), 2, rope, 1, "half")


@pytest.mark.parametrize("shape", [(0, 7), (2, 0), (2, 3)])
def test_no_rotated_tokens(shape):
    batch, n = shape
    x, weight, bias, *_ = make(batch, n, 16, 2, 16, torch.float32)
    rope = tables("shared", batch, 2, max(n - 3, 0), 8)
    ours = F.linear(x, weight, bias, **options(rope, 2, min(n, 3), "half"), backend="triton")
    assert torch.equal(ours[:, :3], F.linear(x, weight, bias, backend="triton")[:, :3])


def test_backends_and_strided_inputs():
    x, weight, bias, *_ = make(2, 9, 16, 2, 16, torch.float32)
    wide = torch.stack(tables("plain", 2, 2, 8, 8), -1)
    given = options(wide.unbind(-1), 2, 1, "interleaved")
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    results = [F.linear(x, weight, bias, **given, backend=backend) for backend in ("triton", "torch", "auto")]
    exact = rotate_by_formula(
        torch.nn.functional.linear(x, weight, bias), 2, *list(given.values())[:1], 1, "interleaved"
    )
    for result in results:
        assert_same(result, exact, 16)


def test_the_result_is_the_input_of_attention_packed():
    x, weight, bias, *_ = make(2, 9, 16, 2, 16, torch.float32)
    rope = tables("sample", 2, 2, 4, 16)
    qkv = F.linear(x, weight, bias, backend="triton").unflatten(-1, (3, 2, 16))
    fused = F.linear(x, weight, bias, **options(rope, 2, 5, "half"), backend="triton").unflatten(-1, (3, 2, 16))
    rotating = F.attention_packed(qkv, rope=rope, rope_prefix=5, backend="triton")
    assert_same(F.attention_packed(fused, backend="triton"), rotating, 16)


def test_bitwise_reproducible_and_independent_of_the_batch():
    inputs = make(3, 37, 40, 2, 32, torch.bfloat16)
    rope = tables("shared", 3, 2, 36, 16)
    linear = call(F.linear, False, **options(rope, 2, 1, "half"), backend="triton")
    first, second = linear(*inputs), linear(*(x if x is None else x.clone() for x in inputs))
    assert torch.equal(first, second)
    assert torch.equal(linear(inputs[0][1:2], *inputs[1:]), first[1:2])


def test_saved_tensors():
    x, weight, bias, *_ = (t.requires_grad_() for t in make(2, 6, 16, 2, 16, torch.float32)[:3])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        F.linear(x, weight, bias, **options(tables("shared", 2, 2, 5, 8), 2, 1, "half"), backend="triton")
    assert sorted(tuple(t.shape) for t in saved) == [(1, 1, 5, 8)] * 2 + [(2, 6, 16), (96, 16)]


def test_gradients_of_tables_require_torch():
    inputs, rope = make(1, 4, 16, 2, 16, torch.float32)[:2], tables("shared", 1, 2, 4, 16)
    rope[0].requires_grad_()
    given = options(rope, 2, 0, "half")
    with pytest.raises(NotImplementedError, match=r'rope.*backend="torch"'):
        F.linear(*inputs, **given, backend="triton")
    with torch.no_grad():
        F.linear(*inputs, **given, backend="triton")
    for backend in ("torch", "auto"):
        F.linear(*inputs, **given, backend=backend).sum().backward()
        assert rope[0].grad.any()
        rope[0].grad = None


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(residual=torch.zeros(2, 5, 96)), ValueError, "residual and rope cannot be combined"),
        (dict(layer_scale=torch.zeros(96)), ValueError, "layer_scale and rope cannot be combined"),
        (dict(drop_path_p=0.5), ValueError, "drop_path_p and rope cannot be combined"),
        (dict(dropout_p=0.5), ValueError, "dropout_p and rope cannot be combined"),
        (dict(rope_heads=None), ValueError, "rope requires rope_heads"),
        (dict(rope_heads=0), ValueError, "rope_heads must be at least 1, got 0"),
        (dict(rope_heads=2.0), TypeError, "rope_heads must be an integer"),
        (dict(rope_heads=5), ValueError, r"3 \* rope_heads \* D rows with rope_heads=5, got \(96, 16\)"),
        (dict(x=torch.zeros(5, 16)), ValueError, r"x must be \(B, N, K\) with rope, got \(5, 16\)"),
        (dict(rope_layout="quarter"), ValueError, "rope_layout must be"),
        (dict(rope_prefix=6), ValueError, "rope_prefix must be at most the number of tokens, 5, got 6"),
        (dict(rope=torch.zeros(2)), TypeError, r"rope must be a tuple \(cos, sin\)"),
        (dict(rope_prefix=1), ValueError, r"cos of rope must be \(2 or 1, 2 or 1, 4, columns\)"),
    ],
)  # fmt: skip
def test_errors(changes, error, message, backend):
    given = dict(x=torch.zeros(2, 5, 16), weight=torch.zeros(96, 16), rope=tables("plain", 2, 2, 5, 16), rope_heads=2)
    with pytest.raises(error, match=message):
        F.linear(**(given | changes), backend=backend)
