"""The demo with little training: it completes, writes the files it reports, and both backends agree."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "digits.py"


@pytest.fixture
def demo() -> ModuleType:
    for name in ("matplotlib", "rich", "sklearn", "torchvision"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["digits.py", "--epochs", "2", "--out", str(tmp_path)])
    demo.main()
    demo.main()  # a second run into the same folder
    printed = capsys.readouterr().out
    printed = printed[printed.rindex("scans to train on") :]

    accuracies = re.findall(r"backend (?:triton|torch) +held-out accuracy ([\d.]+)%", printed)
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1]
    # chance is 10 %; two epochs of training exceed it clearly
    assert float(accuracies[0]) > 20
    difference = re.search(r"largest logit difference between the backends: (\S+)", printed)
    assert difference is not None and float(difference[1]) < 1e-4
    picture = tmp_path / "digits.png"
    assert printed.splitlines()[-1] == f"wrote {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_extra_is_named_in_the_error() -> None:
    code = f"import sys, runpy; sys.modules['sklearn'] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode != 0
    assert "ImportError" in result.stderr and "extra [train]" in result.stderr
