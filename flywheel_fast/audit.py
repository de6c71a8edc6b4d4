"""What a run says of the labels: tables that name the suspects, plots that show them, figures for the last table."""

import csv
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from matplotlib import font_manager, style
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter
from PIL import Image, ImageOps

from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.errors import BadInput


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
    posterior_sum: np.ndarray  # [C, C] float64: row true class, column given label

    @cached_property
    def is_issue(self) -> np.ndarray:  # [N] bool
        return (self.clean_prob < 0.5) & (self.suggested != self.given)

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


# -- figures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    estimated_wrong: float  # share of the labels, mean of 1 - clean_prob
    true_wrong: float | None  # share of the labels, where the truth is known
    suspects: int
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
    known = "" if found.precision is None else f" ({found.precision:.1%} of them truly wrong)"
    rows.append(("labels to look at", f"{found.suspects:,}{known}: the first rows of {run / 'labels' / 'issues.csv'}"))
    pairs = (f"{_short(given, 24)} -> {_short(suggested, 24)} ({count:,})" for given, suggested, count in found.pairs)
    rows.append(("  most often", ", ".join(pairs)))
    rows.append(("  as pictures", str(run / "plots" / "suspects.png")))
    return rows


# -- tables ------------------------------------------------------------------------------------------------------------


def write_labels(labels: Labels, folder: Path) -> None:
    """samples.parquet in the order of the data set, issues.csv with suspects first, corruption.csv.

    The columns of issues.csv are named as cleanlab's; label_score is clean_prob: 0 to 1, lower is worse.
    """
    files, names = pa.array(labels.files), pa.array(labels.classes, pa.string())
    given, suggested = pa.array(labels.given, pa.int32()), pa.array(labels.suggested, pa.int32())
    samples = pa.table(
        {
            "file_name": files,
            "given_label": pa.DictionaryArray.from_arrays(given, names),
            "clean_prob": labels.clean_prob,
            "suggested_label": pa.DictionaryArray.from_arrays(suggested, names),
            "suggested_prob": labels.suggested_prob,
        }
    )
    content = BytesIO()
    pa.parquet.write_table(samples, content, compression="zstd", use_dictionary=["given_label", "suggested_label"])
    write_atomic(folder / "samples.parquet", content.getbuffer())

    order = labels.order
    issues = {
        "file_name": files.take(order),
        "given_label": names.take(given.take(order)),
        "suggested_label": names.take(suggested.take(order)),
        "is_label_issue": labels.is_issue[order],
        "label_score": labels.clean_prob[order],
        "suggested_prob": labels.suggested_prob[order],
    }
    _write_csv(issues.keys(), issues.values(), folder / "issues.csv")

    # A millionth is far below what the estimate resolves; nan becomes an empty cell.
    shares = [pa.array(column, from_pandas=True) for column in labels.corruption.T.round(6)]
    _write_csv(["true_class", *labels.classes], [names, *shares], folder / "corruption.csv")


def _write_csv(names, columns, path: Path) -> None:
    content = BytesIO()
    pa.csv.write_csv(pa.table(list(columns), names=list(names)), content)
    write_atomic(path, content.getbuffer())


# -- plots -------------------------------------------------------------------------------------------------------------

BLUE, VERMILION, INK, GREY, PAPER = "#0072B2", "#D55E00", "#1F2328", "#6E7781", "#F3F4F6"  # Okabe and Ito's, and greys
LOOK = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5"
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
FALLBACKS = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Arial Unicode MS", "Microsoft YaHei", "Malgun Gothic")


def write_plots(labels: Labels | None, metrics_csv: Path, folder: Path) -> None:
    """curves.png from a run's metrics.csv and, where there are labels to speak of, the three plots of them.

    Raises BadInput when metrics.csv cannot be read.
    """
    installed = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in FALLBACKS if name in installed)]
    with style.context(LOOK | {"font.family": families}, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that no font here has shows as boxes
        for name, figure in _figures(labels, metrics_csv):
            content = BytesIO()
            figure.savefig(content, format="png")
            write_atomic(folder / name, content.getbuffer())


def _figures(labels: Labels | None, metrics_csv: Path) -> Iterator[tuple[str, Figure]]:
    yield "curves.png", _curves(_read_metrics(metrics_csv))
    if labels:
        yield "corruption.png", _corruption(labels)
        yield "clean_prob.png", _histogram(labels)
        yield "suspects.png", _sheet(labels)


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Each column [epochs] float64, nan where its cell is empty."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = rows[0].keys() | {"cycle"} if rows else ()
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: is not a run's metrics.csv ({error}); name the one that a run wrote") from error


PANELS = [  # title, how a value is written, and its curves: column, name, colour
    ("Test accuracy", "{:.1%}", [("test_acc_aux", "auxiliary", BLUE), ("test_acc_main", "main", VERMILION)]),
    ("Share of clean labels (γ)", "{:.1%}", [("gamma", "estimated", BLUE), ("true_clean", "true", INK)]),
    ("Wrong labels told from right (AUROC)", "{:.3f}", [("selection_auroc", "AUROC", BLUE)]),
]


def _curves(metrics: dict[str, np.ndarray]) -> Figure:
    """A panel for each of accuracy, gamma and AUROC that was measured at least once."""
    measured = {name for name, column in metrics.items() if np.isfinite(column).any()}
    panels = [panel for panel in PANELS if panel[2][0][0] in measured or panel[2][-1][0] in measured - {"true_clean"}]
    if not panels:
        return _note("Nothing was measured: no test split, and no cycle yet")
    figure = Figure(figsize=(4 * len(panels), 3.2))
    for axes, (title, form, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ends = []
        for column, name, color in curves:
            if column in measured:
                seen = np.isfinite(metrics[column])
                epochs, values = metrics["cycle"][seen], metrics[column][seen]
                dash = {"linestyle": (0, (4, 3)), "linewidth": 1.2} if column == "true_clean" else {"linewidth": 1.8}
                axes.plot(epochs, values, color=color, marker="o" if len(epochs) == 1 else "", **dash)
                ends.append((values[-1], f"{name} {form.format(values[-1])}", color))
        axes.set_title(title)
        axes.set_xlabel("epoch")
        first, last = metrics["cycle"][[0, -1]]
        axes.set_xlim((first, last) if last > first else (first - 0.5, first + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        low, high = axes.dataLim.intervaly
        spare = max(0.06 * (high - low), 0.02)  # never so tight that a flat curve looks eventful
        axes.set_ylim(low - spare, high + spare)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None) if "%" in form else "{x:.2f}")
        axes.grid(axis="y", color="#E5E7EB", linewidth=0.8)
        axes.set_axisbelow(True)
        _name_ends(axes, ends)
    return figure


def _name_ends(axes, ends: list[tuple[float, str, str]]) -> None:
    """Writes each curve's name and last value beside its end; two that would overlap are moved apart."""
    bottom, top = axes.get_ylim()
    places = sorted(((value - bottom) / (top - bottom), text, color) for value, text, color in ends)
    overlap = max(0, 0.08 - (places[-1][0] - places[0][0])) / 2 if len(places) > 1 else 0
    for (place, text, color), shift in zip(places, (-overlap, overlap), strict=False):
        axes.text(1.02, place + shift, text, color=color, va="center", transform=axes.transAxes)


def _corruption(labels: Labels) -> Figure:
    """The estimated matrix and, where known, the true one beside it; up to 12 classes with every cell in figures."""
    c, matrices = len(labels.classes), {"Estimated": labels.corruption}
    if labels.true is not None:
        matrices["True"] = labels.true_corruption
    side = float(np.clip(0.5 * c, 2.5, 7.5))
    figure = Figure(figsize=((side + 0.4) * len(matrices) + 1.6, side + 1.6), layout="compressed")
    panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    named = range(0, c, -(-c // 50))  # as many names as can be read
    names, size = [_short(labels.classes[k], 16) for k in named], 9 if c <= 20 else 6
    # With many classes the noise that matters is a thousandth of a row in each cell: only a scale by decades shows it.
    norm = Normalize(0, 1) if c <= 12 else LogNorm(1e-3, 1)
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
        axes.set_facecolor("#D0D7DE")  # shows where a class has no samples
        image = axes.imshow(matrix if c <= 12 else np.maximum(matrix, 1e-4), norm=norm, cmap="Blues")
        for (row, column), share in np.ndenumerate(matrix if c <= 12 else np.empty((0, 0))):
            text, color = "–" if np.isnan(share) else f"{share:.0%}", "white" if share > 0.6 else INK
            axes.text(column, row, text, ha="center", va="center", color=color, size=8)
        axes.set_title(title)
        axes.set_xticks(named, names, rotation=90 if c > 3 else 0, size=size)
        axes.set_yticks(named, names, size=size)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("given label")
    panels[0].set_ylabel("true class (each row: 100%)")
    if c > 12:
        percent = FuncFormatter(lambda share, _: f"{100 * share:g}%")
        bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30, extend="min", format=percent)
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
        bar.minorticks_off()
    return figure


def _histogram(labels: Labels) -> Figure:
    """clean_prob of all labels; the truly wrong ones apart where they are known."""
    groups = [(np.ones(len(labels.given), bool), "labels", BLUE, "left")]
    if labels.true is not None:
        right = labels.given == labels.true
        groups = [(right, "truly right", BLUE, "right"), (~right, "truly wrong", VERMILION, "left")]
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    top = 1
    for chosen, name, color, side in groups:
        counts, edges = np.histogram(labels.clean_prob[chosen], bins=50, range=(0, 1))
        axes.stairs(counts, edges, baseline=0.1, fill=True, color=color, alpha=0.25)
        axes.stairs(counts, edges, baseline=0.1, color=color, linewidth=1.4)
        axes.set_title(f"{counts.sum():,} {name}", color=color, loc=side)
        top = max(top, counts.max())
    axes.set_yscale("log")
    axes.set_ylim(0.7, top * 3)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(0.49, top * 2.4, f"{len(labels.suspects):,} suspects", ha="right", va="top")
    axes.set_xlabel("probability that the given label is right")
    axes.set_ylabel("labels")
    return figure


TILE = 240  # pixels


def _sheet(labels: Labels) -> Figure:
    """The 36 likeliest wrong labels as pictures: given and suggested class, clean_prob."""
    shown = labels.suspects[:36]
    if not len(shown):
        return _note("No label is suspected of being wrong")
    rows = -(-len(shown) // 6)
    figure = Figure(figsize=(10.5, 2.3 * rows + 0.5))
    title = f"The {len(shown)} likeliest of {len(labels.suspects):,} suspects: given label → suggested label"
    figure.suptitle(title, weight="bold", x=0.012, ha="left", size=11)
    panels = figure.subplots(rows, 6, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, i in zip(panels, shown, strict=False):
        tile = _thumbnail(labels.root / str(labels.files[i]))
        if tile is None:
            tile, text = Image.new("RGB", (TILE, TILE), PAPER), f"cannot be read:\n{_short(str(labels.files[i]), 24)}"
            axes.text(0.5, 0.5, text, ha="center", va="center", size=7, transform=axes.transAxes)
        axes.imshow(tile)
        given, suggested = (_short(labels.classes[k], 20) for k in (labels.given[i], labels.suggested[i]))
        below = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(f"{given}\n→ {suggested}", (0.5, 0), (0, -4), size=8, **below)
        axes.annotate(f"score {labels.clean_prob[i]:.3f}", (0.5, 0), (0, -28), size=7, color=GREY, **below)
    return figure


def _thumbnail(path: Path) -> Image.Image | None:
    """The picture fitted into a square tile; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (TILE, TILE))  # JPEG decodes at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
                image = image.point(lambda value: value / 256).convert("L")
            image = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what PIL raises for what is no image
        return None
    smooth = max(image.size) > TILE
    image = ImageOps.contain(image, (TILE, TILE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    tile = Image.new("RGBA", (TILE, TILE), PAPER)
    tile.alpha_composite(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return tile.convert("RGB")


def _note(text: str) -> Figure:
    figure = Figure(figsize=(7, 1.2))
    figure.text(0.5, 0.5, text, ha="center", va="center", size=11)
    return figure


def _short(name: str, length: int) -> str:
    """One line of at most `length` characters; start and end stay, as either may be what tells names apart."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length // 2]}…{name[1 + length // 2 - length :]}"
