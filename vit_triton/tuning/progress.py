"""A progress bar on stderr for work that can be stopped with Ctrl-C without losing results."""

import contextlib
import io
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

WIDTH = 40  # of the bar, in characters
CLEAR = "\r\x1b[2K"  # return to the start of the line and erase it


class Progress:
    """Progress of some work; ``complete`` is set if the work ends without interruption."""

    complete = False

    def __init__(self, draw: Callable[[str], None] = lambda done: None) -> None:
        self.advance = draw  # call with a description after each part of the work


@contextlib.contextmanager
def progress(total: int) -> Iterator[Progress]:
    """Context manager for work in ``total`` parts. Ctrl-C ends the work, but not the program.

    The bar is shown if stderr is a terminal. It is drawn only between parts, so that drawing does not affect
    measurements.
    """
    with _bar(total) as draw:
        made = Progress(draw)
        try:
            yield made
            made.complete = True
        except KeyboardInterrupt:
            print("stopped", flush=True)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    bar = _Bar(total, sys.stderr)
    with contextlib.redirect_stdout(_AboveBar(bar, sys.stdout)) if sys.stdout.isatty() else contextlib.nullcontext():
        bar.draw()
        try:
            yield bar.advance
        finally:
            bar.stream.write("\n")


class _Bar:
    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.stream = total, stream
        self.done, self.description, self.start = 0, "", time.monotonic()

    def advance(self, done: str) -> None:
        self.done, self.description = self.done + 1, done
        self.draw()

    def draw(self) -> None:
        filled = WIDTH * self.done // max(self.total, 1)
        left = "-:--:--"
        if self.done:
            seconds = round((time.monotonic() - self.start) / self.done * (self.total - self.done))
            left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        line = f"{'#' * filled:-<{WIDTH}} {self.done}/{self.total} {left} {self.description}"
        self.stream.write(CLEAR + line[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()


class _AboveBar(io.TextIOBase):
    """Stdout for a terminal with the bar: replace the bar with the printed line and draw the bar below it."""

    def __init__(self, bar: _Bar, stdout: TextIO) -> None:
        self.bar, self.stdout, self.new_line = bar, stdout, True

    def write(self, text: str) -> int:
        if text:
            self.stdout.write(CLEAR + text if self.new_line else text)
            self.stdout.flush()
            self.new_line = text.endswith("\n")
            if self.new_line:
                self.bar.draw()
        return len(text)

    def flush(self) -> None:
        self.stdout.flush()
