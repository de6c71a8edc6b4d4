"""What reviewing buys: 600 digits with wrong labels, a part of them reviewed by someone who knows the truth.

    python -m benchmarks.review

Accuracy and AUROC when 0, 1, 5 and 10 % of the labels have been reviewed: in the order of `flywheel-fast review`, from
the lowest label_score up, and at random; each from the same finished run, which goes on for a quarter of its epochs.
Rows go to results/review.csv, the table of means to results/review.md.
"""

import argparse
import contextlib
import csv
import io
import itertools
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.accuracy_table import markdown
from flywheel_fast import audit, config, review
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data import reviews
from flywheel_fast.data.reviews import Review
from flywheel_fast.trainer import Config, Trainer

RESULTS = Path("benchmarks/results")
SHARES = (0.0, 0.01, 0.05, 0.1)
NOISES = {
    "symmetric .8": ("data.noise.kind=symmetric", "data.noise.rate=0.8"),
    "pair .25": ("data.noise.kind=pair", "data.noise.rate=0.25"),
}
ORDERS = ("review", "worst first", "random")
FIELDS = (
    *("noise", "seed", "order", "share", "reviewed", "wrong_found"),
    *("test_acc_aux", "selection_auroc", "auroc_of_the_rest", "posterior_acc"),
)


def order(labels: audit.Labels, name: str, seed: int) -> np.ndarray:  # [N] int64
    if name == "random":
        return np.random.default_rng(seed).permutation(len(labels.given))
    return labels.order if name == "worst first" else np.concatenate(review.sheets(labels))


def answers(labels: audit.Labels, samples: np.ndarray) -> list[Review]:  # samples [K] int64
    """What someone who knows the true labels decides."""
    found = []
    for i in samples:
        given, suggested, true = (labels.classes[of[i]] for of in (labels.given, labels.suggested, labels.true))
        decision = "keep" if true == given else "accept" if true == suggested else "pick"
        found.append(Review(str(labels.files[i]), decision, true, given, suggested, float(labels.clean_prob[i])))
    return found


def write(path: Path, found: list[Review]) -> None:
    header = (",".join(reviews.COLUMNS) + "\n").encode()
    write_atomic(path, header + b"".join(map(reviews.as_line, found)))


def trained(folder: Path, resume: bool, words: list[str]) -> dict:
    """The last row of the run in `folder`, which it is told of in silence."""
    with contextlib.redirect_stdout(io.StringIO()):
        name = str(folder / "config.yaml") if resume else "digits"
        trainer = Trainer(config.load(Config, name, words), folder, resume)
        trainer.run()
    return trainer.history[-1]


def measure(noise: str, seed: int, words: list[str], shares: tuple[float, ...], scratch: Path) -> list[dict]:
    """A row for each order and share."""
    base = scratch / "base"
    base.mkdir(parents=True)
    # equal seeds would draw the subset and the wrong labels from the same permutation of a class
    seeds = [f"seed={seed}", f"data.seed={seed}", f"data.noise.seed={seed + 100}"]
    trained(base, False, ["data.train_size=600", *NOISES[noise], *seeds, *words])
    before = audit.read_labels(base / "labels")
    wrong, rows = before.given != before.true, []
    for name, share in itertools.product(ORDERS, shares):
        if share == 0 and name != ORDERS[0]:
            rows.append(rows[0] | {"order": name})  # nothing is reviewed in either order
            continue
        samples = order(before, name, seed)[: round(share * len(before.given))]
        folder = scratch / f"{name}-{share}"
        shutil.copytree(base, folder)
        write(folder / "reviews.csv", answers(before, samples))
        last = trained(folder, True, [f"data.reviews={folder / 'reviews.csv'}"])
        rest = np.setdiff1d(np.arange(len(wrong)), samples)
        after = audit.read_labels(folder / "labels").clean_prob
        of_rest, _ = audit.selection_quality(after[rest], before.given[rest], before.true[rest])
        rows.append(
            {"noise": noise, "seed": seed, "order": name, "share": share, "reviewed": len(samples)}
            | {"wrong_found": int(wrong[samples].sum()), "auroc_of_the_rest": of_rest}
            | {field: last[field] for field in ("test_acc_aux", "selection_auroc", "posterior_acc")}
        )
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Means over seeds, ± the standard deviation."""
    head = (
        "noise",
        "reviewed",
        "order",
        "accuracy",
        "AUROC",
        "of the rest",
        "labels right",
        "wrong of the reviewed",
        "seeds",
    )
    lines = [head]
    columns = ("test_acc_aux", "selection_auroc", "auroc_of_the_rest", "posterior_acc")
    cells = dict.fromkeys((row["noise"], float(row["share"]), row["order"]) for row in rows)
    for noise, share, name in sorted(cells, key=lambda cell: (cell[0], cell[1], ORDERS.index(cell[2]))):
        if share == 0 and name != ORDERS[0]:
            continue
        same = [row for row in rows if (row["noise"], float(row["share"]), row["order"]) == (noise, share, name)]
        means = [_mean([float(row[column]) for row in same]) for column in columns]
        found = sum(int(row["wrong_found"]) for row in same) / max(sum(int(row["reviewed"]) for row in same), 1)
        hits = f"{found:.0%}" if share else "–"
        lines.append((noise, f"{share:.0%}", name if share else "–", *means, hits, f"{len(same)}"))
    return markdown(lines) + "\n"


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of noise and training (3)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"where they go ({RESULTS})")
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the config `digits`")
    args = parser.parse_args(arguments)
    rows = []
    for seed, noise in itertools.product(range(args.seeds), NOISES):
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(noise, seed, args.words, SHARES, Path(scratch))
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(args.results / "review.csv", text.getvalue().encode())
        write_atomic(args.results / "review.md", table(rows).encode())
    print(table(rows))


if __name__ == "__main__":
    main()
