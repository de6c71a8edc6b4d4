"""The page that a run's figures become: whole, small, without the network, whatever the classes are called."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_labels import drawn, labels
from PIL import Image

from flywheel_fast import audit, charts, cli, duplicates, report
from flywheel_fast.errors import BadInput

NASTY = ("<script>alert(1)</script>", '"it\'s" & co', "עברית", "a" * 200, "{{ 1 / 0 }}", "two\nlines")
METRICS = (
    "cycle,test_acc_main,test_acc_aux,gamma,true_clean,selection_auroc,selection_ap,selection_acc,refurbish_acc\n"
    "1,0.5,0.4,,0.7,,,,\n2,0.7,0.75,0.6,0.7,0.8,0.7,0.75,0.8\n3,0.8,0.9,0.65,0.7,0.9,0.85,0.8,0.9\n"
)
PLAIN = "cycle,test_acc_main,gamma,true_clean\n1,0.5,,0.7\n2,0.8,,0.7\n"  # cross-entropy


def make_run(folder, found, metrics=METRICS, config="seed: 0\nname: made\n", **result):
    """A finished run's folder with the labels `found`, or None for plain cross-entropy."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "env.json").write_text('{"python": "3.x", "torch": "<2>"}')
    (folder / "metrics.csv").write_text(metrics)
    known = {"test_acc_main": 0.8, "best_test_acc_main": 0.8, "images": 600, "epochs": 3, "seconds": 12.3}
    if found:
        known |= {"test_acc_aux": 0.9, "best_test_acc_aux": 0.91, "gamma": 0.65, "selection_auroc": 0.9}
        audit.write_labels(found, folder / "labels")
    (folder / "result.json").write_text(json.dumps(known | {"noise_sha256": "f00d", "merged": {}} | result))
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag must be closed in order."""

    EMPTY = {"meta", "img", "br", "line", "circle", "polyline", "rect"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.open, self.text = [], [], ""
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag in ("td", "li", "h3", "pre"):
            self.text += " "

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def said(self):
        return " ".join(self.text.split())

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(*folders, **more):
    page = Page(report.write(list(folders), **more))
    assert len(page.source.encode()) < 5_000_000
    # Nothing is fetched and nothing runs: pictures are data, and the page forbids the rest by itself.
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    urls = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(url.startswith("data:image/") for url in urls)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.of("meta"))
    return page


def write_images(found, size=(40, 30)):
    rng = np.random.default_rng(0)
    for file in found.files:
        path = found.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(path)


def test_a_run_with_known_truth(tmp_path):
    found = drawn(600, 3, tmp_path / "images")
    write_images(found)
    page = page_of(make_run(tmp_path / "run", found))
    said, figures = page.said(), audit.summary(found)
    assert f"About {figures.estimated_wrong:.1%} of the 600 labels are wrong by estimate" in said
    assert f"(truly {figures.true_wrong:.1%}); {figures.suspects} are worth a look" in said
    assert f"(truly {figures.precision:.1%})." in said
    assert "of what is labelled class 1 and wrong is class 0 (truly 100%)" in said
    assert "Expected calibration error" in said and "label_score" in said and "lower is worse" in said
    assert [found.startswith("data:image/webp") for found in (img["src"] for img in page.of("img"))] == [True] * 72
    assert "24 shown" in said and "Leftovers" not in said
    assert "sha256 f00d" in said and "torch: <2>" in said and "name: made" in said
    assert f"flywheel-fast train {tmp_path / 'run' / 'config.yaml'}" in said
    assert len(page.of("svg")) == 6


def test_what_was_reviewed_and_what_it_changed(tmp_path):
    head, *lines = METRICS.splitlines()

    def with_reviewed(*counts):
        rows = [f"{line},{count}" for line, count in zip(lines, counts, strict=True)]
        return "\n".join([f"{head},reviewed", *rows]) + "\n"

    said = {"decisions": {"keep": 9, "accept": 1030, "drop": 1}, "given_right": 0.25, "given_right_expected": 0.125}
    page = page_of(make_run(tmp_path / "run", drawn(60, 3, tmp_path), with_reviewed("", "", 40), reviews=said))
    assert "1,040 decisions. Labels kept: 9; changed to the suggestion: 1,030, to another class: 0;" in page.said()
    assert "25.0% of the labels that were decided on had been right as given" in page.said()
    assert "12.5% expect" in page.said()
    assert "test accuracy, auxiliary 0.7500 0.9000" in page.said() and "after 1 epoch" in page.said()
    unsure = {"decisions": {"unsure": 2}}
    page = page_of(make_run(tmp_path / "fresh", drawn(60, 3, tmp_path), with_reviewed(40, 40, 40), reviews=unsure))
    assert "2 decisions" in page.said() and "left open: 2" in page.said() and "0.7500" not in page.said()
    assert "How right the suspicion was" not in page.said()


def test_the_command_writes_the_page_beside_the_run_and_says_where(tmp_path, capsys):
    run = make_run(tmp_path / "run", drawn(60, 3, tmp_path))
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert cli.main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0  # again, and over its own page
    assert cli.main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()


def test_something_else_is_not_replaced(tmp_path):
    run = make_run(tmp_path / "run", drawn(60, 3, tmp_path))
    (tmp_path / "notes.html").write_text("mine")
    for out in (tmp_path / "notes.html", tmp_path):
        with pytest.raises(BadInput, match="is no report; name another file"):
            report.write([run], out)
    assert (tmp_path / "notes.html").read_text() == "mine"


@pytest.mark.parametrize("missing", ["config.yaml", "env.json", "result.json", "metrics.csv", "labels/samples.parquet"])
def test_an_unfinished_run_is_refused(tmp_path, missing):
    run = make_run(tmp_path / "run", drawn(60, 3, tmp_path))
    (run / missing).unlink()
    with pytest.raises(BadInput, match=re.escape(str(run))):
        report.write([run])
    assert not (run / "report.html").exists()


# -- classes and suspects of every kind --------------------------------------------------------------------------------


def test_names_are_text_and_nothing_else(tmp_path):
    n = 60
    given = np.arange(n) % 6
    found = labels(given, (given + 1) % 6, [0.01] * n, true=given, classes=NASTY, root=tmp_path)
    page = page_of(make_run(tmp_path / "run", found, merged={NASTY[0]: NASTY[1]}))
    assert "<script>" not in page.source
    for name in NASTY:
        assert " ".join(name.split()) in page.said()
    assert "<bdi>עברית</bdi>" in page.source
    assert "has been lost" in page.said()
    assert "Leftovers" in page.said() and "no picture: train/0, “0”.png" in page.said()


def test_300_classes_are_a_picture_of_the_matrix(tmp_path):
    found = drawn(9000, 300, tmp_path)
    page = page_of(make_run(tmp_path / "run", found))
    heats = [img for img in page.of("img") if img.get("class") == "heat"]
    assert [img["alt"] for img in heats] == ["corruption matrix, Estimated", "corruption matrix, True"]
    assert not [table for table in page.of("table") if table.get("class") == "matrix"]
    assert page.said().count("labelled class") == 60 + 8  # the most suspected, and the confusions
    assert "And 240 classes with fewer suspects" in page.said()


def test_broken_files_are_named_with_their_problem(tmp_path):
    run = make_run(tmp_path / "run", labels(range(6), range(6), [0.99] * 6, root=tmp_path))
    bad = "".join(f"{k}<b>.png,train,cat,is empty\n" for k in range(30))
    (run / "bad_files.csv").write_text(f"file_name,split,label,problem\n{bad}")
    said = page_of(run).said()
    assert "30 files could not be trained on, and were left out" in said
    assert "19<b>.png: is empty" in said and "20<b>.png" not in said


def test_no_suspects(tmp_path):
    page = page_of(make_run(tmp_path / "run", labels(range(6), range(6), [0.99] * 6, classes=NASTY, root=tmp_path)))
    assert "none is suspect enough to be worth a look" in page.said()
    assert "No label is suspected" in page.said() and "No class is taken for another" in page.said()


def test_100_000_suspects(tmp_path):
    n, rng = 100_000, np.random.default_rng(0)
    given = rng.integers(0, 10, n)
    found = labels(given, (given + rng.integers(1, 10, n)) % 10, rng.random(n) * 0.1, classes="abcdefghij")
    page = page_of(make_run(tmp_path / "run", found))
    assert "100,000 are worth a look" in page.said()


def test_large_noisy_pictures_stay_within_the_limit(tmp_path, monkeypatch):
    found = labels([k % 40 for k in range(480)], [(k + 1) % 40 for k in range(480)], [0.01] * 480, classes=range(40))
    found = audit.Labels(**{**vars(found), "classes": tuple(map(str, range(40))), "root": tmp_path})
    write_images(found, (300, 300))
    run = make_run(tmp_path / "run", found)
    assert len(page_of(run).of("img")) == 480 + 1
    monkeypatch.setattr(report, "PICTURE_BYTES", 100_000)
    page = page_of(run)
    assert 10 < len(page.of("img")) < 100 and len(page.source) < 600_000
    assert "Leftovers" not in page.said()


def test_one_label_and_one_epoch(tmp_path):
    found = labels([0], [1], [0.01], true=[1], classes="ab")
    page = page_of(make_run(tmp_path / "run", found, metrics=METRICS[: METRICS.index("2,")]))
    assert "1 is worth a look, and 99% of these" in page.said()


def test_identical_files_with_different_labels_are_shown(tmp_path):
    found = labels([0, 1, 0, 0], [0, 1, 0, 0], [0.9] * 4, classes="ab", root=tmp_path)
    write_images(found)
    same = (tmp_path / found.files[0]).read_bytes()
    (tmp_path / found.files[1]).write_bytes(same)  # another label
    (tmp_path / found.files[3]).write_bytes((tmp_path / found.files[2]).read_bytes())  # the same label
    assert duplicates.groups(found) == [[0, 1]]
    said = page_of(make_run(tmp_path / "run", found)).said()
    assert f"under different labels a{found.files[0]} b{found.files[1]}" in said and found.files[2] not in said


def test_copies_that_were_scaled_and_compressed_are_found(tmp_path):
    found = labels([0, 1, 1, 0, 1, 0, 1], [0] * 7, [0.9, 0.8, *[0.7] * 5], classes="ab", root=tmp_path)
    write_images(found, size=(64, 64))
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((200, 200))
    photo.save(tmp_path / found.files[0])
    photo.resize((90, 90)).point(lambda value: value * 0.7).save(tmp_path / found.files[1], "JPEG", quality=50)
    for number in (3, 4):  # even areas
        Image.new("RGB", (20, 20), ("white", "black")[number % 2]).save(tmp_path / found.files[number])
    (tmp_path / found.files[5]).write_bytes(b"no picture")
    (tmp_path / found.files[6]).unlink()
    assert duplicates.groups(found) == [[1, 0]]  # the worse first


def test_images_that_have_moved(tmp_path):
    found = drawn(60, 3, tmp_path / "old")
    run = make_run(tmp_path / "run", found)
    write_images(found)
    (tmp_path / "old").rename(tmp_path / "new")
    assert "Leftovers" in page_of(run).said() and str(tmp_path / "old") in page_of(run).said()
    page = page_of(run, images=tmp_path / "new")
    assert "Leftovers" not in page.said() and page.of("img")
    assert cli.main(["report", str(run), "--images", str(tmp_path / "nowhere")]) == 2


# -- other runs, several runs ------------------------------------------------------------------------------------------


def test_plain_cross_entropy_has_curves_alone(tmp_path):
    page = page_of(make_run(tmp_path / "run", None, PLAIN))
    assert "says nothing of the labels" in page.said() and "80.0%" in page.said()
    assert len(page.of("svg")) == 1


def test_runs_are_compared(tmp_path, monkeypatch):
    one = make_run(tmp_path / "a" / "run", drawn(600, 3, tmp_path), config="seed: 0\noptim: {lr: 0.1}\n")
    two = make_run(tmp_path / "b" / "run", None, PLAIN, config="seed: 0\noptim: {lr: 0.2}\n", test_acc_main=0.95)
    monkeypatch.chdir(tmp_path)
    page = page_of(two, one)
    assert (tmp_path / "comparison.html").exists()
    said = page.said()
    assert "most test images right at the end: b/run, 95.0%" in said
    assert "optim.lr 0.2 0.1" in said and "seed" not in said.split("What differs")[1].split("Corruption")[0]
    accuracy, auroc, told_apart, refurbished = re.findall(r"<svg.*?</svg>", page.source, re.S)
    assert re.findall(r'<g class="(k.)">', accuracy + auroc + told_apart + refurbished) == ["k0", *["k1"] * 4]
    assert [chart.count("<polyline") for chart in (accuracy, auroc, told_apart, refurbished)] == [2, 1, 1, 1]
    assert len([table for table in page.of("table") if table.get("class") == "matrix long"]) == 2
    with pytest.raises(BadInput, match="named twice"):
        report.write([one, tmp_path / "b" / ".." / "a" / "run"])


def test_a_dozen_runs_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / f"seed{k}", None) for k in range(12)]
    page = page_of(*runs, out=tmp_path / "page.html")
    classes = re.findall(r'<g class="(k\d)"><polyline points="[^"]*"( class="dashed")?', page.source)[:12]
    assert len(set(classes)) == 12


# -- charts ------------------------------------------------------------------------------------------------------------


def test_lines_end_where_their_last_value_is():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.5])
    chart = charts.over_epochs("t", [("a", x, y)])
    (line,) = chart["lines"]
    points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
    assert [point[0] for point in points] == [charts.LEFT, (charts.LEFT + charts.RIGHT) / 2, charts.RIGHT]
    assert charts.TOP < points[1][1] < points[2][1] < points[0][1] < charts.BOTTOM
    assert line["dots"][0] == pytest.approx(points[2], abs=0.1) and line["value"] == "50.0%"
    assert dict((text, place) for place, text in chart["y"])["50%"] == pytest.approx(points[2][1], abs=0.1)


def test_the_histogram_counts_every_label():
    found = labels([0, 0, 1], [0, 1, 1], [0.0, 1.0, 0.51], true=[1, 0, 1], classes="ab")
    right, wrong = charts.histogram(found)["bars"]
    assert (right["name"], wrong["name"]) == ("2 truly right", "1 truly wrong")
    width = (charts.RIGHT - charts.LEFT) / 40
    assert [round((box[0] - charts.LEFT) / width) for box in right["boxes"]] == [20, 39]
    assert [round((box[0] - charts.LEFT) / width) for box in wrong["boxes"]] == [0]


def test_confusions_are_shares_of_what_is_wrong():
    found = labels(
        [0] * 5 + [1], [1, 1, 2, 0, 0, 1], [0.2, 0.2, 0.2, 0.9, 1, 1], true=[1, 2, 2, 0, 0, 1], classes="abc"
    )
    first, second = report._confusions(found)
    assert (first["given"], first["other"]) == ("a", "b")
    assert first["share"] == pytest.approx(2 / 3) and first["true"] == pytest.approx(1 / 3)
    assert first["count"] == pytest.approx(1.6) and second["share"] == pytest.approx(1 / 3)
    assert report._pairs(found)[0] == ("a", "b", pytest.approx(1.6))
