"""Every code block of the README: Python is run, on small models, and of each command line every word is parsed."""

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
import transformers  # noqa: E402
from test_weights import DEPTH, DIM, HEADS, as_jax  # noqa: E402

import benchmarks.__main__  # noqa: E402
import vit_triton  # noqa: E402
from vit_triton import training  # noqa: E402
from vit_triton.cli import commands  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    (match[1], match[2], README[: match.start()].count("\n") + 1)
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
PYTHON = {f"line {line}": code for language, code, line in BLOCKS if language == "python"}
# Commands of the text, too, where they go on after their first words.
COMMANDS = {
    f"line {line}, {i}": command
    for text, line in [(code, line) for language, code, line in BLOCKS if language == ""]
    + [(match[1], README[: match.start()].count("\n") + 1) for match in
       re.finditer(r"`((?:python -m \w+|vit-triton \w+|make) [^`]*)`", README)]
    for i, command in enumerate(text.replace("\\\n", " ").strip().split("\n"))
}  # fmt: skip


def test_blocks_are_python_or_commands():
    assert {language for language, _, _ in BLOCKS} <= {"python", "text", ""}
    assert README.count("```") == 2 * len(BLOCKS) and len(PYTHON) >= 3 and len(COMMANDS) >= 20


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        path, _, heading = target.partition("#")
        if target.startswith("https://"):
            continue
        assert (ROOT / path).exists(), target
        if heading:
            page = (ROOT / path).read_text(encoding="utf-8") if path else README
            headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                        for line in page.splitlines() if line.startswith("#")]  # fmt: skip
            assert heading in headings, target


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Where a block loads a model of others, a small one of the same kind; the files that the blocks read."""
    create = timm.create_model
    sizes = dict(embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **o: create(name, **{**sizes, **o}))

    def from_pretrained(kind, name, **options):
        family = transformers.Dinov2Config if "dinov2" in name else transformers.ViTConfig
        config = family(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=2 * DIM)
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)

    automatic = transformers.models.auto.auto_factory._BaseAutoModelClass
    # AutoModel too: a test that has patched it leaves it with an attribute of its own
    for kind in (automatic, transformers.AutoModel, transformers.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))
    np.savez(tmp_path / "B_16.npz", **as_jax(timm.create_model("vit_base_patch16_224")))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_process():
    """The process group that torchrun would make."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def given() -> dict:
    """What the blocks take for granted."""
    sizes = dict(image_size=32, patch_size=16, num_classes=3, dim=16, depth=2, heads=2, dim_head=8, mlp_dim=32)
    return {
        "img": torch.randn(1, 3, 256, 256),
        "images": torch.randn(2, 3, 224, 224),
        "model": vit_triton.ViT(**sizes),
        "fully_shard": torch.distributed.fsdp.fully_shard,
    }


@pytest.mark.parametrize("where", PYTHON)
def test_python_runs(where, small, one_process, capsys):
    code = compile(PYTHON[where], f"README.md, {where}", "exec")
    names = {name: value for name, value in given().items() if name in code.co_names}
    exec(code, names)
    if "preds" in names:
        assert names["preds"].shape == (1, 1000) and torch.isfinite(names["preds"]).all()


def test_the_table_is_what_accelerate_prints():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    tables = [text for language, text, _ in BLOCKS if language == "text"]
    assert tables == [f"{vit_triton.accelerate(model)}\n"]


class Parsed(Exception):
    """Instead of what the command would do."""


@pytest.mark.parametrize("where", COMMANDS)
def test_commands_are_understood(where, monkeypatch):
    def parsed(*args, **options):
        raise Parsed

    words = shlex.split(COMMANDS[where], comments=True)
    if words[:2] == ["pip", "install"]:
        package, extra = re.fullmatch(r"(\w+)\[(\w+)\]", words[2]).groups()
        assert package == "vit_triton"
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
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
    assert words[:3] == ["python", "-m", "benchmarks"], "a kind of command that is not known here"
    monkeypatch.setattr(sys, "argv", words[2:])
    for command in benchmarks.__main__.COMMANDS:
        monkeypatch.setattr(benchmarks.__main__.module(command), "run", parsed)
    with pytest.raises(Parsed):
        benchmarks.__main__.main()
