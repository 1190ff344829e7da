"""The benchmark runner: numerical checks before timing, ratios of interleaved runs, results kept on interruption."""

import argparse
import dataclasses
import importlib.machinery
import json
import os
import subprocess
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
    runtimes,
    timing,
)
from benchmarks.cost import Cost
from benchmarks.ops import attention, layer_norm
from benchmarks.ops.derivative import DIRECTIONS
from vit_triton import ops
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
    assert result.ratio == {} and result.ratio_to_fastest is None
    assert "WRONG other: error 5.0e-02" in runner.line(result)


def test_nan_results_and_exceptions_count_as_wrong():
    def fails(x):
        raise RuntimeError("no kernel")

    result = measured(case(vit_triton=lambda x: x * float("nan"), other=lambda x: x * 2, broken=fails))
    assert list(result.wrong) == ["vit_triton", "broken"] and list(result.milliseconds) == ["other"]
    assert result.wrong["broken"] == "RuntimeError: no kernel"


def test_error_limit_is_twice_that_of_pytorch():
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
def test_every_model_is_checked_after_its_runs(direction, monkeypatch):
    runtimes_by_eager_models(monkeypatch)
    known = models.variants("cpu", compiled=False)
    (case,) = models.cases([TINY], [direction], torch.float32, "cpu", known)
    providers = case.prepare()
    for provider in providers.values():
        provider.run()
    assert case.left_out == {} and runner.check(providers, torch.float32) == {}
    assert list(providers) == [name for name in known if direction == "forward" or known[name].training]
    wrong = {name: dataclasses.replace(x, make=lambda *a, x=x: noisy(x.make(*a))) for name, x in known.items()}
    (case,) = models.cases([TINY], [direction], torch.float32, "cpu", wrong)
    assert runner.check(case.prepare(), torch.float32).keys() == providers.keys()


def noisy(model):
    model.register_forward_hook(lambda module, arguments, y: models.logits(y) * 1.01)
    return model


def runtimes_by_eager_models(monkeypatch):
    """Replace both libraries: an exported model is the eager one."""
    stand_in(monkeypatch, "openvino"), stand_in(monkeypatch, "onnxruntime"), stand_in(monkeypatch, "onnxscript")
    for runtime in (runtimes.OnnxRuntime, runtimes.OpenVino):
        session = lambda dtype, model, threads: lambda x: model(torch.from_numpy(x)).numpy()  # noqa: E731
        monkeypatch.setattr(runtime, "export", staticmethod(lambda model, image: model))
        monkeypatch.setattr(runtime, "open", staticmethod(session))


@pytest.mark.parametrize("library", ["timm", "torchvision", "Hugging Face"])
def test_accelerated_model_runs_on_the_kernels_with_equal_weights(library):
    plain = models.LIBRARIES[library](TINY)
    made = models.variants("cpu", False)[f"vit_triton {library}"].make(plain, TINY).eval()
    weights = made.state_dict()
    assert all(torch.equal(x, weights.pop(name)) for name, x in plain.state_dict().items()) and not weights
    calls = []
    with ops.override_run(lambda function, args: calls.append(function) or ops.run_on_cpu(function, args)):
        models.inference(made, torch.randn(2, 3, 32, 32))()
    assert len(calls) == 3  # patch embedding, encoder, norm


def test_variants_of_cpus_are_not_on_gpus():
    cpu, cuda = (models.variants(device, compiled=True) for device in ("cpu", "cuda"))
    only = {"ONNX Runtime", "OpenVINO", "timm compiled frozen", "vit_triton prepacked", "vit_triton timm prepacked"}
    assert only < cpu.keys() and not only & cuda.keys() and {"vit_triton timm", "timm compiled"} < cuda.keys()


def test_unavailable_libraries_are_reported(monkeypatch, capsys):
    def lacking(name):
        return None if name in ("openvino", "transformers") else object()

    monkeypatch.setattr(models.importlib.util, "find_spec", lacking)
    monkeypatch.setattr(runner, "run", lambda cases, *rest: seen.extend(cases) or True)
    seen = []
    main(monkeypatch, "models", "--model", "Ti", "--batch", "1", "--dtype", "float32", "bfloat16")
    text = capsys.readouterr().out
    for name, module in (("OpenVINO", "openvino"), ("vit_triton Hugging Face prepacked", "transformers")):
        assert text.count(f"left out: {name}: {module} not installed; install the extra [bench-cpu]") == 1
    assert text.count("left out: ONNX Runtime: in bfloat16, its kernels for CPUs run models in float32 only\n") == 1
    single, half = (case.left_out.keys() for case in seen)
    assert half - single == {"ONNX Runtime"} and "OpenVINO" in single and "timm" not in single
    reported = dataclasses.replace(case(vit_triton=lambda x: x * 2), left_out={"OpenVINO": "why"})
    assert measured(reported).left_out == {"OpenVINO": "why"}


@pytest.mark.parametrize(
    ("dtype", "capabilities", "reason"),
    [
        (torch.float32, [], ""),
        (torch.bfloat16, ["FP32", "BF16"], ""),
        (torch.bfloat16, ["FP32"], "it has no bfloat16 on this CPU"),
        (torch.float16, ["BF16"], "it is timed in float32 and bfloat16"),
    ],
)
def test_dtypes_of_openvino(monkeypatch, dtype, capabilities, reason):
    core = lambda: types.SimpleNamespace(get_property=lambda device, name: capabilities)  # noqa: E731
    stand_in(monkeypatch, "openvino", Core=core)
    assert runtimes.openvino_lacks(dtype) == reason


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 5)

    def forward(self, image):
        return self.layer(image).relu()


@pytest.mark.parametrize(("module", "runtime"), [("onnxruntime", "OnnxRuntime"), ("openvino", "OpenVino")])
def test_runtime_has_the_results_of_the_model(module, runtime):
    pytest.importorskip(module, reason=f"{module} is not installed; openvino is in the extra bench-cpu only")
    model, image = Net(), torch.randn(2, 3, 4)
    made = getattr(runtimes, runtime)(model)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.testing.assert_close(models.inference(made, image)(), model(image).detach())
        finally:
            torch.set_num_threads(before)


def test_threads_and_precision_of_the_runtimes(monkeypatch):
    """Each number of threads has a session of its own, from one export."""
    opened, exports = [], []

    class SessionOptions:
        def add_session_config_entry(self, name, value):
            setattr(self, name, value)

    class InferenceSession:
        def __init__(self, path, options, providers):
            assert path.exists()
            opened.append({"providers": providers, **vars(options)})

        def get_inputs(self):
            return [types.SimpleNamespace(name="x")]

        def run(self, names, inputs):
            return [inputs["x"] + 1]

    class Core:
        def compile_model(self, model, device, options):
            opened.append({"device": device, **options})
            request = types.SimpleNamespace(infer=lambda inputs, share_inputs: [inputs[0] + 1])
            return types.SimpleNamespace(create_infer_request=lambda: request)

    stand_in(monkeypatch, "onnxruntime", SessionOptions=SessionOptions, InferenceSession=InferenceSession)
    stand_in(monkeypatch, "openvino", Core=Core)
    threads = {"now": 1}
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads["now"])
    program = types.SimpleNamespace(save=lambda path, external_data: path.touch())
    export = staticmethod(lambda model, image: exports.append(image.dtype) or program)
    for runtime in (runtimes.OnnxRuntime, runtimes.OpenVino):
        monkeypatch.setattr(runtime, "export", export)
    image = torch.zeros(2, 3)
    for made in (runtimes.OnnxRuntime(Net()), runtimes.OpenVino(Net()), runtimes.OpenVino(Net().bfloat16())):
        for threads["now"] in (1, 2, 1):
            assert torch.equal(made(image), image + 1)
    onnx, openvino, half = opened[:2], opened[2:4], opened[4:]
    assert [(x["intra_op_num_threads"], x["inter_op_num_threads"]) for x in onnx] == [(1, 1), (2, 1)]
    assert all(x["session.intra_op.allow_spinning"] == "0" for x in onnx)
    assert [x["INFERENCE_NUM_THREADS"] for x in openvino] == [1, 2] == [x["INFERENCE_NUM_THREADS"] for x in half]
    assert all(x["PERFORMANCE_HINT"] == "LATENCY" and x["device"] == "CPU" for x in openvino)
    assert {x["INFERENCE_PRECISION_HINT"] for x in openvino} == {"f32"}
    assert {x["INFERENCE_PRECISION_HINT"] for x in half} == {"bf16"}
    assert exports == [torch.float32] * 3


def test_freezing_is_set_whenever_the_model_is_compiled(monkeypatch):
    """The setting, and no option of torch.compile: Dynamo reads it while it traces."""
    seen = []

    def compile(function, dynamic):
        return lambda *arguments: seen.append(torch._inductor.config.freezing) or function(*arguments)

    monkeypatch.setattr(torch, "compile", compile)
    threads = {"now": 1}
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads["now"])
    model, image = Net(), torch.randn(2, 4)
    frozen = runtimes.Frozen(model)
    for threads["now"] in (1, 1, 2, 2):
        assert torch.equal(frozen(image), model.layer(image).relu())
    assert seen == [True, False, True, False] and not torch._inductor.config.freezing


# --- times ---------------------------------------------------------------------------------------------------


def test_ratio_is_other_time_divided_by_ours(monkeypatch):
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
    assert result.ratio_to_fastest == pytest.approx(1.5)  # our other backend is excluded
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
def test_timing_method_on_a_gpu(monkeypatch, milliseconds, replay, captures, method):
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


def test_every_run_has_the_same_inputs():
    seen = []

    def prepare():
        seen.append(torch.randn(3))
        return {}

    one = dataclasses.replace(case(), prepare=prepare)
    measured(one), torch.randn(5), measured(one)
    assert torch.equal(*seen)


@pytest.mark.parametrize(("hip", "expected"), [(None, ("sm_90", "cuda")), ("7.1.2", ("gfx942", "hip"))])
def test_machine_facts_contain_the_gpu(hip, expected, monkeypatch):
    properties = types.SimpleNamespace(
        name="a GPU", major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942:sramecc+:xnack-"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(runner, "target_of", device.target_of_gpu.__wrapped__)
    found = runner.machine("cuda")
    assert (found["gpu"], found["architecture"]) == ("a GPU", expected[0])
    assert {"cuda", "hip"} & found.keys() == {expected[1]} and (hip is None or found["hip"] == hip)


def test_peaks_exist_for_known_gpus_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peaks.peak("cuda", torch.bfloat16, 1).flops == 989e12
    assert peaks.peak("cuda", torch.float32, 1).flops == 67e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "AMD Instinct MI300X")
    assert peaks.peak("cuda", torch.float16, 1).bytes == 5300e9
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert peaks.peak("cuda", torch.bfloat16, 1) is None


# --- cost ----------------------------------------------------------------------------------------------------


def test_costs_match_the_formulas():
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


def test_pause_precedes_long_calls_only(monkeypatch):
    ticks, events = {"now": 0.0}, []

    def call(name, seconds):
        def run():
            events.append(name)
            ticks["now"] += seconds

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: ticks["now"])
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: events.append(seconds))
    rounds = timing.interleaved({"long": call("long", 0.02), "short": call("short", 0.004)}, 0.0)
    assert events[-4:] == [measure.SETTLE, "long", 0.0, "short"]
    assert rounds["long"] == pytest.approx([0.02] * timing.MIN_ROUNDS)


def test_ratios_by_group():
    """Eager models are compared with ours only, the others also with ours prepacked; a group has its fastest."""
    times = {"vit_triton": 10.0, "vit_triton prepacked": 8.0, "timm": 15.0, "torchvision": 12.0, "OpenVINO": 9.0}
    groups = {"timm": "eager", "torchvision": "eager", "OpenVINO": "runtime", "ONNX Runtime": "runtime"}
    ours, prepacked = ({n: t / times[base] for n, t in times.items() if n != base} for base in list(times)[:2])
    at = ("inference", "ViT-S", "float32", "cpu", 1, "interleaved")
    result = runner.Result(*at, times, ours, {}, 1, 1, {}, prepacked, groups)
    found = result.against_groups()
    assert found["eager"] == pytest.approx({"vit_triton": 1.2})
    assert found["runtime"] == pytest.approx({"vit_triton": 0.9, "vit_triton prepacked": 1.125})
    assert runner.line(result).startswith("eager 1.20  runtime 0.90/1.12  inference")
    alone = dataclasses.replace(result, ratio={}, ratio_prepacked={})
    assert runner.line(alone).startswith("eager -  runtime -  inference")


def test_measured_ratios_have_both_bases_and_the_groups():
    x = torch.ones(2)
    names = {"vit_triton": "", "vit_triton prepacked": "", "timm": "eager", "OpenVINO": "runtime"}
    make = lambda: {n: runner.Provider(lambda: x, lambda: x.double(), lambda: [0.0], group=g) for n, g in names.items()}  # noqa: E731
    result = measured(dataclasses.replace(case(), prepare=make))
    assert result.groups == {"timm": "eager", "OpenVINO": "runtime"}
    assert result.ratio.keys() == names.keys() - {"vit_triton"}
    assert result.ratio_prepacked.keys() == names.keys() - {"vit_triton prepacked"}


@pytest.mark.parametrize("cases", [compare.OPS[0].cases, models.cases])
def test_every_case_is_recompiled(cases, monkeypatch):
    """torch.compile falls back to eager after eight shapes of a function, so every case resets it."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    known = compare.OPS[0].functions("cpu", True) if cases is not models.cases else models.variants("cpu", True)
    for case in cases([TINY], ["forward"], torch.float32, "cpu", known):
        case.prepare()
    assert resets == [1]


def test_image_sizes_are_rounded_down_to_whole_patches():
    assert (Shape.of("SO400M", 384, 1).image, Shape.of("SO400M", 384, 1).tokens) == (378, 27**2 + 1)
    assert (Shape.of("B", 224, 1).tokens, Shape.of("g", 518, 1).tokens) == (197, 37**2 + 1)


def test_cases_beyond_free_memory_are_skipped_and_reported(monkeypatch, capsys):
    monkeypatch.setattr(runner, "free_memory", lambda device: 2**30)
    report = runner.Report(None, "cpu")
    assert runner.run([case(2**31, vit_triton=lambda x: 1 / 0)], [1], 0.0, report)
    assert report.skipped == {"a case, 8, float32": "needs 2.0 GiB (computed), 1.0 GiB are free"}
    assert "skipped a case, 8, float32" in capsys.readouterr().out and not report.results


# --- the report ----------------------------------------------------------------------------------------------


def test_results_file_is_complete_after_every_case(tmp_path):
    path = tmp_path / "results.json"
    report = runner.Report(path, "cpu")
    seen = []

    def count_results(x):
        seen.append(len(json.loads(path.read_text())["results"]))
        return x * 2

    runner.run([case(vit_triton=lambda x: x * 2), case(vit_triton=count_results)], [1], 0.0, report)
    assert set(seen) == {1} and len(json.loads(path.read_text())["results"]) == 2
    assert os.listdir(tmp_path) == ["results.json"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    report = runner.Report(path, "cpu")
    before = path.read_text()
    report.metadata["more"] = 1

    def full(source, target):
        raise OSError("no space")

    monkeypatch.setattr(runner.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report.write()
    assert path.read_text() == before and os.listdir(tmp_path) == ["results.json"]


def test_ctrl_c_keeps_measured_results(tmp_path, monkeypatch):
    def stop(x):
        raise KeyboardInterrupt

    two = case(vit_triton=lambda x: x * 2), case(vit_triton=stop)
    monkeypatch.setitem(compare.CASES, "ops", lambda args: iter(two))
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "ops", "--json", tmp_path / "r.json", "--threads", "1", "--seconds", "0")
    assert stopped.value.code == 130
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 1


@pytest.mark.parametrize("what", ["overhead", "memory"])
def test_ctrl_c_keeps_counted_results(what, tmp_path, monkeypatch, capsys):
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


def test_wrong_results_of_vit_triton_fail_the_command(monkeypatch):
    monkeypatch.setitem(compare.CASES, "ops", lambda args: iter([case(vit_triton=lambda x: x * 3)]))
    with pytest.raises(SystemExit) as failed:
        main(monkeypatch, "ops", "--threads", "1", "--seconds", "0")
    assert failed.value.code == 1


def test_command_writes_its_results(tmp_path, monkeypatch, capsys):
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
        (["ops", "--seconds", "soon"], "must be a number of seconds, 0 or more, got 'soon'"),
        (["ops", "--seconds", "-1"], "must be a number of seconds, 0 or more, got '-1'"),
        (["ops", "--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
        (["ops", "--json", "/nowhere/r.json"], "must be a file in a folder that exists, got '/nowhere/r.json'"),
        (["ops", "--plot", __file__], "must be a folder, got the file"),
        (["ops", "--bogus"], "usage: python -m benchmarks ops "),
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
def test_bad_options_are_rejected(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        main(monkeypatch, *arguments)
    assert refused.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(refused.value.code)


@pytest.mark.parametrize(
    "words", ["memory", "overhead", "ops --plot charts", "growth --plot charts", "models --plot charts"]
)
def test_missing_packages_are_reported_in_one_line(words):
    code = f"""
import subprocess
import sys
sys.modules["rich"] = sys.modules["matplotlib"] = None
sys.argv = ["benchmarks", *{words.split()}]
from benchmarks.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode and "Traceback" not in done.stderr
    assert "install the extra [bench], for example pip install '.[bench]'" in done.stderr.splitlines()[-1]


def test_unwritable_output_folder_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(argparse.ArgumentTypeError, match="must be in a folder that can be written to, got "):
        new_file(str(tmp_path / "r.json"))


def test_cuda_is_rejected_without_a_gpu(monkeypatch):
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


def test_installed_optional_packages_are_measured(monkeypatch):
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
    declared = [*attention.OPS, *layer_norm.OPS]
    assert not names & {name for op in declared for name in op.functions("cuda", False)}
    stand_in(monkeypatch, "flash_attn", flash_attn_func=attend)
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=attend)
    stand_in(monkeypatch, "liger_kernel.ops.layer_norm", LigerLayerNormFunction=Liger)
    stand_in(monkeypatch, "fla.modules.layernorm", layer_norm=norm)
    found = set()
    for op in declared:
        functions = {name: f for name, f in op.functions("cuda", False).items() if name in names}
        found |= set(functions)
        for case in op.cases([TINY], ["forward", "both"], torch.float32, "cpu", functions):
            assert runner.check(case.prepare(), torch.float32) == {}
    assert found == names
    assert not names & {name for op in declared for name in op.functions("cpu", False)}  # they need a GPU


# --- growth and charts ---------------------------------------------------------------------------------------


def point(case, axis, size, milliseconds, other="sdpa"):
    times = {"vit_triton": milliseconds, other: 2 * milliseconds}
    at = {"axis": axis, "size": size}
    return runner.Result(case, "s", "float32", "cpu", 1, "interleaved", times, {other: 2.0}, {}, 64 * size, size, at)


def test_slopes_use_common_sizes():
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


def test_chart_of_times_colors_the_groups(tmp_path, monkeypatch):
    report = runner.Report(None, "cpu", command="models")
    result = point("inference", "tokens", 1, 1.0, "timm")
    result.milliseconds |= {"vit_triton prepacked": 0.9, "OpenVINO": 1.1, "timm compiled": 1.5}
    result.groups = {"timm": "eager", "OpenVINO": "runtime", "timm compiled": "compile"}
    report.add(result)
    legends = []
    real = plot.matplotlib.figure.Figure.legend
    monkeypatch.setattr(
        plot.matplotlib.figure.Figure,
        "legend",
        lambda figure, handles, **more: (
            legends.append([h.get_label() for h in handles]) or real(figure, handles=handles, **more)
        ),
    )
    assert_picture(plot.compare(report, tmp_path)[1])
    assert legends == [["vit_triton", "vit_triton, other forms", "PyTorch eager", "torch.compile", "other runtimes"]]
    colours = [plot._of_group(name, result) for name in result.milliseconds]
    assert len(set(colours)) == 5 and plot._of_group("vit_triton", result) == plot.HIGHLIGHT


def test_every_shape_has_its_own_chart(tmp_path):
    report = runner.Report(None, "cpu", command="ops")
    for i, model in enumerate("LB"):
        report.add(dataclasses.replace(point("mlp forward", "tokens", 1, 0.3), shape=f"{model}/16 at 224, batch {i}"))
    names = {path.name for path in plot.compare(report, tmp_path)}
    shapes = ("L_16_at_224_batch_0", "B_16_at_224_batch_1")
    assert names == {f"ops_{kind}_float32_1_threads_{s}.png" for kind in ("ratios", "roofline") for s in shapes}


def test_charts_with_missing_providers(tmp_path):
    """Results lack a provider whose numbers were wrong."""
    alone = point("mlp forward", "tokens", 1, 0.3)
    del alone.milliseconds["sdpa"], alone.ratio["sdpa"]
    lost = point("mlp forward+backward", "tokens", 1, 0.3)
    del lost.milliseconds["vit_triton"], lost.ratio["sdpa"]
    for what, kinds in (("ops", ["roofline"]), ("models", ["times"])):
        report = runner.Report(None, "cpu", command=what)
        report.add(alone), report.add(lost)
        assert [path.name.split("_")[1] for path in plot.compare(report, tmp_path)] == kinds
