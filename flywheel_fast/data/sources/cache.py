"""What is no folder of image files becomes one, once, in the user's cache: the image pipeline reads files."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.progress import track

from flywheel_fast.errors import BadInput

WORTH_A_BAR = 5000  # files


def home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flywheel-fast"


def made_once(name: str, files: Iterable[tuple[str, bytes]], total: int | None = None) -> Path:
    """The cache's folder `name`; where it is not there yet it is made of `files`: path and content. All of it or none.

    Raises BadInput where it cannot be written, and what making `files` raises.
    """
    cache = home()
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
    except OSError as error:
        raise BadInput(f"{cache}: cannot be written ({error.strerror}); name a folder by XDG_CACHE_HOME") from error
    try:
        quiet = total is not None and total < WORTH_A_BAR
        for file, content in track(files, f"writing images to {folder}", total, transient=True, disable=quiet):
            path = temporary / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another run was faster
            why = error.strerror
            raise BadInput(f"{folder}: cannot be written ({why}); name a folder by XDG_CACHE_HOME") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
