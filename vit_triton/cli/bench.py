"""``vit-triton bench``: runs the benchmarks of the repository. The wheel does not include them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import vit_triton


def run(options: argparse.Namespace) -> int:
    return run_checkout(options.arguments)


def run_checkout(arguments: list[str]) -> int:
    """Run the benchmarks of a checkout: the working directory, or else the parent folder of this package.

    Raises:
        FileNotFoundError: Neither folder is a checkout.
    """
    roots = (Path.cwd(), Path(vit_triton.__file__).parents[1])
    root = next((root for root in roots if (root / "benchmarks/runner.py").is_file()), None)
    if root is None:
        raise FileNotFoundError(
            "bench: the installed package does not include the benchmarks; run the command in a checkout of "
            "vit_triton's repository"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
