"""Training: it goes on where it was killed, bit by bit, and says what does not fit."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vit_triton.training import TrainConfig, add_arguments, checkpoint, config_from, evaluate, load_trained, loop, train
from vit_triton.training.data import Seeded, batches, load_data
from vit_triton.training.loop import METRICS, Place, Run

for name in ("matplotlib", "rich", "sklearn", "torchvision"):
    pytest.importorskip(name)
from PIL import Image  # noqa: E402 - torchvision needs it

SMALL = dict(image_size=8, patch_size=4, dim=16, depth=1, heads=2, mlp_dim=24, batch_size=4, epochs=3)
FILES = {"checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "curves.png"}


def bright_and_dark(folder: Path, images: int, height: int, width: int) -> Path:
    """Two classes of small images in ``folder``."""
    draw = np.random.default_rng(0)
    for name, light in (("bright", 200), ("dark", 50)):
        (folder / name).mkdir()
        for i in range(images):
            pixels = draw.integers(light - 50, light + 50, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return bright_and_dark(tmp_path_factory.mktemp("photos"), 14, 10, 12)


def config(photos: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig(**(dict(data=str(photos), out=out, checkpoint_every=2, backend="triton") | SMALL | changes))


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    train(config(photos, out))
    return out


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert (ours / METRICS).read_text() == (theirs / METRICS).read_text()
    states = [checkpoint.load(folder) for folder in (ours, theirs)]
    for state in states:
        assert state is not None
        for name in ("out", "resume"):
            state["config"].pop(name)
    assert_equal(*states)


def assert_equal(a, b, where="") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_equal(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


# --- the loop ----------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_says(whole):
    lines = [json.loads(line) for line in (whole / METRICS).read_text().splitlines()]
    steps, tests = [x for x in lines if "loss" in x], [x for x in lines if "test_loss" in x]
    assert [x["step"] for x in steps] == list(range(1, 19))  # 25 images to train with, 6 batches of 4, 3 epochs
    assert [x["step"] for x in tests] == [6, 12, 18]
    assert steps[-1]["loss"] < steps[0]["loss"] and tests[-1]["test_accuracy"] == 1
    rates = [x["learning_rate"] for x in steps]
    assert max(rates) == rates[2] == 1e-3 and rates[0] == 5e-4 and rates[-1] < 1e-4
    assert {path.name for path in whole.iterdir()} == FILES
    with Image.open(whole / "curves.png") as picture:
        assert picture.size == (1200, 480)


def test_evaluates_what_it_trained(whole, photos, tmp_path):
    last = json.loads((whole / METRICS).read_text().splitlines()[-1])
    state = torch.get_rng_state()
    result = evaluate(whole, backend="triton")
    assert torch.equal(state, torch.get_rng_state()), "drew from the caller's generator"
    assert result == {name: last[name] for name in ("test_loss", "test_accuracy")}
    torch.testing.assert_close(evaluate(whole, backend="torch")["test_loss"], result["test_loss"], rtol=1e-4, atol=1e-5)
    model, _, classes = load_trained(whole, backend="torch")
    assert classes == ("bright", "dark") and not model.training
    with pytest.raises(ValueError, match=r"data: .*\['bright', 'dark'\].*digits has \['0', "):
        evaluate(whole, "digits")
    with pytest.raises(FileNotFoundError, match="has no checkpoint.pt"):
        evaluate(tmp_path)


def test_processes_that_read_images_change_nothing(whole, photos, tmp_path):
    train(config(photos, tmp_path, workers=2))
    assert (tmp_path / METRICS).read_text() == (whole / METRICS).read_text()


def test_bfloat16_trains(photos, tmp_path):
    result = train(config(photos, tmp_path, precision="bfloat16", epochs=1))
    assert np.isfinite(result["test_loss"])


# --- interruptions -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nobody catches it."""


def at_call(monkeypatch, module, name, number, before=lambda *_: None):
    """Raise Killed at a call of a function, after ``before`` with its arguments."""
    function, calls = getattr(module, name), []

    def replacement(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            before(*args)
            raise Killed
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, replacement)


MOMENTS = {
    "a step": lambda patch: at_call(patch, Run, "learn", 9),
    "a test": lambda patch: at_call(patch, loop, "test", 2),
    "tested, not saved": lambda patch: at_call(patch, Run, "save", 6),
    "half written": lambda patch: at_call(patch, torch, "save", 5, lambda state, file: file.write(b"PK\3\4" * 100)),
    "written, not flushed": lambda patch: at_call(patch, os, "fsync", 18),
    "the last one put away": lambda patch: at_call(patch, os, "replace", 8),
    "before the first checkpoint": lambda patch: at_call(patch, Run, "learn", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_goes_on_to_the_same_bits(whole, photos, tmp_path, moment):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        MOMENTS[moment](patch)
        train(config(photos, tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    if moment == "the last one put away":
        assert "checkpoint.pt" not in left and "checkpoint.pt.partial" in left
    torch.manual_seed(5)  # as in another process
    train(config(photos, tmp_path, resume=True))
    assert_same_run(tmp_path, whole)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def arguments(photos: Path, out: Path, **changes) -> list[str]:
    words = ["train", str(photos), "--out", str(out), "--checkpoint-every", "2", "--backend", "triton", "--resume"]
    for name, value in (SMALL | changes).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


# starts the command in a new process for every line it reads, without importing everything again
STARTER = """
import os, sys
from vit_triton.cli import commands
for _ in sys.stdin:
    process = os.fork()
    if not process:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            os._exit(commands.run(sys.argv[1:]))
        finally:
            os._exit(1)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def test_survives_kill_9(whole, photos, tmp_path):
    draw, metrics, codes = random.Random(1), tmp_path / METRICS, []
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, *arguments(photos, tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with starter:
        while codes[-1:] != [0]:
            before = metrics.stat().st_mtime_ns if metrics.exists() else 0
            starter.stdin.write("start\n")
            starter.stdin.flush()
            process = int(starter.stdout.readline())
            if len(codes) < 8:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_mtime_ns != before):
                    time.sleep(0.001)
                time.sleep(draw.random() * 0.1)  # from its first line on, at any moment
                with contextlib.suppress(ProcessLookupError):  # it was quicker
                    os.kill(process, signal.SIGKILL)
            codes.append(int(starter.stdout.readline()))
        starter.stdin.close()
    assert codes.count(-signal.SIGKILL) >= 5 and codes[-1] == 0, codes
    assert_same_run(tmp_path, whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, photos, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / checkpoint.NAME).write_bytes((whole / checkpoint.NAME).read_bytes()[:1000])
    train(config(photos, tmp_path, resume=True))
    assert_same_run(tmp_path, whole)
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*checkpoint.pt: .*checkpoint.previous.pt: "):
        train(config(photos, tmp_path, resume=True))


def test_a_checkpoint_of_another_run_is_refused_by_name(whole, photos, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / checkpoint.NAME).read_bytes()
    with pytest.raises(FileExistsError, match="out: .* has a checkpoint; resume"):
        train(config(photos, tmp_path))
    with pytest.raises(ValueError, match="of another run, with dim 16, not 32; mlp_dim 24, not 40; dim_head"):
        train(config(photos, tmp_path, resume=True, dim=32, mlp_dim=40))
    with pytest.raises(ValueError, match=r"classes \['bright', 'dark'\], not \['0'.*train_images 25, not 1438"):
        train(config(photos, tmp_path, resume=True, data="digits"))
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_random_states_come_back():
    drawn = []
    device = torch.device("cpu")
    random.gauss(0, 1), np.random.normal()  # both keep a second number for later
    state = checkpoint.random_state(device)
    for _ in range(2):
        drawn.append((torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()))
        checkpoint.set_random_state(state, device)
    assert drawn[0] == drawn[1]


# --- processes ---------------------------------------------------------------------------------------------


def test_torchrun_trains_the_same_and_fsdp_goes_on(photos, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    changes = dict(dropout=0.0, epochs=1, backend="torch")
    train(config(photos, alone, **changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vit_triton.cli", *arguments(photos, together, **changes)]

    def compare():
        expected, ours = ([json.loads(x) for x in (f / METRICS).read_text().splitlines()] for f in (alone, together))
        for line, other in zip(ours, expected, strict=True):
            assert line.keys() == other.keys()
            # float32, summed in another order; Adam divides by the gradients' size, which passes that on
            assert list(line.values()) == pytest.approx(list(other.values()), rel=1e-3)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert printed.count("epoch 1 of 1") == 1, "every process says it"
    compare()
    os.replace(together / checkpoint.PREVIOUS, together / checkpoint.NAME)  # after step 4 of 6
    assert checkpoint.load(together)["step"] == 4
    subprocess.run([*command, "--fsdp"], env=environment, check=True, capture_output=True)
    compare()
    with pytest.raises(ValueError, match="processes 2, not 1"):
        train(config(photos, together, resume=True, **changes))


# --- data --------------------------------------------------------------------------------------------------


def test_batches_follow_from_seed_and_epoch():
    first = batches(23, 4, seed=1, epoch=2)
    assert [len(batch) for batch in first] == [4] * 5
    assert len({i for batch in first for i in batch}) == 20
    assert first == batches(23, 4, seed=1, epoch=2) != batches(23, 4, seed=1, epoch=3)
    assert first != batches(23, 4, seed=2, epoch=2)
    assert batches(23, 4, seed=1, epoch=2, start=3) == first[3:]
    parts = [batches(23, 4, seed=1, epoch=2, rank=rank, processes=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in first]


def test_an_image_is_changed_by_seed_epoch_and_index_alone():
    data = Seeded([(torch.zeros(3), 0)] * 2, lambda x: x + torch.rand(3), seed=1)
    state = torch.get_rng_state()
    first = data[0][0]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(data[0][0], first) and not torch.equal(data[1][0], first)
    data.epoch = 1
    assert not torch.equal(data[0][0], first)


def test_folders_of_training_and_test_images(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "train")
    shutil.copytree(photos / "dark", tmp_path / "val" / "dark")
    with pytest.raises(ValueError, match=r"data: .*train has the classes \['bright', 'dark'\], .*val has \['dark'\]"):
        load_data(TrainConfig(str(tmp_path), image_size=8, patch_size=4))
    shutil.copytree(photos / "bright", tmp_path / "val" / "bright")
    data = load_data(TrainConfig(str(tmp_path), image_size=8, patch_size=4))
    assert (len(data.train), len(data.test)) == (28, 28)
    for split in (data.train, data.test):
        image, label = split[0]
        assert image.shape == (3, 8, 8) and label == 0 and -1 <= image.min() and image.max() <= 1


def test_digits_are_split_the_same_whatever_the_seed():
    ours, theirs = (load_data(TrainConfig("digits", seed=seed)) for seed in (0, 1))
    assert (len(ours.train), len(ours.test)) == (1438, 359)
    assert torch.equal(ours.test[5][0], theirs.test[5][0]) and ours.test[5][0].shape == (1, 16, 16)
    assert not torch.equal(ours.train[5][0], theirs.train[5][0])


@pytest.mark.parametrize("download", [False, True])
def test_says_which_file_to_put_where(tmp_path, monkeypatch, download):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match=f"Put cifar-10-python.tar.gz, from https.*: {tmp_path}/cifar-10"):
        load_data(TrainConfig("cifar10", data_folder=tmp_path, download=download))
    with pytest.raises(FileNotFoundError, match="nowhere/CLASS/.*nowhere/train/CLASS"):
        load_data(TrainConfig(str(tmp_path / "nowhere")))


def test_the_archive_where_it_was_asked_for_is_unpacked(tmp_path, monkeypatch):
    """One of 5 + 1 images, with its own checksums, in place of that of 163 MB."""
    from torchvision.datasets import CIFAR10

    def checksum(content):
        return hashlib.md5(content).hexdigest()

    sums, names = {}, [f"class {i}" for i in range(10)]
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, images in (("data_batch_1", 5), ("test_batch", 1), ("batches.meta", 0)):
            pixels = np.full((images, 3072), 255, np.uint8)
            content = {"data": pixels, "labels": list(range(images)), "label_names": names}
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
    for _ in range(2):  # unpacks, and finds what it unpacked
        data = load_data(TrainConfig("cifar10", data_folder=tmp_path))
        assert (len(data.train), len(data.test), data.classes) == (5, 1, tuple(names))
        image, label = data.test[0]
        assert image.shape == (3, 32, 32) and bool((image == 1).all()) and label == 0


@pytest.mark.parametrize("module", ["rich", "torchvision", "matplotlib", "sklearn"])
def test_a_missing_extra_is_named(photos, tmp_path, monkeypatch, module):
    for name in [module, *(name for name in sys.modules if name.startswith(module + "."))]:
        monkeypatch.setitem(sys.modules, name, None)
    data = "digits" if module == "sklearn" else str(photos)
    with pytest.raises(ImportError, match=r"pip install 'vit_triton\[train\]'"):
        train(replace(config(photos, tmp_path, epochs=1), data=data))
    assert not any(tmp_path.iterdir()), "found out after the training"


# --- options -----------------------------------------------------------------------------------------------


def test_the_command_line_is_the_configuration():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert config_from(parser.parse_args(["digits"])) == TrainConfig("digits")
    words = "cifar10 --out a --image-size 40 --learning-rate 1e-4 --fsdp --precision bfloat16 --backend torch"
    expected = TrainConfig("cifar10", out=Path("a"), image_size=40, learning_rate=1e-4, fsdp=True,
                           precision="bfloat16", backend="torch")  # fmt: skip
    assert config_from(parser.parse_args(words.split())) == expected
    assert "folder of class folders" in parser.format_help()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"dim": -4}, "dim must be at least 1, got -4"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1, got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"precision": "float16"}, "precision must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"dim": 30, "heads": 4}, "dim must divide by heads, got 30 and 4"),
    ],
)
def test_a_bad_option_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("digits", **changes).sizes()


def test_batches_must_fit_images_and_processes(photos, tmp_path):
    small = config(photos, tmp_path, batch_size=26)
    with pytest.raises(ValueError, match="batch_size must be at most the 25 training images, got 26"):
        train(small)
    with pytest.raises(ValueError, match="batch_size must divide by the 3 processes, got 26"):
        Run(small, load_data(small), Place(torch.device("cpu"), 0, 3))
    with pytest.raises(ValueError, match="fsdp shards over the processes of torchrun"):
        train(config(photos, tmp_path, fsdp=True))
