"""vit_pytorch's wrappers work unchanged around our ViT and return the same results as around vit_pytorch's ViT."""

import random

import pytest
import torch
import vit_pytorch
from precision import assert_same
from torch import Tensor, nn
from vit_pytorch.dino import Dino
from vit_pytorch.distill import DistillableViT, DistillWrapper
from vit_pytorch.extractor import Extractor
from vit_pytorch.mae import MAE

from vit_triton import ViT

BASE = {
    "image_size": 16,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 24,
    "depth": 1,
    "heads": 2,
    "mlp_dim": 40,
    "dim_head": 8,
}


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    return request.param


def both(backend: str, **changes) -> tuple[nn.Module, nn.Module]:
    config = {**BASE, **changes}
    torch.manual_seed(0)
    theirs = vit_pytorch.ViT(**config)
    ours = ViT(**config, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None and parameter.numel():
            assert_same(parameter.grad, expected[name].grad, BASE["mlp_dim"])


class TestExtractor:
    @pytest.mark.parametrize("layer_name", ["to_patch_embedding", "dropout", "transformer", "to_latent", "mlp_head"])
    @pytest.mark.parametrize("layer_save_input", [False, True], ids=["output", "input"])
    def test_layer_given_by_name(self, backend, image, layer_name, layer_save_input):
        results = []
        for model in both(backend):
            extractor = Extractor(model, layer_name=layer_name, layer_save_input=layer_save_input)
            logits, latents = extractor(image)
            results.append((logits, latents[0] if layer_save_input else latents))
            assert extractor.eject() is model
        for theirs, ours in zip(*results, strict=True):
            assert_same(ours, theirs, BASE["mlp_dim"])

    @pytest.mark.parametrize("name", ["transformer.norm", "transformer.layers.0.0", "transformer.layers.0.1.net.0"])
    def test_layer_given_as_a_module(self, backend, image, name):
        theirs, ours = (Extractor(model, layer=model.get_submodule(name))(image) for model in both(backend))
        assert_same(ours[0], theirs[0], BASE["mlp_dim"])
        assert_same(ours[1], theirs[1], BASE["mlp_dim"])

    def test_gradients_pass_when_not_detached(self, backend, image):
        models = both(backend)
        for model in models:
            _, latents = Extractor(model, return_embeddings_only=False, detach=False)(image)
            weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
            (latents * weights).sum().backward()
        theirs, ours = models
        assert_same_gradients(ours, theirs)


class TestDino:
    @pytest.mark.parametrize("hidden_layer", [-2, "to_latent", "transformer"])
    def test_training_step(self, backend, hidden_layer):
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        losses, models = [], both(backend)
        for model in models:
            torch.manual_seed(2)
            random.seed(2)
            learner = Dino(
                model,
                image_size=16,
                hidden_layer=hidden_layer,
                projection_hidden_size=12,
                projection_layers=2,
                num_classes_K=20,
            )
            loss = learner(image)
            loss.backward()
            learner.update_moving_average()
            losses.append(loss)
        assert_same(losses[1], losses[0], BASE["mlp_dim"])
        assert_same_gradients(models[1], models[0])


class TestMAE:
    def test_training_step(self, backend, image):
        losses, models = [], both(backend, pool="mean")
        for model in models:
            torch.manual_seed(2)
            learner = MAE(encoder=model, decoder_dim=16, decoder_heads=2, decoder_dim_head=8, masking_ratio=0.5)
            loss = learner(image)
            loss.backward()
            losses.append(loss)
        assert_same(losses[1], losses[0], BASE["mlp_dim"])
        assert_same_gradients(models[1], models[0])


class TestDistillWrapper:
    @pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
    def test_teacher(self, backend, image, hard):
        losses = []
        for teacher in both(backend):
            torch.manual_seed(2)
            student = DistillableViT(**BASE)
            distiller = DistillWrapper(student=student, teacher=teacher.eval(), temperature=3, alpha=0.5, hard=hard)
            loss = distiller(image, torch.tensor([1, 4]))
            loss.backward()
            losses.append(loss)
        assert_same(losses[1], losses[0], BASE["mlp_dim"])
