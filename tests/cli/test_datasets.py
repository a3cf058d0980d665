import gzip
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.cli import datasets
from distopt.errors import ConfigError


def idx_bytes(tensor: torch.Tensor) -> bytes:
    header = bytes((0, 0, 8, tensor.dim())) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    return header + tensor.to(torch.uint8).contiguous().numpy().tobytes()


def write_folder(folder, *, count=12, compress=gzip.compress, suffix=".gz"):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator)
        labels = torch.arange(count) % 10
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(compress(idx_bytes(images)))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx_bytes(labels)))


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), zipped=st.booleans())
def test_read_idx_gives_back_what_was_written(tmp_path_factory, shape, zipped):
    path = tmp_path_factory.mktemp("idx") / "file"
    written = torch.arange(torch.Size(shape).numel()).reshape(shape).to(torch.uint8)
    path.write_bytes(gzip.compress(idx_bytes(written)) if zipped else idx_bytes(written))
    assert torch.equal(datasets.read_idx(path), written)


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_a_folder_of_idx_files_becomes_normalised_images(tmp_path, compress, suffix):
    write_folder(tmp_path, compress=compress, suffix=suffix)
    data = datasets.load(str(tmp_path))
    assert data.shape == (1, 28, 28)
    assert data.num_classes == 10
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.tolist() == [index % 10 for index in range(12)]
    assert data.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_images.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["must begin with the bytes 00 00 08", "''"]),
        (b"PNG!", ["must begin with the bytes 00 00 08", "'50 4e 47'"]),
        (bytes((0, 0, 13, 1, 0, 0, 0, 0)), ["must begin with the bytes 00 00 08", "'00 00 0d'"]),
        (bytes((0, 0, 8, 3, 0, 0, 0, 1)), ["must hold 3 dimensions", "ends inside them"]),
        (idx_bytes(torch.zeros(7))[:-1], ["must hold 7 values", "holds 6", "copy the file again"]),
        (idx_bytes(torch.zeros(7)) + b"x", ["must hold 7 values", "holds 8"]),
        (gzip.compress(idx_bytes(torch.zeros(99)), mtime=0)[:-9], ["cannot read"]),
        (b"\x1f\x8bnot gzip at all", ["cannot read"]),
    ],
)
def test_a_bad_file_is_an_error_that_names_file_value_and_rule(tmp_path, content, parts):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        datasets.read_idx(path)
    for part in [str(path), *parts]:
        assert part in str(raised.value)


def test_a_folder_without_the_files_is_an_error_that_says_what_to_give(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"must be a folder with train-images-idx.*give a folder of IDX files"):
            datasets.load(str(folder))


def test_images_and_labels_must_belong_together(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(torch.zeros(11)))
    with pytest.raises(ConfigError, match=r"same count > 0, got \(12, 28, 28\) and \(11,\).*one data set"):
        datasets.load(str(tmp_path))


def test_digits_are_split_the_same_way_each_time():
    data, again = datasets.load("digits"), datasets.load("digits")
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)
    assert data.shape == (1, 8, 8)
    assert torch.equal(data.train_images, again.train_images)


def test_without_debians_package_digits_are_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "missing")
    assert datasets.load(None).name == "digits"


def test_debians_package_is_the_default_where_it_is_installed(monkeypatch, tmp_path):
    write_folder(tmp_path)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path)
    assert datasets.load(None).name == "Fashion-MNIST"
