"""Sizes of published Vision Transformers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Size of a model: ``width`` of the tokens, ``hidden`` width of the MLP, side of a ``patch`` in pixels."""

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int = 16


# Ti, S: Touvron et al. 2021 (arXiv:2012.12877), table 1; B, L, H: Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1;
# g: Zhai et al. 2022 (arXiv:2106.04560), table 2; SO400M: Alabdulmohsin et al. 2023 (arXiv:2305.13035).
SIZES = {
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "H": Size(1280, 32, 16, 5120, patch=14),
    "g": Size(1408, 40, 16, 6144, patch=14),
    "SO400M": Size(1152, 27, 16, 4304, patch=14),
}
