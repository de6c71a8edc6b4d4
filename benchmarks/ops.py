"""Each native op against eager PyTorch, torch.compile and what a memory copy of the same bytes takes.

    python -m benchmarks.ops [--quick] [--threads 2] [--save]

All contenders run in one process, interleaved, on buffers that rotate through more than the last-level cache. `--save`
appends the rows to benchmarks/results/ops.csv.
"""

import argparse
import csv
import datetime
import itertools
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flywheel_fast import env, ops, reference

RESULTS = Path(__file__).parent / "results" / "ops.csv"
CLASSES = (10, 14, 50, 100, 200, 1000)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BYTES = 96 << 20  # of logits in rotation: more than a last-level cache
COLUMNS = "date,op,n,c,dtype,device,threads,contender,median_us,p20_us,p80_us,torch,processor,commit".split(",")


def inputs(n: int, c: int, dtype: torch.dtype, device: str) -> list[tuple[torch.Tensor, ...]]:
    """Arguments of main_estep, as many different ones as fill BYTES."""
    copies = max(2, BYTES // (n * c * dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(copies):
        logits = (3 * torch.randn(n, c, generator=generator)).to(dtype)
        labels = torch.randint(c, (n,), generator=generator)
        gamma, eps = torch.tensor(0.6, dtype=torch.float64), torch.rand(n, generator=generator)
        result.append(tuple(t.to(device) for t in (logits, labels, gamma, eps)))
    return result


def contenders(c: int, dtype: torch.dtype) -> dict[str, callable]:
    target = torch.empty(0, dtype=dtype)

    def copy(logits, labels, gamma, eps):
        nonlocal target
        if target.shape != logits.shape or target.device != logits.device:
            target = torch.empty_like(logits)
        target.copy_(logits)

    return {
        "native": ops.main_estep,
        "eager": reference.main_estep,
        "compile": torch.compile(reference.main_estep, dynamic=False),
        "copy": copy,  # reads and writes the logits: twice the traffic of an op that only reads them
    }


def measure(n: int, c: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, list[float]]:
    """Microseconds of each contender, interleaved."""
    torch._dynamo.reset()
    arguments, running = inputs(n, c, dtype, device), contenders(c, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    rotation = itertools.cycle(arguments)
    for repeat in range(repeats + 2):
        for name, run in running.items():
            given = next(rotation)
            start = time.perf_counter()
            run(*given)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[name].append(1e6 * (time.perf_counter() - start))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes, fewer repeats")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help=f"append to {RESULTS.relative_to(RESULTS.parents[2])}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = env.describe()
    common = {
        "date": datetime.date.today().isoformat(),
        "op": "main_estep",
        "device": args.device,
        "threads": args.threads,
        "torch": found["torch"],
        "processor": found["processor"],
        "commit": found["flywheel-fast"],
    }
    table = Table("op", "N x C", "dtype", "native us", "eager / native", "compile / native", "copy / native", box=None)
    rows = []
    cells = list(itertools.product((10, 100, 1000) if args.quick else CLASSES, TYPES))
    for c, dtype in track(cells, "measuring", transient=True):
        sizes = [(4 << 20) // c] if args.quick else [1, 1000, (4 << 20) // c]
        for n in sizes:
            seconds = measure(n, c, TYPES[dtype], args.device, repeats=9 if args.quick else 31)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            for name, values in seconds.items():
                p20, *_, p80 = statistics.quantiles(values, n=5)
                times = dict(median_us=round(median[name], 2), p20_us=round(p20, 2), p80_us=round(p80, 2))
                rows.append(common | dict(n=n, c=c, dtype=dtype, contender=name) | times)
            ratios = [f"{median[name] / median['native']:.2f}" for name in ("eager", "compile", "copy")]
            table.add_row("main_estep", f"{n} x {c}", dtype, f"{median['native']:,.1f}", *ratios)
    Console().print(table)
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        new = not RESULTS.exists()
        with open(RESULTS, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
