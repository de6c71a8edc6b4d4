"""Features in place of images: read from where they are, trained on, and refused where they do not fit."""

import csv
import json
import os
import shutil
import signal
import time

import cli as process
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from flywheel_fast import audit, cli, config, folder_audit, models, run_folder
from flywheel_fast.data import sources
from flywheel_fast.embed import embed
from flywheel_fast.errors import BadInput
from flywheel_fast.models import NetworkConfig
from flywheel_fast.trainer import Config

SHORT = ["optim.epochs=8", "cycle.warmup=3", "eval_every=8"]


def said(capsys, *words) -> str:
    """What a command that must fail says."""
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


# -- from elsewhere ----------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path):
    """scikit-learn's digits as 64 numbers each, 30 % of the training labels wrong: digits.npy and digits.csv."""
    x, true = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    wrong = rng.random(len(x)) < 0.3
    given = np.where(wrong, (true + rng.integers(1, 10, len(x))) % 10, true)
    split = np.where(np.arange(len(x)) % 4 == 0, "test", "train")
    given[split == "test"] = true[split == "test"]
    np.save(tmp_path / "digits.npy", x.astype(np.float32))
    with open(tmp_path / "digits.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "split", "true_label"])
        writer.writerows((f"digit {i}", *row) for i, row in enumerate(zip(given, split, true, strict=True)))
    return tmp_path


def test_digits_as_numbers_train_without_images(digits, monkeypatch):
    """The run says which labels are wrong, though there is nothing to look at, and nothing that DALI could read."""
    import sys

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.chdir(digits)
    words = ["train", "embeddings", "data.features=digits.npy", "data.root=digits.csv", "optim.epochs=30"]
    assert cli.main([*words, "--out", "run"]) == 0
    record = json.loads((digits / "run/result.json").read_text())
    assert record["selection_auroc"] > 0.97 and record["test_acc_aux"] > 0.92
    assert abs(record["gamma"] - record["true_clean"]) < 0.1  # linear heads on pixels know the digits by 94 %
    found = audit.read_labels(digits / "run/labels")
    assert (found.given != found.true)[np.argsort(found.clean_prob)[:100]].mean() >= 0.97
    assert cli.main(["report", "run"]) == 0


def test_a_parquet_file_holds_both(digits):
    x = np.load(digits / "digits.npy")
    with open(digits / "digits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    listed = columns | {"embedding": list(x)}
    wide = columns | {f"f{at}": x[:, at] for at in range(x.shape[1])}
    data = []
    for name, table in (("listed", listed), ("wide", wide)):
        pa.parquet.write_table(pa.table(table), digits / f"{name}.parquet")
        data.append(sources.load(sources.DataConfig("features", features=str(digits / f"{name}.parquet"))))
    plain = sources.DataConfig("features", str(digits / "digits.csv"), features=str(digits / "digits.npy"))
    data.append(sources.load(plain))
    for one in data:
        assert np.array_equal(one.train.labels, data[0].train.labels) and len(one.test) == len(data[0].test)
        rows = one.features.rows(one.test)
        assert np.array_equal(one.features.array[rows, 0], x[::4])


def test_what_does_not_fit_is_named(digits, capsys):
    at = digits / "digits.npy"
    words = ["train", "embeddings", f"data.root={digits / 'digits.csv'}"]
    x = np.load(at)

    def with_features(array):
        np.save(digits / "x.npy", array)
        return said(capsys, *words, f"data.features={digits / 'x.npy'}", "--out", digits / "run")

    assert "labels 1,797 rows, " in with_features(x[:-1]) and "features of 1,796" in with_features(x[:-1])
    broken = x.copy()
    broken[41, 3] = np.nan
    assert "x.npy: row 42 has a feature that is not finite" in with_features(broken)
    assert "holds int64" in with_features(x.astype(np.int64))
    assert "is no array that NumPy can read" in with_features(np.array([{}], dtype=object))
    assert "needs data.root=TABLE" in said(capsys, "train", "embeddings", f"data.features={at}")
    assert "is no folder that" in said(capsys, "train", "embeddings", f"data.features={digits / 'no'}")
    assert "data.features" in said(capsys, "train", "embeddings")
    table = (digits / "digits.csv").read_text().splitlines()
    (digits / "few.csv").write_text("\n".join(["label", *["a"] * 1794, *["b"] * 3]))
    few = said(
        capsys, "train", "embeddings", f"data.features={at}", f"data.root={digits / 'few.csv'}", "data.holdout=0"
    )
    assert "class 'b' has 3 samples only; lower model.folds" in few
    (digits / "one.csv").write_text("\n".join(["label", *["a"] * 1797]))
    one = said(capsys, "train", "embeddings", f"data.features={at}", f"data.root={digits / 'one.csv'}")
    assert "holds one class only ('a')" in one
    (digits / "third.csv").write_text("\n".join([*table[:6], table[6].replace("train", "third"), *table[7:]]))
    third = said(capsys, "train", "embeddings", f"data.features={at}", f"data.root={digits / 'third.csv'}")
    assert "row 6 has split 'third'; it must be train or test" in third


# -- embedded ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Words for a small network with weights from a file."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    donor = models.build(NetworkConfig("timm/mobilenetv3_small_050"), 10, 32, seed=1)
    save_file(donor.backbone.state_dict(), path)
    network = f"model.main={{name: timm/mobilenetv3_small_050, weights: {path}}}"
    return [network, "views.image_size=32", "data.threads=1"]


def seen(folder, weights, *more):
    return config.load(Config, "photos", [f"data.root={folder}", *weights, *more])


@pytest.fixture
def photos(tmp_path):
    """Two classes that a network without training tells apart: red and blue; twenty each, and four to test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 160), ("test", 4)):
        for name, channel in (("red", 0), ("blue", 2)):
            for number in range(count):
                image = rng.integers(60, 120, (24, 24, 3), dtype=np.uint8)
                image[..., channel] += 100
                (tmp_path / "photos" / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(tmp_path / "photos" / split / name / f"{number}.png")
    return tmp_path / "photos"


def test_features_are_what_the_network_sees(folder, weights, tmp_path):
    configured = seen(folder, weights)
    assert embed(configured, tmp_path / "features", draws=2) == 24
    data = sources.load(sources.DataConfig("features", features=str(tmp_path / "features")))
    assert data.features.views == ("clean", "weak", "strong", "weak", "strong")
    assert data.features.array.shape == (24, 5, 1024) and data.features.array.dtype == np.float16
    original = sources.load(configured.data)
    assert data.train.classes == original.train.classes and list(data.train.files) == list(original.train.files)
    assert np.array_equal(data.train.labels, original.train.labels)
    rows = data.features.rows(data.test)
    assert np.array_equal(data.features.array[rows, 0], data.features.array[rows, 4])  # of a test image there is one
    clean, weak, strong, weak2, _ = data.features.array[data.features.rows(data.train)].transpose(1, 0, 2)
    for one, other in ((clean, weak), (weak, strong), (weak, weak2)):
        assert not np.array_equal(one, other)
    embed(configured, tmp_path / "again", draws=2)
    assert (tmp_path / "features/features.npy").read_bytes() == (tmp_path / "again/features.npy").read_bytes()


def test_what_is_not_the_same_is_named(folder, weights, tmp_path):
    features = tmp_path / "features"
    embed(seen(folder, weights), features, draws=0)
    embed(seen(folder, weights), features, draws=0)  # again is nothing to do
    with pytest.raises(BadInput, match="holds features of other views"):
        embed(seen(folder, weights), features)
    other = models.build(NetworkConfig("timm/mobilenetv3_small_050"), 10, 32, seed=2)
    save_file(other.backbone.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="holds features of other weights"):
        embed(seen(folder, weights, f"model.main.weights={tmp_path / 'other.safetensors'}"), features, draws=0)
    with pytest.raises(BadInput, match="holds something other than features"):
        embed(seen(folder, weights), folder)
    fresh = config.load(Config, "digits", [])
    with pytest.raises(BadInput, match="give pretrained weights"):
        embed(fresh, tmp_path / "none")
    (folder / "train/cat/0.jpg").unlink()
    with pytest.raises(BadInput, match="holds features of other data"):
        embed(seen(folder, weights), features, draws=0)

    def refused(match):
        with pytest.raises(BadInput, match=match):
            sources.load(sources.DataConfig("features", features=str(features)))

    array = np.load(features / "features.npy")
    np.save(features / "features.npy", array + 1)
    refused("features.npy: cut short or altered")
    np.save(features / "features.npy", array[:-1])
    refused("has features of 23 images, .*manifest.parquet names 24")
    about = json.loads((features / "about.json").read_text())
    del about["sha256"]
    (features / "about.json").write_text(json.dumps(about))
    refused("is not whole yet")


def test_other_features_do_not_go_on_with_a_run(photos, weights, tmp_path, capsys):
    for name, more in (("one", []), ("two", ["seed=5"])):
        embed(seen(photos, weights, *more), tmp_path / name)
    words = ["train", "embeddings", *SHORT, "--out", str(tmp_path / "run")]
    assert cli.main([*words, f"data.features={tmp_path / 'one'}"]) == 0
    assert "features" in said(capsys, *words, f"data.features={tmp_path / 'two'}", "--resume", "auto")


def test_the_network_of_a_run_takes_pictures(photos, weights, tmp_path):
    """The head is put on the network that made the features, whose preprocessing the run's weights know."""
    embed(seen(photos, weights), tmp_path / "features")
    words = ["train", "embeddings", f"data.features={tmp_path / 'features'}", *SHORT, "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["test_acc_aux"] == 1
    assert cli.main(["predict", str(tmp_path / "run"), str(photos / "test"), "-o", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and all(row["file_name"].split("/")[-2] == row["label_1"] for row in rows)


# -- audit -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shuffled(photos, tmp_path):
    """A table of the training photographs, a fifth of the labels wrong; two of them twice, one is something else."""
    rng, rows = np.random.default_rng(1), []
    for name, other in (("red", "blue"), ("blue", "red")):
        for number in range(160):
            wrong = rng.random() < 0.2
            rows.append((f"train/{name}/{number}.png", other if wrong else name, name))
    shutil.copy(photos / "train/red/3.png", photos / "train/red/twin.png")
    rows.append(("train/red/twin.png", {"red": "blue", "blue": "red"}[rows[3][1]], "red"))
    with open(photos / "shuffled.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "label", "true_label"), *rows])
    return photos / "shuffled.csv"


def audited(shuffled, weights, out):
    return ["audit", str(shuffled), *weights, *SHORT[:2], "--out", str(out)]


def test_one_command_from_pictures_to_a_report(shuffled, weights, tmp_path, capsys):
    words = audited(shuffled, weights, tmp_path / "run")
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "seeing all pictures takes about" in told and f"321 pictures: {tmp_path / 'run' / 'report.html'}" in told
    found = audit.read_labels(tmp_path / "run/labels")
    assert audit.selection_quality(found.clean_prob, found.given, found.true)[0] > 0.98
    page = (tmp_path / "run/report.html").read_text()
    assert "train/red/twin.png" in page and "Odd pictures" in page
    with open(tmp_path / "run/labels/oddities.csv", newline="") as file:
        odd = list(csv.DictReader(file))
    twins = {frozenset((row["file_name"], row["detail"])) for row in odd if row["kind"] == "near-duplicate"}
    assert frozenset(("train/red/twin.png", "train/red/3.png")) in twins
    before = (tmp_path / "run/weights/model.safetensors").stat().st_mtime_ns
    assert cli.main(words) == 0  # nothing is done again
    assert (tmp_path / "run/weights/model.safetensors").stat().st_mtime_ns == before


def test_an_audit_of_nothing_is_refused_and_leaves_nothing(tmp_path, weights, capsys):
    assert "is not there" in said(capsys, *audited(tmp_path / "nowhere", weights, tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    assert "empty" in said(capsys, *audited(tmp_path / "empty", weights, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_of_many_pictures_an_audit_takes_larger_batches_and_fewer_epochs():
    few, many = (
        config.load(Config, folder_audit.LEARNT, ["data.features=FEATURES", *folder_audit._pace(count)])
        for count in (620, 50_000)
    )
    assert few == config.load(Config, folder_audit.LEARNT, ["data.features=FEATURES"])
    assert many.optim.batch_size == 500 and many.optim.epochs < few.optim.epochs


@pytest.fixture
def undisturbed(shuffled, weights, tmp_path):
    assert cli.main(audited(shuffled, weights, tmp_path / "whole")) == 0
    return process.ended_as(tmp_path / "whole")


def until(path_is_there, under_way):
    while not path_is_there():
        assert under_way.poll() is None, under_way.communicate()
        time.sleep(0.005)


def test_killed_in_the_embedding_and_in_the_cycles_it_ends_the_same(shuffled, weights, tmp_path, undisturbed):
    out = tmp_path / "run"
    words = audited(shuffled, weights, out)
    about = out / run_folder.FEATURES / "about.json"

    def blocks():
        return about.exists() and json.loads(about.read_text())["blocks"] >= 1

    for there, number, status in (
        (blocks, signal.SIGTERM, 75),
        (blocks, signal.SIGKILL, -9),
        (lambda: (out / "metrics.csv").exists() and len(process.rows(out)) >= 2, signal.SIGKILL, -9),
    ):
        under_way = process.begin(*words)
        until(there, under_way)
        os.kill(under_way.pid, number)
        assert under_way.wait(60) == status
    assert process.flywheel(*words, cwd=tmp_path).returncode == 0
    assert process.ended_as(out) == undisturbed
    first, second = (np.load(run / run_folder.FEATURES / "features.npy") for run in (out, tmp_path / "whole"))
    assert np.array_equal(first, second)


def test_many_features_stay_on_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(2000, 3, 16)).astype(np.float16))
    (tmp_path / "y.csv").write_text("\n".join(["label", *(str(i % 2) for i in range(2000))]))
    data = sources.load(sources.DataConfig("features", str(tmp_path / "y.csv"), features=str(tmp_path / "x.npy")))
    assert isinstance(data.features.array, np.memmap) and data.features.columns("strong2") == [0]
    assert data.features.columns("weak") == [1, 2]
