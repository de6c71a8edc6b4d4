"""Labels on their way to people and back: suspects for a reviewing tool, its answers, and what they change.

Each format is a pair of functions: one writes tasks whose label is already the suggestion, one reads {file: label}.
What leaves are paths, never pictures, and the data set itself is never written to.
"""

import csv
import io
import json
import os
import re
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

from flywheel_fast.audit import Labels, read_labels, share_between
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data import reviews
from flywheel_fast.data.sources.folders import TEST_FOLDERS
from flywheel_fast.errors import BadInput, Failure

TASKS = 100_000  # of one file, at most
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2
AIDS = {"label_config.xml", "label_constructor.json", "data.json"}  # beside the tasks, for the tool's set-up


# -- out ---------------------------------------------------------------------------------------------------------------


def export(run: Path, form: str, out: Path | None = None) -> tuple[Path, int]:
    """Writes the suspects of a run, worst first, into the new folder `out` (RUN/review/FORM); returns it and how many.

    More than 100,000 are split into folders 1, 2, ... Raises BadInput where the folder is in use, and for a name that
    the format cannot hold.
    """
    labels = read_labels(run / "labels")
    _refuse_what_xml_cannot_hold(labels, form)
    out = out or run / "review" / form
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"-o {out}: is there already; name a new folder, so that no review is lost")
    out.mkdir(parents=True, exist_ok=True)
    suspects = labels.suspects
    if form == "folder":
        link_tree(labels, {labels.files[i]: labels.classes[labels.suggested[i]] for i in suspects}, out)
        return out, len(suspects)
    parts = [suspects[start : start + TASKS] for start in range(0, max(len(suspects), 1), TASKS)]
    for number, part in enumerate(parts, start=1):
        WRITERS[form](labels, part, out if len(parts) == 1 else out / f"{number}")
    return out, len(suspects)


def _refuse_what_xml_cannot_hold(labels: Labels, form: str) -> None:
    """Control characters have no form in XML, escaped or not."""
    names = {"label-studio": labels.classes, "cvat": (*labels.classes, *labels.files[labels.suspects])}.get(form, ())
    for name in names:
        if NOT_IN_XML.search(name):
            raise BadInput(
                f"--format {form}: {name!r} has a control character, which the tool's XML cannot hold; rename it, or "
                "take --format csv, fiftyone or folder"
            )


def _write_csv(labels: Labels, part: np.ndarray, folder: Path) -> None:  # part [K] int64
    names = labels.classes
    rows = [
        (labels.files[i], names[labels.suggested[i]], names[labels.given[i]], float(labels.clean_prob[i])) for i in part
    ]
    _write_table(["file_name", "label", "given_label", "label_score"], rows, folder / "tasks.csv")


def _write_label_studio(labels: Labels, part: np.ndarray, folder: Path) -> None:
    """Tasks with the suggestion as prediction, and the set-up of labelling; images as local files under their root."""
    names, tasks = labels.classes, []
    for i in part:
        suggested = {"choices": [names[labels.suggested[i]]]}
        choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": suggested}
        data = {
            "image": f"/data/local-files/?d={urllib.parse.quote(labels.files[i])}",
            "file_name": labels.files[i],
            "given_label": names[labels.given[i]],
            "label_score": float(labels.clean_prob[i]),
        }
        score = float(labels.suggested_prob[i])
        tasks.append({"data": data, "predictions": [{"result": [choice], "score": score}]})
    _write_json(tasks, folder / "tasks.json")
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    ElementTree.SubElement(view, "Text", name="given", value="$given_label")
    choices = ElementTree.SubElement(view, "Choices", name="label", toName="image", choice="single-radio")
    for name in names:
        ElementTree.SubElement(choices, "Choice", value=name)
    _write_xml(view, folder / "label_config.xml", declared=False)  # the text is pasted; a declaration is refused


def _write_cvat(labels: Labels, part: np.ndarray, folder: Path) -> None:
    """CVAT for images 1.1, a tag an image, and the labels for the task's constructor."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    ElementTree.SubElement(task, "size").text = str(len(part))
    ElementTree.SubElement(task, "mode").text = "annotation"
    known = ElementTree.SubElement(task, "labels")
    for name in labels.classes:
        ElementTree.SubElement(ElementTree.SubElement(known, "label"), "name").text = name
    for number, i in enumerate(part):
        file = labels.files[i]
        image = ElementTree.SubElement(root, "image", id=str(number), name=file, **_size(labels.root / file))
        ElementTree.SubElement(image, "tag", label=labels.classes[labels.suggested[i]], source="auto")
    _write_xml(root, folder / "annotations.xml")
    constructor = [{"name": name, "type": "tag", "attributes": []} for name in labels.classes]
    _write_json(constructor, folder / "label_constructor.json")


def _size(path: Path) -> dict[str, str]:
    try:
        with Image.open(path) as image:  # the header alone
            return {"width": str(image.width), "height": str(image.height)}
    except (OSError, ValueError):
        return {}


def _write_fiftyone(labels: Labels, part: np.ndarray, folder: Path) -> None:
    """FiftyOneImageClassificationDataset: labels.json, and data.json that says where each image lies."""
    targets = {
        str(i): {
            "label": int(labels.suggested[i]),
            "confidence": float(labels.suggested_prob[i]),
            "attributes": {
                "given_label": labels.classes[labels.given[i]],
                "label_score": float(labels.clean_prob[i]),
            },
        }
        for i in part
    }
    _write_json({"classes": labels.classes, "labels": targets}, folder / "labels.json")
    _write_json({str(i): str(labels.root / labels.files[i]) for i in part}, folder / "data.json")


WRITERS: dict[str, Callable[[Labels, np.ndarray, Path], None]] = {
    "csv": _write_csv,
    "label-studio": _write_label_studio,
    "cvat": _write_cvat,
    "fiftyone": _write_fiftyone,
}


def link_tree(labels: Labels, chosen: dict[str, str], out: Path) -> None:
    """out/LABEL/FILE for every file of `chosen` {file: label}: a link to the image; "/" in a name is written %2F."""
    try:
        for file, label in chosen.items():
            link = out / _as_name(label) / _as_name(file)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(labels.root / file)
    except OSError as error:
        raise Failure(f"{out}: the link for {file!r} cannot be made ({error.strerror})") from error


def _as_name(text: str) -> str:
    """A label or path as one file name that is never hidden; `urllib.parse.unquote` gives it back."""
    text = text.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return "%2E" + text[1:] if text.startswith(".") else text


# -- in ----------------------------------------------------------------------------------------------------------------


def read(path: Path, root: Path | None = None) -> dict[str, str]:
    """{file: label} of a file or folder in any of the formats, or of a run folder its given labels; "" was dropped.

    `root`: of the images, for formats that name absolute paths. Raises BadInput naming what cannot be understood, and
    for a file that has two labels.
    """
    if (path / "labels" / "samples.parquet").is_file():
        labels = read_labels(path / "labels")
        return dict(zip(labels.files.tolist(), (labels.classes[k] for k in labels.given), strict=True))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.name not in AIDS)
        pairs = [pair for file in files for pair in _pairs(file, root)] if files else _read_tree(path)
    elif path.is_file() and path.suffix in READERS:
        pairs = _pairs(path, root)
    else:
        raise BadInput(f"{path}: is no file or folder of labels (.csv, .json, .xml, .zip, or a folder a class)")
    found: dict[str, str] = {}
    for file, label in pairs:
        if found.setdefault(file, label) != label:
            raise BadInput(f"{path}: {file!r} is labelled both {found[file]!r} and {label!r}; keep one of the two")
    return found


def _pairs(path: Path, root: Path | None) -> list[tuple[str, str]]:
    try:
        return list(READERS[path.suffix](path, root))
    except NOT_UNDERSTOOD as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BadInput(f"{path}: is not of a known format ({what}); see docs/label_review.md") from error


NOT_UNDERSTOOD = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(csv.Error, ElementTree.ParseError, zipfile.BadZipFile),
)


def _read_csv(path: Path, root: Path | None) -> Iterator[tuple[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if "decision" in (rows.fieldnames or ()):
            yield from reviews.labels_of(path).items()
            return
        for row in rows:
            if row["label"]:  # emptied: not decided
                yield row["file_name"], row["label"]


def _read_json(path: Path, root: Path | None) -> Iterator[tuple[str, str]]:
    """Label Studio's list of tasks, full or minimal, or FiftyOne's labels.json beside its data.json."""
    content = json.loads(path.read_bytes())
    if isinstance(content, list):
        for task in content:
            if "data" not in task:
                yield task["file_name"], task["label"]
                continue
            submitted = [one for one in task.get("annotations", []) if one["result"] and not one.get("was_cancelled")]
            for choice in submitted[-1]["result"][:1] if submitted else []:  # the last word counts
                yield task["data"]["file_name"], choice["value"]["choices"][0]
        return
    files = json.loads((path.parent / "data.json").read_bytes())
    for key, target in content["labels"].items():
        label = target["label"] if isinstance(target, dict) else target
        file = os.path.relpath(files[key], root) if root else files[key]
        yield file, content["classes"][label] if isinstance(label, int) else label


def _read_xml(path: Path, root: Path | None) -> Iterator[tuple[str, str]]:
    """CVAT's annotations.xml, alone or in the archive that it hands out."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            tree = ElementTree.fromstring(archive.read("annotations.xml"))
    else:
        tree = ElementTree.parse(path).getroot()
    for image in tree.iter("image"):
        for tag in image.iter("tag"):
            yield image.attrib["name"], tag.attrib["label"]


def _read_tree(path: Path) -> Iterator[tuple[str, str]]:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        for link in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            yield urllib.parse.unquote(link.name), urllib.parse.unquote(folder.name)


READERS = {".csv": _read_csv, ".json": _read_json, ".xml": _read_xml, ".zip": _read_xml}


@dataclass(frozen=True)
class Imported:
    corrected: Path  # CSV: every training file with its label now
    reviewed: int  # files that had an answer
    changed: int  # of them, those whose label is another now
    suspects: int  # of them, those that the run suspected
    kept: int  # of the suspects, those whose label was right after all
    expected: float  # share of the suspects that their scores let expect to be right; nan without one

    def measured(self) -> str:
        """What the review says of the run's promise; nothing where no suspect was reviewed."""
        if not self.suspects:
            return ""
        low, high = share_between(self.kept, self.suspects)
        share = self.kept / self.suspects
        return (
            f"{self.kept:,} of {self.suspects:,} suspects kept their label: {share:.0%} false alarms "
            f"({low:.0%} to {high:.0%}, were they drawn by chance) where the scores announced {self.expected:.0%}"
        )


def import_(run: Path, path: Path, out: Path | None = None, links: Path | None = None) -> Imported:
    """Writes the labels as `path` corrects them: to `out` (RUN/review/corrected.csv), and as class folders of links.

    A run on a CSV file gets all of its rows and columns back, with other labels; the tree `links` can be trained on.
    Raises BadInput for an answer on a file that the run did not have, or with a label that is no class of it.
    """
    labels = read_labels(run / "labels")
    for word, target in (("-o", out), ("--links", links)):
        if target and target.exists():
            raise BadInput(f"{word} {target}: is there already; name a new one")
    answers = read(path, labels.root)
    given = dict(zip(labels.files.tolist(), (labels.classes[k] for k in labels.given), strict=True))
    for file, label in answers.items():
        if file not in given:
            raise BadInput(f"{path}: {file!r} is no training file of {run}; was it exported from another run?")
        if label and label not in labels.classes:
            raise BadInput(
                f"{path}: {file!r} is labelled {label!r}, which is no class of {run}; correct it or empty it"
            )
    dropped = {file for file, label in answers.items() if not label}
    corrected = {file: label for file, label in (given | answers).items() if label}
    out = out or run / "review" / "corrected.csv"
    _write_table(*_as_it_came(run, labels.root, corrected, dropped), out)
    if links:
        link_tree(labels, corrected, links / "train")
        for test in TEST_FOLDERS:
            if (labels.root / test).is_dir():
                (links / test).symlink_to(labels.root / test)
    score = {labels.files[i]: float(labels.clean_prob[i]) for i in labels.suspects if labels.files[i] in answers}
    return Imported(
        corrected=out,
        reviewed=len(answers),
        changed=sum(label != given[file] for file, label in answers.items()),
        suspects=len(score),
        kept=sum(answers[file] == given[file] for file in score),
        expected=sum(score.values()) / len(score) if score else float("nan"),
    )


def _as_it_came(
    run: Path, root: Path, corrected: dict[str, str], dropped: set[str]
) -> tuple[list[str], Iterable[Sequence]]:
    """Header and rows: those of the run's CSV file with other labels, else file_name and label."""
    data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    if data["source"] != "csv" or Path(data["root"]).suffix.lower() != ".csv":  # folders, Parquet, an imagefolder
        return ["file_name", "label"], corrected.items()
    source = Path(data["root"]) if data.get("images") else root / Path(data["root"]).name
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            header, *rows = (row for row in csv.reader(file) if row)
    except OSError as error:
        raise BadInput(f"{source}: the run's CSV file cannot be read ({error.strerror}); put it back") from error
    name = header.index("file_name" if "file_name" in header else "image_path")
    label = header.index("label")
    rows = [row for row in rows if row[name] not in dropped]
    for row in rows:
        row[label] = corrected.get(row[name], row[label])
    return header, rows


# -- difference --------------------------------------------------------------------------------------------------------


def diff(a: Path, b: Path, out: Path | None = None) -> list[str]:
    """What differs between two sets of labels, in lines; each file that does is a row of the CSV file `out`."""
    roots = [read_labels(path / "labels").root for path in (a, b) if (path / "labels" / "samples.parquet").is_file()]
    one, other = (read(path, next(iter(roots), None)) for path in (a, b))
    both = [file for file in one if file in other]
    differ = [file for file in both if one[file] != other[file]]
    lines = [f"{len(both):,} files in both, {len(differ):,} with another label"]
    for path, mine, theirs in ((a, one, other), (b, other, one)):
        lines += [f"{len(alone):,} files in {path} alone"] if (alone := mine.keys() - theirs.keys()) else []
    swaps = Counter((one[file], other[file]) for file in differ)
    lines += [f"  {before} -> {after}: {count:,}" for (before, after), count in swaps.most_common(20)]
    if len(swaps) > 20:
        lines.append(f"  and {len(swaps) - 20:,} other pairs")
    if out:
        _write_table(["file_name", "a", "b"], [(file, one[file], other[file]) for file in differ], out)
    return lines


def _write_table(header: list[str], rows: Iterable[Sequence], path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def _write_json(content, path: Path) -> None:
    write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1).encode())


def _write_xml(root: ElementTree.Element, path: Path, declared: bool = True) -> None:
    ElementTree.indent(root)
    write_atomic(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=declared))
