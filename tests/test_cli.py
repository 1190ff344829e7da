"""The command line: outputs match the models' results, and every error is one line."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EMULATOR, INTERPRETER

for name in ("matplotlib", "PIL", "rich", "sklearn", "timm", "torchvision", "transformers"):
    pytest.importorskip(name)
import huggingface_hub  # noqa: E402
import sklearn.decomposition  # noqa: E402
import timm  # noqa: E402
import transformers  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from test_training import bright_and_dark  # noqa: E402

import vit_triton  # noqa: E402
from vit_triton import ViT, attention_maps, images, load_weights, save_weights  # noqa: E402
from vit_triton.cli import attention, bench, commands, errors, features, info, main, models, training  # noqa: E402
from vit_triton.images import ImageError, open_image  # noqa: E402
from vit_triton.training import evaluate, load_trained  # noqa: E402
from vit_triton.training.data import load_data  # noqa: E402

SMALL = "--image-size 14 --patch-size 7 --dim 16 --depth 2 --heads 2 --mlp-dim 24 --batch-size 4 --backend torch"
TIMM = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images whose shorter side has the training size, so that nothing is resampled."""
    return bright_and_dark(tmp_path_factory.mktemp("photos"), 10, 16, 18)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert main(["train", str(photos), "--out", str(out), "--epochs", "2", *SMALL.split()]) == 0
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """An image with the height to which timm's transform for 224 pixels resizes."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (248, 300, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A timm model and its weight file."""
    torch.manual_seed(0)
    model = timm.create_model(TIMM).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at 1 and 0, which would hide swaps
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(model, path)
    return model, path


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:  # from argparse
        code = end.code
    return code, *capsys.readouterr()


# --- images ------------------------------------------------------------------------------------------------

RAMP = np.arange(0, 65536, 1024).reshape(8, 8)


def save(path: Path, array: np.ndarray, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_16_bit_gray_is_scaled(tmp_path):
    for ending in ("png", "tif"):
        path = save(tmp_path / f"gray.{ending}", RAMP.astype(np.uint16))
        assert (pixels(path) == np.round(RAMP / 257)[..., None]).all()


def test_float_and_32_bit_gray_require_a_known_range(tmp_path):
    path = save(tmp_path / "gray.tif", (RAMP / 65536).astype(np.float32))
    assert (pixels(path) == np.round(RAMP / 65536 * 255)[..., None]).all()
    path = save(tmp_path / "wide.tif", RAMP.astype(np.int32))
    assert (pixels(path) == np.round(RAMP / 257)[..., None]).all()
    for values in (RAMP.astype(np.float32), np.full((8, 8), np.nan, np.float32), RAMP.astype(np.int32) * 2):
        with pytest.raises(ImageError, match=r"bad.tif: cannot be read: gray values from .*, expected 0 to (1|65535)$"):
            open_image(save(tmp_path / "bad.tif", values))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"])
def test_modes_are_converted_as_pillow_does(mode, tmp_path):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)).convert(mode)
    colours.save(tmp_path / "image.tif")
    with Image.open(tmp_path / "image.tif") as back:
        assert (pixels(tmp_path / "image.tif") == np.asarray(back.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode, tmp_path):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "P":
        image = image.quantize(4)
    image.convert(mode).save(tmp_path / "image.png")
    expected = np.full((4, 4, 3), 255)
    expected[:, :2] = 0
    assert (pixels(tmp_path / "image.png") == expected).all()


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    for ending in ("gif", "png", "webp"):
        path = tmp_path / f"film.{ending}"
        options = {"lossless": True} if ending == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert (pixels(path) == (255, 0, 0)).all()


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((4, 6, 3), dtype=np.uint8)
    array[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    path = save(tmp_path / "turned.png", array, exif=exif)
    assert pixels(path).shape == (6, 4, 3) and (pixels(path)[0, 3] == 255).all()


@pytest.fixture
def bad(tmp_path, monkeypatch) -> dict[str, str]:
    """Rejected files, with the reasons."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        data = save(tmp_path / name, noise).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    data = bytearray(save(tmp_path / "damaged.png", noise).read_bytes())
    data[60:80] = bytes(20)
    (tmp_path / "damaged.png").write_bytes(data)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    save(tmp_path / "huge.png", np.zeros((50, 50), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    cut = "cannot be read: "
    return {
        "cut.jpg": cut, "cut.png": cut, "damaged.png": cut, "text.jpg": "not an image", "empty.jpg": "not an image",
        "folder": "a folder", "missing.jpg": "no such file", "huge.png": "more than 2,000 pixels",
    }  # fmt: skip


def test_bad_images_are_reported_and_the_others_processed(bad, trained, tmp_path, capsys):
    good = save(tmp_path / "good.png", np.full((36, 36, 3), 200, np.uint8))  # only a warning from Pillow
    names = [tmp_path / name for name in bad]
    code, out, err = run(capsys, "predict", names[0], good, *names[1:], "--model", trained, "--json")
    assert code == 1
    lines = err.splitlines()
    assert lines[0] == f"vit-triton: {len(bad)} of {len(bad) + 1} images refused" and len(lines) == len(bad) + 1
    for (name, why), line in zip(bad.items(), lines[1:], strict=True):
        assert line.startswith(f"  {tmp_path / name}: {why}"), line
    answers = json.loads(out)
    assert answers[0]["image"] == str(good) and len(answers) == len(bad) + 1
    for answer, name, line in zip(answers[1:], bad, lines[1:], strict=True):
        assert answer == {"image": str(tmp_path / name), "error": line.strip()}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> dict[str, Path]:
    """Special files in a folder; reading one of them blocks or never ends."""
    folder = tmp_path_factory.mktemp("odd")
    os.mkfifo(folder / "pipe.png")
    (folder / "zeros.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))  # a path of at most 107 bytes
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pipe.png", "not a regular file"),
        ("zeros.png", "not a regular file"),
        ("socket.png", "not a regular file"),
        ("loop.png", "cannot be read: "),
        ("nul\0.png", "cannot be read: "),
    ],
)
def test_only_regular_files_are_opened(name, why, odd):
    with pytest.raises(ImageError, match=why):
        open_image(odd.get(name, name))


def test_pipe_among_training_images_is_reported(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            save(tmp_path / "photos" / name / f"{i}.png", np.zeros((16, 16, 3), np.uint8))
        os.mkfifo(tmp_path / "photos" / name / "2.png")
    for workers in (0, 1):
        words = (*SMALL.split(), "--batch-size", 2, "--workers", workers)
        code, _, err = run(capsys, "train", tmp_path / "photos", "--out", tmp_path, *words)
        assert code == 2 and err.startswith(f"vit-triton: data: {tmp_path}/photos/") and err.count("\n") == 1
        assert "/2.png: not a regular file; --skip-damaged (" in err


def test_size_limit_applies_before_decoding(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (101, 60, 3), dtype=np.uint8)
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    for ending, options in (("png", {}), ("jpg", {"progressive": True})):
        path = save(tmp_path / f"large.{ending}", noise, **options)
        path.write_bytes(path.read_bytes()[:-2000])  # makes decoding fail
        with pytest.raises(ImageError, match=r"large.*: 60 x 101 pixels exceed the limit of 2,000$"):
            open_image(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 101)
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(path)


def test_large_jpeg_is_decoded_at_half_size(tmp_path, monkeypatch):
    across = np.linspace(0, 255, 101)[:, None, None] * np.linspace(0, 1, 60)[:, None] * np.ones(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "large.jpg", across.astype(np.uint8), exif=exif)
    whole = pixels(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 101 - 1)
    assert whole.shape == (60, 101, 3) and pixels(path).shape == (30, 51, 3)
    assert np.abs(pixels(path) - np.asarray(Image.fromarray(whole).reduce(2), float))[:, 1:].max() <= 4
    monkeypatch.setattr(images, "MAX_PIXELS", 30 * 51 - 1)
    with pytest.raises(ImageError, match=r"60 x 101 pixels exceed the limit of 1,529$"):
        open_image(path)


ENDINGS = ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "ico", "tga", "jp2", "pcx", "sgi")


@given(
    ending=st.sampled_from(ENDINGS),
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "I;16", "F"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=20),
    kept=st.floats(0, 1),
    rest=st.binary(max_size=40),
)
def test_fuzz_damaged_images(ending, mode, flips, kept, rest, tmp_path_factory):
    """Changed, missing or extra bytes give an RGB image within the size limit, or a one-line error with the file."""
    stored = io.BytesIO()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    try:
        picture.convert(mode).save(stored, {"jpg": "jpeg", "tif": "tiff", "jp2": "jpeg2000"}.get(ending, ending))
    except (OSError, ValueError, KeyError):  # the format does not support this mode
        return
    data = bytearray(stored.getvalue())
    for place, change in flips:
        data[int(place * len(data))] ^= change
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{ending}"
    path.write_bytes(data[: max(1, round(kept * len(data)))] + rest)
    try:
        image = open_image(path)
    except ImageError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
    else:
        assert image.mode == "RGB" and image.width * image.height <= images.MAX_PIXELS
        np.asarray(image)


@pytest.mark.parametrize("command", ["predict", "features", "attention"])
def test_only_bad_images(command, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, command, "missing.png", "--model", trained)
    assert (code, out) == (1, "") and "missing.png: no such file" in err and not list(tmp_path.iterdir())


def test_an_image_of_one_row(trained, tmp_path, capsys):
    """A transform that resizes the shorter side would allocate gigabytes."""
    path = save(tmp_path / "line.png", np.zeros((1, 60000, 3), np.uint8))
    assert run(capsys, "predict", path, "--model", trained)[0] == 0


def test_bad_training_image_is_reported(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            save(tmp_path / "photos" / name / f"{i}.png", np.zeros((16, 16, 3), np.uint8))
            (tmp_path / "photos" / name / f"damaged {i}.png").write_text("none")
    code, _, err = run(capsys, "train", tmp_path / "photos", "--out", tmp_path, *SMALL.split(), "--batch-size", 2)
    assert code == 2 and err.startswith("vit-triton: ") and err.count("\n") == 1
    assert re.search(r" \S+/photos/[ab]/damaged \d.png: not an image", err) and "; --skip-damaged (" in err


# --- train and eval ----------------------------------------------------------------------------------------


def test_train_resume_and_evaluate(trained, photos, tmp_path, capsys):
    assert {path.name for path in trained.iterdir()} >= {"checkpoint.pt", "metrics.jsonl", "curves.png"}
    again = ["train", photos, "--out", trained, "--epochs", 2, *SMALL.split()]
    code, _, err = run(capsys, *again)
    assert code == 2 and "contains a checkpoint; --resume" in err and err.count("\n") == 1
    assert run(capsys, *again, "--resume")[0] == 0
    expected = evaluate(trained)
    code, out, _ = run(capsys, "eval", trained, "--json")
    assert code == 0 and json.loads(out) == expected
    code, out, _ = run(capsys, "eval", trained, "--data", photos, "--backend", "torch")
    assert out == f"test loss {expected['test_loss']:.3f}, test accuracy {expected['test_accuracy']:.1%}, 4 images\n"
    code, _, err = run(capsys, "eval", tmp_path)
    assert code == 2 and "has no checkpoint.pt" in err


# --- predict -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_predictions_match_the_model_on_test_images(trained, photos, capsys):
    """The images fill more than one batch."""
    model, config, classes = load_trained(trained, backend="torch")
    paths = [str(photos / name) for name in load_data(config).train.names]
    test = load_data(config).test.transform
    images = torch.stack([test(open_image(path)) for path in paths])
    code, out, _ = run(capsys, "predict", *paths, "--model", trained, "--json", "--backend", "torch")
    answers = json.loads(out)
    assert code == 0 and [answer["image"] for answer in answers] == paths and len(paths) > models.BATCH
    for answer, expected in zip(answers, model(images).softmax(-1), strict=True):
        got = answer["predictions"]
        assert [each["probability"] for each in got] == sorted((e["probability"] for e in got), reverse=True)
        assert [classes[each["class"]] for each in got] == [each["name"] for each in got]
        for each in got:
            assert set(each) == {"class", "name", "probability"}
            assert each["probability"] == pytest.approx(expected[each["class"]].item(), abs=1e-6)


def test_digits_are_converted_to_gray(tmp_path, capsys):
    words = "--epochs 1 --batch-size 1000 --dim 16 --heads 2 --depth 1 --mlp-dim 24"
    assert main(["train", "digits", "--out", str(tmp_path / "run"), *words.split()]) == 0
    image, _ = load_data(load_trained(tmp_path / "run")[1]).test[0]
    path = save(tmp_path / "digit.png", (image[0] * 255).round().byte().numpy())
    capsys.readouterr()
    preprocessing = models.open_model(_options("--model", tmp_path / "run", path), purpose="logits").preprocessing
    torch.testing.assert_close(
        preprocessing.to_tensor([preprocessing.crop_image(open_image(path))])[0], image, rtol=0, atol=0.51 / 255
    )
    code, out, _ = run(capsys, "predict", path, "--model", tmp_path / "run")
    assert code == 0 and out.count("%") == 5


def _options(*words):
    return commands.parser().parse_args(["predict", *map(str, words)])


@torch.no_grad()
def test_timm_models_receive_timms_preprocessing(theirs, photo, capsys):
    model, file = theirs
    show = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    expected = model(show(open_image(photo))[None]).softmax(-1)[0]
    code, out, _ = run(capsys, "predict", photo, "--model", f"timm:{TIMM}", "--weights", file, "--json")
    (answer,) = json.loads(out)
    assert code == 0 and [each["class"] for each in answer["predictions"]] == expected.topk(5).indices.tolist()
    for each in answer["predictions"]:
        assert each["probability"] == pytest.approx(expected[each["class"]].item(), rel=1e-4)
        assert each["name"] == models._classes(1000)[each["class"]]
    assert models._classes(1000)[281] == "tabby" and models._classes(3) == ("0", "1", "2")


def test_load_weights_arguments_are_options(theirs, photo, tmp_path):
    state = {"backbone." + name: tensor for name, tensor in theirs[0].state_dict().items()}
    state["backbone.patch_embed.proj.weight"] = state["backbone.patch_embed.proj.weight"][:, :, ::2, ::2].clone()
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"student": {}, "teacher": state, "model": theirs[0].state_dict()}, path)
    expected = timm.create_model(TIMM, img_size=192)
    load_weights(expected, path, key="teacher", grid=(7, 28), resample=True)
    options = _options(photo, "--model", f"timm:{TIMM}", "--weights", path, "--image-size", 192)
    with pytest.raises(ValueError, match="key must be one of model, teacher$"):
        models.open_model(options, purpose="logits")
    words = ("--key", "teacher", "--resample", "--grid", 7, 28)
    options = _options("--model", f"timm:{TIMM}", "--weights", path, "--image-size", 192, *words, photo)
    opened = models.open_model(options, purpose="logits").model
    for name, tensor in expected.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


@pytest.fixture
def hugging_face(tmp_path) -> Path:
    """A Hugging Face folder with the architecture of `theirs`, for the same weights."""
    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, num_labels=1000
    )
    config.save_pretrained(tmp_path)
    look = dict(do_resize=True, size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(look))
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("size", [224, 64])
def test_equal_weights_in_two_libraries_give_equal_results(size, theirs, hugging_face, photo):
    """Logits, features, and the attention maps, which timm does not return itself."""
    images = torch.randn(2, 3, size, size)
    results = []
    for name in (f"timm:{TIMM}", f"hf:{hugging_face}"):
        options = _options(photo, "--model", name, "--weights", theirs[1], "--image-size", size)
        with_head, without, looking = (
            models.open_model(options, purpose=purpose) for purpose in ("logits", "features", "attention")
        )
        results.append(
            (with_head.logits(images), without.features(images), *(looking.attention(images, i) for i in (0, -1)))
        )
    side = size // 16
    shapes = [(2, 1000), (2, side, side, 192), (2, 3, side, side), (2, 3, side, side)]
    # at another size, only one library resamples the position embeddings with antialiasing
    tolerance = 1e-4 if size == 224 else 0.1
    for ours, other, shape in zip(*results, shapes, strict=True):
        assert ours.shape == other.shape == shape
        assert (ours - other).norm() <= tolerance * ours.norm()
    shares = results[0][2].sum((-1, -2))
    assert ((shares > 0.5) & (shares < 1)).all(), "the share of the class token itself is excluded"


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("purpose", ["logits", "features", "attention"])
def test_models_of_other_libraries_run_on_the_kernels(purpose, library, theirs, hugging_face, photo):
    seen: set[str] = set()

    class RecordCalls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.namespace)
            return function(*args, **(kwargs or {}))

    images, results = torch.randn(2, 3, 64, 64), []
    name = f"timm:{TIMM}" if library == "timm" else f"hf:{hugging_face}"
    for backend in ("torch", "triton"):
        options = _options(photo, "--model", name, "--weights", theirs[1], "--image-size", 64, "--backend", backend)
        named = models.open_model(options, purpose=purpose)
        seen.clear()
        with RecordCalls():
            results.append(named.attention(images, -1) if purpose == "attention" else getattr(named, purpose)(images))
        assert ("vit_triton" in seen) == (backend == "triton")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hugging_face_folder_uses_its_image_processor(tmp_path, capsys):
    """DINOv2: resampled position embeddings, center crop, prefix tokens, class names."""
    torch.manual_seed(0)
    model = transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=14,
            id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, resample=3,
        image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4],
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    path = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    images = processor(open_image(path), return_tensors="pt")["pixel_values"]
    expected = model(images).logits.softmax(-1)[0].tolist()
    code, out, _ = run(capsys, "predict", path, "--model", f"hf:{tmp_path}", "--json")
    (answer,) = json.loads(out)
    got = {each["name"]: each["probability"] for each in answer["predictions"]}
    assert code == 0 and got == pytest.approx({"cat": expected[0], "dog": expected[1]}, abs=1e-5)

    named = models.open_model(_options(path, "--model", f"hf:{tmp_path}"), purpose="attention")
    model.set_attn_implementation("eager")
    answer = model.dinov2_with_registers(images, output_attentions=True)
    torch.testing.assert_close(named.features(images)[0, 1, 2], answer.last_hidden_state[0, 1 + 4 + 4 + 2])
    torch.testing.assert_close(named.attention(images, 0)[0, 1, 3, 1], answer.attentions[0][0, 1, 0, 1 + 4 + 12 + 1])


@pytest.mark.parametrize("purpose", ["predict", "features"])
def test_missing_hugging_face_weights_are_reported(purpose, tmp_path, photo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    if purpose == "features":
        model.layernorm.weight = None
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    code, out, err = run(capsys, purpose, photo, "--model", f"hf:{tmp_path}")
    lacking = "classifier.bias, classifier.weight" if purpose == "predict" else "layernorm.weight"
    assert (code, out) == (2, "") and err.endswith(f"hf:{tmp_path} has no weights for {lacking}\n")


def test_missing_files_of_a_hugging_face_folder_are_named(tmp_path, photo, capsys):
    config = transformers.SwinConfig(embed_dim=24, depths=[1, 1], num_heads=[1, 2], image_size=56)
    words = ("features", photo, "--model", f"hf:{tmp_path}", "--out", tmp_path / "a.png")
    for file, what, write in (
        ("config.json", "the architecture of the model", lambda path: config.save_pretrained(tmp_path)),
        ("preprocessor_config.json", "the size and normalization of images", lambda path: path.write_text("{}")),
        (
            "model.safetensors",
            "the weights; --weights FILE reads them from another file",
            lambda path: path.write_text("{"),
        ),
    ):
        code, _, err = run(capsys, *words)
        assert (code, err) == (2, f"vit-triton: --model: hf:{tmp_path} has no {file}, which contains {what}\n")
        write(tmp_path / file)
    assert "has invalid files" in run(capsys, *words)[2]
    code, _, err = run(capsys, *words, "--image-size", 60)
    assert code == 2 and "--image-size must be a multiple of 8, the stride of the last stage, got 60" in err


def test_unsupported_hugging_face_architecture_is_rejected(tmp_path, photo, capsys):
    transformers.BeitConfig().save_pretrained(tmp_path)
    code, _, err = run(capsys, "features", photo, "--model", f"hf:{tmp_path}", "--out", tmp_path / "a.png")
    assert code == 2 and "must be one of vit, deit, dinov2, dinov2_with_registers, dinov3_vit, swin, got beit" in err


# --- features and attention --------------------------------------------------------------------------------


@torch.no_grad()
def test_features_match_the_block_outputs(trained, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = sorted((photos / "dark").iterdir())[:2]
    code, out, _ = run(capsys, "features", *paths, "--model", trained, "--backend", "torch")
    assert (code, out) == (0, "wrote features.npz\nwrote features.png\n")
    model, config, _ = load_trained(trained, backend="torch")
    bare = ViT(**config.sizes(), num_classes=0, backend="torch").eval()
    bare.load_state_dict({name: x for name, x in model.state_dict().items() if "mlp_head" not in name})
    images = torch.stack([load_data(config).test.transform(open_image(path)) for path in paths])
    with np.load("features.npz") as file:
        assert file["images"].tolist() == list(map(str, paths))
        expected = bare(images)[:, 1:].reshape(2, 2, 2, 16).numpy()
        np.testing.assert_allclose(file["features"], expected, rtol=0, atol=1e-5)
        assert file["components"].shape == (2, 2, 2, 3) and file["foreground"].all()


def test_principal_components_match_scikit_learn():
    points = torch.randn(50, 7) * torch.arange(1, 8) + 3
    ours = features.principal(points, 3)
    theirs = sklearn.decomposition.PCA(3).fit_transform(points.double().numpy())
    signs = np.sign((ours.numpy() * theirs).sum(0))
    np.testing.assert_allclose(ours.numpy() * signs, theirs, rtol=0, atol=1e-9)
    assert torch.equal(ours, features.principal(points, 3))
    assert features.principal(points[:2], 3).shape == (2, 3)  # fewer points than components


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_the_part_with_less_contact_to_the_border(sign):
    blob = torch.zeros(2, 9, 9, dtype=torch.bool)
    blob[0, 2:6, 3:8] = blob[1, 4:, 2:5] = True
    maps = torch.randn(2, 9, 9, 8) * 0.1
    maps[blob] += sign * 3
    assert torch.equal(features.foreground(maps), blob)
    colours = features.components(maps, blob)
    assert (colours[~blob] == 0).all() and colours[blob].amax(0).tolist() == [1, 1, 1]


def test_masked_colours_are_drawn_over_white():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    colour = 0.5 * mask[..., None].expand(4, 4, 3)
    picture = features.upsample(colour, mask, (40, 80))
    assert picture.shape == (80, 40, 3)
    np.testing.assert_allclose(picture[0], 0.5, atol=1e-6)
    np.testing.assert_allclose(picture[-1], 1, atol=1e-6)
    assert picture.min() > 0.4, "a dark edge between colour and background"


@pytest.mark.parametrize(("images", "ending", "options"), [(1, "png", []), (4, "jpg", ["--foreground"])])
def test_pictures_of_features(images, ending, options, trained, photos, tmp_path, capsys):
    paths, out = sorted((photos / "dark").iterdir())[:images], tmp_path / f"picture.{ending}"
    assert run(capsys, "features", *paths, "--model", trained, "--out", out, *options)[0] == 0
    with Image.open(out) as picture:
        assert picture.width == 1200
        corner = np.asarray(picture.convert("RGB"))[:3, :3]
    assert (corner == 255).all(), "the background must be white"
    assert (tmp_path / "picture.npz").is_file()


@torch.no_grad()
def test_pictures_of_attention(trained, photos, tmp_path, capsys):
    paths = sorted((photos / "dark").iterdir())[:3]
    code, out, _ = run(capsys, "attention", *paths, "--model", trained, "--layer", 0, "--out", tmp_path / "a.png")
    assert (code, out) == (0, f"wrote {tmp_path / 'a.png'}\n")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 1200
    named = models.open_model(_options(paths[0], "--model", trained), purpose="attention")
    images = torch.randn(2, 3, 14, 14)
    expected = attention_maps(named.model, images)
    for layer in (0, 1, -1):
        got = named.attention(images, layer)
        torch.testing.assert_close(got, expected[:, layer, :, 0, 1:].unflatten(-1, (2, 2)))


def test_many_heads_are_drawn_in_several_rows():
    photo = Image.new("RGB", (28, 28), "gray")
    figure = attention.draw([(Path("a.png"), photo)] * 2, [torch.rand(16, 2, 2)] * 2)
    titles = [axes.get_title() for axes in figure.axes if axes.get_images()]
    assert titles == ["a.png", *(f"head {i}" for i in range(1, 17))] * 2
    assert len(figure.axes) == 2 * 3 * attention.COLUMNS


def test_attention_brightens_the_photo():
    weights = torch.zeros(4, 4)
    weights[0, 0] = 0.1
    picture = attention.overlay(Image.new("RGB", (32, 32), (90, 90, 90)), weights)
    assert picture.shape == (32, 32, 3) and picture[0, 0].sum() > 2 * picture[-1, -1].sum()
    assert np.isfinite(attention.overlay(Image.new("L", (32, 32)), torch.zeros(4, 4))).all()


@pytest.mark.parametrize("stretch", [True, False])
def test_nearly_uniform_attention_is_stretched_without_a_class_token(stretch, monkeypatch, tmp_path):
    figures, draw = [], attention.draw
    monkeypatch.setattr(attention, "draw", lambda *args, **options: figures.append(draw(*args, **options)))
    monkeypatch.setattr(attention.report, "save_picture", lambda *args: None)
    photo = tmp_path / "a.png"
    Image.new("RGB", (32, 32), (90, 90, 90)).save(photo)

    class Model(models.InferenceModel):
        class_token = not stretch

        def attention_maps(self, images, query):
            weights = torch.linspace(0.0624, 0.0626, 16)
            return [weights.view(1, 1, 4, 4)] if stretch else torch.cat((torch.zeros(1), weights)).view(1, 1, 1, 17)

    model = Model(torch.nn.Identity(), models.Preprocessing(32), 8, (), "cpu")
    monkeypatch.setattr(models, "open_model", lambda *args, **options: model)
    assert main(["attention", str(photo), "--model", "any", "--out", str(tmp_path / "out.png")]) == 0
    picture = figures[0].axes[1].get_images()[0].get_array()
    assert (picture[-1, -1].sum() > 2 * picture[0, 0].sum()) == stretch


# --- info and bench ----------------------------------------------------------------------------------------


def test_info_shows_versions_and_backends(capsys, monkeypatch):
    code, out, _ = run(capsys, "info")
    assert code == 0 and vit_triton.__version__ in out and torch.__version__.split("+")[0] in out
    assert 'backend by default: "auto"' in out and "cpu" in out
    for threads, text in ((1, "1 thread;"), (2, "2 threads;")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert text in info.cpu()
    monkeypatch.setenv("VIT_TRITON_BACKEND", "torch")
    assert 'backend by default: "torch" (VIT_TRITON_BACKEND)' in run(capsys, "info")[1]


def test_info_rejects_an_unknown_backend(capsys, monkeypatch):
    monkeypatch.setenv("VIT_TRITON_BACKEND", "none")
    code, out, err = run(capsys, "info")
    assert code == 2 and "x86_64" in out and "backend by default" not in out
    assert "VIT_TRITON_BACKEND must be one of 'triton', 'torch', 'auto', got 'none'" in err


def test_info_shows_the_reasons(monkeypatch):
    from vit_triton import backend
    from vit_triton.speeds import table as speeds

    amd = speeds.read(speeds.shipped_path("AMD AVX-512 BF16"))
    monkeypatch.setattr(backend, "_cpu_table", lambda: amd)
    monkeypatch.setattr(backend, "_torch_reason", backend._torch_reason.__wrapped__)  # without its cache
    monkeypatch.setattr(backend, "not_compiled_reason", lambda: "")
    table = info.choices("cpu")
    cells = [cell for column in table.columns[1:] for cell in column.cells]
    rows = list(table.columns[0].cells)
    assert len(cells) == 4 * len(rows) and rows == [f"{op}, {size}" for op in speeds.OPS for size in ("small", "large")]
    assert cells.count("other ops") == 4  # the encoder, in training
    assert {"triton 1.52x", "torch 0.80x", "torch: not measured"} <= set(cells)
    for cell in set(cells) - {"other ops"}:  # the table is what decides
        name, reason = re.split(": | ", cell, maxsplit=1)
        faster = reason.endswith("x") and float(reason[:-1]) >= speeds.FASTER
        assert name == ("triton" if faster else "torch"), cell
    with io.StringIO() as text:
        Console(file=text, width=80).print(table)
        shown = text.getvalue()
    assert all(f" {op}, " in shown for op in speeds.OPS) and "\u2026" not in shown
    assert {len(line) for line in shown.splitlines() if line.startswith("│")} == {80}
    monkeypatch.setattr(backend, "not_compiled_reason", lambda: "triton is not installed")
    assert info.choices("cpu") == '"auto" on cpu selects torch: triton is not installed'


@pytest.mark.skipif(INTERPRETER or EMULATOR, reason="no table is used")
def test_info_names_the_kind_of_cpu_and_its_table(monkeypatch, tmp_path, caplog):
    from vit_triton import backend
    from vit_triton.speeds import table as speeds

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("VIT_TRITON_TUNED", raising=False)
    monkeypatch.setattr("vit_triton.cpu.features.kind", lambda: "AMD AVX-512 BF16")
    assert "; AMD AVX-512 BF16: speeds measured on 2026-11-25 with 2 threads, shipped with vit_triton" in info.cpu()
    monkeypatch.setattr("vit_triton.cpu.features.kind", lambda: "Acme AVX2")
    assert info.cpu().endswith("; Acme AVX2: no measured speeds; vit-triton tune --device cpu measures them")
    monkeypatch.setattr(backend, "_cpu_table", lambda: None)
    monkeypatch.setattr(backend, "_hinted", False)
    monkeypatch.setattr(backend, "_torch_reason", backend._torch_reason.__wrapped__)
    reason = "the kernels have not been measured on this kind of CPU (Acme AVX2); vit-triton tune --device cpu measures"
    assert info.choices("cpu").startswith(f'"auto" on cpu selects torch: {reason}') and not caplog.records
    path = tmp_path / "vit_triton" / "tuned" / "acme-avx2.json"
    speeds.write(path, speeds.new_table("Acme AVX2", {}))
    assert info.cpu().endswith(f", in {path}")


@pytest.mark.skipif(
    not (Path(vit_triton.__file__).parents[1] / "benchmarks").is_dir(), reason="the package is not that of a checkout"
)
def test_bench_forwards_to_the_benchmarks(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "memory", "--help"]) == 0
    assert "usage: python -m benchmarks memory" in capfd.readouterr().out
    assert main(["bench", "nothing"]) == 2
    monkeypatch.setattr(bench.vit_triton, "__file__", str(tmp_path / "site-packages/vit_triton/__init__.py"))
    capfd.readouterr()
    assert main(["bench", "ops"]) == 2
    err = capfd.readouterr().err
    assert "run the command in a checkout of vit_triton's repository" in err and err.count("\n") == 1


# --- errors ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory) -> dict[str, Path | str]:
    """Invalid folders that resemble a training run and a Hugging Face model."""
    run, model = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("model")
    torch.save([1], run / "checkpoint.pt")
    (model / "config.json").write_text('{"model_type": "vit", "hidden_size": "x"}')
    return {"LIST": run, "hf:ODD": f"hf:{model}"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict PHOTO --model nowhere", "--model: expected a folder that train wrote, timm:NAME or hf:NAME"),
        ("predict PHOTO --model FOLDER", "has no checkpoint.pt"),
        ("predict PHOTO --model TRAINED --weights w.pt", "--weights requires a timm: or hf: model"),
        ("predict PHOTO --model TRAINED --key teacher", "--key requires a timm: or hf: model"),
        (f"predict PHOTO --model timm:{TIMM} --resample", "--resample requires --weights"),
        (f"predict PHOTO --model timm:{TIMM} --grid 2 3", "--grid requires --weights"),
        (f"predict PHOTO --model timm:{TIMM} --weights WEIGHTS --grid 0 3", "grid must be (rows, columns), two"),
        (f"predict PHOTO --model timm:{TIMM} --weights WEIGHTS --key ema", "contains no set of weights 'ema'"),
        ("predict PHOTO --model TRAINED --image-size 8", "--image-size requires a timm: or hf: model"),
        ("predict PHOTO --model timm:nothing", "timm has no model nothing"),
        (
            "predict PHOTO --model timm:resnet18",
            "expected one of VisionTransformer, Eva, SwinTransformer, SwinTransformerV2 of timm, got resnet18, "
            "which is a ResNet",
        ),
        ("predict PHOTO --model timm:swin_tiny", "timm.list_models('*swin_tiny*') lists swin_tiny_patch4_window7_224"),
        ("predict PHOTO --model timm:vit_bse_patch16_224", "similar names are vit_base_patch16_224, "),
        (
            "predict PHOTO --model timm:swin_tiny_patch4_window7_224 --image-size 112",
            "--image-size must be a multiple of 32, the stride of the last stage, got 112",
        ),
        (f"predict PHOTO --model timm:{TIMM} --weights none.pt", "--weights: none.pt: no such file"),
        (f"predict PHOTO --model timm:{TIMM} --weights PHOTO", "photo.png: expected a file name with one of"),
        ("predict PHOTO --model timm:vit_small_patch16_224 --weights WEIGHTS", "Use --ignore PATTERN to skip weights"),
        (
            f"predict PHOTO --model timm:{TIMM} --image-size 100",
            "--image-size must be a multiple of the patch size 16, got 100",
        ),
        (f"predict PHOTO --model timm:{TIMM} --image-size 0", "--image-size must be at least 1, got 0"),
        (f"attention PHOTO --model timm:{TIMM} --weights WEIGHTS --layer 12", "--layer must be from -12 to 11, got 12"),
        ("attention PHOTO --model TRAINED --layer -3", "--layer must be from -2 to 1, got -3"),
        ("features PHOTO --model TRAINED --out picture.txt", "--out must end in .png, .jpg, .webp, got picture.txt"),
        ("features PHOTO --model TRAINED --out nowhere/a.png", "--out: folder nowhere does not exist"),
        ("predict PHOTO --model TRAINED --device nothing", "vit-triton: --device: "),
        ("train digits --device nothing", "vit-triton: --device: "),
        ("eval TRAINED --device nothing", "vit-triton: --device: "),
        ("train digits --fsdp", "vit-triton: --fsdp requires torchrun"),
        ("train digits --dim 10 --heads 3", "vit-triton: --dim must be divisible by heads"),
        ("train digits --out TRAINED", "contains a checkpoint; --resume, or choose another folder"),
        ("predict PHOTO --bogus --model TRAINED", "usage: vit-triton predict "),
        ("predict PHOTO --bogus --model TRAINED", "unrecognized arguments: --bogus"),
        ("--bogus predict PHOTO --model TRAINED", "usage: vit-triton [-h]"),
        (
            f"features PHOTO --model timm:{TIMM} --weights WEIGHTS --ignore blocs.*",
            "--ignore: 'blocs.*' matches no name",
        ),
        (f"predict PHOTO --model timm:{TIMM} --ignore head.*", "--ignore requires --weights"),
        ("train digits --epochs 0", "--epochs must be at least 1, got 0"),
        ("train digits --learning-rate inf", "--learning-rate must be positive and finite, got inf"),
        ("train digits --workers -1", "--workers must be at least 0, got -1"),
        ("train digits --batch-size 2000", "--batch-size must be at most the number of training images, 1259"),
        ("train digits --epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("train digits --dim 1000000000000", "out of memory; reduce the size of the model, image or batch: "),
        ("train digits --device meta", "--device: meta is not supported"),
        ("train digits --out PHOTO", "File exists: '"),
        ("train nowhere", "nowhere/CLASS/"),
        ("train PHOTO", "data: [Errno 20] Not a directory: '"),
        ("train EMPTY", "data must be a folder, digits, cifar10 or another source, got ''"),
        ("eval TRAINED --data EMPTY", "--data must be a folder, digits, cifar10 or another source, got ''"),
        ("eval PHOTO", "argument RUN: must be a folder, got the file "),
        ("eval FOLDER", "has no checkpoint.pt"),
        ("eval LIST", "checkpoint.pt: ValueError: expected a checkpoint of train with "),
        ("predict PHOTO --model LIST", "checkpoint.pt: ValueError: expected a checkpoint of train with "),
        ("predict PHOTO --model timm:vit_tiny_patch16_224.none", "--model: Invalid pretrained tag (none)"),
        ("predict PHOTO --model hf:ODD", "has invalid files: "),
        ("predict PHOTO --model hf:./nowhere", "--model: hf:./nowhere: no such folder"),
        ("predict PHOTO", "--model"),
        ("predict", "IMAGE"),
        ("nothing", "nothing"),
        ("", "info|predict|"),
    ],
)
def test_usage_errors_are_one_line(words, message, photo, trained, theirs, odd_models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"PHOTO": photo, "TRAINED": trained, "FOLDER": tmp_path, "WEIGHTS": theirs[1], "EMPTY": "", **odd_models}
    code, out, err = run(capsys, *(named.get(word, word) for word in words.split()))
    assert (code, out) == (2, "") and message in err
    assert err.startswith(("vit-triton: ", "usage: ")) and "Traceback" not in err
    assert err.startswith("usage") or err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["predict PHOTO --model TRAINED", "train digits", "eval TRAINED"])
def test_unavailable_backend_gives_a_one_line_error(words, photo, trained, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vit_triton.backend._TRITON_INSTALLED", False)
    named = {"PHOTO": photo, "TRAINED": trained}
    code, _, err = run(capsys, *(named.get(word, word) for word in words.split()), "--backend", "triton")
    assert code == 2 and err.startswith('vit-triton: --backend: backend "triton" requires the package triton')


def test_attention_without_a_class_token_is_the_mean(photos, tmp_path, photo, capsys):
    words = ["train", str(photos), "--out", str(tmp_path), "--epochs", "1", "--model", "SimpleViT", *SMALL.split()]
    assert main(words) == 0
    for command in ("attention", "features"):
        assert run(capsys, command, photo, "--model", tmp_path, "--out", tmp_path / "a.png")[0] == 0
    named = models.open_model(_options(photo, "--model", tmp_path), purpose="attention")
    images = torch.randn(2, 3, 14, 14)
    expected = attention_maps(named.model, images)[:, 0].mean(2)
    torch.testing.assert_close(named.attention(images, 0), expected.unflatten(-1, (2, 2)))


# features and maps of a model; the shapes are rows, columns and heads of the last block
OTHERS = {
    "timm:swin_tiny_patch4_window7_224": ((7, 7), 24),
    "timm:vit_small_patch16_dinov3": ((16, 16), 6),
    "hf:swin": ((7, 7), 24),
    "hf:dinov3": ((14, 14), 6),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_swin_and_dinov3(name, tmp_path, photo, capsys):
    (rows, columns), heads = OTHERS[name]
    torch.manual_seed(0)
    if name.startswith("timm"):
        model = timm.create_model(name[5:])
        weights = tmp_path / "weights.pt"
        torch.save(model.state_dict(), weights)
        words = ["--model", name, "--weights", weights]
    else:
        if name == "hf:swin":
            model = transformers.SwinModel(transformers.SwinConfig())
        else:
            sizes = dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=2)
            model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes))
        model.save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text('{"size": 224}')
        words = ["--model", f"hf:{tmp_path}"]
    named = models.open_model(_options(photo, *words), purpose="attention")
    images = torch.randn(2, 3, *[named.preprocessing.size] * 2)
    assert named.features(images).shape == (2, rows, columns, 768 if "swin" in name else 384)
    maps = named.attention(images, -1)
    assert maps.shape == (2, heads, rows, columns)
    whole = attention_maps(named.model, images)
    expected = whole[-1].mean((2, 3)).flatten(2) if "swin" in name else whole[:, -1, :, 0, -rows * columns :]
    torch.testing.assert_close(maps.flatten(2), expected)
    assert run(capsys, "attention", photo, *words, "--layer", 0, "--out", tmp_path / "a.png")[0] == 0


def test_predict_requires_a_classification_head(photo, capsys, theirs, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, num_classes=0))
    words = ("predict", photo, "--model", f"timm:{TIMM}", "--weights", theirs[1], "--ignore", "head.*")
    code, _, err = run(capsys, *words)
    assert (code, err) == (2, f"vit-triton: --model: timm:{TIMM} has no classification head\n")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def fail(*args, **options):
        raise socket.gaierror("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"timm:{TIMM}", f"Download https://huggingface.co/timm/{TIMM}.augreg_in21k_ft_in1k/resolve/main/"
                         "model.safetensors and pass the file: --weights FILE"),
        ("hf:facebook/dinov2-small", "Put config.json, preprocessor_config.json and model.safetensors from "
                                     "https://huggingface.co/facebook/dinov2-small in a folder and pass it: --model"),
    ],
)  # fmt: skip
def test_offline_error_names_the_missing_file(words, message, photo, no_network, capsys):
    code, _, err = run(capsys, "features", photo, "--model", words)
    assert code == 2 and message in err and err.count("\n") == 1
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "otherwise the client retries for a minute"


def test_ctrl_c_gives_a_one_line_message(monkeypatch, capsys, tmp_path):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.training, "train", interrupt)
    code, _, err = run(capsys, "train", "digits", "--out", tmp_path)
    assert (code, err) == (130, "vit-triton: interrupted; --resume continues from the last checkpoint\n")


def test_one_process_reports_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vit_triton.cli", "train", "digits", "--out", str(tmp_path), "--heads", "many"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    line = "argument --heads: invalid int value: 'many'"
    assert result.returncode != 0
    assert result.stderr.count(f"vit-triton train: error: {line}\n") == 1, "exactly one process must print the error"
    *_, last, end = result.stderr.splitlines()
    assert last == f"  traceback : vit-triton: {line}" and set(end) == {"="}, "torchrun's summary lacks the error"


@pytest.mark.parametrize("words", [("eval", "nowhere"), ("eval",)])
def test_other_processes_report_after_a_grace_period(words, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code, _, err = run(capsys, *words)
        assert code == 2 and err.splitlines()[-1].startswith("vit-triton")
    assert waited == [errors.GRACE]


def test_ctrl_c_under_torchrun_is_reported_by_rank_0_only(monkeypatch, capsys, tmp_path):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(training.training, "train", interrupt)
    assert run(capsys, "train", "digits", "--out", tmp_path) == (130, "", "")


@pytest.mark.parametrize("package", ["rich", "matplotlib", "PIL"])
def test_missing_package_error_names_the_extra(package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == package or "vit_triton.cli." in name]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("images", "cli"):  # a package's references to its modules
        monkeypatch.delitem(sys.modules, f"vit_triton.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, "features", "photo.png", "--model", "run")
    assert code == 2 and package in err and "install the extra [cli], for example" in err and err.count("\n") == 1


def test_missing_timm_is_reported(monkeypatch, capsys, photo):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run(capsys, "predict", photo, "--model", f"timm:{TIMM}")
    assert code == 2 and "pip install timm" in err and err.count("\n") == 1


def test_missing_package_of_training_names_the_extra_of_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    code, _, err = run(capsys, "train", "digits", "--out", tmp_path)
    assert code == 2 and "sklearn" in err and "extra [cli], for example pip install '.[cli]'" in err
    assert err.count("\n") == 1 and "[train]" not in err
