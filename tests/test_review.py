"""What people decide: the file that keeps it, the order in which they are asked, the server of the page."""

import csv
import http.client
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from made_labels import drawn, labels
from PIL import Image
from test_report import make_run

from flywheel_fast import audit, review
from flywheel_fast import labels as labels_io
from flywheel_fast.data import reviews
from flywheel_fast.data.manifest import DROPPED, NOT_REVIEWED, Manifest
from flywheel_fast.data.reviews import Review
from flywheel_fast.errors import BadInput

HEADER = ",".join(reviews.COLUMNS) + "\n"
NASTY = ("a,b", 'say "hi"', "two\nlines", "עברית", "<script>alert(1)</script>")


def written(path: Path, *found: Review) -> Path:
    path.write_bytes(HEADER.encode() + b"".join(map(reviews.as_line, found)))
    return path


def manifest(n: int = 6, classes=NASTY, **more) -> Manifest:
    return Manifest(Path("images"), [f"{i}.png" for i in range(n)], np.arange(n) % len(classes), tuple(classes), **more)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_whatever_the_names(tmp_path):
    found = [Review(f"{name}.png", "pick", name, NASTY[0], NASTY[1], 0.25) for name in NASTY]
    path = written(tmp_path / "reviews.csv", *found)
    back, columns, whole = reviews.read(path)
    assert [(r.file, r.label, r.given, r.suggested, r.score) for r in back] == [
        (r.file, r.label, r.given, r.suggested, r.score) for r in found
    ]
    assert whole == path.stat().st_size and tuple(columns) == reviews.COLUMNS


def test_the_last_row_counts_and_an_undo_brings_back_the_one_before(tmp_path):
    path = written(
        tmp_path / "reviews.csv",
        *(Review("0.png", "keep", NASTY[0]), Review("0.png", "drop"), Review("1.png", "drop"), Review("1.png", "undo")),
        *(Review("2.png", "keep", NASTY[2]), Review("2.png", "pick", NASTY[1]), Review("2.png", "undo")),
        *(Review("3.png", "unsure"), Review("4.png", "pick", NASTY[0]), Review("5.png", "undo")),
    )
    assert reviews.of_manifest(path, manifest()).tolist() == [DROPPED, NOT_REVIEWED, 2, NOT_REVIEWED, 0, NOT_REVIEWED]
    assert reviews.summary(path)["decisions"] == {"keep": 1, "drop": 1, "unsure": 1, "pick": 1}


def test_a_last_line_that_was_cut_off_is_left_out_wherever_the_cut_is(tmp_path):
    path = written(tmp_path / "r.csv", Review("0.png", "drop"), Review("two\nlines é.png", "keep", NASTY[2], NASTY[2]))
    content = path.read_bytes()
    first = len(HEADER) + len(reviews.as_line(Review("0.png", "drop")))
    for cut in range(first, len(content) - 1):
        path.write_bytes(content[:cut])
        found, _, whole = reviews.read(path)
        assert [r.file for r in found] == ["0.png"] and whole == first, content[:cut]
    path.write_bytes(content[:-1])  # an editor's last line
    assert len(reviews.read(path).rows) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,label\na,b\n", "names no column 'decision'"),
        ("", "names no column 'file_name'"),
        ("file_name,decision,label\n0.png,keep\n1.png,drop,\n", "row 2 has 2 cells, not 3"),
        ("file_name,decision,label\n0.png,maybe,\n", "row 2 decides 'maybe'; it must be one of keep, accept"),
        ("file_name,decision,label\n0.png,keep,\n", "row 2: 'keep' needs a label"),
        ("file_name,decision,label\n0.png,drop,x\n", "row 2: 'drop' must have no label, not 'x'"),
        ("file_name,decision,label,label_score\n0.png,drop,,much\n", "row 2: label_score 'much' is no number"),
        ('file_name,decision,label\n"0.png"x,drop,\n1.png,drop,\n', "row 2 is no CSV"),
        ("file_name,decision,label\n9.png,drop,\n", "row 2 names '9.png', which is no training file of images"),
        ("file_name,decision,label\n0.png,keep,x\n", "row 2 labels '0.png' as 'x', which is no class (a,b, "),
    ],
)
def test_what_cannot_be_understood_is_named(tmp_path, text, said):
    (tmp_path / "reviews.csv").write_text(text)
    with pytest.raises(BadInput) as error:
        reviews.of_manifest(tmp_path / "reviews.csv", manifest())
    assert said in str(error.value) and str(tmp_path / "reviews.csv") in str(error.value)


def test_a_file_that_is_absent_or_no_text_is_named(tmp_path):
    (tmp_path / "r.csv").write_bytes(HEADER.encode() + b"\xff\xff\xff\xff\xff\n")
    for path, said in ((tmp_path / "r.csv", "is not UTF-8"), (tmp_path / "none.csv", "No such file")):
        with pytest.raises(BadInput, match=said):
            reviews.read(path)


def test_how_right_the_suspicion_was(tmp_path):
    path = written(
        tmp_path / "reviews.csv",
        Review("0.png", "keep", NASTY[0], NASTY[0], NASTY[1], 0.3),
        Review("1.png", "accept", NASTY[1], NASTY[0], NASTY[1], 0.1),
        Review("2.png", "pick", NASTY[2], NASTY[0], NASTY[1], 0.2),
        Review("3.png", "drop", "", NASTY[0], NASTY[1], 0.9),
    )
    found = reviews.summary(path)
    assert found["given_right"] == pytest.approx(1 / 3) and found["given_right_expected"] == pytest.approx(0.2)


def test_the_corrected_labels_of_a_review_are_written_as_the_input_came(run, tmp_path):
    found = audit.read_labels(run / "labels")
    other = [found.classes[(k + 1) % 3] for k in found.given]
    written(
        tmp_path / "mine.csv",
        *(Review(found.files[0], "keep", other[0]), Review(found.files[0], "pick", other[0])),
        *(Review(found.files[1], "drop"), Review(found.files[2], "unsure")),
    )
    (run / "config.yaml").write_text("data: {source: folder, root: images}\n")
    done = labels_io.import_(run, tmp_path / "mine.csv")
    with open(done.corrected, newline="") as file:
        rows = {row["file_name"]: row["label"] for row in csv.DictReader(file)}
    given = dict(zip(found.files.tolist(), (found.classes[k] for k in found.given), strict=True))
    assert rows == {file: label for file, label in given.items() if file != found.files[1]} | {found.files[0]: other[0]}
    assert (done.reviewed, done.changed) == (2, 2)

    table = found.root / "all.csv"
    table.write_text("file_name,label,more\n" + "".join(f'"{file}",{label},x\n' for file, label in given.items()))
    (run / "config.yaml").write_text(f"data: {{source: csv, root: {table}}}\n")
    done = labels_io.import_(run, tmp_path / "mine.csv", tmp_path / "again.csv")
    with open(done.corrected, newline="") as file:
        assert {row["file_name"]: row["label"] for row in csv.DictReader(file) if row["more"] == "x"} == rows


# -- the order ---------------------------------------------------------------------------------------------------------


def test_what_is_expected_to_change_most_is_shown_first_a_pair_of_classes_at_a_time():
    given = [0, 0, 0, 1, 1, 2]
    found = labels(given, [1, 1, 0, 0, 0, 2], [0.1, 0.2, 0.7, 0.1, 0.4, 0.9], classes=("a", "b", "c"))
    found = audit.Labels(**vars(found) | {"suggested_prob": np.array([0.9, 0.6, 0.7, 0.5, 0.5, 1], np.float32)})
    # b -> a: mean change .5; a -> a: .3; a -> b: .25, the surer of its two last; c -> c: 0
    assert [sheet.tolist() for sheet in review.sheets(found)] == [[3, 4], [2], [1, 0], [5]]


def test_the_sure_members_of_an_unsure_pair_wait_and_no_sheet_is_large():
    n = 1000
    found = labels(np.arange(n) % 5 // 4, np.ones(n), [0.1] * n, classes=("a", "b"))
    change = np.random.default_rng(0).random(n)
    sheets = review.sheets(found, change)
    order = np.concatenate(sheets)
    assert sorted(order) == list(range(n)) and max(map(len, sheets)) == review.SHEET
    assert all(len(set(found.given[sheet])) == 1 for sheet in sheets)
    rounds = np.split(change[order], range(96, n, 96))
    assert all(one.min() >= other.max() for one, other in zip(rounds, rounds[1:], strict=False))
    means = [change[sheet].mean() for sheet in sheets[:4]]
    assert means == sorted(means, reverse=True)


def test_expected_change_is_the_mass_that_a_pinned_label_moves():
    """If the posterior is right, a look takes its class its place with probability 1 - suggested_prob."""
    rng = np.random.default_rng(0)
    posterior = rng.dirichlet(np.ones(4), size=2000)
    true = np.array([rng.choice(4, p=q) for q in posterior])
    top = posterior.argmax(axis=1)
    found = labels(top, top, [0.5] * 2000, classes=tuple("abcd"))
    found = audit.Labels(**vars(found) | {"suggested_prob": posterior.max(axis=1).astype(np.float32)})
    assert review.expected_change(found).mean() == pytest.approx(np.mean(true != top), abs=0.03)


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    found = drawn(60, 3, tmp_path / "images")
    for file in found.files:
        (found.root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(found.root / file)
    return make_run(tmp_path / "run", found, config="name: made\ndata: {reviews: null}\n")


@pytest.fixture
def server(run):
    with review.Server(review.Reviewing(run), run) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        server.reviewing.close()


def ask(server, method, path, body=None, token=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    if body is not None:
        headers = {"Content-Type": "application/json"} | headers
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, f"/{server.token if token is None else token}/{path}", body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers


def test_the_page_its_content_and_its_pictures(server, run):
    status, page, headers = ask(server, "GET", "")
    assert status == 200 and b"<script nonce=" in page and "default-src 'none'" in headers["Content-Security-Policy"]
    content = json.loads(ask(server, "GET", "content")[1])
    assert (
        content["images"] == 60 and content["decided"] == {} and content["classes"] == [f"class {k}" for k in range(3)]
    )
    assert sorted(item[0] for sheet in content["sheets"] for item in sheet["items"]) == list(range(60))
    status, picture, headers = ask(server, "GET", "small/7")
    assert status == 200 and headers["Content-Type"] == "image/webp" and picture[:4] == b"RIFF"
    for path in ("small/60", "small/-1", "small/../7", "large", "other/7", "../config.yaml"):
        assert ask(server, "GET", path)[0] == 404
    (run.parent / "images" / server.reviewing.labels.files[8]).unlink()
    assert ask(server, "GET", "large/8")[0] == 404


def test_every_decision_is_a_row_and_an_undo_is_one_too(server, run):
    given, suggested = (int(of[0]) for of in (server.reviewing.labels.given, server.reviewing.labels.suggested))
    other = 3 - given - suggested if given != suggested else (given + 1) % 3
    for decision, label in (("keep", None), ("accept", None), ("pick", other), ("drop", None), ("unsure", None)):
        status, body, _ = ask(server, "POST", "decide", {"sample": 0, "decision": decision, "label": label})
        assert status == 200
    assert json.loads(body) == {"sample": 0, "decided": ["unsure", None]}
    for left in ("drop", "pick"):
        assert json.loads(ask(server, "POST", "undo", {})[1])["decided"][0] == left
    with open(run / "reviews.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["decision"] for row in found][-4:] == ["drop", "unsure", "undo", "undo"] and len(found) == 7
    assert found[0]["label"] == found[0]["given_label"] == f"class {given}" and found[2]["label"] == f"class {other}"
    assert reviews.of_manifest(run / "reviews.csv", as_manifest(server.reviewing.labels))[0] == other


def as_manifest(found: audit.Labels) -> Manifest:
    return Manifest(found.root, found.files, found.given, found.classes)


def test_the_word_that_is_written_is_what_the_label_is(server):
    found = server.reviewing.labels
    same = int(np.flatnonzero(found.given == found.suggested)[0])
    differ = int(np.flatnonzero(found.given != found.suggested)[0])
    for sample, label, word in (
        (same, int(found.given[same]), "keep"),
        (differ, int(found.given[differ]), "keep"),
        (differ, int(found.suggested[differ]), "accept"),
    ):
        asked = {"sample": sample, "decision": "pick", "label": label}
        assert json.loads(ask(server, "POST", "decide", asked)[1])["decided"] == [word, label]
    assert json.loads(ask(server, "POST", "decide", {"sample": same, "decision": "accept"})[1])["decided"][0] == "keep"


def test_others_are_refused(server, run):
    port = server.server_port
    assert ask(server, "GET", "", token="guess")[0] == 403
    assert ask(server, "GET", "", Host=f"evil.example:{port}")[0] == 403
    assert ask(server, "POST", "decide", {"sample": 0, "decision": "drop"}, Origin="http://evil.example")[0] == 403
    assert ask(server, "POST", "decide", {"sample": 0, "decision": "drop"}, Origin="null")[0] == 403
    assert ask(server, "POST", "undo", {}, Content_Type="text/plain")[0] == 400
    for body in (b"{", b"[]", b"x" * 5000, {"sample": 60, "decision": "drop"}, {"sample": 0, "decision": "undo"}):
        assert ask(server, "POST", "decide", body)[0] == 400
    for label in (None, 3, -1, "0", 1.5, True):
        assert ask(server, "POST", "decide", {"sample": 0, "decision": "pick", "label": label})[0] == 400
    assert ask(server, "POST", "other", {})[0] == 404
    assert (run / "reviews.csv").read_text() == HEADER
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert ask(server, "POST", "decide", {"sample": 0, "decision": "drop"}, **own)[0] == 200


def test_a_review_goes_on_where_it_was_cut_off(run):
    first = review.Reviewing(run)
    for sample in range(3):
        first.decide(sample, "drop", None)
    with pytest.raises(BadInput, match="is under review already"):
        review.Reviewing(run)
    first.close()
    path = run / "reviews.csv"
    whole = path.read_bytes()
    path.write_bytes(whole + b"train/3,")
    second = review.Reviewing(run)
    assert path.read_bytes() == whole and second.standing() == {0: ("drop", None), 1: ("drop", None), 2: ("drop", None)}
    assert second.undo() == 2
    second.close()
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # by an editor
    third = review.Reviewing(run)
    third.decide(5, "drop", None)
    assert set(third.standing()) == {0, 1, 5}
    third.close()


def test_a_table_from_elsewhere_is_gone_on_with_in_its_own_columns(run):
    file = audit.read_labels(run / "labels").files[3]
    (run / "reviews.csv").write_text(f'mine,label,decision,file_name\nx,class 0,pick,"{file}"\n')
    reviewing = review.Reviewing(run)
    reviewing.decide(3, "drop", None)
    reviewing.close()
    assert [row.decision for row in reviews.read(run / "reviews.csv").rows] == ["pick", "drop"]


def test_reviews_of_another_run_are_refused(run):
    written(run / "reviews.csv", Review("other.png", "drop"))
    with pytest.raises(BadInput, match=r"reviews.csv: row 2: 'other.png' is no file of this run"):
        review.Reviewing(run)


def test_a_run_that_was_trained_with_reviews_goes_on_in_their_file(run, tmp_path):
    (run / "config.yaml").write_text(f"data: {{reviews: {tmp_path / 'mine.csv'}}}\n")
    assert review.reviews_of(run) == tmp_path / "mine.csv"
