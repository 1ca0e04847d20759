"""The program behind docs/tickets.md: its rows and tables by hand, and one arm at its smallest."""

from dataclasses import replace
from pathlib import Path

import pytest
from evidence import importances, layer_tickets, moving, transfers
from evidence.__main__ import markdown
from evidence.lab import Lab, Setup
from evidence.rows import Row, Store, from_csv, grouped, middle, spread, to_csv

import pysparse_ticket as pst

RESULTS = Path(importances.__file__).parent.parent / "results"
ROW = Row("d", "procedural", "resnet20", "RigL", "90%", 0, sparsity=0.9, accuracy=0.7, settings="s", machine="m")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # deviations -2, 0, 2 from 4: sqrt(8 / 2) = 2
        ([2.0, 4.0, 6.0], "4.00 ± 2.00"),
        ([0.25, None], "0.25"),
        ([None], "not measured"),
        ([], "not measured"),
    ],
)
def test_spread_is_mean_and_sample_deviation(values, expected):
    assert spread(values) == expected


def test_middle_is_the_median():
    assert [middle(values) for values in ([1.0, 9.0, 2.0], [1.0, None, 2.0], [])] == ["2.00", "1.50", "not measured"]


def test_a_csv_file_reads_back_as_the_rows_it_was_made_of():
    rows = [ROW, replace(ROW, seed=1, accuracy=None, overlap=0.5, arm="magnitude l1")]
    assert from_csv(to_csv(rows)) == rows
    assert ",," in to_csv(rows).splitlines()[2]  # not measured is empty, never 0


def test_a_csv_file_of_other_columns_is_refused():
    with pytest.raises(ValueError, match="lacks the columns arm"):
        from_csv(to_csv([ROW]).replace(",arm,", ",way,"))


def test_a_store_knows_a_row_by_its_settings_and_replaces_it(tmp_path):
    store = Store(tmp_path / "rows.csv")
    store.add([ROW])
    store.add([replace(ROW, accuracy=0.8), replace(ROW, seed=1)])
    again = Store(tmp_path / "rows.csv")
    assert [(row.seed, row.accuracy) for row in again.rows] == [(0, 0.8), (1, 0.7)]
    assert again.has(replace(ROW, revision="later")) and not again.has(replace(ROW, settings="other"))


def test_rows_are_grouped_in_the_order_of_their_first():
    rows = [ROW, replace(ROW, arm="SET"), replace(ROW, seed=1)]
    assert {key: len(own) for key, own in grouped(rows, lambda row: (row.arm,)).items()} == {("RigL",): 2, ("SET",): 1}


def test_the_table_of_moving_masks_has_hand_computed_figures():
    # accuracies 70, 72, 74: 72 ± 2; seconds 1, 2, 9: 2 in the middle; active 15, 15, 18: 16 ± sqrt(3)
    rows = [
        replace(ROW, seed=seed, accuracy=acc, train_seconds=seconds, exploration=ever)
        for seed, acc, seconds, ever in ((0, 0.70, 1.0, 0.15), (1, 0.72, 2.0, 0.15), (2, 0.74, 9.0, 0.18))
    ]
    assert "| RigL | 90% | 72.00 ± 2.00 | 2.00 | 16.0 ± 1.7 |" in moving.render(rows)


def test_the_table_of_importances_shows_half_way_and_the_last_round():
    trained = [
        Row("a", "digits", "resnet20", "imp l1", level, seed, sparsity, acc, 1.0, 2.0, emptied=0.0)
        for seed, shift in ((0, 0.0), (1, 0.02))
        for level, sparsity, acc in (("0", 0.0, 0.9 + shift), ("1", 0.2, 0.8), ("2", 0.36, 0.6 + shift))
    ]
    shared = Row("a", "digits", "resnet20", "l1 l2", "2", 0, overlap=0.5, iou=1 / 3, chance=0.25)
    text = importances.render([*trained, shared])
    # of two values d apart the deviation is d / sqrt 2: 2 gives 1.41
    assert "| l1 | 91.00 ± 1.41 | 1.00 | 80.00 ± 0.00 | 1.00 | 61.00 ± 1.41 |" in text
    assert "acc % at 20.00%" in text and "acc % at 36.00%" in text
    assert "| l1, l2 | 2 | 50.0 | 33.3 | 25.0 |" in text


def test_the_table_of_layer_tickets_takes_differences_seed_by_seed():
    rows = [
        Row("b", "procedural", "resnet32", arm, level, seed, 0.25, acc, 2.0, 1.0)
        for arm, level, accuracies in (
            ("dense", "0", (0.80, 0.70)),
            ("layers kl", "0", (0.82, 0.70)),
            ("layers kl", "half", (0.79, 0.69)),
        )
        for seed, acc in enumerate(accuracies)
    ]
    text = layer_tickets.render(rows)
    # 2 and 0 above dense: 1 ± sqrt 2; both 1 below it: -1 ± 0, though the accuracies lie 10 apart
    assert "| 76.00 ± 8.49 | 1.0 ± 1.4 | 2.00 | 1.00 | 74.00 ± 7.07 | -1.0 ± 0.0 | 2.00 |" in text


def test_the_table_of_transfers_has_the_sparsity_that_each_arm_really_has():
    rows = [
        Row("c", "procedural", "resnet32", arm, level, seed, sparsity, acc, 2.0, 1.0)
        for seed, shift in ((0, 0.0), (1, 0.02))
        for level in ("5", "10")
        for arm, sparsity, acc in (("imp magnitude", 0.8926, 0.80), ("elastic append", 0.9, 0.7 + shift))
    ]
    text = transfers.render(rows)
    assert "| IMP on the target | 89.26 ± 0.00 | 80.00 ± 0.00 |" in text
    assert "| elastic append | 90.00 ± 0.00 | 71.00 ± 1.41 | 2.00 | 1.00 | 90.00 ± 0.00 | 71.00 ± 1.41 |" in text


def test_the_documentation_shows_the_stored_tables():
    stored = (RESULTS / "tickets.md").read_text()
    assert stored == markdown(Store(RESULTS / "tickets.csv"))
    shown = (RESULTS.parent.parent / "docs" / "tickets.md").read_text().splitlines()
    assert [line for line in stored.splitlines() if line.startswith("|") and line not in shown] == []


@pytest.fixture
def lab(tmp_path):
    setup = Setup(train=64, test=32, size=8, width=2, epochs=2, batch_size=32, rounds=2, scored=32)
    return Lab(setup, Store(tmp_path / "rows.csv"), tmp_path / "tickets", say=lambda _: None)


def test_one_arm_of_moving_masks_runs_and_is_not_run_again(lab):
    moving.explore(lab, "SET", 0.9, 0)
    (row,) = lab.store.rows
    assert row.sparsity == pytest.approx(0.9, abs=1e-3)  # one weight of the 4,438 is 2e-4
    assert row.exploration > 0.1 and 0 <= row.accuracy <= 1 and row.train_seconds > 0
    moving.explore(lab, "SET", 0.9, 0)
    assert lab.store.rows == [row]
    assert "SET | 90%" in markdown(lab.store)


def test_one_search_gives_a_row_a_level_and_the_tickets_that_other_tables_start_from(lab):
    importances.prune(lab, "a", "resnet14", "l2", 0)
    assert [row.level for row in lab.store.rows] == ["0", "1", "2"]
    assert [row.sparsity for row in lab.store.rows] == pytest.approx([0, 0.2, 0.36], abs=1e-3)
    found = [row.find_seconds for row in lab.store.rows]
    assert found == sorted(found) and found[1] > lab.store.rows[0].train_seconds
    half, last = (importances.ticket_of(lab, "a", "resnet14", "l2", 0, level) for level in (1, 2))
    assert pst.overlap(last, half)["overlap"] == 1  # later rounds only remove
    early = lab.start("resnet14", 0, 1)
    assert all(bool((last.rewind[name] == tensor).all()) for name, tensor in early.state.items())


def test_a_stored_transfer_searches_nothing_and_a_lost_ticket_is_searched_again(lab):
    transfers.transfer(lab, "resnet14", "resnet20", 1, 0)
    arms = [(row.network, row.arm) for row in lab.store.rows]
    assert arms[:3] == [("resnet14", "imp magnitude")] * 3
    assert [arm for network, arm in arms[3:]] == [arm for arm in transfers.TRANSFERS if "interpolate" not in arm]
    (lost,) = lab.folder.glob("*level1.safetensors")
    lost.unlink()
    transfers.transfer(lab, "resnet14", "resnet20", 1, 0)
    assert not lost.exists()
    assert importances.ticket_of(lab, "c", "resnet14", "magnitude", 0, 1).sparsity == pytest.approx(0.2, abs=1e-3)
