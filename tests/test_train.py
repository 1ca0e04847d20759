from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
import training_worker as worker
from torch import nn

from pysparse_ticket.checkpoint import rng_state, set_rng_state
from pysparse_ticket.evaluate import evaluate
from pysparse_ticket.train import TrainConfig, train
from pysparse_ticket.train_config import learning_rate_factor


@pytest.fixture(autouse=True)
def own_generators():
    state = rng_state(torch.device("cpu"))
    yield
    set_rng_state(state, torch.device("cpu"))


class Fixed(worker.Images):
    """Without augmentation; remembers which samples each batch held."""

    def __init__(self, train=40, test=12):
        super().__init__(train, test)
        self.batches = []

    def train_batch(self, index, generator):
        self.batches.append(index.tolist())
        return self.normalize(self.train_images[index]), self.train_labels[index]


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))


def test_two_epochs_are_what_torch_by_hand_gives():
    config = TrainConfig(
        epochs=2, batch_size=16, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, milestones=(1,)
    )
    data, ours, theirs = Fixed(), linear(), linear()
    history = train(ours, data, config)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, nesterov=True, weight_decay=0.01)
    losses = []
    for number, batch in enumerate(data.batches):
        optimizer.param_groups[0]["lr"] = 0.1 if number < 3 else 0.1 * 0.1
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(data.normalize(data.train_images[batch])), data.train_labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(ours[1].weight, theirs[1].weight)
    assert torch.equal(ours[1].bias, theirs[1].bias)
    # batches of 16, 16 and 8
    expected = [(16 * a + 16 * b + 8 * c) / 40 for a, b, c in (losses[:3], losses[3:])]
    assert history.train_loss == pytest.approx(expected, rel=1e-12)
    assert history.steps == [3, 6]
    assert 0 < history.seconds[0] < history.seconds[1]
    assert history.test_accuracy[-1] == evaluate(ours, data)


def test_each_epoch_is_a_new_order_of_all_samples_fixed_by_the_seed():
    orders = []
    for seed in (0, 0, 1):
        data = Fixed()
        train(linear(), data, TrainConfig(epochs=2, batch_size=16, seed=seed))
        assert [len(batch) for batch in data.batches] == [16, 16, 8] * 2
        orders.append([list(chain(*data.batches[:3])), list(chain(*data.batches[3:]))])
        assert all(sorted(order) == list(range(40)) for order in orders[-1])
    assert orders[0] == orders[1]
    distinct = {tuple(order) for order in orders[0] + orders[2]}
    assert len(distinct) == 4  # seed 0 epoch 1 is not seed 1 epoch 0


def test_drop_last_leaves_the_short_batch_out():
    data = Fixed()
    history = train(linear(), data, TrainConfig(epochs=2, batch_size=16, drop_last=True))
    assert [len(batch) for batch in data.batches] == [16, 16] * 2
    assert history.steps == [2, 4]


def test_learning_rate_warms_up_by_step_and_falls_at_milestones():
    config = TrainConfig(epochs=4, milestones=(2, 3), gamma=0.1, warmup_epochs=1)
    factors = [learning_rate_factor(config, step, 4) for step in range(16)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1] + [0.1] * 4 + [0.01] * 4, rel=1e-12)


def test_own_optimizer_keeps_its_rates_under_the_schedule():
    model = linear()
    groups = [{"params": [model[1].weight], "lr": 0.5}, {"params": [model[1].bias], "lr": 0.2}]
    optimizer = torch.optim.Adam(groups)
    seen = []
    config = TrainConfig(epochs=2, batch_size=40, lr=77.0, milestones=(1,), gamma=0.5)
    train(
        model,
        Fixed(),
        config,
        optimizer=optimizer,
        on_step=lambda _: seen.append([g["lr"] for g in optimizer.param_groups]),
    )
    assert seen == [[0.5, 0.2], [0.25, 0.1]]


def test_on_step_sees_every_step():
    seen = []
    config = TrainConfig(epochs=2, batch_size=20)
    history = train(linear(), Fixed(), config, on_step=seen.append)
    assert [(p.step, p.steps, p.epoch) for p in seen] == [(1, 4, 0), (2, 4, 0), (3, 4, 1), (4, 4, 1)]
    assert history.train_loss[0] == pytest.approx((seen[0].loss.item() + seen[1].loss.item()) / 2, rel=1e-12)


def test_batches_and_model_lie_channels_last_when_asked():
    layouts = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 6, 6))
    model[0].register_forward_hook(
        lambda module, args, out: layouts.append((args[0].stride()[1], module.weight.stride()[1]))
    )
    data = Fixed()
    data.train_images = data.train_images.expand(-1, 3, -1, -1)
    data.test_images = data.test_images.expand(-1, 3, -1, -1)
    train(model, data, TrainConfig(epochs=1, batch_size=20, channels_last=True))
    assert layouts == [(1, 1)] * 3


def test_autocast_computes_in_the_type_asked_for():
    kinds = []
    model = linear()
    model[1].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    # float16, not bfloat16: the matrix product of the latter needs instructions that some machines promise in vain
    train(model, Fixed(), TrainConfig(epochs=1, batch_size=20, autocast="float16"))
    assert kinds == [torch.float16] * 3
    assert model[1].weight.dtype == torch.float32


def test_nan_loss_stops_with_its_step_and_keeps_the_checkpoint_before(tmp_path):
    path = tmp_path / "run.safetensors"
    model = linear()

    def loss(output, labels):
        value = F.cross_entropy(output, labels)
        loss.calls += 1
        return value * math.nan if loss.calls == 4 else value

    loss.calls = 0
    weights = []
    config = TrainConfig(epochs=2, batch_size=16)
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 4 of 6: lower.*run.safetensors keeps step 3"
    ):
        train(
            model,
            Fixed(),
            config,
            loss=loss,
            checkpoint=path,
            on_step=lambda _: weights.append(model[1].weight.clone()),
        )
    assert torch.equal(model[1].weight, weights[-1])  # the bad step did not reach the weights
    resumed = linear()
    train(resumed, Fixed(), config, checkpoint=path, stop_after=3)
    assert torch.equal(resumed[1].weight, weights[-1])


def test_evaluation_counts_right_answers_and_leaves_the_mode():
    class Says(nn.Module):
        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            return F.one_hot(torch.zeros(len(images), dtype=torch.long), 2).float()

    model, data = Says(), Fixed(test=5)
    model.train()
    assert evaluate(model, data, batch_size=2) == 3 / 5  # labels 0 1 0 1 0
    assert model.training
    with pytest.raises(ValueError, match="no test images"):
        evaluate(model, Fixed(test=0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("batch_size", True),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", "0.1"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("nesterov", 1),
        ("weight_decay", -1e-4),
        ("milestones", (5, 3)),
        ("milestones", (3, 3)),
        ("milestones", (10,)),
        ("milestones", 5),
        ("gamma", math.inf),
        ("warmup_epochs", 11),
        ("warmup_epochs", -1),
        ("autocast", "float8"),
        ("channels_last", None),
        ("seed", -1),
        ("device", "toaster"),
        ("drop_last", "no"),
    ],
)
def test_bad_config_is_refused_by_the_name_of_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        TrainConfig(**{"epochs": 10, field: value})


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match=r"^momentum must be above 0 with nesterov=True"):
        TrainConfig(epochs=1, momentum=0.0, nesterov=True)


def test_bad_arguments_of_train():
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1"):
        train(linear(), Fixed(), TrainConfig(epochs=1), checkpoint_every=0)
    with pytest.raises(ValueError, match="40 training samples give no batch of 64"):
        train(linear(), Fixed(), TrainConfig(epochs=1, batch_size=64, drop_last=True))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            train(linear(), Fixed(), TrainConfig(epochs=1, device="cuda"))
