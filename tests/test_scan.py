"""Broken files are found before a training, left out and listed; what was looked at once is not decoded again."""

import csv
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import write_image
from PIL import Image

from flywheel_fast import cli
from flywheel_fast.data import scan
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.errors import BadInput

SMALL = ["model.main.width=8", "views.image_size=16", "optim.epochs=2", "cycle.warmup=1", "optim.batch_size=8"]


def spoil(folder):
    """One image cut off, one replaced by text, in the training split; one empty in the test split."""
    cut, text, empty = folder / "train/cat/0.jpg", folder / "train/dog/2.jpg", folder / "test/owl/1.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    text.write_text("this is no image")
    empty.write_bytes(b"")
    return [str(path.relative_to(folder)) for path in (cut, text, empty)]


@pytest.mark.parametrize("noise", ["none", "instance"])  # instance noise looks at the images before
def test_a_training_goes_without_broken_files_and_lists_them(folder, tmp_path, capsys, noise):
    names = spoil(folder)
    words = ["cifar10_small", f"data.root={folder}", f"data.noise.kind={noise}", "data.noise.rate=0.2", *SMALL]
    assert cli.main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "3 broken files are left out" in said and re.search(r"^left out +3 broken files", said, re.M)
    assert "bad_files.csv, first train/cat/0.jpg: cannot be read" in (tmp_path / "run/train.log").read_text()
    with open(tmp_path / "run/bad_files.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["file_name"] for row in listed] == names
    assert [(row["split"], row["label"]) for row in listed] == [("train", "cat"), ("train", "dog"), ("test", "owl")]
    assert all("cannot be read as an image (" in row["problem"] for row in listed)
    with open(tmp_path / "run/labels/issues.csv", newline="") as file:
        kept = {row["file_name"] for row in csv.DictReader(file)}
    assert len(kept) == 16 and not kept & set(names)
    result = json.loads((tmp_path / "run/result.json").read_bytes())
    assert (result["images"], result["bad_files"]) == (16, 3)
    assert cli.main(["train", *words, "--out", str(tmp_path / "run"), "--resume", "auto", "optim.epochs=3"]) == 0
    skipping = DataConfig("folder", str(folder), skip=str(tmp_path / "run/bad_files.csv"))
    assert len(load(skipping).train) == 16


def test_what_the_scan_passes_never_stops_a_loader(tmp_path):
    """DALI refuses a PNG without its last byte, which PIL passes, and JPEGs with noise inside by its own rules."""
    rng = np.random.default_rng(0)
    root = tmp_path / "odd"
    for number in range(60):
        suffix = ("jpg", "png", "webp", "tiff", "bmp")[number % 5]
        path = root / "ab"[number % 2] / f"{number:02}.{suffix}"
        write_image(path, rng)
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            del content[-rng.choice([1, 2, 3, 30, 300]) :]
        if number % 3 == 1:
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
    Image.new("RGB", (9, 9)).save(root / "a" / "is_a_gif.jpg", "GIF")
    manifest = scan.Manifest(
        root, sorted(f"{path.parent.name}/{path.name}" for path in root.rglob("*.*")), np.arange(61) % 2, ("a", "b")
    )
    kept, bad = scan.without_broken(manifest, "train", "cpu", 1)
    problems = {one.file_name: one.problem for one in bad}
    assert "GIF, save it anew" in problems["a/is_a_gif.jpg"] and "b/21.png" in problems  # cut
    assert 10 < len(bad) < 40 and len(kept) == 61 - len(bad)
    views = ViewsConfig(image_size=16)
    assert sum(len(index) for index, _ in Loader(kept, views, 8, 0).epoch(0)) == len(kept)
    for one in bad:
        row = np.flatnonzero(manifest.files == one.file_name)
        with pytest.raises(BadInput, match=one.file_name):
            list(Loader(manifest.subset(row), views, 8, 0).sweep())


def test_what_decoders_say_of_broken_files_is_not_shown_and_all_else_is(tmp_path, capfd, monkeypatch):
    rng = np.random.default_rng(0)
    files = [f"{number:02}.{('jpg', 'png', 'tiff', 'bmp', 'jp2', 'webp')[number % 6]}" for number in range(30)]
    for number, file in enumerate(files):
        write_image(tmp_path / file, rng)
        content = (tmp_path / file).read_bytes()
        middle = len(content) // 2
        spoilt = (content, content[:middle], content[:-1], b"text" * 30, content[:middle] + b"\xff" * 30 + content)
        (tmp_path / file).write_bytes(spoilt[number // 6])
    manifest = scan.Manifest(tmp_path, files, np.zeros(30, np.int64), ("a",))
    list(Loader(manifest, ViewsConfig(), 1, 0).looked_at(np.arange(30)))
    if Loader(manifest, ViewsConfig(), 1, 0).reader == "DALI":
        assert "[libjpeg_turbo_decoder]" in capfd.readouterr().err
    original = Loader.looked_at

    def talking(self, rows):
        os.write(2, b"the disk is on fire\n")
        yield from original(self, rows)
        print("and the roof", file=sys.stderr)

    monkeypatch.setattr(Loader, "looked_at", talking)
    assert 12 < len(scan.broken(manifest, "train", "cpu", 1)) < 25
    assert sorted(capfd.readouterr().err.splitlines()) == ["and the roof", "the disk is on fire"]
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"


def test_a_file_is_decoded_once_while_it_stays_as_it_is(folder, monkeypatch):
    train = load(DataConfig("folder", str(folder))).train
    looked_at = []
    original = Loader.looked_at

    def counting(self, rows):
        looked_at.append(self.manifest.files[rows].tolist())
        yield from original(self, rows)

    monkeypatch.setattr(Loader, "looked_at", counting)

    def looks():
        scan.without_broken(train, "train", "cpu", 1)
        return looked_at.pop()

    assert len(looks()) == 18 and looks() == []
    path = folder / train.files[3]
    os.utime(path, (1, 1))
    assert looks() == [train.files[3]] and looks() == []
    path.write_bytes(b"")
    assert looks() == looks() == [train.files[3]]  # those that are broken, each time: they may have been mended
    shutil.copy(folder / train.files[0], path)
    assert looks() == [train.files[3]] and looks() == []
    for memory in (scan.cache.home() / "scans").iterdir():
        memory.write_bytes(b"no array")
    assert len(looks()) == 18  # a damaged memory is none


def test_an_interrupted_scan_goes_on_where_it_was(folder, monkeypatch):
    train = load(DataConfig("folder", str(folder))).train
    original = Loader.looked_at

    def interrupted(self, rows):
        for number, look in enumerate(original(self, rows)):
            if number == 10:
                raise KeyboardInterrupt
            yield look

    monkeypatch.setattr(Loader, "looked_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan.without_broken(train, "train", "cpu", 1)
    monkeypatch.setattr(Loader, "looked_at", lambda self, rows: pytest.fail("not new") if len(rows) > 8 else iter(()))
    scan.without_broken(train, "train", "cpu", 1)


def test_a_class_of_broken_files_only_is_refused(folder, tmp_path, capsys):
    for path in (folder / "train/dog").iterdir():
        path.write_bytes(b"GIF89a")
    words = ["train", "cifar10_small", f"data.root={folder}", *SMALL, "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    assert "none of the train images of class 'dog' can be read; train/dog/0.jpg cannot" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
