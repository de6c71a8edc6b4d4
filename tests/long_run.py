"""A training of many epochs, watched for what grows: memory, open files, the log, the run folder.

    python -m tests.long_run IMAGES [--epochs 300] [key=value ...]

IMAGES is CIFAR-10 as folders, train/CLASS and test/CLASS; 1 % of it is trained on, by cifar10_small with a narrower
network. Ends with status 1 where, after the first tenth of the epochs, the resident memory (the median of each further
tenth: a moment's needs are none of its growth) leaves a band of 2 %, or files stay open.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from flywheel_fast import config
from flywheel_fast.trainer import Config, Trainer

BAND = 0.02
SHOWN = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the epochs


class Watch:
    """A sink, so that it is called after each epoch."""

    def __init__(self, out: Path):
        self.out, self.seen = out, []

    def write(self, epoch: int, row: dict[str, float]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        size = sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())
        log = (self.out / "train.log").stat().st_size
        self.seen.append((epoch, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), log, size))
        if epoch % 10 == 0:
            print(told(self.seen[-1]), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def told(seen: tuple) -> str:
    epoch, resident, files, log, size = seen
    return f"| {epoch} | {resident / 1e6:,.1f} | {files} | {log / 1e3:,.1f} | {size / 1e6:,.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("words", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    words = [f"data.root={asked.images}", "data.train_size=500", "data.test_size=100", "model.main.width=8"]
    words += [f"optim.epochs={asked.epochs}", *asked.words]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        out.mkdir()
        trainer, watch = Trainer(config.load(Config, "cifar10_small", words), out), Watch(out)
        trainer.screen.console.quiet = True
        trainer.sinks.append(watch)
        trainer.run()
    print("| epoch | resident MB | open files | log KB | run folder MB |\n|---|---|---|---|---|")
    for share in SHOWN:
        print(told(watch.seen[max(round(share * asked.epochs), 1) - 1]))
    tenth = max(asked.epochs // 10, 1)
    settled = watch.seen[tenth:]
    resident, files = ([row[column] for row in settled] for column in (1, 2))
    middle = [statistics.median(resident[at : at + tenth]) for at in range(0, len(resident), tenth)]
    drift, whole = [value / middle[0] - 1 for value in middle], statistics.median(resident)
    print(f"resident memory, medians of the tenths against the second: {min(drift):+.2%} to {max(drift):+.2%}")
    print(f"single epochs: {min(resident) / whole - 1:+.1%} to {max(resident) / whole - 1:+.1%} of the median")
    print(f"open files: {min(files)} to {max(files)}")
    sys.exit(max(map(abs, drift)) > BAND or files[-1] > files[0])


if __name__ == "__main__":
    main()
