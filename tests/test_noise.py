"""Noise by a matrix, and the published maps of CIFAR-10 and CIFAR-100."""

import pickle

import numpy as np
import pytest
from conftest import CLASSES

from flywheel_fast.data import cifar, noise
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.errors import BadInput


def test_a_matrix_is_realised_to_the_label(tmp_path):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (1000, 200, 57)))
    matrix = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    np.save(tmp_path / "m.npy", matrix)
    lines = ["true_class,owl,cat,dog", *(f"{n},{r[2]},{r[0]},{r[1]}" for n, r in zip(CLASSES, matrix, strict=True))]
    (tmp_path / "named.csv").write_text("\n".join([lines[0], lines[3], lines[1], lines[2]]))
    (tmp_path / "plain.csv").write_text("\n".join(",".join(map(str, row)) for row in matrix))
    drawn = []
    for name in ("m.npy", "named.csv", "plain.csv"):
        drawn.append(noise.apply(labels, CLASSES, NoiseConfig("matrix", matrix=str(tmp_path / name))))
        assert np.array_equal(drawn[-1], drawn[0])
    counts = noise.realised(labels, drawn[0], 3)
    assert counts.tolist() == [[700, 200, 100], [0, 200, 0], [19, 19, 19]]
    other = noise.apply(labels, CLASSES, NoiseConfig("matrix", matrix=str(tmp_path / "m.npy"), seed=1))
    assert not np.array_equal(other, drawn[0]) and np.array_equal(noise.realised(labels, other, 3), counts)
    assert noise.describe(counts, CLASSES)[2].split() == ["0", "cat", "70.0", "20.0", "10.0"]
    many = tuple(f"c{k}" for k in range(25))
    wide = np.diag(np.full(25, 90))
    wide[3, 4], wide[7, 1] = 10, 30
    assert noise.describe(wide, many)[1:] == ["  c7 -> c1: 30 (25.0 %)", "  c3 -> c4: 10 (10.0 %)"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,0\n0,1", "is 2 x 2, the data set has 3 classes"),
        ("1,0,0\n0,1,0\n0,0,0.9", "class 'owl' must be shares that sum to 1, not to 0.9"),
        ("1,0,0\n0,2,-1\n0,0,1", "class 'dog' must be shares"),
        ("1,0,0\n0,nan,1\n0,0,1", "class 'dog' must be shares"),
        ("x,cat,dog,owl\ncat,1,0,0\ndog,0,1,0", "has no row for the class 'owl'"),
        ("x,cat,dog,cow\ncat,1,0,0\ndog,0,1,0\ncow,0,0,1", "cannot be read as 3 x 3 numbers"),
        ("", "is 0, the data set has 3"),
    ],
)
def test_a_matrix_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "m.csv").write_text(text)
    for path in (tmp_path / "m.csv", tmp_path / "absent.csv"):
        with pytest.raises(BadInput, match=said if path.exists() else "absent.csv: cannot be read"):
            noise.apply(np.arange(3), CLASSES, NoiseConfig("matrix", matrix=str(path)))
    with pytest.raises(ValueError, match="go together"):
        NoiseConfig("matrix")


def test_cifar_100_flips_to_the_next_class_of_the_superclass(miniatures):
    config = DataConfig("cifar100", str(miniatures / "cifar100"), noise=NoiseConfig("asymmetric", 0.5))
    train = load(config).train
    coarse_of = {name: coarse for coarse, names in cifar.CIFAR100_SUPERCLASSES.items() for name in names}
    wrong = train.labels != train.true_labels
    assert wrong.sum() == 200 and len(coarse_of) == 100
    for given, true in zip(train.labels[wrong].tolist(), train.true_labels[wrong].tolist(), strict=True):
        name, was = train.classes[given], train.classes[true]
        assert coarse_of[name] == coarse_of[was]
        peers = [one for one in train.classes if coarse_of[one] == coarse_of[was]]  # in the order of their numbers
        assert peers[(peers.index(was) + 1) % 5] == name
    batch = pickle.loads((miniatures / "cifar100/cifar-100-python/train").read_bytes(), encoding="latin1")
    of_coarse = dict(zip(batch["fine_labels"], batch["coarse_labels"], strict=True))
    published = list(cifar.CIFAR100_SUPERCLASSES)
    assert all(published[of_coarse[k]] == coarse_of[name] for k, name in enumerate(train.classes))


def test_the_map_of_cifar_10_is_built_in_and_others_are_asked_for(miniatures, folder):
    labels = np.repeat(np.arange(10), 10)
    noisy = noise.apply(labels, cifar.CIFAR10_CLASSES, NoiseConfig("asymmetric", 0.4))
    assert np.mean(noisy != labels) == pytest.approx(0.2) and set(noisy[labels == 9]) == {9, 1}
    with pytest.raises(BadInput, match="needs data.noise.mapping"):
        load(DataConfig("folder", str(folder), noise=NoiseConfig("asymmetric", 0.4)))


@pytest.mark.parametrize("kind", ["pair", "symmetric", "asymmetric"])
def test_a_subset_of_equal_seed_is_as_noisy_as_the_whole(kind):
    mapping = {str(digit): str((digit + 1) % 10) for digit in range(10)}
    train = load(DataConfig(train_size=600, noise=NoiseConfig(kind, 0.25, mapping=mapping))).train
    assert abs(np.mean(train.labels != train.true_labels) - 0.25) < 0.06
