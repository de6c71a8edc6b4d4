"""Heads on features: which of them learns from a sample, and which speaks of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flywheel_fast import heads
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.errors import BadInput
from flywheel_fast.models import NetworkConfig

N, D, C, K = 60, 8, 3, 4


def make(hidden=0, folds=K, counts=(20, 20, 20)):
    features = np.random.default_rng(0).normal(3, 2, (N, 1, D)).astype(np.float16)
    labels = np.repeat(np.arange(C), counts)
    manifest = Manifest(".", np.array([f"{i}.png" for i in range(N)]), labels, ("a", "b", "c"))
    loader = SimpleNamespace(manifest=manifest, rows=np.arange(N), features=SimpleNamespace(array=features))
    built = heads.build(NetworkConfig(hidden=hidden), C, 5, loader, folds, 7)
    return built, torch.from_numpy(features[:, 0]).float()


@pytest.mark.parametrize("hidden", [0, 32])
def test_the_head_that_speaks_of_a_sample_never_learns_from_it(hidden):
    """Gradients of a sample's loss reach every head but its own."""
    built, features = make(hidden)
    width = hidden or C
    for sample in range(8):
        built.zero_grad()
        index = torch.tensor([sample])
        logits = built.train()(features[index], index)
        assert logits.shape == (K, C)  # K - 1 of other folds, and the one for all
        F.cross_entropy(logits, torch.zeros(K, dtype=torch.int64)).backward()
        moved = built.weight.grad.unflatten(0, (K + 1, width)).abs().sum(dim=(1, 2)) > 0
        own = int(built.folds[sample])
        assert moved.tolist() == [number != own for number in range(K + 1)]


@pytest.mark.parametrize("hidden", [0, 6])
def test_in_evaluation_the_own_fold_speaks_and_new_pictures_have_the_head_for_all(hidden):
    built, features = make(hidden)
    built.eval()
    plain = built.last()
    torch.testing.assert_close(built(features), plain(features), rtol=1e-4, atol=1e-5)
    index = torch.arange(N)
    with torch.no_grad():
        every = built._all((features - built.mean) * built.scale, only_last=False)
        assert torch.equal(built(features, index), every[index, built.folds])
        both = built(torch.cat([features, features + 1]), index)  # two views of each
    torch.testing.assert_close(both[:N], every[index, built.folds])


def test_two_views_of_a_sample_are_of_one_fold():
    built, features = make()
    index = torch.tensor([4, 9])
    logits = built.train()(torch.cat([features[index], features[index]]), index)
    assert logits.shape == (K * 4, C)
    for block in logits.view(K, 2, 2, C):
        torch.testing.assert_close(block[0], block[1])


def test_without_folds_there_is_one_head():
    built, features = make(folds=0)
    index = torch.arange(N)
    assert built.folds is None and torch.equal(built.train()(features, index), built.eval()(features))


def test_folds_are_a_function_of_the_seed_and_cover_the_samples():
    fold = heads.fold_of(10_000, 5, seed=3)
    assert torch.equal(fold, heads.fold_of(10_000, 5, seed=3)) and not torch.equal(fold, heads.fold_of(10_000, 5, 4))
    assert (torch.bincount(fold, minlength=5) - 2000).abs().max() < 200 and int(fold.max()) == 4


def test_a_class_smaller_than_the_folds_is_named():
    with pytest.raises(BadInput, match=r"model\.folds=4: class 'c' has 3 samples only; lower"):
        make(counts=(30, 27, 3))
