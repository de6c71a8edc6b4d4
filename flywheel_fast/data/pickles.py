"""Published data sets come as pickles, and a pickle is a program: only what makes arrays, lists and dicts may run."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flywheel_fast.errors import BadInput


def load(path: Path) -> Any:
    """What the pickle file holds; Python 2's strings become str. Raises BadInput."""
    try:
        with open(path, "rb") as file:
            return read(file, str(path))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error


def read(file: BinaryIO, where: str) -> Any:
    """The same from an open file; `where` opens the message."""
    try:
        return _Unpickler(file, encoding="latin1").load()
    except _Forbidden as error:
        raise BadInput(
            f"{where}: wants to run {error}, which no data set needs; do not trust this file, get it anew"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise BadInput(f"{where}: is damaged, or no pickle ({type(error).__name__}: {error}); get it anew") from error


class _Forbidden(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Forbidden(f"{module}.{name}")
        return ALLOWED[module, name]


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise _Forbidden(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


_reconstruct = np.empty(0).__reduce__()[0]  # its module was renamed in NumPy 2
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
