"""Embedding mode on N samples of given features: time, memory and the share of the EM ops, against cleanlab's route.

    python -m benchmarks.scaling [--counts 10000 100000 1000000] [--rival 100000] [--out benchmarks/results]

Made-up features of 512 dimensions around 14 class centres, two views each, a quarter of the labels wrong; five folds
and ten cycles, the first after a warm-up of five epochs. Each N has a process of its own. cleanlab's route, up to
--rival samples: scikit-learn's logistic regression, as it is, in five folds on the same features, then
find_label_issues.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from benchmarks.accuracy_table import markdown
from benchmarks.growth import exponent, peak_gb
from flywheel_fast import audit, env
from flywheel_fast import config as configs
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.folder_audit import large_batches
from flywheel_fast.measures import PHASES
from flywheel_fast.trainer import Config, Trainer

WIDTH, CLASSES, VIEWS, FOLDS, WARMUP, CYCLES = 512, 14, 2, 5, 5, 10
WRONG = 0.25  # share of the labels
COUNTS, RIVAL = (10_000, 100_000, 1_000_000), 100_000
FIELDS = (
    *("n", "seconds", *(f"sec_{phase}" for phase in PHASES), "peak_gb", "gamma", "clean", "ap"),
    *("rival_seconds", "rival_ap", "threads", "device", "versions", "commit"),
)


def make(n: int, folder: Path) -> None:
    """features.npy [n, VIEWS, WIDTH] float16 and labels.parquet with the true ones."""
    import pyarrow as pa
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, WIDTH), dtype=np.float32) * 0.12
    true = rng.integers(CLASSES, size=n)
    given = np.where(rng.random(n) < WRONG, rng.integers(CLASSES, size=n), true)
    array = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (n, VIEWS, WIDTH))
    for at in range(0, n, 10_000):
        part = centres[true[at : at + 10_000]][:, None]
        own = rng.standard_normal((len(part), 1, WIDTH), dtype=np.float32)
        view = rng.standard_normal((len(part), VIEWS, WIDTH), dtype=np.float32)
        array[at : at + 10_000] = part + own + 0.3 * view
    array.flush()
    table = {"label": given.astype(str), "true_label": true.astype(str)}
    pa.parquet.write_table(pa.table(table), folder / "labels.parquet")


def ours(n: int, folder: Path, threads: int) -> dict:
    """A run of `flywheel-fast train embeddings`, without its report."""
    torch.set_num_threads(threads)
    words = [f"data.features={folder / 'features.npy'}", f"data.root={folder / 'labels.parquet'}", "data.holdout=0"]
    words += [*large_batches(n), f"cycle.warmup={WARMUP}", f"optim.epochs={WARMUP + CYCLES - 1}"]
    words += [f"model.folds={FOLDS}", "eval_every=1000000"]
    out = folder / "run"
    out.mkdir()
    start = time.perf_counter()
    trainer = Trainer(configs.load(Config, "embeddings", words), out)
    trainer._train()
    whole = time.perf_counter() - start
    labels = trainer.measures.labels()
    _, ap = audit.selection_quality(labels.clean_prob, labels.given, labels.true)
    spent = {f"sec_{phase}": round(sum(row[f"sec_{phase}"] for row in trainer.history), 2) for phase in PHASES}
    last = trainer.history[-1]
    quality = {"gamma": round(last["gamma"], 4), "clean": round(last["true_clean"], 4), "ap": round(ap, 4)}
    return {"n": n, "seconds": round(whole, 1), **spent, "peak_gb": round(peak_gb(), 2), **quality}


def rival(folder: Path) -> dict:
    import pyarrow.parquet
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    table = pyarrow.parquet.read_table(folder / "labels.parquet").to_pydict()
    given, true = (np.array(table[name]).astype(np.int64) for name in ("label", "true_label"))
    start = time.perf_counter()
    seen = np.asarray(np.load(folder / "features.npy", mmap_mode="r")[:, 0], np.float32)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    found = cross_val_predict(LogisticRegression(), seen, given, cv=folds, method="predict_proba")
    find_label_issues(given, found)
    score = get_label_quality_scores(given, found)
    whole = time.perf_counter() - start
    _, ap = audit.selection_quality(score, given, true)
    return {"rival_seconds": round(whole, 1), "rival_ap": round(ap, 4)}


TEXT = """# Embedding mode over the number of samples

`python -m benchmarks.scaling`: made-up features of {width} dimensions and {classes} classes, a quarter of the labels
wrong, {folds} folds, {cycles} cycles after a warm-up of {warmup} epochs, {threads} threads. `EM`: share of the E-steps
and of the resampling, of the time; `peak`: resident memory, of which the features' file, 2 KB a sample, are pages that
the system takes back when it wants them. cleanlab's route:
logistic regression in {folds} folds, then find_label_issues. AP: average precision of finding the wrong labels.

{table}

Time grows like N^{exponent:.2f}.
"""


def tabulated(rows: list[dict]) -> str:
    lines = [("N", "seconds", "EM", "peak, GB", "γ", "truth", "AP", "cleanlab's seconds", "its AP", "time ratio")]
    for row in rows:
        known = row["rival_seconds"] is not None
        ratio = f"{row['seconds'] / row['rival_seconds']:.2f}" if known else "–"
        theirs = (f"{row['rival_seconds']:,.0f}", f"{row['rival_ap']:.3f}") if known else ("–", "–")
        share, peak = f"{row['sec_em'] / row['seconds']:.1%}", f"{row['peak_gb']:.1f}"
        found = (f"{row['gamma']:.3f}", f"{row['clean']:.3f}", f"{row['ap']:.3f}")
        lines.append((f"{row['n']:,}", f"{row['seconds']:,.0f}", share, peak, *found, *theirs, ratio))
    slope = exponent([row["n"] for row in rows], [row["seconds"] for row in rows]) or float("nan")
    sizes = {"width": WIDTH, "classes": CLASSES, "folds": FOLDS, "cycles": CYCLES, "warmup": WARMUP}
    return TEXT.format(table=markdown(lines), exponent=slope, threads=rows[0]["threads"], **sizes)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    counts = [row["n"] for row in rows]
    lines = {"flywheel-fast": "seconds", "of it, EM": "sec_em", "cleanlab's route": "rival_seconds"}
    for name, column in lines.items():
        axis.loglog(counts, [row[column] or np.nan for row in rows], "o-", label=name)
    axis.loglog(
        counts, [rows[0]["seconds"] * n / counts[0] for n in counts], ":", color="grey", label="proportional to N"
    )
    axis.set(xlabel="samples", ylabel="seconds")
    axis.legend()
    figure.savefig(path, dpi=100)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="N (default: %(default)s)")
    parser.add_argument("--rival", type=int, default=RIVAL, help="cleanlab's route up to this N (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for scaling.csv, .md and .png")
    parser.add_argument("--cell", nargs=3, metavar=("WAY", "N", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    if chosen.cell:
        way, n, folder = chosen.cell[0], int(chosen.cell[1]), Path(chosen.cell[2])
        with redirect_stdout(sys.stderr):
            found = ours(n, folder, chosen.threads) if way == "ours" else rival(folder)
        print(json.dumps(found))
        return
    here, rows = env.describe(), []
    about = {
        "threads": chosen.threads,
        "device": here["processor"].rpartition(",")[0],
        "versions": "; ".join(f"{name} {here[name]}" for name in ("python", "torch", "numpy")),
        "commit": here["flywheel-fast"],
    }
    for n in chosen.counts:
        with tempfile.TemporaryDirectory() as folder:
            make(n, Path(folder))
            found = _in_a_process("ours", n, folder, chosen.threads)
            theirs = {"rival_seconds": None, "rival_ap": None}
            if n <= chosen.rival:
                theirs = _in_a_process("rival", n, folder, chosen.threads)
        rows.append({**found, **theirs, **about})
        print(json.dumps({**found, **theirs}), flush=True)
    if chosen.out:
        with open(chosen.out / "scaling.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        write_atomic(chosen.out / "scaling.md", tabulated(rows).encode())
        plot(rows, chosen.out / "scaling.png")


def _in_a_process(way: str, n: int, folder: str, threads: int) -> dict:
    words = [sys.executable, "-m", "benchmarks.scaling", "--cell", way, str(n), folder, "--threads", str(threads)]
    threaded = os.environ | {"OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, env=threaded)
    return json.loads(ran.stdout)


if __name__ == "__main__":
    main()
