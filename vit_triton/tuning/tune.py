"""Times the candidates of every tile on the GPU at hand and writes the fastest where vit_triton finds them.

A model runs once, forward and backward, and every launcher that it calls is noted with its arguments: those calls are
the cases. Whatever a case asks a picker for, each of the picker's candidates is given in turn, checked against the
numbers of the default choice and timed; a choice that several cases share is judged by the sum of their times.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vit_triton import ops
from vit_triton.arguments import Dropout
from vit_triton.kernels import encoder, launch, tuned
from vit_triton.kernels.attention import backward as attention_backward
from vit_triton.kernels.attention import forward as attention_forward
from vit_triton.kernels.linear import backward as linear_backward
from vit_triton.kernels.linear import forward as linear_forward
from vit_triton.kernels.linear import mlp
from vit_triton.kernels.norm import layer_norm
from vit_triton.kernels.patch_embed import backward as patch_embed_backward
from vit_triton.kernels.patch_embed import forward as patch_embed_forward
from vit_triton.kernels.picker import Picker, choosing
from vit_triton.kernels.sums import sum_parts
from vit_triton.models import ViT
from vit_triton.modules import Linear
from vit_triton.tuning.measure import errors
from vit_triton.tuning.progress import progress
from vit_triton.tuning.shapes import CLASSES, Shape

LAUNCHERS = (
    *("attention_fwd", "attention_bwd", "attention_packed_bwd"),
    *("layer_norm_fwd", "layer_norm_apply", "layer_norm_bwd", "add_layer_norm_fwd"),
    *("linear_fwd", "linear_bwd_input", "linear_bwd_weight", "patch_embed_fwd", "patch_embed_bwd", "sum_parts"),
)
MARGIN = 0.98  # of the default's time: what is not faster by more than 2 % does not replace it
TOLERANCE = 16.0  # relative L2 distance to the default's numbers, in eps

Ask = tuple[Picker, tuple[Any, ...]]  # a picker and its arguments
Measure = Callable[[Callable[[], Any]], float]  # milliseconds of a call


@dataclass(frozen=True)
class Case:
    """A call of one launcher. ``run`` makes it again and gives its results; ``asks``: what the launcher itself asks
    for, by key, and not another one that it calls."""

    name: str
    dtype: torch.dtype
    run: Callable[[], list[Tensor]]
    asks: dict[tuple[Any, ...], Ask]


# --- what is measured --------------------------------------------------------------------------------------


def cases(shape: Shape, dtype: torch.dtype, device: str, dropout: float = 0.0) -> list[Case]:
    """What a ViT of that shape calls in inference and in a training step. ``dropout``: of the training."""
    torch.manual_seed(0)
    size = shape.with_depth(3)  # a block; one whose qkv projection has a bias, as in other libraries; the last
    with torch.device(device):
        model: Any = ViT(**size.vit(), dropout=dropout, backend="triton")
        image = torch.randn(shape.batch, 3, shape.image, shape.image).to(dtype)
        gradient = torch.randn(shape.batch, CLASSES).to(dtype)
        project = model.transformer.layers[1][0].to_qkv
        model.transformer.layers[1][0].to_qkv = Linear(project.in_features, project.out_features, backend="triton")
    model = model.to(dtype)

    def run() -> None:
        if not dropout:
            with torch.inference_mode():
                model.eval()(image)
        model.train()(image.requires_grad_()).backward(gradient)

    return record(run, shape.label, dtype)


def record(call: Callable[[], Any], label: str, dtype: torch.dtype) -> list[Case]:
    """Every launcher's call inside a ``call``, but each form of one once."""
    found: dict[Any, Case] = {}
    inside: list[Case] = []

    def watched(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            key = launcher, _form(args), _form(tuple(kwargs.items()))
            if key not in found:
                name = f"{label}: {launcher.__name__}({_spelled(args, kwargs)})"
                found[key] = Case(name, dtype, lambda: _tensors(launcher(*args, **kwargs)), {})
            inside.append(found[key])
            try:
                return launcher(*args, **kwargs)
            finally:
                inside.pop()

        return launch

    def note(picker: Picker, args: tuple[Any, ...]) -> Any:
        inside[-1].asks[picker.key(args)] = picker, args
        return picker.default(*args)

    functions = {name: x for module in _MODULES for name, x in vars(module).items() if name in LAUNCHERS}
    watching = _replaced({name: watched(launcher) for name, launcher in functions.items()})
    with ops.running(ops.run_directly), watching, choosing(note):  # no replay: a launcher is to be called every time
        call()
    return [case for case in found.values() if case.asks]


def _form(x: Any) -> Any:
    """What of an argument decides the work: of tensors not the numbers."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_form, x)) if isinstance(x, tuple) else x


def _spelled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shapes = ["x".join(map(str, x.shape)) for x in tree_leaves(args) if isinstance(x, Tensor)]
    scalars = {k: v.p if isinstance(v, Dropout) else v for k, v in kwargs.items()}
    return ", ".join([*shapes, *(f"{k}={v}" for k, v in scalars.items() if isinstance(v, bool | str | float) and v)])


def _tensors(results: Any) -> list[Tensor]:
    return [x for x in tree_leaves(results) if isinstance(x, Tensor)]


# --- measuring ---------------------------------------------------------------------------------------------


_MODULES = (
    *(attention_forward, attention_backward, layer_norm, linear_forward, linear_backward, mlp, encoder),
    *(patch_embed_forward, patch_embed_backward, sum_parts),
)


@contextlib.contextmanager
def _replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace launchers, by name, in every module that calls them."""
    before = [(each, name, old) for each in _MODULES for name, old in vars(each).items() if name in functions]
    try:
        for module, name, _ in before:
            setattr(module, name, functions[name])
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


class _Unfit(Exception):
    """Why a candidate is not timed."""


@torch.no_grad()  # parameters are among the arguments
def _run(group: list[Case]) -> tuple[list[list[Tensor]], int]:
    """The results of every case, and how many registers the compiled kernels spill."""
    launch._compiled.clear()  # Triton keeps what it compiled: it comes back at once
    results = [case.run() for case in group]
    return results, sum(getattr(kernel, "n_spills", None) or 0 for kernel in launch._compiled.values())


@torch.no_grad()
def _time(group: list[Case], expected: list[list[Tensor]], spills: int, measure: Measure) -> float:
    """Milliseconds of all cases under the choice in force; :class:`_Unfit` if it cannot be used."""
    try:
        results, spilled = _run(group)
    except Exception as error:  # of the compiler, its tools and the driver alike: no candidate must end the others
        raise _Unfit(f"does not run: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}") from error
    if spilled > spills:
        raise _Unfit(f"spills {spilled} registers")
    for case, ours, default in zip(group, results, expected, strict=True):
        largest = max(errors(ours, default))
        allowed = TOLERANCE * torch.finfo(case.dtype).eps
        if not largest <= allowed:
            raise _Unfit(f"WRONG in {case.name}: {largest:.1e} from the default's numbers, allowed {allowed:.1e}")
    return sum(measure(case.run) for case in group)


def choices(every: Iterable[Case]) -> list[tuple[Picker, tuple[Any, ...], list[Case]]]:
    """What the cases ask for, and which of them ask for it."""
    asked: dict[tuple[Any, ...], tuple[Picker, tuple[Any, ...], list[Case]]] = {}
    for case in every:
        for key, ask in case.asks.items():
            *_, group = asked.setdefault(key, (*ask, []))
            if case.name not in {other.name for other in group}:
                group.append(case)
    return list(asked.values())


def tune(every: Iterable[Case], measure: Measure, say: Callable[[str], None] = print) -> Iterator[tuned.Timed]:
    """The measurement of each of the cases' choices."""
    for picker, args, group in choices(every):
        key = picker.key(args)
        arguments = dict(zip(picker.arguments, key[1:], strict=True))
        say(f"{picker.name}({tuned.spelled(arguments)}), in")
        for case in group:
            say(f"    {case.name}")
        default, *others = picker.candidates(args)
        expected: list[list[Tensor]] = []
        spills = 0
        times: list[tuple[Any, float]] = []
        for candidate in (default, *others):

            def choose(asker: Picker, its: tuple[Any, ...], key: Any = key, candidate: Any = candidate) -> Any:
                return candidate if asker.key(its) == key else asker.default(*its)

            with choosing(choose):
                if candidate == default:
                    expected, spills = _run(group)
                try:
                    ms = _time(group, expected, spills, measure)
                except _Unfit as why:
                    say(f"  skipped  {candidate}: {why}")
                    continue
            say(f"  {ms:7.4f}  {candidate}")
            times.append((candidate, ms))
        if not times or times[0][0] != default:
            raise RuntimeError(f"{picker.name}: the default choice {default} must give the same numbers twice")
        fastest, ms = min(times, key=lambda each: each[1])
        yield tuned.Timed(picker.name, arguments, fastest if ms < MARGIN * times[0][1] else default, times)


# --- writing -----------------------------------------------------------------------------------------------


def write(path: Path, device: str, arch: str, measured: Iterable[tuned.Timed], total: int) -> bool:
    """Write what is measured, and if it is stopped what was until then; whether it was not. What an older file of the
    same device and the same versions says of other arguments is kept."""
    new: list[tuned.Timed] = []
    old = tuned.read(path) if path.exists() else None
    with progress(total) as bar:
        for each in measured:
            new.append(each)
            bar.advance(each.picker)
    table = tuned.new_table(device, arch, new)
    same = ("device", "architecture", "triton", "torch")
    if old is not None and all(getattr(old, name) == getattr(table, name) for name in same):
        keys = {each.key for each in new}
        table.timed.extend(each for each in old.timed if each.key not in keys)
    if new:
        tuned.write(path, table)
        print(f"written: {path}")
    return bar.complete
