"""Orders of rows and columns that empty tiles."""

import pytest
import torch
import torch.nn.functional as F

from pysparse_ticket.ops.tile_order import _Search, filled_tiles, tile_order


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uneven(out, width, sparsity, sigma=0.5, seed=0):
    """The mask of global magnitude on gaussian weights whose rows and columns have log-normal scales."""
    g = generator(seed)
    weight = torch.randn(out, width, generator=g)
    weight *= torch.exp(sigma * torch.randn(out, 1, generator=g)) * torch.exp(sigma * torch.randn(width, generator=g))
    size = weight.abs()
    return size > size.flatten().kthvalue(int(sparsity * size.numel())).values


def blocks(rows, cols, tile, share, seed=0, fill=1.0):
    """A shuffled mask of whole tiles and how many of them it has."""
    g = generator(seed)
    kept = torch.rand(rows, cols, generator=g) < share
    mask = kept.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    mask &= torch.rand(mask.shape, generator=g) < fill
    mask = mask[torch.randperm(mask.shape[0], generator=g)][:, torch.randperm(mask.shape[1], generator=g)]
    return mask, int(kept.sum())


def check(order, mask):
    """Permutations, exact counts, and nothing but dead rows and columns dropped."""
    for axis, one in enumerate((order.row_order, order.col_order)):
        assert one.dtype == torch.int32 and one.sort().values.tolist() == list(range(mask.shape[axis]))
    kept = order.kept(mask)
    assert kept.shape == (order.rows, order.cols) and kept.sum() == mask.sum()
    assert filled_tiles(kept, order.tile) == order.filled_after <= order.filled_before == filled_tiles(mask, order.tile)
    assert order.dead_rows == int((~mask.any(1)).sum()) and order.dead_cols == int((~mask.any(0)).sum())


def test_counts_by_hand():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[4, 6] = True
    assert filled_tiles(mask, (2, 3)) == 2  # of 3 x 3, the last row of tiles one row high, the last column one wide
    order = tile_order(mask, (2, 3))
    assert (order.tiles, order.filled_before, order.dead_rows, order.dead_cols) == (9, 2, 2, 4)
    assert order.identity and (order.rows, order.cols) == (5, 7)  # three weights in three rows fill two tiles at least


def test_dead_rows_and_columns_go_to_the_end():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1::2, ::2] = True
    order = tile_order(mask, (4, 4))
    assert order.row_order.tolist() == [1, 3, 5, 7, 0, 2, 4, 6]
    assert order.col_order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert (order.rows, order.cols, order.dead_rows, order.dead_cols, order.how) == (4, 4, 4, 4, "drop")
    assert (order.empty_before, order.empty_after) == (0, 0.75)
    assert str(order) == ("tiles of 4x4: 0.0% empty as it is, 75.0% reordered (drop); 4 rows and 4 columns are dead")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("tile", [(16, 16), (32, 8)], ids=str)
def test_shuffled_blocks_are_recovered(tile, share):
    mask, kept = blocks(12, 10, tile, share)
    order = tile_order(mask, tile)
    check(order, mask)
    assert order.filled_after == kept < order.filled_before


def test_blocks_with_holes_are_recovered():
    mask, kept = blocks(12, 12, (32, 32), 0.3, fill=0.5)
    order = tile_order(mask, (32, 32))
    check(order, mask)
    assert order.how.startswith("overlap") and kept <= order.filled_after <= 1.1 * kept < 0.5 * order.filled_before


def test_swaps_mend_a_misplaced_row():
    mask, kept = blocks(8, 8, (16, 16), 0.3)
    tidy = tile_order(mask, (16, 16)).kept(mask)
    order = torch.arange(len(tidy))
    order[[3, 40]] = order[[40, 3]]
    search = _Search(tidy[order], (16, 16))
    groups = tuple(torch.arange(n) // 16 for n in tidy.shape)
    assert search._filled(groups) > search._filled(search._swapped(groups)) == kept


@pytest.mark.parametrize("sparsity", [0.9, 0.98])
@pytest.mark.parametrize("side", [32, 64])
def test_uneven_rows_and_columns_empty_tiles(side, sparsity):
    mask = uneven(512, 640, sparsity, sigma=1.0)
    order = tile_order(mask, (side, side))
    check(order, mask)
    dropped = order.tried["drop"]
    assert order.filled_after < 0.75 * dropped
    assert order.filled_after <= min(order.tried.values()) and order.empty_after > order.empty_before


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95])
def test_uniform_random_masks_keep_the_identity(sparsity):
    mask = torch.rand(256, 192, generator=generator()) >= sparsity
    order = tile_order(mask, (32, 32))
    assert order.identity and order.filled_after == order.filled_before and (order.rows, order.cols) == (256, 192)
    assert order.row_order.tolist() == list(range(256)) and order.col_order.tolist() == list(range(192))
    assert "no order empties" in str(order)


def test_a_small_gain_keeps_the_identity():
    mask = uneven(256, 256, 0.9)
    assert not tile_order(mask, (32, 32)).identity
    assert tile_order(mask, (32, 32), least_gain=0.9).identity


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_reordered_product_is_the_masked_one(bias):
    mask = uneven(72, 100, 0.95, sigma=1.0)
    order = tile_order(mask, (16, 8))
    assert order.rows < 72 and order.cols < 100 and not order.identity
    g = generator(3)
    make = {"generator": g, "dtype": torch.float64}
    weight = (torch.randn(72, 100, **make) * mask).requires_grad_()
    b = torch.randn(72, **make, requires_grad=True) if bias else None
    x = torch.randn(3, 5, 100, **make, requires_grad=True)
    expected, actual = F.linear(x, weight, b), order.linear(x, weight, b)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    wanted = [x, weight] + ([b] if bias else [])
    grad = torch.randn(expected.shape, **make)
    ours = torch.autograd.grad(actual, wanted, grad)
    theirs = torch.autograd.grad(expected, wanted, grad)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours[1] * mask, theirs[1] * mask, rtol=1e-13, atol=1e-13)
    if bias:
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(7, 300), (300, 7), (65, 129), (1, 1)], ids=str)
def test_ragged_shapes(shape):
    mask = uneven(*shape, 0.9, sigma=1.5) if min(shape) > 1 else torch.ones(shape, dtype=torch.bool)
    check(tile_order(mask, (16, 32)), mask)


def test_the_same_order_each_time():
    mask = uneven(200, 200, 0.95, sigma=1.0)
    a, b = tile_order(mask, (16, 16)), tile_order(mask.clone(), (16, 16))
    assert torch.equal(a.row_order, b.row_order) and torch.equal(a.col_order, b.col_order) and a.tried == b.tried


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (6, 9)], ids=str)
def test_a_mask_without_weights(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    order = tile_order(mask, (4, 4))
    assert order.identity and order.filled_after == 0
    assert order.empty_after == (1.0 if mask.numel() else 0.0)


def test_errors():
    with pytest.raises(ValueError, match=r"takes a bool mask \[out, in\], not torch.float32 of shape \(4, 4\)"):
        tile_order(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"a tile is \(rows, columns\) of at least 1, not \(0, 4\)"):
        tile_order(torch.ones(4, 4, dtype=torch.bool), (0, 4))
