"""Trains a queue of (task x noise x method x seed), keeps a row a run, and writes the table of means and deviations.

    python -m benchmarks.accuracy benchmarks/plans/final.yaml [--jobs N]

A plan names tasks (a config, its noises, its seeds) and methods (changes to the config). Every task also runs
cross_entropy on the labels as they are: gap closed = (accuracy - noisy CE) / (clean CE - noisy CE).
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flywheel_fast import config as configs
from flywheel_fast.cycle import CycleConfig
from flywheel_fast.errors import BadInput, Failure
from flywheel_fast.trainer import Config

RESULTS = Path("benchmarks/results/accuracy.csv")
MEASURES = (
    *("test_acc_main", "test_acc_aux", "best_test_acc_main", "best_test_acc_aux", "gamma", "true_clean"),
    *("selection_auroc", "selection_ap", "refurbish_acc", "posterior_acc", "merged"),
)
FIELDS = (
    *("task", "config", "noise", "noise_sha256", "method", "seed", *MEASURES),
    *("network", "images", "epochs", "passes", "seconds", "threads", "jobs", "device", "versions", "commit", "command"),
)
CE, CLEAN = "cross_entropy", "none"
AS_THEY_ARE = ["data.noise.kind=symmetric", "data.noise.rate=0"]  # unlike kind=none, it counts the labels as true
KEYS = {"plan": {"defaults", "tasks", "methods"}, "task": {"config", "overrides", "noises", "methods", "seeds"}}
SMALL_GAP = 0.01  # between clean and noisy cross-entropy: a share of less would be noise


@dataclass(frozen=True)
class Run:
    task: str
    noise: str
    method: str
    seed: int
    config: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.task}/{self.noise}/{self.method}/{self.seed}"

    def command(self, threads: int) -> str:
        """Repeats the run: on one machine, by as many threads, to the same numbers."""
        words = ["flywheel-fast", "train", self.config, *self.words, f"data.threads={threads}"]
        return f"OMP_NUM_THREADS={threads} {shlex.join(words)}"


# -- the plan ----------------------------------------------------------------------------------------------------------


def read_plan(path: Path) -> list[Run]:
    """The runs of a plan, in order. Raises BadInput naming the file and the key."""
    try:
        plan = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    _check(path, "the plan", plan, KEYS["plan"], {"tasks", "methods"})
    defaults, methods = _words(path, "defaults", plan.get("defaults")), _lists(path, "methods", plan["methods"])
    if CE not in methods:
        raise BadInput(f"{path}: methods lacks {CE}, which every other is measured against; add it")
    if not isinstance(plan["tasks"], dict):
        raise BadInput(f"{path}: tasks must be `NAME: {{config: ..., noises: ..., seeds: [...]}}`")
    runs = []
    for name, task in plan["tasks"].items():
        where = f"tasks.{name}"
        _check(path, where, task, KEYS["task"], {"config", "noises", "seeds"})
        noises, chosen = _lists(path, f"{where}.noises", task["noises"]), task.get("methods", list(methods))
        seeds = task["seeds"]
        if not (isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)):
            raise BadInput(f"{path}: {where}.seeds must be a list of numbers, such as [0, 1, 2], not {seeds!r}")
        unknown = [method for method in chosen if method not in methods]
        if unknown:
            raise BadInput(f"{path}: {where}.methods names {unknown[0]!r}, which is not under methods")
        chosen = [CE, *(method for method in chosen if method != CE)]
        todo = [(CLEAN, CE)] + [
            (noise, method) for noise in noises for method in chosen if (noise, method) != (CLEAN, CE)
        ]
        task_words = [*defaults, *_words(path, f"{where}.overrides", task.get("overrides"))]
        for noise, method in todo:
            words = (*task_words, *noises.get(noise, AS_THEY_ARE), *methods[method])
            runs += [Run(str(name), noise, method, s, str(task["config"]), (*words, f"seed={s}")) for s in seeds]
    strange = [run.name for run in runs if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+){3}", run.name)]
    if strange:
        raise BadInput(f"{path}: {strange[0]!r}: names become folders: letters, digits and . _ + - only")
    return runs


def _check(path: Path, where: str, found, known: set[str], needed: set[str]) -> None:
    if not isinstance(found, dict):
        raise BadInput(f"{path}: {where} must hold {', '.join(sorted(known))}, not {found!r}")
    for name in found:
        if name not in known:
            raise BadInput(f"{path}: {where} has an unknown key {name!r}; known are {', '.join(sorted(known))}")
    if missing := sorted(needed - set(found)):
        raise BadInput(f"{path}: {where} lacks {missing[0]!r}")


def _lists(path: Path, where: str, found) -> dict[str, list[str]]:
    if not isinstance(found, dict) or not found:
        raise BadInput(f"{path}: {where} must be `NAME: [key=value, ...]` lines")
    return {str(name): _words(path, f"{where}.{name}", words) for name, words in found.items()}


def _words(path: Path, where: str, found) -> list[str]:
    if not all(
        isinstance(word, str) and "=" in word for word in (found if isinstance(found, list) else [found or "="])
    ):
        raise BadInput(f"{path}: {where} must be a list of key=value words, not {found!r}")
    return found or []


def resolve(path: Path, run: Run) -> Config:
    try:
        return configs.load(Config, run.config, list(run.words))
    except BadInput as error:
        raise BadInput(f"{path}: {run.name}: {error}") from error


def passes(cycle: CycleConfig, epochs: int) -> int:
    """Forward passes a training image over a run, a backward pass counted as two; test images are left out."""
    if cycle.kind == "cross_entropy":
        return 3 * epochs
    views = 2 + (cycle.contrastive > 0)
    each = 3 + (1 + 1 + 3 * views + 1) + (cycle.target == "soft_q")  # main M-step; E-steps, f's M-step, resampling
    return 9 * cycle.warmup + each * (epochs - cycle.warmup)


# -- the queue ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[tuple, dict]:
    """Rows by what they measured; of two with the same key the later counts."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise BadInput(f"{path}: has other columns than this version writes; move it away, or name another --csv")
        return {(row["task"], row["noise"], row["method"], _unthreaded(row["command"])): row for row in reader}


def find_row(rows: dict[tuple, dict], run: Run) -> dict | None:
    return rows.get((run.task, run.noise, run.method, _unthreaded(run.command(1))))


def _unthreaded(command: str) -> str:
    """Threads change the rounding, not the run."""
    return re.sub(r"^OMP_NUM_THREADS=\d+ (.*) data\.threads=\d+$", r"\1", command)


def queue(runs: list[tuple[Run, Config]], out: Path, jobs: int, rows: Path, console: Console) -> list[str]:
    """Trains what is given, `jobs` at a time, appending a row as each lands; returns what failed, and why."""
    threads, gpus = max(1, len(os.sched_getaffinity(0)) // jobs), torch.cuda.device_count()
    waiting, running, failed = runs[::-1], {}, []  # slot -> (run, config, process)
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            shown = bar.add_task("", total=len(runs))
            while waiting or running:
                for slot in set(range(jobs)) - set(running):
                    if waiting:
                        run, config = waiting.pop()
                        running[slot] = run, config, start(run, out, threads, slot % gpus if gpus else None)
                bar.update(shown, description=", ".join(run.name for run, _, _ in running.values()))
                time.sleep(0.05)
                for slot in [slot for slot, (_, _, process) in running.items() if process.poll() is not None]:
                    run, config, process = running.pop(slot)
                    bar.advance(shown)
                    if process.returncode == 0:
                        row = describe(run, config, out / run.name, threads, jobs)
                        append(rows, row)
                        console.print(_line(run, row), markup=False)
                    else:
                        said = (out / f"{run.name}.log").read_text().strip().splitlines() or ["nothing was said"]
                        failed.append(f"{run.name}: {said[-1]}")
                        console.print(f"{failed[-1]}", style="red", markup=False)
    finally:
        for _, _, process in running.values():  # interrupted: the next call goes on after the last finished epoch
            process.terminate()
            process.wait()
    return failed


def start(run: Run, out: Path, threads: int, gpu: int | None) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    words = shlex.split(run.command(threads))[2:]
    command = [sys.executable, "-m", "flywheel_fast", *words, "--out", str(out / run.name), "--resume", "auto"]
    log = out / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def describe(run: Run, config: Config, folder: Path, threads: int, jobs: int) -> dict:
    """The row of a finished run."""
    found, env = json.loads((folder / "result.json").read_text()), json.loads((folder / "env.json").read_text())
    return {
        name: found[name] for name in (*MEASURES, "noise_sha256", "images", "epochs", "seconds") if name in found
    } | {
        **{name: getattr(run, name) for name in ("task", "noise", "method", "seed", "config")},
        "merged": len(found["merged"]),
        "network": f"{config.model.main.name}",
        "passes": passes(config.cycle, config.optim.epochs),
        "threads": threads,
        "jobs": jobs,
        "device": env["GPU"] if env["GPU"] != "none" else env["processor"].rpartition(",")[0],
        "versions": "; ".join(f"{name} {env[name]}" for name in ("python", "torch", "nvidia-dali-cuda130", "numpy")),
        "commit": env["flywheel-fast"],
        "command": run.command(threads),
    }


def append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _line(run: Run, row: dict) -> str:
    names = ("test_acc_main", "test_acc_aux", "gamma", "true_clean", "selection_auroc", "seconds")
    return "  ".join([run.name, *(f"{name} {row[name]:.4g}" for name in names if row.get(name, "") != "")])


# -- the table ---------------------------------------------------------------------------------------------------------


def accuracy(row: dict) -> float:
    """Of the network that is used at test time, last epoch."""
    return float(row["test_acc_aux"] or row["test_acc_main"])


def gap_closed(method: dict[int, dict], noisy: dict[int, dict], clean: dict[int, dict]) -> float | None:
    """Each seed -> row; over the seeds that all three have."""
    seeds = sorted(set(method) & set(noisy) & set(clean))
    if not seeds:
        return None
    a, low, high = (mean(accuracy(rows[seed]) for seed in seeds) for rows in (method, noisy, clean))
    return (a - low) / (high - low) if high - low >= SMALL_GAP else None


def table(plan: Path, runs: list[Run], rows: dict[tuple, dict]) -> str:
    found: dict[tuple[str, str, str], dict[int, dict]] = {}  # task, noise, method -> seed -> row
    for run in runs:
        of_seed = found.setdefault((run.task, run.noise, run.method), {})
        if row := find_row(rows, run):
            of_seed[run.seed] = row
    methods = [method for method in dict.fromkeys(run.method for run in runs) if method != CE]
    short = [("task", "noise", "CE clean", "CE noisy", *methods)]
    long = [("task", "noise", "method", "accuracy", "main", "best epoch", "gap closed", "γ / truth", "AUROC", "AP")]
    long[0] += ("labels right, refurbished", "posterior", "classes merged", "seconds")
    budget = [("task", "network", "images", "epochs", "method", "forward passes an image")]
    for (task, noise, method), of_seed in found.items():
        values = list(of_seed.values())
        noisy, clean = found.get((task, noise, CE), {}), found[task, CLEAN, CE]
        gap = gap_closed(of_seed, noisy, clean) if noise != CLEAN and method != CE else None
        share = "–" if gap is None else f"{gap:.0%}"
        best = _spread(values, lambda row: row["best_test_acc_aux"] or row["best_test_acc_main"])
        columns = [accuracy, "test_acc_main", None, None, None, "selection_auroc", "selection_ap"]
        columns += ["refurbish_acc", "posterior_acc"]
        cells = [_spread(values, column) if column else "" for column in columns]
        truth = f"{_spread(values, 'gamma')} / {_average(values, 'true_clean')}"
        cells[2:5] = best, share, truth
        merged = sum(int(row["merged"] or 0) > 0 for row in values)
        cells += [f"in {merged} of {len(values)}" if merged else "–", _average(values, "seconds", ".0f")]
        long.append((task, noise, method, *cells))
        if values:
            spent = (
                task,
                *(values[-1][name] for name in ("network", "images", "epochs")),
                method,
                values[-1]["passes"],
            )
            budget += [spent] if spent not in budget else []
        if method == CE:
            short.append((task, noise, _spread(list(clean.values()), accuracy), cells[0], *(["–"] * len(methods))))
        else:
            line = list(short[-1])
            line[4 + methods.index(method)] = cells[0] + (f", {share} closed" if gap is not None else "")
            short[-1] = tuple(line)
    again = f"python -m benchmarks.accuracy {plan}"
    return "\n\n".join(
        [
            f"# Accuracy: {plan.name}",
            "Test accuracy at the last epoch, mean ± standard deviation (number of seeds), of the network that is used "
            "at test time: the auxiliary one, or the only one of plain cross-entropy (CE). Gap closed is (accuracy − CE "
            "noisy) / (CE clean − CE noisy) of the means over the seeds that all three have; none is given where the gap "
            f"is under {SMALL_GAP}. Nothing is chosen on the test set; the best epoch is shown, not used.",
            _markdown(short),
            "## Each method",
            _markdown(long),
            "## What was spent",
            "A backward pass counts as two forward passes; the test images are not counted.",
            _markdown(budget),
            f"All of it again, skipping what is done: `{again}`. The one command of a row: `{again} --print "
            "TASK/NOISE/METHOD/SEED`; on one machine it gives the same numbers. Written by this module from the CSV, "
            "where each row has its noise hash, versions, commit and command.\n",
        ]
    )


def _numbers(rows: list[dict], column) -> list[float]:
    read = column if callable(column) else lambda row: row[column]
    return [float(read(row)) for row in rows if read(row) != ""]


def _spread(rows: list[dict], column) -> str:
    values = _numbers(rows, column)
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation} ({len(values)})"


def _average(rows: list[dict], column: str, form: str = ".3f") -> str:
    values = _numbers(rows, column)
    return format(mean(values), form) if values else "–"


def _markdown(lines: list[tuple]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# -- the command line --------------------------------------------------------------------------------------------------


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a YAML file, such as benchmarks/plans/smoke.yaml")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time (default: 1); 0: one a GPU, else one a core"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/accuracy"), help="the runs' folders (default: %(default)s)"
    )
    parser.add_argument(
        "--csv", type=Path, default=RESULTS, help="rows (default: %(default)s); the table goes beside it"
    )
    parser.add_argument("--table", action="store_true", help="write the table only")
    parser.add_argument("--print", metavar="RUN", help="the command of TASK/NOISE/METHOD/SEED")
    args = parser.parse_args(words)
    if args.jobs < 0:
        parser.error("--jobs must not be negative")
    try:
        run_plan(args)
        return 0
    except (BadInput, Failure) as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130


def run_plan(args: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    jobs = args.jobs or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    runs, rows = read_plan(args.plan), read_rows(args.csv)
    if args.print:
        run = next((run for run in runs if run.name == args.print), None)
        if run is None:
            raise BadInput(f"--print {args.print}: is not in {args.plan}; it has {runs[0].name}, for example")
        row = find_row(rows, run)
        print(row["command"] if row else run.command(max(1, len(os.sched_getaffinity(0)) // jobs)))
        return
    failed = []
    if not args.table:
        todo = [(run, resolve(args.plan, run)) for run in runs if find_row(rows, run) is None]
        console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done; {jobs} at a time")
        failed = queue(todo, args.out, jobs, args.csv, console)
    path = args.csv.with_name(f"{args.csv.stem}_{args.plan.stem}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table(args.plan, runs, read_rows(args.csv)))
    console.print(f"table: {path}")
    if failed:
        raise Failure(f"{len(failed)} of {len(todo)} runs failed:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    sys.exit(main())
