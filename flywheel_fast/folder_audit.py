"""The one command for a newcomer: pictures in, a report on their labels out."""

from collections.abc import Callable
from pathlib import Path

from flywheel_fast import config as configs
from flywheel_fast import report, run_folder
from flywheel_fast.embed import embed
from flywheel_fast.errors import BadInput
from flywheel_fast.pauses import Pauses
from flywheel_fast.trainer import Config, Trainer

SEEN, LEARNT = "photos", "embeddings"  # configs: how pictures are seen, and what is learnt from that
MANY = 20_000  # pictures from which an epoch has steps enough for fewer epochs
OF_LEARNING = ("seed", "log", "cycle.", "optim.", "model.folds")  # keys that are of the second


def audit(
    pictures: Path, out: Path, changes: list[str], pauses: Pauses, told: Callable[[float], None]
) -> tuple[Path, int]:
    """Sees all pictures of class folders, or of a table, through a frozen network, runs the cycle on that, and writes
    the report; returns where it is, and of how many pictures. What the run folder `out` holds is not done again.

    `changes`: of the configs photos and embeddings. `told` is given the seconds that seeing the pictures takes. Raises
    BadInput.
    """
    if not pictures.exists():
        raise BadInput(f"{pictures}: is not there; name a folder of class folders, or a table of files and labels")
    of_learning = [word for word in changes if word.startswith(OF_LEARNING)]
    source = [f"data.source={'csv' if pictures.is_file() else 'folder'}", f"data.root={pictures}", "data.holdout=0"]
    seen = configs.load(Config, SEEN, [*source, *(word for word in changes if word not in of_learning)])
    features = out / run_folder.FEATURES
    at = [f"name={out.name}", f"data.features={features}", "data.holdout=0", "eval_every=10"]
    configs.load(Config, LEARNT, [*at, *of_learning])  # a mistake in them is told before the pictures are seen
    count = embed(seen, features, told=told, pauses=pauses)
    learnt = configs.load(Config, LEARNT, [*at, *_pace(count), *of_learning])
    if not (out / "result.json").exists():
        Trainer(learnt, out, run_folder.resumable(out), pauses).run()
    return report.write([out]), count


def _pace(count: int) -> list[str]:
    """Of `count` pictures: what `embeddings` says for some hundreds; of many, larger batches and fewer epochs."""
    if count < MANY:
        return []
    return [*large_batches(count), "cycle.warmup=2", "optim.epochs=8"]


def large_batches(count: int) -> list[str]:
    """A hundred batches of `count` samples or more, and a learning rate for them."""
    return [f"optim.batch_size={min(count // 100, 1024)}", "optim.lr=0.05"]
