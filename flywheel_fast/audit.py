"""What a run says of the labels: which are suspect, the tables that name them, figures for the last table."""

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data.manifest import DROPPED, NOT_REVIEWED, Manifest
from flywheel_fast.errors import BadInput

REVIEWS = pa.array(["", "kept", "corrected", "dropped"])  # the column `review`
FALSE_ALARMS = 0.1  # share of right labels among the suspects that clean_prob lets expect, at most


@dataclass(frozen=True)
class Labels:
    """All that is known of N labels of C classes after the last cycle, in the order of the data set."""

    root: Path  # of the images
    files: np.ndarray  # [N] str, relative to root
    classes: tuple[str, ...]  # C names
    given: np.ndarray  # [N] int64
    true: np.ndarray | None  # [N] int64, where known
    clean_prob: np.ndarray  # [N] float32 in [0, 1]: probability that the given label is right
    suggested: np.ndarray  # [N] int64
    suggested_prob: np.ndarray  # [N] float32
    entropy: np.ndarray  # [N] float32 in [0, 1]: of the posterior, as a share of log C
    networks_agree: np.ndarray  # [N] bool: both networks name the same class
    times_suspected: np.ndarray  # [N] uint8: of the last eight cycles
    posterior_sum: np.ndarray  # [C, C] float64: row true class, column given label; a row's scale has no meaning
    reviewed: np.ndarray | None = None  # [N] int64, as Manifest has it: decided class, NOT_REVIEWED or DROPPED

    @cached_property
    def is_issue(self) -> np.ndarray:  # [N] bool
        """The largest set of doubted labels in which the expected share of false alarms stays below FALSE_ALARMS.

        Doubted: more likely wrong than right, with another suggestion, and not reviewed. A label of clean_prob w is a
        false alarm with probability w, so that the mean of w over a set is the share to expect there.
        """
        doubted = (self.clean_prob < 0.5) & (self.suggested != self.given)
        if self.reviewed is not None:
            doubted &= self.reviewed == NOT_REVIEWED
        doubted = np.flatnonzero(doubted)
        doubted = doubted[np.argsort(self.clean_prob[doubted], kind="stable")]
        expected = np.cumsum(self.clean_prob[doubted], dtype=np.float64) / np.arange(1, len(doubted) + 1)  # rising
        found = np.zeros(len(self.given), bool)
        found[doubted[: np.searchsorted(expected, FALSE_ALARMS, side="right")]] = True
        return found

    @cached_property
    def order(self) -> np.ndarray:  # [N] int64
        """Samples with the suspects first, each group from the lowest clean_prob up."""
        return np.lexsort((self.clean_prob, ~self.is_issue))

    @cached_property
    def suspects(self) -> np.ndarray:  # [number of issues] int64, worst first
        return self.order[: np.count_nonzero(self.is_issue)]

    @cached_property
    def corruption(self) -> np.ndarray:  # [C, C] float64
        """T_full of METHOD.md: row true class, column given label; nan for a class that no sample seems to have."""
        return _share_of_rows(self.posterior_sum)

    @cached_property
    def true_corruption(self) -> np.ndarray | None:  # [C, C] float64
        """The same counted from the true labels, where they are known."""
        if self.true is None:
            return None
        c = len(self.classes)
        return _share_of_rows(np.bincount(self.true * c + self.given, minlength=c * c).reshape(c, c))


def _share_of_rows(sums: np.ndarray) -> np.ndarray:  # [C, C] -> [C, C] float64
    total = sums.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.divide(sums, total, where=total > 0, out=np.full(sums.shape, np.nan))


def selection_quality(clean_prob: np.ndarray, given: np.ndarray, true: np.ndarray) -> tuple[float, float]:  # each [N]
    """AUROC and average precision of 1 - clean_prob against truly wrong labels; nan if all are right or all wrong."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import, and rarely needed

    wrong, score = given != true, -clean_prob  # ranks as 1 - clean_prob does, and keeps tiny probabilities apart
    if wrong.all() or not wrong.any():
        return float("nan"), float("nan")
    return float(roc_auc_score(wrong, score)), float(average_precision_score(wrong, score))


@dataclass(frozen=True)
class Calibration:
    """How far a label_score is the share of right labels among those that have it."""

    score: np.ndarray  # [B] float64, mean label_score of a bin
    right: np.ndarray  # [B] float64, share of its labels that are truly right
    count: np.ndarray  # [B] int64; bins without labels are left out
    error: float  # expected calibration error: mean |score - right| over the labels


def calibration(clean_prob: np.ndarray, right: np.ndarray, bins: int = 10) -> Calibration:  # each [N]
    """Reliability in bins of equal width (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599)."""
    of_bin = np.minimum((clean_prob * bins).astype(np.int64), bins - 1)
    count = np.bincount(of_bin, minlength=bins)
    used = np.flatnonzero(count)
    score, share = (np.bincount(of_bin, values, bins)[used] / count[used] for values in (clean_prob, right))
    return Calibration(score, share, count[used], float(np.average(np.abs(score - share), weights=count[used])))


def share_between(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `count` in `of` were seen (Wilson, JASA 1927)."""
    z2 = 1.96**2
    centre, reach = (count + z2 / 2) / (of + z2), np.sqrt(z2 * (count * (of - count) / of + z2 / 4)) / (of + z2)
    return float(max(centre - reach, 0)), float(min(centre + reach, 1))


# -- figures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    estimated_wrong: float  # share of the labels, mean of 1 - clean_prob
    true_wrong: float | None  # share of the labels, where the truth is known
    suspects: int
    false_alarms: float | None  # share of the suspects to expect right, mean of clean_prob; None without suspects
    precision: float | None  # share of the suspects that are truly wrong; None without suspects or truth
    pairs: list[tuple[str, str, int]]  # (given, suggested, suspects), the commonest five


def summary(labels: Labels) -> Summary:
    names, suspects = labels.classes, labels.suspects
    pairs, counts = np.unique(labels.given[suspects] * len(names) + labels.suggested[suspects], return_counts=True)
    commonest = [(*divmod(int(pairs[k]), len(names)), int(counts[k])) for k in np.argsort(-counts, kind="stable")[:5]]
    wrong = None if labels.true is None else labels.given != labels.true
    return Summary(
        estimated_wrong=float(1 - labels.clean_prob.mean(dtype=np.float64)),
        true_wrong=None if wrong is None else float(wrong.mean()),
        suspects=len(suspects),
        false_alarms=float(labels.clean_prob[suspects].mean(dtype=np.float64)) if len(suspects) else None,
        precision=None if wrong is None or not len(suspects) else float(wrong[suspects].mean()),
        pairs=[(names[given], names[suggested], count) for given, suggested, count in commonest],
    )


def summary_rows(labels: Labels, run: Path) -> list[tuple[str, str]]:
    """Name and value, for the table at the end of the run in the folder `run`."""
    found, n = summary(labels), len(labels.given)
    known = "" if found.true_wrong is None else f" (truly {found.true_wrong:.1%})"
    rows = [("labels estimated wrong", f"{found.estimated_wrong:.1%} of {n:,}{known}")]
    if not found.suspects:
        return [*rows, ("labels to look at", "none")]
    known = "" if found.precision is None else f", truly {found.precision:.1%}"
    known = f" ({1 - found.false_alarms:.1%} of them wrong by estimate{known})"
    rows.append(("labels to look at", f"{found.suspects:,}{known}: the first rows of {run / 'labels' / 'issues.csv'}"))
    pairs = (f"{short(given, 24)} -> {short(suggested, 24)} ({count:,})" for given, suggested, count in found.pairs)
    rows.append(("  most often", ", ".join(pairs)))
    rows.append(("  as pictures", str(run / "plots" / "suspects.png")))
    return rows


# -- tables ------------------------------------------------------------------------------------------------------------


def write_labels(labels: Labels, folder: Path) -> None:
    """samples.parquet in the order of the data set, issues.csv the same with suspects first, corruption.csv.

    Columns as cleanlab names its own; label_score is clean_prob: 0 to 1, lower is worse.
    """
    names = pa.array(labels.classes, pa.string())

    def named(classes: np.ndarray) -> pa.DictionaryArray:  # [N] int64
        return pa.DictionaryArray.from_arrays(pa.array(classes, pa.int32()), names)

    samples = {
        "file_name": labels.files,
        "given_label": named(labels.given),
        "suggested_label": named(labels.suggested),
        "is_label_issue": labels.is_issue,
        "label_score": labels.clean_prob,
        "suggested_prob": labels.suggested_prob,
        "entropy": labels.entropy,
        "networks_agree": labels.networks_agree,
        "times_suspected": labels.times_suspected,
    }
    if labels.true is not None:
        samples["true_label"] = named(labels.true)
    if labels.reviewed is not None:
        samples["review"] = pa.DictionaryArray.from_arrays(pa.array(_kind_of_review(labels), pa.int32()), REVIEWS)
    table = pa.table(samples)
    issues = table.take(labels.order)
    for column in [field.name for field in table.schema if pa.types.is_dictionary(field.type)]:
        issues = issues.set_column(issues.column_names.index(column), column, issues[column].cast(pa.string()))
    _write_csv(issues, folder / "issues.csv")

    content = BytesIO()
    root = json.dumps({"root": str(labels.root.resolve()), "classes": labels.classes})
    with_root = table.replace_schema_metadata({"flywheel_fast": root})
    dictionaries = [name for name in samples if name.endswith("_label")]
    pa.parquet.write_table(with_root, content, compression="zstd", use_dictionary=dictionaries)
    write_atomic(folder / "samples.parquet", content.getbuffer())

    # A millionth is far below what the estimate resolves; nan becomes an empty cell.
    shares = [pa.array(column, from_pandas=True) for column in labels.corruption.T.round(6)]
    _write_csv(pa.table([names, *shares], names=["true_class", *labels.classes]), folder / "corruption.csv")


def _kind_of_review(labels: Labels) -> np.ndarray:  # [N] int64, into REVIEWS
    kind = np.where(labels.reviewed == labels.given, 1, 2)
    kind[labels.reviewed == NOT_REVIEWED] = 0
    kind[labels.reviewed == DROPPED] = 3
    return kind


def _write_csv(table: pa.Table, path: Path) -> None:
    content = BytesIO()
    pa.csv.write_csv(table, content)
    write_atomic(path, content.getbuffer())


def read_samples(folder: Path) -> pa.Table:
    """samples.parquet, by this thread alone: pyarrow's own have been seen to abort a process that ends."""
    return pa.parquet.ParquetFile(BytesIO((folder / "samples.parquet").read_bytes())).read(use_threads=False)


def read_labels(folder: Path) -> Labels:
    """What `write_labels` wrote into `folder`. Raises BadInput where it is absent or something else."""
    try:
        table = read_samples(folder)
        origin = json.loads(table.schema.metadata[b"flywheel_fast"])
        with open(folder / "corruption.csv", newline="", encoding="utf-8") as file:
            shares = [[float(share or 0) for share in row[1:]] for row in list(csv.reader(file))[1:]]
        names = pa.array(origin["classes"], pa.string())

        def classes(column: str) -> np.ndarray:  # [N] int64
            return pc.index_in(table[column].cast(pa.string()), value_set=names).to_numpy().astype(np.int64)

        reviewed = None
        if "review" in table.column_names:
            kind = pc.index_in(table["review"].cast(pa.string()), value_set=REVIEWS).to_numpy()
            decided = classes("suggested_label")  # what a person decided on is what the run suggests
            reviewed = np.choose(kind, [NOT_REVIEWED, decided, decided, DROPPED])
        return Labels(
            root=Path(origin["root"]),
            files=table["file_name"].to_numpy().astype(str),
            classes=tuple(origin["classes"]),
            given=classes("given_label"),
            true=classes("true_label") if "true_label" in table.column_names else None,
            clean_prob=table["label_score"].to_numpy(),
            suggested=classes("suggested_label"),
            suggested_prob=table["suggested_prob"].to_numpy(),
            entropy=table["entropy"].to_numpy(),
            networks_agree=table["networks_agree"].to_numpy(),
            times_suspected=table["times_suspected"].to_numpy(),
            posterior_sum=np.array(shares, np.float64),
            reviewed=reviewed,
        )
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{folder}: does not hold the labels of a run ({reason}); name a finished run") from error


def matched(run: Path, train_set: Manifest) -> tuple[Labels, np.ndarray]:
    """What an earlier run has found, and the row [N] int64 there of each image of `train_set`, by file name.

    Raises BadInput where classes, files or given labels differ.
    """
    found, cure = read_labels(run / "labels"), "name a run on the same data, with the same labels"
    said = f"cycle.init_labels={run}"
    if found.classes != train_set.classes:
        strange = sorted(set(found.classes) ^ set(train_set.classes))
        how = f"{strange[0]!r} is in one only" if strange else "their order differs"
        raise BadInput(f"{said}: its classes are not those of the data ({how}); {cure}")
    row_of = {name: row for row, name in enumerate(found.files.tolist())}
    rows = np.array([row_of.get(name, -1) for name in train_set.files.tolist()], dtype=np.int64)
    if len(absent := train_set.files[rows < 0]):
        raise BadInput(f"{said}: it knows nothing of {len(absent):,} of the data's files, first {absent[0]}; {cure}")
    if len(other := train_set.files[found.given[rows] != train_set.labels]):
        raise BadInput(f"{said}: {len(other):,} of the data's files had another label there, first {other[0]}; {cure}")
    return found, rows


def short(name: str, length: int) -> str:
    """One line of at most `length` characters; start and end stay, as either may be what tells names apart."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length // 2]}…{name[1 + length // 2 - length :]}"
