"""Hugging Face models with our kernels, against the unmodified models."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hf
from precision import assert_model_as_precise, assert_same, longest_sum
from torch import Tensor, nn

import vit_triton
import vit_triton.integrations.transformers  # registers attn_implementation="vit_triton"
from vit_triton import functional as F
from vit_triton import reference

# common models, with one or two layers and small images
CLASSES = dict(num_labels=10)
WIDE = dict(hidden_size=384, num_attention_heads=6)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **kw: hf.ViTForImageClassification(
        hf.ViTConfig(**dict(num_hidden_layers=1, image_size=96) | CLASSES | kw)
    ),
    "deit": lambda **kw: hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(**dict(num_hidden_layers=2, intermediate_size=1536, image_size=96) | WIDE | CLASSES | kw)
    ),
    "dinov2": lambda **kw: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**dict(num_hidden_layers=2, image_size=98, patch_size=14) | WIDE | CLASSES | kw)
    ),
    "dinov2_with_registers": lambda **kw: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**dict(num_hidden_layers=1, image_size=98, patch_size=14) | CLASSES | kw)
    ),
    "siglip": lambda **kw: hf.SiglipVisionModel(
        hf.SiglipVisionConfig(
            **dict(hidden_size=1152, num_attention_heads=16, intermediate_size=4304, num_hidden_layers=1)
            | dict(image_size=70, patch_size=14)
            | kw
        )
    ),
    "clip": lambda **kw: hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(**dict(num_hidden_layers=1, image_size=224, patch_size=32) | kw)
    ),
}
GIANT = dict(hidden_size=1536, num_attention_heads=24, use_swiglu_ffn=True, image_size=42)
SMALL = dict(hidden_size=48, num_attention_heads=2, num_hidden_layers=2)
TERMS = 192  # length of the longest sum


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with vit_triton.use_backend("triton"):
        yield


def make(family: str, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[family](**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # the initial values (norms 1 and 0, LayerScale 1) would hide swaps
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def images(model: nn.Module, batch: int = 2) -> Tensor:
    size = getattr(model.config, "vision_config", model.config).image_size
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(next(model.parameters()).dtype)


def result(output: hf.utils.ModelOutput) -> Tensor:
    """The model's result: logits or the image embedding."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if output.get(name) is not None:
            return output[name]
    raise AssertionError(f"none in {list(output)}")


def run(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The result and the gradients of image and parameters; the loss weighs every number differently."""
    image = image.clone().requires_grad_()
    out = result(model(pixel_values=image))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return out.detach(), {"image": image.grad, **grads}


def assert_parity(untouched: nn.Module, models: list[nn.Module], image: Tensor) -> None:
    """Compare the result and all gradients by the precision rule."""
    exact = run(copy.deepcopy(untouched).double(), image.double())
    theirs = run(untouched, image)
    for ours in models:
        for results in zip(run(ours, image), theirs, exact, strict=True):
            assert_model_as_precise(*results, longest_sum(untouched))


def accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    vit_triton.accelerate(model, backend="triton")
    return model


def with_our_attention(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.set_attn_implementation("vit_triton")
    return model


@pytest.fixture
def fused_layers(monkeypatch) -> list[str]:
    """Record the activation of every block, and of every MLP that is fused with its residual."""
    calls = []
    encoder, mlp = F.encoder, F.mlp

    def counted_encoder(*args, **options) -> Tensor:
        calls.append(options["activation"])
        return encoder(*args, **options)

    def counted_mlp(*args, **options) -> Tensor:
        if options.get("residual") is not None:
            calls.append(options["activation"])
        return mlp(*args, **options)

    monkeypatch.setattr(F, "encoder", counted_encoder)
    monkeypatch.setattr(F, "mlp", counted_mlp)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODELS)
def test_parity(family: str, dtype: torch.dtype, fused_layers: list[str], attention_calls: list[dict]) -> None:
    model = make(family, dtype)
    assert_parity(model, [accelerated(model), with_our_attention(model)], images(model))
    layers = model.config.num_hidden_layers
    activation = {"clip": "quick_gelu", "siglip": "gelu_tanh"}.get(family, "gelu")
    assert fused_layers == [activation] * (layers + (family == "siglip"))  # SigLIP's head has an MLP too
    assert len(attention_calls) == layers + (family == "siglip")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_of_swiglu(dtype: torch.dtype, fused_layers: list[str]) -> None:
    model = make("dinov2_with_registers", dtype, **GIANT)
    assert_parity(model, [accelerated(model)], images(model))
    assert fused_layers == ["swiglu"]


# --- attn_implementation -----------------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch) -> list[dict]:
    """Record the options of every call of our attention, with the storages of q, k and v."""
    calls = []
    attention = F.attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        calls.append({**options, "storages": [x.untyped_storage().data_ptr() for x in (q, k, v)]})
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "attention", counted)
    return calls


def test_from_config_runs_the_kernel_on_uncopied_projections(attention_calls) -> None:
    config = hf.ViTConfig(**WIDE, num_hidden_layers=2, image_size=32, attention_probs_dropout_prob=0.25)
    model = hf.AutoModel.from_config(config, attn_implementation="vit_triton").eval()
    projected: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            module.register_forward_hook(lambda *a: projected.append(a[2].untyped_storage().data_ptr()))
    model(pixel_values=images(model))
    assert [call["dropout_p"] for call in attention_calls] == [0.0, 0.0]
    assert sum((call["storages"] for call in attention_calls), []) == projected
    model.train()(pixel_values=images(model))
    assert [call["dropout_p"] for call in attention_calls[2:]] == [0.25, 0.25]


def mask() -> Tensor:
    """Token mask for a ViT at 96 x 96: in the first of two images, only the first 20 tokens count."""
    rows = torch.ones(2, 37, dtype=torch.long)
    rows[0, 20:] = 0
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_attention_runs_the_kernel(attention_calls, dtype: torch.dtype) -> None:
    untouched = make("vit", dtype)
    ours = with_our_attention(untouched)
    theirs, found = (result(m(images(m), attention_mask=mask())) for m in (untouched, ours))
    exact = result(untouched.double()(images(untouched), attention_mask=mask()))
    assert_model_as_precise(found, theirs, exact, TERMS)
    assert len(attention_calls) == 1 and attention_calls[0]["bias"] is not None
    assert not torch.equal(found, result(ours(images(ours))))


def test_causal_attention_runs_the_kernel(attention_calls) -> None:
    untouched = hf.CLIPTextModel(hf.CLIPTextConfig(**SMALL)).eval()
    ours = with_our_attention(untouched)
    tokens = torch.arange(2 * 9).view(2, 9)
    theirs, found = (m(tokens).last_hidden_state for m in (untouched, ours))
    assert_model_as_precise(found, theirs, untouched.double()(tokens).last_hidden_state, TERMS)
    assert attention_calls


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_and_position_bias_match_sdpa(mask: str | None, causal: bool, attention_calls) -> None:
    """A mask replaces the causal mask; a position bias is added to either."""
    module = nn.Module()
    module.is_causal = causal
    tensors = [torch.randn(2, 4, 7, 16), *torch.randn(2, 2, 4, 7, 16), torch.randn(1, 4, 7, 7)]
    given = {None: None, "bool": torch.rand(2, 1, 7, 7) > 0.3, "float": torch.randn(2, 1, 7, 7)}[mask]

    def attend(name: str, dtype: torch.dtype, position_bias: bool) -> Tensor:
        q, k, v, bias = (x.to(dtype) for x in tensors)
        extra = dict(position_bias=bias) if position_bias else {}
        mask = given.to(dtype) if given is not None and given.is_floating_point() else given
        return hf.AttentionInterface()[name](module, q, k, v, mask, scaling=0.3, **extra)[0]

    for position_bias in (False, True):
        ours, theirs, exact = (
            attend(name, dtype, position_bias)
            for name, dtype in (
                ("vit_triton", torch.float32),
                ("sdpa", torch.float32),
                ("sdpa", torch.float64),
            )
        )
        assert_model_as_precise(ours, theirs, exact, 16)
    assert len(attention_calls) == 2


OTHERS = {
    "fewer heads of keys": dict(heads=2, groups=2),
    "a wide head": dict(size=264),
    "one query for all": dict(batch=1),
}


@pytest.mark.parametrize("case", OTHERS)
def test_unsupported_attention_falls_back_to_sdpa(case: str, attention_calls) -> None:
    options = dict(heads=4, groups=1, size=16, batch=2) | OTHERS[case]
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = False, options["groups"]
    q = torch.randn(options["batch"], 4, 7, options["size"])
    k, v = torch.randn(2, 2, options["heads"], 7, options["size"])
    theirs, ours = (
        hf.AttentionInterface()[name](module, q, k, v, None, scaling=0.3)[0] for name in ("sdpa", "vit_triton")
    )
    assert torch.equal(theirs, ours) and not attention_calls


def test_cross_attention_runs_the_kernel(attention_calls) -> None:
    inputs = torch.randn(2, 4, 3, 72), *torch.randn(2, 2, 4, 9, 72)

    def attend(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        interface, module = hf.AttentionInterface()[name], nn.Module()
        return interface(module, *(x.to(dtype) for x in inputs), None, scaling=0.3, is_causal=False)[0]

    assert_model_as_precise(attend("vit_triton"), attend("sdpa"), attend("sdpa", torch.float64), 72)
    assert len(attention_calls) == 1


def test_float64_with_auto_runs_sdpa(attention_calls) -> None:
    untouched = make("vit", torch.float64)
    ours = with_our_attention(untouched)
    with vit_triton.use_backend("auto"):
        assert torch.equal(result(untouched(images(ours))), result(ours(images(ours))))
    assert not attention_calls


# --- accelerate --------------------------------------------------------------------------------------------


def small(family: str, **config) -> nn.Module:
    sizes = SMALL | (dict(intermediate_size=96) if "dino" not in family else {})
    return make(family, **sizes | dict(patch_size=16, image_size=32) | config)


def test_restore() -> None:
    model = small("siglip")
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    expected = result(model(images(model)))
    vit_triton.accelerate(model, backend="triton")
    assert isinstance(model.encoder.layers[0], hf.models.siglip.modeling_siglip.SiglipEncoderLayer)
    assert not torch.equal(result(model(images(model))), expected)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == parameters
    vit_triton.restore(model)
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == before
    assert torch.equal(result(model(images(model))), expected)


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip"])
@pytest.mark.parametrize("part", ["norm", "attention", "q_proj", "mlp", "fc1", "activation_fn", "scale", "dropout"])
def test_hooks_on_submodules_fire(family: str, part: str, fused_layers: list[str]) -> None:
    untouched = small(family)
    ours = accelerated(untouched)
    layers = {"vit": "vit.layers.0.", "dinov2": "dinov2.encoder.layer.0.", "siglip": "encoder.layers.0."}[family]
    norm = {"vit": "layernorm_after", "dinov2": "norm2", "siglip": "layer_norm2"}[family]
    attention = "self_attn" if family == "siglip" else "attention"
    names = {"norm": norm, "attention": attention, "q_proj": f"{attention}.q_proj", "mlp": "mlp", "fc1": "mlp.fc1"}
    names |= {"activation_fn": "mlp.activation_fn", "scale": "layer_scale2", "dropout": "dropout"}
    if layers + names[part] not in dict(ours.named_modules()):
        names[part] = norm  # SigLIP has no LayerScale; only ViT has this Dropout
    seen: dict[str, list[Tensor]] = {"theirs": [], "ours": []}

    def record(who: str) -> Callable[..., None]:
        return lambda module, args, out: seen[who].append((out[0] if isinstance(out, tuple) else out).detach())

    hooks = [
        model.get_submodule(layers + names[part]).register_forward_hook(record(who))
        for who, model in (("theirs", untouched), ("ours", ours))
    ]
    theirs, found = (result(model(images(model))) for model in (untouched, ours))
    assert_same(found, theirs, TERMS)
    assert len(seen["ours"]) == len(seen["theirs"]) == (2 if part == "dropout" and family == "vit" else 1)
    assert_same(seen["ours"], seen["theirs"], TERMS)
    once = len(fused_layers)
    for hook in hooks:
        hook.remove()
    ours(images(ours))
    assert len(fused_layers) == 2 * once + 1  # the other layer, and now the one without hooks


def test_hidden_states_are_recorded_by_fused_layers(fused_layers: list[str]) -> None:
    untouched = small("dinov2")
    ours = accelerated(untouched)
    theirs, found = (m(images(m), output_hidden_states=True).hidden_states for m in (untouched, ours))
    assert len(found) == 3
    assert_same(found, theirs, TERMS)
    assert len(fused_layers) == 2
    ours(images(ours))
    assert len(fused_layers) == 4


@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers", "siglip", "clip"])
def test_eager_attention_still_returns_weights(family: str) -> None:
    untouched = small(family, attn_implementation="eager")
    ours = accelerated(untouched)
    assert "eager" in str(vit_triton.accelerate(ours, backend="triton"))
    theirs, found = (m(images(m), output_attentions=True).attentions for m in (untouched, ours))
    assert len(found) == 2
    assert_same(found, theirs, TERMS)
    ours.config.output_attentions = True
    found = ours(images(ours)).attentions
    assert len(found) == 2
    assert_same(found, theirs, TERMS)
    for model in (untouched, ours):
        model.config.output_attentions = False
        model.set_attn_implementation("sdpa")
    assert untouched(images(ours), output_attentions=True).attentions == ()
    assert ours(images(ours), output_attentions=True).attentions == ()


def test_eager_layers_are_fused_without_output_attentions(fused_layers: list[str]) -> None:
    untouched = small("vit", attn_implementation="eager")
    ours = accelerated(untouched)
    assert_same(result(ours(images(ours))), result(untouched(images(ours))), TERMS)
    assert len(fused_layers) == 2


def test_attention_mask_is_applied(attention_calls: list[dict]) -> None:
    untouched = small("vit", image_size=96)
    ours = accelerated(untouched)
    expected = result(untouched(images(ours), attention_mask=mask()))
    assert_same(result(ours(images(ours), attention_mask=mask())), expected, TERMS)
    assert not attention_calls


def test_custom_attention_function_is_called() -> None:
    def nothing(module, query, key, value, mask, **options):
        return torch.zeros_like(query).transpose(1, 2), None

    hf.AttentionInterface.register("nothing", nothing)
    try:
        untouched = small("vit", attn_implementation="nothing")
        ours = accelerated(untouched)
        assert_same(result(ours(images(ours))), result(untouched(images(ours))), TERMS)
        assert "'nothing' is not supported" in str(vit_triton.accelerate(ours))
    finally:
        hf.AttentionInterface._global_mapping.pop("nothing")


def test_image_text_models() -> None:
    text = SMALL | dict(intermediate_size=96)
    vision = text | dict(image_size=32, patch_size=16)
    tokens = dict(input_ids=torch.tensor([[5, 6, 7, 49407], [8, 9, 49407, 1]]))
    for config_class, model_class in ((hf.CLIPConfig, hf.CLIPModel), (hf.SiglipConfig, hf.SiglipModel)):
        if model_class is hf.SiglipModel:
            tokens["input_ids"] = tokens["input_ids"] % 100
        untouched = model_class(config_class(text_config=text, vision_config=vision)).eval()
        tokens["pixel_values"] = images(untouched)
        ours, theirs = accelerated(untouched)(**tokens), untouched(**tokens)
        assert_same(ours.logits_per_image, theirs.logits_per_image, TERMS)
        assert_same(ours.text_embeds, theirs.text_embeds, TERMS)
        assert_same(ours.image_embeds, theirs.image_embeds, TERMS)


def assert_trained_alike(untouched: nn.Module, ours: nn.Module) -> None:
    (their_result, theirs), (our_result, grads) = (run(model.train(), images(model)) for model in (untouched, ours))
    assert_same(our_result, their_result, TERMS)
    for name, grad in grads.items():
        if not name.endswith("k_proj.bias"):  # the exact gradient is 0: both are rounding errors
            assert theirs[name] is grad is None or assert_same(grad, theirs[name], TERMS) is None, name


@pytest.mark.parametrize("family, dropped", [("vit", "hidden"), ("vit", "attention"), ("clip", "attention")])
def test_dropout_in_training(family: str, dropped: str) -> None:
    """Probability 1 makes dropout deterministic."""
    untouched = small(family)
    for module in untouched.modules():
        if dropped == "attention" and hasattr(module, "is_causal"):
            setattr(module, "dropout" if family == "clip" else "attention_dropout", 1.0)
        elif dropped == "hidden" and isinstance(module, hf.models.vit.modeling_vit.ViTLayer):
            module.dropout.p = 1.0
    ours = accelerated(untouched)
    assert_trained_alike(untouched, ours)
    assert not torch.allclose(result(ours(images(ours))), result(ours.eval()(images(ours))))


def test_drop_path_in_training(monkeypatch, fused_layers: list[str]) -> None:
    untouched = small("dinov2", drop_path_rate=0.25)
    ours = accelerated(untouched)
    drawn = iter([[0.1, 0.9], [0.9, 0.9], [0.9, 0.1], [0.1, 0.9]])  # draws below 0.25 drop
    monkeypatch.setattr(torch, "rand", lambda shape, **kw: torch.tensor(next(drawn), **kw).view(shape))
    kept = iter([[0, 4 / 3], [4 / 3, 4 / 3], [4 / 3, 0], [0, 4 / 3]])
    monkeypatch.setattr(reference, "drop_path_factors", lambda x, p: torch.tensor(next(kept)) if p == 0.25 else None)
    assert_trained_alike(untouched, ours)
    assert len(fused_layers) == 2 and next(drawn, None) is next(kept, None) is None


def test_gradient_checkpointing() -> None:
    untouched = small("vit")
    ours = accelerated(untouched)
    checkpointed = []
    for model in (untouched, ours):
        model.activation_checkpointing_enable()
    layer = ours.vit.layers[0]
    function = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *args: checkpointed.append(1) or function(*args)
    assert_trained_alike(untouched, ours)
    assert checkpointed == [1]


def test_autocast() -> None:
    untouched = make("vit")
    ours = accelerated(untouched)
    image = images(untouched)
    exact = result(copy.deepcopy(untouched).double()(image.double()))
    with torch.autocast("cpu", torch.bfloat16):
        theirs, found = result(untouched(image)), result(ours(image))
    assert_model_as_precise(found, theirs, exact, longest_sum(untouched))


def test_custom_layer_class_is_not_replaced() -> None:
    class Louder(hf.models.vit.modeling_vit.ViTLayer):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model = small("vit")
    model.vit.layers[0].__class__ = Louder
    expected = result(model(images(model)))
    report = vit_triton.accelerate(model, backend="triton")
    assert type(model.vit.layers[0]) is Louder
    assert "vit.layers.0" in [entry.name for entry in report.not_replaced]
    assert_same(result(model(images(model))), expected, TERMS)


def causal(model: nn.Module) -> None:
    for layer in model.encoder.layers:
        layer.self_attn.is_causal = True


def pooling_without_bias(model: nn.Module) -> None:
    model.head.attention.in_proj_bias = None


def another_gate(model: nn.Module) -> None:
    model.dinov2.encoder.layer[0].mlp.act_fn = nn.GELU()


@pytest.mark.parametrize(
    "family, change, why",
    [
        ("siglip", causal, "causal attention"),
        ("siglip", pooling_without_bias, "attention: no bias"),
        ("dinov2", another_gate, "gate activation is not SiLU"),
    ],
)
def test_modified_layers_are_not_replaced(family: str, change: Callable[[nn.Module], None], why: str) -> None:
    untouched = small(family, **(dict(use_swiglu_ffn=True) if family == "dinov2" else {}))
    change(untouched)
    ours = copy.deepcopy(untouched)
    assert why in str(vit_triton.accelerate(ours, backend="triton"))
    assert_same(result(ours(images(ours))), result(untouched(images(ours))), TERMS)


def test_projection_replaced_after_accelerate_is_called() -> None:
    """Adapters replace projections this way."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    untouched = small("clip")
    ours = accelerated(untouched)
    for model in (untouched, ours):
        model.vision_model.encoder.layers[1].self_attn.v_proj.__class__ = Doubled
    assert_same(result(ours(images(ours))), result(untouched(images(ours))), TERMS)


def test_compiles_into_one_graph(fused_layers: list[str]) -> None:
    ours = accelerated(small("vit"))
    expected = result(ours(images(ours)))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(result(compiled(images(ours))), expected, TERMS)
    assert len(fused_layers) == 4


def test_transformers_is_not_imported_for_other_models() -> None:
    code = """
import sys, torch, vit_triton
vit_triton.accelerate(torch.nn.LayerNorm(8))
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
