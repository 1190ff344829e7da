"""A process that runs steps one at a time; a step that crashes or hangs does not affect other steps."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.step import SEED, Context, Skip, WrongNumbers
from vit_triton.cli.errors import is_out_of_memory

PASSED, SKIPPED, WRONG, FAILED = "passed", "skipped", "wrong", "failed"
CRASHED, HUNG, OUT_OF_MEMORY = "crashed", "hung", "out of memory"
BAD = (WRONG, FAILED, CRASHED, HUNG, OUT_OF_MEMORY)
DETAIL = 3000  # characters kept of a traceback or log


class Worker:
    """Starts its process at the first step, and again after a crash. Output goes to the file ``log``."""

    def __init__(self, context: Context, log: Path) -> None:
        self.context, self.log = context, log
        self._process: Any = None
        self._connection: Any = None

    def run(self, section: str, step: str, limit: float) -> dict[str, Any]:
        """Run a step. The result has "status", "seconds", "line" and facts; a bad result also has "detail"."""
        start = time.monotonic()
        if self._process is None:
            self._start()
        process, connection = self._process, self._connection
        before = self.log.stat().st_size
        result: dict[str, Any]
        try:
            connection.send((section, step))
            if connection.poll(limit):
                result = connection.recv()
            else:
                result = {"status": HUNG, "line": f"no result within {limit:.0f} s"}
        except (EOFError, OSError):  # also when another thread closes the connection
            process.join(5)
            result = {"status": CRASHED, "line": _exit_message(process.exitcode)}
        if result["status"] in (HUNG, CRASHED) or result.pop("ends", False):
            self.close()
            with self.log.open("rb") as file:
                file.seek(max(before, self.log.stat().st_size - DETAIL))
                result.setdefault("detail", file.read().decode(errors="replace").strip())
        return {**result, "seconds": round(time.monotonic() - start, 2)}

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self.log.touch()
        process = spawn.Process(target=_serve, args=(theirs, self.context, self.log), daemon=False)
        process.start()
        self._process = process
        theirs.close()

    def close(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its process group, if it exists already
            process.kill()
            process.join()
            self._connection.close()


def _exit_message(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"the process ended with {name}" + (
            ", which the system sends when memory runs out" if name == "SIGKILL" else ""
        )
    return f"the process ended with exit code {code}"


# --- in the process ----------------------------------------------------------------------------------------


def _serve(connection: Connection, context: Context, log: Path) -> None:
    os.setsid()  # a new process group: children end with it, and Ctrl-C does not reach it
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from benchmarks.gpu.sections import sections

    steps = {(section.name, step.name): step for section in sections(context) for step in section.steps}
    while True:
        try:
            asked = connection.recv()
        except EOFError:  # the command has ended
            return
        print(f"== {': '.join(asked)}", flush=True)
        connection.send(_result(steps[asked], context))


def _end_with(command: Any) -> None:
    """End this process group after the command ends: a killed command cannot end it."""
    command.join()
    os.killpg(0, signal.SIGKILL)


def _result(step: Any, context: Context) -> dict[str, Any]:
    torch.manual_seed(SEED)
    try:
        facts = step.run(context)
        if context.device == "cuda":
            torch.cuda.synchronize()  # an illegal access is an error of this step
        result = {"status": PASSED, **facts}
    except Skip as reason:
        result = {"status": SKIPPED, "line": str(reason)}
    except WrongNumbers as wrong:
        result = {"status": WRONG, "line": str(wrong), **wrong.facts}
    except Exception as error:  # from any package; other steps continue
        status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
        line = " ".join(f"{type(error).__name__}: {error}".split())
        result = {"status": status, "line": line[:300], "detail": traceback.format_exc()[-DETAIL:]}
    result["ends"] = not _is_usable(context)
    return result


def _is_usable(context: Context) -> bool:
    """Whether the process can run further steps. After an illegal access all GPU calls fail; after a failed CUDA graph
    capture, random numbers fail."""
    gc.collect()
    if context.device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.randn(1, device="cuda")
        except Exception:
            return False
    return True
