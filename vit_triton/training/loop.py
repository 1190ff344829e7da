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
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

from vit_triton import models
from vit_triton.backend import resolve_backend
from vit_triton.training import checkpoint, curves
from vit_triton.training.checkpoint import CURVES, METRICS
from vit_triton.training.config import TrainConfig
from vit_triton.training.data import Data, Seeded, batches, load_data, seed_of
from vit_triton.training.extras import extra
from vit_triton.weights.atomic import write_atomically

FLUSH_EVERY = 20  # steps: telling a loss waits for the device
DRAW_EVERY = 30  # seconds
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

# what a run may change when it goes on: where things lie and what computes them
FREE = {"out", "data", "data_folder", "download", "resume", "checkpoint_every", "workers", "backend", "device", "fsdp"}


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    processes: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def summed(self, x: Tensor) -> Tensor:
        """``x`` summed over all processes."""
        if self.processes > 1:
            dist.all_reduce(x)
        return x


def device_for(name: str | None, backend: str | None) -> torch.device:
    """The device of that name, else a GPU if there is one; of the processes of torchrun, each has a GPU of its own.

    Raises:
        ValueError: it is not there, or ``backend`` does not run on it; the message names which.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without CUDA
        raise ValueError(f"device: {str(error).splitlines()[0]}") from error
    if probe.is_meta:
        raise ValueError("device: tensors on meta have no values")
    try:
        resolve_backend(backend, "linear", probe)
    except RuntimeError as error:
        raise ValueError(f"backend: {error}") from error
    return probe.device


@contextlib.contextmanager
def place(config: TrainConfig) -> Iterator[Place]:
    """Join the processes that torchrun started, if it did."""
    device = device_for(config.device, config.backend)
    if "RANK" not in os.environ:
        if config.fsdp:
            raise ValueError("fsdp shards over the processes of torchrun: torchrun --nproc-per-node N -m ...")
        yield Place(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def build(config: TrainConfig, channels: int, classes: int) -> nn.Module:
    """The model of a run, with the weights of its seed."""
    options: dict[str, Any] = dict(num_classes=classes, channels=channels, backend=config.backend, **config.sizes())
    if config.model == "ViT":
        options |= dict(dropout=config.dropout, emb_dropout=config.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model: nn.Module = getattr(models, config.model)(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("pos_embedding", "cls_token"):
                parameter.mul_(0.02)  # at unit variance, as vit_pytorch has them, they drown the patches
    return model


def spread(model: nn.Module, config: TrainConfig, here: Place) -> nn.Module:
    """``model`` as all processes train it together."""
    if config.fsdp:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(here.device.type, (here.processes,))
        for branch in (branch for block in model.transformer.layers for branch in block):  # type: ignore
            fully_shard(branch, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    elif here.processes > 1:
        return DistributedDataParallel(model)
    return model


def read(examples: Seeded, parts: list[list[int]], config: TrainConfig, here: Place) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``examples`` by their indices."""
    loader = DataLoader(
        examples,
        batch_sampler=parts,
        num_workers=config.workers,
        collate_fn=functools.partial(_collated, shape=examples[0][0].shape),
        pin_memory=here.device.type == "cuda",
        generator=torch.Generator(),  # without one, it draws from that of the dropout
    )
    try:
        yield from loader
    except ValueError as error:
        if not config.workers:
            raise
        # the error of a worker has the whole traceback as its message
        name = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise type(error)(str(error).splitlines()[-1].removeprefix(name)) from error


def _collated(examples: list[tuple[Tensor, int]], shape: torch.Size) -> Any:
    return default_collate(examples) if examples else [torch.empty(0, *shape), torch.empty(0, dtype=torch.long)]


def scores(model: nn.Module, images: Tensor, config: TrainConfig, here: Place) -> Tensor:
    """Logits in float32."""
    half = config.precision == "bfloat16" and not config.fsdp  # which casts by itself
    with torch.autocast(here.device.type, torch.bfloat16, enabled=half):
        return model(images.to(here.device, non_blocking=True)).float()


@torch.no_grad()
def test(model: nn.Module, data: Data, config: TrainConfig, here: Place) -> dict[str, float]:
    """Loss and accuracy on the test images."""
    images, size = len(data.test), config.batch_size
    # of the last batch there may be none for some processes; where the model is sharded all have to take part
    parts = [list(range(i, min(i + size, images)))[here.rank :: here.processes] for i in range(0, images, size)]
    sums = torch.zeros(2, dtype=torch.float64, device=here.device)
    model.eval()
    for batch, labels in read(data.test, parts, config, here):
        logits, labels = scores(model, batch, config, here), labels.to(here.device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((loss, (logits.argmax(1) == labels).sum()))
    model.train()
    loss, right = (here.summed(sums) / images).tolist()
    return {"test_loss": loss, "test_accuracy": right}


class Run:
    """A model, its optimizer and its schedule, and how far they are."""

    def __init__(self, config: TrainConfig, data: Data, here: Place) -> None:
        if config.batch_size % here.processes:
            raise ValueError(f"batch_size must divide by the {here.processes} processes, got {config.batch_size}")
        images = len(data.train)
        self.steps_an_epoch = images // config.batch_size
        if not self.steps_an_epoch:
            raise ValueError(f"batch_size must be at most the {images} training images, got {config.batch_size}")
        self.config, self.data, self.here = config, data, here
        self.model = build(config, data.channels, len(data.classes)).to(here.device)
        self.together = spread(self.model, config, here)
        seed = seed_of(config.seed, here.rank)  # dropout differs from process to process
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.steps = config.epochs * self.steps_an_epoch
        self.keep = True  # the checkpoint that the next one replaces
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step = 0

    def _rate(self, step: int) -> float:
        rising = max(1, round(self.config.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, self.steps - rising))

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE | {"size"}}
        return {**config, **self.config.sizes(), **self.data.facts(), "processes": self.here.processes}

    def learn(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step; the loss of this process's part of the batch."""
        loss = nn.functional.cross_entropy(
            scores(self.together, images, self.config, self.here),
            labels.to(self.here.device, non_blocking=True),
            label_smoothing=self.config.label_smoothing,
        )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.detach()

    def save(self, result: dict[str, float]) -> None:
        """Write a checkpoint, with the ``result`` of the last test; every process takes part."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=WHOLE)
        states: list[Any] = [checkpoint.random_state(self.here.device)]
        if self.here.processes > 1:
            mine, states = states[0], [None] * self.here.processes
            dist.all_gather_object(states, mine)
        if self.here.first:
            checkpoint.save(self.config.out, {
                "model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict(),
                "step": self.step, "random": states, "facts": self.facts(), "config": _plain(self.config),
                "result": result,
            }, keep=self.keep)  # fmt: skip
            self.keep = True

    def differs(self, state: dict[str, Any]) -> str:
        """How the run of a checkpoint differs from this one; empty if it is the same."""
        ours, theirs = self.facts(), state["facts"]
        return "; ".join(f"{name} {theirs.get(name)!r}, not {x!r}" for name, x in ours.items() if theirs.get(name) != x)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.steps:
            raise ValueError(f"expected a step from 0 to {self.steps}, got {state['step']!r}")
        set_state_dict(
            self.model, self.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=WHOLE,
        )  # fmt: skip
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        checkpoint.set_random_state(state["random"][self.here.rank], self.here.device)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """``config`` with every size said, in types that a checkpoint may hold."""
    sizes = {name: size for name, size in config.sizes().items() if name != "dim_head"}
    return {k: str(v) if isinstance(v, Path) else v for k, v in (dataclasses.asdict(config) | sizes).items()}


class Metrics:
    """A line of JSON for every step and for every test, as they would be without interruption."""

    def __init__(self, path: Path, here: Place, step: int) -> None:
        self.path, self.here = path, here
        self.waiting: list[tuple[dict[str, Any], Tensor]] = []
        self.loss: float | None = None  # the last one known
        if here.first:  # what came after the checkpoint comes again
            lines = "".join(json.dumps(line) + "\n" for line in curves.read(path) if line["step"] <= step)
            write_atomically(path, lambda file: file.write(lines.encode()))

    def step(self, loss: Tensor, **line: Any) -> None:
        """Remember a process's loss."""
        self.waiting.append((line, loss))

    def flush(self, *lines: dict[str, Any]) -> None:
        """Write what was remembered, as means over the processes, and ``lines``."""
        if self.waiting:
            losses = self.here.summed(torch.stack([loss for _, loss in self.waiting])) / self.here.processes
            remembered = [{**line, "loss": loss} for (line, _), loss in zip(self.waiting, losses.tolist(), strict=True)]
            self.waiting, self.loss, lines = [], remembered[-1]["loss"], (*remembered, *lines)
        if self.here.first:
            size = self.path.stat().st_size
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # a full disk
                os.truncate(self.path, size)
                raise OSError(error.errno, error.strerror, str(self.path)) from None


def train(config: TrainConfig) -> dict[str, float]:
    """Train, or go on, until all epochs are done; what comes of it lies in ``config.out``.

    Returns:
        "test_loss" and "test_accuracy" after the last epoch.

    Raises:
        FileNotFoundError: the data are not there; the message says what to put where.
        FileExistsError: there is a checkpoint in ``config.out`` and ``config.resume`` is not set.
        BlockingIOError: another process trains in ``config.out``; the message says which.
        OSError: a file cannot be written; the last checkpoint is still there.
        ValueError: the checkpoint is of another run, it or the metrics are damaged, or an argument does not fit; the
            message names it.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {config!r}")
    progress_of, _ = extra("rich.progress"), extra("matplotlib")  # which is needed last
    with place(config) as here, contextlib.ExitStack() as stack:
        run = Run(config, load_data(config), here)
        if here.first:
            config.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(checkpoint.locked(config.out))
        found, result = checkpoint.load(config.out), {}
        if found is not None:
            state, path = found
            if not config.resume:
                raise FileExistsError(f"out: {config.out} has a checkpoint; resume, or choose another folder")
            with checkpoint.taking(path):
                differs = run.differs(state)
                if not differs:
                    run.load(state)
                    result = dict(state["result"])
            if differs:
                raise ValueError(f"the checkpoint in {config.out} is of another run, with {differs}")
            run.keep = path.name == checkpoint.NAME  # else that is damaged, or not there
        metrics = Metrics(config.out / METRICS, here, run.step)
        progress = progress_of.Progress(
            "step {task.completed} of {task.total}", progress_of.BarColumn(), progress_of.TimeRemainingColumn(),
            "{task.description}", disable=not here.first,
        )  # fmt: skip
        drawn = time.monotonic()
        with progress:
            task = progress.add_task("", total=run.steps, completed=run.step)
            while run.step < run.steps:
                epoch, start = divmod(run.step, run.steps_an_epoch)
                run.data.train.epoch = epoch
                parts = batches(
                    len(run.data.train), config.batch_size, config.seed, epoch,
                    start=start, rank=here.rank, processes=here.processes,
                )  # fmt: skip
                for images, labels in read(run.data.train, parts, config, here):
                    rate = run.schedule.get_last_lr()[0]
                    loss = run.learn(images, labels)
                    metrics.step(loss, step=run.step, epoch=epoch + 1, learning_rate=rate)
                    done = run.step % run.steps_an_epoch == 0
                    if run.step % FLUSH_EVERY == 0:
                        metrics.flush()
                    if run.step % config.checkpoint_every == 0 and not done:
                        metrics.flush()
                        run.save(result)
                    progress.update(task, advance=1, description=f"loss {metrics.loss:.3f}" if metrics.loss else "")
                result = test(run.model, run.data, config, here)
                metrics.flush({"step": run.step, "epoch": epoch + 1, **result})
                run.save(result)
                if here.first:
                    progress.console.print(
                        f"epoch {epoch + 1} of {config.epochs}: loss {metrics.loss:.3f}, on test images "
                        f"{result['test_loss']:.3f}, of which {result['test_accuracy']:.1%} right"
                    )
                if time.monotonic() > drawn + DRAW_EVERY:
                    draw(config, here)
                    drawn = time.monotonic()
        draw(config, here)
        if here.first:
            print(f"wrote {', '.join(str(config.out / name) for name in (checkpoint.NAME, METRICS, CURVES))}")
        return result


def draw(config: TrainConfig, here: Place) -> None:
    """The curves so far."""
    if here.first:
        title = f"{config.model}, {config.data}, {config.batch_size} images a step"
        curves.draw(config.out / METRICS, config.out / CURVES, title)


def load_trained(
    folder: Path, *, backend: str | None = None, device: str | None = None
) -> tuple[nn.Module, TrainConfig, tuple[str, ...]]:
    """The model in the checkpoint of ``folder``, in eval mode, its configuration and the names of its classes.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path, got {folder!r}")
    found = checkpoint.load(Path(folder))
    if found is None:
        raise FileNotFoundError(f"{folder} has no {checkpoint.NAME}: train with out={folder}")
    state, path = found
    with checkpoint.taking(path):
        config = TrainConfig(**state["config"])
        classes, channels = tuple(map(str, state["facts"]["classes"])), state["facts"]["channels"]
    config = dataclasses.replace(config, out=Path(folder), backend=backend, device=device, fsdp=False)
    with checkpoint.taking(path):
        model = build(config, channels, len(classes))
        model.load_state_dict(state["model"])
    return model.eval(), config, classes


def evaluate(
    folder: Path, data: str | None = None, *, backend: str | None = None, device: str | None = None
) -> dict[str, float]:
    """What :func:`train` returns, of the checkpoint in ``folder``, on its own test images or those of ``data``.

    Raises:
        FileNotFoundError: there is no checkpoint, or no data.
        ValueError: the data have other classes.
    """
    model, config, classes = load_trained(folder, backend=backend, device=device)
    config = dataclasses.replace(config, data=config.data if data is None else data)
    examples = load_data(config)
    if examples.classes != classes:
        theirs = list(examples.classes)
        raise ValueError(f"data: the model knows the classes {list(classes)}, {config.data} has {theirs}")
    with place(config) as here:
        return test(model.to(here.device), examples, config, here)
