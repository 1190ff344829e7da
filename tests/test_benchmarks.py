"""The benchmark runner: numerical checks before timing, ratios of interleaved runs, results kept on interruption."""

import argparse
import dataclasses
import importlib.machinery
import json
import os
import sys
import types

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    compare,
    growth,
    memory,
    models,
    options,
    overhead,
    peaks,
    plot,
    runner,
    timing,
)
from benchmarks.cost import Cost
from benchmarks.ops import attention, layer_norm
from benchmarks.ops.derivative import DIRECTIONS
from vit_triton.cli.arguments import new_file
from vit_triton.kernels import device
from vit_triton.tuning import measure
from vit_triton.tuning.shapes import Shape
from vit_triton.tuning.sizes import SIZES

TINY = Shape("tiny", 2, 32, 5, SIZES["Ti"]).with_depth(1)


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(runner, "peak", lambda device, dtype, threads: peaks.Peak(1e12, 1e11, "a test"))


def case(need=0, **functions):
    x = torch.randn(8)
    exact = lambda: x.double() * 2  # noqa: E731
    providers = {name: runner.Provider(lambda f=f: f(x), exact, lambda: [0.0]) for name, f in functions.items()}
    return runner.Case("a case", "8", torch.float32, "cpu", lambda: Cost(16, 64, need), lambda: providers)


def measured(case, seconds=0.0):
    (result,) = runner.measure(case, [1], seconds)
    return result


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    command.main()


# --- numbers -------------------------------------------------------------------------------------------------


def test_a_wrong_result_is_not_timed():
    result = measured(case(vit_triton=lambda x: x * 2, other=lambda x: x * 2.1))
    assert list(result.milliseconds) == ["vit_triton"] and list(result.wrong) == ["other"]
    assert result.ratio == {} and result.against_the_fastest is None
    assert "WRONG other: error 5.0e-02" in runner.line(result)


def test_a_result_that_is_no_number_is_wrong_and_a_failure_ends_no_run():
    def fails(x):
        raise RuntimeError("no kernel")

    result = measured(case(vit_triton=lambda x: x * float("nan"), other=lambda x: x * 2, broken=fails))
    assert list(result.wrong) == ["vit_triton", "broken"] and list(result.milliseconds) == ["other"]
    assert result.wrong["broken"] == "RuntimeError: no kernel"


def test_an_error_may_be_twice_that_of_pytorch():
    call, exact = lambda: torch.ones(4) * 1.001, lambda: torch.ones(4).double()
    for plain, right in ((6e-4, True), (4e-4, False), (float("nan"), False)):
        provider = runner.Provider(call, exact, lambda plain=plain: [plain])
        assert (runner.check({"a": provider}, torch.float32) == {}) is right


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", compare.OPS, ids=lambda op: op.name)
def test_every_provider_of_every_op_is_checked(op, direction):
    functions = op.functions("cpu", compiled=False)
    (found,) = op.cases([TINY], [direction], torch.float32, "cpu", functions)
    providers = found.prepare()
    assert runner.check(providers, torch.float32) == {}
    for name, function in functions.items():
        broken = functions | {name: lambda *inputs, f=function: _first(f(*inputs)) * 1.01}
        (case,) = op.cases([TINY], [direction], torch.float32, "cpu", broken)
        assert name in runner.check(case.prepare(), torch.float32)


def _first(results):
    return results[0] if isinstance(results, tuple) else results


@pytest.mark.parametrize("direction", models.LABELS)
def test_every_model_is_checked_also_after_its_steps(direction):
    (case,) = models.cases([TINY], [direction], torch.float32, "cpu", models.BUILDS)
    providers = case.prepare()
    for provider in providers.values():
        provider.run()
    assert runner.check(providers, torch.float32) == {}
    wrong = models.BUILDS | {"timm": lambda shape: Noisy(models.timm(shape))}
    (case,) = models.cases([TINY], [direction], torch.float32, "cpu", wrong)
    assert list(runner.check(case.prepare(), torch.float32)) == ["timm"]


class Noisy(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        y = self.model(image)
        return y if y.dtype == torch.float64 else y * 1.01


# --- times ---------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_others_time_over_ours(monkeypatch):
    ticks = {"now": 0.0}

    def spend(seconds):
        def run(x):
            ticks["now"] += seconds
            return x * 2

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: ticks["now"])
    functions = {"vit_triton": spend(0.02), "vit_triton torch": spend(0.01), "slow": spend(0.06), "fast": spend(0.03)}
    result = measured(case(**functions), 1.0)
    assert result.ratio == pytest.approx({"slow": 3, "fast": 1.5, "vit_triton torch": 0.5})
    assert result.against_the_fastest == pytest.approx(1.5)  # our other backend is excluded
    assert result.milliseconds["vit_triton"] == pytest.approx(20)


def test_rates_and_roofline():
    result = measured(case(vit_triton=lambda x: x * 2))
    result.milliseconds = {"vit_triton": 1e-6}  # 16 FLOPs and 64 bytes in 1 ns
    rates = runner.rates(result, peaks.Peak(flops=32e9, bytes=640e9, source=""))
    assert rates["tflops"]["vit_triton"] == pytest.approx(0.016)
    assert rates["gigabytes"]["vit_triton"] == pytest.approx(64)
    assert rates["roofline"]["vit_triton"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("milliseconds", "replay", "captures", "method"),
    [
        (0.01, True, True, "CUDA graph, L2 warm"),
        (0.01, True, False, "do_bench, L2 flushed"),
        (0.01, False, True, "do_bench, L2 flushed"),
        (1.0, True, True, "do_bench, L2 flushed"),
    ],
)
def test_the_method_on_a_gpu(monkeypatch, milliseconds, replay, captures, method):
    def do_bench(call, warmup, rep, return_mode):
        assert return_mode == "median" and rep > 0
        return milliseconds * call()

    def do_bench_cudagraph(call, rep, return_mode):
        if not captures:
            raise RuntimeError("operation not permitted")
        return do_bench(call, 0, rep, return_mode)

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", do_bench_cudagraph)
    synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(1))
    times = timing.on_cuda({"a": lambda: 1, "b": lambda: 2}, 1.0, replay)
    assert times.method == method and len(synchronized) >= 2 * timing.MIN_ROUNDS
    assert times.rounds["a"] == pytest.approx([milliseconds / 1e3] * timing.MIN_ROUNDS)
    assert times.rounds["b"] == pytest.approx([2 * milliseconds / 1e3] * timing.MIN_ROUNDS)


def test_the_same_inputs_in_every_run():
    seen = []

    def prepare():
        seen.append(torch.randn(3))
        return {}

    one = dataclasses.replace(case(), prepare=prepare)
    measured(one), torch.randn(5), measured(one)
    assert torch.equal(*seen)


@pytest.mark.parametrize(("hip", "expected"), [(None, ("sm_90", "cuda")), ("7.1.2", ("gfx942", "hip"))])
def test_the_machine_names_its_gpu(hip, expected, monkeypatch):
    properties = types.SimpleNamespace(name="a GPU", major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(runner, "target_of", device.target_of_gpu.__wrapped__)
    found = runner.machine("cuda")
    assert (found["gpu"], found["architecture"]) == ("a GPU", expected[0])
    assert {"cuda", "hip"} & found.keys() == {expected[1]} and (hip is None or found["hip"] == hip)


def test_peaks_of_known_gpus_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peaks.peak("cuda", torch.bfloat16, 1).flops == 989e12
    assert peaks.peak("cuda", torch.float32, 1).flops == 67e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "AMD Instinct MI300X")
    assert peaks.peak("cuda", torch.float16, 1).bytes == 5300e9
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert peaks.peak("cuda", torch.bfloat16, 1) is None


# --- cost ----------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_formulas():
    shape = Shape.of("B", 224, 8)
    (op,) = attention.OPS
    forward, backward, both = (c.cost() for c in op.cases([shape], DIRECTIONS, torch.bfloat16, "cpu", {"a": None}))
    assert forward.flops == 4 * 8 * 12 * 197**2 * 64
    assert backward.flops == 2 * forward.flops and both.flops == 3 * forward.flops
    x = 8 * 197 * 768 * 2
    assert forward.bytes == 4 * x and backward.bytes == 7 * x
    scores = 8 * 12 * 197**2
    assert 2 * scores * (2 + 8) < forward.memory < 4 * scores * (2 + 8)
    (norm,) = (op for op in layer_norm.OPS if op.name == "layer_norm")
    (case,) = norm.cases([shape], ["forward"], torch.bfloat16, "cpu", {"a": None})
    assert case.cost().flops == 0 and case.cost().bytes == 2 * x + 2 * 768 * 2


@pytest.mark.parametrize("what", ["ops", "models"])
def test_defaults_follow_the_device(what, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner, "machine", lambda device: {})
    monkeypatch.setattr(runner, "run", lambda cases, *rest: seen.append(cases) or True)
    for arguments in (["--device", "cpu"], ["--device", "cuda"], ["--device", "cuda", "--model", "Ti", "--batch", "2"]):
        main(monkeypatch, what, *arguments)
    cpu, cuda, chosen = ([case.shape.removeprefix("ViT-") for case in cases] for cases in seen)
    assert cuda[0] == "B/16 at 224, batch 64" and len(set(cpu)) < len(set(cuda))
    assert set(chosen) == {
        "Ti/16 at 224, batch 2",
        *(["Ti/16 at 384, batch 2", "Ti/16 at 512, batch 2"] * (what == "ops")),
    }
    if what == "ops":
        assert {name.split("/")[0] for name in cuda} == SIZES.keys() and "g/14 at 518, batch 256" in cuda
        assert {case.dtype for case in seen[1]} == {torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("cases", [compare.OPS[0].cases, models.cases])
def test_every_case_is_compiled_anew(cases, monkeypatch):
    """torch.compile falls back to eager after eight shapes of a function, so every case resets it."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    known = compare.OPS[0].functions("cpu", True) if cases is not models.cases else models.builds(True)
    for case in cases([TINY], ["forward"], torch.float32, "cpu", known):
        case.prepare()
    assert resets == [1]


def test_images_are_cut_to_whole_patches():
    assert (Shape.of("SO400M", 384, 1).image, Shape.of("SO400M", 384, 1).tokens) == (378, 27**2 + 1)
    assert (Shape.of("B", 224, 1).tokens, Shape.of("g", 518, 1).tokens) == (197, 37**2 + 1)


def test_what_does_not_fit_is_skipped_and_said(monkeypatch, capsys):
    monkeypatch.setattr(runner, "free_memory", lambda device: 2**30)
    report = runner.Report(None, "cpu")
    assert runner.run([case(2**31, vit_triton=lambda x: 1 / 0)], [1], 0.0, report)
    assert report.skipped == {"a case, 8, float32": "needs 2.0 GiB (computed), 1.0 GiB are free"}
    assert "skipped a case, 8, float32" in capsys.readouterr().out and not report.results


# --- the report ----------------------------------------------------------------------------------------------


def test_the_file_is_whole_after_every_case(tmp_path):
    path = tmp_path / "results.json"
    report = runner.Report(path, "cpu")
    seen = []

    def look(x):
        seen.append(len(json.loads(path.read_text())["results"]))
        return x * 2

    runner.run([case(vit_triton=lambda x: x * 2), case(vit_triton=look)], [1], 0.0, report)
    assert set(seen) == {1} and len(json.loads(path.read_text())["results"]) == 2
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    report = runner.Report(path, "cpu")
    before = path.read_text()
    report.also["more"] = 1

    def full(source, target):
        raise OSError("no space")

    monkeypatch.setattr(runner.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report.write()
    assert path.read_text() == before and os.listdir(tmp_path) == ["results.json"]


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    def stop(x):
        raise KeyboardInterrupt

    two = case(vit_triton=lambda x: x * 2), case(vit_triton=stop)
    monkeypatch.setitem(compare.CASES, "ops", lambda given: iter(two))
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "ops", "--json", tmp_path / "r.json", "--threads", "1", "--seconds", "0")
    assert stopped.value.code == 130
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 1


@pytest.mark.parametrize("what", ["overhead", "memory"])
def test_ctrl_c_keeps_what_was_counted(what, tmp_path, monkeypatch, capsys):
    module, name = {"overhead": (overhead, "measure"), "memory": (memory, "count")}[what]
    real, calls = getattr(module, name), []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, name, stopped)
    with pytest.raises(SystemExit) as exit:
        main(monkeypatch, what, "--json", tmp_path / "r.json", *(["--rounds", "2"] if what == "overhead" else []))
    assert exit.value.code == 130 and "stopped" in capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    assert len(written["results"]) == 2 and written["command"] == what and "torch" in written["machine"]


def test_our_wrong_numbers_fail_the_command(monkeypatch):
    monkeypatch.setitem(compare.CASES, "ops", lambda given: iter([case(vit_triton=lambda x: x * 3)]))
    with pytest.raises(SystemExit) as failed:
        main(monkeypatch, "ops", "--threads", "1", "--seconds", "0")
    assert failed.value.code == 1


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    arguments = ["ops", "--only", "add + layer_norm forward,", "--dtype", "bfloat16", "--model", "Ti", "--image", "32"]
    main(monkeypatch, *arguments, "--batch", "2", "--threads", "1", "--seconds", "0", "--json", path)
    written = json.loads(path.read_text())
    assert {"cpu", "cores", "clock", "torch", "triton", "vit_triton", "timm"} <= written["machine"].keys()
    assert (written["command"], written["options"]["model"]) == ("ops", ["Ti"])
    (result,) = written["results"]
    assert result["case"] == "add + layer_norm forward" and not result["wrong"] and result["shape"].endswith("batch 2")
    assert set(result["milliseconds"]) == {"vit_triton", "vit_triton torch", "pytorch"} == set(result["roofline"])
    assert "add + layer_norm forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--batch", "0"], "must be a whole number above 0, got '0'"),
        (["ops", "--seconds", "soon"], "must be a number of seconds, got 'soon'"),
        (["ops", "--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
        (["ops", "--json", "/nowhere/r.json"], "must be a file in a folder that exists, got '/nowhere/r.json'"),
        (["ops", "--plot", __file__], "must be a folder, got the file"),
        (["ops", "--model", "XL"], "invalid choice: 'XL'"),
        (["models", "--direction", "backward"], "invalid choice: 'backward'"),
        (["ops", "--providers", "sdqa"], "--providers: unknown 'sdqa'; available: vit_triton, "),
        (["ops", "--image", "8"], "--image: image side must be at least the patch side 16 of B, got 8"),
        (
            ["ops", "--only", "zzz"],
            "--only: no name contains 'zzz'; available: mlp forward; mlp forward+",
        ),
        (["models", "--only", "zzz"], "--only: no name contains 'zzz'; available: inference"),
        (["growth", "--only", "zzz"], "--only: no name contains 'zzz'; available: attention forward; "),
        (["overhead", "--only", "zzz"], "--only: no name contains 'zzz'; available: empty Function; "),
        (["overhead", "--rounds", "0"], "must be a whole number above 0, got '0'"),
        (["overhead", "--json", "/nowhere/r.json"], "must be a file in a folder that exists, got '/nowhere/r.json'"),
        (["memory", "--batch", "0"], "must be a whole number above 0, got '0'"),
        (["memory", "--image", "8"], "--image must be at least 16, the patch size, got 8"),
        (["memory", "--json", "/nowhere/r.json"], "must be a file in a folder that exists, got '/nowhere/r.json'"),
    ],
)
def test_bad_options_are_refused(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        main(monkeypatch, *arguments)
    assert refused.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(refused.value.code)


def test_a_folder_that_cannot_be_written_to_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(argparse.ArgumentTypeError, match="must be in a folder that can be written to, got "):
        new_file(str(tmp_path / "r.json"))


def test_cuda_is_refused_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(argparse.ArgumentTypeError, match="finds no GPU"):
        options.device("cuda")


# --- packages that the tests replace by stand-ins ------------------------------------------------------------


def stand_in(monkeypatch, name, **contents):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(sys.modules[name]).update(contents)


def test_optional_packages_take_part_where_they_are_installed(monkeypatch):
    def attend(q, k, v):  # (B, N, H, D), the layout of flash-attn and xformers
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False):
        total = x if residual is None else x + residual
        y = torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)
        return (y, total) if prenorm else y

    class Liger:
        @staticmethod
        def apply(x, weight, bias, eps):
            return norm(x, weight, bias, eps=eps)

    names = {"flash-attn", "xformers", "liger-kernel", "flash-linear-attention"}
    ops = [*attention.OPS, *layer_norm.OPS]
    assert not names & {name for op in ops for name in op.functions("cuda", False)}
    stand_in(monkeypatch, "flash_attn", flash_attn_func=attend)
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=attend)
    stand_in(monkeypatch, "liger_kernel.ops.layer_norm", LigerLayerNormFunction=Liger)
    stand_in(monkeypatch, "fla.modules.layernorm", layer_norm=norm)
    found = set()
    for op in ops:
        functions = {name: f for name, f in op.functions("cuda", False).items() if name in names}
        found |= set(functions)
        for case in op.cases([TINY], ["forward", "both"], torch.float32, "cpu", functions):
            assert runner.check(case.prepare(), torch.float32) == {}
    assert found == names
    assert not names & {name for op in ops for name in op.functions("cpu", False)}  # they need a GPU


# --- growth and charts ---------------------------------------------------------------------------------------


def point(case, axis, size, milliseconds, other="sdpa"):
    times = {"vit_triton": milliseconds, other: 2 * milliseconds}
    at = {"axis": axis, "size": size}
    return runner.Result(case, "s", "float32", "cpu", 1, "interleaved", times, {other: 2.0}, {}, 64 * size, size, at)


def test_slopes_are_of_the_same_sizes():
    """Two curves that each lack a point are fitted on their common sizes."""
    sizes = [1, 2, 4, 8, 16, 32]
    results = [point("a", "tokens", n, float(n)) for n in sizes]
    del results[-1].milliseconds["vit_triton"], results[-3].milliseconds["sdpa"]
    assert {(s.provider, s.sizes) for s in growth.slopes(results)} == {("vit_triton", (4, 16)), ("sdpa", (4, 16))}
    for result in results[2:]:
        result.milliseconds.pop("sdpa", None)
    assert [s.sizes for s in growth.slopes(results)] == []  # one common size in the upper half is too few for a fit


def test_slopes_of_a_known_power_law():
    sizes = [1, 2, 4, 8, 16, 32]
    results = [point("a", "tokens", n, 5.0 if n < 8 else 0.1 * n**1.5) for n in reversed(sizes)]
    ours, other = growth.slopes(results)
    assert (ours.provider, other.provider) == ("vit_triton", "sdpa")
    assert ours.slope == pytest.approx(1.5) == other.slope and ours.sizes == (8, 16, 32)
    assert growth.slopes(results[:2]) == []


def test_growth_writes_slopes(tmp_path, monkeypatch):
    path = tmp_path / "growth.json"
    arguments = ["--tokens", "5", "9", "17", "33", "--batch", "1", "--depth", "1", "2", "--direction", "forward"]
    main(monkeypatch, "growth", "--seconds", "0", "--json", path, "--plot", tmp_path / "charts", *arguments)
    written = json.loads(path.read_text())
    assert {(s["case"], s["axis"], s["provider"]) for s in written["slopes"]} == {
        (f"{op} forward", "tokens", provider) for op, peer in growth.PEERS.items() for provider in ("vit_triton", peer)
    }
    assert all(s["sizes"] == [17, 33] for s in written["slopes"])
    assert (written["command"], written["options"]["model"], written["width"], written["heads"]) == (
        "growth",
        "Ti",
        192,
        3,
    )
    assert_picture(tmp_path / "charts" / "growth_float32_1_threads.png")


def assert_picture(path):
    from PIL import Image

    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG" and image.width == 1200
        assert "Measured on" in image.info["Title"]
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("what", ["ops", "models"])
def test_charts_are_drawn(tmp_path, what):
    report = runner.Report(None, "cpu", command=what)
    for result in [point("attention forward", "tokens", n, 0.3 * n, "timm") for n in (1, 2, 3)]:
        report.add(result)
    paths = plot.compare(report, tmp_path / "new")
    second = "roofline" if what == "ops" else "times"
    assert [path.name for path in paths] == [f"{what}_{kind}_float32_1_threads.png" for kind in ("ratios", second)]
    for path in paths:
        assert_picture(path)


def test_operators_of_many_shapes_have_a_chart_each(tmp_path):
    report = runner.Report(None, "cpu", command="ops")
    for i, model in enumerate("LB"):
        report.add(dataclasses.replace(point("mlp forward", "tokens", 1, 0.3), shape=f"{model}/16 at 224, batch {i}"))
    names = {path.name for path in plot.compare(report, tmp_path)}
    shapes = ("L_16_at_224_batch_0", "B_16_at_224_batch_1")
    assert names == {f"ops_{kind}_float32_1_threads_{s}.png" for kind in ("ratios", "roofline") for s in shapes}


def test_a_chart_needs_no_other_and_none_of_ours(tmp_path):
    """Results lack a provider whose numbers were wrong."""
    alone = point("mlp forward", "tokens", 1, 0.3)
    del alone.milliseconds["sdpa"], alone.ratio["sdpa"]
    lost = point("mlp forward+backward", "tokens", 1, 0.3)
    del lost.milliseconds["vit_triton"], lost.ratio["sdpa"]
    for what, kinds in (("ops", ["roofline"]), ("models", ["times"])):
        report = runner.Report(None, "cpu", command=what)
        report.add(alone), report.add(lost)
        assert [path.name.split("_")[1] for path in plot.compare(report, tmp_path)] == kinds
