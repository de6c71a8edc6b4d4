"""The accuracy instrument: its plans, its queue end to end on a few digits, and its arithmetic."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
import yaml

from benchmarks import accuracy, accuracy_table
from flywheel_fast.cycle import CycleConfig
from flywheel_fast.data import noise
from flywheel_fast.learner import Learner

ROOT = Path(accuracy.__file__).parent.parent
PLANS = ROOT / "benchmarks/plans"
PLAN_OF_LABELS = PLANS / "label_errors.yaml"  # of another instrument


def call(plan, folder, *words):
    return accuracy.main([str(plan), "--out", str(folder / "out"), "--csv", str(folder / "rows.csv"), *words])


def rows_in(folder):
    with open(folder / "rows.csv", newline="") as file:
        return {f"{row['task']}/{row['noise']}/{row['method']}/{row['seed']}": row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke plan, run once, and what it said."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "benchmarks.accuracy", PLANS / "smoke.yaml", "--jobs", "2"]
    command += ["--out", folder / "out", "--csv", folder / "rows.csv"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    return folder, result.stdout


def test_each_run_has_its_row(smoke):
    folder, said = smoke
    rows = rows_in(folder)
    assert sorted(rows) == ["digits/none/cross_entropy/0", "digits/sym40/cross_entropy/0", "digits/sym40/flywheel/0"]
    for name, row in rows.items():
        assert name in said
        run = folder / "out" / name
        with open(run / "metrics.csv", newline="") as file:
            epochs = list(csv.DictReader(file))
        used = "aux" if row["method"] == "flywheel" else "main"
        assert float(row[f"test_acc_{used}"]) == float(epochs[-1][f"test_acc_{used}"])
        assert float(row[f"best_test_acc_{used}"]) == max(float(epoch[f"test_acc_{used}"]) for epoch in epochs)
        assert row["noise_sha256"] == noise.digest(np.load(run / "noise.npz")["label"])
        assert row["images"] == "200" and row["epochs"] == "2" and row["jobs"] == "2"
        assert row["commit"] and "torch" in row["versions"] and float(row["seconds"]) > 0
        assert str(folder) not in row["command"]
    clean, noisy, flywheel = (rows[name] for name in sorted(rows))
    assert float(clean["true_clean"]) == 1 and 0.5 < float(noisy["true_clean"]) < 0.75
    assert noisy["noise_sha256"] == flywheel["noise_sha256"] != clean["noise_sha256"]
    assert noisy["test_acc_aux"] == noisy["gamma"] == noisy["selection_auroc"] == ""
    measured = json.loads((folder / "out/digits/sym40/flywheel/0/result.json").read_text())
    for name in ("gamma", "selection_auroc", "selection_ap", "refurbish_acc", "posterior_acc"):
        assert float(flywheel[name]) == measured[name]
    assert int(flywheel["merged"]) == len(measured["merged"])
    text = (folder / "smoke.md").read_text()
    assert f"| digits | small_cnn, 200 | sym40 | {float(clean['test_acc_main']):.4f} (1) |" in text


def test_a_second_call_trains_nothing(smoke, capsys):
    folder, _ = smoke
    before = (folder / "rows.csv").read_bytes()
    (folder / "smoke.md").unlink()
    assert call(PLANS / "smoke.yaml", folder, "--jobs", "1") == 0  # threads do not matter
    assert "3 runs, 3 of them done" in capsys.readouterr().out
    assert (folder / "rows.csv").read_bytes() == before and (folder / "smoke.md").exists()


def test_the_printed_command_gives_the_same_numbers(smoke, capsys, tmp_path):
    folder, _ = smoke
    name = "digits/sym40/flywheel/0"
    assert call(PLANS / "smoke.yaml", folder, "--print", name) == 0
    command = capsys.readouterr().out.strip()
    assert command == rows_in(folder)[name]["command"]
    command = command.replace("flywheel-fast", f"{sys.executable} -m flywheel_fast") + f" --out {tmp_path / 'again'}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    of_both = [json.loads((run / "result.json").read_text()) for run in (tmp_path / "again", folder / "out" / name)]
    for record in of_both:
        del record["seconds"]
    assert of_both[0] == of_both[1]
    assert call(PLANS / "smoke.yaml", folder, "--print", "digits/sym40/flywheel/7") == 2


def small_plan(folder, **changes):
    plan = {
        "defaults": ["optim.epochs=1", "cycle.warmup=1", "data.train_size=20", "data.test_size=20"],
        "methods": {"cross_entropy": ["cycle.kind=cross_entropy"]},
        "tasks": {"digits": {"config": "digits", "seeds": [0], "noises": {"sym": ["data.noise.rate=0.5"]}}},
    } | changes
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / "plan.yaml"


def test_a_broken_run_is_reported_and_the_others_are_done(tmp_path, capsys):
    whole = {"config": "digits", "seeds": [0], "noises": {"none": ["data.noise.kind=none"]}}
    tasks = {"broken": whole | {"overrides": ["data.source=folder", "data.root=nowhere"]}, "whole": whole}
    plan = small_plan(tmp_path, tasks=tasks)
    assert call(plan, tmp_path) == 1
    said = capsys.readouterr().err
    assert "1 of 2 runs failed" in said and "broken/none/cross_entropy/0: flywheel-fast: data.root nowhere" in said
    assert list(rows_in(tmp_path)) == ["whole/none/cross_entropy/0"]
    table = (tmp_path / "plan.md").read_text()
    assert "| whole | small_cnn, 20 | none |" in table and "Not measured yet: broken/none." in table

    small_plan(tmp_path, tasks={"whole": whole | {"overrides": ["optim.lr=0.1"]}})
    assert call(plan, tmp_path) == 2  # never goes on with a run of other settings
    assert "holds a run with another optim.lr" in capsys.readouterr().err


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted({*PLANS.glob("*.yaml")} - {PLAN_OF_LABELS}), ids=lambda path: path.stem)
def test_the_plans_are_valid(path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_DATA", "/somewhere")
    runs = accuracy.read_plan(path)
    assert len({run.name for run in runs}) == len({run.words + (run.task,) for run in runs}) == len(runs)
    for run in runs:
        config = accuracy.resolve(path, run)
        assert config.seed == config.data.noise.seed == run.seed
        assert run.noise != "none" or config.data.noise.rate == 0
        assert not run.method.startswith("cross") or config.cycle.kind == "cross_entropy"


def test_a_reference_on_the_labels_as_they_are_is_added():
    runs = accuracy.read_plan(PLANS / "smoke.yaml")
    assert [run.name.split("/")[1:3] for run in runs] == [
        ["none", "cross_entropy"],
        ["sym40", "cross_entropy"],
        ["sym40", "flywheel"],
    ]
    assert "data.noise.rate=0" in runs[0].words


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"task": 1}, "Key 'task' not in 'Plan'. Did you mean: 'tasks'?"),
        ({"methods": {"flywheel": []}}, "tasks.digits needs the method 'cross_entropy'"),
        ({"methods": {"cross_entropy": [], "a/b": []}}, "'digits/sym/a/b/0'"),
        ({"methods": {"cross_entropy": None}}, "methods.cross_entropy"),
        ({"tasks": {"digits": {"seeds": [0], "noises": {}}}}, "tasks.digits.config"),
        ({"tasks": {"digits": {"config": "digits", "seeds": ["a"], "noises": {}}}}, "tasks.digits.seeds[0]"),
        ({"tasks": {"d": {"config": "digitz", "seeds": [0], "noises": {}}}}, "digitz"),
        ({"defaults": ["optim.lrr=1"]}, "digits/none/cross_entropy/0: the command line: unknown key 'optim.lrr'"),
        ({"defaults": ["seed"]}, "'seed' is not of the form key=value"),
    ],
)
def test_a_bad_plan_is_named_in_one_sentence(tmp_path, capsys, changes, said):
    assert call(small_plan(tmp_path, **changes), tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and str(tmp_path / "plan.yaml") in error and len(error.splitlines()) == 1
    assert not (tmp_path / "rows.csv").exists() and not (tmp_path / "out").exists()


def test_no_plan_and_rows_of_another_version(tmp_path, capsys):
    assert call(tmp_path / "absent.yaml", tmp_path) == 2
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    assert call(small_plan(tmp_path), tmp_path) == 2
    assert "other columns" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,2\n"


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_gap_closed_and_deviations_on_made_up_rows(tmp_path, monkeypatch):
    methods = {"cross_entropy": ["cycle.kind=cross_entropy"], "flywheel": []}
    task = {"config": "digits", "seeds": [0, 1, 2], "noises": {"sym": ["data.noise.rate=0.5"]}}
    plan = small_plan(tmp_path, methods=methods, tasks={"digits": task})
    made_up = {("none", "cross_entropy"): (0.9, 0.92, 0.94), ("sym", "cross_entropy"): (0.5, 0.52, 0.6)}
    made_up["sym", "flywheel"] = (0.8, 0.84)  # the third is still to come
    for run in accuracy.read_plan(plan):
        values = made_up[run.noise, run.method]
        if run.seed < len(values):
            names = {"task": run.task, "noise": run.noise, "method": run.method, "seed": run.seed}
            value = {"test_acc_main": values[run.seed]}
            if run.method == "flywheel":
                value = {"test_acc_main": 0.1, "test_acc_aux": values[run.seed], "gamma": 0.5 + run.seed / 10}
            row = names | value | {"network": "net", "images": 1347, "merged": 0, "command": run.command(3)}
            accuracy.append(tmp_path / "rows.csv", row)
    assert call(plan, tmp_path, "--table") == 0
    text = (tmp_path / "plan.md").read_text()
    # of seeds 0 and 1: (.82 - .51) / (.91 - .51) = .775
    sym = "| digits | net, 1,347 | sym | 0.9200 ± 0.0200 (3) | 0.5400 ± 0.0529 (3) | 0.8200 ± 0.0283 (2), 78% |"
    assert sym in text
    assert (
        "| digits | sym | flywheel | 78% | 0.8200 ± 0.0283 (2) | 0.1000 ± 0.0000 (2) | – | 0.5500 ± 0.0707 (2) |"
        in text
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(accuracy_table, "WIDE", 0)  # as where methods are many: a line each
    assert call(plan, tmp_path, "--table") == 0
    text = (tmp_path / "plan.md").read_text()
    assert "| noise | none | sym |\n" in text and "| flywheel | – | 0.8200 ± 0.0283 (2), 78% |\n" in text


def test_no_share_of_a_gap_that_is_none():
    rows = {0: {"test_acc_main": "0.9", "test_acc_aux": ""}}
    assert accuracy_table.gap_closed(rows, rows, rows) is None
    assert accuracy_table.gap_closed({}, rows, rows) is None


@pytest.mark.parametrize(
    "cycle",
    [{"kind": "cross_entropy"}, {}, {"contrastive": 0.1}, {"noise_model": "em"}],
    ids=str,
)
def test_forward_passes_are_as_many_as_the_cycle_makes(cycle, monkeypatch):
    counted = 0
    forward, predict = Learner.forward, Learner.predict

    def count(function, weight):
        def counting(self, images, *args, **kwargs):
            nonlocal counted
            counted += weight * len(images)
            return function(self, images, *args, **kwargs)

        return counting

    monkeypatch.setattr(Learner, "forward", count(forward, 3))
    monkeypatch.setattr(Learner, "predict", count(predict, 1))
    data, epochs = toy.make("symmetric", 0.4), 3
    if "contrastive" in cycle:  # the toy's network has no projection: views are all that counts
        monkeypatch.setattr(toy.MLP, "forward", lambda self, x, project=False: with_embeddings(self, x, project))
    toy.run(data, epochs, warmup=1, **cycle)
    trained = counted - len(data.test_true)  # toy.run looks at its test images once
    assert trained == accuracy.passes(CycleConfig(warmup=1, **cycle), epochs) * len(data.labels)


def with_embeddings(network, x, project):
    logits = super(toy.MLP, network).forward(x)
    return (logits, logits) if project else logits
