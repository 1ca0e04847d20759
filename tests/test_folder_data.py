"""TinyImageNet, MNIST and SVHN, each read from a small folder in its published layout."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch

from pysparse_ticket import data

WNIDS = ["n02", "n01", "n03"]  # as listed; classes are numbered sorted


@pytest.fixture
def tiny(tmp_path):
    """3 classes of 2 training images and 3 validation images, every image of one colour."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    for number, name in enumerate(WNIDS):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(2):
            colour = (40 * number, 100 + 50 * i, 200)
            image.new("RGB", (64, 64), colour).save(root / "train" / name / "images" / f"{name}_{i}.JPEG", quality=100)
    for i, grey in enumerate((10, 120, 240)):
        image.new("L", (64, 64), grey).save(root / "val" / "images" / f"val_{i}.JPEG", quality=100)
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n" for i, name in enumerate(["n03", "n01", "n02"])]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


@pytest.mark.parametrize("parent", [True, False], ids=["parent", "itself"])
def test_tiny_imagenet(tiny, parent):
    found = data.load("tinyimagenet", root=tiny.parent if parent else tiny)
    assert found.shape == (3, 64, 64) and found.classes == 3
    assert found.train_labels.tolist() == [0, 0, 1, 1, 2, 2] and found.test_labels.tolist() == [2, 0, 1]
    # n01 was drawn second, so its red is 40; JPEG keeps a plain colour to within a few steps
    expected = torch.tensor(
        [[40, 100, 200], [40, 150, 200], [0, 100, 200], [0, 150, 200], [80, 100, 200], [80, 150, 200]]
    )
    assert (found.train_images[:, :, 9, 50].int() - expected).abs().max() <= 3
    assert (found.test_images[:, :, 0, 63].int() - torch.tensor([[10], [120], [240]])).abs().max() <= 3
    assert found.flip and found.crop == 4


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (lambda r: (r / "wnids.txt").unlink(), FileNotFoundError, "wnids.txt is not there: unpack"),
        (lambda r: (r / "train/n03/images/n03_1.JPEG").unlink(), FileNotFoundError, "has 1 images and another class 2"),
        (lambda r: (r / "val/val_annotations.txt").unlink(), FileNotFoundError, "val_annotations.txt is not there"),
        (lambda r: (r / "val/val_annotations.txt").write_text("val_0.JPEG\tn99\n"), ValueError, "without a class"),
        (lambda r: (r / "val/images/val_1.JPEG").unlink(), FileNotFoundError, "val_1.JPEG is not there"),
        (lambda r: (r / "val/images/val_1.JPEG").write_bytes(b"no image"), ValueError, "val_1.JPEG is damaged"),
    ],
)
def test_a_damaged_tiny_imagenet_is_refused(tiny, harm, error, words):
    harm(tiny)
    with pytest.raises(error, match=words):
        data.load("tinyimagenet", root=tiny)


def test_tiny_imagenet_of_another_size_is_refused(tiny):
    from PIL import Image

    Image.new("RGB", (32, 64)).save(tiny / "train" / "n01" / "images" / "n01_0.JPEG")
    with pytest.raises(ValueError, match="32x64 pixels; TinyImageNet has 64x64"):
        data.load("tinyimagenet", root=tiny)


def test_tiny_imagenet_without_pillow(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"need Pillow: pip install pysparse-ticket\[images\]"):
        data.load("tinyimagenet", root=tiny)


def idx(array: np.ndarray) -> bytes:
    magic = 2048 + array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for part, count in (("train", 7), ("t10k", 4)):
        pixels = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        labels = np.arange(count, dtype=np.uint8)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def test_mnist(mnist):
    found = data.load("mnist", root=mnist.parent.parent)
    assert found.shape == (1, 28, 28) and found.classes == 10 and not found.flip and not found.crop
    assert found.train_labels.tolist() == list(range(7)) and found.test_labels.tolist() == list(range(4))
    first = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    assert np.array_equal(found.train_images[:, 0].numpy(), first)
    assert torch.equal(data.load("mnist", root=mnist).test_images, found.test_images)


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (lambda p: p.unlink(), FileNotFoundError, "put the four IDX files"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), ValueError, "no whole IDX file of images"),
        (lambda p: p.write_bytes(idx(np.zeros(5, np.uint8))), ValueError, "no whole IDX file of images"),
        (lambda p: p.write_bytes(b""), ValueError, "no whole IDX file of images"),
        (lambda p: p.rename(p.with_suffix(".gz")), ValueError, "is damaged"),
    ],
    ids=["missing", "truncated", "labels", "empty", "not gzip"],
)
def test_a_damaged_mnist_is_refused(mnist, harm, error, words):
    harm(mnist / "train-images-idx3-ubyte")
    with pytest.raises(error, match=words):
        data.load("mnist", root=mnist)


def test_svhn(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    for file in ("train_32x32.mat", "test_32x32.mat"):
        savemat(tmp_path / file, {"X": pixels, "y": np.array([[10], [1], [2], [3], [9], [10]], np.uint8)})
    found = data.load("svhn", root=tmp_path)
    assert found.shape == (3, 32, 32) and found.train_labels.tolist() == [0, 1, 2, 3, 9, 0]
    assert np.array_equal(found.test_images[4].numpy().transpose(1, 2, 0), pixels[..., 4])
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB")
    with pytest.raises(ValueError, match=r"test_32x32.mat is damaged .*: fetch it again"):
        data.load("svhn", root=tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match="put both MATLAB files"):
        data.load("svhn", root=tmp_path)


@pytest.mark.parametrize("name", ["tinyimagenet", "mnist", "svhn"])
def test_a_set_without_its_folder_says_what_it_needs(name):
    with pytest.raises(ValueError, match=f"{name} needs root=, the folder"):
        data.load(name)
