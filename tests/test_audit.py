"""What a run says of its labels: tables that survive any class name, plots that open, figures that are right."""

import csv
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from flywheel_fast import audit
from flywheel_fast.errors import BadInput

NASTY = ("a,b", 'say "hi"', "=SUM(A1)", "猫 ünï", "$\\frac", "two\nlines")


def labels(given, suggested, clean_prob, true=None, classes=NASTY, root=".", posterior_sum=None):
    n, c = len(given), len(classes)
    return audit.Labels(
        root=Path(root),
        files=np.array([f"train/{i}, “{i}”.png" for i in range(n)]),
        classes=tuple(classes),
        given=np.array(given, np.int64),
        true=None if true is None else np.array(true, np.int64),
        clean_prob=np.array(clean_prob, np.float32),
        suggested=np.array(suggested, np.int64),
        suggested_prob=np.linspace(0.5, 1, n, dtype=np.float32),
        posterior_sum=np.eye(c) + 0.25 if posterior_sum is None else np.array(posterior_sum, np.float64),
    )


def drawn(n, c, root, known=True, seed=0):
    """Labels of which a third are wrong and most of those suspected."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, c, n)
    given = np.where(rng.random(n) < 1 / 3, (true + 1) % c, true)
    clean_prob = 1 / (1 + np.exp(np.where(given == true, -4, 4) + 2 * rng.standard_normal(n)))
    return labels(given, true, clean_prob, true if known else None, [f"class {k}" for k in range(c)], root)


@pytest.fixture(scope="module")
def metrics_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "metrics.csv"
    path.write_text(
        "cycle,test_acc_main,test_acc_aux,gamma,true_clean,selection_auroc,refurbish_acc,classes_alive\n"
        "1,0.5,,,0.7,,,\n2,,,0.6,0.7,0.8,0.7,10\n3,0.8,0.801,0.65,0.7,0.9,0.8,10\n"
    )
    return path


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- which labels ------------------------------------------------------------------------------------------------------


def test_an_issue_is_doubted_and_called_something_else():
    found = labels([0, 0, 0, 1], [1, 0, 1, 1], [0.4, 0.4, 0.5, 0.9])
    assert found.is_issue.tolist() == [True, False, False, False]


def test_suspects_come_first_and_each_group_from_the_worst_up():
    found = labels([0] * 6, [1, 0, 1, 1, 0, 1], [0.4, 0.01, 0.1, 0.9, 0.95, 0.1])
    assert found.order.tolist() == [2, 5, 0, 1, 3, 4]
    assert found.suspects.tolist() == [2, 5, 0]


def test_selection_quality():
    given, true = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
    assert audit.selection_quality(np.float32([0.9, 0.2, 0.8, 0.1]), given, true) == (1, 1)
    assert audit.selection_quality(np.float32([0.9, 0.2, 0.5, 0.6]), given, true)[0] == 0.75
    assert audit.selection_quality(np.float32([1e-9, 1e-20, 1e-9, 1e-20]), given, true) == (1, 1)


@pytest.mark.parametrize("true", [[0, 1], [1, 0]])
def test_selection_quality_of_one_kind_is_unknown(true):
    assert all(map(math.isnan, audit.selection_quality(np.float32([0.1, 0.9]), np.array([0, 1]), np.array(true))))


# -- figures -----------------------------------------------------------------------------------------------------------


def test_summary():
    found = audit.summary(labels([0, 0, 0, 2, 2], [1, 1, 0, 1, 2], [0, 0.25, 1, 0.25, 1], true=[1, 0, 0, 1, 2]))
    assert found.estimated_wrong == pytest.approx(0.5)
    assert found.true_wrong == pytest.approx(0.4)
    assert (found.suspects, found.precision) == (3, pytest.approx(2 / 3))
    assert found.pairs == [("a,b", 'say "hi"', 2), ("=SUM(A1)", 'say "hi"', 1)]


def test_summary_without_truth_or_suspects(tmp_path):
    found = labels([0, 1], [0, 1], [0.9, 0.7])
    assert audit.summary(found) == audit.Summary(pytest.approx(0.2), None, 0, None, [])
    assert audit.summary_rows(found, tmp_path)[1:] == [("labels to look at", "none")]


def test_summary_rows_say_how_many_and_where(tmp_path):
    rows = dict(audit.summary_rows(labels([0, 5], [1, 5], [0.1, 0.9], true=[1, 5]), tmp_path))
    assert rows["labels estimated wrong"] == "50.0% of 2 (truly 50.0%)"
    assert rows["labels to look at"].startswith("1 (100.0% of them truly wrong)")
    assert str(tmp_path / "labels" / "issues.csv") in rows["labels to look at"]
    assert rows["  most often"] == 'a,b -> say "hi" (1)'


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_give_back_what_was_written(tmp_path):
    c = len(NASTY)
    found = labels([*range(c), 0], [*range(1, c), 0, 0], np.linspace(0, 1, c + 1))
    audit.write_labels(found, tmp_path / "labels")
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == [
        "corruption.csv",
        "issues.csv",
        "samples.parquet",
    ]

    rows = read_csv(tmp_path / "labels" / "issues.csv")
    assert list(rows[0]) == [
        *("file_name", "given_label", "suggested_label", "is_label_issue", "label_score", "suggested_prob"),
    ]
    for row, i in zip(rows, found.order, strict=True):
        assert row["file_name"] == found.files[i]
        assert row["given_label"] == NASTY[found.given[i]]
        assert row["suggested_label"] == NASTY[found.suggested[i]]
        assert row["is_label_issue"] == ("true" if found.is_issue[i] else "false")
        assert np.float32(row["label_score"]) == found.clean_prob[i]
        assert np.float32(row["suggested_prob"]) == found.suggested_prob[i]

    samples = pyarrow.parquet.read_table(tmp_path / "labels" / "samples.parquet").to_pydict()
    assert list(samples) == ["file_name", "given_label", "clean_prob", "suggested_label", "suggested_prob"]
    assert samples["file_name"] == found.files.tolist()
    assert samples["given_label"] == [NASTY[k] for k in found.given]
    assert samples["suggested_label"] == [NASTY[k] for k in found.suggested]
    assert samples["clean_prob"] == found.clean_prob.tolist()
    assert samples["suggested_prob"] == found.suggested_prob.tolist()


def test_corruption_has_the_true_class_in_rows_and_a_dead_class_empty(tmp_path):
    found = labels([0], [0], [1], classes=NASTY[:3], posterior_sum=[[6, 2, 0], [1, 1, 2], [0, 0, 0]])
    audit.write_labels(found, tmp_path)
    rows = read_csv(tmp_path / "corruption.csv")
    assert [row.pop("true_class") for row in rows] == list(NASTY[:3])
    assert [list(row) for row in rows] == [list(NASTY[:3])] * 3
    shares = [[float(cell) if cell else None for cell in row.values()] for row in rows]
    assert shares == [[0.75, 0.25, 0], [0.25, 0.25, 0.5], [None] * 3]


def test_true_corruption_is_counted():
    found = labels([0, 1, 1, 1], [0, 0, 0, 0], [1] * 4, true=[0, 0, 0, 1], classes="abc")
    np.testing.assert_array_equal(found.true_corruption, [[1 / 3, 2 / 3, 0], [0, 1, 0], [np.nan] * 3])


def test_one_sample_of_two_classes(tmp_path, metrics_csv):
    found = labels([0], [1], [0.25], classes="ab")
    audit.write_labels(found, tmp_path)
    assert [row["label_score"] for row in read_csv(tmp_path / "issues.csv")] == ["0.25"]
    audit.write_plots(found, metrics_csv, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 4


# -- plots -------------------------------------------------------------------------------------------------------------


def sizes(folder):
    result = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            result[path.name] = image.size
    return result


@pytest.mark.parametrize(
    ("c", "n", "known", "corruption", "suspects"),
    [
        (10, 600, True, (1860, 990), (1575, 2145)),
        (100, 600, False, (1425, 1365), (1575, 2145)),
        (2, 10, True, (1110, 615), (1575, 420)),
    ],
)
def test_plots_open_at_their_size(tmp_path, metrics_csv, c, n, known, corruption, suspects):
    audit.write_plots(drawn(n, c, tmp_path / "images", known), metrics_csv, tmp_path / "plots")
    found = sizes(tmp_path / "plots")
    assert sorted(found) == ["clean_prob.png", "corruption.png", "curves.png", "suspects.png"]
    assert found["curves.png"] == (1800, 480)
    assert found["clean_prob.png"] == (1050, 540)
    assert found["corruption.png"] == corruption
    assert found["suspects.png"] == suspects


def test_plots_with_nasty_names_and_no_suspects(tmp_path, metrics_csv, recwarn):
    audit.write_plots(labels(range(6), range(6), [0.9] * 6), metrics_csv, tmp_path)
    assert sizes(tmp_path)["suspects.png"] == (1050, 180)
    assert not recwarn.list


def test_a_run_without_cycles_has_curves_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("cycle,test_acc_main,test_acc_aux,gamma,true_clean\n1,0.5,,,0.7\n")
    audit.write_plots(None, tmp_path / "metrics.csv", tmp_path / "plots")
    assert sizes(tmp_path / "plots") == {"curves.png": (600, 480)}


def test_a_run_that_measured_nothing_says_so(tmp_path):
    (tmp_path / "metrics.csv").write_text("cycle,test_acc_main,true_clean\n1,,0.7\n")
    audit.write_plots(None, tmp_path / "metrics.csv", tmp_path / "plots")
    assert sizes(tmp_path / "plots") == {"curves.png": (1050, 180)}


def test_curves_end_in_their_names_and_last_values(metrics_csv):
    accuracy, gamma, auroc = audit._curves(audit._read_metrics(metrics_csv)).axes
    assert [text.get_text() for text in accuracy.texts] == ["main 80.0%", "auxiliary 80.1%"]
    assert accuracy.texts[1].get_position()[1] - accuracy.texts[0].get_position()[1] == pytest.approx(0.08)
    assert [line.get_xdata().tolist() for line in accuracy.lines] == [[3], [1, 3]]
    assert [text.get_text() for text in gamma.texts] == ["estimated 65.0%", "true 70.0%"]
    assert gamma.lines[1].is_dashed()
    assert [text.get_text() for text in auroc.texts] == ["AUROC 0.900"]


@pytest.mark.parametrize("content", ["epoch,gamma\n1,0.5\n", "cycle,gamma\n1,much\n", None])
def test_something_else_in_place_of_the_metrics(tmp_path, content):
    if content:
        (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(BadInput, match=r"metrics\.csv: is not a run's metrics\.csv"):
        audit.write_plots(None, tmp_path / "metrics.csv", tmp_path)


# -- pictures ----------------------------------------------------------------------------------------------------------

MIDDLE = audit.TILE // 2
PICTURES = {
    "grey.png": Image.new("L", (8, 8), 128),
    "grey16.png": Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)),
    "palette.png": Image.new("RGB", (300, 200), (128, 128, 128)).convert("P"),
    "see_through.png": Image.new("RGBA", (8, 8), (128, 128, 128, 255)),
    "photo.jpg": Image.new("RGB", (2000, 1500), (128, 128, 128)),
    "print.jpg": Image.new("CMYK", (64, 64), (0, 0, 0, 127)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_any_kind_of_picture_fills_its_tile(tmp_path, name):
    PICTURES[name].save(tmp_path / name)
    tile = audit._thumbnail(tmp_path / name)
    assert (tile.mode, tile.size) == ("RGB", (audit.TILE, audit.TILE))
    assert tile.getpixel((0, MIDDLE)) == tile.getpixel((MIDDLE, MIDDLE)) == pytest.approx((128, 128, 128), abs=2)


def test_a_tall_picture_keeps_its_shape(tmp_path):
    Image.new("RGB", (50, 100)).save(tmp_path / "tall.png")
    tile = audit._thumbnail(tmp_path / "tall.png")
    assert tile.getpixel((MIDDLE, 0)) == (0, 0, 0)
    assert tile.getpixel((audit.TILE // 4 - 2, MIDDLE)) != (0, 0, 0) == tile.getpixel((audit.TILE // 4 + 2, MIDDLE))


def test_a_missing_or_broken_file_is_an_empty_tile_with_its_name(tmp_path):
    found = labels([0, 1], [1, 0], [0.1, 0.2], root=tmp_path)
    (tmp_path / "train").mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / found.files[1])
    whole = (tmp_path / found.files[1]).read_bytes()
    (tmp_path / found.files[1]).write_bytes(whole[: len(whole) // 2])
    first, second = audit._sheet(found).axes[:2]
    assert [text.get_text() for text in first.texts] == [
        *("cannot be read:\ntrain/0, “0”.png", 'a,b\n→ say "hi"', "score 0.100"),
    ]
    assert second.texts[0].get_text() == "cannot be read:\ntrain/1, “1”.png"


def test_the_sheet_shows_the_worst_36(tmp_path):
    found = drawn(600, 3, tmp_path)
    shown = [axes for axes in audit._sheet(found).axes if axes.images]
    assert len(shown) == 36
    scores = [f"score {found.clean_prob[i]:.3f}" for i in found.suspects[:36]]
    assert [axes.texts[-1].get_text() for axes in shown] == scores


def test_long_names_keep_start_and_end():
    assert audit._short("one\ntwo", 7) == "one two"
    assert audit._short("abcdefghij", 6) == "abc…ij"
    assert audit._short("abcdefghij", 7) == "abc…hij"
