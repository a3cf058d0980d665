"""Image data that is already on the machine: a folder of IDX files, Debian's Fashion-MNIST, or scikit-learn's digits.

Nothing is downloaded. IDX is the format of MNIST: two zero bytes, a type byte (8: unsigned byte), the number of
dimensions, each dimension as a big-endian 32-bit integer, then the values; often gzipped.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distopt.errors import ConfigError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST = "fashion-mnist"
DIGITS = "digits"
_UNSIGNED_BYTE = 8


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images, float32 of shape (count, 1, height, width) and normalised by the training set, with labels, int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart."""
        return int(self.train_labels.max()) + 1


def load(data: str | None) -> Dataset:
    """The data set that `data` names.

    Args:
        data: "digits", "fashion-mnist" (Debian's), a folder of IDX files, or None for the best that is installed.

    Raises:
        ConfigError: The folder or a file in it is missing or damaged, or what ships the data set is not installed.
    """
    if data == DIGITS:
        return _digits()
    if data == FASHION_MNIST and not DEBIAN_FASHION_MNIST.is_dir():
        raise ConfigError(
            f"{FASHION_MNIST!r} must be installed, {DEBIAN_FASHION_MNIST} does not exist; apt-get install "
            f"dataset-fashion-mnist, give a folder of IDX files, or {DIGITS!r} for scikit-learn's digits"
        )
    if data not in (None, FASHION_MNIST):
        return _idx_folder(Path(data), name=Path(data).name)
    if DEBIAN_FASHION_MNIST.is_dir():
        return _idx_folder(DEBIAN_FASHION_MNIST, name="Fashion-MNIST")
    return _digits()


def read_idx(path: Path) -> Tensor:
    """The tensor of unsigned bytes in an IDX file, gzipped or not.

    Raises:
        ConfigError: The file is missing, not IDX, not of unsigned bytes, or its length does not fit its header.
    """
    remedy = "give an IDX file of unsigned bytes as MNIST and Fashion-MNIST are published"
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read {path}: {error}; {remedy}") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise ConfigError(
            f"an IDX file must begin with the bytes 00 00 08, {path} begins {content[:3].hex(' ')!r}; {remedy}"
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ConfigError(f"{path} must hold {content[3]} dimensions, it ends inside them; {remedy}")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ConfigError(
            f"{path} must hold {math.prod(shape)} values for its shape {shape}, it holds {len(content) - header}; "
            "copy the file again"
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy())


def _idx_folder(folder: Path, *, name: str) -> Dataset:
    train, test = _idx_pair(folder, "train"), _idx_pair(folder, "t10k")
    return _normalised(name, *train, *test)


def _idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(_idx_file(folder, f"{part}-images"))
    labels = read_idx(_idx_file(folder, f"{part}-labels"))
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or len(images) == 0:
        raise ConfigError(
            f"{part}-images must have shape (count, height, width) and {part}-labels (count,) with the same count > 0, "
            f"got {tuple(images.shape)} and {tuple(labels.shape)} in {folder}; take both files from one data set"
        )
    return images.unsqueeze(1).float(), labels.long()


def _idx_file(folder: Path, stem: str) -> Path:
    found = sorted(folder.glob(f"{stem}*")) if folder.is_dir() else []
    if not found:
        raise ConfigError(
            f"the data must be a folder with {stem}-idx?-ubyte[.gz], got {str(folder)!r} without it; "
            f"give a folder of IDX files, {FASHION_MNIST!r} for Debian's, or {DIGITS!r} for scikit-learn's digits"
        )
    return found[0]


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"no data: {DEBIAN_FASHION_MNIST} does not exist and scikit-learn, which ships digits, is not installed; "
            'pip install "torch-distopt[cli]" or give a folder of IDX files'
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    # The file is ordered by writer: a fixed shuffle gives both parts every writer.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)[order]
    classes = torch.from_numpy(labels).long()[order]
    train = len(labels) * 4 // 5
    return _normalised("digits", images[:train], classes[:train], images[train:], classes[train:])


def _normalised(
    name: str, train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> Dataset:
    std, mean = torch.std_mean(train_images)
    return Dataset(
        name=name,
        train_images=train_images.sub_(mean).div_(std),
        train_labels=train_labels,
        test_images=test_images.sub_(mean).div_(std),
        test_labels=test_labels,
    )
