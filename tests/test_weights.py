"""Exchange of checkpoints between models of timm, torchvision, transformers and vit_pytorch."""

import errno
import os
import pickle
import re
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
import vit_pytorch
from parity import BASE, shake
from precision import assert_same
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vit_pytorch.distill import DistillableViT as TheirDistillableViT

import vit_triton
from vit_triton import DistillableViT, SimpleViT, ViT, load_weights, save_weights
from vit_triton.weights import WeightsError
from vit_triton.weights.positions import resample

DIM, DEPTH, HEADS, HIDDEN, PATCH, CLASSES = 24, 2, 2, 48, 8, 5


def timm_model(size=32, *, classes=CLASSES, kind=VisionTransformer, **options) -> nn.Module:
    return kind(
        **{"img_size": size, "patch_size": PATCH, **options},
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / DIM,
        num_classes=classes,
    )


def hf_model(name: str, size: int = 32, **options) -> nn.Module:
    width = {"mlp_ratio": HIDDEN // DIM} if "Dinov2" in name else {"intermediate_size": HIDDEN}
    config = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": size,
        "patch_size": PATCH,
        "num_labels": CLASSES,
        "layer_norm_eps": 1e-6,
        **width,
        **options,
    }
    kind = re.sub("(Model|ForImageClassification|ForImageClassificationWithTeacher)$", "", name)
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**config))


def torchvision_model(size=32, *, classes=CLASSES) -> nn.Module:
    return torchvision.models.VisionTransformer(size, PATCH, DEPTH, HEADS, DIM, HIDDEN, num_classes=classes)


# Library: (constructor, function from model and images to logits).
CLASSIFIERS: dict[str, tuple[Callable[..., nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "timm": (timm_model, lambda model, image: model(image)),
    "torchvision": (torchvision_model, lambda model, image: model(image)),
    "transformers": (
        lambda size=32: hf_model("ViTForImageClassification", size),
        lambda model, image: model(image, interpolate_pos_encoding=False).logits,
    ),
}


def made(make: Callable[..., nn.Module], *args, seed: int = 0, **options) -> nn.Module:
    """A model in eval mode with all parameters perturbed, so that none equals its initial value."""
    torch.manual_seed(seed)
    model = make(*args, **options)
    shake(model)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def write(model: nn.Module, folder: Path, suffix: str = ".safetensors") -> Path:
    """Save with the model's own library; transformers renames parameters when it saves."""
    path = folder / f"model{suffix}"
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
    elif suffix == ".safetensors":
        safetensors.torch.save_model(model, str(path))
    else:
        torch.save(model.state_dict(), path)
    return path


TERMS = 768  # length of the longest sum


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("source", CLASSIFIERS)
@pytest.mark.parametrize("target", CLASSIFIERS)
@torch.no_grad()
def test_classifiers_of_three_libraries_exchange_weights(source, target, tmp_path):
    (make_source, run_source), (make_target, run_target) = CLASSIFIERS[source], CLASSIFIERS[target]
    theirs, ours = made(make_source), made(make_target, seed=1)
    load_weights(ours, write(theirs, tmp_path))
    assert_same(run_target(ours, image()), run_source(theirs, image()), TERMS)


@torch.no_grad()
def test_names_of_transformers_in_memory(tmp_path):
    """transformers 5 saves files with the parameter names of older versions; its state dicts have new names."""
    theirs, ours = made(CLASSIFIERS["transformers"][0]), made(timm_model, seed=1)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    load_weights(ours, tmp_path / "model.pth")
    assert_same(ours(image()), theirs(image()).logits, TERMS)


class TestDino:
    """timm and Hugging Face store the positions of class and register tokens differently."""

    @pytest.mark.parametrize("registers", [0, 3])
    @pytest.mark.parametrize("no_embed_class", [False, True])
    @torch.no_grad()
    def test_into_timm_and_back(self, tmp_path, registers, no_embed_class):
        name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
        options = {"num_register_tokens": registers} if registers else {}
        theirs = made(hf_model, name, **options)
        ours = made(
            timm_model,
            seed=1,
            classes=0,
            init_values=1.0,
            reg_tokens=registers,
            no_embed_class=no_embed_class,
        )
        load_weights(ours, write(theirs, tmp_path))
        expected = theirs(image()).last_hidden_state
        assert_same(ours.forward_features(image()), expected, TERMS)

        back = made(hf_model, name, seed=2, **options)
        save_weights(ours, tmp_path / "timm.pth")
        load_weights(back, tmp_path / "timm.pth", ignore=["embeddings.mask_token"])
        assert_same(back(image()).last_hidden_state, expected, TERMS)

    def test_original_names_of_registers(self, tmp_path):
        model = made(timm_model, init_values=1.0, reg_tokens=3, no_embed_class=True)
        state = snapshot(model)
        torch.save({name.replace("reg_token", "register_tokens"): t for name, t in state.items()}, tmp_path / "a.pth")
        target = made(timm_model, seed=1, init_values=1.0, reg_tokens=3, no_embed_class=True)
        load_weights(target, tmp_path / "a.pth")
        assert_untouched(target, state)

    def test_mask_token_of_the_model_is_required(self, tmp_path):
        model = made(hf_model, "Dinov2Model")
        path = write(made(hf_model, "Dinov2Model", use_mask_token=False), tmp_path)
        with pytest.raises(WeightsError, match="embeddings.mask_token") as caught:
            load_weights(model, path)
        assert caught.value.missing == (f"embeddings.mask_token (1, {DIM})",)
        load_weights(model, path, ignore=["*.mask_token"])

    def test_gated_mlp(self, tmp_path):
        theirs, ours = (made(hf_model, "Dinov2Model", seed=seed, use_swiglu_ffn=True) for seed in (0, 1))
        load_weights(ours, write(theirs, tmp_path))
        assert "encoder.layer.0.mlp.weights_in.weight" in safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert_untouched(ours, snapshot(theirs))


@torch.no_grad()
def test_distilled_deit(tmp_path):
    theirs = made(hf_model, "DeiTForImageClassificationWithTeacher")
    ours = made(timm_model, seed=1, kind=timm.models.deit.VisionTransformerDistilled)
    load_weights(ours, write(theirs, tmp_path))
    assert_same(ours(image()), theirs(image()).logits, TERMS)


class TestPytorchWrappings:
    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
    @pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
    def test_wrappings_are_removed(self, tmp_path, suffix, prefix, key):
        state = snapshot(made(timm_model))
        content = {prefix + name: tensor for name, tensor in state.items()}
        torch.save({key: content, "epoch": 3} if key else content, tmp_path / f"model{suffix}")
        model = made(timm_model, seed=1)
        load_weights(model, tmp_path / f"model{suffix}")
        assert_untouched(model, state)

    def test_old_format_of_pytorch(self, tmp_path):
        state = snapshot(made(timm_model))
        torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
        model = made(timm_model, seed=1)
        load_weights(model, tmp_path / "model.pt")
        assert_untouched(model, state)


def as_jax(model: nn.Module, *, big_vision: bool = False, grid: int | None = None) -> dict[str, np.ndarray]:
    """A timm model's weights as google-research/vision_transformer saves them; big_vision numbers modules from 0."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    norm2, attention, mlp = (1, 0, 0) if big_vision else (2, 1, 3)
    size = DIM // HEADS

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    parts: dict[str, dict[str, np.ndarray]] = {
        "embedding": {
            "kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": state["patch_embed.proj.bias"],
        },
        "Transformer/encoder_norm": norm("norm"),
        "head": dense("head"),
    }
    for i in range(DEPTH):
        block, at = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        parts[f"{at}/LayerNorm_0"] = norm(f"{block}.norm1")
        parts[f"{at}/LayerNorm_{norm2}"] = norm(f"{block}.norm2")
        weights = np.split(state[f"{block}.attn.qkv.weight"], 3)
        biases = np.split(state[f"{block}.attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            parts[f"{at}/MultiHeadDotProductAttention_{attention}/{name}"] = {
                "kernel": weight.T.reshape(DIM, HEADS, size),
                "bias": bias.reshape(HEADS, size),
            }
        out = dense(f"{block}.attn.proj")
        parts[f"{at}/MultiHeadDotProductAttention_{attention}/out"] = {
            "kernel": out["kernel"].reshape(HEADS, size, DIM),
            "bias": out["bias"],
        }
        parts[f"{at}/MlpBlock_{mlp}/Dense_0"] = dense(f"{block}.mlp.fc1")
        parts[f"{at}/MlpBlock_{mlp}/Dense_1"] = dense(f"{block}.mlp.fc2")
    arrays = {f"{name}/{what}": array for name, values in parts.items() for what, array in values.items()}
    position = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    return {**arrays, "cls": state["cls_token"], position: state["pos_embed"]}


class TestJax:
    @pytest.mark.parametrize("target", CLASSIFIERS)
    @pytest.mark.parametrize(("big_vision", "prefix"), [(False, ""), (False, "opt/target/"), (True, "params/img/")])
    @torch.no_grad()
    def test_into_each_library(self, tmp_path, target, big_vision, prefix):
        theirs = made(timm_model)
        arrays = as_jax(theirs, big_vision=big_vision)
        np.savez(tmp_path / "model.npz", **{prefix + name: array for name, array in arrays.items()})
        make, run = CLASSIFIERS[target]
        ours = made(make, seed=1)
        load_weights(ours, tmp_path / "model.npz")
        assert_same(run(ours, image()), theirs(image()), TERMS)

    @torch.no_grad()
    def test_result_matches_timms_loader(self, tmp_path):
        np.savez(tmp_path / "model.npz", **as_jax(made(timm_model)))
        theirs, ours = made(timm_model, seed=1), made(timm_model, seed=2)
        theirs.load_pretrained(str(tmp_path / "model.npz"))
        load_weights(ours, tmp_path / "model.npz")
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-6)

    def test_pre_logits_are_the_pooler_of_transformers(self, tmp_path):
        arrays = as_jax(made(timm_model))
        kernel, bias = np.random.default_rng(0).normal(size=(DIM + 1, DIM)).astype(np.float32)[:-1], np.ones(DIM, "f4")
        np.savez(tmp_path / "model.npz", **arrays, **{"pre_logits/kernel": kernel, "pre_logits/bias": bias})
        model = made(hf_model, "ViTModel")
        load_weights(model, tmp_path / "model.npz", ignore=["head/*"])
        assert torch.equal(model.pooler.dense.weight, torch.from_numpy(kernel).T)

    def test_pickled_objects_are_refused(self, tmp_path):
        np.savez(tmp_path / "model.npz", **as_jax(made(timm_model)), extra=np.array([{}], dtype=object))
        model = made(timm_model, seed=1)
        before = snapshot(model)
        with pytest.raises(WeightsError, match="got 'extra': numpy dtype object"):
            load_weights(model, tmp_path / "model.npz")
        assert_untouched(model, before)


class TestPositions:
    @pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((6, 6), (3, 5)), ((2, 8), (4, 4)), ((3, 3), (3, 3))])
    def test_resampling_matches_timm(self, old, new):
        positions = torch.randn(1, 1 + old[0] * old[1], DIM)
        expected = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1)[0, 1:]
        torch.testing.assert_close(resample(positions[0, 1:], old, new), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("make", [timm_model, torchvision_model, CLASSIFIERS["transformers"][0]], ids=CLASSIFIERS)
    @pytest.mark.parametrize("size", [48, 16])
    def test_another_image_size(self, tmp_path, make, size):
        theirs, ours = made(timm_model), made(make, size, seed=1)
        load_weights(ours, write(theirs, tmp_path))
        grid = [size // PATCH] * 2
        expected = resample_abs_pos_embed(theirs.pos_embed, grid, num_prefix_tokens=1)
        (loaded,) = (tensor for name, tensor in ours.state_dict().items() if "pos" in name)
        torch.testing.assert_close(loaded, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("prefix", ["", "vision_model."])
    @pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
    def test_image_encoders_of_image_text_models(self, tmp_path, name, prefix):
        theirs, ours = made(hf_model, name), made(hf_model, name, 48, seed=1)
        state = snapshot(theirs)
        torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "model.pt")
        load_weights(ours, tmp_path / "model.pt")
        tokens = state["embeddings.position_embedding.weight"][None]
        expected = resample_abs_pos_embed(tokens, [6, 6], num_prefix_tokens=int("CLIP" in name))[0]
        assert_untouched(ours, {**state, "embeddings.position_embedding.weight": expected})

    @pytest.mark.parametrize("name", ["CLIPText", "SiglipText"])
    def test_text_positions_are_not_resampled(self, tmp_path, name):
        sizes = dict(hidden_size=DIM, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=HIDDEN)
        config, kind = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
        theirs, ours = (kind(config(**sizes, max_position_embeddings=n)) for n in (64, 16))
        with pytest.raises(WeightsError, match=r"position_embedding.weight \(64, 24\) in the file"):
            load_weights(ours, write(theirs, tmp_path))

    def test_positions_of_register_tokens_are_kept(self, tmp_path):
        theirs, ours = (made(timm_model, size, seed=seed, reg_tokens=2) for size, seed in ((32, 0), (48, 1)))
        load_weights(ours, write(theirs, tmp_path))
        expected = resample_abs_pos_embed(theirs.pos_embed, [6, 6], num_prefix_tokens=3)
        assert torch.equal(ours.pos_embed, expected) and torch.equal(ours.pos_embed[:, :3], theirs.pos_embed[:, :3])

    @pytest.mark.parametrize("library", [vit_pytorch.ViT, ViT], ids=["vit_pytorch", "vit_triton"])
    @pytest.mark.parametrize("pool", ["cls", "mean"])
    def test_positions_of_vit_pytorch(self, tmp_path, library, pool):
        prefix = pool == "cls"
        theirs = made(lambda: vit_pytorch.ViT(**{**BASE, "image_size": 32}, pool=pool))
        ours = made(lambda: library(**{**BASE, "image_size": 48}, pool=pool), seed=1)
        load_weights(ours, write(theirs, tmp_path))
        expected = resample_abs_pos_embed(theirs.pos_embedding[None], [6, 6], num_prefix_tokens=int(prefix))[0]
        assert torch.equal(ours.pos_embedding, expected)

    def test_grids_that_are_not_square(self, tmp_path):
        theirs = made(lambda: ViT(**{**BASE, "image_size": (16, 40)}))
        ours = made(lambda: ViT(**{**BASE, "image_size": (24, 32)}), seed=1)
        path, before = write(theirs, tmp_path), snapshot(ours)
        with pytest.raises(
            WeightsError, match=r"the file has 11 positions, .* no.* square grid; .* grid=\(rows, columns"
        ):
            load_weights(ours, path)
        with pytest.raises(WeightsError, match=r"the file has 11 positions, which are not a grid of 4 x 4"):
            load_weights(ours, path, grid=(4, 4))
        assert_untouched(ours, before)
        load_weights(ours, path, grid=(2, 5))
        expected = resample_abs_pos_embed(theirs.pos_embedding[None], [3, 4], [2, 5], num_prefix_tokens=1)[0]
        assert torch.equal(ours.pos_embedding, expected)
        again = made(lambda: ViT(**{**BASE, "image_size": (16, 40)}), seed=2)
        load_weights(again, path)
        assert_untouched(again, snapshot(theirs))

    @pytest.mark.parametrize("no_embed_class", [False, True])
    def test_positions_of_one_patch(self, tmp_path, no_embed_class):
        theirs, ours = (made(timm_model, size, seed=size, no_embed_class=no_embed_class) for size in (8, 24))
        load_weights(ours, write(theirs, tmp_path))
        assert torch.equal(ours.pos_embed[:, -9:], theirs.pos_embed[:, -1:].expand(-1, 9, -1))

    def test_model_with_an_unknown_grid_is_rejected(self, tmp_path):
        path = write(made(lambda: ViT(**{**BASE, "image_size": 32})), tmp_path)
        with pytest.raises(WeightsError, match="the model has 11 positions, which are not a square grid$"):
            load_weights(vit_pytorch.ViT(**{**BASE, "image_size": (16, 40)}), path)


def older(state: dict[str, Tensor], version: str) -> dict[str, Tensor]:
    """Convert a state dict of vit_pytorch.ViT to the layout of an older version.

    The layouts were compared once with the names and outputs of the released packages."""
    old = {}
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embedding"):  # 1.11
            tensor = tensor[None]
        if version in ("1.2", "0.24", "0.7"):  # the norm wrapped the block; the final norm was in the head
            name = name.replace("transformer.norm.", "mlp_head.0.")
            name = name.replace("mlp_head.weight", "mlp_head.1.weight").replace("mlp_head.bias", "mlp_head.1.bias")
            fn = "fn.fn." if version == "0.7" else "fn."
            norm = "fn.norm." if version == "0.7" else "norm."
            name = name.replace(".0.to_", f".0.{fn}to_").replace(".0.norm.", f".0.{norm}")
            for new, was in (("0.", norm), ("1.", f"{fn}net.0."), ("4.", f"{fn}net.3.")):
                name = name.replace(f".1.net.{new}", f".1.{was}")
        if version in ("0.24", "0.7"):  # no norms around the projection of the patches
            if name.startswith(("to_patch_embedding.1.", "to_patch_embedding.3.")):
                continue
            name = name.replace("to_patch_embedding.2.", "to_patch_embedding.1.")
        old[name] = tensor
    return old


class TestVitPytorch:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            (vit_pytorch.ViT, ViT),
            (vit_pytorch.SimpleViT, SimpleViT),
            (TheirDistillableViT, DistillableViT),
            (vit_pytorch.ViT, DistillableViT),
            (SimpleViT, vit_pytorch.SimpleViT),
        ],
    )
    @torch.no_grad()
    def test_same_model_in_both_libraries(self, tmp_path, theirs, ours):
        theirs, ours = made(lambda: theirs(**BASE)), made(lambda: ours(**BASE), seed=1)
        load_weights(ours, write(theirs, tmp_path))
        assert_same(ours(image(16)), theirs(image(16)), TERMS)

    @pytest.mark.parametrize("version", ["1.6", "1.2"])
    @torch.no_grad()
    def test_older_layouts(self, tmp_path, version):
        theirs, ours = made(lambda: vit_pytorch.ViT(**BASE)), made(lambda: ViT(**BASE), seed=1)
        torch.save(older(theirs.state_dict(), version), tmp_path / "model.pt")
        load_weights(ours, tmp_path / "model.pt")
        assert_same(ours(image(16)), theirs(image(16)), TERMS)

    @pytest.mark.parametrize("version", ["0.24", "0.7"])
    def test_versions_without_patch_norms_are_rejected(self, tmp_path, version):
        """timm's model without qkv biases has this architecture."""
        config = {**BASE, "image_size": 32, "dim_head": DIM // HEADS, "mlp_dim": HIDDEN}
        theirs, ours = made(lambda: vit_pytorch.ViT(**config)), made(lambda: ViT(**config), seed=1)
        torch.save(older(theirs.state_dict(), version), tmp_path / "model.pt")
        before = snapshot(ours)
        with pytest.raises(WeightsError) as caught:
            load_weights(ours, tmp_path / "model.pt")
        assert [name.split(" ")[0] for name in caught.value.missing] == [
            f"to_patch_embedding.{i}.{what}" for i in (1, 3) for what in ("weight", "bias")
        ]
        assert not caught.value.unexpected and not caught.value.mismatched
        assert_untouched(ours, before)

        for i in (1, 3):
            theirs.to_patch_embedding[i] = nn.Identity()
        with_timm = made(lambda: timm_model(qkv_bias=False, norm_layer=nn.LayerNorm), seed=2)
        load_weights(with_timm, tmp_path / "model.pt")
        with torch.no_grad():
            assert_same(with_timm(image()), theirs(image()), TERMS)

    def test_first_versions_with_another_scale_are_rejected(self, tmp_path):
        old = older(vit_pytorch.ViT(**BASE).state_dict(), "0.7")
        first = {name.replace("to_out.0.", "to_out."): tensor for name, tensor in old.items()}
        torch.save(first, tmp_path / "model.pt")
        with pytest.raises(WeightsError, match="fn.fn.to_out.weight"):
            load_weights(ViT(**BASE), tmp_path / "model.pt")

    def test_old_simple_vit_with_norm_after_pooling_is_rejected(self, tmp_path):
        state = SimpleViT(**BASE).state_dict()
        old = {name.replace("transformer.norm.", "linear_head.0."): tensor for name, tensor in state.items()}
        torch.save(old, tmp_path / "model.pt")
        with pytest.raises(WeightsError, match=r"not in the file:\n  transformer.norm.weight"):
            load_weights(SimpleViT(**BASE), tmp_path / "model.pt")

    def test_loading_invalidates_cached_weights(self, tmp_path):
        """Inference caches weights in the layout of the kernels; loading invalidates the cache."""
        model, other = (made(lambda: ViT(**BASE, backend="triton"), seed=seed) for seed in (0, 1))
        save_weights(other, tmp_path / "model.pt")
        with torch.no_grad():
            assert not torch.equal(model(image(16)), other(image(16)))
            load_weights(model, tmp_path / "model.pt")
            assert torch.equal(model(image(16)), other(image(16)))

    def test_weights_are_cast_to_the_dtype_of_the_model(self, tmp_path):
        model = made(lambda: ViT(**BASE))
        save_weights(model, tmp_path / "model.pt")
        half = ViT(**BASE).bfloat16()
        load_weights(half, tmp_path / "model.pt")
        assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
        assert torch.equal(half.mlp_head.weight, model.mlp_head.weight.bfloat16())


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def truncated(model: nn.Module, path: Path) -> None:
    if path.suffix == ".npz":
        np.savez(path, **as_jax(model))
    else:
        save_weights(model, path)
    path.write_bytes(path.read_bytes()[:-1000])


class TestRefusals:
    """Loading an invalid file raises an error that names the fault, and leaves the model unchanged."""

    def refuse(self, model: nn.Module, path: Path, match: str, **options) -> WeightsError:
        before, versions = snapshot(model), [p._version for p in model.parameters()]
        with pytest.raises(WeightsError, match=match) as caught:
            load_weights(model, path, **options)
        assert_untouched(model, before)
        assert [p._version for p in model.parameters()] == versions
        return caught.value

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
    def test_truncated(self, tmp_path, suffix):
        truncated(made(timm_model), tmp_path / f"model{suffix}")
        self.refuse(
            made(timm_model, seed=1), tmp_path / f"model{suffix}", f"model{suffix}: cannot be read as a {suffix} file"
        )

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".npz", ".onnx"])
    @pytest.mark.parametrize(
        "content", [b"", b"no weights at all, but long enough to be read" * 9], ids=["empty", "text"]
    )
    def test_file_with_other_contents(self, tmp_path, suffix, content):
        (tmp_path / f"model{suffix}").write_bytes(content)
        self.refuse(made(timm_model), tmp_path / f"model{suffix}", f"model{suffix}")

    @pytest.mark.parametrize("wrap", [lambda bomb, state: bomb, lambda bomb, state: {**state, "x": bomb}])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_that_would_run_code(self, tmp_path, wrap, zipped):
        model, fuse = made(timm_model), tmp_path / "ran"
        content = wrap(Bomb(fuse), snapshot(model))
        torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
        self.refuse(model, tmp_path / "model.pth", r".pth file: it contains \w+.system, but only tensors")
        assert not fuse.exists()
        pickle.loads(pickle.dumps(Bomb(fuse)))
        assert fuse.exists()  # plain unpickling runs the code

    def test_pickled_model(self, tmp_path):
        model = made(timm_model)
        torch.save(model, tmp_path / "model.pt")
        self.refuse(model, tmp_path / "model.pt", "VisionTransformer")

    def test_no_state_dict(self, tmp_path):
        model = made(timm_model)
        torch.save([torch.zeros(2)], tmp_path / "list.pt")
        self.refuse(model, tmp_path / "list.pt", "expected a state dict, got a list")
        torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "run.pt")
        self.refuse(model, tmp_path / "run.pt", "'epoch': int, 'optimizer': dict")
        torch.save({}, tmp_path / "empty.pt")
        self.refuse(model, tmp_path / "empty.pt", "got an empty one")

    @pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # PyTorch warns when it loads one
    @pytest.mark.parametrize(
        "name, change, match",
        [
            ("norm.bias", lambda x: x.to("meta"), "'norm.bias': torch.strided on meta"),
            ("norm.bias", Tensor.to_sparse, "'norm.bias': torch.sparse_coo on cpu"),
            (7, Tensor.clone, "'7': name has type int"),
        ],
    )
    def test_tensors_of_other_kinds(self, tmp_path, name, change, match):
        state = snapshot(made(timm_model))
        torch.save({**state, name: change(state["norm.bias"])}, tmp_path / "model.pt")
        self.refuse(made(timm_model, seed=1), tmp_path / "model.pt", match)

    def test_missing_surplus_and_misshapen(self, tmp_path):
        state = snapshot(made(timm_model))
        state["head.weight"] = torch.zeros(7, DIM)
        state["blocks.0.attn.extra"] = state.pop("blocks.0.attn.proj.bias")
        state["norm.bias"] = state["norm.bias"].long()
        torch.save(state, tmp_path / "model.pt")
        error = self.refuse(made(timm_model, seed=1), tmp_path / "model.pt", "does not match VisionTransformer")
        assert error.missing == (f"blocks.0.attn.proj.bias ({DIM},)",)
        assert error.unexpected == (f"blocks.0.attn.extra ({DIM},)",)
        assert error.mismatched == (
            f"norm.bias ({DIM},) torch.int64 in the file, norm.bias ({DIM},) in the model",
            f"head.weight (7, {DIM}) in the file, head.weight ({CLASSES}, {DIM}) in the model",
        )
        for name in (*error.missing, *error.unexpected, *error.mismatched):
            assert name in str(error)

    @pytest.mark.parametrize("shape", [(), (3, DIM), (1, 2, 3, 4, 7)], ids=str)
    def test_wrong_shape_of_any_tensor(self, tmp_path, shape):
        model, with_registers = made(timm_model), made(timm_model, reg_tokens=2)
        state, arrays = snapshot(with_registers), as_jax(model)
        for name in state:
            torch.save({**state, name: torch.ones(shape)}, tmp_path / "model.pt")
            self.refuse(with_registers, tmp_path / "model.pt", re.escape(name))
        for name in arrays:
            np.savez(tmp_path / "model.npz", **{**arrays, name: np.ones(shape, np.float32)})
            self.refuse(model, tmp_path / "model.npz", re.escape(name))

    def test_errors_use_the_names_of_file_and_model(self, tmp_path):
        path = write(made(timm_model, classes=7), tmp_path)
        error = self.refuse(made(hf_model, "ViTModel"), path, "does not match ViTModel")
        assert error.missing == (f"pooler.dense.weight ({DIM}, {DIM})", f"pooler.dense.bias ({DIM},)")
        assert set(error.unexpected) == {f"head.weight (7, {DIM})", "head.bias (7,)"}

    def test_surplus_biases_must_be_zero(self, tmp_path):
        theirs, ours = made(timm_model), made(timm_model, seed=1, qkv_bias=False)
        error = self.refuse(ours, write(theirs, tmp_path), "not in the model")
        assert error.unexpected == tuple(f"blocks.{i}.attn.qkv.bias ({3 * DIM},)" for i in range(DEPTH))
        with torch.no_grad():
            for block in theirs.blocks:
                block.attn.qkv.bias.zero_()
            load_weights(ours, write(theirs, tmp_path))
            assert_same(ours(image()), theirs(image()), TERMS)

    def test_timm_checkpoint_for_our_vit(self, tmp_path):
        path = write(made(timm_model), tmp_path)
        ours = made(lambda: ViT(**{**BASE, "image_size": 32, "dim_head": DIM // HEADS, "mlp_dim": HIDDEN}))
        error = self.refuse(ours, path, "does not match ViT")
        assert {name.split(" ")[0] for name in error.unexpected} == {f"blocks.{i}.attn.qkv.bias" for i in range(DEPTH)}
        assert len(error.missing) == 4 and not error.mismatched

    @pytest.mark.parametrize(
        "make",
        [lambda: timm.create_model("resnet10t"), lambda: timm_model(classes=9), lambda: ViT(**{**BASE, "depth": 3})],
        ids=["resnet", "other classes", "deeper"],
    )
    def test_another_architecture(self, tmp_path, make):
        path = write(made(lambda: ViT(**BASE)), tmp_path)
        self.refuse(made(make), path, "does not match")

    def test_patches_of_the_same_number_of_pixels(self, tmp_path):
        theirs, ours = (
            made(VisionTransformer, img_size=16, patch_size=patch, in_chans=channels, embed_dim=8, depth=0, num_heads=1)
            for patch, channels in ((8, 1), (4, 4))
        )
        error = self.refuse(ours, write(theirs, tmp_path), "patch_embed.proj.weight")
        assert error.mismatched[-1].startswith("patch_embed.proj.weight (8, 1, 8, 8) in the file")

    def test_duplicate_name(self, tmp_path):
        state = snapshot(made(timm_model, reg_tokens=1))
        torch.save({**state, "register_tokens": state["reg_token"]}, tmp_path / "model.pt")
        self.refuse(made(timm_model, reg_tokens=1), tmp_path / "model.pt", "register_tokens is a duplicate")

    def test_unknown_suffix_and_missing_file(self, tmp_path):
        model = made(timm_model)
        (tmp_path / "model.h5").write_bytes(b"x")
        self.refuse(
            model, tmp_path / "model.h5", r"model.h5: expected a file name with one of the suffixes .safetensors, .pt"
        )
        with pytest.raises(FileNotFoundError, match="nowhere.pt"):
            load_weights(model, tmp_path / "nowhere.pt")

    def test_model_on_the_meta_device(self, tmp_path):
        path = write(made(timm_model), tmp_path)
        with pytest.raises(ValueError, match="meta device"), torch.device("meta"):
            load_weights(timm_model(), path)


class TestIgnore:
    def test_head_with_other_classes(self, tmp_path):
        theirs, ours = made(hf_model, "ViTForImageClassification"), made(timm_model, seed=1, classes=9)
        path, head = write(theirs, tmp_path), ours.head.weight.clone()
        load_weights(ours, path, ignore=["head.*"])
        assert torch.equal(ours.head.weight, head)
        assert torch.equal(ours.norm.weight, theirs.vit.layernorm.weight)

    def test_patterns_may_use_names_of_the_file(self, tmp_path):
        theirs, ours = made(hf_model, "ViTForImageClassification"), made(timm_model, seed=1, classes=0)
        load_weights(ours, write(theirs, tmp_path), ignore=["classifier.*"])
        assert torch.equal(ours.norm.weight, theirs.vit.layernorm.weight)

    def test_part_of_a_packed_tensor(self, tmp_path):
        """q, k and v are one tensor in timm: ignoring one of them leaves all three unchanged."""
        theirs, ours = made(hf_model, "ViTForImageClassification"), made(timm_model, seed=1)
        packed = ours.blocks[0].attn.qkv.weight.clone()
        load_weights(ours, write(theirs, tmp_path), ignore=["*.layer.0.attention.attention.query.weight"])
        assert torch.equal(ours.blocks[0].attn.qkv.weight, packed)


def test_other_models_keep_their_own_names(tmp_path):
    theirs, ours = made(lambda: timm.create_model("resnet10t")), made(lambda: timm.create_model("resnet10t"), seed=1)
    load_weights(ours, write(theirs, tmp_path))
    assert_untouched(ours, snapshot(theirs))


def test_submodule_may_be_named_like_a_wrapper(tmp_path):
    theirs, ours = nn.Linear(3, 3), nn.Linear(3, 3)
    theirs.model, ours.model = nn.Linear(3, 3), nn.Linear(3, 3)
    load_weights(ours, write(theirs, tmp_path))
    assert_untouched(ours, snapshot(theirs))


class TestSaving:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
    def test_round_trip(self, tmp_path, suffix):
        model, other = made(lambda: ViT(**BASE)), made(lambda: ViT(**BASE), seed=1)
        save_weights(model, tmp_path / f"model{suffix}")
        assert [path.name for path in tmp_path.iterdir()] == [f"model{suffix}"]
        load_weights(other, tmp_path / f"model{suffix}")
        assert_untouched(other, snapshot(model))

    def test_shared_and_strided_tensors(self, tmp_path):
        model, other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        model[0].bias = nn.Parameter(torch.randn(4, 2)[:, 0])
        save_weights(model, tmp_path / "model.safetensors")
        load_weights(other, tmp_path / "model.safetensors")
        assert_untouched(other, snapshot(model))

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("moment", ["fsync", "replace"])
    def test_interrupted(self, tmp_path, suffix, moment, monkeypatch):
        path = tmp_path / f"model{suffix}"
        old, new = made(lambda: ViT(**BASE)), made(lambda: ViT(**BASE), seed=1)
        save_weights(old, path)
        before = path.read_bytes()

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            save_weights(new, path)
        assert path.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("limit", [0, 5000])
    def test_full_disk(self, tmp_path, suffix, limit):
        """Simulate a full disk by a limit on the file size: the start of a file is written, then writing fails."""
        path = tmp_path / f"model{suffix}"
        model = made(lambda: ViT(**BASE))
        save_weights(model, path)
        size, old = path.stat().st_size, b"what was there"
        path.write_bytes(old)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError) as caught:
                save_weights(model, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert str(caught.value) == (
            f"[Errno 27] File too large: {size - limit:,} of {size:,} bytes are missing; the file is unchanged: "
            f"'{path}'"
        )
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
        assert path.read_bytes() == old
        assert [path.name for path in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_disk_that_is_full_when_flushed(self, tmp_path, number, monkeypatch):
        def full(_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"([\d,]+) of \1 bytes are missing"):
            save_weights(ViT(**BASE), tmp_path / "model.pt")
        assert not list(tmp_path.iterdir())

    def test_missing_folder(self, tmp_path):
        path = tmp_path / "folder" / "model.pt"
        with pytest.raises(FileNotFoundError, match=f"'{path}'$"):
            save_weights(ViT(**BASE), path)

    def test_through_a_link(self, tmp_path):
        (tmp_path / "link.pt").symlink_to(tmp_path / "model.pt")
        save_weights(ViT(**BASE), tmp_path / "link.pt")
        assert (tmp_path / "link.pt").is_symlink() and zipfile.is_zipfile(tmp_path / "model.pt")

    def test_unknown_suffix(self, tmp_path):
        with pytest.raises(
            WeightsError, match=r"model.npz: expected a file name with one of the suffixes .safetensors, .pt, .pth"
        ):
            vit_triton.save_weights(ViT(**BASE), tmp_path / "model.npz")
        assert not list(tmp_path.iterdir())
