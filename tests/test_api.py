"""`import flywheel_fast as ff`: the command line's run from arrays, folders and data sets, and what is read off it."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torchvision
from PIL import Image

import flywheel_fast as ff
from flywheel_fast import api, labels
from flywheel_fast.data import sources
from flywheel_fast.errors import BadInput

FEW = ["optim.epochs=2", "cycle.warmup=1", "views.image_size=16", "views.pad=0", "model.main.width=8", "data.threads=1"]


def drawn(n=60, size=16, seed=0):
    """Images [n, H, W, 3] of three classes, by brightness, and their labels [n]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(60, size=(n, size, size, 3)) + 90 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    images, true = drawn()
    given = np.where(np.arange(60) % 5 == 0, (true + 1) % 3, true)
    test = drawn(12, seed=1)
    out = tmp_path_factory.mktemp("runs") / "arrays"
    names = ["dark", "grey", "light"]
    run = ff.train(images, given, true_labels=true, classes=names, test=test, changes=FEW, out=out)
    return run, images, given, true


def test_importing_costs_nothing():
    program = "import sys, flywheel_fast; print(sorted({'torch', 'numpy', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="nothing"):
        ff.nothing  # noqa: B018


def test_a_run_on_arrays(run):
    run, images, given, true = run
    table = run.issues()
    assert table["file_name"].to_pylist() == [f"train/{i:07}.png" for i in range(60)]
    names = np.array(["dark", "grey", "light"])
    assert table["given_label"].to_pylist() == names[given].tolist()
    assert table["true_label"].to_pylist() == names[true].tolist()
    frame = table.to_pandas()
    assert frame.label_score.between(0, 1).all() and frame.is_label_issue.dtype == bool
    assert run.result["images"] == 60 and run.labels.classes == ("dark", "grey", "light")
    first = run.labels.root / table["file_name"][7].as_py()
    np.testing.assert_array_equal(np.asarray(Image.open(first)), images[7])
    assert run.report().is_file() and repr(run) == repr(ff.Run(run.folder))


def test_probabilities_have_the_score_at_the_given_label(run):
    labels, found = run[0].labels, run[0].pred_probs()
    n = np.arange(len(found))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[n, labels.given], labels.clean_prob, atol=1e-6)
    other = labels.suggested != labels.given
    wanted = np.minimum(labels.suggested_prob, 1 - labels.clean_prob.astype(float))
    np.testing.assert_allclose(found[n, labels.suggested][other], wanted[other], atol=1e-6)


def test_prediction_reads_files_and_folders(run):
    run = run[0]
    files, probabilities = run.predict(run.labels.root / "test")
    assert len(files) == 12 and probabilities.shape == (12, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    again, same = run.predict([files[3], files[1]])
    assert again == [files[3], files[1]]
    np.testing.assert_allclose(same, probabilities[[3, 1]], atol=1e-2)


def loaded(words):
    return sources.load(api.configs.load(api.Config, "cifar10_small", words).data)


def test_what_arrays_and_data_sets_become(tmp_path):
    images, labels = drawn(12)
    train, test, *_ = loaded(api._data(images, labels, None, None, None))
    assert train.classes == ("0", "1", "2") and len(train) + len(test) == 12 and train.true_labels is None
    pairs = [(Image.fromarray(image), int(label)) for image, label in zip(images, labels, strict=True)]
    words = api._data(pairs, None, None, None, pairs[:6])
    train, test, *_ = loaded(words)
    assert train.labels.tolist() == labels.tolist() and test.labels.tolist() == labels[:6].tolist()
    assert words == api._data(pairs, None, None, None, pairs[:6])  # made once

    folders = tmp_path / "data"
    for name, (image, _) in zip(("cat", "dog", "cat", "dog"), pairs, strict=False):
        (folders / name).mkdir(parents=True, exist_ok=True)
        image.save(folders / name / f"{len(list((folders / name).iterdir()))}.png")
    data_set = torchvision.datasets.ImageFolder(str(folders))
    words = ["data.source=folder", f"data.root={folders}"]
    assert api._data(data_set, None, None, None, None) == api._data(folders, None, None, None, None) == words
    fake = torchvision.datasets.FakeData(12, (3, 16, 16), num_classes=2)
    train, test, *_ = loaded(api._data(fake, None, None, None, fake))
    assert len(train) == len(test) == 12 and set(train.classes) <= {"0", "1"}


def test_a_list_of_files_is_read_where_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    files = sorted((folder / "train").rglob("*.*g"))
    given = [file.parent.name for file in files]
    mixed = [str(files[0].relative_to(folder)), *files[1:]]  # a relative path, and Path objects
    test = [str(file) for file in (folder / "test").rglob("*.jpg")]
    out = tmp_path / "run"
    run = ff.train(mixed, given, test=(test, [file.split("/")[-2] for file in test]), changes=FEW, out=out)
    assert run.labels.root == folder and run.result["images"] == len(files) == 18
    assert run.labels.files.tolist() == [str(file.relative_to(folder)) for file in files]
    assert [run.labels.classes[k] for k in run.labels.given] == given
    assert run.report().stat().st_size > 10_000
    answers = [("file_name", "label"), (run.labels.files[3], "owl")]
    (tmp_path / "a.csv").write_text("".join(f"{file},{label}\n" for file, label in answers))
    done = labels.import_(out, tmp_path / "a.csv", tmp_path / "corrected.csv")
    with open(done.corrected, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows if row["split"] == "train"] == [*given[:3], "owl", *given[4:]]
    words = [f"data.source=csv data.root={done.corrected} data.images={folder}".split(), ["data.threads=1"]]
    assert len(loaded(sum(words, [])).train) == 18
    with pytest.raises(BadInput, match=r"gone\.png: does not exist"):
        ff.train([*files, folder / "gone.png"], [*given, "owl"], changes=FEW, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_no_noise_is_added_to_labels_that_are_given(tmp_path):
    images, labels = drawn(30)
    run = ff.train(images, labels, config="digits", test=drawn(6), changes=FEW[:2], out=tmp_path / "run")
    names = run.labels.classes
    assert [names[k] for k in run.labels.given] == [str(label) for label in labels]


def test_the_command_line_sees_the_same(run, tmp_path):
    """No second trainer: the config that was left repeats the run to the same scores."""
    run = run[0]
    again = ff.train(config=str(run.folder / "config.yaml"), out=tmp_path / "again")
    assert again.issues().equals(run.issues()) and again.result["test_acc_aux"] == run.result["test_acc_aux"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": "photos", "labels": [1]}, "go with arrays"),
        ({"images": drawn(6)[0]}, "an array needs labels"),
        ({"images": ["a.png"] * 6}, "a list of files needs labels"),
        ({"images": ["a.png"], "labels": [0], "test": drawn(6)}, "test: is no list of files"),
        ({"images": drawn(6)[0], "labels": [0, 1]}, "6 images, but 2 labels"),
        ({"images": drawn(6)[0] / 255, "labels": [0, 1] * 3}, r"train image 0: is float64 \[16, 16, 3\]"),
        ({"images": drawn(6)[0].transpose(0, 3, 1, 2), "labels": [0, 1] * 3}, r"is uint8 \[3, 16, 16\]"),
        ({"images": drawn(6)[0], "labels": [0, 1] * 3, "classes": ["a"]}, "label 1 is none of the 1 classes"),
        ({"images": drawn(6)[0], "labels": [0, 1] * 3, "true_labels": [0]}, "1 of them, but 6 images"),
        ({"images": drawn(6)[0], "labels": [0, 1] * 3, "changes": ["optim.lrr=1"]}, "optim.lr"),
    ],
)
def test_what_cannot_be_trained_on_is_named(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=said):
        ff.train(**given)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(BadInput, match="not the folder of a finished run"):
        ff.Run(tmp_path)


def test_a_datalab_takes_the_result(run):
    datalab = pytest.importorskip("cleanlab").Datalab
    run = run[0]
    table, names = run.issues(), run.labels.classes
    lab = datalab({"label": [names.index(name) for name in table["given_label"].to_pylist()]}, label_name="label")
    lab.find_issues(pred_probs=run.pred_probs(), issue_types={"label": {}})
    found = lab.get_issues("label")
    np.testing.assert_allclose(found["label_score"], table["label_score"].to_numpy(), atol=1e-6)
    assert {"is_label_issue", "given_label", "predicted_label"} <= set(found.columns)


def test_the_card_of_a_run(run):
    run = run[0]
    card = (run.folder / "README.md").read_text()
    assert "an image classifier of 3 classes".casefold() in card.casefold() and "`dark`, `grey`, `light`" in card
    assert f"| test accuracy, last epoch | {run.result['test_acc_aux']:.4f} |" in card
    assert "| wrong in truth | 20.0% |" in card and run.result["noise_sha256"] in card
    assert json.loads((run.folder / "result.json").read_bytes()) == run.result
