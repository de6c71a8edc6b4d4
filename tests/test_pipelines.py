"""What DALI hands over: every sample once, the same bytes for the same seed, views that are what they say."""

import warnings

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image

from flywheel_fast.data import pipelines
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.memory import Memory
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.errors import BadInput

CONFIGS = {
    "cached": (ViewsConfig(image_size=16), 1e9),
    "files": (ViewsConfig(image_size=16), 0),
    "resized": (ViewsConfig(image_size=16, crop="resized"), 0),
    "resized, cached": (ViewsConfig(image_size=16, crop="resized"), 1e9),
    "randaugment": (ViewsConfig(image_size=16, strong="randaugment"), 1e9),
}


@pytest.fixture
def manifest(folder):
    return load(DataConfig("folder", str(folder))).train


def loader(manifest, kind="cached", **options):
    views, room = CONFIGS[kind]
    options = {"views": views, "batch_size": 4, "memory": Memory(room)} | options
    return Loader(manifest, seed=1, **options)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sample_exactly_once_an_epoch(manifest, kind, world):
    ranks = [loader(manifest, kind, batch_size=8, rank=rank, world=world) for rank in range(world)]
    for epoch in range(3):
        batches = [[index for index, _ in one.epoch(epoch)] for one in ranks]
        assert [len(one) for one in batches] == [3] * world == [len(one) for one in ranks]
        assert sorted(torch.cat(sum((one[:2] for one in batches), [])).tolist() + batches[0][2].tolist()) == [
            *range(18)
        ]
        assert all(len(index) == 8 // world for one in batches for index in one[:2])
        assert all(torch.equal(one[2], batches[0][2]) for one in batches)  # two samples cannot be divided
    swept = [torch.cat([index for index, _ in one.sweep()]) for one in ranks]
    assert all(torch.equal(index, index.sort().values) for index in swept)
    assert sorted(torch.cat(swept).tolist()) == list(range(18))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_epoch_gives_the_same_bytes_whatever_was_drawn_before(manifest, kind):
    views = ("weak", "strong", "strong2", "clean")
    fresh, used = loader(manifest, kind), loader(manifest, kind, threads=1)
    list(used.epoch(0))
    next(iter(used.epoch(7)))
    for one, two in zip(fresh.epoch(3, views), used.epoch(3, views), strict=True):
        assert torch.equal(one.index, two.index)
        assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))
    (_, first), (_, second) = next(iter(fresh.epoch(3, views))), next(iter(fresh.epoch(4, views)))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], first[2])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reader", ["DALI", "torchvision"])
def test_an_epoch_entered_in_the_middle_goes_on_with_the_same_bytes(manifest, kind, reader, monkeypatch):
    monkeypatch.setattr(pipelines, "CHUNK", 2)
    one = loader(manifest, kind)
    one.reader = reader
    whole = list(one.epoch(3))
    assert len(whole) == len(one) == 5
    for start in range(6):
        rest = list(one.epoch(3, start=start))
        assert len(rest) == 5 - start
        for (index, views), (same_index, same_views) in zip(rest, whole[start:], strict=True):
            assert torch.equal(index, same_index) and all(map(torch.equal, views, same_views))
    assert not torch.equal(whole[0].views[1], whole[2].views[1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_views_belong_to_their_index_and_are_channels_last(manifest, kind):
    one = loader(manifest, kind)
    clean = {int(i): image for index, (images,) in one.sweep() for i, image in zip(index, images, strict=True)}
    for index, (again, weak) in one.epoch(0, ("clean", "weak")):
        assert weak.shape == (len(index), 3, 16, 16) and weak.dtype == torch.float32
        assert weak.is_contiguous(memory_format=torch.channels_last)
        for i, image in zip(index, again, strict=True):
            assert torch.allclose(image, clean[int(i)], atol=1e-5)


@pytest.mark.parametrize("kind", ["cached", "files"])
def test_the_clean_view_is_the_picture(tmp_path, kind):
    rng = np.random.default_rng(0)
    write_image(tmp_path / "a.png", rng, (16, 16))
    exact = np.asarray(Image.open(tmp_path / "a.png"), dtype=np.float32)
    manifest = Manifest(tmp_path, np.array(["a.png"]), np.zeros(1, np.int64), ("a",))
    ((_, (image,)),) = loader(manifest, kind).sweep()
    assert np.allclose(image[0].permute(1, 2, 0).numpy() * 64 + 127.5, exact, atol=1e-3)


@pytest.mark.parametrize("kind", ["cached", "files"])
def test_weak_views_are_shifts_and_mirrors_of_the_picture(tmp_path, kind):
    """On a picture whose pixels all differ, every weak view is found in the padded picture, and all shifts occur."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(tmp_path / "a.png")
    manifest = Manifest(tmp_path, np.array(["a.png"] * 500), np.zeros(500, np.int64), ("a",))
    padded = np.pad(pixels, 2, mode="reflect")
    windows = {}
    for y in range(5):
        for x in range(5):
            window = padded[y : y + 16, x : x + 16]
            windows[window.tobytes()] = (y, x, False)
            windows[window[:, ::-1].tobytes()] = (y, x, True)
    found = set()
    views = ViewsConfig(image_size=16, pad=2)
    for _, (weak,) in loader(manifest, kind, views=views, batch_size=100).epoch(0, ("weak",)):
        for image in (weak[:, 0] * 64 + 127.5).round().to(torch.uint8).numpy():
            found.add(windows[image.tobytes()])
    assert len(found) == 50


@pytest.mark.parametrize("kind", ["cached", "files"])
def test_strong_views_change_colours_and_lose_a_square(tmp_path, kind):
    rng = np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(np.full((16, 16, 3), rng.integers(40, 85), np.uint8)).save(tmp_path / f"{number}.png")
    files = np.array([f"{number}.png" for number in range(200)])
    manifest = Manifest(tmp_path, files, np.zeros(200, np.int64), ("a",))
    views = ViewsConfig(image_size=16, pad=0, jitter=0.4, cutout=0.5)
    lost, ratio = [], []
    for _, (clean, strong) in loader(manifest, kind, views=views, batch_size=50).epoch(0, ("clean", "strong")):
        grey = strong[:, 0] * 64 + 127.5  # [B, H, W]
        erased = (grey - 127.5).abs() < 0.6
        lost += erased.float().mean((1, 2)).tolist()
        left = torch.where(erased, torch.nan, grey).nanmean((1, 2))
        ratio += (left / (clean[:, 0] * 64 + 127.5).mean((1, 2))).tolist()
    assert 0.1 < np.mean(lost) <= 0.25 and max(lost) <= 0.26  # the square may hang over the edge
    assert np.nanstd(ratio) > 0.1 and 0.3 < np.nanmin(ratio) and np.nanmax(ratio) < 2.3


def test_deprecations_inside_dali_stay_there(manifest):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        list(loader(manifest, "randaugment").epoch(0))
    assert not [str(one.message) for one in said if "dali" in str(one.message).lower()]


def test_odd_files_become_three_channels(tmp_path):
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(256, size=(30, 20), dtype=np.uint8))
    grey.save(tmp_path / "grey.png")
    grey.convert("P").save(tmp_path / "palette.png")
    grey.convert("RGBA").save(tmp_path / "alpha.png")
    grey.save(tmp_path / "grey.jpg")
    files = np.array(["grey.png", "palette.png", "alpha.png", "grey.jpg"])
    for kind in ("cached", "files", "resized", "resized, cached"):
        one = loader(Manifest(tmp_path, files, np.zeros(4, np.int64), ("a",)), kind)
        ((_, (images,)),) = one.sweep()
        assert images.shape == (4, 3, 16, 16)
        assert torch.allclose(images[0], images[1], atol=0.1) and torch.allclose(images[0], images[2], atol=0.1)


@pytest.mark.parametrize("kind", ["cached", "files"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone", "cut png"])
def test_broken_images_are_named(folder, kind, damage):
    path = folder / "train" / "dog" / ("1.png" if damage == "cut png" else "2.jpg")
    manifest = load(DataConfig("folder", str(folder))).train
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"text": b"not an image" * 20, "empty": b""}.get(damage, content[: len(content) // 2]))
    with pytest.raises(BadInput, match=rf"train/dog/{path.name}: .*(take it out of the data set)"):
        list(loader(manifest, kind).epoch(0))


def test_all_broken_images_are_found_before_a_small_set_is_trained_on(folder):
    (folder / "train" / "cat" / "0.jpg").unlink()
    (folder / "train" / "dog" / "1.png").write_bytes(b"")
    Image.new("RGB", (20, 20)).save(folder / "train" / "cat" / "1.png", format="GIF")
    for number in (0, 2):
        path = folder / "train" / "owl" / f"{number}.jpg"
        path.write_bytes(path.read_bytes()[:-2])
    manifest = load(DataConfig("folder", str(folder))).train
    manifest = Manifest(manifest.root, np.append(manifest.files, "train/cat/0.jpg"), np.zeros(18, np.int64), ("a",))
    with pytest.raises(
        BadInput, match=r"^5 files are broken: .*cat/1\.png: .*GIF.*dog/1\.png: .*empty.*owl/0"
    ) as error:
        loader(manifest, "cached")
    assert str(error.value).count(str(folder)) == 3  # the first few


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 4},
        {"pad": -1},
        {"pad": 40},
        {"area": 0.0},
        {"cutout": 1.5},
        {"jitter": 2.0},
        {"grey": 1.1},
        {"blur": -0.1},
        {"std": (0, 1, 1)},
    ],
)
def test_impossible_views_are_refused(options):
    with pytest.raises(ValueError, match=r"^views\."):
        ViewsConfig(**options)
