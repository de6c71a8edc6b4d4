"""Trains a queue of (task x noise x method x seed), keeps a row a run, and writes the table of means and deviations.

    python -m benchmarks.accuracy benchmarks/plans/accuracy.yaml [--jobs N]

A plan names tasks (a config, its noises, its seeds) and methods (changes to the config). Every task also runs
cross_entropy on the labels as they are: gap closed = (accuracy - noisy CE) / (clean CE - noisy CE).
"""

import argparse
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.accuracy_table import CE, CLEAN, table
from flywheel_fast import config as configs
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.cycle import CycleConfig
from flywheel_fast.errors import BadInput, Failure
from flywheel_fast.trainer import Config

RESULTS = Path("benchmarks/results/accuracy.csv")
FIELDS = (
    *("task", "config", "noise", "noise_sha256", "method", "seed"),
    *("test_acc_main", "test_acc_aux", "best_test_acc_main", "best_test_acc_aux", "gamma", "true_clean"),
    *("selection_auroc", "selection_ap", "refurbish_acc", "posterior_acc", "merged"),
    *("network", "images", "epochs", "passes", "seconds", "threads", "jobs", "device", "versions", "commit", "command"),
)
AS_THEY_ARE = ["data.noise.kind=symmetric", "data.noise.rate=0"]  # unlike kind=none, it counts the labels as true


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


@dataclass
class Task:
    config: str = MISSING
    overrides: list[str] = field(default_factory=list)
    noises: dict[str, list[str]] = MISSING
    methods: list[str] | None = None
    """Those to run here; None: all."""
    seeds: list[int] = MISSING


@dataclass
class Plan:
    """A YAML file; words are `key=value`, and those of the method win over the noise's, the task's, the defaults."""

    defaults: list[str] = field(default_factory=list)
    methods: dict[str, list[str]] = MISSING
    tasks: dict[str, Task] = MISSING


def read_plan(path: Path) -> list[Run]:
    """The runs of a plan, in order. Raises BadInput naming the file and the key."""
    try:
        plan = OmegaConf.merge(OmegaConf.structured(Plan), OmegaConf.load(path))
        plan = OmegaConf.to_container(plan, resolve=False, throw_on_missing=True)  # ${...} is the run's to resolve
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        key, said = getattr(error, "full_key", None), " ".join(str(error).split("full_key:")[0].split())
        raise BadInput(f"{path}: {f'{key}: ' if key else ''}{said}") from error
    methods, runs = plan["methods"], []
    for name, task in plan["tasks"].items():
        chosen = [CE, *(method for method in task["methods"] or methods if method != CE)]
        if unknown := [method for method in chosen if method not in methods]:
            raise BadInput(f"{path}: tasks.{name} needs the method {unknown[0]!r}; add it under `methods`")
        noises = {CLEAN: task["noises"].get(CLEAN, AS_THEY_ARE)} | task["noises"]
        for noise, words in noises.items():
            for method in chosen if noise in task["noises"] else [CE]:
                changes = (*plan["defaults"], *task["overrides"], *words, *methods[method])
                for seed in task["seeds"]:
                    runs.append(Run(name, noise, method, seed, task["config"], (*changes, f"seed={seed}")))
    for run in runs:
        if not re.fullmatch(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*){3}", run.name):
            raise BadInput(f"{path}: {run.name!r}: names become folders: letters, digits and . _ + - only")
    return runs


def resolve(path: Path, run: Run) -> Config:
    try:
        return configs.load(Config, run.config, list(run.words))
    except BadInput as error:
        raise BadInput(f"{path}: {run.name}: {error}") from error


def begun_with(run: Run, config: Config, out: Path) -> int | None:
    """Threads of the run that was cut off in this one's folder: it goes on by as many. BadInput if it is another."""
    path = out / run.name / "config.yaml"
    if not path.exists():
        return None
    # loaded, so that it has the default of what is younger than it
    begun, wanted = configs.as_dict(configs.load(Config, str(path))), configs.as_dict(config)
    changed = set(configs.difference(begun, wanted)) - {"data.threads"}
    if changed:
        raise BadInput(
            f"{path.parent}: holds a run with another {', '.join(sorted(changed))}; remove it, or name another --out"
        )
    return begun["data"]["threads"]


def passes(cycle: CycleConfig, epochs: int) -> int:
    """Forward passes a training image over a run, a backward pass counted as two; test images are left out."""
    if cycle.kind == "cross_entropy":
        return 3 * epochs
    cycles, looks = epochs - cycle.warmup, 1 + (cycle.noise_model == "anchors")  # at the end of the warm-up
    return 12 * epochs + 2 * (cycles + looks) + 3 * (cycle.contrastive > 0) * cycles


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


def queue(todo: list[tuple[Run, Config, int]], out: Path, jobs: int, rows: Path, console: Console) -> list[str]:
    """Trains each run by its threads, `jobs` at a time, appending a row as it lands; returns what failed, and why."""
    gpus = torch.cuda.device_count()
    waiting, running, failed = todo[::-1], {}, []  # running: slot -> (process, run, config, threads)
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            shown = bar.add_task("", total=len(todo))
            while waiting or running:
                for slot in set(range(jobs)) - set(running):
                    if waiting:
                        run, config, threads = waiting.pop()
                        process = start(run, out, threads, slot % gpus if gpus else None)
                        running[slot] = process, run, config, threads
                bar.update(shown, description=", ".join(run.name for _, run, _, _ in running.values()))
                time.sleep(0.05)
                for slot in [slot for slot, (process, *_) in running.items() if process.poll() is not None]:
                    process, run, config, threads = running.pop(slot)
                    bar.advance(shown)
                    if process.returncode == 0:
                        row = describe(run, config, out / run.name, threads, jobs)
                        append(rows, row)
                        console.print(_line(run, row), markup=False)
                    else:
                        said = (out / f"{run.name}.log").read_text().strip().splitlines() or ["nothing was said"]
                        failed.append(f"{run.name}: {said[-1]}")
                        console.print(failed[-1], style="red", markup=False)
    finally:
        for process, *_ in running.values():  # interrupted: the next call goes on after the last finished epoch
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
    return {name: value for name, value in found.items() if name in FIELDS} | {
        **{name: getattr(run, name) for name in ("task", "noise", "method", "seed", "config")},
        "merged": len(found["merged"]),
        "network": config.model.main.name,
        "passes": passes(config.cycle, config.optim.epochs),
        "threads": threads,
        "jobs": jobs,
        "device": env["GPU"] if env["GPU"] != "none" else env["processor"].rpartition(",")[0],
        "versions": "; ".join(f"{name} {env[name]}" for name in ("python", "torch", "nvidia-dali-cuda130", "numpy")),
        "commit": env["flywheel-fast"],
        "command": run.command(threads),
    }


def append(path: Path, row: dict, fields: tuple[str, ...] = FIELDS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _line(run: Run, row: dict) -> str:
    names = ("test_acc_main", "test_acc_aux", "gamma", "true_clean", "selection_auroc", "seconds")
    return "  ".join([run.name, *(f"{name} {row[name]:.4g}" for name in names if row.get(name, "") != "")])


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
    return exit_status("accuracy", lambda: run_plan(args), "the same command goes on")


def exit_status(module: str, run: Callable[[], None], interrupted: str) -> int:
    """Of a benchmark's command: bad input, failures and interruptions end it with a sentence."""
    try:
        run()
        return 0
    except (BadInput, Failure) as error:
        print(f"benchmarks.{module}: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        return 130


def run_plan(args: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    cores = len(os.sched_getaffinity(0))
    jobs = args.jobs or torch.cuda.device_count() or cores
    threads = max(1, cores // jobs)
    runs, rows = read_plan(args.plan), read_rows(args.csv)
    if args.print:
        run = next((run for run in runs if run.name == args.print), None)
        if run is None:
            raise BadInput(f"--print {args.print}: is not in {args.plan}; it has {runs[0].name}, for example")
        row = find_row(rows, run)
        print(row["command"] if row else run.command(threads))
        return
    todo, failed = [], []
    if not args.table:
        for run in runs:
            if find_row(rows, run) is None:
                config = resolve(args.plan, run)
                todo.append((run, config, begun_with(run, config, args.out) or threads))
        console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done; {jobs} at a time")
        failed = queue(todo, args.out, jobs, args.csv, console)
    rows, found = read_rows(args.csv), {}
    for run in runs:
        row = find_row(rows, run)
        found.setdefault((run.task, run.noise, run.method), {}).update({run.seed: row} if row else {})
    path = args.csv.with_name(f"{args.plan.stem}.md")
    write_atomic(path, table(args.plan, found).encode())
    console.print(f"table: {path}")
    if failed:
        raise Failure(f"{len(failed)} of {len(todo)} runs failed:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: its runs end with it
    sys.exit(main())
