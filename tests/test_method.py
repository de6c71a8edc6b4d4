"""The method's properties, on the toy of docs/method.md: ten Gaussian classes, small MLPs, known truth."""

import dataclasses
import traceback
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flywheel_fast import ops, reference
from flywheel_fast.em import EMState, Expectation, leak_of, memorised, shrunk, toward
from flywheel_fast.learner import Learner, OptimConfig
from flywheel_fast.losses import ntxent, told_loss

NOISES = [("symmetric", 0.5), ("symmetric", 0.8), ("pair", 0.4), ("instance", 0.4), ("asym", 0.4)]


@pytest.fixture(scope="module", params=NOISES, ids=lambda noise: f"{noise[0]}-{noise[1]}")
def noisy(request):
    return toy.make(*request.param)


def test_flywheel_beats_cross_entropy_and_recovers_gamma_and_corruption(noisy):
    plain, _, _ = toy.run(noisy, epochs=72, kind="cross_entropy")  # as many steps
    accuracy, gamma, cycle = toy.run(noisy, **toy.LITERAL)
    assert accuracy > plain + 0.08
    assert accuracy > 0.88
    assert abs(gamma - np.mean(noisy.true == noisy.labels)) < 0.08
    truth = np.zeros((toy.C, toy.C))
    np.add.at(truth, (noisy.true, noisy.labels), 1)
    estimated = cycle.state.posterior_sum.numpy()
    variation = 0.5 * np.abs(truth / truth.sum(1, keepdims=True) - estimated / estimated.sum(1, keepdims=True)).sum(1)
    assert variation.mean() < 0.1
    assert torch.equal(cycle.state.labels, torch.from_numpy(noisy.labels))  # observed labels are never overwritten


def test_gamma_alone_is_recovered_when_the_main_network_is_right():
    """EM over gamma with g = the distribution of clean labels, by the main E-step only."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(10, 0.2), size=20_000)
    clean = (p.cumsum(1) > rng.random(20_000)[:, None]).argmax(1)
    hit = rng.random(20_000) < 0.4
    labels = np.where(hit, rng.integers(10, size=20_000), clean)
    gamma, logits = torch.tensor(0.9, dtype=torch.float64), torch.from_numpy(np.log(p + 1e-30))
    for _ in range(300):
        w, total = reference.main_estep(logits, torch.from_numpy(labels), gamma, torch.full((20_000,), 0.1))
        gamma = total / len(w)
    assert abs(gamma.item() - 0.6) < 0.02


@pytest.mark.parametrize(("weight", "low", "high"), [(0.4, 0, 1e-3), (0.0, 0.1, 1)])
def test_lemma_1_the_regulariser_finds_the_clean_distribution(weight, low, high):
    """gamma' = 0.6: at lambda = 1 - gamma' the minimiser is the clean distribution, at lambda = 0 it is far off."""
    clean = torch.tensor([0.7, 0.2, 0.05, 0.05], dtype=torch.float64)
    observed = 0.6 * clean + 0.4 / 4
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        solver.zero_grad()
        log_g = logits.log_softmax(1)
        value = -(observed * log_g).sum() + weight * log_g.mean()
        value.backward()
        return value

    solver.step(loss)
    variation = 0.5 * (logits.softmax(1)[0] - clean).abs().sum().item()
    assert low <= variation <= high


def test_without_refurbishing_and_regulariser_gamma_runs_to_one():
    """Main EM alone: g learns the observed labels, every label looks clean: the collapse that the method prevents."""
    noisy = toy.make("symmetric", 0.5)
    _, _, cycle = toy.run(noisy, epochs=120, kind="cross_entropy")
    logits, labels, gamma = cycle.main.predict(noisy.x), torch.from_numpy(noisy.labels), torch.tensor(0.5).double()
    for _ in range(50):
        clean_prob, _ = ops.main_estep(logits, labels, gamma, torch.full((len(labels),), 1 / toy.C))
        gamma = clean_prob.mean(dtype=torch.float64)
    assert gamma.item() > 0.98


def test_ntxent_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=1)
    total = 0.0
    for i in range(8):
        similar = [torch.exp(z[i] @ z[k] / 0.5) for k in range(8)]
        total -= torch.log(similar[(i + 4) % 8] / (sum(similar) - similar[i]))
    assert torch.allclose(ntxent(z[:4], z[4:], 0.5), total / 8)


def test_posteriors_are_distributions_and_agree_with_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 4, generator=generator).double(), torch.randint(4, (50,), generator=generator)
    w = torch.rand(50, generator=generator).double()
    t = torch.rand(4, 4, generator=generator).double() * (1 - torch.eye(4))
    t /= t.sum(1, keepdim=True)
    f = logits.softmax(1)
    for kind in ("mixture", "joint"):
        q = reference.posterior(logits, labels, w, t, kind)
        assert torch.allclose(q.sum(1), torch.ones(50).double())
        for i in range(50):
            j = labels[i]
            hot = torch.eye(4).double()[j]
            r = f[i] * t[:, j] / (f[i] * t[:, j]).sum()
            wanted = w[i] * hot + (1 - w[i]) * (r if kind == "mixture" else t[:, j])
            wanted = wanted if kind == "mixture" else f[i] * wanted / (f[i] * wanted).sum()
            assert torch.allclose(q[i], wanted)


def test_the_expectation_is_the_same_in_any_number_of_pieces_and_aligns():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(100, 4, generator=generator), torch.randint(4, (100,), generator=generator)
    states = []
    for pieces in (1, 7):
        state = EMState.start(labels, 4, 0.5)
        for _ in range(2):
            weights, expectation = state.align, Expectation(state, "mixture")
            for index in torch.randperm(100, generator=generator).chunk(pieces):
                expectation.add(index, logits[index], logits[index], logits[index])
            expectation.finish(aligned=True, smoothing=1.0)
        states.append(state)
    for one, many in zip(states[0].state_dict().values(), states[1].state_dict().values(), strict=True):
        assert torch.allclose(one, many, atol=1e-6)
    state, f = states[0], logits.softmax(1)
    assert torch.allclose(state.corruption.sum(1), torch.ones(4)) and not state.corruption.diagonal().any()
    assert torch.equal(state.resampled_label, (f * weights).argmax(1)) and not torch.equal(weights, torch.ones(4))


def test_classes_are_aligned_to_their_shares_as_labels_tell_them():
    """A class that is called another one's name gets its samples back; two that are called each other's stay even."""
    true = torch.arange(5).repeat(2000)
    hit = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < 0.4
    labels = torch.where(hit, torch.tensor([1, 1, 3, 2, 4])[true], true)
    transition = torch.eye(5).double()
    for y, j in ((0, 1), (2, 3), (3, 2)):
        transition[y, y], transition[y, j] = 0.6, 0.4
    state = EMState.start(labels, 5, 0.5)
    state.set_noise(transition)
    logits = torch.randn(10_000, 5, generator=torch.Generator().manual_seed(1)) + torch.tensor([0, 0, 2.0, 0, 0])
    for aligned in (False, True, True, True):
        state.speak(aligned)
        said = state.say(logits).softmax(1)
        state.realign(said.sum(0).double())
    assert torch.allclose(said.mean(0), torch.full((5,), 0.2), atol=0.012)
    assert state.spoken[2] < 0.5 * state.spoken[4]


@pytest.mark.parametrize("target, aligned", [("told", True), ("soft_q", True), ("argmax_f", False)])
def test_all_that_networks_say_is_aligned_where_they_learn_labels(target, aligned):
    _, _, cycle = toy.run(toy.make("asym", 0.4), epochs=3, warmup=1, target=target)
    assert not torch.equal(cycle.state.align, torch.ones(toy.C))
    assert torch.equal(cycle.state.spoken, torch.ones(toy.C)) != aligned


def noisy_posteriors(n=20_000, c=4, seed=0):
    """Class-dependent noise, and logits that say exactly what is observed: half the samples surely of one class."""
    rng = np.random.default_rng(seed)
    transition = np.array([[1, 0, 0, 0], [0.4, 0.6, 0, 0], [0, 0, 0.7, 0.3], [0.1, 0.1, 0.1, 0.7]])
    p = rng.dirichlet(np.full(c, 0.3), size=n)
    p[: n // 2] = np.eye(c)[rng.integers(c, size=n // 2)]
    true = (p.cumsum(1) > rng.random(n)[:, None]).argmax(1)
    labels = (transition[true].cumsum(1) > rng.random(n)[:, None]).argmax(1)
    return (
        torch.from_numpy(transition),
        torch.from_numpy(labels),
        torch.from_numpy(np.log(p @ transition + 1e-3)).float(),
    )


@pytest.mark.parametrize("piece", [1 << 16, 777])
def test_the_surest_samples_tell_class_dependent_noise(piece, monkeypatch):
    monkeypatch.setattr("flywheel_fast.em.PIECE", piece)
    transition, labels, logits = noisy_posteriors()
    state, index = EMState.start(labels, 4, 0.5), torch.arange(len(labels))
    state.teach(index, logits, logits, both=True)
    found = state.transition()
    assert torch.allclose(found.sum(1), torch.ones(4, dtype=torch.float64))
    assert (found - transition).abs().sum(1).max() < 0.1
    reviewed = torch.full_like(labels, -1)
    reviewed[torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.5] = 0  # decided, if wrongly
    state.review(labels, reviewed)
    assert (state.transition() - transition).abs().sum(1).max() < 0.15


def test_noise_of_a_class_is_read_from_samples_that_are_called_so():
    """Class 1's pictures are hard, class 0's easy and two in five of them labelled 1: the network has 1 at .4 for
    these, at .35 for its own. The labels of class 1's own tell its noise."""
    easy, hard = [0.6, 0.4, 0.0], [0.3, 0.35, 0.35]
    labels = torch.tensor([0] * 60 + [1] * 40 + [1] * 60 + [2] * 40)
    state = EMState.start(labels, 3, 0.7)
    state.teacher = torch.tensor([easy] * 100 + [hard] * 100).add(1e-6).log()
    state.teacher = state.teacher + 1e-3 * torch.randn(state.teacher.shape, generator=torch.Generator().manual_seed(0))
    found = state.transition()
    assert found[1].argmax() == 1 and found[1, 2] > 0.3 and found[1, 0] < 0.05


def test_small_classes_are_drawn_towards_what_all_have_in_common():
    """Few counts a row: where rows are alike the shares come out nearer to the truth, where they differ no further."""
    rng = np.random.default_rng(0)
    even = torch.full((10, 10), 0.1, dtype=torch.float64)
    own = torch.from_numpy(rng.dirichlet(np.full(10, 0.1), size=10))
    for truth, gain in ((even, 0.3), (own, 1.05)):
        counts = torch.from_numpy(np.stack([rng.multinomial(12, row) for row in truth.numpy()])).double()
        found = shrunk(counts, even)
        assert torch.allclose(found.sum(dim=1), torch.ones(10, dtype=torch.float64))
        plain = counts / counts.sum(dim=1, keepdim=True)
        assert (found - truth).abs().sum() < gain * (plain - truth).abs().sum()
    many = torch.from_numpy(np.stack([rng.multinomial(10_000, row) for row in own.numpy()])).double()
    assert (shrunk(many, even) - many / 10_000).abs().max() < 1e-3
    assert torch.equal(shrunk(torch.zeros(2, 3).double(), even[:2, :3] / 0.3), even[:2, :3] / 0.3)  # nothing is known


def test_noise_that_is_set_gives_each_class_its_own_prior():
    """w by Bayes' rule with gamma_y, as the definition has it; then the noise moves half the way to the posterior's."""
    transition, labels, logits = noisy_posteriors(200)
    state, index = EMState.start(labels, 4, 0.5), torch.arange(200)
    state.set_noise(transition)
    expectation = Expectation(state, "joint")
    expectation.add(index, logits.flip(1), logits, logits)
    state.eps = expectation.found["eps"]
    expectation = Expectation(state, "joint")
    expectation.add(index, logits.flip(1), logits, logits)
    f, g = logits.double().softmax(1), logits.flip(1).double().softmax(1)
    for i in range(200):
        j = labels[i]
        corrupted = sum(f[i, y] * transition[y, j] for y in range(4) if y != j)
        clean = transition[j, j] * g[i, j]
        assert abs(expectation.found["clean_prob"][i] - clean / (clean + corrupted)) < 1e-3
    state.teach(index, logits, logits, both=True)
    expectation.finish(aligned=False, smoothing=None)
    assert torch.equal(state.clean_rate, state.transition().diagonal())
    assert abs(state.gamma - state.clean_prob.double().mean()) < 1e-12


def test_targets_of_the_main_network():
    _, labels, logits = noisy_posteriors(50)
    state, index = EMState.start(labels, 4, 0.5), torch.arange(50)
    state.resampled_label = labels.flip(0)
    state.teach(index, logits, logits, both=True)
    wanted = {
        "argmax_f": F.one_hot(labels.flip(0), 4).double(),
        "soft_q": reference.posterior(logits.double(), labels, state.clean_prob, state.corruption, "mixture"),
    }
    student = logits.flip(0)
    for target, q in wanted.items():
        loss = state.loss(index, student, target, "mixture")
        assert loss.item() == pytest.approx(-(q * student.double().log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_what_labels_tell():
    """Under symmetric noise the label as far as it is clean; under pair noise the class that it comes from too."""
    _, labels, logits = noisy_posteriors(50)
    index, w = torch.arange(50), torch.rand(50, generator=torch.Generator().manual_seed(0))
    state = EMState.start(labels, 4, 0.5)
    state.clean_prob = w
    state.teach(index, logits, logits, both=True)
    label = F.one_hot(labels, 4) * w[:, None]
    torch.testing.assert_close(state.told(index, state.kappa(), everything=True), label)
    state.set_noise(0.6 * torch.eye(4).double() + 0.4 * torch.eye(4).double().roll(1, 1))
    before = F.one_hot((labels - 1) % 4, 4) * (1 - w)[:, None]
    torch.testing.assert_close(state.told(index, state.kappa(), everything=True), label + before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.told(index, None, everything=True), label)
    state.learned = index < 20
    assert torch.equal(state.told(index, None, everything=False), label * (index < 20)[:, None])


def test_the_loss_of_what_is_told():
    _, labels, logits = noisy_posteriors(50)
    told = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) / 4
    g = logits.double().softmax(1)
    each = -(told * g.log()).sum(1) + told.sum(1) * 0.1 * (g + 1e-3).log().mean(1)
    found = told_loss(torch.cat([logits, logits]), told, 0.1, 1e-3)
    assert found.item() == pytest.approx((each.sum() / told.sum()).item(), rel=1e-5)
    assert told_loss(logits, torch.zeros(50, 4), 0.1, 1e-3) == 0


def test_the_leak_is_what_learned_labels_have_over_the_others():
    log_odds = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 2
    learned = torch.arange(40_000) % 4 > 0
    assert leak_of(log_odds + 0.7 * learned, learned) == pytest.approx(0.7, abs=0.08)
    assert leak_of(log_odds - learned.float(), learned) == leak_of(log_odds, torch.ones_like(learned)) == 0


def test_what_planted_labels_draw():
    """Of networks that say alike but for the planted class, one surer of the rest than the other."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (500,), generator=generator)
    planted = (labels + torch.randint(1, 10, (500,), generator=generator)) % 10
    other = torch.randn(500, 10, generator=generator)
    other[torch.arange(500), labels] += 9.0
    for share in (0.0, 0.3, 0.6):
        lift = F.one_hot(planted, 10) * (share * other.max(dim=1).values.mean())
        drawn, way = toward(planted, labels, other + lift, other - 3 * F.one_hot(labels, 10))
        assert memorised(drawn, way) == pytest.approx(share, abs=0.06)
    assert memorised(-drawn, way) == memorised(drawn[:7], way[:7]) == 0
    drawn, way = toward(planted[:9] * 0, planted[:9] * 0 + 1, other[:9, :2], other[:9, :2])  # no other class
    assert not drawn.any() and way.isfinite().all()


def test_the_main_network_learns_no_label_that_is_held_out():
    noisy = toy.make("pair", 0.4)
    others = dataclasses.replace(noisy, labels=noisy.labels.copy())
    _, _, cycle = toy.run(noisy, epochs=2, warmup=2)
    held_out = ~cycle.state.learned.numpy()
    assert abs(held_out.mean() - 0.1) < 0.02
    others.labels[held_out] = 0
    _, _, with_others = toy.run(others, epochs=2, warmup=2)
    for name, alike in (("main", True), ("aux", False)):
        states = [run.learners()[name].network.state_dict().values() for run in (cycle, with_others)]
        assert all(map(torch.equal, *states)) == alike


@pytest.mark.parametrize(("epochs", "warmup", "known"), [(2, 2, False), (12, 12, True), (30, 2, True)])
def test_labels_that_are_known_by_heart_are_not_learned_any_more(epochs, warmup, known):
    _, _, cycle = toy.run(toy.make("symmetric", 0.8), epochs=epochs, warmup=warmup)
    assert cycle.state.by_heart == known and cycle.target() == ("argmax_f" if known else "told")


def test_taking_the_leak_away_keeps_gamma_from_running_away(monkeypatch):
    noisy = toy.make("symmetric", 0.5)
    monkeypatch.setattr("flywheel_fast.cycle.BY_HEART", 9.0)
    accuracy, gamma, _ = toy.run(noisy)
    monkeypatch.setattr("flywheel_fast.em.leak_of", lambda log_odds, learned: 0.0)
    without, run_away, _ = toy.run(noisy)
    truth = np.mean(noisy.true == noisy.labels)
    assert accuracy > without + 0.03 and abs(gamma - truth) < 0.6 * abs(run_away - truth)


@pytest.mark.parametrize(("teacher", "unheard"), [("main_alone", "aux"), ("aux_alone", "main"), ("both", None)])
def test_a_network_that_is_alone_is_the_only_one_heard(teacher, unheard):
    noisy = toy.make("pair", 0.4)
    _, _, cycle = toy.run(noisy, epochs=2, warmup=1, noise_model="em", teacher=teacher)
    begun = {name: value.clone() for name, value in cycle.state.state_dict().items()}

    def found_with(silenced: str | None) -> torch.Tensor:
        cycle.state.load_state_dict({name: value.clone() for name, value in begun.items()})
        learner = cycle.learners().get(silenced)
        if learner:
            learner.predict, heard = lambda images, *_: torch.zeros(len(images), toy.C), learner.predict
        cycle.esteps(noisy)
        if learner:
            learner.predict = heard
        return torch.stack([cycle.state.clean_prob, cycle.state.suggested_prob, cycle.state.resampled_label.float()])

    for silenced in ("main", "aux"):
        assert torch.equal(found_with(silenced), found_with(None)) == (silenced == unheard)


def test_the_cycle_with_anchors_recovers_gamma_on_the_toy():
    noisy = toy.make("pair", 0.4)
    accuracy, gamma, _ = toy.run(noisy, ema=0.98, target="argmax_f")
    assert accuracy > 0.88 and abs(gamma - np.mean(noisy.true == noisy.labels)) < 0.08


def test_the_history_of_suspicion_is_of_the_last_eight_cycles():
    labels = torch.zeros(3, dtype=torch.long)
    state = EMState.start(labels, 4, 0.5)
    logits = torch.tensor([[-9.0, 9.0, 0.0, 0.0]] * 3)  # the auxiliary network says class 1
    for cycle in range(12):
        expectation = Expectation(state, "mixture")
        sure = torch.tensor([-9.0, 9.0, -9.0 if cycle in (2, 9) else 9.0])  # is the main network of the label?
        state.eps.fill_(0.1)
        expectation.add(torch.arange(3), torch.stack([sure, -sure, -sure, -sure], dim=1), logits, logits)
        expectation.finish(aligned=False, smoothing=1.0)
    assert state.suspicion.tolist() == [0b11111111, 0, 0b00000100]


def test_merged_classes_are_named():
    labels = torch.arange(4).repeat(25)
    state = EMState.start(labels, 4, 0.5)
    assert state.merged_classes() == []
    state.resampled_label = torch.where(labels == 2, 3, labels)
    assert state.merged_classes() == [(2, 3)]
    state.clean_prob.fill_(0.9)
    found = state.ailments("abcd")
    assert list(found) == ["merged c"] and "are called 'd'" in found["merged c"]


@pytest.mark.parametrize(
    ("gamma", "clean_prob", "agreement", "said"),
    [
        (0.5, 0.9, 0.25, {}),
        (0.996, 0.9, 1.0, {"gamma near 1": "every label counts as right"}),
        (0.12, 0.9, 1.0, {"gamma near 0": "gamma is 0.120"}),
        (0.5, 0.4, 1.0, {"none clean": "no label 'a', 'b', 'c' and 1 more counts as right"}),
        (0.5, 0.9, 0.24, {"disagreement": "agree on 24.0% of the images"}),
    ],
)
def test_ailments_are_named(gamma, clean_prob, agreement, said):
    state = EMState.start(torch.arange(4).repeat(25), 4, gamma)
    state.clean_prob.fill_(clean_prob)
    state.agree = torch.arange(100) < 100 * agreement
    found = state.ailments("abcd")
    assert found.keys() == said.keys() and all(said[name] in found[name] for name in said)


def test_memorised_labels_are_noticed():
    """Soft targets where networks memorise: gamma runs to 1, and the state says so."""
    _, gamma, cycle = toy.run(toy.make("asym", 0.4), epochs=30, **toy.LITERAL | {"target": "soft_q"}, confidence=0.0)
    assert gamma > 0.995 and "gamma near 1" in cycle.state.ailments(range(toy.C))


def test_a_training_step_reads_nothing_from_the_device():
    """Where it did, a GPU would stand still at each step until the host has asked for more."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten._local_scalar_dense.default:
                stack = "".join(traceback.format_stack())
                if "update_parameters" not in stack:  # torch's average counts its steps on the host
                    read.append(stack)
            return op(*args, **(kwargs or {}))

    data, read = toy.make("pair", 0.3), []
    _, _, cycle = toy.run(data, epochs=3, ema=0.9, warmup=2)
    cycle.main.total_steps = cycle.aux.total_steps = 10**6
    with Reads():
        for target in ("told", "argmax_f", "soft_q"):
            cycle.msteps(data, 3, target)
        assert not read, read[0]
        bool(cycle.main.skipped_last)
    assert len(read) == 1  # which it would have noticed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_training_step_never_waits_for_the_gpu():
    """Torch itself says where it would."""
    data = toy.make("pair", 0.3)
    data = dataclasses.replace(data, x=data.x.cuda(), test_x=data.test_x.cuda())
    _, _, cycle = toy.run(data, epochs=3, ema=0.9, warmup=2)
    cycle.main.total_steps = cycle.aux.total_steps = 10**6
    ready = list(data.epoch(6, ("weak", "strong")))  # which waits, and is not the step's
    loader = SimpleNamespace(epoch=lambda *given: iter(ready))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for target in ("told", "argmax_f", "soft_q"):
            cycle.msteps(loader, 3, target)
        with pytest.raises(RuntimeError, match="synchroniz"):
            bool(cycle.main.skipped_last)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_networks_learn_the_same_and_are_kept_under_the_same_names(monkeypatch):
    """By a compiler that changes nothing and takes no time; benchmarks.step has the real one."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    data, cpu, found = toy.make("pair", 0.3), torch.device("cpu"), []
    for compiled in (False, True):
        learner = Learner(toy.MLP(0), OptimConfig(precision="fp32", compile=compiled), 10, cpu)
        assert isinstance(learner.parallel, torch._dynamo.OptimizedModule) == compiled
        for index, (images,) in data.epoch(0, ("weak",), 20):
            learner.step(F.cross_entropy(learner.forward(images, index), torch.from_numpy(data.labels)[index]))
        found.append(learner.state_dict())
    for part in ("network", "ema"):
        plain, compiled = (state[part] for state in found)
        assert list(plain) == list(compiled) and all(torch.equal(plain[key], compiled[key]) for key in plain)
