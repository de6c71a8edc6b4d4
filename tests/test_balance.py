"""Class-balanced epochs of a stated number of batches: their order, and a training with them."""

import csv

import numpy as np
import torch

from flywheel_fast import cli
from flywheel_fast.data.order import balanced_order


def test_balanced_epochs_have_equal_classes_and_go_round_all_samples():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], (1000, 50, 7)))  # class 2 has none
    epochs = [balanced_order(labels, 300, 5, epoch) for epoch in range(10)]
    for order in epochs:
        assert np.bincount(labels[order], minlength=4).tolist() == [100, 100, 0, 100]
    drawn = np.bincount(np.concatenate(epochs), minlength=len(labels))
    for label, count in ((0, 1000), (1, 50), (3, 7)):
        times = drawn[labels == label]
        assert times.max() - times.min() <= 1 and times.sum() == 1000 and len(times) == count
    assert np.array_equal(balanced_order(labels, 300, 5, 3), epochs[3])
    assert not np.array_equal(balanced_order(labels, 300, 6, 3), epochs[3])
    assert np.bincount(labels[balanced_order(labels, 301, 5, 0)]).tolist() == [101, 100, 0, 100]


def test_a_training_takes_as_many_steps_as_it_has_balanced_batches(miniatures, tmp_path):
    words = ["clothing1m", f"data.root={miniatures / 'clothing1m'}", "model.main={name: small_cnn, weights: null}"]
    words += ["views.image_size=32", "optim.epochs=3", "optim.batch_size=10", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words, "optim.balanced_batches=5"]) == 0
    saved = torch.load(tmp_path / "run/weights/last.pt", weights_only=True)["cycle"]
    assert saved["main"]["steps"] == saved["aux"]["steps"] == 2 * 3 * 5  # two steps a batch
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates[0] > rates[1] > rates[2] and rates[2] < 0.002 * 0.05  # the cosine ends with the last batch
    with open(tmp_path / "run/labels/issues.csv", newline="") as file:
        scores = [row["label_score"] for row in csv.DictReader(file)]
    assert len(scores) == 112 and len(set(scores)) > 100  # E-steps have looked at every sample


def test_no_balanced_batches_is_refused(capsys):
    assert cli.main(["config", "show", "digits", "optim.balanced_batches=0"]) == 2
    assert "optim.balanced_batches must be at least 1, or null, not 0" in capsys.readouterr().err
