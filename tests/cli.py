"""`flywheel-fast` in a process of its own, and what it leaves behind."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two test processes on two cores; read when torch is imported
PROCESSES = multiprocessing.get_context("forkserver")
LIBRARIES = ["torch", "torchvision", "timm", "nvidia.dali.pipeline", "matplotlib.pyplot", "sklearn.datasets"]
LIBRARIES += ["sklearn.metrics", "pyarrow.parquet", "omegaconf", "rich.progress", "safetensors.torch"]
PROCESSES.set_forkserver_preload(LIBRARIES)  # not the package: FLYWHEEL_NATIVE is read when it is imported


def flywheel(*words, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """The command with these words, run in the folder `cwd`; `environment` is added to that of the test. Its process is
    forked from one that has imported already what takes seconds to import."""
    words = [str(word) for word in words]
    environment = os.environ | {"COLUMNS": "200"} | environment
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = PROCESSES.Process(target=_run, args=(words, str(cwd), environment, out, err))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def begin(*words, cwd: Path | None = None, **streams) -> subprocess.Popen:
    """The command under way, to be sent signals."""
    command = [sys.executable, "-m", "flywheel_fast", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, preexec_fn=_hears_ctrl_c, **streams)


def _hears_ctrl_c() -> None:
    """A job in the background starts deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def rows(run: Path) -> list[dict[str, str]]:
    """Of metrics.csv; none before it is there."""
    if not (run / "metrics.csv").exists():
        return []
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def ended_as(run: Path) -> tuple:
    """What must not depend on interruptions."""
    unhurried = [
        {key: value for key, value in row.items() if not key.startswith(("sec_", "waiting"))} for row in rows(run)
    ]
    return (run / "weights/model.safetensors").read_bytes(), (run / "labels/samples.parquet").read_bytes(), unhurried


def _run(words: list[str], cwd: str, environment: dict[str, str], out: Path, err: Path) -> None:
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["flywheel-fast", *words]
    from flywheel_fast.cli import main

    sys.exit(main())
