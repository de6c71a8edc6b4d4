"""The toy of the method: ten Gaussian classes in 20 dimensions, small MLPs, every kind of noise with known truth."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from flywheel_fast.cycle import Cycle, CycleConfig
from flywheel_fast.em import EMState
from flywheel_fast.learner import Learner, OptimConfig

C, D, N, BATCH = 10, 20, 3000, 200


@dataclass
class Toy:
    x: torch.Tensor  # [N, D, 1, 1]
    true: np.ndarray  # [N]
    labels: np.ndarray  # [N], noisy
    test_x: torch.Tensor
    test_true: np.ndarray

    def __len__(self):
        return -(-len(self.labels) // BATCH)

    def epoch(self, number, views, start=0):
        order = torch.from_numpy(np.random.default_rng((7, number)).permutation(len(self.labels)))
        for index in order.to(self.x.device).split(BATCH)[start:]:
            yield index, (self.x[index],) * len(views)

    def sweep(self):
        for index in torch.arange(len(self.labels), device=self.x.device).split(1000):
            yield index, (self.x[index],)


def make(kind: str, rate: float, seed: int = 0) -> Toy:
    """kind: symmetric (all classes), pair (next class), asym (classes 0-4 to the next), instance (random planes)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(C, D)) * 0.9

    def draw(n):
        true = rng.integers(C, size=n)
        return (centres[true] + rng.normal(size=(n, D))).astype(np.float32), true

    (x, true), (test_x, test_true) = draw(N), draw(5000)
    hit = rng.random(N) < rate
    if kind == "symmetric":
        other = rng.integers(C, size=N)
    elif kind == "pair":
        other = (true + 1) % C
    elif kind == "asym":
        other = np.where(true < 5, (true + 1) % 5, true)
    else:
        planes = rng.normal(size=(C, D, C))
        score = np.einsum("nd,ndc->nc", x, planes[true])
        score[np.arange(N), true] = -np.inf
        other = score.argmax(axis=1)
    labels = np.where(hit, other, true)
    shape = lambda a: torch.from_numpy(a)[:, :, None, None]  # noqa: E731
    return Toy(shape(x), true, labels, shape(test_x), test_true)


# the paper's choices
LITERAL = {"posterior": "mixture", "target": "argmax_f", "teacher": "aux", "noise_model": "em"}


class MLP(nn.Sequential):
    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(nn.Flatten(), nn.Linear(D, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, C))

    def forward(self, x, project=False):
        return super().forward(x)


def run(toy: Toy, epochs: int = 36, ema: float = 0.0, prepare=None, **cycle) -> tuple[float, float, Cycle]:
    """Test accuracy of the inference network, gamma, and the cycle; `prepare` is given the state before it starts."""
    optim = OptimConfig(epochs=epochs, batch_size=BATCH, lr=0.05, ema_decay=ema, precision="fp32")
    device = toy.x.device
    state = EMState.start(torch.from_numpy(toy.labels).to(device), C, 0.5)
    if prepare:
        prepare(state)
    config = CycleConfig(**cycle)
    steps = -(-len(toy.labels) // BATCH) * config.steps
    aux = None if config.kind == "cross_entropy" else Learner(MLP(2), optim, steps, device)
    flywheel = Cycle(config, Learner(MLP(1), optim, steps, device), aux, state)
    for epoch in range(epochs):
        flywheel.run(toy, epoch)
    predicted = flywheel.inference().predict(toy.test_x).argmax(dim=1).cpu().numpy()
    return float(np.mean(predicted == toy.test_true)), state.gamma.item(), flywheel
