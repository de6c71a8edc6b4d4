"""A training that begins with what an earlier run has found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from cli import ended_as, rows
from test_stopping import After, train

from flywheel_fast import cli, ops
from flywheel_fast.audit import read_labels, write_labels
from flywheel_fast.em import EMState, kept_posterior
from flywheel_fast.errors import Stopped


@pytest.mark.parametrize("kind", ["mixture", "joint"])
def test_the_first_cycle_learns_the_posterior_that_was_found(kind):
    rng, n, c = np.random.default_rng(0), 300, 5
    labels, clean_prob = torch.from_numpy(rng.integers(c, size=n)), torch.from_numpy(rng.random(n)).float()
    clean_prob[:20], clean_prob[20:40] = 1, 0
    other = (labels + torch.from_numpy(rng.integers(1, c, size=n))) % c
    suggested = torch.where(clean_prob > 0.5, labels, other)
    prob = torch.where(clean_prob > 0.5, clean_prob, 0.9 * (1 - clean_prob))
    transition = torch.from_numpy(rng.dirichlet(np.full(c, 0.2), size=c))
    state = EMState.start(labels, c, 0.5)
    state.begin_with(clean_prob, suggested, prob, transition)
    assert state.gamma.item() == pytest.approx(clean_prob.mean().item())
    assert torch.allclose(state.clean_rate, transition.diagonal().clamp(1e-3, 1 - 1e-6))
    state.infer_teacher()
    found = ops.posterior(state.teacher, labels, state.clean_prob, state.corruption, kind)
    wanted = kept_posterior(labels, clean_prob, suggested, prob, c)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(wanted.gather(1, suggested[:, None])[:, 0], prob)


@pytest.fixture(scope="module")
def noisy_and_found() -> tuple[toy.Toy, EMState]:
    noisy = toy.make("pair", 0.4)
    _, _, earlier = toy.run(noisy, epochs=12, target="argmax_f")
    return noisy, earlier.state


@pytest.mark.parametrize("noise_model", ["anchors", "em"])
def test_it_is_better_early_than_after_a_blind_warm_up(noisy_and_found, noise_model):
    noisy, found = noisy_and_found

    def begin(state):
        shares = found.posterior_sum / found.posterior_sum.sum(dim=1, keepdim=True)
        state.begin_with(found.clean_prob, found.suggested_label, found.suggested_prob, shares)

    early = {"epochs": 2, "warmup": 2, "noise_model": noise_model}
    blind, blind_gamma, _ = toy.run(noisy, **early)
    accuracy, gamma, cycle = toy.run(noisy, **early, prepare=begin, init_labels="earlier")
    truth = np.mean(noisy.true == noisy.labels)
    assert accuracy > blind + 0.05 and abs(gamma - truth) < 0.7 * abs(blind_gamma - truth)
    assert cycle.state.teacher.dtype == torch.float32 and cycle.state.suspicion.max() == 1


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A run on 200 digits."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    train(out)
    return out


def test_stopped_in_its_first_epochs_it_goes_on_without_the_earlier_run(earlier, tmp_path):
    run = tmp_path / "elsewhere"
    shutil.copytree(earlier, run)
    words = [f"cycle.init_labels={run}"]
    train(tmp_path / "whole", *words)
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", *words, pauses=After(6))
    shutil.rmtree(run)
    train(tmp_path / "stopped", *words)
    assert ended_as(tmp_path / "stopped") == ended_as(tmp_path / "whole")
    log = (tmp_path / "stopped/train.log").read_text()
    assert log.count(f"the labels begin as {run} found them") == 1 and "going on after epoch 1" in log
    assert rows(tmp_path / "whole")[0]["loss_main"] != rows(earlier)[0]["loss_main"]


def test_a_run_on_other_data_is_refused(earlier, tmp_path, capsys):
    def refused(words, *said):
        assert cli.main(["train", "digits", "data.train_size=200", "--out", str(tmp_path / "new"), *words]) == 2
        message = capsys.readouterr().err
        assert all(part in message for part in said) and message.count("\n") == 1, message
        assert not (tmp_path / "new").exists()

    there = ["--init-labels", str(earlier)]
    refused(["--init-labels", str(tmp_path)], "does not hold the labels of a run")
    refused([*there, "data.train_size=250"], "knows nothing of", "files, first train/", "name a run on the same data")
    refused([*there, "data.noise.rate=0.2"], "had another label there, first train/", "name a run on the same data")
    refused([*there, "cycle.kind=cross_entropy"], "cycle.init_labels is for cycle.kind=flywheel")
    labels = read_labels(earlier / "labels")
    (tmp_path / "labels").mkdir()
    object.__setattr__(labels, "classes", ("zero", *labels.classes[1:]))
    write_labels(labels, tmp_path / "labels")
    refused(["--init-labels", str(tmp_path)], "classes are not those of the data ('0' is in one only)")
