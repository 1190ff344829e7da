"""The models that train here: those of this package, of timm and of Hugging Face transformers."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_triton import models
from vit_triton.integrations import accelerate
from vit_triton.training.config import TrainConfig
from vit_triton.training.extras import extra
from vit_triton.training.preprocessing import Preprocessing, default_preprocessing
from vit_triton.weights import WeightsError, load_weights
from vit_triton.weights.files import open_weights

__all__ = ["Network", "build_network", "preprocessing_of"]

# Classification heads in the naming of each library: a file need not have them, and the model has a new one.
HEADS = ("head.*", "heads.*", "head_dist.*", "mlp_head.*", "fc.*", "*classifier.*", "*pooler.*", "pre_logits/*")
POOLS = ("cls", "avg", "cls+avg")
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Network:
    """A classifier, and what fine-tuning needs to know about it.

    Attributes:
        model: images (B, C, H, W) -> logits.
        preprocessing: what it expects of its images.
        head: names of the parameters of the head.
        blocks: names of the Transformer blocks in order; empty for a CNN.
        tokens: images -> features (B, N, F) before pooling and head; of a CNN, one per position.
        class_token: whether the first token is a class token.
        prefix: number of tokens before the patches.
    """

    model: nn.Module
    preprocessing: Preprocessing
    head: tuple[str, ...]
    blocks: tuple[str, ...]
    tokens: Callable[[Tensor], Any]
    class_token: bool
    prefix: int

    def features(self, images: Tensor, pool: str = "cls") -> Tensor:
        """Compute features (B, F): the class token, the mean of the patches, or both, concatenated.

        Raises:
            ValueError: The model has no such features.
        """
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if pool != "avg" and not self.class_token:
            raise ValueError(f"pool: the model has no class token, got {pool!r}; use avg")
        tokens = self.tokens(images)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            raise ValueError("the model has no features of its patches")
        parts = {"cls": lambda: tokens[:, 0], "avg": lambda: tokens[:, self.prefix :].mean(1)}
        return torch.cat([parts[part]() for part in pool.split("+")], 1)


def preprocessing_of(config: TrainConfig) -> Preprocessing | None:
    """Return what the model of ``config`` expects of its images; None for a ViT or SimpleViT, which take any channels.

    Raises:
        ImportError: The model's library is not installed; the message names the extra.
        ValueError: The image size is not a multiple of the patch size, or the model does not exist.
    """
    library, _, name = config.model.partition(":")
    if library == "timm":
        return _timm_preprocessing(name, config)
    if library == "hf":
        return _hugging_face_preprocessing(name, config)
    sizes = config.sizes()
    _check_size(sizes["image_size"], sizes["patch_size"])
    return default_preprocessing(config, 3) if config.model == "SwinTransformer" else None


def build_network(config: TrainConfig, classes: int, channels: int, *, load: bool = True) -> Network:
    """Create the model of ``config`` on the kernels where they support it; a pretrained one has a new head of zeros.

    Initial weights depend on the seed of ``config`` only.

    Args:
        config: options.
        classes: number of classes.
        channels: channels of the images, for a ViT or SimpleViT.
        load: load pretrained weights. Without, a checkpoint replaces all weights.

    Raises:
        FileNotFoundError: Model or weights are missing; the message names the file.
        ImportError: The model's library is not installed; the message names the extra.
        ValueError: An option is invalid, or the weights do not match the model.
    """
    library, _, name = config.model.partition(":")
    build = {"timm": _timm, "hf": _hugging_face}.get(library, _own)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = build(name, config, classes, channels, load)
    own = dict(network.model.named_parameters())
    with torch.no_grad():
        for part in network.head if config.is_pretrained else ():  # the first loss is the logarithm of the classes
            own[part].zero_()
    for each, parameter in own.items():
        if each.endswith("mask_token"):  # only for pretraining; DistributedDataParallel refuses unused parameters
            parameter.requires_grad = False
    if library in ("timm", "hf"):
        accelerate(network.model, config.backend)
    return network


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the Transformer blocks: members of a list that have an attention as a child."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for child, block in module.named_children():
                if any("attn" in part or part.startswith("attention") for part, _ in block.named_children()):
                    names.append(f"{name}.{child}".lstrip("."))
    return tuple(names)


def _check_size(size: int, patch: int) -> None:
    if size % patch:
        raise ValueError(f"image_size must be a multiple of the patch size {patch}, got {size}")


# --- weights -----------------------------------------------------------------------------------------------


def _load(model: nn.Module, head: tuple[str, ...], config: TrainConfig) -> None:
    """Load the file ``config.weights`` into a model, except its head."""
    path = Path(str(config.weights))
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path}: no such file")
    try:
        with open_weights(path, None) as (tensors, others):
            names = {*tensors, *others, *model.state_dict()}
        for pattern in config.ignore:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"ignore {pattern!r} matches no name in {path.name} or the model")
        load_weights(model, path, ignore=(*config.ignore, *HEADS, *head))
    except WeightsError as error:
        if not _load_by_timm(model, head, path, config):
            raise ValueError(f"weights {_mismatch(error)}") from error


def _mismatch(error: WeightsError) -> str:
    """Describe weights that do not match in one line, with the first name of each kind."""
    kinds = {"not in the file": error.missing, "not in the model": error.unexpected, "different": error.mismatched}
    parts = []
    for what, names in kinds.items():
        if names:
            parts.append(f"{what}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return " ".join([str(error).splitlines()[0], "; ".join(parts)]).strip()


def _load_by_timm(model: nn.Module, head: tuple[str, ...], path: Path, config: TrainConfig) -> bool:
    """Load a file with the loader of timm, which converts the names that its models had elsewhere."""
    if not config.model.startswith("timm:") or config.ignore or path.suffix not in (".safetensors", ".pt", ".pth"):
        return False
    timm = extra("timm", "finetune")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        create = timm.models.model_entrypoint(config.model.removeprefix("timm:").split(".")[0])
        convert = getattr(extra(create.__module__, "finetune"), "checkpoint_filter_fn", None)
        state = convert(state, model) if convert else state
        missing, unexpected = model.load_state_dict({k: x for k, x in state.items() if k not in head}, strict=False)
        complete = set(missing) <= set(head) and not [
            x for x in unexpected if not any(fnmatchcase(x, p) for p in HEADS)
        ]
    except Exception:  # the error of load_weights is reported instead
        complete = False
    if not complete:
        model.load_state_dict(before)
    return complete


# --- this package ------------------------------------------------------------------------------------------


def _own(name: str, config: TrainConfig, classes: int, channels: int, load: bool) -> Network:
    sizes = config.sizes()
    model: Any
    if config.model == "SwinTransformer":
        channels = 3
        swin = config.swin_sizes()
        model = models.SwinTransformer(
            sizes["patch_size"], num_classes=classes, dropout=config.dropout, backend=config.backend, **swin
        )
        blocks, head = block_names(model), "head"
    else:
        options: dict[str, Any] = dict(num_classes=classes, channels=channels, backend=config.backend, **sizes)
        if config.model == "ViT":
            options |= dict(dropout=config.dropout, emb_dropout=config.dropout)
        model = getattr(models, config.model)(**options)
        blocks = tuple(f"transformer.layers.{i}" for i in range(sizes["depth"]))
        head = "mlp_head" if config.model == "ViT" else "linear_head"
        with torch.no_grad():
            for each, parameter in model.named_parameters():
                if each in ("pos_embedding", "cls_token"):
                    parameter.mul_(0.02)  # vit_pytorch's unit variance is too large compared with the patches
    names = _parameters(model, head)
    if load and config.weights not in (None, "none"):
        _load(model, names, config)
    class_token = config.model == "ViT"

    def tokens(images: Tensor) -> Tensor:
        if config.model == "SwinTransformer":
            return model.norm(model.features(images)).flatten(1, 2)
        return model.transformer(model.embed(images))

    preprocessing = default_preprocessing(config, channels)
    return Network(model, preprocessing, names, blocks, tokens, class_token, int(class_token))


def _parameters(model: nn.Module, *modules: str) -> tuple[str, ...]:
    prefixes = tuple(f"{name}." for name in modules)
    return tuple(name for name, _ in model.named_parameters() if name.startswith(prefixes))


# --- timm --------------------------------------------------------------------------------------------------


def _create_timm(name: str, config: TrainConfig, **options: Any) -> Any:
    """Create a model of timm for the image size of ``config``."""
    timm = extra("timm", "finetune")
    if not timm.is_model(name):
        raise ValueError(f"model must be a model of timm, see timm.list_models(), got timm:{name}")
    size = {} if config.image_size is None else {"img_size": config.image_size}
    try:
        return timm.create_model(name, **size, **options)
    except TypeError:  # a CNN, which takes any size
        if not size:
            raise
        return timm.create_model(name, **options)


def _timm_preprocessing(name: str, config: TrainConfig) -> Preprocessing:
    timm = extra("timm", "finetune")
    with torch.device("meta"):
        model = _create_timm(name, config)
    facts = timm.data.resolve_model_data_config(model)
    side = config.image_size or facts["input_size"][-1]
    if hasattr(model, "patch_embed"):
        _check_size(side, model.feature_info[-1]["reduction"])
    return Preprocessing((side, side), tuple(facts["mean"]), tuple(facts["std"]), 3, facts["interpolation"])


def _timm(name: str, config: TrainConfig, classes: int, channels: int, load: bool) -> Network:
    preprocessing = _timm_preprocessing(name, config)
    download = load and config.weights is None
    if download:
        try:
            model = _create_timm(name, config, num_classes=classes, pretrained=True)
        except Exception as error:  # a failed download can raise many types
            first = str(error).strip().splitlines() or [""]
            raise FileNotFoundError(
                f"the weights of {config.model} are not cached and cannot be downloaded ({type(error).__name__}: "
                f"{first[0].rstrip('.')}); pass --weights FILE, or --weights none for initial weights"
            ) from error
    else:
        model = _create_timm(name, config, num_classes=classes)
    classifier = model.pretrained_cfg.get("classifier") or ()
    head = _parameters(model, *([classifier] if isinstance(classifier, str) else classifier))
    if load and not download and config.weights != "none":
        _load(model, head, config)

    def tokens(images: Tensor) -> Any:
        out = model.forward_features(images)
        if not isinstance(out, Tensor) or out.ndim != 4:
            return out
        return out.flatten(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else out.flatten(2).transpose(1, 2)

    class_token = getattr(model, "cls_token", None) is not None
    prefix = int(getattr(model, "num_prefix_tokens", class_token))
    return Network(model, preprocessing, head, block_names(model), tokens, class_token, prefix)


# --- Hugging Face ------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A classifier of transformers as images -> logits. Positions are interpolated to the size of the images."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, **self.options).logits


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{error}: hf: models require its package, pip install transformers") from error


def _folder(name: str) -> Path:
    folder = Path(name)
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"model: hf:{name} must be a folder with config.json and preprocessor_config.json")
    return folder


def _hugging_face_config(name: str) -> Any:
    transformers = _transformers()
    try:
        return transformers.AutoConfig.from_pretrained(_folder(name))
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"model hf:{name} has an invalid config.json: {str(error).splitlines()[0]}") from error


def _hugging_face_preprocessing(name: str, config: TrainConfig) -> Preprocessing:
    transformers, kind = _transformers(), _hugging_face_config(name)
    # its settings only: creating the processor can require further packages
    facts, _ = transformers.ImageProcessingMixin.get_image_processor_dict(_folder(name))
    size = facts.get("crop_size") if facts.get("do_center_crop") else None
    size = facts.get("size") if size is None else size
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    side: Any = config.image_size or size or getattr(kind, "image_size", 224)
    patch = getattr(kind, "patch_size", None)
    if isinstance(patch, int):
        _check_size(side, patch)
    mean, std = (tuple(facts.get(f"image_{part}", HALF)) for part in ("mean", "std"))
    interpolation = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(facts.get("resample", 2), "bicubic")
    return Preprocessing((side, side), mean, std, 3, interpolation)


def _hugging_face(name: str, config: TrainConfig, classes: int, channels: int, load: bool) -> Network:
    transformers, kind = _transformers(), _hugging_face_config(name)
    preprocessing = _hugging_face_preprocessing(name, config)
    auto = transformers.AutoModelForImageClassification
    kind.num_labels = classes
    try:
        if load and config.weights is None:
            inner, loaded = auto.from_pretrained(
                _folder(name), config=kind, ignore_mismatched_sizes=True, output_loading_info=True
            )
        else:
            inner, loaded = auto.from_config(kind), {"missing_keys": ()}
    except (OSError, ValueError) as error:
        raise ValueError(f"model hf:{name} cannot be loaded: {str(error).splitlines()[0]}") from error
    own = tuple(each for each, _ in inner.named_parameters())
    inner_head = tuple(each for each in own if re.search(r"(^|\.|_)(classifier|head)\.", each))
    if missing := sorted(set(loaded["missing_keys"]) - set(inner_head)):  # transformers draws them at random
        raise ValueError(f"model hf:{name} has no weights for {', '.join(missing[:3])}")
    if load and config.weights not in (None, "none"):
        _load(inner, inner_head, config)
    has_positions = getattr(kind, "image_size", None) not in (None, preprocessing.size[0])
    resized = has_positions and any("position_embeddings" in each for each in own)
    model = Classifier(inner, {"interpolate_pos_encoding": True} if resized else {})

    def tokens(images: Tensor) -> Any:
        out = inner.base_model(images, **model.options).last_hidden_state
        return out.flatten(2).transpose(1, 2) if out.ndim == 4 else out

    prefixes = dict(_prefix_tokens(inner))
    head = tuple(f"model.{each}" for each in inner_head)
    return Network(
        model, preprocessing, head, block_names(model), tokens, "cls_token" in prefixes, sum(prefixes.values())
    )


def _prefix_tokens(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the names of the prefix tokens of a model, and how many tokens each of them is."""
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("cls_token", "distillation_token", "register_tokens"):
            yield last, parameter.shape[1]
