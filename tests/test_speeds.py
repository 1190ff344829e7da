"""Tables of measured speeds of the CPU kernels: which one is used, how "auto" uses it, and how it is measured."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import EMULATOR, INTERPRETER
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import vit_triton
from vit_triton import backend, cpu
from vit_triton import functional as F
from vit_triton.cli import main
from vit_triton.cpu import features
from vit_triton.kernels import tuned
from vit_triton.speeds import table as speeds
from vit_triton.speeds.table import Key, Speed
from vit_triton.tables import ENVIRONMENT_VARIABLE, default_path
from vit_triton.tuning import compare, measure

KIND, AMD = "Acme AVX-512", "AMD AVX-512 BF16"
F32, BF16 = torch.float32, torch.bfloat16
SMALL, LARGE = speeds.SMALL_ELEMENTS, speeds.SMALL_ELEMENTS + 1
SPEEDS = {
    Key("mlp", F32, False, True): Speed(1.5, 1.75),
    Key("mlp", F32, False, False): Speed(0.5, 1.25),
    Key("mlp", F32, True, True): Speed(1.01),
    Key("mlp", F32, True, False): Speed(1.5),
    Key("layer_norm", F32, False, True): Speed(2.0),
    Key("layer_norm", F32, False, False): Speed(0.5),
}
COMPILED = pytest.mark.skipif(INTERPRETER or EMULATOR, reason="no table is used")


def forget():
    backend._cpu_table.cache_clear()
    backend._torch_reason.cache_clear()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A CPU of an unknown kind that runs compiled kernels, and a user without tables."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in (ENVIRONMENT_VARIABLE, backend.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(features, "kind", lambda: KIND)
    monkeypatch.setattr(backend, "not_compiled_reason", lambda: "")
    monkeypatch.setattr(backend, "_hinted", False)
    forget()
    yield tmp_path / "vit_triton" / "tuned"
    forget()


def write(kind=KIND, values=SPEEDS, path=None):
    path = path or default_path(kind)
    speeds.write(path, speeds.new_table(kind, values))
    return path


def auto(op="mlp", elements=SMALL, dtype=F32, gradients=False, **options):
    with torch.set_grad_enabled(gradients):
        return backend.resolve_backend("auto", op, torch.empty((), dtype=dtype).expand(elements), **options)


# --- the kind of CPU ---------------------------------------------------------------------------------------

AVX2 = "sse avx2 fma f16c bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("vendor", "flags", "kind"),
    [
        ("GenuineIntel", AVX2, "Intel AVX2"),
        ("AuthenticAMD", f"{AVX2} avx512f avx512bw", "AMD AVX2"),
        ("GenuineIntel", AVX512, "Intel AVX-512"),
        ("AuthenticAMD", f"{AVX512} avx512_bf16", "AMD AVX-512 BF16"),
        ("GenuineIntel", f"{AVX512} avx512_bf16 amx_tile", "Intel AVX-512 BF16"),
        ("GenuineIntel", f"{AVX512} avx512_bf16 amx_bf16 amx_tile", "Intel AMX"),
        ("HygonGenuine", AVX2, "HygonGenuine AVX2"),
        ("GenuineIntel", f"{AVX2} avx512_bf16", "Intel AVX2"),
        ("GenuineIntel", "sse avx2 fma", ""),
    ],
)
def test_kind_of_cpu(monkeypatch, tmp_path, vendor, flags, kind):
    monkeypatch.undo()
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(features, "Path", lambda path: cpuinfo if path == "/proc/cpuinfo" else None)
    monkeypatch.setattr(features.platform, "system", lambda: "Linux")
    monkeypatch.setattr(features.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(features, "_request_tiles", lambda: True)
    for cached in (features._cpuinfo, features.detect):
        cached.cache_clear()
    try:
        assert features.kind() == kind
    finally:
        for cached in (features._cpuinfo, features.detect):
            cached.cache_clear()


# --- files -------------------------------------------------------------------------------------------------


def test_table_can_be_written_and_read(home):
    path = write()
    assert path == home / "acme-avx-512.json"
    table = speeds.read(path)
    assert table == speeds.new_table(KIND, SPEEDS) and table.threads == torch.get_num_threads()
    assert torch.__version__.startswith(table.torch) and "+" not in table.torch


def test_shipped_tables_are_valid():
    paths = sorted(speeds.shipped_path(AMD).parent.glob("*.json"))
    assert speeds.shipped_path(AMD) in paths
    for path in paths:
        table = speeds.read(path)
        assert path == speeds.shipped_path(table.cpu) and table.speeds
    for op in speeds.OPS:
        assert callable(getattr(F, "layer_norm" if op == "add_layer_norm" else op))


def test_user_table_has_priority(monkeypatch, home):
    assert speeds.find(KIND) is None
    path, table = speeds.find(AMD)
    assert path == speeds.shipped_path(AMD) and table.speeds["attention", BF16, False, True] == Speed(1.52)
    mine = write(AMD, {Key("mlp", F32, False, True): Speed(0.5)})
    assert speeds.find(AMD) == (mine, speeds.read(mine))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert speeds.find(AMD)[0] == path
    other = write(AMD, {}, home / "other.json")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(other))
    assert speeds.find(AMD)[0] == other and speeds.find(KIND) is None  # the file is of another kind
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(home / "missing.json"))
    with pytest.raises(FileNotFoundError, match="VIT_TRITON_TUNED must name a file .*, got .*missing.json"):
        auto()


def test_environment_variable_may_name_either_type_of_table(monkeypatch, home):
    """Each type of device ignores the tables of the other."""
    path = home / "gpu.json"
    tuned.write(path, tuned.new_table("NVIDIA H200", "sm_90", []))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(path))
    assert speeds.find(AMD)[0] == speeds.shipped_path(AMD) and speeds.find(KIND) is None
    assert tuned.table("NVIDIA H200", "sm_90") is not None
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(write()))
    assert tuned.table("NVIDIA H200", "sm_90") is None and speeds.find(KIND) is not None
    path.write_text("{")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(path))
    for find in (lambda: tuned.table("NVIDIA H200", "sm_90"), lambda: speeds.find(KIND)):
        with pytest.raises(ValueError, match="gpu.json: "):
            find()


WRONG = [
    (lambda x: x.pop("note"), "the file must be an object with format, cpu, .*, got"),
    (lambda x: x.update(format=2), "format must be 1, got 2"),
    (lambda x: x.update(torch=2), "torch must be a string, got 2"),
    (lambda x: x.update(threads=0), "threads must be a positive integer, got 0"),
    (lambda x: x.update(speeds={}), "speeds must be a list, got {}"),
    (lambda x: x["speeds"][1].pop("kernels"), r"speeds\[1\] must be an object with op, dtype, .*, got \['dtype'"),
    (lambda x: x["speeds"][1].update(op="conv"), r"speeds\[1\].op must be one of linear, .*, got 'conv'"),
    (lambda x: x["speeds"][1].update(dtype="int8"), r"speeds\[1\].dtype must be one of float32, .*, got 'int8'"),
    (lambda x: x["speeds"][1].update(size=["small"]), r"speeds\[1\].size must be one of small, large, got \['small'\]"),
    (lambda x: x["speeds"][1].update(gradients=1), r"speeds\[1\].gradients must be true or false, got 1"),
    (lambda x: x["speeds"][1].update(kernels=-1), r"speeds\[1\].kernels must be a number, 0 if not measured, got -1"),
    (lambda x: x["speeds"][1].update(prepacked="1"), r"speeds\[1\].prepacked must be a number, .*, got '1'"),
    (lambda x: x["speeds"].append(x["speeds"][0]), r"speeds\[6\] must be unique in its list"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message for _, message in WRONG])
def test_error_for_an_invalid_file_names_the_field(spoil, message):
    path = write()
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    again = "; write the file again with vit-triton tune --device cpu, or remove it"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"acme-avx-512.json: {message}.*{again}"):
            auto()


def test_description_of_the_table_in_use():
    assert speeds.describe(KIND) == f"{KIND}: no measured speeds; vit-triton tune --device cpu measures them"
    path = write()
    text = speeds.describe(KIND)
    assert text.startswith(f"{KIND}: speeds measured on 20") and text.endswith(f"1 thread, in {path}")
    speeds.write(path, dataclasses.replace(speeds.read(path), triton="1.0"))
    assert "\n  measured with triton 1.0, installed is 3." in speeds.describe(KIND)
    assert "shipped with vit_triton" in speeds.describe(AMD)


# --- what "auto" selects -----------------------------------------------------------------------------------


def test_auto_selects_by_operator_dtype_gradients_and_size():
    write()
    assert auto() == "triton" and auto(elements=LARGE) == "torch"
    assert auto(gradients=True) == "torch"  # 1.01 is within the noise
    assert auto("linear") == auto(dtype=BF16) == auto(dtype=torch.float64) == "torch"
    assert auto(elements=1, gradients=False) == "triton"
    x = torch.empty(2, 4)
    with torch.no_grad():
        assert backend.resolve_backend("auto", "mlp", x, elements=LARGE) == "torch"


def test_auto_selects_torch_where_the_kernels_do_not_run_compiled(monkeypatch):
    write()
    for reason in ("triton is not installed", ""):
        monkeypatch.setattr(backend, "not_compiled_reason", lambda reason=reason: reason)
        assert auto() == ("torch" if reason else "triton")


def test_prepacked_weights_have_their_own_speed():
    write()
    layer = nn.Linear(4, 4).eval()
    assert auto(elements=LARGE, weight=layer.weight) == "torch"
    vit_triton.prepack(layer)
    assert auto(elements=LARGE, weight=layer.weight) == "triton"
    assert auto(elements=LARGE, weight=layer.weight, gradients=True) == "triton"  # the speed of weights not prepacked
    vit_triton.unpack(layer)
    assert auto(elements=LARGE, weight=layer.weight) == "torch"


def resolved(monkeypatch, call):
    """The operators and numbers of elements for which ``call`` resolves the backend."""
    seen = []

    def resolve(name, op, x, norm_width=0, *, elements=None, weight=None, head_dim=0):
        seen.append((op, x.numel() if elements is None else elements, weight is not None))
        return "torch"

    monkeypatch.setattr(F, "resolve_backend", resolve)
    with torch.no_grad():
        call()
    monkeypatch.undo()
    return seen


def test_size_that_each_operator_reports(monkeypatch):
    """The elements of the image or the tokens; packed q, k and v count once."""
    x, weight = torch.randn(1, 4, 32), torch.randn(32, 32)
    image = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    values = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    for call, expected in [
        (lambda: F.attention_packed(torch.randn(1, 4, 3, 2, 16)), ("attention", 128, False)),
        (lambda: F.attention(*torch.randn(3, 1, 4, 2, 16)), ("attention", 128, False)),
        (lambda: F.linear(x, weight), ("linear", 128, True)),
        (lambda: F.mlp(x, weight, None, weight, None), ("mlp", 128, True)),
        (lambda: F.layer_norm(x, None, None), ("layer_norm", 128, False)),
        (lambda: F.layer_norm(x, None, None, residual=x), ("add_layer_norm", 128, False)),
        (lambda: F.patch_embed(image, torch.randn(32, 48), patch_size=4, **values), ("patch_embed", 384, True)),
    ]:
        assert resolved(monkeypatch, call) == [expected]


@COMPILED
@pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=f"no compiled code: {cpu.unsupported_reason()}")
def test_compiled_graphs_use_the_table_and_do_not_depend_on_a_dynamic_size(monkeypatch):
    """A dynamic size counts as large. It adds no guard, so there is one graph for all sizes."""
    write()
    x = torch.randn(8, 64)
    found = {}
    with torch.no_grad():
        for dynamic in (False, True):
            torch.compiler.reset()
            count = CompileCounterWithBackend("eager")
            function = torch.compile(
                lambda x: F.layer_norm(x, None, None), fullgraph=True, backend=count, dynamic=dynamic
            )
            for rows in (8, 9) if dynamic else (8,):
                torch.testing.assert_close(function(torch.randn(rows, 64)).shape, torch.Size((rows, 64)))
            (graph,) = count.graphs
            found[dynamic] = any("vit_triton" in str(node.target) for node in graph.graph.nodes)
    assert found == {False: True, True: False}

    class Norm(nn.Module):
        def forward(self, x):
            return F.layer_norm(x, None, None)

    with torch.no_grad():
        exported = torch.export.export(Norm(), (x,), dynamic_shapes=({0: Dim("rows", min=1, max=2**20)},))
    assert exported.module()(torch.randn(3, 64)).shape == (3, 64)


# --- the hint ----------------------------------------------------------------------------------------------

HINT = (
    f'vit_triton: backend "auto" selects PyTorch: the kernels have not been measured on this kind of CPU ({KIND}); '
    "vit-triton tune --device cpu measures them"
)


def test_hint_is_logged_once(caplog):
    for op in ("mlp", "mlp", "linear"):
        assert auto(op) == "torch"
    assert [(each.name, each.levelno, each.getMessage()) for each in caplog.records] == [
        ("vit_triton", logging.WARNING, HINT)
    ]


def test_no_hint_where_measuring_is_impossible(caplog, monkeypatch):
    auto(dtype=torch.float64)
    backend.resolve_backend("torch", "mlp", torch.empty(2))
    assert not backend._hinted
    monkeypatch.setattr(backend, "not_compiled_reason", lambda: "triton is not installed")
    auto()
    monkeypatch.setattr(backend, "not_compiled_reason", lambda: "")
    monkeypatch.setattr(backend, "_hinted", False)
    write()
    forget()
    auto("linear")
    assert not caplog.records


def test_accelerate_report_contains_the_hint():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    note = HINT.removeprefix("vit_triton: ").replace("PyTorch:", "PyTorch on cpu:")
    assert vit_triton.accelerate(encoder).notes == (note,)
    assert vit_triton.accelerate(encoder, "triton").notes == ()
    write()
    forget()
    assert vit_triton.accelerate(encoder).notes == ()


@COMPILED
@pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=f"no compiled code: {cpu.unsupported_reason()}")
def test_hint_is_on_stderr_and_not_a_warning(tmp_path):
    code = (
        "import torch, vit_triton.functional as F\n"
        "from vit_triton.cpu import features\n"
        f"features.kind = lambda: {KIND!r}\n"
        "for _ in range(2): F.layer_norm(torch.ones(2, 4), None, None)\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VIT_TRITON")}
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-W", "error::UserWarning", "-c", code],
        env=kept, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", HINT + "\n")


# --- measuring ---------------------------------------------------------------------------------------------


def test_cases_cover_all_operators_and_conditions():
    every = compare.cases([F32, BF16])
    assert len(set(every)) == len(every) == 52 and {case.op for case in every} == set(speeds.OPS)
    assert Key("encoder", F32, True, True) not in every


@pytest.mark.parametrize("op", speeds.OPS)
def test_inputs_are_small_and_large(monkeypatch, op):
    """The measured calls are in the class of their case."""
    for small in (True, False):
        call = compare.calls(Key(op, F32, False, small))["torch"]
        ((name, elements, _), *_) = resolved(monkeypatch, call)
        assert name == op and (elements <= speeds.SMALL_ELEMENTS) == small


@COMPILED
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("op", speeds.OPS)
def test_calls_of_a_case_have_equal_results(monkeypatch, own_gemm, op, gradients):
    if op == "encoder" and gradients:
        pytest.skip("not measured")
    monkeypatch.setattr(compare, "SMALL", 1)
    monkeypatch.setattr(compare, "IMAGE", 32)
    calls = compare.calls(Key(op, F32, gradients, True))
    assert set(calls) == {"torch", "triton"} | ({"prepacked"} if op in compare.PRODUCTS and not gradients else set())
    results = {name: measure.flat(call()) for name, call in calls.items()}
    for name in results:
        for ours, expected in zip(results[name], results["torch"], strict=True):
            assert measure.errors(ours, expected) < [1e-4]
    if "prepacked" in calls:
        from vit_triton import packing

        assert any(entry.copies for entry in packing.frozen.values())
        del calls
        assert not packing.frozen


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls of a case advance, by ``clock.cost`` seconds per call with backend "torch"."""
    clock = types.SimpleNamespace(now=0.0, cost=1e-3, made=0)

    def spend(seconds):
        def run():
            clock.now += seconds * clock.cost
            clock.made += 1

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    calls = {"torch": spend(1.0), "triton": spend(0.5), "prepacked": spend(0.25)}
    monkeypatch.setattr(compare, "calls", lambda case: calls if case.op == "mlp" else dict(list(calls.items())[:2]))
    return clock


def test_time_per_case_is_limited(clock):
    """A case takes its seconds, or the smallest number of rounds."""
    case = Key("linear", F32, False, True)
    for cost, limit in ((1e-6, 0.25), (1e-3, 0.25), (0.2, 0.3 * (compare.MIN_ROUNDS + 1.01))):
        clock.now, clock.made, clock.cost = 0.0, 0, cost
        ((key, speed),) = compare.compare([case], 0.1)
        assert key == case and speed == Speed(2.0) and clock.now <= limit
    assert clock.made == 2 * (compare.MIN_ROUNDS + 1)


def test_command_writes_a_table_that_auto_reads(clock, capsys, home):
    assert auto("linear", elements=LARGE) == "torch"
    assert main(["tune", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    path = home / "acme-avx-512.json"
    assert out.startswith(f"{KIND}, 1 thread\n") and f"written: {path}" in out and f"1 thread, in {path}" in out
    assert f"\nin use: {KIND}: speeds measured" in out and "to use it" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("mlp forward, bfloat16, large")]
    assert line.split()[-4:] == ["1.00", "ms", "2.00x", "4.00x"]
    table = speeds.read(path)
    assert list(table.speeds) == compare.cases([F32, BF16]) and table.cpu == KIND
    assert table.speeds["mlp", F32, False, True] == Speed(2.0, 4.0)
    forget()
    assert auto("linear", elements=LARGE) == "triton"
    clock.cost = 1e-4
    assert main(["tune", "--dtype", "float16", "--seconds", "0"]) == 0  # a CPU without --device, since there is no GPU
    assert len(speeds.read(path).speeds) == 52 + 26  # the other dtypes are kept


def test_command_shows_how_another_file_is_used(clock, capsys, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    words = ["tune", "--device", "cpu", "--dtype", "float32", "--out", str(path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"\nto use it, set VIT_TRITON_TUNED={path}\nin use: {KIND}: no measured speeds" in out
    monkeypatch.setenv("VIT_TRITON_TUNED", str(path))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "to use it" not in out and f"\nin use: {KIND}: speeds measured" in out and f"in {path}" in out


def test_interrupted_command_writes_its_results(home, capsys):
    path = home / "table.json"
    first, second = list(SPEEDS.items())[:2]
    compare.write(path, KIND, [first], 1)

    def stopped():
        yield second[0], Speed(3.0)
        raise KeyboardInterrupt

    assert not compare.write(path, KIND, stopped(), 2)
    assert "stopped" in capsys.readouterr().out
    assert speeds.read(path).speeds == {first[0]: first[1], second[0]: Speed(3.0)}
    speeds.write(path, dataclasses.replace(speeds.read(path), torch="1.0"))
    compare.write(path, KIND, [second], 1)  # cases of another version are dropped
    assert speeds.read(path).speeds == dict([second])


def test_command_without_compiled_kernels_reports_the_reason(capsys, monkeypatch, home):
    monkeypatch.setattr(backend, "not_compiled_reason", lambda: "this CPU lacks avx2")
    assert main(["tune", "--device", "cpu"]) == 2 and not home.exists()
    assert "tune: --device cpu requires compiled kernels, but this CPU lacks avx2" in capsys.readouterr().err
