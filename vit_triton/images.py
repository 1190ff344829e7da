"""Images of any kind as RGB, or refused by name."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 26  # 256 MiB as RGB; while it is made, up to a GiB


class ImageError(ValueError):
    """An image that is refused; the message names it and says why."""


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as RGB, turned upright as its camera says; of an animation the first frame.

    What is transparent becomes white. Gray of 16 bits is scaled to 8. A JPEG of more than MAX_PIXELS is decoded at half
    of its width and height, unless it is progressive.

    Raises:
        ImageError: there is no such file, it is not a regular file, is damaged, has more pixels than MAX_PIXELS or
            than Pillow takes for an attack, or has values without a known range.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe waits for its writer
            raise ImageError("a folder; name the images in it" if Path(path).is_dir() else "not a regular file")
        with warnings.catch_warnings():
            # Half of the size that is refused, and notes about metadata that nothing here reads
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _limit(image)
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except ImageError as error:
        reason = str(error)
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "no image, or of a kind that Pillow does not know"
    except Image.DecompressionBombError:
        reason = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which Pillow takes for an attack"
    except Exception as error:  # a damaged file raises nearly anything
        reason = f"cannot be read: {error}"
    raise ImageError(f"{path}: {' '.join(reason.split())}")


def _limit(image: Image.Image) -> None:
    """Before anything is decoded: have the decoder halve a large JPEG, and refuse what stays too large."""
    width, height = image.size
    # the decoder of a progressive JPEG holds every coefficient, however small the result
    if width * height > MAX_PIXELS and not image.info.get("progressive"):
        image.draft(None, (width // 2, height // 2))
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are read")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _gray(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray(values: np.ndarray) -> Image.Image:
    """Of 16-bit integers, or floats from 0 to 1, which Pillow's convert would cut off at 255."""
    low, high = values.min(), values.max()
    most = 1 if values.dtype.kind == "f" else 65535
    if not 0 <= low <= high <= most:  # NaN, too
        raise ValueError(f"gray values from {low} to {high}, expected 0 to {most}")
    scaled = np.multiply(values, 255 / most, dtype=np.float32)
    return Image.fromarray(np.round(scaled, out=scaled).astype(np.uint8))
