"""The card of a run: whatever is known of it, and nothing that is not."""

import pytest
from made_labels import NASTY, drawn, labels

from flywheel_fast import card, config
from flywheel_fast.trainer import Config

RECORD = {"images": 60, "epochs": 2, "seconds": 3.0, "noise_sha256": "abc"}


def text(words=(), record=None, found=None, classes=("cat", "dog"), ailments=()):
    return card.text(
        config.load(Config, "digits", list(words)), classes, RECORD | (record or {}), found, list(ailments)
    )


def test_plain_cross_entropy_on_labels_as_they_are_measures_nothing():
    said = text(["cycle.kind=cross_entropy", "data.noise.kind=none", "data.noise.rate=0"])
    assert "plain cross-entropy" in said and "Nothing was measured" in said and "It was not tested" in said
    assert "noise that was added" not in said and "AUROC" not in said and "Do not use" not in said


def test_noise_accuracy_and_labels_are_said(tmp_path):
    found = drawn(900, 3, tmp_path)
    record = {"test_acc_aux": 0.75, "best_test_acc_aux": 0.8, "test_acc_main": 0.1, "true_clean": 0.7}
    said = text(record=record, found=found, classes=found.classes)
    assert "| noise that was added | symmetric at rate 0.4, drawn by seed 0 |" in said
    assert "| test accuracy, last epoch | 0.7500 |" in said and "| best epoch, not chosen by it | 0.8000 |" in said
    assert "| wrong in truth | 30.0% |" in said and "without the noise that was added" in said
    for row in ("labels to look at", "of them wrong, in truth", "calibration error of label_score", "AUROC"):
        assert row in said
    unknown = text(found=drawn(900, 3, tmp_path, known=False), classes=found.classes)
    assert "in truth" not in unknown and "calibration error" not in unknown


@pytest.mark.parametrize("name", [*NASTY, "<script>", "a`b", "x|y", "bell\x07"])
def test_no_name_breaks_the_page(name):
    said = text(found=labels([0, 1], [0, 1], [0.9, 0.9], classes=(name, "other")), classes=(name, "other"))
    (line,) = [line for line in said.splitlines() if "Classes: " in line]
    assert line.count("`") == 4 and line.endswith("`other`.") and "<script" not in said and "\x07" not in said


def test_a_collapse_comes_first():
    assert "**Do not use it: two classes have merged.**" in text(ailments=["two classes have merged."])
