"""Training with a teacher, and the comparison of runs."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import INTERPRETER
from test_training import SMALL, bright_and_dark

from vit_triton.cli import main
from vit_triton.training import TrainConfig, checkpoint, compare, distill, evaluate, load_trained, loop, train
from vit_triton.training.distillation import Teacher, adapted, distillation_loss
from vit_triton.training.preprocessing import Preprocessing

for name in ("matplotlib", "rich", "sklearn", "torchvision"):
    pytest.importorskip(name)

BACKEND = "torch" if INTERPRETER else "triton"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return bright_and_dark(tmp_path_factory.mktemp("photos"), 18, 10, 12)


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    """A teacher of a larger image size than its students."""
    out = tmp_path_factory.mktemp("teacher")
    train(TrainConfig(**{**SMALL, "data": photos, "out": out, "image_size": 16, "backend": BACKEND}))
    return out


def config(photos, teacher, out, **changes):
    given = dict(data=photos, out=out, backend=BACKEND, teacher=str(teacher), checkpoint_every=2)
    return TrainConfig(**{**SMALL, **given, **changes})


# --- the loss ----------------------------------------------------------------------------------------------


def test_soft_and_hard_loss():
    draw = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(5, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    loss, t, alpha = torch.tensor(0.7, dtype=torch.float64), 3.0, 0.4
    expected = 0.0
    for ours, theirs in zip(logits.tolist(), wanted.tolist(), strict=True):
        p, q = ([math.exp(x / t) / sum(math.exp(y / t) for y in row) for x in row] for row in (theirs, ours))
        expected += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) / 5
    soft = distillation_loss(logits, wanted, loss, temperature=t, alpha=alpha, hard=False)
    assert float(soft) == pytest.approx(0.6 * 0.7 + 0.4 * 9 * expected, rel=1e-12)
    hard = distillation_loss(logits, wanted, loss, temperature=t, alpha=alpha, hard=True)
    chosen = logits.log_softmax(1)[torch.arange(5), wanted.argmax(1)]
    assert float(hard) == pytest.approx(0.6 * 0.7 - 0.4 * float(chosen.mean()), rel=1e-12)
    same = distillation_loss(logits, logits, loss, temperature=t, alpha=1.0, hard=False)
    assert abs(float(same)) < 1e-12


def test_images_are_converted_for_the_teacher():
    pixels = torch.rand(2, 3, 8, 6)
    before = Preprocessing((8, 6), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = (pixels - torch.tensor(before.mean).view(3, 1, 1)) / torch.tensor(before.std).view(3, 1, 1)
    assert adapted(images, before, before) is images
    after = Preprocessing((16, 12), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (after.mean, after.std))
    larger = torch.nn.functional.interpolate(pixels, (16, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(adapted(images, before, after), (larger - mean) / std)
    gray = Preprocessing((8, 6), (0.0,), (1.0,), 1)
    color = Preprocessing((8, 6), (0.0,) * 3, (1.0,) * 3)
    assert torch.equal(adapted(pixels[:, :1], gray, color), pixels[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(adapted(pixels, color, gray), pixels.mean(1, keepdim=True))


# --- a run -------------------------------------------------------------------------------------------------


def test_a_student_learns_from_its_teacher(photos, teacher, tmp_path, monkeypatch):
    seen = []

    def noted(logits, wanted, loss, **options):
        seen.append((wanted, options))
        return distillation_loss(logits, wanted, loss, **options)

    monkeypatch.setattr(loop, "distillation_loss", noted)
    before = copy.deepcopy(load_trained(teacher, backend=BACKEND)[0].state_dict())
    called = []
    call = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, images: called.append(self) or call(self, images))
    result = distill(config(photos, teacher, tmp_path / "run", alpha=0.25, temperature=2.0))
    assert len(seen) == len(called) == 3 * (26 // 4) and {"val_accuracy", "test_accuracy"} <= result.keys()
    assert all(options == dict(temperature=2.0, alpha=0.25, hard=False) for _, options in seen)
    assert not any(wanted.requires_grad for wanted, _ in seen) and not called[0].model.training
    after = called[0].model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert evaluate(tmp_path / "run", backend=BACKEND)["test_accuracy"] == result["test_accuracy"]


def test_an_interrupted_student_resumes_bit_for_bit(photos, teacher, tmp_path, monkeypatch):
    distill(config(photos, teacher, tmp_path / "whole"))

    class Killed(Exception):
        pass

    step = loop.Run.training_step

    def killed(self, *args):
        if self.step == 5:
            raise Killed
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Run, "training_step", killed)
        distill(config(photos, teacher, tmp_path / "parts"))
    distill(config(photos, teacher, tmp_path / "parts", resume=True))
    weights = [checkpoint.load(tmp_path / name)[0]["model"] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ValueError, match="another run, with alpha 0.5, not 0.75"):
        distill(config(photos, teacher, tmp_path / "parts", resume=True, alpha=0.75))


def test_errors_of_teachers(photos, teacher, tmp_path, capsys):
    with pytest.raises(ValueError, match="teacher must be a folder that train wrote, or timm:NAME, got None"):
        distill(TrainConfig(data=photos, out=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"teacher: .* has the classes \['bright', 'dark'\], digits has"):
        distill(config("digits", teacher, tmp_path / "run", image_size=8))
    with pytest.raises(FileNotFoundError, match="none has no checkpoint.pt"):
        distill(config(photos, tmp_path / "none", tmp_path / "run"))
    for changes in (dict(alpha=0.0), dict(alpha=1.5), dict(temperature=0.0)):
        with pytest.raises(ValueError, match=next(iter(changes))):
            config(photos, teacher, tmp_path / "run", **changes)
    with pytest.raises(SystemExit) as exit:
        main(["distill", str(photos)])
    assert exit.value.code == 2 and "required: --teacher" in capsys.readouterr().err
    assert main(["distill", str(photos), "--teacher", str(teacher), "--student", "ResNet"]) == 2
    assert not (tmp_path / "run").exists()


# --- comparison --------------------------------------------------------------------------------------------


def test_compare(photos, teacher, tmp_path, capsys):
    student = tmp_path / "student"
    distill(config(photos, teacher, student, epochs=1))
    outcomes = compare([teacher, student], tmp_path / "compare.png", backend=BACKEND)
    for outcome, run in zip(outcomes, (teacher, student), strict=True):
        assert outcome.run == str(run) and outcome.model == "ViT" and outcome.classes == ("bright", "dark")
        assert outcome.accuracy == pytest.approx(evaluate(run, backend=BACKEND)["test_accuracy"])
        assert len(set(outcome.names)) == len(outcome.predicted) == len(outcome.labels)
    assert outcomes[0].names == outcomes[1].names
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    args = ["compare", str(teacher), str(student), "--out", str(tmp_path / "c.png"), "--backend", BACKEND]
    assert main([*args, "--json"]) == 0
    summaries = json.loads(capsys.readouterr().out)
    assert [summary["accuracy"] for summary in summaries] == [outcome.accuracy for outcome in outcomes]
    assert main(args) == 0 and "95 % interval" in capsys.readouterr().out


def test_runs_on_other_test_images_are_refused(photos, teacher, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other = bright_and_dark(tmp_path / "other", 30, 10, 12)
    run = tmp_path / "run"
    train(TrainConfig(**{**SMALL, "data": other, "out": run, "epochs": 1, "backend": BACKEND}))
    args = ["compare", str(teacher), str(run), "--out", str(tmp_path / "c.png"), "--backend", BACKEND]
    assert main(args) == 2
    assert "has 8 test images" in (text := capsys.readouterr().err) and "--force" in text
    assert not (tmp_path / "c.png").exists()
    assert main([*args, "--force"]) == 0 and (tmp_path / "c.png").exists()
    with pytest.raises(ValueError, match="runs must be at least two folders"):
        compare([teacher])
    with pytest.raises(ValueError, match="runs must be at least two folders"):
        compare(str(teacher))


def test_disagreements_are_spread_over_all():
    from vit_triton.training.comparison import COLUMNS, ROWS, Outcome, _disagreements

    predicted = np.zeros((2, 100), int)
    predicted[1, 40:] = 1
    outcomes = [Outcome("a", "ViT", ("x", "y"), (), (0,) * 100, tuple(row)) for row in predicted]
    shown = _disagreements(outcomes)
    assert len(shown) == COLUMNS * ROWS and shown[0] == 40 and shown[-1] == 99
    assert _disagreements([outcomes[0], outcomes[0]]) == []
