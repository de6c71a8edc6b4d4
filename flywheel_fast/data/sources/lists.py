"""Data sets that are published as images and text files that list them: Tiny-ImageNet, Clothing1M, WebVision."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flywheel_fast.data.manifest import Manifest, first_repeated, leads_out, read_table
from flywheel_fast.data.sources.folders import class_folders
from flywheel_fast.errors import BadInput

CLOTHING1M_CLASSES = (
    *("T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker", "Jacket", "Down Coat", "Suit"),
    *("Shawl", "Dress", "Vest", "Underwear"),
)
WEBVISION_VAL = ("val_images_256", "val_images")  # resized, and as collected
MINI = 50


def clothing1m(root: Path) -> tuple[Manifest, Manifest]:
    """Xiao et al., CVPR 2015: a million images with labels from the text around them, and a test set seen by people.

    The lists lie in root or in root/annotations. clean_train and clean_val are not read: nothing learns from them, and
    nothing is selected on them.
    """
    base = root if (root / "noisy_train_key_list.txt").is_file() else root / "annotations"
    if not (base / "noisy_train_key_list.txt").is_file():
        raise BadInput(f"{root}: holds no noisy_train_key_list.txt, nor does {base}; data.root must hold the lists")
    parts = []
    for keys, kv in (("noisy_train_key_list", "noisy_label_kv"), ("clean_test_key_list", "clean_label_kv")):
        keys, kv = base / f"{keys}.txt", base / f"{kv}.txt"
        files = _names(keys, [line.strip() for line in _lines(keys)])
        of_file: dict[str, int] = {}
        named, labels = _labelled(kv, len(CLOTHING1M_CLASSES), "images/0/00/NAME.jpg 3")
        for number, (name, label) in enumerate(zip(named, labels.tolist(), strict=True)):
            if of_file.setdefault(name, label) != label:
                raise BadInput(
                    f"{kv}: line {number + 1} gives {name!r} the label {label}, before {of_file[name]}; keep one"
                )
        for number, name in enumerate(files):
            if name not in of_file:
                raise BadInput(f"{keys}: line {number + 1}: {name!r} has no label in {kv.name}; add one, or remove it")
        labels = np.array([of_file[name] for name in files], dtype=np.int64)
        parts.append(Manifest(root, files, labels, CLOTHING1M_CLASSES))
    train, test = parts
    trained_on = set(train.files.tolist())
    for number, name in enumerate(test.files.tolist()):
        if name in trained_on:
            raise BadInput(
                f"{base / 'clean_test_key_list.txt'}: line {number + 1}: {name!r} is in noisy_train_key_list.txt too; "
                f"take it out of one of the two"
            )
    return train, test


def webvision(root: Path, mini: bool) -> tuple[Manifest, Manifest, Manifest | None]:
    """WebVision 1.0 (Li et al. 2017): images found by the names of ImageNet's 1,000 classes. Tested on its own
    validation images and, if root/imagenet/val is there, on those of ILSVRC-2012.

    `mini`: the protocol of Jiang et al. 2018, the first 50 classes of the Google part.
    """
    synsets = root / "info" / "synsets.txt"
    words = [line.partition(" ") for line in _lines(synsets)]
    classes = _class_names(synsets, [(wnid, names) for wnid, _, names in words])
    kept = classes[:MINI] if mini else classes
    val = next((name for name in WEBVISION_VAL if (root / name).is_dir()), WEBVISION_VAL[0])

    def part(lists: list[str], folder: str) -> Manifest:
        files, labels = [], []
        for name in lists:
            path = root / "info" / name
            names, numbers = _labelled(path, len(classes), f"{'val000001' if folder else 'google/q0001/NAME'}.jpg 3")
            files += _names(path, names, folder)
            labels.append(numbers)
        if len(lists) > 1 and (again := first_repeated(files)) is not None:
            raise BadInput(f"{root / 'info' / lists[-1]}: names {files[again]!r}, which {lists[0]} names too; keep one")
        whole = Manifest(root, files, np.concatenate(labels), kept)
        if not mini:
            return whole
        chosen = np.flatnonzero(whole.labels < MINI)
        if not len(chosen):
            raise BadInput(f"{root / 'info' / lists[0]}: names no image of the first {MINI} classes")
        return whole.subset(chosen)

    engines = ("google",) if mini else ("google", "flickr")
    train = part([f"train_filelist_{engine}.txt" for engine in engines], "")
    wnids = {wnid: label for label, (wnid, _, _) in enumerate(words)}
    return train, part(["val_filelist.txt"], f"{val}/"), _imagenet(root, wnids, kept)


def _imagenet(root: Path, wnids: dict[str, int], classes: tuple[str, ...]) -> Manifest | None:
    """ILSVRC-2012's validation images imagenet/val/*.JPEG, in class folders or as they are unpacked; of `classes`."""
    base = root / "imagenet"
    if not (base / "val").is_dir():
        return None
    if any(entry.is_dir() for entry in os.scandir(base / "val")):
        whole = class_folders(root, "imagenet/val", None)
        where, files, of_file = base / "val", whole.files, [whole.classes[label] for label in whole.labels.tolist()]
    else:
        where, names, of_file = _imagenet_list(base)
        files = np.array(_names(where, [f"{name}.JPEG" for name in names], "imagenet/val/"), dtype=object)
    strange = next((wnid for wnid in of_file if wnid not in wnids), None)
    if strange is not None:
        raise BadInput(
            f"{where}: class {strange!r} is none of {root / 'info' / 'synsets.txt'}; it must be a WordNet id"
        )
    labels = np.array([wnids[wnid] for wnid in of_file], dtype=np.int64)
    rows = np.flatnonzero(labels < len(classes))
    if not len(rows):
        raise BadInput(f"{where}: no image is of the first {len(classes)} classes; add them, or remove imagenet/val")
    return Manifest(root, files[rows], labels[rows], classes)


def _imagenet_list(base: Path) -> tuple[Path, list[str], list[str]]:
    """Where the labels are from, the images' names, and the WordNet id of each: Kaggle's table, or the devkit's lines,
    whose numbers meta.mat explains."""
    solution = base / "LOC_val_solution.csv"
    if solution.is_file():
        table = read_table(str(solution), solution, required=("ImageId", "PredictionString"), optional=())
        boxes = table["PredictionString"].to_pylist()  # the id, four numbers, and so on for each box
        return solution, table["ImageId"].to_pylist(), [box.split(" ")[0] for box in boxes]
    for folder in (base, base / "ILSVRC2012_devkit_t12" / "data"):
        truth, meta = folder / "ILSVRC2012_validation_ground_truth.txt", folder / "meta.mat"
        if not truth.is_file():
            continue
        of_number, of_file = _imagenet_numbers(meta), []
        for number, line in enumerate(_lines(truth)):
            if line.strip() not in of_number:
                raise BadInput(f"{truth}: line {number + 1}: {line!r} is no ILSVRC2012_ID of {meta}")
            of_file.append(of_number[line.strip()])
        return truth, [f"ILSVRC2012_val_{number + 1:08}" for number in range(len(of_file))], of_file
    raise BadInput(
        f"{base / 'val'}: holds no class folders; {base} must then hold LOC_val_solution.csv, or "
        f"ILSVRC2012_devkit_t12 as it is unpacked"
    )


def _imagenet_numbers(meta: Path) -> dict[str, str]:
    """WordNet id of each ILSVRC2012_ID."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(meta, squeeze_me=True)["synsets"])
        return {str(int(one["ILSVRC2012_ID"])): str(one["WNID"]) for one in synsets}
    except Exception as error:  # scipy has many for what is no MATLAB file
        reason = " ".join(str(error).split())
        raise BadInput(f"{meta}: is not the devkit's table of synsets ({reason}); unpack the devkit again") from error


def tiny_imagenet(root: Path) -> tuple[Manifest, Manifest]:
    """Tiny-ImageNet-200: train/WNID/images/*.JPEG, and the validation images with val/val_annotations.txt."""
    if not (root / "train").is_dir():
        raise BadInput(f"{root}: holds no folder train; data.root must be tiny-imagenet-200 as it is unpacked")
    train = class_folders(root, "train", None)
    path = root / "val" / "val_annotations.txt"
    of_wnid = {wnid: label for label, wnid in enumerate(train.classes)}
    files, labels = [], []
    for number, line in enumerate(_lines(path)):
        fields = line.split("\t")
        if len(fields) < 2:
            raise BadInput(f"{path}: line {number + 1}: {line!r} is not of the form NAME.JPEG<tab>WNID<tab>...")
        if fields[1] not in of_wnid:
            raise BadInput(
                f"{path}: line {number + 1}: {fields[1]!r} is no class with a folder in {root / 'train'}; "
                f"the first one is {train.classes[0]}"
            )
        files.append(fields[0])
        labels.append(of_wnid[fields[1]])
    files = _names(path, files, "val/images/")
    words = dict(line.partition("\t")[::2] for line in _lines(root / "words.txt"))
    unnamed = [wnid for wnid in train.classes if wnid not in words]
    if unnamed:
        raise BadInput(f"{root / 'words.txt'}: has no line {unnamed[0]}<tab>NAME, but train/{unnamed[0]} is a class")
    classes = _class_names(root / "words.txt", [(wnid, words[wnid]) for wnid in train.classes])
    return (
        Manifest(root, train.files, train.labels, classes),
        Manifest(root, files, np.array(labels, dtype=np.int64), classes),
    )


def _class_names(path: Path, words: list[tuple[str, str]]) -> tuple[str, ...]:
    """The first of each class's synonyms; where classes share it (crane: bird, machine), with its WordNet id."""
    wnids = [wnid for wnid, _ in words]
    if (again := first_repeated(wnids)) is not None:
        raise BadInput(f"{path}: line {again + 1} names {wnids[again]} again; keep one line a class")
    first = [names.split(",")[0].strip() or wnid for wnid, names in words]
    count = Counter(first)
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for (wnid, _), name in zip(words, first, strict=True))


def _lines(path: Path) -> Iterator[str]:
    """Lines of the file, without empty ones at its end; at least one."""
    some, empty = False, 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.isspace():
                    empty += 1
                    continue
                yield from [""] * empty
                yield line.rstrip("\n")
                some, empty = True, 0
    except FileNotFoundError:
        raise BadInput(f"{path}: is missing; the data set as published has it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    if not some:
        raise BadInput(f"{path}: is empty; the data set as published has a line for each image or class")


def _labelled(path: Path, num_classes: int, form: str) -> tuple[list[str], np.ndarray]:
    """Lines `NAME LABEL` as names and labels [lines] int64."""
    names, labels = [], array("q")
    for number, line in enumerate(_lines(path)):
        fields = line.rsplit(None, 1)
        if len(fields) != 2:
            raise BadInput(f"{path}: line {number + 1}: {line!r} is not of the form {form}")
        name, label = fields
        if not (label.isascii() and label.isdigit()):
            raise BadInput(f"{path}: line {number + 1}: label {label!r} is not a number; the form is {form}")
        if len(label) > 9 or int(label) >= num_classes:
            raise BadInput(f"{path}: line {number + 1}: label {label} is outside 0..{num_classes - 1}")
        names.append(name)
        labels.append(int(label))
    return names, np.array(labels, dtype=np.int64)


def _names(path: Path, names: list[str], folder: str = "") -> list[str]:
    """`folder` + each name; all are below the root, and none comes twice."""
    first = 2 if path.suffix == ".csv" else 1  # below the header
    for number, name in enumerate(names):
        if not name or leads_out(name):
            raise BadInput(f"{path}: line {number + first}: {name!r} is not a path below the data root")
    again = first_repeated(names)
    if again is not None:
        raise BadInput(f"{path}: line {again + first} names {names[again]!r} again; keep one line a file")
    return [folder + name for name in names] if folder else names
