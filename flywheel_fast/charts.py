"""Charts of the report, scaled to the SVG of 360 x 230 that its template draws."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from flywheel_fast.audit import Labels, calibration, short
from flywheel_fast.data.manifest import NOT_REVIEWED
from flywheel_fast.embedding import CLASSES, Embedding

LEFT, RIGHT, TOP, BOTTOM = 46, 344, 12, 194  # edges of the plot in the drawing
Line = tuple[str, np.ndarray, np.ndarray]  # name, x [K], y [K], none of them nan


def over_epochs(title: str, lines: list[Line], percent: bool = True) -> dict:
    """Of shares. The scale leaves room above and below, so that a flat curve does not look eventful."""
    x, y = (np.concatenate([line[k] for line in lines]) for k in (1, 2))
    spare = max(0.05 * np.ptp(y), 0.01)
    form = "{:.1%}" if percent else "{:.3f}"
    across, up = _scale(x.min(), x.max(), LEFT, RIGHT), _scale(y.min() - spare, y.max() + spare, BOTTOM, TOP)
    return {
        "title": title,
        "axis": "epoch",
        "x": [(across(value), f"{value:.0f}") for value in _ticks(x.min(), x.max(), integer=True)],
        "y": [
            (up(value), f"{100 * value:g}%" if percent else f"{value:g}")
            for value in _ticks(y.min() - spare, min(y.max() + spare, 1))
        ],
        "lines": [
            {
                "name": name,
                "color": color,
                "value": form.format(ys[-1]),
                "points": _points(across(xs), up(ys)),
                "dots": [(across(xs[-1]), up(ys[-1]))],
            }
            for color, (name, xs, ys) in enumerate(lines)
        ],
        "bars": [],
    }


def reliability(labels: Labels) -> dict | None:
    """Score against share of right labels, in ten bins; with the expected calibration error. None without the truth.

    Of labels that nobody has reviewed: a decision is no estimate.
    """
    if labels.true is None:
        return None
    own = slice(None) if labels.reviewed is None else labels.reviewed == NOT_REVIEWED
    if not len(labels.given[own]):
        return None
    found = calibration(labels.clean_prob[own], (labels.given == labels.true)[own])
    across, up = _scale(0, 1, LEFT, RIGHT), _scale(0, 1, BOTTOM, TOP)
    ideal, dots = np.array([0.0, 1.0]), (across(found.score), up(found.right))
    share = [(value, f"{value:.0%}") for value in (0, 0.25, 0.5, 0.75, 1)]
    return {
        "title": "Share of right labels by label_score",
        "axis": "label_score, mean of a tenth of its range",
        "x": [(across(value), text) for value, text in share],
        "y": [(up(value), text) for value, text in share],
        "lines": [
            {
                "name": "truly right",
                "color": 0,
                "value": "",
                "points": _points(*dots),
                "dots": list(zip(*dots, strict=True)),
            },
            {"name": "if calibrated", "color": 1, "value": "", "points": _points(across(ideal), up(ideal)), "dots": []},
        ],
        "bars": [],
        "error": found.error,
    }


def histogram(labels: Labels, bins: int = 40) -> dict:
    """label_score of all labels on a scale of decades, the truly wrong apart where they are known."""
    groups = {"labels": np.ones(len(labels.given), bool)}
    if labels.true is not None:
        groups = {"truly right": labels.given == labels.true, "truly wrong": labels.given != labels.true}
    counts = {name: np.histogram(labels.clean_prob[chosen], bins, (0, 1))[0] for name, chosen in groups.items()}
    decades = int(np.ceil(np.log10(max(2, *(values.max() for values in counts.values())))))
    across, up = _scale(0, 1, LEFT, RIGHT), _scale(np.log10(0.8), decades, BOTTOM, TOP)
    width = (RIGHT - LEFT) / bins

    def boxes(values: np.ndarray) -> list[tuple[float, float, float, float]]:  # [bins] -> x, y, width, height of each
        tops = up(np.log10(np.maximum(values, 1)))
        return [(across(k / bins), tops[k], width, BOTTOM - tops[k]) for k in np.flatnonzero(values)]

    return {
        "title": "label_score of all labels",
        "axis": "probability that the given label is right",
        "x": [(across(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)],
        "y": [(up(power), f"{10**power:,}") for power in range(decades + 1)],
        "lines": [],
        "bars": [
            {"name": f"{values.sum():,} {name}", "color": color, "value": "", "boxes": boxes(values)}
            for color, (name, values) in enumerate(counts.items())
        ],
    }


def plane(found: Embedding) -> dict:
    """Test images as points, each class in its colour and named at its middle."""
    (left, top), (right, bottom) = found.points.min(axis=0), found.points.max(axis=0)
    x, y = _scale(left, right, 8, 352)(found.points[:, 0]), _scale(top, bottom, 8, 222)(found.points[:, 1])
    shown = np.unique(found.labels).tolist()
    of = f", of the first {CLASSES} classes" if len(found.classes) > CLASSES else ""
    return {
        "title": f"{len(found.points):,} of {found.available:,} test images{of}",
        "groups": [
            {
                "name": short(str(found.classes[label]), 14),
                "hue": round(360 * number / len(shown)),
                "points": list(zip(x[found.labels == label], y[found.labels == label], strict=True)),
                "middle": (np.median(x[found.labels == label]), np.median(y[found.labels == label])),
            }
            for number, label in enumerate(shown)
        ],
    }


def _scale(low: float, high: float, start: float, end: float):
    """Maps low to start and high to end; a single value to the middle."""
    if high == low:
        return lambda value: value * 0 + (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    values = MaxNLocator(5, steps=[1, 2, 5, 10], integer=integer).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
