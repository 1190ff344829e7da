"""Fallbacks of accelerated models: results match the original model, each call is counted with its reason, strict
models raise instead, and a graph counts nothing."""

import copy
import gc
import pickle
import warnings
import weakref

import hypothesis.strategies as st
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from parity import BASE
from precision import assert_model_as_precise, assert_same, longest_sum
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import get_graph_node_names

import vit_triton
import vit_triton.integrations.transformers  # registers attn_implementation="vit_triton"
from vit_triton import backend as backends
from vit_triton import functional as F
from vit_triton.kernels.norm.config import MAX_LAYER_NORM_WIDTH


def make(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, num_heads=2, num_classes=5, depth=2, init_values=0.1)
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes}).eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def add_hook(model: nn.Module):
    return model.blocks[0].norm2.register_forward_hook(lambda *_: None)


HOOKED = {"blocks.0": {"norm2: has hooks": 1}}


# --- counting ----------------------------------------------------------------------------------------------


def test_calls_are_counted_by_module_and_reason():
    model = make()
    report = vit_triton.accelerate(model, "triton")
    model(images())
    assert report.fallbacks() == vit_triton.fallbacks(model) == {}
    with add_hook(model):
        model(images())
    assert report.fallbacks() == vit_triton.fallbacks(model) == HOOKED
    model.norm(torch.randn(2, 24).double().float())
    model.blocks[1](torch.randn(1, 5, 24), is_causal=True)
    model.blocks[1](torch.randn(1, 5, 24), None, True)
    model.patch_embed.proj(torch.randn(1, 3, 9, 8))
    counted = report.fallbacks()
    assert counted.pop("blocks.1") == {"called with is_causal": 2}
    assert counted.pop("blocks.1.attn")
    assert counted.pop("patch_embed.proj") == {"image size is not divisible by the patch size": 1}
    assert {name: counted[name] for name in HOOKED} == HOOKED and "norm" not in counted


def test_backend_torch_is_not_counted():
    model = make()
    report = vit_triton.accelerate(model, "torch")
    model(images())
    assert report.fallbacks() == {}


def test_copies_have_their_own_counts_and_restore_clears_them():
    model = make()
    report = vit_triton.accelerate(model, "triton")
    add_hook(model)
    model(images())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(vit_triton.accelerate(make(), "triton")))):
        if isinstance(copied, nn.Module):
            assert vit_triton.fallbacks(copied) == {}
            copied(images())
            assert vit_triton.fallbacks(copied) == vit_triton.fallbacks(model) == HOOKED
        else:
            assert copied.fallbacks() == {} and copied.replaced  # a report is plain data
    vit_triton.restore(model)
    model(images())
    assert vit_triton.fallbacks(model) == {}
    assert report.fallbacks() == HOOKED


def test_counts_hold_no_reference_to_modules_or_tensors():
    model = make()
    report = vit_triton.accelerate(model, "triton")
    add_hook(model)
    model(images())
    module, weight = weakref.ref(model.blocks[0]), weakref.ref(model.norm.weight)
    before = len(vit_triton.fallback._counters)
    del model
    gc.collect()
    assert module() is None and weight() is None and len(vit_triton.fallback._counters) < before
    assert report.fallbacks() == HOOKED


def test_reasons_contain_no_sizes():
    """Reasons exclude sizes: this bounds the number of stored reasons."""
    model = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4))
    report = vit_triton.accelerate(model, "triton")
    for size in range(5, 30):
        model(torch.randn(1, 3, size, 4 * size))
    assert len(report.fallbacks()["0"]) == 1


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got NoneType"):
        vit_triton.fallbacks(None)
    with pytest.raises(TypeError, match="strict must be True or False, got 1"):
        vit_triton.accelerate(make(), strict=1)


# --- strict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_strict_error_names_module_and_reason(how):
    model = make()
    report = vit_triton.accelerate(model, "triton", strict=True)
    model = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[how](
        model
    )
    model(images())
    model.blocks[0].norm2 = nn.Identity()
    model(images())  # an Identity is supported
    model.blocks[0].norm2 = nn.BatchNorm1d(5)
    with pytest.raises(RuntimeError, match=r"^blocks\.0 \(Block\) would fall back .* BatchNorm1d is not supported"):
        model(images())
    with pytest.raises(RuntimeError, match=r"patch_embed\.proj \(Conv2d\) would fall back .* torch.float64 input"):
        model(images().double())
    assert report.fallbacks() == {}


@torch.no_grad()
def test_strict_error_is_raised_in_compiled_models():
    model = make()
    vit_triton.accelerate(model, "triton", strict=True)
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    add_hook(model)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"blocks\.0 \(Block\) would fall back .* norm2: has hooks"):
        compiled(images())


# --- graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is deprecated", "ignore::torch.jit.TracerWarning")
def test_tracing_counts_nothing_and_does_not_raise(strict):
    model = make()
    report = vit_triton.accelerate(model, "triton", strict=strict)
    add_hook(model)
    with torch.no_grad():
        torch.jit.trace(model, images())
        torch.export.export(model, (images(),))
        torch.export.export(model, (images(),), strict=True)
        torch.fx.symbolic_trace(model)
        with vit_triton.portable_operators():
            model(images())
    assert report.fallbacks() == {}


def test_compiling_counts_nothing_and_compiles_once():
    model = make()
    report = vit_triton.accelerate(model, "triton")
    add_hook(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(4):
        compiled(images())
    assert counter.frame_count == 1 and report.fallbacks() == {}


def test_torch_fx_feature_extraction():
    from torchvision.models import vision_transformer

    sizes = dict(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=5)
    model = vision_transformer.VisionTransformer(**sizes).eval()
    names = get_graph_node_names(model)
    report = vit_triton.accelerate(model, "triton", strict=True)
    assert get_graph_node_names(model) == names and report.fallbacks() == {}


# --- the limits of the kernels -----------------------------------------------------------------------------


def test_limits_match_the_kernels():
    assert backends.MAX_NORM_WIDTH == MAX_LAYER_NORM_WIDTH


WIDE = backends.MAX_NORM_WIDTH + 4


def test_too_wide_norm_is_listed_and_not_replaced():
    model = nn.Sequential(nn.LayerNorm(WIDE), nn.LayerNorm(8))
    report = vit_triton.accelerate(model, "triton")
    left, replaced = report.entries
    assert (left.name, left.replaced, replaced.replaced) == ("0", False, True) and str(WIDE) in left.detail
    x = torch.randn(2, WIDE)
    assert torch.equal(model[0](x), nn.functional.layer_norm(x, (WIDE,)))


def test_too_wide_patch_norm_of_our_vit_falls_back():
    sizes = dict(image_size=160, patch_size=160, num_classes=5, dim=24, depth=1, heads=1, mlp_dim=24)
    model, image = vit_triton.ViT(**sizes, backend="triton"), torch.randn(2, 3, 160, 160)
    with torch.profiler.profile() as profile:
        ours = model(image)
    assert sum(event.key.startswith("vit_triton::") for event in profile.key_averages()) > 3
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::native_layer_norm") == 1
    assert vit_triton.fallbacks(model) == {"to_patch_embedding.1": {"LayerNorm is wider than 65536": 1}}
    model.backend = "torch"
    assert_same(ours, model(image), 3 * 160 * 160)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(ours, compiled(image), 3 * 160 * 160)
    assert vit_triton.fallbacks(model) == {"to_patch_embedding.1": {"LayerNorm is wider than 65536": 1}}


@pytest.mark.parametrize("dim", [24, WIDE])
def test_too_wide_norms_of_our_blocks_fall_back(dim):
    block = vit_triton.modules.Transformer(dim, 1, 1, 8, 8, backend="triton")
    x = torch.randn(1, 3, dim)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            ours = block(x)
    counted = vit_triton.fallbacks(block)
    assert len(counted) == (3 if dim == WIDE else 0)
    for module in block.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"
    assert_same(ours, block(x), dim)


def test_too_wide_norm_raises_for_explicit_triton_only(monkeypatch):
    x = torch.randn(2, WIDE)
    with pytest.raises(ValueError, match="width must be 1 to 65536"):
        F.layer_norm(x, None, None, backend="triton")
    monkeypatch.setattr(backends, "_faster_on_cpu", lambda *_: True)
    norm = (None, None, 1e-5)
    expected = nn.functional.layer_norm(x, (WIDE,))
    assert torch.equal(F.layer_norm(x, None, None, backend="auto"), expected)
    weight = torch.randn(3, WIDE) / 256
    F.linear(x, weight, norm=norm, backend="auto")
    F.mlp(x, weight, None, torch.randn(3, 3), None, norm=norm, backend="auto")
    image = torch.randn(1, 1, 1, WIDE)
    F.patch_embed(image, weight, patch_size=(1, WIDE), pre_norm=norm, backend="auto")


def both(model: nn.Module, *args, **kwargs):
    """The results of a model before and after accelerate; an error counts as a result."""
    results = []
    for _ in range(2):
        try:
            results.append(model(*args, **kwargs))
        except Exception as error:
            results.append(error)
        vit_triton.accelerate(model, "triton")
    return results


LIMITS = {
    "no tokens": lambda: (make().blocks[0], torch.zeros(2, 0, 24)),
    "no images": lambda: (make(), torch.zeros(0, 3, 16, 16)),
    "complex": lambda: (nn.Sequential(nn.Conv2d(3, 5, 4, stride=4)).to(torch.complex64), images().to(torch.complex64)),
    "more rows than int32 holds": lambda: (make().to("meta").blocks[0], torch.empty(2**31, 1, 24, device="meta")),
    "more patches": lambda: (make().to("meta").patch_embed.proj, torch.empty(2**30, 3, 16, 16, device="meta")),
    "a hidden width of 0": lambda: (timm.layers.Mlp(24, 0), torch.randn(2, 5, 24)),
    "a sparse input": lambda: (make().norm, torch.randn(2, 24).to_sparse()),
    "a mkldnn input": lambda: (nn.Sequential(nn.Conv2d(3, 5, 4, stride=4)), images().to_mkldnn()),
    "a norm of float64": lambda: (make(), images().double()),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Complex modules are a new feature")
def test_inputs_beyond_the_limits_match_the_library(name):
    theirs, ours = both(*LIMITS[name]())
    if isinstance(theirs, Exception):
        assert isinstance(ours, Exception), name
        return
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.layout == theirs.layout
    if not ours.is_meta and ours.layout == torch.strided:
        assert_same(*(torch.view_as_real(x) if x.is_complex() else x for x in (ours, theirs)), 24)


def of_transformers(implementation: str, heads: int = 2, **changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=1, intermediate_size=24, image_size=16, patch_size=8)
    config = transformers.ViTConfig(**{**sizes, **changes}, num_attention_heads=heads)
    return transformers.ViTModel._from_config(config, attn_implementation=implementation).eval()


def test_unsupported_head_size_of_transformers_is_not_replaced():
    model = of_transformers("sdpa", heads=1, hidden_size=264)
    theirs = model(images()).last_hidden_state
    report = vit_triton.accelerate(model, "triton")
    reasons = {entry.name: entry.detail for entry in report.not_replaced}
    layer = next(entry.name for entry in report.not_replaced if entry.cls == "ViTLayer")
    assert "264" in reasons["layers.0" if hasattr(model, "layers") else layer]
    assert_same(model(images()).last_hidden_state, theirs, 264)


def test_fallbacks_of_transformers_attention_are_counted():
    model = of_transformers("vit_triton")
    with vit_triton.use_backend("triton"):
        model(images())
        assert vit_triton.fallbacks(model) == {}
        model.double()(images().double())
    (reasons,) = vit_triton.fallbacks(model).values()
    assert reasons == {"torch.float64 input": 1}


# --- PyTorch's FLOP counters -------------------------------------------------------------------------------


def test_flops_match_the_original_model():
    def flops(model: nn.Module) -> tuple[int, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            model(images())
        with torch.no_grad(), vit_triton.portable_operators(), torch.profiler.profile(with_flops=True) as profile:
            model(images())
        return counted.get_total_flops(), sum(event.flops for event in profile.key_averages())

    model = make()
    theirs = flops(model)
    vit_triton.accelerate(model, "triton")
    assert flops(model) == theirs and min(theirs) > 0
    ours = vit_triton.ViT(**BASE, backend="triton")
    with vit_triton.portable_operators():
        counted = flops(ours)
    ours.backend = "torch"
    assert counted == flops(ours) and min(counted) > 0


# --- fuzzing -----------------------------------------------------------------------------------------------

EDITS = {
    "hook": lambda m, where: m.get_submodule(where).register_forward_hook(lambda *_: None),
    "pre-hook": lambda m, where: m.get_submodule(where).register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "changing hook": lambda m, where: m.get_submodule(where).register_forward_hook(lambda module, args, out: out + 1),
    "identity": lambda m, where: m.set_submodule(where, nn.Identity()),
    "wrapped": lambda m, where: m.set_submodule(where, nn.Sequential(m.get_submodule(where), nn.Tanh())),
    "no gradient": lambda m, where: m.get_submodule(where).requires_grad_(False),
    "double": lambda m, where: m.get_submodule(where).double(),
    "bfloat16": lambda m, where: m.get_submodule(where).bfloat16(),
}
PARTS = ["norm1", "norm2", "attn.qkv", "attn.proj", "attn.q_norm", "mlp.act", "mlp.fc1", "mlp.fc2", "ls1", "drop_path1"]


@given(
    sizes=st.fixed_dictionaries(
        {
            "embed_dim": st.sampled_from([8, 24]),
            "num_heads": st.sampled_from([1, 2]),
            "depth": st.integers(1, 2),
            "qk_norm": st.booleans(),
            "init_values": st.sampled_from([None, 0.5]),
            "global_pool": st.sampled_from(["token", "avg", "map"]),
            "reg_tokens": st.integers(0, 2),
        }
    ),
    edits=st.lists(st.tuples(st.sampled_from(sorted(EDITS)), st.sampled_from(PARTS), st.booleans()), max_size=3),
    gradients=st.booleans(),
)
@settings(max_examples=max(1, settings().max_examples // 2))
def test_fuzz_of_edited_models(sizes, edits, gradients):
    """Modules are hooked, replaced or cast, before or after: results match the original model's, unless it raises."""
    if sizes["qk_norm"] and sizes["num_heads"] > sizes["embed_dim"]:
        return
    theirs = make(**sizes, class_token=sizes["global_pool"] != "avg")
    ours = copy.deepcopy(theirs)
    results = []
    for model in (theirs, ours):
        for kind, where, before in edits:
            if before:
                EDITS[kind](model, f"blocks.0.{where}")
        report = vit_triton.accelerate(model, "triton") if model is ours else None
        for kind, where, before in edits:
            if not before:
                EDITS[kind](model, f"blocks.0.{where}")
        with torch.set_grad_enabled(gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results.append(model(images()))
            except Exception as error:
                results.append(error)
    if isinstance(results[0], Exception):
        return  # ours may accept more: the kernels support norms of another dtype
    assert not isinstance(results[1], Exception), results[1]
    exact = copy.deepcopy(theirs).double()(images().double())
    assert_model_as_precise(results[1], results[0], exact, longest_sum(theirs))
    assert all(reason for reasons in report.fallbacks().values() for reason in reasons)
