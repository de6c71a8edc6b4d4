"""The toy's cycle by the processes that torchrun starts: `toy_processes.py FILE` saves what is known at its end.

The networks compute in float64, so that what differs between one process and several is not their rounding.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import toy

from flywheel_fast.cycle import Cycle, CycleConfig
from flywheel_fast.distributed import Group
from flywheel_fast.em import EMState
from flywheel_fast.learner import Learner, OptimConfig

SAMPLES, BATCH = 1003, 100  # neither batches nor shares come out even
DROPPED = (0, 500)  # samples that no process looks at


@dataclass
class Shared(toy.Toy):
    """A process's part of the toy."""

    group: Group

    def epoch(self, number, views, start=0):
        order = torch.from_numpy(np.random.default_rng((7, number)).permutation(len(self.labels)))
        for batch in order.split(BATCH)[start:]:
            index = batch[self.group.rank :: self.group.world] if len(batch) >= 2 * self.group.world else batch
            yield index, (self.x[index],) * len(views)

    def sweep(self):
        used = torch.tensor([i for i in range(len(self.labels)) if i not in DROPPED])
        for index in used[self.group.rank :: self.group.world].split(150):
            yield index, (self.x[index],)


class MLP(toy.MLP):
    def forward(self, x, project=False):
        return super().forward(x).float()


def train(group: Group) -> None:
    whole = toy.make("pair", 0.3)
    n = SAMPLES
    data = Shared(whole.x[:n].double(), whole.true[:n], whole.labels[:n], whole.test_x, whole.test_true, group)
    optim = OptimConfig(epochs=4, batch_size=BATCH, ema_decay=0.9, precision="fp32")

    def learner(seed: int) -> Learner:
        steps = -(-n // BATCH) * CycleConfig().steps
        return Learner(MLP(seed).double(), optim, steps, torch.device("cpu"), group)

    state = EMState.start(torch.from_numpy(data.labels), toy.C, 0.5)
    for kind in ("anchors", "em"):
        cycle = Cycle(CycleConfig(warmup=2, noise_model=kind), learner(1), learner(2), state, group)
        for epoch in range(2, 4) if kind == "em" else range(3):
            cycle.run(data, epoch)
            losses = cycle.mean_losses()
    parts = cycle.state_dict()
    if not group.rank:
        torch.save(parts["state"] | losses | {"ema": parts["aux"]["ema"]}, sys.argv[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = Group.join()
    train(processes)
    processes.leave()
    threads = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads
