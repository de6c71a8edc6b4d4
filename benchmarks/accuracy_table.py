"""The Markdown table of a plan's runs, from the rows of the CSV: means, deviations, and the share of the gap closed."""

from pathlib import Path
from statistics import mean, stdev

CE, CLEAN = "cross_entropy", "none"  # the method and the noise that every task has
WIDE = 4  # methods beside each other
SMALL_GAP = 0.01  # between clean and noisy cross-entropy: a share of less says nothing
Found = dict[tuple[str, str, str], dict[int, dict]]  # (task, noise, method) -> seed -> row

TEXT = """# Accuracy: {name}

Test accuracy at the last epoch, mean ± standard deviation (number of seeds), of the network that is used at test time:
the auxiliary one, or the only one of plain cross-entropy (CE); then the gap closed, (accuracy − CE noisy) / (CE clean −
CE noisy), of means over the seeds that all three have. None is given where the gap is under {gap}. The best epoch is
shown, not used.

{head}
{missing}
## Each method

`passes`: forward passes an image over the run, a backward pass counted as two, test images left out. `main`: accuracy
of the main network. AUROC, AP (average precision): of finding the wrong labels. `refurbished right`, `posterior right`:
share of the resampled labels, and of the posterior's classes, that are true. `merged`: classes lost, on average.

{body}

All of it again, skipping what is done: `python -m benchmarks.accuracy {plan}`. The one command of a run, which gives
the same numbers on one machine: the same with `--print TASK/NOISE/METHOD/SEED`. Written by that module from the CSV
beside this file, where each run has its noise hash, versions, commit and command.
"""


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


def _numbers(rows: list[dict], column) -> list[float]:
    """`column`: a name, or a function of the row; empty cells are left out."""
    found = [column(row) if callable(column) else row[column] for row in rows]
    return [float(value) for value in found if value != ""]


def _spread(rows: list[dict], column) -> str:
    values = _numbers(rows, column)
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation} ({len(values)})"


def _average(rows: list[dict], column, form: str) -> str:
    values = _numbers(rows, column)
    return format(mean(values), form) if values else "–"


def table(plan: Path, found: Found) -> str:
    """A row per task and noise, then a row per method; `found` has a key for each that the plan names."""
    others = [method for method in dict.fromkeys(method for _, _, method in found) if method != CE]
    head, missing = [("task", "network, images", "noise", "CE clean", "CE noisy", *others)], []
    for task, noise in dict.fromkeys((task, noise) for task, noise, _ in found):
        if not any(found.get((task, noise, method)) for method in (CE, *others)):
            missing.append(f"{task}/{noise}")
            continue
        noisy, clean = list(found[task, noise, CE].values()), list(found[task, CLEAN, CE].values())
        what = f"{clean[0]['network']}, {int(clean[0]['images']):,}" if clean else "–"
        cells = [_spread(list(found.get((task, noise, method), {}).values()), accuracy) for method in others]
        shares = [_share(found, task, noise, method) for method in others]
        cells = [cell + f", {share}" * (share != "–") for cell, share in zip(cells, shares, strict=True)]
        head.append((task, what, noise, _spread(clean, accuracy), _spread(noisy, accuracy), *cells))
    if len(others) > WIDE:  # of ablations: a line a method
        head = list(zip(*head, strict=True))
    body = [("task", "noise", "method", "gap closed", *COLUMNS)]
    for (task, noise, method), of_seed in found.items():
        if rows := list(of_seed.values()):
            share = _share(found, task, noise, method)
            body.append((task, noise, method, share, *(column(rows) for column in COLUMNS.values())))
    text = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    head, body = markdown(head), markdown(body)
    return TEXT.format(plan=plan, name=plan.name, gap=SMALL_GAP, head=head, missing=text, body=body)


def _share(found: Found, task: str, noise: str, method: str) -> str:
    if noise == CLEAN or method == CE:
        return "–"
    gap = gap_closed(found.get((task, noise, method), {}), found[task, noise, CE], found[task, CLEAN, CE])
    return "–" if gap is None else f"{gap:.0%}"


def markdown(lines: list[tuple]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


COLUMNS = {  # of the second table: rows of all seeds -> cell
    "accuracy": lambda rows: _spread(rows, accuracy),
    "main": lambda rows: _spread(rows, "test_acc_main"),
    "best epoch": lambda rows: _spread(rows, lambda row: row["best_test_acc_aux"] or row["best_test_acc_main"]),
    "γ": lambda rows: _spread(rows, "gamma"),
    "truth": lambda rows: _average(rows, "true_clean", ".4f"),
    "AUROC": lambda rows: _spread(rows, "selection_auroc"),
    "AP": lambda rows: _spread(rows, "selection_ap"),
    "refurbished right": lambda rows: _spread(rows, "refurbish_acc"),
    "posterior right": lambda rows: _spread(rows, "posterior_acc"),
    "merged": lambda rows: _average(rows, "merged", ".1f"),
    "epochs": lambda rows: rows[0]["epochs"],
    "passes": lambda rows: rows[0]["passes"],
    "seconds": lambda rows: _average(rows, "seconds", ".0f"),
}
