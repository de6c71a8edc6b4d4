"""How much memory may hold images from one epoch to the next, and how much they would need."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.views import ViewsConfig

SHARES = {"host": 0.5, "device": 0.25}  # of what is free before the networks are made, which need most of a GPU
UNTOLD = 4e9  # bytes taken to be free where the system does not tell
SAMPLE, MARGIN = 256, 1.1  # files looked at to estimate all, and what that may be wrong by


class Memory:
    """Bytes that images may take, on the host and on the device. All loaders of a training share it: the first one is
    served first."""

    def __init__(self, host: float = 0, device: float = 0, terms: str = ""):
        self.room, self.terms = {"host": host, "device": device}, terms

    @classmethod
    def free(cls, device: torch.device | str, cache_gb: float | None, processes: int = 1) -> "Memory":
        """A share of what is free now, or `cache_gb` where there is so much; `processes` of this machine do the same.

        The CPU is no device beside the host: `device` is 0 then.
        """
        has_device = torch.device(device).type == "cuda"
        room = {"host": free_on_host() / processes, "device": torch.cuda.mem_get_info(device)[0] if has_device else 0}
        for where, share in SHARES.items():
            room[where] = share * room[where] if cache_gb is None else min(cache_gb * 1e9, room[where])
        told = [f"{size_text(room[where])} of {where} memory" for where in ("device", "host")[not has_device :]]
        source = "a share of what is free" if cache_gb is None else f"data.cache_gb={cache_gb:g}"
        return cls(**room, terms=f"up to {' and '.join(told)}: {source}")


def free_on_host(system: Path = Path("/")) -> float:
    """Bytes that programs can still have: of the machine, and of the container or job that this process is in."""
    try:
        lines = (system / "proc/meminfo").read_text().splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return UNTOLD
    return max(min([machine, *_left_in_groups(system)]), 0)


def _left_in_groups(system: Path) -> Iterator[int]:
    """Bytes left in each control group that limits this process, of version 1 or 2."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers == "":
            base, files, kind = system / "sys/fs/cgroup", ("memory.max", "memory.current"), ""
        elif controllers == "memory":
            base, kind = system / "sys/fs/cgroup/memory", "total_"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(base.parts)]):  # any above may be the tightest
            try:
                limit, used = (int((folder / file).read_text()) for file in files)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit - used + sum(int(stat[f"{kind}{which}_file"]) for which in ("active", "inactive"))
            except (OSError, ValueError, KeyError):  # no such group in this container, or no limit
                continue


def needed(manifest: Manifest, views: ViewsConfig) -> tuple[float, float]:
    """Bytes of all images decoded, as `views` needs them, and of all files: by a sample, and rather too many."""
    rows = np.random.default_rng(0).permutation(len(manifest))[:SAMPLE]
    sizes = np.array([_sizes(manifest.root / file) for file in manifest.files[rows].tolist()])
    decoded, encoded = sizes.mean(axis=0) * len(manifest) * (1 if len(rows) == len(manifest) else MARGIN)
    if views.crop == "pad":
        decoded = 3 * (views.image_size + 2 * views.pad) ** 2 * len(manifest)
    return float(decoded), float(encoded)


def _sizes(path: Path) -> tuple[int, int]:
    """Bytes of the image, by its header, and of its file."""
    try:
        with Image.open(path) as image:
            return 3 * image.width * image.height, path.stat().st_size
    except Exception:  # every format has its own; who decodes the file names it
        return 0, 0


def size_text(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
