"""Published layouts, tried on miniatures; tables and shards; and what is refused."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import KIND_OF, refused
from PIL import Image

from flywheel_fast.data import cifar, fixtures, pickles
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.errors import BadInput

PUBLISHED = ("cifar10", "cifar100", "tiny_imagenet", "clothing1m", "webvision", "webvision_mini")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# -- as published ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", PUBLISHED)
def test_every_miniature_opens_as_its_source(miniatures, source):
    train, test, *_ = load(DataConfig(source, str(miniatures / KIND_OF.get(source, source))))
    counts = {
        "cifar10": (200, 40, 10),
        "cifar100": (400, 100, 100),
        "tiny_imagenet": (120, 20, 10),
        "clothing1m": (112, 28, 14),
        "webvision": (360, 60, 60),
        "webvision_mini": (200, 50, 50),
    }
    assert (len(train), len(test), len(train.classes)) == counts[source]
    for part in (train, test):
        assert all((part.root / file).is_file() for file in part.files.tolist())
        assert part.classes == train.classes and len(set(part.classes)) == len(part.classes)


@pytest.mark.parametrize(("name", "label_key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_its_pickles_bit_by_bit_and_in_their_order(miniatures, name, label_key):
    train, test, *_ = load(DataConfig(name, str(miniatures / name)))
    base = next((miniatures / name).iterdir())
    batches = [f"data_batch_{number}" for number in range(1, 6)] if name == "cifar10" else ["train"]
    for part, files in ((train, batches), (test, ["test_batch" if name == "cifar10" else "test"])):
        read = [pickle.loads((base / file).read_bytes(), encoding="latin1") for file in files]
        pixels = np.concatenate([batch["data"] for batch in read]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert np.array_equal(np.stack([np.asarray(Image.open(part.root / file)) for file in part.files]), pixels)
        assert part.labels.tolist() == sum((batch[label_key] for batch in read), [])
    assert load(DataConfig(name, str(base))).train.digest == train.digest  # by the folder itself
    assert name == "cifar100" or train.classes == cifar.CIFAR10_CLASSES


def test_cifar_may_be_pickled_by_python_3_too(miniature):
    config = miniature("cifar10")
    before = load(config).train
    for path in Path(config.root).rglob("*_batch*"):
        content = pickle.loads(path.read_bytes(), encoding="latin1")
        path.write_bytes(pickle.dumps({key.encode(): value for key, value in content.items()}))
    assert load(config).train.digest == before.digest


def test_tiny_imagenet_names_its_classes(miniatures):
    train, test, *_ = load(DataConfig("tiny_imagenet", str(miniatures / "tiny-imagenet")))
    assert train.classes[:2] == ("thing 0", "thing 1")
    assert [file.split("/")[1] for file in train.files[::12].tolist()] == [
        f"n{1440764 + 1000 * i:08}" for i in range(10)
    ]
    assert test.files[:2].tolist() == ["val/images/val_0.JPEG", "val/images/val_1.JPEG"]
    assert test.labels.tolist() == np.repeat(np.arange(10), 2).tolist()


def test_clothing1m_trains_on_noisy_labels_and_is_tested_on_clean_ones(miniature):
    config = miniature("clothing1m")
    train, test, *_ = load(config)
    root = Path(config.root)
    noisy = dict(line.split(" ") for line in (root / "noisy_label_kv.txt").read_text().splitlines())
    assert train.files.tolist() == (root / "noisy_train_key_list.txt").read_text().splitlines()
    assert train.labels.tolist() == [int(noisy[file]) for file in train.files.tolist()]
    assert np.bincount(test.labels).tolist() == [2] * 14 and train.classes[8] == "Down Coat"
    (root / "annotations").mkdir()
    for path in root.glob("*.txt"):
        path.rename(root / "annotations" / path.name)
    assert load(config).train.digest == train.digest


def test_webvision_mini_is_the_first_fifty_classes_from_google(miniatures):
    full = load(DataConfig("webvision", str(miniatures / "webvision")))
    mini = load(DataConfig("webvision_mini", str(miniatures / "webvision")))
    assert {file.split("/")[0] for file in full.train.files.tolist()} == {"google", "flickr"}
    assert {file.split("/")[0] for file in mini.train.files.tolist()} == {"google"}
    assert np.bincount(mini.train.labels).tolist() == [4] * 50 and mini.train.classes == full.train.classes[:50]
    assert mini.train.classes[7:9] == ("thing 8 (n01447764)", "thing 8 (n01448764)")  # would be one name
    assert mini.test.files[0] == "val_images_256/val000001.jpg"


def test_a_miniature_of_own_pictures(folder, tmp_path):
    fixtures.make("cifar10", tmp_path / "mini", folder / "train")
    train = load(DataConfig("cifar10", str(tmp_path / "mini"))).train
    pixels = {np.asarray(Image.open(train.root / file)).tobytes() for file in train.files.tolist()}
    assert len(pixels) > 150  # the 18 pictures are cut differently each time
    with pytest.raises(BadInput, match="is there already"):
        fixtures.make("cifar10", tmp_path / "mini")
    with pytest.raises(BadInput, match="holds no images"):
        fixtures.make("cifar10", tmp_path / "other", tmp_path / "mini" / "cifar-10-batches-py")
    assert not (tmp_path / "other").exists()
    with pytest.raises(BadInput, match="webvisio.*choose clothing1m"):
        fixtures.make("webvisio", tmp_path / "other")


def test_webvision_is_tested_on_imagenet_too(miniature):
    config = miniature("webvision_mini")
    data = load(config)
    assert list(data.splits()) == ["train", "test", "imagenet"] and len(data.imagenet) == 50
    assert data.imagenet.classes == data.train.classes and data.imagenet.labels.tolist() == list(range(50))
    assert data.imagenet.files[1] == "imagenet/val/n01441764/ILSVRC2012_val_00000002.JPEG"
    assert len(load(replace(config, source="webvision")).imagenet) == 60
    val = Path(config.root) / "imagenet" / "val"
    (val / "n01441764").rename(val / "tench")
    refused(config, "imagenet/val: class 'tench' is none of", "synsets.txt")
    shutil.rmtree(val)
    assert load(config).imagenet is None


def write_idx(folder, packed, images, labels):
    """The four files of MNIST; test images are the first two."""
    folder.mkdir(exist_ok=True)
    for prefix, count in (("train", None), ("t10k", 2)):
        for what, array in (("images-idx3", images[:count]), ("labels-idx1", labels[:count])):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            content = header + array.astype(np.uint8).tobytes()
            path = folder / f"{prefix}-{what}-ubyte"
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_bit_by_bit_and_in_their_order(tmp_path, packed):
    images, labels = np.random.default_rng(0).integers(256, size=(5, 9, 9)), np.array([3, 9, 0, 3, 1])
    write_idx(tmp_path / "idx", packed, images, labels)
    train, test, *_ = load(DataConfig("fashion_mnist", str(tmp_path / "idx")))
    assert train.labels.tolist() == labels.tolist() and test.labels.tolist() == [3, 9]
    assert train.classes[9] == "Ankle boot" and len(train.classes) == 10
    for file, pixels in zip(train.files, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(train.root / file)), pixels)


def test_damaged_idx_files_are_named(tmp_path):
    config = DataConfig("mnist", str(tmp_path))
    refused(config, tmp_path, "train-images-idx3-ubyte")
    images, labels = np.zeros((4, 9, 9)), np.arange(4)
    write_idx(tmp_path, False, images, labels + 8)
    refused(config, tmp_path, "below 10")
    write_idx(tmp_path, False, images, labels[:3])
    refused(config, "4 images and 3 labels")
    write_idx(tmp_path, False, images, labels)
    path = tmp_path / "t10k-images-idx3-ubyte"
    for content in (path.read_bytes()[:-1], b"", b"text, " * 9):
        path.write_bytes(content)
        refused(config, path, "idx")
    path.with_name(f"{path.name}.gz").write_bytes(b"no gzip")
    refused(config, f"{path.name}.gz", "unpacked")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_where_it_is_not_there(miniatures, tmp_path, monkeypatch, name):
    from torchvision import datasets

    asked = []

    def publish(root, download):
        asked.append((root, download))
        shutil.copytree(miniatures / name, root)

    kind = name.upper()
    monkeypatch.setattr(datasets, kind, publish)
    config = DataConfig(name, str(tmp_path / "data"), download=True)
    assert load(config).train.digest == load(DataConfig(name, str(miniatures / name))).train.digest
    load(config)
    assert asked == [(tmp_path / "data", True)]  # once

    def fail(root, download):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(datasets, kind, fail)
    refused(
        replace(config, root=str(tmp_path / "other")), "data.download=true", "name resolution", "is there a network?"
    )
    with pytest.raises(ValueError, match="data.download=true is for cifar10, cifar100, not for folder"):
        DataConfig("folder", "x", download=True)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_parquet_csv_and_imagefolder_agree(folder):
    expected = load(DataConfig("folder", str(folder)))
    parts = {"train": expected.train, "test": expected.test}
    rows = [
        (file, part.classes[label], split)
        for split, part in parts.items()
        for file, label in zip(part.files.tolist(), part.labels.tolist(), strict=True)
    ]
    columns = dict(zip(("image_path", "label", "split"), map(list, zip(*rows, strict=True)), strict=True))
    pa.parquet.write_table(pa.table(columns), folder / "all.parquet")
    columns["label"] = pa.array(columns["label"]).dictionary_encode()
    pa.parquet.write_table(pa.table(columns), folder / "coded.parquet")
    (folder / "metadata.csv").write_text("file_name,label\n" + "".join(f"{file},{label}\n" for file, label, _ in rows))
    configs = [DataConfig("csv", str(folder / name)) for name in ("all.parquet", "coded.parquet", "")]
    for config in configs:
        data = load(config)
        assert (data.train.digest, data.test.digest) == (expected.train.digest, expected.test.digest)
    (folder / "metadata.csv").unlink()
    for split in parts:
        own = [(file.removeprefix(f"{split}/"), label) for file, label, of in rows if of == split]
        text = "file_name,label\n" + "".join(f"{file},{label}\n" for file, label in own)
        (folder / split / "metadata.csv").write_text(text)
    data = load(DataConfig("csv", str(folder)))
    assert (data.train.digest, data.test.digest) == (expected.train.digest, expected.test.digest)


def test_labels_that_are_names_here_and_numbers_there_are_named(folder):
    (folder / "train" / "metadata.csv").write_text("file_name,label\ncat/0.jpg,cat\ndog/0.jpg,dog\n")
    (folder / "test" / "metadata.csv").write_text("file_name,label\ncat/0.jpg,cat\ndog/0.jpg,1\n")
    refused(DataConfig("csv", str(folder)), "test/metadata.csv: row 3", "'1' is a number", "are names")
    (folder / "train" / "metadata.csv").write_text("file_name,label\ncat/0.jpg,0\ndog/0.jpg,1\n")
    refused(DataConfig("csv", str(folder)), "test/metadata.csv: row 2", "'cat' is a name", "are numbers")
    (folder / "test" / "metadata.csv").write_text("file_name,label\ncat/0.jpg,0\ndog/0.jpg,2\n")
    refused(DataConfig("csv", str(folder)), "test/metadata.csv: row 3", "'2' is the label of no training row")


def test_a_folder_without_a_table_is_named(folder):
    refused(DataConfig("csv", str(folder)), folder, "metadata.csv", "data.source=folder")
    (folder / "x.parquet").write_bytes(b"PAR1")
    refused(DataConfig("csv", str(folder / "x.parquet")), "x.parquet: is not a Parquet file")


# -- shards ------------------------------------------------------------------------------------------------------------


def shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_shards_hold_the_same_samples_as_the_folders(folder, tmp_path):
    expected = load(DataConfig("folder", str(folder)))
    for split, part in (("train", expected.train), ("test", expected.test)):
        samples = []
        for number, (file, label) in enumerate(zip(part.files.tolist(), part.labels.tolist(), strict=True)):
            path, name = folder / file, part.classes[label]
            field = (".cls", name.encode()) if number % 2 else (".json", json.dumps({"label": name}).encode())
            samples.append([(f"./{number:04}{path.suffix}", path.read_bytes()), (f"./{number:04}{field[0]}", field[1])])
        for number in range(2):
            shard(tmp_path / "shards" / f"{split}-{number}.tar", sum(samples[number::2], []))
    config = DataConfig("webdataset", str(tmp_path / "shards"))
    found = load(config)
    for split in ("train", "test"):
        given, want = getattr(found, split), getattr(expected, split)
        assert given.classes == want.classes
        contents = [
            sorted(
                (part.classes[y], (part.root / f).read_bytes()) for f, y in zip(part.files, part.labels, strict=True)
            )
            for part in (given, want)
        ]
        assert contents[0] == contents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # unpacked once
        assert load(config).train.digest == found.train.digest


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.jpg", b"x"), ("b.cls", b"1")], ["sample 'a' has no label", "a.cls"]),
        ([("a.cls", b"1")], ["sample 'a' has no image"]),
        ([("a.jpg", b"x"), ("a.cls", b"\xff")], ["sample 'a' has no label"]),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], ["sample 'a' has no label"]),
        ([("../a.jpg", b"x"), ("../a.cls", b"1")], ["'../a.jpg' leads out"]),
        ([("/a.jpg", b"x")], ["'/a.jpg' leads out"]),
    ],
)
def test_a_bad_shard_is_named_and_leaves_nothing(tmp_path, members, said):
    shard(tmp_path / "shards" / "0.tar", members)
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "flywheel-fast"
    cache.mkdir(exist_ok=True)
    before = set(cache.iterdir())
    refused(DataConfig("webdataset", str(tmp_path / "shards")), "0.tar", *said)
    assert set(cache.iterdir()) == before


def test_what_is_no_shard_is_named(tmp_path):
    refused(DataConfig("webdataset", str(tmp_path)), tmp_path, "no .tar files")
    (tmp_path / "0.tar").write_bytes(b"no tar file" * 100)
    refused(DataConfig("webdataset", str(tmp_path)), "0.tar: is no tar file")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        entry = tarfile.TarInfo("a.jpg")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    refused(DataConfig("webdataset", str(tmp_path)), "'a.jpg' leads out")


# -- bad layouts -------------------------------------------------------------------------------------------------------

BAD = {  # source, file to spoil, from, to; what is said
    "clothing1m": [
        (
            "noisy_label_kv.txt",
            "images/0/00/0000000,00.jpg",
            "",
            ["noisy_label_kv.txt: line 1", "images/0/00/NAME.jpg 3"],
        ),
        ("noisy_label_kv.txt", "01.jpg ", "01.jpg x", ["noisy_label_kv.txt: line 2", "is not a number"]),
        ("noisy_label_kv.txt", "01.jpg ", "01.jpg 1000", ["noisy_label_kv.txt: line 2", "outside 0..13"]),
        (
            "noisy_label_kv.txt",
            "0000001,",
            "0000002,",
            ["noisy_train_key_list.txt: line ", "0000001,01.jpg' has no label"],
        ),
        ("clean_label_kv.txt", "\n", " 0\nimages/0/00/0000000,00.jpg 14\n", ["clean_label_kv.txt: line 2", "0..13"]),
        ("clean_test_key_list.txt", "images/", "../", ["clean_test_key_list.txt: line 1", "below the data root"]),
        ("clean_test_key_list.txt", "images/", "/", ["clean_test_key_list.txt: line 1", "below the data root"]),
        ("clean_test_key_list.txt", "\n", "\n\n", ["clean_test_key_list.txt: line 2", "below the data root"]),
    ],
    "webvision": [
        ("info/synsets.txt", "n01441764", "n01440764", ["synsets.txt: line 2", "again"]),
        ("info/val_filelist.txt", "val000001.jpg 0", "val000001.jpg", ["val_filelist.txt: line 1", "val000001.jpg 3"]),
        ("info/val_filelist.txt", "val000002.jpg 1", "val000002.jpg 60", ["val_filelist.txt: line 2", "0..59"]),
        ("info/val_filelist.txt", "000002", "000001", ["val_filelist.txt: line 2", "again"]),
        (
            "info/train_filelist_flickr.txt",
            "flickr/q0001/000_0",
            "google/q0001/000_0",
            ["flickr", "google", "keep one"],
        ),
    ],
    "tiny_imagenet": [
        ("val/val_annotations.txt", "\t", " ", ["val_annotations.txt: line 1", "is no class"]),
        (
            "val/val_annotations.txt",
            "n01441764",
            "n99999999",
            ["val_annotations.txt: line 3", "n99999999", "n01440764"],
        ),
        ("val/val_annotations.txt", "val_1.", "val_0.", ["val_annotations.txt: line 2", "again"]),
        ("words.txt", "n01440764\t", "n01440764 ", ["words.txt", "n01440764"]),
    ],
}


@pytest.mark.parametrize(
    ("source", "file", "old", "new", "said"), [(source, *case) for source, cases in BAD.items() for case in cases]
)
def test_a_malformed_list_names_file_line_and_form(miniature, source, file, old, new, said):
    config = miniature(source)
    edit(Path(config.root) / file, old, new)
    refused(config, *said)


def test_two_labels_for_one_file_and_one_file_in_two_splits_are_named(miniature):
    config = miniature("clothing1m")
    root = Path(config.root)
    with open(root / "noisy_label_kv.txt", "a") as file:
        first = (root / "noisy_label_kv.txt").read_text().splitlines()[0].split()
        file.write(f"{first[0]} {(int(first[1]) + 1) % 14}\n")
    refused(config, "noisy_label_kv.txt: line 141", first[0], "before")
    shutil.copy(root / "clean_test_key_list.txt", root / "noisy_train_key_list.txt")
    shutil.copy(root / "clean_label_kv.txt", root / "noisy_label_kv.txt")
    refused(config, "clean_test_key_list.txt: line 1", "noisy_train_key_list.txt too")


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("clothing1m", "noisy_train_key_list.txt"),
        ("clothing1m", "clean_label_kv.txt"),
        ("webvision", "info/synsets.txt"),
        ("webvision", "info/train_filelist_google.txt"),
        ("tiny_imagenet", "val/val_annotations.txt"),
        ("tiny_imagenet", "words.txt"),
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar100", "cifar-100-python/meta"),
    ],
)
@pytest.mark.parametrize("harm", ["missing", "empty", "binary"])
def test_a_list_that_is_missing_empty_or_binary_is_named(miniature, source, file, harm):
    config = miniature(source)
    path = Path(config.root) / file
    path.unlink()
    if harm != "missing":
        path.write_bytes(b"\xff\xfe" if harm == "binary" else b"")
    refused(config, path.name)


def test_another_folder_than_the_data_set_is_named(tmp_path):
    for source in PUBLISHED:
        refused(DataConfig(source, str(tmp_path)), tmp_path)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_link_out_of_the_data_root_is_refused(miniature, tmp_path, place):
    config = miniature("clothing1m")
    inner = Path(config.root) / "images" / "0" / "00"
    shutil.copytree(inner, tmp_path / "outside")
    if place == "folder":
        shutil.rmtree(inner)
        inner.symlink_to(tmp_path / "outside")
    else:
        (inner / "0000000,00.jpg").unlink()
        (inner / "0000000,00.jpg").symlink_to(tmp_path / "outside" / "0000000,00.jpg")
    refused(config, "images/0/00", "leads out of", "by a link")
    (tmp_path / "outside").rename(Path(config.root) / "elsewhere")
    link = inner if place == "folder" else inner / "0000000,00.jpg"
    link.unlink()
    link.symlink_to(Path(config.root) / "elsewhere" / ("" if place == "folder" else "0000000,00.jpg"))
    assert len(load(config).train) == 112  # a link that stays inside is a link


def test_the_data_root_itself_may_be_a_link(miniature, tmp_path):
    config = miniature("webvision")
    (tmp_path / "link").symlink_to(config.root)
    assert load(replace(config, root=str(tmp_path / "link"))).train.digest == load(config).train.digest


class _Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    "content", [_Evil(), {"label_names": [_Evil()]}, Path("x"), eval, b"\x80\x04", {"label_names": ["a", "a"]}, [], 3]
)
def test_a_pickle_is_data_or_refused(miniature, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    config = miniature("cifar10")
    path = Path(config.root) / "cifar-10-batches-py" / "batches.meta"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    refused(config, "batches.meta")
    assert not (tmp_path / "harmed").exists()


def test_a_codec_other_than_latin1_is_refused(tmp_path):
    (tmp_path / "p").write_bytes(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(BadInput, match="_codecs.encode with 'rot13'"):
        pickles.load(tmp_path / "p")


@pytest.mark.parametrize(
    "change",
    [
        {"data": np.zeros((40, 3072), np.float32)},
        {"data": np.zeros((40, 1024), np.uint8)},
        {"data": "text"},
        {"labels": [0] * 39},
        {"labels": [10] * 40},
        {"labels": ["a"] * 40},
    ],
)
def test_a_cifar_batch_of_another_form_is_named(miniature, change):
    config = miniature("cifar10")
    path = Path(config.root) / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes(), encoding="latin1") | change))
    refused(config, "data_batch_2", "its 'data' must be" if "data" in change else "its 'labels' must be")
