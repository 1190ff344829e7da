"""The benchmark runner: numbers before times, ratios of interleaved runs."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import runner


def case(**providers):
    x = torch.randn(8)
    calls = {name: lambda f=f: f(x) for name, f in providers.items()}
    return runner.Case("a case", torch.float32, calls, lambda: x.double() * 2)


def test_a_wrong_result_is_not_timed():
    result = runner.measure(case(vit_triton=lambda x: x * 2, other=lambda x: x * 2.1), 1, 0.0)
    assert list(result.milliseconds) == ["vit_triton"] and list(result.wrong) == ["other"]
    assert result.ratio == {} and result.against_the_fastest is None
    assert "WRONG other: error 5.0e-02" in runner.line(result)


def test_what_computes_something_else_is_not_checked():
    two, other = lambda x: x * 2, lambda x: x * 3
    checked = case(vit_triton=two, other=other)
    assert list(runner.check(checked)) == ["other"]
    assert runner.check(dataclasses.replace(checked, unchecked=("other",))) == {}


def test_a_result_that_is_no_number_is_wrong():
    result = runner.measure(case(vit_triton=lambda x: x * float("nan"), other=lambda x: x * 2), 1, 0.0)
    assert list(result.wrong) == ["vit_triton"] and result.ratio == {}


def test_ratios_are_of_the_others_time_over_ours(monkeypatch):
    ticks = {"now": 0.0}

    def spend(seconds):
        def run(x):
            ticks["now"] += seconds
            return x * 2

        return run

    monkeypatch.setattr(runner.time, "perf_counter", lambda: ticks["now"])
    result = runner.measure(case(vit_triton=spend(0.02), slow=spend(0.06), fast=spend(0.01)), 1, 1.0)
    assert result.ratio["slow"] == pytest.approx(3) and result.ratio["fast"] == pytest.approx(0.5)
    assert result.against_the_fastest == pytest.approx(0.5)
    assert result.milliseconds["vit_triton"] == pytest.approx(20)


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    arguments = ["ops", "--only", "add + layer_norm", "--dtype", "bfloat16", "--threads", "1", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--json", str(path)])
    command.main()
    written = json.loads(path.read_text())
    assert {"cpu", "torch", "triton"} <= written["machine"].keys()
    (result,) = written["results"]
    assert result["case"] == "add + layer_norm forward" and not result["wrong"]
    assert set(result["milliseconds"]) == {"vit_triton", "pytorch"}
    assert "add + layer_norm forward" in capsys.readouterr().out
