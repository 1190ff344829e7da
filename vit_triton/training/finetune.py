"""Fine-tuning: what trains, at which rates, and low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_triton.training.config import NEW_HEAD_RATE, TrainConfig
from vit_triton.training.data import seed_of
from vit_triton.training.extras import extra
from vit_triton.training.networks import Network
from vit_triton.weights import save_weights
from vit_triton.weights.atomic import write_atomically

__all__ = [
    "adapted_modules",
    "merge",
    "mixer",
    "moving_average",
    "parameter_groups",
    "prepare",
    "save_adapter",
    "set_mode",
]

ADAPTER, MERGED = "adapter", "merged.safetensors"
# Positions, learned tokens and the like, which have no weight decay, whatever their shape.
UNDECAYED = re.compile(r"(pos_embed|pos_embedding|position_embeddings?|_tokens?|relative_position_bias_table)$")


def prepare(network: Network, config: TrainConfig) -> None:
    """Freeze the parameters that ``config.tune`` does not train; insert adapters for ``lora``.

    Raises:
        ImportError: peft is not installed; the message names the extra.
        ValueError: The model has no blocks, or fewer than K.
    """
    model = network.model
    if config.tune == "full":
        return
    if config.tune != "head" and not network.blocks:
        raise ValueError(f"tune {config.tune} requires a model with Transformer blocks, got {config.model}")
    head, parameters = set(network.head), [name for name, _ in model.named_parameters()]
    if config.tune == "lora":
        _insert_adapters(network, config)
        trains: Callable[[str], bool] = lambda name: name in head or ".lora_" in name  # noqa: E731
    elif config.last_blocks is not None:
        k, blocks = config.last_blocks, network.blocks
        if k > len(blocks):
            raise ValueError(f"tune must be at most last-{len(blocks)}, all blocks of {config.model}, got last-{k}")
        inside = tuple(f"{name}." for name in blocks[-k:])
        trained = head | {name for name in parameters if name.startswith(inside)} | set(_final_norm(network))
        trains = trained.__contains__
    else:
        trains = head.__contains__
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parameter.requires_grad and trains(name) or name in head


def _final_norm(network: Network) -> list[str]:
    """Return the names of the parameters between the last block and the head."""
    names = [name for name, _ in network.model.named_parameters()]
    last = max(i for i, name in enumerate(names) if name.startswith(f"{network.blocks[-1]}."))
    # a norm before the blocks in a ViT or SimpleViT: it is registered first
    own = [name for name in names if name.startswith("transformer.norm.")]
    return own + [name for name in names[last + 1 :] if name not in network.head]


def set_mode(network: Network, config: TrainConfig) -> None:
    """Set the training mode of what trains, and eval mode of the rest: its dropout, stochastic depth and statistics."""
    model = network.model.train(config.tune == "full")
    if config.tune == "full":
        return
    inside = network.blocks[-config.last_blocks :] if config.last_blocks else ()
    for name, module in model.named_modules():
        if name.startswith(tuple(f"{block}." for block in inside)) or name in inside:
            module.train()
        elif any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.train()


# --- rates -------------------------------------------------------------------------------------------------


def parameter_groups(network: Network, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer, with rate and weight decay of each.

    Raises:
        ValueError: ``layer_decay`` has no effect.
    """
    parameters = {name: p for name, p in network.model.named_parameters() if p.requires_grad}
    undecayed = set(getattr(network.model, "no_weight_decay", set)())
    rates = {name: config.rate * scale for name, scale in _layer_scales(network, config, parameters).items()}
    if config.layer_decay is not None and len({rates[name] for name in parameters if name not in network.head}) < 2:
        raise ValueError(f"layer_decay {config.layer_decay} has no effect: all that trains has the same rate")
    if config.is_pretrained:
        rates |= {name: max(config.rate, NEW_HEAD_RATE) for name in network.head}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim > 1 and name not in undecayed and not UNDECAYED.search(name)
        key = rates[name], decays
        if key not in groups:
            groups[key] = {"params": [], "lr": rates[name], "weight_decay": config.weight_decay if decays else 0.0}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _layer_scales(network: Network, config: TrainConfig, parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    """Return the factor of the rate of each parameter by layer decay."""
    decay = config.layer_decay
    if decay is None:
        return dict.fromkeys(parameters, 1.0)
    if config.library == "timm":  # torch's AdamW ignores the lr_scale of these groups
        groups = extra("timm.optim", "finetune").param_groups_layer_decay(network.model, layer_decay=decay)
        of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
        return {name: float(of[id(parameter)]) for name, parameter in parameters.items()}
    names = [name for name, _ in network.model.named_parameters()]
    final = {*network.head, *(_final_norm(network) if network.blocks else ())}
    depths = {}
    depth = 0  # parameters between blocks, such as Swin's merging, belong to the block before
    for name in names:
        inside = [i for i, block in enumerate(network.blocks) if name.startswith(f"{block}.")]
        depth = inside[0] + 1 if inside else depth
        depths[name] = len(network.blocks) + 1 if name in final else depth
    return {name: decay ** (len(network.blocks) + 1 - depths[name]) for name in parameters}


# --- LoRA --------------------------------------------------------------------------------------------------


def adapted_modules(network: Network) -> list[str]:
    """Return the names of the Linears in the blocks, which LoRA adapts."""
    inside = tuple(f"{block}." for block in network.blocks)
    modules = network.model.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and name.startswith(inside)]


def _lora_config(network: Network, config: TrainConfig) -> Any:
    return extra("peft", "finetune").LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        # a list would also match names that end in one of these
        target_modules="|".join(map(re.escape, adapted_modules(network))),
        modules_to_save=sorted({name.rpartition(".")[0] for name in network.head}),
    )


def _insert_adapters(network: Network, config: TrainConfig) -> None:
    peft, options = extra("peft", "finetune"), _lora_config(network, config)
    options.modules_to_save = None  # the head trains as it is
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(config.seed, 1))
        peft.inject_adapter_in_model(options, network.model)


def merge(model: nn.Module) -> nn.Module:
    """Add the adapters to the weights of their Linears, in place."""
    layers = extra("peft.tuners.tuners_utils", "finetune").BaseTunerLayer
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, layers):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def save_adapter(model: nn.Module, network: Network, config: TrainConfig, folder: Path) -> None:
    """Write the adapter, for ``peft.PeftModel.from_pretrained``, and the merged weights of ``model``; it is merged."""
    (folder / ADAPTER).mkdir(exist_ok=True)
    state = {k: x for k, x in model.state_dict().items() if ".lora_" in k or k in network.head}
    state = {f"base_model.model.{k.replace('.default.', '.')}": x.cpu().contiguous() for k, x in state.items()}
    data = extra("safetensors.torch", "finetune").save(state, {"format": "pt"})
    write_atomically(folder / ADAPTER / "adapter_model.safetensors", lambda file: file.write(data))
    merge(model)
    _lora_config(network, config).save_pretrained(folder / ADAPTER)
    save_weights(model, folder / MERGED)


# --- averages and mixtures ---------------------------------------------------------------------------------


def moving_average(model: nn.Module, config: TrainConfig) -> Any:
    """Return timm's moving average of the weights, or None. Its decay rises to ``config.ema`` with the steps."""
    if config.ema is None:
        return None
    return extra("timm.utils", "finetune").ModelEmaV3(model, decay=config.ema, use_warmup=True)


def mixer(config: TrainConfig, classes: int) -> Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]:
    """Return a function (images, labels, epoch, step) -> mixed images and labels, which are probabilities if mixed.

    It depends on the seed of ``config``, epoch and step only.
    """
    v2 = extra("torchvision.transforms.v2")
    kinds = [
        kind(alpha=a, num_classes=classes) for kind, a in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if a
    ]
    if not kinds:
        return lambda images, labels, epoch, step: (images, labels)
    mix = v2.RandomChoice(kinds)

    def call(images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(config.seed, epoch, step))
            return mix(images, labels)

    return call
