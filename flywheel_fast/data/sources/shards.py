"""WebDataset: tar files in which the files of a sample follow each other and share their name up to the first dot."""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from flywheel_fast.data.manifest import Manifest, leads_out
from flywheel_fast.data.sources import cache, tables
from flywheel_fast.data.sources.folders import IMAGE_SUFFIXES, TEST_FOLDERS
from flywheel_fast.errors import BadInput

TABLE = "flywheel-fast.csv"


def read(root: Path) -> tuple[Manifest, Manifest | None]:
    """root/*.tar, or root/train/*.tar and root/test/*.tar; each sample with an image and its label in KEY.cls, or as
    "label" in KEY.json. A shard whose name or folder begins with test or val is of the test split.

    They are unpacked into the cache, once: that takes their size again on the disk.
    """
    shards = sorted(path for pattern in ("*.tar", "*/*.tar") for path in root.glob(pattern))
    if not shards:
        raise BadInput(f"{root}: holds no .tar files, nor do the folders in it; data.root must be the folder of shards")
    sha = hashlib.sha256()
    for shard in shards:
        stat = shard.stat()
        sha.update(f"{shard.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return tables.read(cache.made_once(f"webdataset-{sha.hexdigest()[:16]}", _unpacked(root, shards)) / TABLE)


def _unpacked(root: Path, shards: list[Path]) -> Iterator[tuple[str, bytes]]:
    """The images of all shards, and at last the table of them."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("file_name", "label", "split"))
    for shard in shards:
        within = shard.relative_to(root)
        split = "test" if any(part.startswith(TEST_FOLDERS) for part in within.parts) else "train"
        for key, fields in _samples(shard):
            suffix = next((suffix for suffix in fields if suffix in IMAGE_SUFFIXES), None)
            if suffix is None:
                raise BadInput(f"{shard}: sample {key!r} has no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            name = f"{within.with_suffix('')}/{key}{suffix}"
            writer.writerow((name, _label(shard, key, fields), split))
            yield name, fields[suffix]
    yield TABLE, text.getvalue().encode()


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key, and content by suffix, of each sample."""
    key, fields = None, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if leads_out(member.name) or not member.isfile():
                    raise BadInput(f"{shard}: {member.name!r} leads out of the shard; make the shard of files only")
                folder, slash, last = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = last.partition(".")
                if not stem:  # a hidden file
                    continue
                if folder + slash + stem != key:
                    if fields:
                        yield key, fields
                    key, fields = folder + slash + stem, {}
                fields[(dot + suffix).lower()] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"{shard}: is no tar file, or is cut off ({error}); make it anew, without compression"
        ) from error
    except OSError as error:
        raise BadInput(f"{shard}: cannot be read ({error})") from error
    if fields:
        yield key, fields


def _label(shard: Path, key: str, fields: dict[str, bytes]) -> str:
    try:
        label = fields[".cls"].decode() if ".cls" in fields else json.loads(fields.get(".json", b"{}")).get("label")
    except (ValueError, AttributeError):  # no text, no JSON, or JSON that is no object
        label = None
    if label is None or not str(label).strip():
        raise BadInput(
            f'{shard}: sample {key!r} has no label; it is expected in {key}.cls, or as "label" in {key}.json'
        )
    return str(label).strip()
