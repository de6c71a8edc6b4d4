"""The one assembler: a config becomes data, networks and state; the loop runs; the run folder fills."""

import io
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from flywheel_fast import audit, card, checkpoint, env, heads, measures, models, oddities, ops, plots, run_folder, sinks
from flywheel_fast import config as configs
from flywheel_fast.cycle import Cycle, CycleConfig
from flywheel_fast.data import noise, reviews, scan, sources
from flywheel_fast.data.feature_loader import FeatureLoader
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.memory import Memory
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.distributed import ALONE, Group
from flywheel_fast.em import EMState
from flywheel_fast.errors import BadInput, Failure, Stopped
from flywheel_fast.learner import Learner, OptimConfig
from flywheel_fast.pauses import Pauses
from flywheel_fast.screen import Screen

NOTABLE_WAITING = 0.05  # share of a run's time
MOST_MERGERS = 3  # said of an epoch
FORMAT = 6  # of checkpoints: what `_save` puts into them
PATIENCE = 20  # steps one after another that may be skipped
# Between a run and its resumption; moved data are recognised by their files and labels.
MAY_CHANGE = {"name", "log", "eval_every", "optim.epochs", "optim.compile"}
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
        if self.data.source == "features" and self.cycle.contrastive > 0:
            raise ValueError("cycle.contrastive is for images; on features leave it at 0")
        networks = [self.model.main] + [self.model.aux or self.model.main] * (self.cycle.kind == "flywheel")
        if (self.optim.freeze or self.optim.freeze_norm) and None in (network.weights for network in networks):
            raise ValueError("optim.freeze and optim.freeze_norm keep pretrained weights: name them by model.*.weights")


def with_preprocessing(config: Config) -> Config:
    """With what `views` leaves null as the main network saw pictures when its weights were trained."""
    if None not in (config.views.image_size, config.views.crop_pct, config.views.mean, config.views.std):
        return config
    return replace(config, views=config.views.filled(models.preprocessing(config.model.main)))


class Trainer:
    """Everything of one run in the folder `out`; `resume` restores its last checkpoint, and `pauses` says between two
    batches whether to write one, or to stop. Of several processes the first writes and speaks."""

    def __init__(
        self, config: Config, out: Path, resume: bool = False, pauses: Pauses | None = None, group: Group = ALONE
    ):
        config = with_preprocessing(config)
        self.config, self.out, self.pauses = config, out, pauses or Pauses()
        self.group, self.device = group, group.device
        self.screen = Screen(None if group.rank else out / run_folder.LOG)
        data = group.first(lambda: sources.load(config.data))
        self.noisy_labels, self.features = data.noisy_labels, data.features
        self.bad_files: list[scan.BadFile] = []  # left out
        self.test_sets = {name: self._readable(part, name) for name, part in data.splits().items()}
        self.train_set = self.test_sets.pop("train")
        self.reviews = reviews.summary(Path(config.data.reviews)) if config.data.reviews else None
        last = out / run_folder.CHECKPOINT
        saved = group.first(lambda: checkpoint.load_last(last, self.screen.warn)) if resume else None
        if saved is not None:
            if saved.get("format") != FORMAT:
                raise BadInput(
                    f"checkpoint {last}: was written by another version of flywheel-fast; end the run with that one, "
                    "or train in another --out"
                )
            self.config = self._with_time_for_reviews(config, saved)
        self.memory = Memory.free(self.device, config.data.cache_gb, group.beside)
        self.loader = self._loader(self.train_set, config.optim.balanced_batches)
        test_loaders = {name: self._loader(part) for name, part in self.test_sets.items()}
        self.cycle = self._assemble()
        if config.cycle.init_labels and saved is None:
            self._begin_with(Path(config.cycle.init_labels))
        self.measures = measures.Measures(self.cycle, self.train_set, self.test_sets, test_loaders)
        self.history: list[dict] = []  # a row an epoch, as in metrics.csv
        self.warned: set[str] = set()
        if saved is not None:
            self._restore(saved)
        self._review()
        self.config_text = configs.dump(self.config)
        settings = configs.flat(configs.as_dict(self.config))
        self.sinks = sinks.open_all(() if group.rank else config.log, out, config.name, settings, len(self.history))

    def run(self) -> None:
        """Raises Stopped where `pauses` want it, after a checkpoint."""
        try:
            self._train()
        except torch.OutOfMemoryError as error:
            size = self.config.optim.batch_size
            raise Failure(
                f"the device ran out of memory at optim.batch_size={size}: start anew with "
                f"optim.batch_size={max(size // 2, 1)}, or with several processes (torchrun), which share a batch"
            ) from error
        self._close()

    def _train(self) -> None:
        config, cycle, loader = self.config, self.cycle, self.loader
        if not self.group.rank:
            self._open()
        images = [cycle.images(epoch, len(self.train_set), loader.drawn) for epoch in range(config.optim.epochs)]
        done, epochs = len(self.history), config.optim.epochs
        under_way = cycle.images(done, 0, cycle.batch * config.optim.batch_size)
        with self.screen.progress(sum(images), sum(images[:done]) + under_way) as advance:
            cycle.on_batch = lambda images, together: (advance(images * self.group.world), self._pause(together))
            for epoch in range(done, epochs):
                cycle.run(loader, epoch)
                look = epoch + 1 == epochs or (epoch + 1) % config.eval_every == 0
                self.history.append(self.measures.of(epoch, look))
                self._say_skipped()
                self._refuse_broken(self.history[-1])
                self._save_epoch()
                for sink in self.sinks:
                    sink.write(epoch + 1, self.history[-1])
                self._say_epoch()

    # -- start ---------------------------------------------------------------------------------------------------------

    def _readable(self, manifest: Manifest, split: str) -> Manifest:
        """Without the files at which the training would stop; these go to `bad_files`."""
        if self.features:  # which had them left out
            return manifest
        threads = self.config.data.threads
        manifest, bad = self.group.first(lambda: scan.without_broken(manifest, split, self.device, threads))
        self.bad_files += bad
        return manifest

    def _loader(self, manifest: Manifest, balanced_batches: int | None = None) -> Loader | FeatureLoader:
        config, data = self.config, self.config.data
        if self.features:
            place = self.device, self.group.rank, self.group.world
            return FeatureLoader(
                self.features, manifest, config.optim.batch_size, config.seed, *place, balanced_batches
            )
        return Loader(
            manifest,
            config.views,
            config.optim.batch_size,
            config.seed,
            self.device,
            data.threads,
            self.memory,
            self.group.rank,
            self.group.world,
            balanced_batches,
        )

    def _assemble(self) -> Cycle:
        config, num_classes = self.config, len(self.train_set.classes)
        steps = len(self.loader) * config.cycle.steps

        def learner(network: models.NetworkConfig, seed: int, projection: int = 0) -> Learner:
            if self.features:
                built = heads.build(network, num_classes, seed, self.loader, config.model.folds, config.seed)
            else:
                built = models.build(network, num_classes, config.views.image_size, seed, projection)
            return Learner(built, config.optim, steps, self.device, self.group)

        main, aux = learner(config.model.main, 2 * config.seed), None
        if config.cycle.kind == "flywheel":
            projection = 128 if config.cycle.contrastive > 0 else 0
            aux = learner(config.model.aux or config.model.main, 2 * config.seed + 1, projection)
        labels = torch.as_tensor(self.train_set.labels, device=self.device)
        return Cycle(config.cycle, main, aux, EMState.start(labels, num_classes, config.cycle.gamma), self.group)

    def _begin_with(self, run: Path) -> None:
        found, rows = self.group.first(lambda: audit.matched(run, self.train_set))
        of_sample = (found.clean_prob[rows], found.suggested[rows], found.suggested_prob[rows])
        transition = np.nan_to_num(found.corruption)  # of a class that no sample seems to have nothing is known
        self.cycle.state.begin_with(*(torch.as_tensor(of, device=self.device) for of in (*of_sample, transition)))

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
        if saved["features"] != (self.features and self.features.sha256):
            raise BadInput(f"checkpoint {path}: was trained on other features; train in another --out")
        self.cycle.load_state_dict(saved["cycle"])
        torch.set_rng_state(saved["generator"])
        if torch.cuda.device_count() == len(saved["cuda_generators"]):
            torch.cuda.set_rng_state_all(saved["cuda_generators"])
        self.history = saved["history"]

    def _open(self) -> None:
        train_set, config = self.train_set, self.config
        checkpoint.write_atomic(self.out / "config.yaml", self.config_text.encode())
        checkpoint.write_atomic(self.out / "env.json", json.dumps(env.describe(), indent=2).encode())
        test = " and ".join(f"{len(part):,}" for part in self.test_sets.values()) or "none"
        about = f"{len(train_set.labels):,} images of {len(train_set.classes)} classes to train on, {test} to test on"
        where = f"{self.device.type}, {'bf16' if self.cycle.main.bf16 else 'fp32'}, {torch.get_num_threads()} threads"
        where += f" in each of {self.group.world} processes" if self.group.world > 1 else ""
        self.screen.say(f"{about}; {where}")
        kept = (f"{name} {loader.kept}" for name, loader in [("train", self.loader), *self.measures.loaders.items()])
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
            pinned, dropped = self.measures.reviewed()
            self.screen.say(f"{config.data.reviews}: {pinned:,} labels are pinned, {dropped:,} images dropped")
        if why_not := ops.why_not_native(self.device):
            self.screen.say(f"native ops {why_not}. The E-step runs on the PyTorch reference")
        if config.cycle.init_labels and not self.history:
            gamma = self.cycle.state.gamma.item()
            self.screen.say(f"the labels begin as {config.cycle.init_labels} found them: {gamma:.1%} of them right")
        if self.history or self.cycle.batch:
            self.screen.say(f"going on after {self._place()}")
            measures.write(self.history, self.out)  # may have had a row more than the checkpoint, or less

    # -- each batch ----------------------------------------------------------------------------------------------------

    def _pause(self, together: bool) -> None:
        if not together:
            return
        if self.cycle.batch % PATIENCE == 0:
            self._refuse_skipping()
        wish = self.group.most(2 * self.pauses.stop() + self.pauses.due(self.cycle.main.steps))
        if wish:
            self._save()
        if wish >= 2:
            raise Stopped(f"stopped after {self._place()}, which is saved; `--resume {self.out}` goes on from there")

    def _place(self) -> str:
        place = f"epoch {len(self.history)} of {self.config.optim.epochs}"
        return place + (f" and {self.cycle.batch} of {len(self.loader)} batches" if self.cycle.batch else "")

    def _save(self) -> None:
        """All that the run has come to: with the config and the data, what is needed to go on."""
        state = {
            "format": FORMAT,
            "config": configs.as_dict(self.config),
            "labels": self.train_set.digest,
            "features": self.features and self.features.sha256,
            "reviews": self._reviews_digest(),
            "cycle": self.cycle.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all(),
            "history": self.history,
        }
        if not self.group.rank:
            checkpoint.save(self.out / run_folder.CHECKPOINT, state)
        self.pauses.saved(self.cycle.main.steps)

    def _refuse_skipping(self) -> None:
        for name, learner in self.cycle.learners().items():
            if learner.skipped_last >= PATIENCE:
                self._save()
                raise Failure(
                    f"the {name} network's loss was not finite in {PATIENCE} steps one after another, up to "
                    f"{self._place()}; the weights before them are kept in {self.out}: start anew with a lower "
                    f"optim.lr (it is {self.config.optim.lr})"
                )

    # -- each epoch ----------------------------------------------------------------------------------------------------

    def _say_skipped(self) -> None:
        for name, learner in self.cycle.learners().items():
            if skipped := learner.skipped():
                self.screen.warn(
                    f"epoch {self.history[-1]['cycle']}: {skipped} steps of the {name} network were left out, because "
                    "their loss was not finite; a lower optim.lr helps, or optim.precision=fp32"
                )

    def _refuse_broken(self, row: dict) -> None:
        broken = [name for name in row if not np.isfinite(row[name])]
        if broken:
            kept = f"the state after epoch {row['cycle'] - 1} is kept in {self.out}"
            raise Failure(
                f"{broken[0]} became {row[broken[0]]} in epoch {row['cycle']}; "
                f"{kept if row['cycle'] > 1 else 'nothing was saved yet'}: start anew with a lower optim.lr "
                f"(it is {self.config.optim.lr})"
            )

    def _save_epoch(self) -> None:
        start = time.perf_counter()
        row = self.history[-1]
        row |= {f"sec_{phase}": round(self.cycle.clock.seconds[phase], 4) for phase in measures.PHASES[:-1]}
        row["waiting"] = round(measures.waiting([row]), 4)
        self._save()
        row["sec_save"] = round(time.perf_counter() - start, 4)
        if not self.group.rank:
            measures.write(self.history, self.out)

    def _say_epoch(self) -> None:
        row, epochs = self.history[-1], self.config.optim.epochs
        parts = [f"epoch {row['cycle']:>3}/{epochs}"]
        shown = ("test_acc_main", "test_acc_aux", "gamma", "true_clean", "selection_auroc", "refurbish_acc")
        parts += [f"{name} {row[name]:.3f}" for name in shown if name in row]
        self.screen.say("  ".join(parts) + f"  {measures.seconds(row):.1f} s")
        ailments = self._ailments()
        new = [name for name in ailments if name not in self.warned]
        mergers = [name for name in new if name.startswith("merged ")]
        for name in new:
            if name not in mergers[MOST_MERGERS:]:
                self.screen.warn(ailments[name])
        if len(mergers) > MOST_MERGERS:
            self.screen.warn(
                f"{len(mergers) - MOST_MERGERS} more classes have all but vanished from the refurbished labels"
            )
        self.warned |= ailments.keys()

    def _ailments(self) -> dict[str, str]:
        """Of the last cycle, after a resumption too; none before the first."""
        return self.cycle.state.ailments(self.train_set.classes) if "agreement" in self.history[-1] else {}

    # -- end -----------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Network, labels, plots, and the table of what a user wants to know."""
        if self.cycle.aux:
            self.cycle.recall(self.loader)
        if self.group.rank:
            return
        network, text = self.cycle.inference().ema.module, self.config_text
        if self.features:
            network, text = self._with_backbone(network)
        meta = {"flywheel_fast": json.dumps({"classes": self.train_set.classes, "config": text})}
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        checkpoint.write_atomic(self.out / "weights" / "model.safetensors", to_safetensors(weights, meta))
        labels = self.measures.labels() if self.cycle.aux else None
        with self.screen.console.status("writing labels and plots"):
            if labels:
                audit.write_labels(labels, self.out / "labels")
            if labels and self.features:
                self._look_for_oddities(labels)
            plots.write_plots(labels, self.out / "metrics.csv", self.out / "plots")
        record, ailments = self._record(), list(self._ailments().values())
        checkpoint.write_atomic(self.out / "result.json", json.dumps(record, indent=2).encode())
        about = card.text(self.config, self.train_set.classes, record, labels, ailments)
        checkpoint.write_atomic(self.out / "README.md", about.encode())
        for sink in self.sinks:
            sink.close()
        self.screen.table("\nResult", self._result(labels))

    def _look_for_oddities(self, labels: audit.Labels) -> None:
        seen = self.features.array[self.loader.rows, 0]  # [N, D]
        second = oddities.second_class(self.cycle.state, self.config.cycle.posterior)
        found, why_not = oddities.find(seen, labels, second)
        oddities.write(found, self.out / "labels")
        if why_not:
            self.screen.say(why_not)

    def _with_backbone(self, trained: heads.Heads) -> tuple[nn.Module, str]:
        """The head that was trained, on the network that made its features, and that network's config: it takes images.
        The head alone where the network cannot be had."""
        about, hidden = self.features.about, trained.hidden
        if not about:  # features from elsewhere
            return trained.last(), self.config_text
        config = configs.parse(Config, about["config"], f"{self.features.path}")
        try:
            network = models.build(config.model.main, len(self.train_set.classes), config.views.image_size, seed=0)
        except BadInput as error:
            self.screen.warn(f"weights/model.safetensors holds the head only, without the network below it: {error}")
            return trained.last(), self.config_text
        network.head = trained.last()
        main = replace(config.model.main, hidden=hidden)
        model, cycle = replace(config.model, main=main, aux=None), replace(config.cycle, kind="cross_entropy")
        return network, configs.dump(replace(config, model=model, cycle=cycle))

    def _record(self) -> dict:
        """For result.json: what tables of runs are made of."""
        names = self.train_set.classes
        return {
            **measures.summary(self.history),
            "images": len(self.train_set.labels),
            "bad_files": len(self.bad_files),
            "epochs": len(self.history),
            "seconds": round(sum(measures.seconds(row) for row in self.history), 1),
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
        if (waiting := measures.waiting(self.history)) > NOTABLE_WAITING and not self.features:
            decode_less = ", or a larger data.cache_gb," if self.loader.images is None else ""
            cure = f"more data.threads{decode_less} may help"
            rows.append(("waiting", f"{waiting:.0%} of the time passed waiting for images: {cure}"))
        seconds = sum(measures.seconds(row) for row in self.history)
        rows.append(("network", f"{self.out / 'weights' / 'model.safetensors'} ({used})"))
        rows.append(("time", f"{seconds:.0f} s for {len(self.history)} epochs of {n:,} images"))
        return rows
