"""Format "2:4" of a masked linear layer: on stand-ins of torch's operators here, on the operators where a GPU is."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from fake_semi_structured import FakeOperators
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.granularity import keep_n_of_m
from pysparse_ticket.nn.choose import choose_layer
from pysparse_ticket.nn.masked_linear import MaskedLinear
from pysparse_ticket.ops import semi_structured
from pysparse_ticket.ops.pattern import Pattern
from pysparse_ticket.ops.semi_structured_linear import CompressedWeight, semi_structured_linear, why_wrong
from pysparse_ticket.planner import PlanCache, Site
from pysparse_ticket.transposable import keep_transposable

BACKENDS = {"cutlass": semi_structured.Cutlass, "cusparselt": semi_structured.CuSparseLt}
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
gpu = pytest.mark.skipif(not GPU, reason="no CUDA GPU of compute capability 8.0 or later")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(params=BACKENDS)
def operators(request, monkeypatch):
    return FakeOperators().install(monkeypatch, BACKENDS[request.param])


def layer(dtype=torch.bfloat16, out=64, width=128, bias=True, device="cpu", format="2:4"):
    torch.manual_seed(0)
    dense = nn.Linear(width, out, bias=bias, device=device, dtype=dtype)
    masked = MaskedLinear.from_dense(dense, keep_transposable(dense.weight.detach().abs()))
    masked.set_format(format)
    return masked


def close(actual, expected, terms):
    """Within the rounding of the results: of the last place, and of the sums in float32 of so many terms. A GPU's own
    dense product may add parts of its sums in 16 bits."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    unit = torch.finfo(actual.dtype).eps
    share = terms * 2.0**-22 + (unit if actual.is_cuda else 0)
    scale = float(expected.detach().abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2 * unit, atol=scale * share)


def compare(masked, x):
    """Output and gradients against the same layer's dense format."""
    dense = copy.deepcopy(masked)
    dense.set_format("dense")
    results = []
    for one in (masked, dense):
        own = x.detach().clone().requires_grad_()
        y = one(own)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, device=y.device).to(y.dtype))
        weight = one.dense_like(one.weight_parameter.grad)
        results.append((y.detach(), own.grad, weight, None if one.bias is None else one.bias.grad))
    terms = x.numel() // x.shape[-1]
    for ours, theirs, n in zip(*results, (masked.in_features, masked.out_features, terms, terms), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs, n)


@dtypes
@pytest.mark.parametrize("shape", [(16, 128), (5, 128), (2, 3, 128), (128,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_equals_the_masked_layer(operators, dtype, shape, bias):
    masked = layer(dtype, bias=bias)
    compare(masked, torch.randn(shape).to(dtype))
    assert operators.count("product") == 2  # forward and input gradient; that of the weight is dense


def test_no_tokens(operators):
    masked = layer()
    x = torch.zeros(0, 128, dtype=torch.bfloat16, requires_grad=True)
    y = masked(x)
    y.sum().backward()
    assert y.shape == (0, 64) and not masked.values.grad.any() and x.grad.shape == x.shape


def test_fewer_weights_than_two_of_four(operators):
    masked = layer()
    mask = masked.mask & (torch.rand(64, 128) < 0.5)
    masked.set_mask(mask)
    assert masked.format == "2:4" and masked.nnz == int(mask.sum())
    compare(masked, torch.randn(8, 128).to(torch.bfloat16))


def test_compressed_once_an_optimizer_step(operators):
    masked = layer()
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 128).to(torch.bfloat16)
    for step in range(1, 4):
        for _ in range(2):  # two micro-batches
            masked(x).float().square().mean().backward()
        with torch.no_grad():
            masked.eval()(x)
        each = 1 if operators.count("tile") else 2  # cuSPARSELt: the weight, then its transpose
        assert operators.count("compress") == step * each
        optimizer.step()
        optimizer.zero_grad()
    assert operators.count("tile") <= 1


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "assign", "set_mask", "data", "copy", "pickle"])
def test_compressed_anew_when_the_values_change(operators, how):
    masked = layer()
    x = torch.randn(8, 128).to(torch.bfloat16)
    masked(x)
    state = {name: 2 * value for name, value in masked.state_dict().items()}
    if how == "in place":
        with torch.no_grad():
            masked.values.mul_(2)
    elif how == "load_state_dict":
        masked.load_state_dict(state)
    elif how == "assign":
        masked.load_state_dict(state, assign=True)
    elif how == "set_mask":
        masked.set_mask(keep_transposable(torch.rand(64, 128)))
    elif how == "data":
        masked.values.data = 2 * masked.values.data
    else:
        masked = copy.deepcopy(masked) if how == "copy" else pickle.loads(pickle.dumps(masked))
        with torch.no_grad():
            masked.values.mul_(2)
    close(masked(x), F.linear(x, masked.weight, masked.bias), 128)


def test_the_gradient_is_of_the_weights_that_ran_forward(operators):
    masked = layer(bias=False)
    weight = masked.weight.detach().clone()
    x = torch.randn(8, 128).to(torch.bfloat16).requires_grad_()
    y = masked(x)
    with torch.no_grad():
        masked.values.zero_()
    masked(x)
    y.backward(torch.ones_like(y))
    close(x.grad, torch.ones_like(y) @ weight, 64)


def test_autocast_keeps_float32_weights(operators):
    masked = layer(torch.float32, format="packed")
    x = torch.randn(8, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        masked.set_format("2:4")
        y = masked(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert masked.values.grad.dtype == masked.bias.grad.dtype == torch.float32
    close(y.detach(), F.linear(x.bfloat16(), masked.weight.bfloat16(), masked.bias.bfloat16()).detach(), 128)
    with pytest.raises(
        RuntimeError, match=r"format '2:4' cannot run here: 2:4 runs in float16 or bfloat16, not in flo"
    ):
        masked(x)


def test_state_dict_and_formats(operators):
    masked = layer()
    dense = masked.to_dense()
    buffer = io.BytesIO()
    torch.save(masked.state_dict(), buffer)
    buffer.seek(0)
    dense.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(dense.weight, masked.weight) and "format=2:4" in repr(masked)
    values = masked.values
    masked.set_format("packed")
    assert masked.values is values  # the same Parameter: optimizers and DDP hold it


def test_errors(operators):
    masked = layer()
    with pytest.raises(ValueError, match=r"x of torch.float32 does not match the weights' torch.bfloat16"):
        masked(torch.randn(8, 128))
    with pytest.raises(ValueError, match=r"x of shape \(8, 64\) does not end in the pattern's 128 input features"):
        masked(torch.randn(8, 64).bfloat16())
    with pytest.raises(ValueError, match=r"a layer of format '2:4' takes only transposable 2:4 masks"):
        masked.set_mask(torch.ones(64, 128, dtype=torch.bool))
    other = MaskedLinear.from_dense(nn.Linear(128, 64, dtype=torch.bfloat16), torch.rand(64, 128) < 0.5)
    with pytest.raises(
        ValueError, match=r"cannot take format '2:4': the mask is not 2:4 in its rows and in its column"
    ):
        other.set_format("2:4")
    with pytest.raises(ValueError, match=r"cannot take format '2:4': 2:4 runs in float16 or bfloat16, not in float32"):
        layer(torch.float32)
    with pytest.raises(ValueError, match=r"2:4 takes features in multiples of 64, not 96 to 64"):
        layer(width=96)


def test_the_cpu_has_no_such_operators():
    with pytest.raises(ValueError, match=r"cannot take format '2:4': torch's 2:4 operators run on CUDA, not on cpu"):
        layer()


@pytest.mark.parametrize(
    ("capability", "lt", "found"),
    [
        ((8, 0), True, semi_structured.Cutlass),
        ((8, 9), False, semi_structured.Cutlass),
        ((9, 0), True, semi_structured.CuSparseLt),
        ((9, 0), False, "compute capability 9.0 needs cuSPARSELt, and this torch was built without it"),
        ((7, 5), True, "2:4 needs compute capability 8.0, and this GPU has 7.5"),
    ],
    ids=["8.0", "8.9", "9.0", "9.0 without cuSPARSELt", "7.5"],
)
def test_backend_by_compute_capability(monkeypatch, capability, lt, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: lt)
    monkeypatch.setattr(torch.version, "hip", None)
    assert semi_structured.backend(torch.device("cuda")) == found


@dtypes
def test_a_right_product_is_found_right(operators, dtype):
    masked = layer(dtype)
    assert why_wrong(masked.values, masked.bias, masked.pattern, (3, 40, 128)) is None


def test_a_wrong_product_is_found(operators):
    masked = layer()
    operators.spoil = 1.05
    reason = why_wrong(masked.values, masked.bias, masked.pattern, (40, 128))
    assert reason.startswith("its output differs from the masked dense one in ")
    operators.spoil = float("nan")
    assert "in 2560 of 2560 entries" in why_wrong(masked.values, masked.bias, masked.pattern, (40, 128))


def test_operators_that_refuse_are_named(operators, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("architecture mismatch\nCUDA kernel errors might be asynchronous")

    for name in ("_cslt_sparse_mm", "_sparse_semi_structured_addmm"):
        monkeypatch.setattr(torch, name, refuse)
    masked = layer()
    reason = why_wrong(masked.values, masked.bias, masked.pattern, (40, 128))
    assert reason == "torch's 2:4 operators refuse it: architecture mismatch"


def raced(out=64, width=128, device="cpu", score=keep_transposable, tokens=16):
    """A layer after its race, and the plan's row."""
    torch.manual_seed(0)
    dense = nn.Linear(width, out, device=device, dtype=torch.bfloat16)
    site = Site((tokens, width), torch.bfloat16, False, True)
    mask = score(dense.weight.detach().abs())
    masked, row = choose_layer("fc", dense, mask, "auto", site, PlanCache(), False)
    assert torch.equal(masked.weight, dense.weight * mask)
    return masked, row


def test_the_race_has_it_where_it_runs(operators, monkeypatch, tmp_path):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))  # raced, not remembered from another test
    masked, row = raced()
    assert operators.count("product") > 3 and masked.left_out == {}  # checked, then timed
    assert "no 2:4" not in row.why and row.format == masked.format in ("2:4", "packed", "dense")
    assert raced(out=72)[1].why.endswith("; no 2:4: 2:4 takes features in multiples of 64, not 128 to 72")


def test_the_fastest_may_be_2_4(operators, monkeypatch):
    times = {"plain": 4.0, "dense": 5.0, "packed": 3.0, "other packed": 6.0, "2:4": 2.0}

    def race(arms, site, device):
        assert set(arms) == set(times) and arms["2:4"].format == "2:4"
        return times

    monkeypatch.setattr("pysparse_ticket.nn.choose.race", race)
    masked, row = raced(out=192)
    assert (masked.format, row.format, row.dense_us, row.chosen_us, row.break_even) == ("2:4", "2:4", 4.0, 2.0, None)
    assert row.why == "fastest here"


def test_the_race_is_without_it_where_it_is_wrong(operators):
    operators.spoil = 1.5
    masked, row = raced()
    assert masked.format != "2:4" and "; no 2:4: its output differs from the masked dense one" in row.why


def test_the_race_is_without_it_on_a_cpu():
    masked, row = raced()
    assert masked.format != "2:4" and row.why.endswith("; no 2:4: torch's 2:4 operators run on CUDA, not on cpu")
    one_way = raced(score=lambda weight: keep_n_of_m(weight, 2, 4))[1]  # never a candidate
    assert "2:4" not in one_way.why


def sparse_model(plan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).bfloat16()
    ticket = pst.at_init(model, score="magnitude", granularity="2:4t")
    return pst.sparsify(model, ticket, sample=torch.randn(16, 128).bfloat16(), plan=plan)


def test_asked_for(operators):
    model = sparse_model(plan="2:4")
    rows = pst.plan(model).layers
    assert [row.format for row in rows] == ["2:4", "packed"] and rows[0].why == "asked for"
    assert rows[1].why == "no 2:4: 2:4 takes features in multiples of 64, not 64 to 10"
    assert sparse_model(plan={"0": "2:4"})[0].format == "2:4"
    with pytest.raises(ValueError, match="cannot take format '2:4': 2:4 takes features"):
        sparse_model(plan={"2": "2:4"})


def test_it_trains_as_the_masked_layer(operators):
    model, other = sparse_model(plan="2:4"), sparse_model(plan="dense")
    x, y = torch.randn(16, 128).bfloat16(), torch.randint(10, (16,))
    for one in (model, other):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(one(x).float(), y).backward()
            optimizer.step()
    ours, theirs = pst.densify(model)[0].weight, pst.densify(other)[0].weight
    assert torch.equal(ours == 0, theirs == 0)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)


@gpu
@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [8, 100, 512])
def test_on_a_gpu(dtype, bias, tokens):
    masked = layer(dtype, out=256, width=192, bias=bias, device="cuda")
    compare(masked, torch.randn(tokens, 192, device="cuda").to(dtype))
    assert why_wrong(masked.values, masked.bias, masked.pattern, (tokens, 192)) is None


@gpu
def test_new_values_on_a_gpu():
    masked = layer(device="cuda")
    x = torch.randn(16, 128, device="cuda").bfloat16()
    masked(x)
    with torch.no_grad():
        masked.values.mul_(-3)
    close(masked(x), F.linear(x, masked.weight, masked.bias), 128)


@gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    masked = layer(device="cuda")
    x = torch.randn(16, 128, device="cuda").bfloat16()
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1)

    def step():
        masked(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_race_on_a_gpu():
    masked, row = raced(512, 256, "cuda", tokens=1024)
    assert masked.left_out == {} and row.format == masked.format, row


def test_pattern_and_values_alone(operators):
    mask = keep_transposable(torch.rand(64, 64))
    pattern, held = Pattern.from_mask(mask), CompressedWeight()
    values = torch.randn(pattern.nnz).half()
    x = torch.randn(8, 64).half()
    close(semi_structured_linear(x, values, None, pattern, held), F.linear(x, pattern.scatter(values)), 64)
