"""What a run says of its labels: which are suspect, tables that survive any class name, figures that are right."""

import csv
import dataclasses
import math

import numpy as np
import pyarrow.parquet
import pytest
from made_labels import NASTY, drawn, labels

from flywheel_fast import audit
from flywheel_fast.errors import BadInput


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- which labels ------------------------------------------------------------------------------------------------------


def test_an_issue_is_doubted_and_called_something_else():
    found = labels([0, 0, 0, 1], [1, 0, 1, 1], [0.05, 0.05, 0.5, 0.9])
    assert found.is_issue.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("clean_prob", "suspects"),
    [
        ([0.0, 0.125, 0.125, 0.25], 3),  # means 0, 1/16, 1/12, 1/8
        ([0.0, 0.0, 0.0, 0.0, 0.3, 0.49], 5),
        ([0.0] * 9 + [0.51], 9),  # more likely right than wrong: never, whatever the mean leaves room for
        ([0.2, 0.3], 0),
    ],
)
def test_suspects_are_as_many_as_a_tenth_of_false_alarms_allows(clean_prob, suspects):
    n = len(clean_prob)
    found = labels([0] * n, [1] * n, clean_prob)
    assert np.flatnonzero(found.is_issue).tolist() == list(range(suspects))


def test_the_share_of_false_alarms_is_kept_where_scores_are_calibrated():
    rng = np.random.default_rng(0)
    clean_prob = rng.beta(0.4, 0.6, 200_000)
    right = rng.random(len(clean_prob)) < clean_prob
    n = len(clean_prob)
    found = labels([0] * n, [1] * n, clean_prob)
    assert right[found.suspects].mean() == pytest.approx(audit.FALSE_ALARMS, abs=0.005)
    assert 0.3 * n < len(found.suspects) < 0.6 * n


def test_calibration_of_scores_that_are_calibrated_and_of_some_that_are_not():
    score, right = np.float32([0.05, 0.05, 0.95, 1.0]), np.array([True, False, True, True])
    found = audit.calibration(score, right)
    np.testing.assert_allclose(found.score, [0.05, 0.975], rtol=1e-6)
    np.testing.assert_array_equal(found.right, [0.5, 1])
    np.testing.assert_array_equal(found.count, [2, 2])
    assert found.error == pytest.approx((0.45 + 0.025) / 2)
    rng = np.random.default_rng(0)
    score = rng.random(100_000)
    assert audit.calibration(score, rng.random(100_000) < score).error < 0.01
    assert audit.calibration(score, rng.random(100_000) < score / 2).error == pytest.approx(0.25, abs=0.01)


def test_an_interval_holds_the_share_as_often_as_it_says():
    """Against scipy's, and against draws."""
    from scipy.stats import binomtest

    for count, of in ((0, 15), (2, 3), (8, 40), (7, 7), (190, 1000)):
        wanted = binomtest(count, of).proportion_ci(0.95, method="wilson")
        assert audit.share_between(count, of) == pytest.approx((wanted.low, wanted.high), abs=1e-4)
    counts = np.random.default_rng(0).binomial(60, 0.19, 2000)
    held = [low <= 0.19 <= high for low, high in (audit.share_between(int(count), 60) for count in counts)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_suspects_come_first_and_each_group_from_the_worst_up():
    found = labels([0] * 6, [1, 0, 1, 1, 0, 1], [0.15, 0.01, 0.05, 0.9, 0.95, 0.05])
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
    found = audit.summary(labels([0, 0, 0, 2, 2], [1, 1, 0, 1, 2], [0, 0.125, 1, 0.125, 1], true=[1, 0, 0, 1, 2]))
    assert found.estimated_wrong == pytest.approx(0.55)
    assert found.true_wrong == pytest.approx(0.4)
    assert (found.suspects, found.precision) == (3, pytest.approx(2 / 3))
    assert found.false_alarms == pytest.approx(0.25 / 3)
    assert found.pairs == [("a,b", 'say "hi"', 2), ("=SUM(A1)", 'say "hi"', 1)]


def test_summary_without_truth_or_suspects(tmp_path):
    found = labels([0, 1], [0, 1], [0.9, 0.7])
    assert audit.summary(found) == audit.Summary(pytest.approx(0.2), None, 0, None, None, [])
    assert audit.summary_rows(found, tmp_path)[1:] == [("labels to look at", "none")]


def test_summary_rows_say_how_many_and_where(tmp_path):
    rows = dict(audit.summary_rows(labels([0, 5], [1, 5], [0.0625, 0.9375], true=[1, 5]), tmp_path))
    assert rows["labels estimated wrong"] == "50.0% of 2 (truly 50.0%)"
    assert rows["labels to look at"].startswith("1 (93.8% of them wrong by estimate, truly 100.0%)")
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
        *("entropy", "networks_agree", "times_suspected"),
    ]
    for row, i in zip(rows, found.order, strict=True):
        assert row["file_name"] == found.files[i]
        assert row["given_label"] == NASTY[found.given[i]]
        assert row["suggested_label"] == NASTY[found.suggested[i]]
        assert row["is_label_issue"] == ("true" if found.is_issue[i] else "false")
        assert np.float32(row["label_score"]) == found.clean_prob[i]
        assert np.float32(row["suggested_prob"]) == found.suggested_prob[i]

        assert np.float32(row["entropy"]) == found.entropy[i]
        assert row["networks_agree"] == ("true" if found.networks_agree[i] else "false")
        assert int(row["times_suspected"]) == found.times_suspected[i]

    samples = pyarrow.parquet.read_table(tmp_path / "labels" / "samples.parquet").to_pydict()
    assert list(samples) == list(rows[0])
    assert samples["file_name"] == found.files.tolist()
    assert samples["given_label"] == [NASTY[k] for k in found.given]


@pytest.mark.parametrize("known", [True, False])
def test_what_was_written_is_read_again(tmp_path, known):
    found = dataclasses.replace(drawn(600, 3, tmp_path, known), classes=NASTY[3:])
    audit.write_labels(found, tmp_path)
    again = audit.read_labels(tmp_path)
    for field in dataclasses.fields(found):
        ours, read = getattr(found, field.name), getattr(again, field.name)
        if field.name == "posterior_sum":
            np.testing.assert_allclose(again.corruption, found.corruption, atol=1e-6)
        elif isinstance(ours, np.ndarray):
            assert ours.dtype == read.dtype and ours.tolist() == read.tolist(), field.name
        else:
            assert ours == read, field.name


def test_a_dead_class_stays_dead_when_read_again(tmp_path):
    found = labels([0], [0], [1], classes=NASTY[:3], posterior_sum=[[6, 2, 0], [1, 1, 2], [0, 0, 0]])
    audit.write_labels(found, tmp_path)
    np.testing.assert_array_equal(audit.read_labels(tmp_path).corruption, found.corruption)


@pytest.mark.parametrize("broken", ["samples.parquet", "corruption.csv"])
def test_labels_that_are_none_are_refused(tmp_path, broken):
    audit.write_labels(drawn(60, 3, tmp_path), tmp_path)
    (tmp_path / broken).write_text("x,y\nfew,words\n")
    with pytest.raises(BadInput, match="does not hold the labels of a run"):
        audit.read_labels(tmp_path)
    (tmp_path / broken).unlink()
    with pytest.raises(BadInput, match="No such file"):
        audit.read_labels(tmp_path)


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


def test_one_sample_of_two_classes(tmp_path):
    found = labels([0], [1], [0.25], classes="ab")
    audit.write_labels(found, tmp_path)
    assert [row["label_score"] for row in read_csv(tmp_path / "issues.csv")] == ["0.25"]


def test_long_names_keep_start_and_end():
    assert audit.short("one\ntwo", 7) == "one two"
    assert audit.short("abcdefghij", 6) == "abc…ij"
    assert audit.short("abcdefghij", 7) == "abc…hij"
