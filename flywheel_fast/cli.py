"""The command line: train, report, review, labels, predict, evaluate, export, data, config, doctor.

Heavy imports stay inside the functions.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from flywheel_fast.errors import BadInput, Failure, Stopped

EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130
FORMATS = ("csv", "label-studio", "cvat", "fiftyone", "folder")
EXPORTS = ("onnx", "torchscript", "safetensors")
EXAMPLES = """examples:
  flywheel-fast train                                     real digits, 40 % of the labels wrong
  flywheel-fast train digits cycle.kind=cross_entropy     the same with plain cross-entropy
  flywheel-fast train cifar10_small data.root=DIR data.noise.kind=symmetric data.noise.rate=0.5
  flywheel-fast train digits --out runs/a --resume auto   go on where runs/a stands, else start
  flywheel-fast audit PHOTOS                              which labels of a folder of pictures are wrong
  flywheel-fast config show digits optim.lr=0.1           what a run would use, with help
  flywheel-fast data check cifar10_small data.root=DIR    counts, broken files, duplicates
  flywheel-fast data make-fixture clothing1m DIR          a miniature, to try configs/clothing1m.yaml on
"""


def main(words: list[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(words)  # argparse wants all positional words in one place; users do not
    if any(word.startswith("-") for word in rest) or not hasattr(args, "words"):
        parser.parse_args(words)
    else:
        args.words += rest
    try:
        args.run(args)
        return 0
    except BadInput as error:
        return _ended(args, error, EXIT_BAD_INPUT)
    except Failure as error:
        return _ended(args, error, EXIT_FAILURE)
    except Stopped as error:
        return _ended(args, error, EXIT_STOPPED)
    except KeyboardInterrupt:
        folder = getattr(args, "resumable", None)
        how = f"; `flywheel-fast train --resume {folder}` goes on from the last checkpoint" if folder else ""
        print(f"\ninterrupted{how}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `flywheel-fast config ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        message = f"{type(error).__name__}: {error} (unexpected; --debug shows where)"
        return _ended(args, error, EXIT_FAILURE, message)


def _ended(args: argparse.Namespace, error: Exception, status: int, message: str = "") -> int:
    if args.debug:
        raise error
    print(f"flywheel-fast: {message or error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flywheel-fast",
        description="Trains image classifiers on badly labelled images, and says which labels are wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser(
        "train",
        parents=[common],
        help="train on a data set",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="a config (default: digits), and changes")
    train.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/NAME, numbered when taken)")
    train.add_argument(
        "--resume", metavar="auto|PATH", help="go on from a run's last checkpoint; auto: if there is one"
    )
    train.add_argument(
        "--checkpoint-every",
        default="30m",
        metavar="N|Nm",
        help="steps, or minutes, between two checkpoints within an epoch; each epoch ends with one (default: 30m)",
    )
    train.add_argument("--init-labels", metavar="RUN", help="start from what an earlier run found: cycle.init_labels")
    train.add_argument("--overwrite", action="store_true", help="replace the run that stands in the folder")
    train.set_defaults(run=_train)

    audit = commands.add_parser("audit", parents=[common], help="which labels of a folder of pictures are wrong")
    audit.add_argument("pictures", metavar="FOLDER|TABLE", help="class folders, or a CSV file with file_name and label")
    audit.add_argument("words", nargs="*", metavar="key=value", help="changes of the configs photos and embeddings")
    audit.add_argument("--out", metavar="DIR", help="the run's folder; goes on there (default: runs/audit-FOLDER)")
    audit.set_defaults(run=_audit)

    embed = commands.add_parser("embed", parents=[common], help="features of all images, to train heads on")
    embed.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="a config with pretrained weights")
    embed.add_argument("-o", required=True, metavar="FEATURES", help="a new folder, or one to go on with")
    embed.add_argument("--draws", type=int, default=1, metavar="N", help="weak and strong views of each image (1)")
    embed.set_defaults(run=_embed)

    report = commands.add_parser("report", parents=[common], help="a page of what a run found, or of how runs compare")
    report.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a finished run")
    report.add_argument("-o", metavar="FILE", help="the page (default: RUN/report.html; of several: comparison.html)")
    report.add_argument("--images", metavar="DIR", help="where the images lie now, if they have moved since")
    report.set_defaults(run=_report)

    review = commands.add_parser("review", parents=[common], help="a page on which to decide which labels are right")
    review.add_argument("reviewed", metavar="RUN", help="the folder of a finished run")
    review.add_argument("--port", type=int, default=0, metavar="N", help="of the page (default: any free one)")
    review.set_defaults(run=_review)

    labels = commands.add_parser("labels", help="suspects to a reviewing tool, and its answers back")
    actions = labels.add_subparsers(required=True, metavar="action")
    export = actions.add_parser("export", parents=[common], help="the suspects of a run, as tasks of a reviewing tool")
    export.add_argument("exported", metavar="RUN", help="the folder of a finished run")
    export.add_argument("--format", required=True, choices=FORMATS, help="the tool's; folder: links, a folder a class")
    export.add_argument("-o", metavar="DIR", help="a new folder (default: RUN/review/FORMAT)")
    export.set_defaults(run=_labels_export)
    back = actions.add_parser("import", parents=[common], help="answers, as labels in the form in which the input came")
    back.add_argument("reviewed", metavar="RUN", help="the run whose labels were reviewed")
    back.add_argument("answers", metavar="FILE", help="a file or folder in any format of export")
    back.add_argument("-o", metavar="CSV", help="the corrected labels (default: RUN/review/corrected.csv)")
    back.add_argument("--links", metavar="DIR", help="also a tree of links to the images, to train on")
    back.set_defaults(run=_labels_import)
    diff = actions.add_parser("diff", parents=[common], help="what differs between two sets of labels")
    diff.add_argument("a", metavar="A", help="a run, or labels in any format of export")
    diff.add_argument("b", metavar="B", help="likewise")
    diff.add_argument("-o", metavar="CSV", help="the files whose label differs, one a row")
    diff.set_defaults(run=_labels_diff)

    predict = commands.add_parser("predict", parents=[common], help="the likeliest classes of pictures")
    predict.add_argument("network", metavar="RUN", help="the folder of a finished run")
    predict.add_argument("images", nargs="+", metavar="FOLDER|FILE", help="pictures, or folders of them")
    predict.add_argument("-o", required=True, metavar="CSV", help="a row a picture")
    predict.add_argument("--top", type=int, default=3, metavar="K", help="classes in a row, likeliest first (3)")
    predict.set_defaults(run=_predict)
    evaluate = commands.add_parser("evaluate", parents=[common], help="how many labels of a set a network gets right")
    evaluate.add_argument("network", metavar="RUN", help="the folder of a finished run")
    evaluate.add_argument("data", metavar="DATA", help="class folders or a CSV file; the test split where there is one")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", parents=[common], help="a network as one file for other programs")
    export.add_argument("network", metavar="RUN", help="the folder of a finished run")
    export.add_argument("--format", required=True, choices=EXPORTS, help="of the file")
    export.add_argument("-o", metavar="FILE", help="a new file (default: RUN/export/model.*)")
    export.set_defaults(run=_export)

    config = commands.add_parser("config", help="list, show or check configs")
    actions = config.add_subparsers(required=True, metavar="action")
    actions.add_parser("ls", parents=[common], help="the configs that come with the package").set_defaults(
        run=_config_ls
    )
    show = actions.add_parser("show", parents=[common], help="a config as a run would use it, with help")
    show.add_argument("words", nargs="*", metavar="NAME | key=value", help="a config (default: digits), and changes")
    show.set_defaults(run=_config_show)
    check = actions.add_parser("check", parents=[common], help="check a file without running it")
    check.add_argument("file", metavar="FILE", help="a YAML file")
    check.set_defaults(run=_config_check)

    data = commands.add_parser("data", help="check a data set, its noise, or make a miniature of a published one")
    actions = data.add_subparsers(required=True, metavar="action")
    check = actions.add_parser("check", parents=[common], help="what a training would see; finds broken files")
    check.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="a config (default: digits), and changes")
    check.add_argument("--out", metavar="DIR", help="where bad_files.csv and contact.png go (default: checks/NAME)")
    check.set_defaults(run=_data_check)
    noise = actions.add_parser("noise", parents=[common], help="the realised noise: rate and class matrix")
    noise.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="a config (default: digits), and changes")
    noise.add_argument(
        "--write", metavar="FILE", help="write the labels: .json as DivideMix's, .npy as CIFAR-N's, .npz"
    )
    noise.set_defaults(run=_data_noise)
    fixture = actions.add_parser("make-fixture", parents=[common], help="a miniature in a published layout")
    fixture.add_argument("kind", metavar="KIND", help="clothing1m, webvision, tiny-imagenet, cifar10 or cifar100")
    fixture.add_argument("folder", metavar="DIR", help="a new folder")
    fixture.add_argument("--images", metavar="FOLDER", help="pictures to make it of (default: drawn ones)")
    fixture.set_defaults(run=_data_make_fixture)

    doctor = commands.add_parser("doctor", parents=[common], help="check this installation")
    doctor.set_defaults(run=_doctor)
    return parser


def _config_and_changes(words: list[str], default: str | None = "digits") -> tuple[str | None, list[str]]:
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise BadInput(f"one config at a time, not {', '.join(names)}; changes are written key=value")
    return (names[0] if names else default), [word for word in words if "=" in word]


def _train(args: argparse.Namespace) -> None:
    from flywheel_fast import config, run_folder
    from flywheel_fast.checkpoint import write_atomic
    from flywheel_fast.distributed import Group
    from flywheel_fast.pauses import Pauses
    from flywheel_fast.trainer import Config, Trainer

    pauses = Pauses(args.checkpoint_every)
    if args.resume and args.overwrite:
        raise BadInput("--resume and --overwrite exclude each other; leave one out")
    if args.init_labels:
        args.words.append(f"cycle.init_labels={json.dumps(args.init_labels)}")
    at_path = args.resume not in (None, "auto")
    name, changes = _config_and_changes(args.words, default=None if at_path else "digits")
    if at_path and name is None:
        name = str(run_folder.to_resume(args.resume, args.out, "") / "config.yaml")
    cfg = config.load(Config, name, changes)

    def folder() -> tuple[Path, bool]:
        """And whether to go on with what is in it."""
        begun = group.launcher and run_folder.begun_by(group.launcher, args.out, cfg.name)
        if begun:  # with these words: a process has died since
            args.resume, args.overwrite, args.out = args.resume or "auto", False, str(begun)
        found = run_folder.to_resume(args.resume, args.out, cfg.name) if args.resume else None
        new = found or run_folder.create(args.out, cfg.name, args.overwrite, resuming=args.resume == "auto")
        args.lock = run_folder.lock(new)  # until the process ends
        if group.launcher:
            write_atomic(new / run_folder.LAUNCHER, group.launcher.encode())
        return new, found is not None

    group = Group.join()
    out, resume = group.first(folder)
    try:
        with pauses.listening():
            Trainer(cfg, out, resume, pauses, group).run()
    except KeyboardInterrupt:
        args.resumable = out if run_folder.resumable(out) else None
        raise
    except BadInput:
        if not group.rank:
            run_folder.leave(out)
        raise
    finally:
        group.leave()


def _audit(args: argparse.Namespace) -> None:
    from flywheel_fast import run_folder
    from flywheel_fast.folder_audit import audit
    from flywheel_fast.pauses import Pauses

    pictures = Path(args.pictures)
    out = Path(args.out or Path("runs", f"audit-{pictures.resolve().stem}"))
    _, changes = _config_and_changes(args.words, default=None)
    if not (out / "result.json").exists():
        run_folder.create(str(out), out.name, overwrite=False, resuming=True)
    args.lock = run_folder.lock(out)  # until the process ends
    pauses = Pauses()
    try:
        with pauses.listening():
            page, count = audit(pictures, out, changes, pauses, _say_left)
    except BadInput:
        run_folder.leave(out)
        raise
    print(f"{count:,} pictures: {page}")


def _embed(args: argparse.Namespace) -> None:
    from flywheel_fast import config
    from flywheel_fast.embed import embed
    from flywheel_fast.pauses import Pauses
    from flywheel_fast.trainer import Config

    if args.draws < 0:
        raise BadInput(f"--draws must not be negative, not {args.draws}")
    name, changes = _config_and_changes(args.words)
    with Pauses().listening() as pauses:
        count = embed(config.load(Config, name, changes), Path(args.o), args.draws, _say_left, pauses)
    print(f"features of {count:,} images: train on them with `flywheel-fast train embeddings data.features={args.o}`")


def _say_left(seconds: float) -> None:
    time = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    print(f"seeing all pictures takes about {time} more", flush=True)


def _report(args: argparse.Namespace) -> None:
    from flywheel_fast import report

    images = _path(args.images)
    if images and not images.is_dir():
        raise BadInput(f"--images {images}: is not a folder")
    print(report.write([Path(run) for run in args.runs], _path(args.o), images))


def _review(args: argparse.Namespace) -> None:
    from flywheel_fast import review

    review.serve(Path(args.reviewed), args.port)


def _labels_export(args: argparse.Namespace) -> None:
    from flywheel_fast import labels

    out, count = labels.export(Path(args.exported), args.format, _path(args.o))
    print(f"{count:,} suspects in {out}")


def _labels_import(args: argparse.Namespace) -> None:
    from flywheel_fast import labels

    done = labels.import_(Path(args.reviewed), Path(args.answers), _path(args.o), _path(args.links))
    print(f"{done.reviewed:,} labels reviewed, {done.changed:,} of them changed: {done.corrected}")
    if measured := done.measured():
        print(measured)


def _labels_diff(args: argparse.Namespace) -> None:
    from flywheel_fast import labels

    print("\n".join(labels.diff(Path(args.a), Path(args.b), _path(args.o))))


def _predict(args: argparse.Namespace) -> None:
    from flywheel_fast.predict import predict

    if args.top < 1:
        raise BadInput(f"--top must be at least 1, not {args.top}")
    count = predict(Path(args.network), args.images, Path(args.o), args.top)
    print(f"{count:,} pictures: {args.o}")


def _evaluate(args: argparse.Namespace) -> None:
    from flywheel_fast.predict import evaluate

    found = evaluate(Path(args.network), Path(args.data))
    print(f"accuracy {found.accuracy:.4f} on {found.count:,} ({found.split})")
    for name, count, accuracy in found.by_class:
        print(f"  {accuracy:.4f} of {count:,}  {name}")


def _export(args: argparse.Namespace) -> None:
    from flywheel_fast.export import export

    out, checked = export(Path(args.network), args.format, _path(args.o))
    print(f"{out} ({checked})")


def _path(word: str | None) -> Path | None:
    return Path(word) if word else None


def _config_ls(args: argparse.Namespace) -> None:
    from flywheel_fast import config

    for name, path in config.shipped().items():
        first = path.read_text().splitlines()[0]
        print(f"{name:<24} {first.removeprefix('#').strip()}")


def _config_show(args: argparse.Namespace) -> None:
    from flywheel_fast import config
    from flywheel_fast.trainer import Config

    name, changes = _config_and_changes(args.words)
    print(config.dump(config.load(Config, name, changes), comments=True))


def _config_check(args: argparse.Namespace) -> None:
    from flywheel_fast import config
    from flywheel_fast.trainer import Config

    config.load(Config, args.file)
    print(f"{args.file}: valid")


def _data_config(args: argparse.Namespace):
    from rich.console import Console

    from flywheel_fast import config
    from flywheel_fast.trainer import Config

    name, changes = _config_and_changes(args.words)
    return config.load(Config, name, changes), Console(highlight=False, soft_wrap=True)


def _data_check(args: argparse.Namespace) -> None:
    from flywheel_fast.data import check

    cfg, console = _data_config(args)
    check.check(cfg.data, Path(args.out or Path("checks", cfg.name)), console)


def _data_noise(args: argparse.Namespace) -> None:
    from flywheel_fast.data import check

    cfg, console = _data_config(args)
    check.say_noise(cfg.data, Path(args.write) if args.write else None, console)


def _data_make_fixture(args: argparse.Namespace) -> None:
    from flywheel_fast.data import fixtures

    fixtures.make(args.kind, Path(args.folder), Path(args.images) if args.images else None)
    print(f"{args.folder}: a miniature of {args.kind}; train on it with data.root={args.folder}")


def _doctor(args: argparse.Namespace) -> None:
    from flywheel_fast import doctor

    if not doctor.report():
        raise Failure("something is broken: see the lines above")
