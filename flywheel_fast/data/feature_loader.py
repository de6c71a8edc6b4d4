"""Batches of features, in the place of images: the same orders, the same parts of each process."""

from collections.abc import Iterator

import numpy as np
import torch

from flywheel_fast.data.manifest import DROPPED, Manifest
from flywheel_fast.data.memory import size_text
from flywheel_fast.data.pipelines import Batch, Loader
from flywheel_fast.data.sources.features import Features

SWEEP_BATCH = 4096


class FeatureLoader(Loader):
    """Each view [B, D] float32 is one of those that were embedded, drawn anew for each sample and epoch."""

    def __init__(
        self,
        features: Features,
        manifest: Manifest,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        balanced_batches: int | None = None,
    ):
        self.features, self.manifest, self.batch_size, self.seed = features, manifest, batch_size, seed
        self.device, self.rank, self.world, self.balanced_batches = torch.device(device), rank, world, balanced_batches
        everything = np.arange(len(manifest))
        self.used = everything if manifest.reviewed is None else everything[manifest.reviewed != DROPPED]
        self.rows = features.rows(manifest)  # [n] int64, of each sample
        self.sweep_batch, self.reader = SWEEP_BATCH, "features"
        _, views, width = features.array.shape
        self.kept = f"features of {width} dimensions, {views} views, {size_text(features.array.nbytes)} on disk"

    def _batches(
        self, pieces: list[np.ndarray], views: tuple[str, ...], epoch: int = 0, start: int = 0
    ) -> Iterator[Batch]:
        columns = [self.features.columns(view) for view in views]
        for number, piece in enumerate(pieces[start:], start):
            drawn = np.random.default_rng((self.seed, epoch, self.rank, number))
            rows = self.rows[piece]
            seen = tuple(self._view(rows, drawn.choice(of, len(piece)) if len(of) > 1 else of[0]) for of in columns)
            yield Batch(torch.from_numpy(piece).to(self.device), seen)

    def _view(self, rows: np.ndarray, column: np.ndarray | int) -> torch.Tensor:  # [B, D] float32
        return torch.from_numpy(self.features.array[rows, column]).to(self.device).float()
