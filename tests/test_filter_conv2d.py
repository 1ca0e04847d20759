"""The Triton kernels of filter_conv2d: under the interpreter on a machine without a GPU, compiled on one with."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import facts_from
from convolutions import GEOMETRIES, TOLERANCE, relative
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.nn import FilterSparseConv2d, choose, convert
from pysparse_ticket.ops.filter_conv2d import filter_conv2d
from pysparse_ticket.ops.library import backend_of, use_backend
from pysparse_ticket.ticket import Ticket, fingerprint

pytestmark = pytest.mark.usefixtures("gpu_or_interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kept(count, share, seed):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share
    mask[0] = True
    return mask.nonzero().flatten().to(DEVICE)


def tensors(name, dtype, channels=(11, 19), compact=(False, False), memory=torch.contiguous_format):
    """Inputs of the op, and the dense weight of the equal convolution."""
    torch.manual_seed(0)
    kernel, stride, padding, dilation, (n, h, w) = GEOMETRIES[name]
    inputs, outputs = channels
    in_index, out_index = kept(inputs, 0.6, 1), kept(outputs, 0.5, 2)
    weight = torch.randn(len(out_index), len(in_index), *kernel, device=DEVICE).to(dtype).requires_grad_()
    bias = torch.randn(len(out_index), device=DEVICE).to(dtype).requires_grad_()
    x = torch.randn(n, len(in_index) if compact[0] else inputs, h, w, device=DEVICE).to(dtype)
    x = x.contiguous(memory_format=memory).requires_grad_()
    index = (None if compact[0] else in_index, None if compact[1] else out_index)
    return x, weight, bias, *index, outputs, (stride, padding, dilation)


def expected(x, weight, bias, in_index, out_index, outputs, geometry):
    """By the definition, in float64: F.conv2d with a weight that is zero where nothing is kept."""
    rows = torch.arange(weight.shape[0], device=x.device) if out_index is None else out_index
    cols = torch.arange(weight.shape[1], device=x.device) if in_index is None else in_index
    full = weight.new_zeros((weight.shape[0] if out_index is None else outputs, x.shape[1], *weight.shape[2:]))
    full = full.index_put((rows[:, None], cols), weight)
    shift = bias.new_zeros(len(full)).index_put((rows,), bias)
    return F.conv2d(x, full, shift, *geometry)


def compare(arguments, dtype, **options):
    x, weight, bias, in_index, out_index, outputs, geometry = arguments
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = expected(*exact, in_index, out_index, outputs, geometry)
    y = filter_conv2d(x, weight, bias, in_index, out_index, outputs, *geometry, backend="triton", **options)
    y, stats = (y[0], y[1:]) if options.get("stats") else (y, ())
    assert y.shape == want.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y, want) < TOLERANCE[dtype]
    if out_index is not None:
        removed = torch.ones(outputs, dtype=torch.bool, device=y.device).index_fill(0, out_index, False)
        assert (y[:, removed] == 0).all()
    grads = [torch.randn_like(want)]
    wants = [want]
    if stats:
        chosen = want if out_index is None else want.index_select(1, out_index)
        wants += [chosen.mean((0, 2, 3)), chosen.var((0, 2, 3), correction=0)]
        grads += [torch.randn_like(t) * 10 for t in wants[1:]]
        for got, right in zip(stats, wants[1:], strict=True):
            assert relative(got, right) < TOLERANCE[dtype]
    right = torch.autograd.grad(wants, exact, grads)
    got = torch.autograd.grad(
        [y, *stats], (x, weight, bias), [g.to(t) for g, t in zip(grads, [y, *stats], strict=True)]
    )
    for name, a, b in zip(("x", "weight", "bias"), got, right, strict=True):
        assert a.dtype == dtype and relative(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("name", GEOMETRIES, ids=lambda n: n.replace(" ", "-"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_equals_the_masked_convolution(name, dtype, poison):
    compare(tensors(name, dtype), dtype)


@pytest.mark.parametrize("compact", list(product([False, True], repeat=2)), ids=lambda c: f"in{c[0]:d}-out{c[1]:d}")
@pytest.mark.parametrize("stats", [False, True], ids=["plain", "stats"])
def test_full_or_compact_channels(compact, stats, poison):
    compare(tensors("3x3", torch.float32, compact=compact), torch.float32, stats=stats)


@pytest.mark.parametrize("channels", [(1, 1), (150, 5), (5, 150)], ids=str)
def test_one_channel_and_many(channels, poison):
    compare(tensors("3x3 stride 2", torch.float32, channels), torch.float32, stats=True)


def test_empty_batch():
    x, weight, bias, in_index, out_index, outputs, geometry = tensors("3x3", torch.float32)
    y = filter_conv2d(x[:0], weight, bias, in_index, out_index, outputs, *geometry, backend="triton")
    assert y.shape == (0, outputs, 7, 9)
    grads = torch.autograd.grad(y.sum(), (weight, bias))
    assert all((grad == 0).all() for grad in grads)


def test_reads_any_strides(poison):
    x, *rest, geometry = tensors("3x3 stride 2", torch.float32, memory=torch.channels_last)
    wide = torch.randn(x.shape[0], x.shape[2], x.shape[3], 2 * x.shape[1], device=DEVICE)
    wide[..., 1::2] = torch.nan
    sliced = wide.permute(0, 3, 1, 2)[:, ::2].requires_grad_()  # channels two apart
    compare((sliced, *rest, geometry), torch.float32)
    compare((x.detach()[:, :, 1:, 2:].requires_grad_(), *rest, geometry), torch.float32)  # rows and columns cut off


def test_opcheck():
    x, weight, bias, in_index, out_index, outputs, geometry = tensors("1x1", torch.float32, (3, 4))
    op = torch.ops.pysparse_ticket.filter_conv2d.default
    geometry = [list(pair) for pair in geometry]
    for stats in (False, True):
        torch.library.opcheck(op, (x, weight, bias, in_index, out_index, outputs, *geometry, stats))
    grad = op(x, weight, bias, in_index, out_index, outputs, *geometry, False)[0].detach()
    torch.library.opcheck(
        torch.ops.pysparse_ticket.filter_conv2d_backward.default,
        (grad, x.detach(), weight.detach(), in_index, out_index, *geometry, True, True),
    )


def test_gradients_of_the_reference():
    x, weight, bias, in_index, out_index, outputs, geometry = tensors("3x3 stride 2", torch.float64, (3, 4))

    def op(x, weight, bias):
        return filter_conv2d(x, weight, bias, in_index, out_index, outputs, *geometry, stats=True, backend="reference")

    assert torch.autograd.gradcheck(op, (x, weight, bias))


@pytest.mark.parametrize("whole", [True, False], ids=["full", "compact"])
def test_module_in_the_fused_format(whole):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, 2, 1).to(DEVICE)
    keep_out = torch.tensor([True, False, True, True, False, False, True])
    keep_in = torch.tensor([True, True, False, True, False])
    compact = FilterSparseConv2d.from_dense(conv, keep_out, keep_in, compact_in=not whole, compact_out=not whole)
    fused = copy.deepcopy(compact)
    fused.set_format("fused")
    x = torch.randn(2, 5 if whole else 3, 6, 5, device=DEVICE)
    with use_backend("triton"):
        y = fused(x)
        y.sum().backward()
    assert backend_of("filter_conv2d") == "triton"
    expected = compact(x)
    expected.sum().backward()
    assert relative(y, expected) < 2e-6
    assert relative(fused.weight.grad, compact.weight.grad) < 2e-6
    assert fused.state_dict().keys() == conv.state_dict().keys()
    with pytest.raises(ValueError, match="unknown format 'tiles'"):
        fused.set_format("tiles")


def test_compiles_without_a_break():
    conv = nn.Conv2d(5, 7, 3, padding=1)
    module = FilterSparseConv2d.from_dense(conv, torch.arange(7) % 2 == 0, torch.arange(5) != 2).to(DEVICE)
    module.set_format("fused")
    x = torch.randn(2, 5, 6, 6, device=DEVICE)
    with use_backend("triton"):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        y.square().sum().backward()
    grad, module.weight.grad = module.weight.grad, None
    expected = module(x)
    expected.square().sum().backward()
    assert relative(y, expected) < 2e-6 and relative(grad, module.weight.grad) < 1e-5


def test_the_plan_races_fused_against_compact_and_dense(monkeypatch):
    """The race of a GPU, run on whatever device is here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)).to(DEVICE)
    kept = torch.tensor([True, False] * 4)
    ticket = Ticket(filters={"0": kept}, architecture=fingerprint(model))
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    raced = {}

    def race(arms, sites, device):
        for name, arm in arms.items():
            arm(sites[name].input(device))
            raced.setdefault(name, []).append((getattr(arm, "format", None), tuple(sites[name].shape)))
        return {"plain": 3.0, "compact": 2.0, "fused": 1.0 if sites["fused"].shape[1] == 4 else 2.5}

    monkeypatch.setattr(choose, "race", race)
    monkeypatch.setattr(convert, "choose_filters", lambda m, _, *rest: choose.choose_filters(m, x, *rest))
    monkeypatch.setattr(choose, "race_steps", lambda arms, x: dict.fromkeys(arms, 0.5) | {"dense": 1.0})
    with use_backend("reference"):
        model = pst.sparsify(model, ticket, sample=x)
    assert raced == {
        "plain": [(None, (2, 3, 6, 6)), (None, (2, 8, 6, 6))],
        "compact": [("compact", (2, 3, 6, 6)), ("compact", (2, 4, 6, 6))],
        "fused": [("fused", (2, 3, 6, 6)), ("fused", (2, 4, 6, 6))],
    }
    first, second = pst.plan(model).layers
    assert (first.format, first.dense_us, first.chosen_us) == ("compact", 3.0, 2.0)
    assert (second.format, second.chosen_us, second.why) == ("fused", 1.0, "fastest here of compact, fused")
    assert (model[0].format, model[2].format) == ("compact", "fused")


def test_bad_input_is_named():
    x, weight, bias, in_index, out_index, outputs, _ = tensors("3x3", torch.float32)
    with pytest.raises(ValueError, match="x has 11 channels and the weight"):
        filter_conv2d(x, weight)
    with pytest.raises(ValueError, match="one by one"):
        filter_conv2d(x, weight, bias, in_index[:-1])
    with pytest.raises(ValueError, match="out_index needs out_channels"):
        filter_conv2d(x, weight, bias, in_index, out_index)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        filter_conv2d(x[:, :, :1], weight, bias, in_index, out_index, outputs)


@pytest.mark.parametrize("arch", [80, 90], ids=lambda a: f"sm_{a}")
def test_compiled_ahead_of_time(arch):
    facts = facts_from("filter_conv2d_compiled.py", arch)
    assert len(facts) == 15
    for made in facts:
        assert made["spilled"] == 0, made
        assert made["shared"] <= (227 if arch == 90 else 163) * 1024, made
        assert bool(made["wgmma"]) == (arch == 90), made
        if made["dtype"] == "bf16" and not made["gather"]:
            assert made["copy_bytes"] == [16], made
