"""Sources of labelled images, their splits, order and transforms."""

import collections
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_triton.cli import main
from vit_triton.training import TrainConfig, evaluate, loop, train
from vit_triton.training.data import AugmentedDataset, batches, class_weights, load_data
from vit_triton.training.loop import Run
from vit_triton.training.preprocessing import Preprocessing
from vit_triton.training.sources import Source, open_source
from vit_triton.training.splits import NAMES, split, subset

for name in ("matplotlib", "rich", "sklearn", "torchvision"):
    pytest.importorskip(name)
from PIL import Image  # noqa: E402 - torchvision needs it
from test_training import SMALL, Killed, assert_same_run, at_call, bright_and_dark  # noqa: E402

SIZES = {name: SMALL[name] for name in ("image_size", "patch_size")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return bright_and_dark(tmp_path_factory.mktemp("photos"), 10, 10, 12)


def source(labels, splits=None, read=None) -> Source:
    """Gray images of 4 x 4 pixels, of the value of their index."""
    classes = tuple("abcdefghijklmnopqrstuvwxyz"[: max(labels) + 1])
    read = read or (lambda i: Image.new("L", (4, 4), i))
    return Source("made", classes, tuple(labels), tuple(map(str, range(len(labels)))), splits, read, channels=1)


def write_idx(path: Path, values: np.ndarray) -> None:
    content = (
        bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx(tmp_path) -> Path:
    """Files as of MNIST: 12 training and 6 test images of 5 x 4 pixels, of the classes 3, 7 and 10."""
    for prefix, count, end in (("train", 12, ""), ("t10k", 6, ".gz")):
        labels = np.resize([7, 10, 3], count)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{end}", np.arange(count * 20).reshape(count, 5, 4) % 256)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{end}", labels)
    return tmp_path


# --- sources -----------------------------------------------------------------------------------------------


def test_idx_files(idx):
    made = open_source(f"idx:{idx}")
    assert made.classes == ("3", "7", "10") and made.labels == (1, 2, 0) * 6 and made.channels == 1
    assert made.splits == ("train",) * 12 + ("test",) * 6 and made.names[12:14] == ("t10k/0", "t10k/1")
    assert np.asarray(made.image(13)).tolist() == np.arange(20, 40).reshape(5, 4).tolist()
    assert tuple(map(len, (split(made.labels, made.splits, made.classes)))) == (9, 3, 6)


@pytest.mark.parametrize(("change", "message"), [
    (lambda idx: (idx / "train-labels-idx1-ubyte").unlink(), "has no train-labels-idx1-ubyte or train-labels-idx1-"),
    (lambda idx: [path.unlink() for path in idx.iterdir()], "has no train-images-idx3-ubyte, train-labels-idx1-ubyte,"),
    (lambda idx: write_idx(idx / "train-labels-idx1-ubyte", np.zeros(11)), "has 12 images, .* has 11 labels"),
    (lambda idx: write_idx(idx / "train-labels-idx1-ubyte", np.zeros((4, 3))), "is not an idx file of .* 1 dimension$"),
    (lambda idx: cut(idx / "train-images-idx3-ubyte", 9), "is not an idx file of bytes with 3 dimensions"),
    (lambda idx: cut(idx / "train-images-idx3-ubyte", 100), "has 84 bytes of values, expected 240"),
    (lambda idx: cut(idx / "t10k-images-idx3-ubyte.gz", 30), "t10k-images-idx3-ubyte.gz cannot be read: "),
    (lambda idx: write_idx(idx / "t10k-images-idx3-ubyte.gz", np.zeros((6, 2, 2))), r"have sizes \(5, 4\), \(2, 2\)"),
])  # fmt: skip
def test_damaged_idx_files_are_named(change, message, idx):
    change(idx)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^data: .*{message}"):
        open_source(f"idx:{idx}")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def write_csv(photos: Path, file: Path, header="path,label,split", splits=NAMES) -> list[str]:
    """Write a CSV file of all photos, which are a link next to it, and return its lines."""
    if not (file.parent / "link").exists():
        (file.parent / "link").symlink_to(photos)
    paths = sorted(path.relative_to(photos) for path in photos.glob("*/*.png"))
    lines = [f"link/{path},{path.parent.name},{splits[i % len(splits)]}" for i, path in enumerate(paths)]
    file.write_text("\ufeff" + "\n".join([header, *lines]) + "\n", encoding="utf-8")
    return lines


def test_csv_file(photos, tmp_path):
    write_csv(photos, tmp_path / "list.csv")
    made, folder = open_source(str(tmp_path / "list.csv")), open_source(str(photos))
    assert (made.classes, made.labels, made.channels) == (folder.classes, folder.labels, 3)
    assert made.splits == tuple(NAMES[i % 3] for i in range(20)) and made.names[0] == "link/bright/0.png"
    for i in (0, 19):
        assert made.image(i).tobytes() == folder.image(i).tobytes()
    write_csv(photos, tmp_path / "list.csv", "path,kind")
    assert open_source(str(tmp_path / "list.csv"), label="kind").labels == folder.labels


@pytest.mark.parametrize(("text", "message"), [
    ("path,kind\na,b\n", "has no column 'label', only path, kind; --label"),
    ("file,label\na,b\n", "has no column 'path', only file, label$"),
    ("", "has no column 'path', only $"),
    ("path,label\n", "contains no images"),
    ("path,label\na\n", "line 2: the column 'label' is empty"),
    ("path,label\na,b\n./a,c\n", "line 3: ./a is also in line 2"),
    ("path,label,split\na,b,dev\n", "line 2: split must be one of train, val, test, validation, valid, got 'dev'"),
    ('path,label\n"a"x,b\n', "is not a CSV file in UTF-8: "),
    ("path,label\na,\udcff\n", "is not a CSV file in UTF-8: "),
    (None, "list.csv: no such file"),
])  # fmt: skip
def test_damaged_csv_file_is_named(text, message, tmp_path):
    if text is not None:
        (tmp_path / "list.csv").write_text(text, errors="surrogateescape")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^data: \S*/list.csv.*{message}|^data: .*{message}"):
        open_source(str(tmp_path / "list.csv"))


def test_evaluation_of_data_without_columns(photos, tmp_path):
    """The run's column of the label does not apply."""
    write_csv(photos, tmp_path / "list.csv", "path,kind")
    train(
        TrainConfig(
            tmp_path / "list.csv", label="kind", out=tmp_path / "run", **SMALL | {"epochs": 1, "backend": "torch"}
        )
    )
    assert evaluate(tmp_path / "run", str(photos))["images"] == 20


@pytest.mark.parametrize("data", [".", "empty"])
def test_class_folder_without_images_is_named(data, photos, tmp_path):
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        (ValueError, FileNotFoundError), match="^data: (no images in .*/empty; the ext|Couldn't find any)"
    ):
        open_source(str(tmp_path / data))


@pytest.mark.parametrize("kind", ["digits", "cifar10", "idx:a", "folder"])
def test_label_of_data_without_columns_is_rejected(kind):
    with pytest.raises(ValueError, match="^label must be unset except for .csv, .* data, got 'kind'$"):
        open_source(kind, label="kind")


def test_hugging_face_data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pixels = [np.full((6, 5), 10 * i, np.uint8) for i in range(8)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "none", "dog"]))
    rows = {"image": [Image.fromarray(x) for x in pixels], "label": [0, 2] * 4}
    whole = datasets.Dataset.from_dict(rows, features=features)
    parts = datasets.DatasetDict(train=whole.select(range(5)), validation=whole.select(range(5, 8)))
    parts.save_to_disk(tmp_path / "disk")
    whole.to_parquet(tmp_path / "whole.parquet")
    # as pandas writes it: without the types
    plain = datasets.Dataset.from_dict(
        {"picture": [{"bytes": png(x), "path": None} for x in pixels], "kind": ["b", "a"] * 4}
    )
    plain.to_parquet(tmp_path / "plain.parquet")
    for made in (open_source(f"hf:{tmp_path}/disk"), open_source(f"{tmp_path}/whole.parquet"),
                 open_source(f"hf:{tmp_path}/plain.parquet", label="kind")):  # fmt: skip
        assert len(made) == 8 and made.channels == 1
        assert [np.asarray(made.image(i)).tolist() for i in range(8)] == [x.tolist() for x in pixels]
        if "plain" in made.name:
            assert made.classes == ("a", "b") and made.labels == (1, 0) * 4
        else:
            assert made.classes == ("cat", "dog") and made.labels == (0, 1) * 4
    assert open_source(f"hf:{tmp_path}/disk").splits == ("train",) * 5 + ("val",) * 3
    assert pickle.loads(pickle.dumps(open_source(f"hf:{tmp_path}/disk"))).image(7).size == (5, 6)
    (tmp_path / "bad.parquet").write_text("no")
    for data, label, message in (
        ("plain.parquet", None, "has no column 'label', only picture, kind; --label"),
        ("plain.parquet", "picture", "expected a class in the column 'picture' of train/0, got {"),
        ("bad.parquet", None, "cannot be read: "),
        ("nowhere", None, "nowhere: no such file or folder; expected a folder of datasets' save_to_disk"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"^data: .*{message}"):
            open_source(f"hf:{tmp_path}/{data}", label=label)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_shard(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_shards(tmp_path):
    pixels = [np.full((3, 4, 3), 40 * i, np.uint8) for i in range(6)]
    for start, shard in enumerate(("train-08", "train-09", "test-10")):
        files = {}
        for i in (2 * start, 2 * start + 1):
            files |= {f"a.b/{i}.cls": str(i % 2 + 9).encode(), f"a.b/{i}.png": png(pixels[i]), f"a.b/{i}.json": b"{}"}
        write_shard(tmp_path / f"{shard}.tar", files)
    made = open_source(f"wds:{tmp_path}/{{train-08,train-09,test-10}}.tar")
    assert made.classes == ("9", "10") and made.labels == (0, 1) * 3 and made.names[5] == "test-10.tar/a.b/5.png"
    assert made.splits == ("train",) * 4 + ("test",) * 2
    assert [np.asarray(made.image(i)).tolist() for i in range(6)] == [x.tolist() for x in pixels]
    assert open_source(f"wds:{tmp_path}/train-{{08..09}}.tar").names == made.names[:4]
    assert open_source(f"wds:{tmp_path}/{{*,train-09}}.tar", label="json").labels == (0,) * 6
    write_shard(tmp_path / "packed.tar", {"0.png": png(pixels[0])}, "w:gz")
    for pattern, label, message in (
        ("train-{08..11}.tar", None, "train-10.tar: no such file"),
        ("no*.tar", None, r"no file matches .*/no\*.tar"),
        ("packed.tar", None, "packed.tar is not an uncompressed tar file: "),
        ("test-10.tar", "txt", "test-10.tar/a.b/4.png has no label, 4.txt; --label"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"^data: .*{message}"):
            open_source(f"wds:{tmp_path}/{pattern}", label=label)


def test_photographs_of_solar_cells_through_tensorbay():
    pytest.importorskip("tensorbay")
    folder = Path(pytest.importorskip("elpv_dataset").__file__).parent / "data"
    data = f"tensorbay:Elpv={folder}"
    made = open_source(data, label="attribute:defect probability>0.5")
    assert made.classes == ("defect probability>0.5", "not defect probability>0.5") and made.channels == 1
    # the file has 2,624 lines; 715 have the probability 1 and 106 have 2/3
    assert collections.Counter(made.labels) == {0: 821, 1: 1803} and made.image(2623).size == (300, 300)
    assert open_source(data).classes == ("mono", "poly")
    for bad, label, message in (
        (data, "attribute:age", "data: .*cell0001.png has no attribute:age; its attributes are attribute:defect prob"),
        (data, "defect", "label must be attribute:NAME or attribute:NAME>NUMBER for tensorbay, got 'defect'"),
        ("tensorbay:Elpv=nowhere", None, "data: tensorbay's Elpv cannot read nowhere: FileNotFoundError: .*; help"),
        ("tensorbay:Nothing=nowhere", None, "data: tensorbay.opendataset has no loader 'Nothing'; dir"),
        ("tensorbay:Elpv", None, "data: tensorbay needs the name of a loader and a path, tensorbay:LOADER=PATH, got"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            open_source(bad, label=label)


def test_missing_package_is_named_in_the_error(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("datasets", "tensorbay")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("datasets", "tensorbay"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"install the extra \[data\]"):
        open_source("a.parquet")
    with pytest.raises(ImportError, match="pip install --no-deps tensorbay==1.24.2 and pip install numpy-quaternion"):
        open_source("tensorbay:Elpv=a")


def test_fashion_mnist_of_debian():
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("requires Debian's package dataset-fashion-mnist")
    data = load_data(TrainConfig(f"idx:{folder}", train_images=1000))
    assert tuple(map(len, (data.train, data.val, data.test))) == (1000, 6000, 10000)
    assert data.train[0][0].shape == (1, 28, 28) and collections.Counter(data.train.labels)[3] == 100


# --- splits ------------------------------------------------------------------------------------------------


def test_split_is_stratified():
    labels = [0] * 50 + [1] * 30 + [2] * 4 + [3] * 3
    parts = split(labels, None, "abcd")
    assert sorted(sum(parts, [])) == list(range(87))
    counts = [[sum(labels[i] == label for i in part) for label in range(4)] for part in parts]
    assert counts == [[35, 21, 2, 1], [5, 3, 1, 1], [10, 6, 1, 1]]
    # a class keeps its images in another order of the others
    assert [i + 9 for i in split(labels[9:], None, "abcd")[2] if labels[i + 9]] == [i for i in parts[2] if labels[i]]


@pytest.mark.parametrize(("labels", "splits", "message"), [
    ("aab", None, "class 'b' has 1 image, at least 3 are needed to hold out images for validation and testing"),
    ("aaabb", None, "class 'b' has 2 images, at least 3 "),
    ("aaabbc", "train train train train test test", "class 'c' is only in test, not in train"),
    ("aaabbb", "train train test train test test", "class 'b' has 1 image in train, at least 2 are needed to hold out "
                                                   "images for validation$"),
    ("aaab", "train val test train", "class 'b' has 1 image, at least 2 are needed$"),
    ("aabb", "val val test test", "no training images, only 2 for validation and 2 for testing"),
    ("aaaa", None, "expected at least 2 classes, got one, 'a'"),
])  # fmt: skip
def test_data_that_cannot_be_split_are_rejected(labels, splits, message):
    with pytest.raises(ValueError, match=f"^data: {message}"):
        split([ord(x) - 97 for x in labels], splits and splits.split(), sorted(set(labels)))


def test_subsets_are_nested_and_stratified():
    labels = [0] * 60 + [1] * 30 + [2] * 2
    indices = range(1, 92)
    parts = {count: subset(labels, indices, count, seed=1) for count in (3, 12, 46, 91)}
    for small, large in zip(list(parts.values()), list(parts.values())[1:], strict=False):
        assert {*small} < {*large}
    for count, expected in ((3, [1, 1, 1]), (12, [8, 3, 1]), (46, [30, 15, 1]), (91, [59, 30, 2])):
        got = [sum(labels[i] == label for i in parts[count]) for label in range(3)]
        assert sum(got) == count and np.abs(np.subtract(got, expected)).max() <= 1
    assert subset(labels, indices, 12, seed=2) != parts[12] == subset(labels, indices, 12, seed=1)
    for count in (2, 92):
        with pytest.raises(
            ValueError, match=f"^train_images must be at least the number of classes, 3, .* 91, got {count}"
        ):
            subset(labels, indices, count, seed=1)


# --- order -------------------------------------------------------------------------------------------------


def test_sampler_draws_every_class_equally_often():
    labels = [0] * 800 + [2] * 100 + [5] * 100
    drawn = sum(batches(1000, 10, 0, 1, labels=labels), [])
    counts = collections.Counter(labels[i] for i in drawn)
    assert len(drawn) == 1000 and all(abs(counts[label] - 1000 / 3) < 60 for label in (0, 2, 5))  # four deviations
    assert len({i for i in drawn if labels[i] == 2}) > 80
    assert drawn != sum(batches(1000, 10, 0, 2, labels=labels), [])
    assert batches(1000, 10, 0, 1, labels=labels, start=7) == batches(1000, 10, 0, 1, labels=labels)[7:]


def test_class_weights():
    assert class_weights([0, 0, 0, 1], 2).tolist() == pytest.approx([4 / 6, 2])


@pytest.mark.parametrize("balance", ["loss", "sampler"])
def test_balanced_training_resumes_bit_for_bit(balance, photos, tmp_path):
    options = dict(
        data=str(unbalanced(photos, tmp_path / "images")), checkpoint_every=1, balance=balance, epochs=2,
        backend="torch", train_images=9,
    )  # fmt: skip
    options = SMALL | options
    train(TrainConfig(out=tmp_path / "whole", **options))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_call(patch, Run, "training_step", 4)
        train(TrainConfig(out=tmp_path / "part", **options))
    train(TrainConfig(out=tmp_path / "part", resume=True, **options))
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text()
    train(TrainConfig(out=tmp_path / "none", **options | {"balance": "none"}))
    assert (tmp_path / "none" / "metrics.jsonl").read_text() != lines


def unbalanced(photos: Path, folder: Path) -> Path:
    shutil.copytree(photos, folder)
    for i in range(6):
        (folder / "dark" / f"{i}.png").unlink()
    return folder


# --- damaged images and evaluation -------------------------------------------------------------------------


def test_damaged_images_are_named_and_left_out(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "images")
    for i in (1, 4):
        (tmp_path / "images" / "dark" / f"{i}.png").write_bytes((photos / "dark" / f"{i}.png").read_bytes()[:60])
    data, out = tmp_path / "images", tmp_path / "run"
    message = r"^data: left out 2 damaged of 20 images: \S+/dark/1.png: cannot be read: [^;]*; \S+/dark/4.png: [^;]*$"
    made = load_data(TrainConfig(data, **SIZES))
    with pytest.warns(UserWarning, match=message):
        kept = load_data(TrainConfig(data, skip_damaged=True, **SIZES))
    for part in NAMES:
        expected = [name for name in getattr(made, part).names if name not in ("dark/1.png", "dark/4.png")]
        assert getattr(kept, part).names == expected
    for part in (kept.train, kept.val, kept.test):
        assert all(part[i][0].shape == (3, 8, 8) for i in range(len(part)))
    with pytest.warns(UserWarning, match=message):
        train(TrainConfig(data, out=out, skip_damaged=True, **SMALL | {"epochs": 1, "backend": "torch"}))
    with pytest.warns(UserWarning, match=message):
        assert main(["eval", str(out), "--data", os.path.join(data, "."), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == len(kept.test)
    shutil.copytree(data, tmp_path / "other")
    with pytest.raises(ValueError, match="; --skip-damaged"):
        evaluate(out, str(tmp_path / "other"), skip_damaged=False)
    with pytest.warns(UserWarning, match=message):
        assert evaluate(out, str(tmp_path / "other"))["images"] == 18
    shutil.rmtree(out)
    for name in NAMES:  # wherever they are
        write_csv(data, tmp_path / "list.csv", splits=(name, *NAMES))
        with pytest.raises(ValueError, match=r"^data: \S+/dark/[14].png: .*; --skip-damaged \("):
            train(TrainConfig(tmp_path / "list.csv", out=out, **SMALL | {"epochs": 1, "backend": "torch"}))
        shutil.rmtree(out)


def test_evaluation_of_other_data_uses_all_images(photos, tmp_path, capsys):
    """Unless they have test or validation images; the run's own data are its test images."""
    run, options = tmp_path / "run", SMALL | {"epochs": 1, "backend": "torch"}
    train(TrainConfig(photos, out=run, **options))
    assert evaluate(run)["images"] == evaluate(run, os.path.relpath(photos))["images"] == 4
    shutil.copytree(photos, tmp_path / "other")
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.endswith("%, 20 images\n")
    for splits, images in (("train", "val", "test", "test"), 10), (("train", "val"), 10), (("train",), 20):
        write_csv(photos, tmp_path / "list.csv", splits=splits)
        assert evaluate(run, str(tmp_path / "list.csv"))["images"] == images
    assert main(["eval", str(run), "--data", "cifar10", "--data-folder", str(tmp_path)]) == 2
    assert f"to {tmp_path}/cifar-10-python.tar.gz, or use --download" in capsys.readouterr().err


def test_evaluation_keeps_the_preprocessing_of_the_model(tmp_path, monkeypatch):
    """The values of digits are from 0 to 1, those of other data from -1 to 1."""
    scans = open_source("digits")
    pixels = np.stack([np.asarray(scans.image(i)) for i in range(1797)])
    for kind, values in (("images-idx3", pixels), ("labels-idx1", np.array(scans.labels))):
        write_idx(tmp_path / f"train-{kind}-ubyte", values)
    train(TrainConfig("digits", out=tmp_path / "run", epochs=1, dim=16, heads=2, depth=1, backend="torch"))
    used = []
    monkeypatch.setattr(loop, "test", lambda model, data, *rest: used.append(data) or {})
    assert evaluate(tmp_path / "run", f"idx:{tmp_path}") == {"images": 1797}
    own = load_data(TrainConfig("digits")).test
    for i in (0, 358):
        assert torch.equal(used[0][own.indices[i]][0], own[i][0])


# --- preprocessing -----------------------------------------------------------------------------------------


def test_transform_of_test_images():
    ramp = Image.fromarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 128, 3)).copy())
    preprocessing = Preprocessing((28, 56), (0.5, 0.25, 0), (0.5, 0.5, 1), 3)
    image = preprocessing.test_transform("photos", 3)(ramp)
    assert image.shape == (3, 28, 56)
    expected = 4 + (torch.arange(28) + 0.5) * 2 - 0.5  # the center 56 of 64 rows, averaged in pairs
    for channel, (mean, std) in enumerate(((0.5, 0.5), (0.25, 0.5), (0, 1))):
        rows = 255 * (image[channel] * std + mean)
        torch.testing.assert_close(rows[1:-1, 1:-1], expected[1:-1, None].expand(26, 54), rtol=0, atol=0.51)
    for data, channels in (("cifar10", 3), ("digits", 1)):  # not cropped
        whole = preprocessing.test_transform(data, channels)(ramp)
        assert 255 * (whole[2, 0].max()) < 2 and 255 * whole[2, -1].min() > 61


@pytest.mark.parametrize(("data", "channels"), [("photos", 3), ("cifar10", 3), ("digits", 1)])
def test_transforms_convert_channels_and_sizes(data, channels):
    image = Image.new("L" if channels == 1 else "RGB", (30, 40), 51 if channels == 1 else (51, 51, 51))
    for wanted in (1, 3):
        preprocessing = Preprocessing((12, 8), (0.1,) * wanted, (0.5,) * wanted, wanted)
        torch.manual_seed(0)
        for transform in (
            preprocessing.training_transform(data, channels),
            preprocessing.test_transform(data, channels),
        ):
            made = pickle.loads(pickle.dumps(transform))(image)
            assert made.shape == (wanted, 12, 8) and made.dtype == torch.float32
            torch.testing.assert_close(made[:, 5, 4], torch.full((wanted,), (0.2 - 0.1) / 0.5))
            assert (made == made[:1]).all()


# --- data --------------------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_epoch():
    first = batches(23, 4, seed=1, epoch=2)
    assert [len(batch) for batch in first] == [4] * 5
    assert len({i for batch in first for i in batch}) == 20
    assert first == batches(23, 4, seed=1, epoch=2) != batches(23, 4, seed=1, epoch=3)
    assert first != batches(23, 4, seed=2, epoch=2)
    assert batches(23, 4, seed=1, epoch=2, start=3) == first[3:]
    parts = [batches(23, 4, seed=1, epoch=2, rank=rank, processes=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in first]


def test_augmentation_depends_only_on_seed_epoch_and_index():
    data = AugmentedDataset(source([0, 0]), [0, 1], lambda image: torch.rand(3), seed=1)
    state = torch.get_rng_state()
    first = data[0][0]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(data[0][0], first) and not torch.equal(data[1][0], first)
    data.epoch = 1
    assert not torch.equal(data[0][0], first)


@pytest.mark.parametrize(("parts", "images"), [
    (("train", "val"), (18, 2, 20)),  # val is the test images
    (("train", "test"), (18, 2, 20)),
    (("train", "val", "test"), (20, 20, 20)),
    (("train",), (14, 2, 4)),
])  # fmt: skip
def test_folders_of_parts(parts, images, photos, tmp_path):
    for part in parts:
        shutil.copytree(photos, tmp_path / part)
    data = load_data(TrainConfig(tmp_path, **SIZES))
    assert tuple(map(len, (data.train, data.val, data.test))) == images
    assert {name.split("/")[0] for name in data.test.names} == {
        "val" if "test" not in parts and "val" in parts else parts[-1]
    }
    assert not {*data.train.names} & {*data.val.names, *data.test.names} and not {*data.val.names} & {*data.test.names}
    for part in (data.train, data.val, data.test):
        image, label = part[0]
        assert image.shape == (3, 8, 8) and label == 0 and -1 <= image.min() and image.max() <= 1


def test_class_without_training_images_is_rejected(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "train")
    shutil.copytree(photos / "dark", tmp_path / "val" / "cold")
    with pytest.raises(ValueError, match="^data: class 'cold' is only in val, not in train$"):
        load_data(TrainConfig(tmp_path))


@pytest.mark.parametrize("links", [{"bright/loop": "."}, {"dark/a": "..", "dark/b": ".."},
                                   {"bright/a": "../dark", "dark/b": "../bright"}])  # fmt: skip
def test_symlink_loops_are_rejected(links, photos, tmp_path):
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    (tmp_path / "more").symlink_to("dark")  # a link without a loop
    assert len(open_source(str(tmp_path))) == 3 * 10
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    with pytest.raises(ValueError, match=r"^data: \S+ is a link to a folder that contains it$"):
        load_data(TrainConfig(tmp_path))


def test_split_of_digits_does_not_depend_on_the_seed():
    ours, theirs = (load_data(TrainConfig("digits", seed=seed)) for seed in (0, 1))
    assert (len(ours.train), len(ours.val), len(ours.test)) == (1259, 179, 359)
    assert torch.equal(ours.test[5][0], theirs.test[5][0]) and ours.test[5][0].shape == (1, 16, 16)
    assert not torch.equal(ours.train[5][0], theirs.train[5][0])


@pytest.mark.parametrize("download", [False, True])
def test_download_error_names_file_and_folder(tmp_path, monkeypatch, download):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match=f"Download https.*tar.gz to {tmp_path}/cifar-10.*, or use --download"):
        load_data(TrainConfig("cifar10", data_folder=tmp_path, download=download))
    with pytest.raises(FileNotFoundError, match="nowhere/CLASS/.*nowhere/train/CLASS"):
        load_data(TrainConfig(str(tmp_path / "nowhere")))


def test_manually_downloaded_archive_is_unpacked(tmp_path, monkeypatch):
    """A substitute of 30 + 10 images with its own checksums replaces the archive of 163 MB."""
    from torchvision.datasets import CIFAR10

    def checksum(content):
        return hashlib.md5(content).hexdigest()

    sums, names = {}, [f"class {i}" for i in range(10)]
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, images in (("data_batch_1", 30), ("test_batch", 10), ("batches.meta", 0)):
            pixels = np.full((images, 3072), 255, np.uint8)
            content = {"data": pixels, "labels": [i % 10 for i in range(images)], "label_names": names}
            content = pickle.dumps(content)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            sums[name] = checksum(content)
    monkeypatch.setattr(CIFAR10, "tgz_md5", checksum((tmp_path / "cifar-10-python.tar.gz").read_bytes()))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    for _ in range(2):  # the first call unpacks the archive, the second finds the files
        data = load_data(TrainConfig("cifar10", data_folder=tmp_path))
        assert (len(data.train), len(data.val), len(data.test), data.classes) == (20, 10, 10, tuple(names))
        image, label = data.test[0]
        assert image.shape == (3, 32, 32) and bool((image == 1).all()) and label == 0
