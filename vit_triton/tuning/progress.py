"""A progress bar on stderr, and Ctrl-C that ends the work and keeps what is done."""

import contextlib
import io
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

WIDTH = 40  # of the bar, in characters
CLEAR = "\r\x1b[2K"  # back to the start of the terminal's line, and erase it


class Progress:
    """Of some work: ``complete`` once it came to its end, and was not interrupted."""

    complete = False

    def __init__(self, draw: Callable[[str], None] = lambda done: None) -> None:
        self.advance = draw  # to be called with what is done, after each piece of the work


@contextlib.contextmanager
def progress(total: int) -> Iterator[Progress]:
    """Around work in ``total`` pieces. Ctrl-C ends the work, not the program: what was done until then can be kept.

    The bar is on stderr, where that is a terminal. It is drawn between pieces only: a thread that draws takes time.
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
    """Stdout while the bar is on the same terminal: what is printed takes the bar's line, and the bar the next one."""

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
