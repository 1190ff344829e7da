"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

from vit_triton.backend import resolve_backend
from vit_triton.training import checkpoint, curves, finetune
from vit_triton.training.checkpoint import CURVES, METRICS
from vit_triton.training.config import TrainConfig
from vit_triton.training.data import (
    AugmentedDataset,
    Data,
    batches,
    class_weights,
    images_for_evaluation,
    load_data,
    open_data,
    seed_of,
)
from vit_triton.training.distillation import Teacher, distillation_loss
from vit_triton.training.extras import extra
from vit_triton.training.networks import Network, build_network, preprocessing_of, pretrained_classifier
from vit_triton.training.preprocessing import default_preprocessing
from vit_triton.training.sources import LABELLED, kind_of
from vit_triton.weights.atomic import write_atomically

FLUSH_EVERY = 20  # steps; reading the loss waits for the device
DRAW_EVERY = 30  # seconds
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)

# options that may change when a run is resumed
CHANGEABLE = {
    "out",
    "data",
    "data_folder",
    "download",
    "skip_damaged",
    "resume",
    "checkpoint_every",
    "workers",
    "backend",
    "device",
    "fsdp",
}


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the processes of a run."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum ``x`` over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x


def device_for(name: str | None, backend: str | None) -> torch.device:
    """Return the device called ``name``, by default a GPU if available. Each process of torchrun uses its own GPU.

    Raises:
        ValueError: The device is not available, or ``backend`` does not support it; the message names the argument.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        raise ValueError(f"device: {str(error).splitlines()[0]}") from error
    if probe.is_meta:
        raise ValueError("device: meta is not supported, since its tensors have no data")
    try:
        resolve_backend(backend, "linear", probe)
    except RuntimeError as error:
        raise ValueError(f"backend: {error}") from error
    return probe.device


@contextlib.contextmanager
def join_processes(config: TrainConfig) -> Iterator[Process]:
    """Initialize the process group if torchrun started this process."""
    device = device_for(config.device, config.backend)
    if "RANK" not in os.environ:
        if config.fsdp:
            raise ValueError("fsdp requires torchrun: torchrun --nproc-per-node N -m ...")
        yield Process(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def distribute(network: Network, config: TrainConfig, process: Process) -> nn.Module:
    """Shard a model with FSDP, block by block, or replicate it with DistributedDataParallel."""
    model = network.model
    if config.fsdp:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(process.device.type, (process.count,))
        for block in map(model.get_submodule, network.blocks):
            for part in block if isinstance(block, nn.ModuleList) else (block,):  # a list has no forward
                fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    elif process.count > 1:
        return DistributedDataParallel(model)
    return model


def load_batches(
    examples: AugmentedDataset, parts: list[list[int]], config: TrainConfig, process: Process
) -> Iterator[tuple[Tensor, Tensor]]:
    """Load batches of ``examples``, given the indices of each batch."""
    loader = DataLoader(
        examples,
        batch_sampler=parts,
        num_workers=config.workers,
        collate_fn=functools.partial(_collate, shape=examples[0][0].shape),
        pin_memory=process.device.type == "cuda",
        generator=torch.Generator(),  # the default is the generator of the dropout
    )
    try:
        yield from loader
    except ValueError as error:
        if not config.workers:
            raise
        # the message of a worker's error is its whole traceback, which ends with the type and the message
        raise type(error)(str(error).splitlines()[-1].partition(": ")[2]) from error


def _collate(examples: list[tuple[Tensor, int]], shape: torch.Size) -> Any:
    return default_collate(examples) if examples else [torch.empty(0, *shape), torch.empty(0, dtype=torch.long)]


def compute_logits(model: nn.Module, images: Tensor, config: TrainConfig, process: Process) -> Tensor:
    """Compute logits in float32."""
    half = config.precision == "bfloat16" and not config.fsdp  # FSDP has its own mixed precision
    with torch.autocast(process.device.type, torch.bfloat16, enabled=half):
        return model(images.to(process.device, non_blocking=True)).float()


def predictions(
    model: nn.Module, data: AugmentedDataset, config: TrainConfig, process: Process
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits and labels of this process's part of each batch, in order and in evaluation mode."""
    images, size = len(data), config.batch_size
    # a process may have no images in the last batch, but with FSDP all processes must run the model
    parts = [list(range(i, min(i + size, images)))[process.rank :: process.count] for i in range(0, images, size)]
    model.eval()
    for batch, labels in load_batches(data, parts, config, process):
        yield compute_logits(model, batch, config, process), labels.to(process.device)


@torch.no_grad()
def test(
    model: nn.Module, data: AugmentedDataset, config: TrainConfig, process: Process, name: str = "test"
) -> dict[str, float]:
    """Compute the loss and accuracy, "NAME_loss" and "NAME_accuracy", on images without augmentation."""
    sums = torch.zeros(2, dtype=torch.float64, device=process.device)
    for logits, labels in predictions(model, data, config, process):
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((loss, (logits.argmax(1) == labels).sum()))
    loss, right = (process.sum(sums) / len(data)).tolist()
    return {f"{name}_loss": loss, f"{name}_accuracy": right}


class Run:
    """The state of a run: model, its moving average, optimizer, schedule and step."""

    def __init__(self, config: TrainConfig, data: Data, process: Process) -> None:
        if config.batch_size % process.count:
            raise ValueError(
                f"batch_size must be divisible by the number of processes, {process.count}, got {config.batch_size}"
            )
        images = len(data.train)
        self.steps_per_epoch = images // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size must be at most the number of training images, {images}, got {config.batch_size}"
            )
        self.config, self.data, self.process = config, data, process
        if config.fsdp and (config.tune != "full" or config.ema is not None):
            raise ValueError("fsdp requires tune 'full' and no ema")
        self.network = build_network(config, len(data.classes), data.channels)
        finetune.prepare(self.network, config)
        self.model = self.network.model.to(process.device)
        self.average = finetune.moving_average(self.model, config)
        self.teacher = load_teacher(config, data, process)
        self.mix = finetune.mixer(config, len(data.classes))
        self.distributed_model = distribute(self.network, config, process)
        seed = seed_of(config.seed, process.rank)  # each process has its own dropout
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        groups = finetune.parameter_groups(self.network, config)
        self.optimizer = torch.optim.AdamW(groups, lr=config.rate, weight_decay=config.weight_decay)
        self.steps = config.epochs * self.steps_per_epoch
        self.keep = True  # keep the previous checkpoint at the next save
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)
        self.step = 0
        self.best: dict[str, Any] = {}  # step and validation of the best weights
        self.best_weights: dict[str, Any] = {}  # of the first process
        self.class_weights: Tensor | None = None
        if config.balance == "loss":
            self.class_weights = class_weights(data.train.labels, len(data.classes)).to(process.device)

    def _learning_rate_factor(self, step: int) -> float:
        rising = max(1, round(self.config.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, self.steps - rising))

    def facts(self) -> dict[str, Any]:
        """Return properties that a checkpoint must match to resume the run."""
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in CHANGEABLE | {"size"}}
        return {**config, **_sizes(self.network, self.config), **self.data.facts(), "processes": self.process.count}

    @property
    def tested_model(self) -> nn.Module:
        """The moving average of the model, if there is one, else the model."""
        return self.model if self.average is None else self.average.module

    def training_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run one step and return the loss of this process's part of the batch."""
        images, labels = self.mix(images, labels, *divmod(self.step, self.steps_per_epoch))
        logits = compute_logits(self.distributed_model, images, self.config, self.process)
        labels = labels.to(self.process.device, non_blocking=True)
        smoothing = self.config.label_smoothing
        if self.class_weights is None:
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        else:  # cross_entropy(weight=...) divides by the sum of the weights, which differs between processes
            losses = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
            weights = labels @ self.class_weights if labels.ndim == 2 else self.class_weights[labels]
            loss = (weights * losses).mean()
        if self.teacher is not None:
            wanted, config = self.teacher(images.to(self.process.device)), self.config
            loss = distillation_loss(
                logits, wanted, loss, temperature=config.temperature, alpha=config.alpha, hard=config.hard
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, step=self.step)
        return loss.detach()

    def save(self, result: dict[str, float]) -> None:
        """Write a checkpoint with the ``result`` of the last test. All processes must call it."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=FULL_STATE)
        states: list[Any] = [checkpoint.random_state(self.process.device)]
        if self.process.count > 1:
            mine, states = states[0], [None] * self.process.count
            dist.all_gather_object(states, mine)
        if self.process.is_first:
            checkpoint.save(self.config.out, {
                "model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict(),
                "step": self.step, "random": states, "facts": self.facts(),
                "config": _plain(self.network, self.config), "result": result, "best": self.best,
                "best_model": self.best_weights,
                **({} if self.average is None else {"average": self.average.module.state_dict()}),
            }, keep=self.keep)  # fmt: skip
            self.keep = True

    def keep_best(self, result: dict[str, float]) -> None:
        """Keep a copy of the weights if ``result`` is the best validation so far. All processes must call it."""
        if self.config.keep == "best" and result["val_accuracy"] > self.best.get("val_accuracy", -1.0):
            self.best = {"step": self.step, **result}
            weights: dict[str, Any] = get_model_state_dict(self.tested_model, options=FULL_STATE)
            self.best_weights = {name: tensor.clone() for name, tensor in weights.items()}

    def load_best(self, result: dict[str, float]) -> dict[str, float]:
        """Load the best weights and return their validation; ``result`` is that of the last ones."""
        if self.config.keep == "last" or self.best["step"] == self.step:
            return result
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.process.count > 1)
        set_model_state_dict(self.tested_model, self.best_weights, options=options)
        return {name: value for name, value in self.best.items() if name != "step"}

    def differences(self, state: dict[str, Any]) -> str:
        """Describe how the run of a checkpoint differs from this one, "" if it does not."""
        ours, theirs = self.facts(), state["facts"]
        return "; ".join(f"{name} {theirs.get(name)!r}, not {x!r}" for name, x in ours.items() if theirs.get(name) != x)

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.steps:
            raise ValueError(f"expected a step from 0 to {self.steps}, got {state['step']!r}")
        set_state_dict(
            self.model, self.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FULL_STATE,
        )  # fmt: skip
        if not isinstance(state["best"], dict) or not all(type(x) in (int, float) for x in state["best"].values()):
            raise ValueError(f"expected numbers of the best validation, got {state['best']!r}")
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.best, self.best_weights = state["step"], state["best"], state["best_model"]
        checkpoint.set_random_state(state["random"][self.process.rank], self.process.device)


def load_teacher(config: TrainConfig, data: Data, process: Process) -> Teacher | None:
    """Load the teacher of a run, or return None if there is none.

    Raises:
        FileNotFoundError: The folder has no checkpoint, or the weights cannot be downloaded.
        ValueError: The classes of the teacher are not those of the data.
    """
    if config.teacher is None:
        return None
    students = preprocessing_of(config) or default_preprocessing(config, data.channels)
    library, _, name = config.teacher.partition(":")
    model: Any
    if library == "timm":
        own = TrainConfig(config.data, model=config.teacher, backend=config.backend)
        model, teachers = pretrained_classifier(name, own)
        if model.num_classes != len(data.classes):
            raise ValueError(
                f"teacher: {config.teacher} has {model.num_classes} classes, {config.data} has {len(data.classes)}"
            )
    else:
        model, own, classes = load_trained(Path(config.teacher), backend=config.backend)
        if classes != data.classes:
            theirs = list(data.classes)
            raise ValueError(f"teacher: {config.teacher} has the classes {list(classes)}, {config.data} has {theirs}")
        teachers = preprocessing_of(own) or default_preprocessing(own, model.channels)
    return Teacher(model.to(process.device), teachers, students)


def _sizes(network: Network, config: TrainConfig) -> dict[str, Any]:
    """Return the sizes of a model; those of a library's model except the image size follow from its name."""
    image_size = network.preprocessing.size[0]
    if config.library is not None:
        return {"image_size": image_size}
    sizes: dict[str, Any] = config.sizes()
    if config.model == "SwinTransformer":
        sizes = {"image_size": image_size, "patch_size": sizes["patch_size"], **config.swin_sizes()}
    return sizes


def _plain(network: Network, config: TrainConfig) -> dict[str, Any]:
    """Return ``config`` with all sizes resolved, in types that a checkpoint can contain."""
    given = dataclasses.asdict(config)
    given |= {name: size for name, size in _sizes(network, config).items() if name in given}
    return {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}


class Metrics:
    """The metrics file, with one line of JSON per step and test."""

    def __init__(self, path: Path, process: Process, step: int) -> None:
        self.path, self.process = path, process
        self.pending_losses: list[tuple[dict[str, Any], Tensor]] = []
        self.loss: float | None = None  # the last loss that was read
        if process.is_first:  # drop steps after the checkpoint, which are repeated
            lines = "".join(json.dumps(line) + "\n" for line in curves.read(path) if line["step"] <= step)
            write_atomically(path, lambda file: file.write(lines.encode()))

    def step(self, loss: Tensor, **line: Any) -> None:
        """Add the loss of a step, to be written by :meth:`flush`."""
        self.pending_losses.append((line, loss))

    def flush(self, *lines: dict[str, Any]) -> None:
        """Write the pending losses, averaged over the processes, and ``lines``."""
        if self.pending_losses:
            losses = self.process.sum(torch.stack([loss for _, loss in self.pending_losses])) / self.process.count
            pending = [
                {**line, "loss": loss} for (line, _), loss in zip(self.pending_losses, losses.tolist(), strict=True)
            ]
            self.pending_losses, self.loss, lines = [], pending[-1]["loss"], (*pending, *lines)
        if self.process.is_first:
            size = self.path.stat().st_size
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # disk full
                os.truncate(self.path, size)
                raise OSError(error.errno, error.strerror, str(self.path)) from None


def train(config: TrainConfig) -> dict[str, float]:
    """Train a model, or resume training, and write checkpoint, metrics and curves to ``config.out``.

    Returns:
        "val_loss", "val_accuracy", "test_loss" and "test_accuracy" of the weights that ``config.keep`` selects.

    Raises:
        FileNotFoundError: The data are missing; the message gives the expected path.
        FileExistsError: ``config.out`` contains a checkpoint and ``config.resume`` is not set.
        BlockingIOError: Another process trains in ``config.out``; the message names it.
        OSError: A file cannot be written; the last checkpoint is unchanged.
        ValueError: An argument is invalid, the checkpoint belongs to another run, or checkpoint or metrics are damaged.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {config!r}")
    progress_of, _ = extra("rich.progress"), extra("matplotlib")  # fail now if one is missing, not after training
    if config.tune == "lora":
        extra("peft", "finetune")
    with join_processes(config) as process, contextlib.ExitStack() as stack:
        run = Run(config, load_data(config, preprocessing_of(config)), process)
        if process.is_first:
            config.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(checkpoint.lock_folder(config.out))
        found, result = checkpoint.load(config.out), {}
        if found is not None:
            state, path = found
            if not config.resume:
                raise FileExistsError(f"out: {config.out} contains a checkpoint; resume, or choose another folder")
            with checkpoint.invalid_contents(path):
                differences = run.differences(state)
                if not differences:
                    run.load(state)
                    result = dict(state["result"])
            if differences:
                raise ValueError(f"the checkpoint in {config.out} belongs to another run, with {differences}")
            run.keep = path.name == checkpoint.NAME  # do not replace PREVIOUS with a damaged checkpoint
        metrics = Metrics(config.out / METRICS, process, run.step)
        progress = progress_of.Progress(
            "step {task.completed} of {task.total}", progress_of.BarColumn(), progress_of.TimeRemainingColumn(),
            "{task.description}", disable=not process.is_first,
        )  # fmt: skip
        drawn = time.monotonic()
        with progress:
            task = progress.add_task("", total=run.steps, completed=run.step)
            while run.step < run.steps:
                epoch, start = divmod(run.step, run.steps_per_epoch)
                run.data.train.epoch = epoch
                finetune.set_mode(run.network, config)
                parts = batches(
                    len(run.data.train), config.batch_size, config.seed, epoch,
                    start=start, rank=process.rank, processes=process.count,
                    labels=run.data.train.labels if config.balance == "sampler" else None,
                )  # fmt: skip
                for images, labels in load_batches(run.data.train, parts, config, process):
                    rate = max(run.schedule.get_last_lr())
                    loss = run.training_step(images, labels)
                    metrics.step(loss, step=run.step, epoch=epoch + 1, learning_rate=rate)
                    done = run.step % run.steps_per_epoch == 0
                    if run.step % FLUSH_EVERY == 0:
                        metrics.flush()
                    if run.step % config.checkpoint_every == 0 and not done:
                        metrics.flush()
                        run.save(result)
                    progress.update(task, advance=1, description=f"loss {metrics.loss:.3f}" if metrics.loss else "")
                result = test(run.tested_model, run.data.val, config, process, "val")
                lines = [result]
                run.keep_best(result)
                if run.step == run.steps:  # the test images are used once
                    result = run.load_best(result)
                    lines.append(test(run.tested_model, run.data.test, config, process))
                    result = result | lines[1]
                metrics.flush(*({"step": run.step, "epoch": epoch + 1, **line} for line in lines))
                run.save(result)
                if process.is_first:
                    progress.console.print(
                        f"epoch {epoch + 1} of {config.epochs}: loss {metrics.loss:.3f}, validation loss "
                        f"{lines[0]['val_loss']:.3f}, validation accuracy {lines[0]['val_accuracy']:.1%}"
                    )
                if time.monotonic() > drawn + DRAW_EVERY:
                    draw(config, process)
                    drawn = time.monotonic()
        draw(config, process)
        if process.is_first:
            print(
                f"test loss {result['test_loss']:.3f}, test accuracy {result['test_accuracy']:.1%}, "
                f"{len(run.data.test):,} images"
            )
            files = [checkpoint.NAME, METRICS, CURVES]
            if config.tune == "lora":
                finetune.save_adapter(run.tested_model, run.network, config, config.out)
                files += [finetune.ADAPTER, finetune.MERGED]
            print(f"wrote {', '.join(str(config.out / name) for name in files)}")
        return result


def distill(config: TrainConfig) -> dict[str, float]:
    """Train a student with a teacher: :func:`train`, and an error if ``config`` has no teacher."""
    if isinstance(config, TrainConfig) and config.teacher is None:
        raise ValueError("teacher must be a folder that train wrote, or timm:NAME, got None")
    return train(config)


def draw(config: TrainConfig, process: Process) -> None:
    """Plot the metrics."""
    if process.is_first:
        title = f"{config.model}, {config.data}, {config.batch_size} images per step"
        curves.draw(config.out / METRICS, config.out / CURVES, title)


def load_trained(
    folder: Path, *, backend: str | None = None, device: str | None = None
) -> tuple[nn.Module, TrainConfig, tuple[str, ...]]:
    """Load a trained model from the checkpoint in ``folder``.

    Returns:
        The model in evaluation mode, its configuration, and the names of its classes.

    Raises:
        FileNotFoundError: ``folder`` contains no checkpoint.
        ValueError: The checkpoint is damaged.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path, got {folder!r}")
    found = checkpoint.load(Path(folder))
    if found is None:
        raise FileNotFoundError(f"{folder} has no {checkpoint.NAME}; expected the output folder of a training run")
    state, path = found
    with checkpoint.invalid_contents(path):
        config = TrainConfig(**state["config"])
        classes, channels = tuple(map(str, state["facts"]["classes"])), state["facts"]["channels"]
    config = dataclasses.replace(config, out=Path(folder), backend=backend, device=device, fsdp=False)
    with checkpoint.invalid_contents(path):
        network = build_network(config, len(classes), channels, load=False)
        if config.tune == "lora":
            finetune.prepare(network, config)
        network.model.load_state_dict(state["best_model"] or state.get("average") or state["model"])
        model = finetune.merge(network.model) if config.tune == "lora" else network.model
    return model.eval(), config, classes


def evaluate(
    folder: Path,
    data: str | None = None,
    *,
    data_folder: Path | None = None,
    download: bool = False,
    label: str | None = None,
    skip_damaged: bool | None = None,
    backend: str | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """Evaluate the checkpoint in ``folder`` on the test images of its run, or on other ``data``.

    Of other data, the test images are used, else the validation images, else all images. ``data_folder``, ``label``
    and ``skip_damaged`` are those of the run by default.

    Returns:
        "test_loss", "test_accuracy" and the number of "images".

    Raises:
        FileNotFoundError: Checkpoint or data are missing.
        ValueError: The classes of the data differ from those of the model.
    """
    model, config, classes = load_trained(folder, backend=backend, device=device)
    own, given = config, dict(data=data, data_folder=data_folder, label=label, skip_damaged=skip_damaged)
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if label is None and kind_of(data or config.data) not in LABELLED:
        changes["label"] = None
    config = dataclasses.replace(config, download=download, **changes)
    source = open_data(config)
    if source.classes != classes:
        theirs = list(source.classes)
        raise ValueError(f"data: the model has the classes {list(classes)}, {config.data} has {theirs}")
    if config.data == own.data or Path(config.data).resolve() == Path(own.data).resolve():
        images = load_data(config, preprocessing_of(own), source=source).test
    else:
        preprocessing = preprocessing_of(own) or default_preprocessing(own, cast(Any, model).channels)
        transform = preprocessing.test_transform(source.name, source.channels)
        images = AugmentedDataset(source, images_for_evaluation(source, skip_damaged=config.skip_damaged), transform)
    with join_processes(config) as process:
        return test(model.to(process.device), images, config, process) | {"images": len(images)}
