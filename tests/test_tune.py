"""Tuned tables: which file is used for which device, errors about invalid files, measuring and writing."""

import dataclasses
import io
import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import forget_recordings

import vit_triton
from benchmarks import gpu_path
from vit_triton.cli import main
from vit_triton.cli.options import TUNE_MODELS
from vit_triton.cpu.driver import use_cpu_driver
from vit_triton.kernels import device, tuned
from vit_triton.kernels import picker as pickers
from vit_triton.kernels.attention.config import AttentionConfig
from vit_triton.kernels.device import target_of
from vit_triton.kernels.linear import forward
from vit_triton.kernels.linear.config import Epilogue, GemmConfig, VendorGemm, pick_linear_fwd
from vit_triton.kernels.norm.config import LayerNormConfig, pick_layer_norm
from vit_triton.kernels.picker import PICKERS, override_choice
from vit_triton.kernels.target import Target, target_named
from vit_triton.tuning import tune
from vit_triton.tuning.progress import progress
from vit_triton.tuning.shapes import CLASSES, Shape
from vit_triton.tuning.sizes import Size

TINY = Shape("tiny", 2, 16, 5, Size(32, 1, 2, 128, patch=8))
H100, SM = "NVIDIA H100 80GB HBM3", "sm_90"
GEMM = dict(n=768, k=3072, dtype=torch.bfloat16, precision="ieee", epilogue=Epilogue.NONE)
TILE = GemmConfig(128, 256, 64, 8, 3)
TIMED = [
    tuned.Timed("pick_linear_fwd", GEMM, VendorGemm(), [(TILE, 0.5), (VendorGemm(), 0.25)]),
    tuned.Timed("pick_linear_fwd", GEMM | dict(epilogue=Epilogue.DROPOUT), TILE, [(TILE, 0.5)]),
    tuned.Timed("pick_layer_norm", dict(width=768), LayerNormConfig(8, 1024, 8), []),
]


@pytest.fixture(autouse=True)
def own_gemm_by_default(monkeypatch):
    """On Intel CPUs, the default is the vendor's GEMM."""
    monkeypatch.setattr(Target, "prefers_vendor_gemm", lambda self, dtype: False)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE, raising=False)
    return tmp_path / "vit_triton" / "tuned"


@pytest.fixture
def gpus(monkeypatch):
    """Simulated GPUs: a list of (name, major, minor) by device index."""
    devices = []

    def properties(device):
        name, major, minor = devices[device.index]
        return type("Properties", (), dict(name=name, major=major, minor=minor, multi_processor_count=108))

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device, "INTERPRETING", False)
    device.target_of_gpu.cache_clear()
    yield devices
    device.target_of_gpu.cache_clear()


def picked(name, epilogue=Epilogue.NONE, m=64 * 197):
    return pick_linear_fwd(m, 768, 3072, torch.bfloat16, target_of(torch.device(name)), "ieee", epilogue)


def computed(name, epilogue=Epilogue.NONE):
    target = target_named(name)
    return PICKERS["pick_linear_fwd"].default(64 * 197, 768, 3072, torch.bfloat16, target, "ieee", epilogue)


def test_table_can_be_written_and_read(tmp_path):
    path = tmp_path / "some" / "folder" / "file.json"
    table = tuned.new_table(H100, SM, TIMED)
    tuned.write(path, table)
    assert tuned.read(path) == table
    tuned.write(path, dataclasses.replace(table, timed=TIMED[:1]))
    assert tuned.read(path).timed == TIMED[:1] and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("arch", ["sm_80", SM, "sm_100", "gfx942"])
@pytest.mark.parametrize("name", PICKERS)
def test_every_candidate_can_be_written_and_read(tmp_path, name, arch):
    """Candidates are distinct, and the default is the first."""
    picker = PICKERS[name]
    sizes = [197, 768, 80, 3072], [1, 16, 64, 588], [577, 577, 256, 10]
    timed = []
    for (a, b, c, d), dtype in itertools.product(sizes, [torch.float32, torch.float16, torch.bfloat16]):
        known = dict(m=8 * 197, n_q=a, n_k=a, head_dim=c, width=b, n_parts=a, n=b, k=d, dim=b, patch_dim=d, dtype=dtype)
        known |= dict(target=target_named(arch), precision="ieee", epilogue=Epilogue.BRANCH, dropout=False)
        args = tuple(known[each] for each in picker.names)
        candidates = picker.candidates(args)
        assert candidates[0] == picker.default(*args) and len(set(candidates)) == len(candidates) > 1
        arguments = {each: known[each] for each in picker.arguments}
        timed.append(tuned.Timed(name, arguments, candidates[-1], [(each, 1.0) for each in candidates]))
    timed = list({each.key: each for each in timed}.values())
    tuned.write(tmp_path / "file.json", tuned.new_table(H100, arch, timed))
    assert tuned.read(tmp_path / "file.json").timed == timed


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    tuned.write(path, tuned.new_table(H100, SM, TIMED))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        tuned.write(path, tuned.new_table(H100, SM, [dataclasses.replace(TIMED[0], arguments={"n": object()})]))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tuned_choice_applies_to_its_device_only(home, gpus):
    gpus += [(H100, 9, 0), ("NVIDIA H200", 9, 0), (H100, 8, 0)]
    tuned.write(tuned.default_path(H100), tuned.new_table(H100, SM, TIMED))
    assert [path.name for path in home.iterdir()] == ["nvidia-h100-80gb-hbm3.json"]
    for m in (64 * 197, 128 * 197):
        assert picked("cuda:0", m=m) == VendorGemm() and picked("cuda:0", Epilogue.DROPOUT, m=m) == TILE
        assert picked("cuda:1", m=m) == computed(SM) and picked("cuda:2", m=m) == computed("sm_80")
    assert picked("cuda:0", Epilogue.ELEMENTWISE) == computed(SM, Epilogue.ELEMENTWISE)
    assert pick_layer_norm(768, target_of(torch.device("cuda:0"))) == LayerNormConfig(8, 1024, 8)
    assert pick_layer_norm(768, target_named(SM)) != LayerNormConfig(8, 1024, 8)
    target = target_of(torch.device("cuda:0"))
    assert (target.name, target.device) == (SM, H100)
    with use_cpu_driver():
        assert target_of(torch.device("cpu")).tuned is None


def test_devices_of_one_architecture_have_separate_choices(home, gpus):
    gpus += [(H100, 9, 0), ("NVIDIA H200", 9, 0)]
    tuned.write(tuned.default_path(H100), tuned.new_table(H100, SM, TIMED))
    other = [dataclasses.replace(TIMED[0], config=GemmConfig(64, 64, 64, 4, 3))]
    tuned.write(tuned.default_path("NVIDIA H200"), tuned.new_table("NVIDIA H200", SM, other))
    assert [picked(f"cuda:{i}") for i in (0, 1, 0, 1)] == [VendorGemm(), GemmConfig(64, 64, 64, 4, 3)] * 2


def test_environment_variable_selects_another_file_or_none(home, gpus, monkeypatch, tmp_path):
    gpus += [(H100, 9, 0)]
    tuned.write(tuned.default_path(H100), tuned.new_table(H100, SM, TIMED))
    mine = dataclasses.replace(TIMED[0], config=GemmConfig(64, 64, 64, 4, 3))
    tuned.write(tmp_path / "mine.json", tuned.new_table(H100, SM, [mine]))
    for name, expected in ((str(tmp_path / "mine.json"), mine.config), ("", computed(SM))):
        monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, name)
        device.target_of_gpu.cache_clear()
        assert picked("cuda:0") == expected
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path / "missing.json"))
    device.target_of_gpu.cache_clear()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="VIT_TRITON_TUNED must name a file .*, got .*missing.json"):
            picked("cuda:0")


def test_default_folder_is_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert tuned.default_path("AMD Instinct MI300X (x)") == (
            tmp_path / ".config" / "vit_triton" / "tuned" / "amd-instinct-mi300x-x.json"
        )


WRONG = [
    (lambda x: x.pop("date"), "the file must be an object with device, .*, got"),
    (lambda x: x.update(format=3), "format must be 1 or 2, got 3"),
    (lambda x: x.update(triton=3), "triton must be a string, got 3"),
    (lambda x: x.update(pickers=[]), r"pickers must be an object of lists, got \[\]"),
    (lambda x: x["pickers"].update(pick_nothing=[]), "each name in pickers must be one of pick_.*, got 'pick_nothing'"),
    (lambda x: x["pickers"].update(pick_layer_norm={}), "pick_layer_norm must be a list, got {}"),
    (lambda x: first(x)["arguments"].update(m=8), r"pick_linear_fwd\[0\].arguments must be an object with n, k"),
    (lambda x: first(x)["arguments"].update(n=0), r"arguments.n must be a positive integer, got 0"),
    (lambda x: first(x)["arguments"].update(k=True), r"arguments.k must be a positive integer, got True"),
    (lambda x: first(x)["arguments"].update(dtype="int8"), r"arguments.dtype must be one of float32, .*, got 'int8'"),
    (lambda x: first(x)["arguments"].update(epilogue="x"), r"arguments.epilogue must be one of none, .*, got 'x'"),
    (lambda x: first(x)["config"].update(kind="SumConfig"), r"config must be an object whose kind is GemmConfig or V"),
    (lambda x: first(x)["config"].update(block_m=8), r"config.block_m must be a power of two from 16 to 65536, got 8"),
    (
        lambda x: first(x)["config"].update(block_n=48),
        r"block_n must be a power of two from 16 to 65536, got 48",
    ),
    (lambda x: first(x)["config"].update(num_warps=64), r"num_warps must be a power of two from 1 to 32, got 64"),
    (lambda x: first(x)["config"].update(num_stages=2.0), r"config.num_stages must be an integer from 1 to 8, got 2.0"),
    (lambda x: first(x)["config"].pop("group"), r"config must be an object with kind, block_m, .*, got \['block_k'"),
    (lambda x: first(x).update(milliseconds=1), r"milliseconds must be a list, got 1"),
    (lambda x: first(x)["milliseconds"][1].update(ms=-1), r"milliseconds\[1\].ms must be a positive number, got -1"),
    (lambda x: x["pickers"]["pick_linear_fwd"].append(first(x)), r"pick_linear_fwd\[2\].arguments must be unique"),
    (
        lambda x: x["pickers"]["pick_layer_norm"][0]["config"].update(block_d=512),
        r"pick_layer_norm\[0\].config.block_d must be at least the width 768, got 512",
    ),
]


def test_a_file_of_the_first_format_is_read(tmp_path):
    """The first format has other field names and no format number."""
    path = tmp_path / "file.json"
    table = tuned.new_table(H100, SM, TIMED)
    tuned.write(path, table)
    content = path.read_text()
    for now, former in (("block_m", "rows"), ("block_n", "cols"), ("block_k", "depth"), ("subtiles", "parts")):
        content = content.replace(f'"{now}"', f'"{former}"')
    content = json.loads(content)
    del content["format"]
    layer_norm = content["pickers"]["pick_layer_norm"][0]["config"]  # its names did not change
    layer_norm["block_m"] = layer_norm.pop("rows")
    path.write_text(json.dumps(content))
    assert tuned.read(path) == table


def first(content):
    return content["pickers"]["pick_linear_fwd"][0]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message for _, message in WRONG])
def test_error_for_a_wrong_file_names_the_fault(home, gpus, spoil, message):
    gpus += [(H100, 9, 0)]
    path = tuned.default_path(H100)
    tuned.write(path, tuned.new_table(H100, SM, TIMED))
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"nvidia-h100-80gb-hbm3.json: .*{message}"):
        picked("cuda:0")


def test_invalid_json_raises(home, gpus):
    gpus += [(H100, 9, 0)]
    path = tuned.default_path(H100)
    path.parent.mkdir(parents=True)
    for content in (b"", b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="hbm3.json: .*; write the file again with vit-triton tune"):
            picked("cuda:0")


def test_description_of_the_tuned_state(home):
    assert tuned.describe(H100, SM).startswith(f"{H100}, sm_90: no tuned tiles, using defaults")
    path = tuned.default_path(H100)
    tuned.write(path, dataclasses.replace(tuned.new_table(H100, SM, TIMED), triton="1.0"))
    text = tuned.describe(H100, SM)
    assert str(path) in text and "measured with triton 1.0, installed is" in text and "torch" not in text
    assert "pick_linear_fwd: 2 entries, the vendor's GEMM for 1 of them" in text
    assert "vendor's GEMM: n 768, k 3072, dtype bfloat16, precision ieee, epilogue none" in text
    assert "pick_layer_norm: 1 entry\n" in text + "\n"
    assert tuned.describe(H100, "sm_80").endswith(f"{path} belongs to another device ({H100}, sm_90)")


# --- measuring ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, request):
    """Cases of a tiny model, launched on the CPU, with at most two candidates besides each default."""
    forget_recordings()
    request.addfinalizer(forget_recordings)
    tiles = {
        "pick_attention_fwd": [AttentionConfig(16, 16, 4, 1)],
        "pick_linear_fwd": [GemmConfig(32, 16, 16, 4, 1), VendorGemm()],
    }
    for name, picker in PICKERS.items():
        few = tiles.get(name, [])
        picker = dataclasses.replace(picker, others=lambda *args, few=few: few)
        monkeypatch.setitem(PICKERS, name, picker)
    with use_cpu_driver():
        yield tune.cases(TINY, torch.float32, "cpu")


def picker_keys(call):
    """The keys of all picker calls during ``call``."""
    keys = set()
    with override_choice(lambda picker, args: keys.add(picker.key(args)) or picker.default(*args)):
        call()
    return keys


def steps(model, image):
    """Run inference and a training step."""
    with torch.no_grad():
        model.eval()(image)
    model.train()(image).sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_configuration_of_a_vit_is_tuned(dropout):
    """Follow the GPU code path in bfloat16 without running kernels."""
    shape = TINY.with_depth(12)
    with gpu_path.use_gpu_path(lambda *launch: None):
        cases = [case for p in {0.0, dropout} for case in tune.cases(shape, torch.bfloat16, "cpu", p)]
        tuned = {key for case in cases for key in case.picker_calls}
        image = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
        ours = vit_triton.ViT(**shape.vit(), dropout=dropout, emb_dropout=dropout, backend="triton")
        used = picker_keys(lambda: steps(ours.bfloat16(), image))
        assert len(used) >= 30 and used <= tuned
        timm = pytest.importorskip("timm.models.vision_transformer")
        size = dict(img_size=16, patch_size=8, num_classes=0, embed_dim=32, depth=2, num_heads=2)
        other = timm.VisionTransformer(**size, proj_drop_rate=dropout, attn_drop_rate=dropout)
        vit_triton.accelerate(other.bfloat16(), backend="triton")
        used = picker_keys(lambda: steps(other, image))
        assert len(used) > 15 and used <= tuned


@pytest.mark.parametrize("model", TUNE_MODELS)
def test_cases_of_every_size(model):
    """Head sizes are 64 to 88; the image is small."""
    shape = Shape.of(TUNE_MODELS[model], 32, 1)
    with gpu_path.use_gpu_path(lambda *launch: None):
        keys = {key for case in tune.cases(shape, torch.bfloat16, "cpu") for key in case.picker_calls}
    attended = {key[1:4] for key in keys if key[0] == "pick_attention_fwd"}
    assert attended == {(n, shape.tokens, shape.head_dim) for n in (1, shape.tokens)}


def test_every_picker_is_called_and_every_candidate_timed(small):
    lines, timer = [], iter(range(10**6))
    measured = list(tune.tune(small, lambda run: run() and 1.0 + next(timer), lines.append))
    assert {each.picker for each in measured} == set(PICKERS)
    products = [each for each in measured if each.picker == "pick_linear_fwd"]
    sizes = {(96, 32), (64, 32), (32, 32), (128, 32), (32, 128), (CLASSES, 32)}
    assert {tuple(each.arguments.values())[:2] for each in products} == sizes
    for each in products:
        assert [config for config, _ in each.milliseconds][1:] == [GemmConfig(32, 16, 16, 4, 1), VendorGemm()]
        assert each.config == each.milliseconds[0][0]  # times increase: the default, timed first, is the fastest
    assert not any("skipped" in line for line in lines)


QKV = "linear_fwd(10x32, 96x32)"


def only(cases, *launches):
    found = [next(case for case in cases if case.name == f"tiny: {launch}") for launch in launches]
    assert len(found) == len(launches)
    return found


def test_fastest_candidate_is_chosen_above_a_minimum_gain(small):
    qkv = only(small, QKV)
    for vendor, expected in ((0.5, VendorGemm()), (0.99, None)):
        times = iter([1.0, 1.5, vendor])
        (each,) = tune.tune(qkv, lambda run, times=times: next(times), lambda line: None)
        assert each.config == (expected or each.milliseconds[0][0]) and each.key[0] == "pick_linear_fwd"
        assert [ms for _, ms in each.milliseconds] == [1.0, 1.5, vendor]


def test_shared_choice_is_timed_as_the_sum_of_its_cases(small):
    both = only(
        small, "layer_norm_fwd(10x32, 32, 32, eps=1e-05, save=True)", "layer_norm_bwd(10x32, 10x32, 32, 10, 10)"
    )
    measured = list(tune.tune(both, lambda run: 1.0, lambda line: None))
    (rows,) = [each for each in measured if each.picker == "pick_layer_norm"]
    assert [ms for _, ms in rows.milliseconds] == [2.0]


def test_wrong_failing_or_spilling_candidates_are_reported_and_not_chosen(small, monkeypatch):
    qkv = only(small, QKV)
    mm = torch.mm
    for spoil, message in (
        (lambda a, b: mm(a, b) * 1.001, f"WRONG in tiny: {QKV}: differs from the default by 1.0e-03"),
        (lambda a, b: mm(a, b) * float("nan"), f"WRONG in tiny: {QKV}: differs from the default by nan"),
        (lambda a, b: mm(a, b[:1]), "does not run: RuntimeError"),
    ):
        lines = []
        monkeypatch.setattr(torch, "mm", spoil)
        (each,) = tune.tune(qkv, lambda run: 1.0, lines.append)
        assert [type(config) for config, _ in each.milliseconds] == [GemmConfig, GemmConfig]
        assert [line for line in lines if line.startswith("  skipped  VendorGemm") and message in line], lines
    monkeypatch.setattr(torch, "mm", mm)
    lines, run = [], tune._run
    spilled = iter([3, 3, 0, 8])  # the default's reference run, then the default and the candidates
    monkeypatch.setattr(tune, "_run", lambda group: (run(group)[0], next(spilled)))
    (each,) = tune.tune(qkv, lambda run: 1.0, lines.append)
    assert len(each.milliseconds) == 2 and "VendorGemm" in lines[-1] and "spills 8 registers" in lines[-1]


def test_pickers_are_restored_after_tuning(small):
    pick = forward.linear_fwd
    with pytest.raises(ZeroDivisionError):
        list(tune.tune(small[:1], lambda run: 1 / 0, lambda line: None))
    assert forward.linear_fwd is pick and pickers._choose is None


def test_interrupted_tuning_writes_its_results_and_keeps_old_ones(tmp_path, capsys):
    path = tmp_path / "table.json"
    tune.write(path, H100, SM, TIMED[:2], 2)

    def stopped():
        yield dataclasses.replace(TIMED[1], config=VendorGemm())
        yield TIMED[2]
        raise KeyboardInterrupt

    assert not tune.write(path, H100, SM, stopped(), 3)
    assert "stopped" in capsys.readouterr().out
    choices = tuned.read(path).choices
    assert choices == {TIMED[0].key: VendorGemm(), TIMED[1].key: VendorGemm(), TIMED[2].key: TIMED[2].config}
    tuned.write(path, dataclasses.replace(tuned.read(path), torch="1.0"))
    tune.write(path, H100, SM, TIMED[:1], 1)  # entries of another version are dropped
    assert list(tuned.read(path).choices) == [TIMED[0].key]
    before = path.read_bytes()
    tune.write(path, H100, SM, [], 0)
    assert path.read_bytes() == before


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_for_gpus_requires_a_gpu(capsys, tmp_path):
    assert main(["tune", "--device", "cuda", "--out", str(tmp_path / "x.json")]) == 2 and not list(tmp_path.iterdir())
    assert "tune: --device cuda requires a GPU, but PyTorch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch 0", "must be a whole number above 0, got '0'"),
        ("--device cuda --image 8", "--image: image side must be at least the patch side 16 of B, got 8"),
        ("--device cpu --batch 8", "--batch: applies to a GPU\n"),
        ("--seconds -1", "must be a number of seconds, 0 or more, got '-1'"),
        ("--out /nowhere/r.json", "must be a file in a folder that exists, got '/nowhere/r.json'"),
    ],
)
def test_bad_options_are_rejected(words, message, capsys):
    try:
        code = main(["tune", *words.split()])
    except SystemExit as end:  # raised by argparse
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


NO_EXTRAS = """
import sys

for name in ("matplotlib", "PIL", "rich", "sklearn", "timm", "torchvision", "transformers", "benchmarks"):
    sys.modules[name] = None  # an import of it fails

from vit_triton.cli import main
from vit_triton.tuning import tune

assert tune.LAUNCHERS
try:
    main(["tune", "--help"])
except SystemExit as end:
    assert end.code == 0
else:
    raise AssertionError("no help")
assert main(["info"]) == 2
"""


def test_command_requires_no_extras():
    result = subprocess.run([sys.executable, "-c", NO_EXTRAS], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "usage: vit-triton tune" in result.stdout and "--seconds" in result.stdout
    assert "install the extra [cli]" in result.stderr  # printed by the info command


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_stays_below_printed_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with progress(2) as bar:
        print("one", "line")
        bar.advance("first")
    assert bar.complete and sys.stdout is terminal
    drawn = [line.split("\r\x1b[2K")[-1] for line in terminal.getvalue().split("\n")]
    empty, half = "-" * 40, "#" * 20 + "-" * 20
    assert drawn == ["one line", f"{half} 1/2 0:00:00 first", ""]
    assert f"{empty} 0/2 -:--:--" in terminal.getvalue()


def test_no_progress_bar_without_a_terminal(capsys):
    with progress(2) as bar:
        bar.advance("first")
    assert bar.complete and capsys.readouterr().err == ""
