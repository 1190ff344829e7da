"""Accelerated SigLIP 2 and the vision attention of Qwen of transformers: outputs and all gradients."""

from typing import Any

import pytest
import torch
import transformers as hf
from parity import assert_accelerated
from precision import assert_same
from torch import Tensor, nn

import vit_triton
from vit_triton import functional as F
from vit_triton.integrations.transformers_qwen import longest_of

SHAPES = ((4, 5), (2, 3), (3, 3), (1, 7))  # rows and columns of patches


def shake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # the initial values would hide swaps
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Siglip2(nn.Module):
    """Features of valid patches, and the pooled features."""

    def __init__(self, lengths: Any = None, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=1)
        self.model = shake(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**{**sizes, **changes})))
        self.shapes = torch.tensor(SHAPES)
        lengths = [h * w for h, w in SHAPES] if lengths is None else lengths
        self.mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).int()
        self.eval()

    def patches(self) -> Tensor:
        return torch.randn(4, 20, 768, generator=torch.Generator().manual_seed(1))

    def forward(self, patches: Tensor) -> Tensor:
        out = self.model(patches, self.mask, self.shapes)
        return torch.cat((out.last_hidden_state[self.mask.bool()], out.pooler_output))


SMALL = dict(hidden_size=48, num_attention_heads=2, intermediate_size=96, num_hidden_layers=2)


def test_siglip2():
    model = Siglip2()
    report = assert_accelerated(model, model.patches(), low=True)
    assert not report.fallbacks()
    replaced = {"Siglip2EncoderLayer", "Siglip2MultiheadAttentionPoolingHead"}
    assert replaced <= {entry.cls for entry in report.replaced}


def test_siglip2_with_a_float_mask():
    """The mask of eager attention; its softmax is float32 in every dtype, so there is no exact result."""
    model = Siglip2(**SMALL, attn_implementation="eager")
    expected = model(model.patches())
    report = vit_triton.accelerate(model, "triton")
    assert_same(model(model.patches()), expected, 96)
    assert not report.fallbacks()


def test_siglip2_without_padding():
    model = Siglip2([20] * 4, **SMALL)
    assert not assert_accelerated(model, model.patches()).fallbacks()


def test_a_pooled_image_without_patches_averages():
    """The library adds a finite minimum to the scores of the pooling head."""
    head = Siglip2(**SMALL).model.head
    x, mask = torch.randn(4, 20, 48), torch.zeros(4, 20, dtype=torch.long)
    mask[:2, 5:9] = 1
    expected = head(x, mask)
    report = vit_triton.accelerate(head, "triton")
    assert_same(head(x, mask), expected, 96)
    assert not report.fallbacks()
    head(x, torch.zeros(4, 1, 1, 20))
    assert report.fallbacks()[""] == {"attention mask is not (B, N)": 1}


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_siglip2_on_other_backends(backend):
    model = Siglip2(**SMALL)
    expected = model(model.patches())
    vit_triton.accelerate(model, backend)
    assert_same(model(model.patches()), expected, 96)


def test_a_mask_of_flash_attention_falls_back():
    layer = Siglip2(**SMALL).model.encoder.layers[0]
    report, mask = vit_triton.accelerate(layer, "triton"), torch.zeros(20, 20)
    layer(torch.randn(1, 20, 48), mask)
    assert report.fallbacks()[""] == {"attention mask is not 4-D": 1}


# --- Qwen --------------------------------------------------------------------------------------------------

GRIDS = torch.tensor([[1, 4, 6], [2, 2, 2], [1, 14, 10]])  # frames, rows and columns of patches
QWEN2_5 = dict(hidden_size=1280, num_heads=16, intermediate_size=1711, out_hidden_size=64, window_size=56)
QWEN2 = dict(embed_dim=1280, num_heads=16, hidden_size=64)
QWEN = {
    "2.5": (hf.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel, QWEN2_5),
    "2": (hf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel, QWEN2),
}


class Qwen(nn.Module):
    """One layer, with attention in windows for 2.5."""

    def __init__(self, version: str, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        cls, sizes = QWEN[version]
        self.model = shake(cls._from_config(cls.config_class(**{"depth": 1, **sizes, **changes})))
        self.eval()

    def patches(self) -> Tensor:
        return torch.randn(int(GRIDS.prod(1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))

    def forward(self, patches: Tensor) -> Tensor:
        out = self.model(patches, GRIDS)
        return torch.cat((out.last_hidden_state.flatten(), out.pooler_output.flatten()))


NARROW = {
    "2.5": dict(
        hidden_size=48, num_heads=2, intermediate_size=96, out_hidden_size=32, depth=2, fullatt_block_indexes=[1]
    ),
    "2": dict(embed_dim=48, num_heads=2, hidden_size=32),
}


@pytest.fixture
def calls(monkeypatch):
    """Rows, starts and longest length of each call of attention_varlen."""
    seen: list[Any] = []
    varlen = F.attention_varlen

    def record(q, k, v, starts, longest, **options):
        seen.append((len(q), starts.tolist(), longest))
        return varlen(q, k, v, starts, longest, **options)

    monkeypatch.setattr(F, "attention_varlen", record)
    return seen


CLASSES = {"2.5": {"Qwen2_5_VLVisionAttention", "Qwen2_5_VLMLP"}, "2": {"VisionAttention", "VisionMlp"}}


@pytest.mark.parametrize("version", QWEN)
def test_qwen(version):
    model = Qwen(version)
    model.model.merger = nn.Identity()  # the library's, with most of the weights
    report = assert_accelerated(model, model.patches(), low=True)
    assert CLASSES[version] <= {entry.cls for entry in report.replaced} and not report.fallbacks()


@pytest.mark.parametrize("version", QWEN)
def test_narrow_qwen(version, calls):
    model = Qwen(version, **NARROW[version])
    assert not assert_accelerated(model.train(), model.patches()).fallbacks()
    full, lengths = (172, [0, 24, 28, 32, 172], 140), {(call[0], call[2]) for call in calls}
    assert full in calls and lengths == ({(172, 140), (172, 16)} if version == "2.5" else {(172, 140)})


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_qwen_on_other_backends(backend):
    model = Qwen("2.5", **NARROW["2.5"])
    expected = model(model.patches())
    vit_triton.accelerate(model, backend)
    assert_same(model(model.patches()), expected, 96)


def test_other_arguments_of_qwen_fall_back():
    attention = Qwen("2.5", **NARROW["2.5"]).model.blocks[0].attn
    x, table = torch.randn(9, 48), torch.randn(9, 24)
    call = dict(cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32), position_embeddings=(table, table))
    expected = attention(x, **call)
    report = vit_triton.accelerate(attention, "triton")
    for cu_seqlens in (call["cu_seqlens"], call["cu_seqlens"].long()):
        for longest in (None, 5, 9):
            assert_same(attention(x, **{**call, "cu_seqlens": cu_seqlens}, max_seqlen=longest), expected, 96)
    assert not report.fallbacks()
    attention.config._attn_implementation = "flex_attention"
    with pytest.raises(Exception):  # noqa: B017 - the library's own error
        attention(x, **{**call, "position_embeddings": None})
    assert report.fallbacks() == {"": {"position_embeddings are not cos and sin": 1}}


def test_lengths_are_read_once_on_a_gpu():
    class OnGpu:
        """What :func:`longest_of` reads from a tensor on a GPU."""

        device, _version, reads = torch.device("cuda"), 0, 0
        lengths = torch.tensor([3, 7])

        def is_inference(self) -> bool:
            return False

        def diff(self) -> Tensor:
            self.reads += 1
            return self.lengths

    tensor: Any = OnGpu()
    assert [longest_of(tensor) for _ in range(3)] == [7, 7, 7] and tensor.reads == 1
    tensor.lengths, tensor._version = torch.tensor([9, 1]), 1
    assert [longest_of(tensor) for _ in range(3)] == [9, 9, 9] and tensor.reads == 2
