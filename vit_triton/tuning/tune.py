"""Measure the tile candidates on the current GPU and write the fastest to a table.

A model runs once, forward and backward, and every call of a launcher is recorded as a case. For every picker that a
case uses, each candidate is compared with the result of the default and timed. If several cases use the same choice,
the sum of their times decides.
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
from vit_triton.kernels.picker import Picker, override_choice
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
MARGIN = 0.98  # a candidate replaces the default if it takes less than this fraction of its time
TOLERANCE = 16.0  # relative L2 difference from the default's result, in eps

PickerCall = tuple[Picker, tuple[Any, ...]]  # a picker and its arguments
Measure = Callable[[Callable[[], Any]], float]  # milliseconds of a call


@dataclass(frozen=True)
class Case:
    """A call of one launcher.

    Attributes:
        run: repeats the call and returns its results.
        picker_calls: the pickers that the launcher calls, with their arguments, by key.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[], list[Tensor]]
    picker_calls: dict[tuple[Any, ...], PickerCall]


# --- cases -------------------------------------------------------------------------------------------------


def cases(shape: Shape, dtype: torch.dtype, device: str, dropout: float = 0.0) -> list[Case]:
    """Return the cases of a ViT in inference and in a training step with ``dropout``."""
    torch.manual_seed(0)
    size = shape.with_depth(3)  # an ordinary block, one with a QKV bias as in other libraries, and the last block
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
    """Return the launcher calls inside ``call``, without those that are equal up to tensor data."""
    found: dict[Any, Case] = {}
    inside: list[Case] = []

    def recorded(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            key = launcher, _form(args), _form(tuple(kwargs.items()))
            if key not in found:
                name = f"{label}: {launcher.__name__}({_describe_arguments(args, kwargs)})"
                found[key] = Case(name, dtype, lambda: _tensors(launcher(*args, **kwargs)), {})
            inside.append(found[key])
            try:
                return launcher(*args, **kwargs)
            finally:
                inside.pop()

        return launch

    def note(picker: Picker, args: tuple[Any, ...]) -> Any:
        inside[-1].picker_calls[picker.key(args)] = picker, args
        return picker.default(*args)

    functions = {name: x for module in _MODULES for name, x in vars(module).items() if name in LAUNCHERS}
    replacing = _replace_launchers({name: recorded(launcher) for name, launcher in functions.items()})
    with ops.override_run(ops.run_directly), replacing, override_choice(note):  # a replay would not call the launchers
        call()
    return [case for case in found.values() if case.picker_calls]


def _form(x: Any) -> Any:
    """Return the properties of an argument that determine the work: for a tensor all but its data."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_form, x)) if isinstance(x, tuple) else x


def _describe_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
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
def _replace_launchers(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace launchers by name in every module that calls them."""
    before = [(each, name, old) for each in _MODULES for name, old in vars(each).items() if name in functions]
    try:
        for module, name, _ in before:
            setattr(module, name, functions[name])
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


class _Skipped(Exception):
    """A candidate is not timed; the message gives the reason."""


@torch.no_grad()  # parameters are among the arguments
def _run(group: list[Case]) -> tuple[list[list[Tensor]], int]:
    """Return the results of every case and the number of registers that the compiled kernels spill."""
    launch._compiled.clear()  # fast, since Triton caches compiled kernels
    results = [case.run() for case in group]
    return results, sum(getattr(kernel, "n_spills", None) or 0 for kernel in launch._compiled.values())


@torch.no_grad()
def _time(group: list[Case], expected: list[list[Tensor]], spills: int, measure: Measure) -> float:
    """Return the milliseconds of all cases with the current choice; raise :class:`_Skipped` if it cannot be used."""
    try:
        results, spilled = _run(group)
    except Exception as error:  # a failing candidate must not end the tuning
        raise _Skipped(f"does not run: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}") from error
    if spilled > spills:
        raise _Skipped(f"spills {spilled} registers")
    for case, ours, default in zip(group, results, expected, strict=True):
        largest = max(errors(ours, default))
        allowed = TOLERANCE * torch.finfo(case.dtype).eps
        if not largest <= allowed:
            raise _Skipped(f"WRONG in {case.name}: differs from the default by {largest:.1e}, allowed {allowed:.1e}")
    return sum(measure(case.run) for case in group)


def choices(every: Iterable[Case]) -> list[tuple[Picker, tuple[Any, ...], list[Case]]]:
    """Return each choice to make: the picker, its arguments, and the cases that use it."""
    groups: dict[tuple[Any, ...], tuple[Picker, tuple[Any, ...], list[Case]]] = {}
    for case in every:
        for key, picker_call in case.picker_calls.items():
            *_, group = groups.setdefault(key, (*picker_call, []))
            if case.name not in {other.name for other in group}:
                group.append(case)
    return list(groups.values())


def tune(every: Iterable[Case], measure: Measure, log: Callable[[str], None] = print) -> Iterator[tuned.Timed]:
    """Measure the candidates of every choice of the cases."""
    for picker, args, group in choices(every):
        key = picker.key(args)
        arguments = dict(zip(picker.arguments, key[1:], strict=True))
        log(f"{picker.name}({tuned.format_arguments(arguments)}), in")
        for case in group:
            log(f"    {case.name}")
        default, *others = picker.candidates(args)
        expected: list[list[Tensor]] = []
        spills = 0
        times: list[tuple[Any, float]] = []
        for candidate in (default, *others):

            def choose(
                current: Picker, current_args: tuple[Any, ...], key: Any = key, candidate: Any = candidate
            ) -> Any:
                return candidate if current.key(current_args) == key else current.default(*current_args)

            with override_choice(choose):
                if candidate == default:
                    expected, spills = _run(group)
                try:
                    ms = _time(group, expected, spills, measure)
                except _Skipped as why:
                    log(f"  skipped  {candidate}: {why}")
                    continue
            log(f"  {ms:7.4f}  {candidate}")
            times.append((candidate, ms))
        if not times or times[0][0] != default:
            raise RuntimeError(f"{picker.name}: the default choice {default} does not reproduce its own result")
        fastest, ms = min(times, key=lambda each: each[1])
        yield tuned.Timed(picker.name, arguments, fastest if ms < MARGIN * times[0][1] else default, times)


# --- writing -----------------------------------------------------------------------------------------------


def write(path: Path, device: str, arch: str, measured: Iterable[tuned.Timed], total: int) -> bool:
    """Write the measurements to a table, also if they are interrupted.

    Entries of an existing table for other arguments are kept if it has the same device and versions.

    Returns:
        Whether all measurements were made.
    """
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
