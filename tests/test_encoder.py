"""encoder against the float64 composition, as one operator and with gradients, and its use in a Transformer."""

import pytest
import torch
from precision import DTYPES, assert_as_precise, assert_model_as_precise, assert_same
from torch import nn

import vit_triton
from vit_triton import functional as F
from vit_triton import modules, reference
from vit_triton.checks import ACTIVATIONS

pytestmark = pytest.mark.compiled


def make(dim, heads, head_dim, hidden, dtype, *, depth=2, biases=True, norms=True, layer_scales=False, gated=False):
    def rand(*shape):
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)

    def norm(eps):
        return (1 + rand(dim), rand(dim), eps) if norms else (None, None, eps)

    inner, wide = heads * head_dim, hidden * (1 + gated)
    return [
        F.Block(
            *(norm(1e-5), rand(3 * inner, dim), rand(3 * inner) if biases else None),
            *(rand(dim, inner), rand(dim) if biases else None, norm(1e-6)),
            *(rand(wide, dim), rand(wide) if biases else None, rand(dim, hidden), rand(dim) if biases else None),
            *((rand(dim), rand(dim)) if layer_scales else ()),
        )
        for _ in range(depth)
    ]


def double(block):
    def wide(x):
        return tuple(map(wide, x)) if isinstance(x, tuple) else x.double() if isinstance(x, torch.Tensor) else x

    return F.Block(*map(wide, block))


def check(x, blocks, **options):
    with torch.no_grad():
        ours = F.encoder(x, blocks, backend="triton", **options)
    peer = reference.encoder(x, blocks, **options)
    exact = reference.encoder(x.double(), list(map(double, blocks)), **options)
    assert ours.dtype == x.dtype and ours.is_contiguous()
    assert_as_precise([ours], [[peer]], [exact], [exact], ["tokens"])


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "heads", "head_dim", "hidden"), [(48, 3, 16, 64), (72, 1, 72, 100), (40, 2, 80, 33), (32, 3, 11, 24)]
)
def test_against_float64(dim, heads, head_dim, hidden, dtype, first_token):
    x = torch.randn(2, 21, dim).to(dtype)
    check(x, make(dim, heads, head_dim, hidden, dtype), heads=heads, first_token=first_token)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(activation):
    x = torch.randn(2, 2 * 9, 48)[:, ::2]  # strided
    gated = activation == "swiglu"
    blocks = make(48, 2, 16, 40, torch.float32, depth=1, biases=False, norms=False, gated=gated)
    check(x, blocks, heads=2, scale=0.3, activation=activation)


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_scales(dtype, first_token):
    blocks = make(48, 3, 16, 64, dtype, layer_scales=True)
    blocks[1] = blocks[1]._replace(layer_scale1=None)
    check(torch.randn(2, 21, 48).to(dtype), blocks, heads=3, first_token=first_token)


# prefix, layout, shape of the tables for 2 samples of 9 tokens and 3 heads of 16 channels
ROPE = [(0, "interleaved", (9, 16)), (1, "half", (1, 1, 8, 16)), (5, "half", (2, 3, 4, 6)), (9, "half", (0, 16))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prefix", "layout", "shape"), ROPE)
def test_rotary_positions(prefix, layout, shape, dtype):
    angles = torch.randn(shape)
    positions = dict(rope=(angles.cos(), angles.sin()), rope_prefix=prefix, rope_layout=layout)
    x, blocks = torch.randn(2, 9, 48).to(dtype), make(48, 3, 16, 64, dtype)
    check(x, blocks, heads=3, **positions)
    with pytest.raises(ValueError, match="first_token requires that rope is None"):
        F.encoder(x, blocks, heads=3, **positions, first_token=True, backend="triton")


def test_errors_of_rotary_positions():
    x, blocks, table = torch.randn(1, 9, 48), make(48, 3, 16, 64, torch.float32), torch.randn(9, 16)
    for rope, options, error in (
        ((table, table), dict(rope_prefix=1), "cos of rope must be"),
        ((table.double(), table.double()), {}, "cos of rope must be float32"),
        (table, {}, "rope must be a tuple"),
        ((table, table), dict(rope_layout="pairs"), "rope_layout"),
    ):
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match=error):
            F.encoder(x, blocks, heads=3, rope=rope, backend="triton", **options)


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_depths(depth, first_token):
    x, blocks = torch.randn(1, 5, 32), make(32, 2, 16, 40, torch.float32, depth=depth)
    if depth or not first_token:
        check(x, blocks, heads=2, first_token=first_token)
        return
    for backend in ("triton", "torch"):
        with pytest.raises(ValueError, match="first_token requires a block"):
            F.encoder(x, blocks, heads=2, first_token=True, backend=backend)


def test_empty_batch():
    x, blocks = torch.randn(0, 5, 32), make(32, 2, 16, 40, torch.float32)
    with torch.no_grad():
        assert F.encoder(x, blocks, heads=2, backend="triton").shape == (0, 5, 32)
        assert F.encoder(x, blocks, heads=2, first_token=True, backend="triton").shape == (0, 1, 32)


# --- gradients ---------------------------------------------------------------------------------------------


def leaves_of(x, blocks):
    """All tensors that may require a gradient, by name."""
    named = {"x": x}
    for i, block in enumerate(blocks):
        for field, value in block._asdict().items():
            parts = zip(("weight", "bias"), value, strict=False) if isinstance(value, tuple) else [("", value)]
            named |= {f"{i}.{field}.{part}": tensor for part, tensor in parts if tensor is not None}
    return named


def gradients(x, blocks, dy, *, wanted=None, **options):
    """The result and the gradients of the leaves by name; None for those that are not ``wanted``."""

    def copy(value):
        return tuple(map(copy, value)) if isinstance(value, tuple) else getattr(value, "detach", lambda: value)()

    x, blocks = x.detach(), [F.Block(*map(copy, block)) for block in blocks]
    leaves = {name: leaf for name, leaf in leaves_of(x, blocks).items() if wanted is None or name in wanted}
    for leaf in leaves.values():
        leaf.requires_grad_()
    function = F.encoder if "backend" in options else reference.encoder
    y = function(x, blocks, **options)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


GRADIENTS = {
    "biases and LayerScale": dict(layer_scales=True),
    "no biases": dict(biases=False),
    "no affine norms, gated": dict(norms=False, gated=True),
    "heads of 72": dict(sizes=(72, 1, 72, 100)),
}


@pytest.mark.parametrize("gradient", ["dense", "expanded", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_against_float64(case, dtype, gradient):
    options = dict(GRADIENTS[case])
    dim, heads, head_dim, hidden = options.pop("sizes", (48, 3, 16, 64))
    blocks = make(dim, heads, head_dim, hidden, dtype, **options)
    x = torch.randn(2, 21, dim).to(dtype)
    dy = torch.randn(2, dim, 21).to(dtype).transpose(1, 2)
    dy = dy.contiguous() if gradient == "dense" else dy[:1, :1, :1].expand(x.shape) if gradient == "expanded" else dy
    options = dict(heads=heads, activation="swiglu" if options.get("gated") else "gelu")
    ours = gradients(x, blocks, dy, **options, backend="triton")
    peer = gradients(x, blocks, dy, **options)
    exact = gradients(x.double(), list(map(double, blocks)), dy, **options)
    assert_model_as_precise(ours, peer, exact, 128, dtype)


@pytest.mark.parametrize("layer_scales", [False, True])
def test_one_tensor_alone_requires_a_gradient(layer_scales):
    blocks = make(32, 2, 16, 40, torch.float32, depth=1, layer_scales=layer_scales)
    x, dy = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    every = gradients(x, blocks, dy, heads=2, backend="triton")
    for name in every.keys() - {"y"}:
        alone = gradients(x, blocks, dy, wanted=[name], heads=2, backend="triton")
        assert alone.keys() == {"y", name}
        assert_same(alone[name], every[name], 40)


def test_backward_through_a_retained_graph():
    x, blocks = torch.randn(2, 9, 32).requires_grad_(), make(32, 2, 16, 40, torch.float32)
    y = F.encoder(x, blocks, heads=2, backend="triton")
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_gradients_with_first_token():
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        x, blocks = torch.randn(2, 9, 32).requires_grad_(), make(32, 2, 16, 40, torch.float32)
        leaves = [x, *(t.requires_grad_() for block in blocks for t in block if isinstance(t, torch.Tensor))]
        y = F.encoder(x, blocks, heads=2, first_token=True, backend=backend)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    assert_same(*results, 40)


# --- the Transformer ---------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    seen = []
    encoder = F.encoder

    def noted(x, blocks, **options):
        seen.append((len(blocks), options.get("first_token")))
        return encoder(x, blocks, **options)

    monkeypatch.setattr(modules.F, "encoder", noted)
    return seen


def vit(**options):
    sizes = dict(image_size=32, patch_size=8, num_classes=5, dim=48, depth=2, heads=2, dim_head=32, mlp_dim=64)
    return vit_triton.ViT(**{**sizes, "backend": "triton", **options})


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"num_classes": 0}, {"dropout": 0.5, "emb_dropout": 0.1}])
def test_inference_is_one_operator(options, calls):
    model, images = vit(**options).eval(), torch.randn(2, 3, 32, 32)
    first_token = not options.get("pool") and options.get("num_classes", 1) > 0
    expected = model(images).detach()
    assert calls == [(1, False)] * (1 if first_token else 2), "with gradients one call per block"
    calls.clear()
    with torch.no_grad():
        assert_same(model(images), expected, 192)
    assert calls == [(2, first_token)]


def hook(module, *args):
    return None


def replace_norm(model):
    model.transformer.layers[1][0].norm = nn.LayerNorm(48)


CHANGES = {
    "dropout": lambda model: model.train(),
    "a hook": lambda model: model.transformer.layers[0][1].net[1].register_forward_hook(hook),
    "a hook on a block": lambda model: model.transformer.layers[0][0].register_forward_pre_hook(hook),
    "a part of another class": replace_norm,
    "another backend": lambda model: setattr(model.transformer.layers[0][0], "backend", "torch"),
    "the torch backend": lambda model: setattr(model, "backend", "torch"),
    "another activation": lambda model: setattr(model.transformer.layers[1][1].net[2], "approximate", "tanh"),
    "one head without projection": lambda model: setattr(model.transformer.layers[0][0], "to_out", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_hooked_or_modified_models_do_not_run_the_encoder_operator(change, calls):
    model = vit(dropout=0.1, heads=1, dim_head=48 if "projection" in change else 16).eval()
    CHANGES[change](model)
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert calls == []


def nodes(tensor):
    """The names of the nodes of a graph."""
    found, stack = {}, [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = type(node).__name__
            stack += [function for function, _ in node.next_functions]
    return list(found.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_in_training_is_one_node_with_the_bits_of_its_parts(autocast, monkeypatch):
    model, images = vit(pool="mean"), torch.randn(2, 3, 32, 32)
    results = []
    for whole in (True, False):
        monkeypatch.setattr(modules, "may_fuse_branches", lambda whole=whole: whole)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(images)
        assert nodes(y).count("BlockFunctionBackward") == (2 if whole else 0)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_applies_inside_the_encoder(calls):
    model, images = vit().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(images)
    assert len(calls) == 2
    x, blocks = torch.randn(2, 9, 32), make(32, 2, 16, 40, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = F.encoder(x, blocks, heads=2, backend="triton")
    for ours, wide in ((y, exact), (tokens, reference.encoder(x, blocks, heads=2))):
        error = (ours - wide).norm() / wide.norm()
        assert 1e-4 < error < 4e-2, "the products must be bfloat16"
