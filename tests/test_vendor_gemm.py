"""linear and mlp with the vendor's GEMM: the same error bounds, gradients and dropout masks as with our kernels."""

import dataclasses
import itertools

import pytest
import test_linear
import test_mlp
import test_patch_embed
import torch
from conftest import forget_recordings
from precision import DTYPES, assert_same

from vit_triton import functional
from vit_triton import functional as F
from vit_triton.arguments import Dropout
from vit_triton.cpu.driver import use_cpu_driver
from vit_triton.kernels.linear import backward as linear_backward
from vit_triton.kernels.linear import config, expected
from vit_triton.kernels.linear import forward as linear_forward
from vit_triton.kernels.linear.config import Epilogue, GemmConfig, VendorGemm
from vit_triton.kernels.linear.expected import Expected
from vit_triton.kernels.picker import PICKERS
from vit_triton.kernels.target import Target, target_named

pytestmark = pytest.mark.compiled


@pytest.fixture
def vendor(monkeypatch, request):
    """Return a function that switches every GEMM to the vendor's library."""

    def switch():
        forget_recordings()
        request.addfinalizer(forget_recordings)
        monkeypatch.setattr(linear_forward, "pick_linear_fwd", lambda *args: VendorGemm())
        for name in ("pick_linear_bwd_input", "pick_linear_bwd_weight"):
            monkeypatch.setattr(linear_backward, name, lambda *args: VendorGemm())

    return switch


LINEAR = [
    (dict(leading=(2, 37), k=72, n=50, layout="contiguous"), "dense"),
    (dict(leading=(17,), k=40, n=136, bias=False, residual=False, layout="transposed"), "expanded"),
    (dict(leading=(1,), k=33, n=1, residual=False, layout="slice"), "dense"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "gradient"), LINEAR, ids=str)
def test_a_linear_layer(vendor, case, gradient, dtype):
    vendor()
    inputs = test_linear.make(dtype=dtype, **case)
    shape = (*case["leading"], case["n"])
    dy = torch.randn(()).to(dtype).expand(shape) if gradient == "expanded" else torch.randn(shape).to(dtype)
    test_linear.check(inputs, dy, norm=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [True, False])
def test_an_mlp_with_and_without_all_options(vendor, whole, dtype):
    vendor()
    inputs = test_mlp.make((3, 29), 40, 136, 50, dtype, bias=whole, residual=whole, norm=whole)
    test_mlp.check(inputs, torch.randn(3, 29, 50).to(dtype), "gelu" if whole else "quick_gelu", norm=whole)


def test_empty_batch(vendor):
    vendor()
    x, weight, bias, *_ = test_linear.make((0, 5), 40, 24, torch.float32)
    assert F.linear(x, weight, bias, backend="triton").shape == (0, 5, 24)


def forward(dtype):
    """Results of linear_fwd with several epilogues."""
    x, weight, bias, residual, *_ = test_linear.make((70,), 40, 150, dtype)
    dropout = Dropout(0.3, torch.tensor([7]))
    for tensors, options in [
        ((None, None), {}),
        ((None, None), dict(save_pre=True)),
        ((bias, None), dict(dropout=dropout, activation="gelu_tanh", save_pre=True)),
        ((bias, residual.float()), dict(dropout=dropout)),
    ]:
        yield from linear_forward.linear_fwd(x, weight, *tensors, **options)


def backward(dtype):
    x, weight, _, dy, *_ = test_linear.make((70,), 40, 150, dtype)
    dropout, pre = Dropout(0.3, torch.tensor([7])), torch.randn(40, 70).to(dtype).T
    for x, options in [
        (None, {}),
        (pre, dict(activation="gelu_tanh", dropout=dropout)),
    ]:
        yield from linear_backward.linear_bwd_input(dy, weight, x, with_hidden=x is not None, **options)
    for with_bias in (True, False):
        yield from linear_backward.linear_bwd_weight(dy, pre, weight, with_bias=with_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("launcher", [forward, backward])
def test_results_and_masks_match_the_kernels(vendor, launcher, dtype):
    with use_cpu_driver():
        torch.manual_seed(1)
        ours = list(launcher(dtype))
        vendor()
        torch.manual_seed(1)
        theirs = list(launcher(dtype))
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:
            assert a is b, i
            continue
        assert a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous(), i
        assert_same(a, b, dtype=dtype)  # two roundings instead of one, and another summation order


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_mask_is_bitwise_equal(vendor, dtype):
    ones, zeros = torch.ones(70, 50, dtype=dtype), torch.zeros(70, 50, dtype=dtype)
    dropout = Dropout(0.25, torch.tensor([3]))
    eye = torch.eye(50, dtype=dtype)

    def masks():
        with use_cpu_driver():
            y, _ = linear_forward.linear_fwd(zeros, eye, ones[0], dropout=dropout)
            return y, linear_backward.dropout_bwd(ones, dtype, dropout)

    ours = masks()
    vendor()
    for a, b in zip(ours, masks(), strict=True):
        assert torch.equal(a, b) and 0 < int((a == 0).sum()) < a.numel()
    assert torch.equal(*ours)  # forward and backward use the same mask


def test_vendor_gemm_is_called(vendor, monkeypatch):
    """The tests above also pass if the choice of GEMM is ignored; this one fails."""
    products = []
    mm, addmm = torch.mm, torch.addmm

    def add(a, b):
        products.append((tuple(a.shape), tuple(b.shape)))

    monkeypatch.setattr(torch, "mm", lambda a, b: add(a, b) or mm(a, b))
    monkeypatch.setattr(torch, "addmm", lambda bias, a, b: add(a, b) or addmm(bias, a, b))  # on GPUs
    vendor()
    inputs = test_mlp.make((5,), 40, 136, 50, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    test_mlp.call(F.mlp, backend="triton")(*leaves).sum().backward()
    products = list(dict.fromkeys(products))  # a first attempt to record an operator ends at its library GEMM
    m, n, h, k = 5, 50, 136, 40
    forward, backward = [((m, k), (k, h)), ((m, h), (h, n))], [((m, n), (n, h)), ((m, h), (h, k))]
    assert sorted(products) == sorted([*forward, *backward, ((n, m), (m, h)), ((h, m), (m, k))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "order", "pre", "post"),
    [("uint8", "p1 p2 c", True, True), ("crop", "c p1 p2", False, False), ("channels_last", "c p1 p2", True, False)],
)
def test_patch_embedding(monkeypatch, layout, order, pre, post, dtype):
    forget_recordings()
    monkeypatch.setattr(Target, "prefers_vendor_gemm", lambda self, dtype: True)
    inputs = test_patch_embed.make_inputs(2, 3, (3, 5), (4, 7), 50, dtype, layout=layout, prefix=1 + pre)
    values = dict(mean=test_patch_embed.MEAN, std=test_patch_embed.STD) if layout == "uint8" else {}
    test_patch_embed.check(inputs, pre=pre, post=post, patch_size=(4, 7), patch_order=order, **values)


def test_intel_cpus_use_the_vendor_gemm_in_float32():
    for features in (("avx2", "intel"), ("avx512f", "intel"), ("avx512f", "avx512_bf16"), ("avx2",)):
        target = dataclasses.replace(target_named("cpu"), features=features)
        for name, dtype in itertools.product(PICKERS, DTYPES):
            if VendorGemm in PICKERS[name].kinds:
                choice = getattr(config, name)(1576, 768, 768, dtype, target, "ieee", Epilogue.NONE)
                assert isinstance(choice, VendorGemm) == ("intel" in features and dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operator_with_the_fastest_products(monkeypatch, request, dtype):
    """With backend "auto" on a GPU; on other targets it has no effect."""
    request.addfinalizer(forget_recordings)
    monkeypatch.setattr(functional, "fastest_products", lambda backend, x: True)
    inputs = test_linear.make(leading=(2, 37), k=72, n=50, layout="contiguous", dtype=dtype)
    test_linear.check(inputs, torch.randn(2, 37, 50).to(dtype), norm=True)
    inputs = test_patch_embed.make_inputs(2, 3, (3, 5), (4, 7), 50, dtype, layout="crop", prefix=1)
    test_patch_embed.check(inputs, pre=True, post=False, patch_size=(4, 7), patch_order="c p1 p2")


def test_the_fastest_products_are_the_vendor_gemm_where_ours_is_not_ahead(monkeypatch):
    fastest = dataclasses.replace(target_named("sm_80"), fastest=True)
    arguments = 1576, 3072, 768, torch.bfloat16, fastest, "ieee", Epilogue.ELEMENTWISE
    for vendor, ours_is_ahead in ((10.9, False), (11.1, True)):
        monkeypatch.setattr(expected, "EXPECTED", {("sm_80", "forward", "elementwise"): Expected(10.0, vendor)})
        assert isinstance(config.pick_linear_fwd.__wrapped__(*arguments), VendorGemm) != ours_is_ahead
    float32 = *arguments[:3], torch.float32, *arguments[4:]
    assert isinstance(config.pick_linear_fwd.__wrapped__(*float32), VendorGemm)


def test_elsewhere_only_tuned_tables_choose_the_vendor_gemm():
    for name, picker in PICKERS.items():
        if VendorGemm not in picker.kinds:
            continue
        pick = getattr(config, name)
        for target in ("interpreter", "cpu", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"):
            for n, k in [(768, 768), (3072, 768), (16, 1000)]:
                for dtype, epilogue in itertools.product(DTYPES, Epilogue):
                    arguments = (1576, n, k, dtype, target_named(target), "ieee", epilogue)
                    assert type(pick(*arguments)) is GemmConfig
                    assert any(isinstance(each, VendorGemm) for each in picker.candidates(arguments))
