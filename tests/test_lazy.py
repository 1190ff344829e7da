"""Public names are imported on first use; help and argument errors of the command line do not import PyTorch."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vit_triton
from vit_triton import training
from vit_triton.cli.commands import COMMANDS

HEAVY = ("torch", "triton", "numpy", "PIL", "rich", "matplotlib", "sklearn")

# runs a command line, then prints the slow imports that it made
COMMAND = f"""
import sys
from vit_triton.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("imported", [name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])


def test_import_loads_no_slow_modules():
    code = f"""
import sys, vit_triton
assert not (found := [name for name in {HEAVY} if name in sys.modules]), found
assert "ViT" in dir(vit_triton) and "torch" not in sys.modules
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--help", 0, "usage: vit-triton [-h]"),
        ("--version", 0, f"vit_triton {vit_triton.__version__}"),
        *((f"{command} --help", 0, f"usage: vit-triton {command} [-h]") for command in COMMANDS if command != "bench"),
        ("", 2, "the following arguments are required"),
        ("paint", 2, "invalid choice: 'paint'"),
        ("train", 2, "the following arguments are required: data"),
        ("train digits --backend cuda", 2, "--backend: invalid choice: 'cuda'"),
        ("tune --dtype int8", 2, "--dtype: invalid choice: 'int8'"),
        ("tune --model ViT-X/16", 2, "--model: invalid choice: 'ViT-X/16'"),
    ],
)
def test_help_and_usage_errors_load_no_slow_modules(words, code, text):
    result = python(COMMAND, *words.split())
    assert result.returncode == code and text in result.stdout + result.stderr, result.stderr
    assert result.stdout.splitlines()[-1] == "imported []"


def declared(package) -> dict[str, object]:
    """The object that mypy and the API reference assign to each name."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    names = {}
    for statement in block.body:
        for alias in statement.names:
            module = statement.module
            if module == package.__name__:  # the name is a submodule
                names[alias.name] = importlib.import_module(f"{module}.{alias.name}")
            else:
                names[alias.name] = getattr(importlib.import_module(module), alias.name)
    return names


@pytest.mark.parametrize("package", [vit_triton, training], ids=lambda package: package.__name__)
def test_lazy_names_match_the_declared_objects(package, monkeypatch):
    expected = declared(package)
    assert expected.keys() <= set(package.__all__) <= set(dir(package))
    for name, value in expected.items():
        monkeypatch.delitem(vars(package), name, raising=False)
        assert getattr(package, name) is value is vars(package)[name]


def test_every_name_is_declared():
    assert declared(vit_triton).keys() == set(vit_triton.__all__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"^module 'vit_triton' has no attribute 'VIT'$"):
        vit_triton.VIT  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'VIT'"):
        from vit_triton import VIT  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        "from vit_triton import *; assert ViT and functional.linear and accelerate",
        "import vit_triton; vit_triton.models.ViT, vit_triton.modules.Attention, vit_triton.weights.load_weights",
        "import vit_triton.functional as F; F.linear",
        "from vit_triton import training; training.train, training.loop.Run, training.TrainConfig",
        "import pickle, vit_triton; assert pickle.loads(pickle.dumps(vit_triton.ViT)) is vit_triton.ViT",
        "import pickle; assert pickle.loads(b'cvit_triton\\nViT\\n.').__name__ == 'ViT'",
        "import vit_triton, vit_triton.ops, torch; torch.ops.vit_triton.linear_fwd",
        "import torch, vit_triton; torch.ops.vit_triton.linear_fwd",
    ],
)
def test_first_use_in_a_new_process(code):
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_first_use_inside_torch_compile():
    result = python("""
import torch, vit_triton

@torch.compile(backend="eager", fullgraph=True)
def norm(x):
    return vit_triton.functional.layer_norm(x, None, None, backend="torch")

x = torch.randn(2, 8)
torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x, (8,)))
""")
    assert result.returncode == 0, result.stderr
