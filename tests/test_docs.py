"""Code blocks of the documentation: Python blocks run on small models, and every command line is parsed."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run

for name in ("matplotlib", "PIL", "rich", "timm", "transformers"):
    pytest.importorskip(name)
import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402
from test_weights import DEPTH, DIM, HEADS, as_jax  # noqa: E402

import benchmarks.__main__  # noqa: E402
import vit_triton  # noqa: E402
from vit_triton import training  # noqa: E402
from vit_triton.cli import commands  # noqa: E402
from vit_triton.training import sources  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    ]
}


def line_of(text: str, position: int) -> int:
    return text[:position].count("\n") + 1


BLOCKS = [
    (f"{page}:{line_of(text, match.start())}", match[1], match[2])
    for page, text in PAGES.items()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
PYTHON = {where: code for where, language, code in BLOCKS if language == "python"}
# includes commands with arguments in running text
COMMANDS = {
    f"{where}, {i}": command
    for where, text in [(where, code) for where, language, code in BLOCKS if language == ""]
    + [(f"{page}:{line_of(text, match.start())}", match[1]) for page, text in PAGES.items() for match in
       re.finditer(r"`((?:python -m \w+|vit-triton \w+|make) [^`]*)`", text)]
    for i, command in enumerate(text.replace("\\\n", " ").strip().split("\n"))
}  # fmt: skip


def test_blocks_are_python_or_commands():
    assert {language for _, language, _ in BLOCKS} <= {"python", "text", ""}
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(BLOCKS)
    assert len(PYTHON) >= 6 and len(COMMANDS) >= 40


@pytest.mark.parametrize("page", PAGES)
def test_link_targets_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, heading = target.partition("#")
        if target.startswith("https://"):
            continue
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if heading:
            headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                        for line in found.read_text(encoding="utf-8").splitlines() if line.startswith("#")]  # fmt: skip
            assert heading in headings, target


def test_the_api_reference_has_every_public_name():
    shown = set(re.findall(r"^::: ([\w.]+)$", "\n".join(PAGES.values()), re.MULTILINE))
    for package in (vit_triton, training):
        names = {f"{package.__name__}.{name}" for name in package.__all__}
        assert names - {"vit_triton.training.add_arguments", "vit_triton.training.config_from"} <= shown


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Replace other libraries' models by small ones of the same kind, and create the files that the blocks read."""
    create = timm.create_model
    sizes = dict(embed_dim=DIM, depth=DEPTH, num_heads=HEADS)

    def create_model(name, pretrained=False, **options):
        return create(name, **{**({} if "swin" in name else sizes), **options})

    monkeypatch.setattr(timm, "create_model", create_model)

    def from_pretrained(kind, name, **options):
        family = transformers.Dinov2Config if "dinov2" in name else transformers.ViTConfig
        config = family(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=2 * DIM)
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)

    automatic = transformers.models.auto.auto_factory._BaseAutoModelClass
    # AutoModel too: a patch in another test leaves its own attribute on it
    for kind in (automatic, transformers.AutoModel, transformers.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))
    build = torchvision.models.swin_t
    monkeypatch.setattr(torchvision.models, "swin_t", lambda weights=None: build())
    np.savez(tmp_path / "B_16.npz", **as_jax(timm.create_model("vit_base_patch16_224")))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_process():
    """The process group that torchrun would create."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def given() -> dict:
    """Names that the blocks use without defining them."""
    sizes = dict(image_size=32, patch_size=16, num_classes=3, dim=16, depth=2, heads=2, dim_head=8, mlp_dim=32)
    return {
        "img": torch.randn(1, 3, 256, 256),
        "images": torch.randn(2, 3, 224, 224),
        "model": vit_triton.ViT(**sizes),
        "fully_shard": torch.distributed.fsdp.fully_shard,
    }


@pytest.mark.parametrize("where", PYTHON)
def test_python_runs(where, small, one_process, capsys):
    code = compile(PYTHON[where], where, "exec")
    names = {name: value for name, value in given().items() if name in code.co_names}
    exec(code, names)
    for result in names.keys() & {"preds", "logits"}:
        assert names[result].shape == (1, 1000) and torch.isfinite(names[result]).all()


def test_table_matches_the_output_of_accelerate():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    tables = [text for where, language, text in BLOCKS if language == "text" and where.startswith("README.md")]
    assert tables == [f"{vit_triton.accelerate(model)}\n"]


class Parsed(Exception):
    """Raised in place of the command's action."""


@pytest.mark.parametrize("where", COMMANDS)
def test_commands_are_parsed(where, monkeypatch):
    def parsed(*args, **options):
        raise Parsed

    words = shlex.split(COMMANDS[where], comments=True)
    if " ".join(words) in sources.TENSORBAY:
        return
    if words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"\.(?:\[([\w-]+)\])?", words[2])[1]
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert extra is None or re.search(rf"^{extra} = \[", project, re.MULTILINE)
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return
    if "=" in words[0]:
        variable = words.pop(0).partition("=")[0]
        assert any(f'"{variable}"' in path.read_text(encoding="utf-8") for path in ROOT.glob("vit_triton/**/*.py"))
        assert words == ["python", "my_script.py"]
        return
    if words[0] == "torchrun":
        arguments = torch.distributed.run.get_args_parser().parse_args(words[1:])
        assert arguments.module
        words = ["python", "-m", arguments.training_script, *arguments.training_script_args]
    if words[:3] == ["python", "-m", "vit_triton.cli"]:
        words[:3] = ["vit-triton"]
    if words[0] == "vit-triton":
        options = commands.parser().parse_args(words[1:])
        if options.command == "train":
            training.config_from(options)
        if options.command != "bench":
            return
        words = ["python", "-m", "benchmarks", *options.arguments]
    assert words[:3] == ["python", "-m", "benchmarks"], "unknown command"
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # accept --device cuda
    for command in benchmarks.__main__.COMMANDS:
        monkeypatch.setattr(benchmarks.__main__.module(command), "run", parsed)
    with pytest.raises(Parsed):
        benchmarks.__main__.main()
