"""Backend selection (argument, use_backend, environment, "auto"), and the Triton driver for CPU tensors."""

import os
import subprocess
import sys

import pytest
import torch

import vit_triton
from vit_triton import backend, cpu
from vit_triton import functional as F

VARIABLE = "VIT_TRITON_BACKEND"
X = torch.zeros(2, 4)


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    monkeypatch.setattr(backend, "_default", None)
    monkeypatch.setattr(backend, "_cpu_table", lambda: None)  # tests/test_speeds.py tests the tables
    monkeypatch.delenv(VARIABLE, raising=False)


def resolve(name=None, x=X):
    return backend.resolve_backend(name, "no op that was measured", x)


def test_auto_selects_torch_on_a_cpu():
    assert resolve() == resolve("auto") == "torch"


def test_auto_selects_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "torch_reason", lambda device: "")  # tests/test_gpu_defaults.py tests the reasons

    class OnGpu:
        device = torch.device("cuda")
        dtype = torch.bfloat16

    class Double(OnGpu):
        dtype = torch.float64

    assert resolve("auto", OnGpu) == "triton"
    assert resolve("auto", Double) == "torch"


def test_environment_variable_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    assert resolve() == "triton"
    monkeypatch.setenv(VARIABLE, "torch")
    assert resolve() == "torch"


def test_unknown_name_in_the_environment_variable_raises(monkeypatch):
    monkeypatch.setenv(VARIABLE, "trition")
    with pytest.raises(ValueError, match="VIT_TRITON_BACKEND must be one of 'triton', 'torch', 'auto', got 'trition'"):
        resolve()
    assert resolve("torch") == "torch"


def test_precedence_of_argument_use_backend_and_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    vit_triton.use_backend("triton")
    assert resolve() == "triton"
    assert resolve("torch") == "torch"
    assert resolve("auto") == "torch"


def test_use_backend_nests_and_ends_on_an_error():
    with vit_triton.use_backend("triton"):
        assert resolve() == "triton"
        with pytest.raises(KeyError), vit_triton.use_backend("torch"):
            assert resolve() == "torch"
            raise KeyError
        assert resolve() == "triton"
        with pytest.raises(ValueError, match="name must be one of .*, got 'gpu'"):
            vit_triton.use_backend("gpu")
        assert resolve() == "triton"
    assert resolve() == "torch"


def test_backend_of_a_model_overrides_the_default():
    layer = vit_triton.modules.Linear(4, 4)
    seen = []

    class RecordCalls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.namespace == "vit_triton")
            return function(*args, **(kwargs or {}))

    def kernels_ran():
        seen.clear()
        with RecordCalls():
            layer(X)
        return any(seen)

    assert not kernels_ran()
    with vit_triton.use_backend("triton"):
        assert kernels_ran()
        layer.backend = "torch"
        assert not kernels_ran()


R = torch.randn
WIDE_HEADS = {  # head sizes above 256
    "attention": lambda backend: F.attention(*R(3, 1, 4, 2, 257), backend=backend),
    "attention_packed": lambda backend: F.attention_packed(R(1, 4, 3, 1, 300), causal=True, backend=backend),
    "attention_varlen": lambda backend: F.attention_varlen(
        *R(3, 5, 1, 257), torch.tensor([0, 2, 5], dtype=torch.int32), 3, backend=backend
    ),
    "window_attention": lambda backend: F.window_attention(
        R(1, 4, 4, 3, 1, 257), R(1, 4, 4), window=(2, 2), shift=(1, 1), backend=backend
    ),
    "linear": lambda backend: F.linear(
        R(1, 4, 8), R(3 * 258, 8), rope=(R(4, 129), R(4, 129)), rope_heads=1, backend=backend
    ),
    "encoder": lambda backend: F.encoder(
        R(1, 4, 8),
        [
            F.Block(
                (None, None, 1e-5), R(771, 8), None, R(8, 257), None, (None, None, 1e-5), R(8, 8), None, R(8, 8), None
            )
        ],
        heads=1,
        backend=backend,
    ),
    "ViT": lambda backend: vit_triton.ViT(
        image_size=8, patch_size=4, num_classes=3, dim=16, depth=2, heads=2, mlp_dim=24, dim_head=300, backend=backend
    )(R(1, 3, 8, 8)),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("case", WIDE_HEADS)
def test_head_sizes_above_256_run_in_torch_and_raise_in_triton(case, gradients, monkeypatch):
    call = WIDE_HEADS[case]
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        expected = call("torch")
        with pytest.raises(ValueError, match='supports head sizes of 1 to 256, got [0-9]+; use backend="torch"'):
            call("triton")
        monkeypatch.setattr(backend, "_faster_on_cpu", lambda *arguments: True)  # "auto" prefers the kernels
        torch.manual_seed(0)
        torch.testing.assert_close(call("auto"), expected)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_float64_runs_in_torch_and_raises_in_triton(name):
    if name == "torch":
        assert F.layer_norm(X.double(), None, None, backend=name).dtype == torch.float64
    else:
        with pytest.raises(TypeError, match='x is torch.float64: .* use backend="torch"'):
            F.layer_norm(X.double(), None, None, backend=name)


# --- in a fresh Python -------------------------------------------------------------------------------------

COMPILED = pytest.mark.skipif(
    cpu.unsupported_reason() is not None, reason=f"no compiled CPU code here: {cpu.unsupported_reason()}"
)
START = """
import os, warnings
import torch, vit_triton
from vit_triton import functional as F
norm = lambda: F.layer_norm(torch.ones(2, 4), None, None, backend="triton")

def error_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error")
"""


def python(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VIT_TRITON_EMULATE", VARIABLE)}
    result = subprocess.run(
        [sys.executable, "-c", START + code], env=kept | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


@COMPILED
def test_cpu_kernels_are_compiled_without_a_warning():
    python("""
from vit_triton import backend, cpu
warnings.simplefilter("error")
assert backend.cpu_mode() == "compiled"
assert torch.equal(norm(), torch.zeros(2, 4))
assert backend.cpu_mode() == "compiled"
""")


def test_an_explicit_triton_never_falls_back():
    python("""
import platform
platform.machine = lambda: "riscv64"
message = error_of(norm)
assert "CPU tensors" in message and 'backend="torch"' in message and "TRITON_INTERPRET=1" in message, message
assert "x86-64 Linux, this is riscv64" in message, message
model = vit_triton.ViT(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=1, mlp_dim=8, backend="triton")
assert error_of(lambda: model(torch.zeros(1, 3, 8, 8))) == message
model.backend = "auto"
assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
""")


@pytest.mark.parametrize("before", ["0", "1"])
def test_changing_triton_interpret_after_the_import_raises(before):
    python(
        f"""
import triton
os.environ["TRITON_INTERPRET"] = {"0" if before == "1" else "1"!r}
assert "TRITON_INTERPRET was changed after Triton was imported" in error_of(norm)
""",
        TRITON_INTERPRET=before,
    )


def test_the_interpreter_warns_once():
    python(
        """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    norm()
    norm()
ours = [w for w in caught if "vit_triton" in str(w.message)]
assert len(ours) == 1, ours
assert ours[0].category is RuntimeWarning and "hundreds of times slower" in str(ours[0].message)
""",
        TRITON_INTERPRET="1",
    )


def test_active_driver_for_the_cpu_is_used_and_kept():
    python("""
import triton
from triton.runtime import driver
from vit_triton import backend, cpu

class Emulator:
    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 80, 32)

class Gpu:
    def get_active_torch_device(self):
        return torch.device("cuda", 0)

emulator = Emulator()
driver.set_active(emulator)
assert backend.cpu_mode() == "driver"
assert driver.active is emulator
""")


@COMPILED
def test_gpu_driver_is_restored_after_a_cpu_launch():
    python("""
from triton.runtime import driver

class Gpu:
    def get_active_torch_device(self):
        return torch.device("cuda", 0)

gpu = Gpu()
driver.set_active(gpu)
assert torch.equal(norm(), torch.zeros(2, 4))
assert driver.active is gpu
""")


def test_import_does_not_import_triton():
    # in a fresh process: here, other tests have already imported Triton
    python("import sys\nassert 'triton' not in sys.modules\n")
