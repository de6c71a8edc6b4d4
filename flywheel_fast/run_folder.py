"""Where a run lives: runs/NAME, or the folder that the user names; what is in it already is never lost unasked."""

import fcntl
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flywheel_fast.checkpoint import PART, previous
from flywheel_fast.errors import BadInput

CHECKPOINT = Path("weights", "last.pt")
LOG = "train.log"
BAD_FILES = "bad_files.csv"
FEATURES = "features"  # of its images, where the run has made them itself
LAUNCHER = ".launcher"  # names the torchrun that began the run
# What a run writes.
OWN = {
    "config.yaml",
    "env.json",
    "metrics.csv",
    "result.json",
    "noise.npz",
    BAD_FILES,
    LOG,
    "weights",
    "labels",
    "plots",
    "report.html",
    "embedding.npz",
    "README.md",
    "export",
    "tensorboard",
    "mlflow_run_id",
    LAUNCHER,
    FEATURES,
}


def resumable(folder: Path) -> bool:
    return (folder / CHECKPOINT).is_file() or previous(folder / CHECKPOINT).is_file()


def to_resume(resume: str, out: str | None, name: str) -> Path | None:
    """The folder to go on in: the one that `--resume PATH` names; for `auto` that of `out`, or None to start anew."""
    if resume == "auto":
        folder = Path(out or Path("runs", name))
        return folder if resumable(folder) else None
    folder = Path(resume)
    if folder.name == CHECKPOINT.name and folder.is_file():
        folder = folder.parent.parent
    if not resumable(folder):
        raise BadInput(f"--resume {resume}: {folder / CHECKPOINT} is not there; name a run folder, or `auto`")
    if out and Path(out).resolve() != folder.resolve():
        raise BadInput(f"--out {out} is not the folder that --resume {resume} names; leave one of the two out")
    return folder


def begun_by(launcher: str, out: str | None, name: str) -> Path | None:
    """The folder that this launcher's processes began a run in, before they were started anew."""
    folders = [Path(out)] if out else itertools.takewhile(Path.exists, _numbered(name))
    marks = (folder / LAUNCHER for folder in folders)
    return next((mark.parent for mark in marks if mark.is_file() and mark.read_text() == launcher), None)


def _numbered(name: str) -> Iterator[Path]:
    return itertools.chain([Path("runs", name)], (Path("runs", f"{name}-{number}") for number in itertools.count(2)))


def lock(folder: Path) -> IO:
    """The folder is this training's until the file is closed. Raises BadInput where another one has it."""
    try:
        log = open(folder / LOG, "a", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {folder}: cannot be written ({error.strerror}); name a folder that can") from error
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(
            f"{folder}: another training is writing there; wait for its end, or name another --out"
        ) from error
    except OSError:  # a file system that knows no locks
        pass
    return log


def leave(folder: Path) -> None:
    """Takes back a folder that holds the log only: of a run that was refused its data."""
    if {entry.name for entry in folder.iterdir()} <= {LOG, LAUNCHER}:
        shutil.rmtree(folder)


def create(out: str | None, name: str, overwrite: bool, resuming: bool) -> Path:
    """A new, empty run folder. `resuming`: a folder without a checkpoint, from a run cut off early, is used again."""
    folder = Path(out) if out else Path("runs", name)
    if not out and not overwrite and not resuming:
        folder = next(folder for folder in _numbered(name) if not folder.exists())
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--out {folder}: is a file, not a folder")
    if folder.exists() and any(folder.iterdir()):
        if not (overwrite or resuming):
            raise BadInput(f"--out {folder}: is not empty; give --resume auto to go on, --overwrite to replace it")
        names = {entry.name for entry in folder.iterdir() if not entry.name.endswith(PART)}
        foreign = sorted(names - OWN)
        if LOG not in names or (overwrite and foreign):
            what = f" ({foreign[0]})" if foreign else ""
            raise BadInput(
                f"--out {folder}: holds something other than a run{what}, which is not replaced; name another folder"
            )
        if overwrite:
            lock(folder).close()
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).touch()
    except OSError as error:
        raise BadInput(f"--out {folder}: cannot be written ({error.strerror}); name a folder that can") from error
    return folder
