"""Kills trainings at random moments, resumes them, and compares what they end with.

    python -m tests.torture --moments 50 [--processes 2]

A training of five epochs is killed (SIGKILL) at a random moment after its first word, each fifth time after its start;
resumed with the same words, killed again, until one ends; then the next begins. Weights, labels and metrics must be
those of a run that nobody disturbed, byte for byte. With --processes it runs under torchrun's launcher, and one process
is killed by turns with all of them. All are forked from a process that has imported the libraries already.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.cli import PROCESSES, ended_as

WORDS = ["train", "optim.epochs=5", "cycle.warmup=2", "data.train_size=300", "data.test_size=100"]
WORDS += ["--resume", "auto", "--checkpoint-every", "3"]
PREEMPTED = 75  # by somebody else's signal, which is one interruption more


def start(out: Path, processes: int) -> BaseProcess:
    process = PROCESSES.Process(target=_launch, args=([*WORDS, "--out", str(out)], processes, out.with_suffix(".said")))
    process.start()
    return process


def _launch(words: list[str], processes: int, said: Path) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ["COLUMNS"] = "200"
    if processes == 1:
        return _train(words)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    standalone = {"run_id": str(uuid.uuid4()), "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, processes, **standalone, start_method="fork", max_restarts=0, monitor_interval=0.1)
    elastic_launch(config, _train)(words)


def _train(words: list[str]) -> None:
    from flywheel_fast.cli import main

    if status := main(words):
        sys.exit(status)


def workers(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill(process: BaseProcess, processes: int, one: bool) -> str:
    """What was killed."""
    found = workers(process.pid) if processes > 1 else []
    if one and found:
        os.kill(random.choice(found), signal.SIGKILL)  # the launcher then ends the others
        process.join()
        return "one process"
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return "all processes" if processes > 1 else "the process"


def spoke(process: BaseProcess, out: Path) -> float:
    """When a new line stands in the log, or the process has ended."""
    log = out / "train.log"
    before = log.stat().st_size if log.exists() else 0
    while process.exitcode is None and (not log.exists() or log.stat().st_size == before):
        time.sleep(0.01)
    return time.monotonic()


def last_word(out: Path) -> str:
    """Of the places that the log tells."""
    log = (out / "train.log").read_text() if (out / "train.log").exists() else ""
    places = re.findall(r"(epoch +\d+/\d+|going on after .*|Result|time  .*)", log)
    return places[-1] if places else "nothing said"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        process = start(whole, asked.processes)
        began = spoke(process, whole)
        process.join()
        assert process.exitcode == 0, whole.with_suffix(".said").read_text()
        length = time.monotonic() - began
        moment, runs, unequal = 0, 0, 0
        while moment < asked.moments:
            runs += 1
            out = Path(folder, f"killed-{runs}")
            while True:
                process, early = start(out, asked.processes), moment % 5 == 4
                began = time.monotonic() if early else spoke(process, out)
                after = rng.uniform(0, length) if moment < asked.moments else 1e6
                process.join(after)
                if process.exitcode is None:
                    moment += 1
                    what = kill(process, asked.processes, one=moment % 2 == 1)
                    since = "its start" if early else "its first word"
                    print(f"{moment:>3}  killed {what} {after:4.1f} s after {since}; {last_word(out)}", flush=True)
                elif process.exitcode != PREEMPTED:
                    break
            said = out.with_suffix(".said").read_text()
            equal = process.exitcode == 0 and ended_as(out) == ended_as(whole)
            unequal += not equal
            print(
                f"     run {runs} ended: {'equal to the undisturbed one' if equal else 'NOT EQUAL, or failed'}",
                flush=True,
            )
            if not equal:
                print(said)
    print(f"{moment} moments, {runs} runs, {unequal} not equal to the undisturbed run")
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main()
