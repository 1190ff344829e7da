"""Training: a killed run resumes bit for bit, and errors name the invalid file, option or checkpoint."""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import INTERPRETER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit_triton.training import (
    TrainConfig,
    add_arguments,
    checkpoint,
    config_from,
    curves,
    evaluate,
    load_trained,
    loop,
    train,
)
from vit_triton.training.config import kind_of
from vit_triton.training.data import load_data
from vit_triton.training.loop import METRICS, Process, Run

for name in ("matplotlib", "rich", "sklearn", "torchvision"):
    pytest.importorskip(name)
from PIL import Image  # noqa: E402 - torchvision needs it

BACKEND = "torch" if INTERPRETER else "triton"  # training in the interpreter takes minutes
SMALL = dict(image_size=8, patch_size=4, dim=16, depth=1, heads=2, mlp_dim=24, batch_size=4, epochs=3)
FILES = {"checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "curves.png", ".lock"}


def bright_and_dark(folder: Path, images: int, height: int, width: int) -> Path:
    """Two classes of small images in ``folder``, yellow and blue: the LayerNorm of patches removes the brightness."""
    draw = np.random.default_rng(0)
    for name, light in (("bright", (200, 200, 100)), ("dark", (50, 50, 150))):
        (folder / name).mkdir()
        for i in range(images):
            pixels = draw.integers(-50, 50, (height, width, 3)) + light
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return bright_and_dark(tmp_path_factory.mktemp("photos"), 18, 10, 12)


def config(photos: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig(**(dict(data=str(photos), out=out, checkpoint_every=2, backend=BACKEND) | SMALL | changes))


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    train(config(photos, out))
    return out


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert (ours / METRICS).read_text() == (theirs / METRICS).read_text()
    states = [checkpoint.load(folder)[0] for folder in (ours, theirs)]
    for state in states:
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


def test_run_learns_and_writes_the_documented_files(whole):
    lines = [json.loads(line) for line in (whole / METRICS).read_text().splitlines()]
    steps, vals, tests = ([x for x in lines if name in x] for name in ("loss", "val_loss", "test_loss"))
    assert [x["step"] for x in steps] == list(range(1, 19))  # 24 training images: 6 batches of 4, 3 epochs
    assert [x["step"] for x in vals] == [6, 12, 18] and [x["step"] for x in tests] == [18]
    assert steps[-1]["loss"] < steps[0]["loss"] and vals[-1]["val_accuracy"] == tests[-1]["test_accuracy"] == 1
    rates = [x["learning_rate"] for x in steps]
    assert max(rates) == rates[2] == 1e-3 and rates[0] == 5e-4 and rates[-1] < 1e-4
    assert {path.name for path in whole.iterdir()} == FILES
    with Image.open(whole / "curves.png") as picture:
        assert picture.size == (1200, 480)


def test_evaluate_matches_the_last_epoch(whole, photos, tmp_path):
    last = json.loads((whole / METRICS).read_text().splitlines()[-1])
    state = torch.get_rng_state()
    result = evaluate(whole, backend=BACKEND)
    assert torch.equal(state, torch.get_rng_state()), "changed the caller's generator"
    assert result == {name: last[name] for name in ("test_loss", "test_accuracy")} | {"images": 8}
    torch.testing.assert_close(evaluate(whole, backend="torch")["test_loss"], result["test_loss"], rtol=1e-4, atol=1e-5)
    model, _, classes = load_trained(whole, backend="torch")
    assert classes == ("bright", "dark") and not model.training
    with pytest.raises(ValueError, match=r"data: .*\['bright', 'dark'\].*digits has \['0', "):
        evaluate(whole, "digits")
    with pytest.raises(FileNotFoundError, match="has no checkpoint.pt"):
        evaluate(tmp_path)


def test_loader_workers_do_not_change_results(whole, photos, tmp_path):
    train(config(photos, tmp_path, workers=2))
    assert (tmp_path / METRICS).read_text() == (whole / METRICS).read_text()


def test_training_in_bfloat16(photos, tmp_path):
    result = train(config(photos, tmp_path, precision="bfloat16", epochs=1))
    assert np.isfinite(result["test_loss"])


# --- interruptions -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """A BaseException, so that ``except Exception`` does not catch it."""


def at_call(monkeypatch, module, name, number, before=lambda *_: None):
    """Make the ``number``-th call of a function raise Killed, after ``before(*args)``."""
    function, calls = getattr(module, name), []

    def replacement(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            before(*args)
            raise Killed
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, replacement)


MOMENTS = {
    "during a step": lambda patch: at_call(patch, Run, "training_step", 9),
    "during a validation": lambda patch: at_call(patch, loop, "test", 2),
    "during the test": lambda patch: at_call(patch, loop, "test", 4),
    "before a checkpoint": lambda patch: at_call(patch, Run, "save", 6),
    "during the write": lambda patch: at_call(patch, torch, "save", 5, lambda state, file: file.write(b"PK\3\4" * 100)),
    "before the flush": lambda patch: at_call(patch, os, "fsync", 18),
    "between the two renames": lambda patch: at_call(patch, os, "replace", 8),
    "before the first checkpoint": lambda patch: at_call(patch, Run, "training_step", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_is_bitwise_equal(whole, photos, tmp_path, moment):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        MOMENTS[moment](patch)
        train(config(photos, tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    if moment == "between the two renames":
        assert "checkpoint.pt" not in left
    torch.manual_seed(5)  # a new process has another random state
    train(config(photos, tmp_path, resume=True))
    assert_same_run(tmp_path, whole)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def arguments(photos: Path, out: Path, **changes) -> list[str]:
    words = ["train", str(photos), "--out", str(out), "--checkpoint-every", "2", "--backend", BACKEND, "--resume"]
    for name, value in (SMALL | changes).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


# Forks a process that runs the command for every line of stdin; forking avoids importing everything again.
STARTER = """
import os, sys
from vit_triton.cli import commands, training
training.training.loop
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


def test_resumes_after_kill_9(whole, photos, tmp_path):
    """Kill the run twice, or 18 times in the thorough profile."""
    draw, metrics, codes = random.Random(1), tmp_path / METRICS, []
    kills = min(18, max(2, settings().max_examples // 20))
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
            if len(codes) < kills:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_mtime_ns != before):
                    time.sleep(0.001)
                time.sleep(draw.random() * 0.1)  # a random moment after its first line
                with contextlib.suppress(ProcessLookupError):  # the process may have ended
                    os.kill(process, signal.SIGKILL)
            codes.append(int(starter.stdout.readline()))
        starter.stdin.close()
    assert codes.count(-signal.SIGKILL) >= kills // 2 and codes[-1] == 0, codes
    assert_same_run(tmp_path, whole)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_damaged_checkpoint_falls_back_to_the_previous_one(whole, photos, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / checkpoint.NAME).write_bytes((whole / checkpoint.NAME).read_bytes()[:1000])
    with pytest.warns(UserWarning, match="checkpoint.previous.pt is used instead: .*checkpoint.pt: BadZipFile"):
        train(config(photos, tmp_path, resume=True))
    assert_same_run(tmp_path, whole)
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*checkpoint.pt: .*checkpoint.previous.pt: "):
        train(config(photos, tmp_path, resume=True))


@pytest.mark.filterwarnings("ignore:damaged:UserWarning")
@pytest.mark.parametrize("call", [2, 3, 4])
def test_damaged_checkpoint_never_replaces_the_previous_one(whole, photos, tmp_path, call):
    """After a kill at any rename, one of the two checkpoints is intact."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / checkpoint.NAME).write_bytes(b"nothing")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        at_call(patch, os, "replace", call)
        train(config(photos, tmp_path, resume=True))
    assert checkpoint.load(tmp_path)[0]["step"] in (16, 18)


def test_one_changed_bit_is_detected(whole, tmp_path):
    """torch.load does not verify the archive's checksums."""
    content = bytearray((whole / checkpoint.NAME).read_bytes())
    with zipfile.ZipFile(whole / checkpoint.NAME) as file:
        tensors = [entry for entry in file.infolist() if "/data/" in entry.filename]
        largest = max(tensors, key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2 + 200] ^= 1
    (tmp_path / checkpoint.NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint.pt: .*the checksum of .*data/\d+ does not match"):
        checkpoint.load(tmp_path)


@pytest.mark.filterwarnings("ignore:damaged:UserWarning")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    kept=st.floats(0, 1) | st.just(1.0),
)
def test_fuzz_damaged_checkpoints(whole, tmp_path, flips, kept):
    """load returns the unchanged contents or the previous checkpoint."""
    content = bytearray((whole / checkpoint.NAME).read_bytes())
    for place, change in flips:
        content[int(place * len(content))] ^= change
    (tmp_path / checkpoint.NAME).write_bytes(content[: round(kept * len(content))])
    shutil.copy(whole / checkpoint.PREVIOUS, tmp_path)
    state, path = checkpoint.load(tmp_path)
    assert_equal(state, torch.load(whole / path.name, weights_only=True))


JUNK = [None, True, -1, 2**70, 0.5, float("nan"), "text", b"bytes", [], [1], {}, {"a": 1}, torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.int64), [torch.zeros(1)], {"w": torch.zeros(1)}]  # fmt: skip


@pytest.mark.parametrize("contents", JUNK)
def test_file_without_a_checkpoint_is_rejected(contents, photos, tmp_path):
    torch.save(contents, tmp_path / checkpoint.NAME)
    message = r"^no checkpoint can be read: \S*checkpoint.pt: ValueError: expected a checkpoint of train with [^\n]*$"
    for use in (lambda: train(config(photos, tmp_path, resume=True)), lambda: load_trained(tmp_path)):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.fixture(scope="module")
def examples(photos):
    return load_data(config(photos, Path("out")))


@given(data=st.data())
def test_fuzz_checkpoints_with_other_contents(whole, photos, examples, data):
    """Resuming and evaluation accept a checkpoint or raise a one-line error that names the file."""
    path = whole / checkpoint.NAME
    state = torch.load(path, weights_only=True)
    inside, name = state, data.draw(st.sampled_from(sorted(state)))
    while isinstance(inside[name], dict) and inside[name] and data.draw(st.booleans()):
        inside, name = inside[name], data.draw(st.sampled_from(sorted(inside[name], key=str)))
    inside[name] = data.draw(st.sampled_from(JUNK))
    run = Run(config(photos, whole), examples, Process(torch.device("cpu")))
    for use in (run.load, run.differences, lambda state: load_trained(whole)):
        try:
            with mock.patch.object(checkpoint, "load", lambda folder: (state, path)), checkpoint.invalid_contents(path):
                use(state)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a valid checkpoint: ") and len(str(error).splitlines()) == 1


# --- disks and locks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size):
    """Simulate a full disk by a limit on the file size: the start of a file is written, then writing fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_keeps_the_last_checkpoint(whole, photos, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    os.replace(tmp_path / checkpoint.PREVIOUS, tmp_path / checkpoint.NAME)
    before = (tmp_path / checkpoint.NAME).read_bytes()
    with largest_file(20_000), pytest.raises(OSError, match=r"[\d,]+ of [\d,]+ bytes are missing; .*checkpoint.pt'$"):
        train(config(photos, tmp_path, resume=True))
    assert (tmp_path / checkpoint.NAME).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == FILES - {checkpoint.PREVIOUS}
    train(config(photos, tmp_path, resume=True))
    assert_same_run(tmp_path, whole)


def test_full_disk_keeps_complete_lines_of_metrics(tmp_path):
    metrics = loop.Metrics(tmp_path / METRICS, Process(torch.device("cpu")), 0)
    line = {"step": 1, "epoch": 1, "test_loss": 0.5, "test_accuracy": 0.5}
    metrics.flush(line)
    before = (tmp_path / METRICS).read_bytes()
    with largest_file(len(before) + 5), pytest.raises(OSError, match=r"^\[Errno 27\] .*metrics.jsonl'$"):
        metrics.flush({**line, "step": 2})
    assert (tmp_path / METRICS).read_bytes() == before
    metrics.flush({**line, "step": 2})
    assert [line["step"] for line in curves.read(tmp_path / METRICS)] == [1, 2]


def lock_folder(folder: Path) -> tuple[int, int]:
    """Process ids: a process that has locked ``folder``, and its fork, which stands for a data loader's worker."""
    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        with checkpoint.lock_folder(folder):
            worker = os.fork()
            if worker:
                os.write(writer, str(worker).encode())
            time.sleep(600)
            os._exit(1)
    worker = int(os.read(reader, 20))
    os.close(reader), os.close(writer)
    return holder, worker


def test_output_folder_is_locked(photos, tmp_path):
    for name in (".checkpoint.pt.0123.part", ".metrics.jsonl.4567.part", ".of somebody.0123.part"):
        (tmp_path / name).write_text("of a killed process")
    holder, worker = lock_folder(tmp_path)
    try:
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".of somebody.0123.part"}
        with pytest.raises(BlockingIOError, match=f"out: {tmp_path} is in use by process {holder} on [^ ]+; wait"):
            train(config(photos, tmp_path))
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with checkpoint.lock_folder(tmp_path):  # although its worker is alive
            assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_full_disk_does_not_prevent_locking(tmp_path):
    with largest_file(0), checkpoint.lock_folder(tmp_path):
        pass


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match=f"out: {tmp_path} cannot be locked"), checkpoint.lock_folder(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    with checkpoint.lock_folder(tmp_path):
        pass


LINE = b'{"step": 1, "epoch": 1, "learning_rate": 0.001, "loss": 0.5}\n'
BAD_LINES = [b"{", b"\xff\xfe", b"[1]", b"3", b'{"step": 1}', LINE.strip().replace(b"1,", b'"1",', 1), b"[" * 100_000,
             LINE.strip().replace(b"0.5", b"null"), LINE.strip() + LINE.strip(), b""]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_damaged_metrics_line_is_named_in_the_error(bad, whole, photos, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / METRICS).write_bytes(LINE + bad + b"\n" + LINE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    with pytest.raises(
        ValueError, match=rf"^{tmp_path / METRICS}, line 2: expected the JSON of a step, validation or test[^\n]*$"
    ):
        train(config(photos, tmp_path, resume=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before


def test_non_regular_metrics_file_is_rejected(tmp_path):
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises(ValueError, match="metrics.jsonl: not a regular file"):
        curves.read(tmp_path / METRICS)


def changed_line(name, value):
    return json.dumps(dict.fromkeys(sorted(curves.STEP), 1) | {name: value}).encode() + b"\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=2),
    kept=st.floats(0, 1) | st.just(1.0),
    line=st.binary(max_size=30)
    | st.builds(
        changed_line,
        st.sampled_from([*sorted(curves.STEP | curves.VAL | curves.TEST), "other"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers()),
    ),
)
def test_fuzz_damaged_metrics(whole, tmp_path, flips, kept, line):
    """The metrics are read and plotted, or an error names the file."""
    content = bytearray((whole / METRICS).read_bytes())
    for place, change in flips:
        content[place % len(content)] ^= change
    (tmp_path / METRICS).write_bytes(content[: round(kept * len(content))] + line)
    try:
        lines = curves.read(tmp_path / METRICS)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path / METRICS}, line ") and len(str(error).splitlines()) == 1
    else:
        for line in lines:
            assert set(line) in (curves.STEP, curves.VAL, curves.TEST) and {*map(type, line.values())} <= {int, float}


def test_checkpoint_of_another_run_is_rejected(whole, photos, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / checkpoint.NAME).read_bytes()
    with pytest.raises(FileExistsError, match="out: .* contains a checkpoint; resume"):
        train(config(photos, tmp_path))
    with pytest.raises(ValueError, match="belongs to another run, with dim 16, not 32; mlp_dim 24, not 40; dim_head"):
        train(config(photos, tmp_path, resume=True, dim=32, mlp_dim=40))
    with pytest.raises(ValueError, match=r"train_images 24, not 1259; classes \['bright', 'dark'\], not \['0'"):
        train(config(photos, tmp_path, resume=True, data="digits"))
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_random_states_are_restored():
    drawn = []
    device = torch.device("cpu")
    random.gauss(0, 1), np.random.normal()  # both cache a second number
    state = checkpoint.random_state(device)
    for _ in range(2):
        drawn.append((torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()))
        checkpoint.set_random_state(state, device)
    assert drawn[0] == drawn[1]


# --- processes ---------------------------------------------------------------------------------------------


def test_torchrun_matches_one_process_and_fsdp_resumes(photos, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    changes = dict(dropout=0.0, epochs=1, backend="torch")
    train(config(photos, alone, **changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vit_triton.cli", *arguments(photos, together, **changes)]

    def compare():
        expected, ours = ([json.loads(x) for x in (f / METRICS).read_text().splitlines()] for f in (alone, together))
        for line, other in zip(ours, expected, strict=True):
            assert line.keys() == other.keys()
            # Sums in float32 have another order; Adam's division by the gradient's size amplifies the difference.
            assert list(line.values()) == pytest.approx(list(other.values()), rel=1e-3)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert printed.count("epoch 1 of 1") == 1, "printed by every process"
    compare()
    os.replace(together / checkpoint.PREVIOUS, together / checkpoint.NAME)  # after step 4 of 6
    assert checkpoint.load(together)[0]["step"] == 4
    subprocess.run([*command, "--fsdp"], env=environment, check=True, capture_output=True)
    compare()
    with pytest.raises(ValueError, match="processes 2, not 1"):
        train(config(photos, together, resume=True, **changes))


@pytest.mark.parametrize("module", ["rich", "torchvision", "matplotlib", "sklearn"])
def test_missing_extra_is_named_in_the_error(photos, tmp_path, monkeypatch, module):
    for name in [module, *(name for name in sys.modules if name.startswith(module + "."))]:
        monkeypatch.setitem(sys.modules, name, None)
    data = "digits" if module == "sklearn" else str(photos)
    with pytest.raises(ImportError, match=r"pip install 'vit_triton\[train\]'"):
        train(replace(config(photos, tmp_path, epochs=1), data=data))
    assert not any(tmp_path.iterdir()), "detected only after the training"


# --- options -----------------------------------------------------------------------------------------------


def test_command_line_matches_the_configuration():
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
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        ({"learning_rate": 10**400}, "learning_rate must be positive and finite, got 1000"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, got nan"),
        ({"clip": 0}, "clip must be positive, got 0.0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"seed": 2**63}, "seed must be at least 0 and below 2.*63, got 9223372036854775808"),
        ({"precision": "float16"}, "precision must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"dim": 30, "heads": 4}, "dim must be divisible by heads, got 30 and 4"),
    ],
)
def test_bad_option_is_named_in_the_error(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("digits", **changes).sizes()


WRONG = {
    bool: [1, None, "no"],
    int: [1.5, "3", True, [1], torch.tensor(1)],
    float: ["1e-3", True, 1j, torch.tensor(1.0)],
    str: [3, b"ViT", True, Path("a")],
    Path: [3, b"a", None],
    tuple: [3, [1], b"a", None],
}


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_option_of_a_wrong_type_is_named_in_the_error(field):
    kind = kind_of(field)
    wrong = WRONG[kind] + ([] if field.default is None else [None])
    for value in wrong if field.name != "data" else [3, None, b"digits"]:
        with pytest.raises(TypeError, match=rf"^{field.name} must be .*, got {re.escape(repr(value))}$"):
            TrainConfig(**{"data": "digits", field.name: value})


def test_numpy_numbers_and_paths_become_plain_values():
    """Checkpoints store only plain Python values and tensors."""
    made = TrainConfig(Path("photos"), out="run", epochs=np.int64(3), learning_rate=np.float32(0.5), clip=1, seed=0)
    assert made == TrainConfig("photos", out=Path("run"), epochs=3, learning_rate=0.5, clip=1.0)
    assert [type(x) for x in (made.data, made.epochs, made.learning_rate, made.clip)] == [str, int, float, float]


@given(
    name=st.sampled_from([field.name for field in dataclasses.fields(TrainConfig)]),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
    | st.complex_numbers() | st.lists(st.integers(), max_size=2) | st.just(np.float64(0.5)) | st.just(np.uint8(3))
    | st.just(torch.zeros(())) | st.just(Path("a")) | st.just(object()),
)  # fmt: skip
def test_fuzz_options(name, value):
    """An option becomes a plain value, or the error names it."""
    try:
        made = TrainConfig(**{"data": "digits", name: value})
    except (TypeError, ValueError) as error:
        assert str(error).startswith(f"{name} must be ") and len(str(error).splitlines()) == 1
    else:
        assert type(getattr(made, name)) in (bool, int, float, str, tuple, type(None), type(Path()))
        assert made == replace(made)


@pytest.mark.parametrize("use", [train, evaluate, load_trained])
@pytest.mark.parametrize("value", [None, 3, {"data": "digits"}])
def test_config_and_folder_of_a_wrong_type_are_rejected(use, value):
    with pytest.raises(
        TypeError, match=rf"^(config must be a TrainConfig|folder must be a path), got {re.escape(repr(value))}$"
    ):
        use(value)


def test_batch_size_must_fit_images_and_processes(photos, tmp_path):
    small = config(photos, tmp_path, batch_size=26)
    with pytest.raises(ValueError, match="batch_size must be at most the number of training images, 24, got 26"):
        train(small)
    with pytest.raises(ValueError, match="batch_size must be divisible by the number of processes, 3, got 26"):
        Run(small, load_data(small), Process(torch.device("cpu"), 0, 3))
    with pytest.raises(ValueError, match="fsdp requires torchrun"):
        train(config(photos, tmp_path, fsdp=True))
