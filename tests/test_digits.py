import builtins

import numpy as np
import pytest
import torch

from pysparse_ticket import data
from pysparse_ticket.data import digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images = data.load("digits")
    assert (images.shape, images.classes, images.flip, images.crop) == ((1, 8, 8), 10, False, 1)
    assert len(images.train_images) == 1437 and len(images.test_images) == 360
    raw = load_digits()
    expected = np.rint(raw.images * (255 / 16)).astype(np.uint8).reshape(-1, 64)
    both = torch.cat([images.train_images, images.test_images]).reshape(-1, 64).numpy()
    labels = torch.cat([images.train_labels, images.test_labels]).numpy()
    assert sorted(map(tuple, np.c_[both, labels])) == sorted(map(tuple, np.c_[expected, raw.target]))
    assert both.max() == 255


def test_digits_split_is_stratified_and_seeded():
    first, again, other = (digits.load(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.test_images, other.test_images)
    total = torch.bincount(torch.cat([first.train_labels, first.test_labels]))
    share = total * 360 / 1797
    for images in (first, other):
        assert (torch.bincount(images.test_labels) - share).abs().max() < 1


def test_stratified_by_hand():
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    chosen = digits.stratified(labels, 4, torch.Generator().manual_seed(0))
    # 4 of 10: shares 2.0, 1.2, 0.8; rounded down 2, 1, 0; the one left over goes to the remainder 0.8
    assert torch.bincount(labels[chosen], minlength=3).tolist() == [2, 1, 1]


@pytest.mark.parametrize(("size", "crop"), [(16, 2), (32, 4)])
def test_digits_upsampled(size, crop):
    small, large = digits.load(), digits.load(size=size)
    assert large.shape == (1, size, size) and large.crop == crop
    assert torch.equal(small.train_labels, large.train_labels)
    # at an integer factor, the mean of an interior cell's pixels is close to the pixel; over the image, to the mean
    means = [images.train_images.double().mean((1, 2, 3)) for images in (small, large)]
    torch.testing.assert_close(*means, rtol=0.05, atol=1.0)
    # a smooth image: steps between neighbours shrink with the factor
    steps = [images.train_images.double().diff(dim=-1).abs().mean() for images in (small, large)]
    assert steps[1] < 1.2 * steps[0] * 8 / size


def test_digits_of_another_size_are_refused():
    with pytest.raises(ValueError, match="8, 16, 32, not 28"):
        digits.load(size=28)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install pysparse-ticket\[demo\]"):
        digits.load()
