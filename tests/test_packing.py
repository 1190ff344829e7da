"""Panels of weights: products that read them, and every way in which a weight changes under them."""

import copy
import gc
import io

import pytest
import torch
from conftest import EMULATOR, INTERPRETER
from torch import nn

import vit_triton
from vit_triton import functional as F
from vit_triton import packing
from vit_triton.cpu.driver import active
from vit_triton.kernels import _launch, linear
from vit_triton.kernels._patches import PatchLayout
from vit_triton.modules import FeedForward, Linear

compiled_only = pytest.mark.skipif(
    INTERPRETER or bool(EMULATOR), reason="weights are packed only where kernels are compiled for the CPU"
)


@pytest.fixture(autouse=True)
def nothing_packed():
    packing.clear()
    yield
    packing.clear()


@pytest.fixture
def packed(monkeypatch):
    """The shapes of all weights that were packed, in order."""
    shapes = []
    pack = linear.pack_weight
    monkeypatch.setattr(linear, "pack_weight", lambda w, *layout: shapes.append(tuple(w.shape)) or pack(w, *layout))
    return shapes


# --- the product -------------------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize(("dtype", "word"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 64), (5, 50, 33), (197, 97, 72), (3, 1, 1), (40, 64, 256)])
def test_the_product_is_the_same_bit_for_bit(m, n, k, dtype, word):
    x, weight, bias, residual = (torch.randn(*s).to(dtype) for s in ((m, k), (n, k), (n,), (m, n)))
    with active():
        expected, pre = linear.linear_fwd(x, weight, bias, residual, None, activation="gelu", save_pre=True)
        panels = linear.pack_weight(weight, 32, word)
        y, packed_pre = linear.linear_fwd(
            x,
            weight.new_full(weight.shape, torch.nan),
            bias,
            residual,
            None,
            activation="gelu",
            save_pre=True,
            panels=panels,
        )
    if INTERPRETER or EMULATOR:  # they add in the order of the tile
        torch.testing.assert_close(
            y, expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * k**0.5 * torch.finfo(dtype).eps
        )
    else:
        assert torch.equal(y, expected) and torch.equal(pre, packed_pre)


def test_panels_hold_the_weight():
    weight = torch.arange(50.0 * 33).view(50, 33)
    panels = linear.pack_weight(weight, 32, 2)
    assert panels.shape == (2, 17, 32, 2) and panels.is_contiguous()
    assert panels[1, 3, 5, 1] == weight[32 + 5, 2 * 3 + 1]
    assert panels.sum() == weight.sum()  # and zeros


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_are_read_where_they_lie(dtype):
    """The compiled product has no room to pack them into."""
    layout = vit_triton.cpu.driver.dot_panel(dtype)
    if layout is None:
        return  # a CPU that widens bfloat16
    x, weight = torch.randn(16, 256).to(dtype), torch.randn(32, 256).to(dtype)
    memory = []
    for panels in (None, linear.pack_weight(weight, *layout)):
        _launch._compiled.clear()
        with active():
            linear.linear_fwd(x, weight, None, None, None, panels=panels)
        (kernel,) = _launch._compiled.values()
        memory.append(kernel.metadata.scratch_bytes)
    assert memory[0] - memory[1] > weight.nbytes // 2


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_and_mlp_use_them(dtype, packed):
    x = torch.randn(2, 7, 72).to(dtype)
    layer, mlp = Linear(72, 40, backend="triton").to(dtype), FeedForward(72, 100, backend="triton").to(dtype)
    unpacked = layer(x), mlp(x, residual=x)
    assert packed == []
    for _ in range(2):
        with torch.no_grad():
            results = layer(x), mlp(x, residual=x)
        for result, expected in zip(results, unpacked, strict=True):
            assert torch.equal(result, expected)
    # float16 is widened when it is packed, and would take twice the memory
    in_panels = vit_triton.cpu.driver.dot_panel(dtype) is not None
    assert in_panels == (dtype != torch.float16)
    assert packed == ([(40, 72), (100, 72), (72, 100)] if in_panels else [])


@compiled_only
def test_only_parameters_are_packed(packed):
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    with torch.no_grad():
        F.linear(x, weight, backend="triton")
        F.linear(x, nn.Parameter(weight), backend="torch")
        with torch.autocast("cpu", torch.bfloat16):
            F.linear(x, nn.Parameter(weight), backend="triton")
    assert packed == []


# --- every way to change a weight ---------------------------------------------------------------------------


def step(optimizer_class, **options):
    def change(layer):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer_class([layer.weight], **options).step()

    return change


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def load(layer, **options):
    layer.load_state_dict({"weight": torch.randn_like(layer.weight), "bias": layer.bias.detach()}, **options)


def average(layer):
    layer.weight.data.lerp_(torch.randn_like(layer.weight), 0.5)


def assign(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def assign_transposed(layer):
    layer.weight.data = layer.weight.data.t()


def replace(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def one_value(layer):
    """Not one of the sample."""
    with torch.no_grad():
        layer.weight[1, 1] += 1


CHANGES = {
    "in place": in_place,
    "one value": one_value,
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight)),
    "data.lerp_": average,
    "data =": assign,
    "data = transposed": assign_transposed,
    "a new parameter": replace,
    "SGD": step(torch.optim.SGD, lr=0.1),
    "AdamW": step(torch.optim.AdamW, lr=0.1),
    "fused SGD": step(torch.optim.SGD, lr=0.1, fused=True),
    "fused AdamW": step(torch.optim.AdamW, lr=0.1, fused=True),
    "load_state_dict": load,
    "load_state_dict, assign": lambda layer: load(layer, assign=True),
    "cast and back": lambda layer: layer.to(torch.bfloat16).float(),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(torch.randn(32 * 32 + 32), layer.parameters()),
    "storage": lambda layer: layer.weight.untyped_storage().copy_(torch.randn(32, 32).untyped_storage()),
}


@compiled_only
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_again(change, mode):
    layer, x = Linear(32, 32, backend="triton"), torch.randn(5, 32)
    for _ in range(3):
        with mode():
            y = layer(x)
            expected = F.linear(x, layer.weight.detach().clone(), layer.bias, backend="triton")
        assert torch.equal(y, expected)
        CHANGES[change](layer)


@compiled_only
def test_parameters_made_in_inference_mode(packed):
    """They have no version."""
    with torch.inference_mode():
        layer, x = Linear(32, 32, backend="triton"), torch.randn(5, 32)
        for _ in range(2):
            assert torch.equal(layer(x), F.linear(x, layer.weight.clone(), layer.bias, backend="triton"))
        assert len(packed) == 1
        layer.weight.copy_(torch.randn(32, 32))
        assert torch.equal(layer(x), F.linear(x, layer.weight.clone(), layer.bias, backend="triton"))
        assert len(packed) == 2


DROPS = {
    "gradients": lambda layer, x: layer(x),
    "train()": lambda layer, x: layer.train(),
    "to()": lambda layer, x: layer.to(torch.float32),
    "load_state_dict": lambda layer, x: layer.load_state_dict(layer.state_dict()),
    "an optimizer": lambda layer, x: torch.optim.SGD([nn.Parameter(torch.zeros(1))]).step(),
}


@compiled_only
@pytest.mark.parametrize("event", DROPS)
def test_panels_are_dropped(event):
    layer, x = nn.Sequential(Linear(32, 32, backend="triton")), torch.randn(5, 32)
    with torch.no_grad():
        layer(x)
    assert id(layer[0].weight) in packing._packed
    DROPS[event](layer, x)
    assert id(layer[0].weight) not in packing._packed


@compiled_only
def test_they_stay_for_eval_and_go_with_the_model(packed):
    layer, x = Linear(32, 32, backend="triton"), torch.randn(5, 32)
    for _ in range(3):
        layer.eval()
        with torch.no_grad():
            layer(x)
    assert len(packed) == 1 and len(packing._packed) == 1
    del layer
    gc.collect()
    assert len(packing._packed) == 0


@compiled_only
def test_copies_and_files_know_nothing_of_them():
    layer, x = Linear(32, 32, backend="triton"), torch.randn(5, 32)
    before = io.BytesIO()
    torch.save(layer, before)
    with torch.no_grad():
        layer(x)
        other = copy.deepcopy(layer)
        other.weight.zero_()
        assert torch.equal(other(x), layer.bias.expand(5, 32))
    after = io.BytesIO()
    torch.save(layer, after)
    assert len(after.getvalue()) == len(before.getvalue())


@compiled_only
def test_freed_memory_is_not_read():
    """What sharded training does between two forward passes."""
    layer, x = Linear(32, 32, backend="triton"), torch.randn(5, 32)
    values, size = layer.weight.detach().clone(), layer.weight.untyped_storage().nbytes()
    with torch.no_grad():
        layer(x)
        layer.weight.untyped_storage().resize_(0)
        layer.weight.untyped_storage().resize_(size)
        layer.weight.copy_(2 * values)
        assert torch.equal(layer(x), F.linear(x, 2 * values, layer.bias, backend="triton"))


@compiled_only
def test_whole_model(packed):
    options = dict(image_size=32, patch_size=8, num_classes=5, dim=40, depth=2, heads=2, dim_head=20, mlp_dim=72)
    model = vit_triton.ViT(**options, backend="triton").eval()
    reference = vit_triton.ViT(**options, backend="torch").eval()
    reference.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)
    assert len(packed) == len(packing._packed) - 1  # that of the patches is in the order of the image, not in panels


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_weight_of_the_patches_is_kept_in_the_order_of_the_image(dtype, monkeypatch):
    ordered = []
    from_weight = PatchLayout.from_weight

    def noted(self, columns):
        ordered.append(self.order)
        return from_weight(self, columns)

    monkeypatch.setattr(PatchLayout, "from_weight", noted)
    weight = nn.Parameter(torch.randn(24, 3 * 8 * 8).to(dtype))
    planes = torch.randn(2, 3, 16, 16).to(dtype)
    pixels = planes.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for image in (planes, planes, pixels, pixels, planes):
            y = F.patch_embed(image, weight, patch_size=8, backend="triton")
            ours = len(ordered)
            fresh = F.patch_embed(image, weight.detach().clone(), patch_size=8, backend="triton")
            assert torch.equal(y, fresh)
            del ordered[ours:]
        assert ordered == ["c p1 p2", "p1 p2 c", "c p1 p2"]
        weight.data.mul_(2)
        assert torch.equal(F.patch_embed(planes, weight, patch_size=8, backend="triton"), 2 * y)
