"""Kills trainings at random moments, resumes them, and compares what they end with.

    python -m tests.torture --moments 50 [--processes 2]

A training of six epochs is killed (SIGKILL) at a moment drawn from its whole length, resumed with the same words,
killed again, until one ends; then the next begins. Weights, labels and metrics must be those of a run that nobody
disturbed, byte for byte. With --processes it runs under torchrun, and one process is killed by turns with all of them.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def ended_as(run: Path) -> list:
    with open(run / "metrics.csv", newline="") as file:
        rows = [
            {key: value for key, value in row.items() if not key.startswith(("sec_", "waiting"))}
            for row in csv.DictReader(file)
        ]
    return [(run / "weights/model.safetensors").read_bytes(), (run / "labels/samples.parquet").read_bytes(), rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        began = time.monotonic()
        assert start(whole, asked.processes).wait() == 0, whole.with_suffix(".said").read_text()
        length = time.monotonic() - began
        moment, runs, unequal = 0, 0, 0
        while moment < asked.moments:
            runs += 1
            out = Path(folder, f"killed-{runs}")
            while True:
                began, process = time.monotonic(), start(out, asked.processes)
                after = rng.uniform(0, length) if moment < asked.moments else 1e6
                try:
                    status = process.wait(after)
                    length = min(length, time.monotonic() - began)  # the machine may have become quicker
                    break
                except subprocess.TimeoutExpired:
                    moment += 1
                    what = kill(process, asked.processes, one=moment % 2 == 1)
                    log = out / "train.log"
                    lines = log.read_text().splitlines() if log.exists() else []
                    print(
                        f"{moment:>3}  killed {what} after {after:5.1f} s; last: {(lines or ['nothing'])[-1][:90]}",
                        flush=True,
                    )
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
