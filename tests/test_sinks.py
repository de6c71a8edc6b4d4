"""Rows of metrics.csv on their way to TensorBoard and MLflow, with the real packages."""

import csv
import sys

import pytest

from flywheel_fast import cli, sinks
from flywheel_fast.errors import BadInput

SHORT = ["cycle.warmup=1", "data.train_size=100", "data.test_size=20"]


def train(out, epochs, name, *words):
    return cli.main(
        [
            "train",
            *SHORT,
            f"optim.epochs={epochs}",
            "optim.schedule=constant",
            f"log=[{name}]",
            "--out",
            str(out),
            *words,
        ]
    )


def known(out, column):
    with open(out / "metrics.csv", newline="") as file:
        return {int(row["cycle"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def test_tensorboard_has_the_rows_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert train(out, 1, "tensorboard") == 0
    assert train(out, 3, "tensorboard", "--resume", "auto") == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for column in ("test_acc_aux", "gamma", "loss_main"):
        found = {event.step: event.value for event in events.Scalars(column)}
        assert found == pytest.approx(known(out, column), abs=1e-6) and found
        assert len(events.Scalars(column)) == len(found)


def test_mlflow_has_the_rows_and_the_config(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    out = tmp_path / "run"
    assert train(out, 1, "mlflow") == 0
    assert train(out, 2, "mlflow", "--resume", "auto") == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("flywheel-fast").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["cycle.warmup"] == "1"
    found = {one.step: one.value for one in client.get_metric_history(run.info.run_id, "test_acc_aux")}
    assert found == pytest.approx(known(out, "test_acc_aux")) and len(found) == 2


def test_a_sink_that_is_not_installed_or_unknown_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BadInput, match=r"pip install 'flywheel-fast\[mlflow\]'"):
        sinks.open_all(("mlflow",), tmp_path, "run", {}, 0)
    assert train(tmp_path / "run", 1, "wandb") == 2
    assert "log must be of tensorboard, mlflow, not 'wandb'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
