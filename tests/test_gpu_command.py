"""`python -m benchmarks gpu` isolates failing steps, keeps every result and detects wrong numbers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from cuda_graphs import simulated_graphs  # noqa: F401

from benchmarks import gpu
from benchmarks.gpu import machine, model_graphs, models, numbers, plan, process, report, speed, tiles
from benchmarks.gpu.machine import IDENTITY
from benchmarks.gpu.process import CRASHED, FAILED, HUNG, OUT_OF_MEMORY, PASSED, Worker
from benchmarks.gpu.results import Results
from benchmarks.gpu.running import run_steps
from benchmarks.gpu.sections import sections
from benchmarks.gpu.step import START_SECONDS, Context, Section, Step, WrongNumbers
from benchmarks.ops import patch_embed
from vit_triton import functional as F
from vit_triton.cli.errors import is_out_of_memory
from vit_triton.kernels import tuned
from vit_triton.kernels.picker import PICKERS
from vit_triton.kernels.target import target_named

ROOT = Path(__file__).parents[1]
TINY = Context("cpu", Path(), tiny=True)


def command(*arguments, faults=False, code=None):
    """Run the command in a separate process; ``code`` runs before it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"VIT_TRITON_GPU_FAULTS": "1"} if faults else {})
    program = f"{code or ''}\nimport runpy; runpy.run_module('benchmarks', run_name='__main__')"
    start = ["-c", program] if code else ["-m", "benchmarks"]
    words = [sys.executable, *start, "gpu", *map(str, arguments)]
    return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def statuses(folder):
    steps = json.loads((folder / "results.json").read_text())["steps"]
    return {key: result["status"] for key, result in steps.items()}


# --- steps that fail -----------------------------------------------------------------------------------------


def test_failed_step_does_not_stop_others_and_a_second_run_resumes(tmp_path):
    options = ("--device", "cpu", "--minutes", "3", "--out", tmp_path)
    done = command(*options, "--only", "faults", faults=True)
    assert done.returncode == 1, done.stdout + done.stderr
    expected = {
        "machine: device and versions": PASSED,
        "faults: abort": CRASHED,
        "faults: illegal access": CRASHED,
        "faults: hang": HUNG,
        "faults: memory": OUT_OF_MEMORY,
        "faults: raise": FAILED,
        "faults: pass": PASSED,
    }
    assert statuses(tmp_path) == expected
    page = (tmp_path / "report.md").read_text()
    for line in (
        "| faults: abort | crashed | the process ended with SIGABRT |",
        "| faults: raise | failed | ValueError",
    ):
        assert line in page
    assert "SIGSEGV" in page and "no result within" in page and "on purpose" in page
    assert "can't allocate memory" in page and "## Steps without a result" in page

    done = command(*options, "--only", "linear, no rows", faults=True)  # existing results are kept and not repeated
    assert "faults:" not in done.stdout and done.returncode == 1
    assert statuses(tmp_path) == {**expected, **{f"numbers: linear, no rows, {d}": PASSED for d in numbers.DTYPES}}
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["only"] for run in runs] == ["faults", "linear, no rows"]

    done = command(*options, "--only", "faults: pass", faults=True)
    assert "faults: pass" not in done.stdout

    done = command(*options, "--only", "faults: raise", "--again", faults=True)
    assert "faults: raise" in done.stdout and "faults: abort" not in done.stdout


def test_step_stopped_by_the_end_of_the_command_has_no_result(tmp_path, monkeypatch):
    """The next run repeats the step; only a step that exceeds its own limit counts as hung."""

    class Slow(Worker):
        def run(self, section, step, limit):
            time.sleep(limit)
            return {"status": HUNG, "line": "", "seconds": limit}

    monkeypatch.setattr(plan, "START_SECONDS", 0.0)
    section = Section("a", "a", 1.0, (Step("one", lambda context: {}, 1.0, uses_remaining_time=True),))
    kept = {}
    for minutes, limit, expected in ((1.2 / 60, None, {}), (1.0, 1.0, {"a: one": HUNG})):
        step = dataclasses.replace(section.steps[0], limit=limit)
        clock = plan.Clock(time.time(), minutes, None)
        keep = lambda key, result: kept.update({key: result["status"]})  # noqa: E731
        run_steps(section, [step], [Slow(TINY, tmp_path / "log")], clock, keep)
        assert kept == expected


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_terminated_command_leaves_no_process(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VIT_TRITON_GPU_FAULTS": "1"}
    words = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--out", str(tmp_path), "--only", "hang"]
    log = tmp_path / "logs" / "faults-0.txt"
    with subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        end = time.time() + 120
        while not (log.exists() and "hang" in log.read_text()) and time.time() < end:
            time.sleep(0.1)
        run.send_signal(signal.Signals[name])
        run.communicate(timeout=4)  # its processes keep the pipe open; the fault hangs for 5 seconds or longer
    assert run.returncode == (130 if name == "SIGTERM" else -signal.SIGKILL)
    assert statuses(tmp_path) == {"machine: device and versions": PASSED}
    assert (tmp_path / "report.md").exists() == (name == "SIGTERM")


def test_process_start_is_limited_by_the_end_of_the_command(tmp_path):
    worker = Worker(TINY, tmp_path / "log")
    result = worker.run("machine", "copy bandwidth", 0.5)
    assert (result["status"], result["line"]) == (HUNG, "no result within 0 s") and result["seconds"] < 4
    clock = plan.Clock(time.time(), 10, 1e15)
    assert clock.limit(Step("one", lambda context: {}, 1.0, limit=5.0)) == START_SECONDS + 5
    assert clock.limit(Step("one", lambda context: {}, 1.0, limit=1e5)) <= 600


def test_failed_writes_end_the_command(tmp_path):
    """On a full disk, or with a closed stdout, every further result would be lost."""
    closed = []

    class Quick(Worker):
        def run(self, section, step, limit):
            return {"status": PASSED, "line": ""}

        def close(self):
            closed.append(self)

    def keep(key, result):
        raise OSError(28, "No space left on device")

    section = Section("a", "a", 1.0, tuple(Step(str(i), lambda context: {}, 1.0) for i in range(9)))
    workers = [Quick(TINY, tmp_path / "log") for _ in range(2)]
    with pytest.raises(OSError, match="No space left"):
        run_steps(section, section.steps, workers, plan.Clock(time.time(), 10, 1e15), keep)
    assert set(closed) == set(workers)


def test_output_folder_is_locked(tmp_path):
    for _ in range(2):
        with (
            gpu._lock_folder(tmp_path),
            pytest.raises(SystemExit, match="another command writes to"),
            gpu._lock_folder(tmp_path),
        ):
            pass


@pytest.mark.parametrize("broken", [False, True])
def test_unusable_process_ends(broken, monkeypatch):
    """After a failed CUDA graph capture PyTorch 2.11 raises on random numbers, even if the step itself passed."""

    def randn(*size, device):
        if broken:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch, "randn", randn)
    result = process._result(Step("one", lambda context: {"line": ""}, 1.0), Context("cuda", Path()))
    assert result == {"status": PASSED, "line": "", "ends": broken}


def test_library_allocation_failure_is_out_of_memory():
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


# --- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", numbers.DTYPES.values(), ids=str)
def test_expanded_gradients_have_stride_0(dtype):
    for one in numbers.OPERATORS:
        _, gradients = numbers._made(one, dtype, TINY)
        several = [g for g in gradients if g.numel() > 1]
        assert all((sum(g.stride()) == 0) == one.expanded for g in several) and (several or "no rows" in one.name)


@pytest.mark.parametrize("code, message", [(0, "ERROR SUMMARY: 0 errors"), (99, "exit code 99: .*Invalid __global__")])
def test_the_sanitizer(code, message, tmp_path, monkeypatch):
    output = "========= Invalid __global__ read of size 2 bytes" if code else "========= ERROR SUMMARY: 0 errors"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\necho "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING" > {tmp_path}/given\necho "{output}"\nexit {code}'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if code:
        with pytest.raises(WrongNumbers, match=message):
            numbers._sanitizer(Context("cuda", tmp_path))
    else:
        assert numbers._sanitizer(Context("cuda", tmp_path)) == {"line": message}
    given = (tmp_path / "given").read_text()
    assert "--error-exitcode 99" in given and "--report-api-errors no" in given and given.endswith("small_call() 1\n")


def test_captured_baseline_copies_nothing_from_the_cpu(monkeypatch):
    image, *others = patch_embed.inputs(speed.TINY)
    first = patch_embed.pytorch(speed.TINY, image, *others)
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(patch_embed.pytorch(speed.TINY, image, *others), first)


def check(function, dtype=torch.float32):
    one = numbers.Check("one", lambda select: [torch.randn(select(8, 4), 16), torch.randn(16)], function, 0)
    return numbers._check(one, dtype, TINY)


def by_backend(ours, torchs=lambda x, w: x * w):
    return lambda x, w, backend: (ours if backend == "triton" else torchs)(x, w)


def test_correct_results_pass():
    facts = check(by_backend(lambda x, w: x * w))
    assert set(facts["errors"]) == {"inference result 0", "result 0", "gradient of input 0", "gradient of input 1"}
    assert facts["line"].endswith("bitwise reproducible")


class Halved(torch.autograd.Function):
    """Identity that returns half of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dx):
        return dx / 2


WRONG = {
    "result": (lambda x, w: x * w * 1.001, "result 0: error 1.0e-03"),
    "gradient": (lambda x, w: Halved.apply(x) * w, "gradient of input 0: error 5.0e-01"),
    "nan": (lambda x, w: x * w * float("nan"), "error nan"),
    "inference": (lambda x, w: x * w * (1 if torch.is_grad_enabled() else 2), "inference result 0: error 1.0e"),
    "bits": (lambda x, w: x * w * (1 + 1e-7 * torch.rand(x.shape)), "two equal calls differ in bits: inference"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_results_are_detected(what):
    ours, message = WRONG[what]
    with pytest.raises(WrongNumbers, match=message):
        check(by_backend(ours))


def test_error_limit_is_twice_that_of_pytorch():
    ours, exact = {"x": torch.full((4,), 1.1)}, {"x": torch.ones(4).double()}
    for theirs, right in ((1.06, True), (1.04, False), (float("nan"), False)):
        plain = {"x": torch.full((4,), theirs)}
        if right:
            numbers.check_results(ours, ours, exact, lambda plain=plain: plain, torch.float32)
        else:
            with pytest.raises(WrongNumbers):
                numbers.check_results(ours, ours, exact, lambda plain=plain: plain, torch.float32)


@pytest.mark.parametrize("spoilt", ["share", "values", "seed"])
def test_wrong_dropout_is_detected(spoilt, monkeypatch):
    def linear(x, weight, dropout_p, backend):
        y = x @ weight.T
        if dropout_p:
            kept = torch.rand(y.shape) >= (dropout_p if spoilt != "share" else dropout_p + 0.05)
            y = y * kept / (1 - dropout_p * (spoilt != "values"))
            if spoilt == "seed":
                torch.manual_seed(7)
        return y

    monkeypatch.setattr(F, "linear", linear)
    if spoilt == "seed":
        manual = torch.manual_seed
        seeds = iter(range(100))
        monkeypatch.setattr(torch, "manual_seed", lambda seed: manual(next(seeds)))
    with pytest.raises(WrongNumbers, match="linear: (share|the same seed)"):
        numbers._dropout(TINY)


def test_every_operator_has_a_check():
    """Every public function of vit_triton.functional except encoder, which a ViT runs in inference."""
    names = " ".join(check.name for check in numbers.OPERATORS)
    for name in ("attention", "linear", "mlp", "layer_norm", "patch_embed"):
        assert name in names and hasattr(F, name)


# --- CUDA graphs ----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(simulated_graphs, monkeypatch):  # noqa: F811
    """Simulated CUDA graphs, and a torch.compile that returns the model."""
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: model)


@pytest.mark.parametrize("what", [models.INFERENCE, models.TRAINING])
@pytest.mark.parametrize("library", [model_graphs.OURS, model_graphs.OTHER])
def test_graphs_of_a_model_are_checked_and_timed(compiled, library, what):
    facts = model_graphs.latency(library, what, TINY)
    assert {*facts["milliseconds"]} == {*model_graphs.VARIANTS} and facts["errors"][model_graphs.GRAPHED] == 0
    if what == models.TRAINING:
        assert "differ" in model_graphs.dropout(library, TINY)["line"]


def test_wrong_graphs_are_detected(compiled, monkeypatch):
    make = torch.cuda.make_graphed_callables

    def frozen(model, sample):
        """A graph whose random numbers or input are those of the capture."""
        result = make(model, sample)
        call = result.forward

        def forward(image):
            torch.manual_seed(0)
            return call(sample[0])

        result.forward = forward
        return result

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", frozen)
    with pytest.raises(WrongNumbers, match="graphed callable: error"):
        model_graphs.latency(model_graphs.OURS, models.INFERENCE, TINY)
    with pytest.raises(WrongNumbers, match="graphed callable: the gradients of two calls are equal"):
        model_graphs.dropout(model_graphs.OURS, TINY)


# --- time ----------------------------------------------------------------------------------------------------


def test_schedule_skips_steps_beyond_the_time_limit():
    steps = tuple(Step(str(i), lambda context: {}, seconds) for i, seconds in enumerate((20.0, 200.0, 20.0)))
    rest = Section("rest", "rest", 1.0, (Step("tune", lambda context: {}, 600.0, uses_remaining_time=True),))
    first, last = plan.schedule([Section("a", "a", 0.5, steps), rest], plan.Clock(0.0, 2, 1e15))
    assert (first.num_fitting, first.start, first.end) == (2, 0.0, START_SECONDS + 40)  # the step of 200 s is skipped
    assert (last.num_fitting, last.start, last.end) == (1, first.end, 120.0)


def test_parallel_processes_shorten_the_schedule():
    steps = tuple(Step(str(i), lambda context: {}, 10.0) for i in range(6))
    (row,) = plan.schedule([Section("a", "a", 1.0, steps, processes=3)], plan.Clock(0.0, 2, 1e15))
    assert row.end == pytest.approx(START_SECONDS + 20)


def test_expected_time_follows_the_gpu():
    step = Step("one", lambda context: {}, 1.0, kernels=10, flops=4e14)
    assert step.expected(1e15) == pytest.approx(1 + 8 + 1) and step.expected(1e14) == pytest.approx(1 + 8 + 10)


def test_the_plan_shows_every_section_of_both_gpus(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--dry-run"])
    from benchmarks import __main__ as main

    main.main()
    shown = capsys.readouterr().out
    for name in ("NVIDIA H200, 10 minutes", "NVIDIA GeForce RTX 4090, 10 minutes"):
        assert shown.count(name) == 1
    for section in sections(TINY):
        assert shown.count(f"  {section.title}") == 2
    assert "computed" in shown


# --- results -------------------------------------------------------------------------------------------------

MACHINE = dict.fromkeys(IDENTITY, "1") | {"gpu": "NVIDIA H200"}
RUN = {"minutes": 10.0, "device": "cuda", "only": ""}


def made(folder, steps):
    results = Results(folder, RUN)
    results.identify(MACHINE)
    for key, result in steps.items():
        results.add(key, result)
    return results


@pytest.mark.parametrize("name", ["gpu", "torch", "source"])
def test_results_of_another_machine_are_rejected(name, tmp_path):
    made(tmp_path, {"a: b": {"status": PASSED}})
    again = Results(tmp_path, RUN)
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(
        SystemExit, match=f"another machine or version .{name} {MACHINE[name]}, now other.: choose another"
    ):
        again.identify({**MACHINE, name: "other"})
    assert (tmp_path / "results.json").read_text() == before
    again.identify(MACHINE)


OTHER_FORMAT = '{"format": 2, "machine": {}, "steps": {}, "runs": []}'


@pytest.mark.parametrize("content", ["", "[]", "{}", OTHER_FORMAT, "\x00"])
def test_foreign_file_is_rejected_and_kept(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="holds no results of this command"):
        Results(tmp_path, RUN)
    assert (tmp_path / "results.json").read_text() == content


def test_missing_steps_include_incomplete_results():
    results = Results(Path("no folder"), RUN)
    results.steps = {"a": {"status": PASSED}, "b": {"status": CRASHED}, "c": {"status": PASSED, "complete": False}}
    assert [name for name in "abcd" if results.missing(name, again=False)] == ["c", "d"]
    assert [name for name in "abcd" if results.missing(name, again=True)] == ["b", "c", "d"]


# --- the report ----------------------------------------------------------------------------------------------

STEPS = {
    "machine: device and versions": {"status": PASSED, "line": "", "machine": MACHINE},
    "machine: copy bandwidth": {"status": PASSED, "line": "4000 GB/s", "gigabytes": 4000.0},
    "machine: product of matrices, bfloat16": {"status": PASSED, "line": "700 TFLOP/s", "tflops": 700.0},
    "numbers: linear, one row, bfloat16": {
        "status": "wrong",
        "line": "result 0: error 3.0e-01, PyTorch's 1.0e-03",
        "errors": {"result 0": 0.3, "result 1": 0.001},
        "pytorch": {"result 0": 0.001, "result 1": 0.01},
        "worst": "result 0",
    },
    "numbers: CUDA graph": {"status": PASSED, "line": "captured"},
    "models: ViT-B/16, inference": {
        "status": PASSED,
        "line": "",
        "library": "timm",
        "batch": 256,
        "memory": {"accelerated": 2**30, "eager": 2 * 2**30},
        "images_per_second": {"accelerated": 3000.0, "eager": 2000.0},
        "ratio": {"eager": 1.5},
    },
    "models: ViT-B/16, inference, torch.compile": {
        "status": PASSED,
        "line": "",
        "library": "timm",
        "batch": 256,
        "memory": {"accelerated": 2**30, "torch.compile": 3 * 2**29},
        "images_per_second": {"accelerated": 2900.0, "torch.compile": 2500.0},
        "ratio": {"torch.compile": 1.16},
    },
    f"models: {model_graphs.name_of(model_graphs.OURS, models.INFERENCE)}": {
        "status": PASSED,
        "line": "",
        "milliseconds": {"eager": 2.0, "reduce-overhead": 1.0, "graphed callable": 0.5},
    },
    "speed: mlp": {
        "status": PASSED,
        "line": "",
        "case": "mlp forward",
        "shape": "B/16 at 224, batch 64",
        "dtype": "bfloat16",
        "milliseconds": {"vit_triton": 0.2, "vit_triton torch": 0.3, "pytorch": 0.25},
        "ratio": {"vit_triton torch": 1.5, "pytorch": 1.25},
        "flops": 7e10,
        "bytes": 1000,
    },
    "speed: linear_fwd": {
        "status": PASSED,
        "line": "",
        "products": [
            {"case": "qkv", "milliseconds": {"ours": 0.1, "vendor": 0.09}, "ratio": 0.9, "tile": "GemmConfig(128)"}
        ],
    },
}


def test_report_page_shows_failures_and_measurements(tmp_path):
    default, other, *_ = PICKERS["pick_layer_norm"].candidates((768, target_named("sm_90")))
    entry = tuned.Timed("pick_layer_norm", {"width": 768}, other, [(default, 2.0), (other, 1.0)])
    tuned.write(tmp_path / tiles.FILE, tuned.new_table("NVIDIA H200", "sm_90", [entry]))
    page = report.markdown(made(tmp_path, STEPS), sections(Context("cuda", tmp_path)))
    assert page.startswith("# vit_triton on NVIDIA H200\n\n10 of ")
    assert "9 passed, 1 wrong" in page and "trial on a CPU" not in page
    wrong = "| numbers: linear, one row, bfloat16 | wrong | result 0: error 3.0e-01, PyTorch's 1.0e-03 |"
    assert page.index("## What went wrong") < page.index(wrong) < page.index("## The machine")
    assert "| linear, one row | wrong 3.0e-01 (1.0e-03) |  |  |" in page
    assert "| CUDA graph | passed | captured |" in page
    model = "| ViT-B/16 | inference | 256 | 3000 | 2000 | 2500 | 1.50 | 1.16 | 1.00 | 2.00 | 1.50 | timm |"
    assert model in page and "a ratio is the median of the ratios of interleaved rounds" in page
    assert "| vit_triton | inference | 2.000 | 1.000 | 0.500 |" in page
    # 7e10 FLOPs at 700 TFLOP/s take 0.1 ms
    assert "| mlp forward | B/16 at 224, batch 64 | 0.200 | 1.25 | pytorch | pytorch 0.250 | 50 % |" in page
    assert "| qkv | GemmConfig(128) | 0.1000 | 0.0900 | 0.90 |" in page
    assert "1 choices were timed, and 1 differ" in page and "| 2.00 |" in page
    assert "| whole models | 19 |" in page  # not reached


@pytest.mark.parametrize("mode, gib, processes", [("Default", 8, 4), ("Exclusive_Process", 80, 1), ("Default", 1, 1)])
def test_machine_facts_of_a_gpu(mode, gib, processes, monkeypatch):
    facts = dict(total_memory=gib * 2**30, multi_processor_count=9, pci_domain_id=0, pci_bus_id=0x65, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**facts))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    names = {**dict.fromkeys(("cpu", "torch", "triton", "vit_triton"), "1"), "gpu": "NVIDIA H200"}
    monkeypatch.setattr(machine, "machine", lambda device: names)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)

    def nvidia_smi(command, **options):
        assert command[-1] == "--id=00000000:65:00.0"
        values = {"driver_version": "580.1", "compute_mode": mode}
        output = ", ".join(values.get(name, "1") for name in machine.NVIDIA_SMI.split(","))
        return types.SimpleNamespace(returncode=0, stdout=output)

    monkeypatch.setattr(machine.subprocess, "run", nvidia_smi)
    found = machine._device(Context("cuda", Path()))
    assert found["processes"] == processes and set(IDENTITY) <= {*found["machine"], "architecture", "python"}
    assert found["machine"]["driver_version"] == "580.1" and found["machine"]["memory"] == f"{gib} GiB"


# --- requirements --------------------------------------------------------------------------------------------

WITHOUT = """
import sys
for name in ("rich", "matplotlib", "timm", "transformers", "torchvision", "vit_pytorch", "sklearn", "PIL"):
    sys.modules[name] = None
"""


def test_command_requires_no_extras():
    done = command("--dry-run", code=WITHOUT)
    assert done.returncode == 0 and "NVIDIA H200" in done.stdout, done.stderr


def test_missing_triton_is_reported():
    done = command("--dry-run", code="import sys\nsys.modules['triton'] = None")
    assert (done.returncode, done.stderr) == (
        1,
        "the kernels require the package triton (pip install triton; Linux only)\n",
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "--device: PyTorch finds no GPU"),
        (("--minutes", "0"), "--minutes: must be a number of minutes above 0, got '0'"),
        (("--minutes", "soon"), "--minutes: must be a number of minutes above 0, got 'soon'"),
        (("--out", __file__), "--out: must be a folder, got the file"),
        (("--device", "cpu", "--only", "nothing"), "--only: no step contains 'nothing'"),
        (("--device", "cpu", "--out", "/dev/null/folder"), "cannot continue: [Errno 20] Not a directory: "),
    ],
)
def test_bad_options_are_rejected(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", *words])
    from benchmarks import __main__ as main

    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert message in capsys.readouterr().err + str(stopped.value)
    assert list(tmp_path.iterdir()) == []


def test_interpreter_is_rejected_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        gpu._interpreting("cuda")


def test_a_step_of_every_section_runs_on_a_cpu(tmp_path):
    """Tiny sizes take the code path of a GPU."""
    options = ("--device", "cpu", "--minutes", "5", "--out", tmp_path)
    done = command(*options, "--only", "B/16, ")
    assert done.returncode == 0, done.stdout + done.stderr
    found = statuses(tmp_path)
    assert found["numbers: attention of ViT-B/16, bfloat16"] == PASSED
    assert found["models: ViT-B/16, training step"] == found["models: ViT-B/16, inference"] == PASSED
    assert set(found.values()) == {PASSED, "skipped"}
