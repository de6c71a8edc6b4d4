"""Times the manifest of as many files as WebVision has, 2.4 million: read from its lists, saved, opened again.

    python -m benchmarks.manifest [--append benchmarks/results/manifest.csv]

Lists of made-up names; no picture is needed, for nothing looks for them. Each step has its own process; its seconds
are without imports, its peak memory is that of everything. On a busy machine go by the seconds of the processor.
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow

from flywheel_fast.data import manifest, sources

PARTS = {"train_filelist_google": 980_449, "train_filelist_flickr": 1_459_125, "val_filelist": 50_000}  # as published
FIELDS = "step files seconds cpu_seconds peak_gb threads versions commit".split()


def write_lists(root: Path) -> None:
    rng = np.random.default_rng(0)
    (root / "info").mkdir()
    (root / "info/synsets.txt").write_text("".join(f"n{1440764 + k:08} thing {k}\n" for k in range(1000)))
    for name, count in PARTS.items():
        query, number = np.arange(count) * 1632 // count, rng.integers(10**9, size=count)
        engine = name.rpartition("_")[2]
        with open(root / f"info/{name}.txt", "w") as file:
            for i, (q, n) in enumerate(zip(query.tolist(), number.tolist(), strict=True)):
                path = f"val{i + 1:06}.jpg" if name == "val_filelist" else f"{engine}/q{q:04}/{n:09}{i:07}.jpg"
                file.write(f"{path} {q % 1000}\n")


def build_and_save(root: Path) -> sources.Data:
    data = sources.load(sources.DataConfig("webvision", str(root)), present=False)
    (root / "manifest.parquet").write_bytes(manifest.to_parquet(data.train, data.test))
    return data


def open_again(root: Path) -> sources.Data:
    return sources.load(sources.DataConfig("csv", str(root / "manifest.parquet")), present=False)


STEPS = {"build and save": build_and_save, "open": open_again}


def run(step: str, root: Path) -> None:
    """In the child: prints files, seconds by the clock and of the processor, and the peak of its memory in GB."""
    start, cpu_start = time.perf_counter(), time.process_time()
    data = STEPS[step](root)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(len(data.train) + len(data.test), f"{seconds:.2f}", f"{cpu_seconds:.2f}", f"{peak:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", type=Path, metavar="CSV", help="append the rows to this table")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run(args.step, args.root)
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = f"python {sys.version.split()[0]} pyarrow {pyarrow.__version__} numpy {np.__version__}"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_lists(Path(folder))
        for step in STEPS:
            words = [sys.executable, "-m", "benchmarks.manifest", "--step", step, "--root", folder]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            files, seconds, cpu_seconds, peak = output.split()
            rows.append((step, files, seconds, cpu_seconds, peak, len(os.sched_getaffinity(0)), versions, commit))
            print(f"{step:<16} {int(files):,} files  {seconds} s ({cpu_seconds} s of the processor)  {peak} GB")
    if args.append:
        new = not args.append.exists()
        with open(args.append, "a", newline="") as file:
            csv.writer(file).writerows([FIELDS] * new + rows)


if __name__ == "__main__":
    main()
