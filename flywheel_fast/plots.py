"""What a run shows of the labels: its curves, the corruption matrix, a histogram of clean_prob, the suspects."""

import csv
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import font_manager, style
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter
from PIL import Image, ImageOps

from flywheel_fast.audit import Labels, short
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.errors import BadInput

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
    yield "curves.png", _curves(read_metrics(metrics_csv))
    if labels:
        yield "corruption.png", _corruption(labels)
        yield "clean_prob.png", _histogram(labels)
        yield "suspects.png", _sheet(labels)


def read_metrics(path: Path) -> dict[str, np.ndarray]:
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
    names, size = [short(labels.classes[k], 16) for k in named], 9 if c <= 20 else 6
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
    suspects = labels.suspects
    limit = float(labels.clean_prob[suspects[-1]]) if len(suspects) else 0
    axes.axvline(limit, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(limit + 0.01, top * 2.4, f"← {len(suspects):,} suspects", va="top")
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
        tile = _tile(labels.root / str(labels.files[i]))
        if tile is None:
            tile, text = Image.new("RGB", (TILE, TILE), PAPER), f"cannot be read:\n{short(str(labels.files[i]), 24)}"
            axes.text(0.5, 0.5, text, ha="center", va="center", size=7, transform=axes.transAxes)
        axes.imshow(tile)
        given, suggested = (short(labels.classes[k], 20) for k in (labels.given[i], labels.suggested[i]))
        below = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(f"{given}\n→ {suggested}", (0.5, 0), (0, -4), size=8, **below)
        axes.annotate(f"score {labels.clean_prob[i]:.3f}", (0.5, 0), (0, -28), size=7, color=GREY, **below)
    return figure


def picture(path: Path, side: int) -> Image.Image | None:
    """The picture as RGBA, of at least side x side where it has as much; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))  # JPEG decodes at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
                image = image.point(lambda value: value / 256).convert("L")
            return image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what PIL raises for what is no image
        return None


def thumbnail(path: Path, side: int) -> bytes | None:
    """The picture as WebP of at most side x side pixels, for pages; None where it cannot be read."""
    image = picture(path, side)
    if image is None:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    paper = Image.new("RGBA", image.size, PAPER)
    paper.alpha_composite(image)
    content = BytesIO()
    paper.convert("RGB").save(content, "webp", quality=75, lossless=max(image.size) <= 32)
    return content.getvalue()


def _tile(path: Path) -> Image.Image | None:
    """The picture fitted into a square tile; None where it cannot be read."""
    image = picture(path, TILE)
    if image is None:
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
