"""Is this installation sound? What `flywheel-fast doctor` prints."""

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flywheel_fast import env


def report() -> bool:
    """Prints versions, devices, the native build and self-tests; False when something is broken."""
    console = Console(highlight=False)
    found = Table(show_header=False, box=None, pad_edge=False)
    for name, value in env.describe().items():
        found.add_row(name, str(value))
    console.print(found)
    sound = True
    for name, (passed, detail) in {**env.self_test(), "images": _images(), "disk": _disk()}.items():
        sound &= passed
        console.print(f"{'ok' if passed else 'BROKEN':<8}{name:<20}{detail}", style="" if passed else "bold red")
    return sound


def _images() -> tuple[bool, str]:
    """Decodes one picture and cuts its views."""
    import io
    import tempfile

    import numpy as np
    from PIL import Image

    from flywheel_fast.data.manifest import Manifest
    from flywheel_fast.data.pipelines import Loader
    from flywheel_fast.data.views import ViewsConfig

    try:
        with tempfile.TemporaryDirectory() as folder:
            buffer = io.BytesIO()
            Image.fromarray(np.full((24, 24, 3), 128, np.uint8)).save(buffer, "PNG")
            Path(folder, "grey.png").write_bytes(buffer.getvalue())
            manifest = Manifest(Path(folder), np.array(["grey.png"]), np.zeros(1, np.int64), ("grey",), None)
            loader = Loader(manifest, ViewsConfig(image_size=16), 1, 0)
            ((_, views),) = loader.epoch(0, ("clean", "weak", "strong"))
        shapes = {tuple(view.shape) for view in views}
        return shapes == {(1, 3, 16, 16)}, f"one picture decoded, three views cut by {loader.reader}"
    except Exception as error:  # whatever is wrong with the reader, the user wants to read it here
        return False, f"{type(error).__name__}: {error}"


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(Path.cwd()).free
    return free > 1 << 30, f"{free / (1 << 30):.0f} GiB free here" + (
        "" if free > 1 << 30 else ": too little for a run"
    )
