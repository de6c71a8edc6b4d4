"""Ten thousand spoilt tables and lists: each gives a sentence, or a data set that is right; none a traceback."""

import csv
import io
import os
from pathlib import Path

import pytest
from conftest import KIND_OF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel_fast.data import fixtures, sources
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.errors import BadInput

TOKENS = [
    "",
    ",",
    " ",
    "\t",
    "\n",
    "\r",
    '"',
    "\0",
    "../",
    "/",
    "//",
    "./",
    "é",
    "\x85",
    "-1",
    "07",
    "14",
    "³",
    "99999999999",
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "double", "drop", "swap", "cut", "byte", "end"]),
        st.integers(0, 10**6),
        st.integers(0, 40),
        st.sampled_from(TOKENS),
    ),
    min_size=1,
    max_size=3,
)
MUTATED = settings(
    max_examples=2000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mutate(content: bytes, edits) -> bytes:
    for kind, place, length, token in edits:
        lines = content.split(b"\n")
        row, at = place % len(lines), place % (len(content) + 1)
        if kind == "replace":
            content = content[:at] + token.encode() + content[at + length :]
        elif kind == "insert":
            content = content[:at] + token.encode() + content[at:]
        elif kind == "byte":
            content = content[:at] + bytes([length * 6]) + content[at + 1 :]
        elif kind == "cut":
            content = content[: len(content) - length]
        else:
            other = (row + length) % len(lines)
            if kind == "double":
                lines.insert(other, lines[row])
            elif kind == "end":  # where the label stands
                lines[row] = lines[row][: len(lines[row]) - length % 4] + token.encode()
            elif kind == "drop":
                del lines[row]
            else:
                lines[row], lines[other] = lines[other], lines[row]
            content = b"\n".join(lines)
    return content


def survives(config: DataConfig, path: Path, original: bytes, edits, there: set[str]) -> sources.Data | None:
    """What comes of the spoilt file: a sentence, or a data set that holds together, of the files that are there."""
    path.write_bytes(mutate(original, edits))
    try:
        data = load(config)
    except BadInput as error:
        assert str(error)
        return None
    for part in data.train, data.test:
        files = {os.path.normpath(file) for file in part.files.tolist()}
        assert len(files) == len(part.files) == len(part.labels) and files <= there
        assert part.labels.min(initial=0) >= 0 and part.labels.max(initial=0) < len(set(part.classes))
    return data


@pytest.fixture
def table(folder):
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted((folder / "train").rglob("*.*g"))]
    text = "file_name,label,split\n" + "".join(f"{row},{'train' if i % 3 else 'test'}\n" for i, row in enumerate(rows))
    (folder / "table.csv").write_text(text)
    return folder / "table.csv"


@given(edits=EDITS)
@MUTATED
def test_mutated_csv(table, request, edits):
    original = request.node.stash.setdefault(ORIGINAL, table.read_bytes())
    there = request.node.stash.setdefault(THERE, files_below(table.parent))
    data = survives(DataConfig("csv", str(table)), table, original, edits, there)
    content = table.read_bytes()
    if data and not set(b'"\r\0') & set(content):
        rows = [row for row in csv.DictReader(io.StringIO(content.decode().lstrip("\n"), newline="")) if row]
        of_file = {row["file_name"]: row["label"] for row in rows}
        for part in data.train, data.test:
            assert [of_file[file] for file in part.files.tolist()] == [part.classes[label] for label in part.labels]
        assert "split" not in rows[0] or len(data.train) + len(data.test) == len(rows)


ORIGINAL, THERE = pytest.StashKey[bytes](), pytest.StashKey[set[str]]()


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("clothing1m", "noisy_train_key_list.txt"),
        ("clothing1m", "noisy_label_kv.txt"),
        ("webvision", "info/val_filelist.txt"),
        ("tiny_imagenet", "val/val_annotations.txt"),
    ],
)
@given(edits=EDITS)
@MUTATED
def test_mutated_lists(lists, source, file, edits):
    root, originals, there = lists
    config, path = (
        DataConfig(source, str(root / KIND_OF.get(source, source))),
        root / KIND_OF.get(source, source) / file,
    )
    data = survives(config, path, originals[source, file], edits, there[source])
    text = path.read_bytes()
    path.write_bytes(originals[source, file])
    if data and source != "tiny_imagenet":
        lines = [line.strip() for line in text.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")]
        part = data.test if "val" in file else data.train
        names = [name.removeprefix("val_images_256/") for name in part.files.tolist()]
        if "key_list" in file:
            assert names == [line for line in lines if line]
        else:
            of_file = {line.rsplit(None, 1)[0]: int(line.rsplit(None, 1)[1]) for line in lines if line}
            assert [of_file[name] for name in names] == part.labels.tolist()


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    root = tmp_path_factory.mktemp("mutated")
    originals, there = {}, {}
    for source in ("clothing1m", "webvision", "tiny_imagenet"):
        kind = KIND_OF.get(source, source)
        fixtures.make(kind, root / kind)
        for path in (root / kind).rglob("*.txt"):
            originals[source, str(path.relative_to(root / kind))] = path.read_bytes()
        there[source] = files_below(root / kind)
    return root, originals, there
