import pytest
import torch

from pysparse_ticket import data
from pysparse_ticket.data import ImageData
from pysparse_ticket.data.images import channel_statistics


def tiny(train=8, *, size=4, channels=1, flip=False, crop=0) -> ImageData:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(1, 256, (train + 2, channels, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(train + 2) % 2
    return ImageData.from_tensors(
        "tiny", (images[:-2], labels[:-2]), (images[-2:], labels[-2:]), classes=2, flip=flip, crop=crop
    )


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_statistics_by_hand():
    images = torch.tensor([[[[0, 255]], [[51, 51]]], [[[255, 0]], [[153, 153]]]], dtype=torch.uint8)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx((0.5, 0.4))
    assert std == pytest.approx((0.5, 0.2))


def test_statistics_over_several_chunks_are_numpys():
    images = torch.randint(0, 256, (4100, 2, 2, 3), dtype=torch.uint8, generator=generator())
    mean, std = channel_statistics(images)
    pixels = images.numpy() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3)), rel=1e-9)  # the difference of two sums loses a few digits


def test_normalized_training_set_has_mean_0_and_std_1():
    images = tiny(50, channels=3)
    pixels = images.normalize(images.train_images)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_normalize_is_its_formula_and_leaves_the_input():
    images = tiny(channels=2)
    before = images.test_images.clone()
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in (images.mean, images.std))
    expected = (images.test_images / 255 - mean) / std
    torch.testing.assert_close(images.normalize(images.test_images), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(images.test_images, before)


def test_augment_without_flip_and_crop_returns_the_images():
    images = tiny()
    state = generator()
    assert torch.equal(images.augment(images.train_images, state), images.train_images)


def test_flip_alone_gives_each_image_or_its_mirror():
    images = tiny(200, size=5, channels=3, flip=True)
    out = images.augment(images.train_images, generator())
    same = (out == images.train_images).flatten(1).all(1)
    mirrored = (out == images.train_images.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 60 < mirrored.sum() < 140  # 200 fair coins: 100 within 5.6 deviations of 7.1


@pytest.mark.parametrize("flip", [False, True], ids=["crop", "flip and crop"])
def test_crop_is_a_window_of_the_padded_image(flip):
    images = tiny(400, size=6, channels=2, flip=flip, crop=2)
    out = images.augment(images.train_images, generator())
    assert out.dtype == torch.uint8 and out.shape == images.train_images.shape
    seen = set()
    for image, got in zip(images.train_images, out, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        windows = {
            (y, x, side): padded[:, y : y + 6, x : x + 6].flip(-1) if side else padded[:, y : y + 6, x : x + 6]
            for y in range(5)
            for x in range(5)
            for side in (0, 1)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, got)]
        assert len(matches) == 1  # pixels are never 0 here, so a window is found in one place alone
        seen.add(matches[0])
    assert {key[:2] for key in seen} == {(y, x) for y in range(5) for x in range(5)}
    assert {key[2] for key in seen} == ({0, 1} if flip else {0})


def test_restored_generator_gives_the_same_batches():
    images = tiny(64, size=8, flip=True, crop=1)
    draws = generator()
    images.train_batch(torch.arange(64), draws)
    state = draws.get_state()
    first = [images.train_batch(torch.arange(64), draws)[0] for _ in range(2)]
    draws.set_state(state)
    again = [images.train_batch(torch.arange(64), draws)[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_train_batch_is_augment_then_normalize():
    images = tiny(16, size=6, flip=True, crop=1)
    index = torch.tensor([3, 3, 0, 15])
    pixels, labels = images.train_batch(index, generator())
    assert torch.equal(pixels, images.normalize(images.augment(images.train_images[index], generator())))
    assert torch.equal(labels, images.train_labels[index])


def test_drawn_images_are_the_seeds_and_not_augmented():
    images = tiny(20, flip=True, crop=1)
    index = images.draw(6, seed=4)
    assert index.tolist() == torch.randperm(20, generator=generator(4))[:6].tolist()
    assert sorted(images.draw(99, seed=4).tolist()) == list(range(20))
    batch, labels = images.plain_batch(index)
    assert torch.equal(batch, images.normalize(images.train_images[index]))
    assert torch.equal(labels, images.train_labels[index])


def test_subset_takes_the_first():
    images = tiny(8)
    part = images.subset(train=3, test=1)
    assert torch.equal(part.train_images, images.train_images[:3]) and torch.equal(
        part.train_labels, images.train_labels[:3]
    )
    assert torch.equal(part.test_images, images.test_images[:1])
    assert (part.mean, part.std, part.shape) == (images.mean, images.std, (1, 4, 4))
    assert len(images.subset(test=1).train_images) == 8
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"8 train images; a subset of {count}"):
            images.subset(train=count)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_batches_come_from_the_device_of_the_set(device):
    here, there = tiny(flip=True, crop=1), tiny(flip=True, crop=1).to(device)
    pixels, labels = there.train_batch(torch.arange(4), torch.Generator(device).manual_seed(0))
    assert pixels.device.type == labels.device.type == there.test_images.device.type == device
    torch.testing.assert_close(there.normalize(there.test_images).cpu(), here.normalize(here.test_images))


def test_generator_of_another_device_is_refused():
    images = tiny(crop=1)
    with pytest.raises(ValueError, match="the generator is on cpu and the images on meta"):
        images.augment(images.train_images.to("meta"), generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": torch.zeros(2, 1, 4, 4)}, "train: images are uint8"),
        ({"train_images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "train: images are uint8"),
        ({"test_labels": torch.tensor([0])}, "test: 2 images need as many"),
        ({"test_labels": torch.tensor([0, 2])}, "labels run from 0 to 1, found 0 to 2"),
        ({"test_labels": torch.tensor([-1, 1])}, "found -1 to 1"),
        ({"test_images": torch.zeros(2, 1, 5, 4, dtype=torch.uint8)}, "differ in shape"),
        ({"std": (0.0,)}, "positive std"),
        ({"mean": (0.5, 0.5)}, "each of 1 channels"),
        ({"crop": -1}, "crop"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_image_data_is_refused(change, message):
    images = tiny()
    fields = (
        "name",
        "train_images",
        "train_labels",
        "test_images",
        "test_labels",
        "classes",
        "mean",
        "std",
        "flip",
        "crop",
    )
    values = {key: getattr(images, key) for key in fields}
    with pytest.raises(ValueError, match=message):
        ImageData(**{**values, **change})


@pytest.mark.parametrize("name", ["imagenet", "", "CIFAR10"])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match=r"unknown data set .*digits, procedural, cifar10, cifar100"):
        data.load(name)


def test_unknown_option_lists_the_known():
    with pytest.raises(ValueError, match="digits has no option sise; known: seed, size"):
        data.load("digits", sise=16)
    with pytest.raises(ValueError, match="cifar10 has no option size; known: none"):
        data.load("cifar10", size=16)


def test_load_passes_options_and_ignores_root_where_nothing_is_stored():
    images = data.load("procedural", root="nowhere", train=10, test=10, size=8)
    assert images.shape == (3, 8, 8)
    assert set(data.names()) == {"digits", "procedural", "cifar10", "cifar100", "tinyimagenet", "mnist", "svhn"}
