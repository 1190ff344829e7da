"""Loading weights from training checkpoints, damaged files and hostile files."""

import argparse
import fnmatch
import io
import os
import pickle
import re
import resource
import tarfile
import tempfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import hypothesis
import numpy as np
import onnx
import pytest
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_weights import DIM, assert_untouched, made, snapshot, timm_model
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from vit_triton import load_weights, save_weights
from vit_triton.weights import WeightsError, files
from vit_triton.weights.fitting import converts


@contextmanager
def little_memory(mib: int) -> Iterator[None]:
    """Limit further memory allocations to ``mib`` MiB; larger ones fail."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refuse(model: nn.Module, path: Path, match: str, **options) -> WeightsError:
    before, versions = snapshot(model), [p._version for p in model.parameters()]
    with pytest.raises(WeightsError, match=match) as caught, little_memory(64):
        load_weights(model, path, **options)
    assert_untouched(model, before)
    assert [p._version for p in model.parameters()] == versions
    return caught.value


# --- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"model": None}, TypeError, "model must be an nn.Module, got None"),
        ({"model": {"a": 1}}, TypeError, "model must be an nn.Module, got {'a': 1}"),
        ({"path": 3}, TypeError, "path must be a str or a path, got 3"),
        ({"path": b"model.pt"}, TypeError, "path must be a str or a path, got b'model.pt'"),
        ({"key": 3}, TypeError, "key must be a str or None, got 3"),
        ({"ignore": None}, TypeError, "ignore must be a pattern such as 'head.*' or a sequence of them, got None"),
        ({"ignore": [3]}, TypeError, "ignore must be a pattern such as 'head.*' or a sequence of them, got [3]"),
        ({"ignore": b"head.*"}, TypeError, "got b'head.*'"),
        ({"resample": "no"}, TypeError, "resample must be True or False, got 'no'"),
        *(
            ({"grid": grid}, ValueError, f"grid must be (rows, columns), two positive integers, or None, got {grid!r}")
            for grid in [(-2, -2), "22", 2, (2,), (2, 0), (2.0, 2), (True, 2), (2, 2, 2), {2, 3}]
        ),
    ],
    ids=str,
)
def test_argument_of_a_wrong_type_is_named_in_the_error(tmp_path, argument, error, message):
    model = nn.Linear(2, 2)
    save_weights(model, tmp_path / "model.pt")
    arguments = {"model": model, "path": tmp_path / "model.pt", **argument}
    with pytest.raises(error, match=f"{re.escape(message)}$") as caught:
        load_weights(arguments.pop("model"), arguments.pop("path"), **arguments)
    assert "\n" not in str(caught.value)


def test_save_weights_errors_name_arguments_and_non_tensors(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="^model must be an nn.Module, got None$"):
        save_weights(None, tmp_path / "model.pt")
    with pytest.raises(TypeError, match="^path must be a str or a path, got 3$"):
        save_weights(nn.Linear(2, 2), 3)
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        with pytest.raises(
            WeightsError, match=r"only dense tensors can be saved, but the model has _extra_state \(dict\)$"
        ):
            save_weights(Extra(2, 2), path)
        sparse = nn.ParameterDict({"a": nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)})
        with pytest.raises(WeightsError, match=r"the model has a \(torch.sparse_coo on cpu\)$"):
            save_weights(sparse, path)
    assert not list(tmp_path.iterdir())


def test_ignore_may_be_one_pattern(tmp_path):
    theirs, ours = made(timm_model), made(timm_model, seed=1, classes=9)
    save_weights(theirs, tmp_path / "model.pt")
    head = ours.head.weight.clone()
    load_weights(ours, tmp_path / "model.pt", ignore="head.*")
    assert torch.equal(ours.head.weight, head) and torch.equal(ours.norm.weight, theirs.norm.weight)
    refuse(ours, tmp_path / "model.pt", "ignore matches all tensors", ignore="*")


def test_ignore_patterns_must_match_a_name(tmp_path):
    theirs, ours = made(timm_model), made(timm_model, seed=1)
    torch.save({**snapshot(theirs), "epoch": 3}, tmp_path / "model.pt")
    for pattern in ("heads.*", ""):
        refuse(ours, tmp_path / "model.pt", f"ignore: '{pattern}' matches no name", ignore=["head.*", pattern, "epoch"])
    load_weights(ours, tmp_path / "model.pt", ignore=["head.*", "epoch"])


# --- dtypes ------------------------------------------------------------------------------------------------

REAL = torch.arange(1.0, 5)
OF_KIND = {
    "float32": REAL,
    "float64": REAL.double(),
    "bfloat16": REAL.bfloat16(),
    "float8_e5m2": REAL.to(torch.float8_e5m2),
    "complex64": REAL + 1j * REAL,
    "int64": REAL.long(),
    "uint8": REAL.byte(),
    "uint16": REAL.to(torch.uint16),
    "bool": REAL > 2,
    "bits8": REAL.byte().view(torch.bits8),
    "float4": REAL.byte().view(torch.float4_e2m1fn_x2),
}
KINDS = {"float": 4, "complex": 1, "int": 3, "bool": 1, "bits": 1, "float4": 1}  # entries per kind, in the order above
KIND_OF = dict(zip(OF_KIND, (kind for kind, number in KINDS.items() for _ in range(number)), strict=True))


class Holder(nn.Module):
    """A parameter that always fits, and a buffer with the dtype of ``value``."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3))
        self.register_buffer("second", value.clone())


@pytest.mark.usefixtures("virtual_memory")  # the poison is not implemented for sub-byte dtypes
@pytest.mark.parametrize("new", OF_KIND)
@pytest.mark.parametrize("old", OF_KIND)
def test_dtypes_of_another_kind_are_rejected(tmp_path, old, new):
    torch.save({"first": torch.ones(3), "second": OF_KIND[old]}, tmp_path / "model.pt")
    model = Holder(OF_KIND[new])
    if KIND_OF[old] == KIND_OF[new]:
        load_weights(model, tmp_path / "model.pt")
        assert torch.equal(model.first, torch.ones(3))
        if old != new:
            assert torch.equal(model.second.float(), REAL)
    else:
        with pytest.raises(WeightsError) as caught:
            load_weights(model, tmp_path / "model.pt")
        assert len(caught.value.mismatched) == 1 and caught.value.mismatched[0].startswith("second (4,)")
        assert torch.equal(model.first, torch.zeros(3))


@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support is experimental")
@pytest.mark.usefixtures("virtual_memory")
def test_convertible_dtypes():
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    ordinary = {dtype for dtype in dtypes if converts(dtype, dtype)} & {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32),
        *(torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128),
    }
    assert len(ordinary) == 12
    for old in dtypes:
        for new in ordinary:
            if converts(old, new):
                torch.empty(2, dtype=new).copy_(torch.empty(2, dtype=old))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # quantized tensors are deprecated, nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    QUANTIZED = torch.quantize_per_tensor(REAL, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (NESTED, "'foo.bias': nested torch.strided on cpu"),
        (QUANTIZED, "'foo.bias': torch.qint8 torch.strided on cpu"),
        (OF_KIND["bits8"], r"not in the model:\n  foo.bias \(4,\) torch.bits8"),
        (OF_KIND["float4"], r"not in the model:\n  foo.bias \(4,\) torch.float4_e2m1fn_x2"),
        (OF_KIND["complex64"], r"not in the model:\n  foo.bias \(4,\) torch.complex64"),
        (OF_KIND["uint16"], r"not in the model:\n  foo.bias \(4,\) torch.uint16"),
        (OF_KIND["float8_e5m2"], r"not in the model:\n  foo.bias \(4,\) torch.float8_e5m2"),
    ],
    ids=["nested", "quantized", "bits8", "float4", "complex64", "uint16", "float8"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.usefixtures("virtual_memory")
def test_a_surplus_bias_of_any_kind(tmp_path, value, match):
    model = made(timm_model)
    torch.save({**snapshot(model), "foo.bias": value}, tmp_path / "model.pt")
    refuse(made(timm_model, seed=1), tmp_path / "model.pt", match)
    load_weights(made(timm_model, seed=1), tmp_path / "model.pt", ignore=["foo.bias"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64, torch.uint8, torch.uint16])
def test_positions_in_any_dtype(tmp_path, dtype):
    theirs, ours = made(timm_model), made(timm_model, 48, seed=1)
    state = snapshot(theirs)
    state["pos_embed"] = state["pos_embed"].to(dtype)
    torch.save(state, tmp_path / "model.pt")
    if dtype.is_floating_point:
        load_weights(ours, tmp_path / "model.pt")
        theirs.pos_embed.data = state["pos_embed"].float()
        torch.save(theirs.state_dict(), tmp_path / "model.pt")
        again = made(timm_model, 48, seed=2)
        load_weights(again, tmp_path / "model.pt")
        half = torch.finfo(torch.float16)  # resampled positions are rounded to the dtype of the file
        atol = half.smallest_normal * half.eps / 2
        torch.testing.assert_close(ours.pos_embed, again.pos_embed, rtol=half.eps / 2, atol=atol)
    else:
        refuse(ours, tmp_path / "model.pt", f"pos_embed .* torch.{str(dtype)[6:]} in the file")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.usefixtures("virtual_memory")
def test_a_file_of_quantized_tensors(tmp_path):
    torch.save({"weight": QUANTIZED, "bias": QUANTIZED}, tmp_path / "model.pt")
    refuse(nn.Linear(4, 1), tmp_path / "model.pt", r"got 'weight': torch.qint8 torch.strided on cpu, 'bias'")


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.zeros(1).expand(3), QUANTIZED, NESTED], ids=str)
@pytest.mark.usefixtures("virtual_memory")
def test_model_with_unwritable_tensors(tmp_path, odd):
    torch.save({"first": torch.ones(3), "second": torch.ones(3)}, tmp_path / "model.pt")
    model = Holder(torch.zeros(3))
    model.second = odd
    with pytest.raises(ValueError, match="^model: second is not a dense, writable tensor; skip it with ignore"):
        load_weights(model, tmp_path / "model.pt")
    assert torch.equal(model.first, torch.zeros(3))


# --- small files, large memory -------------------------------------------------------------------------------


def deflated(path: Path) -> None:
    """Compress the entries of an archive in place."""
    with (
        zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


class TestSmallFilesLargeMemory:
    def test_npz(self, tmp_path):
        model = made(timm_model)
        arrays = {name: tensor.numpy() for name, tensor in snapshot(model).items()}
        for name in ("norm.bias", "foo.bias", "pos_embed", "patch_embed.proj.weight"):
            with zipfile.ZipFile(tmp_path / "model.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for each, array in {k: v for k, v in arrays.items() if k != name}.items():
                    with archive.open(f"{each}.npy", "w") as file:
                        np.lib.format.write_array(file, array)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    shape = (1, 2**20, DIM) if name == "pos_embed" else (DIM, 2**20)
                    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                    for _ in range(96):
                        file.write(bytes(2**20))
            assert (tmp_path / "model.npz").stat().st_size < 2**20
            refuse(model, tmp_path / "model.npz", name, resample=True)

    def test_npz_with_a_long_header(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "model.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("weight.npy", "w", force_zip64=True) as file:
                file.write(np.lib.format.magic(2, 0) + (2**27).to_bytes(4, "little"))
                for _ in range(128):
                    file.write(b" " * 2**20)
        refuse(nn.Linear(2, 2), tmp_path / "model.npz", r"'weight': numpy format \(2, 0\)")

    def test_a_compressed_archive(self, tmp_path):
        torch.save({"weight": torch.zeros(2**27, dtype=torch.uint8)}, tmp_path / "model.pt")
        deflated(tmp_path / "model.pt")
        refuse(
            nn.Linear(2, 2),
            tmp_path / "model.pt",
            "compressed archives are not supported; save the file with torch.save",
        )

    @pytest.mark.parametrize("name", ["weight", "foo.bias", "bias"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_expanded_tensor(self, tmp_path, name, zipped):
        model = nn.Linear(2, 2)
        state = {**model.state_dict(), name: torch.zeros(1).expand(10**6, 10**6)}
        torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
        refuse(model, tmp_path / "model.pt", rf"{name} \(1000000, 1000000\)")

    @pytest.mark.parametrize("tokens", [6000**2, 6000**2 + 1])
    def test_positions(self, tmp_path, tokens):
        model = made(timm_model)
        state = {**snapshot(model), "pos_embed": torch.zeros(1).expand(1, tokens, DIM)}
        torch.save(state, tmp_path / "model.pt")
        refuse(model, tmp_path / "model.pt", r"pos_embed: \(3600000\d, 24\) in the file is larger than the whole model")

    @pytest.mark.parametrize("shape", [(DIM, 3, 10**6, 10**6), (DIM, 3, 5000, 1), (DIM, 3 * 10**12)])
    def test_patches(self, tmp_path, shape):
        model = made(timm_model)
        state = {**snapshot(model), "patch_embed.proj.weight": torch.zeros(1).expand(shape)}
        torch.save(state, tmp_path / "model.pt")
        match = "larger than the whole model" if max(shape) > 5000 else "sides above 1024 pixels"
        refuse(model, tmp_path / "model.pt", f"patch_embed.proj.weight: .*{match}", resample=True)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_large_bytearray(self, tmp_path, zipped):
        model = nn.Linear(2, 2)
        content = {"state_dict": model.state_dict(), "x": Written("builtins", "bytearray", (2**30,))}
        write_pickle(content, tmp_path / "model.pt", zipped)
        refuse(model, tmp_path / "model.pt", "it contains bytearray, but only tensors and plain data are supported")

    def test_onnx(self, tmp_path):
        weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[10**6, 10**6], raw_data=b"1234")
        bias = numpy_helper.from_array(np.zeros(2, np.float32), "bias")
        write_graph([], [weight, bias], tmp_path / "model.onnx")
        refuse(nn.Linear(2, 2), tmp_path / "model.onnx", r"weight \(1000000, 1000000\) in the file")


# --- pickles written by other versions -----------------------------------------------------------------------


class Global:
    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Written:
    """An object as pickled by a version that is not installed."""

    def __init__(self, module: str, name: str, arguments: tuple, state: object = None) -> None:
        self.parts = (Global(module, name), arguments, state)


class Pickler(pickle._Pickler):
    def save_written(self, value: Written) -> None:
        function, arguments, state = value.parts
        self.save(function)
        self.save(arguments)
        self.write(pickle.REDUCE)
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)

    def save_global_name(self, value: Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    dispatch = {**pickle._Pickler.dispatch, Written: save_written, Global: save_global_name}


def write_pickle(content: object, path: Path, zipped: bool = True) -> None:
    def dump(value: object, file: IO[bytes], protocol: int) -> None:
        Pickler(file, protocol).dump(value)

    written = types.ModuleType("written")
    written.Pickler, written.dump = Pickler, dump
    torch.save(content, path, pickle_module=written, _use_new_zipfile_serialization=zipped)


def numpy_scalar(core: str) -> Written:
    dtype = Written("numpy", "dtype", ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    return Written(f"numpy.{core}.multiarray", "scalar", (dtype, bytes(8)))


PLAIN = {
    "numpy 1": numpy_scalar("core"),
    "numpy 2": numpy_scalar("_core"),
    "this numpy": np.float32(0.5),
    "this numpy's bool": np.bool_(True),
    "Python 3.12": Written("pathlib", "PosixPath", ("/", "data", "imagenet")),
    "Python 3.13": Written("pathlib._local", "PosixPath", ("/", "data", "imagenet")),
    "pure": Written("pathlib", "PurePosixPath", ("data",)),
    "Windows": Written("pathlib", "WindowsPath", ("C:\\", "data")),
    "Windows, Python 3.13": Written("pathlib._local", "WindowsPath", ("C:\\", "data")),
    "pure, Windows": Written("pathlib", "PureWindowsPath", ("data",)),
    "this Python": Path("/data/imagenet"),
    "OrderedDict": OrderedDict(a=1),
    "Namespace": argparse.Namespace(lr=1e-3, out=Path("/data"), best=np.float64(0.5), inner=argparse.Namespace(a=1)),
    "set and complex": {"a", 1j},
}


class TestTrainingCheckpoints:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("kind", PLAIN)
    def test_plain_data_next_to_the_weights(self, tmp_path, kind, zipped):
        theirs, ours = nn.Linear(3, 3), nn.Linear(3, 3)
        args = argparse.Namespace(value=PLAIN[kind])
        content = {"model": theirs.state_dict(), "epoch": 3, "args": args, "value": PLAIN[kind]}
        write_pickle(content, tmp_path / "model.pth", zipped)
        allowed = set(torch.serialization.get_safe_globals())
        load_weights(ours, tmp_path / "model.pth")
        assert_untouched(ours, snapshot(theirs))
        assert set(torch.serialization.get_safe_globals()) == allowed

    def test_other_classes_are_rejected(self, tmp_path):
        for module, name in (("pathlib", "Path.home"), ("numpy", "fromfile"), ("argparse", "ArgumentParser")):
            write_pickle({"model": nn.Linear(2, 2).state_dict(), "x": Written(module, name, ())}, tmp_path / "model.pt")
            refuse(nn.Linear(2, 2), tmp_path / "model.pt", f"it contains {module}.{name}, but only tensors")

    @pytest.mark.filterwarnings(r"ignore:.torch.jit.\w+. is deprecated")
    def test_torchscript_and_tar_archives_are_rejected(self, tmp_path):
        model, path = nn.Linear(2, 2), tmp_path / "model.pth.tar"
        torch.jit.save(torch.jit.script(model), path)
        refuse(model, path, r"TorchScript is not supported; save the state_dict\(\)")
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
        refuse(model, path, "it is not a pickle of tensors$")

    @pytest.mark.parametrize("ema", [False, True])
    def test_training_checkpoint_of_timm(self, tmp_path, ema):
        model = made(timm_model)
        other = ModelEmaV3(model)
        nn.init.zeros_(other.module.norm.bias)
        args = argparse.Namespace(model="vit", lr=np.float64(1e-3), output=Path("/data"))
        optimizer = torch.optim.AdamW(model.parameters())
        saver = CheckpointSaver(model, optimizer, args=args, model_ema=other if ema else None, checkpoint_dir=tmp_path)
        saver.save_checkpoint(1, metric=0.5)
        path, ours = tmp_path / "last.pth.tar", made(timm_model, seed=1)
        if not ema:
            load_weights(ours, path)
            assert_untouched(ours, snapshot(model))
            return
        refuse(ours, path, "contains several sets of weights, key must be one of state_dict, state_dict_ema$")
        for key, expected in (("state_dict", model), ("state_dict_ema", other.module)):
            load_weights(ours, path, key=key)
            assert_untouched(ours, snapshot(expected))

    def test_training_checkpoint_of_dino(self, tmp_path):
        student, teacher = made(lambda: timm_model(classes=0)), made(lambda: timm_model(classes=0), seed=1)
        head = {"head.mlp.0.weight": torch.ones(3, DIM), "head.last_layer.weight_g": torch.ones(3, 1)}

        def named(model, prefix):
            return {prefix + name: t for name, t in {**model.state_dict(prefix="backbone."), **head}.items()}

        content = {
            "student": named(student, "module."),
            "teacher": named(teacher, ""),
            "optimizer": torch.optim.AdamW(student.parameters()).state_dict(),
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 3)},
        }
        torch.save(content, tmp_path / "checkpoint.pth")
        ours, path = made(lambda: timm_model(classes=0), seed=2), tmp_path / "checkpoint.pth"
        refuse(ours, path, "key must be one of teacher, student$")
        error = refuse(ours, path, "does not match", key="teacher")
        assert [name.split(" ")[0] for name in error.unexpected] == list(head) and not error.missing
        load_weights(ours, path, key="teacher", ignore="head.*")
        assert_untouched(ours, snapshot(teacher))
        load_weights(ours, path, key="student", ignore="module.head.*")
        assert_untouched(ours, snapshot(student))
        refuse(ours, path, "expected a state dict of tensors, got 'state': dict", key="optimizer")
        refuse(
            ours, path, "contains no set of weights 'ema' .* its mappings are student, teacher, optimizer", key="ema"
        )

    def test_key_selects_part_of_a_state_dict(self, tmp_path):
        """DINOv2 saves the student and the teacher in one state dict."""
        student, teacher = (made(lambda: timm_model(classes=0), seed=seed) for seed in (0, 1))
        state = {**student.state_dict(prefix="student.backbone."), **teacher.state_dict(prefix="teacher.backbone.")}
        torch.save({"model": state, "iteration": 3}, tmp_path / "model.pth")
        ours = made(lambda: timm_model(classes=0), seed=2)
        refuse(ours, tmp_path / "model.pth", "does not match")
        load_weights(ours, tmp_path / "model.pth", key="teacher")
        assert_untouched(ours, snapshot(teacher))
        load_weights(ours, tmp_path / "model.pth", ignore="teacher.*")
        assert_untouched(ours, snapshot(student))

    @pytest.mark.parametrize(
        "prefix", ["module.", "backbone.", "encoder.", "net.", "teacher.backbone.", "module.encoder.", "model.net."]
    )
    @pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
    def test_prefixes(self, tmp_path, prefix, suffix):
        theirs, ours = made(timm_model), made(timm_model, seed=1)
        state = {**theirs.state_dict(prefix=prefix), "decoder.weight": torch.ones(2)}
        path = tmp_path / f"model{suffix}"
        files.write(state, path)
        error = refuse(ours, path, "does not match")
        assert error.unexpected == ("decoder.weight (2,)",) and not error.missing and not error.mismatched
        load_weights(ours, path, ignore=["decoder.*"])
        assert_untouched(ours, snapshot(theirs))

    def test_prefix_that_names_a_submodule_is_kept(self, tmp_path):
        theirs, ours = nn.Linear(3, 3), nn.Linear(3, 3)
        theirs.encoder, ours.encoder = nn.Linear(3, 3), nn.Linear(3, 3)
        save_weights(theirs, tmp_path / "model.pt")
        load_weights(ours, tmp_path / "model.pt")
        assert_untouched(ours, snapshot(theirs))

    def test_self_referencing_checkpoint(self, tmp_path):
        content: dict = {"epoch": 1}
        content["model"] = content
        torch.save(content, tmp_path / "model.pt")
        refuse(nn.Linear(2, 2), tmp_path / "model.pt", "'epoch': int, 'model': dict")


# --- ONNX --------------------------------------------------------------------------------------------------


def write_graph(nodes: list, tensors: list, path: Path) -> None:
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], tensors)), str(path))


class TestOnnxGraphs:
    TENSORS = [
        numpy_helper.from_array(np.ones((1, 1, 2), np.float32), "cls_token"),
        numpy_helper.from_array(np.ones((1, 3, 2), np.float32), "onnx::Add_1"),
    ]

    def test_cycle_of_casts(self, tmp_path):
        nodes = [
            helper.make_node("Concat", ["cls_token", "b"], ["a"], axis=1),
            helper.make_node("Cast", ["a"], ["b"], to=1),
        ]
        write_graph(nodes, self.TENSORS, tmp_path / "model.onnx")
        refuse(nn.Linear(2, 2), tmp_path / "model.onnx", "does not match")

    def test_cycle_of_adds(self, tmp_path):
        nodes = [
            helper.make_node("Add", ["cls_token", "a"], ["c"]),
            helper.make_node("Add", ["a", "b"], ["a"]),
            helper.make_node("Add", ["a", "onnx::Add_1"], ["b"]),
        ]
        write_graph(nodes, self.TENSORS, tmp_path / "model.onnx")
        error = refuse(nn.Linear(2, 2), tmp_path / "model.onnx", "does not match")
        assert "position_embeddings (1, 3, 2)" in error.unexpected

    @pytest.mark.parametrize("length", [40, 5000])
    def test_long_chain_of_adds(self, tmp_path, length):
        nodes = [helper.make_node("Add", ["cls_token", f"x{length}"], ["y"])]
        nodes += [helper.make_node("Add", [f"x{i}", f"x{i}"], [f"x{i + 1}"]) for i in range(length)]
        nodes += [helper.make_node("Identity", ["onnx::Add_1"], ["x0"])]
        write_graph(nodes, self.TENSORS, tmp_path / "model.onnx")
        error = refuse(nn.Linear(2, 2), tmp_path / "model.onnx", "does not match")
        assert "position_embeddings (1, 3, 2)" in error.unexpected


# --- fuzzers -----------------------------------------------------------------------------------------------

STRANGE = (
    "Detected pickle protocol",
    "Validating sparse tensor",
    "TypedStorage is deprecated",
    "The PyTorch API of nested",
)
quiet = pytest.mark.filterwarnings(*(f"ignore:{start}" for start in STRANGE), "ignore:B?Complex(Half|32) support")


class Tiny(nn.Module):
    """A few tensors, one for each special case of the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 2)), nn.Parameter(torch.zeros(1, 5, 2))
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 2)


def only_weights_error(model: nn.Module, path: Path, **options) -> bool:
    """Whether the file was loaded; otherwise loading raised WeightsError and left the model unchanged."""
    before = snapshot(model)
    with little_memory(256):
        try:
            load_weights(model, path, **options)
            return True
        except WeightsError:
            pass
    assert_untouched(model, before)
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a valid file of each format."""
    model, folder = made(Tiny), tmp_path_factory.mktemp("whole")
    state = snapshot(model)
    for suffix in (".safetensors", ".pt"):
        save_weights(model, folder / f"model{suffix}")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    args = argparse.Namespace(out=Path("/data"), best=np.float64(1))
    torch.save({"model": state, "args": args, "optimizer": {"state": {}}}, folder / "training.pth.tar")
    np.savez(folder / "model.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    np.savez_compressed(folder / "compressed.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    nodes = [helper.make_node("Add", ["cls_token", "onnx::Add_1"], ["y"])]
    tensors = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in state.items() if name != "pos_embed"]
    tensors.append(numpy_helper.from_array(state["pos_embed"].numpy(), "onnx::Add_1"))
    write_graph(nodes, tensors, folder / "model.onnx")
    return folder


PLACE = st.floats(0, 1, exclude_max=True)
DAMAGES = st.one_of(
    st.tuples(st.just("cut"), PLACE),
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("byte"), PLACE, st.integers(0, 255)),
    st.tuples(st.just("copy"), PLACE, PLACE, st.integers(1, 64)),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 64)),
)


def damaged(content: bytes, steps: list[tuple]) -> bytes:
    data = bytearray(content)
    for kind, place, *more in steps:
        at = int(place * len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= 1 << more[0]
        elif kind == "byte" and data:
            data[at] = more[0]
        elif kind == "copy":
            start = int(more[0] * len(data))
            data[at : at + more[1]] = data[start : start + more[1]]
        elif kind == "drop":
            del data[at : at + more[0]]
    return bytes(data)


@quiet
@hypothesis.given(
    st.integers(0, 6), st.lists(DAMAGES, min_size=1, max_size=4), st.booleans(), st.sampled_from([(), "head.*"])
)
def test_fuzz_damaged_files(whole, which, steps, resample, ignore):
    good = sorted(whole.iterdir())[which]
    path = whole.parent / f"damaged-{good.name}"
    path.write_bytes(damaged(good.read_bytes(), steps))
    only_weights_error(Tiny(), path, resample=resample, ignore=ignore)


FUSE = Path(tempfile.gettempdir()) / f"vit_triton-fuse-{os.getpid()}"  # created if a pickle runs code
GLOBALS = [
    *(("builtins", name) for name in ("eval", "exec", "getattr", "bytearray", "set", "complex", "open", "print")),
    *(("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("collections", "Counter")),
    *(("argparse", "Namespace"), ("pathlib", "PosixPath"), ("pathlib._local", "WindowsPath"), ("numpy", "dtype")),
    *(("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "ndarray")),
    *(("torch", name) for name in ("Size", "Tensor", "FloatTensor", "device", "FloatStorage", "float32", "qint8")),
    *(
        ("torch._utils", f"_rebuild_{kind}")
        for kind in ("tensor", "tensor_v2", "parameter", "sparse_tensor", "qtensor")
    ),
    *(("torch._utils", "_rebuild_nested_tensor"), ("torch._tensor", "_rebuild_from_type_v2")),
    *(("torch._utils", "_rebuild_meta_tensor_no_storage"), ("torch._utils", "_rebuild_wrapper_subclass")),
    *(("collections", "OrderedDict"), ("_codecs", "encode"), ("torch.serialization", "_get_layout")),
]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.binary(max_size=4),
    st.sampled_from(["model", "weight", "bias", "f8", "detach", "dtype", "latin1", "<"]),
    st.sampled_from([f"touch {FUSE}", f"open('{FUSE}', 'w')"]),
    st.sampled_from(GLOBALS).map(lambda names: Global(*names)),
    st.sampled_from([torch.zeros(2), torch.ones(2, 2), torch.zeros(1).expand(10**5, 10**5), torch.zeros(2).long()]),
)  # fmt: skip
NAMES = st.sampled_from(["model", "state_dict", "weight", "bias", "x.bias", "args", "teacher", "module.weight"])


def _containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(NAMES, inner, max_size=4),
        st.builds(
            lambda names, arguments, state: Written(*names, arguments, state),
            st.sampled_from(GLOBALS),
            st.lists(inner, max_size=6).map(tuple),
            st.one_of(st.none(), inner),
        ),
    )


@quiet
@hypothesis.given(
    st.recursive(LEAVES, _containers, max_leaves=12),
    st.dictionaries(NAMES, st.recursive(LEAVES, _containers, max_leaves=8), max_size=4),
    st.booleans(),
)
def test_fuzz_hostile_pickles(tmp_path_factory, value, content, zipped):
    path, model = tmp_path_factory.getbasetemp() / "hostile.pt", nn.Linear(2, 2)
    write_pickle({**model.state_dict(), "x": value, **content}, path, zipped)
    only_weights_error(model, path)
    only_weights_error(model, path, ignore="[xat]*")
    assert not FUSE.exists()


POOL = ["cls_token", "onnx::Add_1", "onnx::MatMul_2", "fc.bias", *"abcdef"]
NODES = st.builds(
    lambda kind, inputs, outputs: helper.make_node(kind, inputs, outputs),
    st.sampled_from(["Add", "Cast", "Concat", "Expand", "Tile", "MatMul", "Identity"]),
    st.lists(st.sampled_from(POOL), max_size=3),
    st.lists(st.sampled_from(POOL), max_size=2),
)


@hypothesis.given(st.lists(NODES, max_size=12), st.sampled_from([(1, 3, 2), (3, 2), (2, 1, 2), (1, 3, 4)]))
def test_fuzz_graphs_of_onnx(tmp_path_factory, nodes, shape):
    path = tmp_path_factory.getbasetemp() / "graph.onnx"
    arrays = {"cls_token": np.ones((1, 1, 2)), "onnx::Add_1": np.ones(shape), "onnx::MatMul_2": np.ones((2, 2))}
    tensors = [
        numpy_helper.from_array(a.astype(np.float32), name) for name, a in {**arrays, "fc.bias": np.ones(2)}.items()
    ]
    write_graph(nodes, tensors, path)
    only_weights_error(Tiny(), path)
    only_weights_error(Tiny(), path, ignore=["onnx::*", "fc.*", "norm.*", "head.*", "pos_embed"])


# --- prefixes, sets and patterns against a plain reference implementation --------------------------------------

SHAPES = {"stem.weight": (2, 3), "stem.bias": (2,), "top.weight": (4, 2)}
PREFIXES = ["", "module.", "backbone.", "encoder.", "net.", "teacher.backbone.", "module.encoder.", "decoder."]
MAPPINGS = ["state_dict", "model", "model_ema", "teacher", "student", "optimizer", "other"]


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            part, kind = name.split(".")
            if not hasattr(self, part):
                self.add_module(part, nn.Module())
            getattr(self, part).register_parameter(kind, nn.Parameter(torch.zeros(shape)))


STATES = st.lists(st.tuples(st.sampled_from(PREFIXES), st.sets(st.sampled_from([*SHAPES, "more.weight"]))), max_size=2)
FULL = st.lists(st.tuples(st.sampled_from(PREFIXES), st.just(set(SHAPES))), min_size=1, max_size=1)
PATTERNS = st.lists(
    st.sampled_from(["top.*", "more.*", "*.weight", "decoder.*", "encoder.*", "*more*", "module.*"]), max_size=2
)


def state_of(parts: list[tuple[str, set[str]]], number: float) -> dict[str, Tensor]:
    names = {prefix + name: SHAPES.get(name, (1,)) for prefix, each in parts for name in sorted(each)}
    return {name: torch.full(shape, number + i / 100) for i, (name, shape) in enumerate(names.items())}


def chosen(content: dict, key: str | None) -> dict | None:
    """The state dict that ``key`` selects, or the only one in the checkpoint; None if it is ambiguous or missing."""
    if key is not None:
        inside = {name.removeprefix(f"{key}."): t for name, t in content.items() if name.startswith(f"{key}.")}
        sets = [name for name in MAPPINGS[:5] if content.get(name)]
        if key not in content and len(sets) == 1:
            return chosen(content[sets[0]], key)
        return content.get(key) or inside or None
    sets = [name for name in MAPPINGS[:5] if content.get(name)]
    if len(sets) > 1:
        return None
    return content[sets[0]] if sets else content


def fits(state: dict[str, Tensor], prefix: str, ignore: list[str]) -> dict[str, Tensor] | None:
    """The tensors that the model loads after removing a prefix; None if they do not fit."""

    def ignored(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)

    # Prefixes of whole-model wrappers are removed, unless two names would become equal.
    short = {name: name.removeprefix(prefix) for name in state}
    bare = {name: re.sub(r"^((module|backbone|model)\.)+", "", each) for name, each in short.items()}
    if len(set(bare.values())) < len(bare):
        bare = short
    if len(set(bare.values())) < len(bare):
        return None
    left_out = {bare[name] for name in state if ignored(name)} | {name for name in SHAPES if ignored(name)}
    rest = {bare[name]: tensor for name, tensor in state.items() if bare[name] not in left_out}
    wanted = {name: shape for name, shape in SHAPES.items() if name not in left_out}
    return rest if wanted and {name: tuple(t.shape) for name, t in rest.items()} == wanted else None


@hypothesis.given(
    st.one_of(STATES, FULL),
    st.dictionaries(st.sampled_from(MAPPINGS), st.one_of(STATES, FULL), max_size=3),
    st.one_of(st.none(), st.sampled_from(MAPPINGS)),
    PATTERNS,
    st.booleans(),
)
def test_fuzz_prefixes_sets_and_patterns(tmp_path_factory, flat, sets, key, ignore, nested):
    path, model = tmp_path_factory.getbasetemp() / "sets.pt", Stem()
    content = {name: state_of(parts, i + 1) for i, (name, parts) in enumerate(sets.items())} if nested else {}
    content = content or state_of(flat, 1)
    torch.save(content, path)
    loaded = only_weights_error(model, path, key=key, ignore=ignore)
    state = chosen(content, key)
    possible = []
    if state and all(isinstance(value, Tensor) for value in state.values()):
        chains = [
            "",
            *(prefix for prefix in PREFIXES if prefix not in ("", "decoder.")),
            "teacher.",
            "student.",
            "module.",
        ]
        possible = [found for chain in chains if (found := fits(state, chain, ignore)) is not None]
    names = [*SHAPES, *(state or ())]
    if not all(fnmatch.filter(names, pattern) for pattern in ignore):
        possible = []
    assert loaded == bool(possible)
    if loaded:
        after = model.state_dict()
        assert any(
            all(torch.equal(after[name], found.get(name, torch.zeros(shape))) for name, shape in SHAPES.items())
            for found in possible
        )
