"""A data set is a table: file, observed label, and the true label where it is known."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Manifest:
    root: Path
    files: np.ndarray  # [N] str, relative to root, in sorted order where the source has no order of its own
    labels: np.ndarray  # [N] int64, observed
    classes: tuple[str, ...]
    true_labels: np.ndarray | None = None  # [N] int64

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "Manifest":
        true = None if self.true_labels is None else self.true_labels[index]
        return replace(self, files=self.files[index], labels=self.labels[index], true_labels=true)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of files, labels and class names: equal digests mean equal training sets."""
        sha = hashlib.sha256("\0".join(self.classes).encode())
        sha.update("\0".join(self.files.tolist()).encode())
        sha.update(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        return sha.hexdigest()
