"""What comes between two batches of a training: a wish to stop, or a checkpoint that is due."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flywheel_fast.errors import BadInput

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of schedulers: the time is up, the machine is wanted
DOUBLE = 1.0  # seconds; `timeout` and others signal a process and its group, which is one wish


class Pauses:
    """`every`: "500" steps or "10m" minutes between two checkpoints within an epoch."""

    def __init__(self, every: str = "30m"):
        if not re.fullmatch(r"[1-9]\d*m?", every):
            raise BadInput(f"--checkpoint-every {every}: is neither a number of steps (500) nor of minutes (10m)")
        number = int(every.removesuffix("m"))
        self.steps, self.seconds = (None, 60 * number) if every.endswith("m") else (number, None)
        self.heard: float | None = None  # when the first signal came
        self.saved(0)

    @contextmanager
    def listening(self) -> Iterator["Pauses"]:
        """SIGTERM and SIGUSR1 are wishes to stop after the batch; a second one ends the process at once."""
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame) -> None:
        if self.heard is None:
            self.heard = time.monotonic()
        elif time.monotonic() - self.heard > DOUBLE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop(self) -> bool:
        return self.heard is not None

    def due(self, steps: int) -> bool:
        """Whether a checkpoint is, after so many steps of the run."""
        if self.steps:
            return steps - self.saved_steps >= self.steps
        return time.monotonic() - self.saved_time >= self.seconds

    def saved(self, steps: int) -> None:
        self.saved_steps, self.saved_time = steps, time.monotonic()
