"""Weights in inference: the next call uses a changed weight, whatever changed it; prepacked weights are frozen."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import timm
import torch
import torchvision
import transformers
from conftest import EMULATOR, INTERPRETER
from hypothesis import given
from hypothesis import strategies as st
from precision import assert_same
from torch import nn
from torch.nn.utils import parametrize

import vit_triton
from vit_triton import packing
from vit_triton.cpu.driver import launch_driver, use_cpu_driver
from vit_triton.kernels import launch
from vit_triton.kernels.device import target_of_driver
from vit_triton.kernels.linear import forward as linear
from vit_triton.kernels.linear import pack
from vit_triton.modules import FeedForward

pytestmark = pytest.mark.usefixtures("own_gemm")
compiled_only = pytest.mark.skipif(
    INTERPRETER or EMULATOR, reason="weights are packed only where kernels are compiled for the CPU"
)


@pytest.fixture(autouse=True)
def nothing_frozen():
    yield
    packing.frozen.clear()


@pytest.fixture
def packed(monkeypatch):
    """The shapes of all packed weights, in order."""
    shapes = []
    original = pack.pack_weight
    monkeypatch.setattr(pack, "pack_weight", lambda w, *layout: shapes.append(tuple(w.shape)) or original(w, *layout))
    return shapes


# --- the GEMM ----------------------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize(("dtype", "word"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 64), (5, 50, 33), (197, 97, 72), (3, 1, 1), (40, 64, 256)])
def test_packed_product_is_bitwise_equal(m, n, k, dtype, word):
    x, weight, bias, residual = (torch.randn(*s).to(dtype) for s in ((m, k), (n, k), (n,), (m, n)))
    with use_cpu_driver():
        expected, pre = linear.linear_fwd(x, weight, bias, residual, activation="gelu", save_pre=True)
        panels = pack.pack_weight(weight, 32, word)
        y, packed_pre = linear.linear_fwd(
            x,
            weight.new_full(weight.shape, torch.nan),
            bias,
            residual,
            activation="gelu",
            save_pre=True,
            panels=panels,
        )
    if INTERPRETER or EMULATOR:  # their order of summation depends on the tile
        assert_same(y, expected, k)
    else:
        assert torch.equal(y, expected) and torch.equal(pre, packed_pre)


@pytest.mark.compiled
@pytest.mark.parametrize(("n", "k"), [(50, 33), (32, 16), (1, 1), (97, 300), (64, 1024)])
@pytest.mark.parametrize("how", ["contiguous", "rows of a wider weight", "transposed"])
@pytest.mark.parametrize(("dtype", "panel", "word"), [(torch.float32, 16, 1), (torch.bfloat16, 32, 2)])
def test_panels_contain_the_weight(n, k, how, dtype, panel, word):
    weight = torch.randn(n, k).to(dtype)
    if how == "rows of a wider weight":
        weight = torch.nn.functional.pad(weight, (1, 2))[:, 1 : k + 1]
    elif how == "transposed":
        weight = weight.T.contiguous().T
    with use_cpu_driver():
        panels = pack.pack_weight(weight, panel, word)
    padded = torch.nn.functional.pad(weight, (0, -k % word, 0, -n % panel))
    expected = padded.view(-(-n // panel), panel, -(-k // word), word).transpose(1, 2)
    assert panels.shape == expected.shape and panels.is_contiguous()
    assert torch.equal(panels, expected)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_are_read_in_place(dtype):
    """Packed weights make the kernel's scratch memory smaller: it reads panels in place."""
    layout = dict(launch_driver().panels).get(dtype)
    if layout is None:
        return  # this CPU widens bfloat16
    x, weight = torch.randn(16, 256).to(dtype), torch.randn(32, 256).to(dtype)
    memory = []
    for panels in (None, pack.pack_weight(weight, *layout)):
        launch._compiled.clear()
        with use_cpu_driver():
            linear.linear_fwd(x, weight, None, panels=panels)
        (kernel,) = launch._compiled.values()
        memory.append(kernel.metadata.scratch_bytes)
    assert memory[0] - memory[1] > weight.nbytes // 2


# --- every way to change a weight ---------------------------------------------------------------------------


def our_vit():
    return vit_triton.ViT(
        image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=2, dim_head=32, mlp_dim=96, backend="triton"
    )


def timm_vit():
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=5, embed_dim=64, depth=2, num_heads=2, mlp_ratio=1.5
    )


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 96, num_classes=5)


def hugging_face_vit():
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=8
    )
    return HuggingFace(transformers.ViTModel(config, add_pooling_layer=False))


class HuggingFace(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).last_hidden_state


WEIGHTS = {  # by model: layers of attention and MLP, and the patch embedding
    our_vit: ("layers.0.0.to_qkv", "layers.1.1.net.4", "to_patch_embedding.2"),
    timm_vit: ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "patch_embed.proj"),
    torchvision_vit: ("layers.encoder_layer_1.mlp.0", "conv_proj"),
    hugging_face_vit: ("attention.k_proj", "mlp.fc1", "patch_embeddings.projection"),
}


def built(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # moves parameters away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    if make is not our_vit:
        vit_triton.accelerate(model, backend="triton")
    return model


def weights_of(model, make):
    """The modules whose weights are under test."""
    found = [m for name, m in model.named_modules() if name.endswith(WEIGHTS[make])]
    assert len(found) >= len(WEIGHTS[make])
    return found


def through_data(edit):
    """Edit every weight through ``.data``, which leaves the version counter unchanged."""
    return lambda modules: [edit(module.weight.data) for module in modules]


def counted(edit):
    def change(modules):
        with torch.no_grad():
            for module in modules:
                edit(module.weight)

    return change


def prune(weight):
    weight[weight.abs() < weight[weight != 0].abs().median()] = 0


def clamp(weight):
    weight.clamp_(-weight.abs().max() / 2, weight.abs().max() / 2)


def zero_rows(weight):
    weight[torch.randperm(len(weight))[:4]] = 0


def one_value(weight):
    weight.view(-1)[37] += 1


def scale_neuron(weight):
    weight[5] *= 3


def step(optimizer_class, **options):
    def change(modules):
        weights = [module.weight for module in modules]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer_class(weights, **options).step()

    return change


def load(modules, **options):
    for module in modules:
        state = {name: torch.randn_like(x) for name, x in module.state_dict().items()}
        module.load_state_dict(state, **options)


def numpy_write(modules):
    for module in modules:
        module.weight.detach().numpy().reshape(-1)[11:29] += 2


def assign(modules):
    for module in modules:
        module.weight.data = torch.randn_like(module.weight)


def replace(modules):
    for module in modules:
        module.weight = nn.Parameter(torch.randn_like(module.weight))


def set_storage(modules):
    with torch.no_grad():
        for module in modules:
            module.weight.set_(torch.randn_like(module.weight))


def swap(modules):
    for module in modules:
        torch.utils.swap_tensors(module.weight, nn.Parameter(torch.randn_like(module.weight)))


def write_storage(modules):
    for module in modules:
        module.weight.untyped_storage().copy_(torch.randn_like(module.weight).untyped_storage())


def resize_storage(modules):
    """Sharded training frees a weight between two forward passes."""
    for module in modules:
        size, values = module.weight.untyped_storage().nbytes(), torch.randn_like(module.weight)
        module.weight.untyped_storage().resize_(0)
        module.weight.untyped_storage().resize_(size)
        module.weight.data.copy_(values)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def register_parametrization(modules):
    for module in modules:
        parametrize.register_parametrization(module, "weight", Twice())


def cast(modules):
    for module in modules:
        module.to(torch.bfloat16).weight.data.mul_(1.5)
        module.float()


CHANGES = {
    "data, rows": through_data(zero_rows),
    "data, a neuron": through_data(scale_neuron),
    "data, pruned": through_data(prune),
    "data, clamped": through_data(clamp),
    "data, one value": through_data(one_value),
    "data.copy_": through_data(lambda weight: weight.copy_(torch.randn_like(weight))),
    "numpy": numpy_write,
    "in place": counted(lambda weight: weight.mul_(2)),
    "in place, rows": counted(zero_rows),
    "data =": assign,
    "a new parameter": replace,
    "set_": set_storage,
    "swap_tensors": swap,
    "storage": write_storage,
    "resized storage": resize_storage,
    "SGD": step(torch.optim.SGD, lr=0.1),
    "fused SGD": step(torch.optim.SGD, lr=0.1, fused=True),
    "fused AdamW": step(torch.optim.AdamW, lr=0.1, fused=True),
    "load_state_dict": load,
    "load_state_dict, assign": lambda modules: load(modules, assign=True),
    "cast and back": cast,
    "parametrization": register_parametrization,
}


@compiled_only
@pytest.mark.parametrize("make", WEIGHTS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weight_applies_to_the_next_call(change, make):
    model, x = built(make), torch.randn(2, 3, 32, 32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = model(x)
            model(x)  # replayed
        CHANGES[change](weights_of(model, make))
        with mode():
            after, expected = model(x), copy.deepcopy(model)(x)
        assert torch.equal(after, expected)
        assert not torch.equal(after, before)


@compiled_only
@pytest.mark.parametrize("change", ["data, rows", "in place, rows", "load_state_dict", "numpy"])
@pytest.mark.parametrize("make", WEIGHTS)
def test_changed_inference_tensor_applies_to_the_next_call(change, make):
    """Inference tensors lack a version counter."""
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        model = built(make)
        before = model(x)
        CHANGES[change](weights_of(model, make))
        after, expected = model(x), copy.deepcopy(model)(x)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@compiled_only
def test_write_by_another_process_applies_to_the_next_call(tmp_path):
    model, x = built(timm_vit), torch.randn(2, 3, 32, 32)
    weight = model.blocks[0].attn.qkv.weight
    shared = torch.from_file(str(tmp_path / "weight"), shared=True, size=weight.numel()).view_as(weight)
    weight.data = shared.copy_(weight.data)
    with torch.no_grad():
        before = model(x)
        write = f"file = open({str(tmp_path / 'weight')!r}, 'r+b'); file.seek(400); file.write(bytes(400))"
        subprocess.run([sys.executable, "-c", write], check=True)
        after, expected = model(x), copy.deepcopy(model)(x)
    assert (weight.view(-1)[100:200] == 0).all()
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


# --- prepacked models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("make", WEIGHTS)
def test_a_prepacked_model_gives_the_same_bits(make, mode):
    model, x = built(make), torch.randn(2, 3, 32, 32)
    with mode():
        plain = model(x)
        assert vit_triton.prepack(model) is model
        for _ in range(3):
            assert torch.equal(model(x), plain)
    assert vit_triton.unpack(model) is model
    with mode():
        assert torch.equal(model(x), plain)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", WEIGHTS)
def test_each_weight_is_packed_once(make, dtype, packed):
    model, x = built(make).to(dtype), torch.randn(2, 3, 32, 32).to(dtype)
    with torch.no_grad():
        model(x)
        assert packed == []
        vit_triton.prepack(model)
        for _ in range(3):
            model(x)
    products = 8 + (make is our_vit)  # its head runs on the kernels too
    # float16, and bfloat16 on some CPUs, is widened while the GEMM packs it
    assert len(packed) == (products if target_of_driver(launch_driver()).panel(dtype) is not None else 0)


@compiled_only
@pytest.mark.parametrize("make", [our_vit, timm_vit])
def test_patch_weight_is_packed_in_the_order_of_the_image(make):
    model, weight = built(make), WEIGHTS[make][-1] + ".weight"
    planes = torch.randn(2, 3, 32, 32)
    images = planes, planes.to(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = [model(image) for image in images]
        vit_triton.prepack(model)
        for _ in range(2):
            for image, expected in zip(images, plain, strict=True):
                assert torch.equal(model(image), expected)
    (entry,) = (entry for entry in packing.frozen.values() if entry.name == weight)
    assert sorted(order for order, *_ in entry.copies) == ["c p1 p2", "p1 p2 c"]


REFUSED = {
    "train()": lambda model: model.train(),
    "a cast or move": lambda model: model.to(torch.bfloat16),
    "load_state_dict()": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("part", ["", "layers.0", "layers.0.0.to_qkv"])
@pytest.mark.parametrize("what", REFUSED)
def test_prepacked_model_rejects_changes(what, part):
    model = vit_triton.prepack(built(our_vit))
    state = {name: x.clone() for name, x in model.state_dict().items()}
    inner = model.transformer.get_submodule(part) if part else model
    with pytest.raises(RuntimeError, match=r"^" + what.replace("()", r"\(\)") + r".*vit_triton\.unpack\(model\)"):
        REFUSED[what](inner)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    vit_triton.unpack(model)
    REFUSED[what](inner)


def test_prepacked_model_rejects_acceleration_and_loading(tmp_path):
    model = built(timm_vit)
    vit_triton.save_weights(model, tmp_path / "weights.pt")
    vit_triton.prepack(model)
    for call in (
        lambda: vit_triton.load_weights(model, tmp_path / "weights.pt"),
        lambda: vit_triton.accelerate(model),
        lambda: vit_triton.restore(model),
    ):
        with pytest.raises(RuntimeError, match=r"unpack\(model\)"):
            call()
    vit_triton.restore(vit_triton.unpack(model))


DETECTED = ("in place", "in place, rows", "data =", "set_", "swap_tensors", "SGD")


@compiled_only
@pytest.mark.parametrize("make", WEIGHTS)
@pytest.mark.parametrize("change", DETECTED)
def test_next_call_after_a_detected_edit_raises(change, make):
    model, x = vit_triton.prepack(built(make)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
    modules = weights_of(model, make)
    del modules[1:]
    CHANGES[change](modules)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), pytest.raises(RuntimeError, match=r"weight was changed after .*unpack\(model\)"):
            model(x)
    vit_triton.unpack(model)
    with torch.no_grad():
        after = model(x)
        assert torch.equal(after, copy.deepcopy(model)(x))
        assert torch.equal(vit_triton.prepack(model)(x), after)


def test_operations_on_pytorch_use_edited_parameters():
    model, x = vit_triton.prepack(built(our_vit)), torch.randn(2, 3, 32, 32)
    model.backend = "torch"
    with torch.no_grad():
        before = model(x)
        for parameter in model.parameters():
            parameter.mul_(2)
        after = model(x)
        assert not torch.equal(after, before) and torch.equal(after, copy.deepcopy(model)(x))


@compiled_only
def test_next_call_after_a_detected_edit_of_bias_or_norm_raises():
    x = torch.randn(2, 3, 32, 32)
    for name in ("transformer.norm.weight", "transformer.layers.0.1.net.1.bias"):
        model = vit_triton.prepack(built(our_vit))
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
            with pytest.raises(RuntimeError, match=f"{name} was changed"):
                model(x)


@compiled_only
def test_undetected_edit_applies_after_prepacking_again():
    model, x = vit_triton.prepack(built(our_vit)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        model.transformer.layers[0][0].to_qkv.weight.data[:9] = 0
        assert torch.equal(model(x), before)  # as prepack's docstring says
        expected = copy.deepcopy(model)(x)
        assert not torch.equal(expected, before)
        assert torch.equal(vit_triton.prepack(model)(x), expected)


@compiled_only
def test_a_replaced_parameter_is_used():
    model, x = vit_triton.prepack(built(our_vit)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
        replace([model.transformer.layers[0][0].to_qkv])
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_a_model_in_training_mode_is_not_prepacked():
    model = built(our_vit)
    model.transformer.layers[0].train()
    with pytest.raises(ValueError, match=r"'transformer.layers.0' of model is in training mode: call model.eval\(\)"):
        vit_triton.prepack(model)
    assert not packing.frozen and type(model) is vit_triton.ViT
    with pytest.raises(ValueError, match=r"but model is in training mode"):
        vit_triton.prepack(model.train())


@pytest.mark.parametrize("function", [vit_triton.prepack, vit_triton.unpack])
def test_only_modules_are_prepacked(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        function({})


@pytest.mark.parametrize("make", WEIGHTS)
def test_copies_of_a_prepacked_model_are_not_prepacked(make):
    model, x = vit_triton.prepack(built(make)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), before)
            assert not any(hasattr(module, "_prepacked") for module in copied.modules())
            copied.train().eval().load_state_dict(copied.state_dict())
            weights_of(copied, make)[0].weight.mul_(2)
            assert not torch.equal(copied(x), before)
        assert torch.equal(model(x), before)


def test_packed_weights_are_freed_with_the_model():
    model, x = vit_triton.prepack(built(our_vit)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
    copies = [weakref.ref(x) for entry in packing.frozen.values() for x in entry.copies.values()]
    del model
    gc.collect()
    assert not packing.frozen and not any(copy() is not None for copy in copies)


@compiled_only
def test_prepacking_a_part_again_renews_concatenated_weights():
    model, x = vit_triton.prepack(built(hugging_face_vit)), torch.randn(2, 3, 32, 32)
    (key, *_) = (part for name, part in model.named_modules() if name.endswith("k_proj"))
    with torch.no_grad():
        before = model(x)
        key.weight.data.mul_(3)
        vit_triton.prepack(key)
        after = model(x)
        assert torch.equal(after, copy.deepcopy(model)(x)) and not torch.equal(after, before)


def test_model_parametrized_after_prepack_can_be_unpacked():
    model, x = vit_triton.prepack(built(our_vit)), torch.randn(2, 3, 32, 32)
    linear = model.transformer.layers[0][0].to_qkv
    cls = type(built(our_vit).transformer.layers[0][0].to_qkv)
    nn.utils.parametrizations.weight_norm(linear)
    vit_triton.unpack(model)
    assert not packing.frozen
    model.train().eval()
    with torch.no_grad():
        assert torch.equal(model(x), copy.deepcopy(model)(x))
    parametrize.remove_parametrizations(linear, "weight")
    assert type(linear) is cls


def test_copies_of_a_parametrized_model_are_not_prepacked():
    model = built(our_vit)
    nn.utils.parametrizations.weight_norm(model.transformer.layers[0][0].to_qkv)
    copy.deepcopy(vit_triton.prepack(model.eval())).train()


def test_unpack_releases_replaced_parameters():
    model = vit_triton.prepack(built(our_vit))
    replace([model.transformer.layers[0][0].to_qkv])
    vit_triton.unpack(model)
    assert not packing.frozen


@compiled_only
def test_shared_parameter_stays_frozen_while_a_module_uses_it():
    parts = [FeedForward(32, 40, backend="triton").eval() for _ in range(2)]
    parts[1].net[1].weight = parts[0].net[1].weight
    vit_triton.prepack(nn.ModuleList(parts).eval())
    del parts[0]
    gc.collect()
    with torch.no_grad():
        parts[0].net[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"0.net.1.weight was changed"):
        parts[0](torch.randn(3, 5, 32))
    del parts
    gc.collect()
    assert not packing.frozen


@compiled_only
def test_unpack_releases_concatenated_weights():
    model, x = vit_triton.prepack(built(hugging_face_vit)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
    assert len(packing.frozen) > len(list(model.parameters()))
    vit_triton.unpack(model)
    assert not packing.frozen


def test_gradients_flow_through_a_prepacked_model():
    model, x = built(our_vit), torch.randn(2, 3, 32, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    vit_triton.prepack(model)
    with torch.inference_mode():
        model(x)  # creates the packed copies
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(grad, expected)


UNDETECTED = ("data, rows", "data, one value", "data.copy_", "numpy", "storage", "fused SGD")


@compiled_only
@given(
    steps=st.lists(
        st.one_of(
            st.sampled_from(["call", "call without gradients", "prepack", "unpack"]),
            st.tuples(st.sampled_from(DETECTED + UNDETECTED), st.sampled_from(["net.1", "net.4"])),
        ),
        max_size=12,
    )
)
def test_fuzz_edits_and_prepacking(steps):
    """A call uses the current parameters, or the frozen ones of a prepacked model, or raises."""
    model, x = FeedForward(32, 40, backend="triton").eval(), torch.randn(3, 5, 32)
    frozen_model, changed = None, False
    for step in steps:
        if step == "prepack":
            vit_triton.prepack(model)(x)  # the first call packs the weights
            frozen_model, changed = copy.deepcopy(model), False
        elif step == "unpack":
            vit_triton.unpack(model)
            frozen_model, changed = None, False
        elif isinstance(step, tuple):
            edit, part = step
            CHANGES[edit]([model.get_submodule(part)])
            changed = changed or (frozen_model is not None and edit in DETECTED)
        else:
            with torch.set_grad_enabled(step == "call"):
                if changed:
                    with pytest.raises(RuntimeError, match="was changed after"):
                        model(x)
                else:
                    truth = copy.deepcopy(model) if frozen_model is None else frozen_model
                    assert torch.equal(model(x), truth(x))
    vit_triton.unpack(model)
    assert torch.equal(model(x), copy.deepcopy(model)(x))
