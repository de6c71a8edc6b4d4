"""A training that is stopped, anywhere and often, ends with the bytes of one that was not."""

import random
import signal
import subprocess
import sys
import time

import pytest
from cli import begin, ended_as, flywheel

from flywheel_fast import config, run_folder, trainer
from flywheel_fast.data import pipelines
from flywheel_fast.errors import BadInput, Stopped
from flywheel_fast.pauses import Pauses

SHORT = ["optim.epochs=4", "cycle.warmup=2", "data.train_size=200", "data.test_size=50", "optim.precision=fp32"]


class After(Pauses):
    """Stops after so many batches, of training or of a look."""

    def __init__(self, batches: int = 10**9, every: str = "30m"):
        super().__init__(every)
        self.left = batches

    def stop(self) -> bool:
        self.left -= 1
        return self.left <= 0


def train(out, *words, pauses=None) -> None:
    settings = config.load(trainer.Config, "digits", [*SHORT, *words])
    out.mkdir(exist_ok=True)
    trainer.Trainer(settings, out, run_folder.resumable(out), pauses).run()


@pytest.mark.parametrize("words", [[], ["cycle.noise_model=em", "cycle.contrastive=0.1", "cycle.target=soft_q"]])
def test_stopped_between_any_two_batches(tmp_path, monkeypatch, words):
    monkeypatch.setattr(pipelines, "SWEEP_BATCH", 60)  # looks have four batches too
    monkeypatch.setattr(pipelines, "CHUNK", 3)
    train(tmp_path / "whole", *words)
    rng, stops = random.Random(0), 0
    for _ in range(40):
        try:
            train(tmp_path / "stopped", *words, pauses=After(rng.randint(1, 9)))
            break
        except Stopped as stop:
            stops += 1
            assert "stopped" in str(stop)
    assert stops >= 6
    assert ended_as(tmp_path / "stopped") == ended_as(tmp_path / "whole")
    log = (tmp_path / "stopped/train.log").read_text()
    assert "of 4 batches" in log and log.count("going on after") >= 4


def test_a_checkpoint_is_written_when_due(tmp_path):
    assert not Pauses("10m").due(10**6) and not Pauses("7").due(6) and Pauses("7").due(7)
    soon = Pauses("1m")
    soon.saved_time -= 60
    assert soon.due(0)
    soon.saved(3)
    assert not soon.due(10**6)
    for wrong in ("0", "-1", "1h", "m", "", "1.5"):
        with pytest.raises(BadInput, match=r"--checkpoint-every .*500.*10m"):
            Pauses(wrong)

    class Dies(After):
        def saved(self, steps):
            super().saved(steps)
            self.at = [*getattr(self, "at", []), steps]

        def stop(self):
            if super().stop():
                raise KeyboardInterrupt  # nothing is saved on the way out
            return False

    dying = Dies(batches=4, every="4")  # two steps a batch
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", pauses=dying)
    assert dying.at == [0, 4]
    train(tmp_path / "run", pauses=Pauses())
    assert "going on after epoch 0 of 4 and 2 of 4 batches" in (tmp_path / "run/train.log").read_text()


def test_a_second_signal_ends_the_process_at_once_but_not_a_double_one():
    code = """
import os, signal, sys, time
from flywheel_fast import pauses
with pauses.Pauses().listening() as heard:
    assert not heard.stop()
    for _ in range(2):  # as timeout sends them
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert heard.stop()
    pauses.DOUBLE = 0.01
    time.sleep(0.02)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.stdout == "still here\n" and done.returncode == -signal.SIGTERM, done.stderr


def test_a_signal_ends_with_75_and_the_same_words_go_on(tmp_path):
    words = ["train", *SHORT, "optim.epochs=6", "--out", "a", "--resume", "auto"]
    stopped = begin(*words, cwd=tmp_path, stderr=subprocess.PIPE)
    while not (tmp_path / "a/metrics.csv").exists():
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGUSR1)
    _, error = stopped.communicate(timeout=100)
    assert stopped.returncode == 75 and "Traceback" not in error
    assert "stopped after epoch" in error and "--resume a" in error
    again = flywheel(*words, cwd=tmp_path)
    assert again.returncode == 0 and "going on after epoch" in again.stdout
