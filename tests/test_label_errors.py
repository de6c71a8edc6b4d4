"""The benchmark against cleanlab: an instrument that must be fair before it is fast."""

import csv

import numpy as np
import pytest
import yaml

from benchmarks import label_errors
from benchmarks.accuracy import passes
from flywheel_fast.data import sources
from flywheel_fast.errors import BadInput

WORDS = ["data.noise.kind=symmetric", "data.noise.rate=0.4", "data.train_size=200", "data.test_size=50"]


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    words = [*WORDS, "optim.epochs=2", "cycle.warmup=1"]
    tasks = {"digits": {"config": "digits", "words": words}}
    path.write_text(yaml.safe_dump({"defaults": ["eval_every=1000"], "seeds": [0], "tasks": tasks}))
    return path


def test_a_row_for_each_ranking_and_each_once(plan, tmp_path, capsys, monkeypatch):
    pytest.importorskip("cleanlab")
    words = [str(plan), "--threads", "1", "--out", str(tmp_path / "runs"), "--csv", str(tmp_path / "rows.csv")]
    assert label_errors.main(words) == 0
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(label_errors.METHODS)
    assert {row["images"] for row in rows} == {"200"} and len({row["labels_sha256"] for row in rows}) == 1
    assert abs(int(rows[0]["passes"]) - int(rows[1]["passes"])) <= 6  # half an epoch of the folds, twelve passes
    table = (tmp_path / "rows.md").read_text()
    assert all(f"| digits | 200 | {float(row['true_wrong']):.1%} | {row['method']} |" in table for row in rows)
    best = max(float(row["average_precision"]) for row in rows[1:])
    assert f"digits {float(rows[0]['average_precision']) - best:+.3f}." in table

    monkeypatch.setattr(label_errors, "rows_of", lambda *_: pytest.fail("is done already"))
    assert label_errors.main(words) == 0
    monkeypatch.setattr(label_errors, "rows_of", lambda task, *_: iter([]))
    assert label_errors.main([*words, "optim.lr=0.1"]) == 0  # another config is another run
    assert "by_flywheel" in capsys.readouterr().out


def test_probabilities_are_out_of_sample(plan, monkeypatch, tmp_path):
    (task,) = label_errors.read_plan(
        plan, ["data.noise.rate=0", "optim.epochs=4", "optim.batch_size=16", "optim.ema_decay=0"], 1, tmp_path
    )
    train_set, read = sources.load(task.config.data).train, []

    class Recording(label_errors.Loader):
        def __init__(self, manifest, *args):
            read.append(set(manifest.files))
            super().__init__(manifest, *args)

    monkeypatch.setattr(label_errors, "Loader", Recording)
    probabilities = label_errors.out_of_sample(task.config, train_set)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.mean(probabilities.argmax(axis=1) == train_set.labels) > 0.2
    learnt, looked_at = read[::2], read[1::2]
    assert len(learnt) == 5 and all(
        part | other == set(train_set.files) for part, other in zip(learnt, looked_at, strict=True)
    )
    assert not any(part & other for part, other in zip(learnt, looked_at, strict=True))


@pytest.mark.parametrize("epochs", [6, 20, 36, 60])
def test_as_many_passes_as_the_cycle(plan, epochs, tmp_path):
    (task,) = label_errors.read_plan(plan, [f"optim.epochs={epochs}", "cycle.warmup=2"], 1, tmp_path)
    ours, folds = passes(task.config.cycle, epochs), label_errors.epochs_of_folds(task.config)
    assert abs(12 * folds + 1 - ours) <= 6


def test_what_a_ranking_is_worth(plan, tmp_path):
    (task,) = label_errors.read_plan(plan, [], 1, tmp_path)
    train_set = sources.load(task.config.data).train
    right = (train_set.labels == train_set.true_labels).astype(float)
    found = label_errors.measured(label_errors.Ranking(right, right == 0), train_set)
    count = int((right == 0).sum())
    assert found == {
        "auroc": 1,
        "average_precision": 1,
        "precision_at_100": min(count, 100) / 100,
        "flagged": count,
        "flagged_precision": 1,
    }
    assert label_errors.measured(label_errors.Ranking(-right, right > 2), train_set)["auroc"] == 0


def test_a_plan_that_is_none_is_named(tmp_path):
    (tmp_path / "plan.yaml").write_text("tasks: [digits]")
    with pytest.raises(BadInput, match="plan.yaml: is no plan"):
        label_errors.read_plan(tmp_path / "plan.yaml", [], 1, tmp_path)
    assert label_errors.main([str(tmp_path / "nowhere.yaml")]) == 2
