"""Sources of labelled images, their splits, order and transforms."""

import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_triton.training import TrainConfig
from vit_triton.training.data import AugmentedDataset, batches, load_data
from vit_triton.training.sources import Source, open_source

for name in ("matplotlib", "rich", "sklearn", "torchvision"):
    pytest.importorskip(name)
from PIL import Image  # noqa: E402 - torchvision needs it
from test_training import SMALL, bright_and_dark  # noqa: E402

SIZES = {name: SMALL[name] for name in ("image_size", "patch_size")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return bright_and_dark(tmp_path_factory.mktemp("photos"), 10, 10, 12)


def source(labels, splits=None, read=None) -> Source:
    """Gray images of 4 x 4 pixels, of the value of their index."""
    classes = tuple("abcdefghijklmnopqrstuvwxyz"[: max(labels) + 1])
    read = read or (lambda i: Image.new("L", (4, 4), i))
    return Source("made", classes, tuple(labels), tuple(map(str, range(len(labels)))), splits, read, channels=1)


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
