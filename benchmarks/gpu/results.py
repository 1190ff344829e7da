"""The results of all runs in one file, which later runs continue."""

import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import IDENTITY
from benchmarks.gpu.process import BAD
from benchmarks.runner import write_json

FILE = "results.json"
FORMAT = 1


class Results:
    """``machine``: facts from the step "device and versions"; ``steps``: results by section and step."""

    def __init__(self, folder: Path, command: dict[str, Any]) -> None:
        self.path = folder / FILE
        self.machine: dict[str, str] = {}
        self.steps: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        if self.path.exists():
            self._read()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.runs.append({"date": now, **command})

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {content['format']!r}")
            self.machine, self.steps, self.runs = (content[name] for name in ("machine", "steps", "runs"))
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise SystemExit(
                f"--out: {self.path} holds no results of this command ({type(error).__name__}: {error}); remove it, or "
                "choose another folder"
            ) from None

    def identify(self, machine: dict[str, str]) -> None:
        """Set the ``machine`` of this run. Exits if the existing results are from another machine or version."""
        differ = [name for name in IDENTITY if self.machine and self.machine.get(name) != machine.get(name)]
        if differ:
            changes = ", ".join(f"{name} {self.machine.get(name)}, now {machine.get(name)}" for name in differ)
            raise SystemExit(
                f"--out: {self.path} holds results of another machine or version ({changes}): choose another"
            )
        self.machine = machine

    def missing(self, key: str, again: bool) -> bool:
        """Whether a step has no result or an incomplete one; with ``again``, also whether its result is bad."""
        result = self.steps.get(key)
        return result is None or result.get("complete") is False or (again and result["status"] in BAD)

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result and write the file; calls must not overlap."""
        self.steps[key] = result
        content = {"format": FORMAT, "machine": self.machine, "runs": self.runs, "steps": self.steps}
        write_json(self.path, content)
