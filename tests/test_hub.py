"""The models with huggingface_hub's mixin, and without huggingface_hub. Uploads are stubbed."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from parity import BASE, shake

from vit_triton import DistillableViT, SimpleViT, ViT
from vit_triton.weights import WeightsError

ROOT = Path(__file__).resolve().parents[1]

MODELS = {
    "ViT": lambda: ViT(**{**BASE, "image_size": (16, 24)}, pool="mean", backend="torch"),
    "SimpleViT": lambda: SimpleViT(**BASE, backend="torch"),
    "DistillableViT": lambda: DistillableViT(**BASE, dropout=0.1, backend="torch"),
    "student": lambda: DistillableViT(**BASE, backend="torch").to_vit(),
}


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]()
    shake(model)
    return model


def test_save_and_load_pretrained(model, tmp_path):
    model.save_pretrained(tmp_path)
    copy = type(model).from_pretrained(tmp_path)
    assert type(copy) is type(model) and not copy.training and str(copy) == str(model)
    image = torch.randn(2, 3, *model.image_size)
    assert torch.equal(copy(image), model.eval()(image))
    assert copy.backend == "torch" and type(model).from_pretrained(tmp_path, backend="auto").backend == "auto"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "vit_triton" in (tmp_path / "README.md").read_text()


def test_config_contains_the_constructor_arguments(tmp_path):
    MODELS["ViT"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    defaults = {"channels": 3, "dropout": 0.0, "emb_dropout": 0.0}
    assert config == {**BASE, **defaults, "image_size": [16, 24], "pool": "mean", "backend": "torch"}


def test_damaged_weights_file_raises(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="cannot be read as a .safetensors file"):
        type(model).from_pretrained(tmp_path)


def test_weights_of_another_model_are_rejected(tmp_path):
    """The mixin's own loading is not strict."""
    ViT(**BASE).save_pretrained(tmp_path)
    ViT(**{**BASE, "depth": 1}).save_pretrained(tmp_path / "shallow")
    (tmp_path / "shallow" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="transformer.layers.1"):
        ViT.from_pretrained(tmp_path)


def test_push_to_hub_uploads_the_same_files(model, monkeypatch):
    uploads = []

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    model.push_to_hub("someone/model")
    assert uploads == [("someone/model", ["README.md", "config.json", "model.safetensors"])]


def test_models_work_without_huggingface_hub():
    code = f"""
import sys
sys.modules["huggingface_hub"] = None
import torch, vit_triton
for cls in (vit_triton.ViT, vit_triton.SimpleViT, vit_triton.DistillableViT):
    model = cls(**{BASE}, backend="torch")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 5)
    assert not hasattr(model, "from_pretrained")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=120)
