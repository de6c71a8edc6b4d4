"""Images a second: our loader against DataLoader with torchvision v2, from the same files, on the same cores.

    python -m benchmarks.loader [--quick] [--images FOLDER] [--out benchmarks/results]

The candidates take turns in one process, a whole epoch each, so that a busy machine slows them alike; figures are
medians, ratios are of medians. Without --images the pictures are drawn.
"""

import argparse
import csv
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from flywheel_fast import env
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.memory import Memory
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.views import ViewsConfig

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
BATCH = 64
ONE, TWO, THREE = ("weak",), ("weak", "strong"), ("weak", "strong", "strong2")
SHIFTED = ViewsConfig(image_size=224, pad=16)
PARTS = ViewsConfig(image_size=224, crop="resized")
AUGMENTED = replace(PARTS, strong="randaugment")
MEASURES = [f"{who}_{what}" for who in ("ours", "torchvision") for what in ("p20", "median", "p80", "cpu_ms")]
FIELDS = ("images", "kept", "views", "batch", "cores", *MEASURES, "ratio", "ratio_of_cpu", "versions")


class Row(NamedTuple):
    images: str
    side: int | None  # of the squares that the files are, pixels; None: files as they are
    count: int
    config: ViewsConfig
    decoded: bool  # once, and kept in memory by both
    views: tuple[str, ...]


def plan(quick: bool):
    many, some, few = (256, 128, 64) if quick else (1280, 640, 256)
    for views in (ONE, THREE):
        yield Row("32 px", 32, many, ViewsConfig(image_size=32), True, views)
    for views in (ONE, THREE):
        yield Row("64 px JPEG", 64, some, ViewsConfig(image_size=64), False, views)
    for views in (ONE, TWO, THREE):
        yield Row("400 px JPEG to 224", None, few, PARTS, False, views)
    yield Row("400 px JPEG to 224, RandAugment", None, few, AUGMENTED, False, TWO)
    for views in (ONE, TWO, THREE):
        yield Row("224 px", None, few, SHIFTED, True, views)


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_pictures(folder: Path, count: int) -> None:
    """Smooth shapes and some grain, 400 x 533 pixels, about 30 kB: what photographs are to a decoder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        rough = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((533, 400), Image.BICUBIC)
        grain = rng.normal(scale=6, size=(400, 533, 1))
        pixels = np.clip(np.asarray(rough) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=80)


def manifest(source: Path, count: int, side: int | None, room: Path) -> Manifest:
    """`count` of the pictures in `source`, by turns; shrunk to squares of `side` pixels in a folder of `room`."""
    files = sorted(str(path) for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if side:
        (room / str(side)).mkdir()
        for number, file in enumerate(files):
            with Image.open(file) as image:
                small = ImageOps.fit(image.convert("RGB"), (side, side), Image.LANCZOS)
            files[number] = str(room / str(side) / f"{number:05}.jpg")
            small.save(files[number], quality=92)
    return Manifest(Path(), np.resize(np.array(files, dtype=object), count), np.zeros(count, np.int64), ("any",))


# -- candidates --------------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    """As fast as torchvision is: uint8 until the batch is complete, each image decoded once for all its views."""

    def __init__(self, row: Row, files: list[str]):
        config, side = row.config, row.config.cutout**2
        self.files, self.names, size = files, row.views, config.image_size
        if config.crop == "pad":
            self.whole = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
            crop = v2.RandomCrop(size, padding=config.pad, padding_mode="reflect")
        else:
            self.whole = v2.Identity()
            crop = v2.RandomResizedCrop(size, scale=(config.area, 1), antialias=True)
        weak = [crop, v2.RandomHorizontalFlip()]
        change = v2.RandAugment(2, 9) if config.strong == "randaugment" else v2.ColorJitter(*[config.jitter] * 3)
        self.weak = v2.Compose(weak)
        self.strong = v2.Compose([*weak, change, v2.RandomErasing(1.0, (side, side), (1.0, 1.0), value=127)])
        self.decoded = [self.open(file) for file in files] if row.decoded else None

    def open(self, file: str) -> torch.Tensor:
        return self.whole(decode_image(read_file(file), ImageReadMode.RGB))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple:
        image = self.decoded[i] if self.decoded else self.open(self.files[i])
        return i, *(self.weak(image) if name == "weak" else self.strong(image) for name in self.names)


def torchvision_epochs(row: Row, table: Manifest) -> Callable[[], None]:
    pictures = Pictures(row, table.files.tolist())
    loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=CORES, persistent_workers=True, prefetch_factor=4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (row.config.mean, row.config.std))

    def epoch() -> None:
        for _, *drawn in loader:
            for view in drawn:
                view.float().sub_(mean).div_(std)

    return epoch


def our_epochs(table: Manifest, config: ViewsConfig, decoded: bool, views: tuple[str, ...]) -> Callable[[], None]:
    loader = Loader(table, config, BATCH, seed=0, threads=CORES, memory=Memory(host=1e11) if decoded else None)

    def epoch() -> None:
        for _ in loader.epoch(0, views):
            pass

    return epoch


def steps(table: Manifest) -> dict[str, Callable[[], None]]:
    """A bare decode loop on every core, the floor of a pass over JPEG files; and DALI's operators, one by one."""
    from nvidia.dali import fn, pipeline_def, types

    files = [np.fromfile(file, np.uint8) for file in table.files]
    images = [decode_image(torch.from_numpy(file), ImageReadMode.RGB) for file in files]
    small = [v2.functional.resize(image, [224, 224]).permute(1, 2, 0).numpy().copy() for image in images]
    images = [image.permute(1, 2, 0).numpy().copy() for image in images]

    def decode(part: list[np.ndarray]) -> None:
        for content in part:
            decode_image(torch.from_numpy(content), ImageReadMode.RGB)

    def bare() -> None:
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(decode, [files[k::CORES] for k in range(CORES)]))

    def alone(given: list[np.ndarray], operator: Callable, layout: str | None = "HWC") -> Callable[[], None]:
        @pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
        def described():
            return operator(fn.external_source(name="given", layout=layout))

        pipeline = described()
        pipeline.build()

        def run() -> None:
            for at in range(0, len(given), BATCH):
                pipeline.feed_input("given", given[at : at + BATCH])
                pipeline.run()

        return run

    size, levels = [224, 224], {"mean": list(PARTS.mean), "std": list(PARTS.std)}
    uniform = fn.random.uniform

    def erase(x):
        anchor = uniform(range=[-PARTS.cutout / 2, 1 - PARTS.cutout / 2], shape=[2])
        shape = [PARTS.cutout] * 2
        return fn.erase(x, anchor=anchor, shape=shape, normalized=True, axis_names="HW", fill_value=127.5)

    def color_twist(x):
        names = ("brightness", "contrast", "saturation")
        return fn.color_twist(x, **{name: uniform(range=[1 - PARTS.jitter, 1 + PARTS.jitter]) for name in names})

    return {
        "libjpeg-turbo, bare": bare,
        "decoders.image": alone(files, fn.decoders.image, None),
        "random_resized_crop, 400 px to 224": alone(
            images, lambda x: fn.random_resized_crop(x, size=size, random_area=[PARTS.area, 1.0])
        ),
        "copy, 400 px: in all that take it": alone(images, fn.copy),
        "color_twist, 224 px": alone(small, color_twist),
        "erase, 224 px": alone(small, erase),
        "crop_mirror_normalize, 224 px": alone(
            small, lambda x: fn.crop_mirror_normalize(x, crop=size, output_layout="HWC", dtype=types.FLOAT, **levels)
        ),
        "copy, 224 px: in all that take it": alone(small, fn.copy),
        "pass, weak view": our_epochs(table, PARTS, False, ("weak",)),
        "pass, strong view": our_epochs(table, PARTS, False, ("strong",)),
        "pass, strong view by RandAugment": our_epochs(table, AUGMENTED, False, ("strong",)),
    }


# -- measuring ---------------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    p20: float  # images a second
    median: float
    p80: float
    cpu_ms: float  # of all cores, an image


def rates(candidates: dict[str, Callable[[], None]], count: int, repeats: int) -> dict[str, Rate]:
    """They take turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, candidate in candidates.items():
            start, cpu = time.perf_counter(), cpu_seconds()
            candidate()
            if turn:  # the first starts workers and builds graphs
                seconds[name].append((time.perf_counter() - start, cpu_seconds() - cpu))
    found = {}
    for name, pairs in seconds.items():
        wall, cpu = np.array(pairs).T
        found[name] = Rate(*np.quantile(count / wall, (0.2, 0.5, 0.8)).tolist(), 1e3 * float(np.median(cpu)) / count)
    return found


def cpu_seconds() -> float:
    """Of this process and its workers; a busy machine leaves this alone more than it does the clock."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(source: Path, room: Path, repeats: int, quick: bool) -> tuple[list[list], list[str]]:
    """Rows of loader.csv and lines of loader.md, which are printed as they come."""
    found = env.describe()
    versions = "; ".join(f"{name} {found[name]}" for name in ("flywheel-fast", "torch", "nvidia-dali-cuda130"))
    rows, lines = [], []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    pictures = "Drawn pictures" if source.is_relative_to(room) else "Photographs"
    say("# The loader against DataLoader with torchvision v2\n")
    say(f"{pictures}, {CORES} cores, batches of {BATCH}, median of {repeats} epochs in turns; {versions}.")
    say("CPU: milliseconds of all cores, an image. Kept: what both have in memory. Views: weak, strong, strong.\n")
    say("| images | kept | views | ours/s | torchvision/s | ratio | ours CPU | torchvision CPU | ratio of CPU |")
    say("|---|---|---|---|---|---|---|---|---|")
    tables: dict[tuple, Manifest] = {}
    for row in plan(quick):
        if (row.side, row.count) not in tables:
            tables[row.side, row.count] = manifest(source, row.count, row.side, room)
        table, kept = tables[row.side, row.count], "decoded" if row.decoded else "nothing"
        candidates = {
            "ours": our_epochs(table, row.config, row.decoded, row.views),
            "torchvision": torchvision_epochs(row, table),
        }
        ours, theirs = rates(candidates, row.count, repeats).values()
        del candidates  # ends the workers
        ratio, of_cpu = ours.median / theirs.median, theirs.cpu_ms / ours.cpu_ms
        named = [row.images, kept, len(row.views)]
        measured = [f"{x:.4g}" for x in (*ours, *theirs, ratio, of_cpu)]
        rows.append([*named, BATCH, CORES, *measured, versions])
        cells = [*named, f"{ours.median:,.0f}", f"{theirs.median:,.0f}", f"{ratio:.2f}"]
        say(f"| {' | '.join(map(str, cells))} | {ours.cpu_ms:.3f} | {theirs.cpu_ms:.3f} | {of_cpu:.2f} |")

    table = next(table for (side, _), table in tables.items() if side is None)
    found = rates(steps(table), len(table), repeats)
    bare = found["libjpeg-turbo, bare"]
    say("\nWhat limits: 400 px JPEG to 224, DALI's operators alone, and whole passes.\n")
    say("| what | images/s | of the bare decoder | CPU | of the bare decoder's |")
    say("|---|---|---|---|---|")
    for name, rate in found.items():
        share = f"{rate.median / bare.median:.0%} | {rate.cpu_ms:.3f} | {rate.cpu_ms / bare.cpu_ms:.2f}"
        say(f"| {name} | {rate.median:,.0f} | {share} |")
    return rows, lines


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, within a minute")
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs of about 400 pixels")
    parser.add_argument("--out", type=Path, help="folder for loader.csv and loader.md")
    chosen = parser.parse_args(words)
    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        if not chosen.images:
            (room / "drawn").mkdir()
            draw_pictures(room / "drawn", 64 if chosen.quick else 256)
        rows, lines = measure(chosen.images or room / "drawn", room, 1 if chosen.quick else 3, chosen.quick)
    if chosen.out:
        with open(chosen.out / "loader.csv", "w", newline="") as file:
            csv.writer(file).writerows([FIELDS, *rows])
        (chosen.out / "loader.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
