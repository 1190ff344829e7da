"""Hugging Face's models with our kernels inside, against themselves untouched."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import vit_triton
import vit_triton.integrations.transformers  # registers attn_implementation="vit_triton"
from tests.parity import assert_as_precise
from vit_triton import functional as F

WIDE = dict(hidden_size=384, num_attention_heads=6)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **kw: hf.ViTForImageClassification(
        hf.ViTConfig(num_hidden_layers=2, image_size=96, num_labels=10, **kw)
    ),
    "deit": lambda **kw: hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(**WIDE, num_hidden_layers=2, intermediate_size=1536, image_size=96, num_labels=10, **kw)
    ),
    "dinov2": lambda **kw: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**WIDE, num_hidden_layers=2, image_size=98, patch_size=14, num_labels=10, **kw)
    ),
    "dinov2_with_registers": lambda **kw: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(num_hidden_layers=1, image_size=98, patch_size=14, num_labels=10, **kw)
    ),
    "siglip": lambda **kw: hf.SiglipVisionModel(
        hf.SiglipVisionConfig(
            **dict(hidden_size=1152, num_attention_heads=16, intermediate_size=4304, num_hidden_layers=1),
            **dict(image_size=98, patch_size=14, **kw),
        )
    ),
    "clip": lambda **kw: hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(num_hidden_layers=2, image_size=224, patch_size=32, **kw)
    ),
}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with vit_triton.use_backend("triton"):
        yield


def make(family: str, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[family](**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at 1 and 0, LayerScale at 1, which would hide a swap
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def images(model: nn.Module, batch: int = 2) -> Tensor:
    size = getattr(model.config, "vision_config", model.config).image_size
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(next(model.parameters()).dtype)


def result(output: hf.utils.ModelOutput) -> Tensor:
    """What a model is for: logits, or the embedding of the image."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if output.get(name) is not None:
            return output[name]
    raise AssertionError(f"none in {list(output)}")


@contextmanager
def key_sums(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The gradient of a key's bias is a sum that is 0 in exact arithmetic; of its terms, the absolute values."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith("k_proj"):

            def add(module: nn.Module, _: object, grads: tuple[Tensor], name: str = name) -> None:
                sums[f"{name}.bias"] = grads[0].abs().flatten(0, -2).sum(0)

            hooks.append(module.register_full_backward_hook(add))
    yield sums
    for hook in hooks:
        hook.remove()


def run(model: nn.Module, image: Tensor, **options) -> dict[str, Tensor | None]:
    """The result and the gradients of image and parameters for a loss that weighs every number differently."""
    image = image.clone().requires_grad_()
    out = result(model(pixel_values=image, **options))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"result": out.detach(), "image": image.grad, **grads}


def assert_parity(untouched: nn.Module, ours: nn.Module, image: Tensor, **options) -> None:
    """Result and every gradient, by the rule of tests/oracle.py."""
    exact_model = copy.deepcopy(untouched).double()
    with key_sums(exact_model) as sums:
        exact = run(exact_model, image.double(), **options)
    theirs, found = run(untouched, image, **options), run(ours, image, **options)
    assert found.keys() == theirs.keys()
    assert any(name.endswith("k_proj.bias") for name in sums)
    for name, value in found.items():
        if name in sums:
            error = (value.double() - exact[name]).norm()
            allowed = 2 * (theirs[name].double() - exact[name]).norm()
            assert error <= allowed + 4 * torch.finfo(value.dtype).eps * sums[name].norm(), name
        else:
            assert_as_precise(value, theirs[name], exact[name], name)


# --- attn_implementation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODELS)
def test_attention_interface(family: str, dtype: torch.dtype) -> None:
    untouched = make(family, dtype)
    ours = copy.deepcopy(untouched)
    ours.set_attn_implementation("vit_triton")
    assert_parity(untouched, ours, images(untouched))


@pytest.fixture
def attention_calls(monkeypatch) -> list[dict]:
    """The options of every call of our attention from here on, with the storages of q, k and v."""
    calls = []
    attention = F.attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        calls.append({**options, "storages": [x.untyped_storage().data_ptr() for x in (q, k, v)]})
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "attention", counted)
    return calls


def test_from_config_takes_the_name_and_the_kernel_reads_the_projections(attention_calls) -> None:
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


def test_a_mask_gives_what_sdpa_gives(attention_calls) -> None:
    untouched = make("vit")
    ours = copy.deepcopy(untouched)
    ours.set_attn_implementation("vit_triton")
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, 20:] = 0
    theirs, found = (result(m(images(m), attention_mask=mask)) for m in (untouched, ours))
    assert torch.equal(theirs, found) and not attention_calls
    assert not torch.equal(found, result(ours(images(ours))))
    assert len(attention_calls) == 2


def test_a_causal_model_gives_what_sdpa_gives(attention_calls) -> None:
    untouched = hf.CLIPTextModel(hf.CLIPTextConfig(**WIDE, num_hidden_layers=1, vocab_size=100)).eval()
    ours = copy.deepcopy(untouched)
    ours.set_attn_implementation("vit_triton")
    tokens = torch.arange(2 * 9).view(2, 9)
    assert torch.equal(untouched(tokens).last_hidden_state, ours(tokens).last_hidden_state)
    assert not attention_calls


OTHERS = {
    "fewer heads of keys": dict(heads=2, groups=2),
    "a wide head": dict(size=264),
    "one causal by its module": dict(causal=True),
    "a position bias": dict(position_bias=True),
    "one query for all": dict(batch=1),
}


@pytest.mark.parametrize("case", OTHERS)
def test_attention_that_the_kernels_lack_is_sdpas(case: str, attention_calls) -> None:
    options = dict(heads=4, groups=1, size=16, causal=False, position_bias=False, batch=2) | OTHERS[case]
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = options["causal"], options["groups"]
    q = torch.randn(options["batch"], 4, 7, options["size"])
    k, v = torch.randn(2, 2, options["heads"], 7, options["size"])
    extra = dict(position_bias=torch.randn(1, 4, 7, 7)) if options["position_bias"] else {}
    theirs, ours = (
        hf.AttentionInterface()[name](module, q, k, v, None, scaling=0.3, **extra)[0] for name in ("sdpa", "vit_triton")
    )
    assert torch.equal(theirs, ours) and not attention_calls


def test_cross_attention_runs_the_kernel(attention_calls) -> None:
    inputs = torch.randn(2, 4, 3, 72), *torch.randn(2, 2, 4, 9, 72)

    def attend(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        interface, module = hf.AttentionInterface()[name], nn.Module()
        return interface(module, *(x.to(dtype) for x in inputs), None, scaling=0.3, is_causal=False)[0]

    assert_as_precise(attend("vit_triton"), attend("sdpa"), attend("sdpa", torch.float64))
    assert len(attention_calls) == 1


def test_backend_torch_is_sdpa(attention_calls) -> None:
    untouched = make("vit", torch.float64)
    ours = copy.deepcopy(untouched)
    ours.set_attn_implementation("vit_triton")
    with vit_triton.use_backend("auto"):
        assert torch.equal(result(untouched(images(ours))), result(ours(images(ours))))
    assert not attention_calls


# --- accelerate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODELS)
def test_accelerate(family: str, dtype: torch.dtype) -> None:
    untouched = make(family, dtype)
    ours = copy.deepcopy(untouched)
    report = vit_triton.accelerate(ours, backend="triton")
    print(report)
    assert_parity(untouched, ours, images(untouched))
