"""Resampling patch embeddings to another patch size or number of channels, against timm's functions in float64."""

import numpy as np
import pytest
import timm.layers.patch_embed
import torch
import vit_pytorch
from parity import BASE
from test_weights import CLASSIFIERS, PATCH, as_jax, assert_untouched, hf_model, made, snapshot, timm_model
from timm.models import adapt_input_conv
from torch import Tensor

import vit_triton
from vit_triton import SimpleViT, ViT, load_weights, save_weights
from vit_triton.weights import WeightsError
from vit_triton.weights.patches import adapt_channels, resample_kernel

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Set the dtype of timm's computation."""
    monkeypatch.setattr(timm.layers.patch_embed, "DTYPE_INTERMEDIATE", torch.float64)


def resampled(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """timm's resampling of a kernel of shape (dim, channels, rows, columns)."""
    return timm.layers.resample_patch_embed(kernel.double(), list(size))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """The weights are rounded to float32 twice: after adapting the channels and after resampling the size."""
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= 4 * EPS * expected.norm()


@pytest.mark.parametrize("old", [(8, 8), (14, 14), (16, 16), (1, 1), (5, 9)])
@pytest.mark.parametrize("new", [(8, 8), (16, 16), (32, 32), (4, 4), (14, 10), (1, 1)])
def test_resampled_kernels_match_timm(old, new):
    kernel = torch.randn(5, 3, *old, dtype=torch.float64)
    ours = resample_kernel(kernel.permute(0, 2, 3, 1), new).permute(0, 3, 1, 2)
    assert ours.dtype == kernel.dtype
    torch.testing.assert_close(ours, resampled(kernel, new), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("new", [(16, 16), (12, 20)])
def test_resampled_kernel_preserves_the_product(new):
    """The pseudo-inverse makes the product with an enlarged patch equal the original product."""
    kernel, patch = (torch.randn(5, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    larger = torch.nn.functional.interpolate(patch, size=new, mode="bicubic", antialias=True)
    ours = resample_kernel(kernel.permute(0, 2, 3, 1), new).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours * larger).sum((1, 2, 3)), (kernel * patch).sum((1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("old", "new"), [(3, 1), (2, 1), (3, 4), (3, 2), (3, 6), (3, 8), (3, 3)])
def test_adapted_channels_match_timm(old, new, dtype):
    kernel = torch.randn(5, old, 4, 4).to(dtype)
    ours = adapt_channels(kernel.permute(0, 2, 3, 1), new)
    torch.testing.assert_close(ours.permute(0, 3, 1, 2), adapt_input_conv(new, kernel), rtol=0, atol=0)


@pytest.mark.parametrize(("old", "new"), [(1, 3), (4, 3), (4, 1), (4, 5), (1, 2)])
def test_unsupported_channel_counts(old, new):
    assert adapt_channels(torch.randn(5, 4, 4, old), new) is None
    try:
        assert adapt_input_conv(new, torch.randn(5, old, 4, 4)).shape[1] != new
    except (AssertionError, NotImplementedError):
        pass


OTHERS = [(4, 3), (16, 3), (PATCH, 1), (16, 4)]  # (patch size, channels); the file has (PATCH, 3)


def other(theirs: torch.nn.Module, patch: int, channels: int) -> Tensor:
    adapted = adapt_input_conv(channels, theirs.patch_embed.proj.weight.detach())
    return resampled(adapted, (patch, patch))


def timm_other(patch: int, channels: int, **options) -> torch.nn.Module:
    return timm_model(32, patch_size=patch, in_chans=channels, **options)


class TestLoading:
    @pytest.mark.parametrize(("patch", "channels"), OTHERS)
    @pytest.mark.parametrize("accelerated", [False, True])
    def test_into_timm(self, tmp_path, patch, channels, accelerated):
        theirs, ours = made(timm_model), made(timm_other, patch, channels, seed=1)
        if accelerated:
            vit_triton.accelerate(ours, "torch")
        save_weights(theirs, tmp_path / "model.pt")
        before = snapshot(ours)
        with pytest.raises(WeightsError, match=r"patch_embed.proj.weight \(24, 3, 8, 8\) in the file"):
            load_weights(ours, tmp_path / "model.pt")
        assert_untouched(ours, before)
        load_weights(ours, tmp_path / "model.pt", resample=True)
        assert_close(ours.patch_embed.proj.weight, other(theirs, patch, channels))
        assert torch.equal(ours.norm.weight, theirs.norm.weight)

    @pytest.mark.parametrize("source", CLASSIFIERS)
    def test_from_other_layouts(self, tmp_path, source):
        theirs = made(timm_model)
        between = made(CLASSIFIERS[source][0], seed=1)
        save_weights(theirs, tmp_path / "model.pt")
        load_weights(between, tmp_path / "model.pt")
        save_weights(between, tmp_path / "model.pt")
        ours = made(timm_other, 16, 4, seed=2)
        load_weights(ours, tmp_path / "model.pt", resample=True)
        assert_close(ours.patch_embed.proj.weight, other(theirs, 16, 4))

    def test_from_jax(self, tmp_path):
        theirs, ours = made(timm_model), made(timm_other, 16, 1, seed=1)
        np.savez(tmp_path / "model.npz", **as_jax(theirs))
        load_weights(ours, tmp_path / "model.npz", resample=True)
        assert_close(ours.patch_embed.proj.weight, other(theirs, 16, 1))

    @pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
    def test_image_encoders_of_image_text_models(self, tmp_path, name):
        theirs, ours = made(hf_model, name), made(hf_model, name, 64, seed=1, patch_size=16)
        torch.save(theirs.state_dict(), tmp_path / "model.pt")
        load_weights(ours, tmp_path / "model.pt", resample=True)
        weight = "embeddings.patch_embedding.weight"
        assert_close(ours.state_dict()[weight], resampled(theirs.state_dict()[weight], (16, 16)))

    @pytest.mark.parametrize("library", [ViT, vit_pytorch.ViT, SimpleViT])
    @pytest.mark.parametrize(("patch", "channels"), [(4, 3), (16, 3), (8, 1), (16, 4)])
    def test_from_vit_pytorch(self, tmp_path, library, patch, channels):
        """The parameters of the norm before the projection are folded into the projection."""
        options = {**BASE, "image_size": 32, "patch_size": 8}
        theirs = made(lambda: library(**options))
        ours = made(lambda: library(**{**options, "patch_size": patch, "channels": channels}), seed=1)
        save_weights(theirs, tmp_path / "model.pt")
        load_weights(ours, tmp_path / "model.pt", resample=True)
        _, norm, projection, _ = theirs.to_patch_embedding
        flat = projection.weight.double() * norm.weight
        kernel = flat.unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
        expected = resampled(adapt_input_conv(channels, kernel.float()), (patch, patch))
        _, norm, new, _ = ours.to_patch_embedding
        assert_close(new.weight, expected.permute(0, 2, 3, 1).flatten(1))
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()
        bias = projection.bias.double() + projection.weight.double() @ theirs.to_patch_embedding[1].bias.double()
        assert_close(new.bias, bias)

    def test_matching_patches_are_loaded_unchanged(self, tmp_path):
        theirs, ours = (made(lambda: ViT(**BASE), seed=seed) for seed in (0, 1))
        save_weights(theirs, tmp_path / "model.pt")
        load_weights(ours, tmp_path / "model.pt", resample=True)
        assert_untouched(ours, snapshot(theirs))

    def test_unsupported_resampling_raises(self, tmp_path):
        save_weights(made(timm_other, 8, 4), tmp_path / "model.pt")
        ours = made(timm_other, 8, 3, seed=1)
        with pytest.raises(WeightsError, match="patches with 4 channels are not resampled to 3"):
            load_weights(ours, tmp_path / "model.pt", resample=True)
        save_weights(made(lambda: ViT(**BASE, channels=1)), tmp_path / "model.pt")
        ours = made(lambda: ViT(**BASE, channels=4), seed=1)
        with pytest.raises(WeightsError, match="rows, columns and channels of the file's patches are ambiguous"):
            load_weights(ours, tmp_path / "model.pt", resample=True)

    def test_weights_are_cast_to_the_dtype_of_the_model(self, tmp_path):
        theirs, ours = made(timm_model).bfloat16(), made(timm_other, 16, 4, seed=1)
        save_weights(theirs, tmp_path / "model.pt")
        load_weights(ours, tmp_path / "model.pt", resample=True)
        expected = other(theirs, 16, 4)
        eps = torch.finfo(torch.bfloat16).eps
        assert ours.patch_embed.proj.weight.dtype == torch.float32
        assert (ours.patch_embed.proj.weight - expected).norm() <= eps * expected.norm()
