import pytest
import torch

from pysparse_ticket.data import procedural


def class_mean_accuracy(difficulty: float) -> float:
    """How often the nearest mean image of a class is the right one: what a linear model sees."""
    images = procedural.load(1500, 500, size=16, difficulty=difficulty, seed=1)
    train, test = (images.normalize(part).flatten(1) for part in (images.train_images, images.test_images))
    means = torch.stack([train[images.train_labels == label].mean(0) for label in range(10)])
    return (torch.cdist(test, means).argmin(1) == images.test_labels).double().mean().item()


def test_difficulty_takes_a_linear_model_from_right_to_chance():
    accuracy = [class_mean_accuracy(difficulty) for difficulty in (0.0, 0.25, 0.5, 1.0)]
    assert accuracy[0] > 0.95
    assert 0.35 < accuracy[1] < 0.85
    assert 0.14 < accuracy[2] < 0.45  # above the 0.1 of chance by 3 deviations of 500 trials, and far from solved
    assert accuracy[3] < 0.2
    assert accuracy == sorted(accuracy, reverse=True)


def test_same_seed_same_bits():
    first, again, other = (procedural.load(600, 20, size=8, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.train_images, again.train_images) and torch.equal(first.test_images, again.test_images)
    assert (first.train_images != other.train_images).double().mean() > 0.5


def test_image_does_not_depend_on_how_many_are_asked_for():
    few, many = procedural.load(130, 7, size=8), procedural.load(1030, 510, size=8)
    assert torch.equal(few.train_images, many.train_images[:130])
    assert torch.equal(few.test_images, many.test_images[:7])


def test_no_image_comes_twice():
    images = procedural.load(1200, 600, size=8, difficulty=0.0)
    both = torch.cat([images.train_images, images.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 1800  # chunks differ from each other, and the test stream from the training one


def test_procedural_shapes_and_balance():
    images = procedural.load(105, 20)
    assert (images.shape, images.classes, images.flip, images.crop) == ((3, 32, 32), 10, True, 4)
    assert torch.bincount(images.train_labels).tolist() == [11] * 5 + [10] * 5
    assert images.train_images.dtype == torch.uint8 and len(images.test_images) == 20


@pytest.mark.parametrize("rule", procedural.RULES, ids=lambda rule: rule.__name__.strip("_"))
def test_flip_keeps_the_class(rule):
    """Mirrored left to right, each rule's object is one that the rule can draw (so flips are a sound augmentation)."""
    axis = torch.linspace(-1, 1, 32).view(1, 1, 32)
    u, v = axis, axis.transpose(1, 2)
    one = torch.ones(1, 1, 1)
    phase, edge = torch.tensor([0.3, 0.3]).view(1, 2, 1, 1), one / 16
    mirrored = rule(u, v, edge, phase, one, one).flip(-1)
    options = [
        rule(u, v, edge, torch.stack([a, b], 1), one, side)
        for side in (one, -one)
        for a in (0.3 * one, (torch.pi - 0.3) * one)
        for b in (0.3 * one, (torch.pi - 0.3) * one)
    ]
    options += [rule(u, v, edge, torch.stack([a, b], 1), one, -one) for a, b in [((0.3 - torch.pi) * one, 0.3 * one)]]
    options += [rule(u, v, edge, phase - torch.pi, one, -one)]
    assert min((mirrored - option).abs().max().item() for option in options) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": 1.5}, "between 0 and 1, not 1.5"),
        ({"difficulty": float("nan")}, "between 0 and 1"),
        ({"train": 0}, "at least 1"),
        ({"size": 4}, "at least 8x8"),
    ],
    ids=str,
)
def test_bad_procedural_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        procedural.load(**{"train": 10, "test": 10, **options})
