"""Suspects out to every reviewing tool and back: equal tables, nothing lost, the data set untouched."""

import csv
import json
import os
import re
import shlex
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from made_labels import labels as made
from PIL import Image

from flywheel_fast import audit, cli, labels, run_folder
from flywheel_fast.data import sources
from flywheel_fast.errors import BadInput

NAMES = ("a,b", 'say "hi"', "=SUM(A1)", "猫 ünï", "<b>&amp;", ".x/y%2Fz")


def make_run(tmp_path, n=60, source="folder", classes=NAMES):
    """A run on files of which every fourth label is suspected of being the class after the given one."""
    given = np.arange(n) % len(classes)
    suspected = np.arange(n) % 4 == 0
    suggested = np.where(suspected, (given + 1) % len(classes), given)
    root = tmp_path / "data"
    found = made(given, suggested, np.where(suspected, 0.01, 0.99), classes=classes, root=root)
    for file in found.files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(root / file)
    run = tmp_path / "run"
    audit.write_labels(found, run / "labels")
    data = {"source": source, "root": str(root / "labels.csv" if source == "csv" else root)}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return run, found


def suggestions(found):
    return {found.files[i]: found.classes[found.suggested[i]] for i in found.suspects}


def reviewed(path):
    """What a reviewing tool would hand back: Label Studio alone tells predictions from what a person has submitted."""
    for file in path.rglob("tasks.json"):
        tasks = json.loads(file.read_bytes())
        for task in tasks:
            task["annotations"] = task.pop("predictions")
        file.write_text(json.dumps(tasks))
    return path


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- every format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", cli.FORMATS)
def test_what_goes_out_comes_back(tmp_path, capsys, form):
    run, found = make_run(tmp_path)
    before = contents(tmp_path / "data")
    assert cli.main(["labels", "export", str(run), "--format", form]) == 0
    assert capsys.readouterr().out == f"15 suspects in {run / 'review' / form}\n"
    out = reviewed(run / "review" / form)
    assert labels.read(out, found.root) == suggestions(found)
    written = [path.read_text() for path in out.rglob("*") if path.is_file() and not path.is_symlink()]
    assert all("base64" not in text for text in written) and bool(written) != (form == "folder")

    assert cli.main(["labels", "import", str(run), str(out)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"15 labels reviewed, 15 of them changed: {run / 'review' / 'corrected.csv'}"
    assert second.startswith("0 of 15 suspects kept their label: 0% false alarms (0% to 20%,")
    wanted = dict(zip(found.files.tolist(), (NAMES[k] for k in found.suggested), strict=True))
    corrected = rows_of(run / "review" / "corrected.csv")
    assert list(corrected[0]) == ["file_name", "label"]
    assert {row["file_name"]: row["label"] for row in corrected} == wanted
    assert [row["file_name"] for row in corrected] == found.files.tolist()
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("form", cli.FORMATS)
def test_no_suspects(tmp_path, form):
    run, found = make_run(tmp_path, n=2, classes=NAMES)
    audit.write_labels(made([0, 1], [0, 1], [0.9, 0.9], classes=NAMES, root=found.root), run / "labels")
    out, count = labels.export(run, form)
    assert count == 0 and labels.read(out, found.root) == {}


@pytest.mark.parametrize("form", [form for form in cli.FORMATS if form != "folder"])
def test_more_tasks_than_a_file_holds_are_split(tmp_path, monkeypatch, form):
    run, found = make_run(tmp_path)
    monkeypatch.setattr(labels, "TASKS", 6)
    out, _ = labels.export(run, form)
    assert sorted(path.name for path in out.iterdir()) == ["1", "2", "3"]
    assert [len(labels.read(reviewed(out / part), found.root)) for part in ("1", "2", "3")] == [6, 6, 3]
    assert labels.read(out, found.root) == suggestions(found)


def test_an_export_never_replaces_a_review(tmp_path):
    run, _ = make_run(tmp_path)
    labels.export(run, "csv")
    with pytest.raises(BadInput, match="is there already"):
        labels.export(run, "csv")
    assert cli.main(["labels", "export", str(run), "--format", "csv", "-o", str(tmp_path / "other")]) == 0


# -- what each tool asks for -------------------------------------------------------------------------------------------


def test_the_worst_come_first(tmp_path):
    run, found = make_run(tmp_path)
    out, _ = labels.export(run, "csv")
    rows = rows_of(out / "tasks.csv")
    assert [row["file_name"] for row in rows] == found.files[found.suspects].tolist()
    assert [row["given_label"] for row in rows] == [NAMES[k] for k in found.given[found.suspects]]
    assert {float(row["label_score"]) for row in rows} == {float(np.float32(0.01))}


def test_label_studio(tmp_path):
    run, found = make_run(tmp_path)
    out, _ = labels.export(run, "label-studio")
    config = ElementTree.parse(out / "label_config.xml").getroot()
    assert [choice.attrib["value"] for choice in config.iter("Choice")] == list(NAMES)
    task = json.loads((out / "tasks.json").read_bytes())[0]
    assert task["data"]["image"] == "/data/local-files/?d=train/0%2C%20%E2%80%9C0%E2%80%9D.png"
    (choice,) = task["predictions"][0]["result"]
    assert choice["value"] == {"choices": [NAMES[1]]} and choice["to_name"] == "image"
    assert labels.read(out) == {}, "what nobody has submitted is not decided"


def test_label_studios_own_checks(tmp_path):
    why_absent = "needs pip install label-studio-sdk, which brings sixty packages"
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason=why_absent)
    run, _ = make_run(tmp_path)
    out, _ = labels.export(run, "label-studio")
    config = interface.LabelInterface((out / "label_config.xml").read_text())
    for task in json.loads((out / "tasks.json").read_bytes()):
        (prediction,) = task.pop("predictions")
        assert config.validate_task(task) and config.validate_prediction(prediction)
        prediction["result"][0]["value"] = {"choices": ["no such class"]}
        assert not config.validate_prediction(prediction)


def test_label_studio_answers_with_the_last_that_was_submitted(tmp_path):
    def said(label, **more):
        return {"result": [{"value": {"choices": [label]}}]} | more

    tasks = [
        {"data": {"file_name": "a"}, "annotations": [said("x"), said("y"), said("z", was_cancelled=True)]},
        {"data": {"file_name": "b"}, "annotations": [{"result": []}]},
        {"data": {"file_name": "c"}, "annotations": []},
        {"file_name": "d", "label": "w"},  # the minimal export
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    assert labels.read(tmp_path / "tasks.json") == {"a": "y", "d": "w"}


def test_cvat(tmp_path):
    run, found = make_run(tmp_path)
    out, _ = labels.export(run, "cvat")
    root = ElementTree.parse(out / "annotations.xml").getroot()
    assert root.findtext("version") == "1.1" and root.findtext("meta/task/size") == "15"
    assert [name.text for name in root.findall("meta/task/labels/label/name")] == list(NAMES)
    image = root.find("image")
    assert (image.attrib["width"], image.attrib["height"]) == ("6", "4")
    assert [label["name"] for label in json.loads((out / "label_constructor.json").read_bytes())] == list(NAMES)
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        archive.write(out / "annotations.xml", "annotations.xml")
    assert labels.read(tmp_path / "task.zip") == suggestions(found)


def test_cvats_own_importer(tmp_path):
    """Datumaro reads and writes the formats of CVAT."""
    why_absent = "needs pip install datumaro, which sets protobuf and CUDA's Python packages back: in a venv of its own"
    datumaro = pytest.importorskip("datumaro", reason=why_absent)
    run, found = make_run(tmp_path)
    out, _ = labels.export(run, "cvat")
    (out / "images").symlink_to(found.root)
    data_set = datumaro.Dataset.import_from(str(out / "annotations.xml"), "cvat")
    names = [label.name for label in data_set.categories()[datumaro.AnnotationType.label]]
    assert names == list(NAMES)
    read = {item.id: [names[one.label] for one in item.annotations] for item in data_set}
    assert read == {str(Path(file).with_suffix("")): [label] for file, label in suggestions(found).items()}


@pytest.mark.parametrize("form", cli.FORMATS)
def test_white_space_in_names_comes_back(tmp_path, form):
    run, found = make_run(
        tmp_path, classes=("tab\there", "line\nfeed", "return\rhere", " ends ", "\u200f\u05d0", "%2F")
    )
    out, _ = labels.export(run, form)
    assert labels.read(reviewed(out), found.root) == suggestions(found)


@pytest.mark.parametrize("form", cli.FORMATS)
def test_a_control_character_comes_back_or_is_refused_before_anything_is_written(tmp_path, form):
    run, found = make_run(tmp_path, classes=("bell\x07", "other"))
    if form in ("cvat", "label-studio"):
        with pytest.raises(BadInput, match=r"'bell\\x07' has a control character.*take --format csv"):
            labels.export(run, form)
        assert not (run / "review").exists()
    else:
        out, _ = labels.export(run, form)
        assert labels.read(out, found.root) == suggestions(found)


def test_fiftyone(tmp_path):
    run, found = make_run(tmp_path)
    out, _ = labels.export(run, "fiftyone")
    files = json.loads((out / "data.json").read_bytes())
    assert all(Path(file).is_file() for file in files.values())
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "data.json").write_text(json.dumps({"x": files["0"], "y": files["4"]}))
    (tmp_path / "plain" / "labels.json").write_text(json.dumps({"classes": NAMES, "labels": {"x": 2, "y": NAMES[5]}}))
    wanted = {found.files[0]: NAMES[2], found.files[4]: NAMES[5]}
    assert labels.read(tmp_path / "plain", found.root) == wanted


def test_a_tree_of_links_is_reviewed_by_moving_them(tmp_path):
    run, found = make_run(tmp_path)
    out, _ = labels.export(run, "folder")
    links = sorted(path for path in out.rglob("*") if path.is_symlink())
    assert len(links) == 15 and all(link.resolve().is_file() for link in links)
    assert all(len(link.relative_to(out).parts) == 2 for link in links)
    moved, gone = links[0], links[1]
    target = out / "猫 ünï" / moved.name
    moved.rename(target)
    gone.unlink()
    answers = labels.read(out)
    assert len(answers) == 14 and answers[os.path.relpath(target.readlink(), found.root)] == "猫 ünï"


# -- into the labels ---------------------------------------------------------------------------------------------------


def test_a_csv_comes_back_with_all_its_columns_and_rows(tmp_path, monkeypatch):
    run, found = make_run(tmp_path, source="csv")
    header = ["note", "label", "file_name", "split"]
    rows = [
        [f"n,{i}", NAMES[k], file, "train"] for i, (file, k) in enumerate(zip(found.files, found.given, strict=True))
    ]
    rows.insert(3, ["of the test split", NAMES[0], "elsewhere.png", "test"])
    with open(tmp_path / "data" / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    before = (tmp_path / "data" / "labels.csv").read_bytes()
    out, _ = labels.export(run, "csv")
    monkeypatch.chdir(tmp_path)
    done = labels.import_(run, out / "tasks.csv", tmp_path / "mine.csv")
    assert (done.reviewed, done.changed) == (15, 15)
    with open(tmp_path / "mine.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            header,
            *([note, suggestions(found).get(file, label), file, split] for note, label, file, split in rows),
        ]
    assert (tmp_path / "data" / "labels.csv").read_bytes() == before


def test_corrected_links_can_be_trained_on(tmp_path):
    classes = ("cat", "dog", "owl")
    run, found = make_run(tmp_path, classes=classes)
    (tmp_path / "data" / "test" / "cat").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(tmp_path / "data" / "test" / "cat" / "t.png")
    out, _ = labels.export(run, "csv")
    links = tmp_path / "links"
    assert cli.main(["labels", "import", str(run), str(out), "--links", str(links)]) == 0
    train, test, *_ = sources.load(sources.DataConfig("folder", str(links)))
    assert train.classes == classes and len(test) == 1
    assert np.bincount(train.labels).tolist() == np.bincount(found.suggested).tolist()
    assert cli.main(["labels", "import", str(run), str(out), "--links", str(links)]) == 2  # it is there already


def test_emptied_cells_are_undecided_and_kept_labels_are_counted(tmp_path):
    run, found = make_run(tmp_path)
    first, second = found.files[found.suspects[:2]]
    given = NAMES[found.given[found.suspects[1]]]
    (tmp_path / "mine.csv").write_text(f'file_name,label\n"{first}",\n"{second}","{given}"\n', encoding="utf-8")
    done = labels.import_(run, tmp_path / "mine.csv")
    assert (done.reviewed, done.changed) == (1, 0)


def test_a_review_measures_the_false_alarms(tmp_path):
    run, found = make_run(tmp_path)
    three = found.suspects[:3]
    answers = [(found.files[i], NAMES[found.given[i]]) for i in three[:2]]
    answers += [(found.files[three[2]], NAMES[found.suggested[three[2]]]), (found.files[1], NAMES[found.given[1]])]
    with open(tmp_path / "mine.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "label"), *answers])
    done = labels.import_(run, tmp_path / "mine.csv")
    assert (done.reviewed, done.suspects, done.kept) == (4, 3, 2) and done.expected == pytest.approx(0.01)
    assert done.measured().startswith("2 of 3 suspects kept their label: 67% false alarms (21% to 94%")
    (tmp_path / "none.csv").write_text("file_name,label\n")
    assert labels.import_(run, tmp_path / "none.csv", tmp_path / "o.csv").measured() == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", "file_name,label\nnowhere.png,dog\n", "'nowhere.png' is no training file"),
        ("x.csv", 'file_name,label\n"train/0, “0”.png",lion\n', "labelled 'lion', which is no class"),
        ("x.csv", "file_name,label\na,x\na,y\n", "'a' is labelled both 'x' and 'y'"),
        ("x.csv", "file,class\na,x\n", "not of a known format"),
        ("x.json", "{", "not of a known format"),
        ("x.json", '{"labels": {"a": 0}}', "not of a known format"),
        ("x.xml", "<annotations>", "not of a known format"),
        ("x.zip", "no archive", "not of a known format"),
        ("x.txt", "a x", "no file or folder of labels"),
    ],
)
def test_answers_that_make_no_sense_change_nothing(tmp_path, name, content, said):
    run, _ = make_run(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(BadInput, match=said):
        labels.import_(run, tmp_path / name)
    assert not (run / "review").exists()


def test_what_is_there_is_not_replaced(tmp_path):
    run, _ = make_run(tmp_path)
    out, _ = labels.export(run, "csv")
    with pytest.raises(BadInput, match="is there already"):
        labels.import_(run, out, out / "tasks.csv")


# -- difference --------------------------------------------------------------------------------------------------------


def test_difference_of_a_run_and_its_correction(tmp_path, capsys):
    run, found = make_run(tmp_path)
    out, _ = labels.export(run, "fiftyone")
    labels.import_(run, out)
    corrected = run / "review" / "corrected.csv"
    assert cli.main(["labels", "diff", str(run), str(corrected), "-o", str(tmp_path / "d.csv")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "60 files in both, 15 with another label"
    pairs = ((0, 1), (2, 3), (4, 5))
    assert sorted(said[1:]) == sorted(f"  {NAMES[before]} -> {NAMES[after]}: 5" for before, after in pairs)
    differ = rows_of(tmp_path / "d.csv")
    assert {row["file_name"]: row["b"] for row in differ} == suggestions(found)
    assert labels.diff(run, out)[:2] == ["15 files in both, 15 with another label", f"45 files in {run} alone"]
    assert labels.diff(corrected, corrected) == ["60 files in both, 0 with another label"]


# -- docs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/label_review.md"])
def test_every_command_of_the_docs_is_one(page):
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    commands = re.findall(r"^    flywheel-fast ((?:report|labels|predict|evaluate) .*)", text, re.M)
    assert len(commands) >= 3
    for command in commands:
        cli._parser().parse_args(shlex.split(command, comments=True))


def test_a_run_that_was_reviewed_is_not_overwritten(tmp_path):
    run, _ = make_run(tmp_path)
    (run / run_folder.LOG).touch()
    labels.export(run, "csv")
    with pytest.raises(BadInput, match="review"):
        run_folder.create(str(run), "run", overwrite=True, resuming=False)
    assert (run / "review" / "csv" / "tasks.csv").is_file()
