"""Accelerated NaFlexVit of timm, packed and with masks: logits and all gradients."""

import copy
from typing import Any

import pytest
import timm
import torch
from parity import assert_accelerated
from precision import assert_same
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

import vit_triton
from vit_triton import functional as F

SIZES = ((4, 5), (2, 3), (3, 3), (1, 7))  # rows and columns of patches; 20, 6, 9 and 7 of 20 patches are valid


class NaFlex(nn.Module):
    """A model with the grid of a batch; valid patches first, unless ``scattered``."""

    def __init__(self, model: nn.Module, sizes=SIZES, scattered: bool = False) -> None:
        super().__init__()
        self.model = model
        longest = max(h * w for h, w in sizes) + 2 * scattered
        self.coord = torch.zeros(len(sizes), longest, 2, dtype=torch.long)
        self.valid = torch.zeros(len(sizes), longest, dtype=torch.bool)
        for i, (h, w) in enumerate(sizes):
            places = torch.randperm(longest)[: h * w].sort().values if scattered else torch.arange(h * w)
            self.coord[i, places] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
            self.valid[i, places] = True

    def forward(self, patches: Tensor) -> Tensor:
        return self.model({"patches": patches, "patch_coord": self.coord, "patch_valid": self.valid})

    def patches(self) -> Tensor:
        return torch.randn(*self.valid.shape, 16 * 16 * 3, generator=torch.Generator().manual_seed(1))


def shake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # the initial values would hide swaps
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def published(name: str, **changes: Any) -> NaFlex:
    torch.manual_seed(0)
    return NaFlex(shake(timm.create_model(name, num_classes=5, **{"depth": 1, **changes}))).eval()


def small(scattered: bool = False, **changes: Any) -> NaFlex:
    torch.manual_seed(0)
    options = dict(embed_dim=48, num_heads=2, depth=2, patch_size=16, global_pool="avg", pos_embed_grid_size=(6, 6))
    model = NaFlexVit(NaFlexVitCfg(**{**options, **changes}), num_classes=5)
    return NaFlex(shake(model), scattered=scattered).eval()


@pytest.fixture
def calls(monkeypatch):
    """The numbers of tokens of each call of attention: packed, or padded to (batch, tokens)."""
    seen: list[Any] = []
    varlen, packed = F.attention_varlen, F.attention_packed
    monkeypatch.setattr(F, "attention_varlen", lambda q, *a, **o: seen.append(len(q)) or varlen(q, *a, **o))
    monkeypatch.setattr(F, "attention_packed", lambda x, **o: seen.append(tuple(x.shape[:2])) or packed(x, **o))
    return seen


PUBLISHED = {
    "gap": ("naflexvit_base_patch16_gap", {}),
    "map": ("naflexvit_base_patch16_map", {}),
    "SigLIP": ("naflexvit_base_patch16_siglip", {}),
    "So150m, register": ("naflexvit_so150m2_patch16_reg1_gap", {}),
    "RADIO": ("naflexvit_base_patch16_radio_v3", {}),
}


@pytest.mark.parametrize("name, changes", PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_are_packed(name, changes, calls):
    model = published(name, **changes)
    prefix = model.model.num_prefix_tokens
    report = assert_accelerated(model, model.patches(), low=True)
    assert set(calls) == {42 + 4 * prefix}
    assert [entry.detail for entry in report.replaced if entry.cls == "NaFlexVit"] == ["packed sequences"]


ROPE = dict(rope_type="axial", pos_embed="none")
VARIANTS = {
    "class token": dict(class_token=True, reg_tokens=2, global_pool="token"),
    "max": dict(global_pool="max"),
    "attention over prefix tokens": dict(class_token=True, global_pool="map", pool_include_prefix=True),
    "qk-norm, LayerScale": dict(qk_norm=True, init_values=0.5),
    "rotary": ROPE,
    "rotary, prefix": {**ROPE, "class_token": True, "reg_tokens": 1},
    "DINOv3": dict(rope_type="dinov3", rope_rotate_half=True, class_token=True, qk_norm=True, init_values=0.5),
    "EVA": dict(attn_type="eva", swiglu_mlp=True, scale_mlp_norm=True, scale_attn_inner_norm=True, qkv_fused=False),
    "RMSNorm": {**ROPE, "norm_layer": "rmsnorm", "qk_norm": True},
    "key mask": dict(use_key_only_attn_mask=True),
}


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_packed(changes, scattered, calls):
    model = small(scattered, **changes)
    assert_accelerated(model, model.patches())
    assert set(calls) == {42 + 4 * model.model.num_prefix_tokens}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_blocks_with_masks(changes, calls):
    """A mask of the caller is not packed; the blocks run on the kernels with it."""

    class Masked(NaFlex):
        def forward(self, patches):
            mask = torch.zeros(4, 1, 1, self.valid.shape[1] + self.model.num_prefix_tokens, dtype=patches.dtype)
            mask[..., self.model.num_prefix_tokens :][~self.valid[:, None, None]] = -2.0
            return self.model(dict(patches=patches, patch_coord=self.coord, patch_valid=self.valid, attn_mask=mask))

    model = Masked(small(**changes).model).eval()
    report = assert_accelerated(model, model.patches())
    assert set(calls) == {(4, 20 + model.model.num_prefix_tokens)} and not report.fallbacks()


def test_models_that_are_not_packed(calls):
    """Gradient checkpointing, learned rotary tables and hooks run the blocks with timm's mask."""
    checkpointed, mixed, hooked = small(), small(rope_type="mixed"), small()
    checkpointed.model.set_grad_checkpointing()
    for model in (checkpointed, mixed):
        assert_accelerated(model, model.patches())
    with torch.no_grad():
        expected = hooked(hooked.patches())
        report = vit_triton.accelerate(hooked, "triton")
        hooked.model.blocks[1].attn.register_forward_hook(lambda *args: None)
        assert_same(hooked(hooked.patches()), expected, 192)
    vit_triton.accelerate(checkpointed, "triton")
    checkpointed.model.set_grad_checkpointing(False)
    vit_triton.accelerate(checkpointed.model.blocks[0], "torch")
    with torch.no_grad():
        assert_same(checkpointed(hooked.patches()), expected, 192)
    assert report.fallbacks().keys() == {"model.blocks.1"} and all(isinstance(call, tuple) for call in calls)


def test_drop_path_and_patch_dropout_draw_as_in_timm(calls):
    dropped = dict(patch_drop_rate=0.4)
    for changes in (dict(drop_path_rate=0.5, init_values=0.5), dropped, {**ROPE, **dropped}):
        model = small(**changes)
        assert_accelerated(model.train(), model.patches(), seed=3)
    assert all(isinstance(call, int) for call in calls) and len(set(calls)) > 1


def test_each_dropout_is_applied(calls):
    for where in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"):
        model = small()
        model.model.blocks[0].get_submodule(where).p = 1.0
        assert_accelerated(model.train(), model.patches())
    assert set(calls) == {42}


def test_valid_tokens_of_features():
    model = small(class_token=True)
    ours, valid = copy.deepcopy(model).model, torch.cat((torch.ones(4, 1, dtype=torch.bool), model.valid), 1)
    vit_triton.accelerate(ours, "triton")
    arguments = model.patches(), model.coord, model.valid
    with torch.no_grad():
        features, expected = ours.forward_features(*arguments), model.model.forward_features(*arguments)
    assert features.keys() == expected.keys() and torch.equal(features["patch_valid"], model.valid)
    assert_same(features["patches"][valid], expected["patches"][valid], 192)


def test_images_and_intermediates():
    model = small().model
    images, naflex = torch.randn(2, 3, 64, 32), NaFlex(model)
    batch = {"patches": naflex.patches(), "patch_coord": naflex.coord, "patch_valid": naflex.valid}
    with torch.no_grad():
        expected = model(images), model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
        report = vit_triton.accelerate(model, "triton")
        ours = model(images), model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
    assert_same(ours[0], expected[0], 192)
    assert_same(*(each["image_features"][naflex.valid] for each in (ours[1], expected[1])), 192)
    assert not report.fallbacks()


def test_float64_embeds_once():
    """A call that is not packed must not run the embeddings twice: hooks and patch dropout would see it."""
    model, embedded = small(patch_drop_rate=0.5).train().double(), []
    model.model.embeds.register_forward_hook(lambda *call: embedded.append(call))
    vit_triton.accelerate(model, "triton")
    model(model.patches().double())
    assert len(embedded) == 1


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_other_backends(backend):
    model = small(**ROPE)
    expected = model(model.patches())
    vit_triton.accelerate(model, backend)
    assert_same(model(model.patches()), expected, 192)


def test_a_bool_mask_of_attention_pooling():
    pool = timm.layers.AttentionPoolLatent(48, num_heads=2, mlp_ratio=2.0).eval()
    x, mask = torch.randn(2, 7, 48), torch.rand(2, 1, 1, 7) > 0.4
    for fused in (True, False):
        pool.fused_attn = fused
        expected = pool(x, attn_mask=mask)
        report = vit_triton.accelerate(pool, "triton")
        assert_same(pool(x, attn_mask=mask), expected, 192)
        assert bool(report.fallbacks()) != fused
        vit_triton.restore(pool)


def test_copied_and_compiled():
    model = small()
    vit_triton.accelerate(model, "triton")
    expected = model(model.patches())
    assert_same(copy.deepcopy(model)(model.patches()), expected, 192)
    assert "forward_features" in vars(type(model.model))
    vit_triton.restore(model)
    assert type(model.model) is NaFlexVit
