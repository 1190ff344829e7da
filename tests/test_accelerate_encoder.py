"""Blocks of accelerated models as one operator in inference, and models whose head reads only the class token."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import transformers as hf
import vit_pytorch
from precision import assert_same
from timm.layers import Mlp
from torch import Tensor, nn
from torchvision.models import vision_transformer

import vit_triton
from vit_triton import functional as F
from vit_triton.integrations.recipes import accelerated_class, container_for

TERMS = 96  # length of the longest sum
TIMM = dict(img_size=16, patch_size=8, embed_dim=24, num_heads=2, num_classes=5, depth=4, init_values=0.1)
HF = dict(hidden_size=24, num_attention_heads=2, num_hidden_layers=4, image_size=16, patch_size=8, num_labels=5)
HIDDEN = dict(intermediate_size=48)


def of_timm(**changes) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**TIMM, **changes})


def of_eva(name: str, **changes) -> nn.Module:
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, num_heads=2, depth=4, num_classes=5)
    return timm.create_model(name, **{**sizes, **changes})


def of_torchvision() -> nn.Module:
    sizes = dict(image_size=16, patch_size=8, num_layers=4, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=5)
    model = vision_transformer.VisionTransformer(**sizes)
    nn.init.normal_(model.heads.head.weight)  # initialized to 0
    return model


def of_vit_pytorch(**changes) -> nn.Module:
    sizes = dict(image_size=16, patch_size=8, num_classes=5, dim=24, depth=4, heads=2, mlp_dim=48, dim_head=8)
    return vit_pytorch.ViT(**{**sizes, **changes})


# model, names of its blocks, whether the head reads only the class token
MODELS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "timm": (of_timm, "blocks", True),
    "timm, mean": (lambda: of_timm(global_pool="avg"), "blocks", False),
    "timm, registers": (lambda: of_timm(reg_tokens=3, no_embed_class=True, init_values=None), "blocks", True),
    "timm, attention pool": (lambda: of_timm(global_pool="map"), "blocks", False),
    "timm, all tokens": (lambda: of_timm(global_pool=""), "blocks", False),
    "timm, distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM), "blocks", False),
    "timm, DINOv3": (lambda: of_eva("vit_small_patch16_dinov3"), "blocks", False),
    "timm, EVA-02": (lambda: of_eva("eva02_small_patch14_224"), "blocks", False),
    "torchvision": (of_torchvision, "encoder.layers", True),
    "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**HF, **HIDDEN)), "vit.layers", True),
    "ViTModel": (lambda: hf.ViTModel(hf.ViTConfig(**HF, **HIDDEN)), "layers", False),
    "DeiT": (lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**HF, **HIDDEN)), "deit.layers", True),
    "DINOv2": (lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**HF)), "dinov2.encoder.layer", False),
    "DINOv3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, **HIDDEN)), "model.layer", False),
    "SigLIP": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**HF, **HIDDEN)), "encoder.layers", False),
    "CLIP": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**HF, **HIDDEN)), "encoder.layers", False),
    "vit_pytorch": (of_vit_pytorch, "transformer.layers", True),
    "vit_pytorch, mean": (lambda: of_vit_pytorch(pool="mean"), "transformer.layers", False),
    "vit_pytorch, all tokens": (lambda: of_vit_pytorch(num_classes=0), "transformer.layers", False),
}
MODULAR = [name for name in MODELS if "vit_pytorch" not in name]  # vit_pytorch's blocks are not modules
FIRST = ["timm", "torchvision", "ViT", "vit_pytorch"]


def make(name: str = "timm") -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # the initial values would hide swaps
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def tensors(output) -> list[Tensor]:
    """The tensors in the output of a model."""
    if isinstance(output, Tensor):
        return [output]
    return [x for x in output.values() if isinstance(x, Tensor)]


@torch.no_grad()
def outputs(model: nn.Module, *args, **kwargs) -> list[Tensor]:
    return tensors(model(*args, **kwargs))


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, bool]]:
    """Number of blocks and ``first_token`` of every call of functional.encoder."""
    seen: list[tuple[int, bool]] = []
    encoder = F.encoder

    def noted(x, blocks, **options):
        seen.append((len(blocks), options.get("first_token", False)))
        return encoder(x, blocks, **options)

    monkeypatch.setattr(F, "encoder", noted)
    return seen


def apart(model: nn.Module) -> nn.Module:
    """A copy that runs its blocks one by one."""
    model = copy.deepcopy(model)
    vit_triton.accelerate(model, "triton")
    for module in model.modules():
        cls = accelerated_class(module)
        if cls is not None and container_for(cls._replaced) is not None:
            module.__class__ = cls._replaced
    return model


# --- one operator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_one_operator_in_inference(name, calls):
    model, (_, _, class_token) = make(name), MODELS[name]
    theirs, blocks = outputs(model, images()), apart(model)
    expected = outputs(blocks, images())
    if "vit_pytorch" not in name:
        assert calls == []
    calls.clear()
    report = vit_triton.accelerate(model, "triton", strict=True)
    assert_same(outputs(model, images()), theirs, TERMS)
    assert calls == [(4, class_token)]
    assert_same(outputs(model, images()), expected, TERMS)
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(images())
    ran = {event.key: event.count for event in profile.key_averages() if event.key.startswith("vit_triton::")}
    assert ran["vit_triton::encoder_fwd"] == 1 and "vit_triton::attention_packed_fwd" not in ran
    whats = [entry.detail for entry in report.replaced]
    assert whats.count("one operator in inference") == ("vit_pytorch" not in name)
    assert whats.count("class token only in inference") == class_token
    assert report.fallbacks() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 224, 16), (3, 40, 8), (2, 21, 7)], ids=str)
def test_results_for_shapes_and_dtypes(shape, dtype, calls):
    batch, size, patch = shape
    torch.manual_seed(0)
    model = of_timm(img_size=size, patch_size=patch, embed_dim=66, num_heads=3).eval().to(dtype)
    x = images(batch, size).to(dtype)
    expected = outputs(apart(model), x)
    calls.clear()
    vit_triton.accelerate(model, "triton", strict=True)
    assert_same(outputs(model, x), expected, 264)
    assert calls == [(4, True)]


# --- what could tell the difference ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_blocks_run_one_by_one_with_gradients_or_in_training(name, calls):
    model = make(name)
    vit_triton.accelerate(model, "triton", strict=True)
    (out, *_) = tensors(model(images()))
    out.sum().backward()
    model.train()
    (out, *_) = tensors(model(images()))
    assert out.requires_grad and calls == [(1, False)] * 8


def drop(model: nn.Module) -> None:
    model.blocks[1].attn.proj_drop.p = 0.5
    model.train()


def shrink(model: nn.Module) -> None:
    model.blocks[0].attn.scale = 0.5


def convert_to_float64(model: nn.Module) -> None:
    """Make the output of the last block float64, which its library computes."""
    for module in (model.blocks[3].ls2, model.norm, model.head):
        module.double()


def hook(*_) -> None:
    return None


RUNS: dict[str, tuple[Callable[[nn.Module], object], list[tuple[int, bool]]]] = {
    "a hook on a block": (lambda m: m.blocks[1].register_forward_hook(hook), [(1, False), (2, True)]),
    "a pre-hook on a block": (lambda m: m.blocks[0].register_forward_pre_hook(hook), [(3, True)]),
    "a backward hook": (lambda m: m.blocks[0].register_full_backward_hook(hook), [(3, True)]),
    "a hook on the last block": (lambda m: m.blocks[3].register_forward_hook(hook), [(3, False)]),
    "a hook on a part": (lambda m: m.blocks[2].attn.qkv.register_forward_hook(hook), [(2, False), (1, True)]),
    "a replaced forward": (lambda m: setattr(m.blocks[1], "forward", m.blocks[1].forward), [(1, False), (2, True)]),
    "a replaced part": (lambda m: setattr(m.blocks[1].mlp, "act", nn.Tanh()), [(1, False), (2, True)]),
    "another activation": (lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()), [(1, False), (1, False), (2, True)]),
    "another scale": (shrink, [(1, False), (3, True)]),
    "a block without norm": (lambda m: setattr(m.blocks[1], "norm1", nn.Identity()), [(1, False), (2, True)]),
    "a module between": (lambda m: m.blocks.insert(2, nn.Tanh()), [(2, False), (2, True)]),
    "a compiled block": (lambda m: m.blocks[1].compile(backend="eager"), [(1, False), (2, True)]),
    "a block on another backend": (lambda m: vit_triton.accelerate(m.blocks[1], "torch"), [(1, False), (2, True)]),
    "a restored block": (lambda m: vit_triton.restore(m.blocks[1]), [(1, False), (2, True)]),
    "another dtype": (convert_to_float64, [(3, False)]),
    "dropout": (drop, [(1, False), (2, True)]),
    "the head reads the mean": (lambda m: setattr(m, "global_pool", "avg"), [(4, False)]),
    "a hook on the norm": (lambda m: m.norm.register_forward_hook(hook), [(4, False)]),
    "another norm": (lambda m: setattr(m, "norm", nn.Softmax(1)), [(4, False)]),
    "a hook on the blocks": (lambda m: m.blocks.register_forward_hook(hook), [(4, False)]),
    "own pooling": (lambda m: setattr(m, "pool", lambda x: x.mean(1)), [(4, False)]),
    "a hook on the head": (lambda m: m.head.register_forward_hook(hook), [(4, True)]),
    "checkpointing": (lambda m: m.set_grad_checkpointing(), []),
}


@pytest.mark.parametrize("case", RUNS)
def test_observable_blocks_run_apart(case, calls):
    change, runs = RUNS[case]
    model = make()
    expected = apart(model)
    vit_triton.accelerate(model, "triton")
    results = []
    for each in (expected, model):
        calls.clear()
        change(each)
        torch.manual_seed(0)
        results.append(outputs(each, images()))
    assert calls == runs
    assert_same(*results, TERMS)


@pytest.mark.parametrize("name", MODULAR)
@pytest.mark.parametrize("part", ["", "mlp"])
def test_hooks_fire(name, part, calls):
    model = make(name)
    vit_triton.accelerate(model, "triton")
    expected, seen = outputs(model, images()), []
    block = model.get_submodule(MODELS[name][1])[1]
    calls.clear()
    with block.get_submodule(part).register_forward_hook(lambda module, args, output: seen.append(output.shape)):
        assert_same(outputs(model, images()), expected, TERMS)
    assert len(seen) == 1 and [count for count, _ in calls] == [1, 2]
    reasons = vit_triton.fallbacks(model)
    assert reasons == ({f"{MODELS[name][1]}.{block_name(name)}": {"mlp: has hooks": 1}} if part else {})
    outputs(model, images())
    assert calls[2:] == [(4, MODELS[name][2])]


AFTER_THE_BLOCKS = {
    "timm": ["norm", "blocks"],
    "torchvision": ["encoder.ln", "encoder", "encoder.layers"],
    "ViT": ["vit.layernorm", "vit", "vit.pooler"],
    "vit_pytorch": ["transformer.norm", "transformer"],
}


@pytest.mark.parametrize(("name", "where"), [(name, where) for name in FIRST for where in AFTER_THE_BLOCKS[name]])
def test_hooks_after_the_blocks_see_all_tokens(name, where):
    model = make(name)
    if where == "vit.pooler":
        model.vit.pooler = hf.models.vit.modeling_vit.ViTPooler(model.vit.config)
    vit_triton.accelerate(model, "triton")
    expected, seen = outputs(model, images()), []

    def see(module, args, output):
        seen.append(args[0] if where == "vit.pooler" else tensors(output)[0])

    model.get_submodule(where).register_forward_hook(see)
    assert_same(outputs(model, images()), expected, TERMS)
    assert [tuple(x.shape) for x in seen] == [(2, 5, 24)]


def block_name(name: str) -> str:
    return "encoder_layer_1" if name == "torchvision" else "1"


def test_hook_in_vit_pytorch_makes_the_transformer_fall_back(calls):
    model = make("vit_pytorch")
    expected = outputs(model, images())
    vit_triton.accelerate(model, "triton")
    seen: list[int] = []
    with model.transformer.layers[1][1].register_forward_hook(lambda *_: seen.append(1)):
        assert_same(outputs(model, images()), expected, TERMS)
    assert seen == [1] and calls == [] and list(vit_triton.fallbacks(model)) == ["transformer"]


def test_strict_raises_for_hooks_and_not_in_training():
    model = make()
    vit_triton.accelerate(model, "triton", strict=True)
    model.train()(images())
    model.blocks[1].norm2.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match=r"^blocks\.1 \(Block\) would fall back .* norm2: has hooks"):
        outputs(model, images())


def test_unusual_inputs_run_one_by_one(calls):
    model = make()
    theirs = copy.deepcopy(model)
    vit_triton.accelerate(model, "triton")
    with torch.no_grad():
        assert torch.equal(model.double()(images().double()), theirs.double()(images().double()))
        model.float()
        theirs.float()
        mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.3
        mask[..., 0] = True
        assert_same(model(images(), attn_mask=mask), theirs(images(), attn_mask=mask), TERMS)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(model(images()), theirs(images()))
        assert calls == []
        with vit_triton.use_backend("torch"):
            model(images())
        assert calls == [(4, True)]  # accelerate's backend has priority
        vit_triton.accelerate(model)
        with vit_triton.use_backend("torch"):
            model(images())
        with vit_triton.portable_operators():
            model(images())
        assert len(calls) == 1
    assert vit_triton.fallbacks(model) == {}


def test_global_hooks_fire(calls):
    model, seen = make(), []
    vit_triton.accelerate(model, "triton")
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        outputs(model, images())
    assert model.blocks[3].attn.qkv in seen and calls == []


# --- rotary positions --------------------------------------------------------------------------------------

ROTARY_RUNS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "one table": (lambda: of_eva("vit_small_patch16_dinov3"), [4]),
    "a table for each block": (lambda: of_eva("vit_small_patch16_rope_mixed_224"), []),
    "no table": (lambda: of_eva("eva_giant_patch14_224", mlp_ratio=2.0), [4]),
    "norm inside the MLP": (lambda: of_eva("eva02_base_patch14_224"), []),
    "norm inside attention": (lambda: of_eva("vit_small_patch16_dinov3", qk_norm=True), []),
    "RMSNorm": (lambda: of_eva("vit_small_patch16_dinov3", norm_layer=timm.layers.RmsNorm), []),
    "post norm": (lambda: of_eva("vit_small_patch16_dinov3", use_post_norm=True), []),
}


@pytest.mark.parametrize("case", ROTARY_RUNS)
def test_rotary_blocks_run_together_if_all_receive_the_same_table(case, calls):
    model, runs = ROTARY_RUNS[case][0]().eval(), ROTARY_RUNS[case][1]
    theirs = outputs(model, images())
    vit_triton.accelerate(model, "triton", strict=True)
    assert_same(outputs(model, images()), theirs, TERMS)
    assert [count for count, _ in calls] == runs


def test_blocks_that_receive_other_tables_run_apart(calls):
    """A subclass may give each block its own table, or a mask."""

    class Halved(timm.models.Eva):
        def forward_features(self, x, **_):
            x, rope = self._pos_embed(self.patch_embed(x))
            for i, block in enumerate(self.blocks):
                x = block(x, rope=rope / (i + 1))
            return self.norm(x)

    model = of_eva("vit_small_patch16_dinov3").eval()
    model.__class__ = Halved
    theirs = outputs(model, images())
    vit_triton.accelerate(model, "triton", strict=True)
    assert_same(outputs(model, images()), theirs, TERMS)
    assert calls == []


def test_masks_of_rotary_models(calls):
    model = of_eva("vit_small_patch16_dinov3").eval()
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., 0] = True
    theirs = outputs(copy.deepcopy(model).forward_features, images(), attn_mask=mask)
    vit_triton.accelerate(model, "triton")
    assert_same(outputs(model.forward_features, images(), attn_mask=mask), theirs, TERMS)
    assert calls == []


# --- features ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_timm_intermediate_features(calls):
    model = make()
    theirs = copy.deepcopy(model)
    vit_triton.accelerate(model, "triton", strict=True)
    features = model.forward_features(images())
    assert features.shape == (2, 5, 24) and calls == [(4, False)]
    assert_same(features, theirs.forward_features(images()), TERMS)
    assert_same(model.forward_head(features), theirs(images()), TERMS)
    for stop in (False, True):
        options = dict(indices=[0, 2], stop_early=stop, intermediates_only=True)
        ours = model.forward_intermediates(images(), **options)
        assert len(ours) == 2
        assert_same(ours, theirs.forward_intermediates(images(), **options), TERMS)
    assert_same(model.get_intermediate_layers(images(), 2), theirs.get_intermediate_layers(images(), 2), TERMS)
    assert calls == [(4, False)]
    model.prune_intermediate_layers(2)
    assert len(model.blocks) == 4 and vit_triton.restore(model.blocks[:2])(features).shape == (2, 5, 24)


@torch.no_grad()
def test_features_only(calls):
    torch.manual_seed(0)
    model = of_timm(features_only=True, out_indices=[1, 3]).eval()
    theirs = model(images())
    vit_triton.accelerate(model, "triton", strict=True)
    assert_same(model(images()), theirs, TERMS)
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "CLIP"])
def test_transformers_hidden_states(name, calls):
    model = make(name)
    theirs = model(images(), output_hidden_states=True).hidden_states
    model = make(name)
    vit_triton.accelerate(model, "triton", strict=True)
    ours = model(images(), output_hidden_states=True).hidden_states
    assert len(ours) == 5 and calls == []
    assert_same(ours, theirs, TERMS)
    model(images())
    assert calls == [(4, MODELS[name][2])]  # the hooks that record outputs are idle


@torch.no_grad()
def test_transformers_layers_remain_a_module_list():
    model = make("ViT")
    layers = model.vit.layers
    vit_triton.accelerate(model, "triton")
    assert model.vit.layers is layers and model.get_submodule("vit.layers") is layers
    seen: list[object] = []
    model.vit.layernorm.register_forward_hook(lambda *_: seen.append(model.vit.layers))
    model(images())
    assert seen == [layers]
    model.vit.layers = layers[:2]
    assert len(model.vit.layers) == 2
    model(images())
    del model.vit.layers
    assert not hasattr(model.vit, "layers")


@torch.no_grad()
def test_transformers_attention_mask_is_applied(calls):
    model = make("ViT")
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    theirs = outputs(model, images(), attention_mask=mask)
    vit_triton.accelerate(model, "triton")
    assert_same(outputs(model, images(), attention_mask=mask), theirs, TERMS)
    assert calls == []


class Meaning(timm.models.vision_transformer.VisionTransformer):
    """A model with a head of its own."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x.mean(1))


def test_subclass_with_another_head_receives_all_tokens(calls):
    sizes = {**TIMM, "depth": 2}
    torch.manual_seed(0)
    model = Meaning(**sizes).eval()
    theirs = outputs(model, images())
    vit_triton.accelerate(model, "triton")
    assert_same(outputs(model, images()), theirs, TERMS)
    assert calls == [(2, False)]


def test_patched_head_receives_all_tokens(calls, monkeypatch):
    model = make()
    vit_triton.accelerate(model, "triton")
    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "forward_head", Meaning.forward_head)
    ours = outputs(model, images())
    assert_same(ours, outputs(vit_triton.restore(model), images()), TERMS)
    assert calls == [(4, False)]


def test_patched_part_is_computed(calls, monkeypatch):
    model = make()
    vit_triton.accelerate(model, "triton")
    monkeypatch.setattr(Mlp, "forward", lambda self, x: torch.zeros_like(x))
    ours = outputs(model, images())
    assert_same(ours, outputs(vit_triton.restore(model), images()), TERMS)
    assert calls == []


# --- copies, restore, graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_copies_and_restore(name, calls):
    model = make(name)
    theirs, kinds = outputs(model, images()), [type(module) for module in model.modules()]
    vit_triton.accelerate(model, "triton")
    ours = outputs(model, images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert all(map(torch.equal, outputs(other, images()), ours)) and calls == [(4, True)]
        vit_triton.restore(other)
        assert [type(module) for module in other.modules()] == kinds
        assert all(map(torch.equal, outputs(other, images()), theirs)) and calls == [(4, True)]
    assert model.state_dict().keys() == make(name).state_dict().keys()


@pytest.mark.parametrize("name", FIRST)
def test_prepacked_models_have_equal_results(name, calls):
    model = make(name)
    vit_triton.accelerate(model, "triton")
    expected = outputs(model, images())
    vit_triton.prepack(model)
    calls.clear()
    for _ in range(2):
        assert_same(outputs(model, images()), expected, TERMS)
    assert calls == [(4, True)] * 2
    vit_triton.unpack(model)


@pytest.fixture
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", FIRST)
def test_compiles_into_one_graph_without_the_encoder(name, calls, compiled):
    model = make(name)
    vit_triton.accelerate(model, "triton", strict=True)
    expected = outputs(model, images())
    calls.clear()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(outputs(whole, images()), expected, TERMS)
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm", "torchvision", "ViT"])
def test_exports_without_the_encoder(name, calls):
    model = make(name)
    vit_triton.accelerate(model, "triton", strict=True)
    expected = outputs(model, images())
    calls.clear()
    program = torch.export.export(model, (images(),))
    assert_same(tensors(program.module()(images())), expected, TERMS)
    assert calls == []


def test_blocks_require_all_parts(calls):
    model = make()
    theirs = outputs(model, images())
    report = vit_triton.accelerate(model, "triton", mlp=False)
    assert_same(outputs(model, images()), theirs, TERMS)
    assert calls == [] and "one operator" not in str(report)


def test_containers_of_unsupported_blocks_are_not_listed(calls):
    torch.manual_seed(0)
    model = of_timm(qk_norm=True).eval()
    theirs = outputs(model, images())
    report = vit_triton.accelerate(model, "triton", strict=True)
    assert_same(outputs(model, images()), theirs, TERMS)
    assert calls == [] and "in inference" not in str(report)


@pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is deprecated", "ignore::torch.jit.TracerWarning")
def test_traces_without_the_encoder(calls):
    model = make()
    vit_triton.accelerate(model, "triton", strict=True)
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
    assert calls == [(4, True)]  # the check of the trace runs the model
    assert_same([traced(images())], outputs(model, images()), TERMS)


@torch.no_grad()
def test_on_the_meta_device(calls):
    model = make()
    vit_triton.accelerate(model.to("meta"), "triton", strict=True)
    assert model(images().to("meta")).shape == (2, 5) and calls == [(4, True)]
