"""Small data sets that tests share."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flywheel_fast.data import fixtures
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.errors import BadInput

CLASSES = ("cat", "dog", "owl")
KIND_OF = {"webvision_mini": "webvision", "tiny_imagenet": "tiny-imagenet"}  # whose miniature is called otherwise


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """The digits are written into a cache of the tests' own, not the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def outside_data() -> Path:
    """The folder of FLYWHEEL_DATA: cifar10-jpeg.tar.xz, cifar10n.npz, clothing-photos.tar."""
    if "FLYWHEEL_DATA" not in os.environ:
        pytest.skip("FLYWHEEL_DATA is not set: it names a folder with cifar10-jpeg.tar.xz and cifar10n.npz")
    return Path(os.environ["FLYWHEEL_DATA"])


def write_image(path: Path, rng: np.random.Generator, size=(20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(path)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A new folder on a file system of its own, which can fill up or turn read-only."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here: needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """root/train/CLASS and root/test/CLASS: 7 + 5 + 6 training and 3 x 2 test images, JPEG and PNG."""
    rng = np.random.default_rng(0)
    for name, count in zip(CLASSES, (7, 5, 6), strict=True):
        for number in range(count):
            write_image(tmp_path / "data" / "train" / name / f"{number}.{('jpg', 'png')[number % 2]}", rng)
        for number in range(2):
            write_image(tmp_path / "data" / "test" / name / f"{number}.jpg", rng)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory) -> Path:
    """A folder with a miniature of each published data set; not to be changed."""
    base = tmp_path_factory.mktemp("miniatures")
    for kind in fixtures.KINDS:
        fixtures.make(kind, base / kind)
    return base


@pytest.fixture
def miniature(miniatures, tmp_path):
    """Makes a copy that a test may spoil."""

    def copy(source: str) -> DataConfig:
        kind = KIND_OF.get(source, source)
        shutil.copytree(miniatures / kind, tmp_path / kind)
        return DataConfig(source, str(tmp_path / kind))

    return copy


def refused(config: DataConfig, *said) -> None:
    """In one line that says all this."""
    with pytest.raises(BadInput) as error:
        load(config)
    assert all(str(part) in str(error.value) for part in said), error.value
    assert "\n" not in str(error.value)
