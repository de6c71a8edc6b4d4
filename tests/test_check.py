"""Label files of others, `data check` and `data noise`, and every config tried on its miniature."""

import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, KIND_OF, refused
from PIL import Image
from rich.console import Console

from flywheel_fast import cli
from flywheel_fast.data import check
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.errors import BadInput


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet", "clothing1m", "webvision"])
def test_every_config_trains_to_the_end_on_its_miniature(miniatures, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    root = miniatures / KIND_OF.get(name, name)
    small = ["model.main.name=small_cnn", "model.main.width=8", "model.main.weights=null", "views.image_size=32"]
    words = [f"data.root={root}", *small, "optim.epochs=2", "cycle.warmup=1", "optim.batch_size=32"]
    words += ["data.source=cifar10"] * (name == "cifar10")  # the config is for class folders
    words += ["optim.balanced_batches=4"] * (name == "clothing1m")  # in place of 1000
    assert cli.main(["train", f"configs/{name}.yaml", *words]) == 0
    with open(tmp_path / "runs" / name / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert bool(last["imagenet_acc_aux"]) == (name == "webvision") and last["test_acc_aux"]
    assert ("imagenet_acc_main" in json.loads((tmp_path / "runs" / name / "result.json").read_bytes())) == (
        name == "webvision"
    )
    said = (tmp_path / "runs" / name / "train.log").read_text()
    assert said.count("all but vanished") <= 8  # after the warm-up, and after the cycle
    assert bool(last["imagenet_top5_aux"]) == (name == "webvision")
    assert bool(last["test_top5_main"]) == (name in ("webvision", "cifar100"))
    with open(tmp_path / "runs" / name / "labels" / "issues.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == {"cifar100": 400, "tiny_imagenet": 120, "clothing1m": 112}.get(
            name, 200
        )


class _Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


# -- label files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def human(miniatures):
    """The labels of a miniature CIFAR-10 and what people might have called them."""
    config = DataConfig("cifar10", str(miniatures / "cifar10"))
    clean = load(config).train.labels
    rng = np.random.default_rng(0)
    names = ("aggre_label", "worse_label", "random_label1")
    noisy = {name: np.where(rng.random(200) < 0.3, rng.integers(10, size=200), clean) for name in names}
    return config, {"clean_label": clean, **noisy}


def with_noise(config, path, key="worse_label"):
    return load(replace(config, noise=NoiseConfig("file", file=str(path), key=key)))


def test_cifar_n_as_published(human, tmp_path):
    config, labels = human
    torch.save(labels, tmp_path / "CIFAR-10_human.pt")
    torch.save({name: torch.from_numpy(one) for name, one in labels.items()}, tmp_path / "tensors.pt")
    np.savez(tmp_path / "human.npz", **labels)
    order = np.random.default_rng(1).permutation(200)  # row i is image order[i]
    ordered = {name: one[order] for name, one in labels.items()}
    np.save(tmp_path / "CIFAR-10_human_ordered.npy", ordered, allow_pickle=True)
    with pytest.raises(BadInput, match=r"its order is another; CIFAR-N's .npy needs image_order_c10.npy"):
        with_noise(config, tmp_path / "CIFAR-10_human_ordered.npy")
    np.save(tmp_path / "image_order_c10.npy", order)
    for name in ("CIFAR-10_human.pt", "tensors.pt", "human.npz", "CIFAR-10_human_ordered.npy"):
        train = with_noise(config, tmp_path / name).train
        assert np.array_equal(train.labels, labels["worse_label"]), name
        assert np.array_equal(train.true_labels, labels["clean_label"])
    with pytest.raises(BadInput, match="data.noise.key=None.*choose aggre_label, worse_label, random_label1"):
        with_noise(config, tmp_path / "CIFAR-10_human.pt", key=None)


def test_label_files_with_a_program_in_them_are_refused(human, tmp_path, monkeypatch):
    config, _ = human
    monkeypatch.chdir(tmp_path)
    torch.save({"worse_label": _Evil()}, tmp_path / "evil.pt")
    np.save(tmp_path / "evil.npy", {"worse_label": _Evil()}, allow_pickle=True)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "broken.json").write_text("[1, 2")
    (tmp_path / "ragged.json").write_text("[[1], [2, 3]]")
    for name in ("evil.pt", "evil.npy", "broken.pt", "broken.npz", "broken.json", "ragged.json"):
        with pytest.raises(BadInput, match=name):
            with_noise(config, tmp_path / name)
    assert not (tmp_path / "harmed").exists()


def test_noise_is_written_for_others_and_read_back(human, tmp_path, capsys):
    config, _ = human
    noisy = replace(config, noise=NoiseConfig("symmetric", 0.4))
    expected = load(noisy).noisy_labels
    console = Console(highlight=False, width=120)
    for name in ("dividemix.json", "human.npy", "labels.npz"):
        check.say_noise(noisy, tmp_path / name, console)
        assert np.array_equal(with_noise(config, tmp_path / name, key=None).noisy_labels, expected)
    wrong = np.mean(expected != load(config).train.labels)
    said = capsys.readouterr().out
    assert f"{wrong:.2%} of 200 labels are wrong" in said and "9 truck" in said
    assert json.loads((tmp_path / "dividemix.json").read_text()) == expected.tolist()
    published = np.load(tmp_path / "human.npy", allow_pickle=True).item()  # as CIFAR-N's own code reads it
    assert np.array_equal(published.get("noisy_label"), expected)
    with pytest.raises(BadInput, match="human.npy: is there already"):
        check.say_noise(noisy, tmp_path / "human.npy", console)
    with pytest.raises(BadInput, match="must end in .json, .npy, .npz"):
        check.say_noise(noisy, tmp_path / "human.txt", console)
    with pytest.raises(BadInput, match="no true labels"):
        check.say_noise(config, None, console)


# -- data check --------------------------------------------------------------------------------------------------------


def test_check_finds_what_is_broken_and_a_training_goes_without(miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = miniature("clothing1m")
    root = Path(config.root)
    train, test, *_ = load(config)
    cut, text, gone, twice, gif = (root / file for file in train.files[:5].tolist())
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    text.write_text("no image")
    gone.unlink()
    shutil.copy(root / test.files[0], twice)
    shutil.copy(root / train.files[6], root / train.files[5])
    Image.new("RGB", (9, 9)).save(gif, "GIF")
    words = ["configs/clothing1m.yaml", f"data.root={root}"]
    assert cli.main(["train", *words]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["data", "check", *words]) == 0
    said = capsys.readouterr().out
    for line in ("missing +1", "unreadable +3", "all 14 +112 +28", "1 in train, 0 in test", "images in train too +1 "):
        assert re.search(line, said), said
    out = tmp_path / "checks" / "clothing1m"
    bad = {row["file_name"]: row["problem"] for row in csv.DictReader(open(out / "bad_files.csv", newline=""))}
    assert list(bad) == [str(path.relative_to(root)) for path in (gone, cut, text, gif)]
    assert [
        next(iter(set(problem.split()) & {"truncated", "identify", "missing", "GIF,"})) for problem in bad.values()
    ] == (["missing", "truncated", "identify", "GIF,"])
    again = list(csv.DictReader(open(out / "duplicates.csv", newline="")))
    assert {(row["file_name"], row["same_as_file_name"]) for row in again} == {
        (str(test.files[0]), str(twice.relative_to(root))),
        (str(train.files[6]), str(train.files[5])),
    }
    with Image.open(out / "contact.png") as sheet:
        assert sheet.width == 8 * check.TILE and sheet.height == 8 * (check.TILE + check.CAPTION)

    small = ["model.main.name=small_cnn", "model.main.weights=null", "views.image_size=32", "optim.epochs=2"]
    small += ["optim.balanced_batches=2"]
    assert cli.main(["train", *words, f"data.skip={out / 'bad_files.csv'}", *small, "--out", "run"]) == 0
    with open(tmp_path / "run" / "labels" / "issues.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 112 - 4


def test_the_manifest_of_a_check_opens_as_a_table(folder, tmp_path):
    config = DataConfig("folder", str(folder))
    check.check(config, tmp_path / "out", Console(file=io.StringIO()))
    shutil.copy(tmp_path / "out" / "manifest.parquet", folder)
    found, expected = load(DataConfig("csv", str(folder / "manifest.parquet"))), load(config)
    assert (found.train.digest, found.test.digest) == (expected.train.digest, expected.test.digest)
    assert found.train.classes == CLASSES


def test_noise_is_matched_before_files_are_left_out(folder, tmp_path):
    full = load(DataConfig("folder", str(folder), noise=NoiseConfig("symmetric", 0.5)))
    np.save(tmp_path / "n.npy", full.noisy_labels)
    (tmp_path / "skip.csv").write_text("file_name\n" + "".join(f"{file}\n" for file in full.train.files[:4].tolist()))
    config = DataConfig("folder", str(folder), skip=str(tmp_path / "skip.csv"))
    part = load(replace(config, noise=NoiseConfig("file", file=str(tmp_path / "n.npy")))).train
    assert (
        part.files.tolist() == full.train.files[4:].tolist() and part.labels.tolist() == full.train.labels[4:].tolist()
    )
    (tmp_path / "skip.csv").write_text("file_name\n" + "".join(f"{file}\n" for file in full.test.files.tolist()))
    refused(config, "skip.csv", "every file of a split")


def test_classes_without_test_images_are_said(folder, tmp_path, capsys):
    shutil.rmtree(folder / "test" / "owl")
    check.check(DataConfig("folder", str(folder)), tmp_path / "out", Console(width=120))
    assert "1 of 3 classes have no test images: owl" in capsys.readouterr().out
