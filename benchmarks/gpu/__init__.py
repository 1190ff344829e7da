"""First run on a GPU: check the numbers, measure speed, report failures.

Sections run in order of importance: the machine, the numbers of every operator, whole models, operators against
PyTorch's, tuning. A step that crashes, hangs or runs out of memory does not affect other steps: a new process runs the
next one. Results are written to results.json and report.md in the folder --out after every step; the same command
continues with the steps that have no result. Requires torch, triton and numpy; timm, torchvision and other libraries
are used if installed. Exit code: 0; 1 if a step is wrong, failed, crashed, hung or ran out of memory; 130 after Ctrl-C.
"""

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import plan, report
from benchmarks.gpu.machine import DEVICE
from benchmarks.gpu.plan import Clock
from benchmarks.gpu.process import BAD, Worker
from benchmarks.gpu.results import Results
from benchmarks.gpu.running import run_steps
from benchmarks.gpu.sections import sections
from benchmarks.gpu.step import Context, Section, environment
from benchmarks.runner import write_text
from vit_triton.cli.arguments import folder

RESERVED = 3.0  # seconds to write the report


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="time limit of the whole run; default: 10")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="cuda (default), or cpu: a trial with tiny sizes")  # fmt: skip
    parser.add_argument(
        "--out", type=folder, default=Path("gpu_report"), metavar="FOLDER", help="output folder; default: gpu_report"
    )
    parser.add_argument("--only", default="", metavar="NAME", help="only steps whose printed name contains NAME")
    parser.add_argument("--again", action="store_true", help="also repeat steps with a bad result")
    parser.add_argument("--dry-run", action="store_true", help="print the plan for an H200 and an RTX 4090, and exit")


def run(args: argparse.Namespace) -> None:
    out = args.out.resolve()
    if args.dry_run:
        for gpu in plan.PLANNED:
            every = sections(Context("cuda", out), plan.CORES)
            print("\n".join([*plan.table(_select_steps(every, args.only), args.minutes, gpu), ""]))
        print("expected times are computed from kernels to compile, FLOPs and measuring time; none is measured")
        return
    interpreting = _interpreting(args.device)
    start = time.time()
    context = Context(args.device, out, args.device == "cpu", interpreting, start + 60 * args.minutes - RESERVED)
    every = sections(context)
    chosen = _select_steps(every, args.only)
    if context.tiny:
        print("trial on a CPU: all sizes are tiny, and times say nothing about a GPU", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with _lock_folder(out), environment({"TRITON_INTERPRET": "1"} if context.interpreting else {}):
            results = Results(args.out, {"minutes": args.minutes, "device": args.device, "only": args.only})
            complete = _run(context, every, chosen, args.again, results, start)
    except OSError as error:
        raise SystemExit(f"cannot continue: {error}") from None  # disk full, stdout closed
    if not complete:
        raise SystemExit(130)
    if any(result["status"] in BAD for result in results.steps.values()):
        raise SystemExit(1)


def _interpreting(device: str) -> bool:
    """Whether Triton's interpreter runs the kernels: on a CPU if they cannot be compiled for it. Exits if ``device`` is
    "cuda" and the kernels cannot run on a GPU."""
    asked = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cuda":
        if asked:
            raise SystemExit("TRITON_INTERPRET is set: the kernels would not run on the GPU; unset it")
        if not torch.cuda.is_available():
            raise SystemExit("--device: PyTorch finds no GPU; --device cpu runs a trial with tiny sizes")
        return False
    from vit_triton import cpu

    return asked or cpu.unsupported_reason() is not None


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock the folder. Exits if another command holds the lock."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"--out: another command writes to {folder}; choose another folder") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def _select_steps(every: list[Section], text: str) -> list[Section]:
    """Sections reduced to the steps whose name contains ``text``."""
    chosen = [
        Section(each.name, each.title, each.until, steps, each.processes)
        for each in every
        if (steps := tuple(step for step in each.steps if text in each.key(step)))
    ]
    if not chosen:
        raise SystemExit(f"--only: no step contains {text!r}; --dry-run shows the sections")
    return chosen


def _run(
    context: Context, every: list[Section], chosen: list[Section], again: bool, results: Results, start: float
) -> bool:
    """Run the steps of the ``chosen`` sections. Returns False if interrupted."""

    def on_result(key: str, result: dict[str, Any]) -> None:
        results.add(key, result)
        now = int(time.time() - start)
        print(f"{now // 60:3}:{now % 60:02}  {result['status']:<13}  {key:<66}  {result['line']}", flush=True)

    first = _worker(context, "machine")
    try:
        result = first.run("machine", DEVICE, 120.0)
    except KeyboardInterrupt:
        return False
    finally:
        first.close()
    if "machine" not in result:
        raise SystemExit(f"the device cannot be used: {result['line']}\n{result.get('detail', '')}")
    results.identify(result["machine"])
    on_result(f"machine: {DEVICE}", result)
    peak = plan.peak_of(result["machine"]["gpu"]) if context.device == "cuda" else None
    clock = Clock(start, (context.end - start) / 60, peak)
    most = result["processes"]
    complete = True
    try:
        for section in chosen:
            left = [step for step in section.steps if results.missing(section.key(step), again)]
            workers = [_worker(context, f"{section.name}-{i}") for i in range(min(section.processes, most, len(left)))]
            run_steps(section, left, workers, clock, on_result)
            _write_report(context.folder, results, every)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        complete = False
    _write_report(context.folder, results, every)
    missing = sum(results.missing(section.key(step), False) for section in chosen for step in section.steps)
    rest = f"; {missing} not reached: the same command continues with them" if missing else ""
    print(f"\n{report.count(results)}{rest}\n{results.path}, {context.folder / 'report.md'}")
    return complete


def _write_report(folder: Path, results: Results, every: list[Section]) -> None:
    write_text(folder / "report.md", report.markdown(results, every))


def _worker(context: Context, name: str) -> Worker:
    logs = context.folder / "logs"
    logs.mkdir(exist_ok=True)
    return Worker(context, logs / f"{name}.txt")
