"""Portable programs contain only PyTorch's operators: torch.jit.trace, both ONNX exporters, torch.export on request.

Each model has backend "triton"; any operator of ours in an exported program is an error.
"""

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.onnx._internal.exporter._flags as onnx_flags
import transformers
import vit_pytorch
from hypothesis import given, settings
from parity import BASE, TERMS, shake
from precision import assert_model_as_precise, assert_same, longest_sum
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torchvision.models import vision_transformer

import vit_triton
import vit_triton.integrations.transformers  # registers attn_implementation="vit_triton"
from vit_triton import backend as backends
from vit_triton import functional as F

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.torch.jit.\w+. is deprecated"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # from transformers, in a trace
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # pytest resets PyTorch's filters and ours
]
DYNAMO = pytest.param(
    True,
    id="dynamo",
    marks=[
        pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript"),
        pytest.mark.filterwarnings("ignore:.*copyreg.*"),
    ],
)


class Logits(nn.Module):
    """A transformers model that maps images to a tensor."""

    def __init__(self, **config) -> None:
        super().__init__()
        sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5)
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, **config)
        self.model = transformers.ViTForImageClassification(config)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image).logits


def of_torchvision() -> nn.Module:
    sizes = dict(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=5)
    return vision_transformer.VisionTransformer(**sizes)


def of_timm(**changes) -> nn.Module:
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, num_heads=2, num_classes=5, depth=2, init_values=0.1)
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes})


OURS = {
    "ViT": lambda: vit_triton.ViT(**BASE),
    "ViT, mean": lambda: vit_triton.ViT(**BASE, pool="mean"),
    "SimpleViT": lambda: vit_triton.SimpleViT(**BASE),
    "DistillableViT": lambda: vit_triton.DistillableViT(**BASE),
}
THEIRS = {
    "timm": of_timm,
    "timm, qk-norm": lambda: of_timm(qk_norm=True, reg_tokens=2),
    "torchvision": of_torchvision,
    "transformers": Logits,
    "transformers, attention alone": lambda: Logits(attn_implementation="vit_triton"),
    "vit_pytorch": lambda: vit_pytorch.ViT(**BASE),
    "vit_pytorch, simple": lambda: vit_pytorch.SimpleViT(**BASE),
}


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model on the kernels, and a copy on PyTorch's operators with its own parameters."""
    torch.manual_seed(0)
    model = make()
    shake(model)
    plain = copy.deepcopy(model.eval())
    if isinstance(model, vit_triton.models.base.VisionModel):
        plain.backend, model.backend = "torch", "triton"
    elif isinstance(model, Logits) and model.model.config._attn_implementation == "vit_triton":
        plain.model.set_attn_implementation("sdpa")
    else:
        vit_triton.accelerate(model, "triton")
    return model, plain


@pytest.fixture(params=[*OURS, *THEIRS])
def models(request):
    with vit_triton.use_backend("triton"):
        yield made({**OURS, **THEIRS}[request.param])


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16)


# --- torch.jit.trace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
def test_traces_use_current_parameters_and_survive_saving(models, gradients):
    model, plain = models
    with torch.set_grad_enabled(gradients):
        model(images())  # weights prepared by inference must stay out of the trace
        # PyTorch's check fails for MultiheadAttention with gradients, which takes another path in each trace
        check = not (gradients and isinstance(plain, vision_transformer.VisionTransformer))
        traced = torch.jit.trace(model, images(), check_trace=check)
        assert "vit_triton::" not in str(traced.inlined_graph)
        image = images(3)
        assert_same(traced(image), plain(image))
        shake(plain)
        model.load_state_dict(plain.state_dict())
        assert_same(traced(image), plain(image))
        with torch.no_grad():
            for each in (model, plain):
                next(p for p in each.parameters() if p.ndim == 2)[:3] *= 2
        assert_same(traced(image), plain(image))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert_same(loaded(image), plain(image))
    if gradients:
        grads = []
        for each in (traced, plain, copy.deepcopy(plain).double()):
            each(image.to(next(each.parameters()).dtype)).square().sum().backward()
            grads.append({name: parameter.grad for name, parameter in each.named_parameters()})
        assert_model_as_precise(*grads, longest_sum(plain))


def test_trace_accepts_smaller_images():
    """The trace computes shapes instead of storing constants, unlike vit_pytorch's."""
    model, plain = made(OURS["ViT"])
    traced = torch.jit.trace(model, images())
    for size in ((16, 8), (8, 8), (8, 16)):
        image = torch.randn(3, 3, *size)
        assert_same(traced(image), plain(image))


def test_shape_checks_do_not_warn_in_a_trace():
    model, _ = made(OURS["ViT"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.TracerWarning.ignore_lib_warnings()
        backends.ignore_warnings_of_shape_checks()
        torch.jit.trace(model, images())
    assert not [str(each.message) for each in caught if each.category is torch.jit.TracerWarning]


def test_every_function_is_traced():
    """Direct calls with a named backend are traced too."""
    x, weight, wide = torch.randn(2, 5, 16), torch.randn(48, 16), torch.randn(16, 48)
    norm = (torch.randn(16), torch.randn(16), 1e-5)
    block = F.Block(norm, weight, None, torch.randn(16, 16), None, norm, weight, None, wide, None)

    def all_of_them(x, image, backend="triton"):
        kw = dict(backend=backend)
        y = F.linear(x, weight, norm=norm, **kw)
        out, lse = F.attention_packed(y.unflatten(-1, (3, 2, 8)), return_lse=True, **kw)
        x = F.mlp(out.flatten(2), weight, None, wide, None, norm=norm, residual=x, **kw)
        x, total = F.layer_norm(x, *norm[:2], residual=x, **kw)
        tokens = F.patch_embed(image, weight[:, :12], patch_size=2, prefix=torch.ones(1, 48), **kw)
        q, k, v = y.unflatten(-1, (3, 2, 8)).unbind(2)
        attended = F.attention(q, k, v, q_norm=(None, None, 1e-6), norm_type="rms_norm", **kw)
        return F.encoder(x, [block], heads=2, first_token=True, **kw), total, lse, tokens, attended

    given = x, torch.randn(2, 3, 4, 4)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            traced = torch.jit.trace(all_of_them, given)
            assert "vit_triton::" not in str(traced.inlined_graph)
            other = torch.randn(3, 5, 16), torch.randn(3, 3, 6, 4)
            for ours, plain in zip(traced(*other), all_of_them(*other, backend="torch"), strict=True):
                assert_same(ours, plain)


@given(
    sizes=st.fixed_dictionaries(
        {
            "patch_size": st.sampled_from([(2, 2), (4, 2), (3, 5)]),
            "dim": st.sampled_from([8, 24]),
            "depth": st.integers(0, 3),
            "heads": st.integers(1, 3),
            "dim_head": st.sampled_from([4, 8]),
            "mlp_dim": st.sampled_from([8, 20]),
            "num_classes": st.integers(0, 3),
            "pool": st.sampled_from(["cls", "mean"]),
            "channels": st.integers(1, 3),
        }
    ),
    grids=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=3),
    gradients=st.booleans(),
)
@settings(max_examples=max(1, settings().max_examples // 4))  # an example takes a second
def test_fuzz_traces_of_random_models(sizes, grids, gradients):
    patch_h, patch_w = sizes["patch_size"]
    model = vit_triton.ViT(image_size=(3 * patch_h, 3 * patch_w), **sizes, backend="triton").eval()
    shape = (sizes["channels"], patch_h, patch_w)
    first, *others = (torch.randn(b, shape[0], h * patch_h, w * patch_w) for b, h, w in grids)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, first)
        model.backend = "torch"
        for image in (first, *others):
            assert_same(traced(image), model(image))


# --- ONNX --------------------------------------------------------------------------------------------------


def run_onnx(file: io.BytesIO, *tensors: Tensor) -> Tensor:
    """onnxruntime's result for a file, which may contain only ONNX's operators and no functions."""
    model = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (result,) = session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
    return torch.from_numpy(np.ascontiguousarray(result))


def to_onnx(model: nn.Module, dynamo: bool, *tensors: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the former exporter warns of its deprecation and of skipped constant folding
        if dynamo:
            torch.onnx.export(model, tensors, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False).save(file)
        else:
            axes = dict(input_names=["image"], dynamic_axes={"image": {0: "batch"}})
            torch.onnx.export(model, tensors, file, dynamo=False, **axes)
    return file


def test_onnx_files_use_standard_operators_and_match(models):
    model, plain = models
    file, image = to_onnx(model, False, images()), images(3)
    assert_same(run_onnx(file, image), plain(image).detach(), TERMS)


@pytest.mark.parametrize("name", ["ViT", "SimpleViT", "timm", "transformers, attention alone"])
@pytest.mark.parametrize("dynamo", [DYNAMO])
def test_onnx_files_of_the_dynamo_exporter(name, dynamo):
    model, plain = made({**OURS, **THEIRS}[name])
    with vit_triton.use_backend("triton"):
        file, image = to_onnx(model, dynamo, images()), images(3)
    assert_same(run_onnx(file, image), plain(image).detach(), TERMS)


@pytest.mark.parametrize("dynamo", [pytest.param(False, id="former"), DYNAMO])
def test_onnx_of_a_model_in_training_mode(dynamo):
    """The exporter removes Dropout of probability 0."""
    model, plain = made(OURS["ViT"])
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.train(), (images(),), file, dynamo=dynamo, training=torch.onnx.TrainingMode.EVAL)
    assert "Dropout" not in {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}


def test_a_strict_capture_for_onnx_is_portable():
    """The exporter falls back to a strict capture. Dynamo replaces is_in_onnx_export by False."""
    model, plain = made(OURS["ViT"])
    with mock.patch.object(onnx_flags, "_is_onnx_exporting", True):
        program = torch.export.export(model, (images(),), strict=True)
    assert not operators_of_ours(program)
    image = images()
    assert_same(program.module()(image), plain(image))


def test_error_for_custom_operators_names_portable_operators():
    model, _ = made(THEIRS["timm"])
    program = torch.export.export(model, (images(),))
    assert operators_of_ours(program)
    with mock.patch.object(onnx_flags, "_is_onnx_exporting", True):
        with pytest.raises(RuntimeError, match=r"vit_triton::patch_embed_fwd, .* vit_triton.portable_operators\(\)"):
            program.run_decompositions()  # the exporter's first step
    if importlib.util.find_spec("onnxscript") is not None:
        with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"vit_triton.portable_operators\(\)"):
            torch.onnx.export(program, dynamo=True, verbose=False)
    program.run_decompositions()  # allowed outside of ONNX export


# --- torch.export ------------------------------------------------------------------------------------------


def operators_of_ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "vit_triton" in str(node.target)]


def test_portable_export_has_only_pytorch_operators(models):
    model, plain = models
    with vit_triton.portable_operators():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: Dim("batch")},))
    assert not operators_of_ours(program)
    file, image = io.BytesIO(), images(3)
    torch.export.save(program, file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(image), plain(image))


@pytest.mark.parametrize("make", [OURS["ViT"], THEIRS["timm"]], ids=["ours", "accelerated"])
def test_portable_strict_export(make):
    model, plain = made(make)
    with torch.no_grad():  # with gradients, they are in subgraphs
        assert operators_of_ours(torch.export.export(model, (images(),), strict=True))
    with vit_triton.portable_operators():
        program = torch.export.export(model, (images(),), strict=True, dynamic_shapes=({0: Dim("batch")},))
    assert not operators_of_ours(program)
    image = images(3)
    assert_same(program.module()(image), plain(image))


def test_portable_operators_override_every_backend():
    x = torch.randn(3, 4)

    def ran() -> list[str]:
        with torch.profiler.profile() as profile:
            F.layer_norm(x, None, None, backend="triton")
        return [event.key for event in profile.key_averages() if event.key.startswith("vit_triton::")]

    assert ran()
    with vit_triton.use_backend("triton"), vit_triton.portable_operators():
        with vit_triton.portable_operators():
            assert not ran()
        assert not ran()
        F.layer_norm(x.double(), None, None, backend="triton")  # the kernels do not support float64
    with pytest.raises(ZeroDivisionError), vit_triton.portable_operators():
        raise ZeroDivisionError
    assert ran()


@pytest.mark.parametrize("make", [OURS["ViT"], THEIRS["timm"]], ids=["ours", "accelerated"])
def test_torch_compile_has_one_graph_per_mode(make):
    model, plain = made(make)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(images())
    assert counter.frame_count == 1
    with vit_triton.portable_operators():
        for _ in range(3):
            compiled(images())
    assert counter.frame_count == 2
    compiled(images())
    assert counter.frame_count == 2
