"""How time and memory of everything that is kept per sample grow with the number of samples N and of classes C.

    python -m benchmarks.growth [--quick] [--largest] [--out benchmarks/results]

Made-up logits, labels and file names of no files; each cell has a process of its own, whose seconds are the processor's
and whose peak memory is that of everything. N from 10^3 to 10^7 (C = 10), C from 2 to 10^4 (N = 20,000), and with
--largest 2.4 million samples of 1000 classes in bf16, WebVision's size: about 12 GB. Fitted exponents are slopes of log
seconds over log N or C, of the cells that take longer than 0.05 seconds and twice as long as the quickest.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from flywheel_fast import audit, checkpoint, config, env, report
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.order import epoch_order
from flywheel_fast.em import EMState, Expectation
from flywheel_fast.trainer import Config

BATCH = 500  # of a look
STEPS = ("start", "estep", "noise", "order", "checkpoint", "resume", "manifest", "labels", "report")
FIELDS = ("n", "c", *STEPS, "baseline_gb", "peak_gb", "checkpoint_mb", "parquet_mb", "versions")
COUNTS, CLASSES = [10**k for k in range(3, 8)], [2, 10, 100, 1000, 10_000]
WEBVISION = (2_400_000, 1000)
SHORT = 0.05  # seconds, below which a step says little of growth, as where what it does once prevails


def measure(n: int, c: int, folder: Path) -> dict:
    """Seconds of the processor by step, peak memory, sizes of files."""
    found: dict = {"n": n, "c": c, "baseline_gb": peak_gb()}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        found[name] = time.process_time() - start

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(c, (n,), generator=generator)
    logits = torch.randn(BATCH, c, generator=generator).to(torch.bfloat16 if n * c > 10**9 else torch.float32)
    with step("start"):
        state = EMState.start(labels, c, 0.5)
    with step("estep"):
        expectation = Expectation(state, "mixture")
        for index in torch.arange(n).split(BATCH):
            teacher = state.teach(index, logits[: len(index)], logits[: len(index)], both=True)
            expectation.add(index, logits[: len(index)].flip(0), teacher, teacher)
        expectation.finish(aligned=True, smoothing=1.0)
    with step("noise"):
        state.find_noise("mixture")
    with step("order"):
        epoch_order(n, 0, 1)
    path = folder / "last.pt"
    with step("checkpoint"):
        checkpoint.save(path, {"state": state.state_dict()})
    with step("resume"):
        state.load_state_dict(checkpoint.load(path)["state"])
    with step("manifest"):
        files = np.array([f"q{i % 1632:04}/{i:09}.jpg" for i in range(n)], dtype=object)
        table = Manifest(folder, files, labels.numpy(), tuple(f"class {k}" for k in range(c)))
        assert table.digest
    with step("labels"):
        audit.write_labels(_labels(table, state), folder / "labels")
    (folder / "config.yaml").write_text(config.dump(Config()))
    (folder / "env.json").write_text("{}")
    result = {"merged": {}, "images": n, "epochs": 1, "seconds": 0.0, "noise_sha256": ""}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.csv").write_text("cycle,test_acc_aux\n1,0.5\n")
    with step("report"):
        report.write([folder])
    sizes = {"checkpoint_mb": path, "parquet_mb": folder / "labels" / "samples.parquet"}
    return found | {name: file.stat().st_size / 1e6 for name, file in sizes.items()} | {"peak_gb": peak_gb()}


def _labels(table: Manifest, state: EMState) -> audit.Labels:
    n = len(table)
    return audit.Labels(
        root=table.root,
        files=table.files,
        classes=table.classes,
        given=table.labels,
        true=None,
        clean_prob=state.clean_prob.numpy(),
        suggested=state.suggested_label.numpy(),
        suggested_prob=state.suggested_prob.numpy(),
        entropy=state.entropy("mixture").numpy(),
        networks_agree=state.agree.numpy(),
        times_suspected=np.zeros(n, np.uint8),
        posterior_sum=state.posterior_sum.numpy(),
    )


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """Slope of log seconds over log sizes; None where fewer than two are long enough to tell."""
    least = max(SHORT, 2 * min(seconds))
    long = [(size, spent) for size, spent in zip(sizes, seconds, strict=True) if spent >= least]
    if len(long) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(long)).T, 1)[0])


def plot(rows: list[dict], path: Path) -> None:
    """Seconds by step over N and over C, with the fitted exponents, and memory beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, key in zip(axes, ("n", "c"), strict=False):
        cells = _line(rows, key)
        for name in STEPS:
            seconds = [row[name] for row in cells]
            slope = exponent([row[key] for row in cells], seconds)
            said = f"{name}, {key.upper()}^{slope:.2f}" if slope is not None else name
            axis.loglog([row[key] for row in cells], [max(spent, 1e-4) for spent in seconds], "o-", label=said)
        axis.set(xlabel=key.upper(), ylabel="seconds of the processor")
        axis.legend(fontsize=8)
    for key in ("n", "c"):
        cells = _line(rows, key)
        used = [max(row["peak_gb"] - row["baseline_gb"], 1e-3) for row in cells]
        axes[2].loglog([row[key] for row in cells], used, "o-", label=f"over {key.upper()}")
    axes[2].set(xlabel="N, C", ylabel="GB at most, beyond the libraries")
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _line(rows: list[dict], key: str) -> list[dict]:
    """The cells along which `key` grows."""
    other = {"n": "c", "c": "n"}[key]
    fixed = {"c": 10, "n": sorted(row["n"] for row in rows if row["c"] == max(r["c"] for r in rows))[0]}[other]
    return sorted((row for row in rows if row[other] == fixed), key=lambda row: row[key])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cells only, in a minute")
    parser.add_argument("--largest", action="store_true", help="2.4 million samples of 1000 classes too")
    parser.add_argument("--out", type=Path, help="folder for growth.csv and growth.png")
    parser.add_argument("--cell", type=int, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    if chosen.cell:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(*chosen.cell, Path(folder))))
        return
    counts, classes, fixed = (COUNTS[:2], CLASSES[:3], 1000) if chosen.quick else (COUNTS, CLASSES, 20_000)
    cells = [(n, 10) for n in counts] + [(fixed, c) for c in classes if (fixed, c) not in [(n, 10) for n in counts]]
    found = env.describe()
    versions = "; ".join(f"{name} {found[name]}" for name in ("flywheel-fast", "torch", "numpy"))
    rows = []
    for n, c in cells + [WEBVISION] * chosen.largest:
        words = [sys.executable, "-m", "benchmarks.growth", "--cell", str(n), str(c)]
        rows.append(
            json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout) | {"versions": versions}
        )
        spent = "  ".join(f"{name} {rows[-1][name]:.2f}" for name in STEPS)
        print(f"N {n:>10,}  C {c:>6,}  {spent}  peak {rows[-1]['peak_gb']:.2f} GB", flush=True)
    for key in ("n", "c"):
        line = _line(rows, key)
        slopes = {name: exponent([row[key] for row in line], [row[name] for row in line]) for name in STEPS}
        told = (f"{name} {key.upper()}^{slope:.2f}" for name, slope in slopes.items() if slope is not None)
        print(f"over {key.upper()}: {', '.join(told) or 'all too short to tell'}")
    if chosen.out:
        with open(chosen.out / "growth.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, chosen.out / "growth.png")


if __name__ == "__main__":
    main()
