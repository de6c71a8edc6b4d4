"""Features of every image of a data set by a frozen network: computed once, so that heads train in seconds.

The folder that is written holds features.npy [N, V, D] float16, its rows in the order of manifest.parquet (the training
split, then the test split), and about.json: the network, the views, a checksum. Cut off, it goes on where it stood.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from flywheel_fast import config as configs
from flywheel_fast import models
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data import scan, sources
from flywheel_fast.data.manifest import Manifest, to_parquet
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.sources.features import ABOUT, ARRAY, MANIFEST, digest
from flywheel_fast.errors import BadInput, Failure, Stopped
from flywheel_fast.learner import has_bf16
from flywheel_fast.pauses import Pauses
from flywheel_fast.run_folder import BAD_FILES
from flywheel_fast.trainer import Config, with_preprocessing

BLOCK = 128  # images from one save to the next
BATCH = 32  # images that the network sees at once


def embed(
    config: Config,
    out: Path,
    draws: int = 1,
    told: Callable[[float], None] = lambda seconds: None,
    pauses: Pauses | None = None,
) -> int:
    """Writes the features of all images of the config's data by its main network; returns of how many.

    `draws`: weak and strong views of each training image, beside the clean one; of a test image the clean one is all.
    `told` is given the seconds that are left, once the first images are done. Raises BadInput for a network without
    pretrained weights and for an `out` that holds something else, Failure where an output is not finite, Stopped
    between two blocks where `pauses` want it.
    """
    if config.model.main.weights is None:
        raise BadInput("a fresh network sees nothing in images: give pretrained weights by model.main.weights")
    config = with_preprocessing(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits, bad = {}, []
    data = sources.load(config.data)
    for split, part in {"train": data.train, "test": data.test}.items():
        splits[split], broken = scan.without_broken(part, split, device, config.data.threads)
        bad += broken
    frozen = Frozen(config, device)
    passes = [("clean", "weak", "strong"), *[("weak", "strong")] * (draws - 1)] if draws else [("clean",)]
    store = _Store(out, config, splits, [view for views in passes for view in views], frozen)
    if bad:
        scan.write(out / BAD_FILES, bad)
    loaders = {
        split: Loader(part, config.views, BATCH, config.seed, device, config.data.threads)
        for split, part in splits.items()
    }
    blocks = [(split, at) for split, part in splits.items() for at in range(0, len(part), BLOCK)]
    left = blocks[store.done :]
    begun = time.perf_counter()
    for split, at in track(left, f"embedding {store.images:,} images", transient=True):
        rows = np.arange(at, min(at + BLOCK, len(splits[split])))
        seen = passes if split == "train" else [("clean",)]
        draw = store.done * len(passes)
        features = [frozen.see(loaders[split], rows, views, draw + k) for k, views in enumerate(seen)]
        first = at + (len(splits["train"]) if split == "test" else 0)
        store.add(np.concatenate(features, axis=1), splits[split], rows, first)
        if pauses and pauses.stop():
            done = f"{store.done} of {len(blocks)} blocks of {BLOCK} images"
            raise Stopped(f"stopped after {done}, which are saved; the same command goes on from there")
        if (split, at) == left[0]:
            told((time.perf_counter() - begun) * len(left))
    store.finish()
    return store.images


class Frozen:
    """The config's main network up to its head, in evaluation mode."""

    def __init__(self, config: Config, device: torch.device):
        built = models.build(config.model.main, 1, config.views.image_size, seed=0)
        self.width, self.device = built.num_features, device
        self.network = built.backbone.to(device, memory_format=torch.channels_last).eval()
        sha = hashlib.sha256()
        for name, weights in built.backbone.state_dict().items():
            sha.update(name.encode() + weights.cpu().numpy().tobytes())
        self.digest = sha.hexdigest()

    @torch.inference_mode()
    def see(self, loader: Loader, rows: np.ndarray, views: tuple[str, ...], draw: int) -> np.ndarray:
        """Features [n, V, D] float16 of these samples [n]; views are drawn anew for another `draw`."""
        found = [[] for _ in views]
        with torch.autocast(self.device.type, torch.bfloat16) if has_bf16(self.device) else nullcontext():
            for _, images in loader.of(rows, views, draw):
                for view, features in zip(images, found, strict=True):
                    seen = self.network(view.contiguous(memory_format=torch.channels_last))
                    features.append(seen.half().cpu())
        return np.stack([torch.cat(features).numpy() for features in found], axis=1)


class _Store:
    """The folder: `images` in it when all is done, and how many blocks of them are."""

    def __init__(self, out: Path, config: Config, splits: dict[str, Manifest], views: list[str], frozen: Frozen):
        self.out, self.images = out, sum(map(len, splits.values()))
        self.about = {
            "images": self.images,
            "views": views,
            "weights": frozen.digest,
            "data": hashlib.sha256("".join(part.digest for part in splits.values()).encode()).hexdigest(),
            "root": str(splits["train"].root.resolve()),
            "classes": splits["train"].classes,
            "config": configs.dump(config),
        }
        kept = self._kept()
        self.done = kept.get("blocks", 0)
        shape = (self.images, len(views), frozen.width)
        if kept:
            changed = [name for name in ("data", "views", "weights") if kept.get(name) != self.about[name]]
            if changed:
                raise BadInput(
                    f"-o {out}: holds features of other {changed[0]}; name another folder, or remove this one"
                )
        if self.done:
            self.array = np.lib.format.open_memmap(out / ARRAY, mode="r+")
            return
        self._save()
        try:
            self.array = np.lib.format.open_memmap(out / ARRAY, mode="w+", dtype=np.float16, shape=shape)
        except OSError as error:
            raise Failure(f"{out / ARRAY}: cannot be written ({error.strerror})") from error
        write_atomic(out / MANIFEST, to_parquet(splits["train"], splits["test"]))

    def _kept(self) -> dict:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return {}
        try:
            return json.loads((self.out / ABOUT).read_bytes())
        except (OSError, ValueError) as error:
            raise BadInput(f"-o {self.out}: holds something other than features; name another folder") from error

    def add(self, features: np.ndarray, manifest: Manifest, samples: np.ndarray, first: int) -> None:
        """A block: features [n, V, D] of these samples [n], for the rows from `first` on; views that were not looked at
        are the first one."""
        broken = np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))
        if len(broken):
            name = manifest.root / manifest.files[samples[broken[0]]]
            raise Failure(
                f"{name}: the network's output is not finite; other weights, or views.mean and .std, may help"
            )
        whole = features.shape[1] == self.array.shape[1]
        self.array[first : first + len(samples)] = features if whole else features[:, :1]
        self.array.flush()
        self.done += 1
        self._save()

    def finish(self) -> None:
        self.about["sha256"] = digest(self.array)
        self._save()

    def _save(self) -> None:
        write_atomic(self.out / ABOUT, json.dumps(self.about | {"blocks": self.done}, indent=2).encode())
