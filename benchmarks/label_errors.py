"""Finding wrong labels: a run of flywheel-fast against cleanlab, on the same labels, network, passes and threads.

    python -m benchmarks.label_errors [PLAN] [key=value ...] [--threads N]

A plan names tasks: a config and changes to it; `key=value` words change every task. cleanlab gets out-of-sample
probabilities of the same network by plain cross-entropy in five folds, over as many epochs as make the forward passes
equal, a backward pass counted as two. On features of a frozen network it gets those of logistic regression in five
folds, as its guides have it, and neighbours vote too. Each run leaves a row; the same command goes on where it was
stopped.
"""

import argparse
import csv
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import yaml

from benchmarks.accuracy import append, exit_status, passes
from benchmarks.accuracy_table import markdown
from flywheel_fast import audit, env, models, oddities, run_folder
from flywheel_fast import config as configs
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.cycle import Cycle, CycleConfig
from flywheel_fast.data import noise, sources
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.memory import Memory
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.em import EMState
from flywheel_fast.embed import embed
from flywheel_fast.errors import BadInput
from flywheel_fast.learner import Learner
from flywheel_fast.trainer import Config, Trainer

PLAN = Path("benchmarks/plans/label_errors.yaml")
RESULTS = Path("benchmarks/results/label_errors.csv")
FOLDS = 5
OURS, CEILING = "flywheel-fast", "logistic regression on true labels"
STRENGTHS = (1.0, 0.1, 0.01)
FIELDS = (
    *("task", "method", "seed", "auroc", "average_precision", "precision_at_100", "flagged", "flagged_precision"),
    *(
        "test_acc",
        "gamma",
        "seconds",
        "passes",
        "epochs",
        "images",
        "true_wrong",
        "labels_sha256",
        "network",
        "threads",
    ),
    *("config", "config_sha256", "device", "versions", "commit"),
)


@dataclass(frozen=True)
class Task:
    name: str
    seed: int
    words: str  # config and changes, as one would type them
    config: Config

    @property
    def digest(self) -> str:
        """Of the config, wherever the data lie."""
        place = {"features": "-"} if self.config.data.features else {}
        data = replace(
            self.config.data, root="-", **place, noise=replace(self.config.data.noise, file=None, kind="none")
        )
        return hashlib.sha256(f"{self.words} {replace(self.config, data=data)}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ranking:
    """What a method says of N labels."""

    score: np.ndarray | None = None  # [N] float64, lower is worse; None: it learns from the true labels
    flagged: np.ndarray | None = None  # [N] bool
    test_acc: float | None = None  # of what was trained on all labels
    gamma: float | None = None


def read_plan(path: Path, words: list[str], threads: int, out: Path) -> list[Task]:
    """The tasks of a plan, each by seed; features that they ask for are computed into `out`. Raises BadInput naming the
    file and the key."""
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        tasks = []
        for name, task in plan["tasks"].items():
            place = []
            if "features" in task:
                place = [f"data.features={_features(plan['features'][task['features']], out / task['features'])}"]
            for seed in task.get("seeds", plan["seeds"]):
                changes = [*plan["defaults"], *task["words"], f"seed={seed}", f"data.noise.seed={seed}", *words]
                config = configs.load(Config, task["config"], [*place, *changes, f"data.threads={threads}"])
                tasks.append(Task(name, seed, " ".join([task["config"], *changes]), config))
        return tasks
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: is no plan of tasks ({type(error).__name__}: {error})") from error


def _features(wanted: dict, folder: Path) -> Path:
    embed(configs.load(Config, wanted["config"], wanted["words"]), folder)
    return folder


# -- the ways ------------------------------------------------------------------------------------------------------


def by_flywheel(task: Task, train_set: Manifest, out: Path) -> dict[str, Ranking]:
    """Trains as `flywheel-fast train` does; label_score is the ranking."""
    folder = run_folder.create(str(out), task.name, overwrite=out.exists(), resuming=False)
    trainer = Trainer(task.config, folder)
    trainer.run()
    found, last = audit.read_labels(folder / "labels"), trainer.history[-1]
    return {OURS: Ranking(found.clean_prob.astype(np.float64), found.is_issue, last["test_acc_aux"], last["gamma"])}


def by_cleanlab(task: Task, train_set: Manifest, out: Path) -> dict[str, Ranking]:
    """cleanlab's three rankings from the same out-of-sample probabilities."""
    return cleanlab_rankings(train_set.labels, out_of_sample(task.config, train_set))


def cleanlab_rankings(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Ranking]:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    default = find_label_issues(labels, probabilities)
    confident = find_label_issues(labels, probabilities, filter_by="confident_learning")
    quality = {
        name: get_label_quality_scores(labels, probabilities, method=name)
        for name in ("self_confidence", "normalized_margin")
    }
    return {
        "cleanlab, self-confidence": Ranking(quality["self_confidence"], default),
        "cleanlab, normalised margin": Ranking(quality["normalized_margin"], default),
        # a set, not a ranking: what is in it first, either part by self-confidence
        "cleanlab, confident learning": Ranking(quality["self_confidence"] + ~confident, confident),
    }


def epochs_of_folds(config: Config) -> int:
    """A fold trains on 4/5 of the images, three passes each, and looks at the others once: 12 epochs + 1 in all."""
    return max(1, round((passes(config.cycle, config.optim.epochs) - 1) / (3 * (FOLDS - 1))))


def out_of_sample(config: Config, train_set: Manifest) -> np.ndarray:  # [N, C] float64
    """Probabilities of each sample by the network that was trained on the four folds without it."""
    from sklearn.model_selection import StratifiedKFold

    num_classes, optim = len(train_set.classes), replace(config.optim, epochs=epochs_of_folds(config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = np.empty((len(train_set), num_classes))

    def loader(part: np.ndarray) -> Loader:
        data = config.data
        memory = Memory.free(device, data.cache_gb)
        return Loader(train_set.subset(part), config.views, optim.batch_size, config.seed, device, data.threads, memory)

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=config.seed).split(train_set.labels, train_set.labels)
    for number, (part, held_out) in enumerate(folds):
        batches = loader(part)
        seed = FOLDS * config.seed + number
        network = models.build(config.model.main, num_classes, config.views.image_size, seed)
        learner = Learner(network, optim, len(batches), device)
        labels = torch.as_tensor(train_set.labels[part], device=device)
        alone = Cycle(CycleConfig(kind="cross_entropy"), learner, None, EMState.start(labels, num_classes, 0.5))
        for epoch in range(optim.epochs):
            alone.run(batches, epoch)
        for index, (clean,) in loader(held_out).sweep():
            found[held_out[index.cpu()]] = learner.predict(clean).double().softmax(dim=1).cpu()
    return found


# -- the same on features ----------------------------------------------------------------------------------------------


class Seen:
    """Features and labels of a task, and logistic regression on them, as strong as predicts held-out labels best."""

    def __init__(self, task: Task):
        data = sources.load(task.config.data)
        rows = {name: data.features.rows(part) for name, part in data.splits().items()}
        self.x, self.test_x = (np.asarray(data.features.array[rows[name], 0], np.float32) for name in ("train", "test"))
        self.labels, self.test_labels, self.true = data.train.labels, data.test.labels, data.train.true_labels
        self.seed = task.seed

    def out_of_sample(self, strength: float) -> np.ndarray:  # [N, C] float64
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=self.seed)
        found = cross_val_predict(self.regression(strength), self.x, self.labels, cv=folds, method="predict_proba")
        return found.astype(np.float64)

    @cached_property
    def strength(self) -> float:
        """Inverse of the L2 penalty."""

        def likelihood(strength: float) -> float:
            return float(np.log(self.out_of_sample(strength)[np.arange(len(self.labels)), self.labels] + 1e-12).mean())

        return max(STRENGTHS, key=likelihood)

    def accuracy(self, labels: np.ndarray, strength: float) -> float:
        return float(self.regression(strength).fit(self.x, labels).score(self.test_x, self.test_labels))

    @staticmethod
    def regression(strength: float):
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=strength, max_iter=300)


def by_regression(seen: Seen) -> dict[str, Ranking]:
    """cleanlab's rankings by logistic regression."""
    return cleanlab_rankings(seen.labels, seen.out_of_sample(seen.strength))


def by_neighbours(seen: Seen) -> dict[str, Ranking]:
    """The share of a sample's nearest others, by cosine, that have its label."""
    _, neighbour, _ = oddities.neighbours(seen.x)
    share = (seen.labels[neighbour] == seen.labels[:, None]).mean(axis=1)
    return {"neighbours": Ranking(share, share < 0.5)}


METHODS: dict[str, Callable[[Task, Manifest, Path], dict[str, Ranking]]] = {
    OURS: by_flywheel,
    "cleanlab, self-confidence": by_cleanlab,
    "cleanlab, normalised margin": by_cleanlab,
    "cleanlab, confident learning": by_cleanlab,
}


ON_FEATURES = {
    OURS: by_flywheel,
    **{method: by_regression for method, way in METHODS.items() if way is by_cleanlab},
    CEILING: by_regression,
    "neighbours": by_neighbours,
}


def methods(task: Task) -> dict[str, Callable]:
    return ON_FEATURES if task.config.data.features else METHODS


# -- rows --------------------------------------------------------------------------------------------------------------


def measured(ranking: Ranking, train_set: Manifest) -> dict[str, float]:
    known = {"test_acc": ranking.test_acc, "gamma": ranking.gamma}
    known = {name: round(value, 4) for name, value in known.items() if value is not None}
    if ranking.score is None:
        return known
    wrong = train_set.labels != train_set.true_labels
    auroc, average_precision = audit.selection_quality(ranking.score, train_set.labels, train_set.true_labels)
    worst = np.argsort(ranking.score, kind="stable")[:100]
    return known | {
        "auroc": round(auroc, 4),
        "average_precision": round(average_precision, 4),
        "precision_at_100": round(float(wrong[worst].mean()), 4),
        "flagged": int(ranking.flagged.sum()),
        "flagged_precision": round(float(wrong[ranking.flagged].mean()), 4) if ranking.flagged.any() else "",
    }


def rows_of(task: Task, way: Callable, threads: int, out: Path) -> Iterator[dict]:
    """Runs one way on a task: a row for each ranking that it gives. Seconds: from the files to the rankings."""
    train_set = sources.load(task.config.data).train  # also warms the disk's cache for both
    if train_set.true_labels is None:
        raise BadInput(f"{task.name}: has no true labels to compare with; give data.noise, or a column true_label")
    log = out / f"{way.__name__}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    ours = way is by_flywheel
    seen = Seen(task) if task.config.data.features and not ours else None
    strength = seen.strength if way is by_regression else None  # looked for before the time counts
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file):
        start = time.perf_counter()
        rankings = way(seen) if seen else way(task, train_set, out / way.__name__)
        seconds = time.perf_counter() - start
    if way is by_regression:
        plain, truly = (seen.accuracy(labels, strength) for labels in (seen.labels, seen.true))
        rankings = {method: replace(ranking, test_acc=plain) for method, ranking in rankings.items()}
        rankings[CEILING] = Ranking(test_acc=truly)
    here, config = env.describe(), task.config
    epochs = config.optim.epochs if ours else epochs_of_folds(config)
    spent = passes(config.cycle, config.optim.epochs) if ours else 3 * (FOLDS - 1) * epochs + 1
    for method, ranking in rankings.items():
        yield {
            **{"task": task.name, "method": method, "seed": task.seed, **measured(ranking, train_set)},
            **{"seconds": round(seconds, 1), "passes": spent, "epochs": epochs, "threads": threads},
            "images": len(train_set),
            "true_wrong": round(float(np.mean(train_set.labels != train_set.true_labels)), 4),
            "labels_sha256": noise.digest(train_set.labels),
            "network": config.model.main.name,
            "config": task.words,
            "config_sha256": task.digest,
            "device": here["GPU"] if here["GPU"] != "none" else here["processor"].rpartition(",")[0],
            "versions": "; ".join(f"{name} {here[name]}" for name in ("python", "torch", "nvidia-dali-cuda130")),
            "commit": here["flywheel-fast"],
        }


def read_rows(path: Path) -> dict[tuple, dict]:
    """Rows by task, method, seed and config; of two with the same key the later counts."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise BadInput(f"{path}: has other columns than this version writes; move it away, or name another --csv")
        return {(row["task"], row["method"], int(row["seed"]), row["config_sha256"]): row for row in reader}


TEXT = """# Finding wrong labels: flywheel-fast and cleanlab

Each on the same labels, network, number of threads and forward passes an image, a backward pass counted as two
(`passes`). cleanlab ranks by out-of-sample probabilities of the network in {folds} folds, flywheel-fast by
`label_score`. AUROC and average precision (AP) of finding the labels that are truly wrong; share that is wrong of the
100 worst, and of those that the method flags; seconds from the files to the ranking. Means over the seeds.

`emb_` tasks are on features of a frozen EfficientNet-Lite0 with ImageNet weights, which are there for all; cleanlab has
logistic regression in {folds} folds there, with the L2 penalty of {strengths} (inverse) that predicts held-out labels
best, found before the seconds count. `test accuracy`: of what each method trains on all labels, cleanlab's of that
regression.

{table}

AP of flywheel-fast above the best of cleanlab's: {above}.

All of it again, skipping what is done: `python -m benchmarks.label_errors {plan}`. Written by that module from the CSV
beside this file, where each row has its config, hash of the labels, versions and commit.
"""


def table(plan: str, tasks: list[Task], rows: dict[tuple, dict]) -> str:
    lines = [
        ("task", "images", "wrong", "method", "AUROC", "AP", "wrong of 100", "flagged", "wrong of flagged")
        + ("test accuracy", "γ", "passes", "seconds", "seeds")
    ]
    above = []
    for name in dict.fromkeys(task.name for task in tasks):
        precision = {}
        for method in {method: None for task in tasks if task.name == name for method in methods(task)}:
            keys = [(name, method, task.seed, task.digest) for task in tasks if task.name == name]
            if not (found := [rows[key] for key in keys if key in rows]):
                continue

            def average(column: str, form: str, found: list[dict] = found) -> str:
                values = [float(row[column]) for row in found if row[column] != ""]
                return format(mean(values), form) if values else "–"

            if found[0]["average_precision"]:
                precision[method] = float(average("average_precision", ".4f"))
            cells = [average("auroc", ".3f"), average("average_precision", ".3f"), average("precision_at_100", ".2f")]
            cells += [average("flagged", ",.0f"), average("flagged_precision", ".3f")]
            cells += [
                average("test_acc", ".3f"),
                average("gamma", ".3f"),
                average("passes", ".0f"),
                average("seconds", ".0f"),
                len(found),
            ]
            lines.append((name, average("images", ",.0f"), average("true_wrong", ".1%"), method, *cells))
        rivals = [value for method, value in precision.items() if method != OURS]
        if rivals and OURS in precision:
            above.append(f"{name} {precision[OURS] - max(rivals):+.3f}")
    strengths = ", ".join(f"{value:g}" for value in STRENGTHS)
    return TEXT.format(
        plan=plan, folds=FOLDS, strengths=strengths, table=markdown(lines), above=", ".join(above) or "–"
    )


# -- the command line --------------------------------------------------------------------------------------------------


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_errors", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="PLAN | key=value", help=f"tasks (default: {PLAN}), and changes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("runs/label_errors"), help="the runs (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows (default: %(default)s); the table is beside it")
    args = parser.parse_intermixed_args(words)
    return exit_status("label_errors", lambda: _run(args), "the same command goes on with the run that it was at")


def _run(args: argparse.Namespace) -> None:
    plan = next((word for word in args.words if "=" not in word), str(PLAN))
    changes = [word for word in args.words if "=" in word]
    torch.set_num_threads(args.threads)
    tasks, rows = read_plan(Path(plan), changes, args.threads, args.out / "features"), read_rows(args.csv)
    for task in tasks:
        for way in dict.fromkeys(methods(task).values()):
            wanted = [method for method, by in methods(task).items() if by is way]
            if all((task.name, method, task.seed, task.digest) in rows for method in wanted):
                continue
            print(f"{task.name} {task.seed}: {way.__name__} ...", flush=True)
            for row in rows_of(task, way, args.threads, args.out / task.name / f"{task.seed}-{task.digest}"):
                append(args.csv, row, FIELDS)
                shown = ("method", "auroc", "average_precision", "precision_at_100", "seconds")
                print("  " + "  ".join(f"{row.get(name, '')}" for name in shown), flush=True)
    path = args.csv.with_suffix(".md")
    write_atomic(path, table(" ".join([plan, *changes]), tasks, read_rows(args.csv)).encode())
    print(f"table: {path}")


if __name__ == "__main__":
    sys.exit(main())
