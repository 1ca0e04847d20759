"""masked_linear against F.linear on the scattered weight in float64."""

import pytest
import torch
import torch.nn.functional as F

from pysparse_ticket.ops.library import CPU_ERROR, backend_of, cpu_isa, use_backend
from pysparse_ticket.ops.masked_linear import linear_schedule, masked_linear
from pysparse_ticket.ops.pattern import Pattern

OP = torch.ops.pysparse_ticket
ISAS = ("portable", "avx2", "avx512")
BLOCKS = ((8, 1), (16, 16), (32, 32), (128, 128), (4, 3))


@pytest.fixture
def isa(request):
    try:
        yield cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        cpu_isa("")


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def block_mask(height, width, rows, columns, density, gen):
    keep = torch.rand(-(-rows // height), -(-columns // width), generator=gen) < density
    return keep.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]


def n_of_m_mask(n, m, rows, columns, gen):
    scores = torch.rand(rows, -(-columns // m), m, generator=gen)
    return (scores.argsort(2).argsort(2) < n).view(rows, -1)[:, :columns]


def mixed_mask(rows, columns, gen):
    """Full rows, sparse rows, dead rows, blocks, rows that differ in one column, dead columns."""
    mask = torch.rand(rows, columns, generator=gen) < 0.1
    mask[:12] = True
    mask[16:20] = block_mask(4, 1, 4, columns, 0.3, gen)
    mask[24:30] = False
    mask[32:40] = block_mask(8, 16, 8, columns, 0.5, gen)
    mask[35, 7] ^= True
    mask[:, 20:25] = False
    return mask


MASKS = {
    **{f"{h}x{w} blocks": lambda *a, h=h, w=w: block_mask(h, w, *a[:2], 0.4, a[2]) for h, w in BLOCKS},
    **{f"{n}:{m}": lambda *a, n=n, m=m: n_of_m_mask(n, m, *a) for n, m in ((2, 4), (1, 3), (3, 7), (1, 16), (5, 6))},
    "8x1 blocks, few removed": lambda *a: block_mask(8, 1, *a[:2], 0.95, a[2]),
    "random, few removed": lambda rows, columns, gen: torch.rand(rows, columns, generator=gen) < 0.9,
    "mixed": mixed_mask,
}


def case(batch, in_features, out_features, density, seed=0, dtype=torch.float32):
    """density: a number, or a name in MASKS"""
    gen = torch.Generator().manual_seed(seed)
    if density in MASKS:
        mask = MASKS[density](out_features, in_features, gen)
    else:
        mask = torch.rand(out_features, in_features, generator=gen) < density
    pattern = Pattern.from_mask(mask)
    x = torch.randn(*batch, in_features, generator=gen).to(dtype)
    values = torch.randn(pattern.nnz, generator=gen)
    bias = torch.randn(out_features, generator=gen)
    grad = torch.randn(*batch, out_features, generator=gen).to(dtype)
    return x, values, bias, pattern, grad


def run(x, values, bias, pattern, grad, dtype=None, **how):
    """Output and gradients of x, values and bias."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, values, bias)]
    y = masked_linear(*leaves, pattern, **how)
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def error(actual, expected):
    """Largest deviation by the largest expected magnitude."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().item()
    return (actual.double() - expected).abs().max().item() / (scale or 1.0)


def bound(terms):
    """Rounding of a float32 sum of that many random terms: eps * sqrt(n), with a factor for the largest of all sums."""
    return 8 * 1.2e-7 * max(terms, 1) ** 0.5


def check(batch, in_features, out_features, density):
    x, values, bias, pattern, grad = case(batch, in_features, out_features, density)
    samples = x.numel() // in_features
    actual = run(x, values, bias, pattern, grad, backend="cpu")
    expected = run(x, values, bias, pattern, grad, torch.float64)
    terms = (in_features, out_features, samples, samples)
    for name, a, e, n in zip(("y", "dx", "dvalues", "dbias"), actual, expected, terms, strict=True):
        assert a.shape == e.shape and a.dtype == torch.float32
        assert error(a, e) < bound(n), name


SHAPES = {
    "one tile": ((64,), 128, 48, 0.3),
    "ragged batch": ((70,), 37, 53, 0.3),
    "one sample": ((1,), 5, 3, 0.5),
    "1-D x": ((), 20, 30, 0.4),
    "3-D x": ((3, 9), 33, 17, 0.4),
    "several column tiles": ((33,), 300, 40, 0.2),
    "several chunks": ((80,), 40, 600, 0.1),
    "full mask": ((50,), 40, 35, 1.0),
    "zero mask": ((50,), 40, 35, 0.0),
    "mostly empty rows": ((100,), 200, 300, 0.003),
    "one output": ((130,), 90, 1, 0.5),
    "one input": ((130,), 1, 90, 0.5),
    "empty batch": ((0,), 12, 7, 0.5),
    "empty batch of 3-D x": ((2, 0), 12, 7, 0.5),
}


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_dense_linear(isa, shape):
    check(*shape)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", [90, 273])
def test_masks_with_structure(isa, mask, batch):
    check((batch,), 150, 133, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES, *MASKS])
def test_equals_dense_linear_on_every_device(shape, dtype, device):
    """On the backend that the device takes unasked; sums in float32, y and dx rounded once where x is bfloat16, and
    the values too where tensor cores multiply."""
    batch, in_features, out_features, density = SHAPES.get(shape, ((90,), 150, 133, shape))
    x, values, bias, pattern, grad = case(batch, in_features, out_features, density, dtype=dtype)
    samples = x.numel() // in_features
    expected = run(x.double(), values, bias, pattern, grad.double(), torch.float64)
    there = Pattern.from_mask(pattern.mask().to(device))
    actual = run(*(t.to(device) for t in (x, values, bias)), there, grad.to(device))
    rounding = 0 if dtype is torch.float32 else 2**-7 if device == "cuda" else 2**-8
    terms = (in_features, out_features, samples, samples)
    for name, a, e, n in zip(("y", "dx", "dvalues", "dbias"), actual, expected, terms, strict=True):
        assert a.shape == e.shape and a.device.type == device
        assert error(a.cpu(), e) < bound(n) + (rounding if name in ("y", "dx") else 0), name


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 130, 700])
def test_windows_on_tensor_cores_round_the_values_too(batch, dtype, tiles):
    x, values, bias, pattern, grad = case((batch,), 1500, 700, 0.05, dtype=dtype)
    expected = run(x.double(), values.to(dtype), bias, pattern, grad.double(), torch.float64)
    there = Pattern.from_mask(pattern.mask().cuda())
    how = {"schedules": linear_schedule(there, tiles)}
    actual = run(*(t.cuda() for t in (x, values, bias)), there, grad.cuda(), **how)
    for name, a, e in zip(("y", "dx"), actual, expected, strict=False):
        assert error(a.cpu(), e) < bound(1500) + torch.finfo(dtype).eps / 2, name


def test_windows_have_one_or_two_tiles():
    pattern = Pattern.from_mask(torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="windows has 0, 1 or 2 tiles of samples a block"):
        linear_schedule(pattern, 3)


def shared_groups(mask, strips=False):
    """How many groups of four rows a schedule has, per column tile of 64, that share their columns (and those of which
    the gradient takes 16 neighbouring columns at a time)."""
    pattern = Pattern.from_mask(mask)
    width = mask.shape[1]
    schedule = OP.linear_schedule(pattern.row_ptr, pattern.col, None, width, 64).tolist()
    chunks, tiles, exact = schedule[4], max(1, -(-width // 64)), schedule[6]
    first = schedule[10 + chunks + 1 :][: 3 * tiles * chunks + 1]
    return exact + sum(first[3 * cell + (1 if strips else 2)] - first[3 * cell] for cell in range(tiles * chunks))


def test_rows_share_their_columns_where_they_have_the_same_ones():
    gen = torch.Generator().manual_seed(0)
    assert shared_groups(torch.ones(12, 100, dtype=torch.bool)) == 3 * 2
    assert shared_groups(block_mask(8, 1, 16, 60, 0.3, gen)) == 4
    assert shared_groups(torch.rand(64, 64, generator=gen) < 0.1) == 0
    mask = torch.rand(64, 64, generator=gen) < 0.1
    mask[20:24] = True
    assert shared_groups(mask) == 1
    # 3 of 4 rows alike are not enough: 192 nonzeros in 64 columns
    mask[20] = False
    assert shared_groups(mask) == 0


def test_blocks_of_a_mask_run_exactly():
    """Groups of four rows that need no index of columns, in the pattern and in the transposed one."""

    def exact(mask):
        pattern = Pattern.from_mask(mask)
        forward = OP.linear_schedule(pattern.row_ptr, pattern.col, None, mask.shape[1], 64)
        backward = OP.linear_schedule(pattern.t_row_ptr, pattern.t_col, pattern.t_perm, mask.shape[0], 64)
        return forward[6].item(), backward[6].item()

    mask = torch.zeros(64, 128, dtype=torch.bool)
    mask[16:32, :64] = mask[16:32, 80:112] = True
    assert exact(mask) == (0, (64 + 32) // 4)  # 4 groups of 4 and 2 strips are too few for dW
    mask[32:64, :96] = True
    # 12 groups of rows in each of two tiles of 64 columns; 112 columns
    assert exact(mask) == (12 * 2, 112 // 4)
    mask[40, 3] = False
    assert exact(mask) == (12 * 2 - 1, 112 // 4 - 1)


def test_strips_of_columns_where_they_pay():
    gen = torch.Generator().manual_seed(0)
    full = torch.ones(40, 96, dtype=torch.bool)
    assert shared_groups(full, strips=True) == 10 * 2
    # 16 rows: each strip of x would be brought into the order of samples for four groups
    assert shared_groups(full[:16, :64], strips=True) == 0 and shared_groups(full[:16, :64]) == 4
    # every second column: half of a strip is waste
    alternate = torch.arange(64).remainder(2).eq(0).expand(64, 64)
    assert shared_groups(alternate, strips=True) == 0 and shared_groups(alternate) == 16
    # blocks of 16 columns that begin anywhere
    shifted = torch.zeros(64, 64, dtype=torch.bool)
    shifted[:, 5:21] = shifted[:, 40:56] = True
    assert shared_groups(shifted, strips=True) == 16
    assert shared_groups(block_mask(8, 1, 64, 64, 0.95, gen), strips=True) == 16


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize(
    "shape",
    [
        ((200,), 300, 700, 0.1),
        ((60,), 520, 600, 0.05),
        ((17,), 30, 9, 0.5),
        ((300,), 70, 600, "16x16 blocks"),
        ((150,), 200, 800, "8x1 blocks, few removed"),
    ],
)
def test_equals_dense_linear_on_any_number_of_threads(threads, shape):
    check(*shape)


def test_by_hand():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    pattern = Pattern.from_mask(mask)
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    values = torch.tensor([10.0, 100.0], requires_grad=True)
    bias = torch.tensor([1.0, -7.0], requires_grad=True)
    y = masked_linear(x, values, bias, pattern, backend="cpu")
    assert y.tolist() == [[311.0, -7.0], [641.0, -7.0]]
    y.backward(torch.tensor([[1.0, 5.0], [2.0, 5.0]]))
    assert x.grad.tolist() == [[10.0, 0.0, 100.0], [20.0, 0.0, 200.0]]
    assert values.grad.tolist() == [9.0, 15.0] and bias.grad.tolist() == [3.0, 10.0]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_bfloat16_sums_in_float32(isa):
    x, values, bias, pattern, grad = case((70,), 130, 90, 0.3, dtype=torch.bfloat16)
    actual = run(x, values, bias, pattern, grad, backend="cpu")
    expected = run(x.double(), values, bias, pattern, grad.double(), torch.float64)
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    # y and dx are rounded once to 8 bits; the other two are float32 sums of bfloat16 products
    for a, e, most in zip(actual, expected, (2**-8, 2**-8, bound(70), bound(70)), strict=True):
        assert error(a, e) < most


def test_bfloat16_output_is_rounded_to_nearest_even_and_keeps_nan():
    pattern = Pattern.from_mask(torch.ones(1, 1, dtype=torch.bool))
    x = torch.tensor([[1.0], [float("nan")], [float("-inf")]], dtype=torch.bfloat16)
    for bias in (2**-8, 2**-8 + 2**-12, 3 * 2**-8):  # ties at 1 + 2^-8 and 1 + 3 * 2^-8
        y = masked_linear(x, torch.ones(1), torch.tensor([bias]), pattern)
        assert torch.equal(y[0], torch.tensor([1.0 + bias]).bfloat16())
        assert y[1].isnan() and y[2].item() == float("-inf")


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_relu_in_the_epilogue(isa):
    x, values, bias, pattern, grad = case((70,), 37, 53, 0.3)
    actual = run(x, values, bias, pattern, grad, activation="relu", backend="cpu")
    expected = run(x, values, bias, pattern, grad, torch.float64, activation="relu")
    assert (actual[0] == 0).any() and (actual[0] >= 0).all()
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e) < bound(70)


def test_strided_inputs_and_gradients():
    x, values, bias, pattern, grad = case((70,), 37, 53, 0.3)
    expected = run(x, values, bias, pattern, grad, backend="cpu")
    wide = torch.stack([values, values], 1)
    strided = run(x.t().contiguous().t(), wide[:, 0], bias, pattern, grad.t().contiguous().t(), backend="cpu")
    expanded = run(x, values, bias, pattern, torch.ones(1, 1).expand_as(grad), backend="cpu")
    ones = run(x, values, bias, pattern, torch.ones_like(grad), backend="cpu")
    for pairs in (zip(strided, expected, strict=True), zip(expanded, ones, strict=True)):
        assert all(torch.equal(a, e) for a, e in pairs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(needed):
    x, values, bias, pattern, grad = case((70,), 37, 53, 0.3)
    together = run(x, values, bias, pattern, grad)[1:]
    leaves = [t.requires_grad_(n) for t, n in zip((x, values, bias), needed, strict=True)]
    masked_linear(*leaves, pattern).backward(grad)
    for leaf, expected, need in zip(leaves, together, needed, strict=True):
        assert torch.equal(leaf.grad, expected) if need else leaf.grad is None


def test_without_bias_and_without_gradient():
    x, values, bias, pattern, _ = case((70,), 37, 53, 0.3)
    zero = masked_linear(x, values, torch.zeros_like(bias), pattern)
    assert torch.equal(masked_linear(x, values, None, pattern), zero)
    assert torch.equal(masked_linear(x, values.requires_grad_(), None, pattern).detach(), zero)


def test_given_schedules_are_used_and_must_fit():
    x, values, bias, pattern, _ = case((70,), 37, 53, 0.3)
    y = masked_linear(x, values, bias, pattern)
    assert torch.equal(masked_linear(x, values, bias, pattern, schedules=linear_schedule(pattern)), y)
    other = linear_schedule(Pattern.from_mask(torch.ones(53, 37, dtype=torch.bool)))
    with pytest.raises(RuntimeError, match="schedule is of another pattern"):
        masked_linear(x, values, bias, pattern, schedules=other)


def test_every_element_is_written(monkeypatch):
    """Fresh memory is filled with NaN, so what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        for shape in (((70,), 37, 53, 0.3), ((130,), 200, 300, 0.003), ((50,), 40, 35, 0.0), ((70,), 90, 60, "mixed")):
            assert not any(t.isnan().any() for t in run(*case(*shape), backend="cpu"))
    finally:
        torch.use_deterministic_algorithms(before)


def test_same_bits_every_time():
    one, two = (run(*case((200,), 300, 700, 0.1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def op_arguments(batch=70, relu=False, keep=True):
    x, values, bias, pattern, grad = case((batch,), 37, 53, 0.3)
    index = linear_schedule(pattern)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    return (*leaves, *index, 53, relu, keep), grad, index


@pytest.mark.parametrize("relu", [False, True])
def test_opcheck_forward(relu):
    torch.library.opcheck(OP.masked_linear.default, op_arguments(relu=relu)[0])


@pytest.mark.parametrize("need", [(True, True, True), (False, True, False), (True, False, False)])
def test_opcheck_backward(need):
    (x, values, bias, *_), grad, index = op_arguments()
    y, packed = OP.masked_linear(x, values, bias, *index, 53, True, True)
    tensors = [t.detach() for t in (grad, packed, values, y)]
    torch.library.opcheck(OP.masked_linear_backward.default, (*tensors, *index, 37, *need))


def test_opcheck_schedule():
    pattern = case((1,), 37, 53, 0.3)[3]
    torch.library.opcheck(OP.linear_schedule.default, (pattern.row_ptr, pattern.col, None, 37, 16))


def test_gradcheck_of_the_reference():
    x, values, bias, pattern, _ = case((3, 2), 7, 5, 0.5)
    leaves = [t.double().requires_grad_() for t in (x, values, bias)]
    assert torch.autograd.gradcheck(lambda *a: masked_linear(*a, pattern), leaves)
    assert backend_of("masked_linear") == "reference"


def test_compiles_without_a_graph_break():
    x, values, bias, pattern, grad = case((70,), 37, 53, 0.3)
    schedules = linear_schedule(pattern)

    def f(x, values, bias):
        return masked_linear(x * 2, values, bias, pattern, "relu", schedules=schedules).sin()

    leaves = [t.requires_grad_() for t in (x, values, bias)]
    eager = torch.autograd.grad(f(*leaves), leaves, grad)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves, grad), eager, strict=True):
        assert torch.allclose(a, e, rtol=1e-5, atol=1e-5)


def test_autocast_gives_bfloat16_and_leaves_the_values_in_float32():
    x, values, bias, pattern, _ = case((70,), 37, 53, 0.3)
    values.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, values, bias, pattern)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and values.grad.dtype == torch.float32
    assert torch.equal(y, masked_linear(x.bfloat16(), values, bias, pattern))


def test_backends_are_chosen_and_named(monkeypatch):
    x, values, bias, pattern, _ = case((4,), 7, 5, 0.5)
    expected = F.linear(x, pattern.scatter(values), bias)
    for how in ({"backend": "reference"}, {"backend": "cpu"}):
        assert torch.allclose(masked_linear(x, values, bias, pattern, **how), expected, atol=1e-5)
        assert backend_of("masked_linear") == how["backend"]
    with use_backend("reference"):
        masked_linear(x, values, bias, pattern)
        assert backend_of("masked_linear") == "reference"
    masked_linear(x, values, bias, pattern)
    assert backend_of("masked_linear") == "cpu" and CPU_ERROR is None
    with pytest.raises(ValueError, match="unknown backend 'gpu'; known: reference, cpu"):
        masked_linear(x, values, bias, pattern, backend="gpu")
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        masked_linear(x.double(), values, bias, pattern, backend="cpu")
    monkeypatch.setattr("pysparse_ticket.ops.library.CPU_ERROR", "no compiler was there")
    with pytest.raises(RuntimeError, match="no cpu backend: no compiler was there"):
        masked_linear(x, values, bias, pattern, backend="cpu")
    with pytest.warns(RuntimeWarning, match="runs on the reference backend: no compiler was there"):
        masked_linear(x, values, bias, pattern)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, b: (x[:, :3], v, b), r"x of shape \(4, 3\) does not end in the pattern's 7 input features"),
        (lambda x, v, b: (x, v[1:], b), "do not match the pattern's"),
        (lambda x, v, b: (x, v, b[:2]), r"bias of shape \(2,\) does not match the pattern's 5 output features"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    x, values, bias, pattern, _ = case((4,), 7, 5, 0.5)
    with pytest.raises(ValueError, match=message):
        masked_linear(*change(x, values, bias), pattern)


def test_masks_beyond_32_bits_are_refused():
    mask = torch.zeros(1, 1, dtype=torch.bool).expand(50_000, 50_000)
    with pytest.raises(
        ValueError, match="a mask of 2500000000 weights is too large for 32-bit indices: at most 2147483647"
    ):
        Pattern.from_mask(mask)


def test_unknown_activation_is_refused():
    x, values, bias, pattern, _ = case((4,), 7, 5, 0.5)
    with pytest.raises(ValueError, match="unknown activation 'gelu'; known: None, 'relu'"):
        masked_linear(x, values, bias, pattern, "gelu")
