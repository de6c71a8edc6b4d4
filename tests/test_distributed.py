"""Several processes, started by torchrun, do what one does; one that dies is started anew and nothing is lost."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_stopping import SHORT, ended_as

from flywheel_fast import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TOY = Path(__file__).parent / "toy_processes.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *words, cwd: Path, options=()) -> subprocess.Popen:
    command = [*TORCHRUN, "--nproc-per-node", str(processes), *options, *map(str, words)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return said


def train(processes: int, out: str, *words, cwd: Path, options=()) -> subprocess.Popen:
    command = ["-m", "flywheel_fast", "train", *SHORT, "--out", out, *words]
    return torchrun(processes, *command, cwd=cwd, options=options)


def rows(run: Path) -> list[dict]:
    if not (run / "metrics.csv").exists():
        return []
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_one_two_and_four_processes_know_the_same(tmp_path):
    """All that is known of samples, gamma and T_c, after warm-up and cycles with the same batches."""
    found = {}
    for processes in (1, 2, 4):
        finished(torchrun(processes, TOY, f"{processes}.pt", cwd=tmp_path))
        found[processes] = torch.load(tmp_path / f"{processes}.pt", weights_only=True)
    one = found[1]
    assert 0.05 < one["clean_prob"].std() and 0.5 < one["gamma"] < 0.9  # something has been found
    for processes in (2, 4):
        for name, value in one.items():
            if name == "ema":
                continue
            other, scale = found[processes][name], 1000 if name == "posterior_sum" else 1  # a sum over the samples
            assert value.dtype == other.dtype and value.shape == other.shape
            worst = (value.double() - other.double()).abs().max().item() / scale
            assert worst <= (1e-6 if value.is_floating_point() else 0), (processes, name, worst)
        for key, weights in one["ema"].items():
            assert torch.allclose(weights, found[processes]["ema"][key], atol=1e-9), key


def test_a_process_that_dies_is_started_anew_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    words = ["--checkpoint-every", "2"]
    said = finished(train(2, "whole", *words, cwd=tmp_path))
    assert "2 processes" in said and said.count("Result") == 1
    killed = train(2, "killed", *words, cwd=tmp_path, options=["--max-restarts", "1"])
    while len(rows(tmp_path / "killed")) < 2:
        assert killed.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    said = finished(killed)
    assert "going on after epoch" in said
    assert ended_as(tmp_path / "killed") == ended_as(tmp_path / "whole")


def test_stopped_with_two_processes_it_goes_on_with_one(tmp_path):
    stopped = train(2, "a", cwd=tmp_path)
    while not rows(tmp_path / "a"):
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=100)
    assert stopped.returncode != 0 and "stopped after epoch" in said, said
    assert not (tmp_path / "a/result.json").exists()
    said = finished(train(1, "a", "--resume", "auto", cwd=tmp_path))
    assert "going on after epoch" in said and len(rows(tmp_path / "a")) == 4


def test_alone_a_group_changes_nothing():
    alone, values = distributed.ALONE, torch.arange(3.0)
    alone.sum([values])
    alone.mean([values])
    alone.union(torch.tensor([True, False, False]), [values])
    assert values.tolist() == [0, 1, 2] and alone.share(7) == 1 and alone.most(3) == 3
    network = torch.nn.Linear(2, 2)
    assert alone.parallel(network, True) is network
    with pytest.raises(KeyError):
        alone.first({}.popitem)
