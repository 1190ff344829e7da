"""Reading of image files as RGB."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 26  # 256 MiB as RGB, up to 1 GiB during the conversion


class ImageError(ValueError):
    """An image cannot be read; the message has its path and the reason."""


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, rotated according to its EXIF orientation; the first frame of an animation.

    Transparent pixels become white. 16-bit gray is scaled to 8 bits. A JPEG with more than MAX_PIXELS is decoded at
    half its width and height unless it is progressive.

    Raises:
        ImageError: The file is missing, not a regular file or damaged, or the image has more than MAX_PIXELS, exceeds
            Pillow's limit against decompression bombs, or has gray values out of range.
    """
    with _named_errors(str(path)):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe waits for its writer
            raise ImageError("a folder; name the images in it" if Path(path).is_dir() else "not a regular file")
        with Image.open(path) as image:
            return _decode(image)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Read the contents of an image file as :func:`open_image` does; ``name`` is for messages.

    Raises:
        ImageError: The image is damaged or too large.
    """
    with _named_errors(name), Image.open(io.BytesIO(content)) as image:
        return _decode(image)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Convert every error to an ImageError that starts with ``name``."""
    try:
        with warnings.catch_warnings():
            # warnings about large images below the limit and about unused metadata
            warnings.simplefilter("ignore")
            yield
            return
    except ImageError as error:
        reason = str(error)
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "not an image, or a format that Pillow does not support"
    except Image.DecompressionBombError:
        reason = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, Pillow's limit"
    except Exception as error:  # damaged files raise exceptions of many types
        reason = f"cannot be read: {error}"
    raise ImageError(f"{name}: {' '.join(reason.split())}")


def _decode(image: Image.Image) -> Image.Image:
    _limit(image)
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _limit(image: Image.Image) -> None:
    """Make the decoder halve a large JPEG, and raise ImageError if the image remains too large."""
    width, height = image.size
    # the decoder of a progressive JPEG holds all coefficients in memory even at half size
    if width * height > MAX_PIXELS and not image.info.get("progressive"):
        image.draft(None, (width // 2, height // 2))
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS:,}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _gray(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray(values: np.ndarray) -> Image.Image:
    """Scale 16-bit integers, or floats from 0 to 1, to 8 bits; Pillow's convert would clip them at 255."""
    low, high = values.min(), values.max()
    most = 1 if values.dtype.kind == "f" else 65535
    if not 0 <= low <= high <= most:  # NaN, too
        raise ValueError(f"gray values from {low} to {high}, expected 0 to {most}")
    scaled = np.multiply(values, 255 / most, dtype=np.float32)
    return Image.fromarray(np.round(scaled, out=scaled).astype(np.uint8))
