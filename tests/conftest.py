"""Select how the tests run the kernels.

By default, kernels are compiled for this CPU. Triton's interpreter runs them if TRITON_INTERPRET=1 is set, or if the
CPU compiler does not support this CPU or this Triton; then only tests marked "compiled" run kernels, and the others are
skipped at their first launch, because models take hours in the interpreter. With VIT_TRITON_EMULATE=1, the emulator
``ptxemu`` runs the code that Triton compiles for sm_80, with race and bounds checks. Triton reads the environment on
import, so this module sets it before other imports.
"""

import ctypes
import dataclasses
import importlib.metadata
import os
import tempfile
from pathlib import Path

from vit_triton.cpu import TESTED_TRITON, features  # imports no Triton

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
EMULATOR = not INTERPRETER and os.environ.get("VIT_TRITON_EMULATE") == "1"


def compiles_for_this_cpu() -> bool:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    tested = tuple(f"{version}." for version in TESTED_TRITON)
    return triton.startswith(tested) and set(features.REQUIRED) <= set(features.detect())


_NO_CPU_TARGET = "VIT_TRITON_TESTS_NO_CPU_TARGET"  # xdist's workers inherit TRITON_INTERPRET and this variable
NO_CPU_TARGET = _NO_CPU_TARGET in os.environ or not (INTERPRETER or EMULATOR or compiles_for_this_cpu())
if NO_CPU_TARGET:
    os.environ[_NO_CPU_TARGET] = "1"
    os.environ["TRITON_INTERPRET"], INTERPRETER = "1", True

# one cache per process: Inductor's cache keys omit operator schemas, so entries would survive a schema change
_inductor = tempfile.TemporaryDirectory(prefix="vit_triton_inductor_", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor.name

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# under the emulator, every new head size or dtype costs a compilation of seconds
EXAMPLES = {"interpreter": 10, "emulator": 6, "cpu": 40}
MODE = "interpreter" if INTERPRETER else "emulator" if EMULATOR else "cpu"
hypothesis.settings.register_profile(MODE, deadline=None, derandomize=True, max_examples=EXAMPLES[MODE], database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=50 * EXAMPLES[MODE], database=None)
hypothesis.settings.load_profile(MODE)  # --hypothesis-profile=thorough selects the larger profile

torch.set_num_threads(1)  # the tests run one process per core


@pytest.fixture(scope="session", autouse=True)
def kernels_run():
    """Make backend "triton" work on CPU tensors."""
    if not EMULATOR:
        yield MODE
        return
    import ptxemu

    with ptxemu.emulate(race="error"):
        yield MODE


@pytest.fixture(autouse=True)
def skip_slow_kernels(request, monkeypatch):
    if NO_CPU_TARGET and request.node.get_closest_marker("compiled") is None:
        from vit_triton.kernels import interpreter

        def skip() -> None:
            pytest.skip("kernels are not compiled for the CPU here; the interpreter runs the op tests only")

        monkeypatch.setattr(interpreter, "patch", skip)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill ``torch.empty`` and the scratch memory of compiled CPU code with NaN, which exposes unwritten elements."""
    if MODE == "cpu":
        from vit_triton.cpu import driver

        take = driver._Scratch.take

        def poisoned(self, size):
            piece = take(self, size)
            ctypes.memset(piece[1], 0xFF, size)
            return piece

        monkeypatch.setattr(driver._Scratch, "take", poisoned)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def default_backend():
    """Fail if a test module leaves a default backend set."""
    from vit_triton import backend

    yield
    assert backend._default is None, f"use_backend({backend._default!r}) is still set"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def forget_recordings():
    """Clear the recorded launches, which used other tiles."""
    if MODE == "cpu":
        from vit_triton.kernels import replay

        replay._recordings.clear()


def launcher_modules():
    """The modules with kernels and launchers; they import pickers from the config modules."""
    from vit_triton.kernels import launch

    folder = Path(launch.__file__).parent
    names = [path.relative_to(folder).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    return [importlib.import_module(".".join(("vit_triton.kernels", *name))) for name in names if name[-1] != "config"]


@pytest.fixture(scope="module")
def own_gemm():
    """Use our GEMM kernels even where the target prefers the vendor's GEMM."""
    from vit_triton.kernels.picker import override_choice
    from vit_triton.kernels.target import Target

    forget_recordings()
    with pytest.MonkeyPatch.context() as patch, override_choice(lambda picker, args: picker.default(*args)):
        patch.setattr(Target, "prefers_vendor_gemm", lambda self, dtype: False)
        yield
    forget_recordings()


@pytest.fixture
def small_tiles(monkeypatch, request):
    """Several tiles in every direction; by default, one of the interpreter's tiles covers most tests' inputs."""
    from vit_triton.kernels.attention.config import AttentionConfig
    from vit_triton.kernels.linear.config import GemmConfig

    forget_recordings()
    request.addfinalizer(forget_recordings)
    for module in launcher_modules():
        if module.__name__.endswith("sum_parts"):
            continue
        for name in [name for name in vars(module) if name.startswith("pick_")]:
            if name == "pick_rotary":
                config = None
            elif "attention" in name:
                config = AttentionConfig(32, 16, 4, 1)
            else:
                config = GemmConfig(32, 16, 16, 4, 1, group=2, split=3 if "weight" in name else 1)
            if "norm" not in name and config is not None:
                monkeypatch.setattr(module, name, lambda *args, config=config: config)
                continue
            pick, partials = getattr(module, name), {} if config is None else {"partials": 3}

            def small(*args, pick=pick, partials=partials, **options):
                return dataclasses.replace(pick(*args, **options), block_m=2, **partials)

            monkeypatch.setattr(module, name, small)


@pytest.fixture
def virtual_memory(poisoned_memory):
    """For tensors that span gigabytes of addresses: disable poisoning and race checks, which touch every page."""
    torch.use_deterministic_algorithms(False)
    if not EMULATOR:
        yield
        return
    import ptxemu

    with ptxemu.emulate():
        yield
