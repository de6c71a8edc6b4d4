"""Images a second of the trainer and of bare loops on the same networks, batch and threads.

    python -m benchmarks.step [--quick] [--networks small_cnn preact_resnet18] [--out benchmarks/results]

Candidates take turns in one process, a whole epoch each, so that a busy machine slows them alike; figures are medians:

- trainer: `Cycle.run` as `flywheel-fast train` assembles it, an epoch of the cycle with its look and E-steps, on drawn
  pictures that are decoded already; compiled: the same with optim.compile=true;
- bare: its passes alone, on one batch of random numbers: forward, backward and optimiser of both networks on each of
  two views, and a forward pass of both for each image;
- SSR, DivideMix: their passes alone, likewise, with what they do between them left out. SSR (Feng et al. 2022, arXiv
  2111.11288): three views forward and backward (mixup, and the two of the consistency term), and two forward passes of
  each image for its neighbours and its class. DivideMix (Li et al. 2020, arXiv 2002.07394), half of the samples
  selected: for each network a batch of selected and a batch of other samples, two views of each; six forward passes
  guess and refine the labels, four views go forward and backward; a forward pass of each image by each network.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy_table import markdown
from flywheel_fast import config, env, models
from flywheel_fast.learner import has_bf16
from flywheel_fast.trainer import Config, Trainer

BATCH, CLASSES, SIDE = 64, 10, 32
NETWORKS = {"small_cnn": 1280, "preact_resnet18": 128}  # images of an epoch
FIELDS = (
    "network",
    "images",
    "candidate",
    "p20",
    "median",
    "p80",
    "turns",
    "precision",
    "device",
    "threads",
    "versions",
)
SELECTED = 0.5  # of the samples, by DivideMix


def pictures(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("test" if number < CLASSES else "train") / str(number % CLASSES) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def trainer(folder: Path, network: str, precision: str, compiled: bool = False) -> Callable[[], None]:
    """An epoch of the cycle, after an epoch of warm-up."""
    words = ["data.source=folder", f"data.root={folder}", f"model.main.name={network}", f"views.image_size={SIDE}"]
    words += [f"optim.precision={precision}", f"optim.batch_size={BATCH}", "optim.epochs=100", "cycle.warmup=1"]
    out = folder / f"run{compiled:d}"
    out.mkdir()
    made = Trainer(config.load(Config, None, [*words, f"optim.compile={compiled}"]), out)
    made.cycle.run(made.loader, 0)
    return lambda: made.cycle.run(made.loader, 1)


class Bare:
    """A network, its optimiser, and a batch of random numbers for each number of views."""

    def __init__(self, network: str, precision: str, device: torch.device):
        self.device, self.bf16 = device, precision == "bf16"
        built = models.build(models.NetworkConfig(network), CLASSES, SIDE, seed=0)
        self.network = built.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, 0.9, weight_decay=5e-4, fused=True)

    def images(self, count: int) -> Tensor:
        images = torch.randn(count, 3, SIDE, SIDE, device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.network.train()
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            loss = F.cross_entropy(self.network(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def look(self, images: Tensor) -> None:
        self.network.eval()
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            self.network(images)


def loops(network: str, precision: str, device: torch.device, count: int) -> dict[str, Callable[[], None]]:
    """Each the passes of an epoch of `count` images."""
    one, two = (Bare(network, precision, device) for _ in range(2))
    images = {views: one.images(views * BATCH) for views in range(1, 5)}
    labels = {views: torch.randint(CLASSES, (views * BATCH,), device=device) for views in images}
    steps, sweeps = -(-count // BATCH), -(-count // (4 * BATCH))  # a look takes larger batches

    def bare() -> None:
        for _ in range(2 * steps):
            two.learn(images[1], labels[1])
            one.learn(images[1], labels[1])
        for _ in range(sweeps):
            one.look(images[4])
            two.look(images[4])

    def ssr() -> None:
        for _ in range(2 * sweeps):
            one.look(images[4])
        for _ in range(steps):
            one.learn(images[3], labels[3])

    def dividemix() -> None:
        for net, other in ((one, two), (two, one)):
            for _ in range(sweeps):
                net.look(images[4])
            for _ in range(round(SELECTED * steps)):
                net.look(images[4])
                other.look(images[2])
                net.learn(images[4], labels[4])

    return {"bare": bare, "SSR": ssr, "DivideMix": dividemix}


def seconds(candidates: dict[str, Callable[[], None]], turns: int) -> dict[str, tuple[float, float, float]]:
    """20th percentile, median and 80th; the first turn is not counted."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - start)
    return {name: tuple(np.percentile(times[1:], (20, 50, 80))) for name, times in found.items()}


def measure(network: str, count: int, turns: int, precision: str, compiled: bool) -> dict[str, dict]:
    """A row for each candidate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder), count + CLASSES)
        epochs = {"trainer": trainer(Path(folder), network, precision)}
        if compiled:
            epochs["compiled"] = trainer(Path(folder), network, precision, compiled=True)
        took = seconds(epochs | loops(network, precision, device, count), turns)
    about = {"network": network, "images": count, "turns": turns, "precision": precision, "device": device.type}
    found = env.describe()
    about |= {"threads": torch.get_num_threads(), "versions": f"{found['flywheel-fast']}; torch {found['torch']}"}
    return {
        name: about | {"candidate": name, "p20": f"{p20:.4g}", "median": f"{median:.4g}", "p80": f"{p80:.4g}"}
        for name, (p20, median, p80) in took.items()
    }


def table(measured: list[dict[str, dict]]) -> str:
    lines: list[tuple] = [("network", "images", "trainer, images/s", "bare, images/s", "trainer / bare")]
    lines[0] += ("compiled / trainer", "trainer's seconds / SSR's", "trainer's seconds / DivideMix's")
    for rows in measured:
        row, took = rows["trainer"], {name: float(row["median"]) for name, row in rows.items()}
        rates = [f"{row['images'] / took[name]:,.0f}" for name in ("trainer", "bare")]
        ratios = [took["bare"] / took["trainer"], took["trainer"] / took["compiled"] if "compiled" in took else None]
        ratios += [took["trainer"] / took["SSR"], took["trainer"] / took["DivideMix"]]
        lines.append(
            (row["network"], row["images"], *rates, *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
        )
    about = (
        f"Epochs of drawn images of {SIDE} px, batches of {BATCH}, {row['precision']}, median of {row['turns']} epochs "
        f"in turns; {row['device']}, {row['threads']} threads; flywheel-fast {row['versions']}. `compiled / trainer`: "
        "images/s with optim.compile=true over those without."
    )
    return f"# The trainer's step against bare loops\n\n{about}\n\n{markdown(lines)}"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and turns, nothing compiled")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--images", type=int, help="of an epoch")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--out", type=Path, help="folder for step.csv and step.md")
    chosen = parser.parse_args(words)
    turns = 1 if chosen.quick else 3
    measured = []
    for network in chosen.networks:
        count = chosen.images or (128 if chosen.quick else NETWORKS.get(network, 128))
        measured.append(measure(network, count, turns, chosen.precision, compiled=not chosen.quick))
    text = table(measured)
    print(text)
    if chosen.out:
        with open(chosen.out / "step.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(row for rows in measured for row in rows.values())
        (chosen.out / "step.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
