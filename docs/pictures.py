"""Makes README's pictures from the run of its first command: python docs/pictures.py runs/digits (wants chromium)."""

import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from flywheel_fast import audit, report

HERE = Path(__file__).parent
GIVEN, SUGGESTED = "#b3261e", "#1a7f37"


def problem(run: Path, out: Path, columns: int = 10) -> None:
    """One suspect of each class, the worst: the label it came with, and what the run suggests."""
    labels = audit.read_labels(run / "labels")
    of_class = labels.given[labels.suspects]
    worst = [labels.suspects[of_class == label][0] for label in range(len(labels.classes)) if (of_class == label).any()]
    figure, axes = plt.subplots(1, min(columns, len(worst)), figsize=(9, 1.6), dpi=150, squeeze=False)
    for axis, i in zip(axes[0], worst, strict=False):
        axis.imshow(plt.imread(labels.root / labels.files[i]), cmap="gray_r")
        axis.set_title(f"labelled {labels.classes[labels.given[i]]}", color=GIVEN, fontsize=8)
        axis.set_xlabel(f"rather {labels.classes[labels.suggested[i]]}", color=SUGGESTED, fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(out)


def screenshot(run: Path, out: Path) -> None:
    page = report.write([run]).resolve()
    window = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,1500"]
    subprocess.run(["chromium", *window, f"--screenshot={out.resolve()}", page.as_uri()], check=True, timeout=120)


if __name__ == "__main__":
    problem(Path(sys.argv[1]), HERE / "problem.png")
    screenshot(Path(sys.argv[1]), HERE / "report.png")
