"""Accelerated models with relative positions of timm and transformers (BEiT, SAM): logits and all gradients."""

import copy
import math
import re
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from conftest import EMULATOR, INTERPRETER
from parity import assert_accelerated
from precision import assert_same
from timm.models import beit, vision_transformer_sam
from torch import Tensor, nn

import vit_triton
from benchmarks import memory
from vit_triton import reference

if INTERPRETER or EMULATOR:
    pytest.skip("models run on the CPU target only", allow_module_level=True)

# real widths, one or two blocks
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "BEiT B": ("beit_base_patch16_224", 48, {"depth": 2}),
    "BEiT L": ("beit_large_patch16_224", 48, {}),
    "BEiT v2 B": ("beitv2_base_patch16_224", 48, {}),
    "SAM B, windows and map": ("samvit_base_patch16", 80, {"depth": 2, "window_size": 3, "global_attn_indexes": (1,)}),
}


def model_of(architecture: str, size: int, **changes: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(architecture, img_size=size, num_classes=5, **{"depth": 1, **changes})
    shake(model)
    return model.eval(), torch.randn(2, 3, size, size)


def shake(model: nn.Module) -> None:
    """Give every parameter an effect: tables of positions and biases start at 0, LayerScales at 1e-5."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or "relative_position" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim == 2 and parameter.shape[0] == 5:
                parameter.normal_(std=0.05)  # BEiT's head starts with small weights


def left(report: Any) -> set[str]:
    """Classes inside the blocks that were not replaced."""
    return {entry.cls for entry in report.not_replaced if re.search(r"(blocks|layers)\.", entry.name)}


@pytest.mark.parametrize("name, size, changes", MODELS.values(), ids=MODELS)
def test_timm(name, size, changes):
    model, images = model_of(name, size, **changes)
    report = assert_accelerated(model, images, low=True)
    assert not left(report) and {"Block", "Attention", "Mlp"} <= {entry.cls for entry in report.replaced}


SMALL = dict(embed_dim=128, num_heads=2)  # with the head size and the numbers of tokens above, for the same kernels
BEIT = "beit_base_patch16_224"
VARIANTS = {
    "no LayerScale": {"init_values": None},
    "no bias": {"qkv_bias": False},
    "SwiGLU with a norm": {"swiglu_mlp": True, "scale_mlp": True},
    "MLP with a norm": {"scale_mlp": True},
    "shared bias": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "shared bias and one per block": {"use_shared_rel_pos_bias": True},
    "no relative positions": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
    "RMSNorm": {"norm_layer": timm.layers.RmsNorm},
    "not square": {"img_size": (32, 48)},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_beit(changes, fused):
    torch.manual_seed(0)
    options = dict(img_size=(48, 48), num_classes=5, depth=2, patch_size=16, **SMALL)
    model = beit.Beit(**{**options, "use_rel_pos_bias": True, "init_values": 0.1, "qkv_bias": True, **changes})
    shake(model)
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = fused, 0.3  # PyTorch's fused attention ignores the scale
        block.attn.qkv_bias_separate = fused
    report = assert_accelerated(model.eval(), torch.randn(2, 3, *model.patch_embed.img_size))
    assert not left(report)


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # timm resizes the table
def test_window_of_beit_is_read_in_every_call():
    model, images = model_of(BEIT, 48, **SMALL)
    ours = copy.deepcopy(model)
    report = vit_triton.accelerate(ours, "triton", strict=True)
    assert report.replaced
    ours(images)
    for each in (model, ours):
        each.set_input_size((64, 32))
    images = torch.randn(2, 3, 64, 32)
    assert_same(ours(images), model(images), 192)
    assert_accelerated(model, images)


SAM_VARIANTS = {
    "no windows": {"window_size": 0},
    "windows without padding": {"window_size": 5},
    "LayerScale": {"init_values": 0.5},
    "qk-norm": {"qk_norm": True},
    "no relative positions": {"use_rel_pos": False},
    "no bias": {"qkv_bias": False},
}


def sam(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    options = dict(img_size=80, num_classes=5, depth=2, global_attn_indexes=(1,), window_size=3, use_rel_pos=True)
    model = vision_transformer_sam.VisionTransformerSAM(**{**options, **SMALL, "neck_chans": 16, **changes})
    shake(model)
    return model.eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("changes", SAM_VARIANTS.values(), ids=SAM_VARIANTS)
def test_variants_of_sam(changes, fused):
    model = sam(**changes)
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = fused, 0.3
    assert not left(assert_accelerated(model, torch.randn(2, 3, 80, 80)))


def test_maps_of_another_size_resample_the_positions_of_sam():
    assert not left(assert_accelerated(sam(), torch.randn(2, 3, 80, 48)))


@pytest.mark.parametrize("make", [lambda: model_of(BEIT, 48, **SMALL)[0], sam], ids=["BEiT", "SAM"])
def test_each_dropout_of_timm_is_applied(make):
    # probability 1 makes the outputs comparable
    for where in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"):
        model = make()
        model.get_submodule(f"blocks.0.{where}").p = 1.0
        size = 48 if isinstance(model, beit.Beit) else 80
        assert_accelerated(model.train(), torch.randn(2, 3, size, size))


def test_drop_path_draws_as_in_timm():
    """SAM drops the windows of an image one by one."""
    model, _ = model_of(BEIT, 48, **SMALL, drop_path_rate=0.5, depth=2)
    assert_accelerated(model.train(), torch.randn(5, 3, 48, 48), seed=3)
    assert_accelerated(sam(drop_path_rate=0.5, global_attn_indexes=()).train(), torch.randn(3, 3, 80, 80), seed=3)
    assert_accelerated(sam(drop_path_rate=0.5, window_size=0).train(), torch.randn(5, 3, 80, 80), seed=3)


def test_blocks_of_timm_that_are_not_supported():
    model = sam(use_rel_pos=False, use_rope=True)
    reasons = {entry.name: entry.detail for entry in vit_triton.accelerate(model, "triton").not_replaced}
    assert "rope" in reasons["blocks.0"] and "rope" in reasons["blocks.0.attn"]


def test_tokens_of_another_number_raise_as_in_timm():
    model, _ = model_of(BEIT, 48, **SMALL)
    report = vit_triton.accelerate(model, "triton")
    with pytest.raises(RuntimeError, match="size of tensor|expand"):
        model.blocks[0](torch.randn(2, 9, 128))
    assert "broadcast" in str(report.fallbacks())


# --- transformers ------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images, **self.options).last_hidden_state


def hf_beit(call: dict[str, Any] | None = None, **changes: Any) -> Wrapped:
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, num_attention_heads=2, intermediate_size=256, num_hidden_layers=2, image_size=48)
    options = dict(use_relative_position_bias=True, layer_scale_init_value=0.5, drop_path_rate=0.0)
    model = hf.BeitModel(hf.BeitConfig(**{**sizes, **options, **changes}), add_pooling_layer=False)
    shake(model)
    return Wrapped(model, **(call or {})).eval()


def hf_sam(**changes: Any) -> Wrapped:
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, num_attention_heads=2, mlp_dim=256, num_hidden_layers=2, image_size=80)
    options = dict(window_size=3, global_attn_indexes=[1], output_channels=16)
    options["initializer_range"] = 0.05  # the default, 1e-10, would hide every branch
    model = hf.SamVisionModel(hf.SamVisionConfig(**{**sizes, **options, **changes}))
    shake(model)
    return Wrapped(model).eval()


WIDE = dict(hidden_size=768, num_attention_heads=12)
TRANSFORMERS = {
    "BEiT B": lambda: hf_beit(**WIDE, intermediate_size=3072),
    "SAM B": lambda: hf_sam(**WIDE, mlp_dim=3072),
}


@pytest.mark.parametrize("make", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers(make):
    model = make()
    size = model.model.config.image_size
    report = assert_accelerated(model, torch.randn(2, 3, size, size), low=True)
    assert not left(report) and {"BeitLayer", "SamVisionLayer"} & {entry.cls for entry in report.replaced}


def mask() -> Tensor:
    valid = torch.ones(2, 10, dtype=torch.long)
    valid[0, 7:] = 0
    return valid


TRANSFORMERS_VARIANTS = {
    "no LayerScale": lambda: hf_beit(layer_scale_init_value=0.0),
    "no relative positions": lambda: hf_beit(use_relative_position_bias=False),
    "shared bias": lambda: hf_beit(use_relative_position_bias=False, use_shared_relative_position_bias=True),
    "shared bias and one per layer": lambda: hf_beit(use_shared_relative_position_bias=True),
    "interpolated": lambda: hf_beit({"interpolate_pos_encoding": True}, use_absolute_position_embeddings=True),
    "attn_implementation": lambda: hf_beit(attn_implementation="vit_triton"),
    "not square": lambda: hf_beit(image_size=(64, 32)),
    "mask": lambda: hf_beit({"attention_mask": mask()}),
    "mask without a bias": lambda: hf_beit({"attention_mask": mask()}, use_relative_position_bias=False),
    "SAM, no relative positions": lambda: hf_sam(use_rel_pos=False),
    "SAM, no bias": lambda: hf_sam(qkv_bias=False),
}


@pytest.mark.parametrize("make", TRANSFORMERS_VARIANTS.values(), ids=TRANSFORMERS_VARIANTS)
def test_variants_of_transformers(make):
    model = make()
    size = model.model.config.image_size
    images = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    assert not [name for name in left(assert_accelerated(model, images)) if name != "BeitAttention"]


def test_maps_of_another_size_of_transformers():
    """The library interpolates the bias; its reshape swaps height and width."""
    for size in ((64, 32), (32, 64)):
        assert_accelerated(hf_beit(), torch.randn(2, 3, *size))


def test_drop_path_of_transformers(monkeypatch):
    """The second layer drops samples 0 and 2 in both branches; transformers draws other numbers."""
    model, images = hf_beit(drop_path_rate=0.5).train(), torch.randn(4, 3, 48, 48)
    drawn = torch.tensor([0.1, 0.9, 0.1, 0.9])
    monkeypatch.setattr(torch, "rand", lambda shape, **options: drawn.to(**options).view(shape))
    factors = torch.tensor([0.0, 2.0, 0.0, 2.0])
    monkeypatch.setattr(reference, "drop_path_factors", lambda x, p: factors if p == 0.5 else None)
    assert not left(assert_accelerated(model, images))


def test_dropouts_of_transformers():
    for implementation in ("eager", "sdpa"):  # "sdpa" of SAM ignores the dropout
        model = hf_sam(attention_dropout=1.0, attn_implementation=implementation)
        assert_accelerated(model.train(), torch.randn(2, 3, 80, 80))
    for changes in ({"attention_probs_dropout_prob": 1.0}, {"hidden_dropout_prob": 1.0}):
        assert_accelerated(hf_beit(**changes).train(), torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize("make", [hf_beit, hf_sam], ids=["BEiT", "SAM"])
def test_outputs_of_transformers(make):
    """hidden_states of all layers, and attention weights, for which the layers fall back."""
    untouched = make(attn_implementation="eager").model
    ours, size = copy.deepcopy(untouched), untouched.config.image_size
    images = torch.randn(2, 3, size, size)
    vit_triton.accelerate(ours, "triton")
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        results = [model(pixel_values=images, **options) for model in (ours, untouched)]
        a, b = (each.attentions if "output_attentions" in options else each.hidden_states for each in results)
        assert len(a) == len(b) > 1
        assert_same(a, b, 96)


def test_lambda_of_another_value_is_left_to_transformers():
    model, images = hf_beit(layer_scale_init_value=0.0), torch.randn(2, 3, 48, 48)
    vit_triton.accelerate(model, "triton")
    model.model.layers[0].lambda_1 = 0.5
    expected = vit_triton.restore(copy.deepcopy(model))(images)
    assert_same(model(images), expected, 192)


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: sam(num_heads=8), lambda: hf_sam(num_attention_heads=8)])
def test_attention_of_sam_on_the_whole_map_has_no_matrix_of_scores(make):
    """Neither forward nor backward allocates heads * N * N elements; 24 x 24 tokens make this the largest tensor."""
    block = make()
    block = block.blocks[0] if hasattr(block, "blocks") else block.model.vision_encoder.layers[0]
    block.window_size, tokens = 0, 24 * 24
    allocated = {}
    for name in ("theirs", "ours"):
        if name == "ours":
            vit_triton.accelerate(block, "triton", strict=True)
        x = torch.randn(1, 24, 24, 128, requires_grad=True)
        with memory.count_storages(ours=name == "ours") as tracker:
            block(x).sum().backward()
        allocated[name] = max(math.prod(shape) for shape, _ in tracker.tensors)
    scores = 8 * tokens**2
    assert allocated["ours"] < scores / 2 < scores <= allocated["theirs"]


# --- compiled, prepacked, other backends -------------------------------------------------------------------

ALL = {
    "timm BEiT": (lambda: model_of(BEIT, 48, **SMALL)[0], 48),
    "timm SAM": (sam, 80),
    "transformers BEiT": (hf_beit, 48),
    "transformers SAM": (hf_sam, 80),
}


@pytest.mark.parametrize("make, size", ALL.values(), ids=ALL)
def test_compiled_and_prepacked(make, size):
    model, images = make(), torch.randn(2, 3, size, size)
    expected = copy.deepcopy(model)(images)
    vit_triton.accelerate(model, "triton", strict=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(images), expected, 192)
    compiled(images).sum().backward()
    vit_triton.prepack(model)
    with torch.no_grad():
        for _ in range(2):
            assert_same(model(images), expected, 192)
    vit_triton.unpack(model)
    for backend in ("torch", "auto"):
        vit_triton.accelerate(model, backend, strict=True)
        assert_same(model(images), expected, 192)
    report = vit_triton.accelerate(model, "triton", strict=True, mlp=False)
    assert [entry for entry in report.replaced if "Attention" in entry.cls]  # without the block
    assert_same(model(images), expected, 192)
