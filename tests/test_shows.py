"""What is promised of data, shown: own pictures in three forms are one data set; millions of rows are quick."""

import csv
import hashlib
import io
import shutil
import tarfile
from collections import Counter

import pytest

from benchmarks import manifest as benchmark
from flywheel_fast import cli
from flywheel_fast.data.sources import DataConfig, load


@pytest.fixture(scope="module")
def photos(outside_data, tmp_path_factory):
    """620 photographs of clothing as class folders, as a table, as tar shards: source -> data.root."""
    base = tmp_path_factory.mktemp("photos")
    shutil.unpack_archive(outside_data / "clothing-photos.tar", base / "folder")
    files = sorted(path for path in (base / "folder").rglob("*.jp*g") if path.parent.parent.name in ("train", "test"))
    with open(base / "folder" / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_path", "label", "split"))
        writer.writerows((path.relative_to(base / "folder"), path.parent.name, path.parts[-3]) for path in files)
    (base / "shards").mkdir()
    tars = {name: tarfile.open(base / "shards" / f"{name}.tar", "w") for name in ("train-0", "train-1", "test-0")}
    for number, path in enumerate(files):
        tar = tars[f"{path.parts[-3]}-{number % 2 if path.parts[-3] == 'train' else 0}"]
        for suffix, content in ((".jpg", path.read_bytes()), (".cls", path.parent.name.encode())):
            entry = tarfile.TarInfo(f"{number:04}{suffix}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    for tar in tars.values():
        tar.close()
    return {"folder": base / "folder", "csv": base / "folder" / "table.csv", "webdataset": base / "shards"}


def test_own_pictures_are_one_data_set_in_three_forms(photos, tmp_path, capsys):
    samples, tables = [], []
    for source, root in photos.items():
        splits = load(DataConfig(source, str(root))).splits()
        contents = {
            (split, part.classes[label], hashlib.sha256((part.root / file).read_bytes()).hexdigest())
            for split, part in splits.items()
            for file, label in zip(part.files.tolist(), part.labels.tolist(), strict=True)
        }
        samples.append((contents, Counter(label for _, label, _ in contents)))
        words = [f"data.source={source}", f"data.root={root}", "--out", str(tmp_path / source)]
        assert cli.main(["data", "check", "cifar10_small", *words]) == 0
        said = capsys.readouterr().out
        tables.append(said[said.index("class") : said.index("first rows")])
        assert "missing                    0" in said and "unreadable                 0" in said
    assert samples[0] == samples[1] == samples[2] and len(samples[0][0]) > 600
    assert tables[0] == tables[1] == tables[2]  # of counts, and the imbalance


def test_the_benchmark_of_the_manifest_opens_what_it_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PARTS", dict(zip(benchmark.PARTS, (3000, 5000, 1000), strict=True)))
    benchmark.write_lists(tmp_path)
    built, opened = benchmark.build_and_save(tmp_path), benchmark.open_again(tmp_path)
    assert (len(built.train), len(built.test)) == (8000, 1000)
    for a, b in ((built.train, opened.train), (built.test, opened.test)):
        assert a.files.tolist() == b.files.tolist()
        assert [a.classes[k] for k in a.labels] == [b.classes[k] for k in b.labels]
