"""Times every op against eager PyTorch, torch.compile, a copy of as many bytes and as many exps; prints the table.

    python -m benchmarks.ops [--quick] [--device cuda] [--append benchmarks/results/ops.csv]

The candidates take turns in one process, so that a busy machine slows them alike; ratios are of medians.
"""

import argparse
import csv
import os
import subprocess
import time
from pathlib import Path

import torch

from flywheel_fast import ops, reference

FIELDS = "op classes rows dtype device threads candidate median_us p20_us p80_us of_copy versions commit".split()
CLASSES = (10, 14, 50, 100, 200, 1000)
LARGE = 48 << 20  # bytes of one network's logits: more than a last-level cache holds
# passes over logits, and bytes of everything else of a sample, in and out
BYTES = {"main_estep": (1, 16), "aux_estep": (1, 36), "em_step": (2, 40)}


def operands(op: str, n: int, c: int, dtype: torch.dtype, device: str) -> tuple:
    """Normal logits, never zeros, and the rest as the ops want it."""
    generator = torch.Generator().manual_seed(0)
    main, aux = ((3 * torch.randn(n, c, generator=generator)).to(device, dtype) for _ in range(2))
    labels = torch.randint(c, (n,), generator=generator).to(device)
    gamma = torch.tensor(0.6, dtype=torch.float64, device=device)
    per_sample = torch.rand(n, generator=generator).to(device)
    corruption = (1 - torch.eye(c, device=device)).t() / max(c - 1, 1)  # as EMState keeps it
    align = torch.ones(c, device=device)
    return {
        "main_estep": (main, labels, gamma, per_sample),
        "aux_estep": (aux, labels, per_sample, corruption, align, "mixture"),
        "em_step": (main, aux, labels, gamma, per_sample, corruption, align, "mixture"),
        "posterior_loss": (main.detach().requires_grad_(), aux, labels, per_sample, corruption, "mixture", 0.1),
    }[op]


def candidates(op: str, arguments: tuple, compiled: bool) -> dict:
    """Name -> function without arguments; posterior_loss with its gradient, native E-steps into the same tensors."""

    def call(function):
        if op != "posterior_loss":
            return lambda: function(*arguments)
        return lambda: torch.autograd.grad(function(*arguments), arguments[0])

    found = {"native": call(getattr(ops, op)), "eager": call(getattr(reference, op))}
    if op in ("aux_estep", "em_step"):
        out = getattr(ops, op)(*arguments)
        found["native"] = lambda: getattr(ops, op)(*arguments, out=out)
    if compiled:
        torch._dynamo.reset()
        found["compile"] = call(torch.compile(getattr(reference, op), dynamic=False))
    if op in BYTES:
        passes, per_row = BYTES[op]
        logits = arguments[0]
        moved = logits.numel() * logits.element_size() * passes + logits.shape[0] * per_row
        source = torch.randint(255, (moved // 2,), dtype=torch.uint8, device=logits.device)
        target = torch.empty_like(source)
        found["copy"] = lambda: target.copy_(source)
        terms = torch.empty_like(logits)  # one exp a logit, and nothing else
        found["exp"] = lambda: [torch.exp(logits, out=terms) for _ in range(passes)]
    return found


def measure(functions: dict, device: str, seconds: float) -> dict[str, list[float]]:
    """Sorted microseconds of each candidate; they take turns."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    end, turns = time.perf_counter() + seconds, 0
    while turns < 5 or time.perf_counter() < end:
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - start))
        turns += 1
    return {name: sorted(t) for name, t in times.items()}


def cells(quick: bool):
    """(op, C, N, dtype, whether to compile the reference)"""
    if quick:
        for c in (10, 100, 1000):
            yield "em_step", c, LARGE // (4 * c), torch.float32, c == 10
        yield "em_step", 10, 1000, torch.float32, False
        yield "posterior_loss", 10, 500, torch.float32, False
        return
    for dtype in (torch.float32, torch.bfloat16):
        for c in CLASSES:
            n = LARGE // (dtype.itemsize * c)
            yield from ((op, c, n, dtype, op == "em_step") for op in BYTES)
            yield from (("em_step", c, small, dtype, False) for small in (1, 1000))
            yield "posterior_loss", c, 500, dtype, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cells, within a minute")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--append", type=Path, help="CSV file that the rows are added to")
    chosen = parser.parse_args()
    if why_not := ops.why_not_native(chosen.device):
        parser.error(f"native ops {why_not}")
    versions = f"torch {torch.__version__}; {torch.cuda.get_device_name() if chosen.device == 'cuda' else 'CPU'}"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    columns = {"eager": "x eager", "compile": "x compile", "copy": "of copy", "exp": "of exp"}
    print(
        f"{'op':<15}{'C':>5}{'N':>9} {'dtype':<9}{'native us':>11}",
        *(f"{name:>10}" for name in columns.values()),
        sep="",
    )
    for op, c, n, dtype, compiled in cells(chosen.quick):
        functions = candidates(op, operands(op, n, c, dtype, chosen.device), compiled)
        times = measure(functions, chosen.device, 0.6 if chosen.quick else 2.0)
        median = {name: t[len(t) // 2] for name, t in times.items()}
        ratios = [f"{median[other] / median['native']:.2f}" if other in median else "-" for other in columns]
        name = str(dtype).removeprefix("torch.")
        cells_ = (f"{ratio:>10}" for ratio in ratios)
        print(f"{op:<15}{c:>5}{n:>9} {name:<9}{median['native']:>11.1f}", *cells_, sep="", flush=True)
        if chosen.append:
            where = (op, c, n, name, chosen.device, torch.get_num_threads())
            rows = []
            for candidate, t in times.items():
                quantiles = [f"{t[int(len(t) * q)]:.2f}" for q in (0.5, 0.2, 0.8)]
                of_copy = f"{median['copy'] / median[candidate]:.3f}" if "copy" in median else ""
                rows.append((*where, candidate, *quantiles, of_copy, versions, commit.stdout.strip()))
            append(chosen.append, rows)


def append(path: Path, rows: list[tuple]) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows([FIELDS] * new + rows)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
