"""Models selected by the option ``--model``, and the image preprocessing of each.

``RUN`` is a folder that ``vit-triton train`` wrote. ``timm:NAME`` is a ``VisionTransformer``, ``Eva`` or Swin
Transformer of timm. ``hf:NAME`` is a model of Hugging Face transformers: a local folder with its files, or its name
on the Hub.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vit_triton.images import ImageError, open_image
from vit_triton.inspection import attention_maps
from vit_triton.integrations import accelerate
from vit_triton.training import load_trained
from vit_triton.training.loop import device_for
from vit_triton.training.networks import preprocessing_of
from vit_triton.training.preprocessing import default_preprocessing, is_photographs
from vit_triton.weights import WeightsError, load_weights

BATCH = 8  # images per forward pass
# Classification heads in the naming of each library. Their weights are optional for features and attention.
HEADS = ("head.*", "heads.*", "head_dist.*", "mlp_head.*", "*classifier.*", "*pooler.*", "pre_logits/*")
# the class token comes first, the patches last; Swin has only patches
HUGGING_FACE = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "swin")
FOLDER_FILES = {
    "config.json": "the architecture of the model",
    "preprocessor_config.json": "the size and normalization of images",
    "model.safetensors": "the weights",
}
TIMM = ("VisionTransformer", "Eva", "SwinTransformer", "SwinTransformerV2")


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a model: a square center crop, resized to ``size`` and normalized."""

    size: int
    crop_pct: float = 1.0  # side of the crop / shorter side of the image
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = Image.Resampling.BILINEAR

    def crop_image(self, image: Image.Image) -> Image.Image:
        """Crop and resize an RGB image to ``size`` x ``size``; gray for models with one channel."""
        side = min(image.size) * self.crop_pct
        left, top = (image.width - side) / 2, (image.height - side) / 2
        crop = image.resize((self.size, self.size), self.resample, box=(left, top, left + side, top + side))
        return crop if len(self.mean) == 3 else crop.convert("L")

    def to_tensor(self, crops: Iterable[Image.Image]) -> Tensor:
        """Return the normalized images, (B, C, size, size)."""
        pixels = torch.stack([torch.from_numpy(np.array(crop)).view(self.size, self.size, -1) for crop in crops])
        values = (pixels.float() / 255 - torch.tensor(self.mean)) / torch.tensor(self.std)
        return values.permute(0, 3, 1, 2).contiguous()


class InferenceModel:
    """A model in eval mode on its device. Its methods accept images (B, C, H, W) of :meth:`Preprocessing.to_tensor`.

    Args:
        patch: side of an output token, in pixels.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, patch: int, classes: tuple[str, ...], device: str
    ) -> None:
        self.model, self.preprocessing, self.patch, self.classes = model, preprocessing, patch, classes
        self.device = device

    @property
    def class_token(self) -> bool:
        """Whether the first token is a class token."""
        raise NotImplementedError

    def grid(self, tokens: Tensor) -> Tensor:
        """Drop the prefix tokens: (..., prefix tokens + rows * columns, dim) -> (..., rows, columns, dim)."""
        side = self.preprocessing.size // self.patch
        return tokens[..., -side * side :, :].unflatten(-2, (side, side))

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        return self.model(images)

    def features(self, images: Tensor) -> Tensor:
        """Return the output of the last norm for the patches, (B, rows, columns, dim)."""
        raise NotImplementedError

    def attention(self, images: Tensor, layer: int) -> Tensor:
        """Return the attention of the class token to the patches, (B, heads, rows, columns); without a class token, the
        attention that each patch receives, averaged over all queries."""
        maps = self.attention_maps(images, 0 if self.class_token else "mean")
        if isinstance(maps, list):
            return maps[_layer(layer, len(maps))]
        return self.grid(maps[:, _layer(layer, maps.shape[1])].unsqueeze(-1))[..., 0]

    def attention_maps(self, images: Tensor, query: int | str) -> Tensor | list[Tensor]:
        return attention_maps(self.model, images, query=query)

    def batches(
        self, paths: list[Path], refused: dict[Path, ImageError]
    ) -> Iterator[tuple[list[Path], list[Image.Image], Tensor]]:
        """Yield the paths, crops and tensor of each batch. Images that cannot be opened are added to ``refused``."""
        starts = range(0, len(paths), BATCH)
        console = Console(stderr=True)
        quiet = len(starts) < 2 or not console.is_terminal
        for start in track(starts, "images", console=console, transient=True, disable=quiet):
            opened: list[Path] = []
            crops = []
            for path in paths[start : start + BATCH]:
                try:
                    crops.append(self.preprocessing.crop_image(open_image(path)))
                    opened.append(path)
                except ImageError as error:
                    refused[path] = error
            if crops:
                yield opened, crops, self.preprocessing.to_tensor(crops).to(self.device)


class TrainedModel(InferenceModel):
    """A model that ``vit-triton train`` wrote; features and attention only of a ViT or SimpleViT."""

    def features(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return self.grid(model.transformer(model.embed(images)))

    @property
    def class_token(self) -> bool:
        model: Any = self.model
        return bool(model.pool == "cls")


class TimmModel(InferenceModel):
    """A Transformer of timm."""

    def features(self, images: Tensor) -> Tensor:
        model: Any = self.model
        features = model.forward_features(images)
        return features if features.ndim == 4 else self.grid(features)  # Swin computes a map

    @property
    def class_token(self) -> bool:
        return getattr(self.model, "cls_token", None) is not None


class HuggingFaceModel(InferenceModel):
    """A model of transformers."""

    def _run(self, images: Tensor) -> Any:
        model: Any = self.model
        resized = self.preprocessing.size != model.config.image_size and model.config.model_type != "dinov3_vit"
        return model(images, **({"interpolate_pos_encoding": True} if resized else {}))

    def logits(self, images: Tensor) -> Tensor:
        return self._run(images).logits

    def features(self, images: Tensor) -> Tensor:
        return self.grid(self._run(images).last_hidden_state)

    @property
    def class_token(self) -> bool:
        model: Any = self.model
        return bool(model.config.model_type != "swin")

    def attention_maps(self, images: Tensor, query: int | str) -> Tensor | list[Tensor]:
        return attention_maps(_Call(self._run, self.model), images, query=query)


class _Call(nn.Module):
    """Calls a function that runs the model."""

    def __init__(self, run: Callable[[Tensor], Any], model: nn.Module) -> None:
        super().__init__()
        self.run, self.model = run, model

    def forward(self, images: Tensor) -> Any:
        return self.run(images)


def _layer(layer: int, layers: int) -> int:
    if not -layers <= layer < layers:
        raise ValueError(f"--layer must be from {-layers} to {layers - 1}, got {layer}")
    return layer


# --- opening models ---------------------------------------------------------------------------------------


def open_model(options: argparse.Namespace, *, purpose: str) -> InferenceModel:
    """Open the model of ``options.model`` for a purpose: "logits", "features" or "attention".

    Raises:
        FileNotFoundError: The model or its weights are missing; the message names the file and where to put it.
        ImportError: A required package is not installed.
        ValueError: An option is invalid; the message names it.
    """
    kind, _, name = options.model.partition(":")
    device = str(device_for(options.device, options.backend))
    if options.image_size is not None and options.image_size < 1:
        raise ValueError(f"--image-size must be at least 1, got {options.image_size}")
    if name and kind in ("timm", "hf"):
        if options.weights is not None and not options.weights.is_file():
            raise FileNotFoundError(f"--weights: {options.weights}: no such file")
        for option in ("key", "grid", "resample"):
            if getattr(options, option) and options.weights is None:
                raise ValueError(f"--{option} requires --weights")
        model = (_timm if kind == "timm" else _hugging_face)(name, options, device, purpose)
        accelerate(model.model, options.backend)
    else:
        for option in ("weights", "ignore", "key", "grid", "resample", "image_size"):
            if getattr(options, option):
                raise ValueError(f"--{option.replace('_', '-')} requires a timm: or hf: model, got {options.model}")
        model = _trained(Path(options.model), options.backend, device, purpose)
    if purpose == "logits" and not model.classes:
        raise ValueError(f"--model: {options.model} has no classification head")
    model.model.eval().to(device)
    return model


def _trained(folder: Path, backend: str | None, device: str, purpose: str) -> InferenceModel:
    if not folder.is_dir():
        raise FileNotFoundError(f"--model: expected a folder that train wrote, timm:NAME or hf:NAME, got {folder}")
    model, config, classes = load_trained(folder, backend=backend, device=device)
    if purpose != "logits" and config.model not in ("ViT", "SimpleViT"):
        raise ValueError(f"--model: {folder} is a {config.model}, of which only predict and eval read a run")
    channels = getattr(model, "channels", 3)
    trained = preprocessing_of(config) or default_preprocessing(config, channels)
    size = trained.size[0]
    is_gray = config.data == "digits" or config.data.startswith("idx:")
    crop_pct = size / (size * 8 // 7) if is_photographs(config.data, 1 if is_gray else channels) else 1.0
    resample = getattr(Image.Resampling, trained.interpolation.upper())
    preprocessing = Preprocessing(size, crop_pct, trained.mean, trained.std, resample)
    return TrainedModel(model, preprocessing, config.sizes()["patch_size"], classes, device)


def _timm(name: str, options: argparse.Namespace, device: str, purpose: str) -> InferenceModel:
    timm = _package("timm")
    if not timm.is_model(name):
        raise ValueError(f"--model: timm has no model {name}; {_suggest(timm, name)}")
    size = {"img_size": options.image_size} if options.image_size else {}
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # unknown tag of pretrained weights
        raise ValueError(f"--model: {error}") from error
    found = name
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **size)
        found = f"{name}, which is a {type(model).__name__}"
        if not any(cls.__name__ in TIMM for cls in type(model).__mro__):
            raise TypeError
    except TypeError:  # also raised by models that do not accept img_size
        raise ValueError(f"--model: expected one of {', '.join(TIMM)} of timm, got {found}") from None
    data_config, patch = timm.data.resolve_model_data_config(model), model.feature_info[-1]["reduction"]
    side = options.image_size or data_config["input_size"][-1]
    resample = getattr(Image.Resampling, data_config["interpolation"].upper())
    crop_pct = side / int(side / data_config["crop_pct"])  # timm's transforms truncate the resized side
    preprocessing = Preprocessing(side, crop_pct, tuple(data_config["mean"]), tuple(data_config["std"]), resample)
    _check_size(preprocessing, patch, stages="Swin" in type(model).__name__)
    if options.weights is not None:
        model = timm.create_model(name, **size)
        _load(model, options, purpose)
    else:
        url = f"https://huggingface.co/{pretrained_cfg.hf_hub_id}/resolve/main/model.safetensors"
        try:
            _set_offline_mode()
            model = timm.create_model(name, pretrained=True, **size)
        except Exception as error:  # a failed download can raise many types
            where = url if pretrained_cfg.hf_hub_id else pretrained_cfg.url
            get = f"Download {where} and pass the file" if where else "Pass a file"
            raise FileNotFoundError(
                f"the weights of {options.model} are not cached and cannot be downloaded ({_first_line(error)}). "
                f"{get}: --weights FILE"
            ) from error
    return TimmModel(model, preprocessing, patch, _classes(model.num_classes), device)


def _suggest(timm: Any, name: str) -> str:
    """Return which names of timm contain or resemble an unknown one."""
    if names := timm.list_models(f"*{name}*"):
        more = ", ..." if len(names) > 3 else ""
        return f"timm.list_models('*{name}*') lists {', '.join(names[:3])}{more}"
    if names := difflib.get_close_matches(name, timm.list_models(), 3):
        return f"similar names are {', '.join(names)}"
    return "timm.list_models() lists the names"


def _hugging_face(name: str, options: argparse.Namespace, device: str, purpose: str) -> InferenceModel:
    transformers = _package("transformers")
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(f"--model: {options.model}: no such folder")
    if folder.is_dir():
        _check_file(folder, options, "config.json")
    auto = transformers.AutoModelForImageClassification if purpose == "logits" else transformers.AutoModel
    try:
        _set_offline_mode()
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in HUGGING_FACE:
            raise ValueError(f"--model: model_type must be one of {', '.join(HUGGING_FACE)}, got {config.model_type}")
        # read its settings only: creating the processor can require further packages
        processor_config, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        preprocessing = _hugging_face_preprocessing(processor_config, options.image_size, config.image_size)
        patch = config.patch_size * 2 ** (len(getattr(config, "depths", "1")) - 1)  # Swin merges 2 x 2 patches
        _check_size(preprocessing, patch, stages=config.model_type == "swin")
        if options.weights is None:
            model, loaded = auto.from_pretrained(name, output_loading_info=True)
            optional = _ignored(options, purpose)
            missing = [part for part in loaded["missing_keys"] if not any(fnmatchcase(part, p) for p in optional)]
            if missing:  # transformers initializes it randomly
                raise ValueError(f"--model: {options.model} has no weights for {', '.join(sorted(missing)[:3])}")
        else:
            model = auto.from_config(config)
    except (OSError, json.JSONDecodeError) as error:
        if folder.is_dir():
            _check_file(folder, options, "preprocessor_config.json")
            if options.weights is None and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
                _check_file(folder, options, "model.safetensors")
            raise ValueError(f"--model: {options.model} has invalid files: {_first_line(error)}") from error
        files = "config.json and preprocessor_config.json"
        if options.weights is None:
            files = "config.json, preprocessor_config.json and model.safetensors"
        raise FileNotFoundError(
            f"{options.model} is not cached and cannot be downloaded ({_first_line(error)}). Put {files} "
            f"from https://huggingface.co/{name} in a folder and pass it: --model hf:FOLDER"
        ) from error
    except ValueError:
        raise
    except Exception as error:  # invalid values in the files can raise many types
        raise ValueError(f"--model: {options.model} has invalid files: {type(error).__name__}: {error}") from error
    if options.weights is not None:
        _load(model, options, purpose)
    classes: tuple[str, ...] = ()
    if purpose == "logits":
        labels = tuple(config.id2label[i] for i in range(config.num_labels))
        classes = _classes(len(labels)) if labels[0] == "LABEL_0" else labels
    return HuggingFaceModel(model, preprocessing, patch, classes, device)


def _check_file(folder: Path, options: argparse.Namespace, file: str) -> None:
    if not (folder / file).is_file():
        hint = "; --weights FILE reads them from another file" if file == "model.safetensors" else ""
        raise FileNotFoundError(f"--model: {options.model} has no {file}, which contains {FOLDER_FILES[file]}{hint}")


def _hugging_face_preprocessing(processor_config: dict[str, Any], size: int | None, default: int) -> Preprocessing:
    """Convert the settings of an image processor. Images are center-cropped, never stretched to a square."""
    resized = _side(processor_config.get("size"), default)
    cropped = _side(processor_config.get("crop_size"), resized) if processor_config.get("do_center_crop") else resized
    return Preprocessing(
        size or cropped,
        min(cropped / resized, 1.0),
        tuple(processor_config.get("image_mean", Preprocessing.mean)),
        tuple(processor_config.get("image_std", Preprocessing.std)),
        processor_config.get("resample", Preprocessing.resample),
    )


def _check_size(preprocessing: Preprocessing, patch: int, *, stages: bool) -> None:
    if preprocessing.size % patch:
        multiple = f"{patch}, the stride of the last stage" if stages else f"the patch size {patch}"
        raise ValueError(f"--image-size must be a multiple of {multiple}, got {preprocessing.size}")


def _side(size: Any, default: int) -> int:
    """Return the side of a processor's size: a number, a dict with height and width, or one with shortest_edge."""
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return default if size is None else size


def _load(model: nn.Module, options: argparse.Namespace, purpose: str) -> None:
    try:
        load_weights(
            model,
            options.weights,
            key=options.key,
            ignore=_ignored(options, purpose),
            grid=options.grid,
            resample=options.resample,
        )
    except WeightsError as error:
        raise ValueError(_mismatch_message(error)) from error


def _mismatch_message(error: WeightsError) -> str:
    """Describe mismatched weights in one line, with the first name of each kind."""
    parts = []
    for what, names in (
        ("not in the file", error.missing),
        ("not in the model", error.unexpected),
        ("different", error.mismatched),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{what}: {names[0]}{more}")
    first = str(error).splitlines()[0]
    return f"{first} {'; '.join(parts)}. Use --ignore PATTERN to skip weights" if parts else first


def _ignored(options: argparse.Namespace, purpose: str) -> tuple[str, ...]:
    return (*options.ignore, *(() if purpose == "logits" else HEADS))


def _classes(number: int) -> tuple[str, ...]:
    """Return class names: ImageNet's for 1000 classes, else the class indices."""
    if number == 1000:
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        return tuple(_IMAGENET_CATEGORIES)
    return tuple(map(str, range(number)))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"--model: {error}; install the package: pip install {name}") from error


def _set_offline_mode() -> None:
    """Enable huggingface_hub's offline mode if there is no network. Otherwise it retries for a minute."""
    hub = _package("huggingface_hub")
    if urllib.request.getproxies():  # a proxy resolves host names
        return
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        hub.constants.HF_HUB_OFFLINE = True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
