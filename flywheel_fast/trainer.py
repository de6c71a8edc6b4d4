"""The one assembler: a config becomes data, networks and state; the loop runs; the run folder fills."""

import csv
import io
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from flywheel_fast import audit, card, checkpoint, env, models, ops, plots, run_folder, sinks
from flywheel_fast import config as configs
from flywheel_fast.cycle import Cycle, CycleConfig
from flywheel_fast.data import noise, reviews, scan, sources
from flywheel_fast.data.manifest import DROPPED, Manifest
from flywheel_fast.data.memory import Memory
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.em import EMState
from flywheel_fast.errors import BadInput, Failure
from flywheel_fast.learner import Learner, OptimConfig
from flywheel_fast.screen import Screen

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
    ),
    *(f"{test}_top5_{name}" for test in ("test", "imagenet") for name in ("main", "aux")),
)
COLUMNS = (
    *("cycle", *MEASURES, "loss_main", "loss_aux", "lr"),
    *(f"sec_{phase}" for phase in PHASES),
    "waiting",
)
NOTABLE_WAITING = 0.05  # share of a run's time
MOST_MERGERS = 3  # said of an epoch
TOP5_FROM = 50  # classes: whose literature reports both, that of WebVision first of all
# Between a run and its resumption; moved data are recognised by their files and labels.
MAY_CHANGE = {"name", "log", "eval_every", "optim.epochs"}
MAY_CHANGE |= {"data.root", "data.images", "data.noise.file", "data.reviews", "data.threads", "data.cache_gb"}


@dataclass(frozen=True)
class Config:
    name: str = "run"
    """The run's folder is runs/NAME, numbered when taken."""
    seed: int = 0
    """Of the initial weights, the order and the augmentations; noise and subsets have their own."""
    eval_every: int = 1
    """Epochs between two looks at the test split; the last epoch is always looked at."""
    log: tuple[str, ...] = ()
    """Where the rows of metrics.csv go too: tensorboard, mlflow; each needs the extra of its name."""
    data: sources.DataConfig = field(default_factory=sources.DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: models.ModelConfig = field(default_factory=models.ModelConfig)
    cycle: CycleConfig = field(default_factory=CycleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        if self.eval_every < 1:
            raise ValueError(f"eval_every must be at least 1, not {self.eval_every}")
        if unknown := [name for name in self.log if name not in sinks.SINKS]:
            raise ValueError(f"log must be of {', '.join(sinks.SINKS)}, not {unknown[0]!r}")
        if self.cycle.kind == "flywheel" and self.cycle.warmup > self.optim.epochs:
            raise ValueError(f"cycle.warmup={self.cycle.warmup} is longer than optim.epochs={self.optim.epochs}")


class Trainer:
    """Everything of one run in the folder `out`; `resume` restores its last checkpoint."""

    def __init__(self, config: Config, out: Path, resume: bool = False):
        self.out, self.screen = out, Screen(out / run_folder.LOG)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = config
        data = sources.load(config.data)
        self.noisy_labels = data.noisy_labels
        self.bad_files: list[scan.BadFile] = []  # left out
        self.test_sets = {name: self._readable(part, name) for name, part in data.splits().items()}
        self.train_set = self.test_sets.pop("train")
        self.reviews = reviews.summary(Path(config.data.reviews)) if config.data.reviews else None
        saved = checkpoint.load(out / run_folder.CHECKPOINT) if resume else None
        if saved:
            self.config = self._with_time_for_reviews(config, saved)
        self.memory = Memory.free(self.device, config.data.cache_gb)
        self.loader = self._loader(self.train_set, config.optim.balanced_batches)
        self.test_loaders = {name: self._loader(part) for name, part in self.test_sets.items()}
        self.cycle = self._assemble()
        self.history: list[dict] = []  # a row an epoch, as in metrics.csv
        self.warned: set[str] = set()
        if saved:
            self._restore(saved)
        self._review()
        self.config_text = configs.dump(self.config)
        settings = configs.flat(configs.as_dict(self.config))
        self.sinks = sinks.open_all(config.log, out, config.name, settings, len(self.history))

    def run(self) -> None:
        config, cycle, loader = self.config, self.cycle, self.loader
        self._open()
        images = [cycle.images(epoch, len(self.train_set), loader.drawn) for epoch in range(config.optim.epochs)]
        done = len(self.history)
        with self.screen.progress(sum(images), sum(images[:done])) as cycle.on_images:
            for epoch in range(done, config.optim.epochs):
                cycle.clock.seconds.clear()
                cycle.run(loader, epoch)
                self.history.append(self._measure(epoch))
                self._save()
                for sink in self.sinks:
                    sink.write(epoch + 1, self.history[-1])
                self._say_epoch()
        self._close()

    # -- start ---------------------------------------------------------------------------------------------------------

    def _readable(self, manifest: Manifest, split: str) -> Manifest:
        """Without the files at which the training would stop; these go to `bad_files`."""
        manifest, bad = scan.without_broken(manifest, split, self.device, self.config.data.threads)
        self.bad_files += bad
        return manifest

    def _loader(self, manifest: Manifest, balanced_batches: int | None = None) -> Loader:
        config, data = self.config, self.config.data
        return Loader(
            manifest,
            config.views,
            config.optim.batch_size,
            config.seed,
            self.device,
            data.threads,
            self.memory,
            balanced_batches=balanced_batches,
        )

    def _assemble(self) -> Cycle:
        config, num_classes = self.config, len(self.train_set.classes)

        def learner(network: models.NetworkConfig, seed: int, projection: int = 0) -> Learner:
            size = config.views.image_size
            built = models.build(network, num_classes, size, seed, projection)
            return Learner(built, config.optim, len(self.loader), self.device)

        main, aux = learner(config.model.main, 2 * config.seed), None
        if config.cycle.kind == "flywheel":
            projection = 128 if config.cycle.contrastive > 0 else 0
            aux = learner(config.model.aux or config.model.main, 2 * config.seed + 1, projection)
        labels = torch.as_tensor(self.train_set.labels, device=self.device)
        return Cycle(config.cycle, main, aux, EMState.start(labels, num_classes, config.cycle.gamma))

    def _with_time_for_reviews(self, config: Config, saved: dict) -> Config:
        """A run that has ended learns what was reviewed since in a quarter more epochs: there a cosine schedule, drawn
        out to the new end, stands at a tenth of its peak. Cut off on the way, it still goes to that end."""
        done, end = len(saved["history"]), config.optim.epochs
        if self._reviews_digest() != saved.get("reviews"):
            if done >= end:
                end = done + max(round(done / 4), 1)
                self.screen.say(f"reviews have changed since: going on to epoch {end} (optim.epochs sets another end)")
        elif self.reviews:
            end = max(end, saved["config"]["optim"]["epochs"])
        return replace(config, optim=replace(config.optim, epochs=end))

    def _reviews_digest(self) -> str | None:
        reviewed = self.train_set.reviewed
        return None if reviewed is None else noise.digest(reviewed)

    def _review(self) -> None:
        given, reviewed = self.train_set.labels, self.train_set.reviewed
        given = torch.as_tensor(given, device=self.device)
        reviewed = None if reviewed is None else torch.as_tensor(reviewed, device=self.device)
        self.cycle.state.review(given, reviewed)

    def _restore(self, saved: dict) -> None:
        path = self.out / run_folder.CHECKPOINT
        changed = set(configs.difference(saved["config"], configs.as_dict(self.config))) - MAY_CHANGE
        if changed:
            raise BadInput(
                f"checkpoint {path}: was trained with another {', '.join(sorted(changed))}; set back what differs from "
                f"{self.out / 'config.yaml'}, or train in another --out"
            )
        if saved["labels"] != self.train_set.digest:
            raise BadInput(
                f"checkpoint {path}: the training files or their labels have changed since; train in another --out"
            )
        self.cycle.load_state_dict(saved["cycle"])
        torch.set_rng_state(saved["generator"])
        if torch.cuda.device_count() == len(saved["cuda_generators"]):
            torch.cuda.set_rng_state_all(saved["cuda_generators"])
        self.history = saved["history"]

    def _open(self) -> None:
        train_set, config = self.train_set, self.config
        checkpoint.write_atomic(self.out / "config.yaml", self.config_text.encode())
        checkpoint.write_atomic(self.out / "env.json", json.dumps(env.describe(), indent=2).encode())
        test = " and ".join(f"{len(part):,}" for part in self.test_sets.values()) + " to test on"
        where = f"{self.device}, {'bf16' if self.cycle.main.bf16 else 'fp32'}, {torch.get_num_threads()} threads"
        self.screen.say(
            f"{len(train_set.labels):,} images of {len(train_set.classes)} classes to train on, {test}; {where}"
        )
        kept = (f"{name} {loader.kept}" for name, loader in [("train", self.loader), *self.test_loaders.items()])
        self.screen.say(f"images: {'; '.join(kept)} ({self.memory.terms})")
        if self.loader.reader == "torchvision":
            self.screen.say("nvidia-dali is not installed: Pillow and torchvision read the images, more slowly")
        if self.bad_files:
            scan.write(self.out / run_folder.BAD_FILES, self.bad_files)
            first = self.bad_files[0]
            self.screen.warn(
                f"{len(self.bad_files):,} broken files are left out and listed in {self.out / run_folder.BAD_FILES}, "
                f"first {first.file_name}: {first.problem}"
            )
        if train_set.true_labels is not None:
            wrong = np.mean(train_set.labels != train_set.true_labels)
            self.screen.say(f"{wrong:.1%} of the labels are wrong")
        if config.data.noise.kind != "none":
            buffer = io.BytesIO()
            counts = noise.realised(train_set.true_labels, train_set.labels, len(train_set.classes))
            noise.save(buffer, self.noisy_labels, counts)
            checkpoint.write_atomic(self.out / "noise.npz", buffer.getvalue())
            digest = noise.digest(self.noisy_labels)[:16]
            self.screen.say(f"{config.data.noise.kind} noise, saved as noise.npz, sha256 {digest}")
            self.screen.say("\n".join(noise.describe(counts, train_set.classes)))
        if train_set.reviewed is not None:
            pinned, dropped = self._reviewed()
            self.screen.say(f"{config.data.reviews}: {pinned:,} labels are pinned, {dropped:,} images dropped")
        if why_not := ops.why_not_native(self.device):
            self.screen.say(f"native ops {why_not}. The E-step runs on the PyTorch reference")
        if self.history:
            self.screen.say(f"going on after epoch {len(self.history)} of {config.optim.epochs}")

    # -- each epoch ----------------------------------------------------------------------------------------------------

    def _measure(self, epoch: int) -> dict:
        cycle, last = self.cycle, epoch + 1 == self.config.optim.epochs
        row: dict = {"cycle": epoch + 1, "lr": cycle.main.optimizer.param_groups[0]["lr"]}
        row |= {f"loss_{name}": torch.stack(steps).mean().item() for name, steps in cycle.losses.items()}
        broken = [name for name in row if not np.isfinite(row[name])]
        if broken:
            kept = f"the state after epoch {epoch} is kept in {self.out}" if epoch else "nothing was saved yet"
            raise Failure(
                f"{broken[0]} became {row[broken[0]]} in epoch {epoch + 1}; {kept}: start anew with a lower optim.lr "
                f"(it is {self.config.optim.lr})"
            )
        with cycle.clock("eval"):
            if last or (epoch + 1) % self.config.eval_every == 0:
                for name in self.test_sets:
                    row |= self._accuracy(name)
            true = self.train_set.true_labels
            if self.train_set.reviewed is not None:
                row["reviewed"] = sum(self._reviewed())
            if true is not None:
                row["true_clean"] = float(np.mean(true == self.train_set.labels))
            if cycle.expecting(epoch):
                alive = cycle.state.num_classes - len(cycle.state.merged_classes())
                gamma = self._given_clean_prob().mean(dtype=torch.float64).item()  # of all, decided ones too
                row |= {"gamma": gamma, "classes_alive": alive, "agreement": cycle.state.agreement}
                if true is not None:
                    row |= self._quality(true)
        return row

    def _accuracy(self, test: str) -> dict:
        """Share of the images of a test set that the averaged networks get right; of many classes, among their first
        five too."""
        labels = torch.as_tensor(self.test_sets[test].labels, device=self.device)
        learners = self.cycle.learners()
        right = defaultdict(list)  # of each measure, [B] bool
        for index, (clean,) in self.test_loaders[test].sweep():
            for name, learner in learners.items():
                logits, given = learner.predict(clean), labels[index]  # [B, C], [B]
                right[f"{test}_acc_{name}"].append(logits.argmax(dim=1) == given)
                if logits.shape[1] >= TOP5_FROM:
                    right[f"{test}_top5_{name}"].append((logits.topk(5).indices == given[:, None]).any(dim=1))
        return {measure: torch.cat(hits).double().mean().item() for measure, hits in right.items()}

    def _quality(self, true: np.ndarray) -> dict:
        state = self.cycle.state
        clean_prob = self._given_clean_prob().cpu().numpy()
        auroc, average_precision = audit.selection_quality(clean_prob, self.train_set.labels, true)
        found = {
            "selection_auroc": auroc,
            "selection_ap": average_precision,
            "selection_acc": float(np.mean((clean_prob >= 0.5) == (self.train_set.labels == true))),
            "refurbish_acc": float(np.mean(state.resampled_label.cpu().numpy() == true)),
            "posterior_acc": float(np.mean(state.suggested_label.cpu().numpy() == true)),
        }
        return {name: value for name, value in found.items() if not np.isnan(value)}  # all labels right, or all wrong

    def _given_clean_prob(self) -> Tensor:  # [N] float32
        """Probability that the given label is right; 0 where a review says another."""
        state, reviewed = self.cycle.state, self.train_set.reviewed
        if reviewed is None:
            return state.clean_prob
        given = torch.as_tensor(self.train_set.labels, device=self.device)
        return torch.where(state.labels == given, state.clean_prob, 0)

    def _reviewed(self) -> tuple[int, int]:
        """Labels pinned and images dropped."""
        reviewed = self.train_set.reviewed
        return int(np.count_nonzero(reviewed >= 0)), int(np.count_nonzero(reviewed == DROPPED))

    def _save(self) -> None:
        start = time.perf_counter()
        row = self.history[-1]
        row |= {f"sec_{phase}": round(self.cycle.clock.seconds[phase], 4) for phase in PHASES[:-1]}
        row["waiting"] = round(_waiting([row]), 4)
        state = {
            "config": configs.as_dict(self.config),
            "labels": self.train_set.digest,
            "reviews": self._reviews_digest(),
            "cycle": self.cycle.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all(),
            "history": self.history,
        }
        checkpoint.save(self.out / run_folder.CHECKPOINT, state)
        row["sec_save"] = round(time.perf_counter() - start, 4)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(self.history)
        checkpoint.write_atomic(self.out / "metrics.csv", text.getvalue().encode())

    def _say_epoch(self) -> None:
        row, epochs = self.history[-1], self.config.optim.epochs
        parts = [f"epoch {row['cycle']:>3}/{epochs}"]
        shown = ("test_acc_main", "test_acc_aux", "gamma", "true_clean", "selection_auroc", "refurbish_acc")
        parts += [f"{name} {row[name]:.3f}" for name in shown if name in row]
        self.screen.say("  ".join(parts) + f"  {_seconds(row):.1f} s")
        ailments = self._ailments()
        new = [name for name in ailments if name not in self.warned]
        mergers = [name for name in new if name.startswith("merged ")]
        for name in new:
            if name not in mergers[MOST_MERGERS:]:
                self.screen.warn(ailments[name])
        if len(mergers) > MOST_MERGERS:
            self.screen.warn(f"{len(mergers) - MOST_MERGERS} more classes have all but vanished from them")
        self.warned |= ailments.keys()

    def _ailments(self) -> dict[str, str]:
        """Of the last cycle, after a resumption too; none before the first."""
        return self.cycle.state.ailments(self.train_set.classes) if "agreement" in self.history[-1] else {}

    # -- end -----------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Network, labels, plots, and the table of what a user wants to know."""
        inference = self.cycle.inference()
        meta = {"flywheel_fast": json.dumps({"classes": self.train_set.classes, "config": self.config_text})}
        weights = {key: value.contiguous() for key, value in inference.ema.module.state_dict().items()}
        checkpoint.write_atomic(self.out / "weights" / "model.safetensors", to_safetensors(weights, meta))
        labels = self._labels() if self.cycle.aux else None
        with self.screen.console.status("writing labels and plots"):
            if labels:
                audit.write_labels(labels, self.out / "labels")
            plots.write_plots(labels, self.out / "metrics.csv", self.out / "plots")
        record, ailments = self._record(), list(self._ailments().values())
        checkpoint.write_atomic(self.out / "result.json", json.dumps(record, indent=2).encode())
        about = card.text(self.config, self.train_set.classes, record, labels, ailments)
        checkpoint.write_atomic(self.out / "README.md", about.encode())
        for sink in self.sinks:
            sink.close()
        self.screen.table("\nResult", self._result(labels))

    def _labels(self) -> audit.Labels:
        train_set, state = self.train_set, self.cycle.state
        self.cycle.recall(self.loader)
        suspicion = state.suspicion.cpu().numpy()
        return audit.Labels(
            root=train_set.root,
            files=train_set.files,
            classes=train_set.classes,
            given=train_set.labels,
            true=train_set.true_labels,
            clean_prob=self._given_clean_prob().cpu().numpy(),
            suggested=state.suggested_label.cpu().numpy(),
            suggested_prob=state.suggested_prob.cpu().numpy(),
            entropy=state.entropy(self.config.cycle.posterior).cpu().numpy(),
            networks_agree=state.agree.cpu().numpy(),
            times_suspected=np.unpackbits(suspicion[:, None], axis=1).sum(axis=1, dtype=np.uint8),
            posterior_sum=state.posterior_sum.cpu().numpy(),
            reviewed=train_set.reviewed,
        )

    def _record(self) -> dict:
        """For result.json: what tables of runs are made of."""
        last = {name: self.history[-1][name] for name in MEASURES if name in self.history[-1]}
        looks = {name: [row[name] for row in self.history if name in row] for name in MEASURES if "_acc_" in name}
        names = self.train_set.classes
        return {
            **last,
            **{f"best_{name}": max(values) for name, values in looks.items() if values},
            "images": len(self.train_set.labels),
            "bad_files": len(self.bad_files),
            "epochs": len(self.history),
            "seconds": round(sum(_seconds(row) for row in self.history), 1),
            "noise_sha256": noise.digest(self.noisy_labels),
            "merged": {names[gone]: names[into] for gone, into in self.cycle.state.merged_classes()},
            **({"reviews": self.reviews} if self.reviews else {}),
        }

    def _result(self, labels: audit.Labels | None) -> list[tuple[str, str]]:
        row, n = self.history[-1], len(self.train_set.labels)
        used = "aux" if self.cycle.aux else "main"
        rows = []
        for name in self.test_sets:
            of = "on ImageNet's images" if name == "imagenet" else "last epoch"
            rows.append((f"test accuracy, {of}", f"{row[f'{name}_acc_{used}']:.4f}"))
            if self.cycle.aux:
                rows.append(("  of the main network", f"{row[f'{name}_acc_main']:.4f}"))
            if f"{name}_top5_{used}" in row:
                rows.append(("  among the first five", f"{row[f'{name}_top5_{used}']:.4f}"))
        if labels:
            rows += audit.summary_rows(labels, self.out)
        merged = self.cycle.state.merged_classes() if labels else []
        if merged:
            names = self.train_set.classes
            pairs = ", ".join(f"{names[gone]} -> {names[into]}" for gone, into in merged[:6])
            rows.append(
                ("COLLAPSED", f"{len(merged)} of {len(names)} classes have merged ({pairs}): do not use this result")
            )
        rows += [("WARNING", said) for name, said in self._ailments().items() if not name.startswith("merged ")]
        if self.bad_files:
            count = f"{len(self.bad_files):,} broken files: {self.out / run_folder.BAD_FILES}"
            rows.append(("left out", count))
        if (waiting := _waiting(self.history)) > NOTABLE_WAITING:
            decode_less = ", or a larger data.cache_gb," if self.loader.images is None else ""
            cure = f"more data.threads{decode_less} may help"
            rows.append(("waiting", f"{waiting:.0%} of the time passed waiting for images: {cure}"))
        seconds = sum(_seconds(row) for row in self.history)
        rows.append(("network", f"{self.out / 'weights' / 'model.safetensors'} ({used})"))
        rows.append(("time", f"{seconds:.0f} s for {len(self.history)} epochs of {n:,} images"))
        return rows


def _seconds(row: dict) -> float:
    """Of all phases of an epoch."""
    return sum(row.get(f"sec_{phase}", 0) for phase in PHASES)


def _waiting(rows: list[dict]) -> float:
    """Share of these epochs' time that passed waiting for images."""
    return sum(row["sec_data"] for row in rows) / max(sum(_seconds(row) for row in rows), 1e-9)
