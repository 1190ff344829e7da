"""Invalid input raises an error with the argument, the expected and the actual value, before any kernel runs."""

import numpy as np
import pytest
import torch
from conftest import launcher_modules

import vit_triton
from vit_triton import functional as F

R = torch.randn
NAN = float("nan")


def attention(q=(1, 4, 2, 16), k=(1, 5, 2, 16), v=None, **options):
    q, k = (R(x) if isinstance(x, tuple) else x for x in (q, k))
    v = k if v is None else R(v) if isinstance(v, tuple) else v
    return F.attention(q, k, v, backend="triton", **options)


def packed(qkv, **options):
    return F.attention_packed(R(qkv) if isinstance(qkv, tuple) else qkv, backend="triton", **options)


def rope(*rows):
    return R(*rows, 16), R(*rows, 16)


def rotary(rope, **options):
    return packed((1, 4, 3, 2, 16), rope=rope, **options)


def linear(x=(5, 8), weight=(4, 8), bias=None, **options):
    x, weight, bias = (R(a) if isinstance(a, tuple) else a for a in (x, weight, bias))
    return F.linear(x, weight, bias, backend="triton", **options)


def mlp(x=(5, 8), w1=(12, 8), b1=None, w2=(8, 12), b2=None, **options):
    tensors = (R(a) if isinstance(a, tuple) else a for a in (x, w1, b1, w2, b2))
    return F.mlp(*tensors, backend="triton", **options)


def encoder(x=(1, 5, 8), heads=2, **parts):
    shapes = dict(qkv_weight=(24, 8), out_weight=(8, 8), w1=(12, 8), w2=(8, 12)) | parts
    tensors = {name: R(a) if isinstance(a, tuple) else a for name, a in shapes.items()}
    rest = {name: (None, None, 1e-5) if "norm" in name else None for name in F.Block._fields if name not in tensors}
    return F.encoder(R(x), [F.Block(**(rest | tensors))], heads=heads, backend="triton")


def norm(x=(5, 8), weight=None, bias=None, **options):
    tensors = (R(a) if isinstance(a, tuple) else a for a in (x, weight, bias))
    return F.layer_norm(*tensors, backend="triton", **options)


def embed(image=(1, 3, 8, 8), weight=(16, 48), patch_size=4, **options):
    image, weight = (R(a) if isinstance(a, tuple) else a for a in (image, weight))
    return F.patch_embed(image, weight, patch_size=patch_size, backend="triton", **options)


def vit(**options):
    sizes = dict(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=24, backend="triton")
    return vit_triton.ViT(**(sizes | options))


class Idle(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = vit_triton.modules.Attention(8, 2, 4)

    def forward(self, image):
        return image


BYTES = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
STATS = dict(mean=[0.5] * 3, std=[0.5] * 3)
META = torch.empty(5, 8, device="meta")

CASES = {
    # attention
    "q is numpy": (lambda: attention(np.zeros((1, 4, 2, 16))), TypeError, ["q", "torch.Tensor", "numpy.ndarray"]),
    "q without a batch": (lambda: attention((4, 2, 16)), ValueError, ["q", "(B, N, H, D)", "(4, 2, 16)"]),
    "q is complex": (lambda: attention(R(1, 4, 2, 16).cfloat()), TypeError, ["q", "float32", "complex64"]),
    "q is integer": (lambda: attention(torch.zeros(1, 4, 2, 16).int()), TypeError, ["q", "float32", "int32"]),
    "q is float64": (
        lambda: F.attention(*[R(1, 4, 2, 16).double()] * 3, backend="triton"), TypeError, ["q", "float64", "torch"]),
    "q and k in two dtypes": (
        lambda: attention(k=R(1, 5, 2, 16).half()), TypeError, ["q and k", "float32", "float16"]),
    "q and k of two head sizes": (lambda: attention(k=(1, 5, 2, 8)), ValueError, ["q and k", "head size", "2, 8)"]),
    "k and v of two lengths": (lambda: attention(v=(1, 6, 2, 16)), ValueError, ["k and v", "(1, 6, 2, 16)"]),
    "q and k of two batches": (lambda: attention(k=(2, 5, 2, 16)), ValueError, ["q and k", "batch", "(2, 5, 2, 16)"]),
    "v on another device": (
        lambda: attention(v=torch.empty(1, 5, 2, 16, device="meta")), ValueError, ["q and v", "cpu", "meta"]),
    "head size of zero": (lambda: packed((1, 4, 3, 1, 0)), ValueError, ["qkv", "head size", "at least 1", "0"]),
    "no key": (lambda: attention(k=(1, 0, 2, 16)), ValueError, ["k and v", "at least one", "0"]),
    "qkv of two slices": (lambda: packed((1, 4, 2, 2, 16)), ValueError, ["qkv", "(B, N, 3, H, D)", "(1, 4, 2, 2, 16)"]),
    "qkv of rank 4": (lambda: packed((1, 4, 2, 16)), ValueError, ["qkv", "(B, N, 3, H, D)", "(1, 4, 2, 16)"]),
    "dropout above 1": (lambda: attention(dropout_p=1.5), ValueError, ["dropout_p", "between 0 and 1", "1.5"]),
    "dropout of NaN": (lambda: packed((1, 4, 3, 2, 16), dropout_p=NAN), ValueError, ["dropout_p", "nan"]),
    "dropout is text": (lambda: attention(dropout_p="0.1"), TypeError, ["dropout_p", "number", "'0.1'"]),
    "scale is text": (lambda: attention(scale="1"), TypeError, ["scale", "number", "'1'"]),
    "more rows than the limit": (
        lambda: F.attention_packed(torch.empty(1, 1, device="meta").expand(2**25, 640).view(2**25, 1, 1, 40, 16)
                                   .expand(2**25, 2, 3, 40, 16), backend="triton"),
        ValueError, ["batch * heads * rows", str(2**31 - 1)]),
    "q_norm of another length": (
        lambda: attention(q_norm=(R(15), None, 1e-5)), ValueError, ["weight of q_norm", "(16,)", "(15,)"]),
    "k_norm is not a triple": (
        lambda: packed((1, 4, 3, 2, 16), k_norm=R(16)), TypeError, ["k_norm", "(weight, bias, eps)", "Tensor"]),
    "unknown norm_type": (lambda: attention(norm_type="batch"), ValueError, ["norm_type", "'rms_norm'", "'batch'"]),
    # rotary positions
    "rope of other lengths": (lambda: attention(rope=rope(4)), ValueError, ["rope", "one length", "4 and 5"]),
    "rope is one tensor": (lambda: rotary(R(4, 16)), TypeError, ["rope", "(cos, sin)", "Tensor"]),
    "rope is a triple": (lambda: rotary((R(4, 16),) * 3), TypeError, ["rope", "(cos, sin)", "tuple of 3"]),
    "cos is numpy": (lambda: rotary((np.zeros((4, 16)), R(4, 16))), TypeError, ["cos of rope", "numpy.ndarray"]),
    "sin in another dtype": (
        lambda: rotary((R(4, 16), R(4, 16).half())), TypeError, ["sin of rope", "float32", "float16"]),
    "sin on another device": (
        lambda: rotary((R(4, 16), torch.empty(4, 16, device="meta"))), ValueError, ["sin of rope", "cpu", "meta"]),
    "cos and sin of two shapes": (
        lambda: rotary((R(4, 16), R(4, 8))), ValueError, ["cos and sin of rope", "(4, 16)", "(4, 8)"]),
    "rope of too few tokens": (
        lambda: rotary(rope(4), rope_prefix=1), ValueError, ["rope", "(3, columns)", "rope_prefix=1", "(4, 16)"]),
    "rope of another batch": (
        lambda: rotary(rope(2, 1, 4)), ValueError, ["rope", "(1 or 1, 2 or 1, 4, columns)", "(2, 1, 4, 16)"]),
    "rope of other heads": (lambda: rotary(rope(1, 3, 4)), ValueError, ["rope", "2 or 1", "(1, 3, 4, 16)"]),
    "rope of rank 3": (lambda: rotary(rope(2, 4)), ValueError, ["rope", "(4, columns)", "(2, 4, 16)"]),
    "rope of odd columns": (
        lambda: rotary((R(4, 15), R(4, 15))), ValueError, ["rope", "even number", "head size 16", "(4, 15)"]),
    "rope wider than a head": (lambda: rotary((R(4, 18), R(4, 18))), ValueError, ["rope", "head size 16", "(4, 18)"]),
    "rope without columns": (lambda: rotary((R(4, 0), R(4, 0))), ValueError, ["rope", "1 to 8", "(4, 0)"]),
    "rope_prefix beyond the tokens": (
        lambda: rotary(rope(4), rope_prefix=5), ValueError, ["rope_prefix", "at most", "4", "5"]),
    "negative rope_prefix": (lambda: rotary(rope(4), rope_prefix=-1), ValueError, ["rope_prefix", "at least 0", "-1"]),
    "rope_prefix is a float": (lambda: rotary(rope(4), rope_prefix=1.0), TypeError, ["rope_prefix", "integer", "1.0"]),
    "unknown rope_layout": (
        lambda: rotary(rope(4), rope_layout="pairs"), ValueError, ["rope_layout", "'interleaved'", "'pairs'"]),
    "unknown backend": (
        lambda: F.attention(*[R(1, 4, 2, 16)] * 3, backend="cuda"), ValueError, ["backend", "'triton'", "'cuda'"]),
    # linear, mlp
    "x is a list": (lambda: linear([[1.0]]), TypeError, ["x", "torch.Tensor", "list"]),
    "x is a number": (lambda: linear(torch.tensor(1.0)), ValueError, ["x", "(..., D)", "()"]),
    "weight of other columns": (lambda: linear(weight=(4, 9)), ValueError, ["weight", "8 columns", "(4, 9)"]),
    "weight of rank 3": (lambda: linear(weight=(4, 8, 1)), ValueError, ["weight", "(4, 8, 1)"]),
    "weight on another device": (
        lambda: linear(weight=torch.empty(4, 8, device="meta")), ValueError, ["x and weight", "cpu", "meta"]),
    "weight in another dtype": (lambda: linear(weight=R(4, 8).half()), TypeError, ["x and weight", "float16"]),
    "empty weight": (lambda: linear(weight=(0, 8)), ValueError, ["weight", "at least one row", "(0, 8)"]),
    "bias of another length": (lambda: linear(bias=(5,)), ValueError, ["bias", "(4,)", "(5,)"]),
    "residual of another shape": (lambda: linear(residual=R(5, 3)), ValueError, ["residual", "(5, 4)", "(5, 3)"]),
    "residual in another dtype": (lambda: linear(residual=R(5, 4).half()), TypeError, ["residual", "float16"]),
    "layer_scale of another length": (
        lambda: linear(layer_scale=R(5), residual=R(5, 4)), ValueError, ["layer_scale", "(4,)", "(5,)"]),
    "layer_scale in another dtype": (
        lambda: linear(layer_scale=R(4).half(), residual=R(5, 4)), TypeError, ["layer_scale", "float16"]),
    "layer_scale without a residual": (lambda: linear(layer_scale=R(4)), ValueError, ["layer_scale", "residual"]),
    "drop path without a residual": (lambda: mlp(drop_path_p=0.1), ValueError, ["drop_path_p", "residual"]),
    "drop path above 1": (lambda: linear(drop_path_p=1.1, residual=R(5, 4)), ValueError, ["drop_path_p", "1.1"]),
    "drop path without samples": (
        lambda: F.linear(R(8), R(8, 8), residual=R(8), drop_path_p=0.1), ValueError, ["drop_path_p", "(8,)"]),
    "norm is not a triple": (lambda: linear(norm=(R(8), R(8))), TypeError, ["norm", "(weight, bias, eps)", "tuple"]),
    "norm is a module": (
        lambda: linear(norm=torch.nn.LayerNorm(8)), TypeError, ["norm", "(weight, bias, eps)", "LayerNorm"]),
    "weight of the norm of another length": (
        lambda: linear(norm=(R(7), None, 1e-5)), ValueError, ["weight of norm", "(8,)", "(7,)"]),
    "weight of the norm on another device": (
        lambda: linear(norm=(torch.empty(8, device="meta"), None, 1e-5)), ValueError, ["weight of norm", "meta"]),
    "negative eps": (lambda: linear(norm=(R(8), None, -1.0)), ValueError, ["eps of norm", "-1.0"]),
    "eps is text": (lambda: norm(eps="small"), TypeError, ["eps", "number", "'small'"]),
    "unknown activation": (lambda: mlp(activation="elu"), ValueError, ["activation", "'quick_gelu'", "'elu'"]),
    "w1 of an odd gate": (lambda: mlp(w1=(13, 8), activation="swiglu"), ValueError, ["w1", "2 * hidden", "(13, 8)"]),
    "w2 as wide as gate and value": (lambda: mlp(activation="swiglu"), ValueError, ["w2", "6 columns", "(8, 12)"]),
    "w2 does not match w1": (lambda: mlp(w2=(8, 11)), ValueError, ["w2", "12 columns", "w1", "(8, 11)"]),
    "b1 of another length": (lambda: mlp(b1=(8,)), ValueError, ["b1", "(12,)", "(8,)"]),
    "hidden dropout below 0": (lambda: mlp(hidden_dropout_p=-0.1), ValueError, ["hidden_dropout_p", "-0.1"]),
    # encoder
    "tokens without a batch": (lambda: encoder((5, 8)), ValueError, ["x", "(B, N, D)", "(5, 8)"]),
    "no tokens": (lambda: encoder((1, 0, 8)), ValueError, ["at least one", "0"]),
    "qkv rows indivisible by 3": (lambda: encoder(qkv_weight=(25, 8)), ValueError, ["blocks[0].qkv_weight", "(25, 8)"]),
    "qkv of other heads": (lambda: encoder(heads=3), ValueError, ["blocks[0].qkv_weight", "3 heads", "(24, 8)"]),
    "qkv of other columns": (lambda: encoder(qkv_weight=(24, 9)), ValueError, ["blocks[0].qkv_weight", "8 columns"]),
    "out does not match qkv": (lambda: encoder(out_weight=(8, 9)), ValueError, ["blocks[0].out_weight", "8 col"]),
    "out of other rows": (lambda: encoder(out_weight=(9, 8)), ValueError, ["blocks[0].out_weight", "8 rows", "(9, 8)"]),
    "a layer scale of another length": (
        lambda: encoder(layer_scale2=R(9)), ValueError, ["blocks[0].layer_scale2", "(8,)", "(9,)"]),
    "w2 of other rows": (lambda: encoder(w2=(9, 12)), ValueError, ["blocks[0].w2", "8 rows", "(9, 12)"]),
    "a weight in another dtype": (lambda: encoder(w1=R(12, 8).half()), TypeError, ["blocks[0].w1", "float16"]),
    "a norm that is a list": (lambda: encoder(norm2=[R(8)]), TypeError, ["blocks[0].norm2", "tuple", "list"]),
    "no heads": (lambda: encoder(heads=0), ValueError, ["heads", "at least 1", "0"]),
    "blocks is None": (lambda: F.encoder(R(1, 5, 8), None, heads=2), TypeError, ["blocks", "Block", "NoneType"]),
    "blocks is an iterator": (
        lambda: F.encoder(R(1, 5, 8), iter([]), heads=2), TypeError, ["blocks", "sequence of Block", "list_iterator"]),
    "heads is a float": (lambda: encoder(heads=2.0), TypeError, ["heads", "integer", "2.0"]),
    "a block that is a module": (
        lambda: F.encoder(R(1, 5, 8), [torch.nn.Identity()], heads=2), TypeError, ["Block", "Identity"]),
    # layer_norm
    "bias of the norm of another length": (lambda: norm(bias=(7,)), ValueError, ["bias", "(8,)", "(7,)"]),
    "an empty last dimension": (lambda: norm((5, 0)), ValueError, ["last dimension", "empty"]),
    "a width beyond the limit": (lambda: norm((1, 2**16 + 1)), ValueError, ["width", "65536", "65537"]),
    "residual on another device": (lambda: norm(residual=META), ValueError, ["residual", "cpu", "meta"]),
    # patch_embed
    "image without a batch": (lambda: embed((3, 8, 8)), ValueError, ["image", "(B, C, H, W)", "(3, 8, 8)"]),
    "image not divisible into patches": (lambda: embed((1, 3, 8, 9)), ValueError, ["image", "8 x 9", "4 x 4"]),
    "image without a row": (lambda: embed((1, 3, 0, 8)), ValueError, ["image", "0 x 8"]),
    "image of other channels": (lambda: embed((1, 4, 8, 8)), ValueError, ["image", "4 channels", "64 columns"]),
    "more patches than positions": (lambda: embed(pos=R(3, 16)), ValueError, ["image", "4 patches", "3 positions"]),
    "pos of another width": (lambda: embed(pos=R(4, 15)), ValueError, ["pos", "16", "(4, 15)"]),
    "prefix of rank 3": (lambda: embed(prefix=R(1, 1, 16)), ValueError, ["prefix", "(rows, dim)", "(1, 1, 16)"]),
    "unknown patch order": (lambda: embed(patch_order="c p2 p1"), ValueError, ["patch_order", "p1 p2 c", "c p2 p1"]),
    "patch size of zero": (lambda: embed(patch_size=0), ValueError, ["patch_size", "positive", "0"]),
    "patch size of three": (lambda: embed(patch_size=(4, 4, 4)), ValueError, ["patch_size", "(4, 4, 4)"]),
    "patch size is a float": (lambda: embed(patch_size=4.0), TypeError, ["patch_size", "int", "4.0"]),
    "bytes without mean and std": (lambda: embed(BYTES), TypeError, ["uint8", "mean and std"]),
    "mean without std": (lambda: embed(BYTES, mean=[0.5] * 3), ValueError, ["mean and std", "one"]),
    "mean and std of a float image": (lambda: embed(**STATS), TypeError, ["mean and std", "uint8", "float32"]),
    "mean of another length": (
        lambda: embed(BYTES, mean=[0.5], std=[0.5] * 3), ValueError, ["mean", "3 channels", "(1,)"]),
    "std of zero": (lambda: embed(BYTES, mean=[0.5] * 3, std=[0.5, 0, 1]), ValueError, ["std", "0"]),
    "mean is a number": (
        lambda: embed(BYTES, mean=3, std=[0.5] * 3), TypeError, ["mean", "tensor or a sequence of numbers", "3"]),
    "mean is an array": (
        lambda: embed(BYTES, mean=np.zeros(3), std=[0.5] * 3), TypeError, ["mean", "sequence", "numpy.ndarray"]),
    "mean of text": (lambda: embed(BYTES, mean="abc", std=[0.5] * 3), TypeError, ["mean", "sequence", "'abc'"]),
    "std of text": (lambda: embed(BYTES, mean=[0.5] * 3, std=["a"] * 3), TypeError, ["std[0]", "number", "'a'"]),
    # tensors that are not dense
    "a nested x": (
        lambda: linear(torch.nested.nested_tensor([R(2, 8), R(3, 8)])), TypeError, ["x", "dense", "nested"]),
    "a jagged x": (
        lambda: linear(torch.nested.nested_tensor([R(2, 8), R(3, 8)], layout=torch.jagged)),
        TypeError, ["x", "dense", "nested"]),
    "a sparse weight": (lambda: linear(weight=R(4, 8).to_sparse()), TypeError, ["weight", "dense", "sparse_coo"]),
    "an mkldnn bias": (lambda: linear(bias=R(4).to_mkldnn()), TypeError, ["bias", "dense", "mkldnn"]),
    # options
    "activation is an array": (
        lambda: mlp(activation=np.array(["gelu"])), ValueError, ["activation", "'gelu'", "numpy.ndarray"]),
    "return_lse is text": (lambda: attention(return_lse="yes"), TypeError, ["return_lse", "True or False", "'yes'"]),
    "eps is an array": (lambda: norm(eps=np.zeros((9, 9))), TypeError, ["eps", "number", "numpy.ndarray"]),
    "scale beyond a float": (lambda: attention(scale=10**400), ValueError, ["scale", "range of a float"]),
    "a norm in float64": (
        lambda: linear(norm=(R(8).double(), None, 1e-5)), TypeError, ["weight of norm", "float64", "float32"]),
    "a norm of two dtypes": (
        lambda: linear(norm=(R(8), R(8).half(), 1e-5)), TypeError, ["weight and bias of norm", "float32", "float16"]),
    # models
    "ViT of a byte image": (lambda: vit()(BYTES), TypeError, ["uint8", "mean and std"]),
    "ViT of numpy": (lambda: vit()(np.zeros((1, 3, 8, 8))), TypeError, ["torch.Tensor", "numpy.ndarray"]),
    "ViT of one image": (lambda: vit()(R(3, 8, 8)), ValueError, ["(3, 8, 8)"]),
    "ViT of another image": (lambda: vit()(R(1, 3, 12, 12)), ValueError, ["9 patches", "4"]),
    "ViT of gray images": (lambda: vit()(R(1, 1, 8, 8)), ValueError, ["channels", "1"]),
    "image_size of three": (lambda: vit(image_size=(8, 8, 8)), ValueError, ["image_size", "(8, 8, 8)"]),
    "image_size is text": (lambda: vit(image_size="8"), TypeError, ["image_size", "'8'"]),
    "dropout of a ViT is text": (lambda: vit(dropout="0.1"), TypeError, ["dropout", "number", "'0.1'"]),
    **{f"{name} of an Attention is {value!r}": (
        lambda name=name, value=value: vit_triton.modules.Attention(**{"dim": 8, name: value}), error, [name, word])
        for name, value, error, word in (
            ("heads", 0, ValueError, "at least 1, got 0"), ("heads", "2", TypeError, "integer, got '2'"),
            ("dim_head", -1, ValueError, "-1"), ("dim", 8.0, TypeError, "8.0"), ("dropout", "1", TypeError, "'1'"))},
    "hidden_dim is an array": (
        lambda: vit_triton.modules.FeedForward(8, np.array([8])), TypeError, ["hidden_dim", "numpy.ndarray"]),
    "depth below 0": (lambda: vit_triton.modules.Transformer(8, -1, 2, 4, 8), ValueError, ["depth", "-1"]),
    "patch_size of rows is a number": (
        lambda: vit_triton.modules.PatchRows(4), TypeError, ["patch_size", "(height, width)", "4"]),
    "name of a backend": (lambda: vit_triton.use_backend("cudnn"), ValueError, ["'triton'", "'cudnn'"]),
    "attention_maps of numpy": (
        lambda: vit_triton.attention_maps(vit(), np.zeros((1, 3, 8, 8))), TypeError, ["torch.Tensor (B, C, H, W)"]),
    "attention_maps of bytes": (
        lambda: vit_triton.attention_maps(vit(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
        TypeError, ["image", "uint8"]),
    "attention_maps of one image": (
        lambda: vit_triton.attention_maps(vit(), R(3, 8, 8)),
        ValueError, ["image must be a tensor (B, C, H, W), got shape (3, 8, 8); image[None] adds the batch"]),
    "attention_maps of no module": (
        lambda: vit_triton.attention_maps("vit", R(1, 3, 8, 8)), TypeError, ["model", "torch.nn.Module", "str"]),
    **{f"attention_maps with query {query!r}": (
        lambda query=query: vit_triton.attention_maps(vit(), R(1, 3, 8, 8), query=query),
        TypeError, ["query", "index of a token", repr(query)]) for query in (1.5, "0", True)},
    "attention_maps of layers that are not called": (
        lambda: vit_triton.attention_maps(Idle(), R(1, 3, 8, 8)), ValueError, ["model", "Idle", "attention"]),
    "attention_maps of layers of two kinds": (
        lambda: vit_triton.attention_maps(
            torch.nn.Sequential(
                torch.nn.Flatten(1, 2), vit_triton.modules.Attention(8, 2, 4), vit_triton.modules.Attention(8, 1, 4)),
            R(1, 1, 5, 8)),
        ValueError, ["model", "heads", "(2, 5, 5)", "(1, 5, 5)"]),
    "sparse tokens": (
        lambda: vit_triton.modules.Attention(8, 2, 4)(R(1, 5, 8).to_sparse()), TypeError, ["x", "dense", "sparse_coo"]),
    "nested images": (
        lambda: vit()(torch.nested.nested_tensor([R(3, 8, 8)])), TypeError, ["image", "dense", "nested"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, monkeypatch):
    def no_kernel(*args, **kwargs):
        raise AssertionError("a kernel ran")

    for module in launcher_modules():
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", no_kernel)
    call, error, words = CASES[case]
    if "layers of two kinds" in case:
        monkeypatch.undo()  # detected only after kernels ran
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert "\n" not in str(caught.value)


def test_meta_tensors_have_a_shape_and_no_error():
    assert F.linear(META, torch.empty(4, 8, device="meta"), backend="torch").shape == (5, 4)
