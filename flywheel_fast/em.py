"""What the two EM cycles know: of each sample, by global index, and of the noise: gamma and T_c."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from flywheel_fast import ops
from flywheel_fast.distributed import Group

SUREST = 0.3  # of a class's samples, that its noise is read from
STRENGTHS = [2.0**k for k in range(-1, 13)]  # pseudo-counts that `shrunk` tries
RATES = (1e-3, 1 - 1e-6)  # a gamma beyond them would never come back
PIECE = 1 << 16  # samples at a time, where all are at hand
HELD_OUT = 0.1  # of the labels: not learned by the main network, to tell what it knows of the others by heart
PLANTED = 8  # wrong labels that it learns in their place; fewer do not tell of its memory
UNMIXING = 5  # steps from the shares of the observed labels to those of the classes; more magnify what is noise
MIN_CLASS_MASS = 1e-6  # of the mean prediction; keeps the alignment weight of a dying class finite


def kept_posterior(
    labels: Tensor, clean_prob: Tensor, suggested_label: Tensor, suggested_prob: Tensor, num_classes: int
) -> Tensor:
    """A posterior [N, C] as far as a run keeps it, each [N]: clean_prob for the observed label, suggested_prob for the
    suggested one, and what is left over the others evenly."""
    other = suggested_label != labels
    suggested_prob = torch.where(other, torch.minimum(suggested_prob, 1 - clean_prob), 0)
    rest = (1 - clean_prob - suggested_prob) / (num_classes - 1 - other.long()).clamp_min(1)
    found = rest[:, None].repeat(1, num_classes)
    found.scatter_(1, suggested_label[:, None], suggested_prob[:, None])
    found.scatter_(1, labels[:, None], clean_prob[:, None])
    return found / found.sum(dim=1, keepdim=True)  # two classes: nothing is left for the others


def shrunk(counts: Tensor, common: Tensor) -> Tensor:
    """Shares [R, K] from counts [R, K] float64, each row drawn towards its row of `common` [R, K], shares too, by as
    many pseudo-counts as make the counts likeliest: many where rows are alike, few where each has its own way.

    Empirical Bayes: rows are drawn from a Dirichlet distribution around `common`, whose strength maximises the
    Dirichlet-multinomial likelihood (Minka 2000, "Estimating a Dirichlet distribution").
    """
    there = counts > 0
    found, prior, total = counts[there], common[there], counts.sum(dim=1)

    def likelihood(strength: float) -> float:
        cells = torch.lgamma(found + strength * prior) - torch.lgamma(strength * prior)
        rows = torch.lgamma(total + strength) - math.lgamma(strength)
        return (cells.sum() - rows.sum()).item()

    strength = max(STRENGTHS, key=likelihood)
    return (counts + strength * common) / (total + strength)[:, None]


def leak_of(log_odds: Tensor, learned: Tensor) -> float:
    """What must be taken from the log-odds [N] of the labels that were learned, `learned` [N] bool, from all the same,
    so that they are as probable on average as those that were not; at least 0, also where there are none of either."""
    seen, unseen = log_odds[learned], log_odds[~learned]
    if not len(seen) or not len(unseen):
        return 0.0
    wanted, low, high = unseen.sigmoid().mean(dtype=torch.float64), 0.0, 16.0
    for _ in range(24):
        middle = (low + high) / 2
        too_likely = (seen - middle).sigmoid().mean(dtype=torch.float64) > wanted
        low, high = (middle, high) if too_likely else (low, middle)
    return low


def memorised(drawn: Tensor, way: Tensor) -> float:
    """How far planted labels have drawn the network that learned them, as a share of the way: of each, drawn [K] and
    way [K] by `toward`. 0 to 1; 0 also where there are fewer than PLANTED."""
    if len(drawn) < PLANTED or way.mean() <= 0:
        return 0.0
    return (drawn.mean() / way.mean()).clamp(0, 1).item()


def toward(planted: Tensor, labels: Tensor, by: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """How far a network that learned a planted class has come [K], and the whole way [K]: in log-probability,
    from where a network that learned the observed label has that class to the class that the first is surest of.

    planted [K], labels [K], which differ; by, other [K, C]: logits of the first network and of the second. Both are
    taken relative to what they say of the remaining classes, on average: one may be surer than the other.
    """
    rest = torch.ones_like(by, dtype=torch.float32)
    rest.scatter_(1, torch.stack([planted, labels], dim=1), 0.0)

    def apart(logits: Tensor) -> tuple[Tensor, Tensor]:
        likely = logits.float().log_softmax(dim=1)
        likely = likely - ((likely * rest).sum(dim=1) / rest.sum(dim=1).clamp_min(1))[:, None]
        return likely.gather(1, planted[:, None])[:, 0], likely.max(dim=1).values

    (here, top), (there, _) = apart(by), apart(other)
    return here - there, top - there


@dataclass(frozen=True)
class Reviews:
    """What people decided, as the E-steps use it."""

    pinned: Tensor  # [K] int64        samples whose label is decided
    used: Tensor  # [N] bool           not dropped
    free: Tensor  # [N] bool           neither dropped nor pinned
    corrected: Tensor  # [C, C] float64  pinned samples with another label than the given one: row decided, column given


@dataclass
class EMState:
    """N samples, C classes; 39 bytes a sample, and the teacher's logits."""

    labels: Tensor  # [N] int64           observed, or as reviewed; never overwritten by an estimate
    clean_prob: Tensor  # [N] float32     w: probability that the observed label is right
    eps: Tensor  # [N] float32            likelihood of the observed label under corruption
    resampled_label: Tensor  # [N] int64  argmax of the teacher, for every sample
    suggested_label: Tensor  # [N] int64  argmax of the posterior
    suggested_prob: Tensor  # [N] float32
    agree: Tensor  # [N] bool             do both networks call it the same?
    suspicion: Tensor  # [N] uint8        was the label suspected? a bit a cycle, of the last eight
    gamma: Tensor  # [] float64           mean of w: share of clean labels
    clean_rate: Tensor  # [C] float64     gamma_y, prior probability that a label of true class y is clean
    corruption: Tensor  # [C, C] float32  T_c(y, j), diagonal zero, times (1 - gamma_y) / (1 - gamma_j)
    align: Tensor  # [C] float32          weights of the classes by `realign`; ones before the first look
    spoken: Tensor  # [C] float32         weights of the classes in what the networks said at the last look, or ones
    posterior_sum: Tensor  # [C, C] float64   sum of q(y) by observed label j: T_full before it is normalised
    leak: Tensor  # [] float64            log-odds that labels have of having been learned, where some are held out
    memorised: Tensor  # [] float64       how far planted labels drew the main network in the warm-up, there too
    by_heart: Tensor  # [] bool           one of the two was great; the leak is not measured any more then
    # not kept in a checkpoint: these come with the data, and with the first look or from the rest
    reviews: Reviews | None = None
    learned: Tensor | None = None  # [N] bool  labels that the main network learns; None: all
    planted: Tensor | None = None  # [N] int64  classes drawn by lot, which it learns of the others in the warm-up
    teacher: Tensor | None = None  # [N, C] logits that the posterior follows from, in the networks' own type

    @classmethod
    def start(cls, labels: Tensor, num_classes: int, gamma: float) -> "EMState":
        """Nothing known yet: gamma as given, eps 1/C, corruption uniform off the diagonal."""
        n, device = len(labels), labels.device
        off_diagonal = 1 - torch.eye(num_classes, device=device)
        return cls(
            labels=labels,
            clean_prob=torch.full((n,), gamma, device=device),
            eps=torch.full((n,), 1 / num_classes, device=device),
            resampled_label=labels.clone(),
            suggested_label=labels.clone(),
            suggested_prob=torch.full((n,), gamma, device=device),
            agree=torch.ones(n, dtype=torch.bool, device=device),
            suspicion=torch.zeros(n, dtype=torch.uint8, device=device),
            gamma=torch.tensor(gamma, dtype=torch.float64, device=device),
            clean_rate=torch.full((num_classes,), gamma, dtype=torch.float64, device=device),
            corruption=off_diagonal.t() / max(num_classes - 1, 1),
            align=torch.ones(num_classes, device=device),
            spoken=torch.ones(num_classes, device=device),
            posterior_sum=torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device),
            leak=torch.zeros((), dtype=torch.float64, device=device),
            memorised=torch.zeros((), dtype=torch.float64, device=device),
            by_heart=torch.zeros((), dtype=torch.bool, device=device),
        )

    def hold_out(self) -> None:
        """Chooses labels that the network by which w is found does not learn, and classes that it learns in their place
        in the warm-up: a pure function of their number."""
        lot = np.random.default_rng(0)
        learned = lot.random(len(self.labels)) >= HELD_OUT
        planted = lot.integers(self.num_classes, size=len(self.labels))
        self.learned, self.planted = (torch.from_numpy(of).to(self.labels.device) for of in (learned, planted))

    def warm_labels(self, index: Tensor, everything: bool) -> Tensor:
        """What the warm-up learns of the samples `index` [B]: their labels, or without `everything` planted ones for
        those that are held out."""
        labels = self.labels[index]
        return labels if everything or self.learned is None else labels.where(self.learned[index], self.planted[index])

    @property
    def num_classes(self) -> int:
        return len(self.align)

    def review(self, given: Tensor, reviewed: Tensor | None) -> None:
        """Takes up what people decided: given [N] int64, the data set's labels; reviewed [N] int64, the decided class,
        -1 where there is none and -2 where the sample is dropped (the loader leaves it out). None: no reviews.

        A decided label is as if it had been observed, and clean for certain: its clean_prob is 1, with which both
        posteriors are one-hot. gamma and T_c stay those of the given labels.
        """
        self.labels, self.reviews = given, None
        if reviewed is None:
            return
        decided = reviewed >= 0
        self.labels = torch.where(decided, reviewed, given)
        wrong = decided & (reviewed != given)
        cells = torch.bincount((reviewed * self.num_classes + given)[wrong], minlength=self.num_classes**2)
        used = reviewed != -2
        corrected = cells.view(self.num_classes, self.num_classes).double()
        self.reviews = Reviews(decided.nonzero()[:, 0], used, used & ~decided, corrected)
        self.pin()

    def pin(self) -> None:
        """After each E-step: what it says of decided labels gives way to the decision."""
        if self.reviews:
            pinned = self.reviews.pinned
            self.clean_prob[pinned] = 1
            self.eps[pinned] = 0  # so that the next E-step finds them clean
            self.resampled_label[pinned] = self.suggested_label[pinned] = self.labels[pinned]
            self.suggested_prob[pinned] = 1

    def begin_with(
        self, clean_prob: Tensor, suggested_label: Tensor, suggested_prob: Tensor, transition: Tensor
    ) -> None:
        """Starts from what an earlier run has found: clean_prob, suggested_label and suggested_prob [N], P(observed j |
        true y) [C, C] float64. A sample's resampled label, which a run does not keep, is taken to be the suggested one.
        """
        self.clean_prob, self.suggested_label, self.suggested_prob = clean_prob, suggested_label, suggested_prob
        self.resampled_label = suggested_label.clone()
        self.gamma = clean_prob.mean(dtype=torch.float64)
        self.by_heart = torch.ones_like(self.by_heart)  # the posterior is there to learn, as it is then
        self.set_noise(transition)
        for index in self._pieces():
            self.eps[index] = (self._kept(index) * self.corruption.t()[self.labels[index]]).sum(dim=1)

    def infer_teacher(self) -> None:
        """The logits from which the posterior of an earlier run would follow, as far as it is kept. Of either kind q(y)
        is proportional to f(y) (w 1[y = label] + (1 - w) T_c(y, label)) but for the label itself, where w is the rest.
        """
        self.teacher = torch.zeros(len(self.labels), self.num_classes, device=self.labels.device)
        for index in self._pieces():
            labels, clean_prob = self.labels[index], self.clean_prob[index, None].clamp(1e-6, 1 - 1e-6)  # [B], [B, 1]
            shown = (1 - clean_prob) * self.corruption.t()[labels].clamp_min(1e-9)  # [B, C]
            shown.scatter_(1, labels[:, None], clean_prob)
            self.teacher[index] = self._kept(index).clamp_min(1e-6).log() - shown.log()

    def _kept(self, index: Tensor) -> Tensor:  # [B] -> [B, C]
        found = (of[index] for of in (self.labels, self.clean_prob, self.suggested_label, self.suggested_prob))
        return kept_posterior(*found, self.num_classes)

    def _pieces(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self.labels), device=self.labels.device).split(PIECE)

    def teach(self, index: Tensor, main: Tensor, aux: Tensor, both: bool) -> Tensor:
        """Keeps the teacher's logits [B, C] of the samples `index` [B], from those of the networks, and returns them.

        The teacher is the auxiliary network, or the geometric mean of both networks' probabilities.
        """
        logits = self.say((main + aux) / 2 if both else aux)
        if self.teacher is None:
            self.teacher = logits.new_zeros(len(self.labels), self.num_classes)
        self.teacher[index] = logits
        return logits

    def speak(self, aligned: bool) -> None:
        """Before a look: whether all that the networks say is aligned, or the resampled labels alone."""
        self.teacher = None  # that of the last look, or of an earlier run, has served
        self.spoken = self.align.clone() if aligned else torch.ones_like(self.align)

    def say(self, logits: Tensor) -> Tensor:
        """What a network says, of its logits [B, C]: with the weights of the classes."""
        return logits + self.spoken.log().to(logits.dtype)

    def realign(self, said: Tensor) -> None:
        """Weights with which the classes have their shares in what the networks say of all samples; with the present
        ones their sums are `said` [C].

        Distribution alignment (Berthelot et al. 2020, "ReMixMatch", arXiv 1911.09785, section 3.1), to the shares of
        the true classes: those of the observed labels, unmixed by P(observed | true) in a few steps of EM (Richardson
        1972, Lucy 1974). These undo it where a class is called another one's name, and leave what labels hardly tell,
        the shares of two classes that are called each other's, as it was observed.
        """
        labels = self.labels[self.reviews.used] if self.reviews else self.labels
        observed = torch.bincount(labels, minlength=self.num_classes).double() / len(labels)
        seen = self.clean_rate.diag() + self.corruption * (1 - self.clean_rate)  # P(observed j | true y)
        shares = observed
        for _ in range(UNMIXING):
            shares = shares * (seen @ (observed / (shares @ seen).clamp_min(1e-12)))
        self.align = (self.spoken * shares / (said / len(labels)).clamp_min(MIN_CLASS_MASS)).float()

    def find_noise(self, kind: str) -> None:
        """gamma by class, T_c, and eps with them, before the first E-step."""
        self.set_noise(self.transition())
        for index in self._pieces():
            logits, labels, clean_prob = self.teacher[index], self.labels[index], self.clean_prob[index]
            self.eps[index] = ops.aux_estep(logits, labels, clean_prob, self.corruption, self.align, kind).eps

    def transition(self) -> Tensor:
        """P(observed j | true y) [C, C] float64: the shares of the observed labels among the surest of the samples that
        the teacher calls y, three tenths as many as are observed so (where it calls fewer so, others are added).

        Where a network is surest, its class is as good as the truth (the anchors of Patrini et al. 2017, "Making Deep
        Neural Networks Robust to Label Noise: a Loss Correction Approach"); that labels are counted there, as in the
        confident joint of Northcutt et al. 2021, "Confident Learning", spares the question how sure a network ought
        to be. Samples that it calls otherwise may have more of y than y's own do: easy ones of a class that is often
        labelled y. Of small classes the surest are few: the share of right labels is drawn towards that of all classes,
        the wrong ones towards an even spread, as far as classes are alike (`shrunk`). What people have decided is left
        out.
        """
        c, device = self.num_classes, self.labels.device
        free = self.reviews.free.nonzero()[:, 0] if self.reviews else torch.arange(len(self.labels), device=device)
        counts = (torch.bincount(self.labels[free], minlength=c) * SUREST).ceil().clamp_min(1)  # [C]
        surest = torch.zeros(c, 0, device=device)  # [C, most]
        labels = torch.zeros(c, 0, dtype=torch.int64, device=device)
        most = int(counts.max())
        for index in free.split(max(PIECE, most)):  # in shorter pieces the many that are kept would be sorted too often
            said = self.teacher[index].float().softmax(dim=1)
            said = said.where(said == said.max(dim=1, keepdim=True).values, said / c)  # called otherwise: come last
            surest = torch.cat([surest, said.t()], dim=1)
            surest, best = surest.topk(min(most, surest.shape[1]), dim=1)
            labels = torch.cat([labels, self.labels[index].expand(c, -1)], dim=1).gather(1, best)
        counted = torch.arange(labels.shape[1], device=device) < counts[:, None]
        pairs = (torch.arange(c, device=device)[:, None] * c + labels)[counted]
        seen = torch.bincount(pairs, minlength=c * c).view(c, c).double()
        even = (1 - torch.eye(c, dtype=torch.float64, device=device)) / (c - 1)
        right, wrong = seen.diagonal(), seen * (even > 0)
        rates = torch.stack([right, wrong.sum(dim=1)], dim=1)  # [C, 2]
        common = (rates.sum(dim=0) + 0.5) / (rates.sum() + 1)
        rates = shrunk(rates, common.expand(c, 2))
        return rates[:, 0].diag() + rates[:, 1:] * shrunk(wrong, even)

    def set_noise(self, transition: Tensor) -> None:
        """From P(observed j | true y) [C, C] float64, rows summing to 1: gamma_y is its diagonal, the rest T_c."""
        eye = torch.eye(self.num_classes, dtype=torch.float64, device=transition.device)
        self.clean_rate = transition.diagonal().clamp(*RATES)
        wrong = (transition + 1e-9) * (1 - eye)  # [C, C]
        wrong = wrong / wrong.sum(dim=1, keepdim=True).clamp_min(1e-300)
        self.corruption = (wrong * (1 - self.clean_rate)[:, None] / (1 - self.clean_rate)).t().contiguous().t().float()

    def kappa(self) -> Tensor:
        """The share of what there is to know that a wrong label of each kind tells of the true class [C]: 1 less the
        entropy of T_c's column for it over log(C - 1)."""
        origin = self.corruption / self.corruption.sum(dim=0).clamp_min(1e-30)
        return (1 - torch.special.entr(origin).sum(dim=0) / math.log(max(self.num_classes - 1, 2))).clamp_min(0)

    def told(self, index: Tensor, kappa: Tensor | None, everything: bool) -> Tensor:
        """What the labels of the samples `index` [B] tell of their classes [B, C]: w for the label itself and, where
        `kappa` is given, (1 - w) kappa r; r without it is the teacher's own word. `everything`: of the labels that are
        held out, too.
        """
        labels, clean_prob = self.labels[index], self.clean_prob[index, None]
        found = torch.zeros(len(index), self.num_classes, device=labels.device)
        if kappa is not None:
            r = ops.posterior(
                self.teacher[index], labels, torch.zeros_like(clean_prob[:, 0]), self.corruption, "mixture"
            )
            found = (1 - clean_prob) * kappa[labels, None] * r
        found = found.scatter_add(1, labels[:, None], clean_prob)
        return found if everything or self.learned is None else found * self.learned[index, None]

    def loss(
        self, index: Tensor, logits: Tensor, target: str, kind: str, confidence: float = 0.0, delta: float = 1e-4
    ) -> Tensor:
        """Loss [] of logits [V * B, C], V views of the samples `index` [B], against step 2's posterior (target soft_q),
        which follows from the teacher's logits and is never stored, or against the resampled label (argmax_f)."""
        if target == "argmax_f":
            return ops.posterior_loss(logits, None, self.resampled_label[index], None, None, kind, confidence, delta)
        teacher, labels, clean_prob = self.teacher[index], self.labels[index], self.clean_prob[index]
        return ops.posterior_loss(logits, teacher, labels, clean_prob, self.corruption, kind, confidence, delta)

    def entropy(self, kind: str) -> Tensor:
        """Of each posterior [N], as a share of log C."""
        found = torch.zeros_like(self.clean_prob)
        for index, q in self.posteriors(kind):
            found[index] = torch.special.entr(q).sum(dim=1) / math.log(self.num_classes)
        return found

    def posteriors(self, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples [B] and step 2's posterior [B, C] of each, piece by piece."""
        for index in self._pieces():
            labels, clean_prob = self.labels[index], self.clean_prob[index]
            yield index, ops.posterior(self.teacher[index], labels, clean_prob, self.corruption, kind)

    def merged_classes(self) -> list[tuple[int, int]]:
        """Pairs (gone, into): classes of which fewer than a tenth as many samples are resampled as were observed, and
        what most of those samples are called instead. A cycle that collapses merges classes (docs/method.md)."""
        c = self.num_classes
        calls = torch.bincount(self.labels * c + self.resampled_label, minlength=c * c).view(c, c).cpu()  # [C, C]
        gone = (calls.sum(dim=0) < 0.1 * calls.sum(dim=1)).nonzero()[:, 0].tolist()
        return [(label, int(calls[label].argmax())) for label in gone]

    @property
    def agreement(self) -> float:
        """Share of the samples that both networks call the same."""
        agree = self.agree[self.reviews.used] if self.reviews else self.agree
        return agree.double().mean().item()

    def ailments(self, names: Sequence[str]) -> dict[str, str]:
        """What a sound cycle does not do: what it is called, and a sentence with what to try. names [C] of classes."""
        found = {
            f"merged {names[gone]}": f"class {names[gone]!r} has all but vanished from the refurbished labels: its "
            f"samples are called {names[into]!r}. The cycle merges classes; cycle.aligned, optim.ema_decay and a "
            "longer cycle.warmup help"
            for gone, into in self.merged_classes()
        }
        if self.gamma > 0.995:
            found["gamma near 1"] = (
                "gamma is near 1: every label counts as right. If some are known to be wrong, the networks have "
                "learned them by heart: cycle.target=argmax_f, fewer epochs and stronger views help"
            )
        if self.gamma < 0.5 / self.num_classes:
            found["gamma near 0"] = (
                f"gamma is {self.gamma.item():.3f}: fewer labels count as right than by chance. A longer cycle.warmup, "
                "cycle.noise_model=anchors and another cycle.gamma to start from help"
            )
        clean = torch.bincount(self.labels[self.clean_prob > 0.5], minlength=self.num_classes)
        if empty := [names[label] for label in (clean == 0).nonzero()[:, 0].tolist()]:
            which = ", ".join(map(repr, empty[:3])) + f" and {len(empty) - 3} more" * (len(empty) > 3)
            found["none clean"] = f"no label {which} counts as right: look at its images; a longer cycle.warmup helps"
        if self.agreement < 1 / self.num_classes:
            found["disagreement"] = (
                f"the two networks agree on {self.agreement:.1%} of the images, less than by chance: one of them has "
                "not learned; a lower optim.lr and a longer cycle.warmup help"
            )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        kept = [field.name for field in fields(self) if field.name not in ("reviews", "learned", "planted", "teacher")]
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name].to(self.labels.device))


class Expectation:
    """Steps 1 and 2 for all samples, in one look through both networks: w, resampled labels, eps; gamma and T_c.

    The state stays as it is until `finish`: a look that is cut off can be begun again.
    """

    def __init__(self, state: EMState, kind: str, warm: bool = False):
        """`warm`: the networks have learned what the warm-up learns, and nothing else."""
        self.state, self.kind = state, kind
        names = ("clean_prob", "resampled_label", "suggested_label", "suggested_prob", "eps")
        self.found = {name: getattr(state, name).clone() for name in names}  # each [N]
        self.leaking = state.learned is not None and not state.by_heart
        self.log_odds = torch.full_like(state.eps, torch.nan)  # [N] of the observed label, by the main network
        self.planted = self.leaking and warm
        self.drawn, self.way = (torch.full_like(state.eps, torch.nan) for _ in range(2))  # [N] of planted labels
        self.own = torch.zeros_like(state.agree)  # [N]: added here, not by another process
        self.sums = ops.AuxEStep.empty(0, state.num_classes, state.labels.device)
        # the op knows one gamma for all: the odds of each label's own go to its eps
        self.gamma = torch.full_like(state.gamma, 0.5)
        self.odds = ((1 - state.clean_rate) / state.clean_rate).float()
        self.align = state.align / state.spoken  # what is left to align of the resampled labels
        self.leak = torch.stack([torch.zeros_like(state.leak), state.leak]).exp().float()  # [2], of the look before

    def add(self, index: Tensor, main: Tensor, other: Tensor, teacher: Tensor) -> None:
        """The samples `index` [B] with the logits [B, C] of the network by which w is found, of the other one, and of
        the teacher."""
        state, labels = self.state, self.state.labels[index]
        if self.planted:
            planted = state.warm_labels(index, everything=False)
            wrong = planted != labels
            self.drawn[index[wrong]], self.way[index[wrong]] = toward(
                planted[wrong], labels[wrong], main[wrong], other[wrong]
            )
        eps = state.eps[index] * self.odds[labels]
        if self.leaking:  # labels that were learned are that much likelier by the main network
            eps = eps * self.leak[state.learned[index].long()]
        out = torch.empty_like(eps), torch.zeros_like(self.gamma), self.sums.of_others(len(index))
        main = state.say(main)
        found = ops.em_step(main, teacher, labels, self.gamma, eps, state.corruption, self.align, self.kind, out)
        clean_prob, _, step = found
        for name, values in self.found.items():
            values[index] = clean_prob if name == "clean_prob" else getattr(step, name)
        if self.leaking:
            likely = main.float().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
            self.log_odds[index] = likely - (-likely.expm1()).clamp_min(1e-30).log()
        self.own[index] = True

    def unite(self, group: Group) -> None:
        """With what the other processes have added."""
        measured = [self.log_odds] * self.leaking + [self.drawn, self.way] * self.planted
        group.union(self.own, [*self.found.values(), *measured])
        group.sum(self.sums[4:])

    def finish(self, aligned: bool, smoothing: float | None) -> None:
        """gamma the mean of w, and T_c(y, j) proportional to smoothing/C + corrupted_sum, rows normalised, diagonal
        zero; without a smoothing gamma_y and T_c are those of the surest samples. New alignment."""
        state, c, reviews = self.state, self.state.num_classes, self.state.reviews
        for name, values in self.found.items():
            setattr(state, name, values)
        state.pin()
        if reviews:  # decided labels counted as observed and clean, but it is the given ones that are spoken of
            self.sums.corrupted_sum.add_(reviews.corrected)
            self.sums.posterior_sum.add_(reviews.corrected - reviews.corrected.sum(dim=1).diag())
        unknown = state.clean_prob[reviews.free] if reviews else state.clean_prob
        if len(unknown):  # some that nobody has decided
            state.gamma = unknown.mean(dtype=torch.float64)
        if smoothing is not None:
            state.clean_rate = state.gamma.clamp(*RATES).expand(c).clone()
            off_diagonal = 1 - torch.eye(c, dtype=torch.float64, device=state.labels.device)
            counts = (self.sums.corrupted_sum + smoothing / c) * off_diagonal
            state.corruption = (counts / counts.sum(dim=1, keepdim=True).clamp_min(1e-300)).float()
        else:
            state.set_noise(state.transition())
        if self.leaking:
            known = self.log_odds.isfinite()  # all but those that were dropped
            state.leak.fill_(leak_of(self.log_odds[known], state.learned[known]))
        if self.planted:
            known = self.way.isfinite()
            state.memorised.fill_(memorised(self.drawn[known], self.way[known]))
        state.posterior_sum = self.sums.posterior_sum
        suspected = (state.clean_prob < 0.5) & (state.suggested_label != state.labels)
        state.suspicion = (state.suspicion << 1) | suspected
        if aligned:
            state.realign(self.sums.class_sum)
