"""Where else the rows of metrics.csv go while a run goes on: TensorBoard, MLflow. One class each, one interface."""

from importlib import import_module
from pathlib import Path
from typing import Protocol

from flywheel_fast.errors import BadInput


class Sink(Protocol):
    def write(self, epoch: int, row: dict[str, float]) -> None:
        """A row of metrics.csv; epochs count from 1."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`; what was written after a resumed run's last epoch is hidden."""

    def __init__(self, out: Path, name: str, settings: dict[str, str], done: int):
        self.writer = _module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
        if not done:
            lines = [f"| {key} | {value} |" for key, value in settings.items()]
            self.writer.add_text("config", "\n".join(["| key | value |", "| --- | --- |", *lines]))

    def write(self, epoch: int, row: dict[str, float]) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run of the experiment flywheel-fast, where MLFLOW_TRACKING_URI says; its id is kept in the run's folder."""

    def __init__(self, out: Path, name: str, settings: dict[str, str], done: int):
        self.client = _module("mlflow").MlflowClient()
        kept = out / "mlflow_run_id"
        if done and kept.is_file():
            self.run = kept.read_text().strip()
            self.client.set_terminated(self.run, "RUNNING")
            return
        experiment = self.client.get_experiment_by_name("flywheel-fast")
        number = experiment.experiment_id if experiment else self.client.create_experiment("flywheel-fast")
        self.run = self.client.create_run(number, run_name=name).info.run_id
        kept.write_text(self.run)
        for key, value in settings.items():
            self.client.log_param(self.run, key, value)

    def write(self, epoch: int, row: dict[str, float]) -> None:
        for key, value in row.items():
            self.client.log_metric(self.run, key, value, step=epoch)

    def close(self) -> None:
        self.client.set_terminated(self.run)


SINKS = {"tensorboard": TensorBoard, "mlflow": MLflow}


def open_all(names: tuple[str, ...], out: Path, name: str, settings: dict[str, str], done: int) -> list[Sink]:
    """`settings`: the config, dotted key -> value; `done`: epochs that a resumed run has behind it.

    Raises BadInput for one whose package is not installed.
    """
    return [SINKS[sink](out, name, settings, done) for sink in names]


def _module(name: str):
    try:
        return import_module(name)
    except ImportError as error:
        extra = "tensorboard" if "tensorboard" in name else name
        raise BadInput(
            f"log={extra} needs a package that is not installed: pip install 'flywheel-fast[{extra}]'"
        ) from error
