"""What a training would see of a data set, before it starts: `flywheel-fast data check` and `data noise`."""

import csv
import hashlib
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data import manifest, noise, noise_files, scan, sources
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.errors import BadInput

MOST_CLASSES = 30  # in a table
TILE, CAPTION, SHOWN = 112, 16, 64  # pixels, pixels, pictures of the contact sheet
CHUNK = 64  # images that a thread reads at a time


class Look(NamedTuple):
    """At one file."""

    digest: int = 0  # of the content, 64 bits; 0: there is none
    size: tuple[int, int] = (0, 0)  # 0: unknown
    format: str = ""
    tile: Image.Image | None = None


class Rows(NamedTuple):
    """All splits, the training split first."""

    root: Path
    files: np.ndarray  # [N] str
    labels: np.ndarray  # [N] int64
    split: np.ndarray  # [N] str
    classes: tuple[str, ...]

    def cells(self, row: int) -> tuple[str, str, str]:
        return str(self.files[row]), str(self.split[row]), self.classes[self.labels[row]]


def check(config: sources.DataConfig, out: Path, console: Console) -> None:
    """Says what is in the data set, decodes every image once, and writes bad_files.csv, duplicates.csv, contact.png and
    manifest.parquet into `out`. Noise and data.skip are not applied. Raises BadInput for a layout that is none."""
    splits = sources.load(replace(config, noise=NoiseConfig(), skip=None), present=False).splits()
    _say_classes(splits, console)
    rows = Rows(
        splits["train"].root,
        np.concatenate([part.files for part in splits.values()]),
        np.concatenate([part.labels for part in splits.values()]),
        np.repeat(list(splits), [len(part) for part in splits.values()]),
        splits["train"].classes,
    )
    looks = _look(rows, config.threads, console)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gone: list[scan.BadFile] = []
    broken: list[scan.BadFile] = []
    for name, part in splits.items():
        absent = sources.absent(part, config)
        gone += [scan.BadFile.of(part, row, name, "is missing") for row in absent.tolist()]
        present = np.setdiff1d(np.arange(len(part)), absent)
        broken += scan.broken(part, name, device, config.threads, present).values()
    groups = _duplicates(looks)
    _say_files(rows, looks, gone, broken, groups, console)

    scan.write(out / "bad_files.csv", gone + broken)
    names = ("file_name", "split", "label")
    pairs = ((*rows.cells(row), *rows.cells(group[0])) for group in groups for row in group[1:])
    _write_csv(out / "duplicates.csv", (*names, *(f"same_as_{name}" for name in names)), pairs)
    write_atomic(out / "contact.png", _contact_sheet(rows, looks))
    write_atomic(out / "manifest.parquet", manifest.to_parquet(splits["train"], splits["test"]))
    console.print(f"\nwritten to {out}: bad_files.csv, duplicates.csv, contact.png, manifest.parquet", markup=False)
    if broken:
        console.print("a training leaves the broken files out by itself", markup=False)
    if gone:
        console.print(f"leave the missing ones out of it by data.skip={out / 'bad_files.csv'}", markup=False)


# -- looking at every file ---------------------------------------------------------------------------------------------


def _look(rows: Rows, threads: int, console: Console) -> list[Look]:
    shown = set(_spread(rows.labels[rows.split == "train"]))

    def look_at(chunk: range) -> list[Look]:
        return [look(rows.root / rows.files[row], row in shown) for row in chunk]

    chunks = [range(at, min(at + CHUNK, len(rows.files))) for at in range(0, len(rows.files), CHUNK)]
    columns = (TextColumn("reading files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    looks: list[Look] = []
    with ThreadPoolExecutor(threads) as pool, Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(rows.files))
        try:
            for found in pool.map(look_at, chunks):
                looks += found
                bar.advance(task, len(found))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return looks


def look(path: Path, tile: bool = False) -> Look:
    """Content and header; `tile`: the picture too, small. Whether it can be trained on is for `scan` to say."""
    try:
        content = path.read_bytes()
    except OSError:
        return Look()
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) if content else 0
    try:
        with Image.open(io.BytesIO(content)) as image:
            size, kind = image.size, image.format
            if not tile:
                return Look(digest, size, kind)
            image.draft("RGB", (TILE, TILE))
            return Look(digest, size, kind, _tile(image))
    except Exception:  # every format has its own
        return Look(digest)


def _tile(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    return ImageOps.pad(image.convert("RGB"), (TILE, TILE), color="#F3F4F6")


def _spread(labels: np.ndarray) -> list[int]:
    """Rows of up to 64 pictures, the classes by turns."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    turn = np.arange(len(labels)) - first  # of each in its class
    return order[np.lexsort((labels[order], turn))][:SHOWN].tolist()


def _duplicates(looks: list[Look]) -> list[list[int]]:
    """Rows with the same content, in groups of two and more."""
    digests = np.array([look.digest for look in looks], dtype=np.uint64)
    order = np.argsort(digests, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(digests[order])) + 1)
    return sorted(group.tolist() for group in groups if len(group) > 1 and digests[group[0]])


def _contact_sheet(rows: Rows, looks: list[Look]) -> memoryview:
    from matplotlib import font_manager

    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 10)
    tiles = [(look.tile, rows.classes[rows.labels[row]]) for row, look in enumerate(looks) if look.tile]
    tiles.sort(key=lambda tile: rows.classes.index(tile[1]))
    across = 8
    sheet = Image.new("RGB", (across * TILE, -(-max(len(tiles), 1) // across) * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (tile, name) in enumerate(tiles):
        x, y = number % across * TILE, number // across * (TILE + CAPTION)
        sheet.paste(tile, (x, y))
        name = " ".join(name.split())
        draw.text((x + 2, y + TILE + 1), name if len(name) < 18 else f"{name[:16]}…", fill="#1F2328", font=font)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getbuffer()


def _write_csv(path: Path, header: tuple[str, ...], rows) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


# -- saying it ---------------------------------------------------------------------------------------------------------


def _say_classes(splits: dict[str, Manifest], console: Console) -> None:
    train = splits["train"]
    counts = np.stack([np.bincount(part.labels, minlength=len(train.classes)) for part in splits.values()], axis=1)
    order = np.argsort(-counts[:, 0], kind="stable")
    names = [train.classes[label] for label in order]
    table = Table(title=f"\n{train.root}", title_justify="left", box=None, pad_edge=False)
    table.add_column("class")
    for name in splits:
        table.add_column(name, justify="right")
    table.add_row(f"all {len(names)}", *(f"{len(part):,}" for part in splits.values()), style="bold")
    half = MOST_CLASSES // 2
    few = len(names) <= MOST_CLASSES
    for label in order if few else [*order[:half], None, *order[-half:]]:
        cells = ("...",) if label is None else (train.classes[label], *(f"{count:,}" for count in counts[label]))
        table.add_row(*map(Text, cells))
    console.print(table)
    most, least = counts[order[0], 0], counts[order[-1], 0]
    ratio = f"{most / least:.1f} times as many as" if least else "but none"
    console.print(f"imbalance: {names[0]!r} has {ratio} {names[-1]!r}", markup=False)
    for column, split in list(enumerate(splits))[1:]:
        untested = [train.classes[label] for label in np.flatnonzero(counts[:, column] == 0)]
        if untested:
            more = ", ..." if len(untested) > 3 else ""
            count = f"{len(untested)} of {len(names)} classes"
            console.print(f"warning: {count} have no {split} images: {', '.join(untested[:3])}{more}", markup=False)
    console.print("first rows:")
    for name, part in splits.items():
        for row in range(min(3, len(part))):
            console.print(f"  {name}  {part.files[row]}  {part.classes[part.labels[row]]}", markup=False)


def _say_files(
    rows: Rows,
    looks: list[Look],
    gone: list[scan.BadFile],
    broken: list[scan.BadFile],
    groups: list[list[int]],
    console: Console,
) -> None:
    known = [look for look in looks if look.format]
    said = []
    if known:
        sizes = np.array([look.size for look in known], dtype=np.int64)
        by_area = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]
        small, middle, large = (by_area[at] for at in (0, len(by_area) // 2, -1))
        said.append(("smallest, median, largest", ", ".join(f"{w} x {h}" for w, h in (small, middle, large))))
        formats = Counter(look.format for look in known)
        said.append(("formats", ", ".join(f"{name} {count:,}" for name, count in formats.most_common())))
    said += [("missing", f"{len(gone):,}"), ("unreadable", f"{len(broken):,}")]
    for bad in (gone + broken)[:3]:
        said.append(("  for example", f"{bad.file_name} {bad.problem}"))
    splits = [set(rows.split[group].tolist()) for group in groups]
    again = Counter()  # split -> files that are there already; of a group across splits none
    for group, of in zip(groups, splits, strict=True):
        again[next(iter(of)) if len(of) == 1 else ""] += len(group) - 1
    leaked = sum(
        int(np.sum(rows.split[group] != "train"))
        for group, of in zip(groups, splits, strict=True)
        if len(of) > 1 and "train" in of
    )
    apart = sum(len(np.unique(rows.labels[group])) > 1 for group in groups)
    in_each = ", ".join(f"{again[name]:,} in {name}" for name in dict.fromkeys(rows.split.tolist()))
    said.append(("same content again", in_each))
    said.append(("test images in train too", f"{leaked:,}"))
    if apart:
        said.append(("  same content, unlike labels", f"{apart:,} groups"))
    table = Table(title="\nfiles", title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, text in said:
        table.add_row(Text(name), Text(text))
    console.print(table)


# -- noise -------------------------------------------------------------------------------------------------------------


def say_noise(config: sources.DataConfig, write: Path | None, console: Console) -> None:
    """The realised noise on the whole training split; `write`: a file for its labels."""
    whole = replace(config, train_size=None, test_size=None, imbalance=1.0, skip=None)
    train = sources.load(whole, present=False).train
    if train.true_labels is None:
        raise BadInput(
            "data.noise.kind=none and no true labels: nothing to compare; give data.noise.kind=symmetric ..."
        )
    noisy, true, classes = train.labels, train.true_labels, train.classes
    if write:
        noise_files.write(write, noisy, true)
    digest = noise.digest(noisy)[:16]
    console.print(f"{np.mean(noisy != true):.2%} of {len(noisy):,} labels are wrong, sha256 {digest}", markup=False)
    for line in noise.describe(noise.realised(true, noisy, len(classes)), classes):
        console.print(line, markup=False)
    if write:
        console.print(f"written to {write}; data.noise.kind=file data.noise.file={write} reads it back", markup=False)
