"""Training on with reviews: decided labels are pinned in the E-steps, dropped images are gone, nothing else moves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import flywheel
from conftest import refused as refused_data
from test_train import SHORT, refused, rows
from toy import C, make
from toy import run as run_toy

from benchmarks import review as bench
from flywheel_fast import audit
from flywheel_fast.data import reviews, sources
from flywheel_fast.data.manifest import DROPPED, NOT_REVIEWED
from flywheel_fast.data.memory import Memory
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.reviews import Review
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.em import EMState, Expectation

HEADER = ",".join(reviews.COLUMNS) + "\n"
GIVEN = torch.tensor([0, 1, 2, 0, 1, 2])
REVIEWED = torch.tensor([2, 1, -1, -2, -1, -1])  # the first corrected, the second kept, the fourth dropped


def written(path: Path, *found: Review) -> Path:
    path.write_bytes(HEADER.encode() + b"".join(map(reviews.as_line, found)))
    return path


def stepped(reviewed, kind="mixture", smoothing=0.0):
    """A state after both E-steps on made logits of the samples that are not dropped."""
    state = EMState.start(GIVEN, 3, 0.5)
    state.review(GIVEN, reviewed)
    index = torch.arange(6) if reviewed is None else (reviewed != -2).nonzero()[:, 0]
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 3
    teacher = state.teach(index, logits[index], logits[index], both=True)
    expectation = Expectation(state, kind)
    expectation.add(index, logits[index], teacher, teacher)
    expectation.finish(aligned=True, smoothing=smoothing)
    return state, logits


# -- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixture", "joint"])
def test_a_decided_label_is_certain_in_every_step(kind):
    state, logits = stepped(REVIEWED, kind)
    assert state.clean_prob[:2].tolist() == [1, 1] and state.suggested_prob[:2].tolist() == [1, 1]
    assert state.resampled_label[:2].tolist() == state.suggested_label[:2].tolist() == [2, 1]
    assert state.suspicion[:2].tolist() == [0, 0]
    index = torch.tensor([0, 1])
    onehot = torch.nn.functional.cross_entropy(logits[index] * 0.7, torch.tensor([2, 1]))
    for target in ("soft_q", "argmax_f"):
        loss = state.loss(index, logits[index] * 0.7, target, kind)
        torch.testing.assert_close(loss, onehot, rtol=1e-5, atol=1e-5)


def test_sums_are_those_of_the_given_labels_and_without_the_dropped():
    state, _ = stepped(REVIEWED)
    # a column a given label: 0 has the corrected sample alone, 1 the kept one and another, 2 two of which none is known
    assert state.posterior_sum.sum(dim=0).tolist() == pytest.approx([1, 2, 2])
    assert state.posterior_sum[2, 0].item() == pytest.approx(1) and state.posterior_sum[1, 1] >= 1
    assert state.corruption[2, 0] > state.corruption[2, 1]  # what is truly 2 was seen to be called 0
    free = state.clean_prob[[2, 4, 5]].double().mean().item()
    assert state.gamma.item() == pytest.approx(free)


def test_unsure_and_no_reviews_at_all_change_nothing():
    plain, _ = stepped(None)
    undecided, _ = stepped(torch.full((6,), -1))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, undecided.state_dict()[name]), name


def test_what_is_decided_of_everything_leaves_gamma_where_it_was():
    state, _ = stepped(GIVEN.clone())
    assert state.gamma == 0.5 and state.clean_prob.tolist() == [1] * 6


def test_taking_reviews_back_leaves_the_given_labels():
    state, _ = stepped(REVIEWED)
    state.review(GIVEN, None)
    assert torch.equal(state.labels, GIVEN) and state.reviews is None


def test_reviews_help_the_toy():
    """A tenth reviewed of pair noise at .4: the given labels' gamma is as true as before, and no accuracy is lost."""
    toy = make("pair", 0.4)
    accuracy, _, before = run_toy(toy, epochs=16)
    reviewed = np.full(len(toy.labels), NOT_REVIEWED)
    unsure = np.argsort(before.state.suggested_prob.numpy())[:300]
    reviewed[unsure] = toy.true[unsure]
    corrected = toy.labels.copy()

    def with_reviews(state):
        state.review(torch.from_numpy(corrected), torch.from_numpy(reviewed))

    again, _, after = run_toy(toy, epochs=16, prepare=with_reviews)
    assert again > accuracy - 0.01
    right = after.state.suggested_label.numpy() == toy.true
    assert right[unsure].all() and right.mean() > np.mean(before.state.suggested_label.numpy() == toy.true) + 0.01
    assert after.state.posterior_sum.shape == (C, C)


# -- the loader --------------------------------------------------------------------------------------------------------


def test_a_dropped_image_is_in_no_batch(folder, tmp_path):
    config = sources.DataConfig("folder", str(folder))
    files = sources.load(config).train.files
    path = written(tmp_path / "r.csv", Review(files[0], "drop"), Review(files[5], "drop"), Review(files[6], "unsure"))
    train = sources.load(sources.DataConfig("folder", str(folder), reviews=str(path))).train
    for room in (1e9, 0):
        loader = Loader(train, ViewsConfig(image_size=16, pad=2), 5, seed=0, memory=Memory(room))
        wanted = sorted(set(range(18)) - {0, 5})
        for batches in (loader.epoch(3), loader.sweep()):
            assert sorted(torch.cat([index for index, _ in batches]).tolist()) == wanted
        assert len(loader) == 4
    assert train.digest == sources.load(config).train.digest  # a run may be gone on with


def test_reviews_are_of_the_training_split_and_unknown_ones_are_named(folder, tmp_path):
    source = {"source": "folder", "root": str(folder / "train"), "holdout": 0.3}
    plain = sources.load(sources.DataConfig(**source))
    name = plain.train.classes[1]
    found = [Review(file, "pick", name) for file in (plain.test.files[0], plain.train.files[0])]
    data = sources.load(sources.DataConfig(**source, reviews=str(written(tmp_path / "r.csv", *found))))
    assert data.train.reviewed.tolist() == [1] + [NOT_REVIEWED] * (len(data.train) - 1)
    assert np.array_equal(data.test.labels, plain.test.labels)
    assert np.array_equal(data.train.labels, plain.train.labels)
    everything = written(tmp_path / "all.csv", *(Review(file, "drop") for file in plain.train.files))
    refused_data(sources.DataConfig(**source, reviews=str(everything)), "all.csv", "drops every training image")
    refused_data(sources.DataConfig(**source, reviews=str(tmp_path / "no.csv")), "no.csv", "No such file")


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_with_reviews(tmp_path):
    assert flywheel("train", *SHORT, "--out", "a", cwd=tmp_path).returncode == 0
    run = tmp_path / "a"
    before, first = audit.read_labels(run / "labels"), rows(run)
    assert before.reviewed is None and "reviewed" in first[-1] and first[-1]["reviewed"] == ""
    wrong = np.flatnonzero(before.given != before.true)
    right = np.flatnonzero(before.given == before.true)
    names = before.classes
    found = [
        *(Review(before.files[i], "pick", names[before.true[i]], names[before.given[i]], "", 0.5) for i in wrong[:8]),
        *(Review(before.files[i], "keep", names[before.given[i]], names[before.given[i]], "", 0.5) for i in right[:4]),
        *(Review(before.files[i], "drop") for i in wrong[8:10]),
        *(Review(before.files[i], "unsure") for i in wrong[10:12]),
    ]
    written(run / "reviews.csv", *found)
    with open(run / "reviews.csv", "ab") as file:
        file.write(b"train/0/")  # cut off
    result = flywheel("train", "--resume", "a", "data.reviews=a/reviews.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "reviews have changed since: going on to epoch 4" in result.stdout
    assert "12 labels are pinned, 2 images dropped" in result.stdout
    after, last = audit.read_labels(run / "labels"), rows(run)
    assert [row["reviewed"] for row in last] == ["", "", "", "14"]
    assert [row["loss_aux"] for row in last[:3]] == [row["loss_aux"] for row in first]
    assert last[-1]["true_clean"] == first[-1]["true_clean"]  # the truth is not a matter of reviews
    assert np.array_equal(after.given, before.given) and np.array_equal(after.true, before.true)
    assert (
        np.array_equal(after.suggested[wrong[:8]], before.true[wrong[:8]]) and (after.clean_prob[wrong[:8]] == 0).all()
    )
    assert (after.clean_prob[right[:4]] == 1).all() and not after.is_issue[wrong[:10]].any()
    assert after.reviewed[wrong[8:12]].tolist() == [DROPPED, DROPPED, NOT_REVIEWED, NOT_REVIEWED]
    with open(run / "labels/issues.csv", newline="") as file:
        reviewed = {row["file_name"]: row["review"] for row in csv.DictReader(file)}
    assert sorted(filter(None, reviewed.values())) == ["corrected"] * 8 + ["dropped"] * 2 + ["kept"] * 4
    said = json.loads((run / "result.json").read_text())["reviews"]
    assert said["decisions"] == {"pick": 8, "keep": 4, "drop": 2, "unsure": 2}
    assert said["given_right"] == pytest.approx(1 / 3) and said["given_right_expected"] == 0.5

    same = flywheel("train", "--resume", "a", cwd=tmp_path)  # nothing new: nothing is trained
    assert same.returncode == 0 and len(rows(run)) == 4
    again = flywheel("train", "--resume", "a", "data.reviews=null", "optim.epochs=6", cwd=tmp_path)
    assert again.returncode == 0 and len(rows(run)) == 6 and rows(run)[-1]["reviewed"] == ""
    assert audit.read_labels(run / "labels").reviewed is None

    written(run / "reviews.csv", Review("nowhere.png", "drop"))
    refused(flywheel("train", "--resume", "a", "data.reviews=a/reviews.csv", cwd=tmp_path), 2, "row 2", "nowhere.png")


def test_a_fresh_run_and_plain_cross_entropy_learn_what_the_reviews_say(tmp_path):
    data = sources.DataConfig("digits", train_size=200, test_size=100)
    train = sources.load(data).train
    following = (train.labels + 1) % 10
    found = [Review(file, "pick", train.classes[k]) for file, k in zip(train.files, following, strict=True)]
    written(tmp_path / "r.csv", *found[:199], Review(train.files[199], "drop"))
    words = ["train", *SHORT, "data.reviews=r.csv", "data.noise.kind=none"]
    assert flywheel(*words, "--out", "cycle", cwd=tmp_path).returncode == 0
    assert rows(tmp_path / "cycle")[-1]["reviewed"] == "200"
    assert np.array_equal(audit.read_labels(tmp_path / "cycle/labels").suggested[:199], following[:199])
    result = flywheel(
        *words, "cycle.kind=cross_entropy", "optim.epochs=20", "optim.ema_decay=0", "--out", "plain", cwd=tmp_path
    )
    assert result.returncode == 0 and float(rows(tmp_path / "plain")[-1]["test_acc_main"]) < 0.05


def test_the_benchmark_of_reviewing_in_small(tmp_path):
    words = ["optim.epochs=2", "cycle.warmup=1", "data.train_size=100", "data.test_size=50"]
    made = bench.measure("pair .25", 0, words, (0.0, 0.1), tmp_path)
    assert [(row["order"], row["reviewed"]) for row in made] == [
        (name, count) for name in bench.ORDERS for count in (0, 10)
    ]
    for name in bench.ORDERS:
        folder = tmp_path / f"{name}-0.1"
        after = audit.read_labels(folder / "labels")
        decided = after.reviewed != NOT_REVIEWED
        assert decided.sum() == 10 and np.array_equal(after.reviewed[decided], after.true[decided])
        assert len(rows(folder)) == 3  # two epochs, and a quarter of them, which is one
    written_rows = bench.table(made).splitlines()
    assert len(written_rows) == 2 + 1 + 3 and "| pair .25 | 10% | random |" in written_rows[-1]
