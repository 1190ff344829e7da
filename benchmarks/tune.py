"""Times the tiles that were weighed on the GPU at hand and writes the fastest where vit_triton finds them.

A case is one launcher at the sizes of a model. Whatever a case asks a picker for, each of the picker's candidates is
given in turn, checked against the numbers of the default choice and timed; a choice that several cases share is judged
by the sum of their times.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import runner
from benchmarks.shapes import DTYPES
from vit_triton.kernels import _config, _launch, _sums, _tuned, attention, layer_norm, linear, patch_embed

SUMMARY = {"tune": "time the weighed tiles on this GPU, and write those that vit_triton then uses on it"}

# width, heads, edge of a patch; an MLP is 4 times as wide (Dosovitskiy et al. 2020, arXiv:2010.11929, and timm's names)
MODELS = {
    "ViT-Ti/16": (192, 3, 16),
    "ViT-S/16": (384, 6, 16),
    "ViT-B/16": (768, 12, 16),
    "ViT-L/16": (1024, 16, 16),
    "ViT-H/14": (1280, 16, 14),
}
MARGIN = 0.98  # of the default's time: what is not faster by more than 2 % does not replace it
TOLERANCE = 16.0  # relative L2 distance to the default's numbers, in eps


@dataclass(frozen=True)
class Case:
    """One launcher; ``run`` gives its results."""

    name: str
    dtype: torch.dtype
    run: Callable[[], list[Tensor]]


Measure = Callable[[Callable[[], Any]], float]  # milliseconds of a call


# --- what is measured --------------------------------------------------------------------------------------


def cases(model: str, image: int, batch: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """A block of the model, forward and backward, and its patch embedding of ``batch`` square images."""
    width, heads, patch = MODELS[model]
    tokens, hidden, pixels = (image // patch) ** 2 + 1, 4 * width, 3 * patch * patch
    rows = batch * tokens

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def case(name: str, launcher: Callable[..., Any], *args: Any, **options: Any) -> Case:
        def run() -> list[Tensor]:
            results = launcher(*args, **options)
            return [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]

        return Case(f"{model} {name}", dtype, run)

    scale = dict(scale=(width // heads) ** -0.5, dropout_p=0.0)
    q, k, v = rand(batch, tokens, 3, heads, width // heads).unbind(2)
    yield case("attention", attention.attention_fwd, q, k, v, None, **scale)
    out, lse = (rand(batch, tokens, heads, width // heads), rand(batch, heads, tokens).float() + 8)
    yield case("attention backward", attention.attention_bwd, rand(*out.shape), q, k, v, out, lse, None, None, **scale)

    x, dy, norm = rand(rows, width), rand(rows, width), (rand(width), rand(width))
    mean, rstd = (torch.rand(rows, device=device) for _ in range(2))
    yield case("layer_norm", layer_norm.layer_norm_fwd, x, *norm, eps=1e-5)
    yield case("layer_norm backward", layer_norm.layer_norm_bwd, dy, x, norm[0], mean, rstd)

    wide, pre = rand(rows, 3 * width), rand(rows, hidden)
    weights = {n: rand(n, width) * width**-0.5 for n in (3 * width, width, hidden)}
    down = rand(width, hidden) * hidden**-0.5
    forward, backward, weight = linear.linear_fwd, linear.linear_bwd_input, linear.linear_bwd_weight
    gelu = dict(activation="gelu")
    yield case("qkv", forward, x, weights[3 * width], None, None, None)
    yield case("projection", forward, x, weights[width], norm[0], x, None)
    yield case("mlp, first", forward, x, weights[hidden], rand(hidden), None, None, save_pre=True, **gelu)
    yield case("mlp, second", forward, pre, down, norm[0], x, None)
    yield case("qkv backward", backward, wide, weights[3 * width], None, None)
    yield case("projection backward", backward, dy, weights[width], None, None)
    yield case("mlp, first, backward", backward, pre, weights[hidden], None, None)
    yield case("mlp, second, backward", backward, dy, down, pre, None, with_hidden=True, **gelu)
    options: dict[str, Any] = dict(weight_dtype=dtype)
    yield case("qkv weight", weight, wide, x, with_bias=False, **options)
    yield case("projection weight", weight, dy, x, with_bias=True, **options)
    yield case("mlp, first, weight", weight, pre, x, with_bias=True, **options)
    yield case("mlp, second, weight", weight, dy, pre, with_bias=True, **options)

    images, stem, norms = rand(batch, 3, image, image), rand(width, pixels), [rand(n) for n in (pixels, pixels, width)]
    embedding: dict[str, Any] = dict(patch_size=(patch, patch), patch_order="p1 p2 c")
    pre_norm, post_norm = (*norms[:2], 1e-5), (*norm, 1e-5)
    given = images, stem, norms[2], rand(tokens - 1, width), rand(1, width), pre_norm, post_norm, None, None
    yield case("patch_embed", patch_embed.patch_embed_fwd, *given, **embedding)
    given = rand(batch, tokens, width), images, stem, *[None] * 9
    yield case("patch_embed backward", patch_embed.patch_embed_bwd, *given, needs_image=True, **embedding)


# --- measuring ---------------------------------------------------------------------------------------------


def on_gpu(run: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call, the median of about ``seconds`` of calls with an emptied L2 cache."""
    from triton.testing import do_bench

    return do_bench(run, warmup=int(250 * seconds), rep=int(1000 * seconds), return_mode="median")


@contextlib.contextmanager
def _picking(choose: Callable[[_config.Picker, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Have every launcher ask ``choose`` of a picker and its arguments instead of the picker."""
    modules = (attention, layer_norm, linear, patch_embed, _sums)
    before = [(each, name, pick) for each in modules for name, pick in vars(each).items() if name in _config.PICKERS]

    def asking(picker: _config.Picker) -> Callable[..., Any]:
        return lambda *args: choose(picker, args)

    try:
        for module, name, _ in before:
            setattr(module, name, asking(_config.PICKERS[name]))
        yield
    finally:
        for module, name, pick in before:
            setattr(module, name, pick)


class _Unfit(Exception):
    """Why a candidate is not timed."""


def _run(group: list[Case]) -> tuple[list[list[Tensor]], int]:
    """The results of every case, and how many registers the compiled kernels spill."""
    _launch._compiled.clear()  # Triton keeps what it compiled: it comes back at once
    results = [case.run() for case in group]
    return results, sum(getattr(kernel, "n_spills", None) or 0 for kernel in _launch._compiled.values())


def _time(group: list[Case], expected: list[list[Tensor]], spills: int, measure: Measure) -> float:
    """Milliseconds of all cases under the choice in force; :class:`_Unfit` if it cannot be used."""
    try:
        results, spilled = _run(group)
    except Exception as error:  # of the compiler, its tools and the driver alike: no candidate must end the others
        raise _Unfit(f"does not run: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}") from error
    if spilled > spills:
        raise _Unfit(f"spills {spilled} registers")
    for case, ours, default in zip(group, results, expected, strict=True):
        error = max(runner.errors(ours, default))
        allowed = TOLERANCE * torch.finfo(case.dtype).eps
        if not error <= allowed:
            raise _Unfit(f"WRONG in {case.name}: {error:.1e} from the default's numbers, allowed {allowed:.1e}")
    return sum(measure(case.run) for case in group)


def tune(every: Iterable[Case], measure: Measure, say: Callable[[str], None] = print) -> Iterator[_tuned.Timed]:
    """The measurement of each choice that the cases ask for."""
    asked: dict[tuple[Any, ...], tuple[_config.Picker, tuple[Any, ...], list[Case]]] = {}
    for case in every:

        def note(picker: _config.Picker, args: tuple[Any, ...], case: Case = case) -> Any:
            *_, group = asked.setdefault(picker.key(args), (picker, args, []))
            if case not in group:
                group.append(case)
            return picker.default(*args)

        with _picking(note):
            case.run()
    for key, (picker, args, group) in asked.items():
        arguments = dict(zip(picker.arguments, key[1:], strict=True))
        say(f"{picker.name}({_tuned.spelled(arguments)}), in {', '.join(case.name for case in group)}")
        default, *others = picker.candidates(args)
        expected: list[list[Tensor]] = []
        spills = 0
        times: list[tuple[Any, float]] = []
        for candidate in (default, *others):

            def choose(asker: _config.Picker, its: tuple[Any, ...], key: Any = key, candidate: Any = candidate) -> Any:
                return candidate if asker.key(its) == key else asker.default(*its)

            with _picking(choose):
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
        yield _tuned.Timed(picker.name, arguments, fastest if ms < MARGIN * times[0][1] else default, times)


# --- the command -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["ViT-B/16"])
    parser.add_argument("--image", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=64, help="of the measurement; a choice never depends on it")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.1, help="for each candidate and case")
    parser.add_argument("--out", type=Path, help="the file; by default where vit_triton finds it by itself")


def run(options: argparse.Namespace) -> None:
    if _launch.INTERPRETING or not torch.cuda.is_available():
        reason = "TRITON_INTERPRET is set" if _launch.INTERPRETING else "PyTorch finds none"
        print(f"tune: needs a GPU, and {reason}; without one the computed choices are used", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    name, arch = torch.cuda.get_device_name(device), str(_config.architecture(device))
    path = options.out or _tuned.default_path(name)
    every = (
        case
        for model in options.model
        for dtype in options.dtype
        for case in cases(model, options.image, options.batch, DTYPES[dtype], "cuda")
    )
    write(path, name, arch, tune(every, lambda call: on_gpu(call, options.seconds)))
    print(_tuned.describe(name, arch))


def write(path: Path, device: str, arch: str, measured: Iterator[_tuned.Timed]) -> None:
    """Write what is measured, and if it is stopped what was until then. What an older file of the same device and the
    same versions says of other arguments is kept."""
    new: list[_tuned.Timed] = []
    old = _tuned.read(path) if path.exists() else None
    try:
        for each in measured:
            new.append(each)
    except KeyboardInterrupt:
        print("stopped")
    table = _tuned.new_table(device, arch, new)
    same = ("device", "architecture", "triton", "torch")
    if old is not None and all(getattr(old, name) == getattr(table, name) for name in same):
        keys = {each.key for each in new}
        table.timed.extend(each for each in old.timed if each.key not in keys)
    if new:
        _tuned.write(path, table)
        print(f"written: {path}")
