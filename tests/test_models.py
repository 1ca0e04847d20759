import math

import pytest
import torch
from torch import fx, nn

from pysparse_ticket import models
from pysparse_ticket.models import CifarResNet, ImageNetResNet, Mlp, Vgg, build

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


# convolutions of 3x3 weights as 9 times the channel products. VGG-16: 3*64 + 64*64 + 64*128 + 128*128 + 128*256 +
# 2 * 256*256 + 256*512 + 5 * 512*512 = 1,634,496, times 9 = 14,710,464; VGG-13 has one 256*256 and two 512*512 less,
# VGG-19 as many more. The classifier has 5,120.
@pytest.mark.parametrize(("depth", "weights"), [(13, 9_402_048), (16, 14_710_464), (19, 20_018_880)])
def test_convolution_weights_of_a_vgg(depth, weights):
    model = build(f"vgg{depth}", 10, (3, 32, 32))
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) == weights
    assert [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)] == [5_120]
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth - 2


def test_parameters_and_layers_of_a_vgg():
    # 2 * 4224 of batch norm: 2*64 + 2*128 + 3*256 + 6*512 = 4224 channels
    assert sum(p.numel() for p in Vgg(16).parameters()) == 14_710_464 + 5_120 + 10 + 8_448
    assert [tuple(m.weight.shape) for m in build("vgg13-fc3", 7, (1, 16, 16)).linear] == [(512, 512)] * 2 + [(7, 512)]


# pixels 1024, 256, 64, 16 and 4 a stage: 9 * (1024*(3*64 + 64*64) + 256*(64*128 + 128*128) + 64*(128*256 + 2*256*256)
# + 16*(256*512 + 2*512*512) + 4*3*512*512) + 5120
def test_macs_of_vgg16_at_32x32():
    with torch.device("meta"):
        assert count_macs(Vgg(16), torch.randn(1, 3, 32, 32)) == 313_201_664


@pytest.mark.parametrize(
    ("depth", "parameters"), [(18, 11_689_512), (26, 19_066_920), (34, 21_797_672), (50, 25_557_032)]
)
def test_parameters_of_the_imagenet_resnets(depth, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(f"imagenet-resnet{depth}", 1000, (3, 224, 224)).parameters()) == parameters


# at 224x224 a 3x3 convolution of any stage but its first is 64*64*9 * 56*56 = 115,605,504 MACs, so a basic block after
# the first is 231,211,008; ResNet-18 is 118,013,952 (stem) + 462,422,016 + 3 * 411,041,792 (stages) + 512,000
@pytest.mark.parametrize(
    ("depth", "macs"), [(18, 1_814_073_344), (26, 2_738_917_376), (34, 3_663_761_408), (50, 4_089_184_256)]
)
def test_macs_of_the_imagenet_resnets(depth, macs):
    with torch.device("meta"):
        assert count_macs(ImageNetResNet(depth), torch.randn(1, 3, 224, 224)) == macs


def test_tiny_stem():
    with torch.device("meta"):
        model = build("tiny-resnet18", 200, (3, 64, 64))
        # the stem has 1,728 weights in place of 9,408, the classifier 513 * 200 in place of 513 * 1000
        assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 7_680 - 513 * 800
        # stem 1728 * 64*64; stage 1: 4 * 36864 * 64*64; stages 2 to 4: 524,288 weights a pixel of 32x32; fc 512 * 200
        assert count_macs(model, torch.randn(1, 3, 64, 64)) == 2_221_772_800


def test_block_lists_of_the_imagenet_resnets():
    with torch.device("meta"):
        for depth, blocks in {18: [2, 2, 2, 2], 26: [2, 3, 4, 3], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3]}.items():
            model = ImageNetResNet(depth)
            assert [len(s) for s in (model.stage1, model.stage2, model.stage3, model.stage4)] == blocks
            assert {type(block) for block in model.stage2} == {models.Bottleneck if depth == 50 else models.BasicBlock}


def test_bottleneck_is_its_formula():
    torch.manual_seed(0)
    block = models.Bottleneck(4, 2, stride=2).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.double)
    scale = 1 / math.sqrt(1 + block.norm1.eps)  # running statistics are 0 and 1
    y = (nn.functional.conv2d(x, block.conv1.weight) * scale).clamp(min=0)
    y = (nn.functional.conv2d(y, block.conv2.weight, stride=2, padding=1) * scale).clamp(min=0)
    branch = nn.functional.conv2d(y, block.conv3.weight) * scale
    side = nn.functional.conv2d(x, block.shortcut[0].weight, stride=2) * scale
    torch.testing.assert_close(block(x), (branch + side).clamp(min=0), rtol=1e-12, atol=1e-12)


def test_vgg_is_its_formula():
    torch.manual_seed(0)
    model = Vgg(13, num_classes=3, in_channels=1, width=2, linear=2).double().eval()
    x = y = torch.randn(2, 1, 16, 16, dtype=torch.double)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for i, conv in enumerate(convs):
        if i and i % 2 == 0:  # VGG-13 has two convolutions a stage
            y = nn.functional.max_pool2d(y, 2)
        y = (nn.functional.conv2d(y, conv.weight, padding=1) / math.sqrt(1 + 1e-5)).clamp(min=0)
    hidden = model.linear[0](y.mean((2, 3))).clamp(min=0)
    torch.testing.assert_close(model(x), model.linear[1](hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vgg(11), "depth 13, 16, 19, not 11"),
        (lambda: ImageNetResNet(20), "depth 18, 26, 34, 50, not 20"),
        (lambda: ImageNetResNet(18, stem="cifar"), "unknown stem 'cifar'; known: imagenet, tiny"),
    ],
)
def test_unknown_depths_and_stems_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: build("resnet14", 10, (3, 8, 8)), 8),
        (lambda: build("lenet-300-100", 10, (3, 8, 8)), 8),
        (lambda: build("mlp-3", 10, (3, 8, 8)), 8),
        (lambda: Vgg(13, width=4), 16),
        (lambda: Vgg(19, width=4, linear=3), 16),
        (lambda: ImageNetResNet(18, width=4), 32),
        (lambda: ImageNetResNet(26, width=4, stem="tiny"), 8),
        (lambda: ImageNetResNet(50, width=4, stem="tiny"), 8),
    ],
    ids=["resnet14", "lenet-300-100", "mlp-3", "vgg13", "vgg19-fc3", "imagenet18", "tiny26", "tiny50"],
)
def test_fx_traces_the_model(make, size):
    torch.manual_seed(0)
    model = make().eval()
    traced = fx.symbolic_trace(model)
    x = torch.randn(5, 3, size, size)
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
        with torch.device("meta"):
            assert isinstance(build(name, 10, (1, 32, 32)), nn.Module)
    assert "resnet110" in models.names()


@pytest.mark.parametrize(
    ("name", "last"), [("resnet14", 12), ("vgg13-fc2", 24), ("tiny-resnet18", 24), ("imagenet-resnet50", 96)]
)
def test_width_scales_every_stage(name, last):
    # 3 channels in the first stage: 4 times as many in a CIFAR ResNet's last, 8 in the others', and 4 a bottleneck
    model = build(name, 10, (3, 32, 32), width=3)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear[-1].in_features == last and model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("name", "width"), [("mlp-2", 4), ("lenet-300-100", 4), ("resnet20", 0)])
def test_bad_widths_are_refused(name, width):
    with pytest.raises(ValueError, match=f"first stage, not {width} of {name}"):
        build(name, 10, (3, 32, 32), width=width)


@pytest.mark.parametrize("name", ["vgg17", "vgg16-fc", "imagenet-resnet", "resnet", "resnet20x", "mlp", "ResNet20", ""])
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
        ("vgg16", 10, (3, 15, 32), "at least 16x16 pixels, not 15x32"),
        ("vgg16-fc0", 10, (3, 32, 32), "1 or more linear layers"),
        ("imagenet-resnet18", 10, (3, 32, 31), "at least 32x32"),
        ("tiny-resnet18", 10, (3, 7, 7), "at least 8x8"),
        ("tiny-resnet20", 10, (3, 8, 8), "depth 18, 26, 34, 50, not 20"),
    ],
)
def test_bad_arguments_are_refused(name, classes, shape, message):
    with pytest.raises(ValueError, match=message):
        build(name, classes, shape)


def test_mlp_needs_two_sizes():
    with pytest.raises(ValueError, match="two or more sizes"):
        Mlp([10])
