"""reviews.csv: what people decided of labels, a row a decision. Rows are only ever appended; the last on a file counts.

`keep`, `accept` and `pick` name the label that is right: the given one, the suggested one, another. `drop`: the image
is to be left out; `unsure`: nothing changes; `undo`: the file's decision before its last one stands again, or none.
"""

import codecs
import csv
import datetime
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flywheel_fast.data.manifest import DROPPED, NOT_REVIEWED, Manifest
from flywheel_fast.errors import BadInput

LABELLING = ("keep", "accept", "pick")
DECISIONS = (*LABELLING, "drop", "unsure")
REQUIRED = ("file_name", "decision", "label")
COLUMNS = (*REQUIRED, "given_label", "suggested_label", "label_score", "time")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True)
class Review:
    file: str
    decision: str
    label: str = ""
    given: str = ""
    suggested: str = ""
    score: float | None = None  # label_score of the given label when it was decided
    line: int = 0  # of the file; 0: not from one


class Table(NamedTuple):
    rows: list[Review]
    columns: list[str]
    whole: int  # bytes; less than the file has where its last line was cut off, which is left out


def read(path: Path) -> Table:
    """All rows in order. Raises BadInput naming the row."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: the reviews cannot be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(content) - 3:
            raise BadInput(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        text = content[: error.start].decode("utf-8-sig")  # cut off within a letter
    lines = list(io.StringIO(text, newline="\n"))
    rows = _rows(path, lines)
    last, header = next(rows, (0, []))
    for name in REQUIRED:
        if name not in header:
            raise BadInput(f"{path}: its first line names no column {name!r}; it must name {', '.join(REQUIRED)}")
    found = []
    for line, row in rows:
        if line == len(lines) and not text.endswith("\n") and not _is_whole(header, row):
            break
        if len(row) != len(header):
            raise BadInput(f"{path}: row {line} has {len(row)} cells, not {len(header)}; correct or remove it")
        found.append(_review(path, line, dict(zip(header, row, strict=True))))
        last = line
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    return Table(found, header, mark + len("".join(lines[:last]).encode()))


def _rows(path: Path, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line, and cells, of each row; where the last one is cut off within quotes, all but that."""
    reader = csv.reader(lines, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            if reader.line_num < len(lines):
                raise BadInput(f"{path}: row {reader.line_num} is no CSV ({error}); correct or remove it") from error
            return
        if row is None:
            return
        if row:
            yield reader.line_num, row


def _is_whole(header: list[str], row: list[str]) -> bool:
    """Whether a last row without a line's end is all there, such as one that an editor wrote."""
    return len(row) == len(header) and (header[-1] != "time" or bool(TIME.fullmatch(row[-1])))


def _review(path: Path, line: int, row: dict[str, str]) -> Review:
    decision, label = row["decision"], row["label"]
    if decision not in (*DECISIONS, "undo"):
        known = ", ".join((*DECISIONS, "undo"))
        raise BadInput(f"{path}: row {line} decides {decision!r}; it must be one of {known}")
    if (decision in LABELLING) != bool(label):
        needs = "needs a label" if decision in LABELLING else f"must have no label, not {label!r}"
        raise BadInput(f"{path}: row {line}: {decision!r} {needs}; correct or remove it")
    try:
        score = float(row["label_score"]) if row.get("label_score") else None
    except ValueError as error:
        raise BadInput(f"{path}: row {line}: label_score {row['label_score']!r} is no number; correct it") from error
    return Review(
        row["file_name"], decision, label, row.get("given_label", ""), row.get("suggested_label", ""), score, line
    )


def as_line(review: Review, columns: Sequence[str] = COLUMNS) -> bytes:
    """The row as it is appended to a file of these columns, the time being now."""
    score = "" if review.score is None else f"{review.score:.6f}"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    cells = (review.file, review.decision, review.label, review.given, review.suggested, score, now)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writerow(dict(zip(COLUMNS, cells, strict=True)))
    return text.getvalue().encode()


def in_force(rows: list[Review]) -> list[Review]:
    """The decisions that no `undo` has taken back, in order. A file may have several, of which the last counts."""
    kept: list[Review] = []
    for review in rows:
        if review.decision != "undo":
            kept.append(review)
            continue
        at = next((at for at in reversed(range(len(kept))) if kept[at].file == review.file), None)
        if at is not None:
            del kept[at]
    return kept


def standing(path: Path) -> dict[str, Review]:
    """File -> the decision that counts."""
    return {review.file: review for review in in_force(read(path).rows)}


def labels_of(path: Path) -> dict[str, str]:
    """File -> the label that stands, "" where it was dropped; none where nobody was sure."""
    return {file: review.label for file, review in standing(path).items() if review.decision != "unsure"}


def of_manifest(path: Path, manifest: Manifest) -> np.ndarray:  # [N] int64
    """The class that a review gives each sample, else NOT_REVIEWED or DROPPED.

    Raises BadInput for a review of a file that is none of the manifest's, or with a label that is none of its classes.
    """
    number = {name: label for label, name in enumerate(manifest.classes)}
    found = standing(path)
    rows = {file: row for row, file in enumerate(manifest.files.tolist()) if file in found}
    reviewed = np.full(len(manifest), NOT_REVIEWED, np.int64)
    for file, review in found.items():
        if file not in rows:
            raise BadInput(
                f"data.reviews {path}: row {review.line} names {file!r}, which is no training file of {manifest.root}; "
                "give the reviews of this data set"
            )
        if review.label and review.label not in number:
            known = ", ".join(manifest.classes[:10]) + ", …" * (len(manifest.classes) > 10)
            raise BadInput(
                f"data.reviews {path}: row {review.line} labels {file!r} as {review.label!r}, which is no class "
                f"({known}); correct or remove it"
            )
        if review.decision != "unsure":
            reviewed[rows[file]] = number[review.label] if review.label else DROPPED
    return reviewed


def summary(path: Path) -> dict:
    """Standing decisions by kind, and how right the suspicion was: of those that name a label, the share whose given
    label was right, and the share that their scores made expect."""
    decided = standing(path).values()
    scored = [review for review in decided if review.decision in LABELLING and review.score is not None]
    found: dict = {"decisions": dict(Counter(review.decision for review in decided).most_common())}
    if scored:
        right = sum(review.label == review.given for review in scored)
        found |= {"given_right": right / len(scored)}
        found |= {"given_right_expected": sum(review.score for review in scored) / len(scored)}
    return found
