"""A checkpoint is one file: a torch archive followed by its own checksum; it is replaced whole or not at all, and the
one before it is kept."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch

from flywheel_fast.errors import BadInput, Failure

PART = ".part"  # ends the name of a file that is not whole yet
MARK = b"flywheel-fast sha256 "


def previous(path: Path) -> Path:
    """Where the checkpoint goes that stood at `path` before."""
    return path.with_name(f"previous{path.suffix}")


def write_atomic(path: Path, content: bytes, keep: Path | None = None) -> None:
    """A temporary file beside `path`, flushed to disk, then renamed over it; what stood there goes to `keep`."""
    temporary = path.with_name(f".{path.name}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Failure(f"{path}: cannot be written ({error.strerror}); what stood there before is untouched") from error


def save(path: Path, state: dict) -> None:
    """`state` holds tensors and plain Python values only, so that it loads with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomic(path, content + MARK + digest, keep=previous(path))


def load_last(path: Path, warn: Callable[[str], None]) -> dict:
    """The checkpoint at `path`; where it cannot be used, the one before, with a warning. Raises BadInput."""
    try:
        return load(path)
    except BadInput as error:
        if not previous(path).exists():
            raise
        found = load(previous(path))
        warn(f"{error}; going on from the one before, {previous(path).name}")
        return found


def load(path: Path) -> dict:
    """Raises BadInput when the file is absent, cut short or altered, or would run code."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"checkpoint {path}: cannot be read ({error.strerror})") from error
    content, mark, digest = content.rpartition(MARK)
    if not mark or hashlib.sha256(content).hexdigest().encode() != digest:
        raise BadInput(f"checkpoint {path}: cut short or altered (its checksum does not fit)")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader has many
        raise BadInput(f"checkpoint {path}: holds something else than tensors and plain values") from error
