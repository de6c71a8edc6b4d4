"""Without DALI: the same samples in the same order, decoded alike, in views alike; and a training says so once."""

import csv
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image, ImageOps

from flywheel_fast.data import pipelines
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.memory import Memory
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.errors import BadInput

DALI = pipelines.has_dali()
needs_dali = pytest.mark.skipif(not DALI, reason="DALI is not installed")
READERS = [pytest.param("DALI", marks=needs_dali), "torchvision"]
SETTINGS = {
    "cached": (ViewsConfig(image_size=16), 1e9),
    "files": (ViewsConfig(image_size=16), 0),
    "resized": (ViewsConfig(image_size=16, crop="resized"), 0),
    "randaugment": (ViewsConfig(image_size=16, strong="randaugment"), 1e9),
}
VIEWS = ("clean", "weak", "strong", "strong2")
ROUGH = np.random.default_rng(0).integers(40, 215, size=(6, 8, 3), dtype=np.uint8)
RGB = Image.fromarray(ROUGH).resize((48, 36), Image.Resampling.BICUBIC)
GREY = RGB.convert("L")
GREY16 = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
ALPHA = RGB.convert("RGBA")
ALPHA.putalpha(GREY)


def read_by(loader, reader):
    loader.reader = reader
    return loader


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(folder):
    return load(DataConfig("folder", str(folder))).train


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setattr(pipelines, "has_dali", lambda: False)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_samples_in_the_same_order_and_the_same_bytes_for_the_same_seed(manifest, no_dali, settings):
    views, room = SETTINGS[settings]
    one, two = (Loader(manifest, views, 4, 1, threads=threads, memory=Memory(room)) for threads in (1, 2))
    assert one.reader == "torchvision"
    list(two.epoch(0))
    state = torch.get_rng_state()
    first, again, other = list(one.epoch(3, VIEWS)), list(two.epoch(3, VIEWS)), list(one.epoch(4, VIEWS))
    assert torch.equal(state, torch.get_rng_state())  # of a training, which saves it
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.index, b.index) and all(map(torch.equal, a.views, b.views))
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in a.views)
        assert {view.shape for view in a.views} == {(len(a.index), 3, 16, 16)}
        assert not torch.equal(a.views[2], a.views[3])
    assert not torch.equal(first[0].views[1], other[0].views[1])
    for reader in ["DALI"] * DALI:
        by_dali = read_by(Loader(manifest, views, 4, 1), reader).epoch(3)
        assert all(torch.equal(a.index, b.index) for a, b in zip(first, by_dali, strict=True))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone", "gif"])
def test_broken_files_are_named(manifest, folder, no_dali, damage):
    path = folder / "train" / "dog" / "2.jpg"
    content = path.read_bytes()
    if damage == "gif":
        RGB.save(path, "GIF")
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"text": b"not an image" * 20, "empty": b""}.get(damage, content[: len(content) // 2]))
    for room in (0, 1e9):
        with pytest.raises(BadInput, match=r"train/dog/2\.jpg: .*(take it out of the data set)"):
            list(Loader(manifest, ViewsConfig(image_size=16), 4, 1, memory=Memory(room)).epoch(0))


def test_a_training_needs_no_dali_and_says_so_once(tmp_path):
    """In a Python that has none, with a broken file."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "owl"):
            for number in range(4):
                write_image(tmp_path / "data" / split / name / f"{number}.png", rng, (16, 16))
    (tmp_path / "data/train/cat/0.png").write_bytes(b"no picture")
    program = (
        "import sys; sys.modules['nvidia'] = None\n"
        "from flywheel_fast import cli, data\n"
        "from flywheel_fast.data import pipelines\n"
        "pipelines.has_dali = lambda: False\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["data.source=folder", "data.root=data", "views.image_size=16", "optim.epochs=2", "cycle.warmup=1"]
    command = [sys.executable, "-c", program, "train", "digits", *words, "--out", "a"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a/train.log").read_text().count("nvidia-dali is not installed") == 1
    with open(tmp_path / "a/metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert "cat/0.png" in (tmp_path / "a/bad_files.csv").read_text()


# -- decoding ----------------------------------------------------------------------------------------------------------


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return {"exif": exif}


def png16():
    """16 bits in each of three channels, which Pillow does not write."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(RGB).astype(">u2") * 257)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 48, 36, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def frames(image):
    return {"save_all": True, "append_images": [image.rotate(90)]}


FILES = {  # image, format, options, what it should be; None: what Pillow makes of it
    "plain.jpg": (RGB, "JPEG", {}, None),
    "progressive.jpg": (RGB, "JPEG", {"progressive": True}, None),
    "grey.jpg": (GREY, "JPEG", {}, None),
    "cmyk.jpg": (RGB.convert("CMYK"), "JPEG", {}, None),
    "turned.jpg": (RGB, "JPEG", turned(6), None),
    "turned.png": (RGB, "PNG", turned(3), RGB.rotate(180)),
    "plain.png": (RGB, "PNG", {}, RGB),
    "palette.png": (RGB.convert("P"), "PNG", {}, RGB.convert("P")),
    "alpha.png": (ALPHA, "PNG", {}, RGB),
    "grey_alpha.png": (GREY.convert("LA"), "PNG", {}, GREY),
    "bits.png": (GREY.convert("1"), "PNG", {}, GREY.convert("1")),
    "grey16.png": (GREY16, "PNG", {}, GREY),
    "animated.png": (RGB, "PNG", frames(RGB), RGB),
    "plain.webp": (RGB, "WEBP", {"lossless": True}, RGB),
    "alpha.webp": (ALPHA, "WEBP", {"lossless": True, "exact": True}, RGB),
    "animated.webp": (RGB, "WEBP", {"lossless": True, **frames(RGB)}, RGB),
    "plain.bmp": (RGB, "BMP", {}, RGB),
    "plain.ppm": (RGB, "PPM", {}, RGB),
    "plain.tif": (RGB, "TIFF", {"compression": "tiff_lzw"}, RGB),
    "grey16.tif": (GREY16, "TIFF", {}, GREY),
    "plain.jp2": (RGB, "JPEG2000", {}, RGB),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_kind_of_file_becomes_its_rgb(tmp_path, reader):
    """To the byte; the resampling that follows is another matter, so each is looked at in its own size."""
    wanted = []
    for name, (image, kind, options, exact) in FILES.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        (tmp_path / name).write_bytes(buffer.getvalue())
        with Image.open(buffer) as opened:
            exact = exact or ImageOps.exif_transpose(opened)
        wanted.append(ImageOps.fit(exact.convert("RGB"), (min(exact.size),) * 2, Image.Resampling.BOX))
    (tmp_path / "rgb16.png").write_bytes(png16())
    wanted.append(ImageOps.fit(RGB, (36, 36), Image.Resampling.BOX))
    files = np.array([*FILES, "rgb16.png"])
    manifest = Manifest(tmp_path, files, np.zeros(len(files), np.int64), ("a",))
    loader = read_by(Loader(manifest, ViewsConfig(image_size=36, pad=0), len(files), 0), reader)
    ((_, (images,)),) = loader.sweep()
    for name, found, exact in zip(files, (images * 64 + 127.5).permute(0, 2, 3, 1).numpy(), wanted, strict=True):
        assert np.abs(found - np.asarray(exact, np.float32)).max() < 0.01, name


# -- views -------------------------------------------------------------------------------------------------------------


def measured(views):
    """Of views [B, 3, S, S], 0 to 255: what their crops, colours and squares change, each [B]."""
    grey = views.mean(dim=1)  # [B, S, S]
    size = grey.shape[-1]
    ramp = torch.linspace(-1, 1, size)
    return {
        "brightness": grey.mean(dim=(1, 2)),
        "contrast": grey.flatten(1).std(dim=1),
        "colour": (views.amax(dim=1) - views.amin(dim=1)).mean(dim=(1, 2)),
        "slope": (grey * ramp[:, None]).mean(dim=(1, 2)),
        "tilt": (grey * ramp).mean(dim=(1, 2)),
        "top": grey.flatten(1).quantile(0.95, dim=1),
        "bottom": grey.flatten(1).quantile(0.05, dim=1),
    }


LIKE = {  # settings, view
    "shifts": (ViewsConfig(image_size=32, pad=6), "weak"),
    "random parts": (ViewsConfig(image_size=32, crop="resized", flip=False), "weak"),
    "jitter": (ViewsConfig(image_size=32, pad=0, cutout=0), "strong"),
    "cut-out": (ViewsConfig(image_size=32, pad=0, jitter=0, cutout=0.5), "strong"),
    "randaugment": (ViewsConfig(image_size=32, pad=0, flip=False, cutout=0, strong="randaugment"), "strong"),
    "clean": (ViewsConfig(image_size=32, crop="resized"), "clean"),
}
MANY = 2000


@needs_dali
@pytest.mark.parametrize("what", LIKE)
def test_dalis_views_are_distributed_as_torchvisions(tmp_path, what):
    RGB.resize((80, 60), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    manifest = Manifest(tmp_path, np.array(["a.png"] * MANY), np.zeros(MANY, np.int64), ("a",))
    config, view = LIKE[what]
    found = []
    for reader in ("DALI", "torchvision"):
        loader = read_by(Loader(manifest, config, 250, 0), reader)
        found.append(measured(torch.cat([views for _, (views,) in loader.epoch(0, (view,))]) * 64 + 127.5))
    ours, theirs = found
    for name in ours:
        a, b = ours[name], theirs[name]
        spread = b.std()
        assert abs(a.mean() - b.mean()) < 0.15 * spread + 1, name  # grey levels, of 255
        assert abs(a.std() - spread) < 0.15 * spread + 0.2, name
        for q in (0.01, 0.99):
            assert abs(a.quantile(q) - b.quantile(q)) < spread + 1, name


@pytest.mark.parametrize("what", ["grey", "blur"])
def test_a_share_of_the_strong_views_is_grey_or_blurred(tmp_path, what):
    Image.fromarray(ROUGH).resize((80, 60), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    manifest = Manifest(tmp_path, np.array(["a.png"] * 600), np.zeros(600, np.int64), ("a",))
    plain = {"image_size": 32, "pad": 0, "flip": False, "jitter": 0, "cutout": 0}
    found = []
    for reader in ["torchvision"] + ["DALI"] * DALI:
        loader = read_by(Loader(manifest, ViewsConfig(**plain, **{what: 0.3}), 200, 0), reader)
        batches = list(loader.epoch(0, ("clean", "strong")))
        clean, strong = (torch.cat(views) * 64 + 127.5 for views in zip(*(views for _, views in batches), strict=True))
        changed = (strong - clean).abs().amax(dim=(1, 2, 3)) > 1
        assert 0.22 < changed.float().mean() < 0.38
        clean, strong = clean[0], strong[changed]
        if what == "grey":
            grey = (clean * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0)  # ITU-R BT.601
            assert (strong - grey).abs().max() < 1.6
        else:
            found.append(strong.flatten(1).std(dim=1) / clean.std())
            assert 0.5 < found[-1].min() and found[-1].max() < 1
    if len(found) == 2:
        (mean, spread), (other_mean, other_spread) = ((one.mean().item(), one.std().item()) for one in found)
        assert mean == pytest.approx(other_mean, abs=0.01) and spread == pytest.approx(other_spread, rel=0.3)
