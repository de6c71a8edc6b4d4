"""The network of a finished run at work: classes of new pictures, and how many of a labelled set it gets right."""

import csv
import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flywheel_fast import config as configs
from flywheel_fast import models
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data import scan
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.sources import SOURCES
from flywheel_fast.data.sources.folders import IMAGE_SUFFIXES
from flywheel_fast.errors import BadInput, Failure
from flywheel_fast.learner import Learner
from flywheel_fast.trainer import Config


class Predictor:
    """The inference network of a run, with its preprocessing, precision and class names.

    Raises BadInput where the folder holds no finished run.
    """

    def __init__(self, run: Path):
        path = run / "weights" / "model.safetensors"
        try:
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
                about = json.loads(file.metadata()["flywheel_fast"])
                self.classes, text = tuple(about["classes"]), about["config"]
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise BadInput(f"{path}: is not the network of a finished run ({error}); name a run folder") from error
        self.config = config = configs.parse(Config, text, f"{path}")
        if config.data.source == "features":
            raise BadInput(f"{path}: is a head on features that were computed elsewhere; it takes no images")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, projection = config.model.main, 0
        if config.cycle.kind == "flywheel":
            network, projection = config.model.aux or network, 128 if config.cycle.contrastive > 0 else 0
        fresh = replace(network, weights=None)
        built = models.build(fresh, len(self.classes), config.views.image_size, seed=0, projection=projection)
        self.learner = Learner(built, config.optim, steps_per_epoch=1, device=self.device)
        self.learner.ema.module.load_state_dict(weights)

    def probabilities(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Probabilities [K, C] float32 of the K files that can be read, which ones they are [K], and what broke."""
        logits, index, broken = self._outputs(files, None, len(self.classes))
        return logits.softmax(dim=1).numpy(), index, broken

    def features(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """What the head sees, [K, D] float32, of the K files that can be read; and which ones they are [K]."""
        network = self.learner.ema.module
        found, index, _ = self._outputs(files, network.backbone, network.num_features)
        return found.numpy(), index

    def _outputs(self, files: list[Path], part: nn.Module | None, width: int) -> tuple[Tensor, np.ndarray, list[str]]:
        """Of the network, or of a part that takes images too: [K, width] float32."""
        names, threads = np.array([str(file) for file in files]), self.config.data.threads
        manifest = Manifest(Path(), names, np.zeros(len(files), np.int64), self.classes)
        refused = scan.broken(manifest, "given", self.device, threads)
        index = np.array([row for row in range(len(files)) if row not in refused], dtype=np.int64)
        found = [torch.empty(0, width)]
        if len(index):
            loader = Loader(manifest.subset(index), self.config.views, 1, 0, self.device, threads)
            found += [self.learner.predict(clean, part).float().cpu() for _, (clean,) in loader.sweep()]
        return torch.cat(found), index, [f"{one.file_name}: {one.problem}" for one in refused.values()]


def find_images(words: list[str]) -> list[Path]:
    """Files as named, and every image below the folders. Raises BadInput for a path that is not there."""
    files: list[Path] = []
    for path in map(Path, words):
        if path.is_dir():
            below = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
            files += sorted(file for file in below if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.exists():
            files.append(path)
        else:
            raise BadInput(f"{path}: does not exist; name image files, or folders of them")
    if not files:
        raise BadInput(f"{', '.join(words)}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def predict(run: Path, words: list[str], out: Path, top: int = 3) -> int:
    """Writes a row a picture, its likeliest `top` classes with their probabilities; returns how many rows.

    Raises Failure, after the rest has been written, naming the files that cannot be read.
    """
    predictor, files = Predictor(run), find_images(words)
    probabilities, index, broken = predictor.probabilities(files)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    text = io.StringIO()
    writer = csv.writer(text)
    ranks = range(1, best.shape[1] + 1)
    writer.writerow(["file_name", *(f"{name}_{rank}" for rank in ranks for name in ("label", "prob"))])
    for i, row, classes in zip(index, probabilities, best, strict=True):
        writer.writerow([files[i], *(cell for k in classes for cell in (predictor.classes[k], f"{row[k]:.6f}"))])
    write_atomic(out, text.getvalue().encode())
    _fail_for(broken, f"the other {len(index):,} are in {out}")
    return len(index)


@dataclass(frozen=True)
class Evaluation:
    split: str  # what was looked at
    count: int
    accuracy: float
    by_class: list[tuple[str, int, float]]  # class, images, share of them that is right; the worst first


def evaluate(run: Path, data: Path) -> Evaluation:
    """How many labels of a folder or CSV file, of its test split where it has one, the network agrees with.

    Raises BadInput for a class that the network does not know, Failure for files that cannot be read.
    """
    predictor = Predictor(run)
    train, test = SOURCES["folder" if data.is_dir() else "csv"](data)
    manifest = train if test is None else test
    unknown = sorted(set(manifest.classes) - set(predictor.classes))
    if unknown:
        known = len(predictor.classes)
        raise BadInput(f"{data}: class {unknown[0]!r} is none of the {known} that {run} has learnt; leave it out")
    labels = np.array([predictor.classes.index(name) for name in manifest.classes])[manifest.labels]  # [N]
    probabilities, index, broken = predictor.probabilities([manifest.root / file for file in manifest.files])
    _fail_for(broken, "replace them, or take them out of the data set")
    right = probabilities.argmax(axis=1) == labels[index]
    by_class = [
        (name, int((labels == k).sum()), float(right[labels == k].mean()))
        for k, name in enumerate(predictor.classes)
        if (labels == k).any()
    ]
    split = "all images" if test is None else "test split"
    return Evaluation(split, len(labels), float(right.mean()), sorted(by_class, key=lambda row: row[2]))


def _fail_for(broken: list[str], what_now: str) -> None:
    if broken:
        more = f", and {len(broken) - 5:,} more" if len(broken) > 5 else ""
        raise Failure(f"{'; '.join(broken[:5])}{more}; {what_now}")
