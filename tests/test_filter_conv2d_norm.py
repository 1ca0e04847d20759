"""Filter convolution with its batch norm, add and ReLU: under the interpreter on a machine without a GPU, compiled on
one with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import facts_from
from test_filter_conv2d import DEVICE, GEOMETRIES, TOLERANCE, expected, relative, tensors
from torch import nn

from pysparse_ticket.ops.filter_conv2d import filter_conv2d
from pysparse_ticket.ops.filter_conv2d_norm import filter_conv2d_norm
from pysparse_ticket.ops.library import backend_of

pytestmark = pytest.mark.usefixtures("gpu_or_interpreter")
BEHIND = {"norm": (False, False), "relu": (False, True), "add": (True, False), "add relu": (True, True)}
LAST = torch.channels_last


def norm_of(channels, training=True, **options):
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(channels, device=DEVICE, **options)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean):
            if t is not None:
                t.copy_(torch.randn(channels))
        if norm.running_var is not None:
            norm.running_var.copy_(torch.rand(channels) + 0.5)
    return norm.train(training)


def compare(arguments, norm, dtype, add=False, relu=False, residual=None):
    """Output, every gradient and the running statistics against plain torch in float64."""
    x, weight, bias, in_index, out_index, outputs, geometry = arguments
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = copy.deepcopy(norm).double()
    conv = expected(*leaves, in_index, out_index, outputs, geometry)
    want = exact(conv)
    if add:
        residual = torch.randn(conv.shape, device=DEVICE).to(dtype).requires_grad_() if residual is None else residual
        leaves.append(residual.detach().double().requires_grad_())
        want = want + leaves[-1]
    z = filter_conv2d_norm(
        x, weight, bias, in_index, out_index, outputs, *geometry, norm=norm, residual=residual, relu=relu,
        backend="triton",
    )  # fmt: skip
    assert backend_of("filter_conv2d_norm") == "triton"
    # a rounding moves values over zero, whose gradient then comes or goes whole: the gate is the op's
    gated, want = (want * (z > 0), F.relu(want)) if relu else (want, want)
    assert z.shape == want.shape and z.dtype == dtype and z.is_contiguous(memory_format=LAST)
    assert relative(z, want) < TOLERANCE[dtype]
    for name, buffer in norm.named_buffers():
        assert relative(buffer, exact.get_buffer(name)) < TOLERANCE[dtype], name
    assert norm.num_batches_tracked is None or torch.equal(norm.num_batches_tracked, exact.num_batches_tracked)
    grad = torch.randn_like(want)
    ours = {"x": x, "weight": weight, "bias": bias} | ({"residual": residual} if add else {})
    ours |= {f"norm.{name}": p for name, p in norm.named_parameters()}
    right = torch.autograd.grad(gated, [*leaves, *exact.parameters()], grad)
    got = torch.autograd.grad(z, list(ours.values()), grad.to(dtype))
    for (name, leaf), a, b in zip(ours.items(), got, right, strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape, name
        if name == "bias" and (norm.training or norm.running_mean is None):
            continue  # a constant before batch statistics: of zero there is the rounding of a sum alone
        assert relative(a, b) < 2 * TOLERANCE[dtype], name  # x, y, z and the gradient between are rounded


@pytest.mark.parametrize("behind", BEHIND, ids=lambda n: n.replace(" ", "-"))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_modules(training, behind, poison):
    compare(tensors("3x3", torch.float32), norm_of(19, training), torch.float32, *BEHIND[behind])


# of two values a channel, as in the geometry left out, batch statistics leave no gradient to compare
@pytest.mark.parametrize("name", [n for n in GEOMETRIES if n != "smaller than the stride"], ids=lambda n: n[:15])
def test_every_geometry(name, poison):
    compare(tensors(name, torch.float32), norm_of(19), torch.float32, True, True)


@pytest.mark.parametrize("behind", ["relu", "add relu"], ids=lambda n: n.replace(" ", "-"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
def test_half_precision(dtype, behind, poison):
    compare(tensors("3x3 stride 2", dtype), norm_of(19), dtype, *BEHIND[behind])
    compact = tensors("1x1", dtype, compact=(True, True))
    compare(compact, norm_of(len(compact[1]), eps=1e-3), dtype, *BEHIND[behind])


@pytest.mark.parametrize("channels", [(1, 1), (5, 300)], ids=str)
def test_one_channel_and_many(channels, poison):
    arguments = tensors("3x3 stride 2", torch.float32, channels)
    compare(arguments, norm_of(channels[1]), torch.float32, True, True)


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.7},
        {"affine": False, "track_running_stats": False, "training": False},
    ],
    ids=["plain", "untracked", "cumulative", "momentum", "untracked-eval"],
)
def test_kinds_of_norm(options, poison):
    norm = norm_of(19, **options)
    for _ in range(2):
        compare(tensors("1x1", torch.float32), norm, torch.float32, relu=True)


def test_one_sample_and_few_pixels(poison):
    x, *rest = tensors("3x3", torch.float32)
    compare((x.detach()[:1].requires_grad_(), *rest), norm_of(19), torch.float32, True, True)
    x, *rest = tensors("smaller than the stride", torch.float32)
    one = x.detach()[:1].requires_grad_()
    compare((one, *rest), norm_of(19, training=False), torch.float32, True, True)
    norm, (weight, bias, *index, outputs, geometry) = norm_of(19), rest
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="batch statistics of 1 value a channel; use more samples"):
        filter_conv2d_norm(one, weight, bias, *index, outputs, *geometry, norm=norm, backend="triton")
    assert all(torch.equal(before[name], now) for name, now in norm.state_dict().items())


def test_removed_channels_are_normalised_zeros(poison):
    x, weight, bias, in_index, out_index, outputs, geometry = tensors("3x3", torch.float32)
    norm = norm_of(outputs)
    z = filter_conv2d_norm(x, weight, bias, in_index, out_index, outputs, *geometry, norm=norm, backend="triton")
    removed = torch.ones(outputs, dtype=torch.bool, device=z.device).index_fill(0, out_index, False)
    shift = norm.bias.detach()[:, None, None].expand_as(z[0])
    assert torch.equal(z[:, removed], shift[removed].expand_as(z[:, removed]))
    z.square().sum().backward()
    assert (norm.weight.grad[removed] == 0).all() and (norm.bias.grad[removed] != 0).all()


def test_reads_any_strides(poison):
    x, *rest = tensors("3x3 stride 2", torch.float32)
    wide = torch.randn(x.shape[0], x.shape[2], x.shape[3], 2 * x.shape[1], device=DEVICE)
    wide[..., 1::2] = torch.nan
    sliced = wide.permute(0, 3, 1, 2)[:, ::2].requires_grad_()
    shape = (2, 19, 4, 4)
    residual = torch.full((*shape[:3], 9), torch.nan, device=DEVICE)
    residual[..., 1:9:2] = torch.randn(shape, device=DEVICE)
    compare((sliced, *rest), norm_of(19), torch.float32, True, True, residual[..., 1:9:2].requires_grad_())


def test_a_residual_of_another_dtype_widens(poison):
    x, weight, bias, in_index, out_index, outputs, geometry = tensors("1x1", torch.bfloat16)
    residual = torch.randn(3, outputs, 5, 5, device=DEVICE, requires_grad=True)
    options = {"norm": norm_of(outputs), "residual": residual, "relu": True}
    z = filter_conv2d_norm(x, weight, bias, in_index, out_index, outputs, *geometry, **options, backend="triton")
    assert z.dtype == torch.float32
    z.sum().backward()
    assert torch.equal(residual.grad, (z > 0).float()) and x.grad.dtype == torch.bfloat16


def test_statistics_of_a_large_mean_do_not_cancel(poison):
    """Mean 1000, variance 0.002: in float32 E[y^2] - E[y]^2 rounds by 0.06. A tile's mean rounds by 6e-5, beside
    deviations of 0.04."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 12, 13, device=DEVICE) * 0.02
    weight, bias = torch.randn(5, 6, 1, 1, device=DEVICE), 1000 + torch.randn(5, device=DEVICE)
    norm = norm_of(5, momentum=1.0)
    y = filter_conv2d(x, weight, bias, backend="triton").double()
    z = filter_conv2d_norm(x, weight, bias, norm=norm, backend="triton")
    var, mean = torch.var_mean(y, (0, 2, 3))
    assert (var < 0.004).all() and relative(norm.running_var, var) < 1e-3
    assert relative(norm.running_mean, mean) < 1e-7
    want = F.batch_norm(y, None, None, norm.weight.double(), norm.bias.double(), training=True)
    assert relative(z, want) < 2e-3


def test_autocast_and_compiled(poison):
    x, weight, _, in_index, out_index, outputs, geometry = tensors("1x1", torch.float32)
    norm = norm_of(outputs)
    other = copy.deepcopy(norm)

    def run(x, weight, norm):
        arguments = (x, weight, None, in_index, out_index, outputs)
        return filter_conv2d_norm(*arguments, *geometry, norm=norm, relu=True, backend="triton")

    with torch.autocast(DEVICE, torch.bfloat16):
        z = run(x, weight, norm)
    assert z.dtype == torch.bfloat16
    plain = run(x, weight, copy.deepcopy(other))
    assert relative(z, plain) < TOLERANCE[torch.bfloat16]
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight, other)
    assert torch.equal(y, plain) and other.num_batches_tracked == 1
    assert relative(other.running_var, norm.running_var) < TOLERANCE[torch.bfloat16]
    got = torch.autograd.grad(y.square().sum(), (x, weight, other.weight))
    right = torch.autograd.grad(plain.square().sum(), (x, weight), retain_graph=True)
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, right, strict=False))


def test_opcheck():
    torch.manual_seed(0)
    y, residual = (torch.randn(2, 5, 3, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(5, device=DEVICE), torch.rand(5, device=DEVICE) + 0.5
    weight, bias = (torch.randn(5, device=DEVICE, requires_grad=True) for _ in range(2))
    op = torch.ops.pysparse_ticket.filter_conv2d_norm.default
    for more, relu, batch_stats in ((None, True, True), (residual, True, False), (residual, False, True)):
        torch.library.opcheck(op, (y, mean, var, weight, bias, more, 1e-5, relu, batch_stats))
    z = op(y, mean, var, weight, bias, residual, 1e-5, True, True).detach()
    grads = (torch.randn_like(z), y.detach(), z, mean, var, weight.detach(), bias.detach(), 1e-5, True, True)
    torch.library.opcheck(torch.ops.pysparse_ticket.filter_conv2d_norm_backward.default, (*grads, True, True))


def test_bad_input_is_named():
    x, weight, bias, in_index, out_index, outputs, geometry = tensors("1x1", torch.float32)
    arguments = (x, weight, bias, in_index, out_index, outputs, *geometry)
    with pytest.raises(ValueError, match="the norm has 8 channels, the convolution's output 19"):
        filter_conv2d_norm(*arguments, norm=nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=r"the residual has shape \(3, 19, 1, 1\), the output \(3, 19, 5, 5\)"):
        residual = torch.zeros(3, 19, 1, 1, device=DEVICE)
        filter_conv2d_norm(*arguments, norm=norm_of(19), residual=residual, backend="triton")


@pytest.mark.parametrize("arch", [80, 90], ids=lambda a: f"sm_{a}")
def test_compiled_ahead_of_time(arch):
    facts = facts_from("filter_conv2d_norm_compiled.py", arch)
    assert len(facts) == 14
    for made in facts:
        assert made["spilled"] == 0, made
        assert made["registers"] <= 168, made  # three programs of 128 threads a multiprocessor at least
        assert made["kernel"] == "_join" or made["load_bytes"] == 16, made
