"""What is odd about images, found by their features."""

from types import SimpleNamespace

import numpy as np
import pytest

from flywheel_fast import oddities


def make(n=300, d=16):
    """Two clouds, and labels of them."""
    rng = np.random.default_rng(0)
    given = np.repeat([0, 1], n // 2)
    features = rng.normal(size=(n, d)) * 0.3 + np.where(given[:, None] == 0, 1, -1) * np.eye(1, d)[0] * 4
    labels = SimpleNamespace(
        files=np.array([f"{i}.png" for i in range(n)]),
        given=given,
        classes=("a", "b"),
        suggested=given.copy(),
        suggested_prob=np.full(n, 0.9),
    )
    return features.astype(np.float32), labels, (1 - given, np.full(n, 0.1))


def by_kind(found, kind):
    return [one for one in found if one.kind == kind]


def test_each_kind_is_found_and_survives_the_file(tmp_path):
    features, labels, (other, share) = make()
    features[7] = np.eye(1, 16, 9)[0] * 40  # far from all
    features[200] = features[20]  # of the other class
    labels.suggested_prob[33], share[33] = 0.5, 0.45
    found, why_not = oddities.find(features, labels, (other, share))
    assert not why_not
    assert by_kind(found, "outlier")[0].file_name == "7.png"
    twins = by_kind(found, "near-duplicate")
    assert {("20.png", "200.png"), ("200.png", "20.png")} <= {(one.file_name, one.detail) for one in twins}
    assert [(one.file_name, one.detail) for one in by_kind(found, "two classes")] == [("33.png", "a, b")]
    oddities.write(found, tmp_path)
    assert [one.file_name for one in oddities.read(tmp_path)] == [one.file_name for one in found]
    assert oddities.read(tmp_path / "nowhere") == []


def test_neighbours_are_the_nearest_by_cosine():
    features, *_ = make(64)
    cosine, neighbour, _ = oddities.neighbours(features)
    centred = features - features.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    every = unit @ unit.T
    np.fill_diagonal(every, -2)
    np.testing.assert_array_equal(neighbour[:, 0], every.argmax(axis=1))
    np.testing.assert_allclose(cosine, -np.sort(-every, axis=1)[:, : oddities.NEIGHBOURS], atol=1e-5)


def test_very_many_take_faiss_or_are_said_to(monkeypatch):
    features, labels, second = make()
    monkeypatch.setattr(oddities, "EXACT", 100)
    monkeypatch.setattr(oddities, "find_spec", lambda name: None)
    found, why_not = oddities.find(features, labels, second)
    assert "faiss-cpu" in why_not and not by_kind(found, "outlier")


def test_faiss_finds_what_is_found_without(monkeypatch):
    pytest.importorskip("faiss")
    features, *_ = make(2000)
    _, exact, _ = oddities.neighbours(features)
    monkeypatch.setattr(oddities, "EXACT", 100)
    _, found, _ = oddities.neighbours(features)
    assert np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(exact, found, strict=True)]) > 0.9
