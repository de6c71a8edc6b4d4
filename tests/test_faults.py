"""What goes wrong in long runs, provoked: one sentence each, and nothing that was saved is lost."""

import shutil
import subprocess
import time

import pytest
import torch
from cli import ended_as, flywheel
from conftest import small_disk
from test_stopping import SHORT, After, train
from torch import nn

from flywheel_fast import checkpoint, config, cycle, run_folder, trainer
from flywheel_fast.data import scan
from flywheel_fast.data.sources import DataConfig
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.errors import BadInput, Failure, Stopped
from flywheel_fast.learner import Learner, OptimConfig


def finite(state) -> bool:
    if isinstance(state, dict):
        return all(map(finite, state.values()))
    return not isinstance(state, torch.Tensor) or bool(state.isfinite().all())


# -- losses that are not finite ----------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learner = Learner(network, OptimConfig(ema_decay=0.5, precision="fp32"), 10, torch.device("cpu"))
    images = torch.randn(8, 3, 6, 6)
    learner.step(learner.forward(images, torch.arange(8)).square().sum())
    before = {key: value.clone() for key, value in learner.network.state_dict().items() if value.is_floating_point()}
    momentum = [state["momentum_buffer"].clone() for state in learner.optimizer.state.values()]
    for poison in (float("nan"), float("inf")):
        learner.step((learner.forward(images, torch.arange(8)) * poison).sum())
        learner.step(learner.forward(images + poison, torch.arange(8)).sum())
    after = learner.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(map(torch.equal, momentum, (state["momentum_buffer"] for state in learner.optimizer.state.values())))
    assert finite(learner.state_dict()) and learner.skipped_last == 4 and learner.skipped() == 4
    learner.step(learner.forward(images, torch.arange(8)).square().sum())
    assert learner.skipped_last == 0 and learner.skipped() == 0
    assert not torch.equal(learner.network.state_dict()["0.weight"], before["0.weight"])


def poisoned(monkeypatch, steps) -> None:
    """The main network's loss is NaN in these steps."""
    learn = cycle.Cycle._learn

    def poison(self, name, index, logits, *args, **more):
        bad = name == "main" and self.main.steps in steps
        learn(self, name, index, logits * float("nan") if bad else logits, *args, **more)

    monkeypatch.setattr(cycle.Cycle, "_learn", poison)


def test_a_bad_step_is_left_out_and_told_and_the_clock_may_jump(tmp_path, monkeypatch):
    poisoned(monkeypatch, {2, 3, 17})
    days = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 86400.0 * next(days))  # backwards, a day at each look
    train(tmp_path / "run")
    log = (tmp_path / "run/train.log").read_text()
    assert "epoch 1: 2 steps of the main network were left out" in log
    assert "epoch 3: 1 steps of the main network were left out" in log and log.count("left out") == 2
    assert finite(checkpoint.load(tmp_path / "run/weights/last.pt"))


def test_too_many_bad_steps_end_the_run_with_the_last_good_state(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(6, 10**6))
    words = ["data.train_size=700", "optim.batch_size=16"]  # 44 batches an epoch
    with pytest.raises(Failure, match=r"main network.* not finite in 20 steps .*optim\.lr"):
        train(tmp_path / "run", *words)
    saved = checkpoint.load(tmp_path / "run/weights/last.pt")
    assert finite(saved["cycle"]["main"]) and 26 <= saved["cycle"]["main"]["steps"] <= 40


# -- the machine -------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_batch_size_to_try(tmp_path, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Learner, "step", full)
    with pytest.raises(Failure, match=r"optim\.batch_size=64: start anew with optim\.batch_size=32"):
        train(tmp_path / "run")


def test_a_run_folder_that_becomes_read_only(tmp_path):
    with small_disk(tmp_path / "disk", "40m") as disk:
        with pytest.raises(Stopped):
            train(disk / "run", pauses=After(6))
        before = (disk / "run/weights/last.pt").read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        again = flywheel("train", *SHORT, "--out", disk / "run", "--resume", "auto", cwd=tmp_path)
        assert again.returncode == 2 and "Read-only" in again.stderr and "Traceback" not in again.stderr
        with pytest.raises(Failure, match="Read-only"):
            train(disk / "run")
        assert (disk / "run/weights/last.pt").read_bytes() == before
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        train(disk / "run")
        train(tmp_path / "whole")
        assert ended_as(disk / "run") == ended_as(tmp_path / "whole")


# -- the folders -------------------------------------------------------------------------------------------------------


def test_two_trainings_on_one_folder(tmp_path):
    folder = run_folder.create(str(tmp_path / "a"), "a", False, False)
    with run_folder.lock(folder):
        for more in (["--resume", "auto"], ["--overwrite"]):
            second = flywheel("train", *SHORT, "--out", "a", *more, cwd=tmp_path)
            assert second.returncode == 2 and "another training" in second.stderr, second.stderr
        assert (folder / "train.log").exists()
    run_folder.lock(folder).close()


def test_only_what_a_launcher_began_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [run_folder.create(None, "x", False, False) for _ in range(3)]
    for folder, launcher in zip(folders, ("run 1", "run 2"), strict=False):
        (folder / run_folder.LAUNCHER).write_text(launcher)
    assert run_folder.begun_by("run 2", None, "x") == folders[1] == run_folder.begun_by("run 2", "runs/x-2", "y")
    assert run_folder.begun_by("run 3", None, "x") is run_folder.begun_by("run 2", "runs/x", "x") is None
    run_folder.leave(folders[0])
    assert not folders[0].exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_is_lost_between_scan_and_training(folder, tmp_path, monkeypatch, damage):
    victim = folder / "train/dog/2.jpg"
    look = scan.without_broken

    def then_damage(manifest, split, *given):
        found = look(manifest, split, *given)
        if split == "test":
            victim.unlink() if damage == "gone" else victim.write_bytes(victim.read_bytes()[:100])
        return found

    monkeypatch.setattr(scan, "without_broken", then_damage)
    settings = trainer.Config(
        data=DataConfig("folder", str(folder), cache_gb=0), views=ViewsConfig(16), optim=OptimConfig(8, 4)
    )
    (tmp_path / "run").mkdir()
    with pytest.raises(BadInput, match=r"train/dog/2\.jpg.*replace it, or take it out"):
        trainer.Trainer(settings, tmp_path / "run").run()


# -- checkpoints from elsewhere ----------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_none_or_of_another_version(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path / "run", pauses=After(2))
    last = tmp_path / "run/weights/last.pt"
    saved = checkpoint.load(last)
    shutil.rmtree(last.parent)
    for state in (saved | {"format": 1}, {}):
        checkpoint.save(last, state)
        checkpoint.previous(last).unlink(missing_ok=True)
        with pytest.raises(BadInput, match=r"last\.pt: was written by another version"):
            trainer.Trainer(config.load(trainer.Config, "digits", SHORT), tmp_path / "run", resume=True)
