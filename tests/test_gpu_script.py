"""benchmarks/gpu.sh without a GPU: its steps run, a failure is told, and what is done is not done again."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def run(folder: Path, failing: str = "") -> subprocess.CompletedProcess:
    """The script with commands that only say they were called; `failing` fails."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name in ("python", "pytest", "flywheel-fast"):
        command = commands / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/called\n[ {name} != "{failing}" ]\n')
        command.chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "DRY_RUN": "1"}
    return subprocess.run([SCRIPT, folder / "out"], env=environment, capture_output=True, text=True, check=False)


def test_steps_run_once_and_a_failed_one_again(tmp_path):
    first = run(tmp_path, failing="pytest")
    assert first.returncode == 1 and "test_opcheck: FAILED" in first.stdout and "ops: done" in first.stdout
    again = run(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert [line.split()[0] for line in called] == ["flywheel-fast", "pytest", "python", "pytest"]
