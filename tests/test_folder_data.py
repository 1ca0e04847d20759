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


@pytest.fixture
def shifted(tmp_path):
    """Two corruptions of 2 images at 5 severities, and a new test set of 3 images."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name in ("fog", "snow"):
        np.save(folder / f"{name}.npy", draws.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.array([3, 9] * 5, np.uint8))
    pixels = draws.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    names = np.array([{"plane"}], dtype=object)  # the published file holds objects too, which nothing here opens
    np.savez(tmp_path / "cifar102_test.npz", images=pixels, labels=np.array([4, 0, 9]), label_names=names)
    return folder


@pytest.mark.parametrize("parent", [True, False], ids=["parent", "itself"])
def test_cifar10_c(shifted, parent):
    found = data.cifar10_c(shifted.parent if parent else shifted, ("snow", "fog"))
    assert [corrupted.name for corrupted in found] == ["snow", "fog"]
    assert all(isinstance(corrupted.images, np.memmap) for corrupted in found)
    images, labels = found[1].severity(4)
    stored = np.load(shifted / "fog.npy")[6:8]
    assert images.dtype == torch.uint8 and np.array_equal(images.numpy().transpose(0, 2, 3, 1), stored)
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 9]
    for level in (0, 6):
        with pytest.raises(ValueError, match=f"severities run from 1 to 5, not {level}"):
            found[0].severity(level)


def test_the_fifteen_corruptions_are_read(shifted):
    with pytest.raises(FileNotFoundError, match=r"gaussian_noise.npy is not there: unpack CIFAR-10-C.tar in"):
        data.cifar10_c(shifted)
    for name in data.shifted.CORRUPTIONS:
        (shifted / f"{name}.npy").write_bytes((shifted / "fog.npy").read_bytes())
    assert len(data.cifar10_c(shifted)) == 15


@pytest.mark.parametrize(
    ("file", "array", "words"),
    [
        ("fog", np.zeros((9, 32, 32, 3), np.uint8), r"fog.npy holds uint8 of shape \(9, 32, 32, 3\) where 10 labels"),
        ("fog", np.zeros((10, 32, 32, 3), np.float32), "fog.npy holds float32"),
        ("fog", np.full(10, None, object), "fog.npy is damaged"),
        ("labels", np.arange(9), "labels.npy holds int64 .* not 5 blocks of labels: unpack"),
        ("labels", np.full(10, 10), "labels.npy has labels other than 0 to 9: unpack"),
        ("labels", np.zeros(10), "labels.npy holds float64"),
    ],
    ids=["count", "type", "pickle", "blocks", "class", "floats"],
)
def test_a_foreign_cifar10_c_is_refused(shifted, file, array, words):
    np.save(shifted / f"{file}.npy", array)
    with pytest.raises(ValueError, match=words):
        data.cifar10_c(shifted, ("fog",))


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-1], lambda b: b"", lambda b: b"PK\x03\x04" + b], ids=["cut", "empty", "zip"]
)
def test_a_damaged_cifar10_c_is_refused(shifted, harm):
    blob = (shifted / "fog.npy").read_bytes()
    (shifted / "fog.npy").write_bytes(harm(blob))
    with pytest.raises(ValueError, match=r"fog.npy is damaged .*: unpack CIFAR-10-C.tar again"):
        data.cifar10_c(shifted, ("fog",))


def test_cifar10_2(shifted):
    root = shifted.parent
    images, labels = data.cifar10_2(root)
    assert images.shape == (3, 3, 32, 32) and labels.dtype == torch.int64 and labels.tolist() == [4, 0, 9]
    with np.load(root / "cifar102_test.npz") as stored:
        assert np.array_equal(images.numpy().transpose(0, 2, 3, 1), stored["images"])
    (root / "cifar-10.2").mkdir()
    (root / "cifar102_test.npz").rename(root / "cifar-10.2" / "cifar102_test.npz")
    assert torch.equal(data.cifar10_2(root)[0], images)
    with pytest.raises(FileNotFoundError, match=r"neither .*cifar102_test.npz is there: put cifar102_test.npz in"):
        data.cifar10_2(shifted)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((3, 32, 32, 3), np.uint8)}, "damaged .*labels"),
        ({"images": np.zeros((3, 32, 32, 3), np.uint8), "labels": np.arange(2)}, r"labels of shape \(2,\)"),
        ({"images": np.zeros((2, 3, 32, 32), np.uint8), "labels": np.arange(2)}, "not N images of"),
        ({"images": np.zeros((2, 32, 32, 3), np.uint8), "labels": np.array([0, 10])}, "labels other than 0 to 9"),
        ({"images": np.full(2, None, object), "labels": np.arange(2)}, "damaged .*allow_pickle"),
    ],
    ids=["key", "count", "order", "class", "pickle"],
)
def test_a_foreign_cifar10_2_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "cifar102_test.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        data.cifar10_2(tmp_path)


@pytest.mark.parametrize("blob", [b"", b"no archive", b"PK\x03\x04"], ids=["empty", "text", "cut"])
def test_a_damaged_cifar10_2_is_refused(tmp_path, blob):
    (tmp_path / "cifar102_test.npz").write_bytes(blob)
    with pytest.raises(ValueError, match=r"cifar102_test.npz is damaged .*: fetch it again"):
        data.cifar10_2(tmp_path)
    np.save(tmp_path / "one.npy", np.arange(3))
    (tmp_path / "one.npy").rename(tmp_path / "cifar102_test.npz")
    with pytest.raises(ValueError, match="is damaged"):
        data.cifar10_2(tmp_path)


@pytest.mark.parametrize(("read", "name"), [(data.cifar10_c, "CIFAR-10-C"), (data.cifar10_2, "CIFAR-10.2")])
def test_a_shifted_set_without_its_folder_says_what_it_needs(read, name):
    with pytest.raises(ValueError, match=f"{name} needs root=, the folder"):
        read(None)
