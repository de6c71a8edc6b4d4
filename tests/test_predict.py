"""The network of a run at work: the figures of the run again, and pictures of every kind, broken ones included."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flywheel_fast import cli, predict
from flywheel_fast.data import pipelines
from flywheel_fast.errors import BadInput, Failure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    words = ["optim.epochs=4", "cycle.warmup=2", "cycle.contrastive=0.1", "optim.lr=0.1", "optim.ema_decay=0.9"]
    assert cli.main(["train", "digits", *words, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def digits(run):
    return Path(os.environ["XDG_CACHE_HOME"], "flywheel-fast", "digits-v1")


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_evaluation_says_what_the_run_said(run, digits, capsys):
    known = json.loads((run / "result.json").read_bytes())["test_acc_aux"]
    assert known > 0.3  # better than chance, or nothing would be shown
    found = predict.evaluate(run, digits)
    assert (found.split, found.count) == ("test split", 450) and found.accuracy == known
    assert sum(count for _, count, _ in found.by_class) == 450
    assert sum(count * accuracy for _, count, accuracy in found.by_class) / 450 == pytest.approx(known)
    assert cli.main(["evaluate", str(run), str(digits)]) == 0
    assert f"accuracy {known:.4f} on 450 (test split)" in capsys.readouterr().out


def test_a_csv_is_evaluated_by_the_names_of_its_classes(run, digits, tmp_path):
    names = sorted(path.relative_to(digits) for path in (digits / "test").rglob("*.png") if path.parent.name < "6")
    table = tmp_path / "data" / "labels.csv"
    shutil.copytree(digits / "test", tmp_path / "data" / "test")
    table.write_text("file_name,label\n" + "".join(f"{name},{name.parts[1]}\n" for name in names))
    found, whole = predict.evaluate(run, table), predict.evaluate(run, digits)
    assert (found.split, found.count) == ("all images", len(names))
    assert found.by_class == [row for row in whole.by_class if row[0] < "6"]


def test_predictions_add_up_and_are_those_that_were_evaluated(run, digits, tmp_path):
    out = tmp_path / "out.csv"
    assert predict.predict(run, [str(digits / "test")], out, top=10) == 450
    rows = rows_of(out)
    probabilities = np.array([[float(row[f"prob_{rank}"]) for rank in range(1, 11)] for row in rows])
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-4 and (np.diff(probabilities, axis=1) <= 0).all()
    right = np.mean([row["label_1"] == Path(row["file_name"]).parent.name for row in rows])
    assert right == pytest.approx(predict.evaluate(run, digits).accuracy)


def test_a_broken_file_is_named_and_the_rest_predicted(run, digits, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, path in enumerate(sorted((digits / "test" / "3").iterdir())[:5]):
        shutil.copy(path, folder / f"{number}.png")
    whole = tmp_path / "whole.csv"
    assert cli.main(["predict", str(run), str(folder), "-o", str(whole), "--top", "2"]) == 0
    (folder / "2b.png").write_text("no picture")
    (folder / "4b.jpg").touch()
    (folder / "notes.txt").write_text("not asked for")
    out = tmp_path / "out.csv"
    capsys.readouterr()
    assert cli.main(["predict", str(run), str(folder), "-o", str(out), "--top", "2"]) == 1
    said = capsys.readouterr().err
    assert "2b.png: cannot be read as an image" in said and "4b.jpg" in said and f"the other 5 are in {out}" in said
    assert list(rows_of(out)[0]) == ["file_name", "label_1", "prob_1", "label_2", "prob_2"]
    same = [(row["file_name"], row["label_1"]) for row in rows_of(whole)]
    assert [(row["file_name"], row["label_1"]) for row in rows_of(out)] == same
    with pytest.raises(Failure, match="2b.png"):
        predict.predict(run, [str(folder / "2b.png")], out)
    assert rows_of(out) == []


def test_any_number_of_files_in_any_number_of_pieces(run, digits, tmp_path, monkeypatch):
    files = sorted(map(str, (digits / "test" / "7").iterdir()))
    predict.predict(run, files, tmp_path / "one.csv")
    monkeypatch.setattr(pipelines, "SWEEP_BATCH", 7)
    predict.predict(run, files, tmp_path / "many.csv")
    one, many = rows_of(tmp_path / "one.csv"), rows_of(tmp_path / "many.csv")
    assert [row["file_name"] for row in one] == [row["file_name"] for row in many] == files
    assert np.allclose([float(row["prob_1"]) for row in one], [float(row["prob_1"]) for row in many], atol=1e-2)


def test_what_cannot_be_used_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no images"):
        predict.find_images([str(tmp_path / "empty")])
    with pytest.raises(BadInput, match="does not exist"):
        predict.find_images([str(tmp_path / "nowhere.png")])
    with pytest.raises(BadInput, match="not the network of a finished run"):
        predict.Predictor(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "1.png")
    with pytest.raises(BadInput, match="class 'cat' is none of the 10"):
        predict.evaluate(run, tmp_path / "data")
    assert cli.main(["predict", str(run), str(tmp_path), "-o", "x.csv", "--top", "0"]) == 2
