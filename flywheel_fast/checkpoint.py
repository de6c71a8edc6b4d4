"""A checkpoint is one file: a torch archive followed by its own checksum; it is replaced whole or not at all."""

import hashlib
import io
import os
from pathlib import Path

import torch

from flywheel_fast.errors import BadInput, Failure

PART = ".part"  # ends the name of a file that is not whole yet
MARK = b"flywheel-fast sha256 "


def write_atomic(path: Path, content: bytes) -> None:
    """A temporary file beside `path`, flushed to disk, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{PART}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Failure(f"{path}: cannot be written ({error.strerror}); what stood there before is untouched") from error


def save(path: Path, state: dict) -> None:
    """`state` holds tensors and plain Python values only, so that it loads with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomic(path, content + MARK + hashlib.sha256(content).hexdigest().encode())


def load(path: Path) -> dict:
    """Raises BadInput when the file is absent, cut short or altered."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"checkpoint {path}: cannot be read ({error.strerror})") from error
    content, mark, digest = content.rpartition(MARK)
    if not mark or hashlib.sha256(content).hexdigest().encode() != digest:
        raise BadInput(
            f"checkpoint {path}: cut short or altered (its checksum does not fit); start anew in another --out"
        )
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
