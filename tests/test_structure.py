"""Static checks of the sources: import directions, names and forbidden constructs in kernels."""

from __future__ import annotations

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vit_triton"

# The parts of the package that each part may import, besides itself. Imports point down this list only.
ARROWS: dict[str, set[str]] = {
    "cli": {
        *("__init__", "backend", "cpu", "images", "inspection", "integrations", "kernels", "names", "training"),
        *("speeds", "tables", "tuning", "weights"),
    },
    "tuning": {
        "arguments",
        "functional",
        "kernels",
        "models",
        "modules",
        "names",
        "ops",
        "packing",
        "speeds",
        "tables",
    },
    "training": {"backend", "images", "integrations", "lazy", "models", "names", "weights"},
    "__init__": {
        *(
            "arguments",
            "backend",
            "fallback",
            "functional",
            "inspection",
            "integrations",
            "lazy",
            "models",
            "modules",
            "ops",
            "packing",
            "portable",
        ),
        *("reference", "weights"),
    },
    "inspection": {"arguments", "checks", "integrations", "models", "modules", "recording", "reference"},
    "integrations": {
        *("autocast", "backend", "checks", "fallback", "functional", "models", "modules", "packing", "portable"),
        *("recording", "reference", "windows"),
    },
    "models": {"backend", "checks", "functional", "modules", "packing", "weights", "windows"},
    "images": set(),
    "weights": {"packing"},  # identifies models by their state dicts
    "modules": {"backend", "checks", "fallback", "functional", "recording"},
    "windows": {"functional", "recording"},
    "functional": {"arguments", "autocast", "autograd", "backend", "checks", "recording", "reference"},
    "recording": set(),
    "autograd": {"ops"},
    "ops": {"arguments", "cpu", "kernels", "packing"},
    "reference": {"arguments"},
    "backend": {"checks", "cpu", "kernels", "names", "packing", "portable", "speeds"},
    "packing": {"checks", "cpu", "kernels"},
    "speeds": {"tables"},
    "fallback": {"checks"},
    "checks": {"arguments", "autocast", "portable"},
    "autocast": set(),
    "portable": set(),
    "kernels": {"arguments", "tables"},
    "arguments": set(),
    "tables": set(),
    "names": set(),
    "lazy": set(),
    "cpu": set(),  # self-contained package
}

# The folders of the project that each folder may import.
FOLDERS: dict[str, set[str]] = {
    "tests": {"benchmarks", "vit_triton"},
    "benchmarks": {"vit_triton"},
    "examples": {"vit_triton"},
    "vit_triton": set(),
}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def project_sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sources(ROOT / folder)]


def part_of(path: Path) -> str:
    """The first name below the package: "models" for models/vit.py, "ops" for ops.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.AST, path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import in `tree` as (statement, dotted name); `from a import b` counts as a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield node, ".".join((*above, *filter(None, [node.module]), alias.name))


def project_modules() -> dict[str, Path]:
    """Map import names to the project's files; tests/ is on sys.path."""
    modules = {}
    for path in project_sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name.removeprefix("tests.")] = path
    return modules


def parts_imported(tree: ast.AST, path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import from the package as (statement, part); `from vit_triton import __version__` counts as __init__."""
    for node, name in imported_modules(tree, path):
        root, *rest = name.split(".")
        if root == "vit_triton":
            yield node, rest[0] if rest and rest[0] in ARROWS else "__init__"


def files_imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """The project's files that `path` imports, at any depth of its code, as paths relative to the root."""
    names = [name.removeprefix("tests.") for _, name in imported_modules(parse(path), path)]
    found = [modules.get(name) or modules.get(name.rpartition(".")[0]) for name in names]
    return {str(file.relative_to(ROOT)) for file in found if file is not None and file != path}


def test_no_import_cycle_between_files() -> None:
    modules = project_modules()
    graph = {str(path.relative_to(ROOT)): files_imported(path, modules) for path in modules.values()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the files of the cycle


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_downwards(folder: str) -> None:
    modules = project_modules()
    for path in sources(ROOT / folder):
        for target in files_imported(path, modules):
            root = target.split("/")[0]
            assert root == folder or root in FOLDERS[folder], f"{path.relative_to(ROOT)} must not import {target}"


def test_allowed_imports_have_no_cycle() -> None:
    order = list(ARROWS)
    for part, targets in ARROWS.items():
        assert all(order.index(target) > order.index(part) for target in targets), part


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in ARROWS, f"{path.name} is missing in ARROWS"
    for node, target in parts_imported(parse(path), path):
        assert target == part or target in ARROWS[part], f"line {node.lineno}: {part} must not import {target}"


def module_name(path: Path) -> str:
    """ "benchmarks.ops" for benchmarks/ops/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_import_cycle_in_the_benchmarks() -> None:
    """Imports inside functions count; importing a name from a package counts as importing its ``__init__.py``."""
    files = {module_name(path): path for path in sources(ROOT / "benchmarks")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = [name for _, name in imported_modules(parse(path), path)]
        found = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = (found & files.keys()) - {module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the files of the cycle


@pytest.mark.parametrize(
    "path",
    [path for path in sources(PACKAGE) if part_of(path) not in ("kernels", "cpu", "tuning")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_triton_and_the_kernels_are_imported_lazily(path: Path) -> None:
    tree = parse(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside_functions = {id(inner) for function in functions for inner in ast.walk(function)}
    for node, name in imported_modules(tree, path):
        if name.split(".")[0] == "triton" or name.startswith(("vit_triton.kernels", "vit_triton.cpu")):
            assert id(node) in inside_functions, f"line {node.lineno}: {name} is imported at module level"


def test_nothing_imports_the_bare_name_kernels() -> None:
    for path in project_sources():
        for node, name in imported_modules(parse(path), path):
            assert name.split(".")[0] != "kernels", f"{path.relative_to(ROOT)}, line {node.lineno}"


def test_kernels_folder_is_a_namespace_package() -> None:
    assert not (PACKAGE / "kernels" / "__init__.py").exists()


def test_kernels_link_points_to_the_package() -> None:
    link = ROOT / "kernels"
    if not link.is_symlink():
        pytest.skip("checked out without symbolic links")
    assert os.readlink(link) == "vit_triton/kernels"


@pytest.mark.parametrize("path", sources(PACKAGE / "kernels"), ids=lambda path: path.name)
def test_kernels_use_no_atomics_and_no_autotune(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Attribute):
            continue
        name = ast.unparse(node)
        assert not name.startswith("tl.atomic"), f"line {node.lineno}: atomics make the result depend on the order"
        assert name != "triton.autotune", f"line {node.lineno}: tiles are chosen by pick_*"


@pytest.mark.parametrize("path", sources(PACKAGE / "kernels"), ids=lambda path: path.name)
def test_every_masked_load_has_other(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            keywords = {keyword.arg for keyword in node.keywords}
            masked = "mask" in keywords or len(node.args) > 1
            assert not masked or "other" in keywords or len(node.args) > 2, f"line {node.lineno}"


@pytest.mark.parametrize("path", sources(PACKAGE / "kernels"), ids=lambda path: path.name)
def test_device_functions_return_no_none(path: Path) -> None:
    """Triton 3.6 converts every returned constant to a tensor, which fails for None."""
    for function in ast.walk(parse(path)):
        if not isinstance(function, ast.FunctionDef) or "jit" not in map(_last_name, function.decorator_list):
            continue
        for statement in ast.walk(function):
            if isinstance(statement, ast.Return) and statement.value is not None:
                indices = [ast.walk(node.slice) for node in ast.walk(statement) if isinstance(node, ast.Subscript)]
                returned = set(ast.walk(statement)).difference(*indices)
                constants = [node.value for node in returned if isinstance(node, ast.Constant)]
                assert None not in constants, f"line {statement.lineno}"


def _last_name(decorator: ast.expr) -> str:
    return ast.unparse(decorator).partition("(")[0].rpartition(".")[2]


FORWARD = """
import torch
model = vit_triton.ViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, dim_head=8, mlp_dim=32,
                       backend="torch")
assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
"""

# Simulates a machine without Triton: no finder finds it. The finders do not find package metadata either.
NO_TRITON = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

REFUSED = """
try:
    vit_triton.functional.layer_norm(torch.ones(2, 4), None, None, backend="triton")
except RuntimeError as error:
    assert "triton" in str(error) and "backend" in str(error), error
else:
    raise AssertionError("backend triton ran without Triton")
assert torch.isfinite(vit_triton.functional.layer_norm(torch.ones(2, 4), None, None)).all()
"""


def run_python(code: str, *, cwd: Path, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_works_without_triton_from_a_bare_checkout(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "vit_triton", ignore=shutil.ignore_patterns("__pycache__"))
    where = f"assert vit_triton.__file__.startswith({str(tmp_path)!r}), vit_triton.__file__\n"
    version = "assert vit_triton.__version__\n"
    code = NO_TRITON + "import vit_triton, vit_triton.functional\n" + where + version + FORWARD + REFUSED
    run_python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize(
    "order",
    [
        "vit_triton timm torchvision transformers",
        "transformers torchvision timm vit_triton",
        "timm vit_triton transformers torchvision",
        "torchvision vit_triton timm transformers",
    ],
)
def test_imports_in_any_order(order: str) -> None:
    for name in order.split():
        pytest.importorskip(name)
    # The repository's root as working directory puts the link `kernels` on the path: transformers must not mistake it
    # for Hugging Face's package. Accessing ViTModel triggers the lazy import.
    run_python(f"import {', '.join(order.split())}\ntransformers.ViTModel\n" + FORWARD, cwd=ROOT)
