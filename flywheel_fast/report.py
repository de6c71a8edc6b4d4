"""One page that says what a run found, or how several compare: it opens from disk and asks nothing of the network."""

import base64
import csv
import json
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from flywheel_fast import charts, duplicates, oddities, plots
from flywheel_fast import config as configs
from flywheel_fast.audit import FALSE_ALARMS, Labels, read_labels, summary
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.embedding import Embedding, of_run
from flywheel_fast.errors import BadInput, Failure
from flywheel_fast.run_folder import BAD_FILES

MARK = '<meta name="generator" content="flywheel-fast report">'  # a file without it is not replaced
SIDE, PICTURES, PICTURE_BYTES = 96, 480, 3_000_000  # pixels of a thumbnail; the most of them, and of their bytes
REVIEWED = {  # what may change by a review, and its column
    "test accuracy, auxiliary": "test_acc_aux",
    "test accuracy, main": "test_acc_main",
    "wrong labels told from right (AUROC)": "selection_auroc",
    "labels right after refurbishing": "refurbish_acc",
}
LABELLING = {"rightly taken for clean or wrong": "selection_acc", "right after refurbishing": "refurbish_acc"}
ODD = {  # kinds of oddities, and what they are called; so many pictures of each
    "outlier": "Unlike all others",
    "near-duplicate": "Near-duplicates with different labels",
    "two classes": "Fit two classes",
}
ODD_PICTURES = 12
CELLS = 20  # up to so many classes the corruption matrix is a table, above it a picture


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    folder: Path
    name: str  # the shortest end of the folder's path that no other run of the report has
    config: str  # YAML
    versions: dict[str, str]
    result: dict
    metrics: dict[str, np.ndarray]  # column -> [epochs] float64, nan where unknown
    labels: Labels | None  # None for plain cross-entropy
    embedding: Embedding | str  # of the test images, or why there is none
    bad_files: list[dict[str, str]]  # that were left out: file_name, problem


def write(folders: list[Path], out: Path | None = None, images: Path | None = None) -> Path:
    """Writes the report and returns where: by default RUN/report.html, or comparison.html for several runs.

    `images`: where the pictures lie now, if they have moved since the run. Raises BadInput for a folder that holds no
    finished run, and for an `out` that is something other than a report.
    """
    runs = [_read(folder, name, images) for folder, name in zip(folders, _names(folders), strict=True)]
    out = out or (folders[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    if out.is_dir() or (out.exists() and MARK.encode() not in out.read_bytes()[:500]):
        raise BadInput(f"-o {out}: is there already and is no report; name another file")
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"percent": _percent, "number": lambda value: f"{value:,}"}
    content = _single(runs[0]) if len(runs) == 1 else _comparison(runs)
    text = page.get_template("report.html").render(mark=MARK, cells=CELLS, **content)
    write_atomic(out, text.encode())
    return out


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise BadInput("one of the runs is named twice; name each once")
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-length:]) for part in parts]


def _read(folder: Path, name: str, images: Path | None) -> Run:
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        versions = json.loads((folder / "env.json").read_bytes())
        result = json.loads((folder / "result.json").read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder}: is not the folder of a finished run ({error}); name one, such as runs/digits"
        ) from error
    labels = read_labels(folder / "labels") if (folder / "labels").is_dir() else None
    if labels and images:
        labels = replace(labels, root=images)
    metrics = plots.read_metrics(folder / "metrics.csv")
    return Run(folder, name, config, versions, result, metrics, labels, _embedding(folder, images), _bad_files(folder))


def _embedding(folder: Path, images: Path | None) -> Embedding | str:
    try:
        return of_run(folder, images)
    except (BadInput, Failure) as error:
        return str(error)


def _bad_files(folder: Path) -> list[dict[str, str]]:
    path = folder / BAD_FILES
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None or np.isnan(share) else f"{share:.{digits}%}"


# -- one run -----------------------------------------------------------------------------------------------------------


def _single(run: Run) -> dict:
    used = "aux" if run.labels else "main"
    return {
        "title": run.name,
        "runs": [run],
        "charts": [
            *_lines("Test accuracy", {"auxiliary": "test_acc_aux", "main": "test_acc_main"}, run),
            *_lines("Share of clean labels", {"estimated": "gamma", "true": "true_clean"}, run, needs="gamma"),
            *_lines("Wrong labels told from right", {"AUROC": "selection_auroc", "AP": "selection_ap"}, run),
            *_lines("Labels told apart, and refurbished", LABELLING, run),
        ],
        "planes": _planes([run]),
        "accuracy": run.result.get(f"test_acc_{used}"),
        "merged": run.result["merged"],
        "reviewed": _reviewed(run),
        "differences": {},
        "found": _found(run.labels) if run.labels else None,
        "odd": _odd(run),
    }


def _planes(runs: list[Run]) -> list[tuple[str, dict | str]]:
    """The test images of each run by name, or why there are none."""
    planes = [(run.name, run.embedding) for run in runs]
    return [(name, found if isinstance(found, str) else charts.plane(found)) for name, found in planes]


def _lines(title: str, curves: dict[str, str], run: Run, needs: str | None = None) -> list[dict]:
    """One chart of a run's columns {name: column} that were measured; none where there is nothing to show."""
    known = [(name, *_measured(run, column)) for name, column in curves.items() if column in run.metrics]
    known = [line for line in known if len(line[1])]
    if not known or (needs and not len(_measured(run, needs)[0])):
        return []
    return [charts.over_epochs(title, known, percent="AUROC" not in curves)]


def _measured(run: Run, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs [K] and values [K] where the column is known."""
    seen = np.isfinite(run.metrics[column])
    return run.metrics["cycle"][seen], run.metrics[column][seen]


def _reviewed(run: Run) -> dict | None:
    """What people decided, and (name, before, after) of what the run measured before it knew and at its end."""
    if "reviews" not in run.result:
        return None
    known = np.nan_to_num(run.metrics.get("reviewed", np.zeros(len(run.metrics["cycle"]))))
    before = np.flatnonzero(known < known[-1])  # epochs

    def last(column: str, epochs: np.ndarray | slice) -> float | None:
        values = run.metrics[column][epochs] if column in run.metrics else np.empty(0)
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    rows = [(name, last(column, before), last(column, slice(None))) for name, column in REVIEWED.items()]
    changes = [row for row in rows if None not in row] if len(before) else []
    return run.result["reviews"] | {"changes": changes, "epochs": len(known) - len(before)}


def _found(labels: Labels) -> dict:
    """What the page says of the labels of one run."""
    gallery, unread = _gallery(labels)
    return {
        "summary": summary(labels),
        "n": len(labels.given),
        "limit": FALSE_ALARMS,
        "classes": _classes(labels),
        "confusions": _confusions(labels),
        "pairs": _pairs(labels),
        "matrices": _matrices(labels),
        "histogram": charts.histogram(labels),
        "reliability": charts.reliability(labels),
        "gallery": gallery,
        "more": len(np.unique(labels.given[labels.suspects])) - len(gallery),
        "unread": unread,
        "duplicates": _duplicates(labels),
        "compared": min(duplicates.COMPARED, len(labels.given)),
    }


def _classes(labels: Labels) -> list[dict]:
    """A row a class, the worst first: share of its given labels that are wrong, by estimate and in truth."""
    c = len(labels.classes)
    count = np.bincount(labels.given, minlength=c)
    wrong = np.bincount(labels.given, 1 - labels.clean_prob.astype(np.float64), minlength=c) / np.maximum(count, 1)
    suspects = np.bincount(labels.given[labels.suspects], minlength=c)
    true = [None] * c
    if labels.true is not None:
        true = np.bincount(labels.given, labels.given != labels.true, minlength=c) / np.maximum(count, 1)
    rows = zip(labels.classes, count.tolist(), wrong.tolist(), true, suspects.tolist(), strict=True)
    rows = [dict(zip(("name", "count", "wrong", "true", "suspects"), row, strict=True)) for row in rows]
    return sorted(rows, key=lambda row: -row["wrong"])


def _swaps(labels: Labels, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[C, C] float64: weight [N] of the labels in each cell; row given label, column `other` [N], diagonal zero."""
    c = len(labels.classes)
    sums = np.bincount(labels.given * c + other, weight, minlength=c * c).reshape(c, c)
    np.fill_diagonal(sums, 0)
    return sums


def _estimated_swaps(labels: Labels) -> np.ndarray:
    return _swaps(labels, labels.suggested, 1 - labels.clean_prob.astype(np.float64))


def _confusions(labels: Labels, most: int = 8) -> list[dict]:
    """Of what is labelled `given` and wrong, the share that is `other`: the cells that hold most labels."""
    swaps = _estimated_swaps(labels)
    shares = swaps / np.maximum(swaps.sum(axis=1, keepdims=True), 1e-12)
    true = None
    if labels.true is not None:
        true = _swaps(labels, labels.true, np.ones(len(labels.given)))
        true /= np.maximum(true.sum(axis=1, keepdims=True), 1e-12)
    largest = [divmod(int(cell), len(labels.classes)) for cell in np.argsort(-swaps, axis=None, kind="stable")[:most]]
    return [
        {
            "given": labels.classes[given],
            "other": labels.classes[other],
            "share": shares[given, other],
            "true": None if true is None else true[given, other],
            "count": swaps[given, other],
        }
        for given, other in largest
        if swaps[given, other] >= 0.5  # not even one label
    ]


def _pairs(labels: Labels, most: int = 10) -> list[tuple[str, str, float]]:
    """The pairs of classes that are taken for each other most: names, and labels wrong in either direction."""
    swaps = _estimated_swaps(labels)
    both = np.triu(swaps + swaps.T)
    largest = [divmod(int(cell), len(labels.classes)) for cell in np.argsort(-both, axis=None, kind="stable")[:most]]
    return [(labels.classes[a], labels.classes[b], both[a, b]) for a, b in largest if both[a, b] >= 0.5]


def _matrices(labels: Labels) -> list[dict]:
    """The corruption matrix, estimated and true; as rows of figures, or as a picture of one pixel a cell."""
    shares = {"Estimated": labels.corruption} | ({"True": labels.true_corruption} if labels.true is not None else {})
    if len(labels.classes) <= CELLS:
        return [{"title": title, "names": labels.classes, "rows": matrix.tolist()} for title, matrix in shares.items()]
    return [{"title": title, "picture": _heat(matrix)} for title, matrix in shares.items()]


def _heat(matrix: np.ndarray) -> str:
    """[C, C] -> PNG as a data URI: blue, the more opaque the larger; three decades, so that small shares show."""
    depth = np.clip(1 + np.log10(np.maximum(np.nan_to_num(matrix), 1e-9)) / 3, 0, 1)
    pixels = np.empty((*matrix.shape, 4), np.uint8)
    pixels[..., :3] = 0x1F, 0x7A, 0xE0
    pixels[..., 3] = np.round(depth * 15) * 17  # sixteen shades keep the file small
    content = BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return _data_uri(content.getvalue(), "png")


# -- pictures ----------------------------------------------------------------------------------------------------------


def _gallery(labels: Labels) -> tuple[list[dict], list[str]]:
    """The worst suspects of each given label as pictures, most suspected class first; and files that cannot be read."""
    of_class = labels.given[labels.suspects]
    counts = np.bincount(of_class, minlength=len(labels.classes))
    suspected = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    each = int(np.clip(PICTURES // max(len(suspected), 1), 8, 24))
    gallery, unread, left = [], [], PICTURE_BYTES
    for label in suspected[: PICTURES // each]:
        tiles = []
        for i in labels.suspects[of_class == label][:each]:
            picture = _thumbnail(labels.root / labels.files[i]) if left > 0 else None
            if picture is None and left > 0:
                unread.append(labels.files[i])
            left -= len(picture or "")
            scores = {"score": labels.clean_prob[i], "prob": labels.suggested_prob[i]}
            tiles.append(
                {"file": labels.files[i], "picture": picture, "suggested": labels.classes[labels.suggested[i]]} | scores
            )
        gallery.append({"given": labels.classes[label], "count": int(counts[label]), "tiles": tiles})
    return gallery, unread


def _thumbnail(path: Path) -> str | None:
    picture = plots.thumbnail(path, SIDE)
    return None if picture is None else _data_uri(picture, "webp")


def _data_uri(content: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"


def _duplicates(labels: Labels, most: int = 50) -> dict:
    """Copies with different labels: the first groups, the members of each that are shown, and how many in all."""
    groups = duplicates.groups(labels)
    shown = [
        [
            {
                "file": labels.files[i],
                "picture": _thumbnail(labels.root / labels.files[i]),
                "given": labels.classes[labels.given[i]],
            }
            for i in copies[:4]
        ]
        for copies in groups[:most]
    ]
    return {"count": len(groups), "shown": shown}


def _odd(run: Run) -> list[dict]:
    """What a run on features found odd: of each kind that there is, the oddest pictures, and how many in all."""
    found = oddities.read(run.folder / "labels")
    kinds = []
    for kind, title in ODD.items():
        of_kind = [one for one in found if one.kind == kind]
        paired, tiles = kind == "near-duplicate", []
        if paired:  # each pair once
            first: dict[frozenset[str], oddities.Oddity] = {}
            for one in of_kind:
                first.setdefault(frozenset((one.file_name, one.detail)), one)
            of_kind = list(first.values())
        for one in of_kind[:ODD_PICTURES]:
            files = [one.file_name, one.detail] if paired else [one.file_name]
            pictures = [(file, _thumbnail(run.labels.root / file)) for file in files]
            tiles.append({"pictures": pictures, "given": one.given_label, "detail": one.detail})
        if tiles:
            kinds.append({"title": title, "count": len(of_kind), "tiles": tiles})
    return kinds


# -- several runs ------------------------------------------------------------------------------------------------------


def _comparison(runs: list[Run]) -> dict:
    names = [run.name for run in runs]

    def chart(title: str, *columns: str, percent: bool = True) -> list[dict]:
        """One line a run, of the first of the columns that it has measured."""
        lines = []
        for run in runs:
            measured = [_measured(run, name) for name in columns if name in run.metrics]
            lines += [(run.name, *points) for points in [points for points in measured if len(points[0])][:1]]
        if not lines:
            return []
        drawn = charts.over_epochs(title, lines, percent)
        for line in drawn["lines"]:
            line["color"] = names.index(line["name"])  # a run has one colour, whatever was measured of the others
        return [drawn]

    accuracy = [(run.result.get(f"test_acc_{'aux' if run.labels else 'main'}"), run.name) for run in runs]
    loaded = [yaml.safe_load(run.config) for run in runs]
    keys = dict.fromkeys(key for other in loaded[1:] for key in configs.difference(loaded[0], other))
    return {
        "title": f"{len(runs)} runs compared",
        "runs": runs,
        "charts": [
            *chart("Test accuracy", "test_acc_aux", "test_acc_main"),
            *chart("Wrong labels told from right (AUROC)", "selection_auroc", percent=False),
            *chart("Labels rightly taken for clean or wrong", "selection_acc"),
            *chart("Labels right after refurbishing", "refurbish_acc"),
        ],
        "planes": _planes(runs),
        "differences": {key: [_value(config, key) for config in loaded] for key in keys},
        "merged": {},
        "reviewed": None,
        "found": None,
        "best": max((known for known in accuracy if known[0] is not None), default=None),
        "matrices": [(run.name, _matrices(run.labels)) for run in runs if run.labels],
    }


def _value(config: dict, key: str) -> str:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return "" if config is None else str(config)
