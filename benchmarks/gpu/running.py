"""Runs the steps of a section in one or several processes."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.gpu.plan import Clock
from benchmarks.gpu.process import HUNG, Worker
from benchmarks.gpu.step import Section, Step

OnResult = Callable[[str, dict[str, Any]], None]  # (key of the step, result)


def run_steps(
    section: Section, steps: Iterable[Step], workers: Sequence[Worker], clock: Clock, on_result: OnResult
) -> None:
    """Distribute the steps to the ``workers``. Steps that do not fit into the section's time are dropped."""
    left = deque(steps)
    lock = threading.Lock()
    stopped = threading.Event()
    failures: list[Exception] = []

    def next_step() -> Step | None:
        with lock:
            while left and not stopped.is_set():
                step = left.popleft()
                if clock.fits(section, step, time.time()):
                    return step
        return None

    def work(worker: Worker) -> None:
        try:
            while (step := next_step()) is not None:
                result = worker.run(section.name, step.name, clock.limit(step))
                if stopped.is_set() or (result["status"] == HUNG and time.time() >= clock.end):
                    return  # the process was ended from outside: no result
                with lock:
                    on_result(section.key(step), result)
        except Exception as error:  # raised by keep: disk full, stdout closed
            failures.append(error)
            end()

    def end() -> None:
        stopped.set()
        for worker in workers:
            worker.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        end()
        for thread in threads:
            while thread.is_alive():  # the thread may just have started a process
                end()
                thread.join(0.1)
    if failures:
        raise failures[0]
