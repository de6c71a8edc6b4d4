"""WebVision's second test set in the forms that people have it in, and accuracy among the first five."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from scipy.io import savemat

from flywheel_fast.data.sources import load
from flywheel_fast.distributed import ALONE
from flywheel_fast.measures import TOP5_FROM, Measures

DEVKIT = "ILSVRC2012_devkit_t12/data"


@pytest.fixture
def unpacked(miniature):
    """The miniature with ImageNet's images in one folder, as its archive has them; and what the class folders gave."""
    config = miniature("webvision_mini")
    expected = {Path(file).name: label for file, label in samples(config)}
    base = Path(config.root) / "imagenet"
    for path in list((base / "val").rglob("*.JPEG")):
        shutil.copy(path, base)
    wnid_of = {path.name: path.parent.name for path in (base / "val").rglob("*.JPEG")}
    shutil.rmtree(base / "val")
    (base / "val").mkdir()
    for name in wnid_of:
        (base / name).rename(base / "val" / name)
    return config, base, dict(sorted(wnid_of.items())), expected


def samples(config):
    imagenet = load(config).imagenet
    return zip(imagenet.files.tolist(), imagenet.labels.tolist(), strict=True)


def write_kaggle(base, wnid_of):
    """Some images have several boxes."""
    boxes = [f"{wnid} 1 2 3 4 " * (1 + number % 2) for number, wnid in enumerate(wnid_of.values())]
    lines = [f"{name.removesuffix('.JPEG')},{row}" for name, row in zip(wnid_of, boxes, strict=True)]
    lines = [lines[row] for row in np.random.default_rng(0).permutation(len(lines))]
    (base / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")


def write_devkit(folder, wnid_of):
    """Numbers by an order of their own, then the inner nodes of WordNet's tree."""
    folder.mkdir(parents=True, exist_ok=True)
    wnids = [*np.random.default_rng(1).permutation(sorted(set(wnid_of.values()))).tolist(), "n00001740"]
    number_of = {wnid: number + 1 for number, wnid in enumerate(wnids)}
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, wnid, f"thing {number}", 0) for wnid, number in number_of.items()]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=fields)[:, None]})
    lines = [str(number_of[wnid]) for wnid in wnid_of.values()]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("form", ["kaggle", "devkit", "devkit's files"])
def test_images_in_one_folder_have_the_labels_of_the_class_folders(unpacked, form):
    config, base, wnid_of, expected = unpacked
    if form == "kaggle":
        write_kaggle(base, wnid_of)
    else:
        write_devkit(base / DEVKIT if form == "devkit" else base, wnid_of)
    found = dict(samples(config))
    assert {Path(file).name: label for file, label in found.items()} == expected and len(found) == 50
    assert all((Path(config.root) / file).is_file() for file in found)
    (base / "val" / "ILSVRC2012_val_00000007.JPEG").unlink()
    refused(config, base / "val" / "ILSVRC2012_val_00000007.JPEG", "does not exist")


def test_labels_of_imagenet_that_are_none_are_named(unpacked):
    config, base, wnid_of, _ = unpacked
    refused(config, base / "val", "holds no class folders", "LOC_val_solution.csv", "ILSVRC2012_devkit_t12")
    write_devkit(base / DEVKIT, wnid_of)
    truth, meta = base / DEVKIT / "ILSVRC2012_validation_ground_truth.txt", base / DEVKIT / "meta.mat"
    lines = truth.read_text().splitlines()
    truth.write_text("\n".join([*lines[:4], "1001", *lines[5:]]))
    refused(config, truth, "line 5: '1001' is no ILSVRC2012_ID", meta)
    for content in (b"", b"no table" * 99, meta.read_bytes()[:300]):
        meta.write_bytes(content)
        refused(config, meta, "is not the devkit's table of synsets", "unpack the devkit again")
    write_kaggle(base, wnid_of)
    table = base / "LOC_val_solution.csv"
    text = table.read_text()
    table.write_text(text.replace(",n0", ",m0", 1))
    refused(config, table, "class 'm0", "synsets.txt", "WordNet id")
    table.write_text(text.replace("ILSVRC2012_val_00000009,", "../ILSVRC2012_val_00000009,"))
    refused(config, table, "is not a path below the data root")
    table.write_text(text + text.splitlines()[3] + "\n")
    refused(config, table, "line 62 names", "again")
    table.write_text(text.replace("PredictionString", "Boxes"))
    refused(config, table, "PredictionString", "Boxes")


@pytest.mark.parametrize("classes", [TOP5_FROM - 1, TOP5_FROM])
def test_accuracy_among_the_first_five(classes):
    """Three images, whose class is the likeliest, the fifth, the sixth."""
    logits = torch.linspace(1, 0, classes).repeat(3, 1)
    learner = SimpleNamespace(predict=lambda views: logits[views])
    measures = SimpleNamespace(
        test_sets={"test": SimpleNamespace(labels=np.array([0, 4, 5]), classes=range(classes))},
        loaders={"test": SimpleNamespace(sweep=lambda: ((row, (row,)) for row in torch.arange(3).split(1)))},
        cycle=SimpleNamespace(learners=lambda: {"aux": learner}, group=ALONE),
        device=torch.device("cpu"),
    )
    top5 = {"test_top5_aux": 2 / 3} if classes >= TOP5_FROM else {}
    assert Measures._accuracy(measures, "test") == pytest.approx({"test_acc_aux": 1 / 3} | top5)
