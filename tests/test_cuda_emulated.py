"""The kernels of csrc/cuda, compiled for the CPU with a fiber a thread (tests/cuda_emulation), against F.linear on the
scattered weight in float64."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_masked_linear import MASKS, bound, case, error, run

from pysparse_ticket.ops.library import CPU_ERROR
from pysparse_ticket.ops.pattern import Pattern

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
OP_NAMES = ("linear_schedule", "masked_linear", "masked_linear_backward")

pytestmark = pytest.mark.skipif(
    bool(CPU_ERROR) or shutil.which("g++") is None, reason="emulating the CUDA kernels takes the extension and g++"
)


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    include = [f"-I{path}" for path in (ROOT / "tests/cuda_emulation", ROOT / "csrc", TORCH / "include")]
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    source = ROOT / "tests/cuda_emulation/emulate.cpp"
    links = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *flags, *include, source, "-o", library, *links], check=True)
    schemas = torch.library.Library("pysparse_emulated", "DEF")
    for name in OP_NAMES:
        schema = str(getattr(torch.ops.pysparse_ticket, name).default._schema)
        schemas.define(schema.removeprefix("pysparse_ticket::"))
    torch.ops.load_library(str(library))
    yield torch.ops.pysparse_emulated
    schemas._destroy()


def schedules(ops, pattern, windows=None):
    rows, columns = pattern.shape
    how = 0 if windows is None else -1 - windows
    return (
        ops.linear_schedule(pattern.row_ptr, pattern.col, None, columns, how),
        ops.linear_schedule(pattern.t_row_ptr, pattern.t_col, pattern.t_perm, rows, how),
    )


def emulated(ops, x, values, bias, pattern, grad, relu=False, need=(True, True, True), windows=None):
    """Output and gradients of x, values and bias."""
    rows, columns = pattern.shape
    walks = schedules(ops, pattern, windows)
    y, packed = ops.masked_linear(x, values, bias, *walks, rows, relu, True)
    return y, *ops.masked_linear_backward(grad, packed, values, y if relu else None, *walks, columns, *need)


SHAPES = {
    "two chunks of rows, four stages": ((70,), 500, 600, 0.1),
    "ragged batch": ((70,), 37, 53, 0.3),
    "one sample": ((1,), 5, 3, 0.5),
    "1-D x": ((), 20, 30, 0.4),
    "3-D x": ((3, 9), 33, 17, 0.4),
    "stages wait in the ring": ((33,), 1500, 40, 0.02),
    "more stages than the ring": ((5,), 1700, 70, 0.1),
    "full mask": ((50,), 200, 35, 1.0),
    "zero mask": ((50,), 40, 35, 0.0),
    "mostly empty rows": ((100,), 200, 300, 0.003),
    "one output": ((130,), 90, 1, 0.5),
    "one input": ((130,), 1, 90, 0.5),
    "whole vectors": ((128,), 64, 128, 0.2),
    "empty batch": ((0,), 12, 7, 0.5),
    "empty batch of 3-D x": ((2, 0), 12, 7, 0.5),
}


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_dense_linear(ops, poison, shape, relu):
    batch, in_features, out_features, density = shape
    x, values, bias, pattern, grad = case(batch, in_features, out_features, density)
    actual = emulated(ops, x, values, bias, pattern, grad, relu)
    expected = run(x, values, bias, pattern, grad, torch.float64, activation="relu" if relu else None)
    samples = x.numel() // in_features
    for name, a, e, n in zip(
        ("y", "dx", "dvalues", "dbias"), actual, expected, (in_features, out_features, samples, samples), strict=True
    ):
        assert a.shape == e.shape and a.dtype == torch.float32
        assert error(a, e) < bound(n), name


@pytest.mark.parametrize("mask", [*list(MASKS)[:3], "2:4", "mixed"])
def test_masks_with_structure(ops, poison, mask):
    x, values, bias, pattern, grad = case((40,), 150, 133, mask)
    for a, e in zip(
        emulated(ops, x, values, bias, pattern, grad), run(x, values, bias, pattern, grad, torch.float64), strict=True
    ):
        assert error(a, e) < bound(150)


@pytest.mark.parametrize("early", [1, 5, 31], ids=lambda n: f"{n} early rows of 32")
def test_weights_wait_in_the_ring_as_long_as_they_may(ops, poison, monkeypatch, early):
    """The early rows have their weights in the first columns, the others of their warp in the last: in lockstep they
    fall behind until their columns are about to leave."""

    def mask(rows, columns, gen):
        drawn = torch.rand(rows, columns, generator=gen) < 0.3
        first = torch.arange(rows) % 32 < early
        return drawn & torch.where(first[:, None], torch.arange(columns) < 300, torch.arange(columns) >= columns - 300)

    monkeypatch.setitem(MASKS, "early rows", mask)
    x, values, bias, pattern, grad = case((33,), 1700, 70, "early rows")
    expected = run(x, values, bias, pattern, grad, torch.float64)
    for actual, right in zip(emulated(ops, x, values, bias, pattern, grad), expected, strict=True):
        assert error(actual, right) < bound(1700)


@pytest.mark.parametrize("features", [(500, 133), (64, 88)], ids=["odd", "vectors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_activations_are_summed_in_float32(ops, poison, dtype, features):
    x, values, bias, pattern, grad = case((70,), *features, 0.3, dtype=dtype)
    actual = emulated(ops, x, values, bias, pattern, grad, windows=0)
    expected = run(x.double(), values, bias, pattern, grad.double(), torch.float64)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, torch.float32]
    rounding = torch.finfo(dtype).eps / 2
    for a, e, most in zip(actual, expected, (rounding, rounding, bound(70), bound(70)), strict=True):
        assert error(a, e) <= most + bound(500)


def test_nothing_but_a_row_s_own_columns_is_read(ops):
    """Infinities in columns that a row does not have leave it alone, padding included."""
    gen = torch.Generator().manual_seed(0)
    x, values, bias, pattern, grad = case((40,), 300, 70, 0.05)
    used = pattern.mask().any(0)
    column = int(torch.randint(300, (), generator=gen)) if used.all() else int((~used).nonzero()[0])
    clean = pattern.mask()[:, column].logical_not()
    x[:, column] = float("inf")
    y = emulated(ops, x, values, bias, pattern, grad)[0]
    assert y[:, clean].isfinite().all() and clean.any()


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(ops, need):
    arguments = case((70,), 37, 53, 0.3)
    together = emulated(ops, *arguments)[1:]
    alone = emulated(ops, *arguments, need=need)[1:]
    for whole, part, needed in zip(together, alone, need, strict=True):
        assert torch.equal(part, whole) if needed else part.numel() == 0


def test_the_packed_input_is_as_large_as_the_fake_says(ops):
    for dtype, tile in ((torch.float32, 32), (torch.bfloat16, 64), (torch.float16, 64)):
        x, values, bias, pattern, _ = case((70,), 37, 53, 0.3, dtype=dtype)
        packed = ops.masked_linear(x, values, bias, *schedules(ops, pattern), 53, False, True)[1]
        assert packed.shape == (-(-70 // tile) * tile * 37,) and packed.dtype == dtype
        assert ops.masked_linear(x, values, bias, *schedules(ops, pattern), 53, False, False)[1].numel() == 0


def test_rows_of_a_warp_have_as_many_entries_a_stage(ops):
    """5% of 4096 columns: without the wait in the ring every second entry is padding."""
    mask = torch.rand(512, 4096, generator=torch.Generator().manual_seed(0)) < 0.05
    pattern = Pattern.from_mask(mask)
    groups = ops.linear_schedule(pattern.row_ptr, pattern.col, None, 4096, 0)[5].item()
    assert groups * 32 < 1.1 * pattern.nnz


def test_schedules_of_another_pattern_are_refused(ops):
    x, values, bias, *_ = case((70,), 37, 53, 0.3)
    other = schedules(ops, Pattern.from_mask(torch.ones(53, 37, dtype=torch.bool)))
    with pytest.raises(RuntimeError, match="schedule is of another pattern"):
        ops.masked_linear(x, values, bias, *other, 53, False, True)


def test_rows_of_any_length_share_the_weight_gradient(ops):
    """Rows that have ten times the weights of others are cut: hardly any entry is padding."""
    pattern = Pattern.from_mask(uneven(1024, 2048, 0.02, 1.0))
    groups = ops.linear_schedule(pattern.row_ptr, pattern.col, None, 2048, 0)[Header.CELL_GROUPS].item()
    assert groups * 32 < 1.15 * pattern.nnz


# --- windows of 16 rows on tensor cores


class Header:
    """Words of csrc/cuda/linear_schedule.h"""

    CELL_GROUPS, TILES, GROUPS, SLOT, GRADIENT_CELLS = 12, 18, 21, 24, 26


def groups_of(schedule):
    """Places in the ring of each group's columns."""
    words = schedule.numpy()
    groups, at = words[Header.GROUPS], words[Header.SLOT]
    return torch.from_numpy(words[at : at + groups * 8].copy().view("uint16").astype("int64")).view(-1, 16)


TILES = pytest.mark.parametrize("tiles", [1, 2], ids=["one tile", "two tiles"])
WINDOW_SHAPES = {
    **{name: SHAPES[name] for name in SHAPES if name != "two chunks of rows, four stages"},
    "three chunks of rows, nine stages": ((70,), 560, 600, 0.05),
    "three tiles of samples": ((130,), 64, 90, 0.2),
    "more columns than fit the weight gradient": ((70,), 900, 280, 0.01),
}


@TILES
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((name, torch.bfloat16) for name in WINDOW_SHAPES),
        ("ragged batch", torch.float16),
        ("full mask", torch.float16),
    ],
    ids=str,
)
def test_windows_equal_dense_linear_with_weights_of_the_activations_type(ops, poison, tiles, dtype, shape):
    batch, in_features, out_features, density = WINDOW_SHAPES[shape]
    x, values, bias, pattern, grad = case(batch, in_features, out_features, density, dtype=dtype)
    walks = schedules(ops, pattern, tiles)
    assert pattern.nnz == 0 or (all(s[Header.TILES] == tiles for s in walks) and walks[0][Header.GRADIENT_CELLS] > 0)
    actual = emulated(ops, x, values, bias, pattern, grad, windows=tiles)
    expected = run(x.double(), values.to(dtype).double(), bias.double(), pattern, grad.double(), torch.float64)
    rounding, samples = torch.finfo(dtype).eps / 2, x.numel() // in_features
    most = (rounding + bound(in_features), rounding + bound(out_features), bound(samples), bound(samples))
    for name, a, e, limit in zip(("y", "dx", "dvalues", "dbias"), actual, expected, most, strict=True):
        assert a.shape == e.shape
        assert error(a, e) <= limit, name


@TILES
@pytest.mark.parametrize("mask", ["8x1 blocks", "random, few removed", "2:4", "mixed", "every eighth column", "early"])
def test_windows_of_masks_with_structure(ops, poison, monkeypatch, tiles, mask):
    def eighths(rows, columns, gen):
        return (torch.rand(rows, columns, generator=gen) < 0.5) & (torch.arange(columns) % 8 == 3)

    def early(rows, columns, gen):
        """The columns of one remainder come first, and wait for the others'."""
        first = torch.arange(columns) % 8 == 5
        kept = torch.where(first, torch.arange(columns) < 400, torch.arange(columns) > 450)
        return (torch.rand(rows, columns, generator=gen) < 0.1) & kept

    monkeypatch.setitem(MASKS, "every eighth column", eighths)
    monkeypatch.setitem(MASKS, "early", early)
    features = 1000 if mask == "early" else 250
    x, values, bias, pattern, grad = case((40,), features, 133, mask, dtype=torch.bfloat16)
    actual = emulated(ops, x, values, bias, pattern, grad, True, windows=tiles)
    wide = x.double(), values.bfloat16().double(), bias.double(), pattern, grad.double()
    for a, e in zip(actual[:2], run(*wide, torch.float64, activation="relu"), strict=False):
        assert error(a, e) <= 2**-8 + bound(features)


@TILES
def test_windows_read_no_column_that_none_of_their_rows_has(ops, tiles):
    mask = torch.rand(70, 300, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:, 1::2] = False
    pattern = Pattern.from_mask(mask)
    x = torch.full((40, 300), float("inf"), dtype=torch.bfloat16)
    x[:, ::2] = 1
    y, _ = ops.masked_linear(x, torch.ones(pattern.nnz), None, *schedules(ops, pattern, tiles), 70, False, False)
    assert torch.equal(y.float(), mask.sum(1).float().expand(40, 70).bfloat16().float())


def test_the_weight_gradient_by_windows_keeps_columns_and_rows_apart(ops):
    """An infinity in a column of x or a row of the gradient reaches the weights of that column or row alone."""
    x, values, bias, pattern, grad = case((70,), 300, 70, 0.3, dtype=torch.bfloat16)
    x[5, 17], grad[66, 40] = float("inf"), float("inf")
    spoilt = pattern.mask().clone()
    spoilt[:40, :] = spoilt[41:, :] = False
    spoilt[:, 17] = pattern.mask()[:, 17]
    found = emulated(ops, x, values, bias, pattern, grad, windows=1)[2]
    assert torch.equal(~found.isfinite(), spoilt[pattern.mask()]) and spoilt.any()


def test_float32_does_not_take_the_windows(ops):
    arguments = case((70,), 37, 53, 0.3)
    without, with_windows = (emulated(ops, *arguments, windows=n) for n in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(without, with_windows, strict=True))


def uneven(rows, columns, density, sigma):
    """Gaussian weights whose rows and columns are scaled by exp(sigma N(0, 1)), the largest kept."""
    gen = torch.Generator().manual_seed(0)
    size = torch.randn(rows, columns, generator=gen).abs()
    size *= (sigma * torch.randn(rows, 1, generator=gen)).exp() * (sigma * torch.randn(1, columns, generator=gen)).exp()
    return size > size.flatten().kthvalue(round((1 - density) * size.numel())).values


@pytest.mark.parametrize(
    ("density", "sigma", "tiles", "gradient"),
    [(0.05, 0.0, 2, True), (0.01, 0.0, 0, True), (0.05, 0.5, 2, True), (0.02, 0.5, 1, True)],
    ids=["random 95%", "random 99%", "uneven 95%", "uneven 98%"],
)
def test_windows_are_chosen_where_they_are_full_enough(ops, density, sigma, tiles, gradient):
    pattern = Pattern.from_mask(uneven(1024, 4096, density, sigma))
    schedule = ops.linear_schedule(pattern.row_ptr, pattern.col, None, 4096, 0)
    assert schedule[Header.TILES] == tiles and (schedule[Header.GRADIENT_CELLS] > 0) == gradient


@TILES
def test_columns_read_together_lie_in_different_banks(ops, tiles):
    """Of a random mask's windows; and groups are full: 16 columns each but for the last of a window."""
    mask = torch.rand(512, 4096, generator=torch.Generator().manual_seed(0)) < 0.05
    pattern = Pattern.from_mask(mask)
    schedule = ops.linear_schedule(pattern.row_ptr, pattern.col, None, 4096, -1 - tiles)
    slots = groups_of(schedule)
    reads = torch.nn.functional.one_hot(slots.view(-1, 8) % 8, 8).sum(1).max(1).values
    assert reads.double().mean() < 1.1
    order = mask.sum(1).view(-1, 512 // tiles).argsort(dim=1, descending=True, stable=True)
    order += torch.arange(tiles)[:, None] * (512 // tiles)
    columns = mask[order.flatten()].view(-1, 16, 4096).any(1).sum(1)
    assert len(slots) * 16 <= columns.sum() + 16 * len(columns)
