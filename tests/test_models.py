import math

import pytest
import torch
from torch import fx, nn

from pysparse_ticket import models
from pysparse_ticket.models import CifarResNet, Mlp, build

PRUNABLE = {14: 174_128, 20: 270_896, 32: 464_432, 44: 657_968, 56: 851_504, 110: 1_722_416}


def count_macs(model: nn.Module, sample: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one image, seen by hooks: what runs, not what is declared."""
    total = 0

    def hook(module, _inputs, output):
        nonlocal total
        total += output[0].numel() * math.prod(module.weight.shape[1:])

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model.eval()(sample)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(("depth", "macs"), [(32, 69_124_736), (56, 125_747_840)])
def test_macs_at_32x32(depth, macs):
    assert count_macs(CifarResNet(depth), torch.randn(1, 3, 32, 32)) == macs


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_one_block_less_saves_the_same_macs_in_every_stage(stage):
    model, sample = CifarResNet(20), torch.randn(1, 3, 32, 32)
    whole = count_macs(model, sample)
    del getattr(model, stage)[-1]
    assert whole - count_macs(model, sample) == 4_718_592


@pytest.mark.parametrize(("depth", "prunable"), PRUNABLE.items())
def test_prunable_weights(depth, prunable):
    model = CifarResNet(depth)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum(w.numel() for w in weights) == prunable


def test_resnet32_has_1232_filters():
    assert sum(m.out_channels for m in CifarResNet(32).modules() if isinstance(m, nn.Conv2d)) == 1232


def test_blocks_and_shortcuts_of_the_stages():
    model = CifarResNet(32)
    for i, stage in enumerate([model.stage1, model.stage2, model.stage3]):
        assert len(stage) == 5
        kinds = [type(block.shortcut) for block in stage]
        assert kinds == [nn.Sequential if i else nn.Identity] + [nn.Identity] * 4
    assert model.stage2[0].shortcut[0].kernel_size == (1, 1)
    assert model.stage2[0].shortcut[0].stride == (2, 2)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 16, 16), (3, 32, 32), (3, 9, 13)], ids=str)
def test_resnet_takes_any_image_size(shape):
    model = build("resnet14", 7, shape)
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_block_is_its_formula():
    torch.manual_seed(0)
    block = models.BasicBlock(4, 8, stride=2).double().eval()
    for norm in (block.norm1, block.norm2, block.shortcut[1]):
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 6, 6, dtype=torch.double)

    def norm(m, y):  # running statistics are 0 and 1
        return y / math.sqrt(1 + m.eps) * m.weight[:, None, None] + m.bias[:, None, None]

    inner = norm(block.norm1, nn.functional.conv2d(x, block.conv1.weight, stride=2, padding=1)).clamp(min=0)
    branch = norm(block.norm2, nn.functional.conv2d(inner, block.conv2.weight, padding=1))
    side = norm(block.shortcut[1], nn.functional.conv2d(x, block.shortcut[0].weight, stride=2))
    torch.testing.assert_close(block(x), (branch + side).clamp(min=0), rtol=1e-12, atol=1e-12)


def test_initial_weights_follow_kaiming_fan_in():
    torch.manual_seed(0)
    model = CifarResNet(56)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            fan_in = weight[0].numel()
            # the sample deviation of n normals is off by 1 / sqrt(2 n); five of those leave about one draw in a million
            assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=5 / math.sqrt(2 * weight.numel())), (
                name
            )
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()


@pytest.mark.parametrize("name", ["resnet14", "lenet-300-100", "mlp-3"])
def test_fx_traces_the_model(name):
    torch.manual_seed(0)
    model = build(name, 10, (3, 8, 8)).eval()
    traced = fx.symbolic_trace(model)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(traced(x), model(x))
    assert any(node.op == "call_module" for node in traced.graph.nodes)


@pytest.mark.parametrize("depth", [2, 7, 18, 34, 0, -4])
def test_bad_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth 6 n \+ 2 .*20.*not {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("lenet-300-100", [784, 300, 100, 10]),
        ("mlp-2", [784, 300, 300, 100, 10]),
        ("mlp-4", [784, 300, 300, 300, 300, 100, 10]),
    ],
)
def test_mlp_sizes_and_keys(name, sizes):
    model = build(name, 10, (1, 28, 28))
    state = model.state_dict()
    keys = [f"layers.{i}.{part}" for i in range(len(sizes) - 1) for part in ("weight", "bias")]
    assert list(state) == keys
    assert [sizes[0]] + [state[key].shape[0] for key in keys[::2]] == sizes
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_mlp_puts_no_relu_behind_the_logits():
    model = Mlp([2, 2, 1])
    for layer, weight in zip(model.layers, ([[1.0, 0.0], [0.0, 1.0]], [[-1.0, 5.0]]), strict=True):
        layer.weight.data = torch.tensor(weight)
        layer.bias.data.zero_()
    assert model(torch.tensor([[3.0, -1.0]])).item() == -3.0  # the hidden -1 is cut to 0, the logit -3 is not


def test_every_listed_name_builds():
    for name in models.names():
        assert isinstance(build(name, 10, (1, 8, 8)), nn.Module)
    assert "resnet110" in models.names()


@pytest.mark.parametrize("name", ["vgg16", "resnet", "resnet20x", "mlp", "ResNet20", ""])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match=r"unknown model .*resnet20.*lenet-300-100.*mlp-2"):
        build(name, 10, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "classes", "shape", "message"),
    [
        ("resnet20", 10, (3, 2, 32), "4x4"),
        ("resnet20", 10, (32, 32), "in_shape"),
        ("resnet20", 0, (3, 32, 32), "num_classes"),
        ("mlp-0", 10, (3, 32, 32), "n >= 1"),
    ],
)
def test_bad_arguments_are_refused(name, classes, shape, message):
    with pytest.raises(ValueError, match=message):
        build(name, classes, shape)


def test_mlp_needs_two_sizes():
    with pytest.raises(ValueError, match="two or more sizes"):
        Mlp([10])
