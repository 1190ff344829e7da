"""Labelled images from files of several kinds, see :data:`KINDS`."""

from __future__ import annotations

import csv
import dataclasses
import functools
import glob
import gzip
import importlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from vit_triton.training.extras import extra
from vit_triton.training.splits import NAMES

if TYPE_CHECKING:
    from PIL import Image

CIFAR10_FILE = "cifar-10-python.tar.gz"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/" + CIFAR10_FILE
KINDS = (
    "digits, cifar10, idx:FOLDER, a folder of images, FILE.csv, hf:FOLDER, FILE.parquet, wds:SHARDS or "
    "tensorbay:LOADER=PATH"
)
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")  # in shards
TENSORBAY = (  # its own requirements do not build on Python 3.11
    "pip install --no-deps tensorbay==1.24.2",
    "pip install numpy-quaternion click filetype requests requests-toolbelt tqdm typing-extensions ulid-py urllib3",
)
LABELLED = ("csv", "hf", "wds", "tensorbay")  # kinds of data with a choice of labels
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


def kind_of(data: str) -> str:
    """Return "idx", "hf", "wds", "tensorbay" or "csv", or "" for digits, cifar10 and a folder."""
    kind, _, rest = data.partition(":")
    if kind in ("idx", "hf", "wds", "tensorbay") and rest:
        return kind
    return "hf" if data.endswith(".parquet") else "csv" if data.endswith(".csv") else ""


def open_source(data: str, *, folder: Path = Path("data"), download: bool = False, label: str | None = None) -> Source:
    """Open ``data``: digits, cifar10, idx:FOLDER, a folder of images, FILE.csv, hf:FOLDER, FILE.parquet,
    wds:SHARDS or tensorbay:LOADER=PATH.

    Args:
        folder: the folder of cifar10.
        download: whether to download cifar10 if it is missing.
        label: the column of the label in CSV and Hugging Face data ("label" by default), the ending of the label's
            file in shards ("cls" by default), attribute:NAME or attribute:NAME>NUMBER for tensorbay.

    Raises:
        FileNotFoundError: The data are missing; the message gives the expected path.
        ImportError: A package is missing; the message gives the command to install it.
        ValueError: The data are damaged or contain no images.
    """
    kind, rest = kind_of(data), data.partition(":")[2]
    if label is not None and kind not in LABELLED:
        raise ValueError(f"label must be unset except for .csv, hf:, .parquet, wds: and tensorbay: data, got {label!r}")
    if data == "digits":
        source = _digits()
    elif data == "cifar10":
        source = _cifar10(folder, download)
    elif kind == "idx":
        source = _idx(Path(rest), data)
    elif kind == "hf":
        source = _hugging_face(Path(data.removeprefix("hf:")), data, label or "label")
    elif kind == "wds":
        source = _shards(rest, data, label or "cls")
    elif kind == "tensorbay":
        source = _tensorbay(rest, data, label)
    elif kind == "csv":
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


def _files(
    data: str,
    classes: Sequence[str],
    labels: Sequence[int],
    names: Sequence[str],
    splits: Sequence[str] | None,
    contents: Callable[[int], bytes | str],
) -> Source:
    """Return a source of image files. They are gray if all of about 16 images are.

    Args:
        contents: returns the bytes or the path of an image.
    """
    some = range(0, len(names), max(1, len(names) // 16))
    channels = 1 if all(_is_gray(contents(i)) for i in some) else 3
    read = functools.partial(_read_file, contents, tuple(names))
    splits = None if splits is None else tuple(splits)
    return Source(data, tuple(classes), tuple(labels), tuple(names), splits, read, channels)


def _read_file(contents: Callable[[int], bytes | str], names: Sequence[str], i: int) -> Image.Image:
    from vit_triton.images import decode_image, open_image

    content = contents(i)
    return decode_image(content, names[i]) if isinstance(content, bytes) else open_image(content)


def _is_gray(content: bytes | str) -> bool:
    """Return whether an image has one channel, False if it is damaged."""
    from PIL import Image

    if isinstance(content, str) and not os.path.isfile(content):
        return False
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return image.mode in ("1", "L", "I;16")
    except Exception:  # damaged images raise exceptions of many types; they are reported when they are used
        return False


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
        reason = str(error).partition(" You can use")[0].rstrip(".")  # torchvision's advice has another argument
        raise FileNotFoundError(
            f"cifar10 not found: {reason}. Download {CIFAR10_URL} to {archive}, or use --download (download=True)"
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
                where = folder / part / classes[empty[0]]
                raise ValueError(f"data: no images in {where}; the extensions are {', '.join(extensions)}")
            found += [(part, path, classes[label]) for path, label in listed]
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise type(error)(
            f"data: {str(error).rstrip('.')}. {data} must be {KINDS}; a folder has {folder}/CLASS/*.jpg, or "
            f"{folder}/train/CLASS/*.jpg and {folder}/val/CLASS/*.jpg, {folder}/test/CLASS/*.jpg or both"
        ) from error
    names = tuple(sorted({name for *_, name in found}))
    index = {name: i for i, name in enumerate(names)}
    paths = tuple(path for _, path, _ in found)
    return _files(
        data,
        names,
        [index[name] for *_, name in found],
        [Path(os.path.relpath(path, folder)).as_posix() for path in paths],
        None if parts == [""] else [part for part, *_ in found],
        paths.__getitem__,
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
        if (before := first.setdefault(os.path.normpath(row["path"]), line)) != line:
            raise ValueError(f"data: {file}, line {line}: {row['path']} is also in line {before}")
        if "split" in needed and (split := row["split"]) not in SPLITS:
            raise ValueError(f"data: {file}, line {line}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    classes, labels = _numbered(row[column] for _, row in rows)
    names = [row["path"] for _, row in rows]
    splits = [SPLITS[row["split"]] for _, row in rows] if "split" in needed else None
    return _files(data, classes, labels, names, splits, [str(file.parent / name) for name in names].__getitem__)


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
    splits = [SPLITS[split] for split, part in parts.items() for _ in range(len(part))]
    source = _files(data, classes, labels, names, splits, functools.partial(_row_contents, columns, column))
    return source.select(range(len(names))) if len(set(labels)) < len(classes) else source


def _row_contents(parts: Sequence[Any], column: str, i: int) -> bytes | str:
    """Return the bytes or the path of an image of a data set in several parts."""
    for part in parts:
        if i < len(part):
            row = part[i][column] or {}
            return row.get("bytes") or row.get("path") or b""
        i -= len(part)
    raise IndexError(i)


# --- webdataset --------------------------------------------------------------------------------------------


def _shards(pattern: str, data: str, ending: str) -> Source:
    """Index the shards of webdataset: tar files with KEY.jpg (or another image) and KEY.cls, the label, per image."""
    paths = [path for name in _expand(pattern) for path in (sorted(glob.glob(name)) if "*" in name else [name])]
    shards = list(dict.fromkeys(paths))
    if not shards:
        raise FileNotFoundError(f"data: no file matches {pattern}")
    found: list[tuple[str, str, str, int, int]] = []  # label, name, shard, offset, size
    for shard in shards:
        try:
            found += _samples(shard, ending)
        except FileNotFoundError:
            raise FileNotFoundError(f"data: {shard}: no such file") from None
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"data: {shard} is not an uncompressed tar file: {error}") from error
    classes, labels = _numbered(label for label, *_ in found)
    names = [name for _, name, *_ in found]
    # the name of a shard can start with its split, as in train-000.tar
    starts = [re.match("[a-z]*", Path(shard).name)[0] for _, _, shard, *_ in found]  # type: ignore[index]
    splits = [SPLITS[start] for start in starts] if {*starts} <= SPLITS.keys() else None
    places = [(shard, offset, size) for _, _, shard, offset, size in found]
    return _files(data, classes, labels, names, splits, functools.partial(_member_contents, places))


def _expand(pattern: str) -> list[str]:
    """Expand the braces of a pattern: {000..009} and {a,b}."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    between = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    options = braces[1].split(",")
    if between:
        options = [str(i).zfill(len(between[1])) for i in range(int(between[1]), int(between[2]) + 1)]
    return [
        name for option in options for name in _expand(pattern[: braces.start()] + option + pattern[braces.end() :])
    ]


def _samples(shard: str, ending: str) -> Iterator[tuple[str, str, str, int, int]]:
    """Yield the label, name, shard, offset and size of each image of a shard."""
    images: dict[tuple[str, str], tuple[str, int, int]] = {}
    labels: dict[tuple[str, str], str] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            folder, name = os.path.split(member.name)
            key, _, kind = name.partition(".")
            if not member.isfile():
                continue
            if kind.lower() in IMAGE_ENDINGS:
                images[folder, key] = (member.name, member.offset_data, member.size)
            elif kind == ending:
                labels[folder, key] = cast(IO[bytes], tar.extractfile(member)).read().decode(errors="replace").strip()
    for (folder, key), (member_name, offset, size) in images.items():
        name = f"{Path(shard).name}/{member_name}"
        if not (label := labels.get((folder, key))):
            raise ValueError(f"data: {name} has no label, {key}.{ending}; --label (label=...) selects another ending")
        yield label, name, shard, offset, size


def _member_contents(places: Sequence[tuple[str, int, int]], i: int) -> bytes:
    shard, offset, size = places[i]
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)


# --- TensorBay ---------------------------------------------------------------------------------------------


def _tensorbay(rest: str, data: str, label: str | None) -> Source:
    """Load files in the layout of a data set that tensorbay.opendataset describes."""
    name, _, path = rest.partition("=")
    wanted = re.fullmatch(r"attribute:([^>]+)(?:>(.+))?", label or "")
    limit = None
    try:
        limit = float(wanted[2]) if wanted and wanted[2] else None
    except ValueError:
        wanted = None
    if label is not None and wanted is None:
        raise ValueError(f"label must be attribute:NAME or attribute:NAME>NUMBER for tensorbay, got {label!r}")
    if not path:
        raise ValueError(f"data: tensorbay needs the name of a loader and a path, tensorbay:LOADER=PATH, got {data!r}")
    try:
        opendataset = importlib.import_module("tensorbay.opendataset")
    except ImportError as error:
        raise ImportError(f"{error}: tensorbay: data require {' and '.join(TENSORBAY)}") from error
    if not callable(load := getattr(opendataset, name, None)):
        raise ValueError(f"data: tensorbay.opendataset has no loader {name!r}; dir(tensorbay.opendataset) lists them")
    try:
        dataset = load(path)
    except ImportError:
        raise
    except Exception as error:  # missing and damaged files raise exceptions of many types
        raise ValueError(
            f"data: tensorbay's {name} cannot read {path}: {type(error).__name__}: {error}; "
            f"help(tensorbay.opendataset.{name}) shows the files it reads"
        ) from error
    images = [(segment.name, image) for segment in dataset for image in segment]
    values, above = [], (label or "").partition(":")[2]
    for _, image in images:
        classification = getattr(image.label, "classification", None)
        attributes = getattr(classification, "attributes", None) or {}
        value = attributes.get(wanted[1]) if wanted else getattr(classification, "category", None)
        if value is None or limit is not None and not isinstance(value, (int, float)):
            has = ", ".join(f"attribute:{each}" for each in attributes) or "none"
            raise ValueError(f"data: {image.path} has no {label or 'category'}; its attributes are {has}")
        values.append(str(value) if limit is None else above if value > limit else f"not {above}")
    classes, labels = _numbered(values)
    starts = [segment.lower() for segment, _ in images]
    splits = [SPLITS[start] for start in starts] if {*starts} <= SPLITS.keys() else None
    paths = [image.path for _, image in images]
    names = [os.path.relpath(each, path) for each in paths]
    return _files(data, classes, labels, names, splits, paths.__getitem__)
