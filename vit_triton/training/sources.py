"""Labelled images: digits, cifar10, idx files, folders, CSV files, and data sets of Hugging Face."""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import io
import os
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_triton.training.extras import extra
from vit_triton.training.splits import NAMES

if TYPE_CHECKING:
    from PIL import Image

CIFAR10_FILE = "cifar-10-python.tar.gz"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/" + CIFAR10_FILE
KINDS = "digits, cifar10, idx:FOLDER, a folder of images, FILE.csv, hf:FOLDER or FILE.parquet"
SPLITS = {**dict(zip(NAMES, NAMES, strict=True)), "validation": "val", "valid": "val"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Labelled images, which are decoded on demand.

    Attributes:
        name: the string that :func:`open_source` opened.
        labels: the index in ``classes`` of each image.
        names: the name of each image in messages.
        splits: "train", "val" or "test" for each image, or None if the data do not say.
        read: decodes an image.
        channels: 1 for gray images, else 3.
    """

    name: str
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    splits: tuple[str, ...] | None
    read: Callable[[int], Image.Image]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """Decode an image, of mode L or RGB.

        Raises:
            ValueError: The image is damaged; the message names it.
        """
        return self.read(i).convert("L" if self.channels == 1 else "RGB")

    def select(self, indices: Sequence[int]) -> Source:
        """Return the source with these images only. Classes without images are dropped."""
        labels = [self.labels[i] for i in indices]
        kept = sorted(set(labels))
        return dataclasses.replace(
            self,
            classes=tuple(self.classes[label] for label in kept),
            labels=tuple(map({label: new for new, label in enumerate(kept)}.__getitem__, labels)),
            names=tuple(self.names[i] for i in indices),
            splits=None if self.splits is None else tuple(self.splits[i] for i in indices),
            read=functools.partial(_read_selected, self.read, tuple(indices)),
        )


def open_source(data: str, *, folder: Path = Path("data"), download: bool = False, label: str | None = None) -> Source:
    """Open ``data``: digits, cifar10, idx:FOLDER, a folder of images, FILE.csv, hf:FOLDER or FILE.parquet.

    Args:
        folder: the folder of cifar10.
        download: whether to download cifar10 if it is missing.
        label: the column of the label in CSV and Hugging Face data; "label" by default.

    Raises:
        FileNotFoundError: The data are missing; the message gives the expected path.
        ImportError: A package is missing; the message gives the command to install it.
        ValueError: The data are damaged or contain no images.
    """
    kind, _, rest = data.partition(":")
    is_parquet = data.endswith(".parquet")
    if label is not None and not (data.endswith(".csv") or is_parquet or kind == "hf"):
        raise ValueError(f"label must be unset except for FILE.csv, hf:FOLDER and FILE.parquet, got {label!r}")
    if data == "digits":
        source = _digits()
    elif data == "cifar10":
        source = _cifar10(folder, download)
    elif kind == "idx" and rest:
        source = _idx(Path(rest), data)
    elif kind == "hf" and rest or is_parquet:
        source = _hugging_face(Path(rest if kind == "hf" else data), data, label or "label")
    elif data.endswith(".csv"):
        source = _csv(Path(data), data, label or "label")
    else:
        source = _folder(Path(data), data)
    if not source.labels:
        raise ValueError(f"data: {data} contains no images")
    return source


def _read_selected(read: Callable[[int], Image.Image], indices: Sequence[int], i: int) -> Image.Image:
    return read(indices[i])


def _read_array(images: np.ndarray, i: int) -> Image.Image:
    from PIL import Image

    return Image.fromarray(images[i])


def _read_file(paths: Sequence[str], i: int) -> Image.Image:
    from vit_triton.images import open_image

    return open_image(paths[i])


def _numbered(labels: Iterable[Hashable]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the sorted names of the classes, numbers in numerical order, and the index of each label."""
    labels = list(labels)
    values: list[Any] = list(set(labels))
    try:
        values.sort(key=int)
    except (TypeError, ValueError):
        values.sort(key=str)
    index = {value: i for i, value in enumerate(values)}
    return tuple(map(str, values)), tuple(index[label] for label in labels)


def _digits() -> Source:
    """Load scikit-learn's digits: 1,797 scans of 8 x 8 pixels."""
    scans = extra("sklearn.datasets").load_digits()
    images = np.round(scans.images * (255 / 16)).astype(np.uint8)
    names = tuple(f"scan {i}" for i in range(len(images)))
    classes, labels = _numbered(scans.target.tolist())
    return Source("digits", classes, labels, names, None, functools.partial(_read_array, images), channels=1)


def _cifar10(folder: Path, download: bool) -> Source:
    torchvision = extra("torchvision")
    archive, kind = folder / CIFAR10_FILE, torchvision.datasets.CIFAR10
    # with a valid archive, "download" only unpacks it
    is_unpacked = (folder / kind.base_folder).is_dir()
    unpack = download or not is_unpacked and torchvision.datasets.utils.check_integrity(archive, kind.tgz_md5)
    try:
        parts = {name: kind(folder, train=name == "train", download=unpack) for name in ("train", "test")}
    except (OSError, RuntimeError) as error:  # from urllib, and from torchvision for missing files
        raise FileNotFoundError(
            f"cifar10 not found: {error}. Download {CIFAR10_URL} to {archive}, or use --download (download=True)"
        ) from error
    names = [(name, f"{name}/{i}") for name, part in parts.items() for i in range(len(part))]
    return Source(
        "cifar10",
        tuple(parts["train"].classes),
        tuple(label for part in parts.values() for label in part.targets),
        tuple(name for _, name in names),
        tuple(split for split, _ in names),
        functools.partial(_read_array, np.concatenate([part.data for part in parts.values()])),
    )


# --- idx ---------------------------------------------------------------------------------------------------


def _idx(folder: Path, data: str) -> Source:
    """Load gray images in the format of MNIST: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..."""
    images, labels, names, splits = [], [], [], []
    for prefix, split in (("train", "train"), ("t10k", "test")):
        paths = [_idx_file(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if paths == [None, None]:
            continue
        for path, kind in zip(paths, ("images-idx3-ubyte", "labels-idx1-ubyte"), strict=True):
            if path is None:
                raise FileNotFoundError(f"data: {folder} has no {prefix}-{kind} or {prefix}-{kind}.gz")
        pixels, numbers = (_read_idx(path, dims) for path, dims in zip(paths, (3, 1), strict=True) if path)
        if len(pixels) != len(numbers):
            raise ValueError(f"data: {paths[0]} has {len(pixels)} images, {paths[1]} has {len(numbers)} labels")
        images.append(pixels)
        labels += numbers.tolist()
        names += [f"{prefix}/{i}" for i in range(len(pixels))]
        splits += [split] * len(pixels)
    if not images:
        raise FileNotFoundError(
            f"data: {folder} has no train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            "t10k-labels-idx1-ubyte, or these with .gz"
        )
    if len({part.shape[1:] for part in images}) > 1:
        raise ValueError(f"data: the images in {folder} have sizes {', '.join(str(x.shape[1:]) for x in images)}")
    classes, numbered = _numbered(labels)
    read = functools.partial(_read_array, np.concatenate(images))
    return Source(data, classes, numbered, tuple(names), tuple(splits), read, channels=1)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """Read an idx file of bytes: 0, 0, type 8, number of dimensions, the dimensions in 4 bytes each, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"data: {path} cannot be read: {error}") from error
    header = np.frombuffer(content[: 4 + 4 * dims], np.uint8)
    if header[:4].tolist() != [0, 0, 8, dims] or len(header) != 4 + 4 * dims:
        raise ValueError(f"data: {path} is not an idx file of bytes with {dims} dimension{'s' * (dims > 1)}")
    shape = header[4:].view(">u4").tolist()
    expected = int(np.prod(shape, dtype=object))
    if len(content) - len(header) != expected:
        raise ValueError(f"data: {path} has {len(content) - len(header):,} bytes of values, expected {expected:,}")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


# --- files -------------------------------------------------------------------------------------------------


def _folder(folder: Path, data: str) -> Source:
    """List FOLDER/CLASS/* or FOLDER/{train,val,test}/CLASS/*."""
    torchvision = extra("torchvision")
    try:
        _check_links(folder)
        with os.scandir(folder) as entries:
            inside = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        parts = [name for name in NAMES if name in inside]
        if not (inside and inside <= set(parts) or "train" in parts and len(parts) > 1):
            parts = [""]
        found = []  # (split, path, class)
        for part in parts:
            classes, index = torchvision.datasets.folder.find_classes(str(folder / part))
            extensions = torchvision.datasets.folder.IMG_EXTENSIONS
            listed = torchvision.datasets.folder.make_dataset(str(folder / part), index, extensions, allow_empty=True)
            if empty := sorted(set(range(len(classes))) - {label for _, label in listed}):
                raise FileNotFoundError(
                    f"no images in {folder / part / classes[empty[0]]}; the extensions are {', '.join(extensions)}"
                )
            found += [(part, path, classes[label]) for path, label in listed]
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise type(error)(
            f"data: {str(error).rstrip('.')}. {data} must be {KINDS}; a folder has {folder}/CLASS/*.jpg, or "
            f"{folder}/train/CLASS/*.jpg and {folder}/val/CLASS/*.jpg, {folder}/test/CLASS/*.jpg or both"
        ) from error
    names = tuple(sorted({name for *_, name in found}))
    index = {name: i for i, name in enumerate(names)}
    paths = tuple(path for _, path, _ in found)
    return Source(
        data,
        names,
        tuple(index[name] for *_, name in found),
        tuple(Path(os.path.relpath(path, folder)).as_posix() for path in paths),
        None if parts == [""] else tuple(part for part, *_ in found),
        functools.partial(_read_file, paths),
    )


def _check_links(folder: Path, above: tuple[Path, ...] = ()) -> None:
    """Raise ValueError if links to folders form a loop, in which torchvision would list images repeatedly."""
    real = folder.resolve()
    if real in above:
        raise ValueError(f"data: {folder} is a link to a folder that contains it")
    with os.scandir(folder) as entries:
        folders = [Path(entry) for entry in entries if entry.is_dir()]
    for inside in folders:
        _check_links(inside, (*above, real))


def _csv(file: Path, data: str, column: str) -> Source:
    """Read a CSV file with the columns path, label and optionally split. Paths are relative to the file."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            header = list(reader.fieldnames or [])
            for name in ("path", column):
                if name not in header:
                    option = "; --label (label=...) selects another column" if name == column else ""
                    raise ValueError(f"data: {file} has no column {name!r}, only {', '.join(header)}{option}")
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise FileNotFoundError(f"data: {file}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {file} is not a CSV file in UTF-8: {error}") from error
    needed = ["path", column, *(["split"] if "split" in header else [])]
    first: dict[str, int] = {}
    for line, row in rows:
        for name in needed:
            if not row[name]:
                raise ValueError(f"data: {file}, line {line}: the column {name!r} is empty")
        if first.setdefault(os.path.normpath(row["path"]), line) != line:
            raise ValueError(f"data: {file}, line {line}: {row['path']} is also in line {first[row['path']]}")
        if "split" in needed and (split := row["split"]) not in SPLITS:
            raise ValueError(f"data: {file}, line {line}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    classes, labels = _numbered(row[column] for _, row in rows)
    names = tuple(row["path"] for _, row in rows)
    paths = tuple(str(file.parent / name) for name in names)
    splits = tuple(SPLITS[row["split"]] for _, row in rows) if "split" in needed else None
    return Source(data, classes, labels, names, splits, functools.partial(_read_file, paths))


# --- Hugging Face ------------------------------------------------------------------------------------------


def _hugging_face(path: Path, data: str, column: str) -> Source:
    """Open a folder of save_to_disk, a folder with data files, or a parquet file."""
    datasets = extra("datasets", "data")
    if not path.exists():
        raise FileNotFoundError(
            f"data: {path}: no such file or folder; expected a folder of datasets' save_to_disk, a folder of parquet "
            "files, or a parquet file"
        )
    try:
        if path.is_file():
            parts = {"train": datasets.Dataset.from_parquet(str(path))}
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            parts = datasets.load_from_disk(str(path))
        else:
            parts = datasets.load_dataset(str(path))
        parts = dict(parts) if isinstance(parts, dict) else {"train": parts}
    except Exception as error:  # damaged files raise exceptions of many types
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"data: {path} cannot be read: {type(error).__name__}: {reason}") from error
    if unknown := sorted(parts.keys() - SPLITS.keys()):
        raise ValueError(f"data: the splits of {path} must be of {', '.join(SPLITS)}, got {unknown[0]!r}")
    features = next(iter(parts.values())).features
    if column not in features:
        option = "--label (label=...) selects another column"
        raise ValueError(f"data: {path} has no column {column!r}, only {', '.join(features)}; {option}")
    # a parquet file that another program wrote has no type Image
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images += [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    if not images:
        raise ValueError(f"data: {path} has no column of images, only {', '.join(features)}")
    values = [value for part in parts.values() for value in part[column]]
    names = tuple(f"{split}/{i}" for split, part in parts.items() for i in range(len(part)))
    given: list[str] | None = getattr(features[column], "names", None)
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, (int, str)) or given and value not in range(len(given)):
            raise ValueError(f"data: {path}: expected a class in the column {column!r} of {name}, got {value!r}")
    if given:
        classes, labels = tuple(map(str, given)), tuple(values)
    else:
        classes, labels = _numbered(values)
    column, undecoded = images[0], datasets.Image(decode=False)
    columns = [part.select_columns(column).cast_column(column, undecoded) for part in parts.values()]
    read = functools.partial(_read_row, columns, column, names)
    some = range(0, len(names), max(1, len(names) // 16))
    is_gray = all(_mode(columns, column, i) in ("1", "L", "I;16") for i in some)
    splits = tuple(SPLITS[split] for split, part in parts.items() for _ in range(len(part)))
    source = Source(data, classes, labels, names, splits, read, 1 if is_gray else 3)
    return source.select(range(len(names))) if len(set(labels)) < len(classes) else source


def _row(parts: Sequence[Any], column: str, i: int) -> dict[str, Any]:
    """Return the dictionary with bytes and path of an image."""
    for part in parts:
        if i < len(part):
            return part[i][column] or {}
        i -= len(part)
    raise IndexError(i)


def _mode(parts: Sequence[Any], column: str, i: int) -> str | None:
    """Return the mode of an image, or None if it is damaged."""
    from PIL import Image

    row = _row(parts, column, i)
    try:
        with Image.open(io.BytesIO(row["bytes"]) if row.get("bytes") else row["path"]) as image:
            return image.mode
    except Exception:  # damaged images raise exceptions of many types; they are reported when they are used
        return None


def _read_row(parts: Sequence[Any], column: str, names: Sequence[str], i: int) -> Image.Image:
    from vit_triton.images import decode_image, open_image

    row = _row(parts, column, i)
    return decode_image(row["bytes"], names[i]) if row.get("bytes") else open_image(row.get("path") or names[i])
