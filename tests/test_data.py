"""Sources, noise and order: what a training sees, and what is refused by name."""

import shutil

import numpy as np
import pytest
from conftest import CLASSES
from PIL import Image

from flywheel_fast.data import noise, sources
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.data.order import epoch_order
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.errors import BadInput


def csv(folder, text, name="table.csv"):
    (folder / name).write_text(text)
    return DataConfig("csv", str(folder / name))


# -- sources -----------------------------------------------------------------------------------------------------------


def test_digits_are_written_once_and_read_again():
    first, second = load(DataConfig()), load(DataConfig())
    assert (len(first.train), len(first.test), first.train.classes) == (1347, 450, tuple("0123456789"))
    assert first.train.digest == second.train.digest
    assert np.bincount(first.train.labels).min() > 125
    assert first.train.true_labels is None  # nobody has said that the labels are right


def test_class_folders_in_sorted_order(folder):
    data = load(DataConfig("folder", str(folder)))
    assert data.train.classes == CLASSES
    assert data.train.files.tolist() == sorted(data.train.files.tolist())
    assert np.bincount(data.train.labels).tolist() == [7, 5, 6] and len(data.test) == 6
    assert all((data.train.root / file).is_file() for file in data.train.files)


def test_folders_without_a_test_split_set_some_aside(folder):
    data = load(DataConfig("folder", str(folder / "train"), holdout=0.3))
    assert set(data.train.files) | set(data.test.files) == {
        str(path.relative_to(folder / "train")) for path in (folder / "train").rglob("*.*g")
    }
    assert not set(data.train.files) & set(data.test.files)
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    again = load(DataConfig("folder", str(folder / "train"), holdout=0.3))
    other = load(DataConfig("folder", str(folder / "train"), holdout=0.3, seed=1))
    assert again.test.digest == data.test.digest != other.test.digest


def test_a_noise_file_is_for_all_files_and_what_is_set_aside_keeps_the_source_labels(folder, tmp_path):
    np.save(tmp_path / "n.npy", np.zeros(18, dtype=np.int64))
    noisy = NoiseConfig("file", file=str(tmp_path / "n.npy"))
    data = load(DataConfig("folder", str(folder / "train"), holdout=0.3, noise=noisy))
    clean = load(DataConfig("folder", str(folder / "train"), holdout=0.3))
    assert data.test.digest == clean.test.digest and data.train.files.tolist() == clean.train.files.tolist()
    assert not data.train.labels.any() and data.train.true_labels.tolist() == clean.train.labels.tolist()
    assert len(data.noisy_labels) == 18


def test_csv_with_splits_true_labels_and_awkward_names(folder):
    text = 'file_name,label,split,true_label\ntrain/cat/0.jpg,"a, ""b""",train,NA\ntrain/dog/0.jpg,NA,train,NA\n'
    data = load(csv(folder, text + "test/owl/0.jpg,NA,test,NA\n"))
    assert data.train.classes == ("NA", 'a, "b"')
    assert data.train.labels.tolist() == [1, 0] and data.train.true_labels.tolist() == [0, 0]
    assert data.test.labels.tolist() == [0]


def test_numeric_class_names_in_numeric_order(folder):
    rows = "".join(f"train/cat/{i}.{('jpg', 'png')[i % 2]},{label}\n" for i, label in enumerate([10, 9, 2, 10, 9, 2]))
    assert load(csv(folder, "file_name,label\n" + rows)).train.classes == ("2", "9", "10")


def test_folders_called_by_numbers_are_classes_in_numeric_order(folder):
    for split in ("train", "test"):
        for name, number in zip(CLASSES, ("10", "9", "2"), strict=True):
            (folder / split / name).rename(folder / split / number)
    train = load(DataConfig("folder", str(folder))).train
    assert train.classes == ("2", "9", "10")
    assert train.files.tolist() == sorted(train.files.tolist())  # what the order of a noise file rests on
    assert [train.classes[label] for label in train.labels] == [file.split("/")[1] for file in train.files]


def test_hidden_files_are_passed_over_and_linked_folders_entered(folder, tmp_path):
    shutil.copytree(folder / "train" / "cat", tmp_path / "more")
    (folder / "train" / "dog" / "more").symlink_to(tmp_path / "more")
    (folder / "train" / "dog" / "again").symlink_to(folder / "train" / "dog")  # leads back: not entered
    (folder / "train" / "dog" / "._0.jpg").write_bytes(b"")
    assert np.bincount(load(DataConfig("folder", str(folder))).train.labels).tolist() == [7, 12, 6]


def test_subsets_are_seeded_and_balanced():
    data = load(DataConfig(train_size=103, test_size=20))
    assert sorted(np.bincount(data.train.labels).tolist()) == [10] * 7 + [11] * 3
    assert load(DataConfig(train_size=103, test_size=20)).train.digest == data.train.digest
    assert load(DataConfig(train_size=103, test_size=20, seed=1)).train.digest != data.train.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: shutil.rmtree(root), ["data.root", "is not a folder"]),
        (lambda root: (root / "train" / "emu").mkdir(), ["train/emu", "no images"]),
        (
            lambda root: shutil.copytree(root / "test" / "owl", root / "test" / "emu"),
            ["test/emu", "no training images"],
        ),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in CLASSES], ["train", "no class folders"]),
        (
            lambda root: [shutil.rmtree(root / s / c) for s in ("train", "test") for c in CLASSES[1:]],
            ["one class only"],
        ),
        (
            lambda root: [file.unlink() for file in (root / "test").rglob("*.jpg")],
            ["data/test", "no images"],
        ),
    ],
)
def test_bad_folders_are_named(folder, change, said):
    change(folder)
    with pytest.raises(BadInput) as error:
        load(DataConfig("folder", str(folder)))
    assert all(part in str(error.value) for part in said), error.value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,label\na,b\n", ["table.csv", "'file_name'", "name, label"]),
        ("file_name,label\ntrain/cat/0.jpg,a\n../secret.jpg,b\n", ["row 3", "../secret.jpg", "outside"]),
        ("file_name,label\n/etc/passwd,b\n", ["row 2", "outside"]),
        (
            "file_name,label,split\ntrain/cat/99.jpg,b,train\ntrain/dog/0.jpg,a,train\ntest/cat/0.jpg,a,test\n",
            ["train/cat/99.jpg", "does not exist"],
        ),
        ("file_name,label\ntrain/cat/0.jpg,\n", ["row 2", "empty label"]),
        ("file_name,label\ntrain/cat/0.jpg,a\ntrain/cat/0.jpg,b\n", ["row 3", "again"]),
        ("file_name,label\ntrain/cat/0.jpg,a\n./train/cat/0.jpg,b\n", ["row 3", "again"]),
        ("file_name,label,label\ntrain/cat/0.jpg,a,b\n", ["table.csv", "2 columns 'label'"]),
        ("file_name,label,split\ntrain/cat/0.jpg,a,trian\n", ["row 2", "trian"]),
        ("file_name,label,split\ntrain/cat/0.jpg,a,test\n", ["no training rows"]),
        ("file_name,label,split\ntrain/cat/0.jpg,a,train\ntrain/dog/0.jpg,z,test\n", ["row 3", "'z'"]),
        ("file_name,label\ntrain/cat/0.jpg,a\ntrain/dog/0.jpg\n", ["is not a CSV"]),
        ("", ["is not a CSV"]),
    ],
)
def test_bad_tables_are_named(folder, text, said):
    with pytest.raises(BadInput) as error:
        load(csv(folder, text))
    assert all(part in str(error.value) for part in said), error.value


def test_a_subset_larger_than_a_class_is_named(folder):
    with pytest.raises(BadInput, match=r"data\.train_size=18 asks for 6 images of class 'dog', which has 5"):
        load(DataConfig("folder", str(folder), train_size=18))


def test_a_subset_that_leaves_classes_out_is_refused(folder):
    with pytest.raises(BadInput, match=r"data\.train_size=2 leaves classes without an image; give at least 3"):
        load(DataConfig("folder", str(folder), train_size=2))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"file/flywheel-fast: cannot be written .*XDG_CACHE_HOME"):
        load(DataConfig())


# -- noise -------------------------------------------------------------------------------------------------------------

TRUE = np.repeat(np.arange(3), 1000)


def test_symmetric_noise_is_exact_seeded_and_covers_all_classes():
    config = NoiseConfig("symmetric", 0.4, seed=3)
    noisy = noise.apply(TRUE, CLASSES, config)
    assert np.array_equal(noisy, noise.apply(TRUE, CLASSES, config))
    assert noise.digest(noisy) != noise.digest(noise.apply(TRUE, CLASSES, NoiseConfig("symmetric", 0.4, seed=4)))
    assert abs(np.mean(noisy != TRUE) - 0.4 * 2 / 3) < 0.02
    others = noise.apply(TRUE, CLASSES, NoiseConfig("symmetric", 0.4, exclude_true=True))
    assert np.sum(others != TRUE) == 1200
    assert not np.any(noise.apply(TRUE, CLASSES, NoiseConfig("symmetric", 0.0)) != TRUE)


def test_asymmetric_noise_follows_its_map_at_its_rate():
    noisy = noise.apply(TRUE, CLASSES, NoiseConfig("asymmetric", 0.25, mapping={"cat": "dog", "owl": "cat"}))
    moved = [[int(np.sum((TRUE == y) & (noisy == j))) for j in range(3)] for y in range(3)]
    assert moved == [[750, 250, 0], [0, 1000, 0], [250, 0, 750]]


def test_pair_noise_moves_to_the_next_class():
    noisy = noise.apply(TRUE, CLASSES, NoiseConfig("pair", 0.4))
    moved = [[int(np.sum((TRUE == y) & (noisy == j))) for j in range(3)] for y in range(3)]
    assert moved == [[600, 400, 0], [0, 600, 400], [400, 0, 600]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """300 images; those of one class look alike in two ways, by turns."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    looks = rng.integers(256, size=(3, 2, 20, 20, 3))
    for i in range(300):
        look = np.clip(looks[i // 100, i % 2] + rng.normal(0, 1, (20, 20, 3)), 0, 255)
        Image.fromarray(look.astype(np.uint8)).save(root / f"{i}.png")
    return root, np.array([f"{i}.png" for i in range(300)])


def test_instance_noise_depends_on_the_image(pictures):
    true, config = np.repeat(np.arange(3), 100), NoiseConfig("instance", 0.4, seed=3)
    noisy = noise.apply(true, CLASSES, config, *pictures)
    assert np.array_equal(noisy, noise.apply(true, CLASSES, config, *pictures))
    assert not np.array_equal(noisy, noise.apply(true, CLASSES, NoiseConfig("instance", 0.4, seed=4), *pictures))
    assert not np.any(noise.apply(true, CLASSES, NoiseConfig("instance", 0.0), *pictures) != true)
    assert 0.3 < np.mean(noisy != true) < 0.5
    for label in range(3):  # images that look alike go wrong alike
        for half in range(2):
            wrong = [n for n in noisy[(true == label) & (np.arange(300) % 2 == half)] if n != label]
            assert np.bincount(wrong, minlength=3).max() > 0.9 * len(wrong)


def test_an_image_that_instance_noise_cannot_read_changes_no_other_label(folder):
    config = DataConfig("folder", str(folder), noise=NoiseConfig("instance", 0.5))
    before = load(config).train
    (folder / "train" / "dog" / "2.jpg").write_bytes(b"not an image")  # a training leaves it out
    after = load(config).train
    others = before.files != "train/dog/2.jpg"
    assert np.array_equal(after.labels[others], before.labels[others]) and others.sum() == 17


def test_imbalance_leaves_a_geometric_row_of_classes(folder):
    config = DataConfig(imbalance=10, train_size=1000, noise=NoiseConfig("symmetric", 0.0))
    counts = np.bincount(load(config).train.true_labels)
    assert counts.tolist() == [round(100 * 10 ** (-label / 9)) for label in range(10)]
    with pytest.raises(ValueError, match="data.imbalance must be at least 1, not 0.5"):
        DataConfig(imbalance=0.5)


def test_labels_come_back_from_every_kind_of_file(tmp_path):
    noisy = noise.apply(TRUE, CLASSES, NoiseConfig("symmetric", 0.4))
    noise.save(tmp_path / "a.npz", noisy, np.zeros((3, 3), int))
    np.save(tmp_path / "a.npy", noisy.astype(np.uint8))
    np.savez(tmp_path / "two.npz", worse_label=noisy, clean_label=TRUE)
    (tmp_path / "a.csv").write_text("label\n" + "\n".join(CLASSES[label] for label in noisy))
    for name, key in (("a.npz", None), ("a.npy", None), ("two.npz", "worse_label"), ("a.csv", None)):
        read = noise.apply(TRUE, CLASSES, NoiseConfig("file", file=str(tmp_path / name), key=key))
        assert np.array_equal(read, noisy) and read.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        (np.zeros(7, int), None, ["7 labels", "3,000"]),
        (np.full(3000, 3), None, ["row 0", "label 3", "0..2"]),
        (np.full(3000, -1), None, ["label -1"]),
        (np.zeros(3000), None, ["float64"]),
        (np.full(3000, "emu"), None, ["row 0", "'emu'"]),
        ({"a": TRUE, "b": TRUE}, None, ["data.noise.key", "a, b"]),
        ({"a": TRUE}, "c", ["data.noise.key=c", "a"]),
        (b"nothing", None, ["cannot be read"]),
        (None, None, ["no such file"]),
    ],
)
def test_bad_noise_files_are_named(tmp_path, content, key, said):
    path = tmp_path / ("n.npz" if isinstance(content, dict) else "n.npy")
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(BadInput) as error:
        noise.apply(TRUE, CLASSES, NoiseConfig("file", file=str(path), key=key))
    assert path.name in str(error.value)
    assert all(part in str(error.value) for part in said), error.value


def test_noise_is_matched_before_the_subset(tmp_path):
    full = load(DataConfig(noise=NoiseConfig("symmetric", 0.5)))
    noise.save(tmp_path / "n.npz", full.noisy_labels, np.zeros((3, 3), int))
    part = load(DataConfig(train_size=100, noise=NoiseConfig("file", file=str(tmp_path / "n.npz"))))
    of_file = dict(zip(full.train.files.tolist(), full.train.labels.tolist(), strict=True))
    assert [of_file[file] for file in part.train.files.tolist()] == part.train.labels.tolist()
    assert np.bincount(part.train.true_labels).tolist() == [10] * 10


def test_a_noise_table_that_names_its_files_may_have_any_order(folder):
    train = load(DataConfig("folder", str(folder))).train
    wanted = {file: CLASSES[(label + 1) % 3] for file, label in zip(train.files.tolist(), train.labels, strict=True)}
    rows = "".join(f"{file},{wanted[file]}\n" for file in reversed(wanted))
    (folder / "noise.csv").write_text("file_name,label\n" + rows)
    config = DataConfig("folder", str(folder), noise=NoiseConfig("file", file=str(folder / "noise.csv")))
    noisy = load(config).train
    assert [CLASSES[label] for label in noisy.labels] == [wanted[file] for file in noisy.files.tolist()]
    (folder / "noise.csv").write_text("file_name,label\n" + rows[rows.index("\n") + 1 :])
    with pytest.raises(BadInput, match=r"noise\.csv: has no row for the training file 'train/owl/"):
        load(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,label\na,cat\na,dog\n", "row 3 names 'a' again"),
        ("label,label\ncat,dog\n", "2 columns 'label'"),
        ('label\ncat\n""\n', "row 3 has an empty label"),
        ("name\ncat\n", "no column 'label', only name"),
    ],
)
def test_bad_noise_tables_are_named(tmp_path, text, said):
    (tmp_path / "n.csv").write_text(text)
    with pytest.raises(BadInput, match=rf"n\.csv: .*{said}"):
        noise.apply(
            np.zeros(2, np.int64),
            CLASSES,
            NoiseConfig("file", file=str(tmp_path / "n.csv")),
            files=np.array(["a", "b"]),
        )


def test_labels_in_a_noise_table_are_names_where_classes_are_called_so(tmp_path):
    path = tmp_path / "n.csv"
    config = NoiseConfig("file", file=str(path))
    path.write_text("label\n1\n2\n3\n")
    assert noise.apply(np.zeros(3, np.int64), ("1", "2", "3"), config).tolist() == [0, 1, 2]
    path.write_text("label\n1\n2\n0\n")
    assert noise.apply(np.zeros(3, np.int64), CLASSES, config).tolist() == [1, 2, 0]


def test_an_unknown_class_in_the_map_names_the_nearest():
    with pytest.raises(BadInput, match="'dgo'.*'dog'"):
        noise.apply(TRUE, CLASSES, NoiseConfig("asymmetric", 0.4, mapping={"cat": "dgo"}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoiseConfig("symmetric", 1.5),
        lambda: NoiseConfig("file"),
        lambda: NoiseConfig("matrix", 0.4),
        lambda: DataConfig("folder"),
        lambda: DataConfig("folder", "photos", images="elsewhere"),
        lambda: DataConfig(holdout=1.0),
        lambda: DataConfig(train_size=0),
        lambda: sources.DataConfig(threads=0),
        lambda: DataConfig(seed=-1),
        lambda: NoiseConfig("symmetric", 0.4, seed=-1),
    ],
)
def test_impossible_combinations_are_refused(make):
    with pytest.raises(ValueError, match=r"^data\."):
        make()


# -- order -------------------------------------------------------------------------------------------------------------


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert sorted(epoch_order(100, 1, 2).tolist()) == list(range(100))
    assert np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 1, 2))
    assert not np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 1, 3))
    assert not np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 2, 2))
