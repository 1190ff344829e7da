"""accelerate and restore: preserved state, replaced and unsupported modules, hooks, unusual inputs."""

import copy
import inspect
import io
import pickle

import pytest
import timm
import torch
from parity import run
from precision import assert_same
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

import vit_triton
from vit_triton.integrations import Report


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, num_heads=2, num_classes=5, depth=2, init_values=0.1)
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """Names of the called functions of vit_triton.functional; "linear" is also linear_and_input."""
    called: list[str] = []
    for name in ("encoder", "linear", "linear_and_input", "mlp", "attention_packed", "layer_norm", "patch_embed"):
        original = getattr(vit_triton.functional, name)

        def recorded(*args, name=name, original=original, **options):
            called.append(name.removesuffix("_and_input"))
            return original(*args, **options)

        monkeypatch.setattr(vit_triton.functional, name, recorded)
    return called


TERMS = 192  # length of the longest sum
NORM, ATTENTION = "layer_norm", ["linear", "attention_packed", "linear"]
FUSED = ["patch_embed", "encoder", "encoder", NORM]


# --- preserved state ---------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[tuple]:
    """Class, attributes and the identity of their values, for every module."""
    return [
        (name, type(module), [(key, id(value), str(value)) for key, value in vars(module).items()])
        for name, module in model.named_modules()
    ]


def test_restore_recovers_the_original_model(model, images):
    before, theirs = snapshot(model), model(images)
    vit_triton.accelerate(model, "triton")
    assert type(model.blocks[0]) is not Block
    during = snapshot(model)
    assert vit_triton.restore(model) is model
    assert snapshot(model) == before and torch.equal(model(images), theirs)
    # acceleration changes classes only
    assert [(name, values) for name, _, values in during] == [(name, values) for name, _, values in before]


def test_accelerate_preserves_repr_state_dict_and_parameters(model):
    shown, state, parameters = repr(model), model.state_dict(), list(model.parameters())
    vit_triton.accelerate(model, "triton")
    assert repr(model) == shown
    assert model.state_dict().keys() == state.keys()
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    block = model.blocks[0]
    assert isinstance(block, Block) and isinstance(block.norm1, nn.LayerNorm) and isinstance(block.attn, Attention)
    assert inspect.signature(block.forward) == inspect.signature(Block(24, 2).forward)


def test_optimizer_created_before_accelerate_trains_alike(model, images):
    losses = []
    for accelerated in (False, True):
        here = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(here.parameters(), lr=0.1)
        if accelerated:
            vit_triton.accelerate(here, "triton")
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(here(images), torch.tensor([1, 3]))
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert_same(*losses, TERMS)
    assert losses[0] < 1


def test_accelerate_is_idempotent(model, images, kernels):
    vit_triton.accelerate(model, "torch")
    again = vit_triton.accelerate(model, "triton")
    assert {entry.name for entry in again.replaced} >= {"blocks.0", "blocks.1"}
    model(images)
    assert kernels == FUSED
    vit_triton.restore(model)
    vit_triton.restore(model)
    assert type(model.blocks[0]) is Block


def test_default_backend_applies_on_every_call(model, images):
    vit_triton.accelerate(model)
    counts = []
    for name in ("triton", "torch"):
        with vit_triton.use_backend(name), torch.profiler.profile() as profile:
            model(images)
        counts.append(sum(event.key.startswith("vit_triton::") for event in profile.key_averages()))
    assert counts[0] > 0 == counts[1]


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "save"])
def test_copies_are_accelerated_and_independent(model, images, kernels, how):
    vit_triton.accelerate(model, "triton")
    theirs = model(images)
    kernels.clear()
    if how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        copied = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
        other = copied[how](model)
    assert torch.equal(other(images), theirs) and kernels == FUSED
    if how != "copy":  # copy.copy shares the parameters
        with torch.no_grad():
            other.blocks[0].norm1.weight.zero_()
        assert not torch.equal(other(images), theirs) and torch.equal(model(images), theirs)
    vit_triton.restore(other)
    assert type(other.blocks[0]) is Block and (how == "copy" or type(model.blocks[0]) is not Block)


def test_data_parallel_replica_uses_its_own_parameters(model):
    vit_triton.accelerate(model, "triton")
    replica = model.norm._replicate_for_data_parallel()  # as DataParallel makes for every device
    replica.weight, replica.bias = torch.zeros(24), torch.full((24,), 3.0)
    assert torch.equal(replica(torch.randn(2, 24)), torch.full((2, 24), 3.0))


def test_functional_call_uses_the_given_parameters(model, images):
    vit_triton.accelerate(model, "triton")
    parameters = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    parameters["head.bias"] = torch.arange(5.0)
    assert torch.equal(torch.func.functional_call(model, parameters, images), torch.arange(5.0).expand(2, 5))


# --- replaced and unsupported modules ----------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
def test_empty_batch_runs_without_fallback(model, images, gradients):
    vit_triton.accelerate(model, "triton", strict=True)
    with torch.set_grad_enabled(gradients):
        result = model(images[:0])
    assert result.shape == (0, 5)
    if gradients:
        result.sum().backward()
        assert not any(parameter.grad.any() for parameter in model.parameters())


def test_blocks_run_fused(model, images, kernels):
    theirs = model(images)
    vit_triton.accelerate(model, "triton")
    assert_same(model(images), theirs, TERMS)
    assert kernels == FUSED


@pytest.mark.parametrize(
    "choices, calls",
    [
        ({"mlp": False}, ["patch_embed", *[NORM, *ATTENTION, NORM] * 2, NORM]),
        ({"attention": False}, ["patch_embed", *[NORM, NORM, "mlp"] * 2, NORM]),
        ({"layer_norm": False}, ["patch_embed", *[*ATTENTION, "mlp"] * 2]),
        ({"patch_embedding": False}, FUSED[1:]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_disabled_options_are_not_replaced(model, images, kernels, choices, calls):
    theirs = model(images)
    report = vit_triton.accelerate(model, "triton", **choices)
    assert_same(model(images), theirs, TERMS)
    assert kernels == calls
    assert f"{next(iter(choices))}=False" in {entry.detail for entry in report.not_replaced}


class OwnAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask, is_causal)


class SameAttention(Attention):
    """A subclass without its own forward, as FSDP creates."""


class UnknownModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 24)

    def forward(self, x):
        return self.fc1(x)


def test_subclass_with_overridden_forward_is_not_replaced(model, images):
    model.blocks[1].attn = OwnAttention(24, 2).eval()
    theirs = model(images)
    report = vit_triton.accelerate(model, "triton")
    assert_same(model(images), theirs, TERMS)
    left = {entry.name: entry.detail for entry in report.not_replaced}
    assert type(model.blocks[1].attn) is OwnAttention and "forward" in left["blocks.1.attn"]
    assert "attn" in left["blocks.1"] and "OwnAttention" in left["blocks.1"]
    assert "blocks.0" in {entry.name for entry in report.replaced}


def test_subclass_with_inherited_forward_is_replaced(model, images, kernels):
    model.blocks[1].attn = SameAttention(24, 2).eval()
    theirs = model(images)
    vit_triton.accelerate(model, "triton")
    assert_same(model(images), theirs, TERMS)
    assert kernels == FUSED
    vit_triton.restore(model)
    assert type(model.blocks[1].attn) is SameAttention


SIZES = dict(image_size=16, patch_size=8, num_classes=5, dim=24, depth=2, heads=2, mlp_dim=40, dim_head=8)
OWN_MODELS = {
    "ViT": lambda: vit_triton.ViT(**SIZES),
    "SimpleViT": lambda: vit_triton.SimpleViT(**SIZES),
    "NaViT": lambda: vit_triton.NaViT(**SIZES),
    "SwinTransformer": lambda: vit_triton.SwinTransformer(4, 24, (1, 1), (3, 6), 2, num_classes=5),
}


@pytest.mark.parametrize("name", OWN_MODELS)
def test_models_of_this_package_run_on_the_kernels_already(name):
    model = OWN_MODELS[name]()
    classes = [type(module) for module in model.modules()]
    (entry,) = vit_triton.accelerate(model).entries
    assert (entry.name, entry.cls, entry.replaced) == ("", name, False)
    assert "runs on the kernels already" in entry.detail
    assert [type(module) for module in model.modules()] == classes


def test_other_modules_around_and_inside_a_model_of_this_package_are_replaced(model):
    ours = vit_triton.ViT(**SIZES)
    ours.transformer.layers[1] = model.blocks[0]
    report = vit_triton.accelerate(nn.Sequential(ours, nn.LayerNorm(5)))
    assert {"0.transformer.layers.1", "1"} <= {entry.name for entry in report.replaced}
    assert [(entry.name, entry.cls) for entry in report.not_replaced] == [("0", "ViT")]


def test_unknown_module_is_not_replaced(model, images):
    model.blocks[0].mlp = UnknownModule()
    theirs = model(images)
    report = vit_triton.accelerate(model, "triton")
    assert_same(model(images), theirs, TERMS)
    left = {entry.name: entry.detail for entry in report.not_replaced}
    assert "UnknownModule" in left["blocks.0"] and "blocks.0.mlp.fc1" in left


def test_unknown_submodule_prevents_replacement(model, images):
    model.blocks[0].attn.gate = nn.Linear(24, 24)  # timm applies it
    theirs = model(images)
    report = vit_triton.accelerate(model, "triton")
    assert_same(model(images), theirs, TERMS)
    assert "gate" in {entry.name: entry.detail for entry in report.not_replaced}["blocks.0.attn"]


def test_class_with_patched_forward_is_not_replaced(model, images, kernels, monkeypatch):
    vit_triton.accelerate(model, "triton")
    monkeypatch.setattr(Mlp, "forward", lambda self, x: torch.zeros_like(x))
    ours = model(images)
    assert "mlp" not in kernels
    vit_triton.restore(model)
    assert_same(ours, model(images), TERMS)
    report = vit_triton.accelerate(model, "triton")
    assert "blocks.0.mlp" in {entry.name for entry in report.not_replaced}


def test_unsupported_head_size_is_not_replaced(images):
    sizes = dict(img_size=16, patch_size=8, embed_dim=264, num_heads=1, num_classes=5, depth=1)
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    theirs = model(images)
    report = vit_triton.accelerate(model, "triton")
    assert_same(model(images), theirs, TERMS)
    assert "264" in {entry.name: entry.detail for entry in report.not_replaced}["blocks.0.attn"]


def test_report_is_a_table(model):
    report = vit_triton.accelerate(model, "triton")
    assert isinstance(report, Report) and len(report.replaced) + len(report.not_replaced) == len(report.entries)
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class", "parts", "or", "reason"]
    assert ["blocks.*.norm*", "LayerNorm", "4", "x", "replaced", "layer", "norm"] in [line.split() for line in lines]
    assert lines[-1].split() == "head Linear 1 x left not supported".split()
    assert len({line.index("left" if " left " in line else "replaced") for line in lines[1:]}) == 1


def test_model_without_supported_modules():
    report = vit_triton.accelerate(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert not report.replaced and [entry.cls for entry in report.not_replaced] == ["Linear"]
    assert vit_triton.accelerate(nn.ReLU()).entries == ()


# --- hooks -------------------------------------------------------------------------------------------------

INNER = ["blocks.0.attn.qkv", "blocks.0.attn.attn_drop", "blocks.0.mlp.act", "blocks.0.ls1", "blocks.0.norm2"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("where", INNER)
def test_hooks_on_inner_modules_fire(model, images, where, kind, when):
    model.blocks[0].attn.fused_attn = False  # timm then calls attn_drop
    fired: list[int] = []
    register = getattr(model.get_submodule(where), f"register_{kind}_hook")
    handle = register(lambda *_: fired.append(1)) if when == "before" else None
    theirs, their_grads = run(model, images)
    fired.clear()
    report = vit_triton.accelerate(model, "triton")
    if handle is None:
        handle = register(lambda *_: fired.append(1))
    else:
        assert "has hooks" in {entry.name: entry.detail for entry in report.not_replaced}["blocks.0"]
    model.zero_grad()
    ours, our_grads = run(model, images)
    assert fired == [1]
    assert_same(ours, theirs, TERMS)
    assert_same(our_grads["image"], their_grads["image"], TERMS)
    handle.remove()


def test_block_hooks_receive_the_same_output(model, images, kernels):
    seen: list[torch.Tensor] = []
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    vit_triton.accelerate(model, "triton")
    model(images)
    assert_same(*seen, TERMS)
    assert kernels == FUSED
    handle.remove()


def test_global_hooks_fire(model, images):
    vit_triton.accelerate(model, "triton")
    seen: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        model(images)
    assert model.blocks[0].attn.qkv in seen


def test_replaced_submodule_is_called(model, images):
    class Lora(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    vit_triton.accelerate(model, "triton")
    model.blocks[0].mlp.fc1 = Lora(model.blocks[0].mlp.fc1)
    ours = model(images)
    assert_same(ours, vit_triton.restore(model)(images), TERMS)


def test_forward_replaced_on_the_instance_is_called(model, images):
    vit_triton.accelerate(model, "triton")
    attention = model.blocks[0].attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: 3 * plain(*args, **kwargs)  # as Hugging Face Accelerate's wrappers do
    ours = model(images)
    vit_triton.restore(model)
    attention.forward = lambda *args, **kwargs: 3 * Attention.forward(attention, *args, **kwargs)
    assert_same(ours, model(images), TERMS)


def test_parametrization_is_applied_and_survives_restore(model, images):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    vit_triton.accelerate(model, "triton")
    for where in ("norm1", "attn.qkv"):
        parametrize.register_parametrization(model.blocks[0].get_submodule(where), "weight", Doubled())
    ours = model(images)
    vit_triton.restore(model)
    assert_same(ours, model(images), TERMS)
    norm = model.blocks[0].norm1
    assert parametrize.is_parametrized(norm) and not any(hasattr(cls, "_replaced") for cls in type(norm).__mro__)


# --- unusual inputs ----------------------------------------------------------------------------------------


def test_float64_falls_back_to_the_library(model, images, kernels):
    theirs = model.double()(images.double())
    vit_triton.accelerate(model, "triton")
    assert torch.equal(model(images.double()), theirs) and not kernels


def test_mixed_parameter_dtypes_fall_back_to_the_library(model, images, kernels):
    for block in model.blocks:
        block.ls1.double()  # the residual after it is float64, which the MLP's Linear rejects
        block.mlp.double()
        block.norm2.double()
    theirs = model.blocks[0](torch.ones(2, 5, 24))
    vit_triton.accelerate(model, "triton")
    ours = model.blocks[0](torch.ones(2, 5, 24))
    assert ours.dtype == theirs.dtype == torch.float64
    assert_same(ours, theirs, TERMS)
    assert "mlp" not in kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_output_dtypes_match_the_library(model, images, dtype):
    with torch.autocast("cpu", dtype):
        theirs, tokens = model(images), model.forward_features(images)
        vit_triton.accelerate(model, "triton")
        ours, our_tokens = model(images), model.forward_features(images)
    assert ours.dtype == theirs.dtype == dtype and our_tokens.dtype == tokens.dtype
    assert_same(ours, theirs)


def test_compiles_into_one_graph(model, images):
    vit_triton.accelerate(model, "triton")
    theirs = model(images)
    assert_same(torch.compile(model, backend="aot_eager", fullgraph=True)(images), theirs, TERMS)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripting_asks_for_restore(model, images):
    theirs = model(images)
    vit_triton.accelerate(model)
    with pytest.raises(RuntimeError, match=r"torch.jit.script does not support .* call vit_triton.restore\(model\)"):
        torch.jit.script(model)
    assert_same(torch.jit.script(vit_triton.restore(model))(images), theirs, TERMS)


def test_exports(model, images):
    vit_triton.accelerate(model, "triton")
    program = torch.export.export(model, (images,))
    assert any("vit_triton" in str(node.target) for node in program.graph.nodes)
    assert_same(program.module()(images), model(images), TERMS)


@pytest.mark.parametrize("shape", [(2, 3, 10, 8), (3, 8, 8)], ids=["ragged", "unbatched"])
def test_unsupported_image_shapes_run_the_convolution(kernels, shape):
    model = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4))
    image = torch.randn(shape)
    theirs = model(image)
    assert vit_triton.accelerate(model, "triton").replaced
    assert_same(model(image), theirs, TERMS)
    assert not kernels and model(torch.randn(1, 3, 8, 8)).shape == (1, 5, 2, 2) and kernels == ["patch_embed"]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 4, "stride": 2},
        {"kernel_size": 4, "stride": 4, "padding": 2},
        {"kernel_size": 4, "stride": 4, "padding": 3, "padding_mode": "circular"},
        {"kernel_size": 2, "stride": 2, "dilation": 3},
        {"kernel_size": 4, "stride": 4, "groups": 3},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_non_patch_convolutions_are_not_replaced(options):
    model, image = nn.Sequential(nn.Conv2d(3, 6, **options)), torch.randn(2, 3, 8, 8)
    theirs = model(image)
    (entry,) = vit_triton.accelerate(model, "triton").not_replaced
    assert "convolution" in entry.detail and torch.equal(model(image), theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own warning, at the first tangent
def test_function_transforms_fall_back_to_the_library(model, images, kernels):
    parameters, tangent = dict(model.named_parameters()), torch.ones_like(images)

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, image[None]).square().sum()

    def results():
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():  # other SDPA backends lack these transforms
            gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(images, tangent)))
        return [*gradients.values(), dual.tangent]

    theirs = results()
    vit_triton.accelerate(model, "triton")
    assert all(map(torch.equal, results(), theirs)) and not kernels
    assert model(images).requires_grad and kernels == FUSED


def test_forward_and_backward_on_the_meta_device(model, images, kernels):
    vit_triton.accelerate(model.to("meta"), "triton")
    model(images.to("meta")).sum().backward()
    assert model.patch_embed.proj.weight.grad.is_meta and kernels == FUSED


# --- bad arguments -----------------------------------------------------------------------------------------


def test_bad_arguments(model):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        vit_triton.accelerate("vit_b_16")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got NoneType"):
        vit_triton.restore(None)
    with pytest.raises(ValueError, match="backend must be one of .*'cuda'"):
        vit_triton.accelerate(model, "cuda")
    with pytest.raises(TypeError, match="mlp must be True or False, got 'no'"):
        vit_triton.accelerate(model, mlp="no")
    assert type(model.blocks[0]) is Block
