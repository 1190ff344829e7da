"""The backend that "auto" selects on each GPU, and its explanation. Device queries of PyTorch are mocked."""

import types
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vit_triton
from vit_triton import backend, functional, ops
from vit_triton.cli import info
from vit_triton.kernels import device, launch, tuned
from vit_triton.kernels.linear import expected
from vit_triton.kernels.target import INTERPRETING

T4, MI300X, ARC = "Tesla T4", "AMD Instinct MI300X", "Intel(R) Arc(TM) B580 Graphics"
CUDA_0, CUDA_1, XPU_0 = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("xpu:0")
T4_REASON = (
    f"Triton compiles GEMMs for {T4} (compute capability 7.5) without tensor cores; run vit-triton tune on this GPU to "
    'make "auto" select the kernels'
)


def forget():
    backend._torch_reason.cache_clear()
    device.target_of_gpu.cache_clear()
    backend._warned_gpus.clear()


@pytest.fixture(autouse=True)
def gpus(monkeypatch, tmp_path):
    """Add a GPU: its kind, "cuda" or "xpu", and its properties. Tables of tuned tiles are in the test's own folder."""
    found = {"cuda": [], "xpu": []}
    for kind, devices in found.items():
        module = getattr(torch, kind)
        monkeypatch.setattr(module, "device_count", lambda devices=devices: len(devices))
        monkeypatch.setattr(
            module, "get_device_properties", lambda which, devices=devices: devices[torch.device(which).index or 0]
        )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "_default", None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    forget()
    yield lambda kind, **properties: found[kind].append(
        types.SimpleNamespace(**{"multi_processor_count": 108, **properties})
    )
    forget()


@pytest.fixture
def t4(gpus):
    gpus("cuda", name=T4, major=7, minor=5)


@pytest.fixture
def mi300x(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1.2")
    gpus("cuda", name=MI300X, major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")


@pytest.fixture
def arc(gpus):
    gpus("xpu", name=ARC)


def write_table(name, architecture, path=None):
    path = path or tuned.default_path(name)
    tuned.write(path, tuned.new_table(name, architecture, []))
    return path


def auto(on):
    with FakeTensorMode():
        x = torch.empty(2, 4, device=on)
    taken, reason = backend.resolve_backend("auto", "linear", x), backend.auto_reason("linear", x)
    assert (taken == "triton") == (backend.torch_reason(on) == "") and reason == (
        backend.torch_reason(on) or "the kernels support this GPU"
    )
    return taken, reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_auto_selects_triton_on_nvidia_gpus_with_supported_tensor_cores(gpus, capability):
    gpus("cuda", name="a GPU", major=capability[0], minor=capability[1])
    assert auto(CUDA_0)[0] == "triton"


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 2)])
def test_auto_selects_torch_on_older_nvidia_gpus(gpus, capability):
    gpus("cuda", name="an old GPU", major=capability[0], minor=capability[1])
    taken, reason = auto(CUDA_0)
    assert taken == "torch" and "GEMMs for an old GPU (compute capability {}.{})".format(*capability) in reason


def test_auto_selects_for_each_gpu_separately(gpus, t4):
    gpus("cuda", name="NVIDIA A100", major=8, minor=0)
    assert [auto(each)[0] for each in (CUDA_0, CUDA_1, CUDA_0)] == ["torch", "triton", "torch"]
    assert auto(CUDA_0) == ("torch", T4_REASON)


@pytest.mark.parametrize("on", [CUDA_0, XPU_0], ids=str)
def test_auto_selects_triton_for_fake_tensors_of_an_absent_gpu(on):
    assert auto(on)[0] == "triton"


GPUS = [("t4", CUDA_0, T4, "sm_75"), ("mi300x", CUDA_0, MI300X, "gfx942"), ("arc", XPU_0, ARC, "xpu")]


@pytest.mark.parametrize(("gpu", "on", "name", "architecture"), GPUS, ids=[gpu[0] for gpu in GPUS])
def test_auto_selects_triton_only_with_a_tuned_table_of_the_device(request, tmp_path, gpu, on, name, architecture):
    request.getfixturevalue(gpu)
    taken, reason = auto(on)
    assert taken == "torch" and name in reason and ("vit-triton tune" in reason) == (gpu != "arc")
    forget()
    path = write_table(name, architecture)
    assert auto(on)[0] == "triton"
    forget()
    for other in ((f"{name} again", architecture), (name, "sm_999")):
        write_table(*other, path)
        assert auto(on) == ("torch", reason)
        forget()


def test_damaged_or_missing_table_raises_only_where_it_is_read(gpus, t4, monkeypatch, tmp_path):
    gpus("cuda", name="NVIDIA A100", major=8, minor=0)
    (tmp_path / "table.json").write_text("{")
    for name, error in (("table.json", ValueError), ("missing.json", FileNotFoundError)):
        monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path / name))
        for _ in range(2):
            with pytest.raises(error, match=name):
                auto(CUDA_0)
            with pytest.raises(error, match=name):
                vit_triton.accelerate(on_a_gpu())
        assert auto(CUDA_1)[0] == "triton"


def explicit(on):
    with FakeTensorMode():
        x = torch.empty(2, 4, device=on)
    return backend.resolve_backend(None, "linear", x)


def test_explicit_triton_warns_once_per_gpu(gpus, t4):
    gpus("cuda", name="NVIDIA A100", major=8, minor=0)
    gpus("cuda", name=T4, major=7, minor=5)
    with warnings.catch_warnings(record=True) as caught, vit_triton.use_backend("triton"):
        warnings.simplefilter("always")
        for i in (0, 1, 0, 2, 2):
            assert explicit(f"cuda:{i}") == "triton"
    for i, each in zip((0, 2), caught, strict=True):
        assert each.category is RuntimeWarning and str(each.message) == (
            f'vit_triton: on cuda:{i} backend "auto" selects PyTorch, which may be faster than backend="triton": '
            f"{T4_REASON}"
        )


def test_explicit_triton_with_a_tuned_table_does_not_warn(t4):
    write_table(T4, "sm_75")
    with vit_triton.use_backend("triton"):  # the tests turn warnings into errors
        assert explicit(CUDA_0) == "triton"


def test_compiled_code_has_the_selection_as_a_constant(gpus, t4):
    gpus("cuda", name="NVIDIA A100", major=8, minor=0)

    def both(old, new):
        results = []
        for x in (old, new):
            taken = [backend.resolve_backend(name, "linear", x) for name in ("auto", "triton")]
            results.append(x + 1 if taken == ["torch", "triton"] else x * 2)
        return tuple(results)

    with FakeTensorMode():
        old, new = (torch.empty(2, device=each) for each in (CUDA_0, CUDA_1))
    with pytest.warns(RuntimeWarning, match="on cuda:0 backend"):
        graph = torch._dynamo.export(both)(old, new).graph_module.graph
    assert [node.target.__name__ for node in graph.nodes if node.op == "call_function"] == ["add", "mul"]


def test_tune_command_does_not_warn_about_a_missing_table(t4, monkeypatch, capsys):
    from vit_triton.cli import main
    from vit_triton.tuning import tune

    monkeypatch.setattr("vit_triton.kernels.target.INTERPRETING", False)
    monkeypatch.setattr(device, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    selected = []

    def cases(shape, dtype, on, dropout):
        with vit_triton.use_backend("triton"):  # the tests turn warnings into errors
            selected.append(explicit(CUDA_0))
        return []

    monkeypatch.setattr(tune, "cases", cases)
    assert main(["tune"]) == 0 and selected == ["triton"]


# --- where the reason appears ------------------------------------------------------------------------------


def on_a_gpu(on=CUDA_0):
    with FakeTensorMode():
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, device=on)


def test_accelerate_report_begins_with_the_reason(t4):
    report = vit_triton.accelerate(on_a_gpu())
    note = f'backend "auto" selects PyTorch on cuda:0: {T4_REASON}'
    assert report.notes == (note,) and report.replaced
    assert str(report).splitlines()[0] == note and str(report).splitlines()[1].startswith("module")
    assert vit_triton.accelerate(on_a_gpu(), None).notes == (note,)
    with vit_triton.use_backend("torch"):
        assert vit_triton.accelerate(on_a_gpu(), None).notes == ()


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_accelerate_report_has_no_note_for_an_explicit_backend(t4, name):
    assert vit_triton.accelerate(on_a_gpu(), name).notes == ()


def test_accelerate_report_has_no_note_where_auto_selects_triton(t4):
    write_table(T4, "sm_75")
    report = vit_triton.accelerate(on_a_gpu("cuda:0"))
    assert report.notes == () and str(report).startswith("module")


@pytest.mark.parametrize(("gpu", "on", "name", "architecture"), GPUS, ids=[gpu[0] for gpu in GPUS])
def test_info_shows_the_reasons(request, capsys, monkeypatch, gpu, on, name, architecture):
    pytest.importorskip("rich")
    from vit_triton.cli import info, main

    request.getfixturevalue(gpu)
    getattr(torch, on.type).get_device_properties(on).total_memory = 16 * 2**30
    monkeypatch.setenv("COLUMNS", "500")
    with FakeTensorMode():
        assert info.choices(str(on)) == f'"auto" on {on} selects torch: {backend.torch_reason(on)}'
        assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f'"auto" on {on} selects torch: {backend.torch_reason(on)}' in out and out.count(name) == 2


# --- Intel -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETING, reason="every target is the interpreter's")
def test_target_of_an_intel_gpu(arc):
    target = device.target_of(XPU_0)
    assert (target.name, target.family, target.device, target.tuned) == ("xpu", "gfx", ARC, None)
    assert target.is_gpu and not target.is_nvidia and not target.has_tf32


def test_launch_runs_on_the_device_of_its_tensor(monkeypatch):
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "device", lambda which, kind=kind: (kind, which))
    with FakeTensorMode():
        for on in (CUDA_1, XPU_0):
            assert launch.guard(torch.empty(2, device=on)) == (on.type, on)


@pytest.mark.parametrize(("name", "fastest"), [("auto", True), (None, True), ("triton", False)])
def test_only_auto_on_a_gpu_uses_the_fastest_products(name, fastest):
    with FakeTensorMode():
        x, on_cpu = torch.empty(2, 4, device=CUDA_0), torch.empty(2, 4)
    assert backend.fastest_products(name, x) == fastest and not backend.fastest_products(name, on_cpu)


@pytest.mark.parametrize("fastest", [True, False])
def test_operators_receive_the_choice_of_products(monkeypatch, fastest):
    """Forward and backward, on a CPU, where the choice has no effect."""
    monkeypatch.setattr(functional, "fastest_products", lambda backend, x: fastest)
    received = {}

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op._schema.name.removeprefix("vit_triton::")
            if name in ops._PRODUCTS:
                # the dispatcher omits arguments at the end that have their default values
                received.setdefault(name, set()).add(len(args) > ops._PRODUCTS[name] and args[-1])
            return op(*args, **(kwargs or {}))

    sizes = dict(image_size=16, patch_size=8, num_classes=3, dim=32, depth=1, heads=2, mlp_dim=64)
    model = vit_triton.ViT(**sizes, backend="triton")
    x, weight, table = torch.randn(1, 4, 32), torch.randn(96, 32, requires_grad=True), torch.randn(4, 8)
    with Operators():
        model(torch.randn(1, 3, 16, 16)).sum().backward()
        functional.linear(x, weight, rope=(table, table), rope_heads=2, backend="triton").sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(1, 3, 16, 16))
    assert received == {name: {fastest} for name in ops._PRODUCTS}


def test_blocks_in_inference_keep_the_backend(monkeypatch):
    """Of a model and of an accelerated model: "auto" decides the products of their blocks too."""
    timm = pytest.importorskip("timm")
    backends = []
    monkeypatch.setattr(functional, "fastest_products", lambda backend, x: backends.append(backend) or False)
    sizes = dict(img_size=16, patch_size=8, num_classes=3, embed_dim=32, depth=2, num_heads=2)
    theirs = timm.models.VisionTransformer(**sizes)
    ours = vit_triton.ViT(image_size=16, patch_size=8, num_classes=3, dim=32, depth=2, heads=2, mlp_dim=64)
    encoded = []
    encoder = functional.encoder
    monkeypatch.setattr(functional, "encoder", lambda *args, **options: encoded.append(1) or encoder(*args, **options))
    with vit_triton.use_backend("triton"), torch.no_grad():
        vit_triton.accelerate(theirs)
        for model in (ours, theirs):
            model.eval()(torch.randn(1, 3, 16, 16))
    assert len(encoded) == 2 and set(backends) == {None}


def test_info_shows_the_products_of_a_gpu(gpus):
    gpus("cuda", name="NVIDIA L40S", major=8, minor=9)
    gpus("cuda", name="NVIDIA GeForce RTX 5090", major=12, minor=0)
    table = info.products("cuda:0")
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    ours, vendor = expected.EXPECTED["sm_89", "forward", "elementwise"]
    assert ("forward", "elementwise", f"{ours}", f"{vendor}", "ours") in cells
    assert {row[-1] for row in cells} == {"ours", "vendor's"}
    assert info.products("cuda:1").endswith("the vendor's GEMM: no times were computed for sm_120")
