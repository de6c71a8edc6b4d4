"""Images stay in memory as far as there is room, train first; what is seen of them is the same wherever they stay."""

import re

import numpy as np
import pytest
import torch
from conftest import write_image

from flywheel_fast import cli
from flywheel_fast.data import memory, pipelines
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.memory import Memory, free_on_host, needed
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.views import ViewsConfig

VIEWS = ("clean", "weak", "strong", "strong2")
ODD = {"image_size": 16, "std": (58.395, 57.12, 57.375)}  # dividing is not multiplying by the inverse
DALI = pytest.param("DALI", marks=pytest.mark.skipif(not pipelines.has_dali(), reason="DALI is not installed"))


@pytest.fixture
def manifest(tmp_path):
    """30 JPEG files of three sizes."""
    rng = np.random.default_rng(0)
    files = [f"{number:02}.jpg" for number in range(30)]
    for number, file in enumerate(files):
        write_image(tmp_path / "own" / file, rng, ((20, 24), (33, 17), (40, 40))[number % 3])
    return Manifest(tmp_path / "own", files, np.arange(30) % 2, ("a", "b"))


def all_views(loader):
    batches = [*loader.epoch(3, VIEWS), *loader.sweep(), *loader.epoch(4, ("weak",))]
    return [view for batch in batches for view in batch.views]


# -- the ladder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "strong"), [("pad", "jitter"), ("resized", "jitter"), ("pad", "randaugment")])
@pytest.mark.parametrize("reader", [DALI, "torchvision"])
def test_views_are_the_same_bytes_wherever_images_stay(manifest, monkeypatch, reader, crop, strong):
    monkeypatch.setattr(pipelines, "has_dali", lambda: reader == "DALI")
    views = ViewsConfig(**ODD, crop=crop, strong=strong)
    decoded, encoded = needed(manifest, views)
    rooms = {"read from files": Memory(), "decoded in host memory": Memory(host=decoded)}
    if reader == "DALI":
        rooms["decoded in device memory"] = Memory(device=decoded)  # the same code; here the device is the CPU
    if crop == "resized":
        assert encoded < decoded
        rooms["files in host memory"] = Memory(host=encoded)
    seen = {}
    for kept, room in rooms.items():
        loader = Loader(manifest, views, 8, 1, memory=room)
        assert loader.kept.startswith(kept + ", ")
        seen[kept] = all_views(loader)
    expected = seen.pop("read from files")
    for views in seen.values():
        assert all(torch.equal(one, two) for one, two in zip(expected, views, strict=True))


def test_the_first_loader_is_served_first(manifest):
    views = ViewsConfig(**ODD)
    decoded, _ = needed(manifest, views)
    shared = Memory(host=1.5 * decoded)
    first, second, third = (Loader(part, views, 8, 1, memory=shared) for part in (manifest, manifest, half(manifest)))
    assert [one.kept.split(",")[0] for one in (first, third)] == ["decoded in host memory"] * 2
    assert not second.kept.startswith("decoded") and 0 <= shared.room["host"] < 1e-6


def half(manifest):
    return manifest.subset(np.arange(len(manifest) // 2))


def test_images_that_are_larger_than_estimated_go_a_rung_down(manifest, monkeypatch):
    views = ViewsConfig(**ODD, crop="resized")
    decoded, encoded = needed(manifest, views)
    monkeypatch.setattr(pipelines, "needed", lambda *_: (decoded / 2, encoded / 2))
    shared = Memory(host=decoded / 2, device=decoded / 3)
    loader = Loader(manifest, views, 8, 1, memory=shared)
    assert loader.images is None and loader.kept.startswith("files in host memory")
    list(loader.sweep())
    files = sum(content.nbytes for content in loader.files.values())
    assert encoded / 3 < files <= encoded / 2  # the others are read anew
    assert shared.room == {"host": decoded / 2 - encoded / 2, "device": decoded / 3}


def test_files_that_stay_in_memory_are_read_once(manifest):
    views = ViewsConfig(**ODD, crop="resized")
    loader = Loader(manifest, views, 8, 1, memory=Memory(host=needed(manifest, views)[1]))
    first = all_views(loader)
    for file in manifest.files:
        (manifest.root / file).unlink()
    assert all(torch.equal(one, two) for one, two in zip(first, all_views(loader), strict=True))


def test_what_all_need_is_estimated_by_a_few(manifest, monkeypatch):
    exact = sum(3 * height * width for height, width in ((20, 24), (33, 17), (40, 40))) * 10
    views = ViewsConfig(**ODD, crop="resized")
    files = sum((manifest.root / file).stat().st_size for file in manifest.files)
    assert needed(manifest, views) == pytest.approx((exact, files))
    assert needed(manifest, ViewsConfig(**ODD, pad=2))[0] == 30 * 3 * 20 * 20
    monkeypatch.setattr(memory, "SAMPLE", 15)
    assert needed(manifest, views) == pytest.approx((1.1 * exact, 1.1 * files), rel=0.4)


def test_a_training_says_where_its_images_stay(folder, tmp_path):
    words = ["train", "cifar10_small", f"data.root={folder}", "model.main.width=8", "views.image_size=16"]
    words += ["optim.epochs=1", "cycle.warmup=1"]
    assert cli.main([*words, "--out", str(tmp_path / "a")]) == 0
    assert cli.main([*words, "data.cache_gb=0", "--out", str(tmp_path / "b")]) == 0
    line = r"images: train {0}, [\d.]+ MB.*; test {0}, [\d.]+ MB.* \(up to [\d.]+ .B of host memory: {1}\)"
    kept, read = ((tmp_path / name / "train.log").read_text() for name in "ab")
    assert re.search(line.format("decoded in host memory", "a share of what is free"), kept)
    assert re.search(line.format("read from files", "data.cache_gb=0"), read)
    assert cli.main([*words, "data.cache_gb=-1", "--out", str(tmp_path / "c")]) == 2


# -- free memory -------------------------------------------------------------------------------------------------------


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_free_memory_is_that_of_the_tightest_group(tmp_path):
    assert free_on_host(tmp_path) == memory.UNTOLD  # not Linux
    write(tmp_path / "proc", meminfo="MemTotal: 99 kB\nMemAvailable:    8000 kB\n")
    assert free_on_host(tmp_path) == 8000 * 1024
    write(tmp_path / "proc/self", cgroup="0::/job/step\n")
    groups = tmp_path / "sys/fs/cgroup"
    write(groups / "job/step", memory__max="max\n", memory__current="100000\n", memory__stat="active_file 0\n")
    assert free_on_host(tmp_path) == 8000 * 1024
    stat = "anon 7\nactive_file 300\ninactive_file 200\n"  # given back when it is asked for
    write(groups / "job", memory__max="1000000\n", memory__current="100500\n", memory__stat=stat)
    assert free_on_host(tmp_path) == 900_000
    write(groups / "job", memory__current="2000000\n")
    assert free_on_host(tmp_path) == 0


def test_free_memory_of_the_older_groups(tmp_path):
    write(tmp_path / "proc", meminfo="MemAvailable:    8000 kB\n")
    write(tmp_path / "proc/self", cgroup="5:cpu,cpuacct:/a\n4:memory:/not/in/this/container\n")
    stat = "cache 9\ntotal_active_file 10\ntotal_inactive_file 20\n"
    group = {"memory__limit_in_bytes": "5000", "memory__usage_in_bytes": "1030", "memory__stat": stat}
    write(tmp_path / "sys/fs/cgroup/memory", **group)
    assert free_on_host(tmp_path) == 4000


def test_a_share_of_the_free_memory_or_what_is_asked_for_where_there_is_so_much(monkeypatch):
    monkeypatch.setattr(memory, "free_on_host", lambda: 8e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40e9, 80e9))
    assert Memory.free("cpu", None).room == {"host": 4e9, "device": 0}
    assert Memory.free("cuda", None).room == {"host": 4e9, "device": 10e9}
    assert Memory.free("cuda", None, processes=4).room == {"host": 1e9, "device": 10e9}
    assert Memory.free("cuda", 20).room == {"host": 8e9, "device": 20e9}
    assert Memory.free("cuda", 0).room == {"host": 0, "device": 0}
    terms = Memory.free("cuda", 0.5).terms
    assert terms == "up to 0.5 GB of device memory and 0.5 GB of host memory: data.cache_gb=0.5"
