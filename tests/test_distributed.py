"""Several processes, started by torchrun, do what one does; one that dies is started anew and nothing is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli import ended_as, rows
from test_stopping import SHORT

from flywheel_fast import config, distributed, trainer

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


def namespace(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True).returncode


@pytest.fixture
def two_machines():
    """Two network namespaces with a cable between them: name -> address."""
    if not shutil.which("ip") or namespace("netns", "add", "flywheel-a"):
        pytest.skip("cannot make a network namespace here: needs ip and root")
    machines = {"flywheel-a": "10.98.76.1", "flywheel-b": "10.98.76.2"}
    try:
        namespace("netns", "add", "flywheel-b")
        namespace(
            "link", "add", "a0", "netns", "flywheel-a", "type", "veth", "peer", "name", "b0", "netns", "flywheel-b"
        )
        for (name, address), device in zip(machines.items(), ("a0", "b0"), strict=True):
            for words in (["addr", "add", f"{address}/24", "dev", device], ["link", "set", device, "up"]):
                if namespace("-n", name, *words):
                    pytest.skip("cannot join two network namespaces here")
            namespace("-n", name, "link", "set", "lo", "up")
        yield machines
    finally:
        for name in machines:
            namespace("netns", "del", name)


def test_two_machines_know_what_one_process_knows(tmp_path, two_machines):
    (first, at), _ = two_machines.items()
    nodes = []
    for name, device in zip(two_machines, ("a0", "b0"), strict=True):
        command = ["ip", "netns", "exec", name, *TORCHRUN[:3], "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{at}:29500", "--rdzv-id", "x"]
        command += ["--rdzv-conf", f"is_host={int(name == first)}", "--local-addr", two_machines[name]]
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": device}
        nodes.append(
            subprocess.Popen(
                [*command, str(TOY), "two.pt"],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for node in nodes:
        finished(node)
    finished(torchrun(1, TOY, "one.pt", cwd=tmp_path))
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert (one["clean_prob"] - two["clean_prob"]).abs().max() <= 1e-6 and abs(one["gamma"] - two["gamma"]) <= 1e-6


def test_processes_of_other_machines_take_none_of_this_ones_memory(folder, tmp_path, monkeypatch):
    """The second of two machines with two processes each."""
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for name, value in (torchrun | {"GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(None, 3, 4)]))
    monkeypatch.setattr(distributed.distributed, "init_process_group", lambda *given, **named: None)
    monkeypatch.setattr(distributed.Group, "first", lambda group, make: make())
    monkeypatch.setattr(trainer.Memory, "free", lambda device, cache_gb, processes: {}[f"shared by {processes}"])
    words = ["data.source=folder", f"data.root={folder}"]
    with pytest.raises(KeyError, match="shared by 2"):
        trainer.Trainer(config.load(trainer.Config, None, words), tmp_path / "run", group=distributed.Group.join())


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
