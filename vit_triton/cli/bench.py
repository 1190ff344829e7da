"""``vit-triton bench``: hands over to the benchmarks, which are a folder of the repository and in no wheel."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import vit_triton


def run(options: argparse.Namespace) -> int:
    return hand_over(options.arguments)


def hand_over(arguments: list[str]) -> int:
    """Run the benchmarks of the checkout that is the working directory, or else that this package lies in.

    Raises:
        FileNotFoundError: neither is one.
    """
    roots = (Path.cwd(), Path(vit_triton.__file__).parents[1])
    root = next((root for root in roots if (root / "benchmarks/runner.py").is_file()), None)
    if root is None:
        raise FileNotFoundError(
            "bench: the benchmarks are not installed with the package; run it in a checkout of vit_triton's "
            "repository, which has the folder benchmarks"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
