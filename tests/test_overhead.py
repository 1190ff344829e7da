"""The Python time between a call and its launches: the measured calls and launches are the reported ones."""

import json
import sys

import pytest
import torch
from conftest import EMULATOR, INTERPRETER

if INTERPRETER or EMULATOR:
    pytest.skip("the interpreter or the emulator replaces the driver", allow_module_level=True)

from benchmarks import __main__ as command
from benchmarks import gpu_path, memory, overhead


def test_every_public_function_is_measured():
    names = {name.split(",")[0] for name, *_ in overhead.operators(overhead.SHAPE, torch.float32)}
    assert names == {"layer_norm", "linear", "mlp", "attention", "attention_packed", "patch_embed", "encoder"}


def test_launcher_and_memory_count_the_same_launches():
    """The launcher and `memory`, which stubs launches one step earlier, count alike."""
    shape = overhead.Shape(tokens=5, width=64, heads=2, patch=4)
    for name, mode, call in overhead.calls(shape, torch.bfloat16):
        if name != "layer_norm":
            continue
        with torch.set_grad_enabled(mode == "training"):
            with gpu_path.use_gpu_path():
                launches = overhead.launches_of(call)  # the first training call also creates dy
            with memory.count_storages(ours=True) as tracker:
                call()
        assert len(launches) == tracker.kernels and launches[0][0].__name__ == "layer_norm_fwd_kernel"


def test_triton_and_the_library_start_the_same_kernels(monkeypatch):
    """Both reach the launcher equally often, with the same arguments."""
    started = []
    monkeypatch.setattr(gpu_path._Launcher, "__call__", lambda self, *args: started.append(args))
    x, weight = torch.zeros(3, 64), torch.ones(64)
    with gpu_path.use_gpu_path():
        call = lambda: overhead.F.layer_norm(x, weight, weight, backend="triton")  # noqa: E731
        result = overhead.measure("layer_norm", "inference", call, rounds=2)
    assert result.launches == 1 and len(started) == 1 + 2 * (3 + 2)  # one recorded call; 3 warm-ups and 2 rounds each
    kernels = {args[4] for args in started}  # args[:4] are the grid and the stream
    assert len(kernels) == 1
    addresses = [[x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args] for args in started]
    assert all(x.data_ptr() in each and weight.data_ptr() in each for each in addresses)


def test_command_writes_its_results(tmp_path, monkeypatch, capsys):
    path = tmp_path / "overhead.json"
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "overhead", "--only", "layer_norm", "--rounds", "2", "--json", str(path)]
    )
    command.main()
    written = json.loads(path.read_text())
    assert (written["command"], written["options"]["rounds"], written["tokens"]) == ("overhead", 2, 197)
    assert [(each["name"], each["mode"]) for each in written["results"]] == [
        ("layer_norm", "inference"),
        ("layer_norm", "training"),
    ]
    for each in written["results"]:
        assert each["call"] > 0 and each["above"] == pytest.approx(each["call"] - each["triton"])
    assert "no kernel ran" in capsys.readouterr().out and "cpu" in written["machine"]
