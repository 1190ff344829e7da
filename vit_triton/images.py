"""Images of any kind as RGB, or refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class ImageError(ValueError):
    """An image that is refused; the message names it and says why."""


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as RGB, turned upright as its camera says; of an animation the first frame.

    What is transparent becomes white. Gray of 16 bits is scaled to 8.

    Raises:
        ImageError: there is none, it is damaged, is larger than Pillow takes it for an attack, or has values without a
            known range.
    """
    try:
        with warnings.catch_warnings():
            # Half of the size that is refused, and notes about metadata that nothing here reads
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        reason = "no such file"
    except IsADirectoryError:
        reason = "a folder; name the images in it"
    except UnidentifiedImageError:
        reason = "no image, or of a kind that Pillow does not know"
    except Image.DecompressionBombError:
        reason = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which Pillow takes for an attack"
    except Exception as error:  # a damaged file raises nearly anything
        reason = f"cannot be read: {error}"
    raise ImageError(f"{path}: {' '.join(reason.split())}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _gray(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _gray(values: np.ndarray) -> Image.Image:
    """Of 16-bit integers, or floats from 0 to 1, which Pillow's convert would cut off at 255."""
    low, high = values.min(), values.max()
    most = 1 if values.dtype.kind == "f" else 65535
    if not 0 <= low <= high <= most:  # NaN, too
        raise ValueError(f"gray values from {low} to {high}, expected 0 to {most}")
    return Image.fromarray(np.round(values * (255 / most)).astype(np.uint8))
