"""Kills trainings at random moments, resumes them, and compares what they end with.

    python -m tests.torture --moments 50 [--processes 2]

A training of six epochs is killed (SIGKILL) at a random moment after its first word, each fifth time after its start;
resumed with the same words, killed again, until one ends; then the next begins. Weights, labels and metrics must be
those of a run that nobody disturbed, byte for byte. With --processes it runs under torchrun, and one process is killed
by turns with all of them.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cli import ended_as

WORDS = ["train", "optim.epochs=6", "cycle.warmup=2", "data.train_size=400", "data.test_size=100"]
WORDS += ["--resume", "auto", "--checkpoint-every", "3"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(out: Path, processes: int) -> subprocess.Popen:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    with open(out.with_suffix(".said"), "ab") as said:
        return subprocess.Popen(
            [*command, "flywheel_fast", *WORDS, "--out", str(out)],
            env=ENVIRONMENT,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def kill(process: subprocess.Popen, processes: int, one: bool) -> str:
    """What was killed."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if processes > 1 else []
    if one and children:
        os.kill(int(random.choice(children)), signal.SIGKILL)  # torchrun then ends the others
        process.wait()
        return "one process"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in children:  # of sessions of their own
        try:
            os.kill(int(child), signal.SIGKILL)
        except ProcessLookupError:
            pass
    return "all processes" if processes > 1 else "the process"


def spoke(process: subprocess.Popen, out: Path) -> float:
    """When a new line stands in the log, or the process has ended."""
    log = out / "train.log"
    before = log.stat().st_size if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_size == before):
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
        assert process.wait() == 0, whole.with_suffix(".said").read_text()
        length = time.monotonic() - began
        moment, runs, unequal = 0, 0, 0
        while moment < asked.moments:
            runs += 1
            out = Path(folder, f"killed-{runs}")
            while True:
                process, early = start(out, asked.processes), moment % 5 == 4
                began = time.monotonic() if early else spoke(process, out)
                after = rng.uniform(0, length) if moment < asked.moments else 1e6
                try:
                    status = process.wait(after)
                    break
                except subprocess.TimeoutExpired:
                    moment += 1
                    what = kill(process, asked.processes, one=moment % 2 == 1)
                    since = "its start" if early else "its first word"
                    print(f"{moment:>3}  killed {what} {after:4.1f} s after {since}; {last_word(out)}", flush=True)
            said = out.with_suffix(".said").read_text()
            equal = status == 0 and ended_as(out) == ended_as(whole)
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
