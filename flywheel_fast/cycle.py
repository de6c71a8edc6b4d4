"""The cycle of the method: two interlinked EM cycles on one objective, the four steps top to bottom.

Kim et al., "Learning with Noisy Labels: Interconnection of Two Expectation-Maximizations", arXiv 2401.04390, Figure 2.
It owns no files and no readers: a loader is anything with `epoch(number, views, start)`, `len()` batches of which the
first `start` are left out, and `sweep()`; both yield pairs (index [B], views: a tuple of images [B, 3, H, W], or of
features [B, D]).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flywheel_fast.distributed import ALONE, Group
from flywheel_fast.em import EMState, Expectation
from flywheel_fast.learner import Learner
from flywheel_fast.losses import ntxent, told_loss

BY_HEART = 2.0  # log-odds; with more of a leak (`em.leak_of`) labels are known by heart
MEMORY = 0.2  # and where planted labels have drawn a network farther (`em.memorised`), they soon will be


@dataclass(frozen=True)
class CycleConfig:
    kind: Literal["flywheel", "cross_entropy"] = "flywheel"
    """flywheel: the two EM cycles; cross_entropy: the main network alone on the observed labels, the baseline."""
    warmup: int = 6
    """Epochs in which both networks learn the observed labels, or what init_labels says, before the first cycle."""
    init_labels: str | None = None
    """Folder of a run on the same data: the warm-up learns the posterior that it found in place of the observed labels,
    and the first E-steps start from its clean_prob, gamma and T_c."""
    posterior: Literal["mixture", "joint"] = "mixture"
    """Target of the auxiliary network: w onehot + (1-w) r, or f times (w onehot + (1-w) T_c), normalised."""
    target: Literal["auto", "told", "argmax_f", "soft_q"] = "auto"
    """What the networks learn in the cycles. told: both learn what the observed labels tell, the label as far as it is
    clean and what it is the corruption of. argmax_f: the auxiliary one the posterior, the main one the teacher's class,
    which is blind to the observed label (the paper's). soft_q: both the posterior. auto: told, argmax_f once labels are
    known by heart; soft_q where predictions are out of fold (model.folds)."""
    teacher: Literal["both", "aux", "main_alone", "aux_alone"] = "both"
    """Whose word the posterior follows: the auxiliary network's (the paper's), or the mean of both networks'. For
    ablations: main_alone, aux_alone, one network says both which labels are right and what the others should be."""
    noise_model: Literal["em", "anchors"] = "anchors"
    """gamma and T_c: em, one gamma, both from the posterior of all samples (the paper's); anchors, a gamma for each
    class, both from the labels of the samples of which the teacher is surest. Estimated anew in every cycle."""
    aligned: bool = True
    """Keep the classes at their shares (`EMState.realign`): in the resampled labels and, except under argmax_f, in all
    that the networks say in the E-steps."""
    gamma: float = 0.5
    """Share of clean labels that the first cycle assumes."""
    confidence: float = 0.1
    """Weight lambda of the main network's confidence regulariser."""
    delta: float = 1e-4
    """Floor of the probabilities in the confidence regulariser."""
    smoothing: float = 1.0
    """Pseudo-count alpha of the corruption matrix, a row."""
    contrastive: float = 0.0
    """Weight of the auxiliary network's NT-Xent term between two strong views; 0 leaves them out."""
    temperature: float = 0.5
    """Temperature of the NT-Xent term."""

    @property
    def steps(self) -> int:
        """Steps of each network on a batch: one a view, of which cross-entropy learns the weak one alone."""
        return 1 if self.kind == "cross_entropy" else 2

    def __post_init__(self):
        if not 0 < self.gamma < 1:
            raise ValueError(f"cycle.gamma must be in (0, 1), not {self.gamma}")
        if self.warmup < 1:
            raise ValueError(f"cycle.warmup must be at least 1 epoch, not {self.warmup}")
        if self.init_labels is not None and self.kind == "cross_entropy":
            raise ValueError("cycle.init_labels is for cycle.kind=flywheel; cross_entropy learns the observed labels")
        if min(self.confidence, self.smoothing, self.contrastive) < 0 or min(self.delta, self.temperature) <= 0:
            raise ValueError(
                "cycle.confidence, .smoothing and .contrastive must not be negative, .delta and .temperature positive"
            )


class Clock:
    """Seconds by phase: data (waiting for images), infer, train (forward, backward, optimiser), em, eval, save."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def waiting(self, batches: Iterable) -> Iterator:
        iterator = iter(batches)
        while True:
            with self("data"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch


class Cycle:
    """Main network g, auxiliary network f, what is known of each sample, and how far the epoch under way has come.

    Between two batches, when `on_batch` is called, `state_dict` holds all that is needed to go on from there. With
    several processes each has a part of every batch, and looks at a share of the samples.
    """

    def __init__(self, config: CycleConfig, main: Learner, aux: Learner | None, state: EMState, group: Group = ALONE):
        self.config, self.main, self.aux, self.state, self.group = config, main, aux, state, group
        self.clock = Clock()
        # told how many images a batch had, and whether all processes have now come equally far; may raise
        self.on_batch: Callable[[int, bool], None] = lambda images, together: None
        self.out_of_fold = getattr(main.network, "folds", None) is not None
        self.judge = "aux" if config.teacher == "aux_alone" else "main"  # by whom clean_prob is found
        if config.kind == "flywheel" and config.target == "auto" and not self.out_of_fold:
            state.hold_out()
        self.batch = 0  # training batches of the epoch under way that are done; all: the E-steps, from their start
        self.losses: dict[str, list[Tensor]] = {}  # name -> [] of each step of the last epoch

    def run(self, loader, epoch: int) -> None:
        """One epoch: plain cross-entropy, warm-up, or the M-steps; once the warm-up has ended, the E-steps follow.
        An epoch that was cut off goes on after `batch`."""
        if not self.batch:
            self.losses = {}
            self.clock.seconds.clear()
        if self.config.kind == "cross_entropy":
            self.main_alone(loader, epoch)
        elif self.blind(epoch):
            self.warm_up(loader, epoch)
        else:
            if epoch < self.config.warmup:
                self.state.infer_teacher()
            elif self.batch < len(loader):
                self.recall(loader)
            self.msteps(loader, epoch, self.target())
        if self.expecting(epoch):
            if self.finding_noise(epoch):
                self.look(loader)
                with self.clock("em"):
                    self.state.find_noise(self.config.posterior)
            self.esteps(loader, warm=self.blind(epoch))
            self.state.by_heart |= (self.state.leak > BY_HEART) | (self.state.memorised > MEMORY)
        self.batch = 0

    def blind(self, epoch: int) -> bool:
        """Whether nothing is known yet but the observed labels."""
        return epoch < self.config.warmup and self.config.init_labels is None

    def expecting(self, epoch: int) -> bool:
        """Whether this epoch ends with the E-steps."""
        return self.config.kind == "flywheel" and epoch + 1 >= self.config.warmup

    def finding_noise(self, epoch: int) -> bool:
        """Whether the first E-steps need a look of their own before them, to read the noise from."""
        return epoch + 1 == self.config.warmup and self.config.noise_model == "anchors"

    def images(self, epoch: int, swept: int, drawn: int) -> int:
        """Images that `run` looks at in this epoch, for the progress bar; `swept` samples are in a sweep of the loader,
        `drawn` in an epoch."""
        if self.config.kind == "cross_entropy":
            return drawn
        looks = self.expecting(epoch) + self.finding_noise(epoch)
        views = 2 + (self.config.contrastive > 0 and not self.blind(epoch))
        return looks * swept + views * drawn

    def main_alone(self, loader, epoch: int) -> None:
        for index, (weak,) in self._training(loader, epoch, ("weak",)):
            with self.clock("train"):
                self._learn("main", index, self.main.forward(weak, index), "labels")

    def warm_up(self, loader, epoch: int) -> None:
        """Both networks learn the observed labels; the judge, planted ones for those that are held out from it."""
        for index, augmented in self._training(loader, epoch, ("weak", "strong")):
            with self.clock("train"):
                for view in augmented:
                    for name, learner in self.learners().items():
                        self._learn(name, index, learner.forward(view, index), "labels")

    def msteps(self, loader, epoch: int, target: str) -> None:
        """Steps 3 and 4: f learns, and g under its regulariser; each takes a step on the weak view and one on the
        strong view, f on both strong ones at once where there are two."""
        config, contrastive = self.config, self.config.contrastive > 0
        kappa = self.state.kappa() if target == "told" else None  # the same in all steps of a cycle
        softly = "soft_q" if target == "argmax_f" else target
        views = ("weak", "strong") + ("strong2",) * contrastive
        for index, (weak, strong, *strong2) in self._training(loader, epoch, views):
            with self.clock("train"):
                self._learn("aux", index, self.aux.forward(weak, index), softly, kappa)
                self._learn("main", index, self.main.forward(weak, index), target, kappa, config.confidence)
                output, alike = self.aux.forward(torch.cat([strong, *strong2]), index, project=contrastive), 0.0
                if contrastive:
                    output, embeddings = output
                    alike = config.contrastive * ntxent(*embeddings.chunk(2), config.temperature)
                self._learn("aux", index, output, softly, kappa, more=alike)
                self._learn("main", index, self.main.forward(strong, index), target, kappa, config.confidence)

    def target(self) -> str:
        """What the main network learns in this cycle; the auxiliary one learns the posterior where it is argmax_f."""
        if self.config.target != "auto":
            return self.config.target
        return "soft_q" if self.out_of_fold else "argmax_f" if self.state.by_heart else "told"

    def esteps(self, loader, warm: bool = False) -> None:
        """Steps 1 and 2: w_i by Bayes' rule from g, gamma and eps_i; q_i from w_i, the teacher and T_c; the refurbished
        label of every sample, and the next eps_i, T_c and gamma. `warm`: right after the warm-up."""
        expectation = Expectation(self.state, self.config.posterior, warm)
        self.look(loader, expectation.add)
        expectation.unite(self.group)
        expectation.finish(self.config.aligned, self.config.smoothing if self.config.noise_model == "em" else None)

    def recall(self, loader) -> None:
        """The teacher's logits, which a checkpoint does not hold: as the last look found them."""
        if self.state.teacher is None:
            self._sweep(loader)

    def look(self, loader, use: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None) -> None:
        """Both networks on the clean view of every sample: the teacher's logits are kept; `use` is given the samples
        [B], and the logits [B, C] of the network by which w is found, of the other one, and of the teacher."""
        self.main.look()
        self.aux.look()
        self.state.speak(self.target() != "argmax_f")
        self._sweep(loader, use)

    def _sweep(self, loader, use: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None) -> None:
        own = torch.zeros_like(self.state.agree)  # [N]
        for index, (clean,) in self.clock.waiting(loader.sweep()):
            with self.clock("infer"):
                main = self.main.predict(clean, self.main.looked, index)
                aux = self.aux.predict(clean, self.aux.looked, index)
            with self.clock("em"):
                self.state.agree[index] = main.argmax(dim=1) == aux.argmax(dim=1)
                judge, other = (main, aux) if self.judge == "main" else (aux, main)
                says = main if self.config.teacher == "main_alone" else aux
                teacher = self.state.teach(index, main, says, self.config.teacher == "both")
                own[index] = True
                if use:
                    use(index, judge, other, teacher)
            self.on_batch(len(index), self.group.world == 1)
        self.group.union(own, [self.state.teacher, self.state.agree])

    def learners(self) -> dict[str, Learner]:
        return {"main": self.main} | ({"aux": self.aux} if self.aux else {})

    def inference(self) -> Learner:
        """The one network that is used at test time: the auxiliary one, where there is one."""
        return self.aux or self.main

    def state_dict(self) -> dict:
        learners = {name: learner.state_dict() for name, learner in self.learners().items()}
        under_way = {"batch": self.batch, "losses": self.mean_losses(), "seconds": dict(self.clock.seconds)}
        return learners | {"state": self.state.state_dict()} | under_way

    def load_state_dict(self, saved: dict) -> None:
        for name, learner in self.learners().items():
            learner.load_state_dict(saved[name])
        self.state.load_state_dict(saved["state"])
        self.batch = saved["batch"]
        self.losses = {name: list(steps.to(self.state.labels.device)) for name, steps in saved["losses"].items()}
        self.clock.seconds.update(saved["seconds"])

    def mean_losses(self) -> dict[str, Tensor]:
        """name -> [] of each step of the last epoch [S], over the whole batches."""
        losses = {name: torch.stack(steps) for name, steps in self.losses.items()}
        self.group.mean(list(losses.values()))
        return losses

    def _training(self, loader, epoch: int, views: tuple[str, ...]) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """The epoch's batches that are not done yet."""
        for index, images in self.clock.waiting(loader.epoch(2 * epoch, views, self.batch)):
            yield index, images
            self.batch += 1
            self.on_batch(len(index) * len(images), True)

    def _learn(
        self,
        name: str,
        index: Tensor,
        logits: Tensor,
        target: str,
        kappa: Tensor | None = None,
        confidence: float = 0.0,
        more: Tensor | float = 0.0,
    ) -> None:
        """A step of a network from its logits [V * B, C], V views of the samples `index` [B]; `more` [] loss."""
        config, state = self.config, self.state
        count: Tensor | int = len(index)  # that the loss is a mean of
        everything = name != self.judge  # of the labels that are held out, too
        if target == "labels":
            loss = F.cross_entropy(logits, state.warm_labels(index, everything).repeat(len(logits) // len(index)))
        elif target == "told":
            told = state.told(index, kappa, everything)
            loss, count = told_loss(logits, told, confidence, config.delta), told.sum()
        else:
            loss = state.loss(index, logits, target, config.posterior, confidence, config.delta)
        loss = (loss + more) * self.group.share(count)
        learner = self.learners()[name]
        learner.step(loss)
        self.losses.setdefault(name, []).append(loss.detach())
