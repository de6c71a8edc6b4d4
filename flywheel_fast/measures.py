"""What is measured of an epoch, a row of metrics.csv; and of the labels at the end."""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flywheel_fast import audit
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.cycle import Cycle
from flywheel_fast.data.manifest import DROPPED, Manifest
from flywheel_fast.data.pipelines import Loader

PHASES = ("data", "infer", "train", "em", "eval", "save")
MEASURES = (
    *("test_acc_main", "test_acc_aux", "gamma", "true_clean", "selection_auroc", "refurbish_acc"),
    *(
        "classes_alive",
        "agreement",
        "selection_ap",
        "selection_acc",
        "posterior_acc",
        "imagenet_acc_main",
        "imagenet_acc_aux",
        "reviewed",
        "leak",
        "memorised",
    ),
    *(f"{test}_top5_{name}" for test in ("test", "imagenet") for name in ("main", "aux")),
)
COLUMNS = (
    *("cycle", *MEASURES, "loss_main", "loss_aux", "lr"),
    *(f"sec_{phase}" for phase in PHASES),
    "waiting",
)
TOP5_FROM = 50  # classes: whose literature reports both, that of WebVision first of all


def seconds(row: dict) -> float:
    """Of all phases of an epoch."""
    return sum(row.get(f"sec_{phase}", 0) for phase in PHASES)


def waiting(rows: list[dict]) -> float:
    """Share of these epochs' time that passed waiting for images."""
    return sum(row["sec_data"] for row in rows) / max(sum(seconds(row) for row in rows), 1e-9)


def write(rows: list[dict], out: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "metrics.csv", text.getvalue().encode())


def summary(rows: list[dict]) -> dict:
    """The last row's measures, and the best of the accuracies."""
    looks = {name: [row[name] for row in rows if name in row] for name in MEASURES if "_acc_" in name}
    last = {name: rows[-1][name] for name in MEASURES if name in rows[-1]}
    return last | {f"best_{name}": max(values) for name, values in looks.items() if values}


class Measures:
    def __init__(self, cycle: Cycle, train_set: Manifest, test_sets: dict[str, Manifest], loaders: dict[str, Loader]):
        self.cycle, self.train_set, self.test_sets, self.loaders = cycle, train_set, test_sets, loaders
        self.device = cycle.state.labels.device

    def of(self, epoch: int, look: bool) -> dict:
        """The epoch that has just ended, without its seconds; `look` at the test sets too."""
        cycle, true = self.cycle, self.train_set.true_labels
        row: dict = {"cycle": epoch + 1, "lr": cycle.main.optimizer.param_groups[0]["lr"]}
        for name, steps in cycle.mean_losses().items():
            row[f"loss_{name}"] = steps[steps.isfinite()].mean().item()  # the others were no steps
        with cycle.clock("eval"):
            for name in self.test_sets if look else ():
                row |= self._accuracy(name)
            if self.train_set.reviewed is not None:
                row["reviewed"] = sum(self.reviewed())
            if true is not None:
                row["true_clean"] = float(np.mean(true == self.train_set.labels))
            if cycle.expecting(epoch):
                alive = cycle.state.num_classes - len(cycle.state.merged_classes())
                gamma = self.given_clean_prob().mean(dtype=torch.float64).item()  # of all, decided ones too
                row |= {"gamma": gamma, "classes_alive": alive, "agreement": cycle.state.agreement}
                if cycle.state.learned is not None:
                    row |= {name: getattr(cycle.state, name).item() for name in ("leak", "memorised")}
                if true is not None and np.isfinite(gamma):
                    row |= self._quality(true)
        return row

    def given_clean_prob(self) -> Tensor:  # [N] float32
        """Probability that the given label is right; 0 where a review says another."""
        state, reviewed = self.cycle.state, self.train_set.reviewed
        if reviewed is None:
            return state.clean_prob
        given = torch.as_tensor(self.train_set.labels, device=self.device)
        return torch.where(state.labels == given, state.clean_prob, 0)

    def labels(self) -> audit.Labels:
        """What the last E-steps say of them; the teacher must have been recalled."""
        train_set, state = self.train_set, self.cycle.state
        suspicion = state.suspicion.cpu().numpy()
        return audit.Labels(
            root=train_set.root,
            files=train_set.files,
            classes=train_set.classes,
            given=train_set.labels,
            true=train_set.true_labels,
            clean_prob=self.given_clean_prob().cpu().numpy(),
            suggested=state.suggested_label.cpu().numpy(),
            suggested_prob=state.suggested_prob.cpu().numpy(),
            entropy=state.entropy(self.cycle.config.posterior).cpu().numpy(),
            networks_agree=state.agree.cpu().numpy(),
            times_suspected=np.unpackbits(suspicion[:, None], axis=1).sum(axis=1, dtype=np.uint8),
            posterior_sum=state.posterior_sum.cpu().numpy(),
            reviewed=train_set.reviewed,
        )

    def reviewed(self) -> tuple[int, int]:
        """Labels pinned and images dropped."""
        reviewed = self.train_set.reviewed
        return int(np.count_nonzero(reviewed >= 0)), int(np.count_nonzero(reviewed == DROPPED))

    def _accuracy(self, test: str) -> dict:
        """Share of the images of a test set that the averaged networks get right; of many classes, among their first
        five too."""
        labels = torch.as_tensor(self.test_sets[test].labels, device=self.device)
        learners, many = self.cycle.learners(), len(self.test_sets[test].classes) >= TOP5_FROM
        names = [f"{test}_{measure}_{name}" for measure in ("acc", "top5")[: 1 + many] for name in learners]
        right = {name: torch.zeros((), dtype=torch.int64, device=self.device) for name in names}
        for index, (clean,) in self.loaders[test].sweep():
            for name, learner in learners.items():
                logits, given = learner.predict(clean), labels[index]  # [B, C], [B]
                right[f"{test}_acc_{name}"] += (logits.argmax(dim=1) == given).sum()
                if many:
                    right[f"{test}_top5_{name}"] += (logits.topk(5).indices == given[:, None]).sum()
        self.cycle.group.sum(list(right.values()))
        return {measure: hits.item() / len(labels) for measure, hits in right.items()}

    def _quality(self, true: np.ndarray) -> dict:
        state = self.cycle.state
        clean_prob = self.given_clean_prob().cpu().numpy()
        auroc, average_precision = audit.selection_quality(clean_prob, self.train_set.labels, true)
        found = {
            "selection_auroc": auroc,
            "selection_ap": average_precision,
            "selection_acc": float(np.mean((clean_prob >= 0.5) == (self.train_set.labels == true))),
            "refurbish_acc": float(np.mean(state.resampled_label.cpu().numpy() == true)),
            "posterior_acc": float(np.mean(state.suggested_label.cpu().numpy() == true)),
        }
        return {name: value for name, value in found.items() if not np.isnan(value)}  # all labels right, or all wrong
