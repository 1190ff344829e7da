"""Reports of refused images, and output of pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vit_triton.images import ImageError
from vit_triton.weights.atomic import write_atomically

matplotlib.use("Agg")


FORMATS = (".png", ".jpg", ".webp")


def exit_code(refused: dict[Path, ImageError], images: int) -> int:
    """List the refused images on stderr; return 1 if there are any, else 0."""
    if refused:
        print(f"vit-triton: {len(refused)} of {images} images refused", file=sys.stderr)
        for error in refused.values():
            print(f"  {error}", file=sys.stderr)
    return 1 if refused else 0


def check_picture(path: Path) -> None:
    """Check the ending and folder of ``path`` before the model runs."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--out must end in {', '.join(FORMATS)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: folder {path.parent} does not exist")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture atomically."""
    options: dict[str, Any] = dict(dpi=100, format=path.suffix[1:], facecolor="white", pil_kwargs={"quality": 90})
    write_atomically(path, lambda file: figure.savefig(file, **options))
    print(f"wrote {path}")
