"""The steps of a section, in one process or several."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.gpu.plan import Clock
from benchmarks.gpu.process import HUNG, Worker
from benchmarks.gpu.step import Section, Step

Keep = Callable[[str, dict[str, Any]], None]  # the name of a step in the results, and its result


def run_steps(section: Section, steps: Iterable[Step], workers: Sequence[Worker], clock: Clock, keep: Keep) -> None:
    """Give each of the ``workers`` a step after the other, of those that fit into the time of the section."""
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
                    return  # ended from outside: the step has no result
                with lock:
                    keep(section.key(step), result)
        except Exception as error:  # of keep: the disk is full, or stdout closed
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
            while thread.is_alive():  # it may have been about to start a process
                end()
                thread.join(0.1)
    if failures:
        raise failures[0]
